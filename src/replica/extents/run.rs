//! The first bytes of a layer, on their way down: taken while the layer stands still, written without it, and forgotten if
//! nothing in it has changed since.
//!
//! ```text
//!   layer  [ 1 ][ 2 ][ 3 ]   [ 4 ]
//!           └── a run ──┘              adjoining extents of one kind, up to the size asked for
//! ```
//!
//! The trap: a run holds what was there when it was taken, and a spilled extent may be written over meanwhile: then what
//! reaches the disk below is old and new bytes mixed. That is why it is forgotten only where nothing has changed: what
//! stays in the layer covers it.

use super::{Content, MAX_EXTENT_BYTES, MAX_ZEROES_BYTES, Overlay, Place};
use crate::disk::{Disk, DiskError};
use crate::mutant::{self, Mutant};
use crate::pool::{Block, Pool};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// From this length on an extent is copied down as it is: to make one write of several saves less than it costs.
const LARGE_EXTENT_BYTES: usize = 128 << 10;

enum Source {
    Memory(Arc<Block>),
    Spill { file: Arc<File>, at: u64, len: usize },
}

impl Source {
    fn len(&self) -> usize {
        match self {
            Self::Memory(block) => block.len(),
            Self::Spill { len, .. } => *len,
        }
    }
}

enum What {
    Data(Vec<Source>),
    Zeroes { keep_allocated: bool },
}

/// Adjoining extents of a layer, to be written below it.
pub struct Run {
    start: u64,
    len: usize,
    count: usize,
    what: What,
    pool: Pool,
    /// Of the layer, when it was taken.
    version: u64,
}

impl Run {
    /// How many bytes it covers.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// Puts them where they belong.
    pub fn write_to(&self, disk: &mut dyn Disk) -> Result<(), DiskError> {
        let joined;
        let content = match &self.what {
            &What::Zeroes { keep_allocated } => Content::Zeroes { len_bytes: self.len as u64, keep_allocated },
            What::Data(sources) => match &sources[..] {
                [Source::Memory(block)] => Content::Data(block),
                sources => {
                    joined = self.join(sources)?;
                    Content::Data(&joined)
                }
            },
        };
        content.write_to(disk, self.start)
    }

    fn join(&self, sources: &[Source]) -> Result<Block, DiskError> {
        let mut joined = self.pool.block(self.pool.buffer(self.len), 0..self.len);
        let mut rest = &mut joined[..];
        for source in sources {
            let (into, after) = rest.split_at_mut(source.len());
            match source {
                Source::Memory(block) => into.copy_from_slice(block),
                Source::Spill { file, at, .. } => {
                    file.read_exact_at(into, *at).map_err(|e| DiskError::io("read a spill file", e))?;
                }
            }
            rest = after;
        }
        Ok(joined)
    }
}

impl Overlay {
    /// The first covered bytes: of data at most `max_bytes` and at least one extent, of zeroes at most
    /// [`MAX_ZEROES_BYTES`]. `None` when nothing is covered.
    #[must_use]
    pub fn first_run(&self, max_bytes: usize) -> Option<Run> {
        let (&start, first) = self.extents.first_key_value()?;
        let mut what = match first.place {
            Place::Zeroes { keep_allocated } => What::Zeroes { keep_allocated },
            Place::Memory(_) | Place::Spill { .. } => What::Data(Vec::new()),
        };
        let is_large = matches!(first.place, Place::Memory(_)) && first.len >= LARGE_EXTENT_BYTES;
        let max_bytes = match what {
            What::Zeroes { .. } => MAX_ZEROES_BYTES as usize,
            What::Data(_) if is_large => first.len,
            What::Data(_) => max_bytes.min(MAX_EXTENT_BYTES),
        };
        let (mut len, mut count) = (0, 0);
        for (at, extent) in &self.extents {
            let fits = len == 0 || len + extent.len <= max_bytes;
            if *at != start + len as u64 || !fits {
                break;
            }
            match (&mut what, &extent.place) {
                (What::Zeroes { keep_allocated: kept }, Place::Zeroes { keep_allocated }) if kept == keep_allocated => {
                }
                (What::Data(sources), Place::Memory(block)) => sources.push(Source::Memory(block.clone())),
                (What::Data(sources), &Place::Spill { at }) => {
                    let file = self.spill.as_ref().expect("a spilled extent has a file").file.clone();
                    sources.push(Source::Spill { file, at, len: extent.len });
                }
                _ => break,
            }
            len += extent.len;
            count += 1;
        }
        Some(Run { start, len, count, what, pool: self.budget.pool().clone(), version: self.version })
    }

    /// Forgets what is below now. False, and nothing is forgotten, if anything has changed since the run was taken, or it was
    /// another layer's.
    pub fn forget_run(&mut self, run: &Run) -> bool {
        let is_same = self.version == run.version || mutant::active(Mutant::ForgetChanged);
        (0..run.count).filter(|_| is_same).for_each(|_| _ = self.forget_first());
        is_same
    }
}
