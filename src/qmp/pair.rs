//! Two QEMUs made a COLO pair, and a pair ended, in the monitor's own commands: what is ordered, where, in which order.
//!
//! ```text
//!                primary                                             secondary
//!  protect       –                                                   x-colo (frame migrate) · nbd-server-start, -add
//!                chardevs that listen                                chardevs that connect · redirectors · rewriter
//!                mirror · redirectors · colo-compare                 –
//!                drive_add, x-blockdev-change: each disk             –
//!                x-colo · migrate                   (frame migrate)  –
//!                xen-set-replication                (frame xen)      xen-set-replication, before the primary's
//!  failover      the disks' children, the network's objects,         nbd-server-stop,
//!                then x-colo-lost-heartbeat, or replication off      then x-colo-lost-heartbeat, or failover=true
//! ```
//!
//! The frame is who carries memory and device state: QEMU itself by `migrate`, or a Xen toolstack, of which QEMU replicates
//! the disks only. Each [`Step`] that begins something knows what ends it, so a pair that cannot be made whole is taken apart.
//!
//! The traps, each of which costs whoever types this by hand an evening: the child of a lost secondary is removed *before*
//! the heartbeat is said to be lost, or the guest's writes hang in it; the redirector that takes the guest's frames to the
//! comparator is made *after* the one that brings them back, since QEMU walks that direction backwards; an error of a line
//! for people is in what it returns; and QEMU calls a child `children.N`, where N counts from the one that was there.
//!
//! Source: QEMU `docs/COLO-FT.txt`, `docs/block-replication.txt`; libxl `libxl_colo_qdisk.c`.

use super::QmpError;
use super::commands::Listen;
use serde_json::{Value, json};

/// Longest id of an object or node here; QEMU's bound for node names is 31.
const ID_MAX_BYTES: usize = 20;

/// One of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Its guest is replicated.
    Primary,
    /// It has the copy.
    Secondary,
}

impl Side {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        }
    }

    /// The one that is left.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Primary => Self::Secondary,
            Self::Secondary => Self::Primary,
        }
    }
}

/// A disk of the pair.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// The primary's quorum.
    pub quorum: String,
    /// The secondary's image, which is the export's name too.
    pub image: String,
}

impl Disk {
    /// The primary's replication node.
    fn node(&self) -> String {
        format!("colo-{}", self.quorum)
    }

    /// The NBD client below it.
    fn client(&self) -> String {
        format!("nbd-{}", self.quorum)
    }
}

/// A network device of the pair: its id is the same on both sides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Net {
    /// The netdev.
    pub netdev: String,
    /// Where the primary gives copies of what its guest hears.
    pub mirror: Listen,
    /// Where the primary takes what the secondary's guest says.
    pub compare: Listen,
    /// Directory on the primary's host for the sockets by which QEMU speaks to itself.
    pub loop_dir: String,
}

/// A pair.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pair {
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its network devices.
    pub nets: Vec<Net>,
}

/// How a pair begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Begin {
    /// Where the secondary serves its disks.
    pub nbd: Option<Listen>,
    /// Where the secondary waits for the migration; without it, somebody else carries the guest's memory.
    pub migrate: Option<String>,
    /// QEMU's longest time between two checkpoints.
    pub checkpoint_delay_ms: Option<u32>,
    /// Whether the secondary knows `reconnect-ms` (since 9.2), and not `reconnect` any more.
    pub reconnect_ms: bool,
}

/// Who carries memory and device state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frame {
    /// QEMU, by `migrate`.
    Migrate,
    /// A Xen toolstack.
    Xen,
}

/// An order.
#[derive(Clone, PartialEq, Debug)]
pub struct Order {
    /// The command.
    pub command: &'static str,
    /// Its arguments.
    pub arguments: Value,
}

impl Order {
    fn new(command: &'static str, arguments: Value) -> Self {
        Self { command, arguments }
    }

    fn line(line: String) -> Self {
        Self::new("human-monitor-command", json!({ "command-line": line }))
    }

