//! A medium that takes its time over a copy, a flush, a record, or what is spilled: nobody waits for it but who must.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;
use xen_colo::disk::{Disk, DiskError, MemoryDisk};
use xen_colo::mutant::{self, Mutant};
use xen_colo::replica::epochs::{ReplicaConfig, Stage};
use xen_colo::replica::set::{OfDisk, Replicas};
use xen_colo::replica::state::{Standing, StateFile};

/// Long enough to see that somebody waits.
const A_WHILE: Duration = Duration::from_millis(50);
/// A step that waits for the medium goes on after this, and finds that it ended too early.
const PATIENCE: Duration = Duration::from_secs(10);

type Outcome = Result<(), DiskError>;

/// What a test waits for, and then lets end as it says.
#[derive(Clone)]
struct Slow {
    begun: Sender<()>,
    ends: Arc<Mutex<Receiver<Outcome>>>,
}

impl Slow {
    fn new() -> (Self, Receiver<()>, Sender<Outcome>) {
        let ((end, ends), (begun, begins)) = (channel(), channel());
        (Self { begun, ends: Arc::new(Mutex::new(ends)) }, begins, end)
    }

    fn wait(&self) -> Outcome {
        self.begun.send(()).unwrap();
        self.ends.lock().unwrap().recv_timeout(PATIENCE).unwrap_or_else(|_| failed("nobody let it end"))
    }
}

fn failed(why: &str) -> Outcome {
    Err(DiskError::io("a medium", std::io::Error::other(why.to_owned())))
}

/// A disk of which the way that is lent may be slow.
#[derive(Clone)]
struct Disks {
    bytes: Arc<Mutex<MemoryDisk>>,
    flush: Option<Slow>,
    copy: Option<Slow>,
    /// This way to it is the one that was lent.
    is_lent: bool,
}

impl Disks {
    fn new(flush: Option<Slow>, copy: Option<Slow>) -> Self {
        Self { bytes: Arc::new(Mutex::new(MemoryDisk::new(4096))), flush, copy, is_lent: false }
    }
}

impl Disk for Disks {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().size_bytes()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        self.bytes.lock().unwrap().read(offset, into)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Outcome {
        if let (Some(slow), true) = (&self.copy, self.is_lent) {
            slow.wait()?;
        }
        self.bytes.lock().unwrap().write(offset, bytes)
    }

    /// The other one's is as a file's, whose error another flush has been told of.
    fn flush(&mut self) -> Outcome {
        match &self.flush {
            Some(slow) if self.is_lent => slow.wait(),
            _ => Ok(()),
        }
    }

    fn lend(&self) -> Option<Box<dyn Disk>> {
        Some(Box::new(Self { is_lent: true, ..self.clone() }))
    }
}

/// A record that is slow to become durable, in the word that has this in it.
struct SlowRecord {
    slow: Slow,
    word: &'static str,
    last: String,
    said: Arc<Mutex<Vec<String>>>,
}

impl StateFile for SlowRecord {
    fn read(&mut self) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(None)
    }
    fn write(&mut self, record: &[u8]) -> Outcome {
        self.last = String::from_utf8_lossy(record).into_owned();
        Ok(())
    }
    fn sync(&mut self) -> Outcome {
        if self.last.contains(self.word) {
            self.slow.wait()?;
        }
        self.said.lock().unwrap().push(self.last.clone());
        Ok(())
    }
    fn sync_dir(&mut self) -> Outcome {
        Ok(())
    }
}

/// The primary writes, a checkpoint is made, and the guest sees it.
fn goes_on(replicas: &Replicas) {
    replicas.primary_views(1).next().unwrap().write(0, b"later").unwrap();
    replicas.seal().unwrap();
    let mut seen = [0; 5];
    replicas.guest_views().next().unwrap().read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"later");
    assert!(replicas.status()[0].seals > 1);
}

/// At its first checkpoint, with another one to be applied.
fn begun(replicas: &Replicas) {
    replicas.start_sync(1).unwrap();
    replicas.seal().unwrap();
    replicas.primary_views(1).next().unwrap().write(0, b"first").unwrap();
    replicas.seal().unwrap();
}

/// A guest's flush, until it is not busy any more.
fn flushed(replicas: &Replicas, bug: Option<Mutant>) -> Outcome {
    mutant::plant(bug);
    let mut guest = replicas.guest_views().next().unwrap();
    loop {
        match guest.flush() {
            Err(DiskError::Busy) => {}
            flushed => return flushed,
        }
    }
}

