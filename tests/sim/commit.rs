//! Rule 1, watched from outside: no byte leaves a protected guest that the secondary's state does not explain.
//!
//! The simulator sees both hosts at once. When the primary, which replicates in epoch `e`, lets a frame tagged `t`
//! go, the secondary must own a state captured after it (it is past epoch `t`), or its guest must have said the same
//! in that same epoch: the same bytes at the same sequence numbers, an acknowledgement as far. What was shown before
//! may be shown again. This is written from the rule, not from the comparator.

use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};

/// What matters of a TCP segment.
struct Segment {
    flow: (u32, u16),
    seq: u32,
    ack: Option<u32>,
    syn: bool,
    rst: bool,
    payload: Bytes,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn parse(frame: &Bytes) -> Option<Segment> {
    if frame.len() < 54 || frame[12..14] != [8, 0] || frame[23] != 6 {
        return None;
    }
    let tcp = 14 + usize::from(frame[14] & 15) * 4;
    let end = 14 + usize::from(frame[16]) * 256 + usize::from(frame[17]);
    let data = tcp + usize::from(frame[tcp + 12] >> 4) * 4;
    let flags = frame[tcp + 13];
    Some(Segment {
        flow: (be32(frame, 30), u16::from_be_bytes([frame[tcp + 2], frame[tcp + 3]])),
        seq: be32(frame, tcp + 4),
        ack: (flags & 16 != 0).then(|| be32(frame, tcp + 8)),
        syn: flags & 2 != 0,
        rst: flags & 4 != 0,
        payload: frame.slice(data..end),
    })
}

/// A frame in words, for the trace.
pub(super) fn describe(frame: &Bytes) -> String {
    let ports =
        || frame.get(34..38).map_or((0, 0), |p| (p[0] as u16 * 256 + p[1] as u16, p[2] as u16 * 256 + p[3] as u16));
    match parse(frame) {
        Some(Segment { seq, ack, syn, rst, payload, .. }) => {
            let (from, to) = ports();
            let text: String =
                payload.iter().take(28).map(|b| if b.is_ascii_graphic() { *b as char } else { ' ' }).collect();
            let (syn, rst) = (if syn { " SYN" } else { "" }, if rst { " RST" } else { "" });
            format!("{from}>{to}{syn}{rst} seq {seq} ack {ack:?} +{} {text}", payload.len())
        }
        None => format!("type {:02x?}, {} bytes", frame.get(12..14).unwrap_or_default(), frame.len()),
    }
}

/// How far `b` is ahead of `a` in sequence space.
fn ahead(a: u32, b: u32) -> i32 {
    b.wrapping_sub(a) as i32
}

/// One connection, in the primary's sequence space.
#[derive(Default)]
struct Flow {
    shown_end: Option<u32>,
    shown_ack: Option<u32>,
    /// What the secondary's guest said in `epoch`.
    epoch: u64,
    said_syn: bool,
    said_ack: Option<u32>,
    said: Vec<(u32, Bytes)>,
}

/// The oracle.
#[derive(Default)]
pub(super) struct Commit {
    /// Frames of the primary's guest that have not left, with their epochs. Holding them keeps their addresses.
    inside: VecDeque<(u64, Bytes)>,
    flows: BTreeMap<(u32, u16), Flow>,
    /// Segments that left because the secondary's guest had said the same.
    pub(super) explained: u64,
    /// Segments that left because the secondary owned a state captured later.
    pub(super) owned: u64,
}

impl Commit {
    /// The primary's guest emitted a frame.
    pub(super) fn emitted(&mut self, epoch: u64, frame: &Bytes) {
        self.inside.push_back((epoch, frame.clone()));
    }

    /// Whether every frame of the primary's guest has left.
    pub(super) fn is_empty(&self) -> bool {
        self.inside.is_empty()
    }

    /// The secondary's guest said a frame, as the primary will see it.
    pub(super) fn said(&mut self, epoch: u64, frame: &Bytes) {
        let Some(segment) = parse(frame) else { return };
        let flow = self.flows.entry(segment.flow).or_default();
        if epoch < flow.epoch {
            return;
        }
        if epoch > flow.epoch {
            (flow.epoch, flow.said_syn, flow.said_ack) = (epoch, false, None);
            flow.said.clear();
        }
        flow.said_syn |= segment.syn;
        if let Some(ack) = segment.ack
            && flow.said_ack.is_none_or(|said| ahead(said, ack) > 0)
        {
            flow.said_ack = Some(ack);
        }
        if !segment.payload.is_empty() {
            flow.said.push((segment.seq, segment.payload));
        }
    }

