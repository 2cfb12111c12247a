//! The engine: one thread per host that owns the guest, the machine and everything between them.
//!
//! ```text
//!   select()  picks one input: control, a lost link, the stream, packets, disk answers, guest frames, the network,
//!             an answer of the arbiter, a deadline, or background work      (cancel-safe, decides nothing)
//!   apply()   hands it to the side, synchronously
//!   flush()   carries the side's effects to the links
//! ```
//!
//! The trap is the sleeper: a host stopped by `SIGSTOP` wakes with inputs in every socket that were true when it
//! fell asleep. Before *any* input is applied the heartbeat's lease is checked against the clock; when it is over,
//! the peer is lost first, and everything else comes after.

mod degraded;
mod digests;
mod effects;
mod frames;
mod leaving;
mod moments;
mod orders;
mod parts;
mod report;
mod telling;
mod totals;

use self::digests::Digests;
pub use self::leaving::Vacancy;
use self::moments::Moment;
pub use self::orders::UNDER_WAY;
pub use self::parts::{EngineParts, HostInput, NetworkFrame, ToProtect};
use self::telling::Telling;
use super::control::{Answer as Reply, Asked};
use super::guest::Guest;
use super::links::packets::Told;
use super::links::{DiskAnswers, Links, StreamIn, lock};
use super::live::Live;
use super::pair::primary::PrimarySide;
use super::pair::secondary::SecondarySide;
use super::{engine_clock, unix_us};
use crate::clock::Instant;
use crate::colo::arbiter::{Answer, Register, Verdict};
use crate::colo::heartbeat::Word;
use crate::colo::hello::Mode;
use crate::colo::{Exit, Loss, primary as primary_machine, secondary as secondary_machine};
use crate::compare::Rewriter;
use crate::replica::mirror::Target;
use crate::replica::mirror::resync::ChunkHash;
use crate::replica::set::Replicas;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// What became of a round of writing replicas, and of which.
type DiskApplied = (Replicas, Result<bool, String>);

/// Bytes that may wait for the stream or the disk link during the first copy.
const COPY_BACKLOG_BYTES: usize = 16 << 20;

enum Role {
    Empty,
    /// A guest that was never protected.
    Running(Box<Guest>),
    Primary(Box<PrimaryRole>),
    Secondary(Box<SecondaryRole>),
}

impl Role {
    /// The guest that is here, whoever it belongs to.
    fn guest(&self) -> Option<&Guest> {
        match self {
            Self::Empty => None,
            Self::Running(guest) => Some(guest),
            Self::Primary(role) => Some(&role.guest),
            Self::Secondary(role) => Some(&role.guest),
        }
    }

    fn guest_mut(&mut self) -> Option<&mut Guest> {
        match self {
            Self::Empty => None,
            Self::Running(guest) => Some(guest),
            Self::Primary(role) => Some(&mut role.guest),
            Self::Secondary(role) => Some(&mut role.guest),
        }
    }
}

struct PrimaryRole {
    side: PrimarySide,
    guest: Box<Guest>,
}

struct SecondaryRole {
    side: SecondarySide,
    guest: Box<Guest>,
}

enum Input {
    Control(Asked),
    Host(Box<HostInput>),
    Word(Word),
    Lost(Loss),
    Stream(StreamIn),
    Disk(DiskAnswers),
    Hash(usize, ChunkHash),
    Recycled(crate::page::PageBatch),
    PacketLink(Told),
    SecondaryOrMirrored(u64, Bytes),
    GuestFrames,
    Network(Bytes),
    Answer(Answer),
    DiskApplied(DiskApplied),
    Deadline,
    Work,
    Closed,
}

/// The engine of one host.
pub struct Engine {
    parts: EngineParts,
    role: Role,
    links: Option<Links>,
    peer: Option<String>,
    mode: Option<Mode>,
    digests: Digests,
    answers: mpsc::Receiver<Answer>,
    answers_sender: mpsc::Sender<Answer>,
    applied: mpsc::Receiver<DiskApplied>,
    applied_sender: mpsc::Sender<DiskApplied>,
    holder: Option<Register>,
    /// Who waits for the end of the protection.
    unprotecting: Option<oneshot::Sender<Reply>>,
    packet_link: degraded::PacketLink,
    /// Who waits for this host's end.
    departing: Option<oneshot::Sender<Reply>>,
    /// Why a guest that was here is here no longer.
    left: Option<String>,
    /// That the peer asked to be dismissed, once it has.
    peer_left: Option<String>,
    /// What was set since the start.
    live: Live,
    /// When the service manager is owed a sign of life.
    sign_due: Option<Instant>,
    /// The latest suspicion for which the network was made to look for the guest.
    looked_for: Option<Instant>,
    /// Whether the guest was stopped by an order.
    paused: bool,
    /// What was told last.
    moment: Moment,
    telling: Telling,
    lost_at_unix_us: Option<u64>,
    decided_at_unix_us: Option<u64>,
    dropped_network: u64,
    /// Bytes sent over the stream and to the disks by links that have ended.
    sent_before: (u64, u64),
    /// What the pairs before counted.
    kept: totals::Kept,
    moved_bytes: u64,
    stopping: bool,
}

