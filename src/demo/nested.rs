//! The demo's world with real Xen: two nested hosts, and everything that is not a host still here.
//!
//! ```text
//!  this process:  client ─ TCP ─▶ edge ─▶ switch ◀── QEMU's NIC ── host a: Xen, dom0 with xl-colo, the guest
//!                                 arbiter         ◀── QEMU's NIC ── host b: Xen, dom0 with xl-colo, its copy
//! ```
//!
//! The hosts are booted, commanded and killed by `scripts/nested/nested`. The trap is their clock, which is not ours:
//! what happened when is told by the arbiter, which sits here and is asked the moment a host misses its peer.

use super::pair::{PairError, fence_loser};
use super::{GUEST_IP, World, client};
use crate::cli::{DemoArgs, NestedGuest};
use crate::colo::hello::Mode;
use crate::daemon::address::Address;
use crate::daemon::arbiter;
use crate::daemon::edge::{Edge, EdgeHandle};
use crate::daemon::status::Status;
use crate::daemon::switch::Switch;
use crate::daemon::unix_us;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::task::JoinHandle;

/// How long a guest may take to boot: an emulated HVM guest on a busy machine takes minutes.
const BOOT_DEADLINE: Duration = Duration::from_secs(420);
/// What dom0 of each host calls this machine.
const HERE: &str = "10.0.2.2";
/// Where host b waits for its peer, on the link between the hosts.
const PEER: &str = "10.78.0.2:9740";
/// Beats: an emulated host on a busy machine stands still for a second now and then.
const HEARTBEAT: &str = "--heartbeat-ms 250 --heartbeat-misses 12";
/// What of a host outlives its power cut: the share of both, which is here.
const EVENTS: &str = "/lab";
/// How often a host is asked for its status before it is believed to be gone.
const ATTEMPTS: u32 = 3;
/// The size of the guest's disk.
const DISK_MIB: u64 = 32;

/// Two Xen hosts and their world.
pub(super) struct Nested {
    script: PathBuf,
    dir: PathBuf,
    guest: NestedGuest,
    switch: Arc<Switch>,
    edge: EdgeHandle,
    arbiter: JoinHandle<()>,
    granted_at_us: Arc<AtomicU64>,
    /// The primary's pid, and the secondary's: of the machines they run in.
    pids: [u32; 2],
}

impl Nested {
    /// Boots the hosts and the guest, which then runs on host a, unprotected.
    pub(super) async fn start(script: PathBuf, args: &DemoArgs) -> Result<Self, PairError> {
        let environment =
            |what: &str, error: &dyn std::fmt::Display| PairError::Environment(format!("{what}: {error}"));
        let dir = std::env::temp_dir().join(format!("xl-colo-nested-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).map_err(|e| environment(&dir.display().to_string(), &e))?;
        let switch = Arc::new(Switch::new());
        for name in ["a", "b"] {
            switch.add_unix_port(name, &dir.join(format!("net-{name}.sock"))).map_err(|e| environment("switch", &e))?;
        }
        let port = switch.add_local_port("edge").map_err(|e| environment("switch", &e))?;
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|e| environment("listen", &e))?;
        let edge = Edge::start(listener, GUEST_IP, 80, port).map_err(|e| environment("edge", &e))?;
        let address = Address::Tcp("127.0.0.1:0".into());
        let listener = address.listen().await.map_err(|e| environment("arbiter", &e))?;
        let at = listener.local_address().map_err(|e| environment("arbiter", &e))?.to_string();
        let arbiter_port = at.rsplit(':').next().unwrap_or_default().to_owned();
        let granted_at_us = Arc::new(AtomicU64::new(0));
        let (granted, fence) = (granted_at_us.clone(), fence_loser(&switch));
        let on_grant: arbiter::OnGrant = Arc::new(move |claim| {
            granted.store(unix_us(), Ordering::SeqCst);
            fence(claim);
        });
        let arbiter = tokio::spawn(arbiter::serve(listener, dir.join("register.json"), on_grant));
        let guest = args.guest;
        let mut nested = Self { script, dir, guest, switch, edge, arbiter, granted_at_us, pids: [0; 2] };
        if let Err(error) = nested.boot(&arbiter_port).await {
            nested.collect().await;
            nested.end().await;
            return Err(error);
        }
        Ok(nested)
    }

    async fn boot(&mut self, arbiter_port: &str) -> Result<(), PairError> {
        super::say("booting two Xen hosts");
        // Hosts that something else left up are plugged into another network.
        self.script(&["down"]).await?;
        self.script(&["up", "a", "b"]).await?;
        let status = self.script(&["status"]).await?;
        let pids = status.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok());
        for (slot, pid) in self.pids.iter_mut().zip(pids) {
            *slot = pid;
        }
        let host = |name: &str, rest: &str| {
            format!(
                "mkdir -p /var/lib/xen-colo; XEN_COLO_LOG=info setsid xl-colo host --name {name} --disk \
                 /var/lib/xen-colo/{name}.img --arbiter {HERE}:{arbiter_port} --event-log {EVENTS}/{name}/{name}.events {rest} \
                 </dev/null >/var/log/xl-colo.out 2>/var/log/xl-colo.log & for i in $(seq 1200); do grep -q listens \
                 /var/log/xl-colo.out && exit 0; kill -0 $! 2>/dev/null || break; sleep 0.1; done; \
                 cat /var/log/xl-colo.log; exit 1"
            )
        };
        self.run("b", &host("b", &format!("--listen {PEER}"))).await?;
        let name = self.guest.name();
        super::say(format_args!("booting a {name} guest on host a"));
        // Its check of the processor's registers takes all the processor it gets, and on one that dom0 shares with it an answer
        // of the arbiter waits for that: other tests look at registers.
        let quiet = format!("sed 's/guest.port=80/& guest.registers=0/' /lab/guests/{name}.cfg >/run/{name}.cfg");
        self.run("a", &quiet).await?;
        let guest = format!("--listen 10.78.0.1:9740 --guest {name} --xen /run/{name}.cfg --disk-mib {DISK_MIB}");
        self.run("a", &host("a", &guest)).await?;
        let answered = client::wait_for_answer(self.edge.local_addr, BOOT_DEADLINE).await;
        answered.map_err(|why| PairError::Failed(format!("the guest does not answer: {why}")))
    }

