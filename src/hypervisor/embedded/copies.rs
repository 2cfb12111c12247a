//! The embedded guest's several disks: it writes each thing on all of them, as a software mirror does.
//!
//! ```text
//!  write ─▶ disk n ─▶ ... ─▶ disk 1 ─▶ disk 0        read ◀─ the last one
//! ```
//!
//! So whatever is said of one disk's contents must hold of each, after a takeover too: a replica that takes a checkpoint
//! of one disk and not of another is found out by whoever compares them, or reads.
//!
//! The trap is a disk that is busy: what was written to others before it stays written, and comes again with the same
//! request. It lies beyond the end of the log, where nothing is promised.

use crate::disk::{Disk, DiskError};

/// Disks that hold the same.
pub struct Copies(Vec<Box<dyn Disk>>);

impl Copies {
    /// One disk of these; a single one is what it is.
    #[must_use]
    pub fn of(disks: Vec<Box<dyn Disk>>) -> Self {
        Self(disks)
    }
}

impl Disk for Copies {
    /// The smallest one's.
    fn size_bytes(&self) -> u64 {
        self.0.iter().map(|disk| disk.size_bytes()).min().unwrap_or(0)
    }

    /// From the last: nobody else reads it.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        crate::disk::check_range(self.size_bytes(), offset, into.len() as u64)?;
        self.0.last_mut().map_or(Ok(()), |disk| disk.read(offset, into))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        crate::disk::check_range(self.size_bytes(), offset, bytes.len() as u64)?;
        self.0.iter_mut().rev().try_for_each(|disk| disk.write(offset, bytes))
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.0.iter_mut().try_for_each(|disk| disk.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;
    use std::sync::{Arc, Mutex};

    /// A disk the test looks at, busy as often as it says.
    #[derive(Clone)]
    struct Seen(Arc<Mutex<(MemoryDisk, u32)>>);

    impl Disk for Seen {
        fn size_bytes(&self) -> u64 {
            self.0.lock().unwrap().0.size_bytes()
        }
        fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
            self.0.lock().unwrap().0.read(offset, into)
        }
        fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
            let (disk, busy) = &mut *self.0.lock().unwrap();
            if *busy > 0 {
                *busy -= 1;
                return Err(DiskError::Busy);
            }
            disk.write(offset, bytes)
        }
        fn flush(&mut self) -> Result<(), DiskError> {
            Ok(())
        }
    }

    #[test]
    fn what_is_written_is_on_every_disk_or_comes_again() {
        let disk = |size, busy| Seen(Arc::new(Mutex::new((MemoryDisk::new(size), busy))));
        let (first, second) = (disk(16, 1), disk(8, 0));
        let mut copies = Copies::of(vec![Box::new(first.clone()), Box::new(second.clone())]);
        assert_eq!(copies.size_bytes(), 8);
        assert!(matches!(copies.write(0, b"ab"), Err(DiskError::Busy)));
        copies.write(0, b"ab").unwrap();
        copies.flush().unwrap();
        let mut back = [0; 2];
        copies.read(0, &mut back).unwrap();
        assert_eq!(&back, b"ab");
        for disk in [&first, &second] {
            assert_eq!(disk.0.lock().unwrap().0.bytes()[..2], *b"ab");
        }
        assert!(copies.write(7, b"ab").is_err() && copies.read(8, &mut back).is_err(), "beyond the smaller one");
    }
}
