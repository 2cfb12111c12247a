//! Our comparator and QEMU's own over the same random traffic: where their verdicts differ, a defect has a name.
//!
//! ```text
//!  exchange: what guest A sent, what guest B sent, who was first ─┬─▶ xl-colo compare ─▶ verdict ┐
//!                                                                 └─▶ colo-compare ────▶ verdict ┴ equal, or the twist of
//!                                                                                                  the exchange has a name
//! ```
//!
//! Each exchange is a conversation of its own with at most one twist. Its verdict is which of guest A's frames left
//! before a checkpoint, and whether one was asked for. Nothing is timed: a pair of equal datagrams behind the frames of
//! both guests leaves when all before it has been judged, and an instruction on notify_dev is answered behind whatever
//! was asked before. Both comparators' time-outs are out of the way.
//!
//! The names are those of the defects of `net/colo-compare.c` and `net/colo.c` as read; each must show at least once,
//! so that the table has no dead rows. The oracle itself is proved by tampering with what one of the two hears.

use crate::common::comparator::{Comparator, Peer};
use crate::common::frames::{Segment, ethernet, ipv4, ping, udp};
use crate::sim::dice::Dice;
use std::collections::BTreeMap;

/// Exchanges of one run.
const EXCHANGES: u32 = 3_000;

/// How QEMU may be wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// What should wait leaves.
    Leaks,
    /// What should leave waits, or a checkpoint is asked for in vain.
    Stalls,
    /// Either, by how the segments lie.
    Both,
}

/// Of QEMU from about 6.1 on: the queues were turned round, and what is not TCP is still put in at the old end.
const NEWEST_FIRST: &str = "datagrams are served newest first";

/// What an exchange has in it, the defect of QEMU's it meets, and which way that goes. None: they must agree.
const TWISTS: [(&str, Option<(&str, Way)>); 26] = [
    ("tcp", None),
    ("tcp, other segments", None),
    ("tcp, a byte differs", None),
    ("tcp, the end is missing", None),
    ("tcp, both acknowledge", None),
    ("tcp, a segment is missing", Some(("where segments begin is not compared", Way::Stalls))),
    ("tcp, sent again", Some(("what has nothing new waits for company", Way::Stalls))),
    ("tcp, acknowledged twice by one", Some(("what has nothing new waits for company", Way::Stalls))),
    (
        "tcp, acknowledged further",
        Some(("equal segments leave whatever they acknowledge, unequal ones never", Way::Both)),
    ),
    // QEMU 6.0 takes the larger number, and asks for a checkpoint; 7.2 takes the later one.
    ("tcp, acknowledgements wrap", None),
    ("tcp, one ends", Some(("flags are not compared", Way::Leaks))),
    ("tcp, one resets", Some(("flags are not compared", Way::Leaks))),
    ("tcp, one pads", Some(("padding counts as payload", Way::Both))),
    ("udp, a single one", None),
    ("udp, a single one differs", None),
    ("udp, a single one is missing", None),
    ("udp", Some((NEWEST_FIRST, Way::Stalls))),
    ("udp, a byte differs", Some((NEWEST_FIRST, Way::Both))),
    ("udp, the end is missing", Some((NEWEST_FIRST, Way::Stalls))),
    // Both, since ours holds the n-th of one guest against the n-th of the other, and QEMU what is left against all.
    ("udp, another order", Some(("a late partner is a difference", Way::Both))),
    ("udp, one is missing", Some(("a late partner is a difference", Way::Both))),
    ("udp, one pads", Some(("padding counts as payload", Way::Both))),
    ("icmp, a single one", None),
    ("icmp", Some((NEWEST_FIRST, Way::Stalls))),
    ("icmp, one of two is missing", Some(("all pings of a client are one connection", Way::Stalls))),
    ("unsupported", Some(("what is not understood leaves uncompared", Way::Leaks))),
];

/// What both guests send.
#[derive(Clone, Default, Debug)]
struct Exchange {
    twist: usize,
    primary: Vec<Vec<u8>>,
    secondary: Vec<Vec<u8>>,
    secondary_first: bool,
}

/// Cuts a stream into segments.
fn segments(stream: &[u8], first: &Segment, dice: &mut Dice) -> Vec<Segment> {
    let (mut at, mut found) = (0, Vec::new());
    while at < stream.len() {
        let len = (dice.range(1, 1400) as usize).min(stream.len() - at);
        let payload = stream[at..at + len].to_vec();
        found.push(Segment { seq: first.seq.wrapping_add(at as u32), payload, ..first.clone() });
        at += len;
    }
    found
}

