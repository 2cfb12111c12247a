//! Device-model state between two real QEMUs, many times over one connection, and what goes wrong on the way.
//!
//! ```text
//!  QEMU a, firmware running ─ stop, save ─▶ state ─▶ vmstate::image ─▶ our NBD server, or memory ─▶ QEMU b ─ save ─▶ same state?
//! ```
//!
//! No Xen is needed: the commands are in every x86 QEMU of Debian's. The machines are emulated and differ from Xen's
//! in what goes round the stream: the four `-global`s below take away what Xen's accelerator takes away as well
//! (`accel/xen/xen-all.c`), and `vapic`, which looks for code in the guest's memory, and that is not copied here.
//!
//! The client is compiled into this binary because package `xen` as a whole needs Xen's libraries.

#[path = "../xen/src/qmp/mod.rs"]
#[allow(dead_code, unused_imports, reason = "package xen exports more than is driven here")]
pub(crate) mod qmp;

use crate::common::{Listening, PATIENCE, installed};
use qmp::{Client, DeviceModel, Image, QmpError};
use serde_json::json;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::nbd::serve_connection;
use xen_colo::disk::{Disk, DiskError, MemoryDisk, check_range};
use xen_colo::hypervisor::vmstate;

const LOADS: usize = 50;
const EXPORT: &str = "state";
const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xaa, 0xbb, 0xcc];
/// How long a load may take that is made to hang.
const SHORT: Duration = Duration::from_millis(700);

/// A QEMU that is killed at the end.
struct Qemu {
    child: Listening,
    dir: TempDir,
}

impl Qemu {
    /// A stopped PC with this network card, or None, said loudly, where there is no QEMU that can do this.
    fn start(nic: &str) -> Option<Self> {
        let program = installed("qemu-system-x86_64")?;
        let dir = tempfile::tempdir().unwrap();
        let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
        let mut command = Command::new(program);
        command
            .args(["-machine", "pc,accel=tcg", "-m", "64", "-S", "-nodefaults", "-display", "none", "-serial", "null"])
            // The real-time clock would go on while the machine stands: the one field that differs by itself.
            .args(["-rtc", "clock=vm,base=2026-01-01"])
            .args(["-netdev", "user,id=net", "-device", &format!("{nic},romfile=,netdev=net,mac={mac}")])
            .args(["-global", "migration.send-configuration=off", "-global", "migration.store-global-state=off"])
            .args(["-global", "migration.send-section-footer=off", "-global", "apic.vapic=off"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", dir.path().join("qmp").display()))
            .stderr(std::fs::File::create(dir.path().join("stderr")).unwrap());
        let qemu = Self { child: Listening::start(&mut command, &dir.path().join("qmp")), dir };
        let known = qemu.connect(PATIENCE).client().execute("query-commands", json!({})).unwrap();
        if !known.to_string().contains("\"xen-save-devices-state\"") {
            eprintln!("SKIP: this qemu-system-x86_64 is built without Xen");
            return None;
        }
        Some(qemu)
    }

    fn monitor(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn connect(&self, deadline: Duration) -> DeviceModel {
        DeviceModel::new(Client::connect(&self.monitor(), deadline).unwrap())
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap()
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.0.id())).unwrap().count()
    }
}

/// The state of a machine that has run on for a while.
fn run_and_save(machine: &mut DeviceModel) -> Vec<u8> {
    machine.cont().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    machine.stop().unwrap();
    machine.save_state().unwrap()
}

/// Where two states differ: each byte, by the section it lies in. A section begins with 4, its number, and its name.
fn differences(a: &[u8], b: &[u8]) -> Vec<String> {
    let section = |at: usize| {
        let name = |start: usize| {
            let len = usize::from(a[start + 5]);
            let name = a.get(start + 6..start + 6 + len)?;
            let plain = len > 2 && name.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
            (a[start..start + 4] == [4, 0, 0, 0] && plain).then(|| (start, String::from_utf8_lossy(name).into_owned()))
        };
        (8..at.saturating_sub(6)).rev().find_map(name).unwrap_or_default()
    };
    let unequal = (0..a.len().min(b.len())).filter(|at| a[*at] != b[*at]);
    let mut found: Vec<String> = unequal
        .map(|at| {
            let (start, name) = section(at);
            format!("byte {at}, {} of {name:?}: {:#x}, {:#x}", at - start, a[at], b[at])
        })
        .collect();
    if a.len() != b.len() {
        found.push(format!("lengths {}, {}", a.len(), b.len()));
    }
    found
}

/// A disk in memory of which only the beginning can be read.
struct FailingDisk {
    disk: MemoryDisk,
    readable_bytes: u64,
}

impl Disk for FailingDisk {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        check_range(self.readable_bytes, offset, into.len() as u64)?;
        self.disk.read(offset, into)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.disk.write(offset, bytes)
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.disk.flush()
    }
}

