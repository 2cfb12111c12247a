//! What happened to a host and its guest: one event for each change, numbered, kept, and written down.
//!
//! ```text
//!   engine ─ tell ─▶ Events ─┬─ ring of the last EVENTS_MAX ──▶ control socket ──▶ xl-colo events [--follow] [--since N]
//!                            ├─ a line of the log         ring ──▶ [`log`]: a file of JSON lines
//!                            └─ the next event's number, for whoever waits
//! ```
//!
//! A change is a line at info; what comes with each checkpoint, as often as the guest likes, is one at debug.
//!
//! Numbers begin at 1 with the host's process, and have no gaps: who was slow sees from them how many are gone. The trap
//! is text that a peer chose (why a link ended): it is cut to [`TEXT_MAX_BYTES`] before it is kept a thousand times.

pub mod log;

use super::{engine_clock, unix_us};
use crate::clock::Instant;
use crate::colo::hello::Mode;
use crate::compare::Service;
use crate::daemon::pair::lock;
use crate::daemon::pair::primary::Taken;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// Events that are kept.
pub const EVENTS_MAX: usize = 4096;
/// Events in one answer.
pub const ANSWER_EVENTS_MAX: usize = 512;
/// How long one request may wait for an event.
pub const WAIT_MAX: Duration = Duration::from_secs(5);
/// Longest text in an event.
pub const TEXT_MAX_BYTES: usize = 512;

/// The steps of a checkpoint that the secondary owns, in µs.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Counts them, from 1.
    pub checkpoint: u64,
    /// Why it was taken.
    pub cause: String,
    /// The flow in which the guests differed, if that was why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow: Option<String>,
    /// What that flow serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Service>,
    /// Pages in it.
    pub pages: u64,
    /// Bytes of device state in it.
    pub devices_bytes: u64,
    /// Bytes that the stream carried since the checkpoint before, or since the protection began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_bytes: Option<u64>,
    /// From the capture before to this one; absent for the first.
    pub interval_us: Option<u64>,
    /// From the request to the suspend: the secondary stopped its guest.
    pub reply_us: u64,
    /// How long the guest stood still.
    pub pause_us: u64,
    /// From the suspend until everything was copied out.
    pub capture_us: u64,
    /// From then until the secondary owned it.
    pub transfer_us: u64,
    /// From the suspend until the packets of its epoch were released.
    pub release_us: u64,
    /// From then until the secondary had loaded it; absent if the pair ended first.
    pub load_us: Option<u64>,
}

impl From<&Taken> for Checkpoint {
    fn from(taken: &Taken) -> Self {
        let us = |time: Duration| time.as_micros() as u64;
        Self {
            checkpoint: taken.number,
            cause: taken.cause.to_string(),
            flow: taken.flow.map(|flow| flow.to_string()),
            service: taken.flow.map(|flow| flow.service()),
            pages: taken.pages,
            devices_bytes: taken.devices_bytes,
            stream_bytes: None,
            interval_us: taken.interval.map(us),
            reply_us: us(taken.reply),
            pause_us: us(taken.pause),
            capture_us: us(taken.capture),
            transfer_us: us(taken.transfer),
            release_us: us(taken.release),
            load_us: taken.load.map(us),
        }
    }
}

/// Work that takes its time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Memory and disk of a guest that is not protected yet.
    FirstCopy,
    /// The same, with a disk that the secondary has in part.
    Resync,
    /// What a guest that took over has not written to its disk image yet.
    Commit,
}

impl Work {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FirstCopy => "first-copy",
            Self::Resync => "resync",
            Self::Commit => "commit",
        }
    }
}

