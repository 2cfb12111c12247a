//! What saving and restoring ask of a domain, in libxc's words.

use crate::image::{HvmParam, Msr, PageType, TscInfo};

/// Why a domain did not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{what}")]
pub struct GuestError {
    /// What failed, and why.
    pub what: String,
    /// errno, or 0.
    pub errno: i32,
}

/// A CPU policy: what the domain was told of the CPU it runs on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuPolicy {
    /// CPUID: leaf, subleaf, a, b, c, d.
    pub leaves: Vec<[u32; 6]>,
    /// MSRs.
    pub msrs: Vec<Msr>,
}

/// A domain that is saved. HVM or PVH.
pub trait Source {
    /// The Xen it runs on: major, minor.
    fn xen_version(&self) -> (u32, u32);
    /// One more than its largest page number. Grows when the guest maps something further up.
    fn nr_gpfns(&self) -> Result<u64, GuestError>;
    /// Pages it has, whatever their numbers.
    fn total_pages(&self) -> Result<u64, GuestError>;
    /// Whether it has shut down to be suspended.
    fn is_suspended(&self) -> Result<bool, GuestError>;
    /// Its CPU policy.
    fn cpu_policy(&self) -> Result<CpuPolicy, GuestError>;
    /// Appends the type of each page.
    fn page_types(&self, gfns: &[u64], into: &mut Vec<PageType>) -> Result<(), GuestError>;
    /// Appends the contents of each page. One that cannot be read is zeroes, and its place in `gfns` is appended to
    /// `holes`.
    fn read(&mut self, gfns: &[u64], into: &mut Vec<u8>, holes: &mut Vec<usize>) -> Result<(), GuestError>;
    /// Switches the log of pages written on, or off. Off when it is off is fine; on when somebody else left it on too.
    fn log_dirty(&mut self, on: bool) -> Result<(), GuestError>;
    /// Switches the log on if that can be done and nobody has it on; false if not.
    fn log_dirty_if_free(&mut self) -> Result<bool, GuestError>;
    /// Adds the pages written since the last call, a bit each, and forgets them.
    fn take_dirty(&mut self, into: &mut [u64]) -> Result<(), GuestError>;
    /// Its time stamp counter.
    fn tsc(&self) -> Result<TscInfo, GuestError>;
    /// The state of its CPUs and of the devices Xen emulates.
    fn hvm_context(&self) -> Result<Vec<u8>, GuestError>;
    /// The parameters that travel, in the order they do, as far as they are not 0.
    fn hvm_params(&self) -> Result<Vec<HvmParam>, GuestError>;
}

/// A domain that is restored: made, empty, and not yet run.
pub trait Target {
    /// Gives it memory at these page numbers.
    fn populate(&mut self, gfns: &[u64]) -> Result<(), GuestError>;
    /// Overwrites pages.
    fn write(&mut self, gfns: &[u64], bytes: &[u8]) -> Result<(), GuestError>;
    /// Appends the contents of pages, all of which exist.
    fn read(&mut self, gfns: &[u64], into: &mut Vec<u8>) -> Result<(), GuestError>;
    /// Fills a page with zeroes.
    fn clear_page(&mut self, gfn: u64) -> Result<(), GuestError>;
    /// Sets what it is told of its CPU.
    fn set_cpu_policy(&mut self, policy: &CpuPolicy) -> Result<(), GuestError>;
    /// Sets its time stamp counter.
    fn set_tsc(&mut self, tsc: &TscInfo) -> Result<(), GuestError>;
    /// Sets a parameter.
    fn set_hvm_param(&mut self, index: u32, value: u64) -> Result<(), GuestError>;
    /// Loads what [`Source::hvm_context`] gave.
    fn load_hvm_context(&mut self, context: &[u8]) -> Result<(), GuestError>;
    /// Grants the console ring and the xenstore ring to the domains that serve them.
    fn seed_grants(&mut self, console: (u64, u16), store: (u64, u16)) -> Result<(), GuestError>;
}
