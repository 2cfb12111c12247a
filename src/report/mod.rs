//! A run's page: what the event logs of its hosts tell, as one HTML file for a post-mortem.
//!
//! ```text
//!   DIR/*.events, *.events.1 ─▶ logs ─▶ story ─▶ page ◀─ timeline, chart     DIR/report.html
//!       demo.json             bounded   what it   words   drawings in SVG
//!                                       comes to
//! ```
//!
//! It reads files and knows no host: the hosts of a post-mortem are gone. So it is no driver, and not in `daemon`, whose
//! events it is written in. Of the modules only `logs` touches files; the rest is pure, and a page follows from its logs.
//!
//! Three traps. A log may be huge, cut off or not a log at all: what is read, kept and drawn is bounded, and what was left
//! out is said. Texts in it were chosen by a peer: `html` escapes each, and [`text::plain`] takes the rest of the
//! tricks away. And two hosts have two clocks: lines are put in the order of the wall clock, and how far the clocks are
//! apart is measured and said, not mended.

mod chart;
mod html;
mod logs;
mod page;
mod story;
mod style;
#[cfg(test)]
mod tests;
pub mod text;
mod timeline;

use serde::Serialize;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use story::Story;

/// What clients saw of the run, beside the logs: what `demo --json` prints.
pub const CLIENTS_FILE: &str = "demo.json";

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file or a directory failed.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory has no event log.
    #[error("{path} has no event log (NAME.events)", path = .0.display())]
    NoLogs(PathBuf),
    /// The logs have no line that is an event.
    #[error("no line of the event logs in {path} is an event; {first}", path = .path.display())]
    NoEvents {
        /// Where.
        path: PathBuf,
        /// What is wrong with the first.
        first: String,
    },
    /// The logs are of several guests, and a page is of one.
    #[error("the event logs are of {} guests: {}", .0.len(), .0.join(", "))]
    SeveralGuests(Vec<String>),
    /// Nothing is told of this guest.
    #[error("the event logs tell nothing of {0}")]
    NoSuchGuest(String),
}

impl ReportError {
    /// What to do next.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::NoLogs(_) => {
                Some("copy both hosts' NAME.events there; a host keeps it beside its control socket".into())
            }
            Self::SeveralGuests(_) | Self::NoSuchGuest(_) => Some("name one of its guests with --guest".into()),
            _ => None,
        }
    }
}

/// A takeover, in figures.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct TakeoverFigures {
    /// Who went on.
    pub host: String,
    /// In which generation.
    pub generation: u64,
    /// When it told so, by its own wall clock.
    pub at_unix_us: u64,
    /// From the loss of the peer to the decision.
    pub decided_after_ms: Option<u64>,
    /// From the decision to the first frame to the network.
    pub first_output_after_us: Option<u64>,
}

/// The page's key figures; what is not known is absent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Figures {
    /// Where the page is.
    pub report: PathBuf,
    /// The guest.
    pub guest: Option<String>,
    /// The hosts.
    pub hosts: Vec<String>,
    /// The first line's wall clock.
    pub from_unix_us: u64,
    /// The last line's.
    pub to_unix_us: u64,
    /// Lines that are events.
    pub events: u64,
    /// Lines that are none.
    pub malformed_lines: u64,
    /// Events that the hosts could not write down.
    pub lost_events: u64,
    /// Bytes of logs that were not read.
    pub unread_bytes: u64,
    /// Checkpoints that the peer came to own.
    pub checkpoints: u64,
    /// How long the guest stood still for one: median, 99th percentile, longest.
    pub pause_us: Option<[u64; 3]>,
    /// What the stream carried for all of them.
    pub stream_bytes: Option<u64>,
    /// How long the guest was protected, well or not.
    pub protected_us: u64,
    /// Of this: something was the matter.
    pub degraded_us: u64,
    /// How long it ran alone.
    pub alone_us: u64,
    /// Takeovers; the first fifty.
    pub takeovers: Vec<TakeoverFigures>,
    /// Acknowledged writes that clients missed afterwards, where a client looked.
    pub lost_writes: Option<u64>,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guest = self.guest.as_deref().unwrap_or("no guest");
        let (checkpoints, protected) = (text::grouped(self.checkpoints), text::duration(self.protected_us));
        write!(f, "{}: {guest}, {checkpoints} checkpoints, protected for {protected}", self.report.display())?;
        match &self.takeovers[..] {
            [] => f.write_str(", no takeover"),
            [.., last] => write!(f, ", host {} went on in generation {}", last.host, last.generation),
        }
    }
}

/// Writes the page of the logs in `dir` to `out`.
pub fn write(dir: &Path, guest: Option<&str>, out: &Path) -> Result<Figures, ReportError> {
    let logs = logs::read(dir)?;
    let story = Story::of(&logs, guest)?;
    let page = page::render(&story, &logs);
    put(out, page.as_bytes()).map_err(|source| ReportError::Io { path: out.to_owned(), source })?;
    Ok(story.figures(&logs, out))
}

/// The file is there whole or as it was, also where two write it at once. What is no file, such as a pipe, is not replaced
/// by one.
fn put(out: &Path, bytes: &[u8]) -> io::Result<()> {
    if std::fs::metadata(out).is_ok_and(|there| !there.is_file()) {
        return std::fs::write(out, bytes);
    }
    let mut new = out.as_os_str().to_owned();
    new.push(format!(".{}.new", std::process::id()));
    let written = std::fs::write(&new, bytes).and_then(|()| std::fs::rename(&new, out));
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    written
}
