//! The engine over Xen, and the helper's whole run.
//!
//! ```text
//! argv ─▶ job ─▶ Xen ─┬ PV domain ─▶ become libxl's own helper
//!                     └ HVM, PVH ──▶ save or restore ─▶ log, results, complete ─▶ exit 0
//! ```
//!
//! A failure is told to libxl in words and as an errno, and the process ends with 0: that libxl has heard it is what
//! counts. It ends otherwise only when libxl cannot be told.
//!
//! The trap: the descriptor of the stream is a number in argv. `inherited` duplicates it, which leaves libxl's own
//! open in this process: a reader at the other end sees its end when the process ends, and no sooner.

use super::guest::{CpuPolicy, GuestError, Source, Target};
use super::sparse::Sparse;
use super::{Calls, Failure, restore, save, stock};
use crate::image::helper::{Job, Level, Message};
use crate::image::{self, HvmParam, PageType, TscInfo};
use crate::page::PAGE_SIZE;
use crate::say;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::AtomicBool;
use xen::{Access, DomId, ForeignMemory, Interface, LogDirty};

/// Does what `arguments`, those behind the program's name, ask for. Returns the exit code. `cancel` becomes true when
/// libxl changes its mind about a save.
#[must_use]
pub fn run(arguments: &[String], cancel: &AtomicBool) -> u8 {
    let job = match Job::parse(arguments) {
        Ok(job) => job,
        Err(error) => {
            say::err(&format!("xl-colo: not a command line of libxl's: {error}"));
            return 2;
        }
    };
    let mut calls = Calls::new(std::io::stdin().lock(), std::io::stdout().lock(), job.cbflags());
    let result = start(&job, arguments, &mut calls, cancel);
    match end(&result, &mut calls) {
        Ok(()) => 0,
        Err(failure) => {
            say::err(&format!("xl-colo: {failure}"));
            1
        }
    }
}

fn start(
    job: &Job,
    arguments: &[String],
    calls: &mut Calls<impl Read, impl Write>,
    cancel: &AtomicBool,
) -> Result<(), Failure> {
    let xen = Interface::open().map_err(refused)?;
    let domain = DomId(job.domid());
    let Some(info) = xen.domain_info(domain).map_err(refused)? else {
        const ESRCH: i32 = 3;
        return Err(GuestError { what: format!("there is no domain {domain}"), errno: ESRCH }.into());
    };
    if !info.hvm {
        let error = stock::become_stock(arguments, xen.versions().tools);
        let what = format!("domain {domain} is PV, and libxl's own helper did not start: {error}");
        return Err(GuestError { what, errno: error.raw_os_error().unwrap_or(0) }.into());
    }
    let memory = ForeignMemory::open().map_err(refused)?;
    let mut guest = Guest { xen, memory, domain, log: None };
    match job {
        Job::Save(job) => {
            let stream = Sparse::new(inherited(job.stream_fd, "write")?);
            save::save(job, &mut guest, calls, stream, cancel)?;
        }
        Job::Restore(job) => {
            let stream = inherited(job.stream_fd, "read")?;
            let restore::Rings { store_gfn, console_gfn } = restore::restore(job, &mut guest, calls, stream)?;
            calls.tell(&Message::RestoreResults { store_gfn, console_gfn })?;
        }
    }
    Ok(())
}

fn end(result: &Result<(), Failure>, calls: &mut Calls<impl Read, impl Write>) -> Result<(), Failure> {
    let (retval, errno) = match result {
        Ok(()) => (0, 0),
        Err(failure) => {
            calls.log(Level::Error, failure.errno(), &failure.to_string());
            (-1, failure.errno())
        }
    };
    calls.ask(&Message::Complete { retval, errno }, "take the result").map(drop)
}

/// The descriptor that libxl opened under this number. Asking the kernel for a duplicate of one of our own descriptors
/// is how safe code takes one over by number.
fn inherited(number: i32, what: &'static str) -> Result<File, Failure> {
    let own = pidfd_open(getpid(), PidfdFlags::empty());
    let file = own.and_then(|own| pidfd_getfd(own, number, PidfdGetfdFlags::empty()));
    file.map(File::from).map_err(|error| Failure::Stream { what, error: error.into() })
}

fn refused(error: xen::Error) -> GuestError {
    GuestError { what: error.to_string(), errno: error.errno().unwrap_or(0) }
}

struct Guest {
    xen: Interface,
    memory: ForeignMemory,
    domain: DomId,
    log: Option<LogDirty>,
}

impl Guest {
    fn unmappable(&self, gfn: u64, errno: i32) -> GuestError {
        GuestError { what: format!("page {gfn:#x} of domain {} cannot be mapped", self.domain), errno }
    }
}

impl Source for Guest {
    fn xen_version(&self) -> (u32, u32) {
        self.xen.versions().hypervisor
    }

    fn nr_gpfns(&self) -> Result<u64, GuestError> {
        self.xen.nr_gpfns(self.domain).map_err(refused)
    }

    fn total_pages(&self) -> Result<u64, GuestError> {
        Ok(self.xen.domain_info(self.domain).map_err(refused)?.map_or(0, |info| info.total_pages))
    }

    fn is_suspended(&self) -> Result<bool, GuestError> {
        Ok(self.xen.domain_info(self.domain).map_err(refused)?.is_some_and(|info| info.is_suspended()))
    }

    fn cpu_policy(&self) -> Result<CpuPolicy, GuestError> {
        let policy = self.xen.cpu_policy(self.domain).map_err(refused)?;
        let msr = |msr: xen::Msr| image::Msr { index: msr.index, flags: msr.flags, value: msr.value };
        Ok(CpuPolicy { leaves: policy.leaves, msrs: policy.msrs.into_iter().map(msr).collect() })
    }

