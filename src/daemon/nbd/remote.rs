//! A disk on an NBD server, through whatever connections there are: the pure machine of [`crate::nbd::session`] on
//! sockets.
//!
//! ```text
//!   submit() ─▶ session ◀─ receive ── link ◀─┐   a task a connection
//!   completion() ◀─┘   └── send ─────▶ link ─┴─▶ server
//!                  ▲
//!                  └ driver: dials, closes, and watches the clock
//! ```
//!
//! The session is behind a lock that nobody holds while waiting. To take it and to wake somebody costs as much as to send
//! 4 KiB: so many requests are submitted at once, and many completions taken, and only those are woken whom it concerns.
//! A connection reads and writes at the same time: one
//! that only wrote would wait for a server that waits for its replies to be read.

use crate::clock::Instant;
use crate::daemon::address::{Address, Link};
use crate::daemon::engine_clock;
use crate::daemon::links::lock;
use crate::nbd::client::{ExportInfo, SubmitError};
use crate::nbd::request::Request;
use crate::nbd::session::{Action, Completion, Session, SessionError, Status};
use bytes::BytesMut;
use std::collections::HashMap;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};

/// Bytes asked of a socket at once.
const READ_BYTES: usize = 1 << 20;
/// Bytes collected for one write.
const WRITE_BYTES: usize = 256 << 10;
/// How long the good-byes may take.
const LEAVE_DEADLINE: Duration = Duration::from_secs(1);

/// An attempt to connect.
pub type Dialling = Pin<Box<dyn Future<Output = io::Result<Link>> + Send>>;
/// Connects to the server, whenever it is called.
pub type Connect = Box<dyn FnMut() -> Dialling + Send>;

/// Connects to an address.
#[must_use]
pub fn to(address: Address) -> Connect {
    Box::new(move || {
        let address = address.clone();
        Box::pin(async move { address.connect().await })
    })
}

/// Uses a connection that is there, and then those that `next` makes.
#[must_use]
pub fn begun(first: Link, mut next: Connect) -> Connect {
    let mut first = Some(first);
    Box::new(move || match first.take() {
        Some(link) => Box::pin(std::future::ready(Ok(link))),
        None => next(),
    })
}

/// An export of an NBD server. Dropping it closes its connections; [`Self::close`] says good-bye first.
#[derive(Debug)]
pub struct Remote {
    shared: Arc<Shared>,
    driver: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// For the caller.
    changed: Notify,
    /// For connections that have nothing to send.
    sendable: Notify,
    /// For the driver.
    stirred: Notify,
    sent_bytes: Arc<AtomicU64>,
}

#[derive(Debug)]
struct State {
    session: Session,
    /// When the driver wakes up by itself.
    wakes_at: Option<Instant>,
    actions: Vec<Action>,
}

impl Shared {
    /// Does something with the session, and tells whoever that concerns.
    fn with<T>(&self, what: impl FnOnce(&mut Session, Instant) -> T) -> T {
        let result = self.ask(what);
        self.changed.notify_waiters();
        result
    }

    /// [`Self::with`], for the caller: it knows.
    fn ask<T>(&self, what: impl FnOnce(&mut Session, Instant) -> T) -> T {
        let mut state = lock(&self.state);
        let result = what(&mut state.session, engine_clock());
        while let Some(action) = state.session.poll_action() {
            state.actions.push(action);
        }
        let due = state.session.poll_timeout();
        let earlier = due.is_some_and(|due| state.wakes_at.is_none_or(|wakes_at| due < wakes_at));
        if earlier || !state.actions.is_empty() {
            self.stirred.notify_one();
        }
        let sends = state.session.has_output() || state.session.failed().is_some();
        drop(state);
        if sends {
            self.sendable.notify_waiters();
        }
        result
    }

    /// Waits until `look` finds something.
    async fn wait<T>(&self, look: impl FnMut(&mut Session) -> Option<T>) -> T {
        self.wait_for(&self.changed, look).await
    }

    async fn wait_for<T>(&self, changed: &Notify, mut look: impl FnMut(&mut Session) -> Option<T>) -> T {
        loop {
            // Before the look, so that no change falls in between.
            let mut changed = pin!(changed.notified());
            changed.as_mut().enable();
            if let Some(found) = look(&mut lock(&self.state).session) {
                return found;
            }
            changed.await;
        }
    }
}

impl Remote {
    /// Begins a session, whose connections `connect` makes, one call for each. `sent_bytes` counts what is written to
    /// them.
    #[must_use]
    pub fn open(session: Session, connect: Connect, sent_bytes: Arc<AtomicU64>) -> Self {
        let state = Mutex::new(State { session, wakes_at: None, actions: Vec::new() });
        let (changed, sendable, stirred) = Default::default();
        let shared = Arc::new(Shared { state, changed, sendable, stirred, sent_bytes });
        Self { driver: tokio::spawn(drive(shared.clone(), connect)), shared }
    }

    /// The export, as soon as there was a connection.
    pub async fn export(&self) -> Result<ExportInfo, SessionError> {
        let look = |session: &mut Session| session.failed().cloned().map(Err).or(session.export().map(Ok));
        self.shared.wait(look).await
    }

    /// [`Session::submit`]. What is [`SubmitError::Full`] may be tried again after the next completion.
    pub fn submit(&self, request: Request) -> Result<u64, SubmitError> {
        self.submit_all(|submit| submit(request))
    }

