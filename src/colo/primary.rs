//! The primary: whose guest the world sees.
//!
//! ```text
//! in           | on                            | does                                             | goes to
//! -------------|-------------------------------|--------------------------------------------------|------------
//! Copying      | memory and disk are copied    | Capture                                          | Sending(first)
//! Running      | a request · delay over        | CHECKPOINT_REQUEST                               | WaitReply
//! WaitReply    | CHECKPOINT_REPLY              | VMSTATE_SEND, Capture (suspend, mark, copy out)  | Sending
//! Sending      | captured                      | SendPages                                        | Sending
//! Sending      | captured and disk drained     | SendDevices (the checkpoint is whole)            | WaitReceived
//! WaitReceived | VMSTATE_RECEIVED              | Release the epoch, AllowDisk for the next        | WaitLoaded
//! WaitReceived | CHECKPOINT_READY (first only) | Release the epoch, AllowDisk for the next        | Running
//! WaitLoaded   | VMSTATE_LOADED                | ResumeGuest (classic order only)                 | Running
//! Copying      | peer lost · failover          | GoOn unprotected: the peer cannot have the state | Exited
//! these six    | unprotect                     | Dismiss; no checkpoint begins or goes on         | Dismissing
//! Dismissing   | given up                      | GoOn in the generation it has                    | Exited
//! Dismissing   | no word within the deadline: the peer is lost
//! any other    | peer lost · failover          | PauseGuest, arbitrate                            | Arbitrating
//! Arbitrating  | Go                            | GoOn alone, releasing what is held               | Exited
//! Arbitrating  | Stop                          | StopGuest                                        | Exited
//! Arbitrating  | Hold                          | (the guest stays paused)                         | Held
//! Held         | Go · Stop · the operator      | as from Arbitrating                              | Exited
//! WaitReply, WaitReceived, WaitLoaded, Sending | no progress within the deadline: the peer hangs, and is lost
//! ```
//!
//! Three traps. Output of epoch N leaves on VMSTATE_RECEIVED and not one message earlier (QEMU before 5.1 released
//! it before any state had moved). And a disk write of epoch N+1 must not reach the secondary before it sealed
//! epoch N: it waits for the same message. qemu `migration/colo.c` colo_do_checkpoint_transaction. And a primary that
//! dismisses its secondary keeps to both until that has given up: hung up on one word earlier, it would claim.

use super::arbiter::{Answer, Ask, Claim, Decision, Policy};
use super::failover::{ExitReason, FailoverStatus};
use super::hello::{Mode, ResumeOrder};
use super::message::Message;
use super::parting::Parting;
use super::{Cause, Exit, Loss, Violation};
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use std::collections::VecDeque;
use std::time::Duration;

/// How the primary paces and bounds its work.
#[derive(Clone, Debug)]
pub struct Config {
    /// COLO or Remus.
    pub mode: Mode,
    /// When the guest runs on after a capture.
    pub resume: ResumeOrder,
    /// Longest time between two checkpoints (`x-checkpoint-delay`; the Remus interval).
    pub checkpoint_delay: Duration,
    /// Shortest time between the starts of two checkpoints, whatever asks for them.
    pub checkpoint_min_interval: Duration,
    /// How long a peer may go without progress inside a checkpoint before it counts as lost.
    pub peer_deadline: Duration,
    /// What must be won before going on alone.
    pub policy: Policy,
    /// How long to ask a silent arbiter before reporting that the guest is held.
    pub arbiter_deadline: Duration,
    /// This host and the generation it holds.
    pub claim: Claim,
    /// Whether the guest's packets wait for nothing. It gives the first rule up: for measuring (`xl remus -n`).
    pub release_at_once: bool,
    /// The share of its time that a guest in lock-step must run: while it runs for less, because differences ask for one
    /// checkpoint after the other, output is buffered as in Remus ([`super::fallback`]). 0: never.
    pub min_run_percent: u8,
}

impl Config {
    /// The field's defaults: libxl's 5 s for COLO (`COLO_PROXY_CHECKPOINT_TIMEOUT`), xl's 200 ms for Remus.
    #[must_use]
    pub fn new(mode: Mode, claim: Claim) -> Self {
        Self {
            mode,
            resume: ResumeOrder::default(),
            checkpoint_delay: match mode {
                Mode::Colo => Duration::from_secs(5),
                Mode::Remus => Duration::from_millis(200),
            },
            checkpoint_min_interval: Duration::from_millis(5),
            peer_deadline: Duration::from_secs(10),
            policy: Policy::default(),
            arbiter_deadline: super::arbiter::ARBITER_DEADLINE_DEFAULT,
            claim,
            release_at_once: false,
            min_run_percent: super::fallback::MIN_RUN_PERCENT_DEFAULT,
        }
    }
}

