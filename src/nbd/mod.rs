//! The network block device protocol, fixed newstyle, both ends, as pure machines: bytes in, bytes out.
//!
//! ```text
//!            client.rs                                  server
//!  Greeting ── NBDMAGIC IHAVEOPT flags ◀──────────────  handshake.rs   Greeting
//!  flags, NBD_OPT_GO  ────────────────────────────────▶                Options
//!  Option  ◀── NBD_INFO_EXPORT, NBD_REP_ACK ──────────
//!  Ready   ── requests ───────────────────────────────▶ transmission.rs
//!          ◀── simple or structured replies ──────────  reply.rs
//!                                                       server.rs  all of it, one client, and its disk
//!  request.rs  what is asked, and what waits for what
//!  session.rs  several of them, that come and go
//!  netlink.rs  the kernel as the client
//! ```
//!
//! The trap: every length in this protocol is chosen by the peer. Each is compared with a named limit before a
//! byte is kept for it, and what is too long is skipped or ends the connection. (CVE-2017-15118, -15119 and
//! CVE-2022-26495 are servers that hoped; CVE-2017-2630 is a client that did.)
//!
//! Source: NetworkBlockDevice/nbd `doc/proto.md`, sections "Fixed newstyle negotiation", "Transmission" and
//! "Values".

#[cfg(test)]
mod block_tests;
pub mod client;
mod contexts;
pub mod handshake;
pub mod netlink;
pub mod reply;
pub mod request;
#[cfg(test)]
mod request_tests;
pub mod server;
pub mod session;
#[cfg(test)]
mod session_tests;
#[cfg(test)]
mod tests;
pub mod transmission;

pub use self::contexts::{Context, Framing};

use crate::disk::DiskError;

/// First eight bytes a server sends, "NBDMAGIC".
pub const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": a newstyle server, and the start of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of every chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// Start of every request with an extended header (NBD_OPT_EXTENDED_HEADERS, experimental).
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of every chunk of a reply to such a request.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag, both ways: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag, both ways: no 124 zero bytes after NBD_OPT_EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Option: choose an export and start; a refusal can only close the connection.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Option: the client leaves.
pub const OPT_ABORT: u32 = 2;
/// Option: name the exports.
pub const OPT_LIST: u32 = 3;
/// Option: go on encrypted.
pub const OPT_STARTTLS: u32 = 5;
/// Option: describe one export.
pub const OPT_INFO: u32 = 6;
/// Option: describe one export and start.
pub const OPT_GO: u32 = 7;

/// Option: replies may come in chunks.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: name the metadata contexts.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose metadata contexts for NBD_CMD_BLOCK_STATUS.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Option: headers with 64-bit lengths (experimental).
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: done.
pub const REP_ACK: u32 = 1;
/// Option reply: one export's name.
pub const REP_SERVER: u32 = 2;
/// Option reply: one piece of information about an export.
pub const REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Set in every option reply that is an error.
pub const REP_ERROR_BIT: u32 = 1 << 31;
/// Option reply: the option is unknown here.
pub const REP_ERR_UNSUP: u32 = REP_ERROR_BIT | 1;
/// Reply: not here, as this server is set up.
pub const REP_ERR_POLICY: u32 = REP_ERROR_BIT | 2;
/// Option reply: the option's data is malformed.
pub const REP_ERR_INVALID: u32 = REP_ERROR_BIT | 3;
/// Option reply: not before NBD_OPT_STARTTLS.
pub const REP_ERR_TLS_REQD: u32 = REP_ERROR_BIT | 5;
/// Option reply: there is no such export.
pub const REP_ERR_UNKNOWN: u32 = REP_ERROR_BIT | 6;
/// Option reply: the framing was chosen already, and a better one.
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_ERROR_BIT | 10;
/// Option reply: the option's data is too long.
pub const REP_ERR_TOO_BIG: u32 = REP_ERROR_BIT | 9;

/// Information: size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// Information: the export's own name.
pub const INFO_NAME: u16 = 1;
/// Information: a text for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information: minimum, preferred and maximum block size.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flag: the flags mean something.
pub const EXPORT_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes will be refused.
pub const EXPORT_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: NBD_CMD_FLUSH is understood.
pub const EXPORT_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: NBD_CMD_FLAG_FUA is understood.
pub const EXPORT_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: NBD_CMD_TRIM is understood.
pub const EXPORT_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: NBD_CMD_WRITE_ZEROES is understood.
pub const EXPORT_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: NBD_CMD_FLAG_DF is understood.
pub const EXPORT_SEND_DF: u16 = 1 << 7;
/// Transmission flag: a flush on one connection covers what was completed on every other.
pub const EXPORT_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: NBD_CMD_CACHE is understood.
pub const EXPORT_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: NBD_CMD_FLAG_FAST_ZERO is understood.
pub const EXPORT_SEND_FAST_ZERO: u16 = 1 << 11;

