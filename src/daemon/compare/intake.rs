//! Frames from a socket, as many at a time as are there, copied as rarely as memory allows.
//!
//! ```text
//!   read ─▶ buffer ─┬─ much of it is full ─▶ becomes a block; frames are slices of it, and the next buffer is another
//!                   ├─ little is ──────────▶ what was read is copied into a block of its size; the buffer stays
//!                   └─ too many blocks are lent: each frame is copied, and no block is lent
//! ```
//!
//! The trap: a slice keeps its whole block, so one small frame that is held could keep a buffer of 300 KiB, and the
//! comparator's bound in bytes would bound nothing. Blocks that somebody still uses are therefore counted.

use super::port::Socket;
use crate::compare::wire::{Head, MAX_FRAME_BYTES, WireError};
use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;

/// One read asks for at least this much.
const READ_BYTES: usize = 256 << 10;
/// The rest of a frame, and a read behind it.
const BUFFER_BYTES: usize = MAX_FRAME_BYTES + 16 + READ_BYTES;
/// From here on a buffer is given away and not copied.
const GIVE_BYTES: usize = READ_BYTES / 8;
/// Blocks that frames may be slices of at the same time: about 20 MiB at most.
const LENT_MAX: usize = 64;
/// Buffers kept for the next read.
const SPARE_MAX: usize = 4;

/// A frame, and the whole message it came in if that is needed to send it on.
#[derive(Debug)]
pub(in crate::daemon) struct Frame {
    /// Its words and its virtio-net header too; empty without `vnet`.
    pub(in crate::daemon) message: Bytes,
    pub(in crate::daemon) bytes: Bytes,
}

/// What a read came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::daemon) enum Taken {
    /// Bytes.
    Some,
    /// Nothing is there now.
    Nothing,
    /// The peer has closed; inside a message, if so many bytes of one had come.
    Closed(usize),
}

/// Why a peer is hung up on.
#[derive(Debug, thiserror::Error)]
pub(in crate::daemon) enum IntakeError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads the frames of one port.
#[derive(Debug)]
pub(in crate::daemon) struct Intake {
    vnet: bool,
    /// What came and is not a whole message, and room for more.
    buffer: Vec<u8>,
    lent: VecDeque<Bytes>,
    spare: Vec<Vec<u8>>,
}

impl Intake {
    pub(in crate::daemon) fn new(vnet: bool) -> Self {
        Self { vnet, buffer: Vec::with_capacity(BUFFER_BYTES), lent: VecDeque::new(), spare: Vec::new() }
    }

    /// Another peer: what the last one began is gone.
    pub(in crate::daemon) fn reset(&mut self) {
        self.buffer.clear();
    }

    /// Reads once, and gives each whole frame to `each`.
    pub(in crate::daemon) fn read(&mut self, socket: &Socket, each: impl FnMut(Frame)) -> Result<Taken, IntakeError> {
        let read = loop {
            match rustix::io::read(socket, spare_capacity(&mut self.buffer)) {
                Err(Errno::INTR) => {}
                read => break read,
            }
        };
        match read {
            Ok(0) => return Ok(Taken::Closed(self.buffer.len())),
            Ok(_) => {}
            Err(Errno::AGAIN) => return Ok(Taken::Nothing),
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        self.split(each)?;
        Ok(Taken::Some)
    }

    /// The block that a frame or its message is a slice of, and where in it that begins.
    pub(in crate::daemon) fn block_of(&self, bytes: &[u8]) -> Option<(&Bytes, usize)> {
        self.lent.iter().find_map(|block| {
            let at = (bytes.as_ptr() as usize).checked_sub(block.as_ptr() as usize)?;
            (at + bytes.len() <= block.len()).then_some((block, at))
        })
    }

    fn split(&mut self, mut each: impl FnMut(Frame)) -> Result<(), WireError> {
        // The rest of a long message: nothing can be taken yet.
        if let Some(head) = Head::read(&self.buffer, self.vnet)?
            && self.buffer.len() < head.message_bytes()
        {
            return Ok(());
        }
        self.take_back();
        let block = if self.lent.len() >= LENT_MAX {
            None
        } else if self.buffer.len() >= GIVE_BYTES {
            let next = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(BUFFER_BYTES));
            Some(Bytes::from(std::mem::replace(&mut self.buffer, next)))
        } else {
            let block = Bytes::copy_from_slice(&self.buffer);
            self.buffer.clear();
            Some(block)
        };
        let Some(block) = block else {
            let taken = walk(&self.buffer, self.vnet, |at, head| {
                let message = Bytes::copy_from_slice(&self.buffer[at..at + head.message_bytes()]);
                each(frame(&message, 0, head));
            })?;
            self.buffer.drain(..taken);
            return Ok(());
        };
        let taken = walk(&block, self.vnet, |at, head| each(frame(&block, at, head)))?;
        self.buffer.extend_from_slice(&block[taken..]);
        self.lent.push_back(block);
        Ok(())
    }

    /// Takes back the blocks that nobody uses any more.
    fn take_back(&mut self) {
        if self.lent.len() >= LENT_MAX {
            // A frame that is held long stands in the way of those behind it.
            self.lent.retain(|block| !block.is_unique());
        }
        while let Some(block) = self.lent.pop_front_if(|block| block.is_unique()) {
            if self.spare.len() < SPARE_MAX && block.len() >= GIVE_BYTES {
                let mut buffer = Vec::from(block);
                buffer.clear();
                if buffer.capacity() >= BUFFER_BYTES {
                    self.spare.push(buffer);
                }
            }
        }
    }
}

