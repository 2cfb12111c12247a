//! One TCP flow: which of guest A's segments guest B explains.
//!
//! ```text
//!  primary's segments, first in first out          secondary's segments, this epoch only
//!  [SYN][data 10..30][ACK][FIN] ──▶ head ◀── judged by ── bytes at 10..25 · 25..40 · highest ACK · SYN/FIN/RST
//!                                    │
//!                                    └─ explained ─▶ leaves, and is added to `shown`
//! ```
//!
//! **The argument.** A takeover continues from guest B's present state, so a segment may leave when that state
//! agrees with all it tells the client:
//!
//! - *payload*: guest B produced the same bytes at the same sequence positions this epoch, or they were shown before;
//! - *ACK*: guest B acknowledged as far this epoch, or the same was shown before. The client discards what is
//!   acknowledged, so this holds for an empty segment too: QEMU's rule 3 lets it go and loses client data;
//! - *SYN, FIN, RST*: guest B sent one too (a FIN at the same position). Initial sequence numbers differ until the
//!   rewriter knows both, so a SYN is compared by flag.
//!
//! *Why "shown before" is enough*: what left in this epoch was explained by guest B then, and its TCP never unsends
//! a byte nor takes back an ACK; what left in an epoch that ended is in the checkpoint guest B has loaded. The bytes
//! of a retransmission are not compared again: a TCP must resend what it sent (RFC 9293 3.8), and both guests hold
//! one send buffer from the checkpoint on.
//!
//! *Why nothing of guest B survives a checkpoint*: it may have been ahead of guest A and have acknowledged client
//! data which the state it has just loaded never received.
//!
//! The trap: a second connection on the same addresses and ports within one epoch. Which life a segment of the other
//! guest belongs to cannot be told, so such a flow is held until the checkpoint. Windows and options are not
//! compared. Sources: `net/colo-compare.c` (colo_compare_tcp) for the behaviour, RFC 9293 3.4 for the arithmetic.

use super::compare::Cause;
use super::connection::FRAME_OVERHEAD_BYTES;
use super::packet::Tcp;
use super::ranges::Ranges;
use crate::clock::Instant;
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};

/// Whether `a` is after `b` in sequence space.
fn after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

/// The later of two acknowledgements.
fn later(a: Option<u32>, b: Option<u32>) -> Option<u32> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if after(a, b) { a } else { b }),
        (a, b) => a.or(b),
    }
}

/// A segment of the primary that waits.
#[derive(Debug)]
struct Segment {
    serial: u64,
    seq: u32,
    ack: Option<u32>,
    syn: bool,
    fin: bool,
    rst: bool,
    /// Payload positions, in stretched sequence numbers.
    start: i64,
    end: i64,
    payload: Bytes,
    /// Everything before this position is explained.
    checked: i64,
}

/// What left, ever: it survives checkpoints.
#[derive(PartialEq, Eq, Debug, Default)]
struct Shown {
    isn: Option<u32>,
    bytes: Ranges,
    ack: Option<u32>,
    fin: Option<i64>,
}

impl Shown {
    fn add(&mut self, segment: &Segment) {
        if segment.syn && self.isn != Some(segment.seq) {
            *self = Self { isn: Some(segment.seq), ..Self::default() };
        }
        self.bytes.insert(segment.start, segment.end);
        self.ack = later(self.ack, segment.ack);
        if segment.fin {
            self.fin = Some(segment.end);
        }
    }
}

/// What the secondary sent in this epoch and the primary has not.
#[derive(Debug, Default)]
struct Secondary {
    /// A SYN of a life the network has not been shown.
    syn: bool,
    /// Anything but a SYN.
    spoke: bool,
    ack: Option<u32>,
    fin: Option<i64>,
    rst: bool,
    bytes: BTreeMap<i64, (Instant, Bytes)>,
    cost_bytes: usize,
}

fn cost_bytes(piece: &Bytes) -> usize {
    piece.len() + FRAME_OVERHEAD_BYTES
}

impl Secondary {
    fn store(&mut self, now: Instant, at: i64, piece: Bytes) {
        if !piece.is_empty() {
            self.cost_bytes += cost_bytes(&piece);
            self.bytes.insert(at, (now, piece));
        }
    }

