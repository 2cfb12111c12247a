//! Reads the event logs of a directory: bounded, and with a name for each line that is no event.
//!
//! The lines of a log are in the order in which they were told. Those of several are put in the order of the wall clock.

use super::{CLIENTS_FILE, ReportError, text};
use crate::daemon::events::Event;
use serde::Deserialize;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Bytes of logs that are read: twice what two hosts keep.
pub(super) const LOGS_MAX_BYTES: u64 = 128 << 20;
/// Files that are read.
const FILES_MAX: usize = 64;
/// Longest line, in bytes. What a host writes is shorter than a tenth.
const LINE_MAX_BYTES: u64 = 16 << 10;
/// Longest file of what clients saw.
const CLIENTS_MAX_BYTES: u64 = 1 << 20;
/// Lines that are named.
const NAMED_MAX: usize = 20;

/// What a demo's clients saw; the names are those of its report.
#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
pub(super) struct Clients {
    pub(super) killed: Option<String>,
    pub(super) acknowledged_writes: u64,
    pub(super) checked_writes: u64,
    pub(super) lost_writes: u64,
    pub(super) connection_kept: bool,
    pub(super) detection_ms: Option<f64>,
    pub(super) takeover_ms: Option<f64>,
    pub(super) longest_silence_ms: Option<f64>,
}

/// A file that was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct LogFile {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) events: u64,
}

/// What is in the logs of a directory.
#[derive(Clone, Debug, Default)]
pub(super) struct Logs {
    /// By the wall clock.
    pub(super) events: Vec<Event>,
    pub(super) files: Vec<LogFile>,
    /// Lines that are no events.
    pub(super) malformed: u64,
    /// The first of them: `FILE:LINE: what is wrong`.
    pub(super) named: Vec<String>,
    /// Bytes that were too many.
    pub(super) unread_bytes: u64,
    pub(super) clients: Option<Clients>,
}

/// Reads all logs of a directory.
pub(super) fn read(dir: &Path) -> Result<Logs, ReportError> {
    let mut logs = Logs::default();
    let paths = find(dir)?;
    if paths.is_empty() {
        return Err(ReportError::NoLogs(dir.to_owned()));
    }
    let mut left = LOGS_MAX_BYTES;
    for path in &paths {
        logs.read_file(path, &mut left).map_err(|source| ReportError::Io { path: path.clone(), source })?;
    }
    if logs.events.is_empty() {
        let first = logs.named.first().cloned().unwrap_or_else(|| "they are empty".into());
        return Err(ReportError::NoEvents { path: dir.to_owned(), first });
    }
    logs.events.sort_by(|a, b| (a.unix_us, &a.host, a.number).cmp(&(b.unix_us, &b.host, b.number)));
    logs.read_clients(&dir.join(CLIENTS_FILE));
    Ok(logs)
}

/// `NAME.events` and `NAME.events.1`, in the order in which they were written.
fn find(dir: &Path) -> Result<Vec<PathBuf>, ReportError> {
    let failed = |source| ReportError::Io { path: dir.to_owned(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_log = name.ends_with(".events") || name.ends_with(".events.1");
        // A pipe that is called so would never end.
        if is_log && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort_by_key(|path| {
        let name = path.display().to_string();
        let older = name.strip_suffix(".1").map(str::to_owned);
        (older.clone().unwrap_or(name), older.is_none())
    });
    Ok(paths)
}

impl Logs {
    fn read_file(&mut self, path: &Path, left: &mut u64) -> io::Result<()> {
        let name = text::plain(&path.file_name().unwrap_or_default().to_string_lossy());
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let allowed = if self.files.len() < FILES_MAX { length.min(*left) } else { 0 };
        self.unread_bytes += length - allowed;
        *left -= allowed;
        if allowed == 0 && length > 0 {
            return Ok(());
        }
        let before = self.events.len();
        let mut reader = BufReader::new(file.take(allowed));
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            if reader.by_ref().take(LINE_MAX_BYTES).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let is_whole = line.ends_with(b"\n");
            if !is_whole && line.len() as u64 == LINE_MAX_BYTES {
                self.name(&name, number, &format!("a line of more than {LINE_MAX_BYTES} bytes"));
                skip_line(&mut reader)?;
                continue;
            }
            match serde_json::from_slice::<Event>(&line) {
                Ok(event) => self.events.push(event),
                Err(_) if !is_whole => self.name(&name, number, "the line is cut off"),
                Err(error) => self.name(&name, number, &error.to_string()),
            }
        }
        let events = (self.events.len() - before) as u64;
        self.files.push(LogFile { name, bytes: allowed, events });
        Ok(())
    }

    fn name(&mut self, file: &str, line: u64, what: &str) {
        self.malformed += 1;
        if self.named.len() < NAMED_MAX {
            self.named.push(text::plain(&format!("{file}:{line}: {what}")));
        }
    }

    /// It need not be there; what is there and is none is named as a line is.
    fn read_clients(&mut self, path: &Path) {
        let mut said = Vec::new();
        match File::open(path).and_then(|file| file.take(CLIENTS_MAX_BYTES).read_to_end(&mut said)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => self.name(CLIENTS_FILE, 1, &error.to_string()),
            Ok(_) => match serde_json::from_slice(&said) {
                Ok(clients) => self.clients = Some(clients),
                Err(error) => self.name(CLIENTS_FILE, error.line() as u64, &error.to_string()),
            },
        }
    }
}

/// To the end of the line, without keeping it.
fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        let chunk = reader.fill_buf()?;
        let (bytes, is_end) = match chunk.iter().position(|byte| *byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (chunk.len(), chunk.is_empty()),
        };
        reader.consume(bytes);
        if is_end {
            return Ok(());
        }
    }
}
