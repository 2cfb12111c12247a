//! A guest whose copies keep answering differently: which of its flows do is told.

use crate::common::world::{Plan, World};
use xen_colo::colo::hello::Mode;

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_that_keeps_diverging_is_told_with_its_reason() {
    let world = World::start(Plan { fence: false, diverge: 100, ..Plan::default() }).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    let often = |status: &xen_colo::daemon::status::Status| status.flows.iter().any(|flow| flow.keeps_diverging);
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
