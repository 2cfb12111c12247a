//! What a seed means: the pair, its links, its clients and the one fault that will hit it.
//!
//! Swarm style: each seed draws which troubles exist at all before it draws how bad they are, so that a rare order
//! of events is not drowned by the other troubles of a run.

use super::dice::Dice;
use super::wires::Turn;
use xen_colo::colo::hello::{Mode, ResumeOrder};

/// The host that begins as the primary.
pub(super) const A: usize = 0;
/// The host that begins as the secondary.
pub(super) const B: usize = 1;

/// Defines an enum with the list of all its values.
macro_rules! listed {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub(super) enum $name { $($(#[$value_doc])* $value,)* }
        impl $name {
            /// Every value.
            pub(super) const ALL: &'static [Self] = &[$(Self::$value,)*];
        }
    };
}

listed! {
    /// The moments of a pair's life at which a fault can be made to strike: right after this happened.
    Step {
        /// On the primary: a slice of the first copy was read.
        CopySlice,
        /// On the primary: a message left.
        RequestSent,
        /// On the primary: the answer came, and the guest was captured.
        ReplyGot,
        /// On the primary: VMSTATE_SEND left.
        SendSent,
        /// On the primary: the captured pages left.
        PagesSent,
        /// On the primary: the device state left, the checkpoint is whole.
        DevicesSent,
        /// On the primary: a disk write left.
        DiskSent,
        /// On the primary: a disk write was acknowledged.
        DiskAckGot,
        /// On the primary: the first state is owned.
        ReadyGot,
        /// On the primary: a state is owned, its output left.
        ReceivedGot,
        /// On the primary: a state is loaded.
        LoadedGot,
        /// On the primary: a frame of the guest left for the network.
        FrameSent,
        /// On the secondary: a checkpoint begins.
        RequestGot,
        /// On the secondary: its guest stands.
        ReplySent,
        /// On the secondary: VMSTATE_SEND came.
        SendGot,
        /// On the secondary: in the midst of the bytes of a page record.
        MidPages,
        /// On the secondary: pages were staged.
        PagesGot,
        /// On the secondary: what waits for the state was staged, and the state is not whole.
        OutputGot,
        /// On the secondary: the checkpoint was whole and sealed.
        WholeGot,
        /// On the secondary: VMSTATE_RECEIVED left.
        ReceivedSent,
        /// On the secondary: a part of the state is in the guest.
        MidLoad,
        /// On the secondary: VMSTATE_LOADED left.
        LoadedSent,
        /// On the secondary: CHECKPOINT_READY left.
        ReadySent,
        /// On the secondary: a disk write is done and not acknowledged.
        DiskWritten,
        /// On the secondary: a disk write was acknowledged.
        DiskAckSent,
        /// On the secondary: a frame of its guest left for the comparator.
        PacketSent,
        /// On the primary: the secondary was dismissed, and has not heard it.
        DismissSaid,
        /// On the secondary: the guest is given up, and the primary has not heard it.
        GivenUpSaid,
        /// On the primary: it has heard it, and goes on.
        GivenUpGot,
    }
}

listed! {
    /// What strikes.
    Kind {
        /// Nothing.
        Nothing,
        /// The process is killed: its connections end.
        Kill,
        /// The host loses power: its connections fall silent.
        Power,
        /// The process is stopped and goes on later, with everything in its sockets (SIGSTOP, SIGCONT).
        Freeze,
        /// The engine's thread hangs and goes on later; its heartbeat does not notice.
        Stall,
        /// The hosts do not reach each other.
        Cut,
        /// The struck host does not reach the other.
        CutOut,
        /// The other host does not reach the struck one.
        CutIn,
        /// The stream breaks while both live.
        Reset,
        /// The operator asks the struck host for a failover.
        Failover,
    }
}

impl Step {
    /// Whether it happens only where the operator ends the protection.
    fn is_of_unprotect(self) -> bool {
        matches!(self, Self::DismissSaid | Self::GivenUpSaid | Self::GivenUpGot)
    }
}

/// When it strikes.
#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    /// So long after the protection began, in µs.
    At(u64),
    /// At the n-th time of a step.
    Step(Step, u64),
}

/// The fault of a seed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// What.
    pub(super) kind: Kind,
    /// Whom.
    pub(super) victim: usize,
    /// When.
    pub(super) when: When,
    /// How long it lasts, in µs, where it ends.
    pub(super) lasts_us: u64,
}

