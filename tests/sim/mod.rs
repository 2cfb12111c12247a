//! The whole pair from a seed: the product's two sides, under a virtual clock, with one fault a run; the packet
//! link of some breaks besides, and is made again.
//!
//! ```text
//! seed ─▶ plan ─▶ world: hosts (engine, host, domain), wires, switch, arbiter, clients ─▶ oracles
//! ```
//!
//! A failing seed prints the command that replays it with a trace. `XEN_COLO_SEEDS=1000000` runs more of them, and
//! with `XEN_COLO_GO_ON=1` a failure does not end them: all that failed are listed.
//! What the oracles hold against each run:
//!
//! - *history*: every answer a client saw, and every promise it was made, against each other and the survivor's disk;
//! - *commit*: what leaves the primary is explained by the secondary's state at that moment (rule 1);
//! - connections outlive the fault, answers answer a question, somebody serves as long as somebody could;
//! - one survivor: nobody speaks after another has won, no write of an old generation is taken (rule 3);
//! - a primary that ends its protection goes on only when its secondary has given up, and every held frame leaves;
//! - a loaded guest is the captured one, byte by byte.
//!
//! The trap is a simulator that sees nothing: each planted bug must be found, and each step and each fault hit.

mod client;
mod commit;
pub(crate) mod dice;
mod domain;
mod engine;
mod history;
mod host;
mod plan;
mod wires;
mod world;

use plan::{Kind, Step};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use world::{Report, World};
use xen_colo::mutant::{Mutant, plant};

/// Seeds of a run of the tests, unless `XEN_COLO_SEEDS` says otherwise.
const SEEDS: u64 = 2_000;
/// The same where `CI` is set.
const SEEDS_CI: u64 = 20_000;
/// Seeds within which each planted bug must be found.
const SEEDS_A_MUTANT: u64 = 4_000;

/// Runs a seed; a panic of the product is a violation as well.
fn run(seed: u64, trace: bool) -> (Report, Result<(), String>) {
    catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, trace);
        let result = world.run();
        (world.report, result)
    }))
    .unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        (Report::default(), Err(format!("panic: {}", text.unwrap_or("?"))))
    })
}

/// What all runs together saw.
#[derive(Default)]
struct Coverage {
    seen: BTreeMap<&'static str, u64>,
    struck: BTreeMap<(Kind, Option<Step>), u64>,
    seeds: u64,
    answers: u64,
    compared: u64,
    segments: (u64, u64),
    failures: Vec<(u64, String)>,
}

impl Coverage {
    fn add(&mut self, seed: u64, report: Report, result: Result<(), String>) {
        self.seeds += 1;
        report.seen.into_iter().for_each(|(what, count)| *self.seen.entry(what).or_default() += count);
        report.struck.into_iter().for_each(|struck| *self.struck.entry(struck).or_default() += 1);
        (self.answers, self.compared) = (self.answers + report.answers, self.compared + report.compared);
        self.segments.0 += report.segments.0;
        self.segments.1 += report.segments.1;
        if let Err(why) = result {
            self.failures.push((seed, why));
        }
    }

    fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        other.seen.into_iter().for_each(|(what, count)| *self.seen.entry(what).or_default() += count);
        other.struck.into_iter().for_each(|(what, count)| *self.struck.entry(what).or_default() += count);
        (self.answers, self.compared) = (self.answers + other.answers, self.compared + other.compared);
        self.segments.0 += other.segments.0;
        self.segments.1 += other.segments.1;
        self.failures.extend(other.failures);
    }

    fn hits(&self, step: Step) -> u64 {
        self.struck.iter().filter(|((kind, at), _)| *at == Some(step) && *kind != Kind::Nothing).map(|(_, n)| n).sum()
    }

    fn strikes(&self, kind: Kind) -> u64 {
        self.struck.iter().filter(|((struck, _), _)| *struck == kind).map(|(_, n)| n).sum()
    }
}

/// Runs seeds on every core until they are done or one fails.
fn run_seeds(seeds: u64) -> Coverage {
    let next = AtomicU64::new(0);
    let failed = AtomicU64::new(u64::MAX);
    let go_on = std::env::var_os("XEN_COLO_GO_ON").is_some();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        let worker = || {
            let mut coverage = Coverage::default();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds || seed > failed.load(Ordering::Relaxed) {
                    return coverage;
                }
                let (report, result) = run(seed, false);
                if result.is_err() && !go_on {
                    failed.fetch_min(seed, Ordering::Relaxed);
                }
                coverage.add(seed, report, result);
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let mut all = Coverage::default();
        workers.into_iter().for_each(|worker| all.merge(worker.join().expect("workers catch panics")));
        all
    })
}

