//! A flow's name: who talks to whom, and about what.
//!
//! ```text
//! TCP, UDP   VLANs, addresses, protocol, ports
//! DNS, DHCP  the same, and the transaction: each question, each answer is a flow of its own
//! question   of the guest: VLANs, addresses, protocol, the server's port, and what is asked; DHCP: by whom, and in which step
//! ICMP       VLANs, addresses, protocol; the echo's identifier, or the type
//! Identity   VLANs, address, hardware address
//! Other      VLANs, addresses, protocol
//! ```
//!
//! Within a flow order is kept; between flows there is none. That is why a resolver's answers are matched by their
//! identifier: two guests may well answer two questions in different order. A guest's own questions have an identifier and
//! a port that it draws at random (RFC 5452; RFC 2131 4.1, RFC 8415 16.1), so they are told by what they ask: a lease by the
//! hardware address that asks for it and by the message's type, as which two are the same step of one exchange; what
//! they say in it is compared.

use super::neighbour::Identity;
use super::packet::{ETHERTYPE_ARP, Ip, PROTOCOL_ICMPV6, Transport, Vlans, be16, be32};
use core::net::{IpAddr, Ipv4Addr};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Range;

const PORT_DNS: u16 = 53;
/// A server's port and a client's.
pub(super) const PORTS_DHCP: [u16; 2] = [67, 68];
/// The same of DHCPv6.
pub(super) const PORTS_DHCPV6: [u16; 2] = [547, 546];
const DHCP_REQUEST: u8 = 1;
const DHCP_XID_AND_SECS: Range<usize> = 4..10;
const DHCP_SECS: Range<usize> = 8..10;
/// The client's hardware address, padded.
pub(super) const DHCP_HARDWARE: Range<usize> = 28..44;
const DHCPV6_XID: Range<usize> = 1..4;
const DHCPV6_OPTIONS_AT: usize = 4;
/// For how long the sender has been trying.
const DHCPV6_ELAPSED: u16 = 8;
const DNS_ID: Range<usize> = 0..2;
const DNS_ANSWER: u8 = 0x80;
/// Marks the transaction of a question: others have 40 bits at most.
const QUESTION: u64 = 1 << 47;
const DHCP_OPTIONS_AT: usize = 240;
const DHCP_MESSAGE_TYPE: u8 = 53;

/// The bytes of a flow's datagrams that are not compared.
#[derive(Clone, Debug, Default)]
pub(super) struct Ignored {
    at: Range<usize>,
    /// What DHCPv6's option for it says of the time, too.
    elapsed: bool,
}

impl Ignored {
    /// Whether two datagrams are the same but for these.
    pub(super) fn same(&self, a: &[u8], b: &[u8]) -> bool {
        if a.len() != b.len() || a.len() < self.at.end || self.at.is_empty() {
            return a == b;
        }
        // Where guest B's option is follows from its being the same up to there.
        let elapsed = if self.elapsed { dhcpv6_option(a, DHCPV6_ELAPSED) } else { None }.unwrap_or(a.len()..a.len());
        [0..self.at.start, self.at.end..elapsed.start, elapsed.end..a.len()]
            .into_iter()
            .all(|part| a[part.clone()] == b[part])
    }
}

/// Who talks to whom, in the guest's direction.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FlowKey {
    /// The VLANs of its frames, the outer first.
    pub vlans: Vlans,
    /// The guest's address.
    pub src: IpAddr,
    /// The peer's address.
    pub dst: IpAddr,
    /// IP protocol number; [`FlowKey::IDENTITY`] for address resolution and neighbour discovery.
    pub protocol: u16,
    /// The guest's port, or an ICMP echo identifier.
    pub src_port: u16,
    /// The peer's port, or one more than the type of an ICMP message that is no echo.
    pub dst_port: u16,
    /// A DNS or DHCP transaction, a hardware address, or 0.
    pub transaction: u64,
}

impl FlowKey {
    /// The protocol of an identity: an EtherType, so no IP protocol.
    pub const IDENTITY: u16 = ETHERTYPE_ARP;

