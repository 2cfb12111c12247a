//! A disk, as the guest and the replica see one: `read`, `write`, `flush`, a size that never changes; and what a disk
//! may know beyond that: holes, zeroes, what has changed.
//!
//! Two are here, siblings and both for use: [`MemoryDisk`] and [`FileDisk`]. `flush` reaches the medium
//! (`fdatasync`), because an NBD FLUSH that only reaches the page cache is how acknowledged writes get lost.

use crate::pool::Block;
use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a disk is made of.
pub const SECTOR_BYTES: u64 = 512;

/// Why a disk operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The range does not lie inside the disk. Nothing was read or written.
    #[error("bytes {offset}..{} are outside a disk of {size_bytes} bytes", offset.saturating_add(*len_bytes))]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Number of bytes asked for.
        len_bytes: u64,
        /// The disk's size.
        size_bytes: u64,
    },
    /// The disk cannot take the request now; nothing was done; ask again later. A guest keeps the request
    /// pending, so that it can still be suspended.
    #[error("the disk is busy; the same request may succeed later")]
    Busy,
    /// No space is left where the disk keeps its data.
    #[error("no space left for {what}")]
    NoSpace {
        /// Which file.
        what: String,
    },
    /// This writer's generation is over: another host carries the guest now.
    #[error("writes of generation {theirs} are refused: this replica is at generation {ours}")]
    Fenced {
        /// The writer's generation.
        theirs: u64,
        /// The generation in force.
        ours: u64,
    },
    /// A flush failed before: what was written since the last good one may be lost, and no later flush can bring it
    /// back, since the kernel has dropped it (fsync on Linux reports an error once).
    #[error("{what}: a flush of it failed before, and what was written then may be lost; check the medium, and resync")]
    FlushFailed {
        /// Which file.
        what: String,
    },
    /// The medium has no such operation, and doing it by hand was not wanted.
    #[error("not supported here")]
    NotSupported,
    /// Somebody else writes it, or will. Nothing was read or written.
    #[error("{what} is in use: another process has it open; end that one first, or name another image")]
    InUse {
        /// Which file.
        what: String,
    },
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// Which file, and what was being done to it.
        what: String,
        /// The operating system's reason.
        source: io::Error,
    },
}

impl DiskError {
    /// Wraps an operating-system error, telling a full device from the rest.
    #[must_use]
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { what },
            _ => Self::Io { what, source },
        }
    }
}

/// How bytes become zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Zeroing {
    /// The space stays allocated, so that a later write cannot fail for want of it.
    pub keep_allocated: bool,
    /// Refused, with [`DiskError::NotSupported`], where it would be no faster than writing them.
    pub fast_only: bool,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Its length.
    pub len_bytes: u64,
    /// It has no space allocated.
    pub hole: bool,
    /// It reads as zeroes.
    pub zero: bool,
}

impl Extent {
    /// Bytes of which nothing is known.
    #[must_use]
    pub fn data(len_bytes: u64) -> Self {
        Self { len_bytes, hole: false, zero: false }
    }
}

/// A block device of fixed size, addressed in bytes.
pub trait Disk: Send {
    /// The size, constant for the disk's life.
    fn size_bytes(&self) -> u64;
    /// Fills `into` from `offset`.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError>;
    /// As [`Self::read`], unless it would have to wait for a medium: then false, and what is in `into` is anything.
    fn read_now(&mut self, offset: u64, into: &mut [u8]) -> Result<bool, DiskError> {
        self.read(offset, into).map(|()| true)
    }
    /// Writes `bytes` at `offset`.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;
    /// The file in which these bytes lie, and where: whoever wants many of them may take them there.
    fn lies_in(&self, offset: u64, len_bytes: u64) -> Option<(BorrowedFd<'_>, u64)> {
        let _ = (offset, len_bytes);
        None
    }
    /// Whether [`Self::write_block`] may spare a copy.
    fn keeps_blocks(&self) -> bool {
        false
    }
    /// Writes a block at `offset`. A disk that keeps it takes it when nothing can fail any more, and leaves an empty one.
    fn write_block(&mut self, offset: u64, block: &mut Block) -> Result<(), DiskError> {
        self.write(offset, block)
    }
    /// Whether a write waits for nothing but memory now, as far as one can know.
    fn writes_in_memory(&self) -> bool {
        false
    }
    /// Makes every completed write durable.
    fn flush(&mut self) -> Result<(), DiskError>;

