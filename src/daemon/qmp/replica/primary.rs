//! The primary's half: a guest's disk whose writes go to the secondary's export as well.
//!
//! ```text
//!   the guest ── NBD ─▶ quorum: mirror ─▶ its own image
//!                                 └─ queue ─▶ carry ─▶ Link ─ NBD ─▶ the secondary's export
//! ```
//!
//! ```text
//! a node in | on                                         | does                                         | goes to
//! ----------|--------------------------------------------|----------------------------------------------|--------
//! –         | drive_add, blockdev-add                    | connects to the export                       | Idle
//! Idle      | x-blockdev-change node                     | from now on remembers what is written        | Idle
//! Idle      | xen-set-replication enable, primary=true   | sends what was remembered; writes follow     | Running
//! Running   | xen-colo-do-checkpoint · stop · the status | waits until every write before is answered   | Running
//! Running   | an error · the connection ends             | latches it, says so; the guest goes on alone | Running
//! Running   | disable · heartbeat lost · child removed   | lets go                                      | Done
//! ```
//!
//! QEMU's quorum makes the guest wait for the secondary with every write; here they wait in a queue, and whoever must know that
//! they are there asks. libxl's secondary seals a checkpoint as soon as it may, before its primary is told of one: what
//! libxl tells the primary before that, `stop` and `query-xen-replication-status`, waits too.
//!
//! Two traps. A secondary that comes back at the same address is another one, so a connection that is lost is not made
//! again. And nobody here knows when the secondary has sealed: who lets the guest run before that puts the next
//! checkpoint's first writes into this one, as with a QEMU.
//!
//! Source: QEMU `block/replication.c`, `docs/block-replication.txt`; libxl `libxl_colo_save.c`, `libxl_colo_qdisk.c`.

use super::drives::Source;
use super::exports::{address, in_words};
use crate::daemon::engine_clock;
use crate::daemon::links::disk::{refused, submit};
use crate::daemon::links::lock;
use crate::daemon::nbd::remote::{Remote, begun};
use crate::nbd::session::{Config, Session};
use crate::qmp::drive::Server;
use crate::replica::mirror::{Forward, Holds, SyncStep, Target};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// A reply that takes longer ends the connection.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// How long an order waits for the secondary's answers. libxl waits 5 s for ours.
pub(super) const SETTLE: Duration = Duration::from_secs(4);

/// A connection to the secondary's export.
pub(super) struct Link {
    remote: Remote,
    at: String,
    /// What it is yanked by.
    pub(super) name: String,
    pub(super) size_bytes: u64,
    /// Why it was ended from here.
    cut: Mutex<Option<String>>,
    cutting: Notify,
}

impl Link {
    /// Connects and negotiates.
    pub(super) async fn open(server: &Server, name: &str) -> Result<Arc<Self>, String> {
        let address = address(&server.at);
        let at = format!("{} at {address}", server.export);
        let first = address.connect().await.map_err(|why| {
            let at = address.to_string();
            let at = at.split_once(':').map_or(&*at, |(_, at)| at);
            format!("Failed to connect to '{at}': {}", in_words(&why))
        })?;
        let config = Config { reply_timeout: REPLY_TIMEOUT, ..Config::default() };
        let session = Session::new(server.export.clone(), config, engine_clock()).map_err(|why| why.to_string())?;
        // There is no other one: what answers there later is another secondary.
        let remote = Remote::open(session, begun(first, Box::new(|| Box::pin(std::future::pending()))), Arc::default());
        let info = tokio::select! {
            biased;
            info = remote.export() => info.map_err(|why| why.to_string()),
            why = remote.loss() => Err(why),
            () = tokio::time::sleep(SETTLE) => Err("it does not answer".into()),
        };
        let info = info.map_err(|why| format!("export {at}: {why}"))?;
        if info.flags & crate::nbd::EXPORT_READ_ONLY != 0 {
            return Err(format!("export {at} is read-only; nbd-server-add needs writable=true"));
        }
        let name = server.client.as_deref().unwrap_or(name).to_owned();
        let (cut, cutting) = (Mutex::default(), Notify::new());
        Ok(Arc::new(Self { remote, at, name, size_bytes: info.size_bytes, cut, cutting }))
    }

    /// Ends it, for whoever waits for it.
    pub(super) fn cut(&self, why: &str) {
        lock(&self.cut).get_or_insert_with(|| why.to_owned());
        self.cutting.notify_one();
    }

    /// Why it has ended.
    fn ended(&self) -> Option<String> {
        lock(&self.cut).clone().or_else(|| self.remote.status().last_loss)
    }
}

/// How far a node is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    Idle,
    Running,
    Done,
}

