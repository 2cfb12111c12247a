//! The hypervisor's log of the pages a domain has written.
//!
//! ```text
//! off ── enable ──▶ on ── clean: read and begin anew ──▶ on ── drop ──▶ off
//!                      └─ peek: read, and go on ───────▶ on
//! ```
//!
//! Traps (reference 2.4). A log that a dead program left on makes enabling fail with EINVAL, and so does a passed-through
//! device: it is switched off and tried once more, and only the second answer is believed. Another toolstack's log would
//! be lost that way; one program protects a domain at a time. `nr_gpfns` can grow while the log is on. A process that
//! dies leaves the log on, which costs the guest a fault per page until somebody switches it off.
//!
//! Not in the log, ever: what a backend writes through a mapping that it keeps, such as ring pages. They are thrown
//! away at a takeover.

use crate::interface::{HypercallBuffer, check};
use crate::{DomId, Error, Interface};
use std::ffi::c_ulong;
use std::ptr;
use xenctrl_sys as xc;

/// Frames of a log whose bitmap is 1 GiB long: no domain is larger.
const GPFNS_MAX: u64 = 1 << 33;

/// A log that is on. Off again when dropped.
pub struct LogDirty {
    interface: Interface,
    domain: DomId,
    nr_gpfns: u64,
    /// Where the hypervisor writes; allocated once, and again only when the domain grew.
    buffer: HypercallBuffer,
}

impl LogDirty {
    /// Switches the log on. Every page counts as clean from now on.
    ///
    /// # Errors
    /// [`Error::Os`] with the remedy: EOPNOTSUPP without HAP or shadow paging, EINVAL with passed-through devices,
    /// EBUSY with a device model that watches writes.
    pub fn enable(x: &Interface, d: DomId) -> Result<Self, Error> {
        let info = x.existing(d)?;
        let nr_gpfns = x.nr_gpfns(d)?;
        let buffer = HypercallBuffer::new(x, bitmap_bytes(nr_gpfns)?)?;
        if switch(x, d, xc::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY).is_err() {
            // Somebody may have left it on; if it was off this fails too, and does no harm.
            let _ = switch(x, d, xc::XEN_DOMCTL_SHADOW_OP_OFF);
            switch(x, d, xc::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY).map_err(|error| refusal(error, info.hvm))?;
        }
        Ok(Self { interface: x.clone(), domain: d, nr_gpfns, buffer })
    }

    /// Switches the log on, unless somebody has it on or it cannot be: nobody loses a log by this, and nobody learns
    /// why there is none.
    ///
    /// # Errors
    /// The hypervisor's, asked for the domain's size.
    pub fn enable_if_free(x: &Interface, d: DomId) -> Result<Option<Self>, Error> {
        let nr_gpfns = x.nr_gpfns(d)?;
        let buffer = HypercallBuffer::new(x, bitmap_bytes(nr_gpfns)?)?;
        let is_on = switch(x, d, xc::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY).is_ok();
        Ok(is_on.then(|| Self { interface: x.clone(), domain: d, nr_gpfns, buffer }))
    }

    /// Frames that the log covers: what `into` has to have bits for.
    pub fn nr_gpfns(&self) -> u64 {
        self.nr_gpfns
    }

    /// Adds the pages written since the last time to `into`, bit `n % 64` of word `n / 64` for frame `n`, and begins
    /// anew. Pages that the hypervisor has mapped writable for the guest count as written. Returns the number of pages
    /// that this call reported.
    ///
    /// # Errors
    /// [`Error::NrGpfnsGrew`] before anything was read, if `into` is too short for the domain as it is now; the
    /// hypervisor's.
    pub fn clean(&mut self, into: &mut [u64]) -> Result<u64, Error> {
        self.read(xc::XEN_DOMCTL_SHADOW_OP_CLEAN, "read and clear the dirty log", into)
    }

    /// The same without beginning anew.
    ///
    /// # Errors
    /// As [`LogDirty::clean`].
    pub fn peek(&mut self, into: &mut [u64]) -> Result<u64, Error> {
        self.read(xc::XEN_DOMCTL_SHADOW_OP_PEEK, "read the dirty log", into)
    }

