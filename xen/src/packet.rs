//! Whole Ethernet frames of one network interface, to a guest's vif or tap and from it, by AF_PACKET.
//!
//! A guest in the same machine does not finish its packets: it leaves checksums half done and hands over TCP segments of
//! up to 64 KiB, for the card to finish. There is no card here. So every frame is received with its virtio-net header,
//! which says what is missing, and [`offload`] does what the card would have done: what [`PacketSocket::recv`] gives are
//! frames as they would be on a wire.
//!
//! There are two ways out of the kernel, [`Receive`]: a call a frame, or a ring of blocks (`ring.rs`). A network that a kernel on
//! the other side is to finish gets its frames as they are, through [`PacketSocket::receive`] and
//! [`PacketSocket::send_unfinished`], and so does a [`Tap`] of our own.
//!
//! Traps: until it is bound a packet socket hears every interface, so it is made for no protocol and bound last. The
//! kernel takes a VLAN tag out of the frame and tells it on the side; it is put back. Frames that others send come too, as
//! "outgoing" unless that is switched off. Sending does not wait: a guest that stands still would hold up its proxy.

pub mod offload;
mod ring;
mod tap;

pub use tap::Tap;

use offload::{HEADER_BYTES, VnetHeader};
use ring::Ring;
use std::collections::VecDeque;
use std::ffi::{CString, c_int, c_void};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A received frame, unfinished: 64 KiB of IP and what may be around it.
const FRAME_MAX: usize = 68 << 10;
/// What the kernel keeps for us while we are away.
const RECEIVE_BUFFER: c_int = 8 << 20;
/// What is on its way into the interface.
const SEND_BUFFER: c_int = 4 << 20;

// linux/if_packet.h, where the crate libc has none of that name.
const PACKET_IGNORE_OUTGOING: c_int = 23;
const PACKET_VNET_HDR: c_int = 15;
const PACKET_AUXDATA: c_int = 8;
const PACKET_STATISTICS: c_int = 6;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// Bytes that were written to a stream socket and are not at its other end: with TCP in the other host's kernel, with a Unix
/// socket in the process.
///
/// # Errors
/// The system's, for what is no socket.
pub fn under_way_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: this request (SIOCOUTQ, by its older name) writes an int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// struct tpacket_auxdata.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Auxdata {
    status: u32,
    length: u32,
    captured: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

/// How received frames come out of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Receive {
    /// A call for each, which has it as soon as the kernel does.
    #[default]
    Calls,
    /// Memory shared with the kernel: cheaper for many frames, and a frame alone comes a millisecond late.
    Ring,
}

/// Frames that were received and are not to be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Losses {
    /// Lost by the kernel for want of room.
    pub kernel: u64,
    /// Too long, or asking for more than can be done.
    pub unusable: u64,
}

impl Losses {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.kernel + self.unusable
    }
}

/// A packet socket on one interface. Clones share what is waiting.
#[derive(Clone, Debug)]
pub struct PacketSocket {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    source: Source,
    /// Why there is no ring, if one was wanted.
    refused: Option<io::Error>,
    /// The rest of a segment that was cut up.
    waiting: Mutex<VecDeque<Vec<u8>>>,
    lost_by_kernel: AtomicU64,
    unusable: AtomicU64,
}

#[derive(Debug)]
enum Source {
    /// Room for one frame.
    Calls(Mutex<Vec<u8>>),
    Ring(Mutex<Ring>),
}

impl PacketSocket {
    /// Opens an interface by name, in promiscuous mode, with a call for each frame.
    ///
    /// # Errors
    /// The system's: EPERM without CAP_NET_RAW, ENODEV without such an interface.
    pub fn open(interface: &str) -> io::Result<Self> {
        Self::make(interface, None)
    }

