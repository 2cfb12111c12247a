//! A host that hangs instead of dying: stopped with SIGSTOP, replaced, and woken with SIGCONT.
//!
//! The sleeper wakes with sockets full of what was true when it fell asleep. It must find that it lost before it does
//! anything else: no frame, no disk write and no message of its generation may get through. Where the switch does not
//! fence its port, the lease of its heartbeat alone holds it back.

use crate::common::until;
use crate::common::world::{Plan, World};
use std::time::Duration;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::status::Protection;

/// How long a woken host is watched for a frame that it must not send.
const WATCH: Duration = Duration::from_secs(1);

async fn a_primary_that_hangs_is_replaced_and_wakes_as_a_loser(mode: Mode, fence: bool) {
    let world = World::start(Plan { fence, ..Plan::default() }).await;
    let load = world.load();
    world.protect(mode).await;
    load.goes_on(20).await;

    world.a.stop().await;
    load.live.mark_kill();
    let before = world.settled_port("a").await;
    let survivor = world.b.becomes(Protection::TakenOver).await;
    assert_eq!(survivor.generation, 2, "{survivor:#?}");
    load.survives(20).await;

    let carried = world.wire.carried();
    world.a.wake().await;
    let loser = world.a.becomes(Protection::Stopped).await;
    let why = loser.why.unwrap_or_default();
    assert_eq!(why, "host b holds generation 2");
    load.goes_on(20).await;
    tokio::time::sleep(WATCH).await;
    let after = world.port("a");
    assert_eq!(after.received_frames, before.received_frames, "frames carried for the loser: {after:?}");
    assert_eq!(after.fenced_frames, before.fenced_frames, "the loser tried to send: {after:?}");
    assert_eq!(world.wire.carried(), carried, "the loser reached the survivor");
    world.a.stays(Protection::Stopped, WATCH).await;
    world.b.stays(Protection::TakenOver, WATCH).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_colo_primary_wakes_as_a_loser() {
    a_primary_that_hangs_is_replaced_and_wakes_as_a_loser(Mode::Colo, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_colo_primary_is_held_back_by_its_lease_alone() {
    a_primary_that_hangs_is_replaced_and_wakes_as_a_loser(Mode::Colo, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remus_primary_wakes_as_a_loser() {
    a_primary_that_hangs_is_replaced_and_wakes_as_a_loser(Mode::Remus, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remus_primary_is_held_back_by_its_lease_alone() {
    a_primary_that_hangs_is_replaced_and_wakes_as_a_loser(Mode::Remus, false).await;
}

/// A pause shorter than the lease is nobody's death.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_pause_of_either_host_changes_nothing() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    for host in [&world.a, &world.b] {
        load.goes_on(10).await;
        host.stop().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        host.wake().await;
        load.goes_on(10).await;
    }
    assert_eq!(world.a.status().await.protection, Protection::Protected);
    assert_eq!(world.b.status().await.protection, Protection::StandingBy);
    load.ends_unharmed().await;
}

async fn a_secondary_that_hangs_is_given_up_and_wakes_as_a_loser(mode: Mode) {
    let world = World::start(Plan { fence: false, ..Plan::default() }).await;
    let load = world.load();
    world.protect(mode).await;
    load.goes_on(20).await;

    world.b.stop().await;
    load.live.mark_kill();
    let before = world.settled_port("b").await;
    let survivor = world.a.becomes(Protection::TakenOver).await;
    assert_eq!(survivor.generation, 2, "{survivor:#?}");
    load.survives(20).await;

    world.b.wake().await;
    let loser = world.b.becomes(Protection::Stopped).await;
    assert_eq!(loser.why.as_deref(), Some("host a holds generation 2"));
    tokio::time::sleep(WATCH).await;
    assert_eq!(world.port("b").received_frames, before.received_frames, "the loser announced itself");
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_colo_secondary_wakes_as_a_loser() {
    a_secondary_that_hangs_is_given_up_and_wakes_as_a_loser(Mode::Colo).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remus_secondary_wakes_as_a_loser() {
    a_secondary_that_hangs_is_given_up_and_wakes_as_a_loser(Mode::Remus).await;
}

/// The harder order: the survivor has died too when the sleeper wakes. Its state is old, so it must not go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_sleeper_does_not_go_on_even_when_its_successor_is_gone() {
    let mut world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    load.goes_on(10).await;
    world.a.stop().await;
    world.b.becomes(Protection::TakenOver).await;
    load.goes_on(10).await;
    world.b.kill();
    world.a.wake().await;
    let loser = world.a.becomes(Protection::Stopped).await;
    assert_eq!(loser.why.as_deref(), Some("host b holds generation 2"));
    let silent = until("port a is silent", async || if world.port("a").connected { Ok(()) } else { Err("no port") });
    silent.await;
    world.a.stays(Protection::Stopped, WATCH).await;
}