    fn page_types(&self, gfns: &[u64], into: &mut Vec<PageType>) -> Result<(), GuestError> {
        let mut types = Vec::with_capacity(gfns.len());
        self.xen.page_types(self.domain, gfns, &mut types).map_err(refused)?;
        for kind in types {
            let unknown = || GuestError { what: format!("Xen knows a page type {:#x}", kind.bits()), errno: 0 };
            into.push(PageType::new(kind.bits()).ok_or_else(unknown)?);
        }
        Ok(())
    }

    fn read(&mut self, gfns: &[u64], into: &mut Vec<u8>, holes: &mut Vec<usize>) -> Result<(), GuestError> {
        // Mapped anew each time: a guest may balloon as it likes under xl, and a mapping that is kept would show the
        // frame it gave back.
        let mapping = self.memory.map(self.domain, Access::Read, gfns).map_err(refused)?;
        for at in 0..gfns.len() {
            if !mapping.append(at, into) {
                into.extend_from_slice(&[0; PAGE_SIZE]);
                holes.push(at);
            }
        }
        Ok(())
    }

    fn log_dirty(&mut self, on: bool) -> Result<(), GuestError> {
        // Dropping switches it off.
        self.log = None;
        if on {
            self.log = Some(LogDirty::enable(&self.xen, self.domain).map_err(refused)?);
        }
        Ok(())
    }

    fn log_dirty_if_free(&mut self) -> Result<bool, GuestError> {
        self.log = LogDirty::enable_if_free(&self.xen, self.domain).map_err(refused)?;
        Ok(self.log.is_some())
    }

    fn take_dirty(&mut self, into: &mut [u64]) -> Result<(), GuestError> {
        let off = || GuestError { what: "log-dirty is off".into(), errno: 0 };
        self.log.as_mut().ok_or_else(off)?.clean(into).map(drop).map_err(refused)
    }

    fn tsc(&self) -> Result<TscInfo, GuestError> {
        let xen::TscInfo { mode, khz, nsec, incarnation } = self.xen.tsc_info(self.domain).map_err(refused)?;
        Ok(TscInfo { mode, khz, nsec, incarnation })
    }

    fn hvm_context(&self) -> Result<Vec<u8>, GuestError> {
        self.xen.hvm_context(self.domain).map_err(refused)
    }

    fn hvm_params(&self) -> Result<Vec<HvmParam>, GuestError> {
        let mut params = Vec::new();
        for index in xen::hvm::PARAMS {
            let value = self.xen.hvm_param(self.domain, index).map_err(refused)?;
            if value != 0 {
                params.push(HvmParam { index: index.into(), value });
            }
        }
        Ok(params)
    }
}

impl Target for Guest {
    fn populate(&mut self, gfns: &[u64]) -> Result<(), GuestError> {
        self.xen.populate(self.domain, gfns).map_err(refused)
    }

    fn write(&mut self, gfns: &[u64], bytes: &[u8]) -> Result<(), GuestError> {
        let mapping = self.memory.map(self.domain, Access::ReadWrite, gfns).map_err(refused)?;
        for (at, (gfn, page)) in gfns.iter().zip(bytes.chunks_exact(PAGE_SIZE)).enumerate() {
            if !mapping.copy_in(at, page) {
                return Err(self.unmappable(*gfn, mapping.error(at).unwrap_or(0)));
            }
        }
        Ok(())
    }

    fn read(&mut self, gfns: &[u64], into: &mut Vec<u8>) -> Result<(), GuestError> {
        let mapping = self.memory.map(self.domain, Access::Read, gfns).map_err(refused)?;
        for (at, gfn) in gfns.iter().enumerate() {
            if !mapping.append(at, into) {
                return Err(self.unmappable(*gfn, mapping.error(at).unwrap_or(0)));
            }
        }
        Ok(())
    }

    fn clear_page(&mut self, gfn: u64) -> Result<(), GuestError> {
        self.xen.clear_page(self.domain, gfn).map_err(refused)
    }

    fn set_cpu_policy(&mut self, policy: &CpuPolicy) -> Result<(), GuestError> {
        let msr = |msr: &image::Msr| xen::Msr { index: msr.index, flags: msr.flags, value: msr.value };
        let policy = xen::CpuPolicy { leaves: policy.leaves.clone(), msrs: policy.msrs.iter().map(msr).collect() };
        self.xen.set_cpu_policy(self.domain, &policy).map_err(refused)
    }

    fn set_tsc(&mut self, tsc: &TscInfo) -> Result<(), GuestError> {
        let TscInfo { mode, khz, nsec, incarnation } = *tsc;
        self.xen.set_tsc_info(self.domain, &xen::TscInfo { mode, khz, nsec, incarnation }).map_err(refused)
    }

    fn set_hvm_param(&mut self, index: u32, value: u64) -> Result<(), GuestError> {
        self.xen.set_hvm_param(self.domain, index, value).map_err(refused)
    }

    fn load_hvm_context(&mut self, context: &[u8]) -> Result<(), GuestError> {
        self.xen.set_hvm_context(self.domain, context).map_err(refused)
    }

    fn seed_grants(&mut self, console: (u64, u16), store: (u64, u16)) -> Result<(), GuestError> {
        let ((console_gfn, console_domid), (store_gfn, store_domid)) = (console, store);
        let seeded =
            self.xen.seed_grants(self.domain, console_gfn, store_gfn, DomId(console_domid), DomId(store_domid));
        seeded.map_err(refused)
    }
}
