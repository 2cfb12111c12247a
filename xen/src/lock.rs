//! Locks on single bytes of a file, by which QEMU's processes tell each other what they do with an image.
//!
//! They belong to the open file and not to the process (open file description locks, fcntl(2)): a copy of the handle has
//! the same ones, and they go with the last copy.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

fn lock(kind: libc::c_int, at: u64) -> io::Result<libc::flock> {
    // SAFETY: it is made of integers only, for which all zeroes is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = libc::off_t::try_from(at).map_err(io::Error::other)?;
    lock.l_len = 1;
    Ok(lock)
}

fn carry_out(file: BorrowedFd<'_>, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the file is open for as long as it is borrowed, and both commands read or write one `flock`, which `lock` is.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes a shared lock on a byte, which anybody else may have as well.
pub fn share_byte(file: BorrowedFd<'_>, at: u64) -> io::Result<()> {
    carry_out(file, libc::F_OFD_SETLK, &mut lock(libc::F_RDLCK, at)?)
}

/// Gives it up.
pub fn free_byte(file: BorrowedFd<'_>, at: u64) -> io::Result<()> {
    carry_out(file, libc::F_OFD_SETLK, &mut lock(libc::F_UNLCK, at)?)
}

/// Whether another open file has a lock on a byte.
pub fn is_locked_elsewhere(file: BorrowedFd<'_>, at: u64) -> io::Result<bool> {
    let mut lock = lock(libc::F_WRLCK, at)?;
    carry_out(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}
