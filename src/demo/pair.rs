//! The demo's world: two hosts as child processes, and the switch, the edge and the arbiter between them.

use super::page::is_log;
use super::{GUEST_IP, World, client};
use crate::colo::hello::{Mode, ResumeOrder};
use crate::daemon::address::Address;
use crate::daemon::arbiter::{self, OnGrant};
use crate::daemon::control::{self, Protect, Request};
use crate::daemon::edge::{Edge, EdgeHandle};
use crate::daemon::status::Status;
use crate::daemon::switch::Switch;
use crate::say;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

/// How long a host may take to open its sockets: with a large guest, its memory is zeroed first.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// The guest's HTTP port.
const GUEST_PORT: u16 = 80;

/// What the pair is made with.
#[derive(Clone, Debug)]
pub(super) struct PairConfig {
    /// The guest's memory.
    pub(super) guest_mib: u64,
    /// How often its two copies answer differently.
    pub(super) diverge_percent: u8,
    /// Where clients connect; a free port of the loopback address when absent.
    pub(super) serve: Option<SocketAddr>,
}

/// Why the demo cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum PairError {
    /// This machine does not give what is needed.
    #[error("{0}")]
    Environment(String),
    /// Something of ours failed.
    #[error("{0}")]
    Failed(String),
}

struct Host {
    name: &'static str,
    child: Child,
    pid: u32,
    address: String,
}

/// Two hosts and their world.
pub(super) struct Pair {
    dir: PathBuf,
    hosts: Vec<Host>,
    switch: Arc<Switch>,
    edge: EdgeHandle,
    arbiter: JoinHandle<()>,
}

