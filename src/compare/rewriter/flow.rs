//! One connection in two sequence spaces.
//!
//! ```text
//!               guest's SYN-ACK          client's ACK
//!   Accepting ─────────────────▶ ·  ───────────────────┐
//!   (client's SYN)                                     ├─▶ translating ──▶ FIN of both, both acknowledged ─▶ ended
//!   Calling ───────────────────────────────────────────┘                └▶ a reset the guest can believe ─▶ ended
//!   (guest's SYN)                client's SYN-ACK
//!
//!   inherited: guest B has the connection from the state it loaded, in guest A's space; nothing to translate
//! ```
//!
//! Both offsets are guest B's number minus guest A's: of sequence numbers, and of the clock in the timestamps. The
//! client tells both of guest A's numbers with the first frame that answers guest A.
//!
//! *The clock the client was shown never goes back.* Guest B's may be behind guest A's, by what a checkpoint takes; a
//! client drops what seems older than what it has (RFC 7323 5.3). The latest echo names the time the client was
//! shown, and guest B's segments never name an earlier one. Nor does an echo reach guest B of a time that it has
//! not named yet.
//!
//! *Ends* are reckoned in guest B's space alone. (`net/filter-rewriter.c` compares a number of each.) A FIN of the client counts
//! from where the guest has acknowledged, and a reset of it within 64 KiB of that: others can be forged. Whatever the
//! guest says after a reset, other than a reset, takes it back.

use super::segment::{Segment, before};
use crate::clock::Instant;
use crate::compare::packet::Tcp;
use crate::mutant::{self, Mutant};
use std::collections::VecDeque;
use std::time::Duration;

/// A connection that ended is remembered for so long after its last frame: the client's TIME_WAIT, in Linux.
pub(super) const TIME_WAIT: Duration = Duration::from_secs(60);
/// The same for one whose last acknowledgement was not seen: twice the maximum segment lifetime of RFC 9293.
const CLOSING: Duration = Duration::from_secs(240);
/// How far beyond the guest's last acknowledgement a client's reset may be: what a window can be without scaling.
const RESET_WINDOW: u32 = 1 << 16;
/// How far behind the client's echo guest B's clock is taken to be: 70 minutes where it counts milliseconds.
const MAX_LAG_TICKS: u32 = 1 << 22;

/// Guest B's own beginning of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Beginning {
    isn: u32,
    clock: Option<u32>,
}

impl Beginning {
    pub(super) fn of(segment: &Segment) -> Self {
        Self { isn: segment.tcp.seq, clock: segment.timestamps.map(|(own, _)| own) }
    }
}

/// A handshake that is not complete.
#[derive(Clone, Copy, Debug)]
pub(super) enum Handshake {
    /// The client's SYN: its number, how many bytes came with it, and guest B's answer.
    Accepting { client_isn: u32, syn_bytes: u32, answer: Option<Beginning> },
    /// Guest B's SYN.
    Calling(Beginning),
}

impl Handshake {
    /// What a client's SYN begins.
    pub(super) fn accepting(segment: &Segment) -> Self {
        let syn_bytes = segment.tcp.payload.len() as u32;
        Self::Accepting { client_isn: segment.tcp.seq, syn_bytes, answer: None }
    }
}

/// What one side has said of its end.
#[derive(Clone, Copy, Debug, Default)]
struct Fin {
    /// The number behind it.
    end: Option<u32>,
    acked: bool,
}

/// A connection's state.
#[derive(Debug)]
pub(super) struct Flow {
    /// The client's ISN of the present life.
    client_isn: u32,
    /// Guest B's own of the present life, where it was seen.
    own_isn: Option<u32>,
    /// Guest B's sequence numbers minus guest A's.
    offset: u32,
    /// Guest B's clock minus guest A's.
    clock_offset: u32,
    /// The latest time of guest A the client has echoed.
    echoed: Option<u32>,
    /// The latest time of guest B's own that it has named.
    named: Option<u32>,
    handshake: Option<Handshake>,
    /// The client's frames that wait for guest B's answer.
    pub(super) held: VecDeque<Vec<u8>>,
    /// Guest B has this life from the state it loaded: it is in guest A's space, and how it began is not known.
    inherited: bool,
    /// The guest's latest acknowledgement.
    guest_ack: Option<u32>,
    /// Of the client, of the guest.
    fins: [Fin; 2],
    reset: bool,
    /// When a frame of it was last seen.
    pub(super) last: Instant,
}

impl Flow {
    /// A connection that begins, or that guest B has loaded.
    pub(super) fn new(now: Instant, client_isn: u32, handshake: Option<Handshake>) -> Self {
        Self {
            client_isn,
            own_isn: None,
            offset: 0,
            clock_offset: 0,
            echoed: None,
            named: None,
            inherited: handshake.is_none(),
            handshake,
            held: VecDeque::new(),
            guest_ack: None,
            fins: [Fin::default(); 2],
            reset: false,
            last: now,
        }
    }

