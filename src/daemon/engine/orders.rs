//! What an operator may ask of an engine, and the answers.

use super::{Engine, Role, ToProtect, Vacancy, report};
use crate::clock::Instant;
use crate::colo::arbiter::{Answer, Claim, Register, Verdict};
use crate::colo::hello::Mode;
use crate::colo::{Cause, Loss};
use crate::daemon::control::{Answer as Reply, Protect, Request};
use crate::daemon::engine_clock;
use crate::daemon::live::Live;
use crate::daemon::status::{Health, PairRole, Protection, Queues, Status, Wire};
use crate::hypervisor::{Domain, DomainError};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::oneshot;

/// What a second one is told that wants to protect the guest.
pub const UNDER_WAY: &str = "a protection of the guest is being begun already; see xl-colo status";

impl Engine {
    /// Carries out a request of the control socket.
    pub(super) fn control(&mut self, request: Request, reply: oneshot::Sender<Reply>) {
        let now = engine_clock();
        let answer = match request {
            Request::Status => match serde_json::to_value(self.status(now)) {
                Ok(status) => Reply::Return(status),
                Err(error) => Reply::error(error.to_string()),
            },
            Request::Protect(mut protect) => {
                protect.complete(&self.live);
                let refusal = match &self.role {
                    Role::Empty => Some("this host has no guest to protect; start it with --guest NAME"),
                    // Only a guest that is in no pair can be.
                    _ if self.paused => Some("the guest is stopped; let it run first"),
                    Role::Running(_) => None,
                    Role::Primary(role) if role.side.can_be_protected() => None,
                    Role::Primary(_) if self.links.is_some() => Some("the guest is protected already"),
                    Role::Primary(_) => Some("the guest does not run here"),
                    Role::Secondary(role) if role.side.can_be_protected() => None,
                    Role::Secondary(role) if role.side.took_over() => Some(
                        "what the guest wrote before the takeover is still being merged into its image; try again when \
                         xl-colo status shows nothing left of it",
                    ),
                    Role::Secondary(_) => Some("this host stands by for another; protect the guest where it runs"),
                };
                if let Some(refusal) = refusal {
                    Reply::error(refusal)
                } else if let Err(error) = self.preflight(protect.mode) {
                    Reply::error(format!("the guest cannot be protected: {error}"))
                } else {
                    return self.to_protect(protect, reply);
                }
            }
            Request::Checkpoint => match &mut self.role {
                Role::Primary(role) if self.links.is_some() => {
                    role.side.request_checkpoint(now, Cause::Command);
                    Reply::done()
                }
                _ => Reply::error("no guest is being protected from this host"),
            },
            Request::CheckpointDelay { ms } => match &mut self.role {
                Role::Primary(role) if self.links.is_some() && ms > 0 => {
                    role.side.set_checkpoint_delay(now, Duration::from_millis(ms));
                    Reply::done()
                }
                Role::Primary(_) if self.links.is_some() => Reply::error("a checkpoint delay is at least 1 ms"),
                _ => Reply::error("no guest is being protected from this host"),
            },
            Request::PauseGuest => self.pause(true),
            Request::ResumeGuest => self.pause(false),
            Request::Set(live) => self.set(now, &live),
            // The control socket answers this itself, and may wait for it.
            Request::Events(wanted) => match serde_json::to_value(self.parts.history.read(wanted.since)) {
                Ok(told) => Reply::Return(told),
                Err(error) => Reply::error(error.to_string()),
            },
            Request::Unprotect => return self.unprotect(now, reply),
            Request::Leave => return self.depart(now, reply),
            Request::Failover => return self.failover(now, reply),
            Request::Stop => {
                self.stopping = true;
                Reply::done()
            }
        };
        let _ = reply.send(answer);
    }

    /// Changes what can change while this host runs.
    fn set(&mut self, now: Instant, live: &Live) -> Reply {
        let logged = live.check().map_err(|error| error.to_string()).and_then(|()| match &live.log {
            Some(filter) => (self.parts.log.0)(filter).map_err(|why| format!("log: {why}")),
            None => Ok(()),
        });
        if let Err(why) = logged {
            return Reply::error(why);
        }
        self.live.change(live);
        let mut said = Vec::new();
        if let Some(ms) = live.checkpoint_delay_ms {
            let protecting = matches!(&self.role, Role::Primary(_)) && self.links.is_some();
            if let Role::Primary(role) = &mut self.role
                && protecting
            {
                role.side.set_checkpoint_delay(now, Duration::from_millis(ms));
            }
            let when = if protecting { "now" } else { "the next protection" };
            said.push(format!("checkpoint-delay-ms: {ms} from {when} on"));
        }
        let beats = [("heartbeat-ms", live.heartbeat_ms), ("heartbeat-misses", live.heartbeat_misses.map(u64::from))];
        for (key, value) in beats {
            said.extend(value.map(|value| format!("{key}: {value} from the next protection on")));
        }
        said.extend(live.log.as_ref().map(|filter| format!("log: {filter} from now on")));
        Reply::Return(serde_json::json!({"said": said}))
    }

