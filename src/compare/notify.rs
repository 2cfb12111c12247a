//! The words on colo-compare's `notify_dev`, by which libxl's userspace proxy is told when to checkpoint.
//!
//! ```text
//!   toolstack ──COLO_USERSPACE_PROXY_INIT──▶ comparator     hello
//!             ◀──COLO_COMPARE_GET_XEN_INIT──                its answer
//!             ◀──────DO_CHECKPOINT──────────                the outputs differ: checkpoint, please
//!             ───────COLO_CHECKPOINT────────▶               the checkpoint is made: let go what is held
//! ```
//!
//! Each is `be32 length │ ASCII`, no NUL. There is no acknowledgement of COLO_CHECKPOINT. What is none of these words is
//! answered by nothing, and the connection goes on.
//!
//! The trap: QEMU with `vnet_hdr_support` on expects a second word on this channel too, the virtio-net header's length,
//! and never sends one; libxl does not send it either. It is told by its first byte: a header's length is far below
//! 2^24, so that byte is zero, and no instruction begins with NUL. Sources: `net/colo-compare.c`
//! (compare_notify_rs_finalize), `libxl_colo_proxy.c`.

use bytes::{Buf, BytesMut};
use thiserror::Error;

/// The toolstack's hello.
pub const COLO_USERSPACE_PROXY_INIT: &[u8] = b"COLO_USERSPACE_PROXY_INIT";
/// The answer to it.
pub const COLO_COMPARE_GET_XEN_INIT: &[u8] = b"COLO_COMPARE_GET_XEN_INIT";
/// The comparator's request.
pub const DO_CHECKPOINT: &[u8] = b"DO_CHECKPOINT";
/// The toolstack's word that a checkpoint was made.
pub const COLO_CHECKPOINT: &[u8] = b"COLO_CHECKPOINT";

/// The longest frame that is waited for: every word is far shorter.
const MAX_BYTES: usize = 256;

/// What the toolstack says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Instruction {
    /// Hello: answer [`COLO_COMPARE_GET_XEN_INIT`].
    Init,
    /// A checkpoint was made.
    Checkpoint,
    /// Something else. QEMU's text for it: "COLO compare got unsupported instruction".
    Unsupported,
}

/// What the comparator says, as a client of it reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// The answer to the hello.
    Initialised,
    /// Checkpoint, please.
    DoCheckpoint,
    /// Something else, which libxl takes for a reason to checkpoint.
    Other,
}

/// A channel whose message boundaries are lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum NotifyError {
    /// Far longer than any word.
    #[error("an instruction of {bytes} bytes is above the limit of {MAX_BYTES}")]
    Oversized {
        /// What the length said.
        bytes: usize,
    },
}

/// A word as it is sent.
#[must_use]
pub fn encode(word: &[u8]) -> Vec<u8> {
    [&(word.len() as u32).to_be_bytes()[..], word].concat()
}

/// Takes words from a byte stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Decoder {
    failed: Option<NotifyError>,
}

impl Decoder {
    /// Takes the next instruction of a toolstack, or nothing until more bytes come.
    pub fn instruction(&mut self, input: &mut BytesMut) -> Result<Option<Instruction>, NotifyError> {
        Ok(self.word(input)?.map(|word| match &word[..] {
            COLO_USERSPACE_PROXY_INIT => Instruction::Init,
            COLO_CHECKPOINT => Instruction::Checkpoint,
            _ => Instruction::Unsupported,
        }))
    }

    /// Takes the next notice of a comparator, or nothing until more bytes come.
    pub fn notice(&mut self, input: &mut BytesMut) -> Result<Option<Notice>, NotifyError> {
        Ok(self.word(input)?.map(|word| match &word[..] {
            COLO_COMPARE_GET_XEN_INIT => Notice::Initialised,
            DO_CHECKPOINT => Notice::DoCheckpoint,
            _ => Notice::Other,
        }))
    }

