//! The secondary's rewriter: guest B picks its own initial sequence numbers and has a clock of its own; clients only know
//! guest A's.
//!
//! ```text
//!   a client opens                                    guest B opens
//!   client ──SYN──▶ ·  ────────────────────▶ B        · ◀──SYN, as it is───────────── B    ISN of B known
//!                   · ◀──SYN-ACK, as it is── B        client ──SYN-ACK──▶ offset ───▶ B
//!   client ──ACK──▶ · offset ──────────────▶ B
//!
//!   offset = ISN of B − (first ack − 1);  clock offset = clock of B's SYN or SYN-ACK − first echo
//!   client ──▶ ack, SACK and D-SACK edges += offset, echo += clock offset ──▶ B
//!   client ◀── seq −= offset, clock −= clock offset ◀─────────────────────── B
//!   checkpoint: forget everything: guest B now *is* guest A, sequence space and clock included
//! ```
//!
//! The client's first frame that answers guest A names guest A's ISN and clock. It can arrive before guest B has sent its own
//! SYN-ACK (guest B is slower): such a flow's frames are held, in order and bounded, until it does. QEMU computes garbage
//! then. It cannot arrive before guest B's SYN, without which guest A's would not have left.
//!
//! Guest B draws numbers for its questions to a DHCP server too: `lease.rs`.
//!
//! **After a takeover** clients talk to guest B alone: what still differs is translated for as long as it lives, what begins
//! later is not tracked, and [`Rewriter::is_done`] says when nothing is left. When the survivor is protected in its turn, that
//! lies between the network and all that its pair compares and replays; and its secondary is told of it with every
//! checkpoint ([`Rewriter::carried`]), for a takeover of its own ([`Rewriter::take_up`]).
//!
//! **Forgetting.** Ended connections and those in which nothing differs are forgotten after a minute without a frame, and
//! earlier, the longest silent first, when room is needed. One that is being translated is kept until it ends, or is
//! silent for [`Config::idle_timeout`]: nothing else can continue it, and anyone may fill a table. A SYN for which there
//! is no room does not reach guest B: guest A's answer then waits for a checkpoint, which empties the table.
//! After a takeover the table only shrinks.
//!
//! The trap: the reset must happen exactly where guest B's state changes, between the last frame of the old epoch
//! and the first of the new. Not translated, so that such connections differ and live by checkpoints: signed ones (MD5,
//! TCP-AO), multipath sequence numbers, and calls of the guest whose SYN carries data that is acknowledged at once. Source:
//! `net/filter-rewriter.c` for the behaviour; RFCs are named where they are used.

mod flow;
#[cfg(test)]
mod frames;
mod lease;
#[cfg(test)]
mod properties;
mod segment;
#[cfg(test)]
mod tests;

use super::connection::FRAME_OVERHEAD_BYTES;
use super::key::FlowKey;
use super::packet::Tcp;
use crate::carried::{CARRIED_MAX, Carried};
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use bytes::Bytes;
use core::net::SocketAddr;
use flow::{Beginning, Flow, Handshake};
use lease::Leases;
use segment::Segment;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Client frames held for handshakes guest B has not answered, all flows together.
const MAX_HELD_BYTES: usize = 4 << 20;
const PROTOCOL_TCP: u16 = 6;
/// How often the table is searched for flows to forget.
const SWEEP_CYCLE: Duration = Duration::from_secs(1);
/// A handshake-completing frame starts within this distance of the client's ISN.
const HANDSHAKE_WINDOW: u32 = 1 << 20;
/// When there is no room, this share of what may be forgotten is.
const EVICTED_SHARE: usize = 16;

/// Limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Length of the virtio-net header in front of every frame: 0, 10 or 12.
    pub vnet_header_bytes: usize,
    /// Flows tracked at once.
    pub max_flows: usize,
    /// How long a connection that is being translated may be silent.
    pub idle_timeout: Duration,
}

