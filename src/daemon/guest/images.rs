//! A guest's images, each opened once and by one process.
//!
//! ```text
//!   those that are there: opened ─▶ all different? ─▶ locked ─▶ their records read ─▶ the others made, and locked
//! ```
//!
//! The lock comes before the records: whoever has an image may be about to change what they say. The trap: flock(2) locks
//! the open file, so that two handles of one process exclude each other too, and two names of one image must be told before.

use super::GuestError;
use crate::disk::{DiskError, FileDisk};
use rustix::fs::FileType;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Images that nobody else writes until this is dropped, whoever still has a handle on one.
pub(in crate::daemon) struct Alone(Vec<FileDisk>);

impl Drop for Alone {
    fn drop(&mut self) {
        for disk in &self.0 {
            if let Err(error) = disk.unlock() {
                tracing::warn!(%error, "the image stays locked until this process ends");
            }
        }
    }
}

/// Opens and locks the images that are there; `None` for each that is not.
pub(super) fn open(images: &[PathBuf]) -> Result<Vec<Option<FileDisk>>, GuestError> {
    let there = |image: &PathBuf| image.exists().then(|| FileDisk::open(image)).transpose();
    let there = images.iter().map(there).collect::<Result<Vec<_>, _>>()?;
    check_distinct(images.iter().zip(&there).filter_map(|(image, disk)| disk.as_ref().map(|_| image)))?;
    there.iter().flatten().try_for_each(FileDisk::lock_alone)?;
    Ok(there)
}

/// Those that [`open`] found, and the others, made of `size_bytes` for each index.
pub(super) fn make_others(
    images: &[PathBuf],
    there: Vec<Option<FileDisk>>,
    size_bytes: impl Fn(usize) -> u64,
) -> Result<(Vec<FileDisk>, Alone), GuestError> {
    let is_new: Vec<bool> = there.iter().map(Option::is_none).collect();
    let each = there.into_iter().zip(images).enumerate();
    let each =
        each.map(|(index, (disk, image))| disk.map_or_else(|| FileDisk::open_or_create(image, size_bytes(index)), Ok));
    let disks = each.collect::<Result<Vec<_>, _>>()?;
    check_distinct(images)?;
    disks.iter().zip(is_new).filter(|(_, is_new)| *is_new).try_for_each(|(disk, _)| disk.lock_alone())?;
    let alone = Alone(disks.clone());
    Ok((disks, alone))
}

/// Two names of one image would be two disks that overwrite each other.
fn check_distinct<'a>(images: impl IntoIterator<Item = &'a PathBuf>) -> Result<(), GuestError> {
    let mut seen = BTreeSet::new();
    for path in images {
        let stat =
            rustix::fs::stat(path).map_err(|e| DiskError::io(format!("look at {}", path.display()), e.into()))?;
        let is_device = FileType::from_raw_mode(stat.st_mode).is_block_device();
        let identity = if is_device { (stat.st_rdev, 0) } else { (stat.st_dev, stat.st_ino) };
        if !seen.insert(identity) {
            return Err(GuestError::SameImage { path: path.clone() });
        }
    }
    Ok(())
}
