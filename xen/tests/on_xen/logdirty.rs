//! The dirty log: on, read, off, and left on by somebody who died.

use crate::{Guest, guest};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, ptr, thread};
use xen::{DomId, Error, Interface, LogDirty};

/// Enables the log behind our own code's back, as another program would: Ok if it was off.
fn enable_raw(d: DomId) -> bool {
    shadow(d, xenctrl_sys::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
}

fn disable_raw(d: DomId) -> bool {
    shadow(d, xenctrl_sys::XEN_DOMCTL_SHADOW_OP_OFF)
}

fn shadow(d: DomId, op: u32) -> bool {
    // SAFETY: a handle of its own, closed at the end; the operation takes no memory.
    unsafe {
        let xch = xenctrl_sys::xc_interface_open(ptr::null_mut(), ptr::null_mut(), 0);
        assert!(!xch.is_null());
        let rc = xenctrl_sys::xc_shadow_control(xch, d.0.into(), op, ptr::null_mut(), 0);
        xenctrl_sys::xc_interface_close(xch);
        rc == 0
    }
}

fn bitmap(g: &Guest) -> Vec<u64> {
    vec![0; g.x.nr_gpfns(g.d).expect("frames").div_ceil(64) as usize]
}

#[test]
fn written_pages_are_logged_until_read() {
    let Some(g) = guest("written_pages_are_logged_until_read") else { return };
    let mut log = LogDirty::enable(&g.x, g.d).expect("enable");
    thread::sleep(Duration::from_millis(500));
    g.x.pause(g.d).expect("pause");
    let (mut peeked, mut again, mut cleaned, mut rest) = (bitmap(&g), bitmap(&g), bitmap(&g), bitmap(&g));
    let count = log.peek(&mut peeked).expect("peek");
    assert!(count > 0, "the guest wrote nothing in half a second");
    assert_eq!(log.peek(&mut again).expect("peek"), count);
    let begun = Instant::now();
    assert_eq!(log.clean(&mut cleaned).expect("clean"), count);
    let took = begun.elapsed();
    assert!(peeked == again && again == cleaned, "peek changes nothing");
    assert_eq!(cleaned.iter().map(|word| u64::from(word.count_ones())).sum::<u64>(), count);
    // The guest stands: what is reported a second time is what the hypervisor itself has mapped writable.
    let left = log.clean(&mut rest).expect("clean");
    assert!(left <= 16 && left < count, "{left} of {count} pages are still dirty");
    // Bits are added, never taken away.
    log.clean(&mut cleaned).expect("clean");
    assert!(cleaned == peeked || left > 0);
    let short = log.clean(&mut cleaned[..1]);
    assert!(matches!(short, Err(Error::NrGpfnsGrew { covered: 64, .. })), "{short:?}");
    g.x.unpause(g.d).expect("unpause");
    println!(
        "dirty log: {count} pages of {} frames in half a second, {left} stay; clean took {took:?}",
        log.nr_gpfns()
    );
}

#[test]
fn the_log_is_off_after_the_drop_and_a_stale_one_is_taken_over() {
    let Some(g) = guest("the_log_is_off_after_the_drop_and_a_stale_one_is_taken_over") else { return };
    drop(LogDirty::enable(&g.x, g.d).expect("enable"));
    assert!(enable_raw(g.d), "the log was left on by the drop");
    assert!(!enable_raw(g.d), "Xen enables a log that is on: this test proves nothing");
    // On, by somebody else's hand.
    let mut log = LogDirty::enable(&g.x, g.d).expect("take a stale log over");
    thread::sleep(Duration::from_millis(200));
    let mut into = bitmap(&g);
    assert!(log.clean(&mut into).expect("clean") > 0);
    drop(log);
    assert!(enable_raw(g.d) && disable_raw(g.d));
}

#[test]
fn a_process_that_drops_leaves_the_log_off_and_one_that_exits_leaves_it_on() {
    let Some(g) = guest("a_process_that_drops_leaves_the_log_off_and_one_that_exits_leaves_it_on") else { return };
    for (how, left_on) in [("drop", false), ("exit", true)] {
        let mut child = Command::new(env::current_exe().expect("self"));
        let status = child.args(["--exact", "logdirty::child"]).env("XEN_COLO_CHILD", how).status().expect("child");
        assert!(status.success(), "{how}: {status}");
        assert_eq!(enable_raw(g.d), !left_on, "{how}");
        assert!(disable_raw(g.d));
    }
}

/// Not a test of its own: what the child of the one above does.
#[test]
fn child() {
    let Ok(how) = env::var("XEN_COLO_CHILD") else { return };
    let g = guest("child").expect("the parent's environment");
    let log = LogDirty::enable(&g.x, g.d).expect("enable");
    if how == "exit" {
        std::process::exit(0);
    }
    drop(log);
}

#[test]
fn domains_that_cannot_be_logged_are_refused() {
    let Some(g) = guest("domains_that_cannot_be_logged_are_refused") else { return };
    let none = LogDirty::enable(&g.x, DomId(0x7000)).err().expect("there is no such domain");
    assert!(matches!(none, Error::NoSuchDomain(DomId(0x7000))), "{none}");
    let zero = LogDirty::enable(&g.x, DomId(0)).err().expect("not this one");
    println!("dirty log of dom0: {zero}");
    assert!(matches!(zero, Error::Os { .. }), "{zero}");
    let _: &Interface = &g.x;
}
