//! A frame, parsed once, with every offset checked.
//!
//! ```text
//! [virtio-net header] Ethernet [802.1Q, 802.1ad: at most two tags]
//!   ├─ 0x0806 ARP ──────────────────────────────────────────────┐
//!   ├─ 0x0800 IPv4 [options] ─────────────┬─ 6 Tcp ─ 17 Udp     ├─▶ Neighbour
//!   ├─ 0x86dd IPv6 [hop-by-hop, routing,  ├─ 1, 58 Icmp ── ND ──┘
//!   │              destination, fragment] ├─ else Other
//!   │                                     └─ part of one: Fragment
//!   └─ anything else, or a length that does not add up: Unparsable(reason)
//! ```
//!
//! What a packet says is its addresses, its tags' VLANs, its transport header and its payload. Not looked at: hop limit,
//! identification, traffic class, options and extension headers, which belong to the way and not to what is said. An
//! option that changes where the packet goes (a source route with hops left) does not fit that and is unparsable.
//! Authentication headers number their packets and cover them, so what is behind one is compared with it, as a whole.
//!
//! The trap: the frame's length says nothing. Short segments are padded to 60 bytes, so payload ends where the
//! IP length says, and every length field is the guest's own and may lie. A segment above what the field can
//! hold says 0 there; that is believed when a virtio-net header announces segmentation (or a jumbogram option gives
//! the length). What `net/colo.c` gets wrong (IHL below 5, a 16 bit payload size that wraps, ports read from
//! fragments, tags) ends here as `Unparsable`, or is parsed.
//! Sources: RFC 791, 792, 768, 9293; RFC 8200, 2675; IEEE 802.1Q; virtio 1.2 5.1.6 for the virtio-net header.
//!
//! Addresses are `core::net`'s: `std::net` is where the sockets are, and no pure machine may name it.

use super::ipv6;
use super::neighbour::{self, Identity};
use super::options::Offer;
use core::net::{IpAddr, Ipv4Addr};
use std::fmt;
use std::ops::Range;

/// Length of an untagged Ethernet header.
pub const ETHERNET_HEADER_BYTES: usize = 14;

const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
pub(super) const PROTOCOL_ICMPV6: u8 = 58;
const GSO_UDP_L4: u8 = 5;

/// The VLANs of a frame's tags, the outer first; 0 where there is none. A priority tag names VLAN 0, the untagged one.
pub type Vlans = [u16; 2];

/// What a frame is, as far as it can be compared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Packet {
    /// ARP or IPv6 neighbour discovery: whose address is whose, and no more.
    Neighbour(Identity),
    /// A whole IP packet, not a fragment.
    Ip(Ip),
    /// A part of one.
    Fragment(Fragment),
    /// Not understood, or malformed.
    Unparsable(Reason),
}

/// Why a frame cannot be compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Shorter than its headers.
    Truncated,
    /// An EtherType that is not handled: LLDP, PPPoE...
    EtherType(u16),
    /// More than two VLAN tags.
    Tags,
    /// A virtio-net header that asks for one datagram to be cut into several.
    Offload,
    /// Address resolution that is not for IPv4 on Ethernet.
    AddressResolution,
    /// An IP header with a wrong version or header length.
    IpHeader,
    /// The IP length is outside the frame.
    IpLength,
    /// An option or extension header sends the packet elsewhere than to its destination.
    SourceRoute,
    /// A fragment that overlaps another, or whose place is impossible.
    Fragment,
    /// A transport header whose own length is impossible.
    TransportHeader,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "truncated frame"),
            Self::EtherType(kind) => write!(f, "EtherType {kind:#06x}"),
            Self::Tags => write!(f, "more than two VLAN tags"),
            Self::Offload => write!(f, "datagrams cut by the device"),
            Self::AddressResolution => write!(f, "malformed address resolution"),
            Self::IpHeader => write!(f, "malformed IP header"),
            Self::IpLength => write!(f, "IP length outside the frame"),
            Self::SourceRoute => write!(f, "source-routed packet"),
            Self::Fragment => write!(f, "impossible or overlapping fragment"),
            Self::TransportHeader => write!(f, "malformed transport header"),
        }
    }
}

/// An IP packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ip {
    /// The VLANs it is sent in.
    pub vlans: Vlans,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// What it carries.
    pub transport: Transport,
}

/// A part of an IP packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fragment {
    /// What its siblings share with it.
    pub of: Siblings,
    /// The protocol of the whole, or the first extension header behind an IPv6 fragment header.
    pub protocol: u8,
    /// Where the part begins in the whole, in bytes.
    pub offset: usize,
    /// Whether others follow it.
    pub more: bool,
    /// The part: offsets in the frame.
    pub payload: Range<usize>,
}

