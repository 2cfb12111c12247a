//! Disk replication with a stock QEMU at the other end, in both roles, without a guest (`-machine none`).
//!
//! ```text
//!  QEMU: quorum ─ local image
//!             └─ replication(primary) ─ NBD ─▶ our server ─▶ our replica      xen-set-replication,
//!                                                                            xen-colo-do-checkpoint
//!  our mirror ─ local image                                                    between the two
//!         └─ our NBD client ─▶ QEMU: NBD server ─▶ secondary image ◀─ replication(secondary) ─ active, hidden
//! ```
//!
//! The order at a checkpoint is libxl's: the primary's writes are on the wire before the secondary seals. Data is
//! compared byte for byte. Source: qemu `docs/block-replication.txt`, `block/replication.c`.

use crate::common::conversation::Conversation;
use crate::common::qemu::{Drive, Qemu, difference};
use crate::common::{installed, run, until};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::nbd::{ServeError, serve_connection};
use xen_colo::disk::{Disk, FileDisk};
use xen_colo::mutant::{self, Mutant};
use xen_colo::nbd::client::Completion;
use xen_colo::replica::epochs::{GuestView, PrimaryView, Replica, ReplicaConfig, Stage};
use xen_colo::replica::mirror::{Holds, Mirror, Payload, Target};

const SIZE: usize = 8 << 20;
const EXPORT: &str = "disk0";

