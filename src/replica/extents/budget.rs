//! What the layers of a guest's replicas may use together, and the files that they spill to.
//!
//! ```text
//!   none ──▶ in use by a layer, charged for as long as it ever was ──▶ spare, still charged ──▶ in use by the next
//!                                                                        └──▶ closed: trim, or want of room
//! ```
//!
//! A file outlives its layer for the next one to write over: that wants no new blocks of the file system, and nothing of the
//! old one is ever read, since a layer reads what it has written only.
//!
//! One is made before it is wanted, by whoever waits for nobody; who wants a second one makes it himself.
//!
//! The trap: closing a file without a name gives all its blocks back, a tenth of a second for a GiB and more on a medium. So
//! a layer that goes leaves its file here, and whoever waits for nobody closes it ([`Budget::trim`]).

use super::MAX_EXTENT_BYTES;
use crate::disk::DiskError;
use crate::mutant::{self, Mutant};
use crate::pool::Pool;
use crate::replica::lock;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// Spare files that are kept: while a layer is copied down, the next one fills another file.
const KEPT_FILES: usize = 1;

/// A file of a layer, or of none.
#[derive(Debug)]
pub(super) struct SpillFile {
    pub(super) file: Arc<File>,
    /// How much of it was ever written.
    charged_bytes: u64,
}

/// What all layers of a guest's replicas may use together.
#[derive(Debug)]
pub struct Budget {
    memory_limit_bytes: u64,
    spill_limit_bytes: u64,
    spill_dir: Option<PathBuf>,
    memory_bytes: AtomicU64,
    spill_bytes: AtomicU64,
    versions: AtomicU64,
    pool: Pool,
    /// Of layers that are gone, the last one last.
    spare: Mutex<Vec<SpillFile>>,
}

impl Budget {
    /// `memory_limit_bytes` of memory, then `spill_limit_bytes` in files in `spill_dir`; without a directory,
    /// memory is all there is.
    #[must_use]
    pub fn new(memory_limit_bytes: u64, spill_dir: Option<PathBuf>, spill_limit_bytes: u64) -> Arc<Self> {
        let (memory_bytes, spill_bytes, versions, spare) = Default::default();
        // Beside what layers use: what the next epoch will want again.
        let pool = Pool::keeping((memory_limit_bytes / 4) as usize);
        Arc::new(Self {
            memory_limit_bytes,
            spill_limit_bytes,
            spill_dir,
            memory_bytes,
            spill_bytes,
            versions,
            pool,
            spare,
        })
    }

    /// Memory in use, the index included, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes.load(Relaxed)
    }

    /// Whether the next extents are likely to find room in memory.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        self.fits_memory(MAX_EXTENT_BYTES as u64)
    }

    /// All the memory, the index included.
    pub(super) fn memory_limit_bytes(&self) -> u64 {
        self.memory_limit_bytes
    }

    /// A part is kept for the index of what is spilled.
    pub(super) fn data_limit_bytes(&self) -> u64 {
        self.memory_limit_bytes - self.memory_limit_bytes / 4
    }

    /// What spill files take, spare ones included, in bytes.
    #[must_use]
    pub fn spill_bytes(&self) -> u64 {
        self.spill_bytes.load(Relaxed)
    }

    /// Closes the spare files that the next layer will not need, or all of them. Takes as long as the file system likes: hold
    /// no lock.
    pub fn trim(&self, all: bool) {
        let kept = if all { 0 } else { KEPT_FILES };
        let closed: Vec<_> = {
            let mut spare = lock(&self.spare);
            let surplus = spare.len().saturating_sub(kept);
            spare.drain(..surplus).collect()
        };
        for file in closed {
            let charged_bytes = file.charged_bytes;
            drop(file);
            self.spill_bytes.fetch_sub(charged_bytes, Relaxed);
        }
    }

    /// Makes a spare file where there is none. Takes as long as [`Self::trim`]; what is wrong is said when it is wanted.
    pub fn prepare(&self) {
        let is_wanted = lock(&self.spare).is_empty();
        if let Some(file) = self.spill_dir.as_deref().filter(|_| is_wanted).and_then(|dir| unlinked_file(dir).ok()) {
            lock(&self.spare).push(SpillFile { file: Arc::new(file), charged_bytes: 0 });
        }
    }

    /// A number that no layer had before.
    pub(super) fn next_version(&self) -> u64 {
        self.versions.fetch_add(1, Relaxed) + 1
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn take_memory(&self, limit_bytes: u64, bytes: u64) -> bool {
        take(&self.memory_bytes, limit_bytes, bytes)
    }

    /// Whether there is memory for data.
    pub(super) fn fits_memory(&self, bytes: u64) -> bool {
        self.memory_bytes() + bytes <= self.data_limit_bytes()
    }

    pub(super) fn give_memory(&self, bytes: u64) {
        self.memory_bytes.fetch_sub(bytes, Relaxed);
    }

    /// A file to spill to, whatever is in it: one that nobody writes to any more, who did not know that his layer is gone.
    pub(super) fn spill_file(&self) -> Result<SpillFile, DiskError> {
        let dir = self.spill_dir.as_deref().ok_or_else(no_space)?;
        let is_free = |spare: &SpillFile| Arc::strong_count(&spare.file) == 1 || mutant::active(Mutant::ReuseLentFile);
        let spare = {
            let mut spare = lock(&self.spare);
            spare.iter().rposition(is_free).map(|at| spare.remove(at))
        };
        spare.map_or_else(|| Ok(SpillFile { file: Arc::new(unlinked_file(dir)?), charged_bytes: 0 }), Ok)
    }

    /// Charges a file for its bytes up to `end`. Spare files make room.
    pub(super) fn grow(&self, file: &mut SpillFile, end: u64) -> Result<(), DiskError> {
        let more_bytes = end.saturating_sub(file.charged_bytes);
        let fits = || take(&self.spill_bytes, self.spill_limit_bytes, more_bytes);
        if !fits() {
            self.trim(true);
            if !fits() {
                return Err(no_space());
            }
        }
        file.charged_bytes += more_bytes;
        Ok(())
    }

    /// A layer is gone; its file is not.
    pub(super) fn spare(&self, file: SpillFile) {
        lock(&self.spare).push(file);
    }
}

/// Takes `bytes` of a purse unless that exceeds its limit.
fn take(purse: &AtomicU64, limit_bytes: u64, bytes: u64) -> bool {
    let sum = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit_bytes);
    purse.fetch_update(Relaxed, Relaxed, sum).is_ok()
}

pub(super) fn no_space() -> DiskError {
    DiskError::NoSpace { what: "the replica's layers".into() }
}

/// A file that goes away with its last handle: a replica that crashes leaves nothing behind, and what it spilled
/// would mean nothing to the next one.
fn unlinked_file(dir: &Path) -> Result<File, DiskError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("xen-colo-{}-{}.spill", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let path = dir.join(name);
    let fail = |e| DiskError::io(format!("create {}", path.display()), e);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(fail)?;
    fs::remove_file(&path).map_err(fail)?;
    Ok(file)
}
