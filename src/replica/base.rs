//! The image under the layers, which says of itself whether it is whole.
//!
//! ```text
//!  write ──▶ resync WHY is durable ──▶ the bytes          (a guest's own disk: just the bytes)
//!  settle ─▶ the bytes are flushed ──▶ checkpoint, or guest, is durable
//! ```
//!
//! Every write to the image comes through here, so that none can come before the word that the image is not whole.
//! It is one flush of the record for a burst of checkpoints, and one after it; a checkpoint itself costs none.
//!
//! The trap is a flush that fails: the kernel forgets what it could not write, and the next flush succeeds. Only a new
//! initial copy makes such an image whole again. A guest that runs on its own disk is told of its failed flush, as by
//! any disk.

use super::records::Member;
use super::state::{Standing, Why};
use crate::disk::{Disk, DiskError, Extent, Zeroing};
use crate::mutant::{self, Mutant};
use std::io;

/// A base image and its part in the records of the guest's images.
pub struct Base {
    disk: Box<dyn Disk>,
    state: Member,
    why: Why,
    unflushed: bool,
    /// A flush failed, and some of what it covered may be lost.
    lost: bool,
}

impl Base {
    /// An image as it is found. A process that was killed may have left writes in the page cache, so it is flushed
    /// before it is whole, whatever is written to it here.
    #[must_use]
    pub fn new(disk: Box<dyn Disk>, state: Member) -> Self {
        Self { disk, state, why: Why::InitialCopy, unflushed: !mutant::active(Mutant::TrustPageCache), lost: false }
    }

    /// What the guest's images are worth after a crash now.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.state.standing()
    }

    /// What this image alone is worth after a crash now.
    #[must_use]
    pub fn own_standing(&self) -> Standing {
        self.state.own()
    }

    /// All of it will be written anew; from now on it is not whole.
    pub fn begin_copy(&mut self) -> Result<(), DiskError> {
        self.why = Why::InitialCopy;
        self.state.record(Standing::Resync(self.why))?;
        self.lost = false;
        Ok(())
    }

    /// Names what further writes are for. Does nothing now.
    pub fn expect(&mut self, why: Why) {
        self.why = why;
    }

    /// Makes the image whole, as it is, once the guest's other images are too. A checkpoint that became whole before
    /// and was not written to since keeps its number.
    pub fn settle(&mut self, whole: Standing) -> Result<(), DiskError> {
        if mutant::active(Mutant::WholeBeforeFlush) {
            self.state.record(whole)?;
        }
        self.flush()?;
        let known = match (whole, self.standing()) {
            (Standing::Checkpoint { .. }, known @ Standing::Checkpoint { .. }) => known,
            _ => whole,
        };
        if self.state.is(known) {
            return Ok(());
        }
        if self.lost {
            let error = io::Error::other("an earlier flush failed; what it covered may be lost");
            return Err(DiskError::io("flush the replica's image", error));
        }
        self.state.record(whole)
    }

    /// Says that the image is not whole, and then changes it.
    fn change(&mut self, change: impl FnOnce(&mut dyn Disk) -> Result<(), DiskError>) -> Result<(), DiskError> {
        self.unflushed = true;
        if self.state.is(Standing::Guest) {
            return change(&mut *self.disk);
        }
        if mutant::active(Mutant::ResyncAfterWrite) {
            change(&mut *self.disk)?;
            return self.state.record(Standing::Resync(self.why));
        }
        self.state.record(Standing::Resync(self.why))?;
        change(&mut *self.disk)
    }
}

impl Disk for Base {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.disk.read(offset, into)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.change(|disk| disk.write(offset, bytes))
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        self.change(|disk| disk.write_zeroes(offset, len_bytes, how))
    }

    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        self.disk.extents(offset, len_bytes, max)
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        if self.unflushed {
            self.disk.flush().inspect_err(|_| self.lost |= !self.state.is(Standing::Guest))?;
            self.unflushed = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::State;
    use super::*;
    use crate::disk::MemoryDisk;

    fn forgetful() -> Member {
        Member::alone(State::forgetful())
    }

    /// Flushes fail as often as it says.
    struct Failing(MemoryDisk, u32);

    impl Disk for Failing {
        fn size_bytes(&self) -> u64 {
            self.0.size_bytes()
        }
        fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
            self.0.read(offset, into)
        }
        fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
            self.0.write(offset, bytes)
        }
        fn flush(&mut self) -> Result<(), DiskError> {
            match self.1.checked_sub(1) {
                None => Ok(()),
                Some(left) => {
                    self.1 = left;
                    Err(DiskError::Busy)
                }
            }
        }
    }

    #[test]
    fn what_a_failed_flush_lost_no_later_one_brings_back() {
        let mut base = Base::new(Box::new(Failing(MemoryDisk::new(8), 1)), forgetful());
        let whole = Standing::Checkpoint { generation: 1, number: 2, session: 3 };
        base.expect(Why::Applying);
        base.write(0, b"lost").unwrap();
        assert!(matches!(base.settle(whole), Err(DiskError::Busy)));
        for _ in 0..2 {
            assert!(base.settle(whole).unwrap_err().to_string().contains("an earlier flush failed"));
            assert_eq!(base.standing(), Standing::Resync(Why::Applying));
        }
        base.begin_copy().unwrap();
        assert_eq!(base.standing(), Standing::Resync(Why::InitialCopy));
        base.settle(whole).unwrap();
        assert_eq!(base.standing(), whole);
    }

    #[test]
    fn a_guest_on_its_own_disk_is_told_and_goes_on() {
        let mut base = Base::new(Box::new(Failing(MemoryDisk::new(8), 0)), forgetful());
        base.settle(Standing::Guest).unwrap();
        base.disk = Box::new(Failing(MemoryDisk::new(8), 1));
        base.write(0, b"lost").unwrap();
        assert!(base.settle(Standing::Guest).is_err());
        base.settle(Standing::Guest).unwrap();
        assert_eq!(base.standing(), Standing::Guest);
    }
}
