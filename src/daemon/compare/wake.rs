//! What other threads have to tell the one that works: come and look.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// A descriptor that becomes readable, and the orders of whoever woke.
#[derive(Debug)]
pub(in crate::daemon) struct Wake {
    event: OwnedFd,
    woken: AtomicBool,
    /// Let everything go and end.
    pub(in crate::daemon) end: AtomicBool,
    /// Go on without the other guest.
    pub(in crate::daemon) alone: AtomicBool,
    /// Say how it stands.
    pub(in crate::daemon) report: AtomicBool,
}

impl Wake {
    pub(in crate::daemon) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let [woken, end, alone, report] = [false; 4].map(AtomicBool::new);
        Ok(Self { event, woken, end, alone, report })
    }

    /// Call it when all is in place that is to be seen.
    pub(in crate::daemon) fn wake(&self) {
        // Full means readable, which is all that is wanted.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        // Behind the write: whoever sees this empties the descriptor, and would leave a later write there for good.
        self.woken.store(true, Ordering::Release);
    }

    /// Whether somebody woke since the last time.
    pub(in crate::daemon) fn take(&self) -> bool {
        // Looked at in every turn: the descriptor is only touched when there is something.
        if !self.woken.load(Ordering::Relaxed) {
            return false;
        }
        self.woken.swap(false, Ordering::AcqRel);
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        true
    }

    pub(in crate::daemon) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
