//! A table a rule: what guest A says, what guest B says, what comes of it.

use super::testing::{CLIENT, GUEST, Seg, Trace, arp, fragments, icmp6, in_ipv6, tagged, tcp6, udp, udp6};
use super::*;
use proptest::prelude::*;

/// Whether guest A's frame leaves when guest B said the other, and what is asked for at once.
fn judge(a: &[u8], b: &[u8]) -> (bool, Option<Cause>) {
    let mut t = Trace::new();
    let left = t.s_raw(0, b.to_vec()) + t.p_raw(0, a.to_vec());
    (left == 1, t.asked.first().map(|(_, cause)| *cause))
}

const LEAVES: (bool, Option<Cause>) = (true, None);
const WAITS: (bool, Option<Cause>) = (false, None);
const DIFFERS: (bool, Option<Cause>) = (false, Some(Cause::PayloadDiffers));

#[test]
fn formats_are_compared_by_what_they_say() {
    let echo = |id: u8, data: u8| icmp6(&[129, 0, 0, 0, 0, id, 0, 1, data]);
    let v4 = Seg::data(5, b"hello").frame();
    let v6 = |payload: &[u8]| in_ipv6(6, &tcp6(5, payload));
    let hop = in_ipv6(0, &[&[6, 0, 1, 4, 0, 0, 0, 0][..], &tcp6(5, b"hello")].concat());
    let sctp = |byte: u8| in_ipv6(132, &[byte; 16]);
    let mut ttl = v4.clone();
    ttl[22] = 9;
    for (name, a, b, verdict) in [
        ("IPv6 TCP", v6(b"hello"), v6(b"hello"), LEAVES),
        ("IPv6 TCP, another byte", v6(b"hello"), v6(b"hellO"), DIFFERS),
        ("an extension header of guest B alone", v6(b"hello"), hop, LEAVES),
        ("IPv6 UDP", udp6(1, b"x"), udp6(1, b"x"), LEAVES),
        ("an echo", echo(1, 1), echo(1, 1), LEAVES),
        ("another echo's identifier", echo(1, 1), echo(2, 1), WAITS),
        ("another echo's data", echo(1, 1), echo(1, 2), DIFFERS),
        ("one VLAN", tagged(&[5], &v4), tagged(&[5], &v4), LEAVES),
        ("another priority", tagged(&[0xe005], &v4), tagged(&[5], &v4), LEAVES),
        ("another VLAN", tagged(&[5], &v4), tagged(&[6], &v4), WAITS),
        ("a tag of guest A alone", tagged(&[5], &v4), v4.clone(), WAITS),
        ("QinQ", tagged(&[5, 6], &v4), tagged(&[5, 6], &v4), LEAVES),
        ("another inner VLAN", tagged(&[5, 6], &v4), tagged(&[5, 7], &v4), WAITS),
        ("another hop limit", ttl, v4.clone(), LEAVES),
        ("a protocol nobody knows", sctp(1), sctp(1), LEAVES),
        ("the same, another byte", sctp(1), sctp(2), DIFFERS),
        ("the same address, another family", v4, v6(b"hello"), WAITS),
    ] {
        assert_eq!(judge(&a, &b), verdict, "{name}");
    }
}

