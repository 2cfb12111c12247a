//! NBD with other people's programs: their clients against our server, our client against their servers.
//!
//! Data is compared byte for byte. Where a program is not installed the test says that it is skipped; continuous
//! integration installs them (`qemu-utils libnbd-bin nbdkit`).

use crate::common::conversation::Conversation;
use crate::common::peer::soon;
use crate::common::{installed, pattern, run, succeeds};
use crate::nbd_command::Nbd;
use bytes::Bytes;
use nbd::client::NbdClient;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::nbd::serve_connection;
use xen_colo::daemon::nbd::threads::{Listener, OpenDisk, Running, Service, serve_all};
use xen_colo::disk::{Disk, FileDisk};
use xen_colo::nbd::handshake;
use xen_colo::replica::epochs::{GuestView, PrimaryView, Replica, ReplicaConfig};

const EXPORT: &str = "disk0";
const SIZE: u64 = 8 << 20;

/// A served export.
struct Export {
    dir: TempDir,
    task: JoinHandle<()>,
}

impl Drop for Export {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Export {
    /// Serves what `open` makes to every connection.
    async fn serve(mut open: impl FnMut(&Path) -> Box<dyn Disk> + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = Address::Unix(dir.path().join("nbd.sock")).listen().await.unwrap();
        let image = dir.path().join("image");
        let task = tokio::spawn(async move {
            while let Ok(link) = listener.accept().await {
                let disk = open(&image);
                tokio::spawn(serve_connection(link, EXPORT.into(), disk));
            }
        });
        Self { dir, task }
    }

