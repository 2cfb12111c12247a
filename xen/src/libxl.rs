//! libxl: domains as `xl` makes them, with their devices and their entries in xenstore.
//!
//! **A [`Context`] stays in the thread that made it, and belongs into a process of its own.** libxl forks (hotplug
//! scripts, device models), takes SIGCHLD over while it has children and reaps them. An async runtime that runs
//! children of its own does the same, and each would eat the other's. So a program with such a runtime starts a
//! subcommand of its own for every use of libxl.
//!
//! What libxl says goes to standard error, from warnings up. Every call is synchronous; creating a domain waits for
//! hotplug scripts and can take seconds.

use crate::{DomId, Error};
use libxl_sys as xl;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;

/// Devices of one kind. No domain has more.
const DEVICES_MAX: usize = 1024;

/// libxl, opened. Not `Send`: see the module.
pub struct Context {
    ctx: *mut xl::libxl_ctx,
    logger: *mut xl::xentoollog_logger,
}

/// Who serves a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskBackend {
    /// The kernel, from a block device.
    Phy,
    /// blktap.
    Tap,
    /// The device model.
    Qdisk,
    /// Something else, by libxl's number.
    Other(u32),
}

/// A disk of a domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// The name in the guest: `xvda`, `hda`.
    pub vdev: String,
    /// Who serves it.
    pub backend: DiskBackend,
    /// The file, device or word for the script that is behind it. None for an empty drive.
    pub pdev_path: Option<String>,
    /// The hotplug script, if not the usual one.
    pub script: Option<String>,
    /// The guest may write it.
    pub writable: bool,
}

/// A network interface of a domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Nic {
    /// Its number in the domain.
    pub devid: u32,
    /// Its address.
    pub mac: [u8; 6],
    /// The control domain's end: as configured, or `vifD.N`. An emulated card has a tap besides, with `-emu` behind.
    pub ifname: String,
    /// The bridge that its script puts it on.
    pub bridge: Option<String>,
    /// Its hotplug script.
    pub script: Option<String>,
}

/// A domain's configuration; disposed of when dropped.
struct Config(Box<xl::libxl_domain_config>);

impl Config {
    fn new() -> Self {
        let mut config: Box<xl::libxl_domain_config> = Box::default();
        // SAFETY: the struct is of the size that libxl fills.
        unsafe { xl::libxl_domain_config_init(&mut *config) };
        Self(config)
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // SAFETY: initialised by `new`; what hangs on it is libxl's.
        unsafe { xl::libxl_domain_config_dispose(&mut *self.0) };
    }
}

impl Context {
    /// Opens libxl.
    ///
    /// # Errors
    /// libxl's.
    pub fn new() -> Result<Self, Error> {
        // SAFETY: stdio's stderr is valid for the life of the process.
        let logger: *mut xl::xentoollog_logger =
            unsafe { xl::xtl_createlogger_stdiostream(xl::stderr, xl::XTL_WARN, 0).cast() };
        let mut this = Self { ctx: ptr::null_mut(), logger };
        // SAFETY: the pointer is written; the logger outlives the context.
        let rc = unsafe { xl::libxl_ctx_alloc(&mut this.ctx, xl::LIBXL_VERSION as c_int, 0, logger) };
        check(rc, "open libxl", None)?;
        Ok(this)
    }

    /// A domain's configuration as it is now, in libxl's JSON: what `create_paused` takes on another host.
    ///
    /// # Errors
    /// libxl's.
    pub fn config_json(&self, d: DomId) -> Result<String, Error> {
        let mut config = Config::new();
        // SAFETY: the configuration is initialised; a null `how` waits.
        let rc = unsafe { xl::libxl_retrieve_domain_configuration(self.ctx, d.raw(), &mut *config.0, ptr::null()) };
        check(rc, "read the configuration", d)?;
        // SAFETY: the configuration is whole.
        let json = unsafe { xl::libxl_domain_config_to_json(self.ctx, &mut *config.0) };
        owned(json).ok_or(Error::Libxl { operation: "write the configuration", domain: Some(d), code: xl::ERROR_FAIL })
    }

