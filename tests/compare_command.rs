//! `xl-colo compare` as its neighbours meet it: filters, a toolstack, and an operator.
//!
//! Nothing here is said to be absent because it did not come in time. ARP of an address that both guests have announced
//! passes at once, so an ARP frame behind others marks that they were read and what left before it; an instruction on
//! notify_dev is answered behind what was said before.

use crate::common::comparator::{Comparator, Peer};
use crate::common::frames::{Segment, arp, framed, framed_vnet, numbers, ping, udp};
use crate::common::{LOOK, PATIENCE, one_line, xl_colo};
use std::io::Write;
use std::os::unix::net::UnixListener;

const INIT: &[u8] = b"COLO_USERSPACE_PROXY_INIT";
const INITIALISED: &[u8] = b"COLO_COMPARE_GET_XEN_INIT";
const DO_CHECKPOINT: &[u8] = b"DO_CHECKPOINT";
const CHECKPOINT: &[u8] = b"COLO_CHECKPOINT";
const CLIENT: ([u8; 4], u16) = ([10, 0, 0, 9], 5000);

/// A datagram with this payload.
fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    udp(port, CLIENT, 0, payload)
}

/// What the comparator says of itself.
fn status(comparator: &Comparator) -> serde_json::Value {
    let pid = rustix::process::Pid::from_child(&comparator.process.0);
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
    serde_json::from_str(comparator.says("stdout", "}\n").lines().last().unwrap()).unwrap()
}

/// Both guests announce their address; from then on ARP passes at once.
fn introduce(primary: &mut Peer, secondary: &mut Peer, out: &mut Peer) {
    secondary.send(&arp(u32::MAX));
    primary.send(&arp(u32::MAX));
    assert_eq!(out.hear(), arp(u32::MAX));
}

/// The four peers of a comparator.
struct Peers {
    primary: Peer,
    secondary: Peer,
    out: Peer,
    notify: Peer,
}

impl Peers {
    fn of(comparator: &Comparator) -> Self {
        let mut peers = Self::connect(comparator);
        introduce(&mut peers.primary, &mut peers.secondary, &mut peers.out);
        peers
    }

    fn connect(comparator: &Comparator) -> Self {
        let [primary, secondary, out, notify] =
            ["primary-in", "secondary-in", "outdev", "notify-dev"].map(|port| comparator.connect(port));
        Self { primary, secondary, out, notify }
    }

    /// As libxl begins.
    fn init(&mut self) {
        self.notify.send(INIT);
        assert_eq!(self.notify.hear(), INITIALISED);
    }

    /// What has left by now, behind which an ARP frame leaves.
    fn left(&mut self, number: u32) -> Vec<Vec<u8>> {
        self.primary.send(&arp(number));
        let mut left = Vec::new();
        loop {
            let frame = self.out.hear();
            if frame == arp(number) {
                return left;
            }
            left.push(frame);
        }
    }
}

#[test]
fn a_frame_leaves_when_both_guests_sent_it() {
    let mut comparator = Comparator::ours(&[]);
    let mut peers = Peers::of(&comparator);
    for n in 0..50_u16 {
        let frame = datagram(n, &[n as u8; 100]);
        peers.primary.send(&frame);
        assert_eq!(peers.left(u32::from(n)), Vec::<Vec<u8>>::new(), "not before the secondary says so");
        peers.secondary.send(&udp(n, CLIENT, 77, &[n as u8; 100]));
        assert_eq!(peers.out.hear(), frame);
    }
    assert_eq!(comparator.end(), Some(0));
    assert!(!comparator.path("outdev").exists(), "its sockets are removed");
    assert_eq!(comparator.said("stderr"), "");
}

