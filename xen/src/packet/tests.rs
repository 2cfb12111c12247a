//! A real interface: the loopback, whose TCP leaves checksums and cutting to the card that it has not got.

use super::offload::tests::{checksums_are_right, tcp_payload};
use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

fn loopback() -> Option<PacketSocket> {
    match PacketSocket::open("lo") {
        Ok(socket) => Some(socket),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            println!("SKIP: packet sockets need CAP_NET_RAW");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn what_the_kernel_left_unfinished_is_finished() {
    let Some(socket) = loopback() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port();
    let data: Vec<u8> = (0..300_000u32).map(|n| (n * 7 >> 3) as u8).collect();
    let writer = thread::spawn({
        let data = data.clone();
        move || TcpStream::connect(("127.0.0.1", port)).expect("connect").write_all(&data).expect("write")
    });
    let mut stream = listener.accept().expect("accept").0;
    let mut read = Vec::new();
    stream.read_to_end(&mut read).expect("read");
    writer.join().expect("writer");
    assert_eq!(read, data);
    let (mut seen, mut first, mut frame, mut segments) = (vec![0u8; data.len()], None, Vec::new(), 0);
    while let Some(length) = socket.recv(Duration::from_millis(300), &mut frame).expect("recv") {
        assert_eq!(length, frame.len());
        let Some((sequence, syn, payload)) = tcp_payload(&frame, port) else { continue };
        checksums_are_right(&frame);
        if syn {
            first = Some(sequence.wrapping_add(1));
        }
        let at = sequence.wrapping_sub(first.expect("the SYN comes first")) as usize;
        if !payload.is_empty() {
            segments += 1;
            assert!(frame.len() <= 65536 + 14, "uncut");
            seen[at..at + payload.len()].copy_from_slice(payload);
        }
    }
    assert!(segments > 0);
    assert!(seen == data, "{segments} segments");
    assert_eq!(socket.dropped().expect("statistics"), 0);
}

#[test]
fn nothing_to_receive_is_no_error_and_our_own_frames_do_not_come_back_as_outgoing() {
    let Some(socket) = loopback() else { return };
    let other = socket.try_clone().expect("clone");
    // An ethertype that nobody else uses on this machine.
    let mut frame = vec![0; 60];
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[14..30].copy_from_slice(b"xen-colo-own-one");
    other.send(&frame).expect("send");
    let mut copies = 0;
    let mut into = Vec::new();
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        if socket.recv(Duration::from_millis(50), &mut into).expect("recv").is_some() && into == frame {
            copies += 1;
        }
    }
    // The loopback's other end is itself: once as received, and not once more as sent.
    assert_eq!(copies, 1);
}

#[test]
fn interfaces_that_are_not_there() {
    assert!(PacketSocket::open("no-such-if").is_err());
    assert!(PacketSocket::open("a\0b").is_err());
}

#[test]
fn tags_go_back_behind_the_addresses() {
    let mut auxdata = Auxdata { vlan_tci: 0x2005, vlan_tpid: 0x88a8, ..Default::default() };
    assert_eq!(tag(&auxdata), None);
    auxdata.status = TP_STATUS_VLAN_VALID;
    assert_eq!(tag(&auxdata), Some([0x81, 0, 0x20, 5]));
    auxdata.status |= TP_STATUS_VLAN_TPID_VALID;
    assert_eq!(tag(&auxdata), Some([0x88, 0xa8, 0x20, 5]));
    let mut frame: Vec<u8> = (0..20).collect();
    insert_vlan(&mut frame, Some([0x81, 0, 0, 7]));
    assert_eq!(frame[..18], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0x81, 0, 0, 7, 12, 13]);
    let mut short = vec![1; 11];
    insert_vlan(&mut short, Some([0; 4]));
    assert_eq!(short.len(), 11);
}
