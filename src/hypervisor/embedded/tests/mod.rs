//! The machine against an independent TCP (smoltcp) and against hand-made segments.
//!
//! ```text
//! smoltcp ─▶ link (delay, loss, duplicates, reordering; seeded) ─▶ machine ─▶ link ─▶ smoltcp
//! ```
//!
//! Time is virtual and jumps to the next thing due. The trap is a test that passes because nothing happened: each
//! counts what it means to have seen.

mod capture;
mod faults;
mod threads;
mod traffic;
mod words_on_wire;

use super::machine::{Machine, MachineConfig};
use super::wire::Mac;
use crate::clock::Instant;
use crate::disk::{Disk, DiskError, MemoryDisk};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as TheirInstant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

pub(super) const GUEST_MAC: Mac = [2, 0, 0, 0, 0, 1];
pub(super) const GUEST_IP: [u8; 4] = [10, 0, 0, 1];
pub(super) const PEER_MAC: Mac = [2, 0, 0, 0, 0, 2];
pub(super) const PEER_IP: [u8; 4] = [10, 0, 0, 2];

pub(super) fn config(ram_pages: u64) -> MachineConfig {
    MachineConfig { ram_pages, mac: GUEST_MAC, ip: GUEST_IP, diverge_percent: 0, host_entropy_seed: 42 }
}

pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.roll(256) as u8).collect()
    }
}

/// A disk that refuses, now and then or for good.
pub(super) struct Faulty {
    pub(super) disk: MemoryDisk,
    pub(super) busy_percent: u64,
    pub(super) broken: bool,
    pub(super) refusals: u64,
    pub(super) flushes: u64,
    dice: Dice,
}

impl Faulty {
    pub(super) fn new(size_bytes: usize) -> Self {
        let disk = MemoryDisk::new(size_bytes);
        Self { disk, busy_percent: 0, broken: false, refusals: 0, flushes: 0, dice: Dice(5) }
    }

    fn permit(&mut self) -> Result<(), DiskError> {
        if self.broken {
            return Err(DiskError::Fenced { theirs: 1, ours: 2 });
        }
        if self.dice.roll(100) < self.busy_percent {
            self.refusals += 1;
            return Err(DiskError::Busy);
        }
        Ok(())
    }
}

impl Disk for Faulty {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.permit()?;
        self.disk.read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.permit()?;
        self.disk.write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.permit()?;
        self.flushes += 1;
        self.disk.flush()
    }
}

#[derive(Default)]
pub(super) struct Wire {
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<Vec<u8>>,
}

pub(super) struct Received(Vec<u8>);
pub(super) struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;
    fn receive(&mut self, _: TheirInstant) -> Option<(Received, Sending<'_>)> {
        self.rx.pop_front().map(|frame| (Received(frame), Sending(&mut self.tx)))
    }
    fn transmit(&mut self, _: TheirInstant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.tx))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// A delayed, lossy, seeded link in one direction.
pub(super) struct Link {
    in_flight: BTreeMap<(u64, u64), Vec<u8>>,
    sent: u64,
    pub(super) dropped: u64,
    pub(super) doubled: u64,
    pub(super) reordered: u64,
}

impl Link {
    fn new() -> Self {
        Self { in_flight: BTreeMap::new(), sent: 0, dropped: 0, doubled: 0, reordered: 0 }
    }

    fn send(&mut self, now: Instant, frame: &[u8], trouble_percent: u64, dice: &mut Dice) {
        if dice.roll(100) < trouble_percent {
            self.dropped += 1;
            return;
        }
        let mut copies = 1;
        if dice.roll(100) < trouble_percent {
            (copies, self.doubled) = (2, self.doubled + 1);
        }
        for _ in 0..copies {
            let mut delay_us = 100;
            if dice.roll(100) < trouble_percent {
                (delay_us, self.reordered) = (100 + dice.roll(2000), self.reordered + 1);
            }
            self.in_flight.insert((now.as_micros() + delay_us, self.sent), frame.to_vec());
            self.sent += 1;
        }
    }

    fn arrived(&mut self, now: Instant) -> Option<Vec<u8>> {
        let first = self.in_flight.first_entry()?;
        (first.key().0 <= now.as_micros()).then(|| first.remove())
    }
}

/// One client connection.
pub(super) struct Client {
    handle: SocketHandle,
    pub(super) to_send: VecDeque<u8>,
    pub(super) received: Vec<u8>,
    pub(super) half_close: bool,
    /// The application reads nothing while this is set, so that the window shuts.
    pub(super) deaf: bool,
}

impl Client {
    /// The whole responses so far: status, `X-Hash-Seed`, body.
    pub(super) fn responses(&self) -> Vec<(u16, String, Vec<u8>)> {
        let (mut rest, mut found) = (&self.received[..], Vec::new());
        while let Some(end) = rest.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = std::str::from_utf8(&rest[..end]).unwrap();
            let field =
                |name: &str| head.split("\r\n").find_map(|line| line.strip_prefix(name)).unwrap_or("").to_owned();
            let len = field("Content-Length: ").parse().unwrap_or(0);
            let Some(body) = rest.get(end + 4..end + 4 + len) else { break };
            found.push((head[9..12].parse().unwrap(), field("X-Hash-Seed: "), body.to_vec()));
            rest = &rest[end + 4 + len..];
        }
        found
    }

    pub(super) fn statuses(&self) -> Vec<u16> {
        self.responses().into_iter().map(|(status, ..)| status).collect()
    }
}

