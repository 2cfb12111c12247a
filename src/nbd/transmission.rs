//! The server's half of the transmission phase: requests in, simple replies out.
//!
//! ```text
//!  bytes ─▶ Decoder ── Request ─▶ serve(disk) ── simple reply ─▶ bytes
//!             │ Header ── WRITE that may be carried out ──▶ Payload ──▶ Header
//!             └────────── WRITE that may not ─────────────▶ Skipping ─▶ Header
//! ```
//!
//! The trap: a refused WRITE still has its payload on the wire. Whatever is wrong with the request, exactly that
//! many bytes are taken off before the next header is looked for, or the connection is closed; a server that
//! answers and forgets them reads guest data as requests. A request that makes no sense becomes
//! [`Command::Refused`], which is answered like any other, so the connection survives.
//!
//! Source: `doc/proto.md`, "Transmission", "Request message", "Simple reply message", "Request types",
//! "Error values".

use super::*;
use crate::disk::{Disk, check_range};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Longest payload of a refused write that is skipped; a longer one closes the connection.
pub const MAX_SKIPPED_PAYLOAD_BYTES: u32 = 2 * MAX_PAYLOAD_BYTES;

const REQUEST_HEADER_BYTES: usize = 28;

/// What a client asks for, already known to lie inside the export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Read `len_bytes` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes, at most [`MAX_PAYLOAD_BYTES`].
        len_bytes: u32,
    },
    /// Write `data`.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes, at most [`MAX_PAYLOAD_BYTES`].
        data: Bytes,
        /// Whether they must be durable before the reply.
        fua: bool,
    },
    /// Make completed writes durable.
    Flush,
    /// The client leaves; there is no reply.
    Disconnect,
    /// A request this export does not carry out; only its error remains to be sent.
    Refused(Errno),
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The client's number for it, echoed in the reply.
    pub cookie: u64,
    /// What it is.
    pub command: Command,
}

#[derive(Debug)]
enum State {
    Header,
    Payload { cookie: u64, offset: u64, len_bytes: u32, fua: bool },
    Skipping { cookie: u64, errno: Errno, left_bytes: u32 },
}

/// Takes requests off one client's byte stream.
#[derive(Debug)]
pub struct Decoder {
    size_bytes: u64,
    read_only: bool,
    state: State,
}

impl Decoder {
    /// A decoder for a client that negotiated `export`.
    #[must_use]
    pub fn new(export: &handshake::Export) -> Self {
        Self { size_bytes: export.size_bytes, read_only: export.read_only, state: State::Header }
    }

    /// The next request, or `None` when more bytes are needed. Never waits for more than one header and one
    /// payload of [`MAX_PAYLOAD_BYTES`]. After an error the stream has no meaning any more: close.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Request>, NbdError> {
        loop {
            match self.state {
                State::Header if input.len() >= REQUEST_HEADER_BYTES => {
                    let mut header = input.split_to(REQUEST_HEADER_BYTES);
                    if let Some(request) = self.handle_header(&mut header)? {
                        return Ok(Some(request));
                    }
                }
                State::Payload { cookie, offset, len_bytes, fua } if input.len() >= len_bytes as usize => {
                    self.state = State::Header;
                    let data = input.split_to(len_bytes as usize).freeze();
                    return Ok(Some(Request { cookie, command: Command::Write { offset, data, fua } }));
                }
                State::Skipping { cookie, errno, left_bytes } => {
                    let skipped = input.len().min(left_bytes as usize);
                    input.advance(skipped);
                    let left_bytes = left_bytes - skipped as u32;
                    if left_bytes > 0 {
                        self.state = State::Skipping { cookie, errno, left_bytes };
                        return Ok(None);
                    }
                    self.state = State::Header;
                    return Ok(Some(Request { cookie, command: Command::Refused(errno) }));
                }
                State::Header | State::Payload { .. } => return Ok(None),
            }
        }
    }

    fn handle_header(&mut self, header: &mut BytesMut) -> Result<Option<Request>, NbdError> {
        expect_magic("request", REQUEST_MAGIC.into(), header.get_u32().into())?;
        let (flags, kind, cookie) = (header.get_u16(), header.get_u16(), header.get_u64());
        let (offset, len_bytes) = (header.get_u64(), header.get_u32());
        let refusal = self.refusal(kind, flags, offset, len_bytes);
        let command = match (kind, refusal) {
            (CMD_WRITE, Some(_)) if len_bytes > MAX_SKIPPED_PAYLOAD_BYTES => {
                let (len_bytes, max_bytes) = (len_bytes.into(), MAX_PAYLOAD_BYTES.into());
                return Err(NbdError::TooLong { what: "payload", len_bytes, max_bytes });
            }
            (CMD_WRITE, Some(errno)) => {
                self.state = State::Skipping { cookie, errno, left_bytes: len_bytes };
                return Ok(None);
            }
            (CMD_WRITE, None) => {
                self.state = State::Payload { cookie, offset, len_bytes, fua: flags & CMD_FLAG_FUA != 0 };
                return Ok(None);
            }
            // It has no reply, so there is nothing to refuse it with.
            (CMD_DISC, _) => Command::Disconnect,
            (_, Some(errno)) => Command::Refused(errno),
            (CMD_READ, None) => Command::Read { offset, len_bytes },
            (CMD_FLUSH, None) => Command::Flush,
            (_, None) => Command::Refused(Errno::Invalid),
        };
        Ok(Some(Request { cookie, command }))
    }

    /// Why a request is not to be carried out, the first reason that applies. FUA is valid on every command.
    fn refusal(&self, kind: u16, flags: u16, offset: u64, len_bytes: u32) -> Option<Errno> {
        let outside = check_range(self.size_bytes, offset, len_bytes.into()).is_err();
        match kind {
            _ if flags & !CMD_FLAG_FUA != 0 => Some(Errno::Invalid),
            CMD_WRITE if self.read_only => Some(Errno::NotPermitted),
            CMD_READ | CMD_WRITE if len_bytes > MAX_PAYLOAD_BYTES => Some(Errno::Invalid),
            CMD_READ if outside => Some(Errno::Invalid),
            CMD_WRITE if outside => Some(Errno::NoSpace),
            _ => None,
        }
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
    /// The client left: close once the output is sent.
    Disconnect,
}

