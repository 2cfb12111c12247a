//! The secondary: who goes on when the primary does not.
//!
//! ```text
//! in           | on                         | does                                         | goes to
//! -------------|----------------------------|----------------------------------------------|------------
//! Joining      | first state whole          | Seal                                         | Receiving
//! Running      | CHECKPOINT_REQUEST         | PauseGuest (if it runs), CHECKPOINT_REPLY    | WaitVmstate
//! WaitVmstate  | VMSTATE_SEND               | (pages are staged; the guest is untouched)   | Receiving
//! Receiving    | whole                      | Seal                                         | Receiving
//! Receiving    | sealed                     | VMSTATE_RECEIVED (not the first), Apply      | Loading
//! Receiving    | sealing failed             | (never owned: the primary has the guest)     | Exited(Failed)
//! Receiving    | the guest is to rest       | (nothing yet)                                | Receiving
//! Loading      | applied                    | RunGuest (COLO, unless it is to rest), CHECKPOINT_READY or LOADED | Running
//! Loading      | applying failed            | StopGuest                                    | Exited(Failed)
//! Joining      | peer lost · failover       | StopGuest: there is no state to go on from   | Exited(NoState)
//! Running, WaitVmstate, Receiving | peer lost · failover | DropStaged, PauseGuest, arbitrate   | Arbitrating
//! Loading      | peer lost · failover       | (relaunch: the load is finished first)       | Loading
//! Loading      | applied, relaunch pending  | arbitrate                                    | Arbitrating
//! Arbitrating  | Go                         | TakeOver                                     | Exited(Alone)
//! Arbitrating  | Stop                       | StopGuest                                    | Exited(Stopped)
//! Arbitrating  | Hold                       | (the guest stays paused)                     | Held
//! all but the parted      | a disk is lost             | DropStaged, StopGuest: nobody can go on from here | Exited(Failed)
//! all but the parted      | dismissed    | DropStaged, GiveUp (and say so)              | Dismissed
//! Dismissed    | peer lost · no end within the deadline | StopGuest                      | Exited(Dismissed)
//! WaitVmstate, Receiving | no progress within the deadline: the peer hangs, and is lost
//! ```
//!
//! VMSTATE_RECEIVED is the commit point. Before it a takeover goes *back*: what was staged is dropped, the guest
//! goes on from its own last state. After it a takeover goes *forward*: the load is finished first, because the
//! primary may already have released output that only the new state explains. The first state is owned when
//! CHECKPOINT_READY says so, after it is loaded; a takeover inside that load goes forward as well.
//!
//! From Dismissed no arrow leads to Arbitrating. That is all that lets the primary go on without a new generation, so
//! the word that this side has given up is sent from there, and once it is sent whatever happens to the link is its end.
//! qemu `migration/colo.c` colo_incoming_process_checkpoint.

use super::arbiter::{Answer, Ask, Claim, Decision, Policy};
use super::failover::{ExitReason, FailoverStatus};
use super::hello::Mode;
use super::message::Message;
use super::parting::Parting;
use super::{Exit, Loss, Violation};
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use std::collections::VecDeque;
use std::time::Duration;

/// How the secondary decides and bounds its waits.
#[derive(Clone, Debug)]
pub struct Config {
    /// COLO or Remus.
    pub mode: Mode,
    /// How long the primary may go without progress inside a checkpoint before it counts as lost.
    pub peer_deadline: Duration,
    /// What must be won before taking over.
    pub policy: Policy,
    /// How long to ask a silent arbiter before reporting that the guest is held.
    pub arbiter_deadline: Duration,
    /// This host, and the generation the primary holds.
    pub claim: Claim,
}

impl Config {
    /// Defaults for a mode.
    #[must_use]
    pub fn new(mode: Mode, claim: Claim) -> Self {
        Self {
            mode,
            peer_deadline: Duration::from_secs(10),
            policy: Policy::default(),
            arbiter_deadline: super::arbiter::ARBITER_DEADLINE_DEFAULT,
            claim,
        }
    }
}

