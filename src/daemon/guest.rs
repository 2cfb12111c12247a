//! A guest with its host-side devices: the queue its frames leave by, the disk under it.

use super::engine_clock;
use crate::colo::hello::{DiskGeometry, Geometry};
use crate::disk::{Disk, DiskError, FileDisk};
use crate::hypervisor::embedded::domain::Transmit;
use crate::hypervisor::embedded::{Embedded, MachineConfig};
use crate::hypervisor::{Domain, DomainError};
use crate::page::PAGE_SIZE;
use crate::replica::epochs::{GuestView, Replica, ReplicaConfig};
use crate::replica::mirror::{Mirror, MirrorHandle};
use crate::replica::state::{self, FileState, StateError};
use bytes::Bytes;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// Name of the one disk a guest has.
pub const DISK_NAME: &str = "disk0";
/// Bytes of frames a guest may have on its transmit ring. Beyond it they are dropped, before they left the guest.
const TRANSMIT_RING_BYTES: usize = 8 << 20;
/// Bytes of disk writes that may wait for the secondary; at half of it a checkpoint is asked for.
const MIRROR_QUEUE_BYTES: u64 = 64 << 20;

/// The frames a guest has emitted and nobody has taken, each with the epoch of its emission.
#[derive(Debug, Default)]
pub struct GuestQueue {
    frames: Mutex<(VecDeque<(u64, Bytes)>, usize)>,
    filled: Notify,
}

impl GuestQueue {
    pub(super) fn push(&self, epoch: u64, frame: &[u8]) {
        let mut guard = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.1 + frame.len() > TRANSMIT_RING_BYTES {
            return;
        }
        guard.1 += frame.len();
        guard.0.push_back((epoch, Bytes::copy_from_slice(frame)));
        drop(guard);
        self.filled.notify_one();
    }

    /// The oldest frame.
    pub fn pop(&self) -> Option<(u64, Bytes)> {
        let mut guard = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let popped = guard.0.pop_front();
        guard.1 -= popped.as_ref().map_or(0, |(_, frame)| frame.len());
        popped
    }

    /// Completes when there is a frame.
    pub async fn wait(&self) {
        while self.frames.lock().unwrap_or_else(PoisonError::into_inner).0.is_empty() {
            self.filled.notified().await;
        }
    }
}

/// A guest and what this host keeps for it.
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub geometry: Geometry,
    /// The guest; absent while a side of a pair has it.
    pub domain: Option<Box<dyn Domain>>,
    /// Frames it emitted.
    pub queue: Arc<GuestQueue>,
    /// What its frames are tagged with.
    pub epoch: Arc<AtomicU64>,
    /// The disk on the primary.
    pub mirror: MirrorHandle,
    /// The disk on the secondary.
    pub replica: Option<Arc<Mutex<Replica>>>,
    /// What serves its devices, and ends with it.
    pub attachments: Vec<Box<dyn std::any::Any + Send>>,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("name", &self.name).field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// Why a guest cannot be made on this host.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The guest itself.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// Its disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its disk image is not what a guest can run on.
    #[error(transparent)]
    State(#[from] StateError),
    /// The hypervisor's toolstack, or what attaches the guest's devices.
    #[error("{0}")]
    Toolstack(String),
    /// More memory than the host has.
    #[error("{what} needs {need_mib} MiB, this host has {have_mib} MiB free; use a smaller --guest-mib")]
    Memory {
        /// What for.
        what: &'static str,
        /// MiB needed.
        need_mib: u64,
        /// MiB available.
        have_mib: u64,
    },
    /// The image has another size than the primary's disk.
    #[error("{} is {have_bytes} bytes, the primary's disk is {need_bytes}; remove it or name another image", path.display())]
    DiskSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        have_bytes: u64,
        /// The size it must have.
        need_bytes: u64,
    },
}

impl Guest {
    /// The guest, while no pair has it.
    pub fn domain_mut(&mut self) -> Result<&mut (dyn Domain + 'static), DomainError> {
        self.domain.as_deref_mut().ok_or(DomainError::Gone)
    }

    /// Boots a guest on a disk image, which is made when there is none.
    pub fn boot(
        name: &str,
        config: &MachineConfig,
        image: &Path,
        disk_bytes: u64,
        generation: u64,
    ) -> Result<Self, GuestError> {
        check_memory("the guest", config.ram_pages)?;
        state::take_up(image, false)?;
        let disk = FileDisk::open_or_create(image, disk_bytes)?;
        let disks = vec![DiskGeometry { name: DISK_NAME.into(), size_bytes: disk.size_bytes() }];
        let mirror = self::mirror(Box::new(disk));
        let (queue, epoch) = (Arc::<GuestQueue>::default(), Arc::new(AtomicU64::new(0)));
        let transmit = transmit(&queue, &epoch);
        let mut domain = Embedded::boot(config, Box::new(mirror.clone()), Arc::new(engine_clock), transmit)?;
        domain.set_generation(generation)?;
        Ok(Self {
            name: name.to_owned(),
            geometry: geometry(config, disks),
            domain: Some(Box::new(domain)),
            queue,
            epoch,
            mirror,
            replica: None,
            attachments: Vec::new(),
        })
    }

