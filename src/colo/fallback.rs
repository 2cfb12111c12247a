//! Whether lock-step pays: how the primary's output is released in the epoch that begins.
//!
//! ```text
//! in         | on a capture, if                                           | goes to
//! -----------|------------------------------------------------------------|---------------------------------
//! Comparing  | 12 of the last 16 checkpoints were hasty                    | Buffering, for the pause
//! Buffering  | the pause is over                                           | Trying
//! Trying     | 4 checkpoints were hasty before 16 were taken               | Buffering, for twice the pause
//! Trying     | 16 checkpoints were taken                                   | Comparing, the pause is the first again
//! ```
//!
//! A checkpoint is *hasty* when a difference asked for it and the guest has run, since the last one, for less than a share
//! of its time: by default, for less long than it then stands still. Plain buffering lets a guest run at least that long,
//! and needs no second one: that is where lock-step loses. Where a pause is short it does not, however often the copies
//! differ: a difference is answered at once, and buffered output waits (measured: `scripts/bench.sh demo`). While the output is buffered the secondary's guest rests, so nobody can see whether the copies would agree
//! again: it is tried, and a trial that fails makes the next one later. That is the hysteresis.
//!
//! The trap: it may change only at a capture. An epoch whose output is partly compared and partly buffered has no rule.
//! Dong et al., "COLO" (SoCC 2013) 3.2 falls back in the same spirit, and says neither when nor how it returns.

use crate::clock::Instant;
use std::time::Duration;

/// Checkpoints looked back upon, and those of a trial.
const WINDOW: u32 = 16;
/// Hasty ones among them that end lock-step.
const TOO_MANY: u32 = 12;
/// Hasty ones that end a trial.
const TOO_MANY_ON_TRIAL: u32 = 4;
/// The share of its time that a guest must run, unless somebody says otherwise.
pub const MIN_RUN_PERCENT_DEFAULT: u8 = 50;
/// The first pause.
const PAUSE_FIRST: Duration = Duration::from_secs(2);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// How the output of an epoch is released.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Release {
    /// When the secondary's guest explains it, or a checkpoint does.
    Compared,
    /// When a checkpoint does; the secondary's guest rests.
    Buffered,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Comparing,
    Buffering { until: Instant },
    Trying { taken: u32 },
}

/// The machine.
#[derive(Debug)]
pub struct Fallback {
    min_run_percent: u8,
    state: State,
    /// A bit a checkpoint, the last one lowest: whether it was hasty.
    history: u16,
    pause: Duration,
    count: u64,
}

impl Fallback {
    /// For a guest that must run for this share of its time. It compares, until that does not pay.
    #[must_use]
    pub fn new(min_run_percent: u8) -> Self {
        Self { min_run_percent, state: State::Comparing, history: 0, pause: PAUSE_FIRST, count: 0 }
    }

    /// Whether a guest that ran so long between two pauses, of which the last took so long, ran for too little of its time.
    #[must_use]
    pub fn runs_too_little(&self, ran: Duration, pause: Duration) -> bool {
        ran * 100 < (ran + pause) * u32::from(self.min_run_percent)
    }

    /// A checkpoint was captured; `hasty`: a difference asked for it, too soon. Returns how the epoch that it opens is
    /// released.
    pub fn handle_capture(&mut self, now: Instant, hasty: bool) -> Release {
        self.history = self.history << 1 | u16::from(hasty);
        let many = self.history.count_ones();
        match self.state {
            State::Comparing if many >= TOO_MANY => self.fall_back(now),
            State::Comparing => {}
            State::Buffering { until } if until <= now => {
                self.state = State::Trying { taken: 0 };
                self.history = 0;
            }
            State::Buffering { .. } => {}
            State::Trying { .. } if many >= TOO_MANY_ON_TRIAL => {
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                self.fall_back(now);
            }
            State::Trying { taken } if taken + 1 >= WINDOW => {
                self.state = State::Comparing;
                self.pause = PAUSE_FIRST;
            }
            State::Trying { taken } => self.state = State::Trying { taken: taken + 1 },
        }
        self.release()
    }

