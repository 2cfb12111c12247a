//! The guest, in libxc's words.
//!
//! [`Domain`] is all that replication asks of a hypervisor. It blocks, it owns its buffers, and it knows
//! nothing of checkpoints. Users run two implementations of it: [`embedded`], which needs no hypervisor at
//! all, and (with the Xen issue) the adapter over libxc.
//!
//! The trap: `suspend` must be complete when it returns. A guest that still emits one frame or one disk write
//! after the caller marked the epoch has output in an epoch whose state does not explain it.

pub mod cache;
pub mod embedded;
pub mod vmstate;

pub use cache::RamCache;

use crate::bitmap::Bitmap;
use crate::page::Pfn;

/// Why a guest could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// A page number the guest does not have.
    #[error("pfn {pfn:#x} is outside a guest of {nr_pages:#x} pages")]
    NoSuchPage {
        /// The number.
        pfn: u64,
        /// The guest's size.
        nr_pages: u64,
    },
    /// The device state cannot belong to this guest.
    #[error("device state refused: {0}")]
    BadDeviceState(String),
    /// The operation needs a suspended guest.
    #[error("the guest must be suspended first")]
    NotSuspended,
    /// The guest is gone.
    #[error("the guest has stopped")]
    Gone,
    /// The guest cannot be built with this configuration.
    #[error("{0}")]
    BadConfig(String),
}

/// A guest that can be captured and loaded.
///
/// `suspend` and `resume` are the guest's own stop at a checkpoint; both are idempotent.
pub trait Domain: Send {
    /// Size of the guest's memory in pages.
    fn nr_pages(&self) -> u64;
    /// Stops the guest. On return it executes nothing, emits no frame and writes no block.
    fn suspend(&mut self) -> Result<(), DomainError>;
    /// Lets the guest run on.
    fn resume(&mut self) -> Result<(), DomainError>;
    /// Switches dirty logging. Switching it on starts from an empty log.
    fn logdirty(&mut self, on: bool) -> Result<(), DomainError>;
    /// Adds the pages written since the last call to `into`, and forgets them (log-dirty CLEAN).
    fn take_dirty(&mut self, into: &mut Bitmap) -> Result<(), DomainError>;
    /// Appends the contents of `pfns` to `into`, in order.
    fn read_pages(&mut self, pfns: &[Pfn], into: &mut Vec<u8>) -> Result<(), DomainError>;
    /// Overwrites `pfns` with `bytes`, one page each. Pages written this way count as dirty.
    fn write_pages(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Result<(), DomainError>;
    /// Everything of the guest that is not in its pages. Needs a suspended guest.
    fn save_devices(&mut self) -> Result<Vec<u8>, DomainError>;
    /// Replaces everything that is not in the pages. Checks the whole blob before it changes anything.
    /// Needs a suspended guest.
    fn load_devices(&mut self, blob: &[u8]) -> Result<(), DomainError>;
    /// Tells the guest which generation of itself it is, as a VM generation ID does: after a takeover the
    /// guest announces itself and prompts its peers to send again.
    fn set_generation(&mut self, generation: u64) -> Result<(), DomainError>;
    /// Puts a frame from the network on the guest's receive ring. False when the ring is full.
    fn receive_frame(&mut self, frame: &[u8]) -> bool;
}
