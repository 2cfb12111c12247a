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
//!   rewriter knows both, so a SYN is compared by flag and by what its options promise.
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
//! guest belongs to cannot be told, so such a flow is held until the checkpoint.
//!
//! **Not compared, by rule.** *Options*, but for what a SYN promises: `options.rs`. *Windows*: an offer that guest B makes smaller costs the client a retransmission. So an empty segment that
//! acknowledges no more than was shown (a window update, a duplicate ACK, a keep-alive) leaves as soon as all before it
//! in its flow have left, heard of guest B or not. *Urgent pointer*: the bytes it points at are compared.
//! *Minimum ACK*: an ACK leaves when guest B has acknowledged as far; one it delays is waited for until it ages. Meanwhile the
//! client is told how far both have acknowledged: `min_ack.rs`.
//! *SYN, FIN or RST of guest B alone* age like bytes of its own.
//!
//! Sources: `net/colo-compare.c` (colo_compare_tcp) for the behaviour, RFC 9293 3.4 for the arithmetic.

use super::compare::Cause;
use super::connection::FRAME_OVERHEAD_BYTES;
use super::options::Offer;
use super::packet::Tcp;
use super::ranges::Ranges;
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use bytes::{Buf, Bytes};
use std::collections::VecDeque;

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

/// Payloads up to this are copied rather than kept with their frame.
const COPIED_BYTES: usize = 4096;

/// A segment of the primary that waits.
#[derive(Debug)]
struct Segment {
    place: u32,
    seq: u32,
    ack: Option<u32>,
    syn: bool,
    offer: Offer,
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

/// Bytes of the secondary that the primary has not sent.
#[derive(Debug)]
struct Piece {
    at: i64,
    since: Instant,
    bytes: Bytes,
    /// How much memory the bytes keep alive.
    backing_bytes: usize,
}

impl Piece {
    /// Of a frame's payload: a copy, unless that is large and most of what is kept alive, else the count of bytes
    /// held would be a lie.
    fn new(at: i64, since: Instant, bytes: Bytes, backing_bytes: usize) -> Self {
        if bytes.len() > COPIED_BYTES && bytes.len() * 2 >= backing_bytes {
            return Self { at, since, bytes, backing_bytes };
        }
        Self { at, since, backing_bytes: bytes.len(), bytes: Bytes::copy_from_slice(&bytes) }
    }

    fn end(&self) -> i64 {
        self.at + self.bytes.len() as i64
    }

    fn cost_bytes(&self) -> usize {
        self.bytes.len() + FRAME_OVERHEAD_BYTES
    }
}

/// What the secondary sent in this epoch and the primary has not.
#[derive(Debug, Default)]
struct Secondary {
    /// A SYN of a life the network has not been shown.
    syn: bool,
    /// What it promised.
    offer: Offer,
    /// Anything but a SYN.
    spoke: bool,
    ack: Option<u32>,
    fin: Option<i64>,
    rst: bool,
    /// When it first said SYN, FIN or RST.
    flag_since: Option<Instant>,
    /// Sorted and disjoint.
    pieces: VecDeque<Piece>,
    cost_bytes: usize,
}

impl Secondary {
    /// The first piece that ends behind `at`.
    fn behind(&self, at: i64) -> usize {
        match self.pieces.front() {
            Some(front) if front.end() > at => 0,
            _ => self.pieces.partition_point(|piece| piece.end() <= at),
        }
    }

    /// The piece that holds `at`.
    fn holding(&self, at: i64) -> Option<usize> {
        let index = self.behind(at);
        self.pieces.get(index).filter(|piece| piece.at <= at).map(|_| index)
    }

