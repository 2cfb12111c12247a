//! The guest, in libxc's words.
//!
//! [`Domain`] is all that replication asks of a hypervisor. It blocks, it owns its buffers, and it knows
//! nothing of checkpoints. Users run two implementations of it: [`embedded`], which needs no hypervisor at
//! all, and `xen` (with the feature of that name), a domain of a real host.
//!
//! The trap: `suspend` must be complete when it returns. A guest that still emits one frame or one disk write
//! after the caller marked the epoch has output in an epoch whose state does not explain it.

pub mod cache;
pub mod embedded;
pub mod vmstate;
#[cfg(feature = "xen")]
pub mod xen;

pub use cache::RamCache;

use crate::bitmap::Bitmap;
use crate::page::Pfn;
use crate::record::RecordError;

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
    /// The device state is not the run of records it should be.
    #[error("device state refused: {0}")]
    BadRecords(#[from] RecordError),
    /// The operation needs a suspended guest.
    #[error("the guest must be suspended first")]
    NotSuspended,
    /// The guest is gone.
    #[error("the guest has stopped")]
    Gone,
    /// The hypervisor, or what runs the guest's devices, refused something.
    #[error("{0}")]
    Hypervisor(String),
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
    /// Its number on this host, where guests have numbers.
    fn id(&self) -> Option<u16> {
        None
    }
    /// Adds the pages the guest has to `into`: not every number below [`Self::nr_pages`] need be one.
    fn present(&mut self, into: &mut Bitmap) -> Result<(), DomainError> {
        into.set_all();
        Ok(())
    }
    /// Stops the guest. On return it executes nothing, emits no frame and writes no block.
    fn suspend(&mut self) -> Result<(), DomainError>;
    /// Lets the guest run on.
    fn resume(&mut self) -> Result<(), DomainError>;
    /// Stops the guest for good: the other host has it now.
    fn stop(&mut self) -> Result<(), DomainError> {
        self.suspend()
    }
    /// Whether the guest can run as two copies in lock-step; if not, why, and what to do.
    fn lockstep(&mut self) -> Result<(), DomainError> {
        Ok(())
    }
    /// Whether the guest, as it is now, can be protected; if not, why, and what to do. [`Self::logdirty`] asks it too.
    fn protectable(&mut self) -> Result<(), DomainError> {
        Ok(())
    }
    /// Switches dirty logging. Switching it on starts from an empty log.
    fn logdirty(&mut self, on: bool) -> Result<(), DomainError>;
    /// Adds the pages written since the last call to `into`, and forgets them (log-dirty CLEAN).
    fn take_dirty(&mut self, into: &mut Bitmap) -> Result<(), DomainError>;
    /// Appends the contents of `pfns` to `into`, in order.
    fn read_pages(&mut self, pfns: &[Pfn], into: &mut Vec<u8>) -> Result<(), DomainError>;
    /// Overwrites `pfns` with `bytes`, one page each. Pages written this way count as dirty.
    fn write_pages(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Result<(), DomainError>;
    /// Everything of the guest that is not in its pages, as a run of [records](crate::record). Needs a suspended
    /// guest.
    fn save_devices(&mut self) -> Result<Vec<u8>, DomainError>;
    /// Whether a run of records holds all that [`Self::load_devices`] needs. Touches nothing.
    fn check_devices(&self, run: &[u8]) -> Result<(), DomainError>;
    /// Replaces everything that is not in the pages. Checks the whole run before it changes anything.
    /// Needs a suspended guest.
    fn load_devices(&mut self, run: &[u8]) -> Result<(), DomainError>;
    /// Tells the guest which generation of itself it is, as a VM generation ID does: after a takeover the
    /// guest announces itself and prompts its peers to send again.
    fn set_generation(&mut self, generation: u64) -> Result<(), DomainError>;
    /// Puts a frame from the network on the guest's receive ring. False when the ring is full.
    fn receive_frame(&mut self, frame: &[u8]) -> bool;
}
