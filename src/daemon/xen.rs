//! A Xen domain with its host-side devices.
//!
//! ```text
//!   guest's NIC   vifD.0 (netback), vifD.0-emu (device model)    ◀── AF_PACKET ──▶ queue, Domain::receive_frame
//!   the network   cnD.0, one end of a veth whose other is in the bridge   ◀── AF_PACKET ──▶ Wire
//!   guest's disks /dev/nbdN (block-colo) or the device model's own client ◀── NBD, a Unix socket each ──▶ mirror or replica
//! ```
//!
//! The hotplug scripts `vif-colo` and `block-colo` make the left-hand sides when libxl attaches the device, on the
//! secondary too, long before a takeover.

mod alone;
mod look;
mod nic;

pub use self::alone::give_away;
pub use self::look::{device_model_path, domain_name, facts, guest_facts};
pub use self::nic::Wire;
use self::nic::{Attachment, GuestNic};
use super::address;
use super::guest::{Guest, GuestError, GuestQueue, check_memory, mirrors_on, mirrors_over, replicas_on};
use super::nbd::kernel;
use super::nbd::threads::{Listener, Running, Service, serve_all};
use crate::colo::hello::{DISKS_MAX, Geometry, Mode, XenShape, disk_name};
use crate::compare::Rewriter;
use crate::disk::Disk;
use crate::hypervisor::xen::{Nic, Parts, XenDomain, toolstack};
use crate::hypervisor::{self, Domain};
use crate::nbd::handshake::Export;
use crate::replica::epochs::ReplicaConfig;
use ::xen::qmp::DeviceModel;
use ::xen::{DomId, Interface, Store};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Where guests' disks are served: the hotplug scripts and domain configurations name it.
pub const SOCKET_DIR: &str = "/run/xen-colo";
/// Clients of one disk: the device model or the kernel, and somebody who looks.
const DISK_CLIENTS_MAX: usize = 16;

/// A Xen guest to run at the start.
#[derive(Clone, Debug)]
pub struct XenBoot {
    /// Its name.
    pub name: String,
    /// xl's configuration, for a guest that does not run yet.
    pub config: PathBuf,
    /// The size of a disk of it, when the image is made.
    pub disk_bytes: u64,
}

/// The socket of a guest's disk.
#[must_use]
pub fn disk_socket(guest: &str, index: usize) -> PathBuf {
    Path::new(SOCKET_DIR).join(format!("{guest}.{}.sock", disk_name(index)))
}

/// The spellings under which a domain's configuration names a disk of ours: `block-colo`'s, and the device model's.
fn our_disk(guest: &str, index: usize) -> [String; 2] {
    let (socket, name) = (disk_socket(guest, index), disk_name(index));
    [format!("{guest}/{name}"), format!("nbd:unix:{}:exportname={name}", socket.display())]
}

/// A server that ends when it is dropped, and its socket.
struct Served {
    running: Running,
    socket: PathBuf,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.running.end();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Serves a guest's disk on its Unix socket. `knows_changes` says that it can tell what differs from the last checkpoint.
async fn export<D: Disk + Clone + Sync + 'static>(
    guest: &str,
    index: usize,
    disk: D,
    knows_changes: bool,
) -> Result<Attachment, GuestError> {
    let socket = disk_socket(guest, index);
    let failed = |e: std::io::Error| GuestError::Toolstack(format!("serve {}: {e}", socket.display()));
    std::fs::create_dir_all(SOCKET_DIR).map_err(failed)?;
    let listener = address::listen_unix(&socket).await.and_then(Listener::blocking).map_err(failed)?;
    let exports = vec![Export { knows_changes, ..Export::new(disk_name(index), disk.size_bytes()) }];
    let open = Box::new(move |_| Ok(Box::new(disk.clone()) as Box<dyn Disk>));
    let (service, running) =
        (Arc::new(Service { exports, open, max_connections: DISK_CLIENTS_MAX, tls: None }), Running::default());
    let here = running.clone();
    let serve = move || {
        if let Err(error) = serve_all(&listener, &service, &here) {
            tracing::error!(%error, "a guest's disk takes no clients any more");
        }
    };
    std::thread::Builder::new().name(disk_name(index)).spawn(serve).map_err(failed)?;
    Ok(Box::new(Served { running, socket }))
}

