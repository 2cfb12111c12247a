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

/// Overwrites four bytes of a TCP segment and makes its checksum follow. Does nothing when `at` is outside the segment.
/// `at` may be odd: options are aligned only by custom.
pub(super) fn tcp_replace(segment: &mut [u8], at: usize, value: u32) {
    if segment.len() >= 20 {
        replace(segment, 16, at, value);
    }
}

/// The same of a UDP datagram, where 0 says that there is no checksum (RFC 768).
pub(super) fn udp_replace(datagram: &mut [u8], at: usize, value: u32) {
    let Some([high, low]) = datagram.get(6..8) else { return };
    if [*high, *low] == [0; 2] {
        if let Some(word) = datagram.get_mut(at..at + 4) {
            word.copy_from_slice(&value.to_be_bytes());
        }
        return;
    }
    replace(datagram, 6, at, value);
    if datagram[6..8] == [0; 2] {
        datagram[6..8].fill(0xff);
    }
}

/// RFC 1624, equation 3.
fn replace(segment: &mut [u8], checksum_at: usize, at: usize, value: u32) {
    let words = at & !1..((at + 5) & !1).min(segment.len());
    if be32(segment, at).is_none() {
        return;
    }
    let removed = ones_sum(0, &segment[words.clone()]);
    segment[at..at + 4].copy_from_slice(&value.to_be_bytes());
    let added = ones_sum(0, &segment[words]);
    let old = u32::from(u16::from_be_bytes([segment[checksum_at], segment[checksum_at + 1]]));
    let mut sum = (!old & 0xffff) + (!removed & 0xffff) + added;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    segment[checksum_at..checksum_at + 2].copy_from_slice(&(!sum as u16).to_be_bytes());
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

        #[test]
        fn and_that_of_a_datagram_unless_it_has_none(
            mut datagram in prop::collection::vec(any::<u8>(), 8..64), at in 8_usize..70, value: u32, has: bool,
        ) {
            datagram[6..8].fill(0);
            let checksum = match !ones_sum(0, &datagram) as u16 { 0 => 0xffff, sum => sum };
            if has {
                datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
            }
            udp_replace(&mut datagram, at, value);
            prop_assert_eq!(datagram[6..8] != [0; 2], has);
            prop_assert!(!has || ones_sum(0, &datagram) == 0xffff);
            prop_assert!(at + 4 > datagram.len() || be32(&datagram, at) == Some(value));
        }
    }
}
