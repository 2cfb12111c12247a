//! Safe Xen for a toolstack: everything that a program in the control domain needs to hold a guest still, read it,
//! copy it and start its copy. One module a concern; the only hand-written `unsafe` of the project. It knows nothing
//! of replication.
//!
//! | module | what it wraps |
//! |---|---|
//! | [`Interface`] | libxenctrl and libxenguest: domains, memory, HVM state, TSC, CPU policy, resuming |
//! | [`LogDirty`] | the hypervisor's log of written pages |
//! | [`ForeignMemory`], [`PageCache`] | a guest's pages |
//! | [`SuspendChannel`] | the event "the guest has suspended" |
//! | [`Store`] | xenstore |
//! | [`libxl`] | domains as `xl` makes them |
//! | [`hvm`] | the HVM context blob, without Xen |
//! | [`refuse`] | which domains cannot be protected, and why |
//! | [`qmp`] | the device model, by its monitor |
//! | [`packet`] | whole frames of a network interface |
//! | [`window`] | bytes of a file on their way to a socket |
//! | [`lock`] | single bytes of a file, as QEMU locks them |
//!
//! Only the last three can be built where no Xen is installed: all others are feature `hypervisor`.
//!
//! Guards release on drop and never panic there. Every handle is `Send`: any thread may use it, one at a time
//! ([`Interface`] and [`ForeignMemory`] also from several at once). [`libxl::Context`] is the exception and says why.
//!
//! The trap of the whole: most of these libraries have one ABI a Xen release, and the hypervisor answers a tool of
//! another release with EACCES. [`Interface::open`] looks first and says it in words.

#[cfg(feature = "hypervisor")]
mod cache;
#[cfg(feature = "hypervisor")]
mod domain;
#[cfg(feature = "hypervisor")]
mod error;
#[cfg(feature = "hypervisor")]
mod foreign;
#[cfg(feature = "hypervisor")]
pub mod hvm;
#[cfg(feature = "hypervisor")]
mod interface;
#[cfg(feature = "hypervisor")]
pub mod libxl;
pub mod lock;
#[cfg(feature = "hypervisor")]
mod logdirty;
#[cfg(feature = "hypervisor")]
mod memory;
pub mod packet;
#[cfg(feature = "hypervisor")]
pub mod qmp;
#[cfg(feature = "hypervisor")]
pub mod refuse;
#[cfg(feature = "hypervisor")]
mod resume;
#[cfg(feature = "hypervisor")]
mod state;
#[cfg(feature = "hypervisor")]
mod store;
#[cfg(feature = "hypervisor")]
mod suspend;
pub mod window;

#[cfg(feature = "hypervisor")]
pub use cache::PageCache;
#[cfg(feature = "hypervisor")]
pub use domain::{DomId, DomainInfo, SHUTDOWN_CRASH, SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_SUSPEND};
#[cfg(feature = "hypervisor")]
pub use error::Error;
#[cfg(feature = "hypervisor")]
pub use foreign::{Access, ForeignMemory, Mapping};
#[cfg(feature = "hypervisor")]
pub use interface::{Abilities, Interface, Versions};
#[cfg(feature = "hypervisor")]
pub use logdirty::LogDirty;
#[cfg(feature = "hypervisor")]
pub use memory::PageType;
#[cfg(feature = "hypervisor")]
pub use resume::ExtendedState;
#[cfg(feature = "hypervisor")]
pub use state::{CpuPolicy, Msr, TscInfo};
#[cfg(feature = "hypervisor")]
pub use store::Store;
#[cfg(feature = "hypervisor")]
pub use suspend::SuspendChannel;

/// Bytes in a page of a guest.
pub const PAGE_BYTES: usize = 4096;

/// Frames in one call: `XEN_DOMCTL_getpageframeinfo3` answers more with E2BIG.
pub const BATCH: usize = 1024;
