//! The device model of an HVM guest as replication sees it: stop, go on, and its state, out and in, again and again.
//!
//! ```text
//!  out   xen-save-devices-state ─▶ our memfd
//!  in    blockdev-add ─▶ snapshot-load ─▶ job concluded ─▶ query-jobs (its error) ─▶ job-dismiss ─▶ blockdev-del
//!                          any of these fails: the job and the node are removed all the same, now or before the next load
//! ```
//!
//! The state goes in as the VM state of a qcow2 snapshot, because the command meant for it, `xen-load-devices-state`,
//! aborts every QEMU since 6.0 (`util/yank.c`, `yank_unregister_instance: Assertion 'entry' failed`), and
//! `migrate-incoming` works once per process. `snapshot-load` takes a list of disks: the guest's are not in it.
//! A load begins with a reset of all devices, so one that fails leaves a machine that must be loaded again, or dropped.
//!
//! More traps, all seen with QEMU 7.2:
//! - `live: true` (QEMU's default, and what libxl says) inactivates the guest's disks for a migration. A second save
//!   before `cont` then aborts QEMU (`block.c`, `bdrv_inactivate_recurse: Assertion`). A checkpoint is no migration:
//!   we say false.
//! - A stream that was cut off loads "successfully": QEMU reads zeroes behind the image's end.
//! - Two states of a stopped machine differ in the real-time clock (`mc146818rtc`), which follows the host's.
//! - QEMU opens an image on an NBD server that does not answer in its main loop, and serves nobody meanwhile.

use super::{Client, Event, QmpError};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Largest device-model state, in bytes. An e1000 and a serial port make 210 KB; most of it is the e1000's.
pub const STATE_BYTES_MAX: u64 = 64 << 20;
/// Largest image around such a state.
const IMAGE_BYTES_MAX: u64 = STATE_BYTES_MAX + (1 << 20);
/// Loads that may be left behind unfinished before no further one is begun.
const LEFTOVERS_MAX: usize = 8;
/// How long to trust that an event will tell, before asking.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// The snapshot's name in the image.
const TAG: &str = "s";

/// Where QEMU finds the qcow2 image whose one snapshot, `s`, holds the state.
#[derive(Clone, Copy, Debug)]
pub enum Image<'a> {
    /// In these bytes. QEMU gets them as a file descriptor: fastest, and possible in any chroot.
    Bytes(&'a [u8]),
    /// On an NBD server.
    Nbd {
        /// The server's unix socket, as QEMU sees the file system.
        socket: &'a str,
        /// The export.
        export: &'a str,
    },
}

/// A device model, by its monitor.
#[derive(Debug)]
pub struct DeviceModel {
    client: Client,
    saved: Option<SharedMemory>,
    image: Option<SharedMemory>,
    /// Makes names unique in a QEMU that served another client before.
    prefix: String,
    /// Loads begun.
    loads: u64,
    /// Names of loads whose job and node are still to be removed.
    leftovers: Vec<String>,
}

