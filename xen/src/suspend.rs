//! "The guest has suspended", as an event.
//!
//! Xen tells the end of a suspend on a port of the guest's that the toolstack has subscribed to, and on the global
//! VIRQ_DOM_EXC if there is none. The port is meant to be published by the guest; Linux publishes none. But allocating a
//! port in the guest, binding it and subscribing it are all toolstack operations, so it works with any guest, in
//! microseconds, and without waking xenstored for every checkpoint (reference 2.5).
//!
//! ```text
//! alloc_unbound in the guest ─▶ bind here ─▶ eat the event that binding makes ─▶ subscribe ─▶ wait … ─▶ unsubscribe, unbind
//! ```
//!
//! Traps: binding itself raises one event. The event is a hint: whoever is woken asks [`crate::Interface::domain_info`].
//! While the subscription stands nobody else hears of a suspend. A guest's port can be closed by the guest alone: each
//! channel leaves one behind in it, of at least 1024, until its next reset, so make one for a protection and not one for
//! a checkpoint. A guest that resets its event channels (at kexec, soft reset) ends the channel's use; time-outs find it.

use crate::interface::check;
use crate::{DomId, Error, Interface};
use std::ffi::c_int;
use std::ptr;
use std::time::{Duration, Instant};
use xenctrl_sys as xc;

/// The domain that asks.
const DOMID_SELF: u32 = 0x7ff0;
/// Subscribing no port.
const NO_PORT: u32 = 0;
/// How long the event that binding makes may take.
const FIRST_EVENT: Duration = Duration::from_millis(100);

/// Hears of every suspend of one domain. Unsubscribes and unbinds when dropped.
pub struct SuspendChannel {
    interface: Interface,
    domain: DomId,
    handle: Handle,
    port: u32,
}

struct Handle(*mut libxl_sys::xenevtchn_handle);

// SAFETY: the handle is a file descriptor; xenevtchn.h forbids sharing one between threads that poll, and `wait` takes
// it mutably.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: opened by `SuspendChannel::new`. Closing unbinds every port of the handle.
        unsafe { libxl_sys::xenevtchn_close(self.0) };
    }
}

impl SuspendChannel {
    /// Makes the channel and subscribes it.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn new(x: &Interface, d: DomId) -> Result<Self, Error> {
        // SAFETY: a null logger is the default one.
        let handle = Handle(unsafe { libxl_sys::xenevtchn_open(ptr::null_mut(), 0) });
        if handle.0.is_null() {
            return Err(Error::last("open event channels", None));
        }
        // SAFETY: numbers are all it takes.
        let theirs = unsafe { xc::xc_evtchn_alloc_unbound(x.xch(), d.raw(), DOMID_SELF) };
        check(theirs, "allocate an event channel", d)?;
        // SAFETY: the handle is open.
        let port = unsafe { libxl_sys::xenevtchn_bind_interdomain(handle.0, d.raw(), theirs.cast_unsigned()) };
        check(port, "bind an event channel", d)?;
        let mut this = Self { interface: x.clone(), domain: d, handle, port: port.cast_unsigned() };
        this.wait(FIRST_EVENT)?;
        // SAFETY: numbers are all it takes.
        let rc = unsafe { xc::xc_domain_subscribe_for_suspend(x.xch(), d.raw(), theirs.cast_unsigned()) };
        check(rc, "subscribe to suspends", d)?;
        Ok(this)
    }

    /// Ends the subscription of whoever made one and is gone, so that others hear of suspends again.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn unsubscribe(x: &Interface, d: DomId) -> Result<(), Error> {
        // SAFETY: numbers are all it takes.
        let rc = unsafe { xc::xc_domain_subscribe_for_suspend(x.xch(), d.raw(), NO_PORT) };
        check(rc, "unsubscribe from suspends", d).map(drop)
    }

    /// Waits until the domain has suspended, or has since the last time, and takes all such events. False if none came
    /// in time.
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Error> {
        let end = Instant::now() + timeout;
        // SAFETY: the handle is open.
        let fd = unsafe { libxl_sys::xenevtchn_fd(self.handle.0) };
        check(fd, "wait for a suspend", self.domain)?;
        let mut seen = false;
        loop {
            // Once one came, only those that are there already.
            let left = if seen { Duration::ZERO } else { end.saturating_duration_since(Instant::now()) };
            if !self.poll(fd, left)? {
                if seen || Instant::now() >= end {
                    return Ok(seen);
                }
                continue;
            }
            // SAFETY: the handle is open; it is readable, so this does not block.
            let port = unsafe { libxl_sys::xenevtchn_pending(self.handle.0) };
            check(port, "take an event", self.domain)?;
            // A port stays masked until this, so no event is lost in between.
            // SAFETY: the handle is open.
            let rc = unsafe { libxl_sys::xenevtchn_unmask(self.handle.0, port.cast_unsigned()) };
            check(rc, "take an event", self.domain)?;
            seen |= port.cast_unsigned() == self.port;
        }
    }

    fn poll(&self, fd: c_int, timeout: Duration) -> Result<bool, Error> {
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // Rounded up, or the last millisecond would be spent spinning.
        let millis = c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX);
        // SAFETY: one entry.
        match unsafe { libc::poll(&mut poll, 1, millis) } {
            0 => Ok(false),
            ready if ready > 0 => Ok(true),
            _ => match Error::last("wait for a suspend", self.domain) {
                error if error.errno() == Some(libc::EINTR) => Ok(false),
                error => Err(error),
            },
        }
    }
}

impl Drop for SuspendChannel {
    fn drop(&mut self) {
        // Both may fail, with the domain gone; closing the handle does the rest.
        let _ = Self::unsubscribe(&self.interface, self.domain);
        // SAFETY: the handle is open and the port was bound on it.
        unsafe { libxl_sys::xenevtchn_unbind(self.handle.0, self.port) };
    }
}
