//! What runs on a machine: a host, an arbiter.

use crate::colo::arbiter::Policy;
use crate::colo::hello::check_exports;
use crate::daemon::address::Address;
use crate::daemon::arbiter::Arbiter;
use crate::daemon::control;
use crate::daemon::metrics::MetricsAddress;
use clap::Args;
use std::path::PathBuf;

use super::config::{Config, ConfigError, xl};
use super::{parse_host_name, parse_policy};

/// Arguments of `host`.
#[derive(Args, Debug)]
pub struct HostArgs {
    /// The host's name; the two of a pair must differ. With --config the machine's by default
    #[arg(long, value_parser = parse_host_name, required_unless_present = "config")]
    pub name: Option<String>,
    /// The guest's configuration: what it says holds where this command line says nothing (xl-colo config)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where the peer connects: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9740")]
    pub listen: Address,
    /// The directory of the control sockets
    #[arg(long, value_name = "DIR", default_value_os_t = control::default_run_dir())]
    pub run_dir: PathBuf,
    /// A disk image: of the guest booted here, or of the replica; again for each further disk of the guest
    #[arg(long = "disk", value_name = "FILE", required_unless_present = "config")]
    pub disks: Vec<PathBuf>,
    /// What both hosts call a disk (xl's colo-export), again for each disk in their order: a primary whose disks are called
    /// otherwise, or are in another order, is refused. Without names disks are matched by their order alone
    #[arg(long = "export", value_name = "NAME")]
    pub exports: Vec<String>,
    /// Where disk epochs go that do not fit into memory; beside the first image by default
    #[arg(long, value_name = "DIR")]
    pub spill_dir: Option<PathBuf>,
    /// Memory in MiB that the replicas' disk epochs may use together before they go to the spill directory
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub epoch_memory_mib: u64,
    /// The switch port of the guest's NIC
    #[arg(long, value_name = "ADDRESS")]
    pub net: Option<Address>,
    /// Tell Prometheus how the host and its guest are, at /metrics: a port of the loopback address, or the address of another
    /// interface written out; anybody who reaches it can read there. Port 0 is any. Off by default
    #[arg(long, value_name = "[ADDRESS:]PORT")]
    pub metrics_listen: Option<MetricsAddress>,
    /// Who decides which host goes on alone: file:PATH, or the address of `xl-colo arbiter`
    #[arg(long, value_name = "ARBITER")]
    pub arbiter: Option<Arbiter>,
    /// What must be won before going on alone: arbiter, hold, script:PATH, or alone (unsafe, for tests)
    #[arg(long, value_parser = parse_policy, default_value = "arbiter")]
    pub policy: Policy,
    /// Run a guest of this name: an embedded one, or with --xen a domain
    #[arg(long, value_name = "NAME")]
    pub guest: Option<String>,
    /// The guest is a Xen domain: adopt it if it runs, make it from this xl configuration if not
    #[arg(long, value_name = "CONFIG", requires = "guest", conflicts_with = "net")]
    pub xen: Option<PathBuf>,
    /// The guest's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pub guest_mib: u64,
    /// The size of a new disk image in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub disk_mib: u64,
    /// How often, in percent, the guest's responses differ between its two copies
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub diverge: u8,
    /// Where to write down what happens, a line of JSON each, in two files of 16 MiB at most; by default NAME.events beside
    /// the control socket, or in the directory that systemd gives to a unit with LogsDirectory=
    #[arg(long, value_name = "FILE")]
    pub event_log: Option<PathBuf>,
    /// Seeds the guest's hardware randomness on this host; drawn when absent
    #[arg(long)]
    pub seed: Option<u64>,
    /// End when standard input closes
    #[arg(long, hide = true)]
    pub follow_stdin: bool,
}

impl HostArgs {
    /// Takes from the configuration what the command line, which gave the arguments called `given`, does not say.
    pub fn complete(mut self, given: &[String]) -> Result<Self, ConfigError> {
        let Some(path) = self.config.clone() else { return Ok(self) };
        let mut config = Config::load(&path)?;
        // A host that stands by gets the domain's configuration from its peer, and may have no such file.
        if let Some(xl) = config.guest.xen.clone().filter(|xl| config.guest.boot || xl.exists()) {
            config.fill_from(&xl::Keys::load(&xl)?);
        }
        let missing = |key: &str, option: &str| ConfigError::File {
            path: path.clone(),
            why: format!("it has no {key} in [host]; give {option}"),
        };
        let says = |id: &str| given.iter().any(|given| given == id);
        let Config { host, guest, .. } = config;
        self.name = self.name.or(host.name).or_else(machine_name);
        if self.name.is_none() {
            return Err(missing("name", "--name NAME"));
        }
        if self.disks.is_empty() {
            self.disks = host.disks;
        }
        if self.disks.is_empty() {
            return Err(missing("disks", "--disk FILE"));
        }
        if self.exports.is_empty() {
            self.exports = host.exports;
        }
        if let Err(why) = check_exports(&self.exports, self.disks.len()) {
            return Err(ConfigError::File { path, why });
        }
        if !says("listen") {
            self.listen = host.listen;
        }
        if let (false, Some(run_dir)) = (says("run_dir"), host.run_dir) {
            self.run_dir = run_dir;
        }
        if !says("epoch_memory_mib") {
            self.epoch_memory_mib = host.epoch_memory_mib.0;
        }
        if !says("policy") {
            self.policy = host.policy;
        }
        self.spill_dir = self.spill_dir.or(host.spill_dir);
        self.arbiter = self.arbiter.or(host.arbiter);
        self.event_log = self.event_log.or(host.event_log);
        self.metrics_listen = self.metrics_listen.or(host.metrics_listen);
        if self.guest.is_none() && guest.boot {
            self.guest = path.file_stem().map(|name| name.to_string_lossy().into_owned());
            self.xen = self.xen.or(guest.xen);
        }
        // A domain's NIC is its own.
        if self.xen.is_none() {
            self.net = self.net.or(host.net);
        }
        if !says("guest_mib") {
            self.guest_mib = guest.memory_mib.0;
        }
        if !says("disk_mib") {
            self.disk_mib = guest.disk_mib.0;
        }
        Ok(self)
    }
}

/// The machine's name, if a host may be called so.
fn machine_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    parse_host_name(name.trim().split('.').next()?).ok()
}

/// Arguments of `arbiter`.
#[derive(Args, Debug)]
pub struct ArbiterArgs {
    /// Where hosts connect: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Address,
    /// The register
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
}
