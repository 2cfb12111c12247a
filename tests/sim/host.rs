//! A host: a side of the pair, and around it what the engine does with threads and sockets.
//!
//! ```text
//! input ─▶ lease checked ─▶ side.handle_* ─▶ deadlines ─▶ effects to the wires
//! ```
//!
//! This stands in for `daemon/engine.rs` and follows it arrow by arrow; everything it calls is the product's code.
//! A host that is frozen keeps what reaches its sockets, and finds it all when it wakes.

use super::dice::Dice;
use super::domain::{Busy, Captured, Core, SimDomain, boxed};
use super::plan::{A, B, Plan, Step};
use super::world::{BEATS, DISK, Event, GENERATION, SECOND_DISK, World, tell};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xen_colo::clock::Instant;
use xen_colo::colo::arbiter::{Answer, Claim};
use xen_colo::colo::heartbeat::{Beat, Heartbeat};
use xen_colo::colo::message::Message;
use xen_colo::colo::stream::{Decoder, Item};
use xen_colo::colo::{Exit, Loss, primary as primary_machine, secondary as secondary_machine};
use xen_colo::daemon::pair::primary::PrimarySide;
use xen_colo::daemon::pair::secondary::SecondarySide;
use xen_colo::daemon::pair::{Clock, lock};
use xen_colo::disk::{Disk, DiskError, MemoryDisk};
use xen_colo::hypervisor::Domain;
use xen_colo::hypervisor::embedded::copies::Copies;
use xen_colo::hypervisor::embedded::{Machine, MachineConfig, kv};
use xen_colo::replica::epochs::ReplicaConfig;
use xen_colo::replica::mirror::{Holds, Payload, Target};
use xen_colo::replica::set::{Mirrors, Replicas};

/// The guest's hardware address.
pub(super) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RAM_PAGES: u64 = 256;
const DISK_BYTES: usize = 1 << 20;
/// Small, so that a busy guest reaches it.
const MIRROR_QUEUE_BYTES: u64 = 3 << 20;
const MISSES: u32 = 3;
const BEAT_SOCKET: usize = 4;

/// The link of a disk.
pub(super) fn disk_link(disk: usize) -> usize {
    [DISK, SECOND_DISK][disk]
}

/// What reaches a host, each kind through a socket of its own.
#[derive(Debug)]
pub(super) enum Input {
    Lost(Loss),
    Answer(Answer),
    Stream(Bytes),
    Message(Message),
    DiskWrite { disk: usize, seq: u64, offset: u64, payload: Payload },
    DiskAck(usize, u64, Result<(), DiskError>),
    Packet(u64, Bytes),
    PacketLink(bool),
    Beat(Beat),
    Network(Bytes),
    DiskApplied(Replicas, Result<bool, String>),
}

impl Input {
    fn socket(&self) -> usize {
        match self {
            // The end of a connection is read after what was sent before it.
            Self::Stream(_) | Self::Message(_) | Self::Lost(_) => 0,
            Self::Answer(_) | Self::DiskApplied(..) => 1,
            Self::DiskWrite { disk: 0, .. } | Self::DiskAck(0, ..) => 2,
            Self::Packet(..) | Self::PacketLink(_) => 3,
            Self::Beat(_) => BEAT_SOCKET,
            Self::Network(_) => 5,
            Self::DiskWrite { .. } | Self::DiskAck(..) => 6,
        }
    }

    /// Whether the engine's thread handles it.
    fn is_for_engine(&self) -> bool {
        !matches!(self, Self::Beat(_) | Self::DiskWrite { .. })
    }
}

/// What a host is to the guest.
pub(super) enum Role {
    Running(SimDomain),
    StandingBy(SimDomain),
    Primary(Box<PrimarySide>),
    Secondary(Box<SecondarySide>),
    Nothing,
}

