//! IPv6: the headers between the address and what is said.
//!
//! ```text
//! header ─▶ hop-by-hop ─▶ destination ─▶ routing ─▶ fragment ─▶ destination ─▶ TCP, UDP, ICMPv6, else
//!             └ jumbogram's length          └ hops left: SourceRoute    └─▶ Fragment
//! ```
//!
//! Extension headers come in any order and number that fits [`MAX_HEADERS`]. A fragment header that is alone (offset 0,
//! nothing more) is skipped: RFC 6946. An authentication header is no extension here: see `packet.rs`.

use super::neighbour;
use super::packet::{Fragment, Ip, PROTOCOL_ICMPV6, Packet, Reason, Siblings, Transport, Vlans, be16, be32, transport};
use core::net::{IpAddr, Ipv6Addr};

/// Extension headers read before a packet is taken for nonsense.
const MAX_HEADERS: usize = 16;

const HEADER_BYTES: usize = 40;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
const OPTION_JUMBO: u8 = 0xc2;

/// What a chain of extension headers leads to.
enum Chain {
    Transport { protocol: u8, at: usize },
    Fragment { header_at: usize },
}

pub(super) fn parse(frame: &[u8], at: usize, vlans: Vlans, segmented: bool) -> Result<Packet, Reason> {
    let header = frame.get(at..at + HEADER_BYTES).ok_or(Reason::Truncated)?;
    if header[0] >> 4 != 6 {
        return Err(Reason::IpHeader);
    }
    let behind = at + HEADER_BYTES;
    let payload_bytes = match usize::from(u16::from_be_bytes([header[4], header[5]])) {
        0 if header[6] == HOP_BY_HOP => {
            jumbo_bytes(frame, behind).or((segmented).then(|| frame.len() - behind)).ok_or(Reason::IpLength)?
        }
        0 if segmented => frame.len() - behind,
        length => length,
    };
    // Everything below sees the packet without its padding.
    let packet = frame.get(..behind + payload_bytes).ok_or(Reason::IpLength)?;
    let address = |from: usize| {
        let octets: Option<[u8; 16]> = header.get(from..from + 16).and_then(|bytes| bytes.try_into().ok());
        octets.map(|octets| IpAddr::V6(Ipv6Addr::from(octets))).ok_or(Reason::Truncated)
    };
    let (src, dst) = (address(8)?, address(24)?);
    match chain(packet, behind, header[6])? {
        Chain::Transport { protocol, at } => {
            if protocol == PROTOCOL_ICMPV6
                && let Some(identity) = neighbour::discovery(packet, at, vlans, src)
            {
                return Ok(Packet::Neighbour(identity));
            }
            Ok(Packet::Ip(Ip { vlans, src, dst, transport: transport(packet, at, protocol, true)? }))
        }
        Chain::Fragment { header_at } => {
            let flags = be16(packet, header_at + 2).ok_or(Reason::Truncated)?;
            let id = be32(packet, header_at + 4).ok_or(Reason::Truncated)?;
            Ok(Packet::Fragment(Fragment {
                of: Siblings { vlans, src, dst, protocol: 0, id },
                protocol: packet[header_at],
                offset: usize::from(flags & !7),
                more: flags & 1 != 0,
                payload: header_at + 8..packet.len(),
            }))
        }
    }
}

/// What a reassembled packet carries: `protocol` is the next header its first fragment named.
pub(super) fn reassembled(packet: &[u8], protocol: u8) -> Result<Transport, Reason> {
    match chain(packet, 0, protocol)? {
        Chain::Transport { protocol, at } => transport(packet, at, protocol, true),
        Chain::Fragment { .. } => Err(Reason::Fragment),
    }
}

fn chain(packet: &[u8], mut at: usize, mut next: u8) -> Result<Chain, Reason> {
    for _ in 0..MAX_HEADERS {
        match next {
            HOP_BY_HOP | DESTINATION | ROUTING => {
                let header = packet.get(at..at + 8).ok_or(Reason::Truncated)?;
                if next == ROUTING && header[3] != 0 {
                    return Err(Reason::SourceRoute);
                }
                (next, at) = (header[0], at + (usize::from(header[1]) + 1) * 8);
            }
            FRAGMENT => {
                let header = packet.get(at..at + 8).ok_or(Reason::Truncated)?;
                if u16::from_be_bytes([header[2], header[3]]) & 0xfff9 != 0 {
                    return Ok(Chain::Fragment { header_at: at });
                }
                (next, at) = (header[0], at + 8);
            }
            protocol if at <= packet.len() => return Ok(Chain::Transport { protocol, at }),
            _ => return Err(Reason::Truncated),
        }
    }
    Err(Reason::IpHeader)
}

