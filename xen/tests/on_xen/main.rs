//! Against a real hypervisor: to be run in dom0, beside a PVH guest that writes its memory and echoes TCP on port 7.
//!
//! `XEN_COLO_ON_XEN=name on_xen --test-threads=1 --nocapture`. Without that variable every test says SKIP and passes.
//! `XEN_COLO_GUEST_IP` adds the test of frames; `XEN_COLO_ROUNDS` is how often the guest is suspended (50).

mod frames;
mod logdirty;
mod memory;
mod state;
mod suspend;
mod toolstack;

use std::env;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use xen::{DomId, Interface, Store};

/// A gfn that nothing is behind, whatever the guest.
const HOLE: u64 = 0x90_0000;

/// The guest, and the right to be alone with it.
struct Guest {
    x: Interface,
    store: Store,
    d: DomId,
    name: String,
    _alone: MutexGuard<'static, ()>,
}

/// The guest that the environment names.
fn guest(test: &str) -> Option<Guest> {
    static ALONE: Mutex<()> = Mutex::new(());
    let Ok(name) = env::var("XEN_COLO_ON_XEN") else {
        println!("SKIP: {test}: XEN_COLO_ON_XEN names no guest");
        return None;
    };
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let x = Interface::open().expect("the hypervisor");
    let store = Store::open().expect("xenstore");
    let d = store.by_name(&name).expect("names").expect("the guest");
    Some(Guest { x, store, d, name, _alone: alone })
}

impl Guest {
    /// Runs `f` while the guest is paused.
    fn paused<T>(&self, f: impl FnOnce() -> T) -> T {
        struct Unpause<'a>(&'a Guest);
        impl Drop for Unpause<'_> {
            // A test that fails must not fail those that follow.
            fn drop(&mut self) {
                let _ = self.0.x.unpause(self.0.d);
            }
        }
        self.x.pause(self.d).expect("pause");
        let _unpause = Unpause(self);
        f()
    }

    fn info(&self) -> xen::DomainInfo {
        self.x.domain_info(self.d).expect("information").expect("the guest")
    }
}

/// Waits until it is so, or panics.
fn until(what: &str, limit: Duration, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !so() {
        assert!(Instant::now() < end, "not in {limit:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The middle one.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
