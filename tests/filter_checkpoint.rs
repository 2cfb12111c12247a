//! `xl-colo filter` at a secondary hears of a checkpoint; client, guest, comparator and toolstack are played here.

use crate::common::frames::{Segment, arp, framed, from_client, numbers};
use crate::common::lab::PlayedGuest;
use crate::common::{LOOK, PATIENCE};
use rustix::process::Signal;
use std::time::Instant;

const CLIENT: ([u8; 4], u16) = ([10, 0, 0, 9], 40_000);
const CLIENT_ISN: u32 = 7_000;
const ISN_A: u32 = 0xffff_ff00;
const ISN_B: u32 = 5_000;
const SYN: u8 = 2;
const ACK: u8 = 0x10;
const SAID: &[u8] = b"twelve bytes";

fn says(seq: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    Segment { client: CLIENT, seq, ack: CLIENT_ISN + 1, flags, payload: payload.to_vec() }.frame(1)
}

fn until(guest: &PlayedGuest, what: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    let begun = Instant::now();
    loop {
        let status = guest.status();
        if what(&status) {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "{status}");
        std::thread::sleep(LOOK);
    }
}

#[test]
fn what_waits_for_the_comparator_at_a_checkpoint_is_dropped() {
    let Some(mut guest) = PlayedGuest::new(&["--rewriter", "--notify-dev", "unix:notify"]) else { return };
    let [_client, mut comparator, mut toolstack] = ["to-guest", "redirect", "notify"].map(|name| guest.connect(name));
    let long = |n: u32| says(n, ACK, &[7; 1400]);
    let mut said = 0;
    for next in [long(1_000_000), long(2_000_000)] {
        // A comparator that does not read, until the filter cannot write.
        let mut sent = 0;
        while guest.status()["waiting_bytes"]["redirect"].as_u64().unwrap() < 400_000 {
            (sent..sent + 50).for_each(|n| guest.says.send(&long(n)));
            (sent, said) = (sent + 50, said + 50);
            assert!(sent < 10_000, "{}", guest.status());
            // The guest stands still at a checkpoint: none of it is on its way to the filter.
            until(&guest, |status| status["from_guest"] == said);
        }
        // It reads some, so that the system takes some more of what waits.
        let mut heard = 0;
        while heard < 90 {
            assert_eq!(comparator.hear(), long(heard));
            heard += 1;
        }
        toolstack.say(&[framed(b"COLO_CHECKPOINT"), framed(b"COLO_USERSPACE_PROXY_INIT")].concat());
        let status = until(&guest, |status| status["degraded"] != serde_json::json!([]));
        assert!(status["waiting_bytes"]["redirect"].as_u64().unwrap() < 2000, "one that is written in part: {status}");
        if next == long(1_000_000) {
            while !toolstack.has_something() {
                if comparator.has_something() {
                    assert_eq!(comparator.hear(), long(heard));
                    heard += 1;
                } else {
                    std::thread::sleep(LOOK);
                }
            }
            assert!(heard > 0 && heard < sent, "{heard} of {sent} came");
        } else {
            // Who comes next gets none of it.
            drop(comparator);
            comparator = guest.connect("redirect");
        }
        assert_eq!(toolstack.hear(), b"COLO_COMPARE_GET_XEN_INIT");
        guest.says.send(&next);
        said += 1;
        assert_eq!(comparator.hear(), next);
    }
}

