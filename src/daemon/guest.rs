//! A guest with its host-side devices: the queue its frames leave by, the disks under it.

mod images;

pub(super) use self::images::Alone;
use super::engine_clock;
use crate::clock::Instant;
use crate::colo::hello::{DISKS_MAX, DiskGeometry, Geometry, disk_name};
use crate::compare::Rewriter;
use crate::disk::{Disk, DiskError, FileDisk};
use crate::hypervisor::embedded::copies::Copies;
use crate::hypervisor::embedded::domain::Transmit;
use crate::hypervisor::embedded::{Embedded, MachineConfig};
use crate::hypervisor::{Domain, DomainError};
use crate::page::PAGE_SIZE;
use crate::replica::epochs::ReplicaConfig;
use crate::replica::set::{Image, Mirrors, OfDisk, Replicas};
use crate::replica::state::FileState;
use crate::replica::take_up::{StateError, take_up};
use bytes::Bytes;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// Bytes of frames a guest may have on its transmit ring. Beyond it they are dropped, before they left the guest.
const TRANSMIT_RING_BYTES: usize = 8 << 20;
/// Bytes of disk writes that may wait for the secondary, over all disks; at half of a disk's share a checkpoint is asked
/// for.
const MIRROR_QUEUE_BYTES: u64 = 64 << 20;

/// The frames a guest has emitted and nobody has taken, each with the epoch of its emission.
#[derive(Debug, Default)]
pub struct GuestQueue {
    frames: Mutex<(VecDeque<(u64, Bytes)>, usize)>,
    filled: Notify,
    lost: AtomicU64,
    lost_noticed: AtomicU64,
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

    #[cfg_attr(not(feature = "xen"), allow(dead_code, reason = "only a domain's devices lose frames"))]
    /// So many more frames of the guest's never arrived here.
    pub(super) fn lose(&self, frames: u64) {
        self.lost.fetch_add(frames, Ordering::SeqCst);
        self.filled.notify_one();
    }

