//! Requests that wait for the medium, carried out beside those that follow them on the same connection.
//!
//! ```text
//!   serve ── Later ─▶ queue ─▶ threads, as many as there are requests, at most THREADS_MAX ─▶ reply, when its turn comes
//!      └──── replies ────────────────────────────────────────────────────────────────────▶   to speak on the socket
//! ```
//!
//! A client with many reads under way gets as much of a medium as it can give, and one whose data is in memory never
//! has a thread here. io_uring is left out because it is no faster for this: `scripts/bench.sh disk` has fio do 4 KiB
//! requests either way, and sixteen threads did 0.7 to 1.9 times as many on a medium as a ring of depth 32, one thread
//! 1.0 to 1.9 times as many in memory.
//!
//! The trap: two threads that speak at once. Whoever has something to say holds the socket's turn for whole replies.

use super::BUSY_RETRY;
use super::threads::Stream;
use crate::daemon::links::lock;
use crate::disk::{Disk, DiskError};
use crate::nbd::reply::{Replies, Served};
use crate::nbd::server::{KEPT_BYTES, Later};
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::Scope;

/// Requests that wait at the same time, each of a client's.
const THREADS_MAX: usize = 16;

type Open<'env> = dyn Fn() -> Result<Box<dyn Disk>, DiskError> + Sync + 'env;

/// What works beside one connection.
pub(super) struct Beside<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    open: &'env Open<'env>,
    stream: Arc<Mutex<Stream>>,
    sender: SyncSender<Later>,
    queue: Arc<Mutex<Receiver<Later>>>,
    /// Requests taken and not yet answered.
    under_way: Arc<AtomicUsize>,
    threads: usize,
}

impl<'scope, 'env> Beside<'scope, 'env> {
    /// Nobody yet, on a connection whose other speaker asks for its turn too. `open` makes a handle on the disk.
    pub(super) fn new(stream: Stream, scope: &'scope Scope<'scope, 'env>, open: &'env Open<'env>) -> Self {
        let (sender, queue) = sync_channel(THREADS_MAX);
        let (stream, queue) = (Arc::new(Mutex::new(stream)), Arc::new(Mutex::new(queue)));
        Self { scope, open, stream, sender, queue, under_way: Arc::default(), threads: 0 }
    }

    /// The turn to speak.
    pub(super) fn speak(&self) -> MutexGuard<'_, Stream> {
        lock(&self.stream)
    }

    /// Takes a request; waits while too many do.
    pub(super) fn take(&mut self, later: Later) -> io::Result<()> {
        let under_way = self.under_way.fetch_add(1, Ordering::Relaxed);
        if self.threads < THREADS_MAX && under_way >= self.threads {
            match self.begin_one() {
                Ok(()) => self.threads += 1,
                // Those there are do it, one after another: no descriptor is left, or no thread.
                Err(error) if self.threads > 0 => tracing::debug!(%error, "no further thread for a client"),
                Err(error) => return Err(error),
            }
        }
        self.sender.send(later).map_err(io::Error::other)
    }

    fn begin_one(&self) -> io::Result<()> {
        let worker = Worker {
            disk: (self.open)().map_err(io::Error::other)?,
            stream: self.stream.clone(),
            queue: self.queue.clone(),
            under_way: self.under_way.clone(),
        };
        let thread = std::thread::Builder::new().name("nbd-beside".into());
        thread.spawn_scoped(self.scope, move || worker.run()).map(drop)
    }
}

struct Worker {
    disk: Box<dyn Disk>,
    stream: Arc<Mutex<Stream>>,
    queue: Arc<Mutex<Receiver<Later>>>,
    under_way: Arc<AtomicUsize>,
}

impl Worker {
    /// Until the connection is over and nothing is left to do.
    fn run(mut self) {
        let mut out = Replies::default();
        loop {
            // Held while it waits: one thread at a time does.
            let next = lock(&self.queue).recv();
            let Ok(later) = next else { return };
            while later.carry_out(&mut *self.disk, &mut out) == Served::Busy {
                std::thread::sleep(BUSY_RETRY);
            }
            let mut stream = lock(&self.stream);
            if stream.write_all(out.as_slice()).is_err() {
                // Whoever reads from it finds out, and the connection ends there.
                stream.shutdown();
            }
            drop(stream);
            out.clear(KEPT_BYTES);
            self.under_way.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
