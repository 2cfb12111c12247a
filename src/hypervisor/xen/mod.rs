//! A real Xen domain as a [`Domain`].
//!
//! ```text
//!            suspend                    save_devices             resume
//! PVH, HVM with PV drivers   (cooperative: the guest is inside its suspend hypercall)
//!   control/shutdown=suspend, event    TSC, context, params     rax=1, XEN_DOMCTL_resumedomain, XS_RESUME
//! HVM without PV drivers     (transparent: the guest notices nothing)
//!   pause, QMP stop                    the same, and QEMU's     QMP cont, unpause
//! a domain that stands by    (created paused by libxl, and never run)
//!   –                                  load_devices keeps       loads what was kept, then unpause
//! ```
//!
//! The traps (xen `docs/features`, `xen/arch/x86/hvm/save.c`; the sections are of the project's Xen notes):
//! - a guest with PV drivers has state inside Xen (event channels, grants) that no stream carries. It must be
//!   captured inside its suspend hypercall, and is loaded once, at the takeover: it then reconnects by itself;
//! - its special pages (0xFEFF0 to 0xFEFFF) belong to this host's xenstored and xenconsoled. They are not copied;
//! - pages that a backend writes through a long-lived grant are not in the dirty log. Rings and persistent grants
//!   are thrown away when the guest reconnects, so nothing of them is missed;
//! - a page may be a hole here and memory there: holes are not read, and are filled before they are written.

mod devices;
pub mod keeper;
mod renaming;
pub mod toolstack;

use self::devices::Devices;
use super::{Domain, DomainError};
use crate::bitmap::Bitmap;
use crate::page::{BATCH_PAGES, PAGE_SIZE, Pfn};
use crate::scan::Scan;
use ::xen::hvm::{self, MsrSet};
use ::xen::qmp::{Client, DeviceModel, Image, monitor_path};
use ::xen::refuse;
use ::xen::{Access, DomId, ForeignMemory, Interface, LogDirty, PageCache, Store, SuspendChannel};
use keeper::Keeper;
use renaming::Renaming;
use std::sync::Arc;
use std::time::Duration;

/// How long a guest may take to suspend itself; libxl gives it 60 s, and then the guest is long gone.
const SUSPEND_DEADLINE: Duration = Duration::from_secs(8);
/// How long a device model may take for a command.
const QMP_DEADLINE: Duration = Duration::from_secs(8);
/// Pages kept mapped: 1 GiB.
const MAPPED_PAGES_MAX: usize = 1 << 18;
/// `HVM_PARAM_CALLBACK_IRQ` (xen `public/hvm/params.h`): set by a guest with PV drivers.
const PARAM_CALLBACK_IRQ: u32 = 0;
/// KiB that a domain standing by may have beyond its configuration, for pages its twin's firmware has added.
const SLACK_KIB: u64 = 16 * 1024;

/// The guest's end of its NIC.
pub trait Nic: Send + Sync + std::fmt::Debug {
    /// Sends a frame to the guest; false when it could not be taken.
    fn send(&self, frame: &[u8]) -> bool;
    /// Takes every frame that the guest has emitted so far. A suspend ends with it: what is taken later is tagged
    /// with a later epoch.
    fn drain(&self);
}

/// What a [`XenDomain`] is made of.
pub struct Parts {
    /// The hypervisor.
    pub xen: Interface,
    /// The domain.
    pub domid: DomId,
    /// The device model of an HVM guest.
    pub model: Option<DeviceModel>,
    /// Its vif, or its device model's tap.
    pub nic: Option<Arc<dyn Nic>>,
    /// Why it cannot be protected, if its devices are the reason.
    pub obstacle: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Running,
    /// Inside its suspend hypercall.
    Suspended,
    /// Paused by us, with its device model stopped.
    Paused,
    /// Created paused, and never run.
    StandBy,
}

