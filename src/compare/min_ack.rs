//! The min-ACK rule: a client is told of what both guests have of it.
//!
//! ```text
//!   client ── 100 segments ──▶ guest A: has 100, ACK 100      held until guest B has acknowledged as far
//!                          └─▶ guest B: has 60, its buffer was full, and 40 are lost there alone
//!   client ── 61 again, and again, each time later ──▶ both; guest B: ACK 61
//!   client ◀── ACK 61, made here ─ [`acknowledgement`]
//!   client ── 62, 63 ──▶ both ... until guest B has 100, and guest A's own ACK leaves
//! ```
//!
//! Guest A never says 61, so without this the client would send that one segment again until guest A's ACK has aged, though no
//! frame was lost on any wire. A guest's window is an offer to a client that sees guest A's alone, so a guest B that reads
//! slower loses what it has no room for, and only the client can send it again.
//!
//! | it has | from | because |
//! |---|---|---|
//! | addresses, sequence number, clock | guest A's oldest segment that waits | all before it has left, and none of those behind it may seem old (RFC 7323 5.3) |
//! | echo of the client's clock | guest B's segment | of an older one the client concludes that it need not have sent again, and that the way is long (RFC 3522, 7323 4) |
//! | SACK blocks | guest B's segment, as far as guest A has acknowledged | the client leaves out what both have; guest A's own blocks are of what guest B need not have |
//! | window | the smaller | it is an offer of both |
//!
//! Duplicates are passed on too: a client takes an ACK after its timer has run out for a late one, and goes on as if nothing
//! were lost, unless a duplicate follows (RFC 5682). Not for signed (MD5, TCP-AO) or multipath segments: nobody here can sign.
//!
//! Sources: Dong et al., COLO (SoCC 2013) 4.2, for the rule; RFC 9293 3.1 and RFC 2018 for the header.

use super::checksum::ones_sum;
use super::options::{SACK, TIMESTAMPS, options};
use super::packet::{Ip, Packet, Tcp, Transport, be16, be32};
use crate::mutant::{self, Mutant};
use core::net::IpAddr;
use std::time::Duration;

/// How long guest A's ACK waits before a client is told of less: longer than guests delay their ACKs, and not as long as a
/// client waits before it sends again (RFC 6298 has 1 s at least, Linux 0.2 s).
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

const VLAN_TAGS: [u16; 2] = [0x8100, 0x88a8];
const IPV6_HEADER_BYTES: usize = 40;
const TCP: u8 = 6;
/// Offsets in a TCP header, which is so long without options.
const ACK_AT: usize = 8;
const OFFSET_AT: usize = 12;
const FLAGS_AT: usize = 13;
const WINDOW_AT: usize = 14;
const CHECKSUM_AT: usize = 16;
const TCP_HEADER_BYTES: usize = 20;
const NOP: u8 = 1;
const TIMESTAMPS_BYTES: usize = 10;
const BLOCK_BYTES: usize = 8;
/// Blocks that there is room for behind timestamps.
const BLOCKS_MAX: usize = 3;

/// How far both guests have acknowledged, and what guest B's segment says beside that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Told {
    ack: u32,
    window: u16,
    echo: Option<u32>,
    /// As they are in a header.
    blocks: Vec<u8>,
}

impl Told {
    /// Of guest B's segment, which lies in `bytes`. `ours` is how far guest A has acknowledged, `ack` how far both have.
    pub(super) fn of(tcp: &Tcp, bytes: &[u8], ours: u32, ack: u32) -> Option<Self> {
        let header = bytes.get(tcp.options.clone())?;
        let window = be16(bytes, tcp.header_at + WINDOW_AT)?;
        let echo = timestamps(header).and_then(|at| be32(header, at + 6));
        let has = |block: &&[u8]| {
            mutant::active(Mutant::TellAllBlocks)
                || be32(block, 4).is_some_and(|end| (end.wrapping_sub(ours) as i32) <= 0)
        };
        let blocks = options(header).filter(|(kind, ..)| *kind == SACK);
        let blocks = blocks.flat_map(|(_, at, length)| header[at + 2..at + length].chunks_exact(BLOCK_BYTES));
        let blocks = blocks.filter(has).take(BLOCKS_MAX).collect::<Vec<_>>().concat();
        Some(Self { ack, window, echo, blocks })
    }
}

