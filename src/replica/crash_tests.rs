//! Every short life of an image, cut at every write and every flush, and looked at by the next process.
//!
//! ```text
//!  history:  a beginning, then up to three of: sync, write, flush, seal, apply, takeover, stop, boot,
//!            a round and its end, kill (the page cache stays), power cut (nothing, or everything unflushed arrived), a kill inside an operation,
//!            a flush of the image, its record or its name that fails (nothing, some or everything arrived), a write of either
//!            that does (nothing or a part was written), eviction
//!  cut:      before and after each call to the image and its record
//!  medium:   of what is unflushed, each byte may have arrived or not; a record may be torn, a new name missing
//! ```
//!
//! The model is whole images: the primary's disk at each checkpoint, and the guest's with what it flushed. Whatever is
//! left on the medium must be one of them, or say that it needs a resync; and where an operation promised that the
//! image is whole when it returned, a resync is wrong too. After a flush of the image failed, its process may neither write
//! nor flush it again, nor take over on it.

use super::base::{CopyEnded, FlushEnded, LentCopy, LentFlush, LentRecord};
use super::crash_hardware::{Arrived, Event, Fate, Image, Machine, Medium, standing};
use super::epochs::{Replica, ReplicaConfig, Stage};
use super::state::{Standing, State};
use super::take_up::{Taken, take_up_states};
use crate::disk::{Disk, Zeroing};
use crate::mutant::{self, Mutant};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    Sync,
    /// A write of the primary, here.
    Primary(usize),
    /// The primary zeroes one byte.
    PrimaryZero,
    PrimaryFlush,
    Guest,
    GuestFlush,
    Seal,
    Apply(u64),
    /// A round begins, if none is under way, and its next copy is carried out.
    Copy,
    /// The replica is told.
    EndCopy,
    /// All of a round is copied, and its flush carried out.
    Round,
    /// The word after it is lent.
    Word,
    /// It is said, and the round ends.
    EndRound,
    Takeover,
    Stop,
    /// A guest is booted on the image.
    Boot,
    Kill,
    /// The page cache forgets what is not to be written.
    Evict,
    PowerCut {
        everything: bool,
    },
}

const OPS: [Op; 22] = [
    Op::Sync,
    Op::Primary(0),
    Op::Primary(1),
    Op::PrimaryZero,
    Op::PrimaryFlush,
    Op::Guest,
    Op::GuestFlush,
    Op::Seal,
    Op::Apply(1),
    Op::Apply(u64::MAX),
    Op::Copy,
    Op::EndCopy,
    Op::Round,
    Op::Word,
    Op::EndRound,
    Op::Takeover,
    Op::Stop,
    Op::Boot,
    Op::Kill,
    Op::Evict,
    Op::PowerCut { everything: false },
    Op::PowerCut { everything: true },
];

/// An operation, and what becomes of its calls.
type Act = (Op, Fate);

/// What must be on the medium right after an operation returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Must {
    #[default]
    Anything,
    Resync,
    Checkpoint(Image),
    Guest,
}

/// What may be on the medium.
#[derive(Clone, Default)]
struct Model {
    generation: u64,
    primary: Image,
    guest: Image,
    taken: bool,
    /// The guest that took over has its own disk.
    settled: bool,
    checkpoints: HashMap<(u64, u64), Image>,
    latest: Option<Image>,
    /// What a guest flushed last, and what it wrote since.
    floor: Option<Image>,
    since: Vec<(usize, u8)>,
    /// There must be a record.
    recorded: bool,
    must: Must,
}

impl Model {
    fn flushed(&mut self, image: Image) {
        self.floor = Some(image);
        self.since.clear();
    }

