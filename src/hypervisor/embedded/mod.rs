//! A guest that needs no hypervisor: real pages, a real dirty bitmap, a NIC and a disk.
//!
//! ```text
//! frames ─▶ receive ring ─▶ net ─▶ tcp ─▶ service (http) ─▶ kv ─▶ disk
//! frames ◀────────────────── net ◀─ tcp ◀─┘
//!                 │ all state: pages of `Ram` + one `Registers` file + the receive ring
//! ```
//!
//! - [`ram`]: the pages and their dirty log; [`layout`]: what lies where in them;
//! - [`machine`]: the guest itself, pure: frames and time in, frames out; [`devices`]: what is saved beside pages;
//! - [`kv`]: the service's record log on the disk, and an oracle that reads it without any guest;
//! - [`domain`]: the machine on a thread of its own, as a [`Domain`](super::Domain).
//!
//! The trap: anything the guest remembers outside its pages and registers is lost at a takeover. Derived values
//! (the next timer, who owns which port) are therefore computed from the pages each time, never cached.

pub mod copies;
pub mod devices;
pub mod domain;
pub mod kv;
pub mod layout;
pub mod machine;
pub mod ram;

mod http;
mod net;
mod service;
mod tcb;
mod tcp;
#[cfg(test)]
mod tests;
mod wire;
mod words;

pub use domain::{Embedded, NicHandle};
pub use machine::{Machine, MachineConfig};
