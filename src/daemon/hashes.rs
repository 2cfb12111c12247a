//! The hashes of a replica's disk, which spare the chunks that it has already.
//!
//! ```text
//!   secondary  base ─ chunk after chunk, from the first to the last ─▶ 32 bytes each ─▶ primary: compares, and sends
//! ```
//!
//! Nobody asks for a hash and nothing frames it: their number follows from the disk's size, and how far they may run
//! ahead of the comparison is what the socket and a short queue hold. Why a hash may be old is in
//! [`crate::replica::mirror::resync`].

use super::address::Link;
use crate::disk::Disk;
use crate::replica::epochs::PrimaryView;
use crate::replica::mirror::SYNC_CHUNK_BYTES;
use crate::replica::mirror::resync::{ChunkHash, hash_chunk};
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

/// Tells the hashes of a replica's disk, as long as its primary may read it; then keeps the link, whose end would be the
/// end of the pair.
pub async fn tell(mut link: Link, mut disk: PrimaryView) -> io::Result<()> {
    let size_bytes = disk.size_bytes();
    let mut chunk = Vec::new();
    for offset in (0..size_bytes).step_by(SYNC_CHUNK_BYTES as usize) {
        let hash = tokio::task::block_in_place(|| {
            chunk.resize(SYNC_CHUNK_BYTES.min(size_bytes - offset) as usize, 0);
            disk.read(offset, &mut chunk).map(|()| hash_chunk(&chunk))
        });
        link.write_all(&hash.map_err(io::Error::other)?).await?;
    }
    std::future::pending().await
}

/// Reads `count` hashes of a disk.
pub async fn read(mut link: Link, disk: usize, count: u64, to: mpsc::Sender<(usize, ChunkHash)>) -> io::Result<()> {
    for _ in 0..count {
        let mut hash = ChunkHash::default();
        link.read_exact(&mut hash).await?;
        if to.send((disk, hash)).await.is_err() {
            return Ok(());
        }
    }
    std::future::pending().await
}
