//! How a state gets into a guest that stands by: page by page while it has none, and in slices once it is owned.
//!
//! ```text
//!   first copy   pages ──▶ cache and guest
//!   later        pages ──▶ staged ── owned ──▶ cache ── what either guest has changed ──▶ guest ── devices ──▶ it is that state
//! ```
//!
//! The trap: what this guest wrote by itself since the last state goes back, too, though the primary's never touched it.

use super::SecondarySide;
use crate::bitmap::Bitmap;
use crate::clock::Instant;
use crate::colo::Loss;
use crate::daemon::pair::staged::Load;
use crate::daemon::pair::survivor::Latest;
use crate::hypervisor::DomainError;
use crate::page::{BATCH_PAGES, PageBatch, Pfn};
use std::sync::atomic::Ordering;

impl SecondarySide {
    /// Takes pages of the first copy straight into cache and guest: there is no state yet that they could spoil,
    /// and the load at its end, for which the primary's output waits, is left with little to do.
    pub(super) fn join_pages(&mut self, now: Instant, batch: &PageBatch) {
        self.stats.pages += batch.len() as u64;
        for (pfn, page) in batch.iter() {
            self.cache.store(pfn, page);
        }
        if let Err(error) = self.domain.write_pages(&batch.pfns, &batch.bytes) {
            self.machine.handle_loss(now, Loss::Local(error.to_string()));
        }
    }

    pub(super) fn stage(&mut self, now: Instant, pages: usize) {
        self.staged.pages += pages as u64;
        // Each page belongs into a checkpoint once, which bounds what a peer can make us keep.
        if self.staged.pages > self.domain.nr_pages() {
            let violation = "more pages in a checkpoint than the guest has".to_owned();
            self.machine.handle_loss(now, Loss::Violation(violation));
        }
    }

    fn cache_pages(&mut self, batch: &PageBatch) {
        for (pfn, page) in batch.iter() {
            self.cache.store(pfn, page);
            self.changed.set(pfn);
        }
    }

    fn cache_zeroes(&mut self, pfns: &[Pfn]) {
        for pfn in pfns {
            self.cache.store_zero(*pfn);
            self.changed.set(*pfn);
        }
    }

    pub(super) fn begin_load(&mut self, now: Instant) {
        let staged = std::mem::take(&mut self.staged);
        for batch in &staged.batches {
            self.cache_pages(batch);
        }
        self.cache_zeroes(&staged.zero);
        self.stats.checkpoints += 1;
        // The guest may have written pages that the primary did not: they go back to the checkpoint as well. Before
        // the first state it has never run, and what is dirty is what was just written into it.
        let mut dirty = Bitmap::new(self.domain.nr_pages());
        let taken = self.domain.take_dirty(&mut dirty);
        if self.machine.epoch() > 1 {
            self.changed.union(&dirty);
        }
        if let Err(error) = taken {
            self.machine.handle_applied(now, Err(error.to_string()));
            return;
        }
        self.carried = staged.carried;
        self.said = Latest::default();
        staged.output.into_iter().for_each(|frame| self.said.keep(now, frame));
        let pages = self.changed.iter().collect();
        self.changed.clear_all();
        self.load = Some(Load { begun: (self.clock)(), pages, done: 0, devices: staged.devices });
    }

    /// Puts one batch into the guest; `Some` when the load is finished.
    pub(super) fn load_slice(&mut self) -> Result<Option<()>, DomainError> {
        let Some(load) = self.load.as_mut() else { return Ok(None) };
        let end = load.pages.len().min(load.done + BATCH_PAGES);
        let pfns = &load.pages[load.done..end];
        if !pfns.is_empty() {
            self.cache.put(&mut *self.domain, pfns)?;
            load.done = end;
            return Ok(None);
        }
        // What these writes dirtied is the checkpoint itself.
        self.domain.take_dirty(&mut self.changed)?;
        self.changed.clear_all();
        self.domain.load_devices(&load.devices)?;
        self.rewriter.checkpoint();
        self.epoch.store(self.machine.epoch(), Ordering::SeqCst);
        self.stats.last_load = (self.clock)() - load.begun;
        self.inbound.retain(|(epoch, _)| *epoch >= self.machine.epoch());
        self.inbound_bytes = self.inbound.iter().map(|(_, frame)| frame.len()).sum();
        Ok(Some(()))
    }
}
