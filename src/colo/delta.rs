//! Pages that changed a little since they were sent.
//!
//! ```text
//! primary    page ─┬─ not in SentPages ─▶ whole, and remembered
//!                  └─ in SentPages ─────▶ the runs of bytes that differ ─▶ secondary: its copy, patched
//! ```
//!
//! Most pages that a guest writes it writes again, and changes little of. The primary remembers what it sent of some
//! pages, in a bounded room; the secondary needs nothing more than it has, its copy of the last checkpoint (QEMU's
//! XBZRLE does the same, `docs/devel/migration/xbzrle.txt`; its format is another).
//!
//! A delta is `count u16`, then `count` times `offset u16, length u16, bytes`, little-endian.
//!
//! The trap: both sides must mean the same page. What the primary remembers is always the last thing it sent, in
//! whatever form; and a page is sent once in a checkpoint, so that the secondary's last checkpoint *is* the last thing.

use crate::page::{PAGE_SIZE, PageBatch, Pfn};
use bytes::BufMut;
use std::collections::HashMap;

/// Longest delta sent, in bytes: beyond it the page goes whole, which costs less to take apart.
pub const DELTA_MAX_BYTES: usize = PAGE_SIZE * 3 / 4;
/// Pages are compared in words of this many bytes. A run's head is half a word, so a gap of one word is worth a new run.
const WORD_BYTES: usize = 8;
/// Bytes of a count, an offset, a length.
const NUMBER_BYTES: usize = 2;

/// What the secondary has, as far as the primary remembers it. The least recently sent page makes room first,
/// nearly (the clock algorithm).
#[derive(Debug)]
pub struct SentPages {
    index: HashMap<Pfn, usize>,
    slots: Vec<Slot>,
    hand: usize,
    slots_max: usize,
}

#[derive(Debug)]
struct Slot {
    pfn: Pfn,
    /// Sent since the hand was here.
    used: bool,
    page: Box<[u8]>,
}

impl SentPages {
    /// Room for so many pages, which is taken when it is needed.
    #[must_use]
    pub fn new(pages_max: usize) -> Self {
        Self { index: HashMap::new(), slots: Vec::new(), hand: 0, slots_max: pages_max }
    }

    /// Appends what makes the secondary's copy of a page into `page`, and says true; or false, with nothing appended,
    /// when that copy is not remembered or the page changed too much. Then the page must be sent whole. Either way it
    /// counts as sent.
    pub fn delta(&mut self, pfn: Pfn, page: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(slot) = self.index.get(&pfn).and_then(|at| self.slots.get_mut(*at)) else {
            self.remember(pfn, page);
            return false;
        };
        let is_small = diff(&slot.page, page, out);
        slot.used = true;
        if !crate::mutant::active(crate::mutant::Mutant::StaleDelta) {
            slot.page.copy_from_slice(page);
        }
        is_small
    }

    /// The page was sent as a page of zeroes.
    pub fn zeroed(&mut self, pfn: Pfn) {
        if let Some(slot) = self.index.get(&pfn).and_then(|at| self.slots.get_mut(*at)) {
            slot.page.fill(0);
        }
    }

    fn remember(&mut self, pfn: Pfn, page: &[u8]) {
        if self.slots.len() < self.slots_max {
            self.index.insert(pfn, self.slots.len());
            self.slots.push(Slot { pfn, used: false, page: page.into() });
            return;
        }
        // Each slot is passed once at most before one is found that nobody used.
        for _ in 0..=self.slots.len() {
            let at = self.hand;
            let Some(slot) = self.slots.get_mut(at) else { return };
            self.hand = (at + 1) % self.slots_max;
            if !std::mem::take(&mut slot.used) {
                self.index.remove(&slot.pfn);
                self.index.insert(pfn, at);
                slot.pfn = pfn;
                slot.page.copy_from_slice(page);
                return;
            }
        }
    }
}

/// Appends the delta from `old` to `new`; false, and nothing appended, if it is longer than it may be.
fn diff(old: &[u8], new: &[u8], out: &mut Vec<u8>) -> bool {
    let begin = out.len();
    let (old, new) = (old.as_chunks::<WORD_BYTES>().0, new.as_chunks::<WORD_BYTES>().0);
    let (mut runs, mut at) = (0_u16, 0);
    out.put_u16_le(0);
    while let Some(first) = (at..new.len()).find(|word| old[*word] != new[*word]) {
        let end = (first..new.len()).find(|word| old[*word] == new[*word]).unwrap_or(new.len());
        let bytes = new[first..end].as_flattened();
        if out.len() - begin + 2 * NUMBER_BYTES + bytes.len() > DELTA_MAX_BYTES {
            out.truncate(begin);
            return false;
        }
        // A page's offsets and lengths are 13 bits.
        out.put_u16_le((first * WORD_BYTES) as u16);
        out.put_u16_le(bytes.len() as u16);
        out.put_slice(bytes);
        runs += 1;
        at = end;
    }
    out[begin..begin + NUMBER_BYTES].copy_from_slice(&runs.to_le_bytes());
    true
}

/// Deltas that arrived, and are known to fit their pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeltaBatch {
    /// Whose they are.
    pub pfns: Vec<Pfn>,
    deltas: Vec<u8>,
}

