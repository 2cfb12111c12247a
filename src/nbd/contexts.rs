//! What a negotiation settles besides the export: how replies are framed, and which metadata contexts
//! NBD_CMD_BLOCK_STATUS speaks of.
//!
//! The trap: contexts belong to the export named when they were set. A client that then goes on with another export has
//! none ("NBD_OPT_SET_META_CONTEXT").
//!
//! Source: `doc/proto.md`, "Metadata querying", "NBD_OPT_SET_META_CONTEXT"; for the bitmap, qemu `docs/interop/nbd.txt`.

use super::MAX_STRING_BYTES;
use bytes::Buf;

/// Queries in one request for contexts; QEMU sends four.
const MAX_QUERIES: u32 = 64;

/// A metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: holes and zeroes.
    Allocation,
    /// What differs from the last checkpoint, as QEMU names a dirty bitmap.
    Changed,
    /// How deep a block lies in QEMU's chain of images. Ours is one image: 1.
    Depth,
}

impl Context {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Changed => "qemu:dirty-bitmap:checkpoint",
            Self::Depth => "qemu:allocation-depth",
        }
    }

    /// Its number on this server's connections.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Changed => 2,
            Self::Depth => 3,
        }
    }
}

/// How requests and replies are framed once the negotiation is over.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Framing {
    /// Replies come in chunks.
    pub structured: bool,
    /// Headers have 64-bit lengths.
    pub extended: bool,
    /// The contexts that were chosen, in the client's order.
    pub contexts: Vec<Context>,
}

/// A request for contexts, parsed: the export's name, and the queries.
pub(super) struct ContextRequest<'a> {
    pub(super) export: &'a [u8],
    queries: Vec<&'a [u8]>,
}

impl<'a> ContextRequest<'a> {
    /// `None` when the lengths do not add up, or there are more than anybody sends.
    pub(super) fn parse(mut data: &'a [u8]) -> Option<Self> {
        let string = |data: &mut &'a [u8]| {
            let len = data.try_get_u32().ok()? as usize;
            let (text, rest) = data.split_at_checked(len).filter(|_| len <= MAX_STRING_BYTES)?;
            *data = rest;
            Some(text)
        };
        let export = string(&mut data)?;
        let count = data.try_get_u32().ok().filter(|count| *count <= MAX_QUERIES)?;
        let queries = (0..count).map(|_| string(&mut data)).collect::<Option<Vec<_>>>()?;
        data.is_empty().then_some(Self { export, queries })
    }

    /// Which of `offered` are asked for. A list may also be asked for by name space, or for everything.
    pub(super) fn choose(&self, offered: &[Context], is_list: bool) -> Vec<Context> {
        let wanted = |context: &&Context| {
            let name = context.name().as_bytes();
            let prefix = |query: &&[u8]| is_list && query.ends_with(b":") && name.starts_with(query);
            let all = is_list && self.queries.is_empty();
            all || self.queries.iter().any(|query| *query == name || prefix(query))
        };
        offered.iter().filter(wanted).copied().collect()
    }
}