/// What every attached guest has, whichever side it is on.
struct Attached {
    xen: Interface,
    domid: DomId,
    queue: Arc<GuestQueue>,
    epoch: Arc<AtomicU64>,
    nic: Option<Arc<dyn Nic>>,
    model: Option<DeviceModel>,
    attachments: Vec<Attachment>,
}

/// Joins a domain's devices to this process.
async fn attach(domid: DomId, config: &serde_json::Value, wire: &Wire) -> Result<Attached, GuestError> {
    let toolstack = |e: &dyn std::fmt::Display| GuestError::Toolstack(e.to_string());
    let xen = Interface::open().map_err(|e| toolstack(&e))?;
    let is_hvm = config["c_info"]["type"] == "hvm";
    let (queue, epoch) = (Arc::<GuestQueue>::default(), Arc::new(AtomicU64::new(0)));
    let mut attachments: Vec<Attachment> = Vec::new();
    let mut nic = None;
    if !toolstack::macs(config).is_empty() {
        let emulated = is_hvm && config["nics"][0]["nictype"] != "vif";
        let guest_nic = GuestNic::open(domid.0, emulated, &queue, &epoch).await?;
        attachments.extend(guest_nic.readers()?);
        nic = Some(Arc::new(guest_nic) as Arc<dyn Nic>);
        attachments.push(Box::new(wire.plug(&format!("cn{}.0", domid.0))?));
    }
    let model = if is_hvm { Some(hypervisor::xen::device_model(domid)?) } else { None };
    Ok(Attached { xen, domid, queue, epoch, nic, model, attachments })
}

/// Runs a guest, or adopts one that runs.
pub async fn boot(boot: &XenBoot, images: &[PathBuf], wire: &Wire) -> Result<Guest, GuestError> {
    let toolstack = |e: &dyn std::fmt::Display| GuestError::Toolstack(e.to_string());
    let store = Store::open().map_err(|e| toolstack(&e))?;
    let by_name = || store.by_name(&boot.name).map_err(|e| toolstack(&e));
    let running = by_name()?;
    let incoming = toolstack::incoming(&boot.name);
    if let (None, Some(domid)) = (running, store.by_name(&incoming).map_err(|e| toolstack(&e))?) {
        return Err(GuestError::Toolstack(format!(
            "domain {domid} is called {incoming}: it stood by when a host ended here, or had just taken over, and would \
             be a second guest on this disk; xl destroy {incoming}, or if it runs: xl rename {incoming} {}",
            boot.name
        )));
    }
    let xen = Interface::open().map_err(|e| toolstack(&e))?;
    let stands =
        running.map(|domid| blocking(|| alone::take_back(&xen, domid, &boot.name, images.len()))).transpose()?;
    let (mirrors, disks, alone) = mirrors_on(images, boot.disk_bytes, running.is_some())?;
    // Before the domain: its devices are opened when it is made.
    let mut served = Vec::with_capacity(images.len());
    for (index, mirror) in mirrors.disks().iter().enumerate() {
        served.push(export(&boot.name, index, mirror.clone(), false).await?);
    }
    let domid = match running {
        Some(domid) => {
            blocking(|| go_on(&boot.name, images.len()))?;
            domid
        }
        None => {
            create(&boot.config).await?;
            by_name()?.ok_or(GuestError::Toolstack(format!(
                "{} does not make a domain called {}; give --guest the name it has there",
                boot.config.display(),
                boot.name
            )))?
        }
    };
    let config = blocking(|| toolstack::config(domid))?;
    let mut attached = attach(domid, &config, wire).await?;
    attached.attachments.extend(served);
    attached.attachments.push(Box::new(alone));
    if let Some(model) = &mut attached.model {
        blocking(|| alone::take_disks_back(model, &boot.name, images))?;
    }
    drop(stands);
    let info = attached.xen.domain_info(domid).map_err(|e| toolstack(&e))?;
    let ram_pages = info.map_or(0, |info| info.total_pages);
    let mac = toolstack::macs(&config).first().copied().unwrap_or_default();
    let obstacles: Vec<_> =
        look::obstacles(&boot.name, &config, Some(images)).iter().map(ToString::to_string).collect();
    let obstacle = (!obstacles.is_empty()).then(|| obstacles.join("; "));
    let Attached { xen, domid, queue, epoch, nic, model, attachments } = attached;
    let domain = XenDomain::running(Parts { xen, domid, model, nic, obstacle })?;
    let geometry = Geometry {
        nr_pages: domain.nr_pages(),
        disks,
        mac,
        ip: [0; 4],
        diverge_percent: 0,
        xen: Some(XenShape { config, ram_pages }),
    };
    let (name, domain) = (boot.name.clone(), Some(Box::new(domain) as Box<dyn Domain>));
    Ok(Guest {
        name,
        geometry,
        domain,
        queue,
        epoch,
        mirrors,
        replicas: None,
        outer: Rewriter::of_survivor(),
        attachments,
    })
}