    /// Stops or runs a guest that is not in a pair; in one, that is the pair's business.
    fn pause(&mut self, pause: bool) -> Reply {
        if pause == self.paused && !matches!(self.role, Role::Empty) {
            return Reply::done();
        }
        let order = |domain: &mut dyn Domain| if pause { domain.suspend() } else { domain.resume() };
        let done = match &mut self.role {
            Role::Running(guest) => match guest.domain_mut() {
                Ok(domain) => order(domain),
                Err(gone) => Err(gone),
            },
            Role::Primary(role) if role.side.can_be_protected() => order(role.side.domain()),
            Role::Secondary(role) if role.side.took_over() => order(role.side.domain()),
            Role::Empty => return Reply::error("this host has no guest"),
            Role::Primary(_) | Role::Secondary(_) => {
                return Reply::error("the guest is in a pair, which stops it and lets it run itself");
            }
        };
        match done {
            Ok(()) => {
                self.paused = pause;
                Reply::done()
            }
            Err(error) => Reply::error(error.to_string()),
        }
    }

    /// What can be known before a peer makes room for the guest, and a generation is spent.
    fn preflight(&mut self, mode: Mode) -> Result<(), DomainError> {
        let ask = |domain: &mut dyn Domain| {
            if mode == Mode::Colo {
                domain.lockstep()?;
            }
            domain.protectable()
        };
        match &mut self.role {
            Role::Running(guest) => ask(guest.domain_mut()?),
            Role::Primary(role) => ask(role.side.domain()),
            Role::Secondary(role) => ask(role.side.domain()),
            Role::Empty => Ok(()),
        }
    }

    /// Has the host make the links, and answer, which takes a while.
    fn to_protect(&self, protect: Protect, reply: oneshot::Sender<Reply>) {
        let Some(guest) = self.role.guest() else { return };
        let (name, geometry, mirrors) = (guest.name.clone(), guest.geometry.clone(), guest.mirrors.clone());
        let order = ToProtect { protect, reply, guest: name, geometry, mirrors };
        if let Err(error) = self.parts.protect.try_send(order) {
            let _ = error.into_inner().reply.send(Reply::error(UNDER_WAY));
        }
    }

    fn failover(&mut self, now: Instant, reply: oneshot::Sender<Reply>) {
        if self.vacancy() == Vacancy::Leaving {
            let _ = reply.send(Reply::error("the primary has ended the protection: the guest goes on there"));
            return;
        }
        if self.held_claim().is_none() && self.links.is_some() {
            match &mut self.role {
                Role::Primary(role) => role.side.handle_loss(now, Loss::Requested),
                Role::Secondary(role) => role.side.handle_loss(now, Loss::Requested),
                Role::Empty | Role::Running(_) => {}
            }
            self.notice_loss();
        } else if self.held_claim().is_none() {
            let why = "there is nothing to fail over: no peer is connected and no guest is held here";
            let _ = reply.send(Reply::error(why));
            return;
        }
        // Who asks for a failover is the operator that a held guest waits for.
        match self.held_claim() {
            Some(claim) => self.operator_decides(now, claim, reply),
            None => _ = reply.send(Reply::done()),
        }
    }

    /// The claim that a held guest's host would make.
    fn held_claim(&self) -> Option<Claim> {
        let (guest, generation) = match &self.role {
            Role::Primary(role) => (role.side.machine().hold().and(Some(&role.guest))?, role.side.generation()),
            Role::Secondary(role) => (role.side.machine().hold().and(Some(&role.guest))?, role.side.generation()),
            Role::Empty | Role::Running(_) => return None,
        };
        Some(Claim { guest: guest.name.clone(), expected: generation, holder: self.parts.name.clone() })
    }

