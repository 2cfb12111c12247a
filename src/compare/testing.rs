//! Frames for tests, built and checked by another implementation: smoltcp's wire module.

use super::{Cause, Comparator, Config, Output};
use crate::clock::Instant;
use bytes::Bytes;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol,
    Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};
use std::time::Duration;

pub(crate) const GUEST: [u8; 4] = [10, 0, 0, 2];
pub(crate) const CLIENT: [u8; 4] = [10, 0, 0, 9];

fn ipv4(src: [u8; 4], dst: [u8; 4], protocol: IpProtocol, len: usize, fill: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let ip =
        Ipv4Repr { src_addr: src.into(), dst_addr: dst.into(), next_header: protocol, payload_len: len, hop_limit: 64 };
    let mut frame = vec![0; 34 + len];
    let mut ethernet = EthernetFrame::new_unchecked(&mut frame);
    EthernetRepr {
        src_addr: EthernetAddress([2, 0, 0, 0, 0, src[3]]),
        dst_addr: EthernetAddress([2, 0, 0, 0, 0, dst[3]]),
        ethertype: EthernetProtocol::Ipv4,
    }
    .emit(&mut ethernet);
    let mut packet = Ipv4Packet::new_unchecked(ethernet.payload_mut());
    ip.emit(&mut packet, &ChecksumCapabilities::default());
    fill(packet.payload_mut());
    frame
}

pub(crate) const GUEST6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
pub(crate) const CLIENT6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];

/// An IPv6 packet of the guest with whatever is behind its header.
pub(crate) fn in_ipv6(next_header: u8, behind: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((behind.len() as u16).to_be_bytes());
    frame.extend([next_header, 64]);
    frame.extend([GUEST6, CLIENT6].concat());
    frame.extend(behind);
    frame
}

/// A TCP segment from the guest to the client, without an IP header.
pub(crate) fn tcp6(seq: u32, payload: &[u8]) -> Vec<u8> {
    [&Seg::data(seq, b"").frame()[34..], payload].concat()
}

/// An ICMPv6 message of the guest.
pub(crate) fn icmp6(message: &[u8]) -> Vec<u8> {
    in_ipv6(58, message)
}

/// An ARP packet: operation, sender, target. Hardware addresses are the test's convention.
pub(crate) fn arp(operation: u8, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let hardware = [2, 0, 0, 0, 0, 2];
    [&[0xff; 6][..], &hardware, &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation], &hardware, &sender, &[0; 6], &target].concat()
}

/// A frame with tags, the outer first.
pub(crate) fn tagged(tags: &[u16], frame: &[u8]) -> Vec<u8> {
    let mut out = frame[..12].to_vec();
    for (at, tag) in tags.iter().enumerate() {
        out.extend(if at + 1 < tags.len() { [0x88, 0xa8] } else { [0x81, 0x00] });
        out.extend(tag.to_be_bytes());
    }
    out.extend(&frame[12..]);
    out
}

/// A TCP segment, from the guest's port 80 to the client's 40000 unless told otherwise.
#[derive(Clone)]
pub(crate) struct Seg {
    pub(crate) seq: u32,
    pub(crate) ack: Option<u32>,
    pub(crate) control: TcpControl,
    pub(crate) payload: Vec<u8>,
    pub(crate) port: u16,
    pub(crate) sack: Option<(u32, u32)>,
    pub(crate) from_client: bool,
}

impl Seg {
    pub(crate) fn data(seq: u32, payload: &[u8]) -> Self {
        let (ack, control) = (Some(0), TcpControl::None);
        Self { seq, ack, control, payload: payload.to_vec(), port: 40000, sack: None, from_client: false }
    }

    pub(crate) fn pure_ack(ack: u32) -> Self {
        Self::data(0, b"").ack(ack)
    }

    pub(crate) fn ack(self, ack: u32) -> Self {
        Self { ack: Some(ack), ..self }
    }

    pub(crate) fn syn(seq: u32) -> Self {
        Self { control: TcpControl::Syn, ack: None, ..Self::data(seq, b"") }
    }

    pub(crate) fn fin(self) -> Self {
        Self { control: TcpControl::Fin, ..self }
    }

    pub(crate) fn rst(seq: u32) -> Self {
        Self { control: TcpControl::Rst, ..Self::data(seq, b"") }
    }

    pub(crate) fn port(self, port: u16) -> Self {
        Self { port, ..self }
    }

    pub(crate) fn sack(self, left: u32, right: u32) -> Self {
        Self { sack: Some((left, right)), ..self }
    }

    pub(crate) fn inbound(self) -> Self {
        Self { from_client: true, ..self }
    }

    pub(crate) fn frame(&self) -> Vec<u8> {
        let (mut src, mut dst) = ((GUEST, 80), (CLIENT, self.port));
        if self.from_client {
            std::mem::swap(&mut src, &mut dst);
        }
        let tcp = TcpRepr {
            src_port: src.1,
            dst_port: dst.1,
            control: self.control,
            seq_number: TcpSeqNumber(self.seq as i32),
            ack_number: self.ack.map(|ack| TcpSeqNumber(ack as i32)),
            window_len: 1000,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [self.sack, None, None],
            timestamp: None,
            payload: &self.payload,
        };
        ipv4(src.0, dst.0, IpProtocol::Tcp, tcp.buffer_len(), |bytes| {
            let addresses = (IpAddress::Ipv4(src.0.into()), IpAddress::Ipv4(dst.0.into()));
            let mut packet = TcpPacket::new_unchecked(bytes);
            tcp.emit(&mut packet, &addresses.0, &addresses.1, &ChecksumCapabilities::default());
        })
    }

