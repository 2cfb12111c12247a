//! A layer against a sparse image, and its costs.

use super::*;
use crate::disk::MemoryDisk;
use crate::mutant::{self, Mutant};
use crate::pool::Pool;
use proptest::prelude::*;
use std::fs;

const SIZE: usize = 512;

fn zeroes(_: u64, into: &mut [u8]) -> Result<(), DiskError> {
    into.fill(0);
    Ok(())
}

fn whole(overlay: &Overlay) -> Vec<u8> {
    let mut image = vec![0xff; SIZE];
    overlay.read(0, &mut image, &mut zeroes).unwrap();
    image
}

fn data(bytes: &[u8]) -> Content<'_> {
    Content::Data(bytes)
}

fn zeroed(len_bytes: u64) -> Content<'static> {
    Content::Zeroes { len_bytes, keep_allocated: false }
}

/// A byte to fill a range with, or `None` to zero it.
fn content() -> impl Strategy<Value = Option<u8>> {
    prop_oneof![3 => any::<u8>().prop_map(Some), 2 => Just(None)]
}

proptest! {
    #[test]
    fn behaves_as_a_sparse_image(
        writes in prop::collection::vec((0..SIZE as u64, 0_usize..200, content()), 0..40),
        memory_bytes in prop_oneof![Just(0_u64), Just(20_000), 8_000_u64..12_000],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let budget = Budget::new(memory_bytes, Some(dir.path().into()), 400);
        let mut overlay = Overlay::new(&budget);
        let (mut model, mut covered) = (vec![0; SIZE], vec![false; SIZE]);
        let pool = Pool::default();
        for (offset, len, byte) in writes {
            let range = offset as usize..(offset as usize + len).min(SIZE);
            let bytes = vec![byte.unwrap_or(0); range.len()];
            let zeroes = Content::Zeroes { len_bytes: range.len() as u64, keep_allocated: len % 2 == 0 };
            let mut block = pool.copy(&bytes);
            let result = match byte {
                Some(_) if len % 3 == 0 => overlay.write_block(offset, &mut block),
                Some(_) => overlay.write(offset, Content::Data(&bytes)),
                None => overlay.write(offset, zeroes),
            };
            prop_assert!(block[..] == bytes || block.is_empty() && result.is_ok());
            let byte = byte.unwrap_or(0);
            for (at, (model, covered)) in model.iter_mut().zip(&mut covered).enumerate() {
                // A refused write may have landed in part, but never outside its range.
                let now = whole(&overlay)[at];
                if range.contains(&at) && (result.is_ok() || now == byte) {
                    (*model, *covered) = (byte, overlay.ranges().any(|range| range.contains(&(at as u64))));
                    prop_assert!(*covered || result.is_err());
                }
                prop_assert_eq!(now, if *covered { *model } else { 0 });
                if !*covered { *model = 0; }
            }
            prop_assert!(budget.memory_bytes() <= memory_bytes && budget.spill_bytes() <= 400);
        }
        let runs = overlay.runs(7, SIZE as u64 - 9, usize::MAX);
        let told: Vec<_> = runs.iter().flat_map(|(len, covered)| vec![*covered; *len as usize]).collect();
        prop_assert_eq!(&told[..], &covered[7..SIZE - 2]);
        prop_assert!(runs.windows(2).all(|two| two[0].1 != two[1].1));
        prop_assert_eq!(&overlay.runs(7, SIZE as u64 - 9, 2)[..], &runs[..runs.len().min(2)]);
        prop_assert_eq!(overlay.bytes(), covered.iter().filter(|covered| **covered).count() as u64);
        prop_assert_eq!(overlay.bytes(), overlay.ranges().map(|range| range.end - range.start).sum::<u64>());

        let mut below = MemoryDisk::new(SIZE);
        while overlay.move_first(&mut below, 64).unwrap() > 0 {}
        prop_assert_eq!(below.bytes(), &model[..]);
        prop_assert!(overlay.is_empty() && overlay.bytes() == 0);
        drop(overlay);
        budget.trim(true);
        prop_assert_eq!((budget.memory_bytes(), budget.spill_bytes()), (0, 0));
    }
}

