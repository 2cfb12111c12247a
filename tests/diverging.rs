//! A guest whose copies keep answering differently: which of its flows do is told.

use crate::common::host;
use crate::common::world::{Plan, World};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::{Protect, Request};
use xen_colo::daemon::status::{Protection, Status};

/// Protects the guest, which must run for so much of its time. An embedded guest always does, but for 100 percent.
async fn protect(world: &World, min_run_percent: u8) {
    let ordered = host::protect(&world.wire.address, Mode::Colo);
    world.a.order(Request::Protect(Protect { min_run_percent: Some(min_run_percent), ..ordered })).await;
    world.a.becomes(Protection::Protected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_that_keeps_diverging_is_told_with_its_reason() {
    let world = World::start(Plan { fence: false, diverge: 100, ..Plan::default() }).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    let often = |status: &Status| status.flows.iter().any(|flow| flow.keeps_diverging);
    let status = world.a.is("a flow that keeps diverging", often).await;
    let told = status.to_string();
    assert!(told.contains("flow        ") && told.contains("last because outputs differ, KEEPS DIVERGING"), "{told}");
    assert!(status.flows.iter().all(|flow| flow.diverged > 0 && flow.flow.contains("10.77.0.2")), "{told}");
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_copies_that_agree_no_flow_is_told() {
    let world = World::start(Plan { fence: false, ..Plan::default() }).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    load.goes_on(20).await;
    assert!(world.a.status().await.flows.is_empty());
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lock_step_that_does_not_pay_is_given_up_and_tried_again() {
    let world = World::start(Plan { fence: false, diverge: 100, ..Plan::default() }).await;
    let load = world.load();
    protect(&world, 100).await;
    let buffering = |status: &Status| status.lock_step.is_some_and(|it| it.buffering);
    let status = world.a.is("output that is buffered", buffering).await;
    assert!(status.to_string().contains("lock-step   GIVEN UP for now: the guests differ too often"), "{status}");
    let (compared, waits) = (status.packets.compared, status.checkpoints.by_cause.get("output-waits").copied());
    // Served as in Remus meanwhile.
    load.goes_on(20).await;
    let status = world.a.is("a trial that failed", |status| status.lock_step.is_some_and(|it| it.given_up > 1)).await;
    assert!(status.checkpoints.by_cause.get("output-waits").copied() > waits, "{status}");
    assert!(status.packets.compared > compared, "it was not tried: {status}");
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_output_is_buffered_survives_its_host() {
    let mut world = World::start(Plan { diverge: 100, ..Plan::default() }).await;
    let load = world.load();
    protect(&world, 100).await;
    world.a.is("output that is buffered", |status| status.lock_step.is_some_and(|it| it.buffering)).await;
    load.goes_on(20).await;
    world.a.kill();
    load.live.mark_kill();
    world.b.becomes(Protection::TakenOver).await;
    load.survives(20).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_wants_lock_step_at_any_price_has_it() {
    let world = World::start(Plan { fence: false, diverge: 100, ..Plan::default() }).await;
    let load = world.load();
    protect(&world, 0).await;
    load.goes_on(200).await;
    let status = world.a.status().await;
    assert!(status.lock_step.is_none() && status.checkpoints.total > 16, "{status}");
    load.ends_unharmed().await;
}
