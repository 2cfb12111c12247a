//! Monitors of ours, ordered about by our own client, by a script for a stock QEMU, and by strangers.
//!
//! ```text
//!  xl-colo qmp --socket ─ replica ◀─ NBD ─ QEMU, quorum and replication(primary)      the same commands to both
//!  xl-colo host         ─ engine                                                      orders, events
//! ```

use crate::common::conversation::Conversation;
use crate::common::host::{Host, host_command, protect};
use crate::common::qemu::difference;
use crate::common::{Listening, PATIENCE, XL_COLO, installed, one_line, run, turn, until, xl_colo};
use serde_json::{Value, json};
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::qmp::client::{Monitor, MonitorError};
use xen_colo::daemon::qmp::{CLIENTS_MAX, host};
use xen_colo::daemon::status::Protection;
use xen_colo::qmp::codec::INPUT_MAX_BYTES;

const SIZE: usize = 8 << 20;

/// A secondary of ours, on one image.
struct Secondary {
    process: Listening,
    socket: PathBuf,
    dir: TempDir,
}

impl Secondary {
    fn start() -> Self {
        Self::of_size(SIZE)
    }

    /// With the drives that a QEMU would get.
    fn of_size(size: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("image"), vec![0x11; size]).unwrap();
        let socket = dir.path().join("monitor");
        let image = format!("if=none,id=disk0,format=raw,file={}", dir.path().join("image").display());
        let top = "if=none,id=top,driver=replication,mode=secondary,top-id=top,file.driver=qcow2,\
                   file.file.filename=a,file.backing.driver=qcow2,file.backing.file.filename=h,file.backing.backing=disk0";
        let mut command = Command::new(XL_COLO);
        command.arg("qmp").arg("--socket").arg(&socket).args(["--drive", &image, "--drive", top]);
        command.args(["--epoch-memory-mib", "512"]);
        let process = Listening::start(&mut command, &socket);
        Self { process, socket, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn monitor(&self) -> Monitor {
        Monitor::connect(&self.socket, PATIENCE).await.unwrap()
    }

    /// A connection that says what it is told to, and gives what it hears.
    async fn raw(&self) -> Raw {
        Raw::connect(&self.socket).await
    }
}

async fn order(monitor: &mut Monitor, command: &str, arguments: Value) -> Value {
    let done = monitor.execute(command, &arguments).await;
    done.unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
}

async fn refusal(monitor: &mut Monitor, command: &str, arguments: Value) -> String {
    match monitor.execute(command, &arguments).await {
        Err(MonitorError::Refused { source, .. }) => source.desc,
        other => panic!("{command} {arguments} should be refused: {other:?}"),
    }
}

/// A client that is none of ours.
struct Raw(UnixStream);

impl Raw {
    async fn connect(socket: &Path) -> Self {
        Self(UnixStream::connect(socket).await.unwrap())
    }

    async fn says(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// The next line; it ends CRLF.
    async fn line(&mut self) -> String {
        let mut line = Vec::new();
        let read = async {
            while !line.ends_with(b"\n") {
                line.push(self.0.read_u8().await.unwrap());
            }
        };
        tokio::time::timeout(PATIENCE, read).await.expect("a line in time");
        let line = String::from_utf8(line).unwrap();
        line.strip_suffix("\r\n").unwrap_or_else(|| panic!("{line:?} ends CRLF")).to_owned()
    }

    async fn is_hung_up_on(&mut self) {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(PATIENCE, self.0.read_to_end(&mut rest)).await;
        assert!(matches!(read, Ok(Ok(_) | Err(_))), "it is hung up on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_primary_is_protected_by_a_script_for_a_stock_secondary() {
    let Some(qemu) = installed("qemu-system-x86_64") else { return };
    let mut secondary = Secondary::start();
    let primary_image = secondary.path("primary");
    std::fs::write(&primary_image, vec![0x11; SIZE]).unwrap();
    let mut b = secondary.monitor().await;
    let nbd = secondary.path("nbd");
    let status = "query-xen-replication-status";
    let not_running = json!({"error": true, "desc": "Block replication is not running"});
    assert_eq!(order(&mut b, status, json!({})).await, not_running);
    order(&mut b, "nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": nbd}}})).await;
    order(&mut b, "nbd-server-add", json!({"device": "disk0", "writable": true})).await;
    order(&mut b, "block-export-add", json!({"type": "nbd", "id": "guest", "node-name": "top", "writable": true}))
        .await;
    order(&mut b, "xen-set-replication", json!({"enable": true, "primary": false})).await;