/// A host.
pub(super) struct Host {
    pub(super) role: Role,
    pub(super) core: Arc<Mutex<Core>>,
    mirrors: Option<Mirrors>,
    replicas: Option<Replicas>,
    pub(super) heartbeat: Option<Heartbeat>,
    decoder: Decoder,
    undecoded: BytesMut,
    sockets: [VecDeque<Input>; 7],
    /// Its links are up.
    pub(super) linked: bool,
    /// It is gone for good.
    pub(super) crashed: bool,
    /// It executes nothing.
    pub(super) frozen: bool,
    /// What leaves now was decided before it fell asleep.
    pub(super) leaving: bool,
    /// Its engine executes nothing.
    pub(super) stalled: bool,
    wake_us: u64,
    pub(super) guest_us: u64,
    pub(super) frames_us: u64,
    pub(super) work_us: u64,
}

impl Host {
    fn new(role: Role, core: Arc<Mutex<Core>>) -> Self {
        Self {
            role,
            core,
            mirrors: None,
            replicas: None,
            heartbeat: None,
            decoder: Decoder::new(RAM_PAGES),
            undecoded: BytesMut::new(),
            sockets: Default::default(),
            linked: false,
            crashed: false,
            frozen: false,
            stalled: false,
            leaving: false,
            wake_us: u64::MAX,
            guest_us: u64::MAX,
            frames_us: u64::MAX,
            work_us: u64::MAX,
        }
    }

    /// A host whose guest runs, and one that stands by.
    pub(super) fn pair(
        plan: &Plan,
        dice: &mut Dice,
        clock: &Arc<AtomicU64>,
        captured: &Arc<Mutex<Captured>>,
    ) -> (Self, Self) {
        let mut config = MachineConfig {
            ram_pages: RAM_PAGES,
            mac: GUEST_MAC,
            ip: super::client::GUEST_IP,
            diverge_percent: plan.diverge_percent,
            host_entropy_seed: dice.next(),
        };
        let blank = || (0..plan.disks).map(|_| boxed(MemoryDisk::new(DISK_BYTES))).collect();
        let mirrors = Mirrors::new(blank(), MIRROR_QUEUE_BYTES);
        let copies = || Copies::of(mirrors.disks().iter().cloned().map(boxed).collect());
        let machine = Machine::boot(&config, Instant::ZERO, &mut copies()).expect("the guest boots");
        let mut busy = |disk: Box<dyn Disk>, percent| Box::new(Busy { disk, percent, dice: Dice(dice.next()) });
        let disk = busy(boxed(copies()), plan.busy_percent[A]);
        let core = Arc::new(Mutex::new(Core::new(machine, disk, captured.clone())));
        let mut domain = SimDomain { core: core.clone(), clock: clock.clone() };
        domain.resume().expect("the guest runs");
        let mut a = Self::new(Role::Running(domain), core);
        a.mirrors = Some(mirrors);

        let replicas = Replicas::new(blank(), ReplicaConfig::default());
        let disk = busy(boxed(Copies::of(replicas.guest_views().map(boxed).collect())), plan.busy_percent[B]);
        config.host_entropy_seed = dice.next();
        let machine = Machine::blank(&config).expect("there is room for a guest");
        let core = Arc::new(Mutex::new(Core::new(machine, disk, captured.clone())));
        let mut b = Self::new(Role::StandingBy(SimDomain { core: core.clone(), clock: clock.clone() }), core);
        b.replicas = Some(replicas);
        (a, b)
    }

    /// Whether it lives and has a state a guest can go on from.
    pub(super) fn has_state(&self) -> bool {
        !self.crashed
            && match &self.role {
                Role::Running(_) => true,
                Role::Primary(side) => side.machine().state() != primary_machine::State::Exited(Exit::Stopped),
                Role::Secondary(side) => {
                    side.machine().epoch() > 0
                        && !self.has_given_up()
                        && !matches!(side.machine().state(), secondary_machine::State::Exited(exit) if exit != Exit::Alone)
                }
                Role::StandingBy(_) | Role::Nothing => false,
            }
    }

    /// Whether it was dismissed.
    pub(super) fn has_given_up(&self) -> bool {
        use secondary_machine::State;
        matches!(&self.role, Role::Secondary(side)
            if matches!(side.machine().state(), State::Dismissed | State::Exited(Exit::Dismissed)))
    }

