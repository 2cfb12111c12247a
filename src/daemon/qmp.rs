//! Monitors: QMP's sessions on Unix sockets, and what their orders do.
//!
//! ```text
//!  accept ─ same user? ─ a place is free? ─▶ qmp::server::Session ─ order ─▶ a task: Service::carry_out ─▶ answer
//!                                                  ▲── events ── the service
//! ```
//!
//! - [`host`]: the monitor of a host's guest, whose orders go to the engine;
//! - [`replica`]: the monitor of a replica that stands alone, for a QEMU that is the primary;
//! - [`client`]: the other end;
//! - [`pair`]: two QEMUs, ordered to be a pair.
//!
//! The trap: the order of a client that has left goes on to its end. It cannot be taken back halfway.

pub mod client;
pub mod host;
pub mod pair;
pub mod replica;

use super::accept::accept;
use super::control::is_ours;
use crate::qmp::server::Session;
use crate::qmp::{Event, Outcome, commands::Command};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, broadcast, mpsc};

/// Clients at the same time; one more is hung up on.
pub const CLIENTS_MAX: usize = 32;
/// How long a client may take to read what it is told.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Events that wait for a client that is slow to read.
const EVENTS_WAITING: usize = 256;
/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

/// What carries orders out.
pub trait Service: Send + Sync + 'static {
    /// The commands it has.
    fn commands(&self) -> &'static [&'static str];
    /// Carries one out, to its end.
    fn carry_out(self: Arc<Self>, command: Command) -> impl Future<Output = Outcome> + Send;
    /// What happens from now on.
    fn events(&self) -> broadcast::Receiver<Event>;
}

/// Where a service tells its events.
#[must_use]
pub fn teller() -> broadcast::Sender<Event> {
    broadcast::channel(EVENTS_WAITING).0
}

/// Serves a monitor until the socket fails.
pub async fn serve<S: Service>(listener: UnixListener, service: Arc<S>) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        let (stream, _) = accept("a monitor's client", || listener.accept()).await;
        // The directory keeps others out already, unless somebody opened it.
        if let Err(why) = is_ours(&stream) {
            tracing::warn!(%why, "a monitor's client is of another user");
            continue;
        }
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(max = CLIENTS_MAX, "a monitor's client is one too many");
            continue;
        };
        let service = service.clone();
        tokio::spawn(async move {
            if let Err(error) = converse(stream, &service).await {
                tracing::debug!(%error, "a monitor's client is lost");
            }
            drop(place);
        });
    }
}

/// One client, until it leaves and is owed nothing.
async fn converse<S: Service>(stream: UnixStream, service: &Arc<S>) -> io::Result<()> {
    let mut events = service.events();
    let mut session = Session::new(service.commands());
    let (answers_sender, mut answers) = mpsc::channel::<(u64, Outcome)>(16);
    let (mut read, mut write) = stream.into_split();
    let (mut chunk, mut hung_up) = (vec![0; READ_BYTES], false);
    loop {
        while let Some(bytes) = session.poll_output() {
            tokio::time::timeout(WRITE_DEADLINE, write.write_all(&bytes)).await??;
        }
        while let Some(order) = session.poll_order() {
            let (service, answers) = (service.clone(), answers_sender.clone());
            tokio::spawn(async move {
                let outcome = service.carry_out(order.command).await;
                // It may have left.
                let _ = answers.send((order.ticket, outcome)).await;
            });
        }
        if hung_up && !session.owes() {
            return Ok(());
        }
        let room = session.room().min(chunk.len());
        tokio::select! {
            biased;
            Some((ticket, outcome)) = answers.recv() => {
                // What an order did is told before it is done.
                while let Ok(event) = events.try_recv() {
                    session.handle_event(super::unix_us(), &event);
                }
                session.handle_answer(ticket, outcome);
            }
            // What a slow client has missed is lost to it.
            event = events.recv() => if let Ok(event) = event {
                session.handle_event(super::unix_us(), &event);
            },
            bytes = read.read(&mut chunk[..room]), if room > 0 && !hung_up => match bytes? {
                0 => hung_up = true,
                bytes => session.handle_input(&chunk[..bytes]),
            },
        }
    }
}
