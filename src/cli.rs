//! The command line: what can be typed, and nothing of what it does.
//!
//! Exit codes: 0 done; 1 the command failed, with one line that says why; 2 the command line is wrong;
//! 3 (`demo`) something was lost; 4 (`host`) this machine cannot give what was asked (port, memory, disk).

mod filter;
mod xl;

pub use filter::FilterArgs;
pub use xl::{ReceiveArgs, RemusArgs};

use crate::colo::arbiter::Policy;
use crate::colo::hello::{Mode, ResumeOrder};
use crate::daemon::address::Address;
use crate::daemon::arbiter::Arbiter;
use crate::daemon::compare::port::PortAddress;
use crate::daemon::control;
use crate::daemon::nbd::tls::Credentials;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// The command failed.
pub const EXIT_FAILED: u8 = 1;
/// The command line is wrong.
pub const EXIT_USAGE: u8 = 2;
/// The demo lost something.
pub const EXIT_LOST: u8 = 3;
/// This machine cannot give what was asked.
pub const EXIT_ENVIRONMENT: u8 = 4;

/// Keeps a Xen guest running, with its connections and its disk, when its host dies.
#[derive(Parser, Debug)]
#[command(name = "xl-colo", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Protect a guest, kill its host, and report what a client saw
    Demo(DemoArgs),
    /// Run a host: with --guest it boots one, without it stands by for another host's
    Host(HostArgs),
    /// Replicate the guest of a host to a peer
    Protect(ProtectArgs),
    /// End a protection without a failover: the guest goes on here, and the peer drops what it has of it
    Unprotect(HostRef),
    /// Protect a domain until that is over, with the letters of `xl remus`
    Remus(RemusArgs),
    /// Join standard input and output to the host that runs here: the far end of `remus` over ssh
    Receive(ReceiveArgs),
    /// Say how a host and its guest are
    Status(StatusArgs),
    /// Say whether this host is able to protect guests, and what it lacks; whether a peer answers, and what is in the
    /// way of protecting a guest
    Check(CheckArgs),
    /// Take a checkpoint now
    Checkpoint(HostRef),
    /// Go on alone on this host, or decide for a guest that is held here
    Failover(HostRef),
    /// End a host's process; its guest goes on at the peer if it is protected, and ends if it is not
    Stop(HostRef),
    /// Serve an arbiter's register to two hosts, on a third machine
    Arbiter(ArbiterArgs),
    /// Serve a disk image over NBD, with qemu-nbd's options
    Nbd(NbdArgs),
    /// Give an order to a QMP monitor, ours or a QEMU's; or be one, for a replica whose primary is a QEMU
    Qmp(QmpArgs),
    /// Compare the packets of two guests behind QEMU's chardev sockets, in the place of its colo-compare object
    Compare(CompareArgs),
    /// Stand in for QEMU's network filters on an interface of this host, towards a comparator
    Filter(FilterArgs),
    /// Cleans up behind a killed host; started by it
    #[cfg(feature = "xen")]
    #[command(hide = true)]
    Keeper {
        /// The domain
        domid: u16,
    },
    /// Carries out an order to libxl; started by a host
    #[cfg(feature = "xen")]
    #[command(hide = true)]
    Libxl {
        /// The order
        arguments: Vec<String>,
    },
    /// Save or restore a domain for libxl; set LIBXL_SAVE_HELPER to this program and use xl as ever
    SaveHelper(SaveHelperArgs),
}

/// Arguments of `save-helper`, which libxl writes.
#[derive(Args, Debug)]
pub struct SaveHelperArgs {
    /// --save-domain or --restore-domain, and what belongs to it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "ARGUMENT")]
    pub arguments: Vec<String>,
}

