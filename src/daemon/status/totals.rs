//! What a host has counted of its guest since its process began: over every protection of it, not the last one alone.

use serde::{Deserialize, Serialize};

/// Counters that only grow while the host's process lives. What was never counted here is absent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Bytes that the stream carried to the peer.
    pub stream_bytes: Option<u64>,
    /// Bytes that the disk links carried to the peer, from a primary.
    pub disk_bytes: Option<u64>,
    /// Memory that was to be sent, as it is in the guest, of a primary.
    pub memory_bytes: Option<u64>,
    /// Pages that came, of a secondary.
    pub received_pages: Option<u64>,
    /// Frames of the guest that were released because the secondary produced the same.
    pub compared: Option<u64>,
    /// Frames of the guest that were released, for whatever reason.
    pub released: Option<u64>,
    /// Frames of the guest that had to wait.
    pub held: Option<u64>,
    /// Frames of the secondary that were dropped because their epoch had ended.
    pub dropped_stale: Option<u64>,
    /// How often lock-step was given up for a while.
    pub lock_step_given_up: Option<u64>,
}

/// What is absent adds nothing.
fn plus(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    a.zip(b).map(|(a, b)| a.saturating_add(b)).or(a).or(b)
}

impl Totals {
    /// These and those.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            stream_bytes: plus(self.stream_bytes, other.stream_bytes),
            disk_bytes: plus(self.disk_bytes, other.disk_bytes),
            memory_bytes: plus(self.memory_bytes, other.memory_bytes),
            received_pages: plus(self.received_pages, other.received_pages),
            compared: plus(self.compared, other.compared),
            released: plus(self.released, other.released),
            held: plus(self.held, other.held),
            dropped_stale: plus(self.dropped_stale, other.dropped_stale),
            lock_step_given_up: plus(self.lock_step_given_up, other.lock_step_given_up),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_counted_stays_absent_and_the_rest_is_added() {
        let primary = Totals { stream_bytes: Some(5), compared: Some(0), ..Totals::default() };
        let secondary = Totals { stream_bytes: Some(2), received_pages: Some(9), ..Totals::default() };
        let both = primary.plus(&secondary);
        assert_eq!((both.stream_bytes, both.compared, both.received_pages), (Some(7), Some(0), Some(9)));
        assert_eq!((both.disk_bytes, both.held), (None, None));
        assert_eq!(primary.plus(&Totals::default()), primary);
    }
}
