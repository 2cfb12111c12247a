//! A disk, as the guest and the replica see one: `read`, `write`, `flush`, a size that never changes.
//!
//! Two are here, siblings and both for use: [`MemoryDisk`] and [`FileDisk`]. `flush` reaches the medium
//! (`fdatasync`), because an NBD FLUSH that only reaches the page cache is how acknowledged writes get lost.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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

/// A block device of fixed size, addressed in bytes.
pub trait Disk: Send {
    /// The size, constant for the disk's life.
    fn size_bytes(&self) -> u64;
    /// Fills `into` from `offset`.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError>;
    /// Writes `bytes` at `offset`.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;
    /// Makes every completed write durable.
    fn flush(&mut self) -> Result<(), DiskError>;
}

/// Checks that a request lies inside a disk; call it before touching anything.
pub fn check_range(size_bytes: u64, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
    match offset.checked_add(len_bytes) {
        Some(end) if end <= size_bytes => Ok(()),
        _ => Err(DiskError::OutOfRange { offset, len_bytes, size_bytes }),
    }
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

/// A disk in a file or on a block device.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    path: PathBuf,
    size_bytes: u64,
}

impl FileDisk {
    /// Opens an existing image; its length is the disk's size.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let what = || format!("open disk image {}", path.display());
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| DiskError::io(what(), e))?;
        // Seeking to the end gives the size of a block device too, where the metadata says 0.
        let size_bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(|e| DiskError::io(what(), e))?;
        Ok(Self { file, path: path.to_owned(), size_bytes })
    }

    /// Opens an image, or makes a sparse one of `size_bytes` when there is none.
    pub fn open_or_create(path: &Path, size_bytes: u64) -> Result<Self, DiskError> {
        let what = || format!("create disk image {}", path.display());
        match OpenOptions::new().read(true).write(true).create_new(true).open(path) {
            Ok(file) => {
                file.set_len(size_bytes).map_err(|e| DiskError::io(what(), e))?;
                Ok(Self { file, path: path.to_owned(), size_bytes })
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Self::open(path),
            Err(e) => Err(DiskError::io(what(), e)),
        }
    }
}

impl Disk for FileDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, into.len() as u64)?;
        self.file.read_exact_at(into, offset).map_err(|e| DiskError::io(format!("read {}", self.path.display()), e))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset).map_err(|e| DiskError::io(format!("write {}", self.path.display()), e))
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(|e| DiskError::io(format!("flush {}", self.path.display()), e))
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
    }

    #[test]
    fn memory_and_file_disks_behave_alike() {
        exercise(&mut MemoryDisk::new(8192));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        exercise(&mut FileDisk::open_or_create(&path, 8192).unwrap());
        let mut again = FileDisk::open_or_create(&path, 1).unwrap();
        assert_eq!(again.size_bytes(), 8192, "an existing image keeps its size");
        let mut byte = [0];
        again.read(4000, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }
}