#[test]
fn tcp_by_its_rules() {
    let data = || Seg::data(100, b"data");
    let stamped = |segment: Seg, value: u8| {
        let mut frame = segment.frame();
        frame.splice(54..54, [1, 1, 8, 10, value, 0, 0, 1, 0, 0, 0, 0]);
        (frame[46], frame[17]) = (0x80, frame[17] + 12);
        frame
    };
    let windowed = |window: u8| {
        let mut frame = data().frame();
        frame[48] = window;
        frame
    };
    for (name, a, b, verdict) in [
        ("timestamps are the sender's own", stamped(data(), 1), stamped(data(), 9), LEAVES),
        ("windows are an offer", windowed(1), windowed(9), LEAVES),
        ("an ACK guest B has not made yet", data().ack(9).frame(), data().ack(8).frame(), WAITS),
        ("an ACK behind guest B's", data().ack(8).frame(), data().ack(9).frame(), LEAVES),
        ("a SYN of both, each with its number", Seg::syn(1).frame(), Seg::syn(900).frame(), LEAVES),
        ("a SYN of guest A alone", Seg::syn(1).frame(), data().frame(), WAITS),
        ("a FIN of both", data().fin().frame(), data().fin().frame(), LEAVES),
        ("a FIN of guest A alone", data().fin().frame(), data().frame(), WAITS),
        ("a FIN of guest B, earlier", data().frame(), Seg::data(100, b"da").fin().frame(), DIFFERS),
        ("a RST of both", Seg::rst(1).frame(), Seg::rst(9).frame(), LEAVES),
        ("a RST of guest A alone", Seg::rst(1).frame(), data().frame(), WAITS),
    ] {
        assert_eq!(judge(&a, &b), verdict, "{name}");
    }
}

#[test]
fn a_window_update_needs_nobody() {
    let mut t = Trace::new();
    t.s(0, Seg::pure_ack(50));
    assert_eq!(t.p(0, Seg::pure_ack(50)), 1);
    assert_eq!(t.p(0, Seg::pure_ack(50)) + t.p(0, Seg::pure_ack(40)), 2, "guest B is silent");
    assert_eq!(t.p(0, Seg::data(0, b"new").ack(50)) + t.p(0, Seg::pure_ack(50)), 0, "but it does not overtake");
    assert_eq!(t.s(0, Seg::data(0, b"new").ack(50)), 2);
}

#[test]
fn flags_of_guest_b_alone_age() {
    for said in [Seg::syn(9), Seg::data(9, b"").fin(), Seg::rst(9)] {
        let mut t = Trace::new();
        t.s(0, said.clone());
        assert_eq!(t.wait(2999) + t.asked.len(), 0);
        t.wait(1);
        assert_eq!(t.asked, [(0, Cause::OneSided)]);
        let mut t = Trace::new();
        t.s(0, said.clone());
        assert_eq!(t.p(0, said) + t.wait(9000) + t.asked.len(), 1, "guest A said it too");
    }
}

#[test]
fn identities_pass_when_they_are_known() {
    let other = [10, 0, 0, 7];
    for (name, a, b, left) in [
        ("guest B says it too", arp(1, GUEST, CLIENT), Some(arp(1, GUEST, CLIENT)), 1),
        ("guest B asks for somebody else", arp(1, GUEST, CLIENT), Some(arp(2, GUEST, other)), 1),
        ("guest B is silent", arp(1, GUEST, CLIENT), None, 0),
        ("guest B has another address", arp(1, GUEST, CLIENT), Some(arp(1, other, CLIENT)), 0),
        ("a probe is for the address it wants", arp(1, [0; 4], GUEST), Some(arp(2, GUEST, CLIENT)), 1),
    ] {
        let mut t = Trace::new();
        b.into_iter().for_each(|b| assert_eq!(t.s_raw(0, b), 0));
        assert_eq!(t.p_raw(0, a.clone()), left, "{name}");
        assert_eq!(t.checkpoint(0).len(), 1 - left);
        assert_eq!(t.p_raw(1, a), 1, "{name}: what the network knows is no news");
        t.wait(9000);
        assert_eq!(t.asked, [], "{name}");
    }
    let mut t = Trace::new();
    t.p_raw(0, arp(1, GUEST, CLIENT));
    assert_eq!(t.s_raw(0, arp(1, GUEST, CLIENT)), 1, "and the other way round");
}