/// Where the timestamps are among options.
fn timestamps(header: &[u8]) -> Option<usize> {
    options(header).find(|(kind, _, length)| (*kind, *length) == (TIMESTAMPS, TIMESTAMPS_BYTES)).map(|(_, at, _)| at)
}

/// An empty segment that tells a client, of guest A's oldest that waits. Nothing: that is no segment, or one that begins or
/// ends a connection at once, or has more in its header than can be made.
pub(super) fn acknowledgement(frame: &[u8], vnet_header_bytes: usize, told: &Told) -> Option<Vec<u8>> {
    let Packet::Ip(Ip { src, dst, transport: Transport::Tcp(tcp), .. }) =
        Packet::parse_behind(frame, vnet_header_bytes)
    else {
        return None;
    };
    let header = frame.get(tcp.options.clone())?;
    if !tcp.has(Tcp::ACK)
        || tcp.has(Tcp::SYN | Tcp::RST)
        || options(header).any(|(kind, ..)| ![TIMESTAMPS, SACK].contains(&kind))
    {
        return None;
    }
    let mut segment = frame.get(tcp.header_at..tcp.header_at + TCP_HEADER_BYTES)?.to_vec();
    if let Some(at) = timestamps(header) {
        segment.extend([NOP, NOP]);
        segment.extend(&header[at..at + TIMESTAMPS_BYTES]);
        if let (Some(echo), at) = (told.echo, segment.len() - 4)
            && !mutant::active(Mutant::TellOwnEcho)
        {
            segment[at..].copy_from_slice(&echo.to_be_bytes());
        }
    }
    if !told.blocks.is_empty() {
        segment.extend([NOP, NOP, SACK, 2 + told.blocks.len() as u8]);
        segment.extend(&told.blocks);
    }
    if !mutant::active(Mutant::TellOwnAck) {
        segment[ACK_AT..ACK_AT + 4].copy_from_slice(&told.ack.to_be_bytes());
    }
    segment[OFFSET_AT] = (segment.len() as u8 / 4) << 4;
    segment[FLAGS_AT] = Tcp::ACK;
    let own = be16(&segment, WINDOW_AT)?;
    let window = if mutant::active(Mutant::OfferOwnWindow) { own } else { own.min(told.window) };
    segment[WINDOW_AT..WINDOW_AT + 2].copy_from_slice(&window.to_be_bytes());
    // Checksum, and urgent pointer.
    segment[CHECKSUM_AT..TCP_HEADER_BYTES].fill(0);
    let mut sum = [src, dst].into_iter().fold(0, |sum, address| match address {
        IpAddr::V4(address) => ones_sum(sum, &address.octets()),
        IpAddr::V6(address) => ones_sum(sum, &address.octets()),
    });
    sum = ones_sum(ones_sum(sum, &[0, TCP]), &(segment.len() as u16).to_be_bytes());
    let sum = if mutant::active(Mutant::LeaveUnsummed) { 0 } else { !ones_sum(sum, &segment) as u16 };
    segment[CHECKSUM_AT..CHECKSUM_AT + 2].copy_from_slice(&sum.to_be_bytes());

    let mut made = frame.get(..tcp.header_at)?.to_vec();
    // Its checksum is finished and it is cut into nothing: such a header says so in all of its lengths.
    made[..vnet_header_bytes].fill(0);
    let mut ip_at = vnet_header_bytes + 12;
    while VLAN_TAGS.contains(&be16(&made, ip_at)?) {
        ip_at += 4;
    }
    ip_at += 2;
    let ip = made.get_mut(ip_at..)?;
    let length = ip.len() + segment.len();
    if src.is_ipv4() {
        ip[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        ip[10..12].fill(0);
        let sum = !ones_sum(0, ip) as u16;
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        ip[4..6].copy_from_slice(&((length - IPV6_HEADER_BYTES) as u16).to_be_bytes());
    }
    made.extend(segment);
    Some(made)
}

#[cfg(test)]
mod tests;
