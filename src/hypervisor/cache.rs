//! The secondary's copy of the primary's memory as of the last checkpoint (QEMU's RAM cache,
//! `migration/colo.c`, `colo_init_ram_cache`).
//!
//! ```text
//! stream ─▶ store ─▶ cache ── put: pages the primary changed ∪ pages the secondary's guest dirtied ──▶ guest
//! ```
//!
//! The trap: in COLO the secondary's guest runs and dirties pages the primary never touched. Loading only what
//! the primary sent would leave those behind; the cache is whole so that they can be put back.

use super::{Domain, DomainError};
use crate::page::{PAGE_SIZE, Pfn};

/// Pages that are allocated together.
const CHUNK_PAGES: u64 = 512;
const CHUNK_BYTES: usize = CHUNK_PAGES as usize * PAGE_SIZE;

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// A whole copy of a guest's memory, outside the guest. Memory the guest never had, such as the hole below 4 GiB
/// that a small Xen guest's page numbers span, costs nothing.
#[derive(Debug)]
pub struct RamCache {
    chunks: Vec<Option<Box<[u8]>>>,
    nr_pages: u64,
}

impl RamCache {
    /// A cache of zero pages. An error when the host cannot even hold its table.
    pub fn new(nr_pages: u64) -> Result<Self, DomainError> {
        let refuse = || DomainError::BadConfig(format!("cannot allocate a RAM cache of {nr_pages} pages"));
        let count = usize::try_from(nr_pages.div_ceil(CHUNK_PAGES)).map_err(|_| refuse())?;
        let mut chunks = Vec::new();
        chunks.try_reserve_exact(count).map_err(|_| refuse())?;
        chunks.resize_with(count, || None);
        Ok(Self { chunks, nr_pages })
    }

    /// Size in pages.
    #[must_use]
    pub fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// Replaces a page. Panics when `pfn` is out of range or `page` is not a page: the stream's reader checks.
    pub fn store(&mut self, pfn: Pfn, page: &[u8]) {
        let (chunk, at) = self.at(pfn);
        let chunk = self.chunks[chunk].get_or_insert_with(|| vec![0; CHUNK_BYTES].into_boxed_slice());
        chunk[at..at + PAGE_SIZE].copy_from_slice(page);
    }

    /// Makes a page zero.
    pub fn store_zero(&mut self, pfn: Pfn) {
        let (chunk, at) = self.at(pfn);
        if let Some(chunk) = &mut self.chunks[chunk] {
            chunk[at..at + PAGE_SIZE].fill(0);
        }
    }

    /// A page as of the last checkpoint.
    #[must_use]
    pub fn page(&self, pfn: Pfn) -> &[u8] {
        let (chunk, at) = self.at(pfn);
        self.chunks[chunk].as_ref().map_or(&ZERO_PAGE, |chunk| &chunk[at..at + PAGE_SIZE])
    }

    /// Writes these pages of the cache into the guest. They count as dirty there afterwards.
    pub fn put(&self, domain: &mut dyn Domain, pfns: &[Pfn]) -> Result<(), DomainError> {
        let mut bytes = Vec::with_capacity(pfns.len() * PAGE_SIZE);
        for pfn in pfns {
            bytes.extend_from_slice(self.page(*pfn));
        }
        domain.write_pages(pfns, &bytes)
    }

    /// The chunk a page is in, and where its bytes begin there.
    fn at(&self, pfn: Pfn) -> (usize, usize) {
        assert!(pfn.0 < self.nr_pages, "pfn {:#x} is outside a cache of {:#x} pages", pfn.0, self.nr_pages);
        ((pfn.0 / CHUNK_PAGES) as usize, (pfn.0 % CHUNK_PAGES) as usize * PAGE_SIZE)
    }
}
