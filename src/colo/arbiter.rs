//! Arbitration: who may go on alone.
//!
//! A side that believes its peer lost may be the one that is lost. It goes on alone only when it has won the
//! *next generation*, and what it must win that from is its policy:
//!
//! ```text
//! arbiter   compare-and-swap generation g → g+1 at a third place both can reach   (default)
//! script    a fencing hook; exit 0 means the peer is fenced, anything else that it is not
//! hold      nobody but the operator
//! alone     nothing: both sides may run. Unsafe, for tests
//!
//!            ┌───────── won ─────────▶ Go(g+1)     run alone
//!  Asking ───┼───────── lost ────────▶ Stop        stop the guest, say who has it
//!            └─ no answer in time ───▶ Hold ──▶ still asking; or the operator decides
//! ```
//!
//! The trap is the lost reply: an arbiter that granted the claim and whose answer vanished must grant it again to
//! the same holder, or a pair could lose both sides to one dropped packet. [`Register::swap`] is idempotent.

use crate::clock::Instant;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// How long a side asks an arbiter that does not answer before it reports that it holds.
pub const ARBITER_DEADLINE_DEFAULT: Duration = Duration::from_secs(10);
/// Time between two attempts to reach an arbiter.
pub const ARBITER_RETRY: Duration = Duration::from_millis(200);

/// What must be won before going on alone.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    /// The next generation, from the arbiter.
    #[default]
    Arbiter,
    /// The operator's word.
    Hold,
    /// A fencing script's exit code 0.
    Script(PathBuf),
    /// Nothing. Both sides may go on at once: unsafe, for tests.
    Alone,
}

/// Who holds a guest, and in which generation of it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Register {
    /// Counts the holders of the guest; 0 for a guest never protected.
    pub generation: u64,
    /// The host that won it; empty at generation 0.
    pub holder: String,
}

/// A wish to become the holder of the next generation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Claim {
    /// Which guest.
    pub guest: String,
    /// The generation the claimant knows to be in force.
    pub expected: u64,
    /// The claimant.
    pub holder: String,
}

/// The arbiter's answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The claimant holds the generation after the expected one.
    Won {
        /// That generation.
        generation: u64,
    },
    /// Somebody else holds it, or a later one.
    Lost(Register),
}

impl Register {
    /// Compare-and-swap: the claim wins when the expected generation is in force, or when this very claim has won
    /// already.
    pub fn swap(&mut self, claim: &Claim) -> Verdict {
        let next = claim.expected.saturating_add(1);
        if self.generation == claim.expected {
            *self = Self { generation: next, holder: claim.holder.clone() };
        }
        if self.generation == next && self.holder == claim.holder {
            Verdict::Won { generation: next }
        } else {
            Verdict::Lost(self.clone())
        }
    }
}

/// What the driver does for an arbitration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ask {
    /// Put the claim to the arbiter.
    Arbiter(Claim),
    /// Run the fencing script.
    Script(PathBuf, Claim),
}

/// What came of asking.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The arbiter's verdict.
    Verdict(Verdict),
    /// The arbiter did not answer.
    Unreachable(String),
    /// The script said the peer is fenced.
    Fenced,
    /// The script failed, or passed its deadline.
    NotFenced(String),
}

/// The decision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Run alone, in this generation.
    Go {
        /// The generation won.
        generation: u64,
    },
    /// Stop the guest: another host has it.
    Stop {
        /// Who has it, and since which generation.
        holder: Register,
    },
    /// Keep the guest paused.
    Hold {
        /// Why nobody could decide.
        why: String,
    },
}

/// One arbitration, from the loss of a peer to a decision.
#[derive(Debug)]
pub struct Arbitration {
    policy: Policy,
    claim: Claim,
    deadline_at: Option<Instant>,
    ask_at: Option<Instant>,
}

impl Arbitration {
    /// Begins at `now`.
    #[must_use]
    pub fn new(now: Instant, policy: Policy, claim: Claim, deadline: Duration) -> Self {
        Self { policy, claim, deadline_at: Some(now + deadline), ask_at: Some(now) }
    }

    /// Lets the peer ask first, if it is there to ask: for a side that can go on but had better not.
    #[must_use]
    pub fn giving_way(mut self, delay: Duration) -> Self {
        self.ask_at = self.ask_at.map(|at| at + delay);
        self
    }

    /// What is to be asked now, if anything.
    pub fn poll_ask(&mut self, now: Instant) -> Option<Ask> {
        self.ask_at.filter(|at| *at <= now)?;
        self.ask_at = None;
        match &self.policy {
            Policy::Arbiter => Some(Ask::Arbiter(self.claim.clone())),
            Policy::Script(path) => Some(Ask::Script(path.clone(), self.claim.clone())),
            Policy::Hold | Policy::Alone => None,
        }
    }

    /// The decision that needs nobody's answer: under `hold`, under `alone`, and when the deadline passes.
    pub fn poll_decision(&mut self, now: Instant) -> Option<Decision> {
        match self.policy {
            Policy::Alone => Some(self.go()),
            Policy::Hold => {
                self.deadline_at.take()?;
                Some(Decision::Hold { why: "the policy is to wait for the operator".into() })
            }
            Policy::Arbiter | Policy::Script(_) => {
                self.deadline_at.filter(|at| *at <= now)?;
                self.deadline_at = None;
                Some(Decision::Hold { why: "no answer from the arbiter within the deadline; still asking".into() })
            }
        }
    }

