//! A guest with two disks, which writes all it writes on both: whatever happens to a host, both say the same.

use crate::common::host::{Host, host_command};
use crate::common::world::{Plan, World};
use crate::common::{one_line, turn, xl_colo};
use std::collections::BTreeMap;
use std::path::Path;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::{Disk, Protection};
use xen_colo::disk::FileDisk;
use xen_colo::hypervisor::embedded::kv;

fn plan() -> Plan {
    Plan { disks: 2, ..Plan::default() }
}

fn contents(image: &Path) -> BTreeMap<String, Vec<u8>> {
    kv::scan(&mut FileDisk::open(image).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_disks_of_a_survivor_hold_all_that_was_promised() {
    for mode in [Mode::Remus, Mode::Colo] {
        let mut world = World::start(plan()).await;
        let load = world.load();
        world.protect(mode).await;
        load.goes_on(50).await;
        let status = world.a.status().await;
        let names: Vec<_> = status.disks.iter().filter_map(|disk| disk.name.as_deref()).collect();
        assert_eq!(names, ["disk0", "disk1"], "{status:#?}");
        assert!(status.disks.iter().all(|disk| disk.total_bytes == 64 << 20), "{status:#?}");
        load.live.mark_kill();
        world.a.kill();
        world.b.becomes(Protection::TakenOver).await;
        load.survives(20).await;
        load.ends_unharmed().await;
        let images = [world.path("disk-b.img"), world.path("disk1-b.img")];
        world
            .b
            .is("with both disks its own", |status| {
                status.disks.iter().all(|disk| disk.image.as_deref() == Some("whole: a guest's own disk"))
            })
            .await;
        world.b.order(Request::Stop).await;
        world.b.exit().await;
        let [first, second] = images.map(|image| contents(&image));
        assert!(first.len() > 50 && first == second, "{mode}: {} and {} keys", first.len(), second.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_with_another_number_of_images_is_refused() {
    let world = World::start(plan()).await;
    let lone = {
        let mut command = host_command("lone", &world.path(""));
        command.args(["--policy", "alone"]);
        Host::start("lone", &world.path(""), command)
    };
    let protect = crate::common::host::protect(&lone.address, Mode::Remus);
    let refused = world.a.refusal(Request::Protect(protect)).await;
    assert!(refused.contains("the guest has 2 disk(s), and this host was given 1 image(s)"), "{refused}");
    assert_eq!(lone.status().await.protection, Protection::Empty);
}

/// Both hosts die: a guest is booted on both images of the checkpoint that is left, in their order, or on none.
#[tokio::test(flavor = "multi_thread")]
async fn the_images_of_a_checkpoint_are_taken_up_together() {
    let mut world = World::start(plan()).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    load.goes_on(50).await;
    load.ends_unharmed().await;
    let is_checkpoint = |image: &Option<String>| image.as_ref().is_some_and(|image| image.starts_with("whole: check"));
    // What is sealed and not applied yet would be lost with the process, and the image an older checkpoint.
    let is_level = |disk: &Disk| disk.waiting_bytes == 0 && is_checkpoint(&disk.image);
    world.b.is("level", |status| status.disks.iter().all(is_level)).await;
    world.b.kill();
    world.a.kill();
    let (first, second) = (world.path("disk-b.img"), world.path("disk1-b.img"));
    let dir = world.path("");
    let apart = "is not whole with the guest's other disks";
    let twice = "is named for two disks";
    for (images, why) in
        [(&[&second, &first][..], apart), (&[&first], apart), (&[&second], apart), (&[&first, &first], twice)]
    {
        let mut arguments = vec!["host", "--name", "b", "--listen", "127.0.0.1:0", "--policy", "alone"];
        arguments.extend(["--guest", "web", "--run-dir", dir.to_str().unwrap()]);
        images.iter().for_each(|image| arguments.extend(["--disk", image.to_str().unwrap()]));
        let refused = one_line(&xl_colo(&arguments).await, 4);
        assert!(refused.contains(why), "{images:?}: {refused}");
    }
    let mut command = host_command("b", &dir);
    command.arg("--disk").arg(&second);
    command.args(["--policy", "alone", "--guest", "web", "--guest-mib", "16"]);
    let mut b = Host::start("b", &dir, command);
    assert_eq!(b.status().await.protection, Protection::Unprotected);
    b.order(Request::Stop).await;
    b.exit().await;
    let (first, second) = (contents(&first), contents(&second));
    assert!(first.len() > 50 && first == second, "{} and {} keys", first.len(), second.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_names_of_one_image_are_refused() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let (image, link) = (dir.path().join("image"), dir.path().join("link"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    std::os::unix::fs::symlink(&image, &link).unwrap();
    let (run_dir, image, link) = (dir.path().to_str().unwrap(), image.to_str().unwrap(), link.to_str().unwrap());
    let arguments = ["host", "--name", "a", "--listen", "127.0.0.1:0", "--policy", "alone", "--run-dir", run_dir];
    let output = xl_colo(&[&arguments[..], &["--guest", "web", "--disk", image, "--disk", link]].concat()).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("is named for two disks"), "{said}");
    assert_eq!(output.status.code(), Some(4));
}
