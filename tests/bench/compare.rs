//! The comparator behind its sockets against QEMU's own and against a plain relay: `scripts/bench.sh compare`.
//!
//! ```text
//!   sender ─┬─▶ primary_in ───┐                    relay: primary_in ─▶ outdev, secondary_in ─▶ nowhere
//!           └─▶ secondary_in ─┴─▶ outdev ─▶ receiver
//! ```
//!
//! All are processes of their own behind Unix sockets of the same kind, and hear the same frames in turn: every cell of
//! each round is measured with all of them, one behind the other, and a ratio is the median of the rounds' ratios.
//! `target/bench/compare.json` has every figure. A frame counts when it has come out. No more than a window of batches
//! is under way, far below what QEMU drops; where it stalls all the same it is told that a checkpoint was made, and
//! that is counted.
//!
//! One frame in flight is received by who is awake: waking up takes as long as all the rest, and is the same for all. (What it
//! takes to a sleeper is told too.) What this can be at best is told by a relay that waits for both guests and stays awake.
//!
//! The engine alone runs in this process, which is built with the mutants in, and is held against a comparison of the
//! same frames in memory. ROUNDS (3) and CELL_SECONDS (1) change how long it takes, CELLS (part of a name) which cells.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on ends")]

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use xen_colo::clock;
use xen_colo::compare::{Comparator, Config, Output};

const PORTS: [&str; 4] = ["primary-in", "secondary-in", "outdev", "notify-dev"];
/// Batches under way.
const WINDOW: u64 = 4;
/// A comparator that lets nothing out for so long has stalled.
const STALL: Duration = Duration::from_secs(1);
/// A comparator that has stalled so often loses frames.
const STALLS_MAX: u64 = 50;
/// Frames sent alone.
const ALONE: usize = 3000;
/// How long our comparator, and a relay, stays awake for what may come.
const AWAKE: Duration = Duration::from_micros(50);
/// The names in the report, in the order of each first turn. The last is for latencies only.
const NAMES: [&str; 4] = ["xl-colo", "qemu", "relay", "awake-relay"];

/// What is sent.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    protocol: u8,
    connections: usize,
    frame_bytes: usize,
    /// Frames written with one call.
    batch: usize,
    /// How many times QEMU's frames per second are aimed at.
    aim: f64,
    /// How much of the relay's.
    relay_aim: Option<f64>,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "tcp 1448 B, 1 connection",
        protocol: 6,
        connections: 1,
        frame_bytes: 1502,
        batch: 64,
        aim: 5.0,
        relay_aim: Some(0.8),
    },
    Shape {
        name: "tcp 1448 B, 64 connections",
        protocol: 6,
        connections: 64,
        frame_bytes: 1502,
        batch: 64,
        aim: 5.0,
        relay_aim: Some(0.8),
    },
    Shape {
        name: "tcp 64 B, 64 connections",
        protocol: 6,
        connections: 64,
        frame_bytes: 64,
        batch: 1024,
        aim: 10.0,
        relay_aim: None,
    },
    Shape {
        name: "udp 64 B, 64 connections",
        protocol: 17,
        connections: 64,
        frame_bytes: 64,
        batch: 1024,
        aim: 10.0,
        relay_aim: None,
    },
    Shape {
        name: "tcp 64 KiB segments, 1 connection",
        protocol: 6,
        connections: 1,
        frame_bytes: 65_549,
        batch: 1,
        aim: 5.0,
        relay_aim: Some(0.8),
    },
];

/// A batch of frames in QEMU's framing, which becomes the next one in place.
struct Batch {
    shape: Shape,
    wire: Vec<u8>,
    seq: Vec<u32>,
    count: u32,
}

