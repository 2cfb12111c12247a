//! The short way says what the long way says.

use super::super::{Comparator, Config, Output, Stats};
use crate::clock::Instant;
use crate::compare::properties::Dice;
use crate::compare::testing::{Seg, tagged, udp};
use crate::mutant::{Mutant, plant};
use bytes::Bytes;
use proptest::prelude::*;
use std::time::Duration;

/// Where a connection is.
#[derive(Clone, Copy, Default)]
struct At {
    seq: u32,
    ack: u32,
}

/// A segment of a connection, in the middle of it or not.
fn segment(dice: &mut Dice, at: &mut At, port: u16, payload: &[u8]) -> Seg {
    let seq = at.seq;
    if dice.roll(3) == 0 {
        at.ack += dice.roll(50) as u32;
    }
    let segment = Seg { port, ..Seg::data(seq, payload).ack(at.ack) };
    match dice.roll(60) {
        0 => Seg { port, ..Seg::syn(seq.wrapping_sub(1)) },
        1 => segment.fin(),
        2 => Seg { port, ..Seg::rst(seq) },
        3 => Seg { seq: seq.wrapping_sub(7), ..segment },
        4 => Seg { ack: None, ..segment },
        _ => {
            at.seq = seq.wrapping_add(payload.len() as u32);
            segment
        }
    }
}

/// The same with something changed, or not.
fn other(dice: &mut Dice, segment: &Seg) -> Vec<u8> {
    let mut segment = segment.clone();
    match dice.roll(40) {
        0 if !segment.payload.is_empty() => {
            let at = dice.roll(segment.payload.len());
            segment.payload[at] ^= 1;
        }
        1 => _ = segment.payload.pop(),
        2 => segment.seq = segment.seq.wrapping_add(1),
        3 => segment.ack = segment.ack.map(|ack| ack.wrapping_sub(9)),
        4 => segment.ack = segment.ack.map(|ack| ack.wrapping_add(9)),
        5 => segment.port += 1,
        6 => return udp(7, b"else"),
        7 => return tagged(&[5], &segment.frame()),
        _ => {}
    }
    let mut frame = segment.frame();
    if dice.roll(3) == 0 {
        // The identification: of no account, but then the frames are not the same to the last byte.
        frame[18] ^= 1;
    }
    frame
}

/// All that can be seen of a comparator. Who waited for a partner is told by the long way alone.
fn seen(comparator: &mut Comparator) -> (Vec<Output>, Stats, String) {
    let outputs = std::iter::from_fn(|| comparator.poll_output()).collect();
    let flows = format!("{:?} {:?} {}", comparator.flows(9), comparator.poll_timeout(), comparator.ready());
    (outputs, Stats { held: 0, ..comparator.stats() }, flows)
}

/// One history told both ways; how many pairs went the short one.
fn both_ways_agree(seed: u64) -> Result<usize, String> {
    let mut dice = Dice(seed);
    let config = Config {
        max_flows: 2 + dice.roll(3),
        max_queue_bytes: [600, 1500, 1 << 20][dice.roll(3)],
        max_flow_bytes: [200, 700, 1 << 20][dice.roll(3)],
        ..Config::default()
    };
    let (mut long, mut short) = (Comparator::new(config), Comparator::new(config));
    let (mut now, mut epoch, mut pairs) = (Instant::ZERO, 0, 0);
    let mut flows = [At { seq: u32::MAX - 40, ack: 3 }; 4];
    for step in 0..60 {
        let flow = dice.roll(4);
        let payload = dice.roll(40);
        let payload = dice.bytes(payload);
        let segment = segment(&mut dice, &mut flows[flow], 40_000 + flow as u16, &payload);
        let (ours, theirs) = match dice.roll(4) {
            // Datagrams, some of them questions to a resolver, which are over with their partner.
            0 => [(); 2]
                .map(|()| {
                    let changed = if dice.roll(20) == 0 { b"else" } else { &payload[..] };
                    udp([7, 53][flow % 2], changed)
                })
                .into(),
            _ => (segment.frame(), other(&mut dice, &segment)),
        };
        let (ours, theirs) = (Bytes::from(ours), Bytes::from(theirs));
        let of = if dice.roll(12) == 0 { epoch + 1 } else { epoch };
        match dice.roll(12) {
            0 => [&mut long, &mut short].map(|it| it.handle_primary(now, of, ours.clone())),
            1 => [&mut long, &mut short].map(|it| it.handle_secondary(now, of, theirs.clone())),
            2 => {
                epoch += 1;
                [&mut long, &mut short].map(|it| it.checkpoint(now, epoch - 1))
            }
            3 => {
                let comparing = dice.roll(3) > 0;
                [&mut long, &mut short].map(|it| it.set_comparing(epoch + 1, comparing))
            }
            4 => {
                now += Duration::from_millis(dice.roll(2000) as u64);
                [&mut long, &mut short].map(|it| it.handle_timeout(now))
            }
            _ => {
                long.handle_primary(now, of, ours.clone());
                long.handle_secondary(now, of, theirs.clone());
                match short.handle_pair(of, ours, &theirs) {
                    None => pairs += 1,
                    Some(ours) => {
                        short.handle_primary(now, of, ours);
                        short.handle_secondary(now, of, theirs);
                    }
                }
                [(); 2]
            }
        };
        let (long, short) = (seen(&mut long), seen(&mut short));
        if long != short {
            return Err(format!("step {step}: the long way\n{long:?}\nthe short way\n{short:?}"));
        }
    }
    Ok(pairs)
}

proptest! {
    #[test]
    fn a_pair_is_judged_as_two_frames_are(seed: u64) {
        prop_assert!(both_ways_agree(seed).is_ok(), "{:?}", both_ways_agree(seed));
    }
}

#[test]
fn most_of_a_quiet_connection_goes_the_short_way_and_a_planted_bug_is_seen() {
    let pairs: usize = (0..200).map(|seed| both_ways_agree(seed).unwrap()).sum();
    assert!(pairs > 1000, "{pairs} of some 200 x 30");
    plant(Some(Mutant::OverlookPair));
    let caught = (0..200).filter(|seed| both_ways_agree(*seed).is_err()).count();
    plant(None);
    assert!(caught > 0);
}

#[test]
fn what_is_not_taken_comes_back_and_leaves_no_trace() {
    let mut comparator = Comparator::new(Config::default());
    let frame = |payload| Seg::data(10, payload).ack(5).bytes();
    for (ours, theirs) in [
        (frame(b"mine"), frame(b"your")),
        (frame(b"mine"), frame(b"min")),
        (Seg::syn(9).bytes(), Seg::syn(9).bytes()),
        (udp(7, b"x").into(), udp(7, b"y").into()),
        (udp(7, b"x").into(), udp(8, b"x").into()),
        (Bytes::from_static(b"junk"), frame(b"mine")),
    ] {
        assert_eq!(comparator.handle_pair(0, ours.clone(), &theirs), Some(ours));
        assert_eq!((comparator.poll_output(), comparator.stats().compared), (None, 0));
    }
    assert_eq!(comparator.handle_pair(1, frame(b"mine"), &frame(b"mine")), Some(frame(b"mine")), "not this epoch's");
    assert_eq!(comparator.handle_pair(0, frame(b"mine"), &frame(b"mine")), None);
    assert_eq!(comparator.poll_output(), Some(Output::Release(frame(b"mine"))));
    let datagram = Bytes::from(udp(7, b"x"));
    assert_eq!(comparator.handle_pair(0, datagram.clone(), &datagram), None);
    assert_eq!(comparator.poll_output(), Some(Output::Release(datagram)));
}
