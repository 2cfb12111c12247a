//! The machine on a thread of its own, as a [`Domain`].
//!
//! ```text
//!               resume                    quit
//! suspended ◀──────────▶ running ─────────────▶ joined
//!               suspend: waits for the step under way
//! ```
//!
//! Two locks, taken in this order: `core` (machine, disk, transmit), held for one short step or one batch of pages;
//! `control` (what the thread should do, and the frames on their way in), held for a moment.
//!
//! Traps. A `std` mutex is not fair: the thread looks at `control.running` while it holds `core`, so that a suspend
//! waits for one step and not for its luck. Frames that wait in the inbox when devices are saved are part of the
//! state; frames in it when devices are loaded are on the wire, and stay there: TCP sorts out duplicates.

use super::devices::FRAMES_MAX;
use super::machine::{Machine, MachineConfig};
use crate::bitmap::Bitmap;
use crate::clock::Instant;
use crate::disk::Disk;
use crate::hypervisor::{Domain, DomainError};
use crate::page::Pfn;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Says what time it is.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;
/// Takes each frame the guest sends, on the guest's thread. It must not block, or the guest cannot be suspended.
pub type Transmit = Box<dyn FnMut(&[u8]) + Send>;

/// A machine on a thread of its own.
pub struct Embedded {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Hands frames to a guest from another thread, without waiting for whatever is being done to the guest.
#[derive(Clone)]
pub struct NicHandle(Arc<Shared>);

struct Shared {
    core: Mutex<Core>,
    control: Mutex<Control>,
    wake: Condvar,
    clock: Clock,
}

struct Core {
    machine: Machine,
    disk: Box<dyn Disk>,
    transmit: Transmit,
}

#[derive(Default)]
struct Control {
    running: bool,
    quit: bool,
    /// Look at the machine even though no frame came and no timer is due.
    poked: bool,
    inbox: VecDeque<Vec<u8>>,
}

impl Embedded {
    /// Boots a guest; it is suspended until the first `resume`.
    pub fn boot(
        config: &MachineConfig,
        mut disk: Box<dyn Disk>,
        clock: Clock,
        transmit: Transmit,
    ) -> Result<Self, DomainError> {
        let machine = Machine::boot(config, clock(), &mut *disk)?;
        Self::start(Core { machine, disk, transmit }, clock)
    }

    /// A suspended guest with nothing in it, to be loaded.
    pub fn blank(
        config: &MachineConfig,
        disk: Box<dyn Disk>,
        clock: Clock,
        transmit: Transmit,
    ) -> Result<Self, DomainError> {
        Self::start(Core { machine: Machine::blank(config)?, disk, transmit }, clock)
    }

    /// A handle for the thread that has the guest's frames.
    #[must_use]
    pub fn nic(&self) -> NicHandle {
        NicHandle(self.shared.clone())
    }

    fn start(core: Core, clock: Clock) -> Result<Self, DomainError> {
        let control = Mutex::new(Control::default());
        let shared = Arc::new(Shared { core: Mutex::new(core), control, wake: Condvar::new(), clock });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("guest".into())
            .spawn(move || theirs.run())
            .map_err(|error| DomainError::BadConfig(format!("cannot start the guest's thread: {error}")))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The machine of a suspended guest.
    fn stopped(&self) -> Result<MutexGuard<'_, Core>, DomainError> {
        let core = self.shared.core()?;
        if self.shared.control()?.running { Err(DomainError::NotSuspended) } else { Ok(core) }
    }
}

impl Shared {
    // A lock is poisoned when the guest's thread panicked, in the transmit sink or the disk: the guest is gone.
    fn core(&self) -> Result<MutexGuard<'_, Core>, DomainError> {
        self.core.lock().map_err(|_| DomainError::Gone)
    }

    fn control(&self) -> Result<MutexGuard<'_, Control>, DomainError> {
        self.control.lock().map_err(|_| DomainError::Gone)
    }

    fn run(&self) {
        let mut due = None;
        while self.wait(due).is_ok_and(|go_on| go_on) {
            match self.step() {
                Ok(next) => due = next,
                Err(_) => return,
            }
        }
    }

    /// Sleeps until there is something to do; false when the thread must end.
    fn wait(&self, due: Option<Instant>) -> Result<bool, DomainError> {
        let mut control = self.control()?;
        loop {
            let now = (self.clock)();
            if control.quit {
                return Ok(false);
            }
            if control.running && (control.poked || !control.inbox.is_empty() || due.is_some_and(|at| at <= now)) {
                control.poked = false;
                return Ok(true);
            }
            control = match due.filter(|_| control.running) {
                Some(at) => self.wake.wait_timeout(control, at - now).map_err(|_| DomainError::Gone)?.0,
                None => self.wake.wait(control).map_err(|_| DomainError::Gone)?,
            };
        }
    }

    /// One step, unless the guest was suspended in the meantime; says when the next is due.
    fn step(&self) -> Result<Option<Instant>, DomainError> {
        let mut guard = self.core()?;
        let core = &mut *guard;
        {
            let mut control = self.control()?;
            if !control.running {
                // The poke or the timer that led here is not lost: `resume` pokes.
                return Ok(None);
            }
            fill_ring(&mut core.machine, &mut control.inbox);
        }
        core.machine.step((self.clock)(), &mut *core.disk, &mut *core.transmit);
        Ok(core.machine.poll_timeout())
    }

    fn receive_frame(&self, frame: &[u8]) -> bool {
        let Ok(mut control) = self.control() else { return false };
        if control.inbox.len() >= FRAMES_MAX {
            return false;
        }
        control.inbox.push_back(frame.to_vec());
        drop(control);
        self.wake.notify_one();
        true
    }
}

