//! The steps of a checkpoint, and when each was done.
//!
//! ```text
//!   requested ── reply ──▶ suspend ── pause ──▶ resume
//!                             └── capture ──▶ captured ── transfer ──▶ owned, released ── load ──▶ loaded
//! ```
//!
//! The trap: in the classic order the guest is resumed after the load, so a pause is known last. A checkpoint is told
//! of once, when all of its steps are known, or when the pair ended after it was owned.

use super::{PrimarySide, State};
use crate::clock::Instant;
use crate::colo::Cause;
use crate::colo::message::Message;
use crate::compare::FlowKey;
use crate::daemon::pair::Samples;
use std::collections::VecDeque;
use std::time::Duration;

/// Captures that the dirty rate is measured over.
const RECENT_MAX: usize = 16;

/// A checkpoint that the secondary owns.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Taken {
    /// Counts them, from 1.
    pub number: u64,
    /// Why.
    pub cause: Cause,
    /// The flow whose difference that was.
    pub flow: Option<FlowKey>,
    /// Pages in it.
    pub pages: u64,
    /// Bytes of device state in it.
    pub devices_bytes: u64,
    /// When the secondary came to own it.
    pub owned_at: Instant,
    /// From the capture before to this one.
    pub interval: Option<Duration>,
    /// From the request to the suspend: the secondary stopped its guest.
    pub reply: Duration,
    /// How long the guest stood still.
    pub pause: Duration,
    /// From the suspend until everything was copied out.
    pub capture: Duration,
    /// From then until the secondary owned it, and its packets were released.
    pub transfer: Duration,
    /// From the suspend until its packets were released.
    pub release: Duration,
    /// From then until the secondary had loaded it; unknown if the pair ended first.
    pub load: Option<Duration>,
}

/// Follows the steps of the checkpoints of a protection.
#[derive(Clone, Debug, Default)]
pub(super) struct Steps {
    requested_at: Option<Instant>,
    /// The flow that has diverged since the last capture.
    diverged: Option<FlowKey>,
    /// Suspend, end of the capture, pages, bytes of device state, interval; of the one under way.
    captured: Option<(Instant, Instant, u64, u64, Option<Duration>)>,
    /// The flow that had diverged when it was captured.
    captured_diverged: Option<FlowKey>,
    last_capture_at: Option<Instant>,
    /// The suspend of the last one that the secondary owns.
    owned_from: Option<Instant>,
    taken: Option<Taken>,
    last: Option<Taken>,
    recent: VecDeque<(Instant, u64)>,
    interval: Samples,
}

impl Steps {
    pub(super) fn said(&mut self, now: Instant, message: Message) {
        if message == Message::CheckpointRequest {
            self.requested_at = Some(now);
        }
    }

    /// The comparator asks for a checkpoint, because of this flow if it can be told: once in an epoch.
    pub(super) fn diverged(&mut self, flow: Option<FlowKey>) {
        self.diverged = flow;
    }

    /// `pages` were found dirty between the capture before and this one.
    pub(super) fn captured(&mut self, begun: Instant, ended: Instant, pages: usize, devices_bytes: usize) {
        let interval = self.last_capture_at.replace(begun).map(|before| begun - before);
        self.captured = Some((begun, ended, pages as u64, devices_bytes as u64, interval));
        self.captured_diverged = self.diverged.take();
        interval.iter().for_each(|interval| self.interval.add(*interval));
        self.recent.push_back((begun, pages as u64));
        if self.recent.len() > RECENT_MAX {
            self.recent.pop_front();
        }
    }

    pub(super) fn released(&mut self, now: Instant, ended_epoch: u64, cause: Cause) {
        let Some((begun, captured, pages, devices_bytes, interval)) = self.captured.take() else { return };
        self.owned_from = Some(begun);
        self.taken = Some(Taken {
            number: ended_epoch + 1,
            cause,
            // Somebody else may have been the first to ask.
            flow: self.captured_diverged.take().filter(|_| cause.is_difference()),
            pages,
            devices_bytes,
            owned_at: now,
            interval,
            reply: self.requested_at.take().map_or(Duration::ZERO, |at| begun - at),
            pause: Duration::ZERO,
            capture: captured - begun,
            transfer: now - captured,
            release: now - begun,
            // The word that the first one is owned comes when it is loaded.
            load: (ended_epoch == 0).then_some(Duration::ZERO),
        });
    }

    pub(super) fn heard(&mut self, now: Instant, message: Message) {
        if let (Message::VmstateLoaded, Some(taken)) = (message, &mut self.taken) {
            taken.load.get_or_insert(now - taken.owned_at);
        }
    }

    fn poll(&mut self, pause: Duration, is_over: bool) -> Option<Taken> {
        let taken = self.taken.take_if(|taken| taken.load.is_some() || is_over)?;
        let taken = Taken { pause, ..taken };
        self.last = Some(taken.clone());
        Some(taken)
    }

