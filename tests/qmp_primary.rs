//! A monitor of ours as the primary: its secondary is a stock QEMU, or another one of ours.
//!
//! ```text
//!  the guest ─ NBD ─▶ xl-colo qmp: quorum ─ local image
//!                              └─ replication(primary) ─ NBD ─▶ QEMU, or xl-colo qmp: replication(secondary) ─ image
//! ```
//!
//! The commands are those for a QEMU, by libxl's line and by `blockdev-add`; data is compared byte for byte.

use crate::common::conversation::Conversation;
use crate::common::qemu::{difference, monitor};
use crate::common::wire::Wire;
use crate::common::{Listening, PATIENCE, XL_COLO, installed, run, until};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::qmp::client::{Monitor, MonitorError};

const SIZE: usize = 8 << 20;
const STATUS: &str = "query-xen-replication-status";

struct Lab {
    dir: TempDir,
}

/// A monitor, ours or a QEMU's.
struct Side {
    process: Listening,
    monitor: Monitor,
}

impl Side {
    async fn does(&mut self, command: &str, arguments: Value) -> Value {
        let done = self.monitor.execute(command, &arguments).await;
        done.unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
    }

    async fn refuses(&mut self, command: &str, arguments: Value) -> String {
        match self.monitor.execute(command, &arguments).await {
            Err(MonitorError::Refused { source, .. }) => source.desc,
            other => panic!("{command} {arguments} should be refused: {other:?}"),
        }
    }

    async fn line(&mut self, line: &str) -> String {
        let said = self.does("human-monitor-command", json!({"command-line": line})).await;
        said.as_str().unwrap().trim().to_owned()
    }

