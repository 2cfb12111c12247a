//! A cable between two processes: a proxy that can go silent, be closed, and heal.
//!
//! ```text
//!   open     bytes pass
//!   silent   nothing passes and nobody is told: what was sent waits, as in a TCP that retransmits into a partition
//!   closed   both ends see the connection end, and new ones are refused
//! ```
//!
//! One connection alone can be cut or stalled too; they are counted from 0, as they come.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use xen_colo::daemon::address::{Address, Link};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flow {
    Open,
    Silent,
    Closed,
}

struct Connection {
    handle: AbortHandle,
    stalled: Arc<AtomicBool>,
}

/// A proxy, until it is dropped.
pub struct Wire {
    /// Where to connect instead of the target.
    pub address: Address,
    flow: watch::Sender<Flow>,
    carried: Arc<AtomicU64>,
    connections: Arc<Mutex<Vec<Connection>>>,
    refuses: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Wire {
    /// Listens on `listen` and carries each connection to `target`.
    pub async fn new(listen: &Address, target: Address) -> Self {
        let listener = listen.listen().await.unwrap();
        let address = listener.local_address().unwrap();
        let (flow, flows) = watch::channel(Flow::Open);
        let carried = Arc::new(AtomicU64::new(0));
        let counter = carried.clone();
        let known = Arc::new(Mutex::new(Vec::new()));
        let handles = known.clone();
        let refuses = Arc::new(AtomicBool::new(false));
        let refusing = refuses.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok(near) = listener.accept().await else { return };
                if refusing.load(Ordering::SeqCst) {
                    continue;
                }
                let (target, flows, counter) = (target.clone(), flows.clone(), counter.clone());
                let stalled = Arc::new(AtomicBool::new(false));
                let stalls = stalled.clone();
                let handle = connections.spawn(async move {
                    let mut flow = flows.clone();
                    if !passes(&mut flow).await {
                        return;
                    }
                    let Ok(far) = target.connect().await else { return };
                    carry(near, far, flows, counter, stalls).await;
                });
                handles.lock().unwrap().push(Connection { handle, stalled });
            }
        });
        Self { address, flow, carried, connections: known, refuses, task }
    }

    /// How many connections there were so far.
    pub fn connections(&self) -> usize {
        self.connections.lock().unwrap().len()
    }

    /// Ends one of them; both ends see it.
    pub fn cut(&self, connection: usize) {
        self.connections.lock().unwrap()[connection].handle.abort();
    }

    /// Lets nothing more pass over one of them, and tells nobody.
    pub fn stall(&self, connection: usize) {
        self.connections.lock().unwrap()[connection].stalled.store(true, Ordering::SeqCst);
    }

    /// Hangs up on whoever comes from now on; who is connected stays.
    pub fn refuse(&self) {
        self.refuses.store(true, Ordering::SeqCst);
    }

    /// Carries whoever comes from now on again.
    pub fn accept(&self) {
        self.refuses.store(false, Ordering::SeqCst);
    }

    /// Lets bytes pass again; what waited arrives.
    pub fn heal(&self) {
        self.flow.send_replace(Flow::Open);
    }

    /// Lets nothing pass, and tells nobody.
    pub fn silence(&self) {
        self.flow.send_replace(Flow::Silent);
    }

    /// Ends every connection, and refuses new ones.
    pub fn close(&self) {
        self.flow.send_replace(Flow::Closed);
    }

    /// Bytes carried so far, both ways.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::SeqCst)
    }
}

/// Waits until bytes may pass; false when the wire is closed.
async fn passes(flow: &mut watch::Receiver<Flow>) -> bool {
    match flow.wait_for(|flow| *flow != Flow::Silent).await {
        Ok(flow) => *flow == Flow::Open,
        Err(_) => false,
    }
}

async fn carry(near: Link, far: Link, flow: watch::Receiver<Flow>, carried: Arc<AtomicU64>, stalled: Arc<AtomicBool>) {
    let (near_read, near_write) = tokio::io::split(near);
    let (far_read, far_write) = tokio::io::split(far);
    // Either direction's end ends the connection: the hosts never half-close.
    tokio::select! {
        () = pump(near_read, far_write, flow.clone(), &carried, &stalled) => {}
        () = pump(far_read, near_write, flow.clone(), &carried, &stalled) => {}
    }
}

async fn pump(
    mut from: ReadHalf<Link>,
    mut to: WriteHalf<Link>,
    mut flow: watch::Receiver<Flow>,
    carried: &AtomicU64,
    stalled: &AtomicBool,
) {
    let mut buffer = vec![0; 64 << 10];
    while passes(&mut flow).await {
        let bytes = tokio::select! {
            biased;
            _ = flow.changed() => continue,
            read = from.read(&mut buffer) => match read {
                Ok(bytes) if bytes > 0 => bytes,
                _ => return,
            },
        };
        if stalled.load(Ordering::SeqCst) {
            // Until the connection is cut.
            std::future::pending::<()>().await;
        }
        if !passes(&mut flow).await || to.write_all(&buffer[..bytes]).await.is_err() {
            return;
        }
        carried.fetch_add(bytes as u64, Ordering::SeqCst);
    }
}
