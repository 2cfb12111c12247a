//! What holds for any connection, and the planted bug that each of these would show.

use super::flow::TIME_WAIT;
use super::frames::{Around, FIN, PLAIN, SYN_ACK, Said};
use super::*;
use crate::compare::properties::Dice;
use crate::mutant::{Mutant, plant};
use proptest::prelude::*;

/// Clocks count from the guest's SYN or SYN-ACK: guest A's from `a_clock`, guest B's from `b_clock`.
struct Spaces {
    around: Around,
    a_isn: u32,
    b_isn: u32,
    clocks: Option<(u32, u32)>,
    rewriter: Rewriter,
    now: Instant,
    /// The flow is known, so that what follows counts.
    known: bool,
    /// The latest tick guest B named, and the latest the client echoed.
    named: Option<u32>,
    echoed: Option<u32>,
    frames: u64,
}

impl Spaces {
    fn new(dice: &mut Dice) -> Self {
        let around = Around::any(dice);
        let config = Config { vnet_header_bytes: around.vnet_header_bytes, ..Config::default() };
        let mut any = || dice.roll(1 << 31) as u32 * 2 + 1;
        let (a_isn, b_isn, a_clock, b_clock) = (any(), any(), any(), any());
        Self {
            around,
            a_isn,
            b_isn,
            clocks: (dice.roll(4) > 0).then_some((a_clock, b_clock)),
            rewriter: Rewriter::with(config),
            now: Instant::ZERO,
            known: true,
            named: None,
            echoed: None,
            frames: 0,
        }
    }

    /// A client's frame about the guest's byte `acked`, as guest A is to see it and as guest B is.
    fn heard(&mut self, dice: &mut Dice, flags: u8, seq: u32, acked: u32, tick: u32) -> (Vec<u8>, Vec<u8>) {
        self.frames += 1;
        let (mut a, own) = (Said::new(true, flags, seq, self.a_isn.wrapping_add(acked)), dice.roll(1 << 31) as u32);
        a.layout = self.frames;
        a.payload = if flags & Tcp::SYN == 0 { vec![7; dice.roll(9)] } else { vec![] };
        let mut b = Said { ack: self.b_isn.wrapping_add(acked), ..a.clone() };
        for _ in 0..if flags == PLAIN { dice.roll(3) } else { 0 } {
            // The first may well be a duplicate, which lies below what is acknowledged.
            let (left, right) = (acked.wrapping_sub(dice.roll(50) as u32), acked + dice.roll(500) as u32);
            a.sack.push((self.a_isn.wrapping_add(left), self.a_isn.wrapping_add(right)));
            b.sack.push((self.b_isn.wrapping_add(left), self.b_isn.wrapping_add(right)));
        }
        if let Some((a_clock, b_clock)) = self.clocks {
            a.clocks = Some((own, a_clock.wrapping_add(tick)));
            let at_b = self.named.map_or(tick, |named| tick.min(named));
            b.clocks = Some((own, b_clock.wrapping_add(at_b)));
            (self.echoed, self.known) = (self.echoed.max(Some(tick)), true);
        }
        (a.frame(&self.around), b.frame(&self.around))
    }

    fn inbound(&mut self, dice: &mut Dice, flags: u8, seq: u32, acked: u32, tick: u32) -> Result<(), String> {
        let (mut frame, wanted) = self.heard(dice, flags, seq, acked, tick);
        let forward = self.rewriter.from_network(self.now, &mut frame);
        if (forward, &frame) == (Forward::Now, &wanted) { Ok(()) } else { Err(format!("{frame:x?} not {wanted:x?}")) }
    }