impl Batch {
    /// `client` is part of the addresses, so that no two measurements share a connection.
    fn new(shape: Shape, client: u16) -> Self {
        let mut wire = Vec::new();
        for n in 0..shape.batch {
            let begin = wire.len();
            wire.extend((shape.frame_bytes as u32).to_be_bytes());
            wire.extend([0x52, 0x54, 0, 0, 0, 9, 0x52, 0x54, 0, 0, 0, 2, 8, 0, 0x45, 0]);
            wire.extend(((shape.frame_bytes - 14) as u16).to_be_bytes());
            wire.extend([0, 0, 0, 0, 64, shape.protocol, 0, 0, 10, 0, 0, 2, 10, 9]);
            wire.extend(client.to_be_bytes());
            wire.extend([80_u16.to_be_bytes(), (1024 + (n % shape.connections) as u16).to_be_bytes()].concat());
            match shape.protocol {
                6 => wire.extend([[0; 4], 1_u32.to_be_bytes(), [0x50, 0x18, 0x20, 0], [0; 4]].concat()),
                _ => wire.extend([((shape.frame_bytes - 34) as u16).to_be_bytes(), [0; 2]].concat()),
            }
            wire.extend((wire.len() - begin - 4..shape.frame_bytes).map(|at| (at % 251) as u8));
        }
        Self { shape, wire, seq: vec![1000; shape.connections], count: 0 }
    }

    fn next(&mut self) {
        let payload_bytes = (self.shape.frame_bytes - 54) as u32;
        for (n, message) in self.wire.chunks_exact_mut(4 + self.shape.frame_bytes).enumerate() {
            self.count += 1;
            if self.shape.protocol == 6 {
                let seq = &mut self.seq[n % self.shape.connections];
                message[42..46].copy_from_slice(&seq.to_be_bytes());
                *seq = seq.wrapping_add(payload_bytes);
            }
            message[60..64].copy_from_slice(&self.count.to_be_bytes());
        }
    }
}

/// A process behind four sockets.
struct Server {
    process: Child,
    links: [UnixStream; 4],
    stalls: u64,
}

impl Server {
    fn start(name: &str, binary: &Path, dir: &Path) -> Option<Self> {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        let at = |port: &str| dir.join(port).display().to_string();
        let mut command = match name {
            "xl-colo" => {
                let mut command = Command::new(binary);
                command
                    .arg("compare")
                    .args(PORTS.iter().flat_map(|port| [format!("--{port}"), format!("unix:{}", at(port))]));
                command
            }
            "qemu" => {
                let mut command = Command::new("qemu-system-x86_64");
                command.args([
                    "-machine",
                    "none",
                    "-S",
                    "-nodefaults",
                    "-display",
                    "none",
                    "-object",
                    "iothread,id=io",
                ]);
                for port in PORTS {
                    command.args(["-chardev", &format!("socket,id={port},path={},server=on,wait=off", at(port))]);
                }
                let object = "colo-compare,id=c,primary_in=primary-in,secondary_in=secondary-in,outdev=outdev,notify_dev=notify-dev,iothread=io";
                command.args(["-object", object]);
                command
            }
            _ => {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.arg(name).arg(&dir);
                command
            }
        };
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
        let links = PORTS.map(|port| connect(&dir.join(port)));
        links[2].set_read_timeout(Some(STALL)).unwrap();
        Some(Self { process, links, stalls: 0 })
    }

