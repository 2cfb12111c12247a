//! The primary's disk: local first, and a copy of every write on its way to the other host.
//!
//! ```text
//!  guest A ── write ─▶ local disk
//!                └─ copy ─▶ queue: epoch 4 │ 4 │ 5 │ 5 │ 5 ─▶ poll_forward, epochs ≤ allowed ─▶ in flight ─▶ acked
//!                 next_sync_chunk ─▶ ┘                                      mark: a new epoch begins
//! ```
//!
//! | link | in | does | goes to |
//! |---|---|---|---|
//! | any | `attach` | empties the queue, starts the copy of what the other disk has not (see [`resync`]) | Attached |
//! | Attached | `mark` | later writes belong to the next epoch, and wait | Attached |
//! | Attached | `allow` | lets an epoch's writes go | Attached |
//! | Attached | an acknowledgement is an error | empties the queue | Failed |
//! | any | `detach` | empties the queue | Detached |
//!
//! The guest never waits for the wire. Its writes are refused with [`DiskError::Busy`], before anything is done,
//! only when the queue is at its bound, and [`Mirror::pressure`] says when a checkpoint is what would empty it.
//! When forwarding fails the guest writes on alone, [`Mirror::drained`] is never true again and the status says
//! why: the next checkpoint cannot be mistaken for a good one.
//!
//! Zeroes are queued as zeroes, and cost the wire nothing. A trim is zeroes too, where the local disk makes a hole at
//! once, and nothing otherwise. NBD would let each disk do as it likes; but a guest that has read its trimmed bytes once
//! must not read others after a takeover, so this side decides and the other follows.
//!
//! What waits and is wholly overwritten in the same epoch never leaves: the other host owns whole epochs, so nobody can
//! miss it.
//!
//! The trap: the initial copy runs beside the guest. A chunk is read from the local disk and queued in one step,
//! under the lock guest writes take, so it lies in the queue exactly where its contents were true; an older chunk
//! cannot overwrite a newer write as long as the wire keeps the queue's order where writes overlap.
//!
//! Source: QEMU `docs/block-replication.txt` ("primary write requests are forwarded"), whose quorum waits for
//! the wire on every write, and `block/replication.c`, whose latch this makes visible.

pub mod resync;
#[cfg(test)]
mod tests;

pub use self::resync::{Holds, SYNC_CHUNK_BYTES, Target};

use self::resync::{Changes, ChunkHash, GRANULE_BYTES, HASHES_MAX, Resync, What, hash_chunk};
use super::extents::{Content, MAX_ZEROES_BYTES};
use super::{FAST_HOLE, lock, zero_or_leave};
use crate::bitmap::Bitmap;
use crate::disk::{Disk, DiskError, Extent, Zeroing, check_range};
use crate::pool::{Block, Pool};
use bytes::Bytes;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

/// What a queued write is charged beside its bytes.
pub const ENTRY_COST_BYTES: u64 = 64;
/// Bytes handed out and not acknowledged, beyond which further copies wait here, where they can still be spared.
pub const WINDOW_BYTES: u64 = 16 << 20;
/// Waiting writes that one write looks at.
const SPARED_MAX: usize = 32;

/// A copy of a write, for the forwarder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forward {
    /// Names it in [`Mirror::handle_acked`]; never used twice.
    pub seq: u64,
    /// The epoch it belongs to.
    pub epoch: u64,
    /// First byte.
    pub offset: u64,
    /// What was written.
    pub payload: Payload,
}

/// What a forwarded write leaves on a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload {
    /// These bytes.
    Data(Bytes),
    /// Zeroes.
    Zeroes {
        /// How many; at most [`MAX_ZEROES_BYTES`].
        len_bytes: u32,
        /// Their space stays allocated.
        keep_allocated: bool,
    },
}

