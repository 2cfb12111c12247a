//! The two ends of disk replication.
//!
//! ```text
//!  primary                                       secondary
//!  guest A ─▶ Mirror ─▶ local disk               guest B ◀──▶ GuestView ─┐
//!               └─ queue, by epoch ─▶ (NBD) ─▶ PrimaryView ─▶ Replica ◀──┘
//!                                                              active / sealed / pending / base
//! ```
//!
//! - [`extents`]: a sparse layer over a disk, in memory up to a budget, then in a spill file;
//! - [`epochs`]: the secondary's disk, built of such layers, one checkpoint deep for its guest;
//! - [`base`]: the image under them, never written before it durably says that it is not whole;
//! - [`state`]: the record in which it says so; [`take_up`]: what a restart makes of it;
//! - [`mirror`]: the primary's disk, and the copies of its writes on their way to the other host;
//! - [`set`]: the disks of one guest, which take each of these steps together or not at all;
//! - [`records`]: the records of its images, which change together.
//!
//! The trap is shared: guest B must see the disk of the last checkpoint and its own writes, never the primary's
//! writes since; so what arrives early waits in a layer of its own, and what the primary writes for a checkpoint
//! that is not yet owned waits in its queue.
//!
//! Nothing here waits, spawns or knows the wire: callers wrap an end in a mutex and drive it.
//!
//! Source: QEMU `docs/block-replication.txt`, whose visible behaviour this matches by other means.

pub mod base;
#[cfg(test)]
mod crash_hardware;
#[cfg(test)]
mod crash_set_tests;
#[cfg(test)]
mod crash_tests;
pub mod epochs;
pub mod extents;
pub mod mirror;
pub mod records;
#[cfg(test)]
mod resync_tests;
pub mod set;
pub mod stage;
pub mod state;
pub mod take_up;
#[cfg(test)]
mod tests;

use crate::disk::{DiskError, Zeroing};
use std::sync::{Mutex, MutexGuard};

/// What a trim becomes: a hole, if that is no more work than a trim may be.
const FAST_HOLE: Zeroing = Zeroing { keep_allocated: false, fast_only: true };

/// A trim that could not become a hole leaves everything as it was.
fn zero_or_leave(zeroed: Result<(), DiskError>) -> Result<(), DiskError> {
    match zeroed {
        Err(DiskError::NotSupported) => Ok(()),
        zeroed => zeroed,
    }
}

/// Locks an end. A thread that panicked while holding it left it in an unknown state: that is our own fault, and
/// going on would write unknown bytes to a disk.
fn lock<T>(end: &Mutex<T>) -> MutexGuard<'_, T> {
    end.lock().expect("a thread panicked while it held this disk")
}
