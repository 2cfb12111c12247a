//! What does not work as it should while the guest is protected: a pair goes on without its packet link for a while.

use super::{Engine, Role};
use crate::clock::Instant;
use crate::colo::hello::Mode;
use crate::colo::{primary, secondary};
use crate::daemon::events::{What, cut};
use crate::daemon::links::packets::Told;

/// How the packet link does.
#[derive(Debug, Default)]
pub(super) struct PacketLink {
    /// How often it was lost.
    pub(super) losses: u64,
    /// Why it was lost, while there is none.
    down: Option<String>,
}

impl Engine {
    /// The packet link was lost, or there is one again.
    pub(super) fn packet_link(&mut self, now: Instant, told: Told) {
        let up = told == Told::Up;
        if self.is_parting() {
            // Whoever lets go first closes all links, and it is chance which end is seen first: no news.
        } else if let Told::Down(why) = told {
            self.tell(What::LinkLost { link: "packets".into(), reason: cut(&why), heard_ms: None });
            self.packet_link.losses += 1;
            self.packet_link.down = Some(why);
        } else {
            self.tell(What::LinkBack { link: "packets".into() });
            self.packet_link.down = None;
        }
        if let Role::Primary(role) = &mut self.role {
            role.side.handle_packet_link(now, up);
        }
    }

    /// Whether the pair is over, or is being ended by an order.
    fn is_parting(&self) -> bool {
        match &self.role {
            Role::Empty | Role::Running(_) => true,
            Role::Primary(role) => {
                matches!(role.side.machine().state(), primary::State::Dismissing | primary::State::Exited(_))
            }
            Role::Secondary(role) => {
                matches!(role.side.machine().state(), secondary::State::Dismissed | secondary::State::Exited(_))
            }
        }
    }

    /// What is the matter with the packet link, while there is a pair.
    pub(super) fn packet_link_trouble(&self) -> Option<String> {
        let why = self.packet_link.down.as_ref().filter(|_| self.links.is_some())?;
        let so = match (&self.role, self.mode) {
            (Role::Primary(_), Some(Mode::Colo)) => "packets leave with checkpoints only",
            (Role::Primary(_), _) => "clients would have to repeat what the peer has not heard",
            _ => "this guest hears and says nothing",
        };
        Some(format!("the packet link was lost ({why}) and is being made again; {so}"))
    }
}
