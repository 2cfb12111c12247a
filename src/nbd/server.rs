//! One client of a server, from its first byte to its last: bytes in, bytes out, and a disk.
//!
//! ```text
//!   room(), filled(n) ─▶ negotiate() ─▶ export() ─▶ serve(disk) ─▶ Next ── Input    read more
//!                                                                       ── Output   send output(), then sent()
//!                                                                       ── Busy     the disk is; later again
//!                                                                       ── Later    take later(), and go on
//!                                          ── StartTls  send, put TLS on the socket, then encrypted()
//!                                                                       ── Closed   send what there is, and close
//! ```
//!
//! Requests are carried out in order, and their replies collected until the input is used up or there are
//! [`REPLY_BATCH_BYTES`] of them. A driver that can do several things at once says [`Server::defer`]: then reads and
//! flushes that would wait for the medium are given to it, to be carried out beside what follows. NBD allows every order
//! of replies, and a flush owes durability only to writes that were answered before it came: those have been made.
//!
//! The trap is memory that a client chooses: it holds one request of at most 32 MiB here and one batch of replies, and
//! both shrink again; a read of more than [`LATER_MAX_BYTES`] is not deferred.

use super::handshake::{Encryption, Export, Handshake, Negotiated};
use super::reply::{Aside, Replies, Served, serve, serve_block, serve_now};
use super::transmission::{Command, Decoder, Request};
use super::*;
use crate::disk::Disk;
use crate::pool::{Block, POOLED_FROM_BYTES, Pool};
use bytes::BytesMut;

/// Bytes of replies collected before they are sent: enough to make a system call cheap, and little enough that the
/// client works on the first while the next are made.
pub const REPLY_BATCH_BYTES: usize = 128 << 10;
/// The same of what goes aside: it is sent at once without a copy before.
pub const ASIDE_BATCH_BYTES: usize = 1 << 20;
/// The least that is asked of the socket at once.
const READ_BYTES: usize = 64 << 10;
/// How large the input begins. Memory that nothing arrives in is never touched.
const INPUT_BYTES: usize = 1 << 20;
/// What a buffer has beside a large payload: the headers before it.
const BESIDE_BYTES: usize = 4096;
/// Longest read that is deferred.
pub const LATER_MAX_BYTES: u32 = 1 << 20;
/// Buffers keep this much for a client that is quiet.
pub const KEPT_BYTES: usize = 2 << 20;

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// More bytes are needed.
    Input,
    /// There is something to send, and then more to do.
    Output,
    /// The disk cannot take the next request yet.
    Busy,
    /// A request waits for the medium: [`Server::later`] has it. There may be something to send as well.
    Later,
    /// The connection is to be encrypted.
    StartTls,
    /// The client left.
    Closed,
}

/// Bytes that arrived. It keeps its memory.
#[derive(Debug, Default)]
struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Where buffers that were given away come back to.
    pool: Pool,
}

