//! Both ends of a guest's NIC on this host.
//!
//! ```text
//!   the guest ── vifD.0      (netback: it has connected its PV driver) ──┐
//!             └─ vifD.0-emu  (its device model, until then)  ────────────┴── GuestNic      Wire ── cnD.0 ══ bridge
//! ```
//!
//! Two traps. The epoch of a frame must not be older than its emission: a reader takes a frame first and looks at the
//! epoch then; a frame that waited in between counts as newer, and is only released later, and a suspend takes what is
//! there itself, so that little counts as newer. And a vif whose guest has not connected takes every frame and drops
//! it, and its carrier does not tell: the queue's thread raises it some milliseconds before the vif counts as connected
//! (linux `drivers/net/xen-netback/rx.c`, `xenvif_queue_carrier_on`; `interface.c`, `xenvif_carrier_on`), just long enough
//! to lose all that waited for a guest that takes over. The backend's state in xenstore is written after both.

use crate::daemon::engine::NetworkFrame;
use crate::daemon::engine_clock;
use crate::daemon::guest::{GuestError, GuestQueue};
use crate::daemon::links::{Outgoing, lock};
use crate::hypervisor::xen::Nic;
use ::xen::packet::PacketSocket;
use ::xen::{DomId, Store};
use bytes::Bytes;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

/// How long a device may take to appear after the domain is made: the hotplug script has run by then.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a reader waits for a frame before it looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// Frames taken at once.
const READ_MAX: usize = 256;
/// How often a vif is looked at that nothing was at the other end of yet.
const CONNECTED_LOOK_MICROS: u64 = 2_000;
/// `XenbusStateConnected` (xen `public/io/xenbus.h`).
const XENBUS_CONNECTED: &str = "4";

/// How long a reader leaves a device alone that is down.
const DOWN_RETRY: Duration = Duration::from_millis(10);

/// Something that ends with the guest.
pub(super) type Attachment = Box<dyn std::any::Any + Send>;

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

    /// Makes the bridge that the guest's NIC is a port of forget what it has learned. A frame of the guest that it broadcast
    /// has told the bridge that the guest is behind the uplink, and what comes from there for the guest is dropped then,
    /// for as long as the bridge remembers (linux `net/bridge/br_sysfs_br.c`, `flush`).
    pub fn unlearn(&self) {
        let Some(device) = lock(&self.device).clone() else { return };
        if let Err(error) = std::fs::write(&device.learned, "1") {
            tracing::debug!(%error, path = %device.learned.display(), "the bridge forgets nothing");
        }
    }

    pub(super) fn plug(&self, name: &str) -> Result<Reader, GuestError> {
        let frames_in = self.frames_in.clone();
        // A full channel drops, as a full ring does.
        let take: Take = Box::new(move |frame| _ = frames_in.try_send(Bytes::copy_from_slice(frame)));
        // A network may lose what it brings.
        let device = Arc::new(Device::open(name, take, Box::new(|_| ()))?);
        *lock(&self.device) = Some(device.clone());
        Reader::start(device, "network")
    }
}

/// The guest's end of its NIC.
pub(super) struct GuestNic {
    vif: Arc<Device>,
    connection: Connection,
    emulated: Option<Arc<Device>>,
}

/// Whether a guest's PV driver has ever been at the other end of its vif.
struct Connection {
    store: Mutex<Store>,
    /// The backend's.
    state: String,
    connected: AtomicBool,
    /// When that was last looked for.
    looked_at_us: AtomicU64,
}

impl Connection {
    fn of(domid: u16) -> Result<Self, GuestError> {
        let store = Store::open().map_err(|e| GuestError::Toolstack(format!("xenstore: {e}")))?;
        // Where every backend of its first NIC is, of dom0's own ones.
        let state = format!("{}/backend/vif/{domid}/0/state", store.domain_path(DomId(0)));
        Ok(Self { store: Mutex::new(store), state, connected: AtomicBool::new(false), looked_at_us: AtomicU64::new(0) })
    }

    fn is_there(&self, vif: &Device) -> bool {
        let now_us = engine_clock().as_micros();
        let due = now_us >= self.looked_at_us.load(Ordering::Relaxed) + CONNECTED_LOOK_MICROS;
        if due && !self.connected.load(Ordering::Relaxed) {
            self.looked_at_us.store(now_us, Ordering::Relaxed);
            // No carrier is a zero, and a device that is down an error. xenstored is asked only then: it has enough to do
            // while devices connect.
            let carrier = std::fs::read(&vif.carrier).is_ok_and(|carrier| carrier.starts_with(b"1"));
            let connected = carrier
                && lock(&self.store).read(&self.state).is_ok_and(|state| state.as_deref() == Some(XENBUS_CONNECTED));
            self.connected.store(connected, Ordering::Relaxed);
        }
        self.connected.load(Ordering::Relaxed)
    }
}