    /// Whether it has lost its peer and waits for the arbiter.
    pub(super) fn is_undecided(&self) -> bool {
        matches!(&self.role, Role::Primary(side) if matches!(side.machine().state(),
            primary_machine::State::Arbitrating | primary_machine::State::Held))
    }

    /// Whether clients are answered by this host.
    pub(super) fn serves(&self) -> bool {
        let is_served = match &self.role {
            Role::Running(_) => true,
            Role::Primary(side) => !matches!(
                side.machine().state(),
                primary_machine::State::Exited(Exit::Stopped)
                    | primary_machine::State::Arbitrating
                    | primary_machine::State::Held
            ),
            Role::Secondary(side) => side.took_over(),
            Role::StandingBy(_) | Role::Nothing => false,
        };
        is_served && !self.crashed
    }

    /// What is on each of its guest's disks.
    pub(super) fn scan(&self) -> Result<Vec<BTreeMap<String, Vec<u8>>>, String> {
        let disks: Vec<_> = match (&self.mirrors, &self.replicas) {
            (Some(mirrors), _) => mirrors.disks().iter().cloned().map(boxed).collect(),
            (None, Some(replicas)) => replicas.guest_views().map(boxed).collect(),
            (None, None) => return Err("no disk".into()),
        };
        let scan = |mut disk: Box<dyn Disk>| kv::scan(&mut *disk);
        disks.into_iter().map(scan).collect::<Result<_, _>>().map_err(|error| format!("a disk cannot be read: {error}"))
    }

    pub(super) fn is_replicating(&self) -> bool {
        match &self.role {
            Role::Primary(side) => !matches!(side.machine().state(), primary_machine::State::Exited(_)),
            Role::Secondary(side) => !matches!(side.machine().state(), secondary_machine::State::Exited(_)),
            _ => false,
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        match &self.role {
            Role::Primary(side) => side.poll_timeout(),
            Role::Secondary(side) => side.poll_timeout(),
            _ => None,
        }
    }

    fn has_work(&self) -> bool {
        matches!(&self.role, Role::Primary(side) if side.wants_copy())
            || matches!(&self.role, Role::Secondary(side) if side.is_loading())
    }

    pub(super) fn takes_frames(&self) -> bool {
        match &self.role {
            Role::Primary(side) => side.ready_for_guest_frames(),
            _ => true,
        }
    }
}

impl World {
    fn virtual_clock(&self) -> Clock {
        let clock = self.clock.clone();
        Arc::new(move || Instant::from_micros(clock.load(Ordering::Relaxed)))
    }

    /// The links are up: both hosts begin.
    pub(super) fn protect(&mut self) {
        let (now, plan) = (self.now(), self.plan.clone());
        let us = Duration::from_micros;
        let claim = |holder: &str| Claim { guest: "g".into(), expected: GENERATION, holder: holder.into() };
        let mut config = secondary_machine::Config::new(plan.mode, claim("b"));
        (config.peer_deadline, config.arbiter_deadline) = (us(plan.peer_deadline_us), us(300_000));
        let Role::StandingBy(domain) = std::mem::replace(&mut self.hosts[B].role, Role::Nothing) else { return };
        let (replicas, epoch) =
            (self.hosts[B].replicas.clone().expect("it has some"), lock(&domain.core).epoch.clone());
        replicas.start_sync(GENERATION).expect("nothing was there before");
        let clock = self.virtual_clock();
        let side = SecondarySide::new(now, config, Box::new(domain), replicas, epoch, GUEST_MAC, clock.clone());
        self.hosts[B].role = Role::Secondary(Box::new(side.expect("it stands by")));

        let mut config = primary_machine::Config::new(plan.mode, claim("a"));
        (config.resume, config.peer_deadline) = (plan.resume, us(plan.peer_deadline_us));
        (config.checkpoint_delay, config.checkpoint_min_interval) =
            (us(plan.checkpoint_delay_us), us(plan.min_interval_us));
        config.arbiter_deadline = us(300_000);
        let Role::Running(domain) = std::mem::replace(&mut self.hosts[A].role, Role::Nothing) else { return };
        let (mirrors, epoch) = (self.hosts[A].mirrors.clone().expect("it has some"), lock(&domain.core).epoch.clone());
        let targets = vec![Target { session: 1, holds: Holds::Zeroes }; mirrors.disks().len()];
        match PrimarySide::new(now, config, Box::new(domain), mirrors, epoch, clock, &targets) {
            Ok(side) => self.hosts[A].role = Role::Primary(Box::new(side)),
            Err((_, error)) => return self.violate(format!("no primary: {error}")),
        }
        for host in [A, B] {
            self.hosts[host].linked = true;
            self.hosts[host].heartbeat = Some(Heartbeat::new(now, us(plan.beat_us), MISSES, GENERATION));
            self.settle(host);
        }
        tell!(self, "the pair is made");
    }

