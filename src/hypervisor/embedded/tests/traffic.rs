//! The service as a client sees it, over good links and bad.

use super::super::kv;
use super::*;
use smoltcp::socket::tcp::State;

const BIG: u64 = 16_384;
const SMALL: u64 = 256;
const MINUTE: Duration = Duration::from_secs(60);

fn answered(world: &mut World, client: usize, count: usize) -> Vec<u16> {
    let done = world.run(MINUTE, |world| world.clients[client].responses().len() >= count);
    let statuses = world.clients[client].statuses();
    assert!(done, "{count} responses within a minute, not {statuses:?}");
    statuses
}

#[test]
fn values_are_stored_replaced_and_read_back() {
    let mut world = World::new(&config(SMALL), 1);
    let client = world.connect(&put("a", b"one"), 4096);
    assert_eq!(answered(&mut world, client, 1), [201]);
    assert_eq!(world.disk.flushes, 2, "one for the format, one before the answer");
    assert_eq!(kv::scan(&mut world.disk).unwrap()["a"], b"one", "on the disk by the time it is answered");
    world.say(client, &put("a", b"two"));
    world.say(client, &get("a"));
    world.say(client, &get("b"));
    assert_eq!(answered(&mut world, client, 4), [201, 200, 200, 404]);
    let responses = world.clients[client].responses();
    assert_eq!(responses[2].2, b"two");
    assert!(responses.iter().all(|(_, seed, _)| seed == "0000000000000000"));
    world.say(client, b"GET / HTTP/1.1\r\n\r\n");
    answered(&mut world, client, 5);
    let status: serde_json::Value = serde_json::from_slice(&world.clients[client].responses()[4].2).unwrap();
    assert_eq!(
        (&status["requests"], &status["generation"], &status["uptime_seconds"]),
        (&4.into(), &0.into(), &0.into())
    );
    assert_eq!(world.machine.requests(), 5);
}

#[test]
fn what_the_disk_holds_is_what_a_get_returns() {
    let mut world = World::new(&config(SMALL), 1);
    let client = world.connect(&put("a", b"before"), 4096);
    assert_eq!(answered(&mut world, client, 1), [201]);
    world.disk.write(512 + 26, b"?").unwrap();
    world.say(client, &get("a"));
    assert_eq!(answered(&mut world, client, 2), [201, 500], "a damaged record is noticed, not served");
}

