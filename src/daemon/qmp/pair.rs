//! `xl-colo qemu`: two QEMUs, given the orders of [`crate::qmp::pair`] over their monitors.
//!
//! ```text
//!   xl-colo qemu ─┬─ monitor ─▶ primary          protect: step by step; one is refused ─▶ what was done is taken back
//!                 └─ monitor ─▶ secondary        failover: every order, whatever is refused; what was is told at the end
//! ```
//!
//! A QEMU has no heartbeat, so it is a person, or a cluster manager, that says who is lost; and nobody but they can see to it
//! that it is: a QEMU that was only cut off goes on.
//!
//! The trap: a monitor answers `migrate` before anything has migrated. A pair is one when both say so, and when one of
//! them does not, why is in `query-migrate`.

use super::client::{Monitor, MonitorError};
use crate::daemon::address::Address;
use crate::qmp::pair::{self, BadPair, Begin, Frame, Order, Pair, Side};
use serde_json::{Value, json};
use std::fmt;
use std::time::{Duration, Instant};

/// Between two looks at how far something is.
const LOOK: Duration = Duration::from_millis(100);
/// The first release that knows `reconnect-ms`.
const RECONNECT_MS: [u64; 3] = [9, 2, 0];

/// The monitors that are there, and how long each order may take.
#[derive(Debug, Default)]
pub struct Monitors {
    primary: Option<Monitor>,
    secondary: Option<Monitor>,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// It cannot be a pair.
    #[error(transparent)]
    Bad(#[from] BadPair),
    /// It was not named.
    #[error("this needs the monitor of the {0} (--{0})")]
    Missing(&'static str),
    /// A monitor did not carry something out.
    #[error("{}: {source}", side.name())]
    Monitor {
        /// Whose.
        side: Side,
        /// What it said.
        source: MonitorError,
    },
    /// A line for people was refused, in what it returned.
    #[error("{}: {command}: {why}", side.name())]
    Line {
        /// Whose.
        side: Side,
        /// The line.
        command: String,
        /// What it returned.
        why: String,
    },
    /// It is not built for this.
    #[error("{}: this QEMU has no {command}: it was built without replication", side.name())]
    Without {
        /// Whose.
        side: Side,
        /// What is missing.
        command: &'static str,
    },
    /// The guest did not get there.
    #[error("the guest does not reach COLO: {0}")]
    NotThere(String),
    /// A pair was not made, and what was begun is undone, but for this.
    #[error("{first}; and of what had been done this could not be taken back: {}", left.join("; "))]
    Left {
        /// What went wrong first.
        first: Box<PairError>,
        /// What could not be taken back.
        left: Vec<String>,
    },
    /// Orders of an end were refused. All others were carried out.
    #[error("{}", .0.join("; "))]
    Refused(Vec<String>),
    /// QEMU takes these checkpoints.
    #[error(
        "QEMU takes the checkpoints of this pair itself: protect with --checkpoint-delay-ms says how often at least"
    )]
    OwnCheckpoints,
    /// A disk has an error.
    #[error("{}: {why}: the last checkpoint is the last good one", side.name())]
    Disk {
        /// Whose.
        side: Side,
        /// What it says.
        why: String,
    },
}

impl Monitors {
    /// Connects to those that are named.
    pub async fn connect(
        primary: Option<&Address>,
        secondary: Option<&Address>,
        deadline: Duration,
    ) -> Result<Self, PairError> {
        let mut monitors = Self::default();
        for (side, at) in [(Side::Primary, primary), (Side::Secondary, secondary)] {
            if let Some(at) = at {
                let monitor = Monitor::connect_to(at, deadline).await;
                *monitors.slot(side) = Some(monitor.map_err(|source| PairError::Monitor { side, source })?);
            }
        }
        Ok(monitors)
    }

    fn slot(&mut self, side: Side) -> &mut Option<Monitor> {
        match side {
            Side::Primary => &mut self.primary,
            Side::Secondary => &mut self.secondary,
        }
    }

    fn of(&mut self, side: Side) -> Result<&mut Monitor, PairError> {
        self.slot(side).as_mut().ok_or(PairError::Missing(side.name()))
    }

    async fn ask(&mut self, side: Side, command: &str, arguments: &Value) -> Result<Value, PairError> {
        let done = self.of(side)?.execute(command, arguments).await;
        done.map_err(|source| PairError::Monitor { side, source })
    }

