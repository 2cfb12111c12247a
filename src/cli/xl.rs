//! The commands that have xl's letters. Source: xen `docs/man/xl.1.pod.in`, "remus"; `tools/xl/xl_migrate.c`.

use crate::daemon::control;
use crate::daemon::remus::Config;
use clap::Args;
use std::path::PathBuf;

use super::HostRef;

/// Arguments of `remus`.
#[derive(Args, Debug)]
pub struct RemusArgs {
    /// The domain: its name, or its number
    pub domain: String,
    /// The peer: a name for ssh (or -s), HOST:PORT, unix:PATH, or with an empty -s a command
    pub host: String,
    /// Time between two checkpoints; 200 by default
    #[arg(short = 'i', value_name = "MS", conflicts_with = "colo", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub interval: Option<u64>,
    /// Send pages as they are
    #[arg(short = 'u')]
    pub uncompressed: bool,
    /// Use this instead of ssh; if it is empty, HOST is a command whose standard input and output lead to the peer
    #[arg(short = 's', value_name = "CMD", allow_hyphen_values = true)]
    pub shell: Option<String>,
    /// Tell the receiver to stay in the foreground
    #[arg(short = 'e')]
    pub foreground: bool,
    /// Taken for the sake of scripts: packets are held here, and no script is needed
    #[arg(short = 'N', value_name = "SCRIPT")]
    pub script: Option<PathBuf>,
    /// Allow -b, -n and -d
    #[arg(short = 'F')]
    pub force: bool,
    /// Protect for nobody: the peer keeps nothing
    #[arg(short = 'b', conflicts_with = "colo")]
    pub blackhole: bool,
    /// Let packets leave before the peer owns what they tell
    #[arg(short = 'n', conflicts_with = "colo")]
    pub no_network: bool,
    /// Do not replicate disks
    #[arg(short = 'd', conflicts_with = "colo")]
    pub no_disk: bool,
    /// Lock-step: both guests run, and a packet leaves when both said it
    #[arg(short = 'c', long)]
    pub colo: bool,
    /// Compare packets in user space, as is done here always
    #[arg(short = 'p', requires = "colo")]
    pub userspace_proxy: bool,
    /// The directory of the control sockets
    #[arg(long, value_name = "DIR", default_value_os_t = control::default_run_dir())]
    pub run_dir: PathBuf,
}

impl From<RemusArgs> for Config {
    fn from(args: RemusArgs) -> Self {
        Self {
            domain: args.domain,
            peer: args.host,
            shell: args.shell,
            colo: args.colo,
            interval_ms: args.interval,
            uncompressed: args.uncompressed,
            blackhole: args.blackhole,
            no_network: args.no_network,
            no_disk: args.no_disk,
            force: args.force,
            foreground: args.foreground,
            run_dir: args.run_dir,
        }
    }
}

/// Arguments of `receive`. Those of xl's migrate-receive that mean nothing here are taken, so that a script that has them
/// goes on working.
#[derive(Args, Debug)]
pub struct ReceiveArgs {
    /// The host that stands by
    #[command(flatten)]
    pub host: HostRef,
    /// Be a peer that keeps nothing
    #[arg(long)]
    pub blackhole: bool,
    /// xl's: stay in the foreground (it always does)
    #[arg(short = 'F', short_alias = 'e')]
    pub foreground: bool,
    /// xl's: for Remus (the primary says so itself)
    #[arg(short = 'r')]
    pub remus: bool,
    /// xl's: for COLO (the primary says so itself)
    #[arg(long)]
    pub colo: bool,
}
