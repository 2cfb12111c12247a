//! The guest itself: frames and time in, frames out; no thread, no clock.
//!
//! ```text
//! boot ─▶ step(now) ─▶ step(poll_timeout) ─▶ ... ─▶ pages + save_devices ─▶ blank + pages + load_devices ─▶ step ...
//! ```
//!
//! A step does a bounded amount: what a changed generation calls for, up to 64 frames and 16 requests, the timers
//! that are due.
//! Guest time starts when the guest boots and goes on from the captured time wherever it is loaded.
//!
//! The hardware's random numbers are the host's and are not saved: two guests on two hosts draw different TCP
//! sequence numbers, as real ones would, and with a `diverge_percent` above zero different response bytes. With
//! zero, guests that are fed the same frames over the same disk send the same bytes.
//!
//! The trap: after a takeover the peer has sent frames nobody received. Without the announcement (as a VM
//! generation ID or a PV driver's resume brings about) each connection stands still for a retransmission timeout.

use super::devices::{FRAMES_MAX, Registers};
use super::kv::{Cursor, Store};
use super::layout::{Layout, MIN_RAM_PAGES};
use super::ram::Ram;
use super::tcb::{State, Tcb};
use super::wire::{FRAME_MAX_BYTES, Ip, Mac};
use crate::clock::Instant;
use crate::disk::Disk;
use crate::hypervisor::DomainError;
use crate::record;
use std::collections::VecDeque;

/// Frames taken from the receive ring in one step.
const FRAMES_A_STEP: usize = 64;
/// Requests answered in one step; a write is the last of its step, because it waits for the disk to flush and a
/// suspend waits for the step.
const REQUESTS_A_STEP: usize = 16;
/// Longest random delay added to timers of a guest that is to diverge, in microseconds.
const JITTER_MAX_US: u64 = 5000;

/// What a guest is made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// Size of its memory in pages, at least 256 (1 MiB).
    pub ram_pages: u64,
    /// Its Ethernet address, not a group's.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub ip: [u8; 4],
    /// How many responses in a hundred carry a random number instead of zeroes in `X-Hash-Seed`.
    pub diverge_percent: u8,
    /// Seed of the hardware's random numbers on this host.
    pub host_entropy_seed: u64,
}

/// The hardware's random numbers: SplitMix64.
#[derive(Clone, Debug)]
pub(super) struct Hardware(u64);

impl Hardware {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// A guest.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(super) ram: Ram,
    pub(super) registers: Registers,
    pub(super) ring: VecDeque<Vec<u8>>,
    layout: Layout,
    hardware: Hardware,
    diverge_percent: u8,
}

/// All of a machine, the disk and the wire, for the length of a step.
pub(super) struct Context<'a> {
    pub(super) ram: &'a mut Ram,
    pub(super) registers: &'a mut Registers,
    pub(super) layout: &'a Layout,
    pub(super) hardware: &'a mut Hardware,
    pub(super) disk: &'a mut dyn Disk,
    pub(super) tx: &'a mut dyn FnMut(&[u8]),
    pub(super) now_us: u64,
    pub(super) jitter_us: u64,
    pub(super) diverge_percent: u8,
    pub(super) requests_left: usize,
}

impl Context<'_> {
    pub(super) fn mac(&self) -> Mac {
        let [_, _, mac @ ..] = self.registers.mac.to_be_bytes();
        mac
    }

    pub(super) fn ip(&self) -> Ip {
        self.registers.ip.to_be_bytes()
    }

    pub(super) fn cursor(&self) -> Cursor {
        let Registers { log_id, log_end: end, log_sequence: sequence, log_keys: keys, .. } = *self.registers;
        Cursor { log_id, end, sequence, keys }
    }

    pub(super) fn set_cursor(&mut self, Cursor { log_id, end, sequence, keys }: Cursor) {
        let r = &mut *self.registers;
        (r.log_id, r.log_end, r.log_sequence, r.log_keys) = (log_id, end, sequence, keys);
    }
}

impl Machine {
    /// A guest with nothing in it, to be loaded. Until then it does nothing; then its addresses are the loaded ones.
    pub fn blank(config: &MachineConfig) -> Result<Self, DomainError> {
        let bad = |what: String| DomainError::BadConfig(what);
        let layout = Layout::for_ram(config.ram_pages).ok_or_else(|| {
            bad(format!("a guest needs at least {MIN_RAM_PAGES} pages of memory; {} were asked for", config.ram_pages))
        })?;
        if config.mac[0] & 1 == 1 {
            return Err(bad(format!("{:02x?} is the address of a group, not of a guest", config.mac)));
        }
        if config.diverge_percent > 100 {
            return Err(bad(format!("diverge_percent is {}, and must be 0 to 100", config.diverge_percent)));
        }
        Ok(Self {
            ram: Ram::new(config.ram_pages)?,
            registers: Registers::default(),
            ring: VecDeque::new(),
            layout,
            hardware: Hardware(config.host_entropy_seed),
            diverge_percent: config.diverge_percent,
        })
    }

