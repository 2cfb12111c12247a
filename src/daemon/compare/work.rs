//! The thread that reads, compares and writes.
//!
//! ```text
//!   loop:  new peers, orders ─▶ primary_in, unless something is full ─▶ secondary_in ─▶ pairs judged ─▶ notify_dev ─▶ time
//!          ─▶ outputs ─▶ outdev ─▶ nothing moved? look again for a while ─▶ judge what has no partner ─▶ wait
//! ```
//!
//! Whoever waits for one frame at a time is waited for awake for a while, as at the NBD server: going to sleep and being
//! woken costs more than comparing.
//!
//! The trap: a frame that leaves must take its virtio-net header with it, and the comparator knows frames only. It gives
//! back the very bytes it was given, so where they lie in memory names their message. What it has made itself has none.

use super::Config;
use super::intake::{Frame, Intake, Taken};
use super::outbox::Outbox;
use super::port::Socket;
use super::wake::Wake;
use super::words::Words;
use crate::compare::notify::{self, Instruction};
use crate::compare::{Comparator, Output, asked_by, wire};
use crate::daemon::engine_clock;
use crate::daemon::status::{FLOWS_MAX, Flow};
use bytes::{Bytes, BytesMut};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

/// How long to stay awake for what may come.
const AWAKE: Duration = Duration::from_micros(50);
/// What is gained by judging two frames at once: it does not pay to wait for partners any longer.
const PAIR_GAIN: Duration = Duration::from_nanos(200);
/// While nobody sleeps, notify_dev is looked at every so many turns, since a frame waits for each look. Turns are short when it
/// matters: whoever orders a checkpoint has stopped both guests.
const NOTIFY_TURNS: u32 = 16;
/// How long the end may take: what is held is written out by then, or lost.
const END: Duration = Duration::from_secs(2);
/// Reads of each input at a checkpoint, each up to the socket's own buffer.
const DRAIN_READS: usize = 256;

/// The lengths before a frame with a virtio-net header.
const WORDS_BYTES: usize = 8;
/// struct virtio_net_hdr_mrg_rxbuf, the longest.
const HEADER_MAX_BYTES: usize = 12;

const PRIMARY_IN: usize = 0;
const SECONDARY_IN: usize = 1;
const OUTDEV: usize = 2;
const NOTIFY_DEV: usize = 3;

/// A socket, its peer if there is one, and the way to ask for the next.
#[derive(Debug)]
pub(in crate::daemon) struct Port {
    pub(in crate::daemon) name: &'static str,
    want: Sender<()>,
    pub(in crate::daemon) peer: Option<Socket>,
}

impl Port {
    pub(super) fn new(name: &'static str, want: Sender<()>) -> Self {
        Self { name, want, peer: None }
    }

    pub(in crate::daemon) fn ask(&self) {
        // The thread at the other end ends with the process.
        let _ = self.want.send(());
    }

    /// The peer is gone, or must go.
    pub(in crate::daemon) fn hang_up(&mut self, why: &dyn std::fmt::Display) {
        if self.peer.take().is_some() {
            tracing::warn!("{}: closed: {why}", self.name);
            self.ask();
        }
    }
}

/// A comparator at work.
pub(super) struct Work<R> {
    ports: Vec<Port>,
    peers: Receiver<(usize, Socket)>,
    wake: Arc<Wake>,
    report: R,
    comparator: Comparator,
    epoch: u64,
    primary: Intake,
    secondary: Intake,
    /// Frames of the primary, or of the secondary, whose partners may be about to come.
    ours: VecDeque<Bytes>,
    theirs: VecDeque<Bytes>,
    outbox: Outbox,
    /// The messages of the primary's frames, with `vnet`, by where the frames lie.
    messages: Option<HashMap<usize, Bytes>>,
    /// How long their virtio-net headers are.
    header_bytes: usize,
    notify: Words,
    /// A checkpoint is wanted, and the peer of notify_dev has not been told.
    owed: bool,
    /// Why a checkpoint is wanted in this epoch.
    cause: Option<String>,
    /// The last wait was short: the next will be.
    quick: bool,
    /// Since when nothing has moved, while nobody sleeps.
    idle_since: Option<Instant>,
    /// Turns since the last sleep.
    turn: u32,
}