    fn check(&self, image: Image, record: Option<Vec<u8>>) -> Result<Standing, String> {
        let standing = standing(record);
        let is_flushed = |(at, byte): (usize, &u8)| {
            self.floor.is_some_and(|floor| floor[at] == *byte) || self.since.contains(&(at, *byte))
        };
        let right = match standing {
            Standing::Resync(_) => matches!(self.must, Must::Anything | Must::Resync),
            Standing::Checkpoint { generation, number, .. } => {
                let is_checkpoint = self.checkpoints.get(&(generation, number)) == Some(&image);
                is_checkpoint && (self.must == Must::Anything || self.must == Must::Checkpoint(image))
            }
            Standing::Guest | Standing::NoRecord => {
                let is_guests = self.floor.is_some() && image.iter().enumerate().all(is_flushed);
                let is_known = standing == Standing::Guest || !self.recorded;
                is_guests && is_known && matches!(self.must, Must::Anything | Must::Guest)
            }
        };
        right
            .then_some(standing)
            .ok_or_else(|| format!("{standing}, with {image:?}; the operation's end: {:?}", self.must))
    }
}

/// What is under way at the end of a round.
enum Flushed {
    Flush(Option<FlushEnded>),
    Word(Option<LentRecord>),
}

/// One history as it runs.
struct Run {
    machine: Machine<1>,
    model: Model,
    replica: Option<Replica>,
    copied: Option<CopyEnded>,
    /// A round that has not ended, the checkpoint it makes whole if this generation is still in force, and how often the image
    /// had been written.
    round: Option<(Flushed, Option<Image>, (u64, u64))>,
    /// The checkpoint that the round under way is of.
    latest: Option<Image>,
    booted: bool,
    byte: u8,
}

impl Run {
    fn new() -> Self {
        let model = Model { floor: Some(Image::default()), ..Model::default() };
        let machine = Machine::of(0, &Arc::default());
        Self { machine, model, replica: None, copied: None, round: None, latest: None, booted: false, byte: 0 }
    }

    fn medium(&self) -> Medium {
        self.machine.get().media[0].clone()
    }

    /// Does one operation. The calls it made; `None` when it makes no sense now.
    fn act(&mut self, (op, fate): Act) -> Option<Vec<Event>> {
        if !self.makes_sense(op) {
            return None;
        }
        self.model = self.during(op);
        self.byte += 1;
        self.machine.get().fate = fate;
        let model = self.model.clone();
        self.whole(op);
        if let Fate::KilledAfter(_) = fate {
            self.model = Model { taken: false, settled: false, ..model };
            self.end();
        }
        let events: Vec<_> = self.machine.get().log.drain(..).map(|(_, event)| event).collect();
        if let Op::PowerCut { everything } = op {
            self.power_cut(everything);
        }
        Some(events)
    }

    fn makes_sense(&self, op: Op) -> bool {
        match op {
            Op::Sync => !self.booted,
            Op::Boot => !self.booted && self.replica.is_none(),
            Op::Guest | Op::GuestFlush => self.booted || self.replica.is_some(),
            Op::Kill => self.booted || self.replica.is_some(),
            Op::Evict => self.machine.get().failed[0],
            Op::Copy | Op::Round => self.replica.is_some() && self.copied.is_none() && self.round.is_none(),
            Op::EndCopy => self.copied.is_some(),
            Op::Word => matches!(self.round, Some((Flushed::Flush(_), ..))),
            Op::EndRound => self.round.is_some(),
            Op::PowerCut { .. } => true,
            _ => self.replica.is_some(),
        }
    }

    /// What may be found when the operation is cut.
    fn during(&self, op: Op) -> Model {
        let mut model = Model { must: Must::Anything, ..self.model.clone() };
        if model.taken && !model.settled {
            model.flushed(model.guest);
        }
        let visible = self.machine.get();
        match op {
            Op::Guest if model.taken || self.booted => model.since.extend([(2, self.byte + 1), (3, self.byte + 1)]),
            Op::Boot if matches!(standing(visible.records[0].clone()), Standing::Checkpoint { .. }) => {
                model.flushed(visible.images[0]);
            }
            _ => {}
        }
        model
    }

    fn end(&mut self) {
        (self.replica, self.copied, self.round) = (None, None, None);
        self.booted = false;
        // The record of the guest may have arrived, though nobody was told so.
        if self.model.taken && !self.model.settled && !self.machine.get().any_failed {
            self.model.floor = None;
        }
        self.machine.get().end_process();
        (self.model.taken, self.model.settled) = (false, false);
    }

