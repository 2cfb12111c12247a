//! Remus: frames wait for the checkpoint that follows them; and [`Proxy`], the one thing the engine holds.
//!
//! ```text
//!   handle_primary(e) ─▶ [e][e][e+1][e+1]…  ── checkpoint(e) ─▶ every [≤ e] leaves, in order
//! ```
//!
//! Nothing is compared, so nothing needs to be understood: ARP and garbage wait as any frame does. The bound asks for
//! a checkpoint and stops the reader ([`EpochBuffer::ready`]); it drops nothing.
//!
//! The trap: a frame that arrives late with the tag of an owned epoch leaves at once, before younger ones that wait:
//! the owned state explains it. Source: Cully et al., "Remus" (NSDI 2008) 3.3, network buffering; `sch_plug`.

use super::compare::{Cause, Comparator, Config, Output, Stats};
use super::connection::FRAME_OVERHEAD_BYTES;
use super::record::FlowReport;
use crate::clock::Instant;
use bytes::Bytes;
use std::collections::VecDeque;

/// The output buffer of one guest NIC under Remus.
#[derive(Debug)]
pub struct EpochBuffer {
    max_queue_bytes: usize,
    /// The oldest epoch that is not owned.
    epoch: u64,
    queue: VecDeque<(u64, Bytes)>,
    outputs: VecDeque<Output>,
    asked: Option<u64>,
    stats: Stats,
}

impl EpochBuffer {
    /// An empty buffer in epoch 0.
    #[must_use]
    pub fn new(max_queue_bytes: usize) -> Self {
        let stats = Stats::default();
        Self { max_queue_bytes, epoch: 0, queue: VecDeque::new(), outputs: VecDeque::new(), asked: None, stats }
    }

    /// Takes a frame that the primary emitted in `epoch`. Never drops it.
    pub fn handle_primary(&mut self, epoch: u64, frame: Bytes) {
        if epoch < self.epoch {
            return self.release(frame);
        }
        self.stats.held += 1;
        self.stats.currently_held += 1;
        self.stats.currently_held_bytes += frame.len() + FRAME_OVERHEAD_BYTES;
        self.queue.push_back((epoch, frame));
        if !self.ready() && self.asked < Some(epoch) {
            self.asked = Some(epoch);
            self.stats.diverged += 1;
            self.outputs.push_back(Output::Diverged { epoch, cause: Cause::BoundReached, flow: None });
        }
    }

    /// The secondary owns the checkpoint that ended `epoch`.
    pub fn checkpoint(&mut self, epoch: u64) {
        self.epoch = self.epoch.max(epoch.saturating_add(1));
        while self.queue.front().is_some_and(|(tag, _)| *tag <= epoch) {
            self.release_oldest();
        }
    }

    /// What waits for the checkpoint that ends `epoch`, the latest first.
    pub(super) fn waiting(&self, epoch: u64) -> impl Iterator<Item = &Bytes> {
        self.queue.iter().rev().filter(move |(tag, _)| *tag <= epoch).map(|(_, frame)| frame)
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether the primary's next frame may be read. While it may not, leave it in the guest's own queue.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.stats.currently_held_bytes < self.max_queue_bytes
    }

