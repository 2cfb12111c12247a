//! Saves and restores a domain for libxl, in the place of libxl's own helper.
//!
//! ```text
//! xl save, migrate, remus …            LIBXL_SAVE_HELPER=/usr/sbin/xl-colo-save-helper
//!   └─ libxl ─ argv ─▶ this ── image ─▶ file, socket or pipe
//!        ▲─ callbacks ──┘ ▲
//!                         └─ the domain: pages, dirty bitmap, state
//! ```
//!
//! [`save`](mod@save) and [`restore`](mod@restore) are the engine, over [`guest::Source`] and [`guest::Target`]; the
//! adapter to Xen is `xen` and needs the feature of that name. The bytes are [`image`](crate::image)'s.
//!
//! Against libxl's helper: reading the guest and writing the stream overlap; a guest that is saved runs while it is
//! copied, and a Remus guest runs on as soon as its pages are copied and not when they are written; pages that do not
//! exist are not asked for, nor mentioned; an image file has holes for zeroes; a round of the live copy that would gain
//! nothing is left out. The stream is the same format, and either end may be libxl's own.

pub mod calls;
pub mod guest;
pub mod restore;
pub mod save;
#[cfg(feature = "xen")]
pub mod sparse;
pub mod stock;
mod streamer;
#[cfg(feature = "xen")]
pub mod xen;

pub use calls::Calls;

use crate::image::ImageError;
use crate::image::helper::HelperError;
use guest::GuestError;
use std::io;

/// Why a domain was not saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Xen said no.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The image cannot be written, or read.
    #[error("{what} the image: {error}")]
    Stream {
        /// Writing or reading.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// The image is not one.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// libxl's command line is not one.
    #[error(transparent)]
    Helper(#[from] HelperError),
    /// libxl is gone.
    #[error("libxl does not answer: {0}")]
    Libxl(io::Error),
    /// libxl could not do its part.
    #[error("libxl could not {what} (it answered {reply})")]
    Declined {
        /// Its part.
        what: &'static str,
        /// Its answer.
        reply: i32,
    },
    /// libxl asked for something that it does not listen to.
    #[error("libxl does not let its helper {0}, which this kind of stream needs")]
    NotExpected(&'static str),
    /// libxl changed its mind (SIGTERM).
    #[error("cancelled")]
    Cancelled,
    /// Something that is not done here.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The image is whole, and still not a domain.
    #[error("the image does not make a domain: {0}")]
    Incomplete(&'static str),
}

impl Failure {
    /// The errno that libxl is told.
    #[must_use]
    pub fn errno(&self) -> i32 {
        const EIO: i32 = 5;
        const EINVAL: i32 = 22;
        const EOPNOTSUPP: i32 = 95;
        const ECANCELED: i32 = 125;
        match self {
            Self::Guest(error) => error.errno,
            Self::Stream { error, .. } | Self::Libxl(error) => error.raw_os_error().unwrap_or(EIO),
            Self::Image(_) | Self::Helper(_) | Self::Declined { .. } | Self::Incomplete(_) => EINVAL,
            Self::NotExpected(_) | Self::Unsupported(_) => EOPNOTSUPP,
            Self::Cancelled => ECANCELED,
        }
    }
}