fn bytes(dice: &mut Dice, low: u64, high: u64) -> Vec<u8> {
    (0..dice.range(low, high)).map(|_| dice.next() as u8).collect()
}

fn flip(payload: &mut [u8], dice: &mut Dice) {
    let at = dice.below(payload.len() as u64) as usize;
    payload[at] ^= 1 << dice.below(8);
}

fn pad(frame: &mut Vec<u8>) {
    frame.resize((frame.len() + 6).max(60), 0);
}

/// The `number`th exchange: its addresses are its own.
fn exchange(number: u32, dice: &mut Dice) -> Exchange {
    let twist = dice.below(TWISTS.len() as u64) as usize;
    let kind = TWISTS[twist].0;
    let client = ([10, 1, (number >> 8) as u8, number as u8], 1024 + dice.below(60_000) as u16);
    let mut it = Exchange { twist, secondary_first: dice.percent(50), ..Exchange::default() };
    match kind.split(',').next() {
        Some("tcp") => tcp(&mut it, kind, client, dice),
        Some("udp") => {
            let count = if kind.contains("single") { 1 } else { dice.range(2, 6) as usize };
            let mut payloads: Vec<Vec<u8>> =
                (0..count).map(|n| [vec![n as u8], bytes(dice, 20, 1200)].concat()).collect();
            let send = |payloads: &[Vec<u8>], ident: u16| -> Vec<Vec<u8>> {
                payloads.iter().enumerate().map(|(n, bytes)| udp(53, client, ident + n as u16, bytes)).collect()
            };
            it.primary = send(&payloads, 0);
            match kind {
                "udp, a byte differs" | "udp, a single one differs" => {
                    flip(&mut payloads[dice.below(count as u64) as usize][1..], dice)
                }
                "udp, the end is missing" | "udp, a single one is missing" => payloads.truncate(count - 1),
                "udp, another order" => payloads.swap(0, count - 1),
                "udp, one is missing" => drop(payloads.remove(dice.below(count as u64 - 1) as usize)),
                _ => {}
            }
            it.secondary = send(&payloads, 100);
            if kind == "udp, one pads" {
                pad(&mut it.secondary[0]);
            }
        }
        Some("icmp") => {
            let count = if kind.contains("single") { 1 } else { dice.range(2, 4) as u8 };
            let data = bytes(dice, 8, 100);
            let send = |ident: u16| -> Vec<Vec<u8>> {
                (0..count).map(|n| ping(client.0, u16::from(n) + 1, 1, ident + u16::from(n), &data)).collect()
            };
            (it.primary, it.secondary) = (send(0), send(100));
            if kind == "icmp, one of two is missing" {
                it.secondary.remove(0);
            }
        }
        _ => {
            let mut unlike = |wrap: &dyn Fn(&[u8]) -> Vec<u8>| {
                it.primary = vec![wrap(&bytes(dice, 60, 600))];
                it.secondary = vec![wrap(&bytes(dice, 60, 600))];
            };
            match number % 3 {
                0 => unlike(&|payload| ethernet(0x86dd, &[&[0x60; 6], &[59, 64][..], &[7; 32], payload].concat())),
                1 => unlike(&|payload| {
                    let frame = udp(7, client, 0, payload);
                    [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat()
                }),
                // A datagram in two, of which the secondary sent the second half only.
                _ => {
                    let [first, second] = [(0x2000, 800), (100, 300)]
                        .map(|(fragment, len)| ipv4(client.0, 17, 9, fragment, &bytes(dice, len, len)));
                    it.secondary = vec![second.clone()];
                    it.primary = vec![first, second];
                }
            }
        }
    }
    it
}

fn tcp(it: &mut Exchange, kind: &str, client: ([u8; 4], u16), dice: &mut Dice) {
    let seq = if dice.percent(25) { 0_u32.wrapping_sub(dice.range(1, 3000) as u32) } else { dice.next() as u32 };
    let ack = dice.range(1, 1 << 30) as u32;
    let first = Segment { client, seq, ack, flags: 0x18, payload: Vec::new() };
    let stream = bytes(dice, 2800, 6000);
    let mut primary = segments(&stream, &first, dice);
    let mut secondary = primary.clone();
    if !matches!(kind, "tcp" | "tcp, a segment is missing" | "tcp, one pads") && dice.percent(60) {
        secondary = segments(&stream, &first, dice);
    }
    let end = seq.wrapping_add(stream.len() as u32);
    let pure = |ack: u32| Segment { seq: end, ack, flags: 0x10, ..first.clone() };
    match kind {
        "tcp, other segments" => secondary = segments(&stream, &first, dice),
        "tcp, a byte differs" => {
            let at = dice.below(secondary.len() as u64) as usize;
            flip(&mut secondary[at].payload, dice);
        }
        "tcp, the end is missing" => secondary.truncate(secondary.len() - 1),
        "tcp, both acknowledge" => {
            primary.push(pure(ack + 100));
            secondary.push(pure(ack + 100));
        }
        "tcp, a segment is missing" => drop(secondary.remove(dice.below(secondary.len() as u64 - 1) as usize)),
        "tcp, sent again" => primary.push(primary[dice.below(primary.len() as u64) as usize].clone()),
        "tcp, acknowledged twice by one" => {
            primary.extend([pure(ack + 50), pure(ack + 100)]);
            secondary.push(pure(ack + 100));
        }
        "tcp, acknowledged further" => {
            let last = primary.len() - 1;
            primary[last].ack += 1000;
        }
        "tcp, acknowledgements wrap" => {
            // Each guest acknowledges up to just below the wrap at first, and beyond it at last.
            for segments in [&mut primary, &mut secondary] {
                segments.iter_mut().for_each(|segment| segment.ack = 0_u32.wrapping_sub(100));
                segments.last_mut().unwrap().ack = 100;
            }
        }
        "tcp, one ends" => primary.last_mut().unwrap().flags |= 1,
        "tcp, one resets" => {
            primary.push(Segment { flags: 0x14, ..pure(ack) });
            // Whatever else the secondary says lets QEMU's pass.
            secondary.push(pure(ack));
        }
        _ => {}
    }
    it.primary = primary.iter().enumerate().map(|(n, segment)| segment.frame(n as u16)).collect();
    it.secondary = secondary.iter().enumerate().map(|(n, segment)| segment.frame(100 + n as u16)).collect();
    if kind == "tcp, one pads" {
        pad(it.secondary.last_mut().unwrap());
    }
}

/// Which of guest A's frames left without a checkpoint, and whether one was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Verdict {
    left: Vec<usize>,
    asked: bool,
}