#[test]
fn a_toolstack_is_asked_once_and_its_checkpoint_lets_go() {
    let comparator = Comparator::ours(&[]);
    let mut peers = Peers::of(&comparator);
    peers.init();
    for round in 0..5_u8 {
        // Many differences, one request.
        for port in 0..20 {
            peers.primary.send(&datagram(port, &[round; 40]));
            peers.secondary.send(&datagram(port, &[round + 100; 40]));
        }
        assert_eq!(peers.notify.hear(), DO_CHECKPOINT);
        assert_eq!(peers.left(u32::from(round)), Vec::<Vec<u8>>::new());
        // A frame of a secondary that no longer is, still on its way when the checkpoint is made.
        peers.secondary.send(&datagram(99, &[round; 40]));
        peers.notify.send(CHECKPOINT);
        let mut left: Vec<_> = (0..20).map(|_| peers.out.hear()).collect();
        left.sort();
        let mut sent: Vec<_> = (0..20).map(|port| datagram(port, &[round; 40])).collect();
        sent.sort();
        assert_eq!(left, sent, "what the primary sent, all of it, once");
        // It explains nothing of the new state.
        peers.primary.send(&datagram(99, &[round; 40]));
        assert_eq!(peers.left(u32::from(round) + 100), Vec::<Vec<u8>>::new());
        peers.init();
        peers.notify.send(CHECKPOINT);
        assert_eq!(peers.out.hear(), datagram(99, &[round; 40]));
    }
    // Unsupported instructions change nothing, nor does the second word that QEMU would want with vnet_hdr_support.
    peers.notify.send(b"COLO_FAILOVER");
    peers.notify.say(&[&25_u32.to_be_bytes()[..], &[0; 4], INIT].concat());
    assert_eq!(peers.notify.hear(), INITIALISED);
    comparator.says("stderr", "COLO compare got unsupported instruction");
}

#[test]
fn a_request_waits_for_a_toolstack_that_comes_later() {
    let comparator = Comparator::ours(&[]);
    let [mut primary, mut secondary] = ["primary-in", "secondary-in"].map(|port| comparator.connect(port));
    primary.send(&datagram(1, b"one thing"));
    secondary.send(&datagram(1, b"another thing"));
    comparator.says("stderr", "nobody at notify_dev");
    let status = status(&comparator);
    let [flow] = &status["diverging"].as_array().unwrap()[..] else { panic!("{status}") };
    assert_eq!(
        (&flow["flow"], &flow["last_cause"]),
        (&"udp 10.0.0.2 1 > 10.0.0.9 5000".into(), &"outputs differ".into())
    );
    assert_eq!((&flow["diverged"], &flow["held"], &flow["keeps_diverging"]), (&1.into(), &1.into(), &false.into()));
    for _ in 0..2 {
        // The first one leaves without having made the checkpoint.
        let mut notify = comparator.connect("notify-dev");
        notify.send(INIT);
        assert_eq!((notify.hear(), notify.hear()), (INITIALISED.to_vec(), DO_CHECKPOINT.to_vec()));
    }
    let mut notify = comparator.connect("notify-dev");
    notify.send(CHECKPOINT);
    notify.send(INIT);
    assert_eq!(notify.hear(), INITIALISED, "it is not asked for what it made");
    assert_eq!(comparator.connect("outdev").hear(), datagram(1, b"one thing"));
}

#[test]
fn an_old_frame_asks_for_a_checkpoint_when_its_time_is_over() {
    let comparator = Comparator::ours(&["--compare_timeout", "300"]);
    let mut peers = Peers::of(&comparator);
    peers.primary.send(&datagram(1, b"alone"));
    assert_eq!(peers.notify.hear(), DO_CHECKPOINT);
    peers.notify.send(CHECKPOINT);
    assert_eq!(peers.out.hear(), datagram(1, b"alone"));
}

#[test]
fn without_a_toolstack_what_differs_stays_and_is_said_once() {
    let mut comparator = Comparator::ours_with(&["primary-in", "secondary-in", "outdev"], &[]);
    let [mut primary, mut secondary, mut out] =
        ["primary-in", "secondary-in", "outdev"].map(|port| comparator.connect(port));
    introduce(&mut primary, &mut secondary, &mut out);
    for n in 0..10_u8 {
        primary.send(&datagram(u16::from(n), b"one thing"));
        secondary.send(&datagram(u16::from(n), b"another thing"));
    }
    let said = comparator.says("stderr", "outputs differ");
    primary.send(&arp(1));
    assert_eq!(out.hear(), arp(1), "nothing else has left");
    // As when QEMU's object is deleted.
    assert_eq!(comparator.end(), Some(0));
    let left: Vec<_> = (0..10).map(|_| out.hear()).collect();
    assert_eq!(left, (0..10).map(|n| datagram(n, b"one thing")).collect::<Vec<_>>());
    out.hears_the_end();
    assert_eq!(said, comparator.said("stderr"), "once");
    assert_eq!(said.matches("outputs differ").count(), 1);
}

