//! Frames: Ethernet, ARP (RFC 826), IPv4 (RFC 791), and TCP segments (RFC 9293 3.1), read and written.
//!
//! ```text
//! frame ─▶ Ethernet ─┬▶ Arp
//!                    └▶ Ipv4 ─▶ Segment (or, in `net`, an ICMP or UDP payload)
//! ```
//!
//! Reading returns nothing for whatever is not whole and right. The trap is the padding a short frame gets on a
//! real Ethernet: lengths come from the IPv4 header, never from the frame.

/// An Ethernet address.
pub(super) type Mac = [u8; 6];
/// An IPv4 address.
pub(super) type Ip = [u8; 4];

/// Longest frame: 14 bytes of Ethernet and an MTU of 1500.
pub(super) const FRAME_MAX_BYTES: usize = 1514;
/// The maximum segment size this guest offers and uses.
pub(super) const MSS: u16 = 1460;

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const PROTOCOL_ICMP: u8 = 1;
pub(super) const PROTOCOL_TCP: u8 = 6;
pub(super) const PROTOCOL_UDP: u8 = 17;
pub(super) const BROADCAST: Mac = [0xff; 6];

const ETHERNET_BYTES: usize = 14;
const IPV4_BYTES: usize = 20;
const TCP_BYTES: usize = 20;

pub(super) const FIN: u8 = 0x01;
pub(super) const SYN: u8 = 0x02;
pub(super) const RST: u8 = 0x04;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// The Internet checksum (RFC 1071) of parts that are all of even length, the last excepted. Over bytes that
/// contain their own checksum it is zero.
pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let pair = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u64 = parts.iter().flat_map(|part| part.chunks(2)).map(pair).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The checksum of a TCP segment or UDP datagram with its pseudo-header.
pub(super) fn transport_checksum(src: Ip, dst: Ip, protocol: u8, payload: &[u8]) -> u16 {
    let length = (payload.len() as u16).to_be_bytes();
    checksum(&[&src, &dst, &[0, protocol], &length, payload])
}

/// An Ethernet frame.
pub(super) struct Ethernet<'a> {
    pub(super) dst: Mac,
    pub(super) src: Mac,
    pub(super) ethertype: u16,
    pub(super) payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    pub(super) fn parse(frame: &'a [u8]) -> Option<Self> {
        let (head, payload) = frame.split_at_checked(ETHERNET_BYTES)?;
        Some(Self { dst: array(head, 0), src: array(head, 6), ethertype: be16(head, 12), payload })
    }
}

/// A frame of the given payload parts.
pub(super) fn ethernet(dst: Mac, src: Mac, ethertype: u16, parts: &[&[u8]]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET_BYTES + parts.iter().map(|part| part.len()).sum::<usize>());
    frame.extend_from_slice(&dst);
    frame.extend_from_slice(&src);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    for part in parts {
        frame.extend_from_slice(part);
    }
    frame
}

/// An ARP packet for IPv4 over Ethernet.
pub(super) struct Arp {
    pub(super) request: bool,
    pub(super) sender_mac: Mac,
    pub(super) sender_ip: Ip,
    pub(super) target_mac: Mac,
    pub(super) target_ip: Ip,
}

impl Arp {
    const HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let operation = (bytes.len() >= 28 && bytes[..6] == Self::HEAD).then(|| be16(bytes, 6))?;
        matches!(operation, 1 | 2).then(|| Self {
            request: operation == 1,
            sender_mac: array(bytes, 8),
            sender_ip: array(bytes, 14),
            target_mac: array(bytes, 18),
            target_ip: array(bytes, 24),
        })
    }

    pub(super) fn emit(&self) -> [u8; 28] {
        let mut bytes = [0; 28];
        bytes[..6].copy_from_slice(&Self::HEAD);
        bytes[7] = if self.request { 1 } else { 2 };
        bytes[8..14].copy_from_slice(&self.sender_mac);
        bytes[14..18].copy_from_slice(&self.sender_ip);
        bytes[18..24].copy_from_slice(&self.target_mac);
        bytes[24..28].copy_from_slice(&self.target_ip);
        bytes
    }
}

/// An IPv4 packet, unfragmented, options skipped.
pub(super) struct Ipv4<'a> {
    pub(super) src: Ip,
    pub(super) dst: Ip,
    pub(super) protocol: u8,
    pub(super) payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let head_len = usize::from(bytes.first()? & 0x0f) * 4;
        if bytes[0] >> 4 != 4 || head_len < IPV4_BYTES || bytes.len() < head_len {
            return None;
        }
        let payload = bytes.get(head_len..usize::from(be16(bytes, 2)))?;
        // Only "don't fragment" and the reserved bit may be set: this guest does not reassemble.
        let whole = be16(bytes, 6) & 0x3fff == 0;
        (whole && checksum(&[&bytes[..head_len]]) == 0).then(|| Self {
            src: array(bytes, 12),
            dst: array(bytes, 16),
            protocol: bytes[9],
            payload,
        })
    }
}

