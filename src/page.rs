//! Guest pages and their numbers.
//!
//! A guest's memory is counted in 4 KiB pages; a page's number is its *pfn*, Xen's word. A [`PageBatch`] is
//! pages copied out of a guest, in the order of their numbers in the batch.

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// Pages moved by one call or one stream record at most, libxc's own batch size (`MAX_BATCH_SIZE`).
pub const BATCH_PAGES: usize = 1024;

/// A guest page number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Pfn(pub u64);

/// Whether a page holds only zero bytes.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    // Sixteen words at a time: the compiler turns the fold into wide ORs, and a page that is not zero
    // usually says so in its first chunk.
    page.chunks(128).all(|chunk| chunk.iter().fold(0_u8, |acc, byte| acc | byte) == 0)
}

/// Pages copied out of a guest: `bytes` holds one page for each entry of `pfns`, in the same order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageBatch {
    /// Which pages.
    pub pfns: Vec<Pfn>,
    /// Their contents, `PAGE_SIZE` bytes each.
    pub bytes: Vec<u8>,
}

impl PageBatch {
    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pfns.len()
    }

    /// True when there is no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pfns.is_empty()
    }

    /// Forgets the pages and keeps the memory, so that the next capture does not fault it in again.
    pub fn clear(&mut self) {
        self.pfns.clear();
        self.bytes.clear();
    }

    /// Each page with its number.
    pub fn iter(&self) -> impl Iterator<Item = (Pfn, &[u8])> {
        self.pfns.iter().copied().zip(self.bytes.chunks_exact(PAGE_SIZE))
    }

    /// Appends one page. `page` must be `PAGE_SIZE` bytes.
    pub fn push(&mut self, pfn: Pfn, page: &[u8]) {
        assert_eq!(page.len(), PAGE_SIZE, "a page is {PAGE_SIZE} bytes");
        self.pfns.push(pfn);
        self.bytes.extend_from_slice(page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_byte_anywhere_makes_a_page_not_zero() {
        let mut page = [0_u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in [0, 1, 127, 128, 2048, PAGE_SIZE - 1] {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }

    #[test]
    fn a_batch_pairs_numbers_with_contents() {
        let mut batch = PageBatch::default();
        batch.push(Pfn(7), &[1; PAGE_SIZE]);
        batch.push(Pfn(3), &[2; PAGE_SIZE]);
        let seen: Vec<_> = batch.iter().map(|(pfn, page)| (pfn.0, page[0])).collect();
        assert_eq!(seen, [(7, 1), (3, 2)]);
        batch.clear();
        assert!(batch.is_empty());
    }
}
