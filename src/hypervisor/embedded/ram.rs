//! Guest memory: pages and the log of which were written.
//!
//! ```text
//! logdirty(off) ── logdirty(on): log emptied ──▶ write sets a bit ── take_dirty: bits move out ──▶ ...
//! ```
//!
//! A write that changes nothing does not dirty its page: an idle connection that is looked at and stored back
//! costs no checkpoint traffic. Pages put in place from outside (`write_pages`) always count, as under Xen.
//!
//! The trap: pause time is spent here. Runs of consecutive pages are copied in one go.

use crate::bitmap::Bitmap;
use crate::hypervisor::DomainError;
use crate::page::{PAGE_SIZE, Pfn};

/// The pages of a guest, with a dirty log.
#[derive(Debug, Clone)]
pub struct Ram {
    bytes: Vec<u8>,
    dirty: Bitmap,
    logging: bool,
}

impl Ram {
    /// `nr_pages` pages of zeroes, dirty log off. An error when the host has not that much memory.
    pub fn new(nr_pages: u64) -> Result<Self, DomainError> {
        let refuse = || DomainError::BadConfig(format!("cannot allocate {nr_pages} pages of guest memory"));
        let len = usize::try_from(nr_pages).ok().and_then(|n| n.checked_mul(PAGE_SIZE)).ok_or_else(refuse)?;
        Ok(Self { bytes: zeroed(len).ok_or_else(refuse)?, dirty: Bitmap::new(nr_pages), logging: false })
    }

    /// Size in pages.
    #[must_use]
    pub fn nr_pages(&self) -> u64 {
        self.dirty.bits()
    }

    /// The `len` bytes at byte address `at`. Panics outside the memory: addresses come from the layout.
    #[must_use]
    pub fn read(&self, at: usize, len: usize) -> &[u8] {
        &self.bytes[at..at + len]
    }

