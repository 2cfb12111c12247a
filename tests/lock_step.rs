//! Kernel TCP on both ends of our devices: `xl-colo filter` and `xl-colo compare` between a client and two guests that are
//! network namespaces.
//!
//! Each guest's kernel draws its own sequence numbers, cuts its own segments and delays its own ACKs. None of that is a
//! difference. A loss that the kernel has counted is one: the guest that it happened to is no longer like the other.

use crate::common::comparator::Peer;
use crate::common::lab::{GUEST_V4, GUEST_V6, Lab};
use crate::common::{installed, pattern};

const FILE_BYTES: usize = 4 << 20;

/// Pings, and moves a file both ways, over both families.
fn moves_files(options: &[&str], upload_bytes: usize) {
    let Some(mut lab) = Lab::new(options) else { return };
    lab.answer_checkpoints();
    let file = pattern(FILE_BYTES as u64);
    lab.serve([&file, &file]);
    let upload = lab.comparator.path("upload");
    std::fs::write(&upload, &file[..upload_bytes]).unwrap();
    for (address, url) in [(GUEST_V4, "http://10.99.0.2/file"), (GUEST_V6, "http://[fd99::2]/file")] {
        let said = String::from_utf8(lab.client(&["ping", "-c", "5", "-i", "0.2", "-W", "5", address])).unwrap();
        assert!(said.contains("5 received, 0% packet loss"), "{said}");
        assert!(lab.client(&["curl", "-gsS", url]) == file, "{url}: another file");
        let sent = ["curl", "-gsS", "-H", "Expect:", "-T", upload.to_str().unwrap(), url];
        assert!(lab.client(&sent) == file[..upload_bytes], "{url}: another file came back");
    }
    let (status, lost, a, b) = (lab.status("stdout"), lab.lost(), lab.status("ha"), lab.status("hb"));
    eprintln!("{options:?}: {status}\n  A {a}\n  B {b}");
    assert!(status["compared"].as_u64().unwrap() > 100, "{status}");
    // All of A's went through the comparator, and all of the network's to both.
    assert!(a["redirected"] == a["from_guest"] && a["mirrored"] == a["to_guest"], "{a}");
    assert_eq!(b["rewritten_flows"], 4, "{b}");
    assert!(lost > 0 || status["checkpoints"] == 0, "a checkpoint, and nothing was lost: {status}");
}

#[test]
fn real_kernels_are_in_lock_step() {
    // Fewer frames than a kernel's backlog has room for: what is cut here comes in bursts.
    moves_files(&[], 512 << 10);
}

#[test]
fn real_kernels_are_in_lock_step_with_unfinished_segments() {
    moves_files(&["--vnet-hdr-support"], FILE_BYTES);
}

#[test]
fn real_kernels_are_in_lock_step_over_rings() {
    moves_files(&["--vnet-hdr-support", "--ring"], FILE_BYTES);
}

#[test]
fn iperf3_moves_all_it_was_told_to() {
    if installed("iperf3").is_none() {
        return;
    }
    let Some(mut lab) = Lab::new(&["--vnet-hdr-support"]) else { return };
    // At its end the servers tell the client how much processor time each has used: that differs, and costs a checkpoint.
    // After that nobody has made the second server what the first one is, so each run has a pair of its own.
    lab.answer_checkpoints();
    let runs = [(GUEST_V4, false), (GUEST_V4, true), (GUEST_V6, false), (GUEST_V6, true)];
    for (port, (address, reverse)) in (5201_u16..).zip(runs) {
        let number = port.to_string();
        for guest in ["ga", "gb"] {
            lab.service(guest, port, &["iperf3", "-s", "-1", "-p", &number]);
        }
        // Else the servers would send what each has drawn.
        let mut words = vec!["iperf3", "-c", address, "-p", &number, "-n", "8M", "--repeating-payload", "-J"];
        words.extend(reverse.then_some("-R"));
        let before = lab.status("stdout")["compared"].as_u64().unwrap();
        let report: serde_json::Value = serde_json::from_slice(&lab.client(&words)).unwrap();
        // -n is what the client counts: what it has sent, or received.
        let end = &report["end"][if reverse { "sum_received" } else { "sum_sent" }];
        assert!(end["bytes"].as_u64().unwrap() >= 8 << 20, "{report}");
        let status = lab.status("stdout");
        eprintln!("{words:?}: {} bit/s; {status}", end["bits_per_second"]);
        assert!(status["compared"].as_u64().unwrap() > before + 50, "released by checkpoints only: {status}");
    }
}

#[test]
fn one_byte_of_a_file_stays_until_a_checkpoint() {
    const AT: usize = 3 << 20;
    for options in [&[][..], &["--vnet-hdr-support"]] {
        let Some(mut lab) = Lab::new(options) else { return };
        let file = pattern(FILE_BYTES as u64);
        let mut other = file.clone();
        other[AT] ^= 1;
        lab.serve([&file, &other]);
        let mut notify = Peer::connect(&lab.comparator.path("notify-dev"));
        let got = lab.comparator.path("got");
        lab.start(&["curl", "-sS", "-N", "-o", got.to_str().unwrap(), "http://10.99.0.2/file"]);
        assert_eq!(notify.hear(), b"DO_CHECKPOINT", "the secondary's file differs");
        // What would leave has left when this is answered, and other flows go on.
        lab.client(&["ping", "-c", "3", "-i", "0.3", "-W", "5", GUEST_V4]);
        let status = lab.status("stdout");
        assert_eq!(status["wanted"], "outputs differ", "{status}");
        let read = || std::fs::read(&got).unwrap_or_default();
        let seen = read();
        assert!(seen.len() <= AT && seen == file[..seen.len()], "{} bytes have left: {status}", seen.len());
        eprintln!("{options:?}: {} bytes have left, and not the one at {AT}", seen.len());
        notify.send(b"COLO_CHECKPOINT");
        lab.until("the byte leaves with the checkpoint", |_| read().len() > AT);
        assert!(read()[..AT + 1] == file[..AT + 1]);
    }
}
