//! What becomes of a request: it is carried out on a disk, and answered.
//!
//! ```text
//!   simple      one header, and what was read
//!   structured  chunks of one reply: data, hole, extents, or an error with its text; the last has CHUNK_DONE
//!   extended    the same with 64-bit lengths and the request's offset
//! ```
//!
//! The trap: a simple reply cannot take its header back. So a disk is asked first and the header is written into the
//! room kept for it; what a structured read has found out before it failed is thrown away too. That holds for what is sent
//! [`Aside`], too: the bytes are taken from the file before anything is said of them.
//!
//! Source: `doc/proto.md`, "Simple reply message", "Structured reply chunk message", "Structured reply types".

use super::transmission::{Command, Request};
use super::*;
use crate::disk::{Disk, Extent};
use crate::pool::Block;
use std::io;
use std::os::fd::BorrowedFd;

/// Reads of at least so many bytes are asked first whether they begin in a hole: below, asking costs more than zeroes.
const HOLES_FROM_BYTES: u32 = 64 << 10;
/// Reads of at least so many bytes may go aside: below, copying costs no more than asking whether they may.
const ASIDE_FROM_BYTES: u32 = 64 << 10;
/// Extents in one reply; a client asks again for what is left.
const MAX_EXTENTS: usize = 1024;
/// State bits of `base:allocation`.
const STATE_HOLE: u64 = 1 << 0;
const STATE_ZERO: u64 = 1 << 1;

/// A way from a file to the client that does not lead through memory of ours.
pub trait Aside: std::fmt::Debug + Send {
    /// Takes `len_bytes` bytes from `offset` of `file`, if they need not be waited for; false if it did not.
    fn take(&mut self, file: BorrowedFd<'_>, offset: u64, len_bytes: usize) -> bool;
    /// Sends `bytes` with all that was taken among them: the first piece behind `places[0]` of the bytes, and so on.
    fn send(&mut self, bytes: &[u8], places: &[usize]) -> io::Result<()>;
}

/// Replies that wait to be sent. It keeps its memory: what is handed out to be filled was zeroed once, not each time.
#[derive(Debug, Default)]
pub struct Replies {
    bytes: Vec<u8>,
    len: usize,
    aside: Option<Box<dyn Aside>>,
    /// Behind how many of the bytes that belongs which went aside, piece by piece.
    places: Vec<usize>,
    aside_bytes: usize,
}

impl Replies {
    /// From now on, much may go aside.
    pub fn open_aside(&mut self, aside: Box<dyn Aside>) {
        self.aside = Some(aside);
    }

    /// How much has gone aside; if anything has, only [`Self::send_aside`] can send what there is.
    #[must_use]
    pub fn aside_bytes(&self) -> usize {
        self.aside_bytes
    }

    /// Sends everything, with what went aside in its places. Then [`Self::clear`] it.
    pub fn send_aside(&mut self) -> io::Result<()> {
        match &mut self.aside {
            Some(aside) => aside.send(&self.bytes[..self.len], &self.places),
            None => Ok(()),
        }
    }

    /// What is to be sent, without what went aside.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// How much that is.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it was sent. More than `keep_bytes` of memory are given back.
    pub fn clear(&mut self, keep_bytes: usize) {
        (self.len, self.aside_bytes) = (0, 0);
        self.places.clear();
        if self.bytes.len() > keep_bytes {
            self.bytes.truncate(keep_bytes);
            self.bytes.shrink_to(keep_bytes);
        }
    }