impl<R: FnMut(&serde_json::Value)> Work<R> {
    pub(super) fn new(
        config: &Config,
        ports: Vec<Port>,
        peers: Receiver<(usize, Socket)>,
        wake: Arc<Wake>,
        report: R,
    ) -> Self {
        let vnet = config.vnet_hdr_support;
        Self {
            ports,
            peers,
            wake,
            report,
            comparator: Comparator::new(config.limits()),
            epoch: 0,
            primary: Intake::new(vnet),
            secondary: Intake::new(vnet),
            ours: VecDeque::new(),
            theirs: VecDeque::new(),
            outbox: Outbox::new(vnet),
            messages: vnet.then(HashMap::new),
            header_bytes: 0,
            notify: Words::default(),
            owed: false,
            cause: None,
            quick: false,
            idle_since: None,
            turn: 0,
        }
    }

    pub(super) fn run(mut self) -> io::Result<()> {
        self.ports.iter().for_each(Port::ask);
        loop {
            if self.wake.take() {
                while let Ok((number, socket)) = self.peers.try_recv() {
                    self.take_peer(number, socket);
                }
                if self.wake.end.load(Ordering::Acquire) {
                    return self.end();
                }
                if self.wake.report.swap(false, Ordering::AcqRel) {
                    let status = self.status();
                    (self.report)(&status);
                }
            }
            let mut moved = !self.outbox.is_full() && self.read_both();
            if self.turn.is_multiple_of(NOTIFY_TURNS) {
                moved |= self.read_notify();
            }
            self.turn = self.turn.wrapping_add(1);
            if self.comparator.poll_timeout().is_some_and(|at| at <= engine_clock()) {
                self.comparator.handle_timeout(engine_clock());
            }
            self.outputs();
            moved |= self.write();
            if let Some(port) = self.ports.get_mut(NOTIFY_DEV) {
                self.notify.write(port);
            }
            if moved {
                self.idle_since = None;
            } else if !self.stays_awake() {
                self.wait()?;
            }
        }
    }

    /// Whether to look again at once. Reading in vain is cheaper than asking first whether there is something to read.
    fn stays_awake(&mut self) -> bool {
        let idle = self.idle_since.get_or_insert_with(Instant::now).elapsed();
        let awake = self.quick && idle < AWAKE;
        let waiting = (self.ours.len() + self.theirs.len()) as u32;
        if waiting > 0 && (!awake || idle >= PAIR_GAIN * waiting) {
            self.judge_apart();
            return true;
        }
        if awake {
            std::thread::yield_now();
        }
        awake
    }

    fn take_peer(&mut self, number: usize, socket: Socket) {
        match number {
            PRIMARY_IN => self.primary.reset(),
            SECONDARY_IN => self.secondary.reset(),
            OUTDEV => self.outbox.begin_again(),
            _ => (self.notify, self.owed) = (Words::default(), self.cause.is_some()),
        }
        if let Some(port) = self.ports.get_mut(number) {
            tracing::debug!(port = port.name, "a peer came");
            port.peer = Some(socket);
        }
    }

    /// Reads what both guests have said, each as far as nothing of its own waits for the other.
    fn read_both(&mut self) -> bool {
        let mut moved = self.ours.is_empty() && self.comparator.ready() && self.read_primary();
        moved |= self.theirs.is_empty() && self.read_secondary();
        self.judge_pairs();
        moved
    }

    /// What comes in one order is judged in pairs, which is the cheapest. A frame waits here for its partner as long as
    /// that pays, but not where its partner may have been kept already: then all of the primary's comes first, so that no more
    /// needs to be.
    fn judge_pairs(&mut self) {
        let (epoch, now) = (self.epoch, engine_clock());
        while !self.ours.is_empty()
            && let Some(theirs) = self.theirs.pop_front()
            && let Some(ours) = self.ours.pop_front()
        {
            if let Some(ours) = self.comparator.handle_pair(epoch, ours, &theirs) {
                self.comparator.handle_primary(now, epoch, ours);
                self.comparator.handle_secondary(now, epoch, theirs);
                if self.comparator.stats().currently_secondary_bytes > 0 {
                    break;
                }
            }
        }
        let kept = self.comparator.stats();
        if kept.currently_held > 0 || kept.currently_secondary_bytes > 0 {
            self.judge_apart();
        }
    }

    /// Nothing waits any longer for a partner to come.
    fn judge_apart(&mut self) {
        let (epoch, now) = (self.epoch, engine_clock());
        self.ours.drain(..).for_each(|frame| self.comparator.handle_primary(now, epoch, frame));
        self.theirs.drain(..).for_each(|frame| self.comparator.handle_secondary(now, epoch, frame));
    }

