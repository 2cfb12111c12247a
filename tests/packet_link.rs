//! The packet link breaks or falls silent, and nothing else: the pair goes on, by checkpoints while there is none, and nothing
//! leaves that the secondary cannot explain.

use crate::common::until;
use crate::common::world::{Plan, World};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::status::Protection;

/// Stream, and then the packets; heartbeat and disk follow.
const PACKET_LINK: usize = 1;
/// Further connections are counted behind those four.
const FIRST_LINKS: usize = 4;
const CUTS: usize = 8;

fn plan() -> Plan {
    Plan { fence: false, ..Plan::default() }
}

/// The number of the `nth` packet link.
fn link(nth: usize) -> usize {
    if nth == 0 { PACKET_LINK } else { FIRST_LINKS + nth - 1 }
}

async fn links(world: &World, count: usize) {
    until("another link", async || {
        let connections = world.wire.connections();
        if connections >= count { Ok(()) } else { Err(connections) }
    })
    .await;
}

/// Cuts it again and again while a client writes, waits until each is made good, then kills the primary.
#[tokio::test(flavor = "multi_thread")]
async fn a_pair_outlives_its_packet_links() {
    for mode in [Mode::Colo, Mode::Remus] {
        let mut world = World::start(plan()).await;
        let load = world.load();
        world.protect(mode).await;
        for cut in 0..CUTS {
            load.goes_on(10).await;
            world.wire.cut(link(cut));
            links(&world, FIRST_LINKS + cut + 1).await;
        }
        load.goes_on(10).await;
        let sound = |host: &xen_colo::daemon::status::Status| {
            host.degraded.is_empty() && host.packet_link_losses as usize == CUTS
        };
        let status = world.a.is("whole again", sound).await;
        assert_eq!((status.protection, status.generation), (Protection::Protected, 1), "{status:#?}");
        assert!(status.to_string().contains("\npacket link lost 8 times, and made again"), "{status}");
        world.b.is("whole again", |status| status.degraded.is_empty()).await;
        if mode == Mode::Colo {
            // In lock-step again: packets are compared, not only let go by checkpoints.
            let compared = status.packets.compared;
            load.goes_on(10).await;
            world.a.is("comparing", |status| status.packets.compared > compared).await;
        }
        load.live.mark_kill();
        world.a.kill();
        world.b.becomes(Protection::TakenOver).await;
        load.survives(20).await;
        load.ends_unharmed().await;
    }
}

/// Without a packet link the service goes on at the pace of checkpoints, and everybody can see why.
#[tokio::test(flavor = "multi_thread")]
async fn without_its_packet_link_a_pair_is_degraded_and_serves() {
    let world = World::start(plan()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(10).await;
    world.wire.refuse();
    world.wire.cut(PACKET_LINK);
    let status = world.a.is("degraded", |status| !status.degraded.is_empty()).await;
    assert_eq!(status.protection, Protection::Protected);
    let told = status.to_string();
    // A reset, if something had not been read.
    let closed = ["closed by the peer", "Connection reset by peer (os error 104)"].map(|why| {
        format!("\nDEGRADED    the packet link was lost ({why}) and is being made again; packets leave with checkpoints only")
    });
    assert!(closed.iter().any(|closed| told.contains(closed)), "{told}");
    world.b.is("degraded", |status| !status.degraded.is_empty()).await;
    load.goes_on(10).await;
    let status = world.a.status().await;
    assert!(status.checkpoints.by_cause.contains_key("packet-link"), "{status:#?}");
    world.wire.accept();
    world.a.is("whole again", |status| status.degraded.is_empty()).await;
    load.goes_on(10).await;
    assert_eq!(world.a.status().await.protection, Protection::Protected);
    load.ends_unharmed().await;
}

/// A connection that carries nothing is as good as none, though it does not end.
#[tokio::test(flavor = "multi_thread")]
async fn a_packet_link_that_falls_silent_is_made_again() {
    let world = World::start(plan()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(10).await;
    world.wire.stall(PACKET_LINK);
    links(&world, FIRST_LINKS + 1).await;
    let sound = |status: &xen_colo::daemon::status::Status| status.packet_link_losses > 0 && status.degraded.is_empty();
    let status = world.a.is("whole again", sound).await;
    assert_eq!((status.protection, status.generation), (Protection::Protected, 1), "{status:#?}");
    load.goes_on(20).await;
    load.ends_unharmed().await;
}

/// A peer that lives and answers, but for its packet link: the protection ends, and says of what.
#[tokio::test(flavor = "multi_thread")]
async fn for_too_long_without_its_packet_link_the_pair_ends() {
    let world = World::start(plan()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(10).await;
    world.wire.refuse();
    world.wire.cut(PACKET_LINK);
    load.goes_on(10).await;
    load.live.mark_kill();
    if world.one_survives().await {
        let why = world.a.status().await.why.unwrap_or_default();
        assert!(why.contains("packet link: no connection for 10s: "), "{why}");
    }
    load.survives(20).await;
    load.ends_unharmed().await;
}
