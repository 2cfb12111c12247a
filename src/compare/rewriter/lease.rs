//! Answers to a guest that asks for its address.
//!
//! Each guest draws a number for its exchange with a DHCP server (RFC 2131 4.1, RFC 8415 16.1). Guest A's question is the one
//! that leaves, so the server's answer has guest A's number, and guest B would not take it for its own. Here it gets guest B's.
//!
//! ```text
//!   guest B asks with b          the latest of who asks
//!   an answer to a, the first    b, and from then on a means b: a copy of it that is late is no answer to a later question
//!   an answer to a, again        b
//!   checkpoint                   guest B has asked with guest A's numbers: all is forgotten
//! ```
//!
//! Who asks is told by VLANs and hardware address; in DHCPv6 by VLANs, the address that is answered, and the client identifier.
//!
//! The trap: an answer for which guest B has no question is passed as it is, and not held until it has one. Guest A's
//! question leaves when guest B has asked the same, which was seen here, or with a checkpoint, and then guest B has loaded a
//! state that waits for just this answer, with guest A's number, and would not ask again.

use super::segment::VNET_NEEDS_CSUM;
use crate::compare::checksum::udp_replace;
use crate::compare::key::{DHCP_HARDWARE, PORTS_DHCP, PORTS_DHCPV6, dhcpv6_option};
use crate::compare::packet::{Ip, Packet, Transport, be32};
use core::net::IpAddr;
use std::collections::VecDeque;
use std::ops::Range;

/// Questions that are remembered.
const ASKED_MAX: usize = 16;
const UDP_HEADER_BYTES: usize = 8;
const BOOTREQUEST: u8 = 1;
const BOOTREPLY: u8 = 2;
/// SOLICIT, REQUEST, CONFIRM, RENEW, REBIND, RELEASE, DECLINE, INFORMATION-REQUEST.
const QUESTIONS_V6: [u8; 8] = [1, 3, 4, 5, 6, 8, 9, 11];
/// ADVERTISE, REPLY. (RECONFIGURE answers nothing, and its number is 0.)
const ANSWERS_V6: [u8; 2] = [2, 7];
const CLIENT_IDENTIFIER: u16 = 1;
/// A type and what follows it (RFC 8415 11.1).
const CLIENT_IDENTIFIER_MAX_BYTES: usize = 130;

/// A question of guest B's.
#[derive(Debug)]
struct Asked {
    who: Vec<u8>,
    number: u32,
    /// Guest A's number, of the first answer.
    answered: Option<u32>,
}

/// Guest B's questions, the latest last.
#[derive(Debug, Default)]
pub(super) struct Leases(VecDeque<Asked>);

impl Leases {
    /// A frame of guest B's.
    pub(super) fn ask(&mut self, frame: &[u8], vnet_header_bytes: usize) {
        let Some(Message { who, number, .. }) = Message::read(frame, vnet_header_bytes, true) else { return };
        let again = self.0.iter().position(|asked| asked.number == number && asked.who == who);
        let again = again.and_then(|at| self.0.remove(at));
        if self.0.len() >= ASKED_MAX {
            self.0.pop_front();
        }
        self.0.push_back(again.unwrap_or(Asked { who, number, answered: None }));
    }

    /// A frame on its way to guest B.
    pub(super) fn answer(&mut self, frame: &mut [u8], vnet_header_bytes: usize) {
        if self.0.is_empty() {
            return;
        }
        let Some(Message { who, payload, at, mask, number }) = Message::read(frame, vnet_header_bytes, false) else {
            return;
        };
        let known = self.0.iter().position(|asked| asked.answered == Some(number) && asked.who == who);
        let latest = || self.0.iter().rposition(|asked| asked.who == who);
        let Some(asked) = known.or_else(latest).and_then(|place| self.0.get_mut(place)) else { return };
        asked.answered.get_or_insert(number);
        let Some(word) = be32(&frame[payload.clone()], at).map(|word| word & !mask | asked.number) else { return };
        if vnet_header_bytes > 0 && frame[0] & VNET_NEEDS_CSUM != 0 {
            // The sum of the pseudo-header alone, and the device adds the rest.
            frame[payload][at..][..4].copy_from_slice(&word.to_be_bytes());
        } else {
            udp_replace(&mut frame[payload.start - UDP_HEADER_BYTES..payload.end], UDP_HEADER_BYTES + at, word);
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// A question or an answer.
struct Message {
    who: Vec<u8>,
    payload: Range<usize>,
    /// Where in the payload the word is that has the number, and which of its bits are the number's.
    at: usize,
    mask: u32,
    number: u32,
}

impl Message {
    fn read(frame: &[u8], vnet_header_bytes: usize, is_question: bool) -> Option<Self> {
        let Packet::Ip(Ip { vlans, src, dst, transport }) = Packet::parse_behind(frame, vnet_header_bytes) else {
            return None;
        };
        let Transport::Udp { src_port, dst_port, payload } = transport else { return None };
        let message = &frame[payload.clone()];
        let kind = message.first()?;
        let (ports, guest) = if is_question { ([dst_port, src_port], src) } else { ([src_port, dst_port], dst) };
        let mut who = vlans.map(u16::to_be_bytes).concat();
        who.push(if guest.is_ipv4() { 4 } else { 6 });
        let (at, mask) = match (ports, guest) {
            (PORTS_DHCP, IpAddr::V4(_)) if *kind == if is_question { BOOTREQUEST } else { BOOTREPLY } => {
                who.extend(message.get(DHCP_HARDWARE)?);
                (4, u32::MAX)
            }
            (PORTS_DHCPV6, IpAddr::V6(guest))
                if if is_question { QUESTIONS_V6.contains(kind) } else { ANSWERS_V6.contains(kind) } =>
            {
                // Who only asks for information need not say who it is.
                let client = dhcpv6_option(message, CLIENT_IDENTIFIER).map_or(&[][..], |client| &message[client]);
                who.extend(guest.octets());
                who.extend(client.get(..CLIENT_IDENTIFIER_MAX_BYTES).unwrap_or(client));
                (0, 0x00ff_ffff)
            }
            _ => return None,
        };
        Some(Self { who, at, mask, number: be32(message, at)? & mask, payload })
    }
}

#[cfg(test)]
mod tests;
