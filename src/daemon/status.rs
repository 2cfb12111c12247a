//! What a host says about itself.
//!
//! One structure, for people and for programs. The rule for every field: a value that was not measured is absent,
//! never zero; and `protection` says `protected` only while the secondary owns a state it could go on from.

use crate::colo::failover::{ExitReason, FailoverStatus};
use crate::colo::hello::Mode;
use crate::daemon::events::{Checkpoint, Progress};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

pub mod fields;
mod packets;
mod totals;

pub use packets::{Digests, Flow, LockStep};
pub use totals::Totals;

/// Flows that a status tells of.
pub const FLOWS_MAX: usize = 8;

/// How safe the guest is, as seen from this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protection {
    /// This host has no guest.
    #[default]
    Empty,
    /// The guest runs here and nothing stands ready.
    Unprotected,
    /// The first copy is under way.
    Syncing,
    /// The peer owns a state it could go on from.
    Protected,
    /// This host stands ready.
    StandingBy,
    /// The peer is lost; the arbiter is being asked.
    Arbitrating,
    /// Nobody could decide; the guest is paused here.
    Held,
    /// The guest runs here because its other host was lost.
    TakenOver,
    /// Another host has the guest; it was stopped here.
    Stopped,
    /// This host's copy is unusable.
    Failed,
}

/// What an operator asks first: is the guest safe?
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// No guest is here.
    #[default]
    Empty,
    /// If this host dies now, the guest is gone: nothing stands ready, or not yet.
    Unprotected,
    /// The peer could go on, and nothing is the matter.
    Protected,
    /// The peer could go on, and something is the matter: `degraded` says what.
    Degraded,
    /// This host could go on.
    StandingBy,
    /// The peer is lost, and it is not decided who goes on.
    Undecided,
    /// The guest goes on here, alone: `why` says why.
    TakenOver,
    /// Another host has it.
    Stopped,
    /// This host's copy is unusable.
    Failed,
}

impl Health {
    /// Of a guest that is so far protected, and of which this is the matter.
    #[must_use]
    pub fn of(protection: Protection, degraded: &[String]) -> Self {
        match protection {
            Protection::Empty => Self::Empty,
            Protection::Unprotected | Protection::Syncing => Self::Unprotected,
            Protection::Protected if degraded.is_empty() => Self::Protected,
            Protection::Protected => Self::Degraded,
            Protection::StandingBy => Self::StandingBy,
            Protection::Arbitrating | Protection::Held => Self::Undecided,
            Protection::TakenOver => Self::TakenOver,
            Protection::Stopped => Self::Stopped,
            Protection::Failed => Self::Failed,
        }
    }

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Unprotected => "unprotected",
            Self::Protected => "protected",
            Self::Degraded => "degraded",
            Self::StandingBy => "standing-by",
            Self::Undecided => "undecided",
            Self::TakenOver => "taken-over",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

/// Which side of a pair a host is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PairRole {
    /// Its guest is replicated.
    Primary,
    /// It has the copy.
    Secondary,
}

impl PairRole {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        }
    }
}

/// Checkpoints that were owned.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Checkpoints {
    /// All of them.
    pub total: u64,
    /// By what caused them.
    pub by_cause: BTreeMap<String, u64>,
}

/// Times of many checkpoints, in µs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// Median.
    pub p50: Option<u32>,
    /// 99th percentile.
    pub p99: Option<u32>,
    /// Longest.
    pub max: Option<u32>,
}

/// The last checkpoint that the secondary owns.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LastCheckpoint {
    /// Since the secondary came to own it, in ms. What it holds is older: see [`Status::recovery_point_ms`].
    pub age_ms: u64,
    /// It.
    #[serde(flatten)]
    pub checkpoint: Checkpoint,
}

/// What a protection put on the wire, in bytes.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Wire {
    /// Memory that was to be sent, as it is in the guest.
    pub memory_bytes: u64,
    /// What the stream carried for it, device state and messages included.
    pub stream_bytes: u64,
    /// What the disk links carried.
    pub disk_bytes: u64,
    /// `stream_bytes` to `memory_bytes`.
    pub ratio: Option<f64>,
}