impl Input {
    /// Room for more, enough for what is wanted; of a large payload that is wanted alone, `exactly` that.
    fn room(&mut self, wanted_bytes: usize, exactly: bool) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.bytes.len() > KEPT_BYTES && wanted_bytes <= KEPT_BYTES {
                self.bytes = Vec::new();
            }
        }
        let is_large = wanted_bytes >= POOLED_FROM_BYTES;
        let missing = wanted_bytes.saturating_sub(self.end - self.start);
        let needed = if is_large { missing } else { missing.max(READ_BYTES) };
        if self.bytes.is_empty() {
            self.bytes = self.pool.buffer(needed.max(INPUT_BYTES) + BESIDE_BYTES);
        }
        if self.bytes.len() - self.end < needed {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            if self.bytes.len() - self.end < needed {
                self.bytes.resize((self.end + needed).max(INPUT_BYTES), 0);
            }
        }
        let room = &mut self.bytes[self.end..];
        if is_large && exactly { &mut room[..missing] } else { room }
    }

    /// Whether the `len` bytes before the start are most of the buffer, and little is behind them.
    fn can_lend(&self, len: usize) -> bool {
        len >= POOLED_FROM_BYTES && len * 2 >= self.bytes.capacity() && (self.end - self.start) * 2 <= len
    }

    /// Lets `write` have these bytes as a block, and the buffer with them if it keeps it.
    fn lend<T>(&mut self, len: usize, write: impl FnOnce(&mut Block) -> T) -> T {
        let (start, end) = (self.start, self.end);
        let mut next = self.pool.buffer((end - start).max(INPUT_BYTES) + BESIDE_BYTES);
        next[..end - start].copy_from_slice(&self.bytes[start..end]);
        let mut block = self.pool.block(std::mem::take(&mut self.bytes), start - len..start);
        let written = write(&mut block);
        if block.is_empty() {
            (self.bytes, self.start, self.end) = (next, 0, end - start);
        } else {
            self.bytes = block.into_buffer();
            self.pool.give_back(next);
        }
        written
    }
}

/// A request that waits for the medium.
#[derive(Debug)]
pub struct Later {
    request: Request<'static>,
    framing: Framing,
}

impl Later {
    /// Carries it out, and waits for that.
    pub fn carry_out(&self, disk: &mut dyn Disk, out: &mut Replies) -> Served {
        serve(&self.request, &self.framing, disk, out)
    }
}