    /// Something reached a host.
    pub(super) fn input(&mut self, host: usize, input: Input) {
        let it = &mut self.hosts[host];
        if it.crashed {
            return;
        }
        if it.frozen || it.stalled && input.is_for_engine() {
            it.sockets[input.socket()].push_back(input);
            return;
        }
        match input {
            Input::Beat(beat) => return self.beat(host, beat),
            Input::DiskWrite { disk, seq, offset, payload } => return self.disk_write(disk, seq, offset, &payload),
            _ => {}
        }
        self.check_lease(host);
        self.apply(host, input);
        self.settle(host);
    }

    /// A host goes on, with all that waits in its sockets.
    pub(super) fn thaw(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        if it.crashed || !(it.frozen || it.stalled) {
            return;
        }
        tell!(self, "host {host} goes on");
        let it = &mut self.hosts[host];
        (it.frozen, it.stalled) = (false, false);
        // What was on its way out when it fell asleep goes first, as late as a packet can be.
        it.leaving = true;
        self.flush(host);
        self.hosts[host].leaving = false;
        // Beats first: they are what could renew a lease that is over. The others in any order.
        while let Some(beat) = self.hosts[host].sockets[BEAT_SOCKET].pop_front() {
            self.input(host, beat);
        }
        self.check_lease(host);
        self.words(host);
        self.decode(host);
        loop {
            let filled: Vec<_> = (0..7).filter(|at| !self.hosts[host].sockets[*at].is_empty()).collect();
            if filled.is_empty() {
                break;
            }
            let socket = self.dice.pick(&filled);
            let Some(input) = self.hosts[host].sockets[socket].pop_front() else { break };
            self.input(host, input);
        }
        if !self.hosts[host].crashed {
            self.check_lease(host);
            self.settle(host);
        }
    }

    /// A host's clock strikes.
    pub(super) fn wake(&mut self, host: usize) {
        let now = self.now();
        let it = &mut self.hosts[host];
        if it.wake_us > self.now_us {
            return;
        }
        it.wake_us = u64::MAX;
        if it.crashed || it.frozen {
            return;
        }
        let beat = it.heartbeat.as_mut().and_then(|heartbeat| heartbeat.poll_transmit(now));
        if let Some(beat) = beat {
            self.send(BEATS, host, 0, Input::Beat(beat));
        }
        if !self.hosts[host].stalled {
            self.check_lease(host);
        }
        self.settle(host);
    }

    fn beat(&mut self, host: usize, beat: Beat) {
        let now = self.now();
        let answer = self.hosts[host].heartbeat.as_mut().and_then(|heartbeat| heartbeat.handle_beat(now, beat));
        if let Some(answer) = answer {
            self.send(BEATS, host, 0, Input::Beat(answer));
        }
        if !self.hosts[host].stalled {
            self.words(host);
        }
    }

    fn disk_write(&mut self, disk: usize, seq: u64, offset: u64, payload: &Payload) {
        let view = self.hosts[B].replicas.as_ref().and_then(|replicas| replicas.primary_views(GENERATION).nth(disk));
        let Some(mut view) = view else { return };
        let taken_over = matches!(&self.hosts[B].role, Role::Secondary(side) if side.took_over());
        let result = payload.content().write_to(&mut view, offset);
        if taken_over {
            self.saw("old write after takeover");
            if result.is_ok() {
                self.violate("the replica took a write of a generation that is over");
            }
        }
        self.step(Step::DiskWritten);
        self.strike_if_due();
        if !self.hosts[B].crashed {
            self.send(disk_link(disk), B, 0, Input::DiskAck(disk, seq, result));
            self.step(Step::DiskAckSent);
            self.strike_if_due();
        }
    }