impl DeltaBatch {
    /// Checks that `deltas` holds one delta for each of `pfns` and that each stays within its page.
    pub(super) fn parse(pfns: Vec<Pfn>, deltas: &[u8]) -> Result<Self, &'static str> {
        let mut rest = deltas;
        for _ in &pfns {
            for _ in 0..take_number(&mut rest).ok_or("fewer deltas than pages")? {
                take_run(&mut rest).ok_or("a run outside its page, or cut short")?;
            }
        }
        if rest.is_empty() { Ok(Self { pfns, deltas: deltas.to_vec() }) } else { Err("longer than its deltas") }
    }

    /// The pages, made from what `base` has of them.
    #[must_use]
    pub fn apply<'a>(&self, base: impl Fn(Pfn) -> &'a [u8]) -> PageBatch {
        let mut batch = PageBatch { pfns: self.pfns.clone(), bytes: Vec::with_capacity(self.pfns.len() * PAGE_SIZE) };
        let mut rest = &self.deltas[..];
        for pfn in &self.pfns {
            let at = batch.bytes.len();
            batch.bytes.extend_from_slice(base(*pfn));
            for _ in 0..take_number(&mut rest).unwrap_or(0) {
                if let Some((offset, bytes)) = take_run(&mut rest) {
                    batch.bytes[at + offset..at + offset + bytes.len()].copy_from_slice(bytes);
                }
            }
        }
        batch
    }
}

fn take_number(from: &mut &[u8]) -> Option<usize> {
    let (number, rest) = from.split_first_chunk::<NUMBER_BYTES>()?;
    *from = rest;
    Some(u16::from_le_bytes(*number).into())
}

/// A run that stays within its page.
fn take_run<'a>(from: &mut &'a [u8]) -> Option<(usize, &'a [u8])> {
    let (offset, length) = (take_number(from)?, take_number(from)?);
    let (bytes, rest) = from.split_at_checked(length).filter(|_| offset + length <= PAGE_SIZE)?;
    *from = rest;
    Some((offset, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(changes: &[(usize, u8)]) -> Vec<u8> {
        let mut page = vec![7; PAGE_SIZE];
        for (at, byte) in changes {
            page[*at] = *byte;
        }
        page
    }

    #[test]
    fn a_page_goes_whole_first_and_as_its_difference_then() {
        let (mut sent, mut out) = (SentPages::new(4), Vec::new());
        assert!(!sent.delta(Pfn(3), &page(&[]), &mut out));
        assert!(out.is_empty());
        assert!(sent.delta(Pfn(3), &page(&[(17, 1)]), &mut out));
        assert_eq!(out, [1, 0, 16, 0, 8, 0, 7, 1, 7, 7, 7, 7, 7, 7]);
        out.clear();
        assert!(sent.delta(Pfn(3), &page(&[(17, 1)]), &mut out), "the same again");
        assert_eq!(out, [0, 0]);
        out.clear();
        sent.zeroed(Pfn(3));
        assert!(!sent.delta(Pfn(3), &page(&[]), &mut out), "every word differs from zero");
        assert!(out.is_empty());
    }

    #[test]
    fn the_room_is_bounded_and_what_is_sent_often_stays() {
        let (mut sent, mut out) = (SentPages::new(2), Vec::new());
        for pfn in [1, 2, 1, 3, 4, 5] {
            sent.delta(Pfn(pfn), &page(&[]), &mut out);
        }
        assert_eq!(sent.slots.len(), 2);
        assert!(sent.index.contains_key(&Pfn(5)));
        assert_eq!(sent.index.len(), 2);
        let mut none = SentPages::new(0);
        assert!(!none.delta(Pfn(1), &page(&[]), &mut out));
        assert!(!none.delta(Pfn(1), &page(&[]), &mut out));
    }

    #[test]
    fn deltas_that_do_not_fit_are_refused_by_name() {
        let parse = |deltas: &[u8]| DeltaBatch::parse(vec![Pfn(0)], deltas).map(|_| ());
        assert_eq!(parse(&[]), Err("fewer deltas than pages"));
        assert_eq!(parse(&[1, 0, 0xff, 0x0f, 2, 0, 1, 1]), Err("a run outside its page, or cut short"));
        assert_eq!(parse(&[1, 0, 0, 0, 2, 0, 1]), Err("a run outside its page, or cut short"));
        assert_eq!(parse(&[0, 0, 0]), Err("longer than its deltas"));
        assert_eq!(parse(&[1, 0, 0xff, 0x0f, 1, 0, 1]), Ok(()));
    }

    proptest! {
        #[test]
        fn what_is_made_from_a_delta_is_the_page(
            first in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..40),
            second in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..400),
        ) {
            let (old, new) = (page(&first), page(&second));
            let (mut sent, mut out) = (SentPages::new(1), Vec::new());
            sent.delta(Pfn(0), &old, &mut out);
            if sent.delta(Pfn(0), &new, &mut out) {
                prop_assert!(out.len() <= DELTA_MAX_BYTES);
                let batch = DeltaBatch::parse(vec![Pfn(0)], &out).unwrap().apply(|_| &old[..]);
                prop_assert_eq!(batch.bytes, new);
            } else {
                prop_assert!(out.is_empty());
            }
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(batch) = DeltaBatch::parse(vec![Pfn(0), Pfn(1)], &bytes) {
                prop_assert_eq!(batch.apply(|_| &[0; PAGE_SIZE]).bytes.len(), 2 * PAGE_SIZE);
            }
        }
    }
}
