//! The short lives of a guest's two images, cut at every write and every flush of either, and looked at by the next
//! process: [`super::crash_tests`] for what only shows between two.
//!
//! ```text
//!  history:  a beginning, then up to three operations, each of one disk or of both; a kill inside the first ones; a flush
//!            of an image, a record or its name that fails, or a write of one of the former
//!  cut:      before and after each call to either image or either record
//!  medium:   of each image and each record what may have arrived, whatever has of the other's
//! ```
//!
//! Two things are held against each medium: what a record says is true of its image, byte for byte; and images that a
//! guest would be booted on are one checkpoint of both, or both the guest's own with all it flushed.

use super::base::{LentCopy, LentFlush, LentRecord};
use super::crash_hardware::{Arrived, Event, Fate, Hardware, Image, Machine, Medium, Record, standing};
use super::epochs::{Replica, ReplicaConfig, Stage};
use super::set::Replicas;
use super::state::{Standing, State, StateFile};
use super::take_up::{Taken, take_up_states};
use crate::disk::Disk;
use crate::mutant::{self, Mutant};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

const DISKS: usize = 2;

type Images = [Image; DISKS];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    Sync,
    Primary(usize),
    Guest(usize),
    GuestFlush(usize),
    Seal,
    Apply(u64),
    /// A round of both is copied and flushed, and its words are lent.
    Words,
    /// The word of one is said, and its round ends.
    Say(usize),
    Takeover,
    Stop,
    /// A guest is booted on the images.
    Boot,
    Kill,
    PowerCut {
        everything: bool,
    },
}

const OPS: [Op; 19] = [
    Op::Sync,
    Op::Primary(0),
    Op::Primary(1),
    Op::Guest(0),
    Op::Guest(1),
    Op::GuestFlush(0),
    Op::GuestFlush(1),
    Op::Seal,
    Op::Apply(1),
    Op::Apply(u64::MAX),
    Op::Words,
    Op::Say(0),
    Op::Say(1),
    Op::Takeover,
    Op::Stop,
    Op::Boot,
    Op::Kill,
    Op::PowerCut { everything: false },
    Op::PowerCut { everything: true },
];

/// An operation, and what becomes of its calls.
type Act = (Op, Fate);

/// What a guest must find right after an operation returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Must {
    #[default]
    Anything,
    Resync,
    Checkpoint(Images),
    Guest,
}

/// What may be on the media.
#[derive(Clone, Default)]
struct Model {
    generation: u64,
    primary: Images,
    guest: Images,
    taken: bool,
    /// The guest that took over has its own disks.
    settled: bool,
    checkpoints: HashMap<(u64, u64), Images>,
    latest: Option<Images>,
    /// What a guest flushed last of each disk, and what it wrote since.
    floor: [Option<Image>; DISKS],
    since: [Vec<(usize, u8)>; DISKS],
    /// There must be records.
    recorded: bool,
    must: Must,
}

impl Model {
    fn flushed(&mut self, disk: usize, image: Image) {
        self.floor[disk] = Some(image);
        self.since[disk].clear();
    }

    fn all_flushed(&mut self, images: Images) {
        (0..DISKS).for_each(|disk| self.flushed(disk, images[disk]));
    }

    /// Whether a record tells the truth about its image.
    fn is_true(&self, disk: usize, image: Image, standing: Standing) -> bool {
        let is_flushed = |(at, byte): (usize, &u8)| {
            self.floor[disk].is_some_and(|floor| floor[at] == *byte) || self.since[disk].contains(&(at, *byte))
        };
        match standing {
            Standing::Resync(_) => true,
            Standing::Checkpoint { generation, number, .. } => {
                self.checkpoints.get(&(generation, number)).is_some_and(|images| images[disk] == image)
            }
            Standing::Guest | Standing::NoRecord => {
                let is_known = standing == Standing::Guest || !self.recorded;
                is_known && self.floor[disk].is_some() && image.iter().enumerate().all(is_flushed)
            }
        }
    }