/// A machine, its disk, a smoltcp host, and the two links between them.
pub(super) struct World {
    pub(super) machine: Machine,
    pub(super) disk: Faulty,
    pub(super) now: Instant,
    pub(super) trouble_percent: u64,
    pub(super) to_guest: Link,
    pub(super) to_peer: Link,
    pub(super) clients: Vec<Client>,
    /// Guest steps taken.
    pub(super) steps: u64,
    iface: Interface,
    sockets: SocketSet<'static>,
    wire: Wire,
    dice: Dice,
    next_port: u16,
}

impl World {
    pub(super) fn new(config: &MachineConfig, seed: u64) -> Self {
        let mut disk = Faulty::new(4 << 20);
        let now = Instant::from_micros(1_000_000);
        let machine = Machine::boot(config, now, &mut disk).unwrap();
        let mut wire = Wire::default();
        let mut theirs = Config::new(EthernetAddress(PEER_MAC).into());
        theirs.random_seed = seed;
        let mut iface = Interface::new(theirs, &mut wire, TheirInstant::from_micros(1_000_000));
        iface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::from(Ipv4Address::from(PEER_IP)), 24)).unwrap();
        });
        Self {
            machine,
            disk,
            now,
            trouble_percent: 0,
            to_guest: Link::new(),
            to_peer: Link::new(),
            clients: Vec::new(),
            steps: 0,
            iface,
            sockets: SocketSet::new(Vec::new()),
            wire,
            dice: Dice(seed),
            next_port: 40_000,
        }
    }

    /// Opens a connection that will send `bytes`; returns its number.
    pub(super) fn connect(&mut self, bytes: &[u8], rx_bytes: usize) -> usize {
        let buffer = |len: usize| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(buffer(rx_bytes), buffer(16384));
        let guest = (IpAddress::from(Ipv4Address::from(GUEST_IP)), 80);
        self.next_port += 1;
        socket.connect(self.iface.context(), guest, self.next_port).unwrap();
        let handle = self.sockets.add(socket);
        let to_send = bytes.iter().copied().collect();
        self.clients.push(Client { handle, to_send, received: Vec::new(), half_close: false, deaf: false });
        self.clients.len() - 1
    }

    pub(super) fn state(&self, client: usize) -> tcp::State {
        self.sockets.get::<tcp::Socket<'_>>(self.clients[client].handle).state()
    }

    /// Sends `bytes` on a connection.
    pub(super) fn say(&mut self, client: usize, bytes: &[u8]) {
        self.clients[client].to_send.extend(bytes);
    }

    /// Runs until `done`, and at most `limit` of virtual time; says whether it was done.
    pub(super) fn run(&mut self, limit: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.now + limit;
        loop {
            self.turn();
            if done(self) {
                return true;
            }
            let theirs = self.iface.poll_at(self.their_now(), &self.sockets).map(|at| at.total_micros() as u64);
            let links = [&self.to_guest, &self.to_peer].map(|link| link.in_flight.keys().next().map(|key| key.0));
            let ours = self.machine.poll_timeout().map(Instant::as_micros);
            let next = [theirs, links[0], links[1], ours].into_iter().flatten().min();
            match next.map(|at| Instant::from_micros(at.max(self.now.as_micros() + 10))) {
                Some(at) if at <= end => self.now = at,
                _ => {
                    self.now = end;
                    return false;
                }
            }
        }
    }

    /// Everything due now, once.
    pub(super) fn turn(&mut self) {
        while let Some(frame) = self.to_peer.arrived(self.now) {
            self.wire.rx.push_back(frame);
        }
        self.iface.poll(self.their_now(), &mut self.wire, &mut self.sockets);
        for client in &mut self.clients {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(client.handle);
            while socket.can_send() && !client.to_send.is_empty() {
                let (front, _) = client.to_send.as_slices();
                let sent = socket.send_slice(front).unwrap();
                client.to_send.drain(..sent);
            }
            if client.half_close && client.to_send.is_empty() && socket.may_send() {
                socket.close();
            }
            while socket.can_recv() && !client.deaf {
                socket
                    .recv(|bytes| {
                        client.received.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .unwrap();
            }
        }
        self.iface.poll(self.their_now(), &mut self.wire, &mut self.sockets);
        while let Some(frame) = self.wire.tx.pop_front() {
            self.to_guest.send(self.now, &frame, self.trouble_percent, &mut self.dice);
        }
        while let Some(frame) = self.to_guest.arrived(self.now) {
            self.machine.receive(&frame);
        }
        let Self { machine, disk, now, to_peer, trouble_percent, dice, .. } = self;
        machine.step(*now, disk, &mut |frame| to_peer.send(*now, frame, *trouble_percent, dice));
        self.steps += 1;
    }

    fn their_now(&self) -> TheirInstant {
        TheirInstant::from_micros(self.now.as_micros() as i64)
    }
}

pub(super) fn put(name: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("PUT /k/{name} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

pub(super) fn get(name: &str) -> Vec<u8> {
    format!("GET /k/{name} HTTP/1.1\r\nHost: g\r\n\r\n").into_bytes()
}
