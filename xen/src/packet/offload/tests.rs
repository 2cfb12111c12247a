//! Frames cut and summed, checked by other arithmetic than that which made them, and against published sums.

use super::*;

/// Ones' complement sums are remainders by 65535: no carries to get wrong. Right is 0.
fn remainder(parts: &[&[u8]]) -> u64 {
    let mut value = 0u64;
    for part in parts {
        for (index, byte) in part.iter().enumerate() {
            let weight = if index % 2 == 0 { 256 } else { 1 };
            value = (value + u64::from(*byte) * weight) % 65535;
        }
    }
    value
}

fn ip_at(frame: &[u8]) -> (usize, u16) {
    let mut at = 12;
    while [0x8100, 0x88a8].contains(&half(frame, at).expect("ethertype")) {
        at += 4;
    }
    (at + 2, half(frame, at).expect("ethertype"))
}

fn tcp_at(frame: &[u8]) -> Option<usize> {
    match ip_at(frame) {
        (ip, IPV4) if frame[ip + 9] == 6 => Some(ip + usize::from(frame[ip] & 15) * 4),
        (ip, IPV6) if frame[ip + 6] == 6 => Some(ip + 40),
        _ => None,
    }
}

/// Panics unless the sums of an IPv4 or IPv6 TCP frame are right and its lengths are those of the frame.
pub(in crate::packet) fn checksums_are_right(frame: &[u8]) {
    let (ip, ethertype) = ip_at(frame);
    let tcp = tcp_at(frame).expect("TCP");
    let length = (frame.len() - tcp) as u32;
    let addresses = if ethertype == IPV4 {
        assert_eq!(remainder(&[&frame[ip..tcp]]), 0, "IP header sum");
        assert_eq!(usize::from(half(frame, ip + 2).expect("length")), frame.len() - ip);
        &frame[ip + 12..ip + 20]
    } else {
        assert_eq!(usize::from(half(frame, ip + 4).expect("length")), frame.len() - ip - 40);
        &frame[ip + 8..ip + 40]
    };
    assert_eq!(remainder(&[addresses, &length.to_be_bytes(), &[0, 6], &frame[tcp..]]), 0, "TCP sum");
}

/// Sequence number, whether it is a SYN, and payload of a TCP frame to `port`.
pub(in crate::packet) fn tcp_payload(frame: &[u8], port: u16) -> Option<(u32, bool, &[u8])> {
    let tcp = tcp_at(frame)?;
    if half(frame, tcp + 2)? != port {
        return None;
    }
    let sequence = u32::from_be_bytes(frame[tcp + 4..tcp + 8].try_into().ok()?);
    Some((sequence, frame[tcp + 13] & 2 != 0, &frame[tcp + usize::from(frame[tcp + 12] >> 4) * 4..]))
}

/// A TCP segment with options, unsummed, with FIN, PSH, ACK and CWR, and what a card would be told of it.
fn big(ethertype: u16, vlans: usize, payload: usize, size: u16) -> (VnetHeader, Vec<u8>) {
    let mut frame = vec![2; 12];
    for _ in 0..vlans {
        frame.extend([0x81, 0, 0, 9]);
    }
    frame.extend(ethertype.to_be_bytes());
    if ethertype == IPV4 {
        // Id 0xfffe: the third segment's goes round. One word of options.
        frame.extend([0x46, 0, 0, 0, 0xff, 0xfe, 0x40, 0, 64, 6, 0xaa, 0xaa, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 0]);
    } else {
        frame.extend([0x60, 0, 0, 0, 0, 0, 6, 64]);
        frame.extend((0..32).map(|n| n * 5));
    }
    let tcp = frame.len();
    // Ports, a sequence number that goes round, acknowledgement, 8 words of header, flags, window, sum, urgent.
    frame.extend([0x1f, 0x90, 0, 80, 0xff, 0xff, 0xfc, 0x18, 1, 2, 3, 4, 0x80, 0x99, 1, 0, 0x12, 0x34, 0, 0]);
    frame.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    frame.extend((0..payload).map(|n| (n * 31 >> 2) as u8));
    let gso_type = if ethertype == IPV4 { GSO_TCPV4 | GSO_ECN } else { GSO_TCPV6 };
    let header = VnetHeader { flags: NEEDS_CSUM, gso_type, gso_size: size, csum_start: tcp as u16, csum_offset: 16 };
    (header, frame)
}

