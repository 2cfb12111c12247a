//! The computer that [`super::crash_tests`] and [`super::crash_set_tests`] crash: images with a record beside each.
//!
//! ```text
//!   process ── call ─▶ what a process sees (the page cache)   and, as events,  ─▶ Medium: what survives a power cut,
//!                └─ the fuse burns: killed, here                                    and what may
//! ```
//!
//! The trap: what a call has done is visible at once and durable only after a flush, and of what is unflushed each byte
//! may have arrived by itself. So the two are kept apart, and a medium is every one it may be. A flush that fails settles
//! it: some of it has arrived, and the rest never will, however often it is flushed again; but the page cache goes on
//! showing all of it until it is dropped.

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
    /// A flush that failed, of whichever kind.
    Failed(Box<Event>, Arrived),
    /// A write that failed, and what of it was done, if anything.
    Refused(Option<Box<Event>>),
}

impl Event {
    /// Whether it could fail and leave behind what nobody sees.
    pub(super) fn is_flush(&self) -> bool {
        matches!(self, Self::Flush | Self::RecordSync | Self::DirSync)
    }

    /// How much of it may be done when it fails. Of a write, all of it is none that fails.
    pub(super) fn failures(&self) -> &'static [Arrived] {
        if self.is_flush() { &Arrived::ALL } else { &Arrived::ALL[..2] }
    }

    /// What a write has done that failed: a byte of an image, half of a record over the old one.
    fn refused(self, arrived: Arrived, old: &Record) -> Self {
        let done = match self {
            Self::Write(at, bytes) => Self::Write(at, bytes[..1].to_vec()),
            Self::Record(new) => Self::Record(half(&new, old.as_deref().unwrap_or_default())),
            other => other,
        };
        Self::Refused((arrived == Arrived::Some).then(|| Box::new(done)))
    }
}

/// A record of which the first half was written.
fn half(new: &[u8], old: &[u8]) -> Vec<u8> {
    torn(new, old, 20)
}

/// How much of what a failed flush covered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrived {
    Nothing,
    /// The first byte; of a record, half.
    Some,
    Everything,
}

impl Arrived {
    pub(super) const ALL: [Self; 3] = [Self::Nothing, Self::Some, Self::Everything];
}

/// What becomes of a process's calls.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Fate {
    #[default]
    Whole,
    /// It is killed after so many.
    KilledAfter(usize),
    /// The flush or write after so many fails.
    FailsAfter(usize, Arrived),
}

/// What a process sees of its disks, and what it did to which.
pub(super) struct Hardware<const DISKS: usize> {
    pub(super) images: [Image; DISKS],
    pub(super) records: [Record; DISKS],
    pub(super) media: [Medium; DISKS],
    pub(super) log: Vec<(usize, Event)>,
    pub(super) fate: Fate,
    /// A flush of this image has failed in this process.
    pub(super) failed: [bool; DISKS],
    /// Or one of anything.
    pub(super) any_failed: bool,
    /// It was written or flushed again all the same, or taken over on.
    pub(super) went_on: bool,
    /// Writes to any image, ever.
    pub(super) writes: u64,
}

impl<const DISKS: usize> Hardware<DISKS> {
    /// The process is gone; its page cache is not.
    pub(super) fn end_process(&mut self) {
        (self.fate, self.failed, self.any_failed) = (Fate::Whole, [false; DISKS], false);
    }
}

impl<const DISKS: usize> Default for Hardware<DISKS> {
    fn default() -> Self {
        let media = std::array::from_fn(|_| Medium::default());
        let (images, records) = ([[0; SIZE]; DISKS], [const { None }; DISKS]);
        let (log, failed) = (Vec::new(), [false; DISKS]);
        Self { images, records, media, log, fate: Fate::Whole, failed, any_failed: false, went_on: false, writes: 0 }
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
        let hardware = &mut *hardware;
        match &mut hardware.fate {
            Fate::KilledAfter(0) => return Err(DiskError::io("a dead process", io::Error::other("killed"))),
            Fate::FailsAfter(0, arrived) if !event.is_flush() => {
                let event = event.refused(*arrived, &hardware.records[self.disk]);
                (hardware.any_failed, hardware.fate) = (true, Fate::Whole);
                if let Event::Refused(Some(done)) = &event {
                    hardware.media[self.disk].take(done);
                    self.show(hardware, done);
                }
                hardware.log.push((self.disk, event));
                return Err(DiskError::io("a medium", io::Error::other("failed")));
            }
            Fate::FailsAfter(0, arrived) => {
                hardware.failed[self.disk] |= matches!(event, Event::Flush);
                hardware.any_failed = true;
                let event = Event::Failed(Box::new(event), *arrived);
                hardware.fate = Fate::Whole;
                hardware.media[self.disk].take(&event);
                hardware.log.push((self.disk, event));
                return Err(DiskError::io("a medium", io::Error::other("failed")));
            }
            Fate::KilledAfter(left) | Fate::FailsAfter(left, _) => *left -= 1,
            Fate::Whole => {}
        }
        hardware.went_on |= hardware.failed[self.disk] && matches!(event, Event::Write(..) | Event::Flush);
        hardware.media[self.disk].take(&event);
        self.show(hardware, &event);
        hardware.log.push((self.disk, event));
        Ok(())
    }

    /// In the page cache.
    fn show(&self, hardware: &mut Hardware<DISKS>, event: &Event) {
        match event {
            Event::Write(at, bytes) => {
                hardware.images[self.disk][*at..at + bytes.len()].copy_from_slice(bytes);
                hardware.writes += 1;
            }
            Event::Record(record) => hardware.records[self.disk] = Some(record.clone()),
            _ => {}
        }
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
    fn lend(&self) -> Option<Box<dyn Disk>> {
        Some(Box::new(self.clone()))
    }
    fn reread(&mut self) -> Result<(), DiskError> {
        let mut hardware = self.get();
        if hardware.fate != Fate::KilledAfter(0) {
            hardware.images[self.disk] = hardware.media[self.disk].seen();
        }
        Ok(())
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

/// The beginning of a new record, before the rest of the old one.
fn torn(new: &[u8], old: &[u8], at: usize) -> Vec<u8> {
    [&new[..at.min(new.len())], old.get(at..).unwrap_or_default()].concat()
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
            Event::Failed(flush, arrived) => self.fail(flush, *arrived),
            Event::Refused(done) => done.iter().for_each(|done| self.take(done)),
        }
    }

    /// What a failed flush has not brought here is gone.
    fn fail(&mut self, flush: &Event, arrived: Arrived) {
        match (flush, arrived) {
            (_, Arrived::Everything) => self.take(flush),
            (Event::Flush, _) => {
                let first = if arrived == Arrived::Some { 1 } else { 0 };
                self.unflushed.drain(..).take(first).for_each(|(at, byte)| self.image[at] = byte);
            }
            (Event::RecordSync, _) => {
                let new = self.unsynced.pop().filter(|_| arrived == Arrived::Some);
                self.unsynced.clear();
                self.record = new.map_or_else(|| self.record.clone(), |new| half(&new, &self.record));
            }
            _ => {}
        }
    }

    /// The image without what only a page cache remembers.
    fn seen(&self) -> Image {
        self.arrived(usize::MAX)
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
            records.extend([1, 20, 29, 35].map(|at| torn(new, &self.record, at)));
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
