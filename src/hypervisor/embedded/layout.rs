//! What lies where in guest memory, scaled by its size.
//!
//! ```text
//! page 0     boot page
//! ...        connection table, 256 bytes a connection
//! ...        receive and transmit rings, one pair a connection
//! ...        key index, a quarter of the memory, 128 bytes a slot
//! ...        free
//! ```
//!
//! The trap: two hosts must agree on it to the byte, or a loaded guest reads its index out of a ring. It is a
//! pure function of the number of pages, and the number of pages is checked when devices are loaded.

use super::kv::SLOT_BYTES;
use super::tcb::TCB_BYTES;
use crate::page::PAGE_SIZE;

/// The smallest guest, in pages: 1 MiB.
pub const MIN_RAM_PAGES: u64 = 256;

/// Longest request line and headers together, in bytes.
pub const HEAD_MAX_BYTES: usize = 8192;

/// Addresses and sizes, in bytes unless the name says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of connections the guest can hold at a time.
    pub connections: usize,
    /// Where the connection table starts.
    pub tcb_at: usize,
    /// Where the receive rings start.
    pub rx_at: usize,
    /// Size of one receive ring: one whole request of the largest kind.
    pub rx_bytes: usize,
    /// Where the transmit rings start.
    pub tx_at: usize,
    /// Size of one transmit ring: one whole response of the largest kind.
    pub tx_bytes: usize,
    /// Largest value the service stores.
    pub body_max_bytes: usize,
    /// Where the key index starts.
    pub index_at: usize,
    /// Slots in the key index, a power of two.
    pub index_slots: usize,
}

impl Layout {
    /// The layout of a guest of `ram_pages` pages; nothing below [`MIN_RAM_PAGES`] or beyond what can be addressed.
    #[must_use]
    pub fn for_ram(ram_pages: u64) -> Option<Self> {
        if ram_pages < MIN_RAM_PAGES {
            return None;
        }
        let pages = usize::try_from(ram_pages).ok()?;
        let ram_bytes = pages.checked_mul(PAGE_SIZE)?;
        let connections = (pages / 128).clamp(8, 256);
        let body_max_bytes = pages.saturating_mul(16).clamp(4096, 65536) / PAGE_SIZE * PAGE_SIZE;
        let rx_bytes = HEAD_MAX_BYTES + body_max_bytes;
        let tx_bytes = PAGE_SIZE + body_max_bytes;
        let tcb_at = PAGE_SIZE;
        let rx_at = tcb_at + (connections * TCB_BYTES).next_multiple_of(PAGE_SIZE);
        let tx_at = rx_at + connections * rx_bytes;
        let index_at = tx_at + connections * tx_bytes;
        let most_slots = ram_bytes / 4 / SLOT_BYTES;
        let index_slots = 1 << most_slots.ilog2();
        let layout =
            Self { connections, tcb_at, rx_at, rx_bytes, tx_at, tx_bytes, body_max_bytes, index_at, index_slots };
        assert!(layout.end() <= ram_bytes, "the layout fits in the memory it was made for");
        Some(layout)
    }

    /// The first byte nothing is laid in.
    #[must_use]
    pub fn end(&self) -> usize {
        self.index_at + self.index_slots * SLOT_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_of_memory_has_room_for_its_layout() {
        for pages in (256..20_000).chain([1 << 20, 1 << 30]) {
            let layout = Layout::for_ram(pages).unwrap();
            assert!(layout.connections >= 8 && layout.body_max_bytes >= 4096);
            assert!(layout.index_slots.is_power_of_two());
        }
        assert_eq!(Layout::for_ram(255), None);
        assert_eq!(Layout::for_ram(u64::MAX), None);
        let big = Layout::for_ram(16384).unwrap();
        assert!(big.connections >= 64 && big.body_max_bytes == 65536, "{big:?}");
    }
}
