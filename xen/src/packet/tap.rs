//! A tap of our own: the other end of a network device that a bridge can have as a port.
//!
//! ```text
//!   Tap::receive ◀── what the bridge sends on the device          Tap::send ──▶ what the bridge receives from it
//! ```
//!
//! Frames come and go with their virtio-net headers, so that neither checksums nor 64 KiB segments are finished for
//! nothing between two kernels. The device lives as long as the [`Tap`]: when its owner is gone nothing passes.
//!
//! The trap: a tap is down when it is made, and writing to it is EIO until it is up.
//! Sources: linux `Documentation/networking/tuntap.rst`, `drivers/net/tun.c`.

use super::offload::{HEADER_BYTES, VnetHeader};
use super::{FRAME_MAX, iovec};
use std::ffi::{CStr, CString, c_int, c_uint};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

// linux/sockios.h, where the crate libc has none of that name.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// struct ifreq with what is set here: flags, or an interface's index.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    value: c_int,
    rest: [u8; 20],
}

impl Request {
    fn new(name: &CStr, value: c_int) -> io::Result<Self> {
        let bytes = name.to_bytes();
        if bytes.len() >= libc::IFNAMSIZ {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut request = Self { name: [0; libc::IFNAMSIZ], value, rest: [0; 20] };
        request.name[..bytes.len()].copy_from_slice(bytes);
        Ok(request)
    }

    fn name(&self) -> io::Result<CString> {
        let name = CStr::from_bytes_until_nul(&self.name).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(name.to_owned())
    }
}

/// A network device, and its other end.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: CString,
    /// For one frame.
    buffer: Mutex<Vec<u8>>,
}

impl Tap {
    /// Makes a device of this name, of which `%d` is replaced by a number that is free, and sets it up.
    ///
    /// # Errors
    /// The system's: EPERM without CAP_NET_ADMIN, EBUSY when there is one with an owner, EINVAL for one that is no tap.
    pub fn create(name: &str) -> io::Result<Self> {
        let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the path is NUL-terminated.
        let fd = unsafe { libc::open(c"/dev/net/tun".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was opened just now and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut request = Request::new(&name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
        // SAFETY: a struct ifreq, which this request reads and writes.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let header = HEADER_BYTES as c_int;
        // SAFETY: this request reads an int.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
        let offloads: c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        // SAFETY: this request takes a number.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })?;
        let tap = Self { fd, name: request.name()?, buffer: Mutex::new(vec![0; FRAME_MAX]) };
        let mut up = Request::new(&tap.name, libc::IFF_UP)?;
        control(libc::SIOCSIFFLAGS, &mut up)?;
        Ok(tap)
    }

    /// Makes the device a port of a bridge.
    ///
    /// # Errors
    /// The system's: ENODEV without such a bridge.
    pub fn join(&self, bridge: &str) -> io::Result<()> {
        let bridge = CString::new(bridge).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the name is NUL-terminated.
        let index = unsafe { libc::if_nametoindex(self.name.as_ptr()) };
        let index = c_int::try_from(index).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        control(SIOCBRADDIF, &mut Request::new(&bridge, index)?)
    }

    /// The device's name.
    pub fn name(&self) -> String {
        self.name.to_string_lossy().into_owned()
    }

    /// Shows up to `limit` frames to `each`, as the kernel has them, and returns how many there were. Does not wait.
    /// `each` must not call this.
    ///
    /// # Errors
    /// The system's: EBADFD when the device was taken away.
    pub fn receive(&self, limit: usize, each: &mut dyn FnMut(&VnetHeader, &[u8])) -> io::Result<usize> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        for taken in 0..limit {
            let mut header = [0u8; HEADER_BYTES];
            let parts = [iovec(header.as_mut_ptr(), HEADER_BYTES), iovec(buffer.as_mut_ptr(), buffer.len())];
            // SAFETY: both parts are writable for the lengths said.
            let got = unsafe { libc::readv(self.fd.as_raw_fd(), parts.as_ptr(), parts.len() as c_int) };
            match usize::try_from(got) {
                Ok(got) => {
                    let frame = buffer.get(..got.saturating_sub(HEADER_BYTES)).unwrap_or_default();
                    each(&VnetHeader::parse(&header), frame);
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(limit)
    }

    /// Sends a frame of which `header` says what is left to be done.
    ///
    /// # Errors
    /// The system's: EINVAL for a header that does not fit the frame, EIO while the device is down.
    pub fn send(&self, header: &VnetHeader, frame: &[u8]) -> io::Result<()> {
        let header = header.bytes();
        let parts = [iovec(header.as_ptr().cast_mut(), header.len()), iovec(frame.as_ptr().cast_mut(), frame.len())];
        loop {
            // SAFETY: both parts are readable for the lengths said; writing does not write them.
            if unsafe { libc::writev(self.fd.as_raw_fd(), parts.as_ptr(), parts.len() as c_int) } >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check(rc: c_int) -> io::Result<()> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An order about an interface; any socket takes it.
fn control(order: libc::c_ulong, request: &mut Request) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: it was opened just now and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a struct ifreq, which both orders used here take.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), order as libc::Ioctl, request as *mut Request) })
}

const _: () = assert!(mem::size_of::<Request>() == mem::size_of::<libc::ifreq>());