    fn read_primary(&mut self) -> bool {
        let Self { ours, messages, header_bytes, .. } = self;
        read(&mut self.ports[PRIMARY_IN], &mut self.primary, |frame| {
            if let Some(messages) = messages {
                let words_and_header_bytes = frame.message.len() - frame.bytes.len();
                *header_bytes = words_and_header_bytes.saturating_sub(WORDS_BYTES).min(HEADER_MAX_BYTES);
                messages.insert(frame.bytes.as_ptr() as usize, frame.message);
            }
            ours.push_back(frame.bytes);
        })
    }

    fn read_secondary(&mut self) -> bool {
        let theirs = &mut self.theirs;
        read(&mut self.ports[SECONDARY_IN], &mut self.secondary, |frame| theirs.push_back(frame.bytes))
    }

    fn read_notify(&mut self) -> bool {
        let moved = self.ports.get_mut(NOTIFY_DEV).is_some_and(|port| self.notify.read(port));
        while moved && let Some(instruction) = self.notify.next(&mut self.ports[NOTIFY_DEV]) {
            match instruction {
                Instruction::Init => self.say(notify::COLO_COMPARE_GET_XEN_INIT),
                Instruction::Checkpoint => self.checkpoint(),
                Instruction::Unsupported => {}
            }
            if std::mem::take(&mut self.owed) && self.cause.is_some() {
                self.say(notify::DO_CHECKPOINT);
            }
        }
        moved
    }

    /// Both guests stand still, and the secondary is what the primary was: nothing either has said waits any longer.
    fn checkpoint(&mut self) {
        self.judge_apart();
        for _ in 0..DRAIN_READS {
            if self.outbox.is_full() || !self.comparator.ready() || !self.read_primary() {
                break;
            }
            self.judge_apart();
        }
        for _ in 0..DRAIN_READS {
            if !self.read_secondary() {
                break;
            }
            // What the secondary had said is void.
            self.theirs.clear();
        }
        // Requests made until now are answered by this checkpoint.
        self.outputs();
        self.comparator.checkpoint(engine_clock(), self.epoch);
        self.epoch += 1;
        self.cause = None;
        self.owed = false;
        tracing::debug!(epoch = self.epoch, "a checkpoint was made");
        self.outputs();
    }

    fn outputs(&mut self) {
        while let Some(output) = self.comparator.poll_output() {
            match output {
                Output::Release(frame) => match &mut self.messages {
                    None => self.leave(frame),
                    Some(messages) => match messages.remove(&(frame.as_ptr() as usize)) {
                        Some(message) => self.leave(message),
                        None => self.made(&frame),
                    },
                },
                Output::Diverged { cause, flow, .. } => self.diverged(&asked_by(cause, flow)),
            }
        }
    }

    fn leave(&mut self, bytes: Bytes) {
        self.outbox.push_of(bytes, |bytes| self.primary.block_of(bytes));
    }

    /// A frame that the comparator has made. It is finished, which a header of zeroes says.
    fn made(&mut self, frame: &[u8]) {
        let (header, mut message) = ([0; HEADER_MAX_BYTES], BytesMut::new());
        if wire::encode_vnet(&header[..self.header_bytes], frame, &mut message).is_ok() {
            self.outbox.push(message.freeze());
        }
    }

    fn diverged(&mut self, cause: &str) {
        self.cause = Some(cause.to_owned());
        match self.ports.get(NOTIFY_DEV) {
            None => {
                tracing::warn!(epoch = self.epoch, cause, "held until a checkpoint, and no notify_dev to ask for one")
            }
            Some(Port { peer: None, .. }) => {
                tracing::warn!(epoch = self.epoch, cause, "held until a checkpoint, and nobody at notify_dev");
                self.owed = true;
            }
            Some(_) => {
                tracing::info!(epoch = self.epoch, cause, "asked for a checkpoint");
                self.say(notify::DO_CHECKPOINT);
            }
        }
    }

    fn say(&mut self, word: &[u8]) {
        self.notify.say(&mut self.ports[NOTIFY_DEV], word);
    }

    fn write(&mut self) -> bool {
        let port = &mut self.ports[OUTDEV];
        let Some(peer) = &mut port.peer else { return false };
        match self.outbox.write(peer) {
            Ok(written) => written,
            Err(error) => {
                port.hang_up(&error);
                true
            }
        }
    }