/// What waits to be sent, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Queues {
    /// For the stream.
    pub stream_bytes: u64,
    /// For the packet link.
    pub packets_bytes: u64,
    /// For the disk links.
    pub disk_bytes: u64,
    /// For the network.
    pub network_bytes: u64,
}

/// How the peer is, as its heartbeats tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PeerHealth {
    /// Since it was heard.
    pub heartbeat_age_ms: u64,
    /// Since the last beat of ours was sent that it confirmed.
    pub confirmed_age_ms: u64,
    /// It is lost when either is this old.
    pub lost_after_ms: u64,
}

/// The guest's packets at the proxy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Packets {
    /// Released because the secondary produced the same.
    pub compared: u64,
    /// Released, for whatever reason.
    pub released: u64,
    /// Had to wait.
    pub held: u64,
    /// Wait now.
    pub waiting: u64,
    /// Secondary packets dropped because their epoch had ended.
    pub dropped_stale: u64,
    /// Frames for the network that its queue could not take.
    pub dropped_network: u64,
    /// Frames of the guest that the kernel lost on their way here.
    #[serde(default)]
    pub lost_by_kernel: u64,
}

/// The disk, or all disks together.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Disk {
    /// Its name, where it is one of the guest's disks and not all together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What both hosts' configurations call it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// Bytes of the first copy that are at the secondary.
    pub copied_bytes: u64,
    /// Bytes the first copy has in all.
    pub total_bytes: u64,
    /// What the first copy copies: `all`, `nonzero` (the secondary's image is new), `changed` (since the checkpoint that
    /// it has), or `differing` (by its hashes).
    #[serde(default)]
    pub resync: Option<String>,
    /// Of the copied bytes, those that the secondary had already.
    #[serde(default)]
    pub skipped_bytes: u64,
    /// Of the copied bytes, those that were sent.
    #[serde(default)]
    pub sent_bytes: u64,
    /// How fast the first copy got on with the disk, in bytes per second.
    #[serde(default)]
    pub copy_bytes_per_s: Option<u64>,
    /// Bytes that were overwritten before they could be sent, and were not.
    #[serde(default)]
    pub spared_bytes: u64,
    /// Bytes that wait for the wire (primary), or for the base image (secondary).
    pub waiting_bytes: u64,
    /// Writes of an old generation that were refused.
    pub fenced_writes: u64,
    /// What went wrong.
    pub errors: Vec<String>,
    /// What the image would be worth if this host crashed now, once it held a replica. Of several images, what the
    /// first is worth that is not whole, or else the first.
    pub image: Option<String>,
}

impl Disk {
    /// All disks together.
    #[must_use]
    pub fn sum(disks: &[Self]) -> Self {
        let add = |of: fn(&Self) -> u64| disks.iter().map(of).fold(0, u64::saturating_add);
        let not_whole = |disk: &&Self| disk.image.as_ref().is_some_and(|image| image.starts_with("not whole"));
        let told = disks.iter().find(not_whole).or(disks.first());
        let named = |disk: &Self, error: &String| match &disk.name {
            Some(name) if disks.len() > 1 => format!("{name}: {error}"),
            _ => error.clone(),
        };
        let errors = disks.iter().flat_map(|disk| disk.errors.iter().map(|error| named(disk, error)));
        Self {
            name: None,
            export: None,
            copied_bytes: add(|disk| disk.copied_bytes),
            total_bytes: add(|disk| disk.total_bytes),
            resync: disks.iter().find_map(|disk| disk.resync.clone()),
            skipped_bytes: add(|disk| disk.skipped_bytes),
            sent_bytes: add(|disk| disk.sent_bytes),
            copy_bytes_per_s: disks.iter().filter_map(|disk| disk.copy_bytes_per_s).reduce(u64::saturating_add),
            spared_bytes: add(|disk| disk.spared_bytes),
            waiting_bytes: add(|disk| disk.waiting_bytes),
            fenced_writes: add(|disk| disk.fenced_writes),
            errors: errors.collect(),
            image: told.and_then(|disk| disk.image.clone()),
        }
    }
}

