//! What the guest sends over its vif, as it would be on a wire.

use crate::guest;
use std::env;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::thread;
use std::time::Duration;
use xen::packet::PacketSocket;

#[test]
fn a_guests_frames_come_whole_and_finished() {
    let Some(g) = guest("a_guests_frames_come_whole_and_finished") else { return };
    let Ok(ip) = env::var("XEN_COLO_GUEST_IP") else {
        println!("SKIP: XEN_COLO_GUEST_IP says not where the guest is");
        return;
    };
    let ip: IpAddr = ip.parse().expect("an address");
    let socket = PacketSocket::open(&format!("vif{}.0", g.d)).expect("the vif");
    let mut stream = TcpStream::connect((ip, 7)).expect("the guest's echo");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("time-out");
    let data: Vec<u8> = (0..200_000u32).map(|n| (n % 249) as u8).collect();
    let writer = thread::spawn({
        let (mut stream, data) = (stream.try_clone().expect("clone"), data.clone());
        move || stream.write_all(&data).expect("write")
    });
    let mut echo = vec![0; data.len()];
    stream.read_exact(&mut echo).expect("the echo");
    writer.join().expect("writer");
    assert!(echo == data);
    let (mut frames, mut longest, mut payload, mut frame) = (0, 0, 0, Vec::new());
    while let Some(length) = socket.recv(Duration::from_millis(300), &mut frame).expect("recv") {
        // IPv4, TCP, from port 7.
        if frame[12..14] != [8, 0] || frame[23] != 6 || frame[34..36] != [0, 7] {
            continue;
        }
        assert_eq!(sum(&frame[14..34], 0), 0, "the IP header's sum");
        let tcp_length = u16::from_be_bytes([frame[16], frame[17]]) as usize - 20;
        let tcp = &frame[34..34 + tcp_length];
        let pseudo = sum(&frame[26..34], 6 + tcp_length as u64);
        assert_eq!((pseudo + sum(tcp, 0)) % 65535, 0, "the TCP sum");
        payload += tcp_length - usize::from(tcp[12] >> 4) * 4;
        frames += 1;
        longest = longest.max(length);
    }
    println!("{frames} frames of {longest} bytes at most carried {payload} bytes; lost {:?}", socket.losses());
    assert!(longest <= 1514, "a frame longer than the wire's: {longest}");
    assert!(payload >= data.len(), "{payload}");
}

/// The remainder by 65535, which is 0 when a sum is right.
fn sum(bytes: &[u8], start: u64) -> u64 {
    let pairs = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)));
    (start + pairs.sum::<u64>()) % 65535
}