/// Our NBD server with `image` in memory, a new copy for each connection, until the runtime is dropped.
fn serve(runtime: &Runtime, socket: &Path, image: Vec<u8>) {
    let all = image.len() as u64;
    serve_until(runtime, socket, image, all);
}

/// The same, with errors beyond the first `readable_bytes`.
fn serve_until(runtime: &Runtime, socket: &Path, image: Vec<u8>, readable_bytes: u64) {
    let _ = std::fs::remove_file(socket);
    let listener = runtime.block_on(Address::Unix(socket.to_owned()).listen()).unwrap();
    runtime.spawn(async move {
        while let Ok(link) = listener.accept().await {
            let mut disk = MemoryDisk::new(image.len());
            disk.write(0, &image).unwrap();
            let disk = FailingDisk { disk, readable_bytes };
            tokio::spawn(serve_connection(link, EXPORT.into(), Box::new(disk)));
        }
    });
}

fn server() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// What no load may leave behind in QEMU.
fn leftovers(machine: &mut DeviceModel) -> Vec<String> {
    let mut found = Vec::new();
    for command in ["query-named-block-nodes", "query-jobs"] {
        let listed = machine.client().execute(command, json!({})).unwrap();
        found.extend(listed.as_array().unwrap().iter().map(|one| format!("{command}: {one}")));
    }
    found
}

/// The middle one and the longest, in ms.
fn summary(mut times: Vec<Duration>) -> String {
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    format!("median {:.1} ms, longest {:.1} ms", ms(times[times.len() / 2]), ms(times[times.len() - 1]))
}

#[test]
fn fifty_states_in_a_row_arrive_whole() {
    let (Some(a), Some(b)) = (Qemu::start("e1000"), Qemu::start("e1000")) else { return };
    let (mut source, mut target) = (a.connect(PATIENCE), b.connect(PATIENCE));
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd");
    let mut last = target.save_state().unwrap();
    let mut files_open = None;
    for over_nbd in [true, false] {
        let (mut saves, mut loads) = (Vec::new(), Vec::new());
        for round in 0..LOADS {
            let state = run_and_save(&mut source);
            assert!(state != last, "the machine must have changed, or the comparison shows nothing");
            let begun = Instant::now();
            let again = source.save_state().unwrap();
            saves.push(begun.elapsed());
            assert_eq!(differences(&state, &again), [""; 0], "round {round}: a stopped machine stays as it is");

            let image = vmstate::image(&state).unwrap();
            let runtime = server();
            let from = if over_nbd {
                serve(&runtime, &socket, image.clone());
                Image::Nbd { socket: socket.to_str().unwrap(), export: EXPORT }
            } else {
                Image::Bytes(&image)
            };
            let begun = Instant::now();
            target.load_state(from).unwrap_or_else(|error| panic!("round {round}: {error}: {}", b.stderr()));
            loads.push(begun.elapsed());
            // No field differs: not even clocks, as both machines stand.
            assert_eq!(differences(&state, &target.save_state().unwrap()), [""; 0], "round {round}");
            last = state;
            // The first load opens what is kept.
            let open = *files_open.get_or_insert_with(|| b.open_files());
            assert!(b.open_files() <= open + 1, "{} files open in QEMU after {open}", b.open_files());
        }
        let from = if over_nbd { "our NBD server" } else { "memory" };
        println!("device-model state of {} bytes, {LOADS} times: save {}", last.len(), summary(saves));
        println!("load from {from}: {}", summary(loads));
    }
    assert_eq!(leftovers(&mut target), [""; 0]);
    assert_eq!(b.stderr(), "", "QEMU has nothing to complain about");
}

/// The comparison above sees a single byte, and the loaded machine is really another one.
#[test]
fn one_altered_byte_arrives_too() {
    let (Some(a), Some(b)) = (Qemu::start("e1000"), Qemu::start("e1000")) else { return };
    let (mut source, mut target) = (a.connect(PATIENCE), b.connect(PATIENCE));
    let state = run_and_save(&mut source);
    // The card's EEPROM begins with its address, in words.
    let address: Vec<u8> = MAC.chunks(2).flat_map(|pair| [pair[1], pair[0]]).collect();
    let at = state.windows(address.len()).position(|window| window == address).expect("an EEPROM in the state");
    let mut altered = state.clone();
    altered[at + 5] ^= 1;
    target.load_state(Image::Bytes(&vmstate::image(&altered).unwrap())).unwrap();
    let back = target.save_state().unwrap();
    let differing: Vec<usize> = (0..state.len()).filter(|at| back[*at] != state[*at]).collect();
    assert_eq!(differing, [at + 5]);
}

/// Loads a state and finds it there.
#[track_caller]
fn loads_well(target: &mut DeviceModel, state: &[u8], after: &str) {
    let image = vmstate::image(state).unwrap();
    target.load_state(Image::Bytes(&image)).unwrap_or_else(|error| panic!("after {after}: {error}"));
    assert_eq!(differences(state, &target.save_state().unwrap()), [""; 0], "after {after}");
    assert_eq!(leftovers(target), [""; 0], "after {after}");
}

