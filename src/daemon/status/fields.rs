//! Every field of a status: of what kind it is, in what unit, and what it says.
//!
//! `xl-colo help status` and its man page show this table, QMP's `query-replication` returns the same fields, and
//! `tests/status.rs` holds what a pair really says against it: a field that is not here, or is of another kind, fails there.
//!
//! In a path `[]` is each element of a list, and `*` each key of a map. The rule for all: what was not measured, or does not
//! apply, is null or absent, and never zero.

use serde_json::Value;

/// What a field holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A name, an address or a sentence.
    Text,
    /// One of these words.
    Word(&'static [&'static str]),
    /// True or false.
    Flag,
    /// A whole number of things.
    Count,
    /// Bytes.
    Bytes,
    /// Pages of 4 KiB.
    Pages,
    /// Milliseconds.
    Ms,
    /// Microseconds.
    Us,
    /// A time of day: microseconds since 1970, UTC.
    UnixUs,
    /// Things a second.
    PerSecond,
    /// One number divided by another.
    Ratio,
}

impl Kind {
    /// Its unit, or what it is instead of a number.
    fn unit(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Word(_) => "word",
            Self::Flag => "flag",
            Self::Count => "count",
            Self::Bytes => "bytes",
            Self::Pages => "pages",
            Self::Ms => "ms",
            Self::Us => "us",
            Self::UnixUs => "unix us",
            Self::PerSecond => "per s",
            Self::Ratio => "ratio",
        }
    }

    /// Whether a value is of this kind.
    #[must_use]
    pub fn fits(self, value: &Value) -> bool {
        match self {
            Self::Text => value.as_str().is_some_and(|text| !text.is_empty()),
            Self::Word(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Self::Flag => value.is_boolean(),
            Self::Ratio => value.as_f64().is_some_and(|ratio| ratio.is_finite() && ratio >= 0.0),
            _ => value.is_u64(),
        }
    }
}

/// A field: its path, its kind, and what it says.
pub type Field = (&'static str, Kind, &'static str);

const HEALTH: Kind = Kind::Word(&[
    "empty",
    "unprotected",
    "protected",
    "degraded",
    "standing-by",
    "undecided",
    "taken-over",
    "stopped",
    "failed",
]);
const PROTECTION: Kind = Kind::Word(&[
    "empty",
    "unprotected",
    "syncing",
    "protected",
    "standing-by",
    "arbitrating",
    "held",
    "taken-over",
    "stopped",
    "failed",
]);
const ROLE: Kind = Kind::Word(&["primary", "secondary"]);
const MODE: Kind = Kind::Word(&["colo", "remus"]);
const FAILOVER: Kind = Kind::Word(&["none", "require", "active", "completed", "relaunch"]);
const EXIT_REASON: Kind = Kind::Word(&["none", "request", "error", "processing"]);
const WORK: Kind = Kind::Word(&["first-copy", "resync", "commit"]);
const RESYNC: Kind = Kind::Word(&["all", "nonzero", "changed", "differing"]);

