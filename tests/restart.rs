//! A host that is killed and started again: what it makes of its disk image.
//!
//! | killed | the image is | a guest may be booted on it |
//! |---|---|---|
//! | during the first copy | not whole | no, until the record is removed by hand |
//! | standing by, the checkpoint in the image | that checkpoint | yes |
//! | after a takeover, all of it in the image | the guest's own disk | yes |
//! | asked to end after a takeover | the guest's own disk: it is all put there first | yes |

use crate::common::host::{Host, host_command};
use crate::common::peer::ScriptedPrimary;
use crate::common::world::{Plan, World};
use crate::common::{one_line, turn, xl_colo};
use std::path::Path;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::status::Protection;
use xen_colo::replica::state::{Standing, found};

/// Host b, with a guest of its own if told so.
fn start(dir: &Path, with_guest: bool) -> Host {
    let mut command = host_command("b", dir);
    command.args(["--policy", "alone"]);
    if with_guest {
        command.args(["--guest", "web", "--guest-mib", "16", "--disk-mib", "4"]);
    }
    Host::start("b", dir, command)
}

async fn image_becomes(b: &Host, wanted: &str) {
    let says = format!("the image of host b is {wanted}");
    b.is(&says, |status| status.disk.image.as_ref().is_some_and(|image| image.contains(wanted))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_copy_is_no_disk_until_somebody_says_so() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut b = start(dir.path(), false);
    let _primary = ScriptedPrimary::joins(&b.address, 1).await;
    image_becomes(&b, "not whole: the copy").await;
    b.kill();
    let mut b = start(dir.path(), false);
    image_becomes(&b, "not whole: the copy").await;
    b.kill();

    let (run_dir, image) = (dir.path().to_str().unwrap(), dir.path().join("disk-b.img"));
    let host = ["host", "--name", "b", "--listen", "127.0.0.1:0", "--policy", "alone", "--guest", "web"];
    let output = xl_colo(&[&host[..], &["--run-dir", run_dir, "--disk", image.to_str().unwrap()]].concat()).await;
    let why = one_line(&output, 4);
    assert!(why.contains("disk-b.img is not whole: the copy of the primary's disk was not finished"), "{why}");
    assert!(why.contains("remove ") && why.trim_end().ends_with("disk-b.img.colo-state"), "{why}");

    std::fs::remove_file(dir.path().join("disk-b.img.colo-state")).unwrap();
    start(dir.path(), true).becomes(Protection::Unprotected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_was_applied_is_a_disk() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut b = start(dir.path(), false);
    let mut primary = ScriptedPrimary::joins(&b.address, 1).await;
    primary.copies().await;
    image_becomes(&b, "whole: checkpoint 1 of generation").await;
    b.kill();
    let mut b = start(dir.path(), true);
    b.becomes(Protection::Unprotected).await;
    b.kill();
    image_becomes(&start(dir.path(), false), "a guest's own disk").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_that_is_killed_too_boots_from_its_own_disk() {
    let mut world = World::start(Plan::default()).await;
    world.protect(Mode::Colo).await;
    let load = world.load();
    load.goes_on(20).await;
    load.live.mark_kill();
    world.a.kill();
    world.b.becomes(Protection::TakenOver).await;
    load.survives(20).await;
    image_becomes(&world.b, "whole: a guest's own disk").await;
    load.ends_unharmed().await;
    world.b.kill();
    start(&world.path(""), true).becomes(Protection::Unprotected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_that_is_asked_to_end_puts_everything_into_its_image_first() {
    let mut world = World::start(Plan::default()).await;
    world.protect(Mode::Colo).await;
    world.a.kill();
    // It takes over, and nothing is merged yet when it could end; no guest flushes, which would merge it too.
    world.b.signal("TERM").await;
    assert!(world.b.exit().await.success(), "{}", world.b.log());
    // A checkpoint would be whole as well, and without what the guest has promised since.
    assert_eq!(found(&world.path("disk-b.img")).unwrap(), Standing::Guest);
    start(&world.path(""), true).becomes(Protection::Unprotected).await;
}
