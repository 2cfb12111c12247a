//! The server's half of the negotiation.
//!
//! ```text
//!  Greeting ── client flags ──▶ Options ── NBD_OPT_GO, NBD_OPT_EXPORT_NAME ──▶ Negotiated
//!                                 │  ▲
//!                                 │  ├── LIST, INFO, STRUCTURED_REPLY, EXTENDED_HEADERS, *_META_CONTEXT
//!                                 │  └── anything else: NBD_REP_ERR_UNSUP
//!                                 ├── STARTTLS, where it is offered ──▶ Encrypting ── encrypted() ──▶ Greeted anew
//!                                 ├── option too long ──▶ Skipping ── skipped ──▶ Options
//!                                 └── ABORT, broken framing ──▶ Err: send what is left, close
//! ```
//!
//! The trap: an unknown option is not an error of the client's. Its data is consumed, it is answered with
//! NBD_REP_ERR_UNSUP and parsing goes on, because that is how every later feature is probed for. What the
//! client may make this end hold is one option of [`MAX_OPTION_BYTES`]; a deadline for the whole is the driver's.
//!
//! Encryption begins with nothing: what was settled in the clear is forgotten, and what the client sent behind its
//! STARTTLS is the start of the TLS hello or an attack, and never an option (CVE-2021-3716).
//!
//! Source: `doc/proto.md`, "Fixed newstyle negotiation", "Option haggling", "Option types", "Option reply types".

use super::contexts::ContextRequest;
use super::*;
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Longest option that is read; a name of 4096 bytes and a generous list of information requests fit.
pub const MAX_OPTION_BYTES: u32 = 4096 + 1024;
/// Longest option that is skipped, with NBD_REP_ERR_TOO_BIG; a longer one closes (CVE-2017-15119: skipping 4 GiB).
pub const MAX_SKIPPED_OPTION_BYTES: u32 = 1 << 20;
/// Options in one negotiation; a client that lists everything and asks about each export stays far below.
pub const MAX_OPTIONS: usize = 256;

const OPTION_HEADER_BYTES: usize = 16;

/// Block sizes an export prefers. They are advertised, not required.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest length and alignment that is efficient or possible, a power of two.
    pub min_bytes: u32,
    /// Length and alignment that avoids read-modify-write.
    pub preferred_bytes: u32,
    /// Longest payload.
    pub max_bytes: u32,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { min_bytes: 1, preferred_bytes: 4096, max_bytes: MAX_PAYLOAD_BYTES }
    }
}

/// What a server offers under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Its name, at most [`MAX_STRING_BYTES`]; the first export also answers to the empty name.
    pub name: String,
    /// A text for people; cut at [`MAX_STRING_BYTES`].
    pub description: String,
    /// Its size; constant while anybody is connected.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// A flush on one connection covers what was completed on every other.
    pub multi_conn: bool,
    /// It can zero faster than by writing, and refuse where it cannot.
    pub fast_zero: bool,
    /// It knows what differs from its last checkpoint.
    pub knows_changes: bool,
    /// It tells how deep a block lies in a chain of images; there is one.
    pub tells_depth: bool,
    /// Its block sizes.
    pub block_sizes: BlockSizes,
}

impl Export {
    /// A writable export with the default block sizes and no description.
    #[must_use]
    pub fn new(name: impl Into<String>, size_bytes: u64) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            size_bytes,
            read_only: false,
            multi_conn: false,
            fast_zero: false,
            knows_changes: false,
            tells_depth: false,
            block_sizes: BlockSizes::default(),
        }
    }

    /// The transmission flags a client is told.
    #[must_use]
    pub fn transmission_flags(&self, framing: &Framing) -> u16 {
        let write = EXPORT_SEND_FUA | EXPORT_SEND_TRIM | EXPORT_SEND_WRITE_ZEROES;
        let when = |yes: bool, flags: u16| if yes { flags } else { 0 };
        EXPORT_HAS_FLAGS
            | EXPORT_SEND_FLUSH
            | EXPORT_SEND_CACHE
            | if self.read_only { EXPORT_READ_ONLY } else { write }
            | when(self.multi_conn, EXPORT_CAN_MULTI_CONN)
            | when(self.fast_zero && !self.read_only, EXPORT_SEND_FAST_ZERO)
            | when(framing.structured, EXPORT_SEND_DF)
    }

    fn contexts(&self) -> Vec<Context> {
        let all =
            [(Context::Allocation, true), (Context::Changed, self.knows_changes), (Context::Depth, self.tells_depth)];
        all.into_iter().filter(|(_, is_offered)| *is_offered).map(|(context, _)| context).collect()
    }
}