/// A host's word about its guest.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// The host's name.
    pub host: String,
    /// Its process.
    pub pid: u32,
    /// The guest's name, if there is one.
    pub guest: Option<String>,
    /// Its number on this host, if it is a Xen domain.
    #[serde(default)]
    pub guest_id: Option<u16>,
    /// Where peers connect.
    #[serde(default)]
    pub listen: String,
    /// Whether it is safe.
    #[serde(default)]
    pub health: Health,
    /// How safe it is, exactly.
    pub protection: Protection,
    /// What is the matter, of a guest that is protected.
    #[serde(default)]
    pub degraded: Vec<String>,
    /// What makes it less safe than that, because somebody asked for it.
    #[serde(default)]
    pub risk: Option<String>,
    /// Why it is not protected, in a sentence.
    pub why: Option<String>,
    /// Which side of a pair it is, or was last.
    #[serde(default)]
    pub role: Option<PairRole>,
    /// Whether the guest was stopped by an order.
    #[serde(default)]
    pub paused: bool,
    /// COLO or Remus, once protected.
    pub mode: Option<Mode>,
    /// The state of the protocol machine.
    pub state: String,
    /// The peer.
    pub peer: Option<String>,
    /// The generation in force here.
    pub generation: u64,
    /// The epoch of the guest's output.
    pub epoch: u64,
    /// QEMU's failover state.
    pub failover: FailoverStatus,
    /// QEMU's COLO_EXIT reason.
    pub exit_reason: ExitReason,
    /// Age of the state the secondary owns, since the guest was suspended for it: what a takeover now would go back by,
    /// in ms.
    pub recovery_point_ms: Option<u64>,
    /// Checkpoints.
    pub checkpoints: Checkpoints,
    /// Why the comparator last asked for a checkpoint, and in which flow.
    #[serde(default)]
    pub asked: Option<String>,
    /// The last of them.
    #[serde(default)]
    pub last_checkpoint: Option<LastCheckpoint>,
    /// How long the guest stood still for each.
    pub pause_us: Percentiles,
    /// From one to the next.
    #[serde(default)]
    pub interval_us: Percentiles,
    /// How many pages the guest writes to a second, over the last checkpoints.
    #[serde(default)]
    pub dirty_pages_per_s: Option<u64>,
    /// Bytes sent to the peer.
    pub bytes_sent: u64,
    /// What they were.
    #[serde(default)]
    pub wire: Wire,
    /// What waits.
    #[serde(default)]
    pub queues: Queues,
    /// How the peer is.
    #[serde(default)]
    pub peer_health: Option<PeerHealth>,
    /// Work that takes its time, while there is some.
    #[serde(default)]
    pub work: Option<Progress>,
    /// How often the connection of one of the disks was lost in this protection, and another took its place.
    #[serde(default)]
    pub disk_link_losses: u64,
    /// The same of the packet link.
    #[serde(default)]
    pub packet_link_losses: u64,
    /// Pages captured or received.
    pub pages: u64,
    /// Pages of the first copy that are sent, and how many it has.
    pub copied_pages: (u64, u64),
    /// Packets.
    pub packets: Packets,
    /// Whether lock-step pays, on a primary in lock-step.
    #[serde(default)]
    pub lock_step: Option<LockStep>,
    /// Digests on the packet link, where both hosts agreed on them.
    #[serde(default)]
    pub digests: Option<Digests>,
    /// The flows that diverged, worst first, at most [`FLOWS_MAX`].
    #[serde(default)]
    pub flows: Vec<Flow>,
    /// Its disks together.
    pub disk: Disk,
    /// Each of its disks.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// When the peer was lost, in µs of Unix time.
    pub lost_at_unix_us: Option<u64>,
    /// When the arbitration was decided, in µs of Unix time.
    pub decided_at_unix_us: Option<u64>,
    /// What was counted of the guest since this process began.
    #[serde(default)]
    pub totals: Totals,
    /// Where its metrics are read, if they are told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "no guest",
            Self::Unprotected => "UNPROTECTED",
            Self::Syncing => "syncing (not protected yet)",
            Self::Protected => "protected",
            Self::StandingBy => "standing by",
            Self::Arbitrating => "arbitrating",
            Self::Held => "HELD: paused until the arbiter answers or you decide (xl-colo failover)",
            Self::TakenOver => "taken over, running alone",
            Self::Stopped => "stopped: another host has the guest",
            Self::Failed => "FAILED: this copy is unusable",
        })
    }
}

