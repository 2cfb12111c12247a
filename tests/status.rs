//! What a pair says of itself, field by field: each that it has is in the table of fields and of the kind that the table
//! says, those that must be there are, they move when what they tell of moves, and they agree with each other.
//!
//! The table is `status::fields`, which the man page shows. A value that no pair moves in so short a time is in [`STILL`],
//! with who sees to it instead.

use crate::common::host::{self, Host};
use crate::common::world::{Plan, World};
use crate::common::{PATIENCE, until, xl_colo};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::{Protect, Request};
use xen_colo::daemon::qmp::client::Monitor;
use xen_colo::daemon::status::Protection;
use xen_colo::daemon::status::fields::{FIELDS, Field, Kind};

/// Fields that this pair does not have.
const ABSENT: [&str; 11] = [
    "disks[].export",               // config.rs
    "guest_id",                     // a Xen domain's
    "risk",                         // remus.rs: who lets packets go at once
    "lock_step.tried_again_in_ms",  // diverging.rs: lock-step that does not pay
    "last_checkpoint.stream_bytes", // events.rs: events have it
    "last_checkpoint.flow",         // pair/primary/steps.rs: the latest one may have another cause
    "last_checkpoint.service.protocol",
    "last_checkpoint.service.port",
    "last_checkpoint.service.port.guest",
    "last_checkpoint.service.port.peer",
    "disks[].errors[]", // full_disk.rs
];
/// Numbers that it has, and that need not move.
const STILL: [&str; 32] = [
    "pid",
    "peer_health.lost_after_ms",
    "disk_link_losses",      // disk_link.rs
    "packet_link_losses",    // packet_link.rs
    "packets.dropped_stale", // of frames under way at a checkpoint: chance
    "totals.dropped_stale",
    "packets.dropped_network", // a switch that does not read
    "packets.lost_by_kernel",  // filter.rs: real devices
    "queues.network_bytes",
    "lock_step.given_up", // diverging.rs
    "totals.lock_step_given_up",
    "disks[].fenced_writes",         // hang.rs: a primary that wakes
    "disks[].spared_bytes",          // as fast as the wire
    "disks[].skipped_bytes",         // resync.rs
    "last_checkpoint.devices_bytes", // an embedded guest's registers
    "digests.looked_into",           // digests.rs
    "last_checkpoint.reply_us",      // a few us, and may be as many the next time
    "last_checkpoint.pause_us",
    "last_checkpoint.capture_us",
    "last_checkpoint.pages",
    "lost_at_unix_us", // compared with this process's clock
    "decided_at_unix_us",
    "work.done_bytes", // progress.rs: a first copy takes 30 ms here
    "work.total_bytes",
    "pause_us.p50", // a rank of many; compared with the events
    "pause_us.p99",
    "pause_us.max",
    "interval_us.p50",
    "interval_us.p99",
    "interval_us.max",
    "queues.disk_bytes",   // what a socket has taken waits there no more
    "queues.stream_bytes", // a wire as fast as the copy; packets_bytes, which waits in the same kind of queue, moves
];

/// What was seen of each field.
#[derive(Default)]
struct Seen(BTreeMap<String, BTreeSet<String>>);

fn field(path: &str) -> Option<&'static Field> {
    let path = path.strip_prefix("disk.").map_or(path.to_owned(), |inner| format!("disks[].{inner}"));
    FIELDS.iter().find(|(known, ..)| *known == path)
}

/// Each value that is not null, with its path in the table's way.
fn leaves<'a>(path: &str, value: &'a Value, out: &mut Vec<(String, &'a Value)>) {
    match value {
        Value::Null => {}
        Value::Object(members) => members.iter().for_each(|(key, value)| {
            let key = if path.ends_with("by_cause") { "*" } else { key };
            let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
            leaves(&path, value, out);
        }),
        Value::Array(values) => values.iter().for_each(|value| leaves(&format!("{path}[]"), value, out)),
        leaf => out.push((path.to_owned(), leaf)),
    }
}

impl Seen {
    /// Every field is known, and of its kind.
    fn look(&mut self, status: &Value) {
        let mut found = Vec::new();
        leaves("", status, &mut found);
        for (path, value) in found {
            let Some((known, kind, _)) = field(&path) else { panic!("{path} is in no table: {value}") };
            assert!(kind.fits(value), "{path} is {value}, which is no {kind:?}: {status:#}");
            self.0.entry((*known).to_owned()).or_default().insert(value.to_string());
        }
    }