/// One direction of a reliable link.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wire {
    /// Shortest travel time in µs.
    pub(super) delay_us: u64,
    /// What is added at random.
    pub(super) jitter_us: u64,
    /// Time a KiB takes.
    pub(super) us_per_kib: u64,
}

/// How long the arbiter cannot be reached from a host, relative to the fault, in µs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outage {
    /// Whom it concerns.
    pub(super) hosts: [bool; 2],
    /// Its length; `u64::MAX` for ever.
    pub(super) lasts_us: u64,
}

/// Everything a seed decides in advance.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// COLO or Remus.
    pub(super) mode: Mode,
    /// When the primary's guest goes on after a capture.
    pub(super) resume: ResumeOrder,
    /// How often the guests' responses differ.
    pub(super) diverge_percent: u8,
    /// Longest time between checkpoints.
    pub(super) checkpoint_delay_us: u64,
    /// Shortest time between checkpoints.
    pub(super) min_interval_us: u64,
    /// Time between beats, three of which may be missed.
    pub(super) beat_us: u64,
    /// How long a peer may make no progress.
    pub(super) peer_deadline_us: u64,
    /// How many clients.
    pub(super) clients: usize,
    /// Requests each makes at least.
    pub(super) requests: u64,
    /// Longest value.
    pub(super) value_max: u64,
    /// Longest pause of a client between two requests.
    pub(super) think_us: u64,
    /// Travel time of the clients' network.
    pub(super) net_us: u64,
    /// How many client frames in a hundred are lost, doubled, overtaken.
    pub(super) net_trouble: [u64; 3],
    /// How many disks the guest has.
    pub(super) disks: usize,
    /// Stream, packets, disk, beats, second disk.
    pub(super) wires: [Wire; 5],
    /// What becomes of the packet link, and when, counted from the start of the protection.
    pub(super) packet_turns: Vec<(u64, Turn)>,
    /// How often a guest's disk is busy, by host.
    pub(super) busy_percent: [u64; 2],
    /// How long an engine takes to look at its guest's frames.
    pub(super) look_us: u64,
    /// How long an engine takes for a slice of work.
    pub(super) work_us: u64,
    /// How long a guest takes for a step.
    pub(super) step_us: u64,
    /// How long a question to the arbiter travels.
    pub(super) arbiter_us: u64,
    /// How often the arbiter's answer is lost.
    pub(super) answer_lost_percent: u64,
    /// When nobody answers.
    pub(super) outage: Outage,
    /// What happens.
    pub(super) fault: Fault,
    /// When the operator ends the protection.
    pub(super) unprotect: Option<When>,
    /// How long after the start the pair is made.
    pub(super) protect_us: u64,
    /// Whether each loaded state is compared to the captured one, byte by byte.
    pub(super) check_memory: bool,
}

impl Plan {
    /// The plan of a seed.
    pub(super) fn new(dice: &mut Dice) -> Self {
        let mode = if dice.percent(60) { Mode::Colo } else { Mode::Remus };
        let trouble = |dice: &mut Dice, percent, worst| if dice.percent(percent) { dice.range(1, worst) } else { 0 };
        let link_us = dice.pick(&[20, 100, 100, 500, 2000]);
        let wire = |dice: &mut Dice| Wire {
            delay_us: dice.range(link_us / 2, 2 * link_us),
            jitter_us: dice.pick(&[0, link_us, 10 * link_us]),
            us_per_kib: dice.pick(&[1, 8, 40]),
        };
        // Of its own dice, so that a guest with one disk lives as it did before there were two.
        let more = &mut Dice(dice.0 ^ 0x6469_736b);
        let beats = |dice: &mut Dice| Wire { jitter_us: 200, us_per_kib: 0, ..wire(dice) };
        let wires = [wire(dice), wire(dice), wire(dice), beats(dice), wire(more)];
        let beat_us = dice.pick(&[20_000, 30_000, 50_000]);
        let fault = Fault::new(dice);
        let cut = matches!(fault.kind, Kind::Cut | Kind::CutIn | Kind::CutOut);
        let lasts_us = if dice.percent(15) { u64::MAX } else { dice.range(50_000, 1_500_000) };
        let outage = match dice.below(10) {
            // A host that is cut off from its peer is often cut off from the rest as well.
            0..2 if cut => Outage { hosts: [true, false], lasts_us },
            2..4 if cut => Outage { hosts: [false, true], lasts_us },
            4 => Outage { hosts: [true; 2], lasts_us },
            _ => Outage { hosts: [false; 2], lasts_us: 0 },
        };
        Self {
            mode,
            resume: if dice.percent(75) { ResumeOrder::AfterCapture } else { ResumeOrder::AfterLoaded },
            diverge_percent: dice.pick(&[0, 0, 5, 50, 100]),
            checkpoint_delay_us: dice.pick(&[10_000, 40_000, 100_000]),
            min_interval_us: dice.pick(&[2_000, 10_000, 20_000]),
            beat_us,
            peer_deadline_us: dice.pick(&[200_000, 10_000_000]),
            clients: dice.pick(&[1, 2, 3, 3]),
            requests: dice.range(4, 12),
            value_max: dice.pick(&[40, 700, 1400, 4000]),
            think_us: dice.pick(&[1_000, 8_000, 20_000]),
            net_us: dice.pick(&[50, 300, 1_000]),
            net_trouble: [trouble(dice, 25, 10), trouble(dice, 20, 10), trouble(dice, 20, 20)],
            disks: more.pick(&[1, 2]),
            packet_turns: packet_turns(more),
            wires,
            busy_percent: [trouble(dice, 25, 60), trouble(dice, 25, 60)],
            look_us: dice.pick(&[10, 50, 1_000]),
            work_us: dice.pick(&[20, 200, 2_000]),
            step_us: dice.pick(&[5, 20, 100]),
            arbiter_us: dice.pick(&[100, 300, 2_000]),
            answer_lost_percent: trouble(dice, 15, 60),
            outage,
            fault,
            unprotect: unprotect(dice, fault),
            protect_us: dice.pick(&[0, 2_000, 30_000]),
            check_memory: dice.percent(12),
        }
    }
}