    /// Frames per second.
    fn rate(&mut self, shape: Shape, client: u16, time: Duration) -> f64 {
        let mut batch = Batch::new(shape, client);
        let batch_bytes = batch.wire.len() as u64;
        let [mut primary, mut secondary, mut out, mut notify] =
            self.links.each_ref().map(|link| link.try_clone().unwrap());
        let (received, sent, over) =
            (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let sender = {
            let (received, sent, over) = (received.clone(), sent.clone(), over.clone());
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let under_way = sent.load(Ordering::Relaxed) - received.load(Ordering::Acquire) / batch_bytes;
                    if under_way >= WINDOW {
                        std::thread::park_timeout(Duration::from_millis(1));
                        continue;
                    }
                    batch.next();
                    sent.fetch_add(1, Ordering::Release);
                    primary.write_all(&batch.wire).unwrap();
                    secondary.write_all(&batch.wire).unwrap();
                }
            })
        };
        let (begun, mut buffer) = (Instant::now(), vec![0; 256 << 10]);
        let (mut counted, mut elapsed) = (0, Duration::ZERO);
        loop {
            let bytes = match out.read(&mut buffer) {
                Ok(bytes) => bytes as u64,
                Err(_) => {
                    self.stalls += 1;
                    notify.write_all(b"\0\0\0\x0fCOLO_CHECKPOINT").unwrap();
                    0
                }
            };
            let total = received.fetch_add(bytes, Ordering::AcqRel) + bytes;
            sender.thread().unpark();
            if !over.load(Ordering::Relaxed) {
                (counted, elapsed) = (total, begun.elapsed());
                over.store(elapsed >= time, Ordering::Relaxed);
            }
            // At the end all that was sent is waited for, and no more.
            let all = || total == sent.load(Ordering::Acquire) * batch_bytes;
            while over.load(Ordering::Relaxed) && all() && !sender.is_finished() {
                std::thread::yield_now();
            }
            if sender.is_finished() && all() {
                break;
            }
            assert!(self.stalls < STALLS_MAX, "it has stalled {STALLS_MAX} times");
        }
        sender.thread().unpark();
        sender.join().unwrap();
        counted as f64 / (4 + shape.frame_bytes) as f64 / elapsed.as_secs_f64()
    }

    /// From the first byte in to the last byte out of one frame in flight, in us: the median and the 99th percentile.
    /// `awake`: without the time in which who receives it wakes up, which is the same for all.
    fn latency(&mut self, shape: Shape, client: u16, awake: bool) -> [f64; 2] {
        let mut batch = Batch::new(Shape { batch: 1, connections: 1, ..shape }, client);
        let [mut primary, mut secondary, mut out, mut notify] =
            self.links.each_ref().map(|link| link.try_clone().unwrap());
        let (mut times, mut buffer) = (Vec::with_capacity(ALONE), vec![0; batch.wire.len()]);
        for _ in 0..ALONE {
            batch.next();
            let begun = Instant::now();
            primary.write_all(&batch.wire).unwrap();
            secondary.write_all(&batch.wire).unwrap();
            let mut at = 0;
            while at < buffer.len() {
                let read = if awake { read_awake(&out, &mut buffer[at..]) } else { out.read(&mut buffer[at..]) };
                match read {
                    Ok(bytes) => at += bytes,
                    Err(_) => {
                        self.stalls += 1;
                        notify.write_all(b"\0\0\0\x0fCOLO_CHECKPOINT").unwrap();
                    }
                }
            }
            times.push(begun.elapsed());
            assert!(buffer == batch.wire, "another frame came out");
        }
        times.sort_unstable();
        [times[ALONE / 2], times[ALONE * 99 / 100]].map(|time| time.as_secs_f64() * 1e6)
    }
}

/// Reads without ever going to sleep, for as long as a read that does would wait.
fn read_awake(out: &UnixStream, into: &mut [u8]) -> std::io::Result<usize> {
    let begun = Instant::now();
    while begun.elapsed() < STALL {
        match recv(out, &mut *into, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => std::thread::yield_now(),
            read => return Ok(read?.0),
        }
    }
    Err(std::io::ErrorKind::TimedOut.into())
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn connect(path: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(30), "{}: {error}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What no comparator can be faster than by much: the same copies, and no look at what is copied.
fn relay(dir: &Path) {
    let [mut primary, mut secondary, mut out, _notify] = accept(dir);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        while secondary.read(&mut buffer).is_ok_and(|bytes| bytes > 0) {}
    });
    let mut buffer = vec![0; 256 << 10];
    while let Ok(bytes) = primary.read(&mut buffer)
        && bytes > 0
        && out.write_all(&buffer[..bytes]).is_ok()
    {}
}