/// What of a command could be deferred: nothing that has a payload in the input.
fn deferrable(command: &Command<'_>) -> Option<Command<'static>> {
    match *command {
        Command::Read { offset, len_bytes, whole } if len_bytes <= LATER_MAX_BYTES => {
            Some(Command::Read { offset, len_bytes, whole })
        }
        Command::Flush => Some(Command::Flush),
        _ => None,
    }
}

#[derive(Debug)]
enum Phase {
    Handshake(Box<Handshake>),
    Transmission(Decoder),
}

/// One client.
#[derive(Debug)]
pub struct Server {
    phase: Phase,
    input: Input,
    replies: Replies,
    /// The chosen export.
    export: Option<usize>,
    /// Whether the driver takes what waits.
    defers: bool,
    /// Whether the disk may keep what is written.
    keeps_blocks: bool,
    later: Option<Later>,
}

impl Server {
    /// A client that has just connected.
    #[must_use]
    pub fn new(exports: Vec<Export>, encryption: Encryption) -> Self {
        let handshake = Handshake::new(exports).with_encryption(encryption);
        Self {
            phase: Phase::Handshake(Box::new(handshake)),
            input: Input::default(),
            replies: Replies::default(),
            export: None,
            defers: false,
            keeps_blocks: false,
            later: None,
        }
    }

    /// From now on, what waits for the medium is [`Next::Later`].
    pub fn defer(&mut self) {
        self.defers = true;
    }

    /// The request of a [`Next::Later`].
    pub fn later(&mut self) -> Option<Later> {
        self.later.take()
    }

    /// Where bytes of the client go; then say [`Self::filled`].
    pub fn room(&mut self) -> &mut [u8] {
        let wanted = match &self.phase {
            Phase::Transmission(decoder) => decoder.wants_bytes(),
            Phase::Handshake(_) => 0,
        };
        self.input.room(wanted, self.keeps_blocks)
    }

    /// That many bytes arrived.
    pub fn filled(&mut self, bytes: usize) {
        self.input.end = (self.input.end + bytes).min(self.input.bytes.len());
    }

    /// From now on, reads of much of a file need not pass through memory.
    pub fn open_aside(&mut self, aside: Box<dyn Aside>) {
        self.replies.open_aside(aside);
    }

    /// Whether there is among what is to be sent what [`Self::output`] does not show, and only [`Self::send_aside`] can send.
    #[must_use]
    pub fn went_aside(&self) -> bool {
        self.replies.aside_bytes() > 0
    }

    /// Sends all there is, that included; then say [`Self::sent`].
    pub fn send_aside(&mut self) -> std::io::Result<()> {
        self.replies.send_aside()
    }

    /// What is to be sent.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        self.replies.as_slice()
    }

    /// All of [`Self::output`] was sent.
    pub fn sent(&mut self) {
        self.replies.clear(KEPT_BYTES);
    }

    /// Which export the client chose, once it has: an index into the list given to [`Self::new`].
    #[must_use]
    pub fn export(&self) -> Option<usize> {
        self.export
    }

    /// The connection is encrypted from here on.
    pub fn encrypted(&mut self) {
        if let Phase::Handshake(handshake) = &mut self.phase {
            handshake.encrypted();
            // What came behind the option came in the clear.
            self.input = Input::default();
        }
    }

    /// Carries out what has arrived, once an export is chosen. After an error send what there is, and close.
    pub fn serve(&mut self, disk: &mut dyn Disk) -> Result<Next, NbdError> {
        let Phase::Transmission(decoder) = &mut self.phase else { return Ok(Next::Input) };
        self.keeps_blocks = disk.keeps_blocks();
        loop {
            let (place, before) = (decoder.place(), self.input.start);
            let mut rest = &self.input.bytes[before..self.input.end];
            let request = decoder.decode(&mut rest)?;
            self.input.start = self.input.end - rest.len();
            let Some(request) = request else {
                return Ok(if self.replies.is_empty() { Next::Input } else { Next::Output });
            };
            let framing = decoder.framing();
            let block = match request.command {
                Command::Write { offset, data, fua: false } if self.keeps_blocks && self.input.can_lend(data.len()) => {
                    Some((request.cookie, offset, data.len()))
                }
                _ => None,
            };
            let served = match (block, deferrable(&request.command).filter(|_| self.defers)) {
                (Some((cookie, offset, len)), _) => {
                    let replies = &mut self.replies;
                    self.input.lend(len, |block| serve_block(cookie, offset, block, framing, disk, replies))
                }
                (None, None) => serve(&request, framing, disk, &mut self.replies),
                (None, Some(command)) => match serve_now(&request, framing, disk, &mut self.replies) {
                    Served::Waits => {
                        let request = Request { cookie: request.cookie, offset: request.offset, command };
                        self.later = Some(Later { request, framing: framing.clone() });
                        Served::Waits
                    }
                    served => served,
                },
            };
            match served {
                Served::Waits => return Ok(Next::Later),
                Served::Replied
                    if self.replies.len() < REPLY_BATCH_BYTES && self.replies.aside_bytes() < ASIDE_BATCH_BYTES => {}
                Served::Replied => return Ok(Next::Output),
                Served::Busy => {
                    decoder.rewind(place);
                    self.input.start = before;
                    return Ok(if self.replies.is_empty() { Next::Busy } else { Next::Output });
                }
                Served::Disconnect => return Ok(Next::Closed),
            }
        }
    }

    /// Goes on with the negotiation, until an export is chosen. After an error send what there is, and close.
    pub fn negotiate(&mut self) -> Result<Next, NbdError> {
        let Phase::Handshake(handshake) = &mut self.phase else { return Ok(Next::Output) };
        let mut input = BytesMut::from(&self.input.bytes[self.input.start..self.input.end]);
        let progress = handshake.handle_input(&mut input);
        self.input.start = self.input.end - input.len();
        while let Some(bytes) = handshake.poll_output() {
            self.replies.put(&bytes);
        }
        match progress? {
            None => Ok(if self.replies.is_empty() { Next::Input } else { Next::Output }),
            Some(Negotiated::StartTls) => Ok(Next::StartTls),
            Some(Negotiated::Export { index, framing }) => {
                self.phase = Phase::Transmission(Decoder::new(&handshake.exports()[index], framing));
                self.export = Some(index);
                Ok(Next::Output)
            }
        }
    }
}