#[test]
fn an_acknowledgement_of_what_both_have_is_made_with_a_header_and_without() {
    for header in [None, Some(0), Some(10), Some(12)] {
        let comparator = Comparator::ours(header.map_or(&[][..], |_| &["--vnet-hdr-support"]));
        let mut peers = Peers::connect(&comparator);
        peers.init();
        let ack = |ack: u32| Segment { client: CLIENT, seq: 9, ack, flags: 0x10, payload: Vec::new() }.frame(1);
        let wire = |byte: u8, frame: &[u8]| match header {
            None => framed(frame),
            Some(bytes) => framed_vnet(&vec![byte; bytes], frame),
        };
        peers.primary.say(&wire(7, &ack(100)));
        // Guest B is asked for the end of what the client sent, again and again, and has it not.
        let begun = std::time::Instant::now();
        while !peers.out.has_something() {
            assert!(begun.elapsed() < PATIENCE, "the client is told nothing");
            peers.secondary.say(&wire(5, &ack(60)));
            std::thread::sleep(LOOK);
        }
        let mut hear = || match header {
            None => (0, peers.out.hear()),
            Some(_) => peers.out.hear_vnet(),
        };
        let bytes = header.unwrap_or(0);
        let (length, made) = hear();
        assert_eq!((length, &made[..bytes]), (bytes, &vec![0; bytes][..]), "there is nothing to finish");
        assert_eq!(numbers(&made[bytes..]), (9, 60));
        peers.secondary.say(&wire(5, &ack(100)));
        assert_eq!(hear(), (bytes, [&vec![7; bytes][..], &ack(100)].concat()), "the guest's own, with its header");
    }
}

#[test]
fn virtio_net_headers_leave_with_their_frames() {
    let comparator = Comparator::ours(&["--vnet-hdr-support"]);
    let mut peers = Peers::connect(&comparator);
    peers.init();
    let announced = framed_vnet(&[1; 12], &arp(0));
    peers.secondary.say(&announced);
    peers.primary.say(&announced);
    assert_eq!(peers.out.hear_vnet(), (12, [&[1; 12][..], &arp(0)].concat()));
    let frames: Vec<_> = (0..200_u16).map(|n| datagram(n, &vec![n as u8; usize::from(n) * 300])).collect();
    for (n, frame) in frames.iter().enumerate() {
        peers.primary.say(&framed_vnet(&[n as u8; 12], frame));
    }
    // The secondary's headers are its own business.
    let mut secondary = peers.secondary.0.try_clone().unwrap();
    let others = frames.clone();
    let writer = std::thread::spawn(move || {
        for frame in others.iter().rev() {
            secondary.write_all(&framed_vnet(&[9; 10], frame)).unwrap();
        }
    });
    let mut left: Vec<_> = frames.iter().map(|_| peers.out.hear_vnet()).collect();
    writer.join().unwrap();
    left.sort();
    let mut sent: Vec<_> =
        frames.iter().enumerate().map(|(n, frame)| (12, [&[n as u8; 12][..], frame].concat())).collect();
    sent.sort();
    assert!(left == sent, "each with its own header");
    // A peer that has it off is found out, hung up on, and the next is taken.
    peers.primary.send(&datagram(1, b"a frame without a header"));
    peers.primary.hears_the_end();
    comparator.says("stderr", "is vnet_hdr_support on at both ends?");
    let mut primary = comparator.connect("primary-in");
    primary.say(&framed_vnet(&[1; 12], &arp(1)));
    assert_eq!(peers.out.hear_vnet(), (12, [&[1; 12][..], &arp(1)].concat()));
}

#[test]
fn an_oversized_frame_ends_the_connection_and_not_the_port() {
    let comparator = Comparator::ours(&[]);
    for (port, reason) in [
        ("primary-in", "a frame of 69633 bytes is above the limit"),
        ("secondary-in", "a frame of 69633 bytes is above the limit"),
        ("notify-dev", "an instruction of 69633 bytes is above the limit"),
    ] {
        let mut peer = comparator.connect(port);
        peer.say(&69_633_u32.to_be_bytes());
        peer.hears_the_end();
        comparator.says("stderr", reason);
    }
    let mut peers = Peers::of(&comparator);
    peers.init();
    peers.primary.send(&datagram(1, &[1; 60_000]));
    peers.secondary.send(&datagram(1, &[1; 60_000]));
    assert_eq!(peers.out.hear(), datagram(1, &[1; 60_000]));
    // One that leaves inside a frame takes nobody with it.
    peers.primary.say(&framed(&datagram(2, &[2; 500]))[..100]);
    drop(peers.primary);
    comparator.says("stderr", "the peer left inside a frame (100 bytes of it had come)");
    let mut primary = comparator.connect("primary-in");
    primary.send(&arp(3));
    assert_eq!(peers.out.hear(), arp(3));
}