#[test]
fn a_big_segment_is_cut_into_right_ones() {
    for ethertype in [IPV4, IPV6] {
        for (vlans, payload, size, count) in
            [(0, 2500, 1000, 3), (1, 3000, 1000, 3), (2, 1, 1448, 1), (0, 60_001, 1447, 42)]
        {
            let (header, frame) = big(ethertype, vlans, payload, size);
            let segments = finish(&header, frame.clone()).expect("cut");
            assert_eq!(segments.len(), count);
            let mut joined = Vec::new();
            for (number, segment) in segments.iter().enumerate() {
                checksums_are_right(segment);
                let tcp = tcp_at(segment).expect("TCP");
                let (sequence, _, payload) = tcp_payload(segment, 80).expect("TCP");
                assert_eq!(sequence, 0xffff_fc18u32.wrapping_add(joined.len() as u32));
                let (first, last) = (number == 0, number + 1 == count);
                assert_eq!(segment[tcp + 13], 0x10 | if last { 0x09 } else { 0 } | if first { 0x80 } else { 0 });
                if ethertype == IPV4 {
                    assert_eq!(half(segment, ip_at(segment).0 + 4), Some(0xfffeu16.wrapping_add(number as u16)));
                }
                assert_eq!(segment[..12], frame[..12]);
                assert_eq!(segment[tcp + 20..tcp + 32], frame[tcp + 20..tcp + 32], "options");
                assert!(last || payload.len() == usize::from(size));
                joined.extend_from_slice(payload);
            }
            assert_eq!(joined, frame[frame.len() - payload..]);
        }
    }
}

#[test]
fn a_partial_sum_is_completed() {
    // The sum of Wikipedia's IPv4 header is 0xb861; a place that holds 0 has the whole sum to take.
    let ip = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
    let header = VnetHeader { flags: NEEDS_CSUM, csum_start: 3, csum_offset: 10, ..Default::default() };
    let mut frame = vec![9; 3];
    frame.extend(ip);
    let done = finish(&header, frame).expect("summed").remove(0);
    assert_eq!(done[13..15], [0xb8, 0x61]);
    // RFC 1071's own bytes sum to 0xddf2; an odd one counts as if a 0 followed.
    assert_eq!(fold(add(0, &[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
    assert_eq!(fold(add(0, &[0, 1, 0xf2])), 0xf201);
    // A sum of 0 would mean "none" to UDP.
    let header = VnetHeader { flags: NEEDS_CSUM, csum_start: 0, csum_offset: 2, ..Default::default() };
    assert_eq!(finish(&header, vec![0xff, 0xff, 0, 0]).expect("summed")[0][2..], [0xff, 0xff]);
}

#[test]
fn a_finished_frame_is_left_alone() {
    let header = VnetHeader::parse(&[0; HEADER_BYTES]);
    assert!(header.needs_nothing());
    // "The checksum is known to be right" is bit 1, and asks for nothing.
    assert!(VnetHeader::parse(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]).needs_nothing());
    assert_eq!(finish(&header, vec![1, 2, 3]).expect("as it is"), [[1, 2, 3]]);
    let parsed = VnetHeader::parse(&[1, 4, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
    let expected = VnetHeader { flags: 1, gso_type: 4, gso_size: 1460, csum_start: 34, csum_offset: 16 };
    assert_eq!(parsed, expected);
}

#[test]
fn a_guest_that_lies_is_refused() {
    let sum = |csum_start, csum_offset| VnetHeader { flags: NEEDS_CSUM, csum_start, csum_offset, ..Default::default() };
    for header in [sum(60, 0), sum(61, 0), sum(0, 59), sum(u16::MAX, u16::MAX)] {
        assert_eq!(finish(&header, vec![0; 60]), Err(OffloadError::Checksum), "{header:?}");
    }
    let (good, frame) = big(IPV4, 0, 3000, 1000);
    for wrong in [
        VnetHeader { gso_size: 0, ..good },
        VnetHeader { csum_start: good.csum_start + 4, ..good },
        VnetHeader { csum_start: u16::MAX, ..good },
        VnetHeader { csum_offset: 6, ..good },
        VnetHeader { flags: 0, ..good },
        VnetHeader { gso_type: GSO_TCPV6, ..good },
    ] {
        assert_eq!(finish(&wrong, frame.clone()), Err(OffloadError::Headers), "{wrong:?}");
    }
    assert_eq!(finish(&VnetHeader { gso_type: 5, ..good }, frame.clone()), Err(OffloadError::Kind(5)));
    assert_eq!(finish(&VnetHeader { gso_size: 1, ..good }, frame.clone()), Err(OffloadError::Segments));
    // Cut off anywhere, for every kind: an error or segments, never a panic.
    for ethertype in [IPV4, IPV6] {
        for vlans in [0, 2] {
            let (header, frame) = big(ethertype, vlans, 40, 16);
            for length in 0..frame.len() {
                let _ = finish(&header, frame[..length].to_vec());
            }
        }
    }
}
