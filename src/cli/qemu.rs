//! The commands for a pair of QEMUs. Source: QEMU `docs/COLO-FT.txt`, whose commands by hand these stand for.

use crate::daemon::address::Address;
use crate::qmp::commands::Listen;
use crate::qmp::pair::{Disk, Net, Pair, Side};
use clap::{Args, Subcommand, ValueEnum};
use std::time::Duration;

/// Arguments of `qemu`.
///
/// Both QEMUs run already: the primary with each disk a quorum of one child, the secondary with each disk a quorum over
/// driver=replication,mode=secondary over an image of its own. Where QEMU itself carries the guest (--migrate) the secondary
/// runs with -incoming. A monitor is a socket's path, unix:PATH, tcp:HOST:PORT, or exec:COMMAND that speaks to one
/// (exec:ssh b socat - unix:/run/b.qmp).
#[derive(Args, Debug)]
pub struct QemuArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: QemuVerb,
}

/// What can be done with a pair of QEMUs.
#[derive(Subcommand, Debug)]
pub enum QemuVerb {
    /// Make two QEMUs a COLO pair: disks, network and guest; when one of them refuses, both are left as they were
    Protect {
        /// The pair.
        #[command(flatten)]
        pair: QemuPair,
        /// Where the secondary serves its disks, as the primary reaches it: tcp:HOST:PORT or unix:PATH
        #[arg(long, value_name = "ADDRESS", value_parser = parse_listen)]
        nbd: Listen,
        /// Where the secondary waits for the guest (its -incoming). Without it a Xen toolstack carries the guest, and
        /// checkpoints are said to QEMU by `xl-colo qemu checkpoint`
        #[arg(long, value_name = "URI")]
        migrate: Option<String>,
        /// QEMU's longest time between two checkpoints (x-checkpoint-delay)
        #[arg(long, value_name = "MS", requires = "migrate")]
        checkpoint_delay_ms: Option<u32>,
        /// How long the guest's first way to the secondary may take
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        patience_s: u64,
    },
    /// Say how the QEMUs are
    Status {
        /// Where they are.
        #[command(flatten)]
        monitors: QemuMonitors,
    },
    /// Seal a checkpoint on both, while their guests stand still; of a pair whose guest a Xen toolstack carries
    Checkpoint {
        /// Where they are.
        #[command(flatten)]
        monitors: QemuMonitors,
    },
    /// Let the survivor go on alone. See to it first that the lost one is: QEMU has no fence
    Failover {
        /// The pair.
        #[command(flatten)]
        pair: QemuPair,
        /// Who is lost
        #[arg(long, value_name = "WHO")]
        lost: Lost,
        /// Return when what the guest wrote is merged into the secondary's image
        #[arg(long)]
        wait: bool,
    },
    /// End a pair: the guest goes on at the primary. A secondary that --migrate has filled is told to quit
    Unprotect {
        /// The pair.
        #[command(flatten)]
        pair: QemuPair,
    },
}

/// Who is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Lost {
    /// The primary: the secondary goes on.
    Primary,
    /// The secondary: the primary goes on.
    Secondary,
}

impl From<Lost> for Side {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Primary => Self::Primary,
            Lost::Secondary => Self::Secondary,
        }
    }
}

/// Where two monitors are.
#[derive(Args, Debug)]
pub struct QemuMonitors {
    /// The primary's monitor
    #[arg(long, value_name = "MONITOR", value_parser = parse_monitor)]
    pub primary: Option<Address>,
    /// The secondary's monitor
    #[arg(long, value_name = "MONITOR", value_parser = parse_monitor, required_unless_present = "primary")]
    pub secondary: Option<Address>,
    /// How long one order may take
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout_s: u64,
}

impl QemuMonitors {
    /// How long one order may take.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        Duration::from_secs(self.timeout_s)
    }
}