    pub(super) fn check_lease(&mut self, host: usize) {
        let (now, it) = (self.now(), &self.hosts[host]);
        if let Some(silence) = it.heartbeat.as_ref().filter(|_| it.linked).and_then(|heartbeat| heartbeat.lost(now)) {
            self.lose(host, silence.into());
        }
    }

    pub(super) fn lose(&mut self, host: usize, loss: Loss) {
        let now = self.now();
        tell!(self, "host {host} lost its peer: {loss}");
        match &mut self.hosts[host].role {
            Role::Primary(side) => {
                if side.machine().state() == primary_machine::State::Dismissing {
                    *self.report.seen.entry("lost while dismissing").or_default() += 1;
                }
                side.handle_loss(now, loss);
            }
            Role::Secondary(side) => {
                if side.machine().state() == secondary_machine::State::Loading {
                    *self.report.seen.entry("lost while loading").or_default() += 1;
                }
                side.handle_loss(now, loss);
            }
            _ => return,
        }
        self.close_links(host);
        self.flush(host);
    }

    pub(super) fn close_links(&mut self, host: usize) {
        self.hosts[host].heartbeat = None;
        if std::mem::take(&mut self.hosts[host].linked) {
            self.hang_up(host, "closed");
        }
    }

    fn apply(&mut self, host: usize, input: Input) {
        let now = self.now();
        let it = &mut self.hosts[host];
        let linked = it.linked;
        match (&mut it.role, input) {
            // Once the links are closed there is nobody to hear of their end.
            (_, Input::Lost(loss)) if linked => self.lose(host, loss),
            (_, Input::Lost(_)) => {}
            (Role::Primary(side), Input::Answer(answer)) => side.handle_answer(now, answer),
            (Role::Secondary(side), Input::Answer(answer)) => side.handle_answer(now, answer),
            (Role::Secondary(side), Input::DiskApplied(disks, how)) => side.handle_disk_applied(now, &disks, how),
            (Role::Running(domain), Input::Network(frame)) => _ = domain.receive_frame(&frame),
            (Role::Primary(side), Input::Network(frame)) => side.handle_network_frame(now, frame),
            (Role::Secondary(side), Input::Network(frame)) => side.handle_network_frame(now, frame),
            _ if !linked => {}
            (Role::Primary(side), Input::Message(message)) => {
                side.handle_message(now, message);
                self.flush(host);
                self.step(match message {
                    Message::CheckpointReply => Step::ReplyGot,
                    Message::VmstateReceived => Step::ReceivedGot,
                    Message::VmstateLoaded => Step::LoadedGot,
                    _ => Step::ReadyGot,
                });
                self.strike_if_due();
            }
            (Role::Primary(side), Input::DiskAck(disk, seq, result)) => {
                side.handle_disk_acked(now, disk, vec![(seq, result)]);
                self.flush(host);
                self.step(Step::DiskAckGot);
                self.strike_if_due();
            }
            (Role::Primary(side), Input::Packet(epoch, frame)) => side.handle_secondary_frame(now, epoch, frame),
            (Role::Secondary(side), Input::Packet(epoch, frame)) => side.handle_mirrored_frame(now, epoch, frame),
            (Role::Primary(side), Input::PacketLink(up)) => side.handle_packet_link(now, up),
            (Role::Secondary(side), Input::Stream(bytes)) => {
                side.handle_progress(now);
                it.undecoded.extend_from_slice(&bytes);
                self.decode(host);
            }
            _ => {}
        }
    }