    /// What went wrong although the command was carried out: a line for people says so in what it returns.
    #[must_use]
    pub fn refusal<'a>(&self, returned: &'a Value) -> Option<&'a str> {
        let said = returned.as_str().filter(|_| self.command == "human-monitor-command")?.trim();
        (!said.is_empty() && said != "OK").then_some(said)
    }

    /// Whether an error means that it was carried out.
    #[must_use]
    pub fn is_done_by(&self, error: &QmpError) -> bool {
        self.command == "xen-set-replication"
            && self.arguments["enable"] == false
            && self.arguments["failover"] != true
            && error.desc == CANCELLED
    }
}

/// What QEMU says of every secondary whose replication is stopped without a failover. It is stopped then.
const CANCELLED: &str = "Backup job was cancelled unexpectedly";

/// An order for one of the two, and what takes it back.
#[derive(Clone, PartialEq, Debug)]
pub struct Step {
    /// Whose.
    pub side: Side,
    /// It.
    pub order: Order,
    /// What takes it back.
    pub undo: Option<Order>,
}

/// What a pair cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadPair {
    /// It has nothing to replicate.
    #[error("there is nothing to replicate: name the disks (--disk QUORUM=IMAGE)")]
    Nothing,
    /// An id that would not stay one.
    #[error("{0:?} is no id: a letter, then letters, digits, '-', '.' or '_', {ID_MAX_BYTES} at most")]
    Id(String),
    /// The same twice.
    #[error("{0} is named twice")]
    Twice(String),
    /// Disks without a server.
    #[error("the disks need --nbd: where the secondary serves them, as the primary reaches it")]
    NoServer,
    /// A socket path that QEMU's options cannot carry.
    #[error("{0:?} cannot be given to QEMU: no spaces or control characters")]
    Path(String),
}

impl Pair {
    /// Whether it can be.
    pub fn check(&self) -> Result<(), BadPair> {
        if self.disks.is_empty() {
            return Err(BadPair::Nothing);
        }
        let mut seen = std::collections::BTreeSet::new();
        let disks = self.disks.iter().flat_map(|disk| [("disk", &disk.quorum), ("image", &disk.image)]);
        let nets = self.nets.iter().map(|net| ("netdev", &net.netdev));
        for (what, id) in disks.chain(nets) {
            let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            if !id.starts_with(|c: char| c.is_ascii_alphabetic()) || !id.chars().all(fits) || id.len() > ID_MAX_BYTES {
                return Err(BadPair::Id(id.clone()));
            }
            if !seen.insert((what, id)) {
                return Err(BadPair::Twice(format!("{what} {id}")));
            }
        }
        Ok(())
    }

    /// What makes it.
    pub fn protect(&self, begin: &Begin) -> Result<Vec<Step>, BadPair> {
        self.check()?;
        let nbd = begin.nbd.as_ref().ok_or(BadPair::NoServer)?;
        let server = drive_server(nbd)?;
        let mut steps = Vec::new();
        let mut add = |side, order, undo| steps.push(Step { side, order, undo });
        if begin.migrate.is_some() {
            add(Side::Secondary, colo(true), Some(colo(false)));
        }
        let stop = Order::new("nbd-server-stop", json!({}));
        add(Side::Secondary, Order::new("nbd-server-start", json!({"addr": address(nbd)})), Some(stop));
        for disk in &self.disks {
            let serve = json!({"device": disk.image, "writable": true});
            add(Side::Secondary, Order::new("nbd-server-add", serve), None);
        }
        for net in &self.nets {
            net.primary(&mut |order, undo| add(Side::Primary, order, undo));
            net.secondary(begin.reconnect_ms, &mut |order, undo| add(Side::Secondary, order, undo));
        }
        for disk in &self.disks {
            let (node, client) = (disk.node(), disk.client());
            let drive = format!(
                "drive_add -n buddy driver=replication,mode=primary,node-name={node},file.driver=nbd,\
                 file.node-name={client},file.export={},{server}",
                disk.image
            );
            add(Side::Primary, Order::line(drive), Some(disk.delete()));
            let child = json!({"parent": disk.quorum, "node": node});
            add(Side::Primary, Order::new("x-blockdev-change", child), Some(disk.let_go()));
        }
        match &begin.migrate {
            Some(uri) => {
                add(Side::Primary, colo(true), Some(colo(false)));
                if let Some(delay_ms) = begin.checkpoint_delay_ms {
                    let delay = json!({"x-checkpoint-delay": delay_ms});
                    add(Side::Primary, Order::new("migrate-set-parameters", delay), None);
                }
                let cancel = Order::new("migrate_cancel", json!({}));
                add(Side::Primary, Order::new("migrate", json!({"uri": uri})), Some(cancel));
            }
            None => {
                for side in [Side::Secondary, Side::Primary] {
                    add(side, replication(true, side, None), Some(replication(false, side, None)));
                }
            }
        }
        Ok(steps)
    }

