//! libxl's own helper, for what is not done here: PV domains.
//!
//! A PV domain's page tables hold machine frame numbers that must be rewritten both ways, and Debian's Xen has no log
//! of the pages they write. Nothing is gained there, so nothing is done: the process becomes libxl's helper, with the
//! same arguments and descriptors, before it has said or read anything.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

const NAME: &str = "libxl-save-helper";

/// Where distributions put it, for tools of version `tools` (major, minor).
#[must_use]
pub fn candidates(tools: (u32, u32)) -> Vec<PathBuf> {
    let (major, minor) = tools;
    [
        format!("/usr/lib/xen-{major}.{minor}/bin"),
        "/usr/libexec/xen/bin".into(),
        "/usr/lib/xen/bin".into(),
        "/usr/local/libexec/xen/bin".into(),
        "/usr/local/lib/xen/bin".into(),
    ]
    .map(|folder| PathBuf::from(folder).join(NAME))
    .into()
}

/// Becomes libxl's helper. Returns only when there is none.
#[must_use]
pub fn become_stock(arguments: &[String], tools: (u32, u32)) -> io::Error {
    let found = candidates(tools).into_iter().find(|path| path.is_file());
    let Some(path) = found else {
        return io::Error::new(io::ErrorKind::NotFound, format!("no {NAME} of Xen {}.{} here", tools.0, tools.1));
    };
    Command::new(path).args(arguments).exec()
}
