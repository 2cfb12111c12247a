//! The rules of the rewriter, one by one.

use super::flow::TIME_WAIT;
use super::frames::{Around, PLAIN, SYN_ACK, Said};
use super::*;
use crate::compare::testing::{Seg, fragments, in_ipv6, tagged};
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
    assert_eq!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"x").ack(PVM + 300)).unwrap().ack, Some(PVM + 300));
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
    rewriter.handle_timeout(Instant::ZERO + TIME_WAIT * 2);
    assert_eq!(rewriter.needed(), 1, "half closed is alive");
    outbound(&mut rewriter, Seg::data(SVM + 1, b"").ack(CLIENT_ISN + 2).fin());
    assert_eq!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 2, b"").ack(PVM + 2)).unwrap().ack, Some(SVM + 2));
    rewriter.handle_timeout(Instant::ZERO + TIME_WAIT * 4);
    assert_eq!(rewriter.flows.len(), 0);

    let mut rewriter = established();
    for flood in 0..Config::default().max_flows as u32 + 10 {
        let mut syn = Seg::syn(flood).port((flood % 60_000) as u16).inbound().frame();
        syn[29] = (flood / 60_000) as u8 + 20;
        let _ = rewriter.from_network(Instant::ZERO, &mut syn);
    }
    assert_eq!((rewriter.needed(), rewriter.flows.len() <= Config::default().max_flows), (1, true));
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
fn other_traffic_passes_untouched() {
    let mut rewriter = Rewriter::new();
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

fn seconds(n: u64) -> Instant {
    Instant::ZERO + Duration::from_secs(n)
}

/// What a segment with these options becomes, and whether it goes on now.
fn give(rewriter: &mut Rewriter, said: &Said) -> (Forward, Option<Segment>) {
    let mut frame = said.frame(&Around::default());
    let forward = if said.from_client {
        rewriter.from_network(Instant::ZERO, &mut frame)
    } else {
        rewriter.from_guest(Instant::ZERO, &mut frame);
        Forward::Now
    };
    (forward, Segment::read(&frame, 0))
}

fn ack_and_seq(rewriter: &mut Rewriter, from_client: bool, flags: u8, seq: u32, ack: u32) -> (u32, u32) {
    let (_, segment) = give(rewriter, &Said::new(from_client, flags, seq, ack));
    segment.map(|segment| (segment.tcp.seq, segment.tcp.ack)).unwrap()
}

#[test]
fn a_call_of_the_guest_is_translated_from_its_answer_on() {
    for answer in [SYN_ACK, Tcp::RST | Tcp::ACK] {
        let mut rewriter = Rewriter::new();
        assert_eq!(ack_and_seq(&mut rewriter, false, Tcp::SYN, SVM, 0).0, SVM);
        assert_eq!(ack_and_seq(&mut rewriter, false, Tcp::SYN, SVM, 0).0, SVM, "said again");
        // A challenge that belongs to an older life answers nothing.
        assert_eq!(ack_and_seq(&mut rewriter, true, PLAIN, 3, 4), (3, 4));
        assert_eq!(ack_and_seq(&mut rewriter, true, answer, 7, PVM + 1), (7, SVM + 1), "{answer}");
        assert_eq!(ack_and_seq(&mut rewriter, true, answer, 7, PVM + 1), (7, SVM + 1), "the same again");
        assert_eq!(ack_and_seq(&mut rewriter, false, PLAIN, SVM + 1, 8), (PVM + 1, 8));
        assert_eq!(ack_and_seq(&mut rewriter, false, Tcp::SYN, SVM, 0).0, PVM, "a SYN whose ISN is known by now");
        assert_eq!(ack_and_seq(&mut rewriter, false, Tcp::SYN, 55, 0).0, 55, "another life");
        assert_eq!((rewriter.needed(), rewriter.flows.len()), (0, 1));
    }
}

#[test]
fn both_may_call_at_once() {
    let mut rewriter = Rewriter::new();
    ack_and_seq(&mut rewriter, false, Tcp::SYN, SVM, 0);
    assert_eq!(ack_and_seq(&mut rewriter, true, Tcp::SYN, CLIENT_ISN, 0).0, CLIENT_ISN);
    assert_eq!(ack_and_seq(&mut rewriter, false, SYN_ACK, SVM, CLIENT_ISN + 1).0, SVM);
    assert_eq!(ack_and_seq(&mut rewriter, true, SYN_ACK, CLIENT_ISN, PVM + 1).1, SVM + 1);
    assert_eq!(ack_and_seq(&mut rewriter, false, PLAIN, SVM + 1, CLIENT_ISN + 1).0, PVM + 1);
}

#[test]
fn a_call_that_a_takeover_interrupts_is_translated_if_its_answer_is_guest_a_s() {
    for (answered, isn) in [(PVM, PVM), (SVM, SVM)] {
        let mut rewriter = Rewriter::new();
        ack_and_seq(&mut rewriter, false, Tcp::SYN, SVM, 0);
        rewriter.takeover();
        ack_and_seq(&mut rewriter, false, Tcp::SYN, SVM, 0);
        assert_eq!(ack_and_seq(&mut rewriter, true, SYN_ACK, 7, answered.wrapping_add(1)).1, SVM + 1);
        assert_eq!(ack_and_seq(&mut rewriter, false, PLAIN, SVM + 1, 8).0, isn.wrapping_add(1));
        rewriter.handle_timeout(seconds(2));
        assert_eq!(rewriter.is_done(), isn == SVM);
    }
}

#[test]
fn data_in_a_syn_may_be_acknowledged_or_not() {
    for acked in [0, 3, 5] {
        let mut rewriter = Rewriter::new();
        inbound(&mut rewriter, Seg { payload: b"early".to_vec(), ..Seg::syn(CLIENT_ISN) }).unwrap();
        outbound(&mut rewriter, Seg::syn(SVM).ack(CLIENT_ISN + 1 + acked));
        let ack = inbound(&mut rewriter, Seg::data(CLIENT_ISN + 6, b"").ack(PVM + 1)).unwrap();
        assert_eq!(ack.ack, Some(SVM + 1), "{acked}");
    }
}

#[test]
fn guest_b_decides_which_syn_has_begun_a_life() {
    let mut rewriter = Rewriter::new();
    inbound(&mut rewriter, Seg::syn(CLIENT_ISN)).unwrap();
    outbound(&mut rewriter, syn_ack(SVM));
    inbound(&mut rewriter, Seg::syn(CLIENT_ISN + 0x3000_0000)).unwrap();
    let ack = inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"").ack(PVM + 1)).unwrap();
    assert_eq!(ack.ack, Some(SVM + 1), "a forged SYN comes too late");
    // Guest B answers a SYN that was not seen: the older life is over, and nothing of it is left.
    let other = Seg::syn(99).ack(CLIENT_ISN + 0x4000_0001);
    assert_eq!(outbound(&mut rewriter, other).seq, 99);
    assert_eq!(rewriter.needed(), 0);
    assert_eq!(inbound(&mut rewriter, Seg::data(CLIENT_ISN + 0x4000_0001, b"").ack(501)).unwrap().ack, Some(100));
}