#[test]
fn every_refusal_has_its_status() {
    for (request, status, closes) in [
        ("PUT /k/a HTTP/1.1\r\n\r\n", 411, true),
        ("PUT /k/a HTTP/1.1\r\nContent-Length: 4097\r\n\r\n", 413, true),
        ("PUT /k/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501, true),
        ("PUT /k/a%20b HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400, true),
        ("PUT /k/ HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400, true),
        ("nonsense\r\n\r\n", 400, true),
        ("DELETE /k/a HTTP/1.1\r\n\r\n", 405, false),
        ("PUT / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405, false),
        ("GET /other HTTP/1.1\r\n\r\n", 404, false),
        ("GET /k/none HTTP/1.1\r\n\r\n", 404, false),
        ("GET /k/none HTTP/1.1\r\nConnection: close\r\n\r\n", 404, true),
        ("GET / HTTP/1.0\r\n\r\n", 200, true),
    ] {
        let mut world = World::new(&config(SMALL), 1);
        let client = world.connect(request.as_bytes(), 4096);
        assert_eq!(answered(&mut world, client, 1), [status], "{request:?}");
        let closed = world.run(Duration::from_secs(1), |world| world.state(client) == State::CloseWait);
        assert_eq!(closed, closes, "{request:?}");
    }
    let mut world = World::new(&config(SMALL), 1);
    let client = world.connect(format!("GET / HTTP/1.1\r\nA: {}", "x".repeat(9000)).as_bytes(), 4096);
    assert_eq!(answered(&mut world, client, 1), [431]);
    let mut world = World::new(&config(SMALL), 1);
    let name = "n".repeat(64);
    let client = world.connect(&[put(&name, b""), put(&format!("{name}n"), b"")].concat(), 4096);
    assert_eq!(answered(&mut world, client, 2), [201, 400]);
}

#[test]
fn a_head_request_is_told_the_length_and_sent_no_body() {
    let mut world = World::new(&config(SMALL), 1);
    let client =
        world.connect(&[&put("a", b"12345")[..], b"HEAD /k/a HTTP/1.1\r\nConnection: close\r\n\r\n"].concat(), 4096);
    assert!(world.run(MINUTE, |world| world.state(client) == State::CloseWait));
    let text = String::from_utf8(world.clients[client].received.clone()).unwrap();
    assert!(text.contains("Content-Length: 5\r\n") && text.ends_with("\r\n\r\n"), "{text}");
}

#[test]
fn a_client_that_asks_before_it_sends_is_told_to_go_on() {
    let mut world = World::new(&config(SMALL), 1);
    let client = world.connect(b"PUT /k/a HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n", 4096);
    assert!(world.run(MINUTE, |world| !world.clients[client].received.is_empty()));
    assert_eq!(world.clients[client].received, b"HTTP/1.1 100 Continue\r\n\r\n");
    world.say(client, b"abc");
    assert_eq!(answered(&mut world, client, 2), [100, 201]);
}

#[test]
fn pipelined_requests_are_answered_in_order_though_the_ring_is_small() {
    let mut world = World::new(&config(SMALL), 1);
    let value = Dice(3).bytes(4000);
    let mut bytes = put("v", &value);
    (0..40).for_each(|_| bytes.extend(get("v")));
    let client = world.connect(&bytes, 2048);
    let statuses = answered(&mut world, client, 41);
    assert_eq!((statuses[0], statuses.len()), (201, 41));
    assert!(world.clients[client].responses()[1..].iter().all(|(status, _, body)| *status == 200 && *body == value));
}

#[test]
fn bad_links_delay_but_lose_nothing() {
    for seed in 0..12 {
        let mut world = World::new(&config(BIG), seed);
        world.trouble_percent = 5;
        let bodies: Vec<_> = [65_536, 1, 0, 20_000].iter().map(|len| Dice(seed + 9).bytes(*len)).collect();
        let clients: Vec<_> = (0..3)
            .map(|n| {
                let mut bytes = Vec::new();
                for (at, body) in bodies.iter().enumerate() {
                    bytes.extend(put(&format!("k{n}-{at}"), body));
                    bytes.extend(get(&format!("k{n}-{at}")));
                }
                world.connect(&bytes, 30_000)
            })
            .collect();
        let done = world.run(
            // smoltcp's own retransmissions back off to a minute.
            Duration::from_secs(3600),
            |world| world.clients.iter().all(|c| c.responses().len() == 8),
        );
        assert!(done, "seed {seed}");
        for client in clients {
            for (at, pair) in world.clients[client].responses().chunks(2).enumerate() {
                assert_eq!((pair[0].0, pair[1].0), (201, 200));
                assert!(pair[1].2 == bodies[at], "seed {seed}: value {at} came back changed");
            }
        }
        for link in [&world.to_guest, &world.to_peer] {
            assert!(link.dropped > 5 && link.doubled > 5 && link.reordered > 5, "the links were bad");
        }
        assert_eq!(kv::scan(&mut world.disk).unwrap().len(), 12);
    }
}

#[test]
fn a_half_closed_client_still_gets_its_answers_and_both_ends_close() {
    let mut world = World::new(&config(SMALL), 1);
    let client = world.connect(&[put("a", b"x"), get("a")].concat(), 4096);
    world.clients[client].half_close = true;
    assert_eq!(answered(&mut world, client, 2), [201, 200]);
    assert!(world.run(MINUTE, |world| world.state(client) == State::TimeWait));
    world.run(Duration::from_secs(5), |_| false);
    assert_eq!(world.machine.poll_timeout(), None, "nothing is left behind");
}

#[test]
fn a_shut_window_is_probed_until_it_opens() {
    let mut world = World::new(&config(SMALL), 1);
    let value = Dice(3).bytes(4000);
    let client = world.connect(&[put("v", &value), get("v")].concat(), 1024);
    world.clients[client].deaf = true;
    let steps = world.steps;
    world.run(MINUTE, |_| false);
    assert!(world.clients[client].received.is_empty());
    let (probes, state) = (world.steps - steps, world.state(client));
    assert!((5..200).contains(&probes) && state == State::Established, "{probes} steps, {state:?}");
    world.clients[client].deaf = false;
    // The window update is lost: only a probe can find out.
    world.trouble_percent = 100;
    world.turn();
    world.trouble_percent = 0;
    assert_eq!(answered(&mut world, client, 2), [201, 200]);
    assert_eq!(world.clients[client].responses()[1].2, value);
}

#[test]
fn eight_clients_share_a_small_guest_and_the_ninth_is_refused() {
    let mut world = World::new(&config(SMALL), 1);
    for n in 0..8 {
        world.connect(&put(&format!("k{n}"), b"x"), 4096);
    }
    assert!(world.run(MINUTE, |world| world.clients.iter().all(|client| client.statuses() == [201])));
    let ninth = world.connect(&get("k0"), 4096);
    assert!(world.run(Duration::from_secs(5), |world| world.state(ninth) == State::Closed), "reset");
    world.clients[3].half_close = true;
    assert!(world.run(MINUTE, |world| world.state(3) == State::TimeWait));
    let tenth = world.connect(&get("k0"), 4096);
    assert_eq!(answered(&mut world, tenth, 1), [200]);
}

#[test]
fn a_large_guest_serves_sixty_four_at_a_time() {
    let mut world = World::new(&config(BIG), 1);
    for n in 0..64 {
        world.connect(&put(&format!("k{n}"), b"x"), 4096);
    }
    assert!(world.run(MINUTE, |world| world.clients.iter().all(|client| client.statuses() == [201])));
    assert!((0..64).all(|client| world.state(client) == State::Established));
}

#[test]
fn divergence_changes_bytes_and_never_lengths() {
    let run = |seed, diverge_percent| {
        let mut world = World::new(&MachineConfig { diverge_percent, host_entropy_seed: seed, ..config(SMALL) }, 1);
        let client = world.connect(&put("a", b"x"), 4096);
        for n in 1..60 {
            answered(&mut world, client, n);
            world.say(client, &get("a"));
        }
        answered(&mut world, client, 60);
        world.clients[client].received.clone()
    };
    assert_eq!(run(1, 0), run(2, 0), "no divergence asked for, none seen");
    let (one, two) = (run(1, 30), run(2, 30));
    assert_eq!(one.len(), two.len());
    assert_ne!(one, two);
    let random = String::from_utf8(one).unwrap().matches("X-Hash-Seed: ").count() - 60;
    assert_eq!(random, 0);
    let zeroes = String::from_utf8(two).unwrap().matches("X-Hash-Seed: 0000000000000000").count();
    assert!((25..58).contains(&zeroes), "about seven in ten, not {zeroes} of 60");
}

#[test]
fn a_client_that_goes_on_sending_after_its_refusal_still_reads_it() {
    let mut world = World::new(&config(SMALL), 1);
    let client = world.connect(&put("a", &[1; 100_000]), 4096);
    assert!(world.run(MINUTE, |world| world.clients[client].to_send.is_empty()), "what is refused is still taken in");
    assert_eq!(world.clients[client].statuses(), [413]);
    assert_eq!(world.state(client), State::CloseWait, "closed in order, not reset");
    world.clients[client].half_close = true;
    assert!(world.run(MINUTE, |world| world.state(client) == State::Closed));
    world.run(Duration::from_secs(2), |_| false);
    assert_eq!(world.machine.poll_timeout(), None);
    assert!(kv::scan(&mut world.disk).unwrap().is_empty());
}
