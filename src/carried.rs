//! A TCP connection in two sequence spaces, as one host tells it to another: what a takeover has left of a pair in
//! lock-step, whose two guests had each drawn a number of their own.
//!
//! ```text
//!   client ◀── its numbers ──▶ the survivor's rewriter ◀── the guest's numbers ──▶ pair of the survivor and its secondary
//! ```
//!
//! Whoever has the guest next must know them: a checkpoint of a guest that has such connections has a record of them
//! (`colo::stream`), and the rewriters (`compare::rewriter`) make and use them. The trap: such a connection ends, and its
//! addresses are used again by one that needs nothing; so each checkpoint tells all of them anew.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Connections that are told at most: those with the latest frames.
pub const CARRIED_MAX: usize = 1024;
/// Bytes of one in a record.
pub const CARRIED_BYTES: usize = 56;
const IS_IPV4: u32 = 1;
const HAS_ECHO: u32 = 2;

/// A connection in two sequence spaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Carried {
    /// The VLANs of its frames, the outer first; 0 where there is none.
    pub vlans: [u16; 2],
    /// The guest's end.
    pub guest: SocketAddr,
    /// The client's.
    pub client: SocketAddr,
    /// The guest's sequence numbers minus those the client knows.
    pub offset: u32,
    /// The guest's clock, as its timestamps tell it, minus the one the client knows.
    pub clock_offset: u32,
    /// The latest time the client has echoed.
    pub echoed: Option<u32>,
}

impl Carried {
    /// Its bytes: VLANs and ports as le16, addresses (of IPv4 as IPv6 maps them), then four le32.
    #[must_use]
    pub fn encode(&self) -> [u8; CARRIED_BYTES] {
        let mut out = [0; CARRIED_BYTES];
        let words = [self.vlans[0], self.vlans[1], self.guest.port(), self.client.port()];
        let bits = if self.guest.is_ipv4() { IS_IPV4 } else { 0 } | if self.echoed.is_some() { HAS_ECHO } else { 0 };
        let longs = [self.offset, self.clock_offset, self.echoed.unwrap_or(0), bits];
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let parts = words.iter().flat_map(|word| word.to_le_bytes());
        let parts = parts.chain([self.guest.ip(), self.client.ip()].into_iter().flat_map(octets));
        let parts = parts.chain(longs.iter().flat_map(|long| long.to_le_bytes()));
        out.iter_mut().zip(parts).for_each(|(out, byte)| *out = byte);
        out
    }

    /// What [`Self::encode`] wrote; `None` of bytes that it never writes.
    #[must_use]
    pub fn decode(bytes: &[u8; CARRIED_BYTES]) -> Option<Self> {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let bits = long(52);
        let address = |at: usize| {
            let octets: [u8; 16] = bytes[at..at + 16].try_into().ok()?;
            let ip = Ipv6Addr::from(octets);
            if bits & IS_IPV4 == 0 { Some(IpAddr::V6(ip)) } else { ip.to_ipv4_mapped().map(IpAddr::V4) }
        };
        let echo = long(48);
        if bits & !(IS_IPV4 | HAS_ECHO) != 0 || (bits & HAS_ECHO == 0 && echo != 0) {
            return None;
        }
        Some(Self {
            vlans: [word(0), word(2)],
            guest: SocketAddr::new(address(8)?, word(4)),
            client: SocketAddr::new(address(24)?, word(6)),
            offset: long(40),
            clock_offset: long(44),
            echoed: (bits & HAS_ECHO != 0).then_some(echo),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn its_bytes() {
        let carried = Carried {
            vlans: [5, 0],
            guest: "10.0.0.2:80".parse().unwrap(),
            client: "10.0.0.9:40000".parse().unwrap(),
            offset: 0x0102_0304,
            clock_offset: 0xfffe_fdfc,
            echoed: Some(7),
        };
        let bytes = carried.encode();
        assert_eq!(bytes[..8], [5, 0, 0, 0, 80, 0, 0x40, 0x9c]);
        assert_eq!(bytes[18..24], [0xff, 0xff, 10, 0, 0, 2]);
        assert_eq!(bytes[34..40], [0xff, 0xff, 10, 0, 0, 9]);
        assert_eq!(bytes[40..], [4, 3, 2, 1, 0xfc, 0xfd, 0xfe, 0xff, 7, 0, 0, 0, 3, 0, 0, 0]);
    }

    fn end(v4: bool) -> BoxedStrategy<SocketAddr> {
        let ip = if v4 {
            any::<[u8; 4]>().prop_map(IpAddr::from).boxed()
        } else {
            any::<[u8; 16]>().prop_map(IpAddr::from).boxed()
        };
        (ip, any::<u16>()).prop_map(SocketAddr::from).boxed()
    }

    fn connection() -> impl Strategy<Value = Carried> {
        any::<bool>().prop_flat_map(|v4| {
            let numbers = any::<([u16; 2], u32, u32, Option<u32>)>();
            (end(v4), end(v4), numbers).prop_map(|(guest, client, (vlans, offset, clock_offset, echoed))| Carried {
                vlans,
                guest,
                client,
                offset,
                clock_offset,
                echoed,
            })
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(carried in connection()) {
            prop_assert_eq!(Carried::decode(&carried.encode()), Some(carried));
        }

        #[test]
        fn no_other_bytes_are_read(carried in connection(), at in 0..CARRIED_BYTES, bit in 0..8) {
            let mut bytes = carried.encode();
            bytes[at] ^= 1_u8 << bit;
            // The connection that these bytes are, or none.
            let read = Carried::decode(&bytes);
            prop_assert_eq!(read.map(|read| read.encode()), read.map(|_| bytes));
            let is_known = at < 52 || (at == 52 && bit < 2);
            prop_assert!(is_known || read.is_none(), "a bit that means nothing");
        }
    }
}
