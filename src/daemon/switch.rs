//! A virtual Ethernet switch: what stands between the two hosts' guests and the clients.
//!
//! ```text
//! host A ── Unix socket ──▶ port "a" ┐                    ┌ port "edge" ── channel ──▶ the TCP edge
//! host B ── Unix socket ──▶ port "b" ┴─▶ Fabric: learn, ──┘
//!                                        look up, fence      one bounded output queue a port, drop-tail
//! ```
//!
//! [`Fabric`] decides (pure: ports are indexes); [`Switch`] carries. A port learns the source MAC of every frame
//! it hands in, so the survivor's gratuitous ARP moves the guest's MAC to the survivor's port, as on the real thing; and what
//! was behind a port whose link went down is looked for everywhere.
//!
//! The trap: a primary that was only stopped, not killed, may wake after the takeover and speak with the guest's
//! MAC. [`Switch::fence`] is for that: its frames are refused *before* learning, or one of them would steal the
//! MAC back from the survivor.
//!
//! Source: IEEE 802.1D 7.7 (the forwarding process), without ageing and spanning tree: the topology is one switch.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::accept::accept;
use super::frames::{FrameError, FrameReader, FrameWriter};

/// Frames a port's output queue holds; the next one is dropped, as a real switch does.
pub const PORT_QUEUE_FRAMES: usize = 2048;

/// Addresses the fabric remembers; further ones are flooded, which is slower but right.
const MACS_MAX: usize = 1024;

const MAC_BYTES: usize = 6;
const ETHERNET_HEADER_BYTES: usize = 14;

type Mac = [u8; MAC_BYTES];

/// Where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Out of this port only.
    To(usize),
    /// Out of every port that is neither the one it came in by nor fenced.
    Flood,
    /// Nowhere: the destination is behind the port it came in by.
    Stay,
    /// Nowhere: the port it came in by is fenced.
    Fenced,
    /// Nowhere: shorter than an Ethernet header.
    Malformed,
}

/// The deciding half of a switch: which MAC lives behind which port, and which ports are fenced.
#[derive(Debug, Default)]
pub struct Fabric {
    port_of_mac: HashMap<Mac, usize>,
    fenced: Vec<bool>,
}

impl Fabric {
    /// Adds a port and returns its index: 0, 1, 2, …
    pub fn add_port(&mut self) -> usize {
        self.fenced.push(false);
        self.fenced.len() - 1
    }

    /// Refuses `port` from now on, and forgets what was learned behind it.
    pub fn fence(&mut self, port: usize) {
        if let Some(fenced) = self.fenced.get_mut(port) {
            *fenced = true;
        }
        self.forget(port);
    }

    /// The link of `port` is down: what was learned behind it may be anywhere now, and is looked for everywhere.
    pub fn forget(&mut self, port: usize) {
        self.port_of_mac.retain(|_, behind| *behind != port);
    }

    /// Whether `port` is fenced.
    #[must_use]
    pub fn is_fenced(&self, port: usize) -> bool {
        self.fenced.get(port).copied().unwrap_or(false)
    }

    /// Learns from a frame that came in by `port` and says where it goes.
    pub fn decide(&mut self, port: usize, frame: &[u8]) -> Decision {
        if self.is_fenced(port) {
            return Decision::Fenced;
        }
        if frame.len() < ETHERNET_HEADER_BYTES {
            return Decision::Malformed;
        }
        let (destination, source) = (mac_at(frame, 0), mac_at(frame, MAC_BYTES));
        if !is_group(source) && (self.port_of_mac.len() < MACS_MAX || self.port_of_mac.contains_key(&source)) {
            self.port_of_mac.insert(source, port);
        }
        if is_group(destination) {
            return Decision::Flood;
        }
        match self.port_of_mac.get(&destination) {
            Some(&behind) if behind == port => Decision::Stay,
            Some(&behind) => Decision::To(behind),
            None => Decision::Flood,
        }
    }
}

fn mac_at(frame: &[u8], offset: usize) -> Mac {
    std::array::from_fn(|i| frame.get(offset + i).copied().unwrap_or(0))
}

