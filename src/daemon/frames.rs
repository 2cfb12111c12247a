//! Ethernet frames over a byte stream, in the framing every QEMU character device speaks.
//!
//! ```text
//! be32 length │ length bytes: an Ethernet frame without FCS      (repeated; no virtio-net header)
//! ```
//!
//! The trap: a length word is the peer's word. It is checked against [`FRAME_BYTES_MAX`] before a byte is
//! reserved for it, and after a bad one the stream has no frame boundaries any more, so the error is final.
//! [`FrameReader::read`] keeps a half-read frame in the reader, not in the future, so `select!` may drop it.
//!
//! Source: QEMU `net/net.c` `net_fill_rstate`, `net/colo-compare.c` (reassembly buffer of 4096 + 65536 bytes).

use std::io;

use crate::compare::wire::{self, LENGTH_BYTES};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// The longest frame QEMU's reassembler takes, in bytes (4096 + 65536).
pub const FRAME_BYTES_MAX: usize = wire::MAX_FRAME_BYTES;

/// A batch stops growing here: the largest single write handed to the socket is one frame more.
const BATCH_BYTES: usize = 256 * 1024;

/// One read asks the socket for this much, so that a burst of small frames costs one system call.
const READ_BYTES: usize = 64 * 1024;

/// Why a framed stream ended badly.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length word is over the bound; what follows cannot be told apart into frames.
    #[error("a frame of {len_bytes} bytes is over the bound of {FRAME_BYTES_MAX}")]
    Oversized {
        /// The length announced, or the length of the frame that was to be sent.
        len_bytes: usize,
    },
    /// The peer closed the stream inside a frame.
    #[error("the stream ended inside a frame ({have_bytes} bytes of it had come)")]
    Truncated {
        /// Bytes of the unfinished frame, its length word included.
        have_bytes: usize,
    },
    /// The operating system refused.
    #[error("framed stream: {0}")]
    Io(#[from] io::Error),
}

/// Appends `frame` with its length word to `into`.
///
/// # Errors
/// [`FrameError::Oversized`] when the frame is over [`FRAME_BYTES_MAX`]; `into` is unchanged.
pub fn encode(frame: &[u8], into: &mut BytesMut) -> Result<(), FrameError> {
    wire::encode(frame, into).map_err(|_| FrameError::Oversized { len_bytes: frame.len() })
}

/// Takes the first whole frame off `from`, or `None` when more bytes are needed.
///
/// # Errors
/// [`FrameError::Oversized`] when the length word is over [`FRAME_BYTES_MAX`]; the stream cannot be used further.
pub fn decode(from: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
    let Some(word) = from.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
    let len_bytes = usize::try_from(u32::from_be_bytes(*word)).unwrap_or(usize::MAX);
    if len_bytes > FRAME_BYTES_MAX {
        return Err(FrameError::Oversized { len_bytes });
    }
    if from.len() < LENGTH_BYTES + len_bytes {
        return Ok(None);
    }
    let mut framed = from.split_to(LENGTH_BYTES + len_bytes).freeze();
    Ok(Some(framed.split_off(LENGTH_BYTES)))
}

/// Reads frames from a byte stream.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    pending: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader that expects a length word next.
    pub fn new(stream: R) -> Self {
        Self { stream, pending: BytesMut::new() }
    }

    /// The next frame, or `None` when the peer closed the stream between frames. Cancel-safe.
    ///
    /// # Errors
    /// [`FrameError`]; after one the stream cannot be used further.
    pub async fn read(&mut self) -> Result<Option<Bytes>, FrameError> {
        loop {
            if let Some(frame) = decode(&mut self.pending)? {
                return Ok(Some(frame));
            }
            self.pending.reserve(READ_BYTES);
            if self.stream.read_buf(&mut self.pending).await? == 0 {
                let have_bytes = self.pending.len();
                return if have_bytes == 0 { Ok(None) } else { Err(FrameError::Truncated { have_bytes }) };
            }
        }
    }
}

/// Writes frames to a byte stream, as many at a time as are waiting.
#[derive(Debug)]
pub struct FrameWriter<W> {
    stream: W,
    batch: BytesMut,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// A writer at a frame boundary.
    pub fn new(stream: W) -> Self {
        Self { stream, batch: BytesMut::new() }
    }

