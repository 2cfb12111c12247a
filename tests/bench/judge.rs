//! The comparator alone, without sockets: what a frame and its partner cost, and a memory compare beside it.
//!
//! ```text
//!   A, A, A… (a batch) ─▶ Comparator ◀─ B, B, B…       then the same batch is taken out; the stream goes on
//! ```
//!
//! `cargo bench --bench judge` prints a line a cell; CELLS, part of a name, chooses some. The frames of both guests are built
//! beforehand, a hundred batches at a time, in buffers of their own, so that nothing is compared with itself.
#![forbid(unsafe_code)]

use bytes::Bytes;
use std::hint::black_box;
use std::time::{Duration, Instant as Clock};
use xen_colo::clock::Instant;
use xen_colo::compare::{Comparator, Config, Output};

/// Frames one guest sends before the other is heard.
const BATCH: usize = 32;
/// How long a cell is measured.
const CELL: Duration = Duration::from_secs(1);

/// Name, whether it is TCP, flows, bytes of a frame.
const CELLS: [(&str, bool, u16, usize); 5] = [
    ("TCP 64 B, 64 flows", true, 64, 64),
    ("UDP 64 B, 64 flows", false, 64, 64),
    ("TCP 1448 B, 1 flow", true, 1, 1502),
    ("TCP 1448 B, 64 flows", true, 64, 1502),
    ("TCP 64 KiB, 1 flow", true, 1, 65_549),
];

/// An IPv4 frame from `10.0.0.2` of `frame_bytes` in all; TCP carries on from `seq`.
fn frame(tcp: bool, flow: u16, seq: u32, frame_bytes: usize) -> Bytes {
    let mut frame = vec![0; frame_bytes];
    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
    frame[16..18].copy_from_slice(&((frame_bytes - 14) as u16).to_be_bytes());
    frame[23] = if tcp { 6 } else { 17 };
    frame[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 9]);
    frame[34..36].copy_from_slice(&80_u16.to_be_bytes());
    frame[36..38].copy_from_slice(&(40_000 + flow).to_be_bytes());
    if tcp {
        frame[38..42].copy_from_slice(&seq.to_be_bytes());
        frame[42..46].copy_from_slice(&7_u32.to_be_bytes());
        (frame[46], frame[47]) = (0x50, 0x10);
    } else {
        frame[38..40].copy_from_slice(&((frame_bytes - 34) as u16).to_be_bytes());
    }
    let payload = if tcp { 54 } else { 42 };
    for (at, byte) in frame[payload..].iter_mut().enumerate() {
        *byte = (seq as usize + at * 31) as u8;
    }
    frame.into()
}

/// Pairs of frames a second, and the payload compared in bytes a second; frame by frame, or two at a time.
fn cell(name: &str, tcp: bool, flows: u16, frame_bytes: usize, in_pairs: bool) -> f64 {
    let mut comparator = Comparator::new(Config::default());
    let payload_bytes = frame_bytes - if tcp { 54 } else { 42 };
    let (mut pairs, mut spent, mut seq) = (0_u64, Duration::ZERO, 1_u32);
    let rounds = (8_000_000 / frame_bytes / BATCH).clamp(1, 100);
    while spent < CELL {
        let mut guests = [Vec::new(), Vec::new()];
        for n in 0..rounds * BATCH {
            let (flow, at) = ((n % usize::from(flows)) as u16, n / usize::from(flows) * payload_bytes);
            for guest in &mut guests {
                guest.push(frame(tcp, flow, seq.wrapping_add(at as u32), frame_bytes));
            }
        }
        seq = seq.wrapping_add((rounds * BATCH).div_ceil(usize::from(flows)) as u32 * payload_bytes as u32);
        // Kept, as the memory compare keeps its own: what freeing them costs is not the comparator's.
        let kept = guests.clone();
        let [mut a, mut b] = guests.map(Vec::into_iter);
        let start = Clock::now();
        for _ in 0..rounds {
            if in_pairs {
                let mut pairs = a.by_ref().zip(b.by_ref()).take(BATCH);
                assert!(pairs.all(|(ours, theirs)| comparator.handle_pair(0, ours, &theirs).is_none()), "{name}");
            } else {
                a.by_ref().take(BATCH).for_each(|frame| comparator.handle_primary(Instant::ZERO, 0, frame));
                b.by_ref().take(BATCH).for_each(|frame| comparator.handle_secondary(Instant::ZERO, 0, frame));
            }
            while let Some(output) = comparator.poll_output() {
                assert!(matches!(black_box(output), Output::Release(_)), "{name} diverged");
            }
        }
        spent += start.elapsed();
        drop(kept);
        pairs += (rounds * BATCH) as u64;
    }
    assert_eq!(comparator.stats().compared, pairs, "{name}: every frame is explained");
    let rate = pairs as f64 / spent.as_secs_f64();
    let name = format!("{name}{}", if in_pairs { ", in pairs" } else { "" });
    println!("{name:30} {rate:>12.0} pairs/s {:>8.0} ns {:>8.2} GB/s", 1e9 / rate, rate * payload_bytes as f64 / 1e9);
    rate
}

/// The same bytes compared by themselves, as cold as the comparator finds them.
fn memory(payload_bytes: usize) -> f64 {
    let count = 8_000_000 / payload_bytes;
    let (mut pairs, mut spent) = (0_u64, Duration::ZERO);
    while spent < CELL {
        let buffer = |_| vec![7_u8; payload_bytes];
        let (a, b): (Vec<_>, Vec<_>) = ((0..count).map(buffer).collect(), (0..count).map(buffer).collect());
        let start = Clock::now();
        assert!(a.iter().zip(&b).all(|(a, b)| black_box(a) == black_box(b)));
        spent += start.elapsed();
        pairs += count as u64;
    }
    let rate = pairs as f64 / spent.as_secs_f64();
    println!(
        "{:30} {rate:>12.0} pairs/s {:>8.0} ns {:>8.2} GB/s",
        "memory compare",
        1e9 / rate,
        rate * payload_bytes as f64 / 1e9
    );
    rate
}

fn main() {
    let chosen = std::env::var("CELLS").unwrap_or_default();
    for (name, tcp, flows, frame_bytes) in CELLS.into_iter().filter(|(name, ..)| name.contains(&chosen)) {
        let rate = cell(name, tcp, flows, frame_bytes, false);
        cell(name, tcp, flows, frame_bytes, true);
        if frame_bytes > 65_000 {
            println!("64 KiB segments take {:.2} of a memory compare's time", memory(frame_bytes - 54) / rate);
        }
    }
}