    /// Guest B says its byte `at`; `plain`: it is to leave as it is.
    fn outbound(&mut self, flags: u8, at: u32, ack: u32, tick: u32, plain: bool) -> Result<(), String> {
        self.frames += 1;
        let mut b = Said::new(false, flags, self.b_isn.wrapping_add(at), ack);
        (b.layout, b.payload) = (self.frames, if flags & Tcp::SYN == 0 { vec![3; 5] } else { vec![] });
        b.sack = if flags == PLAIN { vec![(ack + 5, ack + 9)] } else { vec![] };
        let mut a = Said { seq: self.a_isn.wrapping_add(at), ..b.clone() };
        if let Some((a_clock, b_clock)) = self.clocks {
            b.clocks = Some((b_clock.wrapping_add(tick), 5));
            a.clocks = Some((a_clock.wrapping_add(tick.max(self.echoed.unwrap_or(0))), 5));
            if self.known {
                self.named = self.named.max(Some(tick));
            }
        }
        let (mut frame, wanted) = (b.frame(&self.around), if plain { &b } else { &a }.frame(&self.around));
        self.rewriter.from_guest(self.now, &mut frame);
        if frame == wanted { Ok(()) } else { Err(format!("{frame:x?} not {wanted:x?}")) }
    }

    fn open(&mut self, dice: &mut Dice, client_isn: u32) -> Result<(), String> {
        let next = client_isn.wrapping_add(1);
        match dice.roll(3) {
            0 => {
                self.outbound(Tcp::SYN, 0, 0, 0, true)?;
                self.inbound(dice, SYN_ACK, client_isn, 1, 0)?;
            }
            1 => {
                self.client_syn(client_isn)?;
                self.outbound(SYN_ACK, 0, next, 0, true)?;
                self.inbound(dice, PLAIN, next, 1, 0)?;
            }
            _ => {
                // Guest B is slower than the client's acknowledgement of guest A.
                self.client_syn(client_isn)?;
                self.named = Some(0);
                let pairs: Vec<_> = (0..1 + dice.roll(3)).map(|_| self.heard(dice, PLAIN, next, 1, 0)).collect();
                for (frame, _) in &pairs {
                    if self.rewriter.from_network(self.now, &mut frame.clone()) != Forward::Held {
                        return Err("not held".into());
                    }
                }
                self.outbound(SYN_ACK, 0, next, 0, false)?;
                for (_, wanted) in pairs {
                    if self.rewriter.poll_output() != Some(wanted) {
                        return Err("held, and freed otherwise".into());
                    }
                }
            }
        }
        Ok(())
    }

    fn client_syn(&mut self, client_isn: u32) -> Result<(), String> {
        let mut frame = Said::new(true, Tcp::SYN, client_isn, 0).frame(&self.around);
        let before = frame.clone();
        let forward = self.rewriter.from_network(self.now, &mut frame);
        if (forward, frame) == (Forward::Now, before) { Ok(()) } else { Err("a SYN passes as it is".into()) }
    }

    fn converse(&mut self, dice: &mut Dice, client_isn: u32) -> Result<(), String> {
        for _ in 0..dice.roll(20) {
            let (at, tick) = (1 + dice.roll(1 << 20) as u32, dice.roll(1 << 20) as u32);
            let client_at = client_isn.wrapping_add(1 + dice.roll(1000) as u32);
            if dice.roll(2) == 0 {
                self.inbound(dice, PLAIN, client_at, at, tick)?;
            } else {
                self.outbound(PLAIN, at, client_at, tick, false)?;
            }
        }
        Ok(())
    }
}

/// Each frame of a connection reaches the other side as its guest would have been told, or would have said it: to the
/// byte, checksum included, whatever is around it; across a checkpoint or a takeover.
fn two_spaces_are_one(seed: u64) -> Result<(), String> {
    let mut dice = Dice(seed);
    let mut spaces = Spaces::new(&mut dice);
    let client_isn = dice.roll(1 << 31) as u32;
    spaces.open(&mut dice, client_isn)?;
    spaces.converse(&mut dice, client_isn)?;
    if dice.roll(2) == 0 {
        spaces.rewriter.takeover();
    } else {
        spaces.rewriter.checkpoint();
        (spaces.named, spaces.echoed, spaces.known) = (None, None, false);
        spaces.b_isn = spaces.a_isn;
        spaces.clocks = spaces.clocks.map(|(a, _)| (a, a));
    }
    spaces.converse(&mut dice, client_isn)
}