    fn read(&mut self, op: u32, operation: &'static str, into: &mut [u64]) -> Result<u64, Error> {
        let now = self.interface.nr_gpfns(self.domain)?;
        if now > self.nr_gpfns {
            let bytes = bitmap_bytes(now)?;
            if bytes > self.buffer.len() {
                self.buffer = HypercallBuffer::new(&self.interface, bytes)?;
            }
            self.nr_gpfns = now;
        }
        // It never shrinks: a bit that is set now may be of a frame that is gone by the next look.
        let words = words_of(self.nr_gpfns);
        let covered = into.len() as u64 * 64;
        let Some(into) = into.get_mut(..words) else {
            return Err(Error::NrGpfnsGrew { domain: self.domain, now: self.nr_gpfns, covered });
        };
        // The hypervisor writes only as far as its own idea of the domain reaches.
        self.buffer.bytes_mut()[..words * 8].fill(0);
        let mut stats = xc::xc_shadow_op_stats_t::default();
        // SAFETY: the buffer is a hypercall buffer of at least nr_gpfns bits; the statistics are written.
        let done = unsafe {
            xc::xc_logdirty_control(
                self.interface.xch(),
                self.domain.raw(),
                op,
                self.buffer.raw(),
                self.nr_gpfns as c_ulong,
                xc::XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL,
                &mut stats,
            )
        };
        if done < 0 {
            return Err(Error::last(operation, self.domain));
        }
        if done.cast_unsigned() != self.nr_gpfns {
            return Err(Error::invalid(
                operation,
                format!("{done} of {} frames of domain {}", self.nr_gpfns, self.domain),
            ));
        }
        Ok(merge(&self.buffer.words()[..words], into))
    }
}

impl Drop for LogDirty {
    fn drop(&mut self) {
        // Nobody is left to tell; the domain may be gone.
        let _ = switch(&self.interface, self.domain, xc::XEN_DOMCTL_SHADOW_OP_OFF);
    }
}

fn switch(x: &Interface, d: DomId, op: u32) -> Result<(), Error> {
    // SAFETY: these operations take no memory.
    let rc = unsafe { xc::xc_shadow_control(x.xch(), d.raw(), op, ptr::null_mut(), 0) };
    check(rc, "enable log-dirty", d)
}

/// What a second refusal means.
fn refusal(error: Error, hvm: bool) -> Error {
    let remedy = match error.errno() {
        Some(libc::EOPNOTSUPP) if hvm => "the host has no hardware-assisted paging, or the domain has hap=0: use hap=1",
        Some(libc::EOPNOTSUPP) => {
            "this hypervisor has no shadow paging, which a PV domain needs: make the guest PVH, or use a hypervisor with it"
        }
        Some(libc::EINVAL) => "a device is passed through to the domain, or it has no processors: detach the device",
        Some(libc::EBUSY) => "a device model has claimed pages of the domain's for write tracking: stop that",
        Some(libc::ENOMEM) => "the domain's paging memory is used up: raise shadow_memory in its configuration",
        _ => return error,
    };
    error.with_remedy(remedy)
}

fn words_of(nr_gpfns: u64) -> usize {
    nr_gpfns.div_ceil(64) as usize
}

fn bitmap_bytes(nr_gpfns: u64) -> Result<usize, Error> {
    if nr_gpfns > GPFNS_MAX {
        return Err(Error::invalid("size the dirty log", format!("{nr_gpfns} frames are more than any domain has")));
    }
    Ok(words_of(nr_gpfns) * 8)
}

/// Ors, and counts what came.
fn merge(from: &[u64], into: &mut [u64]) -> u64 {
    let mut count = 0;
    for (into, from) in into.iter_mut().zip(from) {
        // Most of a log is zero; the bitmap of the caller need not be touched for it.
        if *from != 0 {
            *into |= from;
            count += u64::from(from.count_ones());
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_added_and_counted_as_they_came() {
        let mut into = [0b1000, 0, 1];
        assert_eq!(merge(&[0b1011, 0, 1 << 63], &mut into), 4);
        assert_eq!(into, [0b1011, 0, 1 | 1 << 63]);
    }

    #[test]
    fn sizes_are_rounded_up_and_bounded() {
        assert_eq!(bitmap_bytes(0).ok(), Some(0));
        assert_eq!(bitmap_bytes(1).ok(), Some(8));
        assert_eq!(bitmap_bytes(64).ok(), Some(8));
        assert_eq!(bitmap_bytes(1_044_480).ok(), Some(130_560));
        assert!(bitmap_bytes(u64::MAX).is_err());
    }

    #[test]
    fn refusals_name_the_remedy() {
        let said = |errno, hvm| refusal(Error::os("enable log-dirty", DomId(1), errno), hvm).to_string();
        assert!(said(libc::EOPNOTSUPP, true).contains("hap=1"));
        assert!(said(libc::EOPNOTSUPP, false).contains("PVH"));
        assert!(said(libc::EINVAL, true).contains("passed through"));
        assert!(said(libc::EBUSY, true).contains("device model"));
        assert!(said(libc::EACCES, true).contains("another Xen release"));
    }
}