    /// Looks at all that may be on the media; how many of them a guest would be booted on, and how many not.
    fn check(&self, media: &[Medium; DISKS]) -> Result<(u64, u64), String> {
        let images = [media[0].images(), media[1].images()];
        let records = [media[0].records(), media[1].records()];
        for disk in 0..DISKS {
            for record in &records[disk] {
                let standing = standing(record.clone());
                let wrong = images[disk].iter().find(|image| !self.is_true(disk, **image, standing));
                if let Some(image) = wrong {
                    return Err(format!("disk{disk}: {standing}, with {image:?}"));
                }
            }
        }
        let (mut booted, mut refused) = (0, 0);
        for first in &records[0] {
            for second in &records[1] {
                let both = [first.clone(), second.clone()];
                let standings = both.clone().map(standing);
                if !is_bootable(&both) {
                    refused += 1;
                    if !matches!(self.must, Must::Anything | Must::Resync) {
                        return Err(format!("{standings:?}; the operation's end: {:?}", self.must));
                    }
                    continue;
                }
                booted += 1;
                let is_guests = |standing| matches!(standing, Standing::Guest | Standing::NoRecord);
                let is_right = match self.must {
                    Must::Anything => standings[0] == standings[1] || standings.into_iter().all(is_guests),
                    Must::Resync => false,
                    Must::Checkpoint(wanted) => {
                        standings[0] == standings[1]
                            && (0..DISKS).all(|disk| images[disk].iter().all(|image| *image == wanted[disk]))
                    }
                    Must::Guest => standings.into_iter().all(is_guests),
                };
                if !is_right {
                    return Err(format!("{standings:?} of {images:?}; the operation's end: {:?}", self.must));
                }
            }
        }
        Ok((booted, refused))
    }
}

/// Whether a guest would be booted on images with these records.
fn is_bootable(records: &[Record; DISKS]) -> bool {
    let hardware = Hardware { records: records.clone(), ..Hardware::default() };
    take_up(&Arc::new(Mutex::new(hardware))).is_ok()
}

fn take_up(hardware: &Arc<Mutex<Hardware<DISKS>>>) -> Result<(), ()> {
    let open = |disk| State::open(Box::new(Machine::of(disk, hardware))).unwrap();
    let image = |disk| Some(Box::new(Machine::of(disk, hardware)) as Box<dyn Disk>);
    let mut taken = [0, 1].map(|disk| Taken { state: open(disk), image: image(disk) });
    take_up_states(&mut taken, false).map_err(drop)
}

/// One history as it runs.
struct Run {
    hardware: Arc<Mutex<Hardware<DISKS>>>,
    model: Model,
    replicas: Option<Replicas>,
    /// Words that are lent.
    words: [Option<LentRecord>; DISKS],
    /// The checkpoint they are of, the generation, how often the images had been written, and who has said it.
    round: (Option<Images>, (u64, u64), [bool; DISKS]),
    booted: bool,
    byte: u8,
}

impl Run {
    fn new() -> Self {
        let model = Model { floor: [Some(Image::default()); DISKS], ..Model::default() };
        let (hardware, words, round) = Default::default();
        Self { hardware, model, replicas: None, words, round, booted: false, byte: 0 }
    }

