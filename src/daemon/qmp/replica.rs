//! The monitor of a replica that stands alone: a secondary for a stock QEMU that is the primary, without a pair of ours.
//!
//! ```text
//! in         | on                                          | does                                          | goes to
//! -----------|---------------------------------------------|-----------------------------------------------|-----------
//! NotStarted | xen-set-replication enable, primary=false   | each replicated image is the first checkpoint | Running
//! Running    | xen-colo-do-checkpoint                      | seals all disks as one                        | Running
//! Running    | disable, failover=true · lost heartbeat     | takes over with the last checkpoint           | TakenOver
//! Running    | disable, failover=false                     | drops the overlays                            | Stopped
//! TakenOver, Stopped | enable · disable                    | refused: it is over                           | –
//! ```
//!
//! The commands and options are those for a QEMU that is the secondary (`docs/COLO-FT.txt`, libxl): `--drive` and
//! `drive_add` name images and replication nodes, whose active and hidden disks are layers in memory here. Four answers
//! differ, because QEMU's are no help: nothing to replicate is an error; a checkpoint without replication is one too;
//! stopping without failover does drop the overlays; and what is over has a status that says so.
//!
//! The primary's side is not here: `xl-colo host` protects a guest.

mod drives;
mod exports;

use self::drives::{Back, Drive, Image};
use self::exports::NbdServer;
use super::{Service, teller};
use crate::colo::hello::DISKS_MAX;
use crate::daemon::address::listen_unix;
use crate::daemon::links::lock;
use crate::disk::FileDisk;
use crate::qmp::commands::{Command, ExportAdd, no_instance};
use crate::qmp::lines::{self, Line};
use crate::qmp::{Event, Outcome, QmpError, done};
use crate::replica::epochs::{ReplicaConfig, ReplicaStatus, Stage};
use crate::replica::set::Replicas;
use crate::replica::state::FileState;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Notify, broadcast};

/// What this monitor has.
const COMMANDS: &[&str] = &[
    "xen-set-replication",
    "query-xen-replication-status",
    "xen-colo-do-checkpoint",
    "query-colo-status",
    "x-colo-lost-heartbeat",
    "nbd-server-start",
    "nbd-server-add",
    "nbd-server-remove",
    "nbd-server-stop",
    "block-export-add",
    "block-export-del",
    "x-blockdev-change",
    "human-monitor-command",
    "query-status",
    "stop",
    "cont",
    "xen-set-global-dirty-log",
    "query-replication",
    "yank",
    "query-yank",
    "query-block-jobs",
    "quit",
    "query-version",
    "query-commands",
];
/// The generation of the primary, and of whoever takes over from it.
const GENERATIONS: [u64; 2] = [1, 2];
/// Bytes merged at once.
const STEP_BYTES: u64 = 8 << 20;
/// Time between two attempts to merge into an image that fails.
const RETRY: Duration = Duration::from_secs(1);
/// What QEMU says of replication that is not under way.
const NOT_RUNNING: &str = "Block replication is not running";

enum Phase {
    NotStarted,
    /// The names of the disks, in the order of the replicas.
    Running(Replicas, Vec<String>),
    TakenOver(Replicas, Vec<String>),
    Stopped(Replicas, Vec<String>),
}

impl Phase {
    fn replicas(&self) -> Option<(&Replicas, &[String])> {
        match self {
            Self::NotStarted => None,
            Self::Running(replicas, names) | Self::TakenOver(replicas, names) | Self::Stopped(replicas, names) => {
                Some((replicas, names))
            }
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::NotStarted => "none",
            Self::Running(..) => "running",
            Self::TakenOver(..) => "taken-over",
            Self::Stopped(..) => "stopped",
        }
    }
}

struct State {
    drives: BTreeMap<String, Drive>,
    nbd: Option<NbdServer>,
    phase: Phase,
    /// Whether the guest that others run may run, as far as was said here.
    runs: Option<bool>,
}

/// The monitor.
pub struct ReplicaMonitor {
    state: Mutex<State>,
    epochs: ReplicaConfig,
    events: broadcast::Sender<Event>,
    /// There may be something to merge.
    work: Notify,
    quit: Notify,
}

impl std::fmt::Debug for ReplicaMonitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicaMonitor").finish_non_exhaustive()
    }
}

fn error<T>(desc: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(desc))
}

