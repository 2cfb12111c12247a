//! What a session was asked for, in order, until nobody can want it any more.
//!
//! ```text
//!   submit ─▶ unsent ── nothing earlier stands in its way ──▶ sent ── reply ──▶ completion
//!               ▲                                              │                    │ a write, and some are retained
//!               ├────────────── its connection is lost ────────┘                    ▼
//!               └───────────────────── a connection is lost ──────────────────── retained ── flushed ──▶ forgotten
//! ```
//!
//! A request keeps its place when it is put back: places are cookies, and [`Request::blocks`] is asked about every
//! earlier one that is not complete, wherever it is. So a request that is sent again was never overtaken by one it
//! overlaps, and doing it twice is doing it once.

use super::{Completion, RequestError, SessionError};
use crate::mutant::{self, Mutant};
use crate::nbd::request::Request;
use crate::nbd::{CMD_FLUSH, Errno};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Writes that are retained at the most, however short: a replay looks at all of them.
const RETAINED_REQUESTS_MAX: usize = 4096;

/// Who waits for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// The caller, who submitted it.
    Caller,
    /// Nobody: it is complete, and done again because the server may have lost it.
    Nobody,
    /// The session, whose flush it is.
    Session,
}

#[derive(Debug)]
struct Entry {
    request: Request,
    whose: Whose,
    /// The connection it was sent on; `None` while it waits.
    sent_on: Option<u64>,
    /// It was sent before, on a connection that is lost.
    put_back: bool,
}

/// Requests that are not complete, and writes that are not durable.
#[derive(Debug)]
pub(super) struct Ledger {
    entries: BTreeMap<u64, Entry>,
    unsent: BTreeSet<u64>,
    next_cookie: u64,
    /// Submitted by the caller and not taken back by it.
    callers: usize,
    callers_bytes: u64,
    /// Each with the bytes it counts for.
    completions: VecDeque<(u64, Completion)>,
    /// Complete, and not covered by a flush: only when some are to be retained.
    retained: BTreeMap<u64, Request>,
    retained_bytes: u64,
    retain_bytes: u64,
    own_flush: Option<u64>,
    /// How many writes are complete and not covered by a flush, by the last flush under way before them.
    unflushed: BTreeMap<u64, u64>,
    flushes: bool,
}

impl Ledger {
    /// One that retains about `retain_bytes` of complete writes; 0 for none.
    pub(super) fn new(retain_bytes: u64) -> Self {
        Self {
            entries: BTreeMap::new(),
            unsent: BTreeSet::new(),
            next_cookie: 1,
            callers: 0,
            callers_bytes: 0,
            completions: VecDeque::new(),
            retained: BTreeMap::new(),
            retained_bytes: 0,
            retain_bytes,
            own_flush: None,
            unflushed: BTreeMap::new(),
            flushes: true,
        }
    }

    /// The server knows no flush: what is complete is as durable as it will ever be.
    pub(super) fn retain_nothing(&mut self) {
        (self.flushes, self.retain_bytes) = (false, 0);
    }

    /// Requests of the caller whose completion it has not taken.
    pub(super) fn callers(&self) -> usize {
        self.callers
    }

    /// The bytes that travel with them.
    pub(super) fn callers_bytes(&self) -> u64 {
        self.callers_bytes
    }

    /// Whether nothing is to be sent or waited for.
    pub(super) fn is_idle(&self) -> bool {
        self.entries.is_empty()
    }

    /// Writes that are complete and not covered by a flush.
    pub(super) fn unflushed(&self) -> u64 {
        self.unflushed.values().sum()
    }

    /// Whether complete writes are kept until they are flushed.
    pub(super) fn retains(&self) -> bool {
        self.retain_bytes > 0
    }

    pub(super) fn submit(&mut self, request: Request) -> u64 {
        self.callers += 1;
        self.callers_bytes += request.payload_bytes();
        self.enter(request, Whose::Caller)
    }

