//! The way into the hypervisor: one libxenctrl handle, shared by everything that is made from it.
//!
//! libxenctrl's functions come from the crate `xenctrl-sys`. It turns C's enums into exhaustive Rust enums, which is
//! undefined when C hands back a value that its headers do not list, so only functions and structs without enums on
//! the way back are used here; libxenguest comes from `libxl-sys`, whose enums are integers.
//!
//! The trap: libxenctrl has one ABI a release and the hypervisor refuses another release's control operations with
//! EACCES, which says nothing. [`Interface::open`] compares the two releases first (xen-colo reference 6.1, 6.2).

use crate::{DomId, Error};
use std::ffi::{CStr, c_int, c_void};
use std::path::Path;
use std::ptr;
use std::sync::Arc;
use xenctrl_sys as xc;

const PRIVCMD: &str = "/dev/xen/privcmd";

/// An open interface to the hypervisor. Cheap to clone; closed with the last clone and the last thing made from it.
#[derive(Clone)]
pub struct Interface(Arc<Handle>);

struct Handle {
    xch: *mut xc::xc_interface,
    logger: *mut libxl_sys::xentoollog_logger,
    versions: Versions,
}

// SAFETY: libxenctrl handles are made for several threads at once unless opened with XC_OPENFLAG_NON_REENTRANT
// (xenctrl.h): the buffer cache has its lock and the rest is a file descriptor.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: both were opened by `open` and nothing uses them any more; either may be null.
        unsafe {
            if !self.xch.is_null() {
                xc::xc_interface_close(self.xch);
            }
            libxl_sys::xtl_logger_destroy(self.logger);
        }
    }
}

/// Releases of the two halves of Xen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The libraries this program runs with, such as (4, 17).
    pub tools: (u32, u32),
    /// The hypervisor.
    pub hypervisor: (u32, u32),
    /// What the hypervisor's builder added, such as `.7-pre (Debian …)`.
    pub extra: String,
}

impl Versions {
    /// The two must be of one release.
    fn check(&self) -> Result<(), Error> {
        if self.tools == self.hypervisor {
            return Ok(());
        }
        Err(Error::VersionMismatch { tools: self.tools, hypervisor: self.hypervisor })
    }
}

/// What the processor and the hypervisor's build can do for guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Runs HVM and PVH guests.
    pub hvm: bool,
    /// Has hardware-assisted paging, which logs the writes of those that use it.
    pub hap: bool,
    /// Has shadow paging, which logs anybody's writes.
    pub shadow: bool,
}

impl Interface {
    /// Opens the hypervisor's control interface.
    ///
    /// # Errors
    /// [`Error::NotControlDomain`], [`Error::VersionMismatch`], or the system's own.
    pub fn open() -> Result<Self, Error> {
        if !Path::new(PRIVCMD).exists() {
            return Err(Error::NotControlDomain);
        }
        let tools = tools_release()?;
        // Every failure comes back as an error with its name; libxenctrl's own lines on top would only alarm.
        // SAFETY: stdio's stderr is valid for the life of the process; the logger is released in Handle's drop.
        let logger: *mut libxl_sys::xentoollog_logger =
            unsafe { libxl_sys::xtl_createlogger_stdiostream(libxl_sys::stderr, libxl_sys::XTL_CRITICAL, 0).cast() };
        let mut handle = Handle {
            xch: ptr::null_mut(),
            logger,
            versions: Versions { tools, hypervisor: (0, 0), extra: String::new() },
        };
        // SAFETY: the logger is valid (or null, for the default one); it outlives the handle.
        handle.xch = unsafe { xc::xc_interface_open(logger.cast(), logger.cast(), 0) };
        if handle.xch.is_null() {
            return Err(Error::last("open the hypervisor's interface", None));
        }
        // SAFETY: XENVER_version takes no argument.
        let version = unsafe { xc::xc_version(handle.xch, xc::XENVER_version as c_int, ptr::null_mut()) };
        if version < 0 {
            return Err(Error::last("ask the hypervisor's version", None));
        }
        handle.versions.hypervisor = split_version(version);
        // XENVER_extraversion fills a char[16].
        let mut extra = [0u8; 16];
        // SAFETY: the buffer has the size that this command fills.
        if unsafe { xc::xc_version(handle.xch, xc::XENVER_extraversion as c_int, extra.as_mut_ptr().cast()) } == 0 {
            let text = extra.split(|byte| *byte == 0).next().unwrap_or(&[]);
            handle.versions.extra = String::from_utf8_lossy(text).into_owned();
        }
        handle.versions.check()?;
        Ok(Self(Arc::new(handle)))
    }