/// Arguments of `nbd`: the letters, meanings and defaults are qemu-nbd's.
#[derive(Args, Debug)]
pub struct NbdArgs {
    /// The image: a file or a block device
    pub image: PathBuf,
    /// Serve on a Unix socket
    #[arg(short = 'k', long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Serve on this TCP port
    #[arg(short, long, value_name = "PORT", default_value_t = 10809, conflicts_with = "socket")]
    pub port: u16,
    /// Serve on this address
    #[arg(short, long, value_name = "ADDRESS", default_value = "0.0.0.0", conflicts_with = "socket")]
    pub bind: String,
    /// The image's format; raw is the only one
    #[arg(short, long, default_value = "raw", value_parser = ["raw"])]
    pub format: String,
    /// The export's name
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    pub export_name: String,
    /// The export's description
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Serve from this byte of the image on
    #[arg(short, long, value_name = "BYTES", default_value_t = 0)]
    pub offset: u64,
    /// Take no writes
    #[arg(short, long)]
    pub read_only: bool,
    /// Serve a replica's image that is not whole, to save what is in it
    #[arg(long, requires = "read_only")]
    pub salvage: bool,
    /// Clients at the same time; 0 for any number
    #[arg(short = 'e', long, value_name = "NUMBER", default_value_t = 1)]
    pub shared: usize,
    /// Go on when the last client has left
    #[arg(short = 't', long)]
    pub persistent: bool,
    /// What a completed write means: writeback, or writethrough and directsync (durable), or unsafe (flushes do nothing)
    #[arg(long, value_name = "MODE", default_value = "writeback",
          value_parser = ["none", "writeback", "writethrough", "directsync", "unsafe"])]
    pub cache: String,
    /// The same as --cache=none, which here is --cache=writeback
    #[arg(short, long, conflicts_with = "cache")]
    pub nocache: bool,
    /// Whether discarding frees space
    #[arg(long, value_name = "MODE", default_value = "ignore", value_parser = ["ignore", "off", "unmap", "on"])]
    pub discard: String,
    /// Whether writes of zeroes are looked for, and free their space
    #[arg(long, value_name = "MODE", default_value = "off", value_parser = ["off", "on", "unmap"])]
    pub detect_zeroes: String,
    /// Taken for the sake of scripts: threads read and write, whatever is asked for
    #[arg(long, value_name = "MODE", value_parser = ["threads", "native", "io_uring"])]
    pub aio: Option<String>,
    /// Certificates: tls-creds-x509,id=ID,endpoint=server,dir=DIR[,verify-peer=on|off]
    #[arg(long, value_name = "OBJECT")]
    pub object: Option<Credentials>,
    /// Serve nobody in the clear; the --object of this id has the certificates
    #[arg(long, value_name = "ID", requires = "object")]
    pub tls_creds: Option<String>,
    /// Go to the background once clients can connect
    #[arg(long)]
    pub fork: bool,
    /// Write the process's number to this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Log each client on standard error; XEN_COLO_LOG says more exactly what
    #[arg(short, long)]
    pub verbose: bool,
}

/// Arguments of `qmp`.
#[derive(Args, Debug)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["connect", "socket"])))]
pub struct QmpArgs {
    /// Give an order to the monitor at this socket
    #[arg(long, value_name = "PATH", requires = "command")]
    pub connect: Option<PathBuf>,
    /// Be a monitor at this socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// With --socket: a drive as QEMU's -drive has it: a raw image, or a replication node over one; again for each
    #[arg(long = "drive", value_name = "OPTIONS", requires = "socket")]
    pub drives: Vec<String>,
    /// With --socket: memory in MiB for the disks' epochs together
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub epoch_memory_mib: u64,
    /// With --socket: where disk epochs go that do not fit into memory
    #[arg(long, value_name = "DIR", requires = "socket")]
    pub spill_dir: Option<PathBuf>,
    /// With --connect: how long the order may take
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout_s: u64,
    /// The command
    #[arg(requires = "connect")]
    pub command: Option<String>,
    /// Its arguments, as a JSON object
    #[arg(value_name = "JSON", default_value = "{}")]
    pub arguments: String,
}

/// Arguments of `compare`: the names, defaults and refusals are those of colo-compare's properties.
///
/// A port is unix:PATH or tcp:HOST:PORT and listens; with ,server=off it connects, again and again. It has one peer at a
/// time; the next one waits. What differs from QEMU: IPv6, VLANs and fragments are compared too, and what cannot be
/// is held and asks for a checkpoint; no frame of the primary's is ever dropped, the guest waits instead; an oversized frame
/// closes the connection, and the port takes the next peer; DO_CHECKPOINT is said once for each checkpoint. Without
/// notify_dev what differs is held until the end. SIGTERM sends on what is held, as deleting QEMU's object does, and
/// SIGUSR1 prints one line of JSON that says how it stands.
#[derive(Args, Debug)]
pub struct CompareArgs {
    /// Where the primary's frames come from
    #[arg(long, alias = "primary_in", value_name = "PORT")]
    pub primary_in: Option<PortAddress>,
    /// Where the secondary's frames come from
    #[arg(long, alias = "secondary_in", value_name = "PORT")]
    pub secondary_in: Option<PortAddress>,
    /// Where frames go that may leave
    #[arg(long, value_name = "PORT")]
    pub outdev: Option<PortAddress>,
    /// Where a toolstack is asked for checkpoints, and says that one was made (libxl's userspace proxy)
    #[arg(long, alias = "notify_dev", value_name = "PORT")]
    pub notify_dev: Option<PortAddress>,
    /// Frames come with their virtio-net headers, and leave with them
    #[arg(long, alias = "vnet_hdr_support")]
    pub vnet_hdr_support: bool,
    /// How long a frame waits for its like, exactly, before a checkpoint is asked for
    #[arg(long, alias = "compare_timeout", value_name = "MS", default_value_t = 3000)]
    pub compare_timeout: u32,
    /// Taken for the sake of scripts: nothing is scanned for, a frame is noticed when it has waited long enough
    #[arg(long, alias = "expired_scan_cycle", value_name = "MS", default_value_t = 1000)]
    pub expired_scan_cycle: u32,
    /// What a connection may hold, in packets of 4 KiB; all connections together four times that. Full asks for a
    /// checkpoint, and nothing is dropped
    #[arg(long, alias = "max_queue_size", value_name = "PACKETS", default_value_t = 1024)]
    pub max_queue_size: u32,
    /// Log each peer on standard error; XEN_COLO_LOG says more exactly what
    #[arg(short, long)]
    pub verbose: bool,
}

