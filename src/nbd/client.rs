//! The client's half: negotiation, then many requests in flight.
//!
//! ```text
//!  Greeting ── fixed newstyle ──▶ Going ── NBD_REP_ACK ──────────────────────────▶ Ready
//!      │                            └── NBD_REP_ERR_UNSUP ──▶ Naming ── size, flags ──▶ Ready
//!      └── plain newstyle ─────────────────────────────────▶ Naming
//!
//!  a request:  submitted ── nothing earlier stands in its way ──▶ sent ── reply ──▶ completion
//! ```
//!
//! The trap: NBD promises no order. Two overlapping writes in flight may land either way round ("Ordering of
//! messages and writes"), and a flush covers only writes whose replies were sent before it. So a request waits
//! here until every earlier one it depends on is complete: an overlapping one where either is a write, and for
//! a flush every earlier write. Zeroes and trims are writes. What a caller submits therefore takes effect as if in
//! order.
//!
//! The server is not trusted either: its strings and lists are bounded (CVE-2017-2630), a size beyond `i64::MAX`
//! is refused (CVE-2023-5215), and a reply to a request that is not under way ends the connection.
//!
//! Source: `doc/proto.md`, "Newstyle negotiation", "NBD_OPT_GO", "Simple reply message", "Ordering of messages
//! and writes", "Block size constraints".

use super::handshake::BlockSizes;
use super::request::Request;
use super::*;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};

/// Longest reply to an option; a name and its description fit.
pub const MAX_OPTION_REPLY_BYTES: u32 = 4 * MAX_STRING_BYTES as u32;
/// Replies to one NBD_OPT_GO.
pub const MAX_OPTION_REPLIES: usize = 64;

/// What the server said about the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its size.
    pub size_bytes: u64,
    /// Its transmission flags, `EXPORT_*`.
    pub flags: u16,
    /// Its block sizes; requests that do not keep to them are refused here.
    pub block_sizes: BlockSizes,
}

/// How much may be under way, submitted and not yet completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests.
    pub requests: usize,
    /// Bytes written plus bytes read, those that travel: zeroes and trims have none. A single request may exceed it
    /// when nothing else is under way.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 128, bytes: 64 << 20 }
    }
}

/// Why a request was not taken. Nothing was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The negotiation is not over, or the connection is.
    #[error("the connection is not ready for requests")]
    NotReady,
    /// [`Limits`] are reached; take completions first.
    #[error("too much is under way")]
    Full,
    /// The range does not lie in the export.
    #[error("outside the export")]
    OutOfRange,
    /// Longer than the server's maximum block size.
    #[error("longer than the server's maximum block size")]
    TooLong,
    /// Not a multiple of the server's minimum block size.
    #[error("not aligned to the server's minimum block size")]
    Misaligned,
    /// The export takes no writes.
    #[error("the export is read-only")]
    ReadOnly,
    /// The server does not know this request.
    #[error("the server does not support it")]
    Unsupported,
}

/// A request is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// The number its submission returned.
    pub cookie: u64,
    /// What the server said.
    pub result: Result<(), Errno>,
    /// What a successful read brought; empty otherwise.
    pub data: Bytes,
}

#[derive(Debug)]
enum State {
    Greeting,
    Going { zeroes: bool, replies: usize, size_and_flags: Option<(u64, u16)>, block_sizes: BlockSizes },
    Naming { zeroes: bool },
    Ready { info: ExportInfo, reading: Option<u64> },
    Over,
}

#[derive(Debug)]
struct UnderWay {
    request: Request,
    /// Whether it waits for earlier ones.
    held: bool,
}

/// One connection to one export.
#[derive(Debug)]
pub struct Client {
    name: String,
    limits: Limits,
    state: State,
    under_way: BTreeMap<u64, UnderWay>,
    under_way_bytes: u64,
    held: usize,
    next_cookie: u64,
    output: VecDeque<Bytes>,
    completions: VecDeque<Completion>,
}

impl Client {
    /// A client for the export `name`; the server speaks first.
    pub fn new(name: impl Into<String>, limits: Limits) -> Result<Self, NbdError> {
        let name = name.into();
        if name.len() > MAX_STRING_BYTES {
            let (len_bytes, max_bytes) = (name.len() as u64, MAX_STRING_BYTES as u64);
            return Err(NbdError::TooLong { what: "export name", len_bytes, max_bytes });
        }
        Ok(Self {
            name,
            limits,
            state: State::Greeting,
            under_way: BTreeMap::new(),
            under_way_bytes: 0,
            held: 0,
            next_cookie: 1,
            output: VecDeque::new(),
            completions: VecDeque::new(),
        })
    }

