//! The event log: the events of a host in a file, a line of JSON each.
//!
//! ```text
//!   ring ─▶ FILE ── over its bound: renamed ──▶ FILE.1 (the one before is gone)
//! ```
//!
//! The writer reads the ring as any client does, so a slow disk or a full one costs the engine nothing; what the ring has
//! no longer when the disk takes lines again is a `lost` event of the log. Each process begins with `host-started`, since
//! numbers begin again.
//!
//! The trap is the line of which half is written when the disk is full: the other half stays in the buffer and goes first
//! when there is room, so the log goes on with the first event that is neither on the disk nor there.

use super::{Event, Events, Told, Wanted, What};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A file is renamed when it is longer than this.
pub const FILE_MAX_BYTES: u64 = 16 << 20;
/// Time between two attempts at a file that cannot be written.
const RETRY: Duration = Duration::from_secs(1);

/// Where a host's events go by default: beside its control socket.
#[must_use]
pub fn default_path(run_dir: &Path, host: &str) -> PathBuf {
    run_dir.join(format!("{host}.events"))
}

/// Where a service manager wants them: LOGS_DIRECTORY, of which the first counts (systemd.exec(5)).
#[must_use]
pub fn path_of_environment(host: &str) -> Option<PathBuf> {
    let directories = std::env::var_os("LOGS_DIRECTORY")?;
    let first = std::env::split_paths(&directories).next().filter(|first| first.is_absolute())?;
    Some(default_path(&first, host))
}

/// An event log.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: BufWriter<File>,
    bytes: u64,
    max_bytes: u64,
    /// The last event that is in the file or in the buffer.
    written: u64,
}

impl EventLog {
    /// Opens it, and goes on where it ends. It is refused while another process writes it.
    pub fn open(path: &Path, max_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "in use: another process writes this log"));
            }
            // A file system without locks has none to respect.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file), bytes, max_bytes, written: 0 })
    }

    fn write(&mut self, told: &Told) -> io::Result<()> {
        if let (Some(first), count @ 1..) = (told.events.first(), told.lost) {
            self.write_one(&Event { number: first.number - 1, what: What::Lost { count }, ..first.clone() })?;
        }
        told.events.iter().try_for_each(|event| self.write_one(event))?;
        self.file.flush()
    }

    fn write_one(&mut self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.max_bytes {
            self.file.flush()?;
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            std::fs::rename(&self.path, older)?;
            *self = Self { written: self.written, ..Self::open(&self.path, self.max_bytes)? };
        }
        self.file.write_all(&line)?;
        self.bytes += line.len() as u64;
        self.written = event.number;
        Ok(())
    }
}

/// Writes a host's events down until it ends. A file that cannot be written is said once until it can, and tried again
/// every second: a full disk is no reason to stop protecting a guest.
pub async fn keep(events: Events, log: EventLog) {
    let (mut log, mut since, mut failing) = (log, 0, false);
    loop {
        let told = events.read_soon(Wanted { since, wait_ms: u64::MAX }).await;
        since = told.since;
        let ended = told.ended;
        let writing = tokio::task::spawn_blocking(move || {
            let written = log.write(&told);
            (log, written)
        });
        let Ok((again, written)) = writing.await else { return };
        log = again;
        match written {
            Ok(()) => {
                if std::mem::take(&mut failing) {
                    tracing::info!(path = %log.path.display(), "the event log is written again");
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(path = %log.path.display(), %error, "the event log cannot be written");
                }
                since = log.written;
            }
        }
        if ended {
            return;
        }
        if failing {
            tokio::time::sleep(RETRY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<Event> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[tokio::test]
    async fn every_event_is_a_line_and_files_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.events");
        std::fs::write(&path, "").unwrap();
        let events = Events::new("a");
        let writer = tokio::spawn(keep(events.clone(), EventLog::open(&path, 20_000).unwrap()));
        for _ in 0..300 {
            events.tell(Some("web"), What::Paused);
            tokio::task::yield_now().await;
        }
        events.tell(None, What::HostEnded);
        writer.await.unwrap();
        let (older, newer) = (lines(&dir.path().join("a.events.1")), lines(&path));
        let all: Vec<_> = older.iter().chain(&newer).collect();
        assert_eq!(all.last().unwrap().what, What::HostEnded);
        assert!(all.windows(2).all(|pair| pair[0].number + 1 == pair[1].number), "no gap");
        for file in ["a.events", "a.events.1"] {
            let bytes = std::fs::metadata(dir.path().join(file)).unwrap().len();
            assert!(bytes > 0 && bytes <= 20_000, "{file}: {bytes}");
        }
        // The next process goes on in the same file.
        let again = Events::new("a");
        again.tell(None, What::HostEnded);
        keep(again, EventLog::open(&path, 20_000).unwrap()).await;
        assert_eq!(lines(&path).last().unwrap().number, 1);
    }

    #[test]
    fn what_the_ring_had_no_longer_is_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.events");
        let events = Events::new("a");
        (0..super::super::EVENTS_MAX + 3).for_each(|_| events.tell(None, What::Paused));
        EventLog::open(&path, 1 << 20).unwrap().write(&events.read(0)).unwrap();
        let lines = lines(&path);
        assert_eq!((lines[0].number, &lines[0].what), (3, &What::Lost { count: 3 }));
        assert_eq!((lines[1].number, &lines[1].what), (4, &What::Paused));
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_written_ends_nothing() {
        let events = Events::new("a");
        (0..3).for_each(|_| events.tell(None, What::Paused));
        events.tell(None, What::HostEnded);
        keep(events, EventLog::open(Path::new("/dev/full"), 1 << 20).unwrap()).await;
    }
}