/// Carries a request out on `disk` and appends the reply to `out`: at most 16 bytes and what was read. A failing
/// disk is the client's news, not an error here. Send `out` before serving much more: a client that asks without
/// listening would fill it.
pub fn serve(request: &Request, disk: &mut dyn Disk, out: &mut BytesMut) -> Served {
    let start = out.len();
    put_reply(out, request.cookie, None);
    let result = match &request.command {
        Command::Read { offset, len_bytes } => {
            let data_at = out.len();
            out.resize(data_at + *len_bytes as usize, 0);
            disk.read(*offset, &mut out[data_at..])
        }
        Command::Write { offset, data, fua } => {
            // Should the flush be busy, the whole request is served again: writing the same bytes twice is harmless.
            disk.write(*offset, data).and_then(|()| if *fua { disk.flush() } else { Ok(()) })
        }
        Command::Flush => disk.flush(),
        Command::Disconnect => {
            out.truncate(start);
            return Served::Disconnect;
        }
        Command::Refused(errno) => {
            out.truncate(start);
            put_reply(out, request.cookie, Some(*errno));
            return Served::Replied;
        }
    };
    match result {
        Ok(()) => Served::Replied,
        Err(DiskError::Busy) => {
            out.truncate(start);
            Served::Busy
        }
        Err(error) => {
            out.truncate(start);
            put_reply(out, request.cookie, Some(Errno::of(&error)));
            Served::Replied
        }
    }
}