/// All of them, in the order of the status. `disk` has those of `disks[]`, summed.
pub const FIELDS: &[Field] = &[
    ("host", Kind::Text, "the host's name"),
    ("pid", Kind::Count, "its process"),
    ("guest", Kind::Text, "the guest's name"),
    ("guest_id", Kind::Count, "its number here, of a Xen domain"),
    ("listen", Kind::Text, "where peers connect"),
    ("health", HEALTH, "whether it is safe: what an operator asks first"),
    ("protection", PROTECTION, "the same, exactly"),
    ("degraded[]", Kind::Text, "what is the matter with a protection that holds"),
    ("risk", Kind::Text, "what makes it less safe, because somebody asked for it"),
    ("why", Kind::Text, "why it is not protected"),
    ("role", ROLE, "which side of a pair this is, or was last"),
    ("paused", Kind::Flag, "the guest was stopped by an order"),
    ("mode", MODE, "of the protection, or of the last one"),
    ("state", Kind::Text, "the protocol machine's own state"),
    ("peer", Kind::Text, "the other host's name"),
    ("generation", Kind::Count, "in force here"),
    ("epoch", Kind::Count, "of the guest's output: checkpoints begun"),
    ("failover", FAILOVER, "QEMU's failover state"),
    ("exit_reason", EXIT_REASON, "QEMU's COLO_EXIT reason"),
    ("recovery_point_ms", Kind::Ms, "age of the state the peer could go on from; while protected"),
    ("checkpoints.total", Kind::Count, "that the peer came to own in this protection"),
    ("checkpoints.by_cause.*", Kind::Count, "the same by cause"),
    ("asked", Kind::Text, "why the comparator last asked for one, and in which flow"),
    ("last_checkpoint.age_ms", Kind::Ms, "since the peer owned it"),
    ("last_checkpoint.checkpoint", Kind::Count, "its number, from 1"),
    ("last_checkpoint.cause", Kind::Text, "why it was taken"),
    ("last_checkpoint.flow", Kind::Text, "of the packets it was taken for; of a divergence only"),
    ("last_checkpoint.service.protocol", Kind::Text, "of that flow"),
    ("last_checkpoint.service.port", Kind::Text, "none, in a protocol that has no ports"),
    ("last_checkpoint.service.port.guest", Kind::Count, "a port that the guest serves"),
    ("last_checkpoint.service.port.peer", Kind::Count, "a port of somebody whom the guest asks"),
    ("last_checkpoint.pages", Kind::Pages, "in it"),
    ("last_checkpoint.devices_bytes", Kind::Bytes, "of device state in it"),
    ("last_checkpoint.stream_bytes", Kind::Bytes, "on the stream since the one before; in events only"),
    ("last_checkpoint.interval_us", Kind::Us, "from the capture before; not of the first"),
    ("last_checkpoint.reply_us", Kind::Us, "from the request to the suspend"),
    ("last_checkpoint.pause_us", Kind::Us, "the guest stood still"),
    ("last_checkpoint.capture_us", Kind::Us, "from the suspend until all was copied out"),
    ("last_checkpoint.transfer_us", Kind::Us, "from then until the peer owned it"),
    ("last_checkpoint.release_us", Kind::Us, "from the suspend until its packets left"),
    ("last_checkpoint.load_us", Kind::Us, "from then until the peer had loaded it"),
    ("pause_us.p50", Kind::Us, "how long the guest stood still for a checkpoint: median"),
    ("pause_us.p99", Kind::Us, "99th percentile"),
    ("pause_us.max", Kind::Us, "longest"),
    ("interval_us.p50", Kind::Us, "from one capture to the next: median"),
    ("interval_us.p99", Kind::Us, "99th percentile"),
    ("interval_us.max", Kind::Us, "longest"),
    ("dirty_pages_per_s", Kind::PerSecond, "pages the guest wrote to, over the last 16 checkpoints"),
    ("bytes_sent", Kind::Bytes, "to the peer: wire.stream_bytes and wire.disk_bytes"),
    ("wire.memory_bytes", Kind::Bytes, "memory that was to be sent, as it is in the guest"),
    ("wire.stream_bytes", Kind::Bytes, "what the stream carried for it, devices and messages too"),
    ("wire.disk_bytes", Kind::Bytes, "what the disk links carried"),
    ("wire.ratio", Kind::Ratio, "stream_bytes / memory_bytes: below 1 is saved"),
    ("queues.stream_bytes", Kind::Bytes, "that wait here for the stream"),
    ("queues.packets_bytes", Kind::Bytes, "for the packet link"),
    ("queues.disk_bytes", Kind::Bytes, "for the disk links"),
    ("queues.network_bytes", Kind::Bytes, "for the network"),
    ("peer_health.heartbeat_age_ms", Kind::Ms, "since the peer was heard"),
    ("peer_health.confirmed_age_ms", Kind::Ms, "since the last beat from here that it confirmed was sent"),
    ("peer_health.lost_after_ms", Kind::Ms, "it is lost when either is this old"),
    ("work.work", WORK, "that takes its time, while there is some"),
    ("work.done_bytes", Kind::Bytes, "done of it"),
    ("work.total_bytes", Kind::Bytes, "in all"),
    ("disk_link_losses", Kind::Count, "connections of disks that were lost and made again"),
    ("packet_link_losses", Kind::Count, "the same of the packet link"),
    ("pages", Kind::Pages, "captured, or on the secondary received"),
    ("copied_pages[]", Kind::Pages, "of the first copy: sent, and in all"),
    ("packets.compared", Kind::Count, "left because the secondary said the same"),
    ("packets.released", Kind::Count, "left, for whatever reason"),
    ("packets.held", Kind::Count, "had to wait"),
    ("packets.waiting", Kind::Count, "wait now"),
    ("packets.dropped_stale", Kind::Count, "of the secondary, whose epoch was over"),
    ("packets.dropped_network", Kind::Count, "that the network's queue could not take"),
    ("packets.lost_by_kernel", Kind::Count, "of the guest, lost on their way here"),
    ("lock_step.buffering", Kind::Flag, "lock-step does not pay now: output waits for checkpoints"),
    ("lock_step.given_up", Kind::Count, "how often it came to that"),
    ("lock_step.tried_again_in_ms", Kind::Ms, "at the earliest"),
    ("digests.summaries", Kind::Count, "frames that came as digests; on the primary"),
    ("digests.looked_into", Kind::Count, "of them, those whose bytes were asked for; on the primary"),
    ("digests.saved_bytes", Kind::Bytes, "that did not travel; on the secondary"),
    ("flows[].flow", Kind::Text, "who talks to whom; those that diverged, worst first, 8"),
    ("flows[].compared", Kind::Count, "its frames that the secondary explained"),
    ("flows[].held", Kind::Count, "its frames that wait now"),
    ("flows[].diverged", Kind::Count, "epochs in which it was a reason for a checkpoint"),
    ("flows[].last_cause", Kind::Text, "why it last was"),
    ("flows[].keeps_diverging", Kind::Flag, "it was in 3 of the last 16 epochs"),
    ("disks[].name", Kind::Text, "disk0, disk1 …, in the guest's order"),
    ("disks[].export", Kind::Text, "what both hosts call it (colo-export)"),
    ("disks[].copied_bytes", Kind::Bytes, "of the first copy that are at the peer"),
    ("disks[].total_bytes", Kind::Bytes, "the first copy has; on the secondary the disk's size"),
    ("disks[].resync", RESYNC, "what the first copy copies"),
    ("disks[].skipped_bytes", Kind::Bytes, "of the copied ones, those the peer had already"),
    ("disks[].sent_bytes", Kind::Bytes, "of the copied ones, those that were sent"),
    ("disks[].copy_bytes_per_s", Kind::PerSecond, "bytes, of the first copy"),
    ("disks[].spared_bytes", Kind::Bytes, "overwritten before they could be sent"),
    ("disks[].waiting_bytes", Kind::Bytes, "the peer's disk lags behind; or (secondary) the image does"),
    ("disks[].fenced_writes", Kind::Count, "of an old generation, refused"),
    ("disks[].errors[]", Kind::Text, "what went wrong with it"),
    ("disks[].image", Kind::Text, "what the image is worth if this host crashes now"),
    ("lost_at_unix_us", Kind::UnixUs, "when the peer was lost"),
    ("decided_at_unix_us", Kind::UnixUs, "when it was decided who goes on"),
    ("totals.stream_bytes", Kind::Bytes, "as wire.stream_bytes, of all protections since the start"),
    ("totals.disk_bytes", Kind::Bytes, "the same, of wire.disk_bytes"),
    ("totals.memory_bytes", Kind::Bytes, "the same, of wire.memory_bytes"),
    ("totals.received_pages", Kind::Pages, "as pages, on a secondary"),
    ("totals.compared", Kind::Count, "as packets.compared"),
    ("totals.released", Kind::Count, "as packets.released"),
    ("totals.held", Kind::Count, "as packets.held"),
    ("totals.dropped_stale", Kind::Count, "as packets.dropped_stale"),
    ("totals.lock_step_given_up", Kind::Count, "as lock_step.given_up"),
    ("metrics", Kind::Text, "where Prometheus reads them"),
];

