//! Looks after every input whether something happened that is worth an [event](crate::daemon::events).
//!
//! What changes with a state is compared with what was told last; what changes all the time (how far the first copy is,
//! whether something is the matter) is looked at ten times a second and told once a second, so that a packet costs a
//! few comparisons. Two changes within one input are told as one.

use super::{Engine, Role, report};
use crate::clock::Instant;
use crate::colo::fallback::Release;
use crate::colo::{Loss, primary, secondary};
use crate::daemon::engine_clock;
use crate::daemon::events::{self, Checkpoint, Progress, What, Work, cut};
use crate::daemon::links::lock;
use crate::daemon::pair::primary::PrimarySide;
use crate::daemon::status::{PeerHealth, Protection, Status};
use crate::replica::epochs::ReplicaStatus;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Time between two looks at what changes all the time.
const LOOK: Duration = Duration::from_millis(100);
/// Time between two words of how far something is.
const PROGRESS: Duration = Duration::from_secs(1);

/// What was told last.
#[derive(Debug, Default)]
pub(super) struct Telling {
    protection: Protection,
    generation: u64,
    degraded: Vec<String>,
    paused: bool,
    /// States loaded by this secondary.
    loaded: u64,
    disk_link_losses: u64,
    disk_links_down: u64,
    looked_at: Option<Instant>,
    progress: Option<(Instant, Progress)>,
    /// What the stream had carried by the checkpoint that was told of last.
    stream_bytes: u64,
    output: Output,
    /// And the guest that it is for.
    span: Option<(Option<String>, tracing::Span)>,
}

/// What a takeover is for: the guest is heard again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Output {
    #[default]
    NotAwaited,
    /// Since the decision.
    Awaited(Instant),
    /// Before the takeover could be told of.
    Went { after_us: u64 },
}

impl Telling {
    /// It was decided that the guest goes on here, alone.
    pub(super) fn await_output(&mut self, now: Instant) {
        self.output = Output::Awaited(now);
    }

    /// A frame goes to the network.
    pub(super) fn output(&mut self) {
        if let Output::Awaited(since) = self.output {
            self.output = Output::Went { after_us: (engine_clock() - since).as_micros() as u64 };
        }
    }
}

/// The guest is protected; what is the matter all the same.
fn of_side(side: &PrimarySide, now: Instant) -> Vec<String> {
    let mut reasons = Vec::new();
    if side.releases_at_once() {
        reasons.push(report::RELEASED_AT_ONCE.to_owned());
    }
    if side.fallback().is_some_and(|fallback| fallback.release() == Release::Buffered) {
        reasons.push(
            "lock-step is given up for now: the guests differ too often, and output waits for checkpoints".into(),
        );
    }
    // Twice the delay for a checkpoint that began late and took long, and time for the wire.
    let limit = side.machine().checkpoint_delay() * 2 + Duration::from_secs(2);
    if side.stats().last_owned_at.is_some_and(|at| now - at > limit) {
        reasons.push(format!("the peer came to own no state for more than {} ms", limit.as_millis()));
    }
    reasons
}

impl Engine {
    /// The name of the guest that is here.
    pub(super) fn guest(&self) -> Option<&str> {
        self.role.guest().map(|guest| guest.name.as_str())
    }

    /// Something happened to the guest.
    pub(super) fn tell(&self, what: What) {
        self.parts.history.tell(self.guest(), what);
    }

    /// What everything that is logged belongs to.
    pub(super) fn span(&mut self) -> tracing::Span {
        let guest = self.guest();
        if self.telling.span.as_ref().is_none_or(|(of, _)| of.as_deref() != guest) {
            let (guest, span) = (guest.map(str::to_owned), events::span(&self.parts.name, guest));
            self.telling.span = Some((guest, span));
        }
        self.telling.span.as_ref().map_or_else(tracing::Span::none, |(_, span)| span.clone())
    }

    /// The peer is lost.
    pub(super) fn tell_loss(&self, loss: &Loss) {
        if *loss != Loss::Requested {
            let heard = self.links.as_ref().map(|links| lock(&links.heartbeat).silence(engine_clock()).0);
            let heard_ms = heard.map(|heard| heard.as_millis() as u64);
            self.tell(What::LinkLost { link: "peer".into(), reason: cut(&loss.to_string()), heard_ms });
        }
    }

