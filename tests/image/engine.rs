//! Saving and restoring, whole: a fake domain, a fake libxl, and the real engine between them.

use super::fake::{Domain, Libxl, Memory, Tape, page, restore_job, save_job};
use bytes::BytesMut;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use xen_colo::image::helper::{Message, StreamType};
use xen_colo::image::outer::OuterRecord;
use xen_colo::image::{Decoder, DomainType, Item, PageEntry, PageType, Record};
use xen_colo::save_helper::Failure;
use xen_colo::save_helper::restore::{Rings, restore};
use xen_colo::save_helper::save::{Saved, save};

/// Nobody changes his mind.
static RUN: AtomicBool = AtomicBool::new(false);

/// A libxl that suspends and resumes the domain, and writes its own part of `checkpoints` checkpoints to the tape.
pub fn libxl_for(domain: &Domain, tape: &Tape, mut checkpoints: u32) -> Libxl {
    let (suspended, tape) = (Arc::clone(&domain.suspended), tape.clone());
    let mut starts = Vec::new();
    Libxl::new(move |message| match message {
        Message::Suspend => {
            *suspended.lock().unwrap() = true;
            1
        }
        Message::Postcopy => {
            *suspended.lock().unwrap() = false;
            1
        }
        Message::Checkpoint => {
            let mut checkpoint = BytesMut::new();
            Record::Checkpoint.encode(&mut checkpoint);
            assert!(tape.all().ends_with(&checkpoint), "everything is written before it is libxl's turn");
            put_outer(&OuterRecord::CheckpointEnd, &tape);
            starts.push(tape.all().len());
            checkpoints = checkpoints.saturating_sub(1);
            i32::from(checkpoints > 0)
        }
        Message::SwitchQemuLogdirty { domid: 5, .. } => 0,
        other => panic!("{other:?}"),
    })
}

fn put_outer(record: &OuterRecord, tape: &Tape) {
    let mut out = BytesMut::new();
    record.encode(&mut out);
    tape.put(&out);
}

/// A libxl that reads its own part of each checkpoint off the tape.
fn libxl_at(tape: &Tape) -> Libxl {
    let mut tape = tape.clone();
    Libxl::new(move |message| match message {
        Message::StaticDataDone { missing: 0 } => 0,
        Message::Checkpoint => {
            let mut record = [0; 8];
            match tape.read_exact(&mut record) {
                Ok(()) => {
                    assert_eq!(record, [4, 0, 0, 0, 0, 0, 0, 0], "the helper read up to its own record and no further");
                    1
                }
                Err(_) => 2,
            }
        }
        other => panic!("{other:?}"),
    })
}

fn saved(domain: &mut Domain, stream: StreamType, live: bool, checkpoints: u32) -> (Tape, Libxl) {
    let tape = Tape::default();
    let libxl = libxl_for(domain, &tape, checkpoints);
    save(&save_job(stream, live), domain, &mut libxl.calls(0xf8), tape.clone(), &RUN).unwrap();
    (tape, libxl)
}

fn restored(tape: &Tape, stream: StreamType) -> (Domain, Result<Rings, Failure>, Libxl) {
    let (mut domain, libxl) = (Domain::default(), libxl_at(tape));
    let result = restore(&restore_job(stream), &mut domain, &mut libxl.calls(0x120), tape.clone());
    (domain, result, libxl)
}

fn items(bytes: &[u8]) -> Vec<Item> {
    let (mut decoder, mut rest, mut items) = (Decoder::new(), bytes, Vec::new());
    while !decoder.is_over() {
        let (piece, behind) = rest.split_at(decoder.wants());
        items.extend(decoder.feed(piece.to_vec()).unwrap());
        rest = behind;
    }
    items
}

fn entries(bytes: &[u8]) -> Vec<PageEntry> {
    let pages =
        items(bytes).into_iter().filter_map(|item| if let Item::Pages(pages) = item { Some(pages) } else { None });
    pages.flat_map(|pages| pages.entries).collect()
}

#[test]
fn a_saved_domain_comes_back_whole() {
    let mut domain = Domain::new(3000);
    let (tape, libxl) = saved(&mut domain, StreamType::Plain, false, 0);
    let qemu = |enable| Message::SwitchQemuLogdirty { domid: 5, enable };
    assert_eq!(libxl.heard(), [qemu(true), Message::Suspend, qemu(false)]);
    assert_eq!(domain.log_switched, [true, false]);
    let sent = entries(&tape.all());
    assert_eq!(sent.len(), domain.memory.len(), "each page once, and none that does not exist");

    let (copy, rings, libxl) = restored(&tape, StreamType::Plain);
    assert_eq!(rings.unwrap(), Rings { store_gfn: domain.nr_gpfns - 4, console_gfn: domain.nr_gpfns - 1 });
    assert_eq!(copy.memory, domain.restored());
    assert_eq!((copy.policy, copy.context, copy.tsc), (domain.policy, domain.context, domain.tsc));
    assert_eq!(libxl.heard(), [Message::StaticDataDone { missing: 0 }]);
    let [store, console] = [domain.nr_gpfns - 4, domain.nr_gpfns - 1];
    let expected = [
        "policy".into(),
        "tsc".into(),
        format!("param 1 = {store}"),
        format!("param 17 = {console}"),
        "param 12 = 3".into(),
        "param 2 = 1".into(),
        "param 18 = 2".into(),
        "context".into(),
        format!("grants ({console}, 0) ({store}, 0)"),
    ];
    assert_eq!(copy.done, expected);
    assert_eq!(tape.at(), tape.all().len());
}