    /// The primary lets a frame go to the network. `owned` is how many states the secondary owns while the primary
    /// is bound to it, and nothing when the primary owes nobody an explanation.
    pub(super) fn left(&mut self, frame: &Bytes, owned: Option<u64>) -> Result<(), String> {
        let at = self.inside.iter().position(|(_, inside)| inside.as_ptr() == frame.as_ptr());
        let Some((epoch, _)) = at.and_then(|at| self.inside.remove(at)) else { return self.made(frame) };
        let Some(segment) = parse(frame) else { return Ok(()) };
        let flow = self.flows.entry(segment.flow).or_default();
        let end = segment.seq.wrapping_add(segment.payload.len() as u32 + u32::from(segment.syn));
        match owned {
            Some(owned) if epoch > 0 && owned <= epoch && !segment.rst => {
                self.explained += 1;
                flow.explain(epoch, &segment, end).map_err(|what| {
                    format!("{what} of epoch {epoch} left, port {}; the secondary owns {owned}", segment.flow.1)
                })?;
            }
            _ => self.owned += 1,
        }
        if flow.shown_end.is_none_or(|shown| segment.syn || ahead(shown, end) > 0) {
            flow.shown_end = Some(end);
        }
        if flow.shown_ack.is_none_or(|shown| segment.ack.is_some_and(|ack| segment.syn || ahead(shown, ack) > 0)) {
            flow.shown_ack = segment.ack;
        }
        Ok(())
    }
}

impl Commit {
    /// A frame that the primary's guest did not emit has left. It tells a client how far both guests have acknowledged, while
    /// a segment that says more waits, and tells nothing else.
    fn made(&mut self, frame: &Bytes) -> Result<(), String> {
        let segment = parse(frame).filter(|it| it.payload.is_empty() && !it.syn && !it.rst);
        let Some((segment, ack)) = segment.and_then(|it| it.ack.map(|ack| (it, ack))) else {
            return Err("the primary sent a frame its guest did not emit".into());
        };
        let waiting = self.inside.iter().filter_map(|(epoch, frame)| Some((*epoch, parse(frame)?)));
        let waiting: Vec<_> = waiting.filter(|(_, it)| it.flow == segment.flow).collect();
        let Some((epoch, oldest)) = waiting.first().filter(|(_, oldest)| oldest.seq == segment.seq) else {
            return Err("an acknowledgement was made in no segment's place".into());
        };
        if !waiting.iter().any(|(of, it)| of == epoch && it.ack.is_some_and(|own| ahead(own, ack) <= 0)) {
            return Err("an acknowledgement was made that the guest has not made".into());
        }
        let flow = self.flows.entry(oldest.flow).or_default();
        flow.explain(*epoch, &segment, segment.seq)
            .map_err(|what| format!("{what} was made, port {}", segment.flow.1))?;
        if flow.shown_ack.is_none_or(|shown| ahead(shown, ack) > 0) {
            flow.shown_ack = Some(ack);
        }
        Ok(())
    }
}

impl Flow {
    fn explain(&self, epoch: u64, segment: &Segment, end: u32) -> Result<(), &'static str> {
        let same_epoch = self.epoch == epoch;
        if let Some(ack) = segment.ack {
            let reaches = |mark: Option<u32>| mark.is_some_and(|mark| ahead(mark, ack) <= 0);
            if !(reaches(self.shown_ack) || same_epoch && reaches(self.said_ack)) {
                return Err("an acknowledgement");
            }
        }
        if segment.syn {
            let known = self.shown_end == Some(end) || same_epoch && self.said_syn;
            return if known { Ok(()) } else { Err("a SYN") };
        }
        let mut at = match self.shown_end {
            Some(shown) if ahead(segment.seq, shown) > 0 => shown,
            _ => segment.seq,
        };
        while ahead(at, end) > 0 {
            let piece = self.said.iter().filter(|_| same_epoch).find_map(|(seq, bytes)| {
                let skip = usize::try_from(ahead(*seq, at)).ok()?;
                bytes.get(skip..).filter(|rest| !rest.is_empty())
            });
            let Some(piece) = piece else { return Err("payload nobody else said") };
            let ours = &segment.payload[at.wrapping_sub(segment.seq) as usize..];
            let len = ours.len().min(piece.len());
            if ours[..len] != piece[..len] {
                return Err("payload the other guest said otherwise");
            }
            at = at.wrapping_add(len as u32);
        }
        Ok(())
    }
}
