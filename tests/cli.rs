//! The commands as an operator types them: what they print, what they refuse, how they exit.

use crate::common::host::{Host, host_command};
use crate::common::peer::read_word;
use crate::common::world::{Plan, World};
use crate::common::{PATIENCE, XL_COLO, one_line, turn, until, xl_colo};
use bytes::BytesMut;
use serde_json::Value;
use std::io::{Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use xen_colo::colo::hello::{self, Hello, Mode, Welcome};
use xen_colo::daemon::address::Address;
use xen_colo::daemon::status::{Health, Protection};

/// A command for a host of this world.
async fn order(world: &World, host: &str, words: &[&str]) -> Output {
    let run_dir = world.path("");
    let mut args = words.to_vec();
    args.extend(["--host", host, "--run-dir", run_dir.to_str().unwrap()]);
    xl_colo(&args).await
}

#[track_caller]
fn done(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `xl-colo check | grep -q` closes the pipe at its first match.
#[test]
fn a_reader_that_has_gone_is_no_panic() {
    for words in [&["check"][..], &["check", "--json"], &["check", "--guest"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let complaints = tempfile::tempfile().unwrap();
        let mut command = Command::new(XL_COLO);
        let command = command.args(words).stdout(writer).stderr(complaints.try_clone().unwrap());
        let code = command.status().unwrap().code();
        assert!(code.is_some_and(|code| code < 100), "{words:?} exited with {code:?}");
        let mut complaints = complaints;
        let mut text = String::new();
        complaints.rewind().unwrap();
        complaints.read_to_string(&mut text).unwrap();
        assert!(!text.contains("panicked"), "{words:?}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_a_pair_by_hand() {
    let world = World::start(Plan::default()).await;
    let text = done(&order(&world, "a", &["status"]).await);
    assert!(text.contains("guest       web, generation 0") && text.contains("UNPROTECTED"), "{text}");
    assert!(text.contains("because     nobody asked for protection"), "{text}");
    let text = done(&order(&world, "b", &["status"]).await);
    assert!(text.contains("host        b (pid ") && text.contains("guest       none"), "{text}");

    let peer = world.wire.address.to_string();
    let slow = ["--heartbeat-ms", "100", "--heartbeat-misses", "10"];
    done(&order(&world, "a", &[&["protect", &peer, "--mode", "remus", "--wait"][..], &slow].concat()).await);
    let text = done(&order(&world, "a", &["status"]).await);
    assert!(text.contains("protection  protected") && text.contains("pair        remus, peer b"), "{text}");
    world.b.becomes(Protection::StandingBy).await;
    let text = done(&order(&world, "b", &["status"]).await);
    assert!(text.contains("protection  standing by") && text.contains("pair        remus, peer a"), "{text}");

    let json: Value = serde_json::from_str(&done(&order(&world, "a", &["status", "--json"]).await)).unwrap();
    for (field, value) in [("host", "a"), ("guest", "web"), ("protection", "protected"), ("mode", "remus")] {
        assert_eq!(json[field], value, "{json:#}");
    }
    assert_eq!(json["pid"], world.a.pid());

    done(&order(&world, "a", &["checkpoint"]).await);
    world.a.is("checkpointed by command", |status| status.checkpoints.by_cause.contains_key("command")).await;

    let load = world.load();
    load.goes_on(10).await;
    done(&order(&world, "b", &["failover"]).await);
    world.b.becomes(Protection::TakenOver).await;
    let text = done(&order(&world, "a", &["status"]).await);
    assert!(text.contains("stopped") || text.contains("arbitrating"), "{text}");
    let stopped = world.a.becomes(Protection::Stopped).await;
    assert_eq!(stopped.why.as_deref(), Some("host b holds generation 2"));
    load.goes_on(10).await;
    load.ends_unharmed().await;
}

/// It returns when the guest goes on there and its disk image has all that it wrote.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_is_waited_for_is_over() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(50).await;
    let text = done(&order(&world, "b", &["failover", "--wait", "--json"]).await);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["done"], "failover");
    let status = world.b.status().await;
    assert_eq!((status.protection, status.health), (Protection::TakenOver, Health::TakenOver), "{status:#?}");
    world.a.becomes(Protection::Stopped).await;
    let why = one_line(&order(&world, "a", &["failover", "--wait"]).await, 1);
    assert!(why.contains("nothing to fail over"), "{why}");
    load.goes_on(5).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failover_on_the_primary_keeps_the_guest_there() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(10).await;
    done(&order(&world, "a", &["failover"]).await);
    let alone = world.a.becomes(Protection::TakenOver).await;
    assert_eq!(alone.generation, 2);
    assert_eq!(alone.why.as_deref(), Some("a failover was requested"));
    world.b.becomes(Protection::Stopped).await;
    load.goes_on(10).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_make_no_sense_are_refused_in_a_sentence() {
    let world = World::start(Plan::default()).await;
    for (host, words, reason) in [
        ("a", &["protect", "nowhere"][..], "HOST:PORT"),
        ("a", &["checkpoint"], "no guest is being protected"),
        ("a", &["failover"], "nothing to fail over"),
        ("b", &["failover"], "nothing to fail over"),
        ("b", &["protect", "127.0.0.1:1"], "no guest to protect"),
        ("a", &["protect", "127.0.0.1:1"], "is xl-colo host running there?"),
        ("a", &["protect", "unix:/nonexistent/sock"], "is xl-colo host running there?"),
        ("c", &["status"], "is the host running?"),
    ] {
        let exit_code = if words == ["protect", "nowhere"] { 2 } else { 1 };
        let output = order(&world, host, words).await;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(exit_code), "{words:?}: {stderr}");
        assert!(stderr.contains(reason), "{words:?}: {stderr}");
        if exit_code == 1 {
            one_line(&output, 1);
        }
    }
    // A host is not its own peer.
    let why = one_line(&order(&world, "a", &["protect", &world.a.address.to_string()]).await, 1);
    assert!(why.contains("both hosts are called a"), "{why}");

    world.protect(Mode::Colo).await;
    let why = one_line(&order(&world, "a", &["protect", &world.wire.address.to_string()]).await, 1);
    assert!(why.contains("protected already"), "{why}");
    let why = one_line(&order(&world, "b", &["protect", &world.a.address.to_string()]).await, 1);
    assert!(why.contains("stands by for another"), "{why}");
    assert_eq!(world.a.status().await.protection, Protection::Protected);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_a_host_lets_the_other_go_on() {
    for stopped in ["a", "b"] {
        let mut world = World::start(Plan::default()).await;
        let load = world.load();
        world.protect(Mode::Colo).await;
        load.goes_on(10).await;
        done(&order(&world, stopped, &["stop"]).await);
        let (gone, other) = if stopped == "a" { (&mut world.a, &world.b) } else { (&mut world.b, &world.a) };
        assert!(!gone.socket.exists(), "the control socket is removed when `stop` is done");
        assert!(gone.exit().await.success());
        other.becomes(Protection::TakenOver).await;
        load.goes_on(10).await;
        load.ends_unharmed().await;
    }
}

/// SIGTERM, as a service manager sends it, is the same as `stop`.
#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_host_leaves_no_socket_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut b = Host::start("b", dir.path(), standby("b", dir.path()));
    crate::common::run("kill", &["-TERM", &b.pid().to_string()]).await;
    assert!(b.exit().await.success());
    assert!(!b.socket.exists());
}

fn standby(name: &str, dir: &Path) -> Command {
    let mut command = host_command(name, dir);
    command.args(["--policy", "hold"]);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_socket_is_for_its_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("made/here");
    let b = Host::start("b", &run_dir, standby("b", &run_dir));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&run_dir), mode(&b.socket)), (0o700, 0o600));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_found_by_name_or_by_being_the_only_one() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().to_str().unwrap();
    let why = one_line(&xl_colo(&["status", "--run-dir", run_dir]).await, 1);
    assert!(why.contains("no host runs here"), "{why}");
    let why = one_line(&xl_colo(&["status", "--run-dir", "/nonexistent/run"]).await, 1);
    assert!(why.contains("no host runs here"), "{why}");
    let _b = Host::start("b", dir.path(), standby("b", dir.path()));
    let text = done(&xl_colo(&["status", "--run-dir", run_dir]).await);
    assert!(text.starts_with("host        b "), "{text}");
    let _c = Host::start("c", dir.path(), standby("c", dir.path()));
    let why = one_line(&xl_colo(&["status", "--run-dir", run_dir]).await, 1);
    assert!(why.contains("choose with --host: b, c"), "{why}");
    let why = one_line(&xl_colo(&["status", "--run-dir", run_dir, "--host", "d"]).await, 1);
    assert!(why.contains("d.sock") && why.contains("is the host running?"), "{why}");
}

