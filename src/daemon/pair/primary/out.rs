//! What a primary's side wants done, and what it counts.

use crate::carried::Carried;
use crate::clock::Instant;
use crate::colo::arbiter::Ask;
use crate::colo::message::Message;
use crate::colo::{Cause, Exit};
use crate::daemon::pair::Samples;
use crate::page::PageBatch;
use crate::replica::mirror::Payload;
use bytes::Bytes;
use std::collections::BTreeMap;

/// What the driver has to send or do.
#[derive(Debug)]
pub enum Effect {
    /// A message on the stream.
    Message(Message),
    /// Pages on the stream. Give the buffer back with [`super::PrimarySide::recycle`].
    Pages(PageBatch),
    /// The word on the stream that the secondary's guest may rest until the next checkpoint.
    GuestRests,
    /// Connections in two sequence spaces, on the stream.
    Carried(Vec<Carried>),
    /// What waits for this state, on the stream.
    Output(Vec<Bytes>),
    /// The end of the pages, and the device state, on the stream.
    Devices(Vec<u8>),
    /// A frame to the network.
    ToNetwork(Bytes),
    /// A client's frame to the secondary.
    ToSecondary {
        /// The epoch in which the guest got it.
        epoch: u64,
        /// The frame.
        frame: Bytes,
    },
    /// A disk write to the secondary; answer with [`super::PrimarySide::handle_disk_acked`].
    DiskWrite {
        /// Which disk, from 0.
        disk: usize,
        /// Names the write in the answer.
        seq: u64,
        /// Where.
        offset: u64,
        /// What.
        payload: Payload,
    },
    /// The word that the secondary is to give the guest up; answer with [`super::PrimarySide::handle_given_up`].
    Dismiss,
    /// An arbitration; answer with [`super::PrimarySide::handle_answer`].
    Ask(Ask),
    /// Replication ended: close every link.
    Ended {
        /// How.
        exit: Exit,
        /// The generation in which the guest runs on, if it does.
        generation: u64,
    },
}

/// Counters of the primary's side.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Checkpoints the secondary owns, by cause.
    pub checkpoints: BTreeMap<Cause, u64>,
    /// How long the guest stood still for each.
    pub pause: Samples,
    /// Pages captured.
    pub pages: u64,
    /// Pages sent for the first copy, those that were written to meanwhile again.
    pub copy_pages: u64,
    /// Pages of the first copy that are sent, and how many there are.
    pub copied_pages: (u64, u64),
    /// When the first copy began.
    pub copy_begun: Option<Instant>,
    /// When the disk had been read to its end.
    pub disk_read_at: Option<Instant>,
    /// Why the comparator last asked for a checkpoint, and in which flow.
    pub asked: Option<String>,
    /// Client frames that could not be copied to the secondary.
    pub mirror_overflows: u64,
    /// When the secondary last came to own a state, by the side's clock.
    pub last_owned_at: Option<Instant>,
}