/// A domain of this host.
pub struct XenDomain {
    parts: Parts,
    store: Store,
    state: State,
    /// Has PV drivers: it must cooperate, and cannot run as a second copy.
    cooperative: bool,
    /// Stands by for a takeover only, and never runs before.
    runs_once: bool,
    nr_pages: u64,
    memory: PageCache,
    log: Option<LogDirty>,
    /// The device model reports the pages it writes.
    model_logs: bool,
    suspension: Option<SuspendChannel>,
    keeper: Option<Keeper>,
    /// Pages known to be memory here, in a domain that is written to.
    populated: Option<Bitmap>,
    msrs: MsrSet,
    kept: Option<Devices>,
    /// What it will be called when it has taken over; until then it is ours to remove.
    incoming: Option<String>,
    taken_over: bool,
    renaming: Option<Renaming>,
}

impl std::fmt::Debug for XenDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XenDomain")
            .field("domid", &self.parts.domid)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

fn xen_error(error: impl std::fmt::Display) -> DomainError {
    DomainError::Hypervisor(error.to_string())
}

/// A connection to a domain's device model, if it has one.
pub fn device_model(domid: DomId) -> Result<DeviceModel, DomainError> {
    let client = Client::connect(&monitor_path(domid.0), QMP_DEADLINE).map_err(xen_error)?;
    Ok(DeviceModel::new(client))
}

fn numbers(pfns: &[Pfn]) -> Vec<u64> {
    pfns.iter().map(|pfn| pfn.0).collect()
}

impl XenDomain {
    /// A domain that runs on this host.
    pub fn running(parts: Parts) -> Result<Self, DomainError> {
        let nr_pages = parts.xen.nr_gpfns(parts.domid).map_err(xen_error)?;
        let mut domain = Self::new(parts, State::Running, Access::Read, nr_pages)?;
        domain.cooperative = domain.has_pv_drivers()?;
        Ok(domain)
    }

    /// A domain that was created paused, to be loaded with a guest of `nr_pages`; in lock-step it then runs beside its
    /// twin. What its builder has put into its memory is wiped: the stream does not carry pages that are zero.
    pub fn standing_by(parts: Parts, name: &str, nr_pages: u64, lockstep: bool) -> Result<Self, DomainError> {
        let max_kib = match parts.xen.domain_info(parts.domid).map_err(xen_error)? {
            Some(info) => info.max_pages.saturating_mul(4),
            None => return Err(DomainError::Gone),
        };
        parts.xen.set_max_mem_kib(parts.domid, max_kib.saturating_add(SLACK_KIB)).map_err(xen_error)?;
        let mut domain = Self::new(parts, State::StandBy, Access::ReadWrite, nr_pages)?;
        domain.runs_once = !lockstep;
        domain.incoming = Some(name.to_owned());
        let mut present = Bitmap::new(nr_pages);
        domain.present(&mut present)?;
        let pfns: Vec<Pfn> = present.iter().collect();
        let zeroes = vec![0; BATCH_PAGES * PAGE_SIZE];
        for batch in pfns.chunks(BATCH_PAGES) {
            domain.memory.write(&numbers(batch), &zeroes[..batch.len() * PAGE_SIZE]).map_err(xen_error)?;
        }
        domain.populated = Some(present);
        Ok(domain)
    }

    fn new(parts: Parts, state: State, access: Access, nr_pages: u64) -> Result<Self, DomainError> {
        let foreign = ForeignMemory::open().map_err(xen_error)?;
        let memory = PageCache::new(foreign, parts.domid, access, MAPPED_PAGES_MAX);
        Ok(Self {
            store: Store::open().map_err(xen_error)?,
            state,
            cooperative: false,
            runs_once: false,
            nr_pages,
            memory,
            log: None,
            model_logs: false,
            suspension: None,
            keeper: None,
            populated: None,
            msrs: MsrSet::default(),
            kept: None,
            incoming: None,
            taken_over: false,
            renaming: None,
            parts,
        })
    }

    /// Whether the guest has registered with Xen: always so without a device model.
    fn has_pv_drivers(&self) -> Result<bool, DomainError> {
        if self.parts.model.is_none() {
            return Ok(true);
        }
        let callback = self.parts.xen.hvm_param(self.parts.domid, PARAM_CALLBACK_IRQ).map_err(xen_error)?;
        Ok(callback != 0)
    }

