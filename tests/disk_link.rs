//! The connection of a disk breaks, and nothing else: the pair goes on over the next one, and no write is lost, done twice
//! or out of order.

use crate::common::until;
use crate::common::world::{Plan, World};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::events::{Told, Wanted, What};
use xen_colo::daemon::status::{Health, Protection};

/// Stream, packets, heartbeat, and then the disk: b's image is new, so nobody asks for its hashes.
const DISK_LINK: usize = 3;
const CUTS: usize = 12;

fn plan() -> Plan {
    Plan { fence: false, ..Plan::default() }
}

/// Cuts the disk's connection, again and again, while a client writes.
async fn cut_again_and_again(world: &World, load: &crate::common::load::Load) {
    for cut in 0..CUTS {
        load.goes_on(10).await;
        world.wire.cut(DISK_LINK + cut);
        until("another link", async || {
            let connections = world.wire.connections();
            if connections > DISK_LINK + cut + 1 { Ok(()) } else { Err(connections) }
        })
        .await;
    }
    let status = world.a.status().await;
    assert_eq!((status.protection, status.generation), (Protection::Protected, 1), "{status:#?}");
    let told = status.to_string();
    assert!(status.disk_link_losses as usize >= CUTS - 1, "{told}");
    assert!(told.contains("disk links  lost "), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_outlives_the_connections_of_its_disk() {
    for mode in [Mode::Remus, Mode::Colo] {
        let mut world = World::start(plan()).await;
        let load = world.load();
        world.protect(mode).await;
        cut_again_and_again(&world, &load).await;
        load.goes_on(10).await;
        load.live.mark_kill();
        world.a.kill();
        world.b.becomes(Protection::TakenOver).await;
        load.survives(20).await;
        load.ends_unharmed().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_all_of_them_the_images_are_the_same() {
    let world = World::start(plan()).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    cut_again_and_again(&world, &load).await;
    load.ends_unharmed().await;
    let told = world.a.ask(Request::Events(Wanted::default())).await.unwrap();
    let told: Told = serde_json::from_value(told).unwrap();
    let kinds: Vec<_> = told.events.iter().map(|event| &event.what).collect();
    let lost = kinds.iter().filter(|what| matches!(what, What::LinkLost { link, .. } if link == "disk")).count();
    let back = kinds.iter().filter(|what| matches!(what, What::LinkBack { link } if link == "disk")).count();
    assert!(back > 0 && back <= lost && lost <= CUTS, "{lost} lost, {back} back: {kinds:#?}");
    let checkpoints = world.b.status().await.checkpoints.total;
    world.a.order(Request::Checkpoint).await;
    let owned = world.b.is("a checkpoint more", |status| status.checkpoints.total > checkpoints).await;
    assert_eq!(owned.disk.fenced_writes, 0);
    world.a.order(Request::Unprotect).await;
    world.b.becomes(Protection::Empty).await;
    let read = |name: &str| std::fs::read(world.path(name)).unwrap();
    assert!(read("disk-a.img") == read("disk-b.img"), "byte for byte");
}

/// The peer lives and answers, but for its disk: no checkpoint can be taken, and the guest must not wait for ever.
#[tokio::test(flavor = "multi_thread")]
async fn without_its_disk_link_the_pair_ends() {
    let world = World::start(plan()).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    load.goes_on(10).await;
    world.wire.refuse();
    world.wire.cut(DISK_LINK);
    let status = world.a.is("degraded", |status| status.health == Health::Degraded).await;
    assert_eq!(status.degraded, ["the connection of a disk was lost, and is being made again"]);
    load.live.mark_kill();
    // The primary gives up first, and then both ask the arbiter: either may win.
    if world.one_survives().await {
        let why = world.a.status().await.why.unwrap_or_default();
        // Either the link says so first, or a write that was under way.
        assert!(why.contains("no connection to the NBD server for 10s"), "{why}");
    }
    load.survives(20).await;
    load.ends_unharmed().await;
}
