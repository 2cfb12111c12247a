//! The pieces that stand alone: a disk over NBD, a monitor, the comparator, a run's page.

use crate::daemon::compare::port::PortAddress;
use crate::daemon::nbd::export::{ANY_ADDRESS, Cache, Config, NBD_PORT, Where};
use crate::daemon::nbd::kernel::Served;
use crate::daemon::nbd::tls::Credentials;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Arguments of `report`.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Where the event logs are: NAME.events of one host or of both, and what they were before, NAME.events.1
    pub dir: PathBuf,
    /// Where the page goes; DIR/report.html by default
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The guest, where the logs are of several
    #[arg(long, value_name = "NAME")]
    pub guest: Option<String>,
}

/// Arguments of `nbd`: the letters, meanings and defaults are qemu-nbd's.
#[derive(Args, Debug)]
pub struct NbdArgs {
    /// The image: a file or a block device
    #[arg(required_unless_present_any = ["list", "disconnect"])]
    pub image: Option<PathBuf>,
    /// Make this device of the kernel the disk, and go to the background unless -v is there
    #[arg(short = 'c', long, value_name = "/dev/nbdN")]
    pub connect: Option<String>,
    /// Let go of this device of the kernel, instead of serving
    #[arg(short = 'd', long, value_name = "/dev/nbdN", conflicts_with_all = ["image", "list", "connect"])]
    pub disconnect: Option<String>,
    /// Tell what the server offers that listens there, instead of serving
    #[arg(short = 'L', long, conflicts_with_all = ["image", "connect", "tls_creds"])]
    pub list: bool,
    /// Serve on a Unix socket, whatever -p and -b say
    #[arg(short = 'k', long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Serve on this TCP port; 10809, which has the name nbd, by default
    #[arg(short, long, value_name = "PORT", value_parser = port)]
    pub port: Option<u16>,
    /// Serve on this address; on all by default
    #[arg(short, long, value_name = "ADDRESS")]
    pub bind: Option<String>,
    /// The image's format; raw is the only one. Without it an image that begins as one of another format is refused, and made
    /// to begin so by no client
    #[arg(short, long, value_parser = ["raw"])]
    pub format: Option<String>,
    /// The export's name
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    pub export_name: String,
    /// The export's description
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Serve from this byte of the image on
    #[arg(short, long, value_name = "BYTES", default_value_t = 0, value_parser = any_base)]
    pub offset: u64,
    /// Take no writes
    #[arg(short, long)]
    pub read_only: bool,
    /// Whether the image is locked in QEMU's way too; off is for one that a device model has open as well
    #[arg(long, value_name = "MODE", default_value = "on", value_parser = ["on", "off"])]
    pub locking: String,
    /// Offer qemu:allocation-depth, which is 1 everywhere: there is one image
    #[arg(short = 'A', long)]
    pub allocation_depth: bool,
    /// Serve a replica's image that is not whole, to save what is in it
    #[arg(long, requires = "read_only")]
    pub salvage: bool,
    /// Clients at the same time, and one more waits; 0 for any number
    #[arg(short = 'e', long, value_name = "NUMBER", default_value_t = 1, value_parser = clients)]
    pub shared: usize,
    /// Go on when the last client has left
    #[arg(short = 't', long)]
    pub persistent: bool,
    /// What a completed write means: writeback, or writethrough and directsync (durable), or unsafe (flushes do nothing)
    #[arg(long, value_name = "MODE", default_value = "writeback",
          value_parser = ["none", "off", "writeback", "writethrough", "directsync", "unsafe"])]
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
    /// Write the process's number to this file, which stays, and is locked meanwhile
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Taken for the sake of scripts; XEN_COLO_LOG=debug logs each client on standard error
    #[arg(short, long)]
    pub verbose: bool,
}

fn port(text: &str) -> Result<u16, String> {
    if text == "nbd" { Ok(NBD_PORT) } else { text.parse().map_err(|error: std::num::ParseIntError| error.to_string()) }
}

