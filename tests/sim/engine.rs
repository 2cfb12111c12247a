//! What a host does of its own accord: its guest's steps and frames, its background work, its side's effects.

use super::commit::describe;
use super::host::{Input, Role, disk_link};
use super::plan::{A, B, Step};
use super::world::{Event, STREAM, World, tell};
use bytes::{Bytes, BytesMut};
use xen_colo::colo::arbiter::Ask;
use xen_colo::colo::heartbeat::Word;
use xen_colo::colo::hello::Mode;
use xen_colo::colo::message::Message;
use xen_colo::colo::{Exit, Loss, primary as primary_machine, secondary as secondary_machine, stream};
use xen_colo::daemon::pair::{lock, primary, secondary};
use xen_colo::replica::set::Replicas;

/// Frames an engine takes at a time.
const BURST: usize = 64;
/// Bytes of the stream that arrive together.
const SEGMENT_BYTES: u64 = 24 << 10;
/// How often it is looked whether a process that was stopped goes on.
const APPLY_AGAIN_US: u64 = 1000;

impl World {
    /// Has the guest of a host do a step then, unless it does one earlier.
    pub(super) fn guest_at(&mut self, host: usize, at_us: u64) {
        if at_us < self.hosts[host].guest_us {
            self.hosts[host].guest_us = at_us;
            self.at(at_us, Event::Guest(host));
        }
    }

    /// A guest's thread is due.
    pub(super) fn guest_step(&mut self, host: usize) {
        let now = self.now();
        let it = &mut self.hosts[host];
        if it.guest_us > self.now_us {
            return;
        }
        it.guest_us = u64::MAX;
        if it.crashed || it.frozen {
            // A guest that thaws is stepped when its host settles.
            lock(&it.core).poked = true;
            return;
        }
        let runs = lock(&it.core).running;
        if host == B && runs && self.has_let_go() {
            return self.violate("two guests run: the primary has gone on without its secondary");
        }
        let it = &mut self.hosts[host];
        let next = lock(&it.core).step(now);
        if let Some(at) = next {
            let at_us = at.as_micros().max(self.now_us + 1 + self.dice.tail(self.plan.step_us));
            self.guest_at(host, at_us);
        }
        self.schedule(host);
    }

    /// An engine takes its guest's frames.
    pub(super) fn take_frames(&mut self, host: usize) {
        self.hosts[host].frames_us = u64::MAX;
        let it = &self.hosts[host];
        if it.crashed || it.frozen || it.stalled {
            return;
        }
        self.check_lease(host);
        let now = self.now();
        for _ in 0..BURST {
            let it = &mut self.hosts[host];
            if it.crashed || it.frozen || it.stalled || !it.takes_frames() {
                break;
            }
            let taken = lock(&it.core).sent.pop_front();
            let Some((epoch, frame)) = taken else { break };
            if host == A {
                tell!(self, "guest 0 emits in {epoch}: {}", describe(&frame));
                self.commit.emitted(epoch, &frame);
            }
            match &mut it.role {
                Role::Running(_) => self.speak(host, frame),
                Role::Primary(side) => side.handle_guest_frame(now, epoch, frame),
                Role::Secondary(side) => side.handle_guest_frame(now, epoch, frame),
                Role::StandingBy(_) | Role::Nothing => {}
            }
            // The engine flushes after the burst; here after each, so that a fault can come in between.
            self.flush(host);
        }
        self.settle(host);
    }

    /// An engine does a slice of what is to be done in the background.
    pub(super) fn work(&mut self, host: usize) {
        self.hosts[host].work_us = u64::MAX;
        let now = self.now();
        let it = &self.hosts[host];
        if it.crashed || it.frozen || it.stalled {
            return;
        }
        self.check_lease(host);
        let it = &mut self.hosts[host];
        match &mut it.role {
            Role::Primary(side) => {
                side.copy_some(now);
                self.flush(host);
                self.step(Step::CopySlice);
            }
            Role::Secondary(side) => {
                side.work(now);
                let loads_on = side.machine().state() == secondary_machine::State::Loading;
                self.flush(host);
                if loads_on {
                    self.step(Step::MidLoad);
                }
            }
            _ => {}
        }
        self.strike_if_due();
        self.settle(host);
    }

