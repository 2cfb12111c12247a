//! A medium that takes its time over a flush: nobody waits for it but who flushes.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::Duration;
use xen_colo::disk::{Disk, DiskError, Flush, MemoryDisk};
use xen_colo::replica::epochs::ReplicaConfig;
use xen_colo::replica::set::Replicas;
use xen_colo::replica::state::Standing;

/// Lends flushes that end when the test says how.
struct Lending {
    disk: MemoryDisk,
    ends: Arc<Mutex<Receiver<Result<(), DiskError>>>>,
    begun: Sender<()>,
}

impl Disk for Lending {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.disk.read(offset, into)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.disk.write(offset, bytes)
    }

    /// As a file's, whose error another flush has been told of.
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }

    fn lend_flush(&self) -> Option<Flush> {
        let (ends, begun) = (self.ends.clone(), self.begun.clone());
        Some(Box::new(move || {
            begun.send(()).unwrap();
            ends.lock().unwrap().recv().unwrap()
        }))
    }
}

#[test]
fn a_flush_that_is_under_way_keeps_nobody_but_another_flush() {
    for fails in [false, true] {
        let ((end, ends), (begun, begins)) = (channel(), channel());
        let disk = Lending { disk: MemoryDisk::new(4096), ends: Arc::new(Mutex::new(ends)), begun };
        let replicas = Replicas::new(vec![Box::new(disk)], ReplicaConfig::default());
        replicas.start_sync(1).unwrap();
        let (mut primary, mut guest) =
            (replicas.primary_views(1).next().unwrap(), replicas.guest_views().next().unwrap());
        primary.write(0, b"first").unwrap();
        replicas.seal().unwrap();
        let here = replicas.clone();
        let applying = spawn(move || here.apply_round());
        begins.recv().unwrap();
        // The primary writes, a checkpoint is made, the guest sees it, and takes over, all while the medium is waited for.
        primary.write(0, b"later").unwrap();
        replicas.seal().unwrap();
        let mut seen = [0; 5];
        guest.read(0, &mut seen).unwrap();
        assert_eq!(&seen, b"later");
        replicas.takeover(2).unwrap();
        guest.write(8, b"mine").unwrap();
        // A second flush would not be told what the first one was, so it waits for it.
        let mut flushed = replicas.guest_views().next().unwrap();
        let flushing = spawn(move || {
            loop {
                match flushed.flush() {
                    Err(DiskError::Busy) => {}
                    flushed => return flushed,
                }
            }
        });
        sleep(Duration::from_millis(50));
        assert!(!applying.is_finished() && !flushing.is_finished());
        end.send(if fails { Err(DiskError::io("a medium", std::io::Error::other("failed"))) } else { Ok(()) }).unwrap();
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
