//! The state of a domain that is not memory: its HVM context, its parameters, its clock, its processor's description.
//!
//! Order when loading: TSC, parameters, context, grants (reference 2.9). The trap of each is at its function.

use crate::interface::check;
use crate::{DomId, Error, Interface, hvm};
use std::ptr;
use xenctrl_sys as xc;

/// No HVM context is longer: a vcpu has about 4 KiB, and there are at most 128.
const CONTEXT_MAX: usize = 8 << 20;
/// Leaves and MSRs of a policy number some hundreds.
const POLICY_MAX: u32 = 1 << 16;

/// How a domain's time stamp counter is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TscInfo {
    /// 0 default, 1 always emulated, 2 never.
    pub mode: u32,
    /// Its rate.
    pub khz: u32,
    /// Nanoseconds that it has run.
    pub nsec: u64,
    /// How often it was moved.
    pub incarnation: u32,
}

/// One MSR of a [`CpuPolicy`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Reserved, 0.
    pub flags: u32,
    /// What the guest reads.
    pub value: u64,
}

/// What processor a domain sees.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuPolicy {
    /// leaf, subleaf, eax, ebx, ecx, edx.
    pub leaves: Vec<[u32; 6]>,
    /// Its MSRs.
    pub msrs: Vec<Msr>,
}

struct PolicyHandle(*mut libxl_sys::xc_cpu_policy_t);

impl Drop for PolicyHandle {
    fn drop(&mut self) {
        // SAFETY: made by xc_cpu_policy_init; null is allowed.
        unsafe { libxl_sys::xc_cpu_policy_destroy(self.0) };
    }
}

impl Interface {
    /// The HVM context of a domain that stands still, or of one that Xen will stop for the moment it takes.
    ///
    /// # Errors
    /// The hypervisor's; [`Error::Context`] if what it gave is not a context.
    pub fn hvm_context(&self, d: DomId) -> Result<Vec<u8>, Error> {
        const OPERATION: &str = "get the HVM context";
        // SAFETY: without a buffer it only tells the most it can take.
        let most = unsafe { xc::xc_domain_hvm_getcontext(self.xch(), d.raw(), ptr::null_mut(), 0) };
        check(most, OPERATION, d)?;
        let most = usize::try_from(most).unwrap_or(0);
        if most == 0 || most > CONTEXT_MAX {
            return Err(Error::invalid(OPERATION, format!("it would take {most} bytes")));
        }
        let mut blob = vec![0u8; most];
        // SAFETY: the buffer has the size said.
        let used = unsafe { xc::xc_domain_hvm_getcontext(self.xch(), d.raw(), blob.as_mut_ptr(), most as u32) };
        check(used, OPERATION, d)?;
        blob.truncate(usize::try_from(used).unwrap_or(0));
        hvm::Context::parse(&blob)?;
        Ok(blob)
    }

    /// Loads a context into a domain of the same configuration. It takes the place of every processor's state; a
    /// processor without a record is down afterwards.
    ///
    /// Traps: a release before 4.19 checks while it loads, so a wrong blob leaves the domain half loaded with its
    /// processors down; it is walked here first. A context loaded over another leaves those MSRs alone that the new one
    /// does not mention: see [`hvm::complete_msrs`].
    ///
    /// # Errors
    /// [`Error::Context`]; the hypervisor's.
    pub fn set_hvm_context(&self, d: DomId, blob: &[u8]) -> Result<(), Error> {
        if blob.len() > CONTEXT_MAX {
            return Err(Error::invalid("set the HVM context", format!("{} bytes", blob.len())));
        }
        hvm::Context::parse(blob)?;
        // C takes a mutable pointer, and copies from it.
        let mut copy = blob.to_vec();
        // SAFETY: the buffer has the size said.
        let rc = unsafe { xc::xc_domain_hvm_setcontext(self.xch(), d.raw(), copy.as_mut_ptr(), copy.len() as u32) };
        check(rc, "set the HVM context", d)
    }

    /// An HVM parameter ([`hvm::PARAMS`]).
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn hvm_param(&self, d: DomId, index: u32) -> Result<u64, Error> {
        let mut value = 0;
        // SAFETY: it writes the one number.
        check(unsafe { xc::xc_hvm_param_get(self.xch(), d.raw(), index, &mut value) }, "get an HVM parameter", d)?;
        Ok(value)
    }

    /// Sets an HVM parameter. Some can be set once only, and again to the same value.
    ///
    /// # Errors
    /// The hypervisor's: EEXIST for one that is set to something else.
    pub fn set_hvm_param(&self, d: DomId, index: u32, value: u64) -> Result<(), Error> {
        // SAFETY: numbers are all it takes.
        check(unsafe { xc::xc_hvm_param_set(self.xch(), d.raw(), index, value) }, "set an HVM parameter", d)
    }