    fn dirty_pages_per_s(&self) -> Option<u64> {
        let ((first, _), (last, _)) = (self.recent.front()?, self.recent.back()?);
        let pages: u64 = self.recent.iter().skip(1).map(|(_, pages)| pages).sum();
        let us = (*last - *first).as_micros() as u64;
        pages.saturating_mul(1_000_000).checked_div(us)
    }
}

impl PrimarySide {
    /// The checkpoint that was taken since the last call, once all of its steps are known.
    pub fn poll_taken(&mut self) -> Option<Taken> {
        let is_over = matches!(self.machine.state(), State::Exited(_));
        self.steps.poll(self.last_pause, is_over)
    }

    /// The last checkpoint that [`Self::poll_taken`] told of.
    #[must_use]
    pub fn last_taken(&self) -> Option<&Taken> {
        self.steps.last.as_ref()
    }

    /// The moment in the guest's life that the secondary could go on from. It came to own it later: the state was
    /// copied out, sent and received in between.
    #[must_use]
    pub fn recovery_point(&self) -> Option<Instant> {
        self.steps.owned_from
    }

    /// Times between the beginnings of two captures.
    #[must_use]
    pub fn intervals(&self) -> &Samples {
        &self.steps.interval
    }

    /// How many pages the guest writes to a second, over the last captures.
    #[must_use]
    pub fn dirty_pages_per_s(&self) -> Option<u64> {
        self.steps.dirty_pages_per_s()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_checkpoint_is_told_of_once_with_the_time_of_each_step() {
        let mut steps = Steps::default();
        steps.captured(at(10), at(13), 400, 64);
        assert_eq!(steps.poll(ms(4), false), None, "nobody owns it");
        steps.released(at(20), 0, Cause::First);
        let first = steps.poll(ms(4), false).unwrap();
        assert_eq!((first.number, first.cause, first.pages, first.devices_bytes), (1, Cause::First, 400, 64));
        assert_eq!((first.reply, first.interval, first.load), (ms(0), None, Some(ms(0))));
        assert_eq!(steps.poll(ms(4), false), None, "once");

        steps.said(at(100), Message::CheckpointRequest);
        steps.captured(at(110), at(112), 30, 64);
        assert_eq!(steps.owned_from, Some(at(10)), "captured is not owned");
        steps.released(at(131), 1, Cause::Delay);
        assert_eq!(steps.owned_from, Some(at(110)), "what it holds is as old as its suspend");
        assert_eq!(steps.poll(ms(5), false), None, "it is not loaded");
        // The next one may have been requested in the same breath.
        steps.heard(at(140), Message::VmstateLoaded);
        steps.said(at(140), Message::CheckpointRequest);
        let second = steps.poll(ms(5), false).unwrap();
        assert_eq!((second.number, second.cause, second.interval), (2, Cause::Delay, Some(ms(100))));
        assert_eq!((second.reply, second.pause, second.capture), (ms(10), ms(5), ms(2)));
        assert_eq!((second.transfer, second.release, second.load), (ms(19), ms(21), Some(ms(9))));
        assert_eq!(steps.last, Some(second));
        assert_eq!(steps.dirty_pages_per_s(), Some(300), "30 pages in 100 ms; the first copy's do not count");

        steps.captured(at(210), at(212), 10, 64);
        steps.released(at(220), 2, Cause::Command);
        let cut_off = steps.poll(ms(5), true).unwrap();
        assert_eq!((cut_off.load, cut_off.reply), (None, ms(70)), "owned, and the pair ended before it was loaded");
    }

    #[test]
    fn a_difference_names_its_flow_and_no_later_checkpoint_does() {
        let any = core::net::IpAddr::from([10, 0, 0, 2]);
        let (protocol, src_port, dst_port) = (6, 80, 40000);
        let flow = FlowKey { vlans: [0; 2], src: any, dst: any, protocol, src_port, dst_port, transaction: 0 };
        let mut steps = Steps::default();
        let mut taken = |diverged: Option<FlowKey>, cause: Cause, again: Option<FlowKey>| {
            diverged.into_iter().for_each(|flow| steps.diverged(Some(flow)));
            steps.captured(at(10), at(13), 400, 64);
            // What diverges from here on asks for the next one.
            again.into_iter().for_each(|flow| steps.diverged(Some(flow)));
            steps.released(at(20), 1, cause);
            steps.poll(ms(4), true).unwrap().flow
        };
        assert_eq!(taken(Some(flow), Cause::Aged, None), Some(flow));
        assert_eq!(taken(None, Cause::Unparsable, None), None, "what cannot be parsed is of no flow");
        assert_eq!(taken(Some(flow), Cause::Delay, None), None, "it was due anyway");
        assert_eq!(taken(None, Cause::FramesLost, Some(flow)), None);
        assert_eq!(taken(None, Cause::PayloadDiffers, None), Some(flow));
    }

    #[test]
    fn a_checkpoint_that_nobody_came_to_own_is_not_told_of() {
        let mut steps = Steps::default();
        steps.captured(at(10), at(13), 400, 64);
        assert_eq!(steps.poll(ms(4), true), None);
        assert_eq!(steps.dirty_pages_per_s(), None, "one capture says nothing about a rate");
    }
}
