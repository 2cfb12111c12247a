//! Two sides joined by hand, without a wire: what the simulator does not look at.

use super::Clock;
use super::primary::{Effect as PrimaryEffect, PrimarySide};
use super::secondary::{Effect as SecondaryEffect, SecondarySide};
use crate::clock::Instant;
use crate::colo::arbiter::{Claim, Policy};
use crate::colo::hello::Mode;
use crate::colo::stream::Item;
use crate::colo::{Cause, Exit, Loss, primary, secondary};
use crate::disk::{Disk, DiskError, MemoryDisk};
use crate::hypervisor::embedded::copies::Copies;
use crate::hypervisor::embedded::{Embedded, MachineConfig};
use crate::replica::epochs::{GuestView, ReplicaConfig};
use crate::replica::mirror::{Holds, Target};
use crate::replica::set::{Mirrors, Replicas};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const DISK_BYTES: usize = 1 << 20;
/// Where nothing of the guest's own log is.
const AT: u64 = DISK_BYTES as u64 - 512;

fn at(ms: u64) -> Instant {
    Instant::from_micros(ms * 1000)
}

fn claim(holder: &str) -> Claim {
    Claim { guest: "web".into(), expected: 1, holder: holder.into() }
}

fn machine() -> MachineConfig {
    MachineConfig { ram_pages: 256, mac: MAC, ip: [10, 0, 0, 9], diverge_percent: 0, host_entropy_seed: 7 }
}

/// Two sides and what is between them.
struct Pair {
    a: PrimarySide,
    b: SecondarySide,
    mirrors: Mirrors,
    /// Writes of the second disk that are on their way, while they are held up.
    late: Option<Vec<PrimaryEffect>>,
}

impl Pair {
    /// A pair of a guest with these disks on the secondary, whose first state is loaded.
    fn new(bases: Vec<Box<dyn Disk>>) -> Self {
        let clock: Clock = Arc::new(|| at(0));
        let blank = |_| Box::new(MemoryDisk::new(DISK_BYTES)) as Box<dyn Disk>;
        let mirrors = Mirrors::new((0..bases.len()).map(blank).collect(), 8 << 20);
        let disks = mirrors.disks().iter().map(|disk| Box::new(disk.clone()) as Box<dyn Disk>);
        let disk = Box::new(Copies::of(disks.collect()));
        let domain = Embedded::boot(&machine(), disk, clock.clone(), Box::new(|_| {})).unwrap();
        let config = primary::Config::new(Mode::Remus, claim("a"));
        let targets = vec![Target { session: 0, holds: Holds::Zeroes }; bases.len()];
        let (here, clock_a) = (mirrors.clone(), clock.clone());
        let a = PrimarySide::new(at(0), config, Box::new(domain), here, Arc::default(), clock_a, &targets);
        let a = a.unwrap_or_else(|(_, error)| panic!("{error}"));

        let replicas = Replicas::new(bases, ReplicaConfig::default());
        replicas.start_sync(1).unwrap();
        let disk = Box::new(Copies::of(replicas.guest_views().map(|view| Box::new(view) as Box<dyn Disk>).collect()));
        let domain = Embedded::blank(&machine(), disk, clock.clone(), Box::new(|_| {})).unwrap();
        let mut config = secondary::Config::new(Mode::Remus, claim("b"));
        config.policy = Policy::Alone;
        let b = SecondarySide::new(at(0), config, Box::new(domain), replicas, Arc::default(), MAC, clock).unwrap();
        let mut pair = Self { a, b, mirrors, late: None };
        pair.settle(1);
        let (a, b) = (pair.a.machine(), pair.b.machine());
        assert!(a.is_protected(), "the first state does not arrive: {:?}, {:?}", a.state(), b.state());
        pair
    }

    /// Carries whatever the sides want carried, until they want nothing.
    fn settle(&mut self, ms: u64) {
        for _ in 0..10_000 {
            self.a.copy_some(at(ms));
            let effects: Vec<_> = std::iter::from_fn(|| self.a.poll_effect()).collect();
            let idle = effects.is_empty() && !self.a.wants_copy() && !self.b.is_loading();
            effects.into_iter().for_each(|effect| self.carry(ms, effect));
            if !self.b.is_loading() || !self.b.work(at(ms)) {
                while let Some(effect) = self.b.poll_effect() {
                    if let SecondaryEffect::Message(message) = effect {
                        self.a.handle_message(at(ms), message);
                    }
                }
            }
            if idle {
                return;
            }
        }
        panic!("the pair does not settle: {:?}, {:?}", self.a.machine().state(), self.b.machine().state());
    }

    fn carry(&mut self, ms: u64, effect: PrimaryEffect) {
        let Self { a, b, late, .. } = self;
        match effect {
            PrimaryEffect::Message(message) => b.handle_item(at(ms), Item::Message(message)),
            PrimaryEffect::Pages(batch) => b.handle_item(at(ms), Item::Pages(batch)),
            PrimaryEffect::Devices(blob) => {
                b.handle_item(at(ms), Item::PagesEnd);
                b.handle_item(at(ms), Item::DeviceState(blob));
            }
            PrimaryEffect::DiskWrite { disk, seq, offset, payload } => match late {
                Some(late) if disk == 1 => late.push(PrimaryEffect::DiskWrite { disk, seq, offset, payload }),
                _ => {
                    let mut view = b.replicas().primary_views(1).nth(disk).unwrap();
                    a.handle_disk_acked(at(ms), disk, seq, payload.content().write_to(&mut view, offset));
                }
            },
            _ => {}
        }
    }