#[test]
fn a_long_write_becomes_several_extents_and_a_rewrite_makes_none() {
    let budget = Budget::new(1 << 30, None, 0);
    let mut overlay = Overlay::new(&budget);
    overlay.write(5, data(&vec![1; 2 * MAX_EXTENT_BYTES + 1])).unwrap();
    assert_eq!(overlay.ranges().count(), 3);
    let used = budget.memory_bytes();
    overlay.write(6, data(&vec![2; 2 * MAX_EXTENT_BYTES])).unwrap();
    assert_eq!((overlay.ranges().count(), budget.memory_bytes()), (3, used));
}

#[test]
fn a_block_is_kept_where_nothing_or_just_as_much_was_and_copied_where_something_else_is() {
    let budget = Budget::new(2 << 20, None, 0);
    let mut overlay = Overlay::new(&budget);
    let pool = Pool::default();
    let mut block = pool.copy(&[1; MAX_EXTENT_BYTES]);
    let at = block.as_ptr();
    overlay.write_block(0, &mut block).unwrap();
    let Place::Memory(kept) = &overlay.extents[&0].place else { panic!("not in memory") };
    assert!(block.is_empty() && kept.as_ptr() == at);
    assert_eq!(budget.memory_bytes(), EXTENT_COST_BYTES + MAX_EXTENT_BYTES as u64, "charged as any");
    let mut again = pool.copy(&[2; MAX_EXTENT_BYTES]);
    overlay.write_block(4096, &mut again).unwrap();
    assert_eq!((again.len(), overlay.ranges().count()), (MAX_EXTENT_BYTES, 2));
    let (used_bytes, mut over) = (budget.memory_bytes(), pool.copy(&[3; MAX_EXTENT_BYTES]));
    let at = over.as_ptr();
    overlay.write_block(0, &mut over).unwrap();
    let Place::Memory(kept) = &overlay.extents[&0].place else { panic!("not in memory") };
    assert!(over.is_empty() && kept.as_ptr() == at && kept.iter().all(|byte| *byte == 3));
    assert_eq!((budget.memory_bytes(), overlay.bytes()), (used_bytes, MAX_EXTENT_BYTES as u64 + 4096));
    let mut short = pool.copy(&[4; 4096]);
    overlay.write_block(0, &mut short).unwrap();
    let mut image = [0; 8192];
    overlay.read(0, &mut image, &mut zeroes).unwrap();
    assert_eq!((short.len(), &image[4095..4097]), (4096, &[4, 3][..]), "a part, in place");
    let mut long = pool.copy(&vec![3; MAX_EXTENT_BYTES + 1]);
    overlay.write_block(8 << 20, &mut long).unwrap_err();
    assert_eq!(long.len(), MAX_EXTENT_BYTES + 1, "no room, and it is the caller's still");
}

#[test]
fn writing_covered_ranges_hands_the_gaps_down() {
    let mut overlay = Overlay::new(&Budget::new(1 << 20, None, 0));
    overlay.write(10, data(&[1; 10])).unwrap();
    let mut handed = Vec::new();
    let mut below = |offset: u64, content: Content<'_>| {
        let Content::Data(bytes) = content else { panic!("{content:?}") };
        handed.push((offset, bytes.to_vec()));
        Ok(())
    };
    overlay.write_covered(8, data(&[9, 8, 7, 6]), &mut below).unwrap();
    assert_eq!(handed, [(8, vec![9, 8])]);
    assert_eq!((whole(&overlay)[10..13].to_vec(), overlay.bytes()), (vec![7, 6, 1], 10));
}

