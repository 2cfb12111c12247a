//! `xl-colo remus` as an operator types it: xl's letters, a far end behind a command, every way it can end.

use crate::common::host::Host;
use crate::common::world::{Plan, World};
use crate::common::{XL_COLO, one_line, until, xl_colo};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use xen_colo::daemon::status::{Health, Protection};

fn plan() -> Plan {
    Plan { fence: false, ..Plan::default() }
}

fn run_dir(world: &World) -> String {
    world.path("").display().to_string()
}

/// What ssh would run on host b.
fn receiver(world: &World) -> String {
    format!("exec {XL_COLO} receive -r --host b --run-dir {}", run_dir(world))
}

/// A running `xl-colo remus`, killed when dropped.
struct Remus(Child);

impl Drop for Remus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Remus {
    fn start(world: &World, letters: &[&str], peer: &str) -> Self {
        let mut command = Command::new(XL_COLO);
        command.arg("remus").args(letters).args(["--run-dir", &run_dir(world), "web", peer]);
        Self(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn signal(&self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    }

    /// The next line it says.
    fn says(&mut self) -> String {
        let mut line = String::new();
        // Byte by byte: what follows belongs to `end`.
        let stdout = self.0.stdout.as_mut().unwrap();
        while !line.ends_with('\n') {
            let mut byte = [0];
            stdout.read_exact(&mut byte).unwrap();
            line.push(byte[0].into());
        }
        line
    }

    /// Its exit code and all it said since.
    async fn end(mut self) -> (i32, String) {
        let status = until("remus ends", async || self.0.try_wait().unwrap().ok_or("it runs")).await;
        let mut said = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.code().unwrap(), said)
    }
}

async fn checkpoints_are_taken(host: &Host) {
    host.is("three checkpoints", |status| status.checkpoints.total >= 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_protected_through_a_command_and_its_host_dies() {
    for letters in [&["-i", "100", "-s", ""][..], &["-c", "-s", ""]] {
        let mut world = World::start(plan()).await;
        let load = world.load();
        let remus = Remus::start(&world, letters, &receiver(&world));
        world.a.becomes(Protection::Protected).await;
        world.b.becomes(Protection::StandingBy).await;
        load.goes_on(20).await;
        checkpoints_are_taken(&world.a).await;
        load.live.mark_kill();
        world.a.kill();
        world.b.becomes(Protection::TakenOver).await;
        load.survives(20).await;
        load.ends_unharmed().await;
        let (code, said) = remus.end().await;
        assert_eq!(code, 1, "its host is gone: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_it_ends_the_protection_and_the_guest_goes_on() {
    let world = World::start(plan()).await;
    let load = world.load();
    let mut remus =
        Remus::start(&world, &["-N", "/etc/xen/scripts/remus-netbuf-setup", "-u"], &world.wire.address.to_string());
    let said = tokio::task::block_in_place(|| remus.says());
    assert_eq!(said, "web is protected: host b can go on with it\n");
    checkpoints_are_taken(&world.a).await;
    remus.signal();
    let (code, said) = remus.end().await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("web goes on here, unprotected"), "{said}");
    assert_eq!(world.a.status().await.protection, Protection::Unprotected);
    world.b.becomes(Protection::Empty).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_where_the_guest_is_when_the_pair_is_over() {
    let mut world = World::start(plan()).await;
    let remus = Remus::start(&world, &["-s", ""], &receiver(&world));
    world.a.becomes(Protection::Protected).await;
    world.b.kill();
    world.a.becomes(Protection::TakenOver).await;
    let (code, said) = remus.end().await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("backup failed; the guest goes on here, unprotected: "), "{said}");

    let world = World::start(plan()).await;
    let remus = Remus::start(&world, &["-s", ""], &receiver(&world));
    world.a.becomes(Protection::Protected).await;
    let output = xl_colo(&["failover", "--host", "b", "--run-dir", &run_dir(&world)]).await;
    assert!(output.status.success(), "{output:?}");
    world.b.becomes(Protection::TakenOver).await;
    let (code, said) = remus.end().await;
    assert_eq!(code, 0, "the domain is not here any more: {said}");
    assert!(said.contains("web is not here any more"), "{said}");
    // Of two hosts that know the guest the one that has it is meant, not the first, of which it would be said that the guest
    // does not run there.
    let said = one_line(&xl_colo(&["remus", "--run-dir", &run_dir(&world), "web", "127.0.0.1:1"]).await, 1);
    assert!(said.contains("peer tcp:127.0.0.1:1: Connection refused"), "{said}");
}

/// Nothing is kept, and everything is measured; the guest is none the worse when it ends.
#[tokio::test(flavor = "multi_thread")]
async fn into_a_black_hole() {
    let world = World::start(plan()).await;
    let load = world.load();
    let remus = Remus::start(&world, &["-F", "-b", "-n", "-d", "-i", "50"], "nowhere");
    let status = world.a.becomes(Protection::Protected).await;
    checkpoints_are_taken(&world.a).await;
    load.goes_on(20).await;
    let told = status.to_string();
    assert!(told.contains("UNSAFE      packets leave before the peer owns"), "{told}");
    assert_eq!((status.health, status.degraded.len()), (Health::Degraded, 1), "{told}");
    assert_eq!(world.a.status().await.packets.held, 0, "they wait for nothing");
    remus.signal();
    assert_eq!(remus.end().await.0, 0);
    world.a.becomes(Protection::Unprotected).await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_in_a_line() {
    let world = World::start(plan()).await;
    let dir = run_dir(&world);
    let remus = async |words: &[&str]| xl_colo(&[&["remus", "--run-dir", &dir], words].concat()).await;
    for (words, why) in [
        (&["-b", "web", "b"][..], "-b gives up what protects the guest; it needs -F"),
        (&["-F", "-d", "web", "b"], "-d: a guest runs here on the disk that is replicated"),
        (&["db", "b"], "no host here runs a guest \"db\": host a has web"),
        (&["7", "b"], "no host here runs a guest \"7\""),
        (&["-s", "", "web", "echo who is b >&2; exit 255"], "the peer cannot be reached: who is b"),
        (&["-s", "/nonexistent/ssh", "web", "b"], "/nonexistent/ssh"),
        (&["web", "127.0.0.1:1"], "peer tcp:127.0.0.1:1"),
        (&["-s", "", "web", "echo this is no welcome"], "the peer does not speak xen-colo"),
    ] {
        let said = one_line(&remus(words).await, 1);
        assert!(said.contains(why), "{words:?}: {said}");
        let status = world.a.status().await;
        assert_eq!((status.protection, status.generation), (Protection::Unprotected, 0), "{words:?}: {status:#?}");
    }
    for words in [
        &["web"][..],
        &["-c", "-i", "5", "web", "b"],
        &["-c", "-b", "web", "b"],
        &["-p", "web", "b"],
        &["-x", "web", "b"],
    ] {
        assert_eq!(remus(words).await.status.code(), Some(2), "{words:?}");
    }
    let said = one_line(&xl_colo(&["receive", "--run-dir", &world.path("nothing").display().to_string()]).await, 1);
    assert!(said.contains("nobody stands by here"), "{said}");
    // A guest that is protected is protected once.
    let _first = Remus::start(&world, &["-s", ""], &receiver(&world));
    world.a.becomes(Protection::Protected).await;
    let said = one_line(&remus(&["-s", "", "web", &receiver(&world)]).await, 1);
    assert!(said.contains("protected"), "{said}");
    assert_eq!(world.a.status().await.protection, Protection::Protected);
}