    /// Room for `len` bytes more; what is in it is anything.
    fn room(&mut self, len: usize) -> &mut [u8] {
        let start = self.len;
        self.len += len;
        if self.bytes.len() < self.len {
            self.bytes.resize(self.len.next_power_of_two().max(4096), 0);
        }
        &mut self.bytes[start..self.len]
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Served {
    /// Its reply is in the output.
    Replied,
    /// The disk cannot take it now; nothing was done and nothing was said. Serve the same request again later.
    Busy,
    /// It would wait for the medium; nothing was said.
    Waits,
    /// The client left: close once the output is sent.
    Disconnect,
}

/// Carries a request out on `disk` and appends the reply to `out`: what was read and a header, or at most
/// 1024 extents. A failing disk is the client's news, not an error here. Send `out` before serving much more: a client
/// that asks without listening would fill it.
pub fn serve(request: &Request<'_>, framing: &Framing, disk: &mut dyn Disk, out: &mut Replies) -> Served {
    respond(request, framing, disk, out, false)
}

/// As [`serve`], but what would wait for the medium is [`Served::Waits`]. A write waits for memory at most.
pub fn serve_now(request: &Request<'_>, framing: &Framing, disk: &mut dyn Disk, out: &mut Replies) -> Served {
    respond(request, framing, disk, out, true)
}

/// Carries out a write whose bytes the disk may keep, as [`serve`] does others. When it is busy, the block is as it was.
pub(super) fn serve_block(
    cookie: u64,
    offset: u64,
    block: &mut Block,
    framing: &Framing,
    disk: &mut dyn Disk,
    out: &mut Replies,
) -> Served {
    answer(Reply { framing, cookie, offset, now: false, out }, |reply| {
        disk.write_block(offset, block)?;
        reply.done();
        Ok(true)
    })
}

fn respond(request: &Request<'_>, framing: &Framing, disk: &mut dyn Disk, out: &mut Replies, now: bool) -> Served {
    let reply = Reply { framing, cookie: request.cookie, offset: request.offset, now, out };
    answer(reply, |reply| reply.carry_out(&request.command, disk))
}

fn answer(mut reply: Reply<'_>, carry_out: impl FnOnce(&mut Reply<'_>) -> Result<bool, Failure>) -> Served {
    let start = reply.out.len;
    match carry_out(&mut reply) {
        Ok(true) => Served::Replied,
        Ok(false) => Served::Disconnect,
        Err(Failure::Disk(DiskError::Busy)) => {
            reply.out.len = start;
            Served::Busy
        }
        Err(Failure::Waits) => {
            reply.out.len = start;
            Served::Waits
        }
        Err(Failure::Disk(error)) => {
            reply.out.len = start;
            reply.error(Errno::of(&error), &error.to_string());
            Served::Replied
        }
        Err(Failure::Refused(errno, why)) => {
            reply.out.len = start;
            reply.error(errno, why);
            Served::Replied
        }
    }
}

enum Failure {
    Disk(DiskError),
    Refused(Errno, &'static str),
    Waits,
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}

struct Reply<'a> {
    framing: &'a Framing,
    cookie: u64,
    offset: u64,
    /// Nothing may wait for the medium.
    now: bool,
    out: &'a mut Replies,
}

impl Reply<'_> {
    /// False when there is nobody to answer.
    fn carry_out(&mut self, command: &Command<'_>, disk: &mut dyn Disk) -> Result<bool, Failure> {
        // Should a flush be busy, the whole request is served again: writing the same bytes twice is harmless.
        let durable = |disk: &mut dyn Disk, fua: bool| if fua { disk.flush() } else { Ok(()) };
        match *command {
            Command::Read { offset, len_bytes, whole } => {
                if self.framing.structured {
                    self.read_chunks(disk, offset, len_bytes, whole)?;
                } else {
                    self.simple(None);
                    self.read(disk, offset, len_bytes)?;
                }
                return Ok(true);
            }
            Command::Status { offset, len_bytes, one } => {
                self.status(disk, offset, len_bytes, if one { 1 } else { MAX_EXTENTS })?;
                return Ok(true);
            }
            Command::Write { offset, data, fua } => {
                disk.write(offset, data)?;
                durable(disk, fua)?;
            }
            Command::Zero { offset, len_bytes, how, fua } => {
                disk.write_zeroes(offset, len_bytes, how)?;
                durable(disk, fua)?;
            }
            Command::Trim { offset, len_bytes, fua } => {
                disk.trim(offset, len_bytes)?;
                durable(disk, fua)?;
            }
            Command::Flush if self.now => return Err(Failure::Waits),
            Command::Flush => disk.flush()?,
            // The page cache does what it does.
            Command::Cache => {}
            Command::Disconnect => return Ok(false),
            Command::Refused(errno, why) => return Err(Failure::Refused(errno, why)),
        }
        self.done();
        Ok(true)
    }

    /// It is done, and that is all there is to say.
    fn done(&mut self) {
        if self.framing.extended {
            self.chunk(CHUNK_DONE, CHUNK_NONE, 0);
        } else {
            // Valid for all but reads and extents, and shorter.
            self.simple(None);
        }
    }

    fn simple(&mut self, errno: Option<Errno>) {
        self.out.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        self.out.put(&errno.map_or(0, Errno::to_wire).to_be_bytes());
        self.out.put(&self.cookie.to_be_bytes());
    }

    fn chunk(&mut self, flags: u16, kind: u16, len_bytes: u32) {
        let magic = if self.framing.extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC };
        self.out.put(&magic.to_be_bytes());
        self.out.put(&flags.to_be_bytes());
        self.out.put(&kind.to_be_bytes());
        self.out.put(&self.cookie.to_be_bytes());
        if self.framing.extended {
            self.out.put(&self.offset.to_be_bytes());
            self.out.put(&u64::from(len_bytes).to_be_bytes());
        } else {
            self.out.put(&len_bytes.to_be_bytes());
        }
    }

