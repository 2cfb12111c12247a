//! Digests in the place of payloads, between two proxies of ours: the packet link carries headers and 16 bytes a frame.
//!
//! ```text
//!  secondary                                                          primary
//!  frame ─▶ Summaries::summarize ── number, digest, headers ──▶ Expander::handle_summary
//!             (keeps the frame)                                   the same bytes left guest A ─▶ the frame, made again
//!  Summaries::frame ◀──────────────── number ──────────────────   they differ, or are not there soon: looked into
//!             └────────────────────── number, frame ──────────▶ Expander::handle_frame ─▶ the frame as it was
//! ```
//!
//! The comparator knows nothing of it: whatever reaches it is a frame of guest B, byte for byte. So a digest can only
//! spare bytes, never let one leave: the bytes that it stands for are guest A's own, and only where the digests of both
//! are equal. The digest is BLAKE3 under a key of the session, cut to 128 bits: what a guest would have to forge.
//!
//! Within a flow the order is kept: behind a summary that waits, all else of its flow waits too. TCP segments are looked
//! up by sequence numbers, so that the guests may cut one stream differently; datagrams by their digest.
//!
//! The trap is the deadlock: guest A may not send on before its client acknowledges what the summary holds up. Hence
//! [`LOOK_AFTER`]. On the link both are tagged frames whose epoch has [`MARK`] set; what is dropped at a bound is looked
//! into, or ages, as a frame of guest B that was lost.

use super::connection::FRAME_OVERHEAD_BYTES;
use super::key::FlowKey;
use super::packet::{Ip, Packet, Transport};
use super::wire::MAX_FRAME_BYTES;
use crate::clock::Instant;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

/// Set in the epoch of a message of this kind.
pub const MARK: u64 = 1 << 63;
/// How long a summary waits for guest A to say the same, before its bytes are asked for.
pub const LOOK_AFTER: Duration = Duration::from_millis(5);
/// Payloads below this travel as they are.
const MIN_PAYLOAD_BYTES: usize = 64;
/// Bytes of frames kept for looking into, and of guest A's words and of summaries that wait for each other.
const MAX_KEPT_BYTES: usize = 16 << 20;
/// Flows looked after at once; what is said in others is asked for.
const MAX_FLOWS: usize = 16_384;

const KIND_SUMMARY: u8 = 1;
const KIND_FRAME: u8 = 2;
const KIND_WANTED: u8 = 3;
const NUMBER_BYTES: usize = 8;
const DIGEST_BYTES: usize = 16;

type Digest = [u8; DIGEST_BYTES];

/// The key of a session's digests.
#[derive(Clone, Copy)]
pub struct Key([u8; 32]);

impl Key {
    /// Both hosts know the session's number, and no guest does.
    #[must_use]
    pub fn of_session(session: u64) -> Self {
        Self(blake3::derive_key("xen-colo packet digest 1", &session.to_be_bytes()))
    }

    fn digest<'a>(&self, pieces: impl IntoIterator<Item = &'a [u8]>) -> Digest {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for piece in pieces {
            hasher.update(piece);
        }
        let mut digest = Digest::default();
        hasher.finalize_xof().fill(&mut digest);
        digest
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

/// What a packet's payload is, and where its stream has it.
fn payload(ip: &Ip) -> (Option<u32>, Range<usize>) {
    match &ip.transport {
        Transport::Tcp(tcp) => (Some(tcp.seq), tcp.payload.clone()),
        Transport::Udp { payload, .. }
        | Transport::Icmp { message: payload, .. }
        | Transport::Other { payload, .. } => (None, payload.clone()),
    }
}

/// The secondary's half.
#[derive(Debug)]
pub struct Summaries {
    key: Key,
    next_number: u64,
    kept: VecDeque<(u64, Bytes)>,
    kept_bytes: usize,
    saved_bytes: u64,
}

impl Summaries {
    /// None yet.
    #[must_use]
    pub fn new(key: Key) -> Self {
        Self { key, next_number: 0, kept: VecDeque::new(), kept_bytes: 0, saved_bytes: 0 }
    }

    /// What to send of a frame that the guest emitted in `epoch`: the tag and the message.
    pub fn summarize(&mut self, epoch: u64, frame: Bytes) -> (u64, Bytes) {
        let Packet::Ip(ip) = Packet::parse(&frame) else { return (epoch, frame) };
        let (_, payload) = payload(&ip);
        if payload.len() < MIN_PAYLOAD_BYTES {
            return (epoch, frame);
        }
        let mut message = BytesMut::with_capacity(1 + NUMBER_BYTES + 4 + DIGEST_BYTES + payload.start);
        message.put_u8(KIND_SUMMARY);
        message.put_u64(self.next_number);
        message.put_u32(payload.len() as u32);
        message.put_slice(&self.key.digest([&frame[payload.clone()]]));
        message.put_slice(&frame[..payload.start]);
        self.next_number += 1;
        self.saved_bytes += (frame.len() - message.len().min(frame.len())) as u64;
        self.kept_bytes += frame.len() + FRAME_OVERHEAD_BYTES;
        self.kept.push_back((epoch, frame));
        while self.kept_bytes > MAX_KEPT_BYTES
            && let Some((_, oldest)) = self.kept.pop_front()
        {
            self.kept_bytes -= oldest.len() + FRAME_OVERHEAD_BYTES;
        }
        (epoch | MARK, message.freeze())
    }

    /// The answer to a message of the primary's: the tag and the message. Nothing, if it is none or what it wants is
    /// gone.
    pub fn frame(&mut self, mut wanted: Bytes) -> Option<(u64, Bytes)> {
        if wanted.len() != 1 + NUMBER_BYTES || wanted.get_u8() != KIND_WANTED {
            return None;
        }
        let number = wanted.get_u64();
        let oldest = self.next_number - self.kept.len() as u64;
        let at = usize::try_from(number.checked_sub(oldest)?).ok()?;
        let (epoch, frame) = self.kept.get(at)?;
        let mut message = BytesMut::with_capacity(1 + NUMBER_BYTES + frame.len());
        message.put_u8(KIND_FRAME);
        message.put_u64(number);
        message.put_slice(frame);
        self.saved_bytes = self.saved_bytes.saturating_sub(message.len() as u64);
        Some((epoch | MARK, message.freeze()))
    }

    /// Bytes that did not have to travel.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        self.saved_bytes
    }
}