/// What this machine cannot give: one line, exit code 4, and nothing of the first host is touched.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_run_says_why() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = Host::start("b", dir.path(), standby("b", dir.path()));
    let run_dir = dir.path().to_str().unwrap();
    let disk = dir.path().join("disk.img");
    let base = ["host", "--run-dir", run_dir, "--disk", disk.to_str().unwrap(), "--name"];
    let taken = b.address.to_string();
    for (rest, reason) in [
        (&["b", "--policy", "hold", "--listen", "127.0.0.1:0"][..], "another process serves this socket"),
        (&["c", "--policy", "hold", "--listen", &taken], "in use"),
        (&["c", "--policy", "hold", "--listen", "unix:/nonexistent/dir/sock"], "/nonexistent/dir/sock"),
        (&["c", "--listen", "127.0.0.1:0"], "--arbiter"),
        (
            &["c", "--policy", "hold", "--listen", "127.0.0.1:0", "--guest", "g", "--guest-mib", "16777216"],
            "--guest-mib",
        ),
    ] {
        let output = xl_colo(&[&base[..], rest].concat()).await;
        let why = one_line(&output, 4);
        assert!(why.contains(reason), "{reason}: {why}");
    }
    let base = ["host", "--policy", "hold", "--listen", "127.0.0.1:0", "--name", "c"];
    let no_dir = ["--run-dir", "/proc/none", "--disk", disk.to_str().unwrap()];
    let why = one_line(&xl_colo(&[&base[..], &no_dir].concat()).await, 4);
    assert!(why.contains("/proc/none"), "{why}");
    let no_disk = ["--run-dir", run_dir, "--disk", "/nonexistent/dir/disk.img", "--guest", "g", "--guest-mib", "4"];
    let why = one_line(&xl_colo(&[&base[..], &no_disk].concat()).await, 4);
    assert!(why.contains("/nonexistent/dir/disk.img"), "{why}");
    for (file, text) in [("/nonexistent/dir/register", ""), (disk.to_str().unwrap(), "no register")] {
        if !text.is_empty() {
            std::fs::write(file, text).unwrap();
        }
        let why = one_line(&xl_colo(&["arbiter", "--listen", "127.0.0.1:0", "--file", file]).await, 4);
        assert!(why.contains(&format!("arbiter file:{file}: ")), "{why}");
    }
    // The same to a host that has no guest yet, and would find out when it must protect one.
    let why = one_line(&xl_colo(&[&base[..], &no_disk[..4]].concat()).await, 4);
    assert!(why.contains("/nonexistent/dir/disk.img: there is no directory /nonexistent/dir"), "{why}");
    assert_eq!(b.status().await.protection, Protection::Empty, "the first host is as it was");
}

