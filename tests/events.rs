//! What happened, as an operator reads it: over the control socket, as it happens, and in the file.

use crate::common::host::{Host, host_command};
use crate::common::world::{Plan, World};
use crate::common::{PATIENCE, XL_COLO, one_line, until, xl_colo};
use std::path::Path;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::events::{Event, What};
use xen_colo::daemon::status::Protection;

async fn events(dir: &Path, host: &str, since: u64) -> Vec<Event> {
    let since = since.to_string();
    let args = ["events", "--json", "--since", &since, "--host", host, "--run-dir", dir.to_str().unwrap()];
    let output = xl_colo(&args).await;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// Its kind, as it is written.
fn kind(event: &Event) -> String {
    serde_json::to_value(event).unwrap()["event"].as_str().unwrap().to_owned()
}

/// The kinds in their order, without those that come as often as they like.
fn changes(events: &[Event]) -> String {
    let often = ["checkpoint", "loaded", "progress"];
    let kinds = events.iter().map(kind).filter(|kind| !often.contains(&kind.as_str()));
    kinds.collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_a_pair_is_told_on_both_hosts_and_written_down() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    // An order that finds another's request standing is one with it.
    until("a checkpoint by command", async || {
        world.a.order(Request::Checkpoint).await;
        let by_cause = world.a.status().await.checkpoints.by_cause;
        if by_cause.contains_key("command") { Ok(()) } else { Err(by_cause) }
    })
    .await;
    load.goes_on(10).await;
    world.b.order(Request::Failover).await;
    world.b.becomes(Protection::TakenOver).await;
    world.a.becomes(Protection::Stopped).await;
    load.goes_on(5).await;
    load.ends_unharmed().await;

    let dir = world.path("");
    let (a, b) = (events(&dir, "a", 0).await, events(&dir, "b", 0).await);
    // Which of the links is seen to end first, and how many, is chance.
    let told = changes(&a).replace("link-lost ", "");
    assert_eq!(told, "host-started unprotected syncing protected arbitrating stopped", "{a:#?}");
    assert!(a.iter().any(|event| matches!(&event.what, What::LinkLost { link, .. } if link == "peer")), "{a:#?}");
    let told = changes(&b).replace("arbitrating ", "").replace("link-lost ", "");
    assert_eq!(told, "host-started syncing standing-by taken-over first-output", "{b:#?}");
    for (host, events) in [("a", &a), ("b", &b)] {
        let numbers: Vec<_> = events.iter().map(|event| event.number).collect();
        assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>());
        assert!(events.windows(2).all(|pair| pair[0].at_us <= pair[1].at_us), "the clock goes on");
        assert!(events.iter().all(|event| event.host == host));
        assert!(events.iter().skip(1).all(|event| event.guest.as_deref() == Some("web")), "{events:#?}");
    }
    let taken: Vec<_> = a
        .iter()
        .filter_map(|event| match &event.what {
            What::Checkpoint(checkpoint) => Some(checkpoint),
            _ => None,
        })
        .collect();
    assert_eq!((taken[0].checkpoint, &taken[0].cause[..], taken[0].interval_us), (1, "first", None));
    assert!(taken.windows(2).all(|pair| pair[0].checkpoint + 1 == pair[1].checkpoint), "each is told, once");
    assert!(taken.iter().any(|taken| taken.cause == "command"), "{taken:#?}");
    for taken in &taken {
        assert!(taken.pause_us > 0 && taken.capture_us > 0 && taken.release_us >= taken.transfer_us, "{taken:#?}");
        assert_eq!(taken.release_us, taken.capture_us + taken.transfer_us, "{taken:#?}");
    }
    let loads = b.iter().filter(|event| kind(event) == "loaded").count();
    assert!(loads.abs_diff(taken.len()) <= 1, "{loads} of {}", taken.len());
    let What::TakenOver { generation, ref reason, .. } = b.iter().find(|e| kind(e) == "taken-over").unwrap().what
    else {
        unreachable!()
    };
    assert_eq!((generation, &reason[..]), (2, "a failover was requested"));

    // The file has the same, a little later.
    for (host, told) in [("a", &a), ("b", &b)] {
        let path = world.path(&format!("{host}.events"));
        until("the file has all of it", async || {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines: Vec<Event> = text.lines().flat_map(serde_json::from_str).collect();
            if lines.starts_with(told) { Ok(()) } else { Err(lines.len()) }
        })
        .await;
    }
    // What has been seen is not told again; as text it is a line each.
    let last = a.last().unwrap().number;
    assert_eq!(events(&dir, "a", last).await, []);
    let since = (last - 2).to_string();
    let args = ["events", "--since", &since, "--host", "a", "--run-dir", dir.to_str().unwrap()];
    let text = String::from_utf8(xl_colo(&args).await.stdout).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.contains("  a  web  stopped here: host b holds generation 2"), "{text}");
}

