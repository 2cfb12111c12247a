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
//!
//! Guards release on drop and never panic there. Every handle is `Send`: any thread may use it, one at a time
//! ([`Interface`] and [`ForeignMemory`] also from several at once). [`libxl::Context`] is the exception and says why.
//!
//! The trap of the whole: most of these libraries have one ABI a Xen release, and the hypervisor answers a tool of
//! another release with EACCES. [`Interface::open`] looks first and says it in words.

mod cache;
mod domain;
mod error;
mod foreign;
pub mod hvm;
mod interface;
pub mod libxl;
mod logdirty;
mod memory;
pub mod packet;
pub mod qmp;
pub mod refuse;
mod resume;
mod state;
mod store;
mod suspend;

pub use cache::PageCache;
pub use domain::{DomId, DomainInfo, SHUTDOWN_CRASH, SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_SUSPEND};
pub use error::Error;
pub use foreign::{Access, ForeignMemory, Mapping};
pub use interface::{Abilities, Interface, Versions};
pub use logdirty::LogDirty;
pub use memory::PageType;
pub use resume::ExtendedState;
pub use state::{CpuPolicy, Msr, TscInfo};
pub use store::Store;
pub use suspend::SuspendChannel;

/// Bytes in a page of a guest.
pub const PAGE_BYTES: usize = 4096;

/// Frames in one call: `XEN_DOMCTL_getpageframeinfo3` answers more with E2BIG.
pub const BATCH: usize = 1024;
