//! The demo as a user runs it: what it prints, what it proves, and how it fails.

use crate::common::{PATIENCE, XL_COLO, one_line, turn, xl_colo};
use serde_json::Value;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;

/// Runs the demo, which must survive, and returns what it printed with `--json`.
async fn survives(args: &[&str]) -> Value {
    let _turn = turn().await;
    let output = xl_colo(&[&["demo", "--json", "--seconds", "3"], args].concat()).await;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"));
    for field in ["/checkpoints/total", "/bytes_sent", "/acknowledged_writes", "/acknowledged_after_kill"] {
        assert!(report.pointer(field).and_then(Value::as_u64).is_some_and(|n| n > 0), "{field}: {report:#}");
    }
    for field in ["/packets/compared", "/packets/released", "/packets/held"] {
        assert!(report.pointer(field).is_some_and(Value::is_u64), "{field}: {report:#}");
    }
    for field in ["/pause_us/p50", "/pause_us/p99", "/pause_us/max", "/detection_ms", "/takeover_ms"] {
        assert!(report.pointer(field).and_then(Value::as_f64).is_some_and(|n| n > 0.0), "{field}: {report:#}");
    }
    let by_cause = report["checkpoints"]["by_cause"].as_object().unwrap();
    let sum: u64 = by_cause.values().filter_map(Value::as_u64).sum();
    assert_eq!(Some(sum), report["checkpoints"]["total"].as_u64(), "every checkpoint has a cause: {report:#}");
    assert_eq!(report["connection_kept"], true, "{report:#}");
    assert_eq!(report["lost_writes"], 0, "{report:#}");
    report
}

async fn survives_in(mode: &str, killed: &str) {
    let report = survives(&["--mode", mode, "--kill", killed]).await;
    assert_eq!(report["mode"], mode, "{report:#}");
    assert_eq!(report["killed"], killed, "{report:#}");
    if mode == "colo" {
        assert!(report["packets"]["compared"].as_u64() > Some(0), "{report:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn colo_survives_its_primary() {
    survives_in("colo", "primary").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn colo_survives_its_secondary() {
    survives_in("colo", "secondary").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn remus_survives_its_primary() {
    survives_in("remus", "primary").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn remus_survives_its_secondary() {
    survives_in("remus", "secondary").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_larger_guest_survives_too() {
    let report = survives(&["--guest-mib", "512"]).await;
    assert_eq!(report["guest_mib"], 512, "{report:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_report_without_json_is_for_a_person() {
    let _turn = turn().await;
    let output = xl_colo(&["demo", "--seconds", "2"]).await;
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.starts_with("xl-colo demo: colo mode, primary killed\n"), "{stdout}");
    assert!(stdout.ends_with("\nSURVIVED: nothing lost, connection kept\n\n") || stdout.contains("\nSURVIVED: "));
    let stderr = String::from_utf8_lossy(&output.stderr);
    for phase in ["protecting the guest", "the guest is protected", "kill -9", "taken over"] {
        assert!(stderr.contains(phase), "progress says {phase:?}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_one_line_and_exit_code_4() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = xl_colo(&["demo", "--serve", &address]).await;
    let why = one_line(&output, 4);
    assert!(why.contains(&address) && why.contains("in use"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_larger_than_memory_is_one_line_and_exit_code_4() {
    let output = xl_colo(&["demo", "--guest-mib", "1048576"]).await;
    let why = one_line(&output, 4);
    assert!(why.contains("1048576 MiB") && why.contains("--guest-mib"), "{why}");
}

/// `--serve`: the pair is the user's to kill; the demo says what it sees, and leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_served_pair_survives_a_kill_by_hand_and_ends_with_its_demo() {
    let _turn = turn().await;
    let mut demo = tokio::process::Command::new(XL_COLO)
        .args(["demo", "--serve", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(demo.stderr.take().unwrap()).lines();
    let mut said = Vec::new();
    let mut says = async |what: &str| {
        let wait = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                said.push(line.clone());
                if line.contains(what) {
                    return line;
                }
            }
            panic!("the demo ended without saying {what:?}");
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(line) => line,
            Err(_) => panic!("the demo does not say {what:?}"),
        }
    };
    let url = says("the guest answers at").await;
    let address = url.split("http://").nth(1).and_then(|rest| rest.split('/').next()).unwrap().parse().unwrap();
    let line = says("is pid").await;
    let pids: Vec<u32> =
        line.split("is pid ").skip(1).map(|rest| rest.split([',', ';']).next().unwrap().parse().unwrap()).collect();
    assert_eq!(pids.len(), 2, "{line}");
    let load = crate::common::load::Load::start(address);
    load.goes_on(10).await;
    let killed = crate::common::run("kill", &["-9", &pids[0].to_string()]).await;
    assert!(killed.status.success());
    load.live.mark_kill();
    says("taken over").await;
    load.survives(10).await;
    load.ends_unharmed().await;

    let demo_pid = demo.id().unwrap().to_string();
    crate::common::run("kill", &["-INT", &demo_pid]).await;
    let ended = tokio::time::timeout(PATIENCE, demo.wait()).await.unwrap().unwrap();
    assert!(ended.success(), "{ended}");
    crate::common::until("no host outlives the demo", async || {
        let alive = pids.iter().any(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists());
        if alive { Err(pids.clone()) } else { Ok(()) }
    })
    .await;
}
