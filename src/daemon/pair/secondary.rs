//! The secondary's side: the guest that stands ready, what is staged for it, and the replicas under it.
//!
//! ```text
//!  stream ──▶ handle_item ──▶ staged ── whole: seal ── owned ──▶ work(): cache ──▶ guest
//!  packet link ──▶ handle_mirrored_frame(epoch) ──▶ Rewriter ──▶ guest ──▶ Rewriter ──▶ ToPrimary(epoch)
//!  after a takeover: network ◀──▶ Rewriter, with what the primary translated ◀──▶ guest
//! ```
//!
//! Nothing of a checkpoint touches guest, cache or disk before it is whole; then it is applied in slices, so that
//! a lost peer is heard while a large one loads (`load.rs`). Client frames carry the epoch in which the *primary's* guest got
//! them: those of an epoch that ended are in the loaded state already, those of the next wait until it is loaded.

mod load;

use super::Clock;
use super::staged::{Load, Staged};
use super::survivor::{ANNOUNCE_FIRST, ANNOUNCE_ROUNDS, ANNOUNCE_STEP, Latest, Replay, announcement};
use crate::bitmap::Bitmap;
use crate::carried::Carried;
use crate::clock::Instant;
use crate::colo::arbiter::{Answer, Ask};
use crate::colo::heartbeat::Silence;
use crate::colo::message::Message;
use crate::colo::secondary::{Action, Config, Secondary, State};
use crate::colo::stream::Item;
use crate::colo::{Exit, Loss};
use crate::compare::Rewriter;
use crate::compare::rewriter::Forward;
use crate::hypervisor::cache::RamCache;
use crate::hypervisor::{Domain, DomainError};
use crate::mutant::{self, Mutant};
use crate::page::{PAGE_SIZE, PageBatch, is_zero};
use crate::replica::set::Replicas;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Bytes of client frames kept for an epoch that is not loaded yet. Beyond it they are dropped: the guests then
/// disagree, and a checkpoint follows.
const INBOUND_MAX_BYTES: usize = 16 << 20;
/// How long sealed disk epochs may wait before they are written to the base disk: long enough that their flushes are rare.
const DISK_APPLY_DELAY: Duration = Duration::from_millis(250);
/// How long a side whose replica takes no more writes lets the primary ask the arbiter first: it most likely is well.
const GIVE_WAY: Duration = Duration::from_millis(500);
/// What the driver has to send or do.
#[derive(Debug)]
pub enum Effect {
    /// A message on the stream.
    Message(Message),
    /// A frame of this guest to the primary's comparator.
    ToPrimary {
        /// The epoch in which the guest emitted it.
        epoch: u64,
        /// The frame.
        frame: Bytes,
    },
    /// A frame to the network: only after a takeover.
    ToNetwork(Bytes),
    /// The word that this side has given the guest up for good.
    GivenUp,
    /// An arbitration; answer with [`SecondarySide::handle_answer`].
    Ask(Ask),
    /// A round of [`Replicas::apply_round`], which waits for media; answer with [`SecondarySide::handle_disk_applied`].
    ApplyDisk(Replicas),
    /// Replication ended: close every link.
    Ended {
        /// How.
        exit: Exit,
        /// The generation in which the guest runs, if it does.
        generation: u64,
    },
}

/// Counters of the secondary's side.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// States owned.
    pub checkpoints: u64,
    /// Pages received.
    pub pages: u64,
    /// Client frames dropped at the bound.
    pub inbound_dropped: u64,
    /// Time spent loading the last state.
    pub last_load: Duration,
}

