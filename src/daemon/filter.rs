//! `xl-colo filter`: what QEMU's filter-mirror, filter-redirector and filter-rewriter are to a netdev, to an interface
//! of this host. Guests that are no QEMU's (a container, a machine behind a tap or a veth) are compared with it.
//!
//! ```text
//!   primary                                             secondary
//!
//!   network ══ net ─┬───────────▶ dev ══ guest A        mirror ──▶ to_guest ─ rewriter ─▶ dev ══ guest B
//!                   └▶ mirror ▶ to the secondary
//!   network ══ net ◀─ to_network ◀─ comparator          network ══ net ◀─ (alone) ─┬─ rewriter ◀─ dev ══ guest B
//!     comparator ◀─ redirect ◀─ dev ══ guest A          comparator ◀── redirect ◀──┘
//! ```
//!
//! | option | QEMU's object |
//! |---|---|
//! | mirror | filter-mirror, queue=tx, outdev |
//! | to_guest | filter-redirector, queue=tx, indev |
//! | redirect | filter-redirector, queue=rx, outdev |
//! | to_network | filter-redirector, queue=rx, indev |
//! | rewriter | filter-rewriter, queue=all |
//! | notify_dev | none: QEMU's own checkpoint frame tells its filter-rewriter |
//!
//! **Fail closed**, where QEMU's lets frames through when a socket has no peer. What the guest says goes to `redirect` and
//! nowhere else; what the network says reaches the guest when its copy is in the queue of `mirror`. While one of them has no
//! peer, or a slow one, a MiB of frames waits, then the interface is no longer read, then the kernel has no room and
//! loses frames, which is what a network may do. Each of these shows in the status, with its reason. A frame that only one
//! of the guests got makes them differ, and the comparator asks for a checkpoint.
//!
//! SIGUSR2 is QEMU's COLO_EVENT_FAILOVER: from then on the guest speaks to the network itself, and frames for it come
//! from there; connections that the rewriter has moved it goes on moving. What a secondary hears of the network before
//! that is dropped.
//!
//! **A checkpoint** is heard at `notify_dev`, in the words that a colo-compare hears there. Whoever makes guest B what
//! guest A is says COLO_CHECKPOINT while guest B stands still: what it has said and is not yet on its way is dropped, and the
//! rewriter forgets. Words are taken in order, and nothing acknowledges that one; so COLO_USERSPACE_PROXY_INIT comes behind
//! it, and guest B goes on when that is answered.
//!
//! ```text
//!   toolstack ── COLO_CHECKPOINT, INIT ──▶ filter at B: reads no guest, writes what was under way, until the comparator's
//!   toolstack ◀── INIT's answer ────────── host has all of it
//!   toolstack ── COLO_CHECKPOINT ────────▶ comparator: drops all that has come from the secondary: nothing old comes later
//! ```
//!
//! The trap: with `vnet_hdr_support` frames are as the guest's kernel left them, of up to 64 KiB and with checksums that
//! cover the pseudo header only. Both are for the kernel at the other end to finish. Without, or where the other end's are of
//! no length (a stock QEMU's whose guest has no virtio NIC), they are finished here.
//! Sources: `net/filter-mirror.c`, `net/filter-rewriter.c`.

mod device;
mod work;

use super::compare::port::PortAddress;
use super::compare::wake::Wake;
use super::compare::{CompareError, Ports};
use device::Device;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};
use work::Work;

/// The network's side of a filter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Network {
    /// An interface that there is.
    Interface(String),
    /// A tap that is made here, and the bridge that it becomes a port of.
    Tap(String, Option<String>),
}

/// How a filter is set up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The interface whose other end is the guest's.
    pub dev: String,
    /// The network, if there is one here.
    pub network: Option<Network>,
    /// Where copies of the frames go that enter the guest.
    pub mirror: Option<PortAddress>,
    /// Where more frames for the guest come from.
    pub to_guest: Option<PortAddress>,
    /// Where the guest's frames go.
    pub redirect: Option<PortAddress>,
    /// Where frames for the network come from.
    pub to_network: Option<PortAddress>,
    /// Whether the guest has sequence numbers of its own.
    pub rewriter: bool,
    /// Who says when the guest has become what the other is, and has no more numbers of its own.
    pub notify_dev: Option<PortAddress>,
    /// Whether virtio-net headers come with the frames.
    pub vnet_hdr_support: bool,
    /// How long they are at the other end: 0, 10 or 12. A redirector of QEMU's takes what comes for what its netdev has,
    /// and does not look.
    pub vnet_hdr_len: usize,
    /// Whether frames come out of the kernel by a ring.
    pub ring: bool,
}

/// Settings that make no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadConfig {
    /// Two of the sockets are one.
    #[error("'indev' and 'outdev' could not be same for filter redirector")]
    Same,
    /// The guest's frames would go nowhere.
    #[error(
        "filter redirector needs 'indev' or 'outdev' at least one property set: --redirect, or a network to leave for"
    )]
    Nowhere,
    /// There is no network to copy from or to send to.
    #[error("{0} needs a network: --net or --tap")]
    NoNetwork(&'static str),
    /// Frames for the guest would come from two sides at once.
    #[error("--mirror is the primary's and --to-guest the secondary's")]
    BothSides,
    /// There is nothing that a checkpoint changes.
    #[error("--notify-dev tells a secondary's --rewriter of checkpoints, and there is none here")]
    NoRewriter,
}

impl Config {
    /// The sockets that are wanted, by their names.
    fn ports(&self) -> Vec<(&'static str, &PortAddress)> {
        let named = [
            (work::MIRROR, &self.mirror),
            (work::TO_GUEST, &self.to_guest),
            (work::REDIRECT, &self.redirect),
            (work::TO_NETWORK, &self.to_network),
            (work::NOTIFY_DEV, &self.notify_dev),
        ];
        named.into_iter().filter_map(|(name, at)| Some((name, at.as_ref()?))).collect()
    }

