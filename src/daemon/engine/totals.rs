//! What is counted of a guest beyond the end of its protection.
//!
//! ```text
//!   protect ── the pair's counters ── unprotect ── protect ── those of the next ── now
//!                    └── kept when it makes room ──┴──────── plus ──────┴─▶ totals
//! ```
//!
//! A pair begins its counters at zero, and who watches them from outside would see them fall. What the pair before had is
//! kept in the very step that puts another in its place, so that no status is between the two. The trap is a peer that names
//! a new guest each time it knocks: [`GUESTS_MAX`] are kept, and the one longest ago is forgotten.

use super::{Engine, Role};
use crate::daemon::status::Totals;
use crate::page::PAGE_SIZE;
use std::sync::atomic::Ordering;

/// Guests whose counters are kept.
const GUESTS_MAX: usize = 8;

/// Counters of the pairs that are over, by guest; the latest is last.
#[derive(Debug, Default)]
pub(super) struct Kept(Vec<(String, Totals)>);

impl Kept {
    fn of(&self, guest: &str) -> Totals {
        self.0.iter().find(|(name, _)| name == guest).map_or_else(Totals::default, |(_, totals)| *totals)
    }

    /// A pair of this guest is over.
    pub(super) fn keep(&mut self, guest: &str, pair: &Totals) {
        let totals = self.of(guest).plus(pair);
        self.0.retain(|(name, _)| name != guest);
        if self.0.len() >= GUESTS_MAX {
            self.0.remove(0);
        }
        self.0.push((guest.to_owned(), totals));
    }
}

impl Engine {
    /// What the pair that there is, or was last, sent over its stream and to its disks.
    pub(super) fn sent_bytes(&self) -> (u64, u64) {
        let (mut stream, mut disk) = self.sent_before;
        if let Some(links) = &self.links {
            stream += links.stream_bytes.load(Ordering::Relaxed);
            disk += links.disk_bytes.load(Ordering::Relaxed);
        }
        (stream, disk)
    }

    /// The guest, and what was counted of it in the pair that there is, or was last.
    fn of_pair(&self) -> Option<(&str, Totals)> {
        let (stream, disk) = self.sent_bytes();
        match &self.role {
            Role::Empty | Role::Running(_) => None,
            Role::Primary(role) => {
                let (stats, packets) = (role.side.stats(), role.side.packets());
                let totals = Totals {
                    stream_bytes: Some(stream),
                    disk_bytes: Some(disk),
                    memory_bytes: Some((stats.pages + stats.copy_pages) * PAGE_SIZE as u64),
                    received_pages: None,
                    compared: Some(packets.compared),
                    released: Some(packets.released),
                    held: Some(packets.held),
                    dropped_stale: Some(packets.dropped_stale),
                    lock_step_given_up: role.side.fallback().map(|fallback| fallback.count()),
                };
                Some((&role.guest.name, totals))
            }
            Role::Secondary(role) => {
                let received_pages = Some(role.side.stats().pages);
                let totals = Totals { stream_bytes: Some(stream), received_pages, ..Totals::default() };
                Some((&role.guest.name, totals))
            }
        }
    }

    /// What was counted of the guest that is here.
    pub(super) fn totals(&self) -> Totals {
        match (self.of_pair(), &self.role) {
            (Some((guest, pair)), _) => self.kept.of(guest).plus(&pair),
            (None, Role::Running(guest)) => self.kept.of(&guest.name),
            (None, _) => Totals::default(),
        }
    }

    /// The pair makes room for another, or for none.
    pub(super) fn keep_totals(&mut self) {
        if let Some((guest, pair)) = self.of_pair() {
            let guest = guest.to_owned();
            self.kept.keep(&guest, &pair);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(stream_bytes: u64) -> Totals {
        Totals { stream_bytes: Some(stream_bytes), ..Totals::default() }
    }

    #[test]
    fn pairs_add_up_and_only_so_many_guests_are_remembered() {
        let mut kept = Kept::default();
        kept.keep("web", &pair(3));
        kept.keep("web", &pair(4));
        assert_eq!((kept.of("web"), kept.of("db")), (pair(7), Totals::default()));
        for other in 0..GUESTS_MAX - 1 {
            kept.keep(&format!("guest{other}"), &pair(1));
        }
        // The one that was here last is forgotten last.
        kept.keep("web", &pair(1));
        kept.keep("db", &pair(1));
        assert_eq!((kept.0.len(), kept.of("web"), kept.of("guest0")), (GUESTS_MAX, pair(8), Totals::default()));
    }
}
