//! How sealed epochs get into the base: all at once, by [`Replica::apply_some`], or while guest and primary go on, in rounds, each
//! of which ends with one flush.
//!
//! ```text
//!   begin ─▶ lend a copy ─▶ … carried out … ─▶ it ended ─┬▶ lend the flush ─▶ … ─▶ it ended ─▶ lend the record ─▶ … ─▶ end
//!               ▲  what was sealed by then: more of it   │
//!               └────────────────────────────────────────┘                       …: with no lock, as long as the medium likes
//! ```
//!
//! A medium may take as long as it likes; a seal, a takeover and the guest's reads wait for none of it, nor for what goes with
//! an epoch that is in the base: its memory and its spill file are given back by whoever holds no lock.
//!
//! The traps: a round must not take in what is sealed while it lasts, or a replica that is sealed faster than its medium flushes
//! would never be a whole checkpoint, and the disks of one guest never the same one. What was written while the flush
//! was under way is not covered by it. And a guest that took over writes into what is being copied: it stays, then, and is
//! copied again; a guest that does nothing else would keep the round from its end, so that every second try locks it out.

use super::{Replica, Stage};
use crate::disk::{Disk, DiskError};
use crate::replica::base::{CopyEnded, FlushEnded, LentCopy, LentFlush, LentRecord};
use crate::replica::extents::{MAX_EXTENT_BYTES, Overlay};
use crate::replica::state::Standing;

/// A round under way.
#[derive(Clone, Copy)]
pub(super) struct Round {
    /// Epochs of it that are not in the base, the oldest that are sealed.
    left: usize,
    /// The checkpoint that the base is when they all are.
    number: u64,
    /// How often the base had been changed by then, once that is known.
    changes: Option<u64>,
    /// The last copy was in vain.
    in_vain: bool,
}

impl Replica {
    /// Copies about `budget_bytes` of sealed epochs into the base, oldest first, flushes it when they are all
    /// there, and frees as much of the dropped layers. True while there is more to do. An error is kept for the
    /// status and breaks the next seal; nothing is lost by it, and calling again tries again.
    pub fn apply_some(&mut self, budget_bytes: u64) -> Result<bool, DiskError> {
        let result = self.merge(budget_bytes);
        self.judge(result)?;
        self.merged();
        self.free(budget_bytes);
        Ok(!self.sealed.is_empty() || !self.dropped.is_empty())
    }

    /// What became of writing the base.
    fn judge(&mut self, result: Result<(), DiskError>) -> Result<(), DiskError> {
        match (&result, self.stage) {
            (Err(_), Stage::Failover) => self.stage = Stage::FailoverFailed,
            (Ok(()), Stage::FailoverFailed) => self.stage = Stage::Failover,
            _ => {}
        }
        self.latch("applying a checkpoint", result)
    }

    fn merged(&mut self) {
        if self.stage == Stage::Failover && self.sealed.is_empty() {
            self.stage = Stage::Done;
        }
    }

    /// Begins a round: of what is sealed now. The rounds of a guest's disks begin together.
    pub fn begin_round(&mut self) {
        self.round = Some(Round { left: self.sealed.len(), number: self.seals, changes: None, in_vain: false });
    }

    /// Whether a round is under way.
    #[must_use]
    pub fn is_in_round(&self) -> bool {
        self.round.is_some()
    }

    /// Whether there is more to be copied in this round.
    fn is_copying(&self) -> bool {
        self.round.is_some_and(|round| round.left > 0)
    }

    /// The next copy of the round, to be carried out while the replica is not locked; then [`Self::copy_ended`]. `None` when all
    /// is copied, or must be copied by [`Self::copy_round`].
    pub fn lend_copy(&mut self) -> Option<LentCopy> {
        if !self.is_copying() || self.round.is_some_and(|round| round.in_vain) {
            return None;
        }
        // A run goes back where the disk lends nothing.
        self.base.lend_copy(self.sealed.front()?.first_run(MAX_EXTENT_BYTES)?).ok()
    }

    /// A copy has been carried out. What it copied is the base's now, if it is still what the layer has. True while more of the
    /// round is left. Errors are those of [`Replica::apply_some`].
    pub fn copy_ended(&mut self, ended: &mut CopyEnded) -> Result<bool, DiskError> {
        let result = self.base.copy_ended(ended);
        let is_copied = result.is_ok();
        self.judge(result)?;
        if let (Some(oldest), true) = (self.sealed.front_mut(), is_copied) {
            let in_vain = !oldest.forget_run(&ended.run);
            self.merged_bytes += if in_vain || !self.taken_over { 0 } else { ended.run.len_bytes() as u64 };
            self.round.iter_mut().for_each(|round| round.in_vain = in_vain);
            self.pop_copied();
        }
        Ok(self.is_copying())
    }

