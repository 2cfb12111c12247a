//! The integration tests: one binary, a file a behaviour.
//!
//! The product's own parts are joined by [`common::world`]; the hosts in it are real `xl-colo host` processes.
#![allow(clippy::unwrap_used, reason = "clippy's own allowance reaches only functions that are tests themselves")]
#![allow(unreachable_pub, reason = "a binary exports nothing; pub marks what the modules share")]

mod back;
mod block_device;
mod cli;
mod common;
mod compare_command;
mod compare_differential;
mod compare_qemu;
mod config;
mod crowd;
mod demo;
mod device_disks;
mod device_model;
mod digests;
mod disk_link;
mod diverging;
mod events;
mod filter_checkpoint;
mod full_disk;
mod fuzz;
mod garbage;
mod generated;
mod hang;
mod image;
mod list;
mod lock_step;
mod metrics;
mod nbd_as_qemu;
mod nbd_command;
mod nbd_interop;
mod nbd_session;
mod nbd_tls;
mod one_writer;
mod packaging;
mod packet_link;
mod partition;
mod progress;
mod qemu_cases;
mod qemu_pair;
mod qemu_replication;
mod qmp;
mod qmp_primary;
mod qmp_words;
mod remus;
mod report;
mod restart;
mod resync;
mod service;
mod several_disks;
mod sim;
mod slow_medium;
mod status;
mod tidy;
mod top;
mod twice;
mod unprotect;
mod vanish;
