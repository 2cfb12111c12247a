//! The part of an image that `xl-colo nbd` serves, in the way that was asked for.
//!
//! The trap: an image whose format nobody has named. What is in it may mean another disk, and its guest can make it so: who
//! opens it next, and looks as well, would be told by a guest what to open. Source: qemu `block/raw-format.c`.

use super::export::{Cache, ExportError};
use crate::daemon::links::lock;
use crate::disk::{Disk, DiskError, Extent, FileDisk, SECTOR_BYTES, Zeroing, check_range};
use crate::say;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What images of other formats have near their beginning, where, and the formats' names.
const MAGICS: [(usize, &[u8], &str); 12] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
];
/// As many bytes as are looked at.
const HEAD_BYTES: usize = SECTOR_BYTES as usize;

fn format(head: &[u8; HEAD_BYTES]) -> Option<&'static str> {
    let found = MAGICS.iter().find(|(at, magic, _)| head[*at..].starts_with(magic)).map(|(.., format)| *format);
    // A text may be one too, and name any file of this host: comments and blank lines, and then its version.
    let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    found.or(first.filter(|line| line.starts_with(b"version=")).map(|_| "vmdk"))
}

/// Refuses an image whose bytes mean another disk, where nobody said that they are the disk.
pub(super) fn probe(disk: &FileDisk, image: &Path) -> Result<(), ExportError> {
    let mut head = [0; HEAD_BYTES];
    let len = head.len().min(usize::try_from(disk.size_bytes()).unwrap_or(usize::MAX));
    disk.clone().read(0, &mut head[..len])?;
    if let Some(format) = format(&head) {
        return Err(ExportError::Format { image: image.to_owned(), format });
    }
    Ok(())
}

/// Data begins and ends with a sector, where clients know of nothing smaller.
fn whole_sectors(at: u64, extents: &mut Vec<Extent>) {
    let mut end = at;
    for index in 0..extents.len().saturating_sub(1) {
        end += extents[index].len_bytes;
        let (more, less) = (end.next_multiple_of(SECTOR_BYTES) - end, end % SECTOR_BYTES);
        // A part of a sector is what the data in it is.
        let (gains, loses) = if extents[index].zero { (index + 1, index) } else { (index, index + 1) };
        let moved_bytes = if gains == index { more } else { less }.min(extents[loses].len_bytes);
        extents[gains].len_bytes += moved_bytes;
        extents[loses].len_bytes -= moved_bytes;
        end = if gains == index { end + moved_bytes } else { end - moved_bytes };
    }
    extents.retain(|extent| extent.len_bytes > 0);
}

/// What is said where nobody said that an image is raw; QEMU's words, which scripts look for.
pub(super) fn warn_of_guess(image: &Path) {
    if say::is_json() {
        return;
    }
    say::err(&format_args!(
        "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
         restricted.\n         Specify the 'raw' format explicitly to remove the restrictions.",
        image.display()
    ));
}

/// The part of an image that is served, in the way that was asked for.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) disk: FileDisk,
    pub(super) offset_bytes: u64,
    pub(super) size_bytes: u64,
    pub(super) cache: Cache,
    pub(super) discard: bool,
    pub(super) detect_zeroes: bool,
    pub(super) unmap_zeroes: bool,
    /// Nobody said that it is raw: who opens it next may look as well, and be told by a guest what to open.
    pub(super) stays_raw: bool,
    /// Who writes what is looked at.
    pub(super) head: Arc<Mutex<()>>,
}

impl Served {
    /// Writes, unless that would make the image begin as one of another format. One at a time there: pieces that are none
    /// might be one together.
    fn write_head(
        &mut self,
        at: u64,
        bytes: &[u8],
        write: impl FnOnce(&mut FileDisk) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        if !self.stays_raw || at >= HEAD_BYTES as u64 {
            return write(&mut self.disk);
        }
        let head = self.head.clone();
        let _alone = lock(&head);
        self.check_head(at, bytes)?;
        write(&mut self.disk)
    }

    fn check_head(&mut self, at: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut head = [0; HEAD_BYTES];
        let len = head.len().min(usize::try_from(self.disk.size_bytes()).unwrap_or(usize::MAX));
        let kept = len.min(usize::try_from(at).unwrap_or(usize::MAX));
        self.disk.read(0, &mut head[..len])?;
        head[kept..len].iter_mut().zip(bytes).for_each(|(byte, new)| *byte = *new);
        match format(&head) {
            None => Ok(()),
            Some(format) => Err(DiskError::io(
                format!("write what an image of format {format} begins with, where raw was guessed"),
                io::ErrorKind::PermissionDenied.into(),
            )),
        }
    }

    /// The place in the image, of a range that lies in the export.
    fn at(&self, offset: u64, len_bytes: u64) -> Result<u64, DiskError> {
        check_range(self.size_bytes, offset, len_bytes).map(|()| self.offset_bytes + offset)
    }

    fn written(&mut self) -> Result<(), DiskError> {
        if self.cache == Cache::WriteThrough { self.disk.flush() } else { Ok(()) }
    }
}