    /// Opens an interface by name, in promiscuous mode. A kernel that has no ring to give is called for each frame:
    /// [`PacketSocket::refused`].
    ///
    /// # Errors
    /// The system's: EPERM without CAP_NET_RAW, ENODEV without such an interface.
    pub fn open_to(interface: &str, receive: Receive) -> io::Result<Self> {
        let ring = match receive {
            Receive::Calls => return Self::open(interface),
            Receive::Ring => Self::make(interface, Some(Ring::new)),
        };
        match ring {
            Ok(socket) => Ok(socket),
            // Another socket: this one may be half of what was asked for. What both refuse is not the ring's fault.
            Err(error) => {
                let mut socket = Self::open(interface)?;
                if let Some(shared) = Arc::get_mut(&mut socket.shared) {
                    shared.refused = Some(error);
                }
                Ok(socket)
            }
        }
    }

    fn make(interface: &str, ring: Option<fn(RawFd) -> io::Result<Ring>>) -> io::Result<Self> {
        let name = CString::new(interface).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the name is NUL-terminated.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: no memory is involved. No protocol: nothing is received before the bind.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was opened just now and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let raw = fd.as_raw_fd();
        for option in [PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, PACKET_AUXDATA] {
            set(raw, libc::SOL_PACKET, option, &1)?;
        }
        // Beyond the system's limit if we may.
        if set(raw, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER).is_err() {
            set(raw, libc::SOL_SOCKET, libc::SO_RCVBUF, &RECEIVE_BUFFER)?;
        }
        if set(raw, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER).is_err() {
            set(raw, libc::SOL_SOCKET, libc::SO_SNDBUF, &SEND_BUFFER)?;
        }
        let source = match ring {
            Some(ring) => Source::Ring(Mutex::new(ring(raw)?)),
            None => Source::Calls(Mutex::default()),
        };
        let index = c_int::try_from(index).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let membership = libc::packet_mreq {
            mr_ifindex: index,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        set(raw, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
        // SAFETY: a struct of plain numbers.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index;
        // SAFETY: the address is of the size said.
        let rc = unsafe { libc::bind(raw, (&raw const address).cast(), mem::size_of_val(&address) as libc::socklen_t) };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        let [lost_by_kernel, unusable] = [const { AtomicU64::new(0) }; 2];
        Ok(Self {
            shared: Arc::new(Shared { fd, source, refused: None, waiting: Mutex::default(), lost_by_kernel, unusable }),
        })
    }

    /// Why there is no ring, if one was wanted.
    pub fn refused(&self) -> Option<&io::Error> {
        self.shared.refused.as_ref()
    }

    /// Receives one finished frame into `into`, whose content it replaces, and returns its length; nothing if none came
    /// in time.
    ///
    /// # Errors
    /// The system's: ENETDOWN when the interface went down.
    pub fn recv(&self, timeout: Duration, into: &mut Vec<u8>) -> io::Result<Option<usize>> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(frame) = self.waiting().pop_front() {
                *into = frame;
                return Ok(Some(into.len()));
            }
            if self.read(1, &mut |frame| self.waiting().push_back(frame.to_vec()))? > 0 {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            if !self.poll(left)? && Instant::now() >= end {
                return Ok(None);
            }
        }
    }

    /// Shows up to `limit` of the kernel's frames to `each`, finished and cut as a card would do it, and returns how many
    /// there were. Does not wait. `each` must not read from this socket.
    ///
    /// # Errors
    /// The system's: ENETDOWN when the interface went down.
    pub fn read(&self, limit: usize, each: &mut dyn FnMut(&[u8])) -> io::Result<usize> {
        self.receive(limit, &mut |header, frame| {
            if header.needs_nothing() {
                return each(frame);
            }
            match offload::finish(header, frame.to_vec()) {
                Ok(frames) => frames.iter().for_each(|frame| each(frame)),
                Err(_) => self.count_unusable(1),
            }
        })
    }

    /// As [`PacketSocket::read`], with frames as the kernel has them: `each` is told what is left to be done.
    ///
    /// # Errors
    /// The system's: ENETDOWN when the interface went down.
    pub fn receive(&self, limit: usize, each: &mut dyn FnMut(&VnetHeader, &[u8])) -> io::Result<usize> {
        match &self.shared.source {
            Source::Ring(ring) => {
                // Whoever panicked did so with a frame that is still there.
                let taken = ring.lock().unwrap_or_else(PoisonError::into_inner).take(limit, each);
                self.count_unusable(taken.unusable);
                Ok(taken.frames)
            }
            Source::Calls(buffer) => {
                let mut buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner);
                for taken in 0..limit {
                    match self.call(&mut buffer) {
                        Ok(Some((header, tag))) => with_tag(header, &buffer, tag, each),
                        Ok(None) => return Ok(taken),
                        // Told of one frame, and that one is gone. A kernel that has no words for what is to be done
                        // to a frame (a segment within a tunnel) says EINVAL.
                        Err(error)
                            if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) =>
                        {
                            self.count_unusable(1);
                        }
                        Err(error) => return Err(error),
                    }
                }
                Ok(limit)
            }
        }
    }

    fn count_unusable(&self, frames: u64) {
        self.shared.unusable.fetch_add(frames, Ordering::Relaxed);
    }

    /// Sends one whole frame. Does not wait for room.
    ///
    /// # Errors
    /// The system's: `WouldBlock` or ENOBUFS when there is no room, which a network may answer by losing the frame;
    /// EMSGSIZE for a frame longer than the interface's MTU allows.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.send_unfinished(&VnetHeader::default(), frame)
    }

    /// Sends a frame of which `header` says what is left to be done. Does not wait for room.
    ///
    /// # Errors
    /// As [`PacketSocket::send`], and EINVAL for a header that does not fit the frame.
    pub fn send_unfinished(&self, header: &VnetHeader, frame: &[u8]) -> io::Result<()> {
        let header = header.bytes();
        let parts = [iovec(header.as_ptr().cast_mut(), header.len()), iovec(frame.as_ptr().cast_mut(), frame.len())];
        // SAFETY: a struct of plain numbers and null pointers.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = parts.as_ptr().cast_mut();
        message.msg_iovlen = parts.len();
        loop {
            // SAFETY: both parts are readable for the lengths said; sending does not write them.
            if unsafe { libc::sendmsg(self.raw(), &message, libc::MSG_DONTWAIT) } >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// What was lost since the socket was opened.
    ///
    /// # Errors
    /// The system's.
    pub fn losses(&self) -> io::Result<Losses> {
        // struct tpacket_stats_v3: packets, drops, and how often the ring was full; without a ring the first two. The
        // kernel begins anew each time.
        let mut stats = [0u32; 3];
        let mut length = mem::size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the buffer is of the length said.
        let rc = unsafe {
            libc::getsockopt(
                self.raw(),
                libc::SOL_PACKET,
                PACKET_STATISTICS,
                stats.as_mut_ptr().cast::<c_void>(),
                &mut length,
            )
        };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        let lost = u64::from(stats[1]);
        let kernel = self.shared.lost_by_kernel.fetch_add(lost, Ordering::Relaxed) + lost;
        Ok(Losses { kernel, unusable: self.shared.unusable.load(Ordering::Relaxed) })
    }

    fn raw(&self) -> RawFd {
        self.shared.fd.as_raw_fd()
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        // Whoever panicked left whole frames.
        self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One frame as the kernel has it; nothing if there is none.
    fn call(&self, into: &mut Vec<u8>) -> io::Result<Option<(VnetHeader, Option<[u8; 4]>)>> {
        into.clear();
        into.reserve(FRAME_MAX);
        let mut header = [0u8; HEADER_BYTES];
        let parts = [iovec(header.as_mut_ptr(), HEADER_BYTES), iovec(into.as_mut_ptr(), FRAME_MAX)];
        // Room for one control message, aligned as they are.
        let mut control = [0u64; 8];
        // SAFETY: a struct of plain numbers and null pointers.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = parts.as_ptr().cast_mut();
        message.msg_iovlen = parts.len();
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = mem::size_of_val(&control);
        // SAFETY: all three buffers are writable for the lengths said.
        let got = unsafe { libc::recvmsg(self.raw(), &mut message, libc::MSG_DONTWAIT) };
        if got < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        }
        let Some(length) = usize::try_from(got).ok().and_then(|got| got.checked_sub(HEADER_BYTES)) else {
            return Err(invalid("a frame without its header"));
        };
        if message.msg_flags & libc::MSG_TRUNC != 0 || length > FRAME_MAX {
            return Err(invalid("a frame of more than 64 KiB"));
        }
        // SAFETY: the kernel wrote that many bytes, into reserved room.
        unsafe { into.set_len(length) };
        Ok(Some((VnetHeader::parse(&header), vlan_of(&message))))
    }

    /// Whether a frame can be received within `timeout`.
    ///
    /// # Errors
    /// The system's, and what [`PacketSocket::take_error`] says.
    pub fn poll(&self, timeout: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.raw(), events: libc::POLLIN, revents: 0 };
        let millis = c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX);
        // SAFETY: one entry.
        match unsafe { libc::poll(&mut poll, 1, millis) } {
            ready if ready >= 0 => {
                // Nobody else tells who reads a ring.
                if poll.revents & libc::POLLERR != 0 {
                    self.take_error()?;
                }
                Ok(ready > 0)
            }
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
                error => Err(error),
            },
        }
    }

    /// What has happened to the interface, said once: ENETDOWN when it went down.
    ///
    /// # Errors
    /// That.
    pub fn take_error(&self) -> io::Result<()> {
        let mut number: c_int = 0;
        let mut length = mem::size_of_val(&number) as libc::socklen_t;
        // SAFETY: the buffer is of the length said.
        let rc = unsafe {
            libc::getsockopt(self.raw(), libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut number).cast(), &mut length)
        };
        match (rc, number) {
            (0, 0) => Ok(()),
            (0, number) => Err(io::Error::from_raw_os_error(number)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.raw()
    }
}