fn failed(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

impl ReplicaMonitor {
    /// A monitor with these drives, in the words of QEMU's `-drive`.
    pub fn new(drives: &[String], epochs: ReplicaConfig) -> Result<Self, String> {
        let state = State { drives: BTreeMap::new(), nbd: None, phase: Phase::NotStarted, runs: None };
        let mut monitor =
            Self { state: state.into(), epochs, events: teller(), work: Notify::new(), quit: Notify::new() };
        for options in drives {
            let added = lines::Drive::parse(options, false).and_then(|drive| add_drive(monitor.state.get_mut(), drive));
            added.map_err(|why| format!("--drive {options}: {why}"))?;
        }
        Ok(monitor)
    }

    /// Merges what is sealed until told to quit; then leaves every image as whole as it can be.
    pub async fn run(&self) -> Result<(), RunError> {
        tokio::select! {
            () = self.quit.notified() => {}
            () = self.merge() => {}
        }
        self.finish().await
    }

    /// What ends it: the same as `quit`.
    pub fn end(&self) {
        self.quit.notify_one();
    }

    async fn merge(&self) {
        loop {
            self.work.notified().await;
            let replicas = self.state.lock().await.phase.replicas().map(|(replicas, _)| replicas.clone());
            let Some(replicas) = replicas else { continue };
            loop {
                let here = replicas.clone();
                match tokio::task::spawn_blocking(move || here.apply_some(STEP_BYTES)).await {
                    Ok(Ok(true)) => {}
                    Ok(Ok(false)) => break,
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "a checkpoint is not merged");
                        tokio::time::sleep(RETRY).await;
                    }
                    Err(_) => return,
                }
            }
        }
    }

    /// Nothing of a guest that went on here may be lost with the layers, which are in memory.
    async fn finish(&self) -> Result<(), RunError> {
        let mut state = self.state.lock().await;
        if let Some(nbd) = state.nbd.take() {
            self.deleted(nbd.stop().await);
        }
        let phase = std::mem::replace(&mut state.phase, Phase::NotStarted);
        let finished = tokio::task::spawn_blocking(move || match phase {
            Phase::Running(replicas, _) => replicas.stop().map_err(|error| error.to_string()),
            Phase::TakenOver(replicas, _) => loop {
                match replicas.apply_some(STEP_BYTES) {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    Err(error) => return Err(error.to_string()),
                }
            },
            Phase::NotStarted | Phase::Stopped(..) => Ok(()),
        });
        match finished.await {
            Ok(merged) => merged.map_err(RunError::NotMerged),
            Err(panic) => Err(RunError::NotMerged(panic.to_string())),
        }
    }

    fn tell(&self, name: &str, data: Value) {
        // Nobody may be listening.
        let _ = self.events.send(Event::new(name, data));
    }

    fn deleted(&self, ids: Vec<String>) {
        ids.into_iter().for_each(|id| self.tell("BLOCK_EXPORT_DELETED", json!({"id": id})));
    }

    fn moved(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        self.tell("XEN_COLO_REPLICATION", json!({"stage": state.phase.name()}));
        self.work.notify_one();
    }

    fn start(&self, state: &mut State) -> Result<(), QmpError> {
        if state.phase.replicas().is_some() {
            return error("Block replication is running or done");
        }
        let of = |drive: &Drive| match drive {
            Drive::Secondary { image } => Some(image.clone()),
            Drive::Image(_) => None,
        };
        let names: Vec<String> = state.drives.values().filter_map(of).collect();
        if names.is_empty() {
            return error("there is nothing to replicate: no drive has driver=replication,mode=secondary");
        }
        let image = |name: &String| match state.drives.get(name) {
            Some(Drive::Image(image)) => Ok(image.clone()),
            _ => error("The secondary disk doesn't have block backend"),
        };
        let images = names.iter().map(image).collect::<Result<Vec<Image>, _>>()?;
        if images.len() > DISKS_MAX {
            return error(format!("a guest has {DISKS_MAX} disks at most"));
        }
        let mut backs: Vec<_> = images.iter().map(|image| lock(&image.back)).collect();
        let mut bases = Vec::new();
        for image in &images {
            let base: Box<dyn crate::disk::Disk> = Box::new(FileDisk::open(&image.path).map_err(failed)?);
            bases.push((base, Box::new(FileState::of(&image.path)) as _));
        }
        let mut set = [0; 4];
        getrandom::fill(&mut set).map_err(failed)?;
        let replicas = Replicas::open(bases, u32::from_le_bytes(set), self.epochs.clone()).map_err(failed)?;
        replicas.start_sync(GENERATIONS[0]).map_err(failed)?;
        replicas.seal().map_err(failed)?;
        for (back, view) in backs.iter_mut().zip(replicas.primary_views(GENERATIONS[0])) {
            **back = Back::Replica(view);
        }
        drop(backs);
        self.moved(state, Phase::Running(replicas, names));
        Ok(())
    }

    fn stop(&self, state: &mut State, failover: bool) -> Result<(), QmpError> {
        let Phase::Running(replicas, names) = &state.phase else { return error(NOT_RUNNING) };
        let (replicas, names) = (replicas.clone(), names.clone());
        if failover {
            replicas.takeover(GENERATIONS[1]).map_err(failed)?;
            self.tell("COLO_EXIT", json!({"mode": "secondary", "reason": "request"}));
            self.moved(state, Phase::TakenOver(replicas, names));
            return Ok(());
        }
        // Over it is even if an image could not be written.
        let stopped = replicas.stop();
        self.moved(state, Phase::Stopped(replicas, names));
        stopped.map_err(failed)
    }

    async fn add_export(&self, state: &mut State, add: &ExportAdd) -> Outcome {
        let found = match state.drives.get(&add.node) {
            Some(Drive::Image(image)) => Some((image.clone(), false)),
            Some(Drive::Secondary { image }) => match state.drives.get(image) {
                Some(Drive::Image(image)) => Some((image.clone(), true)),
                _ => None,
            },
            None => None,
        };
        let nowhere = |device: &str| error(format!("Cannot find device='{device}' nor node-name='{}'", add.node));
        if found.is_none() && add.legacy {
            return nowhere(&add.node);
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if !add.id.starts_with(|c: char| c.is_ascii_alphabetic()) || !add.id.chars().all(fits) {
            return error("Invalid block export id");
        }
        if state.nbd.as_ref().is_some_and(|nbd| nbd.has(&add.id)) {
            return error(format!("Block export id '{}' is already in use", add.id));
        }
        let Some((image, guest)) = found else { return nowhere("") };
        let Some(nbd) = &state.nbd else { return error("NBD server not running") };
        nbd.add(add, image, guest)?;
        done()
    }

    async fn line(&self, state: &mut State, line: Line) -> String {
        match line {
            Line::Answered(text) => text,
            Line::DriveAdd { node_only, drive } => match drive.and_then(|drive| add_drive(state, drive)) {
                Ok(()) if node_only => String::new(),
                Ok(()) => "OK\r\n".into(),
                Err(why) => format!("{why}\r\n"),
            },
            Line::DriveDel { id } => {
                let of = |drive: &Drive| matches!(drive, Drive::Secondary { image } if *image == id);
                let used = state.nbd.as_ref().is_some_and(|nbd| nbd.has(&id));
                if !state.drives.contains_key(&id) {
                    return format!("Device '{id}' not found\r\n");
                }
                if used || state.drives.values().any(of) || state.phase.replicas().is_some() {
                    return format!("Node {id} is in use\r\n");
                }
                state.drives.remove(&id);
                String::new()
            }
        }
    }

    fn change_children(state: &State, parent: &str, child: Option<&str>, node: Option<&str>) -> Outcome {
        if !state.drives.contains_key(parent) {
            return error(format!("Cannot find device='{parent}' nor node-name='{parent}'"));
        }
        match (child, node) {
            (Some(_), Some(_)) => error("The parameters child and node are in conflict"),
            (None, None) => error("Either child or node must be specified"),
            (Some(child), None) => error(format!("Node '{parent}' does not have child '{child}'")),
            (None, Some(node)) if !state.drives.contains_key(node) => error(format!("Node '{node}' not found")),
            (None, Some(_)) => error(format!("The node {parent} does not support adding a child")),
        }
    }

    fn replication(state: &State) -> Value {
        let disks = state.phase.replicas().map_or_else(Vec::new, |(replicas, names)| {
            let disk = |(name, status): (&String, ReplicaStatus)| {
                let mut disk = serde_json::to_value(status).unwrap_or_default();
                disk["name"] = json!(name);
                disk
            };
            names.iter().zip(replicas.status()).map(disk).collect()
        });
        let exports = state.nbd.as_ref().map(NbdServer::ids);
        let mut all = status(&state.phase);
        all["stage"] = json!(state.phase.name());
        all["disks"] = disks.into();
        all["exports"] = json!(exports);
        all
    }
}