    /// Takes the piece that holds `at`, from `at` on. What precedes it has been passed by.
    fn take(&mut self, at: i64) -> Option<(Instant, Bytes)> {
        let (&start, (_, piece)) = self.bytes.range(..=at).next_back()?;
        if start + piece.len() as i64 <= at {
            return None;
        }
        let (since, mut piece) = self.bytes.remove(&start)?;
        self.cost_bytes -= cost_bytes(&piece);
        Some((since, piece.split_off((at - start) as usize)))
    }

    /// Keeps the parts of a payload that are new. The first copy of a byte wins: it was the one produced first.
    fn absorb(&mut self, now: Instant, mut at: i64, payload: &[u8], shown: &Ranges) {
        let (start, end) = (at, at + payload.len() as i64);
        while at < end {
            let mine = self.bytes.range(..=at).next_back().map(|(from, (_, piece))| from + piece.len() as i64);
            if let Some(known) = shown.end_of(at).or(mine.filter(|known| *known > at)) {
                at = known;
                continue;
            }
            let next = self.bytes.range(at..).next().map(|(from, _)| *from);
            let stop = [next, shown.next_start(at)].into_iter().flatten().fold(end, i64::min);
            // A copy: a slice would keep the whole frame alive and make the byte count a lie.
            let piece = Bytes::copy_from_slice(&payload[(at - start) as usize..(stop - start) as usize]);
            self.store(now, at, piece);
            at = stop;
        }
    }
}

impl Segment {
    /// Moves `checked` as far as the payload is explained. `false`: it never will be.
    fn check_bytes(&mut self, shown: &Shown, secondary: &mut Secondary) -> bool {
        while self.checked < self.end {
            if let Some(end) = shown.bytes.end_of(self.checked) {
                self.checked = end;
                continue;
            }
            let Some((since, mut theirs)) = secondary.take(self.checked) else { break };
            let mine = &self.payload[(self.checked - self.start) as usize..];
            let len = mine.len().min(theirs.len());
            if mine[..len] != theirs[..len] {
                return false;
            }
            self.checked += len as i64;
            secondary.store(since, self.checked, theirs.split_off(len));
        }
        // The secondary's stream ended: before these bytes, or not where this one ends.
        secondary.fin.is_none_or(|fin| (self.checked >= self.end || self.end <= fin) && (!self.fin || self.end == fin))
    }

    /// Whether everything beside the payload is explained too.
    fn explained(&self, shown: &Shown, secondary: &Secondary) -> bool {
        let ack = later(shown.ack, secondary.ack);
        self.checked >= self.end
            && self.ack.is_none_or(|mine| ack.is_some_and(|ack| !after(mine, ack)))
            && (!self.syn || shown.isn == Some(self.seq) || secondary.syn)
            && (!self.fin || shown.fin == Some(self.end) || secondary.fin == Some(self.end))
            && (!self.rst || secondary.rst)
    }
}

/// What the head of the queue may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// The frame with this serial number leaves.
    Release(u64),
    /// Not explained yet.
    Wait,
    /// The guests said different things.
    Differs,
}

/// The state of one TCP flow.
#[derive(Debug, Default)]
pub(super) struct TcpFlow {
    shown: Shown,
    held: VecDeque<Segment>,
    /// The primary sent something in this epoch.
    spoke: bool,
    /// The primary began a new life in this epoch.
    opened: bool,
    secondary: Secondary,
    /// The reference that sequence numbers are stretched around.
    near: Option<i64>,
}

impl TcpFlow {
    /// The 64 bit position nearest to the reference whose low half is `seq`: no comparison below can wrap.
    fn stretch(&self, seq: u32) -> i64 {
        let near = self.near.unwrap_or(i64::from(seq));
        near + i64::from(seq.wrapping_sub(near as u32) as i32)
    }

