//! What a host's events say, counted: the steps of its checkpoints as histograms, and how often what happened.
//!
//! ```text
//!   Events ── a checkpoint, a load, a link, a takeover ──▶ Counted ─┬─ web: histograms, counters
//!                                                                  └─ db:  histograms, counters
//! ```
//!
//! Pure. A guest's counters appear with the first event that says something about them, all of a kind at once and from zero,
//! so that a rate sees the first one. Two traps. A name of a guest is what a peer says it is: [`GUESTS_MAX`] are kept. And who
//! reads the ring late misses events: how many is counted too.

use crate::colo::Cause;
use crate::compare::{Service, ServicePort};
use crate::daemon::events::{Checkpoint, Event, What};
use prometheus_client::metrics::histogram::Histogram;
use std::collections::BTreeMap;

/// Guests that are counted; the one that nothing was heard of for longest makes room.
pub(super) const GUESTS_MAX: usize = 8;
/// Services of a guest's that are counted by themselves; the ones that come later are one, whose protocol is "other".
pub(super) const SERVICES_MAX: usize = 16;
/// From 10 µs, of a capture of few pages, to 50 s, of an interval that an operator set long.
const BUCKETS_S: [f64; 21] = [
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
    2.5, 5.0, 10.0, 25.0, 50.0,
];
/// The links of a pair that are lost by themselves.
pub(super) const LINKS: [&str; 3] = ["peer", "packets", "disk"];

/// A step of a checkpoint: its metric, what that is, and what an event says of it in µs.
pub(super) type Step = (&'static str, &'static str, fn(&Checkpoint) -> Option<u64>);

/// The steps that a primary sees.
pub(super) const STEPS: [Step; 6] = [
    ("xen_colo_checkpoint_interval_seconds", "From one checkpoint's capture to the next", |it| it.interval_us),
    ("xen_colo_checkpoint_pause_seconds", "How long the guest stood still for a checkpoint", |it| Some(it.pause_us)),
    ("xen_colo_checkpoint_capture_seconds", "From the suspend until everything was copied out", |it| {
        Some(it.capture_us)
    }),
    ("xen_colo_checkpoint_transfer_seconds", "From the end of the capture until the peer owned the state", |it| {
        Some(it.transfer_us)
    }),
    ("xen_colo_checkpoint_release_seconds", "From the suspend until the packets of the epoch were released", |it| {
        Some(it.release_us)
    }),
    ("xen_colo_checkpoint_apply_seconds", "From the release until the peer had loaded the state", |it| it.load_us),
];

/// What is counted of one guest.
#[derive(Clone, Debug, Default)]
pub(super) struct Guest {
    /// By [`STEPS`].
    pub(super) steps: [Option<Histogram>; STEPS.len()],
    /// How long loads took here, on a secondary.
    pub(super) load: Option<Histogram>,
    /// Checkpoints that the peer came to own, on a primary; every cause once there is one.
    pub(super) checkpoints: BTreeMap<Cause, u64>,
    /// Those of them that a difference in a flow was the cause of, by what the flow serves and by cause.
    pub(super) services: BTreeMap<(Service, Cause), u64>,
    /// Pages in them.
    pub(super) pages: Option<u64>,
    /// By [`LINKS`], once there was a pair.
    pub(super) link_losses: Option<[u64; LINKS.len()]>,
    /// Takeovers by this host, once there was a pair.
    pub(super) takeovers: Option<u64>,
}

fn observe(histogram: &mut Option<Histogram>, us: u64) {
    histogram.get_or_insert_with(|| Histogram::new(BUCKETS_S)).observe(us as f64 / 1e6);
}

impl Guest {
    fn take(&mut self, what: &What) {
        match what {
            What::Syncing { .. } => self.is_in_a_pair(),
            What::Checkpoint(checkpoint) => self.take_checkpoint(checkpoint),
            What::Loaded { load_us, .. } => observe(&mut self.load, *load_us),
            What::LinkLost { link, .. } => {
                self.is_in_a_pair();
                let losses = self.link_losses.iter_mut().flatten().zip(LINKS);
                losses.filter(|(_, name)| name == link).for_each(|(losses, _)| *losses += 1);
            }
            What::TakenOver { .. } => {
                self.is_in_a_pair();
                self.takeovers.iter_mut().for_each(|takeovers| *takeovers += 1);
            }
            _ => {}
        }
    }