/// What the primary's half wants done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// A frame of guest B for the comparator.
    Frame {
        /// The epoch in which it was emitted.
        epoch: u64,
        /// The frame.
        frame: Bytes,
    },
    /// A message to the secondary's half, to be sent with [`MARK`] set.
    Ask(Bytes),
}

/// Something guest A said.
#[derive(Debug)]
struct Piece {
    epoch: u64,
    /// Its position, in a stream.
    seq: Option<u32>,
    bytes: Bytes,
    digest: Option<Digest>,
}

impl Piece {
    fn cost_bytes(&self) -> usize {
        self.bytes.len() + FRAME_OVERHEAD_BYTES
    }
}

/// Something guest B said that has not reached the comparator.
#[derive(Debug)]
struct Waiting {
    epoch: u64,
    frame: BytesMut,
    /// The payload's position, in a stream.
    seq: Option<u32>,
    /// Where the payload is in the frame.
    payload: Range<usize>,
    /// What there is of the payload, until it is there.
    summary: Option<Summary>,
}

impl Waiting {
    fn cost_bytes(&self) -> usize {
        self.frame.len() + FRAME_OVERHEAD_BYTES
    }
}

/// What stands for a payload.
#[derive(Debug)]
struct Summary {
    number: u64,
    digest: Digest,
    since: Instant,
    asked: bool,
}

#[derive(Debug, Default)]
struct Flow {
    said: VecDeque<Piece>,
    waiting: VecDeque<Waiting>,
}

/// What was found of a summary.
enum Found {
    Same(Vec<Bytes>),
    Differs,
    NotYet,
}

impl Flow {
    /// What guest A said of `len` bytes at `seq`, if its digest is this one.
    fn find(&mut self, seq: Option<u32>, len: usize, digest: Digest, key: &Key) -> Found {
        let Some(seq) = seq else {
            for piece in self.said.iter_mut().filter(|piece| piece.bytes.len() == len) {
                if *piece.digest.get_or_insert_with(|| key.digest([&piece.bytes[..]])) == digest {
                    return Found::Same(vec![piece.bytes.clone()]);
                }
            }
            return Found::NotYet;
        };
        let (mut slices, mut have) = (Vec::new(), 0_usize);
        // In the order of their arrival, which is nearly always that of the stream.
        for piece in &self.said {
            let skip = seq.wrapping_add(have as u32).wrapping_sub(piece.seq.unwrap_or_default()) as usize;
            if skip < piece.bytes.len() {
                let take = (piece.bytes.len() - skip).min(len - have);
                slices.push(piece.bytes.slice(skip..skip + take));
                have += take;
                if have == len {
                    break;
                }
            }
        }
        match have == len {
            false => Found::NotYet,
            true if key.digest(slices.iter().map(|slice| &slice[..])) == digest => Found::Same(slices),
            true => Found::Differs,
        }
    }

