//! The secondary's disk: what guest B sees is the last checkpoint and its own writes since.
//!
//! ```text
//!   guest B reads                     primary (NBD)
//!      │   ▲ writes                        │ writes of this generation
//!      ▼   │                               ▼
//!    active ─── seal: dropped           pending ─── seal: becomes a sealed epoch
//!      │                                (unseen by guest B)
//!      ▼
//!    sealed, newest … oldest ─── apply_some ──▶ base
//! ```
//!
//! | stage | in | does | goes to |
//! |---|---|---|---|
//! | None, Syncing, Running, Done after stop | `start_sync` | forget every layer; primary writes go to base | Syncing |
//! | Syncing | `seal` | the base is the first checkpoint | Running |
//! | Running | `seal` | pending becomes a sealed epoch, active is dropped | Running |
//! | Running | `takeover` | pending is dropped, active becomes the newest sealed epoch, the generation is over | Failover |
//! | Syncing, Running | `stop` | pending and active are dropped, sealed is applied | Done |
//! | Failover | `apply_some`, last byte | the base is the disk | Done |
//! | Failover | `apply_some`, base fails | the layers stay and are read through; try again | FailoverFailed |
//! | FailoverFailed | `apply_some`, base works again | – | Failover |
//! | Failover, FailoverFailed, Done | `seal`, `takeover` | nothing | – |
//!
//! A checkpoint moves two structures and copies nothing. QEMU's copy-before-write pays for a checkpoint by emptying
//! two images; here the debt is the sealed epochs, paid in the background in rounds ([`Replica::begin_round`]).
//!
//! The trap: after a takeover guest B writes on while the layers are merged. A write goes in place where a layer
//! covers it and straight to the base where none does, so the merge can neither undo it nor go on for ever, and
//! needs no room.
//!
//! Nothing sealed is durable before it is applied: two hosts hold each checkpoint, and this survives the loss of
//! one. After a takeover one host is left, so [`Replica::guest_flush`] is honest again: busy until all is merged.
//!
//! After a crash of this host the layers are gone, and [`super::state`] says what the base is then: a checkpoint, or
//! after a takeover that was merged the guest's own disk, or while either was being written, not whole. Between a
//! takeover and its first merged byte it is still the last checkpoint that was applied: older than what the guest
//! went on from, and whole; none of its flushes had succeeded yet.
//!
//! Source: QEMU `docs/block-replication.txt` and `block/replication.c` (stages, their words), of which this matches
//! what a guest can see.

mod applying;
mod aside;
mod views;

pub use self::aside::Writer;
pub use self::views::{GuestView, PrimaryView};
pub use super::stage::{ReplicaError, Stage};

use self::views::{describe_layers, read_layers, write_layers};
use super::base::Base;
use super::extents::{Budget, Content, Overlay};
use super::records::Member;
use super::state::{Standing, State, StateFile, Why};
use crate::disk::{Disk, DiskError, Extent, Zeroing, check_range};
use crate::mutant::{self, Mutant};
use crate::pool::Block;
use serde::Serialize;
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Sealed epochs waiting at most. A secondary whose base is slower than its primary pays for one at a seal then:
/// checkpoints slow down to what it can bear, and reads never look through more layers than this.
pub const MAX_SEALED_EPOCHS: usize = 64;
/// Error texts kept for the status; the first ones, since they tell the cause.
pub const MAX_ERRORS: usize = 16;
/// What one guest flush merges before it says busy again, in bytes.
pub const FLUSH_STEP_BYTES: u64 = 8 << 20;

type ChangedRuns = Option<Vec<(u64, bool)>>;

/// What a replica may use.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// Memory for all layers together, their index included.
    pub memory_budget_bytes: u64,
    /// Where spill files are made; without it a full memory is a full disk.
    pub spill_dir: Option<PathBuf>,
    /// All spill files together.
    pub spill_budget_bytes: u64,
}

impl ReplicaConfig {
    pub(super) fn budget(self) -> Arc<Budget> {
        Budget::new(self.memory_budget_bytes, self.spill_dir, self.spill_budget_bytes)
    }
}

impl Default for ReplicaConfig {
    /// 256 MiB of memory and no spill files.
    fn default() -> Self {
        Self { memory_budget_bytes: 256 << 20, spill_dir: None, spill_budget_bytes: u64::MAX }
    }
}

