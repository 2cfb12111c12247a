//! The secondary's sequence rewriter: guest B picks its own initial sequence numbers, clients only know guest A's.
//!
//! ```text
//!   client ──SYN──▶ ·  ──────────────────────────────────────────▶ B      handshake
//!                   · ◀──SYN-ACK, seq = ISN of B (passes as it is)─ B      isn known
//!   client ──ACK──▶ · offset = ISN of B − (ack − 1) ──────────────▶ B      translating
//!          client ──▶ ack += offset, SACK += offset;  seq −= offset ◀── B
//!   checkpoint: forget everything: guest B now *is* guest A, sequence space included
//! ```
//!
//! The client's ACK answers guest A's SYN-ACK, so `ack − 1` is the ISN of A. It can arrive before guest B has sent
//! its own SYN-ACK (guest B is slower): such a flow's frames are held, in order and bounded, until it does. QEMU
//! computes garbage then. A SYN for a live flow changes nothing until guest B accepts it: anyone can forge a SYN.
//!
//! After a takeover clients talk to guest B alone: flows whose offset is not zero are translated for as long as they
//! live, flows that begin later are not tracked. Live offsets are never evicted; a new flow that finds no room
//! is not translated, and lives again at the next checkpoint.
//!
//! The trap: the reset must happen exactly where guest B's state changes, between the last frame of the old epoch
//! and the first of the new. Not covered: TCP timestamps (TSecr), connections opened by the guest (they pass
//! untouched). Source: `net/filter-rewriter.c`; RFC 9293, RFC 2018 for SACK.

use super::checksum::tcp_replace;
use super::connection::FRAME_OVERHEAD_BYTES;
use super::key::FlowKey;
use super::packet::{Ip, Packet, Tcp, Transport, be32};
use crate::clock::Instant;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Flows tracked at once.
const MAX_FLOWS: usize = 16_384;
/// Client frames held for handshakes guest B has not answered, all flows together.
const MAX_HELD_BYTES: usize = 4 << 20;
/// How long a finished or half-open flow is remembered: the client's TIME_WAIT.
const LINGER: Duration = Duration::from_secs(60);
/// The same when there is no room.
const LINGER_WHEN_FULL: Duration = Duration::from_secs(2);
/// How often the table is searched for flows to forget.
const SWEEP_CYCLE: Duration = Duration::from_secs(1);
/// A handshake-completing frame starts within this distance of the client's ISN.
const HANDSHAKE_WINDOW: u32 = 1 << 20;

/// Where a client's frame goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Forward {
    /// On to guest B, rewritten in place.
    Now,
    /// Taken: it comes back from [`Rewriter::poll_output`] when guest B is ready for it.
    Held,
}

/// A handshake guest B has not completed.
#[derive(Clone, Copy, Debug)]
struct Handshake {
    client_isn: u32,
    svm_isn: Option<u32>,
}

#[derive(Debug)]
struct Flow {
    /// The client's ISN of the present life.
    client_isn: u32,
    /// Guest B's sequence numbers minus guest A's.
    offset: u32,
    handshake: Option<Handshake>,
    held: VecDeque<Vec<u8>>,
    /// Guest B has this life from the state it loaded: it is in guest A's space, and how it began is not known.
    inherited: bool,
    /// FIN seen from the client, from the guest; a RST counts as both.
    fins: [bool; 2],
    last: Instant,
}

impl Flow {
    fn forgettable(&self) -> bool {
        self.fins == [true; 2] || (self.handshake.is_some() && self.offset == 0)
    }

    /// Whether guest B answers a SYN with anything but a SYN-ACK because it is in the midst of an older life, be it
    /// one it loaded. The SYN may be no more than a late copy of the one that began that life.
    fn refused(&self, tcp: &Tcp) -> bool {
        let pending = self.handshake.is_some_and(|new| new.svm_isn.is_none());
        pending && self.fins != [true; 2] && !tcp.has(Tcp::SYN) && !tcp.has(Tcp::RST)
    }

    /// Lets the held frames go, translated, and tells what they cost.
    fn free_held(&mut self, outputs: &mut VecDeque<Vec<u8>>) -> usize {
        let mut freed = 0;
        for mut held in std::mem::take(&mut self.held) {
            freed += cost_bytes(&held);
            if let Some((_, tcp)) = tcp_of(&held) {
                self.note_end(0, &tcp);
                translate_inbound(&mut held, &tcp, self.offset);
            }
            outputs.push_back(held);
        }
        freed
    }

