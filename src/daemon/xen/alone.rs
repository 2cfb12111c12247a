//! A guest's devices without a host: given away when its host ends and it runs on, and taken back when one starts again.
//!
//! ```text
//!                       host runs                                      nobody does
//!   emulated disk   device model ─ NBD ─▶ host ─▶ image       device model ─▶ image
//!   PV disk         blkback ─ /dev/nbdN ─▶ host ─▶ image      blkback ─ /dev/nbdN ─▶ `xl-colo nbd` ─▶ image
//!   NIC             vifD.0[-emu] ◀─▶ host ◀─▶ cnD.0 ═ bridge  vifD.0[-emu] ═ bridge
//! ```
//!
//! The domain is paused meanwhile: an emulated disk cannot be moved under a guest that writes (see `xen::qmp`), and a
//! PV disk's requests wait for whoever serves it next. The traps: the image is locked for as long as a connection of the host's
//! is not done with it, so that a server is started again and again for a while; it ends with its only client, the kernel,
//! when the guest is destroyed; and a vif of a protected guest is in no bridge, so that giving it one is the very last step.

use super::{Store, disk_socket};
use crate::colo::hello::disk_name;
use crate::daemon::guest::Guest;
use crate::daemon::nbd::kernel::{self, Served};
use crate::hypervisor::xen::{device_model, toolstack};
use crate::replica::state::{Standing, found};
use ::xen::qmp::{Backing, DeviceModel};
use ::xen::{DomId, Interface};
use rustix::fs::FileType;
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long whoever has an image may take to let go of it.
const IMAGE_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(50);

/// A domain that stands still until this is dropped, unless it did already.
struct Paused<'a> {
    xen: &'a Interface,
    domid: DomId,
    was: bool,
}

impl<'a> Paused<'a> {
    fn new(xen: &'a Interface, domid: DomId) -> Result<Self, String> {
        let info = xen.domain_info(domid).map_err(|e| e.to_string())?.ok_or(format!("there is no domain {domid}"))?;
        if !info.paused {
            xen.pause(domid).map_err(|e| e.to_string())?;
        }
        Ok(Self { xen, domid, was: info.paused })
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if !self.was
            && let Err(error) = self.xen.unpause(self.domid)
        {
            tracing::error!(%error, domid = %self.domid, "the guest stands still: xl unpause");
        }
    }
}

/// Gives a guest's devices away, and tells where they are; nothing, of a guest that is gone. What of them stands still
/// after an error, it says.
pub fn give_away(guest: Guest, images: &[PathBuf]) -> Result<Option<String>, String> {
    let said = |e: ::xen::Error| e.to_string();
    let name = guest.name.clone();
    let store = Store::open().map_err(said)?;
    let by_name = |name: &str| store.by_name(name).map_err(said);
    // What has just taken over has its own name a little later: it may get it between two looks.
    let incoming = toolstack::incoming(&name);
    let domid = [&name, &incoming, &name].into_iter().find_map(|called| by_name(called).transpose()).transpose()?;
    let Some(domid) = domid else { return Ok(None) };
    let unmerged = images.iter().find(|image| !matches!(found(image), Ok(Standing::Guest | Standing::NoRecord)));
    if let Some(image) = unmerged {
        return Err(format!("what it wrote since the takeover is not all in {} yet", image.display()));
    }
    let xen = Interface::open().map_err(said)?;
    let is_hvm = guest.geometry.xen.as_ref().is_some_and(|shape| shape.config["c_info"]["type"] == "hvm");
    let _paused = Paused::new(&xen, domid)?;
    let Guest { domain, attachments, mirrors, replicas, .. } = guest;
    // Its monitor and its keeper are free then.
    drop(domain);
    let mut places = Vec::with_capacity(images.len() + 1);
    if is_hvm {
        let mut model = device_model(domid).map_err(|e| e.to_string())?;
        for (index, image) in images.iter().enumerate() {
            let (socket, disk) = (disk_socket(&name, index), disk_name(index));
            let export = Backing::Nbd { socket: &socket, export: &disk };
            if model.move_disk(&disk, export, plain(image)?).map_err(|e| format!("{disk}: {e}"))? {
                places.push(format!("{disk} is {}", image.display()));
            }
        }
    }
    drop((attachments, mirrors, replicas));
    for (index, image) in images.iter().enumerate() {
        let served = pv_disk(&name, index);
        if kernel::is_used(&served) {
            serve(&served, image)?;
            let connected = kernel::reconnect(&served);
            if !connected.as_ref().is_ok_and(|devices| !devices.is_empty()) {
                // It ends with its client, and has none: not even the guest's, if that was destroyed meanwhile.
                end_server(&served)?;
            }
            connected.map_err(|e| format!("{}: {e}", served.backend))?;
            places.push(format!("{} is {}, by xl-colo nbd", served.export, image.display()));
        }
    }
    places.extend(plug_in(domid)?);
    Ok(Some(places.join("; ")))
}

