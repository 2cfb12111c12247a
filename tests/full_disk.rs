//! A full disk: under the secondary the primary's guest goes on, the status says why, nothing hangs; under a register, an event
//! log or a page, what was there stays whole.
//!
//! The disk is a small tmpfs, which only root can mount; elsewhere the tests say that they are skipped.

use crate::common::conversation::Conversation;
use crate::common::host::{Host, host_command, protect};
use crate::common::qemu::monitor;
use crate::common::{Listening, XL_COLO, installed, one_line, run, turn, until, xl_colo};
use serde_json::json;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tokio::net::TcpListener;
use xen_colo::colo::arbiter::{Claim, Verdict};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::arbiter::Arbiter;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::edge::{Edge, EdgeHandle};
use xen_colo::daemon::events::Event;
use xen_colo::daemon::qmp::host;
use xen_colo::daemon::status::Protection;
use xen_colo::daemon::switch::Switch;
use xen_colo::demo::GUEST_IP;
use xen_colo::disk::{Disk, DiskError, FileDisk};
use xen_colo::replica::epochs::{Replica, ReplicaConfig};

/// A small disk of its own, unmounted when dropped.
struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    /// None, with a loud note, where it may not be mounted.
    fn mount(mib: u32) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "xen-colo-test"])
            .arg(dir.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self { dir }),
            other => {
                eprintln!("SKIP: a tmpfs cannot be mounted: {other:?}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: on a failed test a host may still have a file open.
        let _ = std::process::Command::new("umount").arg("-l").arg(self.dir.path()).output();
    }
}

/// A pair whose secondary keeps its image on a disk of `mib`, and clients' way to the guest.
struct Pair {
    a: Host,
    b: Host,
    edge: EdgeHandle,
    _switch: Switch,
    dir: TempDir,
}

async fn pair(image: PathBuf) -> Pair {
    pair_with(image, &[]).await
}

/// The same, with more to say to the secondary.
async fn pair_with(image: PathBuf, more: &[&str]) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let net = dir.path().join("net.sock");
    let switch = Switch::new();
    switch.add_unix_port("a", &net).unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let edge = Edge::start(listener, GUEST_IP, 80, switch.add_local_port("edge").unwrap()).unwrap();
    let arbiter = format!("file:{}", dir.path().join("register.json").display());
    let mut command = host_command("a", dir.path());
    command.args(["--arbiter", &arbiter, "--net", &Address::Unix(net).to_string()]);
    command.args(["--guest", "web", "--guest-mib", "16", "--disk-mib", "64"]);
    let a = Host::start("a", dir.path(), command);
    let mut command = std::process::Command::new(crate::common::XL_COLO);
    command.args(["host", "--follow-stdin", "--name", "b", "--listen", "127.0.0.1:0", "--arbiter", &arbiter]);
    command.arg("--run-dir").arg(dir.path()).arg("--disk").arg(image).args(more);
    let b = Host::start("b", dir.path(), command);
    Pair { a, b, edge, _switch: switch, dir }
}

/// The first copy does not fit: the guest stays unprotected, and runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_copy_that_does_not_fit_leaves_the_guest_running() {
    let Some(small) = SmallDisk::mount(2) else { return };
    let _turn = turn().await;
    let pair = pair(small.path().join("replica.img")).await;
    let writer = Writer::start(pair.edge.local_addr);
    writer.wrote(6 << 20).await;
    pair.a.order(Request::Protect(protect(&pair.b.address, Mode::Colo))).await;
    let status =
        pair.a.is("unprotected again", |status| status.why.is_some() && status.lost_at_unix_us.is_some()).await;
    assert_eq!(status.protection, Protection::Unprotected, "{status:#?}");
    assert!(status.why.clone().unwrap_or_default().contains("disk write to the secondary"), "{status:#?}");
    let replica = pair.b.is("free", |status| status.protection == Protection::Stopped).await;
    assert!(replica.disk.errors.iter().any(|error| error.contains("no space left")), "{replica:#?}");
    writer.goes_on().await;
}