    /// Stores `bytes` at byte address `at`; the pages count as dirty only if something changed.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let into = &mut self.bytes[at..at + bytes.len()];
        if into != bytes {
            into.copy_from_slice(bytes);
            self.mark(at, bytes.len());
        }
    }

    /// The byte at `at`.
    #[must_use]
    pub fn read_u8(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    /// The little-endian 16-bit number at `at`.
    #[must_use]
    pub fn read_u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    /// The little-endian 32-bit number at `at`.
    #[must_use]
    pub fn read_u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// The little-endian 64-bit number at `at`.
    #[must_use]
    pub fn read_u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    /// Stores a byte.
    pub fn write_u8(&mut self, at: usize, value: u8) {
        self.write(at, &[value]);
    }

    /// Stores a 16-bit number, little-endian.
    pub fn write_u16(&mut self, at: usize, value: u16) {
        self.write(at, &value.to_le_bytes());
    }

    /// Stores a 32-bit number, little-endian.
    pub fn write_u32(&mut self, at: usize, value: u32) {
        self.write(at, &value.to_le_bytes());
    }

    /// Stores a 64-bit number, little-endian.
    pub fn write_u64(&mut self, at: usize, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    /// Switches dirty logging; on starts from an empty log.
    pub fn logdirty(&mut self, on: bool) {
        self.logging = on;
        self.dirty.clear_all();
    }

    /// Moves the log into `into`, which must be of this memory's size.
    pub fn take_dirty(&mut self, into: &mut Bitmap) {
        self.dirty.drain_into(into);
    }

    /// Appends the contents of `pfns` to `into`, in order.
    pub fn read_pages(&self, pfns: &[Pfn], into: &mut Vec<u8>) -> Result<(), DomainError> {
        self.check(pfns)?;
        into.reserve(pfns.len() * PAGE_SIZE);
        for run in runs(pfns) {
            into.extend_from_slice(self.read(run[0].0 as usize * PAGE_SIZE, run.len() * PAGE_SIZE));
        }
        Ok(())
    }

    /// Overwrites `pfns` with `bytes`, one page each, and counts them as dirty.
    pub fn write_pages(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Result<(), DomainError> {
        assert_eq!(bytes.len(), pfns.len() * PAGE_SIZE, "one page of bytes for each page number");
        self.check(pfns)?;
        let mut rest = bytes;
        for run in runs(pfns) {
            let (now, later) = rest.split_at(run.len() * PAGE_SIZE);
            let at = run[0].0 as usize * PAGE_SIZE;
            self.bytes[at..at + now.len()].copy_from_slice(now);
            self.mark(at, now.len());
            rest = later;
        }
        Ok(())
    }

    fn check(&self, pfns: &[Pfn]) -> Result<(), DomainError> {
        let nr_pages = self.nr_pages();
        match pfns.iter().find(|pfn| pfn.0 >= nr_pages) {
            Some(pfn) => Err(DomainError::NoSuchPage { pfn: pfn.0, nr_pages }),
            None => Ok(()),
        }
    }

    fn mark(&mut self, at: usize, len: usize) {
        if self.logging && len > 0 {
            for page in at / PAGE_SIZE..=(at + len - 1) / PAGE_SIZE {
                self.dirty.set(Pfn(page as u64));
            }
        }
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(self.read(at, N));
        array
    }
}

/// `len` zero bytes, or nothing when the host has not that much memory.
fn zeroed(len: usize) -> Option<Vec<u8>> {
    // Asking first turns an abort into an error; `vec!` then gets pages the host zeroes only when they are touched.
    Vec::<u8>::new().try_reserve_exact(len).ok()?;
    Some(vec![0; len])
}

/// Splits page numbers into runs of consecutive ones.
fn runs(pfns: &[Pfn]) -> impl Iterator<Item = &[Pfn]> {
    pfns.chunk_by(|a, b| a.0 + 1 == b.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(ram: &mut Ram) -> Vec<u64> {
        let mut into = Bitmap::new(ram.nr_pages());
        ram.take_dirty(&mut into);
        into.iter().map(|pfn| pfn.0).collect()
    }

    #[test]
    fn the_log_holds_what_changed_and_only_while_it_is_on() {
        let mut ram = Ram::new(8).unwrap();
        ram.write_u64(0, 1);
        assert_eq!(dirty(&mut ram), [] as [u64; 0], "the log is off");
        ram.logdirty(true);
        ram.write_u64(0, 1);
        assert_eq!(dirty(&mut ram), [] as [u64; 0], "nothing changed");
        ram.write_u32(2 * PAGE_SIZE - 2, 0x0102_0304);
        ram.write_u8(5 * PAGE_SIZE, 1);
        ram.write_u16(7 * PAGE_SIZE, 0x0506);
        assert_eq!(dirty(&mut ram), [1, 2, 5, 7]);
        assert_eq!(dirty(&mut ram), [] as [u64; 0], "taken once");
        assert_eq!(
            (ram.read_u32(2 * PAGE_SIZE - 2), ram.read_u16(7 * PAGE_SIZE), ram.read_u64(0)),
            (0x0102_0304, 0x0506, 1)
        );
        assert_eq!(ram.read_u8(5 * PAGE_SIZE), 1);
    }

    #[test]
    fn bulk_copies_keep_order_and_refuse_unknown_pages_whole() {
        let mut ram = Ram::new(8).unwrap();
        ram.logdirty(true);
        let pfns = [Pfn(5), Pfn(1), Pfn(2), Pfn(3)];
        let bytes: Vec<u8> = (0..4_u8).flat_map(|n| vec![n + 1; PAGE_SIZE]).collect();
        ram.write_pages(&pfns, &bytes).unwrap();
        assert_eq!(dirty(&mut ram), [1, 2, 3, 5]);
        assert_eq!((ram.read_u8(5 * PAGE_SIZE), ram.read_u8(PAGE_SIZE), ram.read_u8(3 * PAGE_SIZE)), (1, 2, 4));
        let mut back = vec![9];
        ram.read_pages(&pfns, &mut back).unwrap();
        assert_eq!((back[0], &back[1..]), (9, &bytes[..]));
        let refused = ram.write_pages(&[Pfn(0), Pfn(8)], &[7; 2 * PAGE_SIZE]).unwrap_err();
        assert!(matches!(refused, DomainError::NoSuchPage { pfn: 8, nr_pages: 8 }));
        assert_eq!(ram.read_u8(0), 0, "nothing of a refused write happened");
        assert!(ram.read_pages(&[Pfn(u64::MAX)], &mut back).is_err());
    }

    #[test]
    fn memory_the_host_does_not_have_is_an_error() {
        for nr_pages in [u64::MAX, u64::MAX / 8192] {
            assert!(matches!(Ram::new(nr_pages), Err(DomainError::BadConfig(_))));
        }
    }
}
