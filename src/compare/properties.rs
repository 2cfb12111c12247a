//! What holds for any traffic, and the planted bug that each of these would show.

use super::testing::{Seg, Trace, fragments, icmp_echo_reply, udp, udp6};
use super::*;
use crate::mutant::{Mutant, plant};
use bytes::Bytes;
use proptest::prelude::*;

pub(super) struct Dice(pub(super) u64);

impl Dice {
    /// Below `limit`.
    pub(super) fn roll(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.roll(256) as u8).collect()
    }

    /// A stream as segments, some sent again, cut anew.
    fn segments(&mut self, isn: u32, stream: &[u8]) -> Vec<Seg> {
        let (mut at, mut out) = (0, vec![]);
        while at < stream.len() {
            let from = if self.roll(4) == 0 { at - at.min(self.roll(20)) } else { at };
            let to = stream.len().min(at + 1 + self.roll(30));
            out.push(Seg::data(isn.wrapping_add(from as u32), &stream[from..to]).ack(5));
            at = to;
        }
        out
    }

    /// The parts of a datagram in any order.
    fn cut(&mut self, frame: &[u8], id: u8) -> Vec<Vec<u8>> {
        let payload = frame.len() - if frame[12] == 0x86 { 54 } else { 34 };
        let mut cuts: Vec<_> = (0..self.roll(4)).map(|_| (1 + self.roll(payload / 8)) * 8).collect();
        cuts.retain(|cut| *cut < payload);
        cuts.sort_unstable();
        cuts.dedup();
        let mut parts = if cuts.is_empty() { vec![frame.to_vec()] } else { fragments(frame, id, &cuts) };
        for at in (1..parts.len()).rev() {
            parts.swap(at, self.roll(at + 1));
        }
        parts
    }

    /// Two sequences, each in its order, in any interleaving.
    fn weave<T>(&mut self, a: Vec<T>, b: Vec<T>) -> Vec<(bool, T)> {
        let (mut a, mut b) = (a.into_iter().peekable(), b.into_iter().peekable());
        let mut out = vec![];
        while a.peek().is_some() || b.peek().is_some() {
            let first = b.peek().is_none() || (a.peek().is_some() && self.roll(2) == 0);
            out.extend(if first { a.next() } else { b.next() }.map(|next| (first, next)));
        }
        out
    }
}

fn play(t: &mut Trace, frames: Vec<(bool, Vec<u8>)>) -> Vec<Bytes> {
    let mut left = vec![];
    for (primary, frame) in frames {
        let now = t.now;
        if primary {
            t.comparator.handle_primary(now, 0, frame.into());
        } else {
            t.comparator.handle_secondary(now, 0, frame.into());
        }
        left.extend(t.out());
    }
    left
}

/// One stream, and one datagram, cut by each guest in its own way: all leaves and nobody asks.
fn any_cut_is_equal(seed: u64) -> Result<(), String> {
    let (mut dice, mut t) = (Dice(seed), Trace::new());
    let len = 1 + dice.roll(300);
    let (isn, stream) = (u32::MAX - dice.roll(300) as u32, dice.bytes(len));
    let frames = |dice: &mut Dice| dice.segments(isn, &stream).iter().map(Seg::frame).collect::<Vec<_>>();
    let (a, b) = (frames(&mut dice), frames(&mut dice));
    let payload = dice.bytes(300);
    let datagram = if dice.roll(2) == 0 { udp(7, &payload) } else { udp6(7, &payload) };
    let (a_parts, b_parts) = (dice.cut(&datagram, 1), dice.cut(&datagram, 2));
    let sent = a.len() + a_parts.len();
    let (a, b) = ([a, a_parts].concat(), [b, b_parts].concat());
    let woven = dice.weave(a, b);
    let left = play(&mut t, woven).len();
    if (left, &t.asked[..]) == (sent, &[]) { Ok(()) } else { Err(format!("{left} of {sent} left, {:?}", t.asked)) }
}

/// The same with one byte changed in what guest B says: what holds it never leaves, and a checkpoint is asked for.
fn a_changed_byte_is_found(seed: u64) -> Result<(), String> {
    let (mut dice, mut t) = (Dice(seed), Trace::new());
    let len = 1 + dice.roll(300);
    let stream = dice.bytes(len);
    let at = dice.roll(len);
    let mut other = stream.clone();
    other[at] ^= 1 << dice.roll(8);
    let fragmented = len > 40 && dice.roll(3) == 0;
    let frames = |dice: &mut Dice, stream: &[u8], id: u8| {
        if fragmented {
            let frame = if seed.is_multiple_of(2) { udp(7, stream) } else { udp6(7, stream) };
            return dice.cut(&frame, id);
        }
        dice.segments(9, stream).iter().map(Seg::frame).collect()
    };
    let (a, b) = (frames(&mut dice, &stream, 1), frames(&mut dice, &other, 2));
    let woven = dice.weave(a, b);
    let mut left = play(&mut t, woven);
    if !fragmented {
        left.retain(|frame| {
            let segment = Seg::read(frame);
            let start = segment.seq as usize - 9;
            (start..start + segment.payload.len()).contains(&at)
        });
    }
    match (left.len(), &t.asked[..]) {
        (0, [(0, Cause::PayloadDiffers)]) => Ok(()),
        wrong => Err(format!("byte {at} of {len}: {wrong:?}")),
    }
}