    /// What the survivor is told when the other one is lost.
    #[must_use]
    pub fn failover(&self, lost: Side, frame: Frame) -> Vec<Order> {
        let survivor = lost.other();
        let over = match frame {
            Frame::Migrate => Order::new("x-colo-lost-heartbeat", json!({})),
            Frame::Xen => replication(false, survivor, (survivor == Side::Secondary).then_some(true)),
        };
        let disks = match survivor {
            Side::Primary => self.disks.iter().flat_map(|disk| [disk.let_go(), disk.delete()]).collect(),
            Side::Secondary => vec![Order::new("nbd-server-stop", json!({}))],
        };
        let nets = self.nets.iter().flat_map(|net| net.removal(survivor));
        // A primary's packets wait in the comparator until it goes; a secondary may speak for itself once it has taken over.
        // A Xen toolstack's replication must be off before its child can go.
        match (survivor, frame) {
            (Side::Primary, Frame::Migrate) => disks.into_iter().chain(nets).chain([over]).collect(),
            (Side::Primary, Frame::Xen) => [over].into_iter().chain(disks).chain(nets).collect(),
            (Side::Secondary, _) => disks.into_iter().chain([over]).chain(nets).collect(),
        }
    }

    /// What ends the pair while both live: the guest goes on at the primary, and the secondary has none.
    #[must_use]
    pub fn unprotect(&self, frame: Frame) -> Vec<Step> {
        let on = |side| move |order| Step { side, order, undo: None };
        let mut steps: Vec<_> = self.failover(Side::Secondary, frame).into_iter().map(on(Side::Primary)).collect();
        let secondary = match frame {
            // What it has loaded is a guest that must never run.
            Frame::Migrate => vec![Order::new("quit", json!({}))],
            Frame::Xen => {
                let mut orders = vec![replication(false, Side::Secondary, None)];
                orders.push(Order::new("nbd-server-stop", json!({})));
                orders.extend(self.nets.iter().flat_map(|net| net.removal(Side::Secondary)));
                orders
            }
        };
        steps.extend(secondary.into_iter().map(on(Side::Secondary)));
        steps
    }

    /// The connections of a side, by which it may hang on a host that is silent.
    #[must_use]
    pub fn connections(&self, side: Side) -> Vec<Value> {
        let disks = self.disks.iter().filter(|_| side == Side::Primary);
        let disks = disks.map(|disk| json!({"type": "block-node", "node-name": disk.client()}));
        disks.chain([json!({"type": "migration"})]).collect()
    }
}

/// What both are told at a checkpoint, while their guests stand still: the primary's writes are on the wire first.
#[must_use]
pub fn checkpoint() -> [Step; 2] {
    let seal = || Order::new("xen-colo-do-checkpoint", json!({}));
    [Side::Primary, Side::Secondary].map(|side| Step { side, order: seal(), undo: None })
}

fn colo(on: bool) -> Order {
    let capability = json!([{"capability": "x-colo", "state": on}]);
    Order::new("migrate-set-capabilities", json!({ "capabilities": capability }))
}

