//! Two sides joined by hand, without a wire: what the simulator does not look at.

use super::Clock;
use super::primary::{Effect as PrimaryEffect, PrimarySide};
use super::secondary::{Effect as SecondaryEffect, SecondarySide};
use crate::carried::Carried;
use crate::clock::Instant;
use crate::colo::arbiter::{Claim, Policy};
use crate::colo::heartbeat::Silence;
use crate::colo::hello::Mode;
use crate::colo::stream::Item;
use crate::colo::{Cause, Exit, Loss, primary, secondary};
use crate::compare::testing::{CLIENT, GUEST, Seg};
use crate::disk::{Disk, DiskError, MemoryDisk};
use crate::hypervisor::embedded::copies::Copies;
use crate::hypervisor::embedded::{Embedded, MachineConfig};
use crate::mutant::{Mutant, plant};
use crate::replica::epochs::{GuestView, ReplicaConfig};
use crate::replica::mirror::{Holds, Target};
use crate::replica::set::{Mirrors, Replicas};
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
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
    MachineConfig { ram_pages: 256, mac: MAC, ip: GUEST, diverge_percent: 0, host_entropy_seed: 7 }
}

/// Two sides and what is between them.
struct Pair {
    a: PrimarySide,
    b: SecondarySide,
    mirrors: Mirrors,
    /// Writes of the second disk that are on their way, while they are held up.
    late: Option<Vec<PrimaryEffect>>,
    /// What has left guest A for the network.
    left: Vec<Bytes>,
    /// What a primary that is a survivor has to translate.
    carried: Vec<Carried>,
    /// What guest B says.
    said: mpsc::Receiver<Bytes>,
}

impl Pair {
    /// A pair of a guest with these disks on the secondary, whose first state is loaded.
    fn new(bases: Vec<Box<dyn Disk>>) -> Self {
        Self::of(Mode::Remus, bases)
    }

