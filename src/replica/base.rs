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
//! What waits for a medium may be lent, so that nobody who reads or seals waits too: a copy ([`Base::lend_copy`]), a flush
//! ([`Base::lend_flush`]; a second one waits for the first), the word that it is whole ([`Base::lend_record`]). While a copy is
//! under way, whoever else would change the image waits for its end: their order is the order of what is there.
//!
//! The trap is a flush that fails: the kernel forgets what it could not write, keeps showing it, and the next flush
//! succeeds. So nothing is written or flushed here any more, and nobody takes over on such an image. Only a new initial
//! copy makes it whole again, by another process and from what the medium holds; a guest that runs on its own disk is
//! told, as by any disk.

use super::extents::Run;
use super::lock;
use super::records::Member;
use super::state::{Standing, Why};
use crate::disk::{Disk, DiskError, Extent, Zeroing};
use crate::mutant::{self, Mutant};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A base image and its part in the records of the guest's images.
pub struct Base {
    disk: Box<dyn Disk>,
    state: Member,
    why: Why,
    /// How often it was changed, what an earlier process may have written included, and how many of these changes are on
    /// the medium.
    changes: u64,
    flushed: u64,
    shared: Arc<Shared>,
}

/// What a base shares with what it has lent.
#[derive(Default)]
struct Shared {
    /// Held while a flush is waited for. Of two flushes at once only one would be told what neither could write.
    turn: Mutex<()>,
    /// A flush failed, and some of what it covered is lost, whatever reads say.
    lost: AtomicBool,
    /// A copy is lent, and may be writing.
    copying: Mutex<bool>,
    copied: Condvar,
}

impl Shared {
    /// Waits its turn, and does it, unless one before it has failed.
    fn flush(&self, flush: impl FnOnce() -> Result<(), DiskError>) -> Result<(), DiskError> {
        let _turn = lock(&self.turn);
        self.check_lost()?;
        flush().inspect_err(|_| self.lost.store(!mutant::active(Mutant::FlushAgain), Ordering::SeqCst))
    }

    fn check_lost(&self) -> Result<(), DiskError> {
        match self.lost.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(DiskError::FlushFailed { what: "the replica's image".into() }),
        }
    }
}

/// A flush of a base, to be carried out while nobody waits for the base.
#[must_use]
pub struct LentFlush {
    disk: Box<dyn Disk>,
    covers: u64,
    shared: Arc<Shared>,
}

impl LentFlush {
    /// Waits for the medium.
    pub fn carry_out(self) -> FlushEnded {
        let Self { mut disk, covers, shared } = self;
        FlushEnded { covers, result: shared.flush(|| disk.flush()) }
    }
}

/// What became of it, for the base.
#[must_use]
pub struct FlushEnded {
    covers: u64,
    result: Result<(), DiskError>,
}

/// A copy into a base, to be carried out while nobody waits for it. The base must be told of its end
/// ([`Base::copy_ended`]).
#[must_use]
pub struct LentCopy {
    run: Run,
    disk: Box<dyn Disk>,
    state: Member,
    why: Why,
    until: UntilCopied,
}

impl LentCopy {
    /// Says that the image is not whole, and writes.
    pub fn carry_out(self) -> CopyEnded {
        let Self { run, mut disk, state, why, until } = self;
        let write = |disk: &mut dyn Disk| run.write_to(disk);
        let result = until.0.check_lost().and_then(|()| change(&mut *disk, &state, why, write));
        CopyEnded { run, result }
    }
}

/// Others wait as long as this lives.
struct UntilCopied(Arc<Shared>);

impl Drop for UntilCopied {
    fn drop(&mut self) {
        *lock(&self.0.copying) = false;
        self.0.copied.notify_all();
    }
}

/// What became of it. The run is freed with this: let go of all locks first.
#[must_use]
pub struct CopyEnded {
    /// What was to be copied.
    pub run: Run,
    result: Result<(), DiskError>,
}

/// The word that an image is whole, to be made durable while nobody waits for it.
#[must_use]
pub struct LentRecord(Member, Standing);

impl LentRecord {
    /// Waits for the media of all the records, unless the image was written to again.
    pub fn carry_out(self) -> Result<(), DiskError> {
        self.0.settle(self.1)
    }
}

/// Says that an image is not whole, and then changes it.
fn change(
    disk: &mut dyn Disk,
    state: &Member,
    why: Why,
    change: impl FnOnce(&mut dyn Disk) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    if mutant::active(Mutant::ResyncAfterWrite) {
        change(disk)?;
        return state.record(Standing::Resync(why));
    }
    state.record(Standing::Resync(why))?;
    change(disk)
}