    /// Which of `gfns` are memory and not of this host's own.
    fn is_memory(&self, gfns: &[u64]) -> Result<Vec<bool>, DomainError> {
        let mut types = Vec::with_capacity(gfns.len());
        self.parts.xen.page_types(self.parts.domid, gfns, &mut types).map_err(xen_error)?;
        Ok(gfns.iter().zip(types).map(|(gfn, kind)| kind.is_present() && !hvm::is_special_gfn(*gfn)).collect())
    }

    fn suspend_cooperatively(&mut self) -> Result<(), DomainError> {
        let Parts { xen, domid, .. } = &self.parts;
        if self.suspension.is_none() {
            self.suspension = Some(SuspendChannel::new(xen, *domid).map_err(xen_error)?);
        }
        let Some(suspension) = &mut self.suspension else { return Err(DomainError::Gone) };
        self.store.request_suspend(*domid).map_err(xen_error)?;
        let mut signalled = true;
        loop {
            match xen.domain_info(*domid).map_err(xen_error)?.filter(|info| !info.dying) {
                Some(info) if info.is_suspended() => return Ok(()),
                Some(info) if info.shutdown.is_none() && signalled => {}
                Some(info) if info.shutdown.is_none() => {
                    let _ = self.store.clear_suspend(*domid);
                    let why = format!(
                        "the guest did not suspend within {SUSPEND_DEADLINE:?} of control/shutdown=suspend: its kernel \
                         must support suspending (CONFIG_XEN_SAVE_RESTORE)"
                    );
                    return Err(DomainError::Hypervisor(why));
                }
                Some(_) | None => return Err(DomainError::Gone),
            }
            // An event of a former suspend may still be there: what counts is what the hypervisor says.
            signalled = suspension.wait(SUSPEND_DEADLINE).map_err(xen_error)?;
        }
    }

    fn pause(&mut self) -> Result<(), DomainError> {
        self.parts.xen.pause(self.parts.domid).map_err(xen_error)?;
        let stopped = self.parts.model.as_mut().map_or(Ok(()), |model| model.stop());
        if let Err(error) = stopped {
            let _ = self.parts.xen.unpause(self.parts.domid);
            return Err(xen_error(error));
        }
        Ok(())
    }

    fn unpause(&mut self) -> Result<(), DomainError> {
        if let Some(model) = &mut self.parts.model {
            model.cont().map_err(xen_error)?;
        }
        self.parts.xen.unpause(self.parts.domid).map_err(xen_error)
    }

    /// Puts kept device state into the domain, whose memory is the state's already.
    fn load(&mut self, devices: &Devices) -> Result<(), DomainError> {
        let Parts { xen, domid, model, .. } = &mut self.parts;
        devices.load(xen, *domid, &mut self.msrs)?;
        if let Some(model) = model {
            let state = devices.emulator.as_deref().ok_or(DomainError::BadDeviceState(
                "the guest's device model is not in it; both hosts must run it as the same type of guest".into(),
            ))?;
            let image = super::vmstate::image(state).map_err(xen_error)?;
            model.load_state(Image::Bytes(&image)).map_err(xen_error)?;
        }
        Ok(())
    }
}

impl Domain for XenDomain {
    fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    fn id(&self) -> Option<u16> {
        Some(self.parts.domid.0)
    }

    fn lockstep(&mut self) -> Result<(), DomainError> {
        match self.has_pv_drivers()? {
            false => Ok(()),
            true => Err(DomainError::BadConfig(
                "a guest with PV drivers cannot run twice: protect it with --mode remus, or run it as HVM without them \
                 (xen_platform_pci = 0, kernel option xen_nopv, NIC type=ioemu)"
                    .into(),
            )),
        }
    }

    fn protectable(&mut self) -> Result<(), DomainError> {
        let Parts { xen, domid, obstacle, .. } = &self.parts;
        let facts = refuse::gather(xen, &self.store, *domid).map_err(xen_error)?;
        let refusals =
            refuse::judge(&facts).into_iter().map(|refusal| format!("{} ({})", refusal.reason, refusal.remedy));
        let why: Vec<_> = obstacle.iter().cloned().chain(refusals).collect();
        if why.is_empty() { Ok(()) } else { Err(DomainError::BadConfig(why.join("; "))) }
    }