/// Takes back what was given away, but for emulated disks: those when they are served again, by [`take_disks_back`]. The
/// guest stands still until what is returned is dropped.
pub(super) fn take_back(xen: &Interface, domid: DomId, guest: &str, disks: usize) -> Result<impl Drop, String> {
    let paused = Paused::new(xen, domid)?;
    for device in vifs(domid) {
        if master(&device).is_some() {
            ip_link(&["set", "dev", &device, "nomaster"])?;
        }
    }
    let our_port = port(domid);
    if master(&our_port).is_some() {
        ip_link(&["set", "dev", &our_port, "up"])?;
    }
    for index in 0..disks {
        end_server(&pv_disk(guest, index))?;
    }
    Ok(paused)
}

/// Emulated disks that are their images become exports of this host again.
pub(super) fn take_disks_back(model: &mut DeviceModel, guest: &str, images: &[PathBuf]) -> Result<(), String> {
    for (index, image) in images.iter().enumerate() {
        let (socket, disk) = (disk_socket(guest, index), disk_name(index));
        let export = Backing::Nbd { socket: &socket, export: &disk };
        model.move_disk(&disk, plain(image)?, export).map_err(|e| format!("{disk}: {e}"))?;
    }
    Ok(())
}

/// The kernel's disk of that number.
pub(super) fn pv_disk(guest: &str, index: usize) -> Served {
    let (socket, export) = (disk_socket(guest, index), disk_name(index));
    Served { socket, backend: format!("{guest}/{export}"), export }
}

fn plain(image: &Path) -> Result<Backing<'_>, String> {
    let stat = rustix::fs::stat(image).map_err(|e| format!("look at {}: {e}", image.display()))?;
    Ok(Backing::Image { path: image, is_device: FileType::from_raw_mode(stat.st_mode).is_block_device() })
}

/// Where the number of the process is that serves a disk alone.
fn pid_file(served: &Served) -> PathBuf {
    served.socket.with_extension("pid")
}

/// Starts a server that goes on without this process, and ends with the kernel's device.
fn serve(served: &Served, image: &Path) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let begun = Instant::now();
    loop {
        let mut command = Command::new(&program);
        command
            // An emulated disk is the image in the device model by now, whether its guest uses that or the PV disk.
            .args(["nbd", "--fork", "-f", "raw", "--locking=off", "-e", "4", "--discard=unmap"])
            .args(["-x", &served.export, "-k"])
            .arg(&served.socket)
            .arg("--pid-file")
            .args([&pid_file(served), image])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let output = command.output().map_err(|e| format!("start xl-colo nbd: {e}"))?;
        if output.status.success() {
            return Ok(());
        }
        if begun.elapsed() > IMAGE_DEADLINE {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(format!("{}: {why}; its writes wait for xl-colo host to run here again", served.backend));
        }
        std::thread::sleep(RETRY);
    }
}

/// Ends the server that [`serve`] started, if there is one. The kernel's requests wait.
fn end_server(served: &Served) -> Result<(), String> {
    let path = pid_file(served);
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
    let pid = text.trim().parse::<i32>().ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let command = PathBuf::from(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
        // Its number may be somebody else's by now.
        let is_it = || {
            let words = std::fs::read(&command).unwrap_or_default();
            let socket = served.socket.as_os_str().as_encoded_bytes();
            words.split(|byte| *byte == 0).any(|word| word == socket)
        };
        let begun = Instant::now();
        if is_it() {
            kill_process(pid, Signal::TERM).map_err(|e| format!("end process {pid:?}, which serves a disk: {e}"))?;
        }
        while is_it() {
            if begun.elapsed() > IMAGE_DEADLINE {
                let pid = pid.as_raw_nonzero();
                return Err(format!("xl-colo nbd, process {pid}, serves {} and does not end", served.backend));
            }
            std::thread::sleep(RETRY);
        }
    }
    let _ = std::fs::remove_file(&path);
    Ok(())
}

/// The devices of a guest's NIC that are here.
fn vifs(domid: DomId) -> impl Iterator<Item = String> {
    let devices = [format!("vif{domid}.0"), format!("vif{domid}.0-emu")];
    devices.into_iter().filter(|device| Path::new("/sys/class/net").join(device).exists())
}

fn master(device: &str) -> Option<String> {
    let link = std::fs::read_link(Path::new("/sys/class/net").join(device).join("master")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// The bridge's port that is the host's, in the place of the guest's NIC.
fn port(domid: DomId) -> String {
    format!("cb{domid}.0")
}

/// Puts the guest's NIC where its network is; which that is. Our own port goes down: the bridge has learned that the
/// guest is behind it, and forgets that with it.
fn plug_in(domid: DomId) -> Result<Option<String>, String> {
    let mut devices = vifs(domid).peekable();
    if devices.peek().is_none() {
        return Ok(None);
    }
    let our_port = port(domid);
    let bridge = master(&our_port).ok_or(format!("{our_port} is in no bridge: the NIC stands still"))?;
    for device in devices {
        ip_link(&["set", "dev", &device, "master", &bridge])?;
    }
    ip_link(&["set", "dev", &our_port, "down"])?;
    Ok(Some(format!("its NIC is in {bridge}")))
}

fn ip_link(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").arg("link").args(arguments).output().map_err(|e| format!("run ip: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip link {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}
