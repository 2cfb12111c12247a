//! Frames on a byte stream: QEMU's chardev framing, and our packet link's, which adds the epoch.
//!
//! ```text
//!   QEMU         be32 length │ frame                                             length counts the frame
//!   QEMU, vnet   be32 length │ be32 header length │ virtio-net header │ frame    length counts header and frame
//!   link         be32 length │ be64 epoch │ frame                                length counts both
//! ```
//!
//! The second is spoken where both ends have `vnet_hdr_support` on. Where only one has, nothing in the protocol says
//! so: what gives it away is a header longer than its message, or a length above the limit.
//!
//! A decoder takes from the front of the caller's buffer and wants at most one whole message in it. An oversized
//! or impossible length is an error that sticks: on a stream, whoever lost the boundary has lost it for good, so the
//! owner closes the connection (QEMU leaves it open and deaf). A QEMU frame of length zero carries nothing and is
//! skipped; QEMU would deliver an empty packet when the next byte arrives.
//! Source: `net/net.c` (net_fill_rstate), NET_BUFSIZE = 4096 + 65536.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;

/// The largest frame: QEMU's NET_BUFSIZE.
pub const MAX_FRAME_BYTES: usize = 69_632;

/// The word in front of every message.
pub const LENGTH_BYTES: usize = 4;
const EPOCH_BYTES: usize = 8;

/// A stream whose message boundaries are lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum WireError {
    /// A frame above the limit.
    #[error("a frame of {bytes} bytes is above the limit of {MAX_FRAME_BYTES}")]
    Oversized {
        /// What the length said.
        bytes: usize,
    },
    /// A tagged message too short for its tag.
    #[error("a tagged frame of {bytes} bytes has no room for its epoch")]
    NoEpoch {
        /// What the length said.
        bytes: usize,
    },
    /// A virtio-net header longer than the message it is in.
    #[error("a virtio-net header of {vnet_bytes} bytes in {bytes}: is vnet_hdr_support on at both ends?")]
    VnetHeader {
        /// What the header's length said.
        vnet_bytes: usize,
        /// What the message's length said.
        bytes: usize,
    },
}

/// The words at the front of a message in QEMU's framing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// Bytes of the words themselves.
    pub words_bytes: usize,
    /// Bytes of the virtio-net header behind them.
    pub vnet_bytes: usize,
    /// Bytes of the frame behind that.
    pub frame_bytes: usize,
}

impl Head {
    /// Reads the words at the front of `input`, or nothing until they are there. With `vnet` there are two of them.
    pub fn read(input: &[u8], vnet: bool) -> Result<Option<Self>, WireError> {
        let Some((length, rest)) = input.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let bytes = u32::from_be_bytes(*length) as usize;
        check(bytes)?;
        if !vnet {
            return Ok(Some(Self { words_bytes: LENGTH_BYTES, vnet_bytes: 0, frame_bytes: bytes }));
        }
        let Some(length) = rest.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let vnet_bytes = u32::from_be_bytes(*length) as usize;
        match bytes.checked_sub(vnet_bytes) {
            Some(frame_bytes) => Ok(Some(Self { words_bytes: 2 * LENGTH_BYTES, vnet_bytes, frame_bytes })),
            None => Err(WireError::VnetHeader { vnet_bytes, bytes }),
        }
    }

    /// Bytes of the whole message.
    #[must_use]
    pub fn message_bytes(self) -> usize {
        self.words_bytes + self.vnet_bytes + self.frame_bytes
    }
}

/// Appends `frame` behind its virtio-net header in QEMU's framing with `vnet_hdr_support`.
pub fn encode_vnet(header: &[u8], frame: &[u8], out: &mut BytesMut) -> Result<(), WireError> {
    let bytes = header.len() + frame.len();
    check(bytes)?;
    out.reserve(2 * LENGTH_BYTES + bytes);
    out.put_u32(bytes as u32);
    out.put_u32(header.len() as u32);
    out.put_slice(header);
    out.put_slice(frame);
    Ok(())
}