    fn decode(&mut self, host: usize) {
        let now = self.now();
        loop {
            let it = &mut self.hosts[host];
            if it.crashed || it.frozen || it.stalled || !it.linked {
                return;
            }
            let item = match it.decoder.decode(&mut it.undecoded) {
                Ok(Some(item)) => item,
                Ok(None) if it.undecoded.len() > 8192 => {
                    self.step(Step::MidPages);
                    self.strike_if_due();
                    return;
                }
                Ok(None) => return,
                Err(error) => return self.lose(host, Loss::Violation(error.to_string())),
            };
            let Role::Secondary(side) = &mut it.role else { return };
            let first = side.machine().epoch() == 0;
            let step = match &item {
                Item::Message(Message::CheckpointRequest) => Some(Step::RequestGot),
                Item::Message(_) => Some(Step::SendGot),
                Item::Pages(_) | Item::ZeroPages(_) | Item::Deltas(_) if !first => Some(Step::PagesGot),
                Item::Output(_) if !first => Some(Step::OutputGot),
                Item::DeviceState(_) => Some(Step::WholeGot),
                _ => None,
            };
            if let Item::Message(message) = &item {
                tell!(self, "host {host} got {message}");
            }
            let Role::Secondary(side) = &mut self.hosts[host].role else { return };
            side.handle_item(now, item);
            self.flush(host);
            step.into_iter().for_each(|step| self.step(step));
            self.strike_if_due();
        }
    }

    /// What is due after every input: deadlines, effects, and when to look again.
    pub(super) fn settle(&mut self, host: usize) {
        let now = self.now();
        let it = &mut self.hosts[host];
        if it.crashed || it.frozen {
            return;
        }
        if !it.stalled {
            if it.poll_timeout().is_some_and(|at| at <= now) {
                match &mut it.role {
                    Role::Primary(side) => side.handle_timeout(now),
                    Role::Secondary(side) => side.handle_timeout(now),
                    _ => {}
                }
            }
            let lost = match &self.hosts[host].role {
                Role::Primary(side) => side.machine().loss(),
                Role::Secondary(side) => side.machine().loss(),
                _ => None,
            };
            if lost.is_some_and(|loss| *loss != Loss::Dismissed) {
                self.close_links(host);
            }
            self.flush(host);
        }
        self.schedule(host);
    }

    /// When the parts of a host are to be looked at again.
    pub(super) fn schedule(&mut self, host: usize) {
        let now = self.now();
        let it = &mut self.hosts[host];
        if it.crashed || it.frozen {
            return;
        }
        let work = it.work_us == u64::MAX && !it.stalled && it.has_work();
        if work {
            let at_us = self.now_us + 1 + self.dice.tail(self.plan.work_us);
            self.hosts[host].work_us = at_us;
            self.at(at_us, Event::Work(host));
        }
        let it = &mut self.hosts[host];
        // A deadline that has passed can only be for the work that will be done.
        let engine = it.poll_timeout().filter(|at| !it.stalled && (*at > now || it.work_us == u64::MAX));
        // A lease that ended while the engine hangs is looked at when it goes on.
        let beats = it.heartbeat.as_ref().map(|heartbeat| match heartbeat.lost(now) {
            Some(_) if it.stalled => now + Duration::from_millis(5),
            _ => heartbeat.poll_timeout(),
        });
        let next_us = engine.into_iter().chain(beats).min().map(|at| at.as_micros().max(self.now_us + 1));
        if let Some(at_us) = next_us.filter(|at_us| *at_us < it.wake_us) {
            it.wake_us = at_us;
            self.at(at_us, Event::Wake(host));
        }
        let it = &self.hosts[host];
        let (poked, sends) = {
            let core = &mut *lock(&it.core);
            (std::mem::take(&mut core.poked) && core.running, !core.sent.is_empty())
        };
        let frames = sends && it.frames_us == u64::MAX && !it.stalled && it.takes_frames();
        if poked {
            let at_us = self.now_us + 1 + self.dice.tail(self.plan.step_us);
            self.guest_at(host, at_us);
        }
        if frames {
            let at_us = self.now_us + 1 + self.dice.tail(self.plan.look_us);
            self.hosts[host].frames_us = at_us;
            self.at(at_us, Event::Frames(host));
        }
    }
}