    fn whole(&mut self, op: Op) {
        let byte = self.byte;
        let model = &mut self.model;
        match op {
            Op::Kill | Op::PowerCut { .. } => return self.end(),
            Op::Evict => return self.machine.reread().unwrap(),
            Op::Boot => {
                let state = State::open(Box::new(self.machine.clone())).unwrap();
                let image = Some(Box::new(self.machine.clone()) as Box<dyn Disk>);
                if take_up_states(&mut [Taken { state, image }], false).is_ok() {
                    self.booted = true;
                    model.guest = self.machine.get().images[0];
                    model.checkpoints.clear();
                    model.must = Must::Guest;
                }
                return;
            }
            // As an image's file does it by itself.
            Op::Guest | Op::GuestFlush if self.booted && self.machine.get().failed[0] => return,
            Op::Guest if self.booted => {
                if Disk::write(&mut self.machine, 2, &[byte; 2]).is_ok() {
                    model.guest[2..4].fill(byte);
                } else {
                    // It reads what it is left with.
                    model.guest = self.machine.get().images[0];
                }
                return;
            }
            Op::GuestFlush if self.booted => {
                if self.machine.flush().is_ok() {
                    model.flushed(model.guest);
                    model.must = Must::Guest;
                }
                return;
            }
            _ => {}
        }
        let machine = &self.machine;
        let replica = self.replica.get_or_insert_with(|| {
            let (base, state) = (Box::new(machine.clone()), Box::new(machine.clone()));
            Replica::open(base, state, ReplicaConfig::default()).unwrap()
        });
        let generation = model.generation;
        let stage = replica.stage();
        // Else it has nothing to do, and promises nothing.
        let lives = matches!(stage, Stage::Syncing | Stage::Running);
        let calls = machine.get().log.len();
        match op {
            Op::Sync => {
                if replica.start_sync(generation + 1).is_ok() {
                    model.generation += 1;
                    model.primary = machine.get().images[0];
                    model.checkpoints.clear();
                    (model.latest, model.floor, model.recorded, model.must) = (None, None, true, Must::Resync);
                }
            }
            Op::Primary(at) => {
                if replica.primary_write(generation, at as u64, &[byte; 2]).is_ok() {
                    model.primary[at..at + 2].fill(byte);
                }
            }
            Op::PrimaryZero => {
                if replica.primary_zero(generation, 1, 1, Zeroing::default()).is_ok() {
                    model.primary[1] = 0;
                }
            }
            Op::PrimaryFlush => _ = replica.primary_flush(generation),
            Op::Guest => {
                if replica.guest_write(2, &[byte; 2]).is_ok() {
                    model.guest[2..4].fill(byte);
                } else {
                    let _ = replica.guest_read(0, &mut model.guest);
                }
            }
            Op::GuestFlush => {
                if replica.guest_flush().is_ok() && model.taken {
                    model.flushed(model.guest);
                    model.must = Must::Guest;
                }
            }
            Op::Seal => {
                if replica.seal().is_ok() && lives {
                    model.checkpoints.insert((generation, replica.status().seals), model.primary);
                    (model.latest, model.guest) = (Some(model.primary), model.primary);
                }
                assert_eq!(machine.get().log.len(), calls, "a checkpoint touches nothing");
            }
            Op::Apply(bytes) => {
                let mut applied = replica.apply_some(bytes);
                while bytes == u64::MAX && matches!(applied, Ok(true)) {
                    applied = replica.apply_some(bytes);
                }
                if applied.is_ok_and(|more| !more) && (lives || model.taken) {
                    model.must =
                        if model.taken { Must::Guest } else { model.latest.map_or(Must::Resync, Must::Checkpoint) };
                }
            }
            Op::Copy | Op::Round => {
                if !replica.is_in_round() {
                    replica.begin_round();
                    self.latest = model.latest;
                }
                let mut copied = Ok(true);
                while op == Op::Round && matches!(copied, Ok(true)) {
                    copied = match replica.lend_copy().map(LentCopy::carry_out) {
                        Some(mut ended) => replica.copy_ended(&mut ended),
                        None => replica.copy_round(1),
                    };
                }
                if op == Op::Copy {
                    self.copied = replica.lend_copy().map(LentCopy::carry_out);
                } else if copied.is_ok() {
                    let ended = Flushed::Flush(replica.lend_flush().map(LentFlush::carry_out));
                    self.round = Some((ended, self.latest, (generation, machine.get().writes)));
                }
            }
            Op::EndCopy => _ = self.copied.take().map(|mut ended| replica.copy_ended(&mut ended)),
            Op::Word => {
                let Some((Flushed::Flush(ended), latest, writes)) = self.round.take() else { return };
                self.round = replica.lend_record(ended).ok().map(|lent| (Flushed::Word(lent), latest, writes));
            }
            Op::EndRound => {
                let Some((flushed, latest, writes)) = self.round.take() else { return };
                // A word that was lent before a takeover is none of the guest's.
                let is_word = matches!(flushed, Flushed::Word(_));
                let lent = match flushed {
                    Flushed::Flush(ended) => replica.lend_record(ended),
                    Flushed::Word(lent) => Ok(lent),
                };
                let ended = lent.and_then(|lent| replica.end_round(lent.map(LentRecord::carry_out)));
                // Another record that could not be written has taken the word back; the next round says it.
                let said = !machine.get().any_failed;
                if model.taken && ended.as_ref().is_ok_and(|more| !more) && !(is_word && replica.is_unsettled()) {
                    model.must = Must::Guest;
                } else if ended.is_ok()
                    && said
                    && stage == Stage::Running
                    && writes == (generation, machine.get().writes)
                {
                    model.must = latest.map_or(Must::Anything, Must::Checkpoint);
                }
            }
            Op::Takeover => {
                let taken = model.taken;
                model.taken |= replica.takeover(generation + 1).is_ok();
                let mut machine = machine.get();
                assert_eq!(machine.log.len(), calls, "nor does a takeover");
                machine.went_on |= machine.failed[0] && model.taken && !taken;
            }
            Op::Stop => {
                if replica.stop().is_ok() && lives && !model.taken {
                    model.must = model.latest.map_or(Must::Resync, Must::Checkpoint);
                }
            }
            Op::Boot | Op::Kill | Op::Evict | Op::PowerCut { .. } => unreachable!("done above"),
        }
        if model.taken && !model.settled && replica.status().standing == Standing::Guest {
            model.settled = true;
            model.flushed(model.guest);
            model.checkpoints.clear();
        }
    }