#[test]
fn only_a_reset_the_guest_can_believe_ends_a_connection() {
    let hour = Instant::ZERO + Duration::from_secs(3600);
    for (seq, guest_goes_on, alive) in [
        (CLIENT_ISN + 1, false, false),
        (CLIENT_ISN + 60_000, false, false),
        (CLIENT_ISN, false, true),
        (CLIENT_ISN + 70_000, false, true),
        (CLIENT_ISN + 1, true, true),
    ] {
        let mut rewriter = established();
        outbound(&mut rewriter, Seg::data(SVM + 1, b"hello").ack(CLIENT_ISN + 1));
        inbound(&mut rewriter, Seg::rst(seq)).unwrap();
        if guest_goes_on {
            outbound(&mut rewriter, Seg::data(SVM + 1, b"").ack(CLIENT_ISN + 1));
        }
        rewriter.handle_timeout(hour);
        assert_eq!(rewriter.needed() == 1, alive, "{seq} {guest_goes_on}");
    }
    let mut rewriter = established();
    assert_eq!(outbound(&mut rewriter, Seg::rst(SVM + 1)).seq, PVM + 1);
    rewriter.handle_timeout(hour);
    assert_eq!(rewriter.needed(), 0, "the guest's own is its own");
}

#[test]
fn a_fin_that_the_guest_has_passed_is_no_end() {
    let mut rewriter = established();
    outbound(&mut rewriter, Seg::data(SVM + 1, b"").ack(CLIENT_ISN + 9).fin());
    inbound(&mut rewriter, Seg::data(CLIENT_ISN + 4, b"").ack(PVM + 2).fin()).unwrap();
    rewriter.handle_timeout(Instant::ZERO + TIME_WAIT * 100);
    assert_eq!(rewriter.needed(), 1);
}

#[test]
fn a_silent_connection_is_kept_for_as_long_as_it_was_said() {
    let idle_timeout = Duration::from_secs(7200);
    for (fins, kept_s) in [(0, 7200), (1, 7200), (2, 240)] {
        let mut rewriter = established();
        rewriter.config.idle_timeout = idle_timeout;
        if fins > 0 {
            inbound(&mut rewriter, Seg::data(CLIENT_ISN + 1, b"").ack(PVM + 1).fin()).unwrap();
        }
        if fins > 1 {
            outbound(&mut rewriter, Seg::data(SVM + 1, b"").ack(CLIENT_ISN + 1).fin());
        }
        rewriter.takeover();
        rewriter.handle_timeout(seconds(kept_s - 1));
        assert_eq!((rewriter.needed(), rewriter.is_done()), (1, false), "{fins}");
        rewriter.handle_timeout(seconds(kept_s));
        assert_eq!((rewriter.needed(), rewriter.is_done()), (0, true), "{fins}");
    }
}

