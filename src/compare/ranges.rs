//! A set of half-open ranges of stretched sequence numbers: what the network has been shown of a stream.
//!
//! A healthy stream is one range. The set is bounded by forgetting its lowest range, which is the safe direction:
//! what is forgotten must be explained again.

/// Ranges kept before the lowest is forgotten.
const MAX_RANGES: usize = 64;

/// Sorted, disjoint, non-adjacent, non-empty ranges.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Ranges(Vec<(i64, i64)>);

impl Ranges {
    /// Adds `start..end`.
    pub(super) fn insert(&mut self, start: i64, end: i64) {
        if start >= end {
            return;
        }
        // A stream that grows.
        if let Some(last) = self.0.last_mut()
            && last.0 <= start
            && start <= last.1
        {
            last.1 = last.1.max(end);
            return;
        }
        let first = self.0.partition_point(|range| range.1 < start);
        let last = self.0.partition_point(|range| range.0 <= end);
        let joined =
            self.0[first..last].iter().fold((start, end), |all, range| (all.0.min(range.0), all.1.max(range.1)));
        self.0.splice(first..last, [joined]);
        if self.0.len() > MAX_RANGES {
            self.0.remove(0);
        }
    }

    /// The end of the range that holds `at`, if one does.
    pub(super) fn end_of(&self, at: i64) -> Option<i64> {
        let next = self.0.partition_point(|range| range.1 <= at);
        self.0.get(next).filter(|range| range.0 <= at).map(|range| range.1)
    }

    /// The start of the first range after `at`.
    pub(super) fn next_start(&self, at: i64) -> Option<i64> {
        self.0.get(self.0.partition_point(|range| range.0 <= at)).map(|range| range.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_positions(inserts in prop::collection::vec((0_i64..100, 0_i64..20), 0..30)) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for (start, len) in inserts {
                ranges.insert(start, start + len);
                model.extend(start..start + len);
            }
            for at in 0..130 {
                prop_assert_eq!(ranges.end_of(at).is_some(), model.contains(&at));
                if let Some(end) = ranges.end_of(at) {
                    prop_assert!((at..end).all(|x| model.contains(&x)) && !model.contains(&end));
                }
            }
        }
    }

    #[test]
    fn holes_without_end_are_bounded_by_forgetting() {
        let mut ranges = Ranges::default();
        (0..10_000).for_each(|n| ranges.insert(n * 2, n * 2 + 1));
        assert_eq!(ranges.0.len(), MAX_RANGES);
        assert_eq!(ranges.end_of(0), None);
    }
}
