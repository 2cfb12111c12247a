//! IP fragments: put together again, so that what is judged is what was said and not how it was cut.
//!
//! ```text
//!   fragment ─▶ Parts { pieces, end? } ── no hole left ─▶ Whole: judged as one packet, its frames leave together
//!                  │
//!                  └─ overlap, two ends, a part behind the end: unparsable, the parts are forgotten
//! ```
//!
//! One reassembler a guest. Guests may cut one datagram differently and number it differently: only the whole is
//! compared. Frames of guest A stay in the comparator's queue meanwhile, so forgetting parts loses no frame: what was
//! not put together leaves with the next checkpoint. Fragments never overlap where no one means harm (RFC 5722).
//!
//! Bounds: packets at once, parts of one packet, bytes in all; and age, for guest B's (guest A's ask for a checkpoint
//! when they age). Sources: RFC 815, 8200 4.5.

use super::compare::Cause;
use super::connection::FRAME_OVERHEAD_BYTES;
use super::ipv6;
use super::packet::{Fragment, Ip, Reason, Siblings, transport};
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;
use std::time::Duration;

/// Packets being put together at once.
const MAX_PACKETS: usize = 256;
/// Parts of one.
const MAX_PARTS: usize = 256;
/// The largest packet: what the offset field can express.
const MAX_PACKET_BYTES: usize = 65_535;

#[derive(Debug)]
struct Piece {
    offset: usize,
    bytes: Bytes,
    /// The frame's place in the comparator's queue.
    place: u32,
}

#[derive(Debug)]
struct Parts {
    since: Instant,
    /// Sorted by offset, disjoint.
    pieces: Vec<Piece>,
    end: Option<usize>,
    protocol: u8,
}

impl Parts {
    fn cost_bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.bytes.len() + FRAME_OVERHEAD_BYTES).sum()
    }

    /// Adds a part. An error: it does not fit those that are there.
    fn add(&mut self, fragment: &Fragment, bytes: Bytes, place: u32) -> Result<(), Reason> {
        let (start, end) = (fragment.offset, fragment.offset + bytes.len());
        let ragged = fragment.more && !bytes.len().is_multiple_of(8);
        if bytes.is_empty() || ragged || end > MAX_PACKET_BYTES {
            return Err(Reason::Fragment);
        }
        let at = self.pieces.partition_point(|piece| piece.offset < start);
        let before = at.checked_sub(1).and_then(|at| self.pieces.get(at)).map_or(0, |p| p.offset + p.bytes.len());
        let after = self.pieces.get(at).map_or(usize::MAX, |piece| piece.offset);
        let outside = self.end.is_some_and(|known| end > known || !fragment.more);
        let last = self.pieces.last().map_or(0, |piece| piece.offset + piece.bytes.len());
        let cut_short = !fragment.more && last > end;
        let overlaps = before > start || after < end;
        if overlaps && mutant::active(Mutant::TakeOverlap) {
            return Ok(());
        }
        if overlaps || outside || cut_short {
            return Err(Reason::Fragment);
        }
        if !fragment.more {
            self.end = Some(end);
        }
        if start == 0 {
            self.protocol = fragment.protocol;
        }
        self.pieces.insert(at, Piece { offset: start, bytes, place });
        Ok(())
    }

    fn is_whole(&self) -> bool {
        let reached = self.pieces.iter().try_fold(0, |reached, piece| {
            (piece.offset <= reached).then(|| reached.max(piece.offset + piece.bytes.len()))
        });
        self.end.is_some() && self.end == reached
    }
}

/// A packet put together.
#[derive(Debug)]
pub(super) struct Whole {
    /// Ranges are offsets in `bytes`.
    pub(super) ip: Ip,
    /// All behind the IP header.
    pub(super) bytes: Bytes,
    /// The places of its frames.
    pub(super) places: Vec<u32>,
}

/// The fragments of one guest.
#[derive(Debug)]
pub(super) struct Reassembler {
    packets: BTreeMap<Siblings, Parts>,
    held_bytes: usize,
    max_bytes: usize,
}

impl Reassembler {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { packets: BTreeMap::new(), held_bytes: 0, max_bytes }
    }

    /// Takes a fragment and returns the packet it completes.
    pub(super) fn handle(
        &mut self,
        now: Instant,
        fragment: &Fragment,
        frame: &Bytes,
        place: u32,
    ) -> Result<Option<Whole>, Cause> {
        let bytes = frame.slice(fragment.payload.clone());
        let full = self.held_bytes + bytes.len() + FRAME_OVERHEAD_BYTES > self.max_bytes;
        let known = self.packets.get(&fragment.of).map(|parts| parts.pieces.len());
        if full || known.map_or(self.packets.len() >= MAX_PACKETS, |parts| parts >= MAX_PARTS) {
            return Err(Cause::BoundReached);
        }
        let new = || Parts { since: now, pieces: Vec::new(), end: None, protocol: fragment.protocol };
        let parts = self.packets.entry(fragment.of).or_insert_with(new);
        // A copy: a part is small, and its frame may be large.
        let added = parts.add(fragment, Bytes::copy_from_slice(&bytes), place);
        if added.is_ok() {
            self.held_bytes += bytes.len() + FRAME_OVERHEAD_BYTES;
            if !parts.is_whole() {
                return Ok(None);
            }
        }
        let parts = self.forget(&fragment.of);
        added.map_err(Cause::Unparsable)?;
        parts.map(|parts| whole(fragment.of, &parts).map_err(Cause::Unparsable)).transpose()
    }

    fn forget(&mut self, of: &Siblings) -> Option<Parts> {
        let parts = self.packets.remove(of)?;
        self.held_bytes -= parts.cost_bytes();
        Some(parts)
    }

    /// What the parts cost.
    pub(super) fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Forgets what has not been completed for `timeout`.
    pub(super) fn forget_old(&mut self, now: Instant, timeout: Duration) {
        let held_bytes = &mut self.held_bytes;
        self.packets.retain(|_, parts| {
            let keep = parts.since + timeout > now;
            if !keep {
                *held_bytes -= parts.cost_bytes();
            }
            keep
        });
    }

    /// When the oldest was begun.
    pub(super) fn since(&self) -> Option<Instant> {
        self.packets.values().map(|parts| parts.since).min()
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.packets.clear();
        self.held_bytes = 0;
    }
}

fn whole(of: Siblings, parts: &Parts) -> Result<Whole, Reason> {
    let mut bytes = BytesMut::with_capacity(parts.end.unwrap_or(0));
    let mut places = Vec::with_capacity(parts.pieces.len());
    for piece in &parts.pieces {
        bytes.extend_from_slice(&piece.bytes);
        places.push(piece.place);
    }
    let carried = if of.src.is_ipv6() {
        ipv6::reassembled(&bytes, parts.protocol)?
    } else {
        transport(&bytes, 0, parts.protocol, false)?
    };
    Ok(Whole {
        ip: Ip { vlans: of.vlans, src: of.src, dst: of.dst, transport: carried },
        bytes: bytes.freeze(),
        places,
    })
}
