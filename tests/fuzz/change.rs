//! What becomes of an input: bytes flipped, numbers put at their limits, parts dropped, doubled, and joined to others.

use crate::sim::dice::Dice;

/// Longest input made.
const INPUT_MAX_BYTES: usize = 1 << 20;
/// Numbers where something changes.
const LIMITS: [u64; 14] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    4095,
    4096,
    32 << 20,
    (32 << 20) + 1,
    0x7fff_ffff,
    0xffff_ffff,
    i64::MAX as u64,
    u64::MAX,
];

/// A changed input of the corpus.
pub(super) fn change(corpus: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let one = |dice: &mut Dice| corpus[dice.below(corpus.len() as u64) as usize].clone();
    let mut input = one(dice);
    for _ in 0..=dice.below(6) {
        let at = dice.below(input.len() as u64) as usize;
        match dice.below(9) {
            0 if !input.is_empty() => input[at] ^= 1 << dice.below(8),
            1 if !input.is_empty() => input[at] = dice.next() as u8,
            2 | 3 => put_number(&mut input, at, dice),
            4 => input.truncate(at),
            5 => _ = input.drain(at..(at + 1 + dice.below(16) as usize).min(input.len())),
            6 => {
                let bytes: Vec<u8> = (0..=dice.below(16)).map(|_| dice.next() as u8).collect();
                input.splice(at..at, bytes);
            }
            7 => {
                // A part said twice.
                let end = (at + 1 + dice.below(64) as usize).min(input.len());
                let part = input[at..end].to_vec();
                input.splice(end..end, part);
            }
            _ => {
                let other = one(dice);
                let from = dice.below(other.len() as u64) as usize;
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
        input.truncate(INPUT_MAX_BYTES);
    }
    input
}

/// A limit, or a neighbour of what stands there, in either order of bytes.
fn put_number(input: &mut [u8], at: usize, dice: &mut Dice) {
    let width = dice.pick(&[2_usize, 4, 8]);
    let Some(place) = input.get_mut(at..at + width) else { return };
    let big = dice.percent(50);
    let number = if dice.percent(70) {
        dice.pick(&LIMITS).wrapping_add(dice.pick(&[0, 1, u64::MAX]))
    } else {
        let there = place.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
        there.wrapping_add(dice.pick(&[1, u64::MAX]))
    };
    let bytes = if big { number.to_be_bytes()[8 - width..].to_vec() } else { number.to_le_bytes()[..width].to_vec() };
    place.copy_from_slice(&bytes);
}

/// Where an input of `len` bytes is cut: from 0 to its end, in order.
pub(super) fn cuts(len: usize, dice: &mut Dice) -> Vec<usize> {
    let pieces = if len <= 4096 && dice.percent(20) { len as u64 } else { dice.below(12) };
    let mut cuts: Vec<usize> = (0..pieces).map(|_| dice.below(len as u64 + 1) as usize).collect();
    cuts.extend([0, len]);
    cuts.sort_unstable();
    cuts
}
