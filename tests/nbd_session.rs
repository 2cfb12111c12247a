//! Our NBD client's session against other people's servers, and ours, that are killed and come back.
//!
//! | server | what happens to it | what must be |
//! |---|---|---|
//! | qemu-nbd, nbd-server, QEMU's own, nbdkit, `xl-colo nbd` | SIGKILL and a new process, again and again | every request completes, every byte is there |
//! | nbdkit that forgets | the same, nothing flushed | what is retained is written again |
//! | nbdkit's filters | late, refusing, leaving with its last client | errors reach the caller; good-bye is said |
//! | a silent cable | nothing passes | the connection is given up in time, and another made |
//!
//! Each request is checked against a disk in memory that is changed in the order of submission. Where a program is
//! not installed the test says that it is skipped.

use crate::common::conversation::Conversation;
use crate::common::peer::soon;
use crate::common::wire::Wire;
use crate::common::{LOOK, Listening, PATIENCE, XL_COLO, installed, listens, until};
use crate::device_model::qmp::Client as Monitor;
use bytes::Bytes;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::engine_clock;
use xen_colo::daemon::nbd::remote::{self, Connect, Remote};
use xen_colo::nbd::client::SubmitError;
use xen_colo::nbd::request::Request;
use xen_colo::nbd::session::{Config, RequestError, Session};
use xen_colo::nbd::{EXPORT_CAN_MULTI_CONN, Errno};

const SIZE: usize = 4 << 20;
const EXPORT: &str = "disk0";

/// Impatient enough for a test, patient enough for a server that starts.
fn config(connections: usize) -> Config {
    Config { connections, patience: PATIENCE, ..Config::default() }
}

fn open(socket: &Path, export: &str, config: Config) -> Remote {
    open_by(remote::to(Address::Unix(socket.to_owned())), export, config)
}

fn open_by(connect: Connect, export: &str, config: Config) -> Remote {
    let session = Session::new(export, config, engine_clock()).unwrap();
    Remote::open(session, connect, Arc::default())
}

/// Numbers that are the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Somebody who works on a disk and knows what must be on it.
struct Worker {
    remote: Remote,
    dice: Dice,
    model: Vec<u8>,
    /// What each request must bring.
    expected: HashMap<u64, Bytes>,
    completed: usize,
    flushes: bool,
}

impl Worker {
    fn new(remote: Remote) -> Self {
        let model = vec![0; SIZE];
        Self { remote, dice: Dice(1), model, expected: HashMap::new(), completed: 0, flushes: true }
    }

    /// The next request, and what it must bring. It is done to the model when it is submitted.
    fn invent(&mut self) -> Request {
        // In a few places mostly, so that much overlaps.
        let span = if self.dice.below(4) == 0 { SIZE as u64 / 512 } else { 64 };
        let offset = self.dice.below(span) * 512;
        let longest = if self.dice.below(50) == 0 { 512 } else { 16 };
        let len = (512 * (1 + self.dice.below(longest))).min(SIZE as u64 - offset);
        match self.dice.below(20) {
            0..=4 => Request::read(offset, len as u32),
            5 if self.flushes => Request::flush(),
            _ => Request::write(offset, vec![self.dice.below(256) as u8; len as usize].into()),
        }
    }

    /// Does so much, with as much under way as there may be.
    async fn works(&mut self, requests: usize) {
        let until = self.completed + requests;
        let mut next = self.invent();
        while self.completed < until {
            match self.remote.submit(next.clone()) {
                Ok(cookie) => {
                    let brings = apply(&next, &mut self.model);
                    assert!(self.expected.insert(cookie, brings).is_none());
                    next = self.invent();
                }
                Err(SubmitError::Full) => self.takes_one().await,
                Err(other) => panic!("{other}: {:?}", self.remote.status()),
            }
        }
    }

    async fn takes_one(&mut self) {
        let completion = soon("a completion", self.remote.completion()).await.unwrap();
        let brings = self.expected.remove(&completion.cookie).expect("each completes once");
        let data = completion.result.unwrap();
        assert!(data == brings, "request {} brings something else", completion.cookie);
        self.completed += 1;
    }

    /// Waits for everything, and says good-bye.
    async fn finishes(mut self) -> Vec<u8> {
        if self.flushes {
            let flush = loop {
                match self.remote.submit(Request::flush()) {
                    Ok(cookie) => break cookie,
                    Err(SubmitError::Full) => self.takes_one().await,
                    Err(other) => panic!("{other}"),
                }
            };
            self.expected.insert(flush, Bytes::new());
        }
        while !self.expected.is_empty() {
            self.takes_one().await;
        }
        self.remote.close().await;
        self.model
    }
}

