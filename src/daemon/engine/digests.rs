//! Digests on the packet link, if both hosts agreed on them: between the link and the sides, which know nothing of it.
//!
//! ```text
//!   primary    guest frames ─▶ Expander      packet link ─▶ Expander ─▶ PrimarySide::handle_secondary_frame
//!   secondary  ToPrimary ─▶ Summaries ─▶ packet link         packet link ─▶ Summaries (wanted) or the guest
//! ```

use super::{Engine, Role};
use crate::clock::Instant;
use crate::colo::Loss;
use crate::compare::digest::{Expander, Key, MARK, Output, Summaries};
use crate::daemon::status::Digests as Report;
use bytes::Bytes;

/// What this host has of the mode.
pub(super) enum Digests {
    /// Frames travel whole.
    Off,
    Primary(Box<Expander>),
    Secondary(Summaries),
}

impl Digests {
    pub(super) fn of_primary(key: Option<Key>) -> Self {
        key.map_or(Self::Off, |key| Self::Primary(Box::new(Expander::new(key))))
    }

    pub(super) fn of_secondary(key: Option<Key>) -> Self {
        key.map_or(Self::Off, |key| Self::Secondary(Summaries::new(key)))
    }

    /// The primary's guest emitted a frame.
    pub(super) fn see_primary(&mut self, epoch: u64, frame: &Bytes) {
        if let Self::Primary(expander) = self {
            expander.handle_primary(epoch, frame);
        }
    }

    /// What is sent of a frame of the secondary's guest.
    pub(super) fn summarize(&mut self, epoch: u64, frame: Bytes) -> (u64, Bytes) {
        match self {
            Self::Secondary(summaries) => summaries.summarize(epoch, frame),
            _ => (epoch, frame),
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        if let Self::Primary(expander) = self { expander.poll_timeout() } else { None }
    }

    pub(super) fn report(&self) -> Option<Report> {
        let (summaries, looked_into, saved_bytes) = match self {
            Self::Off => return None,
            Self::Primary(expander) => (Some(expander.counts().0), Some(expander.counts().1), None),
            Self::Secondary(summaries) => (None, None, Some(summaries.saved_bytes())),
        };
        Some(Report { summaries, looked_into, saved_bytes })
    }
}

impl Engine {
    /// Something came over the packet link.
    pub(super) fn packet_arrived(&mut self, now: Instant, tag: u64, frame: Bytes) {
        match (&mut self.role, &mut self.digests) {
            (Role::Primary(_), Digests::Primary(expander)) if tag & MARK == 0 => expander.handle_secondary(tag, frame),
            (Role::Primary(_), Digests::Primary(expander)) => {
                if !expander.handle_message(now, tag, frame) {
                    self.lose(Loss::Violation("a packet digest that cannot be".into()));
                }
            }
            (Role::Secondary(_), Digests::Secondary(summaries)) if tag & MARK != 0 => {
                if let (Some((tag, message)), Some(links)) = (summaries.frame(frame), &self.links) {
                    links.packets_out.send(message.len(), (tag, message));
                }
            }
            (Role::Primary(role), _) => role.side.handle_secondary_frame(now, tag, frame),
            (Role::Secondary(role), _) => role.side.handle_mirrored_frame(now, tag, frame),
            (Role::Empty | Role::Running(_), _) => {}
        }
    }

    /// Hands on what the digests have come to, and asks for what they have not.
    pub(super) fn carry_digests(&mut self, now: Instant) {
        let (Role::Primary(role), Digests::Primary(expander)) = (&mut self.role, &mut self.digests) else { return };
        // The epoch before the present one is not owned yet.
        expander.forget_before(role.side.machine().epoch().saturating_sub(1));
        if expander.poll_timeout().is_some_and(|at| at <= now) {
            expander.handle_timeout(now);
        }
        while let Some(output) = expander.poll_output() {
            match (output, &self.links) {
                (Output::Frame { epoch, frame }, _) => role.side.handle_secondary_frame(now, epoch, frame),
                (Output::Ask(message), Some(links)) => links.packets_out.send(message.len(), (MARK, message)),
                (Output::Ask(_), None) => {}
            }
        }
    }
}