    let quorum = format!(
        "if=none,id=disk,driver=quorum,vote-threshold=1,read-pattern=fifo,children.0.driver=raw,\
         children.0.file.driver=file,children.0.file.filename={}",
        primary_image.display()
    );
    let socket = secondary.path("qemu");
    let mut command = Command::new(qemu);
    command.args(["-machine", "none", "-S", "-nodefaults", "-display", "none", "-drive", &quorum]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
    let _qemu = Listening::start(&mut command, &socket);
    let mut a = Monitor::connect(&socket, PATIENCE).await.unwrap();
    if !order(&mut a, "query-commands", json!({})).await.to_string().contains("\"xen-set-replication\"") {
        eprintln!("SKIP: this qemu-system-x86_64 is built without replication");
        return;
    }
    let line = format!(
        "drive_add -n buddy driver=replication,mode=primary,node-name=replica,file.driver=nbd,file.server.type=unix,\
         file.server.path={},file.export=disk0",
        nbd.display()
    );
    assert_eq!(order(&mut a, "human-monitor-command", json!({"command-line": line})).await, "");
    order(&mut a, "x-blockdev-change", json!({"parent": "disk", "node": "replica"})).await;
    order(&mut a, "xen-set-replication", json!({"enable": true, "primary": true})).await;
    let drives = secondary.path("drives");
    order(&mut a, "nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": drives}}})).await;
    order(&mut a, "nbd-server-add", json!({"device": "disk", "writable": true})).await;

    let mut disk = Conversation::open(Address::Unix(drives), "disk").await;
    let mut guest = Conversation::open(Address::Unix(nbd), "top").await;
    let mut expected = vec![0x11; SIZE];
    // Whole sectors: of others QEMU's replication node fills the last one with zeroes.
    for round in 1..=3_u8 {
        let at = usize::from(round) << 20;
        disk.writes(at as u64 + 512, vec![round; 69_632]).await.unwrap();
        guest.writes(7 << 20, vec![0xbb; 700]).await.unwrap();
        let seen = guest.reads(at as u64 + 512, 69_632).await.unwrap();
        assert!(seen.iter().all(|byte| *byte == 0x11), "round {round}: not before the checkpoint");
        order(&mut a, "xen-colo-do-checkpoint", json!({})).await;
        order(&mut b, "xen-colo-do-checkpoint", json!({})).await;
        expected[at + 512..][..69_632].fill(round);
        let seen = guest.reads(0, SIZE as u32).await.unwrap();
        assert_eq!(difference(&seen, &expected), None, "round {round}: the checkpoint");
        for monitor in [&mut a, &mut b] {
            assert_eq!(order(monitor, status, json!({})).await, json!({"error": false}));
        }
    }
    // Rolled back by the takeover, but for what guest B wrote; and the old primary is told.
    disk.writes(0, vec![0xee; 4096]).await.unwrap();
    guest.writes(8192, vec![0x77; 512]).await.unwrap();
    expected[8192..8704].fill(0x77);
    order(&mut b, "xen-set-replication", json!({"enable": false, "primary": false, "failover": true})).await;
    let seen = guest.reads(0, SIZE as u32).await.unwrap();
    assert_eq!(difference(&seen, &expected), None, "the takeover");
    disk.writes(0, vec![0xef; 4096]).await.unwrap();
    let told = order(&mut a, status, json!({})).await;
    assert_eq!(told, json!({"error": true, "desc": "I/O error occurred"}));
    assert_eq!(refusal(&mut b, "nbd-server-remove", json!({"name": "disk0"})).await, "export 'disk0' still in use");
    order(&mut b, "nbd-server-remove", json!({"name": "disk0", "mode": "hard"})).await;
    let over = order(&mut b, status, json!({})).await;
    assert_eq!(over["desc"], "Block replication is not running (taken over)");
    let all = order(&mut b, "query-replication", json!({})).await;
    assert!(all["disks"][0]["fenced_writes"].as_u64() > Some(0), "{all}");
    assert_eq!((&all["stage"], &all["exports"]), (&json!("taken-over"), &json!(["guest"])));
    let mut names = Vec::new();
    while names.last().is_none_or(|name| name != "BLOCK_EXPORT_DELETED") {
        names.push(b.next_event(PATIENCE).await.unwrap().unwrap().name);
    }
    assert_eq!(names, ["XEN_COLO_REPLICATION", "COLO_EXIT", "XEN_COLO_REPLICATION", "BLOCK_EXPORT_DELETED"]);
    // All that the guest wrote is in the image when it has ended.
    order(&mut b, "quit", json!({})).await;
    until("it ends", async || secondary.process.0.try_wait().unwrap().ok_or("it runs")).await;
    let image = std::fs::read(secondary.path("image")).unwrap();
    assert_eq!(difference(&image, &expected), None, "the image");
}