/// The end of a negotiation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Negotiated {
    /// An export was chosen: what follows are requests.
    Export {
        /// Which one, an index into the list given to [`Handshake::new`].
        index: usize,
        /// How requests and replies are framed.
        framing: Framing,
    },
    /// Send what there is; the client's next bytes are its TLS hello. Then call [`Handshake::encrypted`].
    StartTls,
}

/// What a server says to clients that want encryption, or do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encryption {
    /// It has none.
    #[default]
    None,
    /// Nothing is told or served without it.
    Required,
    /// It has begun.
    Begun,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Options,
    Skipping { left_bytes: u32 },
    Encrypting,
    Over,
}

/// One client's negotiation.
#[derive(Debug)]
pub struct Handshake {
    exports: Vec<Export>,
    /// Encryption that the client must still ask for.
    encryption: Encryption,
    state: State,
    framing: Framing,
    /// The export that the contexts were chosen for.
    contexts_of: Option<usize>,
    no_zeroes: bool,
    options: usize,
    output: BytesMut,
}

impl Handshake {
    /// Starts: the greeting is ready to be sent. Panics when a name is longer than the protocol can carry:
    /// names come from our own configuration.
    #[must_use]
    pub fn new(exports: Vec<Export>) -> Self {
        assert!(exports.iter().all(|export| export.name.len() <= MAX_STRING_BYTES), "an export name is too long");
        let mut output = BytesMut::new();
        output.put_u64(SERVER_MAGIC);
        output.put_u64(OPTION_MAGIC);
        output.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        Self {
            exports,
            encryption: Encryption::None,
            state: State::Greeting,
            framing: Framing::default(),
            contexts_of: None,
            no_zeroes: false,
            options: 0,
            output,
        }
    }

    /// The same, with a word on encryption.
    #[must_use]
    pub fn with_encryption(mut self, encryption: Encryption) -> Self {
        self.encryption = encryption;
        self
    }

    /// The connection is encrypted from here on. Nothing of what was settled before counts.
    pub fn encrypted(&mut self) {
        if self.state == State::Encrypting {
            (self.encryption, self.state) = (Encryption::Begun, State::Options);
            (self.framing, self.contexts_of) = (Framing::default(), None);
        }
    }

    /// The exports offered.
    #[must_use]
    pub fn exports(&self) -> &[Export] {
        &self.exports
    }

    /// Bytes for the client, if there are any.
    pub fn poll_output(&mut self) -> Option<Bytes> {
        (!self.output.is_empty()).then(|| self.output.split().freeze())
    }

