//! A sparse layer over a disk: the ranges that were written, and their bytes.
//!
//! ```text
//!  disk    0 ─────────────────────────────────────────────▶ size
//!  layer        [ 1: memory ]      [ 2: memory ][ 3: spill ]        extents never overlap, split or merge
//!  write             ~~~~~~~~~~~~~~~~~~~~
//!                    in place │gap│ in place                        the gap becomes extent 4
//! ```
//!
//! A write goes in place where an extent is, and becomes a new extent in the gaps; a block that is all of one takes its
//! place. So no data is ever split, the spill file holds no garbage but room that was lent in vain, and a layer is never larger
//! than the disk. New
//! extents live in memory while the [`Budget`] lasts and are appended to an unlinked spill file after that. What is copied
//! down is a [`Run`], what is appended a [`Space`]: each needs the layer at its beginning and at its end only.
//!
//! Zeroes are extents without bytes: a guest that discards its whole disk fills no memory here, and what is copied down
//! is a hole. Only they are split, by data that is written into them.
//!
//! The trap: the index costs memory even when the bytes are spilled, so each extent is charged
//! [`EXTENT_COST_BYTES`] whatever its length, and a quarter of the memory is kept for the index of what is spilled;
//! else a guest writing single sectors would eat the host.
//!
//! Source: the redo-log half of QEMU `docs/block-replication.txt` ("active disk", "hidden disk").

mod budget;
mod run;
mod space;
#[cfg(test)]
mod tests;

pub use self::budget::Budget;
pub use self::run::Run;
pub use self::space::Space;

use self::budget::{SpillFile, no_space};
use crate::disk::{Disk, DiskError, Extent as Described, Zeroing};
use crate::pool::Block;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Longest extent; a longer write becomes several. It bounds one step of copying a layer down.
pub const MAX_EXTENT_BYTES: usize = 1 << 20;
/// Longest extent of zeroes: where the disk below writes them by hand, one step of copying a layer down writes so many.
pub const MAX_ZEROES_BYTES: u64 = 32 << 20;
/// What an extent's place in the index is charged, beside its bytes.
pub const EXTENT_COST_BYTES: u64 = 128;

/// Whoever reads what a layer does not cover: an offset and the bytes to fill.
pub type ReadBelow<'a> = dyn FnMut(u64, &mut [u8]) -> Result<(), DiskError> + 'a;
/// Whoever writes what a layer does not cover: an offset and what belongs there.
pub type WriteBelow<'a> = dyn FnMut(u64, Content<'_>) -> Result<(), DiskError> + 'a;

/// What a write leaves on a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// Zeroes.
    Zeroes {
        /// How many.
        len_bytes: u64,
        /// Their space stays allocated.
        keep_allocated: bool,
    },
}

impl Content<'_> {
    /// Its length.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zeroes { len_bytes, .. } => *len_bytes,
        }
    }

    /// Puts it on a disk.
    pub fn write_to(&self, disk: &mut dyn Disk, offset: u64) -> Result<(), DiskError> {
        match *self {
            Self::Data(bytes) => disk.write(offset, bytes),
            Self::Zeroes { len_bytes, keep_allocated } => {
                disk.write_zeroes(offset, len_bytes, Zeroing { keep_allocated, fast_only: false })
            }
        }
    }

    /// The part of it, which lies at `offset`, that falls in `range`.
    fn part(&self, offset: u64, range: &Range<u64>) -> Self {
        match *self {
            Self::Data(bytes) => Self::Data(&bytes[(range.start - offset) as usize..(range.end - offset) as usize]),
            Self::Zeroes { keep_allocated, .. } => Self::Zeroes { len_bytes: range.end - range.start, keep_allocated },
        }
    }
}

#[derive(Debug)]
enum Place {
    Memory(Arc<Block>),
    Spill { at: u64 },
    Zeroes { keep_allocated: bool },
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
    spill: Option<SpillFile>,
    spill_end: u64,
    /// What this layer took from the budget, to be given back.
    memory_taken: u64,
    /// Another one after each change, of no other layer ever.
    version: u64,
}

