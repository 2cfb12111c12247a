//! Who cleans up when this process is killed: a child that outlives it.
//!
//! ```text
//!   xl-colo ──── pipe: 'S' it stands, 'R' it runs, 'K' keep it stopped ────▶ xl-colo keeper DOMID
//!      ╳ kill -9                                    end of file ──▶ log-dirty off, run on if it stood for a capture
//! ```
//!
//! A guest that is killed with its protector half-way through a capture would stand for ever, with its memory
//! write-protected. It runs on without its proxy, so nothing it says leaves the host: the secondary has its place.
//! The traps: a signal to the process group must not reach the keeper, so it has a group of its own. And whoever protects
//! the guest next, in a new process, must not do so while the keeper of the last one still cleans up: that would switch
//! its log off. So a domain has one keeper at a time, by a lock, and a protection begins when its keeper has it.

use ::xen::{DomId, Error, Interface, LogDirty, Store, SuspendChannel};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The command of this program that keeps.
pub const COMMAND: &str = "keeper";
/// Where the locks are.
const LOCK_DIR: &str = "/run/xen-colo";

/// The parent's end.
#[derive(Debug)]
pub struct Keeper {
    child: Child,
}

impl Keeper {
    /// Starts a keeper for a domain, when the one before it has cleaned up.
    pub fn start(domid: DomId) -> io::Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .args([COMMAND, &domid.0.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let mut keeper = Self { child };
        match keeper.child.stdout.take() {
            Some(mut said) => said.read_exact(&mut [0])?,
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        }
        Ok(keeper)
    }

    /// The guest is about to be stopped for a capture, or runs again.
    pub fn standing(&mut self, stands: bool) {
        self.say(if stands { b'S' } else { b'R' });
    }

    /// The guest is to stay stopped, whatever happens to this process.
    pub fn keep_stopped(&mut self) {
        self.say(b'K');
    }

    fn say(&mut self, word: u8) {
        // A keeper that is gone can only be replaced by the next protection.
        let said = self.child.stdin.as_mut().map(|pipe| pipe.write_all(&[word]));
        if !matches!(said, Some(Ok(()))) {
            tracing::warn!("the keeper is gone: after a kill of this process log-dirty may stay on");
        }
    }
}

/// Whoever drops it has cleaned up, and may have stopped the guest on purpose: it must not do so too.
impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until no other process has the lock of a domain. It is held for as long as the file is open.
fn lock(dir: &Path, domid: DomId) -> io::Result<File> {
    std::fs::create_dir_all(dir)?;
    let file = File::create(dir.join(format!("{COMMAND}.{domid}.lock")))?;
    file.lock()?;
    Ok(file)
}

/// Why a keeper could not clean up.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The hypervisor's reason.
    #[error(transparent)]
    Xen(#[from] Error),
    /// The lock's.
    #[error("lock in {LOCK_DIR}: {0}")]
    Lock(io::Error),
}

/// The child's part: waits for its parent's end, then cleans up. `ready` is called when it is the only one.
pub fn keep(domid: u16, words: &mut impl Read, ready: impl FnOnce()) -> Result<(), KeepError> {
    let domid = DomId(domid);
    let _lock = lock(Path::new(LOCK_DIR), domid).map_err(KeepError::Lock)?;
    ready();
    let mut stands = b'R';
    let mut word = [0];
    while words.read_exact(&mut word).is_ok() {
        stands = word[0];
    }
    let xen = Interface::open()?;
    let Some(info) = xen.domain_info(domid)? else { return Ok(()) };
    // Switching it on switches a stale log off first, and dropping it leaves none.
    drop(LogDirty::enable(&xen, domid));
    let mut model = super::device_model(domid).ok();
    if let Some(model) = &mut model {
        let _ = model.global_dirty_log(false);
    }
    // The parent's subscription outlives it, and as long as it stands, xl save hears of no suspend.
    let unsubscribed = SuspendChannel::unsubscribe(&xen, domid);
    if stands != b'S' {
        return Ok(unsubscribed?);
    }
    if let Some(model) = &mut model {
        let _ = model.cont();
    }
    if info.paused {
        return Ok(xen.unpause(domid)?);
    }
    // A guest that was asked to suspend does so in its own time, after whoever asked is gone.
    let mut suspension = SuspendChannel::new(&xen, domid)?;
    let is_suspended = || xen.domain_info(domid).map(|info| info.is_some_and(|info| info.is_suspended()));
    if is_suspended()? || (suspension.wait(super::SUSPEND_DEADLINE)? && is_suspended()?) {
        xen.resume_cooperative(domid)?;
        return Ok(Store::open()?.resume_domain(domid)?);
    }
    Store::open()?.clear_suspend(domid)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::TryLockError;

    #[test]
    fn a_domain_has_one_keeper_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path(), DomId(7)).unwrap();
        drop(lock(dir.path(), DomId(8)).unwrap());
        let second = File::open(dir.path().join("keeper.7.lock")).unwrap();
        assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)), "the first one is not done");
        drop(first);
        second.try_lock().unwrap();
    }
}
