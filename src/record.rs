//! Xen's record framing, which the live stream and the migration image share.
//!
//! ```text
//! ┌─────────┬────────────────┬───────────────┬──────────────────────────────────┐
//! │ type u32│ length u32     │ body          │ zeroes up to a multiple of eight │   all little-endian
//! └─────────┴────────────────┴───────────────┴──────────────────────────────────┘
//!            counts the body, not the padding
//! ```
//!
//! Source: xen `docs/specs/libxc-migration-stream.pandoc`. The trap: the length comes from outside. Every reader
//! compares it with what the type may hold before it buffers anything.

use bytes::BufMut;

/// Page contents: a count, that many entries of [`ENTRY_BYTES`], then the contents.
pub const PAGE_DATA: u32 = 0x01;
/// The time stamp counter: mode, kHz, nanoseconds, incarnation (24 bytes).
pub const X86_TSC_INFO: u32 = 0x08;
/// What `XEN_DOMCTL_gethvmcontext` gives.
pub const HVM_CONTEXT: u32 = 0x09;
/// HVM parameters: a count, then index and value of each as u64.
pub const HVM_PARAMS: u32 = 0x0A;
/// Everything before it is one consistent state.
pub const CHECKPOINT: u32 = 0x0E;
/// Ours: the device state of an embedded guest.
pub const EMBEDDED_DEVICES: u32 = 0x4000_0002;
/// Ours: what `xen-save-devices-state` of the device model wrote (in libxl's stream it is a record of another layer).
pub const EMULATOR_CONTEXT: u32 = 0x4000_0003;
/// Bit 31 of a type: a reader that does not know the record may skip it.
pub const OPTIONAL: u32 = 1 << 31;
/// The bits of an entry that are a page number.
pub const PFN_MASK: u64 = (1 << 52) - 1;
/// Bytes of a page entry: type in the upper four bits, page number in the lower 52.
pub const ENTRY_BYTES: usize = 8;
/// Bytes of the count, and what is reserved beside it, in front of a list of entries.
pub const COUNT_BYTES: usize = 8;

/// What is wrong with a run of records.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    /// A record that does not end within the run.
    #[error("record type {record:#x} of {len_bytes} bytes is cut short")]
    CutShort {
        /// Its type.
        record: u32,
        /// Its length.
        len_bytes: usize,
    },
    /// A record that should be there.
    #[error("record type {0:#x} is missing")]
    Missing(u32),
}

/// What stands in front of a record's body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The record's type.
    pub record: u32,
    /// Length of the body in bytes, without padding.
    pub len_bytes: usize,
}

impl Header {
    /// Its size in bytes.
    pub const BYTES: usize = 8;

    /// Reads a header off the front of `input`, or `None` while it is incomplete.
    #[must_use]
    pub fn peek(input: &[u8]) -> Option<Self> {
        let ([t0, t1, t2, t3, l0, l1, l2, l3], _) = input.split_first_chunk::<{ Self::BYTES }>()?;
        let len_bytes = u32::from_le_bytes([*l0, *l1, *l2, *l3]) as usize;
        Some(Self { record: u32::from_le_bytes([*t0, *t1, *t2, *t3]), len_bytes })
    }

    /// Appends the header.
    pub fn put(self, out: &mut impl BufMut) {
        debug_assert!(u32::try_from(self.len_bytes).is_ok(), "a record's length is 32 bits");
        out.put_u32_le(self.record);
        out.put_u32_le(self.len_bytes as u32);
    }

    /// Length of body and padding in bytes.
    #[must_use]
    pub fn padded_bytes(self) -> usize {
        self.len_bytes.next_multiple_of(8)
    }

    /// Whether a reader that does not know the type may go on.
    #[must_use]
    pub fn is_optional(self) -> bool {
        self.record & OPTIONAL != 0
    }
}

