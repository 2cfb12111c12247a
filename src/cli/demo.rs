//! The demo.

use crate::colo::hello::Mode;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Arguments of `demo`.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// colo: both guests run; remus: output waits for checkpoints
    #[arg(long, default_value = "colo")]
    pub mode: Mode,
    /// Which host dies
    #[arg(long, value_enum, default_value = "primary")]
    pub kill: Victim,
    /// The guest's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(4..=1 << 20))]
    pub guest_mib: u64,
    /// How long the client works before and after the kill together
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub seconds: u64,
    /// How often, in percent, the guest's responses differ between its two copies
    #[arg(long, value_name = "PERCENT", default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub diverge: u8,
    /// Keep the pair running and serve the guest at this address, for your own curl and your own kill
    #[arg(long, value_name = "ADDR:PORT")]
    pub serve: Option<std::net::SocketAddr>,
    /// Keep the event logs of both hosts in this directory, which must have none yet, and write the page of the run:
    /// DIR/report.html
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Use real Xen hosts that this program (scripts/nested/nested) boots and kills
    #[arg(long, value_name = "SCRIPT", hide = true, conflicts_with_all = ["serve", "diverge"])]
    pub nested: Option<PathBuf>,
    /// The Xen guest
    #[arg(long, value_enum, default_value = "pvh", hide = true)]
    pub guest: NestedGuest,
}

/// A guest of the nested hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum NestedGuest {
    /// With PV drivers and no device model.
    Pvh,
    /// Without PV drivers.
    Hvm,
    /// With PV drivers and a device model.
    Pvhvm,
}

impl NestedGuest {
    /// The domain's name, and its configuration's.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pvh => "pvh",
            Self::Hvm => "hvm",
            Self::Pvhvm => "pvhvm",
        }
    }
}

/// Which host dies in the demo.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Victim {
    /// The host that runs the guest.
    Primary,
    /// The host that stands by.
    Secondary,
}