/// Where the secondary is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// The first state is arriving.
    Joining,
    /// Between checkpoints; under COLO the guest runs.
    Running,
    /// The guest is stopped; the checkpoint has not begun.
    WaitVmstate,
    /// The checkpoint is being staged.
    Receiving,
    /// The checkpoint is owned and being loaded.
    Loading,
    /// The guest is given up for good; the primary has been told, and is to hang up.
    Dismissed,
    /// The primary is lost; the arbiter is being asked.
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
    /// Stop the guest.
    PauseGuest,
    /// Let the guest run.
    RunGuest,
    /// Make the disk's pending epoch the checkpoint, and check the staged state; then
    /// [`Secondary::handle_sealed`]. Nothing is owned yet.
    Seal,
    /// Load the staged state into the guest, flip the overlays, empty the packet queues; then
    /// [`Secondary::handle_applied`]. May be done in slices.
    Apply,
    /// Forget what was staged.
    DropStaged,
    /// Ask for the next generation, and bring the answer to [`Secondary::handle_answer`].
    Ask(Ask),
    /// Become the guest's host: keep the disk's active layer, refuse the old generation, run, announce.
    TakeOver {
        /// The generation won.
        generation: u64,
    },
    /// Stop the guest for good, and tell the primary that it is given up.
    GiveUp,
    /// Destroy the guest.
    StopGuest,
}

/// The secondary.
#[derive(Debug)]
pub struct Secondary {
    config: Config,
    state: State,
    parting: Parting,
    epoch: u64,
    first: bool,
    /// The guest is not needed in the epoch that the checkpoint under way begins.
    rests: bool,
    progress_at: Instant,
    dismissed_at: Instant,
    actions: VecDeque<Action>,
}