    /// Drops the held frames and tells what they cost.
    fn drop_held(&mut self) -> usize {
        self.held.drain(..).map(|held| cost_bytes(&held)).sum()
    }

    /// Notes a FIN or a RST of one side.
    fn note_end(&mut self, side: usize, tcp: &Tcp) {
        if tcp.has(Tcp::RST) {
            self.fins = [true; 2];
        }
        self.fins[side] |= tcp.has(Tcp::FIN);
    }

    /// Both initial sequence numbers are known: guest A's is one below what the client acknowledged first.
    fn establish(&mut self, client_isn: u32, svm_isn: u32, client_ack: u32) {
        self.offset = svm_isn.wrapping_sub(client_ack.wrapping_sub(1));
        (self.client_isn, self.handshake, self.inherited, self.fins) = (client_isn, None, false, [false; 2]);
    }
}

/// The rewriter of one guest NIC.
#[derive(Debug, Default)]
pub struct Rewriter {
    /// Keyed in the guest's direction.
    flows: BTreeMap<FlowKey, Flow>,
    outputs: VecDeque<Vec<u8>>,
    held_bytes: usize,
    alone: bool,
    next_sweep: Instant,
    untracked: u64,
}

fn tcp_of(frame: &[u8]) -> Option<(FlowKey, Tcp)> {
    let Packet::Ip(ip) = Packet::parse(frame) else { return None };
    let key = FlowKey::of(&ip);
    match ip {
        Ip { transport: Transport::Tcp(tcp), .. } => Some((key, tcp)),
        _ => None,
    }
}

fn cost_bytes(frame: &[u8]) -> usize {
    frame.len() + FRAME_OVERHEAD_BYTES
}

/// Moves what a client says about the guest's bytes into guest B's space.
fn translate_inbound(frame: &mut [u8], tcp: &Tcp, offset: u32) {
    if offset == 0 {
        return;
    }
    let segment = frame.get_mut(tcp.header_at..tcp.payload.end).unwrap_or_default();
    if tcp.has(Tcp::ACK) {
        tcp_replace(segment, 8, tcp.ack.wrapping_add(offset));
    }
    let options = tcp.options.start - tcp.header_at..tcp.options.end - tcp.header_at;
    for at in sack_edges(segment, options) {
        if let Some(edge) = be32(segment, at) {
            tcp_replace(segment, at, edge.wrapping_add(offset));
        }
    }
}

/// Offsets of the SACK edges in a segment's options.
fn sack_edges(segment: &[u8], options: std::ops::Range<usize>) -> Vec<usize> {
    let (mut at, mut edges) = (options.start, Vec::new());
    while at < options.end {
        let length = match (segment.get(at), segment.get(at + 1)) {
            (Some(1), _) => 1,
            (Some(2..), Some(&length)) if length >= 2 && at + usize::from(length) <= options.end => usize::from(length),
            _ => break,
        };
        if segment.get(at) == Some(&5) {
            edges.extend((at + 2..at + length).step_by(4).filter(|edge| edge + 4 <= at + length));
        }
        at += length;
    }
    edges
}

impl Rewriter {
    /// A rewriter that knows no flow.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A client's frame on its way to guest B. When it is held, `frame` is left empty.
    pub fn from_network(&mut self, now: Instant, frame: &mut Vec<u8>) -> Forward {
        let Some((key, tcp)) = tcp_of(frame) else { return Forward::Now };
        let key = key.reversed();
        if tcp.has(Tcp::SYN) {
            if !tcp.has(Tcp::ACK) {
                self.client_syn(now, key, tcp.seq);
            }
            return Forward::Now;
        }
        let Some(flow) = self.flows.get_mut(&key) else {
            // Its handshake came before the state guest B loaded; a SYN-ACK that guest B repeats begins nothing.
            if !tcp.has(Tcp::RST) {
                self.begin(now, key, tcp.seq, None);
            }
            return Forward::Now;
        };
        flow.last = now;
        if let Some(handshake) = flow.handshake
            && tcp.has(Tcp::ACK)
            && !tcp.has(Tcp::RST)
            && tcp.seq.wrapping_sub(handshake.client_isn.wrapping_add(1)) < HANDSHAKE_WINDOW
        {
            let Some(svm_isn) = handshake.svm_isn else {
                // Above the bound it is dropped: guest B will not acknowledge it, so guest A's ACK is held, and the
                // checkpoint that asks for makes it good.
                if self.held_bytes + cost_bytes(frame) <= MAX_HELD_BYTES {
                    self.held_bytes += cost_bytes(frame);
                    flow.held.push_back(std::mem::take(frame));
                }
                frame.clear();
                return Forward::Held;
            };
            flow.establish(handshake.client_isn, svm_isn, tcp.ack);
        }
        flow.note_end(0, &tcp);
        translate_inbound(frame, &tcp, flow.offset);
        Forward::Now
    }