    async fn order(&mut self, side: Side, order: &Order) -> Result<(), PairError> {
        let returned = match self.ask(side, order.command, &order.arguments).await {
            Err(PairError::Monitor { source: MonitorError::Refused { source, .. }, .. })
                if order.is_done_by(&source) =>
            {
                return Ok(());
            }
            returned => returned?,
        };
        let command = || order.arguments["command-line"].as_str().unwrap_or_default().to_owned();
        let refused = |why: &str| PairError::Line { side, command: command(), why: why.to_owned() };
        order.refusal(&returned).map_or(Ok(()), |why| Err(refused(why)))
    }

    /// Makes the pair, or leaves both as they were. `patience` is for the guest's first way to the secondary.
    pub async fn protect(&mut self, pair: &Pair, begin: &Begin, patience: Duration) -> Result<Value, PairError> {
        let begin = Begin { reconnect_ms: self.of(Side::Secondary)?.version() >= RECONNECT_MS, ..begin.clone() };
        let steps = pair.protect(&begin)?;
        for side in [Side::Primary, Side::Secondary] {
            let known = self.ask(side, "query-commands", &json!({})).await?;
            let has = |command: &str| known.as_array().is_some_and(|all| all.iter().any(|one| one["name"] == command));
            if let Some(command) =
                ["x-blockdev-change", "xen-set-replication"].into_iter().find(|command| !has(command))
            {
                return Err(PairError::Without { side, command });
            }
        }
        let mut undo = Vec::new();
        let mut made = Ok(());
        for step in steps {
            made = self.order(step.side, &step.order).await;
            if made.is_err() {
                break;
            }
            undo.extend(step.undo.map(|order| (step.side, order)));
        }
        if made.is_ok() && begin.migrate.is_some() {
            made = self.until_colo(patience).await;
        }
        match made {
            Ok(()) => self.status().await,
            Err(first) => Err(self.take_back(first, undo).await),
        }
    }

    async fn take_back(&mut self, first: PairError, undo: Vec<(Side, Order)>) -> PairError {
        let mut left = Vec::new();
        for (side, order) in undo.into_iter().rev() {
            if let Err(error) = self.order(side, &order).await {
                left.push(error.to_string());
            }
        }
        if left.is_empty() { first } else { PairError::Left { first: Box::new(first), left } }
    }

