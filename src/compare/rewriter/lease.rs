//! Answers to a guest that asks for its address.
//!
//! Each guest draws a number for its exchange with a DHCP server (RFC 2131 4.1). Guest A's question is the one that leaves, so
//! the server's answer has guest A's number, and guest B would not take it for its own. Here it gets the number of guest B's
//! latest question for that hardware address.
//!
//! The trap: an answer that is there before guest B has asked is passed as it is. Guest B then asks in vain, asks again, and
//! that ages, which costs a checkpoint. Only DHCPv4: an answer of DHCPv6 names its client by an option only.

use super::segment::VNET_NEEDS_CSUM;
use crate::compare::checksum::udp_replace;
use crate::compare::packet::{Ip, Packet, Transport, be32};
use std::collections::VecDeque;
use std::ops::Range;

/// Hardware addresses that may ask at the same time.
const ASKED_MAX: usize = 16;
const PORT_SERVER: u16 = 67;
const PORT_CLIENT: u16 = 68;
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const XID_AT: usize = 4;
const HARDWARE: Range<usize> = 28..44;
const UDP_HEADER_BYTES: usize = 8;

/// The numbers of guest B's questions, by who asks, the latest last.
#[derive(Debug, Default)]
pub(super) struct Leases(VecDeque<(Vec<u8>, u32)>);

impl Leases {
    /// A frame of guest B's.
    pub(super) fn ask(&mut self, frame: &[u8], vnet_header_bytes: usize) {
        let Some(payload) = message(frame, vnet_header_bytes, [PORT_CLIENT, PORT_SERVER]) else { return };
        let payload = &frame[payload];
        if let (Some(&REQUEST), Some(hardware), Some(xid)) =
            (payload.first(), payload.get(HARDWARE), be32(payload, XID_AT))
        {
            self.0.retain(|(asked, _)| asked != hardware);
            if self.0.len() >= ASKED_MAX {
                self.0.pop_front();
            }
            self.0.push_back((hardware.to_vec(), xid));
        }
    }

    /// A frame on its way to guest B.
    pub(super) fn answer(&self, frame: &mut [u8], vnet_header_bytes: usize) {
        if self.0.is_empty() {
            return;
        }
        let Some(payload) = message(frame, vnet_header_bytes, [PORT_SERVER, PORT_CLIENT]) else { return };
        let message = &frame[payload.clone()];
        if message.first() != Some(&REPLY) {
            return;
        }
        let Some((_, xid)) = self.0.iter().find(|(asked, _)| message.get(HARDWARE) == Some(&asked[..])) else { return };
        if vnet_header_bytes > 0 && frame[0] & VNET_NEEDS_CSUM != 0 {
            // The sum of the pseudo-header alone, and the device adds the rest.
            frame[payload][XID_AT..][..4].copy_from_slice(&xid.to_be_bytes());
        } else {
            udp_replace(&mut frame[payload.start - UDP_HEADER_BYTES..payload.end], UDP_HEADER_BYTES + XID_AT, *xid);
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Where a datagram between these ports has its payload.
fn message(frame: &[u8], vnet_header_bytes: usize, ports: [u16; 2]) -> Option<Range<usize>> {
    match Packet::parse_behind(frame, vnet_header_bytes) {
        Packet::Ip(Ip { transport: Transport::Udp { src_port, dst_port, payload }, .. })
            if [src_port, dst_port] == ports =>
        {
            Some(payload)
        }
        _ => None,
    }
}
