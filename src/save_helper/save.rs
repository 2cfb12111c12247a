//! Writes a domain's image.
//!
//! ```text
//! headers, policies, STATIC_DATA_END
//!   plain            log on ─ every page ─┐
//!   plain, live      log on ─ rounds ─────┴ suspend ─ pages written since ─ state ─ END
//!   Remus            log on ─ rounds ─┬ suspend ─ pages written since ─ state ─ CHECKPOINT ┐
//!                                     └ libxl's part ◀─ all written ◀─ libxl resumes ◀─────┘
//! ```
//!
//! Order and callbacks are libxc's (xen `tools/libs/guest/xg_sr_save.c`), but for what the receiver cannot see. A guest
//! that is saved runs while its memory is copied, as one that is migrated does, if it can and nobody else has its log:
//! `xl save` of a guest that is being replicated must not take the replication's log away. And a Remus guest is
//! resumed when its pages are copied, while the stream is still being written. libxl lets the checkpoint's output go
//! only after its own part, which waits until everything is written.
//!
//! The trap: whatever goes wrong, the log must be switched off, or the guest stays slow and cannot be saved again.

use super::guest::Source;
use super::streamer::Writer;
use super::{Calls, Failure};
use crate::bitmap::Bitmap;
use crate::image::helper::{Level, Message, SaveJob, StreamType};
use crate::image::pages::encode_page_head;
use crate::image::precopy::Precopy;
use crate::image::{DomainHeader, DomainType, ImageHeader, PageEntry, PageType, Record};
use crate::page::{BATCH_PAGES, PAGE_SIZE, Pfn};
use crate::scan::Scan;
use bytes::BytesMut;
use std::io::{Read, Write};
use std::sync::atomic::AtomicBool;

/// Bytes copied and not written, while a plain stream is written.
const PLAIN_BUDGET_BYTES: usize = 32 << 20;
/// The same of Remus: what a guest may write between two checkpoints before the wire is in its pause.
const REMUS_BUDGET_BYTES: usize = 128 << 20;

/// How a save ended that did not fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Saved {
    /// The image is whole.
    Whole,
    /// libxl wanted no further checkpoint. libxc reports this as success too, without having written END.
    Stopped,
}

/// Saves `guest` to `stream`, unless `cancel` becomes true.
pub fn save<S: Source, R: Read, W: Write>(
    job: &SaveJob,
    guest: &mut S,
    calls: &mut Calls<R, W>,
    stream: impl Write + Send + 'static,
    cancel: &AtomicBool,
) -> Result<Saved, Failure> {
    let budget = match job.stream {
        StreamType::Colo => return Err(Failure::Unsupported("COLO under libxl is not done here; use xl-colo protect")),
        StreamType::Remus => REMUS_BUDGET_BYTES,
        StreamType::Plain => PLAIN_BUDGET_BYTES,
    };
    let nr_gpfns = guest.nr_gpfns()?;
    let mut saver = Saver {
        job,
        out: Writer::new(stream, budget, cancel),
        dirty: Bitmap::new(nr_gpfns),
        later: Bitmap::new(nr_gpfns),
        is_logging: false,
        guest,
        calls,
    };
    let saved = saver.run();
    saver.stop_logging();
    saved
}

struct Saver<'a, S, R, W> {
    job: &'a SaveJob,
    guest: &'a mut S,
    calls: &'a mut Calls<R, W>,
    out: Writer<'a>,
    /// What the next round sends.
    dirty: Bitmap,
    /// What could not be read in this round and must be sent in the next.
    later: Bitmap,
    is_logging: bool,
}