impl Pair {
    /// Starts everything; the guest runs on host a, unprotected.
    pub(super) async fn start(config: &PairConfig) -> Result<Self, PairError> {
        let environment =
            |what: &str, error: &dyn std::fmt::Display| PairError::Environment(format!("{what}: {error}"));
        let listen = config.serve.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
        let listener = TcpListener::bind(listen).await.map_err(|e| environment(&format!("listen on {listen}"), &e))?;
        let dir = std::env::temp_dir().join(format!("xl-colo-demo-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::DirBuilder::new().mode(0o700).create(&dir).map_err(|e| environment(&dir.display().to_string(), &e))?;

        let switch = Arc::new(Switch::new());
        for name in ["a", "b"] {
            let path = dir.join(format!("net-{name}.sock"));
            switch.add_unix_port(name, &path).map_err(|e| environment("switch", &e))?;
        }
        let port = switch.add_local_port("edge").map_err(|e| environment("switch", &e))?;
        let edge = Edge::start(listener, GUEST_IP, GUEST_PORT, port).map_err(|e| environment("edge", &e))?;
        let arbiter_address = Address::Unix(dir.join("arbiter.sock"));
        let arbiter_listener = arbiter_address.listen().await.map_err(|e| environment("arbiter", &e))?;
        let arbiter = tokio::spawn(arbiter::serve(arbiter_listener, dir.join("register.json"), fence_loser(&switch)));

        let mut pair = Self { dir, hosts: Vec::new(), switch, edge, arbiter };
        for name in ["a", "b"] {
            let host = pair.spawn(name, config, &arbiter_address).await;
            match host {
                Ok(host) => pair.hosts.push(host),
                Err(error) => {
                    pair.end().await;
                    return Err(error);
                }
            }
        }
        pair.edge_answers().await?;
        Ok(pair)
    }

    async fn spawn(&self, name: &'static str, config: &PairConfig, arbiter: &Address) -> Result<Host, PairError> {
        let failed = |what: &dyn std::fmt::Display| PairError::Environment(format!("host {name}: {what}"));
        let program = std::env::current_exe().map_err(|e| failed(&e))?;
        let mut command = Command::new(program);
        command
            .args(["host", "--follow-stdin", "--name", name, "--listen", "127.0.0.1:0"])
            .args(["--arbiter", &arbiter.to_string()])
            .arg("--run-dir")
            .arg(&self.dir)
            .arg("--disk")
            .arg(self.dir.join(format!("disk-{name}.img")))
            .arg("--net")
            .arg(format!("unix:{}", self.dir.join(format!("net-{name}.sock")).display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if name == "a" {
            let (mib, percent) = (config.guest_mib.to_string(), config.diverge_percent.to_string());
            command.args(["--guest", "demo", "--guest-mib", &mib, "--diverge", &percent]);
        }
        let mut child = command.spawn().map_err(|e| failed(&e))?;
        let pid = child.id().unwrap_or_default();
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(failed(&"no pipes"));
        };
        let mut stdout = BufReader::new(stdout).lines();
        let mut stderr = BufReader::new(stderr).lines();
        match tokio::time::timeout(START_DEADLINE, stdout.next_line()).await {
            Ok(Ok(Some(line))) => {
                let address = line.rsplit(' ').next().unwrap_or_default().to_owned();
                let verbose = std::env::var_os("XEN_COLO_LOG").is_some();
                // Kept open and read to the end: a host must never wait for somebody to read its log.
                tokio::spawn(async move {
                    let _stdout = stdout;
                    while let Ok(Some(line)) = stderr.next_line().await {
                        if verbose {
                            say::err(&format!("[{name}] {line}"));
                        }
                    }
                });
                Ok(Host { name, child, pid, address })
            }
            Ok(_) => {
                let why = stderr.next_line().await.ok().flatten().unwrap_or_else(|| "it ended at once".into());
                Err(failed(&why.trim_start_matches("xl-colo: ")))
            }
            Err(_) => Err(failed(&format!("it did not start within {START_DEADLINE:?}"))),
        }
    }

    /// Waits until the guest answers through the edge, so that the load does not begin with refusals.
    async fn edge_answers(&self) -> Result<(), PairError> {
        let answered = client::wait_for_answer(self.address(), START_DEADLINE).await;
        answered.map_err(|why| PairError::Failed(format!("the guest does not answer: {why}")))
    }

    async fn ask(&self, name: &str, request: &Request) -> Result<serde_json::Value, PairError> {
        let socket = control::socket_path(&self.dir, name);
        control::ask(&socket, request).await.map_err(|e| PairError::Failed(format!("host {name}: {e}")))
    }
}

impl World for Pair {
    fn address(&self) -> SocketAddr {
        self.edge.local_addr
    }

    fn pid(&self, name: &str) -> u32 {
        self.hosts.iter().find(|host| host.name == name).map_or(0, |host| host.pid)
    }

    fn fenced_frames(&self) -> u64 {
        self.switch.stats().iter().map(|port| port.fenced_frames).sum()
    }

    async fn status(&self, name: &str) -> Result<Status, PairError> {
        let status = self.ask(name, &Request::Status).await?;
        serde_json::from_value(status).map_err(|e| PairError::Failed(format!("host {name}: {e}")))
    }

    async fn protect(&self, mode: Mode) -> Result<(), PairError> {
        let peer = self.hosts.iter().find(|host| host.name == "b").map(|host| host.address.clone()).unwrap_or_default();
        let protect = Protect {
            peer,
            mode,
            resume: ResumeOrder::default(),
            checkpoint_delay_ms: None,
            heartbeat_interval_ms: None,
            heartbeat_misses: None,
            delta_mib: None,
            release_at_once: false,
            packet_digests: false,
            min_run_percent: None,
        };
        self.ask("a", &Request::Protect(protect)).await.map(drop)
    }

    async fn kill(&mut self, name: &str) -> Result<(), PairError> {
        let Some(host) = self.hosts.iter_mut().find(|host| host.name == name) else { return Ok(()) };
        host.child.kill().await.map_err(|e| PairError::Failed(format!("kill host {name}: {e}")))
    }

    fn noticed_at_us(&self, survivor: &Status) -> Option<u64> {
        survivor.lost_at_unix_us
    }

    async fn keep_events(&self, dir: &Path) -> Result<(), PairError> {
        let failed = |path: &Path, error: io::Error| PairError::Failed(format!("{}: {error}", path.display()));
        for entry in std::fs::read_dir(&self.dir).map_err(|error| failed(&self.dir, error))?.flatten() {
            if is_log(&entry.file_name().to_string_lossy()) {
                let to = dir.join(entry.file_name());
                std::fs::copy(entry.path(), &to).map_err(|error| failed(&to, error))?;
            }
        }
        Ok(())
    }

    async fn failed(&self) {}

    async fn end(&mut self) {
        for host in &mut self.hosts {
            let _ = host.child.kill().await;
        }
        self.arbiter.abort();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The fence at the network: who wins a generation after the first has the guest's MAC to itself.
pub(super) fn fence_loser(switch: &Arc<Switch>) -> OnGrant {
    let switch = Arc::downgrade(switch);
    Arc::new(move |claim| {
        let (Some(switch), true) = (switch.upgrade(), claim.expected > 0) else { return };
        let loser = if claim.holder == "a" { "b" } else { "a" };
        if let Err(error) = switch.fence(loser) {
            tracing::error!(%error, "the loser's port cannot be fenced");
        }
    })
}
