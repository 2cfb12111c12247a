//! The page that is scraped: every metric's name, what it is, and its values.
//!
//! | prefix `xen_colo_` | from |
//! |---|---|
//! | `checkpoint_*`, `divergences`, `link_losses`, `takeovers` | events, as [`Counted`] has them |
//! | `*_total` of bytes, pages and packets | the status's totals, which only grow |
//! | everything else | the status, as it is now |
//!
//! Pure. Labels are `host`, `guest` and one of a fixed set of words; never an address or a sentence. A flow is counted with all
//! others of its service: protocol, port, and whose port that is, of sixteen services of a guest's, and of the rest as one. What
//! was not measured has no line. The library writes OpenMetrics; [`classic`] turns that into the older format, which has the name of a
//! counter with its `_total` where OpenMetrics has it without, and no end mark.

use super::counted::{Counted, Guest, LINKS, STEPS};
use crate::colo::Cause;
use crate::compare::ServicePort;
use crate::daemon::events::Progress;
use crate::daemon::status::{Disk, Health, LockStep, PairRole, PeerHealth, Status, Totals};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use std::fmt;

/// Every value of a health, as it is written.
const HEALTHS: [Health; 9] = [
    Health::Empty,
    Health::Unprotected,
    Health::Protected,
    Health::Degraded,
    Health::StandingBy,
    Health::Undecided,
    Health::TakenOver,
    Health::Stopped,
    Health::Failed,
];

type Labels = Vec<(&'static str, String)>;

/// A value of a status that is one number, if it was measured: its metric, and what that is.
type One<From, To> = (&'static str, &'static str, fn(&From) -> Option<To>);

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1e3
}

fn peer(status: &Status, of: fn(&PeerHealth) -> u64) -> Option<f64> {
    status.peer_health.as_ref().map(|peer| seconds(of(peer)))
}

/// Whether the links of a pair are there, and the guest runs here.
fn protects(status: &Status) -> bool {
    status.peer_health.is_some() && status.role == Some(PairRole::Primary)
}

/// Of a host that stands by or has no guest it cannot be said.
fn protected(status: &Status) -> Option<f64> {
    match status.health {
        Health::Protected | Health::Degraded => Some(1.0),
        Health::Unprotected | Health::Undecided | Health::TakenOver => Some(0.0),
        Health::Empty | Health::StandingBy | Health::Stopped | Health::Failed => None,
    }
}

fn lock_step(status: &Status, of: fn(&LockStep) -> bool) -> Option<f64> {
    status.lock_step.as_ref().map(|lock_step| f64::from(of(lock_step)))
}

const GAUGES: [One<Status, f64>; 11] = [
    ("xen_colo_protected", "Whether the peer could go on with the guest that runs here", protected),
    ("xen_colo_generation", "The generation in force here", |it| (it.generation > 0).then_some(it.generation as f64)),
    ("xen_colo_paused", "Whether the guest was stopped by an order", |it| {
        it.guest.as_ref().map(|_| f64::from(it.paused))
    }),
    ("xen_colo_recovery_point_age_seconds", "What a takeover now would go back by", |it| {
        it.recovery_point_ms.map(seconds)
    }),
    ("xen_colo_heartbeat_age_seconds", "Since the peer was heard", |it| peer(it, |peer| peer.heartbeat_age_ms)),
    ("xen_colo_heartbeat_confirmed_age_seconds", "Since a beat was sent that the peer confirmed", |it| {
        peer(it, |peer| peer.confirmed_age_ms)
    }),
    ("xen_colo_heartbeat_limit_seconds", "The age at which the peer is lost", |it| peer(it, |peer| peer.lost_after_ms)),
    ("xen_colo_dirty_pages_per_second", "Pages the guest writes to in a second, over the last checkpoints", |it| {
        it.dirty_pages_per_s.map(|rate| rate as f64)
    }),
    ("xen_colo_packets_waiting", "Packets of the guest that wait now", |it| {
        protects(it).then_some(it.packets.waiting as f64)
    }),
    ("xen_colo_lock_step_buffering", "Whether lock-step is given up for now", |it| {
        lock_step(it, |lock_step| lock_step.buffering)
    }),
    ("xen_colo_disk_errors", "Errors of the disks that are not over", |it| {
        it.guest.as_ref().map(|_| it.disk.errors.len() as f64)
    }),
];

const COUNTERS: [One<Totals, u64>; 7] = [
    ("xen_colo_memory_bytes", "Memory that was to be sent, as it is in the guest", |it| it.memory_bytes),
    ("xen_colo_received_pages", "Pages that came from the primary", |it| it.received_pages),
    ("xen_colo_packets_compared", "Packets released because the secondary produced the same", |it| it.compared),
    ("xen_colo_packets_released", "Packets released, for whatever reason", |it| it.released),
    ("xen_colo_packets_held", "Packets that had to wait", |it| it.held),
    ("xen_colo_packets_stale", "Secondary packets dropped because their epoch had ended", |it| it.dropped_stale),
    ("xen_colo_lock_step_fallbacks", "How often lock-step was given up for a while", |it| it.lock_step_given_up),
];