#[test]
fn what_is_held_outlives_every_peer() {
    let comparator = Comparator::ours(&[]);
    let mut primary = comparator.connect("primary-in");
    let frames: Vec<_> = (0..30_u16).map(|n| datagram(n, &[n as u8; 200])).collect();
    frames[..10].iter().for_each(|frame| primary.send(frame));
    drop(primary);
    let mut primary = comparator.connect("primary-in");
    frames[10..20].iter().for_each(|frame| primary.send(frame));
    let mut secondary = comparator.connect("secondary-in");
    frames[..5].iter().for_each(|frame| secondary.send(frame));
    drop(secondary);
    let mut secondary = comparator.connect("secondary-in");
    frames[5..].iter().for_each(|frame| secondary.send(frame));
    // Nobody was at outdev until here.
    let mut out = comparator.connect("outdev");
    let mut left: Vec<_> = (0..20).map(|_| out.hear()).collect();
    drop(out);
    comparator.says("stderr", "outdev: closed");
    frames[20..].iter().for_each(|frame| primary.send(frame));
    let mut out = comparator.connect("outdev");
    left.extend((0..10).map(|_| out.hear()));
    left.sort();
    let mut sent = frames.clone();
    sent.sort();
    assert!(left == sent, "each frame left once");
}

#[test]
fn a_slow_outdev_holds_the_primary_back_and_loses_nothing() {
    const FRAMES: u32 = 20_000;
    let comparator = Comparator::ours(&[]);
    let mut peers = Peers::of(&comparator);
    let frame = |n: u32| {
        let mut frame = arp(n);
        frame.resize(1400, n as u8);
        frame
    };
    // 28 MB, more than all that is between the two may hold.
    peers.primary.0.set_nonblocking(true).unwrap();
    let wire: Vec<u8> = (0..FRAMES).flat_map(|n| framed(&frame(n))).collect();
    let mut written = 0;
    // Each answer is another turn of its loop, in which it would have read what it may.
    let mut turns_in_vain = 0;
    while turns_in_vain < 20 {
        match peers.primary.0.write(&wire[written..]) {
            Ok(bytes) => (written, turns_in_vain) = (written + bytes, 0),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                peers.init();
                turns_in_vain += 1;
            }
        }
    }
    assert!(written < 6 << 20, "{written} bytes were taken, of which none could leave");
    let mut primary = peers.primary.0.try_clone().unwrap();
    primary.set_nonblocking(false).unwrap();
    let rest = wire[written..].to_vec();
    let writer = std::thread::spawn(move || primary.write_all(&rest).unwrap());
    for n in 0..FRAMES {
        assert!(peers.out.hear() == frame(n), "frame {n}");
    }
    writer.join().unwrap();
}

#[test]
fn a_second_peer_waits_for_its_turn() {
    let comparator = Comparator::ours(&[]);
    let mut first = comparator.connect("notify-dev");
    first.send(INIT);
    assert_eq!(first.hear(), INITIALISED);
    let mut second = comparator.connect("notify-dev");
    second.send(INIT);
    first.send(INIT);
    assert_eq!(first.hear(), INITIALISED);
    drop(first);
    assert_eq!(second.hear(), INITIALISED);
}

