//! Letting a suspended domain go on, as if nothing had happened or as if it were elsewhere.
//!
//! A guest suspends by a hypercall that returns 0 in the copy ("you are elsewhere: reconnect") and 1 in the original
//! ("cancelled: go on"). That 1 has to be written into the first processor's register by us.
//!
//! | | register | guest |
//! |---|---|---|
//! | [`Interface::resume_cooperative`] | rax = 1 | keeps every connection |
//! | [`Interface::resume_plain`] | untouched | a suspended guest reconnects; a forced one goes on |
//!
//! Traps (reference 2.5). Writing a register goes through a context that carries only x87 and SSE state: AVX, AVX-512
//! and PKRU of the first processor would be lost at every checkpoint, so its extended state is read before and written
//! after. A guest that did not ask to be suspended must never be resumed cooperatively. An HVM guest without PV drivers
//! (no callback set) has no such hypercall, and nothing to be told.

use crate::interface::{HypercallBuffer, check};
use crate::{DomId, Error, Interface};
use xenctrl_sys as xc;

/// Extended state of one processor is a few KiB; more is not one.
const EXTENDED_STATE_MAX: u64 = 64 << 10;
/// `xstate_bv` behind xcr0, xcr0_accum (u64 each) and the 512 bytes of x87 and SSE.
const XSTATE_BV: usize = 16 + 512;

/// The extended processor state of one vcpu, as `XEN_DOMCTL_getvcpuextstate` gives it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExtendedState {
    /// xcr0, xcr0_accum, and the XSAVE area uncompressed.
    pub bytes: Vec<u8>,
}

impl ExtendedState {
    /// Which components hold anything but their initial state: bit 0 x87, 1 SSE, 2 AVX and so on.
    pub fn xstate_bv(&self) -> u64 {
        let at = self.bytes.get(XSTATE_BV..XSTATE_BV + 8);
        at.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    }
}

impl Interface {
    /// Lets a suspended domain go on as if its suspend had been cancelled, with all of its connections.
    ///
    /// # Errors
    /// [`Error::NotSuspended`] if it is not shut down with reason suspend; the hypervisor's. The domain is then still
    /// suspended.
    pub fn resume_cooperative(&self, d: DomId) -> Result<(), Error> {
        let info = self.existing(d)?;
        if !info.is_suspended() {
            return Err(Error::NotSuspended { domain: d, shutdown: info.shutdown });
        }
        if !info.hvm || self.hvm_param(d, xc::HVM_PARAM_CALLBACK_IRQ)? != 0 {
            self.return_one(d, info.hvm)?;
        }
        self.resume_plain(d)
    }

    /// Lets a shut down domain go on, and touches no register. A guest that suspended itself sees "you are elsewhere".
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn resume_plain(&self, d: DomId) -> Result<(), Error> {
        let mut domctl = xc::xen_domctl { cmd: xc::XEN_DOMCTL_resumedomain, ..Default::default() };
        self.domctl("resume", d, &mut domctl)
    }

    /// The suspend hypercall of the first processor returns 1.
    fn return_one(&self, d: DomId, hvm: bool) -> Result<(), Error> {
        // HVM registers are always 64 bits wide; a PV guest's are as wide as it is.
        let mut width = 8;
        if !hvm {
            // SAFETY: it writes the one number.
            let rc = unsafe { xc::xc_domain_get_guest_width(self.xch(), d.raw(), &mut width) };
            check(rc, "get the register width", d)?;
        }
        let extended = self.extended_state(d, 0)?;
        let mut context: Box<xc::vcpu_guest_context_any_t> = Box::default();
        // SAFETY: the struct is the size that libxenctrl fills.
        check(unsafe { xc::xc_vcpu_getcontext(self.xch(), d.raw(), 0, &mut *context) }, "get the registers", d)?;
        // Both union members are plain numbers for the whole of the union's size, so either may be written.
        if width == 4 {
            context.x32.user_regs.eax = 1;
        } else {
            context.x64.user_regs.__bindgen_anon_11.rax = 1;
        }
        // SAFETY: the struct is the one just filled.
        check(unsafe { xc::xc_vcpu_setcontext(self.xch(), d.raw(), 0, &mut *context) }, "set the registers", d)?;
        match extended {
            Some(extended) => self.set_extended_state(d, 0, &extended),
            None => Ok(()),
        }
    }

