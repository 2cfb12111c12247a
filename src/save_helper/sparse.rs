//! An image file without the zeroes of the guest's memory.
//!
//! ```text
//! bytes ─┬─ two or more pages of zeroes in a row ─▶ the file's position moves on: a hole, which reads as zeroes
//!        └─ anything else ────────────────────────▶ written
//! ```
//!
//! Most of a guest's memory may be zero, and the stream has no word for that which every receiver can be sure of
//! ([`crate::image`]). But a file has: the image is the same, byte for byte, and takes neither time nor room.
//!
//! The traps: a hole reads as zeroes only where nothing was before, so only at the file's end; it is one only if
//! something follows, which END does; and a descriptor in append mode writes at the end wherever its position is.
//! libxl writes through the same open file, whose position both share.

use crate::page::{PAGE_SIZE, is_zero};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use std::fs::File;
use std::io::{self, IoSlice, Seek, SeekFrom, Write};

/// Pages of zeroes in a row that are worth a hole: pages lie unaligned in the file, and half a block is none.
const HOLE_PAGES: usize = 2;

/// Writes to a file, and leaves holes if it can have any.
#[derive(Debug)]
pub struct Sparse {
    file: File,
    holes: bool,
}

impl Sparse {
    /// Takes the descriptor as it is: a pipe, a device or a file that is being overwritten gets every byte.
    #[must_use]
    pub fn new(mut file: File) -> Self {
        let holes = can_have_holes(&mut file).unwrap_or(false);
        Self { file, holes }
    }
}

fn can_have_holes(file: &mut File) -> io::Result<bool> {
    let stat = fstat(&*file)?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    Ok(is_file && !fcntl_getfl(&*file)?.contains(OFlags::APPEND) && file.stream_position()? == stat.st_size as u64)
}

/// How many bytes from the beginning are pages of zeroes.
fn zeroes(bytes: &[u8]) -> usize {
    bytes.chunks_exact(PAGE_SIZE).take_while(|page| is_zero(page)).count() * PAGE_SIZE
}

impl Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.holes || bytes.len() < HOLE_PAGES * PAGE_SIZE {
            return self.file.write(bytes);
        }
        let hole = zeroes(bytes);
        if hole >= HOLE_PAGES * PAGE_SIZE {
            self.file.seek(SeekFrom::Current(hole as i64))?;
            return Ok(hole);
        }
        let mut end = hole;
        while end < bytes.len() && zeroes(bytes.get(end..end + HOLE_PAGES * PAGE_SIZE).unwrap_or_default()) == 0 {
            end = bytes.len().min(end + PAGE_SIZE);
        }
        self.file.write(&bytes[..end])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if !self.holes {
            return self.file.write_vectored(slices);
        }
        slices.iter().find(|slice| !slice.is_empty()).map_or(Ok(0), |slice| self.write(slice))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn pages(fills: &[u8]) -> Vec<u8> {
        fills.iter().flat_map(|fill| [*fill; PAGE_SIZE]).collect()
    }

    #[test]
    fn zeroes_take_no_room_and_are_read_back() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"head").unwrap();
        let image = [&pages(&[0; 512])[..], &pages(&[1, 0, 2, 0, 0, 3, 0]), b"END"].concat();
        let mut sparse = Sparse::new(file.try_clone().unwrap());
        assert!(sparse.holes);
        sparse.write_all(&image).unwrap();
        let mut read = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        io::Read::read_to_end(&mut file, &mut read).unwrap();
        assert!(read == [b"head", &image[..]].concat());
        assert!(file.metadata().unwrap().blocks() * 512 < 64 * 1024, "{} blocks", file.metadata().unwrap().blocks());
    }

    #[test]
    fn what_was_there_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old");
        std::fs::write(&path, vec![9; 8 * PAGE_SIZE]).unwrap();
        let mut over = Sparse::new(File::options().write(true).open(&path).unwrap());
        assert!(!over.holes);
        over.write_all(&pages(&[0, 0, 0])).unwrap();
        assert!(std::fs::read(&path).unwrap()[..3 * PAGE_SIZE].iter().all(|byte| *byte == 0));
        let appended = Sparse::new(File::options().append(true).open(&path).unwrap());
        assert!(!appended.holes);
        let (_reader, writer) = io::pipe().unwrap();
        assert!(!Sparse::new(File::from(std::os::fd::OwnedFd::from(writer))).holes);
    }

    proptest! {
        #[test]
        fn the_bytes_are_the_same(parts in prop::collection::vec((0_u8..2, 1_usize..4, 0_usize..9), 0..12)) {
            let mut file = tempfile::tempfile().unwrap();
            let mut sparse = Sparse::new(file.try_clone().unwrap());
            let mut expected = Vec::new();
            for (fill, count, odd) in parts {
                let bytes = [vec![fill; count * PAGE_SIZE], vec![0; odd]].concat();
                sparse.write_all(&bytes).unwrap();
                expected.extend(bytes);
            }
            sparse.write_all(b"END").unwrap();
            expected.extend(b"END");
            let mut read = Vec::new();
            file.seek(SeekFrom::Start(0)).unwrap();
            io::Read::read_to_end(&mut file, &mut read).unwrap();
            prop_assert!(read == expected);
        }
    }
}
