//! The computer that [`super::crash_tests`] and [`super::crash_set_tests`] crash: images with a record beside each.
//!
//! ```text
//!   process ── call ─▶ what a process sees (the page cache)   and, as events,  ─▶ Medium: what survives a power cut,
//!                └─ the fuse burns: killed, here                                    and what may
//! ```
//!
//! The trap: what a call has done is visible at once and durable only after a flush, and of what is unflushed each byte
//! may have arrived by itself. So the two are kept apart, and a medium is every one it may be.

use super::state::{Standing, State, StateFile};
use crate::disk::{Disk, DiskError};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes of an image.
pub(super) const SIZE: usize = 4;
/// Unflushed bytes of which every subset is tried; of more, none, all, and all or none but one.
const SUBSETS_MAX: usize = 5;

pub(super) type Image = [u8; SIZE];
pub(super) type Record = Option<Vec<u8>>;

/// A call that reaches the operating system.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Write(usize, Vec<u8>),
    Flush,
    Record(Vec<u8>),
    RecordSync,
    DirSync,
}

/// What a process sees of its disks, and what it did to which.
pub(super) struct Hardware<const DISKS: usize> {
    pub(super) images: [Image; DISKS],
    pub(super) records: [Record; DISKS],
    pub(super) log: Vec<(usize, Event)>,
    /// Calls until the process is killed.
    pub(super) fuse: Option<usize>,
}

impl<const DISKS: usize> Default for Hardware<DISKS> {
    fn default() -> Self {
        Self { images: [[0; SIZE]; DISKS], records: [const { None }; DISKS], log: Vec::new(), fuse: None }
    }
}

/// A disk of the computer, and the record beside it.
#[derive(Clone)]
pub(super) struct Machine<const DISKS: usize> {
    disk: usize,
    hardware: Arc<Mutex<Hardware<DISKS>>>,
}

impl<const DISKS: usize> Machine<DISKS> {
    pub(super) fn of(disk: usize, hardware: &Arc<Mutex<Hardware<DISKS>>>) -> Self {
        Self { disk, hardware: hardware.clone() }
    }

    pub(super) fn get(&self) -> MutexGuard<'_, Hardware<DISKS>> {
        self.hardware.lock().unwrap()
    }

    fn call(&self, event: Event) -> Result<(), DiskError> {
        let mut hardware = self.get();
        match &mut hardware.fuse {
            Some(0) => return Err(DiskError::io("a dead process", io::Error::other("killed"))),
            Some(left) => *left -= 1,
            None => {}
        }
        match &event {
            Event::Write(at, bytes) => hardware.images[self.disk][*at..at + bytes.len()].copy_from_slice(bytes),
            Event::Record(record) => hardware.records[self.disk] = Some(record.clone()),
            _ => {}
        }
        hardware.log.push((self.disk, event));
        Ok(())
    }
}

impl<const DISKS: usize> Disk for Machine<DISKS> {
    fn size_bytes(&self) -> u64 {
        SIZE as u64
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        into.copy_from_slice(&self.get().images[self.disk][offset as usize..][..into.len()]);
        Ok(())
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.call(Event::Write(offset as usize, bytes.to_vec()))
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.call(Event::Flush)
    }
}

impl<const DISKS: usize> StateFile for Machine<DISKS> {
    fn read(&mut self) -> Result<Record, DiskError> {
        Ok(self.get().records[self.disk].clone())
    }
    fn write(&mut self, record: &[u8]) -> Result<(), DiskError> {
        self.call(Event::Record(record.to_vec()))
    }
    fn sync(&mut self) -> Result<(), DiskError> {
        self.call(Event::RecordSync)
    }
    fn sync_dir(&mut self) -> Result<(), DiskError> {
        self.call(Event::DirSync)
    }
}

/// What a process would make of a record.
pub(super) fn standing(record: Record) -> Standing {
    let machine = Machine::<1>::of(0, &Arc::default());
    machine.get().records[0] = record;
    State::open(Box::new(machine)).unwrap().standing()
}

/// What survives a power cut, and what may.
#[derive(Clone, Default)]
pub(super) struct Medium {
    pub(super) image: Image,
    unflushed: Vec<(usize, u8)>,
    record: Vec<u8>,
    unsynced: Vec<Vec<u8>>,
    created: bool,
    named: bool,
}

impl Medium {
    pub(super) fn take(&mut self, event: &Event) {
        match event {
            Event::Write(at, bytes) => self.unflushed.extend(bytes.iter().enumerate().map(|(i, byte)| (at + i, *byte))),
            Event::Flush => self.unflushed.drain(..).for_each(|(at, byte)| self.image[at] = byte),
            Event::Record(record) => {
                self.created = true;
                self.unsynced.push(record.clone());
            }
            Event::RecordSync => self.unsynced.drain(..).for_each(|record| self.record = record),
            Event::DirSync => self.named = self.created,
        }
    }

    /// The image when of the unflushed bytes those arrived whose bit is set.
    fn arrived(&self, mask: usize) -> Image {
        let mut image = self.image;
        let arrived = self.unflushed.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1);
        arrived.for_each(|(_, (at, byte))| image[*at] = *byte);
        image
    }

    pub(super) fn images(&self) -> Vec<Image> {
        let count = self.unflushed.len();
        let all = (1_usize << count) - 1;
        let ones = || (0..count).map(|i| 1 << i);
        let masks: Vec<usize> = match count {
            0..=SUBSETS_MAX => (0..=all).collect(),
            _ => [0, all].into_iter().chain(ones()).chain(ones().map(|one| all ^ one)).collect(),
        };
        let mut images: Vec<_> = masks.into_iter().map(|mask| self.arrived(mask)).collect();
        images.sort_unstable();
        images.dedup();
        images
    }

    pub(super) fn records(&self) -> Vec<Option<Vec<u8>>> {
        let mut records = vec![self.record.clone()];
        for new in &self.unsynced {
            let torn = [1, 20, 29, 35].map(|at| [&new[..at], self.record.get(at..).unwrap_or_default()].concat());
            records.extend(torn);
            records.push(new.clone());
        }
        let mut records: Vec<_> = records.into_iter().filter(|_| self.created).map(Some).collect();
        records.extend((!self.named).then_some(None));
        records
    }

    /// What is there after a power cut.
    pub(super) fn record(&self) -> Option<Vec<u8>> {
        self.created.then(|| self.record.clone())
    }

    /// After the power cut, with nothing or everything of what was unflushed.
    pub(super) fn cut(&self, everything: bool) -> Self {
        let mut medium = self.clone();
        if everything {
            [Event::Flush, Event::RecordSync, Event::DirSync].iter().for_each(|event| medium.take(event));
        }
        let record = if medium.named { medium.record } else { vec![] };
        Self { image: medium.image, record, created: medium.named, named: medium.named, ..Self::default() }
    }
}
