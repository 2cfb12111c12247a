//! What an operator may ask of an engine, and the answers.

use super::{Engine, Role, report};
use crate::clock::Instant;
use crate::colo::{Cause, Loss};
use crate::daemon::control::{Answer as Reply, Request};
use crate::daemon::engine_clock;
use crate::daemon::status::{Protection, Status};
use std::sync::atomic::Ordering;

impl Engine {
    /// Carries out a request of the control socket.
    pub(super) fn control(&mut self, request: Request, reply: tokio::sync::oneshot::Sender<Reply>) {
        let now = engine_clock();
        let answer = match request {
            Request::Status => match serde_json::to_value(self.status(now)) {
                Ok(status) => Reply::Return(status),
                Err(error) => Reply::error(error.to_string()),
            },
            Request::Protect(protect) => {
                let refusal = match &self.role {
                    Role::Empty => Some("this host has no guest to protect; start it with --guest NAME"),
                    Role::Running(_) => None,
                    Role::Primary(role) if role.side.can_be_protected() => None,
                    Role::Primary(_) if self.links.is_some() => Some("the guest is protected already"),
                    Role::Primary(_) => Some("the guest does not run here"),
                    Role::Secondary(role) if role.side.took_over() => {
                        Some("protecting a guest again after a takeover is not built yet; it runs on, unprotected")
                    }
                    Role::Secondary(_) => Some("this host stands by for another; protect the guest where it runs"),
                };
                if let Some(refusal) = refusal {
                    Reply::error(refusal)
                } else {
                    // The host makes the links and answers, which takes a while.
                    if let Err(error) = self.parts.protect.try_send((protect, reply)) {
                        tracing::warn!(%error, "a protect request is dropped: another is under way");
                    }
                    return;
                }
            }
            Request::Checkpoint => match &mut self.role {
                Role::Primary(role) if self.links.is_some() => {
                    role.side.request_checkpoint(now, Cause::Command);
                    Reply::done()
                }
                _ => Reply::error("no guest is being protected from this host"),
            },
            Request::Failover => self.failover(now),
            Request::Stop => {
                self.stopping = true;
                Reply::done()
            }
        };
        let _ = reply.send(answer);
    }

    fn failover(&mut self, now: Instant) -> Reply {
        let decided = match &mut self.role {
            Role::Primary(role) => role.side.operator_decides(now),
            Role::Secondary(role) => role.side.operator_decides(now),
            Role::Empty | Role::Running(_) => false,
        };
        if decided {
            Reply::done()
        } else if self.links.is_some() {
            match &mut self.role {
                Role::Primary(role) => role.side.handle_loss(now, Loss::Requested),
                Role::Secondary(role) => role.side.handle_loss(now, Loss::Requested),
                Role::Empty | Role::Running(_) => {}
            }
            self.notice_loss();
            Reply::done()
        } else {
            Reply::error("there is nothing to fail over: no peer is connected and no guest is held here")
        }
    }

    fn status(&mut self, now: Instant) -> Status {
        let mut status = Status {
            host: self.parts.name.clone(),
            pid: std::process::id(),
            mode: self.mode,
            peer: self.peer.clone(),
            lost_at_unix_us: self.lost_at_unix_us,
            decided_at_unix_us: self.decided_at_unix_us,
            bytes_sent: self.sent_bytes_before,
            ..Status::default()
        };
        status.packets.dropped_network = self.dropped_network;
        if let Some(links) = &self.links {
            status.bytes_sent += links.sent_bytes.load(Ordering::Relaxed);
        }
        match &mut self.role {
            Role::Empty => status.state = "empty".into(),
            Role::Running(guest) => {
                status.guest = Some(guest.name.clone());
                (status.protection, status.state) = (Protection::Unprotected, "running".into());
                status.why = Some("nobody asked for protection: xl-colo protect PEER".into());
            }
            Role::Primary(role) => report::primary(&mut status, role, now),
            Role::Secondary(role) => report::secondary(&mut status, role),
        }
        if status.protection == Protection::Stopped
            && let Some(holder) = &self.holder
        {
            status.why = Some(format!("host {} holds generation {}", holder.holder, holder.generation));
        }
        status
    }
}