    async fn file() -> Self {
        Self::serve(|image| Box::new(FileDisk::open_or_create(image, SIZE).unwrap())).await
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///{EXPORT}?socket={}", self.socket().display())
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("image")).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_copies_to_us_and_back() {
    if installed("qemu-img").is_none() {
        return;
    }
    let export = Export::file().await;
    let (source, back) = (export.path("source.raw"), export.path("back.raw"));
    std::fs::write(&source, pattern(SIZE)).unwrap();
    let raw = ["convert", "-f", "raw", "-O", "raw"];
    succeeds("qemu-img", &[&raw[..], &["-n", &source, &export.uri()]].concat()).await;
    assert!(export.image() == pattern(SIZE), "what qemu-img wrote");
    succeeds("qemu-img", &[&raw[..], &[&export.uri(), &back]].concat()).await;
    assert!(std::fs::read(back).unwrap() == pattern(SIZE), "what qemu-img read");
    succeeds("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &export.uri()]).await;
    let info = succeeds("qemu-img", &["info", "--output=json", "-f", "raw", &export.uri()]).await;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], SIZE, "{info:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_writes_flushes_and_verifies() {
    if installed("qemu-io").is_none() {
        return;
    }
    let export = Export::file().await;
    let uri = export.uri();
    let mut args = vec!["-f", "raw"];
    let script = [
        "write -P 0xa5 0 512",
        "write -P 0x5a 511 3",
        "write -f -P 0x77 1048576 65536",
        "aio_write -P 0x11 2097152 1048576",
        "aio_write -P 0x22 3145728 1048576",
        "aio_flush",
        "flush",
        "read -P 0xa5 0 511",
        "read -P 0x5a 511 3",
        "read -P 0 514 512",
        "read -P 0x77 1048576 65536",
        "read -P 0x11 2097152 1048576",
        "read -P 0x22 3145728 1048576",
        "read 8388607 1",
    ];
    for line in script {
        args.extend(["-c", line]);
    }
    args.push(&uri);
    let said = succeeds("qemu-io", &args).await;
    assert!(!said.contains("Pattern verification failed") && !said.contains("error"), "{said}");
    let image = export.image();
    assert!(image[..511].iter().all(|byte| *byte == 0xa5) && image[511..514] == [0x5a; 3]);
    assert!(image[2 << 20..3 << 20].iter().all(|byte| *byte == 0x11));
    let outside = run("qemu-io", &["-f", "raw", "-c", "write 8388608 512", &uri]).await;
    assert!(!outside.status.success(), "a write beyond the end is refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn libnbd_lists_reads_and_writes() {
    if installed("nbdinfo").is_none() || installed("nbdcopy").is_none() {
        return;
    }
    let export = Export::file().await;
    let listed = succeeds("nbdinfo", &["--list", "--json", &export.uri()]).await;
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let only = &listed["exports"][0];
    assert_eq!((&only["export-name"], &only["export-size"]), (&EXPORT.into(), &SIZE.into()), "{listed:#}");
    assert_eq!(
        (&only["is_read_only"], &only["can_flush"], &only["can_fua"]),
        (&false.into(), &true.into(), &true.into())
    );
    let unknown = format!("nbd+unix:///other?socket={}", export.socket().display());
    assert!(!run("nbdinfo", &[&unknown]).await.status.success(), "an export that is not there");
    let (source, back) = (export.path("source.raw"), export.path("back.raw"));
    std::fs::write(&source, pattern(SIZE)).unwrap();
    succeeds("nbdcopy", &["--flush", &source, &export.uri()]).await;
    assert!(export.image() == pattern(SIZE), "what nbdcopy wrote");
    succeeds("nbdcopy", &[&export.uri(), &back]).await;
    assert!(std::fs::read(back).unwrap() == pattern(SIZE), "what nbdcopy read");
}

/// The crate's client speaks the older half of the protocol: EXPORT_NAME, one request at a time.
#[tokio::test(flavor = "multi_thread")]
async fn the_nbd_crates_client_reads_and_writes() {
    let export = Export::file().await;
    let socket = export.socket();
    let client = tokio::task::spawn_blocking(move || {
        let mut stream = UnixStream::connect(socket).unwrap();
        let negotiated = nbd::client::handshake(&mut stream, EXPORT.as_bytes()).unwrap();
        assert_eq!((negotiated.size, negotiated.readonly, negotiated.send_flush), (SIZE, false, true));
        let mut client = NbdClient::new(&mut stream, &negotiated);
        client.write_all(&pattern(SIZE)).unwrap();
        client.flush().unwrap();
        client.seek(SeekFrom::Start(12_345)).unwrap();
        client.write_all(b"in the middle").unwrap();
        client.seek(SeekFrom::Start(12_340)).unwrap();
        let mut read = [0; 23];
        client.read_exact(&mut read).unwrap();
        read
    });
    let read = soon("the client is done", client).await.unwrap();
    let mut wanted = pattern(SIZE);
    wanted[12_345..12_358].copy_from_slice(b"in the middle");
    assert_eq!(read[..], wanted[12_340..12_363]);
    assert!(export.image() == wanted);
}

/// The replica behind the server: what arrives is a checkpoint's, and a generation that is over writes no byte more.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_refuses_the_writes_of_an_old_generation() {
    let replica = Arc::new(Mutex::<Option<Arc<Mutex<Replica>>>>::default());
    let made = replica.clone();
    let export = Export::serve(move |image| {
        let replica = made
            .lock()
            .unwrap()
            .get_or_insert_with(|| {
                let base = FileDisk::open_or_create(image, SIZE).unwrap();
                let mut replica = Replica::new(Box::new(base), ReplicaConfig::default());
                replica.start_sync(1).unwrap();
                Arc::new(Mutex::new(replica))
            })
            .clone();
        Box::new(PrimaryView { replica, generation: 1 })
    })
    .await;
    let mut conversation = Conversation::open(Address::Unix(export.socket()), EXPORT).await;
    conversation.writes(0, pattern(SIZE)).await.unwrap();
    let replica = replica.lock().unwrap().clone().unwrap();
    replica.lock().unwrap().seal().unwrap();
    conversation.writes(0, vec![0xee; 4096]).await.unwrap();
    replica.lock().unwrap().takeover(2).unwrap();
    // The sleeper's connection is still open: its writes are errors, and so is its flush.
    for offset in [0, 4096, SIZE - 4096] {
        let refused = conversation.writes(offset, vec![0xff; 4096]).await;
        assert!(refused.is_err(), "a write of generation 1 was taken at {offset}");
    }
    let mut survivor = replica.lock().unwrap();
    while survivor.apply_some(1 << 20).unwrap() {}
    assert!(survivor.status().fenced_writes >= 3, "{:?}", survivor.status());
    let mut disk = vec![0; SIZE as usize];
    survivor.guest_read(0, &mut disk).unwrap();
    assert!(disk == pattern(SIZE), "the survivor's disk is its last checkpoint");
}

/// What our client does to any server: pipelined writes, overlapping ones in order, a flush, and reads of it all.
async fn works_against(address: Address, export: &str) -> Vec<u8> {
    let mut it = Conversation::open(address, export).await;
    assert_eq!(it.client.export().unwrap().size_bytes, SIZE);
    let mut wanted = pattern(SIZE);
    for (number, chunk) in wanted.chunks(1 << 20).enumerate() {
        it.client.write((number << 20) as u64, Bytes::copy_from_slice(chunk)).unwrap();
    }
    // Each overlaps the one before: only in order does the last one win.
    for round in 0..20_u8 {
        let at = 4096 + u64::from(round) * 512;
        it.client.write(at, vec![round; 4096].into()).unwrap();
        wanted[at as usize..at as usize + 4096].fill(round);
    }
    it.client.flush().unwrap();
    it.completes(29).await.into_iter().for_each(|outcome| drop(outcome.unwrap()));
    let whole = it.reads(0, SIZE as u32).await.unwrap();
    assert!(whole[..] == wanted[..], "what our client reads");
    let odd = it.reads(512, 1024).await.unwrap();
    assert_eq!(odd[..], wanted[512..1536]);
    it.client.disconnect();
    while let Some(bytes) = it.client.poll_output() {
        it.link.write_all(&bytes).await.unwrap();
    }
    wanted
}

/// A server of somebody else's on a Unix socket, killed when dropped.
fn server(program: &str, args: &[&str]) -> tokio::process::Child {
    tokio::process::Command::new(program).args(args).stdin(Stdio::null()).kill_on_drop(true).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_works_against_qemu_nbd() {
    if installed("qemu-nbd").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (socket, image) = (dir.path().join("nbd.sock"), dir.path().join("image"));
    std::fs::write(&image, vec![0; SIZE as usize]).unwrap();
    let (at, path) = (socket.display().to_string(), image.display().to_string());
    let mut child = server("qemu-nbd", &["-k", &at, "-x", EXPORT, "-f", "raw", "--cache=writeback", &path]);
    let wanted = works_against(Address::Unix(socket), EXPORT).await;
    assert!(soon("qemu-nbd ends", child.wait()).await.unwrap().success());
    assert!(std::fs::read(image).unwrap() == wanted, "what qemu-nbd wrote");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_works_against_nbdkit() {
    if installed("nbdkit").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (socket, image) = (dir.path().join("nbd.sock"), dir.path().join("image"));
    std::fs::write(&image, vec![0; SIZE as usize]).unwrap();
    let (at, path) = (socket.display().to_string(), image.display().to_string());
    let _child = server("nbdkit", &["--foreground", "--unix", &at, "file", &path]);
    let wanted = works_against(Address::Unix(socket), "").await;
    assert!(std::fs::read(image).unwrap() == wanted, "what nbdkit wrote");
}

/// A server that may only be read, and one that knows nothing but EXPORT_NAME.
#[tokio::test(flavor = "multi_thread")]
async fn our_client_copes_with_lesser_servers() {
    if installed("nbdkit").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, flag) in [("ro.sock", "--readonly"), ("old.sock", "--mask-handshake=0")] {
        let socket = dir.path().join(name);
        let at = socket.display().to_string();
        let _child = server("nbdkit", &["--foreground", flag, "--unix", &at, "memory", "8M"]);
        let mut it = Conversation::open(Address::Unix(socket), "").await;
        assert_eq!(it.client.export().unwrap().size_bytes, SIZE);
        let written = it.client.write(0, vec![1; 512].into());
        assert_eq!(written.is_err(), flag == "--readonly", "{written:?}");
        if flag != "--readonly" {
            it.completes(1).await.remove(0).unwrap();
            assert_eq!(it.reads(0, 512).await.unwrap()[..], [1; 512]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_is_told_what_differs_from_the_last_checkpoint() {
    if installed("nbdinfo").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = FileDisk::open_or_create(&dir.path().join("image"), SIZE).unwrap();
    let mut replica = Replica::new(Box::new(base), ReplicaConfig::default());
    replica.start_sync(1).unwrap();
    replica.seal().unwrap();
    let view = GuestView(Arc::new(Mutex::new(replica)));
    let socket = dir.path().join("sock");
    let listener = Listener::Unix(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let exports = vec![handshake::Export { knows_changes: true, ..handshake::Export::new(EXPORT, SIZE) }];
    let disk = view.clone();
    let open: OpenDisk = Box::new(move |_| Ok(Box::new(disk.clone())));
    let service = Arc::new(Service { exports, open, max_connections: 4, tls: None });
    let running = Running::default();
    let here = running.clone();
    let server = std::thread::spawn(move || serve_all(&listener, &service, &here));
    let uri = format!("nbd+unix:///{EXPORT}?socket={}", socket.display());
    let map = async || {
        let said = succeeds("nbdinfo", &["--json", "--map=qemu:dirty-bitmap:checkpoint", &uri]).await;
        let runs: Vec<serde_json::Value> = serde_json::from_str(&said).unwrap();
        let number = |run: &serde_json::Value, key: &str| run[key].as_u64().unwrap();
        runs.iter().map(|run| (number(run, "offset"), number(run, "length"), number(run, "type"))).collect::<Vec<_>>()
    };
    assert_eq!(map().await, [(0, SIZE, 0)]);
    view.clone().write(4096, &[1; 8192]).unwrap();
    assert_eq!(map().await, [(0, 4096, 0), (4096, 8192, 1), (12288, SIZE - 12288, 0)]);
    view.0.lock().unwrap().seal().unwrap();
    assert_eq!(map().await, [(0, SIZE, 0)], "a checkpoint forgets what the guest wrote");
    running.end();
    server.join().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_between_our_ends_are_errors_and_nothing_more() {
    if installed("nbdkit").is_none() {
        return;
    }
    let ours = Nbd::serve(&[1; 1 << 20], &["-t", "-e", "0"]);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let trigger = path("trigger");
    // It fails writes while the trigger is there, is slow, and ends with its last client.
    let mut between = server(
        "nbdkit",
        &[
            "-f",
            "-U",
            &path("sock"),
            "--filter=exitlast",
            "--filter=error",
            "--filter=delay",
            "nbd",
            &format!("socket={}", ours.socket().display()),
            "error-pwrite=ENOSPC",
            "error-pwrite-rate=100%",
            &format!("error-pwrite-file={trigger}"),
            "rdelay=30ms",
            "wdelay=30ms",
        ],
    );
    let mut it = Conversation::open(Address::Unix(path("sock").into()), "").await;
    it.writes(0, vec![2; 4096]).await.unwrap();
    std::fs::write(&trigger, "").unwrap();
    for _ in 0..8 {
        it.client.write(4096, vec![3; 4096].into()).unwrap();
    }
    let outcomes = it.completes(8).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Err("NoSpace".into())), "{outcomes:?}");
    std::fs::remove_file(&trigger).unwrap();
    it.writes(8192, vec![4; 4096]).await.unwrap();
    let seen = it.reads(0, 16384).await.unwrap();
    let wanted: Vec<u8> = [2_u8, 1, 4, 1].iter().flat_map(|value| [*value; 4096]).collect();
    assert!(seen[..] == wanted[..]);
    it.client.disconnect();
    while let Some(bytes) = it.client.poll_output() {
        it.link.write_all(&bytes).await.unwrap();
    }
    assert!(soon("nbdkit ends", between.wait()).await.unwrap().success());
    assert!(std::fs::read(ours.path("image")).unwrap()[..16384] == wanted[..]);
}
