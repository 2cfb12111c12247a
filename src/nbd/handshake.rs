//! The server's half of the negotiation.
//!
//! ```text
//!  Greeting ── client flags ──▶ Options ── NBD_OPT_GO, NBD_OPT_EXPORT_NAME ──▶ Negotiated
//!                                 │  ▲
//!                                 │  └── LIST, INFO; anything else: NBD_REP_ERR_UNSUP
//!                                 ├── option too long ──▶ Skipping ── skipped ──▶ Options
//!                                 └── ABORT, broken framing ──▶ Err: send what is left, close
//! ```
//!
//! The trap: an unknown option is not an error of the client's. Its data is consumed, it is answered with
//! NBD_REP_ERR_UNSUP and parsing goes on, because that is how every later feature is probed for. What the
//! client may make this end hold is one option of [`MAX_OPTION_BYTES`]; a deadline for the whole is the driver's.
//!
//! Source: `doc/proto.md`, "Fixed newstyle negotiation", "Option haggling", "Option types", "Option reply types".

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
    /// Transmission flags to add to HAS_FLAGS, SEND_FLUSH and SEND_FUA, which every export has.
    pub flags: u16,
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
            flags: 0,
            block_sizes: BlockSizes::default(),
        }
    }

    /// The transmission flags a client is told.
    #[must_use]
    pub fn transmission_flags(&self) -> u16 {
        let read_only = if self.read_only { EXPORT_READ_ONLY } else { 0 };
        EXPORT_HAS_FLAGS | EXPORT_SEND_FLUSH | EXPORT_SEND_FUA | self.flags | read_only
    }
}

/// The end of a negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// Which of the exports, an index into the list given to [`Handshake::new`].
    pub export: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Options,
    Skipping { left_bytes: u32 },
    Over,
}

