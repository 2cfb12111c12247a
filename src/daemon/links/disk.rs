//! The link of one of the guest's disks: the primary's writes over NBD, and what survives the end of a connection.
//!
//! ```text
//!   primary     mirror ─▶ forward ─▶ NBD session ═══ connection, and the next ═══▶ serve ─▶ replica     secondary
//!                 ◀──── answers ────────┘   lost: says hello again, is welcomed, sends again what has no answer
//! ```
//!
//! A connection that breaks is no host that died: the stream, the packet link and the heartbeat say that. What was not
//! answered is written again, in order, over the next connection; within an epoch that changes nothing, because an epoch
//! ends only when all of its writes are answered. Without a connection for [`PATIENCE`] the link has ended, and with it
//! the pair.
//!
//! The trap is a write that is under way on the connection that was lost, and is carried out after a newer one that came
//! over the next. `serve` is one task: it lets go of the old connection before it reads from the next.
//! Source: [`crate::nbd::session`], "A server that is slow to let go".

use super::super::address::Link;
use super::super::engine_clock;
use super::super::nbd::remote::{Connect, Remote};
use super::super::nbd::{self, ServeError};
use super::{Outgoing, invalid};
use crate::colo::hello::disk_name;
use crate::disk::DiskError;
use crate::nbd::client::SubmitError;
use crate::nbd::request::Request;
use crate::nbd::session::{Config, Session};
use crate::replica::epochs::PrimaryView;
use crate::replica::mirror::Payload;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

/// How long a pair goes on without a connection for one of its disks. No checkpoint is taken meanwhile, and what needs
/// one to leave does not leave.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The secondary waits longer: it is the primary, whose guest runs, that should end the pair and say why.
pub(super) const PATIENCE_SECONDARY: Duration = Duration::from_secs(20);

/// A disk write for the secondary.
#[derive(Debug)]
pub struct DiskWrite {
    /// Names it in the answer.
    pub seq: u64,
    /// Where.
    pub offset: u64,
    /// What.
    pub payload: Payload,
}

/// The answers to writes of a disk: which disk, and for each which write, and what came of it.
pub type DiskAnswers = (usize, Vec<(u64, Result<(), DiskError>)>);

/// Where the answers of one disk go.
pub(super) struct Acks {
    pub(super) disk: usize,
    pub(super) to: mpsc::Sender<DiskAnswers>,
}

/// What is counted of a disk's link.
pub(super) struct Counters {
    pub(super) sent_bytes: Arc<AtomicU64>,
    /// Connections that were lost.
    pub(super) losses: Arc<AtomicU64>,
    /// Links without a connection.
    pub(super) down: Arc<AtomicU64>,
}

/// What the secondary said to a write, as a disk would.
pub(in crate::daemon) fn refused(why: impl std::fmt::Display) -> DiskError {
    DiskError::Io { what: "the secondary's disk".into(), source: io::Error::other(why.to_string()) }
}

/// Zeroes go as such, and as any bytes to a server that knows no better.
pub(in crate::daemon) fn submit(
    offset: u64,
    payload: &Payload,
    to: &mut dyn FnMut(Request) -> Result<u64, SubmitError>,
) -> Result<u64, SubmitError> {
    match payload {
        Payload::Data(data) => to(Request::write(offset, data.clone())),
        &Payload::Zeroes { len_bytes, keep_allocated } => {
            match to(Request::write_zeroes(offset, len_bytes, keep_allocated)) {
                Err(SubmitError::Unsupported) => to(Request::write(offset, vec![0; len_bytes as usize].into())),
                submitted => submitted,
            }
        }
    }
}

/// Sends a disk's writes and hands on their answers, until the session is over.
pub(super) async fn forward(
    connect: Connect,
    export: String,
    mut outgoing: Outgoing<DiskWrite>,
    acks: Acks,
    counters: Counters,
) -> io::Result<()> {
    let config = Config { patience: PATIENCE, ..Config::default() };
    let session = Session::new(export.clone(), config, engine_clock()).map_err(invalid)?;
    let remote = Remote::open(session, connect, counters.sent_bytes);
    remote.export().await.map_err(io::Error::other)?;
    let mut under_way: HashMap<u64, (u64, usize)> = HashMap::new();
    let mut waiting: Option<(usize, DiskWrite)> = None;
    let (mut lost, mut is_down) = (0, false);
    loop {
        let mut answers = Vec::new();
        remote.submit_all(|to| {
            while let Some((bytes, write)) = waiting.take().or_else(|| outgoing.try_recv()) {
                match submit(write.offset, &write.payload, to) {
                    Ok(cookie) => _ = under_way.insert(cookie, (write.seq, bytes)),
                    Err(SubmitError::Full) => {
                        waiting = Some((bytes, write));
                        break;
                    }
                    Err(error) => {
                        answers.push((write.seq, Err(refused(error))));
                        outgoing.written(bytes);
                    }
                }
            }
        });
        if !answers.is_empty() && acks.to.send((acks.disk, answers)).await.is_err() {
            return Ok(());
        }
        tokio::select! {
            completions = remote.completions() => {
                let mut answers = Vec::new();
                for completion in completions.map_err(io::Error::other)? {
                    let Some((seq, bytes)) = under_way.remove(&completion.cookie) else { continue };
                    outgoing.written(bytes);
                    answers.push((seq, completion.result.map(drop).map_err(refused)));
                }
                if acks.to.send((acks.disk, answers)).await.is_err() {
                    return Ok(());
                }
            }
            next = outgoing.recv(), if waiting.is_none() => match next {
                Some(write) => waiting = Some(write),
                None => return Ok(()),
            },
            (total, why) = remote.lost_more_than(lost) => {
                tracing::warn!(export, why, "a disk link was lost; another is being made");
                counters.losses.fetch_add(total - lost, Ordering::Relaxed);
                lost = total;
                if !std::mem::replace(&mut is_down, true) {
                    counters.down.fetch_add(1, Ordering::Relaxed);
                }
            }
            () = remote.connected(), if is_down => {
                is_down = false;
                counters.down.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Serves a disk to the primary, over `link` and then over whichever comes after it.
pub(in crate::daemon) async fn serve(
    mut link: Link,
    mut later: mpsc::Receiver<Link>,
    disk: usize,
    view: PrimaryView,
) -> io::Result<()> {
    loop {
        let serving = nbd::serve_connection(link, disk_name(disk), Box::new(view.clone()));
        // With the branch that is not taken goes the old connection, and what it had read.
        let ended = tokio::select! {
            ended = serving => ended,
            Some(next) = later.recv() => {
                link = next;
                continue;
            }
        };
        let ended = ended.map_err(|error| match error {
            ServeError::Io(error) => error,
            ServeError::Protocol(error) => invalid(error),
            error @ ServeError::Deadline => io::Error::new(io::ErrorKind::TimedOut, error),
        });
        match ended {
            // Who speaks no NBD does not get better by trying again.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(error),
            ended => match tokio::time::timeout(PATIENCE_SECONDARY, later.recv()).await {
                Ok(Some(next)) => link = next,
                Ok(None) | Err(_) => return ended,
            },
        }
    }
}