/// Appends `frame` in QEMU's framing.
pub fn encode(frame: &[u8], out: &mut BytesMut) -> Result<(), WireError> {
    check(frame.len())?;
    out.reserve(LENGTH_BYTES + frame.len());
    out.put_u32(frame.len() as u32);
    out.put_slice(frame);
    Ok(())
}

/// Appends `frame` with its epoch.
pub fn encode_tagged(epoch: u64, frame: &[u8], out: &mut BytesMut) -> Result<(), WireError> {
    check(frame.len())?;
    out.reserve(LENGTH_BYTES + EPOCH_BYTES + frame.len());
    out.put_u32((EPOCH_BYTES + frame.len()) as u32);
    out.put_u64(epoch);
    out.put_slice(frame);
    Ok(())
}

fn check(bytes: usize) -> Result<(), WireError> {
    if bytes > MAX_FRAME_BYTES { Err(WireError::Oversized { bytes }) } else { Ok(()) }
}

/// Takes a message of `overhead` bytes and a frame from the front of `input`, when it is whole.
fn split(input: &mut BytesMut, overhead: usize) -> Result<Option<BytesMut>, WireError> {
    let Some((length, rest)) = input.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if length < overhead {
        return Err(WireError::NoEpoch { bytes: length });
    }
    check(length - overhead)?;
    if rest.len() < length {
        input.reserve(LENGTH_BYTES + length - input.len());
        return Ok(None);
    }
    input.advance(LENGTH_BYTES);
    Ok(Some(input.split_to(length)))
}

/// Decodes QEMU's framing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Decoder {
    failed: Option<WireError>,
}

impl Decoder {
    /// Takes the next frame from the front of `input`, or nothing until more bytes come.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Bytes>, WireError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        loop {
            match split(input, 0) {
                Ok(Some(frame)) if frame.is_empty() => {}
                Ok(frame) => return Ok(frame.map(BytesMut::freeze)),
                Err(error) => {
                    self.failed = Some(error);
                    return Err(error);
                }
            }
        }
    }
}

/// Decodes QEMU's framing with `vnet_hdr_support`.
#[derive(Clone, Copy, Debug, Default)]
pub struct VnetDecoder {
    failed: Option<WireError>,
}

impl VnetDecoder {
    /// Takes the next virtio-net header and its frame from the front of `input`, or nothing until more bytes come.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<(Bytes, Bytes)>, WireError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        loop {
            let head = match Head::read(input, true) {
                Ok(Some(head)) => head,
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.failed = Some(error);
                    return Err(error);
                }
            };
            if input.len() < head.message_bytes() {
                input.reserve(head.message_bytes() - input.len());
                return Ok(None);
            }
            input.advance(head.words_bytes);
            let header = input.split_to(head.vnet_bytes).freeze();
            let frame = input.split_to(head.frame_bytes).freeze();
            if !frame.is_empty() {
                return Ok(Some((header, frame)));
            }
        }
    }
}

/// Decodes the packet link's framing.
#[derive(Clone, Copy, Debug, Default)]
pub struct TaggedDecoder {
    failed: Option<WireError>,
}