    /// Forgets what guest B has caught up with, and returns what it cost.
    fn forget(&mut self, seq: Option<u32>, bytes: &[u8]) -> usize {
        let mut freed = 0;
        if let Some(seq) = seq {
            let end = seq.wrapping_add(bytes.len() as u32);
            let past = |piece: &Piece| {
                let last = piece.seq.unwrap_or_default().wrapping_add(piece.bytes.len() as u32);
                end.wrapping_sub(last) as i32 >= 0
            };
            while let Some(piece) = self.said.pop_front_if(|piece| past(piece)) {
                freed += piece.cost_bytes();
            }
        } else if let Some(at) = self.said.iter().position(|piece| piece.bytes == bytes) {
            freed += self.said.remove(at).map_or(0, |piece| piece.cost_bytes());
        }
        freed
    }
}

/// The primary's half.
#[derive(Debug)]
pub struct Expander {
    key: Key,
    flows: HashMap<FlowKey, Flow>,
    said_bytes: usize,
    waiting_bytes: usize,
    /// Flows in which a summary began to wait, by when.
    overdue: VecDeque<(Instant, FlowKey)>,
    oldest_epoch: u64,
    outputs: VecDeque<Output>,
    summaries: u64,
    looked_into: u64,
}

impl Expander {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(key: Key) -> Self {
        Self {
            key,
            flows: HashMap::new(),
            said_bytes: 0,
            waiting_bytes: 0,
            overdue: VecDeque::new(),
            oldest_epoch: 0,
            outputs: VecDeque::new(),
            summaries: 0,
            looked_into: 0,
        }
    }

    /// Guest A emitted a frame.
    pub fn handle_primary(&mut self, epoch: u64, frame: &Bytes) {
        let Packet::Ip(ip) = Packet::parse(frame) else { return };
        let (seq, range) = payload(&ip);
        // A stream may be cut elsewhere by the other guest.
        if range.is_empty() || (seq.is_none() && range.len() < MIN_PAYLOAD_BYTES) {
            return;
        }
        let key = FlowKey::of(&ip);
        let piece = Piece { epoch, seq, bytes: frame.slice(range), digest: None };
        if self.said_bytes + piece.cost_bytes() > MAX_KEPT_BYTES {
            // What is forgotten is looked into.
            self.flows.values_mut().for_each(|flow| flow.said.clear());
            self.said_bytes = 0;
        }
        let Some(flow) = self.flow(key) else { return };
        let cost = piece.cost_bytes();
        flow.said.push_back(piece);
        self.said_bytes += cost;
        self.settle(key);
    }

    /// A frame of guest B came as it is.
    pub fn handle_secondary(&mut self, epoch: u64, frame: Bytes) {
        let Packet::Ip(ip) = Packet::parse(&frame) else { return self.put_out(epoch, frame) };
        let key = FlowKey::of(&ip);
        let Some(flow) = self.flows.get_mut(&key) else { return self.put_out(epoch, frame) };
        let (seq, range) = payload(&ip);
        if flow.waiting.is_empty() {
            self.said_bytes -= flow.forget(seq, &frame[range]);
            self.put_out(epoch, frame);
        } else {
            let frame = BytesMut::from(&frame[..]);
            self.wait(key, Waiting { epoch, frame, seq, payload: range, summary: None });
        }
    }

    /// A message of the secondary's half. False: it is none that could be.
    pub fn handle_message(&mut self, now: Instant, tag: u64, mut message: Bytes) -> bool {
        let epoch = tag & !MARK;
        if message.len() < 1 + NUMBER_BYTES {
            return false;
        }
        let (kind, number) = (message.get_u8(), message.get_u64());
        match kind {
            KIND_SUMMARY => self.handle_summary(now, epoch, number, message),
            KIND_FRAME => self.handle_frame(number, &message),
            _ => false,
        }
    }

