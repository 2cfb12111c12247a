//! A flow: its key, and the queues of both guests.
//!
//! The table that holds flows is a `BTreeMap`: no hash to flood, and the same order in every run of the simulator.
//! (`net/colo.c` hashes with a fixed seed and wipes the table, queued packets included, at 16,385 flows.)
//!
//! Datagrams (UDP, ICMP) are whole or nothing: one leaves when the secondary's queue holds an equal one, wherever
//! it stands. A partner that is late is waited for; the n-th datagram of one guest against a different n-th of the
//! other is a difference at once. ICMP is keyed by peer and echo identifier, so two pings are two flows.

use super::compare::Cause;
use super::packet::Transport;
use super::tcp::{TcpFlow, Verdict};
use crate::clock::Instant;
use bytes::Bytes;
use std::collections::VecDeque;

/// What holding a frame costs beside its bytes: counted, so that tiny frames cannot hide.
pub const FRAME_OVERHEAD_BYTES: usize = 128;

/// A datagram of the primary that waits: ordinal, serial number, payload.
type Held = (u64, u64, Bytes);
/// A datagram of the secondary that no one asked for yet: ordinal, arrival, payload.
type Spare = (u64, Instant, Bytes);

/// The state of one UDP or ICMP flow within an epoch.
#[derive(Debug, Default)]
struct Datagrams {
    held: VecDeque<Held>,
    spare: VecDeque<Spare>,
    spare_bytes: usize,
    sent: [u64; 2],
}

impl Datagrams {
    fn push_primary(&mut self, serial: u64, payload: Bytes) -> Verdict {
        let ordinal = self.sent[0];
        self.sent[0] += 1;
        if let Some(at) = self.spare.iter().position(|spare| spare.2 == payload) {
            if let Some((_, _, found)) = self.spare.remove(at) {
                self.spare_bytes -= found.len() + FRAME_OVERHEAD_BYTES;
            }
            return Verdict::Release(serial);
        }
        self.held.push_back((ordinal, serial, payload));
        self.heads()
    }

    fn push_secondary(&mut self, now: Instant, payload: &[u8]) -> Verdict {
        let ordinal = self.sent[1];
        self.sent[1] += 1;
        if let Some(at) = self.held.iter().position(|held| held.2 == payload) {
            return self.held.remove(at).map_or(Verdict::Wait, |(_, serial, _)| Verdict::Release(serial));
        }
        self.spare_bytes += payload.len() + FRAME_OVERHEAD_BYTES;
        self.spare.push_back((ordinal, now, Bytes::copy_from_slice(payload)));
        self.heads()
    }

    /// Two first datagrams left over with the same number never meet their equal.
    fn heads(&self) -> Verdict {
        match (self.held.front(), self.spare.front()) {
            (Some(held), Some(spare)) if held.0 == spare.0 => Verdict::Differs,
            _ => Verdict::Wait,
        }
    }
}

#[derive(Debug)]
enum Kind {
    Tcp(Box<TcpFlow>),
    Datagrams(Datagrams),
}

/// A flow's state.
#[derive(Debug)]
pub(super) struct Connection {
    kind: Kind,
    /// Cost of the primary's frames that wait.
    pub(super) held_bytes: usize,
    /// The flow cannot be compared before the next checkpoint.
    pub(super) stuck: bool,
    /// What the comparator's ageing index says about this flow.
    pub(super) indexed_since: Option<Instant>,
}

impl Connection {
    /// The empty state of a flow whose packets look like `transport`.
    pub(super) fn new(transport: &Transport) -> Self {
        let kind = match transport {
            Transport::Tcp(_) => Kind::Tcp(Box::default()),
            _ => Kind::Datagrams(Datagrams::default()),
        };
        Self { kind, held_bytes: 0, stuck: false, indexed_since: None }
    }