/// The disk fills up later, while checkpoints are applied to it: the guest goes on, first protected out of the
/// secondary's memory, then alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_fills_its_disk_says_so_and_the_guest_goes_on() {
    let Some(small) = SmallDisk::mount(6) else { return };
    let _turn = turn().await;
    let pair = pair(small.path().join("replica.img")).await;
    pair.a.order(Request::Protect(protect(&pair.b.address, Mode::Remus))).await;
    pair.a.becomes(Protection::Protected).await;
    let writer = Writer::start(pair.edge.local_addr);
    let told = |status: &xen_colo::daemon::status::Status| {
        let said = status.why.iter().chain(&status.disk.errors);
        said.into_iter().any(|why| why.contains("no space left"))
    };
    pair.b.is("out of space, and says so", told).await;
    writer.goes_on().await;
    let status = pair.a.status().await;
    assert!(matches!(status.protection, Protection::Protected | Protection::TakenOver), "{status:#?}");
}

/// Epochs outgrow their memory, and then the disk they spill to: the checkpoint is never owned, the guest goes on.
#[tokio::test(flavor = "multi_thread")]
async fn epochs_that_outgrow_memory_and_spill_disk_cost_the_protection_and_nothing_else() {
    let Some(small) = SmallDisk::mount(1) else { return };
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let spill_dir = small.path().display().to_string();
    let more = ["--epoch-memory-mib", "1", "--spill-dir", spill_dir.as_str()];
    let pair = pair_with(dir.path().join("replica.img"), &more).await;
    pair.a.order(Request::Protect(protect(&pair.b.address, Mode::Colo))).await;
    pair.a.becomes(Protection::Protected).await;
    let writer = Writer::start(pair.edge.local_addr);
    let status = pair.a.becomes(Protection::TakenOver).await;
    assert!(status.why.clone().unwrap_or_default().contains("disk write to the secondary"), "{status:#?}");
    let replica = pair.b.is("out of space, and stopped", |status| status.protection == Protection::Stopped).await;
    assert!(replica.disk.errors.iter().any(|error| error.contains("no space left")), "{replica:#?}");
    // Its monitor names the disk.
    let mut monitor = monitor(&host::socket_path(pair.dir.path(), "b")).await;
    let said = monitor.execute("query-xen-replication-status", &json!({})).await.unwrap();
    let desc = said["desc"].as_str().unwrap_or_default();
    let names = desc.starts_with("I/O error occurred (disk0: ") && desc.contains("no space left");
    assert!(said["error"] == true && names, "{said}");
    writer.goes_on().await;
}

/// A replica alone: what cannot be merged shows in its status, by the disk's name, for as long as it is so.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_alone_that_fills_its_disk_names_it_in_its_status() {
    let Some(small) = SmallDisk::mount(4) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (image, fine) = (small.path().join("image"), dir.path().join("fine"));
    for image in [&image, &fine] {
        std::fs::File::create(image).unwrap().set_len(16 << 20).unwrap();
    }
    let at = |name: &str| dir.path().join(name);
    let mut command = std::process::Command::new(XL_COLO);
    command.arg("qmp").arg("--socket").arg(at("monitor"));
    for (name, image) in [("full", &image), ("fine", &fine)] {
        command.arg("--drive").arg(format!("id={name},format=raw,file={}", image.display()));
        let top = format!("id=top-{name},driver=replication,mode=secondary,top-id=t,file.backing.backing={name}");
        command.arg("--drive").arg(top);
    }
    let _process = Listening::start(&mut command, &at("monitor"));
    let mut b = monitor(&at("monitor")).await;
    let mut does = async |command: &str, arguments: serde_json::Value| b.execute(command, &arguments).await.unwrap();
    does("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": at("nbd")}}})).await;
    for disk in ["full", "fine"] {
        does("nbd-server-add", json!({"device": disk, "writable": true})).await;
    }
    does("xen-set-replication", json!({"enable": true, "primary": false})).await;
    for disk in ["full", "fine"] {
        let mut primary = Conversation::open(Address::Unix(at("nbd")), disk).await;
        for mib in 0..8 {
            primary.writes(mib << 20, vec![7; 1 << 20]).await.unwrap();
        }
    }
    assert_eq!(does("query-xen-replication-status", json!({})).await, json!({"error": false}));
    does("xen-colo-do-checkpoint", json!({})).await;
    let desc = until("the error shows", async || {
        let said = does("query-xen-replication-status", json!({})).await;
        said["desc"].as_str().map(str::to_owned).ok_or(said)
    })
    .await;
    assert!(desc.starts_with("I/O error occurred (full: ") && !desc.contains("fine"), "{desc}");
}