/// A name is part of a path: it must not lead out of the run directory.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_name_is_no_path() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    for name in ["../b", "x/y", "", ".."] {
        let output = xl_colo(&[
            "host",
            "--policy",
            "hold",
            "--listen",
            "127.0.0.1:0",
            "--run-dir",
            run_dir.to_str().unwrap(),
            "--disk",
            dir.path().join("disk.img").to_str().unwrap(),
            "--name",
            name,
        ])
        .await;
        assert_eq!(output.status.code(), Some(2), "{name:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_command_line_is_exit_code_2() {
    for args in [
        &[][..],
        &["dance"],
        &["status", "one", "two"],
        &["status", "one", "--host", "two"],
        &["list", "extra"],
        &["events", "--since", "yesterday"],
        &["config", "--check", "f", "--xl", "g"],
        &["protect"],
        &["protect", "127.0.0.1:1", "--mode", "hot"],
        &["protect", "127.0.0.1:1", "--heartbeat-misses", "1"],
        &["host", "--name", "a"],
        &["host", "--name", "a", "--disk", "d", "--policy", "maybe"],
        &["host", "--name", "a", "--disk", "d", "--listen", "80"],
        &["host", "--name", "a", "--disk", "d", "--diverge", "101"],
        &["demo", "--kill", "both"],
        &["demo", "--guest-mib", "0"],
        &["demo", "--serve", "nowhere"],
        &["arbiter", "--listen", "127.0.0.1:0"],
    ] {
        let output = xl_colo(args).await;
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
    let version = done(&xl_colo(&["--version"]).await);
    assert!(version.starts_with("xl-colo "), "{version}");
    assert!(done(&xl_colo(&["--help"]).await).contains("protect"));
}

/// `status --watch` prints on, and ends when nobody reads it any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_watched_status_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let _b = Host::start("b", dir.path(), standby("b", dir.path()));
    let mut watch = tokio::process::Command::new(XL_COLO)
        .args(["status", "--json", "--watch", "--run-dir", dir.path().to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["host"], "b");
    }
    drop(lines);
    until("the watch ends", async || watch.try_wait().unwrap().map(drop).ok_or("it runs")).await;
}