impl Base {
    /// An image as it is found. A process that was killed may have left writes in the page cache, so it is flushed
    /// before it is whole, whatever is written to it here.
    #[must_use]
    pub fn new(disk: Box<dyn Disk>, state: Member) -> Self {
        let changes = u64::from(!mutant::active(Mutant::TrustPageCache));
        Self { disk, state, why: Why::InitialCopy, changes, flushed: 0, shared: Arc::default() }
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

    /// All of it will be written anew, or compared first; from now on it is not whole. What an earlier process failed to
    /// flush is not compared.
    pub fn begin_copy(&mut self) -> Result<(), DiskError> {
        self.await_copy();
        self.check_lost()?;
        self.why = Why::InitialCopy;
        self.state.record(Standing::Resync(self.why))?;
        if mutant::active(Mutant::TrustCachedImage) { Ok(()) } else { self.disk.reread() }
    }

    /// Refused once a flush has failed: what this image reads as is not what it is.
    pub fn check_lost(&self) -> Result<(), DiskError> {
        self.shared.check_lost()
    }

    /// How often it was changed.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// A flush of what was written until now; `None` when all of that is flushed, and of a disk that lends none. Give what
    /// becomes of it to [`Self::flush_ended`].
    pub fn lend_flush(&self) -> Option<LentFlush> {
        let disk = if self.flushed < self.changes { self.disk.lend() } else { None };
        disk.map(|disk| LentFlush { disk, covers: self.changes, shared: self.shared.clone() })
    }

    /// The copy of a run, which goes back where the disk lends none. One that is under way is waited for.
    pub fn lend_copy(&self, run: Run) -> Result<LentCopy, Run> {
        self.await_copy();
        let Some(disk) = self.disk.lend() else { return Err(run) };
        *lock(&self.shared.copying) = true;
        Ok(LentCopy { run, disk, state: self.state.clone(), why: self.why, until: UntilCopied(self.shared.clone()) })
    }

    /// A copy that was lent has been carried out, as far as it went.
    pub fn copy_ended(&mut self, ended: &mut CopyEnded) -> Result<(), DiskError> {
        self.changes += 1;
        std::mem::replace(&mut ended.result, Ok(()))
    }

    /// Waits for the copy that is lent.
    fn await_copy(&self) {
        if mutant::active(Mutant::WriteBesideCopy) {
            return;
        }
        let copying = lock(&self.shared.copying);
        drop(self.shared.copied.wait_while(copying, |copying| *copying).unwrap_or_else(PoisonError::into_inner));
    }

    /// A flush that was lent has been carried out.
    pub fn flush_ended(&mut self, ended: FlushEnded) -> Result<(), DiskError> {
        ended.result?;
        let covers = if mutant::active(Mutant::LentCoversLater) { self.changes } else { ended.covers };
        self.flushed = self.flushed.max(covers);
        Ok(())
    }

    /// Names what further writes are for. Does nothing now.
    pub fn expect(&mut self, why: Why) {
        self.why = why;
    }

    /// Makes the image whole, as it is, once the guest's other images are too. A checkpoint that became whole before
    /// and was not written to since keeps its number.
    pub fn settle(&mut self, whole: Standing) -> Result<(), DiskError> {
        self.lend_record(whole)?.map_or(Ok(()), LentRecord::carry_out)
    }

    /// The last word of [`Self::settle`], after the flush; `None` when it was said before. It is taken back by the next
    /// change.
    pub fn lend_record(&mut self, whole: Standing) -> Result<Option<LentRecord>, DiskError> {
        if mutant::active(Mutant::WholeBeforeFlush) {
            self.state.reach(whole);
            self.state.settle(whole)?;
        }
        self.await_copy();
        self.flush()?;
        let known = match (whole, self.standing()) {
            (Standing::Checkpoint { .. }, known @ Standing::Checkpoint { .. }) => known,
            _ => whole,
        };
        if self.state.is(known) {
            return Ok(None);
        }
        self.state.reach(whole);
        Ok(Some(LentRecord(self.state.clone(), whole)))
    }

    /// Says that the image is not whole, and then changes it.
    fn change(&mut self, does: impl FnOnce(&mut dyn Disk) -> Result<(), DiskError>) -> Result<(), DiskError> {
        self.await_copy();
        self.check_lost()?;
        self.changes += 1;
        if self.state.is(Standing::Guest) {
            return does(&mut *self.disk);
        }
        change(&mut *self.disk, &self.state, self.why, does)
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
        self.check_lost()?;
        if self.flushed < self.changes {
            let Self { disk, shared, .. } = self;
            shared.flush(|| disk.flush())?;
            self.flushed = self.changes;
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
    fn what_a_failed_flush_lost_nobody_writes_over() {
        for whole in [Standing::Checkpoint { generation: 1, number: 2, session: 3 }, Standing::Guest] {
            let mut base = Base::new(Box::new(Failing(MemoryDisk::new(8), 0)), forgetful());
            base.settle(whole).unwrap();
            base.disk = Box::new(Failing(MemoryDisk::new(8), 1));
            base.expect(Why::Applying);
            base.write(0, b"lost").unwrap();
            let standing = base.standing();
            assert!(matches!(base.settle(whole), Err(DiskError::Busy)));
            let how = Zeroing::default();
            let refused = [base.settle(whole), base.flush(), base.write(0, b"more"), base.write_zeroes(0, 1, how)];
            for refused in refused.into_iter().chain([base.begin_copy()]) {
                assert!(matches!(refused, Err(DiskError::FlushFailed { .. })), "{refused:?}");
            }
            assert_eq!(base.standing(), standing);
            let mut read = [0; 4];
            base.read(0, &mut read).unwrap();
            assert_eq!(&read, b"lost", "a guest may still save what can be read");
        }
    }
}