/// The spill file fills its disk: the epoch is broken, what was sealed before is whole.
#[test]
fn a_full_disk_under_the_spill_file_breaks_the_epoch_and_nothing_before_it() {
    let Some(small) = SmallDisk::mount(1) else { return };
    let dir = tempfile::tempdir().unwrap();
    let base = FileDisk::open_or_create(&dir.path().join("base.img"), 16 << 20).unwrap();
    let config = ReplicaConfig {
        memory_budget_bytes: 256 << 10,
        spill_dir: Some(small.path().to_owned()),
        ..ReplicaConfig::default()
    };
    let mut replica = Replica::new(Box::new(base), config);
    replica.start_sync(1).unwrap();
    replica.primary_write(1, 0, &[1; 65536]).unwrap();
    replica.seal().unwrap();
    let refused = (0..256).find_map(|n| replica.primary_write(1, n * 65536, &[2; 65536]).err());
    assert!(matches!(refused, Some(DiskError::NoSpace { .. })), "{refused:?}");
    let why = replica.seal().unwrap_err().to_string();
    assert!(why.contains("no space left"), "{why}");
    // Taking over from the last checkpoint needs none of what was refused.
    replica.takeover(2).unwrap();
    let mut read = vec![0; 65536];
    replica.guest_read(0, &mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 1));
}

/// Writes of 64 KiB over one connection, as fast as they are acknowledged.
struct Writer {
    written: std::sync::Arc<std::sync::atomic::AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Writer {
    fn start(address: std::net::SocketAddr) -> Self {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let written = std::sync::Arc::<std::sync::atomic::AtomicU64>::default();
        let count = written.clone();
        let task = tokio::spawn(async move {
            let mut link = tokio::net::TcpStream::connect(address).await.unwrap();
            // The same keys again and again: the guest's log is finite, the replica's disk is smaller.
            for n in (0..700).cycle() {
                let body = vec![n as u8 | 1; 60_000];
                let head = format!("PUT /k/big-{n} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n", body.len());
                link.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
                let mut reply = Vec::new();
                while !reply.windows(4).any(|end| end == b"\r\n\r\n") {
                    assert!(link.read_buf(&mut reply).await.unwrap() > 0, "the guest hung up");
                }
                let status = String::from_utf8_lossy(&reply).into_owned();
                assert!(!status.starts_with("HTTP/1.1 4"), "{status}");
                count.fetch_add(body.len() as u64, std::sync::atomic::Ordering::SeqCst);
            }
        });
        Self { written, task }
    }

    async fn wrote(&self, bytes: u64) {
        until("enough is written", async || {
            let written = self.written.load(std::sync::atomic::Ordering::SeqCst);
            assert!(!self.task.is_finished(), "the writer failed after {written} bytes");
            if written >= bytes { Ok(()) } else { Err(written) }
        })
        .await;
    }

    async fn goes_on(&self) {
        let now = self.written.load(std::sync::atomic::Ordering::SeqCst);
        self.wrote(now + 300_000).await;
    }
}

/// A protection that the next start could not know of is none: it does not begin, and the guest runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_protection_that_cannot_be_written_down_is_refused() {
    let Some(small) = SmallDisk::mount(2) else { return };
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &str, image: PathBuf, more: &[&str]| {
        let mut command = std::process::Command::new(XL_COLO);
        command.args(["host", "--follow-stdin", "--name", name, "--listen", "127.0.0.1:0", "--policy", "hold"]);
        command.arg("--run-dir").arg(dir.path()).arg("--disk").arg(image).args(more);
        Host::start(name, dir.path(), command)
    };
    let a = start("a", small.path().join("a.img"), &["--guest", "web", "--guest-mib", "1", "--disk-mib", "1"]);
    let b = start("b", dir.path().join("b.img"), &[]);
    let filler = small.path().join("filler");
    std::fs::write(&filler, vec![7; 4 << 20]).unwrap_err();
    let why = a.refusal(Request::Protect(protect(&b.address, Mode::Colo))).await;
    assert!(why.contains("the guest cannot be protected: write ") && why.contains("No space left"), "{why}");
    assert!(why.contains("a.img.colo-protected"), "{why}");
    assert_eq!(a.status().await.protection, Protection::Unprotected);
    std::fs::remove_file(filler).unwrap();
    until("the peer is free again", async || a.ask(Request::Protect(protect(&b.address, Mode::Colo))).await).await;
    a.becomes(Protection::Protected).await;
}

