//! `xl-colo compare`: the comparator behind QEMU's chardev sockets, in the place of a `colo-compare` object.
//!
//! ```text
//!   QEMU A: filter-redirector ─▶ primary_in ──┐                       ┌─▶ outdev ─▶ filter-redirector: QEMU A
//!                                             ├─ intake ─ Comparator ─┤
//!   QEMU B: filter-redirector ─▶ secondary_in ┘     one thread        └─▶ notify_dev ◀─▶ libxl's userspace proxy
//! ```
//!
//! One thread does all of it on sockets that never block; [`port`] has one more for each socket, which waits for its
//! peer. There are no epochs on this wire, so both guests' frames are of the comparator's present one, and
//! COLO_CHECKPOINT ends it. Both guests stand still then: what has arrived from the secondary is of a state
//! that no longer exists and is dropped, what has arrived from the primary leaves.
//!
//! Nothing of the primary's is ever dropped. While outdev is away or slow its frames wait, and when a MiB of them does,
//! or the comparator's bound is reached, primary_in is no longer read: the guest's own queue is the next place to wait.
//!
//! The end of the process, by SIGTERM or SIGINT, is what deleting the object is in QEMU: what is held is sent on.
//! Source: `net/colo-compare.c`; the property names, defaults and error texts are its own.

pub(super) mod intake;
pub(super) mod outbox;
pub mod port;
pub(super) mod wake;
pub(super) mod words;
pub(super) mod work;

use crate::compare;
use port::{PortAddress, Socket, Source};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use wake::Wake;
use work::{Port, Work};

/// QEMU counts packets; here the bound is in bytes, at so many a packet.
pub const QUEUED_PACKET_BYTES: usize = 4096;
/// Connections that may fill their queues before the whole is full.
const FULL_QUEUES: usize = 4;

/// How a comparator is set up: QEMU's properties.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Where the primary's frames come from.
    pub primary_in: PortAddress,
    /// Where the secondary's frames come from.
    pub secondary_in: PortAddress,
    /// Where released frames go.
    pub outdev: PortAddress,
    /// Who is told of divergence, and says when a checkpoint was made.
    pub notify_dev: Option<PortAddress>,
    /// Whether virtio-net headers come with the frames.
    pub vnet_hdr_support: bool,
    /// How long a frame waits for its like.
    pub compare_timeout: Duration,
    /// What a connection may hold, in packets of [`QUEUED_PACKET_BYTES`].
    pub max_queue_size: usize,
}

/// Settings that QEMU refuses too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadConfig {
    /// Two of the sockets are one.
    #[error("'indev' and 'outdev' could not be same for compare module")]
    Same,
    /// A property that must not be zero.
    #[error("Property 'colo-compare.{0}' requires a positive value")]
    NotPositive(&'static str),
}

impl Config {
    /// Whether it can be carried out.
    pub fn check(&self) -> Result<(), BadConfig> {
        let at = |port: &PortAddress| port.address.clone();
        let (primary, secondary, out) = (at(&self.primary_in), at(&self.secondary_in), at(&self.outdev));
        let notify = self.notify_dev.as_ref().map(at);
        if primary == out || secondary == out || primary == secondary {
            return Err(BadConfig::Same);
        }
        if notify.is_some_and(|notify| [primary, secondary, out].contains(&notify)) {
            return Err(BadConfig::Same);
        }
        if self.compare_timeout.is_zero() {
            return Err(BadConfig::NotPositive("compare_timeout"));
        }
        if self.max_queue_size == 0 {
            return Err(BadConfig::NotPositive("max_queue_size"));
        }
        Ok(())
    }

    fn limits(&self) -> compare::Config {
        let max_flow_bytes = self.max_queue_size.saturating_mul(QUEUED_PACKET_BYTES);
        compare::Config {
            compare_timeout: self.compare_timeout,
            max_flow_bytes,
            max_queue_bytes: max_flow_bytes.saturating_mul(FULL_QUEUES),
            ..compare::Config::default()
        }
    }
}

/// Why a comparator did not begin, or ended.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A socket that is not to be had.
    #[error("{name} {at}: {error}")]
    Listen {
        /// The port.
        name: &'static str,
        /// Its address.
        at: PortAddress,
        /// The system's word.
        error: io::Error,
    },
    /// The system refused something else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The ports that are open, for a line that says so.
#[derive(Debug)]
pub struct Opened(Vec<(&'static str, PortAddress)>);

impl fmt::Display for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "compare:")?;
        self.0.iter().try_for_each(|(name, at)| write!(f, " {name} {at}"))
    }
}

impl Opened {
    /// The same as an object.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let ports = self.0.iter().map(|(name, at)| ((*name).to_owned(), at.to_string().into()));
        serde_json::json!({"what": "compare", "listening": ports.collect::<serde_json::Map<_, _>>()})
    }
}

