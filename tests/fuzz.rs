//! Every decoder, fed what a corpus became when dice changed it, whole and in pieces.
//!
//! ```text
//! corpus/TARGET/* ─▶ change ─▶ whole  ─▶ decoder ─▶ said ┐
//!                        └───▶ pieces ─▶ decoder ─▶ said ┴ the same, no panic, no more memory than the input is worth
//! ```
//!
//! The corpus is committed: conversations recorded from foreign peers (qemu-io, nbdcopy, nbdinfo, qemu-nbd, nbdkit,
//! nbd-server) and what our own encoders write. An input that fails is kept in `target/fuzz/` and printed; it belongs
//! into the corpus with the change that mends it. `XEN_COLO_FUZZ_ROUNDS=1000000` changes more; the dice fall the same
//! way each time.
//!
//! The trap is a fuzzer that finds nothing: it finds a planted bug of each kind, and in those machines for which a target knows
//! more than that the same comes of the same.

mod change;
mod targets;

use crate::sim::dice::Dice;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use targets::{Pieces, TARGETS, Target};
use xen_colo::mutant::{Mutant, plant};

/// Changed inputs for each target.
const ROUNDS: u64 = 3_000;

/// Runs one input whole and in pieces; what is wrong, if anything is.
fn check(target: &Target, input: &[u8], dice: &mut Dice) -> Result<(), String> {
    let cuts = change::cuts(input.len(), dice);
    let run = |pieces: Pieces| {
        catch_unwind(AssertUnwindSafe(|| (target.run)(pieces))).map_err(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            format!("panic: {}", text.unwrap_or("?"))
        })
    };
    let whole = run(&mut std::iter::once(input))?;
    let pieces = run(&mut cuts.windows(2).map(|cut| &input[cut[0]..cut[1]]))?;
    if whole == pieces { Ok(()) } else { Err(format!("whole it says\n{whole:#?}\nin pieces it says\n{pieces:#?}")) }
}

/// The inputs of a target: its folder's files, by name.
fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target.name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// The first input in `rounds` that something is wrong with.
fn hunt(target: &Target, corpus: &[Vec<u8>], rounds: u64) -> Option<(Vec<u8>, String)> {
    let (mut cuts, mut changes) = (Dice(1), Dice(target.name.len() as u64));
    let seeds = corpus.iter().cloned();
    let changed = (0..rounds).map(|_| change::change(corpus, &mut changes));
    for input in seeds.chain(changed) {
        if let Err(what) = check(target, &input, &mut cuts) {
            return Some((input, what));
        }
    }
    None
}

fn fuzz(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "a corpus for {name}");
    let rounds = std::env::var("XEN_COLO_FUZZ_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS);
    if let Some((input, what)) = hunt(target, &corpus, rounds) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{name}.bin"));
        std::fs::write(&path, &input).unwrap();
        panic!("{name}: {what}\n{} bytes, kept in {}", input.len(), path.display());
    }
}

/// A test a target, and a check that none is forgotten.
macro_rules! fuzzed {
    ($($test:ident => $name:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            fuzz($name);
        })*

        #[test]
        fn every_target_has_its_test_and_every_corpus_its_target() {
            let mut tested = vec![$($name),*];
            tested.sort_unstable();
            let mut targets: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            targets.sort_unstable();
            assert_eq!(tested, targets);
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
            let mut folders: Vec<_> =
                std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            folders.sort_unstable();
            assert_eq!(folders, targets);
        }
    };
}

fuzzed! {
    nbd_server => "nbd-server",
    nbd_client => "nbd-client",
    nbd_list => "nbd-list",
    netlink_answers => "netlink",
    checkpoint_stream => "stream",
    messages => "message",
    hellos => "hello",
    welcomes => "welcome",
    tagged_frames => "tagged",
    chardev_frames => "chardev",
    vnet_frames => "vnet",
    notify_words => "notify",
    switch_frames => "switch",
    migration_image => "image",
    save_helper_words => "helper",
    device_model_state => "vmstate",
    control_words => "control",
    replica_record => "record",
    monitor_orders => "qmp",
    packets => "packet",
    comparator => "comparator",
    rewriter => "rewriter",
}

/// What no peer in Debian speaks yet, extended headers, is there as bytes; a server that did not understand them would be fuzzed
/// in its first lines only.
#[test]
fn what_the_server_is_fed_is_understood_before_it_is_changed() {
    for target in TARGETS.iter().filter(|target| ["nbd-server", "nbd-list"].contains(&target.name)) {
        for (index, input) in corpus(target).into_iter().enumerate() {
            let said = (target.run)(&mut std::iter::once(&input[..]));
            assert!(!said.last().unwrap().to_lowercase().starts_with("err"), "the {index}th: {said:?}");
        }
    }
}

#[test]
fn a_planted_bug_of_each_kind_is_found() {
    let seed = vec![vec![0, 0, 0, 3, b'a', b'b', b'c', 0, 0, 0, 1, b'd']];
    for target in targets::planted() {
        let found = hunt(&target, &seed, ROUNDS);
        let sound = target.name == "sound";
        assert_eq!(found.is_none(), sound, "{}: {found:?}", target.name);
    }
}

#[test]
fn what_a_target_knows_of_its_machine_finds_a_bug_planted_there() {
    for (name, mutant) in Mutant::OF_FUZZING {
        let target = TARGETS.iter().find(|target| target.name == name).unwrap();
        plant(Some(mutant));
        let found = hunt(target, &corpus(target), ROUNDS);
        plant(None);
        let (_, what) = found.unwrap_or_else(|| panic!("{mutant:?} is not found"));
        assert!(what.starts_with("panic: "), "{mutant:?}: {what}");
    }
}