/// The same for one frame in flight: what both have said leaves, and nobody sleeps who was called a moment ago.
fn awake_relay(dir: &Path) {
    let [primary, secondary, mut out, _notify] = accept(dir);
    let (mut buffer, mut other) = (vec![0; 256 << 10], vec![0; 256 << 10]);
    let (mut ours_bytes, mut theirs_bytes, mut moved) = (0, 0, Instant::now());
    loop {
        let ours = recv(&primary, &mut buffer[ours_bytes..], RecvFlags::DONTWAIT).map(|read| read.0);
        let theirs = recv(&secondary, &mut other[..], RecvFlags::DONTWAIT).map(|read| read.0);
        if ours == Ok(0) || theirs == Ok(0) {
            return;
        }
        ours_bytes += ours.unwrap_or_default();
        theirs_bytes += theirs.unwrap_or_default();
        let both_bytes = ours_bytes.min(theirs_bytes);
        if both_bytes > 0 {
            out.write_all(&buffer[..both_bytes]).unwrap();
            buffer.copy_within(both_bytes..ours_bytes, 0);
            (ours_bytes, theirs_bytes) = (ours_bytes - both_bytes, theirs_bytes - both_bytes);
        }
        if ours.is_ok() || theirs.is_ok() {
            moved = Instant::now();
        } else if moved.elapsed() < AWAKE {
            std::thread::yield_now();
        } else {
            let mut fds = [&primary, &secondary].map(|link| PollFd::new(link, PollFlags::IN));
            let _ = poll(&mut fds, None);
            moved = Instant::now();
        }
    }
}

fn accept(dir: &Path) -> [UnixStream; 4] {
    PORTS.map(|port| UnixListener::bind(dir.join(port)).unwrap()).map(|listener| listener.accept().unwrap().0)
}

