//! Large reads of a file, on a way to the client that does not lead through memory of ours.
//!
//! ```text
//!   file ── windows: its pages, mapped ──▶ sendmsg, with the replies' headers ──▶ socket      one copy, the kernel's
//!            └ what is not in memory is read the ordinary way: it is waited for beside what follows, and what fails says why
//! ```
//!
//! The client's copy out of the socket then goes on while the next piece is copied into it, which is all that two cores can do:
//! reads of 1 MiB are as fast as those of a server whose disk is memory of its own (`scripts/bench.sh nbd`). Pages that were
//! spliced into the socket instead spare a copy more, and leave the client to fetch from memory what no cache holds: that was
//! slower than two copies on one machine and 1.75 times as fast on another.
//!
//! The traps: a write that is carried out before a piece is sent shows in it, be it one that came behind the read. It is one that nobody
//! who waited for the read could have asked for, and NBD promises no order of requests that overlap (`doc/proto.md`, "Ordering of
//! messages and writes"). Pages that are mapped cost memory of the kernel's, 8 bytes each, so a client has [`WINDOWS_MAX`] windows at most,
//! and they go least recently used first. And a file that becomes shorter between the question and the answer
//! cannot be told to the client any more, whose connection ends then ([`xen::window`]).

use super::threads::Stream;
use crate::nbd::reply::Aside;
use rustix::fs::{FileType, Stat, fstat};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use xen::window::{Part, Window, send_parts};

/// Of a file, from a multiple of it on.
const WINDOW_BYTES: usize = 64 << 20;
/// Windows of a client: 1 MiB of page tables.
const WINDOWS_MAX: usize = 8;
/// Failures in a row after which it is left alone: the file is of a kind that cannot be mapped.
const FAILURES_MAX: u32 = 3;

/// Which part of which file. A file that is mapped exists, so no other can have its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    device: u64,
    inode: u64,
    window: u64,
}

/// The way to one client.
#[derive(Debug)]
pub(super) struct Windows {
    socket: Stream,
    /// The most recently used first.
    open: Vec<(Place, Arc<Window>)>,
    taken: Vec<(Arc<Window>, Range<usize>)>,
    /// To ask with.
    pages: Vec<u8>,
    failures: u32,
}

impl Windows {
    pub(super) fn to(socket: Stream) -> Self {
        let (open, taken, pages) = Default::default();
        Self { socket, open, taken, pages, failures: 0 }
    }

    fn window(&mut self, file: BorrowedFd<'_>, of: &Stat, number: u64) -> io::Result<Arc<Window>> {
        let place = Place { device: of.st_dev, inode: of.st_ino, window: number };
        match self.open.iter().position(|(at, _)| *at == place) {
            Some(index) => self.open[..=index].rotate_right(1),
            None => {
                let window = Window::open(file, number * WINDOW_BYTES as u64, WINDOW_BYTES)?;
                self.open.truncate(WINDOWS_MAX - 1);
                self.open.insert(0, (place, Arc::new(window)));
            }
        }
        Ok(self.open[0].1.clone())
    }

    fn look(&mut self, file: BorrowedFd<'_>, number: u64, range: Range<usize>) -> io::Result<bool> {
        let of = fstat(file)?;
        // Pages behind the end of a file that became shorter may well be in memory, and nobody gets them.
        let end = number * WINDOW_BYTES as u64 + range.end as u64;
        if FileType::from_raw_mode(of.st_mode) == FileType::RegularFile && end > of.st_size as u64 {
            return Ok(false);
        }
        let window = self.window(file, &of, number)?;
        let there = window.is_in_memory(range.clone(), &mut self.pages)?;
        if there {
            self.taken.push((window, range));
        }
        Ok(there)
    }
}

impl Aside for Windows {
    fn take(&mut self, file: BorrowedFd<'_>, offset: u64, len_bytes: usize) -> bool {
        let (number, start) = (offset / WINDOW_BYTES as u64, (offset % WINDOW_BYTES as u64) as usize);
        // Over two windows it is read the ordinary way.
        let Some(end) = start.checked_add(len_bytes).filter(|end| *end <= WINDOW_BYTES) else { return false };
        if self.failures >= FAILURES_MAX {
            return false;
        }
        match self.look(file, number, start..end) {
            Ok(there) => {
                self.failures = 0;
                there
            }
            Err(error) => {
                tracing::debug!(%error, len_bytes, "read the ordinary way");
                self.failures += 1;
                false
            }
        }
    }