#[test]
fn transactions_are_matched_by_their_number() {
    let dns = |id: u8, answer: u8| udp(53, &[0, id, 0x81, 0x80, answer]);
    let mut t = Trace::new();
    t.p_raw(0, dns(1, 7));
    t.p_raw(0, dns(2, 8));
    assert_eq!(t.s_raw(0, dns(2, 8)), 1, "answered in another order");
    assert_eq!(t.s_raw(0, dns(1, 7)), 1);
    assert_eq!((t.asked.len(), t.comparator.stats().flows), (0, 0), "nothing is left to remember");
    t.p_raw(0, dns(3, 7));
    t.s_raw(0, dns(3, 8));
    assert_eq!(t.asked, [(0, Cause::PayloadDiffers)]);

    let dhcp = |xid: u8, secs: u8, kind: u8, last: u8| {
        let mut payload = vec![0; 240];
        (payload[7], payload[9]) = (xid, secs);
        payload.extend([0, 12, 1, b'h', 53, 1, kind, 255, last]);
        let mut frame = udp(68, &payload);
        frame[36..38].copy_from_slice(&67_u16.to_be_bytes());
        frame
    };
    for (name, a, b, verdict) in [
        ("one message", dhcp(1, 0, 1, 0), dhcp(1, 0, 1, 0), LEAVES),
        ("tried for longer", dhcp(1, 0, 1, 0), dhcp(1, 4, 1, 0), LEAVES),
        ("another exchange", dhcp(1, 0, 1, 0), dhcp(2, 0, 1, 0), WAITS),
        ("another step", dhcp(1, 0, 1, 0), dhcp(1, 0, 3, 0), WAITS),
        ("another byte", dhcp(1, 0, 1, 0), dhcp(1, 0, 1, 9), DIFFERS),
    ] {
        assert_eq!(judge(&a, &b), verdict, "{name}");
    }
}

#[test]
fn a_late_partner_is_waited_for_until_it_ages() {
    let mut t = Trace::new();
    (0..5).for_each(|n| assert_eq!(t.p_raw(0, udp(7, &[n])), 0));
    assert_eq!(t.s_raw(0, udp(7, &[1])) + t.s_raw(0, udp(7, &[2])), 0, "the first has not come");
    assert_eq!(t.wait(2999) + t.asked.len(), 0);
    assert_eq!(t.s_raw(0, udp(7, &[0])), 3);
    t.wait(1);
    assert_eq!(t.asked, [(0, Cause::Aged)]);
}

#[test]
fn fragments_are_judged_as_a_whole() {
    let payload: Vec<u8> = (0..200).collect();
    for frame in [udp(7, &payload), udp6(7, &payload)] {
        let (a, b) = (fragments(&frame, 1, &[80, 160]), fragments(&frame, 9, &[104]));
        let mut t = Trace::new();
        assert_eq!(t.p_raw(0, a[2].clone()) + t.p_raw(0, a[0].clone()), 0);
        assert_eq!(t.s_raw(0, b[0].clone()) + t.s_raw(0, b[1].clone()), 0);
        t.comparator.handle_primary(t.now, 0, a[1].clone().into());
        assert_eq!(t.out(), [a[2].clone(), a[0].clone(), a[1].clone()], "in the order they came");
        assert_eq!(t.p_raw(0, frame.clone()) + t.s_raw(0, fragments(&frame, 3, &[8])[0].clone()), 0);
        assert_eq!(t.s_raw(0, fragments(&frame, 3, &[8])[1].clone()), 1, "a whole one and a cut one");
        let stats = t.comparator.stats();
        assert_eq!((stats.currently_held_bytes, stats.currently_secondary_bytes, t.asked.len()), (0, 0, 0));
    }
}

#[test]
fn fragments_that_do_not_fit_are_held_and_ask() {
    let frame = udp(7, &[1; 200]);
    let parts = fragments(&frame, 1, &[80, 160]);
    let shifted = fragments(&frame, 1, &[72, 152]);
    let behind_the_end = fragments(&udp(7, &[1; 400]), 1, &[208]);
    for (name, sent) in [
        ("an overlap", vec![parts[0].clone(), shifted[1].clone()]),
        ("a copy", vec![parts[0].clone(), parts[0].clone()]),
        ("two ends", vec![parts[2].clone(), shifted[2].clone()]),
        ("behind the end", vec![parts[2].clone(), behind_the_end[1].clone()]),
        ("an end before a part", vec![parts[2].clone(), fragments(&udp(7, &[1; 72]), 1, &[40])[1].clone()]),
    ] {
        let mut t = Trace::new();
        sent.iter().for_each(|part| assert_eq!(t.p_raw(0, part.clone()), 0));
        assert_eq!(t.asked, [(0, Cause::Unparsable(packet::Reason::Fragment))], "{name}");
        assert_eq!(t.checkpoint(0), sent, "{name}");
    }
    let mut t = Trace::new();
    t.p_raw(0, parts[0].clone());
    t.s_raw(0, parts[1].clone());
    t.wait(3000);
    assert_eq!(t.asked, [(0, Cause::Aged)], "the rest never came");
    assert_eq!(t.comparator.stats().currently_secondary_bytes, 0, "guest B's are forgotten");
}

