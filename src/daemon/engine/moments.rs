//! What is told of a guest unasked, in QEMU's events where it has one.
//!
//! | event | when |
//! |---|---|
//! | `XEN_COLO_PROTECTION` | the guest is as safe as it was no more, or again; or another generation holds |
//! | `COLO_EXIT` | replication is over on this side: `request` or `error`, as in QEMU |
//! | `STOP`, `RESUME` | the guest does not run here any more, or does; not for the pause of a checkpoint |
//!
//! It is looked for after every input, so two changes at once are told as one.

use super::{Engine, Role, report};
use crate::clock::Instant;
use crate::colo::failover::ExitReason;
use crate::colo::{primary, secondary};
use crate::daemon::status::{PairRole, Protection};
use crate::qmp::Event;
use serde_json::{Value, json};

/// What is told when it changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Moment {
    protection: Protection,
    role: Option<PairRole>,
    generation: u64,
    paused: bool,
    /// Why replication ended here, once it has.
    exit: Option<ExitReason>,
}

impl Moment {
    fn runs(&self) -> bool {
        use Protection::{Protected, Syncing, TakenOver, Unprotected};
        let here = matches!(self.protection, Unprotected | Protected | TakenOver)
            || self.protection == Syncing && self.role == Some(PairRole::Primary);
        here && !self.paused
    }

    /// What happened between two moments.
    fn since(&self, before: &Self) -> Vec<Event> {
        let mut events = Vec::new();
        if let (None, Some(reason), Some(role)) = (before.exit, self.exit, self.role) {
            let reason = if reason == ExitReason::Request { "request" } else { "error" };
            events.push(Event::new("COLO_EXIT", json!({"mode": role.name(), "reason": reason})));
        }
        match (before.runs(), self.runs()) {
            (true, false) => events.push(Event::new("STOP", Value::Null)),
            (false, true) => events.push(Event::new("RESUME", Value::Null)),
            _ => {}
        }
        if (before.protection, before.generation) != (self.protection, self.generation) {
            let data = json!({
                "protection": self.protection,
                "role": self.role,
                "generation": self.generation,
            });
            events.push(Event::new("XEN_COLO_PROTECTION", data));
        }
        events
    }
}

impl Engine {
    /// Tells the service manager that the engine turns, when that is due.
    pub(super) fn give_sign_of_life(&mut self, now: Instant) {
        let Some(every) = self.parts.manager.sign_every() else { return };
        if self.sign_due.is_none_or(|due| due <= now) {
            self.parts.manager.sign_of_life();
            self.sign_due = Some(now + every);
        }
    }

    /// How this host is, in a line.
    fn line(&self) -> String {
        let Moment { protection, role, generation, paused, .. } = self.moment;
        let Some(guest) = self.guest() else {
            return self.left.clone().unwrap_or_else(|| "no guest; ready to stand by".into());
        };
        let stopped = if paused { ", stopped by an order" } else { "" };
        let pair = role.map_or_else(String::new, |role| {
            format!("; {}, peer {}, generation {generation}", role.name(), self.peer.as_deref().unwrap_or_default())
        });
        format!("{guest}: {protection}{stopped}{pair}")
    }

    /// Tells what has changed.
    pub(super) fn tell_moment(&mut self) {
        let moment = self.moment();
        let is_first = self.parts.line.borrow().is_empty();
        if moment == self.moment && !is_first {
            return;
        }
        let before = std::mem::replace(&mut self.moment, moment);
        self.parts.line.send_replace(self.line());
        for event in moment.since(&before) {
            // Nobody may be listening.
            let _ = self.parts.events.send(event);
        }
    }

    fn moment(&self) -> Moment {
        let paused = self.paused;
        match &self.role {
            Role::Empty => Moment::default(),
            Role::Running(_) => Moment { protection: Protection::Unprotected, paused, ..Moment::default() },
            Role::Primary(role) => {
                let machine = role.side.machine();
                let is_over = matches!(machine.state(), primary::State::Exited(_));
                Moment {
                    protection: report::of_primary(&role.side),
                    role: Some(PairRole::Primary),
                    generation: role.side.generation(),
                    paused,
                    exit: is_over.then(|| machine.exit_reason()),
                }
            }
            Role::Secondary(role) => {
                let machine = role.side.machine();
                let is_over = matches!(machine.state(), secondary::State::Exited(_));
                Moment {
                    protection: report::of_secondary(&role.side),
                    role: Some(PairRole::Secondary),
                    generation: role.side.generation(),
                    paused,
                    exit: is_over.then(|| machine.exit_reason()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_is_told_once_in_qemus_words() {
        let alone = Moment { protection: Protection::Unprotected, ..Moment::default() };
        let role = Some(PairRole::Primary);
        let syncing = Moment { protection: Protection::Syncing, role, generation: 1, ..alone };
        let held = Moment { protection: Protection::Held, ..syncing };
        let lost = Moment { protection: Protection::Stopped, exit: Some(ExitReason::Error), ..held };
        let names = |now: &Moment, before: &Moment| {
            now.since(before).into_iter().map(|event| event.name).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(&alone, &Moment::default()), "RESUME XEN_COLO_PROTECTION");
        assert_eq!(names(&Moment { paused: true, ..alone }, &alone), "STOP");
        assert_eq!(names(&syncing, &alone), "XEN_COLO_PROTECTION");
        assert_eq!(names(&held, &syncing), "STOP XEN_COLO_PROTECTION");
        assert_eq!(names(&lost, &held), "COLO_EXIT XEN_COLO_PROTECTION");
        assert_eq!(lost.since(&held)[0].data, json!({"mode": "primary", "reason": "error"}));
        assert_eq!(names(&lost, &lost), "");
    }
}
