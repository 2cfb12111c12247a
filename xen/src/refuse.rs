//! Which domains cannot be protected, and what would have to change. Asked before protection begins, so that nobody
//! learns at the first checkpoint, or at the takeover, what could have been said at once.
//!
//! [`judge`] is pure over [`Facts`]; [`gather`] asks the hypervisor and xenstore.

use crate::{DomId, DomainInfo, Error, Interface, Store};
use std::ptr;
use xenctrl_sys as xc;

/// How far a domain's memory may be from its target: the toolstack's slack, the special pages, a video memory's worth.
const BALLOON_SLACK_KIB: u64 = 20 << 10;

/// What is known of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// What the hypervisor says.
    pub domain: DomainInfo,
    /// The hypervisor has shadow paging, which logs writes without HAP.
    pub shadow: bool,
    /// Passed-through devices.
    pub passthrough: u32,
    /// The guest sees several NUMA nodes.
    pub vnuma: bool,
    /// What the guest's balloon has been told to reach, in KiB.
    pub target_kib: Option<u64>,
}

/// Why a domain cannot be protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What is in the way.
    pub reason: String,
    /// What to do about it.
    pub remedy: &'static str,
}

/// Everything that is in the way of protecting a domain; nothing means that it can be.
pub fn judge(facts: &Facts) -> Vec<Refusal> {
    let domain = &facts.domain;
    let mut refusals = Vec::new();
    let mut refuse = |reason: String, remedy| refusals.push(Refusal { reason, remedy });
    if domain.domid == DomId(0) {
        refuse("it is the control domain".into(), "protect a guest");
    }
    if domain.dying {
        refuse("it is being destroyed".into(), "start it again");
    }
    if let Some(reason) = domain.shutdown {
        refuse(format!("it has shut down (reason {reason})"), "start it again, or resume it if it is suspended");
    }
    if domain.online_vcpus == 0 {
        refuse("no processor of it is up".into(), "let it boot first");
    }
    if !facts.shadow && !domain.hvm {
        refuse(
            "it is a PV guest, and this hypervisor has no shadow paging to log its writes with".into(),
            "make it type=\"pvh\", or use a hypervisor with shadow paging",
        );
    }
    if !facts.shadow && domain.hvm && !domain.hap {
        refuse(
            "it has no hardware-assisted paging, and this hypervisor no shadow paging to log its writes with".into(),
            "set hap=1, on a host whose processor can",
        );
    }
    if facts.passthrough > 0 {
        refuse(
            format!("{} device(s) are passed through to it; what they write is not logged", facts.passthrough),
            "detach them with xl pci-detach",
        );
    }
    if facts.vnuma {
        refuse(
            "it has several virtual NUMA nodes, which a copy cannot have".into(),
            "remove vnuma from its configuration",
        );
    }
    let current_kib = domain.total_pages.saturating_mul(4);
    if let Some(target_kib) = facts.target_kib.filter(|target| target.abs_diff(current_kib) > BALLOON_SLACK_KIB) {
        refuse(
            format!("its balloon is on the move: it has {current_kib} KiB and is to have {target_kib} KiB"),
            "wait until it is there, or xl mem-set it to what it has; leave the target alone while it is protected",
        );
    }
    refusals
}

/// Asks for the facts.
///
/// # Errors
/// The hypervisor's and xenstore's; [`Error::NoSuchDomain`].
pub fn gather(x: &Interface, store: &Store, d: DomId) -> Result<Facts, Error> {
    let domain = x.existing(d)?;
    let target = store.read(&format!("{}/memory/target", store.domain_path(d)))?;
    Ok(Facts {
        domain,
        shadow: x.abilities()?.shadow,
        passthrough: passthrough(store, d)?,
        vnuma: has_vnuma(x, d)?,
        target_kib: target.and_then(|target| target.parse().ok()),
    })
}

