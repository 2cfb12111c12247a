//! A domain's physical memory as the hypervisor sees it: how many frame numbers, what is behind each, and putting
//! frames there.
//!
//! Frame numbers of an HVM or PVH guest (gfns) are the guest's own; they are not contiguous: a 128 MiB guest uses
//! numbers up to 0xfefff because its special pages live there ([`crate::hvm::is_special_gfn`]).
//!
//! Traps: a query of more than 1024 types is refused with E2BIG. The type query *allocates* pages that are
//! populated on demand. Pages of the hypervisor that a guest has mapped, its shared_info and grant tables, are
//! reported as holes and must not be copied (reference 2.4).

use crate::interface::check;
use crate::{BATCH, DomId, Error, Interface};
use std::ffi::c_ulong;
use xenctrl_sys as xc;

/// What is behind a frame number: bits 28 to 31 of `XEN_DOMCTL_getpageframeinfo3`'s answer, moved to the bottom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageType(u8);

impl PageType {
    const XTAB: u8 = 0xf;
    const BROKEN: u8 = 0xd;

    /// From the four bits, such as a migration stream carries; higher bits are not looked at.
    pub const fn new(bits: u8) -> Self {
        Self(bits & 0xf)
    }

    /// There is a page to copy.
    pub fn is_present(self) -> bool {
        self.0 != Self::XTAB && self.0 != Self::BROKEN
    }

    /// A hole, or a page of the hypervisor's.
    pub fn is_xtab(self) -> bool {
        self.0 == Self::XTAB
    }

    /// The type, 0 to 15.
    pub fn bits(self) -> u8 {
        self.0
    }

    fn of(answer: u64) -> Self {
        // Four bits are left.
        Self::new((answer >> 28) as u8)
    }
}

impl Interface {
    /// The highest frame number in use, plus one. It can grow.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn nr_gpfns(&self, d: DomId) -> Result<u64, Error> {
        let mut gpfns: xc::xen_pfn_t = 0;
        // SAFETY: it writes the one number.
        check(unsafe { xc::xc_domain_nr_gpfns(self.xch(), d.raw(), &mut gpfns) }, "count the frames", d)?;
        Ok(gpfns)
    }

    /// Sets how much memory a domain may have, in KiB.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn set_max_mem_kib(&self, d: DomId, kib: u64) -> Result<(), Error> {
        // SAFETY: numbers are all it takes.
        check(unsafe { xc::xc_domain_setmaxmem(self.xch(), d.raw(), kib) }, "set the memory limit", d)
    }

    /// Puts an empty page behind each of these frame numbers.
    ///
    /// # Errors
    /// The hypervisor's. A failure leaves the frames before it populated.
    pub fn populate(&self, d: DomId, gfns: &[u64]) -> Result<(), Error> {
        let mut batch = Vec::with_capacity(gfns.len().min(BATCH));
        for chunk in gfns.chunks(BATCH) {
            // The call writes frame numbers back into its array.
            batch.clear();
            batch.extend_from_slice(chunk);
            // SAFETY: the array has as many entries as said.
            let rc = unsafe {
                xc::xc_domain_populate_physmap_exact(
                    self.xch(),
                    d.raw(),
                    batch.len() as c_ulong,
                    0,
                    0,
                    batch.as_mut_ptr(),
                )
            };
            check(rc, "populate frames", d)
                .map_err(|error| error.with_remedy("the domain's memory limit or the host's memory is used up"))?;
        }
        Ok(())
    }

    /// Fills a page with zeros.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn clear_page(&self, d: DomId, gfn: u64) -> Result<(), Error> {
        // SAFETY: numbers are all it takes.
        let rc = unsafe { xc::xc_clear_domain_pages(self.xch(), d.raw(), gfn, 1) };
        // It answers 1 when the page cannot be mapped.
        if rc != 0 { Err(Error::last("clear a page", d)) } else { Ok(()) }
    }

    /// What is behind each of these frame numbers, appended in order.
    ///
    /// # Errors
    /// The hypervisor's; `into` then has what was asked before.
    pub fn page_types(&self, d: DomId, gfns: &[u64], into: &mut Vec<PageType>) -> Result<(), Error> {
        into.reserve(gfns.len());
        let mut batch: Vec<libxl_sys::xen_pfn_t> = Vec::with_capacity(gfns.len().min(BATCH));
        for chunk in gfns.chunks(BATCH) {
            batch.clear();
            batch.extend_from_slice(chunk);
            // SAFETY: the array has as many entries as said; the answer overwrites it.
            let rc = unsafe {
                libxl_sys::xc_get_pfn_type_batch(self.guest(), d.raw(), batch.len() as u32, batch.as_mut_ptr())
            };
            check(rc, "get page types", d)?;
            into.extend(batch.iter().map(|answer| PageType::of(*answer)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_the_top_four_bits_of_32() {
        assert!(PageType::of(0x1234).is_present());
        assert_eq!(PageType::of(0x1234).bits(), 0);
        assert!(PageType::of(0xf000_1234).is_xtab() && !PageType::of(0xf000_1234).is_present());
        let broken = PageType::of(0xd000_0000);
        assert!(!broken.is_present() && !broken.is_xtab());
        // A pinned L4 table.
        assert!(PageType::of(0xc000_0000).is_present());
        assert_eq!(PageType::new(0xff).bits(), 15);
    }
}
