//! What the events of a run come to: how each host was and when, its checkpoints, its takeovers, and how much of each.
//!
//! ```text
//!   event ─▶ its host's lane:  unprotected │ syncing │ protected ... │ taken-over
//!         ├▶ a checkpoint                  a state, from when to when
//!         ├▶ a row of the table of changes
//!         └▶ a takeover, with the steps that led to it
//! ```
//!
//! Pure, and bounded but for the numbers of each checkpoint, of which there are as many as lines were read. The trap is the
//! host that was killed: it does not say so, its lane ends with its last line.

use super::logs::{Clients, Logs};
use super::{Figures, ReportError, TakeoverFigures, text};
use crate::colo::hello::Mode;
use crate::daemon::events::{Checkpoint, Event, What};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::Path;

/// Hosts that have a lane.
const HOSTS_MAX: usize = 8;
/// Rows of the table of changes, from its begin and from its end.
const ROWS_MAX: usize = 200;
/// Takeovers that are told of.
const TAKEOVERS_MAX: usize = 50;
/// Marks on a lane, from its begin.
const MARKS_MAX: usize = 100;
/// Spans on a lane.
const SPANS_MAX: usize = 100_000;

/// How a host was, the least noteworthy first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum State {
    Empty,
    StandingBy,
    Protected,
    Stopped,
    Syncing,
    Degraded,
    TakenOver,
    Unprotected,
    Arbitrating,
    Held,
    Failed,
}

impl State {
    pub(super) const ALL: [Self; 11] = [
        Self::Unprotected,
        Self::Syncing,
        Self::Protected,
        Self::Degraded,
        Self::StandingBy,
        Self::Arbitrating,
        Self::Held,
        Self::TakenOver,
        Self::Stopped,
        Self::Failed,
        Self::Empty,
    ];

    /// The events' own word, which is the style's class too.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::StandingBy => "standing-by",
            Self::Protected => "protected",
            Self::Stopped => "stopped",
            Self::Syncing => "syncing",
            Self::Degraded => "degraded",
            Self::TakenOver => "taken-over",
            Self::Unprotected => "unprotected",
            Self::Arbitrating => "arbitrating",
            Self::Held => "held",
            Self::Failed => "failed",
        }
    }

    /// What a host is in after an event, if that says so.
    fn after(what: &What) -> Option<Self> {
        Some(match what {
            What::HostStarted { .. } | What::Empty { .. } => Self::Empty,
            What::Unprotected { .. } => Self::Unprotected,
            What::Syncing { .. } => Self::Syncing,
            What::Protected { .. } => Self::Protected,
            What::Degraded { .. } => Self::Degraded,
            What::StandingBy { .. } => Self::StandingBy,
            What::Arbitrating { .. } => Self::Arbitrating,
            What::Held { .. } => Self::Held,
            What::TakenOver { .. } => Self::TakenOver,
            What::Stopped { .. } => Self::Stopped,
            What::Failed { .. } => Self::Failed,
            _ => return None,
        })
    }
}

/// From when to when a host was how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    pub(super) from_us: u64,
    pub(super) to_us: u64,
    pub(super) state: State,
}

/// Something on a lane that takes no time: its class, and what is said of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mark {
    pub(super) at_us: u64,
    pub(super) class: &'static str,
    pub(super) text: String,
}

/// A host.
#[derive(Clone, Debug, Default)]
pub(super) struct Lane {
    pub(super) host: String,
    pub(super) spans: Vec<Span>,
    pub(super) marks: Vec<Mark>,
    /// By [`State::name`].
    pub(super) totals_us: BTreeMap<&'static str, u64>,
    pub(super) last_us: u64,
    pub(super) ended: bool,
    pub(super) version: Option<String>,
    state: Option<(u64, State)>,
    mode: Option<Mode>,
    lost: Option<Loss>,
    arbitrating_us: Option<u64>,
    /// The state that it last came to own, or saw owned: its number, and when.
    owned: Option<(u64, u64)>,
    /// When the checkpoints of this protection were told of, by number.
    told: HashMap<u64, u64>,
    is_primary: bool,
}

#[derive(Clone, Debug)]
struct Loss {
    at_us: u64,
    heard_ms: Option<u64>,
    reason: String,
}

