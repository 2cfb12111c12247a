//! The pause: the guest stands still, and what changed since the last time is copied out.
//!
//! ```text
//!   make room ─▶ suspend ─▶ mark packets and disk ─▶ dirty pages ─▶ devices ─▶ resume
//!   (it runs)   └──────────────────── the guest stands still ───────────────────┘
//! ```

use super::{Effect, PrimarySide};
use crate::clock::Instant;
use crate::colo::fallback::Release;
use crate::colo::stream::OUTPUT_MAX_BYTES;
use crate::hypervisor::DomainError;
use crate::page::PAGE_SIZE;
use std::sync::atomic::Ordering;

/// Pages that may become dirty between finding room for a capture and the suspend, before the room is too small.
const ROOM_MARGIN_PAGES: usize = 256;

impl PrimarySide {
    /// Finds room for what is dirty so far while the guest still runs. Memory that is new to this process is faulted
    /// in page by page, which takes longer than the copy it is for.
    fn make_room(&mut self) -> Result<(), DomainError> {
        self.domain.take_dirty(&mut self.dirty)?;
        let pages = self.dirty.count() as usize + ROOM_MARGIN_PAGES;
        self.capture.clear();
        self.capture.pfns.reserve(pages);
        if self.capture.bytes.capacity() < pages * PAGE_SIZE {
            self.capture.bytes.resize(pages * PAGE_SIZE, 0);
            self.capture.bytes.clear();
        }
        Ok(())
    }

    /// The pause: nothing of the wire and nothing that allocates is in it.
    pub(super) fn capture(&mut self, resume: bool) -> Result<(), DomainError> {
        self.make_room()?;
        let begun = (self.clock)();
        self.domain.suspend()?;
        let suspended = (self.clock)();
        let epoch = self.machine.epoch();
        self.epoch.store(epoch, Ordering::SeqCst);
        self.choose_release(begun, epoch);
        let ended = self.mirrors.mark();
        assert_eq!(ended + 1, self.disk_epoch_base + epoch, "packets and disk are marked together");
        self.domain.take_dirty(&mut self.dirty)?;
        let listed = (self.clock)();
        self.capture.pfns.extend(self.dirty.iter());
        self.domain.read_pages(&self.capture.pfns, &mut self.capture.bytes)?;
        let copied = (self.clock)();
        let devices = self.domain.save_devices()?;
        let saved = (self.clock)();
        self.suspended_at = Some(begun);
        self.steps.captured(begun, saved, self.capture.len(), devices.len());
        if resume {
            self.resume()?;
        }
        tracing::debug!(
            pages = self.capture.len(),
            suspend_us = (suspended - begun).as_micros(),
            dirty_us = (listed - suspended).as_micros(),
            copy_us = (copied - listed).as_micros(),
            devices_us = (saved - copied).as_micros(),
            resume_us = ((self.clock)() - saved).as_micros(),
            "captured"
        );
        self.dirty.clear_all();
        self.output_due = None;
        self.stats.pages += self.capture.len() as u64;
        self.devices = devices;
        Ok(())
    }

    /// The rest of what was captured, and what the survivor needs besides to go on where this host stopped.
    pub(super) fn send_devices(&mut self) {
        let output = self.proxy.waiting(self.machine.epoch() - 1, OUTPUT_MAX_BYTES);
        if !self.carried.is_empty() {
            self.effects.push_back(Effect::Carried(std::mem::take(&mut self.carried)));
        }
        if !output.is_empty() {
            self.effects.push_back(Effect::Output(output));
        }
        self.effects.push_back(Effect::Devices(std::mem::take(&mut self.devices)));
    }

    /// How the output of the epoch that begins is released: a capture is the only moment at which it may change.
    fn choose_release(&mut self, now: Instant, epoch: u64) {
        let Some(fallback) = &mut self.fallback else { return };
        let too_little = self.resumed_at.is_some_and(|at| fallback.runs_too_little(now - at, self.last_pause));
        let hasty = self.machine.cause().is_difference() && too_little;
        let before = fallback.release();
        let release = fallback.handle_capture(now, hasty);
        if release != before {
            tracing::info!(epoch, ?release, "colo_release");
            self.proxy.set_comparing(epoch, release == Release::Compared);
        }
    }

    pub(super) fn resume(&mut self) -> Result<(), DomainError> {
        self.domain.resume()?;
        if let Some(begun) = self.suspended_at.take() {
            let now = (self.clock)();
            (self.last_pause, self.resumed_at) = (now - begun, Some(now));
            self.stats.pause.add(self.last_pause);
        }
        Ok(())
    }
}