    /// Carries a side's effects to the wires, until there are none or the host is struck.
    pub(super) fn flush(&mut self, host: usize) {
        loop {
            let it = &mut self.hosts[host];
            if it.crashed || it.frozen || it.stalled {
                return;
            }
            match &mut it.role {
                Role::Primary(side) => {
                    let Some(effect) = side.poll_effect() else { return };
                    self.primary_effect(effect);
                }
                Role::Secondary(side) => {
                    let Some(effect) = side.poll_effect() else { return };
                    self.secondary_effect(effect);
                }
                _ => return,
            }
            self.strike_if_due();
        }
    }

    fn primary_effect(&mut self, effect: primary::Effect) {
        use primary::Effect;
        let linked = self.hosts[A].linked;
        match effect {
            Effect::ToNetwork(frame) => self.speak(A, frame),
            Effect::Ask(ask) => self.put_ask(A, ask),
            Effect::Ended { exit, generation } => self.ended(A, exit, generation),
            _ if !linked => {}
            Effect::Message(message) => {
                tell!(self, "host 0 sends {message}");
                let mut bytes = BytesMut::new();
                message.encode(&mut bytes);
                self.stream(bytes);
                self.step(if message == Message::VmstateSend { Step::SendSent } else { Step::RequestSent });
            }
            Effect::Pages(batch) => {
                let mut bytes = BytesMut::new();
                stream::encode_pages(&batch.pfns, &batch.bytes, Some(&mut self.sent_pages), &mut bytes);
                self.stream(bytes);
                let Role::Primary(side) = &mut self.hosts[A].role else { return };
                side.recycle(batch);
                if side.machine().epoch() > 0 {
                    self.step(Step::PagesSent);
                }
            }
            Effect::GuestRests => {
                let mut bytes = BytesMut::new();
                stream::encode_guest_rests(&mut bytes);
                self.stream(bytes);
            }
            Effect::Carried(carried) => {
                let mut bytes = BytesMut::new();
                stream::encode_carried(&carried, &mut bytes);
                self.stream(bytes);
            }
            Effect::Output(frames) => {
                let mut bytes = BytesMut::new();
                stream::encode_output(&frames, &mut bytes);
                self.stream(bytes);
            }
            Effect::Devices(blob) => {
                let mut bytes = BytesMut::new();
                stream::encode_pages_end(&mut bytes);
                stream::encode_device_state(&blob, &mut bytes);
                self.stream(bytes);
                self.step(Step::DevicesSent);
            }
            Effect::ToSecondary { epoch, frame } => self.send_packet(A, epoch, frame),
            Effect::Dismiss => {
                self.say(A, Word::Dismissal);
                self.step(Step::DismissSaid);
            }
            Effect::DiskWrite { disk, seq, offset, payload } => {
                let bytes = payload.wire_bytes() as usize;
                self.send(disk_link(disk), A, bytes, Input::DiskWrite { disk, seq, offset, payload });
                self.step(Step::DiskSent);
            }
        }
    }

    fn secondary_effect(&mut self, effect: secondary::Effect) {
        use secondary::Effect;
        let linked = self.hosts[B].linked;
        match effect {
            Effect::ToNetwork(frame) => self.speak(B, frame),
            Effect::Ask(ask) => self.put_ask(B, ask),
            Effect::ApplyDisk(replicas) => {
                let us = 1 + self.dice.tail(self.plan.work_us);
                self.after(us, Event::Apply(B, replicas));
            }
            Effect::Ended { exit, generation } => self.ended(B, exit, generation),
            _ if !linked => {}
            Effect::Message(message) => {
                tell!(self, "host 1 sends {message}");
                self.send(STREAM, B, 4, Input::Message(message));
                self.step(match message {
                    Message::CheckpointReply => Step::ReplySent,
                    Message::VmstateReceived => Step::ReceivedSent,
                    Message::VmstateLoaded => Step::LoadedSent,
                    _ => Step::ReadySent,
                });
            }
            Effect::GivenUp => {
                self.say(B, Word::GivenUp);
                self.step(Step::GivenUpSaid);
            }
            Effect::ToPrimary { epoch, frame } => {
                tell!(self, "host 1 says in {epoch}: {}", describe(&frame));
                self.commit.said(epoch, &frame);
                self.send_packet(B, epoch, frame);
                self.step(Step::PacketSent);
            }
        }
    }

