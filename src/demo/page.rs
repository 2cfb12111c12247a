//! What a run leaves for a post-mortem, where that is asked for: both hosts' event logs, what the clients saw, the page.

use super::report::DemoReport;
use super::{PairError, World, say};
use crate::report::{self, CLIENTS_FILE};
use std::path::Path;

/// Whether a file of this name is an event log.
pub(super) fn is_log(name: &str) -> bool {
    name.ends_with(".events") || name.ends_with(".events.1")
}

/// A directory for it: what is in it already would be told as if it had happened in this run.
pub(super) fn prepare(dir: &Path) -> Result<(), PairError> {
    let failed = |why: &dyn std::fmt::Display| PairError::Failed(format!("{}: {why}", dir.display()));
    std::fs::create_dir_all(dir).map_err(|error| failed(&error))?;
    let mut there = std::fs::read_dir(dir).map_err(|error| failed(&error))?.flatten();
    match there.find(|entry| is_log(&entry.file_name().to_string_lossy())) {
        Some(log) => Err(failed(&format_args!("it has an event log already, {}", log.file_name().display()))),
        None => Ok(()),
    }
}

/// Keeps what the clients saw.
pub(super) fn keep_clients(dir: &Path, report: &DemoReport) -> Result<(), PairError> {
    let path = dir.join(CLIENTS_FILE);
    let text = serde_json::to_string(report).unwrap_or_default();
    std::fs::write(&path, text).map_err(|error| PairError::Failed(format!("{}: {error}", path.display())))
}

/// Fetches the logs, and writes the page.
pub(super) async fn write<W: World>(dir: &Path, world: &W) -> Result<(), PairError> {
    world.keep_events(dir).await?;
    let written = report::write(dir, None, &dir.join("report.html"));
    let figures = written.map_err(|error| PairError::Failed(format!("report: {error}")))?;
    say(figures);
    Ok(())
}