/// Moves frames from the inbox to the ring until one is empty or the other full.
fn fill_ring(machine: &mut Machine, inbox: &mut VecDeque<Vec<u8>>) {
    while inbox.front().is_some_and(|frame| machine.receive(frame)) {
        inbox.pop_front();
    }
}

impl NicHandle {
    /// Puts a frame from the network on the guest's receive ring; false when the ring is full.
    #[must_use]
    pub fn receive_frame(&self, frame: &[u8]) -> bool {
        self.0.receive_frame(frame)
    }
}

impl Domain for Embedded {
    fn nr_pages(&self) -> u64 {
        self.shared.core().map_or(0, |core| core.machine.ram().nr_pages())
    }

    fn suspend(&mut self) -> Result<(), DomainError> {
        self.shared.control()?.running = false;
        // Whoever holds the core now is in the last step; the next one would see that it must not start.
        drop(self.shared.core()?);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DomainError> {
        let mut control = self.shared.control()?;
        (control.running, control.poked) = (true, true);
        drop(control);
        self.shared.wake.notify_one();
        Ok(())
    }

    fn logdirty(&mut self, on: bool) -> Result<(), DomainError> {
        self.shared.core()?.machine.ram_mut().logdirty(on);
        Ok(())
    }

    fn take_dirty(&mut self, into: &mut Bitmap) -> Result<(), DomainError> {
        self.shared.core()?.machine.ram_mut().take_dirty(into);
        Ok(())
    }

    fn read_pages(&mut self, pfns: &[Pfn], into: &mut Vec<u8>) -> Result<(), DomainError> {
        self.shared.core()?.machine.ram().read_pages(pfns, into)
    }

    fn write_pages(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Result<(), DomainError> {
        self.shared.core()?.machine.ram_mut().write_pages(pfns, bytes)
    }

    fn save_devices(&mut self) -> Result<Vec<u8>, DomainError> {
        let mut core = self.stopped()?;
        fill_ring(&mut core.machine, &mut self.shared.control()?.inbox);
        Ok(core.machine.save_devices((self.shared.clock)()))
    }

    fn check_devices(&self, run: &[u8]) -> Result<(), DomainError> {
        self.shared.core()?.machine.check_devices(run)
    }

    fn load_devices(&mut self, run: &[u8]) -> Result<(), DomainError> {
        self.stopped()?.machine.load_devices((self.shared.clock)(), run)
    }

    fn set_generation(&mut self, generation: u64) -> Result<(), DomainError> {
        self.shared.core()?.machine.set_generation(generation);
        self.shared.control()?.poked = true;
        self.shared.wake.notify_one();
        Ok(())
    }

    fn receive_frame(&mut self, frame: &[u8]) -> bool {
        self.shared.receive_frame(frame)
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if let Ok(mut control) = self.shared.control() {
            control.quit = true;
        }
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so on its own.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_step_that_was_about_to_start_does_not_start_after_a_suspend() {
        let config =
            MachineConfig { ram_pages: 256, mac: [2; 6], ip: [1; 4], diverge_percent: 0, host_entropy_seed: 1 };
        let (send, frames) = mpsc::channel();
        let transmit = Box::new(move |frame: &[u8]| drop(send.send(frame.to_vec())));
        let disk = Box::new(MemoryDisk::new(1 << 16));
        let mut guest = Embedded::boot(&config, disk, Arc::new(|| Instant::ZERO), transmit).unwrap();
        guest.set_generation(1).unwrap();
        let core = guest.shared.core().unwrap();
        guest.shared.control().unwrap().running = true;
        guest.shared.wake.notify_one();
        // The thread takes the poke and then waits for the core: the moment a suspend can come in between.
        while guest.shared.control().unwrap().poked {
            std::thread::yield_now();
        }
        guest.shared.control().unwrap().running = false;
        drop(core);
        guest.suspend().unwrap();
        assert!(frames.recv_timeout(Duration::from_millis(50)).is_err(), "it announced itself while suspended");
        guest.resume().unwrap();
        assert!(frames.recv_timeout(Duration::from_secs(10)).is_ok(), "nothing was lost either");
    }
}