#[test]
fn fragments_without_end_are_bounded() {
    let mut t = Trace::with(Config { max_flow_bytes: 100_000, ..Config::default() });
    let mut frame = fragments(&udp(7, &[1; 200]), 1, &[80])[0].clone();
    for id in 0..20_000_u16 {
        frame[18..20].copy_from_slice(&id.to_be_bytes());
        frame[33] = (id >> 4) as u8;
        t.s_raw(0, frame.clone());
        t.p_raw(0, frame.clone());
        assert!(t.comparator.stats().currently_secondary_bytes <= 100_000);
    }
    assert_eq!(t.asked, [(0, Cause::BoundReached)]);
    assert_eq!(t.checkpoint(0).len(), 20_000);
}

#[test]
fn flows_that_diverge_are_shown_worst_first() {
    let mut t = Trace::new();
    for epoch in 0..5 {
        let once = if epoch == 4 { 3 } else { 2 };
        for (port, differs) in [(1, true), (once, epoch > 2), (9, false)] {
            t.p(epoch, Seg::data(epoch as u32 * 9, b"mine").port(port));
            t.s(epoch, Seg::data(epoch as u32 * 9, if differs { b"your" } else { b"mine" }).port(port));
        }
        if epoch < 4 {
            t.checkpoint(epoch);
        }
    }
    assert_eq!(t.asked.len(), 5, "once an epoch, whoever diverged");
    let flows = t.comparator.flows(9);
    let shown: Vec<_> = flows.iter().map(|f| (f.key.dst_port, f.diverged, f.keeps_diverging, f.held)).collect();
    assert_eq!(shown, [(1, 5, true, 1), (3, 1, false, 1), (2, 1, false, 0)]);
    assert_eq!((flows[0].last_cause, flows[0].last_epoch, flows[2].last_epoch), (Cause::PayloadDiffers, 4, 3));
    assert_eq!((flows[2].compared, t.comparator.flows(1).len()), (3, 1));
    assert_eq!(flows[0].key.to_string(), "tcp 10.0.0.2 80 > 10.0.0.9 1");
}

#[test]
fn a_hundred_thousand_flows_that_are_answered_cost_a_full_table_and_no_more() {
    // Each is explained, so a checkpoint is asked for only when all of a table's flows are of one epoch.
    let mut t = Trace::with(Config { max_flows: 1000, ..Config::default() });
    let (mut frame, mut left, mut epoch) = (Seg::syn(1).ack(1).frame(), 0, 0);
    for flow in 0..100_000_u32 {
        frame[32..36].copy_from_slice(&flow.to_be_bytes());
        left += t.s_raw(epoch, frame.clone()) + t.p_raw(epoch, frame.clone());
        assert!(t.comparator.stats().flows <= 1000);
        if t.asked.len() as u64 > epoch {
            left += t.checkpoint(epoch).len();
            epoch += 1;
        }
    }
    assert_eq!(left, 100_000);
    assert!((90..=100).contains(&epoch), "{epoch} checkpoints");
    let mut t = Trace::with(Config { max_flows: 1000, ..Config::default() });
    for flow in 0..100_000_u32 {
        let frame = udp(flow as u16, &flow.to_be_bytes());
        assert_eq!(t.p_raw(0, frame.clone()) + t.s_raw(0, frame), 1, "datagrams need no table");
    }
    assert_eq!(t.asked, []);
}

