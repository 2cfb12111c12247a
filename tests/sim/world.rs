//! Two hosts, the wires between them, an arbiter, a switch and clients, on one thread under one virtual clock.
//!
//! ```text
//!  clients ══ switch ══ host A ── stream, packets, disk, beats ── host B ══ switch
//!                          └────────── arbiter ────────────────────┘
//! ```
//!
//! Everything that takes time is an event in one queue; two events of the same moment happen in the order they
//! were made. A wire is reliable and ordered, as TCP is: what a cut holds up arrives when it heals. What dies with
//! a host is the tail of what it had sent.

use super::client::Client;
use super::commit::{Commit, describe};
use super::dice::Dice;
use super::domain::Captured;
use super::history::History;
use super::host::{Host, Input};
use super::plan::{A, B, Kind, Plan, Step, When};
use super::wires::{Line, PacketLink, Turn};
use bytes::Bytes;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use xen_colo::clock::Instant;
use xen_colo::colo::Loss;
use xen_colo::colo::arbiter::{Answer, Claim, Register, Verdict};
use xen_colo::colo::delta::SentPages;
use xen_colo::daemon::pair::lock;
use xen_colo::replica::set::Replicas;

/// The generation in force when the pair is made.
pub(super) const GENERATION: u64 = 7;
/// The wires, each of them two ways.
pub(super) const STREAM: usize = 0;
pub(super) const PACKETS: usize = 1;
pub(super) const DISK: usize = 2;
pub(super) const BEATS: usize = 3;
pub(super) const SECOND_DISK: usize = 4;
/// Ports of the switch: clients count from 0.
const HOST_PORT: usize = 16;
/// How long a fault may wait for its moment, counted from the start of the protection.
const FAULT_WAITS_US: u64 = 250_000;
/// How long clients may take to come to an end once nothing disturbs them any more.
const PATIENCE_US: u64 = 70_000_000;
/// More events than any sound run takes.
const EVENTS_MAX: u64 = 400_000;

/// Something due.
pub(super) enum Event {
    /// A host looks at its clocks.
    Wake(usize),
    /// A guest does a step.
    Guest(usize),
    /// A host takes its guest's frames.
    Frames(usize),
    /// A host does a slice of work.
    Work(usize),
    /// A host's disk thread does a round, and its engine hears of it.
    Apply(usize, Replicas),
    /// Something comes out of a wire.
    Arrive { wire: usize, input: Input },
    /// A frame reaches the switch.
    Switch { port: usize, frame: Bytes },
    /// A frame reaches whatever is plugged into a port.
    Frame { port: usize, frame: Bytes },
    /// A client looks at its clock.
    Client(usize),
    /// A claim reaches the arbiter.
    Claim { host: usize, claim: Claim },
    /// Its answer reaches the host.
    Answer { host: usize, answer: Answer },
    /// The pair is made.
    Protect,
    /// The operator ends the protection.
    Unprotect,
    /// The packet link breaks, or is made again.
    PacketLink(Turn),
    /// The fault strikes.
    Fault,
    /// The fault ends.
    Relief,
    /// The operator decides for a guest that is held.
    Operator,
}

struct Due {
    at_us: u64,
    serial: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_us, self.serial).cmp(&(other.at_us, other.serial))
    }
}

/// What a run saw, for proving that the runs see everything.
#[derive(Clone, Default, Debug)]
pub(super) struct Report {
    /// Each thing that happened, by name.
    pub(super) seen: BTreeMap<&'static str, u64>,
    /// The step at which the fault struck.
    pub(super) struck: Option<(Kind, Option<Step>)>,
    /// Answers clients got.
    pub(super) answers: u64,
    /// States loaded and compared.
    pub(super) compared: u64,
    /// Segments that left explained, and owned.
    pub(super) segments: (u64, u64),
    /// Events.
    pub(super) events: u64,
}

/// Room for sent pages: for fewer than a guest writes, so that some go whole again.
const SENT_PAGES_MAX: usize = 24;