    fn get(&self) -> MutexGuard<'_, Hardware<DISKS>> {
        self.hardware.lock().unwrap()
    }

    /// Does one operation. The calls it made; `None` when it makes no sense now.
    fn act(&mut self, (op, fate): Act) -> Option<Vec<(usize, Event)>> {
        let lives = self.booted || self.replicas.is_some();
        let makes_sense = match op {
            Op::Sync => !self.booted,
            Op::Boot => !lives,
            Op::Guest(_) | Op::GuestFlush(_) | Op::Kill => lives,
            Op::PowerCut { .. } => true,
            Op::Words => self.replicas.is_some() && self.words.iter().all(Option::is_none),
            Op::Say(disk) => self.words[disk].is_some(),
            _ => self.replicas.is_some(),
        };
        if !makes_sense {
            return None;
        }
        self.model = self.during(op);
        self.byte += 1;
        self.get().fate = fate;
        let before = self.model.clone();
        self.whole(op);
        if let Fate::KilledAfter(_) = fate {
            self.model = Model { taken: false, settled: false, ..before };
            self.end();
        }
        let events = std::mem::take(&mut self.get().log);
        if let Op::PowerCut { everything } = op {
            self.power_cut(everything);
        }
        Some(events)
    }

    /// What may be found when the operation is cut.
    fn during(&self, op: Op) -> Model {
        let mut model = Model { must: Must::Anything, ..self.model.clone() };
        if model.taken && !model.settled {
            model.all_flushed(model.guest);
        }
        let visible = self.get();
        match op {
            Op::Guest(disk) if model.taken || self.booted => {
                model.since[disk].extend([(2, self.byte + 1), (3, self.byte + 1)]);
            }
            Op::Boot => {
                for disk in 0..DISKS {
                    if matches!(standing(visible.records[disk].clone()), Standing::Checkpoint { .. }) {
                        model.flushed(disk, visible.images[disk]);
                    }
                }
            }
            _ => {}
        }
        model
    }

    fn end(&mut self) {
        (self.replicas, self.words) = Default::default();
        self.booted = false;
        // The record of the guest may have arrived, though nobody was told so.
        if self.model.taken && !self.model.settled && !self.get().any_failed {
            self.model.floor = [None; DISKS];
        }
        self.get().end_process();
        (self.model.taken, self.model.settled) = (false, false);
    }

    fn whole(&mut self, op: Op) {
        let byte = self.byte;
        let model = &mut self.model;
        match op {
            Op::Kill | Op::PowerCut { .. } => return self.end(),
            Op::Boot => {
                if take_up(&self.hardware).is_ok() {
                    self.booted = true;
                    model.guest = self.hardware.lock().unwrap().images;
                    model.checkpoints.clear();
                    model.must = Must::Guest;
                }
                return;
            }
            // As an image's file does it by itself.
            Op::Guest(disk) | Op::GuestFlush(disk) if self.booted && self.hardware.lock().unwrap().failed[disk] => {
                return;
            }
            Op::Guest(disk) if self.booted => {
                if Disk::write(&mut Machine::of(disk, &self.hardware), 2, &[byte; 2]).is_ok() {
                    model.guest[disk][2..4].fill(byte);
                } else {
                    // It reads what it is left with.
                    model.guest[disk] = self.hardware.lock().unwrap().images[disk];
                }
                return;
            }
            Op::GuestFlush(disk) if self.booted => {
                if Machine::of(disk, &self.hardware).flush().is_ok() {
                    model.flushed(disk, model.guest[disk]);
                    model.must = Must::Guest;
                }
                return;
            }
            _ => {}
        }
        let replicas = self.replicas.get_or_insert_with(|| {
            let image = |disk| -> (Box<dyn Disk>, Box<dyn StateFile>) {
                let machine = Machine::of(disk, &self.hardware);
                (Box::new(machine.clone()), Box::new(machine))
            };
            Replicas::open((0..DISKS).map(image).collect(), 7, ReplicaConfig::default()).unwrap()
        });
        let on = |disk: usize, does: &dyn Fn(&mut Replica) -> bool| does(&mut replicas.disks()[disk].lock().unwrap());
        let generation = model.generation;
        let stage = replicas.status()[0].stage;
        // Else it has nothing to do, and promises nothing.
        let lives = matches!(stage, Stage::Syncing | Stage::Running);
        let calls = self.hardware.lock().unwrap().log.len();
        match op {
            Op::Sync => {
                if replicas.start_sync(generation + 1).is_ok() {
                    model.generation += 1;
                    model.primary = self.hardware.lock().unwrap().images;
                    model.checkpoints.clear();
                    (model.latest, model.floor, model.recorded) = (None, [None; DISKS], true);
                    model.must = Must::Resync;
                }
            }
            Op::Primary(disk) => {
                if on(disk, &|replica| replica.primary_write(generation, 0, &[byte; 2]).is_ok()) {
                    model.primary[disk][..2].fill(byte);
                }
            }
            Op::Guest(disk) => {
                if on(disk, &|replica| replica.guest_write(2, &[byte; 2]).is_ok()) {
                    model.guest[disk][2..4].fill(byte);
                } else {
                    let _ = replicas.disks()[disk].lock().unwrap().guest_read(0, &mut model.guest[disk]);
                }
            }
            Op::GuestFlush(disk) => {
                if on(disk, &|replica| replica.guest_flush().is_ok()) && model.taken {
                    model.flushed(disk, model.guest[disk]);
                    model.must = Must::Guest;
                }
            }
            Op::Seal => {
                if replicas.seal().is_ok() && lives {
                    model.checkpoints.insert((generation, replicas.status()[0].seals), model.primary);
                    (model.latest, model.guest) = (Some(model.primary), model.primary);
                }
            }
            Op::Apply(bytes) => {
                let mut applied = replicas.apply_some(bytes);
                while bytes == u64::MAX && matches!(applied, Ok(true)) {
                    applied = replicas.apply_some(bytes);
                }
                if applied.is_ok_and(|more| !more) && (lives || model.taken) {
                    model.must =
                        if model.taken { Must::Guest } else { model.latest.map_or(Must::Resync, Must::Checkpoint) };
                }
            }
            Op::Words => {
                for disk in replicas.disks() {
                    let mut replica = disk.lock().unwrap();
                    if !replica.is_in_round() {
                        replica.begin_round();
                    }
                }
                self.round = Default::default();
                for (replica, word) in replicas.disks().iter().zip(&mut self.words) {
                    let mut replica = replica.lock().unwrap();
                    let mut copied = Ok(true);
                    while matches!(copied, Ok(true)) {
                        copied = match replica.lend_copy().map(LentCopy::carry_out) {
                            Some(mut ended) => replica.copy_ended(&mut ended),
                            None => replica.copy_round(1),
                        };
                    }
                    let flushed = replica.lend_flush().map(LentFlush::carry_out);
                    *word = replica.lend_record(flushed).ok().flatten();
                }
                if self.words.iter().all(Option::is_some) {
                    let writes = self.hardware.lock().unwrap().writes;
                    self.round = (model.latest, (generation, writes), [false; DISKS]);
                }
            }
            Op::Say(disk) => {
                let Some(word) = self.words[disk].take() else { return };
                let said = word.carry_out();
                let is_said = said.is_ok() && !self.hardware.lock().unwrap().any_failed;
                on(disk, &|replica| replica.end_round(Some(Ok(()))).is_ok());
                self.round.2[disk] = is_said;
                let now = (generation, self.hardware.lock().unwrap().writes);
                if let (Some(latest), [true, true]) = (self.round.0, self.round.2)
                    && stage == Stage::Running
                    && self.round.1 == now
                {
                    model.must = Must::Checkpoint(latest);
                }
            }
            Op::Takeover => {
                let taken = model.taken;
                model.taken |= replicas.takeover(generation + 1).is_ok();
                let mut hardware = self.hardware.lock().unwrap();
                hardware.went_on |= hardware.failed.contains(&true) && model.taken && !taken;
            }
            Op::Stop => {
                if replicas.stop().is_ok() && lives && !model.taken {
                    model.must = model.latest.map_or(Must::Resync, Must::Checkpoint);
                }
            }
            Op::Boot | Op::Kill | Op::PowerCut { .. } => unreachable!("done above"),
        }
        if matches!(op, Op::Seal | Op::Takeover) {
            assert_eq!(self.hardware.lock().unwrap().log.len(), calls, "{op:?} touches nothing");
        }
        if model.taken && !model.settled && replicas.status()[0].standing == Standing::Guest {
            model.settled = true;
            model.all_flushed(model.guest);
            model.checkpoints.clear();
        }
    }

    fn power_cut(&mut self, everything: bool) {
        for disk in 0..DISKS {
            let medium = self.get().media[disk].cut(everything);
            let record = medium.record();
            match standing(record.clone()) {
                Standing::Guest | Standing::NoRecord => self.model.flushed(disk, medium.image),
                Standing::Checkpoint { .. } | Standing::Resync(_) => self.model.floor[disk] = None,
            }
            let mut hardware = self.hardware.lock().unwrap();
            (hardware.images[disk], hardware.records[disk], hardware.media[disk]) = (medium.image, record, medium);
        }
    }
}

