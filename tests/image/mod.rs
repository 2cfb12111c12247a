//! Xen's migration image and the save helper, without Xen.
//!
//! - [`format`]: what is written is read back, and what is not an image is refused;
//! - [`words`]: what libxl and its helper say to each other;
//! - [`fake`]: a domain, and a libxl, in this process;
//! - [`engine`]: saving and restoring between them; [`oracle`]: Xen's own verifier reads what we write.

mod engine;
mod fake;
mod format;
mod oracle;
mod words;