    /// Sends bytes of the stream, cut where the network cuts them.
    fn stream(&mut self, bytes: BytesMut) {
        let mut bytes = bytes.freeze();
        while !bytes.is_empty() {
            let len = 1 + self.dice.below(SEGMENT_BYTES) as usize;
            let segment = bytes.split_to(len.min(bytes.len()));
            self.send(STREAM, A, segment.len(), Input::Stream(segment));
        }
    }

    /// The thread that waits for the media is none of the engine's: it goes on while that hangs.
    pub(super) fn apply_disk(&mut self, host: usize, replicas: Replicas) {
        let it = &self.hosts[host];
        if it.crashed {
            return;
        }
        if it.frozen {
            return self.after(APPLY_AGAIN_US, Event::Apply(host, replicas));
        }
        let applied = replicas.apply_round().map_err(|error| error.to_string());
        self.input(host, Input::DiskApplied(replicas, applied));
    }

    fn put_ask(&mut self, host: usize, ask: Ask) {
        match ask {
            Ask::Arbiter(claim) => self.ask(host, claim),
            Ask::Script(..) => self.violate("nobody configured a script"),
        }
    }

    fn ended(&mut self, host: usize, exit: Exit, generation: u64) {
        tell!(self, "host {host} ends: {exit:?} in generation {generation}");
        self.close_links(host);
        let won = self.granted.is_some_and(|(holder, _)| holder == host);
        if exit == Exit::Alone && !won {
            self.violate(format!("host {host} goes on alone and has not won"));
        }
        let claims = matches!(&self.hosts[B].role, Role::Secondary(side) if side.machine().epoch() > 0)
            && self.hosts[B].has_state();
        if exit == Exit::Unprotected && claims {
            self.violate("the primary goes on without a generation, and its secondary has not given up");
        }
        if exit == Exit::Failed {
            self.violate(format!("host {host} failed without a reason"));
        }
    }

    /// The operator ends the protection.
    pub(super) fn unprotect(&mut self) {
        let now = self.now();
        let it = &mut self.hosts[A];
        if it.crashed || it.frozen || it.stalled {
            return;
        }
        self.check_lease(A);
        let Role::Primary(side) = &mut self.hosts[A].role else { return };
        let state = side.machine().state();
        if side.dismiss(now) {
            tell!(self, "the operator ends the protection in state {state:?}");
            self.saw(match state {
                primary_machine::State::Copying => "dismissed while copying",
                primary_machine::State::Running => "dismissed between checkpoints",
                _ => "dismissed within a checkpoint",
            });
        }
        self.flush(A);
        self.strike_if_due();
        self.settle(A);
    }

    fn say(&mut self, host: usize, word: Word) {
        tell!(self, "host {host} says {word:?}");
        self.hosts[host].heartbeat.iter_mut().for_each(|heartbeat| heartbeat.say(word));
    }

    /// What the peer has said with its beats reaches the engine.
    pub(super) fn words(&mut self, host: usize) {
        let Some(word) = self.hosts[host].heartbeat.as_mut().and_then(|heartbeat| heartbeat.poll_word()) else {
            return;
        };
        self.check_lease(host);
        let now = self.now();
        match (&mut self.hosts[host].role, word) {
            (Role::Primary(side), Word::GivenUp) => {
                side.handle_given_up(now);
                self.flush(host);
                self.step(Step::GivenUpGot);
            }
            (Role::Secondary(side), Word::Dismissal) => side.handle_dismissal(now),
            _ => {}
        }
        self.strike_if_due();
        self.settle(host);
    }

    /// Whether the primary goes on, alone, in the generation it had.
    fn has_let_go(&self) -> bool {
        !self.hosts[A].crashed
            && matches!(&self.hosts[A].role, Role::Primary(side)
                if side.machine().state() == primary_machine::State::Exited(Exit::Unprotected))
    }

    /// What was held for a secondary that was let go has left: nothing of it is lost.
    pub(super) fn check_released(&mut self) {
        let it = &self.hosts[A];
        if self.has_let_go() && !it.frozen && !it.stalled && !self.commit.is_empty() {
            self.violate("the primary goes on, and frames of its guest have not left");
        }
    }