impl Engine {
    /// An engine that has not run.
    #[must_use]
    pub fn new(mut parts: EngineParts) -> Self {
        let (answers_sender, answers) = mpsc::channel(8);
        let (applied_sender, applied) = mpsc::channel(1);
        let parts_left = parts.left.take();
        let role = parts.guest.take().map_or(Role::Empty, |guest| Role::Running(Box::new(guest)));
        Self {
            parts,
            role,
            links: None,
            peer: None,
            mode: None,
            digests: Digests::Off,
            answers,
            answers_sender,
            applied,
            applied_sender,
            holder: None,
            unprotecting: None,
            packet_link: degraded::PacketLink::default(),
            departing: None,
            left: parts_left,
            peer_left: None,
            live: Live::default(),
            sign_due: None,
            looked_for: None,
            paused: false,
            moment: Moment::default(),
            telling: Telling::default(),
            lost_at_unix_us: None,
            decided_at_unix_us: None,
            dropped_network: 0,
            sent_before: (0, 0),
            kept: totals::Kept::default(),
            moved_bytes: 0,
            stopping: false,
        }
    }

    /// Runs until it is told to stop.
    pub async fn run(mut self) -> Option<Guest> {
        if let Role::Running(guest) = &mut self.role
            && let Err(error) = guest.domain_mut().and_then(|domain| domain.resume())
        {
            tracing::error!(%error, "the guest does not start");
        }
        self.sign_due = self.parts.manager.sign_every().map(|_| engine_clock());
        self.after(engine_clock());
        while !self.stopping {
            let input = self.select().await;
            let is_frame = matches!(input, Input::SecondaryOrMirrored(..) | Input::Network(_) | Input::GuestFrames);
            self.span().in_scope(|| {
                self.check_lease();
                self.apply(input);
                if is_frame {
                    self.take_waiting_frames();
                }
                self.after(engine_clock());
            });
            if is_frame {
                // What moves the frames runs on this thread.
                tokio::task::yield_now().await;
            }
        }
        self.guest_left_alone()
    }

