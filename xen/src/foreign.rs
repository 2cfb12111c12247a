//! Pages of another domain in this program's address space.
//!
//! Nobody gets a `&[u8]` into a guest's memory: the guest writes it while we look. Bytes are copied out of it and into
//! it, and what was copied may be a mixture of two moments unless the guest stands still.
//!
//! Traps: a frame that could not be mapped leaves a hole in the mapping, and touching it is a SIGBUS, so every access
//! asks that frame's error first. The errors are *negative* errno values. ENOENT means "paged out, ask again". A mapping
//! holds the frames: those of a destroyed domain, and those that a guest has given back, stay until it is dropped.

use crate::{BATCH, DomId, Error, PAGE_BYTES};
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How often a paged-out frame is asked for again, a millisecond apart: a pager that takes longer is not alive.
const PAGED_OUT_TRIES: usize = 50;

/// What a mapping may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Copying out.
    Read,
    /// Copying out and in.
    ReadWrite,
}

/// The way to other domains' pages. Cheap to clone; closed with the last clone and the last mapping.
#[derive(Clone)]
pub struct ForeignMemory(Arc<Handle>);

struct Handle(*mut libxl_sys::xenforeignmemory_handle);

// SAFETY: on Linux the handle is a file descriptor and a list of nothing; mapping is one ioctl (xenforeignmemory.h
// forbids use after fork, not from threads).
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, and no mapping is left: each holds a clone.
        unsafe { libxl_sys::xenforeignmemory_close(self.0) };
    }
}

impl ForeignMemory {
    /// Opens the way.
    ///
    /// # Errors
    /// The system's.
    pub fn open() -> Result<Self, Error> {
        // SAFETY: a null logger is the default one.
        let handle = unsafe { libxl_sys::xenforeignmemory_open(ptr::null_mut(), 0) };
        if handle.is_null() {
            return Err(Error::last("open the way to foreign memory", None));
        }
        Ok(Self(Arc::new(Handle(handle))))
    }

    /// Maps frames, side by side in the order given. A frame that cannot be mapped is a hole with its error.
    ///
    /// # Errors
    /// The system's, if nothing could be mapped at all.
    pub fn map(&self, d: DomId, access: Access, gfns: &[u64]) -> Result<Mapping, Error> {
        let mut parts = Vec::with_capacity(gfns.len().div_ceil(BATCH));
        for chunk in gfns.chunks(BATCH) {
            parts.push(self.map_part(d, access, chunk)?);
        }
        Ok(Mapping { parts, length: gfns.len(), access })
    }

    fn map_part(&self, d: DomId, access: Access, gfns: &[u64]) -> Result<Part, Error> {
        let mut part = self.map_once(d, access, gfns)?;
        for _ in 1..PAGED_OUT_TRIES {
            if !part.errors.contains(&-libc::ENOENT) {
                break;
            }
            thread::sleep(Duration::from_millis(1));
            part = self.map_once(d, access, gfns)?;
        }
        Ok(part)
    }

    fn map_once(&self, d: DomId, access: Access, gfns: &[u64]) -> Result<Part, Error> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let mut errors = vec![0; gfns.len()];
        // SAFETY: both arrays have as many entries as said; the second is written.
        let address = unsafe {
            libxl_sys::xenforeignmemory_map(
                self.0.0,
                d.raw(),
                protection,
                gfns.len(),
                gfns.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        if address.is_null() {
            return Err(Error::last("map frames", d));
        }
        Ok(Part { memory: self.clone(), address, errors })
    }
}

/// Up to [`BATCH`] frames, mapped side by side.
struct Part {
    memory: ForeignMemory,
    address: *mut c_void,
    /// A negative errno for a hole, otherwise 0.
    errors: Vec<c_int>,
}

// SAFETY: the mapping belongs to the process, and this struct is the only way to it.
unsafe impl Send for Part {}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: mapped by `map_once` with this number of frames.
        unsafe { libxl_sys::xenforeignmemory_unmap(self.memory.0.0, self.address, self.errors.len()) };
    }
}

/// Mapped frames. Unmapped when dropped.
pub struct Mapping {
    parts: Vec<Part>,
    length: usize,
    access: Access,
}

impl Mapping {
    /// Frames, holes too.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it is of no frames at all.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Why frame `i` of the list could not be mapped, as an errno; nothing if it was. An `i` past the end is EINVAL.
    pub fn error(&self, i: usize) -> Option<i32> {
        let Some(error) = self.parts.get(i / BATCH).and_then(|part| part.errors.get(i % BATCH)) else {
            return Some(libc::EINVAL);
        };
        (*error != 0).then(|| error.saturating_abs())
    }

    /// Copies frame `i` into `into`, whole or as much as fits. False, and nothing copied, if it is a hole.
    pub fn copy_out(&self, i: usize, into: &mut [u8]) -> bool {
        let Some(page) = self.page(i) else { return false };
        let length = into.len().min(PAGE_BYTES);
        // SAFETY: the page is mapped readable and is PAGE_BYTES long; `into` is ours, so they do not overlap. The guest
        // may write the page meanwhile, which is why no reference to it is ever made.
        unsafe { ptr::copy_nonoverlapping(page, into.as_mut_ptr(), length) };
        true
    }

    /// Appends frame `i` to `into`. False, and nothing appended, if it is a hole.
    pub fn append(&self, i: usize, into: &mut Vec<u8>) -> bool {
        let Some(page) = self.page(i) else { return false };
        into.reserve(PAGE_BYTES);
        // SAFETY: as in `copy_out`; the room was reserved, and every byte of the new length has been written.
        unsafe {
            ptr::copy_nonoverlapping(page, into.as_mut_ptr().add(into.len()), PAGE_BYTES);
            into.set_len(into.len() + PAGE_BYTES);
        }
        true
    }

    /// Copies `from` to the beginning of frame `i`, a page at most. False, and nothing copied, if it is a hole or was
    /// mapped for reading.
    pub fn copy_in(&self, i: usize, from: &[u8]) -> bool {
        let Some(page) = self.page(i).filter(|_| self.access == Access::ReadWrite) else { return false };
        // SAFETY: the page is mapped writable and is PAGE_BYTES long; `from` is ours, so they do not overlap.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), page, from.len().min(PAGE_BYTES)) };
        true
    }

    fn page(&self, i: usize) -> Option<*mut u8> {
        if self.error(i).is_some() {
            return None;
        }
        let part = self.parts.get(i / BATCH)?;
        // SAFETY: inside of the part's mapping: its error array, which `error` looked at, has an entry for each frame.
        Some(unsafe { part.address.cast::<u8>().add(i % BATCH * PAGE_BYTES) })
    }
}