/// Where the primary is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// The first copy is under way; the guest runs unprotected.
    Copying,
    /// Between checkpoints.
    Running,
    /// The secondary is stopping its guest.
    WaitReply,
    /// A captured state is on its way.
    Sending,
    /// The state is out; the secondary does not own it yet, as far as we know.
    WaitReceived,
    /// The secondary owns it and loads it.
    WaitLoaded,
    /// The secondary is told to give the guest up, which runs on here; its output waits as before.
    Dismissing,
    /// The peer is lost; the arbiter is being asked.
    Arbitrating,
    /// Nobody could decide; the guest is paused.
    Held,
    /// Replication is over on this side.
    Exited(Exit),
}

/// What the driver has to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Send a message.
    Send(Message),
    /// Suspend the guest, mark the epoch of packets and disk, copy out dirty pages and device state, and resume
    /// at once if `resume`. Then call [`Primary::handle_captured`].
    Capture {
        /// Whether the guest runs on at once.
        resume: bool,
    },
    /// Send the captured pages.
    SendPages,
    /// Close the pages and send the captured device state.
    SendDevices,
    /// The secondary owns the state that ended `epoch`: release the packets of it and of all before.
    Release {
        /// The epoch the checkpoint ended.
        epoch: u64,
        /// Why the checkpoint was taken; the machine's own may be the next one's by now.
        cause: Cause,
    },
    /// Disk writes of `epoch` may travel.
    AllowDisk {
        /// The epoch after the checkpoint.
        epoch: u64,
    },
    /// Let the guest run.
    ResumeGuest,
    /// Tell the secondary to give the guest up, and its word of it to [`Primary::handle_given_up`].
    Dismiss,
    /// Stop the guest for a decision.
    PauseGuest,
    /// Ask for the next generation, and bring the answer to [`Primary::handle_answer`].
    Ask(Ask),
    /// End replication and run alone: release everything held, detach the disk, log-dirty off, resume.
    GoOn {
        /// The generation in which the guest runs on.
        generation: u64,
    },
    /// Destroy the guest and everything it still wanted to say.
    StopGuest,
}

/// The primary.
#[derive(Debug)]
pub struct Primary {
    config: Config,
    state: State,
    parting: Parting,
    epoch: u64,
    captured: bool,
    drained: bool,
    requested: Option<Cause>,
    cause: Cause,
    last_start: Option<Instant>,
    idle_since: Instant,
    progress_at: Instant,
    dismissed_at: Instant,
    actions: VecDeque<Action>,
}

impl Primary {
    /// A primary whose first copy begins.
    #[must_use]
    pub fn new(now: Instant, config: Config) -> Self {
        Self {
            config,
            state: State::Copying,
            parting: Parting::default(),
            epoch: 0,
            captured: false,
            drained: false,
            requested: None,
            cause: Cause::First,
            last_start: None,
            idle_since: now,
            progress_at: now,
            dismissed_at: now,
            actions: VecDeque::new(),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Where its failover is.
    #[must_use]
    pub fn failover(&self) -> FailoverStatus {
        self.parting.failover()
    }

    /// How many states were captured: the epoch the guest's output belongs to now.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Why the checkpoint under way, or the last one, was taken.
    #[must_use]
    pub fn cause(&self) -> Cause {
        self.cause
    }

    /// Why the peer was lost, once it was.
    #[must_use]
    pub fn loss(&self) -> Option<&Loss> {
        self.parting.loss()
    }

    /// Why nobody could decide, of a guest that is held.
    #[must_use]
    pub fn hold(&self) -> Option<&str> {
        self.parting.hold()
    }

    /// The reason COLO ended with, as COLO_EXIT gives it.
    #[must_use]
    pub fn exit_reason(&self) -> ExitReason {
        self.parting.exit_reason(matches!(self.state, State::Exited(_)))
    }

    /// Whether the secondary owns a state it could go on from: the guest counts as protected.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        match self.state {
            State::Running | State::WaitReply | State::WaitLoaded => true,
            State::Sending | State::WaitReceived => self.epoch > 1,
            _ => false,
        }
    }