#[derive(Clone, Copy, Default, Debug)]
struct Found {
    histories: u64,
    cuts: u64,
    booted: u64,
    refused: u64,
    failed: u64,
}

/// Runs a history, and cuts its last operation everywhere. The calls of that one; `None` when it makes no sense.
fn run(before: &[Act], last: Act, found: &mut Found) -> Result<Option<Vec<Event>>, String> {
    let mut run = Run::new();
    for act in before {
        if run.act(*act).is_none() {
            return Ok(None);
        }
    }
    let mut media = run.get().media.clone();
    let during = run.during(last.0);
    let Some(events) = run.act(last) else { return Ok(None) };
    found.histories += 1;
    found.failed += u64::from(matches!(last.1, Fate::FailsAfter(..)));
    if run.get().went_on {
        return Err(format!("it went on with an image whose flush had failed: {before:?}, {last:?}"));
    }
    let after = run.get().media.clone();
    for (made, event) in events.iter().map(Some).chain([None]).enumerate() {
        found.cuts += 1;
        let (model, media_now) = if event.is_some() { (&during, &media) } else { (&run.model, &after) };
        let (booted, refused) = model
            .check(media_now)
            .map_err(|wrong| format!("{wrong}\n after {made} calls of the last of {before:?}, {last:?}"))?;
        (found.booted, found.refused) = (found.booted + booted, found.refused + refused);
        event.iter().for_each(|(disk, event)| media[*disk].take(event));
    }
    Ok(Some(events.into_iter().map(|(_, event)| event).collect()))
}

