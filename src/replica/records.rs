//! The records of a guest's images, which change together: one word for all of them, written beside each.
//!
//! ```text
//!  a byte is about to be written into any image ──▶ resync WHY is durable beside every one of them
//!  image 0 is flushed, and is checkpoint N ─┐
//!  image 1 is flushed, and is checkpoint N ─┴─ the last of them ──▶ checkpoint N is durable beside every one of them
//! ```
//!
//! Images are applied at a pace of their own, so between the two arrows each may be anywhere, and the order among them
//! means nothing. With one image this is a [`State`] and nothing more.
//!
//! A record is written while a medium is waited for, and what it says is known without waiting. Between a checkpoint that is
//! whole and its word, the image may be changed again: then the word is not said.
//!
//! The trap is the image that nothing is written to: it has the checkpoint as soon as its layers are empty, and says so
//! again at every checkpoint, or the others would wait for it for ever.

use super::lock;
use super::state::{Place, Standing, State, Why};
use crate::disk::DiskError;
use crate::mutant::{self, Mutant};
use std::sync::{Arc, Mutex};

struct Records {
    /// Held while a record is written: a medium is waited for.
    files: Mutex<Vec<State>>,
    /// What they say, for whoever must not wait.
    known: Mutex<Known>,
}

struct Known {
    /// What each record says, and whether that is durable.
    records: Vec<(Standing, bool)>,
    /// What each image is, flushed, as long as nothing was written to it since.
    reached: Vec<Option<Standing>>,
}

impl Known {
    fn standing(&self) -> Standing {
        let find = |is: fn(Standing) -> bool| self.records.iter().map(|known| known.0).find(|standing| is(*standing));
        find(|standing| !standing.is_whole())
            .or_else(|| find(|standing| matches!(standing, Standing::Checkpoint { .. })))
            .or_else(|| find(|_| true))
            .unwrap_or(Standing::NoRecord)
    }

    fn is(&self, standing: Standing) -> bool {
        self.records.iter().all(|known| *known == (standing, true))
    }
}

impl Records {
    fn over(states: Vec<State>) -> Arc<Self> {
        let (records, reached) = (said(&states), vec![None; states.len()]);
        Arc::new(Self { files: Mutex::new(states), known: Mutex::new(Known { records, reached }) })
    }

    /// Writes all records, if it `may` be said when it is this one's turn.
    fn write(&self, standing: Standing, may: impl FnOnce(&Known) -> bool) -> Result<(), DiskError> {
        let mut files = lock(&self.files);
        {
            let mut known = lock(&self.known);
            if !may(&known) {
                return Ok(());
            }
            // Whoever would rely on what they said before waits for this.
            known.records.iter_mut().for_each(|(_, durable)| *durable = false);
        }
        let is_applying = standing == Standing::Resync(Why::Applying);
        let few = if is_applying && mutant::active(Mutant::MarkFirstOnly) { 1 } else { files.len() };
        let written = files.iter_mut().take(few).try_for_each(|state| state.record(standing));
        lock(&self.known).records = said(&files);
        written
    }
}

fn said(states: &[State]) -> Vec<(Standing, bool)> {
    states.iter().map(|state| (state.standing(), state.is(state.standing()))).collect()
}

/// One image's part in the records.
#[derive(Clone)]
pub struct Member {
    index: usize,
    records: Arc<Records>,
}

impl Member {
    /// The record of a guest's only image.
    #[must_use]
    pub fn alone(mut state: State) -> Self {
        state.belong(None);
        Self { index: 0, records: Records::over(vec![state]) }
    }

    /// The records of a guest's images, in their order, as those of a new `set`.
    #[must_use]
    pub fn of(mut states: Vec<State>, set: u32) -> Vec<Self> {
        let count = states.len();
        if count > 1 {
            let place = |index: usize| Some(Place { set, index: index as u8, count: count as u8 });
            states.iter_mut().enumerate().for_each(|(index, state)| state.belong(place(index)));
        } else {
            states.iter_mut().for_each(|state| state.belong(None));
        }
        let records = Records::over(states);
        (0..count).map(|index| Self { index, records: records.clone() }).collect()
    }

    /// What the images are worth together: what the worst of them is.
    #[must_use]
    pub fn standing(&self) -> Standing {
        lock(&self.records.known).standing()
    }

    /// What this image is worth, whatever the others are.
    #[must_use]
    pub fn own(&self) -> Standing {
        lock(&self.records.known).records[self.index].0
    }

    /// Whether all images are durably known as this.
    #[must_use]
    pub fn is(&self, standing: Standing) -> bool {
        lock(&self.records.known).is(standing)
    }

    /// This image is about to be changed, and is no checkpoint any more: when this returns, `standing` is durable beside every
    /// image. After an error it may or may not be.
    pub fn record(&self, standing: Standing) -> Result<(), DiskError> {
        {
            // Both at once: whoever would call it whole looks at the one and takes back the other.
            let mut known = lock(&self.records.known);
            known.reached[self.index] = None;
            if known.is(standing) {
                return Ok(());
            }
        }
        self.records.write(standing, |_| true)
    }

    /// This image is flushed and is `standing`, until it is changed. Waits for nothing; [`Self::settle`] comes after it.
    pub fn reach(&self, standing: Standing) {
        lock(&self.records.known).reached[self.index] = Some(standing);
    }

    /// Makes durable beside every image that they are `standing`, once all of them are, and still are. After an error that may
    /// or may not be said.
    pub fn settle(&self, standing: Standing) -> Result<(), DiskError> {
        self.records.write(standing, |known| {
            if mutant::active(Mutant::WordNotTakenBack) {
                return true;
            }
            let mut are = known.reached.iter().map(|reached| *reached == Some(standing));
            if mutant::active(Mutant::WholeAlone) { are.any(|is| is) } else { are.all(|is| is) }
        })
    }
}