#[tokio::test(flavor = "multi_thread")]
async fn success_that_means_nothing_is_refused() {
    let secondary = Secondary::start();
    let mut monitor = secondary.monitor().await;
    let enable = |primary: bool| json!({"enable": true, "primary": primary});
    let wrong_mode = refusal(&mut monitor, "xen-set-replication", enable(true)).await;
    assert_eq!(wrong_mode, "The parameter mode's value is invalid, needs 1, but got 0");
    for (command, arguments) in [
        ("xen-colo-do-checkpoint", json!({})),
        ("xen-set-replication", json!({"enable": false, "primary": false})),
        ("xen-set-replication", json!({"enable": false, "primary": false, "failover": true})),
    ] {
        assert_eq!(refusal(&mut monitor, command, arguments).await, "Block replication is not running");
    }
    assert_eq!(refusal(&mut monitor, "x-colo-lost-heartbeat", json!({})).await, "The feature 'colo' is not enabled");
    // Without a replication node there is nothing to replicate, and it is said.
    let delete = json!({"command-line": "drive_del top"});
    assert_eq!(order(&mut monitor, "human-monitor-command", delete).await, "");
    let nothing = refusal(&mut monitor, "xen-set-replication", enable(false)).await;
    assert!(nothing.starts_with("there is nothing to replicate: "), "{nothing}");
    let add = "drive_add -n buddy driver=replication,mode=secondary,top-id=top,node-name=top,file.backing=";
    let line = |image: &str| json!({"command-line": format!("{add}{image}")});
    let nowhere = order(&mut monitor, "human-monitor-command", line("zork")).await;
    assert_eq!(nowhere, "Cannot find device='zork' nor node-name='zork'\r\n");
    assert_eq!(order(&mut monitor, "human-monitor-command", line("disk0")).await, "");
    order(&mut monitor, "xen-set-replication", enable(false)).await;
    let again = refusal(&mut monitor, "xen-set-replication", enable(false)).await;
    assert_eq!(again, "Block replication is running or done");

    // A stop without failover does drop the overlays.
    let nbd = secondary.path("nbd");
    order(&mut monitor, "nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": nbd}}})).await;
    for device in ["disk0", "top"] {
        order(&mut monitor, "nbd-server-add", json!({"device": device, "writable": true})).await;
    }
    let mut primary = Conversation::open(Address::Unix(nbd.clone()), "disk0").await;
    let mut guest = Conversation::open(Address::Unix(nbd), "top").await;
    primary.writes(0, vec![0x22; 4096]).await.unwrap();
    guest.writes(4096, vec![0x33; 4096]).await.unwrap();
    order(&mut monitor, "xen-set-replication", json!({"enable": false, "primary": false})).await;
    assert!(guest.reads(0, 8192).await.unwrap().iter().all(|byte| *byte == 0x11), "the last checkpoint");
    guest.writes(0, vec![0x44; 512]).await.unwrap_err();
    primary.writes(0, vec![0x44; 512]).await.unwrap_err();
    let status = order(&mut monitor, "query-xen-replication-status", json!({})).await;
    assert_eq!(status, json!({"error": true, "desc": "Block replication is not running (stopped)"}));
    assert!(std::fs::read(secondary.path("image")).unwrap().iter().all(|byte| *byte == 0x11));
}

