//! The heartbeat: knowing that the peer is there, and that the peer knows we are.
//!
//! Both sides send a beat every `interval` on a connection of their own, so that a large checkpoint on the
//! stream cannot delay one, and answer a new one at once. A beat carries its own number, the highest number heard
//! from the peer (the echo), the sender's generation and its word:
//!
//! ```text
//!   be64 sequence | be64 echo | be64 generation | be64 word
//!
//!   word   0 none      the pair is one
//!          1 dismissal P → S: the guest is to be protected no longer; the secondary gives it up
//!          2 given up  S → P: it is given up for good, and will never be claimed from here
//!          3 leaving   S → P: this host is about to end; dismiss it, so that nobody has to be asked who goes on
//! ```
//!
//! The words that end a protection without a failover travel here and not on the stream, whose seven messages are
//! QEMU's and which may be behind gigabytes of a first copy. A word is said with every beat from then on: it is
//! never taken back.
//!
//! Two deadlines follow, and either one passing means the peer is lost:
//!
//! - *heard*: nothing arrived for `misses × interval`;
//! - *lease*: no echo of a beat that we **sent** within the last `misses × interval`.
//!
//! The trap is in the second. A primary stopped by `SIGSTOP` wakes with beats in its socket buffer that the
//! secondary sent before it took over; they are news to the reader and say nothing about now. What the echo
//! proves is dated by our own clock at *sending*: the peer, who waits `misses × interval` from *receiving* that
//! beat, cannot have given us up before the lease ends. So a side whose lease is over stops acting first.

use crate::clock::Instant;
use bytes::{BufMut, BytesMut};
use std::collections::VecDeque;
use std::time::Duration;

/// Bytes of a beat on the wire.
pub const BEAT_BYTES: usize = 32;

/// Time between beats by default, in milliseconds.
pub const INTERVAL_DEFAULT_MS: u64 = 100;

/// Missed beats after which the peer is lost, by default.
pub const MISSES_DEFAULT: u32 = 3;

/// What a side says with its beats.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Word {
    /// Nothing: the pair is one.
    #[default]
    None = 0,
    /// The primary ends the protection.
    Dismissal = 1,
    /// The secondary has given the guest up for good.
    GivenUp = 2,
    /// The secondary is about to end, and asks to be dismissed.
    Leaving = 3,
}

impl Word {
    /// Which of two words came later: one side says dismissal, the other leaving and then given up. Beats may overtake
    /// each other in an answer.
    fn rank(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Dismissal | Self::Leaving => 1,
            Self::GivenUp => 2,
        }
    }

    /// What nobody knows is nothing said.
    fn of(number: u64) -> Self {
        match number {
            1 => Self::Dismissal,
            2 => Self::GivenUp,
            3 => Self::Leaving,
            _ => Self::None,
        }
    }
}

/// One beat.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beat {
    /// Counts the sender's beats from 1.
    pub sequence: u64,
    /// The highest sequence the sender has heard; 0 for none.
    pub echo: u64,
    /// The sender's generation.
    pub generation: u64,
    /// What the sender says.
    pub word: Word,
}

impl Beat {
    /// Appends the beat's bytes.
    pub fn encode(self, out: &mut BytesMut) {
        out.put_u64(self.sequence);
        out.put_u64(self.echo);
        out.put_u64(self.generation);
        out.put_u64(self.word as u64);
    }

    /// Reads a beat.
    #[must_use]
    pub fn decode(bytes: &[u8; BEAT_BYTES]) -> Self {
        let word = |at: usize| bytes[at..at + 8].iter().fold(0_u64, |acc, byte| acc << 8 | u64::from(*byte));
        Self { sequence: word(0), echo: word(8), generation: word(16), word: Word::of(word(24)) }
    }
}

/// Which deadline passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Silence {
    /// Nothing was heard from the peer.
    #[error("no heartbeat from the peer for {0:?}")]
    Unheard(Duration),
    /// The peer is heard, or was, but does not hear us.
    #[error("the peer has not confirmed a heartbeat of ours for {0:?}")]
    Unconfirmed(Duration),
}

