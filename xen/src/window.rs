//! A window on a file: bytes that go from the file's pages to a socket in one copy, the kernel's.
//!
//! ```text
//!   file's pages ── mapped, and touched by nobody here ──▶ sendmsg ── the only copy ──▶ socket
//! ```
//!
//! The traps: a process that touches a page which is not to be had dies of SIGBUS, so no reference into a window is ever
//! made, and only the kernel reads it: to the kernel it is EFAULT. And a page that is mapped need not be in memory:
//! whoever must not wait for the medium asks [`Window::is_in_memory`], which a page may leave at any time.
//!
//! Source: mmap(2), mincore(2), sendmsg(2).

use crate::PAGE_BYTES;
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

/// Parts of one message at most: UIO_MAXIOV.
const PARTS_MAX: usize = 1024;

/// A part of a file, mapped to be read.
#[derive(Debug)]
pub struct Window {
    at: *mut c_void,
    len_bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and nobody can write through this one.
unsafe impl Send for Window {}
// SAFETY: as above; what is behind a shared window is only ever read, and by the kernel.
unsafe impl Sync for Window {}

impl Window {
    /// A window on `len_bytes` bytes from `offset` on, a multiple of [`PAGE_BYTES`]. What of it lies behind the file's end
    /// cannot be sent.
    ///
    /// # Errors
    /// The system's: ENODEV for what cannot be mapped, EINVAL for nothing or an odd offset.
    pub fn open(file: BorrowedFd<'_>, offset: u64, len_bytes: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at a place of the kernel's choice; nothing of ours is there.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), len_bytes, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { at, len_bytes }) }
    }

    fn check(&self, range: &Range<usize>) -> io::Result<()> {
        if range.start <= range.end && range.end <= self.len_bytes {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "outside the window"))
    }

    /// Whether all of these bytes are in memory now, as far as the system tells this process: of a file that it may not write
    /// and does not own it is told nothing but yes. `pages` is memory to work with, which is kept for the next time.
    ///
    /// # Errors
    /// The system's, and EINVAL for bytes outside the window.
    pub fn is_in_memory(&self, range: Range<usize>, pages: &mut Vec<u8>) -> io::Result<bool> {
        self.check(&range)?;
        let start = range.start / PAGE_BYTES * PAGE_BYTES;
        pages.resize((range.end - start).div_ceil(PAGE_BYTES), 0);
        // SAFETY: the range begins with a page of the mapping and lies inside it, and there is a byte for each page.
        if unsafe { libc::mincore(self.at.byte_add(start), range.end - start, pages.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pages.iter().all(|page| page & 1 == 1))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping of `open`, of which nobody has a part.
        unsafe { libc::munmap(self.at, self.len_bytes) };
    }
}