    /// Takes an answer.
    pub fn handle_answer(&mut self, now: Instant, answer: Answer) -> Option<Decision> {
        match answer {
            Answer::Verdict(Verdict::Won { generation }) => Some(Decision::Go { generation }),
            // An arbiter that was set up anew says nothing about who runs: stopping both sides on its word would
            // turn its loss into ours.
            Answer::Verdict(Verdict::Lost(holder)) if holder.generation < self.claim.expected => {
                let Register { generation, .. } = holder;
                let ours = self.claim.expected;
                let why = format!(
                    "the arbiter knows generation {generation}, this guest is at {ours}: it has lost its memory"
                );
                Some(Decision::Hold { why })
            }
            Answer::Verdict(Verdict::Lost(holder)) => Some(Decision::Stop { holder }),
            Answer::Fenced => Some(self.go()),
            Answer::NotFenced(why) => {
                self.deadline_at = None;
                Some(Decision::Hold { why })
            }
            Answer::Unreachable(_) => {
                // Goes on after the deadline too: a partition that heals must not need an operator.
                self.ask_at = Some(now + ARBITER_RETRY);
                None
            }
        }
    }

    /// The operator takes the responsibility.
    #[must_use]
    pub fn operator_decides(&self) -> Decision {
        self.go()
    }

    /// When to poll again.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.policy {
            Policy::Hold | Policy::Alone => None,
            _ => self.ask_at.into_iter().chain(self.deadline_at).min(),
        }
    }

    fn go(&self) -> Decision {
        Decision::Go { generation: self.claim.expected.saturating_add(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(holder: &str, expected: u64) -> Claim {
        Claim { guest: "g".into(), expected, holder: holder.into() }
    }

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    #[test]
    fn of_two_claims_one_wins_and_may_ask_again() {
        let mut register = Register { generation: 1, holder: "a".into() };
        assert_eq!(register.swap(&claim("b", 1)), Verdict::Won { generation: 2 });
        assert_eq!(register.swap(&claim("b", 1)), Verdict::Won { generation: 2 }, "the lost reply");
        let has = Register { generation: 2, holder: "b".into() };
        assert_eq!(register.swap(&claim("a", 1)), Verdict::Lost(has.clone()));
        assert_eq!(register.swap(&claim("a", 0)), Verdict::Lost(has), "a sleeper of long ago");
        assert_eq!(register.swap(&claim("a", 7)), Verdict::Lost(register.clone()), "a generation from nowhere");
    }

    #[test]
    fn an_unreachable_arbiter_holds_and_is_asked_on() {
        let mut it = Arbitration::new(at(0), Policy::Arbiter, claim("a", 1), Duration::from_millis(500));
        let mut held = None;
        for ms in 0..2000 {
            if it.poll_ask(at(ms)).is_some() {
                assert_eq!(it.handle_answer(at(ms), Answer::Unreachable("down".into())), None);
            }
            if let Some(Decision::Hold { .. }) = it.poll_decision(at(ms)) {
                assert_eq!(held.replace(ms), None, "said once");
            }
            assert!(it.poll_timeout().is_some(), "never waits for ever");
        }
        assert_eq!(held, Some(500));
        let won = it.handle_answer(at(2000), Answer::Verdict(Verdict::Won { generation: 2 }));
        assert_eq!(won, Some(Decision::Go { generation: 2 }), "a partition that heals needs no operator");
    }

    #[test]
    fn only_a_fenced_peer_lets_the_script_policy_go() {
        let policy = Policy::Script("/fence".into());
        let mut it = Arbitration::new(at(0), policy, claim("a", 4), Duration::from_secs(1));
        assert!(matches!(it.poll_ask(at(0)), Some(Ask::Script(..))));
        assert_eq!(it.poll_ask(at(0)), None, "asked once");
        let held = it.handle_answer(at(5), Answer::NotFenced("exit code 1".into()));
        assert_eq!(held, Some(Decision::Hold { why: "exit code 1".into() }));
        assert_eq!(it.operator_decides(), Decision::Go { generation: 5 });
        assert_eq!(it.handle_answer(at(6), Answer::Fenced), Some(Decision::Go { generation: 5 }));
    }

    #[test]
    fn who_gives_way_asks_later_and_still_asks() {
        let policy = || Policy::Arbiter;
        let new = || Arbitration::new(at(0), policy(), claim("b", 1), Duration::from_secs(10));
        assert!(new().poll_ask(at(0)).is_some());
        let mut later = new().giving_way(Duration::from_millis(500));
        assert_eq!(later.poll_timeout(), Some(at(500)));
        assert_eq!(later.poll_ask(at(499)), None);
        assert!(later.poll_ask(at(500)).is_some());
    }

    #[test]
    fn an_arbiter_that_forgot_stops_nobody() {
        let mut it = Arbitration::new(at(0), Policy::Arbiter, claim("a", 4), Duration::from_secs(1));
        let fresh = Answer::Verdict(Register::default().swap(&claim("a", 4)));
        assert!(matches!(it.handle_answer(at(1), fresh), Some(Decision::Hold { .. })));
    }

    #[test]
    fn hold_waits_for_the_operator_and_alone_for_nobody() {
        let mut hold = Arbitration::new(at(0), Policy::Hold, claim("a", 1), Duration::from_secs(1));
        assert_eq!(hold.poll_ask(at(0)), None);
        assert!(matches!(hold.poll_decision(at(0)), Some(Decision::Hold { .. })));
        assert_eq!((hold.poll_decision(at(0)), hold.poll_timeout()), (None, None));
        let mut alone = Arbitration::new(at(0), Policy::Alone, claim("a", 1), Duration::from_secs(1));
        assert_eq!(alone.poll_decision(at(0)), Some(Decision::Go { generation: 2 }));
    }
}
