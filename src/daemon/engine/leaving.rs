//! The end of a protection that nobody was lost in: ordered here, waited for, and cleaned up behind.
//!
//! ```text
//!   primary     unprotect ─▶ Dismissing ── given up ──▶ Exited(Unprotected), links closed ─▶ answered
//!                                      └─ lost first ─▶ arbitration ─▶ decided, or held ───▶ answered
//!   secondary   dismissal ─▶ Dismissed ── links ended ─▶ Exited(Dismissed) ─▶ nothing is left: Vacant
//! ```
//!
//! The trap is a primary that protects again at once, and knocks while the guest it dismissed is still being taken
//! apart. A host that is about to be free says so ([`Vacancy::Leaving`]), and lets who knocks wait.

use super::{Engine, Role};
use crate::clock::Instant;
use crate::colo::{Exit, primary, secondary};
use crate::daemon::control::Answer as Reply;
use tokio::sync::oneshot;

/// Whether a host can take a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vacancy {
    /// It has none.
    Vacant,
    /// It has one that is given up, and will soon have none.
    Leaving,
    /// It has one.
    Taken,
}

impl Engine {
    /// Ends the protection; answers when it is decided what came of it.
    pub(super) fn unprotect(&mut self, now: Instant, reply: oneshot::Sender<Reply>) {
        if let Role::Primary(role) = &mut self.role
            && role.side.dismiss(now)
        {
            self.unprotecting = Some(reply);
            return;
        }
        let refusal = match &self.role {
            Role::Primary(_) if self.unprotecting.is_some() => "the protection is being ended already".to_owned(),
            Role::Primary(role) if role.side.is_undecided() => {
                "the peer is lost, and it is not decided yet who goes on: see xl-colo status".to_owned()
            }
            Role::Secondary(role) if role.side.stands_by() => {
                let primary = self.peer.as_deref().unwrap_or("another");
                format!("this host stands by for host {primary}; end the protection there: xl-colo unprotect")
            }
            Role::Empty | Role::Running(_) | Role::Primary(_) | Role::Secondary(_) => {
                "nothing is protected from this host".to_owned()
            }
        };
        let _ = reply.send(Reply::error(refusal));
    }

    /// Answers who ended the protection, once it is known who goes on.
    pub(super) fn answer_unprotect(&mut self) {
        use primary::State;
        let Role::Primary(role) = &self.role else { return };
        let machine = role.side.machine();
        let answer = match machine.state() {
            State::Exited(Exit::Unprotected | Exit::Alone) => Reply::done(),
            State::Held | State::Exited(_) => {
                let why = machine.loss().map(ToString::to_string).unwrap_or_default();
                Reply::error(format!("{why}; the peer may have the guest: see xl-colo status"))
            }
            _ => return,
        };
        if let Some(reply) = self.unprotecting.take() {
            let _ = reply.send(answer);
        }
    }

    /// Whether a guest can be taken here now.
    pub(super) fn vacancy(&self) -> Vacancy {
        let leaves = match &self.role {
            Role::Empty => return Vacancy::Vacant,
            Role::Running(_) => return Vacancy::Taken,
            Role::Primary(role) => role.side.machine().state() == primary::State::Exited(Exit::Stopped),
            Role::Secondary(role) => match role.side.machine().state() {
                secondary::State::Dismissed | secondary::State::Exited(Exit::Dismissed) => return Vacancy::Leaving,
                state => {
                    matches!(state, secondary::State::Exited(Exit::Stopped | Exit::NoState | Exit::Failed))
                }
            },
        };
        if leaves && self.links.is_none() { Vacancy::Vacant } else { Vacancy::Taken }
    }

    /// Takes apart what a primary has dismissed: its domain, its memory, its disk's overlays, its devices' places.
    pub(super) fn leave(&mut self) {
        let Role::Secondary(role) = &self.role else { return };
        if role.side.machine().state() != secondary::State::Exited(Exit::Dismissed) || self.links.is_some() {
            return;
        }
        let primary = self.peer.as_deref().unwrap_or("its primary");
        self.left = Some(format!("host {primary} ended the protection of {}", role.guest.name));
        self.role = Role::Empty;
    }
}
