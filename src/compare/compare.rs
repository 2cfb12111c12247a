//! COLO's comparator: a frame of guest A leaves when guest B explains it.
//!
//! ```text
//!            handle_primary(epoch)                        handle_secondary(epoch)
//!   tag < current │ = current │ > current        tag < current │ = current │ > current
//!   ──────────────┼───────────┼──────────        ──────────────┼───────────┼──────────
//!   owned already:│ held, flow│ waits for        describes a   │ judges its│ waits for
//!   leaves        │ judges it │ checkpoint       dead state:   │ flow      │ checkpoint
//!                 │           │                  dropped       │           │
//!
//!   checkpoint(e): all held of epochs ≤ e leave in arrival order; the secondary's are dropped; current = e + 1
//! ```
//!
//! **The fence** is the tag. Both guests enter an epoch in one state, so a frame of guest B speaks about frames of
//! guest A of the same epoch and no others; one that is still in flight across a checkpoint was produced by a state
//! that no longer exists. When a checkpoint that ended epoch `e` is owned, its state explains everything emitted
//! in epochs up to `e`: it may leave, equal or not. What may be compared across a checkpoint, and what not, is argued
//! in `tcp.rs`.
//!
//! Fail closed: what cannot be compared is held and asks for a checkpoint. The exception is address resolution
//! (`neighbour.rs`): guest A's passes, guest B's is dropped.
//!
//! The trap: a bound may never drop a frame of guest A. Reaching it asks for a checkpoint and [`Comparator::ready`]
//! turns false: the driver then leaves frames in the guest's own queue. Guest B's frames may be dropped at any time:
//! the worst is that something is not explained. Sources: `net/colo-compare.c`, `docs/colo-proxy.txt`.

use super::connection::{Connection, FRAME_OVERHEAD_BYTES};
use super::key::FlowKey;
use super::packet::{Packet, Reason};
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

/// Limits, with QEMU's names where QEMU has the property. There is no expired_scan_cycle: [`Comparator::poll_timeout`]
/// names the moment at which the oldest frame ages, so nothing is scanned for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// How long one guest may be alone with something it said.
    pub compare_timeout: Duration,
    /// Bytes of frames held, per guest.
    pub max_queue_bytes: usize,
    /// Bytes of frames held in one flow, per guest.
    pub max_flow_bytes: usize,
    /// Flows known at once.
    pub max_flows: usize,
    /// Length of the virtio-net header in front of every frame of both guests: 0, 10 or 12.
    pub vnet_header_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            compare_timeout: Duration::from_millis(3000),
            max_queue_bytes: 16 << 20,
            max_flow_bytes: 4 << 20,
            max_flows: 16_384,
            vnet_header_bytes: 0,
        }
    }
}

/// Why a checkpoint is needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The guests said different things.
    PayloadDiffers,
    /// The primary said something the secondary did not say in time.
    Aged,
    /// The secondary said something the primary did not say in time.
    OneSided,
    /// Addresses and ports were used for a second connection within one epoch.
    Reused,
    /// Too much is held.
    BoundReached,
    /// The primary sent something that cannot be compared.
    Unparsable(Reason),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PayloadDiffers => write!(f, "outputs differ"),
            Self::Aged => write!(f, "a packet of the primary aged"),
            Self::OneSided => write!(f, "a packet of the secondary aged"),
            Self::Reused => write!(f, "a connection was reused within the epoch"),
            Self::BoundReached => write!(f, "the packet queue is full"),
            Self::Unparsable(reason) => write!(f, "a packet cannot be compared: {reason}"),
        }
    }
}

/// What the machine wants done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Send this frame to the network.
    Release(Bytes),
    /// Checkpoint, please: only one that ends `epoch` or a later one helps. Said at most once for an epoch, so it
    /// must be remembered until such a checkpoint has been captured, also when another is under way.
    Diverged {
        /// The epoch that must end.
        epoch: u64,
        /// Why.
        cause: Cause,
    },
}