    /// Fields that were to be there and were not, or that were always the same.
    fn lacks(&self) -> Vec<&'static str> {
        let lacking = |(path, kind, _): &&Field| {
            let values = self.0.get(*path).map_or(0, BTreeSet::len);
            let moves = !matches!(kind, Kind::Text | Kind::Word(_) | Kind::Flag) && !STILL.contains(path);
            !ABSENT.contains(path) && values < if moves { 2 } else { 1 }
        };
        FIELDS.iter().filter(lacking).map(|(path, ..)| *path).collect()
    }
}

async fn status(world: &World, host: &str) -> Value {
    let run_dir = world.path("").display().to_string();
    let output = xl_colo(&["status", host, "--json", "--run-dir", &run_dir]).await;
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The same, without a process for each look.
async fn ask(host: &Host) -> Value {
    host.ask(Request::Status).await.unwrap()
}

fn number(status: &Value, path: &str) -> u64 {
    status.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} is no number: {status:#}"))
}

fn unix_us() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros() as u64
}

/// What one status says in two ways is the same.
fn agrees_with_itself(status: &Value) {
    let at = |path| number(status, path);
    let by_cause = status["checkpoints"]["by_cause"].as_object().unwrap();
    let sum: u64 = by_cause.values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(at("/checkpoints/total"), sum, "{status:#}");
    assert_eq!(at("/bytes_sent"), at("/wire/stream_bytes") + at("/wire/disk_bytes"), "{status:#}");
    let ratio = at("/wire/stream_bytes") as f64 / at("/wire/memory_bytes") as f64;
    assert!((status["wire"]["ratio"].as_f64().unwrap() - ratio).abs() < 1e-9, "{status:#}");
    for times in ["pause_us", "interval_us"] {
        let [p50, p99, max] = ["p50", "p99", "max"].map(|key| number(&status[times], &format!("/{key}")));
        assert!(0 < p50 && p50 <= p99 && p99 <= max, "{times}: {status:#}");
    }
    let last = &status["last_checkpoint"];
    assert!(by_cause.contains_key(last["cause"].as_str().unwrap()), "{status:#}");
    let of_last = |path| number(last, path);
    assert_eq!(of_last("/release_us"), of_last("/capture_us") + of_last("/transfer_us"), "{status:#}");
    assert!(of_last("/pause_us") <= number(&status["pause_us"], "/max"), "{status:#}");
    // What the peer holds is older than its owning it. A checkpoint that is owned and not loaded yet is not the last one.
    let (recovery_us, owned_us) = (at("/recovery_point_ms") * 1000 + 1000, of_last("/age_ms") * 1000);
    let is_last = at("/checkpoints/total") == of_last("/checkpoint");
    assert!(!is_last || recovery_us >= owned_us + of_last("/release_us"), "{status:#}");
    let disks = status["disks"].as_array().unwrap();
    for key in ["total_bytes", "copied_bytes", "sent_bytes", "waiting_bytes"] {
        let sum: u64 = disks.iter().map(|disk| disk[key].as_u64().unwrap()).sum();
        assert_eq!(status["disk"][key].as_u64(), Some(sum), "{key}: {status:#}");
    }
    assert!(at("/packets/compared") <= at("/packets/released"), "{status:#}");
    let health = if status["degraded"].as_array().unwrap().is_empty() { "protected" } else { "degraded" };
    assert_eq!(status["health"], health);
}

/// Percentiles are those of the checkpoints that the events tell of, one by one.
async fn percentiles_are_of_the_checkpoints(world: &World, status: &Value) {
    let run_dir = world.path("").display().to_string();
    let output = xl_colo(&["events", "a", "--json", "--run-dir", &run_dir]).await;
    let events: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // Those of a protection before this one are another story.
    let begun = events.iter().rposition(|event| event["event"] == "syncing").unwrap();
    for times in ["pause_us", "interval_us"] {
        let mut all: Vec<u64> = events[begun..].iter().filter_map(|event| event[times].as_u64()).collect();
        all.sort_unstable();
        let [p50, p99, max] = ["p50", "p99", "max"].map(|key| number(&status[times], &format!("/{key}")));
        assert!(all.contains(&p50) && all.contains(&p99) && all.contains(&max), "{times}: {status:#}: {all:?}");
        let below = |value: u64| all.partition_point(|it| *it < value) as f64 / all.len() as f64;
        assert!((0.25..=0.75).contains(&below(p50)), "{times}: {p50} is no median of {all:?}");
        assert!(below(p99) >= below(p50), "{times}: {all:?}");
    }
}