    /// Another way to the same disk, to be written or flushed by somebody else while this one is used: a flush of either covers
    /// what was written by then, through whichever. `None` of a disk that has none.
    fn lend(&self) -> Option<Box<dyn Disk>> {
        None
    }

    /// Forgets what memory remembers of the medium: reads are of what it holds from now on, not of what an earlier process
    /// wrote and failed to flush. What is yet to be written stays.
    fn reread(&mut self) -> Result<(), DiskError> {
        Ok(())
    }

    /// Makes `len_bytes` bytes from `offset` zeroes. Unless the disk knows better, it writes them.
    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        check_range(self.size_bytes(), offset, len_bytes)?;
        if how.fast_only {
            return Err(DiskError::NotSupported);
        }
        write_by_hand(self, offset, len_bytes)
    }

    /// The bytes are not needed any more: they may become zeroes, and their space may be freed. Unless the disk knows
    /// better, nothing happens.
    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        check_range(self.size_bytes(), offset, len_bytes)
    }

    /// What the bytes from `offset` on are, in order: runs that begin there and cover at least one byte and at most
    /// `len_bytes`; at most `max` of them.
    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        check_range(self.size_bytes(), offset, len_bytes)?;
        let _ = max;
        Ok(vec![Extent::data(len_bytes)])
    }

    /// How many of the `len_bytes` bytes from `offset` on are known to be a hole that reads as zeroes, at the least: a
    /// question that costs next to nothing.
    fn leading_hole_bytes(&mut self, offset: u64, len_bytes: u64) -> u64 {
        let _ = (offset, len_bytes);
        0
    }

    /// Which bytes differ from the last checkpoint, like [`Self::extents`]: runs of (length, differs). `None` for a
    /// disk that has no checkpoints.
    fn changed(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Option<Vec<(u64, bool)>>, DiskError> {
        let _ = (offset, len_bytes, max);
        Ok(None)
    }
}

/// Checks that a request lies inside a disk; call it before touching anything.
pub fn check_range(size_bytes: u64, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
    match offset.checked_add(len_bytes) {
        Some(end) if end <= size_bytes => Ok(()),
        _ => Err(DiskError::OutOfRange { offset, len_bytes, size_bytes }),
    }
}

/// Writes zeroes as any bytes. The range lies inside the disk.
fn write_by_hand<D: Disk + ?Sized>(disk: &mut D, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
    static ZEROES: [u8; 256 << 10] = [0; 256 << 10];
    let end = offset + len_bytes;
    (offset..end).step_by(ZEROES.len()).try_for_each(|at| {
        let len = (end - at).min(ZEROES.len() as u64) as usize;
        disk.write(at, &ZEROES[..len])
    })
}

/// A disk in memory.
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    bytes: Vec<u8>,
}

impl MemoryDisk {
    /// A disk of zeroes.
    #[must_use]
    pub fn new(size_bytes: usize) -> Self {
        Self { bytes: vec![0; size_bytes] }
    }

    /// The whole contents.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Disk for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        check_range(self.size_bytes(), offset, into.len() as u64)?;
        let at = offset as usize;
        into.copy_from_slice(&self.bytes[at..at + into.len()]);
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        check_range(self.size_bytes(), offset, bytes.len() as u64)?;
        let at = offset as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// A disk in a file or on a block device. A clone is the same open image, and costs no descriptor.
#[derive(Clone, Debug)]
pub struct FileDisk {
    file: Arc<File>,
    path: PathBuf,
    size_bytes: u64,
    /// What of that is behind the end that the image had.
    padding_bytes: u64,
    /// A flush has failed, through any handle: nothing is written any more.
    flush_failed: Arc<AtomicBool>,
    /// The file system can tell what would have to be waited for, as far as is known.
    tells_waits: bool,
}

impl FileDisk {
    /// Opens an existing image; its length is the disk's size.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        Self::open_with(path, OpenOptions::new().read(true).write(true))
    }