#[test]
fn a_full_table_forgets_the_longest_silent_and_then_takes_no_more() {
    let mut rewriter = Rewriter::with(Config { max_flows: 3, ..Config::default() });
    let syn = |rewriter: &mut Rewriter, port, at| {
        let mut frame = Seg::syn(1).port(port).inbound().frame();
        (rewriter.from_network(seconds(at), &mut frame), frame.is_empty())
    };
    for (port, at) in [(1, 3), (2, 1), (3, 2), (4, 4)] {
        assert_eq!(syn(&mut rewriter, port, at), (Forward::Now, false));
    }
    let ports = |rewriter: &Rewriter| rewriter.flows.keys().map(|key| key.dst_port).collect::<Vec<_>>();
    assert_eq!(ports(&rewriter), [1, 3, 4]);
    for port in [1, 3, 4] {
        outbound(&mut rewriter, Seg::syn(9).ack(2).port(port));
        inbound(&mut rewriter, Seg::data(2, b"").ack(PVM).port(port)).unwrap();
    }
    assert_eq!(syn(&mut rewriter, 5, 9), (Forward::Held, true), "guest B says nothing that would not be translated");
    assert_eq!((ports(&rewriter), rewriter.untracked(), rewriter.poll_output()), (vec![1, 3, 4], 1, None));
    assert!(inbound(&mut rewriter, Seg::data(2, b"x").ack(7).port(6)).is_some(), "it may be one that guest B loaded");
    rewriter.takeover();
    assert_eq!(syn(&mut rewriter, 5, 9), (Forward::Now, false));
}

#[test]
fn a_first_fragment_is_moved_and_the_others_have_nothing_to_move() {
    let around = Around { v6: false, ..Around::default() };
    let mut rewriter = established();
    let said = Said { payload: vec![5; 40], ..Said::new(false, PLAIN, SVM + 1, CLIENT_ISN + 1) };
    let wanted = Said { seq: PVM + 1, ..said.clone() }.frame(&around);
    for (cuts, moved) in [(&[24, 40][..], true), (&[16], false)] {
        let parts = fragments(&said.frame(&around), 3, cuts);
        let wanted = fragments(if moved { &wanted } else { &parts[0] }, 3, if moved { cuts } else { &[] });
        for (n, part) in parts.iter().enumerate() {
            let mut frame = part.clone();
            rewriter.from_guest(Instant::ZERO, &mut frame);
            assert_eq!(&frame, if n == 0 && moved { &wanted[0] } else { part }, "{cuts:?} {n}");
        }
    }
}

#[test]
fn clocks_are_moved_to_the_tick_and_go_back_for_nobody() {
    const A: u32 = 500;
    const B: u32 = 4_294_967_000;
    let clocks = |rewriter: &mut Rewriter, from_client: bool, clocks: (u32, u32)| {
        let (seq, ack) = if from_client { (CLIENT_ISN + 1, PVM + 1) } else { (SVM + 1, CLIENT_ISN + 1) };
        let said = Said { clocks: Some(clocks), ..Said::new(from_client, PLAIN, seq, ack) };
        give(rewriter, &said).1.and_then(|segment| segment.timestamps).unwrap()
    };
    let mut rewriter = Rewriter::new();
    give(&mut rewriter, &Said { clocks: Some((70, 0)), ..Said::new(true, Tcp::SYN, CLIENT_ISN, 0) });
    give(&mut rewriter, &Said { clocks: Some((B, 70)), ..Said::new(false, SYN_ACK, SVM, CLIENT_ISN + 1) });
    // A SYN cookie lies in the low bits of this very number.
    assert_eq!(clocks(&mut rewriter, true, (71, A)), (71, B));
    assert_eq!(clocks(&mut rewriter, false, (B.wrapping_add(40), 71)), (A + 40, 71));
    assert_eq!(clocks(&mut rewriter, true, (72, A + 30)), (72, B + 30));
    assert_eq!(clocks(&mut rewriter, true, (73, A + 90)), (73, B.wrapping_add(40)), "guest B has not named it yet");
    assert_eq!(clocks(&mut rewriter, false, (B.wrapping_add(50), 73)), (A + 90, 73), "the client has seen it");
    assert_eq!(clocks(&mut rewriter, false, (B.wrapping_add(95), 73)), (A + 95, 73));
    // A forged echo stops no clock.
    clocks(&mut rewriter, true, (74, A + (1 << 23)));
    assert_eq!(clocks(&mut rewriter, false, (B.wrapping_add(99), 74)), (A + 99, 74));
}

