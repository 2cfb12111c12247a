//! Bindings to Xen's toolstack libraries as installed, made by bindgen at build time: libxenguest, libxenforeignmemory,
//! libxenevtchn, libxentoollog, libxl and libxlutil, and the one function of libxenctrl that no header declares. The
//! rest of libxenctrl is the crate `xenctrl-sys`. Nothing here is safe and nothing here thinks: that is package `xen`.
//!
//! The trap: libxenctrl, libxenguest and libxl have one ABI a release. A program built with one release's headers must
//! run with that release's libraries, which the sonames (`libxenlight.so.4.17`) see to.

#![allow(missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#![allow(unsafe_op_in_unsafe_fn, unreachable_pub, clippy::all, clippy::undocumented_unsafe_blocks)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));

unsafe extern "C" {
    /// Types of up to 1024 frames, in place: exported by libxenctrl, declared in no installed header (Xen 4.17,
    /// `tools/libs/ctrl/xc_private.c`).
    pub fn xc_get_pfn_type_batch(
        xch: *mut xc_interface,
        dom: u32,
        num: std::os::raw::c_uint,
        pfns: *mut xen_pfn_t,
    ) -> std::os::raw::c_int;
}
