//! The drivers: sockets, timers, tasks and threads around the pure machines.
//!
//! ```text
//!  host      one process: control socket, peer listener, switch port, engine
//!  engine    the thread that owns the guest and its machine; pair/ is what it runs, without any wire
//!  links     the four connections of a pair        address, frames   where they lead and how they are framed
//!  guest     the guest and its host-side devices   nbd               the replica's server
//!  check     whether this host is able              compare           the comparator behind QEMU's sockets
//!  events    what happened, kept and written down    operator, top   what an operator's commands do
//!  filter    QEMU's network filters on an interface of this host, towards that comparator
//!  remus, receive   xl's way to protect a guest, and its far end
//!  arbiter, fence   who may go on alone            control, status   what an operator asks and hears
//!  qmp       the same orders over QEMU's monitor protocol, and a replica alone for a QEMU that is the primary
//!  live, manager   what SIGHUP may change, and what systemd is told    protected   what a host that was killed left
//!  durable   small files that are replaced whole    metrics           what Prometheus reads
//!  switch, edge     the demo's network
//! ```

mod accept;
pub mod address;
pub mod arbiter;
pub mod check;
pub mod compare;
pub mod control;
mod durable;
pub mod edge;
pub mod engine;
pub mod events;
mod exec;
pub mod fence;
pub mod filter;
pub mod frames;
pub mod guest;
pub mod hashes;
pub mod host;
pub mod links;
pub mod live;
pub mod manager;
pub mod metrics;
pub mod nbd;
#[cfg(not(feature = "xen"))]
pub mod no_xen;
pub mod operator;
pub mod pair;
pub mod protected;
pub mod qmp;
pub mod receive;
pub mod remus;
pub mod status;
pub mod switch;
pub mod top;
#[cfg(feature = "xen")]
pub mod xen;

#[cfg(not(feature = "xen"))]
pub use no_xen as xen;

use crate::clock::Instant;
use std::sync::LazyLock;
use std::time::SystemTime;

static ORIGIN: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);

/// The process's monotonic clock. It goes on while the process is stopped.
#[must_use]
pub fn engine_clock() -> Instant {
    Instant::from_micros(ORIGIN.elapsed().as_micros() as u64)
}

/// The wall clock, in µs of Unix time: for events that two processes must agree on, never for deadlines.
#[must_use]
pub fn unix_us() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