/// A number as C has it: 0x before sixteen digits, 0 before eight.
fn any_base(text: &str) -> Result<u64, String> {
    let (digits, base) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    // A sign is no digit, whatever from_str_radix says.
    let plain = digits.starts_with(|digit: char| digit.is_ascii_hexdigit());
    let number = u64::from_str_radix(digits, base).ok().filter(|_| plain);
    number.ok_or_else(|| "a number is wanted: 1024, 0x400 or 02000".to_owned())
}

fn clients(text: &str) -> Result<usize, String> {
    usize::try_from(any_base(text)?).map_err(|error| error.to_string())
}

impl NbdArgs {
    /// Where it listens, or whoever is asked; none where nothing was said.
    #[must_use]
    pub fn at(&self) -> Option<Where> {
        let bind = self.bind.clone().filter(|address| !address.is_empty());
        match (&self.socket, bind, self.port) {
            (Some(path), ..) => Some(Where::Unix(path.clone())),
            (None, None, None) => None,
            (None, address, port) => {
                Some(Where::Tcp(address.unwrap_or_else(|| ANY_ADDRESS.into()), port.unwrap_or(NBD_PORT)))
            }
        }
    }

    /// What they come to.
    pub fn config(self) -> Result<Config, String> {
        let at = self.at();
        // With a protocol before it, as QEMU's file names may have.
        let image = self.image.unwrap_or_default();
        let named = image.to_str().and_then(|name| name.strip_prefix("file:")).map(PathBuf::from);
        let discard = matches!(self.discard.as_str(), "unmap" | "on");
        if self.detect_zeroes == "unmap" && !discard {
            return Err("--detect-zeroes=unmap frees space, and so wants --discard=unmap as well".into());
        }
        let tls = match (self.tls_creds, self.object) {
            (Some(id), Some(object)) if object.id != id => {
                return Err(format!("no --object has the id {id:?}; there is {:?}", object.id));
            }
            (Some(_), object) => object,
            (None, _) => None,
        };
        Ok(Config {
            image: named.unwrap_or(image),
            probe: self.format.is_none(),
            at,
            name: self.export_name,
            description: self.description,
            offset_bytes: self.offset,
            read_only: self.read_only,
            tells_depth: self.allocation_depth,
            locks_as_qemu: self.locking == "on",
            salvage: self.salvage,
            max_connections: self.shared,
            persistent: self.persistent,
            cache: match self.cache.as_str() {
                "writethrough" | "directsync" => Cache::WriteThrough,
                "unsafe" => Cache::Unsafe,
                _ => Cache::WriteBack,
            },
            discard,
            detect_zeroes: self.detect_zeroes != "off",
            unmap_zeroes: self.detect_zeroes == "unmap",
            device: self.connect,
            pid_file: self.pid_file,
            tls,
        })
    }
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
    /// With --socket: a drive as QEMU's -drive has it: a raw image, a quorum of one, or a replication node; again for each
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

/// What the kernel is to do with a disk.
#[derive(Subcommand, Debug)]
pub enum NbdDeviceVerb {
    /// Make a free device a disk that is served, and say its path
    Connect {
        /// The disk
        #[command(flatten)]
        disk: ServedArgs,
        /// How long its requests wait for another connection when the server has ended
        #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
        dead_seconds: u64,
    },
    /// Give the devices of a disk another connection, when its server has ended and there is a new one
    Reconnect(ServedArgs),
    /// Let go of a device
    Disconnect {
        /// Its path, /dev/nbdN
        device: String,
    },
}

/// A disk that is served.
#[derive(Args, Debug)]
pub struct ServedArgs {
    /// Whose disk it is
    #[arg(value_name = "GUEST/DISK")]
    pub backend: String,
    /// Where it is served
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The export's name
    #[arg(long, value_name = "NAME")]
    pub export: String,
}

impl From<ServedArgs> for Served {
    fn from(ServedArgs { backend, socket, export }: ServedArgs) -> Self {
        Self { socket, export, backend }
    }
}