    /// The key of a packet sent by the guest. Transactions need the payload: [`FlowKey::within`].
    #[must_use]
    pub fn of(ip: &Ip) -> Self {
        let icmp = if ip.src.is_ipv4() { 1 } else { PROTOCOL_ICMPV6 };
        let (protocol, src_port, dst_port) = match &ip.transport {
            Transport::Tcp(tcp) => (6, tcp.src_port, tcp.dst_port),
            Transport::Udp { src_port, dst_port, .. } => (17, *src_port, *dst_port),
            Transport::Icmp { echo_id: Some(id), .. } => (icmp, *id, 0),
            Transport::Icmp { kind, echo_id: None, .. } => (icmp, 0, u16::from(*kind) + 1),
            Transport::Other { protocol, .. } => (*protocol, 0, 0),
        };
        let protocol = u16::from(protocol);
        Self { vlans: ip.vlans, src: ip.src, dst: ip.dst, protocol, src_port, dst_port, transaction: 0 }
    }

    /// The key of the transaction within this flow that a datagram belongs to.
    #[must_use]
    pub fn within(self, payload: &[u8]) -> Self {
        if self.protocol == 17
            && self.dst_port == PORT_DNS
            && payload.get(2).is_some_and(|flags| flags & DNS_ANSWER == 0)
        {
            return Self { src_port: 0, transaction: QUESTION | question(&payload[DNS_ID.end..]), ..self };
        }
        let ports = [self.src_port, self.dst_port];
        if let Some(asked) = (self.protocol == 17).then(|| dhcp_question([ports[1], ports[0]], payload)).flatten() {
            return Self { transaction: QUESTION | asked, ..self };
        }
        let transaction = match self.protocol {
            17 if ports.contains(&PORT_DNS) => be16(payload, 0).map(u64::from),
            17 if ports.iter().all(|port| PORTS_DHCP.contains(port)) => dhcp_transaction(payload),
            _ => None,
        };
        Self { transaction: transaction.unwrap_or(0), ..self }
    }

    /// The bytes of its datagrams that each guest makes up by itself: in a question, its number; in a DHCP message, for how
    /// long its sender has been trying.
    pub(super) fn ignored(&self) -> Ignored {
        let at = match self.protocol {
            17 if self.transaction & QUESTION != 0 => match self.dst_port {
                PORT_DNS => DNS_ID,
                port if port == PORTS_DHCPV6[0] => return Ignored { at: DHCPV6_XID, elapsed: true },
                _ => DHCP_XID_AND_SECS,
            },
            17 if [self.src_port, self.dst_port].iter().all(|port| PORTS_DHCP.contains(port)) => DHCP_SECS,
            _ => 0..0,
        };
        Ignored { at, elapsed: false }
    }

    /// A number that tells most flows of one guest from each other, for little; not for a table that strangers fill.
    pub(super) fn fold(&self) -> u8 {
        let peer = match self.dst {
            IpAddr::V4(address) => address.to_bits(),
            IpAddr::V6(address) => address.to_bits() as u32,
        };
        let ports = u32::from(self.src_port) << 16 | u32::from(self.dst_port);
        // All of the bits have a say in the upper ones of the product (Knuth 6.4).
        ((peer.rotate_left(16) ^ ports).wrapping_mul(0x9e37_79b9) >> 24) as u8
    }

    /// What the flow serves: the lower of its ports is a server's, since clients draw theirs from the upper ones (RFC 6335 6).
    #[must_use]
    pub fn service(&self) -> Service {
        let protocol = match self.protocol {
            Self::IDENTITY => "identity".to_owned(),
            1 => "icmp".to_owned(),
            6 => "tcp".to_owned(),
            17 => "udp".to_owned(),
            58 => "icmpv6".to_owned(),
            other => format!("ip-{other}"),
        };
        let port = match (self.protocol, self.src_port, self.dst_port) {
            // A question is told by what it asks, and has no port of the guest's.
            (6 | 17, 0, port) => ServicePort::Peer(port),
            (6 | 17, port, other) if port <= other => ServicePort::Guest(port),
            (6 | 17, _, port) => ServicePort::Peer(port),
            _ => ServicePort::None,
        };
        Service { protocol, port }
    }

    /// The same flow, from a packet sent by the peer.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, src_port: self.dst_port, dst_port: self.src_port, ..self }
    }
}

/// What flows have in common that are of one service: it names nobody who uses it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Service {
    /// tcp, udp, icmp, icmpv6, identity (address resolution, neighbour discovery), or ip-N.
    pub protocol: String,
    /// Whose.
    pub port: ServicePort,
}

/// A port of a service, and who offers it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServicePort {
    /// There are none in that protocol.
    None,
    /// The guest serves.
    Guest(u16),
    /// The guest is a client.
    Peer(u16),
}