/// What the fragments of one packet have in common.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Siblings {
    /// The VLANs they are sent in.
    pub vlans: Vlans,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// The protocol, under IPv4; 0 under IPv6, where it is not part of the identification.
    pub protocol: u8,
    /// Identification.
    pub id: u32,
}

/// What an IP packet carries. Ranges are offsets in the frame, or in the reassembled packet.
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
    /// An ICMP or ICMPv6 message.
    Icmp {
        /// The message type.
        kind: u8,
        /// The identifier of an echo or its reply.
        echo_id: Option<u16>,
        /// The whole message, type and checksum included.
        message: Range<usize>,
    },
    /// Something else.
    Other {
        /// Its number.
        protocol: u8,
        /// All that is behind the IP header.
        payload: Range<usize>,
    },
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
    /// What a SYN's options promise.
    pub offer: Offer,
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

    /// Whether two segments are of the middle of a connection, and of the same place in it as far as their headers say.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let middle = |segment: &Self| segment.has(Self::ACK) && !segment.has(Self::SYN | Self::FIN | Self::RST);
        middle(self) && middle(other) && self.seq == other.seq && self.payload.len() == other.payload.len()
    }
}

pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
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
        Self::parse_behind(frame, 0)
    }

    /// Parses a frame behind a virtio-net header of so many bytes. Offsets count from the header's start.
    #[must_use]
    pub fn parse_behind(frame: &[u8], vnet_header_bytes: usize) -> Self {
        packet(frame, vnet_header_bytes).unwrap_or_else(Self::Unparsable)
    }
}

fn packet(frame: &[u8], vnet_header_bytes: usize) -> Result<Packet, Reason> {
    let gso = if vnet_header_bytes < 10 { 0 } else { frame.get(1).map_or(0, |gso| gso & 0x7f) };
    if gso == GSO_UDP_L4 {
        return Err(Reason::Offload);
    }
    let (mut vlans, mut tags, mut at) = ([0; 2], 0, vnet_header_bytes + 12);
    loop {
        let kind = be16(frame, at).ok_or(Reason::Truncated)?;
        at += 2;
        match kind {
            ETHERTYPE_VLAN | ETHERTYPE_QINQ => {
                *vlans.get_mut(tags).ok_or(Reason::Tags)? = be16(frame, at).ok_or(Reason::Truncated)? & 0xfff;
                (tags, at) = (tags + 1, at + 2);
            }
            ETHERTYPE_IPV4 => return ipv4(frame, at, vlans, gso != 0),
            ETHERTYPE_IPV6 => return ipv6::parse(frame, at, vlans, gso != 0),
            ETHERTYPE_ARP => return neighbour::arp(frame, at, vlans).map(Packet::Neighbour),
            other => return Err(Reason::EtherType(other)),
        }
    }
}

/// The TCP segment that a first fragment begins, as far as it goes, if its whole header is there.
pub(super) fn first_fragment(frame: &[u8], fragment: &Fragment) -> Option<Ip> {
    if fragment.offset != 0 || fragment.protocol != PROTOCOL_TCP {
        return None;
    }
    let tcp = tcp(frame.get(..fragment.payload.end)?, fragment.payload.start)?;
    let Siblings { vlans, src, dst, .. } = fragment.of;
    Some(Ip { vlans, src, dst, transport: Transport::Tcp(tcp) })
}

fn ipv4(frame: &[u8], at: usize, vlans: Vlans, segmented: bool) -> Result<Packet, Reason> {
    let header: &[u8; 20] = frame.get(at..at + 20).and_then(|bytes| bytes.try_into().ok()).ok_or(Reason::Truncated)?;
    let header_bytes = usize::from(header[0] & 0xf) * 4;
    if header[0] >> 4 != 4 || header_bytes < 20 {
        return Err(Reason::IpHeader);
    }
    let total_bytes = match usize::from(u16::from_be_bytes([header[2], header[3]])) {
        0 if segmented => frame.len() - at,
        total => total,
    };
    if total_bytes < header_bytes {
        return Err(Reason::IpHeader);
    }
    // Everything below sees the packet without its padding.
    let packet = frame.get(..at + total_bytes).ok_or(Reason::IpLength)?;
    if source_routed(&packet[at + 20..at + header_bytes]) {
        return Err(Reason::SourceRoute);
    }
    let address = |at: usize| IpAddr::V4(Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]));
    let (src, dst, protocol) = (address(12), address(16), header[9]);
    let behind = at + header_bytes;
    // More-fragments or an offset. Don't-fragment and the reserved bit are not our business.
    let flags = u16::from_be_bytes([header[6], header[7]]);
    if flags & 0x3fff != 0 {
        let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
        let of = Siblings { vlans, src, dst, protocol, id };
        let (offset, more) = (usize::from(flags & 0x1fff) * 8, flags & 0x2000 != 0);
        return Ok(Packet::Fragment(Fragment { of, protocol, offset, more, payload: behind..packet.len() }));
    }
    Ok(Packet::Ip(Ip { vlans, src, dst, transport: transport(packet, behind, protocol, false)? }))
}