impl DeviceModel {
    /// Takes over a connection.
    #[must_use]
    pub fn new(client: Client) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        // A node's name has 31 characters at most.
        Self { client, saved: None, image: None, prefix: format!("vm{now:x}"), loads: 0, leftovers: Vec::new() }
    }

    /// The connection, for other commands and for events.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Stops the devices: on return no timer fires and no disk request is under way.
    pub fn stop(&mut self) -> Result<(), QmpError> {
        self.client.execute("stop", json!({})).map(drop)
    }

    /// Lets the devices go on.
    pub fn cont(&mut self) -> Result<(), QmpError> {
        self.client.execute("cont", json!({})).map(drop)
    }

    /// Switches whether QEMU reports its own writes to guest memory to Xen's log-dirty map.
    pub fn global_dirty_log(&mut self, enable: bool) -> Result<(), QmpError> {
        self.client.execute("xen-set-global-dirty-log", json!({ "enable": enable })).map(drop)
    }

    /// The state of all devices. The device model should be stopped; QEMU stops it for the time if it is not.
    pub fn save_state(&mut self) -> Result<Vec<u8>, QmpError> {
        // QEMU picks the descriptor of a set that was opened the way it wants to: for saving, to write only.
        let mut memory = match self.saved.take() {
            Some(memory) => memory,
            None => SharedMemory::give(&mut self.client, "device-model state", true)?,
        };
        memory.empty()?;
        let arguments = json!({ "filename": memory.name_in_qemu, "live": false });
        let done = self.client.execute("xen-save-devices-state", arguments);
        let state = done.and_then(|_| memory.contents());
        // After an unanswered save QEMU may yet write there: then the next save gets new memory.
        self.saved = is_answered(&state).then_some(memory);
        state
    }

    /// Replaces the state of all devices by that in the image. The device model must be stopped, and is afterwards.
    ///
    /// On failure the machine's state is undefined, but the next load may succeed.
    pub fn load_state(&mut self, image: Image) -> Result<(), QmpError> {
        self.clear_leftovers()?;
        if self.leftovers.len() >= LEFTOVERS_MAX {
            let desc = format!("{LEFTOVERS_MAX} earlier loads are unfinished");
            return Err(QmpError::Job { command: "snapshot-load".into(), desc });
        }
        let file = self.file_of(image)?;
        self.loads += 1;
        let name = format!("{}-{}", self.prefix, self.loads);
        self.leftovers.push(name.clone());
        let loaded = self.load_from(&name, file);
        if is_answered(&loaded) {
            // Should this fail, the next load will say so.
            let _ = self.clear_leftovers();
        } else {
            // QEMU may yet read there: the next load gets new memory, and removes job and node.
            self.image = None;
        }
        self.client.forget_events(|event| job_of(event).is_some_and(|job| job == name));
        loaded
    }

    fn load_from(&mut self, name: &str, file: Value) -> Result<(), QmpError> {
        let node = json!({ "driver": "qcow2", "node-name": name, "file": file });
        self.client.execute("blockdev-add", node)?;
        let job = json!({ "job-id": name, "tag": TAG, "vmstate": name, "devices": [name] });
        self.client.execute("snapshot-load", job)?;
        self.await_job(name)
    }

    /// Waits for a job's end. The event only says when to ask: it carries no error, and it may have been dropped.
    fn await_job(&mut self, name: &str) -> Result<(), QmpError> {
        let command = "snapshot-load";
        let begun = Instant::now();
        loop {
            self.client.await_event(command, ASK_AGAIN, |event| {
                job_of(event).is_some_and(|job| job == name) && event.data["status"] == "concluded"
            })?;
            let jobs = self.client.execute("query-jobs", json!({}))?;
            let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == name));
            let Some(job) = job else {
                return Err(QmpError::Job { command: command.into(), desc: "QEMU does not know it any more".into() });
            };
            if job["status"] == "concluded" {
                return match job["error"].as_str() {
                    None => Ok(()),
                    Some(desc) => Err(QmpError::Job { command: command.into(), desc: desc.to_owned() }),
                };
            }
            if begun.elapsed() >= self.client.deadline {
                return Err(QmpError::Deadline { command: command.into(), waited: begun.elapsed() });
            }
        }
    }

    /// Removes jobs and nodes of loads that are over, whatever became of them. An error when QEMU does not answer.
    fn clear_leftovers(&mut self) -> Result<(), QmpError> {
        let mut kept = Vec::new();
        while let Some(name) = self.leftovers.pop() {
            let mut cleared = self.client.execute("job-dismiss", json!({ "id": name }));
            if is_answered(&cleared) {
                cleared = self.client.execute("blockdev-del", json!({ "node-name": name }));
            }
            match cleared {
                Ok(_) => {}
                Err(QmpError::Refused { desc, .. }) if desc.starts_with("Failed to find node") => {}
                Err(QmpError::Refused { .. }) => kept.push(name),
                Err(error) => {
                    self.leftovers.push(name);
                    self.leftovers.append(&mut kept);
                    return Err(error);
                }
            }
        }
        self.leftovers = kept;
        Ok(())
    }

    /// The image as the `file` of a block node.
    fn file_of(&mut self, image: Image) -> Result<Value, QmpError> {
        match image {
            Image::Bytes(bytes) => {
                let memory = match &mut self.image {
                    Some(memory) => memory,
                    none => none.insert(SharedMemory::give(&mut self.client, "device-model image", false)?),
                };
                memory.fill(bytes)?;
                // There is nobody to lock it against.
                Ok(json!({ "driver": "file", "filename": memory.name_in_qemu, "locking": "off" }))
            }
            Image::Nbd { socket, export } => {
                let server = json!({ "type": "unix", "path": socket });
                Ok(json!({ "driver": "nbd", "server": server, "export": export }))
            }
        }
    }
}

