//! The NBD server of a monitor: exports that come and go while clients are there.
//!
//! The trap: an export that is gone must be written to by nobody. Whoever takes one away hangs up on its clients, and
//! waits until the request that is under way is over.

use super::drives::Image;
use crate::daemon::accept::accept;
use crate::daemon::address::{Address, Listener};
use crate::daemon::links::lock;
use crate::daemon::nbd::serve_exports;
use crate::nbd::handshake::Export;
use crate::qmp::QmpError;
use crate::qmp::commands::{ExportAdd, Listen};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// What an export serves.
#[derive(Clone)]
struct Served {
    export: Export,
    image: Image,
    guest: bool,
}

struct Connection {
    /// The id of the export it has chosen.
    export: Option<String>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Table {
    exports: BTreeMap<String, Served>,
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

/// What the system said, without the number that Rust appends and QEMU does not.
pub(super) fn in_words(error: &std::io::Error) -> String {
    let why = error.to_string();
    why.split(" (os error").next().unwrap_or(&why).to_owned()
}

/// Where that is.
pub(super) fn address(listen: &Listen) -> Address {
    match listen {
        // An IPv6 address has colons of its own.
        Listen::Inet { host, port } if host.contains(':') => Address::Tcp(format!("[{host}]:{port}")),
        Listen::Inet { host, port } if host.is_empty() => Address::Tcp(format!("0.0.0.0:{port}")),
        Listen::Inet { host, port } => Address::Tcp(format!("{host}:{port}")),
        Listen::Unix { path } => Address::Unix(path.into()),
    }
}

/// A server that runs.
pub(super) struct NbdServer {
    table: Arc<Mutex<Table>>,
    accepting: JoinHandle<()>,
}

impl NbdServer {
    /// Listens.
    pub(super) async fn start(listen: &Listen, max_connections: u32) -> Result<Self, QmpError> {
        let address = address(listen);
        let what = if let Listen::Unix { path } = listen { Some(path) } else { None };
        let listener = address.listen().await.map_err(|error| {
            let why = in_words(&error);
            QmpError::generic(match what {
                Some(path) => format!("Failed to bind socket to {path}: {why}"),
                None => format!("Failed to listen on {address}: {why}"),
            })
        })?;
        let table = Arc::<Mutex<Table>>::default();
        let accepting = tokio::spawn(accept_all(listener, table.clone(), max_connections as usize));
        Ok(Self { table, accepting })
    }

    /// Whether there is an export of this id.
    pub(super) fn has(&self, id: &str) -> bool {
        lock(&self.table).exports.contains_key(id)
    }

    /// The ids of all exports.
    pub(super) fn ids(&self) -> Vec<String> {
        lock(&self.table).exports.keys().cloned().collect()
    }

    /// Whether a client has chosen the export.
    pub(super) fn is_used(&self, id: &str) -> bool {
        let table = lock(&self.table);
        table.connections.values().any(|connection| connection.export.as_deref() == Some(id))
    }

    /// Adds an export; its id is new.
    pub(super) fn add(&self, add: &ExportAdd, image: Image, guest: bool) -> Result<(), QmpError> {
        let mut table = lock(&self.table);
        if table.exports.values().any(|served| served.export.name == add.name) {
            return Err(QmpError::generic(format!("NBD server already has export named '{}'", add.name)));
        }
        let mut export = Export::new(add.name.clone(), image.size_bytes);
        export.description.clone_from(&add.description);
        export.read_only = !add.writable;
        table.exports.insert(add.id.clone(), Served { export, image, guest });
        Ok(())
    }

    /// Takes an export away, and its clients.
    pub(super) async fn remove(&self, id: &str) {
        let gone = {
            let mut table = lock(&self.table);
            table.exports.remove(id);
            let theirs = |connection: &Connection| connection.export.as_deref() == Some(id);
            let numbers: Vec<_> = table.connections.iter().filter(|(_, it)| theirs(it)).map(|(at, _)| *at).collect();
            numbers.iter().filter_map(|at| table.connections.remove(at)).collect::<Vec<_>>()
        };
        hang_up(gone).await;
    }

    /// Ends; gives the ids of the exports it had.
    pub(super) async fn stop(self) -> Vec<String> {
        self.accepting.abort();
        let _ = self.accepting.await;
        let (exports, connections) = {
            let mut table = lock(&self.table);
            (std::mem::take(&mut table.exports), std::mem::take(&mut table.connections))
        };
        hang_up(connections.into_values().collect()).await;
        exports.into_keys().collect()
    }
}

async fn hang_up(connections: Vec<Connection>) {
    connections.iter().for_each(|connection| connection.task.abort());
    for connection in connections {
        let _ = connection.task.await;
    }
}

/// Who comes when there are so many connections waits in the socket's backlog, as with QEMU.
async fn accept_all(listener: Listener, table: Arc<Mutex<Table>>, max_connections: usize) {
    let places = Arc::new(Semaphore::new(if max_connections > 0 { max_connections } else { Semaphore::MAX_PERMITS }));
    // It is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        let link = accept("an NBD client", || listener.accept()).await;
        let mut open = lock(&table);
        open.connections.retain(|_, connection| !connection.task.is_finished());
        let number = open.next;
        open.next += 1;
        let ids: Vec<String> = open.exports.keys().cloned().collect();
        let exports = open.exports.values().map(|served| served.export.clone()).collect();
        let here = table.clone();
        let task = tokio::spawn(async move {
            let _place = place;
            let chosen = here.clone();
            let choose = move |index: usize| {
                let mut table = lock(&chosen);
                let id = ids.get(index)?;
                // It may be gone since the client came.
                let served = table.exports.get(id)?.clone();
                table.connections.get_mut(&number)?.export = Some(id.clone());
                Some(served.image.disk(served.guest))
            };
            if let Err(error) = serve_exports(link, exports, choose).await {
                tracing::debug!(%error, "an NBD client is lost");
            }
            lock(&here).connections.remove(&number);
        });
        open.connections.insert(number, Connection { export: None, task });
    }
}
