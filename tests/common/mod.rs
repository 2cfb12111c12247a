//! What the tests share: a world of two hosts, and the ways to harm it.
//!
//! ```text
//!  world    switch, edge and arbiter in this process; the hosts are children     load    clients that remember promises
//!  host     one `xl-colo host` child: status, orders, signals                    peer    a scripted host, one step at a time
//!  conversation  our NBD client on a socket
//!  comparator    one behind its four sockets, ours or QEMU's        frames     what guests send through it
//!  qemu     one without a machine
//!  lab      two guests with real kernels, in network namespaces
//!  wire     a proxy that can go silent, close, and heal
//! ```
//!
//! Two rules. Every wait has a deadline and, when it passes, says what was seen last. And no more than
//! [`WORLDS_MAX`] worlds run at once: hosts that starve each other lose heartbeats, which is right of them and
//! proves nothing.

pub mod comparator;
pub mod conversation;
pub mod frames;
pub mod host;
pub mod lab;
pub mod load;
pub mod peer;
pub mod qemu;
pub mod wire;
pub mod world;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, SemaphorePermit};

/// The product.
pub const XL_COLO: &str = env!("CARGO_BIN_EXE_xl-colo");
/// Longest wait for anything a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks.
pub const LOOK: Duration = Duration::from_millis(10);
/// Worlds that run at once.
const WORLDS_MAX: usize = 3;

static WORLDS: Semaphore = Semaphore::const_new(WORLDS_MAX);

/// Waits for a place among the worlds that run.
pub async fn turn() -> SemaphorePermit<'static> {
    WORLDS.acquire().await.unwrap()
}

/// Runs `xl-colo` to its end, which must come within [`PATIENCE`].
pub async fn xl_colo(args: &[&str]) -> Output {
    run(XL_COLO, args).await
}

/// Runs any program to its end, which must come within [`PATIENCE`].
pub async fn run(program: &str, args: &[&str]) -> Output {
    let child = tokio::process::Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    tokio::time::timeout(PATIENCE, child.wait_with_output())
        .await
        .unwrap_or_else(|_| panic!("{program} {args:?} hangs"))
        .unwrap()
}

/// Runs a program that must succeed, and returns what it printed.
pub async fn succeeds(program: &str, args: &[&str]) -> String {
    let output = run(program, args).await;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {stdout}{}", String::from_utf8_lossy(&output.stderr));
    stdout
}

/// Bytes that differ from place to place; the second MiB is zeroes.
pub fn pattern(len: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at / 509 + at % 251) as u8).collect();
    bytes[1 << 20..2 << 20].fill(0);
    bytes
}

/// Standard error of a command that must have failed with this exit code and one line that says why.
#[track_caller]
pub fn one_line(output: &Output, exit_code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(exit_code), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "one line says why: {stderr}");
    assert!(stderr.starts_with("xl-colo"), "the line names the program: {stderr}");
    stderr
}

/// A program that listens on a Unix socket, killed when dropped.
pub struct Listening(pub Child);

impl Listening {
    /// Starts it, and waits until it listens.
    pub fn start(command: &mut Command, socket: &Path) -> Self {
        let mut it = Self(command.stdin(Stdio::null()).spawn().unwrap());
        let begun = Instant::now();
        while !listens(it.0.id(), socket) {
            assert!(begun.elapsed() < PATIENCE, "{command:?} does not listen");
            assert!(it.0.try_wait().unwrap().is_none(), "{command:?} has ended");
            std::thread::sleep(LOOK);
        }
        it
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether somebody listens at this path, in the network namespace of the process `pid`. That the path is there is not
/// enough: between `bind` and `listen` a client is refused.
pub fn listens(pid: u32, socket: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let sockets = std::fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some(ACCEPTS_CONNECTIONS) && fields.nth(3).is_some_and(|path| socket == Path::new(path))
    })
}

/// Polls until `look` gives something; `last` is what it saw when the deadline passes.
pub async fn until<T, S: std::fmt::Debug>(what: &str, mut look: impl AsyncFnMut() -> Result<T, S>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) if Instant::now() >= deadline => panic!("{what}: not within {PATIENCE:?}; last seen: {seen:#?}"),
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Where a program is, or a loud note that the test is skipped. Continuous integration installs them all.
pub fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file());
    if found.is_none() {
        eprintln!("SKIP: {program} is not installed");
    }
    found
}
