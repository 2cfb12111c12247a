//! The primary's side: the guest the world sees, its mirror, and the proxy before its output.
//!
//! ```text
//!  network ──▶ outer ──▶ guest ──▶ handle_guest_frame(epoch) ──▶ Proxy ──▶ outer ──▶ ToNetwork
//!                └─ (COLO) ToSecondary(epoch)                      ▲
//!                          handle_secondary_frame(epoch) ──────────┘
//!  guest's disk writes ──▶ Mirrors ──▶ DiskWrite ──▶ handle_disk_acked
//! ```
//!
//! The epoch is one number in three places: the machine counts captures, the guest's frames are tagged with it
//! where they are emitted, the mirror's writes where they are made. All three change inside the capture, while
//! the guest stands still; that is the only moment at which they can change together.

mod capture;
mod link;
mod out;
mod steps;

pub use self::out::{Effect, Stats};
pub use self::steps::Taken;

use super::{Clock, cause_of};
use crate::bitmap::Bitmap;
use crate::carried::Carried;
use crate::clock::Instant;
use crate::colo::arbiter::Answer;
use crate::colo::fallback::{Fallback, Release};
use crate::colo::hello::Mode;
use crate::colo::message::Message;
use crate::colo::primary::{Action, Config, Primary, State};
use crate::colo::{Cause, Exit, Loss};
use crate::compare::{self, Output, Proxy, Rewriter};
use crate::disk::DiskError;
use crate::hypervisor::{Domain, DomainError};
use crate::page::{BATCH_PAGES, PAGE_SIZE, PageBatch, Pfn};
use crate::replica::mirror::resync::ChunkHash;
use crate::replica::mirror::{SyncStep, Target};
use crate::replica::set::Mirrors;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Dirty pages that the first copy leaves to the capture at most, if it gets that low.
const CONVERGED_PAGES: u64 = 512;
/// Rounds over dirty memory after which the first copy is captured whatever is left.
const COPY_ROUNDS_MAX: u32 = 8;
/// How long Remus lets output wait before it asks for a checkpoint, at least.
const OUTPUT_DELAY: Duration = Duration::from_millis(5);

struct FirstCopy {
    todo: Bitmap,
    next: u64,
    rounds: u32,
    disk_done: bool,
    /// All that is left waits for a hash.
    stalled: bool,
}

/// The primary's side of a protected guest.
pub struct PrimarySide {
    machine: Primary,
    mode: Mode,
    release_at_once: bool,
    /// Whether lock-step pays, if it is asked.
    fallback: Option<Fallback>,
    /// When the guest last went on after a pause.
    resumed_at: Option<Instant>,
    domain: Box<dyn Domain>,
    mirrors: Mirrors,
    /// The mirrors count on from protection to protection; this is where they stood when this one began.
    disk_epoch_base: u64,
    proxy: Proxy,
    /// What earlier takeovers have left, between the network and the guest as this pair sees it.
    outer: Rewriter,
    /// The same as it was when the last state was captured.
    carried: Vec<Carried>,
    epoch: Arc<AtomicU64>,
    clock: Clock,
    copy: Option<FirstCopy>,
    dirty: Bitmap,
    capture: PageBatch,
    devices: Vec<u8>,
    suspended_at: Option<Instant>,
    last_pause: Duration,
    /// There is no packet link: nothing can be compared.
    link_down: bool,
    output_due: Option<Instant>,
    generation: u64,
    error: Option<String>,
    effects: VecDeque<Effect>,
    stats: Stats,
    /// The proxy's counters when it ended: an open one counts nothing.
    last_packets: Option<compare::Stats>,
    steps: steps::Steps,
}