fn replication(enable: bool, side: Side, failover: Option<bool>) -> Order {
    let mut arguments = json!({"enable": enable, "primary": side == Side::Primary});
    if let Some(failover) = failover {
        arguments["failover"] = failover.into();
    }
    Order::new("xen-set-replication", arguments)
}

fn address(listen: &Listen) -> Value {
    match listen {
        Listen::Inet { host, port } => json!({"type": "inet", "data": {"host": host, "port": port}}),
        Listen::Unix { path } => json!({"type": "unix", "data": {"path": path}}),
    }
}

/// The same as options of a drive. What is in them is split at commas and at blanks.
fn drive_server(listen: &Listen) -> Result<String, BadPair> {
    let value = |text: &String| {
        let bad = text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control());
        if bad { Err(BadPair::Path(text.clone())) } else { Ok(text.replace(',', ",,")) }
    };
    Ok(match listen {
        Listen::Inet { host, port } => {
            format!("file.server.type=inet,file.server.host={},file.server.port={}", value(host)?, value(port)?)
        }
        Listen::Unix { path } => format!("file.server.type=unix,file.server.path={}", value(path)?),
    })
}

impl Disk {
    fn let_go(&self) -> Order {
        Order::new("x-blockdev-change", json!({"parent": self.quorum, "child": "children.1"}))
    }

    fn delete(&self) -> Order {
        Order::line(format!("drive_del {}", self.node()))
    }
}

type Add<'a> = &'a mut dyn FnMut(Order, Option<Order>);

impl Net {
    fn id(&self, what: &str) -> String {
        format!("{what}-{}", self.netdev)
    }

    fn loop_socket(&self, what: &str) -> Listen {
        Listen::Unix { path: format!("{}/{}.sock", self.loop_dir, self.id(what)) }
    }

    /// The comparator and what leads to it.
    fn primary(&self, add: Add<'_>) {
        for (what, at) in [("mirror", &self.mirror), ("compare", &self.compare)] {
            chardev(add, &self.id(what), at, None);
        }
        for what in ["in", "out"] {
            let at = self.loop_socket(what);
            chardev(add, &self.id(what), &at, None);
            chardev(add, &self.id(&format!("{what}c")), &at, Some(Reconnect::Never));
        }
        let netdev = &self.netdev;
        object(
            add,
            "filter-mirror",
            &self.id("m"),
            json!({"netdev": netdev, "queue": "tx", "outdev": self.id("mirror")}),
        );
        let back = json!({"netdev": netdev, "queue": "rx", "indev": self.id("outc")});
        object(add, "filter-redirector", &self.id("back"), back);
        let away = json!({"netdev": netdev, "queue": "rx", "outdev": self.id("in")});
        object(add, "filter-redirector", &self.id("away"), away);
        object(add, "iothread", &self.id("thread"), json!({}));
        let compare = json!({
            "primary_in": self.id("inc"),
            "secondary_in": self.id("compare"),
            "outdev": self.id("out"),
            "iothread": self.id("thread"),
        });
        object(add, "colo-compare", &self.id("judge"), compare);
    }

    /// What leads from the mirror to the guest, and from it to the comparator.
    fn secondary(&self, reconnect_ms: bool, add: Add<'_>) {
        let reconnect = if reconnect_ms { Reconnect::Milliseconds } else { Reconnect::Seconds };
        chardev(add, &self.id("red"), &self.mirror, Some(reconnect));
        chardev(add, &self.id("say"), &self.compare, Some(reconnect));
        let netdev = &self.netdev;
        let hear = json!({"netdev": netdev, "queue": "tx", "indev": self.id("red")});
        object(add, "filter-redirector", &self.id("hear"), hear);
        let speak = json!({"netdev": netdev, "queue": "rx", "outdev": self.id("say")});
        object(add, "filter-redirector", &self.id("speak"), speak);
        object(add, "filter-rewriter", &self.id("rew"), json!({"netdev": netdev, "queue": "all"}));
    }