    fn send(&mut self, bytes: &[u8], places: &[usize]) -> io::Result<()> {
        let mut from = 0;
        let pieces = places.iter().zip(&self.taken).flat_map(|(place, (window, range))| {
            let before = &bytes[std::mem::replace(&mut from, *place)..*place];
            [Part::Bytes(before), Part::Seen(window, range.clone())]
        });
        let last = &bytes[places.last().copied().unwrap_or(0)..];
        let sent = send_parts(self.socket.as_fd(), pieces.chain([Part::Bytes(last)]));
        self.taken.clear();
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::super::threads::tests::{Lab, request};
    use super::*;
    use crate::disk::FileDisk;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;

    const MIB: usize = 1 << 20;

    /// A file of three MiB in which no two places look alike.
    fn image(dir: &tempfile::TempDir) -> (PathBuf, Vec<u8>) {
        let path = dir.path().join("disk.img");
        let bytes: Vec<u8> =
            (0..3 * MIB as u32 / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
        std::fs::write(&path, &bytes).unwrap();
        (path, bytes)
    }

    fn way() -> (Windows, UnixStream) {
        let (here, there) = UnixStream::pair().unwrap();
        (Windows::to(Stream::Unix(here.into())), there)
    }

    #[test]
    fn pieces_are_sent_in_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bytes) = image(&dir);
        let file = File::open(path).unwrap();
        let (mut way, mut there) = way();
        let pieces = [(0, 64 << 10), (4095, 100_001), (12_345, MIB - 20_000), (2 * MIB, MIB), (0, 64 << 10)];
        for (said, places) in [("a b c d e ", [2, 4, 6, 8, 10]), ("abc", [0, 0, 1, 2, 2])] {
            let (mut expected, mut from) = (Vec::new(), 0);
            for ((offset, len), place) in pieces.into_iter().zip(places) {
                assert!(way.take(file.as_fd(), offset as u64, len), "{len} bytes at {offset}");
                expected.extend([&said.as_bytes()[from..place], &bytes[offset..offset + len]].concat());
                from = place;
            }
            expected.extend(&said.as_bytes()[from..]);
            let reader = std::thread::spawn({
                let (mut there, mut got) = (there.try_clone().unwrap(), vec![0; expected.len()]);
                move || there.read_exact(&mut got).map(|()| got)
            });
            way.send(said.as_bytes(), &places).unwrap();
            assert!(reader.join().unwrap().unwrap() == expected, "{said}");
        }
        there.set_nonblocking(true).unwrap();
        assert!(there.read(&mut [0]).is_err(), "and nothing else");
    }

    #[test]
    fn what_cannot_be_taken_is_left_to_who_can_say_why() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bytes) = image(&dir);
        let file = File::open(&path).unwrap();
        let (mut way, mut there) = way();
        let writer = File::options().write(true).open(&path).unwrap();
        writer.set_len(2 * WINDOW_BYTES as u64).unwrap();
        for _ in 0..5 {
            assert!(!way.take(file.as_fd(), 3 * MIB as u64, MIB), "a hole is not in memory");
            assert!(!way.take(file.as_fd(), WINDOW_BYTES as u64 - 4096, 8192), "over two windows");
            assert!(
                !way.take(file.as_fd(), 2 * WINDOW_BYTES as u64 - 4096, 4097) && !way.take(file.as_fd(), u64::MAX, MIB)
            );
        }
        // One that is in memory when it is taken, and nowhere when it is sent.
        assert!(way.take(file.as_fd(), 2 * MIB as u64, MIB));
        writer.set_len(MIB as u64).unwrap();
        assert!(way.send(b"", &[0]).is_err());
        assert!(way.take(file.as_fd(), 4096, 64 << 10));
        way.send(b"", &[0]).unwrap();
        let mut got = vec![0; 64 << 10];
        there.read_exact(&mut got).unwrap();
        assert!(got == bytes[4096..4096 + (64 << 10)]);
        assert!(!way.take(file.as_fd(), 0, 2 * MIB), "it is longer than its file now");
        // What cannot be mapped at all is asked for no more; the place is not another file's.
        (0..FAILURES_MAX).for_each(|_| assert!(!way.take(there.as_fd(), 0, MIB)));
        assert!(!way.take(file.as_fd(), 0, MIB));
    }

    #[test]
    fn a_client_has_a_few_windows_and_each_is_its_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let (mut way, mut there) = way();
        let mut byte = |way: &mut Windows, file: &File, at: u64| {
            assert!(way.take(file.as_fd(), at, 1));
            way.send(b"", &[0]).unwrap();
            let mut byte = [0];
            there.read_exact(&mut byte).unwrap();
            byte[0]
        };
        let open = |name: &str| {
            let path = dir.path().join(name);
            File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap()
        };
        let file = open("many");
        for number in 0..12 {
            std::os::unix::fs::FileExt::write_all_at(&file, &[number], u64::from(number) * WINDOW_BYTES as u64)
                .unwrap();
        }
        for number in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 11, 5] {
            assert_eq!(byte(&mut way, &file, u64::from(number) * WINDOW_BYTES as u64), number);
            assert!(way.open.len() <= WINDOWS_MAX);
        }
        // A file that comes and goes, and another that has its descriptor.
        for number in 0..12 {
            let mut file = open(&number.to_string());
            std::fs::remove_file(dir.path().join(number.to_string())).unwrap();
            file.write_all(&[100 + number]).unwrap();
            assert_eq!(byte(&mut way, &file, 0), 100 + number);
        }
    }

    #[test]
    fn clients_read_what_is_there_and_are_told_what_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bytes) = image(&dir);
        let disk = path.clone();
        let mut lab = Lab::new(3 * MIB as u64, Box::new(move |_| Ok(Box::new(FileDisk::open_read_only(&disk)?))));
        let client = &mut lab.client;
        let mut ask = |reads: &[(u64, u32)]| {
            for (cookie, (offset, len_bytes)) in (1..).zip(reads) {
                client.write_all(&request(0, cookie, *offset, *len_bytes)).unwrap();
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
        lab.end();
    }
}
