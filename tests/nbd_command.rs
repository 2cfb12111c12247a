//! `xl-colo nbd` as scripts meet it: qemu-nbd's letters, other people's clients, illegal requests, and how it ends.

use crate::common::{Listening, PATIENCE, XL_COLO, installed, one_line, pattern, run, succeeds, xl_colo};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use xen_colo::replica::state::{FileState, Standing, State, Why, found};

const MIB: usize = 1 << 20;

/// A server on a Unix socket, in a folder of its own.
pub(crate) struct Nbd {
    dir: TempDir,
    child: Listening,
}

impl Nbd {
    /// Serves an image of `bytes` with these arguments, and waits until clients can connect.
    pub(crate) fn serve(bytes: &[u8], args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("image"), bytes).unwrap();
        Self::serve_in(dir, args)
    }

    fn serve_in(dir: TempDir, args: &[&str]) -> Self {
        Self { child: Self::serve_at(&dir, args), dir }
    }

    fn serve_at(dir: &TempDir, args: &[&str]) -> Listening {
        let (image, socket) = (dir.path().join("image"), dir.path().join("sock"));
        let mut command = Command::new(XL_COLO);
        command.args(["nbd", "-f", "raw"]).args(args).arg("-k").arg(&socket).arg(image);
        Listening::start(&mut command, &socket)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.path("image")).unwrap()
    }

    fn ends(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.0.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_raw(self.child.0.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
}

/// Whether the server speaks first, as it does to whom it serves.
fn greeted(stream: &mut UnixStream) -> bool {
    stream.read_exact(&mut [0; 18]).is_ok()
}

fn wait(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The kernel's count, which does not see a hole.
fn allocated_bytes(path: &str) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_sees_everything_that_is_offered() {
    if installed("nbdinfo").is_none() {
        return;
    }
    let nbd = Nbd::serve(&pattern(4 << 20), &["-t", "-e", "0", "-x", "vm disk", "-D", "for people"]);
    let uri = format!("nbd+unix:///vm%20disk?socket={}", nbd.socket().display());
    let info: serde_json::Value = serde_json::from_str(&succeeds("nbdinfo", &["--json", &uri]).await).unwrap();
    assert_eq!((&info["protocol"], &info["structured"]), (&"newstyle-fixed".into(), &true.into()), "{info:#}");
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 4 * MIB);
    assert_eq!(export["description"], "for people");
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    for can in ["flush", "fua", "trim", "zero", "fast_zero", "df", "multi_conn", "cache"] {
        assert_eq!(export[format!("can_{can}")], true, "{can}: {info:#}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    let list = succeeds("nbdinfo", &["--list", "--json", &nbd.uri()]).await;
    assert!(list.contains("vm disk"), "{list}");
    let missing = run("nbdinfo", &[&format!("nbd+unix:///nope?socket={}", nbd.socket().display())]).await;
    assert!(!missing.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_are_seen_copied_and_made() {
    if installed("nbdcopy").is_none() || installed("qemu-img").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image").display().to_string();
    std::fs::File::create(&image).unwrap().set_len(8 * MIB as u64).unwrap();
    let nbd = Nbd::serve_in(dir, &["-t", "-e", "0", "--discard=unmap", "--detect-zeroes=unmap"]);
    let (source, back) = (nbd.path("source"), nbd.path("back"));
    let mut bytes = pattern(8 << 20);
    bytes[5 * MIB..7 * MIB].fill(0);
    std::fs::write(&source, &bytes).unwrap();
    let sparse = || allocated_bytes(&image) <= 5 * MIB as u64;
    succeeds("nbdcopy", &["--connections=4", &source, &nbd.uri()]).await;
    assert!(nbd.image() == bytes && sparse(), "{}", allocated_bytes(&image));
    let map = succeeds("nbdinfo", &["--map", "--json", &nbd.uri()]).await;
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let kinds: Vec<_> =
        map.as_array().unwrap().iter().map(|run| (run["offset"].as_u64(), run["type"].as_u64())).collect();
    let at = |mib: usize| Some((mib * MIB) as u64);
    let expected = [(at(0), Some(0)), (at(1), Some(3)), (at(2), Some(0)), (at(5), Some(3)), (at(7), Some(0))];
    assert_eq!(kinds, expected);
    succeeds("nbdcopy", &[&nbd.uri(), &back]).await;
    assert!(std::fs::read(&back).unwrap() == bytes && allocated_bytes(&back) <= 5 * MIB as u64);
    succeeds("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &source, &nbd.uri()]).await;
    assert!(nbd.image() == bytes && sparse());
    succeeds("qemu-io", &["-f", "raw", "-d", "unmap", "-c", "discard 2M 3M", &nbd.uri()]).await;
    bytes[2 * MIB..5 * MIB].fill(0);
    assert!(nbd.image() == bytes && allocated_bytes(&image) <= 2 * MIB as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_what_it_wrote_over_four_connections() {
    if installed("fio").is_none() {
        return;
    }
    let nbd = Nbd::serve(&vec![0; 16 * MIB], &["-t", "-e", "0"]);
    let uri = format!("--uri=nbd+unix:///?socket={}", nbd.socket().display());
    let common = [
        "--ioengine=nbd",
        &uri,
        "--name=job",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--output-format=terse",
    ];
    for (kind, block, depth) in [("randwrite", "4k", "32"), ("write", "1m", "4"), ("randrw", "512", "64")] {
        let kind = [format!("--rw={kind}"), format!("--bs={block}"), format!("--iodepth={depth}")];
        let kind: Vec<&str> = kind.iter().map(String::as_str).collect();
        // Each connection has a part of the image of its own.
        let parts = ["--numjobs=4", "--size=4m", "--offset_increment=4m", "--group_reporting"];
        succeeds("fio", &[&common[..], &parts, &kind].concat()).await;
    }
    assert!(nbd.image().iter().any(|byte| *byte != 0));
}

/// With strict mode off libnbd sends anything.
const ILLEGAL: &str = r#"
import errno, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
size = h.get_size()
def refused(what, wanted, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == wanted, (what, error.errno, wanted)
    else:
        raise AssertionError(what + " was not refused")
    assert h.pread(4, 0) == b"\0\1\2\3", what
refused("read past the end", errno.EINVAL, lambda: h.pread(2, size - 1))
refused("read far past the end", errno.EINVAL, lambda: h.pread(1, (1 << 64) - 1))
refused("write past the end", errno.ENOSPC, lambda: h.pwrite(b"xx", size - 1))
refused("zero past the end", errno.ENOSPC, lambda: h.zero(2, size - 1))
refused("trim past the end", errno.EINVAL, lambda: h.trim(2, size - 1))
refused("cache past the end", errno.EINVAL, lambda: h.cache(2, size - 1))
refused("status past the end", errno.EINVAL, lambda: h.block_status(2, size - 1, lambda *a: 0))
refused("status of nothing", errno.EINVAL, lambda: h.block_status(0, 0, lambda *a: 0))
refused("a flag nobody knows", errno.EINVAL, lambda: h.pread(1, 0, 1 << 9))
refused("a flag of another request", errno.EINVAL, lambda: h.trim(1, 0, nbd.CMD_FLAG_DF))
assert h.pread(0, size) == b""
h.pwrite(b"", size)
assert h.pread(1, size - 1, nbd.CMD_FLAG_DF)
h.pwrite(b"y" * 512, 4096, nbd.CMD_FLAG_FUA)
h.zero(256, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(512, 4096) == b"\0" * 256 + b"y" * 256
h.flush()
h.cache(4096, 0)
h.shutdown()
"#;

#[tokio::test(flavor = "multi_thread")]
async fn an_illegal_request_is_refused_and_the_next_one_served() {
    if installed("nbdsh").is_none() {
        return;
    }
    let nbd = Nbd::serve(&(0..64 * 1024).map(|at| at as u8).collect::<Vec<_>>(), &["-t", "-e", "0"]);
    let script = format!("import nbd\n{ILLEGAL}");
    // The system's own Python: libnbd's module is there.
    succeeds("/usr/bin/python3", &["-c", &script, &nbd.uri()]).await;
    // And a client that hangs up in the middle of a write.
    let mut rude = UnixStream::connect(nbd.socket()).unwrap();
    rude.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    let mut greeting = [0; 28];
    rude.read_exact(&mut greeting).unwrap();
    let mut write = b"\x25\x60\x95\x13\0\0\0\x01cookie!!\0\0\0\0\0\0\0\0\0\x01\0\0".to_vec();
    write.extend([9; 1000]);
    rude.write_all(&write).unwrap();
    drop(rude);
    assert_eq!(succeeds("nbdinfo", &["--size", &nbd.uri()]).await.trim(), "65536");
    assert_eq!(nbd.image()[..4], [0, 1, 2, 3], "half a write is none");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_its_last_client_unless_told_to_stay() {
    if installed("nbdinfo").is_none() {
        return;
    }
    let mut once = Nbd::serve(&[1; 4096], &[]);
    // A list alone is no client.
    let mut lister = UnixStream::connect(once.socket()).unwrap();
    lister.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x02\0\0\0\0").unwrap();
    let _ = lister.read_to_end(&mut Vec::new());
    drop(lister);
    std::thread::sleep(Duration::from_millis(100));
    assert!(once.child.0.try_wait().unwrap().is_none(), "it is still there");
    succeeds("nbdinfo", &["--size", &once.uri()]).await;
    assert!(once.ends() && !once.socket().exists());

    let mut stays = Nbd::serve(&[1; 4096], &["-t"]);
    for _ in 0..2 {
        succeeds("nbdinfo", &["--size", &stays.uri()]).await;
    }
    stays.terminate();
    assert!(stays.ends() && !stays.socket().exists(), "SIGTERM ends it, and its socket is gone");
}

/// Whether the server says nothing yet.
fn waits(stream: &mut UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let read = stream.read_exact(&mut [0; 18]);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_too_many_waits_for_a_place_as_with_qemu_nbd() {
    let ours = Nbd::serve(&[1; 4096], &["-t", "-e", "2"]);
    let mut servers = vec![ours.socket()];
    let socket = PathBuf::from(ours.path("qemu"));
    let _qemu = installed("qemu-nbd").map(|_| {
        std::fs::copy(ours.path("image"), ours.path("other")).unwrap();
        servers.push(socket.clone());
        let mut command = Command::new("qemu-nbd");
        Listening::start(
            command.args(["-t", "-e", "2", "-f", "raw", "-k", &ours.path("qemu"), &ours.path("other")]),
            &socket,
        )
    });
    for socket in servers {
        let mut clients: Vec<_> = (0..2).map(|_| UnixStream::connect(&socket).unwrap()).collect();
        assert!(clients.iter_mut().all(greeted), "two have a place");
        let mut third = UnixStream::connect(&socket).unwrap();
        assert!(waits(&mut third), "{}: the third has none", socket.display());
        drop(clients.pop());
        assert!(greeted(&mut third), "{}: a place became free", socket.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_place_is_enough_for_a_client_that_likes_several() {
    if installed("nbdcopy").is_none() || installed("nbdinfo").is_none() {
        return;
    }
    let bytes = pattern(8 << 20);
    let nbd = Nbd::serve(&bytes, &["-t"]);
    let copy = nbd.path("copy");
    succeeds("nbdcopy", &["--connections=4", &nbd.uri(), &copy]).await;
    assert!(std::fs::read(copy).unwrap() == bytes);
    assert!(!run("nbdinfo", &["--can", "multi-conn", &nbd.uri()]).await.status.success());
    let several = Nbd::serve(&bytes, &["-t", "-e", "2"]);
    succeeds("nbdinfo", &["--can", "multi-conn", &several.uri()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_ports_and_refusals_are_qemu_nbds() {
    if installed("nbdinfo").is_none() || installed("qemu-nbd").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("image"), vec![7; 1 << 20]).unwrap();
    let image = path("image");
    for program in [&[XL_COLO, "nbd"][..], &["qemu-nbd", "-f", "raw"]] {
        let refused: [&[&str]; 6] = [
            &["-k", &path("no"), "-o", "5M"],
            &["-k", &path("no"), "-o", "08"],
            &["-k", &path("no"), "-o", "0x1x"],
            &["-k", &path("no"), "-o", "two"],
            &["-k", &path("no"), "-e", "-1"],
            &["-k", &path("no"), "--detect-zeroes=unmap"],
        ];
        for words in refused {
            let output = run(program[0], &[&program[1..], words, &[&image]].concat()).await;
            assert!(!output.status.success() && !Path::new(&path("no")).exists(), "{program:?} {words:?}");
        }
        for (words, size) in
            [(["-o", "0x200"], (1 << 20) - 512), (["-o", "01000"], (1 << 20) - 512), (["-e", "0x2"], 1 << 20)]
        {
            // Somebody may take a port that is free now.
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
            let at = ["-t", "-b", "127.0.0.1", "-p", &port];
            let mut command = Command::new(program[0]);
            let mut child = command.args(&program[1..]).args(at).args(words).arg(&image).spawn().unwrap();
            let uri = format!("nbd://127.0.0.1:{port}");
            let deadline = Instant::now() + PATIENCE;
            let said = loop {
                let output = run("nbdinfo", &["--size", &uri]).await;
                if output.status.success() || Instant::now() > deadline {
                    break String::from_utf8_lossy(&output.stdout).trim().to_owned();
                }
                std::thread::sleep(Duration::from_millis(20));
            };
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(said, size.to_string(), "{program:?} {words:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_mean_what_qemu_nbds_mean() {
    if installed("nbdinfo").is_none() || installed("qemu-io").is_none() {
        return;
    }
    let bytes = pattern(4 << 20);
    let read_only = Nbd::serve(
        &bytes,
        &["-t", "-r", "-o", "512", "-e", "0", "-p", "1", "-b", "127.0.0.1", "--cache", "writethrough"],
    );
    assert_eq!(succeeds("nbdinfo", &["--size", &read_only.uri()]).await.trim(), (4 * MIB - 512).to_string());
    succeeds("nbdinfo", &["--is", "readonly", &read_only.uri()]).await;
    let copy = read_only.path("copy");
    succeeds("nbdcopy", &[&read_only.uri(), &copy]).await;
    assert!(std::fs::read(copy).unwrap() == bytes[512..]);

    // Readers share an image, a writer has it alone.
    let image = read_only.path("image");
    let socket = read_only.path("second");
    let said = one_line(&xl_colo(&["nbd", "-k", &socket, &image]).await, 1);
    assert!(said.contains("is in use"), "{said}");
    let said = one_line(&xl_colo(&["nbd", "-r", "-k", &read_only.path("sock"), &image]).await, 1);
    assert!(said.contains("in use"), "a socket that is served stays: {said}");
    let said = one_line(&xl_colo(&["nbd", "-k", &socket, "-o", "4194305", "-r", &image]).await, 1);
    assert!(said.contains("--offset 4194305 is outside"), "{said}");
    let said = one_line(&xl_colo(&["nbd", "-k", &socket, "/nonexistent/image"]).await, 1);
    assert!(said.contains("/nonexistent/image"), "{said}");

    // Without --discard the space stays, as with qemu-nbd.
    let kept = Nbd::serve(&bytes, &["-t", "-e", "0"]);
    let before = allocated_bytes(&kept.path("image"));
    let free = ["-c", "discard 2M 2M", "-c", "write -z -u 2M 2M"];
    succeeds("qemu-io", &[&["-f", "raw", "-d", "unmap"], &free[..], &[&kept.uri()]].concat()).await;
    assert!(kept.image()[2 * MIB..].iter().all(|byte| *byte == 0));
    assert_eq!(allocated_bytes(&kept.path("image")), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replicas_image_is_served_by_its_record() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("image"), vec![7; MIB]).unwrap();
    let record = |standing| State::open(Box::new(FileState::of(Path::new(&path("image"))))).unwrap().record(standing);
    let is = || found(Path::new(&path("image"))).unwrap();
    let checkpoint = Standing::Checkpoint { generation: 3, number: 17, session: 5 };

    record(Standing::Resync(Why::Applying)).unwrap();
    for letters in [&["nbd"][..], &["nbd", "-r"]] {
        let said = one_line(&xl_colo(&[letters, &["-k", &path("sock"), &path("image")]].concat()).await, 1);
        assert!(said.contains("is not whole: a checkpoint was being written into it; -r --salvage"), "{said}");
    }
    let serve = |letters: &[&str]| {
        let _server = Nbd::serve_at(&dir, letters);
        assert!(greeted(&mut UnixStream::connect(path("sock")).unwrap()));
        std::fs::remove_file(path("sock")).unwrap();
    };
    serve(&["-r", "--salvage"]);
    assert_eq!(is(), Standing::Resync(Why::Applying));

    record(checkpoint).unwrap();
    serve(&["-r"]);
    assert_eq!(is(), checkpoint, "readers leave a checkpoint as it is");
    serve(&[]);
    assert_eq!(is(), Standing::Guest, "somebody could write");
}

#[tokio::test(flavor = "multi_thread")]
async fn fork_returns_when_clients_can_connect_and_says_who_serves() {
    if installed("nbdinfo").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("image"), [1; 4096]).unwrap();
    let output = xl_colo(&["nbd", "--fork", "--pid-file", &path("pid"), "-k", &path("sock"), &path("image")]).await;
    assert!(output.status.success());
    let pid: i32 = std::fs::read_to_string(path("pid")).unwrap().trim().parse().unwrap();
    assert!(Path::new(&format!("/proc/{pid}")).exists() && pid > 1);
    succeeds("nbdinfo", &["--size", &format!("nbd+unix:///?socket={}", path("sock"))]).await;
    // Nobody may have waited for it.
    let runs = || std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
    wait("the server to leave with its client", || !runs());
    let output = xl_colo(&["nbd", "--fork", "-k", &path("sock"), &path("missing")]).await;
    assert_eq!(output.status.code(), Some(1), "what went wrong in the background is the caller's to know");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_passed_is_served() {
    if installed("nbdinfo").is_none() {
        return;
    }
    for family in ["AF_UNIX", "AF_INET"] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(path("image"), [1; 4096]).unwrap();
        // What systemd does: descriptor 3, and whose it is.
        let activate = r#"
import os, socket, sys
family, where, program = sys.argv[1], sys.argv[2], sys.argv[3:]
s = socket.socket(getattr(socket, family))
s.bind(where + "/sock" if family == "AF_UNIX" else ("127.0.0.1", 0))
s.listen()
open(where + "/uri.new", "w").write("nbd+unix:///?socket=" + where + "/sock" if family == "AF_UNIX" else "nbd://127.0.0.1:%d" % s.getsockname()[1])
os.rename(where + "/uri.new", where + "/uri")
os.dup2(s.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(program[0], program)
"#;
        let where_ = dir.path().display().to_string();
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", activate, family, &where_, XL_COLO, "nbd", "--json", &path("image")])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        wait("the socket", || Path::new(&path("uri")).exists());
        let uri = std::fs::read_to_string(path("uri")).unwrap();
        assert_eq!(succeeds("nbdinfo", &["--size", &uri]).await.trim(), "4096");
        wait("the end", || child.try_wait().unwrap().is_some());
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let at = uri.replace("nbd+unix:///?socket=", "unix:").replace("nbd://", "tcp:");
        assert_eq!(said["listening"], at, "where the socket is that was passed");
        // One socket is enough.
        let two = ["-c", activate, family, &path("two"), XL_COLO, "nbd", "-p", "1", &path("image")];
        std::fs::create_dir(path("two")).unwrap();
        let said = one_line(&run("/usr/bin/python3", &two).await, 1);
        assert!(said.contains("LISTEN_FDS"), "{said}");
    }
}

/// A client that has read the greeting and chosen the export, if it is let.
pub(crate) fn chosen(socket: &Path) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").ok()?;
    stream.read_exact(&mut [0; 28]).ok()?;
    Some(stream)
}

/// Resident memory of a process.
fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_connections_at_once_cost_bounded_memory_and_a_descriptor_each() {
    let (wanted, spare) = (10_000, 1000);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let more = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, more).unwrap();
    if limit.maximum.is_some_and(|max| max < wanted + spare) {
        eprintln!("SKIP: {:?} descriptors at most; {} are wanted", limit.maximum, wanted + spare);
        return;
    }
    let nbd = Nbd::serve(&[7; 4096], &["-t", "-e", "0"]);
    let pid = nbd.child.0.id();
    let mut first = chosen(&nbd.socket()).unwrap();
    let kept: Vec<_> = (1..wanted).map(|_| chosen(&nbd.socket()).expect("a place for each")).collect();
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let kib = resident_kib(pid);
    assert!(kib < 64 * wanted, "{kib} KiB for {wanted} clients");
    assert!(descriptors < (wanted + spare) as usize, "{descriptors} for {wanted} clients");
    // The one that was there before is served as ever.
    first.write_all(b"\x25\x60\x95\x13\0\0\0\0cookie!!\0\0\0\0\0\0\0\0\0\0\0\x04").unwrap();
    let mut reply = [0; 20];
    first.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"\x67\x44\x66\x98\0\0\0\0cookie!!\x07\x07\x07\x07");
    drop(kept);
    wait("all but one to be gone", || std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count() < 100);
    eprintln!("{kib} KiB and {descriptors} descriptors for {wanted} clients");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_descriptors_goes_on_when_it_has_some_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("image"), [7; 4096]).unwrap();
    let script = "ulimit -n 64; exec \"$0\" nbd -t -e 0 -k \"$1\" \"$2\"";
    let socket = PathBuf::from(path("sock"));
    let mut command = Command::new("sh");
    command.args(["-c", script, XL_COLO, &path("sock"), &path("image")]);
    let _server = Listening::start(&mut command, &socket);
    let crowd: Vec<_> = (0..200).filter_map(|_| UnixStream::connect(&socket).ok()).collect();
    assert!(crowd.len() > 64, "more than it has descriptors for");
    drop(crowd);
    wait("a client is served", || chosen(&socket).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_finish_its_handshake_loses_its_place() {
    let nbd = Nbd::serve(&[7; 4096], &["-t", "-e", "1"]);
    let mut silent = UnixStream::connect(nbd.socket()).unwrap();
    // One byte now and then does not buy time.
    let mut drip = silent.try_clone().unwrap();
    let begun = Instant::now();
    let dripping = std::thread::spawn(move || {
        while drip.write_all(b"\0").is_ok() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    wait("its place is free", || chosen(&nbd.socket()).is_some());
    let _ = silent.read_to_end(&mut Vec::new());
    dripping.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_medium_that_fails_is_the_clients_news() {
    if installed("qemu-io").is_none() {
        return;
    }
    // A limit on file sizes fails writes behind it, and needs no root.
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image").display().to_string();
    std::fs::write(&image, vec![1; 2 * MIB]).unwrap();
    let sock = dir.path().join("sock");
    let script = "ulimit -f 1024; trap '' XFSZ; exec \"$0\" nbd -t -e 0 -k \"$1\" \"$2\"";
    let at = sock.display().to_string();
    let _server = Listening::start(Command::new("sh").args(["-c", script, XL_COLO, &at, &image]), &sock);
    let uri = format!("nbd+unix:///?socket={at}");
    // 1024 blocks of 512 bytes is where this process may write no more.
    let io = |command: &'static str| {
        let uri = uri.clone();
        async move {
            let output = run("qemu-io", &["-f", "raw", "-c", command, "-c", "read -P 1 0 512", &uri]).await;
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
    };
    let refused = io("write 1M 64k").await;
    assert!(refused.contains("write failed") && refused.contains("read 512/512"), "{refused}");
    let taken = io("write -P 1 4k 64k").await;
    assert!(taken.contains("wrote 65536/65536") && taken.contains("read 512/512"), "{taken}");
}