impl Overlay {
    /// An empty layer. No file is made before the first byte is spilled.
    #[must_use]
    pub fn new(budget: &Arc<Budget>) -> Self {
        let budget = Arc::clone(budget);
        Self { extents: BTreeMap::new(), bytes: 0, budget, spill: None, spill_end: 0, memory_taken: 0, version: 0 }
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

    /// What a range is: pieces of (length, what this layer has there), `None` where it has nothing.
    pub(super) fn describe(&self, offset: u64, len_bytes: u64) -> Vec<(u64, Option<Described>)> {
        let of = |piece| match piece {
            Piece::Gap(range) => (range.end - range.start, None),
            Piece::Extent { start, range } => {
                let len_bytes = range.end - range.start;
                let described = match self.extents[&start].place {
                    Place::Zeroes { keep_allocated } => Described { len_bytes, hole: !keep_allocated, zero: true },
                    Place::Memory(_) | Place::Spill { .. } => Described::data(len_bytes),
                };
                (len_bytes, Some(described))
            }
        };
        self.pieces(offset, len_bytes).into_iter().map(of).collect()
    }

    /// Writes at `offset`. The caller has checked the range. On an error the range holds old and new bytes mixed, in
    /// whole pieces, and everything outside it is untouched.
    pub fn write(&mut self, offset: u64, content: Content<'_>) -> Result<(), DiskError> {
        self.changed();
        for piece in self.pieces(offset, content.len_bytes()) {
            match piece {
                Piece::Extent { start, range } => {
                    let content = content.part(offset, &range);
                    match (self.has_zeroes(start), content) {
                        (true, Content::Data(bytes)) => self.split(start, range.start, bytes)?,
                        _ => self.overwrite(start, range.start, content)?,
                    }
                }
                Piece::Gap(range) => self.append(range.start, content.part(offset, &range))?,
            }
        }
        Ok(())
    }

    /// Writes at `offset`, and keeps the block itself if it becomes an extent as it is: an empty one is left then.
    pub fn write_block(&mut self, offset: u64, block: &mut Block) -> Result<(), DiskError> {
        let len = block.len();
        let is_gap = match self.pieces(offset, len as u64)[..] {
            [Piece::Gap(_)] => len <= MAX_EXTENT_BYTES,
            // What it replaces as a whole goes, and costs as much.
            [Piece::Extent { start, .. }] if start == offset => match self.extents.get_mut(&start) {
                Some(Extent { len: old_len, place: Place::Memory(old) }) if *old_len == len => {
                    *old = Arc::new(std::mem::take(block));
                    self.changed();
                    return Ok(());
                }
                _ => false,
            },
            _ => false,
        };
        if !is_gap || !self.take(self.budget.data_limit_bytes(), EXTENT_COST_BYTES + len as u64) {
            return self.write(offset, Content::Data(block));
        }
        self.changed();
        self.bytes += len as u64;
        self.extents.insert(offset, Extent { len, place: Place::Memory(Arc::new(std::mem::take(block))) });
        Ok(())
    }

    /// Writes only where the layer covers the range; each gap is handed to `below`. Needs no room: zeroes that are in
    /// the way of data are handed down first, and are a gap then.
    pub fn write_covered(
        &mut self,
        offset: u64,
        content: Content<'_>,
        below: &mut WriteBelow<'_>,
    ) -> Result<(), DiskError> {
        for piece in self.pieces(offset, content.len_bytes()) {
            match piece {
                Piece::Extent { start, range } => {
                    let content = content.part(offset, &range);
                    match (&self.extents[&start], content) {
                        (&Extent { len, place: Place::Zeroes { keep_allocated } }, Content::Data(_)) => {
                            below(start, Content::Zeroes { len_bytes: len as u64, keep_allocated })?;
                            self.forget(start);
                            below(range.start, content)?;
                        }
                        _ => self.overwrite(start, range.start, content)?,
                    }
                }
                Piece::Gap(range) => below(range.start, content.part(offset, &range))?,
            }
        }
        Ok(())
    }

    /// Fills `into` where the layer covers the range; each gap is handed to `below`.
    pub fn read(&self, offset: u64, into: &mut [u8], below: &mut ReadBelow<'_>) -> Result<(), DiskError> {
        for piece in self.pieces(offset, into.len() as u64) {
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

    /// Copies the first covered bytes to `disk` and then forgets them; whoever reads through this layer to `disk` sees
    /// no difference. How many are those of [`Self::first_run`]; returned, 0 when the layer is empty. On an error nothing is
    /// forgotten.
    pub fn move_first(&mut self, disk: &mut dyn Disk, max_bytes: usize) -> Result<usize, DiskError> {
        let Some(run) = self.first_run(max_bytes) else { return Ok(0) };
        run.write_to(disk)?;
        self.forget_run(&run);
        Ok(run.len_bytes())
    }

    /// Forgets the first extent and returns how many bytes that were, 0 when the layer is empty: a large layer is
    /// dropped in steps.
    pub fn forget_first(&mut self) -> usize {
        self.extents.first_key_value().map(|(start, _)| *start).map_or(0, |start| self.forget(start))
    }

    fn forget(&mut self, start: u64) -> usize {
        let Some(extent) = self.extents.remove(&start) else { return 0 };
        self.changed();
        self.bytes -= extent.len as u64;
        let in_memory = matches!(extent.place, Place::Memory(_));
        self.give_back(EXTENT_COST_BYTES + if in_memory { extent.len as u64 } else { 0 });
        extent.len
    }

    fn changed(&mut self) {
        self.version = self.budget.next_version();
    }

    fn has_zeroes(&self, start: u64) -> bool {
        matches!(self.extents[&start].place, Place::Zeroes { .. })
    }

    fn take(&mut self, limit_bytes: u64, bytes: u64) -> bool {
        let taken = self.budget.take_memory(limit_bytes, bytes);
        self.memory_taken += if taken { bytes } else { 0 };
        taken
    }

    fn give_back(&mut self, bytes: u64) {
        self.memory_taken -= bytes;
        self.budget.give_memory(bytes);
    }

    /// The pieces of a range, in order and without a hole.
    fn pieces(&self, offset: u64, len_bytes: u64) -> Vec<Piece> {
        let end = offset + len_bytes;
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
                let file = &self.spill.as_ref().expect("a spilled extent has a file").file;
                file.read_exact_at(into, at + skip as u64).map_err(|e| DiskError::io("read a spill file", e))?;
            }
            Place::Zeroes { .. } => into.fill(0),
        }
        Ok(())
    }

    /// Writes into an extent, which is not one of zeroes if the content is data.
    fn overwrite(&mut self, start: u64, offset: u64, content: Content<'_>) -> Result<(), DiskError> {
        self.changed();
        let skip = (offset - start) as usize;
        let extent = self.extents.get_mut(&start).expect("a piece names an extent that exists");
        let len = content.len_bytes() as usize;
        let mut freed_bytes = 0;
        match (&mut extent.place, content) {
            // One that is being copied down meanwhile stays as it was there.
            (Place::Memory(old), Content::Data(bytes)) => Arc::make_mut(old)[skip..skip + len].copy_from_slice(bytes),
            (place @ Place::Memory(_), Content::Zeroes { keep_allocated, .. }) if len == extent.len => {
                (*place, freed_bytes) = (Place::Zeroes { keep_allocated }, len as u64);
            }
            (Place::Memory(old), Content::Zeroes { .. }) => Arc::make_mut(old)[skip..skip + len].fill(0),
            (Place::Spill { at }, content) => {
                let zeroes = vec![0; if let Content::Zeroes { .. } = content { len } else { 0 }];
                let bytes = if let Content::Data(bytes) = content { bytes } else { &zeroes };
                let file = &self.spill.as_ref().expect("a spilled extent has a file").file;
                file.write_all_at(bytes, *at + skip as u64).map_err(|e| DiskError::io("write a spill file", e))?;
            }
            (Place::Zeroes { keep_allocated: kept }, Content::Zeroes { keep_allocated, .. }) => {
                *kept = keep_allocated || *kept && len != extent.len;
            }
            (Place::Zeroes { .. }, Content::Data(_)) => unreachable!("data splits zeroes"),
        }
        self.give_back(freed_bytes);
        Ok(())
    }

    /// Data where zeroes are: what is left of them on either side stays.
    fn split(&mut self, mut start: u64, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        for (index, bytes) in bytes.chunks(MAX_EXTENT_BYTES).enumerate() {
            let at = offset + (index * MAX_EXTENT_BYTES) as u64;
            let Extent { len, place: Place::Zeroes { keep_allocated } } = self.extents[&start] else { return Ok(()) };
            let (after, end) = (at + bytes.len() as u64, start + len as u64);
            let between = start < at && after < end;
            if between && !self.take(self.budget.memory_limit_bytes(), EXTENT_COST_BYTES) {
                return Err(no_space());
            }
            let placed = self.place(bytes);
            if placed.is_err() && between || placed.is_ok() && start == at && after == end {
                self.give_back(EXTENT_COST_BYTES);
            }
            let placed = placed?;
            self.extents.remove(&start);
            for (from, to) in [(start, at), (after, end)] {
                if from < to {
                    let rest = Extent { len: (to - from) as usize, place: Place::Zeroes { keep_allocated } };
                    self.extents.insert(from, rest);
                }
            }
            self.extents.insert(at, placed);
            start = after;
        }
        Ok(())
    }

    /// Makes new extents. The content falls in a gap.
    fn append(&mut self, offset: u64, content: Content<'_>) -> Result<(), DiskError> {
        match content {
            Content::Data(bytes) => {
                for (index, bytes) in bytes.chunks(MAX_EXTENT_BYTES).enumerate() {
                    let extent = self.place(bytes)?;
                    self.bytes += bytes.len() as u64;
                    self.extents.insert(offset + (index * MAX_EXTENT_BYTES) as u64, extent);
                }
            }
            Content::Zeroes { len_bytes, keep_allocated } => {
                let end = offset + len_bytes;
                for at in (offset..end).step_by(MAX_ZEROES_BYTES as usize) {
                    if !self.take(self.budget.memory_limit_bytes(), EXTENT_COST_BYTES) {
                        return Err(no_space());
                    }
                    let len = (end - at).min(MAX_ZEROES_BYTES);
                    self.bytes += len;
                    self.extents.insert(at, Extent { len: len as usize, place: Place::Zeroes { keep_allocated } });
                }
            }
        }
        Ok(())
    }

    /// Finds room for an extent of data.
    fn place(&mut self, bytes: &[u8]) -> Result<Extent, DiskError> {
        let limit_bytes = self.budget.memory_limit_bytes();
        let len = bytes.len();
        if self.take(self.budget.data_limit_bytes(), EXTENT_COST_BYTES + len as u64) {
            return Ok(Extent { len, place: Place::Memory(Arc::new(self.budget.pool().copy(bytes))) });
        }
        if !self.take(limit_bytes, EXTENT_COST_BYTES) {
            return Err(no_space());
        }
        match self.spill(bytes) {
            Ok(at) => Ok(Extent { len, place: Place::Spill { at } }),
            Err(error) => {
                self.give_back(EXTENT_COST_BYTES);
                Err(error)
            }
        }
    }

    /// Room at the end of the spill file, and where that is.
    fn reserve(&mut self, len_bytes: u64) -> Result<(Arc<File>, u64), DiskError> {
        let (at, end) = (self.spill_end, self.spill_end + len_bytes);
        if self.spill.is_none() {
            self.spill = Some(self.budget.spill_file()?);
        }
        let Some(spill) = &mut self.spill else { return Err(no_space()) };
        self.budget.grow(spill, end)?;
        self.spill_end = end;
        Ok((spill.file.clone(), at))
    }

    /// Appends to the spill file, of which nothing is lost if that fails.
    fn spill(&mut self, bytes: &[u8]) -> Result<u64, DiskError> {
        let (file, at) = self.reserve(bytes.len() as u64)?;
        let written = file.write_all_at(bytes, at);
        // Nothing was lent behind it meanwhile.
        self.spill_end = if written.is_ok() { self.spill_end } else { at };
        written.map_err(|e| DiskError::io("write a spill file", e))?;
        Ok(at)
    }
}

impl Drop for Overlay {
    /// Takes no time for the spill file, however long it is; for what is in memory, see [`Self::forget_first`].
    fn drop(&mut self) {
        self.budget.give_memory(self.memory_taken);
        self.spill.take().into_iter().for_each(|spill| self.budget.spare(spill));
    }
}