impl PrimarySide {
    /// Begins to protect a running guest. `epoch` is what the guest's frames are tagged with at emission; it must
    /// be 0. `targets` are the secondary's disks as they are.
    pub fn new(
        now: Instant,
        config: Config,
        mut domain: Box<dyn Domain>,
        mirrors: Mirrors,
        epoch: Arc<AtomicU64>,
        clock: Clock,
        targets: &[Target],
    ) -> Result<Self, (Box<dyn Domain>, DomainError)> {
        let fits = if config.mode == Mode::Colo { domain.lockstep() } else { Ok(()) };
        if let Err(error) = fits.and_then(|()| domain.logdirty(true)) {
            return Err((domain, error));
        }
        epoch.store(0, Ordering::SeqCst);
        let nr_pages = domain.nr_pages();
        let mut todo = Bitmap::new(nr_pages);
        if let Err(error) = domain.present(&mut todo) {
            let _ = domain.logdirty(false);
            return Err((domain, error));
        }
        let to_copy = todo.count();
        mirrors.attach(targets);
        Ok(Self {
            mode: config.mode,
            release_at_once: config.release_at_once,
            fallback: (config.mode == Mode::Colo && config.min_run_percent > 0)
                .then(|| Fallback::new(config.min_run_percent)),
            resumed_at: None,
            generation: config.claim.expected,
            machine: Primary::new(now, config),
            domain,
            disk_epoch_base: mirrors.epoch(),
            mirrors,
            proxy: Proxy::open(),
            outer: Rewriter::of_survivor(),
            carried: Vec::new(),
            epoch,
            clock,
            copy: Some(FirstCopy { todo, next: 0, rounds: 0, disk_done: false, stalled: false }),
            dirty: Bitmap::new(nr_pages),
            capture: PageBatch::default(),
            devices: Vec::new(),
            suspended_at: None,
            last_pause: Duration::ZERO,
            link_down: false,
            output_due: None,
            error: None,
            effects: VecDeque::new(),
            stats: Stats { copied_pages: (0, to_copy), copy_begun: Some(now), ..Stats::default() },
            last_packets: None,
            steps: steps::Steps::default(),
        })
    }

    /// Whether the guest's packets wait for nothing.
    #[must_use]
    pub fn releases_at_once(&self) -> bool {
        self.release_at_once
    }

    /// Whether lock-step pays, of a pair in lock-step that asks.
    #[must_use]
    pub fn fallback(&self) -> Option<&Fallback> {
        self.fallback.as_ref()
    }

    /// Whether output leaves by checkpoints alone, so that none may be long in coming.
    fn waits_for_checkpoints(&self) -> bool {
        self.mode == Mode::Remus || self.fallback.as_ref().is_some_and(|it| it.release() == Release::Buffered)
    }

    /// The machine, for looking.
    #[must_use]
    pub fn machine(&self) -> &Primary {
        &self.machine
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Counters of the proxy.
    #[must_use]
    pub fn packets(&self) -> compare::Stats {
        self.last_packets.unwrap_or_else(|| self.proxy.stats())
    }

    /// The flows that diverged, worst first, at most `max`.
    #[must_use]
    pub fn flows(&self, max: usize) -> Vec<compare::FlowReport> {
        self.proxy.flows(max)
    }

    /// The guest.
    pub fn domain(&mut self) -> &mut dyn Domain {
        &mut *self.domain
    }

    /// The same, of a guest that has changed hosts before.
    #[must_use]
    pub fn behind(self, outer: Rewriter) -> Self {
        Self { outer, ..self }
    }

    /// Gives the guest up, for whoever runs it next, and what has to be translated for it.
    #[must_use]
    pub fn into_survivor(self) -> (Box<dyn Domain>, Rewriter) {
        (self.domain, self.outer)
    }

    /// Whether the guest runs here, alone, and a new pair may be made for it.
    #[must_use]
    pub fn can_be_protected(&self) -> bool {
        matches!(self.machine.state(), State::Exited(Exit::Alone | Exit::Unprotected))
    }

    /// The generation the guest runs in.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What went wrong on this host, if something did.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Whether the proxy takes more of the guest's frames. While not, leave them in the guest's queue: also while
    /// nobody knows who goes on, since a frame of an epoch that is owned would leave at once.
    #[must_use]
    pub fn ready_for_guest_frames(&self) -> bool {
        self.proxy.ready() && !self.is_undecided()
    }

    /// Whether the peer is lost and nobody knows yet who goes on.
    #[must_use]
    pub fn is_undecided(&self) -> bool {
        matches!(self.machine.state(), State::Arbitrating | State::Held)
    }

    /// The next thing to send or do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let own = [self.output_due, self.outer.poll_timeout()];
        [self.machine.poll_timeout(), self.proxy.poll_timeout()].into_iter().chain(own).flatten().min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.proxy.handle_timeout(now);
        self.outer.handle_timeout(now);
        if self.output_due.is_some_and(|due| due <= now) {
            self.output_due = None;
            let cause = if self.link_down { Cause::PacketLink } else { Cause::OutputWaits };
            self.machine.request_checkpoint(now, cause);
        }
        self.machine.handle_timeout(now);
        self.pump(now);
    }