    /// Tells what has changed.
    pub(super) fn tell_events(&mut self, now: Instant) {
        let taken = match &mut self.role {
            Role::Primary(role) => role.side.poll_taken(),
            _ => None,
        };
        if let Some(taken) = &taken {
            let (stream_bytes, _) = self.sent_bytes();
            let before = std::mem::replace(&mut self.telling.stream_bytes, stream_bytes);
            let stream_bytes = Some(stream_bytes.saturating_sub(before));
            self.tell(What::Checkpoint(Checkpoint { stream_bytes, ..Checkpoint::from(taken) }));
        }
        self.tell_load();
        self.tell_disk_links();
        let looks = self.telling.looked_at.is_none_or(|at| now - at >= LOOK);
        self.tell_protection(now, looks);
        if let (Protection::TakenOver, Output::Went { after_us }) = (self.telling.protection, self.telling.output) {
            self.telling.output = Output::NotAwaited;
            self.tell(What::FirstOutput { after_us });
        }
        if std::mem::replace(&mut self.telling.paused, self.paused) != self.paused {
            self.tell(if self.paused { What::Paused } else { What::Resumed });
        }
        if looks {
            self.telling.looked_at = Some(now);
            self.tell_progress(now);
        }
    }

    fn tell_load(&mut self) {
        let Role::Secondary(role) = &self.role else { return };
        let stats = role.side.stats();
        if stats.checkpoints != self.telling.loaded && role.side.machine().state() == secondary::State::Running {
            self.telling.loaded = stats.checkpoints;
            let load_us = stats.last_load.as_micros() as u64;
            self.tell(What::Loaded { checkpoint: stats.checkpoints, load_us });
        }
    }

    fn tell_disk_links(&mut self) {
        let Some(links) = &self.links else { return };
        let losses = links.disk_link_losses.load(Ordering::Relaxed);
        let down = links.disk_links_down.load(Ordering::Relaxed);
        if losses > self.telling.disk_link_losses {
            let reason = "its connection ended; another is being made".into();
            self.tell(What::LinkLost { link: "disk".into(), reason, heard_ms: None });
        }
        if down < self.telling.disk_links_down || down == 0 && losses > self.telling.disk_link_losses {
            self.tell(What::LinkBack { link: "disk".into() });
        }
        (self.telling.disk_link_losses, self.telling.disk_links_down) = (losses, down);
    }

    /// A pair begins: its counters do.
    pub(super) fn tell_from_zero(&mut self) {
        let Telling { protection, generation, degraded, .. } = std::mem::take(&mut self.telling);
        self.telling = Telling { protection, generation, degraded, ..Telling::default() };
    }

    fn tell_protection(&mut self, now: Instant, looks: bool) {
        let (protection, generation) = match &self.role {
            Role::Empty => (Protection::Empty, 0),
            Role::Running(_) => (Protection::Unprotected, 0),
            // Not over yet, and what comes of it is told then.
            Role::Primary(role) if role.side.machine().state() == primary::State::Dismissing => return,
            Role::Primary(role) => (report::of_primary(&role.side), role.side.generation()),
            Role::Secondary(role) => (report::of_secondary(&role.side), role.side.generation()),
        };
        let is_same = (self.telling.protection, self.telling.generation) == (protection, generation);
        if is_same && !looks {
            return;
        }
        let degraded = if protection == Protection::Protected { self.degraded(now) } else { Vec::new() };
        if is_same && degraded == self.telling.degraded {
            return;
        }
        (self.telling.protection, self.telling.generation, self.telling.degraded) = (protection, generation, degraded);
        let status = self.status(now);
        self.tell(of_status(&status, &self.telling.degraded));
    }

    /// What is the matter with a guest that is protected.
    pub(super) fn degraded(&self, now: Instant) -> Vec<String> {
        let mut reasons: Vec<_> = self.packet_link_trouble().into_iter().collect();
        let Role::Primary(role) = &self.role else { return reasons };
        if !role.side.machine().is_protected() {
            return Vec::new();
        }
        reasons.extend(of_side(&role.side, now));
        let down = self.links.as_ref().map_or(0, |links| links.disk_links_down.load(Ordering::Relaxed));
        if down > 0 {
            reasons.push("the connection of a disk was lost, and is being made again".into());
        }
        reasons
    }

