//! A QEMU of Debian's without a machine: its disks and its monitor are as real as with one.

use crate::common::conversation::Conversation;
use crate::common::{Listening, PATIENCE, installed, until};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::qmp::client::{Monitor, MonitorError};

/// A QEMU without a machine, killed at the end.
pub struct Qemu {
    /// It.
    pub process: Listening,
    /// Its monitor: one client at a time.
    pub monitor: Monitor,
}

/// A client of a monitor whose socket is there. Between its bind and its listen it refuses.
pub async fn monitor(socket: &Path) -> Monitor {
    until("the monitor listens", async || match Monitor::connect(socket, PATIENCE).await {
        Err(error @ MonitorError::Connect { .. }) => Err(error.to_string()),
        other => Ok(other.unwrap()),
    })
    .await
}

impl Qemu {
    pub async fn start(socket: &Path, drives: &[String], more: &[&str]) -> Option<Self> {
        let program = installed("qemu-system-x86_64")?;
        let drives = drives.iter().flat_map(|drive| ["-drive", drive.as_str()]);
        let mut command = Command::new(program);
        command
            .args(["-machine", "none", "-S", "-nodefaults", "-display", "none"])
            .args(drives)
            .args(more)
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        let process = Listening::start(&mut command, socket);
        let mut qemu = Self { process, monitor: monitor(socket).await };
        let known = qemu.order("query-commands", json!({})).await;
        if !known.to_string().contains("\"xen-set-replication\"") {
            eprintln!("SKIP: this qemu-system-x86_64 is built without replication");
            return None;
        }
        Some(qemu)
    }

    pub async fn order(&mut self, command: &str, arguments: Value) -> Value {
        let done = self.monitor.execute(command, &arguments).await;
        done.unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// A line for people; what it says is an error or nothing.
    pub async fn line(&mut self, line: &str) -> String {
        self.order("human-monitor-command", json!({"command-line": line})).await.as_str().unwrap_or_default().to_owned()
    }

    /// Serves drives on a socket, to look at them and to write as a guest would.
    pub async fn serve(&mut self, socket: &Path, drives: &[&str]) {
        self.order("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}})).await;
        for drive in drives {
            self.order("nbd-server-add", json!({"device": drive, "writable": true})).await;
        }
    }
}

/// A guest's disk, over QEMU's own NBD server.
pub struct Drive(pub Conversation);

impl Drive {
    pub async fn open(socket: &Path, name: &str) -> Self {
        Self(Conversation::open(Address::Unix(socket.to_owned()), name).await)
    }

    pub async fn write(&mut self, value: u8, offset: usize, len: usize) {
        self.0.writes(offset as u64, vec![value; len]).await.unwrap();
    }

    pub async fn whole(&mut self, size_bytes: usize) -> Vec<u8> {
        self.0.reads(0, size_bytes as u32).await.unwrap().to_vec()
    }
}

/// Where two disks differ first; for an assertion that says more than that they do.
pub fn difference(is: &[u8], wanted: &[u8]) -> Option<String> {
    let at = is.iter().zip(wanted).position(|(a, b)| a != b)?;
    Some(format!("byte {at} is {:#x}, not {:#x}", is[at], wanted[at]))
}