/// What `query-xen-replication-status` returns: an error that is latched on any disk shows, by the disk's name.
fn status(phase: &Phase) -> Value {
    let Some((replicas, names)) = phase.replicas() else { return json!({"error": true, "desc": NOT_RUNNING}) };
    let failing = |(name, status): (&String, ReplicaStatus)| {
        let failed = status.broken || status.stage == Stage::FailoverFailed || !status.errors.is_empty();
        failed.then(|| format!("{name}: {}", status.errors.first().map_or("broken", String::as_str)))
    };
    let failing: Vec<String> = names.iter().zip(replicas.status()).filter_map(failing).collect();
    match phase {
        _ if !failing.is_empty() => {
            json!({"error": true, "desc": format!("I/O error occurred ({})", failing.join("; "))})
        }
        Phase::Running(..) => json!({"error": false}),
        Phase::TakenOver(..) => json!({"error": true, "desc": format!("{NOT_RUNNING} (taken over)")}),
        Phase::NotStarted | Phase::Stopped(..) => json!({"error": true, "desc": format!("{NOT_RUNNING} (stopped)")}),
    }
}

/// After a takeover what is not in an image yet is a commit job, as a QEMU's is.
fn merging(phase: &Phase) -> Value {
    let Phase::TakenOver(replicas, names) = phase else { return json!([]) };
    let job = |(name, status): (&String, ReplicaStatus)| {
        let left = status.debt_bytes;
        (status.stage != Stage::Done).then(|| json!({"type": "commit", "device": name, "len": left, "offset": 0}))
    };
    names.iter().zip(replicas.status()).filter_map(job).collect()
}

