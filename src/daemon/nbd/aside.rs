//! Large reads of a file, on a way to the client that does not lead through memory of ours.
//!
//! ```text
//!   file ── splice: pages, not bytes ──▶ pipe ── splice ──▶ socket ── the only copy ──▶ client
//!            └ before a word is said of them: what fails here is read the ordinary way, which says why
//! ```
//!
//! Whether that is faster is a matter of the machine, and measured: `choice.rs`. What would have to be waited for does not go this
//! way: [`super::beside`] is for that. Only both ends of a read are looked
//! for in memory, since what was read or written together is mostly there together.
//!
//! The traps: what is on its way is the file's pages and not what was in them, so a write that is carried out before the client
//! has taken them may show. It is one that nobody who waited for the read could have asked for, and NBD promises no order of requests
//! that overlap (`doc/proto.md`, "Ordering of messages and writes"). And a pipe counts pages: bytes that do not begin with one need one
//! more.

mod choice;

use super::threads::Stream;
use crate::daemon::engine_clock;
use crate::nbd::reply::Aside;
use choice::Choice;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use std::io::{self, IoSliceMut};
use std::os::fd::{BorrowedFd, OwnedFd};

/// What a pipe should have room for, and what it may have without privileges (`/proc/sys/fs/pipe-max-size`).
const ROOM_WANTED_BYTES: [usize; 2] = [2 << 20, 1 << 20];
const PAGE_BYTES: u64 = 4096;
/// Failures in a row after which it is left alone: the file is of a kind that has no pages to give.
const FAILURES_MAX: u32 = 3;

#[derive(Debug)]
struct Ends {
    reader: OwnedFd,
    writer: OwnedFd,
    room_bytes: u64,
}

impl Ends {
    fn new() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // As it is, it has room for the smallest reads that come here.
        let _ = ROOM_WANTED_BYTES.iter().find_map(|bytes| fcntl_setpipe_size(&writer, *bytes).ok());
        let room_bytes = fcntl_getpipe_size(&writer)? as u64;
        Ok(Self { reader, writer, room_bytes })
    }
}

/// The way to one client. It is made when it is first wanted.
#[derive(Debug)]
pub(super) struct Pipe {
    socket: Stream,
    ends: Option<Ends>,
    taken_bytes: usize,
    failures: u32,
    choice: Choice,
}

impl Pipe {
    /// To the other end of a Unix socket. A TCP connection takes pages in pieces of its own, and was no faster: 0.8 to 1.1 times.
    pub(super) fn to(socket: &Stream) -> io::Result<Option<Self>> {
        Ok(match socket {
            Stream::Unix(_) => {
                let (socket, choice) = (socket.try_clone()?, Choice::default());
                Some(Self { socket, ends: None, taken_bytes: 0, failures: 0, choice })
            }
            Stream::Tcp(_) => None,
        })
    }

    fn ends(&mut self) -> io::Result<&Ends> {
        Ok(match &mut self.ends {
            Some(ends) => ends,
            none => none.insert(Ends::new()?),
        })
    }

    /// Fills the empty pipe, unless it is too small.
    fn fill(&mut self, file: BorrowedFd<'_>, offset: u64, len_bytes: usize) -> io::Result<bool> {
        let filled = self.splice_in(file, offset, len_bytes);
        if filled.is_err() {
            // With what is in it.
            self.ends = None;
        }
        filled
    }

    fn splice_in(&mut self, file: BorrowedFd<'_>, mut offset: u64, len_bytes: usize) -> io::Result<bool> {
        let ends = self.ends()?;
        let pages = (offset + len_bytes as u64).div_ceil(PAGE_BYTES) - offset / PAGE_BYTES;
        if pages * PAGE_BYTES > ends.room_bytes {
            return Ok(false);
        }
        let mut left = len_bytes;
        while left > 0 {
            match splice(file, Some(&mut offset), &ends.writer, None, left, SpliceFlags::NONBLOCK) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => left -= bytes,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(true)
    }
}

/// Whether a byte of a file need not be waited for, as far as the file system can tell: what lies in memory alone cannot.
fn is_in_memory(file: BorrowedFd<'_>, at: u64) -> bool {
    match preadv2(file, &mut [IoSliceMut::new(&mut [0])], at, ReadWriteFlags::NOWAIT) {
        Ok(bytes) => bytes == 1,
        Err(errno) => errno == Errno::OPNOTSUPP,
    }
}

impl Aside for Pipe {
    fn take(&mut self, file: BorrowedFd<'_>, offset: u64, len_bytes: usize) -> bool {
        let Some(last) = offset.checked_add(len_bytes as u64).and_then(|end| end.checked_sub(1)) else { return false };
        if self.taken_bytes > 0 || self.failures >= FAILURES_MAX {
            return false;
        }
        if !self.choice.next(engine_clock(), len_bytes) || !is_in_memory(file, offset) || !is_in_memory(file, last) {
            return false;
        }
        match self.fill(file, offset, len_bytes) {
            Ok(true) => {
                (self.taken_bytes, self.failures) = (len_bytes, 0);
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::debug!(%error, len_bytes, "read the ordinary way");
                self.failures += 1;
                false
            }
        }
    }

