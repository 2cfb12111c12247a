//! A secondary that comes back is sent what it lacks, and not the disk. The counters say how much, and by what means.

use crate::common::host::{Host, host_command, protect};
use crate::common::until;
use crate::common::world::{Plan, World};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::{Disk, Protection};

/// A few of the guest's writes, all of which are on its disk.
async fn writes(world: &World) {
    let load = world.load();
    load.goes_on(20).await;
    load.ends_unharmed().await;
}

async fn protects(world: &World) -> Disk {
    world.a.order(Request::Protect(protect(&world.b.address, Mode::Remus))).await;
    let disk = world.a.becomes(Protection::Protected).await.disk;
    assert_eq!(disk.sent_bytes + disk.skipped_bytes, disk.total_bytes, "{disk:?}");
    assert!(disk.sent_bytes > 0 && disk.sent_bytes < disk.total_bytes / 8, "{disk:?}");
    disk
}

/// All that host b owns is in its image.
async fn applied(world: &World) {
    world
        .b
        .is("level", |status| {
            let image = status.disk.image.as_deref().unwrap_or_default();
            status.disk.waiting_bytes == 0 && image.starts_with("whole: checkpoint")
        })
        .await;
}

async fn lets_go(world: &World) {
    world.a.order(Request::Unprotect).await;
    world.b.becomes(Protection::Empty).await;
    let read = |name: &str| std::fs::read(world.path(name)).unwrap();
    assert!(read("disk-a.img") == read("disk-b.img"), "the images are byte for byte the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_that_comes_back_is_sent_what_it_lacks() {
    let mut world = World::start(Plan { fence: false, ..Plan::default() }).await;
    writes(&world).await;
    assert_eq!(protects(&world).await.resync.as_deref(), Some("nonzero"), "its image is new");
    writes(&world).await;
    lets_go(&world).await;

    writes(&world).await;
    let disk = protects(&world).await;
    assert_eq!(disk.resync.as_deref(), Some("changed"), "{disk:?}");
    writes(&world).await;
    until("both are level", async || {
        applied(&world).await;
        let (a, b) = (world.a.status().await, world.b.status().await);
        // Nothing is left that a later checkpoint would bring.
        if a.disk.waiting_bytes == 0 && a.epoch == b.epoch { Ok(()) } else { Err((a.epoch, b.epoch)) }
    })
    .await;

    world.b.kill();
    world.a.becomes(Protection::TakenOver).await;
    writes(&world).await;
    let mut command = host_command("b", &world.path(""));
    command.args(["--policy", "arbiter", "--arbiter", &world.arbiter_b.address.to_string()]);
    world.b = Host::start("b", &world.path(""), command);
    let disk = protects(&world).await;
    assert_eq!(disk.resync.as_deref(), Some("changed"), "its record outlived it: {disk:?}");
    lets_go(&world).await;

    std::fs::remove_file(world.path("disk-b.img.colo-state")).unwrap();
    writes(&world).await;
    let disk = protects(&world).await;
    assert_eq!(disk.resync.as_deref(), Some("differing"), "nobody knows what it is: {disk:?}");
    lets_go(&world).await;
}