impl Secondary {
    /// A secondary that waits for the first state.
    #[must_use]
    pub fn new(now: Instant, config: Config) -> Self {
        Self {
            config,
            state: State::Joining,
            parting: Parting::default(),
            epoch: 0,
            first: true,
            rests: false,
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

    /// How many states it owns: the epoch its guest's output belongs to.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Why the primary was lost, once it was.
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

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::WaitVmstate | State::Receiving => Some(self.progress_at + self.config.peer_deadline),
            State::Dismissed => Some(self.dismissed_at + self.config.peer_deadline),
            State::Arbitrating | State::Held => self.parting.poll_timeout(),
            State::Joining | State::Running | State::Loading | State::Exited(_) => None,
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        match self.state {
            State::WaitVmstate | State::Receiving if now >= self.progress_at + self.config.peer_deadline => {
                self.handle_loss(now, Loss::Hung { waited: now - self.progress_at });
            }
            State::Dismissed if now >= self.dismissed_at + self.config.peer_deadline => self.leave(),
            State::Arbitrating | State::Held => self.arbitrate(now),
            _ => {}
        }
    }

    /// Bytes are arriving: the peer does not hang.
    pub fn handle_progress(&mut self, now: Instant) {
        self.progress_at = self.progress_at.max(now);
    }

    /// A message from the primary.
    pub fn handle_message(&mut self, now: Instant, message: Message) {
        self.progress_at = now;
        match (self.state, message) {
            (State::Running, Message::CheckpointRequest) => {
                if self.config.mode == Mode::Colo && !self.rests {
                    self.actions.push_back(Action::PauseGuest);
                }
                self.rests = false;
                self.actions.push_back(Action::Send(Message::CheckpointReply));
                self.state = State::WaitVmstate;
            }
            (State::WaitVmstate, Message::VmstateSend) => self.state = State::Receiving,
            (State::Dismissed | State::Arbitrating | State::Held | State::Exited(_), _) => {}
            (state, got) => {
                let violation = Violation::Unexpected { state: format!("{state:?}"), got };
                self.handle_loss(now, Loss::Violation(violation.to_string()));
            }
        }
    }

    /// The guest need not run in the epoch that the checkpoint under way begins: the primary's output waits for
    /// checkpoints alone.
    pub fn handle_rest(&mut self) {
        self.rests = matches!(self.state, State::Joining | State::Receiving);
    }

    /// Pages and device state of a checkpoint are complete.
    pub fn handle_whole(&mut self, now: Instant) {
        self.progress_at = now;
        match self.state {
            State::Joining | State::Receiving => {
                self.state = State::Receiving;
                self.actions.push_back(Action::Seal);
            }
            State::Dismissed | State::Arbitrating | State::Held | State::Exited(_) => {}
            state => self.handle_loss(now, Loss::Violation(format!("device state in state {state:?}"))),
        }
    }

    /// The answer to [`Action::Seal`]. An error means the checkpoint can never be owned here.
    pub fn handle_sealed(&mut self, now: Instant, sealed: Result<(), String>) {
        // A loss in between has already dropped the checkpoint.
        if self.state != State::Receiving {
            return;
        }
        match sealed {
            Ok(()) => {
                self.epoch += 1;
                self.progress_at = now;
                self.state = State::Loading;
                if !self.first {
                    self.actions.push_back(Action::Send(Message::VmstateReceived));
                }
                self.actions.push_back(Action::Apply);
            }
            Err(why) => self.fail(why),
        }
    }

    /// The answer to [`Action::Apply`].
    pub fn handle_applied(&mut self, now: Instant, applied: Result<(), String>) {
        if self.state != State::Loading {
            return;
        }
        if let Err(why) = applied {
            // Half of the new state is in the guest and the old one is gone: there is nothing to go on from.
            self.fail(why);
            return;
        }
        self.progress_at = now;
        if self.parting.is_postponed() {
            self.first = false;
            self.begin_failover(now);
            return;
        }
        if self.config.mode == Mode::Colo && !self.rests {
            self.actions.push_back(Action::RunGuest);
        }
        let done = if self.first { Message::CheckpointReady } else { Message::VmstateLoaded };
        self.actions.push_back(Action::Send(done));
        self.first = false;
        self.state = State::Running;
    }

    /// From now on, should the pair part, the primary may ask the arbiter first for this long: this side could go
    /// on, but not for long (its disk takes no more writes, for one).
    pub fn give_way(&mut self, delay: Duration) {
        self.parting.give_way(delay);
    }

    /// A disk of the guest does not hold what was written to it: the primary has the guest, or nobody.
    pub fn handle_disk_lost(&mut self, why: String) {
        if !matches!(self.state, State::Dismissed | State::Exited(_)) {
            self.fail(why);
        }
    }

    /// The primary ends the protection. A side that has lost it, or is to take over, has parted already.
    pub fn handle_dismissal(&mut self, now: Instant) {
        match self.state {
            State::Dismissed | State::Arbitrating | State::Held | State::Exited(_) => {}
            State::Loading if self.parting.is_postponed() => {}
            State::Joining | State::Running | State::WaitVmstate | State::Receiving | State::Loading => {
                self.parting.lose(Loss::Dismissed);
                self.dismissed_at = now;
                self.state = State::Dismissed;
                self.actions.push_back(Action::DropStaged);
                self.actions.push_back(Action::GiveUp);
            }
        }
    }

    /// The primary is lost, or a failover is wanted ([`Loss::Requested`]).
    pub fn handle_loss(&mut self, now: Instant, loss: Loss) {
        match self.state {
            State::Dismissed if mutant::active(Mutant::ClaimAfterDismissal) => self.begin_failover(now),
            State::Dismissed if loss != Loss::Requested => self.leave(),
            State::Dismissed | State::Arbitrating | State::Held | State::Exited(_) => {}
            State::Joining => self.no_state(loss),
            State::Receiving if self.first => self.no_state(loss),
            State::Loading if mutant::active(Mutant::NoRelaunch) => {
                self.parting.lose(loss);
                self.begin_failover(now);
            }
            State::Loading => {
                if !self.parting.is_postponed() {
                    self.parting.lose(loss);
                    self.parting.postpone();
                }
            }
            State::Running | State::WaitVmstate | State::Receiving => {
                self.parting.lose(loss);
                self.actions.push_back(Action::DropStaged);
                self.begin_failover(now);
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

    fn leave(&mut self) {
        self.state = State::Exited(Exit::Dismissed);
        self.actions.push_back(Action::StopGuest);
    }

    fn begin_failover(&mut self, now: Instant) {
        self.state = State::Arbitrating;
        self.actions.push_back(Action::PauseGuest);
        let Config { policy, claim, arbiter_deadline, .. } = &self.config;
        self.parting.begin(now, policy, claim, *arbiter_deadline);
        self.arbitrate(now);
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
                self.actions.push_back(Action::TakeOver { generation });
            }
            Some(Decision::Stop { .. }) => {
                self.finish(Exit::Stopped);
                self.actions.push_back(Action::StopGuest);
            }
            Some(Decision::Hold { .. }) => self.state = State::Held,
        }
    }

    fn no_state(&mut self, loss: Loss) {
        self.parting.lose(loss);
        self.finish(Exit::NoState);
        self.actions.push_back(Action::DropStaged);
        self.actions.push_back(Action::StopGuest);
    }

    fn fail(&mut self, why: String) {
        self.parting.lose(Loss::Local(why));
        self.finish(Exit::Failed);
        self.actions.push_back(Action::DropStaged);
        self.actions.push_back(Action::StopGuest);
    }

    fn finish(&mut self, exit: Exit) {
        self.parting.finish();
        self.state = State::Exited(exit);
    }
}