    /// Creates a domain from such a configuration and leaves it paused, having never run. Its disks and its network
    /// interfaces, with their addresses, are those of the configuration; the UUID is too unless a fresh one is asked for,
    /// which it has to be where the other domain lives on the same host (with another name).
    ///
    /// # Errors
    /// libxl's. What was made is destroyed.
    pub fn create_paused(&self, json: &str, fresh_uuid: bool) -> Result<DomId, Error> {
        const OPERATION: &str = "create a domain";
        let text = text(OPERATION, json)?;
        let mut config = Config::new();
        let any_domid = config.0.c_info.domid;
        // SAFETY: the configuration is initialised, the text NUL-terminated.
        let rc = unsafe { xl::libxl_domain_config_from_json(self.ctx, &mut *config.0, text.as_ptr()) };
        check(rc, "parse a configuration", None)?;
        // A configuration that was read from a domain may name that domain's number.
        config.0.c_info.domid = any_domid;
        if fresh_uuid {
            // SAFETY: the field is the struct that it fills.
            unsafe { xl::libxl_uuid_generate(&mut config.0.c_info.uuid) };
        }
        let mut domid = u32::MAX;
        // SAFETY: the configuration is whole; null for both ways of being told waits.
        let rc = unsafe { xl::libxl_domain_create_new(self.ctx, &mut *config.0, &mut domid, ptr::null(), ptr::null()) };
        match (check(rc, OPERATION, None), domain(domid)) {
            (Ok(()), Some(d)) => Ok(d),
            (Ok(()), None) => Err(Error::invalid(OPERATION, format!("libxl gave it number {domid}"))),
            (Err(error), made) => {
                if let Some(d) = made {
                    // The first failure is the one to tell.
                    let _ = self.destroy(d);
                }
                Err(error)
            }
        }
    }

    /// Sets a domain going, its device model first.
    ///
    /// # Errors
    /// libxl's.
    pub fn unpause(&self, d: DomId) -> Result<(), Error> {
        // SAFETY: a null `how` waits.
        check(unsafe { xl::libxl_domain_unpause(self.ctx, d.raw(), ptr::null()) }, "unpause", d)
    }

    /// Stops a domain.
    ///
    /// # Errors
    /// libxl's.
    pub fn pause(&self, d: DomId) -> Result<(), Error> {
        // SAFETY: a null `how` waits.
        check(unsafe { xl::libxl_domain_pause(self.ctx, d.raw(), ptr::null()) }, "pause", d)
    }

    /// Destroys a domain with its devices and entries.
    ///
    /// # Errors
    /// libxl's.
    pub fn destroy(&self, d: DomId) -> Result<(), Error> {
        // SAFETY: a null `how` waits.
        check(unsafe { xl::libxl_domain_destroy(self.ctx, d.raw(), ptr::null()) }, "destroy", d)
    }

    /// Gives a domain another name, if it has the `old` one.
    ///
    /// # Errors
    /// libxl's.
    pub fn rename(&self, d: DomId, old: &str, new: &str) -> Result<(), Error> {
        let (old, new) = (text("rename", old)?, text("rename", new)?);
        // SAFETY: both are NUL-terminated.
        check(unsafe { xl::libxl_domain_rename(self.ctx, d.raw(), old.as_ptr(), new.as_ptr()) }, "rename", d)
    }

    /// The domain of that name, if there is one.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name with a NUL.
    pub fn domid_of(&self, name: &str) -> Result<Option<DomId>, Error> {
        let name = text("find a domain", name)?;
        let mut domid = u32::MAX;
        // SAFETY: the name is NUL-terminated, the number is written.
        let rc = unsafe { xl::libxl_name_to_domid(self.ctx, name.as_ptr(), &mut domid) };
        // It knows one failure: that there is none of that name.
        Ok(if rc == 0 { domain(domid) } else { None })
    }