/// A replica's state, for people and for the daemon's status.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ReplicaStatus {
    /// Where it stands.
    pub stage: Stage,
    /// The generation whose writes are accepted.
    pub generation: u64,
    /// The disk's size.
    pub size_bytes: u64,
    /// The primary's writes since the last checkpoint.
    pub pending_bytes: u64,
    /// Guest B's writes since the last checkpoint.
    pub active_bytes: u64,
    /// Epochs sealed and not yet applied.
    pub sealed_epochs: usize,
    /// Bytes still to be copied to the base.
    pub debt_bytes: u64,
    /// Bytes that were, since the takeover.
    pub merged_bytes: u64,
    /// Memory in use by all layers.
    pub memory_bytes: u64,
    /// What spill files take, one that waits for the next epoch included.
    pub spill_bytes: u64,
    /// Checkpoints sealed since the initial copy, that copy's own included.
    pub seals: u64,
    /// Primary requests refused because of their generation.
    pub fenced_writes: u64,
    /// Whether the next seal will be refused.
    pub broken: bool,
    /// What the guest's images are worth if this host crashes now.
    pub standing: Standing,
    /// The first [`MAX_ERRORS`] errors since the start.
    pub errors: Vec<String>,
}

/// The secondary's disk.
pub struct Replica {
    base: Base,
    budget: Arc<Budget>,
    stage: Stage,
    generation: u64,
    session: u64,
    taken_over: bool,
    /// Since then.
    merged_bytes: u64,
    sealed: VecDeque<Overlay>,
    round: Option<applying::Round>,
    pending: Overlay,
    active: Overlay,
    /// Layers nobody reads any more; freeing them takes time a checkpoint does not have.
    dropped: Vec<Overlay>,
    seals: u64,
    fenced_writes: u64,
    broken: Option<String>,
    errors: Vec<String>,
}

impl Replica {
    /// A replica over a `base` that does not outlive it, not started.
    #[must_use]
    pub fn new(base: Box<dyn Disk>, config: ReplicaConfig) -> Self {
        Self::over(base, Member::alone(State::forgetful()), config.budget())
    }

    /// A replica over a `base` whose record is kept in `state`, not started.
    pub fn open(base: Box<dyn Disk>, state: Box<dyn StateFile>, config: ReplicaConfig) -> Result<Self, DiskError> {
        Ok(Self::over(base, Member::alone(State::open(state)?), config.budget()))
    }

    /// A replica that is one of several, which share `budget` and their records, not started.
    pub(super) fn over(base: Box<dyn Disk>, state: Member, budget: Arc<Budget>) -> Self {
        Self {
            base: Base::new(base, state),
            stage: Stage::None,
            generation: 0,
            session: 0,
            taken_over: false,
            merged_bytes: 0,
            sealed: VecDeque::new(),
            round: None,
            pending: Overlay::new(&budget),
            active: Overlay::new(&budget),
            dropped: Vec::new(),
            seals: 0,
            fenced_writes: 0,
            broken: None,
            errors: Vec::new(),
            budget,
        }
    }

    /// The disk's size.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    /// What this image is, whatever the guest's other images are.
    #[must_use]
    pub fn image(&self) -> Standing {
        self.base.own_standing()
    }