fn number_in(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn the_pair_keeps_its_promises() {
    let default = if std::env::var_os("CI").is_some() { SEEDS_CI } else { SEEDS };
    let seeds = number_in("XEN_COLO_SEEDS").unwrap_or(default);
    let begun = Instant::now();
    let mut coverage = run_seeds(seeds);
    coverage.failures.sort();
    println!("{} of {} seeds failed", coverage.failures.len(), coverage.seeds);
    coverage.failures.iter().take(40).for_each(|(seed, why)| println!("seed {seed}: {why}"));
    if let Some((seed, why)) = coverage.failures.first() {
        panic!("seed {seed}: {why}\nXEN_COLO_SEED={seed} cargo test --test all sim::replay -- --nocapture");
    }
    let per_second = coverage.seeds as f64 / begun.elapsed().as_secs_f64();
    println!("{} seeds, {per_second:.0} a second, {} answers", coverage.seeds, coverage.answers);
    println!("{} loaded states compared; segments {:?}", coverage.compared, coverage.segments);
    coverage.seen.iter().for_each(|(what, count)| println!("{count:>9}  {what}"));
    Step::ALL.iter().for_each(|step| println!("{:>9}  struck at {step:?}", coverage.hits(*step)));
    Kind::ALL.iter().for_each(|kind| println!("{:>9}  {kind:?}", coverage.strikes(*kind)));
    if seeds < SEEDS {
        return;
    }
    let unseen = Step::ALL.iter().filter(|step| coverage.hits(**step) == 0).collect::<Vec<_>>();
    assert!(unseen.is_empty(), "no fault struck at {unseen:?}");
    let unseen = Kind::ALL.iter().filter(|kind| coverage.strikes(**kind) == 0).collect::<Vec<_>>();
    assert!(unseen.is_empty(), "{unseen:?} never struck");
    for outcome in [
        "secondary took over",
        "two disks taken over",
        "secondary stopped",
        "secondary held",
        "secondary without a state",
        "primary alone",
        "primary stopped",
        "primary unprotected",
        "primary held",
        "nobody survived",
        "operator decided",
        "lost while loading",
        "old write after takeover",
        "arbitration lost",
        "arbiter answer lost",
        "arbiter unreachable",
        "dismissed while copying",
        "dismissed between checkpoints",
        "dismissed within a checkpoint",
        "primary let its secondary go",
        "secondary dismissed",
        "lost while dismissing",
        "packet link broken",
        "frame into a broken link",
        "cause packet-link",
    ] {
        assert!(coverage.seen.contains_key(outcome), "no run ended like this: {outcome}");
    }
    assert!(coverage.compared > 0 && coverage.segments.0 > 0 && coverage.segments.1 > 0);
}

#[test]
fn replay() {
    let Some(seed) = number_in("XEN_COLO_SEED") else { return };
    let (report, result) = run(seed, true);
    println!("{report:#?}");
    if let Err(why) = result {
        panic!("seed {seed}: {why}");
    }
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    for seed in 0..20 {
        let (first, second) = (run(seed, false), run(seed, false));
        assert_eq!(format!("{first:?}"), format!("{second:?}"), "seed {seed}");
    }
}

/// Plants a bug and finds it.
fn find(mutant: Mutant) {
    plant(Some(mutant));
    let found = (0..SEEDS_A_MUTANT).find_map(|seed| run(seed, false).1.err().map(|why| (seed, why)));
    plant(None);
    let (seed, why) = found.unwrap_or_else(|| panic!("{mutant:?} was not found within {SEEDS_A_MUTANT} seeds"));
    println!("{mutant:?} found at seed {seed}: {why}");
}

#[test]
fn finds_release_before_received() {
    find(Mutant::ReleaseBeforeReceived);
}

#[test]
fn finds_no_fence() {
    find(Mutant::NoFence);
}

#[test]
fn finds_keep_active_at_checkpoint() {
    find(Mutant::KeepActiveAtCheckpoint);
}

#[test]
fn finds_apply_before_whole() {
    find(Mutant::ApplyBeforeWhole);
}

#[test]
fn finds_no_relaunch() {
    find(Mutant::NoRelaunch);
}

#[test]
fn finds_accept_old_generation() {
    find(Mutant::AcceptOldGeneration);
}

#[test]
fn finds_claim_after_dismissal() {
    find(Mutant::ClaimAfterDismissal);
}

#[test]
fn finds_go_on_unconfirmed() {
    find(Mutant::GoOnUnconfirmed);
}

#[test]
fn finds_stale_delta() {
    find(Mutant::StaleDelta);
}

#[test]
fn finds_seal_first_only() {
    find(Mutant::SealFirstOnly);
}

#[test]
fn finds_drain_first_only() {
    find(Mutant::DrainFirstOnly);
}

#[test]
fn finds_open_without_link() {
    find(Mutant::OpenWithoutLink);
}

#[test]
fn finds_repeat_unowned() {
    find(Mutant::RepeatUnowned);
}

#[test]
fn every_mutant_has_a_test() {
    assert_eq!(Mutant::ALL.len(), 13);
}