    /// Whether it can be carried out.
    pub fn check(&self) -> Result<(), BadConfig> {
        let ports = self.ports();
        let is_twice = |at: usize| ports[..at].iter().any(|(_, other)| other.address == ports[at].1.address);
        if (0..ports.len()).any(is_twice) {
            return Err(BadConfig::Same);
        }
        if self.notify_dev.is_some() && (!self.rewriter || self.to_guest.is_none()) {
            return Err(BadConfig::NoRewriter);
        }
        match (&self.network, &self.redirect, &self.mirror, &self.to_network, &self.to_guest) {
            (None, None, ..) => Err(BadConfig::Nowhere),
            (None, _, Some(_), ..) => Err(BadConfig::NoNetwork("--mirror")),
            (None, _, _, Some(_), _) => Err(BadConfig::NoNetwork("--to-network")),
            (_, _, Some(_), _, Some(_)) => Err(BadConfig::BothSides),
            _ => Ok(()),
        }
    }
}

/// Why a filter did not begin, or ended.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// An interface that is not to be had, or is no longer there.
    #[error("network device {name}: {error}")]
    Device {
        /// Its name.
        name: String,
        /// The system's word.
        error: io::Error,
    },
    /// A socket that is not to be had.
    #[error(transparent)]
    Ports(#[from] CompareError),
    /// The system refused something else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What is open, for a line that says so.
#[derive(Debug)]
pub struct Opened(Vec<(&'static str, String)>);

impl std::fmt::Display for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "filter:")?;
        self.0.iter().try_for_each(|(name, at)| write!(f, " {name} {at}"))
    }
}

/// Filters until SIGTERM or SIGINT. `opened` is called when peers can connect, `report` with a JSON object for each
/// SIGUSR1.
pub async fn run(
    config: Config,
    opened: impl FnOnce(&Opened),
    report: impl FnMut(&serde_json::Value) + Send + 'static,
) -> Result<(), FilterError> {
    let mut signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::user_defined1()].map(signal);
    let [Ok(terminate), Ok(interrupt), Ok(asks)] = &mut signals else {
        return Err(io::Error::other("no signals can be heard").into());
    };
    let mut alone = signal(SignalKind::user_defined2())?;
    let wake = Arc::new(Wake::new()?);
    let dev = Device::interface(&config.dev, config.ring)?;
    let network = config.network.as_ref().map(|network| Device::network(network, config.ring)).transpose()?;
    let Ports { ports, peers, at, remove } = Ports::open(&config.ports(), &wake).await?;
    let mut open = vec![("dev", dev.name.clone())];
    open.extend(network.iter().map(|network| ("network", network.name.clone())));
    open.extend(at.into_iter().map(|(name, at)| (name, at.to_string())));
    opened(&Opened(open));
    let (ended, mut over) = tokio::sync::oneshot::channel();
    let work = Work::new(&config, dev, network, ports, peers, wake.clone(), report);
    std::thread::Builder::new().name("filter".into()).spawn(move || ended.send(work.run()))?;
    let say = |order: &AtomicBool| order.store(true, Ordering::Release);
    loop {
        tokio::select! {
            _ = terminate.recv() => say(&wake.end),
            _ = interrupt.recv() => say(&wake.end),
            _ = asks.recv() => say(&wake.report),
            _ = alone.recv() => say(&wake.alone),
            result = &mut over => {
                drop(remove);
                return result.unwrap_or_else(|_| Err(io::Error::other("the filtering thread is gone").into()));
            }
        }
        wake.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            dev: "vif1.0".into(),
            network: Some(Network::Interface("eth1".into())),
            mirror: "unix:m".parse().ok(),
            to_guest: None,
            redirect: "unix:r".parse().ok(),
            to_network: "unix:n".parse().ok(),
            rewriter: false,
            notify_dev: None,
            vnet_hdr_support: false,
            vnet_hdr_len: 12,
            ring: false,
        }
    }

    #[test]
    fn a_filter_that_leads_nowhere_is_refused() {
        let refused = |config: Config| config.check().unwrap_err();
        let without = |config: Config| Config { network: None, ..config };
        assert_eq!(config().check(), Ok(()));
        let secondary = Config { mirror: None, to_network: None, to_guest: config().mirror, ..config() };
        assert_eq!((secondary.check(), without(secondary.clone()).check()), (Ok(()), Ok(())));
        assert_eq!(refused(Config { redirect: config().mirror, ..config() }), BadConfig::Same);
        assert_eq!(refused(without(config())), BadConfig::NoNetwork("--mirror"));
        assert_eq!(refused(without(Config { mirror: None, ..config() })), BadConfig::NoNetwork("--to-network"));
        assert_eq!(refused(without(Config { redirect: None, ..secondary.clone() })), BadConfig::Nowhere);
        let told = Config { notify_dev: "unix:t".parse().ok(), rewriter: true, ..secondary.clone() };
        assert_eq!(told.check(), Ok(()));
        assert_eq!(refused(Config { rewriter: false, ..told.clone() }), BadConfig::NoRewriter);
        let primary = Config { notify_dev: told.notify_dev.clone(), rewriter: true, ..config() };
        assert_eq!(refused(primary), BadConfig::NoRewriter, "what a primary has said is never dropped");
        assert_eq!(refused(Config { notify_dev: told.to_guest.clone(), ..told }), BadConfig::Same);
        let both = Config { to_guest: "unix:g".parse().ok(), ..config() };
        assert_eq!(refused(both), BadConfig::BothSides);
    }
}