impl Default for Config {
    /// Five days, as Linux's connection tracking has it: RFC 5382 asks of a translator for two hours at least.
    fn default() -> Self {
        Self { vnet_header_bytes: 0, max_flows: 16_384, idle_timeout: Duration::from_secs(5 * 24 * 3600) }
    }
}

/// Where a client's frame goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Forward {
    /// On to guest B, rewritten in place.
    Now,
    /// Taken: it comes back from [`Rewriter::poll_output`] when guest B is ready for it, or never when there is no room.
    Held,
}

/// The rewriter of one guest NIC.
#[derive(Debug, Default)]
pub struct Rewriter {
    config: Config,
    /// Keyed in the guest's direction.
    flows: BTreeMap<FlowKey, Flow>,
    leases: Leases,
    outputs: VecDeque<Vec<u8>>,
    held_bytes: usize,
    alone: bool,
    next_sweep: Instant,
    /// Until when it is not worth looking for room.
    full_until: Option<Instant>,
    untracked: u64,
}

fn cost_bytes(frame: &[u8]) -> usize {
    frame.len() + FRAME_OVERHEAD_BYTES
}

fn costs_bytes<'a>(frames: impl IntoIterator<Item = &'a Vec<u8>>) -> usize {
    frames.into_iter().map(|frame| cost_bytes(frame)).sum()
}

impl Rewriter {
    /// A rewriter that knows no flow.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, with limits of its own.
    #[must_use]
    pub fn with(config: Config) -> Self {
        Self { config, ..Self::default() }
    }

    /// The rewriter of a guest that runs alone and has nothing to translate.
    #[must_use]
    pub fn of_survivor() -> Self {
        Self { alone: true, ..Self::default() }
    }

    /// A client's frame on its way to guest B. When it is held, `frame` is left empty.
    pub fn from_network(&mut self, now: Instant, frame: &mut Vec<u8>) -> Forward {
        if self.is_done() {
            return Forward::Now;
        }
        let Some(mut segment) = Segment::read(frame, self.config.vnet_header_bytes) else {
            if !self.alone {
                self.leases.answer(frame, self.config.vnet_header_bytes);
            }
            return Forward::Now;
        };
        let key = segment.key.reversed();
        let opens = segment.has(Tcp::SYN) && !segment.has(Tcp::ACK);
        if !self.flows.contains_key(&key) && !segment.has(Tcp::RST) {
            // Without a SYN its handshake came before the state guest B loaded: a SYN-ACK that guest B repeats begins
            // nothing.
            let handshake = opens.then(|| Handshake::accepting(&segment));
            let known = self.begin(now, key, segment.tcp.seq, handshake);
            if opens && !known && !self.alone {
                frame.clear();
                return Forward::Held;
            }
        }
        let Some(flow) = self.flows.get_mut(&key) else { return Forward::Now };
        flow.last = now;
        if opens {
            self.held_bytes -= costs_bytes(&flow.called(&segment));
            return Forward::Now;
        }
        if flow.completes(&segment, HANDSHAKE_WINDOW) {
            let Some(own) = flow.beginning() else {
                // Above the bound it is dropped: guest B will not acknowledge it, so guest A's ACK is held, and the
                // checkpoint that asks for makes it good.
                if self.held_bytes + cost_bytes(frame) <= MAX_HELD_BYTES {
                    self.held_bytes += cost_bytes(frame);
                    flow.held.push_back(std::mem::take(frame));
                }
                frame.clear();
                return Forward::Held;
            };
            flow.establish(own, &segment);
        }
        flow.inbound(&mut segment, frame);
        Forward::Now
    }

