//! The secondary's copy of the primary's memory as of the last checkpoint (QEMU's RAM cache,
//! `migration/colo.c`, `colo_init_ram_cache`).
//!
//! ```text
//! stream ─▶ store ─▶ cache ── put: pages the primary changed ∪ pages the secondary's guest dirtied ──▶ guest
//! ```
//!
//! The trap: in COLO the secondary's guest runs and dirties pages the primary never touched. Loading only what
//! the primary sent would leave those behind; the cache is whole so that they can be put back.

use super::embedded::ram::zeroed;
use super::{Domain, DomainError};
use crate::page::{PAGE_SIZE, Pfn};

/// A whole copy of a guest's memory, outside the guest.
#[derive(Debug)]
pub struct RamCache {
    bytes: Vec<u8>,
    nr_pages: u64,
}

impl RamCache {
    /// A cache of zero pages. An error when the host has not that much memory.
    pub fn new(nr_pages: u64) -> Result<Self, DomainError> {
        let refuse = || DomainError::BadConfig(format!("cannot allocate a RAM cache of {nr_pages} pages"));
        let len = usize::try_from(nr_pages).ok().and_then(|n| n.checked_mul(PAGE_SIZE)).ok_or_else(refuse)?;
        Ok(Self { bytes: zeroed(len).ok_or_else(refuse)?, nr_pages })
    }

    /// Size in pages.
    #[must_use]
    pub fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// Replaces a page. Panics when `pfn` is out of range or `page` is not a page: the stream's reader checks.
    pub fn store(&mut self, pfn: Pfn, page: &[u8]) {
        let at = self.at(pfn);
        self.bytes[at..at + PAGE_SIZE].copy_from_slice(page);
    }

    /// Makes a page zero.
    pub fn store_zero(&mut self, pfn: Pfn) {
        let at = self.at(pfn);
        self.bytes[at..at + PAGE_SIZE].fill(0);
    }

    /// A page as of the last checkpoint.
    #[must_use]
    pub fn page(&self, pfn: Pfn) -> &[u8] {
        let at = self.at(pfn);
        &self.bytes[at..at + PAGE_SIZE]
    }

    /// Writes these pages of the cache into the guest. They count as dirty there afterwards.
    pub fn put(&self, domain: &mut dyn Domain, pfns: &[Pfn]) -> Result<(), DomainError> {
        let mut bytes = Vec::with_capacity(pfns.len() * PAGE_SIZE);
        for pfn in pfns {
            bytes.extend_from_slice(self.page(*pfn));
        }
        domain.write_pages(pfns, &bytes)
    }

    fn at(&self, pfn: Pfn) -> usize {
        assert!(pfn.0 < self.nr_pages, "pfn {:#x} is outside a cache of {:#x} pages", pfn.0, self.nr_pages);
        pfn.0 as usize * PAGE_SIZE
    }
}