type Applied = Result<bool, OfDisk<DiskError>>;

/// Somebody applies what is sealed, and is held up by the medium; all goes on, and then a guest takes over, writes at `offset`, and
/// flushes. Both are under way when this returns, a while later.
fn taken_over(
    replicas: &Replicas,
    begins: &Receiver<()>,
    offset: u64,
    bug: Option<Mutant>,
) -> (JoinHandle<Applied>, JoinHandle<Outcome>) {
    begun(replicas);
    let here = replicas.clone();
    let applying = spawn(move || here.apply_round());
    begins.recv().unwrap();
    goes_on(replicas);
    replicas.takeover(2).unwrap();
    replicas.guest_views().next().unwrap().write(offset, b"mine").unwrap();
    let here = replicas.clone();
    let flushing = spawn(move || flushed(&here, bug));
    sleep(A_WHILE);
    assert!(!applying.is_finished(), "it was not held up");
    (applying, flushing)
}

#[test]
fn a_flush_that_is_under_way_keeps_nobody_but_another_flush() {
    for fails in [false, true] {
        let (slow, begins, end) = Slow::new();
        let replicas = Replicas::new(vec![Box::new(Disks::new(Some(slow), None))], ReplicaConfig::default());
        let (applying, flushing) = taken_over(&replicas, &begins, 8, None);
        assert!(!flushing.is_finished(), "a second flush would not be told what the first one was");
        end.send(if fails { failed("as told") } else { Ok(()) }).unwrap();
        let (applied, flushed) = (applying.join().unwrap(), flushing.join().unwrap());
        let status = replicas.status().remove(0);
        if fails {
            assert!(matches!(flushed, Err(DiskError::FlushFailed { .. })), "{flushed:?}");
            assert!(applied.is_err() && replicas.is_lost());
            assert!(!status.standing.is_whole(), "{status:?}");
        } else {
            flushed.unwrap();
            applied.unwrap();
            assert_eq!(status.standing, Standing::Guest, "{status:?}");
        }
    }
}

/// What is on the disk of a guest that took over while a copy was under way, wrote where that one does, and flushed.
fn taken_over_during_a_copy(bug: Option<Mutant>) -> [u8; 12] {
    let (slow, begins, end) = Slow::new();
    let disk = Disks::new(None, Some(slow));
    let replicas = Replicas::new(vec![Box::new(disk.clone())], ReplicaConfig::default());
    let (applying, flushing) = taken_over(&replicas, &begins, 0, bug);
    match bug {
        None => assert!(!flushing.is_finished(), "what the copy overwrites was written before its end"),
        // It waits for nothing; should it do so after all, the copy runs out of patience.
        Some(_) => {
            while !flushing.is_finished() {
                sleep(Duration::from_millis(1));
            }
        }
    }
    end.send(Ok(())).unwrap();
    // It merges what is left, as slowly.
    end.send(Ok(())).unwrap();
    applying.join().unwrap().unwrap();
    flushing.join().unwrap().unwrap();
    let mut found = [0; 12];
    disk.bytes.lock().unwrap().read(0, &mut found).unwrap();
    found
}

#[test]
fn a_copy_that_is_under_way_keeps_nobody_and_undoes_nothing() {
    assert_eq!(&taken_over_during_a_copy(None)[..5], b"miner");
    let found = taken_over_during_a_copy(Some(Mutant::WriteBesideCopy));
    assert_ne!(&found[..5], b"miner", "the planted bug was not seen");
}

#[test]
fn a_record_that_is_under_way_keeps_nobody_but_the_next_record() {
    for word in ["resync applying", "checkpoint"] {
        let (slow, begins, end) = Slow::new();
        let said = Arc::new(Mutex::new(Vec::new()));
        let record = SlowRecord { slow, word, last: String::new(), said: said.clone() };
        let image: (Box<dyn Disk>, Box<dyn StateFile>) = (Box::new(Disks::new(None, None)), Box::new(record));
        let replicas = Replicas::open(vec![image], 7, ReplicaConfig::default()).unwrap();
        let (applying, flushing) = taken_over(&replicas, &begins, 0, None);
        assert!(!flushing.is_finished());
        end.send(Ok(())).unwrap();
        applying.join().unwrap().unwrap();
        flushing.join().unwrap().unwrap();
        let said = said.lock().unwrap();
        let at = |word: &str| said.iter().position(|record| record.contains(word));
        assert!(at(word) < at("taken-over") && at("taken-over") < at(" guest"), "{said:?}");
        assert!(at(" guest") == Some(said.len() - 1), "{said:?}");
    }
}

