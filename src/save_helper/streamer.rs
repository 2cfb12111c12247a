//! The two threads beside the engine: one that writes what it hands over, one that reads ahead of it.
//!
//! ```text
//! save       engine ─ chunk ─▶ bounded queue ─▶ writer ─▶ descriptor      budget in bytes; a full queue holds the engine
//! restore    engine ◀─ item ── bounded queue ◀─ reader ◀─ descriptor      stops at END and CHECKPOINT until told
//! ```
//!
//! Neither is joined: a thread that is stuck in the descriptor of a peer that hangs must not keep the process from
//! putting the domain in order and saying so. Page buffers go round, since a fresh one costs as much as the copy.

use super::Failure;
use crate::image::decoder::{Decoder, Item};
use crate::image::{Pages, Record};
use bytes::BytesMut;
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How soon a cancelled engine notices while it waits.
const CANCEL_POLL: Duration = Duration::from_millis(50);
/// Page buffers kept for the next batch.
const SPARE_MAX: usize = 8;
/// Smallest page buffer that is kept.
const SPARE_MIN_BYTES: usize = 64 << 10;
/// Items read ahead, 4 MiB at most each.
const READ_AHEAD: usize = 4;

/// Page buffers that wait for the next batch.
#[derive(Clone, Default)]
pub(super) struct Spare(Arc<Mutex<Vec<Vec<u8>>>>);

impl Spare {
    /// A buffer, perhaps with memory, and with whatever was in it.
    pub(super) fn take(&self) -> Vec<u8> {
        lock(&self.0).pop().unwrap_or_default()
    }

    /// A buffer of which every byte is about to be overwritten. Small ones, which are headers, are not worth a spare.
    fn take_sized(&self, bytes: usize) -> Vec<u8> {
        let mut buffer = if bytes < SPARE_MIN_BYTES { Vec::new() } else { self.take() };
        buffer.resize(bytes, 0);
        buffer
    }

    /// Keeps a buffer's memory. Its length stays: what is about to be overwritten need not be zeroed first.
    pub(super) fn give(&self, buffer: Vec<u8>) {
        let mut spare = lock(&self.0);
        if buffer.capacity() >= SPARE_MIN_BYTES && spare.len() < SPARE_MAX {
            spare.push(buffer);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that belong together: the head of a record, and the pages behind it.
struct Chunk {
    head: BytesMut,
    pages: Vec<u8>,
}

impl Chunk {
    fn len(&self) -> usize {
        self.head.len() + self.pages.len()
    }
}

#[derive(Default)]
struct Queue {
    chunks: VecDeque<Chunk>,
    /// Bytes handed over and not written.
    waiting_bytes: usize,
    written_bytes: u64,
    error: Option<io::Error>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    spare: Spare,
}

/// Writes behind the engine's back.
pub(super) struct Writer<'a> {
    shared: Arc<Shared>,
    budget_bytes: usize,
    cancel: &'a AtomicBool,
}

impl<'a> Writer<'a> {
    /// A writer that holds at most about `budget_bytes`.
    pub(super) fn new(stream: impl Write + Send + 'static, budget_bytes: usize, cancel: &'a AtomicBool) -> Self {
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new(), spare: Spare::default() });
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || write_loop(&theirs, stream));
        Self { shared, budget_bytes, cancel }
    }

    /// Page buffers to fill.
    pub(super) fn spare(&self) -> &Spare {
        &self.shared.spare
    }

    /// Hands over a record's head and its pages; waits while the budget is spent.
    pub(super) fn push(&self, head: BytesMut, pages: Vec<u8>) -> Result<(), Failure> {
        let chunk = Chunk { head, pages };
        let mut queue = self.wait(|queue| queue.waiting_bytes < self.budget_bytes)?;
        queue.waiting_bytes += chunk.len();
        queue.chunks.push_back(chunk);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Waits until everything is written, and returns how much that was in all.
    pub(super) fn flush(&self) -> Result<u64, Failure> {
        self.wait(|queue| queue.waiting_bytes == 0).map(|queue| queue.written_bytes)
    }

    fn wait(&self, ready: impl Fn(&Queue) -> bool) -> Result<MutexGuard<'_, Queue>, Failure> {
        let mut queue = lock(&self.shared.queue);
        loop {
            if let Some(error) = queue.error.take() {
                return Err(Failure::Stream { what: "write", error });
            }
            if self.cancel.load(Ordering::Relaxed) {
                return Err(Failure::Cancelled);
            }
            if ready(&queue) {
                return Ok(queue);
            }
            let waited = self.shared.changed.wait_timeout(queue, CANCEL_POLL);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.changed.notify_all();
    }
}