    /// From now on these can happen.
    fn is_in_a_pair(&mut self) {
        self.link_losses.get_or_insert_default();
        self.takeovers.get_or_insert_default();
    }

    /// A service that has its counters keeps them: one that gave way would lose its past.
    fn take_divergence(&mut self, service: Service, cause: Cause) {
        let mut services: Vec<_> = self.services.keys().map(|(service, _)| service).collect();
        services.dedup();
        let fits = services.contains(&&service) || services.len() < SERVICES_MAX;
        let service = if fits { service } else { Service { protocol: "other".into(), port: ServicePort::None } };
        for reason in Cause::ALL.into_iter().filter(|cause| cause.is_difference()) {
            self.services.entry((service.clone(), reason)).or_default();
        }
        self.services.entry((service, cause)).and_modify(|count| *count += 1);
    }

    fn take_checkpoint(&mut self, checkpoint: &Checkpoint) {
        for ((_, _, step), histogram) in STEPS.iter().zip(&mut self.steps) {
            step(checkpoint).into_iter().for_each(|us| observe(histogram, us));
        }
        for cause in Cause::ALL {
            let count = self.checkpoints.entry(cause).or_default();
            *count += u64::from(cause.to_string() == checkpoint.cause);
        }
        let cause = Cause::ALL.into_iter().find(|cause| cause.to_string() == checkpoint.cause);
        if let Some((service, cause)) = checkpoint.service.clone().zip(cause) {
            self.take_divergence(service, cause);
        }
        *self.pages.get_or_insert_default() += checkpoint.pages;
    }
}

/// What is counted.
#[derive(Clone, Debug, Default)]
pub(super) struct Counted {
    /// The event that was taken last.
    pub(super) since: u64,
    /// Events that were gone before they could be taken.
    pub(super) missed: u64,
    /// The guests, by name; the one heard of last is last.
    pub(super) guests: Vec<(String, Guest)>,
}

impl Counted {
    /// Takes events, oldest first; those that were taken before are passed over.
    pub(super) fn take(&mut self, events: &[Event]) {
        for event in events.iter().filter(|event| event.number > 0) {
            if event.number <= self.since {
                continue;
            }
            self.missed += event.number - self.since - 1;
            self.since = event.number;
            if let Some(guest) = &event.guest {
                self.guest(guest).take(&event.what);
            }
        }
    }

    fn guest(&mut self, name: &str) -> &mut Guest {
        let known = self.guests.iter().position(|(known, _)| known == name);
        let guest = match known {
            Some(at) => self.guests.remove(at),
            None => (name.to_owned(), Guest::default()),
        };
        if self.guests.len() >= GUESTS_MAX {
            self.guests.remove(0);
        }
        self.guests.push(guest);
        let last = self.guests.len() - 1;
        &mut self.guests[last].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u64, guest: &str, what: What) -> Event {
        Event { number, at_us: 0, unix_us: 0, host: "a".into(), guest: Some(guest.into()), what }
    }

    fn checkpoint(cause: Cause) -> What {
        What::Checkpoint(Checkpoint { cause: cause.to_string(), pages: 3, ..Checkpoint::default() })
    }