    /// A domain's name, if there is the domain.
    pub fn name_of(&self, d: DomId) -> Option<String> {
        // SAFETY: a number is all it takes; the text is ours to free.
        owned(unsafe { xl::libxl_domid_to_name(self.ctx, d.raw()) })
    }

    /// A domain's disks.
    ///
    /// # Errors
    /// libxl's.
    pub fn disks(&self, d: DomId) -> Result<Vec<Disk>, Error> {
        let mut count = 0;
        // SAFETY: the number is written.
        let list = unsafe { xl::libxl_device_disk_list(self.ctx, d.raw(), &mut count) };
        // SAFETY: the list has that many entries; it is freed once, by libxl, and null is none.
        unsafe {
            let disks = entries(list, count).map(|disks| disks.iter().map(Disk::new).collect());
            xl::libxl_device_disk_list_free(list, count);
            disks.ok_or(Error::Libxl { operation: "list the disks", domain: Some(d), code: xl::ERROR_FAIL })
        }
    }

    /// A domain's network interfaces.
    ///
    /// # Errors
    /// libxl's.
    pub fn nics(&self, d: DomId) -> Result<Vec<Nic>, Error> {
        let mut count = 0;
        // SAFETY: the number is written.
        let list = unsafe { xl::libxl_device_nic_list(self.ctx, d.raw(), &mut count) };
        // SAFETY: the list has that many entries; it is freed once, by libxl, and null is none.
        unsafe {
            let nics = entries(list, count).map(|nics| nics.iter().map(|nic| Nic::new(d, nic)).collect());
            xl::libxl_device_nic_list_free(list, count);
            nics.ok_or(Error::Libxl { operation: "list the network interfaces", domain: Some(d), code: xl::ERROR_FAIL })
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: both were opened by `new`; libxl takes null for either, and the logger goes last.
        unsafe {
            xl::libxl_ctx_free(self.ctx);
            xl::xtl_logger_destroy(self.logger);
        }
    }
}

impl Disk {
    fn new(disk: &xl::libxl_device_disk) -> Self {
        Self {
            vdev: copied(disk.vdev).unwrap_or_default(),
            backend: match disk.backend {
                xl::LIBXL_DISK_BACKEND_PHY => DiskBackend::Phy,
                xl::LIBXL_DISK_BACKEND_TAP => DiskBackend::Tap,
                xl::LIBXL_DISK_BACKEND_QDISK => DiskBackend::Qdisk,
                other => DiskBackend::Other(other),
            },
            pdev_path: copied(disk.pdev_path).filter(|path| !path.is_empty()),
            script: copied(disk.script).filter(|script| !script.is_empty()),
            writable: disk.readwrite != 0,
        }
    }
}

impl Nic {
    fn new(d: DomId, nic: &xl::libxl_device_nic) -> Self {
        let devid = u32::try_from(nic.devid).unwrap_or(0);
        let some = |text| copied(text).filter(|text| !text.is_empty());
        Self {
            devid,
            mac: nic.mac,
            ifname: some(nic.ifname).unwrap_or_else(|| format!("vif{d}.{devid}")),
            bridge: some(nic.bridge),
            script: some(nic.script),
        }
    }
}

/// A list of devices as a slice. None if libxl could not make one.
///
/// # Safety
/// `list` has `count` entries, or is null.
unsafe fn entries<'a, T>(list: *const T, count: c_int) -> Option<&'a [T]> {
    match usize::try_from(count) {
        Ok(0) => Some(&[]),
        // SAFETY: the caller's word.
        Ok(count) if !list.is_null() => Some(unsafe { std::slice::from_raw_parts(list, count.min(DEVICES_MAX)) }),
        _ => None,
    }
}

/// A number of a guest, as libxl gives it.
fn domain(domid: u32) -> Option<DomId> {
    // Above are the reserved ones, INVALID_DOMID among them.
    u16::try_from(domid).ok().filter(|domid| *domid < 0x7ff0).map(DomId)
}

fn text(operation: &'static str, text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::invalid(operation, "there is a NUL in it"))
}

/// Text that stays C's.
fn copied(text: *const c_char) -> Option<String> {
    // SAFETY: C's text fields are null or NUL-terminated.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// Text that is ours to free.
fn owned(text: *mut c_char) -> Option<String> {
    let copy = copied(text);
    // SAFETY: libxl allocates what it gives away with malloc; null is allowed.
    unsafe { libc::free(text.cast::<c_void>()) };
    copy
}

fn check(rc: c_int, operation: &'static str, domain: impl Into<Option<DomId>>) -> Result<(), Error> {
    if rc == 0 { Ok(()) } else { Err(Error::Libxl { operation, domain: domain.into(), code: rc }) }
}

/// libxl's word for an error.
pub(crate) fn error_name(code: i32) -> &'static str {
    match code {
        xl::ERROR_NONSPECIFIC => "unspecific",
        xl::ERROR_VERSION => "another version",
        xl::ERROR_FAIL => "failed",
        xl::ERROR_NI => "not implemented",
        xl::ERROR_NOMEM => "out of memory",
        xl::ERROR_INVAL => "invalid",
        xl::ERROR_BADFAIL => "failed, and so did undoing it",
        xl::ERROR_GUEST_TIMEDOUT => "the guest did not answer",
        xl::ERROR_TIMEDOUT => "timed out",
        xl::ERROR_NOPARAVIRT => "the guest has no PV drivers",
        xl::ERROR_NOT_READY => "not ready",
        xl::ERROR_LOCK_FAIL => "locked",
        xl::ERROR_DEVICE_EXISTS => "there is such a device",
        xl::ERROR_DOMAIN_NOTFOUND => "there is no such domain",
        xl::ERROR_NOTFOUND => "not found",
        xl::ERROR_DOMAIN_DESTROYED => "the domain was destroyed",
        _ => "see what libxl wrote to standard error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_domains_end_where_the_reserved_ones_begin() {
        assert_eq!(domain(1), Some(DomId(1)));
        assert_eq!(domain(0x7fef), Some(DomId(0x7fef)));
        assert_eq!((domain(0x7ff0), domain(0x1_0001), domain(u32::MAX)), (None, None, None));
    }

    #[test]
    fn c_texts_may_be_missing() {
        assert_eq!((copied(ptr::null()), owned(ptr::null_mut())), (None, None));
        assert_eq!(copied(c"xvda".as_ptr()).as_deref(), Some("xvda"));
    }

    #[test]
    fn devices_are_read_from_c() {
        let mut disk = xl::libxl_device_disk::default();
        // SAFETY: the struct is the one that libxl fills.
        unsafe { xl::libxl_device_disk_init(&mut disk) };
        disk.backend = xl::LIBXL_DISK_BACKEND_PHY;
        disk.vdev = c"xvda".as_ptr().cast_mut();
        disk.pdev_path = c"".as_ptr().cast_mut();
        disk.readwrite = 1;
        let read = Disk::new(&disk);
        assert_eq!(
            (read.vdev.as_str(), read.backend, read.pdev_path, read.writable),
            ("xvda", DiskBackend::Phy, None, true)
        );
        disk.backend = 99;
        assert_eq!(Disk::new(&disk).backend, DiskBackend::Other(99));
        let nic = xl::libxl_device_nic { devid: 2, mac: [0, 22, 62, 0, 0, 1], ..Default::default() };
        assert_eq!(Nic::new(DomId(5), &nic).ifname, "vif5.2");
    }

    #[test]
    fn empty_lists_are_no_failure_and_no_list_is() {
        // SAFETY: nothing is read.
        unsafe {
            assert_eq!(entries::<u8>(ptr::null(), 0), Some(&[][..]));
            assert_eq!(entries::<u8>(ptr::null(), 3), None);
            assert_eq!(entries::<u8>(ptr::null(), -1), None);
        }
    }
}