#[test]
fn a_load_after_a_failed_one_succeeds() {
    let (Some(a), Some(b), Some(other)) = (Qemu::start("e1000"), Qemu::start("e1000"), Qemu::start("rtl8139")) else {
        return;
    };
    let mut source = a.connect(PATIENCE);
    let state = run_and_save(&mut source);
    let good = vmstate::image(&state).unwrap();
    let mut target = b.connect(PATIENCE);
    loads_well(&mut target, &state, "nothing");

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd");
    let nbd = Image::Nbd { socket: socket.to_str().unwrap(), export: EXPORT };
    let mut damaged = state.clone();
    damaged[14] ^= 1; // in the name of the first section
    let damaged = vmstate::image(&damaged).unwrap();
    let foreign = vmstate::image(&run_and_save(&mut other.connect(PATIENCE))).unwrap();
    let runtime = server();
    // Tables are read, and part of the state.
    serve_until(&runtime, &socket, good.clone(), 9 << 16);
    let absent = Image::Nbd { socket: "/nonexistent/nbd", export: EXPORT };
    let unknown = Image::Nbd { socket: socket.to_str().unwrap(), export: "another" };
    let cases = [
        ("a damaged stream", Image::Bytes(&damaged), "the job failed"),
        ("another machine's state", Image::Bytes(&foreign), "the job failed"),
        ("no image", Image::Bytes(&state), "blockdev-add"),
        ("no NBD server", absent, "blockdev-add"),
        ("an export that is not there", unknown, "blockdev-add"),
        ("an NBD server that fails halfway", nbd, "the job failed"),
    ];
    for (what, image, words) in cases {
        let begun = Instant::now();
        let error = target.load_state(image).expect_err(what).to_string();
        println!("{what}: {error}");
        assert!(error.contains(words), "{what}: {error}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}: {:?}", begun.elapsed());
        assert_eq!(leftovers(&mut target), [""; 0], "after {what}");
        loads_well(&mut target, &state, what);
    }
}

#[test]
fn a_silent_nbd_server_costs_the_deadline_and_no_more() {
    let (Some(a), Some(b)) = (Qemu::start("e1000"), Qemu::start("e1000")) else { return };
    let state = run_and_save(&mut a.connect(PATIENCE));
    let good = vmstate::image(&state).unwrap();
    let mut target = b.connect(SHORT);
    let silent = b.dir.path().join("silent");
    let listener = UnixListener::bind(&silent).unwrap();
    let nbd = Image::Nbd { socket: silent.to_str().unwrap(), export: EXPORT };
    for attempt in ["first", "second"] {
        let begun = Instant::now();
        let error = target.load_state(nbd).unwrap_err();
        assert!(matches!(error, QmpError::Deadline { .. }), "{attempt}: {error}");
        assert!(begun.elapsed() < SHORT * 2, "{attempt}: {:?}", begun.elapsed());
    }
    // The server goes, QEMU wakes up, and the connection serves on: late answers are not mistaken for others.
    drop(listener);
    let begun = Instant::now();
    while let Err(error) = target.load_state(Image::Bytes(&good)) {
        assert!(begun.elapsed() < PATIENCE, "{error}");
    }
    loads_well(&mut target, &state, "silence");
}

#[test]
fn a_qemu_that_dies_in_the_middle_is_noticed_at_once() {
    let (Some(a), Some(mut b)) = (Qemu::start("e1000"), Qemu::start("e1000")) else { return };
    drop(a);
    let mut target = b.connect(PATIENCE);
    let silent = b.dir.path().join("silent");
    let listener = UnixListener::bind(&silent).unwrap();
    let begun = Instant::now();
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            let _connection = listener.accept().unwrap();
            b.child.0.kill().unwrap();
        });
        target.load_state(Image::Nbd { socket: silent.to_str().unwrap(), export: EXPORT }).unwrap_err()
    });
    println!("{error}");
    assert!(matches!(&error, QmpError::Gone { command, .. } if command == "blockdev-add"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    for again in [target.stop().unwrap_err(), target.save_state().unwrap_err()] {
        assert!(matches!(again, QmpError::Gone { .. }), "{again}");
    }
}

#[test]
fn a_monitor_serves_one_client_and_the_next_is_told() {
    let Some(a) = Qemu::start("e1000") else { return };
    let mut first = a.connect(PATIENCE);
    // Some wait in the backlog, and then connecting itself would wait.
    for waiting in 0..4 {
        let begun = Instant::now();
        let error = Client::connect(&a.monitor(), SHORT).unwrap_err();
        println!("client {waiting}: {error}");
        assert!(matches!(error, QmpError::NoGreeting { .. } | QmpError::Connect { .. }), "{error}");
        assert!(begun.elapsed() < SHORT * 2, "{:?}", begun.elapsed());
    }
    first.stop().unwrap();
    drop(first);
    a.connect(PATIENCE).stop().unwrap();
}