#[test]
fn a_virtio_net_header_goes_with_its_frame() {
    let mut t = Trace::with(Config { vnet_header_bytes: 12, ..Config::default() });
    let frame = [&[0; 12][..], &Seg::data(5, &[7; 60_000]).frame()].concat();
    t.s_raw(0, [&[1; 12][..], &Seg::data(5, &[7; 60_000]).frame()].concat());
    t.comparator.handle_primary(t.now, 0, frame.clone().into());
    assert_eq!(t.out(), [frame]);
}

proptest! {
    #[test]
    fn dhcp_options_of_any_shape_end(payload in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut t = Trace::new();
        let mut frame = udp(68, &payload);
        frame[36..38].copy_from_slice(&67_u16.to_be_bytes());
        prop_assert_eq!(t.p_raw(0, frame.clone()) + t.s_raw(0, frame), 1);
    }
}

#[test]
fn a_buffered_epoch_waits_for_its_checkpoint_and_what_it_showed_is_known() {
    let mut t = Trace::new();
    t.comparator.set_comparing(1, false);
    assert_eq!(t.p(0, Seg::data(100, b"compared")) + t.s(0, Seg::data(100, b"compared")), 1);
    t.checkpoint(0);
    t.s(1, Seg::data(108, b"DIFFERS"));
    assert_eq!(t.p(1, Seg::data(108, b"differs")) + t.p_raw(1, vec![0xff; 60]) + t.s(1, Seg::data(108, b"differs")), 0);
    assert_eq!((t.wait(60_000), t.comparator.poll_timeout()), (0, None), "nothing ages");
    assert_eq!(t.comparator.stats().dropped_unasked, 2);
    t.comparator.set_comparing(2, true);
    assert_eq!(t.p(2, Seg::data(115, b"again")), 0);
    assert_eq!(t.checkpoint(1).len(), 2);
    assert_eq!(t.p(2, Seg::data(108, b"differs")), 0, "behind what waits in its flow");
    assert_eq!(t.s(2, Seg::data(115, b"again")), 2);
    assert_eq!(t.asked, []);
    assert!(t.comparator.flows(8).is_empty(), "a difference that nobody looked for is none");
}

#[test]
fn a_buffered_epoch_still_has_a_bound() {
    let mut t = Trace::with(Config { max_queue_bytes: 1000, ..Config::default() });
    t.comparator.set_comparing(0, false);
    while t.comparator.ready() {
        assert_eq!(t.p(0, Seg::data(100, b"more")), 0);
    }
    assert_eq!(t.asked, [(0, Cause::BoundReached)]);
}

#[test]
fn a_guests_own_questions_are_told_by_what_they_ask() {
    let dns = |port: u16, id: u8, flags: u8, name: u8| {
        let mut frame = udp(port, &[0, id, flags, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, name, 0, 0, 1, 0, 1]);
        frame[36..38].copy_from_slice(&53_u16.to_be_bytes());
        frame
    };
    for (name, a, b, verdict) in [
        ("another number", dns(9000, 1, 1, b'a'), dns(9000, 2, 1, b'a'), LEAVES),
        ("another port", dns(9000, 1, 1, b'a'), dns(9001, 1, 1, b'a'), LEAVES),
        ("another name", dns(9000, 1, 1, b'a'), dns(9000, 1, 1, b'b'), WAITS),
        ("another wish", dns(9000, 1, 1, b'a'), dns(9000, 1, 0, b'a'), WAITS),
        ("an answer to another number", dns(9000, 1, 0x81, b'a'), dns(9000, 2, 0x81, b'a'), WAITS),
    ] {
        assert_eq!(judge(&a, &b), verdict, "{name}");
    }
    let mut t = Trace::new();
    for n in 0..100_u8 {
        t.s_raw(0, dns(9000 + u16::from(n), n, 1, n / 2));
        assert_eq!(t.p_raw(0, dns(8000 - u16::from(n), 200 - n, 1, n / 2)), 1, "asked twice is asked twice");
    }
    t.wait(9000);
    assert_eq!((t.asked.len(), t.comparator.stats().flows), (0, 0));
    t.p_raw(0, dns(9000, 1, 1, b'a'));
    t.wait(3000);
    assert_eq!(t.asked, [(0, Cause::Aged)], "guest B does not ask");
}