/// A line a thing, with what to do; what other tests run on is no Xen host, or only half of one.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_says_what_is_missing_and_reaches_a_peer() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = Host::start("b", dir.path(), standby("b", dir.path()));
    let peer = b.address.to_string();
    let output = xl_colo(&["check", &peer, "--guest", "web"]).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!((output.status.code(), &output.stderr[..]), (Some(1), &b""[..]), "{text}");
    assert!(text.contains(&format!("ok   peer               host b at {peer} speaks protocol ")), "{text}");
    assert!(text.contains(" and has no guest\n"), "{text}");
    assert!(text.contains("\nok   versions           host b runs xl-colo "), "{text}");
    assert!(text.contains("\nok   clocks             host b's is "), "one machine has one clock: {text}");
    for line in text.lines() {
        assert!(line.starts_with("ok   ") || line.starts_with("not  ") && line.contains("; do: "), "{line}");
    }
    assert!(text.lines().any(|line| line.starts_with("not  guest web  ")), "{text}");
    for item in ["build", "control domain", "releases", "log-dirty", "xenstore", "device nodes", "device model"] {
        assert!(text.contains(&format!("  {item} ")), "{item}: {text}");
    }
    assert_eq!(b.status().await.protection, Protection::Empty, "the peer is as it was");

    let output = xl_colo(&["check", "--json", "127.0.0.1:1"]).await;
    assert_eq!(output.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["able"], false);
    let lines = json["lines"].as_array().unwrap();
    let line = lines.iter().find(|line| line["item"] == "peer").unwrap();
    assert!(line["ok"] == false && line["saw"].as_str().unwrap().contains("refused"), "{line}");
    assert!(line["remedy"].as_str().unwrap().contains("xl-colo host"), "{line}");
}

/// A peer by hand, an hour ahead and of another release.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_finds_a_clock_that_is_wrong_and_another_release() {
    let listener = "127.0.0.1:0".parse::<Address>().unwrap().listen().await.unwrap();
    let address = listener.local_address().unwrap().to_string();
    let answers = async {
        let mut link = listener.accept().await.unwrap();
        let _: Hello = read_word(&mut link).await;
        let now_us = std::time::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64;
        let (clock_unix_us, version) = (Some(now_us + 3_600_000_000), Some("0.0.1".into()));
        let mut out = BytesMut::new();
        hello::encode(&Welcome { clock_unix_us, version, ..Welcome::bare("b", None) }, &mut out);
        link.write_all(&out).await.unwrap();
    };
    let words = ["check", &address];
    let (output, ()) = tokio::join!(xl_colo(&words), answers);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = |item: &str| text.lines().find(|line| line.starts_with(&format!("not  {item} "))).unwrap_or(&text);
    let ahead_ms = line("clocks").split_whitespace().find_map(|word| word.parse::<u64>().ok());
    assert!(ahead_ms.is_some_and(|ms| ms.abs_diff(3_600_000) < 30_000), "{text}");
    assert!(
        line("clocks").contains(" ahead ") && line("clocks").contains("; do: keep both hosts' clocks by NTP"),
        "{text}"
    );
    assert!(line("versions").contains("host b runs 0.0.1; do: install the same xl-colo on both hosts"), "{text}");
}

/// A host stopped with SIGSTOP answers nothing; who asks it must not hang for ever with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_hangs_is_reported_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let b = Host::start("b", dir.path(), standby("b", dir.path()));
    b.stop().await;
    let why = one_line(&xl_colo(&["status", "--run-dir", dir.path().to_str().unwrap()]).await, 1);
    assert!(why.contains("no answer"), "{why}");
    b.wake().await;
    assert_eq!(b.status().await.protection, Protection::Empty);
}