    /// Frames of the guest's that never arrived here.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::SeqCst)
    }

    /// Whether there are more of these than the last time.
    pub(super) fn notice_lost(&self) -> bool {
        let lost = self.lost();
        self.lost_noticed.swap(lost, Ordering::SeqCst) != lost
    }

    /// Completes when there is a frame, or one was lost.
    pub async fn wait(&self) {
        while self.frames.lock().unwrap_or_else(PoisonError::into_inner).0.is_empty()
            && self.lost() == self.lost_noticed.load(Ordering::SeqCst)
        {
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
    /// The disks on the primary.
    pub mirrors: Mirrors,
    /// The disks on the secondary.
    pub replicas: Option<Replicas>,
    /// What earlier takeovers have left to be translated, while no pair has it.
    pub outer: Rewriter,
    /// What serves its devices and keeps others from its images, and ends with it.
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
    /// A disk of it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The replica of a disk of it.
    #[error(transparent)]
    Replica(#[from] OfDisk<DiskError>),
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
    /// As many images as disks are needed.
    #[error("the guest has {disks} disk(s), and this host was given {images} image(s); give --disk once for each disk")]
    Images {
        /// Disks of the guest.
        disks: usize,
        /// Images of the host.
        images: usize,
    },
    /// An image is named for two disks.
    #[error("{} is named for two disks; give each disk an image of its own", path.display())]
    SameImage {
        /// The image.
        path: PathBuf,
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

    /// A frame from the network, while no pair has the guest.
    pub fn receive(&mut self, now: Instant, frame: Bytes) {
        if let (Some(domain), Some(frame)) = (&mut self.domain, self.outer.inward(now, frame)) {
            domain.receive_frame(&frame);
        }
    }

    /// A frame of its queue, as the network is to see it, while no pair has the guest.
    pub fn to_network(&mut self, now: Instant, frame: Bytes) -> Bytes {
        let frame = self.outer.outward(now, frame);
        while let (Some(domain), Some(held)) = (&mut self.domain, self.outer.poll_output()) {
            domain.receive_frame(&held);
        }
        frame
    }

    /// Boots a guest on disk images, which are made where there are none. With several it writes all it writes on each.
    pub fn boot(
        name: &str,
        config: &MachineConfig,
        images: &[PathBuf],
        disk_bytes: u64,
        generation: u64,
    ) -> Result<Self, GuestError> {
        check_memory("the guest", config.ram_pages)?;
        let (mirrors, disks, alone) = mirrors_on(images, disk_bytes, false)?;
        let (queue, epoch) = (Arc::<GuestQueue>::default(), Arc::new(AtomicU64::new(0)));
        let transmit = transmit(&queue, &epoch);
        let copies = copies_on(&mirrors);
        let mut domain = Embedded::boot(config, Box::new(copies), Arc::new(engine_clock), transmit)?;
        domain.set_generation(generation)?;
        Ok(Self {
            name: name.to_owned(),
            geometry: geometry(config, disks),
            domain: Some(Box::new(domain)),
            queue,
            epoch,
            mirrors,
            replicas: None,
            outer: Rewriter::of_survivor(),
            attachments: vec![Box::new(alone)],
        })
    }

    /// Makes room for a guest that a primary will send: blank memory, and replicas on disk images. The second
    /// value tells whether these are new, and so all zero.
    pub fn stand_by(
        name: &str,
        geometry: &Geometry,
        images: &[PathBuf],
        epochs: ReplicaConfig,
        entropy_seed: u64,
    ) -> Result<(Self, bool), GuestError> {
        // The guest and the cache of its last checkpoint.
        check_memory("standing by for the guest", geometry.nr_pages.saturating_mul(2))?;
        let (replicas, is_blank, alone) = replicas_on(geometry, images, epochs)?;
        let machine = MachineConfig {
            ram_pages: geometry.nr_pages,
            mac: geometry.mac,
            ip: geometry.ip,
            diverge_percent: geometry.diverge_percent,
            host_entropy_seed: entropy_seed,
        };
        let (queue, epoch) = (Arc::<GuestQueue>::default(), Arc::new(AtomicU64::new(0)));
        let transmit = transmit(&queue, &epoch);
        let mirrors = mirrors_over(&replicas);
        let copies = copies_on(&mirrors);
        let domain = Embedded::blank(&machine, Box::new(copies), Arc::new(engine_clock), transmit)?;
        let guest = Self {
            name: name.to_owned(),
            geometry: geometry.clone(),
            domain: Some(Box::new(domain)),
            queue,
            epoch,
            mirrors,
            replicas: Some(replicas),
            outer: Rewriter::of_survivor(),
            attachments: vec![Box::new(alone)],
        };
        Ok((guest, is_blank))
    }
}

/// What an embedded guest writes to.
fn copies_on(mirrors: &Mirrors) -> Copies {
    Copies::of(mirrors.disks().iter().map(|disk| Box::new(disk.clone()) as Box<dyn Disk>).collect())
}

/// Mirrors of what a guest that stands by has, through which it writes from the beginning: it may be protected again after a
/// takeover.
pub(super) fn mirrors_over(replicas: &Replicas) -> Mirrors {
    let view = |view| Box::new(view) as Box<dyn Disk>;
    Mirrors::new(replicas.guest_views().map(view).collect(), MIRROR_QUEUE_BYTES)
}

/// Takes images up for a guest that `runs` or is booted on them, and makes those that are not there. What they are, too.
pub(super) fn mirrors_on(
    images: &[PathBuf],
    disk_bytes: u64,
    runs: bool,
) -> Result<(Mirrors, Vec<DiskGeometry>, Alone), GuestError> {
    if !(1..=DISKS_MAX).contains(&images.len()) {
        return Err(GuestError::Images { disks: DISKS_MAX, images: images.len() });
    }
    let there = images::open(images)?;
    take_up(images, runs)?;
    let (disks, alone) = images::make_others(images, there, |_| disk_bytes)?;
    let geometry = disks.iter().enumerate();
    let geometry = geometry.map(|(at, disk)| DiskGeometry { name: disk_name(at), size_bytes: disk.size_bytes() });
    let geometry = geometry.collect();
    let mirrors = Mirrors::new(disks.into_iter().map(|disk| Box::new(disk) as _).collect(), MIRROR_QUEUE_BYTES);
    Ok((mirrors, geometry, alone))
}

/// The replicas of a guest's disks on images, and whether these are new, and so all zero.
pub(super) fn replicas_on(
    geometry: &Geometry,
    images: &[PathBuf],
    epochs: ReplicaConfig,
) -> Result<(Replicas, bool, Alone), GuestError> {
    if geometry.disks.len() != images.len() {
        return Err(GuestError::Images { disks: geometry.disks.len(), images: images.len() });
    }
    let there = images::open(images)?;
    let are_blank = there.iter().all(Option::is_none);
    let (bases, alone) = images::make_others(images, there, |index| geometry.disks[index].size_bytes)?;
    for (index, base) in bases.iter().enumerate() {
        let (have_bytes, need_bytes) = (base.size_bytes(), geometry.disks[index].size_bytes);
        if have_bytes != need_bytes {
            return Err(GuestError::DiskSize { path: images[index].clone(), have_bytes, need_bytes });
        }
    }
    let image = |(base, path): (FileDisk, &PathBuf)| -> Image { (Box::new(base), Box::new(FileState::of(path))) };
    let bases = bases.into_iter().zip(images).map(image).collect();
    let mut set = [0; 4];
    getrandom::fill(&mut set).map_err(|e| GuestError::Toolstack(format!("no randomness for a set of images: {e}")))?;
    Ok((Replicas::open(bases, u32::from_le_bytes(set), epochs)?, are_blank, alone))
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

    #[tokio::test]
    async fn a_loss_is_noticed_once_and_waited_for_by_nobody() {
        let queue = GuestQueue::default();
        assert!(!queue.notice_lost());
        queue.lose(3);
        queue.wait().await;
        assert_eq!((queue.pop(), queue.lost()), (None, 3));
        assert_eq!((queue.notice_lost(), queue.notice_lost()), (true, false));
        queue.lose(1);
        assert_eq!((queue.notice_lost(), queue.lost()), (true, 4));
    }

    #[test]
    fn a_guest_larger_than_memory_is_refused_by_name() {
        let refused = check_memory("the guest", 1 << 40).unwrap_err();
        assert!(refused.to_string().starts_with("the guest needs 4294967296 MiB, this host has "), "{refused}");
    }
}
