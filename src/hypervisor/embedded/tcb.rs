//! A connection as it lies in guest memory: its control block (RFC 9293 3.3.1) and its two byte rings.
//!
//! ```text
//! table: [ TCB 0 | TCB 1 | ... ]      rings: [ rx 0 | rx 1 | ... ] [ tx 0 | tx 1 | ... ]
//!
//! tx ring:  tx_head ▼            ▼ tx_head + tx_len
//!                   │ in flight │ unsent │
//!               snd_una     snd_nxt
//! ```
//!
//! A block is loaded, changed and stored back; storing an unchanged one dirties nothing. A ring that empties
//! starts over at its first byte, so that small requests keep dirtying the same page.
//!
//! The trap: the memory may have been loaded from a damaged or hostile stream, so a block is checked when it is
//! loaded. One that cannot be is a free slot.

use super::layout::Layout;
use super::ram::Ram;
use super::wire::MSS;
use super::words::{Word, words};

/// Size of a control block in memory.
pub(super) const TCB_BYTES: usize = 256;

/// Connection states, with RFC 9293's names; `Free` is its CLOSED.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Free,
    SynReceived,
    Established,
    FinWait1,
    FinWait2,
    CloseWait,
    Closing,
    LastAck,
    TimeWait,
}

impl Word for State {
    fn to_word(self) -> u64 {
        self as u64
    }

    fn from_word(word: u64) -> Self {
        use State::*;
        let all = [Free, SynReceived, Established, FinWait1, FinWait2, CloseWait, Closing, LastAck, TimeWait];
        usize::try_from(word).ok().and_then(|at| all.get(at).copied()).unwrap_or(Free)
    }
}

words! {
    /// A transmission control block. Times are guest microseconds, zero meaning "none".
    Tcb: 32 {
        /// Where the connection stands.
        state: State,
        /// The peer's address, port and link address, big-endian in the low bytes.
        peer_ip: u32,
        peer_port: u16,
        peer_mac: u64,
        /// Sequence numbers sent: oldest unacknowledged, next to send, one past the highest ever sent.
        snd_una: u32,
        snd_nxt: u32,
        snd_max: u32,
        /// The peer's window, and the segment that last changed it.
        snd_wnd: u32,
        snd_wl1: u32,
        snd_wl2: u32,
        /// Congestion window and threshold, in bytes; end of the last loss that was recovered from.
        cwnd: u32,
        ssthresh: u32,
        recover: u32,
        /// Next sequence number expected, and right edge of the window that was advertised.
        rcv_nxt: u32,
        rcv_adv: u32,
        /// Largest segment the peer takes, in bytes.
        mss: u16,
        /// Retransmission timeout, smoothed round trip and its variation, in microseconds.
        rto_us: u64,
        srtt_us: u64,
        rttvar_us: u64,
        /// The segment being timed: its end, and when it was sent.
        rtt_seq: u32,
        rtt_at_us: u64,
        /// Timeouts in a row, and duplicate ACKs in a row.
        retries: u8,
        dup_acks: u8,
        /// Retransmission, probe or wait timer, by state.
        timer_us: u64,
        /// When the service wants to look at the request again.
        work_us: u64,
        /// When the peer was last heard.
        heard_us: u64,
        /// The rings: where the first byte is, and how many there are.
        rx_head: u32,
        rx_len: u32,
        tx_head: u32,
        tx_len: u32,
        /// Bytes the service needs to see before it looks again.
        need: u32,
        /// Bit 0: an ACK is owed. Bit 1: `100 Continue` was sent for this request.
        flags: u8,
    }
}

const ACK_OWED: u8 = 1;
const CONTINUED: u8 = 2;

/// `a - b` in sequence space: positive when `a` is later (RFC 9293 3.4).
pub(super) fn seq_diff(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b) as i32
}

impl Tcb {
    /// The block in `slot`, or a free one when what is there makes no sense.
    pub(super) fn load(ram: &Ram, layout: &Layout, slot: usize) -> Self {
        let at = layout.tcb_at + slot * TCB_BYTES;
        // The first word of a free slot is zero, and most slots are free.
        if ram.read_u64(at) == 0 {
            return Self::default();
        }
        let mut words = [0; Self::WORDS];
        for (n, word) in words.iter_mut().enumerate() {
            *word = ram.read_u64(at + n * 8);
        }
        let tcb = Self::from_words(&words);
        let (rx, tx) = (layout.rx_bytes as u32, layout.tx_bytes as u32);
        let rings_fit = tcb.rx_head < rx && tcb.rx_len <= rx && tcb.tx_head < tx && tcb.tx_len <= tx;
        // One more than the ring holds: a FIN takes a sequence number.
        let flight_fits = |end: u32| end.wrapping_sub(tcb.snd_una) <= tcb.tx_len.saturating_add(1);
        let sane = rings_fit && flight_fits(tcb.snd_nxt) && flight_fits(tcb.snd_max) && (64..=MSS).contains(&tcb.mss);
        if sane { tcb } else { Self::default() }
    }

