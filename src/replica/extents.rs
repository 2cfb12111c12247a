//! A sparse layer over a disk: the ranges that were written, and their bytes.
//!
//! ```text
//!  disk    0 ─────────────────────────────────────────────▶ size
//!  layer        [ 1: memory ]      [ 2: memory ][ 3: spill ]        extents never overlap, split or merge
//!  write             ~~~~~~~~~~~~~~~~~~~~
//!                    in place │gap│ in place                        the gap becomes extent 4
//! ```
//!
//! A write goes in place where an extent is, and becomes a new extent in the gaps. So nothing is ever split, the
//! spill file holds no garbage, and a layer is never larger than the disk. New extents live in memory while the
//! [`Budget`] lasts and are appended to an unlinked spill file after that.
//!
//! The trap: the index costs memory even when the bytes are spilled, so each extent is charged
//! [`EXTENT_COST_BYTES`] whatever its length, and a quarter of the memory is kept for the index of what is spilled;
//! else a guest writing single sectors would eat the host.
//!
//! Source: the redo-log half of QEMU `docs/block-replication.txt` ("active disk", "hidden disk").

use crate::disk::{Disk, DiskError};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Longest extent; a longer write becomes several. It bounds one step of copying a layer down.
pub const MAX_EXTENT_BYTES: usize = 1 << 20;
/// What an extent's place in the index is charged, beside its bytes.
pub const EXTENT_COST_BYTES: u64 = 128;

/// Whoever reads what a layer does not cover: an offset and the bytes to fill.
pub type ReadBelow<'a> = dyn FnMut(u64, &mut [u8]) -> Result<(), DiskError> + 'a;
/// Whoever writes what a layer does not cover: an offset and the bytes.
pub type WriteBelow<'a> = dyn FnMut(u64, &[u8]) -> Result<(), DiskError> + 'a;

/// What all layers of a guest's replicas may use together.
#[derive(Debug)]
pub struct Budget {
    memory_limit_bytes: u64,
    spill_limit_bytes: u64,
    spill_dir: Option<PathBuf>,
    memory_bytes: AtomicU64,
    spill_bytes: AtomicU64,
}

impl Budget {
    /// `memory_limit_bytes` of memory, then `spill_limit_bytes` in files in `spill_dir`; without a directory,
    /// memory is all there is.
    #[must_use]
    pub fn new(memory_limit_bytes: u64, spill_dir: Option<PathBuf>, spill_limit_bytes: u64) -> Arc<Self> {
        let (memory_bytes, spill_bytes) = Default::default();
        Arc::new(Self { memory_limit_bytes, spill_limit_bytes, spill_dir, memory_bytes, spill_bytes })
    }

    /// Memory in use, the index included, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes.load(Relaxed)
    }

    /// Spill files' contents, in bytes.
    #[must_use]
    pub fn spill_bytes(&self) -> u64 {
        self.spill_bytes.load(Relaxed)
    }

    /// Takes `bytes` of a purse unless that exceeds its limit.
    fn take(purse: &AtomicU64, limit_bytes: u64, bytes: u64) -> bool {
        let sum = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit_bytes);
        purse.fetch_update(Relaxed, Relaxed, sum).is_ok()
    }
}

#[derive(Debug)]
enum Place {
    Memory(Box<[u8]>),
    Spill { at: u64 },
}

#[derive(Debug)]
struct Extent {
    len: usize,
    place: Place,
}

/// A piece of a range: what one extent covers, or what none does.
enum Piece {
    Extent { start: u64, range: Range<u64> },
    Gap(Range<u64>),
}

/// One layer.
#[derive(Debug)]
pub struct Overlay {
    extents: BTreeMap<u64, Extent>,
    bytes: u64,
    budget: Arc<Budget>,
    spill: Option<File>,
    spill_end: u64,
    /// What this layer took from the budget, to be given back.
    memory_taken: u64,
    spill_taken: u64,
}

