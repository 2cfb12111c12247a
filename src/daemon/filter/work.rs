//! The thread that takes frames from one side and gives them to the other.
//!
//! ```text
//!   loop:  new peers, orders ─▶ notify_dev ─▶ dev, unless redirect is full ─▶ network, unless mirror is full
//!          ─▶ to_guest, to_network ─▶ mirror, redirect ─▶ nothing moved? wait
//! ```
//!
//! The trap: the rewriter knows frames only. It changes bytes of a segment, and what a checksum that is not finished covers
//! is none of them; so that is put back as it was. A frame that it holds comes back without its virtio-net header; it is
//! the very same bytes, so where they lie in memory names their header. (To finish frames first would be simpler, and
//! a guest that gets 45 frames where the other got one has no room for them and loses some.)

use super::device::{Device, Unfinished};
use super::{Config, FilterError};
use crate::compare::Rewriter;
use crate::compare::notify::{self, Instruction};
use crate::compare::rewriter::Forward;
use crate::compare::wire::{self, MAX_FRAME_BYTES};
use crate::daemon::compare::intake::{Frame, Intake};
use crate::daemon::compare::outbox::Outbox;
use crate::daemon::compare::port::Socket;
use crate::daemon::compare::wake::Wake;
use crate::daemon::compare::words::Words;
use crate::daemon::compare::work::{Port, look, read};
use crate::daemon::engine_clock;
use ::xen::packet::offload::{HEADER_BYTES, VnetHeader};
use ::xen::packet::under_way_bytes;
use bytes::{Bytes, BytesMut};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::json;
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

pub(super) const MIRROR: &str = "mirror";
pub(super) const TO_GUEST: &str = "to_guest";
pub(super) const REDIRECT: &str = "redirect";
pub(super) const TO_NETWORK: &str = "to_network";
pub(super) const NOTIFY_DEV: &str = "notify_dev";

/// struct virtio_net_hdr_mrg_rxbuf, which is the header of virtio 1, and the longest.
const WIRE_HEADER_BYTES: usize = 12;
/// Headers of frames that the rewriter holds, or held once and dropped.
const HELD_MAX: usize = 8192;
/// Looks at the device at a checkpoint, each for as many frames as it gives at once.
const DRAIN_TAKES: usize = 1024;
/// How often it is asked what the kernel has lost, at least.
const LOOK: Duration = Duration::from_millis(500);
/// The same of what is under way at a checkpoint.
const FENCE_LOOK: Duration = Duration::from_millis(1);

/// A port whose frames come in, or go out.
struct Side<T> {
    /// Of the port; none, when it is not configured.
    number: Option<usize>,
    at: T,
}

impl<T> Side<T> {
    fn new(ports: &[Port], name: &str, at: T) -> Self {
        Self { number: ports.iter().position(|port| port.name == name), at }
    }

    fn is_there(&self) -> bool {
        self.number.is_some()
    }
}

/// A checksum that is not finished, and where it is.
type Sum = Option<(usize, [u8; 2])>;

fn unfinished_sum(header: &VnetHeader, frame: &[u8]) -> Sum {
    let at = header.unfinished_at()?;
    Some((at, *frame.get(at..)?.first_chunk()?))
}

fn put_back(sum: Sum, frame: &mut [u8]) {
    if let Some((at, sum)) = sum
        && let Some(place) = frame.get_mut(at..at + sum.len())
    {
        place.copy_from_slice(&sum);
    }
}

/// Frames since the start.
#[derive(Default)]
struct Counts {
    from_guest: u64,
    to_guest: u64,
    to_network: u64,
    mirrored: u64,
    redirected: u64,
    /// Heard of the network by a secondary that stands by.
    ignored: u64,
    /// That a device did not take.
    not_sent: u64,
    /// Too long for the wire, or impossible to finish.
    unusable: u64,
    /// Of the guest as it was before a checkpoint.
    stale: u64,
    checkpoints: u64,
}

/// A filter at work.
pub(super) struct Work<R> {
    dev: Device,
    network: Option<Device>,
    ports: Vec<Port>,
    peers: Receiver<(usize, Socket)>,
    wake: Arc<Wake>,
    report: R,
    vnet: bool,
    vnet_hdr_len: usize,
    mirror: Side<Outbox>,
    redirect: Side<Outbox>,
    to_guest: Side<Intake>,
    to_network: Side<Intake>,
    toolstack: Side<Words>,
    /// What the guest said before a checkpoint is on its way to `redirect` yet.
    fenced: bool,
    /// Questions of the toolstack that are answered when it is not.
    asked: u32,
    rewriter: Option<Rewriter>,
    /// What belongs to the frames that the rewriter holds, by where they lie.
    held: HashMap<usize, (VnetHeader, Sum)>,
    alone: bool,
    counts: Counts,
    /// Frames lost at the guest's side and at the network's, when that was last asked.
    lost: [u64; 2],
}