/// Which host a command is for.
#[derive(Args, Clone, Debug)]
pub struct HostRef {
    /// The host's name; may be left out when only one runs here
    #[arg(long, value_parser = parse_host_name)]
    pub host: Option<String>,
    /// The directory of the control sockets
    #[arg(long, value_name = "DIR", default_value_os_t = control::default_run_dir())]
    pub run_dir: PathBuf,
}

/// Arguments of `host`.
#[derive(Args, Debug)]
pub struct HostArgs {
    /// The host's name; the two of a pair must differ
    #[arg(long, value_parser = parse_host_name)]
    pub name: String,
    /// Where the peer connects: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9740")]
    pub listen: Address,
    /// The directory of the control sockets
    #[arg(long, value_name = "DIR", default_value_os_t = control::default_run_dir())]
    pub run_dir: PathBuf,
    /// A disk image: of the guest booted here, or of the replica; again for each further disk of the guest
    #[arg(long = "disk", value_name = "FILE", required = true)]
    pub disks: Vec<PathBuf>,
    /// Where disk epochs go that do not fit into memory; beside the first image by default
    #[arg(long, value_name = "DIR")]
    pub spill_dir: Option<PathBuf>,
    /// Memory in MiB that the replicas' disk epochs may use together before they go to the spill directory
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub epoch_memory_mib: u64,
    /// The switch port of the guest's NIC
    #[arg(long, value_name = "ADDRESS")]
    pub net: Option<Address>,
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
    /// Seeds the guest's hardware randomness on this host; drawn when absent
    #[arg(long)]
    pub seed: Option<u64>,
    /// End when standard input closes
    #[arg(long, hide = true)]
    pub follow_stdin: bool,
}

/// Arguments of `protect`.
#[derive(Args, Debug)]
pub struct ProtectArgs {
    /// The peer's address
    pub peer: Address,
    /// The host whose guest is protected
    #[command(flatten)]
    pub host: HostRef,
    /// colo: both guests run; remus: output waits for checkpoints
    #[arg(long, default_value = "colo")]
    pub mode: Mode,
    /// When the guest runs on after a capture
    #[arg(long, value_enum, default_value = "after-capture")]
    pub resume: Resume,
    /// Longest time between two checkpoints; 5000 for colo, 200 for remus
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub checkpoint_delay_ms: Option<u64>,
    /// Time between two heartbeats
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub heartbeat_ms: Option<u64>,
    /// Missed heartbeats after which the peer is lost
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub heartbeat_misses: Option<u32>,
    /// Memory in MiB that remembers sent pages, so that only what changed in them is sent again; 0: pages go whole
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    pub delta_mib: Option<u64>,
    /// Return when the guest is protected, not when the copy has begun
    #[arg(long)]
    pub wait: bool,
}

/// When the guest runs on after a capture.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Resume {
    /// At once; the wire is not in the pause.
    AfterCapture,
    /// When the peer has loaded the state: the classic order.
    AfterLoaded,
}

impl From<Resume> for ResumeOrder {
    fn from(resume: Resume) -> Self {
        match resume {
            Resume::AfterCapture => Self::AfterCapture,
            Resume::AfterLoaded => Self::AfterLoaded,
        }
    }
}

/// Arguments of `status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Which host
    #[command(flatten)]
    pub host: HostRef,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Print again every second until interrupted
    #[arg(long)]
    pub watch: bool,
}

/// Arguments of `check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// A peer to be reached
    pub peer: Option<Address>,
    /// A Xen domain of this host to be protected
    #[arg(long, value_name = "NAME")]
    pub guest: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
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
    /// Print one JSON object instead of the report
    #[arg(long)]
    pub json: bool,
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

/// The name is part of the control socket's path, and must not lead elsewhere.
fn parse_host_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > 64 || text.starts_with(['.', '-']) || !text.chars().all(fits) {
        return Err(
            "a host's name is 1 to 64 letters, digits, '-', '_' or '.', and begins with none of '-' and '.'".into()
        );
    }
    Ok(text.to_owned())
}

fn parse_policy(text: &str) -> Result<Policy, String> {
    match text {
        "arbiter" => Ok(Policy::Arbiter),
        "hold" => Ok(Policy::Hold),
        "alone" => Ok(Policy::Alone),
        other => match other.strip_prefix("script:") {
            Some(path) if !path.is_empty() => Ok(Policy::Script(path.into())),
            _ => Err(format!("{other:?} is no policy: arbiter, hold, script:PATH or alone")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn policies_are_spelt_as_documented() {
        assert_eq!(parse_policy("script:/sbin/fence"), Ok(Policy::Script("/sbin/fence".into())));
        for bad in ["", "script", "script:", "Arbiter"] {
            assert!(parse_policy(bad).is_err(), "{bad}");
        }
    }
}
