//! What brings a replica level: the part of the disk that it has not, and how that is known.
//!
//! | the replica | is sent |
//! |---|---|
//! | is the checkpoint that the primary counted from | what was written since: the marked granules |
//! | is anything, and tells its hashes | the chunks whose hashes differ |
//! | is the same, says whoever made both | nothing |
//! | is new and all zero | what is not zero |
//! | is anything | everything |
//!
//! ```text
//!   write ─▶ since ─ mark ─▶ before ─ the epoch is owned ─▶ forgotten
//!              └─────────────── detach ─▶ both ─▶ the granules of the next attach
//! ```
//!
//! A bit stands from the moment of the write, whether its copy is queued, in flight or acknowledged, and falls only when
//! the other host owns a checkpoint that has it: what was acknowledged and never sealed, the replica has dropped.
//!
//! Two traps. The replica's record keeps the number of a checkpoint that later ones did not change, so several numbers
//! name one disk. And a hash may be older than the comparison: a chunk is compared with what the local disk holds *now*,
//! under the lock that guest writes take. If they are equal, every write on its way to the replica is in those bytes
//! already, and in the queue's order they end as these bytes; a later write is queued as ever.

use crate::bitmap::Bitmap;
use crate::mutant::{self, Mutant};
use crate::page::Pfn;
use std::collections::VecDeque;
use std::ops::RangeInclusive;

/// What one bit stands for.
pub const GRANULE_BYTES: u64 = 64 << 10;
/// What one hash stands for, and the most that is read by one step of the copy.
pub const SYNC_CHUNK_BYTES: u64 = 1 << 20;
/// Hashes that wait for their comparison.
pub const HASHES_MAX: usize = 64;

/// The hash of a chunk.
pub type ChunkHash = [u8; 32];

/// Hashes a chunk. BLAKE3: no two chunks that anybody can make have the same hash, so that equal hashes are equal
/// chunks, and it is faster than the disks it reads.
#[must_use]
pub fn hash_chunk(chunk: &[u8]) -> ChunkHash {
    *blake3::hash(chunk).as_bytes()
}

/// A replica to be brought level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// What its checkpoints are called from now on; 0 when nobody will ask.
    pub session: u64,
    /// What it holds now.
    pub holds: Holds,
}

/// What a replica holds before it is brought level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Holds {
    /// Nothing is known.
    Anything,
    /// It is new.
    Zeroes,
    /// The same as the local disk: whoever says so answers for it.
    Same,
    /// A checkpoint, as its record says.
    Checkpoint {
        /// The session.
        session: u64,
        /// The checkpoint's number in it.
        number: u64,
    },
    /// Its hashes will tell.
    Hashed,
}

/// How many chunks, and so hashes, a disk has.
#[must_use]
pub fn chunks(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(SYNC_CHUNK_BYTES)
}

/// What was written that the replica does not own.
#[derive(Debug)]
pub(super) struct Changes {
    session: u64,
    /// The numbers of the checkpoints that all are the disk which the other host owns; `None` before the first.
    owned: Option<RangeInclusive<u64>>,
    /// Written before the last mark.
    before: Marked,
    /// Written since.
    since: Marked,
}

#[derive(Debug)]
struct Marked {
    granules: Bitmap,
    any: bool,
}

impl Changes {
    pub(super) fn new(session: u64, size_bytes: u64) -> Self {
        let none = || Marked { granules: Bitmap::new(size_bytes.div_ceil(GRANULE_BYTES)), any: false };
        Self { session, owned: None, before: none(), since: none() }
    }

    pub(super) fn write(&mut self, offset: u64, len_bytes: u64) {
        let end = (offset + len_bytes).div_ceil(GRANULE_BYTES);
        (offset / GRANULE_BYTES..end).for_each(|granule| self.since.granules.set(Pfn(granule)));
        self.since.any |= len_bytes > 0;
    }

    /// An epoch ends. Nearly always two structures change places: a guest stands still meanwhile.
    pub(super) fn mark(&mut self) {
        if mutant::active(Mutant::ForgetUnowned) {
            return self.since.clear();
        }
        if self.before.any {
            self.before.granules.union(&self.since.granules);
            self.since.clear();
        } else {
            std::mem::swap(&mut self.before, &mut self.since);
        }
    }

    /// The other host owns the checkpoint of the last mark.
    pub(super) fn own(&mut self, number: u64) {
        let first = self.owned.as_ref().filter(|_| !self.before.any).map_or(number, |same| *same.start());
        self.owned = Some(first..=number);
        self.before.clear();
    }

    /// Whether a replica that is this checkpoint lacks just what is marked.
    pub(super) fn counts_from(&self, session: u64, number: u64) -> bool {
        self.session != 0 && self.session == session && self.owned.as_ref().is_some_and(|same| same.contains(&number))
    }

    pub(super) fn into_granules(mut self) -> Bitmap {
        self.since.granules.union(&self.before.granules);
        self.since.granules
    }
}

impl Marked {
    fn clear(&mut self) {
        if self.any {
            self.granules.clear_all();
            self.any = false;
        }
    }
}

/// The copy that brings a replica level, and how far it is.
#[derive(Debug, Default)]
pub(super) struct Resync {
    /// The bytes before it are queued or need no copy.
    pub(super) at: u64,
    pub(super) skipped_bytes: u64,
    pub(super) sent_bytes: u64,
    pub(super) what: What,
}

/// What is to be copied.
#[derive(Debug, Default)]
pub(super) enum What {
    #[default]
    All,
    NotZero,
    Marked(Bitmap),
    Differing {
        hashes: VecDeque<ChunkHash>,
        /// How many have come.
        received: u64,
    },
}

impl What {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::All => "all",
            Self::NotZero => "nonzero",
            Self::Marked(_) => "changed",
            Self::Differing { .. } => "differing",
        }
    }
}

impl Resync {
    /// Goes to the next byte that may need a copy. How many may be read from there.
    pub(super) fn next(&mut self, size_bytes: u64) -> u64 {
        let What::Marked(granules) = &self.what else { return SYNC_CHUNK_BYTES.min(size_bytes - self.at) };
        let first = granules.next(Pfn(self.at / GRANULE_BYTES)).map_or(size_bytes, |first| first.0 * GRANULE_BYTES);
        self.skipped_bytes += first.saturating_sub(self.at);
        self.at = self.at.max(first);
        let granule = self.at / GRANULE_BYTES;
        let run = (granule..granules.bits()).take((SYNC_CHUNK_BYTES / GRANULE_BYTES) as usize);
        let run = run.take_while(|granule| granules.get(Pfn(*granule))).count() as u64;
        (run * GRANULE_BYTES).min(size_bytes - self.at)
    }

    pub(super) fn skip(&mut self, bytes: u64) {
        self.at += bytes;
        self.skipped_bytes += bytes;
    }
}