    /// Makes room for a guest that a primary will send: blank memory, and a replica on a disk image. The second
    /// value tells whether the image is new, and so all zero.
    pub fn stand_by(
        name: &str,
        geometry: &Geometry,
        image: &Path,
        epochs: ReplicaConfig,
        entropy_seed: u64,
    ) -> Result<(Self, bool), GuestError> {
        // The guest and the cache of its last checkpoint.
        check_memory("standing by for the guest", geometry.nr_pages.saturating_mul(2))?;
        let (replica, is_blank) = replica(geometry, image, epochs)?;
        let machine = MachineConfig {
            ram_pages: geometry.nr_pages,
            mac: geometry.mac,
            ip: geometry.ip,
            diverge_percent: geometry.diverge_percent,
            host_entropy_seed: entropy_seed,
        };
        let (queue, epoch) = (Arc::<GuestQueue>::default(), Arc::new(AtomicU64::new(0)));
        let transmit = transmit(&queue, &epoch);
        let disk = Box::new(GuestView(replica.clone()));
        let domain = Embedded::blank(&machine, disk, Arc::new(engine_clock), transmit)?;
        let guest = Self {
            name: name.to_owned(),
            geometry: geometry.clone(),
            domain: Some(Box::new(domain)),
            queue,
            epoch,
            mirror: mirror(Box::new(GuestView(replica.clone()))),
            replica: Some(replica),
            attachments: Vec::new(),
        };
        Ok((guest, is_blank))
    }
}

pub(super) fn mirror(disk: Box<dyn Disk>) -> MirrorHandle {
    MirrorHandle(Arc::new(Mutex::new(Mirror::new(disk, MIRROR_QUEUE_BYTES))))
}

/// The replica of a guest's disk on an image, and whether the image is new, and so all zero.
pub(super) fn replica(
    geometry: &Geometry,
    image: &Path,
    epochs: ReplicaConfig,
) -> Result<(Arc<Mutex<Replica>>, bool), GuestError> {
    let size_bytes = geometry.disks.first().map_or(0, |disk| disk.size_bytes);
    let is_blank = !image.exists();
    let base = FileDisk::open_or_create(image, size_bytes)?;
    if base.size_bytes() != size_bytes {
        let (path, have_bytes) = (image.to_owned(), base.size_bytes());
        return Err(GuestError::DiskSize { path, have_bytes, need_bytes: size_bytes });
    }
    let replica = Replica::open(Box::new(base), Box::new(FileState::of(image)), epochs)?;
    Ok((Arc::new(Mutex::new(replica)), is_blank))
}

fn geometry(config: &MachineConfig, disks: Vec<DiskGeometry>) -> Geometry {
    let MachineConfig { ram_pages, mac, ip, diverge_percent, .. } = *config;
    Geometry { nr_pages: ram_pages, disks, mac, ip, diverge_percent, xen: None }
}

/// The sink of a guest's NIC: tags each frame where it is emitted.
fn transmit(queue: &Arc<GuestQueue>, epoch: &Arc<AtomicU64>) -> Transmit {
    let (queue, epoch) = (queue.clone(), epoch.clone());
    Box::new(move |frame| queue.push(epoch.load(Ordering::SeqCst), frame))
}

/// Refuses what the host's free memory cannot hold; allocating it would succeed and then kill somebody.
pub(super) fn check_memory(what: &'static str, pages: u64) -> Result<(), GuestError> {
    let need_mib = pages.saturating_mul(PAGE_SIZE as u64) >> 20;
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available_kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    match available_kib.map(|kib| kib >> 10) {
        Some(have_mib) if need_mib > have_mib => Err(GuestError::Memory { what, need_mib, have_mib }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_keep_their_order_and_epoch_and_the_ring_is_bounded() {
        let (queue, epoch) = (Arc::<GuestQueue>::default(), Arc::new(AtomicU64::new(0)));
        let mut sink = transmit(&queue, &epoch);
        sink(b"first");
        epoch.store(1, Ordering::SeqCst);
        sink(b"second");
        queue.wait().await;
        assert_eq!(queue.pop(), Some((0, Bytes::from_static(b"first"))));
        assert_eq!(queue.pop(), Some((1, Bytes::from_static(b"second"))));
        assert_eq!(queue.pop(), None);
        for _ in 0..10 {
            sink(&vec![0; 1 << 20]);
        }
        assert_eq!(std::iter::from_fn(|| queue.pop()).count(), 8);
    }

    #[test]
    fn a_guest_larger_than_memory_is_refused_by_name() {
        let refused = check_memory("the guest", 1 << 40).unwrap_err();
        assert!(refused.to_string().starts_with("the guest needs 4294967296 MiB, this host has "), "{refused}");
    }
}