/// A file system of its own, on a file. It can be frozen, as for a snapshot: who writes to it waits.
struct FileSystem {
    dir: tempfile::TempDir,
}

impl FileSystem {
    /// None, with a loud note, where none can be mounted.
    fn mounted() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (file, at) = (dir.path().join("file"), dir.path().join("at"));
        std::fs::create_dir(&at).unwrap();
        std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
        let does = |program: &str, arguments: &[&OsStr]| Command::new(program).args(arguments).output();
        let made = does("mkfs.ext4", &["-q".as_ref(), file.as_os_str()]);
        let mounted = does("mount", &["-o".as_ref(), "loop".as_ref(), file.as_os_str(), at.as_os_str()]);
        if ![&made, &mounted].iter().all(|done| done.as_ref().is_ok_and(|output| output.status.success())) {
            eprintln!("SKIP: a file system cannot be mounted: {made:?} {mounted:?}");
            return None;
        }
        Some(Self { dir })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("at")
    }

    fn freeze(&self, freeze: bool) -> bool {
        let how = if freeze { "--freeze" } else { "--unfreeze" };
        Command::new("fsfreeze").arg(how).arg(self.path()).output().is_ok_and(|output| output.status.success())
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        self.freeze(false);
        // Whoever waited has its file open for a moment more.
        for _ in 0..100 {
            if Command::new("umount").arg(self.path()).output().is_ok_and(|output| output.status.success()) {
                return;
            }
            sleep(A_WHILE);
        }
    }
}

/// A primary's write is held up by the file system it is spilled to; a checkpoint goes on, and a takeover if there is one. False
/// if they had to wait, None where nothing can be held up.
fn goes_on_beside_a_spill(takes_over: bool, bug: Option<Mutant>) -> Option<bool> {
    let spill = FileSystem::mounted()?;
    // Nothing of 500 bytes finds room in this memory.
    let config = ReplicaConfig { memory_budget_bytes: 620, spill_dir: Some(spill.path()), spill_budget_bytes: 1 << 20 };
    let replicas = Replicas::new(vec![Box::new(Disks::new(None, None))], config);
    replicas.start_sync(1).unwrap();
    replicas.seal().unwrap();
    let views = || (replicas.primary_views(1).next().unwrap(), replicas.guest_views().next().unwrap());
    let (mut primary, mut guest) = views();
    primary.write(0, &[1; 500]).unwrap();
    assert!(spill.freeze(true));
    let waiting = spawn(move || {
        mutant::plant(bug);
        primary.write(1000, &[2; 500])
    });
    sleep(A_WHILE);
    let is_waiting = !waiting.is_finished();
    let (told, hears) = channel();
    let here = replicas.clone();
    let going_on = spawn(move || {
        here.seal().unwrap();
        let mut seen = [0; 2000];
        guest.read(0, &mut seen).unwrap();
        if takes_over {
            here.takeover(2).unwrap();
        }
        // Nobody hears it if it comes too late.
        let _ = told.send((seen, here.status()[0].stage));
    });
    let went_on = hears.recv_timeout(if bug.is_some() { A_WHILE } else { PATIENCE });
    assert!(spill.freeze(false));
    going_on.join().unwrap();
    let written = waiting.join().unwrap();
    assert!(is_waiting, "the file system did not hold it up");
    let Ok((seen, stage)) = went_on else { return Some(false) };
    let expected = [[1; 500].as_slice(), &[0; 1500]].concat();
    assert!(seen[..] == expected, "the checkpoint, without what was under way");
    assert_eq!(stage, if takes_over { Stage::Failover } else { Stage::Running });
    if takes_over {
        assert!(matches!(written, Err(DiskError::Fenced { .. })), "{written:?}");
    } else {
        written.unwrap();
        replicas.seal().unwrap();
        let mut seen = [0; 500];
        views().1.read(1000, &mut seen).unwrap();
        assert!(seen == [2; 500], "it is in the next checkpoint");
    }
    Some(true)
}

#[test]
fn a_write_that_waits_for_a_spill_file_keeps_nobody() {
    for takes_over in [false, true] {
        let Some(went_on) = goes_on_beside_a_spill(takes_over, None) else { return };
        assert!(went_on, "a checkpoint waited for the spill file");
    }
    assert_eq!(goes_on_beside_a_spill(true, Some(Mutant::SpillUnderLock)), Some(false), "the planted bug was not seen");
}