/// Connections that are open before the secondary falls silent: a new one would wait for its first answer.
async fn connections(world: &World, count: usize) -> Vec<TcpStream> {
    let mut all = Vec::new();
    for _ in 0..count {
        let mut link = TcpStream::connect(world.address()).await.unwrap();
        link.write_all(b"GET / HTTP/1.1\r\nHost: g\r\n\r\n").await.unwrap();
        assert!(link.read(&mut [0; 4096]).await.unwrap() > 0, "it is open when the guest has answered");
        all.push(link);
    }
    all
}

/// Writes that the guest can take in its first window.
async fn write(connections: &mut [TcpStream]) {
    for (number, link) in connections.iter_mut().enumerate() {
        let body = vec![number as u8 | 1; 8000];
        let head = format!("PUT /k/still-{number} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n", body.len());
        link.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_a_pair_is_there_of_its_kind_and_moves() {
    let plan = Plan { guest_mib: 64, diverge: 20, disks: 2, metrics: true, narrow_wire: true, ..Plan::default() };
    let mut world = World::start(plan).await;
    let mut seen = Seen::default();
    let alone = status(&world, "a").await;
    seen.look(&alone);
    assert_eq!((&alone["health"], &alone["protection"]), (&"unprotected".into(), &"unprotected".into()));
    for absent in ["recovery_point_ms", "last_checkpoint", "peer_health", "peer", "mode", "dirty_pages_per_s", "work"] {
        assert!(alone[absent].is_null(), "{absent} of a guest that nobody protects: {alone:#}");
    }
    seen.look(&status(&world, "b").await);

    let load = world.load();
    let ordered = Protect {
        heartbeat_misses: Some(250),
        checkpoint_delay_ms: Some(200),
        packet_digests: true,
        min_run_percent: Some(1),
        ..host::protect(&world.wire.address, Mode::Colo)
    };
    // A first copy that is not over before it is looked at.
    until("a first copy that is told", async || {
        world.a.order(Request::Protect(ordered.clone())).await;
        world.wire.silence();
        let now = ask(&world.a).await;
        seen.look(&now);
        world.wire.heal();
        world.a.becomes(Protection::Protected).await;
        let work = &now["work"];
        if !work.is_null() {
            assert_eq!((&now["protection"], &now["health"]), (&"syncing".into(), &"unprotected".into()), "{now:#}");
            assert!(number(work, "/done_bytes") <= number(work, "/total_bytes"), "{now:#}");
            return Ok(());
        }
        world.a.order(Request::Unprotect).await;
        world.b.becomes(Protection::Empty).await;
        Err(now)
    })
    .await;
    let mut far = Vec::new();
    let generation = number(&ask(&world.a).await, "/generation");
    world.b.becomes(Protection::StandingBy).await;
    far.extend(connections(&world, 60).await);

    // Under load.
    until("checkpoints under load, and a flow that diverged", async || {
        let (a, b) = (ask(&world.a).await, ask(&world.b).await);
        seen.look(&a);
        seen.look(&b);
        assert_eq!((&b["health"], &b["role"], &b["peer"]), (&"standing-by".into(), &"secondary".into(), &"a".into()));
        let is_whole = number(&a, "/checkpoints/total") > 20 && a["flows"].as_array().is_some_and(|it| !it.is_empty());
        if is_whole && !a["wire"]["ratio"].is_null() && !a["last_checkpoint"].is_null() { Ok(()) } else { Err(a) }
    })
    .await;
    let told = status(&world, "a").await;
    agrees_with_itself(&told);
    percentiles_are_of_the_checkpoints(&world, &told).await;
    assert_eq!((&told["role"], &told["mode"], &told["peer"]), (&"primary".into(), &"colo".into(), &"b".into()));
    assert_eq!(number(&told, "/peer_health/lost_after_ms"), 25_000);
    assert_eq!(number(&told, "/wire/memory_bytes") / 4096, number(&told, "/totals/memory_bytes") / 4096);

    // QMP says the same.
    let monitor = xen_colo::daemon::qmp::host::socket_path(&world.path(""), "a");
    let mut monitor = Monitor::connect(&monitor, PATIENCE).await.unwrap();
    let by_qmp = monitor.execute("query-replication", &serde_json::json!({})).await.unwrap();
    seen.look(&by_qmp);
    agrees_with_itself(&by_qmp);
    let keys = |status: &Value| status.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&by_qmp), keys(&told));

    // Nothing passes to the peer: ages grow as the clock does, what is for it waits, and then it is said what is the matter.
    world.wire.silence();
    let begun = Instant::now();
    write(&mut far).await;
    let before = ask(&world.a).await;
    let waits = ["/queues/packets_bytes", "/disk/waiting_bytes", "/packets/waiting"];
    let mut most = waits.map(|path| (path, 0));
    let degraded = until("what waits, and why that matters", async || {
        let now = ask(&world.a).await;
        seen.look(&now);
        most.iter_mut().for_each(|(path, most)| *most = number(&now, path).max(*most));
        let all_wait = most.iter().all(|(_, most)| *most > 0);
        if now["health"] == "degraded" && all_wait { Ok(now) } else { Err((most, now["health"].clone())) }
    })
    .await;
    let passed_ms = begun.elapsed().as_millis() as u64;
    assert!(degraded["degraded"][0].as_str().unwrap().contains("the peer came to own no state for more than"));
    for path in ["/recovery_point_ms", "/peer_health/heartbeat_age_ms", "/last_checkpoint/age_ms"] {
        let (now, then) = (number(&degraded, path), number(&before, path));
        assert!(now >= 1500 && now <= then + passed_ms + 1000, "{path}: {then}, and {now} after {passed_ms} ms");
    }
    assert_eq!(number(&degraded, "/generation"), generation);
    world.wire.heal();
    until("all is well again", async || {
        let now = ask(&world.a).await;
        seen.look(&now);
        let drained = number(&now, "/queues/stream_bytes") == 0 && number(&now, "/recovery_point_ms") < 1500;
        if now["health"] == "protected" && drained { Ok(()) } else { Err(now) }
    })
    .await;
    drop(far);
    load.goes_on(20).await;

    // The primary dies.
    load.live.mark_kill();
    let killed_at_us = unix_us();
    world.a.kill();
    let taken_over = until("the guest goes on at b, and all is in its image", async || {
        let now = ask(&world.b).await;
        seen.look(&now);
        if now["health"] == "taken-over" && now["work"].is_null() { Ok(now) } else { Err(now) }
    })
    .await;
    assert_eq!(number(&taken_over, "/generation"), generation + 1);
    let [lost, decided] = ["/lost_at_unix_us", "/decided_at_unix_us"].map(|path| number(&taken_over, path));
    assert!(killed_at_us <= lost && lost <= decided && decided <= unix_us(), "{killed_at_us}: {taken_over:#}");
    assert_eq!((&taken_over["exit_reason"], &taken_over["failover"]), (&"error".into(), &"completed".into()));
    assert!(!taken_over["why"].as_str().unwrap().is_empty());
    for absent in ["recovery_point_ms", "peer_health"] {
        assert!(taken_over[absent].is_null(), "{absent} of a guest that is alone: {taken_over:#}");
    }
    load.survives(20).await;
    seen.look(&status(&world, "b").await);
    assert_eq!(seen.lacks(), [""; 0], "not there, or always the same");
    load.ends_unharmed().await;
}

