//! The server's half of the transmission phase: requests in. What becomes of them is [`super::reply`]'s.
//!
//! ```text
//!  bytes ─▶ Decoder ── Request ─▶ serve(disk) ── reply ─▶ bytes
//!             │ Header ── WRITE that may be carried out ──▶ Payload ──▶ Header
//!             └────────── WRITE that may not ─────────────▶ Skipping ─▶ Header
//! ```
//!
//! The trap: a refused WRITE still has its payload on the wire. Whatever is wrong with the request, exactly that
//! many bytes are taken off before the next header is looked for, or the connection is closed; a server that
//! answers and forgets them reads guest data as requests. A request that makes no sense becomes
//! [`Command::Refused`], which is answered like any other, so the connection survives.
//!
//! Source: `doc/proto.md`, "Transmission", "Request message", "Request types", "Command flags", "Error values"; for
//! extended headers the branch `extension-ext-header` of the same.

use super::*;
use crate::disk::{Zeroing, check_range};
use bytes::Buf;

/// Longest payload of a refused write that is skipped; a longer one closes the connection.
pub const MAX_SKIPPED_PAYLOAD_BYTES: u64 = 2 * MAX_PAYLOAD_BYTES as u64;

const HEADER_BYTES: usize = 28;
const EXTENDED_HEADER_BYTES: usize = 32;

/// What a client asks for, already known to lie inside the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    /// Read `len_bytes` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes, at most [`MAX_PAYLOAD_BYTES`].
        len_bytes: u32,
        /// The client wants it in one chunk.
        whole: bool,
    },
    /// Write `data`.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes, at most [`MAX_PAYLOAD_BYTES`].
        data: &'a [u8],
        /// Whether they must be durable before the reply.
        fua: bool,
    },
    /// Write zeroes.
    Zero {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len_bytes: u64,
        /// How.
        how: Zeroing,
        /// Whether they must be durable before the reply.
        fua: bool,
    },
    /// These bytes are not needed any more.
    Trim {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len_bytes: u64,
        /// Whether that must be durable before the reply.
        fua: bool,
    },
    /// These bytes will be read soon: a hint.
    Cache,
    /// Describe these bytes in the contexts that were chosen.
    Status {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len_bytes: u64,
        /// One extent is enough.
        one: bool,
    },
    /// Make completed writes durable.
    Flush,
    /// The client leaves; there is no reply.
    Disconnect,
    /// A request this export does not carry out; only its error remains to be sent.
    Refused(Errno, &'static str),
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// The client's number for it, echoed in the reply.
    pub cookie: u64,
    /// The first byte it is about, echoed in extended replies.
    pub offset: u64,
    /// What it is.
    pub command: Command<'a>,
}

#[derive(Debug, Clone, Copy)]
struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len_bytes: u64,
}

/// Where a decoder is in a message.
#[derive(Debug, Clone, Copy)]
pub struct Place(State);

#[derive(Debug, Clone, Copy)]
enum State {
    Header,
    Payload(Header),
    Skipping { header: Header, refusal: Refusal, left_bytes: u64 },
}