impl Payload {
    /// Bytes it changes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zeroes { len_bytes, .. } => (*len_bytes).into(),
        }
    }

    /// Bytes that travel.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        if let Self::Data(bytes) = self { bytes.len() as u64 } else { 0 }
    }

    /// The same, borrowed.
    #[must_use]
    pub fn content(&self) -> Content<'_> {
        match *self {
            Self::Data(ref bytes) => Content::Data(bytes),
            Self::Zeroes { len_bytes, keep_allocated } => {
                Content::Zeroes { len_bytes: len_bytes.into(), keep_allocated }
            }
        }
    }

    /// What the queue is charged for it.
    fn cost_bytes(&self) -> u64 {
        self.wire_bytes() + ENTRY_COST_BYTES
    }
}

/// What one step of the initial copy did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SyncStep {
    /// A chunk was queued.
    Queued {
        /// Its length.
        bytes: u64,
    },
    /// A part was not queued, since the target has it.
    Skipped {
        /// Its length.
        bytes: u64,
    },
    /// The queue has no room for a chunk now.
    Full,
    /// The hash of the next chunk is not there yet.
    Waiting,
    /// There is nothing to copy, or nothing left.
    Finished,
}

/// A mirror's state, for people and for the daemon's status.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct MirrorStatus {
    /// Whether writes are copied.
    pub attached: bool,
    /// The first forwarding error since the last attach.
    pub error: Option<String>,
    /// Bytes the initial copy is done with: queued, or at the target already.
    pub sync_done_bytes: u64,
    /// Bytes it has to look at; the disk's size.
    pub sync_total_bytes: u64,
    /// What it copies: `all`, `nonzero`, `changed` since the target's checkpoint, or `differing` by the target's hashes.
    pub sync_what: &'static str,
    /// Of what it is done with, bytes that the target had.
    pub sync_skipped_bytes: u64,
    /// Of what it is done with, bytes that were queued.
    pub sync_sent_bytes: u64,
    /// Bytes queued or in flight, what their entries cost included.
    pub queued_bytes: u64,
    /// Of these, bytes that wait for [`Mirror::allow`].
    pub held_bytes: u64,
    /// Bytes acknowledged by the other host since the last attach.
    pub forwarded_bytes: u64,
    /// Bytes that were overwritten in the queue, and so never sent, since the last attach.
    pub spared_bytes: u64,
    /// The epoch writes belong to now.
    pub epoch: u64,
    /// The last epoch whose writes may go.
    pub allowed_epoch: u64,
}

/// The way to the other host.
#[derive(Debug)]
enum Link {
    Detached,
    Attached(Queue),
    Failed { first: String },
}

#[derive(Debug, Default)]
struct Queue {
    /// By sequence number.
    waiting: BTreeMap<u64, Forward>,
    /// The offsets of what waits, with its sequence numbers.
    starts: BTreeSet<(u64, u64)>,
    /// Of what was handed out: epoch, bytes it changes, bytes that travel.
    in_flight: BTreeMap<u64, (u64, u64, u64)>,
    in_flight_bytes: u64,
    queued_bytes: u64,
    /// The part of `queued_bytes` that belongs to epochs not yet allowed.
    held_bytes: u64,
    forwarded_bytes: u64,
    spared_bytes: u64,
    resync: Resync,
    refused: bool,
}

/// The primary's disk.
pub struct Mirror {
    local: Box<dyn Disk>,
    bound_bytes: u64,
    link: Link,
    /// What the replica of this link, or of the last one, does not own.
    changes: Option<Changes>,
    epoch: u64,
    allowed_epoch: u64,
    /// The epoch of the last attach: the first checkpoint's.
    first_epoch: u64,
    next_seq: u64,
    pool: Pool,
}

impl Mirror {
    /// A mirror of `local`, not attached: a plain disk. Copies waiting or in flight take at most `bound_bytes`;
    /// a single larger write is taken when there is nothing else.
    #[must_use]
    pub fn new(local: Box<dyn Disk>, bound_bytes: u64) -> Self {
        let (link, changes, pool) = (Link::Detached, None, Pool::default());
        Self { local, bound_bytes, link, changes, epoch: 0, allowed_epoch: 0, first_epoch: 0, next_seq: 0, pool }
    }