/// The header of an IPv4 packet with `payload_len` bytes after it. Its id is always zero, which RFC 6864 allows
/// where fragmenting is forbidden, and which keeps two guests' headers alike.
pub(super) fn ipv4_header(src: Ip, dst: Ip, protocol: u8, payload_len: usize) -> [u8; IPV4_BYTES] {
    let mut head = [0; IPV4_BYTES];
    head[0] = 0x45;
    head[2..4].copy_from_slice(&((IPV4_BYTES + payload_len) as u16).to_be_bytes());
    head[6] = 0x40;
    head[8] = 64;
    head[9] = protocol;
    head[12..16].copy_from_slice(&src);
    head[16..20].copy_from_slice(&dst);
    let sum = checksum(&[&head]);
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    head
}

/// A TCP segment.
#[derive(Clone, Debug, Default)]
pub(super) struct Segment<'a> {
    pub(super) src_port: u16,
    pub(super) dst_port: u16,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) mss: Option<u16>,
    pub(super) payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Reads the segment in `ip`; its checksum must be right.
    pub(super) fn parse(ip: &Ipv4<'a>) -> Option<Self> {
        let bytes = ip.payload;
        if bytes.len() < TCP_BYTES || transport_checksum(ip.src, ip.dst, PROTOCOL_TCP, bytes) != 0 {
            return None;
        }
        let head_len = usize::from(bytes[12] >> 4) * 4;
        let options = bytes.get(TCP_BYTES..head_len)?;
        Some(Self {
            src_port: be16(bytes, 0),
            dst_port: be16(bytes, 2),
            seq: be32(bytes, 4),
            ack: be32(bytes, 8),
            flags: bytes[13],
            window: be16(bytes, 14),
            mss: find_mss(options),
            payload: &bytes[head_len..],
        })
    }

    /// The bytes of the segment, checksum filled in.
    pub(super) fn emit(&self, src: Ip, dst: Ip) -> Vec<u8> {
        let head_len = TCP_BYTES + if self.mss.is_some() { 4 } else { 0 };
        let mut bytes = Vec::with_capacity(head_len + self.payload.len());
        bytes.extend_from_slice(&self.src_port.to_be_bytes());
        bytes.extend_from_slice(&self.dst_port.to_be_bytes());
        bytes.extend_from_slice(&self.seq.to_be_bytes());
        bytes.extend_from_slice(&self.ack.to_be_bytes());
        bytes.extend_from_slice(&[(head_len as u8 / 4) << 4, self.flags]);
        bytes.extend_from_slice(&self.window.to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        if let Some(mss) = self.mss {
            bytes.extend_from_slice(&[2, 4]);
            bytes.extend_from_slice(&mss.to_be_bytes());
        }
        bytes.extend_from_slice(self.payload);
        let sum = transport_checksum(src, dst, PROTOCOL_TCP, &bytes);
        bytes[16..18].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Whether `flag` is set.
    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// How much sequence space it takes.
    pub(super) fn seq_len(&self) -> u32 {
        self.payload.len() as u32 + u32::from(self.has(SYN)) + u32::from(self.has(FIN))
    }
}

fn find_mss(mut options: &[u8]) -> Option<u16> {
    loop {
        match *options {
            [2, 4, high, low, ..] => return Some(u16::from_be_bytes([high, low])),
            [1, ref rest @ ..] => options = rest,
            [kind, len, ..] if kind > 1 && len >= 2 => options = options.get(usize::from(len)..)?,
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_reads_back_and_padding_is_not_payload() {
        let sent = Segment {
            src_port: 80,
            dst_port: 4000,
            seq: 7,
            ack: 9,
            flags: ACK | PSH,
            window: 512,
            mss: Some(536),
            payload: b"odd",
        };
        let (src, dst) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let tcp = sent.emit(src, dst);
        let frame =
            ethernet([1; 6], [2; 6], ETHERTYPE_IPV4, &[&ipv4_header(src, dst, PROTOCOL_TCP, tcp.len()), &tcp, &[0; 9]]);
        let ethernet = Ethernet::parse(&frame).unwrap();
        let ip = Ipv4::parse(ethernet.payload).unwrap();
        let got = Segment::parse(&ip).unwrap();
        assert_eq!((ip.src, ip.dst, got.mss, got.payload, got.seq, got.ack), (src, dst, Some(536), &b"odd"[..], 7, 9));
        assert_eq!((got.window, got.seq_len(), got.has(PSH), got.has(SYN)), (512, 3, true, false));
        for at in 14..frame.len() - 9 {
            let mut bad = frame.clone();
            bad[at] ^= 0x10;
            let read = Ipv4::parse(&bad[14..]).and_then(|ip| Segment::parse(&ip).map(drop));
            assert!(read.is_none(), "byte {at} is covered by a checksum");
        }
    }

    #[test]
    fn options_are_walked_without_running_out() {
        assert_eq!(find_mss(&[1, 1, 8, 2, 2, 4, 5, 0xb4]), Some(1460));
        for bad in [&[][..], &[2], &[2, 4, 5], &[3, 0, 2, 4, 1, 1], &[0, 2, 4, 1, 1], &[9, 200]] {
            assert_eq!(find_mss(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn fragments_are_not_read() {
        let mut head = ipv4_header([1; 4], [2; 4], 6, 0);
        assert!(Ipv4::parse(&head).is_some());
        head[6] = 0x20;
        head[10..12].fill(0);
        let sum = checksum(&[&head]);
        head[10..12].copy_from_slice(&sum.to_be_bytes());
        assert!(Ipv4::parse(&head).is_none());
    }
}