fn add_drive(state: &mut State, drive: lines::Drive) -> Result<(), String> {
    let name = drive.name().to_owned();
    if state.drives.contains_key(&name) {
        return Err(format!("Duplicate nodes with node-name='{name}'"));
    }
    let drive = match drive {
        lines::Drive::Image { file, .. } => {
            Drive::Image(Image::open(file.clone().into()).map_err(|why| format!("Could not open '{file}': {why}"))?)
        }
        lines::Drive::Secondary { image, .. } => {
            if !matches!(state.drives.get(&image), Some(Drive::Image(_))) {
                return Err(format!("Cannot find device='{image}' nor node-name='{image}'"));
            }
            let of = |drive: &Drive| matches!(drive, Drive::Secondary { image: other } if *other == image);
            if state.drives.values().any(of) {
                return Err(format!("image '{image}' has a replication node already"));
            }
            if state.phase.replicas().is_some() {
                return Err("Block replication is running or done".into());
            }
            Drive::Secondary { image }
        }
        lines::Drive::Primary { .. } => {
            return Err("this monitor has a secondary's disks only; xl-colo host protects a guest".into());
        }
    };
    state.drives.insert(name, drive);
    Ok(())
}

/// Why there is no monitor.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A drive.
    #[error("{0}")]
    Drive(String),
    /// What was sealed did not all reach the images: they say what they are.
    #[error("the images are not whole: {0}")]
    NotMerged(String),
    /// The socket, or what tells of its end.
    #[error("monitor {}: {source}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Is a monitor at `socket` until it is told to quit, or terminated. `ready` is called when it listens.
pub async fn run(
    socket: &Path,
    drives: &[String],
    epochs: ReplicaConfig,
    ready: impl FnOnce(),
) -> Result<(), RunError> {
    let monitor = Arc::new(ReplicaMonitor::new(drives, epochs).map_err(RunError::Drive)?);
    let failed = |source| RunError::Socket { path: socket.to_owned(), source };
    let listener = listen_unix(socket).await.map_err(failed)?;
    let mut terminated = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed)?;
    let serving = tokio::spawn(super::serve(listener, monitor.clone()));
    ready();
    let ended = monitor.clone();
    tokio::spawn(async move {
        tokio::select! { _ = terminated.recv() => {}, _ = interrupted.recv() => {} }
        ended.end();
    });
    let ended = monitor.run().await;
    serving.abort();
    let _ = std::fs::remove_file(socket);
    // Lets the answer to `quit` out.
    tokio::time::sleep(Duration::from_millis(20)).await;
    ended
}