#[test]
fn two_guests_that_ask_for_a_lease_ask_the_same_in_numbers_of_their_own() {
    let v4 = |xid: u8, secs: u8, kind: u8, hardware: u8, wish: u8| {
        let mut payload = vec![0; 240];
        (payload[0], payload[4], payload[9], payload[28]) = (1, xid, secs, hardware);
        payload.extend([53, 1, kind, 50, 4, 10, 0, 0, wish, 255]);
        let mut frame = udp(68, &payload);
        frame[36..38].copy_from_slice(&67_u16.to_be_bytes());
        frame
    };
    let answered = |xid: u8| {
        let mut frame = v4(xid, 0, 2, 2, 0);
        (frame[35], frame[37], frame[42]) = (67, 68, 2);
        frame
    };
    let v6_with = |kind: u8, xid: u8, wish: u8, more: &[u8]| {
        let mut frame = udp6(546, &[&[kind, 0, xid, 0, 0, 1, 0, 1, wish], more].concat());
        frame[56..58].copy_from_slice(&547_u16.to_be_bytes());
        frame
    };
    let v6 = |kind: u8, xid: u8, wish: u8| v6_with(kind, xid, wish, &[]);
    let tried = |time: u8, behind: u8| v6_with(1, time, 0, &[0, 8, 0, 2, time, time, 0, 6, 0, 1, behind]);
    for (name, a, b, verdict) in [
        ("another number", v4(1, 0, 1, 2, 0), v4(9, 0, 1, 2, 0), LEAVES),
        ("and tried for longer", v4(1, 0, 1, 2, 0), v4(9, 4, 1, 2, 0), LEAVES),
        ("another step", v4(1, 0, 1, 2, 0), v4(9, 0, 3, 2, 0), WAITS),
        ("another asker", v4(1, 0, 1, 2, 0), v4(1, 0, 1, 3, 0), WAITS),
        ("another wish", v4(1, 0, 3, 2, 0), v4(9, 0, 3, 2, 1), DIFFERS),
        ("an answer with its number", answered(1), answered(1), LEAVES),
        ("an answer with another number", answered(1), answered(9), WAITS),
        ("DHCPv6, another number", v6(1, 1, 0), v6(1, 9, 0), LEAVES),
        ("DHCPv6, another step", v6(1, 1, 0), v6(3, 1, 0), WAITS),
        ("DHCPv6, another wish", v6(1, 1, 0), v6(1, 9, 1), DIFFERS),
        ("DHCPv6, tried for longer", tried(1, 0), tried(9, 0), LEAVES),
        ("DHCPv6, another byte behind that", tried(1, 0), tried(9, 1), DIFFERS),
        (
            "DHCPv6, another option in its place",
            tried(1, 0),
            v6_with(1, 1, 0, &[0, 9, 0, 2, 1, 1, 0, 6, 0, 1, 0]),
            DIFFERS,
        ),
    ] {
        assert_eq!(judge(&a, &b), verdict, "{name}");
    }
    let mut t = Trace::new();
    for n in 0..100_u8 {
        t.s_raw(0, v4(n, n, 1, 2, 0));
        assert_eq!(t.p_raw(0, v4(200 - n, 0, 1, 2, 0)), 1, "asked again is asked again");
    }
    assert_eq!((t.asked.len(), t.comparator.stats().flows), (0, 0));
}