#[test]
fn the_spill_file_has_no_name_and_a_missing_directory_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut overlay = Overlay::new(&Budget::new(EXTENT_COST_BYTES, Some(dir.path().into()), 1 << 20));
    overlay.write(0, data(b"spilled")).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(&whole(&overlay)[..7], b"spilled");
    assert!(matches!(overlay.write(100, data(b"x")), Err(DiskError::NoSpace { .. })), "no memory for its index");
    let mut lost = Overlay::new(&Budget::new(1000, Some(dir.path().join("gone")), 1 << 20));
    assert!(matches!(lost.write(0, data(&[1; 2000])), Err(DiskError::Io { .. })));
}

#[test]
fn a_spill_file_is_written_over_by_the_next_layer_and_goes_where_room_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    // Of this, an extent of 300 bytes finds no room beside the index.
    let budget = Budget::new(4 * EXTENT_COST_BYTES, Some(dir.path().into()), 1000);
    let spilled = |len: usize| {
        let mut overlay = Overlay::new(&budget);
        overlay.write(0, data(&vec![len as u8; len])).map(|()| overlay)
    };
    let (first, second) = (spilled(400).unwrap(), spilled(300).unwrap());
    assert_eq!(budget.spill_bytes(), 700);
    drop(first);
    let third = spilled(350).unwrap();
    assert_eq!(budget.spill_bytes(), 700, "in the file of the first one");
    assert!(whole(&third)[..350] == [94; 350] && whole(&third)[350..] == [0; 162]);
    assert!(matches!(spilled(450), Err(DiskError::NoSpace { .. })), "all files are in use");
    drop(second);
    let mut fourth = spilled(450).unwrap();
    assert_eq!(budget.spill_bytes(), 850, "what the file is longer now");
    drop(third);
    fourth.write(1000, data(&[1; 500])).unwrap();
    assert_eq!(budget.spill_bytes(), 950, "the spare one made room");
    drop(fourth);
    budget.trim(false);
    assert_eq!(budget.spill_bytes(), 950, "for the next epoch");
    budget.trim(true);
    assert_eq!((budget.spill_bytes(), budget.memory_bytes()), (0, 0));
}

/// Lent room is filled after something else has happened; what is wrong then, if anything is.
fn space_after(what: &str) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    // No data finds room in memory that is as long as the test's.
    let budget = Budget::new(4 * EXTENT_COST_BYTES, Some(dir.path().into()), 2000);
    let (mut layer, mut next) = (Overlay::new(&budget), Overlay::new(&budget));
    let space = layer.lend_space(0, 300).unwrap();
    assert!(layer.is_empty() && whole(&layer) == [0; SIZE], "nothing is there before it is filled");
    let mut expected = [0; SIZE];
    match what {
        "the layer was sealed" => {
            next.write(100, data(&[2; 300])).unwrap();
            expected[100..400].fill(2);
            space.write(&[1; 300]).unwrap();
            next.forget_first();
            expected.fill(0);
            layer = next;
        }
        "somebody else wrote there" => {
            layer.write(100, data(&[2; 300])).unwrap();
            expected[100..400].fill(2);
            space.write(&[1; 300]).unwrap();
        }
        "the layer is gone" => {
            drop(layer);
            next.write(0, data(&[2; 300])).unwrap();
            expected[..300].fill(2);
            space.write(&[1; 300]).unwrap();
            layer = next;
        }
        _ => {
            space.write(&[1; 300]).unwrap();
            expected[..300].fill(1);
        }
    }
    let is_taken = layer.end_space(&space, true);
    let came: Vec<u8> = whole(&layer);
    let at = came.iter().zip(&expected).position(|(is, wanted)| is != wanted);
    if is_taken == what.starts_with("nothing") && at.is_none() {
        drop((layer, space));
        budget.trim(true);
        assert_eq!((budget.memory_bytes(), budget.spill_bytes()), (0, 0));
        Ok(())
    } else {
        Err(format!("{what}: taken {is_taken}, differs from byte {at:?} on"))
    }
}

