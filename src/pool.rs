//! Memory for large payloads, which is given back and used again.
//!
//! ```text
//!   Pool ─┬─ buffer ─▶ filled by a socket ─ block ─┐
//!         └─ copy ─────────────────────────────────┴─▶ Block ── dropped ─▶ Pool, while it holds less than it may
//! ```
//!
//! The allocator returns a megabyte to the kernel when it is freed, and the kernel clears a page at a time when it is wanted
//! again: for a disk that is written fast, that costs more than the copy itself. And what a socket has filled needs no
//! copy at all: a disk that keeps it keeps the buffer ([`crate::disk::Disk::write_block`]).
//!
//! The trap: a block keeps all of its buffer, and whoever counts bytes counts those of the block. So what is to be kept must be
//! at least half of its buffer.

use bytes::Bytes;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Below, the allocator keeps what is freed itself, and a copy costs nothing.
pub const POOLED_FROM_BYTES: usize = 64 << 10;
/// Memory that waits to be used again, at most, unless somebody has a use for more.
const KEPT_BYTES: usize = 16 << 20;

#[derive(Debug)]
struct Kept {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
    max_bytes: usize,
}

/// Memory that waits to be used again. A clone is the same.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Mutex<Kept>>);

impl Default for Pool {
    fn default() -> Self {
        Self::keeping(KEPT_BYTES)
    }
}

impl Pool {
    /// Keeps so much at most.
    #[must_use]
    pub fn keeping(max_bytes: usize) -> Self {
        Self(Arc::new(Mutex::new(Kept { buffers: Vec::new(), bytes: 0, max_bytes })))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Whoever panicked held no more than memory.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of at least `len` bytes; what is in it is anything.
    #[must_use]
    pub fn buffer(&self, len: usize) -> Vec<u8> {
        // A new one costs nothing before it is filled.
        let Some(mut buffer) = self.kept().take(len) else { return vec![0; len] };
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        buffer
    }

    /// Gives a buffer back.
    pub fn give_back(&self, buffer: Vec<u8>) {
        if buffer.capacity() >= POOLED_FROM_BYTES {
            self.kept().keep(buffer);
        }
    }

    /// These bytes of a buffer that comes back here after them.
    #[must_use]
    pub fn block(&self, buffer: Vec<u8>, range: Range<usize>) -> Block {
        let end = range.end.min(buffer.len());
        Block { bytes: buffer, range: range.start.min(end)..end, pool: self.clone() }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn copy(&self, bytes: &[u8]) -> Block {
        let kept = if bytes.len() >= POOLED_FROM_BYTES { self.kept().take(bytes.len()) } else { None };
        let mut buffer = kept.filter(|kept| kept.capacity() <= 2 * bytes.len()).unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(bytes);
        Block { bytes: buffer, range: 0..bytes.len(), pool: self.clone() }
    }

    /// As [`Self::copy`], for many owners: the last one gives it back.
    #[must_use]
    pub fn share(&self, bytes: &[u8]) -> Bytes {
        match bytes.len() {
            POOLED_FROM_BYTES.. => Bytes::from_owner(self.copy(bytes)),
            _ => Bytes::copy_from_slice(bytes),
        }
    }
}

impl Kept {
    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        let at = self.buffers.iter().rposition(|buffer| buffer.capacity() >= len)?;
        let buffer = self.buffers.swap_remove(at);
        self.bytes -= buffer.capacity();
        Some(buffer)
    }

    fn keep(&mut self, buffer: Vec<u8>) {
        if self.bytes + buffer.capacity() <= self.max_bytes {
            self.bytes += buffer.capacity();
            self.buffers.push(buffer);
        }
    }
}

/// Bytes in memory that is used again after them.
#[derive(Debug, Default)]
pub struct Block {
    bytes: Vec<u8>,
    range: Range<usize>,
    pool: Pool,
}

impl Block {
    /// The whole buffer again, of a block that nobody kept.
    #[must_use]
    pub fn into_buffer(mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

impl Clone for Block {
    /// The same bytes, in memory of the same pool.
    fn clone(&self) -> Self {
        self.pool.copy(self)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.bytes));
    }
}

impl Deref for Block {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.range.clone()]
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_used_again_and_not_more_is_kept_than_allowed() {
        let pool = Pool::default();
        let first = pool.share(&[1; 1 << 20]);
        let at = first.as_ptr();
        let second = first.slice(5..);
        drop(first);
        assert!(pool.kept().buffers.is_empty(), "somebody has it still");
        drop(second);
        let again = pool.copy(&[2; 1 << 19]);
        assert_eq!((again.as_ptr(), &again[..]), (at, &[2; 1 << 19][..]));
        drop(again);
        let many: Vec<_> = (0..100).map(|byte| pool.copy(&[byte; 1 << 20])).collect();
        assert!(many.iter().zip(0..).all(|(block, byte)| block.iter().all(|it| *it == byte)));
        drop(many);
        let kept = pool.kept();
        assert_eq!((kept.bytes, kept.buffers.len()), (KEPT_BYTES, KEPT_BYTES >> 20));
    }

    #[test]
    fn a_block_is_part_of_a_buffer_that_comes_back() {
        let pool = Pool::default();
        let mut buffer = pool.buffer(100_000);
        buffer[60_000] = 7;
        let mut block = pool.block(buffer, 40_000..100_000);
        assert_eq!((block.len(), block[20_000]), (60_000, 7));
        block[0] = 9;
        let buffer = block.into_buffer();
        assert_eq!((buffer.len(), buffer[40_000], buffer[60_000]), (100_000, 9, 7));
        let block = pool.block(buffer, 99_990..200_000);
        assert_eq!(block.len(), 10, "no more than there is");
        let buffer = block.into_buffer();
        assert!(pool.kept().buffers.is_empty());
        pool.give_back(buffer);
        assert_eq!(pool.buffer(90_000)[60_000], 7, "not cleared in between");
    }

    #[test]
    fn little_is_left_to_the_allocator() {
        let pool = Pool::default();
        drop((pool.copy(&[1; 4096]), pool.share(&[1; 4096]), Block::default()));
        assert!(pool.kept().buffers.is_empty());
    }
}
