//! A client that outlives its connections: several at once, and others when those are gone.
//!
//! ```text
//!   a connection:   Dial ─▶ connecting ── handle_connected ──▶ negotiating ── the export, unchanged ──▶ ready
//!                    ▲          │                                   │                                    │
//!                    │          └── refused, or not within the reply timeout ──┬─ a reply is overdue, ───┘
//!                    │                                                         │  hung up, nonsense, ESHUTDOWN
//!                    └────────── later: 50 ms, doubling to 2 s ────────────── lost ─▶ Close
//!
//!   the session:    none ready for longer than the patience · the export changed ──▶ failed, for good
//! ```
//!
//! More than one connection is opened only when the export says NBD_FLAG_CAN_MULTI_CONN. The order of requests is kept
//! across them as within one: what depends on an earlier request is not sent before that is complete. What was sent on
//! a connection that is lost and has no reply is sent again. The traps:
//!
//! - **A reply that was lost.** The write was carried out, and is carried out again. That is harmless because nothing
//!   that overlaps it was let past it in between: it is not complete, so it still stands in their way.
//! - **A server that is slow to let go.** The protocol has no fence. A server that goes on with the requests of a
//!   connection it has lost, while it serves another, may carry an old write out after a newer one. Nothing here can
//!   prevent that. So [`Config::reply_timeout`] must be longer than any request can take at the server; and a
//!   connection that breaks while the server lives is safe only with one that then drops what it had read.
//! - **Writes that are complete and not flushed** are lost when the server's machine dies, not its process (and a
//!   server without NBD_FLAG_CAN_MULTI_CONN promises nothing about a flush on the next connection). With
//!   [`Config::retain_bytes`] they are kept until a flush covers them, and done again on the next connection. The
//!   price is memory, a flush of the session's own whenever half of it is used, and that there is one connection only:
//!   of two, one may lead to the machine before it died, and a flush on the other covers nothing of it. Without it
//!   [`Status::doubtful_writes`] counts them, and that is all.
//!
//! Source: `doc/proto.md`, "Ordering of messages and writes", "Transmission flags" (NBD_FLAG_CAN_MULTI_CONN),
//! "Error values" (NBD_ESHUTDOWN), "Terminating the transmission phase".

mod ledger;

use self::ledger::Ledger;
use super::client::{Client, ExportInfo, Limits, SubmitError};
use super::request::Request;
use super::*;
use crate::clock::Instant;
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// What may differ between one connection's export and the next's without being missed here.
const FLAGS_NEEDED: u16 =
    EXPORT_SEND_FLUSH | EXPORT_SEND_FUA | EXPORT_SEND_TRIM | EXPORT_SEND_WRITE_ZEROES | EXPORT_CAN_MULTI_CONN;

/// How a session behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// How much the caller may have under way; completions it has not taken count.
    pub limits: Limits,
    /// Connections, when the export allows more than one and nothing is retained. At least one is made.
    pub connections: usize,
    /// A connection is lost when a reply takes longer, or all of its negotiation.
    pub reply_timeout: Duration,
    /// Time before the first attempt to connect again. It doubles until something is achieved.
    pub backoff_min: Duration,
    /// The longest such time.
    pub backoff_max: Duration,
    /// The session fails when it has no connection for so long. A connection on which nothing is ever answered does
    /// not count as one afterwards.
    pub patience: Duration,
    /// About how many bytes of complete writes are kept until a flush covers them; 0 for none. What is under way comes
    /// on top. Needs a server that knows NBD_CMD_FLUSH; for any other, what is complete is as good as durable.
    pub retain_bytes: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            connections: 1,
            reply_timeout: Duration::from_secs(30),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
            patience: Duration::from_secs(60),
            retain_bytes: 0,
        }
    }
}

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// There was no connection for too long.
    #[error("no connection to the NBD server for {patience:?}: {why}")]
    NoConnection {
        /// How long.
        patience: Duration,
        /// What ended the last one.
        why: String,
    },
    /// Behind a new connection is another export, or one that can do less.
    #[error("the NBD export has changed: it was {was:?} and is {is:?}")]
    Changed {
        /// Of the first connection.
        was: ExportInfo,
        /// Of the new one.
        is: ExportInfo,
    },
    /// A write that was complete could not be done again on a new connection.
    #[error("a complete write could not be repeated after the connection was lost: {errno:?}")]
    Replay {
        /// What the server said.
        errno: Errno,
    },
    /// The session's own flush failed: what was complete is not durable, and may be gone.
    #[error("the NBD server could not flush: {errno:?}")]
    Flush {
        /// What the server said.
        errno: Errno,
    },
    /// The caller ended it.
    #[error("the NBD session was ended")]
    Ended,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The server said so.
    #[error("the NBD server refused: {0:?}")]
    Refused(Errno),
    /// The session is over; whether the server carried the request out is not known.
    #[error(transparent)]
    Session(SessionError),
}

