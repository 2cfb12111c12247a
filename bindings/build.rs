//! Binds the Xen headers as installed, so that the layouts are those of the libraries the program will run with.

use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::{env, process};

/// Functions, by library. Types follow from them.
const FUNCTIONS: [&str; 6] = [
    // libxenguest. What libxenctrl exports comes from the crate xenctrl-sys.
    "xc_cpu_policy_(init|destroy|get_domain|serialise|get_size)|xc_set_domain_cpu_policy|xc_dom_gnttab_seed",
    "xenforeignmemory_.*",
    "xenevtchn_.*",
    "xtl_(createlogger_stdiostream|logger_destroy)",
    "libxl_.*",
    "xlu_(cfg|disk)_.*",
];
const LIBRARIES: [&str; 7] =
    ["xenctrl", "xenguest", "xenforeignmemory", "xenevtchn", "xentoollog", "xenlight", "xlutil"];

fn main() {
    println!("cargo:rerun-if-changed=wrapper.h");
    for library in LIBRARIES {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    let bindings = generate().unwrap_or_else(|why| {
        eprintln!(
            "Cannot bind Xen's libraries: {why}\n\
             Install Xen's headers and Clang's library: on Debian, `apt-get install libxen-dev libclang-dev`."
        );
        process::exit(1);
    });
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs");
    bindings.write_to_file(out).expect("OUT_DIR can be written");
}

fn generate() -> Result<bindgen::Bindings, String> {
    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        // C may return a value that the headers of the day do not list: an exhaustive Rust enum would make that undefined.
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .layout_tests(true)
        .derive_default(true)
        .generate_comments(false)
        .allowlist_var("stderr|INVALID_DOMID|LIBXL_(VERSION|INVALID|DISK|NIC|DOMAIN_TYPE).*")
        .allowlist_var("XTL_.*")
        // Their va_list, and C-only inlines.
        .blocklist_function(".*_v(message|log).*")
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
    for pattern in FUNCTIONS {
        builder = builder.allowlist_function(pattern);
    }
    // A missing libclang is a panic inside of bindgen.
    let quiet = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let result = panic::catch_unwind(AssertUnwindSafe(|| builder.generate()));
    panic::set_hook(quiet);
    match result {
        Ok(Ok(bindings)) => Ok(bindings),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("libclang is missing".into()),
    }
}
