//! A world: switch, edge and arbiter in this process, two hosts as children, a wire wherever it may be cut.
//!
//! ```text
//!   load ── edge ── switch ── port a ── host a ══ wire ══ host b ── port b ── switch
//!                                         │                 │
//!                                    arbiter wire a    arbiter wire b
//!                                         └──── arbiter ────┘
//! ```

use super::host::{Host, host_command, protect};
use super::load::Load;
use super::wire::Wire;
use super::{turn, until};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::SemaphorePermit;
use tokio::task::JoinHandle;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::arbiter::{self, OnGrant};
use xen_colo::daemon::control::Request;
use xen_colo::daemon::edge::{Edge, EdgeHandle};
use xen_colo::daemon::status::Protection;
use xen_colo::daemon::switch::{PortStats, Switch};
use xen_colo::demo::{GUEST_IP, client};

/// How a world is made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Whether the switch refuses the port of who lost, as the demo's does.
    pub fence: bool,
    /// The policies of host a and host b.
    pub policies: [String; 2],
    /// The guest's memory.
    pub guest_mib: u64,
    /// How many disks it has.
    pub disks: usize,
    /// How often, in percent, its copies answer differently.
    pub diverge: u8,
    /// Whether the hosts tell Prometheus how they are.
    pub metrics: bool,
    /// Whether the wire begins in a Unix socket, which takes little of what its other end does not read.
    pub narrow_wire: bool,
}

impl Default for Plan {
    fn default() -> Self {
        let policies = ["arbiter".into(), "arbiter".into()];
        Self { fence: true, policies, guest_mib: 16, disks: 1, diverge: 0, metrics: false, narrow_wire: false }
    }
}

impl Plan {
    /// Two hosts with these policies.
    pub fn with_policies(a: impl Into<String>, b: impl Into<String>) -> Self {
        Self { policies: [a.into(), b.into()], ..Self::default() }
    }

    fn start(&self, name: &str, dir: &Path, arbiter: &Wire, with_guest: bool) -> Host {
        let mut command = host_command(name, dir);
        command.arg("--net").arg(format!("unix:{}", dir.join(format!("net-{name}.sock")).display()));
        let policy = &self.policies[usize::from(name == "b")];
        command.args(["--policy", policy]);
        if policy != "alone" {
            command.args(["--arbiter", &arbiter.address.to_string()]);
        }
        if self.metrics {
            command.args(["--metrics-listen", "0"]);
        }
        for disk in 1..self.disks {
            command.arg("--disk").arg(dir.join(format!("disk{disk}-{name}.img")));
        }
        if with_guest {
            command.args(["--guest", "web", "--guest-mib", &self.guest_mib.to_string(), "--disk-mib", "64"]);
            command.args(["--diverge", &self.diverge.to_string()]);
        }
        Host::start(name, dir, command)
    }
}

/// Two hosts, the guest `web` on host a, and everything between them. Fields drop in order: the hosts first.
pub struct World {
    /// Where the guest starts.
    pub a: Host,
    /// Where it goes.
    pub b: Host,
    /// Between the hosts; a's peer address.
    pub wire: Wire,
    /// Host a's way to the arbiter.
    pub arbiter_a: Wire,
    /// Host b's way to the arbiter.
    pub arbiter_b: Wire,
    /// The network.
    pub switch: Arc<Switch>,
    plan: Plan,
    edge: EdgeHandle,
    server: JoinHandle<()>,
    dir: TempDir,
    _turn: SemaphorePermit<'static>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl World {
    /// Starts it; the guest answers, unprotected.
    pub async fn start(plan: Plan) -> Self {
        let turn = turn().await;
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let switch = Arc::new(Switch::new());
        for name in ["a", "b"] {
            switch.add_unix_port(name, &path(&format!("net-{name}.sock"))).unwrap();
        }
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let edge = Edge::start(listener, GUEST_IP, 80, switch.add_local_port("edge").unwrap()).unwrap();

        let arbiter_address = Address::Unix(path("arbiter.sock"));
        let listener = arbiter_address.listen().await.unwrap();
        let on_grant: OnGrant = if plan.fence { fence_loser(&switch) } else { Arc::new(|_| {}) };
        let server = tokio::spawn(arbiter::serve(listener, path("register.json"), on_grant));
        let arbiter_a = Wire::new(&Address::Unix(path("arbiter-a.sock")), arbiter_address.clone()).await;
        let arbiter_b = Wire::new(&Address::Unix(path("arbiter-b.sock")), arbiter_address.clone()).await;

        let a = plan.start("a", dir.path(), &arbiter_a, true);
        let b = plan.start("b", dir.path(), &arbiter_b, false);
        let near = if plan.narrow_wire { Address::Unix(path("wire.sock")) } else { "127.0.0.1:0".parse().unwrap() };
        let wire = Wire::new(&near, b.address.clone()).await;
        let world = Self { a, b, wire, arbiter_a, arbiter_b, switch, plan, edge, server, dir, _turn: turn };
        world.answers().await;
        world
    }

