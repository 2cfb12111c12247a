//! How far work is that takes its time: a bar on a terminal, lines at a bounded rate elsewhere.
//!
//! [`Meter`] is pure: of what was done when it makes the rate and the time that is left. The rate is that of the last
//! five seconds, so that a wire that became slow shows.

use crate::clock::Instant;
use crate::daemon::engine_clock;
use crate::daemon::events::{Progress, Work};
use crate::say;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::Duration;

/// What the rate is measured over.
const WINDOW: Duration = Duration::from_secs(5);
/// Time between two looks that are remembered.
const STEP: Duration = Duration::from_millis(250);
/// Time between two lines.
const LINES: Duration = Duration::from_secs(2);

/// Measures one work.
#[derive(Debug, Default)]
pub struct Meter {
    seen: VecDeque<(Instant, u64)>,
    said_at: Option<Instant>,
}

impl Meter {
    /// So much is done now.
    pub fn add(&mut self, now: Instant, progress: Progress) {
        // What was begun again counts from there.
        if self.seen.back().is_some_and(|(_, done)| progress.done_bytes < *done) {
            self.seen.clear();
        }
        if self.seen.back().is_none_or(|(at, _)| now - *at >= STEP) {
            self.seen.push_back((now, progress.done_bytes));
        }
        while self.seen.len() > 2 && self.seen.front().is_some_and(|(at, _)| now - *at > WINDOW) {
            self.seen.pop_front();
        }
    }

    /// Bytes per second.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        let ((first, from), (last, to)) = (self.seen.front()?, self.seen.back()?);
        let us = (*last - *first).as_micros();
        u64::try_from(u128::from(to - from) * 1_000_000 / Some(us).filter(|us| *us > 0)?).ok()
    }

    /// How long it takes still, at that rate.
    #[must_use]
    pub fn left(&self, progress: Progress) -> Option<Duration> {
        let bytes = progress.total_bytes.saturating_sub(progress.done_bytes);
        Some(Duration::from_secs(bytes.checked_div(self.rate()?)?))
    }

    /// A line, if one is due: what is soon over needs none.
    pub fn line(&mut self, now: Instant, progress: Progress) -> Option<String> {
        let said_at = *self.said_at.get_or_insert(now);
        (now - said_at >= LINES).then(|| {
            self.said_at = Some(now);
            self.text(progress)
        })
    }

    fn text(&self, progress: Progress) -> String {
        let Progress { work, done_bytes, total_bytes } = progress;
        let percent = (u128::from(done_bytes) * 100).checked_div(total_bytes.into()).unwrap_or(100);
        let rate = self.rate().map_or_else(String::new, |rate| format!(", {} MiB/s", rate >> 20));
        let left = self.left(progress).map_or_else(String::new, |left| format!(", {} s left", left.as_secs()));
        format!("{}  {} of {} MiB ({percent} %){rate}{left}", name(work), done_bytes >> 20, total_bytes >> 20)
    }
}

fn name(work: Work) -> &'static str {
    match work {
        Work::FirstCopy => "first copy",
        Work::Resync => "resync",
        Work::Commit => "commit",
    }
}

/// Shows it on standard error.
#[derive(Debug)]
pub struct Display {
    meter: Meter,
    bar: Option<ProgressBar>,
    silent: bool,
}

impl Display {
    /// A bar if standard error is a terminal, lines otherwise, nothing if `silent`.
    #[must_use]
    pub fn new(silent: bool) -> Self {
        let bar = (!silent && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{prefix}  {bar:32} {bytes} of {total_bytes}  {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self { meter: Meter::default(), bar, silent }
    }

    /// So much is done now.
    pub fn show(&mut self, progress: Progress) {
        let now = engine_clock();
        self.meter.add(now, progress);
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(name(progress.work));
                bar.set_length(progress.total_bytes);
                bar.set_position(progress.done_bytes);
                let rate = self.meter.rate().map_or_else(String::new, |rate| format!("{} MiB/s", rate >> 20));
                let left = self.meter.left(progress).map_or(String::new(), |l| format!(", {} s left", l.as_secs()));
                bar.set_message(format!("{rate}{left}"));
            }
            None if self.silent => {}
            None => _ = self.meter.line(now, progress).is_some_and(|line| say::err(&line)),
        }
    }

    /// It is over.
    pub fn end(&mut self) {
        self.bar.iter().for_each(ProgressBar::finish_and_clear);
        self.meter = Meter::default();
    }
}

/// Whatever ends it: what is said next must not stand behind half a bar.
impl Drop for Display {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(mib: u64) -> Progress {
        Progress { work: Work::FirstCopy, done_bytes: mib << 20, total_bytes: 1000 << 20 }
    }

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    #[test]
    fn rate_and_time_left_are_those_of_the_last_seconds() {
        let mut meter = Meter::default();
        meter.add(at(0), progress(0));
        assert_eq!((meter.rate(), meter.left(progress(0))), (None, None), "nothing is known yet");
        meter.add(at(1000), progress(100));
        assert_eq!(meter.rate(), Some(100 << 20));
        assert_eq!(meter.left(progress(100)), Some(Duration::from_secs(9)));
        for second in 2..=20 {
            meter.add(at(second * 1000), progress(100 + second * 10));
        }
        assert_eq!(meter.rate(), Some(10 << 20), "the fast second is forgotten");
        meter.add(at(21_000), progress(5));
        assert_eq!(meter.rate(), None, "begun again");
        meter.add(at(30_000), progress(5));
        assert_eq!((meter.rate(), meter.left(progress(5))), (Some(0), None), "it stands still, and never ends");
    }

    #[test]
    fn lines_come_at_a_bounded_rate() {
        let mut meter = Meter::default();
        let mut lines = Vec::new();
        for ms in (0..10_000).step_by(20) {
            let progress = progress(ms / 10);
            meter.add(at(ms), progress);
            lines.extend(meter.line(at(ms), progress));
        }
        assert_eq!(lines.len(), 4, "{lines:#?}");
        assert_eq!(lines[0], "first copy  200 of 1000 MiB (20 %), 100 MiB/s, 8 s left");
    }
}