    /// Drops the bytes of a piece before `until`: they have been explained or passed by.
    fn consume(&mut self, index: usize, until: i64) {
        let Some(piece) = self.pieces.get_mut(index) else { return };
        let before = piece.cost_bytes();
        if piece.end() <= until {
            self.pieces.remove(index);
            self.cost_bytes -= before;
            return;
        }
        piece.bytes.advance((until - piece.at) as usize);
        piece.at = until;
        if piece.bytes.len() * 2 < piece.backing_bytes {
            piece.bytes = Bytes::copy_from_slice(&piece.bytes);
            piece.backing_bytes = piece.bytes.len();
        }
        self.cost_bytes -= before - piece.cost_bytes();
    }

    /// Keeps the parts of a payload that are new. The first copy of a byte wins: it was the one produced first.
    fn absorb(&mut self, now: Instant, mut at: i64, payload: &Bytes, frame_bytes: usize, shown: &Ranges) {
        let (start, end) = (at, at + payload.len() as i64);
        while at < end {
            let index = self.behind(at);
            let next = self.pieces.get(index);
            let mine = next.filter(|piece| piece.at <= at).map(Piece::end);
            if let Some(known) = shown.end_of(at).or(mine) {
                at = known;
                continue;
            }
            let next = next.map(|piece| piece.at);
            let stop = [next, shown.next_start(at)].into_iter().flatten().fold(end, i64::min);
            let bytes = payload.slice((at - start) as usize..(stop - start) as usize);
            let piece = Piece::new(at, now, bytes, frame_bytes);
            self.cost_bytes += piece.cost_bytes();
            self.pieces.insert(index, piece);
            at = stop;
        }
    }
}

impl Segment {
    /// Compares what is not explained yet with the secondary's bytes from there on, part of what begins at `from`.
    /// `false`: they differ.
    fn compare(&mut self, from: i64, theirs: &[u8]) -> bool {
        if mutant::active(Mutant::CutMatters) && from != self.start {
            return false;
        }
        let mine = &self.payload[(self.checked - self.start) as usize..];
        let len = mine.len().min(theirs.len());
        let looked_at = len - usize::from(mutant::active(Mutant::OverlookByte));
        if mine[..looked_at] != theirs[..looked_at] {
            return false;
        }
        self.checked += len as i64;
        true
    }

    /// Moves `checked` as far as the payload is explained. `false`: it never will be.
    fn check_bytes(&mut self, shown: &Shown, secondary: &mut Secondary) -> bool {
        while self.checked < self.end {
            if let Some(end) = shown.bytes.end_of(self.checked) {
                self.checked = end;
                continue;
            }
            let Some(index) = secondary.holding(self.checked) else { break };
            let piece = &secondary.pieces[index];
            if !self.compare(piece.at, &piece.bytes[(self.checked - piece.at) as usize..]) {
                return false;
            }
            secondary.consume(index, self.checked);
        }
        // The secondary's stream ended: before these bytes, or not where this one ends.
        secondary.fin.is_none_or(|fin| (self.checked >= self.end || self.end <= fin) && (!self.fin || self.end == fin))
    }