impl Overlay {
    /// An empty layer. No file is made before the first byte is spilled.
    #[must_use]
    pub fn new(budget: &Arc<Budget>) -> Self {
        let budget = Arc::clone(budget);
        Self { extents: BTreeMap::new(), bytes: 0, budget, spill: None, spill_end: 0, memory_taken: 0, spill_taken: 0 }
    }

    /// Bytes covered.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// True when nothing is covered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// The covered ranges, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.extents.iter().map(|(start, extent)| *start..*start + extent.len as u64)
    }

    /// What of a range is covered: runs of (length, covered) from its beginning, at most `max` of them.
    #[must_use]
    pub fn runs(&self, offset: u64, len_bytes: u64, max: usize) -> Vec<(u64, bool)> {
        let (mut at, end) = (offset, offset + len_bytes);
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let before = self.extents.range(..offset).next_back();
        let inside = before.into_iter().chain(self.extents.range(offset..end));
        let borders = inside.flat_map(|(start, extent)| [(*start, false), (start + extent.len as u64, true)]);
        for (border, covered) in borders.chain([(end, false)]) {
            let len_bytes = border.min(end).saturating_sub(at);
            at += len_bytes;
            match runs.last_mut() {
                _ if len_bytes == 0 => {}
                Some(last) if last.1 == covered => last.0 += len_bytes,
                _ => runs.push((len_bytes, covered)),
            }
            if runs.len() > max {
                break;
            }
        }
        runs.truncate(max);
        runs
    }

    /// Writes `bytes` at `offset`. The caller has checked the range. On an error the range holds old and new
    /// bytes mixed, in whole pieces, and everything outside it is untouched.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        for piece in self.pieces(offset, bytes.len()) {
            match piece {
                Piece::Extent { start, range } => self.overwrite(start, range.start, part(bytes, offset, &range))?,
                Piece::Gap(range) => self.append(range.start, part(bytes, offset, &range))?,
            }
        }
        Ok(())
    }

    /// Writes only where the layer covers the range; each gap is handed to `below`.
    pub fn write_covered(&mut self, offset: u64, bytes: &[u8], below: &mut WriteBelow<'_>) -> Result<(), DiskError> {
        for piece in self.pieces(offset, bytes.len()) {
            match piece {
                Piece::Extent { start, range } => self.overwrite(start, range.start, part(bytes, offset, &range))?,
                Piece::Gap(range) => below(range.start, part(bytes, offset, &range))?,
            }
        }
        Ok(())
    }

    /// Fills `into` where the layer covers the range; each gap is handed to `below`.
    pub fn read(&self, offset: u64, into: &mut [u8], below: &mut ReadBelow<'_>) -> Result<(), DiskError> {
        for piece in self.pieces(offset, into.len()) {
            match piece {
                Piece::Extent { start, range } => {
                    let into = &mut into[(range.start - offset) as usize..(range.end - offset) as usize];
                    self.read_extent(&self.extents[&start], (range.start - start) as usize, into)?;
                }
                Piece::Gap(range) => {
                    below(range.start, &mut into[(range.start - offset) as usize..(range.end - offset) as usize])?;
                }
            }
        }
        Ok(())
    }

    /// Copies the first covered bytes, at most `max_bytes` and at least one extent, to `disk` and then forgets
    /// them; whoever reads through this layer to `disk` sees no difference. Returns how many, 0 when the layer is
    /// empty. On an error nothing is forgotten.
    pub fn move_first(&mut self, disk: &mut dyn Disk, max_bytes: usize) -> Result<usize, DiskError> {
        let Some((&start, _)) = self.extents.first_key_value() else { return Ok(0) };
        let mut run = Vec::new();
        let mut count = 0;
        for (at, extent) in &self.extents {
            let fits = run.is_empty() || run.len() + extent.len <= max_bytes.min(MAX_EXTENT_BYTES);
            if *at != start + run.len() as u64 || !fits {
                break;
            }
            let filled = run.len();
            run.resize(filled + extent.len, 0);
            self.read_extent(extent, 0, &mut run[filled..])?;
            count += 1;
        }
        disk.write(start, &run)?;
        for _ in 0..count {
            self.forget_first();
        }
        Ok(run.len())
    }

    /// Forgets the first extent and returns how many bytes that were, 0 when the layer is empty: a large layer is
    /// dropped in steps.
    pub fn forget_first(&mut self) -> usize {
        let Some((_, extent)) = self.extents.pop_first() else { return 0 };
        self.bytes -= extent.len as u64;
        let cost = EXTENT_COST_BYTES + if matches!(extent.place, Place::Memory(_)) { extent.len as u64 } else { 0 };
        self.memory_taken -= cost;
        self.budget.memory_bytes.fetch_sub(cost, Relaxed);
        extent.len
    }

    /// The pieces of a range, in order and without a hole.
    fn pieces(&self, offset: u64, len: usize) -> Vec<Piece> {
        let end = offset + len as u64;
        let mut pieces = Vec::new();
        let mut at = offset;
        let before = self.extents.range(..offset).next_back();
        for (&start, extent) in before.into_iter().chain(self.extents.range(offset..end)) {
            let covered = start.max(offset)..(start + extent.len as u64).min(end);
            if covered.is_empty() {
                continue;
            }
            if at < covered.start {
                pieces.push(Piece::Gap(at..covered.start));
            }
            at = covered.end;
            pieces.push(Piece::Extent { start, range: covered });
        }
        if at < end {
            pieces.push(Piece::Gap(at..end));
        }
        pieces
    }

    fn read_extent(&self, extent: &Extent, skip: usize, into: &mut [u8]) -> Result<(), DiskError> {
        match &extent.place {
            Place::Memory(bytes) => into.copy_from_slice(&bytes[skip..skip + into.len()]),
            Place::Spill { at } => {
                let file = self.spill.as_ref().expect("a spilled extent has a file");
                file.read_exact_at(into, at + skip as u64).map_err(|e| DiskError::io("read a spill file", e))?;
            }
        }
        Ok(())
    }

    fn overwrite(&mut self, start: u64, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let skip = (offset - start) as usize;
        let extent = self.extents.get_mut(&start).expect("a piece names an extent that exists");
        match &mut extent.place {
            Place::Memory(old) => old[skip..skip + bytes.len()].copy_from_slice(bytes),
            Place::Spill { at } => {
                let file = self.spill.as_ref().expect("a spilled extent has a file");
                file.write_all_at(bytes, *at + skip as u64).map_err(|e| DiskError::io("write a spill file", e))?;
            }
        }
        Ok(())
    }

    /// Makes new extents. `bytes` falls in a gap.
    fn append(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        for (index, bytes) in bytes.chunks(MAX_EXTENT_BYTES).enumerate() {
            let (len, budget) = (bytes.len() as u64, Arc::clone(&self.budget));
            let limit_bytes = budget.memory_limit_bytes;
            let whole_cost = EXTENT_COST_BYTES + len;
            let (cost, place) = if Budget::take(&budget.memory_bytes, limit_bytes - limit_bytes / 4, whole_cost) {
                (whole_cost, Place::Memory(bytes.into()))
            } else if Budget::take(&budget.memory_bytes, limit_bytes, EXTENT_COST_BYTES) {
                match self.spill(bytes) {
                    Ok(at) => (EXTENT_COST_BYTES, Place::Spill { at }),
                    Err(error) => {
                        budget.memory_bytes.fetch_sub(EXTENT_COST_BYTES, Relaxed);
                        return Err(error);
                    }
                }
            } else {
                return Err(no_space());
            };
            self.memory_taken += cost;
            self.bytes += len;
            self.extents.insert(offset + (index * MAX_EXTENT_BYTES) as u64, Extent { len: bytes.len(), place });
        }
        Ok(())
    }

    /// Appends to the spill file; its end moves only when every byte is there.
    fn spill(&mut self, bytes: &[u8]) -> Result<u64, DiskError> {
        let budget = &self.budget;
        let dir = budget.spill_dir.as_deref().ok_or_else(no_space)?;
        let len = bytes.len() as u64;
        if !Budget::take(&budget.spill_bytes, budget.spill_limit_bytes, len) {
            return Err(no_space());
        }
        self.spill_taken += len;
        let file = match &mut self.spill {
            Some(file) => file,
            none => none.insert(unlinked_file(dir)?),
        };
        file.write_all_at(bytes, self.spill_end).map_err(|e| DiskError::io("write a spill file", e))?;
        let at = self.spill_end;
        self.spill_end += len;
        Ok(at)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.budget.memory_bytes.fetch_sub(self.memory_taken, Relaxed);
        self.budget.spill_bytes.fetch_sub(self.spill_taken, Relaxed);
    }
}