    /// Queues a segment of the primary. An error: it begins a second life within the epoch.
    pub(super) fn push_primary(&mut self, serial: u64, tcp: &Tcp, frame: &Bytes) -> Result<(), Cause> {
        let mut clear = true;
        if tcp.has(Tcp::SYN) && self.shown.isn != Some(tcp.seq) {
            let again = self.held.iter().any(|held| held.syn && held.seq == tcp.seq);
            clear = !self.spoke || (self.opened && again);
            if clear && !again {
                (self.shown, self.opened, self.near) = (Shown::default(), true, None);
            }
        }
        self.spoke = true;
        let start = self.stretch(tcp.seq.wrapping_add(u32::from(tcp.has(Tcp::SYN))));
        if !tcp.has(Tcp::RST) {
            // A reset takes its number from whatever segment provoked it.
            self.near = Some(start);
        }
        let payload = frame.slice(tcp.payload.clone());
        self.held.push_back(Segment {
            serial,
            seq: tcp.seq,
            ack: (tcp.has(Tcp::ACK) && !tcp.has(Tcp::RST)).then_some(tcp.ack),
            syn: tcp.has(Tcp::SYN),
            fin: tcp.has(Tcp::FIN),
            rst: tcp.has(Tcp::RST),
            start,
            end: start + payload.len() as i64,
            payload,
            checked: start,
        });
        if clear { Ok(()) } else { Err(Cause::Reused) }
    }

    /// Takes what a segment of the secondary says. An error: it begins a second life within the epoch.
    pub(super) fn push_secondary(&mut self, now: Instant, tcp: &Tcp, frame: &[u8]) -> Result<(), Cause> {
        if tcp.has(Tcp::RST) {
            // Its ACK is not counted: a guest that resets holds no data for anyone.
            self.secondary.rst = true;
            return Ok(());
        }
        let ack = tcp.has(Tcp::ACK).then_some(tcp.ack);
        if tcp.has(Tcp::SYN) {
            // After a checkpoint both guests resend one SYN with one sequence number: that is no new life.
            self.secondary.syn |= self.opened || self.shown.isn != Some(tcp.seq);
            self.secondary.ack = later(self.secondary.ack, ack);
            return if self.secondary.spoke { Err(Cause::Reused) } else { Ok(()) };
        }
        self.secondary.spoke = true;
        self.secondary.ack = later(self.secondary.ack, ack);
        let start = self.stretch(tcp.seq);
        self.near.get_or_insert(start);
        if tcp.has(Tcp::FIN) {
            self.secondary.fin = Some(start + tcp.payload.len() as i64);
        }
        let payload = frame.get(tcp.payload.clone()).unwrap_or_default();
        self.secondary.absorb(now, start, payload, &self.shown.bytes);
        Ok(())
    }

    /// Judges the head of the queue; a released head is gone from it.
    pub(super) fn judge(&mut self) -> Verdict {
        let Some(head) = self.held.front_mut() else { return Verdict::Wait };
        // One guest began a new life and the other has not: it cannot speak for this one yet.
        let mut silent = Secondary::default();
        let secondary = if self.opened == self.secondary.syn { &mut self.secondary } else { &mut silent };
        if !head.check_bytes(&self.shown, secondary) {
            return Verdict::Differs;
        }
        if !head.explained(&self.shown, secondary) {
            return Verdict::Wait;
        }
        self.held.pop_front().map_or(Verdict::Wait, |head| {
            self.shown.add(&head);
            Verdict::Release(head.serial)
        })
    }

    /// The epoch ended in an owned checkpoint: all that was held has left, and guest B is guest A as captured.
    /// `false`: nothing was ever shown.
    pub(super) fn checkpoint(&mut self) -> bool {
        for segment in std::mem::take(&mut self.held) {
            self.shown.add(&segment);
        }
        self.forget_secondary();
        (self.spoke, self.opened) = (false, false);
        self.shown != Shown::default()
    }

    /// Drops everything the secondary said.
    pub(super) fn forget_secondary(&mut self) {
        self.secondary = Secondary::default();
    }

    /// Whether the primary said anything in this epoch.
    pub(super) fn spoke(&self) -> bool {
        self.spoke
    }

    /// What the secondary's unmatched bytes cost.
    pub(super) fn secondary_bytes(&self) -> usize {
        self.secondary.cost_bytes
    }

    /// When the first byte arrived that the primary has not sent.
    pub(super) fn secondary_since(&self) -> Option<Instant> {
        self.secondary.bytes.first_key_value().map(|(_, (since, _))| *since)
    }
}
