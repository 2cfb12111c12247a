//! The same order twice at once: one is carried out, the other is told so, and the pair is none the worse.

use crate::common::host::{Host, host_command};
use crate::common::world::{Plan, World};
use crate::common::{one_line, xl_colo};
use std::process::{Output, Stdio};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::status::Protection;

async fn order(world: &World, host: &str, words: &[&str]) -> Output {
    let run_dir = world.path("").display().to_string();
    xl_colo(&[words, &["--host", host, "--run-dir", &run_dir]].concat()).await
}

/// The exit codes and what the refused ones said.
fn said(outputs: &[&Output]) -> (usize, Vec<String>) {
    let refused = outputs.iter().filter(|output| !output.status.success());
    let refused: Vec<_> = refused.map(|output| one_line(output, 1)).collect();
    (outputs.len() - refused.len(), refused)
}

/// Whoever knocks a second time claims a generation that the pair does not have. The arbiter then refuses both hosts the
/// one after that of the pair, and a guest whose host dies is gone.
#[tokio::test(flavor = "multi_thread")]
async fn many_protections_at_once_are_one_that_protects() {
    let mut world = World::start(Plan::default()).await;
    let load = world.load();
    let peer = world.wire.address.to_string();
    let words = ["protect", &peer, "--mode", "remus", "--heartbeat-misses", "10", "--wait"];
    let protect = || order(&world, "a", &words);
    let (a, b, c, d) = tokio::join!(protect(), protect(), protect(), protect());
    let (done, refused) = said(&[&a, &b, &c, &d]);
    assert_eq!(done, 1, "{refused:#?}");
    for why in &refused {
        assert!(why.contains("being begun already") || why.contains("protected already"), "{why}");
    }
    assert_eq!(world.a.becomes(Protection::Protected).await.generation, 1);
    world.b.becomes(Protection::StandingBy).await;
    load.goes_on(10).await;
    load.live.mark_kill();
    world.a.kill();
    world.b.becomes(Protection::TakenOver).await;
    load.survives(10).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_ends_at_once_are_one_end() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    let end = || order(&world, "a", &["unprotect"]);
    let (one, two) = tokio::join!(end(), end());
    let (done, refused) = said(&[&one, &two]);
    assert_eq!(done, 1, "{refused:#?}");
    assert!(refused[0].contains("being ended already") || refused[0].contains("nothing is protected"), "{refused:#?}");
    world.a.becomes(Protection::Unprotected).await;
    world.b.becomes(Protection::Empty).await;
    load.goes_on(5).await;
    load.ends_unharmed().await;
}

/// A pair that begins, is ordered about and ends, again and again, every order given twice at the same time: each is answered
/// within [`PATIENCE`](crate::common::PATIENCE), of two that exclude each other one is refused with a reason, and the guest
/// never stops.
#[tokio::test(flavor = "multi_thread")]
async fn every_order_twice_at_once_again_and_again() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    let peer = world.wire.address.to_string();
    let mut protections = 0;
    for round in 0..6 {
        let mode = if round % 2 == 0 { "remus" } else { "colo" };
        let words = ["protect", &peer, "--mode", mode, "--heartbeat-misses", "10", "--wait"];
        let (one, two) = tokio::join!(order(&world, "a", &words), order(&world, "a", &words));
        let (done, refused) = said(&[&one, &two]);
        assert_eq!(done, 1, "round {round}: {refused:#?}");
        assert!(refused[0].contains("being begun already") || refused[0].contains("protected already"), "{refused:#?}");
        protections += 1;
        assert_eq!(world.a.status().await.generation, protections, "round {round}: no generation was wasted");

        let (one, two) = tokio::join!(order(&world, "a", &["checkpoint"]), order(&world, "a", &["checkpoint"]));
        assert_eq!(said(&[&one, &two]), (2, vec![]), "round {round}: both want one checkpoint, and get it");
        load.goes_on(5).await;

        // What excludes each other, both at once.
        let (end, again) = tokio::join!(order(&world, "a", &["unprotect"]), order(&world, "a", &words));
        let (_, refused) = said(&[&end, &again]);
        assert!(end.status.success() && refused.len() <= 1, "round {round}: {refused:#?}");
        protections += u64::from(again.status.success());
        let more = [order(&world, "a", &["unprotect"]).await, order(&world, "a", &["unprotect"]).await];
        let (_, refused) = said(&[&more[0], &more[1]]);
        for why in &refused {
            assert!(
                why.contains("nothing is protected") || why.contains("being ended already"),
                "round {round}: {why}"
            );
        }
        world.a.becomes(Protection::Unprotected).await;
        world.b.becomes(Protection::Empty).await;
        load.goes_on(5).await;
    }
    load.ends_unharmed().await;
}

