//! The comparator between a stock QEMU's filters, and our rewriter in front of a stock QEMU's comparator.
//!
//! ```text
//!            QEMU A                                   xl-colo compare                     QEMU B
//!  network ─ net ── mirror ─ hub ─ guest A                                 guest B ─ hub ── rewriter ── net
//!             ▲       └─────────────────────────────────────────────────────────────▶ redirector ┘
//!             │   redirector B ───────▶ primary_in ─┐                ┌─ secondary_in ◀── redirector
//!             └── redirector A ◀─────── outdev ─────┴── compares ────┘
//! ```
//!
//! The wiring is that of QEMU's `docs/colo-proxy.txt`. The machines have none: two socket netdevs on a hub, on one of
//! which this test is the guest. Both guests are played here, with sequence numbers of their own.

use crate::common::comparator::{Comparator, Peer};
use crate::common::frames::{Segment, arp, from_client, numbers, udp};
use crate::common::lab::PlayedGuest;
use crate::common::{LOOK, Listening, installed};
use bytes::BytesMut;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use xen_colo::clock::Instant;
use xen_colo::compare::rewriter::Forward;
use xen_colo::compare::{Rewriter, wire};

const CLIENT: ([u8; 4], u16) = ([10, 0, 0, 9], 40_000);
const CLIENT_ISN: u32 = 7_000;
const ISN_A: u32 = 0xffff_ff00;
const ISN_B: u32 = 5_000;
const SYN: u8 = 2;
const ACK: u8 = 0x10;

/// What a guest says.
fn says(seq: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    Segment { client: CLIENT, seq, ack: CLIENT_ISN + 1, flags, payload: payload.to_vec() }.frame(1)
}

/// What the client says.
fn client_says(seq: u32, ack: u32, flags: u8) -> Vec<u8> {
    from_client(CLIENT, seq, ack, flags)
}

/// A QEMU without a machine, and its two netdevs: the network's side and the guest's.
struct Qemu {
    _process: Listening,
    network: Peer,
    guest: Peer,
}

impl Qemu {
    /// The arguments add chardevs and filters of netdev `net`.
    fn start(dir: &Path, arguments: &[String]) -> Option<Self> {
        let program = installed("qemu-system-x86_64")?;
        let listeners = ["net", "guest"].map(|name| UnixListener::bind(dir.join(name)).unwrap());
        let mut command = Command::new(program);
        command.args(["-machine", "none", "-nodefaults", "-display", "none"]);
        for name in ["net", "guest"] {
            let at = dir.join(name);
            command
                .args(["-netdev", &format!("stream,id={name},server=off,addr.type=unix,addr.path={}", at.display())]);
            command.args(["-netdev", &format!("hubport,id=port-{name},hubid=0,netdev={name}")]);
        }
        command.args(arguments).arg("-qmp").arg(format!("unix:{},server=on,wait=off", dir.join("qmp").display()));
        command.stdout(Stdio::null()).stderr(std::fs::File::create(dir.join("stderr")).unwrap());
        let _process = Listening::start(&mut command, &dir.join("qmp"));
        let [network, guest] = listeners.map(|listener| Peer::new(listener.accept().unwrap().0));
        Some(Self { _process, network, guest })
    }
}

fn chardev(id: &str, path: &Path, server: bool) -> [String; 2] {
    let way = if server { ",server=on,wait=off" } else { "" };
    ["-chardev".into(), format!("socket,id={id},path={}{way}", path.display())]
}

fn object(text: &str) -> [String; 2] {
    ["-object".into(), text.into()]
}

#[test]
fn a_connection_goes_through_a_stock_qemu_s_filters_on_both_sides() {
    goes_through(&[], "");
}

#[test]
fn and_with_vnet_hdr_support_at_all_of_them() {
    goes_through(&["--vnet-hdr-support"], ",vnet_hdr_support=on");
}