/// Counters since the start, and what is held now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Frames of the primary that left because the secondary explained them.
    pub compared: u64,
    /// Frames of the primary that left, for whatever reason.
    pub released: u64,
    /// Frames of the primary that had to wait.
    pub held: u64,
    /// Frames of the secondary that were seen.
    pub secondary: u64,
    /// Frames of the secondary dropped because their epoch had ended.
    pub dropped_stale: u64,
    /// Frames of the secondary dropped because a bound was reached.
    pub dropped_bound: u64,
    /// Frames of the secondary dropped because they say nothing that can be compared.
    pub dropped_unparsable: u64,
    /// Checkpoints asked for.
    pub diverged: u64,
    /// Frames of the primary that wait now.
    pub currently_held: u64,
    /// What they cost, overhead included.
    pub currently_held_bytes: usize,
    /// What the secondary's unmatched frames cost, overhead included.
    pub currently_secondary_bytes: usize,
    /// Flows known now.
    pub flows: usize,
}

/// A frame of the primary that waits in the current epoch.
#[derive(Debug)]
struct Held {
    since: Instant,
    flow: Option<FlowKey>,
    frame: Bytes,
}

/// A frame of an epoch that has not begun here.
#[derive(Debug)]
struct Later {
    epoch: u64,
    primary: bool,
    frame: Bytes,
}

/// The comparator of one guest NIC.
#[derive(Debug)]
pub struct Comparator {
    config: Config,
    /// The only epoch whose frames are compared: one more than the last that ended.
    epoch: u64,
    /// The highest epoch seen on a frame of the primary.
    primary_epoch: u64,
    /// By arrival.
    held: BTreeMap<u64, Held>,
    next_serial: u64,
    later: VecDeque<Later>,
    flows: BTreeMap<FlowKey, Connection>,
    /// Flows in which the secondary is alone with something, oldest first.
    waiting: BTreeSet<(Instant, FlowKey)>,
    outputs: VecDeque<Output>,
    asked: Option<u64>,
    stats: Stats,
}

fn cost_bytes(frame: &Bytes) -> usize {
    frame.len() + FRAME_OVERHEAD_BYTES
}