    /// The extended state of a processor, if the host has such. The domain must stand still.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn extended_state(&self, d: DomId, vcpu: u32) -> Result<Option<ExtendedState>, Error> {
        const OPERATION: &str = "get the extended processor state";
        let mut domctl = xc::xen_domctl { cmd: xc::XEN_DOMCTL_getvcpuextstate, ..Default::default() };
        domctl.u.vcpuextstate = xc::xen_domctl_vcpuextstate { vcpu, ..Default::default() };
        // Without a buffer it tells the size and the mask, which the second call has to repeat.
        self.domctl(OPERATION, d, &mut domctl)?;
        // SAFETY: the union's member that this command answers in; plain numbers and a pointer.
        let mut query = unsafe { domctl.u.vcpuextstate };
        if query.xfeature_mask == 0 || query.size == 0 {
            return Ok(None);
        }
        if query.size > EXTENDED_STATE_MAX {
            return Err(Error::invalid(OPERATION, format!("{} bytes", query.size)));
        }
        let mut buffer = HypercallBuffer::new(self, query.size as usize)?;
        query.buffer.p = buffer.as_mut_ptr();
        domctl.u.vcpuextstate = query;
        self.domctl(OPERATION, d, &mut domctl)?;
        Ok(Some(ExtendedState { bytes: buffer.bytes_mut()[..query.size as usize].to_vec() }))
    }

    /// Puts back what [`Interface::extended_state`] gave. The domain must stand still.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn set_extended_state(&self, d: DomId, vcpu: u32, state: &ExtendedState) -> Result<(), Error> {
        let size = state.bytes.len() as u64;
        if size > EXTENDED_STATE_MAX {
            return Err(Error::invalid("set the extended processor state", format!("{size} bytes")));
        }
        let mut buffer = HypercallBuffer::new(self, state.bytes.len())?;
        buffer.bytes_mut()[..state.bytes.len()].copy_from_slice(&state.bytes);
        let mut domctl = xc::xen_domctl { cmd: xc::XEN_DOMCTL_setvcpuextstate, ..Default::default() };
        let mut operand = xc::xen_domctl_vcpuextstate { vcpu, size, ..Default::default() };
        operand.buffer.p = buffer.as_mut_ptr();
        domctl.u.vcpuextstate = operand;
        self.domctl("set the extended processor state", d, &mut domctl)
    }

    /// rax of a processor, for whoever wants to see what the guest's suspend call will return.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn rax(&self, d: DomId, vcpu: u32) -> Result<u64, Error> {
        let mut context: Box<xc::vcpu_guest_context_any_t> = Box::default();
        // SAFETY: the struct is the size that libxenctrl fills.
        check(unsafe { xc::xc_vcpu_getcontext(self.xch(), d.raw(), vcpu, &mut *context) }, "get the registers", d)?;
        // SAFETY: every member of the union is plain numbers.
        Ok(unsafe { context.x64.user_regs.__bindgen_anon_11.rax })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_component_mask_is_read_behind_the_legacy_area() {
        let mut bytes = vec![0; 16 + 576];
        assert_eq!(ExtendedState { bytes: bytes.clone() }.xstate_bv(), 0);
        bytes[XSTATE_BV] = 7;
        assert_eq!(ExtendedState { bytes }.xstate_bv(), 7);
        assert_eq!(ExtendedState { bytes: vec![1; 16] }.xstate_bv(), 0);
    }
}
