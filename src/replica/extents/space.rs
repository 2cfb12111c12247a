//! Room in a layer's spill file, lent to whoever writes there without the layer: a file system may let a write wait, and a
//! checkpoint or a takeover would wait with it.
//!
//! ```text
//!   lend_space ──▶ written, by whoever has it ──▶ end_space: an extent, if the range is a gap of this layer still
//!                                                          └─▶ in vain: nobody ever reads what was written there
//! ```
//!
//! The trap: the layer may be gone when the write ends, or be on its way down, and its file be the next layer's. So a space
//! is good for the layer that lent it and for no other, and a file is not written over as long as somebody else has it
//! (`Budget::spill_file`). Whoever has the last handle closes the file, which takes its time: that is not done under a lock either.

use super::{EXTENT_COST_BYTES, Extent, MAX_EXTENT_BYTES, Overlay, Piece, Place};
use crate::disk::DiskError;
use crate::mutant::{self, Mutant};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Room for one extent.
#[derive(Debug)]
pub struct Space {
    file: Arc<File>,
    at: u64,
    offset: u64,
    len: usize,
}

impl Space {
    /// Fills it. `bytes` are as many as it was lent for.
    pub fn write(&self, bytes: &[u8]) -> Result<(), DiskError> {
        debug_assert_eq!(bytes.len(), self.len);
        self.file.write_all_at(bytes, self.at).map_err(|e| DiskError::io("write a spill file", e))
    }
}

impl Overlay {
    /// Room for data that would go to the spill file and lies in a gap. `None` for all other data, and where there is no
    /// room: [`Overlay::write`] does what is to be done then, and says what is wrong.
    pub fn lend_space(&mut self, offset: u64, len: usize) -> Option<Space> {
        if len > MAX_EXTENT_BYTES || self.budget.fits_memory(EXTENT_COST_BYTES + len as u64) {
            return None;
        }
        if !self.is_gap(offset, len) || !self.take(self.budget.memory_limit_bytes(), EXTENT_COST_BYTES) {
            return None;
        }
        match self.reserve(len as u64) {
            Ok((file, at)) => Some(Space { file, at, offset, len }),
            Err(_) => {
                self.give_back(EXTENT_COST_BYTES);
                None
            }
        }
    }

    /// Whether it is this layer's: nobody else has its file as long as a part of it is lent.
    #[must_use]
    pub fn has_lent(&self, space: &Space) -> bool {
        self.spill.as_ref().is_some_and(|spill| Arc::ptr_eq(&spill.file, &space.file))
    }

    fn is_gap(&self, offset: u64, len: usize) -> bool {
        matches!(self.pieces(offset, len as u64)[..], [Piece::Gap(_)])
    }

    /// What was lent comes back, filled or not. False if it has become no extent, so that the data is still to be written:
    /// it was not filled, somebody else wrote there first, or it is another layer's.
    pub fn end_space(&mut self, space: &Space, is_filled: bool) -> bool {
        if !self.has_lent(space) && !mutant::active(Mutant::TakeStrangersSpace) {
            return false;
        }
        if !is_filled || !self.is_gap(space.offset, space.len) && !mutant::active(Mutant::OvertakeWrite) {
            self.give_back(EXTENT_COST_BYTES);
            return false;
        }
        self.changed();
        self.bytes += space.len as u64;
        self.extents.insert(space.offset, Extent { len: space.len, place: Place::Spill { at: space.at } });
        true
    }
}
