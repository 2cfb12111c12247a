//! Who asks for a lease, and which number an answer to it gets.

use crate::clock::Instant;
use crate::compare::checksum::ones_sum;
use crate::compare::rewriter::{Config, Forward, Rewriter};
use crate::compare::testing::{GUEST6, in_ipv6, tagged, udp};

const OWN: u32 = 0x0002_0304;
const OTHER: u32 = 0x00fe_fdfc;

/// A message of DHCP: of the guest's, or a server's answer to it.
fn lease(op: u8, xid: u32, hardware: u8, sum: bool) -> Vec<u8> {
    let mut payload = vec![0; 240];
    (payload[0], payload[28]) = (op, hardware);
    payload[4..8].copy_from_slice(&xid.to_be_bytes());
    payload.extend([53, 1, op, 255]);
    let mut frame = udp(if op == 1 { 68 } else { 67 }, &payload);
    let port = if op == 1 { 67_u16 } else { 68 };
    frame[36..38].copy_from_slice(&port.to_be_bytes());
    frame[40..42].fill(0);
    if sum {
        let sum = udp_sum(&frame);
        frame[40..42].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

/// Over the pseudo-header, the header and the payload; with a right checksum in it, 0.
fn udp_sum(frame: &[u8]) -> u16 {
    let pseudo = [&frame[26..34], &[0, 17], &frame[38..40]].concat();
    !ones_sum(ones_sum(0, &pseudo), &frame[34..]) as u16
}

/// A frame as it reaches guest B.
fn heard(rewriter: &mut Rewriter, frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    assert_eq!(rewriter.from_network(Instant::ZERO, &mut frame), Forward::Now);
    frame
}

/// Guest B says it, and it leaves as it is.
#[track_caller]
fn said(rewriter: &mut Rewriter, frame: &[u8]) {
    let mut left = frame.to_vec();
    rewriter.from_guest(Instant::ZERO, &mut left);
    assert_eq!(left, frame);
}

#[test]
fn a_server_s_answer_gets_the_number_of_guest_b_s_question() {
    for sum in [true, false] {
        let mut rewriter = Rewriter::new();
        let answer = lease(2, OTHER, 7, sum);
        assert_eq!(heard(&mut rewriter, &answer), answer, "nobody has asked");
        let mut asked = lease(1, OWN, 7, sum);
        rewriter.from_guest(Instant::ZERO, &mut asked);
        assert_eq!(asked, lease(1, OWN, 7, sum), "as it is");
        assert_eq!(heard(&mut rewriter, &answer), lease(2, OWN, 7, sum));
        assert!(!sum || udp_sum(&lease(2, OWN, 7, sum)) == 0, "the table's own sums are right");
        let other = lease(2, OTHER, 8, sum);
        assert_eq!(heard(&mut rewriter, &other), other, "for another");
        let question = lease(1, OTHER, 7, sum);
        assert_eq!(heard(&mut rewriter, &question), question, "another guest's");
        rewriter.from_guest(Instant::ZERO, &mut lease(1, OWN + 1, 7, sum));
        assert_eq!(
            heard(&mut rewriter, &lease(2, OTHER + 1, 7, sum)),
            lease(2, OWN + 1, 7, sum),
            "the latest question"
        );
        rewriter.checkpoint();
        assert_eq!(heard(&mut rewriter, &answer), answer, "guest B has guest A's number");
        rewriter.from_guest(Instant::ZERO, &mut lease(1, OWN, 7, sum));
        rewriter.takeover();
        assert_eq!(heard(&mut rewriter, &answer), answer, "the server answers guest B itself");
    }
    let mut rewriter = Rewriter::with(Config { vnet_header_bytes: 12, ..Config::default() });
    let behind = |frame: &[u8], needs: u8| [&[needs, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], frame].concat();
    rewriter.from_guest(Instant::ZERO, &mut behind(&lease(1, OWN, 7, true), 0));
    let got = heard(&mut rewriter, &behind(&lease(2, OTHER, 7, true), 0));
    assert_eq!(got, behind(&lease(2, OWN, 7, true), 0));
    let (mut partial, mut wanted) = (lease(2, OTHER, 7, true), lease(2, OWN, 7, true));
    (partial[40], partial[41], wanted[40], wanted[41]) = (1, 2, 1, 2);
    assert_eq!(heard(&mut rewriter, &behind(&partial, 1)), behind(&wanted, 1), "the device adds it up");
}

#[test]
fn questions_without_end_are_bounded() {
    let mut rewriter = Rewriter::new();
    for hardware in 0..=255 {
        rewriter.from_guest(Instant::ZERO, &mut lease(1, 1, hardware, true));
    }
    let known = |rewriter: &mut Rewriter, hardware: u8| {
        let mut frame = lease(2, 2, hardware, true);
        rewriter.from_network(Instant::ZERO, &mut frame);
        frame == lease(2, 1, hardware, true)
    };
    assert_eq!(
        (0..=255).filter(|hardware| known(&mut rewriter, *hardware)).collect::<Vec<_>>(),
        (240..=255).collect::<Vec<_>>()
    );
}

/// A message of DHCPv6 with such a type, number and client, of the guest's or for it, with a right checksum.
fn lease6(kind: u8, xid: u32, client: &[u8], guest: u8) -> Vec<u8> {
    let answers = matches!(kind, 2 | 7 | 10 | 13);
    let mut message = (u32::from(kind) << 24 | xid).to_be_bytes().to_vec();
    // An option that comes before the one that is looked for.
    message.extend([0, 8, 0, 2, 1, 1]);
    if !client.is_empty() {
        message.extend([0, 1, 0, client.len() as u8]);
        message.extend(client);
    }
    let ports: [u16; 2] = if answers { [547, 546] } else { [546, 547] };
    let mut datagram = ports.map(u16::to_be_bytes).concat();
    datagram.extend((8 + message.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(message);
    let mut frame = in_ipv6(17, &datagram);
    frame[37] = guest;
    if answers {
        frame[22..54].rotate_left(16);
    }
    let sum = udp6_sum(&frame);
    frame[60..62].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn udp6_sum(frame: &[u8]) -> u16 {
    let pseudo = [&frame[22..54], &[0, 17], &frame[58..60]].concat();
    !ones_sum(ones_sum(0, &pseudo), &frame[54..]) as u16
}

#[test]
fn dhcpv6_is_told_by_client_and_address_and_has_shorter_numbers() {
    const CLIENT: &[u8] = &[0, 3, 0, 1, 2, 0, 0, 0, 0, 2];
    assert_eq!(GUEST6[15], 2, "the address that is meant");
    for (kind, answer) in [(1, 2), (1, 7), (3, 7), (4, 7), (5, 7), (6, 7), (8, 7), (9, 7), (11, 7)] {
        let mut rewriter = Rewriter::new();
        said(&mut rewriter, &lease6(kind, OWN, CLIENT, 2));
        let got = heard(&mut rewriter, &lease6(answer, OTHER, CLIENT, 2));
        assert_eq!(got, lease6(answer, OWN, CLIENT, 2), "{kind} {answer}");
        assert_eq!(udp6_sum(&got), 0, "the sum follows");
    }
    let other_client = [CLIENT, &[1]].concat();
    for (name, asked, answer) in [
        ("another client", lease6(1, OWN, CLIENT, 2), lease6(2, OTHER, &other_client, 2)),
        ("another address", lease6(1, OWN, CLIENT, 2), lease6(2, OTHER, CLIENT, 3)),
        ("nobody's", lease6(1, OWN, CLIENT, 2), lease6(2, OTHER, &[], 2)),
        ("another VLAN", tagged(&[5], &lease6(1, OWN, CLIENT, 2)), lease6(2, OTHER, CLIENT, 2)),
        ("no answer: RECONFIGURE", lease6(1, OWN, CLIENT, 2), lease6(10, 0, CLIENT, 2)),
        ("no answer: for a relay", lease6(1, OWN, CLIENT, 2), lease6(13, OTHER, CLIENT, 2)),
        ("no question: for a relay", lease6(12, OWN, CLIENT, 2), lease6(7, OTHER, CLIENT, 2)),
        ("another family", lease(1, OWN, 7, true), lease6(2, OTHER, CLIENT, 2)),
    ] {
        let mut rewriter = Rewriter::new();
        said(&mut rewriter, &asked);
        assert_eq!(heard(&mut rewriter, &answer), answer, "{name}");
    }
    let mut rewriter = Rewriter::new();
    said(&mut rewriter, &lease6(11, OWN, &[], 2));
    let got = heard(&mut rewriter, &lease6(7, OTHER, &[], 2));
    assert_eq!(got, lease6(7, OWN, &[], 2), "who asks for information need not say who it is");
    let mut cut = lease6(2, OTHER, CLIENT, 2);
    cut[67] = 200;
    assert_eq!(heard(&mut rewriter, &cut), cut, "an option that is longer than its message");
}

#[test]
fn an_answer_that_comes_late_answers_no_later_question() {
    const LATER: u32 = 0x0030_0000;
    for answer in [lease as fn(u8, u32, u8, bool) -> Vec<u8>, |op, xid, who, _| lease6(op, xid, &[who], 2)] {
        let mut rewriter = Rewriter::new();
        let hears = |rewriter: &mut Rewriter, xid: u32, own: u32, what: &str| {
            assert_eq!(heard(rewriter, &answer(2, xid, 7, true)), answer(2, own, 7, true), "{what}");
        };
        hears(&mut rewriter, OTHER, OTHER, "guest B has loaded the question, number included");
        said(&mut rewriter, &answer(1, OWN, 7, true));
        hears(&mut rewriter, OTHER, OWN, "the first");
        said(&mut rewriter, &answer(1, OWN, 7, true));
        hears(&mut rewriter, OTHER, OWN, "asked again");
        said(&mut rewriter, &answer(1, OWN + 1, 7, true));
        hears(&mut rewriter, OTHER, OWN, "of another server, to the question before");
        hears(&mut rewriter, LATER, OWN + 1, "to this one");
        hears(&mut rewriter, OTHER, OWN, "and still");
        said(&mut rewriter, &answer(1, OWN, 7, true));
        hears(&mut rewriter, LATER + 1, OWN, "the latest is what was asked last");
        rewriter.checkpoint();
        hears(&mut rewriter, OTHER, OTHER, "what it asks now it has loaded");
    }
}