    /// Starts copying, first whatever the target has not. What an earlier link still held is dropped. The epoch goes
    /// on; its writes may go at once.
    pub fn attach(&mut self, target: Target) {
        (self.first_epoch, self.allowed_epoch) = (self.epoch, self.epoch);
        let changes = Some(target.session).filter(|session| *session != 0);
        let changes = changes.map(|session| Changes::new(session, self.local.size_bytes()));
        let known = std::mem::replace(&mut self.changes, changes);
        let what = match target.holds {
            Holds::Anything => What::All,
            Holds::Zeroes => What::NotZero,
            Holds::Same => What::Marked(Bitmap::new(self.local.size_bytes().div_ceil(GRANULE_BYTES))),
            Holds::Checkpoint { session, number } => match known {
                Some(changes) if changes.counts_from(session, number) => What::Marked(changes.into_granules()),
                _ => What::All,
            },
            Holds::Hashed => What::Differing { hashes: VecDeque::new(), received: 0 },
        };
        self.link = Link::Attached(Queue { resync: Resync { what, ..Resync::default() }, ..Queue::default() });
    }

    /// Stops copying and drops what was queued; the guest goes on with the local disk. What it writes is remembered,
    /// for a replica that was in step.
    pub fn detach(&mut self) {
        self.link = Link::Detached;
    }

    /// Whether a replica that is this checkpoint lacks only what is remembered here.
    #[must_use]
    pub fn counts_from(&self, session: u64, number: u64) -> bool {
        self.changes.as_ref().is_some_and(|changes| changes.counts_from(session, number))
    }

    /// One step of the initial copy: reads the next chunk and queues it, unless the target has it. A chunk that cannot
    /// be read fails the link. The guest's writes are left half of the queue.
    pub fn next_sync_chunk(&mut self) -> Result<SyncStep, DiskError> {
        let size_bytes = self.local.size_bytes();
        let Link::Attached(queue) = &mut self.link else { return Ok(SyncStep::Finished) };
        let skipped_before = queue.resync.skipped_bytes;
        let bytes = queue.resync.next(size_bytes);
        let offset = queue.resync.at;
        if bytes == 0 {
            let bytes = queue.resync.skipped_bytes - skipped_before;
            return Ok(if bytes > 0 { SyncStep::Skipped { bytes } } else { SyncStep::Finished });
        }
        if queue.queued_bytes > 0 && queue.queued_bytes + bytes + ENTRY_COST_BYTES > self.bound_bytes / 2 {
            return Ok(SyncStep::Full);
        }
        let theirs = match &mut queue.resync.what {
            What::Differing { hashes, .. } => match hashes.pop_front() {
                Some(hash) => Some(hash),
                None => return Ok(SyncStep::Waiting),
            },
            What::All | What::NotZero | What::Marked(_) => None,
        };
        let mut chunk = vec![0; bytes as usize];
        // A hole need not be read.
        let is_hole = self.local.leading_hole_bytes(offset, bytes) == bytes;
        if !is_hole && let Err(error) = self.local.read(offset, &mut chunk) {
            self.fail(&error);
            return Err(error);
        }
        let is_zero = is_hole || crate::page::is_zero(&chunk);
        let has_it =
            theirs.map_or(is_zero && matches!(queue.resync.what, What::NotZero), |theirs| theirs == hash_chunk(&chunk));
        if has_it {
            queue.resync.skip(bytes);
            return Ok(SyncStep::Skipped { bytes });
        }
        queue.resync.at += bytes;
        queue.resync.sent_bytes += bytes;
        let zeroes = Payload::Zeroes { len_bytes: bytes as u32, keep_allocated: false };
        self.queue(offset, if is_zero { zeroes } else { Payload::Data(chunk.into()) });
        Ok(SyncStep::Queued { bytes })
    }

    /// Whether [`Self::handle_hash`] may be called; `None` when it never will.
    #[must_use]
    pub fn room_for_hash(&self) -> Option<bool> {
        match &self.link {
            Link::Attached(Queue { resync: Resync { what: What::Differing { hashes, .. }, .. }, .. }) => {
                Some(hashes.len() < HASHES_MAX)
            }
            _ => None,
        }
    }