/// An operator's own words are told, and nothing that a packet does.
#[tokio::test(flavor = "multi_thread")]
async fn an_unprotected_guest_and_its_packets_are_told_as_one_change() {
    let world = World::start(Plan::default()).await;
    world.protect(Mode::Colo).await;
    let dir = world.path("");
    let before = events(&dir, "a", 0).await.last().unwrap().number;
    let load = world.load();
    load.goes_on(100).await;
    load.ends_unharmed().await;
    world.a.order(Request::Unprotect).await;
    world.b.becomes(Protection::Empty).await;
    world.a.order(Request::PauseGuest).await;
    world.a.order(Request::ResumeGuest).await;
    let after = events(&dir, "a", before).await;
    assert_eq!(changes(&after), "unprotected paused resumed", "{after:#?}");
    let others = after.iter().filter(|event| !["checkpoint", "progress"].contains(&&kind(event)[..])).count();
    assert_eq!(others, 3, "{after:#?}");
    assert!(changes(&events(&dir, "b", 0).await).ends_with("standing-by stopped empty"));
}

struct Following {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Following {
    fn start(dir: &Path, words: &[&str]) -> Self {
        let mut command = Command::new(XL_COLO);
        command.args(["events", "--follow", "--json", "--run-dir"]).arg(dir).args(words);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    async fn next(&mut self) -> Option<Event> {
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await.unwrap().unwrap();
        line.map(|line| serde_json::from_str(&line).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_hears_it_as_it_happens_until_the_host_ends() {
    let mut world = World::start(Plan::default()).await;
    let mut following = Following::start(&world.path(""), &["a", "--since", "1"]);
    assert_eq!(kind(&following.next().await.unwrap()), "unprotected");
    world.a.order(Request::PauseGuest).await;
    assert_eq!(following.next().await.unwrap().what, What::Paused);
    world.a.order(Request::Stop).await;
    // The host does not wait for who asks a moment too late for its last word.
    if let Some(last) = following.next().await {
        assert_eq!(last.what, What::HostEnded);
        assert_eq!(following.next().await, None);
    }
    let ended = until("it ends", async || following.child.try_wait().unwrap().ok_or("it runs")).await;
    assert!(ended.success());
    world.a.exit().await;

    // A host that is killed says nothing more, and who follows says so.
    let mut following = Following::start(&world.path(""), &["b"]);
    assert_eq!(kind(&following.next().await.unwrap()), "host-started");
    world.b.kill();
    assert_eq!(following.next().await, None);
    let output = following.child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_where_it_was_asked_for_or_the_host_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.jsonl");
    let mut command = host_command("b", dir.path());
    command.args(["--policy", "hold", "--event-log", path.to_str().unwrap()]);
    let mut b = Host::start("b", dir.path(), command);
    b.order(Request::Stop).await;
    assert!(b.exit().await.success());
    let text = std::fs::read_to_string(&path).unwrap();
    let kinds: Vec<_> = text.lines().map(|line| kind(&serde_json::from_str(line).unwrap())).collect();
    assert_eq!(kinds, ["host-started", "host-ended"], "the last words are there when the process is gone");
    assert!(!dir.path().join("b.events").exists());

    // A service manager's directory, and not its second one; what was asked for wins.
    for (asked, expected) in [(None, "logs/b.events"), (Some("asked"), "asked")] {
        std::fs::create_dir_all(dir.path().join("logs")).unwrap();
        let mut command = host_command("b", dir.path());
        command.args(["--policy", "hold"]).env("LOGS_DIRECTORY", format!("{0}/logs:{0}/more", dir.path().display()));
        if let Some(asked) = asked {
            command.arg("--event-log").arg(dir.path().join(asked));
        }
        let _b = Host::start("b", dir.path(), command);
        assert!(dir.path().join(expected).is_file(), "{expected}");
    }

    let disk = dir.path().join("d.img");
    let output = xl_colo(&[
        "host",
        "--name",
        "c",
        "--policy",
        "hold",
        "--listen",
        "127.0.0.1:0",
        "--run-dir",
        dir.path().to_str().unwrap(),
        "--disk",
        disk.to_str().unwrap(),
        "--event-log",
        "/nonexistent/dir/log",
    ])
    .await;
    let why = one_line(&output, 4);
    assert!(why.contains("event log /nonexistent/dir/log"), "{why}");
}