/// How far a [`Work`] is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Which.
    pub work: Work,
    /// Bytes that are done.
    pub done_bytes: u64,
    /// Bytes it has in all.
    pub total_bytes: u64,
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum What {
    /// The host's process runs.
    HostStarted {
        /// The process.
        pid: u32,
        /// The program's version.
        version: String,
    },
    /// It was told to end.
    HostEnded,
    /// A guest runs here and nothing stands ready for it, and why.
    Unprotected {
        /// A sentence.
        reason: String,
    },
    /// The first copy has begun: to the peer on the primary, from it on the secondary.
    Syncing {
        /// The peer.
        peer: String,
        /// COLO or Remus.
        mode: Option<Mode>,
        /// The pair's generation.
        generation: u64,
    },
    /// The peer owns a state it could go on from, and nothing is the matter.
    Protected {
        /// The peer.
        peer: String,
        /// COLO or Remus.
        mode: Option<Mode>,
        /// The pair's generation.
        generation: u64,
    },
    /// The guest is protected, and something is the matter.
    Degraded {
        /// A sentence.
        reason: String,
    },
    /// This host owns a state it could go on from.
    StandingBy {
        /// The peer.
        peer: String,
        /// COLO or Remus.
        mode: Option<Mode>,
        /// The pair's generation.
        generation: u64,
    },
    /// A checkpoint was taken (primary).
    Checkpoint(Checkpoint),
    /// A checkpoint was loaded (secondary).
    Loaded {
        /// How many states were owned here.
        checkpoint: u64,
        /// How long the load took.
        load_us: u64,
    },
    /// A connection of the pair is gone: `peer` for the peer itself, `disk` for a disk's and `packets` for the
    /// packets', which are made again.
    LinkLost {
        /// Which.
        link: String,
        /// A sentence.
        reason: String,
        /// Of the peer: how long ago it was heard last.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        heard_ms: Option<u64>,
    },
    /// A connection was made again.
    LinkBack {
        /// Which.
        link: String,
    },
    /// The peer is lost, and it is asked who goes on.
    Arbitrating {
        /// Why it is lost.
        reason: String,
    },
    /// Nobody could decide; the guest is paused.
    Held {
        /// A sentence.
        reason: String,
    },
    /// The guest goes on here, alone.
    TakenOver {
        /// The generation it runs in.
        generation: u64,
        /// Why.
        reason: String,
        /// From the loss of the peer to the decision.
        decided_after_ms: Option<u64>,
    },
    /// The guest's first frame since the takeover goes to the network.
    FirstOutput {
        /// From the decision.
        after_us: u64,
    },
    /// Another host has the guest; it was stopped here.
    Stopped {
        /// A sentence.
        reason: String,
    },
    /// This host's copy is unusable.
    Failed {
        /// A sentence.
        reason: String,
    },
    /// This host has no guest any more.
    Empty {
        /// A sentence.
        reason: String,
    },
    /// The guest was stopped by an order.
    Paused,
    /// It was let run again.
    Resumed,
    /// Work that takes its time goes on; at most once a second, and when it is done.
    Progress(Progress),
    /// In an event log: events that the host had no longer when they were to be written.
    Lost {
        /// How many.
        count: u64,
    },
}

/// Something that happened, and when.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Counts the events of the host's process, from 1.
    pub number: u64,
    /// By the process's monotonic clock.
    pub at_us: u64,
    /// By the wall clock, in µs of Unix time.
    pub unix_us: u64,
    /// The host's name.
    pub host: String,
    /// The guest's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

impl What {
    /// Whether it comes as often as the guest likes, and changes nothing: of these the log says nothing at info.
    #[must_use]
    pub fn is_frequent(&self) -> bool {
        matches!(self, Self::Checkpoint(_) | Self::Loaded { .. } | Self::Progress(_))
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = |f: &mut fmt::Formatter<'_>, what: &str, peer: &str, mode: &Option<Mode>, generation: &u64| {
            let mode = mode.map(|mode| format!(", {mode} mode")).unwrap_or_default();
            write!(f, "{what} {peer}{mode}, generation {generation}")
        };
        match self {
            Self::HostStarted { pid, version } => write!(f, "host started, pid {pid}, version {version}"),
            Self::HostEnded => write!(f, "host ends"),
            Self::Unprotected { reason } => write!(f, "UNPROTECTED: {reason}"),
            Self::Syncing { peer, mode, generation } => pair(f, "first copy begun, peer", peer, mode, generation),
            Self::Protected { peer, mode, generation } => pair(f, "protected by", peer, mode, generation),
            Self::Degraded { reason } => write!(f, "DEGRADED: {reason}"),
            Self::StandingBy { peer, mode, generation } => pair(f, "standing by for", peer, mode, generation),
            Self::Checkpoint(Checkpoint {
                checkpoint,
                cause,
                pages,
                pause_us,
                capture_us,
                transfer_us,
                load_us,
                ..
            }) => {
                let load = load_us.map_or_else(String::new, |us| format!(", load {us}"));
                write!(f, "checkpoint {checkpoint} ({cause}): {pages} pages, ")?;
                write!(f, "pause {pause_us} µs, capture {capture_us}, transfer {transfer_us}{load}")
            }
            Self::Loaded { checkpoint, load_us } => write!(f, "checkpoint {checkpoint} loaded in {load_us} µs"),
            Self::LinkLost { link, reason, heard_ms } => {
                let heard = heard_ms.map_or_else(String::new, |ms| format!(" (heard {ms} ms ago)"));
                write!(f, "{link} link lost: {reason}{heard}")
            }
            Self::LinkBack { link } => write!(f, "{link} link made again"),
            Self::Arbitrating { reason } => write!(f, "asking who goes on: {reason}"),
            Self::Held { reason } => write!(f, "HELD: {reason}"),
            Self::TakenOver { generation, reason, decided_after_ms } => {
                let after = decided_after_ms.map_or_else(String::new, |ms| format!(", decided after {ms} ms"));
                write!(f, "TAKEN OVER: runs alone in generation {generation}{after}: {reason}")
            }
            Self::FirstOutput { after_us } => write!(f, "the guest is heard again {after_us} µs after the decision"),
            Self::Stopped { reason } => write!(f, "stopped here: {reason}"),
            Self::Failed { reason } => write!(f, "FAILED: {reason}"),
            Self::Empty { reason } => write!(f, "no guest: {reason}"),
            Self::Paused => write!(f, "the guest is stopped by an order"),
            Self::Resumed => write!(f, "the guest runs again"),
            Self::Progress(Progress { work, done_bytes, total_bytes }) => {
                write!(f, "{}: {} of {} MiB", work.name(), done_bytes >> 20, total_bytes >> 20)
            }
            Self::Lost { count } => write!(f, "{count} events are lost"),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guest = self.guest.as_deref().unwrap_or("-");
        write!(f, "{:>6}  {}  {}  {guest}  {}", self.number, utc(self.unix_us), self.host, self.what)
    }
}