/// The image cannot even be made: `protect` says why, in the words of the host that lacks the space.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_the_wrong_size_is_refused_by_name() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("replica.img");
    FileDisk::open_or_create(&image, 1 << 20).unwrap().flush().unwrap();
    let pair = pair(image.clone()).await;
    let why = pair.a.refusal(Request::Protect(protect(&pair.b.address, Mode::Colo))).await;
    assert!(why.contains("replica.img is 1048576 bytes, the primary's disk is 67108864"), "{why}");
    assert_eq!(pair.a.status().await.protection, Protection::Unprotected);
    std::fs::remove_file(image).unwrap();
    pair.a.order(Request::Protect(protect(&pair.b.address, Mode::Colo))).await;
    pair.a.becomes(Protection::Protected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_an_nbd_clients_news_and_what_is_discarded_can_be_written_again() {
    if installed("qemu-io").is_none() {
        return;
    }
    let Some(small) = SmallDisk::mount(2) else { return };
    let path = |name: &str| small.path().join(name).display().to_string();
    std::fs::File::create(path("image")).unwrap().set_len(8 << 20).unwrap();
    let mut command = std::process::Command::new(XL_COLO);
    command.args(["nbd", "-t", "-e", "0", "--discard=unmap", "-k", &path("sock"), &path("image")]);
    let _server = Listening::start(&mut command, Path::new(&path("sock")));
    let mut client = Conversation::open(Address::Unix(path("sock").into()), "").await;
    client.writes(0, vec![1; 1 << 20]).await.unwrap();
    let outcome = client.writes(4 << 20, vec![2; 4 << 20]).await;
    assert_eq!(outcome, Err("NoSpace".into()));
    let seen = client.reads(0, 1 << 20).await.unwrap();
    assert!(seen.iter().all(|byte| *byte == 1), "the connection lives, and what was there is there");
    let uri = format!("nbd+unix:///?socket={}", path("sock"));
    let discarded = run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", "discard 4M 4M", &uri]).await;
    assert!(discarded.status.success());
    client.writes(4 << 20, vec![3; 512 << 10]).await.unwrap();
    let seen = client.reads(4 << 20, 512 << 10).await.unwrap();
    assert!(seen.iter().all(|byte| *byte == 3));
}

/// Fills a disk to its last byte, and frees it when asked.
struct Filler(PathBuf);

impl Filler {
    fn fill(disk: &SmallDisk) -> Self {
        let path = disk.path().join("filler");
        std::fs::write(&path, vec![7; 8 << 20]).unwrap_err();
        Self(path)
    }

    fn free(self) {
        std::fs::remove_file(self.0).unwrap();
    }
}

/// The register's disk is full: who asks is told so, nothing that was granted is forgotten, and nothing is granted that
/// is not written down.
#[tokio::test(flavor = "multi_thread")]
async fn an_arbiter_on_a_full_disk_grants_nothing_and_forgets_nothing() {
    let Some(small) = SmallDisk::mount(1) else { return };
    let file = small.path().join("register.json");
    let socket = tempfile::tempdir().unwrap();
    let listen = Address::Unix(socket.path().join("arbiter.sock"));
    let mut command = std::process::Command::new(XL_COLO);
    command.args(["arbiter", "--listen", &listen.to_string()]).arg("--file").arg(&file);
    let _server = Listening::start(command.stdout(std::process::Stdio::null()), &socket.path().join("arbiter.sock"));
    let (direct, served) = (Arbiter::File(file.clone()), Arbiter::Served(listen));
    let claim = |holder: &str, expected| Claim { guest: "web".into(), expected, holder: holder.into() };
    assert_eq!(served.claim(claim("a", 0)).await.unwrap(), Verdict::Won { generation: 1 });
    // Many guests, so that the register does not fit into what is left of a page that it has.
    for guest in 0..200 {
        let claim = Claim { guest: format!("{guest}-{}", "x".repeat(40)), expected: 0, holder: "a".into() };
        direct.claim(claim).await.unwrap();
    }
    let before = std::fs::read(&file).unwrap();
    let filler = Filler::fill(&small);
    for arbiter in [&direct, &served] {
        let why = arbiter.claim(claim("b", 1)).await.unwrap_err().to_string();
        assert!(why.contains("No space left on device"), "{why}");
        let register = arbiter.query("web").await.unwrap();
        assert_eq!((register.generation, &register.holder[..]), (1, "a"), "what was granted is in force");
        assert!(matches!(arbiter.claim(claim("b", 0)).await.unwrap(), Verdict::Lost(_)), "and stays refused to others");
    }
    assert_eq!(std::fs::read(&file).unwrap(), before);
    filler.free();
    assert_eq!(served.claim(claim("b", 1)).await.unwrap(), Verdict::Won { generation: 2 });
    assert!(matches!(direct.claim(claim("a", 1)).await.unwrap(), Verdict::Lost(_)));
}

/// The event log's disk is full: the host goes on, says it once, and when there is room the log goes on without a gap.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_log_on_a_full_disk_goes_on_where_it_was() {
    let Some(small) = SmallDisk::mount(1) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = small.path().join("a.events");
    let mut command = host_command("a", dir.path());
    command
        .args(["--policy", "hold", "--guest", "web", "--guest-mib", "1", "--disk-mib", "1", "--event-log"])
        .arg(&path);
    let a = Host::start("a", dir.path(), command);
    let lines = || {
        let text = std::fs::read_to_string(&path).unwrap();
        let events = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        events.map(|line| serde_json::from_str::<Event>(line).unwrap().number).collect::<Vec<_>>()
    };
    until("it is written", async || if lines().len() >= 2 { Ok(()) } else { Err(lines()) }).await;
    let filler = Filler::fill(&small);
    // More than a page, of which the file may have some left.
    for _ in 0..40 {
        a.order(Request::PauseGuest).await;
        a.order(Request::ResumeGuest).await;
    }
    until("it says so", async || if a.log().contains("cannot be written") { Ok(()) } else { Err(a.log()) }).await;
    assert_eq!(a.status().await.protection, Protection::Unprotected);
    // Twice tried again, and not said again.
    tokio::time::sleep(std::time::Duration::from_millis(2200)).await;
    assert_eq!(a.log().matches("cannot be written").count(), 1, "{}", a.log());
    filler.free();
    let all: Vec<u64> = (1..=82).collect();
    until("the log is whole", async || if lines() == all { Ok(()) } else { Err(lines()) }).await;
    assert!(a.log().contains("the event log is written again"), "{}", a.log());
}

/// The page's disk is full: one line says so, and the page that was there is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_report_on_a_full_disk_leaves_the_page_that_was_there() {
    let Some(small) = SmallDisk::mount(1) else { return };
    let dir = tempfile::tempdir().unwrap();
    let line = r#"{"number":1,"at_us":1,"unix_us":1,"host":"a","guest":"web","event":"paused"}"#;
    std::fs::write(dir.path().join("a.events"), format!("{line}\n")).unwrap();
    let page = small.path().join("page.html");
    let words = ["report", dir.path().to_str().unwrap(), "-o", page.to_str().unwrap()];
    assert!(xl_colo(&words).await.status.success());
    let before = std::fs::read(&page).unwrap();
    let _filler = Filler::fill(&small);
    let why = one_line(&xl_colo(&words).await, 1);
    assert!(why.contains("page.html: No space left on device"), "{why}");
    assert_eq!(std::fs::read(&page).unwrap(), before);
    let names: Vec<_> = std::fs::read_dir(small.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "nothing half is left: {names:?}");
}