impl<R: FnMut(&serde_json::Value)> Work<R> {
    pub(super) fn new(
        config: &Config,
        dev: Device,
        network: Option<Device>,
        ports: Vec<Port>,
        peers: Receiver<(usize, Socket)>,
        wake: Arc<Wake>,
        report: R,
    ) -> Self {
        let vnet = config.vnet_hdr_support;
        Self {
            dev,
            network,
            peers,
            wake,
            report,
            vnet,
            vnet_hdr_len: config.vnet_hdr_len,
            mirror: Side::new(&ports, MIRROR, Outbox::new(vnet)),
            redirect: Side::new(&ports, REDIRECT, Outbox::new(vnet)),
            to_guest: Side::new(&ports, TO_GUEST, Intake::new(vnet)),
            to_network: Side::new(&ports, TO_NETWORK, Intake::new(vnet)),
            toolstack: Side::new(&ports, NOTIFY_DEV, Words::default()),
            ports,
            fenced: false,
            asked: 0,
            rewriter: config.rewriter.then(Rewriter::new),
            held: HashMap::new(),
            alone: false,
            counts: Counts::default(),
            lost: [0; 2],
        }
    }

    pub(super) fn run(mut self) -> Result<(), FilterError> {
        self.ports.iter().for_each(Port::ask);
        loop {
            if self.wake.take() {
                while let Ok((number, socket)) = self.peers.try_recv() {
                    self.take_peer(number, socket);
                }
                if self.wake.end.load(Ordering::Acquire) {
                    return Ok(());
                }
                if self.wake.alone.swap(false, Ordering::AcqRel) {
                    self.go_alone();
                }
                if self.wake.report.swap(false, Ordering::AcqRel) {
                    let status = self.status();
                    (self.report)(&status);
                }
            }
            // Before the guest's frames: what it said before a checkpoint is not to be taken for what it says after it.
            let mut moved = self.read_toolstack()?;
            if self.is_open(&self.redirect) && !self.fenced {
                moved |= self.read_guest()?;
            }
            if self.is_open(&self.mirror) {
                moved |= self.read_network()?;
            }
            moved |= self.read_ports();
            moved |= self.write() | self.pass_fence();
            let now = engine_clock();
            if let Some(rewriter) = &mut self.rewriter
                && rewriter.poll_timeout().is_some_and(|at| at <= now)
            {
                rewriter.handle_timeout(now);
            }
            if !moved {
                self.wait()?;
            }
        }
    }

    /// Whether frames travel as they are.
    fn unfinished(&self) -> bool {
        self.vnet && self.vnet_hdr_len > 0
    }

    /// Whether there is room for what would have to go there.
    fn is_open(&self, side: &Side<Outbox>) -> bool {
        self.alone || !side.is_there() || !side.at.is_full()
    }

    fn take_peer(&mut self, number: usize, socket: Socket) {
        let Some(port) = self.ports.get_mut(number) else { return };
        if self.alone && port.name != TO_NETWORK {
            return;
        }
        match port.name {
            MIRROR => self.mirror.at.begin_again(),
            REDIRECT if self.fenced => self.redirect.at.forget(),
            REDIRECT => self.redirect.at.begin_again(),
            TO_GUEST => self.to_guest.at.reset(),
            NOTIFY_DEV => (self.toolstack.at, self.asked) = (Words::default(), 0),
            _ => self.to_network.at.reset(),
        }
        tracing::debug!(port = port.name, "a peer came");
        port.peer = Some(socket);
    }

    /// The other guest is gone, or was never the survivor.
    fn go_alone(&mut self) {
        if std::mem::replace(&mut self.alone, true) {
            return;
        }
        let bytes = self.redirect.at.waiting_bytes();
        tracing::warn!(bytes, "alone; so much of the guest's was waiting to be compared, and is lost");
        self.ports.iter_mut().filter(|port| port.name != TO_NETWORK).for_each(|port| port.peer = None);
        if let Some(rewriter) = &mut self.rewriter {
            rewriter.takeover();
        }
    }

