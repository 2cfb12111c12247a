//! Both guests' frames at once, when they say the same: nothing is queued to be taken out again at once.
//!
//! ```text
//!   A ─┬─▶ alike? ── yes ─▶ A leaves              as handle_primary(A), handle_secondary(B) would have it
//!   B ─┘          └─ no ──▶ A back to the caller, and nothing has been done
//! ```
//!
//! This is how two guests in lock-step mostly are: a segment in the middle of a connection, of which nothing else waits. All
//! else, whatever it is, goes the long way. The trap is a second opinion: what is decided here must be what the long way
//! decides, and a property test holds one against the other.

use super::{Comparator, cost_bytes, said};
use crate::compare::packet::Packet;
use bytes::Bytes;

impl Comparator {
    /// Takes a frame that the primary emitted in `epoch` and one of the secondary's of the same epoch, if they say the same and
    /// nothing is in the way: the primary's leaves then. If not it comes back, for [`Comparator::handle_primary`], and
    /// the other one is for [`Comparator::handle_secondary`].
    pub fn handle_pair(&mut self, epoch: u64, primary: Bytes, secondary: &Bytes) -> Option<Bytes> {
        if epoch != self.epoch || self.buffers() || self.is_full_with(&primary, secondary) {
            return Some(primary);
        }
        let parse = |frame| match Packet::parse_behind(frame, self.config.vnet_header_bytes) {
            Packet::Ip(ip) => Some(said(ip, frame)),
            _ => None,
        };
        let Some((key, ours)) = parse(&primary) else { return Some(primary) };
        // Mostly they are the same to the last byte, and need not be taken apart twice.
        let twins = primary == *secondary;
        let other = if twins { None } else { parse(secondary) };
        let theirs = match &other {
            None if twins => &ours,
            Some((other_key, theirs)) if *other_key == key => theirs,
            _ => return Some(primary),
        };
        if !ours.is_like(theirs) {
            return Some(primary);
        }
        let Some(at) = self.flows.find(key, &ours) else { return Some(primary) };
        let Some(flow) = self.flows.get_mut(at) else { return Some(primary) };
        let bytes = if twins { None } else { Some((&primary[..], &secondary[..])) };
        if !flow.pair(&ours, theirs, bytes) {
            return Some(primary);
        }
        flow.record.compare(&primary);
        self.flows.settle(at);
        self.primary_epoch = self.primary_epoch.max(epoch);
        self.stats.secondary += 1;
        self.stats.compared += 1;
        self.release(primary);
        None
    }

    /// Whether either frame would reach a bound by itself.
    fn is_full_with(&self, primary: &Bytes, secondary: &Bytes) -> bool {
        let (ours, theirs) = (cost_bytes(primary), cost_bytes(secondary));
        let (config, stats) = (&self.config, &self.stats);
        stats.currently_held_bytes + ours >= config.max_queue_bytes
            || stats.currently_secondary_bytes + theirs > config.max_queue_bytes
            || ours.max(theirs) > config.max_flow_bytes
    }
}

#[cfg(test)]
mod tests;