fn goes_through(options: &[&str], vnet: &str) {
    let comparator = Comparator::ours(options);
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mirror = dirs[0].path().join("mirror");
    let primary = [
        chardev("mirror0", &mirror, true),
        chardev("pri", &comparator.path("primary-in"), false),
        chardev("out", &comparator.path("outdev"), false),
        object(&format!("filter-mirror,id=m1,netdev=net,queue=tx,outdev=mirror0{vnet}")),
        object(&format!("filter-redirector,id=r1,netdev=net,queue=rx,indev=out{vnet}")),
        object(&format!("filter-redirector,id=r2,netdev=net,queue=rx,outdev=pri{vnet}")),
    ];
    let Some(mut a) = Qemu::start(dirs[0].path(), &primary.concat()) else { return };
    let secondary = [
        chardev("red0", &mirror, false),
        chardev("red1", &comparator.path("secondary-in"), false),
        object(&format!("filter-redirector,id=f1,netdev=net,queue=tx,indev=red0{vnet}")),
        object(&format!("filter-redirector,id=f2,netdev=net,queue=rx,outdev=red1{vnet}")),
        object(&format!("filter-rewriter,id=rew0,netdev=net,queue=all{vnet}")),
    ];
    let Some(mut b) = Qemu::start(dirs[1].path(), &secondary.concat()) else { return };
    let mut notify = comparator.connect("notify-dev");
    notify.send(b"COLO_USERSPACE_PROXY_INIT");
    assert_eq!(notify.hear(), b"COLO_COMPARE_GET_XEN_INIT");

    // A mirror without a peer drops what it is to send: A takes B's connection in its own time.
    let mut probes = 0;
    while !b.guest.has_something() {
        probes += 1;
        a.network.send(&arp(probes));
        assert_eq!(a.guest.hear(), arp(probes));
        std::thread::sleep(LOOK);
    }
    while b.guest.hear() != arp(probes) {}
    // An address that both guests announce is known from then on.
    a.guest.send(&arp(u32::MAX));
    b.guest.send(&arp(u32::MAX));
    assert_eq!(a.network.hear(), arp(u32::MAX));

    // The handshake: each guest has a sequence space of its own.
    let syn = client_says(CLIENT_ISN, 0, SYN);
    a.network.send(&syn);
    assert_eq!((a.guest.hear(), b.guest.hear()), (syn.clone(), syn));
    a.guest.send(&says(ISN_A, SYN | ACK, b""));
    b.guest.send(&says(ISN_B, SYN | ACK, b""));
    assert_eq!(a.network.hear(), says(ISN_A, SYN | ACK, b""));
    let ack = client_says(CLIENT_ISN + 1, ISN_A + 1, ACK);
    a.network.send(&ack);
    assert_eq!(a.guest.hear(), ack);
    assert_eq!(numbers(&b.guest.hear()).1, ISN_B + 1, "rewritten for guest B");

    // Equal answers, cut differently, over the wrap of guest A's sequence numbers.
    let text: Vec<u8> = (0..3000_u32).map(|n| (n % 251) as u8).collect();
    let (mut at_a, mut at_b) = (0, 0);
    for len in [1000, 1000, 1000] {
        a.guest.send(&says((ISN_A + 1).wrapping_add(at_a), ACK, &text[at_a as usize..][..len]));
        at_a += len as u32;
    }
    for len in [700, 1400, 900] {
        b.guest.send(&says(ISN_B + 1 + at_b, ACK, &text[at_b as usize..][..len]));
        at_b += len as u32;
    }
    for n in 0..3_u32 {
        let seq = (ISN_A + 1).wrapping_add(n * 1000);
        assert_eq!(a.network.hear(), says(seq, ACK, &text[n as usize * 1000..][..1000]), "segment {n}");
    }

    // Unequal ones stay until the toolstack has made a checkpoint.
    let [seq_a, seq_b] = [(ISN_A + 1).wrapping_add(3000), ISN_B + 1 + 3000];
    a.guest.send(&says(seq_a, ACK, b"it is ten o'clock"));
    b.guest.send(&says(seq_b, ACK, b"it is six o'clock"));
    assert_eq!(notify.hear(), b"DO_CHECKPOINT");
    a.guest.send(&arp(0));
    assert_eq!(a.network.hear(), arp(0), "only what needs no comparing has left");
    notify.send(b"COLO_CHECKPOINT");
    assert_eq!(a.network.hear(), says(seq_a, ACK, b"it is ten o'clock"));
}