    /// Until something can be read or written, it is time, or somebody wakes us.
    fn wait(&mut self) -> io::Result<()> {
        let (in_, none) = (PollFlags::IN, PollFlags::empty());
        let open = !self.outbox.is_full();
        let wanted = [
            if open && self.comparator.ready() { in_ } else { none },
            if open { in_ } else { none },
            if self.outbox.is_empty() { in_ } else { in_ | PollFlags::OUT },
            if self.notify.is_empty() { in_ } else { in_ | PollFlags::OUT },
        ];
        let begun = self.idle_since.take().unwrap_or_else(Instant::now);
        let until = self.comparator.poll_timeout().map(|at| at.since(engine_clock()));
        let gone;
        {
            let mut fds = vec![PollFd::from_borrowed_fd(self.wake.fd(), in_)];
            let mut outdev = None;
            for (number, (port, flags)) in self.ports.iter().zip(wanted).enumerate() {
                // Without flags it would say only that the peer has left, again and again.
                if let (Some(peer), false) = (&port.peer, flags.is_empty()) {
                    if number == OUTDEV {
                        outdev = Some(fds.len());
                    }
                    fds.push(PollFd::from_borrowed_fd(peer.as_fd(), flags));
                }
            }
            // Up to the next microsecond, or it would be asked in vain.
            let left = until.map(|until| Timespec::try_from(until + Duration::from_micros(1)).unwrap_or_default());
            look(&mut fds, left.as_ref())?;
            self.quick = begun.elapsed() < AWAKE;
            self.turn = 0;
            gone = outdev.and_then(|at| fds.get(at)).is_some_and(|fd| fd.revents().intersects(!PollFlags::OUT));
        }
        if gone {
            self.look_at_outdev();
        }
        Ok(())
    }

    /// Nobody has anything to say on outdev: it is read to learn that the peer has left before a frame is lost on it.
    fn look_at_outdev(&mut self) {
        let port = &mut self.ports[OUTDEV];
        let Some(peer) = &port.peer else { return };
        match rustix::io::read(peer, &mut [0; 4096]) {
            Ok(0) => port.hang_up(&"the peer left"),
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => port.hang_up(&error),
        }
    }

    /// As when QEMU's object is deleted: whoever ends the comparator wants the guest to speak for itself.
    fn end(mut self) -> io::Result<()> {
        self.judge_apart();
        self.comparator.release_all();
        self.outputs();
        let begun = Instant::now();
        while !self.outbox.is_empty() && self.ports[OUTDEV].peer.is_some() && begun.elapsed() < END {
            if !self.write()
                && let Some(peer) = &self.ports[OUTDEV].peer
            {
                let mut fds = [PollFd::from_borrowed_fd(peer.as_fd(), PollFlags::OUT)];
                poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }))?;
            }
        }
        match self.outbox.waiting_bytes() {
            0 => Ok(()),
            bytes => Err(io::Error::other(format!(
                "{bytes} bytes of the primary's frames are lost: outdev did not take them"
            ))),
        }
    }

    fn status(&self) -> serde_json::Value {
        let stats = self.comparator.stats();
        let connected: HashMap<_, _> = self.ports.iter().map(|port| (port.name, port.peer.is_some())).collect();
        serde_json::json!({
            "checkpoints": self.epoch,
            "wanted": self.cause,
            "connected": connected,
            "compared": stats.compared,
            "released": stats.released,
            "acknowledged": stats.acknowledged,
            "held": stats.held,
            "secondary": stats.secondary,
            "dropped_bound": stats.dropped_bound,
            "dropped_unparsable": stats.dropped_unparsable,
            "diverged": stats.diverged,
            "currently_held": stats.currently_held,
            "currently_held_bytes": stats.currently_held_bytes,
            "currently_secondary_bytes": stats.currently_secondary_bytes,
            "outdev_waiting_bytes": self.outbox.waiting_bytes(),
            "flows": stats.flows,
            "diverging": self.comparator.flows(FLOWS_MAX).into_iter().map(Flow::from).collect::<Vec<_>>(),
        })
    }
}

/// How many of these have something, when one has or the time is over.
pub(in crate::daemon) fn look(fds: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> io::Result<usize> {
    match poll(fds, timeout) {
        Err(rustix::io::Errno::INTR) => Ok(0),
        looked => Ok(looked?),
    }
}

/// Reads a port once; whether something happened.
pub(in crate::daemon) fn read(port: &mut Port, intake: &mut Intake, each: impl FnMut(Frame)) -> bool {
    let Some(peer) = &port.peer else { return false };
    match intake.read(peer, each) {
        Ok(Taken::Nothing) => return false,
        Ok(Taken::Some) => {}
        Ok(Taken::Closed(0)) => port.hang_up(&"the peer left"),
        Ok(Taken::Closed(bytes)) => {
            port.hang_up(&format!("the peer left inside a frame ({bytes} bytes of it had come)"))
        }
        Err(error) => port.hang_up(&error),
    }
    true
}