/// A request is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// The number its submission returned.
    pub cookie: u64,
    /// What a read brought; empty for the others.
    pub result: Result<Bytes, RequestError>,
}

/// What the driver is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Connect; then [`Session::handle_connected`] or [`Session::handle_disconnected`] with this number.
    Dial(u64),
    /// Close this connection, or stop connecting. Its number is not used again.
    Close(u64),
}

/// How a session is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Connections that are ready.
    pub connections: usize,
    /// Connections that were ready and are lost.
    pub lost_connections: u64,
    /// Requests submitted whose completion was not taken.
    pub under_way: usize,
    /// Writes that are complete and that no flush covers: durable only as far as the server's cache is. Always 0 for a
    /// server that knows no flush.
    pub unflushed_writes: u64,
    /// Writes that were so when a connection was lost, and were not retained: gone, if it was the server's machine that
    /// died. A later flush says nothing about them.
    pub doubtful_writes: u64,
    /// What ended the last connection that ended.
    pub last_loss: Option<String>,
    /// Why the session is over, once it is.
    pub failed: Option<SessionError>,
}

#[derive(Debug)]
struct Connection {
    /// `None` until it is connected.
    client: Option<Client>,
    ready: bool,
    begun: Instant,
    /// By the connection's own cookie: the session's, and when it was sent.
    sent: BTreeMap<u64, (u64, Instant)>,
}

impl Connection {
    /// When it is lost, unless something is heard.
    fn deadline(&self, timeout: Duration) -> Option<Instant> {
        match self.ready {
            false => Some(self.begun + timeout),
            true => self.sent.values().next().map(|(_, sent_at)| *sent_at + timeout),
        }
    }
}

/// Requests to one export, over whatever connections there are.
#[derive(Debug)]
pub struct Session {
    name: String,
    config: Config,
    ledger: Ledger,
    connections: BTreeMap<u64, Connection>,
    next_id: u64,
    export: Option<ExportInfo>,
    dial_at: Instant,
    backoff: Duration,
    /// Since when there is no connection that achieves anything.
    alone_since: Option<Instant>,
    actions: VecDeque<Action>,
    lost_connections: u64,
    doubtful_writes: u64,
    last_loss: Option<String>,
    failed: Option<SessionError>,
}

impl Session {
    /// A session with the export `name`, whose first connection is to be dialled at once.
    pub fn new(name: impl Into<String>, config: Config, now: Instant) -> Result<Self, NbdError> {
        let name = name.into();
        // The name is checked here, where there is somebody to tell.
        Client::new(name.clone(), config.limits)?;
        let mut session = Self {
            name,
            config,
            ledger: Ledger::new(config.retain_bytes),
            connections: BTreeMap::new(),
            next_id: 1,
            export: None,
            dial_at: now,
            backoff: config.backoff_min,
            alone_since: Some(now),
            actions: VecDeque::new(),
            lost_connections: 0,
            doubtful_writes: 0,
            last_loss: None,
            failed: None,
        };
        session.dial(now);
        Ok(session)
    }

    /// The export, from the first connection on.
    #[must_use]
    pub fn export(&self) -> Option<ExportInfo> {
        self.export
    }

    /// Why it is over, once it is.
    #[must_use]
    pub fn failed(&self) -> Option<&SessionError> {
        self.failed.as_ref()
    }

    /// [`Status::lost_connections`].
    #[must_use]
    pub fn lost_connections(&self) -> u64 {
        self.lost_connections
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        Status {
            connections: self.connections.values().filter(|connection| connection.ready).count(),
            lost_connections: self.lost_connections,
            under_way: self.ledger.callers(),
            unflushed_writes: self.ledger.unflushed(),
            doubtful_writes: self.doubtful_writes,
            last_loss: self.last_loss.clone(),
            failed: self.failed.clone(),
        }
    }