    fn send(&mut self, before: &[u8]) -> io::Result<()> {
        self.socket.send_more(before)?;
        let Some(ends) = &self.ends else { return Ok(()) };
        while self.taken_bytes > 0 {
            match splice(&ends.reader, None, &self.socket, None, self.taken_bytes, SpliceFlags::MOVE) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => self.taken_bytes -= bytes,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::threads::{Listener, OpenDisk, Running, Service, serve_all};
    use super::*;
    use crate::disk::FileDisk;
    use crate::nbd::handshake::Export;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::sync::Arc;

    const MIB: usize = 1 << 20;

    /// A file of three MiB in which no two places look alike.
    fn image(dir: &tempfile::TempDir) -> (PathBuf, Vec<u8>) {
        let path = dir.path().join("disk.img");
        let bytes: Vec<u8> =
            (0..3 * MIB as u32 / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
        std::fs::write(&path, &bytes).unwrap();
        (path, bytes)
    }

    #[test]
    fn what_is_taken_is_sent_behind_what_is_said_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bytes) = image(&dir);
        let file = File::open(path).unwrap();
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut pipe = Pipe::to(&Stream::Unix(here)).unwrap().unwrap();
        for (offset, len) in [(0, 64 << 10), (4095, 100_001), (12_345, MIB - 20_000), (2 * MIB, MIB), (0, 64 << 10)] {
            assert!(pipe.take(file.as_fd(), offset as u64, len), "{len} bytes at {offset}");
            assert!(!pipe.take(file.as_fd(), 0, 1), "one piece at a time");
            let reader = std::thread::spawn({
                let mut there = there.try_clone().unwrap();
                move || {
                    let mut got = vec![0; 6 + len];
                    there.read_exact(&mut got).unwrap();
                    got
                }
            });
            pipe.send(b"before").unwrap();
            let got = reader.join().unwrap();
            assert!(got[..6] == *b"before" && got[6..] == bytes[offset..offset + len], "{len} bytes at {offset}");
        }
        there.set_nonblocking(true).unwrap();
        assert!(there.read(&mut [0]).is_err(), "and nothing else");
    }

    #[test]
    fn what_cannot_be_taken_is_left_to_who_can_say_why() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bytes) = image(&dir);
        let file = File::open(path).unwrap();
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut pipe = Pipe::to(&Stream::Unix(here)).unwrap().unwrap();
        for _ in 0..5 {
            assert!(!pipe.take(file.as_fd(), 0, 3 * MIB), "longer than a pipe");
            assert!(!pipe.take(file.as_fd(), 2 * MIB as u64, 2 * MIB), "over its end");
            assert!(!pipe.take(file.as_fd(), u64::MAX, MIB) && !pipe.take(file.as_fd(), 0, 0));
        }
        // Once with something in the pipe already: a file that got shorter behind its last byte's back.
        assert!(pipe.fill(file.as_fd(), 3 * MIB as u64 - 4096, 8192).is_err());
        assert!(pipe.take(file.as_fd(), 4096, 64 << 10));
        pipe.send(b"").unwrap();
        let mut got = vec![0; 64 << 10];
        there.read_exact(&mut got).unwrap();
        assert!(got == bytes[4096..4096 + (64 << 10)]);
    }

    #[test]
    fn clients_read_what_is_there_and_are_told_what_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bytes) = image(&dir);
        let socket = dir.path().join("sock");
        let listener = Listener::Unix(UnixListener::bind(&socket).unwrap());
        let disk = path.clone();
        let open: OpenDisk = Box::new(move |_| Ok(Box::new(FileDisk::open_read_only(&disk)?)));
        let exports = vec![Export::new("disk", 3 * MIB as u64)];
        let service = Arc::new(Service { exports, open, max_connections: 0, tls: None });
        let running = Running::default();
        let here = running.clone();
        let server = std::thread::spawn(move || serve_all(&listener, &service, &here));
        let mut client = UnixStream::connect(socket).unwrap();
        client.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
        client.read_exact(&mut [0; 28]).unwrap();
        let mut ask = |reads: &[(u64, u32)]| {
            for (cookie, (offset, len_bytes)) in (1_u64..).zip(reads) {
                let mut request = crate::nbd::REQUEST_MAGIC.to_be_bytes().to_vec();
                request.extend([[0; 4].as_slice(), &cookie.to_be_bytes(), &offset.to_be_bytes()].concat());
                request.extend(len_bytes.to_be_bytes());
                client.write_all(&request).unwrap();
            }
            let mut replies = vec![None; reads.len()];
            for _ in reads {
                let mut head = [0; 16];
                client.read_exact(&mut head).unwrap();
                let index = usize::from(head[15]) - 1;
                let mut data = vec![0; if head[7] == 0 { reads[index].1 as usize } else { 0 }];
                client.read_exact(&mut data).unwrap();
                replies[index] = Some((head[7], data));
            }
            replies.into_iter().map(Option::unwrap).collect::<Vec<_>>()
        };
        // Small and large in turn: what goes aside is followed by what does not.
        let reads = [(0, 512), (512, 64 << 10), (7, 100), (4096, 1 << 20), (8191, 200_000), (0, 3 << 20), (1, 1)];
        for ((offset, len), (errno, data)) in reads.iter().zip(ask(&reads)) {
            assert!(errno == 0 && data == bytes[*offset as usize..][..*len as usize], "{len} bytes at {offset}");
        }
        File::options().write(true).open(path).unwrap().set_len(MIB as u64).unwrap();
        let said = ask(&[(0, 2 << 20), (0, 1 << 20)]);
        assert_eq!((said[0].0, said[0].1.len()), (5, 0), "an error, and no data");
        assert!(said[1].0 == 0 && said[1].1 == bytes[..MIB], "and the connection lives");
        running.end();
        server.join().unwrap().unwrap();
    }
}
