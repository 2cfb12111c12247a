//! The replica against QEMU's own cases (tests/unit/test-replication.c, with equality where it compared with
//! `<=`), against a naive model, and against disks that fail.

use super::epochs::*;
use crate::disk::{Disk, DiskError, MemoryDisk, Zeroing};
use crate::mutant::{self, Mutant};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// QEMU's image, a thousandth of its size.
const N: usize = 64 << 10;
const H: usize = N / 2;

/// A disk whose contents and calls the test sees, and which fails on demand.
#[derive(Clone)]
struct Probe {
    disk: Arc<Mutex<MemoryDisk>>,
    fail: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
    flushes: Arc<AtomicUsize>,
}

impl Probe {
    fn filled(byte: u8, len: usize) -> Self {
        let mut disk = MemoryDisk::new(len);
        disk.write(0, &vec![byte; len]).unwrap();
        let (fail, calls, flushes) = Default::default();
        Self { disk: Arc::new(Mutex::new(disk)), fail, calls, flushes }
    }

    fn bytes(&self) -> Vec<u8> {
        self.disk.lock().unwrap().bytes().to_vec()
    }

    fn call(&self) -> Result<std::sync::MutexGuard<'_, MemoryDisk>, DiskError> {
        self.calls.fetch_add(1, Relaxed);
        if self.fail.load(Relaxed) {
            return Err(DiskError::NoSpace { what: "the base".into() });
        }
        Ok(self.disk.lock().unwrap())
    }
}

impl Disk for Probe {
    fn size_bytes(&self) -> u64 {
        self.disk.lock().unwrap().size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.call()?.read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.call()?.write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Relaxed);
        self.call()?.flush()
    }
}

/// A replica at its first checkpoint, generation 1, over `N` bytes of 0x11.
fn running() -> (Replica, Probe) {
    let base = Probe::filled(0x11, N);
    let mut replica = Replica::new(Box::new(base.clone()), ReplicaConfig::default());
    replica.start_sync(1).unwrap();
    replica.seal().unwrap();
    (replica, base)
}

fn guest(replica: &mut Replica, from: usize, to: usize) -> Vec<u8> {
    let mut bytes = vec![0; to - from];
    replica.guest_read(from as u64, &mut bytes).unwrap();
    bytes
}

fn settle(replica: &mut Replica) {
    while replica.apply_some(1000).unwrap() {}
}

/// QEMU's secondary_start, up to its stop.
fn secondary_started() -> (Replica, Probe) {
    let (mut replica, base) = running();
    assert_eq!(guest(&mut replica, 0, N), [0x11; N]);
    replica.primary_write(1, H as u64, &[0x22; H]).unwrap();
    assert_eq!(guest(&mut replica, H, N), [0x11; H], "the primary's write is not seen before a checkpoint");
    replica.guest_write(0, &[0x33; H]).unwrap();
    assert_eq!(guest(&mut replica, 0, H), [0x33; H]);
    (replica, base)
}

#[test]
fn secondary_read_and_write_before_start_fail() {
    let mut replica = Replica::new(Box::new(MemoryDisk::new(N)), ReplicaConfig::default());
    assert!(replica.guest_read(0, &mut [0; N]).is_err());
    assert!(replica.guest_write(0, &[0; N]).is_err());
    assert!(matches!(replica.primary_write(0, 0, &[0; N]), Err(DiskError::Fenced { .. })));
    assert!(replica.seal().is_err() && replica.stop().is_err() && replica.takeover(9).is_err());
    assert!(!replica.apply_some(1).unwrap());
}

#[test]
fn secondary_start() {
    let (mut replica, _) = secondary_started();
    replica.takeover(2).unwrap();
}

#[test]
fn secondary_stop() {
    let (mut replica, base) = secondary_started();
    replica.takeover(2).unwrap();
    for settled in [false, true] {
        assert_eq!(guest(&mut replica, 0, H), [0x33; H]);
        assert_eq!(guest(&mut replica, H, N), [0x11; H], "a primary write no checkpoint covers is rolled back");
        assert_eq!(replica.stage(), if settled { Stage::Done } else { Stage::Failover });
        settle(&mut replica);
    }
    assert_eq!(base.bytes(), [[0x33; H], [0x11; H]].concat());
}

