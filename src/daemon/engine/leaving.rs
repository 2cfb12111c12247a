//! The end of a protection that nobody was lost in: ordered here, waited for, and cleaned up behind.
//!
//! ```text
//!   primary     unprotect ─▶ Dismissing ── given up ──▶ Exited(Unprotected), links closed ─▶ answered
//!                                      └─ lost first ─▶ arbitration ─▶ decided, or held ───▶ answered
//!   secondary   dismissal ─▶ Dismissed ── links ended ─▶ Exited(Dismissed) ─▶ nothing is left: Vacant
//! ```
//!
//! The whole host leaves ([`Engine::depart`], SIGTERM) the same way. A primary dismisses its secondary; a secondary says
//! `leaving`, and its primary dismisses it; then the process ends, and nobody was lost. A Xen guest that is left alone
//! runs on, and its devices are given away (`daemon::xen`).
//!
//! The trap is a primary that protects again at once, and knocks while the guest it dismissed is still being taken
//! apart. A host that is about to be free says so ([`Vacancy::Leaving`]), and lets who knocks wait.

use super::{Engine, Role};
use crate::clock::Instant;
use crate::colo::heartbeat::Word;
use crate::colo::{Exit, primary, secondary};
use crate::daemon::control::Answer as Reply;
use crate::daemon::guest::Guest;
use crate::daemon::protected::{self, Protected};
use crate::replica::set::Replicas;
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

    /// Ends the protection and then this host; answers when it is decided what came of it.
    pub(super) fn depart(&mut self, now: Instant, reply: oneshot::Sender<Reply>) {
        if self.departing.is_some() {
            let _ = reply.send(Reply::error("this host is ending already"));
            return;
        }
        self.departing = Some(reply);
        match &mut self.role {
            Role::Primary(role) => _ = role.side.dismiss(now),
            Role::Secondary(role) if role.side.stands_by() => {
                _ = self.links.as_ref().map(|links| links.say(Word::Leaving));
            }
            Role::Empty | Role::Running(_) | Role::Secondary(_) => {}
        }
    }

    /// The secondary is about to end: what it has of the guest is worth nothing soon.
    pub(super) fn let_peer_leave(&mut self, now: Instant) {
        let Role::Primary(role) = &mut self.role else { return };
        if role.side.dismiss(now) {
            let peer = self.peer.as_deref().unwrap_or("the peer");
            tracing::warn!(%peer, "colo_peer_leaves");
            self.peer_left = Some(format!("host {peer} left the protection: it was told to end"));
        }
    }

    /// Answers who ends this host, once nothing is undecided any more, and ends it.
    pub(super) fn answer_departure(&mut self) {
        if self.departing.is_none() {
            return;
        }
        let guest = match &self.role {
            Role::Empty => None,
            Role::Running(guest) => Some((guest, "was not protected")),
            Role::Primary(role) => match role.side.machine().state() {
                primary::State::Exited(Exit::Unprotected) => Some((&role.guest, "is protected no longer")),
                primary::State::Exited(Exit::Alone) => Some((&role.guest, "had no peer any more")),
                primary::State::Exited(_) => None,
                _ => return,
            },
            Role::Secondary(role) => match role.side.machine().state() {
                // What it wrote is in this process's memory until it is in its images.
                secondary::State::Exited(Exit::Alone)
                    if role.guest.replicas.as_ref().is_some_and(Replicas::is_unsettled) =>
                {
                    return;
                }
                secondary::State::Exited(Exit::Alone) => Some((&role.guest, "had been taken over here")),
                secondary::State::Exited(Exit::Dismissed) if self.links.is_some() => return,
                secondary::State::Exited(_) => None,
                _ => return,
            },
        };
        let said = match guest {
            None => self.left.clone().unwrap_or_else(|| "no guest ran here".into()),
            Some((guest, how)) => {
                let fate = match guest.geometry.xen {
                    Some(_) => "runs on",
                    None => "ends with this process",
                };
                format!("{} {how}; it {fate}", guest.name)
            }
        };
        if let Some(reply) = self.departing.take() {
            let _ = reply.send(Reply::Return(serde_json::json!({"said": said})));
        }
        self.stopping = true;
    }

    /// The guest that is this host's alone, and outlives it.
    pub(super) fn guest_left_alone(self) -> Option<Guest> {
        let guest = match self.role {
            Role::Running(guest) => guest,
            Role::Primary(role) => match role.side.machine().state() {
                primary::State::Exited(Exit::Unprotected | Exit::Alone) => role.guest,
                _ => return None,
            },
            Role::Secondary(role) => match role.side.machine().state() {
                secondary::State::Exited(Exit::Alone) => role.guest,
                _ => return None,
            },
            Role::Empty => return None,
        };
        guest.geometry.xen.is_some().then_some(*guest)
    }

    /// Leaves word for whoever starts this host again, should it be killed.
    pub(super) fn remember_protection(&self, guest: &str, generation: u64, peer: &str) -> Result<(), String> {
        let Some(path) = self.parts.disks.first().map(|image| protected::path(image)) else { return Ok(()) };
        let line = Protected { guest: guest.to_owned(), generation, peer: peer.to_owned() };
        line.write(&path).map_err(|error| format!("write {}: {error}", path.display()))
    }

    /// The guest is this host's again, and nobody else's.
    pub(super) fn forget_protection(&self) {
        let Some(path) = self.parts.disks.first().map(|image| protected::path(image)) else { return };
        if let Err(error) = protected::remove(&path) {
            tracing::warn!(%error, path = %path.display(), "what says that the guest is protected cannot be removed");
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
        self.keep_totals();
        self.role = Role::Empty;
    }
}
