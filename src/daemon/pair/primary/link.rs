//! What the primary makes of a packet link that is lost: nothing can be compared, so output leaves by checkpoints, as in
//! Remus, until there is a link again. Nothing leaves because there is no link.

use super::PrimarySide;
use crate::clock::Instant;
use crate::colo::Cause;
use crate::colo::hello::Mode;
use crate::mutant::{self, Mutant};

impl PrimarySide {
    /// The packet link was lost, or there is one again. Either way frames went missing between the guests of a pair in
    /// lock-step, and only a checkpoint brings them level.
    pub fn handle_packet_link(&mut self, now: Instant, up: bool) {
        self.link_down = !up && self.mode == Mode::Colo;
        if mutant::active(Mutant::OpenWithoutLink) && !up {
            self.proxy.release_all();
        }
        if self.mode == Mode::Colo {
            self.machine.request_checkpoint(now, Cause::PacketLink);
        }
        self.pump(now);
    }
}
