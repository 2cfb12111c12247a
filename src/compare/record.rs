//! What happened to a flow: counted, and whether it keeps diverging.

use super::compare::Cause;
use super::key::FlowKey;

/// Epochs looked back upon.
const HISTORY_EPOCHS: u64 = 16;
/// Divergences among them that make a flow one that keeps diverging.
const OFTEN: u32 = 3;

/// A flow as the status shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowReport {
    /// Which flow.
    pub key: FlowKey,
    /// Frames of the primary that left because the secondary explained them.
    pub compared: u64,
    /// Their bytes.
    pub compared_bytes: u64,
    /// Frames of the primary that wait now.
    pub held: usize,
    /// What they cost, overhead included.
    pub held_bytes: usize,
    /// Epochs in which the flow asked for a checkpoint, or would have been a reason to.
    pub diverged: u64,
    /// The last of them.
    pub last_epoch: u64,
    /// Why.
    pub last_cause: Cause,
    /// It diverged in at least three of the last sixteen epochs.
    pub keeps_diverging: bool,
}

/// The record of one flow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Record {
    pub(super) compared: u64,
    pub(super) compared_bytes: u64,
    pub(super) diverged: u64,
    last: Option<(u64, Cause)>,
    /// A bit an epoch, that of the last divergence the lowest.
    history: u16,
}

impl Record {
    /// A frame of the primary leaves that the secondary explained.
    pub(super) fn compare(&mut self, frame: &[u8]) {
        self.compared += 1;
        self.compared_bytes += frame.len() as u64;
    }

    /// The flow diverged. Once an epoch counts: what follows a first difference proves nothing.
    pub(super) fn diverge(&mut self, epoch: u64, cause: Cause) {
        let since = match self.last {
            Some((last, _)) if last == epoch => return,
            Some((last, _)) => epoch.saturating_sub(last),
            None => 0,
        };
        self.history = if since < HISTORY_EPOCHS { self.history << since | 1 } else { 1 };
        self.last = Some((epoch, cause));
        self.diverged += 1;
    }

    fn keeps_diverging(&self, epoch: u64) -> bool {
        let since = self.last.map_or(HISTORY_EPOCHS, |(last, _)| epoch.saturating_sub(last));
        since < HISTORY_EPOCHS && (self.history << since).count_ones() >= OFTEN
    }

    /// The record as a report, if the flow ever diverged.
    pub(super) fn report(&self, key: FlowKey, epoch: u64, held: usize, held_bytes: usize) -> Option<FlowReport> {
        let (last_epoch, last_cause) = self.last?;
        Some(FlowReport {
            key,
            compared: self.compared,
            compared_bytes: self.compared_bytes,
            held,
            held_bytes,
            diverged: self.diverged,
            last_epoch,
            last_cause,
            keeps_diverging: self.keeps_diverging(epoch),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_of_the_last_sixteen_epochs_are_often() {
        for (diverged, now, often) in [
            (&[4, 5, 6][..], 6, true),
            (&[4, 4, 4], 4, false),
            (&[4, 5], 5, false),
            (&[1, 8, 16], 16, true),
            (&[0, 8, 16], 16, false),
            (&[4, 5, 6], 19, true),
            (&[4, 5, 6], 20, false),
            (&[4, 5, 60], 60, false),
        ] {
            let mut record = Record::default();
            diverged.iter().for_each(|epoch| record.diverge(*epoch, Cause::Aged));
            assert_eq!(record.keeps_diverging(now), often, "{diverged:?} at {now}");
        }
    }
}