    /// The guest emitted a frame in `epoch`.
    pub fn handle_guest_frame(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        if self.machine.state() == State::Exited(Exit::Stopped) {
            return;
        }
        let by_checkpoints = self.waits_for_checkpoints() || self.link_down;
        if by_checkpoints && self.machine.is_replicating() && epoch == self.machine.epoch() {
            // A guest that takes long to stop must not be stopped most of the time.
            self.output_due.get_or_insert(now + OUTPUT_DELAY.max(self.last_pause));
        }
        self.proxy.handle_primary(now, epoch, frame);
        self.pump(now);
    }

    /// A frame for the guest came from the network.
    pub fn handle_network_frame(&mut self, now: Instant, frame: Bytes) {
        if let Some(frame) = self.outer.inward(now, frame) {
            self.receive(frame);
        }
        self.pump(now);
    }

    fn receive(&mut self, frame: Bytes) {
        let taken = self.domain.receive_frame(&frame);
        // In Remus mode too: what the last state does not know is replayed to the guest that takes over.
        if taken && self.machine.is_replicating() {
            self.effects.push_back(Effect::ToSecondary { epoch: self.machine.epoch(), frame });
        }
    }

    /// A frame of the guest may leave.
    fn release(&mut self, now: Instant, frame: Bytes) {
        let frame = self.outer.outward(now, frame);
        self.effects.push_back(Effect::ToNetwork(frame));
        while let Some(frame) = self.outer.poll_output() {
            self.receive(frame.into());
        }
    }

    /// The secondary's guest emitted a frame in `epoch`.
    pub fn handle_secondary_frame(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        // It would let frames go of a guest that may not speak.
        if self.is_undecided() {
            return;
        }
        self.proxy.handle_secondary(now, epoch, frame);
        self.pump(now);
    }

    /// A client's frame could not be copied to the secondary: only a checkpoint brings its guest level again.
    pub fn handle_mirror_overflow(&mut self, now: Instant) {
        self.stats.mirror_overflows += 1;
        self.request_checkpoint(now, Cause::MirrorOverflow);
    }

    /// A message from the secondary.
    pub fn handle_message(&mut self, now: Instant, message: Message) {
        self.steps.heard(now, message);
        self.machine.handle_message(now, message);
        self.pump(now);
    }

    /// The secondary's answers to writes of a disk.
    pub fn handle_disk_acked(&mut self, now: Instant, disk: usize, answers: Vec<(u64, Result<(), DiskError>)>) {
        for (seq, result) in answers {
            let failed = result.as_ref().err().map(ToString::to_string);
            self.mirrors.handle_acked(disk, seq, result);
            if let Some(why) = failed {
                self.machine.handle_loss(now, Loss::Local(format!("disk write to the secondary: disk{disk}: {why}")));
            }
        }
        self.machine.handle_progress(now);
        self.pump(now);
    }

    /// Bytes are moving on the stream.
    pub fn handle_progress(&mut self, now: Instant) {
        self.machine.handle_progress(now);
    }

    /// The operator ends the protection. False when there is none.
    pub fn dismiss(&mut self, now: Instant) -> bool {
        let begun = self.machine.dismiss(now);
        self.pump(now);
        begun
    }

    /// The answer to an [`Effect::Dismiss`].
    pub fn handle_given_up(&mut self, now: Instant) {
        self.machine.handle_given_up(now);
        self.pump(now);
    }

    /// The peer is lost, or a failover is wanted.
    pub fn handle_loss(&mut self, now: Instant, loss: Loss) {
        self.machine.handle_loss(now, loss);
        self.pump(now);
    }

    /// The answer to an [`Effect::Ask`].
    pub fn handle_answer(&mut self, now: Instant, answer: Answer) {
        self.machine.handle_answer(now, answer);
        self.pump(now);
    }

    /// The operator orders a held guest to go on here. False when it is not held.
    pub fn operator_decides(&mut self, now: Instant) -> bool {
        let decided = self.machine.operator_decides();
        self.pump(now);
        decided
    }

    /// Longest time between two checkpoints from now on; the next one begins at once, as in QEMU.
    pub fn set_checkpoint_delay(&mut self, now: Instant, delay: Duration) {
        self.machine.set_checkpoint_delay(delay);
        self.request_checkpoint(now, Cause::Command);
    }

