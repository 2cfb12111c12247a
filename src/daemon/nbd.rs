//! Serves NBD connections on a disk: the pure machine of [`crate::nbd::server`] on a socket.
//!
//! [`serve_connection`] is for a link of a pair, which is a task like the pair's others. [`threads`] is for everybody
//! else: a thread a connection, because a request that finds its data in memory is over before a task would have been
//! woken for it. [`remote`] is the other end: somebody else's export, as a client. [`kernel`] makes
//! the kernel one.

mod aside;
mod beside;
pub mod export;
pub mod kernel;
pub mod list;
pub(super) mod lock;
pub mod remote;
mod served;
pub mod threads;
pub mod tls;

use super::address::Link;
use crate::disk::Disk;
use crate::nbd::NbdError;
use crate::nbd::handshake::{Encryption, Export};
use crate::nbd::server::{Next, Server};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long a client may take to negotiate.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long to wait before a busy disk is asked again.
const BUSY_RETRY: Duration = Duration::from_millis(1);

/// Why a connection ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error(transparent)]
    Protocol(#[from] NbdError),
    /// The client did not negotiate in time.
    #[error("no export was negotiated within {HANDSHAKE_DEADLINE:?}")]
    Deadline,
}

/// Serves `disk` as the export `name` until the client leaves.
pub async fn serve_connection(link: Link, name: String, disk: Box<dyn Disk>) -> Result<(), ServeError> {
    let exports = vec![Export::new(name, disk.size_bytes())];
    serve_exports(link, exports, |_| Some(disk)).await
}

/// Serves the one of `exports` that the client chooses, by its index on the disk that `open` gives, until the client
/// leaves. Without a disk it is hung up on.
pub async fn serve_exports(
    mut link: Link,
    exports: Vec<Export>,
    open: impl FnOnce(usize) -> Option<Box<dyn Disk>>,
) -> Result<(), ServeError> {
    let mut server = Server::new(exports, Encryption::None);
    let negotiation = converse(&mut link, &mut server, None);
    match tokio::time::timeout(HANDSHAKE_DEADLINE, negotiation).await {
        Ok(negotiated) => negotiated?,
        Err(_) => return Err(ServeError::Deadline),
    }
    if let Some(mut disk) = server.export().and_then(open) {
        converse(&mut link, &mut server, Some(&mut *disk)).await?;
    }
    Ok(())
}

/// The negotiation without a disk, until an export is chosen; the requests with one. Both may end with the client.
async fn converse(link: &mut Link, server: &mut Server, mut disk: Option<&mut dyn Disk>) -> Result<(), ServeError> {
    loop {
        let next = match &mut disk {
            None => server.negotiate(),
            // To leave the runtime and come back takes longer than to write 4 KiB into memory. Primaries hardly read.
            Some(disk) if disk.writes_in_memory() => server.serve(&mut **disk),
            Some(disk) => tokio::task::block_in_place(|| server.serve(&mut **disk)),
        };
        if !server.output().is_empty() {
            link.write_all(server.output()).await?;
            server.sent();
        }
        match next? {
            Next::Output if disk.is_none() && server.export().is_some() => return Ok(()),
            Next::Output => {}
            Next::Busy => tokio::time::sleep(BUSY_RETRY).await,
            Next::Input => match link.read(server.room()).await? {
                0 => return Ok(()),
                bytes => server.filled(bytes),
            },
            Next::StartTls | Next::Later | Next::Closed => return Ok(()),
        }
    }
}
