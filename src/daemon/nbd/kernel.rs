//! A guest's disk as a block device of this host: the kernel is the client, and outlives its server.
//!
//! ```text
//!   connect     negotiate here ─▶ socket ─▶ kernel: a free /dev/nbdN is GUEST/DISK's
//!                   ╳ the server ends: requests wait, for as long as was said at the beginning
//!   reconnect   negotiate here ─▶ socket ─▶ kernel: every device of GUEST/DISK that has no connection goes on with one
//!   disconnect  ─▶ kernel: what waits fails, and the device is free when nobody has it open
//! ```
//!
//! A request that had been sent when the server ended is sent again by the kernel's own clock for requests: as soon as
//! that finds another connection than the one it was sent on. By default it looks after 30 s, longer than a guest's
//! clients wait, so it is set to a few seconds.
//!
//! The traps: a server that hangs must not be given up for another connection, because it could still carry out what was
//! sent to it, after what was sent anew; so there is no time limit on requests. And the kernel hears of the end of a
//! connection a little later than whoever made it end.
//!
//! Source: linux `drivers/block/nbd.c` (`nbd_xmit_timeout`, `wait_for_reconnect`, `nbd_reconnect_socket`).

use super::HANDSHAKE_DEADLINE;
use crate::nbd::NbdError;
use crate::nbd::client::{Client, ExportInfo, Limits};
use crate::nbd::netlink::{ANSWER_MAX_BYTES, Answer, CutShort, Order, Outcome};
use bytes::BytesMut;
use rustix::io::Errno;
use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often the kernel looks after a request that has no answer yet. It says a line in its log each time.
const LOOK: Duration = Duration::from_secs(5);
/// How long the kernel may take to notice that a connection has ended, and to answer.
const KERNEL_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(50);
/// Bytes read at once in a negotiation.
const READ_BYTES: usize = 512;

/// A disk that is served on a Unix socket.
#[derive(Clone, Debug)]
pub struct Served {
    /// Where.
    pub socket: PathBuf,
    /// The name of its export.
    pub export: String,
    /// Whose it is: GUEST/DISK.
    pub backend: String,
}

