//! Capture and load: pages and devices are the whole guest, and the dirty log names every page that changed.

use super::*;
use crate::bitmap::Bitmap;
use crate::hypervisor::{Domain, DomainError, RamCache};
use crate::page::{BATCH_PAGES, PAGE_SIZE, Pfn};
use smoltcp::socket::tcp::State;
use std::collections::BTreeSet;

/// A second machine, made of the first one's pages and devices, on a host whose clock says `there`.
pub(super) fn clone_of(machine: &Machine, here: Instant, there: Instant) -> Machine {
    let nr_pages = machine.ram().nr_pages();
    let pfns: Vec<_> = (0..nr_pages).map(Pfn).collect();
    let mut pages = Vec::new();
    machine.ram().read_pages(&pfns, &mut pages).unwrap();
    let mut other = Machine::blank(&MachineConfig { host_entropy_seed: 7, ..config(nr_pages) }).unwrap();
    other.ram_mut().write_pages(&pfns, &pages).unwrap();
    other.load_devices(there, &machine.save_devices(here)).unwrap();
    other
}

#[test]
fn a_connection_goes_on_in_another_machine_in_the_middle_of_a_transfer() {
    let body = Dice(1).bytes(65_536);
    // Whatever moment the guest is moved at, and with it whatever was in flight lost.
    let mut moved = 0;
    for moment in (2..100).step_by(3) {
        let mut world = World::new(&config(16_384), moment);
        let client = world.connect(&[put("v", &body), get("v"), put("w", b"x")].concat(), 20_000);
        for _ in 0..moment {
            world.run(Duration::from_micros(100), |_| false);
        }
        if world.clients[client].responses().len() == 3 {
            break;
        }
        moved += 1;
        world.machine = clone_of(&world.machine, world.now, world.now);
        world.to_guest.in_flight.clear();
        world.to_peer.in_flight.clear();
        world.machine.set_generation(2);
        assert!(world.run(Duration::from_secs(60), |world| world.clients[client].responses().len() == 3), "{moment}");
        assert_eq!(world.clients[client].statuses(), [201, 200, 201]);
        assert!(world.clients[client].responses()[1].2 == body, "moment {moment}: a byte was lost");
    }
    assert!(moved >= 6, "{moved} moments in the middle of the transfer");
}

#[test]
fn guest_time_and_timers_go_on_on_a_host_with_another_clock() {
    let mut world = World::new(&config(256), 1);
    let client = world.connect(&put("v", b"x"), 4096);
    assert!(world.run(Duration::from_secs(9), |world| world.clients[client].statuses() == [201]));
    world.run(Duration::from_secs(7), |_| false);
    // A response nobody acknowledges is in flight when the guest is moved.
    world.say(client, &get("v"));
    world.turn();
    world.now += Duration::from_millis(1);
    world.turn();
    let left = world.machine.poll_timeout().unwrap() - world.now;
    let there = Instant::from_micros(3);
    let mut other = clone_of(&world.machine, world.now, there);
    assert_eq!(other.poll_timeout(), Some(there + left));
    let mut sent = 0;
    other.step(there, &mut world.disk, &mut |_| sent += 1);
    assert_eq!(sent, 0, "not due yet");
    other.step(there + left, &mut world.disk, &mut |_| sent += 1);
    assert_eq!(sent, 1, "sent again on time");
    other.set_generation(1);
    world.machine = clone_of(&other, there, world.now);
    world.say(client, b"GET / HTTP/1.1\r\n\r\n");
    assert!(world.run(Duration::from_secs(9), |world| world.clients[client].responses().len() == 3));
    let text = String::from_utf8(world.clients[client].responses()[2].2.clone()).unwrap();
    assert!(text.contains("\"uptime_seconds\":7,") && text.contains("\"generation\":1}"), "{text}");
}

#[test]
fn copying_the_dirty_pages_and_the_devices_makes_two_guests_identical() {
    for seed in 0..6 {
        let mut world = World::new(&config(1024), seed);
        world.trouble_percent = seed;
        let mut copy = clone_of(&world.machine, world.now, world.now);
        world.machine.ram_mut().logdirty(true);
        let mut dice = Dice(seed);
        let mut named = BTreeSet::new();
        for round in 0..40 {
            if round % 10 == 0 {
                let client = world.connect(b"", 4096);
                assert!(world.run(Duration::from_secs(30), |world| world.state(client) == State::Established));
            }
            for n in 0..world.clients.len() {
                let name = format!("k{}", dice.roll(9));
                let len = dice.roll(9000) as usize;
                let body = dice.bytes(len);
                world.say(n, &if dice.roll(2) == 0 { put(&name, &body) } else { get(&name) });
            }
            world.run(Duration::from_millis(40), |_| false);
            let mut dirty = Bitmap::new(1024);
            world.machine.ram_mut().take_dirty(&mut dirty);
            let pfns: Vec<_> = dirty.iter().collect();
            let mut pages = Vec::new();
            world.machine.ram().read_pages(&pfns, &mut pages).unwrap();
            copy.ram_mut().write_pages(&pfns, &pages).unwrap();
            copy.load_devices(world.now, &world.machine.save_devices(world.now)).unwrap();
            let whole = |machine: &Machine| machine.ram().read(0, 1024 * PAGE_SIZE).to_vec();
            assert!(whole(&copy) == whole(&world.machine), "seed {seed} round {round}: a page changed unnoticed");
            assert_eq!(copy.save_devices(world.now), world.machine.save_devices(world.now));
            named.extend(pfns);
        }
        assert!(
            named.len() > 5 && world.machine.requests() > 20,
            "{} pages, {}",
            named.len(),
            world.machine.requests()
        );
        assert!(named.len() < 512, "most of the guest was never touched");
    }
}

