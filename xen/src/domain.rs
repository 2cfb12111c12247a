//! Domains: which there are, what they are doing, and stopping and starting them.
//!
//! Two ways of standing still, independent of each other: the control domain's pause, which is counted, and the
//! guest's own shutdown, of which "suspend" is one reason. A domain can be in both.
//!
//! The trap: asking for one domain's information answers with the *next* domain when there is none of that number, so
//! [`Interface::domain_info`] compares (xenctrl.h, `xc_domain_getinfolist`).

use crate::interface::check;
use crate::{Error, Interface};
use std::fmt;
use xenctrl_sys as xc;

/// Shutdown reasons (xen/sched.h).
pub const SHUTDOWN_POWEROFF: u32 = 0;
/// The guest asked to be started anew.
pub const SHUTDOWN_REBOOT: u32 = 1;
/// The guest suspended itself and can be captured.
pub const SHUTDOWN_SUSPEND: u32 = 2;
/// The guest crashed.
pub const SHUTDOWN_CRASH: u32 = 3;

/// Domains in one call of [`Interface::domains`].
const LIST: usize = 256;

/// A domain's number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct DomId(pub u16);

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl DomId {
    /// As C's libraries take it.
    pub(crate) fn raw(self) -> u32 {
        self.0.into()
    }
}

/// What the hypervisor says of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Its number.
    pub domid: DomId,
    /// HVM or PVH; otherwise PV.
    pub hvm: bool,
    /// Memory is virtualised by the processor. Without it, and without shadow paging, there is no log-dirty.
    pub hap: bool,
    /// It is being destroyed.
    pub dying: bool,
    /// The control domain paused it.
    pub paused: bool,
    /// No virtual processor has anything to do.
    pub blocked: bool,
    /// A virtual processor runs right now.
    pub running: bool,
    /// Why it shut down, if it did: [`SHUTDOWN_SUSPEND`] and its neighbours.
    pub shutdown: Option<u8>,
    /// Frames it owns. A frame that the guest gave back counts for as long as somebody has it mapped.
    pub total_pages: u64,
    /// Frames it may own.
    pub max_pages: u64,
    /// Virtual processors that are up.
    pub online_vcpus: u32,
    /// The highest number of a virtual processor, up or not.
    pub max_vcpu_id: u32,
    /// Its UUID.
    pub handle: [u8; 16],
}

impl DomainInfo {
    /// Whether it stopped inside its suspend call: the one state that can be captured and resumed elsewhere.
    pub fn is_suspended(&self) -> bool {
        self.shutdown.map(u32::from) == Some(SHUTDOWN_SUSPEND)
    }

    fn new(info: &xc::xc_domaininfo_t) -> Self {
        let flag = |bit: u32| info.flags & bit != 0;
        // The mask is of 8 bits.
        let reason = (info.flags >> xc::XEN_DOMINF_shutdownshift & xc::XEN_DOMINF_shutdownmask) as u8;
        Self {
            domid: DomId(info.domain),
            hvm: flag(xc::XEN_DOMINF_hvm_guest),
            hap: flag(xc::XEN_DOMINF_hap),
            dying: flag(xc::XEN_DOMINF_dying),
            paused: flag(xc::XEN_DOMINF_paused),
            blocked: flag(xc::XEN_DOMINF_blocked),
            running: flag(xc::XEN_DOMINF_running),
            shutdown: flag(xc::XEN_DOMINF_shutdown).then_some(reason),
            total_pages: info.tot_pages,
            max_pages: info.max_pages,
            online_vcpus: info.nr_online_vcpus,
            max_vcpu_id: info.max_vcpu_id,
            handle: info.handle,
        }
    }
}

// xenctrl-sys is built without layout tests.
const _: () = assert!(size_of::<xc::xc_domaininfo_t>() == 128 || size_of::<xc::xc_domaininfo_t>() == 112);