    /// Queues a packet of the primary and judges. Serial numbers to release are pushed to `out`.
    pub(super) fn primary(
        &mut self,
        serial: u64,
        transport: &Transport,
        frame: &Bytes,
        out: &mut Vec<u64>,
    ) -> Result<(), Cause> {
        let verdict = match (&mut self.kind, transport) {
            (Kind::Tcp(flow), Transport::Tcp(tcp)) => {
                // A flow that is stuck still learns what will have been shown when the checkpoint lets it go.
                let one_life = flow.push_primary(serial, tcp, frame);
                if self.stuck { Ok(()) } else { one_life.and_then(|()| drain(flow, out)) }
            }
            (
                Kind::Datagrams(flow),
                Transport::Udp { payload: range, .. }
                | Transport::Icmp { message: range, .. }
                | Transport::Other { payload: range, .. },
            ) if !self.stuck => collect(flow.push_primary(serial, frame.slice(range.clone())), out),
            _ => Ok(()),
        };
        self.settle(verdict)
    }

    /// Takes a packet of the secondary and judges, as [`Connection::primary`] does.
    pub(super) fn secondary(
        &mut self,
        now: Instant,
        transport: &Transport,
        frame: &[u8],
        out: &mut Vec<u64>,
    ) -> Result<(), Cause> {
        if self.stuck {
            return Ok(());
        }
        let verdict = match (&mut self.kind, transport) {
            (Kind::Tcp(flow), Transport::Tcp(tcp)) => {
                flow.push_secondary(now, tcp, frame).and_then(|()| drain(flow, out))
            }
            (
                Kind::Datagrams(flow),
                Transport::Udp { payload: range, .. }
                | Transport::Icmp { message: range, .. }
                | Transport::Other { payload: range, .. },
            ) => collect(flow.push_secondary(now, frame.get(range.clone()).unwrap_or_default()), out),
            _ => Ok(()),
        };
        self.settle(verdict)
    }

    fn settle(&mut self, verdict: Result<(), Cause>) -> Result<(), Cause> {
        if verdict.is_err() {
            self.stuck = true;
            match &mut self.kind {
                Kind::Tcp(flow) => flow.forget_secondary(),
                Kind::Datagrams(flow) => *flow = Datagrams::default(),
            }
        }
        verdict
    }

    /// Begins the next epoch. `false`: nothing is worth keeping.
    pub(super) fn checkpoint(&mut self) -> bool {
        (self.held_bytes, self.stuck, self.indexed_since) = (0, false, None);
        match &mut self.kind {
            Kind::Tcp(flow) => flow.checkpoint(),
            Kind::Datagrams(_) => false,
        }
    }

    /// Whether the flow is as good as unknown: nothing waits and nothing is remembered.
    pub(super) fn idle(&self) -> bool {
        match &self.kind {
            Kind::Tcp(_) => false,
            Kind::Datagrams(flow) => {
                !self.stuck && flow.held.is_empty() && flow.spare.is_empty() && flow.sent[0] == flow.sent[1]
            }
        }
    }

    /// Whether the primary used the flow in this epoch.
    pub(super) fn active(&self) -> bool {
        matches!(&self.kind, Kind::Tcp(flow) if flow.spoke())
    }

    /// What the secondary's unmatched packets cost.
    pub(super) fn secondary_bytes(&self) -> usize {
        match &self.kind {
            Kind::Tcp(flow) => flow.secondary_bytes(),
            Kind::Datagrams(flow) => flow.spare_bytes,
        }
    }

    /// When the oldest thing arrived that only the secondary said.
    pub(super) fn secondary_since(&self) -> Option<Instant> {
        match &self.kind {
            Kind::Tcp(flow) => flow.secondary_since(),
            Kind::Datagrams(flow) => flow.spare.front().map(|spare| spare.1),
        }
    }
}

fn collect(verdict: Verdict, out: &mut Vec<u64>) -> Result<(), Cause> {
    match verdict {
        Verdict::Release(serial) => out.push(serial),
        Verdict::Wait => {}
        Verdict::Differs => return Err(Cause::PayloadDiffers),
    }
    Ok(())
}

fn drain(flow: &mut TcpFlow, out: &mut Vec<u64>) -> Result<(), Cause> {
    loop {
        match flow.judge() {
            Verdict::Wait => return Ok(()),
            verdict => collect(verdict, out)?,
        }
    }
}