/// The same host is told twice to take over, or twice to end: the guest goes on once.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_or_an_end_ordered_twice_is_carried_out_once() {
    for words in [["failover", "b"], ["failover", "a"], ["stop", "a"], ["stop", "b"]] {
        let world = World::start(Plan::default()).await;
        let load = world.load();
        world.protect(Mode::Colo).await;
        load.goes_on(10).await;
        let run_dir = world.path("").display().to_string();
        let line = [&words[..], &["--run-dir", &run_dir]].concat();
        let (one, two) = tokio::join!(xl_colo(&line), xl_colo(&line));
        let (done, refused) = said(&[&one, &two]);
        assert!(done >= 1, "{words:?}: {refused:#?}");
        let gone =
            ["nothing to fail over", "is shutting down", "gave no answer", "is the host running?", "no host and no"];
        for why in &refused {
            assert!(gone.iter().any(|gone| why.contains(gone)), "{words:?}: {why}");
        }
        match words {
            ["failover", on] => assert_eq!(world.one_survives().await, on == "a", "{words:?}"),
            ["stop", "a"] => _ = world.b.becomes(Protection::TakenOver).await,
            _ => _ = world.a.becomes(Protection::TakenOver).await,
        }
        load.goes_on(5).await;
        load.ends_unharmed().await;
    }
}

/// Orders to a pair whose other host hangs: each is answered, and the guest is where it was or has gone on.
#[tokio::test(flavor = "multi_thread")]
async fn orders_while_the_peer_hangs_are_answered_and_twice_too() {
    let world = World::start(Plan::default()).await;
    let peer = world.wire.address.to_string();
    // A peer that takes connections and says nothing.
    world.b.stop().await;
    let words = ["protect", &peer, "--mode", "remus"];
    let (one, two) = tokio::join!(order(&world, "a", &words), order(&world, "a", &words));
    let (done, refused) = said(&[&one, &two]);
    assert_eq!(done, 0, "{refused:#?}");
    assert!(refused.iter().any(|why| why.contains("did not answer a hello within")), "{refused:#?}");
    assert_eq!(world.a.status().await.protection, Protection::Unprotected);
    world.b.wake().await;
    world.b.becomes(Protection::Empty).await;

    let load = world.load();
    world.protect(Mode::Remus).await;
    load.goes_on(5).await;
    load.live.mark_kill();
    world.b.stop().await;
    let (one, two) = tokio::join!(order(&world, "a", &["unprotect"]), order(&world, "a", &["checkpoint"]));
    // Done, or refused in a line: both came back.
    said(&[&one, &two]);
    world.a.becomes(Protection::TakenOver).await;
    load.survives(5).await;
    world.b.wake().await;
    world.b.becomes(Protection::Stopped).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_failovers_at_once_leave_one_guest() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    let (_, _) = tokio::join!(order(&world, "a", &["failover"]), order(&world, "b", &["failover"]));
    world.one_survives().await;
    load.goes_on(5).await;
    load.ends_unharmed().await;
}

/// Lines of two processes in one file would be nobody's.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_log_is_written_by_one_host() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log.events");
    let command = |name: &str| {
        let mut command = host_command(name, dir.path());
        command.args(["--policy", "hold", "--event-log"]).arg(&log);
        command
    };
    let mut a = Host::start("a", dir.path(), command("a"));
    let mut b = command("b").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A host whose standard input ends ends too, and says nothing.
    let _stdin = b.stdin.take();
    let why = one_line(&b.wait_with_output().unwrap(), 4);
    assert!(why.contains("log.events: in use: another process writes this log"), "{why}");
    // What a killed one leaves is no lock.
    a.kill();
    Host::start("b", dir.path(), command("b"));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_reports_at_once_are_each_whole() {
    let dir = tempfile::tempdir().unwrap();
    let lines = (1..2000).map(|n| {
        format!(
            "{{\"number\":{n},\"at_us\":1,\"unix_us\":{n},\"host\":\"a\",\"guest\":\"web\",\"event\":\"paused\"}}\n"
        )
    });
    std::fs::write(dir.path().join("a.events"), lines.collect::<String>()).unwrap();
    let words = ["report", dir.path().to_str().unwrap()];
    let (a, b, c, d) = tokio::join!(xl_colo(&words), xl_colo(&words), xl_colo(&words), xl_colo(&words));
    assert_eq!(said(&[&a, &b, &c, &d]), (4, vec![]));
    let page = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing half is left");
}
