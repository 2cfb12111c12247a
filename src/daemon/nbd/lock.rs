//! The locks by which QEMU's programs keep out of each other's images, on those of `xl-colo nbd` and `xl-colo qmp`.
//!
//! ```text
//!   byte 100 + n   held, shared, by who does what n stands for         n: 0 reads what is consistent   2 rewrites what is there
//!   byte 200 + n   held, shared, by who lets nobody else do it            1 writes                      3 resizes
//! ```
//!
//! Who wants to do n looks for a lock on 200 + n, who lets nobody do it for one on 100 + n. We write, and let nobody else
//! write or resize; who only reads lets nobody either: what changes under him is no disk. Our own processes have a lock of
//! their own beside these (`FileDisk::try_lock`).
//!
//! The trap: a guest's device model has its image open, and hands it over, while the guest's host has it open as well, or
//! whoever serves the PV disk of a guest without a host. So neither locks an image in this way.
//!
//! Source: qemu `block/file-posix.c`, `include/block/block-common.h`.

use crate::disk::FileDisk;
use rustix::io::Errno;
use std::io;
use std::os::fd::AsFd;
use xen::lock::{free_byte, is_locked_elsewhere, share_byte};

/// What a file system says that knows no such locks.
const NO_LOCKS: [Errno; 3] = [Errno::INVAL, Errno::NOLCK, Errno::OPNOTSUPP];
const DOES: u64 = 100;
const LETS_NOBODY: u64 = 200;
const READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// Takes the locks, for as long as the file is open. What another process keeps from us, in QEMU's words, if any does: then
/// nothing is taken.
pub(in crate::daemon) fn lock(disk: &FileDisk, read_only: bool) -> io::Result<Option<&'static str>> {
    let file = disk.as_fd();
    let does: &[u64] = if read_only { &[READ] } else { &[READ, WRITE] };
    let lets_nobody = [WRITE, RESIZE];
    let taken = || does.iter().map(|n| DOES + n).chain(lets_nobody.iter().map(|n| LETS_NOBODY + n));
    // Before a look at the others': of two who come at the same time one at least is told.
    for byte in taken() {
        match share_byte(file, byte) {
            // A file system without such locks: QEMU goes without them there, too.
            Err(error)
                if error.raw_os_error().is_some_and(|errno| NO_LOCKS.contains(&Errno::from_raw_os_error(errno))) =>
            {
                return Ok(None);
            }
            taken => taken?,
        }
    }
    let mut refused = None;
    for n in does {
        if is_locked_elsewhere(file, LETS_NOBODY + n)? {
            refused = refused.or(Some(if *n == WRITE { "\"write\"" } else { "\"consistent read\"" }));
        }
    }
    for n in lets_nobody {
        if is_locked_elsewhere(file, DOES + n)? {
            refused = refused.or(Some(if n == WRITE { "shared \"write\"" } else { "shared \"resize\"" }));
        }
    }
    if refused.is_some() {
        taken().try_for_each(|byte| free_byte(file, byte))?;
    }
    Ok(refused)
}