type Refusal = (Errno, &'static str);

/// Takes requests off one client's byte stream.
#[derive(Debug)]
pub struct Decoder {
    size_bytes: u64,
    read_only: bool,
    fast_zero: bool,
    framing: Framing,
    state: State,
}

impl Decoder {
    /// A decoder for a client that negotiated `export` with `framing`.
    #[must_use]
    pub fn new(export: &handshake::Export, framing: Framing) -> Self {
        let &handshake::Export { size_bytes, read_only, fast_zero, .. } = export;
        Self { size_bytes, read_only, fast_zero, framing, state: State::Header }
    }

    /// How replies are framed.
    #[must_use]
    pub fn framing(&self) -> &Framing {
        &self.framing
    }

    /// How many bytes there must be before [`Self::decode`] can get on: never more than a header or a payload of
    /// [`MAX_PAYLOAD_BYTES`].
    #[must_use]
    pub fn wants_bytes(&self) -> usize {
        match self.state {
            State::Header if self.framing.extended => EXTENDED_HEADER_BYTES,
            State::Header => HEADER_BYTES,
            State::Payload(header) => header.len_bytes as usize,
            State::Skipping { .. } => 1,
        }
    }

    /// Where it is; with the input of that moment, [`Self::rewind`] takes it back there.
    #[must_use]
    pub fn place(&self) -> Place {
        Place(self.state)
    }

    /// Back to `place`: the request decoded since will come again.
    pub fn rewind(&mut self, place: Place) {
        self.state = place.0;
    }

    /// Takes one request off `input`, which moves on; `None` when more bytes are needed. After an error the stream has
    /// no meaning any more: close.
    pub fn decode<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Request<'a>>, NbdError> {
        loop {
            match self.state {
                State::Skipping { header, refusal, left_bytes } => {
                    let skipped = left_bytes.min(input.len() as u64);
                    input.advance(skipped as usize);
                    let left_bytes = left_bytes - skipped;
                    if left_bytes > 0 {
                        self.state = State::Skipping { header, refusal, left_bytes };
                        return Ok(None);
                    }
                    self.state = State::Header;
                    return Ok(Some(header.request(Command::Refused(refusal.0, refusal.1))));
                }
                _ if input.len() < self.wants_bytes() => return Ok(None),
                State::Payload(header) => {
                    self.state = State::Header;
                    let (data, rest) = input.split_at(header.len_bytes as usize);
                    *input = rest;
                    let fua = header.has(CMD_FLAG_FUA);
                    return Ok(Some(header.request(Command::Write { offset: header.offset, data, fua })));
                }
                State::Header => {
                    let header = self.header(input)?;
                    if let Some(request) = self.handle_header(header)? {
                        return Ok(Some(request));
                    }
                }
            }
        }
    }

    fn header(&self, input: &mut &[u8]) -> Result<Header, NbdError> {
        let extended = self.framing.extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        expect_magic("request", magic.into(), input.get_u32().into())?;
        let (flags, kind, cookie, offset) = (input.get_u16(), input.get_u16(), input.get_u64(), input.get_u64());
        let len_bytes = if extended { input.get_u64() } else { input.get_u32().into() };
        Ok(Header { flags, kind, cookie, offset, len_bytes })
    }

    fn handle_header<'a>(&mut self, header: Header) -> Result<Option<Request<'a>>, NbdError> {
        let Header { kind, offset, len_bytes, .. } = header;
        // A payload without the flag is none, and the other way round.
        let payload = if self.framing.extended { header.has(CMD_FLAG_PAYLOAD_LEN) } else { kind == CMD_WRITE };
        let fua = header.has(CMD_FLAG_FUA);
        let command = match (kind, self.refusal(&header)) {
            (_, Some(_)) if payload && len_bytes > MAX_SKIPPED_PAYLOAD_BYTES => {
                return Err(NbdError::TooLong { what: "payload", len_bytes, max_bytes: MAX_PAYLOAD_BYTES.into() });
            }
            (_, Some(refusal)) if payload => {
                self.state = State::Skipping { header, refusal, left_bytes: len_bytes };
                return Ok(None);
            }
            (CMD_WRITE, None) => {
                self.state = State::Payload(header);
                return Ok(None);
            }
            // It has no reply, so there is nothing to refuse it with.
            (CMD_DISC, _) => Command::Disconnect,
            (_, Some((errno, why))) => Command::Refused(errno, why),
            // As long as a payload at most, said the refusal.
            (CMD_READ, None) => Command::Read { offset, len_bytes: len_bytes as u32, whole: header.has(CMD_FLAG_DF) },
            (CMD_WRITE_ZEROES, None) => {
                let keep_allocated = header.has(CMD_FLAG_NO_HOLE);
                let how = Zeroing { keep_allocated, fast_only: header.has(CMD_FLAG_FAST_ZERO) };
                Command::Zero { offset, len_bytes, how, fua }
            }
            (CMD_TRIM, None) => Command::Trim { offset, len_bytes, fua },
            (CMD_CACHE, None) => Command::Cache,
            (CMD_BLOCK_STATUS, None) => Command::Status { offset, len_bytes, one: header.has(CMD_FLAG_REQ_ONE) },
            (_, None) => Command::Flush,
        };
        Ok(Some(header.request(command)))
    }

    /// Why a request is not to be carried out, the first reason that applies. FUA is valid on every command.
    fn refusal(&self, header: &Header) -> Option<Refusal> {
        let &Header { kind, offset, len_bytes, .. } = header;
        let outside = check_range(self.size_bytes, offset, len_bytes).is_err();
        let extended = self.framing.extended;
        let allowed = CMD_FLAG_FUA
            | match kind {
                CMD_READ if self.framing.structured => CMD_FLAG_DF,
                CMD_WRITE if extended => CMD_FLAG_PAYLOAD_LEN,
                CMD_WRITE_ZEROES if self.fast_zero => CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
                CMD_WRITE_ZEROES => CMD_FLAG_NO_HOLE,
                CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
                _ => 0,
            };
        let no_contexts = self.framing.contexts.is_empty();
        let writes = matches!(kind, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
        Some(match kind {
            CMD_READ..=CMD_BLOCK_STATUS if header.flags & !allowed != 0 => (Errno::Invalid, "a flag is not understood"),
            CMD_WRITE if extended && !header.has(CMD_FLAG_PAYLOAD_LEN) => {
                (Errno::Invalid, "a write must say that its length is a payload's")
            }
            _ if writes && self.read_only => (Errno::NotPermitted, "this export is read-only"),
            CMD_READ | CMD_WRITE if len_bytes > MAX_PAYLOAD_BYTES.into() => (Errno::Invalid, "longer than 32 MiB"),
            CMD_WRITE | CMD_WRITE_ZEROES if outside => (Errno::NoSpace, "past the end"),
            CMD_READ | CMD_TRIM | CMD_CACHE | CMD_BLOCK_STATUS if outside => (Errno::Invalid, "past the end"),
            CMD_BLOCK_STATUS if no_contexts => (Errno::Invalid, "no metadata context was chosen"),
            CMD_BLOCK_STATUS if len_bytes == 0 => (Errno::Invalid, "of no bytes there is nothing to say"),
            CMD_READ..=CMD_BLOCK_STATUS => return None,
            _ => (Errno::Invalid, "the request is not understood"),
        })
    }
}

impl Header {
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn request<'a>(&self, command: Command<'a>) -> Request<'a> {
        Request { cookie: self.cookie, offset: self.offset, command }
    }
}