    /// Somebody wants a checkpoint.
    pub fn request_checkpoint(&mut self, now: Instant, cause: Cause) {
        self.machine.request_checkpoint(now, cause);
        self.pump(now);
    }

    /// Gives a page buffer back, so that the next capture does not fault it in again.
    pub fn recycle(&mut self, mut batch: PageBatch) {
        if batch.bytes.capacity() > self.capture.bytes.capacity() && self.capture.is_empty() {
            batch.clear();
            self.capture = batch;
        }
    }

    /// Whether [`Self::copy_some`] has work: the first copy is not finished.
    #[must_use]
    pub fn wants_copy(&self) -> bool {
        self.copy.as_ref().is_some_and(|copy| !copy.stalled) && self.machine.state() == State::Copying
    }

    /// Whether [`Self::handle_hash`] may be called.
    #[must_use]
    pub fn wants_hash(&self) -> bool {
        self.copy.is_some() && self.mirrors.wants_hash()
    }

    /// The hash of the next chunk of the secondary's disk.
    pub fn handle_hash(&mut self, now: Instant, disk: usize, hash: ChunkHash) {
        if !self.mirrors.handle_hash(disk, hash) {
            self.machine.handle_loss(now, Loss::Violation("a hash that nobody waits for".into()));
        }
        self.copy.iter_mut().for_each(|copy| copy.stalled = false);
        self.machine.handle_progress(now);
        self.pump(now);
    }

    /// Does one slice of the first copy: a chunk of disk, then a batch of pages. Call it as long as the links take
    /// more. The guest runs meanwhile; pages it writes are sent again.
    pub fn copy_some(&mut self, now: Instant) {
        if !self.wants_copy() {
            return;
        }
        if let Err(error) = self.copy_slice(now) {
            self.machine.handle_loss(now, Loss::Local(error));
        }
        self.pump(now);
    }

    fn copy_slice(&mut self, now: Instant) -> Result<(), String> {
        let Some(copy) = self.copy.as_mut() else { return Ok(()) };
        let mut waiting = false;
        if !copy.disk_done {
            let step = self.mirrors.next_sync_chunk().map_err(|e| e.to_string())?;
            (copy.disk_done, waiting) = (step == SyncStep::Finished, step == SyncStep::Waiting);
            self.stats.disk_read_at = copy.disk_done.then_some(now);
        }
        let nr_pages = self.domain.nr_pages();
        let pfns: Vec<Pfn> =
            (copy.next..nr_pages).map(Pfn).filter(|pfn| copy.todo.get(*pfn)).take(BATCH_PAGES).collect();
        if let Some(last) = pfns.last() {
            copy.next = last.0 + 1;
            let mut bytes = Vec::with_capacity(pfns.len() * PAGE_SIZE);
            self.domain.read_pages(&pfns, &mut bytes).map_err(|e| e.to_string())?;
            self.stats.copied_pages.0 = (self.stats.copied_pages.0 + pfns.len() as u64).min(self.stats.copied_pages.1);
            self.stats.copy_pages += pfns.len() as u64;
            self.effects.push_back(Effect::Pages(PageBatch { pfns, bytes }));
            return Ok(());
        }
        if !copy.disk_done {
            copy.stalled = waiting;
            return Ok(());
        }
        // A round is over: what became dirty meanwhile is the next one, until it is little.
        copy.todo.clear_all();
        self.domain.take_dirty(&mut copy.todo).map_err(|e| e.to_string())?;
        (copy.next, copy.rounds) = (0, copy.rounds + 1);
        if copy.todo.count() <= CONVERGED_PAGES || copy.rounds >= COPY_ROUNDS_MAX {
            self.dirty.union(&copy.todo);
            self.copy = None;
            self.proxy = match self.mode {
                Mode::Remus if self.release_at_once => Proxy::open(),
                Mode::Colo => Proxy::colo(compare::Config::default()),
                Mode::Remus => Proxy::remus(compare::Config::default()),
            };
            // What the guest said before its first epoch was captured is explained by the state it is captured in.
            self.proxy.checkpoint(now, 0);
            self.machine.handle_copied(now);
        }
        Ok(())
    }

