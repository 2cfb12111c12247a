//! The monitor of a host's guest: orders go to the engine, as the control socket's do.
//!
//! | command | what the engine is asked |
//! |---|---|
//! | `xen-colo-do-checkpoint` | `checkpoint` |
//! | `x-colo-lost-heartbeat`, `xen-set-replication` enable=false failover=true | `failover` |
//! | `xen-set-replication` enable=false | `unprotect`, on the primary |
//! | `xen-set-replication` enable=true | nothing: the peer is not in it, so it is an error that names `protect` |
//! | `stop`, `cont` | to stop and run a guest that is not in a pair |
//! | `migrate-set-parameters` | another checkpoint delay, and a checkpoint |
//! | `query-*` | `status` |
//!
//! The replica's exports are the pair's own link, so the NBD commands are not here.

use super::Service;
use crate::colo::failover::ExitReason;
use crate::daemon::control::{Answer, Asked, Request, ask_engine};
use crate::daemon::status::{PairRole, Protection, Status};
use crate::qmp::commands::{Command, no_instance};
use crate::qmp::lines::Line;
use crate::qmp::{Event, Outcome, QmpError, done};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{broadcast, mpsc};

/// What this monitor has.
const COMMANDS: &[&str] = &[
    "xen-set-replication",
    "query-xen-replication-status",
    "xen-colo-do-checkpoint",
    "query-colo-status",
    "x-colo-lost-heartbeat",
    "human-monitor-command",
    "migrate-set-parameters",
    "query-status",
    "stop",
    "cont",
    "xen-set-global-dirty-log",
    "query-replication",
    "yank",
    "query-yank",
    "query-version",
    "query-commands",
];
/// What QEMU says of replication that is not under way.
const NOT_RUNNING: &str = "Block replication is not running";

/// The monitor's socket, beside the control socket of the host.
#[must_use]
pub fn socket_path(run_dir: &Path, host: &str) -> PathBuf {
    run_dir.join(format!("{host}.qmp"))
}

/// The monitor.
#[derive(Debug)]
pub struct HostMonitor {
    /// Where its orders go.
    pub engine: mpsc::Sender<Asked>,
    /// Where the engine tells what happens.
    pub events: broadcast::Sender<Event>,
}

impl HostMonitor {
    async fn ask(&self, request: Request) -> Outcome {
        match ask_engine(&self.engine, request).await {
            Answer::Return(value) => Ok(value),
            Answer::Error { desc } => Err(QmpError::generic(desc)),
        }
    }

    async fn status(&self) -> Result<Status, QmpError> {
        let status = self.ask(Request::Status).await?;
        serde_json::from_value(status).map_err(|error| QmpError::generic(error.to_string()))
    }
}

/// What `query-xen-replication-status` returns: an error of any disk shows, by its name, and so does a guest that is
/// not protected.
fn replication_status(status: &Status) -> Value {
    let failing = |disk: &crate::daemon::status::Disk| {
        let name = disk.name.as_deref().unwrap_or("disk");
        disk.errors.first().map(|error| format!("{name}: {error}"))
    };
    let failing: Vec<String> = status.disks.iter().filter_map(failing).collect();
    if !failing.is_empty() {
        return json!({"error": true, "desc": format!("I/O error occurred ({})", failing.join("; "))});
    }
    match status.protection {
        Protection::Syncing | Protection::Protected | Protection::StandingBy => json!({"error": false}),
        other => {
            let why = status.why.as_ref().map_or(String::new(), |why| format!("; {why}"));
            json!({"error": true, "desc": format!("{NOT_RUNNING} ({other}{why})")})
        }
    }
}

/// What `query-colo-status` returns.
fn colo_status(status: &Status) -> Value {
    let role = status.role.map_or("none", PairRole::name);
    let under_way = matches!(
        status.protection,
        Protection::Syncing
            | Protection::Protected
            | Protection::StandingBy
            | Protection::Arbitrating
            | Protection::Held
    );
    let reason = match status.exit_reason {
        ExitReason::None => "none",
        ExitReason::Request => "request",
        ExitReason::Error => "error",
        ExitReason::Processing => "processing",
    };
    json!({"mode": if under_way { role } else { "none" }, "last-mode": role, "reason": reason})
}

