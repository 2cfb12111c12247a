//! Two sides joined by hand, without a wire: what the simulator does not look at.

use super::primary::{Effect as PrimaryEffect, PrimarySide};
use super::secondary::{Effect as SecondaryEffect, SecondarySide};
use super::{Clock, lock};
use crate::clock::Instant;
use crate::colo::arbiter::{Claim, Policy};
use crate::colo::hello::Mode;
use crate::colo::stream::Item;
use crate::colo::{Loss, primary, secondary};
use crate::disk::MemoryDisk;
use crate::hypervisor::embedded::{Embedded, MachineConfig};
use crate::replica::epochs::{GuestView, PrimaryView, Replica, ReplicaConfig};
use crate::replica::mirror::{Holds, Mirror, MirrorHandle, Target};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const DISK_BYTES: usize = 1 << 20;

fn at(ms: u64) -> Instant {
    Instant::from_micros(ms * 1000)
}

fn claim(holder: &str) -> Claim {
    Claim { guest: "web".into(), expected: 1, holder: holder.into() }
}

fn machine() -> MachineConfig {
    MachineConfig { ram_pages: 256, mac: MAC, ip: [10, 0, 0, 9], diverge_percent: 0, host_entropy_seed: 7 }
}

/// A pair whose first state is loaded.
fn pair() -> (PrimarySide, SecondarySide) {
    let clock: Clock = Arc::new(|| at(0));
    let mirror = MirrorHandle(Arc::new(Mutex::new(Mirror::new(Box::new(MemoryDisk::new(DISK_BYTES)), 8 << 20))));
    let domain = Embedded::boot(&machine(), Box::new(mirror.clone()), clock.clone(), Box::new(|_| {})).unwrap();
    let config = primary::Config::new(Mode::Remus, claim("a"));
    let target = Target { session: 0, holds: Holds::Zeroes };
    let a = PrimarySide::new(at(0), config, Box::new(domain), mirror, Arc::default(), clock.clone(), target);
    let mut a = a.unwrap_or_else(|(_, error)| panic!("{error}"));

    let replica = Replica::new(Box::new(MemoryDisk::new(DISK_BYTES)), ReplicaConfig::default());
    let replica = Arc::new(Mutex::new(replica));
    lock(&replica).start_sync(1).unwrap();
    let disk = Box::new(GuestView(replica.clone()));
    let domain = Embedded::blank(&machine(), disk, clock.clone(), Box::new(|_| {})).unwrap();
    let mut config = secondary::Config::new(Mode::Remus, claim("b"));
    config.policy = Policy::Alone;
    let mut b = SecondarySide::new(at(0), config, Box::new(domain), replica, Arc::default(), MAC, clock).unwrap();

    for _ in 0..10_000 {
        a.copy_some(at(1));
        while let Some(effect) = a.poll_effect() {
            match effect {
                PrimaryEffect::Pages(batch) => b.handle_item(at(1), Item::Pages(batch)),
                PrimaryEffect::Devices(blob) => {
                    b.handle_item(at(1), Item::PagesEnd);
                    b.handle_item(at(1), Item::DeviceState(blob));
                }
                PrimaryEffect::DiskWrite { seq, offset, payload } => {
                    let mut disk = PrimaryView { replica: b.replica().clone(), generation: 1 };
                    let written = payload.content().write_to(&mut disk, offset);
                    a.handle_disk_acked(at(1), seq, written);
                }
                _ => {}
            }
        }
        b.work(at(1));
        while let Some(effect) = b.poll_effect() {
            if let SecondaryEffect::Message(message) = effect {
                a.handle_message(at(1), message);
            }
        }
        if a.machine().is_protected() {
            return (a, b);
        }
    }
    panic!("the first state does not arrive: {:?}, {:?}", a.machine().state(), b.machine().state());
}

/// The survivor's frames that announce its MAC address (RARP).
fn announcements(b: &mut SecondarySide) -> usize {
    let frames = std::iter::from_fn(|| b.poll_effect());
    frames.filter(|effect| matches!(effect, SecondaryEffect::ToNetwork(frame) if frame[12..14] == [0x80, 0x35])).count()
}

#[test]
fn a_takeover_is_announced_at_once_and_five_times_more() {
    let (_a, mut b) = pair();
    b.handle_loss(at(100), Loss::Requested);
    assert!(b.took_over());
    assert_eq!(announcements(&mut b), 1, "at once");
    let mut later = Vec::new();
    for ms in 101..2000 {
        if b.poll_timeout().is_some_and(|due| due <= at(ms)) {
            b.handle_timeout(at(ms));
            b.work(at(ms));
        }
        later.extend((0..announcements(&mut b)).map(|_| ms));
    }
    assert_eq!(later, [150, 250, 350, 450, 550]);
}

#[test]
fn a_side_that_stands_by_announces_nothing() {
    let (_a, mut b) = pair();
    b.handle_timeout(at(1) + Duration::from_secs(1));
    assert_eq!(announcements(&mut b), 0);
    assert!(!b.took_over());
}