#[test]
fn an_idle_guest_dirties_nothing_and_a_small_request_only_a_few_pages() {
    let mut world = World::new(&config(16_384), 1);
    let client = world.connect(&put("a", b"x"), 4096);
    assert!(world.run(Duration::from_secs(5), |world| world.clients[client].statuses() == [201]));
    world.run(Duration::from_secs(1), |_| false);
    world.machine.ram_mut().logdirty(true);
    for _ in 0..100 {
        world.now += Duration::from_secs(10);
        assert!(!world.machine.step(world.now, &mut world.disk, &mut |_| panic!("an idle guest is silent")));
    }
    let mut dirty = Bitmap::new(16_384);
    world.machine.ram_mut().take_dirty(&mut dirty);
    assert_eq!(dirty.count(), 0);
    for _ in 0..50 {
        let count = world.clients[client].responses().len();
        world.say(client, &put("a", b"y"));
        assert!(world.run(Duration::from_secs(5), |world| world.clients[client].responses().len() > count));
    }
    world.machine.ram_mut().take_dirty(&mut dirty);
    assert!((1..=4).contains(&dirty.count()), "table, two rings, index: not {} pages", dirty.count());
}

/// A domain that is only memory, and counts how it is written.
struct OnlyMemory {
    ram: super::super::ram::Ram,
    writes: Vec<usize>,
}

impl Domain for OnlyMemory {
    fn nr_pages(&self) -> u64 {
        self.ram.nr_pages()
    }
    fn suspend(&mut self) -> Result<(), DomainError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), DomainError> {
        Ok(())
    }
    fn logdirty(&mut self, on: bool) -> Result<(), DomainError> {
        self.ram.logdirty(on);
        Ok(())
    }
    fn take_dirty(&mut self, into: &mut Bitmap) -> Result<(), DomainError> {
        self.ram.take_dirty(into);
        Ok(())
    }
    fn read_pages(&mut self, pfns: &[Pfn], into: &mut Vec<u8>) -> Result<(), DomainError> {
        self.ram.read_pages(pfns, into)
    }
    fn write_pages(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Result<(), DomainError> {
        self.writes.push(pfns.len());
        self.ram.write_pages(pfns, bytes)
    }
    fn save_devices(&mut self) -> Result<Vec<u8>, DomainError> {
        Ok(Vec::new())
    }
    fn check_devices(&self, _: &[u8]) -> Result<(), DomainError> {
        Ok(())
    }
    fn load_devices(&mut self, _: &[u8]) -> Result<(), DomainError> {
        Ok(())
    }
    fn set_generation(&mut self, _: u64) -> Result<(), DomainError> {
        Ok(())
    }
    fn receive_frame(&mut self, _: &[u8]) -> bool {
        false
    }
}

/// Makes the guest's memory equal to the cache, given what `changed` in the cache; how many pages that took.
fn apply(cache: &RamCache, domain: &mut dyn Domain, changed: &Bitmap) -> Result<u64, DomainError> {
    let mut pages = changed.clone();
    domain.take_dirty(&mut pages)?;
    let pfns: Vec<_> = pages.iter().collect();
    for batch in pfns.chunks(BATCH_PAGES) {
        cache.put(domain, batch)?;
    }
    domain.take_dirty(&mut Bitmap::new(cache.nr_pages()))?;
    Ok(pages.count())
}

#[test]
fn the_cache_puts_back_what_either_guest_changed() {
    let nr_pages = 3000;
    let mut domain = OnlyMemory { ram: super::super::ram::Ram::new(nr_pages).unwrap(), writes: Vec::new() };
    let mut cache = RamCache::new(nr_pages).unwrap();
    assert_eq!(cache.nr_pages(), nr_pages);
    domain.logdirty(true).unwrap();
    let mut changed = Bitmap::new(nr_pages);
    for pfn in (0..2500).map(Pfn) {
        cache.store(pfn, &[pfn.0 as u8 | 1; PAGE_SIZE]);
        changed.set(pfn);
    }
    cache.store_zero(Pfn(2499));
    domain.ram.write_u8(2999 * PAGE_SIZE, 0xee);
    assert_eq!(apply(&cache, &mut domain, &changed).unwrap(), 2501);
    assert_eq!(domain.writes, [1024, 1024, 453]);
    for pfn in (0..nr_pages).map(Pfn) {
        assert!(domain.ram.read(pfn.0 as usize * PAGE_SIZE, PAGE_SIZE) == cache.page(pfn), "{pfn:?}");
    }
    assert_eq!((cache.page(Pfn(2499))[0], cache.page(Pfn(7))[5]), (0, 7));
    // What the guest then does on its own is undone, and the writes above are not taken for its doing.
    domain.ram.write_u8(9 * PAGE_SIZE, 0xee);
    assert_eq!(apply(&cache, &mut domain, &Bitmap::new(nr_pages)).unwrap(), 1);
    assert_eq!(domain.ram.read_u8(9 * PAGE_SIZE), 9);
    assert!(matches!(RamCache::new(u64::MAX / 8192), Err(DomainError::BadConfig(_))));
}
