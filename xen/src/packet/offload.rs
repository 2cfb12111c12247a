//! What a network card would have done to a frame: finish its checksum, cut it into segments. Pure.
//!
//! The trap: header and frame come from the guest. Every offset in them is checked, and the number of segments is
//! bounded, before anything is done. Layout of the header: virtio specification 5.1.6, struct virtio_net_hdr.

/// Bytes of the header in front of each frame.
pub const HEADER_BYTES: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Of one frame. 64 KiB in segments of the smallest size that Linux' TCP agrees to, 48 bytes, are fewer.
const SEGMENTS_MAX: usize = 2048;

const ETHERTYPE: usize = 12;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLANS: [u16; 2] = [0x8100, 0x88a8];
const PROTOCOL_TCP: u8 = 6;
const TCP_CHECKSUM: usize = 16;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Why a frame cannot be finished.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OffloadError {
    /// The checksum lies outside of the frame.
    #[error("its checksum would be outside of it")]
    Checksum,
    /// A kind of segmentation that is not TCP.
    #[error("it asks for segmentation of kind {0}")]
    Kind(u8),
    /// Its headers are not those of the TCP that it says it is.
    #[error("its headers are not those of the TCP segment that it says it is")]
    Headers,
    /// Too many segments.
    #[error("it would be more than {SEGMENTS_MAX} segments")]
    Segments,
}

/// What is left to be done to a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VnetHeader {
    /// Bit 0: the checksum is to be finished.
    pub flags: u8,
    /// Whether and how it is to be cut.
    pub gso_type: u8,
    /// Payload of each segment.
    pub gso_size: u16,
    /// Where summing begins.
    pub csum_start: u16,
    /// Where, from there, the sum goes; what stands there is part of it.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// From the wire, in this machine's byte order as AF_PACKET has it. The header length in it is a hint that is
    /// not needed.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self { flags: bytes[0], gso_type: bytes[1], gso_size: half(4), csum_start: half(6), csum_offset: half(8) }
    }

    /// To the wire, in this machine's byte order. The hint is left out.
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let [[s0, s1], [c0, c1], [o0, o1]] = [self.gso_size, self.csum_start, self.csum_offset].map(u16::to_ne_bytes);
        [self.flags, self.gso_type, 0, 0, s0, s1, c0, c1, o0, o1]
    }

    /// Where the checksum stands that is not finished, if there is one: what is there covers the pseudo header only.
    pub fn unfinished_at(&self) -> Option<usize> {
        let at = usize::from(self.csum_start) + usize::from(self.csum_offset);
        (self.flags & NEEDS_CSUM != 0).then_some(at)
    }

    /// The same frame with `bytes` more in front of all that is named here.
    pub(super) fn moved(self, bytes: u16) -> Self {
        let moved = if self.flags & NEEDS_CSUM != 0 { bytes } else { 0 };
        Self { csum_start: self.csum_start.saturating_add(moved), ..self }
    }

    /// The frame is as it would be on a wire.
    pub fn needs_nothing(&self) -> bool {
        self.flags & NEEDS_CSUM == 0 && self.gso_type == GSO_NONE
    }
}

/// Does what is left to be done: one frame, or as many as it has to be cut into.
///
/// # Errors
/// What is wrong with it.
pub fn finish(header: &VnetHeader, mut frame: Vec<u8>) -> Result<Vec<Vec<u8>>, OffloadError> {
    match header.gso_type & !GSO_ECN {
        GSO_NONE => {
            if header.flags & NEEDS_CSUM != 0 {
                complete(&mut frame, header.csum_start.into(), header.csum_offset.into())?;
            }
            Ok(vec![frame])
        }
        GSO_TCPV4 => cut(header, &frame, IPV4),
        GSO_TCPV6 => cut(header, &frame, IPV6),
        kind => Err(OffloadError::Kind(kind)),
    }
}

/// Finishes a checksum whose place holds the pseudo header's part of it.
fn complete(frame: &mut [u8], start: usize, offset: usize) -> Result<(), OffloadError> {
    let place = start + offset;
    let sum = fold(add(0, frame.get(start..).ok_or(OffloadError::Checksum)?));
    let place = frame.get_mut(place..place + 2).ok_or(OffloadError::Checksum)?;
    place.copy_from_slice(&nonzero(!sum).to_be_bytes());
    Ok(())
}