#[test]
fn a_domain_whose_log_is_somebody_elses_is_stopped_and_saved() {
    let mut domain = Domain { log_taken: true, ..Domain::new(3000) };
    let (tape, libxl) = saved(&mut domain, StreamType::Plain, false, 0);
    assert_eq!(libxl.heard(), [Message::Suspend]);
    assert_eq!(domain.log_switched, [false; 0], "the log of a protection goes on");
    let (copy, rings, _) = restored(&tape, StreamType::Plain);
    rings.unwrap();
    assert_eq!(copy.memory, domain.restored());
}

#[test]
fn a_domain_that_is_only_saved_runs_while_it_is_copied() {
    let mut domain = Domain::new(3000);
    // One look after the one round, one when it stands still.
    domain.program = [(0..900).map(|pfn| (pfn, Some(1))).collect(), vec![(7, Some(2))], vec![(8, Some(3))]].into();
    let (tape, _) = saved(&mut domain, StreamType::Plain, false, 0);
    assert_eq!(domain.program.len(), 1, "one round, however much is left");
    let (copy, rings, _) = restored(&tape, StreamType::Plain);
    rings.unwrap();
    assert_eq!(copy.memory, domain.restored());
}

#[test]
fn a_running_domain_is_followed() {
    let mut domain = Domain::new(3000);
    let grown = domain.nr_gpfns + 9;
    domain.program = [
        (0..900).map(|pfn| (pfn, Some(1))).collect(),
        (0..300).map(|pfn| (pfn, Some(2))).chain([(30, None), (grown, Some(2))]).collect(),
        (0..20).map(|pfn| (pfn, Some(3))).chain([(2500, None)]).collect(),
        vec![(4, Some(4)), (8, None)],
    ]
    .into();
    domain.flaky = [1, 1500, 2999].into();
    // It comes with the page above it, and nobody has written it.
    domain.memory.insert(grown - 2, page(grown - 2, 0));
    let (tape, libxl) = saved(&mut domain, StreamType::Plain, true, 0);
    let qemu = |enable| Message::SwitchQemuLogdirty { domid: 5, enable };
    assert_eq!(libxl.heard(), [qemu(true), Message::Suspend, qemu(false)]);
    assert_eq!(domain.log_switched, [true, false]);
    assert!(libxl.log().contains("round 2: 90"), "{}", libxl.log());
    assert!(entries(&tape.all()).contains(&PageEntry { pfn: 2500, kind: PageType::XTAB }), "a page that went is said");
    let (mut copy, rings, _) = restored(&tape, StreamType::Plain);
    rings.unwrap();
    for gone in [8, 30, 2500] {
        assert!(copy.memory.remove(&gone).is_some_and(|_| !domain.memory.contains_key(&gone)));
    }
    let expected = domain.restored();
    assert!(copy.memory.contains_key(&grown) && copy.memory.contains_key(&(grown - 2)));
    assert_eq!(copy.memory, expected);
}

#[test]
fn pages_that_are_sent_twice_are_compared() {
    let mut domain = Domain::new(40);
    let tape = Tape::default();
    let libxl = libxl_for(&domain, &tape, 0);
    let mut job = save_job(StreamType::Plain, true);
    job.debug = true;
    save(&job, &mut domain, &mut libxl.calls(0xf8), tape.clone(), &RUN).unwrap();
    let (copy, rings, log) = restored(&tape, StreamType::Plain);
    rings.unwrap();
    assert_eq!(copy.memory, domain.restored());
    assert!(!log.log().contains("differs"), "{}", log.log());
    // The last contents of page 39 are the ones that are compared.
    let mut bytes = tape.all();
    let at = bytes.windows(16).rposition(|w| w == &page(38, 0)[..16]).unwrap();
    bytes[at] ^= 1;
    let (copy, rings, log) = restored(&Tape::of(&bytes), StreamType::Plain);
    rings.unwrap();
    assert_eq!(copy.memory, domain.restored(), "compared, not written");
    assert!(log.log().contains("page 0x26 differs"), "{}", log.log());
}