/// Does a request to bytes in memory, and returns what it brings.
fn apply(request: &Request, disk: &mut [u8]) -> Bytes {
    let range = request.range().start as usize..request.range().end as usize;
    if request.writes() {
        disk[range].copy_from_slice(request.data());
        return Bytes::new();
    }
    Bytes::copy_from_slice(&disk[range])
}

/// Whatever is killed when it is dropped.
type Process = Box<dyn Send>;

/// A server that can be killed and started again on the same image and socket.
struct Mortal {
    dir: TempDir,
    start: Box<dyn Fn(&Path) -> Process + Send>,
    process: Option<Process>,
}

impl Mortal {
    fn new<P: Send + 'static>(start: impl Fn(&Path) -> P + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("image"), vec![0; SIZE]).unwrap();
        let start = Box::new(move |dir: &Path| Box::new(start(dir)) as Process);
        let process = Some(start(dir.path()));
        Self { dir, start, process }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    /// SIGKILL, and another process.
    fn dies_and_comes_back(&mut self) {
        self.process = None;
        let _ = std::fs::remove_file(self.socket());
        self.process = Some((self.start)(self.dir.path()));
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("image")).unwrap()
    }
}

/// A process with a child for each client.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(LOOK);
    }
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

/// Works on a server that dies many times, and compares the image. Returns how many connections there were at once.
async fn survives(mut server: Mortal, export: &str, config: Config) -> usize {
    const DEATHS: u64 = 8;
    let mut worker = Worker::new(open(&server.socket(), export, config));
    let info = soon("the server answers", worker.remote.export()).await.unwrap();
    assert_eq!(info.size_bytes, SIZE as u64);
    let wanted = if info.flags & EXPORT_CAN_MULTI_CONN != 0 { config.connections } else { 1 };
    for _ in 0..DEATHS {
        worker.works(1000).await;
        let ready = worker.remote.status().connections;
        assert!(ready <= wanted, "{ready} connections, and {wanted} are wanted");
        tokio::task::block_in_place(|| server.dies_and_comes_back());
    }
    worker.works(1000).await;
    until("all connections are there again", async || {
        let status = worker.remote.status();
        if status.connections == wanted { Ok(()) } else { Err(status) }
    })
    .await;
    worker.works(1000).await;
    let status = worker.remote.status();
    assert!(status.lost_connections >= DEATHS && status.under_way > 0, "{status:?}");
    let model = soon("everything completes", worker.finishes()).await;
    assert!(server.image() == model, "the image is what was asked for, in order");
    wanted
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_is_killed_and_comes_back() {
    if installed("qemu-nbd").is_none() {
        return;
    }
    let start = |dir: &Path| {
        let (socket, image) = (dir.join("sock"), dir.join("image"));
        let mut command = command("qemu-nbd", &["-t", "-e", "4", "-f", "raw", "-x", EXPORT, "-k"]);
        Listening::start(command.arg(&socket).arg(image), &socket)
    };
    survives(Mortal::new(start), EXPORT, config(4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_is_killed_and_comes_back() {
    if installed("nbdkit").is_none() {
        return;
    }
    for (filters, connections) in [(&["--filter=delay"][..], 4), (&["--filter=multi-conn", "--filter=delay"], 4)] {
        let start = move |dir: &Path| {
            let (socket, image) = (dir.join("sock"), dir.join("image"));
            let mut command = command("nbdkit", &["-f", "-U"]);
            command.arg(&socket).args(filters).arg("file").arg(image).args(["wdelay=1ms", "rdelay=2ms"]);
            if filters.len() > 1 {
                command.arg("multi-conn-mode=disable");
            }
            Listening::start(&mut command, &socket)
        };
        let wanted = survives(Mortal::new(start), "", config(connections)).await;
        assert_eq!(wanted, if filters.len() > 1 { 1 } else { 4 }, "the server says how many");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nbd_server_is_killed_and_comes_back() {
    if installed("nbd-server").is_none() {
        return;
    }
    let start = |dir: &Path| {
        let (socket, image, pid) = (dir.join("sock"), dir.join("image"), dir.join("pid"));
        let _ = std::fs::remove_file(&pid);
        // It listens there, too, and dies of being told not to.
        let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let text = format!(
            "[generic]\nunixsock = {}\nlistenaddr = 127.0.0.1\nport = {port}\n\
             [{EXPORT}]\nexportname = {}\nflush = true\nfua = true\n",
            socket.display(),
            image.display()
        );
        std::fs::write(dir.join("config"), text).unwrap();
        let mut command = command("nbd-server", &["-C"]);
        assert!(command.arg(dir.join("config")).arg("-p").arg(&pid).status().unwrap().success());
        let leader = || std::fs::read_to_string(&pid).ok()?.trim().parse().ok().and_then(Pid::from_raw);
        wait_until("nbd-server listens", || leader().is_some() && listens(std::process::id(), &socket));
        Group(leader().unwrap())
    };
    survives(Mortal::new(start), EXPORT, config(4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemus_own_server_is_killed_and_comes_back() {
    if installed("qemu-system-x86_64").is_none() {
        return;
    }
    let start = |dir: &Path| {
        let (socket, image, qmp) = (dir.join("sock"), dir.join("image"), dir.join("qmp"));
        let _ = std::fs::remove_file(&qmp);
        let mut command = command("qemu-system-x86_64", &["-machine", "none", "-S", "-nodefaults", "-display", "none"]);
        let drive = format!("if=none,id={EXPORT},format=raw,file={}", image.display());
        command.args(["-drive", &drive, "-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
        let process = Listening::start(&mut command, &qmp);
        // Between its bind and its listen it refuses.
        let begun = Instant::now();
        let mut monitor = loop {
            match Monitor::connect(&qmp, PATIENCE) {
                Err(_) if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(20)),
                other => break other.unwrap(),
            }
        };
        monitor.execute("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}})).unwrap();
        // Whoever dials in between is refused, and tries again.
        std::thread::sleep(Duration::from_millis(20));
        monitor.execute("nbd-server-add", json!({"device": EXPORT, "writable": true})).unwrap();
        process
    };
    survives(Mortal::new(start), EXPORT, config(4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_server_is_killed_and_comes_back() {
    let start = |dir: &Path| {
        let (socket, image) = (dir.join("sock"), dir.join("image"));
        let mut command = command(XL_COLO, &["nbd", "-t", "-e", "0", "-f", "raw", "-x", EXPORT, "-k"]);
        Listening::start(command.arg(&socket).arg(image), &socket)
    };
    let retaining = Config { retain_bytes: 1 << 20, ..config(4) };
    for (config, connections) in [(config(1), 1), (config(4), 4)] {
        assert_eq!(survives(Mortal::new(start), EXPORT, config).await, connections);
    }
    survives(Mortal::new(start), EXPORT, Config { connections: 1, ..retaining }).await;
}

/// nbdkit's memory goes with its process, as a machine's page cache goes with the machine.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_flushed_is_written_again_to_a_server_that_forgot_it() {
    if installed("nbdkit").is_none() {
        return;
    }
    let start = |dir: &Path| {
        let socket = dir.join("sock");
        Listening::start(command("nbdkit", &["-f", "-U"]).arg(&socket).args(["memory", "4M"]), &socket)
    };
    let mut server = Mortal::new(start);
    // More than is written in all: no flush of the session's own says that it is safe.
    let config = Config { retain_bytes: 1 << 30, ..config(1) };
    let mut worker = Worker::new(open(&server.socket(), "", config));
    worker.flushes = false;
    soon("the server answers", worker.remote.export()).await.unwrap();
    for _ in 0..4 {
        worker.works(100).await;
        tokio::task::block_in_place(|| server.dies_and_comes_back());
    }
    worker.works(100).await;
    let status = worker.remote.status();
    assert!(status.unflushed_writes > 0 && status.doubtful_writes == 0, "{status:?}");
    let model = soon("everything completes", worker.finishes()).await;
    let mut reader = Conversation::open(Address::Unix(server.socket()), "").await;
    assert!(reader.reads(0, SIZE as u32).await.unwrap() == model);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_is_believed() {
    if installed("nbdkit").is_none() {
        return;
    }
    let start = |dir: &Path| {
        let (socket, image) = (dir.join("sock"), dir.join("image"));
        let mut command = command("nbdkit", &["-f", "-U"]);
        command.arg(&socket).args(["--filter=error", "file"]).arg(image);
        Listening::start(command.args(["error-pwrite=ENOSPC", "error-pwrite-rate=50%"]), &socket)
    };
    let server = Mortal::new(start);
    let remote = open(&server.socket(), "", config(4));
    soon("the server answers", remote.export()).await.unwrap();
    let mut places = HashMap::new();
    for at in 0..100 {
        places.insert(remote.submit(Request::write(at * 512, vec![1; 512].into())).unwrap(), at as usize);
    }
    let (mut written, mut refused) = (Vec::new(), Vec::new());
    while written.len() + refused.len() < 100 {
        let completion = soon("a completion", remote.completion()).await.unwrap();
        let at = places.remove(&completion.cookie).expect("each completes once");
        match completion.result {
            Ok(_) => written.push(at),
            Err(error) => {
                assert_eq!(error, RequestError::Refused(Errno::NoSpace));
                refused.push(at);
            }
        }
    }
    assert!(!written.is_empty() && !refused.is_empty(), "{} and {}", written.len(), refused.len());
    remote.close().await;
    let image = server.image();
    assert!(written.iter().all(|at| image[at * 512..][..512] == [1; 512]));
    assert!(refused.iter().all(|at| image[at * 512..][..512] == [0; 512]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_leaves_with_its_last_client_is_left_politely() {
    if installed("nbdkit").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (socket, image) = (dir.path().join("sock"), dir.path().join("image"));
    std::fs::write(&image, vec![0; SIZE]).unwrap();
    let mut command = command("nbdkit", &["-f", "-U"]);
    command.arg(&socket).args(["--filter=exitlast", "file"]).arg(&image);
    let mut process = Listening::start(&mut command, &socket);
    let mut worker = Worker::new(open(&socket, "", config(3)));
    soon("the server answers", worker.remote.export()).await.unwrap();
    worker.works(500).await;
    let model = soon("everything completes", worker.finishes()).await;
    let status = until("nbdkit leaves", async || process.0.try_wait().unwrap().ok_or("still there")).await;
    assert!(status.success());
    assert!(std::fs::read(image).unwrap() == model);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cable_that_falls_silent_is_given_up_and_one_that_is_cut_is_mended() {
    let start = |dir: &Path| {
        let (socket, image) = (dir.join("sock"), dir.join("image"));
        let mut command = command(XL_COLO, &["nbd", "-t", "-e", "0", "-f", "raw", "-x", EXPORT, "-k"]);
        Listening::start(command.arg(&socket).arg(image), &socket)
    };
    let server = Mortal::new(start);
    let lay = async || Wire::new(&"127.0.0.1:0".parse().unwrap(), Address::Unix(server.socket())).await;
    let mut cable = lay().await;
    let near = Arc::new(Mutex::new(cable.address.clone()));
    let dialled = near.clone();
    let connect = move || remote::to(dialled.lock().unwrap().clone())();
    let config = Config { reply_timeout: Duration::from_millis(500), ..config(2) };
    let mut worker = Worker::new(open_by(Box::new(connect), EXPORT, config));
    soon("the server answers", worker.remote.export()).await.unwrap();
    for _ in 0..3 {
        worker.works(500).await;
        let lost = worker.remote.status().lost_connections;
        cable.silence();
        until("the connections are given up", async || {
            let status = worker.remote.status();
            if status.lost_connections > lost && status.connections == 0 { Ok(()) } else { Err(status) }
        })
        .await;
        // With what waited in it: nothing of that may arrive after what is sent from now on.
        drop(cable);
        cable = lay().await;
        near.lock().unwrap().clone_from(&cable.address);
        worker.works(500).await;
        let lost = worker.remote.status().lost_connections;
        drop(cable);
        cable = lay().await;
        near.lock().unwrap().clone_from(&cable.address);
        until("the cut is noticed", async || {
            let status = worker.remote.status();
            if status.lost_connections > lost { Ok(()) } else { Err(status) }
        })
        .await;
    }
    worker.works(500).await;
    let model = soon("everything completes", worker.finishes()).await;
    assert!(server.image() == model);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_comes_back_is_an_error_for_everything() {
    let start = |dir: &Path| {
        let (socket, image) = (dir.join("sock"), dir.join("image"));
        Listening::start(command(XL_COLO, &["nbd", "-t", "-k"]).arg(&socket).arg(image), &socket)
    };
    let mut server = Mortal::new(start);
    let config = Config { patience: Duration::from_millis(500), ..config(1) };
    let remote = open(&server.socket(), "", config);
    soon("the server answers", remote.export()).await.unwrap();
    server.process = None;
    let cookie = until("it is noticed", async || match remote.status().connections {
        0 => Ok(remote.submit(Request::write(0, vec![1; 512].into())).unwrap()),
        _ => Err("not yet"),
    })
    .await;
    let completion = soon("a completion", remote.completion()).await.unwrap();
    assert_eq!(completion.cookie, cookie);
    let why = completion.result.unwrap_err().to_string();
    assert!(why.starts_with("no connection to the NBD server for 500ms"), "{why}");
    assert!(soon("the end", remote.completion()).await.is_err());
    assert_eq!(remote.submit(Request::flush()), Err(SubmitError::NotReady));
}