/// Whether QEMU is known to be done with a command.
fn is_answered<T>(outcome: &Result<T, QmpError>) -> bool {
    !matches!(outcome, Err(QmpError::Deadline { .. } | QmpError::Gone { .. } | QmpError::Protocol { .. }))
}

/// The job that an event is about.
fn job_of(event: &Event) -> Option<&str> {
    (event.name == "JOB_STATUS_CHANGE").then(|| event.data["id"].as_str()).flatten()
}

/// Memory that QEMU can open as a file. It lives in a descriptor set of the monitor, and goes with the connection.
#[derive(Debug)]
struct SharedMemory {
    memory: File,
    /// What QEMU got: its offset is ours too.
    given: File,
    name_in_qemu: String,
}

impl SharedMemory {
    fn give(client: &mut Client, what: &'static str, write_only: bool) -> Result<Self, QmpError> {
        let memory_error = |source| QmpError::Memory { what, source };
        let memory = memfd_create(what, MemfdFlags::CLOEXEC).map_err(|error| memory_error(error.into()))?;
        let memory = File::from(memory);
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let given = OpenOptions::new().read(!write_only).write(true).open(path).map_err(memory_error)?;
        let added = client.execute_with_fd("add-fd", json!({}), given.as_fd())?;
        let Some(set) = added["fdset-id"].as_u64() else {
            return Err(QmpError::Protocol { command: "add-fd".into(), what: "it names no set".into() });
        };
        Ok(Self { memory, given, name_in_qemu: format!("/dev/fdset/{set}") })
    }

    fn empty(&mut self) -> Result<(), QmpError> {
        let done = self.memory.set_len(0).and_then(|()| self.given.rewind());
        done.map_err(|source| QmpError::Memory { what: "make room for the device-model state", source })
    }

    fn fill(&mut self, image: &[u8]) -> Result<(), QmpError> {
        if image.len() as u64 > IMAGE_BYTES_MAX {
            return Err(QmpError::StateSize { len_bytes: image.len() as u64 });
        }
        let cut = self.memory.set_len(image.len() as u64);
        let done = cut.and_then(|()| self.memory.rewind()).and_then(|()| self.memory.write_all(image));
        done.map_err(|source| QmpError::Memory { what: "write the device-model image", source })
    }

    fn contents(&self) -> Result<Vec<u8>, QmpError> {
        let what = "read the device-model state";
        let len_bytes = self.memory.metadata().map_err(|source| QmpError::Memory { what, source })?.len();
        if !(1..=STATE_BYTES_MAX).contains(&len_bytes) {
            return Err(QmpError::StateSize { len_bytes });
        }
        let mut bytes = vec![0; len_bytes as usize];
        self.memory.read_exact_at(&mut bytes, 0).map_err(|source| QmpError::Memory { what, source })?;
        Ok(bytes)
    }
}
