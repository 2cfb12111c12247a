//! That the guest on these disks is protected: a line beside its first image, for whoever starts this host again.
//!
//! ```text
//!   protect ─▶ written, on the medium ─▶ killed, or the power is cut ─▶ found at the next start: the peer may have the guest
//!     └─ unprotected, or gone on alone here ─▶ removed
//! ```
//!
//! A secondary goes on when its primary is killed. A primary that is started again at once, by systemd or with its
//! machine, would boot the guest a second time, with the same addresses. With an arbiter the register says whose the
//! guest is; the line is for the policies that ask none, and for what an operator reads.
//!
//! It is in `IMAGE.colo-protected`, and for a block device in `/var/lib/xen-colo`, as the image's record is.

use super::durable;
use crate::replica::state;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Longest line, in bytes.
const LINE_MAX_BYTES: u64 = 4096;

/// A protection that was in force.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Protected {
    /// Whose.
    pub guest: String,
    /// In which generation.
    pub generation: u64,
    /// By which host.
    pub peer: String,
}

/// Where the line of a guest is whose first disk is `image`.
#[must_use]
pub fn path(image: &Path) -> PathBuf {
    state::path(image).with_extension("colo-protected")
}

impl Protected {
    /// Writes the line, and returns when no power cut can take it back.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        fs::create_dir_all(durable::directory(path))?;
        durable::replace(path, &line)
    }

    /// The line that was left, if there is one. What is there and cannot be read as one is an error: it was not nothing.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut line = Vec::new();
        file.take(LINE_MAX_BYTES).read_to_end(&mut line)?;
        Ok(Some(serde_json::from_slice(&line)?))
    }
}

/// Removes the line, if there is one.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Err(_) => Ok(()),
        Ok(()) => durable::sync_directory(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_again_and_half_a_line_is_not_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("disk.img"));
        assert!(path.ends_with("disk.img.colo-protected"), "{}", path.display());
        assert_eq!(Protected::read(&path).unwrap(), None);
        remove(&path).unwrap();
        let line = Protected { guest: "web".into(), generation: 7, peer: "b".into() };
        line.write(&path).unwrap();
        assert_eq!(Protected::read(&path).unwrap(), Some(line));
        fs::write(&path, b"{\"guest\":\"w").unwrap();
        Protected::read(&path).unwrap_err();
        remove(&path).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
    }
}