    fn power_cut(&mut self, everything: bool) {
        let mut hardware = self.machine.get();
        let medium = hardware.media[0].cut(everything);
        let record = medium.record();
        match standing(record.clone()) {
            Standing::Guest | Standing::NoRecord => self.model.flushed(medium.image),
            Standing::Checkpoint { .. } | Standing::Resync(_) => self.model.floor = None,
        }
        (hardware.images[0], hardware.records[0], hardware.media[0]) = (medium.image, record, medium);
    }
}

#[derive(Clone, Copy, Default, Debug)]
struct Found {
    histories: u64,
    cuts: u64,
    media: u64,
    checkpoints: u64,
    guests: u64,
    resyncs: u64,
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
    let mut medium = run.medium();
    let during = run.during(last.0);
    let Some(events) = run.act(last) else { return Ok(None) };
    found.histories += 1;
    found.failed += u64::from(matches!(last.1, Fate::FailsAfter(..)));
    let told = |wrong: String, made| {
        let mut text = format!("{wrong}\n after {made} calls of the last of");
        before.iter().chain([&last]).for_each(|act| _ = write!(text, "\n  {act:?}"));
        text
    };
    if run.machine.get().went_on {
        return Err(told("it went on with an image whose flush had failed".into(), events.len()));
    }
    let after = run.medium();
    for (made, event) in events.iter().map(Some).chain([None]).enumerate() {
        found.cuts += 1;
        let model = if event.is_some() { &during } else { &run.model };
        let media = if event.is_some() { &medium } else { &after };
        for image in media.images() {
            for record in media.records() {
                found.media += 1;
                let standing = model.check(image, record).map_err(|wrong| told(wrong, made))?;
                match standing {
                    Standing::Checkpoint { .. } => found.checkpoints += 1,
                    Standing::Guest | Standing::NoRecord => found.guests += 1,
                    Standing::Resync(_) => found.resyncs += 1,
                }
            }
        }
        event.iter().for_each(|event| medium.take(event));
    }
    Ok(Some(events))
}