    /// Whether the epoch's output is buffered or compared: from the first capture on.
    #[must_use]
    pub fn is_replicating(&self) -> bool {
        self.epoch > 0 && !matches!(self.state, State::Exited(_))
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Running => {
                let delay = self.idle_since + self.config.checkpoint_delay;
                let earliest = self.earliest_start();
                Some(if self.requested.is_some() { earliest } else { delay.max(earliest) })
            }
            State::WaitReply | State::Sending | State::WaitReceived | State::WaitLoaded => {
                Some(self.progress_at + self.config.peer_deadline)
            }
            State::Dismissing => Some(self.dismissed_at + self.config.peer_deadline),
            State::Arbitrating | State::Held => self.parting.poll_timeout(),
            State::Copying | State::Exited(_) => None,
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        match self.state {
            State::Running => self.start_if_due(now),
            State::WaitReply | State::Sending | State::WaitReceived | State::WaitLoaded => {
                if now >= self.progress_at + self.config.peer_deadline {
                    self.handle_loss(now, Loss::Hung { waited: now - self.progress_at });
                }
            }
            State::Dismissing => {
                let waited = now - self.dismissed_at;
                if waited >= self.config.peer_deadline {
                    self.handle_loss(now, Loss::Unconfirmed { waited });
                }
            }
            State::Arbitrating | State::Held => self.arbitrate(now),
            State::Copying | State::Exited(_) => {}
        }
    }

    /// The first copy has converged: memory is nearly, the disk entirely, at the secondary.
    pub fn handle_copied(&mut self, now: Instant) {
        assert_eq!(self.state, State::Copying, "the first copy ends once");
        self.capture(now);
    }

    /// The capture is done.
    pub fn handle_captured(&mut self, now: Instant) {
        if self.state == State::Sending && !self.captured {
            self.captured = true;
            self.progress_at = now;
            self.actions.push_back(Action::SendPages);
            if mutant::active(Mutant::ReleaseBeforeReceived) {
                self.actions.push_back(Action::Release { epoch: self.epoch - 1, cause: self.cause });
            }
            self.send_devices_if_whole(now);
        }
    }

    /// Every disk write of the epoch that was captured has reached the secondary.
    pub fn handle_disk_drained(&mut self, now: Instant) {
        if self.state == State::Sending && !self.drained {
            self.drained = true;
            self.progress_at = now;
            self.send_devices_if_whole(now);
        }
    }

    /// Bytes are moving: the peer does not hang.
    pub fn handle_progress(&mut self, now: Instant) {
        self.progress_at = self.progress_at.max(now);
    }

    /// Longest time between two checkpoints.
    #[must_use]
    pub fn checkpoint_delay(&self) -> Duration {
        self.config.checkpoint_delay
    }

    /// Longest time between two checkpoints from now on.
    pub fn set_checkpoint_delay(&mut self, delay: Duration) {
        self.config.checkpoint_delay = delay;
    }

    /// Somebody wants a checkpoint. Requests coalesce: the first cause counts until the checkpoint starts.
    pub fn request_checkpoint(&mut self, now: Instant, cause: Cause) {
        if matches!(self.state, State::Exited(_) | State::Copying) {
            return;
        }
        // What a checkpoint already captured makes moot must not cause another; what came after its capture must.
        self.requested.get_or_insert(cause);
        if self.state == State::Running {
            self.start_if_due(now);
        }
    }

    /// A message from the secondary.
    pub fn handle_message(&mut self, now: Instant, message: Message) {
        self.progress_at = now;
        match (self.state, message) {
            (State::WaitReply, Message::CheckpointReply) => {
                self.actions.push_back(Action::Send(Message::VmstateSend));
                self.capture(now);
            }
            (State::WaitReceived, Message::VmstateReceived) if self.epoch > 1 => {
                self.owned();
                self.state = State::WaitLoaded;
            }
            (State::WaitReceived, Message::CheckpointReady) if self.epoch == 1 => {
                self.owned();
                self.run(now);
            }
            (State::WaitLoaded, Message::VmstateLoaded) => self.run(now),
            // Words of a peer that is already given up, or is to give up, say nothing.
            (State::Dismissing | State::Arbitrating | State::Held | State::Exited(_), _) => {}
            (state, got) => {
                let violation = Violation::Unexpected { state: format!("{state:?}"), got };
                self.handle_loss(now, Loss::Violation(violation.to_string()));
            }
        }
    }

    /// The guest is to be protected no longer. False when it is not protected, or nobody knows who has it.
    pub fn dismiss(&mut self, now: Instant) -> bool {
        if matches!(self.state, State::Dismissing | State::Arbitrating | State::Held | State::Exited(_)) {
            return false;
        }
        self.dismissed_at = now;
        self.state = State::Dismissing;
        self.actions.push_back(Action::Dismiss);
        if mutant::active(Mutant::GoOnUnconfirmed) {
            self.handle_given_up(now);
        }
        true
    }