/// The kernel's devices of a guest that runs go on with the disks that are served here: its writes have waited since the
/// end of whoever served them before.
fn go_on(guest: &str, disks: usize) -> Result<(), String> {
    for index in 0..disks {
        let served = alone::pv_disk(guest, index);
        let devices = kernel::reconnect(&served).map_err(|e| format!("{}: {e}", served.backend))?;
        for device in devices {
            tracing::info!(disk = %served.backend, device, "the guest's disk goes on");
        }
    }
    Ok(())
}

/// What is left here of a guest that another host has is stopped; what, if there is something. It cannot be heard, and its
/// writes wait for a server that will not come: it could only take the processor, and then see its disk fail.
pub fn set_aside(guest: &str) -> Result<Option<String>, String> {
    let said = |e: ::xen::Error| e.to_string();
    let store = Store::open().map_err(said)?;
    let Some(domid) = store.by_name(guest).map_err(said)? else { return Ok(None) };
    let xen = Interface::open().map_err(said)?;
    if xen.domain_info(domid).map_err(said)?.is_some_and(|info| !info.paused) {
        xen.pause(domid).map_err(said)?;
    }
    Ok(Some(format!("domain {domid} is what it was here, and is paused; xl destroy {guest}")))
}

async fn create(config: &Path) -> Result<(), GuestError> {
    let output = tokio::process::Command::new("xl").arg("create").arg("-q").arg(config).output().await;
    let output = output.map_err(|e| GuestError::Toolstack(format!("run xl: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(GuestError::Toolstack(format!("xl create {}: {}", config.display(), said.trim())))
}

fn blocking<T>(order: impl FnOnce() -> Result<T, String>) -> Result<T, GuestError> {
    tokio::task::block_in_place(order).map_err(GuestError::Toolstack)
}

/// Makes room for a Xen guest that a primary will send: a paused domain with all its devices, and replicas.
pub async fn stand_by(
    name: &str,
    geometry: &Geometry,
    mode: Mode,
    images: &[PathBuf],
    epochs: ReplicaConfig,
    wire: &Wire,
) -> Result<(Guest, bool), GuestError> {
    let shape = geometry.xen.as_ref().ok_or(GuestError::Toolstack("this is no Xen guest".into()))?;
    // The cache of its last checkpoint; the guest's own memory is Xen's to find.
    check_memory("standing by for the guest", shape.ram_pages)?;
    // Before its disks are opened: they may be those of the domain that is in the way.
    blocking(|| toolstack::check_free(name))?;
    let (replicas, is_blank, alone) = replicas_on(geometry, images, epochs)?;
    let mirrors = mirrors_over(&replicas);
    let mut served = Vec::with_capacity(images.len());
    for (index, mirror) in mirrors.disks().iter().enumerate() {
        served.push(export(name, index, mirror.clone(), true).await?);
    }
    let domid = blocking(|| toolstack::create_incoming(name, &shape.config))?;
    let mut attached = match attach(domid, &shape.config, wire).await {
        Ok(attached) => attached,
        Err(error) => {
            let _ = blocking(|| toolstack::destroy(domid));
            return Err(error);
        }
    };
    attached.attachments.extend(served);
    attached.attachments.push(Box::new(alone));
    let Attached { xen, domid, queue, epoch, nic, model, attachments } = attached;
    let parts = Parts { xen, domid, model, nic, obstacle: None };
    let nr_pages = geometry.nr_pages;
    let domain = tokio::task::block_in_place(|| XenDomain::standing_by(parts, name, nr_pages, mode == Mode::Colo))?;
    let guest = Guest {
        name: name.to_owned(),
        geometry: geometry.clone(),
        domain: Some(Box::new(domain)),
        queue,
        epoch,
        mirrors,
        replicas: Some(replicas),
        outer: Rewriter::of_survivor(),
        attachments,
    };
    Ok((guest, is_blank))
}
