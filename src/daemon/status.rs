//! What a host says about itself.
//!
//! One structure, for people and for programs. The rule for every field: a value that was not measured is absent,
//! never zero; and `protection` says `protected` only while the secondary owns a state it could go on from.

use crate::colo::failover::{ExitReason, FailoverStatus};
use crate::colo::hello::Mode;
use crate::compare::FlowReport;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

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

/// A flow in which the two guests said different things.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Flow {
    /// Who talks to whom, and about what.
    pub flow: String,
    /// Frames of the primary that left because the secondary explained them.
    pub compared: u64,
    /// Frames of the primary that wait now.
    pub held: usize,
    /// Epochs in which the flow was a reason for a checkpoint.
    pub diverged: u64,
    /// Why it last was.
    pub last_cause: String,
    /// It was so in at least three of the last sixteen epochs.
    pub keeps_diverging: bool,
}

impl From<FlowReport> for Flow {
    fn from(report: FlowReport) -> Self {
        let FlowReport { key, compared, held, diverged, last_cause, keeps_diverging, .. } = report;
        Self { flow: key.to_string(), compared, held, diverged, last_cause: last_cause.to_string(), keeps_diverging }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let often = if self.keeps_diverging { ", KEEPS DIVERGING" } else { "" };
        let Self { flow, diverged, last_cause, .. } = self;
        write!(f, "{flow}: diverged in {diverged} epochs, last because {last_cause}{often}")
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

/// How long the guest stood still for a checkpoint, in µs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PauseUs {
    /// Median.
    pub p50: Option<u32>,
    /// 99th percentile.
    pub p99: Option<u32>,
    /// Longest.
    pub max: Option<u32>,
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
    /// Where peers connect.
    #[serde(default)]
    pub listen: String,
    /// How safe it is.
    pub protection: Protection,
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
    /// Age of the state the secondary owns: what a takeover now would go back by, in ms.
    pub recovery_point_ms: Option<u64>,
    /// Checkpoints.
    pub checkpoints: Checkpoints,
    /// Pauses.
    pub pause_us: PauseUs,
    /// Bytes sent to the peer.
    pub bytes_sent: u64,
    /// How often the connection of one of the disks was lost in this protection, and another took its place.
    #[serde(default)]
    pub disk_link_losses: u64,
    /// Pages captured or received.
    pub pages: u64,
    /// Pages of the first copy that are sent, and how many it has.
    pub copied_pages: (u64, u64),
    /// Packets.
    pub packets: Packets,
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
            let size = if disk.total_bytes > 0 { format!(" {mib} MiB") } else { String::new() };
            let waiting = if disk.waiting_bytes > 0 {
                format!(", {} KiB wait", disk.waiting_bytes.div_ceil(1024))
            } else {
                String::new()
            };
            let image = disk.image.as_ref().map_or(String::new(), |image| format!(", image {image}"));
            write!(f, "\n{name:<11}{size}{waiting}{image}")
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "host        {} (pid {})", self.host, self.pid)?;
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
        if let PauseUs { p50: Some(p50), p99: Some(p99), max: Some(max) } = self.pause_us {
            writeln!(f, "pause       p50 {p50} µs, p99 {p99} µs, max {max} µs")?;
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
        for flow in &self.flows {
            writeln!(f, "flow        {flow}")?;
        }
        if self.protection == Protection::TakenOver && self.disk.waiting_bytes > 0 {
            writeln!(f, "merging     {} KiB still to be written to the disk image", self.disk.waiting_bytes >> 10)?;
        }
        write!(f, "sent        {} KiB", self.bytes_sent / 1024)?;
        if self.disk_link_losses > 0 {
            write!(f, "\ndisk links  lost {} times, and made again", self.disk_link_losses)?;
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