/// All of the key in few words: the derived one feeds a hasher a field at a time, lengths and variants too.
impl Hash for FlowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                state.write_u64(u64::from(src.to_bits()) << 32 | u64::from(dst.to_bits()))
            }
            (src, dst) => [src, dst].into_iter().for_each(|address| match address {
                IpAddr::V4(address) => state.write_u32(address.to_bits()),
                IpAddr::V6(address) => state.write_u128(address.to_bits()),
            }),
        }
        let [outer, inner, source, destination] =
            [self.vlans[0], self.vlans[1], self.src_port, self.dst_port].map(u64::from);
        state.write_u64(outer << 48 | inner << 32 | source << 16 | destination);
        // A transaction has 48 bits at most; one that had more would still be told by equality.
        state.write_u64(self.transaction << 16 | u64::from(self.protocol));
    }
}

impl From<Identity> for FlowKey {
    fn from(said: Identity) -> Self {
        let hardware = said.hardware.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
        Self {
            vlans: said.vlans,
            src: said.address,
            dst: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            protocol: Self::IDENTITY,
            src_port: 0,
            dst_port: 0,
            transaction: hardware,
        }
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Self::IDENTITY => write!(f, "identity {}", self.src)?,
            6 => write!(f, "tcp {} {} > {} {}", self.src, self.src_port, self.dst, self.dst_port)?,
            17 => write!(f, "udp {} {} > {} {}", self.src, self.src_port, self.dst, self.dst_port)?,
            other => write!(f, "protocol {other} {} > {}", self.src, self.dst)?,
        }
        self.vlans.iter().filter(|vlan| **vlan != 0).try_for_each(|vlan| write!(f, " vlan {vlan}"))
    }
}

/// What is asked, in 47 bits (FNV-1a). Two questions that share them are taken for two of one flow, and compared.
fn question(bytes: &[u8]) -> u64 {
    let hash =
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    (hash ^ hash >> 47) & (QUESTION - 1)
}

/// Who asks for a lease, and in which step. `ports` are the server's and the client's.
fn dhcp_question(ports: [u16; 2], payload: &[u8]) -> Option<u64> {
    match ports {
        PORTS_DHCP if payload.first() == Some(&DHCP_REQUEST) => {
            let hardware = payload.get(DHCP_HARDWARE)?;
            Some(question(&[hardware, &[dhcp_step(payload)?]].concat()))
        }
        PORTS_DHCPV6 => Some(question(payload.get(..DHCPV6_XID.start)?)),
        _ => None,
    }
}

/// The exchange and the step in it.
fn dhcp_transaction(payload: &[u8]) -> Option<u64> {
    let xid = be32(payload, 4)?;
    Some(u64::from(xid) << 8 | u64::from(dhcp_step(payload)?))
}

/// The type of a DHCP message; 0 for one of BOOTP.
fn dhcp_step(payload: &[u8]) -> Option<u8> {
    let mut options = payload.get(DHCP_OPTIONS_AT..)?;
    loop {
        match *options {
            [0, ..] => options = &options[1..],
            [DHCP_MESSAGE_TYPE, 1, kind, ..] => return Some(kind),
            [1..=254, length, ..] => options = options.get(2 + usize::from(length)..)?,
            _ => return Some(0),
        }
    }
}

/// Where the first option of a kind has its value, in a message of DHCPv6.
pub(super) fn dhcpv6_option(message: &[u8], wanted: u16) -> Option<Range<usize>> {
    let mut at = DHCPV6_OPTIONS_AT;
    loop {
        let (kind, length) = (be16(message, at)?, be16(message, at + 2)?);
        let value = at + 4..at + 4 + usize::from(length);
        message.get(value.clone())?;
        if kind == wanted {
            return Some(value);
        }
        at = value.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_told_by_the_lower_port() {
        let [guest, peer] = [2, 9].map(|last| IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)));
        for (protocol, src_port, dst_port, name, port) in [
            (6, 80, 40000, "tcp", ServicePort::Guest(80)),
            (6, 40000, 443, "tcp", ServicePort::Peer(443)),
            (17, 123, 123, "udp", ServicePort::Guest(123)),
            (17, 0, 53, "udp", ServicePort::Peer(53)),
            (1, 7, 0, "icmp", ServicePort::None),
            (58, 0, 136, "icmpv6", ServicePort::None),
            (FlowKey::IDENTITY, 0, 0, "identity", ServicePort::None),
            (132, 0, 0, "ip-132", ServicePort::None),
        ] {
            let key = FlowKey { vlans: [0; 2], src: guest, dst: peer, protocol, src_port, dst_port, transaction: 0 };
            assert_eq!(key.service(), Service { protocol: name.into(), port });
        }
    }
}
