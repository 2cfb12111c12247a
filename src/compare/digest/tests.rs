//! Two halves joined by hand: whatever travels, the comparator sees guest B's own frames.

use super::super::testing::{Seg, Trace, udp};
use super::*;
use proptest::prelude::*;

const NOW: Instant = Instant::ZERO;

fn later() -> Instant {
    NOW + LOOK_AFTER
}

/// The link between the halves, and what came out of it.
struct Link {
    summaries: Summaries,
    expander: Expander,
    out: Vec<Bytes>,
    sent_bytes: usize,
}

impl Link {
    fn new() -> Self {
        let key = Key::of_session(7);
        Self { summaries: Summaries::new(key), expander: Expander::new(key), out: Vec::new(), sent_bytes: 0 }
    }

    fn a(&mut self, frame: impl Into<Bytes>) {
        self.expander.handle_primary(0, &frame.into());
        self.carry();
    }

    fn b(&mut self, frame: impl Into<Bytes>) {
        let (tag, message) = self.summaries.summarize(0, frame.into());
        self.sent_bytes += message.len();
        match tag & MARK {
            0 => self.expander.handle_secondary(tag, message),
            _ => assert!(self.expander.handle_message(NOW, tag, message)),
        }
        self.carry();
    }

    fn carry(&mut self) {
        while let Some(output) = self.expander.poll_output() {
            match output {
                Output::Frame { frame, .. } => self.out.push(frame),
                Output::Ask(wanted) => {
                    let Some((tag, message)) = self.summaries.frame(wanted) else { continue };
                    self.sent_bytes += message.len();
                    assert!(self.expander.handle_message(NOW, tag, message));
                }
            }
        }
    }

    fn time_passes(&mut self) {
        self.expander.handle_timeout(later());
        self.carry();
    }
}

fn data(seq: u32, payload: &[u8]) -> Bytes {
    Seg::data(seq, payload).bytes()
}

#[test]
fn a_payload_that_guest_a_said_too_does_not_travel() {
    let mut link = Link::new();
    let frame = data(100, &[7; 1448]);
    link.a(frame.clone());
    link.b(frame.clone());
    assert_eq!(link.out, std::slice::from_ref(&frame));
    assert!(link.sent_bytes < 100, "{}", link.sent_bytes);
    assert_eq!(link.summaries.saved_bytes(), (frame.len() - link.sent_bytes) as u64);
    assert_eq!((link.expander.counts(), link.expander.said_bytes, link.expander.waiting_bytes), ((1, 0), 0, 0));
    let datagram = Bytes::from(udp(9, &[3; 500]));
    link.b(datagram.clone());
    assert_eq!(link.out.len(), 1);
    link.a(datagram.clone());
    assert_eq!((link.out.len(), link.expander.counts().1), (2, 0));
    assert_eq!(link.out[1], datagram);
}

#[test]
fn one_stream_may_be_cut_differently() {
    let mut link = Link::new();
    let text: Vec<u8> = (0..3000_u32).map(|n| n as u8).collect();
    link.b(data(u32::MAX - 99, &text[..1448]));
    assert_eq!(link.out.len(), 0);
    link.a(data(u32::MAX - 99, &text[..1000]));
    link.a(data(900, &text[1000..3000]));
    assert_eq!(link.out.len(), 1);
    link.b(data(1348, &text[1448..3000]));
    assert_eq!((link.out.len(), link.expander.counts().1, link.expander.said_bytes), (2, 0, 0));
}

#[test]
fn what_differs_is_looked_into_at_once_and_arrives_as_it_is() {
    let mut link = Link::new();
    let (mine, theirs) = (data(100, &[7; 200]), data(100, &[8; 200]));
    link.a(mine);
    link.b(theirs.clone());
    assert_eq!((&link.out[..], link.expander.counts()), (&[theirs][..], (1, 1)));
}

#[test]
fn what_guest_a_does_not_say_is_looked_into_soon_and_holds_up_its_flow_alone() {
    let mut link = Link::new();
    let frames = [data(100, &[7; 200]), data(300, b"small"), Seg::pure_ack(50).bytes()];
    frames.iter().for_each(|frame| link.b(frame.clone()));
    let other = Seg::data(5, b"other flow").port(99).bytes();
    link.b(other.clone());
    assert_eq!(link.out, [other]);
    assert_eq!(link.expander.poll_timeout(), Some(later()));
    link.time_passes();
    assert_eq!(link.out[1..], frames);
    assert_eq!((link.expander.poll_timeout(), link.expander.counts().1), (None, 1));
}