/// Where histories begin: images of all standings, level and not, before and after a takeover.
fn beginnings() -> Vec<Vec<Act>> {
    let after = |beginning: &[Op], ops: &[Op]| [beginning, ops].concat();
    let all = Op::Apply(u64::MAX);
    let whole = after(&[], &[Op::Sync, Op::Primary(0), Op::Primary(1), Op::Seal, all]);
    let second_behind = after(&whole, &[Op::Primary(1), Op::Seal]);
    let epochs = [Op::Primary(0), Op::Seal, Op::Primary(0), Op::Primary(1), Op::Seal, Op::Guest(0), Op::Guest(1)];
    let behind = after(&whole, &epochs);
    let uneven = after(&behind, &[Op::Apply(1)]);
    let taken_over = after(&behind, &[Op::Takeover]);
    let beginnings = vec![
        vec![],
        after(&whole, &[Op::Kill, Op::Boot]),
        after(&uneven, &[Op::Kill]),
        after(&uneven, &[Op::Takeover]),
        after(&second_behind, &[Op::Takeover, Op::Guest(0)]),
        after(&taken_over, &[Op::Apply(1)]),
        after(&taken_over, &[all]),
        whole,
        second_behind,
        behind,
        uneven,
        taken_over,
    ];
    beginnings.into_iter().map(|ops| ops.into_iter().map(|op| (op, Fate::Whole)).collect()).collect()
}

/// Every history of up to `left` more operations; in each, one call at most fails.
fn explore(before: &mut Vec<Act>, left: usize, found: &mut Found) -> Result<(), String> {
    let has_failed = before.iter().any(|(_, fate)| matches!(fate, Fate::FailsAfter(..)));
    for op in OPS {
        let Some(events) = run(before, (op, Fate::Whole), found)? else { continue };
        let mut fates = vec![Fate::Whole];
        for (calls, event) in events.iter().enumerate().filter(|_| !has_failed) {
            // Of a flush nothing has arrived, of a write a part was written: less than either is like no call at all.
            let fate = Fate::FailsAfter(calls, if event.is_flush() { Arrived::Nothing } else { Arrived::Some });
            run(before, (op, fate), found)?;
            fates.push(fate);
        }
        fates.extend((1..events.len()).map(Fate::KilledAfter));
        for fate in fates.into_iter().filter(|_| left > 1) {
            before.push((op, fate));
            let explored = explore(before, left - 1, found);
            before.pop();
            explored?;
        }
    }
    Ok(())
}

fn explore_all() -> Result<Found, String> {
    let mut found = Found::default();
    for mut beginning in beginnings() {
        explore(&mut beginning, 3, &mut found)?;
    }
    Ok(found)
}

#[test]
fn a_crash_at_any_instant_leaves_one_checkpoint_of_both_or_the_word_that_there_is_none() {
    let found = explore_all().unwrap_or_else(|wrong| panic!("{wrong}"));
    eprintln!("{found:?}");
    let Found { histories, cuts, booted, refused, failed } = found;
    assert!(histories > 20_000 && cuts > 50_000 && booted > 15_000 && refused > 100_000, "{found:?}");
    assert!(failed > 5_000, "{found:?}");
}

#[test]
fn the_planted_bugs_are_seen() {
    for bug in Mutant::OF_SETS {
        mutant::plant(Some(bug));
        let seen = explore_all();
        mutant::plant(None);
        eprintln!("{bug:?}: {}", seen.expect_err("it was not seen"));
    }
}
