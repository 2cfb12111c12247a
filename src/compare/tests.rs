//! The comparator's traces: a line in, what leaves. Each test of a defect names the QEMU rule it shows absent.

use super::testing::{CLIENT, GUEST, Seg, Trace, arp, icmp_echo_reply, udp};
use super::*;
use crate::clock::Instant;
use crate::mutant::{Mutant, plant};
use bytes::Bytes;
use proptest::prelude::*;

#[test]
fn equal_bytes_leave_however_they_were_cut() {
    let mut t = Trace::new();
    assert_eq!(t.p(0, Seg::data(100, b"hello ")), 0);
    assert_eq!(t.s(0, Seg::data(100, b"hel")), 0);
    assert_eq!(t.s(0, Seg::data(103, b"lo world")), 1);
    assert_eq!(t.p(0, Seg::data(106, b"wo")), 1);
    assert_eq!(t.p(0, Seg::data(108, b"rld")), 1);
    assert_eq!(t.p(0, Seg::data(100, b"hello world")), 1, "a retransmission, merged");
    assert_eq!(t.comparator.stats().currently_secondary_bytes, 0);
    assert_eq!(t.asked, []);
}

#[test]
fn equal_bytes_at_another_position_do_not_count() {
    // 4.6 rules b and c never check the start.
    let mut t = Trace::new();
    assert_eq!(t.s(0, Seg::data(500, b"hello")), 0);
    assert_eq!(t.p(0, Seg::data(100, b"hello")), 0);
    assert_eq!(t.s(0, Seg::data(100, b"hello")), 1);
}

#[test]
fn a_different_byte_is_said_at_once_and_once() {
    let mut t = Trace::new();
    t.s(0, Seg::data(100, b"hellO"));
    assert_eq!(t.p(0, Seg::data(100, b"hello")), 0);
    // 4.9: QEMU repeats itself for every further packet.
    (0..5).for_each(|_| assert_eq!(t.p(0, Seg::data(105, b"more")) + t.s(0, Seg::data(105, b"more")), 0));
    assert_eq!(t.wait(60_000), 0);
    assert_eq!(t.asked, [(0, Cause::PayloadDiffers)]);
    assert_eq!((t.checkpoint(0).len(), t.comparator.stats().currently_held_bytes), (6, 0));
}

#[test]
fn an_empty_ack_waits_for_guest_b_to_have_the_data_too() {
    // 4.6 rule 3 sends it: the client forgets the data, guest B never gets it.
    let mut t = Trace::new();
    t.s(0, Seg::pure_ack(1000));
    assert_eq!(t.p(0, Seg::pure_ack(1000)), 1);
    assert_eq!(t.p(0, Seg::pure_ack(1500)), 0);
    assert_eq!(t.s(0, Seg::pure_ack(1400)), 0);
    assert_eq!(t.s(0, Seg::pure_ack(1600)), 1);
    assert_eq!(t.p(0, Seg::pure_ack(1550)), 1);
    assert_eq!(t.asked, [], "an ACK that is late is waited for (4.6 rule b calls it a mismatch)");
}

#[test]
fn acknowledgements_and_sequence_numbers_wrap() {
    // 4.4 takes the unsigned maximum, 4.6 the unsigned minimum.
    let mut t = Trace::new();
    t.s(0, Seg::data(u32::MAX - 2, b"abcdef").ack(u32::MAX - 5));
    assert_eq!(t.p(0, Seg::data(u32::MAX - 2, b"abcd").ack(5)), 0);
    assert_eq!(t.s(0, Seg::pure_ack(10)), 1);
    assert_eq!(t.p(0, Seg::data(1, b"ef").ack(u32::MAX)), 1);
    assert_eq!(t.s(0, Seg::data(3, b"g").ack(10)) + t.p(0, Seg::data(3, b"g").ack(10)), 1);
}

#[test]
fn padding_is_not_payload() {
    // 4.4 counts the frame.
    let mut t = Trace::new();
    let mut padded = Seg::data(100, b"a").frame();
    padded.resize(60, 0);
    t.s(0, Seg::data(100, b"ab"));
    assert_eq!(t.p_raw(0, padded), 1);
    assert_eq!(t.p(0, Seg::data(101, b"b")), 1);
}