    /// Submits as many as `what` does.
    pub fn submit_all<T>(&self, what: impl FnOnce(&mut dyn FnMut(Request) -> Result<u64, SubmitError>) -> T) -> T {
        self.shared.ask(|session, now| what(&mut |request| session.submit(request, now)))
    }

    /// The next completion, or why there will be none any more. Nothing is lost when it is not waited for to the end.
    pub async fn completion(&self) -> Result<Completion, SessionError> {
        let look = |session: &mut Session| match session.poll_completion() {
            Some(completion) => Some(Ok(completion)),
            None => session.failed().cloned().map(Err),
        };
        self.shared.wait(look).await
    }

    /// As [`Self::completion`], and every further one that is there.
    pub async fn completions(&self) -> Result<Vec<Completion>, SessionError> {
        let look = |session: &mut Session| {
            let completions: Vec<_> = std::iter::from_fn(|| session.poll_completion()).collect();
            match session.failed() {
                _ if !completions.is_empty() => Some(Ok(completions)),
                failed => failed.cloned().map(Err),
            }
        };
        self.shared.wait(look).await
    }

    /// Waits until more connections than that were lost, and tells how many, and why the last one was.
    pub async fn lost_more_than(&self, seen: u64) -> (u64, String) {
        let look = |session: &mut Session| {
            let lost = session.lost_connections();
            (lost > seen).then(|| (lost, session.status().last_loss.unwrap_or_default()))
        };
        self.shared.wait(look).await
    }

    /// Waits for the first end of a connection, or of an attempt at one, and tells why: for who wants no other.
    pub async fn loss(&self) -> String {
        self.shared.wait(|session| session.status().last_loss).await
    }

    /// Waits until there is a connection that is ready.
    pub async fn connected(&self) {
        self.shared.wait(|session| (session.status().connections > 0).then_some(())).await
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        lock(&self.shared.state).session.status()
    }

    /// Says good-bye on every connection and closes them. What is under way gets no completion.
    pub async fn close(mut self) {
        self.shared.with(|session, _| session.disconnect());
        self.shared.stirred.notify_one();
        let _ = tokio::time::timeout(LEAVE_DEADLINE, &mut self.driver).await;
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

async fn drive(shared: Arc<Shared>, mut connect: Connect) {
    let mut tasks = JoinSet::new();
    let mut connections: HashMap<u64, AbortHandle> = HashMap::new();
    loop {
        shared.with(Session::handle_timeout);
        let (actions, due, ended) = {
            let mut state = lock(&shared.state);
            state.wakes_at = state.session.poll_timeout();
            let ended = state.session.failed() == Some(&SessionError::Ended);
            (std::mem::take(&mut state.actions), state.wakes_at, ended)
        };
        for action in actions {
            match action {
                Action::Dial(id) => _ = connections.insert(id, tasks.spawn(connection(shared.clone(), id, connect()))),
                Action::Close(id) => _ = connections.remove(&id).map(|task| task.abort()),
            }
        }
        if ended {
            while tasks.join_next().await.is_some() {}
            return;
        }
        let timeout = async {
            match due {
                Some(at) => tokio::time::sleep(at - engine_clock()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared.stirred.notified() => {}
            () = timeout => {}
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// A connection from its first attempt to its end.
async fn connection(shared: Arc<Shared>, id: u64, dialling: Dialling) {
    let why = match converse(&shared, id, dialling).await {
        Ok(()) => "the server hung up".to_owned(),
        Err(error) => error.to_string(),
    };
    tracing::debug!(id, %why, "an NBD connection ended");
    shared.with(|session, now| session.handle_disconnected(id, &why, now));
}

async fn converse(shared: &Shared, id: u64, dialling: Dialling) -> io::Result<()> {
    let (read, write) = tokio::io::split(dialling.await?);
    shared.with(|session, now| session.handle_connected(id, now));
    tokio::select! {
        received = receive(shared, id, read) => received,
        sent = send(shared, id, write) => sent,
    }
}

async fn receive(shared: &Shared, id: u64, mut read: ReadHalf<Link>) -> io::Result<()> {
    let mut input = BytesMut::new();
    loop {
        input.reserve(READ_BYTES);
        if read.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        shared.with(|session, now| session.handle_input(id, &mut input, now));
    }
}

/// Writes what there is for a connection, until the session is over.
async fn send(shared: &Shared, id: u64, mut write: WriteHalf<Link>) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        let look = |session: &mut Session| {
            let mut large = None;
            while buffer.len() < WRITE_BYTES && large.is_none() {
                match session.poll_output(id) {
                    Some(bytes) if bytes.len() >= WRITE_BYTES => large = Some(bytes),
                    Some(bytes) => buffer.extend_from_slice(&bytes),
                    None => break,
                }
            }
            (large.is_some() || !buffer.is_empty() || session.failed().is_some()).then_some(large)
        };
        let large = shared.wait_for(&shared.sendable, look).await.unwrap_or_default();
        if buffer.is_empty() && large.is_empty() {
            return Ok(());
        }
        write.write_all(&buffer).await?;
        write.write_all(&large).await?;
        shared.sent_bytes.fetch_add((buffer.len() + large.len()) as u64, Ordering::Relaxed);
        buffer.clear();
    }
}