    /// Takes a request; it is kept until it is complete, connection or not. Refused before the first connection is
    /// ready, and when the session is over. Returns the cookie its completion will carry.
    pub fn submit(&mut self, request: Request, now: Instant) -> Result<u64, SubmitError> {
        let info = self.export.filter(|_| self.failed.is_none()).ok_or(SubmitError::NotReady)?;
        request.check(&info)?;
        let bytes = self.ledger.callers_bytes() + request.payload_bytes();
        let full = self.ledger.callers() >= self.config.limits.requests || bytes > self.config.limits.bytes;
        if full && self.ledger.callers() > 0 {
            return Err(SubmitError::Full);
        }
        let cookie = self.ledger.submit(request);
        self.send(now);
        Ok(cookie)
    }

    /// A request that is over, if there is one.
    pub fn poll_completion(&mut self) -> Option<Completion> {
        self.ledger.poll_completion()
    }

    /// Something for the driver to do, if there is.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Whether [`Self::poll_output`] has something for any connection.
    #[must_use]
    pub fn has_output(&self) -> bool {
        self.connections.values().filter_map(|one| one.client.as_ref()).any(Client::has_output)
    }

    /// Bytes for a connection's server, if there are any.
    pub fn poll_output(&mut self, id: u64) -> Option<Bytes> {
        self.connections.get_mut(&id)?.client.as_mut()?.poll_output()
    }