/// The frame of the message at `at`.
fn frame(block: &Bytes, at: usize, head: Head) -> Frame {
    let end = at + head.message_bytes();
    let bytes = block.slice(end - head.frame_bytes..end);
    // Without a header the length is all there is, and it is no work to write it anew.
    let message = if head.words_bytes == 4 { Bytes::new() } else { block.slice(at..end) };
    Frame { message, bytes }
}

/// Visits each whole message with a frame in it; returns where the first that is not whole begins.
fn walk(block: &[u8], vnet: bool, mut each: impl FnMut(usize, Head)) -> Result<usize, WireError> {
    let mut at = 0;
    while let Some(head) = Head::read(&block[at..], vnet)? {
        if block.len() - at < head.message_bytes() {
            break;
        }
        if head.frame_bytes > 0 {
            each(at, head);
        }
        at += head.message_bytes();
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Socket) {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        (near, Socket::Unix(far))
    }

    fn message(frame: &[u8], vnet: Option<&[u8]>) -> Vec<u8> {
        let header = vnet.unwrap_or_default();
        let mut out = ((header.len() + frame.len()) as u32).to_be_bytes().to_vec();
        if vnet.is_some() {
            out.extend((header.len() as u32).to_be_bytes());
        }
        [&out, header, frame].concat()
    }

    #[test]
    fn frames_of_every_size_come_whole_whatever_is_kept() {
        for vnet in [None, Some(&[7; 12][..])] {
            for keep in [false, true] {
                let (mut near, far) = pair();
                let sizes = [1, 60, 1514, 65_550, 60, 60_000, 61];
                let frames: Vec<Vec<u8>> =
                    (0..600_usize).map(|n| vec![(n % 251) as u8; sizes[n % sizes.len()]]).collect();
                let wire: Vec<u8> = frames.iter().flat_map(|frame| message(frame, vnet)).collect();
                let writer = std::thread::spawn(move || {
                    for piece in wire.chunks(100_003) {
                        near.write_all(piece).unwrap();
                    }
                });
                let (mut intake, mut got, mut most_lent) = (Intake::new(vnet.is_some()), Vec::new(), 0);
                let mut found = 0;
                loop {
                    let mut here = Vec::new();
                    match intake.read(&far, |frame| here.push(frame)).unwrap() {
                        Taken::Closed(unfinished) => {
                            assert_eq!(unfinished, 0);
                            break;
                        }
                        Taken::Nothing => std::thread::yield_now(),
                        Taken::Some => {}
                    }
                    most_lent = most_lent.max(intake.lent.len());
                    for (n, frame) in here.iter().enumerate().map(|(n, frame)| (got.len() + n, frame)) {
                        if let Some((block, at)) = intake.block_of(&frame.bytes) {
                            assert_eq!(block[at..at + frame.bytes.len()].as_ptr(), frame.bytes.as_ptr());
                            found += 1;
                        }
                        assert_eq!(frame.bytes, frames[n], "frame {n}");
                        assert_eq!(frame.message, vnet.map_or(vec![], |_| message(&frames[n], vnet)), "frame {n}");
                    }
                    got.extend(here.into_iter().map(|frame| if keep { frame.bytes } else { Bytes::new() }));
                }
                writer.join().unwrap();
                assert_eq!(got.len(), frames.len());
                assert!(found > 0 && (keep || found == frames.len()), "{found} frames have a block");
                assert_eq!(intake.block_of(b"elsewhere"), None);
                assert!(most_lent <= LENT_MAX, "{most_lent} blocks are lent");
                assert!(!keep || got.iter().zip(&frames).all(|(got, frame)| got == frame), "what is kept stays");
                drop(got);
                intake.take_back();
                assert!(intake.lent.is_empty(), "all is taken back");
            }
        }
    }

    #[test]
    fn small_frames_that_are_held_keep_no_buffers() {
        let (mut near, far) = pair();
        let (mut intake, mut held) = (Intake::new(false), Vec::new());
        for n in 0..1000_u32 {
            // One frame is held out of each read, and each read fills a good part of a buffer.
            let wire: Vec<u8> = (0..30).flat_map(|_| message(&[n as u8; 1400], None)).collect();
            near.write_all(&wire).unwrap();
            let mut here = Vec::new();
            intake.read(&far, |frame| here.push(frame.bytes)).unwrap();
            held.push(here.swap_remove(0));
        }
        assert_eq!(intake.lent.len(), LENT_MAX);
        assert!(held.iter().skip(LENT_MAX).all(|frame| frame.is_unique()), "copied, not lent");
    }

    #[test]
    fn what_is_impossible_is_an_error_and_what_is_empty_is_nothing() {
        let (mut near, far) = pair();
        let mut intake = Intake::new(false);
        near.write_all(&[&message(b"", None)[..], &message(b"a", None), &69_633_u32.to_be_bytes()].concat()).unwrap();
        let mut got = Vec::new();
        let error = intake.read(&far, |frame| got.push(frame.bytes)).unwrap_err();
        assert_eq!(got, [Bytes::from_static(b"a")]);
        assert_eq!(error.to_string(), "a frame of 69633 bytes is above the limit of 69632");
        intake.reset();
        near.write_all(&[0, 0, 0, 9, 1]).unwrap();
        drop(near);
        assert_eq!(intake.read(&far, |_| {}).unwrap(), Taken::Some);
        assert_eq!(intake.read(&far, |_| {}).unwrap(), Taken::Closed(5));
    }
}
