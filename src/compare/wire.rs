//! Frames on a byte stream: QEMU's chardev framing, and our packet link's, which adds the epoch.
//!
//! ```text
//!   QEMU   be32 length │ frame                     length counts the frame
//!   link   be32 length │ be64 epoch │ frame        length counts both
//! ```
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

const LENGTH_BYTES: usize = 4;
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
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn garbage_is_an_error_or_a_wait(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let (mut one, mut two) = (BytesMut::from(&bytes[..]), BytesMut::from(&bytes[..]));
            while let Ok(Some(_)) = Decoder::default().decode(&mut one) {}
            while let Ok(Some(_)) = TaggedDecoder::default().decode(&mut two) {}
        }
    }

    #[test]
    fn golden_bytes() {
        let mut out = BytesMut::new();
        encode(b"ab", &mut out).unwrap();
        encode_tagged(0x0102, b"c", &mut out).unwrap();
        assert_eq!(&out[..], b"\0\0\0\x02ab\0\0\0\x09\0\0\0\0\0\0\x01\x02c");
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
