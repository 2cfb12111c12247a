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

    // A toolstack that leaves is followed by the next.
    drop(toolstack);
    guest.says.send(&arp(1));
    assert_eq!(comparator.hear(), arp(1));
    let mut toolstack = guest.connect("notify");
    toolstack.say(&[framed(b"COLO_CHECKPOINT"), framed(b"x"), framed(b"COLO_USERSPACE_PROXY_INIT")].concat());
    assert_eq!(toolstack.hear(), b"COLO_COMPARE_GET_XEN_INIT");
}