/// A part of what is to be sent.
#[derive(Clone, Debug)]
pub enum Part<'a> {
    /// Bytes in memory of ours.
    Bytes(&'a [u8]),
    /// Bytes of a file.
    Seen(&'a Window, Range<usize>),
}

/// Sends all parts through a stream socket, in order, and waits for that. SIGPIPE is not sent.
///
/// # Errors
/// The system's: EFAULT for bytes of a file that cannot be had. EINVAL for bytes outside their window, and nothing is sent
/// then. After any other error some may have been sent.
pub fn send_parts<'a>(socket: BorrowedFd<'_>, parts: impl IntoIterator<Item = Part<'a>>) -> io::Result<()> {
    let part = |part| match part {
        Part::Bytes(bytes) => Ok(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }),
        Part::Seen(window, range) => {
            window.check(&range)?;
            // SAFETY: inside the mapping, or its end.
            Ok(libc::iovec { iov_base: unsafe { window.at.byte_add(range.start) }, iov_len: range.len() })
        }
    };
    let mut parts = parts.into_iter().map(part).collect::<io::Result<Vec<_>>>()?;
    let mut left = &mut parts[..];
    loop {
        let empty = left.iter().take_while(|part| part.iov_len == 0).count();
        left = &mut left[empty..];
        if left.is_empty() {
            return Ok(());
        }
        // SAFETY: all zeroes is an empty message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = left.as_mut_ptr();
        message.msg_iovlen = left.len().min(PARTS_MAX) as _;
        // SAFETY: the kernel reads parts that are borrowed for as long as this function runs; it alone touches a window's.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        let mut sent = match usize::try_from(sent) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => sent,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        for part in left.iter_mut() {
            let of_this = sent.min(part.iov_len);
            // SAFETY: inside the part, or its end.
            part.iov_base = unsafe { part.iov_base.byte_add(of_this) };
            part.iov_len -= of_this;
            sent -= of_this;
            if sent == 0 {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    const SIZE_BYTES: usize = 3 * PAGE_BYTES + 100;

    fn file() -> (tempfile::NamedTempFile, Vec<u8>) {
        let bytes: Vec<u8> = (0..SIZE_BYTES).map(|at| (at % 251) as u8).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    /// Sends the parts while a thread reads, and gives what arrived.
    fn sent<S: Read + AsFd + Send + 'static>(here: S, mut there: S, parts: Vec<Part<'_>>) -> Vec<u8> {
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            there.read_to_end(&mut all).map(|_| all)
        });
        send_parts(here.as_fd(), parts).unwrap();
        drop(here);
        reader.join().unwrap().unwrap()
    }

    #[test]
    fn parts_arrive_in_their_order_however_many_they_are() {
        let (file, bytes) = file();
        let window = Window::open(file.as_fd(), 0, SIZE_BYTES).unwrap();
        let page = Window::open(file.as_fd(), PAGE_BYTES as u64, PAGE_BYTES).unwrap();
        let few = vec![
            Part::Bytes(b""),
            Part::Bytes(b"before"),
            Part::Seen(&window, 5..9000),
            Part::Seen(&window, SIZE_BYTES..SIZE_BYTES),
            Part::Bytes(b"between"),
            Part::Seen(&page, 0..PAGE_BYTES),
            Part::Bytes(b""),
        ];
        let expected = [b"before", &bytes[5..9000], b"between", &bytes[PAGE_BYTES..2 * PAGE_BYTES]].concat();
        // More than one message takes, and than a socket holds.
        let many: Vec<Part<'_>> = few.iter().cycle().take(few.len() * 600).cloned().collect();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        for (parts, times) in [(&few, 1), (&many, 600)] {
            let (here, there) = UnixStream::pair().unwrap();
            assert!(sent(here, there, parts.clone()) == expected.repeat(times), "Unix, {times} times");
            let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (there, _) = listener.accept().unwrap();
            assert!(sent(here, there, parts.clone()) == expected.repeat(times), "TCP, {times} times");
        }
        let (here, _there) = UnixStream::pair().unwrap();
        send_parts(here.as_fd(), []).unwrap();
    }

    #[test]
    fn what_cannot_be_had_is_an_error_and_kills_nobody() {
        let (file, _) = file();
        let window = Window::open(file.as_fd(), 0, 2 * SIZE_BYTES).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let send = |range| send_parts(here.as_fd(), [Part::Seen(&window, range)]).unwrap_err();
        for range in [0..2 * SIZE_BYTES + 1, Range { start: 2, end: 1 }, usize::MAX..usize::MAX] {
            assert!(window.is_in_memory(range.clone(), &mut Vec::new()).is_err());
            assert_eq!(send(range).kind(), io::ErrorKind::InvalidInput);
        }
        // Behind the end of the file, from the beginning and since it became shorter.
        let fault = Some(libc::EFAULT);
        assert_eq!(send(4 * PAGE_BYTES..5 * PAGE_BYTES).raw_os_error(), fault);
        assert!(!window.is_in_memory(4 * PAGE_BYTES..5 * PAGE_BYTES, &mut Vec::new()).unwrap());
        send_parts(here.as_fd(), [Part::Seen(&window, PAGE_BYTES..PAGE_BYTES + 1)]).unwrap();
        file.as_file().set_len(PAGE_BYTES as u64).unwrap();
        assert_eq!(send(PAGE_BYTES..PAGE_BYTES + 1).raw_os_error(), fault);
        drop(there);
        assert_eq!(send(0..1).kind(), io::ErrorKind::BrokenPipe, "and no signal");
        assert!(Window::open(file.as_fd(), 1, PAGE_BYTES).is_err(), "no page begins there");
        assert!(Window::open(file.as_fd(), u64::MAX, PAGE_BYTES).is_err());
        assert!(Window::open(file.as_fd(), 0, 0).is_err());
        assert!(Window::open(here.as_fd(), 0, PAGE_BYTES).is_err(), "a socket has no pages");
    }

    #[test]
    fn what_was_written_is_in_memory_and_what_is_sparse_is_not() {
        let (file, _) = file();
        file.as_file().set_len(10 * SIZE_BYTES as u64).unwrap();
        let window = Window::open(file.as_fd(), 0, 10 * SIZE_BYTES).unwrap();
        let mut pages = Vec::new();
        let mut in_memory = |range| window.is_in_memory(range, &mut pages).unwrap();
        assert!(in_memory(0..SIZE_BYTES) && in_memory(PAGE_BYTES + 1..PAGE_BYTES + 2) && in_memory(7..7));
        assert!(!in_memory(SIZE_BYTES..2 * SIZE_BYTES) && !in_memory(0..10 * SIZE_BYTES));
        assert!(in_memory(3 * PAGE_BYTES - 1..3 * PAGE_BYTES + 1));
    }
}
