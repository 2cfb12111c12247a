//! A flow: what both guests said in it and have not had explained, and its record.
//!
//! ```text
//!             said by A · said by B                    differs · reused
//!   following ─────────────────────▶ following        ─────────────────▶ stuck ── checkpoint ──▶ following
//! ```
//!
//! A flow that is stuck lets nothing leave before the next checkpoint. Others go on: what leaves in them is explained by
//! guest B's present state, whatever it said elsewhere, and a client that has been shown nothing of the difference
//! cannot tell.

use super::compare::Cause;
use super::datagrams::{Announcements, Datagrams};
use super::key::FlowKey;
use super::packet::Tcp;
use super::record::Record;
use super::tcp::TcpFlow;
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use bytes::Bytes;
use std::ops::Range;

/// What holding a frame costs beside its bytes: counted, so that tiny frames cannot hide.
pub const FRAME_OVERHEAD_BYTES: usize = 128;

/// What a packet says, behind its flow's key. Ranges are offsets in its bytes.
#[derive(Debug)]
pub(super) enum Said {
    /// A TCP segment.
    Segment(Tcp),
    /// The payload of a datagram.
    Datagram(Range<usize>),
    /// What the key says already.
    Identity,
}

impl Said {
    /// Whether two guests may have said the same, as far as headers tell: of a connection, in the middle of it.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Segment(ours), Self::Segment(theirs)) => ours.is_like(theirs),
            (Self::Datagram(_), Self::Datagram(_)) => true,
            _ => false,
        }
    }
}

#[derive(Debug)]
enum Kind {
    Tcp(Box<TcpFlow>),
    Datagrams(Datagrams),
    Identity(Announcements),
}

/// A flow's state.
#[derive(Debug)]
pub(super) struct Connection {
    /// Its name.
    pub(super) key: FlowKey,
    kind: Kind,
    /// Frames of the primary that wait.
    pub(super) held: usize,
    /// What they cost.
    pub(super) held_bytes: usize,
    /// The flow cannot be compared before the next checkpoint.
    stuck: bool,
    /// The flow was used in this epoch.
    pub(super) touched: bool,
    /// What the table's ageing queue says about this flow.
    pub(super) queued: Option<Instant>,
    /// What happened to it so far.
    pub(super) record: Record,
}

impl Connection {
    /// The empty state of a flow in which such things are said.
    pub(super) fn new(key: FlowKey, said: &Said) -> Self {
        let kind = match said {
            Said::Segment(_) => Kind::Tcp(Box::default()),
            Said::Datagram(_) => Kind::Datagrams(Datagrams::new(key.ignored())),
            Said::Identity => Kind::Identity(Announcements::default()),
        };
        let record = Record::default();
        Self { key, kind, held: 0, held_bytes: 0, stuck: false, touched: false, queued: None, record }
    }

    /// Lets nothing leave before the next checkpoint.
    pub(super) fn stick(&mut self) {
        self.stuck = true;
    }

    /// Queues what the primary said in the frame at `place`, with its bytes, and judges. What leaves is pushed to `out`.
    pub(super) fn primary(&mut self, place: u32, said: &Said, bytes: &Bytes, out: &mut Vec<u32>) -> Result<(), Cause> {
        let verdict = match (&mut self.kind, said) {
            (Kind::Tcp(flow), Said::Segment(tcp)) => {
                // A flow that is stuck still learns what will have been shown when the checkpoint lets it go.
                let one_life = flow.push_primary(place, tcp, bytes);
                if self.stuck { Ok(()) } else { one_life.and_then(|()| flow.drain(out)) }
            }
            (Kind::Datagrams(flow), Said::Datagram(payload)) if !self.stuck => {
                flow.push_primary(place, bytes.slice(payload.clone()), out)
            }
            (Kind::Identity(flow), Said::Identity) => {
                flow.push_primary(place, out);
                Ok(())
            }
            _ => Ok(()),
        };
        self.settle(verdict)
    }