    async fn select(&mut self) -> Input {
        let deadline = self.deadline();
        let frames = self.guest_frames();
        let busy = self.has_work();
        let hashes_wanted = matches!(&self.role, Role::Primary(role) if role.side.wants_hash());
        let sleep = async {
            match deadline {
                Some(at) => tokio::time::sleep(at - engine_clock()).await,
                None => std::future::pending().await,
            }
        };
        let Some(links) = self.links.as_mut() else {
            return tokio::select! {
                biased;
                Some(asked) = self.parts.control.recv() => Input::Control(asked),
                Some(input) = self.parts.host.recv() => Input::Host(Box::new(input)),
                Some(answer) = self.answers.recv() => Input::Answer(answer),
                Some(applied) = self.applied.recv() => Input::DiskApplied(applied),
                () = frames => Input::GuestFrames,
                Some(frame) = self.parts.network_in.recv() => Input::Network(frame),
                () = tokio::task::yield_now(), if busy => Input::Work,
                () = sleep => Input::Deadline,
                else => Input::Closed,
            };
        };
        tokio::select! {
            biased;
            Some(asked) = self.parts.control.recv() => Input::Control(asked),
            // Before the end of the link that it came over.
            Some(word) = links.words.recv() => Input::Word(word),
            Some(loss) = links.lost.recv() => Input::Lost(loss),
            Some(answer) = self.answers.recv() => Input::Answer(answer),
            Some(applied) = self.applied.recv() => Input::DiskApplied(applied),
            Some(item) = links.stream_in.recv() => Input::Stream(item),
            Some(answers) = links.disk_in.recv() => Input::Disk(answers),
            Some((disk, hash)) = links.hashes_in.recv(), if hashes_wanted => Input::Hash(disk, hash),
            Some(batch) = links.recycled.recv() => Input::Recycled(batch),
            Some(told) = links.packet_link.recv() => Input::PacketLink(told),
            Some((epoch, frame)) = links.packets_in.recv() => Input::SecondaryOrMirrored(epoch, frame),
            () = frames => Input::GuestFrames,
            Some(frame) = self.parts.network_in.recv() => Input::Network(frame),
            Some(input) = self.parts.host.recv() => Input::Host(Box::new(input)),
            () = tokio::task::yield_now(), if busy => Input::Work,
            () = sleep => Input::Deadline,
            else => Input::Closed,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let side = match &self.role {
            Role::Primary(role) => role.side.poll_timeout(),
            Role::Secondary(role) => role.side.poll_timeout(),
            Role::Empty | Role::Running(_) => None,
        };
        // The links tell nobody when they have drained, and the first copy waits for that.
        let copying = matches!(&self.role, Role::Primary(role) if role.side.wants_copy());
        let look_again = (copying && !self.links_take_more()).then(|| engine_clock() + Duration::from_millis(1));
        let own = [self.digests.poll_timeout(), self.sign_due, self.suspicion_due()];
        side.into_iter().chain(look_again).chain(own.into_iter().flatten()).min()
    }

    fn links_take_more(&self) -> bool {
        self.links.as_ref().is_some_and(|links| {
            links.stream_out.waiting_bytes() < COPY_BACKLOG_BYTES && links.disk_waiting_bytes() < COPY_BACKLOG_BYTES
        })
    }

    fn has_work(&self) -> bool {
        match &self.role {
            Role::Primary(role) => role.side.wants_copy() && self.links_take_more(),
            Role::Secondary(role) => role.side.is_loading(),
            Role::Empty | Role::Running(_) => false,
        }
    }

    fn check_lease(&mut self) {
        let Some(links) = &self.links else { return };
        let silence = lock(&links.heartbeat).lost(engine_clock());
        if let Some(silence) = silence {
            self.lose(silence.into());
        }
    }

    fn lose(&mut self, loss: Loss) {
        let now = engine_clock();
        match &mut self.role {
            Role::Primary(role) => role.side.handle_loss(now, loss),
            Role::Secondary(role) => role.side.handle_loss(now, loss),
            Role::Empty | Role::Running(_) => return,
        }
        self.notice_loss();
        self.close_links();
        self.flush();
    }

    /// Whoever found it, the machine itself too (a peer that hangs or lies, a guest that cannot be captured): a loss
    /// is dated, and ends the links. Whatever they still hold belongs to a generation that is over or disputed. Only
    /// an operator's wish keeps them until it is decided: a peer that saw them end would claim the generation too,
    /// and might win it against the operator.
    fn notice_loss(&mut self) {
        let (loss, undecided) = match &self.role {
            Role::Primary(role) => {
                use primary_machine::State;
                let machine = role.side.machine();
                (machine.loss(), !matches!(machine.state(), State::Held | State::Exited(_)))
            }
            Role::Secondary(role) => {
                use secondary_machine::State;
                let machine = role.side.machine();
                (machine.loss(), !matches!(machine.state(), State::Held | State::Exited(_)))
            }
            Role::Empty | Role::Running(_) => return,
        };
        // A peer that was let go closes the links itself, or has.
        let Some(loss) = loss.filter(|loss| **loss != Loss::Dismissed) else { return };
        if self.lost_at_unix_us.is_none() {
            tracing::warn!(reason = %loss, "colo_peer_lost");
            self.tell_loss(loss);
            self.lost_at_unix_us = Some(unix_us());
        }
        if !(undecided && *loss == Loss::Requested) {
            self.close_links();
        }
    }

    fn close_links(&mut self) {
        if let Some(links) = self.links.take() {
            self.sent_before.0 += links.stream_bytes.load(Ordering::Relaxed);
            self.sent_before.1 += links.disk_bytes.load(Ordering::Relaxed);
        }
    }

    fn apply(&mut self, input: Input) {
        let now = engine_clock();
        match input {
            Input::Control((request, reply)) => self.control(request, reply),
            Input::Host(input) => match *input {
                HostInput::Protect { links, config, peer, targets, begun } => {
                    let _ = begun.send(self.begin_primary(now, links, config, peer, &targets));
                }
                HostInput::Join { links, config, peer, guest } => self.begin_secondary(now, links, config, peer, guest),
            },
            Input::Word(word) => match (&mut self.role, word) {
                (Role::Primary(role), Word::GivenUp) => role.side.handle_given_up(now),
                (Role::Primary(_), Word::Leaving) => self.let_peer_leave(now),
                (Role::Secondary(role), Word::Dismissal) => role.side.handle_dismissal(now),
                _ => {}
            },
            Input::Lost(loss) => self.lose(loss),
            Input::Answer(answer) => self.answered(now, answer),
            Input::DiskApplied((replicas, applied)) => {
                if let Role::Secondary(role) = &mut self.role {
                    role.side.handle_disk_applied(now, &replicas, applied);
                }
            }
            Input::GuestFrames => self.take_guest_frames(now),
            Input::Network(frame) => match &mut self.role {
                Role::Empty => {}
                Role::Running(guest) => guest.receive(now, frame),
                Role::Primary(role) => role.side.handle_network_frame(now, frame),
                Role::Secondary(role) => role.side.handle_network_frame(now, frame),
            },
            Input::Stream(item) => match (&mut self.role, item) {
                (Role::Primary(role), StreamIn::Message(message)) => role.side.handle_message(now, message),
                (Role::Secondary(role), StreamIn::Item(item)) => role.side.handle_item(now, item),
                _ => {}
            },
            Input::Disk((disk, answers)) => {
                if let Role::Primary(role) = &mut self.role {
                    role.side.handle_disk_acked(now, disk, answers);
                }
            }
            Input::Hash(disk, hash) => {
                if let Role::Primary(role) = &mut self.role {
                    role.side.handle_hash(now, disk, hash);
                }
            }
            Input::Recycled(batch) => {
                if let Role::Primary(role) = &mut self.role {
                    role.side.recycle(batch);
                }
            }
            Input::PacketLink(told) => self.packet_link(now, told),
            Input::SecondaryOrMirrored(tag, frame) => self.packet_arrived(now, tag, frame),
            Input::Work => match &mut self.role {
                Role::Primary(role) => role.side.copy_some(now),
                Role::Secondary(role) => _ = role.side.work(now),
                Role::Empty | Role::Running(_) => {}
            },
            Input::Deadline => {}
            Input::Closed => self.stopping = true,
        }
    }

    /// What is due after every input: progress seen on the links, deadlines, effects.
    fn after(&mut self, now: Instant) {
        if let Some(links) = &self.links {
            let moved = links.sent_bytes() + links.received_bytes.load(Ordering::Relaxed);
            if moved != self.moved_bytes {
                self.moved_bytes = moved;
                match &mut self.role {
                    Role::Primary(role) => role.side.handle_progress(now),
                    Role::Secondary(role) => role.side.handle_progress(now),
                    Role::Empty | Role::Running(_) => {}
                }
            }
        }
        match &mut self.role {
            Role::Primary(role) if role.side.poll_timeout().is_some_and(|at| at <= now) => {
                role.side.handle_timeout(now)
            }
            Role::Secondary(role) if role.side.poll_timeout().is_some_and(|at| at <= now) => {
                role.side.handle_timeout(now)
            }
            _ => {}
        }
        self.carry_digests(now);
        self.look_for_guest(now);
        // Before the word that the guest is given up: who hears it may knock at once.
        self.tell_vacancy();
        self.flush();
        self.notice_loss();
        self.answer_unprotect();
        self.leave();
        self.answer_departure();
        self.tell_vacancy();
        self.tell_moment();
        self.give_sign_of_life(now);
        self.tell_events(now);
    }

    fn tell_vacancy(&mut self) {
        let vacancy = self.vacancy();
        if vacancy == Vacancy::Vacant
            && let Some(guest) = self.role.guest_mut()
        {
            // The next guest's devices are served in the same places, from the same images.
            guest.attachments.clear();
        }
        self.parts.vacancy.send_if_modified(|said| std::mem::replace(said, vacancy) != vacancy);
    }

    fn answered(&mut self, now: Instant, answer: Answer) {
        match &answer {
            Answer::Verdict(Verdict::Lost(register)) => self.holder = Some(register.clone()),
            Answer::Unreachable(why) | Answer::NotFenced(why) => {
                tracing::warn!(reason = %why, "colo_arbiter_no_decision");
            }
            _ => {}
        }
        match &mut self.role {
            Role::Primary(role) => role.side.handle_answer(now, answer),
            Role::Secondary(role) => role.side.handle_answer(now, answer),
            Role::Empty | Role::Running(_) => {}
        }
    }

    fn ended(&mut self, exit: Exit, generation: u64) {
        self.decided_at_unix_us.get_or_insert_with(unix_us);
        let exit_text = serde_json::to_string(&exit).unwrap_or_default();
        tracing::warn!(exit = %exit_text, generation, "COLO_EXIT");
        self.close_links();
        if exit == Exit::Alone {
            self.telling.await_output(engine_clock());
        }
        if matches!((&self.role, exit), (Role::Primary(_), Exit::Unprotected | Exit::Alone)) {
            self.forget_protection();
        }
    }

    fn begin_primary(
        &mut self,
        now: Instant,
        links: Links,
        config: primary_machine::Config,
        peer: String,
        targets: &[Target],
    ) -> Reply {
        let Some(mut guest) = self.take_guest() else { return Reply::error("the guest was taken away meanwhile") };
        if let Err(error) = self.remember_protection(&guest.name, config.claim.expected, &peer) {
            self.role = Role::Running(guest);
            return Reply::error(format!("the guest cannot be protected: {error}"));
        }
        let Some(domain) = guest.domain.take() else { return Reply::error("this host has no guest") };
        let mode = config.mode;
        let clock = Arc::new(engine_clock);
        match PrimarySide::new(now, config, domain, guest.mirrors.clone(), guest.epoch.clone(), clock, targets) {
            Ok(side) => {
                let side = side.behind(std::mem::replace(&mut guest.outer, Rewriter::of_survivor()));
                self.role = Role::Primary(Box::new(PrimaryRole { side, guest }));
                self.digests = Digests::of_primary(links.digests);
                self.adopt(links, peer, mode);
                Reply::done()
            }
            Err((domain, error)) => {
                self.forget_protection();
                guest.domain = Some(domain);
                self.role = Role::Running(guest);
                Reply::error(format!("the guest cannot be protected: {error}"))
            }
        }
    }

    /// The guest, if it runs here and no pair has it.
    fn take_guest(&mut self) -> Option<Box<Guest>> {
        match &self.role {
            Role::Running(_) => {}
            Role::Primary(role) if role.side.can_be_protected() => self.keep_totals(),
            Role::Secondary(role) if role.side.can_be_protected() => self.keep_totals(),
            Role::Empty | Role::Primary(_) | Role::Secondary(_) => return None,
        }
        let (mut guest, (domain, outer)) = match std::mem::replace(&mut self.role, Role::Empty) {
            Role::Empty => return None,
            Role::Running(guest) => return Some(guest),
            Role::Primary(role) => (role.guest, role.side.into_survivor()),
            Role::Secondary(role) => (role.guest, role.side.into_survivor()),
        };
        (guest.domain, guest.outer) = (Some(domain), outer);
        // It has a disk of its own by now, over which its mirrors lie.
        guest.replicas = None;
        Some(guest)
    }

    fn begin_secondary(
        &mut self,
        now: Instant,
        links: Links,
        config: secondary_machine::Config,
        peer: String,
        mut guest: Box<Guest>,
    ) {
        let (Some(domain), Some(replicas)) = (guest.domain.take(), guest.replicas.clone()) else { return };
        let mode = config.mode;
        let clock = Arc::new(engine_clock);
        match SecondarySide::new(now, config, domain, replicas, guest.epoch.clone(), guest.geometry.mac, clock) {
            Ok(side) => {
                self.keep_totals();
                self.role = Role::Secondary(Box::new(SecondaryRole { side, guest }));
                self.digests = Digests::of_secondary(links.digests);
                self.adopt(links, peer, mode);
            }
            Err(error) => tracing::error!(%error, "this host cannot stand by"),
        }
    }

    fn adopt(&mut self, links: Links, peer: String, mode: Mode) {
        tracing::info!(%peer, %mode, "colo_begin");
        (self.links, self.peer, self.mode) = (Some(links), Some(peer), Some(mode));
        (self.holder, self.left, self.peer_left) = (None, None, None);
        (self.lost_at_unix_us, self.decided_at_unix_us) = (None, None);
        (self.sent_before, self.moved_bytes, self.paused) = ((0, 0), 0, false);
        self.packet_link = degraded::PacketLink::default();
        self.tell_from_zero();
    }
}
