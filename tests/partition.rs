//! The hosts live and cannot hear each other: who goes on is decided elsewhere, and never by both.
//!
//! | reaches the arbiter | a | b |
//! |---|---|---|
//! | both | exactly one goes on, the other stops and says who has the guest |||
//! | only a | goes on | held; stopped once it reaches the arbiter |
//! | only b | held; stopped once it reaches the arbiter | goes on |
//! | neither | held | held; once the arbiter is back exactly one goes on |

use crate::common::world::{Plan, World};
use std::time::Duration;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::Protection;
use xen_colo::demo::client;

/// Between two heartbeats, as `common::host::protect` orders.
const BEAT: Duration = Duration::from_millis(100);
/// How long a decision is watched: nothing may overturn it.
const WATCH: Duration = Duration::from_millis(500);

async fn the_guest_goes_on(world: &World) {
    world.answers().await;
    let load = world.load();
    load.goes_on(10).await;
    load.ends_unharmed().await;
}

async fn both_reach_the_arbiter(mode: Mode) {
    let world = World::start(Plan { fence: false, ..Plan::default() }).await;
    let load = world.load();
    world.protect(mode).await;
    load.goes_on(20).await;
    world.wire.silence();
    load.live.mark_kill();
    let a_survived = world.one_survives().await;
    load.survives(20).await;
    // What the partition held back arrives late, and changes nothing.
    world.wire.heal();
    tokio::time::sleep(WATCH).await;
    assert_eq!(world.one_survives().await, a_survived);
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_colo_pair_that_reaches_the_arbiter_one_goes_on() {
    both_reach_the_arbiter(Mode::Colo).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_remus_pair_that_reaches_the_arbiter_one_goes_on() {
    both_reach_the_arbiter(Mode::Remus).await;
}

/// The same with an end that both see, at one moment: a race to the arbiter.
#[tokio::test(flavor = "multi_thread")]
async fn of_a_pair_whose_connections_break_one_goes_on() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(20).await;
    world.wire.close();
    load.live.mark_kill();
    world.one_survives().await;
    load.survives(20).await;
    load.ends_unharmed().await;
}

async fn only_one_reaches_the_arbiter(it_is_a: bool) {
    let world = World::start(Plan { fence: false, ..Plan::default() }).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(20).await;
    let (near, far) = if it_is_a { (&world.a, &world.b) } else { (&world.b, &world.a) };
    let far_arbiter = if it_is_a { &world.arbiter_b } else { &world.arbiter_a };
    far_arbiter.silence();
    world.wire.silence();
    load.live.mark_kill();
    assert_eq!(near.becomes(Protection::TakenOver).await.generation, 2);
    load.survives(20).await;
    // Its lease began with a beat that was confirmed later than the other's, by two intervals at most. Whatever it is asked
    // after its lease, it looks at the clock first.
    tokio::time::sleep(2 * BEAT).await;
    let asking = far.status().await.protection;
    assert!(matches!(asking, Protection::Arbitrating | Protection::Held), "{asking}");
    far.becomes(Protection::Held).await;
    let before = world.settled_port(&far.name).await;
    far_arbiter.heal();
    let why = far.becomes(Protection::Stopped).await.why.unwrap_or_default();
    assert_eq!(why, format!("host {} holds generation 2", near.name));
    tokio::time::sleep(WATCH).await;
    assert_eq!(world.port(&far.name).received_frames, before.received_frames, "the loser sent frames");
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_alone_reaches_the_arbiter_goes_on() {
    only_one_reaches_the_arbiter(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_that_alone_reaches_the_arbiter_goes_on() {
    only_one_reaches_the_arbiter(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_without_an_arbiter_is_held_until_it_is_back() {
    let world = World::start(Plan { fence: false, ..Plan::default() }).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    load.goes_on(20).await;
    world.arbiter_a.close();
    world.arbiter_b.close();
    world.wire.silence();
    world.a.becomes(Protection::Held).await;
    world.b.becomes(Protection::Held).await;
    let said = world.a.status().await.to_string();
    assert!(said.contains("HELD: paused until the arbiter answers or you decide"), "{said}");
    // A held guest does not answer.
    let answered = client::wait_for_answer(world.address(), Duration::ZERO);
    assert!(tokio::time::timeout(WATCH, answered).await.is_err_or_failed());
    world.arbiter_a.heal();
    world.arbiter_b.heal();
    world.one_survives().await;
    world.answers().await;
    load.ends_without_loss().await;
    the_guest_goes_on(&world).await;
}

/// An answer that did not come, in either of its two shapes.
trait NoAnswer {
    fn is_err_or_failed(&self) -> bool;
}

impl<E, F> NoAnswer for Result<Result<(), F>, E> {
    fn is_err_or_failed(&self) -> bool {
        !matches!(self, Ok(Ok(())))
    }
}

/// The guest must not be protected when its generation cannot be claimed: who would decide later?
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_protected_while_the_arbiter_is_away() {
    let world = World::start(Plan::default()).await;
    world.arbiter_a.close();
    let request = crate::common::host::protect(&world.wire.address, Mode::Colo);
    let why = world.a.refusal(Request::Protect(request)).await;
    assert!(why.contains("arbiter") && why.contains("unprotected"), "{why}");
    assert_eq!(world.a.status().await.protection, Protection::Unprotected);
    world.arbiter_a.heal();
    world.protect(Mode::Colo).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_hold_the_operator_decides() {
    let world = World::start(Plan::with_policies("hold", "hold")).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(20).await;
    world.wire.close();
    world.a.becomes(Protection::Held).await;
    world.b.becomes(Protection::Held).await;
    load.live.mark_kill();
    tokio::time::sleep(WATCH).await;
    assert_eq!(load.live.acknowledged_after_kill(), 0, "a held guest answered");
    world.b.order(Request::Failover).await;
    assert_eq!(world.b.becomes(Protection::TakenOver).await.generation, 2);
    load.survives(20).await;
    world.a.stays(Protection::Held, WATCH).await;
    // The second order, on the other host, must not make a second guest.
    let why = world.a.refusal(Request::Failover).await;
    assert!(why.contains("host b holds generation 2"), "{why}");
    world.a.becomes(Protection::Stopped).await;
    load.ends_unharmed().await;
}

/// Under `hold` an order to a pair that is well is the operator's word already.
#[tokio::test(flavor = "multi_thread")]
async fn under_hold_one_order_is_enough() {
    let world = World::start(Plan::with_policies("hold", "hold")).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    load.goes_on(20).await;
    world.b.order(Request::Failover).await;
    assert_eq!(world.b.becomes(Protection::TakenOver).await.generation, 2);
    world.a.becomes(Protection::Held).await;
    load.live.mark_kill();
    load.survives(20).await;
    load.ends_unharmed().await;
}

/// A fencing script in `world`'s directory to be, as a policy.
fn script(dir: &tempfile::TempDir, name: &str, body: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.path().join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("script:{}", path.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_fences_lets_its_host_go_on_and_one_that_fails_holds() {
    let dir = tempfile::tempdir().unwrap();
    let seen = dir.path().join("seen");
    let fences = script(&dir, "fences", &format!("echo \"$@\" >> {}", seen.display()));
    let fails = script(&dir, "fails", "exit 1");
    let world = World::start(Plan::with_policies(fails, fences)).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    load.goes_on(20).await;
    world.wire.close();
    load.live.mark_kill();
    assert_eq!(world.b.becomes(Protection::TakenOver).await.generation, 2);
    let why = world.a.becomes(Protection::Held).await.why.unwrap_or_default();
    assert!(why.contains("held: fencing script") && why.contains("exit status: 1"), "{why}");
    load.survives(20).await;
    assert_eq!(std::fs::read_to_string(seen).unwrap(), "web 1 b\n", "called once, with guest, generation and claimant");
    world.a.stays(Protection::Held, WATCH).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_hangs_is_killed_and_holds() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let hangs = script(&dir, "hangs", &format!("echo $$ > {}\nexec sleep 600", pid_file.display()));
    let mut world = World::start(Plan::with_policies(hangs, "hold")).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    load.goes_on(10).await;
    world.b.kill();
    world.a.becomes(Protection::Arbitrating).await;
    world.a.becomes(Protection::Held).await;
    let pid = std::fs::read_to_string(pid_file).unwrap();
    crate::common::until("the script is killed", async || {
        let alive = std::path::Path::new(&format!("/proc/{}", pid.trim())).exists();
        if alive { Err(pid.clone()) } else { Ok(()) }
    })
    .await;
    world.a.order(Request::Failover).await;
    world.a.becomes(Protection::TakenOver).await;
    world.answers().await;
    load.ends_without_loss().await;
}

/// The unsafe policy does what its name says, so that tests without an arbiter can use it.
#[tokio::test(flavor = "multi_thread")]
async fn under_alone_nobody_is_asked() {
    let world = World::start(Plan::with_policies("alone", "alone")).await;
    world.protect(Mode::Remus).await;
    world.wire.silence();
    for host in [&world.a, &world.b] {
        assert_eq!(host.becomes(Protection::TakenOver).await.generation, 2);
    }
}