#[test]
fn a_plain_image_cut_anywhere_is_an_error() {
    let mut domain = Domain::new(6);
    let (tape, _) = saved(&mut domain, StreamType::Plain, false, 0);
    let bytes = tape.all();
    for cut in (0..bytes.len()).step_by(97).chain(bytes.len() - 30..bytes.len()) {
        let (copy, rings, _) = restored(&Tape::of(&bytes[..cut]), StreamType::Plain);
        assert!(matches!(rings, Err(Failure::Stream { .. })), "cut at {cut}: {rings:?}");
        assert!(!copy.done.contains(&"context".into()));
    }
}

/// Four checkpoints, and what the domain was at each, with where each ends on the tape.
fn remus() -> (Tape, Vec<(usize, Memory)>) {
    let mut domain = Domain::new(30);
    // The first look follows the first round; then one a checkpoint.
    domain.program = [
        vec![],
        vec![(1, Some(1))],
        vec![(1, Some(2)), (2, Some(2))],
        vec![(40, Some(3))],
        vec![(2, Some(4)), (5, Some(4))],
    ]
    .into();
    let tape = Tape::default();
    let states = Arc::new(Mutex::new(Vec::new()));
    let inner = libxl_for(&domain, &tape, 4);
    let (mut pipe, seen, at) = (inner.clone(), Arc::clone(&states), tape.clone());
    let libxl = Libxl::new(move |message| {
        let mut out = BytesMut::new();
        message.encode(&mut out);
        pipe.write_all(&out).unwrap();
        let mut reply = [0; 4];
        pipe.read_exact(&mut reply).unwrap();
        if *message == Message::Checkpoint {
            seen.lock().unwrap().push(at.all().len());
        }
        i32::from_ne_bytes(reply)
    });
    let job = save_job(StreamType::Remus, true);
    let result = save(&job, &mut domain, &mut libxl.calls(0xf8), tape.clone(), &RUN);
    assert_eq!(result.unwrap(), Saved::Stopped);
    assert_eq!(domain.log_switched, [true, false]);
    let checkpoint = [Message::Suspend, Message::Postcopy, Message::Checkpoint];
    let qemu = |enable| Message::SwitchQemuLogdirty { domid: 5, enable };
    let expected: Vec<_> =
        [qemu(true)].into_iter().chain(checkpoint.into_iter().cycle().take(12)).chain([qemu(false)]).collect();
    assert_eq!(libxl.heard(), expected);

    // What the receiver must have after each checkpoint, told by hand.
    let mut memory = Domain::new(30).restored();
    let mut expected = Vec::new();
    let writes: [&[(u64, u64)]; 4] = [&[(1, 1)], &[(1, 2), (2, 2)], &[(40, 3)], &[(2, 4), (5, 4)]];
    for (end, writes) in states.lock().unwrap().iter().zip(writes) {
        for (pfn, when) in writes {
            memory.insert(*pfn, page(*pfn, *when));
        }
        expected.push((*end, memory.clone()));
    }
    (tape, expected)
}

#[test]
fn a_primary_that_dies_anywhere_leaves_the_last_whole_checkpoint() {
    let (tape, checkpoints) = remus();
    let bytes = tape.all();
    let ends: Vec<_> = checkpoints.iter().map(|(end, _)| *end).collect();
    let near = ends.iter().flat_map(|end| end.saturating_sub(20)..(end + 20).min(bytes.len() + 1));
    for cut in (0..bytes.len()).step_by(211).chain(near) {
        let (copy, rings, _) = restored(&Tape::of(&bytes[..cut]), StreamType::Remus);
        match checkpoints.iter().rev().find(|(end, _)| *end <= cut) {
            Some((_, memory)) => {
                rings.unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
                assert!(copy.memory == *memory, "cut at {cut}: not the state of that checkpoint");
                assert!(copy.done.contains(&"context".into()));
            }
            None => assert!(rings.is_err(), "cut at {cut}, before the first checkpoint"),
        }
    }
}

#[test]
fn a_primary_that_talks_nonsense_is_not_dead() {
    let (tape, checkpoints) = remus();
    let mut bytes = tape.all()[..checkpoints[1].0].to_vec();
    bytes.extend_from_slice(&[0x77, 0, 0, 0, 0, 0, 0, 0]);
    let (copy, rings, _) = restored(&Tape::of(&bytes), StreamType::Remus);
    assert!(matches!(rings, Err(Failure::Image(_))), "{rings:?}");
    assert!(!copy.done.contains(&"context".into()), "the domain is not made runnable");
}