    /// Releases of the libraries and of the hypervisor.
    pub fn versions(&self) -> Versions {
        self.0.versions.clone()
    }

    /// What this host can do for guests.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn abilities(&self) -> Result<Abilities, Error> {
        let mut physinfo = xc::xc_physinfo_t::default();
        // SAFETY: it fills the struct.
        check(unsafe { xc::xc_physinfo(self.xch(), &mut physinfo) }, "ask for the host's abilities", None)?;
        let has = |ability| physinfo.capabilities & ability != 0;
        Ok(Abilities {
            hvm: has(xc::XEN_SYSCTL_PHYSCAP_hvm),
            hap: has(xc::XEN_SYSCTL_PHYSCAP_hap),
            shadow: has(xc::XEN_SYSCTL_PHYSCAP_shadow),
        })
    }

    /// For libxenctrl.
    pub(crate) fn xch(&self) -> *mut xc::xc_interface {
        self.0.xch
    }

    /// The same handle for the functions that `libxl-sys` binds.
    pub(crate) fn guest(&self) -> *mut libxl_sys::xc_interface {
        self.0.xch.cast()
    }

    /// A control operation by number, for those without a function of their own.
    pub(crate) fn domctl(
        &self,
        operation: &'static str,
        domain: DomId,
        domctl: &mut xc::xen_domctl,
    ) -> Result<(), Error> {
        domctl.interface_version = xc::XEN_DOMCTL_INTERFACE_VERSION;
        domctl.domain = domain.0;
        // SAFETY: the struct is whole, and the pointers in it are the caller's hypercall buffers.
        check(unsafe { xc::xc_domctl(self.xch(), domctl) }, operation, domain)
    }
}

/// libxenctrl's convention: negative is failure, and errno says which.
pub(crate) fn check(rc: c_int, operation: &'static str, domain: impl Into<Option<DomId>>) -> Result<(), Error> {
    if rc < 0 { Err(Error::last(operation, domain)) } else { Ok(()) }
}

/// A page-aligned buffer that the hypervisor may read and write: locked, and not lost to a fork.
pub(crate) struct HypercallBuffer {
    interface: Interface,
    buffer: xc::xc_hypercall_buffer_t,
    pages: c_int,
}

// SAFETY: the memory belongs to this struct alone; libxenctrl's cache of such buffers has a lock.
unsafe impl Send for HypercallBuffer {}

impl HypercallBuffer {
    /// At least `bytes` bytes, zeroed.
    pub(crate) fn new(interface: &Interface, bytes: usize) -> Result<Self, Error> {
        let pages = c_int::try_from(bytes.div_ceil(crate::PAGE_BYTES).max(1))
            .map_err(|_| Error::invalid("allocate a hypercall buffer", format!("{bytes} bytes are too many")))?;
        // What C's DECLARE_HYPERCALL_BUFFER makes: no bounce buffer behind it.
        let mut buffer = xc::xc_hypercall_buffer_t {
            hbuf: ptr::null_mut(),
            param_shadow: ptr::null_mut(),
            dir: 0,
            ubuf: ptr::without_provenance_mut::<c_void>(usize::MAX),
            sz: 0,
        };
        // SAFETY: the struct is as libxenctrl expects it; it sets `hbuf`.
        let memory = unsafe { xc::xc__hypercall_buffer_alloc_pages(interface.xch(), &mut buffer, pages) };
        if memory.is_null() {
            return Err(Error::last("allocate a hypercall buffer", None));
        }
        let mut this = Self { interface: interface.clone(), buffer, pages };
        this.bytes_mut().fill(0);
        Ok(this)
    }

