//! Kernel TCP on both ends of our devices: `xl-colo filter` and `xl-colo compare` between a client and two guests that are
//! network namespaces.
//!
//! Each guest's kernel draws its own sequence numbers, cuts its own segments and delays its own ACKs. None of that is a
//! difference. A loss that the kernel has counted is one: the guest that it happened to is no longer like the other.

use crate::common::comparator::Peer;
use crate::common::lab::{GUEST_V4, GUEST_V6, Lab};
use crate::common::{installed, pattern};
use std::time::Duration;

const FILE_BYTES: usize = 4 << 20;

/// Labs that a run may need: a guest that gets no processor for as long as a frame may wait is apart from the other, and as
/// the checkpoint that is said to be made here copies nothing, two that have once been apart stay so.
const LABS_MAX: usize = 3;

/// Until it goes well, with a lab of its own each time.
fn in_one_of_a_few_labs(what: impl Fn() + std::panic::RefUnwindSafe) {
    let went_well = (1..=LABS_MAX).any(|lab| {
        let done = std::panic::catch_unwind(&what);
        eprintln!("lab {lab} of {LABS_MAX}: {}", if done.is_ok() { "in lock-step" } else { "apart" });
        done.is_ok()
    });
    assert!(went_well, "never in {LABS_MAX} labs");
}

/// Pings, and moves a file both ways, over both families.
fn moves_files(options: &[&str], upload_bytes: usize) {
    in_one_of_a_few_labs(|| moves_files_once(options, upload_bytes));
}

fn moves_files_once(options: &[&str], upload_bytes: usize) {
    let Some(mut lab) = Lab::new(options) else { return };
    let file = pattern(FILE_BYTES as u64);
    lab.serve([&file, &file]);
    let upload = lab.comparator.path("upload");
    std::fs::write(&upload, &file[..upload_bytes]).unwrap();
    for (address, url) in [(GUEST_V4, "http://10.99.0.2/file"), (GUEST_V6, "http://[fd99::2]/file")] {
        let said = String::from_utf8(lab.client(&["ping", "-c", "5", "-i", "0.2", "-W", "5", address])).unwrap();
        assert!(said.contains("5 received, 0% packet loss"), "{said}");
        assert!(lab.client(&["curl", "-gsS", "-m", "9", url]) == file, "{url}: another file");
        let sent = ["curl", "-gsS", "-m", "9", "-H", "Expect:", "-T", upload.to_str().unwrap(), url];
        assert!(lab.client(&sent) == file[..upload_bytes], "{url}: another file came back");
    }
    let (status, lost, a, b) = (lab.status("stdout"), lab.lost(), lab.status("ha"), lab.status("hb"));
    eprintln!("{options:?}: {lost} lost, {status}\n  A {a}\n  B {b}");
    assert!(status["compared"].as_u64().unwrap() > 100, "{status}");
    // All of A's went through the comparator, and all of the network's to both.
    assert!(a["redirected"] == a["from_guest"] && a["mirrored"] == a["to_guest"], "{a}");
    assert_eq!(b["rewritten_flows"], 4, "{b}");
    // Nobody says here that a checkpoint was made, so all that has left was compared.
    assert!(status["diverged"] == 0 && status["released"] == status["compared"], "{status}");
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
fn a_guest_that_had_no_room_for_what_the_other_took_is_sent_it_again() {
    in_one_of_a_few_labs(|| {
        let Some(mut lab) = Lab::new(&["--vnet-hdr-support"]) else { return };
        let file = pattern(FILE_BYTES as u64);
        // The client sees guest A's window only. What is beyond guest B's is lost there, until the client's timer has run out
        // twice, and guest A's ACK of it is no answer that may leave.
        lab.serve_late([&file, &file], Duration::from_millis(450));
        let upload = lab.comparator.path("upload");
        std::fs::write(&upload, &file).unwrap();
        let url = format!("http://{GUEST_V4}/file");
        let sent = ["curl", "-gsS", "-m", "9", "-H", "Expect:", "-T", upload.to_str().unwrap(), &url];
        assert!(lab.client(&sent) == file, "another file came back");
        let status = lab.status("stdout");
        eprintln!("{status}");
        assert!(status["acknowledged"].as_u64().unwrap() > 0, "guest B lost nothing: {status}");
        assert!(status["diverged"] == 0 && status["released"] == status["compared"], "{status}");
    });
}

#[test]
fn iperf3_moves_all_it_was_told_to() {
    if installed("iperf3").is_none() {
        return;
    }
    [GUEST_V4, GUEST_V6].into_iter().for_each(|address| in_one_of_a_few_labs(|| iperf3(address)));
}

/// Towards the guests only. What two servers send is no output of one machine: after a write that was cut short they
/// begin their block anew, and when that happens is the kernel's affair. The comparator finds that at once.
fn iperf3(address: &str) {
    let Some(mut lab) = Lab::new(&["--vnet-hdr-support"]) else { return };
    // At its end the servers tell the client how much processor time each has used: that differs, and costs a checkpoint.
    lab.answer_checkpoints();
    for guest in ["ga", "gb"] {
        lab.service(guest, 5201, &["iperf3", "-s", "-1"]);
    }
    let words = ["iperf3", "-c", address, "-n", "8M", "-J"];
    let report: serde_json::Value = serde_json::from_slice(&lab.client(&words)).unwrap();
    let end = &report["end"]["sum_sent"];
    assert!(end["bytes"].as_u64().unwrap() >= 8 << 20, "{report}");
    let status = lab.status("stdout");
    eprintln!("{words:?}: {} bit/s; {status}", end["bits_per_second"]);
    assert!(status["compared"].as_u64().unwrap() > 50, "released by checkpoints only: {status}");
    assert!(status["checkpoints"].as_u64().unwrap() <= 3, "more than its end costs: {status}");
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
        let wanted = status["wanted"].as_str().unwrap_or_default();
        assert!(wanted.starts_with("tcp 10.99.0.2 80 > ") && wanted.ends_with(": outputs differ"), "{status}");
        let read = || std::fs::read(&got).unwrap_or_default();
        let seen = read();
        assert!(seen.len() <= AT && seen == file[..seen.len()], "{} bytes have left: {status}", seen.len());
        eprintln!("{options:?}: {} bytes have left, and not the one at {AT}", seen.len());
        notify.send(b"COLO_CHECKPOINT");
        lab.until("the byte leaves with the checkpoint", |_| read().len() > AT);
        assert!(read()[..AT + 1] == file[..AT + 1]);
    }
}