    fn of(mode: Mode, bases: Vec<Box<dyn Disk>>) -> Self {
        let clock: Clock = Arc::new(|| at(0));
        let blank = |_| Box::new(MemoryDisk::new(DISK_BYTES)) as Box<dyn Disk>;
        let mirrors = Mirrors::new((0..bases.len()).map(blank).collect(), 8 << 20);
        let disks = mirrors.disks().iter().map(|disk| Box::new(disk.clone()) as Box<dyn Disk>);
        let disk = Box::new(Copies::of(disks.collect()));
        let domain = Embedded::boot(&machine(), disk, clock.clone(), Box::new(|_| {})).unwrap();
        let config = primary::Config::new(mode, claim("a"));
        let targets = vec![Target { session: 0, holds: Holds::Zeroes }; bases.len()];
        let (here, clock_a) = (mirrors.clone(), clock.clone());
        let a = PrimarySide::new(at(0), config, Box::new(domain), here, Arc::default(), clock_a, &targets);
        let a = a.unwrap_or_else(|(_, error)| panic!("{error}"));

        let replicas = Replicas::new(bases, ReplicaConfig::default());
        replicas.start_sync(1).unwrap();
        let disk = Box::new(Copies::of(replicas.guest_views().map(|view| Box::new(view) as Box<dyn Disk>).collect()));
        let (says, said) = mpsc::channel();
        let says = Box::new(move |frame: &[u8]| says.send(Bytes::copy_from_slice(frame)).unwrap_or_default());
        let domain = Embedded::blank(&machine(), disk, clock.clone(), says).unwrap();
        let mut config = secondary::Config::new(mode, claim("b"));
        config.policy = Policy::Alone;
        let b = SecondarySide::new(at(0), config, Box::new(domain), replicas, Arc::default(), MAC, clock).unwrap();
        let mut pair = Self { a, b, mirrors, late: None, left: vec![], carried: vec![], said };
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
            let mut idle = effects.is_empty() && !self.a.wants_copy() && !self.b.is_loading();
            effects.into_iter().for_each(|effect| self.carry(ms, effect));
            if !self.b.is_loading() || !self.b.work(at(ms)) {
                while let Some(effect) = self.b.poll_effect() {
                    if let SecondaryEffect::Message(message) = effect {
                        idle = false;
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
        let Self { a, b, late, left, carried, .. } = self;
        match effect {
            PrimaryEffect::Message(message) => b.handle_item(at(ms), Item::Message(message)),
            PrimaryEffect::ToNetwork(frame) => left.push(frame),
            PrimaryEffect::Pages(batch) => b.handle_item(at(ms), Item::Pages(batch)),
            PrimaryEffect::Output(frames) => b.handle_item(at(ms), Item::Output(frames)),
            PrimaryEffect::Devices(blob) => {
                b.handle_item(at(ms), Item::Carried(carried.clone()));
                b.handle_item(at(ms), Item::PagesEnd);
                b.handle_item(at(ms), Item::DeviceState(blob));
            }
            PrimaryEffect::DiskWrite { disk, seq, offset, payload } => match late {
                Some(late) if disk == 1 => late.push(PrimaryEffect::DiskWrite { disk, seq, offset, payload }),
                _ => {
                    let mut view = b.replicas().primary_views(1).nth(disk).unwrap();
                    a.handle_disk_acked(at(ms), disk, vec![(seq, payload.content().write_to(&mut view, offset))]);
                }
            },
            _ => {}
        }
    }

    /// Host B's replicas are written, if it is time.
    fn apply_disk(&mut self, ms: u64) {
        self.b.handle_timeout(at(ms));
        while let Some(effect) = self.b.poll_effect() {
            if let SecondaryEffect::ApplyDisk(replicas) = effect {
                let applied = replicas.apply_round().map_err(|error| error.to_string());
                self.b.handle_disk_applied(at(ms), &replicas, applied);
            }
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
    let second = Failing { disk: MemoryDisk::new(DISK_BYTES), writes: fails.clone(), flushes: Arc::default() };
    let mut pair = Pair::new(vec![Box::new(MemoryDisk::new(DISK_BYTES)), Box::new(second)]);
    pair.write_and_checkpoint(100, 1);
    fails.store(true, Ordering::Relaxed);
    pair.apply_disk(1000);
    assert!(pair.b.error().is_some_and(|error| error.starts_with("disk1: ")), "{:?}", pair.b.error());
    pair.write_and_checkpoint(1100, 2);
    // The broken one's checkpoints are worth nothing any more.
    let (seen, seals) = pair.seen();
    assert_eq!((seen[0], seals), (1, vec![2, 0]), "neither is sealed");
    assert_eq!(pair.b.machine().state(), secondary::State::Exited(Exit::Failed));
    assert!(!pair.b.took_over());
}

#[test]
fn a_disk_whose_flush_failed_is_nobodys_to_take_over() {
    let fails = Arc::new(AtomicBool::new(false));
    let second = Failing { disk: MemoryDisk::new(DISK_BYTES), writes: Arc::default(), flushes: fails.clone() };
    let mut pair = Pair::new(vec![Box::new(MemoryDisk::new(DISK_BYTES)), Box::new(second)]);
    pair.write_and_checkpoint(100, 1);
    fails.store(true, Ordering::Relaxed);
    pair.apply_disk(1000);
    // The primary has the guest: it need not wait for the next checkpoint to learn it.
    assert_eq!(pair.b.machine().state(), secondary::State::Exited(Exit::Failed));
    assert!(pair.b.error().is_some_and(|error| error.starts_with("disk1: ")), "{:?}", pair.b.error());
    fails.store(false, Ordering::Relaxed);
    pair.b.handle_loss(at(2000), Loss::Requested);
    assert!(!pair.b.took_over());
    assert!(pair.b.replicas().takeover(9).is_err());
}

/// A disk that takes no writes, or flushes, while it is told to fail.
struct Failing {
    disk: MemoryDisk,
    writes: Arc<AtomicBool>,
    flushes: Arc<AtomicBool>,
}

impl Disk for Failing {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.disk.read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        if self.writes.load(Ordering::Relaxed) {
            return Err(DiskError::NoSpace { what: "the second disk".into() });
        }
        self.disk.write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        if self.flushes.load(Ordering::Relaxed) {
            return Err(DiskError::io("the second disk", std::io::Error::other("a medium failed")));
        }
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

/// Lock-step without a packet link: what guest A says, and how it leaves.
fn without_a_packet_link() -> Result<(), String> {
    let mut pair = Pair::of(Mode::Colo, vec![Box::new(MemoryDisk::new(DISK_BYTES))]);
    // An address that is new to the network is compared, and waits without asking.
    let frame = |n: u8| {
        let arp = [8, 6, 0, 1, 8, 0, 6, 4, 0, 1];
        Bytes::from([&[0xff; 6][..], &MAC, &arp, &MAC, &[10, 0, 0, n], &[0; 6], &[10, 0, 0, 77]].concat())
    };
    let says = |pair: &mut Pair, ms: u64, n: u8| {
        let epoch = pair.a.machine().epoch();
        pair.a.handle_guest_frame(at(ms), epoch, frame(n));
    };
    // It was held when the link was lost: a checkpoint is asked for, and only that lets it go.
    says(&mut pair, 1000, 1);
    pair.a.handle_packet_link(at(1001), false);
    let effects: Vec<_> = std::iter::from_fn(|| pair.a.poll_effect()).collect();
    if effects.iter().any(|effect| matches!(effect, PrimaryEffect::ToNetwork(_))) {
        return Err("it left because there is no link".into());
    }
    effects.into_iter().for_each(|effect| pair.carry(1001, effect));
    pair.settle(1001);
    assert_eq!(pair.left, [frame(1)]);
    // What is said meanwhile leaves at the pace of Remus.
    says(&mut pair, 1100, 2);
    pair.settle(1100);
    assert_eq!(pair.left.len(), 1);
    assert!(pair.a.poll_timeout().is_some_and(|due| due <= at(1200)), "not when it has aged");
    pair.a.handle_timeout(at(1200));
    pair.settle(1200);
    assert_eq!(pair.left, [frame(1), frame(2)]);
    // The link is back: one checkpoint makes the guests level, then they are compared again.
    pair.a.handle_packet_link(at(1300), true);
    pair.settle(1300);
    let checkpoints = pair.a.stats().checkpoints[&Cause::PacketLink];
    says(&mut pair, 1400, 3);
    pair.a.handle_timeout(at(1500));
    pair.settle(1500);
    assert_eq!((pair.left.len(), pair.a.stats().checkpoints[&Cause::PacketLink]), (2, checkpoints));
    Ok(())
}

#[test]
fn nothing_leaves_because_the_packet_link_is_lost() {
    assert_eq!(without_a_packet_link(), Ok(()));
    plant(Some(Mutant::OpenWithoutLink));
    let caught = without_a_packet_link();
    plant(None);
    assert!(caught.is_err());
}

/// What guest B answers to a segment of a connection that it does not have, as a client hears it: a reset with the number that
/// was acknowledged.
fn reset_heard(pair: &mut Pair, ms: u64) -> u32 {
    loop {
        let frame = pair.said.recv_timeout(Duration::from_secs(20)).expect("the guest answers");
        let epoch = pair.b.machine().epoch();
        pair.b.handle_guest_frame(at(ms), epoch, frame);
        while let Some(effect) = pair.b.poll_effect() {
            // It announces itself, too.
            if let SecondaryEffect::ToNetwork(frame) = effect
                && frame[12..14] == [8, 0]
            {
                return Seg::read(&frame).seq;
            }
        }
    }
}

#[test]
fn what_a_survivor_translated_its_secondary_translates_after_a_takeover_and_not_before() {
    let mut pair = Pair::new(vec![Box::new(MemoryDisk::new(DISK_BYTES))]);
    let (guest, client) = ((GUEST, 80).into(), (CLIENT, 40_000).into());
    pair.carried = vec![Carried { vlans: [0; 2], guest, client, offset: 1000, clock_offset: 0, echoed: None }];
    pair.write_and_checkpoint(100, 1);
    // The primary has translated it, and its guest's state does not know it yet.
    let epoch = pair.b.machine().epoch();
    pair.b.handle_mirrored_frame(at(150), epoch, Seg::data(7, b"").ack(5000).inbound().bytes());
    pair.b.handle_loss(at(200), Loss::Requested);
    assert!(pair.b.took_over());
    assert_eq!(reset_heard(&mut pair, 201), 4000);
    pair.b.handle_network_frame(at(300), Seg::data(7, b"").ack(4500).inbound().bytes());
    assert_eq!(reset_heard(&mut pair, 301), 4500);
    // Another connection has nothing to do with it.
    pair.b.handle_network_frame(at(400), Seg::data(7, b"").ack(4600).port(40_001).inbound().bytes());
    assert_eq!(reset_heard(&mut pair, 401), 4600);
    // What the guest has reset goes along to no further host.
    let (_domain, rewriter) = pair.b.into_survivor();
    assert_eq!(rewriter.carried(), []);
}

#[test]
fn a_survivor_says_again_what_waited_for_its_state_and_nothing_younger() {
    for mode in [Mode::Remus, Mode::Colo] {
        let mut pair = Pair::of(mode, vec![Box::new(MemoryDisk::new(DISK_BYTES))]);
        let [older, waits, younger] = [1, 2, 3].map(|seq| Seg::data(seq, b"said").bytes());
        let epoch = pair.a.machine().epoch();
        pair.a.handle_guest_frame(at(100), epoch, older.clone());
        pair.write_and_checkpoint(110, 1);
        pair.a.handle_guest_frame(at(120), epoch + 1, waits.clone());
        assert_eq!(pair.left, [older], "it left with its checkpoint");
        pair.write_and_checkpoint(130, 2);
        pair.a.handle_guest_frame(at(140), epoch + 2, younger);
        pair.b.handle_loss(at(200), Loss::Requested);
        assert!(pair.b.took_over());
        let said = std::iter::from_fn(|| pair.b.poll_effect()).filter_map(|effect| match effect {
            SecondaryEffect::ToNetwork(frame) => Some(frame).filter(|frame| frame[12..14] == [8, 0]),
            _ => None,
        });
        assert_eq!(said.collect::<Vec<_>>(), [waits], "{mode:?}");
    }
}

#[test]
fn a_survivor_is_given_what_the_network_brought_while_its_primary_was_silent() {
    let mut pair = Pair::new(vec![Box::new(MemoryDisk::new(DISK_BYTES))]);
    pair.write_and_checkpoint(100, 1);
    let to = |mac: [u8; 6], ack: u32| {
        let mut frame = Seg::data(7, b"").ack(ack).inbound().bytes().to_vec();
        frame[..6].copy_from_slice(&mac);
        Bytes::from(frame)
    };
    // Of an earlier time, which the primary had itself; of somebody else; and what a client repeated.
    pair.b.handle_network_frame(at(4_000), to(MAC, 1000));
    pair.b.handle_network_frame(at(16_000), to([2, 0, 0, 0, 0, 3], 2000));
    pair.b.handle_network_frame(at(16_000), to(MAC, 3000));
    pair.b.handle_loss(at(17_000), Loss::Silent(Silence::Unheard(Duration::from_secs(3))));
    assert!(pair.b.took_over());
    assert_eq!(reset_heard(&mut pair, 17_001), 3000);
    assert!(pair.said.recv_timeout(Duration::from_millis(200)).is_err(), "and nothing else");
}
