//! The main job, to be seen without Xen: a pair of hosts, a client, a kill, a report.
//!
//! [`client`] is the load that must notice nothing, [`report`] is what a person reads afterwards.

pub mod client;
pub mod report;
