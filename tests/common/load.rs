//! The demo's clients at work on a world, and what they must be able to say at the end.

use super::until;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use xen_colo::demo::client::{self, ClientConfig, ClientReport, Live};

/// Clients at work: one long connection, some short ones.
pub struct Load {
    address: SocketAddr,
    /// What they saw so far.
    pub live: Arc<Live>,
    stop: watch::Sender<bool>,
    task: JoinHandle<ClientReport>,
}

impl Load {
    /// Begins.
    pub fn start(address: SocketAddr) -> Self {
        let live = Arc::new(Live::default());
        let (stop, stopped) = watch::channel(false);
        let config =
            ClientConfig { short_connections_parallel: 2, pause_between_ms: 5, keys_max: 100_000, seed: 0x5eed };
        let task = tokio::spawn(client::run(address, stopped, config, live.clone()));
        Self { address, live, stop, task }
    }

    /// Waits for more writes to be acknowledged, of those sent from now on.
    pub async fn goes_on(&self, writes: u64) {
        let from = self.live.acknowledged();
        until("writes go on", async || {
            let now = self.live.acknowledged();
            if now >= from + writes { Ok(()) } else { Err((from, now)) }
        })
        .await;
    }

    /// Waits for writes that only the survivor can have acknowledged; [`Live::mark_kill`] was called before.
    pub async fn survives(&self, writes: u64) {
        until("the survivor acknowledges writes", async || {
            let after = self.live.acknowledged_after_kill();
            if after >= writes { Ok(()) } else { Err(after) }
        })
        .await;
    }

    /// Ends the load and reads every acknowledged write back; none may be missing.
    pub async fn ends_without_loss(self) -> ClientReport {
        self.stop.send_replace(true);
        let report = self.task.await.unwrap();
        assert_eq!(report.failures, Vec::<String>::new());
        let verified = client::verify(self.address, &report.ledger).await;
        assert_eq!(verified.lost, Vec::<String>::new(), "{:?}", verified.failures);
        assert_eq!(verified.checked, report.ledger.names.len() as u64);
        assert!(verified.checked > 0, "nothing was acknowledged");
        report
    }

    /// The same, and the long connection lived through it all.
    pub async fn ends_unharmed(self) {
        let report = self.ends_without_loss().await;
        assert!(report.connection_kept, "{:?}", report.connection_error);
    }
}