    /// How the present epoch is released.
    #[must_use]
    pub fn release(&self) -> Release {
        match self.state {
            State::Buffering { .. } => Release::Buffered,
            State::Comparing | State::Trying { .. } => Release::Compared,
        }
    }

    /// When lock-step is tried again, while it is given up.
    #[must_use]
    pub fn tried_again_at(&self) -> Option<Instant> {
        match self.state {
            State::Buffering { until } => Some(until),
            State::Comparing | State::Trying { .. } => None,
        }
    }

    /// How often lock-step was given up, trials that failed included.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    fn fall_back(&mut self, now: Instant) {
        self.state = State::Buffering { until: now + self.pause };
        self.history = 0;
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Release::{Buffered, Compared};

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    /// Captures, and what the last of them decided.
    fn capture(fallback: &mut Fallback, ms: u64, hasty: &[bool]) -> Release {
        hasty.iter().fold(fallback.release(), |_, hasty| fallback.handle_capture(at(ms), *hasty))
    }

    #[test]
    fn twelve_hasty_checkpoints_of_sixteen_end_lock_step_and_eleven_do_not() {
        let sparse: Vec<_> = (0..160).map(|n| n % 16 < 11).collect();
        let mut fallback = Fallback::new(MIN_RUN_PERCENT_DEFAULT);
        assert_eq!(capture(&mut fallback, 0, &sparse), Compared);
        let mut fallback = Fallback::new(MIN_RUN_PERCENT_DEFAULT);
        let scattered = [[true, true, true, false]; 4].concat();
        assert_eq!(capture(&mut fallback, 0, &scattered[..14]), Compared);
        assert_eq!(capture(&mut fallback, 0, &scattered[14..15]), Buffered);
        assert_eq!((fallback.count(), fallback.tried_again_at()), (1, Some(at(2000))));
    }

    #[test]
    fn a_guest_runs_too_little_when_it_stands_still_for_longer() {
        let ms = Duration::from_millis;
        for (ran, pause, percent, little) in [
            (9, 10, 50, true),
            (10, 10, 50, false),
            (5, 0, 50, false),
            (5, 1, 100, true),
            (0, 9, 0, false),
            (0, 0, 50, false),
        ] {
            let fallback = Fallback::new(percent);
            assert_eq!(fallback.runs_too_little(ms(ran), ms(pause)), little, "{ran} {pause} {percent}");
        }
    }

    #[test]
    fn it_is_tried_again_later_each_time_until_a_trial_holds() {
        let mut fallback = Fallback::new(MIN_RUN_PERCENT_DEFAULT);
        assert_eq!(capture(&mut fallback, 0, &[true; 12]), Buffered);
        let mut begun_ms = 0;
        for pause_ms in [2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000] {
            assert_eq!(capture(&mut fallback, begun_ms + pause_ms - 1, &[false; 50]), Buffered, "{pause_ms}");
            begun_ms += pause_ms;
            assert_eq!(capture(&mut fallback, begun_ms, &[false]), Compared, "{pause_ms}");
            assert_eq!(capture(&mut fallback, begun_ms, &[true, false, true, true]), Compared, "{pause_ms}");
            assert_eq!(capture(&mut fallback, begun_ms, &[true]), Buffered, "{pause_ms}");
        }
        assert_eq!(fallback.count(), 8);
        begun_ms += 60_000;
        assert_eq!(capture(&mut fallback, begun_ms, &[false; 17]), Compared);
        assert_eq!(capture(&mut fallback, begun_ms, &[true; 11]), Compared, "the trial is passed");
        assert_eq!(capture(&mut fallback, begun_ms, &[true]), Buffered);
        assert_eq!(fallback.tried_again_at(), Some(at(begun_ms + 2_000)), "and the pause is short again");
    }
}