#[test]
fn a_loaded_connections_clock_does_not_go_back_either() {
    let said = |from_client: bool, clock: u32, echo: u32| Said {
        clocks: Some((clock, echo)),
        ..Said::new(from_client, PLAIN, 5, 6)
    };
    let mut rewriter = Rewriter::new();
    give(&mut rewriter, &said(true, 1, 1000));
    rewriter.takeover();
    for (at, clock, shown) in [(2, 900, 1000), (4, 990, 1000), (6, 1001, 1001)] {
        let (_, segment) = give(&mut rewriter, &said(false, clock, 1));
        assert_eq!(segment.unwrap().timestamps, Some((shown, 1)));
        rewriter.handle_timeout(seconds(at));
    }
    assert!(rewriter.is_done());
}

#[test]
fn clocks_of_one_side_only_are_left_alone() {
    let mut rewriter = Rewriter::new();
    give(&mut rewriter, &Said::new(true, Tcp::SYN, CLIENT_ISN, 0));
    give(&mut rewriter, &Said { clocks: Some((90, 0)), ..Said::new(false, SYN_ACK, SVM, CLIENT_ISN + 1) });
    give(&mut rewriter, &Said::new(true, PLAIN, CLIENT_ISN + 1, PVM + 1));
    let said = Said { clocks: Some((95, 3)), ..Said::new(false, PLAIN, SVM + 1, CLIENT_ISN + 1) };
    let (_, segment) = give(&mut rewriter, &said);
    assert_eq!(segment.map(|segment| (segment.tcp.seq, segment.timestamps)), Some((PVM + 1, Some((95, 3)))));
}

/// Two guests later: the client has the first one's numbers still.
#[test]
fn a_survivors_connections_are_told_to_its_next_host() {
    let mut first = established();
    first.takeover();
    let carried = first.carried();
    assert_eq!(carried.len(), 1);
    let encoded: Vec<_> = carried.iter().map(crate::carried::Carried::encode).collect();
    let decoded: Vec<_> = encoded.iter().map(|bytes| crate::carried::Carried::decode(bytes).unwrap()).collect();
    assert_eq!(decoded, carried);

    // The secondary's guest has loaded it in the primary's numbers, and says something before the takeover.
    let mut second = Rewriter::new();
    let said = outbound(&mut second, Seg::data(SVM + 1, b"hello").ack(CLIENT_ISN + 1));
    assert_eq!(said.seq, SVM + 1, "as the comparator knows it");
    assert_eq!(second.unknown(&carried), carried);
    second.takeover();
    second.take_up(Instant::ZERO, &carried);
    for rewriter in [&mut first, &mut second] {
        let reply = outbound(rewriter, Seg::data(SVM + 1, b"hello").ack(CLIENT_ISN + 1));
        assert_eq!(reply.seq, PVM + 1);
        assert_eq!(inbound(rewriter, Seg::data(CLIENT_ISN + 1, b"x").ack(PVM + 6)).unwrap().ack, Some(SVM + 6));
    }
    assert_eq!(second.carried(), first.carried(), "and so on");
}

#[test]
fn another_connection_with_the_same_addresses_is_not_taken_for_it() {
    let mut first = established();
    first.takeover();
    let carried = first.carried();
    let mut second = established();
    assert_eq!(second.unknown(&carried), []);
    second.takeover();
    assert_eq!(outbound(&mut second, Seg::data(SVM + 1, b"hello").ack(CLIENT_ISN + 1)).seq, PVM + 1, "once");
    // On the first host it ends, and begins anew: nobody is told any more.
    let fin = outbound(&mut first, Seg::data(SVM + 1, b"").fin().ack(CLIENT_ISN + 1));
    assert_eq!(fin.seq, PVM + 1);
    inbound(&mut first, Seg::data(CLIENT_ISN + 1, b"").fin().ack(PVM + 2)).unwrap();
    assert_eq!(first.carried().len(), 1, "the guest has not acknowledged the client's");
    outbound(&mut first, Seg::data(SVM + 2, b"").ack(CLIENT_ISN + 2));
    assert_eq!(first.carried(), []);
    inbound(&mut first, Seg::syn(CLIENT_ISN + 500_000)).unwrap();
    outbound(&mut first, Seg::syn(SVM + 99).ack(CLIENT_ISN + 500_001));
    inbound(&mut first, Seg::data(CLIENT_ISN + 500_001, b"").ack(SVM + 100)).unwrap();
    assert_eq!(outbound(&mut first, Seg::data(SVM + 100, b"a").ack(CLIENT_ISN + 500_001)).seq, SVM + 100);
    assert_eq!(first.carried(), []);
}