fn no_space() -> DiskError {
    DiskError::NoSpace { what: "the replica's layers".into() }
}

/// The part of `bytes`, which lie at `offset`, that falls in `range`.
fn part<'a>(bytes: &'a [u8], offset: u64, range: &Range<u64>) -> &'a [u8] {
    &bytes[(range.start - offset) as usize..(range.end - offset) as usize]
}

/// A file that goes away with its last handle: a replica that crashes leaves nothing behind, and what it spilled
/// would mean nothing to the next one.
fn unlinked_file(dir: &Path) -> Result<File, DiskError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("xen-colo-{}-{}.spill", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let path = dir.join(name);
    let fail = |e| DiskError::io(format!("create {}", path.display()), e);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(fail)?;
    fs::remove_file(&path).map_err(fail)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn behaves_as_a_sparse_image(
            writes in prop::collection::vec((0..SIZE as u64, 0_usize..200, any::<u8>()), 0..40),
            memory_bytes in prop_oneof![Just(0_u64), Just(20_000), 8_000_u64..12_000],
        ) {
            let dir = tempfile::tempdir().unwrap();
            let budget = Budget::new(memory_bytes, Some(dir.path().into()), 400);
            let mut overlay = Overlay::new(&budget);
            let (mut model, mut covered) = (vec![0; SIZE], vec![false; SIZE]);
            for (offset, len, byte) in writes {
                let range = offset as usize..(offset as usize + len).min(SIZE);
                let result = overlay.write(offset, &vec![byte; range.len()]);
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
            prop_assert_eq!((budget.memory_bytes(), budget.spill_bytes()), (0, 0));
        }
    }

    #[test]
    fn a_long_write_becomes_several_extents_and_a_rewrite_makes_none() {
        let budget = Budget::new(1 << 30, None, 0);
        let mut overlay = Overlay::new(&budget);
        overlay.write(5, &vec![1; 2 * MAX_EXTENT_BYTES + 1]).unwrap();
        assert_eq!(overlay.ranges().count(), 3);
        let used = budget.memory_bytes();
        overlay.write(6, &vec![2; 2 * MAX_EXTENT_BYTES]).unwrap();
        assert_eq!((overlay.ranges().count(), budget.memory_bytes()), (3, used));
    }

    #[test]
    fn writing_covered_ranges_hands_the_gaps_down() {
        let mut overlay = Overlay::new(&Budget::new(1 << 20, None, 0));
        overlay.write(10, &[1; 10]).unwrap();
        let mut handed = Vec::new();
        let mut below = |offset: u64, bytes: &[u8]| {
            handed.push((offset, bytes.to_vec()));
            Ok(())
        };
        overlay.write_covered(8, &[9, 8, 7, 6], &mut below).unwrap();
        assert_eq!(handed, [(8, vec![9, 8])]);
        assert_eq!((whole(&overlay)[10..13].to_vec(), overlay.bytes()), (vec![7, 6, 1], 10));
    }

    #[test]
    fn the_spill_file_has_no_name_and_a_missing_directory_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut overlay = Overlay::new(&Budget::new(EXTENT_COST_BYTES, Some(dir.path().into()), 1 << 20));
        overlay.write(0, b"spilled").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(&whole(&overlay)[..7], b"spilled");
        assert!(matches!(overlay.write(100, b"x"), Err(DiskError::NoSpace { .. })), "no memory for its index");
        let mut lost = Overlay::new(&Budget::new(1000, Some(dir.path().join("gone")), 1 << 20));
        assert!(matches!(lost.write(0, &[1; 2000]), Err(DiskError::Io { .. })));
    }
}