#[test]
fn ports_that_connect_do_so_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let ports: Vec<String> = ["primary-in", "secondary-in", "outdev"]
        .iter()
        .flat_map(|port| [format!("--{port}"), format!("unix:{},server=off", at(port).display())])
        .collect();
    let words: Vec<&str> = ports.iter().map(String::as_str).collect();
    let comparator = Comparator::ours_with(&["notify-dev"], &words);
    comparator.says("stderr", "nobody is there; trying again");
    for round in 0..2 {
        let mut peers = ["primary-in", "secondary-in", "outdev"].map(|port| {
            let listener = UnixListener::bind(at(port)).unwrap();
            let peer = Peer::new(listener.accept().unwrap().0);
            std::fs::remove_file(at(port)).unwrap();
            peer
        });
        peers[0].send(&datagram(round, b"both"));
        peers[1].send(&datagram(round, b"both"));
        assert_eq!(peers[2].hear(), datagram(round, b"both"));
    }
}

#[test]
fn a_tcp_port_says_where_it_is() {
    let mut comparator =
        Comparator::ours_with(&["secondary-in", "outdev", "notify-dev"], &["--primary-in", "tcp:127.0.0.1:0"]);
    let said = comparator.says("stdout", "\n");
    let at = said.split_whitespace().find_map(|word| word.strip_prefix("tcp:")).unwrap().to_owned();
    let mut primary = std::net::TcpStream::connect(at).unwrap();
    primary.write_all(&framed(&ping([10, 0, 0, 9], 1, 1, 1, &[7; 56]))).unwrap();
    comparator.connect("secondary-in").send(&ping([10, 0, 0, 9], 1, 1, 2, &[7; 56]));
    assert_eq!(comparator.connect("outdev").hear(), ping([10, 0, 0, 9], 1, 1, 1, &[7; 56]));
    // How it stands, for whoever asks.
    let status = status(&comparator);
    assert_eq!(
        (&status["compared"], &status["released"], &status["currently_held"]),
        (&1.into(), &1.into(), &0.into())
    );
    assert_eq!(status["connected"]["notify_dev"], false);
    assert_eq!(comparator.end(), Some(0));
}

#[test]
fn frames_that_nobody_took_are_not_lost_in_silence() {
    let mut comparator = Comparator::ours(&[]);
    let mut primary = comparator.connect("primary-in");
    primary.send(&datagram(1, b"held"));
    primary.0.shutdown(std::net::Shutdown::Write).unwrap();
    primary.hears_the_end();
    assert_eq!(comparator.end(), Some(1));
    let said = comparator.says("stderr", "are lost: outdev did not take them");
    assert!(said.contains(&format!("{} bytes", datagram(1, b"held").len() + 4)), "{said}");
}

#[tokio::test]
async fn wrong_arguments_are_refused_in_qemu_s_words() {
    let all = ["--primary-in", "unix:/p", "--secondary-in", "unix:/s", "--outdev", "unix:/o"];
    let refused = async |more: &[&str]| {
        let words = [&["compare"][..], &all, more].concat();
        one_line(&xl_colo(&words).await, 2)
    };
    let missing = one_line(&xl_colo(&["compare", "--primary-in", "unix:/p", "--outdev", "unix:/o"]).await, 2);
    assert!(missing.contains("colo compare needs 'primary_in' ,'secondary_in','outdev' property set"), "{missing}");
    let same = one_line(
        &xl_colo(&["compare", "--primary-in", "unix:/p", "--secondary-in", "unix:/s", "--outdev", "unix:/p"]).await,
        2,
    );
    assert!(same.contains("'indev' and 'outdev' could not be same for compare module"), "{same}");
    for property in ["compare_timeout", "expired_scan_cycle", "max_queue_size"] {
        let said = refused(&[&format!("--{property}"), "0"]).await;
        assert!(said.contains(&format!("Property 'colo-compare.{property}' requires a positive value")), "{said}");
        let output = xl_colo(&[&["compare"][..], &all, &[&format!("--{property}"), "-1"]].concat()).await;
        assert_eq!(output.status.code(), Some(2));
    }
    let output = xl_colo(&[&["compare"][..], &all, &["--notify-dev", "unix:/n,wait=off"]].concat()).await;
    assert_eq!(output.status.code(), Some(2));
    let taken = tempfile::tempdir().unwrap();
    let path = taken.path().join("p");
    let _listener = UnixListener::bind(&path).unwrap();
    let at = format!("unix:{}", path.display());
    let words = ["compare", "--primary-in", &at, "--secondary-in", "unix:/s", "--outdev", "unix:/o"];
    let said = one_line(&xl_colo(&words).await, 4);
    assert!(said.contains("primary_in") && said.contains("another process serves this socket"), "{said}");
    assert!(path.exists());
}
