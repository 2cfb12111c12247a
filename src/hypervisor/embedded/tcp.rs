//! TCP, the passive side (RFC 9293; timers RFC 6298; loss RFC 5681 in its simplest form; resets RFC 5961).
//!
//! ```text
//! Free ─SYN─▶ SynReceived ─ACK─▶ Established ─FIN─▶ CloseWait ─close─▶ LastAck ─ACK─▶ Free
//!                                     │ close
//!                                     ▼
//!                                 FinWait1 ─ACK─▶ FinWait2 ─FIN─▶ TimeWait ─▶ Free
//!                                     └──FIN─▶ Closing ─ACK─────────▲
//! ```
//!
//! Kept simple on purpose: what arrives out of order is dropped with a duplicate ACK, loss is repaired by going
//! back to the oldest unacknowledged byte, every segment with data is acknowledged at once. The peer's link
//! address is the one its last frame came from, so there is no ARP table to save.
//!
//! Traps: a FIN takes a sequence number but no byte of the ring; a window that shuts needs a probe, or a lost
//! window update hangs both ends; a window's right edge never moves left.

use super::machine::Context;
use super::tcb::{State, Tcb, seq_diff};
use super::wire::{ACK, FIN, Ip, Ipv4, MSS, Mac, PROTOCOL_TCP, PSH, RST, SYN, Segment};

/// The service's port.
pub(super) const PORT: u16 = 80;

const RTO_MIN_US: u64 = 50_000;
const RTO_INITIAL_US: u64 = 200_000;
const RTO_MAX_US: u64 = 5_000_000;
const RTO_GRANULARITY_US: u64 = 10_000;
/// Timeouts in a row before the peer is given up: about 40 seconds.
const RETRIES_MAX: u8 = 12;
const SYN_RETRIES_MAX: u8 = 5;
const TIME_WAIT_US: u64 = 1_000_000;
const FIN_WAIT_US: u64 = 10_000_000;
/// A connection unheard for this long makes room for a new one when the table is full.
const IDLE_EVICT_US: u64 = 60_000_000;
const INITIAL_WINDOW_SEGMENTS: u32 = 10;
const WINDOW_MAX: u32 = 65535;

