//! Looks at this host, and changes nothing.

use super::{Facts, Greeting, Piece, Program};
use crate::colo::hello::{Channel, DiskGeometry, Geometry, Hello, Mode, PROTOCOL_VERSION, disk_name};
use crate::daemon::address::Address;
use crate::daemon::{host, unix_us, xen};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where Debian's libxl has its device model.
const DEVICE_MODEL: &str = "/usr/libexec/xen-qemu-system-i386";
/// Nodes of `/dev/xen` that this program and the device model open.
const NODES: [&str; 3] = ["privcmd", "evtchn", "gntdev"];
/// Modules, and what is there when one is, for those that may be built in without leaving a name.
const PIECES: [(&str, &str); 5] = [
    ("nbd", "/sys/block/nbd0"),
    ("tun", "/dev/net/tun"),
    ("veth", "/sys/module/veth"),
    ("bridge", "/sys/module/bridge"),
    ("af_packet", "/proc/net/packet"),
];
const SCRIPTS: [&str; 2] = ["/etc/xen/scripts/vif-colo", "/etc/xen/scripts/block-colo"];
/// How long a peer may take to be reached.
const PEER_DEADLINE: Duration = Duration::from_secs(5);

/// Gathers the facts: of this host, and of a peer and a guest if they are named.
pub async fn gather(peer: Option<&Address>, guest: Option<&str>) -> Facts {
    let greeted = match peer {
        Some(address) => Some((address.to_string(), greet(address).await)),
        None => None,
    };
    Facts {
        xen: xen::facts(),
        root: std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0),
        hypervisor: std::fs::read_to_string("/sys/hypervisor/type").ok().map(|text| text.trim().to_owned()),
        missing_nodes: NODES.into_iter().filter(|node| !Path::new("/dev/xen").join(node).exists()).collect(),
        device_model: device_model(),
        pieces: PIECES.into_iter().map(|(name, trace)| (name, piece(name, trace))).collect(),
        scripts: SCRIPTS.into_iter().map(|path| (PathBuf::from(path), program(Path::new(path)))).collect(),
        peer: greeted,
        guest: guest.map(|name| (name.to_owned(), xen::guest_facts(name))),
    }
}

fn device_model() -> (PathBuf, Program) {
    let path = xen::device_model_path().unwrap_or(DEVICE_MODEL.into());
    let found = program(&path);
    (path, found)
}

fn program(path: &Path) -> Program {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => Program::Ready,
        Ok(_) => Program::NotExecutable,
        Err(_) => Program::Missing,
    }
}

/// `modprobe -n` knows what is loaded, what is built in and what could be loaded, and loads nothing.
fn piece(name: &str, trace: &str) -> Piece {
    if Path::new(trace).exists() || Path::new("/sys/module").join(name).exists() {
        return Piece::Loaded;
    }
    let asked = std::process::Command::new("modprobe").args(["-n", "-q", name]).output();
    if asked.is_ok_and(|output| output.status.success()) { Piece::Loadable } else { Piece::Missing }
}

/// Says a hello that asks for nothing.
async fn greet(address: &Address) -> Result<Greeting, String> {
    let look = async {
        let link = address.connect().await.map_err(|e| format!("{e} (is xl-colo host running there?)"))?;
        let word = Hello {
            protocol: PROTOCOL_VERSION,
            channel: Channel::Greeting,
            disk: 0,
            guest: "none".into(),
            session: 0,
            generation: 0,
            from: String::new(),
            mode: Mode::Colo,
            features: vec![],
            geometry: Geometry {
                nr_pages: 1,
                disks: vec![DiskGeometry { name: disk_name(0), size_bytes: 0 }],
                mac: [0; 6],
                ip: [0; 4],
                diverge_percent: 0,
                xen: None,
            },
            heartbeat_interval_ms: 1000,
            exports: vec![],
            heartbeat_misses: 2,
        };
        let asked_us = unix_us();
        let (_, welcome) = host::introduce(link, word).await?;
        let answered_us = unix_us();
        // It was written at some moment between the two.
        let clock_ahead_us = welcome.clock_unix_us.map(|theirs_us| {
            let (middle_us, error_us) = (asked_us.midpoint(answered_us), answered_us.abs_diff(asked_us) / 2);
            let signed = |us: u64| i64::try_from(us).unwrap_or(i64::MAX);
            (signed(theirs_us).saturating_sub(signed(middle_us)), signed(error_us))
        });
        let (vacant, version) = (welcome.has(host::VACANT), welcome.version);
        Ok(Greeting { name: welcome.from, protocol: welcome.protocol, vacant, version, clock_ahead_us })
    };
    let late = |_| Err(format!("no answer within {PEER_DEADLINE:?}"));
    tokio::time::timeout(PEER_DEADLINE, look).await.unwrap_or_else(late)
}
