//! A Xen domain with its host-side devices.
//!
//! ```text
//!   guest's NIC   vifD.0 (netback) or vifD.0-emu (device model)  ◀── AF_PACKET ──▶ queue, Domain::receive_frame
//!   the network   cnD.0, one end of a veth whose other is in the bridge   ◀── AF_PACKET ──▶ Wire
//!   guest's disk  /dev/nbdN (block-colo) or the device model's own client ◀── NBD, Unix socket ──▶ mirror or replica
//! ```
//!
//! The hotplug scripts `vif-colo` and `block-colo` make the left-hand sides when libxl attaches the device, on the
//! secondary too, long before a takeover. The trap is the epoch of a frame: it must not be older than the emission.
//! The reader takes a frame first and looks at the epoch then; a frame that waited in between counts as newer, and is
//! only released later. A suspend takes what is there itself, so that little counts as newer.

mod look;

pub use self::look::{device_model_path, facts, guest_facts};
use super::address::{Address, Listener};
use super::engine::NetworkFrame;
use super::engine_clock;
use super::guest::{DISK_NAME, Guest, GuestError, GuestQueue, check_memory, mirror, replica};
use super::links::{Outgoing, lock};
use super::nbd;
use crate::colo::hello::{DiskGeometry, Geometry, Mode, XenShape};
use crate::disk::{Disk, FileDisk};
use crate::hypervisor::xen::{Nic, Parts, XenDomain, toolstack};
use crate::hypervisor::{self, Domain};
use crate::replica::epochs::{GuestView, ReplicaConfig};
use ::xen::packet::PacketSocket;
use ::xen::qmp::DeviceModel;
use ::xen::{DomId, Interface, Store};
use bytes::Bytes;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Where guests' disks are served: the hotplug scripts and domain configurations name it.
pub const SOCKET_DIR: &str = "/run/xen-colo";
/// How long a device may take to appear after the domain is made: the hotplug script has run by then.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a reader waits for a frame before it looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);

/// A Xen guest to run at the start.
#[derive(Clone, Debug)]
pub struct XenBoot {
    /// Its name.
    pub name: String,
    /// xl's configuration, for a guest that does not run yet.
    pub config: PathBuf,
    /// The size of its disk, when the image is made.
    pub disk_bytes: u64,
}

/// The socket of a guest's disk.
#[must_use]
pub fn disk_socket(guest: &str) -> PathBuf {
    Path::new(SOCKET_DIR).join(format!("{guest}.{DISK_NAME}.sock"))
}

/// The spellings under which a domain's configuration names our disk: `block-colo`'s, and the device model's.
fn our_disks(guest: &str) -> Vec<String> {
    let socket = disk_socket(guest);
    vec![format!("{guest}/{DISK_NAME}"), format!("nbd:unix:{}:exportname={DISK_NAME}", socket.display())]
}

/// The network's end of the guest's NIC, which is plugged in when there is a guest.
#[derive(Clone, Debug)]
pub struct Wire {
    device: Arc<Mutex<Option<Arc<Device>>>>,
    frames_in: mpsc::Sender<Bytes>,
}

impl Wire {
    /// A wire that nothing is plugged into; frames of the network will go to `frames_in`.
    #[must_use]
    pub fn new(frames_in: mpsc::Sender<Bytes>) -> Self {
        Self { device: Arc::default(), frames_in }
    }

    /// Sends what the engine releases, as long as it does.
    pub async fn carry(self, mut frames_out: Outgoing<NetworkFrame>) {
        while let Some((bytes, NetworkFrame { until, frame })) = frames_out.recv().await {
            if until.is_none_or(|until| engine_clock() < until)
                && let Some(device) = lock(&self.device).clone()
            {
                // A full queue drops, as any network does.
                let _ = device.socket.send(&frame);
            }
            frames_out.written(bytes);
        }
    }

    fn plug(&self, name: &str) -> Result<Reader, GuestError> {
        let frames_in = self.frames_in.clone();
        // A full channel drops, as a full ring does.
        let take: Take = Box::new(move |frame| _ = frames_in.try_send(Bytes::copy_from_slice(frame)));
        let device = Arc::new(Device::open(name, take)?);
        *lock(&self.device) = Some(device.clone());
        Reader::start(device, "network")
    }
}

type Take = Box<dyn FnMut(&[u8]) + Send>;