/// Without checkpoints the recovery point is as old as the last one, to the millisecond that passes.
#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_point_grows_older_with_the_clock() {
    let world = World::start(Plan::default()).await;
    let ordered = host::protect(&world.wire.address, Mode::Colo);
    world.a.order(Request::Protect(Protect { checkpoint_delay_ms: Some(3_600_000), ..ordered })).await;
    world.a.becomes(Protection::Protected).await;
    let look = async || {
        let before = Instant::now();
        let status = ask(&world.a).await;
        (number(&status, "/recovery_point_ms"), number(&status, "/checkpoints/total"), before, Instant::now())
    };
    let first = look().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let second = look().await;
    assert_eq!(first.1, second.1, "no checkpoint was taken between");
    let (at_least, at_most) = (second.2 - first.3, second.3 - first.2);
    let grown = u128::from(second.0 - first.0);
    assert!((at_least.as_millis().saturating_sub(1)..=at_most.as_millis() + 1).contains(&grown), "{grown} ms");
}

/// The man page tells of every field with its unit, and so does the help.
#[tokio::test]
async fn every_field_is_documented_with_its_unit() {
    let help = xl_colo(&["help", "status"]).await;
    let help = String::from_utf8(help.stdout).unwrap();
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/packaging/man/xl-colo-status.1"));
    let page = page.unwrap().replace("\\-", "-").replace("\\*(Aq", "'");
    for (path, _, what) in FIELDS {
        for text in [&help, &page] {
            let line = text.lines().find(|line| line.split_whitespace().next() == Some(path));
            let fits = |line: &str| line.ends_with(what) && line.chars().count() <= 100;
            assert!(line.is_some_and(fits), "a line a field: {path}: {line:?}");
        }
    }
}
