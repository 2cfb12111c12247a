//! The disks of one guest, taken together: mirrors on the primary, replicas on the secondary.
//!
//! ```text
//!   disk0   Mirror ── its own queue, its own connection ──▶ Replica ─┐
//!   disk1   Mirror ── its own queue, its own connection ──▶ Replica ─┼─ sealed, taken over, stopped as one
//!   disk2   Mirror ── its own queue, its own connection ──▶ Replica ─┘
//!              └─ marked as one, drained when all are
//! ```
//!
//! A step is taken on all disks or on none: first each is asked whether it can, under all locks, then it is done on
//! each, which cannot fail. What can fail only while it is done (writing images at a stop, or in the background) is
//! done on every disk whatever happens to another, and their records ([`super::records`]) call none of them whole.
//!
//! The traps: locks are taken in the order of the disks, and only here are several held at once; and an error that does
//! not name its disk sends the operator to the wrong one.

use super::base::{LentFlush, LentRecord};
use super::epochs::{GuestView, PrimaryView, Replica, ReplicaConfig, ReplicaError, ReplicaStatus, Stage};
use super::extents::{Budget, Overlay};
use super::lock;
use super::mirror::resync::ChunkHash;
use super::mirror::{Forward, Holds, Mirror, MirrorHandle, MirrorStatus, SyncStep, Target};
use super::records::Member;
use super::state::{State, StateFile};
use crate::disk::{Disk, DiskError};
use crate::mutant::{self, Mutant};
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes that are copied while a disk is locked.
const APPLY_SLICE_BYTES: u64 = 1 << 20;

/// What went wrong with one disk of several.
#[derive(Debug, thiserror::Error)]
#[error("disk{disk}: {source}")]
pub struct OfDisk<E: std::error::Error + 'static> {
    /// Which, from 0.
    pub disk: usize,
    /// What.
    pub source: E,
}

impl std::fmt::Debug for Replicas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "replicas of {} disks", self.0.len())
    }
}

fn of_disk<T, E: std::error::Error>(disk: usize, result: Result<T, E>) -> Result<T, OfDisk<E>> {
    result.map_err(|source| OfDisk { disk, source })
}

/// Guest A's disks.
#[derive(Clone)]
pub struct Mirrors(Arc<[MirrorHandle]>);

impl Mirrors {
    /// Mirrors of the guest's disks, in their order, not attached. Copies waiting or in flight take at most
    /// `bound_bytes` over all of them, each disk having its share.
    #[must_use]
    pub fn new(locals: Vec<Box<dyn Disk>>, bound_bytes: u64) -> Self {
        let share_bytes = bound_bytes / locals.len().max(1) as u64;
        let handle = |local| MirrorHandle(Arc::new(Mutex::new(Mirror::new(local, share_bytes))));
        Self(locals.into_iter().map(handle).collect())
    }

    /// Each disk, as the guest has it.
    #[must_use]
    pub fn disks(&self) -> &[MirrorHandle] {
        &self.0
    }