/// Broadcast or multicast: never the address of one station.
fn is_group(mac: Mac) -> bool {
    mac[0] & 1 == 1
}

/// Why a port could not be added or found.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The socket could not be listened on.
    #[error("cannot listen on {}: {source}", path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The switch has a port of that name.
    #[error("the switch already has a port {0:?}")]
    NameTaken(String),
    /// The switch has no port of that name.
    #[error("the switch has no port {0:?}")]
    UnknownPort(String),
}

/// What passed through a port since it was added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortStats {
    /// The port's name.
    pub name: String,
    /// Frames that came in by it and were not refused.
    pub received_frames: u64,
    /// Frames put into its output queue.
    pub sent_frames: u64,
    /// Frames for it that were dropped: its queue was full, or nobody was connected.
    pub dropped_frames: u64,
    /// Frames that came in by it after it was fenced, and were refused.
    pub fenced_frames: u64,
    /// Frames that came in by it and were shorter than an Ethernet header.
    pub malformed_frames: u64,
    /// Whether it is fenced.
    pub fenced: bool,
    /// Whether somebody is connected.
    pub connected: bool,
}

struct Port {
    stats: PortStats,
    output: mpsc::Sender<Bytes>,
    fence: watch::Sender<bool>,
}

#[derive(Default)]
struct Ports {
    fabric: Fabric,
    ports: Vec<Port>,
}

impl Ports {
    fn forward(&mut self, from: usize, frame: &Bytes) {
        let decision = self.fabric.decide(from, frame);
        let stats = &mut self.ports[from].stats;
        match decision {
            Decision::Fenced => stats.fenced_frames += 1,
            Decision::Malformed => stats.malformed_frames += 1,
            Decision::To(_) | Decision::Flood | Decision::Stay => stats.received_frames += 1,
        }
        match decision {
            Decision::To(port) => self.ports[port].send(frame),
            Decision::Flood => {
                let Self { fabric, ports } = self;
                let others = ports.iter_mut().enumerate().filter(|(port, _)| *port != from && !fabric.is_fenced(*port));
                others.for_each(|(_, port)| port.send(frame));
            }
            Decision::Stay | Decision::Fenced | Decision::Malformed => {}
        }
    }
}

impl Port {
    fn send(&mut self, frame: &Bytes) {
        if self.stats.connected && self.output.try_send(frame.clone()).is_ok() {
            self.stats.sent_frames += 1;
        } else {
            self.stats.dropped_frames += 1;
        }
    }
}