    fn word(&mut self, input: &mut BytesMut) -> Result<Option<BytesMut>, NotifyError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        loop {
            let Some((length, rest)) = input.split_first_chunk::<4>() else { return Ok(None) };
            let bytes = u32::from_be_bytes(*length) as usize;
            if bytes > MAX_BYTES {
                self.failed = Some(NotifyError::Oversized { bytes });
                return Err(NotifyError::Oversized { bytes });
            }
            // An empty word says nothing; what follows its length is the next length.
            if bytes == 0 {
                input.advance(4);
                continue;
            }
            let Some(first) = rest.first() else { return Ok(None) };
            let words_bytes = if *first == 0 { 8 } else { 4 };
            if input.len() < words_bytes + bytes {
                return Ok(None);
            }
            input.advance(words_bytes);
            return Ok(Some(input.split_to(bytes)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// With the second word, or without.
    fn framed(word: &[u8], vnet: Option<u32>) -> Vec<u8> {
        let mut out = (word.len() as u32).to_be_bytes().to_vec();
        out.extend(vnet.into_iter().flat_map(u32::to_be_bytes));
        out.extend(word);
        out
    }

    #[test]
    fn golden_bytes() {
        let hex = |word| encode(word).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            hex(COLO_USERSPACE_PROXY_INIT),
            "00000019434f4c4f5f555345525350414345 5f50524f58595f494e4954".replace(' ', "")
        );
        assert_eq!(hex(COLO_COMPARE_GET_XEN_INIT), "00000019434f4c4f5f434f4d504152455f4745545f58454e5f494e4954");
        assert_eq!(hex(DO_CHECKPOINT), "0000000d444f5f434845434b504f494e54");
        assert_eq!(hex(COLO_CHECKPOINT), "0000000f434f4c4f5f434845434b504f494e54");
    }

    proptest! {
        #[test]
        fn every_word_is_heard_however_cut_and_framed(
            words in prop::collection::vec((0_usize..6, prop::option::of(0_u32..70_000)), 0..10),
            cut in 1_usize..40,
        ) {
            let known: [(&[u8], Instruction, Notice); 6] = [
                (COLO_USERSPACE_PROXY_INIT, Instruction::Init, Notice::Other),
                (COLO_CHECKPOINT, Instruction::Checkpoint, Notice::Other),
                (COLO_COMPARE_GET_XEN_INIT, Instruction::Unsupported, Notice::Initialised),
                (DO_CHECKPOINT, Instruction::Unsupported, Notice::DoCheckpoint),
                (b"COLO_CHECKPOINT\0", Instruction::Unsupported, Notice::Other),
                (b"x", Instruction::Unsupported, Notice::Other),
            ];
            let wire: Vec<u8> = words.iter().flat_map(|(word, vnet)| framed(known[*word].0, *vnet)).collect();
            let (mut input, mut decoder, mut got) = (BytesMut::new(), Decoder::default(), vec![]);
            for piece in wire.chunks(cut) {
                input.extend_from_slice(piece);
                while let Some(instruction) = decoder.instruction(&mut input).unwrap() { got.push(instruction); }
            }
            prop_assert_eq!(got, words.iter().map(|(word, _)| known[*word].1).collect::<Vec<_>>());
            prop_assert!(input.is_empty());
            let (mut input, mut decoder, mut got) = (BytesMut::from(&wire[..]), Decoder::default(), vec![]);
            while let Some(notice) = decoder.notice(&mut input).unwrap() { got.push(notice); }
            prop_assert_eq!(got, words.iter().map(|(word, _)| known[*word].2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_length_above_the_limit_fails_at_once_and_for_good() {
        let mut decoder = Decoder::default();
        let error = NotifyError::Oversized { bytes: 257 };
        assert_eq!(decoder.instruction(&mut BytesMut::from(&257_u32.to_be_bytes()[..])), Err(error));
        assert_eq!(decoder.instruction(&mut BytesMut::from(&encode(COLO_CHECKPOINT)[..])), Err(error));
    }

    #[test]
    fn an_empty_word_is_no_word() {
        let mut input = BytesMut::from(&[&[0; 12][..], &encode(COLO_CHECKPOINT)].concat()[..]);
        assert_eq!(Decoder::default().instruction(&mut input), Ok(Some(Instruction::Checkpoint)));
    }
}