#[test]
fn handshakes_are_compared_by_flag_and_both_guests_must_make_them() {
    let mut t = Trace::new();
    assert_eq!(t.p(0, Seg::syn(7000).ack(51)), 0);
    assert_eq!(t.p(0, Seg::data(7001, b"banner").ack(51)), 0);
    assert_eq!(t.s(0, Seg::syn(999_999).ack(51)), 1);
    assert_eq!(t.s(0, Seg::data(7001, b"banner").ack(51)), 1);
    assert_eq!(t.p(0, Seg::syn(7000).ack(51)), 1, "retransmitted");
}

#[test]
fn fin_and_rst_of_one_guest_are_seen() {
    // 4.6: a RST or FIN sent by only one guest is never detected.
    let mut t = Trace::new();
    t.s(0, Seg::data(100, b"x"));
    assert_eq!(t.p(0, Seg::data(100, b"x").fin()), 0);
    assert_eq!(t.wait(2999) + t.asked.len(), 0);
    t.wait(1);
    assert_eq!(t.asked, [(0, Cause::Aged)]);
    assert_eq!(t.checkpoint(0).len(), 1);
    assert_eq!(t.p(1, Seg::data(100, b"x").fin()), 1, "what the checkpoint showed is no news");

    let mut t = Trace::new();
    t.s(0, Seg::data(100, b"xy").fin());
    assert_eq!(t.p(0, Seg::data(100, b"x").fin()), 0);
    assert_eq!(t.asked, [(0, Cause::PayloadDiffers)], "the stream of guest B ends elsewhere");

    let mut t = Trace::new();
    t.s(0, Seg::pure_ack(5));
    assert_eq!(t.p(0, Seg::rst(1)), 0);
    assert_eq!(t.s(0, Seg::rst(1)), 1);
}

#[test]
fn a_hole_is_not_already_compared() {
    // 4.6 step 4: anything that ends below compare_seq is sent.
    let mut t = Trace::new();
    t.s(0, Seg::data(100, b"aabbcc"));
    assert_eq!(t.p(0, Seg::data(100, b"aa")), 1);
    assert_eq!(t.s(0, Seg::data(104, b"cc")), 0);
    let mut lossy = Trace::new();
    lossy.s(0, Seg::data(100, b"aa"));
    lossy.s(0, Seg::data(104, b"cc"));
    assert_eq!(lossy.p(0, Seg::data(100, b"aa")), 1);
    assert_eq!(lossy.p(0, Seg::data(104, b"cc")), 1);
    assert_eq!(lossy.p(0, Seg::data(102, b"bb")), 0);
    lossy.s(0, Seg::data(102, b"bX"));
    assert_eq!(lossy.asked, [(0, Cause::PayloadDiffers)]);
}

#[test]
fn what_guest_b_acknowledged_dies_with_its_epoch() {
    // 4.9: compare_seq, pack and sack survive a flush.
    let mut t = Trace::new();
    t.p(0, Seg::pure_ack(100));
    t.s(0, Seg::data(7, b"future").ack(900));
    t.checkpoint(0);
    assert_eq!(t.p(1, Seg::pure_ack(100)), 1, "guest A had said it");
    assert_eq!(t.p(1, Seg::pure_ack(900)), 0, "only the guest B that is gone had");
    assert_eq!(t.s(1, Seg::pure_ack(900)), 1);
    assert_eq!(t.p(1, Seg::data(7, b"future").ack(900)), 0);
}

#[test]
fn the_baseline_after_a_checkpoint_is_all_that_was_shown_and_no_more() {
    let mut t = Trace::new();
    t.p(0, Seg::data(100, b"0123456789"));
    assert_eq!(t.checkpoint(0).len(), 1);
    assert_eq!(t.p(1, Seg::data(104, b"4567")), 1);
    assert_eq!(t.p(1, Seg::data(108, b"89ab")), 0, "two bytes are new");
    assert_eq!(t.s(1, Seg::data(110, b"ab").ack(0)), 1);
    assert_eq!(t.p(1, Seg::data(98, b"yz01")), 0, "nor was this ever shown");
}

#[test]
fn a_syn_resent_after_a_checkpoint_is_the_same_life() {
    let mut t = Trace::new();
    t.p(0, Seg::syn(7000).ack(51));
    assert_eq!(t.checkpoint(0).len(), 1);
    t.s(1, Seg::syn(7000).ack(51));
    assert_eq!(t.p(1, Seg::syn(7000).ack(51)), 1);
    t.s(1, Seg::data(7001, b"hi").ack(51));
    assert_eq!(t.p(1, Seg::data(7001, b"hi").ack(51)), 1);
}