impl Comparator {
    /// An empty comparator in epoch 0.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            epoch: 0,
            primary_epoch: 0,
            held: BTreeMap::new(),
            next_serial: 0,
            later: VecDeque::new(),
            flows: BTreeMap::new(),
            waiting: BTreeSet::new(),
            outputs: VecDeque::new(),
            asked: None,
            stats: Stats::default(),
        }
    }

    /// Takes a frame that the primary emitted in `epoch`. Never drops it.
    pub fn handle_primary(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        self.primary_epoch = self.primary_epoch.max(epoch);
        let held = self.stats.currently_held;
        if epoch <= self.epoch {
            self.judge_primary(now, epoch, frame);
        } else {
            self.account_held(&frame);
            self.later.push_back(Later { epoch, primary: true, frame });
        }
        self.stats.held += u64::from(self.stats.currently_held > held);
        if !self.ready() {
            self.ask(epoch, Cause::BoundReached);
        }
    }

    /// Takes a frame that the secondary emitted in `epoch`.
    pub fn handle_secondary(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        self.stats.secondary += 1;
        let epoch = if mutant::active(Mutant::NoFence) { epoch.max(self.primary_epoch).max(self.epoch) } else { epoch };
        if epoch < self.epoch {
            self.stats.dropped_stale += 1;
        } else if self.stats.currently_secondary_bytes + cost_bytes(&frame) > self.config.max_queue_bytes {
            self.stats.dropped_bound += 1;
            // Not for the tag's epoch: that number is the peer's, and asking is once an epoch.
            self.ask(self.primary_epoch.max(self.epoch), Cause::BoundReached);
        } else if epoch == self.epoch {
            self.judge_secondary(now, &frame);
        } else {
            self.stats.currently_secondary_bytes += cost_bytes(&frame);
            self.later.push_back(Later { epoch, primary: false, frame });
        }
    }

    /// The secondary owns the checkpoint that ended `epoch`.
    pub fn checkpoint(&mut self, now: Instant, epoch: u64) {
        while self.epoch <= epoch {
            self.release_held();
            self.waiting.clear();
            self.stats.currently_secondary_bytes = 0;
            self.forget_flows();
            let next = self.later.iter().map(|later| later.epoch).min().unwrap_or(u64::MAX);
            self.epoch = next.min(epoch.saturating_add(1)).max(self.epoch.saturating_add(1));
            self.promote(now);
            if self.epoch == u64::MAX {
                break;
            }
        }
    }

    /// Asks for a checkpoint if something has waited too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        let timeout = self.config.compare_timeout;
        if self.held.first_key_value().is_some_and(|(_, held)| held.since + timeout <= now) {
            self.ask(self.epoch, Cause::Aged);
        } else if self.waiting.first().is_some_and(|(since, _)| *since + timeout <= now) {
            self.ask(self.epoch, Cause::OneSided);
        }
    }

    /// When to call [`Comparator::handle_timeout`]: not at all while an answer is awaited.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.asked >= Some(self.epoch) {
            return None;
        }
        let held = self.held.first_key_value().map(|(_, held)| held.since);
        let waiting = self.waiting.first().map(|(since, _)| *since);
        held.into_iter().chain(waiting).min().map(|since| since + self.config.compare_timeout)
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether the primary's next frame may be read. While it may not, leave it in the guest's own queue.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.stats.currently_held_bytes < self.config.max_queue_bytes
    }

    /// Lets everything go, in arrival order: the primary runs alone and owes nobody an explanation.
    pub fn release_all(&mut self) {
        self.release_held();
        for later in std::mem::take(&mut self.later) {
            if later.primary {
                self.release(later.frame);
            }
        }
        (self.stats.currently_held, self.stats.currently_held_bytes) = (0, 0);
        self.stats.currently_secondary_bytes = 0;
        self.flows.clear();
        self.waiting.clear();
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats { flows: self.flows.len(), ..self.stats }
    }

    fn ask(&mut self, epoch: u64, cause: Cause) {
        if self.asked < Some(epoch) {
            self.asked = Some(epoch);
            self.stats.diverged += 1;
            self.outputs.push_back(Output::Diverged { epoch, cause });
        }
    }

    fn release(&mut self, frame: Bytes) {
        self.stats.released += 1;
        self.outputs.push_back(Output::Release(frame));
    }

    fn account_held(&mut self, frame: &Bytes) {
        self.stats.currently_held += 1;
        self.stats.currently_held_bytes += cost_bytes(frame);
    }

    fn unaccount_held(&mut self, frame: &Bytes) {
        self.stats.currently_held -= 1;
        self.stats.currently_held_bytes -= cost_bytes(frame);
    }

    /// A frame of the current epoch, or of one that has ended: the latter is in the state the secondary owns.
    fn judge_primary(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        let parsed = match Packet::parse_behind(&frame, self.config.vnet_header_bytes) {
            Packet::Neighbour(_) => return self.release(frame),
            _ if epoch < self.epoch => return self.release(frame),
            Packet::Unparsable(reason) => Err(Cause::Unparsable(reason)),
            Packet::Fragment(_) => Err(Cause::Unparsable(Reason::Fragment)),
            Packet::Ip(ip) => Ok((FlowKey::of(&ip), ip.transport)),
        };
        let parsed = match parsed {
            Ok((key, _)) if !self.flows.contains_key(&key) && self.flows.len() >= self.config.max_flows => {
                Err(Cause::BoundReached)
            }
            other => other,
        };
        let serial = self.next_serial;
        self.next_serial += 1;
        self.account_held(&frame);
        let flow = parsed.as_ref().ok().map(|(key, _)| *key);
        self.held.insert(serial, Held { since: now, flow, frame: frame.clone() });
        match parsed {
            Err(cause) => self.ask(self.epoch, cause),
            Ok((key, transport)) => {
                let connection = self.flows.entry(key).or_insert_with(|| Connection::new(&transport));
                connection.held_bytes += cost_bytes(&frame);
                let full = connection.held_bytes > self.config.max_flow_bytes;
                let before = connection.secondary_bytes();
                let mut explained = Vec::new();
                let verdict = connection.primary(serial, &transport, &frame, &mut explained);
                self.settle(key, before, &explained, verdict);
                if full {
                    self.ask(self.epoch, Cause::BoundReached);
                }
            }
        }
    }

    fn judge_secondary(&mut self, now: Instant, frame: &Bytes) {
        let ip = match Packet::parse_behind(frame, self.config.vnet_header_bytes) {
            Packet::Ip(ip) => ip,
            Packet::Neighbour(_) => return,
            Packet::Fragment(_) | Packet::Unparsable(_) => return self.stats.dropped_unparsable += 1,
        };
        let key = FlowKey::of(&ip);
        let known = self.flows.get(&key).map_or(0, Connection::secondary_bytes);
        let full = !self.flows.contains_key(&key) && self.flows.len() >= self.config.max_flows;
        if full || known + cost_bytes(frame) > self.config.max_flow_bytes {
            self.stats.dropped_bound += 1;
            return self.ask(self.epoch, Cause::BoundReached);
        }
        let connection = self.flows.entry(key).or_insert_with(|| Connection::new(&ip.transport));
        let mut explained = Vec::new();
        let verdict = connection.secondary(now, &ip.transport, frame, &mut explained);
        self.settle(key, known, &explained, verdict);
    }

    /// Carries out what a flow decided, and brings the sums and the index up to date.
    fn settle(&mut self, key: FlowKey, secondary_bytes: usize, explained: &[u64], verdict: Result<(), Cause>) {
        for serial in explained {
            if let Some(held) = self.held.remove(serial) {
                self.unaccount_held(&held.frame);
                if let Some(flow) = held.flow.and_then(|key| self.flows.get_mut(&key)) {
                    flow.held_bytes -= cost_bytes(&held.frame);
                }
                self.stats.compared += 1;
                self.release(held.frame);
            }
        }
        if let Some(flow) = self.flows.get_mut(&key) {
            let since = flow.secondary_since();
            if flow.indexed_since != since {
                flow.indexed_since.map(|since| self.waiting.remove(&(since, key)));
                self.waiting.extend(since.map(|since| (since, key)));
                flow.indexed_since = since;
            }
            let sum = &mut self.stats.currently_secondary_bytes;
            *sum = *sum + flow.secondary_bytes() - secondary_bytes;
            if flow.idle() {
                self.flows.remove(&key);
            }
        }
        if let Err(cause) = verdict {
            self.ask(self.epoch, cause);
        }
    }

    fn release_held(&mut self) {
        for held in std::mem::take(&mut self.held).into_values() {
            self.unaccount_held(&held.frame);
            self.release(held.frame);
        }
    }

    /// Keeps what the network has been shown, of so many flows that new ones find room. To forget is safe: what is
    /// forgotten must be explained again.
    fn forget_flows(&mut self) {
        let room = self.config.max_flows / 2;
        if self.flows.len() > room {
            self.flows.retain(|_, flow| flow.active());
        }
        self.flows.retain(|_, flow| flow.checkpoint());
        if self.flows.len() > room {
            self.flows.clear();
        }
    }

    /// Judges what waited for the epoch that has just begun. Its age counts from here: guest B could not speak before.
    fn promote(&mut self, now: Instant) {
        let later = std::mem::take(&mut self.later);
        self.stats.currently_secondary_bytes = later.iter().filter(|l| !l.primary).map(|l| cost_bytes(&l.frame)).sum();
        for frame in later {
            if frame.epoch > self.epoch {
                self.later.push_back(frame);
            } else if frame.primary {
                self.unaccount_held(&frame.frame);
                self.judge_primary(now, frame.epoch, frame.frame);
            } else {
                self.stats.currently_secondary_bytes -= cost_bytes(&frame.frame);
                self.judge_secondary(now, &frame.frame);
            }
        }
    }
}
