//! What a client is told, and when.

use super::super::testing::{Seg, Trace, fragments, in_ipv6, tagged};
use super::super::{Cause, Config};
use super::*;
use std::collections::VecDeque;

/// The guest's segment, with this window and these options, and right checksums.
fn segment(seq: u32, ack: u32, window: u16, payload: &[u8], options: &[u8]) -> Vec<u8> {
    let mut frame = Seg::data(seq, b"").ack(ack).frame();
    frame[46] = (5 + options.len() as u8 / 4) << 4;
    frame[48..50].copy_from_slice(&window.to_be_bytes());
    frame.extend(options);
    frame.extend(payload);
    let length = (frame.len() - 14) as u16;
    frame[16..18].copy_from_slice(&length.to_be_bytes());
    finished(frame, 14)
}

/// Checksums of the TCP segment, and of the IPv4 header before it.
fn finished(mut frame: Vec<u8>, ip_at: usize) -> Vec<u8> {
    let (addresses, tcp_at) =
        if frame[ip_at] >> 4 == 4 { (ip_at + 12..ip_at + 20, ip_at + 20) } else { (ip_at + 8..ip_at + 40, ip_at + 40) };
    if tcp_at == ip_at + 20 {
        frame[ip_at + 10..ip_at + 12].fill(0);
        let sum = !ones_sum(0, &frame[ip_at..tcp_at]) as u16;
        frame[ip_at + 10..ip_at + 12].copy_from_slice(&sum.to_be_bytes());
    }
    let at = tcp_at + CHECKSUM_AT;
    frame[at..at + 2].fill(0);
    let pseudo = [&frame[addresses], &[0, TCP], &((frame.len() - tcp_at) as u16).to_be_bytes()].concat();
    let sum = !ones_sum(ones_sum(0, &pseudo), &frame[tcp_at..]) as u16;
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// A clock, and its echo of the other.
fn stamps(own: u8, echo: u8) -> Vec<u8> {
    vec![1, 1, 8, 10, 0, 0, 0, own, 0, 0, 0, echo]
}

/// Blocks in a header, from and up to so many times 256.
fn blocks(blocks: &[[u8; 2]]) -> Vec<u8> {
    [vec![1, 1, 5, 2 + 8 * blocks.len() as u8], told_blocks(blocks)].concat()
}

fn told_blocks(blocks: &[[u8; 2]]) -> Vec<u8> {
    blocks.iter().flat_map(|[left, right]| [0, 0, *left, 0, 0, 0, *right, 0]).collect()
}

fn told(echo: Option<u32>, blocks: &[[u8; 2]]) -> Told {
    Told { ack: 400, window: 700, echo, blocks: told_blocks(blocks) }
}

#[test]
fn an_acknowledgement_is_of_both_guests() {
    for (name, options, told, left) in [
        ("no options", vec![], told(Some(11), &[]), vec![]),
        ("timestamps", stamps(7, 9), told(Some(11), &[]), stamps(7, 11)),
        ("timestamps of guest A alone", stamps(7, 9), told(None, &[]), stamps(7, 9)),
        ("SACK blocks of guest A", blocks(&[[1, 2]]), told(None, &[]), vec![]),
        ("SACK blocks of guest B", vec![], told(None, &[[1, 2], [3, 4]]), blocks(&[[1, 2], [3, 4]])),
        (
            "all of them",
            [stamps(7, 9), blocks(&[[1, 2]])].concat(),
            told(Some(11), &[[5, 6], [3, 4], [7, 8]]),
            [stamps(7, 11), blocks(&[[5, 6], [3, 4], [7, 8]])].concat(),
        ),
    ] {
        let (frame, wanted) = (segment(5, 900, 1000, &[7; 1000], &options), segment(5, 400, 700, b"", &left));
        assert_eq!(acknowledgement(&frame, 0, &told), Some(wanted.clone()), "{name}");
        let in_tags = [tagged(&[5, 6], &frame), tagged(&[5, 6], &wanted)];
        assert_eq!(acknowledgement(&in_tags[0], 0, &told), Some(in_tags[1].clone()), "{name}, tagged");
        // As a guest with a virtio NIC says it: to be cut, and its checksum to be finished.
        let mut unfinished = frame.clone();
        unfinished[50..52].fill(9);
        let behind = [&[1, 1, 66, 0, 200, 0, 34, 0, 16, 0, 0, 0][..], &unfinished].concat();
        assert_eq!(acknowledgement(&behind, 12, &told), Some([&[0; 12][..], &wanted].concat()), "{name}, unfinished");
        let v6 = |frame: &[u8]| finished(in_ipv6(TCP, &frame[34..]), 14);
        assert_eq!(acknowledgement(&v6(&frame), 0, &told), Some(v6(&wanted)), "{name}, IPv6");
    }
    let told = told(None, &[]);
    let smaller = segment(5, 400, 600, b"", &[]);
    assert_eq!(acknowledgement(&segment(5, 900, 600, b"", &[]), 0, &told), Some(smaller), "the smaller window");
    let padded = [segment(5, 900, 1000, b"", &stamps(7, 9)), vec![0; 8]].concat();
    assert_eq!(acknowledgement(&padded, 0, &told), Some(segment(5, 400, 700, b"", &stamps(7, 9))), "no padding");
    let mut last = segment(5, 900, 1000, b"bye", &[]);
    last[47] |= Tcp::FIN;
    assert_eq!(acknowledgement(&last, 0, &told), Some(segment(5, 400, 700, b"", &[])), "an end is not told early");
    let parts = fragments(&segment(5, 900, 1000, &[7; 100], &stamps(7, 9)), 1, &[40]);
    for (name, frame) in [
        ("a SYN", Seg::syn(1).ack(900).frame()),
        ("a reset", Seg::rst(1).ack(900).frame()),
        ("no acknowledgement", Seg { ack: None, ..Seg::data(1, b"") }.frame()),
        ("signed", segment(5, 900, 1000, b"", &[[1, 1, 19, 18].as_slice(), &[7; 16]].concat())),
        ("signed otherwise", segment(5, 900, 1000, b"", &[29, 8, 1, 1, 5, 6, 7, 8])),
        ("multipath", segment(5, 900, 1000, b"", &[30, 4, 1, 2])),
        ("a part of a segment", parts[0].clone()),
        ("cut off", segment(5, 900, 1000, b"", &stamps(7, 9))[..50].to_vec()),
        ("no segment", super::super::testing::udp(7, b"x")),
    ] {
        assert_eq!(acknowledgement(&frame, 0, &told), None, "{name}");
    }
}

#[test]
fn what_guest_b_says_counts_as_far_as_guest_a_has_it() {
    let said = |options: &[u8]| {
        let frame = segment(5, 400, 700, b"", options);
        let Packet::Ip(Ip { transport: Transport::Tcp(tcp), .. }) = Packet::parse(&frame) else { panic!("no TCP") };
        Told::of(&tcp, &frame, 0x400, 400)
    };
    for (name, options, wanted) in [
        ("nothing else", vec![], told(None, &[])),
        ("its clock's echo", stamps(3, 11), told(Some(11), &[])),
        ("blocks", blocks(&[[3, 4], [1, 2]]), told(None, &[[3, 4], [1, 2]])),
        ("a block beyond what guest A has", blocks(&[[4, 5], [1, 2]]), told(None, &[[1, 2]])),
        ("a block that begins before that and ends behind it", blocks(&[[3, 5]]), told(None, &[])),
        (
            "more than there is room for",
            blocks(&[[3, 4], [2, 3], [1, 2], [0, 1]]),
            told(None, &[[3, 4], [2, 3], [1, 2]]),
        ),
    ] {
        assert_eq!(said(&options), Some(wanted), "{name}");
    }
}

#[test]
fn a_client_is_told_of_what_both_have_when_it_has_waited() {
    let mut t = Trace::new();
    let (mine, his) = (|ack| Seg::pure_ack(ack), |ack| Seg::pure_ack(ack));
    assert_eq!(t.p(0, mine(100)) + t.s(0, his(50)), 0);
    t.wait(99);
    assert_eq!(t.s(0, his(60)), 0, "guest B may be about to say it");
    t.wait(1);
    t.comparator.handle_secondary(t.now, 0, his(60).bytes());
    assert_eq!(t.out(), [Seg::pure_ack(60).bytes()]);
    assert_eq!(t.s(0, his(55)) + t.s(0, Seg::data(0, b"more").ack(60)), 0, "nothing new, and no duplicate");
    t.comparator.handle_secondary(t.now, 0, his(60).bytes());
    assert_eq!(t.out(), [Seg::pure_ack(60).bytes()], "a duplicate is one");
    assert_eq!(t.p(0, mine(100)), 0, "behind what waits");
    t.comparator.handle_secondary(t.now, 0, his(70).bytes());
    assert_eq!(t.out(), [Seg::pure_ack(70).bytes()], "when there is more to tell");
    t.comparator.handle_secondary(t.now, 0, his(100).bytes());
    assert_eq!(t.out(), [mine(100).bytes(), mine(100).bytes()], "guest A's own, as they are");
    let stats = t.comparator.stats();
    assert_eq!((stats.acknowledged, stats.released, stats.compared, t.asked.len()), (3, 2, 2, 0));
}

#[test]
fn an_answer_that_waits_does_not_keep_the_client_from_sending_the_question_again() {
    let mut t = Trace::new();
    // Guest A has all of the question and answers; guest B has lost its end.
    t.p(0, Seg::data(500, b"answer").ack(100));
    t.wait(200);
    t.comparator.handle_secondary(t.now, 0, Seg::pure_ack(40).bytes());
    assert_eq!(t.out(), [Seg::data(500, b"").ack(40).bytes()], "and nothing of the answer");
    assert_eq!(t.s(0, Seg::data(500, b"answer").ack(100)), 1);
    assert_eq!(t.asked, []);
}

#[test]
fn nothing_is_told_that_the_guests_do_not_both_say() {
    let told = |t: &mut Trace| {
        t.wait(200);
        t.s(0, Seg::pure_ack(60))
    };
    let mut t = Trace::new();
    t.p(0, Seg::data(500, b"mine").ack(100));
    t.s(0, Seg::data(500, b"your"));
    assert_eq!((told(&mut t), t.asked.len()), (0, 1), "a flow that has diverged");
    let mut t = Trace::new();
    t.comparator.set_comparing(0, false);
    t.p(0, Seg::pure_ack(100));
    assert_eq!(told(&mut t), 0, "an epoch that is not compared");
    let mut t = Trace::new();
    t.p(0, Seg::syn(499).ack(100));
    assert_eq!(told(&mut t), 0, "guest B has not begun this connection");
    let mut t = Trace::new();
    t.s(0, Seg::pure_ack(60));
    t.p(0, Seg::data(500, b"mine").ack(50));
    t.wait(200);
    t.comparator.handle_secondary(t.now, 0, Seg::pure_ack(60).bytes());
    assert_eq!(t.out(), [Seg::data(500, b"").ack(50).bytes()], "guest A has 50");
}

/// A client that sends with a window of guest A's, and as a kernel does when its timer has run out: the first that nobody has
/// acknowledged, and after each ACK that is news twice as many.
struct Client {
    end: u32,
    acked: u32,
    window: u32,
    due_ms: u64,
    timer_ms: u64,
}

const STEP: u32 = 100;
/// What guest B has room for, until its server reads.
const ROOM: u32 = 2000;
const READS_AT_MS: u64 = 150;

#[test]
fn a_slower_guest_that_lost_what_it_had_no_room_for_gets_it_again_before_anything_ages() {
    let mut t = Trace::new();
    let mut client = Client { end: 10_000, acked: 0, window: 10_000, due_ms: 200, timer_ms: 200 };
    let mut have = [0, 0];
    let mut wire: VecDeque<u32> = (0..client.end).step_by(STEP as usize).collect();
    for now_ms in 0..10_000 {
        let mut acks: Vec<u32> = Vec::new();
        let mut heard = |frames: Vec<bytes::Bytes>| {
            acks.extend(frames.iter().filter_map(|frame| Seg::read(frame).ack));
        };
        while let Some(at) = wire.pop_front() {
            let room = [u32::MAX, if now_ms < READS_AT_MS { ROOM } else { u32::MAX }];
            for guest in 0..2 {
                if at == have[guest] && at < room[guest] {
                    have[guest] += STEP;
                }
            }
            // One ACK for ten segments, as a kernel has it that gets them together; and one for what it has already.
            if (at / STEP) % 10 == 9 || at + STEP < have[0] {
                t.comparator.handle_primary(t.now, 0, Seg::pure_ack(have[0]).bytes());
                heard(t.out());
            }
            t.comparator.handle_secondary(t.now, 0, Seg::pure_ack(have[1]).bytes());
            heard(t.out());
        }
        let acked = acks.into_iter().fold(client.acked, u32::max);
        if acked > client.acked {
            (client.acked, client.timer_ms, client.window) = (acked, 200, client.window * 2);
            client.due_ms = now_ms + client.timer_ms;
            wire.extend((acked..client.end.min(acked + client.window)).step_by(STEP as usize).filter(|_| now_ms > 0));
        } else if now_ms >= client.due_ms {
            (client.window, client.timer_ms) = (STEP, client.timer_ms * 2);
            client.due_ms = now_ms + client.timer_ms;
            wire.push_back(client.acked);
        }
        assert_eq!(
            (t.wait(1), &t.asked[..]),
            (0, &[][..]),
            "{now_ms} ms: guests have {have:?}, {} is told",
            client.acked
        );
        if client.acked == client.end {
            assert!(now_ms >= 200, "nothing was lost");
            return;
        }
    }
    panic!("guests have {have:?}, {} is told", client.acked);
}

#[test]
fn a_virtio_net_header_of_the_comparator_s_is_one_of_the_acknowledgement_s() {
    let mut t = Trace::with(Config { vnet_header_bytes: 12, ..Config::default() });
    let behind = |segment: Seg| [&[0; 12][..], &segment.frame()].concat();
    t.p_raw(0, behind(Seg::pure_ack(100)));
    t.wait(100);
    t.comparator.handle_secondary(t.now, 0, behind(Seg::pure_ack(60)).into());
    assert_eq!(t.out(), [behind(Seg::pure_ack(60))]);
    t.wait(2900);
    assert_eq!(t.asked, [(0, Cause::Aged)], "and guest A's own ages as before");
}

#[test]
fn the_tables_see_every_planted_bug() {
    for mutant in Mutant::OF_TELLING {
        mutant::plant(Some(mutant));
        let tables = [an_acknowledgement_is_of_both_guests, what_guest_b_says_counts_as_far_as_guest_a_has_it];
        let caught = tables.iter().filter(|table| std::panic::catch_unwind(table).is_err()).count();
        mutant::plant(None);
        assert!(caught > 0, "{mutant:?}");
    }
}