    /// Whether a flush of the image has failed: it does not hold what was written to it, and nobody can take over on it.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.base.check_lost().is_err()
    }

    /// Where it stands.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Begins the initial copy from the primary of `generation`, from scratch: until the first checkpoint is applied
    /// the base is neither the old disk nor the new one, and durably says so when this returns. Refused for an older
    /// generation, and once a guest was taken over.
    pub fn start_sync(&mut self, generation: u64) -> Result<(), ReplicaError> {
        self.start_session(generation, 0)
    }

    /// [`Self::start_sync`] for a primary that will know its checkpoints again by `session`.
    pub fn start_session(&mut self, generation: u64, session: u64) -> Result<(), ReplicaError> {
        self.check_start(generation)?;
        self.base.begin_copy()?;
        self.drop_pending();
        self.drop_active();
        self.drop_sealed();
        (self.generation, self.session) = (generation, session);
        self.stage = Stage::Syncing;
        self.seals = 0;
        self.broken = None;
        self.errors.clear();
        Ok(())
    }

    /// What [`Self::start_sync`] refuses before it does anything.
    pub(super) fn check_start(&self, generation: u64) -> Result<(), ReplicaError> {
        if self.taken_over {
            return Err(ReplicaError::Stage { step: "start", stage: self.stage });
        }
        if generation < self.generation {
            return Err(ReplicaError::StaleGeneration { theirs: generation, ours: self.generation });
        }
        Ok(self.base.check_lost()?)
    }

    /// A write of the primary: into the base during the initial copy, into pending after it.
    pub fn primary_write(&mut self, generation: u64, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.primary_put(generation, offset, Content::Data(bytes))
    }

    /// As [`Self::primary_write`]; what goes into memory as it is, is kept.
    pub fn primary_write_block(&mut self, generation: u64, offset: u64, block: &mut Block) -> Result<(), DiskError> {
        if self.stage != Stage::Running || self.check_primary(generation).is_err() {
            return self.primary_write(generation, offset, block);
        }
        check_range(self.size_bytes(), offset, block.len() as u64)?;
        let result = self.pending.write_block(offset, block);
        self.latch("a write of the primary", result)
    }

    /// Zeroes of the primary, like [`Self::primary_write`].
    pub fn primary_zero(
        &mut self,
        generation: u64,
        offset: u64,
        len_bytes: u64,
        how: Zeroing,
    ) -> Result<(), DiskError> {
        if how.fast_only && self.stage != Stage::Running {
            return Err(DiskError::NotSupported);
        }
        let keep_allocated = how.keep_allocated;
        self.primary_put(generation, offset, Content::Zeroes { len_bytes, keep_allocated })
    }

    fn primary_put(&mut self, generation: u64, offset: u64, content: Content<'_>) -> Result<(), DiskError> {
        check_range(self.size_bytes(), offset, content.len_bytes())?;
        if self.taken_over && mutant::active(Mutant::AcceptOldGeneration) {
            return self.write_below(offset, content);
        }
        self.check_primary(generation)?;
        let result = match self.stage {
            Stage::Running => self.pending.write(offset, content),
            _ => content.write_to(&mut self.base, offset),
        };
        self.latch("a write of the primary", result)
    }

    /// Whether writes of the primary go into memory.
    pub(super) fn takes_in_memory(&self) -> bool {
        self.stage == Stage::Running && self.budget.has_memory()
    }

    /// A read of the primary: its own latest writes.
    pub fn primary_read(&mut self, generation: u64, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.check_primary(generation)?;
        check_range(self.size_bytes(), offset, into.len() as u64)?;
        let Self { pending, sealed, base, .. } = self;
        pending.read(offset, into, &mut |offset, into| read_layers(sealed, base, offset, into))
    }

    /// A flush of the primary. During the initial copy it reaches the medium; after it, what it would make
    /// durable is a checkpoint that does not exist yet, so there is nothing to do.
    pub fn primary_flush(&mut self, generation: u64) -> Result<(), DiskError> {
        self.check_primary(generation)?;
        let result = if self.stage == Stage::Syncing { self.base.flush() } else { Ok(()) };
        self.latch("a flush of the initial copy", result)
    }

    /// A read of guest B: its own writes, else the last checkpoint. Fails before the first one.
    pub fn guest_read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.check_guest()?;
        check_range(self.size_bytes(), offset, into.len() as u64)?;
        let Self { active, sealed, base, .. } = self;
        active.read(offset, into, &mut |offset, into| read_layers(sealed, base, offset, into))
    }

    /// What a range of guest B's disk is, like [`Disk::extents`].
    pub fn guest_extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        self.check_guest()?;
        check_range(self.size_bytes(), offset, len_bytes)?;
        let Self { active, sealed, base, .. } = self;
        let layers: Vec<_> = sealed.iter().chain([&*active]).collect();
        describe_layers(&layers, base, offset, len_bytes, max)
    }

    /// A write of guest B. Its failure is the guest's news; the next checkpoint drops the layer it failed in. Refused
    /// after a stop: the base stays the last checkpoint.
    pub fn guest_write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.guest_put(offset, Content::Data(bytes))
    }

    /// Zeroes of guest B, like [`Self::guest_write`]. While layers are being merged they are never fast.
    pub fn guest_zero(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        if how.fast_only && self.stage != Stage::Running {
            self.check_guest_writes()?;
            let merged = self.sealed.is_empty();
            return if merged { self.base.write_zeroes(offset, len_bytes, how) } else { Err(DiskError::NotSupported) };
        }
        let keep_allocated = how.keep_allocated;
        self.guest_put(offset, Content::Zeroes { len_bytes, keep_allocated })
    }

    fn guest_put(&mut self, offset: u64, content: Content<'_>) -> Result<(), DiskError> {
        self.check_guest_writes()?;
        check_range(self.size_bytes(), offset, content.len_bytes())?;
        let result = if self.stage == Stage::Running {
            self.active.write(offset, content)
        } else {
            self.write_below(offset, content)
        };
        result.inspect_err(|error| self.note("a write of the secondary's guest", error))
    }

    /// A flush of guest B. Before a takeover there is nothing to make durable. After it: [`DiskError::Busy`] until
    /// every layer is merged, of the guest's other disks too, each call merging [`FLUSH_STEP_BYTES`] of this one; then
    /// a flush of the base. Once it succeeded, a restart finds all that was written before.
    pub fn guest_flush(&mut self) -> Result<(), DiskError> {
        self.check_guest()?;
        if self.stage == Stage::Running {
            return self.base.check_lost();
        }
        self.apply_some(FLUSH_STEP_BYTES)?;
        if !self.sealed.is_empty() {
            return Err(DiskError::Busy);
        }
        self.settle()?;
        if self.taken_over && self.is_unsettled() { Err(DiskError::Busy) } else { Ok(()) }
    }

    /// What guest B wrote since the last checkpoint, like [`Disk::changed`]. `None` while there are no checkpoints.
    pub fn guest_changed(&self, offset: u64, len_bytes: u64, max: usize) -> Result<ChangedRuns, DiskError> {
        check_range(self.size_bytes(), offset, len_bytes)?;
        Ok((self.stage == Stage::Running).then(|| self.active.runs(offset, len_bytes, max)))
    }

    /// The checkpoint: what the primary wrote becomes what guest B sees, what guest B wrote is forgotten. Copies
    /// nothing, whatever the sizes. On an error the checkpoint must not be acknowledged; guest B's view is
    /// untouched. After a takeover or a stop it does nothing, as in QEMU.
    pub fn seal(&mut self) -> Result<(), ReplicaError> {
        self.prepare_seal()?;
        self.commit_seal();
        Ok(())
    }

    /// The part of a checkpoint that can fail. Sees to it that [`Self::commit_seal`] cannot.
    pub(super) fn prepare_seal(&mut self) -> Result<(), ReplicaError> {
        match self.stage {
            Stage::None => return Err(ReplicaError::Stage { step: "checkpoint", stage: self.stage }),
            Stage::Failover | Stage::FailoverFailed | Stage::Done => return Ok(()),
            Stage::Syncing | Stage::Running => {}
        }
        if let Some(first) = &self.broken {
            return Err(ReplicaError::Broken { first: first.clone() });
        }
        while !self.pending.is_empty() && self.sealed.len() >= MAX_SEALED_EPOCHS {
            self.apply_some(FLUSH_STEP_BYTES)?;
        }
        Ok(())
    }

    /// The checkpoint itself, right after [`Self::prepare_seal`].
    pub(super) fn commit_seal(&mut self) {
        if !matches!(self.stage, Stage::Syncing | Stage::Running) {
            return;
        }
        if !self.pending.is_empty() {
            self.sealed.push_back(std::mem::replace(&mut self.pending, Overlay::new(&self.budget)));
        }
        if !mutant::active(Mutant::KeepActiveAtCheckpoint) {
            self.drop_active();
        }
        self.stage = Stage::Running;
        self.base.expect(Why::Applying);
        self.seals += 1;
    }

    /// Guest B carries on from the last checkpoint and its own writes; the primary's since then are dropped and
    /// its generation is over. Copies nothing; the layers are merged by [`Self::apply_some`]. Does nothing when
    /// the guest was already taken over; refused before the first checkpoint, and on an image whose flush failed.
    pub fn takeover(&mut self, new_generation: u64) -> Result<(), ReplicaError> {
        self.check_takeover(new_generation)?;
        if self.taken_over {
            return Ok(());
        }
        self.generation = new_generation;
        self.taken_over = true;
        self.base.expect(Why::TakenOver);
        self.drop_pending();
        self.sealed.push_back(std::mem::replace(&mut self.active, Overlay::new(&self.budget)));
        self.stage = Stage::Failover;
        Ok(())
    }

    /// What [`Self::takeover`] refuses before it does anything; it cannot fail otherwise.
    pub(super) fn check_takeover(&self, new_generation: u64) -> Result<(), ReplicaError> {
        match self.stage {
            _ if self.taken_over => Ok(()),
            // The layers above it cannot make up for what it has lost.
            Stage::Running if new_generation > self.generation => Ok(self.base.check_lost()?),
            Stage::Running => Err(ReplicaError::StaleGeneration { theirs: new_generation, ours: self.generation }),
            stage => Err(ReplicaError::Stage { step: "takeover", stage }),
        }
    }

    /// Ends replication without a takeover; guest B must be stopped. The base becomes the last checkpoint, as far
    /// as there was one, before this returns; after an error it stays what it says it is. Does nothing when it is over
    /// already.
    pub fn stop(&mut self) -> Result<(), ReplicaError> {
        match self.stage {
            Stage::None => return Err(ReplicaError::Stage { step: "stop", stage: self.stage }),
            Stage::Failover | Stage::FailoverFailed | Stage::Done => return Ok(()),
            Stage::Syncing | Stage::Running => {}
        }
        self.drop_pending();
        self.drop_active();
        let mut applied = self.apply_some(u64::MAX);
        while let Ok(true) = applied {
            applied = self.apply_some(u64::MAX);
        }
        self.stage = Stage::Done;
        if applied.is_err() {
            // A later attempt would write below the next replica on this image.
            self.drop_sealed();
            self.seals = 0;
        }
        applied.map(drop).map_err(ReplicaError::Disk)
    }

    /// Whether the records do not tell yet what the images are: one of the guest's disks is not all in its base.
    pub(super) fn is_unsettled(&self) -> bool {
        match (self.base.standing(), self.stage) {
            (standing, _) if self.taken_over => standing != Standing::Guest,
            (standing, Stage::Running) => !standing.is_whole(),
            _ => false,
        }
    }

    /// Bytes still to be copied to the base.
    #[must_use]
    pub fn debt_bytes(&self) -> u64 {
        self.sealed.iter().map(Overlay::bytes).sum()
    }

    /// Where it stands, in numbers.
    #[must_use]
    pub fn status(&self) -> ReplicaStatus {
        ReplicaStatus {
            stage: self.stage,
            generation: self.generation,
            size_bytes: self.size_bytes(),
            pending_bytes: self.pending.bytes(),
            active_bytes: self.active.bytes(),
            sealed_epochs: self.sealed.len(),
            debt_bytes: self.debt_bytes(),
            merged_bytes: self.merged_bytes,
            memory_bytes: self.budget.memory_bytes(),
            spill_bytes: self.budget.spill_bytes(),
            seals: self.seals,
            fenced_writes: self.fenced_writes,
            broken: self.broken.is_some(),
            standing: self.base.standing(),
            errors: self.errors.clone(),
        }
    }

    fn check_primary(&mut self, generation: u64) -> Result<(), DiskError> {
        match self.stage {
            Stage::Syncing | Stage::Running if generation == self.generation => Ok(()),
            _ => {
                self.fenced_writes += 1;
                Err(DiskError::Fenced { theirs: generation, ours: self.generation })
            }
        }
    }

    fn check_guest(&self) -> Result<(), DiskError> {
        match self.stage {
            Stage::None | Stage::Syncing => {
                Err(DiskError::io("the secondary's guest disk", io::Error::other("there is no checkpoint yet")))
            }
            Stage::Running | Stage::Failover | Stage::FailoverFailed | Stage::Done => Ok(()),
        }
    }

    fn check_guest_writes(&self) -> Result<(), DiskError> {
        self.check_guest()?;
        if self.stage == Stage::Done && !self.taken_over {
            return Err(DiskError::io("the secondary's guest disk", io::Error::other("replication was ended")));
        }
        Ok(())
    }

    /// Writes where the guest will see it and the merge will not undo it.
    fn write_below(&mut self, offset: u64, content: Content<'_>) -> Result<(), DiskError> {
        write_layers(self.sealed.make_contiguous(), &mut self.base, offset, content)
    }

    fn drop_pending(&mut self) {
        let pending = std::mem::replace(&mut self.pending, Overlay::new(&self.budget));
        self.dropped.extend((!pending.is_empty()).then_some(pending));
    }

    fn drop_sealed(&mut self) {
        self.dropped.extend(self.sealed.drain(..));
        self.round = None;
    }

    fn drop_active(&mut self) {
        let active = std::mem::replace(&mut self.active, Overlay::new(&self.budget));
        self.dropped.extend((!active.is_empty()).then_some(active));
    }

    /// Keeps an error that makes the checkpoint being collected worthless.
    fn latch<T>(&mut self, doing: &str, result: Result<T, DiskError>) -> Result<T, DiskError> {
        result.inspect_err(|error| {
            self.note(doing, error);
            self.broken.get_or_insert_with(|| format!("{doing}: {error}"));
        })
    }

    fn note(&mut self, doing: &str, error: &DiskError) {
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(format!("{doing}: {error}"));
        }
    }
}
