//! What is saved beside the pages: the registers and the NIC's receive ring.
//!
//! ```text
//! magic (8) │ version (u32) │ pages (u64) │ registers (u64 each) │ frames (u32) │ { length (u16) │ bytes } ...
//! ```
//!
//! All numbers little-endian. The trap is the clock: a guest's timers are in guest time, so what is saved is the
//! guest's time, and the loading host finds its own offset.

use super::wire::FRAME_MAX_BYTES;
use super::words::words;
use crate::clock::Instant;
use crate::hypervisor::DomainError;
use std::collections::VecDeque;

/// Frames the receive ring holds.
pub const FRAMES_MAX: usize = 256;

const MAGIC: &[u8; 8] = b"XCOLODEV";
const VERSION: u32 = 1;
/// Guest times beyond this (thirty thousand years) are nonsense, and could make sums overflow.
const GUEST_US_MAX: u64 = 1 << 60;

words! {
    /// The guest's registers.
    Registers: 24 {
        /// Guest time minus host time, in microseconds, wrapping; in a saved blob, the guest time.
        clock_us: u64,
        /// Set once the guest has booted; a blank one does nothing.
        booted: bool,
        /// Which generation of itself it was told to be, and which it has announced.
        generation: u64,
        announced: u64,
        /// Requests answered.
        requests: u64,
        frames_sent: u64,
        /// Its addresses, big-endian in the low bytes.
        mac: u64,
        ip: u32,
        /// Where its log on the disk stands.
        log_id: u64,
        log_end: u64,
        log_sequence: u64,
        log_keys: u64,
    }
}

impl Registers {
    /// Makes it `guest_us` in the guest when it is `now` on the host.
    pub(super) fn set_clock(&mut self, now: Instant, guest_us: u64) {
        self.clock_us = guest_us.wrapping_sub(now.as_micros());
    }

    /// Guest time at `now`, in microseconds.
    pub(super) fn guest_us(&self, now: Instant) -> u64 {
        now.as_micros().wrapping_add(self.clock_us)
    }

    /// The host's time at guest time `guest_us`; the origin when that was before it.
    pub(super) fn host_instant(&self, guest_us: u64) -> Instant {
        // The offset is a signed number in 64 bits, so the sum needs more.
        let host_us = i128::from(guest_us) - i128::from(self.clock_us as i64);
        Instant::from_micros(u64::try_from(host_us.max(0)).unwrap_or(u64::MAX))
    }
}

pub(super) fn save(registers: &Registers, ring: &VecDeque<Vec<u8>>, nr_pages: u64, now: Instant) -> Vec<u8> {
    let frames_bytes: usize = ring.iter().map(|frame| 2 + frame.len()).sum();
    let mut blob = Vec::with_capacity(24 + Registers::WORDS * 8 + frames_bytes);
    blob.extend_from_slice(MAGIC);
    blob.extend_from_slice(&VERSION.to_le_bytes());
    blob.extend_from_slice(&nr_pages.to_le_bytes());
    let saved = Registers { clock_us: registers.guest_us(now), ..registers.clone() };
    for word in saved.to_words() {
        blob.extend_from_slice(&word.to_le_bytes());
    }
    blob.extend_from_slice(&(ring.len() as u32).to_le_bytes());
    for frame in ring {
        blob.extend_from_slice(&(frame.len() as u16).to_le_bytes());
        blob.extend_from_slice(frame);
    }
    blob
}

pub(super) fn load(blob: &[u8], nr_pages: u64, now: Instant) -> Result<(Registers, VecDeque<Vec<u8>>), DomainError> {
    let refuse = |why: String| Err(DomainError::BadDeviceState(why));
    let mut rest = Reader(blob);
    if rest.array() != Some(*MAGIC) {
        return refuse("it is not device state of an embedded guest".into());
    }
    match rest.array().map(u32::from_le_bytes) {
        Some(VERSION) => {}
        other => return refuse(format!("its version is {other:?}, and this program reads {VERSION}")),
    }
    match rest.array().map(u64::from_le_bytes) {
        Some(theirs) if theirs == nr_pages => {}
        other => return refuse(format!("it is of a guest of {other:?} pages, and this one has {nr_pages}")),
    }
    let read = read_rest(&mut rest).filter(|_| rest.0.is_empty());
    let Some((mut registers, ring)) = read else {
        return refuse("it is cut short, too long or out of bounds".into());
    };
    let guest_us = registers.clock_us;
    if guest_us > GUEST_US_MAX {
        return refuse(format!("its guest time is {guest_us} microseconds"));
    }
    registers.set_clock(now, guest_us);
    Ok((registers, ring))
}

fn read_rest(rest: &mut Reader<'_>) -> Option<(Registers, VecDeque<Vec<u8>>)> {
    let mut words = [0; Registers::WORDS];
    for word in &mut words {
        *word = u64::from_le_bytes(rest.array()?);
    }
    let frames = u32::from_le_bytes(rest.array()?) as usize;
    let mut ring = VecDeque::new();
    for _ in 0..(frames <= FRAMES_MAX).then_some(frames)? {
        let len = usize::from(u16::from_le_bytes(rest.array()?));
        ring.push_back(rest.take((len <= FRAME_MAX_BYTES).then_some(len)?)?.to_vec());
    }
    Some((Registers::from_words(&words), ring))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Registers, VecDeque<Vec<u8>>) {
        let registers = Registers { booted: true, generation: 3, ip: 7, requests: 9, ..Registers::default() };
        (registers, VecDeque::from([vec![1; 60], vec![2; FRAME_MAX_BYTES]]))
    }

    #[test]
    fn guest_time_goes_on_on_a_host_with_another_origin() {
        let (mut registers, ring) = sample();
        registers.set_clock(Instant::from_micros(1_000_000), 0);
        let blob = save(&registers, &ring, 256, Instant::from_micros(5_000_000));
        for here in [0, 17, 1 << 40] {
            let (loaded, frames) = load(&blob, 256, Instant::from_micros(here)).unwrap();
            assert_eq!(loaded.guest_us(Instant::from_micros(here + 5)), 4_000_005);
            assert_eq!(loaded.host_instant(4_000_007), Instant::from_micros(here + 7));
            assert_eq!(Registers { clock_us: 0, ..loaded }, Registers { clock_us: 0, ..registers.clone() });
            assert_eq!(frames, ring);
        }
        assert_eq!(load(&blob, 256, Instant::ZERO).unwrap().0.host_instant(1), Instant::ZERO, "a timer already due");
    }

    #[test]
    fn a_blob_cut_lengthened_or_foreign_is_refused() {
        let (registers, ring) = sample();
        let blob = save(&registers, &ring, 256, Instant::ZERO);
        for cut in 0..blob.len() {
            assert!(load(&blob[..cut], 256, Instant::ZERO).is_err(), "{cut}");
        }
        assert!(load(&[&blob[..], &[0]].concat(), 256, Instant::ZERO).is_err());
        assert!(load(&blob, 257, Instant::ZERO).is_err());
        for at in 0..20 {
            let mut bad = blob.clone();
            bad[at] ^= 0x80;
            assert!(load(&bad, 256, Instant::ZERO).is_err(), "{at}");
        }
        let mut far = blob.clone();
        far[27] = 0xff;
        assert!(load(&far, 256, Instant::ZERO).is_err(), "a guest time out of bounds");
        let many = save(&registers, &VecDeque::from(vec![vec![]; FRAMES_MAX + 1]), 256, Instant::ZERO);
        assert!(load(&many, 256, Instant::ZERO).is_err());
    }
}