/// A step of a takeover, and when by the clock of the host that went on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Step {
    pub(super) at_us: u64,
    pub(super) what: &'static str,
    pub(super) text: String,
}

/// A host that went on alone.
#[derive(Clone, Debug)]
pub(super) struct Takeover {
    pub(super) host: String,
    pub(super) generation: u64,
    pub(super) at_us: u64,
    pub(super) reason: String,
    pub(super) decided_after_ms: Option<u64>,
    pub(super) first_output_after_us: Option<u64>,
    pub(super) was_primary: bool,
    pub(super) mode: Option<Mode>,
    /// The last checkpoint, and how old it was when the peer was lost.
    pub(super) recovery: Option<(u64, u64)>,
    pub(super) steps: Vec<Step>,
}

/// A row of the table of changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Row {
    pub(super) at_us: u64,
    pub(super) host: String,
    pub(super) number: u64,
    pub(super) class: &'static str,
    pub(super) text: String,
}

/// What a cause cost.
#[derive(Clone, Debug, Default)]
pub(super) struct ByCause {
    pub(super) pauses_us: Vec<u64>,
    pub(super) pages: u64,
    pub(super) stream_bytes: u64,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Story {
    pub(super) guest: Option<String>,
    pub(super) from_us: u64,
    pub(super) to_us: u64,
    pub(super) events: u64,
    pub(super) lanes: Vec<Lane>,
    /// Events of hosts that have no lane.
    pub(super) other_hosts_events: u64,
    pub(super) checkpoints: Vec<(u64, Checkpoint)>,
    /// How long the secondaries took to load.
    pub(super) loads_us: Vec<u64>,
    pub(super) takeovers: Vec<Takeover>,
    pub(super) rows: Vec<Row>,
    pub(super) last_rows: VecDeque<Row>,
    pub(super) rows_left_out: u64,
    pub(super) mode: Option<Mode>,
    pub(super) generations: BTreeSet<u64>,
    pub(super) lost_events: u64,
    pub(super) link_losses: BTreeMap<&'static str, u64>,
    /// The clock of one host behind another's: which, in µs, and by how many checkpoints.
    pub(super) clocks: Vec<(String, String, i64, usize)>,
    pub(super) clients: Option<Clients>,
}

/// A number of which there are many.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Spread {
    pub(super) count: usize,
    pub(super) min: u64,
    pub(super) p50: u64,
    pub(super) p90: u64,
    pub(super) p99: u64,
    pub(super) max: u64,
    pub(super) sum: u64,
}

impl Spread {
    /// None of nothing.
    pub(super) fn of(numbers: &mut [u64]) -> Option<Self> {
        numbers.sort_unstable();
        let last = numbers.len().checked_sub(1)?;
        // The nearest rank: one of the numbers, never a mean of two.
        let at = |percent: usize| numbers[(numbers.len() * percent).div_ceil(100).saturating_sub(1)];
        Some(Self {
            count: numbers.len(),
            min: numbers[0],
            p50: at(50),
            p90: at(90),
            p99: at(99),
            max: numbers[last],
            sum: numbers.iter().fold(0, |sum, number| sum.saturating_add(*number)),
        })
    }
}

impl Lane {
    fn leave(&mut self, at_us: u64) {
        let Some((from_us, state)) = self.state.take() else { return };
        let to_us = at_us.max(from_us);
        let total_us = self.totals_us.entry(state.name()).or_default();
        *total_us = total_us.saturating_add(to_us - from_us);
        let is_full = self.spans.len() >= SPANS_MAX;
        match self.spans.last_mut() {
            // Told again, in another generation say.
            Some(last) if last.state == state && last.to_us == from_us => last.to_us = to_us,
            _ if is_full => {}
            _ => self.spans.push(Span { from_us, to_us, state }),
        }
    }

    fn mark(&mut self, at_us: u64, class: &'static str, text: String) {
        if self.marks.len() < MARKS_MAX {
            self.marks.push(Mark { at_us, class, text });
        }
    }

    /// A checkpoint of this number was told of.
    fn owns(&mut self, number: u64, at_us: u64) {
        self.owned = Some((number, at_us));
        self.told.insert(number, at_us);
    }