    /// The hash of the target's next chunk, in the disk's order. False when nobody waits for one.
    pub fn handle_hash(&mut self, hash: ChunkHash) -> bool {
        let chunks = resync::chunks(self.local.size_bytes());
        let wanted = self.room_for_hash() == Some(true);
        let Link::Attached(queue) = &mut self.link else { return false };
        match &mut queue.resync.what {
            What::Differing { hashes, received } if wanted && *received < chunks => {
                hashes.push_back(hash);
                *received += 1;
                true
            }
            _ => false,
        }
    }

    /// Whether the initial copy has been read to its end. What it queued may still be on its way.
    #[must_use]
    pub fn sync_finished(&self) -> bool {
        matches!(&self.link, Link::Attached(queue) if queue.resync.at == self.local.size_bytes())
    }

    /// Ends the current epoch and returns its number; later writes belong to the next and wait for
    /// [`Self::allow`]. The guest must be suspended. Panics during the initial copy, the rest of which would wait
    /// behind writes that wait for it.
    pub fn mark(&mut self) -> u64 {
        if let Link::Attached(queue) = &mut self.link {
            assert_eq!(queue.resync.at, self.local.size_bytes(), "an epoch ends after the initial copy");
            queue.refused = false;
        }
        self.changes.iter_mut().for_each(Changes::mark);
        self.epoch += 1;
        self.epoch - 1
    }

    /// Lets the writes of `epoch` and of those before it go: the other host owns the checkpoint before it.
    pub fn allow(&mut self, epoch: u64) {
        self.allowed_epoch = self.allowed_epoch.max(epoch);
        let Link::Attached(queue) = &mut self.link else { return };
        let held = queue.waiting.values().filter(|write| write.epoch > self.allowed_epoch);
        queue.held_bytes = held.map(|write| write.payload.cost_bytes()).sum();
        if epoch == self.epoch && epoch > self.first_epoch {
            self.changes.iter_mut().for_each(|changes| changes.own(epoch - self.first_epoch));
        }
    }

    /// The next copy that may be sent: none while [`WINDOW_BYTES`] are in flight. It stays charged to the queue until
    /// it is acknowledged.
    pub fn poll_forward(&mut self) -> Option<Forward> {
        let Link::Attached(queue) = &mut self.link else { return None };
        let next = queue.waiting.first_entry().filter(|next| next.get().epoch <= self.allowed_epoch)?;
        let (len_bytes, wire_bytes) = (next.get().payload.len_bytes(), next.get().payload.wire_bytes());
        if !queue.in_flight.is_empty() && queue.in_flight_bytes + wire_bytes > WINDOW_BYTES {
            return None;
        }
        let write = next.remove();
        queue.starts.remove(&(write.offset, write.seq));
        queue.in_flight.insert(write.seq, (write.epoch, len_bytes, wire_bytes));
        queue.in_flight_bytes += wire_bytes;
        Some(write)
    }

    /// The other host's answer to a copy. An error fails the link. The answer to a copy of an earlier link says
    /// nothing about this one and is ignored.
    pub fn handle_acked(&mut self, seq: u64, result: Result<(), DiskError>) {
        let Link::Attached(queue) = &mut self.link else { return };
        let Some((_, len_bytes, wire_bytes)) = queue.in_flight.remove(&seq) else { return };
        queue.queued_bytes -= wire_bytes + ENTRY_COST_BYTES;
        queue.in_flight_bytes -= wire_bytes;
        match result {
            Ok(()) => queue.forwarded_bytes += len_bytes,
            Err(error) => self.fail(&error),
        }
    }

    /// Fails the link for a reason of the driver's, a lost connection for one; the first reason stays.
    pub fn fail(&mut self, error: &DiskError) {
        if let Link::Attached(_) = self.link {
            self.link = Link::Failed { first: error.to_string() };
        }
    }