fn paths(dir: &TempDir) -> impl Fn(&str) -> PathBuf + use<> {
    let dir = dir.path().to_owned();
    move |name| dir.join(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_primary_replicates_into_our_replica() {
    if let Some(outcome) = stock_primary().await {
        assert_eq!(outcome, Ok(()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_keeps_its_guests_writes_is_caught() {
    mutant::plant(Some(Mutant::KeepActiveAtCheckpoint));
    let outcome = stock_primary().await;
    mutant::plant(None);
    if let Some(outcome) = outcome {
        assert_eq!(outcome, Err("round 3: byte 2097152 is 0xbb, not 0x3".into()));
    }
}

/// A stock primary whose disk is served at `drives`, and our replica of it.
struct Stock {
    dir: TempDir,
    qemu: Qemu,
    replica: Arc<Mutex<Replica>>,
    server: JoinHandle<Result<(), ServeError>>,
}

impl Stock {
    /// Two images of 0x11, replicating. None where there is no such QEMU.
    async fn primary() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let path = paths(&dir);
        std::fs::write(path("primary"), vec![0x11; SIZE]).unwrap();
        std::fs::write(path("secondary"), vec![0x11; SIZE]).unwrap();
        let base = FileDisk::open(&path("secondary")).unwrap();
        let replica = Arc::new(Mutex::new(Replica::new(Box::new(base), ReplicaConfig::default())));
        // Both images hold the same bytes, as QEMU demands before it starts.
        replica.lock().unwrap().start_sync(1).unwrap();
        replica.lock().unwrap().seal().unwrap();
        let listener = Address::Unix(path("nbd")).listen().await.unwrap();
        let served = replica.clone();
        let server = tokio::spawn(async move {
            let link = listener.accept().await.unwrap();
            let view = PrimaryView { replica: served, generation: 1 };
            serve_connection(link, EXPORT.into(), Box::new(view)).await
        });
        let file = format!("driver=raw,file.driver=file,file.filename={}", path("primary").display());
        let quorum = format!(
            "if=none,id=disk,driver=quorum,vote-threshold=1,read-pattern=fifo,{}",
            file.split(',').map(|part| format!("children.0.{part}")).collect::<Vec<_>>().join(",")
        );
        let mut qemu = Qemu::start(&path("qmp"), &[quorum], &[]).await?;
        let nbd = path("nbd").display().to_string();
        let said = qemu.line(&format!(
            "drive_add -n buddy driver=replication,mode=primary,node-name=replica,file.driver=nbd,file.server.type=unix,\
             file.server.path={nbd},file.export={EXPORT}"
        )).await;
        assert!(said.trim().is_empty(), "{said}");
        qemu.order("x-blockdev-change", json!({"parent": "disk", "node": "replica"})).await;
        qemu.order("xen-set-replication", json!({"enable": true, "primary": true})).await;
        qemu.serve(&path("drives"), &["disk"]).await;
        Some(Self { dir, qemu, replica, server })
    }
}

/// The first difference, or None where there is no such QEMU.
async fn stock_primary() -> Option<Result<(), String>> {
    let Stock { dir, mut qemu, replica, server } = Stock::primary().await?;
    let path = paths(&dir);
    let mut disk = Drive::open(&path("drives"), "disk").await;
    let mut guest = GuestView(replica.clone());
    let mut expected = vec![0x11; SIZE];
    let whole = |guest: &mut GuestView| {
        let mut bytes = vec![0; SIZE];
        guest.read(0, &mut bytes).unwrap();
        bytes
    };
    for round in 1..=5_u8 {
        // Pieces of sectors and of clusters, one over another, zeroes, and one at the very end.
        for (offset, len) in [(512, 1536), (65536 + 512, 3 << 20), (1 << 20, 512), (SIZE - 4096, 4096)] {
            let offset = offset + usize::from(round) * if offset > SIZE / 2 { 0 } else { 512 };
            disk.write(round, offset, len).await;
            expected[offset..offset + len].fill(round);
        }
        disk.write(0, 5 << 20, 65536).await;
        expected[5 << 20..][..65536].fill(0);
        disk.0.client.flush().unwrap();
        disk.0.completes(1).await.remove(0).unwrap();
        if round == 3 {
            // What guest B wrote itself is gone with the next checkpoint.
            guest.write(2 << 20, &[0xbb; 700]).unwrap();
        }
        let before = whole(&mut guest);
        assert!(before != expected, "the primary's writes are not to be seen before the checkpoint");
        qemu.order("xen-colo-do-checkpoint", json!({})).await;
        replica.lock().unwrap().seal().unwrap();
        if let Some(difference) = difference(&whole(&mut guest), &expected) {
            return Some(Err(format!("round {round}: {difference}")));
        }
        while replica.lock().unwrap().apply_some(1 << 20).unwrap() {}
    }
    let status = qemu.order("query-xen-replication-status", json!({})).await;
    assert_eq!(status["error"], false, "{status}");
    assert!(std::fs::read(path("primary")).unwrap() == expected);

    // Written, never checkpointed: rolled back by the takeover, which refuses the old primary's later writes.
    disk.write(0xee, 0, 65536).await;
    replica.lock().unwrap().takeover(2).unwrap();
    disk.write(0xef, 65536, 65536).await;
    guest.write(100, &[0x77; 50]).unwrap();
    expected[100..150].fill(0x77);
    until("the layers are merged", async || match replica.lock().unwrap().apply_some(1 << 20) {
        Ok(true) => Err("more"),
        done => done.map(drop).map_err(|_| "failed"),
    })
    .await;
    assert_eq!(difference(&whole(&mut guest), &expected), None);
    assert_eq!(replica.lock().unwrap().status().stage, Stage::Done);
    assert!(std::fs::read(path("secondary")).unwrap() == expected);
    assert!(replica.lock().unwrap().status().fenced_writes > 0);
    let status = qemu.order("query-xen-replication-status", json!({})).await;
    assert_eq!(status["error"], true, "the old primary knows that its writes went nowhere: {status}");
    drop(qemu);
    server.await.unwrap().unwrap();
    Some(Ok(()))
}

const BLOCK: usize = 4096;
const DEPTH: usize = 8;

/// For each block how often its writing has begun, and how often it was acknowledged. What is written is that number.
#[derive(Clone)]
struct Written {
    begun: Vec<u32>,
    acked: Vec<u32>,
}

/// Writes through the stock primary, always [`DEPTH`] blocks at the same time, until told to stop.
async fn write_on(mut disk: Drive, written: Arc<Mutex<Written>>, stop: Arc<AtomicBool>) {
    let mut under_way = BTreeMap::new();
    let mut next = 0;
    loop {
        while under_way.len() < DEPTH && !stop.load(Relaxed) {
            // Here and there, and back to each before long.
            next = (next + 37) % (SIZE / BLOCK / 16);
            if under_way.values().any(|block| *block == next) {
                continue;
            }
            let count = {
                let mut written = written.lock().unwrap();
                written.begun[next] += 1;
                written.begun[next]
            };
            let data = count.to_le_bytes().repeat(BLOCK / 4);
            under_way.insert(disk.0.client.write((next * BLOCK) as u64, data.into()).unwrap(), next);
        }
        if under_way.is_empty() {
            return;
        }
        match disk.0.client.poll_completion() {
            Some(Completion { cookie, result, .. }) => {
                result.unwrap();
                written.lock().unwrap().acked[under_way.remove(&cookie).unwrap()] += 1;
            }
            None => disk.0.step().await,
        }
    }
}

/// What is done wrong on purpose.
#[derive(Clone, Copy, PartialEq)]
enum Sabotage {
    Nothing,
    NoSeal,
    OneMore,
}

/// How often each block was written, as guest B sees it.
fn counts(guest: &mut GuestView) -> Result<Vec<u32>, String> {
    let mut bytes = vec![0; SIZE];
    guest.read(0, &mut bytes).unwrap();
    let count = |(at, block): (usize, &[u8])| {
        let count = u32::from_le_bytes(block[..4].try_into().unwrap());
        let whole = block.chunks(4).all(|word| word == &block[..4]);
        whole.then_some(if count == 0x1111_1111 { 0 } else { count }).ok_or(format!("block {at} is torn"))
    };
    bytes.chunks(BLOCK).enumerate().map(count).collect()
}

/// Checkpoints and a takeover while writes are under way. What was acknowledged before a checkpoint is in it, nothing is
/// that was begun after it, and nothing comes to it later.
async fn checkpoints_under_load(sabotage: Sabotage) -> Option<Result<(), String>> {
    let Stock { dir, mut qemu, replica, server } = Stock::primary().await?;
    let written = Arc::new(Mutex::new(Written { begun: vec![0; SIZE / BLOCK], acked: vec![0; SIZE / BLOCK] }));
    let stop = Arc::new(AtomicBool::new(false));
    let disk = Drive::open(&paths(&dir)("drives"), "disk").await;
    let writer = tokio::spawn(write_on(disk, written.clone(), stop.clone()));
    let mut guest = GuestView(replica.clone());
    let more = async |than: &Written| {
        until("some blocks are written again", async || {
            let acked: u32 = written.lock().unwrap().acked.iter().sum();
            let enough = acked > than.acked.iter().sum::<u32>() + 300;
            enough.then_some(()).ok_or(acked)
        })
        .await;
    };
    let mut sealed = vec![0; SIZE / BLOCK];
    for round in 1..=20 {
        let before = written.lock().unwrap().clone();
        more(&before).await;
        if sabotage == Sabotage::OneMore && round == 3 {
            replica.lock().unwrap().seal().unwrap();
        }
        match counts(&mut guest) {
            Ok(still) if still == sealed => {}
            Ok(_) => return Some(Err(format!("round {round}: the last checkpoint has changed"))),
            Err(torn) => return Some(Err(torn)),
        }
        let acked = written.lock().unwrap().acked.clone();
        qemu.order("xen-colo-do-checkpoint", json!({})).await;
        if sabotage != Sabotage::NoSeal || round != 3 {
            replica.lock().unwrap().seal().unwrap();
        }
        let begun = written.lock().unwrap().begun.clone();
        match counts(&mut guest) {
            Ok(now) => sealed = now,
            Err(torn) => return Some(Err(torn)),
        }
        for block in 0..sealed.len() {
            if !(acked[block]..=begun[block]).contains(&sealed[block]) {
                let (of, from, to) = (sealed[block], acked[block], begun[block]);
                return Some(Err(format!("round {round}: block {block} is of write {of}, not {from} to {to}")));
            }
        }
        // Some checkpoints are merged, some wait for the next.
        if round % 3 == 0 {
            while replica.lock().unwrap().apply_some(1 << 20).unwrap() {}
        }
    }
    let before = written.lock().unwrap().clone();
    more(&before).await;
    replica.lock().unwrap().takeover(2).unwrap();
    assert!(counts(&mut guest).unwrap() == sealed, "the last checkpoint, though writes are under way");
    // The old primary's guest goes on, on its own.
    let before = written.lock().unwrap().clone();
    more(&before).await;
    stop.store(true, Relaxed);
    writer.await.unwrap();
    while replica.lock().unwrap().apply_some(1 << 20).unwrap() {}
    assert!(counts(&mut guest).unwrap() == sealed);
    assert!(replica.lock().unwrap().status().fenced_writes > 0);
    let status = qemu.order("query-xen-replication-status", json!({})).await;
    assert_eq!(status["error"], true, "{status}");
    drop(qemu);
    server.await.unwrap().unwrap();
    Some(Ok(()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_primary_writes_while_checkpoints_are_made() {
    if let Some(outcome) = checkpoints_under_load(Sabotage::Nothing).await {
        assert_eq!(outcome, Ok(()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_too_few_and_one_too_many_are_seen_under_load() {
    if let Some(outcome) = checkpoints_under_load(Sabotage::NoSeal).await {
        assert!(outcome.as_ref().is_err_and(|why| why.starts_with("round 3: block ")), "{outcome:?}");
    }
    if let Some(outcome) = checkpoints_under_load(Sabotage::OneMore).await {
        assert_eq!(outcome, Err("round 3: the last checkpoint has changed".into()));
    }
}

/// Our primary: a mirror whose writes go to a stock secondary.
struct Primary {
    mirror: Mirror,
    wire: Conversation,
}

impl Primary {
    /// Sends everything the mirror lets go, and tells it what came of it.
    async fn forward(&mut self) {
        let mut sent = BTreeMap::new();
        loop {
            while let Some(write) = self.mirror.poll_forward() {
                let cookie = match write.payload {
                    Payload::Data(data) => self.wire.client.write(write.offset, data),
                    Payload::Zeroes { len_bytes, keep_allocated } => {
                        self.wire.client.write_zeroes(write.offset, len_bytes, keep_allocated)
                    }
                };
                sent.insert(cookie.unwrap(), write.seq);
            }
            if sent.is_empty() {
                return;
            }
            match self.wire.client.poll_completion() {
                Some(Completion { cookie, result, .. }) => {
                    let seq = sent.remove(&cookie).unwrap();
                    result.unwrap();
                    self.mirror.handle_acked(seq, Ok(()));
                }
                None => self.wire.step().await,
            }
        }
    }

    /// Ends an epoch, as a capture does, and sees it over.
    async fn checkpoint(&mut self) {
        let ended = self.mirror.mark();
        self.mirror.allow(ended);
        self.forward().await;
        assert!(self.mirror.drained(ended));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn our_primary_replicates_into_a_stock_secondary() {
    let dir = tempfile::tempdir().unwrap();
    let path = paths(&dir);
    if installed("qemu-img").is_none() {
        return;
    }
    std::fs::write(path("primary"), vec![0x11; SIZE]).unwrap();
    std::fs::write(path("secondary"), vec![0x11; SIZE]).unwrap();
    for overlay in ["active", "hidden"] {
        let file = path(overlay).display().to_string();
        assert!(run("qemu-img", &["create", "-q", "-f", "qcow2", &file, &SIZE.to_string()]).await.status.success());
    }
    let at = |name: &str| path(name).display().to_string();
    let drives = [
        format!("if=none,id=local,format=raw,file={}", at("secondary")),
        format!(
            "if=none,id=top,driver=replication,mode=secondary,top-id=top,file.driver=qcow2,file.file.driver=file,\
             file.file.filename={},file.backing.driver=qcow2,file.backing.file.driver=file,\
             file.backing.file.filename={},file.backing.backing=local",
            at("active"),
            at("hidden")
        ),
    ];
    let Some(mut qemu) = Qemu::start(&path("qmp"), &drives, &[]).await else { return };
    qemu.serve(&path("nbd"), &["local", "top"]).await;
    qemu.order("xen-set-replication", json!({"enable": true, "primary": false})).await;

    let wire = Conversation::open(Address::Unix(path("nbd")), "local").await;
    let local = FileDisk::open(&path("primary")).unwrap();
    let mut primary = Primary { mirror: Mirror::new(Box::new(local), 64 << 20), wire };
    primary.mirror.attach(Target { session: 0, holds: Holds::Anything });
    while primary.mirror.next_sync_chunk().unwrap() != xen_colo::replica::mirror::SyncStep::Finished {
        primary.forward().await;
    }
    primary.forward().await;
    primary.checkpoint().await;
    qemu.order("xen-colo-do-checkpoint", json!({})).await;
    let mut top = Drive::open(&path("nbd"), "top").await;
    let mut last = vec![0x11; SIZE];
    assert_eq!(difference(&top.whole(SIZE).await, &last), None);

    const H: usize = SIZE / 2;
    for round in 0x21..0x24_u8 {
        primary.mirror.write(H as u64 + 512, &vec![round; H - 512]).unwrap();
        // Guest B's own writes, on top of the last checkpoint.
        top.write(0x33, 0, 65536).await;
        primary.checkpoint().await;
        let mut seen = last.clone();
        seen[..65536].fill(0x33);
        assert_eq!(difference(&top.whole(SIZE).await, &seen), None, "before checkpoint {round:#x}");
        qemu.order("xen-colo-do-checkpoint", json!({})).await;
        last[H + 512..].fill(round);
        assert_eq!(difference(&top.whole(SIZE).await, &last), None, "after checkpoint {round:#x}");
    }
    let status = qemu.order("query-xen-replication-status", json!({})).await;
    assert_eq!(status["error"], false, "{status}");
    // Rolled back, but for what guest B wrote.
    primary.mirror.write(0, &[0xee; 4096]).unwrap();
    primary.checkpoint().await;
    top.write(0x44, 8192, 512).await;
    last[8192..8704].fill(0x44);
    drop(primary);
    qemu.order("nbd-server-remove", json!({"name": "local", "mode": "hard"})).await;
    qemu.order("xen-set-replication", json!({"enable": false, "primary": false, "failover": true})).await;
    assert_eq!(difference(&top.whole(SIZE).await, &last), None, "after the takeover");
    until("QEMU has committed", async || {
        difference(&std::fs::read(path("secondary")).unwrap(), &last).map_or(Ok(()), Err)
    })
    .await;
}