/// A connection is translated until both sides have closed it, in whatever order, and the last has been told.
fn half_closed_is_alive(seed: u64) -> Result<(), String> {
    let mut dice = Dice(seed);
    let mut spaces = Spaces::new(&mut dice);
    spaces.clocks = None;
    let client_isn = dice.roll(1 << 31) as u32;
    spaces.open(&mut dice, client_isn)?;
    let next = client_isn.wrapping_add(1);
    let client_first = dice.roll(2) == 0;
    let fin = |spaces: &mut Spaces, dice: &mut Dice, client: bool, acked: (u32, u32)| {
        if client { spaces.inbound(dice, FIN, next, acked.0, 0) } else { spaces.outbound(FIN, 1, acked.1, 0, false) }
    };
    fin(&mut spaces, &mut dice, client_first, (1, next))?;
    spaces.now += TIME_WAIT * (2 + dice.roll(50) as u32);
    spaces.rewriter.handle_timeout(spaces.now);
    // What comes now is still said in two spaces: up to 8 bytes of the client, 5 of the guest, and a FIN.
    fin(&mut spaces, &mut dice, !client_first, (7, next.wrapping_add(9)))?;
    spaces.inbound(&mut dice, PLAIN, next, 7, 0)?;
    spaces.outbound(PLAIN, 7, next.wrapping_add(9), 0, false)?;
    spaces.now += TIME_WAIT - Duration::from_secs(1);
    spaces.rewriter.handle_timeout(spaces.now);
    spaces.outbound(PLAIN, 7, next.wrapping_add(9), 0, false)?;
    spaces.now += TIME_WAIT * 2;
    spaces.rewriter.handle_timeout(spaces.now);
    if spaces.rewriter.flows.is_empty() { Ok(()) } else { Err("an ended connection is remembered for ever".into()) }
}

/// A flood of forged frames costs a bounded table, and no connection that is being translated.
fn a_flood_breaks_nothing(seed: u64) -> Result<(), String> {
    let mut dice = Dice(seed);
    let mut spaces = Spaces::new(&mut dice);
    spaces.clocks = None;
    spaces.rewriter.config.max_flows = 8;
    let client_isn = dice.roll(1 << 31) as u32;
    spaces.open(&mut dice, client_isn)?;
    for port in 0..100 {
        let flags = [Tcp::SYN, PLAIN][dice.roll(2)];
        let said = Said { client_port: port, ..Said::new(true, flags, port.into(), 9) };
        let forward = spaces.rewriter.from_network(spaces.now, &mut said.frame(&spaces.around));
        if forward != Forward::Now || spaces.rewriter.flows.len() > 8 {
            return Err(format!("{forward:?}, {} flows", spaces.rewriter.flows.len()));
        }
    }
    spaces.converse(&mut dice, client_isn)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_connection_of_two_guests_is_one(seed: u64) {
        prop_assert_eq!(two_spaces_are_one(seed), Ok(()));
    }

    #[test]
    fn a_connection_lives_until_both_have_closed_it(seed: u64) {
        prop_assert_eq!(half_closed_is_alive(seed), Ok(()));
    }

    #[test]
    fn a_flood_forgets_no_connection_that_is_translated(seed: u64) {
        prop_assert_eq!(a_flood_breaks_nothing(seed), Ok(()));
    }
}

#[test]
fn every_property_sees_its_planted_bug() {
    for mutant in Mutant::OF_REWRITING {
        let property = match mutant {
            Mutant::LeaveSack | Mutant::LeaveEcho | Mutant::SumPartial | Mutant::ClockGoesBack => two_spaces_are_one,
            Mutant::ForgetHalfClosed => half_closed_is_alive,
            Mutant::WipeWhenFull => a_flood_breaks_nothing,
            other => panic!("no property for {other:?}"),
        };
        plant(Some(mutant));
        let caught = (0..100).filter(|seed| property(*seed).is_err()).count();
        plant(None);
        assert!(caught > 0, "{mutant:?}");
    }
}