    /// Whether the other host has acknowledged the whole initial copy and every write of `epoch` and before.
    /// Never true without a working link.
    #[must_use]
    pub fn drained(&self, epoch: u64) -> bool {
        let Link::Attached(queue) = &self.link else { return false };
        self.sync_finished()
            && queue.waiting.first_key_value().is_none_or(|(_, write)| write.epoch > epoch)
            && queue.in_flight.values().all(|(of, ..)| *of > epoch)
    }

    /// Whether a checkpoint is due, since only it can empty the queue: half of the bound waits for one, or the
    /// guest was refused while something does.
    #[must_use]
    pub fn pressure(&self) -> bool {
        matches!(&self.link, Link::Attached(queue)
            if queue.held_bytes > self.bound_bytes / 2 || (queue.refused && queue.held_bytes > 0))
    }

    /// Where it stands, in numbers.
    #[must_use]
    pub fn status(&self) -> MirrorStatus {
        let none = Queue::default();
        let (queue, attached, error) = match &self.link {
            Link::Detached => (&none, false, None),
            Link::Attached(queue) => (queue, true, None),
            Link::Failed { first } => (&none, false, Some(first.clone())),
        };
        MirrorStatus {
            attached,
            error,
            sync_done_bytes: queue.resync.at,
            sync_total_bytes: self.local.size_bytes(),
            sync_what: queue.resync.what.name(),
            sync_skipped_bytes: queue.resync.skipped_bytes,
            sync_sent_bytes: queue.resync.sent_bytes,
            queued_bytes: queue.queued_bytes,
            held_bytes: queue.held_bytes,
            forwarded_bytes: queue.forwarded_bytes,
            spared_bytes: queue.spared_bytes,
            epoch: self.epoch,
            allowed_epoch: self.allowed_epoch,
        }
    }

    fn queue(&mut self, offset: u64, payload: Payload) {
        self.spare(offset, payload.len_bytes());
        let Link::Attached(queue) = &mut self.link else { return };
        let cost_bytes = payload.cost_bytes();
        queue.queued_bytes += cost_bytes;
        if self.epoch > self.allowed_epoch {
            queue.held_bytes += cost_bytes;
        }
        let (seq, epoch) = (self.next_seq, self.epoch);
        queue.starts.insert((offset, seq));
        queue.waiting.insert(seq, Forward { seq, epoch, offset, payload });
        self.next_seq += 1;
    }

    /// Forgets what waits, belongs to this epoch and is about to be overwritten whole. What lies between the two in the
    /// queue and overlaps either is overwritten in that part as well, so the epoch ends with the same bytes.
    fn spare(&mut self, offset: u64, len_bytes: u64) {
        let Link::Attached(queue) = &mut self.link else { return };
        let end = offset + len_bytes;
        let covered = |(start, seq): &(u64, u64)| {
            let write = queue.waiting.get(seq).filter(|write| write.epoch == self.epoch)?;
            (start + write.payload.len_bytes() <= end).then_some((*start, *seq))
        };
        let covered: Vec<_> = queue.starts.range((offset, 0)..(end, 0)).take(SPARED_MAX).filter_map(covered).collect();
        for key in covered {
            queue.starts.remove(&key);
            let Some(write) = queue.waiting.remove(&key.1) else { continue };
            let cost_bytes = write.payload.cost_bytes();
            queue.queued_bytes -= cost_bytes;
            queue.held_bytes -= if write.epoch > self.allowed_epoch { cost_bytes } else { 0 };
            queue.spared_bytes += write.payload.wire_bytes();
        }
    }

    /// Whether the queue has room for a write of the guest, which is refused otherwise.
    fn admit(&mut self, cost_bytes: u64) -> Result<(), DiskError> {
        match &mut self.link {
            Link::Attached(queue) if queue.queued_bytes > 0 && queue.queued_bytes + cost_bytes > self.bound_bytes => {
                queue.refused = true;
                Err(DiskError::Busy)
            }
            _ => Ok(()),
        }
    }

