//! The flows of one guest, by key and by last use.
//!
//! ```text
//!   key ─ hash ─▶ place ─▶ flow          oldest … not used in this epoch … │ … used in this epoch … newest
//!                                        └─ a new flow takes the oldest's   └─ these begin anew at a checkpoint
//! ```
//!
//! The hash is keyed (SipHash, a random key a table): nobody outside can aim at it. Its order is never looked at, so
//! the simulator's runs stay equal. (`net/colo.c` hashes with a fixed seed and wipes the table, queued packets
//! included, at 16,385 flows.)
//!
//! When the table is full, a flow that was not used in this epoch gives way, or one that has nothing left to match:
//! all that is lost is what the network has been shown, which must then be explained again. When all are in use,
//! the newcomer is held uncompared and asks for a checkpoint.

use super::connection::{Connection, Said};
use super::key::FlowKey;
use super::line::Line;
use super::record::FlowReport;
use crate::clock::Instant;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

/// Flows looked at for one that may give way.
const MAX_LOOK: usize = 16;
/// Guesses where a flow stands: one for each fold of a key.
const GUESSES: usize = 256;

#[derive(Debug)]
pub(super) struct Table {
    index: HashMap<FlowKey, u32>,
    flows: Line<Connection>,
    /// By the fold of a key, the place of the flow that had it last. A guess is looked at before the index is asked: a
    /// keyed hash costs more than all the rest of a find, and whoever makes guesses fail makes it cost just that.
    guesses: Box<[u32; GUESSES]>,
    max_flows: usize,
    /// Since when a flow had something only the secondary said, when it was entered: at most one valid entry a flow.
    /// It may be more by now, so the entry is looked at again when its time has come.
    waiting: BinaryHeap<Reverse<(Instant, u32)>>,
}

impl Table {
    pub(super) fn new(max_flows: usize) -> Self {
        Self {
            index: HashMap::new(),
            flows: Line::new(),
            guesses: Box::new([0; GUESSES]),
            max_flows,
            waiting: BinaryHeap::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    pub(super) fn get_mut(&mut self, at: u32) -> Option<&mut Connection> {
        self.flows.get_mut(at)
    }

    /// The place of a flow that is used now. Nothing: it is new and there is no room.
    pub(super) fn find(&mut self, key: FlowKey, said: &Said) -> Option<u32> {
        let guess = usize::from(key.fold());
        let guessed = self.guesses[guess];
        let at = if self.flows.get(guessed).is_some_and(|flow| flow.key == key) {
            guessed
        } else if let Some(at) = self.index.get(&key) {
            *at
        } else {
            if self.flows.len() >= self.max_flows && !self.make_room() {
                return None;
            }
            let at = self.flows.push(Connection::new(key, said));
            self.index.insert(key, at);
            at
        };
        self.guesses[guess] = at;
        self.flows.refresh(at);
        self.flows.get_mut(at)?.touched = true;
        Some(at)
    }

    fn make_room(&mut self) -> bool {
        let oldest = std::iter::successors(self.flows.oldest(), |at| self.flows.newer(*at)).take(MAX_LOOK);
        let gives_way = |at: &u32| self.flows.get(*at).is_some_and(Connection::forgettable);
        let Some(at) = oldest.into_iter().find(gives_way) else { return false };
        self.remove(at);
        true
    }

    fn remove(&mut self, at: u32) {
        if let Some(flow) = self.flows.remove(at) {
            self.index.remove(&flow.key);
        }
    }

    /// Brings the ageing queue up to date after a flow was judged, and forgets a transaction that is over.
    pub(super) fn settle(&mut self, at: u32) {
        let Some(flow) = self.flows.get_mut(at) else { return };
        if flow.queued.is_none()
            && let Some(since) = flow.secondary_since()
        {
            flow.queued = Some(since);
            self.waiting.push(Reverse((since, at)));
        }
        if flow.over() {
            self.remove(at);
        }
        if self.waiting.len() > 2 * self.flows.len() + 1024 {
            self.waiting.retain(|Reverse((since, at))| self.flows.get(*at).is_some_and(|f| f.queued == Some(*since)));
        }
    }

    /// No flow has had something only the secondary said for longer than since then.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.waiting.peek().map(|Reverse((since, _))| *since)
    }

    /// A flow in which the secondary has been alone with something for `timeout`.
    pub(super) fn overdue(&mut self, now: Instant, timeout: Duration) -> Option<u32> {
        while let Some(Reverse((since, at))) = self.waiting.peek().copied() {
            if since + timeout > now {
                return None;
            }
            let flow = self.flows.get_mut(at).filter(|flow| flow.queued == Some(since));
            match flow.as_ref().and_then(|flow| flow.secondary_since()) {
                Some(still) if still == since => return Some(at),
                later => {
                    self.waiting.pop();
                    if let Some(flow) = flow {
                        flow.queued = later;
                        self.waiting.extend(later.map(|since| Reverse((since, at))));
                    }
                }
            }
        }
        None
    }

    /// Begins the next epoch: the primary's frames have left, the secondary's words are void.
    pub(super) fn checkpoint(&mut self) {
        self.waiting.clear();
        let mut at = self.flows.newest();
        while let Some(place) = at
            && let Some(flow) = self.flows.get_mut(place).filter(|flow| flow.touched)
        {
            let keep = flow.checkpoint();
            at = self.flows.older(place);
            if !keep {
                self.remove(place);
            }
        }
    }

    /// At most `max` flows that diverged: first those that keep diverging, then the latest.
    pub(super) fn reports(&self, epoch: u64, max: usize) -> Vec<FlowReport> {
        let report = |flow: &Connection| flow.record.report(flow.key, epoch, flow.held, flow.held_bytes);
        let mut reports: Vec<_> = self.flows.iter().filter_map(report).collect();
        reports.sort_by_key(|flow| {
            (Reverse(flow.keeps_diverging), Reverse(flow.last_epoch), Reverse(flow.diverged), flow.key)
        });
        reports.truncate(max);
        reports
    }
}
