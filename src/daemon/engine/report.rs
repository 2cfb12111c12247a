//! Fills a [`Status`] from the side that a host plays.

use super::{PrimaryRole, SecondaryRole};
use crate::clock::Instant;
use crate::colo::hello::disk_name;
use crate::colo::{Exit, Loss, primary as primary_machine, secondary as secondary_machine};
use crate::daemon::pair::Samples;
use crate::daemon::pair::primary::PrimarySide;
use crate::daemon::pair::secondary::SecondarySide;
use crate::daemon::status::{
    Checkpoints, Disk, FLOWS_MAX, LastCheckpoint, LockStep, Packets, Percentiles, Protection, Status,
};
use crate::page::PAGE_SIZE;
use crate::replica::epochs::ReplicaStatus;
use crate::replica::mirror::MirrorStatus;
use crate::replica::state::{self, Standing};
use std::path::PathBuf;

/// What a guest risks whose packets wait for nothing.
pub(super) const RELEASED_AT_ONCE: &str =
    "packets leave before the peer owns what they tell (release-at-once, remus -n)";

/// How safe the guest is, as its primary sees it.
pub(super) fn of_primary(side: &PrimarySide) -> Protection {
    use primary_machine::State;
    let machine = side.machine();
    match machine.state() {
        _ if machine.is_protected() => Protection::Protected,
        State::Exited(Exit::Stopped) => Protection::Stopped,
        State::Exited(Exit::Alone) => Protection::TakenOver,
        State::Exited(_) => Protection::Unprotected,
        State::Dismissing => Protection::Unprotected,
        State::Arbitrating => Protection::Arbitrating,
        State::Held => Protection::Held,
        _ => Protection::Syncing,
    }
}

/// The same, as its secondary sees it.
pub(super) fn of_secondary(side: &SecondarySide) -> Protection {
    use secondary_machine::State;
    match side.machine().state() {
        State::Joining => Protection::Syncing,
        State::Exited(Exit::Alone) => Protection::TakenOver,
        State::Dismissed | State::Exited(Exit::Stopped | Exit::NoState | Exit::Unprotected | Exit::Dismissed) => {
            Protection::Stopped
        }
        State::Exited(Exit::Failed) => Protection::Failed,
        State::Arbitrating => Protection::Arbitrating,
        State::Held => Protection::Held,
        _ => Protection::StandingBy,
    }
}

/// The primary's part.
pub(super) fn primary(status: &mut Status, role: &PrimaryRole, now: Instant) {
    use primary_machine::State;
    let (side, machine) = (&role.side, role.side.machine());
    status.guest = Some(role.guest.name.clone());
    status.state = format!("{:?}", machine.state());
    status.protection = of_primary(side);
    status.why = why(side.error(), machine.loss(), machine.hold());
    if machine.state() == State::Dismissing {
        status.why = Some("the protection is being ended; the peer has not given the guest up yet".into());
    }
    (status.generation, status.epoch) = (side.generation(), machine.epoch());
    (status.failover, status.exit_reason) = (machine.failover(), machine.exit_reason());
    let stats = side.stats();
    if side.releases_at_once() && machine.is_protected() {
        status.risk = Some(RELEASED_AT_ONCE.into());
    }
    if machine.is_protected() {
        status.recovery_point_ms = side.recovery_point().map(|at| (now - at).as_millis() as u64);
    }
    let by_cause = stats.checkpoints.iter().map(|(cause, count)| (cause.to_string(), *count)).collect();
    status.checkpoints = Checkpoints { total: stats.checkpoints.values().sum(), by_cause };
    (status.pause_us, status.interval_us) = (percentiles(&stats.pause), percentiles(side.intervals()));
    status.last_checkpoint = side
        .last_taken()
        .map(|taken| LastCheckpoint { age_ms: (now - taken.owned_at).as_millis() as u64, checkpoint: taken.into() });
    status.dirty_pages_per_s = side.dirty_pages_per_s();
    status.wire.memory_bytes = (stats.pages + stats.copy_pages) * PAGE_SIZE as u64;
    (status.pages, status.copied_pages) = (stats.pages, stats.copied_pages);
    status.asked.clone_from(&stats.asked);
    let packets = side.packets();
    status.packets = Packets {
        compared: packets.compared,
        released: packets.released,
        held: packets.held,
        waiting: packets.currently_held,
        dropped_stale: packets.dropped_stale,
        dropped_network: status.packets.dropped_network,
        lost_by_kernel: status.packets.lost_by_kernel,
    };
    status.lock_step = side.fallback().filter(|_| machine.is_protected()).map(|fallback| LockStep {
        buffering: fallback.tried_again_at().is_some(),
        given_up: fallback.count(),
        tried_again_in_ms: fallback.tried_again_at().map(|at| (at - now).as_millis() as u64),
    });
    status.flows = side.flows(FLOWS_MAX).into_iter().map(Into::into).collect();
    let copying = stats.copy_begun.map(|begun| stats.disk_read_at.unwrap_or(now) - begun);
    let rate = |bytes: u64| {
        let copying_ms = copying.map_or(0, |copying| copying.as_millis() as u64);
        bytes.saturating_mul(1000).checked_div(copying_ms)
    };
    let disk = |(index, mirror): (usize, MirrorStatus)| Disk {
        name: Some(disk_name(index)),
        copied_bytes: mirror.sync_done_bytes,
        total_bytes: mirror.sync_total_bytes,
        resync: mirror.attached.then(|| mirror.sync_what.into()),
        skipped_bytes: mirror.sync_skipped_bytes,
        sent_bytes: mirror.sync_sent_bytes,
        copy_bytes_per_s: mirror.attached.then(|| rate(mirror.sync_done_bytes)).flatten(),
        spared_bytes: mirror.spared_bytes,
        waiting_bytes: mirror.queued_bytes,
        fenced_writes: 0,
        errors: mirror.error.into_iter().collect(),
        image: None,
        export: None,
    };
    status.disks = role.guest.mirrors.status().into_iter().enumerate().map(disk).collect();
    status.disk = Disk::sum(&status.disks);
}