/// A time of the wall clock as ISO 8601 has it, in UTC, to the millisecond.
#[must_use]
pub fn utc(unix_us: u64) -> String {
    let (days, ms) = (unix_us / 86_400_000_000, unix_us / 1000 % 86_400_000);
    // Years that begin in March, so that a leap day is the last of one: H. Hinnant, "chrono-compatible low-level date
    // algorithms", civil_from_days.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (h, m, s, ms) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{ms:03}Z")
}

/// Of which guest of which host a line of the log is.
#[must_use]
pub fn span(host: &str, guest: Option<&str>) -> tracing::Span {
    tracing::info_span!(parent: None, "guest", host, guest)
}

/// Cuts a text that may be long, and keeps it on its line: it must not be able to write another one, in a log or on a
/// terminal.
#[must_use]
pub fn cut(text: &str) -> String {
    let cut = &text[..text.floor_char_boundary(TEXT_MAX_BYTES)];
    cut.replace(char::is_control, "?")
}

/// Which events somebody wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Those with larger numbers than this.
    #[serde(default)]
    pub since: u64,
    /// How long to wait if there is none yet; at most [`WAIT_MAX`].
    #[serde(default)]
    pub wait_ms: u64,
}

/// Events, at most [`ANSWER_EVENTS_MAX`], oldest first.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    /// Them.
    pub events: Vec<Event>,
    /// Events that were wanted and are kept no longer.
    pub lost: u64,
    /// What to ask with next.
    pub since: u64,
    /// Whether there are more already.
    pub more: bool,
    /// Whether there will be none any more: the host ends.
    #[serde(default)]
    pub ended: bool,
}

#[derive(Debug, Default)]
struct Ring {
    events: VecDeque<Event>,
    told: u64,
    ended: bool,
}

/// The events of a host. Clones are of one ring.
#[derive(Clone, Debug)]
pub struct Events {
    host: Arc<str>,
    ring: Arc<Mutex<Ring>>,
    told: Arc<watch::Sender<u64>>,
}

impl Events {
    /// A host to which nothing has happened.
    #[must_use]
    pub fn new(host: &str) -> Self {
        Self { host: host.into(), ring: Arc::default(), told: Arc::new(watch::Sender::new(0)) }
    }

    /// Something happened now.
    pub fn tell(&self, guest: Option<&str>, what: What) {
        self.tell_at(engine_clock(), unix_us(), guest, what);
    }

    fn tell_at(&self, at: Instant, unix_us: u64, guest: Option<&str>, what: What) {
        let mut ring = lock(&self.ring);
        if ring.ended {
            return;
        }
        ring.ended = what == What::HostEnded;
        ring.told += 1;
        let at_us = (at - Instant::ZERO).as_micros() as u64;
        let guest = guest.map(str::to_owned);
        let event = Event { number: ring.told, at_us, unix_us, host: self.host.to_string(), guest, what };
        span(&event.host, event.guest.as_deref()).in_scope(|| {
            if event.what.is_frequent() {
                tracing::debug!(number = event.number, "{}", event.what);
            } else {
                tracing::info!(number = event.number, "{}", event.what);
            }
        });
        ring.events.push_back(event);
        if ring.events.len() > EVENTS_MAX {
            ring.events.pop_front();
        }
        let number = ring.told;
        drop(ring);
        self.told.send_replace(number);
    }

