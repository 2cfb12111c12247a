//! Digests instead of payloads on the packet link.

use crate::common::host;
use crate::common::world::{Plan, World};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::{Protect, Request};
use xen_colo::daemon::status::{Protection, Status};

async fn protected(diverge: u8) -> World {
    let world = World::start(Plan { diverge, ..Plan::default() }).await;
    let protect = Protect { packet_digests: true, ..host::protect(&world.wire.address, Mode::Colo) };
    world.a.order(Request::Protect(protect)).await;
    world.a.becomes(Protection::Protected).await;
    world
}

fn counts(status: &Status) -> (u64, u64) {
    let digests = status.digests.unwrap_or_default();
    (digests.summaries.unwrap_or(0), digests.looked_into.unwrap_or(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_that_agree_are_compared_by_digest_and_nothing_is_lost() {
    let mut world = protected(0).await;
    let load = world.load();
    let status = world.a.is("compared by digest", |status| counts(status).0 > 200).await;
    assert!(counts(&status).1 < counts(&status).0 / 2, "most had to be looked into: {status}");
    assert!(status.packets.compared > 100, "{status}");
    let saved = world.b.status().await.digests.and_then(|digests| digests.saved_bytes);
    assert!(saved > Some(1000), "{saved:?}");
    load.live.mark_kill();
    world.a.kill();
    world.b.becomes(Protection::TakenOver).await;
    load.survives(20).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_differs_is_found_by_its_digest_and_asks_for_a_checkpoint() {
    let world = protected(100).await;
    let load = world.load();
    let differs = |status: &Status| status.checkpoints.by_cause.get("payload-differs").is_some_and(|count| *count > 3);
    let status = world.a.is("checkpoints by difference", differs).await;
    assert!(counts(&status).1 > 0, "a difference that was not looked into: {status}");
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn remus_has_no_use_for_digests() {
    let world = World::start(Plan::default()).await;
    let protect = Protect { packet_digests: true, ..host::protect(&world.wire.address, Mode::Remus) };
    world.a.order(Request::Protect(protect)).await;
    assert!(world.a.becomes(Protection::Protected).await.digests.is_none());
}