/// What a guest went on with is in the image when it has ended, though it is told to end before that was merged.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_right_after_a_takeover_loses_nothing() {
    let mut secondary = Secondary::of_size(192 << 20);
    let mut monitor = secondary.monitor().await;
    let nbd = secondary.path("nbd");
    order(&mut monitor, "nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": nbd}}})).await;
    order(&mut monitor, "nbd-server-add", json!({"device": "disk0", "writable": true})).await;
    order(&mut monitor, "xen-set-replication", json!({"enable": true, "primary": false})).await;
    let mut primary = Conversation::open(Address::Unix(nbd), "disk0").await;
    for mib in 0..192_u64 {
        primary.writes(mib << 20, vec![mib as u8 | 1; 1 << 20]).await.unwrap();
    }
    // In one breath.
    let mut client = secondary.raw().await;
    let failover = "{'execute':'xen-set-replication','arguments':{'enable':false,'primary':false,'failover':true}}";
    let words = ["{'execute':'qmp_capabilities'}{'execute':'xen-colo-do-checkpoint'}", failover, "{'execute':'quit'}"];
    client.says(words.concat().as_bytes()).await;
    until("it ends", async || secondary.process.0.try_wait().unwrap().ok_or("it runs")).await;
    let image = std::fs::read(secondary.path("image")).unwrap();
    let wrong = (0..192).find(|mib| image[mib << 20..][..1 << 20].iter().any(|byte| *byte != *mib as u8 | 1));
    assert_eq!(wrong, None, "a MiB that was sealed and is not there");
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_half_words_harm_nobody() {
    let secondary = Secondary::start();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&secondary.socket), 0o600);
    let negotiate = b"{'execute':'qmp_capabilities'}";
    // Left in mid-word, in mid-order, and without a word.
    for words in [&b""[..], b"{'execute':'qmp_capa", b"{'execute':'qmp_capabilities'}{'execute':'stop'}", b"\xff\0@"] {
        let mut client = secondary.raw().await;
        client.says(words).await;
    }
    // Several orders in one packet, and one in many.
    let mut client = secondary.raw().await;
    client.line().await;
    client.says(&[&negotiate[..], b"{'execute':'query-yank','id':1} {'execute':'query-yank','id':2}\n"].concat()).await;
    assert_eq!(client.line().await, "{\"return\": {}}");
    assert_eq!(client.line().await, "{\"return\": [], \"id\": 1}");
    assert_eq!(client.line().await, "{\"return\": [], \"id\": 2}");
    for byte in b"{'execute':'query-yank','id':3}" {
        client.says(&[*byte]).await;
    }
    assert_eq!(client.line().await, "{\"return\": [], \"id\": 3}");
    // Too long, too deep, and on it goes.
    for (endless, words) in
        [("'".to_owned() + &"x".repeat(2 * INPUT_MAX_BYTES), "size"), ("[".repeat(1025), "nesting depth")]
    {
        client.says(endless.as_bytes()).await;
        let line = client.line().await;
        assert!(
            line.contains(&format!("JSON {} limit exceeded", if words == "size" { "token size" } else { words })),
            "{line}"
        );
    }
    client.says(b"\n{'execute':'query-yank','id':4}").await;
    assert_eq!(client.line().await, "{\"return\": [], \"id\": 4}");
    // Who asks and shuts its mouth is answered.
    client.says(b"{'execute':'query-xen-replication-status'}").await;
    client.0.shutdown().await.unwrap();
    assert!(client.line().await.contains("not running"));
    client.is_hung_up_on().await;
    // As many as there are places, and one too many.
    let mut clients = Vec::new();
    for _ in 0..CLIENTS_MAX {
        let mut client = secondary.raw().await;
        client.line().await;
        clients.push(client);
    }
    secondary.raw().await.is_hung_up_on().await;
    drop(clients);
    for _ in 0..200 {
        until("a place is free", async || {
            Monitor::connect(&secondary.socket, PATIENCE).await.map(drop).map_err(|e| e.to_string())
        })
        .await;
    }
}

