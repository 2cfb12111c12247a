//! Dirty bitmaps, in the hypervisor's own format: bit `n` of word `n / 64` is page `n`
//! (`XEN_DOMCTL_SHADOW_OP_CLEAN` fills exactly such words).

use crate::page::Pfn;

/// A set of page numbers below a fixed bound.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bitmap {
    words: Vec<u64>,
    bits: u64,
}

impl Bitmap {
    /// An empty set that can hold page numbers below `bits`.
    #[must_use]
    pub fn new(bits: u64) -> Self {
        let words = usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], bits }
    }

    /// One more than the largest number it can hold.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.bits
    }

    fn slot(&self, pfn: Pfn) -> (usize, u64) {
        assert!(pfn.0 < self.bits, "pfn {:#x} is outside a bitmap of {:#x} pages", pfn.0, self.bits);
        ((pfn.0 / 64) as usize, 1 << (pfn.0 % 64))
    }

    /// Adds a page. Panics when it is out of range: callers check numbers that came from a peer first.
    pub fn set(&mut self, pfn: Pfn) {
        let (word, bit) = self.slot(pfn);
        self.words[word] |= bit;
    }

    /// Removes a page.
    pub fn clear(&mut self, pfn: Pfn) {
        let (word, bit) = self.slot(pfn);
        self.words[word] &= !bit;
    }

    /// Whether the page is in the set.
    #[must_use]
    pub fn get(&self, pfn: Pfn) -> bool {
        let (word, bit) = self.slot(pfn);
        self.words[word] & bit != 0
    }

    /// Adds every page.
    pub fn set_all(&mut self) {
        self.words.fill(u64::MAX);
        if let (Some(last), used @ 1..) = (self.words.last_mut(), self.bits % 64) {
            *last = (1 << used) - 1;
        }
    }

    /// Removes every page.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds every page of `other`, which must have the same size.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.bits, other.bits, "bitmaps of one guest have one size");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// The words, for a hypervisor to add bits to. Bits beyond [`Self::bits`] must stay zero.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Adds the pages of a bitmap as the hypervisor fills it. Bits past the bound are not pages.
    pub fn union_words(&mut self, words: &[u64]) {
        for (mine, theirs) in self.words.iter_mut().zip(words) {
            *mine |= theirs;
        }
        if let (Some(last), used @ 1..) = (self.words.last_mut(), self.bits % 64) {
            *last &= (1 << used) - 1;
        }
    }

    /// Raises the bound to `bits`, and adds every page above the old one.
    pub fn grow(&mut self, bits: u64) {
        let mut larger = Self::new(bits.max(self.bits));
        larger.union_words(&self.words);
        (self.bits..larger.bits).for_each(|pfn| larger.set(Pfn(pfn)));
        *self = larger;
    }

    /// Moves every page into `into` and leaves this set empty: the CLEAN operation.
    pub fn drain_into(&mut self, into: &mut Self) {
        into.union(self);
        self.clear_all();
    }

    /// The first page of the set that is not before `from`.
    #[must_use]
    pub fn next(&self, from: Pfn) -> Option<Pfn> {
        let first = usize::try_from(from.0 / 64).ok()?;
        let words = self.words.get(first..)?.iter().enumerate();
        let mut words = words.map(|(at, word)| (at, if at == 0 { word & (u64::MAX << (from.0 % 64)) } else { *word }));
        let (at, word) = words.find(|(_, word)| *word != 0)?;
        Some(Pfn((first + at) as u64 * 64 + u64::from(word.trailing_zeros())))
    }

    /// The pages of the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.words.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(at, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    Pfn(at as u64 * 64 + bit)
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set(bits in 1_u64..300, ops in prop::collection::vec((0_u64..300, any::<bool>()), 0..200)) {
            let mut bitmap = Bitmap::new(bits);
            let mut model = BTreeSet::new();
            for (number, add) in ops {
                let pfn = Pfn(number % bits);
                if add { bitmap.set(pfn); model.insert(pfn); } else { bitmap.clear(pfn); model.remove(&pfn); }
                prop_assert_eq!(bitmap.get(pfn), add);
            }
            prop_assert_eq!(bitmap.count(), model.len() as u64);
            for from in 0..bits + 70 {
                prop_assert_eq!(bitmap.next(Pfn(from)), model.range(Pfn(from)..).next().copied());
            }
            prop_assert_eq!(bitmap.iter().collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn words_add_and_growing_adds(bits in 1_u64..300, words in prop::collection::vec(any::<u64>(), 0..6), by in 0_u64..200) {
            let mut bitmap = Bitmap::new(bits);
            bitmap.set(Pfn(0));
            bitmap.union_words(&words);
            let named = |pfn: u64| words.get((pfn / 64) as usize).is_some_and(|word| word >> (pfn % 64) & 1 == 1);
            let expected: Vec<_> = (0..bits).filter(|pfn| *pfn == 0 || named(*pfn)).collect();
            prop_assert_eq!(bitmap.iter().map(|pfn| pfn.0).collect::<Vec<_>>(), expected.clone());
            bitmap.grow(bits + by);
            let grown: Vec<_> = expected.into_iter().chain(bits..bits + by).collect();
            prop_assert_eq!(bitmap.iter().map(|pfn| pfn.0).collect::<Vec<_>>(), grown);
        }

        #[test]
        fn all_means_all_and_no_more(bits in 1_u64..300) {
            let mut bitmap = Bitmap::new(bits);
            bitmap.set_all();
            prop_assert_eq!(bitmap.count(), bits);
            let mut into = Bitmap::new(bits);
            bitmap.drain_into(&mut into);
            prop_assert_eq!((bitmap.count(), into.count()), (0, bits));
        }
    }
}
