//! The main job, to be seen without Xen: a pair of hosts, a client, a kill, a report.
//!
//! ```text
//!  this process:  client ─ TCP ─▶ edge ─▶ switch ◀── net-a ── host a (child)  guest
//!                                          ▲  └──── net-b ── host b (child)  its copy
//!                                 arbiter ─┘ fences the port of who lost
//! ```
//!
//! The hosts are the same `xl-colo host` that runs by hand. [`client`] is the load that must notice nothing,
//! [`report`] is what a person reads afterwards. The trap: a child must not outlive a demo that was itself killed,
//! so each host follows its standard input, which closes with this process.

pub mod client;
mod nested;
mod page;
mod pair;
pub mod report;

use crate::cli::{DemoArgs, EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_LOST, Victim};
use crate::colo::hello::Mode;
use crate::daemon::operator::progress::Display;
use crate::daemon::status::{Protection, Status};
use crate::daemon::unix_us;
use crate::say;
use client::{ClientConfig, Live};
use nested::Nested;
use pair::{Pair, PairConfig, PairError};
use report::DemoReport;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// The demo guest's MAC address.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x10, 0x77, 0x00, 0x00, 0x02];
/// The demo guest's IPv4 address.
pub const GUEST_IP: [u8; 4] = [10, 77, 0, 2];

/// How long the first copy may take.
const SYNC_DEADLINE: Duration = Duration::from_secs(300);
/// How long the survivor may take to go on.
const TAKEOVER_DEADLINE: Duration = Duration::from_secs(30);

/// Two hosts, one of which runs a guest, and all that is around them.
trait World {
    /// Where clients connect.
    fn address(&self) -> SocketAddr;
    /// A host's process.
    fn pid(&self, name: &str) -> u32;
    /// Frames the switch refused from a host that lost.
    fn fenced_frames(&self) -> u64;
    /// What a host says of itself.
    async fn status(&self, name: &str) -> Result<Status, PairError>;
    /// Begins to protect the guest of host a with host b.
    async fn protect(&self, mode: Mode) -> Result<(), PairError>;
    /// SIGKILL, and the end of the process.
    async fn kill(&mut self, name: &str) -> Result<(), PairError>;
    /// When the survivor noticed the kill, by our clock, in µs since 1970.
    fn noticed_at_us(&self, survivor: &Status) -> Option<u64>;
    /// Copies the event logs of both hosts to a directory, also that of a host that was killed.
    async fn keep_events(&self, dir: &Path) -> Result<(), PairError>;
    /// The run failed: keeps what may tell why.
    async fn failed(&self);
    /// Ends everything and removes its files.
    async fn end(&mut self);
    /// Time between two looks at a host's status.
    const LOOK_INTERVAL: Duration = Duration::from_millis(20);
    /// How long to leave the survivor alone after the kill.
    const QUIET: Duration = Duration::ZERO;
}

/// Runs the demo.
pub async fn run(args: &DemoArgs) -> ExitCode {
    if let Some(Err(error)) = args.report.as_deref().map(page::prepare) {
        return fail(&error);
    }
    match &args.nested {
        Some(script) => tell(args, Nested::start(script.clone(), args)).await,
        None => {
            let config = PairConfig { guest_mib: args.guest_mib, diverge_percent: args.diverge, serve: args.serve };
            tell(args, Pair::start(&config)).await
        }
    }
}

async fn tell<W: World>(args: &DemoArgs, start: impl Future<Output = Result<W, PairError>>) -> ExitCode {
    let result = async {
        let mut pair = tokio::select! {
            started = start => started?,
            () = interrupted() => return Ok(EXIT_FAILED),
        };
        let story =
            async { if args.serve.is_some() { serve(args, &pair).await } else { kill_one(args, &mut pair).await } };
        let outcome = tokio::select! {
            outcome = story => outcome,
            () = interrupted() => Ok(if args.serve.is_some() { 0 } else { EXIT_FAILED }),
        };
        let outcome = match &args.report {
            Some(dir) => {
                let written = page::write(dir, &pair).await;
                outcome.and_then(|code| written.map(|()| code))
            }
            None => outcome,
        };
        if !matches!(outcome, Ok(0)) || std::env::var_os("XEN_COLO_KEEP_LOGS").is_some() {
            pair.failed().await;
        }
        pair.end().await;
        outcome
    };
    match result.await {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(&error),
    }
}

