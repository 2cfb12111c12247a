//! Carries a side's effects to the links, the network and the arbiter.

use super::{Engine, NetworkFrame, Role};
use crate::carried::CARRIED_BYTES;
use crate::clock::Instant;
use crate::colo::arbiter::{Answer, Ask};
use crate::colo::heartbeat::Word;
use crate::daemon::links::{DiskWrite, StreamOut, lock};
use crate::daemon::pair::{primary, secondary};
use crate::daemon::{engine_clock, fence};
use crate::page::PAGE_SIZE;
use crate::record;
use bytes::Bytes;

/// Bytes that may wait for the packet link.
const PACKETS_BACKLOG_BYTES: usize = 32 << 20;
/// Bytes that may wait for the switch; beyond it frames are dropped, as a full NIC ring does.
const NETWORK_BACKLOG_BYTES: usize = 16 << 20;

impl Engine {
    pub(super) fn emit(&mut self, frame: Bytes) {
        if self.parts.network_out.waiting_bytes() > NETWORK_BACKLOG_BYTES {
            self.dropped_network += 1;
        } else {
            // A secondary's first frames are its word that the guest is here now.
            if matches!(self.role, Role::Primary(_)) {
                self.telling.output();
            }
            let until = self.links.as_ref().map(|links| lock(&links.heartbeat).deadline());
            self.parts.network_out.send(frame.len(), NetworkFrame { until, frame });
        }
    }

    /// Carries effects to the links until there are none.
    pub(super) fn flush(&mut self) {
        loop {
            let now = engine_clock();
            match &mut self.role {
                Role::Empty | Role::Running(_) => return,
                Role::Primary(role) => {
                    let Some(effect) = role.side.poll_effect() else { return };
                    self.primary_effect(now, effect);
                }
                Role::Secondary(role) => {
                    let Some(effect) = role.side.poll_effect() else { return };
                    self.secondary_effect(effect);
                }
            }
        }
    }

    fn primary_effect(&mut self, now: Instant, effect: primary::Effect) {
        use primary::Effect;
        match effect {
            Effect::ToNetwork(frame) => self.emit(frame),
            Effect::Ask(ask) => self.ask(ask),
            Effect::Ended { exit, generation } => self.ended(exit, generation),
            effect => {
                let Some(links) = &self.links else { return };
                match effect {
                    Effect::Message(message) => links.stream_out.send(12, StreamOut::Message(message)),
                    Effect::Pages(batch) => links.stream_out.send(batch.len() * PAGE_SIZE, StreamOut::Pages(batch)),
                    Effect::GuestRests => links.stream_out.send(record::Header::BYTES, StreamOut::GuestRests),
                    Effect::Carried(carried) => {
                        links.stream_out.send(carried.len() * CARRIED_BYTES, StreamOut::Carried(carried));
                    }
                    Effect::Output(frames) => {
                        links.stream_out.send(frames.iter().map(Bytes::len).sum(), StreamOut::Output(frames));
                    }
                    Effect::Devices(blob) => links.stream_out.send(blob.len(), StreamOut::Devices(blob)),
                    Effect::DiskWrite { disk, seq, offset, payload } => {
                        if let Some(link) = links.disk_out.get(disk) {
                            link.send(payload.wire_bytes() as usize, DiskWrite { seq, offset, payload });
                        }
                    }
                    Effect::ToSecondary { epoch, frame } => {
                        if links.packets_out.waiting_bytes() < PACKETS_BACKLOG_BYTES {
                            links.packets_out.send(frame.len(), (epoch, frame));
                        } else if let Role::Primary(role) = &mut self.role {
                            role.side.handle_mirror_overflow(now);
                        }
                    }
                    Effect::Dismiss => links.say(Word::Dismissal),
                    Effect::ToNetwork(_) | Effect::Ask(_) | Effect::Ended { .. } => {}
                }
            }
        }
    }

    fn secondary_effect(&mut self, effect: secondary::Effect) {
        use secondary::Effect;
        match effect {
            Effect::ToNetwork(frame) => self.emit(frame),
            Effect::Ask(ask) => self.ask(ask),
            Effect::Ended { exit, generation } => self.ended(exit, generation),
            Effect::ApplyDisk(replicas) => {
                let done = self.applied_sender.clone();
                self.parts.runtime.spawn_blocking(move || {
                    let applied = replicas.apply_round().map_err(|error| error.to_string());
                    let _ = done.blocking_send((replicas, applied));
                });
            }
            Effect::GivenUp => _ = self.links.as_ref().map(|links| links.say(Word::GivenUp)),
            Effect::Message(message) => {
                if let Some(links) = &self.links {
                    links.stream_out.send(12, StreamOut::Message(message));
                }
            }
            Effect::ToPrimary { epoch, frame } => {
                // A frame that does not fit is one the primary waits for in vain: its partner ages, a checkpoint
                // follows.
                if let Some(links) = &self.links
                    && links.packets_out.waiting_bytes() < PACKETS_BACKLOG_BYTES
                {
                    let (tag, message) = self.digests.summarize(epoch, frame);
                    links.packets_out.send(message.len(), (tag, message));
                }
            }
        }
    }

    fn ask(&mut self, ask: Ask) {
        let (answers, arbiter) = (self.answers_sender.clone(), self.parts.arbiter.clone());
        self.parts.runtime.spawn(async move {
            let answer = match (ask, arbiter) {
                (Ask::Arbiter(claim), Some(arbiter)) => arbiter.answer(claim).await,
                (Ask::Arbiter(_), None) => Answer::Unreachable("no arbiter is configured".into()),
                (Ask::Script(path, claim), _) => fence::run(&path, &claim, fence::DEADLINE).await,
            };
            let _ = answers.send(answer).await;
        });
    }
}