impl GuestNic {
    /// The devices of the first NIC of domain `domid`; what they emit goes to `queue` in the epoch `tag` has then.
    pub(super) async fn open(
        domid: u16,
        emulated: bool,
        queue: &Arc<GuestQueue>,
        tag: &Arc<AtomicU64>,
    ) -> Result<Self, GuestError> {
        let open = async |name: String| {
            appears(&name).await?;
            let (queue, lossy, tag) = (queue.clone(), queue.clone(), tag.clone());
            // The frame first, and its epoch then.
            let take: Take = Box::new(move |frame| queue.push(tag.load(Ordering::SeqCst), frame));
            let lose: Lose = Box::new(move |frames| lossy.lose(frames));
            Device::open(&name, take, lose).map(Arc::new)
        };
        let vif = open(format!("vif{domid}.0")).await?;
        let emulated = if emulated { Some(open(format!("vif{domid}.0-emu")).await?) } else { None };
        Ok(Self { vif, connection: Connection::of(domid)?, emulated })
    }

    /// Reads from now on, until what is returned is dropped.
    pub(super) fn readers(&self) -> Result<Vec<Attachment>, GuestError> {
        let start = |device: &Arc<Device>| Ok(Box::new(Reader::start(device.clone(), "guest-nic")?) as Attachment);
        [Some(&self.vif), self.emulated.as_ref()].into_iter().flatten().map(start).collect()
    }
}

impl std::fmt::Debug for GuestNic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestNic").field("vif", &self.vif).field("emulated", &self.emulated).finish()
    }
}

impl Nic for GuestNic {
    fn send(&self, frame: &[u8]) -> bool {
        let device = if self.connection.is_there(&self.vif) { Some(&self.vif) } else { self.emulated.as_ref() };
        device.is_some_and(|device| device.socket.send(frame).is_ok())
    }

    fn drain(&self) {
        for device in [Some(&self.vif), self.emulated.as_ref()].into_iter().flatten() {
            // Its reader says what is wrong with a device.
            let _ = device.read();
        }
    }
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

type Take = Box<dyn FnMut(&[u8]) + Send>;
/// Told how many frames more the kernel lost.
type Lose = Box<dyn Fn(u64) + Send + Sync>;

/// A network device of this host.
struct Device {
    carrier: PathBuf,
    /// What makes the bridge forget, of the port that is the network's end of the same cable.
    learned: PathBuf,
    socket: PacketSocket,
    /// Whoever reads holds it, so that what was read is also taken before the next reader sees nothing.
    take: Mutex<Take>,
    lose: Lose,
    lost: AtomicU64,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("carrier", &self.carrier).finish_non_exhaustive()
    }
}

impl Device {
    fn open(name: &str, take: Take, lose: Lose) -> Result<Self, GuestError> {
        // Not its ring: a frame alone would come late, and a suspend would not see the last ones.
        let socket = PacketSocket::open(name).map_err(|e| {
            let why = format!("network device {name}: {e}; the guest's vif must have script=vif-colo");
            GuestError::Toolstack(why)
        })?;
        Ok(Self {
            carrier: Path::new("/sys/class/net").join(name).join("carrier"),
            learned: Path::new("/sys/class/net").join(name.replacen("cn", "cb", 1)).join("master/bridge/flush"),
            socket,
            take: Mutex::new(take),
            lose,
            lost: AtomicU64::new(0),
        })
    }

    /// Takes everything there is.
    fn read(&self) -> std::io::Result<()> {
        let mut take = lock(&self.take);
        while self.socket.read(READ_MAX, &mut |frame| take(frame))? == READ_MAX {}
        let lost = self.socket.losses()?.total();
        let before = self.lost.swap(lost, Ordering::Relaxed);
        if lost > before {
            tracing::warn!(device = %self.carrier.display(), frames = lost - before, "frames lost by the kernel");
            (self.lose)(lost - before);
        }
        Ok(())
    }
}

/// A thread that reads a device until it is dropped.
pub(super) struct Reader {
    stop: Arc<AtomicBool>,
}

impl Reader {
    fn start(device: Arc<Device>, name: &str) -> Result<Self, GuestError> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || {
            while !stopped.load(Ordering::Relaxed) {
                let read = device.socket.poll(LOOK).and_then(|some| if some { device.read() } else { Ok(()) });
                match read {
                    // Down for a moment, as a vif is until its guest connects.
                    Err(error) if error.kind() == ErrorKind::NetworkDown && device.carrier.exists() => {
                        std::thread::sleep(DOWN_RETRY);
                    }
                    Err(error) => {
                        // The device is gone: the domain was destroyed, or its script took it away.
                        tracing::warn!(%error, "a network device of the guest is gone");
                        return;
                    }
                    Ok(()) => {}
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