    /// The operator's word decides, unless an arbiter knows that the other host has the guest: two orders on two
    /// hosts must not make two guests. An arbiter that is silent, or has forgotten, does not stand in the way.
    fn operator_decides(&mut self, now: Instant, claim: Claim, reply: oneshot::Sender<Reply>) {
        let Some(arbiter) = self.parts.arbiter.clone() else {
            match &mut self.role {
                Role::Primary(role) => _ = role.side.operator_decides(now),
                Role::Secondary(role) => _ = role.side.operator_decides(now),
                Role::Empty | Role::Running(_) => {}
            }
            let _ = reply.send(Reply::done());
            return;
        };
        let answers = self.answers_sender.clone();
        self.parts.runtime.spawn(async move {
            let expected = claim.expected;
            let (answer, said) = match arbiter.claim(claim).await {
                Ok(Verdict::Lost(register)) if register.generation > expected => {
                    let Register { holder, generation } = &register;
                    let why = format!("host {holder} holds generation {generation}; the guest is stopped here");
                    (Answer::Verdict(Verdict::Lost(register)), Reply::error(why))
                }
                Ok(verdict @ Verdict::Won { .. }) => (Answer::Verdict(verdict), Reply::done()),
                Ok(Verdict::Lost(_)) | Err(_) => (Answer::Fenced, Reply::done()),
            };
            let _ = answers.send(answer).await;
            let _ = reply.send(said);
        });
    }

    pub(super) fn status(&mut self, now: Instant) -> Status {
        let mut status = Status {
            host: self.parts.name.clone(),
            listen: self.parts.listen.to_string(),
            pid: std::process::id(),
            mode: self.mode,
            paused: self.paused,
            role: match &self.role {
                Role::Primary(_) => Some(PairRole::Primary),
                Role::Secondary(_) => Some(PairRole::Secondary),
                Role::Empty | Role::Running(_) => None,
            },
            peer: self.peer.clone(),
            lost_at_unix_us: self.lost_at_unix_us,
            decided_at_unix_us: self.decided_at_unix_us,
            digests: self.digests.report(),
            packet_link_losses: self.packet_link.losses,
            degraded: self.degraded(now),
            work: self.work(),
            peer_health: self.peer_health(now),
            totals: self.totals(),
            metrics: self.parts.metrics.clone(),
            ..Status::default()
        };
        status.packets.dropped_network = self.dropped_network;
        status.packets.lost_by_kernel = self.guest_queue().map_or(0, |queue| queue.lost());
        let (stream, disk) = self.sent_bytes();
        if let Some(links) = &self.links {
            status.queues = Queues {
                stream_bytes: links.stream_out.waiting_bytes() as u64,
                packets_bytes: links.packets_out.waiting_bytes() as u64,
                disk_bytes: links.disk_waiting_bytes() as u64,
                network_bytes: 0,
            };
            status.disk_link_losses = links.disk_link_losses.load(Ordering::Relaxed);
        }
        (status.bytes_sent, status.wire.stream_bytes, status.wire.disk_bytes) = (stream + disk, stream, disk);
        status.queues.network_bytes = self.parts.network_out.waiting_bytes() as u64;
        status.guest_id = match &mut self.role {
            Role::Empty => None,
            Role::Running(guest) => guest.domain.as_ref().and_then(|domain| domain.id()),
            Role::Primary(role) => role.side.domain().id(),
            Role::Secondary(role) => role.side.domain().id(),
        };
        match &mut self.role {
            Role::Empty => {
                (status.state, status.why) = ("empty".into(), self.left.clone());
                report::images(&mut status, &self.parts.disks);
            }
            Role::Running(guest) => {
                status.guest = Some(guest.name.clone());
                (status.protection, status.state) = (Protection::Unprotected, "running".into());
                status.why = Some("nobody asked for protection: xl-colo protect PEER".into());
            }
            Role::Primary(role) => report::primary(&mut status, role, now),
            Role::Secondary(role) => report::secondary(&mut status, role),
        }
        for (disk, export) in status.disks.iter_mut().zip(&self.parts.exports) {
            disk.export = Some(export.clone());
        }
        let Wire { memory_bytes, stream_bytes, .. } = status.wire;
        status.wire.ratio = (memory_bytes > 0).then(|| stream_bytes as f64 / memory_bytes as f64);
        status.health = Health::of(status.protection, &status.degraded);
        if status.protection == Protection::Stopped
            && let Some(holder) = &self.holder
        {
            status.why = Some(format!("host {} holds generation {}", holder.holder, holder.generation));
        }
        if let Some(why) = self.peer_left.as_ref().filter(|_| status.protection == Protection::Unprotected) {
            status.why = Some(why.clone());
        }
        status
    }
}