/// The secondary's side of a protected guest.
pub struct SecondarySide {
    machine: Secondary,
    domain: Box<dyn Domain>,
    replicas: Replicas,
    rewriter: Rewriter,
    /// What the primary had to translate for its clients when it was in the last state.
    carried: Vec<Carried>,
    epoch: Arc<AtomicU64>,
    clock: Clock,
    mac: [u8; 6],
    cache: RamCache,
    changed: Bitmap,
    staged: Staged,
    load: Option<Load>,
    /// When sealed disk epochs are to be written to the base disk; `None` when there are none.
    disk_due: Option<Instant>,
    /// Some are being written.
    applying: bool,
    /// Announcements still to be made, and when the next is due.
    announce: Option<(u32, Instant)>,
    inbound: VecDeque<(u64, Bytes)>,
    inbound_bytes: usize,
    /// What the network brought for the guest, and when the primary was last heard, once it is lost. A switch whose link to the
    /// primary is down no longer knows where the guest is, and asks everywhere.
    heard: Latest,
    silent_since: Option<Instant>,
    /// When the guest took over, until it has said something.
    took_over_at: Option<Instant>,
    /// What a guest that took over has not taken yet.
    replay: Replay,
    /// What the primary's guest said before the last state, if it may not have left, and what this one has said since.
    said: Latest,
    running: bool,
    generation: u64,
    error: Option<String>,
    effects: VecDeque<Effect>,
    stats: Stats,
}

impl SecondarySide {
    /// A side that waits for the first state of a guest. `domain` is blank and suspended, `replicas` have begun
    /// their sync, `epoch` is what the guest's frames are tagged with at emission.
    pub fn new(
        now: Instant,
        config: Config,
        mut domain: Box<dyn Domain>,
        replicas: Replicas,
        epoch: Arc<AtomicU64>,
        mac: [u8; 6],
        clock: Clock,
    ) -> Result<Self, DomainError> {
        let cache = RamCache::new(domain.nr_pages())?;
        domain.logdirty(true)?;
        Ok(Self {
            generation: config.claim.expected,
            machine: Secondary::new(now, config),
            changed: Bitmap::new(domain.nr_pages()),
            domain,
            replicas,
            rewriter: Rewriter::new(),
            carried: Vec::new(),
            epoch,
            clock,
            mac,
            cache,
            staged: Staged::default(),
            load: None,
            disk_due: None,
            applying: false,
            announce: None,
            inbound: VecDeque::new(),
            inbound_bytes: 0,
            heard: Latest::default(),
            silent_since: None,
            took_over_at: None,
            replay: Replay::default(),
            said: Latest::default(),
            running: false,
            error: None,
            effects: VecDeque::new(),
            stats: Stats::default(),
        })
    }

    /// Gives up the guest that took over, for a pair in which it is the primary's, and what has to be translated for it.
    #[must_use]
    pub fn into_survivor(self) -> (Box<dyn Domain>, Rewriter) {
        (self.domain, self.rewriter)
    }

    /// Whether the guest runs here, alone, on a disk of its own, so that a new pair may be made for it.
    #[must_use]
    pub fn can_be_protected(&self) -> bool {
        self.took_over() && self.disk_due.is_none() && !self.applying && !self.replicas.is_unsettled()
    }

    /// The machine, for looking.
    #[must_use]
    pub fn machine(&self) -> &Secondary {
        &self.machine
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// The replicas of its disks.
    #[must_use]
    pub fn replicas(&self) -> &Replicas {
        &self.replicas
    }

    /// The guest.
    pub fn domain(&mut self) -> &mut dyn Domain {
        &mut *self.domain
    }

    /// The generation in force.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What went wrong on this host, if something did.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Whether this side carries the guest now.
    #[must_use]
    pub fn took_over(&self) -> bool {
        self.machine.state() == State::Exited(Exit::Alone)
    }

    /// Whether this side stands ready, or is getting ready, for a primary that is there.
    #[must_use]
    pub fn stands_by(&self) -> bool {
        !matches!(self.machine.state(), State::Dismissed | State::Arbitrating | State::Held | State::Exited(_))
    }

    /// The next thing to send or do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let announce = self.announce.map(|(_, due)| due);
        let own = [self.disk_due.filter(|_| !self.applying), announce, self.replay.poll_timeout()];
        [self.machine.poll_timeout(), self.rewriter.poll_timeout()].into_iter().chain(own).flatten().min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.rewriter.handle_timeout(now);
        self.rewritten();
        self.replay.handle_timeout(now, &mut |frame| self.domain.receive_frame(frame));
        if let Some((left, _)) = self.announce.filter(|(_, due)| *due <= now) {
            self.effects.push_back(Effect::ToNetwork(announcement(self.mac).into()));
            self.announce = (left > 1).then(|| (left - 1, now + ANNOUNCE_STEP));
        }
        if !self.applying && self.disk_due.take_if(|due| *due <= now).is_some() {
            self.applying = true;
            self.effects.push_back(Effect::ApplyDisk(self.replicas.clone()));
        }
        self.machine.handle_timeout(now);
        self.pump(now);
    }

