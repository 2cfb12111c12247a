//! The stream around an image: libxl's.
//!
//! ```text
//! plain   header LIBXC_CONTEXT [image … END]  [EMULATOR_XENSTORE_DATA] [EMULATOR_CONTEXT]  END
//! Remus   header LIBXC_CONTEXT [image … CHECKPOINT]  [emulator records]  CHECKPOINT_END
//!                              [… CHECKPOINT]        [emulator records]  CHECKPOINT_END …
//! ```
//!
//! The trap: the header is big-endian whatever the records are, and libxl knows no optional records: it refuses every
//! type but these, bit 31 or not. Only HVM domains have emulator records; one in a PVH stream is refused too.
//! Source: xen `docs/specs/libxl-migration-stream.pandoc`.

use crate::record;
use bytes::{BufMut, BytesMut};

/// `LibxlFmt`.
const IDENT: u64 = 0x4c69_6278_6c46_6d74;
const VERSION: u32 = 2;
/// QEMU upstream.
const EMULATOR_QEMU: u32 = 2;

/// A record of the outer stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OuterRecord {
    /// The stream is over.
    End,
    /// What follows is libxc's, until libxc is done.
    LibxcContext,
    /// What the device model keeps in xenstore: keys relative to its directory, with values.
    EmulatorXenstoreData(Vec<(String, String)>),
    /// The device model's state.
    EmulatorContext(Vec<u8>),
    /// The checkpoint is whole.
    CheckpointEnd,
}

impl OuterRecord {
    /// Its type on the wire.
    #[must_use]
    pub fn kind(&self) -> u32 {
        match self {
            Self::End => 0,
            Self::LibxcContext => 1,
            Self::EmulatorXenstoreData(_) => 2,
            Self::EmulatorContext(_) => 3,
            Self::CheckpointEnd => 4,
        }
    }

    /// Appends the record.
    pub fn encode(&self, out: &mut BytesMut) {
        let mut body = BytesMut::new();
        match self {
            Self::End | Self::LibxcContext | Self::CheckpointEnd => {}
            Self::EmulatorXenstoreData(pairs) => {
                put_emulator(&mut body);
                for text in pairs.iter().flat_map(|(key, value)| [key, value]) {
                    body.put_slice(text.as_bytes());
                    body.put_u8(0);
                }
            }
            Self::EmulatorContext(state) => {
                put_emulator(&mut body);
                body.put_slice(state);
            }
        }
        record::put(self.kind(), &body, out);
    }
}

/// Which device model a record is of: QEMU, and the first of them.
fn put_emulator(body: &mut BytesMut) {
    body.put_u32_le(EMULATOR_QEMU);
    body.put_u32_le(0);
}

/// Appends the header.
pub fn encode_header(out: &mut BytesMut) {
    out.put_u64(IDENT);
    out.put_u32(VERSION);
    out.put_u32(0);
}