    /// Opens an image, or makes a sparse one of `size_bytes` when there is none.
    pub fn open_or_create(path: &Path, size_bytes: u64) -> Result<Self, DiskError> {
        let what = || format!("create disk image {}", path.display());
        match OpenOptions::new().read(true).write(true).create_new(true).open(path) {
            Ok(file) => {
                file.set_len(size_bytes).map_err(|e| DiskError::io(what(), e))?;
                Ok(Self::over(file, path, size_bytes))
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Self::open(path),
            Err(e) => Err(DiskError::io(what(), e)),
        }
    }
}

impl FileDisk {
    /// Opens an image that will not be written.
    pub fn open_read_only(path: &Path) -> Result<Self, DiskError> {
        Self::open_with(path, OpenOptions::new().read(true))
    }

    fn open_with(path: &Path, options: &OpenOptions) -> Result<Self, DiskError> {
        let what = || format!("open disk image {}", path.display());
        let file = options.open(path).map_err(|e| DiskError::io(what(), e))?;
        // Seeking to the end gives the size of a block device too, where the metadata says 0.
        let size_bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(|e| DiskError::io(what(), e))?;
        Ok(Self::over(file, path, size_bytes))
    }

    fn over(file: File, path: &Path, size_bytes: u64) -> Self {
        let (file, path, flush_failed) = (Arc::new(file), path.to_owned(), Arc::default());
        Self { file, path, size_bytes, padding_bytes: 0, flush_failed, tells_waits: true }
    }

    /// Locks the image against other processes that do so too: many may read, or one may write. False when another has
    /// it. The lock goes with the last handle.
    pub fn try_lock(&self, shared: bool) -> Result<bool, DiskError> {
        let locked = if shared { self.file.try_lock_shared() } else { self.file.try_lock() };
        match locked {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(self.failed("lock")(error)),
        }
    }

    /// Locks the image for this process to write: two that did would each undo what the other wrote.
    pub fn lock_alone(&self) -> Result<(), DiskError> {
        match self.try_lock(false)? {
            true => Ok(()),
            false => Err(DiskError::InUse { what: self.path.display().to_string() }),
        }
    }

    /// Gives the lock up, whatever handles are left.
    pub fn unlock(&self) -> Result<(), DiskError> {
        self.file.unlock().map_err(self.failed("unlock"))
    }

    /// With an image of no whole number of sectors: the last one is whole, as QEMU has it. What the image lacks of it is zero,
    /// and the image grows when it is written.
    #[must_use]
    pub fn padded(mut self) -> Self {
        let whole_bytes = self.size_bytes.next_multiple_of(SECTOR_BYTES);
        (self.padding_bytes, self.size_bytes) = (whole_bytes - self.size_bytes, whole_bytes);
        self
    }

    /// A read that met the end of the file.
    fn read_padding(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let there = (self.size_bytes - self.padding_bytes).saturating_sub(offset).min(into.len() as u64) as usize;
        let (image, padding) = into.split_at_mut(there);
        self.file.read_exact_at(image, offset)?;
        // A part of it may have been written.
        let written = self.file.read_at(padding, offset + there as u64)?;
        padding[written..].fill(0);
        Ok(())
    }

    /// Whether what is written can still become durable.
    fn check_flushes(&self) -> Result<(), DiskError> {
        match self.flush_failed.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(DiskError::FlushFailed { what: self.path.display().to_string() }),
        }
    }

    fn failed(&self, doing: &'static str) -> impl Fn(io::Error) -> DiskError {
        move |error| DiskError::io(format!("{doing} {}", self.path.display()), error)
    }

    /// Whether the file system did it; where it cannot, nothing has happened.
    fn allocate(&self, flags: FallocateFlags, offset: u64, len_bytes: u64) -> Result<bool, DiskError> {
        match fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, len_bytes) {
            Ok(()) => Ok(true),
            // A device wants whole blocks of its own (EINVAL); the range itself was checked.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => Ok(false),
            Err(error) => Err(self.failed("zero")(error.into())),
        }
    }
}