    /// The answer to an [`Effect::ApplyDisk`].
    pub fn handle_disk_applied(&mut self, now: Instant, replicas: &Replicas, applied: Result<bool, String>) {
        // Of an earlier guest, whose disks are nobody's any more.
        if !replicas.are(&self.replicas) {
            return;
        }
        self.applying = false;
        match applied {
            Ok(false) => {}
            // A guest that has taken over waits for its disk to be one again.
            Ok(true) => _ = self.disk_due.get_or_insert(if self.took_over() { now } else { now + DISK_APPLY_DELAY }),
            Err(error) => {
                self.disk_due = Some(now + DISK_APPLY_DELAY);
                if self.error.is_none() {
                    tracing::error!(%error, "the replica cannot be written");
                    self.error = Some(error.clone());
                }
                if self.replicas.is_lost() {
                    self.machine.handle_disk_lost(error);
                    self.pump(now);
                }
            }
        }
    }

    /// Something of the stream arrived.
    pub fn handle_item(&mut self, now: Instant, item: Item) {
        match (self.machine.state(), item) {
            (_, Item::Message(message)) => self.machine.handle_message(now, message),
            (State::Joining, Item::Pages(batch)) => self.join_pages(now, &batch),
            (State::Joining, Item::Deltas(deltas)) => {
                let batch = deltas.apply(|pfn| self.cache.page(pfn));
                self.join_pages(now, &batch);
            }
            (State::Joining, Item::ZeroPages(pfns)) => {
                // Most of a fresh guest is zero, and so is a fresh cache.
                let mut batch = PageBatch::default();
                for pfn in pfns.into_iter().filter(|pfn| !is_zero(self.cache.page(*pfn))) {
                    batch.push(pfn, &[0; PAGE_SIZE]);
                }
                self.join_pages(now, &batch);
            }
            (State::Receiving, Item::Deltas(deltas)) => {
                let batch = deltas.apply(|pfn| self.cache.page(pfn));
                self.stats.pages += batch.len() as u64;
                self.stage(now, batch.len());
                self.staged.batches.push(batch);
            }
            (State::Receiving, Item::Pages(batch)) => {
                self.stats.pages += batch.len() as u64;
                if mutant::active(Mutant::ApplyBeforeWhole) {
                    let _ = self.domain.write_pages(&batch.pfns, &batch.bytes);
                }
                self.stage(now, batch.len());
                self.staged.batches.push(batch);
            }
            (State::Receiving, Item::ZeroPages(pfns)) => {
                self.stage(now, pfns.len());
                self.staged.zero.extend(pfns);
            }
            (State::Joining | State::Receiving, Item::GuestRests) => self.machine.handle_rest(),
            (State::Joining | State::Receiving, Item::Carried(carried)) => self.staged.carried = carried,
            (State::Joining | State::Receiving, Item::Output(output)) => {
                if mutant::active(Mutant::RepeatUnowned) {
                    output.iter().for_each(|frame| self.said.keep(now, frame.clone()));
                }
                self.staged.output = output;
            }
            (State::Joining | State::Receiving, Item::PagesEnd) => {}
            (State::Joining | State::Receiving, Item::DeviceState(blob)) => {
                self.staged.devices = blob;
                self.machine.handle_whole(now);
            }
            (State::Dismissed | State::Arbitrating | State::Held | State::Exited(_), _) => {}
            (state, _) => {
                let violation = format!("part of a checkpoint in state {state:?}");
                self.machine.handle_loss(now, Loss::Violation(violation));
            }
        }
        self.machine.handle_progress(now);
        self.pump(now);
    }

