//! Which of the guest's packets may leave, and when. Pure: frames and time go in, frames and causes come out.
//!
//! ```text
//!  guest A ─▶ Proxy ─┬─ Colo   Comparator   held until guest B's frames of the same epoch explain it
//!                    ├─ Remus  EpochBuffer  held until the checkpoint that follows it is owned
//!                    └─ Open                nothing protects the guest, nothing is held
//!
//!  guest B ─▶ Rewriter::from_guest ─▶ wire::encode_tagged ─▶ Comparator::handle_secondary
//!  clients ─▶ mirrored ─▶ Rewriter::from_network ─▶ guest B
//! ```
//!
//! An *epoch* is a number carried by every guest frame: the checkpoints captured so far by the primary, or loaded
//! so far by the secondary, when its guest emitted the frame. Both guests enter an epoch in the same state, so
//! only frames of one epoch can speak about each other.

pub mod buffer;
mod checksum;
#[expect(clippy::module_inception, reason = "the field's word for it: colo-compare")]
pub mod compare;
pub mod connection;
mod datagrams;
pub mod digest;
mod fragments;
mod ipv6;
pub mod key;
mod line;
mod min_ack;
pub mod neighbour;
pub mod notify;
mod options;
pub mod packet;
mod ranges;
mod record;
pub mod rewriter;
mod table;
mod tcp;
pub mod wire;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod rules;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use buffer::{EpochBuffer, Proxy};
pub use compare::{Cause, Comparator, Config, Output, Stats, asked_by};
pub use key::{FlowKey, Service, ServicePort};
pub use record::FlowReport;
pub use rewriter::Rewriter;
