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
//! | any | `attach` | empties the queue, starts the initial copy | Attached |
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
//! The trap: the initial copy runs beside the guest. A chunk is read from the local disk and queued in one step,
//! under the lock guest writes take, so it lies in the queue exactly where its contents were true; an older chunk
//! cannot overwrite a newer write as long as the wire keeps the queue's order where writes overlap.
//!
//! Source: QEMU `docs/block-replication.txt` ("primary write requests are forwarded"), whose quorum waits for
//! the wire on every write, and `block/replication.c`, whose latch this makes visible.

use super::lock;
use crate::disk::{Disk, DiskError, check_range};
use bytes::Bytes;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

/// Bytes read and queued by one step of the initial copy.
pub const SYNC_CHUNK_BYTES: u64 = 1 << 20;
/// What a queued write is charged beside its bytes.
pub const ENTRY_COST_BYTES: u64 = 64;

/// A copy of a write, for the forwarder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forward {
    /// Names it in [`Mirror::handle_acked`]; never used twice.
    pub seq: u64,
    /// The epoch it belongs to.
    pub epoch: u64,
    /// First byte.
    pub offset: u64,
    /// The bytes.
    pub data: Bytes,
}

/// What one step of the initial copy did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SyncStep {
    /// A chunk was queued.
    Queued {
        /// Its length.
        bytes: u64,
    },
    /// A chunk of zeroes was not queued, since the target is blank.
    Skipped {
        /// Its length.
        bytes: u64,
    },
    /// The queue has no room for a chunk now.
    Full,
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
    /// Bytes the initial copy has read.
    pub sync_done_bytes: u64,
    /// Bytes it has to read; the disk's size.
    pub sync_total_bytes: u64,
    /// Bytes queued or in flight, what their entries cost included.
    pub queued_bytes: u64,
    /// Of these, bytes that wait for [`Mirror::allow`].
    pub held_bytes: u64,
    /// Bytes acknowledged by the other host since the last attach.
    pub forwarded_bytes: u64,
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
    waiting: VecDeque<Forward>,
    /// Epoch and length of what was handed out, by sequence number.
    in_flight: BTreeMap<u64, (u64, u64)>,
    queued_bytes: u64,
    /// The part of `queued_bytes` that belongs to epochs not yet allowed.
    held_bytes: u64,
    forwarded_bytes: u64,
    sync_done_bytes: u64,
    blank: bool,
    refused: bool,
}

/// The primary's disk.
pub struct Mirror {
    local: Box<dyn Disk>,
    bound_bytes: u64,
    link: Link,
    epoch: u64,
    allowed_epoch: u64,
    next_seq: u64,
}

impl Mirror {
    /// A mirror of `local`, not attached: a plain disk. Copies waiting or in flight take at most `bound_bytes`;
    /// a single larger write is taken when there is nothing else.
    #[must_use]
    pub fn new(local: Box<dyn Disk>, bound_bytes: u64) -> Self {
        Self { local, bound_bytes, link: Link::Detached, epoch: 0, allowed_epoch: 0, next_seq: 0 }
    }

    /// Starts copying, the whole disk first. What an earlier link still held is dropped. `target_blank` says that
    /// the other disk holds only zeroes, which then need no copy. The epoch goes on; its writes may go at once.
    pub fn attach(&mut self, target_blank: bool) {
        self.allowed_epoch = self.epoch;
        self.link = Link::Attached(Queue { blank: target_blank, ..Queue::default() });
    }

    /// Stops copying and drops what was queued; the guest goes on with the local disk.
    pub fn detach(&mut self) {
        self.link = Link::Detached;
    }

    /// One step of the initial copy: reads the next chunk and queues it. A chunk that cannot be read fails the
    /// link. The guest's writes are left half of the queue.
    pub fn next_sync_chunk(&mut self) -> Result<SyncStep, DiskError> {
        let size_bytes = self.local.size_bytes();
        let Link::Attached(queue) = &mut self.link else { return Ok(SyncStep::Finished) };
        let offset = queue.sync_done_bytes;
        let bytes = SYNC_CHUNK_BYTES.min(size_bytes - offset);
        if bytes == 0 {
            return Ok(SyncStep::Finished);
        }
        if queue.queued_bytes > 0 && queue.queued_bytes + bytes + ENTRY_COST_BYTES > self.bound_bytes / 2 {
            return Ok(SyncStep::Full);
        }
        let mut chunk = vec![0; bytes as usize];
        if let Err(error) = self.local.read(offset, &mut chunk) {
            self.fail(&error);
            return Err(error);
        }
        queue.sync_done_bytes += bytes;
        if queue.blank && crate::page::is_zero(&chunk) {
            return Ok(SyncStep::Skipped { bytes });
        }
        self.queue(offset, chunk.into());
        Ok(SyncStep::Queued { bytes })
    }