#[derive(Default)]
struct Shared(Mutex<Ports>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ports> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running switch. Dropping it ends its ports. The tasks run on the runtime the ports were added from.
#[derive(Default)]
pub struct Switch {
    shared: Arc<Shared>,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Switch {
    /// A switch without ports.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a port that listens on a Unix socket at `path`. It serves one connection at a time; a new one
    /// replaces the old. While nobody is connected, frames for it are dropped: the link is down.
    ///
    /// # Errors
    /// [`SwitchError::NameTaken`], or [`SwitchError::Listen`] when `path` cannot be listened on (it must not exist).
    pub fn add_unix_port(&self, name: &str, path: &Path) -> Result<(), SwitchError> {
        let listener =
            UnixListener::bind(path).map_err(|source| SwitchError::Listen { path: path.to_owned(), source })?;
        let (output, queue) = mpsc::channel(PORT_QUEUE_FRAMES);
        let (port, fenced) = self.add_port(name, output, false)?;
        self.spawn(serve_port(self.shared.clone(), port, listener, queue, fenced));
        Ok(())
    }

    /// Adds a port inside this process: frames sent into the sender enter the switch, frames the switch sends
    /// out of the port come from the receiver. Both are bounded at [`PORT_QUEUE_FRAMES`].
    ///
    /// # Errors
    /// [`SwitchError::NameTaken`].
    pub fn add_local_port(&self, name: &str) -> Result<(mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>), SwitchError> {
        let (output, from_switch) = mpsc::channel(PORT_QUEUE_FRAMES);
        let (into_switch, mut input) = mpsc::channel::<Bytes>(PORT_QUEUE_FRAMES);
        let (port, _) = self.add_port(name, output, true)?;
        let shared = self.shared.clone();
        self.spawn(async move {
            while let Some(frame) = input.recv().await {
                shared.lock().forward(port, &frame);
            }
            shared.lock().ports[port].stats.connected = false;
        });
        Ok((into_switch, from_switch))
    }

    /// From now on carries no frame from or to the port `name`. Frames it hands in are still read and counted in
    /// [`PortStats::fenced_frames`]; frames waiting in its output queue are never written. A frame of its that was
    /// forwarded before is past recall, as on a wire.
    ///
    /// # Errors
    /// [`SwitchError::UnknownPort`].
    pub fn fence(&self, name: &str) -> Result<(), SwitchError> {
        let mut guard = self.shared.lock();
        let Ports { fabric, ports } = &mut *guard;
        let found = ports.iter_mut().enumerate().find(|(_, port)| port.stats.name == name);
        let (index, port) = found.ok_or_else(|| SwitchError::UnknownPort(name.to_owned()))?;
        fabric.fence(index);
        port.stats.fenced = true;
        port.fence.send_replace(true);
        Ok(())
    }

    /// The counters of every port, in the order the ports were added.
    #[must_use]
    pub fn stats(&self) -> Vec<PortStats> {
        self.shared.lock().ports.iter().map(|port| port.stats.clone()).collect()
    }

    fn add_port(
        &self,
        name: &str,
        output: mpsc::Sender<Bytes>,
        connected: bool,
    ) -> Result<(usize, watch::Receiver<bool>), SwitchError> {
        let mut ports = self.shared.lock();
        if ports.ports.iter().any(|port| port.stats.name == name) {
            return Err(SwitchError::NameTaken(name.to_owned()));
        }
        let (fence, fenced) = watch::channel(false);
        let stats = PortStats { name: name.to_owned(), connected, ..PortStats::default() };
        ports.ports.push(Port { stats, output, fence });
        Ok((ports.fabric.add_port(), fenced))
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(tokio::spawn(task).abort_handle());
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(AbortHandle::abort);
    }
}

/// The life of a Unix port: one connection after another, the newest first in line.
async fn serve_port(
    shared: Arc<Shared>,
    port: usize,
    listener: UnixListener,
    mut queue: mpsc::Receiver<Bytes>,
    fenced: watch::Receiver<bool>,
) {
    let mut newest = None;
    loop {
        let Some(stream) = newest.take() else {
            newest = Some(accept("a switch port's client", || listener.accept()).await.0);
            continue;
        };
        // What waited for the connection before this one was lost with its link.
        while queue.try_recv().is_ok() {}
        shared.lock().ports[port].stats.connected = true;
        tokio::select! {
            ended = serve_connection(&shared, port, stream, &mut queue, fenced.clone()) => {
                tracing::debug!(port, ?ended, "switch port disconnected");
            }
            (stream, _) = accept("a switch port's client", || listener.accept()) => newest = Some(stream),
        }
        let mut guard = shared.lock();
        guard.ports[port].stats.connected = false;
        guard.fabric.forget(port);
    }
}

async fn serve_connection(
    shared: &Shared,
    port: usize,
    stream: UnixStream,
    queue: &mut mpsc::Receiver<Bytes>,
    mut fenced: watch::Receiver<bool>,
) -> Result<(), FrameError> {
    let (read, write) = stream.into_split();
    let mut reader = FrameReader::new(read);
    let mut writer = FrameWriter::new(write);
    let read_all = async {
        while let Some(frame) = reader.read().await? {
            shared.lock().forward(port, &frame);
        }
        Ok(())
    };
    let write_all = async {
        while writer.write_waiting(queue).await? > 0 {}
        Ok(())
    };
    let write_until_fenced = async {
        tokio::select! {
            biased;
            // A fenced port is never written to again, but it is read on, so that what it tries is counted.
            () = async { _ = fenced.wait_for(|&fenced| fenced).await } => std::future::pending().await,
            ended = write_all => ended,
        }
    };
    tokio::select! {
        ended = read_all => ended,
        ended = write_until_fenced => ended,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use tokio::time::timeout;

    const BROADCAST: Mac = [0xff; 6];

    fn mac(n: u8) -> Mac {
        [0x52, 0x54, 0, 0, 0, n]
    }

    fn frame(destination: Mac, source: Mac) -> Bytes {
        [&destination[..], &source[..], &[0x08, 0x06, 1, 2, 3]].concat().into()
    }

    fn fabric(ports: usize) -> Fabric {
        let mut fabric = Fabric::default();
        for _ in 0..ports {
            fabric.add_port();
        }
        fabric
    }

    #[test]
    fn it_floods_until_it_learns_and_follows_a_mac_that_moves() {
        let mut fabric = fabric(3);
        assert_eq!(fabric.decide(0, &frame(mac(1), mac(9))), Decision::Flood);
        assert_eq!(fabric.decide(1, &frame(mac(9), mac(1))), Decision::To(0));
        assert_eq!(fabric.decide(0, &frame(mac(1), mac(9))), Decision::To(1));
        assert_eq!(fabric.decide(1, &frame(mac(1), mac(2))), Decision::Stay);
        assert_eq!(fabric.decide(2, &frame(BROADCAST, mac(1))), Decision::Flood, "a gratuitous ARP");
        assert_eq!(fabric.decide(0, &frame(mac(1), mac(9))), Decision::To(2));
        assert_eq!(fabric.decide(0, &frame([0x33, 0x33, 0, 0, 0, 1], mac(9))), Decision::Flood, "multicast");
        assert_eq!(fabric.decide(0, &[0; 13]), Decision::Malformed);
    }

    #[test]
    fn a_group_address_is_never_learned_and_the_table_is_bounded() {
        let mut fabric = fabric(2);
        assert_eq!(fabric.decide(0, &frame(mac(1), BROADCAST)), Decision::Flood);
        assert!(fabric.port_of_mac.is_empty());
        for n in 0..2 * MACS_MAX {
            let [high, low] = u16::try_from(n).unwrap().to_be_bytes();
            fabric.decide(0, &frame(BROADCAST, [2, 0, 0, 0, high, low]));
        }
        assert_eq!(fabric.port_of_mac.len(), MACS_MAX);
        assert_eq!(fabric.decide(1, &frame(mac(1), [2, 0, 0, 0, 0, 7])), Decision::Flood);
        assert_eq!(fabric.port_of_mac[&[2, 0, 0, 0, 0, 7]], 1, "a known address still moves");
    }

    #[test]
    fn a_port_whose_link_is_down_is_forgotten() {
        let mut fabric = fabric(3);
        for port in [0, 1] {
            fabric.decide(port, &frame(BROADCAST, mac(port as u8)));
        }
        fabric.forget(0);
        assert_eq!(fabric.decide(2, &frame(mac(0), mac(9))), Decision::Flood);
        assert_eq!(fabric.decide(2, &frame(mac(1), mac(9))), Decision::To(1));
        fabric.decide(0, &frame(BROADCAST, mac(0)));
        assert_eq!(fabric.decide(2, &frame(mac(0), mac(9))), Decision::To(0), "and learned again");
    }

    #[test]
    fn a_fenced_port_is_forgotten_and_cannot_steal_the_mac_back() {
        let mut fabric = fabric(3);
        fabric.decide(0, &frame(BROADCAST, mac(1)));
        fabric.fence(0);
        assert_eq!(fabric.decide(2, &frame(mac(1), mac(9))), Decision::Flood);
        fabric.decide(1, &frame(BROADCAST, mac(1)));
        assert_eq!(fabric.decide(0, &frame(BROADCAST, mac(1))), Decision::Fenced);
        assert_eq!(fabric.decide(2, &frame(mac(1), mac(9))), Decision::To(1));
    }

    async fn next(queue: &mut mpsc::Receiver<Bytes>) -> Bytes {
        timeout(Duration::from_secs(5), queue.recv()).await.expect("a frame within 5 s").expect("the port lives")
    }

    async fn connect(
        path: &Path,
    ) -> (FrameReader<tokio::net::unix::OwnedReadHalf>, FrameWriter<tokio::net::unix::OwnedWriteHalf>) {
        let (read, write) = UnixStream::connect(path).await.unwrap().into_split();
        (FrameReader::new(read), FrameWriter::new(write))
    }

    async fn wait_for(switch: &Switch, what: impl Fn(&[PortStats]) -> bool) {
        let waited = timeout(Duration::from_secs(5), async {
            while !what(&switch.stats()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        assert!(waited.await.is_ok(), "{:?}", switch.stats());
    }

    #[tokio::test]
    async fn a_takeover_as_the_switch_sees_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path_a, path_b) = (dir.path().join("a"), dir.path().join("b"));
        let switch = Switch::new();
        switch.add_unix_port("a", &path_a).unwrap();
        switch.add_unix_port("b", &path_b).unwrap();
        assert!(matches!(switch.add_local_port("a"), Err(SwitchError::NameTaken(_))));
        let (edge, mut from_switch) = switch.add_local_port("edge").unwrap();
        let (mut a_reads, mut a_writes) = connect(&path_a).await;
        let (mut b_reads, mut b_writes) = connect(&path_b).await;
        wait_for(&switch, |ports| ports[0].connected && ports[1].connected).await;

        a_writes.write(&frame(BROADCAST, mac(1))).await.unwrap();
        assert_eq!(next(&mut from_switch).await, frame(BROADCAST, mac(1)));
        assert_eq!(b_reads.read().await.unwrap().unwrap(), frame(BROADCAST, mac(1)));
        edge.send(frame(mac(1), mac(9))).await.unwrap();
        assert_eq!(a_reads.read().await.unwrap().unwrap(), frame(mac(1), mac(9)));

        assert!(matches!(switch.fence("c"), Err(SwitchError::UnknownPort(_))));
        switch.fence("a").unwrap();
        b_writes.write(&frame(BROADCAST, mac(1))).await.unwrap();
        assert_eq!(next(&mut from_switch).await, frame(BROADCAST, mac(1)));
        a_writes.write(&frame(mac(9), mac(1))).await.unwrap();
        wait_for(&switch, |ports| ports[0].fenced_frames == 1).await;
        edge.send(frame(mac(1), mac(9))).await.unwrap();
        assert_eq!(b_reads.read().await.unwrap().unwrap(), frame(mac(1), mac(9)));
        assert!(from_switch.try_recv().is_err(), "nothing of the fenced port came through");
        let quiet = timeout(Duration::from_millis(50), a_reads.read()).await;
        assert!(quiet.is_err(), "nothing reaches the fenced port");
    }

    #[tokio::test]
    async fn a_new_connection_replaces_the_old_one_and_a_full_queue_drops_its_tail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let switch = Switch::new();
        switch.add_unix_port("a", &path).unwrap();
        let (edge, _from_switch) = switch.add_local_port("edge").unwrap();
        edge.send(frame(BROADCAST, mac(9))).await.unwrap();
        wait_for(&switch, |ports| ports[0].dropped_frames == 1).await;

        let (mut old, _old_writes) = connect(&path).await;
        wait_for(&switch, |ports| ports[0].connected).await;
        let (mut new, _new_writes) = connect(&path).await;
        assert!(old.read().await.unwrap().is_none(), "the old connection is closed");
        wait_for(&switch, |ports| ports[0].connected).await;
        edge.send(frame(BROADCAST, mac(8))).await.unwrap();
        assert_eq!(new.read().await.unwrap().unwrap(), frame(BROADCAST, mac(8)));

        let big = Bytes::from([&frame(BROADCAST, mac(9))[..], &[0; 9000]].concat());
        let total = 2 * PORT_QUEUE_FRAMES as u64;
        for _ in 0..total {
            edge.send(big.clone()).await.unwrap();
        }
        wait_for(&switch, |ports| ports[1].received_frames == total + 2).await;
        let stats = &switch.stats()[0];
        assert!(stats.dropped_frames > 1 && stats.sent_frames + stats.dropped_frames == total + 2, "{stats:?}");
    }
}