/// The heartbeat of one side.
#[derive(Debug)]
pub struct Heartbeat {
    interval: Duration,
    detection: Duration,
    generation: u64,
    sequence: u64,
    echo: u64,
    /// When each unconfirmed beat was sent, oldest first; at most as many as fit into the detection time and one.
    sent: VecDeque<(u64, Instant)>,
    heard_at: Instant,
    confirmed_sent_at: Instant,
    next_beat_at: Instant,
    word: Word,
    heard: Word,
    /// What was heard, until it is asked for.
    fresh: Option<Word>,
}

impl Heartbeat {
    /// Starts at `now`, with a full detection time for the first beat to arrive.
    #[must_use]
    pub fn new(now: Instant, interval: Duration, misses: u32, generation: u64) -> Self {
        Self {
            interval,
            detection: interval * misses,
            generation,
            sequence: 0,
            echo: 0,
            sent: VecDeque::new(),
            heard_at: now,
            confirmed_sent_at: now,
            next_beat_at: now,
            word: Word::None,
            heard: Word::None,
            fresh: None,
        }
    }

    /// Says a word with every beat from now on, the next of which is due at once.
    pub fn say(&mut self, word: Word) {
        self.word = word;
        self.next_beat_at = Instant::ZERO;
    }

    /// The peer's word, once, when it has said one.
    pub fn poll_word(&mut self) -> Option<Word> {
        self.fresh.take()
    }

    /// Takes a beat from the peer, and returns the answer a new one is owed. The answer repeats our last number,
    /// so it is owed nothing itself. A beat of another generation is not the peer's, and is ignored.
    pub fn handle_beat(&mut self, now: Instant, beat: Beat) -> Option<Beat> {
        if beat.generation != self.generation {
            return None;
        }
        self.heard_at = self.heard_at.max(now);
        if beat.word.rank() > self.heard.rank() {
            (self.heard, self.fresh) = (beat.word, Some(beat.word));
        }
        let new = beat.sequence > self.echo;
        self.echo = self.echo.max(beat.sequence);
        while let Some((sequence, sent_at)) = self.sent.front().copied().filter(|(sequence, _)| *sequence <= beat.echo)
        {
            debug_assert!(sequence <= self.sequence);
            self.confirmed_sent_at = self.confirmed_sent_at.max(sent_at);
            self.sent.pop_front();
        }
        new.then(|| self.beat())
    }