    fn error(&mut self, errno: Errno, why: &str) {
        if !self.framing.structured {
            return self.simple(Some(errno));
        }
        let why = &why.as_bytes()[..why.floor_char_boundary(MAX_STRING_BYTES)];
        self.chunk(CHUNK_DONE, CHUNK_ERROR, 6 + why.len() as u32);
        self.out.put(&errno.to_wire().to_be_bytes());
        self.out.put(&(why.len() as u16).to_be_bytes());
        self.out.put(why);
    }

    /// The last thing of a reply.
    fn read(&mut self, disk: &mut dyn Disk, offset: u64, len_bytes: u32) -> Result<(), Failure> {
        if len_bytes >= ASIDE_FROM_BYTES
            && let Some(aside) = &mut self.out.aside
            && let Some((file, at)) = disk.lies_in(offset, len_bytes.into())
            && aside.take(file, at, len_bytes as usize)
        {
            self.out.places.push(self.out.len);
            self.out.aside_bytes += len_bytes as usize;
            return Ok(());
        }
        let into = self.out.room(len_bytes as usize);
        if !self.now {
            disk.read(offset, into)?;
        } else if !disk.read_now(offset, into)? {
            return Err(Failure::Waits);
        }
        Ok(())
    }

    fn read_chunks(&mut self, disk: &mut dyn Disk, offset: u64, len_bytes: u32, whole: bool) -> Result<(), Failure> {
        if len_bytes == 0 {
            self.chunk(CHUNK_DONE, CHUNK_NONE, 0);
            return Ok(());
        }
        let asked = !whole && len_bytes >= HOLES_FROM_BYTES;
        let hole_bytes = if asked { disk.leading_hole_bytes(offset, len_bytes.into()) } else { 0 };
        // No longer than the request.
        let hole_bytes = hole_bytes.min(len_bytes.into()) as u32;
        if hole_bytes > 0 {
            self.chunk(if hole_bytes == len_bytes { CHUNK_DONE } else { 0 }, CHUNK_OFFSET_HOLE, 12);
            self.out.put(&offset.to_be_bytes());
            self.out.put(&hole_bytes.to_be_bytes());
        }
        if hole_bytes < len_bytes {
            let (offset, len_bytes) = (offset + u64::from(hole_bytes), len_bytes - hole_bytes);
            self.chunk(CHUNK_DONE, CHUNK_OFFSET_DATA, 8 + len_bytes);
            self.out.put(&offset.to_be_bytes());
            self.read(disk, offset, len_bytes)?;
        }
        Ok(())
    }

    fn status(&mut self, disk: &mut dyn Disk, offset: u64, len_bytes: u64, max: usize) -> Result<(), DiskError> {
        let framing = self.framing;
        // Lengths of 32 bits end where those bits do, and stay multiples of any block.
        let len_bytes = if framing.extended { len_bytes } else { len_bytes.min(u64::from(u32::MAX - 0xffff)) };
        for (index, context) in framing.contexts.iter().enumerate() {
            let runs: Vec<(u64, u64)> = match context {
                Context::Allocation => {
                    let bits =
                        |extent: &Extent| (u64::from(extent.hole) * STATE_HOLE) | (u64::from(extent.zero) * STATE_ZERO);
                    disk.extents(offset, len_bytes, max)?.iter().map(|run| (run.len_bytes, bits(run))).collect()
                }
                Context::Depth => vec![(len_bytes, 1)],
                Context::Changed => {
                    let runs = disk.changed(offset, len_bytes, max)?.unwrap_or_else(|| vec![(len_bytes, true)]);
                    runs.into_iter().map(|(len, differs)| (len, u64::from(differs))).collect()
                }
            };
            let flags = if index + 1 == framing.contexts.len() { CHUNK_DONE } else { 0 };
            let count = runs.len() as u32;
            if framing.extended {
                self.chunk(flags, CHUNK_BLOCK_STATUS_EXT, 8 + 16 * count);
                self.out.put(&context.id().to_be_bytes());
                self.out.put(&count.to_be_bytes());
            } else {
                self.chunk(flags, CHUNK_BLOCK_STATUS, 4 + 8 * count);
                self.out.put(&context.id().to_be_bytes());
            }
            for (len, bits) in runs {
                if framing.extended {
                    self.out.put(&len.to_be_bytes());
                    self.out.put(&bits.to_be_bytes());
                } else {
                    self.out.put(&(len as u32).to_be_bytes());
                    self.out.put(&(bits as u32).to_be_bytes());
                }
            }
        }
        Ok(())
    }
}