impl TaggedDecoder {
    /// Takes the next frame and its epoch from the front of `input`, or nothing until more bytes come.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<(u64, Bytes)>, WireError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        match split(input, EPOCH_BYTES) {
            Ok(message) => Ok(message.map(|mut message| (message.get_u64(), message.freeze()))),
            Err(error) => {
                self.failed = Some(error);
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u8>(), 1..300)), 0..10),
            cut in 1_usize..50,
        ) {
            let (mut plain, mut tagged) = (BytesMut::new(), BytesMut::new());
            for (epoch, frame) in &frames {
                encode(frame, &mut plain).unwrap();
                encode_tagged(*epoch, frame, &mut tagged).unwrap();
            }
            let (mut input, mut decoder, mut got) = (BytesMut::new(), Decoder::default(), vec![]);
            for piece in plain.chunks(cut) {
                input.extend_from_slice(piece);
                while let Some(frame) = decoder.decode(&mut input).unwrap() { got.push(frame.to_vec()); }
            }
            prop_assert_eq!(&got, &frames.iter().map(|(_, frame)| frame.clone()).collect::<Vec<_>>());
            let (mut input, mut decoder, mut got) = (BytesMut::new(), TaggedDecoder::default(), vec![]);
            for piece in tagged.chunks(cut) {
                input.extend_from_slice(piece);
                while let Some((epoch, frame)) = decoder.decode(&mut input).unwrap() { got.push((epoch, frame.to_vec())); }
            }
            prop_assert_eq!(&got, &frames);
            let mut vnet = BytesMut::new();
            for (epoch, frame) in &frames {
                encode_vnet(&epoch.to_be_bytes()[..frame.len() % 9], frame, &mut vnet).unwrap();
            }
            let (mut input, mut decoder, mut got) = (BytesMut::new(), VnetDecoder::default(), vec![]);
            for piece in vnet.chunks(cut) {
                input.extend_from_slice(piece);
                while let Some((header, frame)) = decoder.decode(&mut input).unwrap() {
                    got.push((header.to_vec(), frame.to_vec()));
                }
            }
            let header = |epoch: u64, len: usize| epoch.to_be_bytes()[..len % 9].to_vec();
            prop_assert_eq!(got, frames.into_iter().map(|(e, f)| (header(e, f.len()), f)).collect::<Vec<_>>());
        }

        #[test]
        fn garbage_is_an_error_or_a_wait(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let (mut one, mut two) = (BytesMut::from(&bytes[..]), BytesMut::from(&bytes[..]));
            while let Ok(Some(_)) = Decoder::default().decode(&mut one) {}
            while let Ok(Some(_)) = TaggedDecoder::default().decode(&mut two) {}
            let mut three = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = VnetDecoder::default().decode(&mut three) {}
        }
    }

    #[test]
    fn golden_bytes() {
        let mut out = BytesMut::new();
        encode(b"ab", &mut out).unwrap();
        encode_tagged(0x0102, b"c", &mut out).unwrap();
        assert_eq!(&out[..], b"\0\0\0\x02ab\0\0\0\x09\0\0\0\0\0\0\x01\x02c");
        out.clear();
        encode_vnet(b"hd", b"c", &mut out).unwrap();
        assert_eq!(&out[..], b"\0\0\0\x03\0\0\0\x02hdc");
    }

    #[test]
    fn an_end_without_vnet_headers_is_found_out() {
        let mut plain = BytesMut::new();
        encode(&[0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0], &mut plain).unwrap();
        let error = WireError::VnetHeader { vnet_bytes: 0x5254_0012, bytes: 8 };
        let mut decoder = VnetDecoder::default();
        assert_eq!(decoder.decode(&mut plain), Err(error));
        assert_eq!(decoder.decode(&mut BytesMut::new()), Err(error), "for good");
        assert!(error.to_string().contains("vnet_hdr_support"));
    }

    #[test]
    fn an_oversized_length_fails_at_once_and_for_good() {
        let mut decoder = Decoder::default();
        let error = WireError::Oversized { bytes: 69_633 };
        assert_eq!(decoder.decode(&mut BytesMut::from(&69_633_u32.to_be_bytes()[..])), Err(error));
        assert_eq!(decoder.decode(&mut BytesMut::from(&b"\0\0\0\x01a"[..])), Err(error));
        assert_eq!(encode(&[0; 69_633], &mut BytesMut::new()), Err(error));
        let mut short = BytesMut::from(&b"\0\0\0\x07"[..]);
        assert_eq!(TaggedDecoder::default().decode(&mut short), Err(WireError::NoEpoch { bytes: 7 }));
        assert!(encode(&[0; 69_632], &mut BytesMut::new()).is_ok());
    }

    #[test]
    fn an_empty_frame_is_no_frame() {
        let mut input = BytesMut::from(&b"\0\0\0\0\0\0\0\x01a"[..]);
        assert_eq!(Decoder::default().decode(&mut input), Ok(Some(Bytes::from_static(b"a"))));
    }
}