fn write_loop(shared: &Shared, mut stream: impl Write) {
    let mut queue = lock(&shared.queue);
    loop {
        let Some(chunk) = queue.chunks.pop_front().filter(|_| !queue.closed) else {
            if queue.closed {
                return;
            }
            queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(queue);
        let written = write_both(&mut stream, &chunk.head, &chunk.pages);
        queue = lock(&shared.queue);
        queue.waiting_bytes -= chunk.len();
        queue.written_bytes += chunk.len() as u64;
        shared.spare.give(chunk.pages);
        if let Err(error) = written {
            queue.error = Some(error);
            queue.closed = true;
        }
        shared.changed.notify_all();
    }
}

/// Both in one call as far as the descriptor takes them.
fn write_both(stream: &mut impl Write, head: &[u8], pages: &[u8]) -> io::Result<()> {
    let mut slices = [IoSlice::new(head), IoSlice::new(pages)];
    let mut left = &mut slices[..];
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match stream.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => IoSlice::advance_slices(&mut left, bytes),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    stream.flush()
}

/// Reads ahead of the engine, but never past END or CHECKPOINT.
pub(super) struct Reader {
    items: Receiver<Result<Item, Failure>>,
    go_on: SyncSender<()>,
    spare: Spare,
}

impl Reader {
    /// A reader at the image header.
    pub(super) fn new(stream: impl Read + Send + 'static) -> Self {
        let (to_engine, items) = sync_channel(READ_AHEAD);
        let (go_on, may_go_on) = sync_channel(1);
        let spare = Spare::default();
        let theirs = spare.clone();
        std::thread::spawn(move || read_loop(stream, &theirs, &to_engine, &may_go_on));
        Self { items, go_on, spare }
    }

    /// The next thing the image says.
    pub(super) fn next(&self) -> Result<Item, Failure> {
        let gone = || Failure::Stream { what: "read", error: io::ErrorKind::BrokenPipe.into() };
        self.items.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// libxl is done with the descriptor: read on behind a CHECKPOINT.
    pub(super) fn go_on(&self) {
        // A reader that is gone says so when it is asked for an item.
        let _ = self.go_on.send(());
    }

    /// Keeps the memory of pages that have been written to the guest.
    pub(super) fn done_with(&self, pages: Pages) {
        self.spare.give(pages.bytes);
    }
}

fn read_loop(
    mut stream: impl Read,
    spare: &Spare,
    items: &SyncSender<Result<Item, Failure>>,
    may_go_on: &Receiver<()>,
) {
    let mut decoder = Decoder::new();
    while !decoder.is_over() {
        let mut bytes = spare.take_sized(decoder.wants());
        let item = match stream.read_exact(&mut bytes) {
            Ok(()) => decoder.feed(bytes).map_err(Failure::Image),
            Err(error) => Err(Failure::Stream { what: "read", error }),
        };
        let Some(item) = item.transpose() else { continue };
        let failed = item.is_err();
        let checkpoint = matches!(item, Ok(Item::Record(Record::Checkpoint)));
        if items.send(item).is_err() || failed || checkpoint && may_go_on.recv().is_err() {
            return;
        }
    }
}