impl<S: Source, R: Read, W: Write> Saver<'_, S, R, W> {
    fn run(&mut self) -> Result<Saved, Failure> {
        self.calls.log(Level::Info, 0, &format!("saving domain {}", self.job.domid));
        let mut head = BytesMut::new();
        ImageHeader { version: ImageHeader::VERSION }.encode(&mut head);
        DomainHeader { kind: DomainType::Hvm, xen: self.guest.xen_version() }.encode(&mut head);
        let policy = self.guest.cpu_policy()?;
        Record::CpuidPolicy(policy.leaves).encode(&mut head);
        Record::MsrPolicy(policy.msrs).encode(&mut head);
        Record::StaticDataEnd.encode(&mut head);
        self.out.push(head, Vec::new())?;

        if self.job.stream == StreamType::Remus {
            return self.checkpoints();
        }
        if self.job.live {
            self.rounds(Precopy::default())?;
        } else if self.guest.log_dirty_if_free()? {
            self.is_logging = true;
            self.rounds(Precopy::once())?;
        }
        self.suspend()?;
        if self.is_logging {
            self.take_dirty()?;
            self.send(Round::Again)?;
        } else {
            self.send_whole()?;
        }
        if self.job.debug {
            self.record(&Record::Verify)?;
            self.send_whole()?;
        }
        self.state()?;
        self.record(&Record::End)?;
        let bytes = self.out.flush()?;
        self.calls.log(Level::Detail, 0, &format!("the image is {bytes} bytes"));
        Ok(Saved::Whole)
    }

    /// Remus: one checkpoint after another, until libxl wants no more.
    fn checkpoints(&mut self) -> Result<Saved, Failure> {
        self.rounds(Precopy::default())?;
        loop {
            self.suspend()?;
            self.take_dirty()?;
            self.send(Round::Again)?;
            self.state()?;
            self.record(&Record::Checkpoint)?;
            if self.calls.ask(&Message::Postcopy, "resume the domain")? <= 0 {
                return Ok(Saved::Stopped);
            }
            self.out.flush()?;
            if self.calls.ask(&Message::Checkpoint, "write its part of the checkpoint")? <= 0 {
                return Ok(Saved::Stopped);
            }
        }
    }

    /// Sends pages while the guest runs, until stopping it is worth its price.
    fn rounds(&mut self, mut policy: Precopy) -> Result<(), Failure> {
        let qemu = Message::SwitchQemuLogdirty { domid: self.job.domid.into(), enable: true };
        if self.calls.expects(&qemu) {
            // The device model's own writes are not in Xen's log.
            let what = "have the device model log what it writes";
            match self.calls.ask(&qemu, what)? {
                0 => {}
                reply => return Err(Failure::Declined { what, reply }),
            }
        }
        if !self.is_logging {
            self.guest.log_dirty(true)?;
            self.is_logging = true;
        }
        let mut sent = self.send_whole()?;
        loop {
            self.take_dirty()?;
            let dirty = self.dirty.count();
            let text = format!("round {}: {sent} pages sent, {dirty} written meanwhile", policy.rounds() + 1);
            self.calls.log(Level::Detail, 0, &text);
            if !policy.goes_on(sent, dirty) {
                return Ok(());
            }
            sent = self.send(Round::Again)?;
        }
    }

    /// Sends every page there is.
    fn send_whole(&mut self) -> Result<u64, Failure> {
        let mut scan = Scan::new(self.guest.nr_gpfns()?.min(self.dirty.bits()), self.guest.total_pages()?);
        let mut types = Vec::with_capacity(BATCH_PAGES);
        while let Some(batch) = scan.next_batch() {
            let gfns: Vec<u64> = batch.collect();
            types.clear();
            self.guest.page_types(&gfns, &mut types)?;
            let there: Vec<_> = gfns.iter().zip(&types).filter(|(_, kind)| **kind != PageType::XTAB).collect();
            scan.found(there.len() as u64);
            there.into_iter().for_each(|(gfn, _)| self.dirty.set(Pfn(*gfn)));
        }
        self.send(Round::Whole)
    }

    fn suspend(&mut self) -> Result<(), Failure> {
        let what = "suspend the domain";
        match self.calls.ask(&Message::Suspend, what)? {
            0 => Err(Failure::Declined { what, reply: 0 }),
            _ if self.guest.is_suspended()? => Ok(()),
            reply => Err(Failure::Declined { what: "suspend the domain, which has not shut down", reply }),
        }
    }

    /// Adds what was written to what the next round sends.
    fn take_dirty(&mut self) -> Result<(), Failure> {
        let nr_gpfns = self.guest.nr_gpfns()?.max(self.dirty.bits());
        if nr_gpfns > self.dirty.bits() {
            // Memory that came after the count was taken has never been sent, written or not.
            for bitmap in [&mut self.dirty, &mut self.later] {
                bitmap.grow(nr_gpfns);
            }
        }
        let mut words = vec![0; nr_gpfns.div_ceil(64) as usize];
        self.guest.take_dirty(&mut words)?;
        self.dirty.union_words(&words);
        self.later.drain_into(&mut self.dirty);
        Ok(())
    }

    /// Sends the pages of `dirty`, which is empty afterwards. Returns how many had contents.
    fn send(&mut self, round: Round) -> Result<u64, Failure> {
        let total = self.dirty.count();
        let none = Bitmap::new(self.dirty.bits());
        let dirty = std::mem::replace(&mut self.dirty, none);
        let (mut batch, mut types) = (Vec::with_capacity(BATCH_PAGES), Vec::with_capacity(BATCH_PAGES));
        let (mut done, mut sent) = (0, 0);
        let mut pfns = dirty.iter().map(|pfn| pfn.0);
        loop {
            batch.clear();
            batch.extend(pfns.by_ref().take(BATCH_PAGES));
            if batch.is_empty() {
                return Ok(sent);
            }
            types.clear();
            self.guest.page_types(&batch, &mut types)?;
            let entries = batch.iter().zip(&types).map(|(pfn, kind)| PageEntry { pfn: *pfn, kind: *kind });
            // A page that is not there is news only to a receiver that has been sent one.
            let entries: Vec<_> =
                entries.filter(|entry| round != Round::Whole || entry.kind != PageType::XTAB).collect();
            sent += self.send_batch(entries)?;
            done += batch.len() as u64;
            self.calls.progress("memory", done, total);
        }
    }

    fn send_batch(&mut self, mut entries: Vec<PageEntry>) -> Result<u64, Failure> {
        let gfns: Vec<_> = entries.iter().filter(|entry| entry.kind.has_contents()).map(|entry| entry.pfn).collect();
        let (mut pages, mut holes) = (self.out.spare().take(), Vec::new());
        pages.clear();
        if !gfns.is_empty() {
            pages.reserve_exact(BATCH_PAGES * PAGE_SIZE);
            self.guest.read(&gfns, &mut pages, &mut holes)?;
        }
        if !holes.is_empty() {
            // The guest gave a page back between two questions. That is its right while it runs.
            if self.guest.is_suspended()? {
                return Err(Failure::Incomplete("a page of the suspended domain cannot be read"));
            }
            holes.iter().filter_map(|at| gfns.get(*at)).for_each(|pfn| self.later.set(Pfn(*pfn)));
            entries.retain(|entry| !entry.kind.has_contents() || !self.later.get(Pfn(entry.pfn)));
            without(&mut pages, &holes);
        }
        if entries.is_empty() {
            self.out.spare().give(pages);
            return Ok(0);
        }
        let sent = (pages.len() / PAGE_SIZE) as u64;
        let mut head = BytesMut::new();
        encode_page_head(&entries, &mut head);
        self.out.push(head, pages)?;
        Ok(sent)
    }

    /// What of the domain is not in its memory.
    fn state(&mut self) -> Result<(), Failure> {
        let mut out = BytesMut::new();
        Record::TscInfo(self.guest.tsc()?).encode(&mut out);
        Record::HvmContext(self.guest.hvm_context()?).encode(&mut out);
        Record::HvmParams(self.guest.hvm_params()?).encode(&mut out);
        self.out.push(out, Vec::new())
    }

    fn record(&mut self, record: &Record) -> Result<(), Failure> {
        let mut out = BytesMut::new();
        record.encode(&mut out);
        self.out.push(out, Vec::new())
    }

    fn stop_logging(&mut self) {
        if !std::mem::take(&mut self.is_logging) {
            return;
        }
        if let Err(error) = self.guest.log_dirty(false) {
            self.calls.log(Level::Warn, error.errno, &format!("log-dirty stays on: {error}"));
        }
        let qemu = Message::SwitchQemuLogdirty { domid: self.job.domid.into(), enable: false };
        if self.calls.expects(&qemu) && self.calls.ask(&qemu, "have the device model stop its log").is_err() {
            self.calls.log(Level::Warn, 0, "the device model's log stays on");
        }
    }
}

/// Which pass over the pages it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Round {
    /// The first: every page.
    Whole,
    /// Pages that have been written since.
    Again,
}

/// Takes the pages at `holes`, which are in order, out of `pages`.
fn without(pages: &mut Vec<u8>, holes: &[usize]) {
    let mut to = 0;
    for at in 0..pages.len() / PAGE_SIZE {
        if holes.binary_search(&at).is_err() {
            pages.copy_within(at * PAGE_SIZE..(at + 1) * PAGE_SIZE, to * PAGE_SIZE);
            to += 1;
        }
    }
    pages.truncate(to * PAGE_SIZE);
}