    /// What is taken away from a survivor. A secondary's rewriter stays: there are connections that need it.
    fn removal(&self, survivor: Side) -> Vec<Order> {
        let (objects, chardevs): (&[&str], &[&str]) = match survivor {
            Side::Primary => {
                (&["judge", "thread", "m", "away", "back"], &["mirror", "compare", "inc", "in", "outc", "out"])
            }
            Side::Secondary => (&["hear", "speak"], &["red", "say"]),
        };
        let objects = objects.iter().map(|what| delete("object-del", &self.id(what)));
        objects.chain(chardevs.iter().map(|what| delete("chardev-remove", &self.id(what)))).collect()
    }
}

#[derive(Clone, Copy)]
enum Reconnect {
    Never,
    Seconds,
    Milliseconds,
}

fn delete(command: &'static str, id: &str) -> Order {
    Order::new(command, json!({ "id": id }))
}

fn object(add: Add<'_>, kind: &str, id: &str, mut properties: Value) {
    properties["qom-type"] = kind.into();
    properties["id"] = id.into();
    add(Order::new("object-add", properties), Some(delete("object-del", id)));
}

/// A socket that listens, or with `connect` one that connects.
fn chardev(add: Add<'_>, id: &str, at: &Listen, connect: Option<Reconnect>) {
    let mut socket = json!({"addr": address(at), "server": connect.is_none()});
    match connect {
        None => socket["wait"] = false.into(),
        Some(Reconnect::Never) => {}
        Some(Reconnect::Seconds) => socket["reconnect"] = 1.into(),
        Some(Reconnect::Milliseconds) => socket["reconnect-ms"] = 1000.into(),
    }
    let backend = json!({"type": "socket", "data": socket});
    add(Order::new("chardev-add", json!({"id": id, "backend": backend})), Some(delete("chardev-remove", id)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> Pair {
        let inet = |port: u16| Listen::Inet { host: "10.0.0.1".into(), port: port.to_string() };
        let net = Net { netdev: "hn0".into(), mirror: inet(9003), compare: inet(9004), loop_dir: "/run/c".into() };
        let disk = |quorum: &str, image: &str| Disk { quorum: quorum.into(), image: image.into() };
        Pair { disks: vec![disk("d0", "parent0"), disk("d1", "parent1")], nets: vec![net] }
    }

    fn begin() -> Begin {
        let nbd = Some(Listen::Unix { path: "/run/a,b".into() });
        Begin { nbd, migrate: Some("tcp:b:9998".into()), checkpoint_delay_ms: None, reconnect_ms: false }
    }

    fn at(orders: &[&Order], wanted: &str) -> usize {
        let is_it = |order: &&Order| format!("{} {}", order.command, order.arguments).contains(wanted);
        orders.iter().position(is_it).unwrap_or_else(|| panic!("no {wanted} in {orders:?}"))
    }

    #[test]
    fn the_disks_are_served_before_they_are_written_to_and_written_to_before_the_guest_moves() {
        let steps = pair().protect(&begin()).unwrap();
        let orders: Vec<_> = steps.iter().map(|step| &step.order).collect();
        let order = ["nbd-server-start", r#""device":"parent1""#, "colo-d0,", r#""node":"colo-d1""#, "migrate {"];
        let places: Vec<_> = order.iter().map(|wanted| at(&orders, wanted)).collect();
        assert!(places.is_sorted(), "{places:?}");
        // QEMU walks what the guest says backwards.
        assert!(at(&orders, r#""id":"back-hn0""#) < at(&orders, r#""id":"away-hn0""#));
        // The ports that listen are there before somebody connects to them.
        assert!(at(&orders, r#""id":"mirror-hn0""#) < at(&orders, r#""id":"red-hn0""#));
        assert!(orders[at(&orders, "colo-d0,")].arguments.to_string().contains("file.server.path=/run/a,,b"));
    }

    #[test]
    fn what_is_begun_can_be_taken_back() {
        let steps = pair().protect(&begin()).unwrap();
        let kept = ["nbd-server-add", "migrate-set-parameters"];
        for step in &steps {
            assert_eq!(step.undo.is_none(), kept.contains(&step.order.command), "{step:?}");
        }
    }

    #[test]
    fn of_a_xen_pair_the_secondary_is_ready_first() {
        let steps = pair().protect(&Begin { migrate: None, ..begin() }).unwrap();
        let tail: Vec<_> = steps.iter().rev().take(2).map(|step| (step.side, step.order.arguments.clone())).collect();
        assert_eq!(tail[1], (Side::Secondary, json!({"enable": true, "primary": false})));
        assert_eq!(tail[0], (Side::Primary, json!({"enable": true, "primary": true})));
        assert!(steps.iter().all(|step| !step.order.command.starts_with("migrate")));
    }

    #[test]
    fn a_lost_secondary_is_let_go_of_before_qemu_is_told() {
        let orders = pair().failover(Side::Secondary, Frame::Migrate);
        let orders: Vec<_> = orders.iter().collect();
        assert!(at(&orders, r#""parent":"d1""#) < at(&orders, "drive_del colo-d1"));
        assert!(at(&orders, "drive_del colo-d1") < at(&orders, r#"object-del {"id":"judge-hn0"}"#));
        assert_eq!(at(&orders, "x-colo-lost-heartbeat"), orders.len() - 1);
    }

    #[test]
    fn a_lost_primary_can_write_no_more_before_the_secondary_goes_on() {
        for (frame, over) in [(Frame::Migrate, "x-colo-lost-heartbeat"), (Frame::Xen, r#""failover":true"#)] {
            let orders = pair().failover(Side::Primary, frame);
            let orders: Vec<_> = orders.iter().collect();
            assert_eq!((at(&orders, "nbd-server-stop"), at(&orders, over)), (0, 1));
            assert!(orders.iter().all(|order| !order.arguments.to_string().contains("rew-hn0")), "{orders:?}");
        }
    }

    #[test]
    fn what_is_no_pair_is_refused() {
        let refused = |change: &dyn Fn(&mut Pair)| {
            let mut pair = pair();
            change(&mut pair);
            pair.protect(&begin()).unwrap_err()
        };
        assert_eq!(refused(&|pair| pair.disks.clear()), BadPair::Nothing);
        assert_eq!(refused(&|pair| pair.disks[0].quorum = "a b".into()), BadPair::Id("a b".into()));
        assert_eq!(refused(&|pair| pair.disks[0].quorum = "a,b".into()), BadPair::Id("a,b".into()));
        assert_eq!(refused(&|pair| pair.disks[1].image = "parent0".into()), BadPair::Twice("image parent0".into()));
        assert_eq!(pair().protect(&Begin { nbd: None, ..begin() }), Err(BadPair::NoServer));
        let nbd = Some(Listen::Unix { path: "/a b".into() });
        assert_eq!(pair().protect(&Begin { nbd, ..begin() }), Err(BadPair::Path("/a b".into())));
    }

    #[test]
    fn one_error_of_one_order_is_none() {
        let error = QmpError::generic(CANCELLED);
        assert!(replication(false, Side::Secondary, None).is_done_by(&error));
        assert!(!replication(false, Side::Secondary, None).is_done_by(&QmpError::generic("other")));
        assert!(!replication(false, Side::Secondary, Some(true)).is_done_by(&error));
        assert!(!replication(true, Side::Secondary, None).is_done_by(&error));
    }

    #[test]
    fn what_a_line_says_is_why_it_failed() {
        let line = Order::line("drive_add".into());
        assert_eq!(line.refusal(&json!("OK\r\n")), None);
        assert_eq!(line.refusal(&json!("")), None);
        assert_eq!(line.refusal(&json!("Duplicate nodes\r\n")), Some("Duplicate nodes"));
        assert_eq!(colo(true).refusal(&json!("not a line")), None);
    }
}