/// One client's negotiation.
#[derive(Debug)]
pub struct Handshake {
    exports: Vec<Export>,
    state: State,
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
        Self { exports, state: State::Greeting, no_zeroes: false, options: 0, output }
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
                        self.state = State::Over;
                        return Ok(Some(negotiated));
                    }
                }
                State::Skipping { left_bytes } if !input.is_empty() => {
                    let skipped = input.len().min(left_bytes as usize);
                    input.advance(skipped);
                    let left_bytes = left_bytes - skipped as u32;
                    self.state = if left_bytes == 0 { State::Options } else { State::Skipping { left_bytes } };
                }
                State::Greeting | State::Options | State::Skipping { .. } | State::Over => return Ok(None),
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
        match option {
            OPT_EXPORT_NAME => return self.export_name(data).map(Some),
            OPT_GO => return Ok(self.describe(option, data).map(|export| Negotiated { export })),
            OPT_INFO => drop(self.describe(option, data)),
            OPT_LIST => self.list(data),
            OPT_ABORT => {
                self.reply(option, REP_ACK, &[]);
                return Err(NbdError::Aborted);
            }
            _ => self.reply(option, REP_ERR_UNSUP, &[]),
        }
        Ok(None)
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
        self.output.put_u16(export.transmission_flags());
        if !self.no_zeroes {
            self.output.put_bytes(0, 124);
        }
        Ok(Negotiated { export: index })
    }

    fn list(&mut self, data: &[u8]) {
        if !data.is_empty() {
            return self.reply(OPT_LIST, REP_ERR_INVALID, &[]);
        }
        for index in 0..self.exports.len() {
            let name = self.exports[index].name.as_bytes();
            let mut entry = Vec::with_capacity(4 + name.len());
            entry.put_u32(name.len() as u32);
            entry.put_slice(name);
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
            self.reply(option, REP_ERR_UNKNOWN, &[]);
            return None;
        };
        let export = &self.exports[index];
        let mut infos = vec![{
            let mut info = Vec::new();
            info.put_u16(INFO_EXPORT);
            info.put_u64(export.size_bytes);
            info.put_u16(export.transmission_flags());
            info
        }];
        let text = |kind: u16, text: &str| {
            let mut info = Vec::new();
            info.put_u16(kind);
            info.put_slice(&text.as_bytes()[..text.floor_char_boundary(MAX_STRING_BYTES)]);
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

    fn reply(&mut self, option: u32, reply: u32, data: &[u8]) {
        self.output.put_u64(OPTION_REPLY_MAGIC);
        self.output.put_u32(option);
        self.output.put_u32(reply);
        self.output.put_u32(data.len() as u32);
        self.output.put_slice(data);
    }
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
mod tests {
    use super::*;

    fn option(option: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.put_u32(option);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        bytes
    }

    fn reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9];
        bytes.put_u32(option);
        bytes.put_u32(reply);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        bytes
    }

    fn info_request(name: &str, kinds: &[u16]) -> Vec<u8> {
        let mut data = Vec::new();
        data.put_u32(name.len() as u32);
        data.put_slice(name.as_bytes());
        data.put_u16(kinds.len() as u16);
        kinds.iter().for_each(|kind| data.put_u16(*kind));
        data
    }

    /// A negotiation past its greeting and the client flags.
    fn begun(flags: u32) -> Handshake {
        let mut root = Export::new("root", 0x1234_5000);
        root.description = "the first".into();
        let mut iso = Export::new("iso", 512);
        iso.read_only = true;
        let mut server = Handshake::new(vec![root, iso]);
        assert_eq!(server.poll_output().unwrap(), b"NBDMAGICIHAVEOPT\0\x03"[..]);
        let mut input = BytesMut::from(&flags.to_be_bytes()[..]);
        assert_eq!(server.handle_input(&mut input), Ok(None));
        assert_eq!(server.poll_output(), None);
        server
    }

    fn say(server: &mut Handshake, bytes: &[u8]) -> (Result<Option<Negotiated>, NbdError>, Vec<u8>) {
        let result = server.handle_input(&mut BytesMut::from(bytes));
        (result, server.poll_output().unwrap_or_default().to_vec())
    }

    #[test]
    fn go_describes_the_export_and_ends_the_negotiation() {
        let mut server = begun(3);
        let wanted = [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 99];
        let (result, said) = say(&mut server, &option(OPT_GO, &info_request("root", &wanted)));
        assert_eq!(result, Ok(Some(Negotiated { export: 0 })));
        let expected = [
            reply(OPT_GO, REP_INFO, &[0, 0, 0, 0, 0, 0, 0x12, 0x34, 0x50, 0, 0, 0x0d]),
            reply(OPT_GO, REP_INFO, b"\0\x01root"),
            reply(OPT_GO, REP_INFO, b"\0\x02the first"),
            reply(OPT_GO, REP_INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]),
            reply(OPT_GO, REP_ACK, &[]),
        ];
        assert_eq!(said, expected.concat());
    }

    #[test]
    fn export_name_answers_without_a_reply_header_and_with_zeroes_unless_told() {
        for (flags, len) in [(1, 134), (3, 10), (0, 134)] {
            let (result, said) = say(&mut begun(flags), &option(OPT_EXPORT_NAME, b"iso"));
            assert_eq!(result, Ok(Some(Negotiated { export: 1 })));
            assert_eq!((said.len(), &said[..10]), (len, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0x0f][..]));
        }
        assert_eq!(say(&mut begun(3), &option(OPT_EXPORT_NAME, b"")).0, Ok(Some(Negotiated { export: 0 })));
        let (refused, said) = say(&mut begun(3), &option(OPT_EXPORT_NAME, b"nope"));
        assert!(matches!(refused, Err(NbdError::UnknownExport { .. })) && said.is_empty());
    }

    #[test]
    fn haggling_goes_on_after_list_info_and_options_nobody_knows() {
        let mut server = begun(3);
        let listed = [
            reply(OPT_LIST, REP_SERVER, b"\0\0\0\x04root"),
            reply(OPT_LIST, REP_SERVER, b"\0\0\0\x03iso"),
            reply(OPT_LIST, REP_ACK, &[]),
        ];
        assert_eq!(say(&mut server, &option(OPT_LIST, &[])), (Ok(None), listed.concat()));
        assert_eq!(say(&mut server, &option(OPT_LIST, b"x")), (Ok(None), reply(OPT_LIST, REP_ERR_INVALID, &[])));
        // STARTTLS, STRUCTURED_REPLY, LIST and SET_META_CONTEXT, EXTENDED_HEADERS, and one from the future.
        for unknown in [5, 8, 9, 10, 11, 77, u32::MAX] {
            let answer = reply(unknown, REP_ERR_UNSUP, &[]);
            assert_eq!(say(&mut server, &option(unknown, b"data")), (Ok(None), answer));
        }
        let (result, said) = say(&mut server, &option(OPT_INFO, &info_request("nope", &[])));
        assert_eq!((result, said), (Ok(None), reply(OPT_INFO, REP_ERR_UNKNOWN, &[])));
        let (result, said) = say(&mut server, &option(OPT_INFO, &info_request("iso", &[])));
        assert!(result == Ok(None) && said.ends_with(&reply(OPT_INFO, REP_ACK, &[])));
        let (result, said) = say(&mut server, &option(OPT_ABORT, &[]));
        assert_eq!((result, said), (Err(NbdError::Aborted), reply(OPT_ABORT, REP_ACK, &[])));
    }

    #[test]
    fn lengths_that_do_not_add_up_are_invalid() {
        let mut server = begun(3);
        let mut huge_name = info_request("root", &[]);
        huge_name[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        let mut one_more = info_request("root", &[INFO_NAME]);
        one_more.push(0);
        for data in [vec![], vec![0; 3], huge_name, one_more, info_request("root", &[1, 2])[..12].to_vec()] {
            assert_eq!(say(&mut server, &option(OPT_GO, &data)), (Ok(None), reply(OPT_GO, REP_ERR_INVALID, &[])));
        }
    }

    #[test]
    fn each_limit_holds_at_its_edge() {
        let mut server = begun(3);
        let fits = vec![b'x'; MAX_OPTION_BYTES as usize];
        assert_eq!(say(&mut server, &option(42, &fits)), (Ok(None), reply(42, REP_ERR_UNSUP, &[])));
        for len in [MAX_OPTION_BYTES + 1, MAX_SKIPPED_OPTION_BYTES] {
            let mut long = option(42, &vec![b'x'; len as usize]);
            long.extend(option(43, &[]));
            let answers = [reply(42, REP_ERR_TOO_BIG, &[]), reply(43, REP_ERR_UNSUP, &[])].concat();
            assert_eq!(say(&mut server, &long), (Ok(None), answers));
        }
        let mut header = option(42, &[]);
        header[12..].copy_from_slice(&(MAX_SKIPPED_OPTION_BYTES + 1).to_be_bytes());
        assert!(matches!(say(&mut server, &header).0, Err(NbdError::TooLong { .. })));

        let mut server = begun(3);
        for _ in 0..MAX_OPTIONS {
            assert_eq!(say(&mut server, &option(42, &[])).0, Ok(None));
        }
        assert!(matches!(say(&mut server, &option(42, &[])).0, Err(NbdError::TooMany { .. })));
        let mut server = Handshake::new(vec![]);
        assert_eq!(say(&mut server, &4_u32.to_be_bytes()).0, Err(NbdError::ClientFlags(4)));
        assert!(matches!(say(&mut begun(3), &[0; 16]).0, Err(NbdError::BadMagic { .. })));
    }
}