/// The engine without sockets: frames per second, and its time over that of a comparison of the same bytes.
fn engine(shape: Shape, time: Duration) -> [f64; 2] {
    let (mut machine, mut batch) = (Comparator::new(Config::default()), Batch::new(shape, 1));
    let (mut busy, mut compared, mut frames) = (Duration::ZERO, Duration::ZERO, 0_u64);
    let begun = Instant::now();
    while begun.elapsed() < time {
        batch.next();
        let blocks = [Bytes::copy_from_slice(&batch.wire), Bytes::copy_from_slice(&batch.wire)];
        let message_bytes = 4 + shape.frame_bytes;
        let now = clock::Instant::from_micros(begun.elapsed().as_micros() as u64);
        let turn = Instant::now();
        for at in (0..batch.wire.len()).step_by(message_bytes) {
            machine.handle_primary(now, 0, blocks[0].slice(at + 4..at + message_bytes));
        }
        for at in (0..batch.wire.len()).step_by(message_bytes) {
            machine.handle_secondary(now, 0, blocks[1].slice(at + 4..at + message_bytes));
        }
        let mut released = 0;
        while let Some(output) = machine.poll_output() {
            match output {
                Output::Release(frame) => released += usize::from(!frame.is_empty()),
                Output::Diverged { cause, .. } => panic!("{cause}"),
            }
        }
        busy += turn.elapsed();
        assert_eq!(released, shape.batch);
        frames += released as u64;
        let turn = Instant::now();
        assert!(std::hint::black_box(&blocks[0]) == std::hint::black_box(&blocks[1]));
        compared += turn.elapsed();
    }
    [frames as f64 / busy.as_secs_f64(), busy.as_secs_f64() / compared.as_secs_f64()]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let binary = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["relay", dir] => return relay(Path::new(dir)),
        ["awake-relay", dir] => return awake_relay(Path::new(dir)),
        [binary] => PathBuf::from(binary),
        _ => return eprintln!("scripts/bench.sh compare starts this"),
    };
    let (rounds, time) = (setting("ROUNDS", 3), Duration::from_secs(setting("CELL_SECONDS", 1)));
    let dir = tempfile::tempdir().unwrap();
    let mut servers: Vec<(&str, Server)> = Vec::new();
    for name in NAMES {
        match Server::start(name, &binary, dir.path()) {
            Some(server) => servers.push((name, server)),
            None => {
                return eprintln!("SKIP: {name} does not start; scripts/install-deps.sh installs qemu-system-x86_64");
            }
        }
    }
    let mut cells = Vec::new();
    let mut client = 0;
    let chosen = std::env::var("CELLS").unwrap_or_default();
    for shape in SHAPES.into_iter().filter(|shape| shape.name.contains(&chosen)) {
        // By server, by round: frames per second, latencies.
        let mut rates = vec![Vec::new(); NAMES.len()];
        let mut latencies = vec![[Vec::new(), Vec::new(), Vec::new()]; NAMES.len()];
        for round in 0..rounds as usize {
            for turn in 0..NAMES.len() {
                let at = (turn + round) % NAMES.len();
                let server = &mut servers[at].1;
                if NAMES[at] != "awake-relay" {
                    client += 1;
                    rates[at].push(server.rate(shape, client, time));
                }
                client += 1;
                let [p50, p99] = server.latency(shape, client, true);
                client += 1;
                let [asleep, _] = server.latency(shape, client, false);
                latencies[at].iter_mut().zip([p50, p99, asleep]).for_each(|(all, time)| all.push(time));
            }
        }
        let ratio =
            |other: usize| median(rates[0].iter().zip(&rates[other]).map(|(ours, other)| ours / other).collect());
        let slower = |server: usize, which: usize| {
            median(latencies[server][which].iter().zip(&latencies[1][which]).map(|(it, qemu)| it / qemu).collect())
        };
        let [slower, slower_asleep, possible] = [slower(0, 0), slower(0, 2), slower(3, 0)];
        let [alone, over_memory] = engine(shape, time);
        let rate = |at: usize| median(rates[at].clone()).round();
        let at = |server: usize, which: usize| (median(latencies[server][which].clone()) * 10.0).round() / 10.0;
        println!("{}", shape.name);
        let [ours, qemu, relay] = [0, 1, 2].map(rate);
        println!(
            "  frames/s              ours {ours:>9}   QEMU {qemu:>9}   relay {relay:>9}   engine alone {:>9}",
            alone.round()
        );
        println!("  of QEMU's             {:.1} (aim {})", ratio(1), shape.aim);
        let aim = shape.relay_aim.map_or(String::new(), |aim| format!(" (aim {aim})"));
        println!("  of the relay's        {:.2}{aim}", ratio(2));
        println!(
            "  one in flight, us     ours {} p99 {}   QEMU {} p99 {}   relay {} p99 {}   ours/QEMU {slower:.2} (aim 0.5, relay {possible:.2})",
            at(0, 0),
            at(0, 1),
            at(1, 0),
            at(1, 1),
            at(3, 0),
            at(3, 1)
        );
        println!("  to a sleeper, us      ours {}   QEMU {}   ours/QEMU {slower_asleep:.2}", at(0, 2), at(1, 2));
        let aim = if shape.frame_bytes > 1500 { " (aim 2)" } else { "" };
        println!("  engine / memory       {over_memory:.1}{aim}");
        cells.push(json!({
            "cell": shape.name,
            "frames_per_second": {"xl-colo": ours, "qemu": qemu, "relay": relay, "engine": alone.round()},
            "latency_p50_us": {"xl-colo": at(0, 0), "qemu": at(1, 0), "relay": at(3, 0)},
            "latency_p99_us": {"xl-colo": at(0, 1), "qemu": at(1, 1), "relay": at(3, 1)},
            "latency_to_a_sleeper_p50_us": {"xl-colo": at(0, 2), "qemu": at(1, 2)},
            "ratio_to_qemu": ratio(1), "aim_ratio_to_qemu": shape.aim,
            "ratio_to_relay": ratio(2), "aim_ratio_to_relay": shape.relay_aim,
            "latency_ratio_to_qemu": slower, "aim_latency_ratio_to_qemu": 0.5,
            "latency_to_a_sleeper_ratio_to_qemu": slower_asleep, "latency_of_relay_ratio_to_qemu": possible,
            "engine_time_over_memory_compare": over_memory,
        }));
    }
    let stalls: serde_json::Map<_, _> =
        servers.iter().map(|(name, server)| ((*name).into(), server.stalls.into())).collect();
    println!("stalls that only a checkpoint ended: {}", serde_json::Value::Object(stalls.clone()));
    std::fs::create_dir_all("target/bench").unwrap();
    let report = json!({"rounds": rounds, "cell_seconds": time.as_secs(), "cells": cells, "stalls": stalls});
    std::fs::write("target/bench/compare.json", serde_json::to_string_pretty(&report).unwrap()).unwrap();
}