/// What `query-status` returns, in QEMU's run states.
fn run_state(status: &Status) -> Value {
    let state = match status.protection {
        _ if status.paused => "paused",
        Protection::Unprotected | Protection::Syncing | Protection::Protected | Protection::TakenOver => "running",
        Protection::StandingBy => "inmigrate",
        Protection::Arbitrating | Protection::Held => "paused",
        Protection::Stopped => "postmigrate",
        Protection::Failed => "internal-error",
        Protection::Empty => "prelaunch",
    };
    json!({"status": state, "singlestep": false, "running": state == "running"})
}

impl Service for HostMonitor {
    fn commands(&self) -> &'static [&'static str] {
        COMMANDS
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    async fn carry_out(self: Arc<Self>, command: Command) -> Outcome {
        let request = match command {
            Command::SetReplication { enable: true, primary, .. } => {
                let status = self.status().await?;
                let role = match status.protection {
                    Protection::Syncing | Protection::Protected => Some(PairRole::Primary),
                    Protection::StandingBy => Some(PairRole::Secondary),
                    _ => None,
                };
                return Err(QmpError::generic(match role {
                    Some(PairRole::Primary) if !primary => "The parameter mode's value is invalid, needs 0, but got 1",
                    Some(PairRole::Secondary) if primary => "The parameter mode's value is invalid, needs 1, but got 0",
                    Some(_) => "Block replication is running or done",
                    None => {
                        "there is nothing to replicate: no peer is connected; protect the guest with xl-colo protect PEER"
                    }
                }));
            }
            Command::SetReplication { failover: false, .. } => Request::Unprotect,
            Command::SetReplication { .. } => Request::Failover,
            Command::LostHeartbeat => {
                match self.status().await?.protection {
                    Protection::TakenOver | Protection::Stopped | Protection::Arbitrating => {
                        return Err(QmpError::generic("COLO failover is already activated"));
                    }
                    Protection::Empty | Protection::Unprotected | Protection::Failed => {
                        return Err(QmpError::generic("The feature 'colo' is not enabled"));
                    }
                    // Held: whoever asks is the operator that is waited for.
                    Protection::Syncing | Protection::Protected | Protection::StandingBy | Protection::Held => {}
                }
                Request::Failover
            }
            Command::DoCheckpoint => Request::Checkpoint,
            Command::SetParameters { checkpoint_delay_ms: None } => return done(),
            Command::SetParameters { checkpoint_delay_ms: Some(ms) } => Request::CheckpointDelay { ms: ms.into() },
            Command::Stop => Request::PauseGuest,
            Command::Cont => Request::ResumeGuest,
            Command::QueryReplicationStatus => return Ok(replication_status(&self.status().await?)),
            Command::QueryColoStatus => return Ok(colo_status(&self.status().await?)),
            Command::QueryStatus => return Ok(run_state(&self.status().await?)),
            Command::QueryReplication => Request::Status,
            // The engine has log-dirty on for as long as it needs it.
            Command::SetGlobalDirtyLog { .. } => return done(),
            Command::Line(Line::Answered(text)) => return Ok(Value::String(text)),
            Command::Line(_) => {
                let why = "this monitor has no drives: the pair's own link replicates the guest's disks\r\n";
                return Ok(Value::String(why.into()));
            }
            Command::Yank(instances) if instances.is_empty() => return done(),
            Command::Yank(_) => return Err(no_instance()),
            Command::QueryYank | Command::QueryBlockJobs => return Ok(json!([])),
            Command::NbdStart { .. }
            | Command::BlockdevAdd(_)
            | Command::BlockdevDel { .. }
            | Command::ExportAdd(_)
            | Command::ExportDel { .. }
            | Command::NbdStop
            | Command::BlockdevChange { .. }
            | Command::Quit
            | Command::Capabilities { .. }
            | Command::QueryVersion
            | Command::QueryCommands => return Err(QmpError::not_found("The command has not been found")),
        };
        self.ask(request).await
    }
}
