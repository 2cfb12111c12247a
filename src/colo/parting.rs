//! What both sides do alike when a pair ends: remember why, ask who goes on, and walk QEMU's failover states.
//!
//! ```text
//!  lose(why) ──▶ begin ──▶ asking ── decision ──▶ finish
//!     └─ while a checkpoint loads: postpone (relaunch), begin when it is loaded
//! ```
//!
//! The sides differ in *when* they part and in what going on means; that stays in their own tables.

use super::Loss;
use super::arbiter::{Answer, Arbitration, Ask, Claim, Decision, Policy};
use super::failover::{ExitReason, Failover, FailoverStatus};
use crate::clock::Instant;
use std::time::Duration;

/// The end of a pair, on one side.
#[derive(Debug, Default)]
pub(super) struct Parting {
    failover: Failover,
    loss: Option<Loss>,
    hold: Option<String>,
    arbitration: Option<Arbitration>,
    give_way: Duration,
}

impl Parting {
    pub(super) fn failover(&self) -> FailoverStatus {
        self.failover.status()
    }

    pub(super) fn loss(&self) -> Option<&Loss> {
        self.loss.as_ref()
    }

    pub(super) fn hold(&self) -> Option<&str> {
        self.hold.as_deref()
    }

    /// The reason COLO_EXIT gives: decided by whether the side has exited, and by what made it.
    pub(super) fn exit_reason(&self, exited: bool) -> ExitReason {
        match &self.loss {
            None => ExitReason::None,
            Some(_) if !exited => ExitReason::Processing,
            Some(Loss::Requested | Loss::Dismissed) => ExitReason::Request,
            Some(_) => ExitReason::Error,
        }
    }

    /// Remembers why the peer is lost; the first reason stays.
    pub(super) fn lose(&mut self, loss: Loss) {
        self.loss.get_or_insert(loss);
    }

    /// Lets the peer ask first from now on.
    pub(super) fn give_way(&mut self, delay: Duration) {
        self.give_way = delay;
    }

    /// Puts the failover off until the checkpoint that is loading is loaded.
    pub(super) fn postpone(&mut self) {
        self.failover.begin();
        self.failover.advance(FailoverStatus::Relaunch);
    }

    /// Whether a failover was put off.
    pub(super) fn is_postponed(&self) -> bool {
        self.failover.status() == FailoverStatus::Relaunch
    }

    /// Begins the failover, and the arbitration with it.
    pub(super) fn begin(&mut self, now: Instant, policy: &Policy, claim: &Claim, deadline: Duration) {
        if self.is_postponed() {
            self.failover.advance(FailoverStatus::None);
        }
        self.failover.begin();
        let arbitration = Arbitration::new(now, policy.clone(), claim.clone(), deadline);
        self.arbitration = Some(arbitration.giving_way(self.give_way));
    }

    /// What is to be asked now, and the decision that needs nobody's answer.
    pub(super) fn poll(&mut self, now: Instant) -> (Option<Ask>, Option<Decision>) {
        let Some(arbitration) = self.arbitration.as_mut() else { return (None, None) };
        let ask = arbitration.poll_ask(now);
        (ask, arbitration.poll_decision(now).and_then(|decision| self.note(decision)))
    }

    pub(super) fn handle_answer(&mut self, now: Instant, answer: Answer) -> Option<Decision> {
        let decision = self.arbitration.as_mut()?.handle_answer(now, answer)?;
        self.note(decision)
    }

    /// The operator's decision, of a guest that is held.
    pub(super) fn operator_decides(&mut self) -> Option<Decision> {
        self.hold.as_ref()?;
        self.arbitration.as_ref().map(Arbitration::operator_decides)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.arbitration.as_ref().and_then(Arbitration::poll_timeout)
    }

    /// The failover is over, whatever came of it; without an arbitration when there was nothing to arbitrate.
    pub(super) fn finish(&mut self) {
        if self.failover.status() == FailoverStatus::None {
            self.failover.begin();
        }
        self.failover.advance(FailoverStatus::Completed);
        (self.arbitration, self.hold) = (None, None);
    }

    fn note(&mut self, decision: Decision) -> Option<Decision> {
        if let Decision::Hold { why } = &decision {
            self.hold = Some(why.clone());
        }
        Some(decision)
    }
}