    /// What guest B sees at the start of each disk, and how many checkpoints each has had.
    fn seen(&self) -> (Vec<u8>, Vec<u64>) {
        let byte = |mut view: GuestView| {
            let mut byte = [0];
            view.read(AT, &mut byte).unwrap();
            byte[0]
        };
        let replicas = self.b.replicas();
        let seals = replicas.status().into_iter().map(|status| status.seals);
        (replicas.guest_views().map(byte).collect(), seals.collect())
    }

    /// Guest A writes on each disk, and a checkpoint is wanted.
    fn write_and_checkpoint(&mut self, ms: u64, byte: u8) {
        self.mirrors.disks().iter().for_each(|disk| disk.clone().write(AT, &[byte]).unwrap());
        self.a.request_checkpoint(at(ms), Cause::Command);
        self.a.handle_timeout(at(ms));
        self.settle(ms);
    }
}

/// A pair of a guest with one disk.
fn pair() -> (PrimarySide, SecondarySide) {
    let pair = Pair::new(vec![Box::new(MemoryDisk::new(DISK_BYTES))]);
    (pair.a, pair.b)
}

#[test]
fn a_checkpoint_waits_for_every_disk() {
    let mut pair = Pair::new((0..2).map(|_| Box::new(MemoryDisk::new(DISK_BYTES)) as _).collect());
    pair.write_and_checkpoint(100, 1);
    assert_eq!(pair.seen(), (vec![1, 1], vec![2, 2]));
    pair.late = Some(vec![]);
    pair.write_and_checkpoint(200, 2);
    assert_eq!(pair.seen(), (vec![1, 1], vec![2, 2]), "one disk's write is on its way: neither is sealed");
    for effect in pair.late.take().unwrap() {
        pair.carry(201, effect);
    }
    pair.settle(201);
    assert_eq!(pair.seen(), (vec![2, 2], vec![3, 3]));
}

#[test]
fn a_primary_that_dies_before_a_disks_write_arrived_takes_all_disks_back() {
    let mut pair = Pair::new((0..2).map(|_| Box::new(MemoryDisk::new(DISK_BYTES)) as _).collect());
    pair.write_and_checkpoint(100, 1);
    pair.late = Some(vec![]);
    pair.write_and_checkpoint(200, 2);
    pair.b.handle_loss(at(300), Loss::Disconnected("killed".into()));
    assert!(pair.b.took_over());
    assert_eq!(pair.seen().0, [1, 1], "and not what had arrived of one");
    let late = pair.b.replicas().primary_views(1).last().unwrap().write(AT, &[9]);
    assert!(matches!(late, Err(DiskError::Fenced { .. })), "{late:?}");
}

#[test]
fn a_disk_that_cannot_be_sealed_keeps_the_others_from_it() {
    let fails = Arc::new(AtomicBool::new(false));
    let second = Failing(MemoryDisk::new(DISK_BYTES), fails.clone());
    let mut pair = Pair::new(vec![Box::new(MemoryDisk::new(DISK_BYTES)), Box::new(second)]);
    pair.write_and_checkpoint(100, 1);
    fails.store(true, Ordering::Relaxed);
    pair.b.work(at(1000));
    assert!(pair.b.error().is_some_and(|error| error.starts_with("disk1: ")), "{:?}", pair.b.error());
    pair.write_and_checkpoint(1100, 2);
    // The broken one's checkpoints are worth nothing any more.
    let (seen, seals) = pair.seen();
    assert_eq!((seen[0], seals), (1, vec![2, 0]), "neither is sealed");
    assert_eq!(pair.b.machine().state(), secondary::State::Exited(Exit::Failed));
    assert!(!pair.b.took_over());
}

/// A disk that takes no writes while it is told to fail.
struct Failing(MemoryDisk, Arc<AtomicBool>);

impl Disk for Failing {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.0.read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        if self.1.load(Ordering::Relaxed) {
            return Err(DiskError::NoSpace { what: "the second disk".into() });
        }
        self.0.write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// The survivor's frames that announce its MAC address (RARP).
fn announcements(b: &mut SecondarySide) -> usize {
    let frames = std::iter::from_fn(|| b.poll_effect());
    frames.filter(|effect| matches!(effect, SecondaryEffect::ToNetwork(frame) if frame[12..14] == [0x80, 0x35])).count()
}

#[test]
fn a_takeover_is_announced_at_once_and_five_times_more() {
    let (_a, mut b) = pair();
    b.handle_loss(at(100), Loss::Requested);
    assert!(b.took_over());
    assert_eq!(announcements(&mut b), 1, "at once");
    let mut later = Vec::new();
    for ms in 101..2000 {
        if b.poll_timeout().is_some_and(|due| due <= at(ms)) {
            b.handle_timeout(at(ms));
            b.work(at(ms));
        }
        later.extend((0..announcements(&mut b)).map(|_| ms));
    }
    assert_eq!(later, [150, 250, 350, 450, 550]);
}

#[test]
fn a_side_that_stands_by_announces_nothing() {
    let (_a, mut b) = pair();
    b.handle_timeout(at(1) + Duration::from_secs(1));
    assert_eq!(announcements(&mut b), 0);
    assert!(!b.took_over());
}