    /// What is kept of the events after `since`.
    #[must_use]
    pub fn read(&self, since: u64) -> Told {
        let ring = lock(&self.ring);
        // From another process, or nobody's: there can be no gap before it.
        let since = since.min(ring.told);
        let kept_from = ring.told - ring.events.len() as u64;
        let skip = since.saturating_sub(kept_from) as usize;
        let events: Vec<_> = ring.events.iter().skip(skip).take(ANSWER_EVENTS_MAX).cloned().collect();
        let next = events.last().map_or(since, |event| event.number);
        let more = next < ring.told;
        Told { events, lost: kept_from.saturating_sub(since), since: next, more, ended: ring.ended && !more }
    }

    /// The same; waits until there is one, but not for long.
    pub async fn read_soon(&self, wanted: Wanted) -> Told {
        let mut told = self.told.subscribe();
        let new = told.wait_for(|told| *told > wanted.since);
        // Without one there is still an answer.
        let _ = tokio::time::timeout(WAIT_MAX.min(Duration::from_millis(wanted.wait_ms)), new).await;
        self.read(wanted.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(count: u64) -> Events {
        let events = Events::new("a");
        (0..count).for_each(|_| events.tell(Some("web"), What::Paused));
        events
    }

    #[test]
    fn numbers_have_no_gaps_and_what_is_lost_is_said() {
        let events = told(10);
        let all = events.read(0);
        assert_eq!(all.events.iter().map(|event| event.number).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
        assert_eq!((all.lost, all.since, all.more), (0, 10, false));
        assert_eq!(events.read(7).events.len(), 3);
        assert_eq!(events.read(10), Told { since: 10, ..Told::default() });
        assert_eq!(events.read(99), Told { since: 10, ..Told::default() }, "a number of another process");

        let many = told(EVENTS_MAX as u64 + 20);
        let first = many.read(5);
        assert_eq!((first.lost, first.events[0].number, first.more), (15, 21, true));
        assert_eq!(first.events.len(), ANSWER_EVENTS_MAX);
        let (mut next, mut count) = (first.clone(), first.events.len());
        while next.more {
            next = many.read(next.since);
            assert_eq!(next.lost, 0);
            count += next.events.len();
        }
        assert_eq!((count, next.since), (EVENTS_MAX, EVENTS_MAX as u64 + 20));
    }

    #[test]
    fn an_event_is_one_flat_line_of_json_and_comes_back() {
        let checkpoint =
            Checkpoint { checkpoint: 7, cause: "delay".into(), interval_us: Some(5), ..Default::default() };
        let progress = Progress { work: Work::FirstCopy, done_bytes: 1, total_bytes: 2 };
        for (what, word) in [
            (What::Checkpoint(checkpoint), r#""event":"checkpoint","checkpoint":7,"cause":"delay""#),
            (What::Progress(progress), r#""event":"progress","work":"first-copy","done_bytes":1"#),
            (What::HostEnded, r#""event":"host-ended"}"#),
        ] {
            let event = Event { number: 3, at_us: 4, unix_us: 5, host: "a".into(), guest: Some("web".into()), what };
            let line = serde_json::to_string(&event).unwrap();
            assert!(line.contains(word) && !line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event, "{line}");
        }
    }

    #[test]
    fn a_time_is_written_as_everybody_writes_it() {
        // date -u -d @N +%FT%TZ
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(seconds * 1_000_000), text);
        }
        assert_eq!(utc(1_234_567_890_123_456), "2009-02-13T23:31:30.123Z");
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut("one\nINFO two\x1b[2J"), "one?INFO two?[2J");
        let long = "é".repeat(TEXT_MAX_BYTES);
        assert_eq!(cut(&format!("a{long}")).len(), TEXT_MAX_BYTES - 1);
    }

    #[tokio::test]
    async fn who_waits_is_told_at_once_and_nobody_waits_for_ever() {
        let events = told(1);
        let waits = Wanted { since: 1, wait_ms: 60_000 };
        let (waiting, teller) = (events.clone(), events.clone());
        let answer = tokio::spawn(async move { waiting.read_soon(waits).await });
        teller.tell(None, What::HostEnded);
        let answer = answer.await.unwrap();
        assert_eq!((answer.events.len(), answer.ended), (1, true));
        assert_eq!(events.read_soon(Wanted { since: 2, wait_ms: 1 }).await.events, []);
        teller.tell(None, What::Paused);
        assert_eq!(events.read(2).events, [], "after the end there is nothing");
    }
}