/// Every PCI backend that serves the domain says how many devices it has.
fn passthrough(store: &Store, d: DomId) -> Result<u32, Error> {
    let backends = format!("/local/domain/0/backend/pci/{d}");
    let mut devices: u32 = 0;
    for backend in store.list(&backends)? {
        let number = store.read(&format!("{backends}/{backend}/num_devs"))?;
        devices = devices.saturating_add(number.and_then(|number| number.parse().ok()).unwrap_or(0));
    }
    Ok(devices)
}

/// Without room for an answer, EOPNOTSUPP says that there is no vNUMA and anything else that there is.
fn has_vnuma(x: &Interface, d: DomId) -> Result<bool, Error> {
    let (mut nodes, mut ranges, mut vcpus) = (0, 0, 0);
    // SAFETY: the three counts say that there is no room in the three arrays.
    let rc = unsafe {
        xc::xc_domain_getvnuma(
            x.xch(),
            d.raw(),
            &mut nodes,
            &mut ranges,
            &mut vcpus,
            ptr::null_mut(),
            ptr::null_mut(),
            ptr::null_mut(),
        )
    };
    if rc == 0 {
        return Ok(true);
    }
    match Error::last("ask for vNUMA", d) {
        error if error.errno() == Some(libc::EOPNOTSUPP) => Ok(false),
        error if error.errno() == Some(libc::ENOBUFS) => Ok(true),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            domain: DomainInfo {
                domid: DomId(1),
                hvm: true,
                hap: true,
                dying: false,
                paused: false,
                blocked: true,
                running: false,
                shutdown: None,
                total_pages: 32768,
                max_pages: 33024,
                online_vcpus: 1,
                max_vcpu_id: 0,
                handle: [0; 16],
            },
            shadow: false,
            passthrough: 0,
            vnuma: false,
            target_kib: Some(131_072),
        }
    }

    fn said(change: impl Fn(&mut Facts)) -> Vec<Refusal> {
        let mut facts = good();
        change(&mut facts);
        judge(&facts)
    }

    #[test]
    fn a_good_domain_is_not_refused() {
        assert_eq!(judge(&good()), []);
        // HVM: video memory and firmware are on top of the target. No balloon: no target.
        assert_eq!(said(|facts| facts.domain.total_pages += 4200), []);
        assert_eq!(said(|facts| facts.target_kib = None), []);
        // Shadow paging does what HAP does.
        assert_eq!(said(|facts| (facts.domain.hap, facts.shadow) = (false, true)), []);
        assert_eq!(said(|facts| (facts.domain.hap, facts.domain.hvm, facts.shadow) = (false, false, true)), []);
        // A paused domain can be protected.
        assert_eq!(said(|facts| facts.domain.paused = true), []);
    }

    #[test]
    fn each_obstacle_is_one_refusal_with_a_remedy() {
        type Change = fn(&mut Facts);
        let obstacles: [(Change, &str); 10] = [
            (|facts| facts.domain.domid = DomId(0), "control domain"),
            (|facts| facts.domain.dying = true, "destroyed"),
            (|facts| facts.domain.shutdown = Some(3), "reason 3"),
            (|facts| facts.domain.online_vcpus = 0, "processor"),
            (|facts| (facts.domain.hvm, facts.domain.hap) = (false, false), "PV guest"),
            (|facts| facts.domain.hap = false, "hardware-assisted"),
            (|facts| facts.passthrough = 2, "2 device(s)"),
            (|facts| facts.vnuma = true, "NUMA"),
            (|facts| facts.target_kib = Some(65_536), "balloon"),
            (|facts| facts.target_kib = Some(262_144), "balloon"),
        ];
        for (change, word) in obstacles {
            let refusals = said(change);
            assert_eq!(refusals.len(), 1, "{refusals:?}");
            assert!(refusals[0].reason.contains(word), "{refusals:?}");
            assert!(!refusals[0].remedy.is_empty());
        }
        assert_eq!(said(|facts| (facts.vnuma, facts.passthrough) = (true, 1)).len(), 2);
    }
}
