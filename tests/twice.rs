//! The same order twice at once: one is carried out, the other is told so, and the pair is none the worse.

use crate::common::world::{Plan, World};
use crate::common::{one_line, xl_colo};
use std::process::Output;
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