/// Several flows whose secondary frames come in any order: within a flow nothing overtakes.
fn order_is_kept(seed: u64) -> Result<(), String> {
    let (mut dice, mut t) = (Dice(seed), Trace::new());
    let mut flows: Vec<Vec<Vec<u8>>> = vec![];
    for flow in 0..3_u16 {
        let tcp = (0..4).map(|n| Seg::data(n * 4, &[n as u8; 4]).port(flow).frame());
        flows.push(tcp.collect());
        flows.push((0..4).map(|n| udp(100 + flow, &[n; 9])).collect());
        flows.push((0..4).map(|n| icmp_echo_reply(flow, &[n; 9])).collect());
    }
    let all: Vec<_> = flows.iter().flatten().cloned().collect();
    let mut theirs = all.clone();
    for at in (1..theirs.len()).rev() {
        theirs.swap(at, dice.roll(at + 1));
    }
    // All of guest A's first: with less, a datagram out of its turn is a difference.
    let frames = all.iter().cloned().map(|frame| (true, frame));
    let frames = frames.chain(theirs.into_iter().map(|frame| (false, frame))).collect();
    let left = play(&mut t, frames);
    for flow in &flows {
        let mine: Vec<_> = left.iter().filter(|frame| flow.iter().any(|sent| *sent == frame[..])).collect();
        if mine.iter().zip(flow).any(|(left, sent)| left[..] != sent[..]) || mine.len() != flow.len() {
            return Err(format!("{} of {} left, out of order", mine.len(), flow.len()));
        }
    }
    Ok(())
}

/// A flow that has diverged, be it fed with anything: nothing more of it leaves before the checkpoint, then all does.
fn divergence_holds(seed: u64) -> Result<(), String> {
    let (mut dice, mut t) = (Dice(seed), Trace::new());
    let tcp = dice.roll(2) == 0;
    let frame = |n: usize, byte: u8| {
        if tcp { Seg::data(n as u32 * 8, &[byte; 8]).frame() } else { udp(7, &[byte; 8]) }
    };
    let wrong = dice.roll(6);
    let a: Vec<_> = (0..12).map(|n| frame(n, n as u8)).collect();
    let b: Vec<_> = (0..12).map(|n| frame(n, if n == wrong { 0xff } else { n as u8 })).collect();
    let right: Vec<_> = a.iter().cloned().map(|frame| (false, frame)).collect();
    let count = a.len();
    let woven = dice.weave(a, b);
    // Too late guest B says all that guest A said.
    let left = play(&mut t, woven).len() + play(&mut t, right).len();
    if t.asked != [(0, Cause::PayloadDiffers)] || left > wrong {
        return Err(format!("{left} left though frame {wrong} differs, {:?}", t.asked));
    }
    let rest = t.checkpoint(0).len();
    if left + rest == count { Ok(()) } else { Err(format!("{left} and {rest} left of {count}")) }
}

/// Fragments of which two say different things about one place: never judged, whatever guest B says.
fn overlaps_are_not_judged(seed: u64) -> Result<(), String> {
    let (mut dice, mut t) = (Dice(seed), Trace::new());
    let payload = dice.bytes(92);
    let frame = udp(7, &payload);
    let mut parts = fragments(&frame, 1, &[40, 80]);
    let extra = fragments(&udp(7, &dice.bytes(92)), 1, &[8 + 8 * dice.roll(4), 48 + 8 * dice.roll(4)]);
    parts.insert(2, extra[1].clone());
    let woven = dice.weave(parts, vec![frame]);
    let left = play(&mut t, woven).len();
    if left == 0 && !t.asked.is_empty() { Ok(()) } else { Err(format!("{left} left, {:?}", t.asked)) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_two_segmentations_of_one_stream_are_equal(seed: u64) {
        prop_assert_eq!(any_cut_is_equal(seed), Ok(()));
    }

    #[test]
    fn any_single_changed_byte_is_found(seed: u64) {
        prop_assert_eq!(a_changed_byte_is_found(seed), Ok(()));
    }

    #[test]
    fn a_flow_leaves_in_the_primarys_order(seed: u64) {
        prop_assert_eq!(order_is_kept(seed), Ok(()));
    }

    #[test]
    fn nothing_leaves_a_diverged_flow_before_a_checkpoint(seed: u64) {
        prop_assert_eq!(divergence_holds(seed), Ok(()));
    }

    #[test]
    fn overlapping_fragments_are_never_judged(seed: u64) {
        prop_assert_eq!(overlaps_are_not_judged(seed), Ok(()));
    }
}

#[test]
fn every_property_sees_its_planted_bug() {
    for mutant in Mutant::OF_JUDGEMENT {
        let property = match mutant {
            Mutant::CutMatters => any_cut_is_equal,
            Mutant::OverlookByte => a_changed_byte_is_found,
            Mutant::OvertakeInFlow => order_is_kept,
            Mutant::LeaveAfterDivergence => divergence_holds,
            Mutant::TakeOverlap => overlaps_are_not_judged,
            other => panic!("no property for {other:?}"),
        };
        plant(Some(mutant));
        let caught = (0..100).filter(|seed| property(*seed).is_err()).count();
        plant(None);
        assert!(caught > 0, "{mutant:?}");
    }
}