#[test]
fn options_of_a_syn_are_promises_and_all_others_are_not() {
    let with = |segment: Seg, options: &[u8]| {
        let mut frame = segment.frame();
        frame.truncate(54);
        frame.extend(options);
        frame.resize(54 + options.len().next_multiple_of(4), 0);
        frame[46] = (5 + options.len().div_ceil(4) as u8) << 4;
        frame[17] = (frame.len() - 14) as u8;
        frame
    };
    let stamps: &[u8] = &[8, 10, 0, 0, 0, 1, 0, 0, 0, 0];
    for (name, a, b, promised) in [
        ("maximum segment size", &[2, 4, 5, 0xb4][..], &[2, 4, 5, 0xa0][..], true),
        ("window scale", &[3, 3, 7], &[3, 3, 2], true),
        ("window scale of one alone", &[3, 3, 7], &[], true),
        ("SACK permitted", &[4, 2], &[], true),
        ("timestamps of one alone", stamps, &[], true),
        ("another time", stamps, &[8, 10, 0, 0, 0, 9, 0, 0, 0, 0], false),
        ("MD5 of one alone", &[19, 18, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], &[], true),
        ("another TCP-AO signature", &[29, 6, 1, 1, 5, 6], &[29, 6, 1, 1, 7, 8], false),
        ("TCP-AO of one alone", &[29, 6, 1, 1, 5, 6], &[], true),
        ("another multipath key", &[30, 4, 1, 2], &[30, 4, 1, 3], false),
        ("multipath of one alone", &[30, 4, 1, 2], &[], true),
        ("SACK blocks", &[5, 10, 0, 0, 0, 1, 0, 0, 0, 2], &[], false),
        ("user timeout", &[28, 4, 0, 1], &[28, 4, 0, 2], false),
        ("Fast Open cookie", &[34, 4, 1, 2], &[34, 4, 3, 4], false),
        ("an experiment", &[253, 4, 1, 2], &[], false),
        ("the order they are in", &[4, 2, 3, 3, 7], &[1, 3, 3, 7, 4, 2], false),
        ("a length that lies ends the search", &[1, 77, 200, 4, 2], &[], false),
    ] {
        let syn = |options| with(Seg::syn(1).ack(9), options);
        assert_eq!(judge(&syn(a), &syn(b)), if promised { DIFFERS } else { LEAVES }, "{name}");
        assert_eq!(judge(&syn(a), &syn(a)), LEAVES, "{name}: the same");
        let data = |options| with(Seg::pure_ack(9), options);
        assert_eq!(judge(&data(a), &data(b)), LEAVES, "{name}, but not in a SYN");
    }
}

#[test]
fn what_is_behind_an_authentication_header_is_compared_with_it() {
    let ah = |number: u8, payload: &[u8]| {
        let header = [6, 4, 0, 0, 0, 0, 0, 7, 0, 0, 0, number, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9];
        in_ipv6(51, &[&header[..], &tcp6(5, payload)].concat())
    };
    for (name, a, b, verdict) in [
        ("the same", ah(1, b"x"), ah(1, b"x"), LEAVES),
        ("another number", ah(1, b"x"), ah(2, b"x"), DIFFERS),
        ("another byte behind it", ah(1, b"x"), ah(1, b"y"), DIFFERS),
        ("none in guest B's", ah(1, b"x"), in_ipv6(6, &tcp6(5, b"x")), WAITS),
    ] {
        assert_eq!(judge(&a, &b), verdict, "{name}");
    }
}

#[test]
fn a_redirect_is_compared_whole_and_in_a_flow_of_its_own() {
    let redirect = |gateway: u8| {
        let mut frame = testing::icmp_echo_reply(0, &[0x45; 28]);
        (frame[34], frame[35]) = (5, 1);
        frame[38..42].copy_from_slice(&[10, 0, 0, gateway]);
        frame
    };
    let redirect6 =
        |target: u8| icmp6(&[&[137, 0, 0, 0, 0, 0, 0, 0][..], &[target; 32], &[2, 1, 2, 2, 2, 2, 2, 2]].concat());
    let unreachable = |port: u8| icmp6(&[1, 4, 0, 0, 0, 0, 0, 0, port]);
    for (name, a, b, verdict) in [
        ("IPv4", redirect(1), redirect(1), LEAVES),
        ("IPv4, another gateway", redirect(1), redirect(2), DIFFERS),
        ("IPv6", redirect6(1), redirect6(1), LEAVES),
        ("IPv6, another target", redirect6(1), redirect6(2), DIFFERS),
        ("another type of message", redirect6(1), unreachable(1), WAITS),
        ("an echo", redirect(1), testing::icmp_echo_reply(0, &[0x45; 28]), WAITS),
    ] {
        assert_eq!(judge(&a, &b), verdict, "{name}");
    }
}