    fn enter(&mut self, request: Request, whose: Whose) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.entries.insert(cookie, Entry { request, whose, sent_on: None, put_back: false });
        self.unsent.insert(cookie);
        cookie
    }

    pub(super) fn poll_completion(&mut self) -> Option<Completion> {
        let (bytes, completion) = self.completions.pop_front()?;
        self.callers -= 1;
        self.callers_bytes -= bytes;
        Some(completion)
    }

    /// The first request from `cookie` on that may be sent.
    pub(super) fn next_free(&self, cookie: u64) -> Option<(u64, &Request)> {
        let free = self.unsent.range(cookie..).find(|cookie| self.is_free(**cookie))?;
        Some((*free, &self.entries.get(free)?.request))
    }

    fn is_free(&self, cookie: u64) -> bool {
        let Some(Entry { request, .. }) = self.entries.get(&cookie) else { return false };
        let full = self.retains()
            && (self.retained_bytes >= self.retain_bytes || self.retained.len() >= RETAINED_REQUESTS_MAX);
        // Its turn comes after the session's own flush, which waits for none that is later.
        if full && request.writes() && self.own_flush.is_some_and(|flush| flush < cookie) {
            return false;
        }
        !self.entries.range(..cookie).any(|(_, earlier)| {
            let overlooked = match earlier.sent_on {
                Some(_) => mutant::active(Mutant::NoHoldAcrossConnections),
                None => earlier.put_back && mutant::active(Mutant::ReplayOvertaken),
            };
            earlier.request.blocks(request) && !overlooked
        })
    }

    /// It was sent on a connection.
    pub(super) fn sent(&mut self, cookie: u64, connection: u64) {
        if let Some(entry) = self.entries.get_mut(&cookie) {
            entry.sent_on = Some(connection);
            self.unsent.remove(&cookie);
        }
    }

    /// What was sent on a connection and has no reply is to be sent again.
    pub(super) fn put_back(&mut self, connection: u64) {
        for (cookie, entry) in self.entries.iter_mut().filter(|(_, entry)| entry.sent_on == Some(connection)) {
            (entry.sent_on, entry.put_back) = (None, true);
            self.unsent.insert(*cookie);
        }
    }

    /// What is complete and not flushed is to be sent again, as far as it is retained. Returns how many writes are not.
    pub(super) fn put_back_complete(&mut self) -> u64 {
        self.retained_bytes = 0;
        for (cookie, request) in std::mem::take(&mut self.retained) {
            if !mutant::active(Mutant::ForgetRetained) {
                self.entries.insert(cookie, Entry { request, whose: Whose::Nobody, sent_on: None, put_back: true });
                self.unsent.insert(cookie);
            }
        }
        if self.retains() { 0 } else { std::mem::take(&mut self.unflushed).into_values().sum() }
    }

    /// The server replied.
    pub(super) fn replied(&mut self, cookie: u64, result: Result<Bytes, Errno>) -> Result<(), SessionError> {
        let Some(Entry { request, whose, .. }) = self.entries.remove(&cookie) else { return Ok(()) };
        match (whose, &result) {
            (Whose::Nobody, Err(errno)) => return Err(SessionError::Replay { errno: *errno }),
            (Whose::Session, Err(errno)) => return Err(SessionError::Flush { errno: *errno }),
            (Whose::Nobody, Ok(_)) => self.retain(cookie, request),
            (Whose::Session, Ok(_)) => self.flushed(cookie),
            (Whose::Caller, result) => {
                let bytes = request.payload_bytes();
                match (request.kind, result) {
                    (CMD_FLUSH, Ok(_)) => self.flushed(cookie),
                    (_, Ok(_)) if request.writes() => self.written(cookie, request),
                    _ => {}
                }
                let result = result.clone().map_err(RequestError::Refused);
                self.completions.push_back((bytes, Completion { cookie, result }));
            }
        }
        Ok(())
    }

    fn written(&mut self, cookie: u64, request: Request) {
        if self.flushes && !request.is_fua() {
            let is_flush = |entry: &Entry| entry.request.kind == CMD_FLUSH;
            let before = self.entries.range(..cookie).rev().find(|(_, entry)| is_flush(entry));
            *self.unflushed.entry(before.map_or(0, |(flush, _)| *flush)).or_default() += 1;
        }
        self.retain(cookie, request);
    }

    /// A write that is durable is retained like the others: were an earlier one it overlaps done again, it would be
    /// undone without it.
    fn retain(&mut self, cookie: u64, request: Request) {
        if !self.retains() {
            return;
        }
        self.retained_bytes += request.payload_bytes();
        self.retained.insert(cookie, request);
        let many = self.retained_bytes >= self.retain_bytes / 2 || self.retained.len() >= RETAINED_REQUESTS_MAX / 2;
        if many && self.own_flush.is_none() {
            self.own_flush = Some(self.enter(Request::flush(), Whose::Session));
        }
    }

    /// A flush is complete: it was sent after every earlier write was, and says nothing about later ones.
    fn flushed(&mut self, flush: u64) {
        if self.own_flush == Some(flush) {
            self.own_flush = None;
        }
        let covers_all = mutant::active(Mutant::FlushCoversLater);
        let later = self.retained.split_off(&if covers_all { u64::MAX } else { flush });
        let covered = std::mem::replace(&mut self.retained, later);
        self.retained_bytes -= covered.values().map(Request::payload_bytes).sum::<u64>();
        self.unflushed = self.unflushed.split_off(&flush);
    }

    /// Completes everything with an error.
    pub(super) fn fail(&mut self, error: &SessionError) {
        self.unsent.clear();
        self.retained.clear();
        self.retained_bytes = 0;
        for (cookie, entry) in std::mem::take(&mut self.entries) {
            if entry.whose == Whose::Caller {
                let result = Err(RequestError::Session(error.clone()));
                self.completions.push_back((entry.request.payload_bytes(), Completion { cookie, result }));
            }
        }
    }
}