    fn each(&self) -> impl Iterator<Item = MutexGuard<'_, Mirror>> {
        self.0.iter().map(|mirror| lock(&mirror.0))
    }

    /// Starts copying all disks, to `targets` in the same order; see [`Mirror::attach`]. Of a disk that has none
    /// nothing is known.
    pub fn attach(&self, targets: &[Target]) {
        let session = targets.first().map_or(0, |target| target.session);
        let unknown = Target { session, holds: Holds::Anything };
        self.each().enumerate().for_each(|(disk, mut mirror)| mirror.attach(*targets.get(disk).unwrap_or(&unknown)));
    }

    /// Whether [`Self::handle_hash`] may be called, for whichever disk the next hash is of.
    #[must_use]
    pub fn wants_hash(&self) -> bool {
        let mut rooms = self.each().filter_map(|mirror| mirror.room_for_hash()).peekable();
        rooms.peek().is_some() && rooms.all(|room| room)
    }

    /// The hash of a disk's next chunk on the other host. False when nobody waits for one.
    pub fn handle_hash(&self, disk: usize, hash: ChunkHash) -> bool {
        self.0.get(disk).is_some_and(|mirror| lock(&mirror.0).handle_hash(hash))
    }

    /// Stops copying, and drops what was queued.
    pub fn detach(&self) {
        self.each().for_each(|mut mirror| mirror.detach());
    }

    /// One step of the initial copy: of the first disk that has one to do. `Full` or
    /// `Waiting` when none has room or a hash for it.
    pub fn next_sync_chunk(&self) -> Result<SyncStep, OfDisk<DiskError>> {
        let mut all = SyncStep::Finished;
        for (disk, mut mirror) in self.each().enumerate() {
            match of_disk(disk, mirror.next_sync_chunk())? {
                SyncStep::Finished => {}
                step @ (SyncStep::Full | SyncStep::Waiting) => all = step,
                step @ (SyncStep::Queued { .. } | SyncStep::Skipped { .. }) => return Ok(step),
            }
        }
        Ok(all)
    }

    /// The epoch that writes belong to now.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.each().next().map_or(0, |mirror| mirror.status().epoch)
    }

    /// Ends the current epoch on all disks, which share it, and returns its number. The guest must be suspended.
    pub fn mark(&self) -> u64 {
        let mut ended = self.each().map(|mut mirror| mirror.mark());
        let first = ended.next().unwrap_or(0);
        ended.for_each(|other| assert_eq!(other, first, "the disks are marked together"));
        first
    }

    /// Lets the writes of `epoch` and of those before it go.
    pub fn allow(&self, epoch: u64) {
        self.each().for_each(|mut mirror| mirror.allow(epoch));
    }

    /// The next copy that may be sent, and of which disk.
    pub fn poll_forward(&self) -> Option<(usize, Forward)> {
        self.each().enumerate().find_map(|(disk, mut mirror)| mirror.poll_forward().map(|copy| (disk, copy)))
    }

    /// The other host's answer to a copy of a disk. One of a disk that is none says nothing.
    pub fn handle_acked(&self, disk: usize, seq: u64, result: Result<(), DiskError>) {
        if let Some(mirror) = self.0.get(disk) {
            lock(&mirror.0).handle_acked(seq, result);
        }
    }

    /// Whether the other host has acknowledged the whole initial copy and every write of `epoch` and before, of every
    /// disk.
    #[must_use]
    pub fn drained(&self, epoch: u64) -> bool {
        let disks = if mutant::active(Mutant::DrainFirstOnly) { 1 } else { self.0.len() };
        self.each().take(disks).all(|mirror| mirror.drained(epoch))
    }

    /// Whether a checkpoint is due for one of them.
    #[must_use]
    pub fn pressure(&self) -> bool {
        self.each().any(|mirror| mirror.pressure())
    }

    /// Where each stands.
    #[must_use]
    pub fn status(&self) -> Vec<MirrorStatus> {
        self.each().map(|mirror| mirror.status()).collect()
    }
}

/// A base image, and where its record is kept.
pub type Image = (Box<dyn Disk>, Box<dyn StateFile>);

/// Guest B's disks.
#[derive(Clone)]
pub struct Replicas(Arc<[Arc<Mutex<Replica>>]>, Arc<Budget>);

/// Copies so much of the round of one disk. True while more of it is left.
fn copy_share(replica: &Mutex<Replica>, share_bytes: u64) -> Result<bool, DiskError> {
    let dropped = lock(replica).take_dropped();
    dropped.into_iter().for_each(free);
    let mut left_bytes = share_bytes.max(1);
    loop {
        let lent = lock(replica).lend_copy();
        let Some(lent) = lent else { return lock(replica).copy_round(left_bytes) };
        let mut ended = lent.carry_out();
        // What was copied is freed when the lock is not held any more.
        let more = lock(replica).copy_ended(&mut ended)?;
        left_bytes = left_bytes.saturating_sub(ended.run.len_bytes() as u64);
        if !more || left_bytes == 0 {
            return Ok(more);
        }
    }
}

/// In steps: what is free may be used before all is.
fn free(mut layer: Overlay) {
    while layer.forget_first() > 0 {}
}

