//! The monitor of disks that stand alone: half of a pair whose other half is a stock QEMU, or one of these.
//!
//! ```text
//! in         | on                                          | does                                          | goes to
//! -----------|---------------------------------------------|-----------------------------------------------|-----------
//! NotStarted | xen-set-replication enable, primary=false   | each replicated image is the first checkpoint | Running
//! Running    | xen-colo-do-checkpoint                      | seals all disks as one                        | Running
//! Running    | disable, failover=true · lost heartbeat     | takes over with the last checkpoint           | TakenOver
//! Running    | disable, failover=false                     | drops the overlays                            | Stopped
//! TakenOver  | enable · disable · xen-colo-do-checkpoint   | nothing: this guest has no secondary any more | TakenOver
//! Stopped    | enable · disable                            | refused: it is over                           | –
//! ```
//!
//! The commands and options are those for a QEMU that is the secondary (`docs/COLO-FT.txt`, libxl): `--drive` and
//! `drive_add` name images and replication nodes, whose active and hidden disks are layers in memory here. Four answers
//! differ, because QEMU's are no help: nothing to replicate is an error; a checkpoint without replication is one too;
//! stopping without failover does drop the overlays; and what is over has a status that says so.
//!
//! The primary's half is `primary`; `graph` says which drive stands on which. Who carries the guest itself is not here.

mod drives;
mod exports;
mod graph;
mod primary;
mod report;

use self::drives::{Back, Drive, Image};
use self::exports::NbdServer;
use self::graph::Drives;
use self::primary::{Link, Stage as NodeStage};
use self::report::{colo_status, merging, replication, status};
use super::{Service, teller};
use crate::colo::hello::DISKS_MAX;
use crate::daemon::address::listen_unix;
use crate::daemon::links::lock;
use crate::qmp::commands::{Command, ExportAdd, YankInstance, no_instance};
use crate::qmp::drive;
use crate::qmp::lines::Line;
use crate::qmp::{Event, Outcome, QmpError, done};
use crate::replica::epochs::ReplicaConfig;
use crate::replica::set::Replicas;
use crate::replica::state::FileState;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
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
    "blockdev-add",
    "blockdev-del",
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
    drives: Drives,
    nbd: Option<NbdServer>,
    phase: Phase,
    /// Whether the guest that others run may run, as far as was said here.
    runs: Option<bool>,
}

