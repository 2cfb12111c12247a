//! More who knock than there are descriptors: they leave, and whoever has business is served as before.

use crate::common::host::{Host, host_command};
use crate::common::{LOOK, Listening, PATIENCE, XL_COLO, turn, until};
use std::path::Path;
use std::process::{Command, Stdio};
use tokio::io::AsyncReadExt;
use xen_colo::colo::arbiter::{Claim, Verdict};
use xen_colo::daemon::address::{Address, Link};
use xen_colo::daemon::arbiter::Arbiter;
use xen_colo::daemon::status::Protection;

/// Descriptors that the process under test has: enough for itself.
const DESCRIPTORS: usize = 64;

/// The same command with few descriptors.
fn with_few_descriptors(command: &Command) -> Command {
    let mut few = Command::new("sh");
    few.args(["-c", &format!("ulimit -n {DESCRIPTORS}; exec \"$0\" \"$@\"")]);
    few.arg(command.get_program()).args(command.get_args());
    few
}

/// Descriptors of a process.
fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |files| files.count())
}

/// Comes in numbers, says nothing, and waits until the process has no descriptor left, or has as many guests as it takes.
async fn crowd(address: &Address, pid: u32, takes_all: bool) -> Vec<Link> {
    let mut crowd = Vec::new();
    for _ in 0..2 * DESCRIPTORS {
        crowd.extend(tokio::time::timeout(LOOK, address.connect()).await.ok().and_then(Result::ok));
    }
    if takes_all {
        let full = async || Some(open_files(pid)).filter(|open| *open >= DESCRIPTORS).ok_or_else(|| open_files(pid));
        until("no descriptor is left", full).await;
    }
    // Long enough for several attempts to accept one more.
    tokio::time::sleep(10 * LOOK).await;
    crowd
}

#[tokio::test(flavor = "multi_thread")]
async fn an_arbiter_outlives_a_crowd() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (dir.path().join("arbiter.sock"), dir.path().join("register.json"));
    let address = Address::Unix(socket.clone());
    let mut command = Command::new(XL_COLO);
    command.args(["arbiter", "--listen", &address.to_string()]).arg("--file").arg(file);
    let mut server = Listening::start(with_few_descriptors(&command).stdout(Stdio::null()), &socket);
    let crowd = crowd(&address, server.0.id(), true).await;
    drop(crowd);
    let arbiter = Arbiter::Served(address);
    let claim = Claim { guest: "web".into(), expected: 0, holder: "a".into() };
    let verdict =
        until("a claim is answered", async || arbiter.claim(claim.clone()).await.map_err(|e| e.to_string())).await;
    // A claim may be granted whose answer came too late.
    assert!(matches!(verdict, Verdict::Won { generation: 1 } | Verdict::Lost(_)), "{verdict:?}");
    assert_eq!(arbiter.query("web").await.unwrap().holder, "a");
    assert!(server.0.try_wait().unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_outlives_a_crowd_at_its_control_socket_and_at_its_peer_port() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = host_command("b", dir.path());
    command.args(["--policy", "hold"]);
    let host = Host::start("b", dir.path(), with_few_descriptors(&command));
    drop(crowd(&Address::Unix(host.socket.clone()), host.pid(), true).await);
    assert_eq!(host.status().await.protection, Protection::Empty);
    // The peer port has fewer places than there are descriptors; whoever says nothing loses its own.
    drop(crowd(&host.address, host.pid(), false).await);
    until("who says hello is heard", async || hello_is_answered(&host.address).await.then_some(()).ok_or("it is not"))
        .await;
    assert_eq!(host.status().await.protection, Protection::Empty);
    assert!(Path::new(&host.socket).exists());
}

/// Whether the peer port answers a word, by saying what is wrong with it.
async fn hello_is_answered(address: &Address) -> bool {
    use tokio::io::AsyncWriteExt;
    let Ok(mut link) = address.connect().await else { return false };
    let asked = async {
        link.write_all(&[0, 0, 0, 7]).await.ok()?;
        link.write_all(b"nonsens").await.ok()?;
        let mut answer = [0; 4];
        link.read_exact(&mut answer).await.ok()
    };
    matches!(tokio::time::timeout(PATIENCE / 4, asked).await, Ok(Some(_)))
}
