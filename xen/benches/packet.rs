//! Both ways of receiving frames, on the loopback: `cargo bench -p xen --bench packet`. Needs CAP_NET_RAW.
//!
//! Taking: frames that wait already are taken to the last one; the time of one of them. Alone: a frame is sent, waited
//! for and taken; the time of that. The ways take turns, and what counts is the ratio.

use std::time::{Duration, Instant};
use xen::packet::{PacketSocket, Receive};

const ROUNDS: usize = 15;
const ALONE: usize = 200;
/// Of all frames that wait at once: both ways have room for them.
const WAITING_BYTES: usize = 3 << 20;
const WAITING_MAX: usize = 8000;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn open(receive: Receive) -> PacketSocket {
    let socket = PacketSocket::open_to("lo", receive).expect("a packet socket on lo (CAP_NET_RAW?)");
    assert!(socket.refused().is_none(), "{:?}", socket.refused());
    socket
}

fn frame(bytes: usize) -> Vec<u8> {
    let mut frame = vec![0; bytes];
    // An ethertype for experiments.
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// The time of one frame of many.
fn taking(receive: Receive, sender: &PacketSocket, frame: &[u8]) -> Duration {
    let socket = open(receive);
    let frames = (WAITING_BYTES / (frame.len() + 800)).min(WAITING_MAX);
    (0..frames).for_each(|_| sender.send(frame).expect("send"));
    // A ring's last block.
    std::thread::sleep(Duration::from_millis(20));
    let (mut seen, mut sum, begun) = (0, 0_u64, Instant::now());
    while seen < frames {
        seen += socket.receive(256, &mut |_, frame| sum += u64::from(frame[frame.len() - 1])).expect("receive");
        assert!(begun.elapsed() < Duration::from_secs(5), "{receive:?}: {seen} of {frames}: {:?}", socket.losses());
    }
    std::hint::black_box(sum);
    begun.elapsed() / seen as u32
}

/// The times of single frames.
fn alone(receive: Receive, sender: &PacketSocket, frame: &[u8]) -> Vec<Duration> {
    let socket = open(receive);
    let one = || {
        let (begun, mut seen) = (Instant::now(), 0);
        sender.send(frame).expect("send");
        while seen == 0 {
            socket.poll(Duration::from_secs(1)).expect("poll");
            seen = socket.receive(1, &mut |_, _| ()).expect("receive");
        }
        begun.elapsed()
    };
    (0..ALONE).map(|_| one()).collect()
}

fn main() {
    let sender = open(Receive::Calls);
    println!("{:>12} {:>7} {:>12} {:>12} {:>8}", "", "bytes", "calls", "ring", "calls/ring");
    for bytes in [64, 1514, 65_000] {
        let frame = frame(bytes);
        let mut times = [vec![], vec![]];
        for _ in 0..ROUNDS {
            for (times, receive) in times.iter_mut().zip([Receive::Calls, Receive::Ring]) {
                times.push(taking(receive, &sender, &frame));
            }
        }
        say("taking", bytes, times);
        let mut times = [vec![], vec![]];
        for (times, receive) in times.iter_mut().zip([Receive::Calls, Receive::Ring]) {
            times.extend(alone(receive, &sender, &frame));
        }
        say("alone", bytes, times);
    }
}

fn say(what: &str, bytes: usize, times: [Vec<Duration>; 2]) {
    let [calls, ring] = times.map(median);
    let ratio = calls.as_secs_f64() / ring.as_secs_f64();
    println!("{what:>12} {bytes:>7} {:>12} {:>12} {ratio:>8.2}", format!("{calls:.1?}"), format!("{ring:.1?}"));
}