impl Service for ReplicaMonitor {
    fn commands(&self) -> &'static [&'static str] {
        COMMANDS
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    async fn carry_out(self: Arc<Self>, command: Command) -> Outcome {
        let mut state = self.state.lock().await;
        let state = &mut *state;
        match command {
            Command::SetReplication { enable: true, primary: true, .. } => {
                if state.drives.values().any(|drive| matches!(drive, Drive::Secondary { .. })) {
                    error("The parameter mode's value is invalid, needs 1, but got 0")
                } else {
                    error("there is nothing to replicate: no drive has driver=replication,mode=primary")
                }
            }
            Command::SetReplication { enable: true, .. } => {
                tokio::task::block_in_place(|| self.start(state)).and_then(|()| done())
            }
            Command::SetReplication { failover, .. } => {
                tokio::task::block_in_place(|| self.stop(state, failover)).and_then(|()| done())
            }
            Command::DoCheckpoint => {
                let Phase::Running(replicas, _) = &state.phase else { return error(NOT_RUNNING) };
                tokio::task::block_in_place(|| replicas.seal()).map_err(failed)?;
                self.work.notify_one();
                done()
            }
            Command::QueryReplicationStatus => Ok(status(&state.phase)),
            Command::QueryReplication => Ok(Self::replication(state)),
            Command::QueryColoStatus => Ok(match &state.phase {
                Phase::NotStarted => json!({"mode": "none", "last-mode": "none", "reason": "none"}),
                Phase::Running(..) => json!({"mode": "secondary", "last-mode": "none", "reason": "none"}),
                Phase::TakenOver(..) | Phase::Stopped(..) => {
                    json!({"mode": "none", "last-mode": "secondary", "reason": "request"})
                }
            }),
            Command::LostHeartbeat => match &state.phase {
                Phase::TakenOver(..) => error("COLO failover is already activated"),
                Phase::NotStarted | Phase::Stopped(..) => error("The feature 'colo' is not enabled"),
                Phase::Running(..) => self.stop(state, true).and_then(|()| done()),
            },
            Command::NbdStart { listen, max_connections } => {
                if state.nbd.is_some() {
                    return error("NBD server already running");
                }
                state.nbd = Some(NbdServer::start(&listen, max_connections).await?);
                done()
            }
            Command::ExportAdd(add) => self.add_export(state, &add).await,
            Command::ExportDel { id, hard } => {
                let Some(nbd) = state.nbd.as_ref().filter(|nbd| nbd.has(&id)) else {
                    return error(format!("Export '{id}' is not found"));
                };
                if !hard && nbd.is_used(&id) {
                    return error(format!("export '{id}' still in use"));
                }
                nbd.remove(&id).await;
                self.deleted(vec![id]);
                done()
            }
            Command::NbdStop => {
                let Some(nbd) = state.nbd.take() else { return error("NBD server not running") };
                self.deleted(nbd.stop().await);
                done()
            }
            Command::BlockdevChange { parent, child, node } => {
                Self::change_children(state, &parent, child.as_deref(), node.as_deref())
            }
            Command::Line(line) => Ok(Value::String(self.line(state, line).await)),
            Command::QueryStatus => Ok(match state.runs {
                None => json!({"status": "prelaunch", "singlestep": false, "running": false}),
                Some(true) => json!({"status": "running", "singlestep": false, "running": true}),
                Some(false) => json!({"status": "paused", "singlestep": false, "running": false}),
            }),
            Command::Stop => {
                if state.runs == Some(true) {
                    state.runs = Some(false);
                    self.tell("STOP", Value::Null);
                }
                done()
            }
            Command::Cont => {
                if state.runs.replace(true) != Some(true) {
                    self.tell("RESUME", Value::Null);
                }
                done()
            }
            // What writes guest memory is not here, and has its own log.
            Command::SetGlobalDirtyLog { .. } => done(),
            Command::Yank(instances) if instances.is_empty() => done(),
            Command::Yank(_) => Err(no_instance()),
            Command::QueryYank => Ok(json!([])),
            Command::QueryBlockJobs => Ok(merging(&state.phase)),
            Command::Quit => {
                self.end();
                done()
            }
            Command::SetParameters { .. }
            | Command::Capabilities { .. }
            | Command::QueryVersion
            | Command::QueryCommands => Err(QmpError::not_found("The command has not been found")),
        }
    }
}