    pub(crate) fn bytes(&self) -> Bytes {
        self.frame().into()
    }

    /// Reads a segment back, its checksums verified.
    pub(crate) fn read(frame: &[u8]) -> Self {
        let ethernet = EthernetFrame::new_checked(frame).unwrap();
        let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
        assert!(ip.verify_checksum(), "IPv4 checksum");
        let packet = TcpPacket::new_checked(ip.payload()).unwrap();
        let addresses = (IpAddress::Ipv4(ip.src_addr()), IpAddress::Ipv4(ip.dst_addr()));
        let tcp = TcpRepr::parse(&packet, &addresses.0, &addresses.1, &ChecksumCapabilities::default())
            .expect("TCP checksum");
        let from_client = ip.src_addr().octets() == CLIENT;
        Self {
            seq: tcp.seq_number.0 as u32,
            ack: tcp.ack_number.map(|ack| ack.0 as u32),
            control: tcp.control,
            payload: tcp.payload.to_vec(),
            port: if from_client { tcp.src_port } else { tcp.dst_port },
            sack: tcp.sack_ranges[0],
            from_client,
        }
    }
}

/// A UDP datagram from the guest's `port`.
pub(crate) fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let repr = UdpRepr { src_port: port, dst_port: 5000 };
    ipv4(GUEST, CLIENT, IpProtocol::Udp, 8 + payload.len(), |bytes| {
        let (src, dst) = (IpAddress::Ipv4(GUEST.into()), IpAddress::Ipv4(CLIENT.into()));
        repr.emit(
            &mut UdpPacket::new_unchecked(bytes),
            &src,
            &dst,
            payload.len(),
            |out| out.copy_from_slice(payload),
            &ChecksumCapabilities::default(),
        );
    })
}

/// An ICMP echo reply from the guest.
pub(crate) fn icmp_echo_reply(ident: u16, data: &[u8]) -> Vec<u8> {
    let repr = Icmpv4Repr::EchoReply { ident, seq_no: 1, data };
    ipv4(GUEST, CLIENT, IpProtocol::Icmp, repr.buffer_len(), |bytes| {
        repr.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
    })
}

/// An IPv4 or IPv6 frame without extension headers, cut behind so many bytes of its payload each.
pub(crate) fn fragments(frame: &[u8], id: u8, cuts: &[usize]) -> Vec<Vec<u8>> {
    let v6 = frame[12] == 0x86;
    let (header, payload) = frame.split_at(if v6 { 54 } else { 34 });
    let ends = cuts.iter().copied().chain([payload.len()]);
    let starts = [0].into_iter().chain(cuts.iter().copied());
    let part = |(start, end): (usize, usize)| {
        let (mut out, more) = (header.to_vec(), end < payload.len());
        if v6 {
            out[18..20].copy_from_slice(&((end - start + 8) as u16).to_be_bytes());
            let next = std::mem::replace(&mut out[20], 44);
            out.extend([next, 0]);
            out.extend((start as u16 | u16::from(more)).to_be_bytes());
            out.extend([0, 0, 0, id]);
        } else {
            out[16..18].copy_from_slice(&((end - start + 20) as u16).to_be_bytes());
            out[18..20].copy_from_slice(&[0, id]);
            out[20..22].copy_from_slice(&((start / 8) as u16 | u16::from(more) << 13).to_be_bytes());
        }
        out.extend(&payload[start..end]);
        out
    };
    starts.zip(ends).map(part).collect()
}

/// A UDP datagram of the guest over IPv6; its checksum is not looked at.
pub(crate) fn udp6(port: u16, payload: &[u8]) -> Vec<u8> {
    in_ipv6(17, &udp(port, payload)[34..])
}

/// A comparator, its clock, and what it asked for.
pub(crate) struct Trace {
    pub(crate) comparator: Comparator,
    pub(crate) now: Instant,
    pub(crate) asked: Vec<(u64, Cause)>,
}

impl Trace {
    pub(crate) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(crate) fn with(config: Config) -> Self {
        Self { comparator: Comparator::new(config), now: Instant::ZERO, asked: vec![] }
    }

    /// Frames released since the last call.
    pub(crate) fn out(&mut self) -> Vec<Bytes> {
        let mut frames = vec![];
        while let Some(output) = self.comparator.poll_output() {
            match output {
                Output::Release(frame) => frames.push(frame),
                Output::Diverged { epoch, cause, .. } => self.asked.push((epoch, cause)),
            }
        }
        frames
    }

    pub(crate) fn p_raw(&mut self, epoch: u64, frame: impl Into<Bytes>) -> usize {
        self.comparator.handle_primary(self.now, epoch, frame.into());
        self.out().len()
    }

    pub(crate) fn s_raw(&mut self, epoch: u64, frame: impl Into<Bytes>) -> usize {
        self.comparator.handle_secondary(self.now, epoch, frame.into());
        self.out().len()
    }

    pub(crate) fn p(&mut self, epoch: u64, segment: Seg) -> usize {
        self.p_raw(epoch, segment.frame())
    }

    pub(crate) fn s(&mut self, epoch: u64, segment: Seg) -> usize {
        self.s_raw(epoch, segment.frame())
    }

    pub(crate) fn checkpoint(&mut self, epoch: u64) -> Vec<Bytes> {
        self.comparator.checkpoint(self.now, epoch);
        self.out()
    }

    pub(crate) fn wait(&mut self, millis: u64) -> usize {
        self.now += Duration::from_millis(millis);
        if self.comparator.poll_timeout().is_some_and(|at| at <= self.now) {
            self.comparator.handle_timeout(self.now);
        }
        self.out().len()
    }
}
