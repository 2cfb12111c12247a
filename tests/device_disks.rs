//! What is under a disk of a real QEMU is exchanged while the disk is in use: our export, the image, our export again.

use crate::common::{Listening, PATIENCE, XL_COLO, installed};
use crate::device_model::qmp::{Backing, Client, DeviceModel};
use serde_json::json;
use std::path::Path;
use std::process::Command;

const DISK: &str = "disk0";
const ROUNDS: u8 = 4;
const MIB: usize = 1 << 20;

fn serve(image: &Path, socket: &Path) -> Listening {
    let mut command = Command::new(XL_COLO);
    command.args(["nbd", "-t", "-f", "raw", "-x", DISK, "-k"]).args([socket, image]);
    Listening::start(&mut command, socket)
}

/// As a guest would, by the name that libxl's drives have. What comes of it is on QEMU's standard output.
fn drive(machine: &mut DeviceModel, order: &str) {
    let line = json!({ "command-line": format!("qemu-io ide0-hd0 \"{order}\"") });
    machine.client().execute("human-monitor-command", line).unwrap();
}

#[test]
fn a_disk_outlives_its_export_on_the_image_and_comes_back() {
    let Some(program) = installed("qemu-system-x86_64") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (image, socket, monitor) = (dir.path().join("image"), dir.path().join("disk0.sock"), dir.path().join("qmp"));
    std::fs::write(&image, vec![0; MIB]).unwrap();
    let mut server = serve(&image, &socket);
    let mut command = Command::new(program);
    command
        .args([
            "-machine",
            "pc,accel=tcg",
            "-m",
            "64",
            "-S",
            "-nodefaults",
            "-display",
            "none",
            "-serial",
            "null",
            "-drive",
        ])
        // As libxl says it.
        .arg(format!(
            "file=nbd:unix:{}:exportname={DISK},if=ide,index=0,media=disk,format=raw,cache=writeback",
            socket.display()
        ))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", monitor.display()));
    let output = dir.path().join("output");
    command.stdout(std::fs::File::create(&output).unwrap());
    let _qemu = Listening::start(&mut command, &monitor);
    let mut machine = DeviceModel::new(Client::connect(&monitor, PATIENCE).unwrap());
    let export = Backing::Nbd { socket: &socket, export: DISK };
    let plain = Backing::Image { path: &image, is_device: false };
    let nodes = |machine: &mut DeviceModel| {
        let nodes = machine.client().execute("query-named-block-nodes", json!({})).unwrap();
        nodes.as_array().unwrap().len()
    };
    let at_first = nodes(&mut machine);

    let absent = dir.path().join("absent");
    let nowhere = Backing::Image { path: &absent, is_device: false };
    let refused = machine.move_disk(DISK, export, nowhere).unwrap_err().to_string();
    assert!(refused.contains("absent"), "{refused}");
    assert!(!machine.move_disk("disk1", plain, export).unwrap(), "it has no such disk");
    drive(&mut machine, "write -P 99 0 4k");

    for round in 1..=ROUNDS {
        let (to_export, to_image) = (usize::from(round) * 128 * 1024, usize::from(round) * 128 * 1024 + 65536);
        drive(&mut machine, &format!("write -P {round} {to_export} 64k"));
        assert!(machine.move_disk(DISK, export, plain).unwrap());
        assert!(!machine.move_disk(DISK, export, plain).unwrap(), "it has no export any more");
        // Whatever it does from now on, it does by itself.
        drop(server);
        std::fs::remove_file(&socket).unwrap();
        drive(&mut machine, &format!("write -P {} {to_image} 64k", 100 + round));
        drive(&mut machine, &format!("read -P {round} {to_export} 64k"));
        server = serve(&image, &socket);
        assert!(machine.move_disk(DISK, plain, export).unwrap());
        drive(&mut machine, &format!("read -P {} {to_image} 64k", 100 + round));
        drive(&mut machine, "flush");
        let bytes = std::fs::read(&image).unwrap();
        assert!(bytes[to_export..to_image].iter().all(|byte| *byte == round), "round {round}");
        assert!(bytes[to_image..to_image + 65536].iter().all(|byte| *byte == 100 + round), "round {round}");
        assert_eq!(nodes(&mut machine), at_first, "round {round}: nothing is left behind");
    }
    let jobs = machine.client().execute("query-jobs", json!({})).unwrap();
    assert_eq!(jobs, json!([]));
    let said = std::fs::read_to_string(&output).unwrap();
    assert_eq!(said.matches("read 65536/65536").count(), 2 * usize::from(ROUNDS), "{said}");
    assert!(!said.contains("rror") && !said.contains("failed"), "{said}");
}
