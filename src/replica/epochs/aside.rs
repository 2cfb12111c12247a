//! Writes that go to a spill file, and wait for it without the replica.

use super::{Replica, Stage};
use crate::disk::DiskError;
use crate::mutant::{self, Mutant};
use crate::replica::extents::{Overlay, Space};
use crate::replica::lock;
use std::ops::Deref;
use std::sync::Mutex;

/// Who writes.
#[derive(Clone, Copy, Debug)]
pub enum Writer {
    /// The primary, in this generation.
    Primary(u64),
    /// Guest B.
    Guest,
}

impl Replica {
    /// Room for a write that would wait for a spill file; [`Self::end_write`] takes it back. `None` if it would not, or is
    /// to be refused: then it is written, or refused, in the common way.
    pub fn lend_write(&mut self, writer: Writer, offset: u64, len: usize) -> Option<Space> {
        let is_inside = offset.checked_add(len as u64).is_some_and(|end| end <= self.size_bytes());
        if is_inside { self.layer_of(writer)?.lend_space(offset, len) } else { None }
    }

    /// Whether what was lent, and is filled or not, is the write: false if that is still to be made, in the common way. A
    /// write of the guest's during which a checkpoint was made is none any more: the checkpoint has forgotten it, as it has what
    /// the guest was before.
    pub fn end_write(&mut self, writer: Writer, space: &Space, is_filled: bool) -> bool {
        let Some(layer) = self.layer_of(writer) else { return false };
        let is_forgotten = matches!(writer, Writer::Guest) && !layer.has_lent(space);
        is_forgotten || layer.end_space(space, is_filled)
    }

    /// Where it writes now, if that is a layer of its own.
    fn layer_of(&mut self, writer: Writer) -> Option<&mut Overlay> {
        match writer {
            Writer::Primary(generation) if generation != self.generation => None,
            _ if self.stage != Stage::Running => None,
            Writer::Primary(_) => Some(&mut self.pending),
            Writer::Guest => Some(&mut self.active),
        }
    }
}

/// Writes `bytes`, into a spill file without the lock; `put` makes every other write, under it.
pub(super) fn write<B: Deref<Target = [u8]>>(
    replica: &Mutex<Replica>,
    writer: Writer,
    offset: u64,
    bytes: &mut B,
    put: impl Fn(&mut Replica, &mut B) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let space = {
        let mut replica = lock(replica);
        match replica.lend_write(writer, offset, bytes.len()) {
            Some(space) if !mutant::active(Mutant::SpillUnderLock) => space,
            _ => return put(&mut replica, bytes),
        }
    };
    let is_filled = space.write(bytes).is_ok();
    let mut replica = lock(replica);
    if replica.end_write(writer, &space, is_filled) { Ok(()) } else { put(&mut replica, bytes) }
}