    /// Bytes are arriving on the stream.
    pub fn handle_progress(&mut self, now: Instant) {
        self.machine.handle_progress(now);
    }

    /// The primary's guest got a frame from a client, in `epoch`.
    pub fn handle_mirrored_frame(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        if epoch < self.machine.epoch() || matches!(self.machine.state(), State::Dismissed | State::Exited(_)) {
            return;
        }
        if self.running && epoch == self.machine.epoch() {
            self.deliver(now, frame);
        } else if self.inbound_bytes + frame.len() <= INBOUND_MAX_BYTES {
            self.inbound_bytes += frame.len();
            self.inbound.push_back((epoch, frame));
        } else {
            self.stats.inbound_dropped += 1;
        }
    }

    /// A frame came from the network. Before a takeover it is the primary's to answer, if that is there.
    pub fn handle_network_frame(&mut self, now: Instant, frame: Bytes) {
        match self.machine.state() {
            State::Exited(Exit::Alone) => self.deliver(now, frame),
            State::Dismissed | State::Exited(_) => {}
            _ if frame.starts_with(&self.mac) => self.heard.keep(now, frame),
            _ => {}
        }
    }

    /// This guest emitted a frame in `epoch`.
    pub fn handle_guest_frame(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        // A frame of an epoch that ended meanwhile describes a state that no longer exists, and its connection may
        // have lost the offset that would translate it: neither the primary nor, after a takeover, a client may
        // hear of it.
        if epoch != self.machine.epoch() && !mutant::active(Mutant::NoFence) {
            return;
        }
        let mut frame = frame.to_vec();
        match self.machine.state() {
            State::Exited(Exit::Alone) => {
                if let Some(at) = self.took_over_at.take() {
                    tracing::info!(after_ms = (now - at).as_millis(), "the guest's first frame since the takeover");
                }
                self.rewriter.from_guest(now, &mut frame);
                self.effects.push_back(Effect::ToNetwork(frame.into()));
                self.replay.guest_is_heard(now, &mut |frame| self.domain.receive_frame(frame));
            }
            State::Dismissed | State::Exited(_) => {}
            _ => {
                self.rewriter.from_guest(now, &mut frame);
                let frame = Bytes::from(frame);
                self.said.keep(now, frame.clone());
                self.effects.push_back(Effect::ToPrimary { epoch, frame });
            }
        }
        self.rewritten();
    }

    /// The primary ends the protection.
    pub fn handle_dismissal(&mut self, now: Instant) {
        self.machine.handle_dismissal(now);
        self.pump(now);
    }