impl AsFd for FileDisk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Disk for FileDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, into.len() as u64)?;
        let read = match self.file.read_exact_at(into, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.read_padding(offset, into),
            read => read,
        };
        read.map_err(self.failed("read"))
    }

    fn read_now(&mut self, offset: u64, into: &mut [u8]) -> Result<bool, DiskError> {
        check_range(self.size_bytes, offset, into.len() as u64)?;
        if !self.tells_waits {
            return self.read(offset, into).map(|()| true);
        }
        match preadv2(&self.file, &mut [io::IoSliceMut::new(into)], offset, ReadWriteFlags::NOWAIT) {
            Ok(bytes) => Ok(bytes == into.len()),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            // Not known here, as where a file is nothing but memory; or an error: whoever waits is told.
            Err(error) => {
                self.tells_waits = error != Errno::OPNOTSUPP;
                self.read(offset, into).map(|()| true)
            }
        }
    }

    fn lies_in(&self, offset: u64, len_bytes: u64) -> Option<(BorrowedFd<'_>, u64)> {
        check_range(self.size_bytes, offset, len_bytes).is_ok().then_some((self.file.as_fd(), offset))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, bytes.len() as u64)?;
        self.check_flushes()?;
        self.file.write_all_at(bytes, offset).map_err(self.failed("write"))
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.check_flushes()?;
        self.file.sync_data().map_err(|error| {
            self.flush_failed.store(true, Ordering::Relaxed);
            self.failed("flush")(error)
        })
    }

    fn lend(&self) -> Option<Box<dyn Disk>> {
        Some(Box::new(self.clone()))
    }

    /// The page cache keeps what it could not write, as clean as the rest: it is dropped with that.
    fn reread(&mut self) -> Result<(), DiskError> {
        fadvise(&self.file, 0, None, Advice::DontNeed).map_err(|errno| self.failed("reread")(errno.into()))
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, len_bytes)?;
        self.check_flushes()?;
        if len_bytes == 0 {
            return Ok(());
        }
        let flags = if how.keep_allocated { FallocateFlags::ZERO_RANGE } else { FallocateFlags::PUNCH_HOLE };
        if self.allocate(flags, offset, len_bytes)? {
            return Ok(());
        }
        if how.fast_only {
            return Err(DiskError::NotSupported);
        }
        write_by_hand(self, offset, len_bytes)
    }

    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, len_bytes)?;
        self.check_flushes()?;
        // A file system that cannot keeps the space: trimming is a hint.
        if len_bytes > 0 {
            self.allocate(FallocateFlags::PUNCH_HOLE, offset, len_bytes)?;
        }
        Ok(())
    }

    /// Where the hole ends, and not where the data does: to find that, tmpfs looks at every page up to there.
    fn leading_hole_bytes(&mut self, offset: u64, len_bytes: u64) -> u64 {
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data_at) => data_at.saturating_sub(offset).min(len_bytes),
            Err(Errno::NXIO) => len_bytes,
            Err(_) => 0,
        }
    }

    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        check_range(self.size_bytes, offset, len_bytes)?;
        let (end, mut at, mut found) = (offset + len_bytes, offset, Vec::new());
        while at < end && found.len() < max {
            let data_at = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data_at) => data_at.min(end),
                // Nothing but a hole up to the end of the file.
                Err(Errno::NXIO) => end,
                // A device has no holes to tell of.
                Err(_) => {
                    found.push(Extent::data(end - at));
                    break;
                }
            };
            if data_at > at {
                found.push(Extent { len_bytes: data_at - at, hole: true, zero: true });
                at = data_at;
                continue;
            }
            let hole_at = seek(&self.file, SeekFrom::Hole(at)).map_or(end, |hole_at| hole_at.min(end));
            // A file that another process punches meanwhile must not make this stand still.
            let hole_at = if hole_at > at { hole_at } else { end };
            found.push(Extent::data(hole_at - at));
            at = hole_at;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exercise(disk: &mut dyn Disk) {
        assert_eq!(disk.size_bytes(), 8192);
        disk.write(4000, &[7; 200]).unwrap();
        disk.flush().unwrap();
        let mut back = [0; 202];
        disk.read(3999, &mut back).unwrap();
        assert_eq!((back[0], back[1], back[200], back[201]), (0, 7, 7, 0));
        for (offset, len) in [(8192, 1), (8191, 2), (u64::MAX, 1), (u64::MAX - 1, 4)] {
            let refused = disk.write(offset, &vec![1; len]).unwrap_err();
            assert!(matches!(refused, DiskError::OutOfRange { .. }), "{refused}");
            assert!(disk.read(offset, &mut vec![0; len]).is_err());
        }
        disk.write(8192, &[]).unwrap();
        disk.write(0, &[9; 8192]).unwrap();
        let how = Zeroing { keep_allocated: true, fast_only: false };
        disk.write_zeroes(100, 5000, how).unwrap();
        let mut whole = [1; 8192];
        disk.read(0, &mut whole).unwrap();
        assert!(whole[..100].iter().chain(&whole[5100..]).all(|byte| *byte == 9));
        assert!(whole[100..5100].iter().all(|byte| *byte == 0));
        disk.trim(0, 4096).unwrap();
        let refused = [disk.write_zeroes(8000, 193, how), disk.trim(8192, 1), disk.trim(u64::MAX, 2)];
        assert!(refused.iter().all(|refused| matches!(refused, Err(DiskError::OutOfRange { .. }))));
        let extents = disk.extents(5000, 3192, 8).unwrap();
        assert_eq!(extents.iter().map(|extent| extent.len_bytes).sum::<u64>(), 3192);
        assert!(disk.extents(8191, 2, 8).is_err());
        disk.write(4000, &[7; 200]).unwrap();
    }

    #[test]
    fn after_a_failed_flush_nothing_is_written_through_any_handle() {
        // A device that takes everything and cannot be flushed.
        let mut disk = FileDisk::open(Path::new("/dev/null")).unwrap();
        let mut other = disk.clone();
        other.write(0, &[]).unwrap();
        assert!(matches!(disk.flush(), Err(DiskError::Io { .. })));
        let how = Zeroing::default();
        let refused =
            [other.write(0, &[]), other.flush(), other.write_zeroes(0, 0, how), other.trim(0, 0), disk.flush()];
        assert!(refused.iter().all(|refused| matches!(refused, Err(DiskError::FlushFailed { .. }))), "{refused:?}");
        other.read(0, &mut []).unwrap();
    }

    #[test]
    fn a_file_tells_its_holes_and_makes_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = FileDisk::open_or_create(&dir.path().join("disk.img"), 1 << 20).unwrap();
        let hole = |len_bytes| Extent { len_bytes, hole: true, zero: true };
        assert_eq!(disk.extents(0, 1 << 20, 9).unwrap(), [hole(1 << 20)]);
        disk.write(64 << 10, &[1; 128 << 10]).unwrap();
        let all = [hole(64 << 10), Extent::data(128 << 10), hole(832 << 10)];
        assert_eq!(disk.extents(0, 1 << 20, 9).unwrap(), all);
        assert_eq!(disk.extents(0, 1 << 20, 2).unwrap(), all[..2]);
        let leading = [(0, 1), (0, 1 << 20), (64 << 10, 1 << 20), (200 << 10, 1 << 20)];
        let leading = leading.map(|(offset, len_bytes)| disk.leading_hole_bytes(offset, len_bytes));
        assert_eq!(leading, [1, 64 << 10, 0, 1 << 20]);
        assert_eq!(disk.extents(100 << 10, 8 << 10, 9).unwrap(), [Extent::data(8 << 10)]);
        disk.write_zeroes(96 << 10, 32 << 10, Zeroing { keep_allocated: false, fast_only: true }).unwrap();
        let kinds: Vec<_> = disk.extents(64 << 10, 128 << 10, 9).unwrap();
        assert_eq!(kinds, [Extent::data(32 << 10), hole(32 << 10), Extent::data(64 << 10)]);
        disk.trim(0, 1 << 20).unwrap();
        assert_eq!(disk.extents(0, 1 << 20, 9).unwrap(), [hole(1 << 20)]);
        let mut byte = [1];
        disk.read(70 << 10, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        assert!(FileDisk::open_read_only(&dir.path().join("disk.img")).unwrap().write(0, &[1]).is_err());
    }

    #[test]
    fn memory_and_file_disks_behave_alike() {
        exercise(&mut MemoryDisk::new(8192));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        exercise(&mut FileDisk::open_or_create(&path, 8192).unwrap());
        let mut again = FileDisk::open_or_create(&path, 1).unwrap();
        assert_eq!(again.size_bytes(), 8192, "an existing image keeps its size");
        again.reread().unwrap();
        let mut byte = [0];
        again.read(4000, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }
}