impl Disk for Served {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let at = self.at(offset, into.len() as u64)?;
        self.disk.read(at, into)
    }

    fn read_now(&mut self, offset: u64, into: &mut [u8]) -> Result<bool, DiskError> {
        let at = self.at(offset, into.len() as u64)?;
        self.disk.read_now(at, into)
    }

    fn lies_in(&self, offset: u64, len_bytes: u64) -> Option<(BorrowedFd<'_>, u64)> {
        self.disk.lies_in(self.at(offset, len_bytes).ok()?, len_bytes)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let at = self.at(offset, bytes.len() as u64)?;
        if self.detect_zeroes && bytes.iter().all(|byte| *byte == 0) {
            let how = Zeroing { keep_allocated: !self.unmap_zeroes, fast_only: false };
            self.write_head(at, bytes, |disk| disk.write_zeroes(at, bytes.len() as u64, how))?;
        } else {
            self.write_head(at, bytes, |disk| disk.write(at, bytes))?;
        }
        self.written()
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        if self.cache == Cache::Unsafe { Ok(()) } else { self.disk.flush() }
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        let at = self.at(offset, len_bytes)?;
        // Space is freed only where discarding frees it: QEMU's BDRV_O_UNMAP.
        let how = Zeroing { keep_allocated: how.keep_allocated || !self.discard, ..how };
        let zeroes = &[0; HEAD_BYTES][..HEAD_BYTES.min(len_bytes as usize)];
        self.write_head(at, zeroes, |disk| disk.write_zeroes(at, len_bytes, how))?;
        self.written()
    }

    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        let at = self.at(offset, len_bytes)?;
        if !self.discard {
            return Ok(());
        }
        let zeroes = &[0; HEAD_BYTES][..HEAD_BYTES.min(len_bytes as usize)];
        self.write_head(at, zeroes, |disk| disk.trim(at, len_bytes))
    }

    fn leading_hole_bytes(&mut self, offset: u64, len_bytes: u64) -> u64 {
        self.at(offset, len_bytes).map_or(0, |at| self.disk.leading_hole_bytes(at, len_bytes))
    }

    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        let at = self.at(offset, len_bytes)?;
        if !self.stays_raw {
            return self.disk.extents(at, len_bytes, max);
        }
        // The last one's end depends on what follows it.
        let mut extents = self.disk.extents(at, len_bytes, max.saturating_add(1))?;
        whole_sectors(at, &mut extents);
        extents.truncate(max);
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Advice, fadvise};

    #[test]
    fn images_of_other_formats_are_known_by_their_first_sector() {
        let head = |at: usize, bytes: &[u8]| {
            let mut head = [0; HEAD_BYTES];
            head[at..at + bytes.len()].copy_from_slice(bytes);
            format(&head)
        };
        for (at, magic, name) in MAGICS {
            assert_eq!((head(at, magic), head(at + 1, magic)), (Some(name), None));
        }
        for text in
            [&b"# Disk DescriptorFile\nversion=1\n"[..], b"version=1\r\n", b"#\n \n#x\nversion=3\nRW 1 FLAT \"x\" 0"]
        {
            assert_eq!(head(0, text), Some("vmdk"), "{text:?}");
        }
        assert_eq!((head(0, b"a\nversion=1\n"), head(0, b"# version=1\n"), head(0, b"")), (None, None, None));
    }

    #[test]
    fn a_part_of_a_sector_is_what_the_data_in_it_is() {
        let (data, hole) = (Extent::data, |len_bytes| Extent { len_bytes, hole: true, zero: true });
        for (at, told, whole) in [
            (0, vec![data(1000), hole(24)], vec![data(1024)]),
            (0, vec![data(1000), hole(1048)], vec![data(1024), hole(1024)]),
            (512, vec![hole(700), data(836)], vec![hole(512), data(1024)]),
            (0, vec![data(512), hole(512)], vec![data(512), hole(512)]),
            (0, vec![hole(100), data(924)], vec![data(1024)]),
            (1024, vec![], vec![]),
        ] {
            let mut extents = told.clone();
            whole_sectors(at, &mut extents);
            assert_eq!(extents, whole, "{told:?} at {at}");
        }
    }

    #[test]
    fn an_export_says_what_would_wait_as_its_image_does() {
        const MIB: usize = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, vec![7; 16 * MIB]).unwrap();
        let file = std::fs::File::open(&image).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let mut disk = FileDisk::open(&image).unwrap();
        let mut into = [0; 4096];
        if disk.read_now(8 * MIB as u64, &mut into).unwrap() {
            eprintln!("SKIP: this file system does not tell what would wait");
            return;
        }
        let (offset_bytes, size_bytes, cache) = (MIB as u64, 15 * MIB as u64, Cache::WriteBack);
        let (discard, detect_zeroes, unmap_zeroes) = (false, false, false);
        let (stays_raw, head) = (false, Arc::default());
        let mut served =
            Served { disk, offset_bytes, size_bytes, cache, discard, detect_zeroes, unmap_zeroes, stays_raw, head };
        assert!(!served.read_now(12 * MIB as u64, &mut into).unwrap());
        served.read(12 * MIB as u64, &mut into).unwrap();
        assert!(served.read_now(12 * MIB as u64, &mut into).unwrap() && into == [7; 4096]);
        assert!(served.read_now(size_bytes, &mut into).is_err(), "behind the export's end");
    }
}
