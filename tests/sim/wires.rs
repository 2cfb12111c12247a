//! What is between the hosts: wires, and a packet link that may break while all else goes on.
//!
//! ```text
//!  up ──Break──▶ broken, A has not noticed ──Heard(A), Heard(B)──▶ down ──Again──▶ up
//!                (what is sent is lost)           (what is sent waits)   (it leaves, and the primary is told)
//! ```
//!
//! A part of what was on its way when it broke arrives yet: it had been received and not been read. The rest is lost. As in
//! the product, nothing of an old connection comes behind what the next one brings, and a break ends nothing else.

use super::host::Input;
use super::plan::{A, B};
use super::world::{BEATS, DISK, Event, PACKETS, SECOND_DISK, STREAM, World, tell};
use bytes::Bytes;
use std::collections::VecDeque;
use std::ops::Range;
use xen_colo::colo::Loss;

/// One direction of one link.
#[derive(Default)]
pub(super) struct Line {
    last_us: u64,
    /// Guests' frames that were sent, and that came out.
    frames: [u64; 2],
    /// Of these, those that were lost with their connection.
    lost: VecDeque<Range<u64>>,
    /// Nothing that would arrive later does.
    ends_us: Option<u64>,
    pub(super) cut: bool,
    pub(super) parked: VecDeque<Input>,
}

/// What becomes of the packet link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// It breaks.
    Break,
    /// A host notices.
    Heard(usize),
    /// There is another connection.
    Again,
}

/// The packet link, as its hosts see it.
#[derive(Default)]
pub(super) struct PacketLink {
    broken: bool,
    heard: [bool; 2],
    waiting: [VecDeque<(u64, Bytes)>; 2],
}

impl World {
    /// Sends something over a wire.
    pub(super) fn send(&mut self, link: usize, from: usize, bytes: usize, input: Input) {
        let wire = link * 2 + from;
        let spec = self.plan.wires[link];
        let travel_us = spec.delay_us + self.dice.below(spec.jitter_us + 1) + bytes as u64 * spec.us_per_kib / 1024;
        let line = &mut self.lines[wire];
        line.last_us = line.last_us.max(self.now_us + travel_us);
        let at_us = line.last_us;
        self.at(at_us, Event::Arrive { wire, input });
    }

    pub(super) fn arrive(&mut self, wire: usize, input: Input) {
        let line = &mut self.lines[wire];
        if line.ends_us.is_some_and(|ends_us| ends_us < self.now_us) && !matches!(input, Input::Lost(_)) {
            return;
        }
        if line.cut {
            line.parked.push_back(input);
        } else if !self.is_lost(wire, &input) {
            self.input(1 - wire % 2, input);
        }
    }

    /// A host's connections end: the tail of what it sent is lost, and the peer hears of it.
    pub(super) fn hang_up(&mut self, host: usize, why: &str) {
        self.cut_tails(host);
        self.send(STREAM, host, 0, Input::Lost(Loss::Disconnected(why.into())));
    }

    pub(super) fn cut_tails(&mut self, host: usize) {
        for link in [STREAM, PACKETS, DISK, BEATS, SECOND_DISK] {
            let tail_us = 2 * self.plan.wires[link].delay_us + self.plan.wires[link].jitter_us;
            let lives_us = self.dice.below(tail_us + 1);
            // A disk server may sit on requests for as long as it likes.
            let all = matches!(link, DISK | SECOND_DISK) && self.dice.percent(50);
            self.lines[link * 2 + host].ends_us.get_or_insert(if all { u64::MAX } else { self.now_us + lives_us });
        }
    }

    /// Sends a guest's or a client's frame to the other host.
    pub(super) fn send_packet(&mut self, from: usize, epoch: u64, frame: Bytes) {
        if self.packets.heard[from] {
            self.packets.waiting[from].push_back((epoch, frame));
        } else if self.packets.broken {
            self.saw("frame into a broken link");
        } else {
            self.lines[PACKETS * 2 + from].frames[0] += 1;
            self.send(PACKETS, from, frame.len(), Input::Packet(epoch, frame));
        }
    }

    /// Whether what comes out of a wire was lost with its connection.
    fn is_lost(&mut self, wire: usize, input: &Input) -> bool {
        let line = &mut self.lines[wire];
        if !matches!(input, Input::Packet(..)) {
            return false;
        }
        let number = line.frames[1];
        line.frames[1] += 1;
        while line.lost.pop_front_if(|lost| lost.end <= number).is_some() {}
        line.lost.front().is_some_and(|lost| lost.contains(&number))
    }

    /// The packet link breaks, is seen to have broken, is made again.
    pub(super) fn turn_packet_link(&mut self, turn: Turn) {
        tell!(self, "the packet link: {turn:?}");
        match turn {
            Turn::Break => {
                self.packets.broken = true;
                for wire in [PACKETS * 2 + A, PACKETS * 2 + B] {
                    let [sent, arrived] = self.lines[wire].frames;
                    let arriving = self.dice.below(sent - arrived + 1);
                    self.lines[wire].lost.push_back(arrived + arriving..sent);
                }
                self.saw("packet link broken");
            }
            Turn::Heard(host) => {
                self.packets.heard[host] = true;
                if host == A {
                    self.input(A, Input::PacketLink(false));
                }
            }
            // Nobody can connect yet.
            Turn::Again if self.lines[PACKETS * 2].cut || self.lines[PACKETS * 2 + 1].cut => {
                self.after(20_000, Event::PacketLink(turn));
            }
            Turn::Again => {
                self.packets.broken = false;
                self.packets.heard = [false; 2];
                for from in [A, B] {
                    for (epoch, frame) in std::mem::take(&mut self.packets.waiting[from]) {
                        self.send_packet(from, epoch, frame);
                    }
                }
                self.input(A, Input::PacketLink(true));
            }
        }
    }
}