impl Replicas {
    /// Replicas over bases that do not outlive them, in the order of the guest's disks, not started.
    #[must_use]
    pub fn new(bases: Vec<Box<dyn Disk>>, config: ReplicaConfig) -> Self {
        let states = bases.iter().map(|_| State::forgetful()).collect();
        Self::over(bases, states, 0, config)
    }

    /// Replicas over images with their records, in the order of the guest's disks, not started. `set` tells them from
    /// other guests' images and from older copies of these: draw it. What `config` allows is for all of them together.
    pub fn open(images: Vec<Image>, set: u32, config: ReplicaConfig) -> Result<Self, OfDisk<DiskError>> {
        let (mut bases, mut states) = (Vec::new(), Vec::new());
        for (disk, (base, file)) in images.into_iter().enumerate() {
            bases.push(base);
            states.push(of_disk(disk, State::open(file))?);
        }
        Ok(Self::over(bases, states, set, config))
    }

    fn over(bases: Vec<Box<dyn Disk>>, states: Vec<State>, set: u32, config: ReplicaConfig) -> Self {
        let budget = config.budget();
        let members = Member::of(states, set).into_iter();
        let replica = |(base, member)| Arc::new(Mutex::new(Replica::over(base, member, budget.clone())));
        Self(bases.into_iter().zip(members).map(replica).collect(), budget)
    }

    /// Each disk.
    #[must_use]
    pub fn disks(&self) -> &[Arc<Mutex<Replica>>] {
        &self.0
    }

    /// Each disk, as guest B has it.
    pub fn guest_views(&self) -> impl Iterator<Item = GuestView> {
        self.0.iter().cloned().map(GuestView)
    }

    /// Each disk, as the primary of `generation` writes it.
    pub fn primary_views(&self, generation: u64) -> impl Iterator<Item = PrimaryView> {
        self.0.iter().cloned().map(move |replica| PrimaryView { replica, generation })
    }