    /// A guest that starts now: formats an empty disk, or reads the log that is there.
    pub fn boot(config: &MachineConfig, now: Instant, disk: &mut dyn Disk) -> Result<Self, DomainError> {
        let mut machine = Self::blank(config)?;
        let log_id = machine.hardware.next();
        let cursor = Store { ram: &mut machine.ram, layout: &machine.layout, disk }
            .open(log_id)
            .map_err(|error| DomainError::BadConfig(format!("the guest cannot boot: {error}")))?;
        machine.ram.write(0, b"xen-colo embedded guest\n");
        let [a, b, c, d, e, f] = config.mac;
        machine.registers = Registers {
            booted: true,
            mac: u64::from_be_bytes([0, 0, a, b, c, d, e, f]),
            ip: u32::from_be_bytes(config.ip),
            log_id: cursor.log_id,
            log_end: cursor.end,
            log_sequence: cursor.sequence,
            log_keys: cursor.keys,
            ..Registers::default()
        };
        // Not at zero, which means "no time" in a connection.
        machine.registers.set_clock(now, 1);
        Ok(machine)
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Its memory, for loading and for the dirty log.
    pub fn ram_mut(&mut self) -> &mut Ram {
        &mut self.ram
    }

    /// Requests answered since boot.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.registers.requests
    }

    /// The generation it was last told.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.registers.generation
    }

    /// Puts a frame on the receive ring; false when the ring is full. A frame longer than the MTU allows is lost
    /// here, as on a real NIC.
    pub fn receive(&mut self, frame: &[u8]) -> bool {
        if self.ring.len() >= FRAMES_MAX {
            return false;
        }
        if frame.len() <= FRAME_MAX_BYTES {
            self.ring.push_back(frame.to_vec());
        }
        true
    }

    /// Tells the guest which generation of itself it is. A change makes it announce itself on its next step.
    pub fn set_generation(&mut self, generation: u64) {
        self.registers.generation = generation;
    }

    /// Does a bounded amount of what is due, handing frames to `tx`; true when more is due at once.
    pub fn step(&mut self, now: Instant, disk: &mut dyn Disk, tx: &mut dyn FnMut(&[u8])) -> bool {
        if !self.registers.booted {
            return false;
        }
        let jitter_us = if self.diverge_percent == 0 { 0 } else { self.hardware.next() % JITTER_MAX_US };
        let now_us = self.registers.guest_us(now);
        let mut context = Context {
            ram: &mut self.ram,
            registers: &mut self.registers,
            layout: &self.layout,
            hardware: &mut self.hardware,
            disk,
            tx,
            now_us,
            jitter_us,
            diverge_percent: self.diverge_percent,
            requests_left: REQUESTS_A_STEP,
        };
        let connections = context.layout.connections;
        if context.registers.announced != context.registers.generation {
            context.registers.announced = context.registers.generation;
            context.announce_address();
            (0..connections).for_each(|slot| context.tcp_announce(slot));
        }
        for _ in 0..FRAMES_A_STEP {
            let Some(frame) = self.ring.pop_front() else { break };
            context.frame_input(&frame);
        }
        // Whoever comes first may use up the requests of the step: it is somebody else each time.
        let first = (context.registers.requests % connections as u64) as usize;
        (0..connections).for_each(|n| context.tcp_timers((first + n) % connections));
        self.poll_timeout().is_some_and(|at| at <= now)
    }

    /// When the guest has something to do next: now or earlier when it has already, nothing when it only waits
    /// for frames.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.registers.booted {
            return None;
        }
        if !self.ring.is_empty() || self.registers.announced != self.registers.generation {
            return Some(Instant::ZERO);
        }
        (0..self.layout.connections)
            .map(|slot| Tcb::load(&self.ram, &self.layout, slot))
            .filter(|tcb| tcb.state != State::Free)
            .flat_map(|tcb| [tcb.timer_us, tcb.work_us])
            .filter(|at_us| *at_us != 0)
            .min()
            .map(|at_us| self.registers.host_instant(at_us))
    }

    /// Everything of the guest that is not in its pages, as a run of records.
    #[must_use]
    pub fn save_devices(&self, now: Instant) -> Vec<u8> {
        let state = super::devices::save(&self.registers, &self.ring, self.ram.nr_pages(), now);
        let mut run = Vec::with_capacity(state.len() + 16);
        record::put(record::EMBEDDED_DEVICES, &state, &mut run);
        run
    }

    /// Replaces everything that is not in the pages; guest time goes on from the captured time. Nothing changes
    /// when the blob is refused.
    pub fn load_devices(&mut self, now: Instant, run: &[u8]) -> Result<(), DomainError> {
        let state = record::find(run, record::EMBEDDED_DEVICES)?;
        (self.registers, self.ring) = super::devices::load(state, self.ram.nr_pages(), now)?;
        Ok(())
    }

    /// Whether a run of records could be loaded.
    pub fn check_devices(&self, run: &[u8]) -> Result<(), DomainError> {
        let state = record::find(run, record::EMBEDDED_DEVICES)?;
        super::devices::load(state, self.ram.nr_pages(), Instant::ZERO).map(drop)
    }
}