#[test]
fn a_reused_port_inherits_nothing() {
    let mut t = Trace::new();
    t.p(0, Seg::data(9000, b"old life").ack(500));
    t.checkpoint(0);
    assert_eq!(t.p(1, Seg::syn(8990).ack(51)), 0);
    assert_eq!(t.p(1, Seg::data(9000, b"old life").ack(51)), 0, "old bytes in a new life");
    t.s(1, Seg::syn(1).ack(51));
    assert_eq!(t.s(1, Seg::data(9000, b"old life").ack(51)), 1);
    assert_eq!(t.asked, []);
    assert_eq!(t.p(1, Seg::syn(1 << 31).ack(51)), 0, "a third life in one epoch cannot be told apart");
    assert_eq!(t.asked, [(1, Cause::Reused)]);
    assert_eq!(t.p(1, Seg::data(9008, b"held").ack(51)), 0);
    assert_eq!(t.checkpoint(1).len(), 2);
}

#[test]
fn a_whole_connection_through_rewriter_and_comparator() {
    let (client, pvm, svm) = (51, 7000, 4_000_000_000);
    let (mut t, mut rewriter) = (Trace::new(), Rewriter::new());
    let to_b = |rewriter: &mut Rewriter, segment: Seg| {
        let mut frame = segment.inbound().frame();
        assert_eq!(rewriter.from_network(Instant::ZERO, &mut frame), rewriter::Forward::Now);
        Seg::read(&frame)
    };
    let from_b = |rewriter: &mut Rewriter, segment: Seg| {
        let mut frame = segment.frame();
        rewriter.from_guest(Instant::ZERO, &mut frame);
        frame
    };
    to_b(&mut rewriter, Seg::syn(client));
    t.p(0, Seg::syn(pvm).ack(client + 1));
    assert_eq!(t.s_raw(0, from_b(&mut rewriter, Seg::syn(svm).ack(client + 1))), 1);
    let request = to_b(&mut rewriter, Seg::data(client + 1, b"GET").ack(pvm + 1));
    assert_eq!(request.ack, Some(svm + 1));
    t.p(0, Seg::data(pvm + 1, b"200 OK").ack(client + 4));
    assert_eq!(t.s_raw(0, from_b(&mut rewriter, Seg::data(svm + 1, b"200 OK").ack(client + 4))), 1);
    // A checkpoint: guest B is guest A now, with its numbers.
    rewriter.checkpoint();
    t.checkpoint(0);
    assert_eq!(to_b(&mut rewriter, Seg::data(client + 4, b"").ack(pvm + 7).fin()).ack, Some(pvm + 7));
    t.p(1, Seg::data(pvm + 7, b"").ack(client + 5).fin());
    assert_eq!(t.s_raw(1, from_b(&mut rewriter, Seg::data(pvm + 7, b"").ack(client + 5).fin())), 1);
    assert_eq!((t.asked, t.comparator.stats().compared), (vec![], 3));
}

#[test]
fn the_fence_keeps_a_dead_guests_frames_out() {
    let run = || {
        let mut t = Trace::new();
        t.checkpoint(0);
        let stale = t.s(0, Seg::data(100, b"reply")); // still in flight when epoch 0 ended
        t.p(1, Seg::data(100, b"reply")) + stale
    };
    assert_eq!(run(), 0);
    plant(Some(Mutant::NoFence));
    let leaked = run();
    plant(None);
    assert_eq!(leaked, 1, "the mutant lets an unexplained reply leave");
}

#[test]
fn frames_of_an_epoch_wait_for_its_turn_and_age_from_there() {
    let mut t = Trace::new();
    t.s(1, Seg::data(100, b"a"));
    assert_eq!(t.p(1, Seg::data(100, b"a")), 0, "the checkpoint between is not owned yet");
    assert_eq!(t.p(2, Seg::data(101, b"b")), 0);
    assert_eq!(t.wait(10_000), 0);
    assert_eq!(t.checkpoint(0).len(), 1);
    assert_eq!(t.checkpoint(1).len(), 0);
    assert_eq!(t.wait(2999) + t.asked.len(), 0);
    t.wait(1);
    assert_eq!(t.asked, [(2, Cause::Aged)]);
    assert_eq!(t.comparator.poll_timeout(), None, "an answer is awaited");
    assert_eq!(t.checkpoint(2).len(), 1);
    assert_eq!(t.p(1, Seg::data(500, b"late")), 1, "its checkpoint is owned");
    t.s(0, Seg::data(1, b"z"));
    assert_eq!(t.comparator.stats().dropped_stale, 1);
}