    /// A frame of guest B on its way out.
    pub fn from_guest(&mut self, now: Instant, frame: &mut [u8]) {
        let Some((key, tcp)) = tcp_of(frame) else { return };
        if tcp.has(Tcp::SYN) && !tcp.has(Tcp::ACK) {
            // The guest opens a connection of its own: what was known belongs to an older life.
            return self.forget(&key);
        }
        if tcp.has(Tcp::SYN) {
            // The SYN may have been in the captured state: guest B found it on its own ring, nobody passed it here.
            let client_isn = tcp.ack.wrapping_sub(1);
            self.begin(now, key, client_isn, Some(Handshake { client_isn, svm_isn: None }));
        }
        let Some(flow) = self.flows.get_mut(&key) else { return };
        flow.last = now;
        flow.note_end(1, &tcp);
        if tcp.has(Tcp::SYN)
            && let Some(handshake) = &mut flow.handshake
            && tcp.ack == handshake.client_isn.wrapping_add(1)
        {
            handshake.svm_isn = Some(tcp.seq);
            let client_isn = handshake.client_isn;
            let Some((_, first)) = flow.held.front().and_then(|first| tcp_of(first)) else { return };
            flow.establish(client_isn, tcp.seq, first.ack);
            self.held_bytes -= flow.free_held(&mut self.outputs);
        } else if flow.refused(&tcp) {
            flow.inherited |= flow.handshake.is_some_and(|new| new.client_isn == flow.client_isn);
            flow.handshake = None;
            self.held_bytes -= flow.free_held(&mut self.outputs);
        }
        if flow.offset != 0 {
            let seq = tcp.seq.wrapping_sub(flow.offset);
            tcp_replace(frame.get_mut(tcp.header_at..tcp.payload.end).unwrap_or_default(), 4, seq);
        }
    }

    /// The next held client frame guest B is ready for, rewritten. Drain it after every [`Rewriter::from_guest`], before
    /// the next client frame: that one is younger.
    pub fn poll_output(&mut self) -> Option<Vec<u8>> {
        self.outputs.pop_front()
    }

    /// Guest B has loaded guest A's state. What was held is dropped: guest A received it in the epoch that ended.
    pub fn checkpoint(&mut self) {
        self.flows.clear();
        self.outputs.clear();
        self.held_bytes = 0;
    }

    /// Guest B has taken over: flows that begin from here need no translation.
    pub fn takeover(&mut self) {
        self.alone = true;
    }

    /// How many flows are being translated.
    #[must_use]
    pub fn needed(&self) -> usize {
        self.flows.values().filter(|flow| flow.offset != 0).count()
    }

    /// How many new flows found no room, since the start.
    #[must_use]
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// Forgets flows that ended or never began.
    pub fn handle_timeout(&mut self, now: Instant) {
        if now < self.next_sweep {
            return;
        }
        self.next_sweep = now + SWEEP_CYCLE;
        let linger = if self.flows.len() >= MAX_FLOWS { LINGER_WHEN_FULL } else { LINGER };
        let held_bytes = &mut self.held_bytes;
        self.flows.retain(|_, flow| {
            let keep = !flow.forgettable() || now - flow.last < linger;
            if !keep {
                *held_bytes -= flow.drop_held();
            }
            keep
        });
    }