/// Whether IPv4 options hold a loose or a strict source route with an address left.
fn source_routed(mut options: &[u8]) -> bool {
    loop {
        match *options {
            [1, ..] => options = &options[1..],
            [131 | 137, length, pointer, ..] if pointer < length => return true,
            [2..=255, length, ..] if length >= 2 && usize::from(length) <= options.len() => {
                options = &options[usize::from(length)..];
            }
            _ => return false,
        }
    }
}

/// What is behind the IP header, at `at`.
pub(super) fn transport(packet: &[u8], at: usize, protocol: u8, v6: bool) -> Result<Transport, Reason> {
    match (protocol, v6) {
        (PROTOCOL_TCP, _) => tcp(packet, at).map(Transport::Tcp),
        (PROTOCOL_UDP, _) => udp(packet, at),
        (PROTOCOL_ICMP, false) => icmp(packet, at, [0, 8]),
        (PROTOCOL_ICMPV6, true) => icmp(packet, at, [128, 129]),
        _ => Some(Transport::Other { protocol, payload: at.min(packet.len())..packet.len() }),
    }
    .ok_or(Reason::TransportHeader)
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
        offer: if header[13] & Tcp::SYN == 0 { Offer::default() } else { Offer::read(&packet[at + 20..payload_at]) },
        payload: payload_at..packet.len(),
    })
}

fn udp(packet: &[u8], at: usize) -> Option<Transport> {
    let length = usize::from(be16(packet, at + 4)?);
    // Bytes between the two lengths would leave uncompared. A datagram that the field cannot hold says 0.
    let whole = at + length == packet.len() || (length == 0 && packet.len() - at > usize::from(u16::MAX));
    if (1..8).contains(&length) || !whole {
        return None;
    }
    let (src_port, dst_port) = (be16(packet, at)?, be16(packet, at + 2)?);
    packet.get(at + 8..)?;
    Some(Transport::Udp { src_port, dst_port, payload: at + 8..packet.len() })
}