#[test]
fn a_checkpoint_forgets_what_waits() {
    let mut link = Link::new();
    link.b(data(100, &[7; 200]));
    link.a(data(500, &[7; 200]));
    link.expander.forget_before(1);
    link.time_passes();
    assert_eq!((link.out.len(), link.expander.said_bytes, link.expander.waiting_bytes), (0, 0, 0));
    assert_eq!(link.expander.flows.len(), 0);
}

#[test]
fn memory_is_bounded_whoever_is_alone() {
    let mut link = Link::new();
    for n in 0..40_000_u32 {
        link.a(Seg::data(n * 1000, &[1; 1000]).port((n % 50) as u16).bytes());
        link.b(Seg::data(n * 1000, &[2; 1000]).port((100 + n % 50) as u16).bytes());
        assert!(link.expander.said_bytes <= MAX_KEPT_BYTES && link.expander.waiting_bytes <= MAX_KEPT_BYTES);
        assert!(link.summaries.kept_bytes <= MAX_KEPT_BYTES);
    }
}

#[test]
fn what_a_peer_may_not_say_is_refused() {
    let mut link = Link::new();
    let (tag, whole) = link.summaries.summarize(3, data(1, &[9; 100]));
    for cut in 0..whole.len() {
        assert!(!link.expander.handle_message(NOW, tag, whole.slice(..cut)), "cut at {cut}");
    }
    let mut long = whole.to_vec();
    long[9..13].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(!link.expander.handle_message(NOW, tag, long.into()));
    assert!(link.summaries.frame(Bytes::from_static(&[KIND_WANTED, 0, 0, 0, 0, 0, 0, 0, 9])).is_none());
    assert!(link.summaries.frame(Bytes::from_static(&[KIND_WANTED])).is_none());
}

/// Cuts a text into segments from sequence number 1000 on.
fn segments(text: &[u8], cuts: &[usize]) -> Vec<Bytes> {
    let mut ends: Vec<_> = cuts.iter().map(|cut| cut % text.len()).chain([0, text.len()]).collect();
    ends.sort_unstable();
    ends.dedup();
    ends.windows(2).map(|pair| data(1000 + pair[0] as u32, &text[pair[0]..pair[1]])).collect()
}

proptest! {
    /// With digests and without, the comparator lets the same leave and finds the same difference.
    #[test]
    fn the_verdict_is_that_of_whole_frames(
        len in 1..6000_usize,
        cuts in prop::array::uniform2(prop::collection::vec(any::<usize>(), 0..6)),
        order in prop::collection::vec(any::<bool>(), 16),
        wrong in prop::option::of(any::<usize>()),
    ) {
        let text: Vec<u8> = (0..len).map(|n| (n * 31 % 251) as u8).collect();
        let mut other = text.clone();
        if let Some(at) = wrong {
            other[at % len] ^= 1;
        }
        let (a, b) = (segments(&text, &cuts[0]), segments(&other, &cuts[1]));
        let (mut whole, mut spared, mut link) = (Trace::new(), Trace::new(), Link::new());
        let (mut left, mut right) = (a.iter(), b.iter());
        let (mut of_whole, mut of_spared, mut given) = (0, 0, 0);
        for first in order.into_iter().chain([true, false].into_iter().cycle().take(32)) {
            if first && let Some(frame) = left.next() {
                link.a(frame.clone());
                of_whole += whole.p_raw(0, frame.clone());
                of_spared += spared.p_raw(0, frame.clone());
            } else if let Some(frame) = right.next() {
                link.b(frame.clone());
                of_whole += whole.s_raw(0, frame.clone());
            }
            for frame in link.out.iter().skip(given) {
                of_spared += spared.s_raw(0, frame.clone());
            }
            given = link.out.len();
        }
        link.time_passes();
        for frame in link.out.iter().skip(given) {
            of_spared += spared.s_raw(0, frame.clone());
        }
        prop_assert_eq!(&link.out, &b);
        prop_assert_eq!(of_whole, of_spared);
        prop_assert_eq!(whole.asked, spared.asked);
    }
}