    fn present(&mut self, into: &mut Bitmap) -> Result<(), DomainError> {
        let Parts { xen, domid, .. } = &self.parts;
        let end = self.nr_pages.min(xen.nr_gpfns(*domid).map_err(xen_error)?);
        let total_pages = xen.domain_info(*domid).map_err(xen_error)?.ok_or(DomainError::Gone)?.total_pages;
        let mut scan = Scan::new(end, total_pages);
        while let Some(batch) = scan.next_batch() {
            let gfns: Vec<u64> = batch.collect();
            let mut types = Vec::with_capacity(gfns.len());
            xen.page_types(*domid, &gfns, &mut types).map_err(xen_error)?;
            let present = gfns.iter().zip(types).filter(|(_, kind)| kind.is_present()).map(|(gfn, _)| *gfn);
            let present: Vec<u64> = present.collect();
            scan.found(present.len() as u64);
            for gfn in present.into_iter().filter(|gfn| !hvm::is_special_gfn(*gfn)) {
                into.set(Pfn(gfn));
            }
        }
        Ok(())
    }

    fn suspend(&mut self) -> Result<(), DomainError> {
        if self.state != State::Running {
            return Ok(());
        }
        if let Some(keeper) = &mut self.keeper {
            keeper.standing(true);
        }
        if self.cooperative {
            self.suspend_cooperatively()?;
            self.state = State::Suspended;
            // Frames the guest has exchanged through its balloon hide behind mappings that were kept.
            self.memory.revalidate(&self.parts.xen).map_err(xen_error)?;
            if let Some(model) = &mut self.parts.model {
                model.stop().map_err(xen_error)?;
            }
        } else {
            self.pause()?;
            self.state = State::Paused;
        }
        if let Some(nic) = &self.parts.nic {
            nic.drain();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DomainError> {
        match self.state {
            State::Running => return Ok(()),
            State::Suspended => {
                if let Some(model) = &mut self.parts.model {
                    model.cont().map_err(xen_error)?;
                }
                self.parts.xen.resume_cooperative(self.parts.domid).map_err(xen_error)?;
                self.store.resume_domain(self.parts.domid).map_err(xen_error)?;
            }
            State::Paused => self.unpause()?,
            State::StandBy => {
                if let Some(devices) = self.kept.take() {
                    self.load(&devices)?;
                }
                self.unpause()?;
            }
        }
        self.state = State::Running;
        if let Some(keeper) = &mut self.keeper {
            keeper.standing(false);
        }
        if let Some(name) = self.incoming.take_if(|_| self.taken_over) {
            // Its name can wait; its clients cannot.
            self.renaming = Some(Renaming::begin(self.parts.domid, name));
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DomainError> {
        let stopped = self.suspend();
        self.log = None;
        if let Some(keeper) = &mut self.keeper {
            keeper.keep_stopped();
        }
        stopped
    }

    fn logdirty(&mut self, on: bool) -> Result<(), DomainError> {
        if on && self.state == State::Running {
            self.protectable()?;
        }
        let Parts { xen, domid, model, .. } = &mut self.parts;
        // A domain that does not run until it takes over dirties nothing.
        if !on || self.runs_once {
            // As long as it stands, xl save hears of no suspend.
            (self.log, self.suspension) = (None, None);
            // QEMU aborts when it is told to stop what it has not begun.
            if let Some(model) = model.as_mut().filter(|_| self.model_logs) {
                model.global_dirty_log(false).map_err(xen_error)?;
                self.model_logs = false;
            }
            self.keeper = None;
            return Ok(());
        }
        self.keeper = Some(Keeper::start(*domid).map_err(|e| DomainError::Hypervisor(format!("keeper: {e}")))?);
        self.log = Some(LogDirty::enable(xen, *domid).map_err(xen_error)?);
        if let Some(model) = model {
            model.global_dirty_log(true).map_err(xen_error)?;
            self.model_logs = true;
        }
        if self.state == State::Running {
            self.cooperative = self.has_pv_drivers()?;
        }
        Ok(())
    }

    fn take_dirty(&mut self, into: &mut Bitmap) -> Result<(), DomainError> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let mut fresh = Bitmap::new(into.bits());
        log.clean(fresh.words_mut()).map_err(xen_error)?;
        let gfns: Vec<u64> = fresh.iter().map(|pfn| pfn.0).collect();
        for gfns in gfns.chunks(BATCH_PAGES) {
            for (gfn, _) in gfns.iter().zip(self.is_memory(gfns)?).filter(|(_, is_memory)| *is_memory) {
                into.set(Pfn(*gfn));
            }
        }
        Ok(())
    }

    fn read_pages(&mut self, pfns: &[Pfn], into: &mut Vec<u8>) -> Result<(), DomainError> {
        // A page that was ballooned out since it was listed reads as zeroes: the guest has given its contents up.
        let mut holes = Vec::new();
        self.memory.read(&numbers(pfns), into, &mut holes).map_err(xen_error)
    }

    fn write_pages(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Result<(), DomainError> {
        let Some(populated) = &mut self.populated else { return Err(DomainError::NotSuspended) };
        let missing: Vec<u64> = pfns.iter().filter(|pfn| !populated.get(**pfn)).map(|pfn| pfn.0).collect();
        if let Some(special) = missing.iter().find(|gfn| hvm::is_special_gfn(**gfn)) {
            return Err(DomainError::NoSuchPage { pfn: *special, nr_pages: self.nr_pages });
        }
        if !missing.is_empty() {
            self.parts.xen.populate(self.parts.domid, &missing).map_err(xen_error)?;
            for gfn in missing {
                populated.set(Pfn(gfn));
            }
        }
        self.memory.write(&numbers(pfns), bytes).map_err(xen_error)
    }

    fn save_devices(&mut self) -> Result<Vec<u8>, DomainError> {
        if self.state == State::Running {
            return Err(DomainError::NotSuspended);
        }
        let Parts { xen, domid, model, .. } = &mut self.parts;
        let mut devices = Devices::of(xen, *domid)?;
        if let Some(model) = model {
            devices.emulator = Some(model.save_state().map_err(xen_error)?);
        }
        Ok(devices.encode())
    }

    fn check_devices(&self, run: &[u8]) -> Result<(), DomainError> {
        let devices = Devices::decode(run)?;
        if self.parts.model.is_some() {
            let state = devices.emulator.as_deref().unwrap_or_default();
            super::vmstate::check(state).map_err(|e| DomainError::BadDeviceState(e.to_string()))?;
        }
        Ok(())
    }

    fn load_devices(&mut self, run: &[u8]) -> Result<(), DomainError> {
        let devices = Devices::decode(run)?;
        match self.state {
            State::Running | State::Suspended => Err(DomainError::NotSuspended),
            // The vcpus and the device model of a domain that stands by are loaded once, when it begins to run: a
            // second load would leave behind what the first had set and the second leaves out.
            State::StandBy => {
                self.kept = Some(devices);
                Ok(())
            }
            State::Paused => self.load(&devices),
        }
    }

    /// Nothing to tell it: a guest that resumes in a new domain announces itself, and one that does not notice is
    /// announced by its host. For this host, the domain is now the guest.
    fn set_generation(&mut self, _generation: u64) -> Result<(), DomainError> {
        // What dirties nothing as long as it stands by can be protected from now on.
        (self.taken_over, self.runs_once) = (true, false);
        Ok(())
    }

    fn receive_frame(&mut self, frame: &[u8]) -> bool {
        // What a full ring drops, a client sends again.
        self.parts.nic.as_ref().is_some_and(|nic| nic.send(frame))
    }
}

impl Drop for XenDomain {
    fn drop(&mut self) {
        self.log = None;
        self.renaming = None;
        if self.incoming.is_some()
            && let Err(error) = toolstack::destroy(self.parts.domid)
        {
            tracing::warn!(%error, domid = self.parts.domid.0, "a domain that never took over is left behind");
        }
    }
}