impl Interface {
    /// A domain, if there is one of that number.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn domain_info(&self, d: DomId) -> Result<Option<DomainInfo>, Error> {
        let mut info = xc::xc_domaininfo_t::default();
        // SAFETY: room for the one entry asked for.
        let count = unsafe { xc::xc_domain_getinfolist(self.xch(), d.raw(), 1, &mut info) };
        check(count, "get information", d)?;
        Ok((count == 1 && info.domain == d.0).then(|| DomainInfo::new(&info)))
    }

    /// The same, where there must be one.
    pub(crate) fn existing(&self, d: DomId) -> Result<DomainInfo, Error> {
        self.domain_info(d)?.ok_or(Error::NoSuchDomain(d))
    }

    /// Every domain, the control domain too, by number.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn domains(&self) -> Result<Vec<DomainInfo>, Error> {
        let mut all: Vec<DomainInfo> = Vec::new();
        let mut page = vec![xc::xc_domaininfo_t::default(); LIST];
        loop {
            let first = all.last().map_or(0, |last| last.domid.raw() + 1);
            // SAFETY: room for LIST entries.
            let count = unsafe { xc::xc_domain_getinfolist(self.xch(), first, LIST as u32, page.as_mut_ptr()) };
            check(count, "list domains", None)?;
            let count = usize::try_from(count).unwrap_or(0).min(LIST);
            all.extend(page[..count].iter().map(DomainInfo::new));
            if count < LIST {
                return Ok(all);
            }
        }
    }

    /// Stops a domain, and returns when it stands. Counted: as many [`Interface::unpause`] set it going again.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn pause(&self, d: DomId) -> Result<(), Error> {
        // SAFETY: a number is all it takes.
        check(unsafe { xc::xc_domain_pause(self.xch(), d.raw()) }, "pause", d)
    }

    /// Takes back one [`Interface::pause`]. A new domain has been paused once.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn unpause(&self, d: DomId) -> Result<(), Error> {
        // SAFETY: a number is all it takes.
        check(unsafe { xc::xc_domain_unpause(self.xch(), d.raw()) }, "unpause", d)
    }

    /// Shuts a domain down from outside, without its help. After a forced suspend use [`Interface::resume_plain`]:
    /// a cooperative resume would overwrite a register of arbitrary guest code.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn shutdown(&self, d: DomId, reason: u32) -> Result<(), Error> {
        let reason = i32::try_from(reason).map_err(|_| Error::invalid("shut down", format!("reason {reason}")))?;
        // SAFETY: numbers are all it takes.
        check(unsafe { xc::xc_domain_shutdown(self.xch(), d.raw(), reason) }, "shut down", d)
    }

    /// Destroys a domain at once. Its devices and its xenstore entries are libxl's ([`crate::libxl::Context::destroy`]).
    /// Frames that somebody still has mapped stay, and the domain with them, until they are unmapped.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn destroy(&self, d: DomId) -> Result<(), Error> {
        // SAFETY: a number is all it takes.
        check(unsafe { xc::xc_domain_destroy(self.xch(), d.raw()) }, "destroy", d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_where_they_stand() {
        let mut raw =
            xc::xc_domaininfo_t { domain: 5, tot_pages: 10, max_pages: 12, nr_online_vcpus: 1, ..Default::default() };
        raw.flags = xc::XEN_DOMINF_hvm_guest | xc::XEN_DOMINF_hap | xc::XEN_DOMINF_paused | 3 << 16;
        let info = DomainInfo::new(&raw);
        assert!(info.hvm && info.hap && info.paused && !info.dying && !info.running);
        // A reason without the flag is a left-over.
        assert_eq!((info.shutdown, info.is_suspended()), (None, false));
        raw.flags |= xc::XEN_DOMINF_shutdown;
        assert_eq!(DomainInfo::new(&raw).shutdown, Some(3));
        raw.flags = xc::XEN_DOMINF_shutdown | 2 << 16;
        assert!(DomainInfo::new(&raw).is_suspended());
        assert_eq!(DomId(5).to_string(), "5");
    }
}