/// The secondary's part.
pub(super) fn secondary(status: &mut Status, role: &SecondaryRole) {
    let (side, machine) = (&role.side, role.side.machine());
    status.guest = Some(role.guest.name.clone());
    status.state = format!("{:?}", machine.state());
    status.protection = of_secondary(side);
    status.why = why(side.error(), machine.loss(), machine.hold());
    (status.generation, status.epoch) = (side.generation(), machine.epoch());
    (status.failover, status.exit_reason) = (machine.failover(), machine.exit_reason());
    let stats = side.stats();
    (status.checkpoints.total, status.pages) = (stats.checkpoints, stats.pages);
    let disk = |(index, replica): (usize, ReplicaStatus)| Disk {
        name: Some(disk_name(index)),
        total_bytes: replica.size_bytes,
        waiting_bytes: replica.debt_bytes,
        fenced_writes: replica.fenced_writes,
        errors: replica.errors,
        image: image(replica.standing),
        ..Disk::default()
    };
    status.disks = side.replicas().status().into_iter().enumerate().map(disk).collect();
    status.disk = Disk { total_bytes: 0, ..Disk::sum(&status.disks) };
}

fn percentiles(samples: &Samples) -> Percentiles {
    let [p50, p99] = [50, 99].map(|percent| samples.percentile_us(percent));
    Percentiles { p50, p99, max: samples.max_us() }
}

/// What the images of a host without a guest are worth.
pub(super) fn images(status: &mut Status, images: &[PathBuf]) {
    let found = |path: &PathBuf| state::found(path).map_or_else(|e| Some(e.to_string()), image);
    let disk = |(index, path)| Disk { name: Some(disk_name(index)), image: found(path), ..Disk::default() };
    status.disks = images.iter().enumerate().map(disk).collect();
    status.disk = Disk::sum(&status.disks);
}

/// What an image is worth, if it ever held a replica.
fn image(standing: Standing) -> Option<String> {
    (standing != Standing::NoRecord).then(|| standing.to_string())
}

/// What went wrong here, or why the peer was lost, and why nobody could decide if nobody could.
fn why(error: Option<&str>, loss: Option<&Loss>, hold: Option<&str>) -> Option<String> {
    let first = error.map(str::to_owned).or_else(|| loss.map(ToString::to_string))?;
    Some(match hold {
        Some(hold) => format!("{first}; held: {hold}"),
        None => first,
    })
}
