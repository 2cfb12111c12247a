//! A host as a service: asked to end, asked to read again, killed and started again, watched by a service manager.
//!
//! | what happens | the guest | the peer |
//! |---|---|---|
//! | SIGTERM, SIGINT at the primary | is protected no longer, in the generation it had | is dismissed, and empty |
//! | SIGTERM at the secondary | runs on, unprotected, in the generation it had | ends without a takeover |
//! | SIGTERM twice, or a peer that hangs | | what is left is said, exit code 1 |
//! | kill -9, started again | is booted only if nobody else can have it | |

use crate::common::host::{Host, host_command, protect};
use crate::common::peer::ScriptedSecondary;
use crate::common::world::{Plan, World};
use crate::common::{XL_COLO, one_line, run, turn, until, xl_colo};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::arbiter::Arbiter;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::Protection;

async fn register(dir: &Path) -> (u64, String) {
    let register = Arbiter::File(dir.join("register.json")).query("web").await.unwrap();
    (register.generation, register.holder)
}

fn protected_file(dir: &Path) -> std::path::PathBuf {
    dir.join("disk-a.img.colo-protected")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_is_asked_to_end_dismisses_its_secondary() {
    for (signal, mode) in [("TERM", Mode::Remus), ("INT", Mode::Colo)] {
        let mut world = World::start(Plan { fence: false, ..Plan::default() }).await;
        world.protect(mode).await;
        assert!(protected_file(&world.path("")).exists());
        world.a.signal(signal).await;
        assert!(world.a.exit().await.success(), "{signal}: {}", world.a.log());
        let status = world.b.becomes(Protection::Empty).await;
        assert_eq!(status.why.as_deref(), Some("host a ended the protection of web"), "{signal}: no takeover");
        assert_eq!(register(&world.path("")).await, (1, "a".into()), "{signal}: nobody had to ask");
        assert!(!protected_file(&world.path("")).exists(), "{signal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_that_is_asked_to_end_leaves_without_a_takeover() {
    for mode in [Mode::Remus, Mode::Colo] {
        let mut world = World::start(Plan { fence: false, ..Plan::default() }).await;
        let load = world.load();
        world.protect(mode).await;
        load.goes_on(20).await;
        world.b.signal("TERM").await;
        assert!(world.b.exit().await.success(), "{mode}: {}", world.b.log());
        let status = world.a.becomes(Protection::Unprotected).await;
        let why = "host b left the protection: it was told to end";
        assert_eq!((status.generation, status.why.as_deref()), (1, Some(why)), "{mode}");
        assert_eq!(register(&world.path("")).await, (1, "a".into()), "{mode}: nobody had to ask");
        load.goes_on(20).await;
        load.ends_unharmed().await;
    }
}

/// The peer is there and says nothing: the operator need not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn asked_twice_a_host_ends_and_says_what_it_leaves() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = host_command("a", dir.path());
    command.args(["--arbiter", &format!("file:{}", dir.path().join("register.json").display())]);
    command.args(["--guest", "web", "--guest-mib", "1", "--disk-mib", "1"]);
    let mut a = Host::start("a", dir.path(), command);
    let peer = ScriptedSecondary::listens().await;
    let mut request = protect(&peer.address(), Mode::Remus);
    request.heartbeat_interval_ms = Some(10_000);
    let (mut accepted, ()) = tokio::join!(peer.welcomes_all(), a.order(Request::Protect(request)));
    accepted.serves_disk(1 << 20);
    accepted.is_copied().await;
    a.becomes(Protection::Protected).await;
    a.signal("TERM").await;
    a.is("being let go", |status| status.state == "Dismissing").await;
    a.signal("TERM").await;
    let status = a.exit().await;
    let log = a.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("SIGTERM came before the protection was ended"), "{log}");
    assert!(log.contains("leaves this behind: web: "), "{log}");
    assert!(!a.socket.exists());
    assert!(protected_file(dir.path()).exists(), "the next start must know that the peer may have the guest");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_change_while_a_host_runs() {
    let world = World::start(Plan { fence: false, ..Plan::default() }).await;
    let set = async |settings: &[&str]| {
        let dir = world.path("");
        xl_colo(&[&["set", "--host", "a", "--run-dir", dir.to_str().unwrap()], settings].concat()).await
    };
    let said = set(&["checkpoint-delay-ms=3000000", "heartbeat-ms=150", "log=debug"]).await;
    assert_eq!(
        String::from_utf8_lossy(&said.stdout),
        "checkpoint-delay-ms: 3000000 from the next protection on\n\
         heartbeat-ms: 150 from the next protection on\nlog: debug from now on\n"
    );
    for (setting, why) in [
        ("listen=b:1", "listen: takes effect when the host is started again"),
        ("heartbeat-misses=1", "is not a number from 2 to 1000"),
        ("log=a=b=c", "log: "),
        ("checkpoint_delay_ms=9", "checkpoint_delay_ms is no setting; did you mean checkpoint-delay-ms?"),
        ("zork=9", "zork is no setting; there is checkpoint-delay-ms, heartbeat-ms, heartbeat-misses, log"),
    ] {
        let refused = one_line(&set(&[setting]).await, 1);
        assert!(refused.contains(why), "{refused}");
    }
    world.protect(Mode::Colo).await;
    let before = world.a.status().await.checkpoints.total;
    let said = set(&["checkpoint-delay-ms=20"]).await;
    assert_eq!(String::from_utf8_lossy(&said.stdout), "checkpoint-delay-ms: 20 from now on\n");
    world.a.is("checkpointed often", |status| status.checkpoints.total > before + 5).await;

    world.a.signal("HUP").await;
    until("it says that there is nothing to read", async || {
        let log = world.a.log();
        if log.contains("SIGHUP: this host was started without a configuration file") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_eq!(world.a.status().await.protection, Protection::Protected, "and nothing else happens");
}

fn host_of(name: &str, dir: &Path, more: &[&str], with_guest: bool) -> Host {
    let mut command = host_command(name, dir);
    command.args(more);
    if with_guest {
        command.args(["--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]);
    }
    Host::start(name, dir, command)
}

/// A service manager starts what was killed, at once: the guest must not run twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_primary_that_is_started_again_runs_its_guest_only_if_nobody_else_does() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let arbiter = format!("file:{}", dir.path().join("register.json").display());
    let start = |name: &str, with_guest| host_of(name, dir.path(), &["--arbiter", &arbiter], with_guest);
    let (mut a, mut b) = (start("a", true), start("b", false));
    a.order(Request::Protect(protect(&b.address, Mode::Colo))).await;
    a.becomes(Protection::Protected).await;
    a.kill();
    b.becomes(Protection::TakenOver).await;
    assert!(a.socket.exists(), "what was killed leaves its socket");
    let mut a = start("a", true);
    let status = a.becomes(Protection::Empty).await;
    assert_eq!(status.why.as_deref(), Some("host b holds generation 2; web is not this host's"));

    // Host b is killed too, and started again with the guest: it has the last generation, and wins the next.
    b.kill();
    let mut b = start("b", true);
    b.becomes(Protection::Unprotected).await;
    assert_eq!(register(dir.path()).await, (3, "b".into()));
    b.order(Request::Protect(protect(&a.address, Mode::Remus))).await;
    b.becomes(Protection::Protected).await;

    // The secondary is killed: the guest goes on, and is protected again by what is started in its place.
    a.kill();
    assert_eq!(b.becomes(Protection::TakenOver).await.generation, 5);
    let a = start("a", false);
    b.order(Request::Protect(protect(&a.address, Mode::Remus))).await;
    b.becomes(Protection::Protected).await;

    // The peer hangs, and the primary is killed and started again before it is missed: one of them has the guest.
    a.stop().await;
    b.kill();
    let b = start("b", true);
    b.becomes(Protection::Unprotected).await;
    a.wake().await;
    let status = a.becomes(Protection::Stopped).await;
    assert!(status.why.clone().unwrap_or_default().contains("host b holds generation 7"), "{status:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_arbiter_what_was_left_beside_the_disk_decides() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let fence = dir.path().join("fence");
    std::fs::write(&fence, "#!/bin/sh\necho \"$*\" >\"$0.asked\"\ntest -e \"$0.yes\"\n").unwrap();
    std::fs::set_permissions(&fence, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let script = format!("script:{}", fence.display());
    for policy in ["hold", &script] {
        let start = |name: &str, with_guest| host_of(name, dir.path(), &["--policy", policy], with_guest);
        let (mut a, mut b) = (start("a", true), start("b", false));
        a.order(Request::Protect(protect(&b.address, Mode::Colo))).await;
        a.becomes(Protection::Protected).await;
        b.kill();
        a.kill();
        let mut a = start("a", true);
        let why = a.becomes(Protection::Empty).await.why.unwrap_or_default();
        assert!(why.contains("web was protected by host b in generation 1 when this host ended"), "{why}");
        assert!(why.contains("remove ") && why.contains("disk-a.img.colo-protected"), "{why}");
        a.kill();
        if policy == "hold" {
            std::fs::remove_file(protected_file(dir.path())).unwrap();
        } else {
            let asked = std::fs::read_to_string(dir.path().join("fence.asked")).unwrap();
            assert_eq!(asked, "web 1 a\n");
            std::fs::write(dir.path().join("fence.yes"), "").unwrap();
        }
        start("a", true).becomes(Protection::Unprotected).await;
        assert!(!protected_file(dir.path()).exists());
    }
    std::fs::write(protected_file(dir.path()), "{\"gue").unwrap();
    let (run_dir, image) = (dir.path().to_str().unwrap(), dir.path().join("disk-a.img"));
    let host = ["host", "--name", "a", "--listen", "127.0.0.1:0", "--policy", "hold", "--guest", "web"];
    let output = xl_colo(&[&host[..], &["--run-dir", run_dir, "--disk", image.to_str().unwrap()]].concat()).await;
    let why = one_line(&output, 4);
    assert!(why.contains("whether it was protected when this host ended cannot be told"), "{why}");
}

/// All that arrives until `wanted` does.
fn told(socket: &UnixDatagram, wanted: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut text = [0; 4096];
    let deadline = std::time::Instant::now() + crate::common::PATIENCE;
    while let Ok(bytes) = socket.recv(&mut text)
        && std::time::Instant::now() < deadline
    {
        let said = String::from_utf8_lossy(&text[..bytes]).into_owned();
        let found = said.contains(wanted);
        all.push(said);
        if found {
            return all;
        }
    }
    all.dedup();
    panic!("not told {wanted:?}, but {all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_manager_is_told_how_the_host_gets_on() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(crate::common::PATIENCE)).unwrap();
    let b = host_of("b", dir.path(), &["--policy", "alone"], false);
    let mut command = host_command("a", dir.path());
    command.args(["--policy", "alone", "--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]);
    command.env("NOTIFY_SOCKET", dir.path().join("notify")).env("WATCHDOG_USEC", "100000");
    let mut a = Host::start("a", dir.path(), command);
    let said = told(&socket, "STATUS=web: UNPROTECTED");
    assert!(said.iter().any(|word| word == "READY=1"), "{said:?}");
    // Nothing happens, and the engine turns.
    for _ in 0..5 {
        told(&socket, "WATCHDOG=1");
    }
    a.order(Request::Protect(protect(&b.address, Mode::Colo))).await;
    told(&socket, "STATUS=web: protected; primary, peer b, generation 1");
    a.signal("TERM").await;
    told(&socket, "STOPPING=1");
    assert!(a.exit().await.success());
}

/// The engine hangs in a write to its disk, and everything else in the process is well: the watchdog must bite.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_engine_hangs_gives_no_sign_of_life_and_can_be_ended() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(crate::common::PATIENCE)).unwrap();
    let b = host_of("b", dir.path(), &["--policy", "alone"], false);
    let mut command = host_command("a", dir.path());
    command.args(["--policy", "alone", "--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]);
    command.env("NOTIFY_SOCKET", dir.path().join("notify")).env("WATCHDOG_USEC", "100000");
    let mut a = Host::start("a", dir.path(), command);
    told(&socket, "WATCHDOG=1");
    // Opened for writing, it waits for a reader who never comes.
    let pipe = dir.path().join("disk-a.img.colo-protected.new");
    crate::common::succeeds("mkfifo", &[pipe.to_str().unwrap()]).await;
    let (control, request) = (a.socket.clone(), Request::Protect(protect(&b.address, Mode::Colo)));
    let asking = tokio::spawn(async move { xen_colo::daemon::control::ask(&control, &request).await });
    // Silence for ten times as long as a sign of life takes.
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let begun = std::time::Instant::now();
    while socket.recv(&mut [0; 4096]).is_ok() {
        assert!(begun.elapsed() < crate::common::PATIENCE, "a host that hangs is fed");
    }
    socket.set_read_timeout(Some(crate::common::PATIENCE)).unwrap();
    a.signal("TERM").await;
    told(&socket, "STOPPING=1");
    a.signal("TERM").await;
    assert_eq!(a.exit().await.code(), Some(1), "{}", a.log());
    asking.abort();
}

/// An impatient operator, or two units for one guest: one host runs, the others say why they do not.
#[tokio::test(flavor = "multi_thread")]
async fn of_several_that_start_at_once_one_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = host_of("a", dir.path(), &["--policy", "hold"], false);
    first.kill();
    assert!(first.socket.exists(), "a stale socket");
    let mut hosts: Vec<_> = (0..6)
        .map(|_| {
            let mut command = host_command("a", dir.path());
            command.args(["--policy", "hold"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    until("all but one have ended", async || {
        let running = hosts.iter_mut().filter_map(|host| host.try_wait().unwrap().is_none().then_some(())).count();
        if running == 1 { Ok(()) } else { Err(running) }
    })
    .await;
    let mut survivor = None;
    for mut host in hosts {
        if host.try_wait().unwrap().is_none() {
            survivor = Some(host);
            continue;
        }
        let why = one_line(&host.wait_with_output().unwrap(), 4);
        assert!(why.contains("in use: another process serves this socket"), "{why}");
    }
    let mut survivor = survivor.unwrap();
    let output = xl_colo(&["status", "--host", "a", "--run-dir", dir.path().to_str().unwrap()]).await;
    assert!(output.status.success(), "the one that runs is the one that answers");
    survivor.kill().unwrap();
    survivor.wait().unwrap();
}

/// What makes that so is a lock on the directory: a host that is stopped while it has it must not hang the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_have_the_directory_to_itself_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let locked = std::fs::File::open(dir.path()).unwrap();
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let (run_dir, image) = (dir.path().to_str().unwrap(), dir.path().join("disk"));
    let host = ["host", "--name", "a", "--listen", "127.0.0.1:0", "--policy", "hold", "--run-dir", run_dir, "--disk"];
    let why = one_line(&xl_colo(&[&host[..], &[image.to_str().unwrap()]].concat()).await, 4);
    assert!(why.contains("is locked by another host that is starting"), "{why}");
    assert!(!dir.path().join("a.sock").exists());
}

/// Somebody who is not root, at root's host: told so, in a line.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_not_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let _a = host_of("a", dir.path(), &["--policy", "hold"], false);
    let as_nobody = async |args: &[&str]| {
        run("setpriv", &[&["--reuid=65534", "--regid=65534", "--clear-groups", XL_COLO], args].concat()).await
    };
    let probe = Command::new("setpriv").args(["--reuid=65534", "--clear-groups", XL_COLO, "--version"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIP: {XL_COLO} cannot be run as another user: {probe:?}");
        return;
    }
    let run_dir = dir.path().to_str().unwrap();
    for order in [&["status"][..], &["events"], &["unprotect"], &["stop"], &["set", "log=info"]] {
        let why = one_line(&as_nobody(&[order, &["--host", "a", "--run-dir", run_dir]].concat()).await, 1);
        assert!(why.contains("Permission denied"), "{order:?}: {why}");
    }
    let host = ["host", "--name", "b", "--listen", "127.0.0.1:0", "--policy", "hold", "--disk", "/tmp/x.img"];
    let why = one_line(&as_nobody(&[&host[..], &["--run-dir", run_dir]].concat()).await, 4);
    assert!(why.contains("belongs to user 0, not to 65534") || why.contains("Permission denied"), "{why}");
}

/// A log of a host that was protected, checkpointed and spoken to: its lines at info, by what they say.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_a_line_for_each_change_and_none_for_what_the_guest_does() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = host_of("b", dir.path(), &["--policy", "alone"], false);
    let mut command = host_command("a", dir.path());
    command.args(["--policy", "alone", "--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]).env("NO_COLOR", "1");
    let mut a = Host::start("a", dir.path(), command);
    a.order(Request::Protect(protect(&b.address, Mode::Remus))).await;
    a.becomes(Protection::Protected).await;
    a.is("checkpointed a few times", |status| status.checkpoints.total > 5).await;
    a.order(Request::Unprotect).await;
    a.becomes(Protection::Unprotected).await;
    a.signal("TERM").await;
    assert!(a.exit().await.success());
    let log = a.log();
    for what in ["host started", "UNPROTECTED: nobody", "first copy begun", "protected by b", "host ends"] {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(what)).collect();
        assert_eq!(lines.len(), 1, "{what}: {log}");
        assert!(lines[0].contains(" INFO guest{host=\"a\""), "{}", lines[0]);
    }
    let line = log.lines().find(|line| line.contains("protected by b")).unwrap();
    assert!(line.contains("guest{host=\"a\" guest=\"web\"}: xen_colo::daemon::events: protected by b"), "{line}");
    assert!(line.contains(" number="), "{line}");
    assert!(!log.contains("checkpoint 1 ("), "checkpoints are told at debug: {log}");
    assert!(log.lines().count() < 20, "{log}");
}

/// What systemd's journal knows itself is left to it, and a line says how urgent it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_for_the_journal_begins_with_its_priority() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stderr");
    for is_journal in [true, false] {
        let stderr = std::fs::File::create(&path).unwrap();
        let of = stderr.metadata().unwrap();
        // The other one is inherited, and of a file that standard error is not.
        let stream = format!("{}:{}", of.dev(), of.ino() + u64::from(!is_journal));
        let mut command = host_command("a", dir.path());
        command.args(["--policy", "hold"]).env("XEN_COLO_LOG", "info").env("JOURNAL_STREAM", stream);
        command.env("NO_COLOR", "1").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr);
        let mut host = command.spawn().unwrap();
        let says = async |what: &str| {
            until("it logs", async || {
                let log = std::fs::read_to_string(&path).unwrap();
                log.lines().find(|line| line.contains(what)).map(str::to_owned).ok_or(log)
            })
            .await
        };
        let line = says("host started, pid").await;
        assert_eq!(line.starts_with("<6>guest{host=\"a\"}: "), is_journal, "{line}");
        // How much is logged can be changed all the same.
        let run_dir = dir.path().to_str().unwrap();
        let set = xl_colo(&["set", "log=debug", "--host", "a", "--run-dir", run_dir]).await;
        assert!(set.status.success(), "{set:?}");
        host.kill().unwrap();
        host.wait().unwrap();
    }
}