#[test]
fn lent_room_is_good_for_its_layer_and_for_a_gap_in_it() {
    for (what, bug) in [
        ("the layer was sealed", Some(Mutant::TakeStrangersSpace)),
        ("somebody else wrote there", Some(Mutant::OvertakeWrite)),
        ("the layer is gone", Some(Mutant::ReuseLentFile)),
        ("nothing else", None),
    ] {
        assert_eq!(space_after(what), Ok(()));
        mutant::plant(bug);
        let outcome = space_after(what);
        mutant::plant(None);
        assert_eq!(outcome.is_err(), bug.is_some(), "{what}: {outcome:?}");
    }
}

#[test]
fn room_is_lent_only_for_what_would_wait_for_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let budget = Budget::new(8 * EXTENT_COST_BYTES, Some(dir.path().into()), 2200);
    let mut layer = Overlay::new(&budget);
    assert!(layer.lend_space(0, 100).is_none(), "there is memory");
    assert!(layer.lend_space(0, MAX_EXTENT_BYTES + 1).is_none(), "it would be several extents");
    assert!(layer.lend_space(0, 2201).is_none(), "there is no room");
    let (first, second) = (layer.lend_space(0, 700).unwrap(), layer.lend_space(800, 600).unwrap());
    assert!(layer.lend_space(2000, 1000).is_none(), "what is lent is charged");
    second.write(&[2; 600]).unwrap();
    assert!(layer.end_space(&second, true) && !layer.end_space(&first, false));
    assert_eq!(budget.memory_bytes(), EXTENT_COST_BYTES, "what was not filled has no place in the index");
    assert!(layer.lend_space(100, 701).is_none(), "a part is there");
    let mut none = Overlay::new(&Budget::new(8 * EXTENT_COST_BYTES, None, 0));
    assert!(none.lend_space(0, 1000).is_none(), "there is no file");
}

#[test]
fn zeroes_cost_an_entry_and_free_what_they_cover() {
    let budget = Budget::new(1 << 20, None, 0);
    let mut overlay = Overlay::new(&budget);
    overlay.write(0, zeroed(1 << 40)).unwrap_err();
    assert_eq!(budget.memory_bytes(), 1 << 20, "the index is bounded too");
    drop(overlay);
    let mut overlay = Overlay::new(&budget);
    overlay.write(100, data(&[1; 1000])).unwrap();
    overlay.write(0, zeroed(1 << 30)).unwrap();
    let entries = (1 << 30) / MAX_ZEROES_BYTES + 2;
    assert_eq!((overlay.bytes(), budget.memory_bytes()), (1 << 30, entries * EXTENT_COST_BYTES));
    overlay.write(5 << 20, data(&[7; 10])).unwrap();
    assert_eq!(budget.memory_bytes(), (entries + 2) * EXTENT_COST_BYTES + 10);
    assert_eq!(overlay.runs(0, 2 << 30, 9), [(1 << 30, true), (1 << 30, false)]);
    let described = overlay.describe((5 << 20) - 1, 12);
    let zero = |len_bytes| (len_bytes, Some(Described { len_bytes, hole: true, zero: true }));
    assert_eq!(described, [zero(1), (10, Some(Described::data(10))), zero(1)]);
}

#[test]
fn data_over_zeroes_needs_no_room_where_the_zeroes_can_be_handed_down() {
    let mut overlay = Overlay::new(&Budget::new(EXTENT_COST_BYTES, None, 0));
    overlay.write(10, zeroed(100)).unwrap();
    assert!(matches!(overlay.write(20, data(&[1; 5])), Err(DiskError::NoSpace { .. })));
    assert_eq!(overlay.runs(0, 200, 9), [(10, false), (100, true), (90, false)], "refused whole");
    let mut below = MemoryDisk::new(200);
    below.write(0, &[9; 200]).unwrap();
    overlay.write_covered(20, data(&[1; 5]), &mut |offset, content| content.write_to(&mut below, offset)).unwrap();
    let expected = [&[9; 10][..], &[0; 10], &[1; 5], &[0; 85], &[9; 90]].concat();
    assert_eq!((below.bytes(), overlay.is_empty()), (&expected[..], true));
}