    /// The peer is lost, or a failover is wanted.
    pub fn handle_loss(&mut self, now: Instant, loss: Loss) {
        if loss != Loss::Requested && self.replicas.is_broken() {
            self.machine.give_way(GIVE_WAY);
        }
        let silent = match loss {
            Loss::Silent(Silence::Unheard(time) | Silence::Unconfirmed(time)) => time,
            _ => Duration::ZERO,
        };
        let since_us = now.as_micros().saturating_sub(silent.as_micros() as u64);
        self.silent_since.get_or_insert(Instant::from_micros(since_us));
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

    /// Whether a checkpoint is being loaded.
    #[must_use]
    pub fn is_loading(&self) -> bool {
        self.load.is_some()
    }

    /// Does a slice of loading a checkpoint. True when there may be more.
    pub fn work(&mut self, now: Instant) -> bool {
        if self.load.is_none() {
            return false;
        }
        if let Some(result) = self.load_slice().transpose() {
            self.load = None;
            self.machine.handle_applied(now, result.map_err(|e| e.to_string()));
            self.pump(now);
        }
        true
    }

    fn pump(&mut self, now: Instant) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Send(message) => self.effects.push_back(Effect::Message(message)),
                Action::PauseGuest => {
                    self.running = false;
                    if let Err(error) = self.domain.suspend() {
                        self.error.get_or_insert(error.to_string());
                    }
                }
                Action::RunGuest => self.run(now),
                Action::Seal => {
                    let sealed = self.seal();
                    self.disk_due.get_or_insert(now + DISK_APPLY_DELAY);
                    self.machine.handle_sealed(now, sealed);
                }
                Action::Apply => self.begin_load(now),
                Action::DropStaged => self.staged = Staged::default(),
                Action::Ask(ask) => self.effects.push_back(Effect::Ask(ask)),
                Action::TakeOver { generation } => self.take_over(now, generation),
                Action::GiveUp => {
                    self.stop();
                    self.effects.push_back(Effect::GivenUp);
                }
                Action::StopGuest => {
                    self.stop();
                    if let Err(error) = self.replicas.stop() {
                        self.error.get_or_insert(error.to_string());
                    }
                    self.end();
                }
            }
        }
    }

    fn stop(&mut self) {
        self.running = false;
        let _ = self.domain.stop();
        self.load = None;
    }

    /// Checks that the staged state can be found whole, and makes the disks' pending epochs the checkpoint.
    fn seal(&mut self) -> Result<(), String> {
        self.domain.check_devices(&self.staged.devices).map_err(|e| e.to_string())?;
        self.replicas.seal().map_err(|e| e.to_string())
    }

    fn run(&mut self, now: Instant) {
        self.running = true;
        let current = self.machine.epoch();
        // Tags never decrease on the packet link, so what is due stands in front.
        while let Some((_, frame)) = self.inbound.pop_front_if(|(epoch, _)| *epoch <= current) {
            self.inbound_bytes -= frame.len();
            self.deliver(now, frame);
        }
        if let Err(error) = self.domain.resume() {
            self.error.get_or_insert(error.to_string());
        }
    }

    fn deliver(&mut self, now: Instant, frame: Bytes) {
        let mut frame = frame.to_vec();
        if self.rewriter.from_network(now, &mut frame) == Forward::Now {
            self.replay.give(now, frame, &mut |frame| self.domain.receive_frame(frame));
        }
        self.rewritten();
    }

    /// Frames that waited in a rewriter for their connection's offset.
    fn rewritten(&mut self) {
        while let Some(frame) = self.rewriter.poll_output() {
            self.domain.receive_frame(&frame);
        }
    }

    fn take_over(&mut self, now: Instant, generation: u64) {
        self.generation = generation;
        self.staged = Staged::default();
        if let Err(error) = self.replicas.takeover(generation) {
            self.error.get_or_insert(error.to_string());
        }
        let carried = self.rewriter.unknown(&std::mem::take(&mut self.carried));
        self.rewriter.takeover();
        self.disk_due = Some(now);
        let announced = self.domain.logdirty(false).and_then(|()| self.domain.set_generation(generation));
        if let Err(error) = announced {
            self.error.get_or_insert(error.to_string());
        }
        self.effects.push_back(Effect::ToNetwork(announcement(self.mac).into()));
        self.announce = Some((ANNOUNCE_ROUNDS, now + ANNOUNCE_FIRST));
        // Said twice harms nobody: TCP knows it, and any network may do it.
        let mut outer = Rewriter::of_survivor();
        outer.take_up(now, &carried);
        for frame in std::mem::take(&mut self.said).into_frames() {
            let frame = outer.outward(now, frame);
            self.effects.push_back(Effect::ToNetwork(frame));
        }
        self.replay.begin(now);
        self.took_over_at = Some(now);
        self.run(now);
        tracing::info!(after_ms = ((self.clock)() - now).as_millis(), "the guest runs here");
        // Clients said it, and no state that is left knows it.
        for (_, frame) in std::mem::take(&mut self.inbound) {
            self.deliver(now, frame);
        }
        self.inbound_bytes = 0;
        // Those frames the primary had translated.
        self.rewriter.take_up(now, &carried);
        // What came before the primary fell silent it had itself.
        let silent_since = self.silent_since.unwrap_or(now);
        for frame in std::mem::take(&mut self.heard).after(silent_since, now) {
            self.deliver(now, frame);
        }
        self.end();
    }

    fn end(&mut self) {
        let State::Exited(exit) = self.machine.state() else { return };
        self.effects.push_back(Effect::Ended { exit, generation: self.generation });
    }
}
