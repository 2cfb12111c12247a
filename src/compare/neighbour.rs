//! Address resolution and neighbour discovery: who says which address is its own.
//!
//! ```text
//!   ARP request, reply, probe, announcement    ─┐
//!   NS · NA · RS with link-layer options only  ─┴─▶ Identity { address, hardware address, VLANs }
//! ```
//!
//! **The policy.** What the network keeps of such a message is one thing: that an address is at a hardware address.
//! An identity the network has been shown (in an epoch that is owned, or explained) is configuration, equal in both
//! guests, and a message that repeats it leaves at once. One that is new is compared: it leaves when guest B announced
//! the same identity in this epoch, or with the checkpoint. So a guest that has just given itself a service address
//! does not draw clients to a host whose successor would not answer them. Whom a question asks for, and whom an answer
//! answers, is not compared: questions are repeated at will and each guest asks when its own cache has aged. A guest B
//! that asks alone has said nothing that must be matched.
//!
//! Router advertisements, redirects, and solicitations with any other option carry more than an identity and are
//! compared whole, as other ICMPv6 messages are. Sources: RFC 826, 5227, 4861; a nonce (RFC 7527) means nothing to others.

use super::packet::{Reason, Vlans, be16};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ARP_BYTES: usize = 28;
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const OPTION_NONCE: u8 = 14;

/// That an address is at a hardware address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The VLANs in which it is said.
    pub vlans: Vlans,
    /// The address; while it is being probed for, the address wanted.
    pub address: IpAddr,
    /// The hardware address; zero where the message names none, as a probe does.
    pub hardware: [u8; 6],
}

fn octets<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// An ARP packet at `at`.
pub(super) fn arp(frame: &[u8], at: usize, vlans: Vlans) -> Result<Identity, Reason> {
    let packet: [u8; ARP_BYTES] = octets(frame, at).ok_or(Reason::Truncated)?;
    if packet[..6] != [0, 1, 8, 0, 6, 4] || !matches!(be16(&packet, 6), Some(1 | 2)) {
        return Err(Reason::AddressResolution);
    }
    let address = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
    let (sender, target) = (address(14), address(24));
    let address = if sender.is_unspecified() { target } else { sender };
    let hardware = octets(&packet, 8).ok_or(Reason::Truncated)?;
    Ok(Identity { vlans, address: IpAddr::V4(address), hardware })
}

/// An ICMPv6 message at `at`, if it is neighbour discovery that says no more than an identity.
pub(super) fn discovery(packet: &[u8], at: usize, vlans: Vlans, src: IpAddr) -> Option<Identity> {
    let kind = *packet.get(at)?;
    let target_bytes = match kind {
        ROUTER_SOLICITATION => 0,
        NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => 16,
        _ => return None,
    };
    let (target, mut options) = packet.get(at + 8..)?.split_at_checked(target_bytes)?;
    let mut hardware = None;
    while !options.is_empty() {
        match *options {
            // A link-layer address of the sender, or of the target it answers for.
            [1 | 2, 1, a, b, c, d, e, f, ..] => hardware = Some([a, b, c, d, e, f]),
            [OPTION_NONCE, 1, ..] => {}
            _ => return None,
        }
        options = options.get(8..)?;
    }
    let target = <[u8; 16]>::try_from(target).ok().map(|octets| IpAddr::V6(Ipv6Addr::from(octets)));
    let address = match target {
        Some(target) if kind == NEIGHBOUR_ADVERTISEMENT || src.is_unspecified() => target,
        _ => src,
    };
    Some(Identity { vlans, address, hardware: hardware.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::packet::Packet;
    use crate::compare::testing::{GUEST, GUEST6, arp, icmp6, tagged};

    fn identity(frame: &[u8]) -> Option<Identity> {
        match Packet::parse(frame) {
            Packet::Neighbour(identity) => Some(identity),
            _ => None,
        }
    }

    #[test]
    fn arp_says_who_the_sender_is_or_wants_to_be() {
        let said = Identity { vlans: [0; 2], address: GUEST.into(), hardware: [2, 0, 0, 0, 0, 2] };
        assert_eq!(identity(&arp(1, GUEST, [10, 0, 0, 9])), Some(said));
        assert_eq!(identity(&arp(2, GUEST, [10, 0, 0, 9])), Some(said));
        assert_eq!(identity(&arp(1, [0; 4], GUEST)), Some(said), "a probe");
        assert_eq!(identity(&tagged(&[7], &arp(1, GUEST, GUEST))), Some(Identity { vlans: [7, 0], ..said }));
        let mut inverse = arp(1, GUEST, GUEST);
        inverse[21] = 8;
        assert_eq!(Packet::parse(&inverse), Packet::Unparsable(Reason::AddressResolution));
        assert_eq!(Packet::parse(&inverse[..40]), Packet::Unparsable(Reason::Truncated));
    }

    #[test]
    fn discovery_with_more_than_an_identity_is_a_message() {
        let target = [&[0xfe, 0x80][..], &[0; 13], &[5]].concat();
        let link = [1, 1, 2, 0, 0, 0, 0, 2];
        let message = |kind: u8, rest: &[&[u8]]| icmp6(&[&[kind, 0, 0, 0, 0, 0, 0, 0][..], &rest.concat()].concat());
        let said = |address| Some(Identity { vlans: [0; 2], address, hardware: [2, 0, 0, 0, 0, 2] });
        let other: [u8; 16] = target.clone().try_into().unwrap();
        assert_eq!(identity(&message(135, &[&target, &link])), said(GUEST6.into()));
        assert_eq!(identity(&message(136, &[&target, &link])), said(other.into()));
        assert_eq!(identity(&message(133, &[&link])), said(GUEST6.into()));
        assert_eq!(identity(&message(135, &[&target, &link, &[14, 1, 1, 2, 3, 4, 5, 6]])), said(GUEST6.into()));
        for whole in [
            message(134, &[&[0; 8]]),
            message(135, &[&target, &[3, 1, 0, 0, 0, 0, 0, 0]]),
            message(135, &[&target, &[1, 1, 0]]),
            message(133, &[&[1, 0, 0, 0, 0, 0, 0, 0]]),
        ] {
            assert!(matches!(Packet::parse(&whole), Packet::Ip(_)), "{whole:?}");
        }
    }
}