#[test]
fn what_only_guest_b_said_ages_too() {
    let mut t = Trace::new();
    t.s(0, Seg::data(100, b"alone"));
    t.wait(3000);
    assert_eq!(t.asked, [(0, Cause::OneSided)]);
}

#[test]
fn a_checkpoint_releases_in_arrival_order_across_connections() {
    // 4.9: QEMU goes connection by connection.
    let mut t = Trace::new();
    let frames: Vec<_> = (0..9).map(|n| Seg::data(n, b"x").port(40_000 + (n % 3) as u16).bytes()).collect();
    frames.iter().for_each(|frame| assert_eq!(t.p_raw(0, frame.clone()), 0));
    assert_eq!(t.checkpoint(0), frames);
}

#[test]
fn datagrams_are_matched_whole_and_leave_in_order() {
    let mut t = Trace::new();
    for n in 1..=3_u8 {
        assert_eq!(t.p_raw(0, udp(53, &[n])), 0);
    }
    let left: Vec<_> = [1, 3, 2].map(|n| t.s_raw(0, udp(53, &[n]))).into();
    assert_eq!(left, [1, 0, 2], "in guest A's order");
    // 4.7: a late partner with another one queued is waited for.
    t.s_raw(0, udp(53, b"b"));
    t.s_raw(0, udp(53, b"a"));
    assert_eq!(t.p_raw(0, udp(53, b"b")) + t.p_raw(0, udp(53, b"a")), 2);
    assert_eq!(t.asked, []);
    t.p_raw(0, udp(53, b"x"));
    t.s_raw(0, udp(53, b"y"));
    assert_eq!(t.asked, [(0, Cause::PayloadDiffers)]);
}

#[test]
fn pings_of_two_peers_do_not_meet() {
    // 4.3: all ICMP of a NIC is one connection.
    let mut t = Trace::new();
    t.p_raw(0, icmp_echo_reply(1, b"one"));
    assert_eq!(t.s_raw(0, icmp_echo_reply(2, b"two")), 0);
    assert_eq!(t.asked, []);
    assert_eq!(t.s_raw(0, icmp_echo_reply(1, b"one")) + t.p_raw(0, icmp_echo_reply(2, b"two")), 2);
}

#[test]
fn what_cannot_be_compared_waits_for_a_checkpoint() {
    // 4.2 and 0.2: QEMU sends IPv6, VLAN and malformed frames at once, and reads ports from fragments.
    let good = Seg::data(1, b"payload").frame();
    let with = |at: usize, value: u8| {
        let mut frame = good.clone();
        frame[at] = value;
        frame
    };
    for frame in [with(12, 0x88), with(12, 0x86), with(20, 0x20), with(14, 0x44), with(46, 0xf0), vec![]] {
        let mut t = Trace::new();
        assert_eq!(t.s_raw(0, frame.clone()) + t.p_raw(0, frame.clone()), 0);
        assert!(matches!(t.asked[..], [(0, Cause::Unparsable(_))]), "{:?}", t.asked);
        assert_eq!(t.checkpoint(0), [frame]);
    }
    let mut t = Trace::new();
    let arp = arp(1, GUEST, CLIENT);
    assert_eq!((t.s_raw(0, arp.clone()), t.p_raw(0, arp)), (0, 1), "identity is configuration");
}

#[test]
fn a_flood_of_flows_stays_inside_the_bounds_and_loses_nothing() {
    // 0.2: 16,385 flows wipe QEMU's table and every withheld frame.
    let config = Config { max_flows: 1000, max_queue_bytes: 4 << 20, ..Config::default() };
    let mut t = Trace::with(config);
    let mut sent = 0_u64;
    let mut frame = Seg::syn(1).ack(1).frame();
    for flow in 0..100_000_u32 {
        frame[32..36].copy_from_slice(&flow.to_be_bytes());
        t.s_raw(0, udp(flow as u16, b"spare"));
        if t.comparator.ready() {
            t.p_raw(0, frame.clone());
            sent += 1;
        }
        let stats = t.comparator.stats();
        assert!(stats.flows <= 1000 && stats.currently_held_bytes <= config.max_queue_bytes + 2000);
        assert!(stats.currently_secondary_bytes <= config.max_queue_bytes);
    }
    assert_eq!(t.asked, [(0, Cause::BoundReached)]);
    assert_eq!(t.checkpoint(0).len() as u64, sent);
    assert!(t.comparator.ready());
    assert_eq!(t.p_raw(1, udp(1, b"room")) + t.s_raw(1, udp(1, b"room")), 1);
}

