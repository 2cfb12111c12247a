//! What a demo run showed: as JSON for a program, as text for a person, as an exit code for a script.
//!
//! ```text
//! Takeover
//!   detected after                             312.4 ms
//!   first reply after                          341.0 ms
//!   …
//! SURVIVED: nothing lost, connection kept
//! ```
//!
//! The trap of any such report is to be green when nothing happened. So a value nobody measured is absent (JSON `null`,
//! "not measured") and never 0, and [`DemoReport::reasons`] wants proof: writes acknowledged on both sides of the kill,
//! and every one of them looked for afterwards.

use std::collections::BTreeMap;
use std::fmt;

use crate::report::text::{grouped, tenths};
use serde::Serialize;

const LABEL_WIDTH: usize = 36;
const VALUE_WIDTH: usize = 14;

/// Lost keys and failures printed; the JSON has all of them.
const LINES_MAX: usize = 10;

/// Checkpoints taken.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Checkpoints {
    /// All of them.
    pub total: u64,
    /// How many each cause made, by the cause's name.
    pub by_cause: BTreeMap<String, u64>,
}

/// How long checkpoints stopped the guest, in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PauseMicros {
    /// Half of the pauses were no longer.
    pub p50: Option<f64>,
    /// 99 of 100 pauses were no longer.
    pub p99: Option<f64>,
    /// The longest.
    pub max: Option<f64>,
}

/// The guest's packets on their way out.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Packets {
    /// Compared between the two guests (COLO).
    pub compared: Option<u64>,
    /// Let out.
    pub released: Option<u64>,
    /// Had to wait, for the other guest or for a checkpoint.
    pub held: Option<u64>,
}

/// Everything one run of the demo showed.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DemoReport {
    /// `colo` or `remus`.
    pub mode: String,
    /// Which host was killed, and how.
    pub killed: String,
    /// What the run's randomness follows from.
    pub seed: u64,
    /// The guest's memory, in MiB.
    pub guest_mib: u64,
    /// How long the load ran, in seconds.
    pub seconds: f64,
    /// Checkpoints taken before the kill.
    pub checkpoints: Checkpoints,
    /// How long they stopped the guest.
    pub pause_us: PauseMicros,
    /// Bytes sent to the secondary.
    pub bytes_sent: Option<u64>,
    /// The guest's packets.
    pub packets: Packets,
    /// Frames the switch refused from the killed host after the takeover.
    pub fenced_frames: Option<u64>,
    /// From the kill to the survivor's notice of it, in milliseconds.
    pub detection_ms: Option<f64>,
    /// From the kill to the first reply to a request sent after it, in milliseconds.
    pub takeover_ms: Option<f64>,
    /// From the survivor's notice of it to that first reply, in milliseconds.
    pub after_detection_ms: Option<f64>,
    /// The longest time the clients got no reply at all, in milliseconds.
    pub longest_silence_ms: Option<f64>,
    /// The long connection lived through the run.
    pub connection_kept: bool,
    /// Otherwise, what ended it.
    pub connection_error: Option<String>,
    /// Writes the guest acknowledged.
    pub acknowledged_writes: u64,
    /// Of these, the ones sent after the kill.
    pub acknowledged_after_kill: u64,
    /// Acknowledged writes looked for at the end.
    pub checked_writes: u64,
    /// Acknowledged writes that were missing, different or unreadable.
    pub lost_writes: u64,
    /// Their names.
    pub lost_names: Vec<String>,
    /// Writes that never got an answer; whether they are there is no matter.
    pub unknown_writes: u64,
    /// Short-connection writes that failed and were tried again.
    pub retried_writes: u64,
    /// Whatever else went wrong. One is enough to fail the run.
    pub failures: Vec<String>,
}

impl DemoReport {
    /// Why the run failed; empty when it survived.
    #[must_use]
    pub fn reasons(&self) -> Vec<String> {
        let before_kill = self.acknowledged_writes.saturating_sub(self.acknowledged_after_kill);
        let unchecked = self.acknowledged_writes.saturating_sub(self.checked_writes);
        let lost = self.lost();
        let broken_by = self.connection_error.as_deref().unwrap_or("no reason known").escape_debug();
        let checks = [
            (lost > 0, format!("{} lost", counted(lost, "acknowledged write"))),
            (unchecked > 0, format!("{} not looked for", counted(unchecked, "acknowledged write"))),
            (!self.connection_kept, format!("connection broken ({broken_by})")),
            (before_kill == 0, "no write acknowledged before the kill".to_owned()),
            (self.acknowledged_after_kill == 0, "no write acknowledged after the kill".to_owned()),
            (!self.failures.is_empty(), counted(self.failures.len() as u64, "failure")),
        ];
        checks.into_iter().filter_map(|(failed, reason)| failed.then_some(reason)).collect()
    }

