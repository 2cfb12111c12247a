//! PAGE_DATA: numbers of pages with their types, then the contents of those that have any.
//!
//! ```text
//! count u32, reserved u32 │ count × { type 4 bits, reserved 8, pfn 52 } │ 4096 bytes for each type that carries data
//! ```
//!
//! The trap: three types carry no contents, so the place of a page's contents follows from the types before it, and
//! a wrong type shifts every page behind it. The record's length is what catches that.

use crate::page::PAGE_SIZE;
use crate::record::{COUNT_BYTES, ENTRY_BYTES, Header, PAGE_DATA, PFN_MASK, put_count};
use bytes::{BufMut, BytesMut};

const TYPE_SHIFT: u32 = 60;

/// The type of a page, the upper four bits of an entry (`XEN_DOMCTL_PFINFO_*` in xen `public/domctl.h`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageType(u8);

impl PageType {
    /// Ordinary memory; the only type with contents that an HVM or PVH guest has.
    pub const NOTAB: Self = Self(0x0);
    /// A frame the hardware has lost.
    pub const BROKEN: Self = Self(0xD);
    /// Memory without contents: allocate it, and no more.
    pub const XALLOC: Self = Self(0xE);
    /// No memory.
    pub const XTAB: Self = Self(0xF);

    /// The type of these four bits, if there is one.
    #[must_use]
    pub fn new(bits: u8) -> Option<Self> {
        matches!(bits, 0..=4 | 9..=0xF).then_some(Self(bits))
    }

    /// Its four bits.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether 4096 bytes of contents travel with it.
    #[must_use]
    pub fn has_contents(self) -> bool {
        self.0 < Self::BROKEN.0
    }

    /// Whether the receiver must have memory there.
    #[must_use]
    pub fn is_memory(self) -> bool {
        self.has_contents() || self == Self::XALLOC
    }
}

/// A page and its type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageEntry {
    /// The page number.
    pub pfn: u64,
    /// What it is.
    pub kind: PageType,
}

impl PageEntry {
    /// The entry as it travels.
    #[must_use]
    pub fn encode(self) -> u64 {
        u64::from(self.kind.0) << TYPE_SHIFT | self.pfn & PFN_MASK
    }

    /// Reads an entry.
    pub fn decode(raw: u64) -> Result<Self, &'static str> {
        let kind = PageType::new((raw >> TYPE_SHIFT) as u8).ok_or("a page type that does not exist")?;
        if raw & !(PFN_MASK | 0xF << TYPE_SHIFT) != 0 {
            return Err("reserved bits of a page entry are set");
        }
        Ok(Self { pfn: raw & PFN_MASK, kind })
    }
}

/// A run of pages: all of a PAGE_DATA record, or a piece of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pages {
    /// Which pages.
    pub entries: Vec<PageEntry>,
    /// The contents of those that have any, in order.
    pub bytes: Vec<u8>,
}

/// Appends everything of a PAGE_DATA record but the contents, which the caller writes behind it. A record has at
/// least one entry.
pub fn encode_page_head(entries: &[PageEntry], out: &mut BytesMut) {
    debug_assert!(!entries.is_empty(), "libxc refuses an empty PAGE_DATA");
    let with_contents = entries.iter().filter(|entry| entry.kind.has_contents()).count();
    let len_bytes = COUNT_BYTES + entries.len() * ENTRY_BYTES + with_contents * PAGE_SIZE;
    out.reserve(Header::BYTES + COUNT_BYTES + entries.len() * ENTRY_BYTES);
    Header { record: PAGE_DATA, len_bytes }.put(out);
    put_count(entries.len(), out);
    for entry in entries {
        out.put_u64_le(entry.encode());
    }
}
