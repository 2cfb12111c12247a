//! Records of Xen's migration streams (xen `docs/specs/libxc-migration-stream.pandoc`).
//!
//! ```text
//! type le32 │ length le32 │ body │ zeroes up to a multiple of eight
//! ```
//!
//! Every layer of a migration stream is made of them, and so is a guest's device state. The trap: the length counts
//! the body without its padding, and comes from a peer.

/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 8;

/// The time stamp counter: mode, kHz, nanoseconds, incarnation (24 bytes).
pub const X86_TSC_INFO: u32 = 0x08;
/// What Xen's `XEN_DOMCTL_gethvmcontext` gives.
pub const HVM_CONTEXT: u32 = 0x09;
/// HVM parameters: count, reserved, then index and value of each as le64.
pub const HVM_PARAMS: u32 = 0x0A;
/// Ours: the device state of an embedded guest.
pub const EMBEDDED_DEVICES: u32 = 0x4000_0002;
/// Ours: what `xen-save-devices-state` of the device model wrote (in libxl's stream it is a record of another layer).
pub const EMULATOR_CONTEXT: u32 = 0x4000_0003;

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

/// Type and length of the record that `input` begins with; `None` when not even its header is there.
#[must_use]
pub fn peek_header(input: &[u8]) -> Option<(u32, usize)> {
    let (head, _) = input.split_first_chunk::<HEADER_BYTES>()?;
    let [t0, t1, t2, t3, l0, l1, l2, l3] = *head;
    Some((u32::from_le_bytes([t0, t1, t2, t3]), u32::from_le_bytes([l0, l1, l2, l3]) as usize))
}

/// Appends a record. Bodies of 4 GiB and more do not exist: every stream bounds them far below.
pub fn append(record: u32, body: &[u8], out: &mut Vec<u8>) {
    debug_assert!(u32::try_from(body.len()).is_ok(), "a record of {} bytes", body.len());
    out.reserve(HEADER_BYTES + body.len().next_multiple_of(8));
    out.extend(record.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend_from_slice(body);
    out.resize(out.len() + body.len().next_multiple_of(8) - body.len(), 0);
}

/// Finds a record in a run of them.
pub fn find(run: &[u8], wanted: u32) -> Result<&[u8], RecordError> {
    let mut rest = run;
    while let Some((record, len_bytes)) = peek_header(rest) {
        let cut_short = RecordError::CutShort { record, len_bytes };
        let end = HEADER_BYTES.checked_add(len_bytes).ok_or(cut_short.clone())?;
        let body = rest.get(HEADER_BYTES..end).ok_or(cut_short)?;
        if record == wanted {
            return Ok(body);
        }
        rest = rest.get(end.next_multiple_of(8)..).unwrap_or_default();
    }
    Err(RecordError::Missing(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_padded_and_found_among_others() {
        let mut run = Vec::new();
        append(X86_TSC_INFO, &[1; 24], &mut run);
        append(EMBEDDED_DEVICES, b"state", &mut run);
        assert_eq!(run.len(), 32 + 16);
        append(HVM_PARAMS, &[], &mut run);
        assert_eq!(run.len(), 32 + 16 + 8);
        assert_eq!(find(&run, EMBEDDED_DEVICES), Ok(&b"state"[..]));
        assert_eq!(find(&run, HVM_PARAMS), Ok(&[][..]));
        assert_eq!(find(&run, HVM_CONTEXT), Err(RecordError::Missing(HVM_CONTEXT)));
        let cut = RecordError::CutShort { record: 8, len_bytes: 0xffff_ffff };
        assert_eq!(find(&[8, 0, 0, 0, 255, 255, 255, 255, 1], HVM_CONTEXT), Err(cut));
    }
}