    async fn until_colo(&mut self, patience: Duration) -> Result<(), PairError> {
        let began = Instant::now();
        loop {
            let mut there = true;
            for side in [Side::Primary, Side::Secondary] {
                let status = self.ask(side, "query-colo-status", &json!({})).await?;
                there &= status["mode"] == side.name();
            }
            if there {
                return Ok(());
            }
            let migrate = self.ask(Side::Primary, "query-migrate", &json!({})).await?;
            let status = migrate["status"].as_str().unwrap_or("none");
            if ["failed", "cancelled", "completed"].contains(&status) {
                let why = migrate["error-desc"].as_str().unwrap_or("QEMU does not say why; its log does");
                return Err(PairError::NotThere(format!("the migration {status}: {why}")));
            }
            if began.elapsed() >= patience {
                return Err(PairError::NotThere(format!("after {patience:?} the migration is {status}")));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Who carries the guest of this side. A replica of ours is in COLO too, and has no migration.
    async fn frame(&mut self, side: Side) -> Result<Frame, PairError> {
        let status = self.ask(side, "query-colo-status", &json!({})).await?;
        let migrates = self.ask(side, "query-migrate", &json!({})).await.is_ok();
        Ok(if migrates && status["mode"] != "none" { Frame::Migrate } else { Frame::Xen })
    }

    /// One checkpoint of a pair whose guest a Xen toolstack carries: both stand still, seal, and go on.
    pub async fn checkpoint(&mut self) -> Result<Value, PairError> {
        let sides = [Side::Primary, Side::Secondary];
        let mut stopped = Vec::new();
        for side in sides {
            if self.frame(side).await? == Frame::Migrate {
                return Err(PairError::OwnCheckpoints);
            }
        }
        let sealed = async {
            for side in sides {
                if self.ask(side, "query-status", &json!({})).await?["running"] == true {
                    self.ask(side, "stop", &json!({})).await?;
                    stopped.push(side);
                }
                let health = self.ask(side, "query-xen-replication-status", &json!({})).await?;
                if health["error"] == true {
                    let why = health["desc"].as_str().unwrap_or("a disk has an error").to_owned();
                    return Err(PairError::Disk { side, why });
                }
            }
            for step in pair::checkpoint() {
                self.order(step.side, &step.order).await?;
            }
            Ok(())
        };
        let sealed = sealed.await;
        for side in stopped {
            self.ask(side, "cont", &json!({})).await?;
        }
        sealed?;
        self.status().await
    }

    /// The survivor goes on alone. Every order is given, whatever becomes of the others; what was refused is the error.
    pub async fn failover(&mut self, pair: &Pair, lost: Side) -> Result<Value, PairError> {
        pair.check()?;
        let survivor = lost.other();
        let frame = self.frame(survivor).await?;
        self.pull_out(pair, survivor).await;
        let orders = pair.failover(lost, frame);
        self.all(orders.into_iter().map(|order| (survivor, order))).await?;
        *self.slot(lost) = None;
        self.status().await
    }

    /// Ends the pair: the guest goes on at the primary.
    pub async fn unprotect(&mut self, pair: &Pair) -> Result<Value, PairError> {
        pair.check()?;
        self.of(Side::Secondary)?;
        let frame = self.frame(Side::Primary).await?;
        let steps = pair.unprotect(frame);
        self.all(steps.into_iter().map(|step| (step.side, step.order))).await?;
        if frame == Frame::Migrate {
            self.secondary = None;
        }
        self.status().await
    }

    async fn all(&mut self, orders: impl Iterator<Item = (Side, Order)>) -> Result<(), PairError> {
        let mut refused = Vec::new();
        for (side, order) in orders {
            match self.order(side, &order).await {
                // Who is told to quit may be gone before it has answered.
                Err(PairError::Monitor { source: MonitorError::Gone { .. }, .. }) if order.command == "quit" => {}
                Err(error) => refused.push(error.to_string()),
                Ok(()) => {}
            }
        }
        if refused.is_empty() { Ok(()) } else { Err(PairError::Refused(refused)) }
    }

    /// Pulls the connections to a silent host out, in which orders would hang. Where there are none nothing is lost.
    async fn pull_out(&mut self, pair: &Pair, side: Side) {
        let Ok(known) = self.ask(side, "query-yank", &json!({})).await else { return };
        let known = known.as_array().map(Vec::as_slice).unwrap_or_default();
        let instances: Vec<_> = pair.connections(side).into_iter().filter(|one| known.contains(one)).collect();
        if !instances.is_empty()
            && let Err(error) = self.ask(side, "yank", &json!({ "instances": instances })).await
        {
            tracing::warn!(%error, "connections are not pulled out");
        }
    }

    /// Waits until a survivor's disks are merged: no block job is left.
    pub async fn until_merged(&mut self, side: Side) -> Result<Value, PairError> {
        while self.ask(side, "query-block-jobs", &json!({})).await?.as_array().is_some_and(|jobs| !jobs.is_empty()) {
            tokio::time::sleep(LOOK).await;
        }
        self.status().await
    }

    /// How those are that are there.
    pub async fn status(&mut self) -> Result<Value, PairError> {
        let mut all = json!({});
        for side in [Side::Primary, Side::Secondary] {
            if self.slot(side).is_none() {
                continue;
            }
            let guest = self.ask(side, "query-status", &json!({})).await?;
            let colo = self.ask(side, "query-colo-status", &json!({})).await?;
            let disks = self.ask(side, "query-xen-replication-status", &json!({})).await;
            // Where nothing is replicated QEMU refuses to say so; and only a Xen toolstack's pair says it at all.
            let disks = disks.unwrap_or_else(|error| json!({"error": true, "desc": error.to_string()}));
            let [major, minor, micro] = self.of(side)?.version();
            all[side.name()] = json!({
                "version": format!("{major}.{minor}.{micro}"),
                "guest": guest["status"],
                "colo": colo["mode"],
                "last_colo": colo["last-mode"],
                "disks": disks,
            });
        }
        Ok(all)
    }
}

/// A status for people: a line for each that is there.
#[derive(Debug)]
pub struct Shown<'a>(pub &'a Value);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sides = self.0.as_object().into_iter().flatten();
        for (at, (side, status)) in sides.enumerate() {
            let text = |key: &str| status[key].as_str().unwrap_or("?").to_owned();
            let disks = match (&status["disks"]["error"], status["disks"]["desc"].as_str()) {
                // It says so too when nothing is replicated.
                (Value::Bool(false), _) => "no error".to_owned(),
                (_, Some(why)) => why.to_owned(),
                _ => "?".into(),
            };
            let line = if at == 0 { "" } else { "\n" };
            write!(f, "{line}{side:<10} QEMU {}  guest {}  colo {}", text("version"), text("guest"), text("colo"))?;
            write!(f, "  disks: {disks}")?;
        }
        Ok(())
    }
}
