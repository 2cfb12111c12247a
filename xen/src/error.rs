//! What can go wrong, in words that name the operation, the domain, the system's error and, where there is one, the
//! remedy.

use crate::DomId;
use std::fmt;
use std::io;

/// A failed operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no `/dev/xen/privcmd`.
    #[error(
        "not a Xen control domain: there is no /dev/xen/privcmd (run in dom0, as root, with the module xen-privcmd loaded)"
    )]
    NotControlDomain,
    /// The libraries and the hypervisor are of different releases: every control operation would fail with EACCES.
    #[error("tools {}.{}, hypervisor {}.{}: install the matching xen-utils-{}.{} and libxen packages, or boot the hypervisor of the tools", .tools.0, .tools.1, .hypervisor.0, .hypervisor.1, .hypervisor.0, .hypervisor.1)]
    VersionMismatch {
        /// Release of the libraries.
        tools: (u32, u32),
        /// Release of the hypervisor.
        hypervisor: (u32, u32),
    },
    /// A call of the hypervisor or of the system failed.
    #[error("{operation}{}: {}{}", On(*.domain), io::Error::from_raw_os_error(*.errno), Remedy(.remedy))]
    Os {
        /// What was tried.
        operation: &'static str,
        /// On which domain, if on one.
        domain: Option<DomId>,
        /// The system's error number.
        errno: i32,
        /// What helps, where that is known.
        remedy: Option<&'static str>,
    },
    /// There is no such domain.
    #[error("there is no domain {0}")]
    NoSuchDomain(DomId),
    /// Only a domain that stopped inside its own suspend call can be resumed cooperatively: the resume writes the
    /// call's result into a register.
    #[error("domain {domain} is not suspended ({}): it cannot be resumed as if its suspend had been cancelled", Shutdown(*.shutdown))]
    NotSuspended {
        /// The domain.
        domain: DomId,
        /// Why it is shut down, if it is.
        shutdown: Option<u8>,
    },
    /// The domain has more frames than the caller's bitmap covers.
    #[error("domain {domain} now has {now} frames, the bitmap covers {covered}: give it a longer one")]
    NrGpfnsGrew {
        /// The domain.
        domain: DomId,
        /// Frames it has now.
        now: u64,
        /// Frames the bitmap has bits for.
        covered: u64,
    },
    /// A frame could not be mapped.
    #[error("domain {domain}: frame {gfn:#x} cannot be mapped: {}", io::Error::from_raw_os_error(*.errno))]
    Unmappable {
        /// The domain.
        domain: DomId,
        /// The first such frame.
        gfn: u64,
        /// The system's error number.
        errno: i32,
    },
    /// Something was handed over that cannot be right: a length, a frame number, a blob.
    #[error("{operation}: {what}")]
    Invalid {
        /// What was tried.
        operation: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// An HVM context blob is not one.
    #[error("HVM context: {0}")]
    Context(#[from] crate::hvm::ContextError),
    /// xenstore refused.
    #[error("xenstore: {operation} {path}: {error}")]
    Store {
        /// What was tried.
        operation: &'static str,
        /// On which node.
        path: String,
        /// What it said.
        error: io::Error,
    },
    /// libxl refused; its own words went to standard error.
    #[error("{operation}{}: libxl error {code} ({})", On(*.domain), crate::libxl::error_name(*.code))]
    Libxl {
        /// What was tried.
        operation: &'static str,
        /// On which domain, if on one.
        domain: Option<DomId>,
        /// libxl's `ERROR_*`.
        code: i32,
    },
}

impl Error {
    /// The system's error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Os { errno, .. } | Self::Unmappable { errno, .. } => Some(*errno),
            Self::Store { error, .. } => error.raw_os_error(),
            _ => None,
        }
    }

    /// The failure that `errno` tells of now. Call it right after the failed call.
    pub(crate) fn last(operation: &'static str, domain: impl Into<Option<DomId>>) -> Self {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        Self::os(operation, domain, errno)
    }

    pub(crate) fn os(operation: &'static str, domain: impl Into<Option<DomId>>, errno: i32) -> Self {
        Self::Os { operation, domain: domain.into(), errno, remedy: usual_remedy(errno) }
    }

    /// The same with what helps here.
    pub(crate) fn with_remedy(self, remedy: &'static str) -> Self {
        match self {
            Self::Os { operation, domain, errno, .. } => Self::Os { operation, domain, errno, remedy: Some(remedy) },
            other => other,
        }
    }

    pub(crate) fn invalid(operation: &'static str, what: impl Into<String>) -> Self {
        Self::Invalid { operation, what: what.into() }
    }
}

/// What an errno means whatever was tried.
fn usual_remedy(errno: i32) -> Option<&'static str> {
    match errno {
        libc::EACCES => Some("the tools are of another Xen release than the hypervisor"),
        libc::EPERM => Some("run as root in the control domain"),
        libc::ESRCH => Some("the domain is gone"),
        _ => None,
    }
}

struct On(Option<DomId>);

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(domain) => write!(f, " of domain {domain}"),
            None => Ok(()),
        }
    }
}

struct Remedy<'a>(&'a Option<&'static str>);

impl fmt::Display for Remedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(remedy) => write!(f, " ({remedy})"),
            None => Ok(()),
        }
    }
}

struct Shutdown(Option<u8>);

impl fmt::Display for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(reason) => write!(f, "it shut down with reason {reason}"),
            None => f.write_str("it has not shut down"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_where_and_how_to_help() {
        let error = Error::os("enable log-dirty", DomId(7), libc::EOPNOTSUPP).with_remedy("use hap=1");
        assert_eq!(
            error.to_string(),
            "enable log-dirty of domain 7: Operation not supported (os error 95) (use hap=1)"
        );
        assert_eq!(error.errno(), Some(libc::EOPNOTSUPP));
        let gone = Error::os("pause", DomId(3), libc::ESRCH).to_string();
        assert_eq!(gone, "pause of domain 3: No such process (os error 3) (the domain is gone)");
        assert_eq!(
            Error::NotSuspended { domain: DomId(2), shutdown: Some(3) }.to_string(),
            "domain 2 is not suspended (it shut down with reason 3): it cannot be resumed as if its suspend had been cancelled"
        );
    }

    #[test]
    fn a_mismatch_names_both_releases_and_the_package() {
        let error = Error::VersionMismatch { tools: (4, 17), hypervisor: (4, 18) };
        assert_eq!(
            error.to_string(),
            "tools 4.17, hypervisor 4.18: install the matching xen-utils-4.18 and libxen packages, \
             or boot the hypervisor of the tools"
        );
    }
}