    /// Runs the script that owns the hosts, and returns what it said.
    async fn script(&self, words: &[&str]) -> Result<String, PairError> {
        let mut command = Command::new(&self.script);
        command.args(words).env("LAN_DIR", &self.dir).env("RUN_SECONDS", "240").stdin(Stdio::null()).kill_on_drop(true);
        let failed = |why: String| PairError::Failed(format!("{} {}: {why}", self.script.display(), words[0]));
        let output = command.output().await.map_err(|e| failed(e.to_string()))?;
        let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        match output.status.code() {
            // Whoever has nothing to say on standard output may have said where to look.
            Some(0) if said.is_empty() => Ok(complained.into_owned()),
            Some(0) => Ok(said.into_owned()),
            // The harness's word for a machine that cannot run it.
            Some(77) => Err(PairError::Environment(complained.trim().to_owned())),
            _ => Err(failed(format!("{} {}", said.trim(), complained.trim()))),
        }
    }

    async fn run(&self, name: &str, command: &str) -> Result<String, PairError> {
        self.script(&["run", name, command]).await
    }

    async fn collect(&self) {
        match self.script(&["logs"]).await {
            Ok(said) => super::say(said.trim()),
            Err(error) => super::say(error),
        }
    }
}

impl World for Nested {
    const LOOK_INTERVAL: Duration = Duration::from_secs(2);
    const QUIET: Duration = Duration::from_secs(6);

    fn address(&self) -> SocketAddr {
        self.edge.local_addr
    }

    fn pid(&self, name: &str) -> u32 {
        self.pids[usize::from(name != "a")]
    }

    fn fenced_frames(&self) -> u64 {
        self.switch.stats().iter().map(|port| port.fenced_frames).sum()
    }

    async fn status(&self, name: &str) -> Result<Status, PairError> {
        // An emulated host that is busy may not answer the harness in time; the next attempt may find it better.
        let mut said = self.run(name, "xl-colo status --json").await;
        for _ in 1..ATTEMPTS {
            if said.is_err() {
                said = self.run(name, "xl-colo status --json").await;
            }
        }
        let said = said?;
        serde_json::from_str(&said).map_err(|e| PairError::Failed(format!("host {name}: {e}: {said}")))
    }

    async fn protect(&self, mode: Mode) -> Result<(), PairError> {
        let delay = match mode {
            Mode::Colo => "",
            Mode::Remus => "--checkpoint-delay-ms 1000",
        };
        self.run("a", &format!("xl-colo protect {PEER} --mode {mode} {HEARTBEAT} {delay}")).await.map(drop)
    }

    async fn kill(&mut self, name: &str) -> Result<(), PairError> {
        // The generation of the protection itself is not the takeover's.
        self.granted_at_us.store(0, Ordering::SeqCst);
        self.script(&["kill", name]).await.map(drop)
    }

    fn noticed_at_us(&self, _: &Status) -> Option<u64> {
        Some(self.granted_at_us.load(Ordering::SeqCst)).filter(|at| *at != 0)
    }

    async fn keep_events(&self, dir: &Path) -> Result<(), PairError> {
        self.script(&["events", &dir.display().to_string()]).await.map(drop)
    }

    async fn failed(&self) {
        self.collect().await;
    }

    async fn end(&mut self) {
        self.arbiter.abort();
        if let Err(error) = self.script(&["down"]).await {
            super::say(error);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
