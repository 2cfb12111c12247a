//! A TCP segment inside a frame, and how its numbers are moved.
//!
//! The checksum follows each change (RFC 1624), so it stays as right or as wrong as it was, and nothing but the
//! changed words is read. The trap: behind a virtio-net header that says `NEEDS_CSUM` the field holds the sum of the
//! pseudo-header alone, which knows no sequence numbers; the device adds the rest, and such a field stays as it is.
//!
//! A first fragment has the whole TCP header in it, and the others have none of it: it is moved like a segment. One that
//! is too small for its header passes as it is (RFC 1858 has every receiver drop it).
//!
//! Sources: RFC 9293 3.1, RFC 2018 3 and RFC 2883 for SACK, RFC 7323 3.2 for timestamps; virtio 1.2 5.1.6.

use crate::compare::checksum::tcp_replace;
use crate::compare::key::FlowKey;
use crate::compare::options::{SACK, TIMESTAMPS, options};
use crate::compare::packet::{Ip, Packet, Tcp, Transport, be32, first_fragment};
use crate::mutant::{self, Mutant};

const TIMESTAMPS_BYTES: usize = 10;
pub(super) const VNET_NEEDS_CSUM: u8 = 1;

/// Offsets in a TCP header.
const SEQ_AT: usize = 4;
const ACK_AT: usize = 8;

/// A segment's numbers.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) key: FlowKey,
    pub(super) tcp: Tcp,
    /// The sender's clock, and its echo of the receiver's.
    pub(super) timestamps: Option<(u32, u32)>,
    partial_checksum: bool,
}

/// Whether `a` is before `b`, in a space that wraps.
pub(super) fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Segment {
    /// Reads the TCP segment in a frame behind a virtio-net header of so many bytes, if there is one.
    pub(super) fn read(frame: &[u8], vnet_header_bytes: usize) -> Option<Self> {
        let ip = match Packet::parse_behind(frame, vnet_header_bytes) {
            Packet::Ip(ip) => ip,
            Packet::Fragment(fragment) => first_fragment(frame, &fragment)?,
            _ => return None,
        };
        let key = FlowKey::of(&ip);
        let Ip { transport: Transport::Tcp(tcp), .. } = ip else { return None };
        let header = frame.get(tcp.options.clone())?;
        let timestamps = options(header)
            .find(|(kind, _, length)| (*kind, *length) == (TIMESTAMPS, TIMESTAMPS_BYTES))
            .and_then(|(_, at, _)| Some((be32(header, at + 2)?, be32(header, at + 6)?)));
        let partial_checksum =
            vnet_header_bytes >= 10 && frame.first().is_some_and(|flags| flags & VNET_NEEDS_CSUM != 0);
        Some(Self { key, tcp, timestamps, partial_checksum })
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.tcp.has(flag)
    }

    /// The first number behind the segment.
    pub(super) fn end(&self) -> u32 {
        let flags = u32::from(self.has(Tcp::SYN)) + u32::from(self.has(Tcp::FIN));
        self.tcp.seq.wrapping_add(self.tcp.payload.len() as u32).wrapping_add(flags)
    }

    /// Moves the sequence number.
    pub(super) fn set_seq(&mut self, frame: &mut [u8], seq: u32) {
        if self.tcp.seq != seq {
            self.tcp.seq = seq;
            self.put(frame, SEQ_AT, seq);
        }
    }

    /// Moves what the sender acknowledges, SACK blocks too, by `offset`.
    pub(super) fn move_acks(&mut self, frame: &mut [u8], offset: u32) {
        if offset == 0 {
            return;
        }
        if self.has(Tcp::ACK) {
            self.tcp.ack = self.tcp.ack.wrapping_add(offset);
            self.put(frame, ACK_AT, self.tcp.ack);
        }
        if !mutant::active(Mutant::LeaveSack) {
            self.put_options(frame, SACK, |_, edge| edge.wrapping_add(offset));
        }
    }

    /// Says another time.
    pub(super) fn set_clock(&mut self, frame: &mut [u8], clock: u32) {
        if let Some((own, _)) = &mut self.timestamps
            && *own != clock
        {
            *own = clock;
            self.put_options(frame, TIMESTAMPS, |word, value| if word == 0 { clock } else { value });
        }
    }

    /// Echoes another time.
    pub(super) fn set_echo(&mut self, frame: &mut [u8], echo: u32) {
        if let Some((_, own)) = &mut self.timestamps
            && *own != echo
            && !mutant::active(Mutant::LeaveEcho)
        {
            *own = echo;
            self.put_options(frame, TIMESTAMPS, |word, value| if word == 1 { echo } else { value });
        }
    }

    /// Changes the words of every option of a kind. Each is given its place among the option's words.
    fn put_options(&self, frame: &mut [u8], wanted: u8, change: impl Fn(usize, u32) -> u32) {
        let Some(header) = frame.get(self.tcp.options.clone()) else { return };
        // An option has no more words than this: the header ends.
        let (mut words, mut count) = ([(0, 0); 10], 0);
        for (_, at, length) in options(header).filter(|(kind, _, _)| *kind == wanted) {
            for (word, at) in (at + 2..(at + length).saturating_sub(3)).step_by(4).enumerate() {
                if let (Some(slot), Some(value)) = (words.get_mut(count), be32(header, at)) {
                    *slot = (at, change(word, value));
                    count += 1;
                }
            }
        }
        let options_at = self.tcp.options.start - self.tcp.header_at;
        words[..count].iter().for_each(|(at, value)| self.put(frame, options_at + at, *value));
    }

    fn put(&self, frame: &mut [u8], at: usize, value: u32) {
        let Some(segment) = frame.get_mut(self.tcp.header_at..self.tcp.payload.end) else { return };
        let follows = !self.partial_checksum || mutant::active(Mutant::SumPartial);
        if follows && !mutant::active(Mutant::LeaveSum) {
            tcp_replace(segment, at, value);
        } else if let Some(word) = segment.get_mut(at..at + 4) {
            word.copy_from_slice(&value.to_be_bytes());
        }
    }
}