/// The length a jumbogram option gives, counted like the payload length it stands in for.
fn jumbo_bytes(frame: &[u8], at: usize) -> Option<usize> {
    let mut options = frame.get(at + 2..at + (usize::from(*frame.get(at + 1)?) + 1) * 8)?;
    loop {
        match *options {
            [0, ..] => options = &options[1..],
            [OPTION_JUMBO, 4, a, b, c, d, ..] => return usize::try_from(u32::from_be_bytes([a, b, c, d])).ok(),
            [_, length, ..] => options = options.get(2 + usize::from(length)..)?,
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::testing::{in_ipv6, tcp6};

    fn ports(frame: &[u8], vnet: usize) -> Result<(u16, u16, Vec<u8>), Reason> {
        match Packet::parse_behind(frame, vnet) {
            Packet::Ip(Ip { transport: Transport::Tcp(tcp), .. }) => {
                Ok((tcp.src_port, tcp.dst_port, frame[tcp.payload].to_vec()))
            }
            Packet::Unparsable(reason) => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_independent_builders_segment_is_read_behind_any_extension_header() {
        let segment = tcp6(5, b"hello");
        let read = Ok((80, 40000, b"hello".to_vec()));
        for (first, headers) in [
            (6, vec![]),
            (0, vec![6, 0, 1, 4, 0, 0, 0, 0]),
            (60, vec![6, 0, 1, 4, 0, 0, 0, 0]),
            (43, vec![6, 0, 0, 0, 0, 0, 0, 0]),
            (44, vec![6, 0, 0, 0, 0, 0, 0, 9]),
            (0, [[60, 0, 1, 4, 0, 0, 0, 0], [43, 0, 1, 4, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0, 0, 0]].concat()),
        ] {
            let frame = in_ipv6(first, &[headers.clone(), segment.clone()].concat());
            assert_eq!(ports(&frame, 0), read, "{first} {headers:?}");
            let mut padded = frame.clone();
            padded.extend([0; 9]);
            assert_eq!(ports(&padded, 0), read, "padding is not payload");
        }
    }

    #[test]
    fn lengths_that_lie_and_routes_with_hops_left_are_refused() {
        let good = in_ipv6(6, &tcp6(5, b"hello"));
        let with = |at: usize, value: u8| {
            let mut frame = good.clone();
            frame[at] = value;
            Packet::parse(&frame)
        };
        assert_eq!(with(14, 0x40), Packet::Unparsable(Reason::IpHeader));
        assert_eq!(with(19, 0xff), Packet::Unparsable(Reason::IpLength));
        assert_eq!(with(18, 0xff), Packet::Unparsable(Reason::IpLength));
        assert_eq!(with(66, 0xf0), Packet::Unparsable(Reason::TransportHeader));
        assert_eq!(Packet::parse(&good[..50]), Packet::Unparsable(Reason::Truncated));
        let routed = in_ipv6(43, &[&[6, 0, 4, 1, 0, 0, 0, 0][..], &tcp6(5, b"x")].concat());
        assert_eq!(Packet::parse(&routed), Packet::Unparsable(Reason::SourceRoute));
        let endless = in_ipv6(60, &[60, 0, 1, 4, 0, 0, 0, 0].repeat(17));
        assert_eq!(Packet::parse(&endless), Packet::Unparsable(Reason::IpHeader));
        let long = in_ipv6(60, &[6, 200, 1, 4, 0, 0, 0, 0]);
        assert_eq!(Packet::parse(&long), Packet::Unparsable(Reason::Truncated));
    }

    #[test]
    fn a_segment_the_length_cannot_hold() {
        let payload = vec![7; 66_000];
        let segment = tcp6(5, &payload);
        let option = [&[6, 0, OPTION_JUMBO, 4][..], &(segment.len() as u32 + 8).to_be_bytes()].concat();
        let mut jumbo = in_ipv6(0, &[option, segment.clone()].concat());
        jumbo[18..20].fill(0);
        let read = Ok((80, 40000, payload));
        assert_eq!(ports(&jumbo, 0), read);
        let mut zero = in_ipv6(6, &segment);
        zero[18..20].fill(0);
        assert_eq!(ports(&zero, 0), Err(Reason::TransportHeader), "nothing announced segmentation");
        let announced = [&[0, 4, 0, 0, 0, 0, 0, 0, 0, 0][..], &zero].concat();
        assert_eq!(ports(&announced, 10), read);
    }

    #[test]
    fn a_fragment_is_told_from_a_whole() {
        let frame = in_ipv6(44, &[17, 0, 0x05, 0xa9, 1, 2, 3, 4, 9, 9, 9, 9, 9, 9, 9, 9]);
        let Packet::Fragment(fragment) = Packet::parse(&frame) else { panic!("no fragment") };
        assert_eq!((fragment.of.id, fragment.protocol), (0x0102_0304, 17));
        assert_eq!((fragment.offset, fragment.more, &frame[fragment.payload]), (0x05a8, true, &[9; 8][..]));
    }
}