    /// Starts host a again, or host b, which was killed as the primary: as one that has the guest, on the images it had.
    pub fn repair(&mut self, name: &str) {
        let arbiter = if name == "a" { &self.arbiter_a } else { &self.arbiter_b };
        *self.host(name) = self.plan.start(name, self.dir.path(), arbiter, true);
    }

    /// Host a, or host b.
    pub fn host(&mut self, name: &str) -> &mut Host {
        if name == "a" { &mut self.a } else { &mut self.b }
    }

    /// A file of this world.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.edge.local_addr
    }

    /// Begins to work on the guest.
    pub fn load(&self) -> Load {
        Load::start(self.address())
    }

    /// Waits until the guest answers a new client.
    pub async fn answers(&self) {
        client::wait_for_answer(self.address(), super::PATIENCE).await.unwrap();
    }

    /// Protects the guest of host a with host b, across the wire, and waits until it is protected.
    pub async fn protect(&self, mode: Mode) {
        self.a.order(Request::Protect(protect(&self.wire.address, mode))).await;
        self.a.becomes(Protection::Protected).await;
        self.b.becomes(Protection::StandingBy).await;
    }

    /// A port of the switch.
    pub fn port(&self, name: &str) -> PortStats {
        self.switch.stats().into_iter().find(|port| port.name == name).unwrap()
    }

    /// The port's counters when nothing that was on its way to it is left.
    pub async fn settled_port(&self, name: &str) -> PortStats {
        let mut before = self.port(name);
        until("the port falls silent", async || {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            let now = self.port(name);
            let seen = std::mem::replace(&mut before, now.clone());
            if seen.received_frames == now.received_frames { Ok(now) } else { Err(now) }
        })
        .await
    }

    /// Waits until one host has taken over and the other is stopped and says who has the guest. True when it is a.
    pub async fn one_survives(&self) -> bool {
        let (winner, loser) = until("one host goes on", async || {
            let (a, b) = (self.a.status().await, self.b.status().await);
            match (a.protection, b.protection) {
                (Protection::TakenOver, Protection::Stopped) => Ok((a, b)),
                (Protection::Stopped, Protection::TakenOver) => Ok((b, a)),
                _ => Err((a, b)),
            }
        })
        .await;
        assert_eq!(winner.generation, 2);
        let why = loser.why.clone().unwrap_or_default();
        assert!(why.contains(&format!("host {} holds generation 2", winner.host)), "{loser:#?}");
        winner.host == "a"
    }
}

/// Who wins a generation after the first has the guest's MAC to itself.
fn fence_loser(switch: &Arc<Switch>) -> OnGrant {
    let switch = Arc::downgrade(switch);
    Arc::new(move |claim| {
        let (Some(switch), true) = (switch.upgrade(), claim.expected > 0) else { return };
        switch.fence(if claim.holder == "a" { "b" } else { "a" }).unwrap();
    })
}
