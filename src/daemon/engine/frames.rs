//! Frames of the guest, of its network and of the pair's other guest, as many in a turn as are there.

use super::{Engine, Input, Role};
use crate::clock::Instant;
use crate::colo::Cause;
use crate::daemon::engine_clock;
use crate::daemon::guest::GuestQueue;
use crate::daemon::links::lock;
use std::sync::Arc;

/// Inputs of one kind applied before the next select.
const BURST: usize = 64;

impl Engine {
    /// Frames that have come meanwhile: a turn of the loop for each would cost more than the frame does.
    pub(super) fn take_waiting_frames(&mut self) {
        for _ in 0..BURST {
            let packet = self.links.as_mut().and_then(|links| links.packets_in.try_recv().ok());
            let network = self.parts.network_in.try_recv().ok();
            if packet.is_none() && network.is_none() {
                break;
            }
            packet.into_iter().for_each(|(epoch, frame)| self.apply(Input::SecondaryOrMirrored(epoch, frame)));
            network.into_iter().for_each(|frame| self.apply(Input::Network(frame)));
        }
        self.take_guest_frames(engine_clock());
    }

    /// Completes when the guest has frames that may be taken.
    pub(super) fn guest_frames(&self) -> impl Future<Output = ()> + use<> {
        let queue = self.guest_queue().cloned();
        let ready = match &self.role {
            Role::Primary(role) => role.side.ready_for_guest_frames(),
            Role::Empty | Role::Running(_) | Role::Secondary(_) => true,
        };
        async move {
            match queue {
                Some(queue) if ready => queue.wait().await,
                _ => std::future::pending().await,
            }
        }
    }

    pub(super) fn guest_queue(&self) -> Option<&Arc<GuestQueue>> {
        self.role.guest().map(|guest| &guest.queue)
    }

    pub(super) fn take_guest_frames(&mut self, now: Instant) {
        let lost = self.guest_queue().is_some_and(|queue| queue.notice_lost());
        if let (true, Role::Primary(role)) = (lost, &mut self.role) {
            // Its guest has said what nobody will explain; a checkpoint makes it good, and the client repeats itself.
            role.side.request_checkpoint(now, Cause::FramesLost);
        }
        for _ in 0..BURST {
            match &mut self.role {
                Role::Empty => return,
                Role::Running(guest) => {
                    let Some((_, frame)) = guest.queue.pop() else { return };
                    let frame = guest.to_network(now, frame);
                    self.emit(frame);
                }
                Role::Primary(role) => {
                    if !role.side.ready_for_guest_frames() {
                        return;
                    }
                    let Some((epoch, frame)) = role.guest.queue.pop() else { return };
                    self.digests.see_primary(epoch, &frame);
                    role.side.handle_guest_frame(now, epoch, frame);
                }
                Role::Secondary(role) => {
                    let Some((epoch, frame)) = role.guest.queue.pop() else { return };
                    let is_heard = role.side.took_over() && epoch == role.side.machine().epoch();
                    role.side.handle_guest_frame(now, epoch, frame);
                    if is_heard {
                        self.telling.output();
                    }
                }
            }
        }
    }

    /// From when on a secondary suspects that its primary is gone, if nothing was done about that yet.
    pub(super) fn suspicion_due(&self) -> Option<Instant> {
        let links = self.links.as_ref().filter(|_| matches!(self.role, Role::Secondary(_)))?;
        Some(lock(&links.heartbeat).suspected_at()).filter(|at| self.looked_for != Some(*at))
    }

    /// If the primary is gone, clients repeat what it did not answer; a bridge here that has learned the guest behind its uplink
    /// would drop that.
    pub(super) fn look_for_guest(&mut self, now: Instant) {
        if let Some(at) = self.suspicion_due().filter(|at| *at <= now) {
            self.looked_for = Some(at);
            (self.parts.unlearn)();
        }
    }
}