    /// How the domain's time stamp counter is made.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn tsc_info(&self, d: DomId) -> Result<TscInfo, Error> {
        let mut tsc = TscInfo::default();
        // SAFETY: it writes the four numbers.
        let rc = unsafe {
            xc::xc_domain_get_tsc_info(
                self.xch(),
                d.raw(),
                &mut tsc.mode,
                &mut tsc.nsec,
                &mut tsc.khz,
                &mut tsc.incarnation,
            )
        };
        check(rc, "get the TSC", d)?;
        Ok(tsc)
    }

    /// Sets it. Must come before the HVM context, whose header overrides the rate.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn set_tsc_info(&self, d: DomId, tsc: &TscInfo) -> Result<(), Error> {
        // SAFETY: numbers are all it takes.
        let rc =
            unsafe { xc::xc_domain_set_tsc_info(self.xch(), d.raw(), tsc.mode, tsc.nsec, tsc.khz, tsc.incarnation) };
        check(rc, "set the TSC", d)
    }

    /// What processor the domain sees.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn cpu_policy(&self, d: DomId) -> Result<CpuPolicy, Error> {
        const OPERATION: &str = "get the CPU policy";
        let (mut nr_leaves, mut nr_msrs) = (0, 0);
        // SAFETY: it writes the two numbers.
        let rc = unsafe { libxl_sys::xc_cpu_policy_get_size(self.guest(), &mut nr_leaves, &mut nr_msrs) };
        check(rc, OPERATION, d)?;
        if nr_leaves > POLICY_MAX || nr_msrs > POLICY_MAX {
            return Err(Error::invalid(OPERATION, format!("{nr_leaves} leaves and {nr_msrs} MSRs")));
        }
        // SAFETY: no arguments.
        let policy = PolicyHandle(unsafe { libxl_sys::xc_cpu_policy_init() });
        if policy.0.is_null() {
            return Err(Error::last(OPERATION, d));
        }
        // SAFETY: the policy is valid until dropped.
        check(unsafe { libxl_sys::xc_cpu_policy_get_domain(self.guest(), d.raw(), policy.0) }, OPERATION, d)?;
        let mut leaves = vec![libxl_sys::xen_cpuid_leaf_t::default(); nr_leaves as usize];
        let mut msrs = vec![libxl_sys::xen_msr_entry_t::default(); nr_msrs as usize];
        // SAFETY: the arrays have as many entries as said; it lowers the numbers to those used.
        let rc = unsafe {
            libxl_sys::xc_cpu_policy_serialise(
                self.guest(),
                policy.0,
                leaves.as_mut_ptr(),
                &mut nr_leaves,
                msrs.as_mut_ptr(),
                &mut nr_msrs,
            )
        };
        check(rc, OPERATION, d)?;
        leaves.truncate(nr_leaves as usize);
        msrs.truncate(nr_msrs as usize);
        Ok(CpuPolicy {
            leaves: leaves.iter().map(|leaf| [leaf.leaf, leaf.subleaf, leaf.a, leaf.b, leaf.c, leaf.d]).collect(),
            msrs: msrs.iter().map(|msr| Msr { index: msr.idx, flags: msr.flags, value: msr.val }).collect(),
        })
    }

    /// Sets what processor the domain sees. Only before it has run.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the leaf or the MSR that this host cannot offer; the hypervisor's.
    pub fn set_cpu_policy(&self, d: DomId, policy: &CpuPolicy) -> Result<(), Error> {
        const OPERATION: &str = "set the CPU policy";
        if policy.leaves.len() > POLICY_MAX as usize || policy.msrs.len() > POLICY_MAX as usize {
            return Err(Error::invalid(OPERATION, "too many leaves or MSRs"));
        }
        let mut leaves: Vec<_> = policy
            .leaves
            .iter()
            .map(|[leaf, subleaf, a, b, c, d]| libxl_sys::xen_cpuid_leaf_t {
                leaf: *leaf,
                subleaf: *subleaf,
                a: *a,
                b: *b,
                c: *c,
                d: *d,
            })
            .collect();
        let mut msrs: Vec<_> = policy
            .msrs
            .iter()
            .map(|msr| libxl_sys::xen_msr_entry_t { idx: msr.index, flags: msr.flags, val: msr.value })
            .collect();
        let (mut bad_leaf, mut bad_subleaf, mut bad_msr) = (u32::MAX, u32::MAX, u32::MAX);
        // SAFETY: the arrays have as many entries as said; the last three are written.
        let rc = unsafe {
            libxl_sys::xc_set_domain_cpu_policy(
                self.guest(),
                d.raw(),
                leaves.len() as u32,
                leaves.as_mut_ptr(),
                msrs.len() as u32,
                msrs.as_mut_ptr(),
                &mut bad_leaf,
                &mut bad_subleaf,
                &mut bad_msr,
            )
        };
        check(rc, OPERATION, d).map_err(|error| match (bad_leaf, bad_msr) {
            (u32::MAX, u32::MAX) => error,
            (u32::MAX, msr) => Error::invalid(OPERATION, format!("this host cannot offer domain {d} MSR {msr:#x}")),
            (leaf, _) => Error::invalid(
                OPERATION,
                format!("this host cannot offer domain {d} CPUID leaf {leaf:#x}, subleaf {bad_subleaf:#x}"),
            ),
        })
    }

    /// Writes the two grants that the console's and xenstore's daemons map their rings through. After the context,
    /// before the domain is introduced to xenstore, which maps at once.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn seed_grants(
        &self,
        d: DomId,
        console_gfn: u64,
        store_gfn: u64,
        console_domid: DomId,
        store_domid: DomId,
    ) -> Result<(), Error> {
        let hvm = self.existing(d)?.hvm;
        // SAFETY: numbers are all it takes.
        let rc = unsafe {
            libxl_sys::xc_dom_gnttab_seed(
                self.guest(),
                d.raw(),
                hvm,
                console_gfn,
                store_gfn,
                console_domid.raw(),
                store_domid.raw(),
            )
        };
        check(rc, "seed the grants", d)
    }
}