#[test]
fn secondary_continuous_replication() {
    let (mut replica, _) = secondary_started();
    replica.takeover(2).unwrap();
    settle(&mut replica);
    replica.seal().unwrap();
    replica.takeover(3).unwrap();
    replica.stop().unwrap();
    assert_eq!((replica.stage(), replica.status().generation), (Stage::Done, 2));
    assert_eq!(guest(&mut replica, 0, N), [[0x33; H], [0x11; H]].concat());
    let refused = replica.start_sync(4).unwrap_err();
    assert!(matches!(refused, ReplicaError::Stage { .. }), "a disk with a live guest on it is no target: {refused}");
}

#[test]
fn secondary_do_checkpoint() {
    let (mut replica, base) = running();
    replica.primary_write(1, H as u64, &[0x22; H]).unwrap();
    assert_eq!(guest(&mut replica, H, N), [0x11; H]);
    replica.seal().unwrap();
    assert_eq!(guest(&mut replica, H, N), [0x22; H]);
    replica.takeover(2).unwrap();
    settle(&mut replica);
    assert_eq!(base.bytes(), [[0x11; H], [0x22; H]].concat());
}

#[test]
fn secondary_get_error_all() {
    let (mut replica, _) = running();
    assert!(replica.status().errors.is_empty() && !replica.status().broken);
    replica.takeover(2).unwrap();
}

#[test]
fn stop_without_failover_leaves_the_last_checkpoint() {
    let (mut replica, base) = secondary_started();
    replica.seal().unwrap();
    replica.primary_write(1, 0, &[0x44; N]).unwrap();
    replica.guest_write(0, &[0x55; N]).unwrap();
    replica.stop().unwrap();
    assert_eq!(replica.stage(), Stage::Done);
    assert_eq!(base.bytes(), [[0x11; H], [0x22; H]].concat());
    replica.start_sync(2).unwrap();
    assert_eq!(replica.stage(), Stage::Syncing);
}

#[test]
fn a_stop_that_fails_leaves_the_base_alone_for_the_next_replica() {
    let (mut replica, base) = secondary_started();
    replica.seal().unwrap();
    base.fail.store(true, Relaxed);
    assert!(replica.stop().is_err());
    base.fail.store(false, Relaxed);
    settle(&mut replica);
    let status = replica.status();
    assert_eq!((status.stage, status.standing.is_whole(), status.debt_bytes), (Stage::Done, false, 0));
    assert_eq!(base.bytes(), [0x11; N], "nothing was written late");
    assert!(replica.guest_write(0, b"x").is_err(), "the guest was given up");
}

#[test]
fn nothing_can_be_taken_over_before_the_initial_copy_is_whole() {
    let base = Probe::filled(0, N);
    let mut replica = Replica::new(Box::new(base.clone()), ReplicaConfig::default());
    replica.start_sync(5).unwrap();
    replica.primary_write(5, 3, b"copy").unwrap();
    assert_eq!(base.bytes()[3..7], *b"copy", "the copy goes straight to the base");
    assert!(matches!(replica.takeover(6), Err(ReplicaError::Stage { stage: Stage::Syncing, .. })));
    assert!(replica.guest_read(0, &mut [0]).is_err());
    assert!(matches!(replica.start_sync(4), Err(ReplicaError::StaleGeneration { theirs: 4, ours: 5 })));
    replica.primary_flush(5).unwrap();
    assert_eq!(base.flushes.load(Relaxed), 1);
    replica.seal().unwrap();
    assert!(matches!(replica.takeover(5), Err(ReplicaError::StaleGeneration { .. })));
    replica.takeover(6).unwrap();
}

#[test]
fn a_checkpoint_and_a_takeover_do_not_touch_the_base() {
    let (mut replica, base) = secondary_started();
    let before = base.calls.load(Relaxed);
    let memory_bytes = replica.status().memory_bytes;
    replica.seal().unwrap();
    assert_eq!((replica.debt_bytes(), replica.status().active_bytes), (H as u64, 0));
    assert_eq!(replica.status().memory_bytes, memory_bytes, "even freeing is left for later");
    replica.takeover(2).unwrap();
    assert_eq!(base.calls.load(Relaxed), before);
    settle(&mut replica);
    assert_eq!(replica.status().memory_bytes, 0);
}