    /// Lets everything go, in arrival order: the primary runs alone and owes nobody an explanation.
    pub fn release_all(&mut self) {
        while !self.queue.is_empty() {
            self.release_oldest();
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    fn release_oldest(&mut self) {
        if let Some((_, frame)) = self.queue.pop_front() {
            self.stats.currently_held -= 1;
            self.stats.currently_held_bytes -= frame.len() + FRAME_OVERHEAD_BYTES;
            self.release(frame);
        }
    }

    fn release(&mut self, frame: Bytes) {
        self.stats.released += 1;
        self.outputs.push_back(Output::Release(frame));
    }
}

/// What stands between the primary's guest and the network.
#[derive(Debug)]
pub enum Proxy {
    /// Lock-step: released when the secondary's guest explains it.
    Colo(Box<Comparator>),
    /// Released by checkpoints alone.
    Remus(EpochBuffer),
    /// Unprotected: everything passes. Holds what has not been polled yet, and what was counted while it was not open.
    Open(VecDeque<Output>, Stats),
}

impl Proxy {
    /// A comparator.
    #[must_use]
    pub fn colo(config: Config) -> Self {
        Self::Colo(Box::new(Comparator::new(config)))
    }

    /// A buffer.
    #[must_use]
    pub fn remus(config: Config) -> Self {
        Self::Remus(EpochBuffer::new(config.max_queue_bytes))
    }

    /// Nothing.
    #[must_use]
    pub fn open() -> Self {
        Self::Open(VecDeque::new(), Stats::default())
    }

    /// Takes a frame that the primary emitted in `epoch`.
    pub fn handle_primary(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        match self {
            Self::Colo(comparator) => comparator.handle_primary(now, epoch, frame),
            Self::Remus(buffer) => buffer.handle_primary(epoch, frame),
            Self::Open(outputs, _) => outputs.push_back(Output::Release(frame)),
        }
    }

    /// Takes a frame that the secondary emitted in `epoch`. Only a comparator has a use for it.
    pub fn handle_secondary(&mut self, now: Instant, epoch: u64, frame: Bytes) {
        if let Self::Colo(comparator) = self {
            comparator.handle_secondary(now, epoch, frame);
        }
    }

    /// Whether frames of `epoch` and later are compared. Only a comparator compares any.
    pub fn set_comparing(&mut self, epoch: u64, comparing: bool) {
        if let Self::Colo(comparator) = self {
            comparator.set_comparing(epoch, comparing);
        }
    }

    /// What waits for the checkpoint that ends `epoch`, in order: the latest of it that costs `max_bytes` at most.
    #[must_use]
    pub fn waiting(&self, epoch: u64, mut max_bytes: usize) -> Vec<Bytes> {
        let fits = |frame: &&Bytes| {
            let left = max_bytes.checked_sub(frame.len() + FRAME_OVERHEAD_BYTES);
            left.map(|left| max_bytes = left).is_some()
        };
        let mut frames: Vec<_> = match self {
            Self::Colo(comparator) => comparator.waiting(epoch).take_while(fits).cloned().collect(),
            Self::Remus(buffer) => buffer.waiting(epoch).take_while(fits).cloned().collect(),
            Self::Open(..) => Vec::new(),
        };
        frames.reverse();
        frames
    }

    /// The secondary owns the checkpoint that ended `epoch`.
    pub fn checkpoint(&mut self, now: Instant, epoch: u64) {
        match self {
            Self::Colo(comparator) => comparator.checkpoint(now, epoch),
            Self::Remus(buffer) => buffer.checkpoint(epoch),
            Self::Open(..) => {}
        }
    }

    /// Asks for a checkpoint if something has waited too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        if let Self::Colo(comparator) = self {
            comparator.handle_timeout(now);
        }
    }