/// A comparator and its four neighbours.
struct Judge {
    primary: Peer,
    secondary: Peer,
    out: Peer,
    notify: Peer,
    markers: u32,
    _comparator: Comparator,
}

impl Judge {
    fn new(comparator: Comparator) -> Self {
        let [primary, secondary, out, notify] = comparator.connect_all();
        Self { primary, secondary, out, notify, markers: 0, _comparator: comparator }
    }

    /// Waits until all that was sent is judged; adds what left meanwhile.
    fn settle(&mut self, left: &mut Vec<Vec<u8>>) {
        self.markers += 1;
        let marker = udp(9, ([10, 9, 9, 9], 9), 0, format!("marker {:08}, and no more", self.markers).as_bytes());
        self.primary.send(&marker);
        self.secondary.send(&marker);
        loop {
            let frame = self.out.hear();
            if frame == marker {
                return;
            }
            left.push(frame);
        }
    }

    fn judge(&mut self, it: &Exchange) -> Verdict {
        let mut left = Vec::new();
        let [first, second] = if it.secondary_first { [1, 0] } else { [0, 1] };
        for turn in [first, second] {
            let (peer, frames) =
                if turn == 0 { (&mut self.primary, &it.primary) } else { (&mut self.secondary, &it.secondary) };
            frames.iter().for_each(|frame| peer.send(frame));
            self.settle(&mut left);
        }
        self.notify.send(b"COLO_USERSPACE_PROXY_INIT");
        let mut asked = false;
        while self.notify.hear() != b"COLO_COMPARE_GET_XEN_INIT" {
            asked = true;
        }
        let verdict = Verdict { left: numbers(&it.primary, &left), asked };
        self.notify.send(b"COLO_CHECKPOINT");
        while left.len() < it.primary.len() {
            left.push(self.out.hear());
        }
        let all: Vec<usize> = (0..it.primary.len()).collect();
        assert_eq!(numbers(&it.primary, &left), all, "each frame leaves once");
        // What comes next must not meet the checkpoint.
        self.notify.send(b"COLO_USERSPACE_PROXY_INIT");
        assert_eq!(self.notify.hear(), b"COLO_COMPARE_GET_XEN_INIT");
        verdict
    }
}