#[test]
fn a_secondary_that_falls_behind_bounds_its_epochs() {
    let (mut replica, base) = running();
    for epoch in 0..3 * MAX_SEALED_EPOCHS {
        replica.primary_write(1, epoch as u64, &[1]).unwrap();
        replica.seal().unwrap();
        assert!(replica.status().sealed_epochs <= MAX_SEALED_EPOCHS);
    }
    settle(&mut replica);
    assert_eq!(base.bytes()[..3 * MAX_SEALED_EPOCHS], [1; 3 * MAX_SEALED_EPOCHS]);
}

#[test]
fn an_old_generation_is_refused_and_counted() {
    let (mut replica, _) = secondary_started();
    assert!(matches!(replica.primary_write(0, 0, b"x"), Err(DiskError::Fenced { theirs: 0, ours: 1 })));
    let shared = Arc::new(Mutex::new(replica));
    let mut primary = PrimaryView { replica: Arc::clone(&shared), generation: 1 };
    let mut guest = GuestView(Arc::clone(&shared));
    assert_eq!(guest.changed(1, N as u64 - 1, 8).unwrap(), Some(vec![(H as u64 - 1, true), (H as u64, false)]));
    assert!(guest.changed(1, N as u64, 8).is_err());
    let mut back = [0; 2];
    primary.read(H as u64 - 1, &mut back).unwrap();
    assert_eq!(back, [0x11, 0x22], "the primary reads what it wrote");
    shared.lock().unwrap().takeover(2).unwrap();
    assert!(matches!(primary.write(0, b"x"), Err(DiskError::Fenced { theirs: 1, ours: 2 })));
    assert!(primary.read(0, &mut back).is_err() && primary.flush().is_err());
    assert_eq!(guest.changed(0, N as u64, 8).unwrap(), None, "after a takeover there are no checkpoints");
    guest.read(0, &mut back).unwrap();
    assert_eq!((back, guest.size_bytes()), ([0x33; 2], N as u64));
    assert_eq!(shared.lock().unwrap().status().fenced_writes, 4);
}

#[test]
fn after_a_takeover_a_flush_is_busy_until_it_is_true() {
    let len = FLUSH_STEP_BYTES as usize + 4096;
    let base = Probe::filled(0, len);
    let mut replica = Replica::new(Box::new(base.clone()), ReplicaConfig::default());
    replica.start_sync(1).unwrap();
    replica.seal().unwrap();
    replica.guest_write(0, &vec![7; len]).unwrap();
    replica.guest_flush().unwrap();
    assert_eq!(base.flushes.load(Relaxed), 0, "before a takeover there is nothing to make durable");
    replica.takeover(2).unwrap();
    assert!(matches!(replica.guest_flush(), Err(DiskError::Busy)));
    replica.guest_flush().unwrap();
    assert_eq!((base.bytes() == vec![7; len], base.flushes.load(Relaxed), replica.stage()), (true, 1, Stage::Done));
    replica.guest_write(0, &[8]).unwrap();
    replica.guest_flush().unwrap();
    assert_eq!((base.bytes()[0], base.flushes.load(Relaxed)), (8, 2));
}

#[test]
fn a_write_that_does_not_fit_breaks_the_checkpoint_and_not_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let config =
        ReplicaConfig { memory_budget_bytes: 1000, spill_dir: Some(dir.path().into()), spill_budget_bytes: 5000 };
    let mut replica = Replica::new(Box::new(Probe::filled(0x11, N)), config);
    replica.start_sync(1).unwrap();
    replica.seal().unwrap();
    replica.primary_write(1, 0, &[0x22; 5000]).unwrap();
    assert!(matches!(replica.primary_write(1, 8000, &[0x22; 1000]), Err(DiskError::NoSpace { .. })));
    replica.primary_write(1, 0, &[0x23; 10]).unwrap();
    for _ in 0..2 {
        assert!(matches!(replica.seal(), Err(ReplicaError::Broken { .. })), "sticky");
    }
    let status = replica.status();
    assert!(status.broken && status.errors.len() == 1 && status.errors[0].contains("no space"), "{status:?}");
    assert_eq!(guest(&mut replica, 0, N), [0x11; N]);
    replica.takeover(2).unwrap();
    settle(&mut replica);
    replica.guest_write(0, &[0x33; N]).unwrap();
    assert!(guest(&mut replica, 0, N) == [0x33; N]);
}

