//! Gives a domain that took over its name, a little later: libxl would take the processor while the guest connects its
//! devices again, and the guest's clients wait for that.

use super::toolstack;
use ::xen::DomId;
use std::sync::mpsc::{self, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// How long a guest that took over goes by its incoming name.
const DELAY: Duration = Duration::from_secs(3);

/// A rename to come. Dropped, it is done at once.
pub(super) struct Renaming {
    hurry: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Renaming {
    pub(super) fn begin(domid: DomId, name: String) -> Self {
        let (hurry, hurried) = mpsc::channel::<()>();
        let rename = move || {
            // Nobody ever sends: the time is over, or somebody hurries.
            let _ = hurried.recv_timeout(DELAY);
            if let Err(error) = toolstack::rename_incoming(domid, &name) {
                tracing::warn!(%error, "the guest keeps its incoming name");
            }
        };
        let thread = Builder::new().name("rename".into()).spawn(rename);
        let thread = thread.inspect_err(|error| tracing::warn!(%error, "the guest keeps its incoming name")).ok();
        Self { hurry: Some(hurry), thread }
    }
}

impl Drop for Renaming {
    fn drop(&mut self) {
        self.hurry = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