    /// Copies about `budget_bytes` of the round's epochs into the base, oldest first. True while more of them are left. Errors
    /// are those of [`Replica::apply_some`].
    pub fn copy_round(&mut self, budget_bytes: u64) -> Result<bool, DiskError> {
        let result = self.move_oldest(budget_bytes, Self::is_copying);
        self.judge(result)?;
        self.round.iter_mut().for_each(|round| round.in_vain = false);
        Ok(self.is_copying())
    }

    /// Layers nobody reads any more: dropping them takes the time that their size takes.
    #[must_use]
    pub fn take_dropped(&mut self) -> Vec<Overlay> {
        std::mem::take(&mut self.dropped)
    }

    /// The flush that the round ends with, to be carried out while the replica is not locked; then [`Self::lend_record`]. `None`
    /// when there is nothing to flush, and of a disk that cannot: it is flushed then.
    pub fn lend_flush(&mut self) -> Option<LentFlush> {
        let round = self.round.as_mut().filter(|round| round.left == 0)?;
        round.changes = Some(self.base.changes());
        self.base.lend_flush()
    }

    /// The word that the base is a checkpoint, after what became of the flush, to be made durable while the replica is not
    /// locked; then [`Self::end_round`]. `None` when there is none to be said: the base was written meanwhile, or it is known.
    /// Errors are those of [`Replica::apply_some`], and end the round.
    pub fn lend_record(&mut self, ended: Option<FlushEnded>) -> Result<Option<LentRecord>, DiskError> {
        let flushed = ended.map_or(Ok(()), |ended| self.base.flush_ended(ended));
        let lent = flushed.and_then(|()| self.settle_round());
        if lent.is_err() {
            self.round = None;
        }
        lent.map_err(|error| self.judge(Err(error)).expect_err("it says what it was told"))
    }

    /// Ends the round, with what became of its record. The base is a checkpoint now, and durably says so, unless it was
    /// written meanwhile. True when there is more to do.
    pub fn end_round(&mut self, recorded: Option<Result<(), DiskError>>) -> Result<bool, DiskError> {
        self.round = None;
        self.judge(recorded.unwrap_or(Ok(())))?;
        self.merged();
        Ok(!self.sealed.is_empty() || !self.dropped.is_empty())
    }

    fn settle_round(&mut self) -> Result<Option<LentRecord>, DiskError> {
        let Some(round) = self.round else { return Ok(None) };
        match self.stage {
            // As long as the guest runs on it there is no checkpoint to be told, and the end of all layers is the end. It writes
            // on, and would take back a word that is lent.
            _ if self.taken_over && self.sealed.is_empty() => self.settle().map(|()| None),
            // One that began before the initial copy was sealed had no checkpoint before it.
            Stage::Running if round.number > 0 && round.changes == Some(self.base.changes()) => {
                let Self { generation, session, .. } = *self;
                self.base.lend_record(Standing::Checkpoint { generation, number: round.number, session })
            }
            _ => Ok(None),
        }
    }

    /// Copies about so much of what is sealed into the base, oldest first, as long as `wanted` says so.
    fn move_oldest(&mut self, budget_bytes: u64, wanted: impl Fn(&Self) -> bool) -> Result<(), DiskError> {
        let mut left_bytes = budget_bytes.max(1);
        while left_bytes > 0 && wanted(self) {
            let Some(oldest) = self.sealed.front_mut() else { break };
            let step_bytes = usize::try_from(left_bytes).unwrap_or(usize::MAX);
            let moved_bytes = oldest.move_first(&mut self.base, step_bytes)?;
            left_bytes = left_bytes.saturating_sub(moved_bytes as u64);
            self.merged_bytes += if self.taken_over { moved_bytes as u64 } else { 0 };
            self.pop_copied();
        }
        Ok(())
    }

    fn pop_copied(&mut self) {
        if self.sealed.front().is_some_and(Overlay::is_empty) {
            self.sealed.pop_front();
            self.round.iter_mut().for_each(|round| round.left = round.left.saturating_sub(1));
        }
    }

    fn merge(&mut self, budget_bytes: u64) -> Result<(), DiskError> {
        self.move_oldest(budget_bytes, |_| true)?;
        // One flush for however many epochs were behind: sealed ones live in memory, so a flush between two of
        // them would promise nothing more.
        if self.sealed.is_empty() { self.settle() } else { Ok(()) }
    }

    /// Nothing is left above the base: what it holds becomes durable, and so does what that is.
    pub(super) fn settle(&mut self) -> Result<(), DiskError> {
        match (self.taken_over, self.seals) {
            (true, _) => self.base.settle(Standing::Guest),
            // Half an initial copy.
            (false, 0) => self.base.flush(),
            (false, number) => {
                let Self { generation, session, .. } = *self;
                self.base.settle(Standing::Checkpoint { generation, number, session })
            }
        }
    }

    fn free(&mut self, budget_bytes: u64) {
        let mut left_bytes = budget_bytes.max(1);
        while let (Some(last), 1..) = (self.dropped.last_mut(), left_bytes) {
            left_bytes = left_bytes.saturating_sub(last.forget_first() as u64);
            if last.is_empty() {
                self.dropped.pop();
            }
        }
    }
}
