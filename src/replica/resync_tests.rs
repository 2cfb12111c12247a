//! A mirror and a replica that part and meet again, in any state: level at every checkpoint, and with no more sent than
//! was written.

use super::epochs::{PrimaryView, Replica, ReplicaConfig};
use super::mirror::resync::{GRANULE_BYTES, hash_chunk};
use super::mirror::{Holds, Mirror, SYNC_CHUNK_BYTES, SyncStep, Target};
use super::state::{Standing, StateFile};
use crate::disk::{Disk, DiskError, MemoryDisk, Zeroing};
use crate::mutant::{self, Mutant};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

const SIZE: usize = 2 * SYNC_CHUNK_BYTES as usize + 512;

/// What a host's daemon leaves behind.
#[derive(Clone)]
struct Host {
    image: Arc<Mutex<MemoryDisk>>,
    record: Arc<Mutex<Option<Vec<u8>>>>,
}

impl Disk for Host {
    fn size_bytes(&self) -> u64 {
        SIZE as u64
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.image.lock().unwrap().read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.image.lock().unwrap().write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

impl StateFile for Host {
    fn read(&mut self) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.record.lock().unwrap().clone())
    }
    fn write(&mut self, record: &[u8]) -> Result<(), DiskError> {
        *self.record.lock().unwrap() = Some(record.to_vec());
        Ok(())
    }
    fn sync(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn sync_dir(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Parting {
    /// The replica is stopped and applies what it owns.
    Stop,
    /// Its daemon is killed.
    Kill,
    /// Both own a checkpoint more than the primary has heard of; then it is stopped.
    LostAnswer,
}

#[derive(Clone, Debug)]
enum Op {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Hash,
    Sync,
    Forward(usize),
    Mark,
    Own,
    Apply,
    Part(Parting),
    Meet,
}

/// Both ends.
struct Pair {
    mirror: Mirror,
    host: Host,
    replica: Option<Arc<Mutex<Replica>>>,
    session: u64,
    hashed: u64,
    model: Vec<u8>,
    marked: Option<(u64, Vec<u8>)>,
    /// Granules that a replica in step lacks at most: of this session, and of the one before.
    touched: BTreeSet<u64>,
    to_send: Option<usize>,
}

impl Pair {
    fn new() -> Self {
        let mut image = MemoryDisk::new(SIZE);
        image.write(0, &[0xee; SIZE]).unwrap();
        let host = Host { image: Arc::new(Mutex::new(image)), record: Arc::default() };
        let mirror = Mirror::new(Box::new(MemoryDisk::new(SIZE)), 64 << 20);
        let (touched, model) = (BTreeSet::new(), vec![0; SIZE]);
        let (replica, marked, to_send) = Default::default();
        Self { mirror, host, replica, session: 0, hashed: 0, model, marked, touched, to_send }
    }

    fn view(&self) -> Option<PrimaryView> {
        Some(PrimaryView { replica: self.replica.clone()?, generation: self.session })
    }

    fn touch(&mut self, at: usize, len: usize) {
        let granules = at as u64 / GRANULE_BYTES..((at + len) as u64).div_ceil(GRANULE_BYTES);
        self.touched.extend(granules);
    }

    /// What the two say to each other, as two daemons do.
    fn meet(&mut self) {
        if self.replica.is_some() {
            return;
        }
        let (image, record) = (Box::new(self.host.clone()), Box::new(self.host.clone()));
        let mut replica = Replica::open(image, record, ReplicaConfig::default()).unwrap();
        let holds = match replica.status().standing {
            Standing::Checkpoint { session, number, .. } if self.mirror.counts_from(session, number) => {
                Holds::Checkpoint { session, number }
            }
            _ => Holds::Hashed,
        };
        self.to_send = matches!(holds, Holds::Checkpoint { .. }).then_some(self.touched.len());
        self.session += 1;
        replica.start_session(self.session, self.session).unwrap();
        self.mirror.attach(Target { session: self.session, holds });
        (self.replica, self.hashed, self.marked) = (Some(Arc::new(Mutex::new(replica))), 0, None);
        self.touched.clear();
    }

    fn part(&mut self, how: Parting) {
        let Some(replica) = self.replica.take() else { return };
        if let (Parting::LostAnswer, Some((epoch, _))) = (how, self.marked.take()) {
            let mut view = PrimaryView { replica: replica.clone(), generation: self.session };
            while self.forward(&mut view) {}
            assert!(self.mirror.drained(epoch));
            replica.lock().unwrap().seal().unwrap();
        }
        self.mirror.detach();
        if !matches!(how, Parting::Kill) {
            replica.lock().unwrap().stop().unwrap();
        }
        self.marked = None;
    }

    fn forward(&mut self, view: &mut PrimaryView) -> bool {
        let Some(write) = self.mirror.poll_forward() else { return false };
        let result = write.payload.content().write_to(view, write.offset);
        self.mirror.handle_acked(write.seq, result);
        true
    }

    fn hash(&mut self) {
        let Some(mut view) = self.view() else { return };
        let offset = self.hashed * SYNC_CHUNK_BYTES;
        if offset < SIZE as u64 && self.mirror.room_for_hash() == Some(true) {
            let mut chunk = vec![0; (SIZE as u64 - offset).min(SYNC_CHUNK_BYTES) as usize];
            view.read(offset, &mut chunk).unwrap();
            assert!(self.mirror.handle_hash(hash_chunk(&chunk)));
            self.hashed += 1;
        }
    }

    fn sync(&mut self) -> Result<(), TestCaseError> {
        if self.mirror.next_sync_chunk().unwrap() == SyncStep::Finished
            && let Some(granules) = self.to_send.take()
            && self.mirror.status().attached
        {
            let status = self.mirror.status();
            prop_assert!(status.sync_sent_bytes <= granules as u64 * GRANULE_BYTES, "{status:?}, {granules}");
            prop_assert_eq!(status.sync_sent_bytes + status.sync_skipped_bytes, SIZE as u64);
        }
        Ok(())
    }

    fn mark(&mut self) {
        if self.marked.is_none() && self.mirror.sync_finished() {
            self.marked = Some((self.mirror.mark(), self.model.clone()));
        }
    }

    fn own(&mut self) -> Result<(), TestCaseError> {
        let (Some(mut view), Some((epoch, image))) = (self.view(), self.marked.take()) else { return Ok(()) };
        while self.forward(&mut view) {}
        prop_assert!(self.mirror.drained(epoch));
        let mut seen = vec![0; SIZE];
        let mut replica = view.replica.lock().unwrap();
        replica.seal().unwrap();
        replica.guest_read(0, &mut seen).unwrap();
        drop(replica);
        prop_assert!(seen == image, "session {}, epoch {epoch}", self.session);
        self.mirror.allow(epoch + 1);
        Ok(())
    }

    fn act(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Write(at, len, byte) => {
                let range = at..(at + len).min(SIZE);
                self.mirror.write(at as u64, &vec![byte; range.len()]).unwrap();
                self.touch(at, range.len());
                self.model[range].fill(byte);
            }
            Op::Zero(at, len) => {
                let range = at..(at + len).min(SIZE);
                self.mirror.write_zeroes(at as u64, range.len() as u64, Zeroing::default()).unwrap();
                self.touch(at, range.len());
                self.model[range].fill(0);
            }
            Op::Hash => self.hash(),
            Op::Sync => self.sync()?,
            Op::Forward(times) => {
                if let Some(mut view) = self.view() {
                    (0..times).for_each(|_| _ = self.forward(&mut view));
                }
            }
            Op::Mark => self.mark(),
            Op::Own => self.own()?,
            Op::Apply => {
                self.replica.iter().for_each(|replica| _ = replica.lock().unwrap().apply_some(u64::MAX).unwrap());
            }
            Op::Part(how) => self.part(how),
            Op::Meet => self.meet(),
        }
        Ok(())
    }

    /// Whatever happened, they come to a checkpoint.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        self.meet();
        while !self.mirror.sync_finished() {
            self.hash();
            self.sync()?;
            let Some(mut view) = self.view() else { break };
            self.forward(&mut view);
        }
        self.sync()?;
        self.own()?;
        self.mark();
        self.own()
    }
}

fn op() -> impl Strategy<Value = Op> {
    let parting = prop_oneof![Just(Parting::Stop), Just(Parting::Kill), Just(Parting::LostAnswer)];
    prop_oneof![
        6 => (0..SIZE, 0_usize..100_000, any::<u8>()).prop_map(|(at, len, byte)| Op::Write(at, len, byte)),
        1 => (0..SIZE, 0_usize..300_000).prop_map(|(at, len)| Op::Zero(at, len)),
        4 => Just(Op::Hash),
        5 => Just(Op::Sync),
        3 => (1_usize..4).prop_map(Op::Forward),
        3 => Just(Op::Mark),
        3 => Just(Op::Own),
        2 => Just(Op::Apply),
        1 => parting.prop_map(Op::Part),
        2 => Just(Op::Meet),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn whoever_meets_again_is_level_at_every_checkpoint(
        ops in prop::collection::vec(op(), 1..60),
        settled in prop::collection::vec(any::<bool>(), 60),
    ) {
        let mut pair = Pair::new();
        for (op, settle) in ops.into_iter().zip(settled) {
            // Or most histories would never come to a second session.
            if settle && matches!(op, Op::Part(_)) {
                pair.settle()?;
            }
            pair.act(op)?;
        }
        pair.settle()?;
        pair.part(Parting::Stop);
        pair.settle()?;
    }
}

/// In step, one write acknowledged and marked and never owned, and the pair parts.
fn parted() -> Pair {
    let mut pair = Pair::new();
    pair.settle().unwrap();
    let write = |pair: &mut Pair, at| pair.act(Op::Write(at, 10, 7)).unwrap();
    write(&mut pair, 0);
    pair.act(Op::Forward(1)).unwrap();
    pair.mark();
    write(&mut pair, 200_000);
    pair.part(Parting::Stop);
    write(&mut pair, 400_000);
    pair
}

#[test]
fn only_what_was_written_is_sent_and_what_was_not_owned_is() {
    let mut pair = parted();
    pair.settle().unwrap();
    let status = pair.mirror.status();
    assert_eq!(
        (status.sync_sent_bytes, status.sync_skipped_bytes),
        (3 * GRANULE_BYTES, SIZE as u64 - 3 * GRANULE_BYTES)
    );
}

#[test]
fn checkpoints_that_change_nothing_are_the_same_disk() {
    let mut pair = Pair::new();
    for _ in 0..3 {
        pair.settle().unwrap();
        pair.act(Op::Apply).unwrap();
    }
    let standing = pair.replica.as_ref().unwrap().lock().unwrap().status().standing;
    assert!(matches!(standing, Standing::Checkpoint { number: 1, .. }), "{standing}");
    let knows = |pair: &Pair, number| pair.mirror.counts_from(1, number);
    assert_eq!([0, 1, 3, 4].map(|number| knows(&pair, number)), [false, true, true, false]);
    pair.act(Op::Write(0, 1, 1)).unwrap();
    assert!(knows(&pair, 1), "not owned yet");
    pair.settle().unwrap();
    assert_eq!([1, 3, 4].map(|number| knows(&pair, number)), [false, false, true]);
    assert!(!pair.mirror.counts_from(2, 4) && !pair.mirror.counts_from(0, 4));
}

#[test]
fn a_chunk_is_compared_with_what_it_is_and_not_with_what_it_was() {
    let mut pair = Pair::new();
    pair.meet();
    let mut hashes = 0;
    // The primary writes what the replica has, after its hash was taken and before; and the other way round.
    for chunk in 0..2_usize {
        let at = chunk * SYNC_CHUNK_BYTES as usize;
        let len = SYNC_CHUNK_BYTES as usize;
        if chunk == 0 {
            pair.act(Op::Write(at, len, 0xee)).unwrap();
        }
        pair.hash();
        hashes += 1;
        let byte = if chunk == 0 { 1 } else { 0xee };
        pair.act(Op::Write(at, len, byte)).unwrap();
        pair.sync().unwrap();
    }
    assert_eq!((hashes, pair.mirror.status().sync_skipped_bytes), (2, SYNC_CHUNK_BYTES));
    pair.settle().unwrap();
}

#[test]
fn hashes_that_nobody_waits_for_are_refused() {
    let mut pair = Pair::new();
    assert!(!pair.mirror.handle_hash([0; 32]), "not attached");
    pair.meet();
    for wanted in [true, true, true, false] {
        assert_eq!(pair.mirror.handle_hash([0; 32]), wanted, "a disk of three chunks");
    }
    pair.mirror.attach(Target { session: 9, holds: Holds::Zeroes });
    assert!(pair.mirror.room_for_hash().is_none() && !pair.mirror.handle_hash([0; 32]));
}

#[test]
fn the_planted_bug_is_seen() {
    mutant::plant(Some(Mutant::ForgetUnowned));
    let seen = parted().settle();
    mutant::plant(None);
    assert!(seen.is_err(), "what was never owned was not sent");
}