/// Which frames these are.
fn numbers(of: &[Vec<u8>], frames: &[Vec<u8>]) -> Vec<usize> {
    let mut found: Vec<usize> =
        frames.iter().map(|frame| of.iter().position(|one| one == frame).expect("a frame of the primary")).collect();
    found.sort_unstable();
    found
}

/// Frames for people: lengths, and of TCP the numbers too.
fn brief(frames: &[Vec<u8>]) -> String {
    let word = |frame: &[u8], at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
    let one = |frame: &Vec<u8>| match frame[23] {
        6 => format!("{:#x}+{} ack {:#x}", word(frame, 38), frame.len() - 54, word(frame, 42)),
        _ => format!("{} bytes", frame.len()),
    };
    frames.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Whether this is a way in which QEMU may differ from us.
fn is_named(way: Way, ours: &Verdict, qemu: &Verdict) -> bool {
    let within = |small: &Verdict, large: &Verdict| small.left.iter().all(|frame| large.left.contains(frame));
    match way {
        Way::Leaks => within(ours, qemu),
        Way::Stalls => within(qemu, ours) && (qemu.asked || !ours.asked),
        Way::Both => true,
    }
}

/// Runs exchanges through both; for each defect, how often it showed. `tamper` sees what our comparator hears.
fn differ(count: u32, tamper: impl Fn(&mut Exchange)) -> Option<Result<BTreeMap<&'static str, u32>, String>> {
    let mut qemu = Judge::new(Comparator::qemu(",compare_timeout=1000000,expired_scan_cycle=1000000")?);
    let mut ours = Judge::new(Comparator::ours(&["--compare-timeout", "1000000"]));
    let (mut dice, mut named) = (Dice(5), BTreeMap::new());
    for number in 0..count {
        let it = exchange(number, &mut dice);
        let mut heard = it.clone();
        tamper(&mut heard);
        let (ours, qemu) = (ours.judge(&heard), qemu.judge(&it));
        if ours == qemu {
            continue;
        }
        let (kind, defect) = TWISTS[it.twist];
        match defect {
            Some((name, way)) if is_named(way, &ours, &qemu) => *named.entry(name).or_default() += 1,
            _ => {
                let order = if it.secondary_first { "the secondary first" } else { "the primary first" };
                let [a, b] = [&it.primary, &it.secondary].map(|frames| brief(frames));
                let what = format!("ours {ours:?}, QEMU's {qemu:?}");
                return Some(Err(format!("exchange {number} ({kind}; {order}): {what}\n{a}\n{b}")));
            }
        }
    }
    Some(Ok(named))
}

#[test]
fn verdicts_differ_from_qemu_s_only_where_it_has_a_defect() {
    let count = std::env::var("XEN_COLO_EXCHANGES").ok().and_then(|count| count.parse().ok()).unwrap_or(EXCHANGES);
    let Some(result) = differ(count, |_| {}) else { return };
    let named = result.unwrap_or_else(|difference| panic!("{difference}"));
    for (name, times) in &named {
        eprintln!("{times:5} of {count} exchanges: {name}");
    }
    for (kind, defect) in TWISTS {
        if let Some((name, _)) = defect {
            assert!(named.contains_key(name), "{name} ({kind}) never showed");
        }
    }
}

#[test]
fn a_difference_without_a_name_is_found() {
    // One of the two hears another byte: what a comparator that overlooks one would do.
    let result = differ(200, |it| {
        if TWISTS[it.twist].0 == "tcp"
            && let Some(byte) = it.secondary.last_mut().and_then(|frame| frame.last_mut())
        {
            *byte ^= 1;
        }
    });
    if let Some(result) = result {
        assert!(result.unwrap_err().contains("(tcp;"), "the tampered exchange is the one that is found");
    }
    // One of the two never hears a datagram: what a comparator that loses one would do.
    let result = differ(200, |it| {
        if TWISTS[it.twist].0 == "udp, a single one" {
            it.secondary.pop();
        }
    });
    if let Some(result) = result {
        assert!(result.unwrap_err().contains("(udp, a single one;"), "the tampered exchange is the one that is found");
    }
}
