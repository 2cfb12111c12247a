//! A disk that refuses, a client that vanishes, memory and frames that are noise.

use super::super::kv;
use super::*;
use proptest::prelude::*;

#[test]
fn a_busy_disk_is_asked_again_and_the_guest_can_stop_meanwhile() {
    let mut world = World::new(&config(256), 1);
    let client = world.connect(&put("a", b"x"), 4096);
    world.disk.busy_percent = 100;
    world.run(Duration::from_secs(1), |_| false);
    assert!(
        world.disk.refusals > 500 && world.disk.refusals < 1500,
        "about once a millisecond: {}",
        world.disk.refusals
    );
    let soon = world.machine.poll_timeout().unwrap() - world.now;
    assert!(soon <= Duration::from_millis(2), "{soon:?}");
    assert!(world.clients[client].received.is_empty());
    // Captured with the request pending, it is answered elsewhere.
    let elsewhere = super::capture::clone_of(&world.machine, world.now, world.now);
    world.machine = elsewhere;
    world.disk.busy_percent = 0;
    assert!(world.run(Duration::from_secs(5), |world| world.clients[client].statuses() == [201]));
    world.disk.busy_percent = 60;
    for n in 0..30 {
        world.say(client, &put(&format!("k{n}"), &[n; 3000]));
        world.say(client, &get(&format!("k{n}")));
    }
    assert!(world.run(Duration::from_secs(60), |world| world.clients[client].responses().len() == 61));
    world.disk.busy_percent = 0;
    let stored = kv::scan(&mut world.disk).unwrap();
    assert_eq!(stored.len(), 31);
    assert!((0..30).all(|n| stored[&format!("k{n}")] == [n; 3000]));
}

#[test]
fn a_broken_disk_is_an_error_and_a_full_one_is_another() {
    let mut world = World::new(&config(256), 1);
    let client = world.connect(&put("a", b"x"), 4096);
    world.disk.broken = true;
    assert!(world.run(Duration::from_secs(5), |world| world.clients[client].statuses() == [500]));
    world.disk.broken = false;
    world.disk.disk = MemoryDisk::new(2048);
    world.machine = Machine::boot(&config(256), world.now, &mut world.disk).unwrap();
    let client = world.connect(&(0..4).flat_map(|n| put("a", &[n; 10])).collect::<Vec<_>>(), 4096);
    assert!(world.run(Duration::from_secs(5), |world| world.clients[client].responses().len() == 4));
    assert_eq!(world.clients[client].statuses(), [201, 200, 200, 507]);
}

#[test]
fn booting_needs_enough_memory_a_good_disk_and_a_sane_address() {
    let boot =
        |config: &MachineConfig, disk: &mut dyn Disk| Machine::boot(config, Instant::ZERO, disk).map(drop).unwrap_err();
    let mut disk = MemoryDisk::new(1 << 16);
    for bad in [
        MachineConfig { ram_pages: 255, ..config(256) },
        MachineConfig { ram_pages: u64::MAX / 8192, ..config(256) },
        MachineConfig { diverge_percent: 101, ..config(256) },
        MachineConfig { mac: [1; 6], ..config(256) },
    ] {
        let error = boot(&bad, &mut disk).to_string();
        assert!(!error.contains('\n') && error.len() > 20, "{error}");
    }
    disk.write(0, b"something else").unwrap();
    assert!(boot(&config(256), &mut disk).to_string().contains("not a key-value log"));
}

#[test]
fn a_client_that_vanishes_is_given_up() {
    let mut world = World::new(&config(256), 1);
    let value = vec![7; 4000];
    let client = world.connect(&put("v", &value), 4096);
    assert!(world.run(Duration::from_secs(5), |world| world.clients[client].statuses() == [201]));
    world.run(Duration::from_secs(1), |_| false);
    assert_eq!(world.machine.poll_timeout(), None, "an idle connection needs no timer");
    // One request still arrives, and then nothing passes in either direction.
    world.say(client, &get("v"));
    world.turn();
    world.now += Duration::from_millis(1);
    world.turn();
    assert!(world.machine.poll_timeout().is_some(), "a response is in flight");
    world.trouble_percent = 100;
    let steps = world.steps;
    assert!(world.run(Duration::from_secs(120), |world| world.machine.poll_timeout().is_none()));
    assert!(world.steps - steps > 12, "it was retried before");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn noise_on_the_wire_never_harms(seed in any::<u64>(), flips in 1_usize..6) {
        let mut world = World::new(&config(256), seed);
        let client = world.connect(&[put("a", &[1; 2000]), get("a")].concat(), 4096);
        let mut dice = Dice(seed);
        let mut sent = 0;
        world.run(Duration::from_millis(200), |world| {
            // Frames of the real conversation, damaged, with right checksums as often as not.
            let frame = world.to_guest.in_flight.values().next().cloned();
            let mut frame = frame.unwrap_or_else(|| { let len = dice.roll(80) as usize; dice.bytes(len) });
            for _ in 0..flips {
                if frame.len() > 14 {
                    let at = 14 + dice.roll(frame.len() as u64 - 14) as usize;
                    frame[at] = dice.roll(256) as u8;
                }
            }
            if dice.roll(4) > 0 { words_on_wire::fix_checksums(&mut frame); }
            world.machine.receive(&frame);
            sent += 1;
            sent > 300
        });
        prop_assert!(sent > 5);
        // A new connection works whatever happened to the first.
        let _ = client;
        let fresh = world.connect(&put("after", b"x"), 4096);
        prop_assert!(world.run(Duration::from_secs(90), |world| world.clients[fresh].statuses() == [201]));
    }

    #[test]
    fn noise_in_memory_and_registers_never_panics(seed in any::<u64>(), density in 1_u64..2000) {
        let mut world = World::new(&config(256), seed);
        for n in 0..6 {
            world.connect(&[put(&format!("k{n}"), &[1; 3000]), get(&format!("k{n}"))].concat(), 1024);
        }
        world.run(Duration::from_millis(2), |_| false);
        let mut dice = Dice(seed);
        let mut changed = 0;
        // The table with care, the rest at random: one word in `density`.
        for at in (4096..300 * 1024).step_by(8) {
            if dice.roll(density) == 0 {
                let value = match dice.roll(3) { 0 => dice.roll(16), 1 => u64::MAX >> dice.roll(64), _ => dice.roll(1 << 31) };
                world.machine.ram_mut().write_u64(at, value);
                changed += 1;
            }
        }
        let mut blob = world.machine.save_devices(world.now);
        // The registers behind the record's header, but for the clock, of which most values are refused.
        for byte in &mut blob[8 + 28..8 + 20 + 24 * 8] {
            if dice.roll(density.min(40)) == 0 {
                *byte = dice.roll(256) as u8;
                changed += 1;
            }
        }
        prop_assert!(changed > 0);
        world.machine.load_devices(world.now, &blob).unwrap();
        for n in 0..6 {
            world.say(n, &get("k0"));
        }
        let mut turns = 0;
        world.run(Duration::from_secs(30), |_| { turns += 1; turns > 3000 });
    }
}
