//! Which of two ways large reads go: the one on which they have just been faster.
//!
//! ```text
//!   way   A A A … A A A │ B B B │ A A A …        a trial of the other way, every now and then
//!                         faster? ── B stays
//! ```
//!
//! A read that goes aside spares the server a copy, and leaves it to the client to fetch what no cache holds. Which of the
//! two is waited for is a matter of the machine: aside was 1.75 times as fast on one; on another it kept a client at 0.7 times
//! nbdkit's rate, which copies. So it is measured: the time from one read to the next, for as long as the client keeps asking, is what both ends need
//! together.
//!
//! The trap: what a read leaves in the socket is paid for by the next, so the first ones of a run are not counted. And a
//! client that is quiet makes any way look slow: long silences are not counted either.

use crate::clock::Instant;
use std::time::Duration;

/// Reads on the way that is in use, between two trials.
const RUN_READS: u32 = 240;
/// Reads of a trial, and the last of a run, which it is held against.
const TRIAL_READS: u32 = 16;
/// Reads of each that are not counted.
const SETTLE_READS: u32 = 4;
/// A longer silence is the client's.
const SILENCE: Duration = Duration::from_millis(20);
/// The other way must be better by a tenth.
const BETTER: (u128, u128) = (9, 10);

/// What reads took.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    micros: u128,
    bytes: u128,
}

impl Spent {
    /// Whether these took less a byte than `other`, by the margin.
    fn is_better(self, other: Self) -> bool {
        self.bytes > 0 && self.micros * other.bytes * BETTER.1 < other.micros * self.bytes * BETTER.0
    }
}

/// The way in use, and what is known of it.
#[derive(Debug)]
pub(super) struct Choice {
    aside: bool,
    trial: bool,
    /// Of the run or the trial.
    reads: u32,
    spent: Spent,
    /// The end of the run before the trial.
    before: Spent,
    last: Option<(Instant, usize)>,
}

impl Default for Choice {
    fn default() -> Self {
        let (spent, before) = Default::default();
        // The first trial comes soon.
        Self { aside: true, trial: false, reads: RUN_READS - 2 * TRIAL_READS, spent, before, last: None }
    }
}

impl Choice {
    /// Whether the read of `len_bytes` that begins `now` goes aside.
    pub(super) fn next(&mut self, now: Instant, len_bytes: usize) -> bool {
        let counts_from = if self.trial { SETTLE_READS } else { RUN_READS - TRIAL_READS };
        if let Some((then, bytes)) = self.last.replace((now, len_bytes))
            && self.reads > counts_from
            && now.since(then) < SILENCE
        {
            self.spent.micros += now.since(then).as_micros();
            self.spent.bytes += bytes as u128;
        }
        if self.reads == if self.trial { TRIAL_READS } else { RUN_READS } {
            let spent = std::mem::take(&mut self.spent);
            if !self.trial {
                (self.before, self.aside, self.trial) = (spent, !self.aside, true);
            } else {
                if !spent.is_better(self.before) {
                    self.aside = !self.aside;
                }
                self.trial = false;
            }
            self.reads = 0;
        }
        self.reads += 1;
        self.aside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN_BYTES: usize = 1 << 20;

    /// Reads that take so many microseconds aside and otherwise; how many of them went aside.
    fn aside(choice: &mut Choice, now: &mut Instant, reads: u32, micros: [u64; 2]) -> u32 {
        let mut count = 0;
        for _ in 0..reads {
            let aside = choice.next(*now, LEN_BYTES);
            count += u32::from(aside);
            *now += Duration::from_micros(micros[usize::from(!aside)]);
        }
        count
    }

    #[test]
    fn most_reads_go_the_faster_way_and_change_with_it() {
        let (mut choice, mut now) = (Choice::default(), Instant::ZERO);
        assert!(aside(&mut choice, &mut now, 2000, [250, 430]) > 1800, "aside is faster");
        assert!(aside(&mut choice, &mut now, 2000, [700, 430]) < 500, "it is not any more");
        assert!(aside(&mut choice, &mut now, 2000, [700, 430]) < 200);
        assert!(aside(&mut choice, &mut now, 2000, [430, 430]) < 200, "as fast is no reason to change");
        assert!(aside(&mut choice, &mut now, 2000, [250, 430]) > 1500, "and back");
    }

    #[test]
    fn a_slow_way_is_left_soon_and_a_quiet_client_says_nothing() {
        let (mut choice, mut now) = (Choice::default(), Instant::ZERO);
        assert!(aside(&mut choice, &mut now, 100, [700, 430]) < 50);
        for _ in 0..100 {
            now += Duration::from_secs(1);
            // A read after each silence, of which the silence is no part.
            assert!(aside(&mut choice, &mut now, 30, [700, 430]) <= 2 * TRIAL_READS);
        }
        let mut quiet = Choice::default();
        let went: u32 = (0..1000).map(|_| aside(&mut quiet, &mut now, 1, [30_000, 50_000])).sum();
        assert!(went > 900, "nothing was measured, and nothing changed: {went}");
    }

    #[test]
    fn what_is_measured_is_bytes_and_not_reads() {
        let (mut choice, mut now, mut went) = (Choice::default(), Instant::ZERO, 0);
        for n in 0..2000_u64 {
            // Reads of two lengths, each as long as its bytes take: 1 us for 4 KiB aside, 2 us otherwise.
            let len_bytes = if n % 3 == 0 { 1 << 20 } else { 64 << 10 };
            let aside = choice.next(now, len_bytes);
            went += u32::from(aside);
            now += Duration::from_micros(len_bytes as u64 / 4096 * if aside { 1 } else { 2 });
        }
        assert!(went > 1800, "{went}");
    }
}