/// A run.
pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) dice: Dice,
    pub(super) now_us: u64,
    pub(super) clock: Arc<AtomicU64>,
    pub(super) hosts: [Host; 2],
    pub(super) lines: [Line; 10],
    pub(super) packets: PacketLink,
    pub(super) register: Register,
    /// Who won the next generation, and when.
    pub(super) granted: Option<(usize, u64)>,
    pub(super) commit: Commit,
    pub(super) report: Report,
    pub(super) captured: Arc<Mutex<Captured>>,
    pub(super) violation: Option<String>,
    /// What the primary remembers of the pages it sent.
    pub(super) sent_pages: SentPages,
    /// Whether to tell what happens.
    pub(super) trace: bool,
    /// When the fault struck.
    pub(super) fault_us: Option<u64>,
    /// The fault's moment was just reached.
    pub(super) fault_due: bool,
    queue: BinaryHeap<Reverse<Due>>,
    serial: u64,
    clients: Vec<Client>,
    client_us: Vec<u64>,
    switch: BTreeMap<[u8; 6], usize>,
    history: History,
    /// From when on nothing more disturbs the pair.
    quiet_us: u64,
    steps: [u64; Step::ALL.len()],
}

/// Tells what happens, when somebody listens.
macro_rules! tell {
    ($world:expr, $($what:tt)*) => {
        if $world.trace {
            println!("{:>10} us  {}", $world.now_us, format_args!($($what)*));
        }
    };
}
pub(super) use tell;

impl World {
    /// The world of a seed, before anything happened.
    pub(super) fn new(seed: u64, trace: bool) -> Self {
        let mut dice = Dice(seed);
        let plan = Plan::new(&mut dice);
        let clock = Arc::new(AtomicU64::new(0));
        let captured = Arc::new(Mutex::new(Captured::new(plan.check_memory)));
        let (a, b) = Host::pair(&plan, &mut dice, &clock, &captured);
        let clients: Vec<_> = (0..plan.clients)
            .map(|id| Client::new(id, plan.clients, plan.think_us, plan.value_max, Dice(dice.next())))
            .collect();
        let mut world = Self {
            now_us: 0,
            clock,
            hosts: [a, b],
            lines: Default::default(),
            packets: PacketLink::default(),
            register: Register { generation: GENERATION, holder: "a".into() },
            granted: None,
            commit: Commit::default(),
            report: Report::default(),
            captured,
            violation: None,
            sent_pages: SentPages::new(SENT_PAGES_MAX),
            trace,
            fault_us: None,
            fault_due: false,
            queue: BinaryHeap::with_capacity(256),
            serial: 0,
            client_us: vec![0; clients.len()],
            clients,
            switch: BTreeMap::from([(super::host::GUEST_MAC, HOST_PORT + A)]),
            history: History::default(),
            quiet_us: plan.protect_us + 100_000,
            steps: [0; Step::ALL.len()],
            dice,
            plan,
        };
        (0..world.clients.len()).for_each(|id| world.at(0, Event::Client(id)));
        world.at(world.plan.protect_us, Event::Protect);
        for (at_us, turn) in world.plan.packet_turns.clone() {
            world.at(world.plan.protect_us + at_us, Event::PacketLink(turn));
        }
        if let When::At(us) = world.plan.fault.when {
            world.at(world.plan.protect_us + us, Event::Fault);
        }
        if let Some(When::At(us)) = world.plan.unprotect {
            world.at(world.plan.protect_us + us, Event::Unprotect);
        }
        tell!(world, "{:#?}", world.plan);
        world
    }

    /// Now, in the product's words.
    pub(super) fn now(&self) -> Instant {
        Instant::from_micros(self.now_us)
    }

    /// Makes something due.
    pub(super) fn at(&mut self, at_us: u64, event: Event) {
        self.serial += 1;
        self.queue.push(Reverse(Due { at_us: at_us.max(self.now_us), serial: self.serial, event }));
    }

    /// Makes something due after a while.
    pub(super) fn after(&mut self, us: u64, event: Event) {
        self.at(self.now_us.saturating_add(us), event);
    }

    /// Notes that something happened.
    pub(super) fn saw(&mut self, what: &'static str) {
        *self.report.seen.entry(what).or_default() += 1;
    }

    /// Notes that a promise was broken; the first one counts.
    pub(super) fn violate(&mut self, what: impl Into<String>) {
        let what = what.into();
        tell!(self, "VIOLATION: {what}");
        self.violation.get_or_insert(what);
    }

