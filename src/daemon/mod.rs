//! The drivers: sockets, timers, tasks and threads around the pure machines.

pub mod address;
pub mod arbiter;