    /// Takes what the secondary said and judges, as [`Connection::primary`] does.
    pub(super) fn secondary(
        &mut self,
        now: Instant,
        said: &Said,
        bytes: &Bytes,
        out: &mut Vec<u32>,
    ) -> Result<(), Cause> {
        if self.stuck {
            return Ok(());
        }
        let verdict = match (&mut self.kind, said) {
            (Kind::Tcp(flow), Said::Segment(tcp)) => {
                flow.push_secondary(now, tcp, bytes).and_then(|()| flow.drain(out))
            }
            (Kind::Datagrams(flow), Said::Datagram(payload)) => flow.push_secondary(now, &bytes[payload.clone()], out),
            (Kind::Identity(flow), Said::Identity) => {
                flow.push_secondary(out);
                Ok(())
            }
            _ => Ok(()),
        };
        self.settle(verdict)
    }

    /// Takes what both guests said, which is alike, and lies in these bytes; without bytes it is the same. `false`: something
    /// waits or is not the same, and nothing was taken.
    pub(super) fn pair(&mut self, ours: &Said, theirs: &Said, bytes: Option<(&[u8], &[u8])>) -> bool {
        match (&mut self.kind, ours, theirs) {
            _ if self.stuck || self.held > 0 => false,
            (Kind::Tcp(flow), Said::Segment(ours), Said::Segment(theirs)) => flow.pair(ours, theirs, bytes),
            (Kind::Datagrams(flow), Said::Datagram(ours), Said::Datagram(theirs)) => flow
                .pair(bytes.map(|(our_bytes, their_bytes)| (&our_bytes[ours.clone()], &their_bytes[theirs.clone()]))),
            _ => false,
        }
    }

    /// What a client is to be told when the secondary says this: `tcp.rs`. Of a flow that is stuck nothing is known of it.
    pub(super) fn told_too_little(&self, said: &Said) -> Option<(u32, u32, u32)> {
        match (&self.kind, said) {
            (Kind::Tcp(flow), Said::Segment(tcp)) => flow.told_too_little(tcp),
            _ => None,
        }
    }

    /// The client has been told.
    pub(super) fn tell(&mut self, ack: u32) {
        if let Kind::Tcp(flow) = &mut self.kind {
            flow.tell(ack);
        }
    }

    fn settle(&mut self, verdict: Result<(), Cause>) -> Result<(), Cause> {
        if verdict.is_err() && !mutant::active(Mutant::LeaveAfterDivergence) {
            self.stuck = true;
            match &mut self.kind {
                Kind::Tcp(flow) => flow.forget_secondary(),
                Kind::Datagrams(flow) => flow.clear(),
                Kind::Identity(_) => {}
            }
        }
        verdict
    }

    /// Begins the next epoch. `false`: nothing is worth keeping.
    pub(super) fn checkpoint(&mut self) -> bool {
        (self.held, self.held_bytes) = (0, 0);
        (self.stuck, self.touched, self.queued) = (false, false, None);
        let known = match &mut self.kind {
            Kind::Tcp(flow) => flow.checkpoint(),
            Kind::Identity(flow) => flow.checkpoint(),
            Kind::Datagrams(flow) => {
                flow.clear();
                false
            }
        };
        known || self.record.diverged > 0
    }

    /// Whether forgetting the flow loses nothing that was said in this epoch. What the network has been shown may be
    /// forgotten: it must be explained again.
    pub(super) fn forgettable(&self) -> bool {
        !self.touched || (self.held == 0 && !self.stuck && matches!(&self.kind, Kind::Datagrams(flow) if flow.idle()))
    }

    /// Whether the flow was one transaction, and that is over.
    pub(super) fn over(&self) -> bool {
        self.key.transaction != 0 && self.touched && self.record.diverged == 0 && self.forgettable()
    }

    /// What the secondary's unmatched packets cost.
    pub(super) fn secondary_bytes(&self) -> usize {
        match &self.kind {
            Kind::Tcp(flow) => flow.secondary_bytes(),
            Kind::Datagrams(flow) => flow.spare_bytes(),
            Kind::Identity(_) => 0,
        }
    }

    /// When the oldest thing arrived that only the secondary said.
    pub(super) fn secondary_since(&self) -> Option<Instant> {
        match &self.kind {
            Kind::Tcp(flow) => flow.secondary_since(),
            Kind::Datagrams(flow) => flow.spare_since(),
            Kind::Identity(_) => None,
        }
    }
}
