//! A frame, parsed once, with every offset checked; and checksums that follow a change.
//!
//! ```text
//! Ethernet ─┬─ 0x0806 Arp
//!           ├─ 0x0800 Ipv4 ─┬─ 6 Tcp ─ 17 Udp ─ 1 Icmp
//!           │               └─ else Other(protocol)
//!           └─ anything else, or a length that does not add up: Unparsable(reason)
//! ```
//!
//! The trap: the frame's length says nothing. Short segments are padded to 60 bytes, so payload ends where the
//! IPv4 total length says, and every length field is the guest's own and may lie. What `net/colo.c` gets wrong
//! (IHL below 5, a 16 bit payload size that wraps, ports read from fragments) ends here as `Unparsable`.
//! Sources: RFC 791, 792, 768, 9293; RFC 1624 for the incremental checksum.

use std::fmt;
use std::ops::Range;

/// Length of an untagged Ethernet header.
pub const ETHERNET_HEADER_BYTES: usize = 14;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// What a frame is, as far as it can be compared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Packet {
    /// Address resolution.
    Arp,
    /// A whole IPv4 packet, not a fragment.
    Ipv4(Ipv4),
    /// Not understood, or malformed.
    Unparsable(Reason),
}

/// Why a frame cannot be compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Shorter than its headers.
    Truncated,
    /// An EtherType that is not handled: VLAN, IPv6, LLDP...
    EtherType(u16),
    /// An IPv4 header with a wrong version or header length.
    IpHeader,
    /// The IPv4 total length is outside the frame.
    IpLength,
    /// A fragment: its ports are elsewhere.
    Fragment,
    /// A transport header whose own length is impossible.
    TransportHeader,
    /// An IP protocol that is not handled.
    Protocol(u8),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "truncated frame"),
            Self::EtherType(kind) => write!(f, "EtherType {kind:#06x}"),
            Self::IpHeader => write!(f, "malformed IPv4 header"),
            Self::IpLength => write!(f, "IPv4 total length outside the frame"),
            Self::Fragment => write!(f, "IPv4 fragment"),
            Self::TransportHeader => write!(f, "malformed transport header"),
            Self::Protocol(number) => write!(f, "IP protocol {number}"),
        }
    }
}

/// An IPv4 packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ipv4 {
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
    /// What it carries.
    pub transport: Transport,
}

/// What an IPv4 packet carries. Ranges are offsets in the frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Transport {
    /// A TCP segment.
    Tcp(Tcp),
    /// A UDP datagram.
    Udp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
        /// The datagram's payload.
        payload: Range<usize>,
    },
    /// An ICMP message.
    Icmp {
        /// The message type.
        kind: u8,
        /// The identifier of an echo or its reply.
        echo_id: Option<u16>,
        /// The whole message, type and checksum included.
        message: Range<usize>,
    },
    /// Something else.
    Other(u8),
}

/// A TCP segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tcp {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number: meaningless without [`Tcp::ACK`].
    pub ack: u32,
    /// The flag byte.
    pub flags: u8,
    /// Where the TCP header starts.
    pub header_at: usize,
    /// The options.
    pub options: Range<usize>,
    /// The payload.
    pub payload: Range<usize>,
}

impl Tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;

    /// Whether a flag is set.
    #[must_use]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The big-endian word at `at`, or nothing when it is outside.
pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

impl Packet {
    /// Parses a frame.
    #[must_use]
    pub fn parse(frame: &[u8]) -> Self {
        match be16(frame, 12) {
            None => Self::Unparsable(Reason::Truncated),
            Some(ETHERTYPE_ARP) => Self::Arp,
            Some(ETHERTYPE_IPV4) => match ipv4(frame) {
                Ok(packet) => Self::Ipv4(packet),
                Err(reason) => Self::Unparsable(reason),
            },
            Some(other) => Self::Unparsable(Reason::EtherType(other)),
        }
    }
}