    fn take(&mut self, event: &Event) {
        let at = event.unix_us;
        match &event.what {
            What::HostStarted { version, .. } => {
                // The process before did not say when it ended.
                self.leave(self.last_us);
                self.version = Some(text::plain(version));
                self.mark(at, "started", text::plain(&event.what.to_string()));
            }
            What::Syncing { mode, .. } => {
                (self.mode, self.is_primary, self.owned) = (*mode, false, None);
                self.told.clear();
            }
            What::Protected { mode, .. } => (self.mode, self.is_primary) = (*mode, true),
            What::StandingBy { mode, .. } => (self.mode, self.is_primary) = (*mode, false),
            What::Checkpoint(checkpoint) => self.owns(checkpoint.checkpoint, at),
            What::Loaded { checkpoint, .. } => self.owns(*checkpoint, at),
            What::LinkLost { link, reason, heard_ms } => {
                if link == "peer" {
                    self.lost = Some(Loss { at_us: at, heard_ms: *heard_ms, reason: text::plain(reason) });
                }
                self.mark(at, "link-lost", text::plain(&event.what.to_string()));
            }
            What::LinkBack { .. } => self.mark(at, "link-back", text::plain(&event.what.to_string())),
            What::Arbitrating { .. } => self.arbitrating_us = Some(at),
            What::TakenOver { .. } => self.mark(at, "takeover", text::plain(&event.what.to_string())),
            What::HostEnded => self.leave(at),
            _ => {}
        }
        self.ended = event.what == What::HostEnded;
        if let Some(state) = State::after(&event.what) {
            self.leave(at);
            self.state = Some((at, state));
        }
        self.last_us = self.last_us.max(at);
    }

    fn takeover(&mut self, at_us: u64, generation: u64, reason: &str, decided_after_ms: Option<u64>) -> Takeover {
        let lost = self.lost.take();
        let mut steps = Vec::new();
        let mut step = |at_us, what, text: String| steps.push(Step { at_us, what, text });
        if let Some((number, at)) = self.owned {
            step(at, "last checkpoint", format!("number {number} is owned by the secondary and loaded"));
        }
        if let Some(lost) = &lost {
            if let Some(ms) = lost.heard_ms {
                step(
                    lost.at_us.saturating_sub(ms.saturating_mul(1000)),
                    "peer last heard",
                    "its last beat or message".into(),
                );
            }
            step(lost.at_us, "peer lost", lost.reason.clone());
        }
        if let Some(at) = self.arbitrating_us.take().filter(|at| lost.as_ref().is_none_or(|lost| *at >= lost.at_us)) {
            step(at, "arbitration", format!("generation {generation} is asked for"));
        }
        let decided =
            decided_after_ms.zip(lost.as_ref()).map(|(ms, lost)| lost.at_us.saturating_add(ms.saturating_mul(1000)));
        if let Some(at) = decided {
            step(at, "decided", format!("generation {generation} is this host's (to the millisecond)"));
        }
        step(at_us, "taken over", "the guest goes on here, alone".into());
        Takeover {
            host: self.host.clone(),
            generation,
            at_us,
            reason: text::plain(reason),
            decided_after_ms,
            first_output_after_us: None,
            was_primary: self.is_primary,
            mode: self.mode,
            recovery: self.owned.zip(lost).map(|((number, at), lost)| (number, lost.at_us.saturating_sub(at))),
            steps,
        }
    }
}

impl Story {
    /// Of one guest: the only one, or that one.
    pub(super) fn of(logs: &Logs, guest: Option<&str>) -> Result<Self, ReportError> {
        let guests: BTreeSet<&str> = logs.events.iter().filter_map(|event| event.guest.as_deref()).collect();
        let guest = match guest {
            Some(guest) if !guests.contains(guest) => return Err(ReportError::NoSuchGuest(text::plain(guest))),
            Some(guest) => Some(guest),
            None if guests.len() > 1 => {
                let named = guests.iter().take(HOSTS_MAX).map(|guest| text::plain(guest));
                return Err(ReportError::SeveralGuests(named.collect()));
            }
            None => guests.first().copied(),
        };
        let of_guest = |event: &&Event| event.guest.as_deref() == guest;
        let hosts: BTreeSet<&str> = logs.events.iter().filter(of_guest).map(|event| &*event.host).collect();
        let mut story = Self { guest: guest.map(text::plain), clients: logs.clients.clone(), ..Self::default() };
        // What is told of no guest is told of the host.
        let told = logs.events.iter().filter(|event| event.guest.is_none() || of_guest(event));
        told.filter(|event| hosts.contains(&*event.host)).for_each(|event| story.take(event));
        story.end();
        Ok(story)
    }

