//! What protection costs the service: `scripts/bench.sh demo`.
//!
//! ```text
//! round:   unprotected │ colo │ colo with digests │ remus          one guest, protected and let go again each time
//!          diverging copies: unprotected │ colo │ colo that always falls back │ remus
//! ```
//!
//! The embedded guest serves one long connection and a few that are short: with the demo's pauses between requests, as a
//! service that is not overrun, and without them, when each client waits for nothing but the reply and a ratio is one of
//! latencies. What is claimed is the ratio of replies per second to those of the same guest unprotected, in the same round.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a bench that cannot measure ends")]
#![allow(unreachable_pub, dead_code, reason = "the tests' parts, of which a bench needs some")]

#[path = "../common/mod.rs"]
mod common;

use common::host::protect;
use common::world::{Plan, World};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::{Protect, Request};
use xen_colo::daemon::status::Protection;
use xen_colo::demo::client::{self, ClientConfig, Live, PAUSE_MS};

/// What the project aims at: protected in lock-step / unprotected.
const AIM: f64 = 0.9;
/// After a change of protection, before the window.
const SETTLE: Duration = Duration::from_millis(500);

/// What is measured: the share of replies that differ, what each client waits between two requests, and what it is called.
const LOADS: [(&str, u8, u64, &[Way]); 3] = [
    ("the demo's load on a guest whose copies agree", 0, PAUSE_MS, &AGREEING),
    ("a load without pauses on a guest whose copies agree", 0, 0, &AGREEING),
    ("a load without pauses on a guest whose copies always answer differently", 100, 0, &DIVERGING),
];

/// What a guest's disk has room for.
const KEYS_MAX: u64 = 40_000;

/// A way to protect.
struct Way {
    name: &'static str,
    mode: Option<Mode>,
    packet_digests: bool,
    min_run_percent: Option<u8>,
}

const fn way(name: &'static str, mode: Option<Mode>) -> Way {
    Way { name, mode, packet_digests: false, min_run_percent: None }
}

const AGREEING: [Way; 4] = [
    way("unprotected", None),
    way("colo", Some(Mode::Colo)),
    Way { packet_digests: true, ..way("colo, digests", Some(Mode::Colo)) },
    way("remus", Some(Mode::Remus)),
];
const DIVERGING: [Way; 4] = [
    way("unprotected", None),
    way("colo", Some(Mode::Colo)),
    Way { min_run_percent: Some(100), ..way("colo, falling back", Some(Mode::Colo)) },
    way("remus", Some(Mode::Remus)),
];

/// Replies per second in a window.
async fn rate(live: &Live, window: Duration) -> f64 {
    tokio::time::sleep(SETTLE).await;
    let (from, begun) = (live.replies(), std::time::Instant::now());
    tokio::time::sleep(window).await;
    (live.replies() - from) as f64 / begun.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures the ways, on one guest in each round, and returns what is to be reported of each.
async fn measure(diverge: u8, pause_ms: u64, ways: &[Way], rounds: usize, window: Duration) -> Vec<Value> {
    let mut rates = vec![Vec::new(); ways.len()];
    let mut checkpoints = vec![0; ways.len()];
    for round in 0..rounds {
        // A new guest: when a guest's disk is full only reads go on, and that is another load.
        let world = World::start(Plan { fence: false, diverge, ..Plan::default() }).await;
        let (stop, stopped) = watch::channel(false);
        let live = Arc::new(Live::default());
        let config = ClientConfig { pause_between_ms: pause_ms, keys_max: KEYS_MAX, ..ClientConfig::of_the_demo(1) };
        let load = tokio::spawn(client::run(world.address(), stopped, config, live.clone()));
        for turn in 0..ways.len() {
            let at = (turn + round) % ways.len();
            let way = &ways[at];
            if let Some(mode) = way.mode {
                let asked = protect(&world.wire.address, mode);
                let (packet_digests, min_run_percent) = (way.packet_digests, way.min_run_percent);
                world.a.order(Request::Protect(Protect { packet_digests, min_run_percent, ..asked })).await;
                world.a.becomes(Protection::Protected).await;
            }
            rates[at].push(rate(&live, window).await);
            if way.mode.is_some() {
                checkpoints[at] += world.a.status().await.checkpoints.total;
                world.a.order(Request::Unprotect).await;
                world.b.becomes(Protection::Empty).await;
            }
        }
        stop.send_replace(true);
        let report = load.await.unwrap();
        assert!(report.connection_kept, "{:?}", report.connection_error);
        assert!(live.acknowledged() < KEYS_MAX, "the guest's disk was full before the end: shorten SECONDS_A_WINDOW");
    }
    let row = |(at, way): (usize, &Way)| {
        let ratio = median(rates[at].iter().zip(&rates[0]).map(|(protected, alone)| protected / alone).collect());
        let (rate, checkpoints) = (median(rates[at].clone()), checkpoints[at] / rounds as u64);
        let aim = match (diverge, pause_ms, way.name) {
            (0, PAUSE_MS, "colo") => {
                format!("   (aim {AIM} at least, {})", if ratio >= AIM { "met" } else { "MISSED" })
            }
            _ => String::new(),
        };
        println!(
            "  {:<20} {rate:>8.0} replies/s   {ratio:.2} of unprotected   {checkpoints} checkpoints{aim}",
            way.name
        );
        json!({"way": way.name, "replies_per_second": rate.round(), "ratio": ratio, "checkpoints": checkpoints})
    };
    ways.iter().enumerate().map(row).collect()
}

fn main() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|it| it.parse().ok()).unwrap_or(default);
    let (rounds, seconds) = (number("ROUNDS", 5), number("SECONDS_A_WINDOW", 3));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let measured = LOADS.map(|(name, diverge, pause_ms, ways)| {
        println!("{name}: medians of {rounds} rounds of {seconds} s");
        let window = Duration::from_secs(seconds);
        let ways = runtime.block_on(measure(diverge, pause_ms, ways, rounds as usize, window));
        json!({"load": name, "ways": ways})
    });
    let report = json!({"rounds": rounds, "window_seconds": seconds, "aim_ratio": AIM, "loads": measured});
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("demo.json"), format!("{report:#}\n")).unwrap();
    println!("written to target/bench/demo.json");
}