    /// Consumes what it can of `input`. `Some` ends the negotiation: send what [`Self::poll_output`] holds; the
    /// bytes left in `input` are the first requests. After an error, send what is left and close.
    pub fn handle_input(&mut self, input: &mut BytesMut) -> Result<Option<Negotiated>, NbdError> {
        loop {
            match self.state {
                State::Greeting if input.len() >= 4 => {
                    let flags = input.get_u32();
                    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
                        return Err(NbdError::ClientFlags(flags));
                    }
                    self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
                    self.state = State::Options;
                }
                State::Options if input.len() >= OPTION_HEADER_BYTES => {
                    let mut header = &input[..OPTION_HEADER_BYTES];
                    expect_magic("option", OPTION_MAGIC, header.get_u64())?;
                    let (option, len_bytes) = (header.get_u32(), header.get_u32());
                    if len_bytes > MAX_OPTION_BYTES {
                        self.refuse_long_option(option, len_bytes)?;
                        input.advance(OPTION_HEADER_BYTES);
                        continue;
                    }
                    if input.len() < OPTION_HEADER_BYTES + len_bytes as usize {
                        return Ok(None);
                    }
                    input.advance(OPTION_HEADER_BYTES);
                    self.count_option()?;
                    let data = input.split_to(len_bytes as usize);
                    if let Some(negotiated) = self.handle_option(option, &data)? {
                        self.state = match negotiated {
                            Negotiated::StartTls => State::Encrypting,
                            Negotiated::Export { .. } => State::Over,
                        };
                        return Ok(Some(negotiated));
                    }
                }
                State::Skipping { left_bytes } if !input.is_empty() => {
                    let skipped = input.len().min(left_bytes as usize);
                    input.advance(skipped);
                    let left_bytes = left_bytes - skipped as u32;
                    self.state = if left_bytes == 0 { State::Options } else { State::Skipping { left_bytes } };
                }
                _ => return Ok(None),
            }
        }
    }

    fn count_option(&mut self) -> Result<(), NbdError> {
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Err(NbdError::TooMany { what: "options", max: MAX_OPTIONS });
        }
        Ok(())
    }

    fn refuse_long_option(&mut self, option: u32, len_bytes: u32) -> Result<(), NbdError> {
        self.count_option()?;
        // NBD_OPT_EXPORT_NAME has no error reply: the client would take it for the export's size.
        if len_bytes > MAX_SKIPPED_OPTION_BYTES || option == OPT_EXPORT_NAME {
            let (len_bytes, max_bytes) = (len_bytes.into(), MAX_OPTION_BYTES.into());
            return Err(NbdError::TooLong { what: "option", len_bytes, max_bytes });
        }
        self.reply(option, REP_ERR_TOO_BIG, &[]);
        self.state = State::Skipping { left_bytes: len_bytes };
        Ok(())
    }

    fn handle_option(&mut self, option: u32, data: &[u8]) -> Result<Option<Negotiated>, NbdError> {
        let needs_tls = self.encryption == Encryption::Required;
        match option {
            OPT_ABORT => {
                self.reply(option, REP_ACK, &[]);
                return Err(NbdError::Aborted);
            }
            OPT_STARTTLS if needs_tls && data.is_empty() => {
                self.reply(option, REP_ACK, &[]);
                return Ok(Some(Negotiated::StartTls));
            }
            OPT_STARTTLS if self.encryption != Encryption::None => self.reply(option, REP_ERR_INVALID, &[]),
            // It has no error reply.
            OPT_EXPORT_NAME if needs_tls => return Err(NbdError::TlsRequired),
            OPT_STARTTLS => self.refuse(option, REP_ERR_POLICY, "TLS not configured"),
            _ if needs_tls => {
                self.refuse(option, REP_ERR_TLS_REQD, &format!("Option {option:#x} not permitted before TLS"));
            }
            OPT_EXPORT_NAME => return self.export_name(data).map(Some),
            OPT_GO => return Ok(self.describe(option, data).map(|index| self.chosen(index))),
            OPT_INFO => drop(self.describe(option, data)),
            OPT_LIST => self.list(data),
            OPT_STRUCTURED_REPLY if self.framing.extended => {
                self.reply(option, REP_ERR_EXT_HEADER_REQD, b"extended headers are chosen already");
            }
            OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS if !data.is_empty() => {
                self.reply(option, REP_ERR_INVALID, &[]);
            }
            OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS => {
                self.framing.structured = true;
                self.framing.extended = option == OPT_EXTENDED_HEADERS;
                self.reply(option, REP_ACK, &[]);
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta_contexts(option, data),
            _ => self.refuse(option, REP_ERR_UNSUP, &format!("Unsupported option {option}")),
        }
        Ok(None)
    }

    fn chosen(&mut self, index: usize) -> Negotiated {
        let mut framing = std::mem::take(&mut self.framing);
        if self.contexts_of != Some(index) {
            framing.contexts.clear();
        }
        Negotiated::Export { index, framing }
    }

    fn meta_contexts(&mut self, option: u32, data: &[u8]) {
        let is_list = option == OPT_LIST_META_CONTEXT;
        if !is_list {
            // Whatever comes of it, it takes the place of an earlier choice.
            (self.framing.contexts, self.contexts_of) = (Vec::new(), None);
        }
        let request = ContextRequest::parse(data).filter(|_| self.framing.structured);
        let Some(request) = request else { return self.reply(option, REP_ERR_INVALID, &[]) };
        let Some(index) = self.find(request.export) else { return self.refuse_unknown(option, request.export) };
        let chosen = request.choose(&self.exports[index].contexts(), is_list);
        for context in &chosen {
            // A list has no numbers.
            let id = if is_list { 0 } else { context.id() };
            let entry = [&id.to_be_bytes()[..], context.name().as_bytes()].concat();
            self.reply(option, REP_META_CONTEXT, &entry);
        }
        if !is_list {
            (self.framing.contexts, self.contexts_of) = (chosen, Some(index));
        }
        self.reply(option, REP_ACK, &[]);
    }

    fn find(&self, name: &[u8]) -> Option<usize> {
        let exact = self.exports.iter().position(|export| export.name.as_bytes() == name);
        exact.or((name.is_empty() && !self.exports.is_empty()).then_some(0))
    }

    fn export_name(&mut self, name: &[u8]) -> Result<Negotiated, NbdError> {
        let Some(index) = self.find(name) else {
            return Err(NbdError::UnknownExport { name: String::from_utf8_lossy(name).into_owned() });
        };
        let export = &self.exports[index];
        self.output.put_u64(export.size_bytes);
        self.output.put_u16(export.transmission_flags(&self.framing));
        if !self.no_zeroes {
            self.output.put_bytes(0, 124);
        }
        Ok(self.chosen(index))
    }

    fn list(&mut self, data: &[u8]) {
        if !data.is_empty() {
            return self.reply(OPT_LIST, REP_ERR_INVALID, &[]);
        }
        for index in 0..self.exports.len() {
            let Export { name, description, .. } = &self.exports[index];
            let mut entry = Vec::with_capacity(4 + name.len() + description.len());
            entry.put_u32(name.len() as u32);
            entry.put_slice(name.as_bytes());
            entry.put_slice(as_string(description));
            self.reply(OPT_LIST, REP_SERVER, &entry);
        }
        self.reply(OPT_LIST, REP_ACK, &[]);
    }

    /// NBD_OPT_INFO and NBD_OPT_GO: the export's index once it has been described and acknowledged.
    fn describe(&mut self, option: u32, data: &[u8]) -> Option<usize> {
        let Some((name, wanted)) = parse_info_request(data) else {
            self.reply(option, REP_ERR_INVALID, &[]);
            return None;
        };
        let Some(index) = self.find(name) else {
            self.refuse_unknown(option, name);
            return None;
        };
        let export = &self.exports[index];
        let mut infos = vec![{
            let mut info = Vec::new();
            info.put_u16(INFO_EXPORT);
            info.put_u64(export.size_bytes);
            info.put_u16(export.transmission_flags(&self.framing));
            info
        }];
        let text = |kind: u16, text: &str| {
            let mut info = Vec::new();
            info.put_u16(kind);
            info.put_slice(as_string(text));
            info
        };
        if wanted.contains(&INFO_NAME) {
            infos.push(text(INFO_NAME, &export.name));
        }
        if wanted.contains(&INFO_DESCRIPTION) && !export.description.is_empty() {
            infos.push(text(INFO_DESCRIPTION, &export.description));
        }
        if wanted.contains(&INFO_BLOCK_SIZE) {
            let mut info = Vec::new();
            info.put_u16(INFO_BLOCK_SIZE);
            info.put_u32(export.block_sizes.min_bytes);
            info.put_u32(export.block_sizes.preferred_bytes);
            info.put_u32(export.block_sizes.max_bytes);
            infos.push(info);
        }
        for info in infos {
            self.reply(option, REP_INFO, &info);
        }
        self.reply(option, REP_ACK, &[]);
        Some(index)
    }

    fn refuse_unknown(&mut self, option: u32, name: &[u8]) {
        self.refuse(option, REP_ERR_UNKNOWN, &format!("export '{}' not present", String::from_utf8_lossy(name)));
    }

    /// An error, with words for whoever reads them.
    fn refuse(&mut self, option: u32, error: u32, why: &str) {
        self.reply(option, error, as_string(why));
    }

    fn reply(&mut self, option: u32, reply: u32, data: &[u8]) {
        self.output.put_u64(OPTION_REPLY_MAGIC);
        self.output.put_u32(option);
        self.output.put_u32(reply);
        self.output.put_u32(data.len() as u32);
        self.output.put_slice(data);
    }
}

/// As much of a text as the protocol can carry.
fn as_string(text: &str) -> &[u8] {
    &text.as_bytes()[..text.floor_char_boundary(MAX_STRING_BYTES)]
}

/// The name and the information kinds of NBD_OPT_INFO and NBD_OPT_GO; `None` when the lengths do not add up.
fn parse_info_request(mut data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let name_len = data.try_get_u32().ok()? as usize;
    if name_len > MAX_STRING_BYTES {
        return None;
    }
    let (name, mut rest) = data.split_at_checked(name_len)?;
    let count = usize::from(rest.try_get_u16().ok()?);
    (rest.len() == count * 2).then(|| (name, rest.chunks_exact(2).map(|mut kind| kind.get_u16()).collect()))
}

#[cfg(test)]
mod tests;
