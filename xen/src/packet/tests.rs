//! A real interface: the loopback, whose TCP leaves checksums and cutting to the card that it has not got; and a tap.

use super::offload::tests::{checksums_are_right, tcp_payload};
use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

const WAYS: [Receive; 2] = [Receive::Calls, Receive::Ring];
/// An ethertype that nobody else uses on this machine.
const OURS: [u8; 2] = [0x88, 0xb5];

fn loopback(receive: Receive) -> Option<PacketSocket> {
    match PacketSocket::open_to("lo", receive) {
        Ok(socket) => {
            assert!(socket.refused().is_none(), "{:?}", socket.refused());
            Some(socket)
        }
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            println!("SKIP: packet sockets need CAP_NET_RAW");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn what_a_peer_has_not_is_under_way() {
    let (mut one, mut other) = std::os::unix::net::UnixStream::pair().expect("a pair");
    assert_eq!(under_way_bytes(one.as_fd()).expect("a socket"), 0);
    one.write_all(&[1; 100]).expect("write");
    assert!(under_way_bytes(one.as_fd()).expect("a socket") >= 100, "it has not read them");
    other.read_exact(&mut [0; 100]).expect("read");
    assert_eq!(under_way_bytes(one.as_fd()).expect("a socket"), 0);
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let mut here = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (there, _) = listener.accept().expect("accept");
    here.set_nonblocking(true).expect("a socket");
    while here.write(&[0; 1 << 16]).is_ok() {}
    assert!(under_way_bytes(here.as_fd()).expect("a socket") > 0, "its kernel has no room");
    let reader = thread::spawn(move || std::io::copy(&mut &there, &mut std::io::sink()));
    let begun = Instant::now();
    while under_way_bytes(here.as_fd()).expect("a socket") > 0 {
        assert!(begun.elapsed() < Duration::from_secs(30), "it reads");
        thread::sleep(Duration::from_millis(5));
    }
    drop(here);
    reader.join().expect("no panic").expect("all was read");
    let file = std::fs::File::open("/dev/null").expect("there is one");
    assert!(under_way_bytes(file.as_fd()).is_err());
}

#[test]
fn what_the_kernel_left_unfinished_is_finished() {
    WAYS.into_iter().for_each(finished);
}

fn finished(receive: Receive) {
    let Some(socket) = loopback(receive) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port();
    let data: Vec<u8> = (0..300_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
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
    assert_eq!(socket.losses().expect("statistics"), Losses::default());
}

#[test]
fn what_others_send_is_not_received_as_outgoing_and_nothing_is_no_error() {
    WAYS.into_iter().for_each(outgoing);
}

fn outgoing(receive: Receive) {
    let Some(socket) = loopback(receive) else { return };
    // The kernel spares a socket its own frames anyway: it takes another one to see the difference.
    let Some(other) = loopback(receive) else { return };
    let mut frame = vec![0; 60];
    frame[12..14].copy_from_slice(&OURS);
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
    // A clone is the same socket.
    let clone = socket.clone();
    other.send(&frame).expect("send");
    let arrived = |socket: &PacketSocket, into: &mut Vec<u8>| {
        while socket.recv(Duration::from_millis(300), into).expect("recv").is_some() {
            if *into == frame {
                return true;
            }
        }
        false
    };
    assert!(arrived(&clone, &mut into) && !arrived(&socket, &mut into));
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
    let frame: Vec<u8> = (0..20).collect();
    let header = VnetHeader { flags: 1, csum_start: 34, csum_offset: 16, ..VnetHeader::default() };
    let mut seen = Vec::new();
    let mut see = |header: &VnetHeader, frame: &[u8]| seen.push((header.csum_start, frame.to_vec()));
    with_tag(header, &frame, Some([0x81, 0, 0, 7]), &mut see);
    with_tag(header, &frame, None, &mut see);
    with_tag(header, &frame[..11], Some([0; 4]), &mut see);
    let tagged = [&frame[..12], &[0x81, 0, 0, 7], &frame[12..]].concat();
    assert_eq!(seen, [(38, tagged), (34, frame.clone()), (34, frame[..11].to_vec())]);
}

#[test]
fn a_tag_on_the_wire_is_a_tag_in_the_frame() {
    for receive in WAYS {
        let Some(socket) = loopback(receive) else { return };
        let Some(other) = loopback(receive) else { return };
        let mut frame = vec![0; 64];
        frame[12..20].copy_from_slice(&[0x81, 0, 0x20, 5, OURS[0], OURS[1], 1, 2]);
        other.send(&frame).expect("send");
        let mut into = Vec::new();
        while into != frame {
            let some = socket.recv(Duration::from_secs(5), &mut into).expect("recv");
            assert!(some.is_some(), "{receive:?}: it does not come back as it was sent");
        }
    }
}

#[test]
fn what_the_kernel_loses_is_counted() {
    const FRAMES: u64 = 3000;
    let Some(tap) = own_tap() else { return };
    let nothing_left = VnetHeader::default();
    for receive in WAYS {
        let socket = PacketSocket::open_to(&tap.name(), receive).expect("the tap's own device");
        let mut frame = vec![7; 8000];
        frame[12..14].copy_from_slice(&OURS);
        for _ in 0..FRAMES {
            tap.send(&nothing_left, &frame).expect("send");
        }
        let mut seen = 0;
        while socket.poll(Duration::from_millis(300)).expect("poll") {
            socket.read(10_000, &mut |other| seen += u64::from(*other == frame)).expect("read");
            assert!(seen < FRAMES, "{receive:?}: a frame comes twice");
        }
        let losses = socket.losses().expect("statistics");
        println!("{receive:?}: {seen} of {FRAMES} frames came, {losses:?}");
        assert!(seen > 500 && seen < FRAMES && losses.unusable == 0, "{seen} {losses:?}");
        assert_eq!(seen + losses.kernel, FRAMES);
        assert_eq!(socket.losses().expect("statistics"), losses, "since the beginning, not since the last question");
        // There is room again, in every block.
        for _ in 0..3 * FRAMES / 10 {
            tap.send(&nothing_left, &frame).expect("send");
            let mut again = 0;
            while again == 0 {
                assert!(socket.poll(Duration::from_secs(5)).expect("poll"), "{receive:?}: nothing comes any more");
                socket.read(10_000, &mut |other| again += u64::from(*other == frame)).expect("read");
            }
        }
    }
}

/// A device that nobody else speaks on, but the kernel when it is new.
fn own_tap() -> Option<Tap> {
    match Tap::create("xct%d") {
        Ok(tap) => Some(tap),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOENT | libc::EACCES)) => {
            println!("SKIP: no tap: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// 60,000 bytes of TCP, to be cut and summed by somebody else.
fn segment() -> (VnetHeader, Vec<u8>) {
    let mut frame = vec![5; 54 + 60_000];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    let length = ((frame.len() - 14) as u16).to_be_bytes();
    frame[14..34]
        .copy_from_slice(&[0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    frame[34..54].copy_from_slice(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 16, 0, 0xaa, 0xbb, 0, 0]);
    (VnetHeader { flags: 1, gso_type: 1, gso_size: 1448, csum_start: 34, csum_offset: 16 }, frame)
}

#[test]
fn a_segment_passes_a_tap_and_a_socket_unfinished_both_ways() {
    let Some(tap) = own_tap() else { return };
    assert!(tap.name().starts_with("xct") && !tap.name().contains('%'), "{}", tap.name());
    assert!(tap.join("no-such-br").is_err());
    let (header, frame) = segment();
    for receive in WAYS {
        let socket = PacketSocket::open_to(&tap.name(), receive).expect("the tap's own device");
        socket.send_unfinished(&header, &frame).expect("send");
        tap.send(&header, &frame).expect("send");
        let (mut out, mut back) = (Vec::new(), Vec::new());
        // IPv6 has its own to say on a new device.
        let keep = |into: &mut Vec<(VnetHeader, Vec<u8>)>, header: &VnetHeader, seen: &[u8]| {
            if seen.len() > 1000 {
                into.push((*header, seen.to_vec()));
            }
        };
        while back.is_empty() {
            assert!(socket.poll(Duration::from_secs(5)).expect("poll"), "{receive:?}: nothing comes");
            socket.receive(10, &mut |header, seen| keep(&mut back, header, seen)).expect("receive");
        }
        while out.is_empty() {
            tap.receive(10, &mut |header, seen| keep(&mut out, header, seen)).expect("receive");
            thread::yield_now();
        }
        for (what, seen) in [("out", out), ("back", back)] {
            assert_eq!(seen.len(), 1, "{receive:?} {what}");
            assert!(seen[0].0 == header && seen[0].1 == frame, "{receive:?} {what}: {:?}", seen[0].0);
        }
        // And finished, where that is what is wanted.
        tap.send(&header, &frame).expect("send");
        let (mut cut, mut bytes) = (0, 0);
        while bytes < 60_000 {
            assert!(socket.poll(Duration::from_secs(5)).expect("poll"), "{receive:?}: {bytes} bytes came");
            let mut each = |seen: &[u8]| {
                if seen.len() > 100 {
                    (cut, bytes) = (cut + 1, bytes + seen.len() - 54);
                    checksums_are_right(seen);
                }
            };
            socket.read(10, &mut each).expect("read");
        }
        assert_eq!((cut, bytes), (42, 60_000), "{receive:?}");
    }
}
