//! The end of a protection without a failover: nothing is lost, nobody is left behind, and it can begin again.

use crate::common::host::{Host, host_command, protect};
use crate::common::peer::ScriptedSecondary;
use crate::common::world::{Plan, World};
use crate::common::{one_line, turn, until, xl_colo};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xen_colo::colo::heartbeat::{BEAT_BYTES, Beat, Word};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::Protection;

/// A switch that does not fence: a second protection claims a generation too, and nobody has lost by it.
fn plan() -> Plan {
    Plan { fence: false, ..Plan::default() }
}

async fn unprotect(world: &World, host: &str) -> std::process::Output {
    xl_colo(&["unprotect", "--host", host, "--run-dir", world.path("").to_str().unwrap()]).await
}

/// The guest runs on host a as if it had never been protected, and host b has nothing of it.
async fn is_over(a: &Host, b: &Host) {
    let status = a.status().await;
    assert_eq!(status.protection, Protection::Unprotected, "{status:#?}");
    assert_eq!(status.why.as_deref(), Some("the protection was ended (xl-colo unprotect)"));
    assert_eq!((status.packets.waiting, status.disk.waiting_bytes), (0, 0), "nothing is held back");
    assert!(!status.disk.errors.iter().any(|error| !error.is_empty()), "{status:#?}");
    let status = b.becomes(Protection::Empty).await;
    assert_eq!((status.guest, status.why.as_deref()), (None, Some("host a ended the protection of web")));
}

#[tokio::test(flavor = "multi_thread")]
async fn protected_let_go_and_protected_again_then_the_primary_dies() {
    for mode in [Mode::Remus, Mode::Colo] {
        let mut world = World::start(plan()).await;
        let load = world.load();
        for generation in 1..=3 {
            world.protect(mode).await;
            load.goes_on(20).await;
            let output = unprotect(&world, "a").await;
            assert!(output.status.success(), "{mode}: {}", String::from_utf8_lossy(&output.stderr));
            is_over(&world.a, &world.b).await;
            assert_eq!(world.a.status().await.generation, generation, "{mode}: the one it had");
            load.goes_on(20).await;
        }
        world.protect(mode).await;
        load.goes_on(20).await;
        load.live.mark_kill();
        world.a.kill();
        let survivor = world.b.becomes(Protection::TakenOver).await;
        assert_eq!(survivor.generation, 5, "{mode}");
        load.survives(20).await;
        load.ends_unharmed().await;
    }
}

/// At whatever moment of the first copy, or of the first checkpoints, the order comes.
#[tokio::test(flavor = "multi_thread")]
async fn let_go_at_any_moment_and_protected_again_at_once() {
    let world = World::start(Plan { guest_mib: 64, ..plan() }).await;
    let load = world.load();
    for round in 0..12_u64 {
        let mode = if round % 2 == 0 { Mode::Colo } else { Mode::Remus };
        world.a.order(Request::Protect(protect(&world.wire.address, mode))).await;
        tokio::time::sleep(std::time::Duration::from_millis(round * 40)).await;
        let before = world.a.status().await;
        world.a.order(Request::Unprotect).await;
        let after = world.a.status().await;
        assert_eq!(after.protection, Protection::Unprotected, "{before:#?}\n{after:#?}");
    }
    is_over(&world.a, &world.b).await;
    load.goes_on(20).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_decides_a_protection_can_be_ended_and_begun_again() {
    let _turn = turn().await;
    for policy in ["arbiter", "hold", "alone"] {
        let dir = tempfile::tempdir().unwrap();
        let start = |name: &str| {
            let mut command = host_command(name, dir.path());
            command.args(["--policy", policy]);
            if policy == "arbiter" {
                command.args(["--arbiter", &format!("file:{}", dir.path().join("register.json").display())]);
            }
            if name == "a" {
                command.args(["--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]);
            }
            Host::start(name, dir.path(), command)
        };
        let (a, b) = (start("a"), start("b"));
        for _ in 0..2 {
            a.order(Request::Protect(protect(&b.address, Mode::Colo))).await;
            a.becomes(Protection::Protected).await;
            a.order(Request::Unprotect).await;
            is_over(&a, &b).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn there_must_be_a_protection_and_the_order_must_come_where_it_begins() {
    let world = World::start(plan()).await;
    for host in ["a", "b"] {
        let why = one_line(&unprotect(&world, host).await, 1);
        assert!(why.contains("nothing is protected from this host"), "{why}");
    }
    world.protect(Mode::Remus).await;
    let why = one_line(&unprotect(&world, "b").await, 1);
    assert!(why.contains("stands by for host a; end the protection there: xl-colo unprotect"), "{why}");
    assert_eq!(world.a.status().await.protection, Protection::Protected, "nothing has changed");
    world.a.order(Request::Unprotect).await;
    let why = one_line(&unprotect(&world, "a").await, 1);
    assert!(why.contains("nothing is protected from this host"), "{why}");
}

/// Beats, and says what a secondary would say, or never does.
async fn beats(mut link: xen_colo::daemon::address::Link, gives_up: bool) {
    let mut bytes = [0; BEAT_BYTES];
    let mut heard = 0;
    while link.read_exact(&mut bytes).await.is_ok() {
        let beat = Beat::decode(&bytes);
        let word = if gives_up && beat.word == Word::Dismissal { Word::GivenUp } else { Word::None };
        if beat.sequence > heard {
            heard = beat.sequence;
            let mut out = BytesMut::new();
            Beat { sequence: heard, echo: heard, word, ..beat }.encode(&mut out);
            if link.write_all(&out).await.is_err() {
                return;
            }
        }
    }
}

/// The peer has a state, and its word decides: without it the arbiter is asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_give_up_is_one_that_is_lost() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = host_command("a", dir.path());
    command.args(["--arbiter", &format!("file:{}", dir.path().join("register.json").display())]);
    command.args(["--guest", "web", "--guest-mib", "1", "--disk-mib", "1"]);
    let a = Host::start("a", dir.path(), command);
    let peer = ScriptedSecondary::listens().await;
    for (gives_up, protection, generation) in
        [(true, Protection::Unprotected, 1), (false, Protection::TakenOver, 3), (true, Protection::Unprotected, 4)]
    {
        let request = protect(&peer.address(), Mode::Remus);
        let (mut accepted, ()) = tokio::join!(peer.welcomes_all(), a.order(Request::Protect(request)));
        accepted.serves_disk(1 << 20);
        let (never, _) = tokio::io::duplex(1);
        let beating = tokio::spawn(beats(std::mem::replace(&mut accepted.heartbeat, Box::new(never)), gives_up));
        accepted.is_copied().await;
        a.becomes(Protection::Protected).await;
        a.order(Request::Unprotect).await;
        let status = a.status().await;
        assert_eq!((status.protection, status.generation), (protection, generation), "{status:#?}");
        if !gives_up {
            let why = status.why.unwrap_or_default();
            assert!(why.contains("did not confirm the end of the protection within"), "{why}");
        }
        until("the links are closed", async || if beating.is_finished() { Ok(()) } else { Err("open") }).await;
    }
}