    fn all(&self) -> Vec<MutexGuard<'_, Replica>> {
        self.0.iter().map(|replica| lock(replica)).collect()
    }

    /// Asks each disk, then does it on each.
    fn step(
        &self,
        mut may: impl FnMut(&mut Replica) -> Result<(), ReplicaError>,
        mut does: impl FnMut(&mut Replica) -> Result<(), ReplicaError>,
    ) -> Result<(), OfDisk<ReplicaError>> {
        let mut all = self.all();
        all.iter_mut().enumerate().try_for_each(|(disk, replica)| of_disk(disk, may(replica)))?;
        all.iter_mut().enumerate().try_for_each(|(disk, replica)| of_disk(disk, does(replica)))
    }

    /// [`Self::start_session`] for a primary that will not ask for them again.
    pub fn start_sync(&self, generation: u64) -> Result<(), OfDisk<ReplicaError>> {
        self.start_session(generation, 0)
    }

    /// Begins the initial copy of all disks; see [`Replica::start_session`]. After an error none has begun: the first disk
    /// makes it durable for all that they are not whole, and nothing else of it can fail.
    pub fn start_session(&self, generation: u64, session: u64) -> Result<(), OfDisk<ReplicaError>> {
        self.1.prepare();
        self.step(|replica| replica.check_start(generation), |replica| replica.start_session(generation, session))
    }

    /// The checkpoint, of all disks or, after an error, of none; see [`Replica::seal`].
    pub fn seal(&self) -> Result<(), OfDisk<ReplicaError>> {
        let mut sealed = 0;
        self.step(Replica::prepare_seal, |replica| {
            sealed += 1;
            if sealed == 1 || !mutant::active(Mutant::SealFirstOnly) {
                replica.commit_seal();
            }
            Ok(())
        })
    }

    /// Guest B carries on from the last checkpoint of all disks; after an error nothing has changed. See
    /// [`Replica::takeover`].
    pub fn takeover(&self, new_generation: u64) -> Result<(), OfDisk<ReplicaError>> {
        self.step(|replica| replica.check_takeover(new_generation), |replica| replica.takeover(new_generation))
    }

    /// Ends replication without a takeover, on every disk; see [`Replica::stop`]. After an error, the first one, it is
    /// over too, and the images are not whole together.
    pub fn stop(&self) -> Result<(), OfDisk<ReplicaError>> {
        let mut all = self.all();
        let stopped: Vec<_> = all.iter_mut().enumerate().map(|(disk, replica)| of_disk(disk, replica.stop())).collect();
        stopped.into_iter().collect::<Result<(), _>>()?;
        // A disk with nothing left to apply was stopped before another one was written: it says again what it is.
        let settle = |replica: &mut Replica| replica.apply_some(1).map(drop).map_err(ReplicaError::Disk);
        all.iter_mut().enumerate().try_for_each(|(disk, replica)| of_disk(disk, settle(replica)))?;
        drop(all);
        self.1.trim(true);
        Ok(())
    }

    /// Copies about `budget_bytes` of sealed epochs into the bases, every disk its share, and flushes them when a round
    /// ([`Replica::begin_round`]) is there: no disk is locked while a medium is waited for. True while there is more to do on any,
    /// or their records do not say yet what they are. An error keeps no other disk from it. One caller at a time.
    pub fn apply_some(&self, budget_bytes: u64) -> Result<bool, OfDisk<DiskError>> {
        let is_copied = self.copy_some(budget_bytes)?;
        if is_copied { self.end_round() } else { Ok(true) }
    }

    /// The same for a whole round: true when there is more to do after it.
    pub fn apply_round(&self) -> Result<bool, OfDisk<DiskError>> {
        while !self.copy_some(APPLY_SLICE_BYTES)? {}
        self.end_round()
    }

    /// Whether all of the round is copied.
    fn copy_some(&self, budget_bytes: u64) -> Result<bool, OfDisk<DiskError>> {
        let mut all = self.all();
        if !all.iter().any(|replica| replica.is_in_round()) {
            all.iter_mut().for_each(|replica| replica.begin_round());
        }
        drop(all);
        let share_bytes = budget_bytes / self.0.len().max(1) as u64;
        let copied = self.on_each(|replica| copy_share(replica, share_bytes))?;
        Ok(!copied.contains(&true))
    }

    fn end_round(&self) -> Result<bool, OfDisk<DiskError>> {
        let ended = self.on_each(|replica| {
            let flush = lock(replica).lend_flush();
            let flushed = flush.map(LentFlush::carry_out);
            let record = lock(replica).lend_record(flushed)?;
            let recorded = record.map(LentRecord::carry_out);
            let mut replica = lock(replica);
            Ok((replica.end_round(recorded)?, replica.is_unsettled()))
        });
        // Where no epoch follows, none will spill.
        let goes_on = self.0.iter().any(|replica| lock(replica).stage() == Stage::Running);
        self.1.trim(!goes_on);
        if goes_on {
            self.1.prepare();
        }
        let ended = ended?;
        let unsettled = ended.last().is_some_and(|(_, unsettled)| *unsettled);
        Ok(unsettled || ended.iter().any(|(more, _)| *more))
    }

    fn on_each<T>(
        &self,
        mut does: impl FnMut(&Mutex<Replica>) -> Result<T, DiskError>,
    ) -> Result<Vec<T>, OfDisk<DiskError>> {
        let done: Vec<_> = self.0.iter().enumerate().map(|(disk, replica)| of_disk(disk, does(replica))).collect();
        done.into_iter().collect()
    }

    /// Whether these are the same disks, and not others of the same guest.
    #[must_use]
    pub fn are(&self, others: &Self) -> bool {
        Arc::ptr_eq(&self.0, &others.0)
    }

    /// Whether one of them is broken, and with it the next checkpoint.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.0.iter().any(|replica| lock(replica).status().broken)
    }

    /// Whether the records do not say yet what the images are: there is something to be merged or to be applied.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        self.0.iter().any(|replica| lock(replica).is_unsettled())
    }

    /// Whether one of them has lost what was written to it, and with it the guest that would take over.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.0.iter().any(|replica| lock(replica).is_lost())
    }

    /// Where each stands.
    #[must_use]
    pub fn status(&self) -> Vec<ReplicaStatus> {
        self.0.iter().map(|replica| lock(replica).status()).collect()
    }
}