fn mac_word(mac: Mac) -> u64 {
    mac.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

fn word_mac(word: u64) -> Mac {
    let [_, _, mac @ ..] = word.to_be_bytes();
    mac
}

impl Context<'_> {
    /// A TCP segment from the network.
    pub(super) fn tcp_input(&mut self, mac: Mac, ip: &Ipv4<'_>) {
        let Some(segment) = Segment::parse(ip) else { return };
        let peer_ip = u32::from_be_bytes(ip.src);
        let found = (segment.dst_port == PORT).then(|| self.find(peer_ip, segment.src_port)).flatten();
        let Some((slot, mut tcb)) = found else {
            return self.listen(mac, ip.src, &segment);
        };
        // A new connection from the same port ends the wait for stragglers of the old one (RFC 9293 3.10.7.4).
        if tcb.state == State::TimeWait
            && segment.flags & (SYN | ACK | RST) == SYN
            && seq_diff(segment.seq, tcb.rcv_nxt) > 0
        {
            Tcb::default().store(self.ram, self.layout, slot);
            return self.listen(mac, ip.src, &segment);
        }
        tcb.peer_mac = mac_word(mac);
        tcb.heard_us = self.now_us;
        self.accept(slot, &mut tcb, &segment);
        self.work(slot, &mut tcb);
        tcb.store(self.ram, self.layout, slot);
    }

    /// Runs what is due on the connection in `slot`.
    pub(super) fn tcp_timers(&mut self, slot: usize) {
        let mut tcb = Tcb::load(self.ram, self.layout, slot);
        let due = |at_us: u64| at_us != 0 && at_us <= self.now_us;
        let (timer, work) = (due(tcb.timer_us), due(tcb.work_us));
        if tcb.state == State::Free || !(timer || work) {
            return;
        }
        if timer {
            self.timeout(slot, &mut tcb);
        }
        self.work(slot, &mut tcb);
        tcb.store(self.ram, self.layout, slot);
    }

    /// After a takeover: sends at once what is unacknowledged, and three ACKs alike, upon which the peer sends at
    /// once what it sent into the void.
    pub(super) fn tcp_announce(&mut self, slot: usize) {
        let mut tcb = Tcb::load(self.ram, self.layout, slot);
        match tcb.state {
            State::Free | State::TimeWait => return,
            State::SynReceived => self.send_syn_ack(&tcb),
            _ => {
                tcb.snd_nxt = tcb.snd_una;
                tcb.cwnd = INITIAL_WINDOW_SEGMENTS * u32::from(tcb.mss);
                (tcb.retries, tcb.dup_acks, tcb.rtt_at_us, tcb.rto_us) = (0, 0, 0, RTO_INITIAL_US);
                if tcb.state != State::FinWait2 {
                    tcb.timer_us = 0;
                }
                self.work(slot, &mut tcb);
                for _ in 0..3 {
                    self.send_ack(&mut tcb);
                }
            }
        }
        tcb.store(self.ram, self.layout, slot);
    }

    /// This side has nothing more to say.
    pub(super) fn close(&mut self, tcb: &mut Tcb) {
        tcb.state = match tcb.state {
            State::Established => State::FinWait1,
            State::CloseWait => State::LastAck,
            other => other,
        };
        (tcb.rx_head, tcb.rx_len, tcb.work_us) = (0, 0, 0);
    }

    fn work(&mut self, slot: usize, tcb: &mut Tcb) {
        if tcb.state != State::Free {
            self.serve(slot, tcb);
            self.output(slot, tcb);
        }
    }

    fn find(&self, peer_ip: u32, peer_port: u16) -> Option<(usize, Tcb)> {
        (0..self.layout.connections)
            .map(|slot| (slot, Tcb::load(self.ram, self.layout, slot)))
            .find(|(_, tcb)| tcb.state != State::Free && tcb.peer_ip == peer_ip && tcb.peer_port == peer_port)
    }

    /// A slot for a new connection: a free one, else the one unheard for longest that may be dropped.
    fn free_slot(&self) -> Option<usize> {
        let mut oldest = None;
        for slot in 0..self.layout.connections {
            let tcb = Tcb::load(self.ram, self.layout, slot);
            match tcb.state {
                State::Free => return Some(slot),
                State::TimeWait | State::FinWait2 => {}
                _ if self.now_us.saturating_sub(tcb.heard_us) >= IDLE_EVICT_US => {}
                _ => continue,
            }
            if oldest.is_none_or(|(heard_us, _)| tcb.heard_us < heard_us) {
                oldest = Some((tcb.heard_us, slot));
            }
        }
        oldest.map(|(_, slot)| slot)
    }

    /// A segment that belongs to no connection.
    fn listen(&mut self, mac: Mac, src: Ip, segment: &Segment<'_>) {
        if segment.has(RST) {
            return;
        }
        let wanted = segment.dst_port == PORT && segment.flags & (SYN | ACK) == SYN;
        let Some(slot) = wanted.then(|| self.free_slot()).flatten() else {
            return self.refuse(mac, src, segment);
        };
        let iss = self.hardware.next() as u32;
        let mss = segment.mss.unwrap_or(536).clamp(64, MSS);
        let rcv_nxt = segment.seq.wrapping_add(1);
        let tcb = Tcb {
            state: State::SynReceived,
            peer_ip: u32::from_be_bytes(src),
            peer_port: segment.src_port,
            peer_mac: mac_word(mac),
            snd_una: iss,
            snd_nxt: iss.wrapping_add(1),
            snd_max: iss.wrapping_add(1),
            snd_wnd: u32::from(segment.window),
            snd_wl1: segment.seq,
            snd_wl2: iss,
            cwnd: INITIAL_WINDOW_SEGMENTS * u32::from(mss),
            ssthresh: u32::MAX,
            recover: iss,
            rcv_nxt,
            rcv_adv: rcv_nxt.wrapping_add((self.layout.rx_bytes as u32).min(WINDOW_MAX)),
            mss,
            rto_us: RTO_INITIAL_US,
            timer_us: self.after(RTO_INITIAL_US),
            heard_us: self.now_us,
            need: 1,
            ..Tcb::default()
        };
        self.send_syn_ack(&tcb);
        tcb.store(self.ram, self.layout, slot);
    }

    /// Answers a segment nobody expects with a reset (RFC 9293 3.10.7.1).
    fn refuse(&mut self, mac: Mac, src: Ip, segment: &Segment<'_>) {
        let (seq, ack, flags) = if segment.has(ACK) {
            (segment.ack, 0, RST)
        } else {
            (0, segment.seq.wrapping_add(segment.seq_len()), RST | ACK)
        };
        let (src_port, dst_port) = (segment.dst_port, segment.src_port);
        self.transmit(mac, src, &Segment { src_port, dst_port, seq, ack, flags, ..Segment::default() });
    }

    fn accept(&mut self, slot: usize, tcb: &mut Tcb, segment: &Segment<'_>) {
        let window = tcb.rcv_adv.wrapping_sub(tcb.rcv_nxt).min(WINDOW_MAX);
        let ahead = seq_diff(segment.seq, tcb.rcv_nxt);
        let in_window = ahead >= 0 && ahead as u32 <= window;
        if segment.has(RST) {
            // Only the exact number ends a connection; a guess in the window is asked back (RFC 5961 3).
            match ahead {
                0 => *tcb = Tcb::default(),
                _ => tcb.owe_ack(in_window),
            }
            return;
        }
        if segment.has(SYN) {
            match (tcb.state, ahead) {
                (State::SynReceived, -1) => self.send_syn_ack(tcb),
                _ => tcb.owe_ack(true),
            }
            return;
        }
        if !segment.has(ACK) {
            return;
        }
        let old = ahead < 0 && ahead.unsigned_abs() >= segment.seq_len();
        if ahead > 0 && !in_window || old {
            tcb.owe_ack(true);
            return;
        }
        if self.accept_ack(tcb, segment) && segment.seq_len() > 0 {
            self.accept_data(slot, tcb, segment, ahead, window);
        }
    }

    /// Takes the segment's acknowledgement and window; false when the rest of it is to be ignored.
    fn accept_ack(&mut self, tcb: &mut Tcb, segment: &Segment<'_>) -> bool {
        let acked = segment.ack.wrapping_sub(tcb.snd_una);
        let outstanding = tcb.snd_max.wrapping_sub(tcb.snd_una);
        if tcb.state == State::SynReceived {
            if acked != 1 {
                self.refuse(word_mac(tcb.peer_mac), tcb.peer_ip.to_be_bytes(), segment);
                return false;
            }
            tcb.state = State::Established;
            (tcb.snd_una, tcb.timer_us, tcb.retries) = (segment.ack, 0, 0);
            (tcb.snd_wnd, tcb.snd_wl1, tcb.snd_wl2) = (u32::from(segment.window), segment.seq, segment.ack);
            return true;
        }
        if seq_diff(segment.ack, tcb.snd_max) > 0 {
            tcb.owe_ack(true);
            return false;
        }
        if acked == 0 || acked > outstanding {
            let same = segment.seq_len() == 0 && u32::from(segment.window) == tcb.snd_wnd;
            if acked == 0 && same && outstanding > 0 && tcb.snd_wnd > 0 {
                self.duplicate_ack(tcb);
            }
        } else {
            self.advance(tcb, segment.ack, acked);
        }
        let newer = seq_diff(segment.seq, tcb.snd_wl1);
        if newer > 0 || newer == 0 && seq_diff(segment.ack, tcb.snd_wl2) >= 0 {
            let was_shut = tcb.snd_wnd == 0;
            (tcb.snd_wnd, tcb.snd_wl1, tcb.snd_wl2) = (u32::from(segment.window), segment.seq, segment.ack);
            if was_shut {
                // An answer to a probe, shut or not, is a sign of life.
                tcb.retries = 0;
            }
            if was_shut && tcb.snd_wnd > 0 {
                // A probe's byte may have been thrown away, and its timer has backed off far.
                (tcb.snd_nxt, tcb.timer_us, tcb.rtt_at_us) = (tcb.snd_una, 0, 0);
            }
        }
        true
    }

    fn advance(&mut self, tcb: &mut Tcb, ack: u32, acked: u32) {
        let bytes = acked.min(tcb.tx_len);
        let fin_acked = acked > tcb.tx_len;
        tcb.tx_drop(self.layout, bytes);
        tcb.snd_una = ack;
        if seq_diff(tcb.snd_nxt, ack) < 0 {
            tcb.snd_nxt = ack;
        }
        (tcb.retries, tcb.dup_acks, tcb.timer_us) = (0, 0, 0);
        if tcb.rtt_at_us != 0 && seq_diff(ack, tcb.rtt_seq) >= 0 {
            let sample_us = self.now_us.saturating_sub(tcb.rtt_at_us);
            tcb.rtt_at_us = 0;
            if tcb.srtt_us == 0 {
                (tcb.srtt_us, tcb.rttvar_us) = (sample_us.max(1), sample_us / 2);
            } else {
                let error_us = tcb.srtt_us.abs_diff(sample_us);
                tcb.rttvar_us = tcb.rttvar_us.saturating_sub(tcb.rttvar_us / 4).saturating_add(error_us / 4);
                tcb.srtt_us = tcb.srtt_us.saturating_sub(tcb.srtt_us / 8).saturating_add(sample_us / 8).max(1);
            }
        }
        if tcb.srtt_us != 0 {
            let spread_us = tcb.rttvar_us.saturating_mul(4).max(RTO_GRANULARITY_US);
            tcb.rto_us = tcb.srtt_us.saturating_add(spread_us).clamp(RTO_MIN_US, RTO_MAX_US);
        }
        let mss = u32::from(tcb.mss);
        let gain = if tcb.cwnd < tcb.ssthresh { acked.min(mss) } else { (mss * mss / tcb.cwnd.max(1)).max(1) };
        tcb.cwnd = tcb.cwnd.saturating_add(gain).min(WINDOW_MAX);
        if fin_acked {
            match tcb.state {
                State::FinWait1 => (tcb.state, tcb.timer_us) = (State::FinWait2, self.after(FIN_WAIT_US)),
                State::Closing => self.enter_time_wait(tcb),
                State::LastAck => *tcb = Tcb::default(),
                _ => {}
            }
        }
    }

    fn duplicate_ack(&mut self, tcb: &mut Tcb) {
        tcb.dup_acks = tcb.dup_acks.saturating_add(1);
        // Once a window: the duplicates that going back makes are no sign of another loss (RFC 6582).
        if tcb.dup_acks == 3 && seq_diff(tcb.snd_una, tcb.recover) >= 0 {
            self.go_back(tcb);
            tcb.cwnd = tcb.ssthresh;
        }
    }

    fn go_back(&mut self, tcb: &mut Tcb) {
        let mss = u32::from(tcb.mss);
        tcb.ssthresh = (tcb.flight() / 2).max(2 * mss);
        tcb.recover = tcb.snd_max;
        (tcb.snd_nxt, tcb.rtt_at_us, tcb.cwnd) = (tcb.snd_una, 0, mss);
    }

    fn accept_data(&mut self, slot: usize, tcb: &mut Tcb, segment: &Segment<'_>, ahead: i32, window: u32) {
        if tcb.state == State::Free {
            return;
        }
        tcb.owe_ack(true);
        if ahead > 0 {
            return;
        }
        let fresh = segment.payload.get(ahead.unsigned_abs() as usize..).unwrap_or(&[]);
        let room = window.min(tcb.rx_free(self.layout)) as usize;
        let taken = &fresh[..fresh.len().min(room)];
        match tcb.state {
            State::Established => tcb.rx_push(self.ram, self.layout, slot, taken),
            // Nobody reads any more. A reset now could reach the peer before it has read the response (RFC 9112
            // 9.6), so what still comes is acknowledged and dropped.
            State::FinWait1 | State::FinWait2 => {}
            _ => return,
        }
        tcb.rcv_nxt = tcb.rcv_nxt.wrapping_add(taken.len() as u32);
        if segment.has(FIN) && taken.len() == fresh.len() {
            tcb.rcv_nxt = tcb.rcv_nxt.wrapping_add(1);
            match tcb.state {
                State::Established => tcb.state = State::CloseWait,
                State::FinWait1 => tcb.state = State::Closing,
                _ => self.enter_time_wait(tcb),
            }
        }
    }

    fn enter_time_wait(&self, tcb: &mut Tcb) {
        (tcb.state, tcb.timer_us) = (State::TimeWait, self.after(TIME_WAIT_US));
    }

    fn timeout(&mut self, slot: usize, tcb: &mut Tcb) {
        tcb.retries = tcb.retries.saturating_add(1);
        tcb.rto_us = tcb.rto_us.saturating_mul(2).clamp(RTO_MIN_US, RTO_MAX_US);
        tcb.timer_us = self.after(tcb.rto_us);
        match tcb.state {
            State::TimeWait | State::FinWait2 => *tcb = Tcb::default(),
            State::SynReceived if tcb.retries > SYN_RETRIES_MAX => *tcb = Tcb::default(),
            State::SynReceived => self.send_syn_ack(tcb),
            _ if tcb.retries > RETRIES_MAX => {
                self.send(tcb, tcb.snd_nxt, RST | ACK, &[]);
                *tcb = Tcb::default();
            }
            _ if tcb.snd_wnd == 0 && tcb.tx_len > 0 => {
                let byte = tcb.tx_peek(self.ram, self.layout, slot, 0, 1);
                self.send(tcb, tcb.snd_una, ACK | PSH, &byte);
                let after_probe = tcb.snd_una.wrapping_add(1);
                if tcb.flight() == 0 {
                    tcb.snd_nxt = after_probe;
                }
                if seq_diff(after_probe, tcb.snd_max) > 0 {
                    tcb.snd_max = after_probe;
                }
            }
            _ => self.go_back(tcb),
        }
    }

    /// Sends what windows allow, then whatever ACK is still owed, and sets the timer.
    fn output(&mut self, slot: usize, tcb: &mut Tcb) {
        if matches!(tcb.state, State::Free | State::SynReceived) {
            return;
        }
        let mss = u32::from(tcb.mss);
        loop {
            let flight = tcb.flight();
            let sent = flight.min(tcb.tx_len);
            let unsent = tcb.tx_len - sent;
            let usable = tcb.snd_wnd.min(tcb.cwnd).saturating_sub(flight);
            let len = unsent.min(mss).min(usable);
            let fin = tcb.owes_fin() && flight <= tcb.tx_len && len == unsent;
            // A sliver of window is not worth a segment while an ACK is on its way (RFC 9293 3.8.6.2.1).
            let sliver = len < mss && len < unsent && flight > 0;
            if len == 0 && !fin || sliver {
                break;
            }
            let payload = tcb.tx_peek(self.ram, self.layout, slot, sent, len);
            let flags = ACK | if len == unsent { PSH } else { 0 } | if fin { FIN } else { 0 };
            self.send(tcb, tcb.snd_nxt, flags, &payload);
            let next = tcb.snd_nxt.wrapping_add(len + u32::from(fin));
            if tcb.snd_nxt == tcb.snd_max && tcb.rtt_at_us == 0 {
                (tcb.rtt_seq, tcb.rtt_at_us) = (next, self.now_us.max(1));
            }
            tcb.snd_nxt = next;
            if seq_diff(next, tcb.snd_max) > 0 {
                tcb.snd_max = next;
            }
        }
        if tcb.ack_owed() || self.window_gain(tcb) >= (self.layout.rx_bytes as u32 / 2).min(WINDOW_MAX / 2) {
            self.send_ack(tcb);
        }
        let waits_for_peer = tcb.flight() > 0 || tcb.tx_len > 0;
        match tcb.state {
            State::FinWait2 | State::TimeWait => {}
            _ if !waits_for_peer => tcb.timer_us = 0,
            _ if tcb.timer_us == 0 => tcb.timer_us = self.after(tcb.rto_us.max(RTO_MIN_US)),
            _ => {}
        }
    }

    /// By how much the window's right edge could move.
    fn window_gain(&self, tcb: &Tcb) -> u32 {
        let edge = tcb.rcv_nxt.wrapping_add(tcb.rx_free(self.layout).min(WINDOW_MAX));
        seq_diff(edge, tcb.rcv_adv).max(0) as u32
    }

    fn send_ack(&mut self, tcb: &mut Tcb) {
        self.send(tcb, tcb.snd_max, ACK, &[]);
    }

    fn send_syn_ack(&mut self, tcb: &Tcb) {
        let window = (self.layout.rx_bytes as u32).min(WINDOW_MAX) as u16;
        let (seq, ack, flags) = (tcb.snd_una, tcb.rcv_nxt, SYN | ACK);
        self.transmit_to(tcb, Segment { seq, ack, flags, window, mss: Some(MSS), ..Segment::default() });
    }

    /// Sends a segment of an established connection; it carries the ACK that may be owed and the window.
    fn send(&mut self, tcb: &mut Tcb, seq: u32, flags: u8, payload: &[u8]) {
        // The edge moves by whole segments, or a slow reader would be sent slivers (RFC 9293 3.8.6.2.2).
        let gain = self.window_gain(tcb);
        if gain >= u32::from(MSS).min(self.layout.rx_bytes as u32 / 2) {
            tcb.rcv_adv = tcb.rcv_adv.wrapping_add(gain);
        }
        tcb.owe_ack(false);
        let window = tcb.rcv_adv.wrapping_sub(tcb.rcv_nxt).min(WINDOW_MAX) as u16;
        self.transmit_to(tcb, Segment { seq, ack: tcb.rcv_nxt, flags, window, payload, ..Segment::default() });
    }

    fn transmit_to(&mut self, tcb: &Tcb, segment: Segment<'_>) {
        let segment = Segment { src_port: PORT, dst_port: tcb.peer_port, ..segment };
        self.transmit(word_mac(tcb.peer_mac), tcb.peer_ip.to_be_bytes(), &segment);
    }

    fn transmit(&mut self, mac: Mac, dst: Ip, segment: &Segment<'_>) {
        let bytes = segment.emit(self.ip(), dst);
        self.send_ipv4(mac, dst, PROTOCOL_TCP, &bytes);
    }

    /// The guest time `delay_us` from now, with a little of the hardware's own noise when divergence is asked for.
    fn after(&self, delay_us: u64) -> u64 {
        self.now_us.saturating_add(delay_us).saturating_add(self.jitter_us).max(1)
    }
}