fn invalid(what: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

fn iovec(base: *mut u8, length: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: length }
}

fn set<T>(fd: RawFd, level: c_int, option: c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value is of the size said; the options used here take plain numbers.
    let rc = unsafe { libc::setsockopt(fd, level, option, ptr_of(value), mem::size_of_val(value) as libc::socklen_t) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn ptr_of<T>(value: &T) -> *const c_void {
    (value as *const T).cast()
}

/// The tag that the kernel took out of the frame: TPID and TCI as they stand on the wire.
fn vlan_of(message: &libc::msghdr) -> Option<[u8; 4]> {
    // SAFETY: the kernel filled the control buffer that the message names.
    let first = unsafe { libc::CMSG_FIRSTHDR(message) };
    if first.is_null() {
        return None;
    }
    // SAFETY: not null, so there is a whole header.
    let header = unsafe { &*first };
    // SAFETY: no memory is looked at.
    let wanted = unsafe { libc::CMSG_LEN(mem::size_of::<Auxdata>() as u32) } as usize;
    if header.cmsg_level != libc::SOL_PACKET || header.cmsg_type != PACKET_AUXDATA || header.cmsg_len < wanted {
        return None;
    }
    // SAFETY: the length was checked; the data need not be aligned.
    let auxdata = unsafe { libc::CMSG_DATA(first).cast::<Auxdata>().read_unaligned() };
    tag(&auxdata)
}

fn tag(auxdata: &Auxdata) -> Option<[u8; 4]> {
    if auxdata.status & TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    // Kernels before 3.14 do not say which.
    let tpid = if auxdata.status & TP_STATUS_VLAN_TPID_VALID != 0 { auxdata.vlan_tpid } else { 0x8100 };
    let [t0, t1] = tpid.to_be_bytes();
    let [v0, v1] = auxdata.vlan_tci.to_be_bytes();
    Some([t0, t1, v0, v1])
}

/// Behind both addresses.
const ADDRESSES: usize = 12;

/// Shows a frame to `each` with its tag where it belongs.
fn with_tag(header: VnetHeader, frame: &[u8], tag: Option<[u8; 4]>, each: &mut dyn FnMut(&VnetHeader, &[u8])) {
    match (tag, frame.split_at_checked(ADDRESSES)) {
        (Some(tag), Some((addresses, rest))) => {
            each(&header.moved(tag.len() as u16), &[addresses, &tag, rest].concat());
        }
        _ => each(&header, frame),
    }
}

#[cfg(test)]
mod tests;