fn ipv4(frame: &[u8]) -> Result<Ipv4, Reason> {
    const AT: usize = ETHERNET_HEADER_BYTES;
    let header: &[u8; 20] = frame.get(AT..AT + 20).and_then(|bytes| bytes.try_into().ok()).ok_or(Reason::Truncated)?;
    let header_bytes = usize::from(header[0] & 0xf) * 4;
    if header[0] >> 4 != 4 || header_bytes < 20 {
        return Err(Reason::IpHeader);
    }
    let total_bytes = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if total_bytes < header_bytes {
        return Err(Reason::IpHeader);
    }
    // Everything below sees the packet without its padding.
    let packet = frame.get(..AT + total_bytes).ok_or(Reason::IpLength)?;
    // More-fragments or an offset. Don't-fragment and the reserved bit are not our business.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(Reason::Fragment);
    }
    let transport = match header[9] {
        PROTOCOL_TCP => tcp(packet, AT + header_bytes).map(Transport::Tcp),
        PROTOCOL_UDP => udp(packet, AT + header_bytes),
        PROTOCOL_ICMP => icmp(packet, AT + header_bytes),
        other => Some(Transport::Other(other)),
    };
    let transport = transport.ok_or(Reason::TransportHeader)?;
    let address = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
    Ok(Ipv4 { src: address(12), dst: address(16), transport })
}

fn tcp(packet: &[u8], at: usize) -> Option<Tcp> {
    let header: &[u8; 20] = packet.get(at..at + 20)?.try_into().ok()?;
    let payload_at = at + usize::from(header[12] >> 4) * 4;
    if payload_at < at + 20 || payload_at > packet.len() {
        return None;
    }
    Some(Tcp {
        src_port: be16(header, 0)?,
        dst_port: be16(header, 2)?,
        seq: be32(header, 4)?,
        ack: be32(header, 8)?,
        flags: header[13],
        header_at: at,
        options: at + 20..payload_at,
        payload: payload_at..packet.len(),
    })
}

fn udp(packet: &[u8], at: usize) -> Option<Transport> {
    let length = usize::from(be16(packet, at + 4)?);
    // Bytes between the two lengths would leave uncompared.
    if length < 8 || at + length != packet.len() {
        return None;
    }
    let (src_port, dst_port) = (be16(packet, at)?, be16(packet, at + 2)?);
    Some(Transport::Udp { src_port, dst_port, payload: at + 8..packet.len() })
}

fn icmp(packet: &[u8], at: usize) -> Option<Transport> {
    let message: &[u8; 8] = packet.get(at..at + 8)?.try_into().ok()?;
    let echo_id = matches!(message[0], 0 | 8).then(|| u16::from_be_bytes([message[4], message[5]]));
    Some(Transport::Icmp { kind: message[0], echo_id, message: at..packet.len() })
}

/// The ones'-complement sum of some bytes, added to `sum`: `bytes` start at an even offset of what is summed.
fn ones_sum(sum: u32, bytes: &[u8]) -> u32 {
    let mut sum = u64::from(sum);
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u32
}

