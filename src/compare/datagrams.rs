//! Flows without a stream: datagrams, and identities.
//!
//! A datagram is whole or nothing. It is explained when guest B's queue holds an equal one, wherever that stands, and
//! leaves when all before it in its flow have left. A partner that is late is waited for: only when the n-th datagram of
//! one guest and another n-th of the other are both left over is it certain, in a flow that keeps its order, that
//! they never meet. (`net/colo-compare.c` calls it a mismatch whenever any other packet is queued.)
//!
//! DHCP messages carry the seconds their sender has been trying, questions to a DNS or DHCP server a number, and the former a
//! port, that each guest draws for itself: they are compared without ([`FlowKey::ignored`]). A question that leaves binds nobody, and a survivor asks
//! it again; its answer reaches one guest only, and what comes of that is compared.

use super::compare::Cause;
use super::connection::FRAME_OVERHEAD_BYTES;
#[cfg(doc)]
use super::key::FlowKey;
use super::key::Ignored;
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use bytes::Bytes;
use std::collections::VecDeque;

/// Unmatched datagrams of one guest that are looked at for each of the other: a flow that is so far out of step has
/// diverged.
const MAX_LOOK: usize = 256;

/// A datagram of the primary that waits.
#[derive(Debug)]
struct Held {
    ordinal: u64,
    place: u32,
    payload: Bytes,
    explained: bool,
}

/// A datagram of the secondary that no one asked for yet: ordinal, arrival, payload.
type Spare = (u64, Instant, Bytes);

/// The state of one flow within an epoch.
#[derive(Debug, Default)]
pub(super) struct Datagrams {
    /// Bytes that are not compared.
    ignored: Ignored,
    held: VecDeque<Held>,
    spare: VecDeque<Spare>,
    spare_bytes: usize,
    sent: [u64; 2],
}

impl Datagrams {
    pub(super) fn new(ignored: Ignored) -> Self {
        Self { ignored, ..Self::default() }
    }

    /// Queues a datagram of the primary. What leaves is pushed to `out`.
    pub(super) fn push_primary(&mut self, place: u32, payload: Bytes, out: &mut Vec<u32>) -> Result<(), Cause> {
        let ordinal = self.sent[0];
        self.sent[0] += 1;
        let found = self.spare.iter().take(MAX_LOOK).position(|spare| self.ignored.same(&spare.2, &payload));
        if let Some((_, _, spare)) = found.and_then(|at| self.spare.remove(at)) {
            self.spare_bytes -= spare.len() + FRAME_OVERHEAD_BYTES;
        }
        self.held.push_back(Held { ordinal, place, payload, explained: found.is_some() });
        self.drain(out)
    }

    /// Takes a datagram of the secondary, likewise.
    pub(super) fn push_secondary(&mut self, now: Instant, payload: &[u8], out: &mut Vec<u32>) -> Result<(), Cause> {
        let ordinal = self.sent[1];
        self.sent[1] += 1;
        let waiting = self.held.iter_mut().filter(|held| !held.explained).take(MAX_LOOK);
        if let Some(held) = waiting.into_iter().find(|held| self.ignored.same(&held.payload, payload)) {
            held.explained = true;
        } else {
            self.spare_bytes += payload.len() + FRAME_OVERHEAD_BYTES;
            self.spare.push_back((ordinal, now, Bytes::copy_from_slice(payload)));
        }
        self.drain(out)
    }

    /// Takes a datagram of each guest, if they are the same, as without their bytes they are, and all before them were. `false`:
    /// nothing was taken.
    pub(super) fn pair(&mut self, bytes: Option<(&[u8], &[u8])>) -> bool {
        let same = bytes.is_none_or(|(ours, theirs)| self.ignored.same(ours, theirs));
        let pairs = self.idle() && (same || mutant::active(Mutant::OverlookPair));
        self.sent = self.sent.map(|sent| sent + u64::from(pairs));
        pairs
    }

    fn drain(&mut self, out: &mut Vec<u32>) -> Result<(), Cause> {
        if mutant::active(Mutant::OvertakeInFlow) {
            out.extend(self.held.iter().filter(|held| held.explained).map(|held| held.place));
            self.held.retain(|held| !held.explained);
        }
        while let Some(held) = self.held.front().filter(|held| held.explained) {
            out.push(held.place);
            self.held.pop_front();
        }
        match (self.held.front(), self.spare.front()) {
            (Some(held), Some(spare)) if held.ordinal == spare.0 => Err(Cause::PayloadDiffers),
            _ => Ok(()),
        }
    }

    /// Whether the flow is as good as unknown: both guests said the same.
    pub(super) fn idle(&self) -> bool {
        self.held.is_empty() && self.spare.is_empty() && self.sent[0] == self.sent[1]
    }

    pub(super) fn spare_bytes(&self) -> usize {
        self.spare_bytes
    }

    pub(super) fn spare_since(&self) -> Option<Instant> {
        self.spare.front().map(|spare| spare.1)
    }

    /// Forgets everything: a new epoch, or a flow that cannot be compared in this one.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.ignored.clone());
    }
}

/// One identity: see `neighbour.rs`.
#[derive(Debug, Default)]
pub(super) struct Announcements {
    /// The network knows it.
    shown: bool,
    /// Guest B said it in this epoch.
    said: bool,
    held: Vec<u32>,
}

impl Announcements {
    pub(super) fn push_primary(&mut self, place: u32, out: &mut Vec<u32>) {
        self.held.push(place);
        self.drain(out);
    }

    pub(super) fn push_secondary(&mut self, out: &mut Vec<u32>) {
        self.said = true;
        self.drain(out);
    }

    fn drain(&mut self, out: &mut Vec<u32>) {
        if self.shown || self.said {
            self.shown |= !self.held.is_empty();
            out.append(&mut self.held);
        }
    }

    /// All that was held has left. `false`: the network knows nothing.
    pub(super) fn checkpoint(&mut self) -> bool {
        self.shown |= !self.held.is_empty();
        self.held.clear();
        self.said = false;
        self.shown
    }
}
