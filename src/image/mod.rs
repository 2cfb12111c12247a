//! Xen's migration stream: what a saved domain consists of, and what libxl says around it.
//!
//! ```text
//! outer    LibxlFmt header, LIBXC_CONTEXT, [image], emulator records, END or CHECKPOINT_END …     libxl's
//! image    image header, domain header, static records, STATIC_DATA_END,
//!          PAGE_DATA …, TSC_INFO, HVM_CONTEXT, HVM_PARAMS, END                                    libxc's
//!          (Remus: CHECKPOINT for END; the outer layer's turn; PAGE_DATA … CHECKPOINT again, for ever)
//! helper   what the process that writes or reads the image says to libxl while it does            libxl's
//! ```
//!
//! Sources: xen `docs/specs/libxc-migration-stream.pandoc`, `docs/specs/libxl-migration-stream.pandoc`, and what Xen
//! 4.17's own tools write. Images of version 2 (before Xen 4.14) and 3 are read, version 3 is written.
//!
//! The trap: one descriptor carries both layers. Whoever reads a byte past END or CHECKPOINT has eaten libxl's next
//! record, so [`decoder::Decoder`] says how many bytes it wants, and gets no more.
//!
//! Zero pages are sent in full. XALLOC ("allocate only") would do for a page that no earlier record filled, if pages
//! came zeroed from Xen; they do not: a page that a living domain gave back, such as dom0's balloon, is scrubbed by
//! nobody unless Xen was booted with `scrub-domheap` (xen `common/page_alloc.c`).

pub mod decoder;
pub mod header;
pub mod helper;
pub mod outer;
pub mod pages;
pub mod precopy;
pub mod records;

pub use decoder::{Decoder, Item};
pub use header::{DomainHeader, DomainType, ImageHeader};
pub use pages::{PageEntry, PageType, Pages};
pub use records::{HvmParam, Msr, Record, TscInfo};

/// Largest record accepted, in bytes; libxc's own limit.
pub const RECORD_MAX_BYTES: usize = 128 << 20;

/// Why an image was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ImageError {
    /// The first 24 bytes are not an image's.
    #[error("this is no migration image: {0}")]
    NotAnImage(&'static str),
    /// A version that is not read.
    #[error("migration image of version {0}; versions 2 and 3 are understood")]
    Version(u32),
    /// A body in the other byte order.
    #[error("the migration image is big-endian, and x86 is not")]
    BigEndian,
    /// A domain header that cannot be.
    #[error("bad domain header: {0}")]
    BadDomain(&'static str),
    /// A record this version cannot do without and does not know.
    #[error("record type {0:#x} is mandatory and unknown; the sender is newer than this receiver")]
    UnknownRecord(u32),
    /// A record that its type cannot have.
    #[error("record type {record:#x} of {len_bytes} bytes is malformed: {why}")]
    BadRecord {
        /// Its type.
        record: u32,
        /// Its length.
        len_bytes: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A record where it cannot be.
    #[error("record type {record:#x} is out of place: {why}")]
    OutOfPlace {
        /// Its type.
        record: u32,
        /// Why not there.
        why: &'static str,
    },
}