    /// When to call [`Proxy::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Self::Colo(comparator) => comparator.poll_timeout(),
            Self::Remus(_) | Self::Open(..) => None,
        }
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        match self {
            Self::Colo(comparator) => comparator.poll_output(),
            Self::Remus(buffer) => buffer.poll_output(),
            Self::Open(outputs, _) => outputs.pop_front(),
        }
    }

    /// Whether the primary's next frame may be read.
    #[must_use]
    pub fn ready(&self) -> bool {
        match self {
            Self::Colo(comparator) => comparator.ready(),
            Self::Remus(buffer) => buffer.ready(),
            Self::Open(..) => true,
        }
    }

    /// The primary runs alone from here: everything held leaves in order, everything later passes. A request for a
    /// checkpoint that nobody read is void.
    pub fn release_all(&mut self) {
        match self {
            Self::Colo(comparator) => comparator.release_all(),
            Self::Remus(buffer) => buffer.release_all(),
            Self::Open(..) => {}
        }
        let mut outputs = VecDeque::new();
        while let Some(output) = self.poll_output() {
            if matches!(output, Output::Release(_)) {
                outputs.push_back(output);
            }
        }
        *self = Self::Open(outputs, self.stats());
    }

    /// At most `max` flows that diverged, worst first. Only a comparator knows any.
    #[must_use]
    pub fn flows(&self, max: usize) -> Vec<FlowReport> {
        if let Self::Colo(comparator) = self { comparator.flows(max) } else { Vec::new() }
    }

    /// Counters. An open proxy counts nothing, and remembers what it was opened with.
    #[must_use]
    pub fn stats(&self) -> Stats {
        match self {
            Self::Colo(comparator) => comparator.stats(),
            Self::Remus(buffer) => buffer.stats(),
            Self::Open(_, stats) => *stats,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(byte: u8) -> Bytes {
        Bytes::from(vec![byte; 60])
    }

    fn released(proxy: &mut Proxy) -> Vec<u8> {
        std::iter::from_fn(|| proxy.poll_output())
            .filter_map(|output| match output {
                Output::Release(frame) => Some(frame[0]),
                Output::Diverged { .. } => None,
            })
            .collect()
    }

    #[test]
    fn nothing_leaves_before_its_checkpoint() {
        let mut proxy = Proxy::remus(Config::default());
        for (epoch, byte) in [(0, 1), (0, 2), (1, 3), (2, 4)] {
            proxy.handle_primary(Instant::ZERO, epoch, frame(byte));
        }
        assert!(released(&mut proxy).is_empty());
        proxy.checkpoint(Instant::ZERO, 0);
        assert_eq!(released(&mut proxy), [1, 2]);
        proxy.handle_primary(Instant::ZERO, 0, frame(9));
        assert_eq!(released(&mut proxy), [9], "late, and owned already");
        proxy.release_all();
        proxy.handle_primary(Instant::ZERO, 7, frame(5));
        assert_eq!(released(&mut proxy), [3, 4, 5], "alone: in order, then open");
    }

    #[test]
    fn the_latest_that_waits_is_told_in_order() {
        for mut proxy in [Proxy::remus(Config::default()), Proxy::colo(Config::default())] {
            for (epoch, byte) in [(0, 1), (0, 2), (0, 3), (1, 4)] {
                proxy.handle_primary(Instant::ZERO, epoch, frame(byte));
            }
            let cost_bytes = 60 + FRAME_OVERHEAD_BYTES;
            let told = |max_bytes| proxy.waiting(0, max_bytes).iter().map(|frame| frame[0]).collect::<Vec<_>>();
            assert_eq!(
                (told(3 * cost_bytes), told(2 * cost_bytes), told(cost_bytes - 1)),
                (vec![1, 2, 3], vec![2, 3], vec![])
            );
            proxy.checkpoint(Instant::ZERO, 0);
            assert_eq!(proxy.waiting(0, usize::MAX), Vec::<Bytes>::new(), "it has left");
            assert_eq!(proxy.waiting(1, usize::MAX), [frame(4)]);
        }
        assert!(Proxy::open().waiting(9, usize::MAX).is_empty());
    }

    #[test]
    fn the_bound_asks_once_an_epoch_and_drops_nothing() {
        let mut buffer = EpochBuffer::new(1000);
        (0..100).for_each(|byte| buffer.handle_primary(3, frame(byte)));
        assert!(!buffer.ready());
        assert_eq!(buffer.poll_output(), Some(Output::Diverged { epoch: 3, cause: Cause::BoundReached, flow: None }));
        assert_eq!(buffer.poll_output(), None);
        buffer.checkpoint(3);
        assert_eq!((buffer.stats().released, buffer.stats().currently_held_bytes, buffer.ready()), (100, 0, true));
    }
}
