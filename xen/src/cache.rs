//! Mappings that are kept: mapping and unmapping take about a third of what reading a dirty page costs.
//!
//! A granule is 512 frame numbers, aligned, mapped whole with an error for each hole: neighbours are dirtied together,
//! and 2 MiB is what the guest's own page tables deal in. Granules go least recently used first when the budget is full.
//!
//! **The trap: a guest may give a frame back and get another one behind the same number.** Our mapping holds the old
//! frame, so it is not freed, and it would be read for ever. The hypervisor tells nobody of such an exchange but device
//! models. Three things find it:
//! * a frame that we hold counts as the domain's although the guest gave it up, and the new one counts too, so the
//!   domain's total grows by one with each exchange. [`PageCache::revalidate`], called while the guest stands still
//!   and before anything is read, lets everything go when the total has changed at all. With every frame of the guest
//!   held this finds every exchange, because then nothing can lower the total. With a budget smaller than the guest
//!   it can miss an exchange that falls together with the loss of a frame that is not held: so give it the guest's size,
//!   and freeze the guest's balloon target ([`crate::refuse`]);
//! * a frame that the guest gave up and did not get back is a hole to [`crate::Interface::page_types`]: whoever asked
//!   calls [`PageCache::forget`], or the guest could not get its memory back for our holding it;
//! * a hole of the mapping is mapped again before it is believed.

use crate::{Access, DomId, Error, ForeignMemory, Interface, Mapping, PAGE_BYTES};
use std::collections::HashMap;

/// Frames in a granule.
const GRANULE: u64 = 512;

/// Kept mappings of one domain's pages.
pub struct PageCache {
    memory: ForeignMemory,
    domain: DomId,
    access: Access,
    granules: HashMap<u64, Granule>,
    granules_max: usize,
    /// Counts uses, for the least recent one.
    clock: u64,
    /// The domain's frames when everything that is mapped was known to be right.
    total_pages: Option<u64>,
}

struct Granule {
    mapping: Mapping,
    used: u64,
}

impl PageCache {
    /// A cache of one domain's pages that keeps `budget_pages` mapped at most, and 512 at least. Address space is all
    /// that a mapped page costs.
    pub fn new(memory: ForeignMemory, domain: DomId, access: Access, budget_pages: usize) -> Self {
        let granules_max = (budget_pages / GRANULE as usize).max(1);
        Self { memory, domain, access, granules: HashMap::new(), granules_max, clock: 0, total_pages: None }
    }

    /// Lets everything go if the domain's frames may have been exchanged since the last time, and says whether it did.
    /// To be called while the guest stands still, before reading.
    ///
    /// # Errors
    /// The hypervisor's; everything has been let go then.
    pub fn revalidate(&mut self, x: &Interface) -> Result<bool, Error> {
        let domain = self.domain;
        self.revalidate_by(|| Ok(x.existing(domain)?.total_pages))
    }

    fn revalidate_by(&mut self, total_pages: impl Fn() -> Result<u64, Error>) -> Result<bool, Error> {
        let known = self.total_pages.take();
        let now = total_pages().inspect_err(|_| self.granules.clear())?;
        if known == Some(now) || self.granules.is_empty() {
            self.total_pages = Some(now);
            return Ok(false);
        }
        self.granules.clear();
        // Letting go freed what the guest had given up: the total of before is no measure for the next time.
        self.total_pages = Some(total_pages()?);
        Ok(true)
    }

    /// Appends the bytes of each frame to `into`, in order. A frame with no page behind it is zeros, and its index in
    /// `gfns` is appended to `holes`.
    ///
    /// # Errors
    /// The system's, if a granule cannot be mapped at all.
    pub fn read(&mut self, gfns: &[u64], into: &mut Vec<u8>, holes: &mut Vec<usize>) -> Result<(), Error> {
        into.reserve(gfns.len().saturating_mul(PAGE_BYTES));
        for (index, gfn) in gfns.iter().enumerate() {
            match self.granule(*gfn)? {
                Ok((mapping, at)) => {
                    // The granule answers only for frames that it has.
                    mapping.append(at, into);
                }
                Err(_) => {
                    into.resize(into.len() + PAGE_BYTES, 0);
                    holes.push(index);
                }
            }
        }
        Ok(())
    }

    /// Writes a page to each frame, in order.
    ///
    /// # Errors
    /// [`Error::Unmappable`] with the first frame that has no page; those before it have been written.
    /// [`Error::Invalid`] if `bytes` is not a page for each frame, or the cache is for reading.
    pub fn write(&mut self, gfns: &[u64], bytes: &[u8]) -> Result<(), Error> {
        const OPERATION: &str = "write pages";
        if gfns.len().checked_mul(PAGE_BYTES) != Some(bytes.len()) {
            return Err(Error::invalid(OPERATION, format!("{} bytes for {} frames", bytes.len(), gfns.len())));
        }
        if self.access == Access::Read {
            return Err(Error::invalid(OPERATION, "the cache is for reading"));
        }
        let domain = self.domain;
        for (gfn, page) in gfns.iter().zip(bytes.chunks_exact(PAGE_BYTES)) {
            match self.granule(*gfn)? {
                Ok((mapping, at)) => {
                    mapping.copy_in(at, page);
                }
                Err(errno) => return Err(Error::Unmappable { domain, gfn: *gfn, errno }),
            }
        }
        Ok(())
    }

    /// Lets go of the granules of these frames.
    pub fn forget(&mut self, gfns: &[u64]) {
        for gfn in gfns {
            self.granules.remove(&(gfn / GRANULE));
        }
    }

    /// Lets go of everything. To be called before the domain is destroyed: it cannot end while its frames are held.
    pub fn clear(&mut self) {
        self.granules.clear();
    }

    /// Frames mapped now, holes too.
    pub fn mapped_pages(&self) -> usize {
        self.granules.len() * GRANULE as usize
    }

    /// The granule of a frame and the frame's place in it; or why there is no page.
    fn granule(&mut self, gfn: u64) -> Result<Result<(&Mapping, usize), i32>, Error> {
        let number = gfn / GRANULE;
        let at = (gfn % GRANULE) as usize;
        self.clock += 1;
        // A hole may have been filled since: only a fresh mapping is believed.
        if self.granules.get(&number).is_none_or(|granule| granule.mapping.error(at).is_some()) {
            self.granules.remove(&number);
            self.make_room();
            let first = number * GRANULE;
            let gfns: Vec<u64> = (first..first + GRANULE).collect();
            let mapping = self.memory.map(self.domain, self.access, &gfns)?;
            self.granules.insert(number, Granule { mapping, used: 0 });
        }
        let used = self.clock;
        match self.granules.get_mut(&number) {
            Some(granule) => {
                granule.used = used;
                Ok(match granule.mapping.error(at) {
                    None => Ok((&granule.mapping, at)),
                    Some(errno) => Err(errno),
                })
            }
            // It was put there just now.
            None => Ok(Err(libc::EINVAL)),
        }
    }

    fn make_room(&mut self) {
        while self.granules.len() >= self.granules_max {
            let oldest = self.granules.iter().min_by_key(|(_, granule)| granule.used).map(|(number, _)| *number);
            match oldest {
                Some(number) => self.granules.remove(&number),
                None => return,
            };
        }
    }
}