    /// The export, once the negotiation is over.
    #[must_use]
    pub fn export(&self) -> Option<ExportInfo> {
        match &self.state {
            State::Ready { info, .. } => Some(*info),
            _ => None,
        }
    }

    /// Requests submitted and not yet completed.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Whether [`Self::poll_output`] has something.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Bytes for the server, if there are any.
    pub fn poll_output(&mut self) -> Option<Bytes> {
        self.output.pop_front()
    }

    /// A request that is over, if there is one, in the order of the server's replies.
    pub fn poll_completion(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    /// Takes a request. Returns the cookie its completion will carry.
    pub fn submit(&mut self, request: Request) -> Result<u64, SubmitError> {
        let cookie = self.enter(request)?;
        self.send_if_free(cookie);
        Ok(cookie)
    }

    /// [`Self::submit`] for a caller that has seen to it that no request under way stands in this one's way.
    pub fn submit_free(&mut self, request: Request) -> Result<u64, SubmitError> {
        let cookie = self.enter(request)?;
        self.send(cookie);
        Ok(cookie)
    }

    fn enter(&mut self, request: Request) -> Result<u64, SubmitError> {
        let info = self.export().ok_or(SubmitError::NotReady)?;
        request.check(&info)?;
        let bytes = self.under_way_bytes + request.payload_bytes();
        let full = self.under_way.len() >= self.limits.requests || bytes > self.limits.bytes;
        if full && !self.under_way.is_empty() {
            return Err(SubmitError::Full);
        }
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.under_way_bytes = bytes;
        self.under_way.insert(cookie, UnderWay { request, held: true });
        self.held += 1;
        Ok(cookie)
    }

    /// [`Request::read`].
    pub fn read(&mut self, offset: u64, len_bytes: u32) -> Result<u64, SubmitError> {
        self.submit(Request::read(offset, len_bytes))
    }

    /// [`Request::write`].
    pub fn write(&mut self, offset: u64, data: Bytes) -> Result<u64, SubmitError> {
        self.submit(Request::write(offset, data))
    }

    /// [`Request::write`] with [`Request::fua`].
    pub fn write_fua(&mut self, offset: u64, data: Bytes) -> Result<u64, SubmitError> {
        self.submit(Request::write(offset, data).fua())
    }

    /// [`Request::write_zeroes`]. A server that cannot is [`SubmitError::Unsupported`]: then write the zeroes.
    pub fn write_zeroes(&mut self, offset: u64, len_bytes: u32, keep_space: bool) -> Result<u64, SubmitError> {
        self.submit(Request::write_zeroes(offset, len_bytes, keep_space))
    }

    /// [`Request::trim`]. A server that cannot is [`SubmitError::Unsupported`]: then forget it.
    pub fn trim(&mut self, offset: u64, len_bytes: u32) -> Result<u64, SubmitError> {
        self.submit(Request::trim(offset, len_bytes))
    }

    /// [`Request::flush`].
    pub fn flush(&mut self) -> Result<u64, SubmitError> {
        self.submit(Request::flush())
    }

    /// Says good-bye, during the negotiation or after it; nothing can be submitted any more. Requests under way
    /// get no completion.
    pub fn disconnect(&mut self) {
        match self.state {
            State::Ready { .. } => self.put_request(0, &Request::disconnect()),
            State::Going { .. } => self.put_option(OPT_ABORT, &[]),
            State::Greeting | State::Naming { .. } | State::Over => {}
        }
        self.state = State::Over;
    }

    /// Consumes what it can of `input`. After an error the connection is over; requests under way get no
    /// completion: whether the server carried them out is not known.
    pub fn handle_input(&mut self, input: &mut BytesMut) -> Result<(), NbdError> {
        let result = loop {
            match self.step(input) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if result.is_err() {
            self.state = State::Over;
        }
        result
    }

    /// One message: false when more bytes are needed.
    fn step(&mut self, input: &mut BytesMut) -> Result<bool, NbdError> {
        match self.state {
            State::Greeting => self.greeting(input),
            State::Going { .. } => self.option_reply(input),
            State::Naming { zeroes } => self.export_named(zeroes, input),
            State::Ready { info, reading: None } => self.reply_header(info, input),
            State::Ready { info, reading: Some(cookie) } => Ok(self.reply_data(info, cookie, input)),
            State::Over => Ok(false),
        }
    }

    fn greeting(&mut self, input: &mut BytesMut) -> Result<bool, NbdError> {
        if input.len() < 18 {
            return Ok(false);
        }
        expect_magic("greeting", SERVER_MAGIC, input.get_u64())?;
        expect_magic("newstyle greeting", OPTION_MAGIC, input.get_u64())?;
        // Only what both know may be set, or the server must hang up.
        let flags = input.get_u16() & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.output.push_back(Bytes::copy_from_slice(&u32::from(flags).to_be_bytes()));
        let zeroes = flags & FLAG_NO_ZEROES == 0;
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            self.name_export(zeroes);
            return Ok(true);
        }
        let mut data = Vec::new();
        data.put_u32(self.name.len() as u32);
        data.put_slice(self.name.as_bytes());
        data.put_u16(1);
        data.put_u16(INFO_BLOCK_SIZE);
        self.put_option(OPT_GO, &data);
        self.state = State::Going { zeroes, replies: 0, size_and_flags: None, block_sizes: BlockSizes::default() };
        Ok(true)
    }

    fn name_export(&mut self, zeroes: bool) {
        self.put_option(OPT_EXPORT_NAME, &self.name.clone().into_bytes());
        self.state = State::Naming { zeroes };
    }

    fn option_reply(&mut self, input: &mut BytesMut) -> Result<bool, NbdError> {
        let State::Going { zeroes, replies, size_and_flags, block_sizes } = &mut self.state else { return Ok(false) };
        if input.len() < 20 {
            return Ok(false);
        }
        let mut header = &input[..20];
        expect_magic("option reply", OPTION_REPLY_MAGIC, header.get_u64())?;
        let (option, reply, len_bytes) = (header.get_u32(), header.get_u32(), header.get_u32());
        if len_bytes > MAX_OPTION_REPLY_BYTES {
            let (len_bytes, max_bytes) = (len_bytes.into(), MAX_OPTION_REPLY_BYTES.into());
            return Err(NbdError::TooLong { what: "option reply", len_bytes, max_bytes });
        }
        if input.len() < 20 + len_bytes as usize {
            return Ok(false);
        }
        input.advance(20);
        let mut data = input.split_to(len_bytes as usize);
        *replies += 1;
        if *replies > MAX_OPTION_REPLIES {
            return Err(NbdError::TooMany { what: "option replies", max: MAX_OPTION_REPLIES });
        }
        if option != OPT_GO {
            return Err(NbdError::Malformed { what: "option reply" });
        }
        match (reply, *size_and_flags) {
            (REP_INFO, _) => {
                let kind = data.try_get_u16().map_err(|_| NbdError::Malformed { what: "NBD_REP_INFO" })?;
                match (kind, data.len()) {
                    (INFO_EXPORT, 10) => *size_and_flags = Some((data.get_u64(), data.get_u16())),
                    (INFO_BLOCK_SIZE, 12) => {
                        let (min_bytes, preferred_bytes) = (data.get_u32(), data.get_u32());
                        *block_sizes = BlockSizes { min_bytes, preferred_bytes, max_bytes: data.get_u32() };
                    }
                    (INFO_EXPORT | INFO_BLOCK_SIZE, _) => return Err(NbdError::Malformed { what: "NBD_REP_INFO" }),
                    // A server may send what nobody asked for.
                    _ => {}
                }
            }
            (REP_ACK, Some((size_bytes, flags))) => {
                let block_sizes = *block_sizes;
                self.become_ready(size_bytes, flags, block_sizes)?;
            }
            (REP_ERR_UNSUP, _) => {
                let zeroes = *zeroes;
                self.name_export(zeroes);
            }
            (refusal, _) if refusal & REP_ERROR_BIT != 0 => {
                let message = String::from_utf8_lossy(&data[..data.len().min(MAX_STRING_BYTES)]).into_owned();
                return Err(NbdError::Refused { name: self.name.clone(), reply: refusal, message });
            }
            _ => return Err(NbdError::Malformed { what: "reply to NBD_OPT_GO" }),
        }
        Ok(true)
    }

    fn export_named(&mut self, zeroes: bool, input: &mut BytesMut) -> Result<bool, NbdError> {
        let len = if zeroes { 134 } else { 10 };
        if input.len() < len {
            return Ok(false);
        }
        let mut data = input.split_to(len);
        self.become_ready(data.get_u64(), data.get_u16(), BlockSizes::default())?;
        Ok(true)
    }

    fn become_ready(&mut self, size_bytes: u64, flags: u16, block_sizes: BlockSizes) -> Result<(), NbdError> {
        let BlockSizes { min_bytes, max_bytes, .. } = block_sizes;
        // A maximum of 0xffffffff means no limit; our own stands.
        if i64::try_from(size_bytes).is_err() || !min_bytes.is_power_of_two() || max_bytes < min_bytes {
            return Err(NbdError::Malformed { what: "export size" });
        }
        let block_sizes = BlockSizes { max_bytes: max_bytes.min(MAX_PAYLOAD_BYTES), ..block_sizes };
        self.state = State::Ready { info: ExportInfo { size_bytes, flags, block_sizes }, reading: None };
        Ok(())
    }

    fn reply_header(&mut self, info: ExportInfo, input: &mut BytesMut) -> Result<bool, NbdError> {
        if input.len() < 16 {
            return Ok(false);
        }
        expect_magic("reply", SIMPLE_REPLY_MAGIC.into(), input.get_u32().into())?;
        let (errno, cookie) = (Errno::from_wire(input.get_u32()), input.get_u64());
        // A request still held back was never sent, so it has no reply either.
        let sent = self.under_way.get(&cookie).filter(|one| !one.held);
        match (sent.map(|one| one.request.kind), errno) {
            (None, _) => return Err(NbdError::UnknownCookie { cookie }),
            (Some(CMD_READ), None) => self.state = State::Ready { info, reading: Some(cookie) },
            (Some(_), errno) => self.complete(cookie, errno.map_or(Ok(()), Err), Bytes::new()),
        }
        Ok(true)
    }

    fn reply_data(&mut self, info: ExportInfo, cookie: u64, input: &mut BytesMut) -> bool {
        let len = self.under_way.get(&cookie).map_or(0, |one| one.request.len_bytes as usize);
        if input.len() < len {
            return false;
        }
        self.state = State::Ready { info, reading: None };
        self.complete(cookie, Ok(()), input.split_to(len).freeze());
        true
    }

    fn complete(&mut self, cookie: u64, result: Result<(), Errno>, data: Bytes) {
        if let Some(one) = self.under_way.remove(&cookie) {
            self.under_way_bytes -= one.request.payload_bytes();
        }
        self.completions.push_back(Completion { cookie, result, data });
        self.send_held();
    }

    fn send_held(&mut self) {
        if self.held > 0 {
            let held = self.under_way.iter().filter(|(_, one)| one.held);
            for cookie in held.map(|(cookie, _)| *cookie).collect::<Vec<_>>() {
                self.send_if_free(cookie);
            }
        }
    }

    /// Sends a held request unless an earlier one stands in its way.
    fn send_if_free(&mut self, cookie: u64) {
        let Some(UnderWay { request, .. }) = self.under_way.get(&cookie) else { return };
        if !self.under_way.range(..cookie).any(|(_, earlier)| earlier.request.blocks(request)) {
            self.send(cookie);
        }
    }

    fn send(&mut self, cookie: u64) {
        let Some(one) = self.under_way.get_mut(&cookie).filter(|one| one.held) else { return };
        // The payload is not kept: after an error nobody sends it again from here.
        let data = std::mem::take(&mut one.request.data);
        one.held = false;
        self.held -= 1;
        let request = one.request.clone();
        self.put_request(cookie, &request);
        if !data.is_empty() {
            self.output.push_back(data);
        }
    }

    fn put_request(&mut self, cookie: u64, request: &Request) {
        let mut header = BytesMut::with_capacity(28);
        header.put_u32(REQUEST_MAGIC);
        header.put_u16(request.flags);
        header.put_u16(request.kind);
        header.put_u64(cookie);
        header.put_u64(request.offset);
        // Checked against the export: a payload has a maximum, and the rest were made of 32 bits.
        header.put_u32(request.len_bytes as u32);
        self.output.push_back(header.freeze());
    }

    fn put_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = BytesMut::with_capacity(16 + data.len());
        bytes.put_u64(OPTION_MAGIC);
        bytes.put_u32(option);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        self.output.push_back(bytes.freeze());
    }
}
