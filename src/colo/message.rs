//! The seven COLO messages, byte for byte QEMU's.
//!
//! ```text
//!  #  message             way     bytes
//!  0  checkpoint-ready    S → P   00 00 00 00
//!  1  checkpoint-request  P → S   00 00 00 01
//!  2  checkpoint-reply    S → P   00 00 00 02
//!  3  vmstate-send        P → S   00 00 00 03, then the page records
//!  4  vmstate-size        P → S   00 00 00 04, a be64 count, then that many bytes of device state
//!  5  vmstate-received    S → P   00 00 00 05
//!  6  vmstate-loaded      S → P   00 00 00 06
//! ```
//!
//! Big-endian, no length, no version, no sequence number (qemu `qapi/migration.json` COLOMessage,
//! `migration/colo.c` colo_send_message). The trap: QEMU bounds the count of message 4 nowhere; here the
//! stream decoder refuses one above its limit before it allocates.

use bytes::{Buf, BufMut, BytesMut};
use std::fmt;

/// One COLO message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// The secondary has loaded the first state and is ready for checkpoints.
    CheckpointReady,
    /// The primary asks for a checkpoint.
    CheckpointRequest,
    /// The secondary's guest is stopped; the primary may capture.
    CheckpointReply,
    /// The page records follow.
    VmstateSend,
    /// Device state of this many bytes follows.
    VmstateSize(u64),
    /// The secondary owns the checkpoint: the commit point.
    VmstateReceived,
    /// The secondary runs from the checkpoint.
    VmstateLoaded,
}

/// A message number that does not exist.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:#x} is no COLO message (0 to 6 are)")]
pub struct InvalidMessage(pub u32);

impl Message {
    /// QEMU's number.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::CheckpointReady => 0,
            Self::CheckpointRequest => 1,
            Self::CheckpointReply => 2,
            Self::VmstateSend => 3,
            Self::VmstateSize(_) => 4,
            Self::VmstateReceived => 5,
            Self::VmstateLoaded => 6,
        }
    }

    /// Appends the message's bytes.
    pub fn encode(self, out: &mut BytesMut) {
        out.put_u32(self.number());
        if let Self::VmstateSize(bytes) = self {
            out.put_u64(bytes);
        }
    }

    /// Takes one message off the front of `input`, or `None` while it is incomplete.
    pub fn decode(input: &mut BytesMut) -> Result<Option<Self>, InvalidMessage> {
        let Some((number, rest)) = input.split_first_chunk::<4>() else { return Ok(None) };
        let message = match u32::from_be_bytes(*number) {
            0 => Self::CheckpointReady,
            1 => Self::CheckpointRequest,
            2 => Self::CheckpointReply,
            3 => Self::VmstateSend,
            4 => match rest.first_chunk::<8>() {
                Some(size) => Self::VmstateSize(u64::from_be_bytes(*size)),
                None => return Ok(None),
            },
            5 => Self::VmstateReceived,
            6 => Self::VmstateLoaded,
            other => return Err(InvalidMessage(other)),
        };
        input.advance(if matches!(message, Self::VmstateSize(_)) { 12 } else { 4 });
        Ok(Some(message))
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CheckpointReady => "checkpoint-ready",
            Self::CheckpointRequest => "checkpoint-request",
            Self::CheckpointReply => "checkpoint-reply",
            Self::VmstateSend => "vmstate-send",
            Self::VmstateSize(_) => "vmstate-size",
            Self::VmstateReceived => "vmstate-received",
            Self::VmstateLoaded => "vmstate-loaded",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_qemus() {
        let golden: [(Message, &[u8]); 7] = [
            (Message::CheckpointReady, &[0, 0, 0, 0]),
            (Message::CheckpointRequest, &[0, 0, 0, 1]),
            (Message::CheckpointReply, &[0, 0, 0, 2]),
            (Message::VmstateSend, &[0, 0, 0, 3]),
            (Message::VmstateSize(0x0102_0304_0506_0708), &[0, 0, 0, 4, 1, 2, 3, 4, 5, 6, 7, 8]),
            (Message::VmstateReceived, &[0, 0, 0, 5]),
            (Message::VmstateLoaded, &[0, 0, 0, 6]),
        ];
        for (message, bytes) in golden {
            let mut out = BytesMut::new();
            message.encode(&mut out);
            assert_eq!(&out[..], bytes, "{message}");
            for cut in 0..bytes.len() {
                assert_eq!(Message::decode(&mut BytesMut::from(&bytes[..cut])), Ok(None), "{message} cut at {cut}");
            }
            out.put_u8(9);
            assert_eq!(Message::decode(&mut out), Ok(Some(message)));
            assert_eq!(&out[..], [9], "what follows stays");
        }
    }

    #[test]
    fn seven_and_above_are_refused() {
        for number in [7, 8, 0x4745_5420, u32::MAX] {
            let mut input = BytesMut::from(&number.to_be_bytes()[..]);
            assert_eq!(Message::decode(&mut input), Err(InvalidMessage(number)));
        }
    }
}
