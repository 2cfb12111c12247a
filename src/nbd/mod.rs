//! The network block device protocol, fixed newstyle, both ends, as pure machines: bytes in, bytes out.
//!
//! ```text
//!            client.rs                                  server
//!  Greeting ── NBDMAGIC IHAVEOPT flags ◀──────────────  handshake.rs   Greeting
//!  flags, NBD_OPT_GO  ────────────────────────────────▶                Options
//!  Option  ◀── NBD_INFO_EXPORT, NBD_REP_ACK ──────────
//!  Ready   ── requests ───────────────────────────────▶ transmission.rs
//!          ◀── simple replies ────────────────────────
//! ```
//!
//! The trap: every length in this protocol is chosen by the peer. Each is compared with a named limit before a
//! byte is kept for it, and what is too long is skipped or ends the connection. (CVE-2017-15118, -15119 and
//! CVE-2022-26495 are servers that hoped; CVE-2017-2630 is a client that did.)
//!
//! Source: NetworkBlockDevice/nbd `doc/proto.md`, sections "Fixed newstyle negotiation", "Transmission" and
//! "Values".

pub mod client;
pub mod handshake;
#[cfg(test)]
mod tests;
pub mod transmission;

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
/// Option: describe one export.
pub const OPT_INFO: u32 = 6;
/// Option: describe one export and start.
pub const OPT_GO: u32 = 7;

/// Option reply: done.
pub const REP_ACK: u32 = 1;
/// Option reply: one export's name.
pub const REP_SERVER: u32 = 2;
/// Option reply: one piece of information about an export.
pub const REP_INFO: u32 = 3;
/// Set in every option reply that is an error.
pub const REP_ERROR_BIT: u32 = 1 << 31;
/// Option reply: the option is unknown here.
pub const REP_ERR_UNSUP: u32 = REP_ERROR_BIT | 1;
/// Option reply: the option's data is malformed.
pub const REP_ERR_INVALID: u32 = REP_ERROR_BIT | 3;
/// Option reply: there is no such export.
pub const REP_ERR_UNKNOWN: u32 = REP_ERROR_BIT | 6;
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

/// Request: read.
pub const CMD_READ: u16 = 0;
/// Request: write; the only one that carries a payload.
pub const CMD_WRITE: u16 = 1;
/// Request: the client leaves; it has no reply.
pub const CMD_DISC: u16 = 2;
/// Request: make completed writes durable.
pub const CMD_FLUSH: u16 = 3;
/// Request flag: this write is durable when its reply arrives.
pub const CMD_FLAG_FUA: u16 = 1 << 0;

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
    /// request and asks again ([`transmission::Served::Busy`]); should one reach here it is EIO.
    #[must_use]
    pub fn of(error: &DiskError) -> Self {
        match error {
            DiskError::OutOfRange { .. } => Self::Invalid,
            DiskError::NoSpace { .. } => Self::NoSpace,
            DiskError::Fenced { .. } => Self::NotPermitted,
            DiskError::Io { .. } | DiskError::Busy => Self::Io,
        }
    }
}

fn expect_magic(what: &'static str, expected: u64, got: u64) -> Result<(), NbdError> {
    if expected == got { Ok(()) } else { Err(NbdError::BadMagic { what, expected, got }) }
}
