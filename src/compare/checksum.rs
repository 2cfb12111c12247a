//! Checksums that follow a change. Source: RFC 1624.

use super::packet::be32;

/// The ones'-complement sum of some bytes, added to `sum`: `bytes` start at an even offset of what is summed.
pub(super) fn ones_sum(sum: u32, bytes: &[u8]) -> u32 {
    let mut sum = u64::from(sum);
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u32
}

/// Overwrites four bytes of a TCP segment and makes its checksum follow (RFC 1624, equation 3). Does nothing when
/// `at` is outside the segment. `at` may be odd: options are aligned only by custom.
pub(super) fn tcp_replace(segment: &mut [u8], at: usize, value: u32) {
    const CHECKSUM_AT: usize = 16;
    let words = at & !1..((at + 5) & !1).min(segment.len());
    if be32(segment, at).is_none() || segment.len() < 20 {
        return;
    }
    let removed = ones_sum(0, &segment[words.clone()]);
    segment[at..at + 4].copy_from_slice(&value.to_be_bytes());
    let added = ones_sum(0, &segment[words]);
    let old = u32::from(u16::from_be_bytes([segment[CHECKSUM_AT], segment[CHECKSUM_AT + 1]]));
    let mut sum = (!old & 0xffff) + (!removed & 0xffff) + added;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    segment[CHECKSUM_AT..CHECKSUM_AT + 2].copy_from_slice(&(!sum as u16).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_replaced_word_keeps_the_checksum_right(
            mut segment in prop::collection::vec(any::<u8>(), 20..64), at in 18_usize..70, value: u32,
        ) {
            segment[16..18].fill(0);
            let checksum = !ones_sum(0, &segment) as u16;
            segment[16..18].copy_from_slice(&checksum.to_be_bytes());
            tcp_replace(&mut segment, at, value);
            prop_assert_eq!(ones_sum(0, &segment), 0xffff);
        }
    }
}