/// UDP says "no checksum" with 0; all ones is the same number.
fn nonzero(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

/// Where the parts of a TCP segment begin.
struct Layout {
    ip: usize,
    tcp: usize,
    payload: usize,
    ethertype: u16,
}

impl Layout {
    fn of(header: &VnetHeader, frame: &[u8], ethertype: u16) -> Option<Self> {
        let mut at = ETHERTYPE;
        while VLANS.contains(&half(frame, at)?) {
            at += 4;
        }
        let ip = at + 2;
        // A segment that is to be cut always has its checksum to be finished too, so this is where TCP begins.
        let tcp = usize::from(header.csum_start);
        let right = half(frame, at)? == ethertype
            && header.flags & NEEDS_CSUM != 0
            && usize::from(header.csum_offset) == TCP_CHECKSUM
            && match ethertype {
                IPV4 => {
                    let words = usize::from(frame.get(ip)? & 0xf);
                    words >= 5 && tcp == ip + words * 4 && *frame.get(ip + 9)? == PROTOCOL_TCP
                }
                // Extension headers are copied as they are.
                _ => tcp >= ip + 40,
            };
        let words = usize::from(frame.get(tcp + 12)? >> 4);
        let payload = tcp + words * 4;
        (right && words >= 5 && payload < frame.len()).then_some(Self { ip, tcp, payload, ethertype })
    }

    /// Fills in what depends on a segment's length and place.
    fn seal(&self, segment: &mut [u8], number: u16, before: u32, last: bool) -> Option<()> {
        let length = segment.len();
        let sequence = u32::from_be_bytes(segment.get(self.tcp + 4..self.tcp + 8)?.try_into().ok()?);
        segment.get_mut(self.tcp + 4..self.tcp + 8)?.copy_from_slice(&sequence.wrapping_add(before).to_be_bytes());
        let flags = segment.get_mut(self.tcp + 13)?;
        if !last {
            *flags &= !FIN_PSH;
        }
        if before != 0 {
            *flags &= !CWR;
        }
        let tcp_length = u16::try_from(length - self.tcp).ok()?;
        // Source and destination, and what else the pseudo header has.
        let pseudo = if self.ethertype == IPV4 {
            let id = half(segment, self.ip + 4)?.wrapping_add(number);
            put(segment, self.ip + 2, u16::try_from(length - self.ip).ok()?)?;
            put(segment, self.ip + 4, id)?;
            put(segment, self.ip + 10, 0)?;
            let sum = !fold(add(0, segment.get(self.ip..self.tcp)?));
            put(segment, self.ip + 10, sum)?;
            add(0, segment.get(self.ip + 12..self.ip + 20)?)
        } else {
            put(segment, self.ip + 4, u16::try_from(length - self.ip - 40).ok()?)?;
            add(0, segment.get(self.ip + 8..self.ip + 40)?)
        };
        put(segment, self.tcp + TCP_CHECKSUM, 0)?;
        let pseudo = pseudo + u64::from(PROTOCOL_TCP) + u64::from(tcp_length);
        let sum = !fold(add(pseudo, segment.get(self.tcp..)?));
        put(segment, self.tcp + TCP_CHECKSUM, sum)
    }
}

/// Cuts a TCP segment into such as fit on the wire.
fn cut(header: &VnetHeader, frame: &[u8], ethertype: u16) -> Result<Vec<Vec<u8>>, OffloadError> {
    let layout = Layout::of(header, frame, ethertype).ok_or(OffloadError::Headers)?;
    let size = usize::from(header.gso_size);
    let (headers, payload) = frame.split_at(layout.payload);
    let count = payload.len().checked_div(size).ok_or(OffloadError::Headers)? + 1;
    if count > SEGMENTS_MAX {
        return Err(OffloadError::Segments);
    }
    let mut segments = Vec::with_capacity(count);
    for (number, part) in payload.chunks(size).enumerate() {
        let before = number * size;
        let last = before + part.len() == payload.len();
        let mut segment = Vec::with_capacity(headers.len() + part.len());
        segment.extend_from_slice(headers);
        segment.extend_from_slice(part);
        // Both fit: there are SEGMENTS_MAX segments of 64 KiB at most.
        layout.seal(&mut segment, number as u16, before as u32, last).ok_or(OffloadError::Headers)?;
        segments.push(segment);
    }
    Ok(segments)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn put(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    bytes.get_mut(at..at + 2)?.copy_from_slice(&value.to_be_bytes());
    Some(())
}

/// RFC 1071, in 64 bits: no frame is long enough to overflow it.
fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    let pairs = bytes.chunks_exact(2);
    if let [last] = pairs.remainder() {
        sum += u64::from(*last) << 8;
    }
    sum + pairs.map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u64>()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Folded.
    sum as u16
}

#[cfg(test)]
pub(super) mod tests;