/// Why a device was not connected.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Nobody serves the disk.
    #[error("nothing answers at {}: {source}; is xl-colo host running?", socket.display())]
    Unserved {
        /// Where.
        socket: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Who serves it broke the protocol.
    #[error(transparent)]
    Protocol(#[from] NbdError),
    /// Who serves it said more than was asked, which the kernel would never see.
    #[error("the server sends before it was asked")]
    Hasty,
    /// There is no driver.
    #[error("the kernel has no nbd driver: modprobe nbd")]
    NoDriver,
    /// The driver refused.
    #[error("the kernel does not {what}: {source}")]
    Refused {
        /// What it was to do.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Its answer.
    #[error(transparent)]
    Answer(#[from] CutShort),
    /// Not such a device.
    #[error("{0} is no /dev/nbdN")]
    NoDevice(String),
}

/// Makes a free device the disk, and tells its number. When its connection has ended, requests wait for another one this
/// long, and then fail.
pub fn connect(served: &Served, dead: Duration) -> Result<u32, DeviceError> {
    connect_as(None, served, dead)
}

/// The same of this device.
pub fn connect_device(device: &str, served: &Served, dead: Duration) -> Result<(), DeviceError> {
    connect_as(Some(index_of(device)?), served, dead).map(drop)
}

fn connect_as(index: Option<u32>, served: &Served, dead: Duration) -> Result<u32, DeviceError> {
    let kernel = Kernel::open()?;
    let (stream, export) = negotiate(served)?;
    let (family, socket, backend) = (kernel.family, number(&stream), &served.backend);
    let order = Order::Connect { family, index, socket, export, backend, dead_seconds: dead.as_secs() };
    let what = "connect a device";
    let unnumbered = || DeviceError::Refused { what, source: io::ErrorKind::InvalidData.into() };
    let index = kernel.order(&order, what)?.or(index).ok_or_else(unnumbered)?;
    let look = format!("/sys/block/nbd{index}/queue/io_timeout");
    if let Err(error) = std::fs::write(&look, LOOK.as_millis().to_string()) {
        tracing::warn!(%error, path = look, "requests that a server's end meets are sent again after 30 s");
    }
    Ok(index)
}

/// Gives the devices of this disk that have lost their connection another one. Which these were.
pub fn reconnect(served: &Served) -> Result<Vec<u32>, DeviceError> {
    let indices = devices_of(Path::new("/sys/block"), &served.backend);
    if indices.is_empty() {
        return Ok(indices);
    }
    let kernel = Kernel::open()?;
    for &index in &indices {
        let (stream, _) = negotiate(served)?;
        let (family, socket, backend) = (kernel.family, number(&stream), &served.backend);
        let order = Order::Reconnect { family, index, socket, backend };
        let mut waited = Duration::ZERO;
        loop {
            match kernel.order(&order, "connect a device again") {
                // None of its connections is dead, as far as it knows.
                Err(DeviceError::Refused { source, .. })
                    if source.raw_os_error() == Some(Errno::NOSPC.raw_os_error()) && waited < KERNEL_DEADLINE =>
                {
                    std::thread::sleep(RETRY);
                    waited += RETRY;
                }
                done => {
                    done?;
                    break;
                }
            }
        }
    }
    Ok(indices)
}

/// Lets go of a device.
pub fn disconnect(device: &str) -> Result<(), DeviceError> {
    let index = index_of(device)?;
    let kernel = Kernel::open()?;
    let order = Order::Disconnect { family: kernel.family, index };
    kernel.order(&order, "disconnect a device").map(drop)
}

pub(super) fn index_of(device: &str) -> Result<u32, DeviceError> {
    let index = device.strip_prefix("/dev/nbd").and_then(|index| index.parse().ok());
    index.ok_or_else(|| DeviceError::NoDevice(device.to_owned()))
}

/// Whether a device of the kernel is this disk.
#[must_use]
pub fn is_used(served: &Served) -> bool {
    !devices_of(Path::new("/sys/block"), &served.backend).is_empty()
}

/// The devices that say that they are this disk.
fn devices_of(block: &Path, backend: &str) -> Vec<u32> {
    let entries = std::fs::read_dir(block).into_iter().flatten().flatten();
    let indices = entries.filter_map(|entry| {
        let index = entry.file_name().to_str()?.strip_prefix("nbd")?.parse().ok()?;
        let whose = std::fs::read_to_string(entry.path().join("backend")).ok()?;
        (whose.trim_end_matches('\n') == backend).then_some(index)
    });
    let mut indices: Vec<_> = indices.collect();
    indices.sort_unstable();
    indices
}

/// File descriptors of a process are not negative.
fn number(stream: &UnixStream) -> u32 {
    stream.as_raw_fd().cast_unsigned()
}

/// A connection on which requests can begin.
fn negotiate(served: &Served) -> Result<(UnixStream, ExportInfo), DeviceError> {
    let unserved = |source| DeviceError::Unserved { socket: served.socket.clone(), source };
    let mut stream = UnixStream::connect(&served.socket).map_err(unserved)?;
    stream.set_read_timeout(Some(HANDSHAKE_DEADLINE)).map_err(unserved)?;
    let mut client = Client::new(served.export.clone(), Limits::default())?;
    let (mut input, mut bytes) = (BytesMut::new(), [0; READ_BYTES]);
    loop {
        while let Some(output) = client.poll_output() {
            stream.write_all(&output).map_err(unserved)?;
        }
        if let Some(export) = client.export() {
            if !input.is_empty() {
                return Err(DeviceError::Hasty);
            }
            // The kernel goes by it too, and would end the connection of a quiet guest.
            stream.set_read_timeout(None).map_err(unserved)?;
            return Ok((stream, export));
        }
        match stream.read(&mut bytes).map_err(unserved)? {
            0 => return Err(unserved(io::ErrorKind::UnexpectedEof.into())),
            read => input.extend_from_slice(&bytes[..read]),
        }
        client.handle_input(&mut input)?;
    }
}

/// A way to the driver.
struct Kernel {
    socket: OwnedFd,
    family: u16,
}

impl Kernel {
    fn open() -> Result<Self, DeviceError> {
        let what = "take orders";
        let failed = |error: Errno| DeviceError::Refused { what, source: error.into() };
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(GENERIC));
        let socket = socket.map_err(failed)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(KERNEL_DEADLINE)).map_err(failed)?;
        let mut kernel = Self { socket, family: 0 };
        let found = match kernel.order(&Order::Family, what) {
            Err(DeviceError::Refused { source, .. }) if source.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {
                return Err(DeviceError::NoDriver);
            }
            found => found?,
        };
        kernel.family = found.and_then(|family| family.try_into().ok()).ok_or(DeviceError::NoDriver)?;
        Ok(kernel)
    }

    fn order(&self, order: &Order<'_>, what: &'static str) -> Result<Option<u32>, DeviceError> {
        // One order at a time: its number tells nothing apart but an answer that came too late.
        let sequence = u32::from(self.family) + 1;
        let failed = |error: Errno| DeviceError::Refused { what, source: error.into() };
        let to = SocketAddrNetlink::new(0, 0);
        sendto(&self.socket, &order.encode(sequence), SendFlags::empty(), &to).map_err(failed)?;
        let (mut answer, mut datagram) = (Answer::new(sequence), vec![0; ANSWER_MAX_BYTES]);
        loop {
            let (bytes, _) = recv(&self.socket, &mut *datagram, RecvFlags::empty()).map_err(failed)?;
            match answer.handle_input(&datagram[..bytes])? {
                Some(Outcome::Done(number)) => return Ok(number),
                Some(Outcome::Refused(error)) => {
                    return Err(DeviceError::Refused { what, source: io::Error::from_raw_os_error(error) });
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::nbd::threads::{Listener, OpenDisk, Running, Service, serve_all};
    use crate::disk::MemoryDisk;
    use crate::nbd::handshake::Export;
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    #[test]
    fn the_devices_of_a_disk_are_those_that_say_so() {
        let dir = tempfile::tempdir().unwrap();
        for (name, backend) in
            [("nbd0", "web/disk0\n"), ("nbd1", "web/disk1\n"), ("nbd12", "web/disk0\n"), ("loop0", "web/disk0\n")]
        {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("backend"), backend).unwrap();
        }
        std::fs::create_dir(dir.path().join("nbd3")).unwrap();
        assert_eq!(devices_of(dir.path(), "web/disk0"), [0, 12]);
        assert_eq!(devices_of(dir.path(), "web/disk"), [0; 0]);
    }

    #[test]
    fn only_an_nbd_device_is_let_go_of() {
        for device in ["/dev/sda", "/dev/nbd", "nbd0", "/dev/nbd0p1"] {
            let refused = disconnect(device).unwrap_err().to_string();
            assert_eq!(refused, format!("{device} is no /dev/nbdN"));
        }
    }

    #[test]
    fn a_negotiation_ends_where_the_kernels_requests_begin() {
        let dir = tempfile::tempdir().unwrap();
        let served = Served { socket: dir.path().join("s"), export: "disk0".into(), backend: "web/disk0".into() };
        let refused = negotiate(&served).unwrap_err().to_string();
        assert!(refused.ends_with("; is xl-colo host running?"), "{refused}");
        let listener = Listener::Unix(UnixListener::bind(&served.socket).unwrap());
        let open: OpenDisk = Box::new(|_| Ok(Box::new(MemoryDisk::new(4096))));
        let exports = vec![Export::new("disk0", 4096)];
        let (service, running) =
            (Arc::new(Service { exports, open, max_connections: 0, tls: None }), Running::default());
        let here = running.clone();
        let server = std::thread::spawn(move || serve_all(&listener, &service, &here));
        let (mut stream, export) = negotiate(&served).unwrap();
        assert_eq!((export.size_bytes, stream.read_timeout().unwrap()), (4096, None));
        // As the kernel would: its simple replies, and nothing before them.
        let read = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\0\0\0\x02\0";
        stream.write_all(read).unwrap();
        let mut reply = [1; 16 + 512];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..16], *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07");
        assert_eq!(reply[16..], [0; 512]);
        running.end();
        server.join().unwrap().unwrap();
    }
}
