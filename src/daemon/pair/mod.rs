//! The two sides of a protected guest, joined: machine, guest, disk and packets of one host.
//!
//! ```text
//!             PrimarySide                                          SecondarySide
//!  colo::Primary  Domain  Mirrors  Proxy     ◀── links ──▶    colo::Secondary  Domain  RamCache  Replicas  Rewriter
//! ```
//!
//! A side is synchronous: `handle_*(now, input)` in, `poll_effect()` out, like the machines it joins. It *does*
//! touch the guest and the disk, which block, but no socket, no thread and no clock; so the simulator in
//! `tests/sim` runs exactly this code, and the [engine](super::engine) adds only threads and wires.

pub mod primary;
pub mod secondary;
mod staged;
mod survivor;

#[cfg(test)]
mod tests;

use crate::clock::Instant;
use crate::colo::Cause;
use crate::compare;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Reads the monotonic clock, for measuring what a call took.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// Locks what a thread that panicked may have held: every holder leaves plain data valid at every step.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Samples kept for percentiles.
const SAMPLES_MAX: usize = 1 << 16;

/// Durations of which the latest are kept.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    micros: Vec<u32>,
    next: usize,
    max_micros: u32,
}

impl Samples {
    /// Adds one.
    pub fn add(&mut self, duration: Duration) {
        let micros = u32::try_from(duration.as_micros()).unwrap_or(u32::MAX);
        self.max_micros = self.max_micros.max(micros);
        if self.micros.len() < SAMPLES_MAX {
            self.micros.push(micros);
        } else {
            self.micros[self.next] = micros;
            self.next = (self.next + 1) % SAMPLES_MAX;
        }
    }

    /// The `percent`-th percentile in µs, or `None` without samples.
    #[must_use]
    pub fn percentile_us(&self, percent: u32) -> Option<u32> {
        let mut samples = self.micros.clone();
        let at = (samples.len() * percent as usize).div_ceil(100).saturating_sub(1);
        (!samples.is_empty()).then(|| *samples.select_nth_unstable(at).1)
    }

    /// The largest ever added, in µs.
    #[must_use]
    pub fn max_us(&self) -> Option<u32> {
        (!self.micros.is_empty()).then_some(self.max_micros)
    }
}

/// Why the comparator wants a checkpoint, in the machine's words.
fn cause_of(cause: compare::Cause) -> Cause {
    match cause {
        compare::Cause::PayloadDiffers => Cause::PayloadDiffers,
        compare::Cause::Aged => Cause::Aged,
        compare::Cause::OneSided => Cause::OneSided,
        compare::Cause::Reused => Cause::Reused,
        compare::Cause::BoundReached => Cause::PacketBound,
        compare::Cause::Unparsable(_) => Cause::Unparsable,
    }
}
