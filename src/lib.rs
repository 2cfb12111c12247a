//! `xen-colo` keeps a guest running, with its connections and its disk, when its host dies.
//!
//! The folders are the architecture, and the arrows between them go one way:
//!
//! ```text
//! main → cli, demo → report → daemon → { colo, compare, nbd, qmp, replica, hypervisor } → { clock, page, bitmap, disk, record }
//!      → save_helper → { image } ────────────────────────────────────────→
//! ```
//!
//! - [`clock`], [`page`], [`bitmap`], [`disk`], [`record`], [`carried`]: the words everything else is written in;
//! - [`colo`]: the checkpoint protocol, its heartbeat and its arbitration (pure);
//! - [`compare`]: which of the guest's packets may leave, and when (pure);
//! - [`nbd`]: the network block device protocol, server and client (pure);
//! - [`qmp`]: QEMU's monitor protocol, server and client (pure);
//! - [`image`]: Xen's migration stream, and what libxl and its save helper say to each other (pure);
//! - [`replica`]: the two ends of disk replication, the mirror and the epochs;
//! - [`hypervisor`]: a guest whose memory and devices can be captured and loaded;
//! - [`daemon`]: sockets, threads and timers around all of these; its [`pair`](daemon::pair) joins them without any;
//! - [`save_helper`]: saves and restores a domain for libxl, in the place of its own helper;
//! - [`cli`], [`demo`]: what can be typed, and the main job to look at;
//! - [`report`]: a page of what happened, from the logs of hosts that may be gone;
//! - [`say`]: what the command prints;
//! - [`mutant`]: planted bugs that prove the simulator can see.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod carried;
pub mod cli;
pub mod clock;
pub mod colo;
pub mod compare;
pub mod daemon;
pub mod demo;
pub mod disk;
pub mod hypervisor;
pub mod image;
pub mod mutant;
pub mod nbd;
pub mod page;
pub mod pool;
pub mod qmp;
pub mod record;
pub mod replica;
pub mod report;
pub mod save_helper;
pub mod say;
pub mod scan;
