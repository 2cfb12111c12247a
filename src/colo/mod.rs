//! The checkpoint protocol: pure, in QEMU's words.
//!
//! [`Primary`](primary::Primary) and [`Secondary`](secondary::Secondary) are state machines of one shape:
//! `handle_*(now, input)` in, `poll_action()` out, `poll_timeout()` for the next deadline. They never touch a
//! socket, a guest or a clock. [`stream`] and [`hello`] are the bytes between them, [`heartbeat`] knows whether
//! the peer is there, [`arbiter`] who may go on alone when it is not.
//!
//! A checkpoint, in the default order:
//!
//! ```text
//!  primary                                              secondary
//!     │ CHECKPOINT_REQUEST ───────────────────────────────▶ │ stop the guest (COLO)
//!     │ ◀─────────────────────────────── CHECKPOINT_REPLY   │
//!     │ suspend, mark, capture, resume                      │
//!     │ VMSTATE_SEND, pages, VMSTATE_SIZE, devices ───────▶ │ stage; guest and disk untouched
//!     │                                                     │ whole: seal the disk epoch
//!     │ ◀─────────────────────────────── VMSTATE_RECEIVED   │ ══ commit point ══
//!     │ release the epoch's packets                         │ apply pages and devices
//!     │ ◀─────────────────────────────── VMSTATE_LOADED     │ run (COLO)
//! ```

pub mod arbiter;
pub mod delta;
pub mod failover;
pub mod fallback;
pub mod heartbeat;
pub mod hello;
pub mod message;
mod parting;
pub mod primary;
pub mod secondary;
pub mod stream;

#[cfg(test)]
mod races;

use message::Message;
use serde::Serialize;
use std::time::Duration;

/// Why a checkpoint was taken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The first state.
    First,
    /// The checkpoint delay was over.
    Delay,
    /// The two guests produced different bytes.
    PayloadDiffers,
    /// One guest produced what the other did not within the compare timeout.
    Aged,
    /// The secondary produced what the primary did not within the compare timeout.
    OneSided,
    /// One pair of addresses and ports carried two connections within an epoch.
    Reused,
    /// Output waits for this checkpoint (Remus).
    OutputWaits,
    /// Held packets reached their bound.
    PacketBound,
    /// Queued disk writes reached their bound.
    DiskBound,
    /// A packet that cannot be compared.
    Unparsable,
    /// A client frame could not be copied to the secondary.
    MirrorOverflow,
    /// The packet link was lost, or there is one again.
    PacketLink,
    /// Frames of the guest were lost on their way to the proxy.
    FramesLost,
    /// The operator asked.
    Command,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::First,
        Self::Delay,
        Self::PayloadDiffers,
        Self::Aged,
        Self::OneSided,
        Self::Reused,
        Self::OutputWaits,
        Self::PacketBound,
        Self::DiskBound,
        Self::Unparsable,
        Self::MirrorOverflow,
        Self::PacketLink,
        Self::FramesLost,
        Self::Command,
    ];

    /// Whether the two guests' output asked for it: what costs a checkpoint in lock-step alone.
    #[must_use]
    pub fn is_difference(self) -> bool {
        matches!(self, Self::PayloadDiffers | Self::Aged | Self::OneSided | Self::Reused | Self::Unparsable)
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::First => "first",
            Self::Delay => "delay",
            Self::PayloadDiffers => "payload-differs",
            Self::Aged => "aged",
            Self::OneSided => "one-sided",
            Self::Reused => "reused",
            Self::OutputWaits => "output-waits",
            Self::PacketBound => "packet-bound",
            Self::DiskBound => "disk-bound",
            Self::Unparsable => "unparsable",
            Self::MirrorOverflow => "mirror-overflow",
            Self::PacketLink => "packet-link",
            Self::FramesLost => "frames-lost",
            Self::Command => "command",
        })
    }
}

/// How replication ended on a side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// The primary's guest runs on in the generation it had: it was never protected, or the secondary has given it up.
    Unprotected,
    /// The guest runs here, alone, in a generation that was won.
    Alone,
    /// Another host has the guest; it was stopped here.
    Stopped,
    /// The secondary ended without a state it could have gone on from.
    NoState,
    /// The secondary's copy is unusable; the primary has the guest.
    Failed,
    /// The secondary was dismissed: nothing of the guest is left here.
    Dismissed,
}

/// Why the peer counts as lost.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Loss {
    /// The operator asked for a failover.
    #[error("a failover was requested")]
    Requested,
    /// The connection ended.
    #[error("the connection to the peer ended: {0}")]
    Disconnected(String),
    /// The heartbeat stopped.
    #[error("{0}")]
    Silent(#[from] heartbeat::Silence),
    /// The peer is alive and makes no progress.
    #[error("the peer made no progress within a checkpoint for {waited:?}")]
    Hung {
        /// How long.
        waited: Duration,
    },
    /// The peer said what it may not.
    #[error("the peer broke the protocol: {0}")]
    Violation(String),
    /// This side cannot go on replicating.
    #[error("replication failed on this host: {0}")]
    Local(String),
    /// The operator ended the protection: the peer is not lost, but let go.
    #[error("the protection was ended (xl-colo unprotect)")]
    Dismissed,
    /// The peer is alive and does not say that it has given the guest up.
    #[error("the peer did not confirm the end of the protection within {waited:?}")]
    Unconfirmed {
        /// How long.
        waited: Duration,
    },
}

/// What a peer may not say.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// A message that has no arrow.
    #[error("unexpected {got} in state {state}")]
    Unexpected {
        /// Where this side was.
        state: String,
        /// What came.
        got: Message,
    },
}