#[test]
fn our_rewriter_speaks_to_a_stock_qemu_s_comparator() {
    let Some(comparator) = Comparator::qemu("") else { return };
    let [mut primary, mut secondary, mut out, mut notify] = comparator.connect_all();
    let (mut rewriter, now) = (Rewriter::new(), Instant::ZERO);
    let mut send = |rewriter: &mut Rewriter, mut frame: Vec<u8>| {
        rewriter.from_guest(now, &mut frame);
        let mut framed = BytesMut::new();
        wire::encode(&frame, &mut framed).unwrap();
        secondary.say(&framed);
        frame
    };
    assert_eq!(rewriter.from_network(now, &mut client_says(CLIENT_ISN, 0, SYN)), Forward::Now);
    send(&mut rewriter, says(ISN_B, SYN | ACK, b""));
    primary.send(&says(ISN_A, SYN | ACK, b""));
    assert_eq!(out.hear(), says(ISN_A, SYN | ACK, b""));
    let mut ack = client_says(CLIENT_ISN + 1, ISN_A + 1, ACK);
    assert_eq!(rewriter.from_network(now, &mut ack), Forward::Now);
    assert_eq!(numbers(&ack).1, ISN_B + 1);
    for n in 0..20_u32 {
        let text = vec![n as u8; 1000];
        let equal = says((ISN_A + 1).wrapping_add(n * 1000), ACK, &text);
        primary.send(&equal);
        let sent = send(&mut rewriter, says(ISN_B + 1 + n * 1000, ACK, &text));
        assert_eq!(sent[38..42], equal[38..42], "in guest A's sequence space");
        assert_eq!(out.hear(), equal, "segment {n}");
    }
    primary.send(&says((ISN_A + 1).wrapping_add(20_000), ACK, b"it is ten o'clock"));
    send(&mut rewriter, says(ISN_B + 1 + 20_000, ACK, b"it is six o'clock"));
    assert_eq!(notify.hear(), b"DO_CHECKPOINT");
    notify.send(b"COLO_CHECKPOINT");
    assert_eq!(out.hear(), says((ISN_A + 1).wrapping_add(20_000), ACK, b"it is ten o'clock"));
}

/// A mirror and a redirector of QEMU's, whose netdev has no virtio-net headers, and `xl-colo filter` at the other guest.
#[test]
fn a_stock_qemu_s_mirror_and_redirector_are_the_filter_s_neighbours() {
    for (options, vnet) in [(&[][..], ""), (&["--vnet-hdr-support", "--vnet-hdr-len", "0"], ",vnet_hdr_support=on")] {
        let Some(mut b) = PlayedGuest::new(options) else { return };
        let dir = tempfile::tempdir().unwrap();
        let filters = [
            chardev("mirror0", &b.dir.path().join("to-guest"), false),
            chardev("red0", &b.dir.path().join("redirect"), false),
            object(&format!("filter-mirror,id=m1,netdev=net,queue=tx,outdev=mirror0{vnet}")),
            object(&format!("filter-redirector,id=r1,netdev=net,queue=rx,indev=red0{vnet}")),
        ];
        let Some(mut a) = Qemu::start(dir.path(), &filters.concat()) else { return };
        // QEMU takes its netdevs' connections in its own time, and what it has no peer for is lost.
        let mut probes = 0;
        while !a.guest.has_something() {
            probes += 1;
            a.network.send(&arp(probes));
            std::thread::sleep(LOOK);
        }
        while a.guest.hear() != arp(probes) {}
        while b.hears.hear() != arp(probes) {}
        for n in 0..50_usize {
            let payload: Vec<u8> = (0..n * 29).map(|at| (at + n) as u8).collect();
            let said = udp(7, CLIENT, n as u16, &payload);
            a.network.send(&said);
            assert_eq!((a.guest.hear(), b.hears.hear()), (said.clone(), said.clone()), "{vnet}: {n}");
            b.says.send(&said);
            assert_eq!(a.network.hear(), said, "{vnet}: {n}");
        }
        let status = b.status();
        assert_eq!((&status["from_guest"], &status["to_guest"]), (&50.into(), &(50 + probes).into()), "{status}");
    }
}
