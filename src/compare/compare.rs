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
//! Fail closed: what cannot be compared is held and asks for a checkpoint. Address resolution has a policy of its own
//! (`neighbour.rs`); fragments are put together first (`fragments.rs`). A difference in one flow does not stop the
//! others: why is in `connection.rs`.
//!
//! The trap: a bound may never drop a frame of guest A. Reaching it asks for a checkpoint and [`Comparator::ready`]
//! turns false: the driver then leaves frames in the guest's own queue. Guest B's frames may be dropped at any time:
//! the worst is that something is not explained. Sources: `net/colo-compare.c`, `docs/colo-proxy.txt`.

mod pair;

use super::connection::{FRAME_OVERHEAD_BYTES, Said};
use super::fragments::Reassembler;
use super::key::FlowKey;
use super::line::Line;
use super::min_ack::{self, Told, acknowledgement};
use super::packet::{Ip, Packet, Reason, Transport};
use super::record::FlowReport;
use super::table::Table;
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use bytes::Bytes;
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// Limits, with QEMU's names where QEMU has the property. There is no expired_scan_cycle: [`Comparator::poll_timeout`]
/// names the moment at which the oldest frame ages, so nothing is scanned for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// How long one guest may be alone with something it said.
    pub compare_timeout: Duration,
    /// Bytes of frames held, per guest.
    pub max_queue_bytes: usize,
    /// Bytes of frames held in one flow, per guest; and of fragments that are not whole yet, per guest.
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

/// Why a checkpoint is asked for, and which flow asks, in a sentence.
#[must_use]
pub fn asked_by(cause: Cause, flow: Option<FlowKey>) -> String {
    flow.map_or_else(|| cause.to_string(), |flow| format!("{flow}: {cause}"))
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
        /// In which flow, where it is one.
        flow: Option<FlowKey>,
    },
}

