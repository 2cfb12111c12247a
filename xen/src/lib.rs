//! Xen, safely: what a replication toolstack asks of libxc, libxenforeignmemory, xenstore and libxl.
//!
//! This package knows nothing of COLO. It holds the project's only hand-written `unsafe`, a `SAFETY` beside each.

pub mod qmp;