    fn read_toolstack(&mut self) -> Result<bool, FilterError> {
        let Some(number) = self.toolstack.number.filter(|_| !self.alone) else { return Ok(false) };
        let moved = self.toolstack.at.read(&mut self.ports[number]);
        while moved && let Some(instruction) = self.toolstack.at.next(&mut self.ports[number]) {
            match instruction {
                Instruction::Init if self.fenced => self.asked = self.asked.saturating_add(1),
                Instruction::Init => {
                    self.toolstack.at.say(&mut self.ports[number], notify::COLO_COMPARE_GET_XEN_INIT);
                }
                Instruction::Checkpoint => self.checkpoint()?,
                Instruction::Unsupported => {}
            }
        }
        Ok(moved)
    }

    /// The guest stands still, and is what the other was: nothing that it has said waits any longer.
    fn checkpoint(&mut self) -> Result<(), FilterError> {
        for _ in 0..DRAIN_TAKES {
            let said = self.dev.take(self.unfinished())?.len() as u64;
            (self.counts.from_guest, self.counts.stale) = (self.counts.from_guest + said, self.counts.stale + said);
            if said == 0 {
                break;
            }
        }
        self.redirect.at.clear();
        self.fenced = true;
        self.held.clear();
        if let Some(rewriter) = &mut self.rewriter {
            rewriter.checkpoint();
        }
        self.counts.checkpoints += 1;
        tracing::debug!(checkpoints = self.counts.checkpoints, "a checkpoint was made");
        Ok(())
    }

    /// Whether the other end of `redirect` has come to have all that the guest said before a checkpoint. Who asked is told.
    fn pass_fence(&mut self) -> bool {
        if !self.fenced {
            return false;
        }
        let port = self.redirect.number.and_then(|number| self.ports.get(number));
        match port.and_then(|port| port.peer.as_ref()) {
            Some(_) if !self.redirect.at.is_empty() => return false,
            Some(peer) if under_way_bytes(peer.as_fd()).is_ok_and(|bytes| bytes > 0) => return false,
            Some(_) => {}
            None => {
                // The next peer gets nothing of the message that was under way.
                self.redirect.at.forget();
            }
        }
        self.fenced = false;
        for _ in 0..std::mem::take(&mut self.asked) {
            if let Some(number) = self.toolstack.number {
                self.toolstack.at.say(&mut self.ports[number], notify::COLO_COMPARE_GET_XEN_INIT);
            }
        }
        true
    }

    fn read_guest(&mut self) -> Result<bool, FilterError> {
        let frames = self.dev.take(self.unfinished())?;
        let moved = !frames.is_empty();
        for (header, mut frame) in frames {
            self.counts.from_guest += 1;
            self.rewrite(&header, &mut frame);
            if self.redirect.is_there() && !self.alone {
                if let Some(bytes) = self.message(&header, frame) {
                    self.counts.redirected += 1;
                    self.redirect.at.push(bytes);
                }
            } else {
                self.send_to_network(&header, &frame);
            }
        }
        Ok(moved)
    }

    fn read_network(&mut self) -> Result<bool, FilterError> {
        let unfinished = self.unfinished();
        let Some(network) = &mut self.network else { return Ok(false) };
        let frames = network.take(unfinished)?;
        let moved = !frames.is_empty();
        for (header, frame) in frames {
            if self.to_guest.is_there() && !self.alone {
                self.counts.ignored += 1;
                continue;
            }
            if self.mirror.is_there() && !self.alone {
                // What only one of the guests would get reaches neither.
                let Some(copy) = self.message(&header, frame.clone()) else { continue };
                self.counts.mirrored += 1;
                self.mirror.at.push(copy);
            }
            self.send_to_guest(header, frame);
        }
        Ok(moved)
    }

    fn read_ports(&mut self) -> bool {
        let (mut moved, mut frames) = (false, Vec::new());
        if let Some(port) = self.to_guest.number.and_then(|number| self.ports.get_mut(number)) {
            moved |= read(port, &mut self.to_guest.at, |frame| frames.push(unfinished(&frame)));
        }
        for (header, frame) in frames.drain(..) {
            self.send_to_guest(header, frame);
        }
        if let Some(port) = self.to_network.number.and_then(|number| self.ports.get_mut(number)) {
            moved |= read(port, &mut self.to_network.at, |frame| frames.push(unfinished(&frame)));
        }
        for (header, frame) in frames {
            self.send_to_network(&header, &frame);
        }
        moved
    }

