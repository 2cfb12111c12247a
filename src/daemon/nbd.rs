//! Serves one NBD connection on a disk: the pure machines of [`crate::nbd`] on a socket.
//!
//! Requests are carried out in order on a thread that may block, replies are batched until the input is drained.

use super::address::Link;
use crate::disk::Disk;
use crate::nbd::NbdError;
use crate::nbd::handshake::{Export, Handshake};
use crate::nbd::transmission::{Decoder, Served, serve};
use bytes::BytesMut;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long a client may take to negotiate.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of replies collected before they are written.
const REPLY_BATCH_BYTES: usize = 1 << 20;
/// How long to wait before a busy disk is asked again.
const BUSY_RETRY: Duration = Duration::from_millis(1);
/// Bytes asked of the socket at once.
const READ_BYTES: usize = 256 << 10;

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
pub async fn serve_connection(mut link: Link, name: String, mut disk: Box<dyn Disk>) -> Result<(), ServeError> {
    let export = Export::new(name, disk.size_bytes());
    let mut input = BytesMut::new();
    let negotiation = negotiate(&mut link, export.clone(), &mut input);
    match tokio::time::timeout(HANDSHAKE_DEADLINE, negotiation).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => return Ok(()),
        Ok(Err(error)) => return Err(error),
        Err(_) => return Err(ServeError::Deadline),
    }
    let mut decoder = Decoder::new(&export);
    let mut replies = BytesMut::new();
    loop {
        while let Some(request) = decoder.decode(&mut input)? {
            loop {
                match tokio::task::block_in_place(|| serve(&request, &mut *disk, &mut replies)) {
                    Served::Replied => break,
                    // The replica is behind with its base disk: the client waits, as on a slow disk.
                    Served::Busy => tokio::time::sleep(BUSY_RETRY).await,
                    Served::Disconnect => return Ok(link.write_all(&replies).await?),
                }
            }
            if replies.len() > REPLY_BATCH_BYTES {
                link.write_all(&replies).await?;
                replies.clear();
            }
        }
        link.write_all(&replies).await?;
        replies.clear();
        input.reserve(READ_BYTES);
        if link.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
    }
}

/// True when an export was chosen, false when the client left.
async fn negotiate(link: &mut Link, export: Export, input: &mut BytesMut) -> Result<bool, ServeError> {
    let mut handshake = Handshake::new(vec![export]);
    loop {
        let progress = handshake.handle_input(input);
        while let Some(bytes) = handshake.poll_output() {
            link.write_all(&bytes).await?;
        }
        if progress?.is_some() {
            return Ok(true);
        }
        if link.read_buf(input).await? == 0 {
            return Ok(false);
        }
    }
}