    /// Runs to the end; says what went wrong.
    pub(super) fn run(&mut self) -> Result<(), String> {
        while self.violation.is_none() && !self.clients.iter().all(Client::is_done) {
            let Some(Reverse(due)) = self.queue.pop() else { break };
            let quiet_us = self.quiet_us.max(self.plan.protect_us + FAULT_WAITS_US);
            let patience_us = if self.somebody_must_serve() { PATIENCE_US } else { 1_000_000 };
            if due.at_us > quiet_us + patience_us {
                break;
            }
            self.now_us = due.at_us;
            self.clock.store(due.at_us, Ordering::Relaxed);
            self.report.events += 1;
            if self.report.events > EVENTS_MAX {
                self.violate("the run does not come to an end");
            }
            self.happen(due.event);
        }
        self.finish();
        self.violation.clone().map_or(Ok(()), Err)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Wake(host) => self.wake(host),
            Event::Guest(host) => self.guest_step(host),
            Event::Frames(host) => self.take_frames(host),
            Event::Work(host) => self.work(host),
            Event::Apply(host, replicas) => self.apply_disk(host, replicas),
            Event::Arrive { wire, input } => self.arrive(wire, input),
            Event::Switch { port, frame } => self.switch(port, frame),
            Event::Frame { port, frame } => self.frame(port, frame),
            Event::Client(id) => {
                if self.client_us[id] <= self.now_us {
                    self.client(id);
                }
            }
            Event::Claim { host, claim } => self.claim(host, &claim),
            Event::Answer { host, answer } => self.input(host, Input::Answer(answer)),
            Event::Protect => self.protect(),
            Event::Unprotect => self.unprotect(),
            Event::PacketLink(turn) => self.turn_packet_link(turn),
            Event::Fault => self.strike(None),
            Event::Relief => self.relieve(),
            Event::Operator => self.operator(),
        }
    }

    /// Counts a step, and notes when it is the fault's moment.
    pub(super) fn step(&mut self, step: Step) {
        let count = &mut self.steps[step as usize];
        *count += 1;
        if let When::Step(wanted, nth) = self.plan.fault.when
            && (wanted, nth) == (step, *count)
        {
            self.fault_due = true;
        }
        if let Some(When::Step(wanted, nth)) = self.plan.unprotect
            && (wanted, nth) == (step, *count)
        {
            self.at(self.now_us, Event::Unprotect);
        }
    }

    /// Strikes if the fault's moment was reached; true when the struck host does not go on as it was.
    pub(super) fn strike_if_due(&mut self) -> bool {
        if !std::mem::take(&mut self.fault_due) {
            return false;
        }
        let When::Step(step, _) = self.plan.fault.when else { return false };
        self.strike(Some(step));
        true
    }

    fn strike(&mut self, step: Option<Step>) {
        let fault = self.plan.fault;
        if self.now_us > self.plan.protect_us + FAULT_WAITS_US || self.fault_us.is_some() {
            return;
        }
        tell!(self, "FAULT {:?} at host {} ({step:?})", fault.kind, fault.victim);
        self.fault_us = Some(self.now_us);
        self.report.struck = Some((fault.kind, step));
        let (victim, peer) = (fault.victim, 1 - fault.victim);
        let mut lasts_us = 0;
        match fault.kind {
            Kind::Nothing => {}
            Kind::Kill => {
                self.hosts[victim].crashed = true;
                self.switch.retain(|_, port| *port != HOST_PORT + victim);
                self.hang_up(victim, "killed");
            }
            Kind::Power => {
                self.hosts[victim].crashed = true;
                self.switch.retain(|_, port| *port != HOST_PORT + victim);
                self.cut_tails(victim);
            }
            Kind::Freeze => (self.hosts[victim].frozen, lasts_us) = (true, fault.lasts_us),
            Kind::Stall => (self.hosts[victim].stalled, lasts_us) = (true, fault.lasts_us),
            Kind::Cut => {
                self.lines.iter_mut().for_each(|line| line.cut = true);
                lasts_us = fault.lasts_us;
            }
            Kind::CutOut | Kind::CutIn => {
                let from = if fault.kind == Kind::CutOut { victim } else { peer };
                self.lines.iter_mut().skip(from).step_by(2).for_each(|line| line.cut = true);
                lasts_us = fault.lasts_us;
            }
            Kind::Reset => {
                self.input(victim, Input::Lost(Loss::Disconnected("reset".into())));
                self.input(peer, Input::Lost(Loss::Disconnected("reset".into())));
            }
            // A secondary that has given up refuses.
            Kind::Failover if self.hosts[victim].has_given_up() => {}
            Kind::Failover => self.input(victim, Input::Lost(Loss::Requested)),
        }
        if lasts_us > 0 {
            self.after(lasts_us, Event::Relief);
        }
        let outage = self.plan.outage;
        let outage_us = if outage.lasts_us == u64::MAX { 0 } else { outage.lasts_us };
        if outage.lasts_us == u64::MAX && outage.hosts == [true; 2] {
            self.after(700_000, Event::Operator);
        }
        self.quiet_us = self.now_us + lasts_us.max(outage_us) + 6 * self.plan.beat_us + 300_000;
    }

    fn relieve(&mut self) {
        tell!(self, "the fault is over");
        self.lines.iter_mut().for_each(|line| line.cut = false);
        for wire in 0..self.lines.len() {
            while let Some(input) = self.lines[wire].parked.pop_front() {
                self.arrive(wire, input);
            }
        }
        self.thaw(self.plan.fault.victim);
    }

    /// Asks the arbiter for a host.
    pub(super) fn ask(&mut self, host: usize, claim: Claim) {
        let us = 1 + self.dice.tail(self.plan.arbiter_us);
        self.after(us, Event::Claim { host, claim });
    }

    fn claim(&mut self, host: usize, claim: &Claim) {
        let us = 1 + self.dice.tail(self.plan.arbiter_us);
        if self.is_arbiter_out(host) {
            self.saw("arbiter unreachable");
            return self.after(20_000, Event::Answer { host, answer: Answer::Unreachable("no route".into()) });
        }
        let verdict = self.register.swap(claim);
        tell!(self, "the arbiter tells host {host}: {verdict:?}");
        match verdict {
            Verdict::Won { .. } => _ = self.granted.get_or_insert((host, self.now_us)),
            Verdict::Lost(_) => self.saw("arbitration lost"),
        }
        let answer = if self.dice.percent(self.plan.answer_lost_percent) {
            self.saw("arbiter answer lost");
            Answer::Unreachable("no answer".into())
        } else {
            Answer::Verdict(verdict)
        };
        self.after(us, Event::Answer { host, answer });
    }

    fn is_arbiter_out(&self, host: usize) -> bool {
        let outage = self.plan.outage;
        outage.hosts[host] && self.fault_us.is_some_and(|at_us| self.now_us - at_us < outage.lasts_us)
    }

    fn operator(&mut self) {
        let first = if self.plan.fault.victim == A { B } else { A };
        for host in [first, 1 - first] {
            if self.granted.is_none() && self.operator_decides(host) {
                self.saw("operator decided");
                self.granted = Some((host, self.now_us));
            }
        }
    }

    /// A frame that a host sends to the network.
    pub(super) fn transmit(&mut self, host: usize, frame: Bytes) {
        self.after(20, Event::Switch { port: HOST_PORT + host, frame });
    }

    fn switch(&mut self, from: usize, frame: Bytes) {
        tell!(self, "port {from}: {}", describe(&frame));
        if let Some(source) = frame.get(6..12).and_then(|mac| mac.try_into().ok()) {
            self.switch.insert(source, from);
        }
        let target = frame.get(..6).and_then(|mac| <[u8; 6]>::try_from(mac).ok()).unwrap_or([0xff; 6]);
        let ports: Vec<usize> = match self.switch.get(&target) {
            _ if target[0] & 1 == 1 => (0..self.clients.len()).chain([HOST_PORT + A, HOST_PORT + B]).collect(),
            Some(port) => vec![*port],
            None => vec![HOST_PORT + A, HOST_PORT + B],
        };
        for port in ports.into_iter().filter(|port| *port != from) {
            if port < HOST_PORT {
                self.impaired(Event::Frame { port, frame: frame.clone() }, |frame| Event::Frame { port, frame });
            } else {
                self.after(20, Event::Frame { port, frame: frame.clone() });
            }
        }
    }

    /// The clients' network loses, doubles and reorders.
    fn impaired(&mut self, event: Event, again: impl Fn(Bytes) -> Event) {
        // In the end it heals, so that a client that is never answered has waited for a host.
        let healed = self.now_us > self.quiet_us.max(self.plan.protect_us + FAULT_WAITS_US);
        let [lost, doubled, overtaken] = if healed { [0; 3] } else { self.plan.net_trouble };
        if self.dice.percent(lost) {
            return;
        }
        if self.dice.percent(doubled)
            && let Event::Frame { frame, .. } | Event::Switch { frame, .. } = &event
        {
            let us = self.plan.net_us + self.dice.below(3_000);
            self.after(us, again(frame.clone()));
        }
        let late_us = if self.dice.percent(overtaken) { self.dice.below(3_000) } else { 0 };
        self.after(self.plan.net_us + late_us, event);
    }

    fn frame(&mut self, port: usize, frame: Bytes) {
        if let Some(host) = port.checked_sub(HOST_PORT) {
            self.input(host, Input::Network(frame));
        } else {
            self.clients[port].receive(&frame);
            self.client(port);
        }
    }

    fn client(&mut self, id: usize) {
        let fault_over = self.fault_us.is_some() || self.plan.fault.kind == Kind::Nothing;
        let calm = fault_over || self.now_us > self.plan.protect_us + FAULT_WAITS_US;
        let client = &mut self.clients[id];
        client.lazy = self.fault_us.is_some_and(|at_us| (at_us + 300_000..self.quiet_us).contains(&self.now_us));
        let wind_down = calm && self.now_us > self.quiet_us && client.answered >= self.plan.requests;
        let next_us = client.step(self.now_us, wind_down, &mut self.history);
        while let Some(frame) = self.clients[id].poll_transmit() {
            let frame = Bytes::from(frame);
            self.impaired(Event::Switch { port: id, frame }, |frame| Event::Switch { port: id, frame });
        }
        match next_us {
            Ok(Some(at_us)) => {
                self.client_us[id] = at_us;
                self.at(at_us, Event::Client(id));
            }
            Ok(None) => {}
            Err(why) => self.violate(why),
        }
    }

    /// Whether a host that lives could have won, or did.
    fn somebody_must_serve(&self) -> bool {
        let out_for_ever = |host: usize| self.plan.outage.hosts[host] && self.plan.outage.lasts_us == u64::MAX;
        match self.granted {
            Some((holder, _)) => !self.hosts[holder].crashed,
            None if self.fault_us.is_none() => true,
            None => [A, B].into_iter().any(|host| {
                let replicates_on = host == A && !self.hosts[A].is_undecided();
                self.hosts[host].has_state() && (replicates_on || !out_for_ever(host))
            }),
        }
    }

    fn finish(&mut self) {
        let done = self.clients.iter().all(Client::is_done);
        if self.violation.is_none() && !done && self.somebody_must_serve() {
            self.violate("somebody could serve, and nobody does");
        }
        if let Some(what) = lock(&self.captured).differs.take() {
            self.violation.get_or_insert(what);
        }
        if self.violation.is_none() && done {
            self.check_survivor();
        }
        self.check_released();
        if !done && self.violation.is_none() {
            self.saw("nobody survived");
        }
        self.note_outcomes();
        self.report.answers = self.history.replies;
        self.report.compared = lock(&self.captured).compared;
        self.report.segments = (self.commit.explained, self.commit.owned);
    }

    /// Each disk of the survivor holds all that was promised.
    fn check_survivor(&mut self) {
        let serving: Vec<_> = [A, B].into_iter().filter(|host| self.hosts[*host].serves()).collect();
        let [survivor] = serving[..] else {
            return self.violate(format!("hosts {serving:?} serve the guest"));
        };
        let checked = self.hosts[survivor].scan().and_then(|disks| {
            // The guest writes all it writes on each of its disks.
            let check = |(index, disk)| self.history.check_disk(disk).map_err(|why| format!("disk{index}: {why}"));
            disks.iter().enumerate().try_for_each(check)
        });
        if self.plan.disks > 1 && survivor == B {
            self.saw("two disks taken over");
        }
        if let Err(why) = checked {
            self.violate(format!("host {survivor}: {why}"));
        }
    }
}