/// Even where somebody opened the socket and its directory to everyone.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_is_not_even_greeted() {
    if installed("socat").is_none() || installed("setpriv").is_none() {
        return;
    }
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("SKIP: only root can be another user");
        return;
    }
    let secondary = Secondary::start();
    std::fs::set_permissions(secondary.dir.path(), Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&secondary.socket, Permissions::from_mode(0o777)).unwrap();
    let at = format!("UNIX:{}", secondary.socket.display());
    let greeted = async |uid: &str| {
        let said = run("setpriv", &["--reuid", uid, "--clear-groups", "socat", "-u", "-T1", &at, "-"]).await;
        String::from_utf8(said.stdout).unwrap().contains("QMP")
    };
    assert!(greeted("0").await);
    assert!(!greeted("65534").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_orders_and_says_why_not() {
    let secondary = Secondary::start();
    let socket = secondary.socket.to_str().unwrap();
    let output = xl_colo(&["qmp", "--connect", socket, "query-xen-replication-status"]).await;
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["error"], true);
    let failures: [(&[&str], i32, &str); 5] = [
        (&["--connect", socket, "zork"], 1, "zork: The command zork has not been found (CommandNotFound)"),
        (&["--connect", socket, "stop", "[]"], 1, "the arguments are a JSON object"),
        (&["--connect", "/nonexistent", "stop"], 1, "cannot connect to the monitor unix:/nonexistent: "),
        (&["--socket", "x", "--drive", "id=a,file=/nonexistent"], 4, "--drive id=a,file=/nonexistent: Could not open"),
        (&["--socket", socket], 4, "in use: another process serves this socket"),
    ];
    for (arguments, code, why) in failures {
        let said = one_line(&xl_colo(&[&["qmp"], arguments].concat()).await, code);
        assert!(said.contains(why), "{said}");
    }
    assert_eq!(xl_colo(&["qmp"]).await.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_clients_understand_it() {
    let secondary = Secondary::start();
    let socket = secondary.socket.to_str().unwrap().to_owned();
    if installed("socat").is_some() {
        let script = format!(
            "printf '{{\"execute\":\"qmp_capabilities\"}}{{\"execute\":\"query-status\",\"id\":7}}' | socat -t10 - UNIX:{socket}"
        );
        let said = run("sh", &["-c", &script]).await;
        let lines = String::from_utf8(said.stdout).unwrap();
        let last: Value = serde_json::from_str(lines.lines().last().unwrap_or_default()).unwrap();
        assert_eq!(last, json!({"return": {"status": "prelaunch", "singlestep": false, "running": false}, "id": 7}));
    }
    let Some(shell) = qmp_shell().await else { return };
    let script = format!("printf 'query-status\\nstop\\nzork\\n' | {} {socket}", shell.display());
    let said = run("sh", &["-c", &script]).await;
    let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    assert!(text.contains("Connected to QEMU 7.2.0"), "{text}");
    assert!(text.contains("\"status\": \"prelaunch\"") || text.contains("'status': 'prelaunch'"), "{text}");
    assert!(text.contains("The command zork has not been found"), "{text}");
}

/// qmp-shell of PyPI's qemu.qmp, in an environment of its own; or None, said loudly.
async fn qmp_shell() -> Option<PathBuf> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("venv");
    let shell = venv.join("bin/qmp-shell");
    if !shell.is_file() {
        installed("python3")?;
        let at = venv.to_str()?;
        let made = run("python3", &["-m", "venv", at]).await;
        let pip = format!("timeout 25 {at}/bin/pip install -q qemu.qmp");
        if !made.status.success() || !run("sh", &["-c", &pip]).await.status.success() {
            eprintln!("SKIP: pip cannot install qemu.qmp here");
            return None;
        }
    }
    Some(shell)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hosts_guest_is_ordered_about_and_what_happens_is_told() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &str| {
        let mut command = host_command(name, dir.path());
        command.args(["--policy", "hold"]);
        if name == "a" {
            command.args(["--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]);
        }
        Host::start(name, dir.path(), command)
    };
    let (a, b) = (start("a"), start("b"));
    let socket = |name: &str| host::socket_path(dir.path(), name);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&socket("a")), mode(dir.path())), (0o600, 0o700));
    let mut on_a = Monitor::connect(&socket("a"), PATIENCE).await.unwrap();
    let mut on_b = Monitor::connect(&socket("b"), PATIENCE).await.unwrap();
    let running = json!({"status": "running", "singlestep": false, "running": true});
    assert_eq!(order(&mut on_a, "query-status", json!({})).await, running);
    // Alone: it stops and runs, and there is nothing to replicate.
    order(&mut on_a, "stop", json!({})).await;
    assert_eq!(order(&mut on_a, "query-status", json!({})).await["status"], "paused");
    let why = a.refusal(Request::Protect(protect(&b.address, Mode::Remus))).await;
    assert_eq!(why, "the guest is stopped; let it run first");
    order(&mut on_a, "cont", json!({})).await;
    let why = refusal(&mut on_a, "xen-set-replication", json!({"enable": true, "primary": true})).await;
    assert!(why.starts_with("there is nothing to replicate: "), "{why}");
    for (command, words) in [
        ("xen-colo-do-checkpoint", "no guest is being protected from this host"),
        ("x-colo-lost-heartbeat", "The feature 'colo' is not enabled"),
        ("nbd-server-stop", "The command nbd-server-stop has not been found"),
    ] {
        assert_eq!(refusal(&mut on_a, command, json!({})).await, words);
    }
    assert_eq!(refusal(&mut on_b, "cont", json!({})).await, "this host has no guest");
    let status = order(&mut on_a, "query-xen-replication-status", json!({})).await;
    assert_eq!(status["error"], true, "{status}");

    // In a pair.
    a.order(Request::Protect(protect(&b.address, Mode::Remus))).await;
    let before = a.becomes(Protection::Protected).await.checkpoints.total;
    for (monitor, role) in [(&mut on_a, "primary"), (&mut on_b, "secondary")] {
        let status = order(monitor, "query-xen-replication-status", json!({})).await;
        assert_eq!(status, json!({"error": false}), "{role}");
        let colo = order(monitor, "query-colo-status", json!({})).await;
        assert_eq!(colo, json!({"mode": role, "last-mode": role, "reason": "none"}));
        let again =
            refusal(monitor, "xen-set-replication", json!({"enable": true, "primary": role == "primary"})).await;
        assert_eq!(again, "Block replication is running or done");
        assert!(refusal(monitor, "stop", json!({})).await.starts_with("the guest is in a pair"));
    }
    order(&mut on_a, "migrate-set-parameters", json!({"x-checkpoint-delay": 3_600_000})).await;
    for _ in 0..3 {
        let now = a.status().await.checkpoints.total;
        order(&mut on_a, "xen-colo-do-checkpoint", json!({})).await;
        a.is("a checkpoint older", |status| status.checkpoints.total > now).await;
    }
    let all = order(&mut on_a, "query-replication", json!({})).await;
    assert!(all["checkpoints"]["total"].as_u64() > Some(before), "{all}");
    assert_eq!((&all["role"], &all["protection"]), (&json!("primary"), &json!("protected")));
    assert!(refusal(&mut on_b, "xen-colo-do-checkpoint", json!({})).await.contains("no guest is being protected"));

    // Stopped without a failover it is an end of the protection: the guest goes on here, and only here.
    order(&mut on_a, "xen-set-replication", json!({"enable": false, "primary": true})).await;
    assert_eq!(a.becomes(Protection::Unprotected).await.generation, 1, "no generation was won");
    b.becomes(Protection::Empty).await;
    let status = order(&mut on_a, "query-xen-replication-status", json!({})).await;
    assert!(status["desc"].as_str().unwrap().starts_with("Block replication is not running (UNPROTECTED"), "{status}");
    a.order(Request::Protect(protect(&b.address, Mode::Remus))).await;
    a.becomes(Protection::Protected).await;

    let enough = refusal(&mut on_a, "migrate-set-parameters", json!({"x-checkpoint-delay": 0})).await;
    assert_eq!(enough, "a checkpoint delay is at least 1 ms");

    // Takeover by the secondary's monitor; with nobody to decide but the operator, who this is.
    order(&mut on_b, "xen-set-replication", json!({"enable": false, "primary": false, "failover": true})).await;
    b.becomes(Protection::TakenOver).await;
    assert_eq!(refusal(&mut on_b, "x-colo-lost-heartbeat", json!({})).await, "COLO failover is already activated");
    let status = order(&mut on_b, "query-xen-replication-status", json!({})).await;
    assert!(status["desc"].as_str().unwrap().starts_with("Block replication is not running (taken over"), "{status}");
    assert_eq!(order(&mut on_b, "query-status", json!({})).await, running);

    let mut told = Vec::new();
    while told.last().is_none_or(|event: &xen_colo::qmp::Event| event.data["protection"] != "taken-over") {
        told.push(on_b.next_event(PATIENCE).await.unwrap().expect("an event"));
    }
    let names: Vec<_> = told.iter().map(|event| event.name.as_str()).collect();
    let (state, all) = ("XEN_COLO_PROTECTION", names.join(" "));
    assert!(all.starts_with(&format!("{state} {state}")), "syncing, standing by: {told:?}");
    assert!(all.ends_with(&format!("COLO_EXIT RESUME {state}")), "{told:?}");
    let exit = told.iter().find(|event| event.name == "COLO_EXIT").unwrap();
    assert_eq!(exit.data, json!({"mode": "secondary", "reason": "request"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_more_than_max_connections_waits_for_a_place() {
    let secondary = Secondary::start();
    let mut monitor = secondary.monitor().await;
    let nbd = secondary.path("nbd");
    let addr = json!({"type": "unix", "data": {"path": nbd}});
    order(&mut monitor, "nbd-server-start", json!({"addr": addr, "max-connections": 1})).await;
    let mut greeting = [0; 18];
    let mut first = UnixStream::connect(&nbd).await.unwrap();
    first.read_exact(&mut greeting).await.unwrap();
    let mut second = UnixStream::connect(&nbd).await.unwrap();
    let waits = tokio::time::timeout(std::time::Duration::from_millis(200), second.read_exact(&mut greeting)).await;
    assert!(waits.is_err(), "the second has a place: {waits:?}");
    drop(first);
    tokio::time::timeout(PATIENCE, second.read_exact(&mut greeting)).await.expect("a place").unwrap();
}