#[test]
fn the_secondarys_own_full_layer_is_its_guests_news_only() {
    let config = ReplicaConfig { memory_budget_bytes: 1000, ..ReplicaConfig::default() };
    let mut replica = Replica::new(Box::new(MemoryDisk::new(N)), config);
    replica.start_sync(1).unwrap();
    replica.seal().unwrap();
    assert!(matches!(replica.guest_write(0, &[1; 2000]), Err(DiskError::NoSpace { .. })));
    assert_eq!(replica.status().errors.len(), 1);
    replica.seal().unwrap();
}

#[test]
fn what_is_merged_after_a_takeover_is_counted() {
    let (mut replica, _) = secondary_started();
    replica.seal().unwrap();
    replica.guest_write(0, &[0x44; 100]).unwrap();
    settle(&mut replica);
    assert_eq!(replica.status().merged_bytes, 0, "checkpoints are applied, not merged");
    replica.primary_write(1, H as u64, &[0x55; H]).unwrap();
    replica.seal().unwrap();
    replica.guest_write(0, &[0x44; 100]).unwrap();
    replica.takeover(2).unwrap();
    let all = H as u64 + 100;
    let mut seen = Vec::new();
    loop {
        let status = replica.status();
        assert_eq!(status.debt_bytes + status.merged_bytes, all);
        seen.push(status.merged_bytes);
        if !replica.apply_some(1).unwrap() {
            break;
        }
    }
    assert_eq!((replica.status().merged_bytes, &seen[..2]), (all, &[0, H as u64][..]));
}

#[test]
fn a_base_that_fails_loses_nothing_and_can_be_tried_again() {
    let (mut replica, base) = secondary_started();
    replica.seal().unwrap();
    base.fail.store(true, Relaxed);
    assert!(replica.apply_some(u64::MAX).is_err());
    assert!(matches!(replica.seal(), Err(ReplicaError::Broken { .. })));
    replica.guest_write(0, &[0x66; 4]).unwrap();
    replica.takeover(2).unwrap();
    assert!(replica.apply_some(u64::MAX).is_err());
    assert_eq!(replica.stage(), Stage::FailoverFailed);
    replica.guest_write(H as u64, &[0x77; 4]).expect("a layer covers it");
    assert!(replica.guest_write(100, &[0x77; 4]).is_err(), "only the base has room for it");
    base.fail.store(false, Relaxed);
    replica.guest_write(100, &[0x78; 4]).unwrap();
    settle(&mut replica);
    assert_eq!((replica.stage(), base.bytes() == guest(&mut replica, 0, N)), (Stage::Done, true));
    assert_eq!([base.bytes()[0], base.bytes()[H], base.bytes()[100], base.bytes()[N - 1]], [0x66, 0x77, 0x78, 0x22]);
    assert_eq!(replica.status().errors.len(), 3);
}

#[test]
fn the_planted_bugs_are_seen() {
    let (mut replica, _) = secondary_started();
    mutant::plant(Some(Mutant::KeepActiveAtCheckpoint));
    replica.seal().unwrap();
    mutant::plant(None);
    assert_eq!(guest(&mut replica, 0, H), [0x33; H], "the guest still sees its own writes of the last epoch");

    let (mut replica, _) = secondary_started();
    replica.takeover(2).unwrap();
    mutant::plant(Some(Mutant::AcceptOldGeneration));
    replica.primary_write(1, 0, &[0x66; H]).unwrap();
    mutant::plant(None);
    assert_eq!(guest(&mut replica, 0, H), [0x66; H], "a dead primary's write reached the living guest");
}

#[derive(Debug, Clone)]
enum Op {
    /// A byte to write, or `None` to zero.
    Primary(usize, usize, Option<u8>),
    Guest(usize, usize, Option<u8>),
    GuestTrim(usize, usize),
    Seal,
    Apply(u64),
    Takeover,
    OldPrimary(usize, usize, u8),
    /// Room for a write of the primary, or of the guest.
    Lend(bool, usize, usize),
    /// A write that is under way is made, or ends.
    Fill(u8),
    End,
}

