//! What a side does that has just become the survivor, for clients that have waited long enough.
//!
//! ```text
//!   take over ─▶ announce the MAC ─▶ say again what was said ─▶ replay what clients said since the last state
//!                 1 + 5 times         by the primary's guest before the last state,     until the guest takes it
//!                                     if it waited for it; in lock-step by this one since
//! ```
//!
//! What clients said comes from two places: the primary sent it along as long as it could, and what clients repeated while
//! it was silent the network may have brought here.
//!
//! Without the last two, a client would have to find out by its own timer, which it has doubled all the while it took
//! to miss the primary. Everything here may reach its receiver twice: TCP knows that, and any network may do it. The
//! trap: a guest with PV drivers takes no frame before it has connected its devices again.

use crate::clock::Instant;
use bytes::Bytes;
use std::collections::VecDeque;
use std::time::Duration;

/// How often a takeover is announced after the first time, and when: QEMU's rounds (`net/announce.c`, 50 ms and then
/// steps of 100 ms). A late frame of the old primary, or a switch that was busy, must not have the last word.
pub(super) const ANNOUNCE_ROUNDS: u32 = 5;
pub(super) const ANNOUNCE_FIRST: Duration = Duration::from_millis(50);
pub(super) const ANNOUNCE_STEP: Duration = Duration::from_millis(100);
/// How long after a takeover frames wait for a guest that does not take them yet. Client stacks have sent them again
/// by then.
const REPLAY_TIME: Duration = Duration::from_secs(10);
/// How often it is tried with a guest that says nothing itself. Seldom: the same processor has the guest's devices to connect, and
/// a guest that has connected its NIC announces itself.
const REPLAY_STEP: Duration = Duration::from_millis(50);
/// Bytes that wait for it.
const REPLAY_MAX_BYTES: usize = 16 << 20;
/// Bytes of the latest frames that are kept of what the guest said, and of what the network brought.
const LATEST_MAX_BYTES: usize = 1 << 20;

/// Gives a frame to the guest; false if it did not take it.
type Takes<'a> = &'a mut dyn FnMut(&[u8]) -> bool;

/// Frames for a guest that has just taken over.
#[derive(Debug, Default)]
pub(super) struct Replay {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    due: Option<Instant>,
    until: Option<Instant>,
}

impl Replay {
    /// The guest has taken over: from now on, and for a while, it may not take frames yet.
    pub(super) fn begin(&mut self, now: Instant) {
        self.until = Some(now + REPLAY_TIME);
    }

    /// When to call [`Self::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// Gives a frame to the guest, behind those that wait. At other times a guest that takes none loses it.
    pub(super) fn give(&mut self, now: Instant, frame: Vec<u8>, takes: Takes<'_>) {
        let waits = self.until.is_some_and(|until| now < until);
        if (self.frames.is_empty() && takes(&frame)) || !waits {
            return;
        }
        if self.bytes + frame.len() <= REPLAY_MAX_BYTES {
            self.bytes += frame.len();
            self.frames.push_back(frame);
            self.due.get_or_insert(now + REPLAY_STEP);
        }
    }

    /// The guest has said something, so it can hear.
    pub(super) fn guest_is_heard(&mut self, now: Instant, takes: Takes<'_>) {
        if self.due.is_some() {
            self.try_again(now, takes);
        }
    }

    /// Tries again, if it is time.
    pub(super) fn handle_timeout(&mut self, now: Instant, takes: Takes<'_>) {
        if self.due.is_some_and(|due| due <= now) {
            self.try_again(now, takes);
        }
    }

    fn try_again(&mut self, now: Instant, takes: Takes<'_>) {
        while let Some(frame) = self.frames.pop_front_if(|frame| takes(frame)) {
            self.bytes -= frame.len();
        }
        if self.until.is_none_or(|until| until <= now) {
            (self.frames, self.bytes) = (VecDeque::new(), 0);
        }
        self.due = (!self.frames.is_empty()).then(|| now + REPLAY_STEP);
    }
}

/// The latest frames of somebody, and when they came.
#[derive(Debug, Default)]
pub(super) struct Latest {
    frames: VecDeque<(Instant, Bytes)>,
    bytes: usize,
}

impl Latest {
    /// Keeps a frame, and forgets the oldest ones for it.
    pub(super) fn keep(&mut self, now: Instant, frame: Bytes) {
        self.bytes += frame.len();
        self.frames.push_back((now, frame));
        while self.bytes > LATEST_MAX_BYTES {
            let Some((_, oldest)) = self.frames.pop_front() else { return };
            self.bytes -= oldest.len();
        }
    }

    /// The frames, oldest first.
    pub(super) fn into_frames(self) -> impl Iterator<Item = Bytes> {
        self.frames.into_iter().map(|(_, frame)| frame)
    }

    /// Those that came after `since`, and not long ago.
    pub(super) fn after(mut self, since: Instant, now: Instant) -> impl Iterator<Item = Bytes> {
        self.frames.retain(|(at, _)| *at > since && *at + REPLAY_TIME > now);
        self.into_frames()
    }
}

/// A RARP "my address is" broadcast, which makes switches send the guest's frames here. It names only the MAC, as
/// QEMU's self-announce does (qemu `net/announce.c`); the guest itself follows with a gratuitous ARP.
pub(super) fn announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([0x80, 0x35, 0, 1, 0x08, 0x00, 6, 4, 0, 3]);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.resize(60, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Instant {
        Instant::ZERO + Duration::from_millis(ms)
    }

    #[test]
    fn a_guest_that_is_heard_is_given_what_waits_at_once_and_in_order() {
        let (mut replay, mut taken) = (Replay::default(), Vec::new());
        replay.begin(ms(0));
        for byte in 0..3 {
            replay.give(ms(1), vec![byte], &mut |_| false);
        }
        assert_eq!(replay.poll_timeout(), Some(ms(1) + REPLAY_STEP));
        replay.handle_timeout(ms(2), &mut |_| panic!("asked before it is time"));
        let mut takes = |frame: &[u8]| {
            taken.push(frame[0]);
            true
        };
        replay.guest_is_heard(ms(3), &mut takes);
        replay.give(ms(4), vec![3], &mut takes);
        assert_eq!(replay.poll_timeout(), None);
        assert_eq!(taken, [0, 1, 2, 3]);
    }

    #[test]
    fn a_guest_that_says_nothing_is_asked_again_and_not_for_ever() {
        let mut replay = Replay::default();
        replay.begin(ms(0));
        replay.give(ms(1), vec![1], &mut |_| false);
        let mut now = ms(1);
        let mut asked = 0;
        while let Some(due) = replay.poll_timeout() {
            now = due;
            replay.handle_timeout(now, &mut |_| {
                asked += 1;
                false
            });
        }
        assert!(asked > 10 && now <= ms(1) + REPLAY_TIME + REPLAY_STEP, "asked {asked} times until {now:?}");
        replay.give(now, vec![2], &mut |_| false);
        assert_eq!(replay.poll_timeout(), None, "at other times it is lost");
    }
}