impl Status {
    /// A line an image; its disk's size and name where there are several.
    fn images(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.disks.len() < 2 {
            return self.disk.image.iter().try_for_each(|image| write!(f, "\ndisk image  {image}"));
        }
        self.disks.iter().try_for_each(|disk| {
            let (name, mib) = (disk.name.as_deref().unwrap_or("disk"), disk.total_bytes >> 20);
            let export = disk.export.as_ref().map_or(String::new(), |export| format!(" {export}"));
            let size = if disk.total_bytes > 0 { format!(" {mib} MiB") } else { String::new() };
            let waiting = if disk.waiting_bytes > 0 {
                format!(", {} KiB wait", disk.waiting_bytes.div_ceil(1024))
            } else {
                String::new()
            };
            let image = disk.image.as_ref().map_or(String::new(), |image| format!(", image {image}"));
            write!(f, "\n{name:<11}{export}{size}{waiting}{image}")
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "host        {} (pid {})", self.host, self.pid)?;
        self.metrics.iter().try_for_each(|metrics| writeln!(f, "metrics     {metrics}"))?;
        let Some(guest) = &self.guest else {
            write!(f, "guest       none")?;
            self.why.iter().try_for_each(|why| write!(f, "\nbecause     {why}"))?;
            return self.images(f);
        };
        writeln!(f, "guest       {guest}, generation {}, epoch {}", self.generation, self.epoch)?;
        writeln!(f, "protection  {}{}", self.protection, if self.paused { ", stopped by an order" } else { "" })?;
        if let Some(risk) = &self.risk {
            writeln!(f, "UNSAFE      {risk}")?;
        }
        // What makes it unsafe was said.
        for reason in self.degraded.iter().filter(|reason| Some(*reason) != self.risk.as_ref()) {
            writeln!(f, "DEGRADED    {reason}")?;
        }
        if let Some(why) = &self.why {
            writeln!(f, "because     {why}")?;
        }
        if let Some(mode) = self.mode {
            let peer = self.peer.as_deref().unwrap_or("unknown");
            writeln!(f, "pair        {mode}, peer {peer}, state {}", self.state)?;
        }
        if self.protection == Protection::Syncing {
            let (done, all) = self.copied_pages;
            let mib = |pages: u64| pages / 256;
            writeln!(
                f,
                "first copy  memory {} of {} MiB, disk {} of {} MiB",
                mib(done),
                mib(all),
                self.disk.copied_bytes >> 20,
                self.disk.total_bytes >> 20
            )?;
            let Disk { sent_bytes, skipped_bytes, copy_bytes_per_s, ref resync, .. } = self.disk;
            if let Some(what) = resync {
                let rate = copy_bytes_per_s.map(|rate| format!(", at {} MiB/s", rate >> 20)).unwrap_or_default();
                let (sent_kib, skipped_mib) = (sent_bytes >> 10, skipped_bytes >> 20);
                writeln!(f, "resync      {what}: {sent_kib} KiB sent, {skipped_mib} MiB were there already{rate}")?;
            }
        }
        if let Some(age_ms) = self.recovery_point_ms {
            writeln!(f, "recovery    the peer could go on from {age_ms} ms ago")?;
        }
        if self.checkpoints.total > 0 {
            let causes: Vec<_> = self.checkpoints.by_cause.iter().map(|(cause, n)| format!("{cause} {n}")).collect();
            let causes = if causes.is_empty() { String::new() } else { format!(" ({})", causes.join(", ")) };
            writeln!(f, "checkpoints {}{causes}", self.checkpoints.total)?;
        }
        if let Some(asked) = &self.asked {
            writeln!(f, "last asked  {asked}")?;
        }
        if let Some(LastCheckpoint { age_ms, checkpoint: last }) = &self.last_checkpoint {
            let Checkpoint { checkpoint, cause, pages, .. } = last;
            writeln!(f, "last        checkpoint {checkpoint} because of {cause}, {age_ms} ms ago, {pages} pages")?;
        }
        if let Percentiles { p50: Some(p50), p99: Some(p99), max: Some(max) } = self.pause_us {
            writeln!(f, "pause       p50 {p50} µs, p99 {p99} µs, max {max} µs")?;
        }
        if let Percentiles { p50: Some(p50), p99: Some(p99), max: Some(max) } = self.interval_us {
            let [p50, p99, max] = [p50, p99, max].map(|us| us / 1000);
            writeln!(f, "interval    p50 {p50} ms, p99 {p99} ms, max {max} ms")?;
        }
        if let Some(rate) = self.dirty_pages_per_s {
            writeln!(f, "dirty       {rate} pages/s")?;
        }
        let packets = &self.packets;
        if packets.released + packets.waiting > 0 {
            writeln!(
                f,
                "packets     {} compared, {} released, {} held, {} waiting",
                packets.compared, packets.released, packets.held, packets.waiting
            )?;
        }
        if packets.lost_by_kernel > 0 {
            writeln!(f, "            {} of the guest's lost by the kernel", packets.lost_by_kernel)?;
        }
        if let Some(digests) = self.digests {
            writeln!(f, "digests     {digests}")?;
        }
        if let Some(lock_step) = self.lock_step.filter(|it| it.given_up > 0) {
            writeln!(f, "lock-step   {lock_step}")?;
        }
        for flow in &self.flows {
            writeln!(f, "flow        {flow}")?;
        }
        if self.protection == Protection::TakenOver && self.disk.waiting_bytes > 0 {
            writeln!(f, "merging     {} KiB still to be written to the disk image", self.disk.waiting_bytes >> 10)?;
        }
        if self.mode.is_some() && self.role == Some(PairRole::Primary) {
            let Queues { stream_bytes, packets_bytes, disk_bytes, network_bytes } = self.queues;
            let [stream, packets, disk, network] =
                [stream_bytes, packets_bytes, disk_bytes, network_bytes].map(|bytes| bytes.div_ceil(1024));
            writeln!(f, "queues      stream {stream} KiB, packets {packets}, disk {disk}, network {network}")?;
            writeln!(f, "disk lag    {} KiB wait for the peer", self.disk.waiting_bytes.div_ceil(1024))?;
        }
        if let Some(PeerHealth { heartbeat_age_ms, confirmed_age_ms, lost_after_ms }) = self.peer_health {
            write!(f, "peer        heard {heartbeat_age_ms} ms ago, hears us {confirmed_age_ms} ms ago; ")?;
            writeln!(f, "lost after {lost_after_ms} ms")?;
        }
        write!(f, "sent        {} KiB", self.bytes_sent / 1024)?;
        if let Some(ratio) = self.wire.ratio {
            let (stream, disk) = (self.wire.stream_bytes / 1024, self.wire.disk_bytes / 1024);
            let memory = self.wire.memory_bytes / 1024;
            write!(f, ": stream {stream} for {memory} KiB of memory (ratio {ratio:.3}), disk {disk}")?;
        }
        if self.disk_link_losses > 0 {
            write!(f, "\ndisk links  lost {} times, and made again", self.disk_link_losses)?;
        }
        if self.packet_link_losses > 0 {
            write!(f, "\npacket link lost {} times, and made again", self.packet_link_losses)?;
        }
        self.images(f)?;
        for error in &self.disk.errors {
            write!(f, "\ndisk error  {error}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resync_and_a_merge_say_how_far_they_are() {
        let mut status = Status { guest: Some("web".into()), protection: Protection::Syncing, ..Status::default() };
        status.disk = Disk { copied_bytes: 48 << 20, total_bytes: 64 << 20, ..Disk::default() };
        assert!(!status.to_string().contains("resync"));
        status.disk.resync = Some("changed".into());
        (status.disk.sent_bytes, status.disk.skipped_bytes) = (192 << 10, 47 << 20);
        status.disk.copy_bytes_per_s = Some(100 << 20);
        let text = status.to_string();
        let lines =
            ["disk 48 of 64 MiB\n", "\nresync      changed: 192 KiB sent, 47 MiB were there already, at 100 MiB/s\n"];
        assert!(lines.iter().all(|line| text.contains(line)), "{text}");

        (status.protection, status.disk.waiting_bytes) = (Protection::TakenOver, 3 << 20);
        let text = status.to_string();
        assert!(text.contains("\nmerging     3072 KiB still to be written to the disk image\n"), "{text}");
        assert!(!text.contains("resync"), "{text}");
    }
}
