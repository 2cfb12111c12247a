//! A queue from whose middle things leave: frames by arrival, flows by last use.
//!
//! ```text
//!   oldest ⇄ · ⇄ · ⇄ newest          places in one vector, linked both ways; a place is reused when it is free
//! ```
//!
//! Every operation but the walk is O(1), and memory is that of the most that were in it at once. The trap: a place
//! outlives what stood in it, so whoever keeps one must know that it is still taken.

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Place<T> {
    older: u32,
    newer: u32,
    value: Option<T>,
}

/// The queue. Places are what [`Line::push`] returned.
#[derive(Debug)]
pub(super) struct Line<T> {
    places: Vec<Place<T>>,
    /// The first free place; free places are linked by `newer`.
    free: u32,
    oldest: u32,
    newest: u32,
    len: usize,
}

impl<T> Line<T> {
    pub(super) const fn new() -> Self {
        Self { places: Vec::new(), free: NONE, oldest: NONE, newest: NONE, len: 0 }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Appends. The number of places fits, since each costs far more than a byte of a bounded queue.
    pub(super) fn push(&mut self, value: T) -> u32 {
        let at = if self.free == NONE {
            self.places.push(Place { older: NONE, newer: NONE, value: Some(value) });
            (self.places.len() - 1) as u32
        } else {
            let at = self.free;
            let place = &mut self.places[at as usize];
            self.free = place.newer;
            place.value = Some(value);
            at
        };
        self.len += 1;
        self.link(at);
        at
    }

    /// Takes what stands at a place.
    pub(super) fn remove(&mut self, at: u32) -> Option<T> {
        let value = self.places.get_mut(at as usize)?.value.take()?;
        self.unlink(at);
        self.places[at as usize].newer = self.free;
        self.free = at;
        self.len -= 1;
        Some(value)
    }

    /// Makes what stands at a place the newest.
    pub(super) fn refresh(&mut self, at: u32) {
        if at != self.newest && self.get(at).is_some() {
            self.unlink(at);
            self.link(at);
        }
    }

    pub(super) fn get(&self, at: u32) -> Option<&T> {
        self.places.get(at as usize)?.value.as_ref()
    }

    pub(super) fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        self.places.get_mut(at as usize)?.value.as_mut()
    }

    pub(super) fn oldest(&self) -> Option<u32> {
        (self.oldest != NONE).then_some(self.oldest)
    }

    pub(super) fn newest(&self) -> Option<u32> {
        (self.newest != NONE).then_some(self.newest)
    }

    pub(super) fn newer(&self, at: u32) -> Option<u32> {
        self.places.get(at as usize).map(|place| place.newer).filter(|at| *at != NONE)
    }

    pub(super) fn older(&self, at: u32) -> Option<u32> {
        self.places.get(at as usize).map(|place| place.older).filter(|at| *at != NONE)
    }

    /// From the oldest to the newest.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        std::iter::successors(self.oldest(), |at| self.newer(*at)).filter_map(|at| self.get(at))
    }

    fn link(&mut self, at: u32) {
        let older = std::mem::replace(&mut self.newest, at);
        let place = &mut self.places[at as usize];
        (place.older, place.newer) = (older, NONE);
        match self.places.get_mut(older as usize) {
            Some(place) => place.newer = at,
            None => self.oldest = at,
        }
    }

    fn unlink(&mut self, at: u32) {
        let (older, newer) = (self.places[at as usize].older, self.places[at as usize].newer);
        match self.places.get_mut(older as usize) {
            Some(place) => place.newer = newer,
            None => self.oldest = newer,
        }
        match self.places.get_mut(newer as usize) {
            Some(place) => place.older = older,
            None => self.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_as_a_vector_of_names(ops in prop::collection::vec((0..3_u8, any::<prop::sample::Index>()), 0..100)) {
            let (mut line, mut model) = (Line::new(), Vec::<(u32, usize)>::new());
            let mut most = 0;
            for (n, (op, which)) in ops.into_iter().enumerate() {
                match op {
                    0 => model.push((line.push(n), n)),
                    _ if model.is_empty() => {}
                    1 => {
                        let (at, value) = model.remove(which.index(model.len()));
                        prop_assert_eq!(line.remove(at), Some(value));
                        prop_assert_eq!(line.remove(at), None);
                    }
                    _ => {
                        let moved = model.remove(which.index(model.len()));
                        line.refresh(moved.0);
                        model.push(moved);
                    }
                }
                most = most.max(model.len());
                prop_assert_eq!(line.iter().copied().collect::<Vec<_>>(), model.iter().map(|(_, n)| *n).collect::<Vec<_>>());
                prop_assert_eq!((line.len(), line.places.len()), (model.len(), most));
                prop_assert_eq!(line.newest(), model.last().map(|(at, _)| *at));
                let back = std::iter::successors(line.newest(), |at| line.older(*at)).collect::<Vec<_>>();
                prop_assert_eq!(back, model.iter().rev().map(|(at, _)| *at).collect::<Vec<_>>());
            }
        }
    }
}