    /// Whether the initial copy has been read to its end. What it queued may still be on its way.
    #[must_use]
    pub fn sync_finished(&self) -> bool {
        matches!(&self.link, Link::Attached(queue) if queue.sync_done_bytes == self.local.size_bytes())
    }

    /// Ends the current epoch and returns its number; later writes belong to the next and wait for
    /// [`Self::allow`]. The guest must be suspended. Panics during the initial copy, the rest of which would wait
    /// behind writes that wait for it.
    pub fn mark(&mut self) -> u64 {
        if let Link::Attached(queue) = &mut self.link {
            assert_eq!(queue.sync_done_bytes, self.local.size_bytes(), "an epoch ends after the initial copy");
            queue.refused = false;
        }
        self.epoch += 1;
        self.epoch - 1
    }

    /// Lets the writes of `epoch` and of those before it go: the other host owns the checkpoint before it.
    pub fn allow(&mut self, epoch: u64) {
        self.allowed_epoch = self.allowed_epoch.max(epoch);
        if let Link::Attached(queue) = &mut self.link {
            let held = queue.waiting.iter().filter(|write| write.epoch > self.allowed_epoch);
            queue.held_bytes = held.map(|write| cost(write.data.len() as u64)).sum();
        }
    }

    /// The next copy that may be sent. It stays charged to the queue until it is acknowledged.
    pub fn poll_forward(&mut self) -> Option<Forward> {
        let Link::Attached(queue) = &mut self.link else { return None };
        if queue.waiting.front()?.epoch > self.allowed_epoch {
            return None;
        }
        let write = queue.waiting.pop_front()?;
        queue.in_flight.insert(write.seq, (write.epoch, write.data.len() as u64));
        Some(write)
    }

    /// The other host's answer to a copy. An error fails the link. The answer to a copy of an earlier link says
    /// nothing about this one and is ignored.
    pub fn handle_acked(&mut self, seq: u64, result: Result<(), DiskError>) {
        let Link::Attached(queue) = &mut self.link else { return };
        let Some((_, len_bytes)) = queue.in_flight.remove(&seq) else { return };
        queue.queued_bytes -= cost(len_bytes);
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
            && queue.waiting.front().is_none_or(|write| write.epoch > epoch)
            && queue.in_flight.values().all(|(of, _)| *of > epoch)
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
            sync_done_bytes: queue.sync_done_bytes,
            sync_total_bytes: self.local.size_bytes(),
            queued_bytes: queue.queued_bytes,
            held_bytes: queue.held_bytes,
            forwarded_bytes: queue.forwarded_bytes,
            epoch: self.epoch,
            allowed_epoch: self.allowed_epoch,
        }
    }

    fn queue(&mut self, offset: u64, data: Bytes) {
        let Link::Attached(queue) = &mut self.link else { return };
        let cost_bytes = cost(data.len() as u64);
        queue.queued_bytes += cost_bytes;
        if self.epoch > self.allowed_epoch {
            queue.held_bytes += cost_bytes;
        }
        queue.waiting.push_back(Forward { seq: self.next_seq, epoch: self.epoch, offset, data });
        self.next_seq += 1;
    }
}

fn cost(len_bytes: u64) -> u64 {
    len_bytes + ENTRY_COST_BYTES
}

impl Disk for Mirror {
    fn size_bytes(&self) -> u64 {
        self.local.size_bytes()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.local.read(offset, into)
    }

