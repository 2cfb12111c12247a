//! The command that has the properties of QEMU's network filters. Source: `net/filter-mirror.c`, `net/filter-rewriter.c`.

use crate::daemon::compare::port::PortAddress;
use crate::daemon::filter::{Config, Network};
use clap::Args;

/// Arguments of `filter`.
///
/// The interface is the host's end of the guest's: its vif, its tap, the other end of its veth. Sockets are as with
/// `compare`, and speak what QEMU's filters speak: unix:PATH or tcp:HOST:PORT listens, with ,server=off it connects,
/// again and again.
///
/// On the primary: --dev, --net or --tap, --mirror, --redirect (to primary_in), --to-network (from outdev). On the
/// secondary: --dev, --to-guest (from the mirror), --redirect (to secondary_in), --rewriter, --notify-dev for
/// checkpoints, and for a takeover --net or --tap. While a socket has no peer nothing passes beside it: frames wait, and
/// then are lost, and counted.
///
/// SIGUSR1 prints one line of JSON that says how it stands. SIGUSR2 is a failover: the guest speaks to the network itself
/// from then on. SIGTERM ends it, and with it the guest's network.
#[derive(Args, Debug)]
pub struct FilterArgs {
    /// The interface whose other end is the guest's
    #[arg(long, value_name = "IFNAME")]
    pub dev: String,
    /// The network's side: an interface
    #[arg(long, value_name = "IFNAME", conflicts_with = "tap")]
    pub net: Option<String>,
    /// The network's side: a tap that is made for it; %d in its name is a number that is free
    #[arg(long, value_name = "IFNAME")]
    pub tap: Option<String>,
    /// Make the tap a port of this bridge
    #[arg(long, value_name = "IFNAME", requires = "tap")]
    pub bridge: Option<String>,
    /// Copy what enters the guest to there (filter-mirror, queue=tx, outdev)
    #[arg(long, value_name = "PORT")]
    pub mirror: Option<PortAddress>,
    /// What comes from there enters the guest (filter-redirector, queue=tx, indev)
    #[arg(long, alias = "to_guest", value_name = "PORT")]
    pub to_guest: Option<PortAddress>,
    /// What the guest says goes there, and nowhere else (filter-redirector, queue=rx, outdev)
    #[arg(long, value_name = "PORT")]
    pub redirect: Option<PortAddress>,
    /// What comes from there leaves for the network (filter-redirector, queue=rx, indev)
    #[arg(long, alias = "to_network", value_name = "PORT")]
    pub to_network: Option<PortAddress>,
    /// Move the sequence numbers of the guest's TCP into the other guest's space (filter-rewriter)
    #[arg(long)]
    pub rewriter: bool,
    /// Where a toolstack says COLO_CHECKPOINT, as to a colo-compare, while the guest stands still and has become what the
    /// other is: the rewriter forgets then
    #[arg(long, alias = "notify_dev", value_name = "PORT")]
    pub notify_dev: Option<PortAddress>,
    /// Frames go with their virtio-net headers over all sockets, unfinished and uncut
    #[arg(long, alias = "vnet_hdr_support")]
    pub vnet_hdr_support: bool,
    /// How long these headers are at the other ends: 12, or as a QEMU's netdev there has them
    #[arg(long, alias = "vnet_hdr_len", value_name = "BYTES", default_value_t = 12, value_parser = vnet_hdr_len)]
    #[arg(requires = "vnet_hdr_support")]
    pub vnet_hdr_len: usize,
    /// Take frames from the kernel by a ring: cheaper for many, and a frame alone comes a millisecond late
    #[arg(long)]
    pub ring: bool,
    /// Log each peer on standard error; XEN_COLO_LOG says more exactly what
    #[arg(short, long)]
    pub verbose: bool,
}

fn vnet_hdr_len(text: &str) -> Result<usize, String> {
    match text {
        "0" => Ok(0),
        "10" => Ok(10),
        "12" => Ok(12),
        _ => Err("a virtio-net header is of 10 or 12 bytes, or of 0 where there is none".into()),
    }
}

impl From<FilterArgs> for Config {
    fn from(args: FilterArgs) -> Self {
        let tap = args.tap.map(|name| Network::Tap(name, args.bridge));
        Self {
            dev: args.dev,
            network: tap.or(args.net.map(Network::Interface)),
            mirror: args.mirror,
            to_guest: args.to_guest,
            redirect: args.redirect,
            to_network: args.to_network,
            rewriter: args.rewriter,
            notify_dev: args.notify_dev,
            vnet_hdr_support: args.vnet_hdr_support,
            vnet_hdr_len: args.vnet_hdr_len,
            ring: args.ring,
        }
    }
}