#[test]
fn a_stock_qemu_compares_our_frames_by_their_headers() {
    in_one_of_a_few_labs(a_stock_qemu_compares_once);
}

fn a_stock_qemu_compares_once() {
    let Some(mut lab) = Lab::with_qemu() else { return };
    // Nobody answers here, so what has left QEMU has found equal, from behind the header to the end.
    let said = String::from_utf8(lab.client(&["ping", "-c", "5", "-i", "0.2", "-W", "5", GUEST_V4])).unwrap();
    assert!(said.contains("5 received, 0% packet loss"), "{said}");
    lab.serve([b"mine", b"his_"]);
    let mut notify = Peer::connect(&lab.comparator.path("notify-dev"));
    let got = lab.comparator.path("got");
    lab.start(&["curl", "-sS", "-N", "-o", got.to_str().unwrap(), "http://10.99.0.2/file"]);
    assert_eq!(notify.hear(), b"DO_CHECKPOINT");
    assert_eq!(std::fs::read(&got).unwrap_or_default(), b"", "the secondary's file differs");
    lab.answer_at(notify, true);
    lab.until("it leaves with a checkpoint", |_| std::fs::read(&got).is_ok_and(|got| got == b"mine"));
    // Uncut segments of a real kernel's, with sums that are not finished, in both directions.
    let file = pattern(FILE_BYTES as u64);
    let upload = lab.comparator.path("upload");
    std::fs::write(&upload, &file).unwrap();
    let sent = ["curl", "-gsS", "-m", "20", "-H", "Expect:", "-T", upload.to_str().unwrap(), "http://10.99.0.2/file"];
    assert!(lab.client(&sent) == file, "another file came back");
    let (a, b) = (lab.status("ha"), lab.status("hb"));
    assert!(a["redirected"] == a["from_guest"] && a["mirrored"] == a["to_guest"], "{a}");
    assert!(b["redirected"].as_u64().unwrap() > 100, "{b}");
}

#[test]
fn a_guest_without_its_comparator_says_nothing_until_it_is_told_to_go_alone() {
    let Some(mut lab) = Lab::new(&[]) else { return };
    let ping = ["ping", "-c", "3", "-i", "0.2", "-W", "1", GUEST_V4];
    lab.client(&ping);
    lab.comparator.process.0.kill().unwrap();
    let nobody = serde_json::json!(["redirect: nobody is connected", "to_network: nobody is connected"]);
    // The port of what leaves is read, and the other's end is noticed where it is written to.
    lab.until("the primary's filter says so", |lab| lab.status("ha")["degraded"] == nobody);
    let sent = lab.status("ha")["to_network"].clone();
    assert!(!lab.run("c", &ping).status.success(), "a reply that nobody has compared");
    let status = lab.status("ha");
    assert_eq!(status["to_network"], sent, "{status}");
    assert!(status["waiting_bytes"]["redirect"].as_u64().unwrap() >= 3 * 98, "{status}");
    lab.go_alone("ha");
    lab.client(&ping);
    let status = lab.status("ha");
    assert_eq!(status["degraded"], serde_json::json!(["alone: nothing is compared"]), "{status}");
}