#[test]
fn a_checkpoint_is_over_when_the_comparator_has_all_that_was_said_before() {
    let Some(mut guest) = PlayedGuest::new(&["--rewriter", "--notify-dev", "unix:notify"]) else { return };
    let [_client, mut comparator, mut toolstack] = ["to-guest", "redirect", "notify"].map(|name| guest.connect(name));
    toolstack.send(b"COLO_USERSPACE_PROXY_INIT");
    assert_eq!(toolstack.hear(), b"COLO_COMPARE_GET_XEN_INIT");
    let said = |n: u32| says(ISN_B + n, ACK, SAID);
    (0..5).for_each(|n| guest.says.send(&said(n)));
    until(&guest, |status| status["redirected"] == 5 && status["waiting_bytes"]["redirect"] == 0);
    toolstack.say(&[framed(b"COLO_CHECKPOINT"), framed(b"COLO_USERSPACE_PROXY_INIT")].concat());
    until(&guest, |status| status["checkpoints"] == 1);
    let under_way = serde_json::json!(["redirect: what was said before a checkpoint is under way"]);
    assert_eq!(guest.status()["degraded"], under_way);
    // Guest B was let go too early: what it says waits.
    guest.says.send(&said(100));
    assert!(!toolstack.has_something(), "it lies where the comparator has not read it");
    assert_eq!((guest.status()["from_guest"].clone(), guest.status()["stale"].clone()), (5.into(), 0.into()));
    assert_eq!((0..5).map(|_| comparator.hear()).collect::<Vec<_>>(), (0..5).map(said).collect::<Vec<_>>());
    assert_eq!(toolstack.hear(), b"COLO_COMPARE_GET_XEN_INIT");
    assert_eq!(comparator.hear(), said(100));
    assert_eq!(guest.status()["degraded"], serde_json::json!([]));

    // A comparator that leaves takes what was under way with it, and the next one gets nothing of it.
    guest.says.send(&said(200));
    until(&guest, |status| status["redirected"] == 7);
    toolstack.say(&[framed(b"COLO_CHECKPOINT"), framed(b"COLO_USERSPACE_PROXY_INIT")].concat());
    until(&guest, |status| status["checkpoints"] == 2);
    assert!(!toolstack.has_something());
    drop(comparator);
    assert_eq!(toolstack.hear(), b"COLO_COMPARE_GET_XEN_INIT");
    let mut comparator = guest.connect("redirect");
    guest.says.send(&said(300));
    assert_eq!(comparator.hear(), said(300));
}

#[test]
fn the_rewriter_forgets_where_the_guest_becomes_the_other() {
    let Some(mut guest) = PlayedGuest::new(&["--rewriter", "--notify-dev", "unix:notify"]) else { return };
    let [mut client, mut comparator, mut toolstack] =
        ["to-guest", "redirect", "notify"].map(|name| guest.connect(name));
    client.send(&from_client(CLIENT, CLIENT_ISN, 0, SYN));
    assert_eq!(numbers(&guest.hears.hear()).0, CLIENT_ISN);
    guest.says.send(&says(ISN_B, SYN | ACK, b""));
    assert_eq!(numbers(&comparator.hear()).0, ISN_B);
    client.send(&from_client(CLIENT, CLIENT_ISN + 1, ISN_A + 1, ACK));
    assert_eq!(numbers(&guest.hears.hear()).1, ISN_B + 1);
    guest.says.send(&says(ISN_B + 1, ACK, SAID));
    assert_eq!(numbers(&comparator.hear()).0, ISN_A + 1, "in guest A's space");

    // What guest B has said lies in the kernel when the checkpoint is made.
    toolstack.send(b"COLO_USERSPACE_PROXY_INIT");
    assert_eq!(toolstack.hear(), b"COLO_COMPARE_GET_XEN_INIT");
    guest.signal(Signal::STOP);
    let before = guest.arrived();
    (0..10).for_each(|n| guest.says.send(&says(ISN_B + 13 + 12 * n, ACK, SAID)));
    let begun = Instant::now();
    while guest.arrived() < before + 10 {
        assert!(begun.elapsed() < PATIENCE, "the guest's frames do not arrive");
        std::thread::sleep(LOOK);
    }
    toolstack.say(&[framed(b"COLO_CHECKPOINT"), framed(b"COLO_USERSPACE_PROXY_INIT")].concat());
    guest.signal(Signal::CONT);
    assert_eq!(toolstack.hear(), b"COLO_COMPARE_GET_XEN_INIT");

    // Guest B is guest A, sequence space included.
    let next = says(ISN_A.wrapping_add(13), ACK, SAID);
    guest.says.send(&next);
    assert_eq!(comparator.hear(), next, "the first that is heard");
    let ack = from_client(CLIENT, CLIENT_ISN + 1, ISN_A.wrapping_add(25), ACK);
    client.send(&ack);
    assert_eq!(guest.hears.hear(), ack);
    let status = guest.status();
    assert_eq!((&status["checkpoints"], &status["stale"]), (&1.into(), &10.into()), "{status}");
    assert_eq!((&status["rewritten_flows"], &status["degraded"]), (&0.into(), &serde_json::json!([])), "{status}");

    // A toolstack that leaves, in the middle of a word, is followed by the next.
    toolstack.say(&framed(b"COLO_CHECKPOINT")[..9]);
    drop(toolstack);
    guest.says.send(&arp(1));
    assert_eq!(comparator.hear(), arp(1));
    let mut toolstack = guest.connect("notify");
    toolstack.say(&[framed(b"COLO_CHECKPOINT"), framed(b"x"), framed(b"COLO_USERSPACE_PROXY_INIT")].concat());
    assert_eq!(toolstack.hear(), b"COLO_COMPARE_GET_XEN_INIT");
}