/// The monitor.
pub struct ReplicaMonitor {
    state: Mutex<State>,
    epochs: ReplicaConfig,
    /// The connections that can be yanked, while an order waits for one of them too.
    links: std::sync::Mutex<BTreeMap<String, Weak<Link>>>,
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
    pub async fn new(drives: &[String], epochs: ReplicaConfig) -> Result<Self, String> {
        let state = State { drives: Drives::new(), nbd: None, phase: Phase::NotStarted, runs: None };
        let mut monitor = Self {
            state: state.into(),
            epochs,
            links: Default::default(),
            events: teller(),
            work: Notify::new(),
            quit: Notify::new(),
        };
        for options in drives {
            let wrong = |why| format!("--drive {options}: {why}");
            let drive = drive::Drive::parse(options, false).map_err(wrong)?;
            graph::add(&mut monitor.state.get_mut().drives, false, drive).await.map_err(wrong)?;
        }
        *lock(&monitor.links) = graph::links(&monitor.state.get_mut().drives);
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

    /// Whether all that is here is a secondary that took over. As QEMU's it has no part in what is ordered of all nodes,
    /// be it a new primary's orders.
    fn is_past(state: &State) -> bool {
        matches!(state.phase, Phase::TakenOver(..)) && graph::nodes(&state.drives).next().is_none()
    }

    fn start(&self, state: &mut State) -> Result<(), QmpError> {
        if state.phase.replicas().is_some() {
            return error("Block replication is running or done");
        }
        let of = |drive: &Drive| match drive {
            Drive::Secondary { image } => Some(image.clone()),
            _ => None,
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
        for (image, back) in images.iter().zip(&backs) {
            // The same open file, whose lock goes with its last handle.
            let Back::Plain(disk) = &**back else { return error(format!("{} is replicated", image.path.display())) };
            let base: Box<dyn crate::disk::Disk> = Box::new(disk.clone());
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
        let found = graph::image(&state.drives, &add.node);
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
            Line::DriveAdd { node_only, drive } => match self.add_drive(state, drive).await {
                Ok(()) if node_only => String::new(),
                Ok(()) => "OK\r\n".into(),
                Err(why) => format!("{why}\r\n"),
            },
            Line::DriveDel { id } if !state.drives.contains_key(&id) => format!("Device '{id}' not found\r\n"),
            Line::DriveDel { id } => match Self::delete_drive(state, &id) {
                Ok(()) => String::new(),
                Err(why) => format!("{why}\r\n"),
            },
        }
    }

    async fn add_drive(&self, state: &mut State, drive: Result<drive::Drive, String>) -> Result<(), String> {
        let has_begun = state.phase.replicas().is_some();
        graph::add(&mut state.drives, has_begun, drive?).await?;
        *lock(&self.links) = graph::links(&state.drives);
        Ok(())
    }

    fn delete_drive(state: &mut State, id: &str) -> Result<(), String> {
        let exported = state.nbd.as_ref().is_some_and(|nbd| nbd.has(id));
        let replicated = matches!(state.drives.get(id), Some(Drive::Image(_) | Drive::Secondary { .. }))
            && state.phase.replicas().is_some();
        if exported || replicated || graph::is_used(&state.drives, id) {
            return Err(format!("Block device {id} is in use"));
        }
        state.drives.remove(id);
        Ok(())
    }

    /// Starts the primary's nodes.
    async fn start_primary(&self, state: &mut State) -> Result<(), QmpError> {
        let is_secondary = state.drives.values().any(|drive| matches!(drive, Drive::Secondary { .. }));
        if is_secondary && matches!(state.phase, Phase::NotStarted | Phase::Running(..)) {
            return error("The parameter mode's value is invalid, needs 1, but got 0");
        }
        primary::start(graph::nodes_mut(&mut state.drives).collect()).await.map_err(QmpError::generic)?;
        self.tell("XEN_COLO_REPLICATION", json!({"stage": "running", "mode": "primary"}));
        Ok(())
    }

    /// Stops those that run. False if there are none.
    fn stop_primary(&self, state: &mut State) -> bool {
        let running: Vec<_> =
            graph::nodes_mut(&mut state.drives).filter(|(_, node)| node.stage == NodeStage::Running).collect();
        let any = !running.is_empty();
        running.into_iter().for_each(|(_, node)| node.stop());
        if any {
            self.tell("XEN_COLO_REPLICATION", json!({"stage": "stopped", "mode": "primary"}));
        }
        any
    }

    /// Waits until what the primary's guests have written is at the secondary; without the state's lock, so that nobody
    /// else waits. What is not.
    async fn settle(&self) -> Vec<String> {
        let settling: Vec<_> = {
            let state = self.state.lock().await;
            graph::nodes(&state.drives).filter_map(|(_, node)| node.mark()).collect()
        };
        let deadline = tokio::time::Instant::now() + primary::SETTLE;
        let mut late = Vec::new();
        for disk in settling {
            late.extend(disk.wait(deadline).await.err());
        }
        late
    }

    fn yank(&self, instances: &[YankInstance]) -> Outcome {
        let links = lock(&self.links);
        let link = |instance: &YankInstance| {
            let link = links.get(&instance.name).filter(|_| instance.kind == "block-node");
            link.and_then(Weak::upgrade).ok_or_else(no_instance)
        };
        let found = instances.iter().map(link).collect::<Result<Vec<_>, _>>()?;
        found.iter().for_each(|link| link.cut("yanked"));
        done()
    }

    fn yankable(&self) -> Value {
        let alive = |(name, link): (&String, &Weak<Link>)| (link.strong_count() > 0).then(|| name.clone());
        let names: Vec<_> = lock(&self.links).iter().filter_map(alive).collect();
        names.iter().map(|name| json!({"type": "block-node", "node-name": name})).collect()
    }
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
    let monitor = Arc::new(ReplicaMonitor::new(drives, epochs).await.map_err(RunError::Drive)?);
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
        let asks = command == Command::QueryReplicationStatus;
        let late = match &command {
            // Out of band: whoever it frees holds the state.
            Command::Yank(instances) => return self.yank(instances),
            Command::QueryYank => return Ok(self.yankable()),
            Command::DoCheckpoint | Command::Stop | Command::QueryReplicationStatus => self.settle().await,
            _ => Vec::new(),
        };
        let outcome = self.order(&mut *self.state.lock().await, command).await?;
        match (late.is_empty(), asks) {
            (true, _) => Ok(outcome),
            (false, true) if outcome["error"] == true => Ok(outcome),
            (false, true) => Ok(json!({"error": true, "desc": format!("I/O error occurred ({})", late.join("; "))})),
            (false, false) => error(late.join("; ")),
        }
    }
}

impl ReplicaMonitor {
    async fn order(&self, state: &mut State, command: Command) -> Outcome {
        match command {
            Command::SetReplication { .. } | Command::DoCheckpoint if Self::is_past(state) => done(),
            Command::SetReplication { enable: true, primary: true, .. } => {
                self.start_primary(state).await.and_then(|()| done())
            }
            Command::SetReplication { enable: true, .. } => {
                if graph::nodes(&state.drives).any(|(_, node)| node.stage == NodeStage::Idle) {
                    return error("The parameter mode's value is invalid, needs 0, but got 1");
                }
                tokio::task::block_in_place(|| self.start(state)).and_then(|()| done())
            }
            Command::SetReplication { failover, .. } => {
                if self.stop_primary(state) {
                    return done();
                }
                tokio::task::block_in_place(|| self.stop(state, failover)).and_then(|()| done())
            }
            Command::DoCheckpoint => {
                if let Phase::Running(replicas, _) = &state.phase {
                    tokio::task::block_in_place(|| replicas.seal()).map_err(failed)?;
                    self.work.notify_one();
                    return done();
                }
                if !graph::nodes(&state.drives).any(|(_, node)| node.stage == NodeStage::Running) {
                    return error(NOT_RUNNING);
                }
                let failing: Vec<String> = graph::nodes(&state.drives).filter_map(|(_, node)| node.failing()).collect();
                if failing.is_empty() { done() } else { error(failing.join("; ")) }
            }
            Command::QueryReplicationStatus => Ok(status(state)),
            Command::QueryReplication => Ok(replication(state)),
            Command::QueryColoStatus => Ok(colo_status(state)),
            Command::LostHeartbeat if self.stop_primary(state) => {
                self.tell("COLO_EXIT", json!({"mode": "primary", "reason": "request"}));
                done()
            }
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
                graph::change(&mut state.drives, &self.events, &parent, child.as_deref(), node.as_deref())
            }
            Command::BlockdevAdd(drive) => self.add_drive(state, drive).await.map_err(failed).and_then(|()| done()),
            Command::BlockdevDel { node } if !state.drives.contains_key(&node) => {
                error(format!("Failed to find node with node-name='{node}'"))
            }
            Command::BlockdevDel { node } => Self::delete_drive(state, &node).map_err(failed).and_then(|()| done()),
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
            Command::QueryBlockJobs => Ok(merging(&state.phase)),
            Command::Quit => {
                self.end();
                done()
            }
            Command::SetParameters { .. }
            | Command::Yank(_)
            | Command::QueryYank
            | Command::Capabilities { .. }
            | Command::QueryVersion
            | Command::QueryCommands => Err(QmpError::not_found("The command has not been found")),
        }
    }
}