    /// Moves a frame of the guest's into the other's sequence space, and brings the guest what waited for it.
    fn rewrite(&mut self, header: &VnetHeader, frame: &mut [u8]) {
        let Some(rewriter) = &mut self.rewriter else { return };
        let sum = unfinished_sum(header, frame);
        rewriter.from_guest(engine_clock(), frame);
        put_back(sum, frame);
        while let Some(mut frame) = rewriter.poll_output() {
            let (header, sum) = self.held.remove(&(frame.as_ptr() as usize)).unwrap_or_default();
            put_back(sum, &mut frame);
            self.counts.to_guest += 1;
            self.counts.not_sent += u64::from(!self.dev.send(&header, &frame));
        }
    }

    fn send_to_guest(&mut self, header: VnetHeader, mut frame: Vec<u8>) {
        if let Some(rewriter) = &mut self.rewriter {
            let (at, sum) = (frame.as_ptr() as usize, unfinished_sum(&header, &frame));
            if rewriter.from_network(engine_clock(), &mut frame) == Forward::Held {
                // Those of frames that were dropped meanwhile are among them.
                if self.held.len() >= HELD_MAX {
                    self.held.clear();
                }
                self.held.insert(at, (header, sum));
                return;
            }
            put_back(sum, &mut frame);
        }
        self.counts.to_guest += 1;
        self.counts.not_sent += u64::from(!self.dev.send(&header, &frame));
    }

    fn send_to_network(&mut self, header: &VnetHeader, frame: &[u8]) {
        let sent = self.network.as_ref().is_some_and(|network| network.send(header, frame));
        self.counts.to_network += 1;
        self.counts.not_sent += u64::from(!sent);
    }

    /// What an outbox takes; nothing for a frame that is too long for the wire.
    fn message(&mut self, header: &VnetHeader, frame: Vec<u8>) -> Option<Bytes> {
        let message = if self.vnet {
            let mut words = [0; WIRE_HEADER_BYTES];
            words[..HEADER_BYTES].copy_from_slice(&header.bytes());
            let mut message = BytesMut::new();
            let header = &words[..self.vnet_hdr_len.min(WIRE_HEADER_BYTES)];
            wire::encode_vnet(header, &frame, &mut message).ok().map(|()| message.freeze())
        } else {
            (frame.len() <= MAX_FRAME_BYTES).then(|| Bytes::from(frame))
        };
        self.counts.unusable += u64::from(message.is_none());
        message
    }

    fn write(&mut self) -> bool {
        let mut moved = false;
        for side in [&mut self.mirror, &mut self.redirect] {
            let Some(port) = side.number.and_then(|number| self.ports.get_mut(number)) else { continue };
            let Some(peer) = &mut port.peer else { continue };
            match side.at.write(peer) {
                Ok(written) => moved |= written,
                Err(error) => {
                    port.hang_up(&error);
                    moved = true;
                }
            }
        }
        if let Some(port) = self.toolstack.number.and_then(|number| self.ports.get_mut(number)) {
            self.toolstack.at.write(port);
        }
        moved
    }

    /// Until something can be read or written, or it is time to look at what was lost.
    fn wait(&mut self) -> Result<(), FilterError> {
        self.count_losses();
        let (in_, none) = (PollFlags::IN, PollFlags::empty());
        let out = |waiting: bool| if waiting { in_ | PollFlags::OUT } else { in_ };
        let (dev_flags, network_flags) = (
            if self.is_open(&self.redirect) && !self.fenced { in_ } else { none },
            if self.is_open(&self.mirror) { in_ } else { none },
        );
        let mut fds =
            vec![PollFd::from_borrowed_fd(self.wake.fd(), in_), PollFd::from_borrowed_fd(self.dev.fd(), dev_flags)];
        fds.extend(self.network.iter().map(|network| PollFd::from_borrowed_fd(network.fd(), network_flags)));
        let devices = fds.len();
        let mut outs = Vec::new();
        for (number, port) in self.ports.iter().enumerate() {
            let Some(peer) = &port.peer else { continue };
            let flags = match port.name {
                MIRROR => out(!self.mirror.at.is_empty()),
                REDIRECT => out(!self.redirect.at.is_empty()),
                NOTIFY_DEV => out(!self.toolstack.at.is_empty()),
                _ => in_,
            };
            fds.push(PollFd::from_borrowed_fd(peer.as_fd(), flags));
            outs.push((number, port.name == MIRROR || port.name == REDIRECT));
        }
        let until = if self.fenced { FENCE_LOOK } else { LOOK };
        look(&mut fds, Some(&Timespec::try_from(until).unwrap_or_default()))?;
        let is_wrong = |fd: &PollFd<'_>| fd.revents().intersects(!(in_ | PollFlags::OUT));
        let wrong: Vec<bool> = fds[1..devices].iter().map(is_wrong).collect();
        // Nobody has anything to say where frames go out: what comes is the end.
        let spoke = |((number, is_out), fd): (&(usize, bool), &PollFd<'_>)| {
            (*is_out && fd.revents().intersects(!PollFlags::OUT)).then_some(*number)
        };
        let spoke: Vec<usize> = outs.iter().zip(&fds[devices..]).filter_map(spoke).collect();
        drop(fds);
        for (device, wrong) in [Some(&self.dev), self.network.as_ref()].into_iter().flatten().zip(wrong) {
            if wrong {
                device.look()?;
            }
        }
        for number in spoke {
            let Some(port) = self.ports.get_mut(number) else { continue };
            let Some(peer) = &port.peer else { continue };
            match rustix::io::read(peer, &mut [0; 4096]) {
                Ok(0) => port.hang_up(&"the peer left"),
                Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => port.hang_up(&error),
            }
        }
        Ok(())
    }