fn fail(error: &PairError) -> ExitCode {
    let environment = matches!(error, PairError::Environment(_));
    let class = if environment { "environment" } else { "failed" };
    say::Failure { class, text: format!("demo: {error}"), remedy: None }.say();
    ExitCode::from(if environment { EXIT_ENVIRONMENT } else { EXIT_FAILED })
}

/// Completes on Ctrl-C and on SIGTERM, so that both end the hosts and remove their files.
async fn interrupted() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

/// Says what is going on, on standard error, so that `--json` has standard output for itself.
fn say(line: impl std::fmt::Display) {
    say::err(&line);
}

async fn protect<W: World>(args: &DemoArgs, pair: &W) -> Result<(), PairError> {
    say(format_args!("protecting the guest: {} mode, {} MiB of memory", args.mode, args.guest_mib));
    pair.protect(args.mode).await?;
    let begun = Instant::now();
    let mut display = Display::new(false);
    loop {
        let status = pair.status("a").await?;
        status.work.iter().for_each(|work| display.show(*work));
        match status.protection {
            Protection::Protected => {
                display.end();
                let ms = begun.elapsed().as_millis();
                say(format_args!(
                    "first copy done: {} MiB of memory in {ms} ms; the guest is protected",
                    args.guest_mib
                ));
                return Ok(());
            }
            Protection::Syncing if begun.elapsed() < SYNC_DEADLINE => tokio::time::sleep(W::LOOK_INTERVAL).await,
            Protection::Syncing => return Err(PairError::Failed("the first copy does not end".into())),
            other => {
                let why = status.why.unwrap_or_default();
                return Err(PairError::Failed(format!("the guest is {other}: {why}")));
            }
        }
    }
}

/// The whole story: load, protection, kill, survivor, verification.
async fn kill_one<W: World>(args: &DemoArgs, pair: &mut W) -> Result<u8, PairError> {
    let live = Arc::new(Live::default());
    let (stop, stopped) = watch::channel(false);
    let config = ClientConfig::of_the_demo(unix_us());
    let config = match args.nested {
        // An emulated machine is slow, and its guest's disk small.
        Some(_) => ClientConfig { short_connections_parallel: 1, pause_between_ms: 50, keys_max: 2_000, ..config },
        None => config,
    };
    let load = tokio::spawn(client::run(pair.address(), stopped, config, live.clone()));
    say(format_args!("a guest runs on host a; a client works on it through {}", pair.address()));
    protect(args, pair).await?;

    let half = Duration::from_millis(args.seconds * 500);
    let before = watch_pair(pair, &live, half).await?;
    let (victim, survivor) = match args.kill {
        Victim::Primary => ("a", "b"),
        Victim::Secondary => ("b", "a"),
    };
    let killed_at_us = unix_us();
    let killed_at = Instant::now();
    say(format_args!("kill -9 {} (host {victim}, the {:?}) in mid-traffic", pair.pid(victim), args.kill)
        .to_string()
        .to_lowercase());
    pair.kill(victim).await?;
    let reaped_after = killed_at.elapsed();
    live.mark_kill();

    // What the survivor's machine does for us now, it does not do for the guest.
    tokio::time::sleep(W::QUIET).await;
    let deadline = Instant::now() + TAKEOVER_DEADLINE;
    let mut alone = pair.status(survivor).await?;
    while alone.protection != Protection::TakenOver && Instant::now() < deadline {
        tokio::time::sleep(W::LOOK_INTERVAL).await;
        alone = pair.status(survivor).await?;
    }
    say(format_args!("host {survivor}: {} (generation {})", alone.protection, alone.generation));
    tokio::time::sleep(half).await;
    let _ = stop.send(true);
    let client = load.await.map_err(|error| PairError::Failed(format!("the client: {error}")))?;
    say(format_args!("looking for {} acknowledged writes on the survivor", client.ledger.names.len()));
    let verified = client::verify(pair.address(), &client.ledger).await;
    let after = pair.status(survivor).await?;

    // What the primary counted: its own last word, which for a killed one is the one before the kill.
    let counted = if args.kill == Victim::Primary { before } else { after.clone() };
    let detected_us = pair.noticed_at_us(&after).map(|at| at.saturating_sub(killed_at_us));
    let takeover = live.takeover().map(|takeover| (takeover + reaped_after).as_secs_f64() * 1000.0);
    let mut failures = client.failures;
    failures.extend(verified.failures);
    if after.protection != Protection::TakenOver {
        failures.push(format!("host {survivor} is {}", after.protection));
    }
    let report = DemoReport {
        mode: args.mode.to_string(),
        killed: format!("{:?}", args.kill).to_lowercase(),
        seed: client.ledger.seed,
        guest_mib: args.guest_mib,
        seconds: args.seconds as f64,
        checkpoints: report::Checkpoints {
            total: counted.checkpoints.total,
            by_cause: counted.checkpoints.by_cause.clone(),
        },
        pause_us: report::PauseMicros {
            p50: counted.pause_us.p50.map(f64::from),
            p99: counted.pause_us.p99.map(f64::from),
            max: counted.pause_us.max.map(f64::from),
        },
        bytes_sent: Some(counted.bytes_sent),
        packets: report::Packets {
            compared: Some(counted.packets.compared),
            released: Some(counted.packets.released),
            held: Some(counted.packets.held),
        },
        fenced_frames: Some(pair.fenced_frames()),
        detection_ms: detected_us.map(|us| us as f64 / 1000.0),
        takeover_ms: takeover,
        after_detection_ms: takeover.zip(detected_us).map(|(ms, us)| (ms - us as f64 / 1000.0).max(0.0)),
        longest_silence_ms: Some(live.longest_silence().as_secs_f64() * 1000.0),
        connection_kept: client.connection_kept,
        connection_error: client.connection_error,
        acknowledged_writes: client.ledger.names.len() as u64,
        acknowledged_after_kill: live.acknowledged_after_kill(),
        checked_writes: verified.checked,
        lost_writes: verified.lost.len() as u64,
        lost_names: verified.lost,
        unknown_writes: client.unknown_writes,
        retried_writes: client.retries,
        failures,
    };
    if say::is_json() {
        say::out(&serde_json::to_string(&report).unwrap_or_default());
    } else {
        say::out(&report);
    }
    if let Some(dir) = &args.report {
        page::keep_clients(dir, &report)?;
    }
    Ok(if report.exit_code() == 0 { 0 } else { EXIT_LOST })
}

