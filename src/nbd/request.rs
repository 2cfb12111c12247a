//! What a client asks for, whether an export takes it, and which of two must wait for the other.
//!
//! NBD promises no order ("Ordering of messages and writes"): two overlapping writes in flight may land either way
//! round, and a flush covers only writes whose replies were sent before it. [`Request::blocks`] is the whole rule that
//! makes order of it, for one connection ([`super::client`]) and for several ([`super::session`]).

use super::client::{ExportInfo, SubmitError};
use super::*;
use bytes::Bytes;

/// A request of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
    /// What a write carries; empty otherwise.
    pub(super) data: Bytes,
}

impl Request {
    /// Reads `len_bytes` from `offset`.
    #[must_use]
    pub fn read(offset: u64, len_bytes: u32) -> Self {
        Self::new(CMD_READ, offset, len_bytes.into())
    }

    /// Writes `data` at `offset`.
    #[must_use]
    pub fn write(offset: u64, data: Bytes) -> Self {
        Self { data: data.clone(), ..Self::new(CMD_WRITE, offset, data.len() as u64) }
    }

    /// Makes `len_bytes` from `offset` zeroes, and keeps their space allocated if `keep_space`. The server's maximum
    /// block size is no limit, since no bytes travel.
    #[must_use]
    pub fn write_zeroes(offset: u64, len_bytes: u32, keep_space: bool) -> Self {
        let flags = if keep_space { CMD_FLAG_NO_HOLE } else { 0 };
        Self { flags, ..Self::new(CMD_WRITE_ZEROES, offset, len_bytes.into()) }
    }

    /// Says that `len_bytes` from `offset` are not needed any more; what they then read as is the server's choice.
    #[must_use]
    pub fn trim(offset: u64, len_bytes: u32) -> Self {
        Self::new(CMD_TRIM, offset, len_bytes.into())
    }

    /// Makes every write submitted before durable.
    #[must_use]
    pub fn flush() -> Self {
        Self::new(CMD_FLUSH, 0, 0)
    }

    /// Says good-bye; there is no reply.
    pub(super) fn disconnect() -> Self {
        Self::new(CMD_DISC, 0, 0)
    }

    /// The same, durable when it completes (NBD_CMD_FLAG_FUA).
    #[must_use]
    pub fn fua(mut self) -> Self {
        self.flags |= CMD_FLAG_FUA;
        self
    }

    fn new(kind: u16, offset: u64, len_bytes: u64) -> Self {
        Self { kind, flags: 0, offset, len_bytes, data: Bytes::new() }
    }

    /// Whether it changes what the disk holds.
    #[must_use]
    pub fn writes(&self) -> bool {
        matches!(self.kind, CMD_WRITE | CMD_WRITE_ZEROES | CMD_TRIM)
    }

    /// The bytes of the export it is about; empty for a flush.
    #[must_use]
    pub fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset.saturating_add(self.len_bytes)
    }

    /// What a write carries.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Bytes that travel with it, one way or the other.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        if self.carries() { self.len_bytes } else { 0 }
    }

    /// Whether it is durable when it completes.
    #[must_use]
    pub fn is_fua(&self) -> bool {
        self.flags & CMD_FLAG_FUA != 0
    }

    fn carries(&self) -> bool {
        matches!(self.kind, CMD_READ | CMD_WRITE)
    }

    /// Whether this request must be complete before `later`, submitted after it, may be sent: when they overlap and
    /// either is a write, and for a flush when this is one.
    #[must_use]
    pub fn blocks(&self, later: &Self) -> bool {
        let (one, other) = (self.range(), later.range());
        let overlap = one.start < other.end && other.start < one.end;
        match (self.kind, later.kind) {
            (_, CMD_FLUSH) => self.writes(),
            (CMD_FLUSH, _) => false,
            _ => (self.writes() || later.writes()) && overlap,
        }
    }

    /// Whether an export takes it.
    pub fn check(&self, info: &ExportInfo) -> Result<(), SubmitError> {
        let lacks = |flag: u16| info.flags & flag == 0;
        let sizes = info.block_sizes;
        let aligned = |number: u64| number.is_multiple_of(sizes.min_bytes.into());
        match self.kind {
            _ if self.writes() && !lacks(EXPORT_READ_ONLY) => Err(SubmitError::ReadOnly),
            CMD_FLUSH if lacks(EXPORT_SEND_FLUSH) => Err(SubmitError::Unsupported),
            CMD_TRIM if lacks(EXPORT_SEND_TRIM) => Err(SubmitError::Unsupported),
            CMD_WRITE_ZEROES if lacks(EXPORT_SEND_WRITE_ZEROES) => Err(SubmitError::Unsupported),
            _ if self.flags & CMD_FLAG_FUA != 0 && lacks(EXPORT_SEND_FUA) => Err(SubmitError::Unsupported),
            _ if self.carries() && self.len_bytes > sizes.max_bytes.into() => Err(SubmitError::TooLong),
            _ if !aligned(self.offset) || !aligned(self.len_bytes) => Err(SubmitError::Misaligned),
            _ => crate::disk::check_range(info.size_bytes, self.offset, self.len_bytes)
                .map_err(|_| SubmitError::OutOfRange),
        }
    }
}