/// A network device of this host.
struct Device {
    name: String,
    socket: PacketSocket,
    /// Something has been at its other end: a vif has no carrier before the guest connects, and until then it takes
    /// every frame and drops it.
    connected: AtomicBool,
    /// Whoever reads holds it, so that what was read is also taken before the next reader sees nothing.
    take: Mutex<Take>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").finish_non_exhaustive()
    }
}

impl Device {
    fn open(name: &str, take: Take) -> Result<Self, GuestError> {
        let socket = PacketSocket::open(name).map_err(|e| {
            let why = format!("network device {name}: {e}; the guest's vif must have script=vif-colo");
            GuestError::Toolstack(why)
        })?;
        Ok(Self { name: name.to_owned(), socket, connected: AtomicBool::new(false), take: Mutex::new(take) })
    }

    fn is_connected(&self) -> bool {
        if !self.connected.load(Ordering::Relaxed) {
            // No carrier is a zero, and an interface that is down an error.
            let carrier = std::fs::read(Path::new("/sys/class/net").join(&self.name).join("carrier"));
            self.connected.store(carrier.is_ok_and(|carrier| carrier.starts_with(b"1")), Ordering::Relaxed);
        }
        self.connected.load(Ordering::Relaxed)
    }

    /// Takes everything there is.
    fn read(&self) -> std::io::Result<()> {
        let mut take = lock(&self.take);
        let mut frame = Vec::new();
        loop {
            match self.socket.recv(Duration::ZERO, &mut frame) {
                Ok(Some(_)) => take(&frame),
                Ok(None) => return Ok(()),
                // Nothing that could be sent on: its sender will find it lost.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Nic for Device {
    fn send(&self, frame: &[u8]) -> bool {
        self.is_connected() && self.socket.send(frame).is_ok()
    }

    fn drain(&self) {
        // Its reader says what is wrong with a device.
        let _ = self.read();
    }
}

/// A thread that reads a device until it is dropped.
struct Reader {
    stop: Arc<AtomicBool>,
}

impl Reader {
    fn start(device: Arc<Device>, name: &str) -> Result<Self, GuestError> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || {
            while !stopped.load(Ordering::Relaxed) {
                let read = device.socket.poll(LOOK).and_then(|some| if some { device.read() } else { Ok(()) });
                if let Err(error) = read {
                    // The device is gone: the domain was destroyed, or its script took it away.
                    tracing::warn!(%error, "a network device of the guest is gone");
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name(name.into())
            .spawn(run)
            .map_err(|e| GuestError::Toolstack(format!("start a reader: {e}")))?;
        Ok(Self { stop })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A task that ends when it is dropped, and the socket it serves.
struct Served {
    task: AbortHandle,
    socket: PathBuf,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Serves a disk on a Unix socket.
async fn export<D: Disk + Clone + 'static>(socket: &Path, name: &'static str, disk: D) -> Result<Served, GuestError> {
    let failed = |e: std::io::Error| GuestError::Toolstack(format!("serve {}: {e}", socket.display()));
    std::fs::create_dir_all(SOCKET_DIR).map_err(failed)?;
    let listener = Address::Unix(socket.to_owned()).listen().await.map_err(failed)?;
    let task = tokio::spawn(serve_all(listener, name, disk)).abort_handle();
    Ok(Served { task, socket: socket.to_owned() })
}

async fn serve_all<D: Disk + Clone + 'static>(listener: Listener, name: &'static str, disk: D) {
    while let Ok(link) = listener.accept().await {
        let disk = disk.clone();
        tokio::spawn(async move {
            if let Err(error) = nbd::serve_connection(link, name.to_owned(), Box::new(disk)).await {
                tracing::warn!(%error, name, "a client of a guest's disk");
            }
        });
    }
}

/// What every attached guest has, whichever side it is on.
struct Attached {
    xen: Interface,
    domid: DomId,
    queue: Arc<GuestQueue>,
    epoch: Arc<AtomicU64>,
    nic: Option<Arc<dyn Nic>>,
    model: Option<DeviceModel>,
    attachments: Vec<Box<dyn std::any::Any + Send>>,
}

/// Joins a domain's devices to this process.
async fn attach(domid: DomId, config: &serde_json::Value, wire: &Wire) -> Result<Attached, GuestError> {
    let toolstack = |e: &dyn std::fmt::Display| GuestError::Toolstack(e.to_string());
    let xen = Interface::open().map_err(|e| toolstack(&e))?;
    let is_hvm = config["c_info"]["type"] == "hvm";
    let (queue, epoch) = (Arc::<GuestQueue>::default(), Arc::new(AtomicU64::new(0)));
    let mut attachments: Vec<Box<dyn std::any::Any + Send>> = Vec::new();
    let mut nic = None;
    if !toolstack::macs(config).is_empty() {
        let device = if is_hvm { format!("vif{}.0-emu", domid.0) } else { format!("vif{}.0", domid.0) };
        appears(&device).await?;
        let (sink, tag) = (queue.clone(), epoch.clone());
        // The frame first, and its epoch then.
        let take: Take = Box::new(move |frame| sink.push(tag.load(Ordering::SeqCst), frame));
        let device = Arc::new(Device::open(&device, take)?);
        attachments.push(Box::new(Reader::start(device.clone(), "guest-nic")?));
        nic = Some(device as Arc<dyn Nic>);
        attachments.push(Box::new(wire.plug(&format!("cn{}.0", domid.0))?));
    }
    let model = if is_hvm { Some(hypervisor::xen::device_model(domid)?) } else { None };
    Ok(Attached { xen, domid, queue, epoch, nic, model, attachments })
}

async fn appears(device: &str) -> Result<(), GuestError> {
    let path = Path::new("/sys/class/net").join(device);
    let found = async {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(DEVICE_DEADLINE, found).await;
    waited.map_err(|_| GuestError::Toolstack(format!("network device {device} did not appear; see xl dmesg")))
}

/// Runs a guest, or adopts one that runs.
pub async fn boot(boot: &XenBoot, image: &Path, wire: &Wire) -> Result<Guest, GuestError> {
    let toolstack = |e: &dyn std::fmt::Display| GuestError::Toolstack(e.to_string());
    let disk = FileDisk::open_or_create(image, boot.disk_bytes)?;
    let disks = vec![DiskGeometry { name: DISK_NAME.into(), size_bytes: disk.size_bytes() }];
    let mirror = mirror(Box::new(disk));
    // Before the domain: its devices are opened when it is made.
    let served = export(&disk_socket(&boot.name), DISK_NAME, mirror.clone()).await?;
    let store = Store::open().map_err(|e| toolstack(&e))?;
    let by_name = || store.by_name(&boot.name).map_err(|e| toolstack(&e));
    let domid = match by_name()? {
        Some(domid) => domid,
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
    attached.attachments.push(Box::new(served));
    let info = attached.xen.domain_info(domid).map_err(|e| toolstack(&e))?;
    let ram_pages = info.map_or(0, |info| info.total_pages);
    let mac = toolstack::macs(&config).first().copied().unwrap_or_default();
    let obstacles: Vec<_> = look::obstacles(&boot.name, &config).iter().map(ToString::to_string).collect();
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
    Ok(Guest { name, geometry, domain, queue, epoch, mirror, replica: None, attachments })
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

/// Makes room for a Xen guest that a primary will send: a paused domain with all its devices, and a replica.
pub async fn stand_by(
    name: &str,
    geometry: &Geometry,
    mode: Mode,
    image: &Path,
    epochs: ReplicaConfig,
    wire: &Wire,
) -> Result<(Guest, bool), GuestError> {
    let shape = geometry.xen.as_ref().ok_or(GuestError::Toolstack("this is no Xen guest".into()))?;
    // The cache of its last checkpoint; the guest's own memory is Xen's to find.
    check_memory("standing by for the guest", shape.ram_pages)?;
    let (replica, is_blank) = replica(geometry, image, epochs)?;
    let served = export(&disk_socket(name), DISK_NAME, GuestView(replica.clone())).await?;
    let domid = blocking(|| toolstack::create_incoming(name, &shape.config))?;
    let mut attached = match attach(domid, &shape.config, wire).await {
        Ok(attached) => attached,
        Err(error) => {
            let _ = blocking(|| toolstack::destroy(domid));
            return Err(error);
        }
    };
    attached.attachments.push(Box::new(served));
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
        mirror: mirror(Box::new(GuestView(replica.clone()))),
        replica: Some(replica),
        attachments,
    };
    Ok((guest, is_blank))
}