    /// A frame leaves a host: the moment rule 1 and rule 3 are about.
    fn speak(&mut self, host: usize, frame: Bytes) {
        let detection_us = 3 * self.plan.beat_us;
        match self.granted {
            Some((holder, at_us))
                if holder != host && self.now_us > at_us + detection_us && !self.hosts[host].leaving =>
            {
                self.violate(format!("host {host} speaks although host {holder} has won"));
            }
            None if host == B => self.violate("the secondary speaks and has not won"),
            _ => {}
        }
        if host == A {
            let bound = self.hosts[A].is_replicating();
            let owned = match &self.hosts[B].role {
                Role::Secondary(side) if bound => Some(side.machine().epoch()),
                _ => None,
            };
            if let Err(why) = self.commit.left(&frame, owned) {
                self.violate(why);
            }
        }
        self.transmit(host, frame);
        if host == A && self.hosts[A].is_replicating() {
            self.step(Step::FrameSent);
        }
    }

    /// The operator orders a held guest to go on; false when it is not held.
    pub(super) fn operator_decides(&mut self, host: usize) -> bool {
        let now = self.now();
        if self.hosts[host].crashed {
            return false;
        }
        // Noted first: the host acts within the call.
        let before = self.granted.replace((host, self.now_us));
        let decided = match &mut self.hosts[host].role {
            Role::Primary(side) => side.operator_decides(now),
            Role::Secondary(side) => side.operator_decides(now),
            _ => false,
        };
        if decided {
            self.settle(host);
        } else {
            self.granted = before;
        }
        decided
    }

    /// Notes how the run ended.
    pub(super) fn note_outcomes(&mut self) {
        use primary_machine::State as P;
        use secondary_machine::State as S;
        self.saw(match self.plan.mode {
            Mode::Colo => "colo",
            Mode::Remus => "remus",
        });
        if let Role::Primary(side) = &self.hosts[A].role {
            let checkpoints: u64 = side.stats().checkpoints.values().sum();
            *self.report.seen.entry("checkpoints").or_default() += checkpoints;
            let causes: Vec<_> = side.stats().checkpoints.keys().copied().collect();
            let (state, let_go) = (side.machine().state(), side.machine().loss() == Some(&Loss::Dismissed));
            for cause in causes {
                self.saw(cause_name(cause));
            }
            if !self.hosts[A].crashed {
                match state {
                    P::Exited(Exit::Alone) => self.saw("primary alone"),
                    P::Exited(Exit::Stopped) => self.saw("primary stopped"),
                    P::Exited(Exit::Unprotected) if let_go => {
                        self.saw("primary let its secondary go");
                    }
                    P::Exited(Exit::Unprotected) => self.saw("primary unprotected"),
                    P::Held => self.saw("primary held"),
                    _ => {}
                }
            }
        }
        if let Role::Secondary(side) = &self.hosts[B].role {
            let state = side.machine().state();
            if !self.hosts[B].crashed {
                match state {
                    S::Exited(Exit::Alone) => self.saw("secondary took over"),
                    S::Exited(Exit::Stopped) => self.saw("secondary stopped"),
                    S::Exited(Exit::Dismissed) => self.saw("secondary dismissed"),
                    S::Exited(Exit::NoState) => self.saw("secondary without a state"),
                    S::Held => self.saw("secondary held"),
                    _ => {}
                }
            }
        }
    }
}

fn cause_name(cause: xen_colo::colo::Cause) -> &'static str {
    use xen_colo::colo::Cause;
    match cause {
        Cause::First => "cause first",
        Cause::Delay => "cause delay",
        Cause::PayloadDiffers => "cause payload-differs",
        Cause::Aged => "cause aged",
        Cause::OneSided => "cause one-sided",
        Cause::Reused => "cause reused",
        Cause::OutputWaits => "cause output-waits",
        Cause::PacketBound => "cause packet-bound",
        Cause::DiskBound => "cause disk-bound",
        Cause::Unparsable => "cause unparsable",
        Cause::MirrorOverflow => "cause mirror-overflow",
        Cause::PacketLink => "cause packet-link",
        Cause::FramesLost => "cause frames-lost",
        Cause::Command => "cause command",
    }
}