fn op(size: usize) -> impl Strategy<Value = Op> {
    let write = move || (0..size, 0..size / 2, any::<u8>());
    let content = move || (0..size, 0..size / 2, prop_oneof![2 => any::<u8>().prop_map(Some), 1 => Just(None)]);
    prop_oneof![
        6 => content().prop_map(|(at, len, byte)| Op::Primary(at, len, byte)),
        6 => content().prop_map(|(at, len, byte)| Op::Guest(at, len, byte)),
        1 => write().prop_map(|(at, len, _)| Op::GuestTrim(at, len)),
        3 => Just(Op::Seal),
        4 => (0_u64..200).prop_map(Op::Apply),
        1 => Just(Op::Takeover),
        2 => write().prop_map(|(at, len, byte)| Op::OldPrimary(at, len, byte)),
        4 => (any::<bool>(), 0..size, 1..size / 2).prop_map(|(primary, at, len)| Op::Lend(primary, at, len)),
        4 => any::<u8>().prop_map(Op::Fill),
        4 => Just(Op::End),
    ]
}

fn budgets() -> impl Strategy<Value = u64> {
    prop_oneof![Just(1_u64 << 20), Just(8000), Just(30_000), Just(2000)]
}

proptest! {
    #[test]
    fn the_guest_sees_the_last_checkpoint_and_its_own_writes(
        ops in prop::collection::vec(op(256), 1..80),
        memory_budget_bytes in budgets(),
    ) {
        is_as_the_model(ops, memory_budget_bytes)?;
    }
}