    /// Carries out everything the parts want, until none wants anything.
    fn pump(&mut self, now: Instant) {
        loop {
            let mut idle = true;
            while let Some(action) = self.machine.poll_action() {
                idle = false;
                if let Err(error) = self.act(now, action) {
                    tracing::error!(%error, "this host cannot replicate the guest");
                    self.error.get_or_insert(error.clone());
                    self.machine.handle_loss(now, Loss::Local(error));
                }
            }
            while let Some(output) = self.proxy.poll_output() {
                idle = false;
                match output {
                    Output::Release(frame) => self.release(now, frame),
                    // A checkpoint that was captured meanwhile has already ended the epoch in question.
                    Output::Diverged { epoch, cause, flow } if epoch == self.machine.epoch() => {
                        let asked = compare::asked_by(cause, flow);
                        tracing::debug!(epoch, asked, "a checkpoint was asked for");
                        self.stats.asked = Some(asked);
                        self.steps.diverged(flow);
                        self.machine.request_checkpoint(now, cause_of(cause));
                    }
                    Output::Diverged { .. } => {}
                }
            }
            while let Some((disk, forward)) = self.mirrors.poll_forward() {
                idle = false;
                let (seq, offset, payload) = (forward.seq, forward.offset, forward.payload);
                self.effects.push_back(Effect::DiskWrite { disk, seq, offset, payload });
            }
            if self.mirrors.pressure() {
                self.machine.request_checkpoint(now, Cause::DiskBound);
            }
            let ended = self.disk_epoch_base + self.machine.epoch();
            if self.machine.state() == State::Sending && self.mirrors.drained(ended - 1) {
                self.machine.handle_disk_drained(now);
                // It may have been the last thing the checkpoint waited for: what follows must not wait for an input.
                idle &= self.machine.state() == State::Sending;
            }
            if idle {
                return;
            }
        }
    }

    fn act(&mut self, now: Instant, action: Action) -> Result<(), String> {
        match action {
            Action::Send(message) => {
                self.steps.said(now, message);
                self.effects.push_back(Effect::Message(message));
            }
            Action::Capture { resume } => {
                self.carried = self.outer.carried();
                self.capture(resume).map_err(|e| format!("capture: {e}"))?;
                self.machine.handle_captured(now);
            }
            Action::SendPages => {
                let pages = std::mem::take(&mut self.capture);
                self.effects.push_back(Effect::Pages(pages));
                if self.mode == Mode::Colo && self.waits_for_checkpoints() {
                    self.effects.push_back(Effect::GuestRests);
                }
            }
            Action::SendDevices => self.send_devices(),
            Action::Release { epoch, cause } => {
                *self.stats.checkpoints.entry(cause).or_default() += 1;
                self.stats.last_owned_at = Some(now);
                self.steps.released(now, epoch, cause);
                self.proxy.checkpoint(now, epoch);
            }
            Action::AllowDisk { epoch } => self.mirrors.allow(self.disk_epoch_base + epoch),
            Action::ResumeGuest => self.resume().map_err(|e| e.to_string())?,
            Action::PauseGuest => self.domain.suspend().map_err(|e| e.to_string())?,
            Action::Dismiss => self.effects.push_back(Effect::Dismiss),
            Action::Ask(ask) => self.effects.push_back(Effect::Ask(ask)),
            Action::GoOn { generation } => self.go_on(generation),
            Action::StopGuest => {
                let _ = self.domain.stop();
                self.last_packets = Some(self.proxy.stats());
                self.proxy = Proxy::open();
                self.mirrors.detach();
                self.end(Exit::Stopped);
            }
        }
        Ok(())
    }

    fn go_on(&mut self, generation: u64) {
        let exit = match self.machine.state() {
            State::Exited(exit) => exit,
            state => unreachable!("the guest goes on from {state:?}"),
        };
        self.generation = generation;
        self.last_packets = Some(compare::Stats { currently_held: 0, ..self.proxy.stats() });
        self.proxy.release_all();
        self.mirrors.detach();
        self.copy = None;
        let went_on = (|| {
            self.domain.logdirty(false)?;
            if exit == Exit::Alone {
                self.domain.set_generation(generation)?;
            }
            self.resume()
        })();
        if let Err(error) = went_on {
            self.error.get_or_insert(error.to_string());
        }
        self.end(exit);
    }

    fn end(&mut self, exit: Exit) {
        self.output_due = None;
        self.effects.push_back(Effect::Ended { exit, generation: self.generation });
    }
}