/// A pair: where it is, and what belongs to it.
#[derive(Args, Debug)]
pub struct QemuPair {
    /// Where they are.
    #[command(flatten)]
    pub monitors: QemuMonitors,
    /// A disk: the id of the primary's quorum, and of the secondary's image, which is the export's name; again for each
    #[arg(long = "disk", value_name = "QUORUM=IMAGE", value_parser = parse_disk, required = true)]
    pub disks: Vec<Disk>,
    /// A netdev, the same id on both, and where the primary listens for its secondary: with copies of what its guest hears,
    /// and for what the other one says; again for each
    #[arg(long = "net", value_name = "NETDEV=MIRROR,COMPARE", value_parser = parse_net)]
    pub nets: Vec<Net>,
    /// Directory on the primary's host for the sockets by which its QEMU speaks to itself
    #[arg(long, value_name = "DIR", default_value = "/run")]
    pub loop_dir: String,
}

impl QemuPair {
    /// What it comes to.
    #[must_use]
    pub fn pair(&self) -> Pair {
        let nets = self.nets.iter().cloned().map(|net| Net { loop_dir: self.loop_dir.clone(), ..net });
        Pair { disks: self.disks.clone(), nets: nets.collect() }
    }
}

fn parse_monitor(text: &str) -> Result<Address, String> {
    if text.contains('/') && !["unix:", "tcp:", "exec:"].iter().any(|kind| text.starts_with(kind)) {
        return Ok(Address::Unix(text.into()));
    }
    text.parse::<Address>().map_err(|error| error.to_string())
}

fn parse_listen(text: &str) -> Result<Listen, String> {
    match text.parse::<Address>().map_err(|error| error.to_string())? {
        Address::Unix(path) => Ok(Listen::Unix { path: path.to_string_lossy().into_owned() }),
        Address::Tcp(at) => {
            let (host, port) = at.rsplit_once(':').unwrap_or((&at, ""));
            let host = host.trim_start_matches('[').trim_end_matches(']');
            Ok(Listen::Inet { host: host.to_owned(), port: port.to_owned() })
        }
        Address::Exec(_) => Err("QEMU listens on a socket: tcp:HOST:PORT or unix:PATH".into()),
    }
}

fn parse_disk(text: &str) -> Result<Disk, String> {
    match text.split_once('=') {
        Some((quorum, image)) if !quorum.is_empty() && !image.is_empty() => {
            Ok(Disk { quorum: quorum.to_owned(), image: image.to_owned() })
        }
        _ => Err(format!("{text:?} is no disk: write QUORUM=IMAGE, ids of the primary and of the secondary")),
    }
}

fn parse_net(text: &str) -> Result<Net, String> {
    let bad = || format!("{text:?} is no network: write NETDEV=MIRROR,COMPARE, where the two are addresses");
    let (netdev, ports) = text.split_once('=').ok_or_else(bad)?;
    let (mirror, compare) = ports.split_once(',').ok_or_else(bad)?;
    let (mirror, compare) = (parse_listen(mirror)?, parse_listen(compare)?);
    Ok(Net { netdev: netdev.to_owned(), mirror, compare, loop_dir: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_qemu_has_them() {
        let inet = |host: &str, port: &str| Listen::Inet { host: host.into(), port: port.into() };
        assert_eq!(parse_listen("tcp:[::1]:9"), Ok(inet("::1", "9")));
        assert_eq!(parse_listen("b:9999"), Ok(inet("b", "9999")));
        assert!(parse_listen("exec:x").unwrap_err().contains("unix:PATH"));
        assert_eq!(parse_monitor("/run/a.qmp"), Ok(Address::Unix("/run/a.qmp".into())));
        assert_eq!(parse_monitor("exec:a/b"), Ok(Address::Exec("a/b".into())));
        let net = parse_net("hn0=tcp:a:1,unix:/x").unwrap();
        assert_eq!((net.netdev.as_str(), net.mirror), ("hn0", inet("a", "1")));
        for bad in ["hn0", "hn0=tcp:a:1", "hn0=a,b"] {
            parse_net(bad).unwrap_err();
        }
        for bad in ["disk", "=a", "a="] {
            assert!(parse_disk(bad).unwrap_err().contains("QUORUM=IMAGE"));
        }
    }
}