#[test]
fn histories_show_what_is_wrong_with_lent_room() {
    for bug in Mutant::OF_LENDING {
        mutant::plant(Some(bug));
        let config = Config { cases: 20_000, max_shrink_iters: 0, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
        let histories = (prop::collection::vec(op(256), 1..80), budgets());
        let outcome = runner.run(&histories, |(ops, budget)| is_as_the_model(ops, budget));
        mutant::plant(None);
        assert!(outcome.is_err(), "{bug:?} was not seen");
    }
}

/// The naive model is two whole images: the primary's disk and guest B's.
fn is_as_the_model(ops: Vec<Op>, memory_budget_bytes: u64) -> Result<(), TestCaseError> {
    const SIZE: usize = 256;
    const SPILL: u64 = 2000;
    let dir = tempfile::tempdir().unwrap();
    let base = Probe::filled(0x11, SIZE);
    let config = ReplicaConfig { memory_budget_bytes, spill_dir: Some(dir.path().into()), spill_budget_bytes: SPILL };
    let mut replica = Replica::new(Box::new(base.clone()), config);
    replica.start_sync(1).unwrap();
    replica.seal().unwrap();
    let (mut under_way, mut seals) = (VecDeque::new(), 0);
    let (mut primary, mut seen, mut broken, mut taken) = (vec![0x11; SIZE], vec![0x11; SIZE], false, false);
    let mut sealed = seen.clone();
    for op in ops {
        match op {
            Op::Primary(at, len, byte) if !taken => {
                let range = at..(at + len).min(SIZE);
                let (at, len) = (at as u64, range.len());
                let written = match byte {
                    Some(byte) => replica.primary_write(1, at, &vec![byte; len]),
                    None => replica.primary_zero(1, at, len as u64, Zeroing::default()),
                };
                match written {
                    Ok(()) => primary[range].fill(byte.unwrap_or(0)),
                    Err(error) => {
                        prop_assert!(matches!(error, DiskError::NoSpace { .. }), "{}", error);
                        broken = true;
                    }
                }
            }
            Op::Primary(at, len, None) => {
                let refused = replica.primary_zero(1, at as u64, len.min(SIZE - at) as u64, Zeroing::default());
                prop_assert!(matches!(refused, Err(DiskError::Fenced { .. })), "{refused:?}");
            }
            Op::Primary(at, len, Some(byte)) | Op::OldPrimary(at, len, byte) => {
                let bytes = vec![byte; len.min(SIZE - at)];
                let refused = replica.primary_write(0, at as u64, &bytes);
                prop_assert!(matches!(refused, Err(DiskError::Fenced { .. })), "{refused:?}");
            }
            Op::Guest(at, len, byte) => {
                let range = at..(at + len).min(SIZE);
                let (at, len) = (at as u64, range.len());
                let written = match byte {
                    Some(byte) => replica.guest_write(at, &vec![byte; len]),
                    None => replica.guest_zero(at, len as u64, Zeroing { keep_allocated: true, fast_only: false }),
                };
                let byte = byte.unwrap_or(0);
                match written {
                    Ok(()) => seen[range].fill(byte),
                    // A failed write may have landed in part; inside its range only.
                    Err(_) => {
                        prop_assert!(!taken, "after a takeover no room is needed");
                        let now = guest(&mut replica, 0, SIZE);
                        prop_assert!(range.clone().all(|at| now[at] == byte || now[at] == seen[at]));
                        seen[range.clone()].copy_from_slice(&now[range]);
                    }
                }
            }
            Op::GuestTrim(at, len) => {
                let range = at..(at + len).min(SIZE);
                let fast = Zeroing { keep_allocated: false, fast_only: true };
                match replica.guest_zero(at as u64, range.len() as u64, fast) {
                    Ok(()) => seen[range].fill(0),
                    Err(DiskError::NoSpace { .. }) if !taken => {
                        let now = guest(&mut replica, 0, SIZE);
                        prop_assert!(range.clone().all(|at| now[at] == 0 || now[at] == seen[at]));
                        seen[range.clone()].copy_from_slice(&now[range]);
                    }
                    // A trim that is no hole leaves every byte as it was.
                    Err(error) => prop_assert!(taken && matches!(error, DiskError::NotSupported), "{}", error),
                }
            }
            Op::Seal => {
                prop_assert_eq!(replica.seal().is_err(), broken && !taken);
                if !broken && !taken {
                    seals += 1;
                    sealed.clone_from(&primary);
                    seen.clone_from(&primary);
                }
            }
            Op::Apply(budget_bytes) => drop(replica.apply_some(budget_bytes).unwrap()),
            Op::Takeover => {
                replica.takeover(2).unwrap();
                taken = true;
            }
            Op::Lend(by_primary, at, len) => {
                let writer = if by_primary { Writer::Primary(1) } else { Writer::Guest };
                let range = at..(at + len).min(SIZE);
                let lent = replica.lend_write(writer, at as u64, range.len());
                prop_assert!(lent.is_none() || !taken);
                under_way.extend(lent.map(|space| (by_primary, range, space, None, seals)));
            }
            Op::Fill(byte) => {
                if let Some((_, range, space, filled, _)) =
                    under_way.iter_mut().find(|(.., filled, _)| filled.is_none())
                {
                    space.write(&vec![byte; range.len()]).unwrap();
                    *filled = Some(byte);
                }
            }
            Op::End => {
                let Some((by_primary, range, space, filled, lent_at)) = under_way.pop_front() else { continue };
                let writer = if by_primary { Writer::Primary(1) } else { Writer::Guest };
                if replica.end_write(writer, &space, filled.is_some()) {
                    prop_assert!(!taken);
                    if !by_primary && lent_at != seals {
                        // The checkpoint has forgotten it.
                        continue;
                    }
                    let written = if by_primary { &mut primary } else { &mut seen };
                    written[range].fill(filled.unwrap());
                }
            }
        }
        prop_assert_eq!(&guest(&mut replica, 0, SIZE), &seen);
        let (mut at, mut told) = (0, replica.guest_extents(0, SIZE as u64, 64).unwrap());
        prop_assert!(told.len() < 64 && told.iter().map(|extent| extent.len_bytes).sum::<u64>() == SIZE as u64);
        for extent in told.drain(..) {
            let end = at + extent.len_bytes as usize;
            prop_assert!(!extent.zero || seen[at..end].iter().all(|byte| *byte == 0), "{:?} at {}", extent, at);
            at = end;
        }
        let status = replica.status();
        prop_assert!(status.memory_bytes <= memory_budget_bytes && status.spill_bytes <= SPILL, "{:?}", status);
    }
    replica.stop().unwrap();
    drop(under_way);
    settle(&mut replica);
    prop_assert_eq!(replica.stage(), Stage::Done);
    prop_assert_eq!(base.bytes(), if taken { seen } else { sealed });
    // A spill file is kept for the next epoch.
    prop_assert_eq!(replica.status().memory_bytes, 0);
    Ok(())
}