    /// When to call [`Rewriter::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        (!self.flows.is_empty()).then_some(self.next_sweep)
    }

    fn client_syn(&mut self, now: Instant, key: FlowKey, client_isn: u32) {
        let handshake = Some(Handshake { client_isn, svm_isn: None });
        if let Some(flow) = self.flows.get_mut(&key) {
            let known = flow.handshake.map_or(flow.client_isn, |handshake| handshake.client_isn);
            let over = flow.inherited && flow.fins == [true; 2];
            if known != client_isn || over {
                self.held_bytes -= flow.drop_held();
                flow.handshake = handshake;
            }
            return;
        }
        self.begin(now, key, client_isn, handshake);
    }

    /// Remembers a flow that is not known yet, by its handshake or as one that guest B has loaded.
    fn begin(&mut self, now: Instant, key: FlowKey, client_isn: u32, handshake: Option<Handshake>) {
        if self.alone || self.flows.contains_key(&key) {
            return;
        }
        if self.flows.len() >= MAX_FLOWS {
            self.handle_timeout(now);
        }
        if self.flows.len() >= MAX_FLOWS {
            self.untracked += 1;
            return;
        }
        let (inherited, held, fins) = (handshake.is_none(), VecDeque::new(), [false; 2]);
        self.flows.insert(key, Flow { client_isn, offset: 0, handshake, held, inherited, fins, last: now });
    }

    fn forget(&mut self, key: &FlowKey) {
        if let Some(mut flow) = self.flows.remove(key) {
            self.held_bytes -= flow.drop_held();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::testing::{Seg, in_ipv6, tagged};
    use proptest::prelude::*;
    use smoltcp::wire::TcpControl;

    const CLIENT_ISN: u32 = 1000;
    const PVM: u32 = 50_000;
    const SVM: u32 = 4_294_967_000; // wraps inside every test

    fn inbound(rewriter: &mut Rewriter, segment: Seg) -> Option<Seg> {
        let mut frame = segment.inbound().frame();
        (rewriter.from_network(Instant::ZERO, &mut frame) == Forward::Now).then(|| Seg::read(&frame))
    }

    fn outbound(rewriter: &mut Rewriter, segment: Seg) -> Seg {
        let mut frame = segment.frame();
        rewriter.from_guest(Instant::ZERO, &mut frame);
        Seg::read(&frame)
    }

    fn syn_ack(seq: u32) -> Seg {
        Seg::syn(seq).ack(CLIENT_ISN + 1)
    }

    fn established() -> Rewriter {
        let mut rewriter = Rewriter::new();
        inbound(&mut rewriter, Seg::syn(CLIENT_ISN)).unwrap();
        assert_eq!(outbound(&mut rewriter, syn_ack(SVM)).seq, SVM, "compared by flag, not rewritten yet");
        let ack = inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"").ack(PVM + 1)).unwrap();
        assert_eq!(ack.ack, Some(SVM + 1));
        assert_eq!(rewriter.needed(), 1);
        rewriter
    }

    #[test]
    fn a_connection_is_translated_both_ways() {
        let mut rewriter = established();
        let reply = outbound(&mut rewriter, Seg::data(SVM + 1, b"hello").ack(CLIENT_ISN + 1));
        assert_eq!((reply.seq, reply.ack), (PVM + 1, Some(CLIENT_ISN + 1)));
        let more = Seg::data(CLIENT_ISN + 1, b"x").ack(PVM + 500).sack(PVM + 600, PVM + 700);
        let more = inbound(&mut rewriter, more).unwrap();
        assert_eq!(more.ack, Some(SVM.wrapping_add(500)));
        assert_eq!(more.sack, Some((SVM.wrapping_add(600), SVM.wrapping_add(700))));
        assert_eq!(outbound(&mut rewriter, syn_ack(SVM)).seq, PVM, "a retransmitted SYN-ACK, known by now");
    }

    #[test]
    fn tags_and_ipv6_make_no_difference() {
        let (mut rewriter, mut alike) = (Rewriter::new(), established());
        let behind = |frame: &[u8], inbound: bool| {
            let mut other = tagged(&[5], &in_ipv6(6, &frame[34..]));
            if inbound {
                other[26..58].rotate_left(16);
            }
            other
        };
        for (segment, from_client) in [
            (Seg::syn(CLIENT_ISN), true),
            (syn_ack(SVM), false),
            (Seg::data(CLIENT_ISN + 1, b"").ack(PVM + 1), true),
            (Seg::data(SVM + 1, b"hello").ack(CLIENT_ISN + 1), false),
        ] {
            let mut plain = if from_client { segment.clone().inbound() } else { segment.clone() }.frame();
            let mut other = behind(&plain, from_client);
            if from_client {
                rewriter.from_network(Instant::ZERO, &mut other);
                alike.from_network(Instant::ZERO, &mut plain);
            } else {
                rewriter.from_guest(Instant::ZERO, &mut other);
                alike.from_guest(Instant::ZERO, &mut plain);
            }
            if segment.control == TcpControl::None {
                assert_eq!(other[58..], plain[34..], "{:?}", segment.payload);
            }
        }
        assert_eq!(rewriter.needed(), 1);
    }

    #[test]
    fn a_syn_that_came_with_the_captured_state_is_known_by_its_answer() {
        let mut rewriter = Rewriter::new();
        rewriter.checkpoint();
        assert_eq!(outbound(&mut rewriter, syn_ack(SVM)).seq, SVM);
        let ack = inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"").ack(PVM + 1)).unwrap();
        assert_eq!(ack.ack, Some(SVM + 1), "guest B would answer any other number with a reset");
    }

    #[test]
    fn a_loaded_connection_stays_as_it_is_whatever_is_repeated() {
        // Guest B loaded it half open and repeats its SYN-ACK, after the client's first frames have passed.
        let mut rewriter = Rewriter::new();
        inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"").ack(PVM + 1)).unwrap();
        assert_eq!(outbound(&mut rewriter, syn_ack(PVM)).seq, PVM);
        assert_eq!(
            inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"x").ack(PVM + 300)).unwrap().ack,
            Some(PVM + 300)
        );
        // A late copy of the client's SYN arrives, and guest B says that it is in the midst of that very life.
        let mut rewriter = Rewriter::new();
        inbound(&mut rewriter, Seg::syn(CLIENT_ISN)).unwrap();
        assert!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 9, b"y").ack(PVM + 5)).is_none(), "held meanwhile");
        outbound(&mut rewriter, Seg::data(PVM + 5, b"").ack(CLIENT_ISN + 9));
        assert_eq!(rewriter.poll_output().map(|frame| Seg::read(&frame).ack), Some(Some(PVM + 5)));
        assert!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 10, b"z").ack(PVM + 6)).is_some());
    }

    #[test]
    fn the_clients_ack_may_be_faster_than_guest_b() {
        let mut rewriter = Rewriter::new();
        inbound(&mut rewriter, Seg::syn(CLIENT_ISN)).unwrap();
        assert!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"").ack(PVM + 1)).is_none());
        assert!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"GET").ack(PVM + 1)).is_none());
        assert_eq!(rewriter.poll_output(), None);
        assert_eq!(outbound(&mut rewriter, syn_ack(SVM)).seq, PVM, "the offset is known at once");
        for payload in [&b""[..], b"GET"] {
            let held = Seg::read(&rewriter.poll_output().unwrap());
            assert_eq!((held.ack, &held.payload[..]), (Some(SVM + 1), payload));
        }
        assert_eq!((rewriter.poll_output(), rewriter.held_bytes), (None, 0));
    }

    #[test]
    fn a_checkpoint_ends_translation_and_a_takeover_does_not() {
        let mut rewriter = established();
        rewriter.takeover();
        assert_eq!(outbound(&mut rewriter, Seg::data(SVM + 9, b"x")).seq, PVM + 9);
        inbound(&mut rewriter, Seg::syn(7).port(41_000)).unwrap();
        assert_eq!(outbound(&mut rewriter, Seg::syn(77).ack(8).port(41_000)).seq, 77);
        assert_eq!(inbound(&mut rewriter, Seg::data(8, b"").ack(78).port(41_000)).unwrap().ack, Some(78));
        assert_eq!((rewriter.needed(), rewriter.flows.len()), (1, 1), "new flows are nobody's business");
        rewriter.checkpoint();
        assert_eq!(outbound(&mut rewriter, Seg::data(PVM + 9, b"x")).seq, PVM + 9);
        assert_eq!(rewriter.needed(), 0);
    }

    #[test]
    fn a_forged_syn_does_not_break_a_live_flow() {
        let mut rewriter = established();
        inbound(&mut rewriter, Seg::syn(CLIENT_ISN)).unwrap();
        inbound(&mut rewriter, Seg::syn(CLIENT_ISN - 1)).unwrap();
        assert!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"x").ack(PVM + 1)).is_none(), "whose is it?");
        let challenge_ack = Seg::data(SVM + 1, b"").ack(CLIENT_ISN + 1);
        assert_eq!(outbound(&mut rewriter, challenge_ack).seq, PVM + 1);
        assert_eq!(Seg::read(&rewriter.poll_output().unwrap()).ack, Some(SVM + 1));
        assert_eq!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"x").ack(PVM + 2)).unwrap().ack, Some(SVM + 2));
    }

    #[test]
    fn a_reused_port_gets_its_own_offset() {
        let mut rewriter = established();
        let isn = CLIENT_ISN + 0x4000_0000;
        inbound(&mut rewriter, Seg::syn(isn)).unwrap();
        outbound(&mut rewriter, Seg::syn(9).ack(isn + 1));
        assert_eq!(inbound(&mut rewriter, Seg::data(isn + 1, b"").ack(101)).unwrap().ack, Some(10));
        assert_eq!(outbound(&mut rewriter, Seg::data(10, b"x")).seq, 101);
    }

    #[test]
    fn both_fins_end_a_flow_after_time_wait_and_nothing_wipes_a_live_one() {
        let mut rewriter = established();
        inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"").ack(PVM + 1).fin()).unwrap();
        rewriter.handle_timeout(Instant::ZERO + LINGER * 2);
        assert_eq!(rewriter.needed(), 1, "half closed is alive");
        outbound(&mut rewriter, Seg::data(SVM + 1, b"").ack(CLIENT_ISN + 2).fin());
        assert_eq!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 2, b"").ack(PVM + 2)).unwrap().ack, Some(SVM + 2));
        rewriter.handle_timeout(Instant::ZERO + LINGER * 4);
        assert_eq!(rewriter.flows.len(), 0);

        let mut rewriter = established();
        for flood in 0..MAX_FLOWS as u32 + 10 {
            let mut syn = Seg::syn(flood).port((flood % 60_000) as u16).inbound().frame();
            syn[29] = (flood / 60_000) as u8 + 20;
            let _ = rewriter.from_network(Instant::ZERO, &mut syn);
        }
        assert_eq!((rewriter.needed(), rewriter.flows.len() <= MAX_FLOWS), (1, true));
        assert_eq!(outbound(&mut rewriter, Seg::data(SVM + 1, b"x")).seq, PVM + 1);
    }

    #[test]
    fn held_frames_are_bounded() {
        let mut rewriter = Rewriter::new();
        inbound(&mut rewriter, Seg::syn(CLIENT_ISN)).unwrap();
        let big = Seg::data(CLIENT_ISN + 1, &[0; 1400]).ack(PVM + 1);
        (0..10_000).for_each(|_| assert!(inbound(&mut rewriter, big.clone()).is_none()));
        assert!(rewriter.held_bytes <= MAX_HELD_BYTES);
        rewriter.checkpoint();
        assert_eq!(rewriter.held_bytes, 0);
    }

    #[test]
    fn a_connection_of_the_guest_and_other_traffic_pass_untouched() {
        let mut rewriter = Rewriter::new();
        assert_eq!(outbound(&mut rewriter, Seg::syn(5)).control, TcpControl::Syn);
        assert_eq!(inbound(&mut rewriter, Seg::syn(9).ack(6)).unwrap().ack, Some(6));
        assert_eq!(outbound(&mut rewriter, Seg::data(6, b"x").ack(10)).seq, 6);
        let udp = crate::compare::testing::udp(1, b"x");
        let mut copy = udp.clone();
        rewriter.from_guest(Instant::ZERO, &mut copy);
        assert_eq!(copy, udp);
    }

    proptest! {
        #[test]
        fn any_pair_of_isns_round_trips(client: u32, pvm: u32, svm: u32, n in 0_u32..1 << 30, payload: Vec<u8>) {
            let mut rewriter = Rewriter::new();
            let next = client.wrapping_add(1);
            inbound(&mut rewriter, Seg::syn(client)).unwrap();
            outbound(&mut rewriter, Seg::syn(svm).ack(next));
            inbound(&mut rewriter, Seg::data(next, b"").ack(pvm.wrapping_add(1))).unwrap();
            let said = Seg::data(svm.wrapping_add(n), &payload).ack(next);
            prop_assert_eq!(outbound(&mut rewriter, said).seq, pvm.wrapping_add(n));
            let heard = Seg::data(next, &payload).ack(pvm.wrapping_add(n)).sack(pvm.wrapping_add(n), pvm);
            let heard = inbound(&mut rewriter, heard).unwrap();
            prop_assert_eq!((heard.ack, heard.sack), (Some(svm.wrapping_add(n)), Some((svm.wrapping_add(n), svm))));
            prop_assert_eq!(rewriter.needed(), usize::from(pvm != svm));
        }

        #[test]
        fn garbage_never_panics(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 0..20)) {
            let mut rewriter = Rewriter::new();
            let skeleton = Seg::data(1, b"payload").ack(2).sack(1, 2).frame();
            for (n, mut frame) in frames.into_iter().enumerate() {
                for (at, byte) in skeleton.iter().enumerate().take(47) {
                    if let Some(mine) = frame.get_mut(at) { *mine = *byte; }
                }
                if n % 2 == 0 { rewriter.from_guest(Instant::ZERO, &mut frame); }
                else { let _ = rewriter.from_network(Instant::ZERO, &mut frame); }
            }
        }
    }
}
