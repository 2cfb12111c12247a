//! The drives of a replica that stands alone: images, and what a guest sees of them.
//!
//! ```text
//!   image ── not started ──▶ plain: the primary's export writes the file; the guest has nothing to see
//!         ── started ──────▶ replica: the export writes the next checkpoint, the guest sees the last one
//!   quorum ────────────────▶ a mirror over an image or over a replica's guest view: see [`super::primary`]
//! ```
//!
//! Connections outlive the start, as QEMU's do: an export is added before replication is started, and its client may be
//! there already. So a connection looks for what it writes to with every request. A plain image is written under the lock
//! under which it becomes a replica.

use super::primary::{Link, Node};
use crate::daemon::links::lock;
use crate::daemon::nbd::lock as qemu_lock;
use crate::disk::{Disk, DiskError, Extent, FileDisk, Zeroing};
use crate::replica::epochs::{GuestView, PrimaryView};
use crate::replica::mirror::Mirror;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// Copies of a disk's writes that wait for the secondary at most; then the guest waits.
const QUEUE_BYTES: u64 = 64 << 20;

/// What an image is now.
pub(super) enum Back {
    Plain(FileDisk),
    Replica(PrimaryView),
    Quorum(Source),
}

/// A guest's disk, to which a replication node can be added: its writes, and who is told of them.
#[derive(Clone)]
pub(super) struct Source {
    mirror: Arc<Mutex<Mirror>>,
    /// Something was written.
    pub(super) stirred: Arc<Notify>,
    /// Something was answered, or something is the matter.
    pub(super) moved: Arc<Notify>,
}

impl Source {
    pub(super) fn mirror(&self) -> MutexGuard<'_, Mirror> {
        lock(&self.mirror)
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.mirror().size_bytes()
    }
}

/// An image.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) size_bytes: u64,
    pub(super) back: Arc<Mutex<Back>>,
}

/// A drive.
pub(super) enum Drive {
    Image(Image),
    /// What the guest sees of the image of this name.
    Secondary {
        image: String,
    },
    /// A guest's disk, maybe over the drive of this name.
    Quorum {
        disk: Image,
        source: Source,
        over: Option<String>,
    },
    /// A client of the secondary's export.
    Client(Arc<Link>),
    /// The primary's replication node.
    Primary(Node),
}

impl Image {
    /// Opens an image for itself alone.
    pub(super) fn open(path: PathBuf) -> Result<Self, DiskError> {
        let disk = FileDisk::open(&path)?;
        disk.lock_alone()?;
        let refused =
            qemu_lock::lock(&disk, false).map_err(|e| DiskError::io(format!("lock {}", path.display()), e))?;
        if let Some(what) = refused {
            return Err(DiskError::InUse { what: format!("{} (failed to get {what} lock)", path.display()) });
        }
        let size_bytes = disk.size_bytes();
        Ok(Self { path, size_bytes, back: Arc::new(Mutex::new(Back::Plain(disk))) })
    }

    /// A quorum over it; or, with `guest`, over what the guest sees of it.
    pub(super) fn quorum(&self, guest: bool) -> (Self, Source) {
        let mirror = Arc::new(Mutex::new(Mirror::new(self.disk(guest), QUEUE_BYTES)));
        let source = Source { mirror, stirred: Arc::default(), moved: Arc::default() };
        let back = Arc::new(Mutex::new(Back::Quorum(source.clone())));
        (Self { path: self.path.clone(), size_bytes: self.size_bytes, back }, source)
    }

    /// The image, as a connection uses it: the primary's, or with `guest` what the guest sees.
    pub(super) fn disk(&self, guest: bool) -> Box<dyn Disk> {
        Box::new(Served { image: self.clone(), guest })
    }
}

struct Served {
    image: Image,
    guest: bool,
}

impl Served {
    fn on<T>(&self, run: impl FnOnce(&mut dyn Disk) -> Result<T, DiskError>) -> Result<T, DiskError> {
        let mut back = lock(&self.image.back);
        let view = match &mut *back {
            Back::Plain(disk) if !self.guest => return run(disk),
            Back::Plain(_) => {
                let why = io::Error::other("replication is not started");
                return Err(DiskError::io("the secondary's guest disk", why));
            }
            Back::Replica(view) => view.clone(),
            Back::Quorum(source) => {
                let source = source.clone();
                drop(back);
                let done = run(&mut *source.mirror());
                source.stirred.notify_one();
                return done;
            }
        };
        drop(back);
        if self.guest { run(&mut GuestView(view.replica)) } else { run(&mut { view }) }
    }
}

impl Disk for Served {
    fn size_bytes(&self) -> u64 {
        self.image.size_bytes
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.on(|disk| disk.read(offset, into))
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.on(|disk| disk.write(offset, bytes))
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.on(|disk| disk.flush())
    }
    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        self.on(|disk| disk.write_zeroes(offset, len_bytes, how))
    }
    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        self.on(|disk| disk.trim(offset, len_bytes))
    }
    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        self.on(|disk| disk.extents(offset, len_bytes, max))
    }
    fn changed(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Option<Vec<(u64, bool)>>, DiskError> {
        self.on(|disk| disk.changed(offset, len_bytes, max))
    }
}