/// A replication node, and what it writes to.
pub(super) struct Node {
    pub(super) link: Arc<Link>,
    /// The client's own node, if it has one.
    pub(super) client: Option<String>,
    pub(super) stage: Stage,
    /// What the mirror calls the time until both images were the same; then they were its checkpoint 1.
    session: u64,
    /// The disk it is a child of.
    pub(super) disk: Option<Attached>,
}

/// A child of a guest's disk.
pub(super) struct Attached {
    pub(super) disk: String,
    source: Source,
    carrying: JoinHandle<()>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.carrying.abort();
        self.source.mirror().detach();
    }
}

impl Node {
    pub(super) fn new(link: Arc<Link>, client: Option<String>) -> Self {
        Self { link, client, stage: Stage::Idle, session: 1, disk: None }
    }

    /// Becomes the child of a disk: both images are the same now, says who orders it. `failed` is told what goes wrong later.
    pub(super) fn attach(
        &mut self,
        disk: &str,
        source: Source,
        failed: impl FnOnce(&str) + Send + 'static,
    ) -> Result<(), String> {
        let (theirs, ours) = (self.link.size_bytes, source.size_bytes());
        if theirs != ours {
            return Err(format!("the sizes differ: {disk} has {ours} bytes, export {} {theirs}", self.link.at));
        }
        source.mirror().attach(Target { session: self.session, holds: Holds::Same });
        while matches!(source.mirror().next_sync_chunk(), Ok(SyncStep::Skipped { .. })) {}
        let _ = mark(&source);
        source.mirror().detach();
        let carrying = tokio::spawn(carry(source.clone(), self.link.clone(), failed));
        self.disk = Some(Attached { disk: disk.to_owned(), source, carrying });
        Ok(())
    }

    /// Whether it can be started.
    fn check(&self, name: &str) -> Result<(), String> {
        let Some(attached) = &self.disk else {
            return Err(format!("{name} has nothing to replicate: x-blockdev-change makes it the child of a disk"));
        };
        match self.link.ended() {
            Some(why) => Err(format!("{}: the connection to export {} has ended: {why}", attached.disk, self.link.at)),
            None => Ok(()),
        }
    }

    /// Sends what was written since it was attached, and from now on every write.
    async fn start(&mut self) -> Result<(), String> {
        let Some(Attached { source, disk, .. }) = &self.disk else { return Ok(()) };
        let holds = Holds::Checkpoint { session: self.session, number: 1 };
        self.session += 1;
        source.mirror().attach(Target { session: self.session, holds });
        self.stage = Stage::Running;
        let level = async {
            loop {
                let mut moved = pin!(source.moved.notified());
                moved.as_mut().enable();
                let step = source.mirror().next_sync_chunk();
                source.stirred.notify_one();
                match step {
                    Ok(SyncStep::Full | SyncStep::Waiting) => moved.await,
                    Ok(SyncStep::Queued { .. } | SyncStep::Skipped { .. }) => {}
                    Ok(SyncStep::Finished) => return source.mirror().status().error.map_or(Ok(()), Err),
                    Err(error) => return Err(error.to_string()),
                }
            }
        };
        let level = tokio::time::timeout(SETTLE, level).await;
        level.unwrap_or_else(|_| Err("the secondary takes too long".into())).map_err(|why| format!("{disk}: {why}"))
    }

    /// As if it had not been started. A disk whose secondary did not answer has no child any more: what that has is not
    /// known.
    async fn roll_back(&mut self) {
        let settled = match self.mark() {
            Some(settling) => settling.wait(Instant::now() + SETTLE).await.is_ok(),
            None => false,
        };
        self.stop();
        self.stage = Stage::Idle;
        self.disk.take_if(|_| !settled);
    }

    /// Lets go; the guest goes on with its own image.
    pub(super) fn stop(&mut self) {
        if let Some(attached) = &self.disk {
            attached.source.mirror().detach();
        }
        self.stage = Stage::Done;
    }

    /// Why what the guest writes does not reach the secondary, once it should.
    fn error(&self) -> Option<String> {
        let status = self.disk.as_ref()?.source.mirror().status();
        status.error.or_else(|| (!status.attached).then(|| "not mirrored".into()))
    }

    /// The same for people, with the disk's name.
    pub(super) fn failing(&self) -> Option<String> {
        let error = (self.stage == Stage::Running).then(|| self.error()).flatten()?;
        let disk = self.disk.as_ref().map_or("no disk", |attached| &attached.disk);
        Some(format!("{disk}, to export {}: {error}", self.link.at))
    }

    /// All writes so far, to be waited for.
    pub(super) fn mark(&self) -> Option<Settling> {
        let Attached { source, disk, .. } = self.disk.as_ref().filter(|_| self.stage == Stage::Running)?;
        let epoch = mark(source)?;
        Some(Settling { source: source.clone(), disk: disk.clone(), epoch })
    }