/// Shows the pair at work for a while, and returns the primary's last word.
async fn watch_pair<W: World>(pair: &W, live: &Live, time: Duration) -> Result<Status, PairError> {
    let until = Instant::now() + time;
    let mut said_at = Instant::now();
    loop {
        let status = pair.status("a").await?;
        if Instant::now() >= until {
            return Ok(status);
        }
        if said_at.elapsed() >= Duration::from_secs(1) {
            said_at = Instant::now();
            let pause = status.pause_us.p50.map_or_else(String::new, |us| format!(", pause p50 {us} µs"));
            say(format_args!(
                "{}: {} checkpoints{pause}, {} writes acknowledged",
                status.protection,
                status.checkpoints.total,
                live.acknowledged()
            ));
        }
        tokio::time::sleep(W::LOOK_INTERVAL.min(until.saturating_duration_since(Instant::now()))).await;
    }
}

/// Leaves the pair to the user: their curl, their kill.
async fn serve<W: World>(args: &DemoArgs, pair: &W) -> Result<u8, PairError> {
    protect(args, pair).await?;
    let address = pair.address();
    say(format_args!("the guest answers at http://{address}/  (try: curl -T FILE http://{address}/k/NAME)"));
    say(format_args!(
        "host a (primary) is pid {}, host b is pid {}; kill -9 or kill -STOP one",
        pair.pid("a"),
        pair.pid("b")
    ));
    say("Ctrl-C ends the demo");
    let mut known: [Option<Protection>; 2] = [None; 2];
    loop {
        tokio::time::sleep(W::LOOK_INTERVAL * 5).await;
        for (slot, name) in known.iter_mut().zip(["a", "b"]) {
            let look = tokio::time::timeout(Duration::from_millis(500), pair.status(name)).await;
            let Ok(Ok(status)) = look else { continue };
            if *slot != Some(status.protection) {
                *slot = Some(status.protection);
                let why = status.why.map_or_else(String::new, |why| format!(" ({why})"));
                say(format_args!("host {name}: {}, generation {}{why}", status.protection, status.generation));
            }
        }
    }
}
