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
//! The trap is the image that nothing is written to: it has the checkpoint as soon as its layers are empty, and says so
//! again at every checkpoint, or the others would wait for it for ever.

use super::lock;
use super::state::{Place, Standing, State, Why};
use crate::disk::DiskError;
use crate::mutant::{self, Mutant};
use std::sync::{Arc, Mutex};

struct Records {
    states: Vec<State>,
    /// What each image is, flushed, as long as nothing was written to it since.
    reached: Vec<Option<Standing>>,
}

impl Records {
    fn standing(&self) -> Standing {
        let find = |is: fn(Standing) -> bool| self.states.iter().map(State::standing).find(|standing| is(*standing));
        find(|standing| !standing.is_whole())
            .or_else(|| find(|standing| matches!(standing, Standing::Checkpoint { .. })))
            .or_else(|| find(|_| true))
            .unwrap_or(Standing::NoRecord)
    }

    fn is(&self, standing: Standing) -> bool {
        self.states.iter().all(|state| state.is(standing))
    }

    fn record(&mut self, index: usize, standing: Standing) -> Result<(), DiskError> {
        let is_whole = standing.is_whole();
        self.reached[index] = is_whole.then_some(standing);
        if is_whole
            && self.reached.iter().any(|reached| *reached != Some(standing))
            && !mutant::active(Mutant::WholeAlone)
        {
            return Ok(());
        }
        let is_applying = standing == Standing::Resync(Why::Applying);
        let few = if is_applying && mutant::active(Mutant::MarkFirstOnly) { 1 } else { self.states.len() };
        self.states.iter_mut().take(few).try_for_each(|state| state.record(standing))
    }
}

/// One image's part in the records.
pub struct Member {
    index: usize,
    records: Arc<Mutex<Records>>,
}

impl Member {
    /// The record of a guest's only image.
    #[must_use]
    pub fn alone(mut state: State) -> Self {
        state.belong(None);
        Self { index: 0, records: Arc::new(Mutex::new(Records { states: vec![state], reached: vec![None] })) }
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
        let records = Arc::new(Mutex::new(Records { states, reached: vec![None; count] }));
        (0..count).map(|index| Self { index, records: records.clone() }).collect()
    }

    /// What the images are worth together: what the worst of them is.
    #[must_use]
    pub fn standing(&self) -> Standing {
        lock(&self.records).standing()
    }

    /// What this image is worth, whatever the others are.
    #[must_use]
    pub fn own(&self) -> Standing {
        lock(&self.records).states[self.index].standing()
    }

    /// Whether all images are durably known as this.
    #[must_use]
    pub fn is(&self, standing: Standing) -> bool {
        lock(&self.records).is(standing)
    }

    /// This image is flushed and is `standing`, or is about to be no such thing. When this returns, the latter is
    /// durable beside every image; the former is once all of them are, and until then nothing is said of it. After an
    /// error it may or may not be.
    pub fn record(&self, standing: Standing) -> Result<(), DiskError> {
        lock(&self.records).record(self.index, standing)
    }
}