/// Breaks of the packet link, one after the other.
fn packet_turns(dice: &mut Dice) -> Vec<(u64, Turn)> {
    let (mut turns, mut at_us) = (Vec::new(), 0);
    let breaks = if dice.percent(25) { dice.range(1, 4) } else { 0 };
    for _ in 0..breaks {
        at_us += dice.range(1_000, 80_000);
        turns.push((at_us, Turn::Break));
        // A connection that ends is noticed at once, one that falls silent is not.
        let notice_us = dice.pick(&[200, 200, 20_000]);
        let heard_us = [A, B].map(|host| (at_us + dice.range(1, notice_us), Turn::Heard(host)));
        at_us = heard_us.iter().map(|(us, _)| *us).max().unwrap_or(at_us) + dice.pick(&[100, 5_000, 60_000]);
        turns.extend(heard_us);
        turns.push((at_us, Turn::Again));
    }
    turns
}

fn unprotect(dice: &mut Dice, fault: Fault) -> Option<When> {
    let needed = matches!(fault.when, When::Step(step, _) if step.is_of_unprotect());
    if !needed && !dice.percent(15) {
        return None;
    }
    let steps: Vec<_> = Step::ALL.iter().copied().filter(|step| !step.is_of_unprotect()).collect();
    let at_a_step = When::Step(dice.pick(&steps), dice.pick(&[1, 1, 2, 3]));
    Some(if dice.percent(60) { at_a_step } else { When::At(dice.range(0, 100_000)) })
}

impl Fault {
    fn new(dice: &mut Dice) -> Self {
        let kind = match dice.below(100) {
            0..6 => Kind::Nothing,
            6..34 => Kind::Kill,
            34..50 => Kind::Power,
            50..64 => Kind::Freeze,
            64..72 => Kind::Stall,
            72..80 => Kind::Cut,
            80..84 => Kind::CutOut,
            84..88 => Kind::CutIn,
            88..94 => Kind::Reset,
            _ => Kind::Failover,
        };
        let when = if dice.percent(75) {
            // Rarely the first checkpoint, whose rules are its own.
            let (step, nth) = (dice.pick(Step::ALL), dice.pick(&[1, 2, 3, 5, 8]));
            When::Step(step, if step.is_of_unprotect() { 1 } else { nth })
        } else {
            When::At(dice.range(0, 200_000))
        };
        let victim = if dice.percent(70) { A } else { B };
        let lasts_us = match kind {
            Kind::Freeze | Kind::Stall => dice.pick(&[5_000, 60_000, 150_000, 600_000, 2_000_000]),
            _ => dice.pick(&[40_000, 150_000, 1_000_000, 5_000_000]),
        };
        Self { kind, victim, when, lasts_us: dice.range(lasts_us / 2, lasts_us) }
    }
}