    async fn serves(&mut self, socket: PathBuf, drives: &[&str]) {
        self.does("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}})).await;
        for drive in drives {
            self.does("nbd-server-add", json!({"device": drive, "writable": true})).await;
        }
    }

    async fn replicates(&mut self, enable: bool, primary: bool) {
        self.does("xen-set-replication", json!({"enable": enable, "primary": primary})).await;
    }

    async fn kill(&mut self) {
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for image in ["a0", "a1", "b0", "b1"] {
            std::fs::write(dir.path().join(image), vec![0x11; SIZE]).unwrap();
        }
        Self { dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn start(&self, name: &str, mut command: Command) -> Side {
        let socket = self.at(name);
        let process = Listening::start(&mut command, &socket);
        Side { process, monitor: monitor(&socket).await }
    }

    async fn ours(&self, name: &str, drives: &[String]) -> Side {
        let mut command = Command::new(XL_COLO);
        command.arg("qmp").arg("--socket").arg(self.at(name));
        drives.iter().for_each(|drive| _ = command.arg("--drive").arg(drive));
        self.start(name, command).await
    }

    /// A guest with as many disks.
    async fn primary(&self, disks: usize) -> Side {
        let quorum = |at: usize| {
            format!(
                "if=ide,index={at},media=disk,cache=writeback,driver=quorum,id=disk{at},children.0.file.filename={},\
                 children.0.driver=raw,read-pattern=fifo,vote-threshold=1",
                self.at(&format!("a{at}")).display()
            )
        };
        self.ours("a", &(0..disks).map(quorum).collect::<Vec<_>>()).await
    }

    /// A secondary's `-drive`s for its disk 0 … `disks`.
    async fn secondary_drives(&self, disks: usize) -> Vec<String> {
        let mut drives = Vec::new();
        for at in 0..disks {
            let [active, hidden] = ["active", "hidden"].map(|layer| self.at(&format!("{layer}{at}")));
            for overlay in [&active, &hidden] {
                let size = SIZE.to_string();
                let made = run("qemu-img", &["create", "-q", "-f", "qcow2", overlay.to_str().unwrap(), &size]).await;
                assert!(made.status.success(), "{made:?}");
            }
            drives.push(format!("if=none,id=image{at},format=raw,file={}", self.at(&format!("b{at}")).display()));
            drives.push(format!(
                "if=none,id=top{at},driver=replication,mode=secondary,top-id=top{at},file.driver=qcow2,\
                 file.file.filename={},file.backing.driver=qcow2,file.backing.file.filename={},\
                 file.backing.backing=image{at}",
                active.display(),
                hidden.display()
            ));
        }
        drives
    }

    /// The secondary, serving what the primary writes to and what its guest sees. None where there is no QEMU.
    async fn secondary(&self, stock: bool, disks: usize) -> Option<Side> {
        installed("qemu-img")?;
        let drives = self.secondary_drives(disks).await;
        let mut b = if stock {
            let mut command = Command::new(installed("qemu-system-x86_64")?);
            command.args(["-machine", "none", "-S", "-nodefaults", "-display", "none"]);
            drives.iter().for_each(|drive| _ = command.arg("-drive").arg(drive));
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", self.at("b").display()));
            self.start("b", command).await
        } else {
            self.ours("b", &drives).await
        };
        if !b.does("query-commands", json!({})).await.to_string().contains("\"xen-set-replication\"") {
            eprintln!("SKIP: this qemu-system-x86_64 is built without replication");
            return None;
        }
        let names: Vec<_> = (0..disks).flat_map(|at| [format!("image{at}"), format!("top{at}")]).collect();
        b.serves(self.at("nbd"), &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
        Some(b)
    }

    /// The node for a disk, and its client.
    fn node(&self, at: usize) -> Value {
        let server = json!({"type": "unix", "path": self.at("nbd")});
        let file =
            json!({"driver": "nbd", "node-name": format!("nbd{at}"), "server": server, "export": format!("image{at}")});
        json!({"driver": "replication", "mode": "primary", "node-name": format!("r{at}"), "file": file})
    }

    async fn attach(&self, a: &mut Side, at: usize) {
        a.does("blockdev-add", self.node(at)).await;
        a.does("x-blockdev-change", json!({"parent": format!("disk{at}"), "node": format!("r{at}")})).await;
    }

    async fn open(&self, socket: &str, export: &str) -> Conversation {
        Conversation::open(Address::Unix(self.at(socket)), export).await
    }
}

/// Checkpoints, in the order of libxl's primary and secondary; then the secondary is killed, or the primary.
async fn a_pair_with(stock: bool, lost: &str) {
    let lab = Lab::new();
    let Some(mut b) = lab.secondary(stock, 1).await else { return };
    let mut a = lab.primary(1).await;
    assert_eq!(a.does(STATUS, json!({})).await["error"], true, "nothing is replicated");
    let nothing = a.refuses("xen-set-replication", json!({"enable": true, "primary": true})).await;
    assert!(nothing.starts_with("there is nothing to replicate: "), "{nothing}");
    a.serves(lab.at("guest"), &["disk0"]).await;
    let mut guest = lab.open("guest", "disk0").await;
    let line = format!(
        "drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.path={},file.export=image0,\
         node-name=colo_node768",
        lab.at("nbd").display()
    );
    assert_eq!(a.line(&line).await, "");
    let alone = a.refuses("xen-set-replication", json!({"enable": true, "primary": true})).await;
    assert!(alone.starts_with("colo_node768 has nothing to replicate"), "{alone}");
    a.does("x-blockdev-change", json!({"parent": "disk0", "node": "colo_node768"})).await;
    let status = a.does(STATUS, json!({})).await;
    assert_eq!(status, json!({"error": true, "desc": "Block replication is not running"}));
    // Between the two: a QEMU would lose it.
    let mut expected = vec![0x11; SIZE];
    guest.writes(1 << 20, vec![0x77; 4096]).await.unwrap();
    expected[1 << 20..][..4096].fill(0x77);
    b.replicates(true, false).await;
    a.replicates(true, true).await;
    a.does("cont", json!({})).await;
    let mut copy = lab.open("nbd", "top0").await;
    for round in 0x21..0x25_u8 {
        let before = copy.reads(0, SIZE as u32).await.unwrap();
        let at = usize::from(round) << 16;
        guest.writes(at as u64 + 512, vec![round; 300 << 10]).await.unwrap();
        guest.writes(7 << 20, vec![0; 65536]).await.unwrap();
        copy.writes(6 << 20, vec![0xbb; 1024]).await.unwrap();
        a.does("stop", json!({})).await;
        assert_eq!(a.does(STATUS, json!({})).await, json!({"error": false}));
        let mut seen = before.to_vec();
        seen[6 << 20..][..1024].fill(0xbb);
        let now = copy.reads(0, SIZE as u32).await.unwrap();
        assert_eq!(difference(&now, &seen), None, "before checkpoint {round:#x}");
        // libxl's secondary seals before its primary is told.
        b.does("xen-colo-do-checkpoint", json!({})).await;
        a.does("xen-colo-do-checkpoint", json!({})).await;
        expected[at + 512..][..300 << 10].fill(round);
        expected[7 << 20..][..65536].fill(0);
        let now = copy.reads(0, SIZE as u32).await.unwrap();
        assert_eq!(difference(&now, &expected), None, "after checkpoint {round:#x}");
        assert_eq!(b.does(STATUS, json!({})).await, json!({"error": false}));
        a.does("cont", json!({})).await;
    }
    let all = a.does("query-replication", json!({})).await;
    let disk = &all["primary"][0];
    assert_eq!(
        (&disk["name"], &disk["stage"], &disk["node"]),
        (&json!("disk0"), &json!("running"), &json!("colo_node768"))
    );
    assert!(disk["mirror"]["forwarded_bytes"].as_u64() >= Some(4 * (300 << 10)), "{all}");
    if lost == "primary" {
        // Written, never checkpointed.
        guest.writes(0, vec![0xee; 4096]).await.unwrap();
        a.does(STATUS, json!({})).await;
        drop((guest, copy));
        a.kill().await;
        b.does("nbd-server-stop", json!({})).await;
        b.does("xen-set-replication", json!({"enable": false, "primary": false, "failover": true})).await;
        until("what was rolled back is merged", async || {
            difference(&std::fs::read(lab.at("b0")).unwrap(), &expected).map_or(Ok(()), Err)
        })
        .await;
        return;
    }
    drop(copy);
    b.kill().await;
    // The guest goes on, and the error is latched with the disk's name.
    guest.writes(0, vec![0x55; 4096]).await.unwrap();
    expected[..4096].fill(0x55);
    let status = a.does(STATUS, json!({})).await;
    let desc = status["desc"].as_str().unwrap_or_default();
    assert!(status["error"] == true && desc.starts_with("I/O error occurred (disk0, to export image0"), "{status}");
    let checkpoint = a.refuses("xen-colo-do-checkpoint", json!({})).await;
    assert!(checkpoint.contains("disk0"), "{checkpoint}");
    loop {
        let event = a.monitor.next_event(PATIENCE).await.unwrap().expect("an event of the failure");
        if event.data["stage"] == "failed" {
            assert_eq!(event.data["disk"], "disk0");
            break;
        }
    }
    assert_eq!(a.line("drive_del colo_node768").await, "Block device colo_node768 is in use");
    a.does("x-colo-lost-heartbeat", json!({})).await;
    a.does("x-blockdev-change", json!({"parent": "disk0", "child": "children.1"})).await;
    assert_eq!(a.line("drive_del colo_node768").await, "");
    assert_eq!(a.refuses("x-colo-lost-heartbeat", json!({})).await, "The feature 'colo' is not enabled");
    guest.writes(4096, vec![0x56; 512]).await.unwrap();
    expected[4096..4608].fill(0x56);
    assert_eq!(difference(&std::fs::read(lab.at("a0")).unwrap(), &expected), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn our_primary_outlives_its_stock_secondary() {
    a_pair_with(true, "secondary").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_secondary_goes_on_where_our_primary_was_killed() {
    a_pair_with(true, "primary").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_primary_and_our_secondary_are_a_pair() {
    a_pair_with(false, "secondary").await;
    a_pair_with(false, "primary").await;
}

/// Two disks, of which one cannot be started: neither is.
#[tokio::test(flavor = "multi_thread")]
async fn replication_that_cannot_start_whole_does_not_start() {
    let lab = Lab::new();
    let Some(mut b) = lab.secondary(true, 2).await else { return };
    let mut a = lab.primary(2).await;
    a.serves(lab.at("guest"), &["disk0", "disk1"]).await;
    for at in 0..2 {
        lab.attach(&mut a, at).await;
    }
    b.replicates(true, false).await;
    let yankable = a.does("query-yank", json!({})).await;
    let instance = |at: usize| json!({"type": "block-node", "node-name": format!("nbd{at}")});
    assert_eq!(yankable, json!([instance(0), instance(1)]));
    a.does("yank", json!({"instances": [instance(1)]})).await;
    let why = a.refuses("xen-set-replication", json!({"enable": true, "primary": true})).await;
    assert!(why.starts_with("disk1: the connection to export image1") && why.ends_with("yanked"), "{why}");
    let stages = async |a: &mut Side| {
        let all = a.does("query-replication", json!({})).await;
        [0, 1].map(|at| all["primary"][at]["stage"].as_str().unwrap().to_owned())
    };
    assert_eq!(stages(&mut a).await, ["none", "none"]);
    // What is written meanwhile on the one that could be is not lost to it.
    let mut guest = lab.open("guest", "disk0").await;
    guest.writes(65536, vec![0x44; 512]).await.unwrap();
    a.does("x-blockdev-change", json!({"parent": "disk1", "child": "children.1"})).await;
    a.does("blockdev-del", json!({"node-name": "r1"})).await;
    lab.attach(&mut a, 1).await;
    a.replicates(true, true).await;
    assert_eq!(stages(&mut a).await, ["running", "running"]);
    a.does("xen-colo-do-checkpoint", json!({})).await;
    b.does("xen-colo-do-checkpoint", json!({})).await;
    let mut expected = vec![0x11; SIZE];
    expected[65536..][..512].fill(0x44);
    let seen = lab.open("nbd", "top0").await.reads(0, SIZE as u32).await.unwrap();
    assert_eq!(difference(&seen, &expected), None);
    // Of two disks one fails: it is named, and it alone.
    a.does("yank", json!({"instances": [instance(0)]})).await;
    until("the error shows", async || {
        let status = a.does(STATUS, json!({})).await;
        let desc = status["desc"].as_str().unwrap_or_default();
        if desc.contains("disk0, to export image0") && !desc.contains("disk1") { Ok(()) } else { Err(status) }
    })
    .await;
}

/// The way to the secondary is silent: who must know that the writes are there waits for them, and who yanks does not wait
/// for anybody.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_its_way_is_waited_for_and_a_yank_waits_for_nobody() {
    let lab = Lab::new();
    let Some(mut b) = lab.secondary(false, 1).await else { return };
    let mut a = lab.primary(1).await;
    let wire = Wire::new(&Address::Unix(lab.at("wire")), Address::Unix(lab.at("nbd"))).await;
    a.serves(lab.at("guest"), &["disk0"]).await;
    let mut guest = lab.open("guest", "disk0").await;
    let server = json!({"type": "unix", "path": lab.at("wire")});
    let node = |name: &str| {
        let file = json!({"driver": "nbd", "node-name": format!("nbd-{name}"), "server": server, "export": "image0"});
        json!({"driver": "replication", "mode": "primary", "node-name": name, "file": file})
    };
    a.does("blockdev-add", node("r0")).await;
    a.does("x-blockdev-change", json!({"parent": "disk0", "node": "r0"})).await;
    b.replicates(true, false).await;
    a.replicates(true, true).await;
    a.does("cont", json!({})).await;
    let mut healer = monitor(&lab.at("a")).await;
    for ask in [STATUS, "xen-colo-do-checkpoint", "stop"] {
        wire.silence();
        guest.writes(1 << 20, vec![0x77; 256 << 10]).await.unwrap();
        let asked = a.does(ask, json!({}));
        tokio::pin!(asked);
        let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut asked).await;
        assert!(early.is_err(), "{ask} was answered {early:?} while the writes were on their way");
        wire.heal();
        let said = asked.await;
        assert!(said == json!({}) || said == json!({"error": false}), "{ask}: {said}");
    }
    // For as long as libxl waits, and not longer; then it is said what is not there.
    wire.silence();
    guest.writes(2 << 20, vec![0x78; 256 << 10]).await.unwrap();
    let late = a.does(STATUS, json!({})).await;
    assert!(late["desc"].as_str().unwrap_or_default().contains("are not at the secondary after"), "{late}");
    wire.heal();
    until("it is there", async || {
        let status = a.does(STATUS, json!({})).await;
        if status == json!({"error": false}) { Ok(()) } else { Err(status) }
    })
    .await;
    // An order that waits for a server that says nothing holds everything but a yank.
    wire.silence();
    let yank = async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        let instance = json!({"type": "block-node", "node-name": "nbd-r0"});
        healer.execute("yank", &json!({"instances": [instance]})).await.unwrap();
    };
    let why = {
        let add = a.refuses("blockdev-add", node("r1"));
        tokio::pin!(add);
        tokio::select! {
            biased;
            why = &mut add => panic!("what waits was answered before the yank: {why}"),
            () = yank => {}
        }
        let still = tokio::time::timeout(std::time::Duration::from_millis(500), &mut add).await;
        assert!(still.is_err(), "the yank has waited for it: {still:?}");
        add.await
    };
    assert!(why.ends_with("it does not answer"), "{why}");
    let status = a.does(STATUS, json!({})).await;
    assert!(status["desc"].as_str().unwrap_or_default().contains("disk0, to export image0"), "{status}");
}

/// Wrong words, each with what is wrong.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_replicated_is_refused_where_it_is_said() {
    let lab = Lab::new();
    let mut a = lab.primary(1).await;
    std::fs::write(lab.at("small"), vec![0; 4096]).unwrap();
    let small = format!("if=none,id=image0,format=raw,file={}", lab.at("small").display());
    let mut b = lab.ours("b", &[small]).await;
    b.serves(lab.at("nbd"), &["image0"]).await;
    a.does("blockdev-add", lab.node(0)).await;
    let attach = json!({"parent": "disk0", "node": "r0"});
    let why = a.refuses("x-blockdev-change", attach).await;
    assert!(why.starts_with("the sizes differ: disk0 has 8388608 bytes, export image0"), "{why}");
    let server = json!({"type": "unix", "path": lab.at("nbd")});
    let client =
        |name: &str, export: &str| json!({"driver": "nbd", "node-name": name, "server": server, "export": export});
    assert!(a.refuses("blockdev-add", client("n", "zork")).await.contains("zork"));
    a.does("blockdev-add", client("n", "image0")).await;
    let bare = a.refuses("x-blockdev-change", json!({"parent": "disk0", "node": "n"})).await;
    assert!(bare.contains("driver=replication,mode=primary"), "{bare}");
    b.does("nbd-server-remove", json!({"name": "image0", "mode": "hard"})).await;
    b.does("nbd-server-add", json!({"device": "image0"})).await;
    let read_only = a.refuses("blockdev-add", client("m", "image0")).await;
    assert!(read_only.contains("read-only"), "{read_only}");
    assert_eq!(a.does("query-xen-replication-status", json!({})).await["error"], true);
}
