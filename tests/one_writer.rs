//! An image has one writer: whoever comes second is told so, has changed nothing, and gets it when the first has gone.

use crate::common::host::{Host, protect};
use crate::common::{Listening, XL_COLO, one_line, turn, xl_colo};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::qmp::client::Monitor;
use xen_colo::daemon::status::Protection;

const WHY: &str = "is in use: another process has it open";

async fn tries_to_serve(dir: &Path, image: &Path) -> String {
    let socket = dir.join("nbd");
    one_line(&xl_colo(&["nbd", "-k", socket.to_str().unwrap(), image.to_str().unwrap()]).await, 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_of_a_running_guest_is_refused_to_all_others() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let [image, link] = ["image", "link"].map(|name| dir.path().join(name));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    std::os::unix::fs::symlink(&image, &link).unwrap();
    let start = |name: &str, image: &Path, more: &[&str]| {
        let mut command = Command::new(XL_COLO);
        command.args(["host", "--follow-stdin", "--name", name, "--listen", "127.0.0.1:0", "--policy", "alone"]);
        command.arg("--run-dir").arg(dir.path()).arg("--disk").arg(image).args(more);
        Host::start(name, dir.path(), command)
    };
    let mut a = start("a", &image, &["--guest", "web"]);
    let second = xl_colo(
        &[
            ["host", "--name", "c", "--listen", "127.0.0.1:0", "--policy", "alone", "--guest", "web"].as_slice(),
            &["--run-dir", dir.path().to_str().unwrap(), "--disk", link.to_str().unwrap()],
        ]
        .concat(),
    )
    .await;
    assert!(one_line(&second, 4).contains(WHY), "{second:?}");
    assert!(tries_to_serve(dir.path(), &image).await.contains("in use"), "a running guest's disk was served");

    // A host that would stand by with it says so to the primary, and stands by when it can.
    let b = start("b", &link, &[]);
    let d = start("d", &dir.path().join("other"), &["--guest", "shop", "--disk-mib", "1"]);
    let why = d.refusal(Request::Protect(protect(&b.address, Mode::Remus))).await;
    assert!(why.contains(&format!("host b: {} {WHY}", link.display())), "{why}");
    a.kill();
    d.order(Request::Protect(protect(&b.address, Mode::Remus))).await;
    d.becomes(Protection::Protected).await;
    assert!(tries_to_serve(dir.path(), &image).await.contains("in use"), "a replica was served");
}

/// The replica's own handle is the one that was locked, and not another on the same file.
#[tokio::test(flavor = "multi_thread")]
async fn a_monitors_image_stays_its_own_when_it_becomes_a_replica() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("monitor"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let drive = format!("if=none,id=disk0,format=raw,file={}", image.display());
    let top = "if=none,id=top,driver=replication,mode=secondary,top-id=top,file.driver=qcow2,\
               file.file.filename=a,file.backing.driver=qcow2,file.backing.file.filename=h,file.backing.backing=disk0";
    let mut command = Command::new(XL_COLO);
    command.arg("qmp").arg("--socket").arg(&socket).args(["--drive", &drive, "--drive", top]);
    let _process = Listening::start(&mut command, &socket);
    let mut monitor = Monitor::connect(&socket, crate::common::PATIENCE).await.unwrap();
    for step in 0..3 {
        assert!(tries_to_serve(dir.path(), &image).await.contains("in use"), "served at step {step}");
        let (command, arguments) = match step {
            0 => ("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": dir.path().join("export")}}})),
            1 => ("xen-set-replication", json!({"enable": true, "primary": false})),
            _ => break,
        };
        monitor.execute(command, &arguments).await.unwrap();
    }
}