/// Compares until SIGTERM or SIGINT. `opened` is called when peers can connect, `report` with a JSON object for each
/// SIGUSR1.
pub async fn run(
    config: Config,
    opened: impl FnOnce(&Opened),
    report: impl FnMut(&serde_json::Value) + Send + 'static,
) -> Result<(), CompareError> {
    let mut ends = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let mut asks = signal(SignalKind::user_defined1())?;
    let wake = Arc::new(Wake::new()?);
    let wanted = [
        ("primary_in", Some(&config.primary_in)),
        ("secondary_in", Some(&config.secondary_in)),
        ("outdev", Some(&config.outdev)),
        ("notify_dev", config.notify_dev.as_ref()),
    ];
    let wanted: Vec<_> = wanted.into_iter().filter_map(|(name, at)| Some((name, at?))).collect();
    let Ports { ports, peers, at, remove } = Ports::open(&wanted, &wake).await?;
    opened(&Opened(at));
    let (ended, mut over) = tokio::sync::oneshot::channel();
    let work = Work::new(&config, ports, peers, wake.clone(), report);
    std::thread::Builder::new().name("compare".into()).spawn(move || ended.send(work.run()))?;
    let [terminate, interrupt] = &mut ends;
    loop {
        tokio::select! {
            _ = terminate.recv() => wake.end.store(true, std::sync::atomic::Ordering::Release),
            _ = interrupt.recv() => wake.end.store(true, std::sync::atomic::Ordering::Release),
            _ = asks.recv() => wake.report.store(true, std::sync::atomic::Ordering::Release),
            result = &mut over => {
                drop(remove);
                return Ok(result.unwrap_or_else(|_| Err(io::Error::other("the comparing thread is gone")))?);
            }
        }
        wake.wake();
    }
}

/// Sockets where peers are met from now on.
pub(super) struct Ports {
    /// In the order asked for.
    pub(super) ports: Vec<Port>,
    /// Peers, by the number of their port.
    pub(super) peers: Receiver<(usize, Socket)>,
    /// Where they are met.
    pub(super) at: Vec<(&'static str, PortAddress)>,
    /// Removes the sockets' names.
    pub(super) remove: Remove,
}

impl Ports {
    /// Opens them, and wakes for each peer.
    pub(super) async fn open(wanted: &[(&'static str, &PortAddress)], wake: &Arc<Wake>) -> Result<Self, CompareError> {
        let (give, peers) = channel();
        let (mut ports, mut at) = (Vec::new(), Vec::new());
        for (number, &(name, address)) in wanted.iter().enumerate() {
            let listen = |error| CompareError::Listen { name, at: address.clone(), error };
            let (source, found) = Source::open(address).await.map_err(listen)?;
            let (want, wanted) = channel();
            let (give, wake) = (give.clone(), wake.clone());
            std::thread::Builder::new()
                .name(name.into())
                .spawn(move || source.serve(name, number, &wanted, &give, &wake))?;
            ports.push(Port::new(name, want));
            at.push((name, found));
        }
        let remove = Remove(at.iter().filter(|(_, at)| at.server).map(|(_, at)| at.address.clone()).collect());
        Ok(Self { ports, peers, at, remove })
    }
}

/// Unix sockets leave their names behind.
pub(super) struct Remove(Vec<crate::daemon::address::Address>);

impl Drop for Remove {
    fn drop(&mut self) {
        for address in &self.0 {
            if let crate::daemon::address::Address::Unix(path) = address {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            primary_in: "unix:p".parse().unwrap(),
            secondary_in: "unix:s".parse().unwrap(),
            outdev: "unix:o".parse().unwrap(),
            notify_dev: None,
            vnet_hdr_support: false,
            compare_timeout: Duration::from_secs(3),
            max_queue_size: 1024,
        }
    }

    #[test]
    fn what_qemu_refuses_is_refused_in_its_words() {
        let refused = |config: Config| config.check().unwrap_err().to_string();
        let same = "'indev' and 'outdev' could not be same for compare module";
        assert_eq!(config().check(), Ok(()));
        assert_eq!(refused(Config { outdev: config().primary_in, ..config() }), same);
        assert_eq!(refused(Config { secondary_in: config().primary_in, ..config() }), same);
        assert_eq!(refused(Config { notify_dev: Some(config().outdev), ..config() }), same);
        let zero = Config { compare_timeout: Duration::ZERO, ..config() };
        assert_eq!(refused(zero), "Property 'colo-compare.compare_timeout' requires a positive value");
        let zero = Config { max_queue_size: 0, ..config() };
        assert_eq!(refused(zero), "Property 'colo-compare.max_queue_size' requires a positive value");
    }

    #[test]
    fn the_defaults_are_the_engine_s_own() {
        assert_eq!(config().limits(), compare::Config::default());
    }
}