/// Counters since the start, and what is held now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Frames of the primary that left because the secondary explained them.
    pub compared: u64,
    /// Frames of the primary that left, for whatever reason.
    pub released: u64,
    /// Empty segments made here, of what both guests had acknowledged.
    pub acknowledged: u64,
    /// Frames of the primary that had to wait.
    pub held: u64,
    /// Frames of the secondary that were seen.
    pub secondary: u64,
    /// Frames of the secondary dropped because their epoch had ended.
    pub dropped_stale: u64,
    /// Frames of the secondary dropped because a bound was reached.
    pub dropped_bound: u64,
    /// Frames of the secondary dropped because their epoch is not compared.
    pub dropped_unasked: u64,
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
    number: u64,
    since: Instant,
    /// The place of its flow, if it has one. A flow in which a frame waits keeps its place.
    flow: Option<u32>,
    /// The other frames of a datagram this one completed: they leave with it.
    siblings: Vec<u32>,
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
    /// Epochs in which nothing is compared: what the primary says waits for checkpoints alone.
    buffered: Range<u64>,
    /// The highest epoch seen on a frame of the primary.
    primary_epoch: u64,
    /// By arrival.
    held: Line<Held>,
    next_number: u64,
    later: VecDeque<Later>,
    flows: Table,
    /// Of the primary, of the secondary.
    fragments: [Reassembler; 2],
    /// Frames that a flow has just explained: empty between calls.
    explained: Vec<u32>,
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
            buffered: 0..0,
            primary_epoch: 0,
            held: Line::new(),
            next_number: 0,
            later: VecDeque::new(),
            flows: Table::new(config.max_flows),
            fragments: [(); 2].map(|()| Reassembler::new(config.max_flow_bytes)),
            explained: Vec::new(),
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
            self.ask(epoch, Cause::BoundReached, None);
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
            self.ask(self.primary_epoch.max(self.epoch), Cause::BoundReached, None);
        } else if self.buffered.contains(&epoch) {
            self.stats.dropped_unasked += 1;
        } else if epoch == self.epoch {
            self.judge_secondary(now, &frame);
        } else {
            self.stats.currently_secondary_bytes += cost_bytes(&frame);
            self.later.push_back(Later { epoch, primary: false, frame });
        }
    }

    /// Whether the frames of `epoch` and of all that follow are compared, or only wait for checkpoints, as in Remus. An
    /// epoch of which a frame has come must stay what it was.
    pub fn set_comparing(&mut self, epoch: u64, comparing: bool) {
        let buffers = self.buffered.end == u64::MAX;
        match comparing {
            true if buffers => self.buffered.end = epoch,
            // The range before is over: a checkpoint is captured when the one before it is owned.
            false if !buffers => self.buffered = epoch..u64::MAX,
            _ => {}
        }
    }

    /// The secondary owns the checkpoint that ended `epoch`.
    pub fn checkpoint(&mut self, now: Instant, epoch: u64) {
        while self.epoch <= epoch {
            self.release_held();
            self.stats.currently_secondary_bytes = 0;
            self.flows.checkpoint();
            let next = self.later.iter().map(|later| later.epoch).min().unwrap_or(u64::MAX);
            self.epoch = next.min(epoch.saturating_add(1)).max(self.epoch.saturating_add(1));
            self.promote(now);
            if self.epoch == u64::MAX {
                break;
            }
        }
    }

    /// What waits for the checkpoint that ends `epoch`, the latest first.
    pub(super) fn waiting(&self, epoch: u64) -> impl Iterator<Item = &Bytes> {
        let newest = self.held.newest().filter(|_| epoch == self.epoch);
        let held = std::iter::successors(newest, |place| self.held.older(*place));
        held.filter_map(|place| self.held.get(place)).map(|held| &held.frame)
    }

    /// Asks for a checkpoint if something has waited too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.buffers() {
            return;
        }
        let timeout = self.config.compare_timeout;
        let before = self.fragments[1].held_bytes();
        self.fragments[1].forget_old(now, timeout);
        self.stats.currently_secondary_bytes -= before - self.fragments[1].held_bytes();
        let oldest = self.held.oldest().and_then(|place| self.held.get(place));
        if let Some(held) = oldest.filter(|held| held.since + timeout <= now) {
            self.diverge(held.flow, Cause::Aged);
        } else if let Some(flow) = self.flows.overdue(now, timeout) {
            self.diverge(Some(flow), Cause::OneSided);
        }
    }

    /// When to call [`Comparator::handle_timeout`]: not at all while an answer is awaited.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.asked >= Some(self.epoch) || self.buffers() {
            return None;
        }
        let held = self.held.oldest().and_then(|place| self.held.get(place)).map(|held| held.since);
        let others = [self.flows.waiting_since(), self.fragments[1].since()];
        let first = held.into_iter().chain(others.into_iter().flatten()).min();
        first.map(|since| since + self.config.compare_timeout)
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
            if later.primary && !mutant::active(Mutant::LoseLater) {
                self.release(later.frame);
            }
        }
        (self.stats.currently_held, self.stats.currently_held_bytes) = (0, 0);
        self.stats.currently_secondary_bytes = 0;
        self.flows = Table::new(self.config.max_flows);
    }

    /// At most `max` flows that diverged: first those that keep diverging, then the latest.
    #[must_use]
    pub fn flows(&self, max: usize) -> Vec<FlowReport> {
        self.flows.reports(self.epoch, max)
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats { flows: self.flows.len(), ..self.stats }
    }

    fn buffers(&self) -> bool {
        self.buffered.contains(&self.epoch)
    }

    fn ask(&mut self, epoch: u64, cause: Cause, flow: Option<FlowKey>) {
        if self.asked < Some(epoch) {
            self.asked = Some(epoch);
            self.stats.diverged += 1;
            self.outputs.push_back(Output::Diverged { epoch, cause, flow });
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

    /// The current epoch cannot go on: because of a flow, if it can be told.
    fn diverge(&mut self, flow: Option<u32>, cause: Cause) {
        if self.buffers() {
            return;
        }
        let flow = flow.and_then(|flow| self.flows.get_mut(flow));
        let key = flow.map(|flow| {
            flow.record.diverge(self.epoch, cause);
            flow.key
        });
        self.ask(self.epoch, cause, key);
    }

    /// A frame of the current epoch, or of one that has ended: the latter is in the state the secondary owns.
    fn judge_primary(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        if epoch < self.epoch {
            return self.release(frame);
        }
        let number = self.next_number;
        self.next_number += 1;
        self.account_held(&frame);
        let held = |frame| Held { number, since: now, flow: None, siblings: Vec::new(), frame };
        match Packet::parse_behind(&frame, self.config.vnet_header_bytes) {
            Packet::Unparsable(reason) => {
                self.held.push(held(frame));
                self.diverge(None, Cause::Unparsable(reason));
            }
            Packet::Neighbour(identity) => {
                let place = self.held.push(held(frame));
                self.primary_said(place, identity.into(), &Said::Identity, None);
            }
            Packet::Ip(ip) => {
                let (key, said) = said(ip, &frame);
                let place = self.held.push(held(frame));
                self.primary_said(place, key, &said, None);
            }
            Packet::Fragment(fragment) => {
                let place = self.held.push(held(frame.clone()));
                match self.fragments[0].handle(now, &fragment, &frame, place) {
                    Ok(None) => {}
                    Ok(Some(whole)) => {
                        if let Some(held) = self.held.get_mut(place) {
                            held.siblings = whole.places.into_iter().filter(|other| *other != place).collect();
                        }
                        let (key, said) = said(whole.ip, &whole.bytes);
                        self.primary_said(place, key, &said, Some(&whole.bytes));
                    }
                    Err(cause) => self.diverge(None, cause),
                }
            }
        }
    }

    /// Judges what the primary said in the frame at `place`, or in the datagram it made `whole`.
    fn primary_said(&mut self, place: u32, key: FlowKey, said: &Said, whole: Option<&Bytes>) {
        let Some(at) = self.flows.find(key, said) else { return self.diverge(None, Cause::BoundReached) };
        let buffers = self.buffers();
        let Some(flow) = self.flows.get_mut(at) else { return };
        if buffers {
            flow.stick();
        }
        let siblings = match whole {
            Some(_) => self.held.get(place).map_or(Vec::new(), |held| held.siblings.clone()),
            None => Vec::new(),
        };
        for place in siblings.into_iter().chain([place]) {
            if let Some(held) = self.held.get_mut(place) {
                held.flow = Some(at);
                flow.held += 1;
                flow.held_bytes += cost_bytes(&held.frame);
            }
        }
        let Some(bytes) = whole.or_else(|| self.held.get(place).map(|held| &held.frame)) else { return };
        let full = flow.held_bytes > self.config.max_flow_bytes;
        let before = flow.secondary_bytes();
        let verdict = flow.primary(place, said, bytes, &mut self.explained);
        let still_full = full && self.explained.is_empty();
        self.settle(at, before, verdict.and(if still_full { Err(Cause::BoundReached) } else { Ok(()) }));
    }

    fn judge_secondary(&mut self, now: Instant, frame: &Bytes) {
        let whole;
        let ((key, said), bytes) = match Packet::parse_behind(frame, self.config.vnet_header_bytes) {
            Packet::Unparsable(_) => return self.stats.dropped_unparsable += 1,
            Packet::Neighbour(identity) => ((identity.into(), Said::Identity), frame),
            Packet::Ip(ip) => (said(ip, frame), frame),
            Packet::Fragment(fragment) => {
                let before = self.fragments[1].held_bytes();
                let handled = self.fragments[1].handle(now, &fragment, frame, 0);
                let sum = &mut self.stats.currently_secondary_bytes;
                *sum = *sum + self.fragments[1].held_bytes() - before;
                match handled {
                    Ok(None) => return,
                    Ok(Some(it)) => {
                        whole = it.bytes;
                        (said(it.ip, &whole), &whole)
                    }
                    Err(Cause::BoundReached) => return self.drop_at_bound(None),
                    Err(_) => return self.stats.dropped_unparsable += 1,
                }
            }
        };
        let Some(at) = self.flows.find(key, &said) else { return self.drop_at_bound(None) };
        let Some(flow) = self.flows.get_mut(at) else { return };
        let before = flow.secondary_bytes();
        if before + cost_bytes(frame) > self.config.max_flow_bytes {
            return self.drop_at_bound(Some(at));
        }
        let verdict = flow.secondary(now, &said, bytes, &mut self.explained);
        let told_too_little = flow.told_too_little(&said);
        self.settle(at, before, verdict);
        if let (Some((place, ours, both)), Said::Segment(tcp)) = (told_too_little, &said) {
            let told = Told::of(tcp, bytes, ours, both);
            told.into_iter().for_each(|told| self.acknowledge(now, at, place, both, &told));
        }
    }

    /// Tells a client how far both guests have acknowledged, when a frame that says more has waited for long.
    fn acknowledge(&mut self, now: Instant, flow: u32, place: u32, ack: u32, told: &Told) {
        let waited = self.held.get(place).filter(|held| held.since + min_ack::PATIENCE <= now);
        let made = waited.and_then(|held| acknowledgement(&held.frame, self.config.vnet_header_bytes, told));
        if let Some((made, flow)) = made.zip(self.flows.get_mut(flow)) {
            flow.tell(ack);
            self.stats.acknowledged += 1;
            self.outputs.push_back(Output::Release(made.into()));
        }
    }

    fn drop_at_bound(&mut self, flow: Option<u32>) {
        self.stats.dropped_bound += 1;
        self.diverge(flow, Cause::BoundReached);
    }

    /// Carries out what a flow decided, and brings the sums up to date.
    fn settle(&mut self, at: u32, secondary_bytes: usize, verdict: Result<(), Cause>) {
        let mut explained = std::mem::take(&mut self.explained);
        for place in explained.drain(..) {
            let Some(mut held) = self.held.remove(place) else { continue };
            let siblings = std::mem::take(&mut held.siblings);
            if siblings.is_empty() {
                self.release_explained(held);
            } else {
                let mut all: Vec<_> = siblings.into_iter().filter_map(|place| self.held.remove(place)).collect();
                all.push(held);
                all.sort_by_key(|held| held.number);
                all.into_iter().for_each(|held| self.release_explained(held));
            }
        }
        self.explained = explained;
        if let Some(flow) = self.flows.get_mut(at) {
            let sum = &mut self.stats.currently_secondary_bytes;
            *sum = *sum + flow.secondary_bytes() - secondary_bytes;
        }
        if let Err(cause) = verdict {
            self.diverge(Some(at), cause);
        }
        self.flows.settle(at);
    }

    fn release_explained(&mut self, held: Held) {
        self.unaccount_held(&held.frame);
        if let Some(flow) = held.flow.and_then(|at| self.flows.get_mut(at)) {
            flow.held -= 1;
            flow.held_bytes -= cost_bytes(&held.frame);
            flow.record.compare(&held.frame);
        }
        self.stats.compared += 1;
        if mutant::active(Mutant::LeaveTwice) {
            self.release(held.frame.clone());
        }
        self.release(held.frame);
    }

    fn release_held(&mut self) {
        while let Some(held) = self.held.oldest().and_then(|place| self.held.remove(place)) {
            self.unaccount_held(&held.frame);
            self.release(held.frame);
        }
        self.fragments.iter_mut().for_each(Reassembler::clear);
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

/// What an IP packet says, and in which flow. `bytes` are what its ranges are offsets in.
fn said(ip: Ip, bytes: &[u8]) -> (FlowKey, Said) {
    let key = FlowKey::of(&ip);
    match ip.transport {
        Transport::Tcp(tcp) => (key, Said::Segment(tcp)),
        Transport::Udp { payload, .. }
        | Transport::Icmp { message: payload, .. }
        | Transport::Other { payload, .. } => (key.within(&bytes[payload.clone()]), Said::Datagram(payload)),
    }
}