    /// Asks for what has waited too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((_, key)) = self.overdue.pop_front_if(|(since, _)| *since + LOOK_AFTER <= now) {
            let Some(flow) = self.flows.get_mut(&key) else { continue };
            for summary in flow.waiting.iter_mut().filter_map(|waiting| waiting.summary.as_mut()) {
                if summary.since + LOOK_AFTER <= now && !summary.asked {
                    self.looked_into += 1;
                    self.outputs.push_back(ask(summary));
                }
            }
        }
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.overdue.front().map(|(since, _)| *since + LOOK_AFTER)
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// No frame of an epoch before this one is of use any more.
    pub fn forget_before(&mut self, epoch: u64) {
        if epoch <= self.oldest_epoch {
            return;
        }
        self.oldest_epoch = epoch;
        let (mut said, mut waiting) = (0, 0);
        self.flows.retain(|_, flow| {
            flow.said.retain(|piece| piece.epoch >= epoch);
            flow.waiting.retain(|waiting| waiting.epoch >= epoch);
            said += flow.said.iter().map(Piece::cost_bytes).sum::<usize>();
            waiting += flow.waiting.iter().map(Waiting::cost_bytes).sum::<usize>();
            !flow.said.is_empty() || !flow.waiting.is_empty()
        });
        (self.said_bytes, self.waiting_bytes) = (said, waiting);
        let keys: Vec<_> =
            self.flows.iter().filter(|(_, flow)| !flow.waiting.is_empty()).map(|(key, _)| *key).collect();
        keys.into_iter().for_each(|key| self.settle(key));
    }

    /// Frames that came as digests, and those of them whose bytes had to be asked for.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.summaries, self.looked_into)
    }

    /// A flow, unless there are too many.
    fn flow(&mut self, key: FlowKey) -> Option<&mut Flow> {
        if self.flows.len() >= MAX_FLOWS && !self.flows.contains_key(&key) {
            self.flows.retain(|_, flow| !flow.said.is_empty() || !flow.waiting.is_empty());
            if self.flows.len() >= MAX_FLOWS {
                return None;
            }
        }
        Some(self.flows.entry(key).or_default())
    }

    fn handle_summary(&mut self, now: Instant, epoch: u64, number: u64, mut message: Bytes) -> bool {
        if message.len() < 4 + DIGEST_BYTES {
            return false;
        }
        let payload_bytes = message.get_u32() as usize;
        let mut digest = Digest::default();
        message.copy_to_slice(&mut digest);
        if payload_bytes > MAX_FRAME_BYTES || message.len() + payload_bytes > MAX_FRAME_BYTES {
            return false;
        }
        let range = message.len()..message.len() + payload_bytes;
        let mut frame = BytesMut::zeroed(range.end);
        frame[..range.start].copy_from_slice(&message);
        let Packet::Ip(ip) = Packet::parse(&frame) else { return false };
        let (seq, parsed) = payload(&ip);
        if parsed != range {
            return false;
        }
        self.summaries += 1;
        if epoch < self.oldest_epoch {
            return true;
        }
        let summary = Summary { number, digest, since: now, asked: false };
        let key = FlowKey::of(&ip);
        if self.flow(key).is_none() {
            // A frame of guest B that was lost: guest A's ages, and a checkpoint follows.
            return true;
        }
        self.overdue.push_back((now, key));
        self.wait(key, Waiting { epoch, frame, seq, payload: range, summary: Some(summary) });
        self.settle(key);
        true
    }

    fn handle_frame(&mut self, number: u64, bytes: &Bytes) -> bool {
        let Packet::Ip(ip) = Packet::parse(bytes) else { return false };
        let key = FlowKey::of(&ip);
        let Some(flow) = self.flows.get_mut(&key) else { return true };
        let is_it = |waiting: &&mut Waiting| waiting.summary.as_ref().is_some_and(|it| it.number == number);
        let Some(waiting) = flow.waiting.iter_mut().find(is_it) else { return true };
        if waiting.frame.len() != bytes.len() {
            return false;
        }
        waiting.frame.copy_from_slice(bytes);
        waiting.summary = None;
        self.settle(key);
        true
    }

    fn put_out(&mut self, epoch: u64, frame: Bytes) {
        self.outputs.push_back(Output::Frame { epoch, frame });
    }

    fn wait(&mut self, key: FlowKey, waiting: Waiting) {
        let cost = waiting.cost_bytes();
        if let Some(flow) = self.flows.get_mut(&key)
            && self.waiting_bytes + cost <= MAX_KEPT_BYTES
        {
            self.waiting_bytes += cost;
            flow.waiting.push_back(waiting);
        }
    }

    /// Hands on what is known of the flow, as far as it goes.
    fn settle(&mut self, key: FlowKey) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        while let Some(mut first) = flow.waiting.pop_front() {
            let cost = first.cost_bytes();
            if let Some(summary) = &mut first.summary {
                match flow.find(first.seq, first.payload.len(), summary.digest, &self.key) {
                    Found::Same(slices) => {
                        let mut at = first.payload.start;
                        for slice in slices {
                            first.frame[at..at + slice.len()].copy_from_slice(&slice);
                            at += slice.len();
                        }
                    }
                    found => {
                        if matches!(found, Found::Differs) && !summary.asked {
                            self.looked_into += 1;
                            self.outputs.push_back(ask(summary));
                        }
                        flow.waiting.push_front(first);
                        return;
                    }
                }
            }
            self.waiting_bytes -= cost;
            self.said_bytes -= flow.forget(first.seq, &first.frame[first.payload.clone()]);
            self.outputs.push_back(Output::Frame { epoch: first.epoch, frame: first.frame.freeze() });
        }
    }
}

fn ask(summary: &mut Summary) -> Output {
    summary.asked = true;
    let mut message = BytesMut::with_capacity(1 + NUMBER_BYTES);
    message.put_u8(KIND_WANTED);
    message.put_u64(summary.number);
    Output::Ask(message.freeze())
}

#[cfg(test)]
mod tests;