    /// When [`Self::handle_timeout`] is to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.failed.is_some() {
            return None;
        }
        let overdue = self.connections.values().filter_map(|one| one.deadline(self.config.reply_timeout));
        let dial = (self.connections.len() < self.wanted()).then_some(self.dial_at);
        let alone = self.alone_since.filter(|_| !self.has_ready()).map(|since| since + self.config.patience);
        overdue.chain(dial).chain(alone).min()
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        let timeout = self.config.reply_timeout;
        let is_overdue = |one: &Connection| one.deadline(timeout).is_some_and(|deadline| deadline <= now);
        while let Some((id, one)) = self.connections.iter().find(|(_, one)| is_overdue(one)) {
            let (id, what) = (*id, if one.ready { "no reply" } else { "no connection" });
            self.lose(id, format!("{what} within {timeout:?}"), now);
        }
        self.check_patience(now);
        self.dial(now);
    }

    /// A connection stands; the server speaks first.
    pub fn handle_connected(&mut self, id: u64, now: Instant) {
        match (self.connections.get_mut(&id), Client::new(self.name.clone(), self.config.limits)) {
            (Some(connection), Ok(client)) => connection.client = Some(client),
            (Some(_), Err(error)) => self.lose(id, error.to_string(), now),
            // It was given up meanwhile.
            (None, _) => {}
        }
    }

    /// A connection is closed, or could not be made, and why. What has no reply is sent again on another.
    pub fn handle_disconnected(&mut self, id: u64, why: &str, now: Instant) {
        self.lose(id, why.to_owned(), now);
        self.dial(now);
    }

    /// Consumes what it can of a connection's `input`. A server that breaks the protocol loses the connection.
    pub fn handle_input(&mut self, id: u64, input: &mut BytesMut, now: Instant) {
        let Some(client) = self.connections.get_mut(&id).and_then(|one| one.client.as_mut()) else {
            input.clear();
            return;
        };
        let result = client.handle_input(input);
        let info = client.export();
        let completions: Vec<_> = std::iter::from_fn(|| client.poll_completion()).collect();
        if let Some(info) = info {
            self.ready(id, info, now);
        }
        for completion in completions {
            self.replied(id, completion, now);
        }
        if let Err(error) = result {
            self.lose(id, error.to_string(), now);
        }
        self.send(now);
        self.dial(now);
    }

    /// Says good-bye on every connection: send what [`Self::poll_output`] still holds, then close them. What is under
    /// way completes with [`SessionError::Ended`].
    pub fn disconnect(&mut self) {
        if self.failed.is_none() {
            self.connections.values_mut().filter_map(|one| one.client.as_mut()).for_each(Client::disconnect);
            self.failed = Some(SessionError::Ended);
            self.ledger.fail(&SessionError::Ended);
        }
    }

    fn has_ready(&self) -> bool {
        self.connections.values().any(|connection| connection.ready)
    }

    /// How many connections there should be.
    fn wanted(&self) -> usize {
        match self.export {
            _ if self.failed.is_some() => 0,
            Some(info) if info.flags & EXPORT_CAN_MULTI_CONN != 0 && !self.ledger.retains() => {
                self.config.connections.max(1)
            }
            _ => 1,
        }
    }

    fn dial(&mut self, now: Instant) {
        while self.dial_at <= now && self.connections.len() < self.wanted() {
            let connection = Connection { client: None, ready: false, begun: now, sent: BTreeMap::new() };
            self.connections.insert(self.next_id, connection);
            self.actions.push_back(Action::Dial(self.next_id));
            self.next_id += 1;
        }
    }

    fn ready(&mut self, id: u64, is: ExportInfo, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id).filter(|connection| !connection.ready) else { return };
        connection.ready = true;
        match self.export {
            Some(was) if !is_as_good(&is, &was) => return self.fail(SessionError::Changed { was, is }),
            Some(_) => {}
            None => {
                self.export = Some(is);
                if is.flags & EXPORT_SEND_FLUSH == 0 {
                    self.ledger.retain_nothing();
                }
            }
        }
        if self.ledger.is_idle() {
            self.achieved();
        }
        self.send(now);
    }

    /// There is a connection, and it is good for something.
    fn achieved(&mut self) {
        self.alone_since = None;
        self.backoff = self.config.backoff_min;
    }

    fn replied(&mut self, id: u64, completion: client::Completion, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        // It was not carried out, or nobody says so: another server may, or this one started again.
        if completion.result == Err(Errno::Shutdown) {
            return self.lose(id, "the server is shutting down".into(), now);
        }
        let Some((cookie, _)) = connection.sent.remove(&completion.cookie) else { return };
        self.achieved();
        if let Err(error) = self.ledger.replied(cookie, completion.result.map(|()| completion.data)) {
            self.fail(error);
        }
    }

    /// Sends what may be sent, each on the connection with the fewest under way.
    fn send(&mut self, now: Instant) {
        let mut from = 0;
        while let Some((cookie, request)) = self.ledger.next_free(from) {
            let ready = self.connections.iter_mut().filter(|(_, connection)| connection.ready);
            let Some((id, connection)) = ready.min_by_key(|(_, connection)| connection.sent.len()) else { return };
            let Some(client) = connection.client.as_mut() else { return };
            match client.submit_free(request.clone()) {
                Ok(sent) => {
                    connection.sent.insert(sent, (cookie, now));
                    self.ledger.sent(cookie, *id);
                }
                // Only Full: the export is as good as the one it was checked against.
                Err(_) => return,
            }
            from = cookie + 1;
        }
    }

    fn lose(&mut self, id: u64, why: String, now: Instant) {
        let Some(connection) = self.connections.remove(&id) else { return };
        self.actions.push_back(Action::Close(id));
        self.ledger.put_back(id);
        if connection.ready {
            self.lost_connections += 1;
            self.doubtful_writes += self.ledger.put_back_complete();
        }
        self.last_loss = Some(why);
        // Several that are lost at once are one misfortune.
        if self.dial_at <= now {
            self.dial_at = now + self.backoff;
            self.backoff = (self.backoff * 2).min(self.config.backoff_max);
        }
        if !self.has_ready() {
            self.alone_since.get_or_insert(now);
        }
        self.check_patience(now);
        self.send(now);
    }

    fn check_patience(&mut self, now: Instant) {
        let Config { patience, .. } = self.config;
        if !self.has_ready() && self.alone_since.is_some_and(|since| since + patience <= now) {
            let why = self.last_loss.clone().unwrap_or_else(|| "none was ever made".into());
            self.fail(SessionError::NoConnection { patience, why });
        }
    }

    fn fail(&mut self, error: SessionError) {
        if self.failed.is_none() {
            self.actions.extend(std::mem::take(&mut self.connections).into_keys().map(Action::Close));
            self.ledger.fail(&error);
            self.failed = Some(error);
        }
    }
}

/// Whether what an export took, another takes: the same size, and nothing missing.
fn is_as_good(is: &ExportInfo, was: &ExportInfo) -> bool {
    let missing = was.flags & !is.flags & FLAGS_NEEDED;
    let closed = is.flags & !was.flags & EXPORT_READ_ONLY;
    is.size_bytes == was.size_bytes
        && (missing, closed) == (0, 0)
        && is.block_sizes.min_bytes <= was.block_sizes.min_bytes
        && is.block_sizes.max_bytes >= was.block_sizes.max_bytes
}