    /// The beat to send now, if one is due.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Beat> {
        if now < self.next_beat_at {
            return None;
        }
        self.next_beat_at = now + self.interval;
        self.sequence += 1;
        self.sent.push_back((self.sequence, now));
        while self.sent.len() > 64 {
            self.sent.pop_front();
        }
        Some(self.beat())
    }

    fn beat(&self) -> Beat {
        Beat { sequence: self.sequence, echo: self.echo, generation: self.generation, word: self.word }
    }

    /// When to call [`Self::poll_transmit`] and [`Self::lost`] again.
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        self.next_beat_at.min(self.deadline())
    }

    /// When the peer counts as lost unless something is heard.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.heard_at.min(self.confirmed_sent_at) + self.detection
    }

    /// How long ago the peer was heard, and how long ago the last beat was sent that it confirmed.
    #[must_use]
    pub fn silence(&self, now: Instant) -> (Duration, Duration) {
        (now - self.heard_at, now - self.confirmed_sent_at)
    }

    /// How long either may be.
    #[must_use]
    pub fn detection(&self) -> Duration {
        self.detection
    }

    /// From when on the peer is suspected of being gone, unless something is heard: half of the time after which it is lost.
    #[must_use]
    pub fn suspected_at(&self) -> Instant {
        self.heard_at + self.detection / 2
    }

    /// Whether the peer is lost at `now`.
    #[must_use]
    pub fn lost(&self, now: Instant) -> Option<Silence> {
        if now >= self.heard_at + self.detection {
            Some(Silence::Unheard(now - self.heard_at))
        } else if now >= self.confirmed_sent_at + self.detection {
            Some(Silence::Unconfirmed(now - self.confirmed_sent_at))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(100);

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    fn pair() -> (Heartbeat, Heartbeat) {
        (Heartbeat::new(at(0), STEP, 3, 1), Heartbeat::new(at(0), STEP, 3, 1))
    }

    /// Exchanges beats at `ms`; a flag cuts a direction.
    fn exchange(a: &mut Heartbeat, b: &mut Heartbeat, ms: u64, a_to_b: bool, b_to_a: bool) {
        let mut flying: VecDeque<_> = a.poll_transmit(at(ms)).map(|beat| (true, beat)).into_iter().collect();
        flying.extend(b.poll_transmit(at(ms)).map(|beat| (false, beat)));
        let mut count = 0;
        while let Some((to_b, beat)) = flying.pop_front() {
            let answer = match to_b {
                true if a_to_b => b.handle_beat(at(ms), beat),
                false if b_to_a => a.handle_beat(at(ms), beat),
                _ => None,
            };
            flying.extend(answer.map(|beat| (!to_b, beat)));
            count += 1;
            assert!(count <= 4, "answers are not answered");
        }
    }

    #[test]
    fn a_beating_pair_is_never_lost() {
        let (mut a, mut b) = pair();
        for ms in (0..10_000).step_by(100) {
            exchange(&mut a, &mut b, ms, true, true);
            assert_eq!((a.lost(at(ms)), b.lost(at(ms))), (None, None), "at {ms} ms");
        }
    }

    #[test]
    fn a_silent_peer_is_suspected_before_it_is_lost() {
        let (mut a, mut b) = pair();
        exchange(&mut a, &mut b, 0, true, true);
        exchange(&mut a, &mut b, 100, true, true);
        assert_eq!((a.suspected_at(), a.lost(at(399))), (at(250), None));
        exchange(&mut a, &mut b, 399, true, true);
        assert_eq!(a.suspected_at(), at(549));
    }

    #[test]
    fn a_dead_peer_is_lost_after_three_missed_beats() {
        let (mut a, mut b) = pair();
        for ms in (0..=1000).step_by(100) {
            exchange(&mut a, &mut b, ms, true, true);
        }
        assert_eq!(a.lost(at(1299)), None);
        assert_eq!(a.lost(at(1300)), Some(Silence::Unheard(3 * STEP)));
    }

    #[test]
    fn a_one_way_link_is_lost_on_both_sides() {
        let (mut a, mut b) = pair();
        for ms in (0..=1000).step_by(100) {
            exchange(&mut a, &mut b, ms, true, true);
        }
        for ms in (1100..=1500).step_by(100) {
            exchange(&mut a, &mut b, ms, false, true);
        }
        assert!(matches!(a.lost(at(1500)), Some(Silence::Unconfirmed(_))), "heard, but not hearing");
        assert!(matches!(b.lost(at(1500)), Some(Silence::Unheard(_))));
    }

    #[test]
    fn beats_left_in_a_socket_buffer_do_not_renew_a_sleepers_lease() {
        let (mut primary, mut secondary) = pair();
        for ms in (0..=1000).step_by(100) {
            exchange(&mut primary, &mut secondary, ms, true, true);
        }
        // The primary is stopped; the secondary goes on beating until it gives up at 1300.
        let buffered: Vec<_> = (1100..1300).step_by(100).filter_map(|ms| secondary.poll_transmit(at(ms))).collect();
        assert_eq!(buffered.len(), 2);
        assert!(secondary.lost(at(1300)).is_some());
        // It wakes at 9000 and reads them all before it looks at its clock.
        for beat in buffered {
            primary.handle_beat(at(9000), beat);
        }
        assert!(matches!(primary.lost(at(9000)), Some(Silence::Unconfirmed(_))));
    }

    #[test]
    fn whoever_is_waited_for_stops_first() {
        // However long a beat and its echo travel, the sender's lease ends before the hearer gives it up.
        for travel_ms in [0, 20, 90, 150] {
            let (mut a, mut b) = pair();
            let mut flying: Vec<(u64, bool, Beat)> = Vec::new();
            for ms in 0..=1000 {
                if let Some(beat) = a.poll_transmit(at(ms)) {
                    flying.push((ms + travel_ms, true, beat));
                }
                if let Some(beat) = b.poll_transmit(at(ms)) {
                    flying.push((ms + travel_ms, false, beat));
                }
                let due: Vec<_> = flying.extract_if(.., |(due, ..)| *due <= ms).collect();
                for (_, to_b, beat) in due {
                    let answer = if to_b { b.handle_beat(at(ms), beat) } else { a.handle_beat(at(ms), beat) };
                    flying.extend(answer.map(|beat| (ms + travel_ms, !to_b, beat)));
                }
            }
            let a_stops = (1000..5000).find(|ms| a.lost(at(*ms)).is_some());
            let b_gives_up = (1000..5000).find(|ms| b.lost(at(*ms)).is_some_and(|s| matches!(s, Silence::Unheard(_))));
            assert!(a_stops <= b_gives_up, "{travel_ms}: {a_stops:?} {b_gives_up:?}");
        }
    }

    #[test]
    fn beats_of_another_generation_are_not_the_peers() {
        let (mut a, _) = pair();
        a.poll_transmit(at(0));
        a.handle_beat(at(200), Beat { sequence: 1, echo: 1, generation: 2, word: Word::Dismissal });
        assert!(a.lost(at(300)).is_some());
        assert_eq!(a.poll_word(), None, "nor are their words");
    }

    #[test]
    fn a_word_is_said_at_once_and_heard_once() {
        let (mut a, mut b) = pair();
        exchange(&mut a, &mut b, 0, true, true);
        a.say(Word::Dismissal);
        assert_eq!(a.poll_timeout(), Instant::ZERO, "it does not wait for the next beat");
        exchange(&mut a, &mut b, 1, true, true);
        assert_eq!((b.poll_word(), a.poll_word()), (Some(Word::Dismissal), None));
        b.say(Word::GivenUp);
        exchange(&mut a, &mut b, 2, true, true);
        assert_eq!((a.poll_word(), b.poll_word()), (Some(Word::GivenUp), None), "the dismissal is still said");
        exchange(&mut a, &mut b, 200, true, true);
        assert_eq!((a.poll_word(), b.poll_word()), (None, None));
    }

    #[test]
    fn who_leaves_is_heard_and_so_is_what_it_says_after_that() {
        let (mut a, mut b) = pair();
        b.say(Word::Leaving);
        exchange(&mut a, &mut b, 0, true, true);
        assert_eq!(a.poll_word(), Some(Word::Leaving));
        a.say(Word::Dismissal);
        b.say(Word::GivenUp);
        exchange(&mut a, &mut b, 1, true, true);
        assert_eq!((a.poll_word(), b.poll_word()), (Some(Word::GivenUp), Some(Word::Dismissal)));
        a.handle_beat(at(2), Beat { sequence: 1, echo: 0, generation: 1, word: Word::Leaving });
        assert_eq!(a.poll_word(), None, "an old beat says nothing new");
    }

    #[test]
    fn a_beat_is_32_bytes() {
        let beat = Beat { sequence: 1, echo: 0x0203, generation: u64::MAX, word: Word::GivenUp };
        let mut out = BytesMut::new();
        beat.encode(&mut out);
        assert_eq!(out[..16], [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 3]);
        assert_eq!(out[16..], [255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(Beat::decode(out[..].try_into().unwrap()), beat);
        out[31] = 9;
        assert_eq!(Beat::decode(out[..].try_into().unwrap()).word, Word::None, "an unknown word");
    }
}