    /// A frame of guest B on its way out.
    pub fn from_guest(&mut self, now: Instant, frame: &mut [u8]) {
        if self.is_done() {
            return;
        }
        let Some(mut segment) = Segment::read(frame, self.config.vnet_header_bytes) else {
            return self.leases.ask(frame, self.config.vnet_header_bytes);
        };
        let key = segment.key;
        if segment.has(Tcp::SYN) {
            self.guest_begins(now, &segment);
        }
        let Some(flow) = self.flows.get_mut(&key) else { return };
        flow.last = now;
        if segment.has(Tcp::SYN) && segment.has(Tcp::ACK) {
            self.held_bytes -= costs_bytes(&flow.answered(&segment));
            let first = flow.held.front().and_then(|first| Segment::read(first, self.config.vnet_header_bytes));
            if let Some((own, first)) = flow.beginning().zip(first) {
                flow.establish(own, &first);
                self.free_held(&key);
            }
        } else if flow.refused(&segment) {
            self.free_held(&key);
        }
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.outbound(&mut segment, frame);
        }
    }

    /// [`Self::from_network`] of a frame that others have a hold of; `None` when it is held.
    pub fn inward(&mut self, now: Instant, frame: Bytes) -> Option<Bytes> {
        if self.is_done() {
            return Some(frame);
        }
        let mut frame = frame.to_vec();
        (self.from_network(now, &mut frame) == Forward::Now).then(|| frame.into())
    }

    /// [`Self::from_guest`] of a frame that others have a hold of.
    #[must_use]
    pub fn outward(&mut self, now: Instant, frame: Bytes) -> Bytes {
        if self.is_done() {
            return frame;
        }
        let mut frame = frame.to_vec();
        self.from_guest(now, &mut frame);
        frame.into()
    }

    /// The next held client frame guest B is ready for, rewritten. Drain it after every [`Rewriter::from_guest`], before
    /// the next client frame: that one is younger.
    pub fn poll_output(&mut self) -> Option<Vec<u8>> {
        self.outputs.pop_front()
    }

    /// Guest B has loaded guest A's state. What was held is dropped: guest A received it in the epoch that ended.
    pub fn checkpoint(&mut self) {
        self.flows.clear();
        self.leases.clear();
        self.outputs.clear();
        (self.held_bytes, self.full_until) = (0, None);
    }

    /// Guest B has taken over: flows that begin from here need no translation.
    pub fn takeover(&mut self) {
        self.alone = true;
        self.retain(|flow| flow.serves_alone());
    }

    /// What whoever has the guest next has to know of its connections: see [`Self::take_up`]. At most [`CARRIED_MAX`].
    #[must_use]
    pub fn carried(&self) -> Vec<Carried> {
        let mut lives: Vec<_> = self.flows.iter().filter(|(_, flow)| flow.translates() && !flow.ended()).collect();
        lives.sort_by_key(|(_, flow)| std::cmp::Reverse(flow.last));
        lives.truncate(CARRIED_MAX);
        lives.into_iter().map(|(key, flow)| carried(key, flow)).collect()
    }

    /// Those connections that this rewriter did not see begin: what it did is another one with the same addresses.
    #[must_use]
    pub fn unknown(&self, carried: &[Carried]) -> Vec<Carried> {
        let unknown = |carried: &&Carried| self.flows.get(&key(carried)).is_none_or(|flow| !flow.has_begun());
        carried.iter().filter(unknown).copied().collect()
    }

    /// After a [`Self::takeover`]: what the primary had to translate for its clients from now on is guest B's.
    pub fn take_up(&mut self, now: Instant, carried: &[Carried]) {
        for carried in carried {
            let key = key(carried);
            self.forget(&key);
            self.flows.insert(key, Flow::carried(now, carried.offset, carried.clock_offset, carried.echoed));
        }
    }

    /// Whether no frame will ever need it again: guest B runs alone, and nothing that it says to anyone differs from what
    /// guest A would have said.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.alone && self.flows.is_empty() && self.outputs.is_empty()
    }

    /// How many flows are being translated.
    #[must_use]
    pub fn needed(&self) -> usize {
        self.flows.values().filter(|flow| flow.translates()).count()
    }

    /// How many new flows found no room, since the start.
    #[must_use]
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// Forgets flows that ended, or in which nothing differs, or that have been silent for too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        if now < self.next_sweep {
            return;
        }
        self.next_sweep = now + SWEEP_CYCLE;
        let (alone, idle) = (self.alone, self.config.idle_timeout);
        self.retain(|flow| (!alone || flow.serves_alone()) && now - flow.last < flow.linger(idle));
    }

    /// When to call [`Rewriter::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        (!self.flows.is_empty()).then_some(self.next_sweep)
    }

    /// A SYN or a SYN-ACK of the guest.
    fn guest_begins(&mut self, now: Instant, segment: &Segment) {
        if segment.has(Tcp::ACK) {
            // The SYN may have been in the captured state: guest B found it on its own ring, nobody passed it here.
            let client_isn = segment.tcp.ack.wrapping_sub(1);
            let handshake = Handshake::Accepting { client_isn, syn_bytes: 0, answer: None };
            self.begin(now, segment.key, client_isn, Some(handshake));
        } else if !self.flows.get(&segment.key).is_some_and(|flow| flow.begun_by(segment)) {
            // What was known belongs to an older life.
            self.forget(&segment.key);
            self.begin(now, segment.key, 0, Some(Handshake::Calling(Beginning::of(segment))));
        }
    }

    /// Remembers a flow that is not known yet, by its handshake or as one that guest B has loaded. `false`: it is not.
    fn begin(&mut self, now: Instant, key: FlowKey, client_isn: u32, handshake: Option<Handshake>) -> bool {
        if self.alone || self.flows.contains_key(&key) {
            return false;
        }
        if self.flows.len() >= self.config.max_flows && !self.make_room(now) {
            self.untracked += 1;
            return false;
        }
        self.flows.insert(key, Flow::new(now, client_isn, handshake));
        true
    }

    /// Forgets those that were silent for longest, of those that may be forgotten.
    fn make_room(&mut self, now: Instant) -> bool {
        if mutant::active(Mutant::WipeWhenFull) {
            self.retain(|_| false);
        }
        if self.full_until.is_some_and(|until| now < until) {
            return false;
        }
        let light = self.flows.iter().filter(|(_, flow)| flow.light());
        let mut light: Vec<_> = light.map(|(key, flow)| (flow.last, *key)).collect();
        light.sort_unstable();
        light.truncate((light.len() / EVICTED_SHARE).max(1));
        self.full_until = light.is_empty().then(|| now + SWEEP_CYCLE);
        light.iter().for_each(|(_, key)| self.forget(key));
        self.flows.len() < self.config.max_flows
    }

    /// Lets the held frames of a flow go, translated.
    fn free_held(&mut self, key: &FlowKey) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        for mut held in std::mem::take(&mut flow.held) {
            self.held_bytes -= cost_bytes(&held);
            if let Some(mut segment) = Segment::read(&held, self.config.vnet_header_bytes) {
                flow.inbound(&mut segment, &mut held);
            }
            self.outputs.push_back(held);
        }
    }

    /// Forgets all flows but those worth keeping.
    fn retain(&mut self, keep: impl Fn(&Flow) -> bool) {
        let held_bytes = &mut self.held_bytes;
        self.flows.retain(|_, flow| {
            let kept = keep(flow);
            if !kept {
                *held_bytes -= costs_bytes(&flow.held);
            }
            kept
        });
    }

    /// Forgets a flow.
    fn forget(&mut self, key: &FlowKey) {
        if let Some(flow) = self.flows.remove(key) {
            self.held_bytes -= costs_bytes(&flow.held);
        }
    }
}

fn carried(key: &FlowKey, flow: &Flow) -> Carried {
    let (guest, client) = (SocketAddr::new(key.src, key.src_port), SocketAddr::new(key.dst, key.dst_port));
    let (offset, clock_offset, echoed) = flow.numbers();
    Carried { vlans: key.vlans, guest, client, offset, clock_offset, echoed }
}

fn key(carried: &Carried) -> FlowKey {
    let Carried { vlans, guest, client, .. } = *carried;
    FlowKey {
        vlans,
        src: guest.ip(),
        dst: client.ip(),
        protocol: PROTOCOL_TCP,
        src_port: guest.port(),
        dst_port: client.port(),
        transaction: 0,
    }
}