    /// A connection of which another host has told what differs.
    pub(super) fn carried(now: Instant, offset: u32, clock_offset: u32, echoed: Option<u32>) -> Self {
        Self { offset, clock_offset, echoed, ..Self::new(now, 0, None) }
    }

    /// What [`Self::carried`] is told.
    pub(super) fn numbers(&self) -> (u32, u32, Option<u32>) {
        (self.offset, self.clock_offset, self.echoed)
    }

    /// Whether its life began here, and not in a state that guest B has loaded.
    pub(super) fn has_begun(&self) -> bool {
        self.handshake.is_some() || !self.inherited
    }

    /// Whether anything of it differs between the guests.
    pub(super) fn translates(&self) -> bool {
        self.offset != 0 || self.clock_offset != 0
    }

    /// Whether both sides are done with it.
    pub(super) fn ended(&self) -> bool {
        self.reset || self.fins.iter().all(|fin| fin.end.is_some() && fin.acked)
    }

    /// Whether it may be forgotten to make room: nothing that is still being said depends on it.
    pub(super) fn light(&self) -> bool {
        !self.translates() || self.ended()
    }

    /// Whether a client of a guest that runs alone has anything from it.
    pub(super) fn serves_alone(&self) -> bool {
        self.translates() || self.handshake.is_some() || self.lag().is_some()
    }

    /// How long it is remembered without a frame.
    pub(super) fn linger(&self, idle: Duration) -> Duration {
        let fins = self.fins.iter().filter(|fin| fin.end.is_some()).count();
        if self.ended() || self.light() || (mutant::active(Mutant::ForgetHalfClosed) && fins > 0) {
            return TIME_WAIT;
        }
        if fins == 2 { CLOSING } else { idle }
    }

    /// Whether the client's frame can be the first that answers guest A.
    pub(super) fn completes(&self, segment: &Segment, window: u32) -> bool {
        let ack = segment.has(Tcp::ACK);
        match self.handshake {
            Some(Handshake::Accepting { client_isn, .. }) => {
                let near = segment.tcp.seq.wrapping_sub(client_isn.wrapping_add(1)) < window;
                ack && near && !segment.has(Tcp::RST | Tcp::SYN)
            }
            // A refusal answers guest A as much as a SYN-ACK does.
            Some(Handshake::Calling(_)) => ack && segment.has(Tcp::SYN | Tcp::RST),
            None => false,
        }
    }

    /// Guest B's beginning, once it is known.
    pub(super) fn beginning(&self) -> Option<Beginning> {
        match self.handshake? {
            Handshake::Accepting { answer, .. } => answer,
            Handshake::Calling(own) => Some(own),
        }
    }

    /// Notes guest B's SYN-ACK: its word on what has begun, whatever SYN was seen last. Tells what held frames of
    /// another handshake were dropped.
    pub(super) fn answered(&mut self, segment: &Segment) -> VecDeque<Vec<u8>> {
        if self.begun_by(segment) || (self.inherited && !self.ended()) {
            return VecDeque::new();
        }
        let acked = segment.tcp.ack.wrapping_sub(1);
        let (client_isn, syn_bytes, dropped) = match self.handshake {
            // What came with the SYN may be acknowledged or not.
            Some(Handshake::Accepting { client_isn, syn_bytes, .. }) if acked.wrapping_sub(client_isn) <= syn_bytes => {
                (client_isn, syn_bytes, VecDeque::new())
            }
            _ => (acked, 0, std::mem::take(&mut self.held)),
        };
        let answer = Some(Beginning::of(segment));
        let (held, last) = (std::mem::take(&mut self.held), self.last);
        *self = Self::new(last, client_isn, Some(Handshake::Accepting { client_isn, syn_bytes, answer }));
        (self.held, self.own_isn) = (held, Some(segment.tcp.seq));
        dropped
    }

    /// Whether the guest says again how it began this life.
    pub(super) fn begun_by(&self, segment: &Segment) -> bool {
        self.own_isn == Some(segment.tcp.seq)
            || matches!(self.handshake, Some(Handshake::Calling(own)) if own.isn == segment.tcp.seq)
    }

    /// A client's SYN: it begins nothing before guest B accepts it, since anyone can forge one. Tells the held frames
    /// of another handshake, which are dropped.
    pub(super) fn called(&mut self, segment: &Segment) -> VecDeque<Vec<u8>> {
        let isn = segment.tcp.seq;
        let again = match self.handshake {
            // Both open at once, or guest B has committed itself already.
            Some(Handshake::Calling(_)) => true,
            Some(Handshake::Accepting { client_isn, answer, .. }) => {
                client_isn == isn || (answer.is_some() && !self.reset)
            }
            None => self.client_isn == isn && !(self.inherited && self.ended()),
        };
        if again {
            return VecDeque::new();
        }
        self.handshake = Some(Handshake::accepting(segment));
        std::mem::take(&mut self.held)
    }