/// Appends a whole record, padded.
pub fn put(record: u32, body: &[u8], out: &mut impl BufMut) {
    let header = Header { record, len_bytes: body.len() };
    header.put(out);
    out.put_slice(body);
    out.put_bytes(0, header.padded_bytes() - body.len());
}

/// Finds a record in a run of them.
pub fn find(run: &[u8], wanted: u32) -> Result<&[u8], RecordError> {
    let mut rest = run;
    while let Some(Header { record, len_bytes }) = Header::peek(rest) {
        let cut_short = RecordError::CutShort { record, len_bytes };
        let end = Header::BYTES.checked_add(len_bytes).ok_or(cut_short.clone())?;
        let body = rest.get(Header::BYTES..end).ok_or(cut_short)?;
        if record == wanted {
            return Ok(body);
        }
        rest = rest.get(end.next_multiple_of(8)..).unwrap_or_default();
    }
    Err(RecordError::Missing(wanted))
}

/// Appends the count in front of a list of entries.
pub fn put_count(count: usize, out: &mut impl BufMut) {
    debug_assert!(u32::try_from(count).is_ok(), "a count is 32 bits");
    out.put_u32_le(count as u32);
    out.put_u32_le(0);
}

/// Reads the count off the front of a body and returns it with what follows.
pub fn take_count(body: &[u8]) -> Result<(usize, &[u8]), &'static str> {
    let ([c0, c1, c2, c3, ..], rest) = body.split_first_chunk::<COUNT_BYTES>().ok_or("no count")?;
    Ok((u32::from_le_bytes([*c0, *c1, *c2, *c3]) as usize, rest))
}

/// Splits a body into its `count × N` bytes of entries and what follows them.
pub fn take_entries<const N: usize>(body: &[u8]) -> Result<(&[[u8; N]], &[u8]), &'static str> {
    let (count, rest) = take_count(body)?;
    let list_bytes = count.checked_mul(N).filter(|bytes| *bytes <= rest.len()).ok_or("shorter than its count")?;
    let (list, rest) = rest.split_at(list_bytes);
    Ok((list.as_chunks::<N>().0, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;

    #[test]
    fn a_record_is_found_among_others() {
        let mut run = Vec::new();
        put(X86_TSC_INFO, &[1; 24], &mut run);
        put(EMBEDDED_DEVICES, b"state", &mut run);
        put(HVM_PARAMS, &[], &mut run);
        assert_eq!(find(&run, EMBEDDED_DEVICES), Ok(&b"state"[..]));
        assert_eq!(find(&run, HVM_PARAMS), Ok(&[][..]));
        assert_eq!(find(&run, HVM_CONTEXT), Err(RecordError::Missing(HVM_CONTEXT)));
        let cut = RecordError::CutShort { record: 8, len_bytes: 0xffff_ffff };
        assert_eq!(find(&[8, 0, 0, 0, 255, 255, 255, 255, 1], HVM_CONTEXT), Err(cut));
    }

    #[test]
    fn a_record_is_padded_and_its_length_is_not() {
        let mut out = BytesMut::new();
        put(0x8000_0007, b"nine byte", &mut out);
        assert_eq!(out[..], *b"\x07\0\0\x80\x09\0\0\0nine byte\0\0\0\0\0\0\0");
        let header = Header::peek(&out).unwrap();
        assert_eq!((header.len_bytes, header.padded_bytes(), header.is_optional()), (9, 16, true));
        assert_eq!(Header::peek(&out[..7]), None);
    }

    #[test]
    fn a_count_is_believed_only_as_far_as_there_are_entries() {
        let mut out = BytesMut::new();
        put_count(2, &mut out);
        out.put_slice(&[7; 17]);
        assert_eq!(take_entries::<8>(&out), Ok((&[[7; 8], [7; 8]][..], &[7][..])));
        assert_eq!(take_entries::<16>(&out), Err("shorter than its count"));
        assert_eq!(take_entries::<8>(&out[..7]), Err("no count"));
    }
}