    pub(super) fn to_json(&self, name: &str) -> Value {
        let status = self.disk.as_ref().map(|attached| attached.source.mirror().status());
        json!({
            "node": name,
            "name": self.disk.as_ref().map(|attached| &attached.disk),
            "export": self.link.at,
            "stage": match self.stage {
                Stage::Idle => "none",
                Stage::Running => "running",
                Stage::Done => "stopped",
            },
            "mirror": status,
            "connection_lost": self.link.ended(),
        })
    }
}

/// Ends an epoch, unless the link has failed or its copy is not finished. Writes of the next one may go at once.
fn mark(source: &Source) -> Option<u64> {
    let mut mirror = source.mirror();
    let epoch = (mirror.status().attached && mirror.sync_finished()).then(|| mirror.mark())?;
    mirror.allow(epoch + 1);
    Some(epoch)
}

/// Starts all that can be, or none.
pub(super) async fn start(nodes: Vec<(&str, &mut Node)>) -> Result<(), String> {
    if nodes.is_empty() {
        return Err("there is nothing to replicate: no drive has driver=replication,mode=primary".into());
    }
    // One that is done stays where it is, as a QEMU's.
    let mut idle: Vec<_> = nodes.into_iter().filter(|(_, node)| node.stage != Stage::Done).collect();
    if idle.is_empty() || idle.iter().any(|(_, node)| node.stage == Stage::Running) {
        return Err("Block replication is running or done".into());
    }
    let cannot: Vec<String> = idle.iter().filter_map(|(name, node)| node.check(name).err()).collect();
    if !cannot.is_empty() {
        return Err(cannot.join("; "));
    }
    for at in 0..idle.len() {
        if let Err(why) = idle[at].1.start().await {
            for (_, node) in &mut idle[..=at] {
                node.roll_back().await;
            }
            return Err(why);
        }
    }
    Ok(())
}

/// What waits for the secondary's answers.
pub(super) struct Settling {
    source: Source,
    disk: String,
    epoch: u64,
}

impl Settling {
    /// Until all are there, or something else is the matter: then what.
    pub(super) async fn wait(self, deadline: Instant) -> Result<(), String> {
        let settled = async {
            loop {
                let mut moved = pin!(self.source.moved.notified());
                moved.as_mut().enable();
                {
                    let mirror = self.source.mirror();
                    let status = mirror.status();
                    if let Some(why) = status.error {
                        return Err(why);
                    }
                    // Who stopped it meanwhile wants no more of it.
                    if mirror.drained(self.epoch) || !status.attached {
                        return Ok(());
                    }
                }
                moved.await;
            }
        };
        let settled = tokio::time::timeout_at(deadline, settled).await;
        let late = || {
            let queued_bytes = self.source.mirror().status().queued_bytes;
            Err(format!("{queued_bytes} bytes are not at the secondary after {SETTLE:?}"))
        };
        settled.unwrap_or_else(|_| late()).map_err(|why| format!("{}: {why}", self.disk))
    }
}

/// Moves a disk's writes to the secondary, until the connection ends.
async fn carry(source: Source, link: Arc<Link>, failed: impl FnOnce(&str)) {
    let mut under_way = HashMap::new();
    let mut waiting: Option<Forward> = None;
    let why = loop {
        while let Some(Forward { seq, epoch, offset, payload }) =
            waiting.take().or_else(|| source.mirror().poll_forward())
        {
            match link.remote.submit_all(|to| submit(offset, &payload, to)) {
                Ok(cookie) => _ = under_way.insert(cookie, seq),
                Err(crate::nbd::client::SubmitError::Full) => {
                    waiting = Some(Forward { seq, epoch, offset, payload });
                    break;
                }
                Err(error) => source.mirror().handle_acked(seq, Err(refused(error))),
            }
        }
        tokio::select! {
            biased;
            () = link.cutting.notified() => break link.ended().unwrap_or_default(),
            completion = link.remote.completion() => match completion {
                Ok(completion) => {
                    let result = completion.result.map(drop).map_err(refused);
                    if let Some(seq) = under_way.remove(&completion.cookie) {
                        source.mirror().handle_acked(seq, result);
                    }
                    if let Some(why) = source.mirror().status().error {
                        break why;
                    }
                }
                Err(error) => break error.to_string(),
            },
            why = link.remote.loss() => break format!("the connection is lost: {why}"),
            () = source.stirred.notified() => {}
        }
        source.moved.notify_waiters();
    };
    // Also what was started by then, or is later, must not pass for replicated.
    link.cut(&why);
    source.mirror().fail(&refused(io::Error::other(why.clone())));
    source.moved.notify_waiters();
    failed(&why);
}