    /// Waits for a frame in `queue`, then writes it and whatever else is waiting there as one buffer. Returns
    /// how many frames went, 0 when the queue is closed and empty. Not cancel-safe: a dropped future may leave
    /// half a frame on the stream, so drop the stream with it.
    ///
    /// # Errors
    /// [`FrameError::Oversized`] for a frame over the bound, [`FrameError::Io`] when the peer is gone.
    pub async fn write_waiting(&mut self, queue: &mut mpsc::Receiver<Bytes>) -> Result<usize, FrameError> {
        let Some(first) = queue.recv().await else { return Ok(0) };
        self.batch.clear();
        encode(&first, &mut self.batch)?;
        let mut frames = 1;
        while self.batch.len() < BATCH_BYTES
            && let Ok(next) = queue.try_recv()
        {
            encode(&next, &mut self.batch)?;
            frames += 1;
        }
        self.stream.write_all(&self.batch).await?;
        Ok(frames)
    }

    /// Writes one frame.
    ///
    /// # Errors
    /// As [`FrameWriter::write_waiting`].
    pub async fn write(&mut self, frame: &[u8]) -> Result<(), FrameError> {
        self.put(frame)?;
        self.flush().await
    }

    /// Adds a frame to those that [`Self::flush`] writes.
    ///
    /// # Errors
    /// [`FrameError::Oversized`].
    pub fn put(&mut self, frame: &[u8]) -> Result<(), FrameError> {
        encode(frame, &mut self.batch)
    }

    /// Bytes that [`Self::flush`] would write.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.batch.len()
    }

    /// Writes what was [`Self::put`]. Not cancel-safe.
    ///
    /// # Errors
    /// [`FrameError::Io`] when the peer is gone.
    pub async fn flush(&mut self) -> Result<(), FrameError> {
        let written = self.stream.write_all(&self.batch).await;
        self.batch.clear();
        Ok(written?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_survive_any_cut_of_the_stream() {
        let frames: Vec<Vec<u8>> = [0, 1, 60, 1514, FRAME_BYTES_MAX].iter().map(|&len| vec![len as u8; len]).collect();
        let mut wire = BytesMut::new();
        for frame in &frames {
            encode(frame, &mut wire).unwrap();
        }
        for cut in [1, 3, 7, 1000, wire.len()] {
            let (mut near, far) = tokio::io::duplex(64);
            let wire = wire.clone();
            let sender = tokio::spawn(async move {
                for piece in wire.chunks(cut) {
                    near.write_all(piece).await.unwrap();
                }
            });
            let mut reader = FrameReader::new(far);
            for frame in &frames {
                assert_eq!(&reader.read().await.unwrap().unwrap()[..], &frame[..]);
            }
            assert!(reader.read().await.unwrap().is_none());
            sender.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_bad_length_and_a_cut_frame_are_errors_and_cost_no_memory() {
        let over = (FRAME_BYTES_MAX as u32 + 1).to_be_bytes();
        let mut reader = FrameReader::new(&over[..]);
        assert!(matches!(reader.read().await, Err(FrameError::Oversized { len_bytes }) if len_bytes == 69_633));
        let mut reader = FrameReader::new(&[0, 0, 0, 9, 1][..]);
        assert!(matches!(reader.read().await, Err(FrameError::Truncated { have_bytes: 5 })));
        let mut into = BytesMut::new();
        assert!(encode(&[0; FRAME_BYTES_MAX + 1], &mut into).is_err() && into.is_empty());
    }

    #[tokio::test]
    async fn waiting_frames_leave_in_one_write() {
        let (give, mut queue) = mpsc::channel(8);
        for n in 0..3_u8 {
            give.try_send(Bytes::from(vec![n; 2])).unwrap();
        }
        let mut writer = FrameWriter::new(Vec::new());
        assert_eq!(writer.write_waiting(&mut queue).await.unwrap(), 3);
        drop(give);
        assert_eq!(writer.write_waiting(&mut queue).await.unwrap(), 0);
        assert_eq!(writer.stream, [0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 1, 1, 0, 0, 0, 2, 2, 2]);
    }
}