#[test]
fn one_flow_cannot_take_all_the_room() {
    let mut t = Trace::with(Config { max_flow_bytes: 20_000, ..Config::default() });
    for n in 0..100 {
        t.s(0, Seg::data(n * 1000, &[1; 1000]));
    }
    assert!(t.comparator.stats().currently_secondary_bytes <= 20_000 && t.comparator.stats().dropped_bound > 0);
    assert_eq!(t.asked, [(0, Cause::BoundReached)]);
}

/// Two guests that send one stream, cut and repeated differently, with checkpoints between, judged by a model that
/// knows what guest B's present state explains. Guest B's new bytes of an epoch may differ from guest A's.
fn lockstep(ops: &[(u8, u8)], may_differ: bool) -> Result<(), String> {
    const ISN: u32 = u32::MAX - 40;
    let mut t = Trace::new();
    let byte = |at: usize, variant: u8| (at as u8).wrapping_mul(7) ^ variant;
    // A stream is the bytes produced so far; the acknowledgement a count of client bytes.
    let (mut a, mut b): ((Vec<u8>, u32), (Vec<u8>, u32)) = ((vec![], 0), (vec![], 0));
    let (mut epoch, mut variant) = (0_u64, [0_u8; 2]);
    let mut said_by_b = 0..0; // sent in this epoch: a SACK-less, gapless stretch
    let mut ack_of_b = 0; // what guest B's state has told or inherited
    let mut in_flight: Vec<(u64, Bytes)> = vec![];
    let mut emitted: Vec<(u64, Bytes)> = vec![];
    let mut released = 0;
    let mut captured: Option<(Vec<u8>, u32)> = None;
    for &(op, arg) in ops {
        let len = usize::from(arg % 13);
        match op % 8 {
            0 | 1 => {
                // Guest A sends: new bytes, or some it sent before.
                let from = if op % 16 < 8 { a.0.len() } else { a.0.len() - a.0.len().min(usize::from(arg) / 2) };
                while a.0.len() < from + len {
                    a.0.push(byte(a.0.len(), variant[0]));
                }
                let tag = epoch + u64::from(captured.is_some());
                let frame = Seg::data(ISN.wrapping_add(from as u32), &a.0[from..from + len]).ack(a.1).bytes();
                emitted.push((tag, frame.clone()));
                t.comparator.handle_primary(t.now, tag, frame);
            }
            2 | 3 if captured.is_none() || op >= 128 => {
                let from = if op % 16 < 8 { b.0.len() } else { b.0.len() - b.0.len().min(usize::from(arg) / 2) };
                while b.0.len() < from + len {
                    b.0.push(byte(b.0.len(), variant[1]));
                }
                said_by_b.end = b.0.len();
                ack_of_b = b.1;
                let frame = Seg::data(ISN.wrapping_add(from as u32), &b.0[from..from + len]).ack(b.1).bytes();
                in_flight.push((epoch, frame));
            }
            4 => a.1 += u32::from(arg % 5),
            5 => b.1 = if may_differ { b.1 + u32::from(arg % 5) } else { a.1 },
            6 if !in_flight.is_empty() => {
                // The link may reorder; frames of dead states may arrive late.
                let (tag, frame) = in_flight.remove(usize::from(arg) % in_flight.len());
                t.comparator.handle_secondary(t.now, tag, frame);
            }
            7 if captured.is_none() => {
                captured = Some(a.clone());
                if may_differ {
                    variant[0] = arg & 1;
                }
            }
            7 => {
                let Some(state) = captured.take() else { continue };
                (ack_of_b, b) = (state.1, state);
                said_by_b = b.0.len()..b.0.len();
                variant[1] = if may_differ { arg & 1 } else { variant[0] };
                t.comparator.checkpoint(t.now, epoch);
                epoch += 1;
            }
            _ => {}
        }
        for frame in t.out() {
            let Some(found) = emitted.iter().position(|(_, sent)| *sent == frame) else {
                return Err("invented".into());
            };
            let (tag, _) = emitted.remove(found);
            released += 1;
            let segment = Seg::read(&frame);
            let from = segment.seq.wrapping_sub(ISN) as usize;
            // What guest B would go on from: the state it loaded, and what it has produced since.
            let explained = b.0.get(from..from + segment.payload.len()) == Some(&segment.payload[..]);
            if !explained || segment.ack.unwrap_or(0) > ack_of_b {
                return Err(format!("epoch {tag} in {epoch}: a frame at {from} left that guest B cannot explain"));
            }
        }
    }
    if !may_differ && !t.asked.is_empty() {
        return Err(format!("asked for nothing: {:?}", t.asked));
    }
    // Guest B catches up: everything leaves without a checkpoint; or the checkpoint lets the rest go.
    if !may_differ && captured.is_none() {
        while b.0.len() < a.0.len() {
            b.0.push(a.0[b.0.len()]);
        }
        for at in (said_by_b.start.min(a.0.len())..b.0.len()).step_by(5) {
            let end = b.0.len().min(at + 5);
            let frame = Seg::data(ISN.wrapping_add(at as u32), &b.0[at..end]).ack(a.1).bytes();
            t.comparator.handle_secondary(t.now, epoch, frame);
        }
        t.comparator.handle_secondary(t.now, epoch, Seg::data(ISN, b"").ack(a.1).bytes());
        released += t.out().len();
        if t.comparator.stats().currently_held != 0 || !t.asked.is_empty() {
            return Err(format!("{} held for nothing, {:?}", t.comparator.stats().currently_held, t.asked));
        }
    }
    released += t.checkpoint(epoch + 1).len();
    let stats = t.comparator.stats();
    if stats.released != released as u64 || stats.currently_held_bytes != 0 || stats.currently_secondary_bytes != 0 {
        return Err(format!("{stats:?}"));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn one_stream_cut_differently_all_leaves(ops in prop::collection::vec(any::<(u8, u8)>(), 0..120)) {
        prop_assert_eq!(lockstep(&ops, false), Ok(()));
    }

    #[test]
    fn nothing_leaves_that_guest_b_cannot_explain(ops in prop::collection::vec(any::<(u8, u8)>(), 0..120)) {
        prop_assert_eq!(lockstep(&ops, true), Ok(()));
    }

    #[test]
    fn a_flipped_byte_never_leaves(
        payload in prop::collection::vec(any::<u8>(), 1..100), flip: prop::sample::Index, cut in 1_usize..20, first: bool,
    ) {
        let mut t = Trace::new();
        let mut wrong = payload.clone();
        let at = flip.index(payload.len());
        wrong[at] ^= 0x40;
        let mut left = 0;
        if first { left += t.p(0, Seg::data(1, &payload)); }
        for (n, piece) in wrong.chunks(cut).enumerate() { left += t.s(0, Seg::data(1 + (n * cut) as u32, piece)); }
        if !first { left += t.p(0, Seg::data(1, &payload)); }
        prop_assert_eq!((left, t.asked), (0, vec![(0, Cause::PayloadDiffers)]));
    }

    #[test]
    fn any_bytes_leave_once_and_never_panic(
        frames in prop::collection::vec((any::<bool>(), 0_u64..4, prop::collection::vec(any::<u8>(), 0..80), 0_usize..60), 0..40),
    ) {
        let mut t = Trace::new();
        let skeleton = Seg::data(1, b"payload").frame();
        let (mut sent, mut left) = (0, 0);
        for (n, (primary, epoch, mut frame, keep)) in frames.into_iter().enumerate() {
            for (at, byte) in skeleton.iter().enumerate().take(keep) {
                if let Some(mine) = frame.get_mut(at) { *mine = *byte; }
            }
            sent += usize::from(primary);
            left += if primary { t.p_raw(epoch, frame) } else { t.s_raw(epoch, frame) };
            if n % 10 == 9 { left += t.checkpoint(n as u64 / 10).len() + t.wait(2000); }
        }
        left += t.checkpoint(u64::MAX).len();
        let stats = t.comparator.stats();
        // What dice made of two acknowledgements may have had to be told.
        prop_assert_eq!(left, sent + stats.acknowledged as usize);
        prop_assert_eq!((stats.currently_held, stats.currently_held_bytes, stats.currently_secondary_bytes), (0, 0, 0));
    }
}

#[test]
fn the_model_sees_a_missing_fence() {
    let mut seed = 1_u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u8
    };
    plant(Some(Mutant::NoFence));
    let runs: Vec<Vec<(u8, u8)>> = (0..300).map(|_| (0..120).map(|_| (next(), next())).collect()).collect();
    let caught = runs.iter().filter(|ops| lockstep(ops, true).is_err()).count();
    plant(None);
    assert!(caught > 0);
    runs.iter().for_each(|ops| assert_eq!(lockstep(ops, true), Ok(())));
}