    /// Writes to the local disk only; whether a copy is to be queued then.
    fn write_locally(&mut self, offset: u64, bytes: &[u8]) -> Result<bool, DiskError> {
        let len_bytes = bytes.len() as u64;
        check_range(self.local.size_bytes(), offset, len_bytes)?;
        self.admit(len_bytes + ENTRY_COST_BYTES)?;
        let result = self.local.write(offset, bytes);
        self.written(offset, len_bytes, &result);
        result.map(|()| matches!(self.link, Link::Attached(_)))
    }

    /// After a local write. One that failed may have landed in part, so what the disk holds there now is unknown, and
    /// the link fails with it. One that was refused has done nothing.
    fn written(&mut self, offset: u64, len_bytes: u64, result: &Result<(), DiskError>) {
        if matches!(result, Err(DiskError::Busy | DiskError::NotSupported)) {
            return;
        }
        self.changes.iter_mut().for_each(|changes| changes.write(offset, len_bytes));
        if let Err(error) = result {
            self.fail(error);
        }
    }
}

impl Disk for Mirror {
    fn size_bytes(&self) -> u64 {
        self.local.size_bytes()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.local.read(offset, into)
    }

    /// Writes locally, then queues the copy.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        if self.write_locally(offset, bytes)? {
            self.queue(offset, Payload::Data(self.pool.share(bytes)));
        }
        Ok(())
    }

    fn keeps_blocks(&self) -> bool {
        matches!(self.link, Link::Attached(_))
    }

    /// The same; the block itself is what is sent.
    fn write_block(&mut self, offset: u64, block: &mut Block) -> Result<(), DiskError> {
        if self.write_locally(offset, block)? {
            self.queue(offset, Payload::Data(Bytes::from_owner(std::mem::take(block))));
        }
        Ok(())
    }

    /// Flushes the local disk. The other host's copy is as good as its last checkpoint, flushed or not.
    fn flush(&mut self) -> Result<(), DiskError> {
        self.local.flush()
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        check_range(self.local.size_bytes(), offset, len_bytes)?;
        self.admit(len_bytes.div_ceil(MAX_ZEROES_BYTES) * ENTRY_COST_BYTES)?;
        let result = self.local.write_zeroes(offset, len_bytes, how);
        self.written(offset, len_bytes, &result);
        if result.is_ok() && matches!(self.link, Link::Attached(_)) {
            let end = offset + len_bytes;
            for at in (offset..end).step_by(MAX_ZEROES_BYTES as usize) {
                let len_bytes = (end - at).min(MAX_ZEROES_BYTES) as u32;
                self.queue(at, Payload::Zeroes { len_bytes, keep_allocated: how.keep_allocated });
            }
        }
        result
    }

    /// A hole on both hosts, or nothing on either.
    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        zero_or_leave(self.write_zeroes(offset, len_bytes, FAST_HOLE))
    }

    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        self.local.extents(offset, len_bytes, max)
    }

    fn leading_hole_bytes(&mut self, offset: u64, len_bytes: u64) -> u64 {
        self.local.leading_hole_bytes(offset, len_bytes)
    }
}

/// Guest A's disk.
#[derive(Clone)]
pub struct MirrorHandle(pub Arc<Mutex<Mirror>>);

impl Disk for MirrorHandle {
    fn size_bytes(&self) -> u64 {
        lock(&self.0).size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        lock(&self.0).read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        lock(&self.0).write(offset, bytes)
    }
    fn keeps_blocks(&self) -> bool {
        lock(&self.0).keeps_blocks()
    }
    fn write_block(&mut self, offset: u64, block: &mut Block) -> Result<(), DiskError> {
        lock(&self.0).write_block(offset, block)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        lock(&self.0).flush()
    }
    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        lock(&self.0).write_zeroes(offset, len_bytes, how)
    }
    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        lock(&self.0).trim(offset, len_bytes)
    }
    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        lock(&self.0).extents(offset, len_bytes, max)
    }
    fn leading_hole_bytes(&mut self, offset: u64, len_bytes: u64) -> u64 {
        lock(&self.0).leading_hole_bytes(offset, len_bytes)
    }
}