/// Request: read.
pub const CMD_READ: u16 = 0;
/// Request: write; the only one that carries a payload.
pub const CMD_WRITE: u16 = 1;
/// Request: the client leaves; it has no reply.
pub const CMD_DISC: u16 = 2;
/// Request: make completed writes durable.
pub const CMD_FLUSH: u16 = 3;
/// Request: these bytes are not needed any more.
pub const CMD_TRIM: u16 = 4;
/// Request: bring these bytes near.
pub const CMD_CACHE: u16 = 5;
/// Request: these bytes become zeroes.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Request: describe these bytes in the metadata contexts.
pub const CMD_BLOCK_STATUS: u16 = 7;
/// Request flag: this write is durable when its reply arrives.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// Request flag of NBD_CMD_WRITE_ZEROES: the space stays allocated.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Request flag of NBD_CMD_READ: the data comes in one chunk.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Request flag of NBD_CMD_BLOCK_STATUS: one extent is enough.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Request flag of NBD_CMD_WRITE_ZEROES: fail, unless it is faster than writing.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Request flag in extended headers: the length is that of a payload.
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Chunk flag: the last one of its reply.
pub const CHUNK_DONE: u16 = 1 << 0;
/// Chunk: nothing.
pub const CHUNK_NONE: u16 = 0;
/// Chunk: bytes that were read.
pub const CHUNK_OFFSET_DATA: u16 = 1;
/// Chunk: bytes that are all zeroes.
pub const CHUNK_OFFSET_HOLE: u16 = 2;
/// Chunk: extents of a context.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Chunk: extents of a context, with 64-bit lengths.
pub const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk: the request failed.
pub const CHUNK_ERROR: u16 = 1 << 15 | 1;

/// Longest string the protocol allows ("String values").
pub const MAX_STRING_BYTES: usize = 4096;
/// Longest payload of a request or a reply: the limit a client may assume unless told otherwise ("Block size
/// constraints").
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// Why a connection must end. Peer misbehaviour, all of it; the driver sends what `poll_output` still holds and
/// closes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NbdError {
    /// A fixed number is not the one the protocol has there: the peer speaks something else, or lost its place.
    #[error("{what}: expected magic {expected:#x}, got {got:#x}")]
    BadMagic {
        /// Where in the conversation.
        what: &'static str,
        /// The protocol's number.
        expected: u64,
        /// The peer's number.
        got: u64,
    },
    /// The client set handshake flags the server did not offer; the specification demands a close.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// Something is longer than this end is willing to skip.
    #[error("{what} of {len_bytes} bytes; at most {max_bytes} are accepted")]
    TooLong {
        /// What it is.
        what: &'static str,
        /// Its announced length.
        len_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// More options, or more replies to one option, than any honest peer sends.
    #[error("more than {max} {what}")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// The other end said good-bye during the negotiation.
    #[error("the peer aborted the negotiation")]
    Aborted,
    /// The export does not exist, and the protocol leaves no way to say so but closing (NBD_OPT_EXPORT_NAME).
    #[error("no export is called {name:?}")]
    UnknownExport {
        /// The name asked for.
        name: String,
    },
    /// A client wants an export in the clear, and the protocol leaves no way to refuse that but closing.
    #[error("the client asked for an export without NBD_OPT_STARTTLS")]
    TlsRequired,
    /// The server refused the export.
    #[error("the server refused export {name:?}: reply {reply:#x} {message:?}")]
    Refused {
        /// The name asked for.
        name: String,
        /// The NBD_REP_ERR value.
        reply: u32,
        /// The server's words, shortened to what the protocol allows.
        message: String,
    },
    /// A message that cannot be right where it stands.
    #[error("malformed {what}")]
    Malformed {
        /// Which message.
        what: &'static str,
    },
    /// A reply to a request that is not under way.
    #[error("a reply to cookie {cookie:#x}, which is not under way")]
    UnknownCookie {
        /// The reply's cookie.
        cookie: u64,
    },
}

/// Error values of replies ("Error values"): the protocol's own, whatever the host's are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Errno {
    /// EPERM: not permitted; a read-only export, or a writer whose generation is over.
    NotPermitted,
    /// EIO: the medium failed.
    Io,
    /// ENOMEM.
    NoMemory,
    /// EINVAL: the request makes no sense here.
    Invalid,
    /// ENOSPC: no space, or past the end.
    NoSpace,
    /// EOVERFLOW.
    Overflow,
    /// ENOTSUP.
    NotSupported,
    /// ESHUTDOWN: the server is going away.
    Shutdown,
}

impl Errno {
    const WIRE: [(Self, u32); 8] = [
        (Self::NotPermitted, 1),
        (Self::Io, 5),
        (Self::NoMemory, 12),
        (Self::Invalid, 22),
        (Self::NoSpace, 28),
        (Self::Overflow, 75),
        (Self::NotSupported, 95),
        (Self::Shutdown, 108),
    ];

    /// The number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u32 {
        Self::WIRE.iter().find(|(errno, _)| *errno == self).map_or(22, |(_, number)| *number)
    }

    /// What a number on the wire means: `None` for 0, success; a number the protocol does not know counts as
    /// EINVAL, as the specification wants.
    #[must_use]
    pub fn from_wire(number: u32) -> Option<Self> {
        match number {
            0 => None,
            _ => Some(Self::WIRE.iter().find(|(_, wire)| *wire == number).map_or(Self::Invalid, |(errno, _)| *errno)),
        }
    }

    /// The protocol's word for a disk's failure. `Busy` is not a failure and has no word: a server keeps the
    /// request and asks again ([`reply::Served::Busy`]); should one reach here it is EIO.
    #[must_use]
    pub fn of(error: &DiskError) -> Self {
        match error {
            DiskError::OutOfRange { .. } => Self::Invalid,
            DiskError::NoSpace { .. } => Self::NoSpace,
            DiskError::Fenced { .. } | DiskError::InUse { .. } => Self::NotPermitted,
            DiskError::NotSupported => Self::NotSupported,
            DiskError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => Self::NotPermitted,
            DiskError::Io { .. } | DiskError::FlushFailed { .. } | DiskError::Busy => Self::Io,
        }
    }
}

fn expect_magic(what: &'static str, expected: u64, got: u64) -> Result<(), NbdError> {
    if expected == got { Ok(()) } else { Err(NbdError::BadMagic { what, expected, got }) }
}