fn put_reply(out: &mut BytesMut, cookie: u64, errno: Option<Errno>) {
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(errno.map_or(0, Errno::to_wire));
    out.put_u64(cookie);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;
    use crate::nbd::handshake::Export;

    fn request(flags: u16, kind: u16, cookie: u64, offset: u64, len_bytes: u32) -> Vec<u8> {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
        bytes.put_u16(flags);
        bytes.put_u16(kind);
        bytes.put_u64(cookie);
        bytes.put_u64(offset);
        bytes.put_u32(len_bytes);
        bytes
    }

    fn reply(errno: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x67, 0x44, 0x66, 0x98];
        bytes.put_u32(errno);
        bytes.put_u64(cookie);
        bytes.put_slice(data);
        bytes
    }

    /// Feeds everything and serves everything.
    fn converse(decoder: &mut Decoder, disk: &mut dyn Disk, input: &[u8]) -> Vec<u8> {
        let (mut input, mut out) = (BytesMut::from(input), BytesMut::new());
        while let Some(request) = decoder.decode(&mut input).unwrap() {
            assert_eq!(serve(&request, disk, &mut out), Served::Replied);
        }
        out.to_vec()
    }

    #[test]
    fn writes_are_read_back() {
        let (mut decoder, mut disk) = (Decoder::new(&Export::new("", 64)), MemoryDisk::new(64));
        let mut said = request(0, CMD_WRITE, 7, 60, 4);
        said.extend(b"abcd");
        said.extend(request(1, CMD_READ, 8, 59, 5));
        said.extend(request(0, CMD_FLUSH, 9, 0, 0));
        said.extend(request(0, CMD_READ, 10, 64, 0));
        let heard = [reply(0, 7, b""), reply(0, 8, b"\0abcd"), reply(0, 9, b""), reply(0, 10, b"")];
        assert_eq!(converse(&mut decoder, &mut disk, &said), heard.concat());
        let bye = decoder.decode(&mut BytesMut::from(&request(0, CMD_DISC, 1, 2, 3)[..])).unwrap().unwrap();
        let mut out = BytesMut::new();
        assert_eq!((serve(&bye, &mut disk, &mut out), out.len()), (Served::Disconnect, 0));
    }

    #[test]
    fn a_refused_request_is_answered_and_the_next_one_is_found() {
        let size = u64::from(MAX_PAYLOAD_BYTES) + 512;
        let cases = [
            (0, CMD_READ, size - 1, 1, None),
            (0, CMD_READ, size - 1, 2, Some(Errno::Invalid)),
            (0, CMD_READ, u64::MAX, 2, Some(Errno::Invalid)),
            (0, CMD_READ, 0, MAX_PAYLOAD_BYTES, None),
            (0, CMD_READ, 0, MAX_PAYLOAD_BYTES + 1, Some(Errno::Invalid)),
            (2, CMD_READ, 0, 1, Some(Errno::Invalid)),
            (0, CMD_WRITE, size - 1, 2, Some(Errno::NoSpace)),
            (0, CMD_WRITE, u64::MAX - 1, 4, Some(Errno::NoSpace)),
            (0, CMD_WRITE, 0, MAX_PAYLOAD_BYTES, None),
            (0, CMD_WRITE, 0, MAX_PAYLOAD_BYTES + 1, Some(Errno::Invalid)),
            (0, CMD_WRITE, 0, MAX_SKIPPED_PAYLOAD_BYTES, Some(Errno::Invalid)),
            (4, CMD_WRITE, 0, 9, Some(Errno::Invalid)),
            (0, 4, 0, 512, Some(Errno::Invalid)),
            (0, 6, 0, 512, Some(Errno::Invalid)),
            (0, 99, u64::MAX, u32::MAX, Some(Errno::Invalid)),
        ];
        let (mut decoder, mut disk) = (Decoder::new(&Export::new("", size)), MemoryDisk::new(size as usize));
        for (flags, kind, offset, len, errno) in cases {
            let mut said = request(flags, kind, 5, offset, len);
            if kind == CMD_WRITE {
                said.resize(said.len() + len as usize, b'x');
            }
            said.extend(request(0, CMD_FLUSH, 6, 0, 0));
            let heard = converse(&mut decoder, &mut disk, &said);
            assert_eq!(heard[4..8], errno.map_or(0, Errno::to_wire).to_be_bytes(), "{kind} {offset} {len}");
            assert_eq!(heard[heard.len() - 16..], reply(0, 6, b""));
        }
    }

    #[test]
    fn a_payload_nobody_would_send_closes() {
        let mut decoder = Decoder::new(&Export::new("", 64));
        let header = request(0, CMD_WRITE, 1, 0, MAX_SKIPPED_PAYLOAD_BYTES + 1);
        assert!(matches!(decoder.decode(&mut BytesMut::from(&header[..])), Err(NbdError::TooLong { .. })));
        let mut decoder = Decoder::new(&Export::new("", 64));
        assert!(matches!(decoder.decode(&mut BytesMut::from(&[0; 28][..])), Err(NbdError::BadMagic { .. })));
    }

    #[test]
    fn a_read_only_export_takes_no_writes() {
        let mut export = Export::new("", 64);
        export.read_only = true;
        let mut said = request(0, CMD_WRITE, 1, 0, 2);
        said.extend(b"no");
        let heard = converse(&mut Decoder::new(&export), &mut MemoryDisk::new(64), &said);
        assert_eq!(heard, reply(1, 1, b""));
    }

    /// Fails every call, or counts flushes.
    struct Moody(Option<fn() -> DiskError>, usize);
    impl Moody {
        fn answer(&self) -> Result<(), DiskError> {
            self.0.map_or(Ok(()), |error| Err(error()))
        }
    }
    impl Disk for Moody {
        fn size_bytes(&self) -> u64 {
            64
        }
        fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), DiskError> {
            self.answer()
        }
        fn write(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
            self.answer()
        }
        fn flush(&mut self) -> Result<(), DiskError> {
            self.1 += 1;
            self.answer()
        }
    }

    #[test]
    fn disk_failures_become_the_protocols_errors_and_carry_no_data() {
        let cases: [(fn() -> DiskError, u32); 4] = [
            (|| DiskError::NoSpace { what: "spill".into() }, 28),
            (|| DiskError::Fenced { theirs: 1, ours: 2 }, 1),
            (|| DiskError::OutOfRange { offset: 0, len_bytes: 1, size_bytes: 0 }, 22),
            (|| DiskError::io("read", std::io::Error::other("broken")), 5),
        ];
        for (error, errno) in cases {
            let said = request(0, CMD_READ, 1, 0, 8);
            let heard = converse(&mut Decoder::new(&Export::new("", 64)), &mut Moody(Some(error), 0), &said);
            assert_eq!(heard, reply(errno, 1, b""));
        }
        let mut out = BytesMut::new();
        let flush = Request { cookie: 1, command: Command::Flush };
        assert_eq!(serve(&flush, &mut Moody(Some(|| DiskError::Busy), 0), &mut out), Served::Busy);
        assert!(out.is_empty(), "a busy disk is asked again, the client hears nothing");
    }

    #[test]
    fn fua_reaches_the_medium_and_a_plain_write_does_not() {
        let mut disk = Moody(None, 0);
        for (fua, flushes) in [(false, 0), (true, 1)] {
            let command = Command::Write { offset: 0, data: Bytes::from_static(b"x"), fua };
            assert_eq!(serve(&Request { cookie: 1, command }, &mut disk, &mut BytesMut::new()), Served::Replied);
            assert_eq!(disk.1, flushes);
        }
    }
}