    /// Whether both guests begin a life and promise different things for it.
    fn breaks_promise(&self, shown: &Shown, secondary: &Secondary) -> bool {
        self.syn && shown.isn != Some(self.seq) && secondary.syn && secondary.offer != self.offer
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

/// The state of one TCP flow.
#[derive(Debug, Default)]
pub(super) struct TcpFlow {
    shown: Shown,
    held: VecDeque<Segment>,
    /// The primary sent something in this epoch.
    spoke: bool,
    /// The primary began a new life in this epoch.
    opened: bool,
    /// The primary reset the connection in this epoch.
    reset: bool,
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

    /// Queues a segment of the primary, whose payload lies in `bytes`. An error: it begins a second life within the
    /// epoch.
    pub(super) fn push_primary(&mut self, place: u32, tcp: &Tcp, bytes: &Bytes) -> Result<(), Cause> {
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
        self.reset |= tcp.has(Tcp::RST);
        self.held.push_back(Segment {
            place,
            seq: tcp.seq,
            ack: (tcp.has(Tcp::ACK) && !tcp.has(Tcp::RST)).then_some(tcp.ack),
            syn: tcp.has(Tcp::SYN),
            offer: tcp.offer,
            fin: tcp.has(Tcp::FIN),
            rst: tcp.has(Tcp::RST),
            start,
            end: start + tcp.payload.len() as i64,
            payload: bytes.slice(tcp.payload.clone()),
            checked: start,
        });
        if clear { Ok(()) } else { Err(Cause::Reused) }
    }

    /// Takes what a segment of the secondary says, whose payload lies in `bytes`. An error: it begins a second life
    /// within the epoch.
    pub(super) fn push_secondary(&mut self, now: Instant, tcp: &Tcp, bytes: &Bytes) -> Result<(), Cause> {
        let payload = &tcp.payload;
        if tcp.has(Tcp::SYN | Tcp::FIN | Tcp::RST) {
            self.secondary.flag_since.get_or_insert(now);
        }
        if tcp.has(Tcp::RST) {
            // Its ACK is not counted: a guest that resets holds no data for anyone.
            self.secondary.rst = true;
            return Ok(());
        }
        let ack = tcp.has(Tcp::ACK).then_some(tcp.ack);
        if tcp.has(Tcp::SYN) {
            // After a checkpoint both guests resend one SYN with one sequence number: that is no new life.
            self.secondary.syn |= self.opened || self.shown.isn != Some(tcp.seq);
            self.secondary.offer = tcp.offer;
            self.secondary.ack = later(self.secondary.ack, ack);
            return if self.secondary.spoke { Err(Cause::Reused) } else { Ok(()) };
        }
        self.secondary.spoke = true;
        self.secondary.ack = later(self.secondary.ack, ack);
        let start = self.stretch(tcp.seq);
        self.near.get_or_insert(start);
        if tcp.has(Tcp::FIN) {
            self.secondary.fin = Some(start + payload.len() as i64);
        }
        let met = self.meet(start, &bytes[payload.clone()]);
        let end = start + payload.len() as i64;
        if start + (met as i64) < end {
            let rest = bytes.slice(payload.start + met..payload.end);
            self.secondary.absorb(now, start + met as i64, &rest, bytes.len(), &self.shown.bytes);
        }
        Ok(())
    }

    /// Takes segments that are alike (`pair.rs`) if nothing else is to be considered, of which all was new and is explained now.
    pub(super) fn pair(&mut self, ours: &Tcp, theirs: &Tcp, bytes: Option<(&[u8], &[u8])>) -> bool {
        let (start, said) = (self.stretch(ours.seq), &self.secondary);
        let quiet = self.held.is_empty() && said.pieces.is_empty() && said.flag_since.is_none() && said.fin.is_none();
        let ack = later(self.shown.ack, later(said.ack, Some(theirs.ack)));
        let explained = ack.is_some_and(|ack| !after(ours.ack, ack));
        if !quiet || said.rst || self.opened != said.syn || !explained {
            return false;
        }
        let shown = &self.shown.bytes;
        let is_new = shown.end_of(start).is_none() && shown.next_start(start).is_none();
        let same = bytes.is_none_or(|(our_bytes, their_bytes)| {
            our_bytes[ours.payload.clone()] == their_bytes[theirs.payload.clone()]
        });
        if !is_new || !(same || mutant::active(Mutant::OverlookPair)) {
            return false;
        }
        self.shown.bytes.insert(start, start + ours.payload.len() as i64);
        self.shown.ack = later(self.shown.ack, Some(ours.ack));
        self.secondary.ack = later(self.secondary.ack, Some(theirs.ack));
        (self.spoke, self.secondary.spoke, self.near) = (true, true, Some(start));
        true
    }

    /// Compares the secondary's bytes with the segment that waits for just them; how many they were. What can be compared
    /// where it lies is neither copied nor kept. Whatever is not so simple is left to [`TcpFlow::drain`].
    fn meet(&mut self, at: i64, theirs: &[u8]) -> usize {
        let clear = self.opened == self.secondary.syn && self.secondary.pieces.is_empty();
        let Some(head) = self.held.front_mut().filter(|head| clear && head.checked == at && head.checked < head.end)
        else {
            return 0;
        };
        // What was shown is not compared again.
        let unknown = match self.shown.bytes.end_of(at) {
            Some(_) => 0,
            None => {
                self.shown.bytes.next_start(at).map_or(theirs.len(), |start| theirs.len().min((start - at) as usize))
            }
        };
        if unknown == 0 || !head.compare(at, &theirs[..unknown]) {
            return 0;
        }
        (head.checked - at) as usize
    }

    /// Judges the queue from its head on. What leaves is pushed to `out`. An error: the guests said different things.
    pub(super) fn drain(&mut self, out: &mut Vec<u32>) -> Result<(), Cause> {
        if self.held.is_empty() {
            return Ok(());
        }
        // One guest began a new life and the other has not: it cannot speak for this one yet.
        let mut silent = None;
        let secondary = match self.opened == self.secondary.syn {
            true => &mut self.secondary,
            false => silent.insert(Secondary::default()),
        };
        while let Some(head) = self.held.front_mut() {
            if head.breaks_promise(&self.shown, secondary) || !head.check_bytes(&self.shown, secondary) {
                return Err(Cause::PayloadDiffers);
            }
            if !head.explained(&self.shown, secondary) {
                break;
            }
            out.push(head.place);
            self.shown.add(head);
            self.held.pop_front();
        }
        Ok(())
    }

    /// What a client is to be told when the secondary says this and a segment of the primary's waits: the place of the oldest
    /// that does, how far the primary has acknowledged, and how far both have. What it was told may be told again: a
    /// duplicate says that something is missing.
    pub(super) fn told_too_little(&self, said: &Tcp) -> Option<(u32, u32, u32)> {
        let (head, newest) = (self.held.front()?, self.held.back()?);
        let (ours, theirs) = (newest.ack?, self.secondary.ack?);
        let both = if after(ours, theirs) { theirs } else { ours };
        let alike = self.opened == self.secondary.syn && !head.syn && !head.rst && !said.has(Tcp::SYN | Tcp::RST);
        let news = self.shown.ack.is_none_or(|shown| after(both, shown));
        let again = self.shown.ack == Some(both) && said.ack == both && said.payload.is_empty() && !said.has(Tcp::FIN);
        (alike && (news || again)).then_some((head.place, ours, both))
    }

    /// The client has been told.
    pub(super) fn tell(&mut self, ack: u32) {
        self.shown.ack = later(self.shown.ack, Some(ack));
    }

    /// The epoch ended in an owned checkpoint: all that was held has left, and guest B is guest A as captured.
    /// `false`: nothing was ever shown.
    pub(super) fn checkpoint(&mut self) -> bool {
        for segment in std::mem::take(&mut self.held) {
            self.shown.add(&segment);
        }
        self.forget_secondary();
        (self.spoke, self.opened, self.reset) = (false, false, false);
        self.shown != Shown::default()
    }

    /// Drops everything the secondary said.
    pub(super) fn forget_secondary(&mut self) {
        self.secondary = Secondary::default();
    }

    /// What the secondary's unmatched bytes cost.
    pub(super) fn secondary_bytes(&self) -> usize {
        self.secondary.cost_bytes
    }

    /// When the first thing arrived that the primary has not said: a byte, or a SYN, FIN or RST.
    pub(super) fn secondary_since(&self) -> Option<Instant> {
        let said = &self.secondary;
        let alone = (said.syn && !self.opened)
            || (said.rst && !self.reset)
            || (said.fin.is_some() && said.fin != self.shown.fin && self.held.iter().all(|held| !held.fin));
        let flag = said.flag_since.filter(|_| alone);
        said.pieces.front().map(|piece| piece.since).into_iter().chain(flag).min()
    }
}
