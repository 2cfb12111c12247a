//! Finds a guest's pages without asking for every page number.
//!
//! ```text
//! 0 ── rising ──▶ │ nothing in a whole batch │ ...... hole, gigabytes of it ...... │ ◀── falling ── nr_gpfns
//! ```
//!
//! The numbers of an HVM or PVH guest end just below 4 GiB however small it is, with its special pages, and most of
//! them have nothing behind them. The hypervisor knows how many pages there are; when all are found, nobody asks on.
//!
//! The trap: that holds only while every page has one number. A page that the guest gets while it is being scanned is
//! not found, and is not meant to be: whoever scans a running guest has switched log-dirty on before.

use crate::page::BATCH_PAGES;
use std::ops::Range;

/// What is still to be asked for.
#[derive(Debug)]
pub struct Scan {
    left: Range<u64>,
    missing: u64,
    rising: bool,
}

impl Scan {
    /// Looks for `total_pages` pages with numbers below `nr_gpfns`.
    #[must_use]
    pub fn new(nr_gpfns: u64, total_pages: u64) -> Self {
        Self { left: 0..nr_gpfns, missing: total_pages, rising: true }
    }

    /// The numbers to ask for next, a batch at most; then say [`Scan::found`].
    pub fn next_batch(&mut self) -> Option<Range<u64>> {
        if self.missing == 0 || self.left.is_empty() {
            return None;
        }
        let batch = (BATCH_PAGES as u64).min(self.left.end - self.left.start);
        Some(if self.rising {
            let start = self.left.start;
            self.left.start += batch;
            start..self.left.start
        } else {
            self.left.end -= batch;
            self.left.end..self.left.end + batch
        })
    }

    /// So many numbers of the batch have pages.
    pub fn found(&mut self, pages: u64) {
        self.missing = self.missing.saturating_sub(pages);
        self.rising &= pages > 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// What is found of these pages, and in how many batches.
    fn scan(pages: &BTreeSet<u64>, nr_gpfns: u64, total: u64) -> (BTreeSet<u64>, usize) {
        let (mut scan, mut found, mut batches) = (Scan::new(nr_gpfns, total), BTreeSet::new(), 0);
        while let Some(batch) = scan.next_batch() {
            let here: Vec<_> = pages.range(batch).copied().collect();
            scan.found(here.len() as u64);
            found.extend(here);
            batches += 1;
        }
        (found, batches)
    }

    #[test]
    fn a_small_guest_takes_few_questions() {
        let pages: BTreeSet<u64> = (0..32_768).chain(0xf_eff8..0xf_f000).collect();
        assert_eq!(scan(&pages, 0xf_f000, pages.len() as u64), (pages.clone(), 32 + 1 + 1));
        let (found, batches) = scan(&pages, 0xf_f000, pages.len() as u64 + 1);
        assert_eq!((found, batches), (pages, 1020), "a page too many is looked for everywhere");
        assert_eq!(scan(&BTreeSet::new(), 5000, 0).1, 0);
    }

    proptest! {
        #[test]
        fn every_page_is_found(pages in prop::collection::btree_set(0_u64..20_000, 0..50), spare in 0_u64..3) {
            let total = pages.len() as u64 + spare;
            prop_assert_eq!(scan(&pages, 20_000, total).0, pages);
        }
    }
}