    #[test]
    fn every_cause_is_in_the_list_once() {
        for (at, cause) in Cause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, at, "{cause}");
        }
        assert_eq!(Cause::ALL.len(), Cause::Command as usize + 1, "the last one is in it");
    }

    #[test]
    fn an_event_counts_once_and_what_was_missed_is_said() {
        let mut counted = Counted::default();
        let told = [event(1, "web", checkpoint(Cause::First)), event(2, "web", checkpoint(Cause::Aged))];
        counted.take(&told);
        counted.take(&told);
        counted.take(&[event(2, "web", checkpoint(Cause::Aged)), event(6, "web", checkpoint(Cause::Aged))]);
        let (name, web) = &counted.guests[0];
        assert_eq!((counted.missed, counted.since, &name[..], web.pages), (3, 6, "web", Some(9)));
        assert_eq!((web.checkpoints[&Cause::First], web.checkpoints[&Cause::Aged]), (1, 2));
        assert_eq!(web.checkpoints[&Cause::OneSided], 0, "a cause that has not come yet is there");
        assert!(web.steps[0].is_none() && web.steps[1].is_some(), "no interval was measured, pauses were");
        assert_eq!((web.link_losses, web.takeovers), (None, None));
    }

    #[test]
    fn differences_are_counted_by_service_and_the_many_as_one() {
        let differs = |port: u16, cause: Cause| {
            let service = Service { protocol: "tcp".into(), port: ServicePort::Guest(port) };
            What::Checkpoint(Checkpoint { cause: cause.to_string(), service: Some(service), ..Checkpoint::default() })
        };
        let mut counted = Counted::default();
        let told = (1..=100).map(|port| differs(port, Cause::Aged));
        let told = told.chain([differs(1, Cause::PayloadDiffers), differs(1, Cause::Aged), differs(99, Cause::Reused)]);
        for (number, what) in (1..).zip(told) {
            counted.take(&[event(number, "web", what)]);
        }
        let services = &counted.guests[0].1.services;
        let count =
            |protocol: &str, port, cause| services.get(&(Service { protocol: protocol.into(), port }, cause)).copied();
        assert_eq!(count("tcp", ServicePort::Guest(1), Cause::Aged), Some(2));
        assert_eq!(count("tcp", ServicePort::Guest(1), Cause::PayloadDiffers), Some(1));
        assert_eq!(count("tcp", ServicePort::Guest(16), Cause::OneSided), Some(0), "what has not come yet is there");
        assert_eq!(count("tcp", ServicePort::Guest(17), Cause::Aged), None);
        assert_eq!(count("other", ServicePort::None, Cause::Aged), Some(84));
        assert_eq!(count("other", ServicePort::None, Cause::Reused), Some(1));
        assert_eq!(services.len(), (SERVICES_MAX + 1) * 5, "differences, and no other causes");
        assert_eq!(services.values().sum::<u64>(), 103);
    }

    #[test]
    fn a_pair_is_what_links_and_takeovers_are_counted_of() {
        let mut counted = Counted::default();
        let lost = |link: &str| What::LinkLost { link: link.into(), reason: String::new(), heard_ms: None };
        let syncing = What::Syncing { peer: "b".into(), mode: None, generation: 1 };
        counted.take(&[event(1, "web", syncing)]);
        assert_eq!((counted.guests[0].1.link_losses, counted.guests[0].1.takeovers), (Some([0; 3]), Some(0)));
        let taken = What::TakenOver { generation: 2, reason: String::new(), decided_after_ms: None };
        let told = [
            lost("peer"),
            lost("disk"),
            lost("what a peer might say"),
            taken,
            What::Loaded { checkpoint: 1, load_us: 7 },
        ];
        for (number, what) in (2..).zip(told) {
            counted.take(&[event(number, "web", what)]);
        }
        let web = &counted.guests[0].1;
        assert_eq!((web.link_losses, web.takeovers, web.load.is_some()), (Some([1, 0, 1]), Some(1), true));
    }

    #[test]
    fn a_peer_that_names_guest_after_guest_does_not_fill_the_memory() {
        let mut counted = Counted::default();
        for number in 1..=100 {
            let guest = if number % 5 == 0 { "web".into() } else { format!("guest{number}") };
            counted.take(&[event(number, &guest, checkpoint(Cause::Delay))]);
        }
        assert_eq!(counted.guests.len(), GUESTS_MAX);
        let web = counted.guests.iter().find(|(name, _)| name == "web");
        assert_eq!(web.unwrap().1.checkpoints[&Cause::Delay], 20, "one that is heard of stays");
    }
}