#[test]
fn a_datagram_as_large_as_can_be_is_put_together_and_a_larger_one_is_not() {
    // The payload of an IPv4 packet of 65,535 bytes: 8 of them are UDP's.
    let payload: Vec<u8> = (0..65_507_u32).map(|n| n as u8).collect();
    let cuts: Vec<_> = (1..=43).map(|n| n * 1480).collect();
    let frame = udp(7, &payload);
    let parts = fragments(&frame, 1, &cuts);
    let mut t = Trace::new();
    let said: usize = parts.iter().map(|part| t.s_raw(0, part.clone())).sum();
    let left: usize = parts.iter().rev().map(|part| t.p_raw(0, part.clone())).sum();
    assert_eq!((said, left, t.asked.len()), (0, parts.len(), 0));
    let stats = t.comparator.stats();
    assert_eq!((stats.currently_held_bytes, stats.currently_secondary_bytes), (0, 0));

    // The last part's offset fits the field and its end does not: the ping of death.
    let mut beyond = parts[43].clone();
    beyond[20..22].copy_from_slice(&(65_528_u16 / 8).to_be_bytes());
    for sent in [vec![beyond.clone()], vec![parts[0].clone(), beyond]] {
        let mut t = Trace::new();
        sent.iter().for_each(|part| assert_eq!(t.s_raw(0, part.clone()) + t.p_raw(0, part.clone()), 0));
        assert_eq!(t.asked, [(0, Cause::Unparsable(packet::Reason::Fragment))]);
        assert_eq!(t.checkpoint(0), sent);
    }
}

#[test]
fn a_partner_that_may_still_come_costs_no_checkpoint() {
    // Guest B says the same in any order, and the last a moment before guest A's first has aged.
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        // A guest B that is ahead says in order what guest A will say: a flow keeps its order.
        for first_of_b in [false, true].into_iter().take(1 + usize::from(order == [0, 1, 2])) {
            let mut t = Trace::new();
            let said: Vec<_> = order.map(|n| udp(7, &[n])).into();
            let (early, late) = said.split_at(2);
            let a = |t: &mut Trace| (0..3).map(|n| t.p_raw(0, udp(7, &[n]))).sum::<usize>();
            let mut left = if first_of_b { 0 } else { a(&mut t) };
            left += early.iter().map(|frame| t.s_raw(0, frame.clone())).sum::<usize>();
            left += if first_of_b { a(&mut t) } else { 0 };
            t.wait(2999);
            left += t.s_raw(0, late[0].clone());
            assert_eq!((left, t.asked.len()), (3, 0), "{order:?} {first_of_b}");
        }
    }
}

#[test]
fn who_asks_for_a_checkpoint_is_named() {
    let mut comparator = Comparator::new(Config::default());
    comparator.handle_secondary(Default::default(), 0, Seg::data(1, b"your").bytes());
    comparator.handle_primary(Default::default(), 0, Seg::data(1, b"mine").bytes());
    let Some(Output::Diverged { cause, flow, .. }) = comparator.poll_output() else { panic!("nothing is asked for") };
    assert_eq!(asked_by(cause, flow), "tcp 10.0.0.2 80 > 10.0.0.9 40000: outputs differ");
    comparator.checkpoint(Default::default(), 0);
    while comparator.poll_output().is_some() {}
    comparator.handle_primary(Default::default(), 1, vec![0; 60].into());
    let Some(Output::Diverged { cause, flow, .. }) = comparator.poll_output() else { panic!("nothing is asked for") };
    assert_eq!(asked_by(cause, flow), "a packet cannot be compared: EtherType 0x0000");
}