/// The table, a line a field.
#[must_use]
pub fn help() -> String {
    let head = "Fields of --json, and of QMP's query-replication. What was not measured or does not\n\
                apply is null or absent. [] is each of a list, * each key of a map; disk has what\n\
                disks[] has, summed; a protection's counters begin with it.\n";
    let line = |(path, kind, what): &Field| format!("\n  {path:<29} {:<7} {what}", kind.unit());
    head.to_owned() + &FIELDS.iter().map(line).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::super::{Health, Protection, Status};
    use super::*;
    use crate::daemon::events::Work;
    use std::collections::BTreeSet;

    #[test]
    fn every_part_of_a_status_is_in_the_table_and_nothing_else() {
        let status = Status { metrics: Some("m".into()), ..Status::default() };
        let said = serde_json::to_value(status).unwrap();
        let said: BTreeSet<_> = said.as_object().unwrap().keys().cloned().collect();
        let head = |path: &str| path.split(['.', '[']).next().unwrap_or_default().to_owned();
        let mut told: BTreeSet<_> = FIELDS.iter().map(|(path, ..)| head(path)).collect();
        told.insert("disk".into());
        assert_eq!(said, told);
        let paths: BTreeSet<_> = FIELDS.iter().map(|(path, ..)| path).collect();
        assert_eq!(paths.len(), FIELDS.len(), "each once");
    }

    /// Units are last in names, and the names do not lie.
    #[test]
    fn a_name_that_ends_in_a_unit_is_of_that_kind() {
        let units = [("_ms", Kind::Ms), ("_unix_us", Kind::UnixUs), ("_us", Kind::Us), ("_bytes", Kind::Bytes)];
        for (path, kind, _) in FIELDS {
            if let Some((_, unit)) = units.iter().find(|(suffix, _)| path.ends_with(suffix)) {
                assert_eq!(kind, unit, "{path}");
            }
            let is_rate = path.ends_with("_per_s");
            assert_eq!(*kind == Kind::PerSecond, is_rate, "{path}");
        }
    }

    #[test]
    fn the_words_are_those_that_are_said() {
        let word = |path: &str, value: Value| {
            let (_, kind, _) = FIELDS.iter().find(|(known, ..)| *known == path).unwrap();
            assert!(kind.fits(&value), "{path}: {value}");
        };
        for protection in [
            Protection::Empty,
            Protection::Unprotected,
            Protection::Syncing,
            Protection::Protected,
            Protection::StandingBy,
            Protection::Arbitrating,
            Protection::Held,
            Protection::TakenOver,
            Protection::Stopped,
            Protection::Failed,
        ] {
            word("protection", serde_json::to_value(protection).unwrap());
            word("health", serde_json::to_value(Health::of(protection, &[])).unwrap());
            word("health", Health::of(protection, &["late".into()]).name().into());
        }
        for work in [Work::FirstCopy, Work::Resync, Work::Commit] {
            word("work.work", serde_json::to_value(work).unwrap());
        }
    }
}