    /// Stores the block in `slot`.
    pub(super) fn store(&self, ram: &mut Ram, layout: &Layout, slot: usize) {
        let mut bytes = [0; TCB_BYTES];
        for (into, word) in bytes.chunks_exact_mut(8).zip(self.to_words()) {
            into.copy_from_slice(&word.to_le_bytes());
        }
        ram.write(layout.tcb_at + slot * TCB_BYTES, &bytes);
    }

    /// Sequence numbers sent and not acknowledged.
    pub(super) fn flight(&self) -> u32 {
        self.snd_nxt.wrapping_sub(self.snd_una)
    }

    /// Whether a FIN follows the data: this side has closed and the peer has not acknowledged it yet.
    pub(super) fn owes_fin(&self) -> bool {
        matches!(self.state, State::FinWait1 | State::Closing | State::LastAck)
    }

    /// Whether an ACK must be sent.
    pub(super) fn ack_owed(&self) -> bool {
        self.flags & ACK_OWED != 0
    }

    /// Owes the peer an ACK, or not any more.
    pub(super) fn owe_ack(&mut self, owed: bool) {
        self.flags = if owed { self.flags | ACK_OWED } else { self.flags & !ACK_OWED };
    }

    /// Whether `100 Continue` was sent for the current request.
    pub(super) fn continued(&self) -> bool {
        self.flags & CONTINUED != 0
    }

    /// Notes whether `100 Continue` was sent.
    pub(super) fn set_continued(&mut self, sent: bool) {
        self.flags = if sent { self.flags | CONTINUED } else { self.flags & !CONTINUED };
    }

    /// Free bytes of the receive ring.
    pub(super) fn rx_free(&self, layout: &Layout) -> u32 {
        layout.rx_bytes as u32 - self.rx_len
    }

    /// Free bytes of the transmit ring.
    pub(super) fn tx_free(&self, layout: &Layout) -> u32 {
        layout.tx_bytes as u32 - self.tx_len
    }

    /// Appends `bytes` to the receive ring, which must have room.
    pub(super) fn rx_push(&mut self, ram: &mut Ram, layout: &Layout, slot: usize, bytes: &[u8]) {
        let ring = Ring { at: layout.rx_at + slot * layout.rx_bytes, size: layout.rx_bytes };
        ring.write(ram, (self.rx_head + self.rx_len) as usize, bytes);
        self.rx_len += bytes.len() as u32;
    }

    /// The first `len` bytes of the receive ring.
    pub(super) fn rx_peek(&self, ram: &Ram, layout: &Layout, slot: usize, len: usize) -> Vec<u8> {
        let ring = Ring { at: layout.rx_at + slot * layout.rx_bytes, size: layout.rx_bytes };
        ring.read(ram, self.rx_head as usize, len)
    }

    /// Drops the first `len` bytes of the receive ring.
    pub(super) fn rx_drop(&mut self, layout: &Layout, len: u32) {
        self.rx_len -= len;
        self.rx_head = if self.rx_len == 0 { 0 } else { (self.rx_head + len) % layout.rx_bytes as u32 };
    }

    /// Appends `bytes` to the transmit ring, which must have room.
    pub(super) fn tx_push(&mut self, ram: &mut Ram, layout: &Layout, slot: usize, bytes: &[u8]) {
        let ring = Ring { at: layout.tx_at + slot * layout.tx_bytes, size: layout.tx_bytes };
        ring.write(ram, (self.tx_head + self.tx_len) as usize, bytes);
        self.tx_len += bytes.len() as u32;
    }

    /// `len` bytes of the transmit ring, `skip` bytes from its start.
    pub(super) fn tx_peek(&self, ram: &Ram, layout: &Layout, slot: usize, skip: u32, len: u32) -> Vec<u8> {
        let ring = Ring { at: layout.tx_at + slot * layout.tx_bytes, size: layout.tx_bytes };
        ring.read(ram, (self.tx_head + skip) as usize, len as usize)
    }

    /// Drops the first `len` bytes of the transmit ring: the peer has them.
    pub(super) fn tx_drop(&mut self, layout: &Layout, len: u32) {
        self.tx_len -= len;
        self.tx_head = if self.tx_len == 0 { 0 } else { (self.tx_head + len) % layout.tx_bytes as u32 };
    }
}

struct Ring {
    at: usize,
    size: usize,
}

impl Ring {
    fn read(&self, ram: &Ram, pos: usize, len: usize) -> Vec<u8> {
        let pos = pos % self.size;
        let first = len.min(self.size - pos);
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(ram.read(self.at + pos, first));
        bytes.extend_from_slice(ram.read(self.at, len - first));
        bytes
    }

    fn write(&self, ram: &mut Ram, pos: usize, bytes: &[u8]) {
        let pos = pos % self.size;
        let (first, rest) = bytes.split_at(bytes.len().min(self.size - pos));
        ram.write(self.at + pos, first);
        ram.write(self.at, rest);
    }
}