    /// The secondary has given the guest up for good. However old the word is, it is true: a claim of it can no longer
    /// come, and the generation in force here stays in force.
    pub fn handle_given_up(&mut self, now: Instant) {
        match self.state {
            State::Dismissing => {
                self.parting.lose(Loss::Dismissed);
                self.state = State::Exited(Exit::Unprotected);
                self.actions.push_back(Action::GoOn { generation: self.config.claim.expected });
            }
            State::Arbitrating | State::Held | State::Exited(_) => {}
            state => self.handle_loss(now, Loss::Violation(format!("gave up, undismissed, in state {state:?}"))),
        }
    }

    /// The peer is lost, or a failover is wanted ([`Loss::Requested`]).
    pub fn handle_loss(&mut self, now: Instant, loss: Loss) {
        match self.state {
            State::Exited(_) | State::Arbitrating | State::Held => {}
            State::Copying | State::Dismissing if self.epoch == 0 => {
                // The secondary has no whole state, so it cannot run, whatever it believes.
                self.parting.lose(loss);
                self.finish(Exit::Unprotected);
                self.actions.push_back(Action::GoOn { generation: self.config.claim.expected });
            }
            _ => {
                self.parting.lose(loss);
                self.state = State::Arbitrating;
                self.actions.push_back(Action::PauseGuest);
                let Config { policy, claim, arbiter_deadline, .. } = &self.config;
                self.parting.begin(now, policy, claim, *arbiter_deadline);
                self.arbitrate(now);
            }
        }
    }

    /// The answer to an [`Action::Ask`].
    pub fn handle_answer(&mut self, now: Instant, answer: Answer) {
        let decision = self.parting.handle_answer(now, answer);
        self.decide(decision);
    }

    /// The operator orders a held guest to go on here.
    pub fn operator_decides(&mut self) -> bool {
        let decision = self.parting.operator_decides();
        let held = decision.is_some();
        self.decide(decision);
        held
    }

    fn earliest_start(&self) -> Instant {
        self.last_start.map_or(Instant::ZERO, |at| at + self.config.checkpoint_min_interval)
    }

    fn start_if_due(&mut self, now: Instant) {
        let over = now >= self.idle_since + self.config.checkpoint_delay;
        if now < self.earliest_start() || !(over || self.requested.is_some()) {
            return;
        }
        self.cause = self.requested.take().unwrap_or(Cause::Delay);
        self.last_start = Some(now);
        self.progress_at = now;
        self.state = State::WaitReply;
        self.actions.push_back(Action::Send(Message::CheckpointRequest));
    }

    fn capture(&mut self, now: Instant) {
        // Whatever asked up to here is answered by this capture.
        self.requested = None;
        (self.captured, self.drained) = (false, false);
        self.epoch += 1;
        self.progress_at = now;
        self.state = State::Sending;
        self.actions.push_back(Action::Capture { resume: self.config.resume == ResumeOrder::AfterCapture });
    }

    fn send_devices_if_whole(&mut self, now: Instant) {
        if self.captured && self.drained {
            self.progress_at = now;
            self.state = State::WaitReceived;
            self.actions.push_back(Action::SendDevices);
        }
    }

    fn owned(&mut self) {
        self.actions.push_back(Action::Release { epoch: self.epoch - 1, cause: self.cause });
        self.actions.push_back(Action::AllowDisk { epoch: self.epoch });
    }

    fn run(&mut self, now: Instant) {
        if self.config.resume == ResumeOrder::AfterLoaded {
            self.actions.push_back(Action::ResumeGuest);
        }
        self.state = State::Running;
        self.idle_since = now;
        self.start_if_due(now);
    }

    fn arbitrate(&mut self, now: Instant) {
        let (ask, decision) = self.parting.poll(now);
        self.actions.extend(ask.map(Action::Ask));
        self.decide(decision);
    }

    fn decide(&mut self, decision: Option<Decision>) {
        if !matches!(self.state, State::Arbitrating | State::Held) {
            return;
        }
        match decision {
            None => {}
            Some(Decision::Go { generation }) => {
                self.finish(Exit::Alone);
                self.actions.push_back(Action::GoOn { generation });
            }
            Some(Decision::Stop { .. }) => {
                self.finish(Exit::Stopped);
                self.actions.push_back(Action::StopGuest);
            }
            Some(Decision::Hold { .. }) => self.state = State::Held,
        }
    }

    fn finish(&mut self, exit: Exit) {
        self.parting.finish();
        self.state = State::Exited(exit);
    }
}
