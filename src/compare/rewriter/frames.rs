//! Segments for the rewriter's tests, with anything around them and in their options, and checksums added up from
//! nothing.

use crate::compare::checksum::ones_sum;
use crate::compare::packet::Tcp;
use crate::compare::properties::Dice;
use crate::compare::testing::{CLIENT, CLIENT6, GUEST, GUEST6, tagged};

/// What is around the segments of a connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Around {
    pub(super) v6: bool,
    pub(super) tags: Vec<u16>,
    /// IP options, or an extension header.
    pub(super) ip_options: bool,
    pub(super) vnet_header_bytes: usize,
    /// The checksum is that of the pseudo-header.
    pub(super) partial: bool,
}

impl Around {
    pub(super) fn any(dice: &mut Dice) -> Self {
        let vnet_header_bytes = [0, 10, 12][dice.roll(3)];
        Self {
            v6: dice.roll(2) == 0,
            tags: (0..dice.roll(3)).map(|tag| tag as u16 + 5).collect(),
            ip_options: dice.roll(2) == 0,
            vnet_header_bytes,
            partial: vnet_header_bytes > 0 && dice.roll(2) == 0,
        }
    }
}

/// A segment, as somebody says it.
#[derive(Clone, Debug)]
pub(super) struct Said {
    pub(super) from_client: bool,
    pub(super) flags: u8,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) sack: Vec<(u32, u32)>,
    /// The sender's clock and its echo.
    pub(super) clocks: Option<(u32, u32)>,
    /// How its options are arranged.
    pub(super) layout: u64,
    pub(super) payload: Vec<u8>,
    pub(super) client_port: u16,
}

impl Said {
    pub(super) fn new(from_client: bool, flags: u8, seq: u32, ack: u32) -> Self {
        let (sack, payload) = (vec![], vec![]);
        Self { from_client, flags, seq, ack, sack, clocks: None, layout: 1, payload, client_port: 40_000 }
    }

    /// Timestamps and SACK in either order, at any alignment, among options that mean nothing to us.
    fn options(&self) -> Vec<u8> {
        let mut dice = Dice(self.layout);
        let mut known = vec![];
        if let Some((clock, echo)) = self.clocks {
            known.push([&[8, 10][..], &clock.to_be_bytes(), &echo.to_be_bytes()].concat());
        }
        if !self.sack.is_empty() {
            let edges: Vec<u8> =
                self.sack.iter().flat_map(|(a, b)| [a.to_be_bytes(), b.to_be_bytes()].concat()).collect();
            known.push([&[5, 2 + edges.len() as u8][..], &edges].concat());
        }
        if dice.roll(2) == 0 {
            known.reverse();
        }
        let mut out = vec![];
        for option in known {
            out.extend(vec![1; dice.roll(3)]);
            if dice.roll(3) == 0 {
                out.extend([253, 3, 7]);
            }
            out.extend(option);
        }
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    /// The frame, its checksum right, or that of the pseudo-header.
    pub(super) fn frame(&self, around: &Around) -> Vec<u8> {
        let options = self.options();
        let (mut ports, mut addresses) = ([80_u16, self.client_port], [(GUEST, GUEST6), (CLIENT, CLIENT6)]);
        if self.from_client {
            ports.reverse();
            addresses.reverse();
        }
        let mut segment = [ports[0].to_be_bytes(), ports[1].to_be_bytes()].concat();
        segment.extend([self.seq.to_be_bytes(), self.ack.to_be_bytes()].concat());
        segment.extend([(5 + options.len() as u8 / 4) << 4, self.flags, 0x20, 0, 0, 0, 0, 0]);
        segment.extend(options);
        segment.extend(&self.payload);
        let addresses: Vec<u8> =
            addresses.iter().flat_map(|(v4, v6)| if around.v6 { v6.to_vec() } else { v4.to_vec() }).collect();
        let pseudo = ones_sum(ones_sum(6, &addresses), &(segment.len() as u32).to_be_bytes());
        let checksum = if around.partial { pseudo } else { !ones_sum(pseudo, &segment) };
        segment[16..18].copy_from_slice(&(checksum as u16).to_be_bytes());
        let frame = [vec![2; 12], ip(around, &addresses, &segment)].concat();
        let frame = if around.tags.is_empty() { frame } else { tagged(&around.tags, &frame) };
        let mut header = vec![0; around.vnet_header_bytes];
        if let Some(flags) = header.first_mut() {
            *flags = u8::from(around.partial);
        }
        [header, frame].concat()
    }
}

/// From the EtherType on.
fn ip(around: &Around, addresses: &[u8], segment: &[u8]) -> Vec<u8> {
    let extra: &[u8] = match (around.ip_options, around.v6) {
        (false, _) => &[],
        (true, true) => &[6, 0, 1, 4, 0, 0, 0, 0],
        (true, false) => &[148, 4, 0, 0, 1, 1, 1, 0],
    };
    let length = (extra.len() + segment.len()) as u16;
    let header = if around.v6 {
        let first = if around.ip_options { 60 } else { 6 };
        [&[0x86, 0xdd, 0x60, 0, 0, 0][..], &length.to_be_bytes(), &[first, 64], addresses, extra].concat()
    } else {
        let ihl = 0x45 + extra.len() as u8 / 4;
        let total = (length + 20).to_be_bytes();
        [&[8, 0, ihl, 0][..], &total, &[0, 1, 0x40, 0, 64, 6, 0, 0], addresses, extra].concat()
    };
    [&header, segment].concat()
}

/// The flags of a segment that carries data.
pub(super) const PLAIN: u8 = Tcp::ACK;
pub(super) const SYN_ACK: u8 = Tcp::SYN | Tcp::ACK;
pub(super) const FIN: u8 = Tcp::FIN | Tcp::ACK;