    /// Work that takes its time, if there is some.
    pub(super) fn work(&mut self) -> Option<Progress> {
        match &self.role {
            Role::Primary(role) if role.side.wants_copy() => {
                let (pages, all_pages) = role.side.stats().copied_pages;
                let disks = role.guest.mirrors.status();
                let sum = |of: fn(&_) -> u64| disks.iter().map(of).sum::<u64>();
                let is_whole = disks.iter().all(|disk| ["all", "nonzero"].contains(&disk.sync_what));
                Some(Progress {
                    work: if is_whole { Work::FirstCopy } else { Work::Resync },
                    done_bytes: pages * crate::page::PAGE_SIZE as u64 + sum(|disk| disk.sync_done_bytes),
                    total_bytes: all_pages * crate::page::PAGE_SIZE as u64 + sum(|disk| disk.sync_total_bytes),
                })
            }
            Role::Secondary(role) if role.side.took_over() => {
                let disks = role.side.replicas().status();
                let sum = |of: fn(&ReplicaStatus) -> u64| disks.iter().map(of).sum::<u64>();
                let (left, done_bytes) = (sum(|disk| disk.debt_bytes), sum(|disk| disk.merged_bytes));
                (left > 0).then_some(Progress { work: Work::Commit, done_bytes, total_bytes: done_bytes + left })
            }
            _ => None,
        }
    }

    fn tell_progress(&mut self, now: Instant) {
        match (self.work(), self.telling.progress.take()) {
            (Some(progress), told) => {
                let is_due = told.is_none_or(|(at, told)| now - at >= PROGRESS || told.work != progress.work);
                self.telling.progress = Some(if is_due { (now, progress) } else { told.unwrap_or((now, progress)) });
                if is_due {
                    self.tell(What::Progress(progress));
                }
            }
            // Broken off, it is not done: the state says so.
            (None, Some((_, told))) if ended_well(told.work, self.telling.protection) => {
                self.tell(What::Progress(Progress { done_bytes: told.total_bytes, ..told }));
            }
            (None, _) => {}
        }
    }

    /// How the peer is, as its beats tell.
    pub(super) fn peer_health(&self, now: Instant) -> Option<PeerHealth> {
        let heartbeat = lock(&self.links.as_ref()?.heartbeat);
        let (heard, confirmed) = heartbeat.silence(now);
        Some(PeerHealth {
            heartbeat_age_ms: heard.as_millis() as u64,
            confirmed_age_ms: confirmed.as_millis() as u64,
            lost_after_ms: heartbeat.detection().as_millis() as u64,
        })
    }
}

fn ended_well(work: Work, protection: Protection) -> bool {
    match work {
        Work::FirstCopy | Work::Resync => matches!(protection, Protection::Syncing | Protection::Protected),
        Work::Commit => protection == Protection::TakenOver,
    }
}

/// The event of a host that has come to be like this.
fn of_status(status: &Status, degraded: &[String]) -> What {
    let reason = cut(status.why.as_deref().unwrap_or("no reason was given"));
    let (peer, mode, generation) = (cut(status.peer.as_deref().unwrap_or("unknown")), status.mode, status.generation);
    match status.protection {
        Protection::Empty => What::Empty { reason },
        Protection::Unprotected => What::Unprotected { reason },
        Protection::Syncing => What::Syncing { peer, mode, generation },
        Protection::Protected if !degraded.is_empty() => What::Degraded { reason: cut(&degraded.join("; ")) },
        Protection::Protected => What::Protected { peer, mode, generation },
        Protection::StandingBy => What::StandingBy { peer, mode, generation },
        Protection::Arbitrating => What::Arbitrating { reason },
        Protection::Held => What::Held { reason },
        Protection::TakenOver => {
            let decided = status.decided_at_unix_us.zip(status.lost_at_unix_us);
            let decided_after_ms = decided.map(|(decided, lost)| decided.saturating_sub(lost) / 1000);
            What::TakenOver { generation, reason, decided_after_ms }
        }
        Protection::Stopped => What::Stopped { reason },
        Protection::Failed => What::Failed { reason },
    }
}