    /// Both beginnings are known: `first` is the client's first frame that answers guest A, whose ISN is one below what it
    /// acknowledges.
    pub(super) fn establish(&mut self, own: Beginning, first: &Segment) {
        if let Some(Handshake::Accepting { client_isn, .. }) = self.handshake {
            self.client_isn = client_isn;
        } else if first.has(Tcp::SYN) {
            self.client_isn = first.tcp.seq;
        }
        self.offset = own.isn.wrapping_sub(first.tcp.ack.wrapping_sub(1));
        let clocks = own.clock.zip(first.timestamps);
        self.clock_offset = clocks.map_or(0, |(clock, (_, echo))| clock.wrapping_sub(echo));
        (self.own_isn, self.named, self.echoed) = (Some(own.isn), own.clock, None);
        (self.handshake, self.inherited) = (None, false);
        (self.fins, self.reset, self.guest_ack) = ([Fin::default(); 2], false, None);
    }

    /// Whether what guest B says shows that it is in the midst of an older life, be it one it loaded, and that the client's SYN
    /// has begun nothing. That may have been no more than a late copy of the one that began that life.
    pub(super) fn refused(&mut self, segment: &Segment) -> bool {
        let Some(Handshake::Accepting { client_isn, answer: None, .. }) = self.handshake else { return false };
        let over = self.fins.iter().all(|fin| fin.end.is_some()) || self.reset;
        if over || segment.has(Tcp::SYN | Tcp::RST) {
            return false;
        }
        self.inherited |= client_isn == self.client_isn;
        self.handshake = None;
        true
    }

    /// Moves what a client says into guest B's space.
    pub(super) fn inbound(&mut self, segment: &mut Segment, frame: &mut [u8]) {
        segment.move_acks(frame, self.offset);
        if segment.has(Tcp::ACK)
            && let Some((_, echo)) = segment.timestamps
        {
            if self.echoed.is_none_or(|latest| before(latest, echo)) {
                self.echoed = Some(echo);
            }
            let moved = echo.wrapping_add(self.clock_offset);
            segment.set_echo(frame, self.named.filter(|named| before(*named, moved)).unwrap_or(moved));
        }
        if segment.has(Tcp::ACK) {
            self.acknowledge(1, segment.tcp.ack);
        }
        let ahead = self.guest_ack.map(|ack| segment.end().wrapping_sub(ack));
        if segment.has(Tcp::RST) && self.guest_ack.is_none_or(|ack| segment.tcp.seq.wrapping_sub(ack) < RESET_WINDOW) {
            self.reset = true;
        } else if segment.has(Tcp::FIN) && ahead.is_none_or(|ahead| (ahead as i32) > 0) {
            self.fins[0] = Fin { end: Some(segment.end()), acked: false };
        }
    }

    /// Moves what guest B says into guest A's space.
    pub(super) fn outbound(&mut self, segment: &mut Segment, frame: &mut [u8]) {
        self.reset = segment.has(Tcp::RST);
        if segment.has(Tcp::ACK) && !self.reset {
            self.guest_ack = Some(segment.tcp.ack);
            self.acknowledge(0, segment.tcp.ack);
        }
        if segment.has(Tcp::FIN) && self.fins[1].end != Some(segment.end()) {
            self.fins[1] = Fin { end: Some(segment.end()), acked: false };
        }
        segment.set_seq(frame, segment.tcp.seq.wrapping_sub(self.offset));
        if let Some((clock, _)) = segment.timestamps {
            if self.named.is_none_or(|named| before(named, clock)) {
                self.named = Some(clock);
            }
            let lag = self.lag_of(clock);
            segment.set_clock(frame, clock.wrapping_sub(self.clock_offset).wrapping_add(lag));
        }
    }

    /// How far behind what the client was shown guest B's clock was when it last spoke.
    fn lag(&self) -> Option<u32> {
        self.named.map_or(self.echoed.map(|_| 0), |named| Some(self.lag_of(named)).filter(|lag| *lag > 0))
    }

    fn lag_of(&self, clock: u32) -> u32 {
        let shown = clock.wrapping_sub(self.clock_offset);
        let lag = self.echoed.map_or(0, |echoed| echoed.wrapping_sub(shown));
        if lag > MAX_LAG_TICKS || mutant::active(Mutant::ClockGoesBack) { 0 } else { lag }
    }

    fn acknowledge(&mut self, side: usize, ack: u32) {
        let fin = &mut self.fins[side];
        fin.acked |= fin.end.is_some_and(|end| !before(ack, end));
    }
}
