//! What a secondary has of a checkpoint that its guest has not.

use crate::carried::Carried;
use crate::clock::Instant;
use crate::page::{PageBatch, Pfn};
use bytes::Bytes;

/// A checkpoint that is not whole.
#[derive(Default)]
pub(super) struct Staged {
    pub(super) batches: Vec<PageBatch>,
    pub(super) zero: Vec<Pfn>,
    pub(super) pages: u64,
    pub(super) carried: Vec<Carried>,
    pub(super) output: Vec<Bytes>,
    pub(super) devices: Vec<u8>,
}

/// A load under way: the pages still to be put into the guest.
pub(super) struct Load {
    pub(super) begun: Instant,
    pub(super) pages: Vec<Pfn>,
    pub(super) done: usize,
    pub(super) devices: Vec<u8>,
}