    /// Writes locally, then queues the copy. A write that fails locally may have landed in part, so what the disk
    /// holds there now is unknown and the link fails with it.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        check_range(self.local.size_bytes(), offset, bytes.len() as u64)?;
        if let Link::Attached(queue) = &mut self.link
            && queue.queued_bytes > 0
            && queue.queued_bytes + cost(bytes.len() as u64) > self.bound_bytes
        {
            queue.refused = true;
            return Err(DiskError::Busy);
        }
        match self.local.write(offset, bytes) {
            Ok(()) => {
                if matches!(self.link, Link::Attached(_)) {
                    self.queue(offset, Bytes::copy_from_slice(bytes));
                }
                Ok(())
            }
            Err(DiskError::Busy) => Err(DiskError::Busy),
            Err(error) => {
                self.fail(&error);
                Err(error)
            }
        }
    }

    /// Flushes the local disk. The other host's copy is as good as its last checkpoint, flushed or not.
    fn flush(&mut self) -> Result<(), DiskError> {
        self.local.flush()
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
    fn flush(&mut self) -> Result<(), DiskError> {
        lock(&self.0).flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;
    use proptest::prelude::*;

    const SIZE: usize = 3 * SYNC_CHUNK_BYTES as usize + 512;

    /// A mirror of `size` bytes, attached and in step.
    fn in_step(size: usize, bound_bytes: u64) -> Mirror {
        let mut mirror = Mirror::new(Box::new(MemoryDisk::new(size)), bound_bytes);
        mirror.attach(true);
        while mirror.next_sync_chunk().unwrap() != SyncStep::Finished {}
        assert!(mirror.drained(0));
        mirror
    }

    fn forward(mirror: &mut Mirror, target: &mut dyn Disk) -> bool {
        let Some(write) = mirror.poll_forward() else { return false };
        let result = target.write(write.offset, &write.data);
        mirror.handle_acked(write.seq, result);
        true
    }

    #[test]
    fn primary_read_write_start_stop_and_get_error() {
        let mut mirror = Mirror::new(Box::new(MemoryDisk::new(64)), 1000);
        mirror.write(0, b"alone").unwrap();
        assert!(mirror.poll_forward().is_none() && !mirror.status().attached && !mirror.drained(0));
        assert_eq!((mirror.mark(), mirror.mark()), (0, 1), "a checkpoint of a plain disk is nothing");
        mirror.attach(false);
        assert_eq!(mirror.next_sync_chunk().unwrap(), SyncStep::Queued { bytes: 64 });
        mirror.write(0, b"pair!").unwrap();
        assert_eq!((mirror.poll_forward().unwrap().data.len(), mirror.poll_forward().unwrap().data.len()), (64, 5));
        assert_eq!(mirror.status().error, None);
        mirror.detach();
        mirror.write(0, b"after").unwrap();
        let mut back = [0; 5];
        mirror.read(0, &mut back).unwrap();
        assert_eq!((&back, mirror.poll_forward(), mirror.status().queued_bytes), (b"after", None, 0));
    }

    #[test]
    fn an_epoch_waits_until_it_is_allowed() {
        let (mut mirror, mut target) = (in_step(64, 1000), MemoryDisk::new(64));
        mirror.write(0, b"a").unwrap();
        assert_eq!(mirror.mark(), 0);
        mirror.write(1, b"b").unwrap();
        assert!(!mirror.drained(0));
        assert!(forward(&mut mirror, &mut target) && !forward(&mut mirror, &mut target));
        assert!(mirror.drained(0) && !mirror.drained(1));
        assert_eq!(target.bytes()[..2], *b"a\0");
        mirror.allow(1);
        let in_flight = mirror.poll_forward().unwrap();
        assert!(!mirror.drained(1) && mirror.drained(0));
        mirror.handle_acked(in_flight.seq, Ok(()));
        assert!(mirror.drained(1));
        assert_eq!((mirror.status().queued_bytes, mirror.status().forwarded_bytes), (0, 2));
    }

    #[test]
    fn at_the_bound_a_write_is_refused_before_anything_is_done() {
        let mut mirror = in_step(4096, 1000);
        mirror.mark();
        mirror.write(0, &[1; 400]).unwrap();
        assert!(!mirror.pressure());
        mirror.write(0, &[2; 1000 - 400 - 2 * ENTRY_COST_BYTES as usize]).unwrap();
        assert!(mirror.pressure(), "more than half waits for a checkpoint");
        assert!(matches!(mirror.write(600, &[3]), Err(DiskError::Busy)));
        let mut byte = [9];
        mirror.read(600, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        mirror.allow(1);
        assert!(!mirror.pressure());
        assert!(forward(&mut mirror, &mut MemoryDisk::new(4096)));
        mirror.write(600, &[3]).unwrap();

        let mut mirror = in_step(4096, 100);
        mirror.mark();
        mirror.write(0, &[1; 4000]).expect("a write longer than the bound, alone");
        let mut mirror = in_step(4096, 200);
        mirror.mark();
        mirror.write(0, &[1; 1]).unwrap();
        assert!(mirror.write(0, &[1; 80]).is_err() && mirror.pressure(), "refused for what only a checkpoint frees");
    }

    #[test]
    fn a_forwarding_error_is_loud_and_stays_and_the_guest_goes_on() {
        let mut mirror = in_step(64, 1000);
        mirror.write(0, b"x").unwrap();
        mirror.write(1, b"y").unwrap();
        let write = mirror.poll_forward().unwrap();
        mirror.handle_acked(write.seq, Err(DiskError::Fenced { theirs: 1, ours: 2 }));
        mirror.write(2, b"z").unwrap();
        mirror.handle_acked(write.seq, Ok(()));
        mirror.mark();
        let status = mirror.status();
        assert!(status.error.unwrap().contains("generation 1") && !status.attached && !mirror.drained(0));
        assert_eq!(mirror.poll_forward(), None);
        mirror.attach(true);
        mirror.handle_acked(write.seq, Err(DiskError::Busy));
        assert_eq!(mirror.status().error, None, "an answer to a copy of the link before");
        mirror.fail(&DiskError::Busy);
        assert!(mirror.status().error.is_some());
    }

    #[test]
    fn a_blank_target_gets_no_zeroes() {
        let mut mirror = Mirror::new(Box::new(MemoryDisk::new(SIZE)), 64 << 20);
        mirror.write(SYNC_CHUNK_BYTES, b"x").unwrap();
        mirror.attach(true);
        let steps: Vec<_> = std::iter::from_fn(|| Some(mirror.next_sync_chunk().unwrap())).take(5).collect();
        let bytes = SYNC_CHUNK_BYTES;
        let (skipped, queued) = (SyncStep::Skipped { bytes }, SyncStep::Queued { bytes });
        assert_eq!(steps, [skipped, queued, skipped, SyncStep::Skipped { bytes: 512 }, SyncStep::Finished]);
        assert!(mirror.sync_finished() && !mirror.drained(0));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Write(usize, usize, u8),
        Sync,
        Forward(usize),
        Checkpoint,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0..SIZE, 0_usize..2 << 20, any::<u8>()).prop_map(|(at, len, byte)| Op::Write(at, len, byte)),
            2 => Just(Op::Sync),
            3 => (1_usize..4).prop_map(Op::Forward),
            1 => Just(Op::Checkpoint),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// At each checkpoint the target is the disk as it was when the epoch was marked.
        #[test]
        fn the_target_is_the_disk_at_every_mark(ops in prop::collection::vec(op(), 1..40), blank in any::<bool>()) {
            let mut mirror = Mirror::new(Box::new(MemoryDisk::new(SIZE)), 4 << 20);
            let (mut model, mut target) = (vec![0; SIZE], MemoryDisk::new(SIZE));
            if !blank {
                target.write(0, &[0xee; SIZE]).unwrap();
            }
            mirror.write(5, b"before").unwrap();
            model[5..11].copy_from_slice(b"before");
            mirror.attach(blank);
            let mut marked: Option<(u64, Vec<u8>)> = None;
            for op in ops.into_iter().chain([Op::Checkpoint, Op::Checkpoint]) {
                match op {
                    Op::Write(at, len, byte) => {
                        let range = at..(at + len).min(SIZE);
                        match mirror.write(at as u64, &vec![byte; range.len()]) {
                            Ok(()) => model[range].fill(byte),
                            Err(error) => prop_assert!(matches!(error, DiskError::Busy), "{}", error),
                        }
                    }
                    Op::Sync => drop(mirror.next_sync_chunk().unwrap()),
                    Op::Forward(times) => (0..times).for_each(|_| _ = forward(&mut mirror, &mut target)),
                    Op::Checkpoint => {
                        while mirror.next_sync_chunk().unwrap() != SyncStep::Finished {
                            forward(&mut mirror, &mut target);
                        }
                        if let Some((epoch, image)) = marked.take() {
                            while forward(&mut mirror, &mut target) {}
                            prop_assert!(mirror.drained(epoch));
                            prop_assert!(target.bytes() == image, "epoch {}", epoch);
                            mirror.allow(epoch + 1);
                        } else {
                            marked = Some((mirror.mark(), model.clone()));
                        }
                    }
                }
                prop_assert!(mirror.status().queued_bytes <= 4 << 20);
            }
        }
    }
}