fn icmp(packet: &[u8], at: usize, echo: [u8; 2]) -> Option<Transport> {
    let message: &[u8; 8] = packet.get(at..at + 8)?.try_into().ok()?;
    let echo_id = echo.contains(&message[0]).then(|| u16::from_be_bytes([message[4], message[5]]));
    Some(Transport::Icmp { kind: message[0], echo_id, message: at..packet.len() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::testing::{CLIENT, GUEST, Seg, icmp_echo_reply, tagged, udp};
    use proptest::prelude::*;

    fn parse_tcp(frame: &[u8]) -> Tcp {
        match Packet::parse(frame) {
            Packet::Ip(Ip { transport: Transport::Tcp(tcp), .. }) => tcp,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_independent_builders_packets_are_read_right() {
        let frame = Seg::data(1000, b"hello").ack(77).frame();
        let Packet::Ip(ip) = Packet::parse(&frame) else { panic!("not IPv4") };
        assert_eq!((ip.src, ip.dst), (GUEST.into(), CLIENT.into()));
        let tcp = parse_tcp(&frame);
        assert_eq!((tcp.src_port, tcp.dst_port, tcp.seq, tcp.ack), (80, 40000, 1000, 77));
        assert_eq!(&frame[tcp.payload.clone()], b"hello");
        assert!(matches!(Packet::parse(&udp(53, b"answer")), Packet::Ip(_)));
        let Packet::Ip(ip) = Packet::parse(&icmp_echo_reply(9, b"ping")) else { panic!("not IPv4") };
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
            (46, 0xf0, Reason::TransportHeader), // th_off past the packet
            (46, 0x40, Reason::TransportHeader), // th_off below 5
        ] {
            let mut frame = good.clone();
            frame[at] = value;
            assert_eq!(Packet::parse(&frame), Packet::Unparsable(reason), "byte {at} = {value:#x}");
        }
        assert_eq!(Packet::parse(&good[..13]), Packet::Unparsable(Reason::Truncated));
        assert_eq!(Packet::parse(&good[..20]), Packet::Unparsable(Reason::Truncated));
    }

    #[test]
    fn tags_name_vlans_and_may_be_two() {
        let good = Seg::data(7, b"payload").frame();
        for (vlans, read) in [(vec![5], [5, 0]), (vec![5, 6], [5, 6]), (vec![0, 6], [0, 6]), (vec![0xf005], [5, 0])] {
            let frame = tagged(&vlans, &good);
            let Packet::Ip(ip) = Packet::parse(&frame) else { panic!("{vlans:?}") };
            let Transport::Tcp(tcp) = ip.transport else { panic!("no TCP") };
            assert_eq!((ip.vlans, &frame[tcp.payload]), (read, &b"payload"[..]));
        }
        assert_eq!(Packet::parse(&tagged(&[1, 2, 3], &good)), Packet::Unparsable(Reason::Tags));
        assert_eq!(Packet::parse(&tagged(&[1], &good)[..15]), Packet::Unparsable(Reason::Truncated));
    }

    #[test]
    fn a_virtio_net_header_is_stepped_over_and_read_for_segmentation() {
        let good = Seg::data(7, &[9; 60_000]).frame();
        let behind = |bytes: usize, gso: u8, frame: &[u8]| {
            let mut header = vec![0; bytes];
            header[1] = gso;
            Packet::parse_behind(&[&header, frame].concat(), bytes)
        };
        let Packet::Ip(Ip { transport: Transport::Tcp(tcp), .. }) = behind(12, 1, &good) else { panic!("no TCP") };
        assert_eq!((tcp.header_at, tcp.payload.len()), (12 + 34, 60_000));
        let mut zero = good.clone();
        zero[16..18].fill(0);
        let Packet::Ip(Ip { transport: Transport::Tcp(tcp), .. }) = behind(10, 0x81, &zero) else { panic!("no TCP") };
        assert_eq!(tcp.payload.len(), 60_000);
        assert_eq!(behind(10, 0, &zero), Packet::Unparsable(Reason::IpHeader));
        assert_eq!(Packet::parse(&zero), Packet::Unparsable(Reason::IpHeader));
        assert_eq!(behind(12, 5, &udp(1, b"cut me")), Packet::Unparsable(Reason::Offload));
    }

    #[test]
    fn a_source_route_with_hops_left_is_refused_and_other_options_are_not() {
        let segment = Seg::data(7, b"payload").frame();
        let with = |options: [u8; 8]| {
            let mut frame = [&segment[..34], &options, &segment[34..]].concat();
            frame[14] = 0x47;
            frame[17] += 8;
            Packet::parse(&frame)
        };
        assert!(matches!(with([148, 4, 0, 0, 1, 1, 1, 1]), Packet::Ip(_)), "router alert");
        assert_eq!(with([1, 131, 7, 4, 10, 0, 0, 1]), Packet::Unparsable(Reason::SourceRoute));
        assert_eq!(with([1, 137, 7, 4, 10, 0, 0, 1]), Packet::Unparsable(Reason::SourceRoute));
        assert!(matches!(with([1, 131, 7, 8, 10, 0, 0, 1]), Packet::Ip(_)), "used up");
        assert!(matches!(with([68, 200, 0, 0, 0, 0, 0, 0]), Packet::Ip(_)), "a length that lies ends the search");
    }

    #[test]
    fn a_fragment_says_whose_it_is() {
        let mut frame = udp(1, &[7; 32]);
        frame[18..22].copy_from_slice(&[0x12, 0x34, 0x20, 0x02]);
        let Packet::Fragment(fragment) = Packet::parse(&frame) else { panic!("no fragment") };
        assert_eq!((fragment.of.id, fragment.of.protocol, fragment.protocol), (0x1234, 17, 17));
        assert_eq!((fragment.offset, fragment.more, fragment.payload), (16, true, 34..74));
    }

    proptest! {
        #[test]
        fn ranges_stay_inside_any_frame(mut frame in prop::collection::vec(any::<u8>(), 0..200), ip in 0..3_u8) {
            if ip == 2 && frame.len() > 60 {
                frame[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
                frame[18..20].copy_from_slice(&[0, 20]);
                frame[20] = [0, 6, 17, 43, 44, 58, 60][usize::from(frame[24]) % 7];
            }
            if ip == 1 && frame.len() > 24 {
                frame[12..15].copy_from_slice(&[8, 0, 0x45]);
                frame[16..18].copy_from_slice(&[0, 60]);
                frame[20..22].fill(0);
                frame[23] = [1, 6, 17][usize::from(frame[24]) % 3];
            }
            if let Packet::Fragment(fragment) = Packet::parse(&frame) {
                prop_assert!(frame.get(fragment.payload).is_some());
            }
            if let Packet::Ip(ip) = Packet::parse(&frame) {
                let range = match ip.transport {
                    Transport::Tcp(tcp) => tcp.payload,
                    Transport::Udp { payload, .. } => payload,
                    Transport::Icmp { message, .. } => message,
                    Transport::Other { payload, .. } => payload,
                };
                prop_assert!(frame.get(range).is_some());
            }
        }
    }
}