    fn lost(&self) -> u64 {
        self.lost_writes.max(self.lost_names.len() as u64)
    }

    /// 0 when the guest survived, 1 otherwise.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        u8::from(!self.reasons().is_empty())
    }
}

impl fmt::Display for DemoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "xl-colo demo: {} mode, {} killed", self.mode, self.killed)?;
        writeln!(f, "guest of {} MiB, {:.1} s of load, seed {}", grouped(self.guest_mib), self.seconds, self.seed)?;

        section(f, "Checkpoints")?;
        row(f, "taken", Some(grouped(self.checkpoints.total)), "")?;
        for (cause, &count) in &self.checkpoints.by_cause {
            row(f, &format!("  {cause}"), Some(grouped(count)), "")?;
        }
        row(f, "guest stopped, median", self.pause_us.p50.map(tenths), "us")?;
        row(f, "guest stopped, 99th percentile", self.pause_us.p99.map(tenths), "us")?;
        row(f, "guest stopped, longest", self.pause_us.max.map(tenths), "us")?;
        row(f, "sent to the secondary", self.bytes_sent.map(|bytes| tenths(bytes as f64 / 1_048_576.0)), "MiB")?;

        section(f, "Packets")?;
        row(f, "compared", self.packets.compared.map(grouped), "")?;
        row(f, "released", self.packets.released.map(grouped), "")?;
        row(f, "had to wait", self.packets.held.map(grouped), "")?;
        row(f, "refused from the killed host", self.fenced_frames.map(grouped), "")?;

        section(f, "Takeover")?;
        row(f, "kill noticed after", self.detection_ms.map(tenths), "ms")?;
        row(f, "first reply after", self.takeover_ms.map(tenths), "ms")?;
        row(f, "  of these after the notice", self.after_detection_ms.map(tenths), "ms")?;
        row(f, "longest silence for the clients", self.longest_silence_ms.map(tenths), "ms")?;
        row(f, "long connection", Some(if self.connection_kept { "kept" } else { "broken" }.to_owned()), "")?;

        section(f, "Writes")?;
        row(f, "acknowledged", Some(grouped(self.acknowledged_writes)), "")?;
        row(f, "  of these after the kill", Some(grouped(self.acknowledged_after_kill)), "")?;
        row(f, "read back", Some(grouped(self.checked_writes)), "")?;
        row(f, "lost", Some(grouped(self.lost())), "")?;
        row(f, "never answered", Some(grouped(self.unknown_writes)), "")?;
        row(f, "tried again", Some(grouped(self.retried_writes)), "")?;

        list(f, "Lost", &self.lost_names)?;
        list(f, "Failures", &self.failures)?;

        let reasons = self.reasons();
        match reasons.is_empty() {
            true => writeln!(f, "\nSURVIVED: nothing lost, connection kept"),
            false => writeln!(f, "\nFAILED: {}", reasons.join(", ")),
        }
    }
}

fn section(f: &mut fmt::Formatter<'_>, title: &str) -> fmt::Result {
    writeln!(f, "\n{title}")
}

fn row(f: &mut fmt::Formatter<'_>, label: &str, value: Option<String>, unit: &str) -> fmt::Result {
    let (value, unit) = value.map_or(("not measured".to_owned(), ""), |value| (value, unit));
    let line = format!("  {label:<LABEL_WIDTH$}{value:>VALUE_WIDTH$} {unit}");
    writeln!(f, "{}", line.trim_end())
}

fn list(f: &mut fmt::Formatter<'_>, title: &str, lines: &[String]) -> fmt::Result {
    if lines.is_empty() {
        return Ok(());
    }
    section(f, title)?;
    for line in lines.iter().take(LINES_MAX) {
        // A text that came from elsewhere stays on its line: it must not be able to write a verdict.
        writeln!(f, "  {}", line.escape_debug())?;
    }
    match lines.len().checked_sub(LINES_MAX) {
        Some(more @ 1..) => writeln!(f, "  and {more} more"),
        _ => Ok(()),
    }
}

