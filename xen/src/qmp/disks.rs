//! What a running device model has under a guest's disk, exchanged: the export of whoever protects the guest, or the image
//! itself, when nobody does any more.
//!
//! ```text
//!   hda ── nbd:unix:…:exportname=disk0      blockdev-add ─▶ blockdev-mirror, sync none ─▶ ready ─▶ job-complete      hda ── image
//!            └─ xl-colo ── image                   any of these fails: as it was
//! ```
//!
//! Both lead to the same bytes, so nothing is copied. The trap: what the guest writes while the mirror stands is copied too,
//! later, from the image to itself, and over what was written since. The domain must be paused; QEMU finishes what is under way
//! before the mirror stands. The image is opened without QEMU's lock: for a moment both hold it.

use super::device_model::DeviceModel;
use super::{Client, QmpError};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to trust that an event will tell, before asking.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// What may be under a disk.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// An export on a unix socket.
    Nbd {
        /// The server's socket.
        socket: &'a Path,
        /// The export.
        export: &'a str,
    },
    /// An image, raw.
    Image {
        /// Its file, or its block device.
        path: &'a Path,
        /// It is a block device.
        is_device: bool,
    },
}

impl Backing<'_> {
    /// The name of the node that we make of it.
    fn node_name(&self, disk: &str) -> String {
        match self {
            Self::Nbd { .. } => format!("colo-export-{disk}"),
            Self::Image { .. } => format!("colo-image-{disk}"),
        }
    }

    fn node(&self, disk: &str) -> Value {
        let file = match self {
            Self::Nbd { socket, export } => {
                json!({ "driver": "nbd", "server": { "type": "unix", "path": socket }, "export": export })
            }
            Self::Image { path, is_device } => {
                let driver = if *is_device { "host_device" } else { "file" };
                json!({ "driver": driver, "filename": path, "locking": "off", "discard": "unmap" })
            }
        };
        json!({ "driver": "raw", "node-name": self.node_name(disk), "discard": "unmap", "file": file })
    }

    /// Whether this is what is under a drive: we made it, or libxl did.
    fn is_under(&self, disk: &str, inserted: &Value) -> bool {
        let made_by_libxl = match self {
            Self::Nbd { socket, .. } => {
                let file = inserted["file"].as_str().unwrap_or_default();
                file.contains("nbd") && socket.to_str().is_some_and(|socket| file.contains(socket))
            }
            Self::Image { .. } => false,
        };
        made_by_libxl || inserted["node-name"] == self.node_name(disk).as_str()
    }
}

impl DeviceModel {
    /// Exchanges what is under the guest's disk. The domain must be paused. False when the device model has no such disk: a
    /// guest may have only PV ones. On failure it is as it was.
    pub fn move_disk(&mut self, disk: &str, from: Backing, to: Backing) -> Result<bool, QmpError> {
        let client = self.client();
        let blocks = client.execute("query-block", json!({}))?;
        let inserted = |block: &Value| block["inserted"].clone();
        let mut drives = blocks.as_array().into_iter().flatten().map(inserted);
        let Some(drive) = drives.find(|drive| from.is_under(disk, drive)) else { return Ok(false) };
        let old = drive["node-name"].as_str().unwrap_or_default();
        let new = to.node_name(disk);
        // One that an earlier attempt left.
        remove(client, &new)?;
        client.execute("blockdev-add", to.node(disk))?;
        let moved = mirror(client, old, &new);
        // What libxl made goes by itself when it is under nothing any more.
        let unused = if moved.is_err() { &new } else { old };
        let removed = if unused.starts_with("colo-") { remove(client, unused) } else { Ok(()) };
        client.forget_events(|event| event.name.starts_with("JOB_") || event.name.starts_with("BLOCK_JOB_"));
        moved.and(removed).map(|()| true)
    }
}

fn mirror(client: &mut Client, from: &str, to: &str) -> Result<(), QmpError> {
    let job = json!({ "job-id": to, "device": from, "target": to, "sync": "none", "auto-dismiss": false });
    client.execute("blockdev-mirror", job)?;
    let mirrored = follow(client, to);
    if mirrored.is_err() {
        let _ = client.execute("block-job-cancel", json!({ "device": to, "force": true }));
        let _ = follow(client, to);
    }
    let dismissed = client.execute("job-dismiss", json!({ "id": to }));
    mirrored.and(dismissed.map(drop))
}

/// Lets a job end when it is ready to, and waits until it has. An event only says when to ask.
fn follow(client: &mut Client, name: &str) -> Result<(), QmpError> {
    let command = "blockdev-mirror";
    let (begun, mut told) = (Instant::now(), false);
    loop {
        let jobs = client.execute("query-jobs", json!({}))?;
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == name));
        let failed = |desc: &str| Err(QmpError::Job { command: command.into(), desc: desc.to_owned() });
        match job.map(|job| (job["status"].as_str(), job["error"].as_str())) {
            None => return failed("QEMU does not know it any more"),
            Some((Some("concluded"), Some(why))) => return failed(why),
            Some((Some("concluded"), None)) => return Ok(()),
            Some((Some("ready"), _)) if !told => {
                client.execute("job-complete", json!({ "id": name }))?;
                told = true;
                continue;
            }
            Some(_) if begun.elapsed() >= client.deadline => {
                return Err(QmpError::Deadline { command: command.into(), waited: begun.elapsed() });
            }
            Some(_) => client.await_event(command, ASK_AGAIN, |event| event.name == "JOB_STATUS_CHANGE")?,
        }
        client.forget_events(|event| event.name == "JOB_STATUS_CHANGE");
    }
}

/// Removes a node; it need not be there.
fn remove(client: &mut Client, node: &str) -> Result<(), QmpError> {
    match client.execute("blockdev-del", json!({ "node-name": node })) {
        Err(QmpError::Refused { desc, .. }) if desc.starts_with("Failed to find node") => Ok(()),
        done => done.map(drop),
    }
}