    fn count_losses(&mut self) {
        let devices = [Some(&self.dev), self.network.as_ref()];
        for (device, lost) in devices.into_iter().zip(&mut self.lost) {
            let Some(device) = device else { continue };
            let now = device.lost();
            if now > *lost {
                tracing::warn!(device = device.name, frames = now - *lost, "frames lost by the kernel");
                *lost = now;
            }
        }
    }

    /// What is not as it should be.
    fn degraded(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.alone {
            found.push("alone: nothing is compared".into());
        }
        for port in self.ports.iter().filter(|port| port.peer.is_none() && !self.alone) {
            found.push(format!("{}: nobody is connected", port.name));
        }
        let sides = [(REDIRECT, &self.redirect), (MIRROR, &self.mirror)];
        for (name, _) in sides.into_iter().filter(|(_, side)| !self.is_open(side)) {
            found.push(format!("{name}: full, and frames wait in the kernel"));
        }
        if self.fenced {
            found.push(format!("{REDIRECT}: what was said before a checkpoint is under way"));
        }
        let devices = [Some(&self.dev), self.network.as_ref()];
        for (device, lost) in devices.into_iter().zip(self.lost).filter(|(_, lost)| *lost > 0) {
            found.extend(device.map(|device| format!("{}: {lost} frames lost by the kernel", device.name)));
        }
        found
    }

    fn status(&mut self) -> serde_json::Value {
        self.count_losses();
        let counts = &self.counts;
        let connected: serde_json::Map<_, _> =
            self.ports.iter().map(|port| (port.name.to_owned(), json!(port.peer.is_some()))).collect();
        json!({
            "alone": self.alone,
            "degraded": self.degraded(),
            "connected": connected,
            "from_guest": counts.from_guest,
            "to_guest": counts.to_guest,
            "to_network": counts.to_network,
            "mirrored": counts.mirrored,
            "redirected": counts.redirected,
            "ignored": counts.ignored,
            "not_sent": counts.not_sent,
            "unusable": counts.unusable,
            "stale": counts.stale,
            "checkpoints": counts.checkpoints,
            "lost_by_kernel": { "guest": self.lost[0], "network": self.lost[1] },
            "waiting_bytes": { MIRROR: self.mirror.at.waiting_bytes(), REDIRECT: self.redirect.at.waiting_bytes() },
            "rewritten_flows": self.rewriter.as_ref().map(Rewriter::needed),
        })
    }
}

/// A frame of a port's. Headers are of 10 bytes or more, or of none.
fn unfinished(frame: &Frame) -> Unfinished {
    let header = frame.message.get(8..frame.message.len() - frame.bytes.len().min(frame.message.len()));
    let header = header.and_then(|header| header.first_chunk()).map(VnetHeader::parse);
    (header.unwrap_or_default(), frame.bytes.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finished_stays_as_it_was() {
        let header = VnetHeader { flags: 1, csum_start: 34, csum_offset: 16, ..VnetHeader::default() };
        let before: Vec<u8> = (0..60).collect();
        let mut frame = before.clone();
        let sum = unfinished_sum(&header, &frame);
        // A sequence number, and the sum that would go with it.
        frame[38] = 99;
        frame[50] = 99;
        put_back(sum, &mut frame);
        assert_eq!((frame[38], &frame[50..52]), (99, &before[50..52]));
        assert_eq!(unfinished_sum(&VnetHeader { flags: 0, ..header }, &before), None, "finished ones are kept right");
        for csum_start in [43, u16::MAX] {
            let header = VnetHeader { csum_start, ..header };
            assert_eq!(unfinished_sum(&header, &before), None, "outside of the frame");
        }
        put_back(sum, &mut frame[..51]);
    }
}