/// Overwrites four bytes of a TCP segment and makes its checksum follow (RFC 1624, equation 3). Does nothing when
/// `at` is outside the segment. `at` may be odd: options are aligned only by custom.
pub fn tcp_replace(segment: &mut [u8], at: usize, value: u32) {
    const CHECKSUM_AT: usize = 16;
    let words = at & !1..((at + 5) & !1).min(segment.len());
    if be32(segment, at).is_none() || segment.len() < 20 {
        return;
    }
    let removed = ones_sum(0, &segment[words.clone()]);
    segment[at..at + 4].copy_from_slice(&value.to_be_bytes());
    let added = ones_sum(0, &segment[words]);
    let old = u32::from(u16::from_be_bytes([segment[CHECKSUM_AT], segment[CHECKSUM_AT + 1]]));
    let mut sum = (!old & 0xffff) + (!removed & 0xffff) + added;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    segment[CHECKSUM_AT..CHECKSUM_AT + 2].copy_from_slice(&(!sum as u16).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::testing::{CLIENT, GUEST, Seg, icmp_echo_reply, udp};
    use proptest::prelude::*;

    fn parse_tcp(frame: &[u8]) -> Tcp {
        match Packet::parse(frame) {
            Packet::Ipv4(Ipv4 { transport: Transport::Tcp(tcp), .. }) => tcp,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_independent_builders_packets_are_read_right() {
        let frame = Seg::data(1000, b"hello").ack(77).frame();
        let Packet::Ipv4(ip) = Packet::parse(&frame) else { panic!("not IPv4") };
        assert_eq!((ip.src, ip.dst), (GUEST, CLIENT));
        let tcp = parse_tcp(&frame);
        assert_eq!((tcp.src_port, tcp.dst_port, tcp.seq, tcp.ack), (80, 40000, 1000, 77));
        assert_eq!(&frame[tcp.payload.clone()], b"hello");
        assert!(matches!(Packet::parse(&udp(53, b"answer")), Packet::Ipv4(_)));
        let Packet::Ipv4(ip) = Packet::parse(&icmp_echo_reply(9, b"ping")) else { panic!("not IPv4") };
        assert!(matches!(ip.transport, Transport::Icmp { kind: 0, echo_id: Some(9), .. }));
    }

    #[test]
    fn ethernet_padding_is_not_payload() {
        let mut frame = Seg::pure_ack(5).frame();
        frame.resize(60, 0);
        assert!(parse_tcp(&frame).payload.is_empty());
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let good = Seg::data(1, b"0123456789").frame();
        for (at, value, reason) in [
            (14, 0x44, Reason::IpHeader),        // IHL 4
            (14, 0x65, Reason::IpHeader),        // version 6
            (16, 0xff, Reason::IpLength),        // total length past the frame
            (20, 0x20, Reason::Fragment),        // more fragments
            (21, 0x01, Reason::Fragment),        // a fragment offset
            (46, 0xf0, Reason::TransportHeader), // th_off past the packet
            (46, 0x40, Reason::TransportHeader), // th_off below 5
        ] {
            let mut frame = good.clone();
            frame[at] = value;
            assert_eq!(Packet::parse(&frame), Packet::Unparsable(reason), "byte {at} = {value:#x}");
        }
        let mut vlan = good.clone();
        vlan[12..14].copy_from_slice(&[0x81, 0x00]);
        assert_eq!(Packet::parse(&vlan), Packet::Unparsable(Reason::EtherType(0x8100)));
        assert_eq!(Packet::parse(&good[..13]), Packet::Unparsable(Reason::Truncated));
        assert_eq!(Packet::parse(&good[..20]), Packet::Unparsable(Reason::Truncated));
    }

    proptest! {
        #[test]
        fn ranges_stay_inside_any_frame(mut frame in prop::collection::vec(any::<u8>(), 0..200), ip in any::<bool>()) {
            if ip && frame.len() > 24 {
                frame[12..15].copy_from_slice(&[8, 0, 0x45]);
                frame[16..18].copy_from_slice(&[0, 60]);
                frame[20..22].fill(0);
                frame[23] = [1, 6, 17][usize::from(frame[24]) % 3];
            }
            if let Packet::Ipv4(ip) = Packet::parse(&frame) {
                let range = match ip.transport {
                    Transport::Tcp(tcp) => tcp.payload,
                    Transport::Udp { payload, .. } => payload,
                    Transport::Icmp { message, .. } => message,
                    Transport::Other(_) => 0..0,
                };
                prop_assert!(frame.get(range).is_some());
            }
        }

        #[test]
        fn a_replaced_word_keeps_the_checksum_right(
            mut segment in prop::collection::vec(any::<u8>(), 20..64), at in 18_usize..70, value: u32,
        ) {
            segment[16..18].fill(0);
            let checksum = !ones_sum(0, &segment) as u16;
            segment[16..18].copy_from_slice(&checksum.to_be_bytes());
            tcp_replace(&mut segment, at, value);
            prop_assert_eq!(ones_sum(0, &segment), 0xffff);
        }
    }
}