    fn take(&mut self, event: &Event) {
        self.events += 1;
        self.from_us = if self.events == 1 { event.unix_us } else { self.from_us.min(event.unix_us) };
        self.to_us = self.to_us.max(event.unix_us);
        let host = text::plain(&event.host);
        let at = match self.lanes.iter().position(|lane| lane.host == host) {
            Some(at) => at,
            None if self.lanes.len() < HOSTS_MAX => {
                self.lanes.push(Lane { host, ..Lane::default() });
                self.lanes.len() - 1
            }
            None => {
                self.other_hosts_events += 1;
                return;
            }
        };
        self.lanes[at].take(event);
        match &event.what {
            What::Checkpoint(checkpoint) => return self.checkpoints.push((event.unix_us, checkpoint.clone())),
            What::Loaded { load_us, .. } => return self.loads_us.push(*load_us),
            What::Progress(_) => return,
            What::Syncing { mode, generation, .. }
            | What::Protected { mode, generation, .. }
            | What::StandingBy { mode, generation, .. } => {
                self.mode = mode.or(self.mode);
                self.generations.insert(*generation);
            }
            What::TakenOver { generation, reason, decided_after_ms } => {
                self.generations.insert(*generation);
                if self.takeovers.len() < TAKEOVERS_MAX {
                    self.take_over(at, event.unix_us, *generation, reason, *decided_after_ms);
                }
            }
            What::FirstOutput { after_us } => {
                let host = &self.lanes[at].host;
                let taken_over = self.takeovers.iter_mut().rev().find(|takeover| takeover.host == *host);
                if let Some(takeover) = taken_over.filter(|takeover| takeover.first_output_after_us.is_none()) {
                    takeover.first_output_after_us = Some(*after_us);
                    let text = format!("the guest is heard again, {} after the decision", text::duration(*after_us));
                    takeover.steps.push(Step { at_us: event.unix_us, what: "first output", text });
                }
            }
            What::LinkLost { link, .. } => {
                let known = ["peer", "disk", "packets"].into_iter().find(|known| known == link);
                *self.link_losses.entry(known.unwrap_or("other")).or_default() += 1;
            }
            What::Lost { count } => self.lost_events = self.lost_events.saturating_add(*count),
            _ => {}
        }
        // A hostile log names a generation a line.
        if self.generations.len() > TAKEOVERS_MAX {
            self.generations.pop_first();
        }
        self.add_row(event, at);
    }

    fn take_over(&mut self, lane: usize, at_us: u64, generation: u64, reason: &str, decided_after_ms: Option<u64>) {
        let mut takeover = self.lanes[lane].takeover(at_us, generation, reason, decided_after_ms);
        for peer in
            self.lanes.iter().enumerate().filter(|(at, lane_)| *at != lane && !lane_.ended).map(|(_, peer)| peer)
        {
            let text = format!("host {}, by its own clock", peer.host);
            takeover.steps.push(Step { at_us: peer.last_us, what: "peer's last line", text });
        }
        takeover.steps.sort_by_key(|step| step.at_us);
        self.takeovers.push(takeover);
    }

    fn add_row(&mut self, event: &Event, lane: usize) {
        let class = match &event.what {
            What::LinkLost { .. } => "link-lost",
            What::LinkBack { .. } => "link-back",
            what => State::after(what).map_or("other", State::name),
        };
        let row = Row {
            at_us: event.unix_us,
            host: self.lanes[lane].host.clone(),
            number: event.number,
            class,
            text: text::plain(&event.what.to_string()),
        };
        if self.rows.len() < ROWS_MAX {
            return self.rows.push(row);
        }
        self.last_rows.push_back(row);
        if self.last_rows.len() > ROWS_MAX {
            self.last_rows.pop_front();
            self.rows_left_out += 1;
        }
    }