/// One scrape.
#[derive(Debug)]
struct Page {
    counted: Counted,
    status: Status,
}

/// Writes the metrics of a family, its descriptor before the first.
struct Family<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
}

impl Family<'_, '_> {
    fn gauges(&mut self, name: &str, help: &str, values: Vec<(Labels, f64)>) -> fmt::Result {
        if values.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, &format!("{help}."), None, MetricType::Gauge)?;
        values.iter().try_for_each(|(labels, value)| metric.encode_family(labels)?.encode_gauge(value))
    }

    fn counters(&mut self, name: &str, help: &str, values: Vec<(Labels, u64)>) -> fmt::Result {
        if values.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, &format!("{help}."), None, MetricType::Counter)?;
        values.iter().try_for_each(|(labels, value)| {
            metric.encode_family(labels)?.encode_counter::<NoLabelSet, u64, f64>(value, None)
        })
    }
}

impl Page {
    /// The labels of the guest that is here, and one more.
    fn labels(&self, more: Option<(&'static str, &str)>) -> Labels {
        self.labels_of(self.status.guest.as_deref(), more)
    }

    fn labels_of(&self, guest: Option<&str>, more: Option<(&'static str, &str)>) -> Labels {
        let labels = [Some(("host", &self.status.host[..])), guest.map(|guest| ("guest", guest)), more];
        labels.into_iter().flatten().map(|(key, value)| (key, value.to_owned())).collect()
    }

    fn now(&self, to: &mut Family<'_, '_>) -> fmt::Result {
        let status = &self.status;
        let version = Some(("version", env!("CARGO_PKG_VERSION")));
        let build = vec![(self.labels_of(None, version), 1.0)];
        to.gauges("xen_colo_build_info", "The version that runs", build)?;
        let health = |health: Health| (self.labels(Some(("state", health.name()))), f64::from(health == status.health));
        to.gauges("xen_colo_health", "How safe the guest is: 1 for the state it is in", HEALTHS.map(health).into())?;
        let roles = [PairRole::Primary, PairRole::Secondary]
            .map(|role| (self.labels(Some(("role", role.name()))), f64::from(status.role == Some(role))));
        to.gauges("xen_colo_role", "Which side of a pair this host is, or was last", roles.into())?;
        for (name, help, of) in GAUGES {
            let values = of(status).map(|value| (self.labels(None), value));
            to.gauges(name, help, values.into_iter().collect())?;
        }
        let queues = [
            ("stream", status.queues.stream_bytes, status.peer_health.is_some()),
            ("packets", status.queues.packets_bytes, status.peer_health.is_some()),
            ("disk", status.queues.disk_bytes, protects(status)),
            ("network", status.queues.network_bytes, status.guest.is_some()),
        ];
        let queues = queues.into_iter().filter(|(.., is_there)| *is_there);
        let queues = queues.map(|(queue, bytes, _)| (self.labels(Some(("queue", queue))), bytes as f64));
        to.gauges("xen_colo_queue_bytes", "What waits to be sent", queues.collect())?;
        let disks = |fits: bool, of: fn(&Disk) -> u64| {
            let disks = status.disks.iter().filter(|_| fits);
            let name = |disk: &Disk| self.labels(disk.name.as_deref().map(|name| ("disk", name)));
            disks.map(|disk| (name(disk), of(disk) as f64)).collect()
        };
        let lag = disks(protects(status), |disk| disk.waiting_bytes);
        to.gauges("xen_colo_disk_lag_bytes", "Writes of the guest that the peer's disk does not have yet", lag)?;
        let is_replica = status.role == Some(PairRole::Secondary);
        let unmerged = disks(is_replica, |disk| disk.waiting_bytes);
        to.gauges("xen_colo_disk_unmerged_bytes", "Writes that wait for the replica's image", unmerged)?;
        let work = |of: fn(&Progress) -> u64| {
            let work = status.work.iter();
            work.map(|work| (self.labels(Some(("work", work.work.name()))), of(work) as f64)).collect()
        };
        to.gauges("xen_colo_work_done_bytes", "What is done of work that takes its time", work(|it| it.done_bytes))?;
        to.gauges("xen_colo_work_total_bytes", "How much such work is in all", work(|it| it.total_bytes))
    }

    fn totals(&self, to: &mut Family<'_, '_>) -> fmt::Result {
        let Status { totals, packets, .. } = &self.status;
        for (name, help, of) in COUNTERS {
            to.counters(name, help, of(totals).map(|value| (self.labels(None), value)).into_iter().collect())?;
        }
        let wire = [("stream", totals.stream_bytes), ("disk", totals.disk_bytes)];
        let wire = wire.into_iter().filter_map(|(link, bytes)| Some((self.labels(Some(("link", link))), bytes?)));
        to.counters("xen_colo_wire_bytes", "What was sent to the peer", wire.collect())?;
        let dropped = vec![(self.labels_of(None, None), packets.dropped_network)];
        to.counters("xen_colo_network_drops", "Frames for the network that its queue could not take", dropped)?;
        let missed = vec![(self.labels_of(None, None), self.counted.missed)];
        to.counters("xen_colo_events_missed", "Events that these metrics do not count: they came too fast", missed)
    }

    /// The values of all guests that were counted.
    fn of_guests<T>(&self, of: impl Fn(&Guest) -> Vec<(Option<(&'static str, String)>, T)>) -> Vec<(Labels, T)> {
        let guests = self.counted.guests.iter();
        let values = guests.flat_map(|(name, guest)| of(guest).into_iter().map(move |value| (name, value)));
        values
            .map(|(name, (label, value))| {
                let more = label.as_ref().map(|(key, value)| (*key, &value[..]));
                (self.labels_of(Some(name), more), value)
            })
            .collect()
    }

    fn events(&self, to: &mut Family<'_, '_>) -> fmt::Result {
        let causes = |label: &'static str, fits: fn(Cause) -> bool| {
            self.of_guests(move |guest| {
                let causes = guest.checkpoints.iter().filter(|(cause, _)| fits(**cause));
                causes.map(|(cause, count)| (Some((label, cause.to_string())), *count)).collect()
            })
        };
        let all = causes("cause", |_| true);
        to.counters("xen_colo_checkpoints", "Checkpoints that the peer came to own", all)?;
        let differences = causes("reason", Cause::is_difference);
        to.counters("xen_colo_divergences", "Checkpoints that the two guests' output asked for", differences)?;
        let services = self.counted.guests.iter().flat_map(|(name, guest)| {
            guest.services.iter().map(move |((service, reason), count)| {
                let (port, at) = match service.port {
                    ServicePort::Guest(port) => (port.to_string(), "guest"),
                    ServicePort::Peer(port) => (port.to_string(), "peer"),
                    ServicePort::None => (String::new(), ""),
                };
                let mut labels = self.labels_of(Some(name), Some(("protocol", &service.protocol)));
                labels.extend([("port", port), ("at", at.to_owned()), ("reason", reason.to_string())]);
                (labels, *count)
            })
        });
        to.counters(
            "xen_colo_service_divergences",
            "Checkpoints that a difference in a flow of a service was the cause of",
            services.collect(),
        )?;
        let pages = self.of_guests(|guest| guest.pages.into_iter().map(|pages| (None, pages)).collect());
        to.counters("xen_colo_checkpoint_pages", "Dirty pages in checkpoints", pages)?;
        let losses = self.of_guests(|guest| {
            let losses = guest.link_losses.into_iter().flat_map(|losses| LINKS.into_iter().zip(losses));
            losses.map(|(link, count)| (Some(("link", link.to_owned())), count)).collect()
        });
        to.counters("xen_colo_link_losses", "Connections of the pair that were lost", losses)?;
        let takeovers = self.of_guests(|guest| guest.takeovers.into_iter().map(|count| (None, count)).collect());
        to.counters("xen_colo_takeovers", "How often the guest went on here, alone", takeovers)?;
        for (at, (name, help, _)) in STEPS.into_iter().enumerate() {
            self.histogram(to, name, help, |guest| guest.steps[at].as_ref())?;
        }
        let (name, help) = ("xen_colo_checkpoint_load_seconds", "How long a secondary took to load a checkpoint");
        self.histogram(to, name, help, |guest| guest.load.as_ref())
    }

    fn histogram(
        &self,
        to: &mut Family<'_, '_>,
        name: &str,
        help: &str,
        of: impl Fn(&Guest) -> Option<&prometheus_client::metrics::histogram::Histogram>,
    ) -> fmt::Result {
        let guests: Vec<_> = self.counted.guests.iter().filter_map(|(name, guest)| Some((name, of(guest)?))).collect();
        if guests.is_empty() {
            return Ok(());
        }
        let mut metric = to.encoder.encode_descriptor(name, &format!("{help}."), None, MetricType::Histogram)?;
        guests.into_iter().try_for_each(|(guest, histogram)| {
            histogram.encode(metric.encode_family(&self.labels_of(Some(guest), None))?)
        })
    }
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Family { encoder: &mut encoder };
        self.now(&mut to)?;
        self.totals(&mut to)?;
        self.events(&mut to)
    }
}

/// The page in OpenMetrics' text format.
pub(super) fn open_metrics(counted: Counted, status: Status) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Page { counted, status }));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// The same in the Prometheus text format 0.0.4.
pub(super) fn classic(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 1024);
    let mut lines = open_metrics.lines().peekable();
    while let Some(line) = lines.next() {
        if line == "# EOF" {
            break;
        }
        // A family is its help, then its type.
        let kind = if line.starts_with("# HELP ") { lines.peek().copied().unwrap_or_default() } else { line };
        match line.splitn(4, ' ').collect::<Vec<_>>()[..] {
            ["#", word, name, rest] if kind.starts_with("# TYPE ") && kind.ends_with(" counter") => {
                text.push_str(&format!("# {word} {name}_total {rest}"));
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}