fn counted(count: u64, thing: &str) -> String {
    format!("{} {thing}{}", grouped(count), if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn survived() -> DemoReport {
        DemoReport {
            mode: "colo".to_owned(),
            killed: "primary".to_owned(),
            seed: 42,
            guest_mib: 2048,
            seconds: 20.0,
            checkpoints: Checkpoints { total: 1234, by_cause: [("outputs differ".to_owned(), 1234)].into() },
            pause_us: PauseMicros { p50: Some(812.34), p99: Some(1999.96), max: None },
            bytes_sent: Some(3 << 20),
            packets: Packets { compared: Some(100_000), released: Some(99_999), held: Some(1) },
            detection_ms: Some(301.2),
            takeover_ms: Some(345.6),
            after_detection_ms: Some(44.4),
            connection_kept: true,
            acknowledged_writes: 5000,
            acknowledged_after_kill: 2000,
            checked_writes: 5000,
            ..DemoReport::default()
        }
    }

    #[test]
    fn a_person_can_read_it() {
        let expected = "\
xl-colo demo: colo mode, primary killed
guest of 2,048 MiB, 20.0 s of load, seed 42

Checkpoints
  taken                                        1,234
    outputs differ                             1,234
  guest stopped, median                        812.3 us
  guest stopped, 99th percentile             2,000.0 us
  guest stopped, longest                not measured
  sent to the secondary                          3.0 MiB

Packets
  compared                                   100,000
  released                                    99,999
  had to wait                                      1
  refused from the killed host          not measured

Takeover
  kill noticed after                           301.2 ms
  first reply after                            345.6 ms
    of these after the notice                   44.4 ms
  longest silence for the clients       not measured
  long connection                               kept

Writes
  acknowledged                                 5,000
    of these after the kill                    2,000
  read back                                    5,000
  lost                                             0
  never answered                                   0
  tried again                                      0

SURVIVED: nothing lost, connection kept
";
        assert_eq!(survived().to_string(), expected);
        assert_eq!(survived().exit_code(), 0);
    }

    #[test]
    fn every_way_to_fail_fails_and_says_why() {
        type Mutant = fn(&mut DemoReport);
        let mutants: [(Mutant, &str); 9] = [
            (|r| r.lost_writes = 1, "1 acknowledged write lost"),
            (|r| r.lost_names = vec!["long-1".to_owned(), "long-2".to_owned()], "2 acknowledged writes lost"),
            (|r| r.checked_writes = 3000, "2,000 acknowledged writes not looked for"),
            (|r| r.connection_kept = false, "connection broken (no reason known)"),
            (
                |r| (r.connection_kept, r.connection_error) = (false, Some("reset".to_owned())),
                "connection broken (reset)",
            ),
            (|r| r.acknowledged_after_kill = 5000, "no write acknowledged before the kill"),
            (|r| r.acknowledged_after_kill = 0, "no write acknowledged after the kill"),
            (|r| r.failures = vec!["a read was wrong".to_owned()], "1 failure"),
            (
                |r| (r.acknowledged_writes, r.acknowledged_after_kill, r.checked_writes) = (0, 0, 0),
                "no write acknowledged before the kill, no write acknowledged after the kill",
            ),
        ];
        for (mutate, reason) in mutants {
            let mut report = survived();
            mutate(&mut report);
            assert_eq!(report.exit_code(), 1, "{reason}");
            assert!(report.to_string().ends_with(&format!("\nFAILED: {reason}\n")), "{report}");
        }
        assert_eq!(DemoReport::default().exit_code(), 1, "a run that did nothing");
    }

    #[test]
    fn long_lists_are_cut_and_cannot_forge_a_verdict() {
        let failures = (0..12).map(|n| format!("failure {n}\nSURVIVED: nothing lost")).collect();
        let text = DemoReport { failures, ..survived() }.to_string();
        assert!(text.contains("\nFailures\n  failure 0\\nSURVIVED") && text.contains("  and 2 more\n"));
        assert!(!text.contains("failure 10") && !text.contains("\nSURVIVED"));
    }

    #[test]
    fn what_was_not_measured_is_null_in_json() {
        let json = serde_json::to_value(DemoReport { takeover_ms: None, ..survived() }).unwrap();
        assert!(json["takeover_ms"].is_null() && json["pause_us"]["max"].is_null());
        assert_eq!(json["checkpoints"]["by_cause"]["outputs differ"], 1234);
        assert_eq!(json["packets"]["held"], 1);
        assert_eq!(json["connection_kept"], true);
    }
}