    /// All is read.
    fn end(&mut self) {
        let to_us = self.to_us;
        for lane in &mut self.lanes {
            let last_us = lane.last_us;
            lane.leave(last_us);
            if !lane.ended && last_us < to_us {
                lane.mark(last_us, "silent", format!("the last line of host {}", lane.host));
            }
        }
        let pairs = self.lanes.iter().flat_map(|primary| self.lanes.iter().map(move |secondary| (primary, secondary)));
        let pairs = pairs.filter(|(primary, secondary)| {
            primary.host != secondary.host && primary.is_primary && !secondary.is_primary
        });
        let apart = pairs.filter_map(|(primary, secondary)| {
            // A primary tells of a checkpoint when it hears that it is loaded, which the secondary tells of then.
            let both = primary
                .told
                .iter()
                .filter_map(|(number, at)| Some((*at as i64).saturating_sub(*secondary.told.get(number)? as i64)));
            let mut apart: Vec<i64> = both.collect();
            apart.sort_unstable();
            let median = *apart.get(apart.len() / 2)?;
            Some((secondary.host.clone(), primary.host.clone(), median, apart.len()))
        });
        self.clocks = apart.collect();
    }

    /// How long the guest was in a state, on whichever host it ran.
    pub(super) fn total_us(&self, states: &[State]) -> u64 {
        let all = self.lanes.iter().flat_map(|lane| states.iter().filter_map(|state| lane.totals_us.get(state.name())));
        all.fold(0, |sum, us| sum.saturating_add(*us))
    }

    /// Numbers of each checkpoint that has them.
    pub(super) fn numbers(&self, of: impl Fn(&Checkpoint) -> Option<u64>) -> Vec<u64> {
        self.checkpoints.iter().filter_map(|(_, checkpoint)| of(checkpoint)).collect()
    }

    /// The causes, the most frequent first.
    pub(super) fn causes(&self) -> Vec<(String, ByCause)> {
        let mut causes: BTreeMap<&str, ByCause> = BTreeMap::new();
        for (_, checkpoint) in &self.checkpoints {
            let by = causes.entry(&checkpoint.cause).or_default();
            by.pauses_us.push(checkpoint.pause_us);
            by.pages = by.pages.saturating_add(checkpoint.pages);
            by.stream_bytes = by.stream_bytes.saturating_add(checkpoint.stream_bytes.unwrap_or_default());
        }
        let mut causes: Vec<_> = causes.into_iter().map(|(cause, by)| (cause.to_owned(), by)).collect();
        causes.sort_by_key(|(_, by)| std::cmp::Reverse(by.pauses_us.len()));
        causes
    }

    pub(super) fn figures(&self, logs: &Logs, out: &Path) -> Figures {
        let pause = Spread::of(&mut self.numbers(|it| Some(it.pause_us)));
        let stream = Spread::of(&mut self.numbers(|it| it.stream_bytes));
        Figures {
            report: out.to_owned(),
            guest: self.guest.clone(),
            hosts: self.lanes.iter().map(|lane| lane.host.clone()).collect(),
            from_unix_us: self.from_us,
            to_unix_us: self.to_us,
            events: self.events,
            malformed_lines: logs.malformed,
            lost_events: self.lost_events,
            unread_bytes: logs.unread_bytes,
            checkpoints: self.checkpoints.len() as u64,
            pause_us: pause.map(|pause| [pause.p50, pause.p99, pause.max]),
            stream_bytes: stream.map(|stream| stream.sum),
            protected_us: self.total_us(&[State::Protected, State::Degraded]),
            degraded_us: self.total_us(&[State::Degraded]),
            alone_us: self.total_us(&[State::Unprotected, State::Syncing, State::TakenOver]),
            takeovers: self
                .takeovers
                .iter()
                .map(|takeover| TakeoverFigures {
                    host: takeover.host.clone(),
                    generation: takeover.generation,
                    at_unix_us: takeover.at_us,
                    decided_after_ms: takeover.decided_after_ms,
                    first_output_after_us: takeover.first_output_after_us,
                })
                .collect(),
            lost_writes: self.clients.as_ref().map(|clients| clients.lost_writes),
        }
    }
}