#[test]
fn a_checkpoint_larger_than_the_guest_is_refused() {
    let (tape, checkpoints) = remus();
    let mut bytes = BytesMut::from(&tape.all()[..checkpoints[0].0]);
    let one = PageEntry { pfn: 1, kind: PageType::NOTAB };
    let batch = vec![one; 1024];
    for _ in 0..66 {
        xen_colo::image::pages::encode_page_head(&batch, &mut bytes);
        bytes.resize(bytes.len() + (4 << 20), 1);
    }
    let (_, rings, _) = restored(&Tape::of(&bytes), StreamType::Remus);
    assert!(rings.unwrap_err().to_string().contains("larger than the whole guest"));
}

/// A spliced stream is a plain image: what a checkpoint leaves is complete.
pub fn spliced(tape: &Tape, end: usize) -> Vec<u8> {
    let mut bytes = BytesMut::from(&tape.all()[..end - 16]);
    Record::End.encode(&mut bytes);
    bytes.to_vec()
}

#[test]
fn the_first_checkpoint_with_an_end_spliced_in_is_a_plain_image() {
    let (tape, checkpoints) = remus();
    let (copy, rings, _) = restored(&Tape::of(&spliced(&tape, checkpoints[0].0)), StreamType::Plain);
    rings.unwrap();
    assert_eq!(copy.memory, checkpoints[0].1);
}

#[test]
fn an_image_of_an_older_xen_is_completed_by_libxl() {
    let mut out = super::format::headers(2, DomainType::Hvm);
    xen_colo::image::pages::encode_page_head(&[PageEntry { pfn: 3, kind: PageType::XALLOC }], &mut out);
    Record::HvmParams(Vec::new()).encode(&mut out);
    Record::HvmContext(b"old".to_vec()).encode(&mut out);
    Record::End.encode(&mut out);
    let libxl = Libxl::new(|message| i32::from(*message != Message::StaticDataDone { missing: 3 }));
    let mut copy = Domain::default();
    let job = restore_job(StreamType::Plain);
    restore(&job, &mut copy, &mut libxl.calls(0x100), Tape::of(&out)).unwrap();
    assert_eq!(copy.done[..2], ["param 2 = 1", "param 18 = 2"], "no policy is set that was not sent");
    assert!(copy.memory.contains_key(&3), "allocated, though nothing was sent for it");
}

/// A descriptor that takes so many bytes and then fails, or hangs.
struct Broken {
    left: usize,
    hangs: bool,
}

impl Write for Broken {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left == 0 && self.hangs {
            std::thread::park();
        }
        if self.left == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let taken = bytes.len().min(self.left);
        self.left -= taken;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn whatever_goes_wrong_the_log_is_off_again() {
    for (left, hangs) in [(0, false), (100, false), (9_000_000, false), (100, true), (9_000_000, true)] {
        let mut domain = Domain::new(40_000);
        let libxl = libxl_for(&domain, &Tape::default(), 0);
        let cancel = Arc::new(AtomicBool::new(false));
        let term = Arc::clone(&cancel);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(300));
            term.store(hangs, Ordering::Relaxed);
        });
        let job = save_job(StreamType::Plain, true);
        let result = save(&job, &mut domain, &mut libxl.calls(0xf8), Broken { left, hangs }, &cancel);
        killer.join().unwrap();
        match (hangs, &result) {
            (true, Err(Failure::Cancelled)) | (false, Err(Failure::Stream { .. })) => {}
            _ => panic!("{left} bytes, hangs {hangs}: {result:?}"),
        }
        assert!(!domain.log_on, "{left} bytes, hangs {hangs}");
        let qemu = libxl.heard().iter().filter(|message| message.number() == 7).count();
        assert!(qemu != 1, "the device model is told both, or neither");
    }
}

#[test]
fn a_libxl_that_cannot_suspend_ends_the_save() {
    for (reply, shut_down) in [(0, false), (0, true), (1, false)] {
        let mut domain = Domain::new(10);
        let suspended = Arc::clone(&domain.suspended);
        let libxl = Libxl::new(move |message| {
            *suspended.lock().unwrap() = shut_down;
            if *message == Message::Suspend { reply } else { 0 }
        });
        let result =
            save(&save_job(StreamType::Remus, true), &mut domain, &mut libxl.calls(0xf8), Tape::default(), &RUN);
        assert!(matches!(result, Err(Failure::Declined { .. })), "{reply} {shut_down}: {result:?}");
        assert!(!domain.log_on);
    }
}

#[test]
fn colo_is_refused_before_anything_is_touched() {
    let mut domain = Domain::new(10);
    let libxl = Libxl::new(|message| panic!("{message:?}"));
    let colo = save(&save_job(StreamType::Colo, true), &mut domain, &mut libxl.calls(0xf8), Tape::default(), &RUN);
    assert!(colo.unwrap_err().to_string().contains("xl-colo protect"));
    let colo = restore(&restore_job(StreamType::Colo), &mut domain, &mut libxl.calls(0x120), Tape::default());
    assert!(colo.is_err());
    assert_eq!(domain.log_switched, [false; 0]);
}
