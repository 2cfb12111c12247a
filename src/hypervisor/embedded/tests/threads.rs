//! The machine on its thread: suspend means silence, idle means asleep.

use super::super::domain::{Clock, Embedded};
use super::words_on_wire::{arp_request, syn};
use super::*;
use crate::hypervisor::{Domain, DomainError};
use crate::page::Pfn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

/// A clock that a thread of its own moves on, as long as somebody looks at it.
fn clock() -> Clock {
    let micros = Arc::new(AtomicU64::new(0));
    let weak = Arc::downgrade(&micros);
    std::thread::spawn(move || {
        while let Some(micros) = weak.upgrade() {
            micros.fetch_add(1000, Ordering::Relaxed);
            drop(micros);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    Arc::new(move || Instant::from_micros(micros.load(Ordering::Relaxed)))
}

fn guest() -> (Embedded, mpsc::Receiver<Vec<u8>>) {
    let (send, frames) = mpsc::channel();
    let transmit = Box::new(move |frame: &[u8]| drop(send.send(frame.to_vec())));
    (Embedded::boot(&config(256), Box::new(MemoryDisk::new(1 << 20)), clock(), transmit).unwrap(), frames)
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn nothing_leaves_a_suspended_guest() {
    let (mut guest, frames) = guest();
    assert!(guest.receive_frame(&arp_request()));
    assert!(frames.recv_timeout(Duration::from_millis(50)).is_err(), "it starts suspended");
    guest.resume().unwrap();
    guest.resume().unwrap();
    frames.recv_timeout(SOON).expect("the frame that waited is answered");
    let nic = guest.nic();
    let stop = Arc::new(AtomicU64::new(0));
    let flood = std::thread::spawn({
        let stop = stop.clone();
        move || {
            let mut taken = 0_u64;
            while stop.load(Ordering::Relaxed) == 0 {
                taken += u64::from(nic.receive_frame(&arp_request()));
            }
            taken
        }
    });
    let mut answered = 0;
    for _ in 0..200 {
        guest.resume().unwrap();
        frames.recv_timeout(SOON).expect("it runs");
        guest.suspend().unwrap();
        answered += 1 + frames.try_iter().count();
        std::thread::yield_now();
        assert_eq!(frames.try_iter().count(), 0, "a frame left after suspend returned");
    }
    stop.store(1, Ordering::Relaxed);
    assert!(flood.join().unwrap() >= answered as u64 && answered >= 200);
}

#[test]
fn the_inbox_is_part_of_the_state_and_devices_need_a_suspended_guest() {
    let (mut first, frames) = guest();
    first.resume().unwrap();
    assert!(matches!(first.save_devices(), Err(DomainError::NotSuspended)));
    assert!(matches!(first.load_devices(&[]), Err(DomainError::NotSuspended)));
    first.suspend().unwrap();
    for _ in 0..256 {
        assert!(first.receive_frame(&syn(4000, 80)));
    }
    assert!(!first.receive_frame(&arp_request()), "the ring is bounded");
    let blob = first.save_devices().unwrap();
    let pfns: Vec<_> = (0..first.nr_pages()).map(Pfn).collect();
    let mut pages = Vec::new();
    first.read_pages(&pfns, &mut pages).unwrap();
    assert_eq!(frames.try_iter().count(), 0);

    let (send, theirs) = mpsc::channel();
    let transmit = Box::new(move |frame: &[u8]| drop(send.send(frame.to_vec())));
    let mut second = Embedded::blank(&config(256), Box::new(MemoryDisk::new(1 << 20)), clock(), transmit).unwrap();
    second.resume().unwrap();
    assert!(second.receive_frame(&arp_request()));
    assert!(theirs.recv_timeout(Duration::from_millis(50)).is_err(), "a blank guest does nothing");
    second.suspend().unwrap();
    second.write_pages(&pfns, &pages).unwrap();
    assert!(second.load_devices(&blob[1..]).is_err());
    second.load_devices(&blob).unwrap();
    second.set_generation(1).unwrap();
    second.resume().unwrap();
    assert_eq!(theirs.recv_timeout(SOON).expect("announced")[12..14], [8, 6]);
    let syn_ack = theirs.recv_timeout(SOON).expect("the frames that waited in the first guest's inbox");
    assert_eq!((&syn_ack[12..14], syn_ack[47]), (&[8, 0][..], 0x12));
}

#[test]
fn an_idle_guest_sleeps() {
    let asked = Arc::new(AtomicU64::new(0));
    let (count, inner) = (asked.clone(), clock());
    let clock: Clock = Arc::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        inner()
    });
    let (send, frames) = mpsc::channel();
    let transmit = Box::new(move |frame: &[u8]| drop(send.send(frame.to_vec())));
    let mut guest = Embedded::boot(&config(256), Box::new(MemoryDisk::new(1 << 20)), clock, transmit).unwrap();
    guest.resume().unwrap();
    assert!(guest.receive_frame(&arp_request()));
    frames.recv_timeout(SOON).expect("it runs");
    std::thread::sleep(Duration::from_millis(50));
    let before = asked.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(500));
    let woken = asked.load(Ordering::Relaxed) - before;
    assert!(before > 0 && woken <= 2, "an idle guest looked at the clock {woken} times in half a second");
    assert!(guest.receive_frame(&syn(4001, 80)));
    frames.recv_timeout(SOON).expect("and wakes");
    frames.recv_timeout(SOON).expect("and its timers wake it: the SYN-ACK is sent again");
}

#[test]
fn a_guest_whose_wire_panics_is_gone() {
    let transmit = Box::new(|_: &[u8]| panic!("the wire broke (this panic is part of the test)"));
    let mut guest = Embedded::boot(&config(256), Box::new(MemoryDisk::new(1 << 20)), clock(), transmit).unwrap();
    guest.resume().unwrap();
    assert!(guest.receive_frame(&arp_request()));
    let gone = (0..10_000).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        guest.logdirty(true).is_err()
    });
    assert!(gone);
    assert!(matches!(guest.suspend(), Err(DomainError::Gone)));
}

#[test]
fn memory_the_host_does_not_have_is_one_line() {
    let config = MachineConfig { ram_pages: u64::MAX / 8192, ..config(256) };
    let made = Embedded::blank(&config, Box::new(MemoryDisk::new(1 << 20)), clock(), Box::new(|_| {}));
    let error = made.err().expect("refused").to_string();
    assert!(error.contains("cannot allocate") && !error.contains('\n'), "{error}");
}
