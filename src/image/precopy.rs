//! How often a running guest's pages are sent before it is stopped for the rest.
//!
//! ```text
//! round 1: every page → round 2: what was written meanwhile → … → stop the guest, send what is left
//! ```
//!
//! libxc goes on while 50 or more pages are left and five rounds are not over (xen
//! `tools/libs/guest/xg_sr_save.c`). Here a round must also promise to leave less than it found: pages that the guest
//! writes as fast as they are sent are sent again for nothing, and the pause stays as long. A guest that is only saved
//! gets one round: whoever waits for the image waits for every further one.

/// What is left when the guest may as well be stopped.
const ENOUGH_PAGES: u64 = 50;
/// Rounds at most, the first included.
const ROUNDS_MAX: u32 = 5;

/// Decides when the guest is stopped.
#[derive(Clone, Copy, Debug)]
pub struct Precopy {
    rounds: u32,
    rounds_max: u32,
}

impl Default for Precopy {
    fn default() -> Self {
        Self { rounds: 0, rounds_max: ROUNDS_MAX }
    }
}

impl Precopy {
    /// For a guest that is sent once and then stopped.
    #[must_use]
    pub fn once() -> Self {
        Self { rounds: 0, rounds_max: 1 }
    }

    /// Whether to send another round, after one of `sent` pages that left `dirty` pages written again.
    pub fn goes_on(&mut self, sent: u64, dirty: u64) -> bool {
        self.rounds += 1;
        let shrinks = dirty.saturating_mul(4) < sent.saturating_mul(3);
        self.rounds < self.rounds_max && dirty >= ENOUGH_PAGES && shrinks
    }

    /// Rounds so far.
    #[must_use]
    pub fn rounds(&self) -> u32 {
        self.rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds that a guest gets whose every round leaves `left` of a thousand pages.
    fn rounds(left: u64) -> u32 {
        let (mut precopy, mut sent) = (Precopy::default(), 1 << 20);
        loop {
            let dirty = sent * left / 1000;
            if !precopy.goes_on(sent, dirty) {
                return precopy.rounds();
            }
            sent = dirty;
        }
    }

    #[test]
    fn rounds_end() {
        assert_eq!(rounds(0), 1, "an idle guest is stopped at once");
        assert_eq!(rounds(1), 2, "1048 pages are left, then one");
        assert_eq!(rounds(500), ROUNDS_MAX);
        assert_eq!(rounds(749), ROUNDS_MAX);
        assert_eq!(rounds(1000), 1, "a guest that writes as fast as it is copied is not chased");
        assert!(!Precopy::once().goes_on(1 << 20, 1 << 10), "one round, whatever is left");
        assert!(!Precopy::default().goes_on(u64::MAX, u64::MAX), "no overflow");
    }
}
