//! How the layers look from above: to guest B, to the primary, and to whoever reads or writes through them.

use super::Replica;
use super::aside::{self, Writer};
use crate::disk::{Disk, DiskError, Extent, Zeroing};
use crate::pool::Block;
use crate::replica::extents::{Content, Overlay};
use crate::replica::{FAST_HOLE, lock, zero_or_leave};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// Bytes described at once: layers have many small extents, and the lock is held meanwhile.
const DESCRIBED_MAX_BYTES: u64 = 64 << 20;

pub(super) fn read_layers(
    sealed: &VecDeque<Overlay>,
    base: &mut dyn Disk,
    offset: u64,
    into: &mut [u8],
) -> Result<(), DiskError> {
    fn below(
        upper: &VecDeque<Overlay>,
        count: usize,
        base: &mut dyn Disk,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), DiskError> {
        match count.checked_sub(1) {
            None => base.read(offset, into),
            Some(top) => upper[top].read(offset, into, &mut |offset, into| below(upper, top, base, offset, into)),
        }
    }
    below(sealed, sealed.len(), base, offset, into)
}

pub(super) fn write_layers(
    sealed: &mut [Overlay],
    base: &mut dyn Disk,
    offset: u64,
    content: Content<'_>,
) -> Result<(), DiskError> {
    match sealed.split_last_mut() {
        None => content.write_to(base, offset),
        Some((newest, older)) => {
            newest.write_covered(offset, content, &mut |offset, content| write_layers(older, base, offset, content))
        }
    }
}

/// What a range is, seen through `layers`, the newest last.
pub(super) fn describe_layers(
    layers: &[&Overlay],
    base: &mut dyn Disk,
    offset: u64,
    len_bytes: u64,
    max: usize,
) -> Result<Vec<Extent>, DiskError> {
    let Some((top, below)) = layers.split_last() else { return base.extents(offset, len_bytes, max) };
    let (mut at, mut found) = (offset, Vec::new());
    for (len_bytes, described) in top.describe(offset, len_bytes.min(DESCRIBED_MAX_BYTES)) {
        match described {
            Some(extent) => found.push(extent),
            None => found.extend(describe_layers(below, base, at, len_bytes, max - found.len())?),
        }
        at += len_bytes;
        // What is below may have told less than it was asked for.
        if found.len() >= max || found.iter().map(|extent| extent.len_bytes).sum::<u64>() < at - offset {
            break;
        }
    }
    Ok(found)
}

/// Guest B's disk.
#[derive(Clone)]
pub struct GuestView(pub Arc<Mutex<Replica>>);

impl Disk for GuestView {
    fn size_bytes(&self) -> u64 {
        lock(&self.0).size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        lock(&self.0).guest_read(offset, into)
    }
    fn write(&mut self, offset: u64, mut bytes: &[u8]) -> Result<(), DiskError> {
        aside::write(&self.0, Writer::Guest, offset, &mut bytes, |replica, bytes| replica.guest_write(offset, bytes))
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        lock(&self.0).guest_flush()
    }
    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        lock(&self.0).guest_zero(offset, len_bytes, how)
    }
    /// Zeroes, or nothing: what the guest sees of it does not change by a merge.
    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        zero_or_leave(lock(&self.0).guest_zero(offset, len_bytes, FAST_HOLE))
    }
    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        lock(&self.0).guest_extents(offset, len_bytes, max)
    }
    fn changed(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Option<Vec<(u64, bool)>>, DiskError> {
        lock(&self.0).guest_changed(offset, len_bytes, max)
    }
}

/// The disk a primary's connection writes to, for as long as its generation lasts.
#[derive(Clone)]
pub struct PrimaryView {
    /// The replica.
    pub replica: Arc<Mutex<Replica>>,
    /// The generation the primary proved when it connected.
    pub generation: u64,
}

impl Disk for PrimaryView {
    fn size_bytes(&self) -> u64 {
        lock(&self.replica).size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        lock(&self.replica).primary_read(self.generation, offset, into)
    }
    fn write(&mut self, offset: u64, mut bytes: &[u8]) -> Result<(), DiskError> {
        let generation = self.generation;
        aside::write(&self.replica, Writer::Primary(generation), offset, &mut bytes, |replica, bytes| {
            replica.primary_write(generation, offset, bytes)
        })
    }
    fn keeps_blocks(&self) -> bool {
        true
    }
    fn write_block(&mut self, offset: u64, block: &mut Block) -> Result<(), DiskError> {
        let generation = self.generation;
        aside::write(&self.replica, Writer::Primary(generation), offset, block, |replica, block| {
            replica.primary_write_block(generation, offset, block)
        })
    }
    /// Unless somebody writes to the image now, or what comes goes to a spill file.
    fn writes_in_memory(&self) -> bool {
        self.replica.try_lock().is_ok_and(|replica| replica.takes_in_memory())
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        lock(&self.replica).primary_flush(self.generation)
    }
    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        lock(&self.replica).primary_zero(self.generation, offset, len_bytes, how)
    }
    /// Zeroes: what a primary that sends a trim most likely made of it itself. Our own sends none (see
    /// [`crate::replica::mirror`]).
    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, len_bytes, Zeroing::default())
    }
}