const WHOLE: [Op; 4] = [Op::Sync, Op::Primary(0), Op::Seal, Op::Apply(u64::MAX)];

/// Where histories begin: a new image, and lives that three operations alone do not reach.
fn beginnings() -> Vec<Vec<Act>> {
    let after = |beginning: &[Op], ops: &[Op]| [beginning, ops].concat();
    let behind = after(&WHOLE, &[Op::Primary(1), Op::Seal, Op::Primary(0), Op::Seal, Op::Guest]);
    let taken_over = after(&behind, &[Op::Takeover]);
    let beginnings = vec![
        vec![],
        WHOLE.to_vec(),
        after(&[], &[Op::Sync, Op::Primary(0), Op::Kill, Op::Sync]),
        behind,
        after(&taken_over, &[Op::Apply(1)]),
        after(&taken_over, &[Op::Round]),
        after(&taken_over, &[Op::Apply(u64::MAX)]),
        after(&WHOLE, &[Op::Kill, Op::Boot]),
        after(&WHOLE, &[Op::Primary(1), Op::Seal, Op::Takeover, Op::Copy]),
        after(&WHOLE, &[Op::Primary(1), Op::Seal, Op::Round, Op::Word]),
        taken_over,
    ];
    let whole = |ops: Vec<Op>| ops.into_iter().map(|op| (op, Fate::Whole)).collect::<Vec<_>>();
    // An image that another process failed to flush, copied anew; and one that a guest did, before it boots again.
    let lost = Fate::FailsAfter(0, Arrived::Nothing);
    let copied =
        [whole(vec![Op::Sync, Op::Primary(0)]), vec![(Op::PrimaryFlush, lost)], whole(vec![Op::Kill, Op::Sync])];
    let guest = [
        whole(after(&WHOLE, &[Op::Kill, Op::Boot, Op::Guest])),
        vec![(Op::GuestFlush, lost)],
        whole(vec![Op::Kill, Op::Boot]),
    ];
    beginnings.into_iter().map(whole).chain([copied.concat(), guest.concat()]).collect()
}

/// Every history of up to `left` more operations; in each, one call at most fails.
fn explore(before: &mut Vec<Act>, left: usize, found: &mut Found) -> Result<(), String> {
    let has_failed = before.iter().any(|(_, fate)| matches!(fate, Fate::FailsAfter(..)));
    for op in OPS {
        let Some(events) = run(before, (op, Fate::Whole), found)? else { continue };
        let mut fates = vec![Fate::Whole];
        for (calls, event) in events.iter().enumerate() {
            for arrived in event.failures().iter().filter(|_| !has_failed) {
                let fate = Fate::FailsAfter(calls, *arrived);
                run(before, (op, fate), found)?;
                fates.push(fate);
            }
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
fn a_crash_at_any_instant_leaves_a_checkpoint_or_the_word_that_there_is_none() {
    let found = explore_all().unwrap_or_else(|wrong| panic!("{wrong}"));
    let Found { histories, cuts, media, checkpoints, guests, resyncs, failed } = found;
    eprintln!("{found:?}");
    assert!(histories > 15_000 && cuts > 20_000 && media > 80_000, "{found:?}");
    assert!(checkpoints > 5_000 && guests > 5_000 && resyncs > 50_000, "{found:?}");
    assert!(failed > 5_000, "{found:?}");
}

#[test]
fn the_planted_bugs_are_seen() {
    for bug in Mutant::OF_CRASHES {
        mutant::plant(Some(bug));
        let seen = explore_all();
        mutant::plant(None);
        assert!(seen.is_err(), "{bug:?} was not seen");
    }
}