    pub(crate) fn raw(&mut self) -> *mut xc::xc_hypercall_buffer_t {
        &mut self.buffer
    }

    pub(crate) fn as_mut_ptr<T>(&mut self) -> *mut T {
        self.buffer.hbuf.cast()
    }

    pub(crate) fn len(&self) -> usize {
        self.pages as usize * crate::PAGE_BYTES
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.len();
        // SAFETY: the allocation has that many bytes, lives as long as self, and the hypervisor writes it only inside
        // of calls that this struct is borrowed for.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.hbuf.cast(), length) }
    }

    /// The buffer as words.
    pub(crate) fn words(&self) -> &[u64] {
        // SAFETY: as in `bytes_mut`; pages are aligned for u64.
        unsafe { std::slice::from_raw_parts(self.buffer.hbuf.cast(), self.len() / 8) }
    }
}

impl Drop for HypercallBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this number of pages, on this handle.
        unsafe { xc::xc__hypercall_buffer_free_pages(self.interface.xch(), &mut self.buffer, self.pages) };
    }
}

/// `XENVER_version` is major << 16 | minor.
fn split_version(version: c_int) -> (u32, u32) {
    let version = version.cast_unsigned();
    (version >> 16, version & 0xffff)
}

/// The release of the libxenctrl that is loaded, from its name: no function tells it.
fn tools_release() -> Result<(u32, u32), Error> {
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    let function = xc::xc_domctl as *const c_void;
    // SAFETY: the address is a function's, the struct is ours.
    let found = unsafe { libc::dladdr(function, &mut info) };
    let name = if found == 0 || info.dli_fname.is_null() {
        String::new()
    } else {
        // SAFETY: dladdr gives a NUL-terminated name that lives as long as the library is loaded.
        let name = unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned();
        // The name may be a link without the release.
        std::fs::canonicalize(&name).map_or(name, |path| path.to_string_lossy().into_owned())
    };
    release_of(&name)
        .ok_or_else(|| Error::invalid("find the tools' release", format!("libxenctrl is {name:?}, which names none")))
}

/// `…/libxenctrl.so.4.17` or `…/libxenctrl.so.4.17.0`.
fn release_of(library: &str) -> Option<(u32, u32)> {
    let mut numbers = library.rsplit_once(".so.")?.1.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_name_their_release() {
        assert_eq!(release_of("/lib/x86_64-linux-gnu/libxenctrl.so.4.17"), Some((4, 17)));
        assert_eq!(release_of("/usr/lib/libxenctrl.so.4.18.0"), Some((4, 18)));
        assert_eq!(release_of("libxenctrl.so.4"), None);
        assert_eq!(release_of("libxenctrl.so"), None);
        assert_eq!(release_of("/opt/x.so.d/libxenctrl.a"), None);
    }

    #[test]
    fn the_loaded_library_has_a_release() {
        let release = tools_release().expect("libxenctrl is loaded");
        assert!(release >= (4, 16), "{release:?}");
    }

    #[test]
    fn releases_must_be_equal() {
        let versions = |tools, hypervisor| Versions { tools, hypervisor, extra: ".7".into() };
        assert!(versions((4, 17), (4, 17)).check().is_ok());
        for (tools, hypervisor) in [((4, 17), (4, 18)), ((4, 17), (4, 16)), ((4, 17), (5, 17))] {
            let error = versions(tools, hypervisor).check().unwrap_err();
            assert!(
                matches!(error, Error::VersionMismatch { tools: t, hypervisor: h } if t == tools && h == hypervisor)
            );
        }
        assert_eq!(split_version(4 << 16 | 17), (4, 17));
    }

    #[test]
    fn outside_of_xen_it_says_so() {
        if Path::new(PRIVCMD).exists() {
            println!("SKIP: this is a Xen control domain");
            return;
        }
        let error = Interface::open().err().expect("there is no hypervisor");
        assert!(error.to_string().starts_with("not a Xen control domain"), "{error}");
    }
}
