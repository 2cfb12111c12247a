//! The embedded guest without its thread: a [`Domain`] whose steps the simulator takes.

use super::dice::Dice;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use xen_colo::bitmap::Bitmap;
use xen_colo::clock::Instant;
use xen_colo::daemon::pair::lock;
use xen_colo::disk::{Disk, DiskError};
use xen_colo::hypervisor::embedded::Machine;
use xen_colo::hypervisor::embedded::devices::FRAMES_MAX;
use xen_colo::hypervisor::{Domain, DomainError};
use xen_colo::page::Pfn;

/// The captured state, against which each loaded one is compared.
#[derive(Default)]
pub(super) struct Captured {
    /// Whether to look at all.
    pub(super) wanted: bool,
    /// How many states were compared.
    pub(super) compared: u64,
    /// What differed.
    pub(super) differs: Option<String>,
    ram: Vec<u8>,
    devices: Vec<u8>,
}

impl Captured {
    /// Nothing is captured yet.
    pub(super) fn new(wanted: bool) -> Self {
        Self { wanted, ..Self::default() }
    }
}

/// The guest and what it is plugged into.
pub(super) struct Core {
    /// The guest.
    pub(super) machine: Machine,
    /// Its disk.
    pub(super) disk: Box<dyn Disk>,
    /// Whether it runs.
    pub(super) running: bool,
    /// Whether it is to be looked at, though nothing is due.
    pub(super) poked: bool,
    /// Frames it emitted, with the epoch of the emission.
    pub(super) sent: VecDeque<(u64, Bytes)>,
    /// The epoch, which belongs to the side.
    pub(super) epoch: Arc<AtomicU64>,
    inbox: VecDeque<Bytes>,
    captured: Arc<Mutex<Captured>>,
    all_pages: Vec<Pfn>,
}

impl Core {
    /// A guest that is suspended.
    pub(super) fn new(machine: Machine, disk: Box<dyn Disk>, captured: Arc<Mutex<Captured>>) -> Self {
        let all_pages = (0..machine.ram().nr_pages()).map(Pfn).collect();
        Self {
            machine,
            disk,
            running: false,
            poked: false,
            sent: VecDeque::new(),
            epoch: Arc::default(),
            inbox: VecDeque::new(),
            captured,
            all_pages,
        }
    }

    /// One step, unless it stands; says when the next is due.
    pub(super) fn step(&mut self, now: Instant) -> Option<Instant> {
        if !self.running {
            return None;
        }
        self.fill_ring();
        let Self { machine, disk, sent, epoch, .. } = self;
        machine.step(now, &mut **disk, &mut |frame| {
            sent.push_back((epoch.load(Ordering::SeqCst), Bytes::copy_from_slice(frame)));
        });
        machine.poll_timeout()
    }

    fn fill_ring(&mut self) {
        while self.inbox.front().is_some_and(|frame| self.machine.receive(frame)) {
            self.inbox.pop_front();
        }
    }
}

/// The guest as a side of the pair has it.
pub(super) struct SimDomain {
    /// Shared with the simulator.
    pub(super) core: Arc<Mutex<Core>>,
    /// The virtual clock.
    pub(super) clock: Arc<AtomicU64>,
}

impl SimDomain {
    fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.clock.load(Ordering::Relaxed))
    }
}

impl Domain for SimDomain {
    fn nr_pages(&self) -> u64 {
        self.core().machine.ram().nr_pages()
    }

    fn suspend(&mut self) -> Result<(), DomainError> {
        self.core().running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DomainError> {
        let mut core = self.core();
        (core.running, core.poked) = (true, true);
        Ok(())
    }

    fn logdirty(&mut self, on: bool) -> Result<(), DomainError> {
        self.core().machine.ram_mut().logdirty(on);
        Ok(())
    }

    fn take_dirty(&mut self, into: &mut Bitmap) -> Result<(), DomainError> {
        self.core().machine.ram_mut().take_dirty(into);
        Ok(())
    }

    fn read_pages(&mut self, pfns: &[Pfn], into: &mut Vec<u8>) -> Result<(), DomainError> {
        self.core().machine.ram().read_pages(pfns, into)
    }

    fn write_pages(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Result<(), DomainError> {
        self.core().machine.ram_mut().write_pages(pfns, bytes)
    }

    fn save_devices(&mut self) -> Result<Vec<u8>, DomainError> {
        let mut core = self.core();
        if core.running {
            return Err(DomainError::NotSuspended);
        }
        core.fill_ring();
        let devices = core.machine.save_devices(self.now());
        let captured = &mut *lock(&core.captured);
        if captured.wanted {
            captured.ram.clear();
            core.machine.ram().read_pages(&core.all_pages, &mut captured.ram)?;
            captured.devices.clone_from(&devices);
        }
        Ok(devices)
    }

    fn check_devices(&self, run: &[u8]) -> Result<(), DomainError> {
        self.core().machine.check_devices(run)
    }

    fn load_devices(&mut self, blob: &[u8]) -> Result<(), DomainError> {
        let now = self.now();
        let mut core = self.core();
        if core.running {
            return Err(DomainError::NotSuspended);
        }
        core.machine.load_devices(now, blob)?;
        let captured = &mut *lock(&core.captured);
        if captured.wanted {
            captured.compared += 1;
            let ram = core.machine.ram().read(0, captured.ram.len());
            if let Some(page) =
                ram.chunks(4096).zip(captured.ram.chunks(4096)).position(|(ours, theirs)| ours != theirs)
            {
                captured.differs = Some(format!("page {page:#x} of the loaded guest is not the captured one"));
            }
            if captured.devices != blob {
                captured.differs = Some("the loaded device state is not the captured one".into());
            }
        }
        Ok(())
    }

    fn set_generation(&mut self, generation: u64) -> Result<(), DomainError> {
        let mut core = self.core();
        core.machine.set_generation(generation);
        core.poked = true;
        Ok(())
    }

    fn receive_frame(&mut self, frame: &[u8]) -> bool {
        let mut core = self.core();
        if core.inbox.len() >= FRAMES_MAX {
            return false;
        }
        core.inbox.push_back(Bytes::copy_from_slice(frame));
        core.poked = true;
        true
    }
}

/// A disk among others.
pub(super) fn boxed(disk: impl Disk + 'static) -> Box<dyn Disk> {
    Box::new(disk)
}

/// A disk that is busy now and then: two guests then serve the same requests in different orders.
pub(super) struct Busy {
    /// The disk.
    pub(super) disk: Box<dyn Disk>,
    /// How often, in percent.
    pub(super) percent: u64,
    /// Decides when.
    pub(super) dice: Dice,
}

impl Busy {
    fn permit(&mut self) -> Result<(), DiskError> {
        if self.percent > 0 && self.dice.percent(self.percent) { Err(DiskError::Busy) } else { Ok(()) }
    }
}

impl Disk for Busy {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.permit()?;
        self.disk.read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.permit()?;
        self.disk.write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.permit()?;
        self.disk.flush()
    }
}
