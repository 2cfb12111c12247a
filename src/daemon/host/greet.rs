//! The acceptor's part: who knocks, what is made for them, and when their links are one session.

use super::{BLANK_DISK, CHUNK_HASHES, HELLO_DEADLINE, PAGE_DELTAS, Shared, VACANT, read_word};
use crate::colo::arbiter::Claim;
use crate::colo::heartbeat::Heartbeat;
use crate::colo::hello::{self, Channel, DiskCheckpoint, Hello, PROTOCOL_VERSION, Welcome};
use crate::colo::secondary;
use crate::daemon::address::{Link, Listener};
use crate::daemon::engine::{HostInput, Vacancy};
use crate::daemon::guest::{DISK_NAME, Guest};
use crate::daemon::hashes;
use crate::daemon::links::{self, LinkTask, Side};
use crate::daemon::nbd::{self, ServeError};
use crate::daemon::{engine_clock, xen};
use crate::replica::epochs::{PrimaryView, ReplicaConfig};
use crate::replica::state::Standing;
use bytes::BytesMut;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

/// How long who knocks waits for a guest that is being taken apart: less than it waits for a welcome.
const LEAVE_DEADLINE: Duration = Duration::from_secs(4);
/// The same for a Xen guest, with all its devices.
const LEAVE_DEADLINE_XEN: Duration = Duration::from_secs(30);
/// Connections that may be greeted at once.
const GREETINGS_MAX: usize = 32;

/// A session whose links are coming up.
struct Session {
    hello: Hello,
    stream: Link,
    guest: Box<Guest>,
    packets: Option<Link>,
    heartbeat: Option<Link>,
    hashes: Option<Link>,
}

pub(super) async fn greet_all(listener: Listener, shared: Arc<Shared>) {
    let (greeted, mut words) = mpsc::channel::<(Link, Hello)>(4);
    let greetings = Arc::new(tokio::sync::Semaphore::new(GREETINGS_MAX));
    tokio::spawn(async move {
        while let Ok(mut link) = listener.accept().await {
            let Ok(permit) = greetings.clone().acquire_owned().await else { return };
            let greeted = greeted.clone();
            tokio::spawn(async move {
                let _permit = permit;
                match tokio::time::timeout(HELLO_DEADLINE, read_word::<Hello>(&mut link)).await {
                    Ok(Ok(word)) => _ = greeted.send((link, word)).await,
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "a stranger on the peer port");
                        answer(&mut link, &error.to_string(), "").await;
                    }
                    Err(_) => tracing::warn!("a connection on the peer port said no hello"),
                }
            });
        }
    });
    let mut session: Option<Session> = None;
    loop {
        let next = tokio::time::timeout(HELLO_DEADLINE, words.recv()).await;
        match next {
            Ok(None) => return,
            Err(_) => {
                if let Some(session) = session.take() {
                    tracing::warn!(peer = %session.hello.from, "a session did not complete");
                }
            }
            Ok(Some((mut link, word))) => {
                match welcome(&shared, session.as_ref().map(|session| session.hello.session), &word).await {
                    Err(why) => {
                        tracing::warn!(peer = %word.from, reason = %why, "refused");
                        answer(&mut link, &why, &shared.config.name).await;
                    }
                    Ok(made) => {
                        let blank = made.as_ref().is_some_and(|(_, is_blank)| *is_blank);
                        let vacant = *shared.vacancy.borrow() == Vacancy::Vacant;
                        let features =
                            [(true, PAGE_DELTAS), (true, CHUNK_HASHES), (blank, BLANK_DISK), (vacant, VACANT)];
                        let features = features.into_iter().filter(|(has, _)| *has);
                        let welcome = Welcome {
                            protocol: PROTOCOL_VERSION,
                            from: shared.config.name.clone(),
                            refused: None,
                            features: features.map(|(_, name)| name.to_owned()).collect(),
                            checkpoints: made.iter().flat_map(|(guest, _)| checkpoint(guest)).collect(),
                        };
                        let mut out = BytesMut::new();
                        hello::encode(&welcome, &mut out);
                        if link.write_all(&out).await.is_ok() {
                            let guest = made.map(|(guest, _)| Box::new(guest));
                            take(&shared, &mut session, link, word, guest).await;
                        }
                    }
                }
            }
        }
    }
}

/// What the image is a checkpoint of, by a name that its primary may know.
fn checkpoint(guest: &Guest) -> Option<DiskCheckpoint> {
    match links::lock(guest.replica.as_ref()?).status().standing {
        Standing::Checkpoint { number, session: session @ 1.., .. } => {
            Some(DiskCheckpoint { disk: DISK_NAME.into(), session, number })
        }
        _ => None,
    }
}

async fn answer(link: &mut Link, why: &str, from: &str) {
    let refused = Some(why.to_owned());
    let welcome =
        Welcome { protocol: PROTOCOL_VERSION, from: from.to_owned(), refused, features: vec![], checkpoints: vec![] };
    let mut out = BytesMut::new();
    hello::encode(&welcome, &mut out);
    let _ = link.write_all(&out).await;
}

/// Decides on a hello. For a COLO hello it makes the room the guest needs, so that a host without it says so to
/// the primary and not only to its own log.
async fn welcome(shared: &Shared, session: Option<u64>, word: &Hello) -> Result<Option<(Guest, bool)>, String> {
    word.check().map_err(|error| error.to_string())?;
    if word.channel == Channel::Greeting {
        return Ok(None);
    }
    let config = &shared.config;
    if word.from == config.name {
        return Err(format!("both hosts are called {}; an arbiter could not tell them apart", word.from));
    }
    if word.channel != Channel::Colo {
        let known = session == Some(word.session);
        return if known { Ok(None) } else { Err("this link belongs to no session".into()) };
    }
    let leaves_within = if word.geometry.xen.is_some() { LEAVE_DEADLINE_XEN } else { LEAVE_DEADLINE };
    let mut vacancy = shared.vacancy.clone();
    let left = vacancy.wait_for(|vacancy| *vacancy != Vacancy::Leaving);
    if !matches!(tokio::time::timeout(leaves_within, left).await, Ok(Ok(vacancy)) if *vacancy == Vacancy::Vacant) {
        return Err(format!("host {} has a guest already", config.name));
    }
    let beside = config.disk.parent().filter(|dir| !dir.as_os_str().is_empty()).map(ToOwned::to_owned);
    let spill_dir = config.spill_dir.clone().or(beside).unwrap_or_else(|| ".".into());
    let epochs = ReplicaConfig {
        memory_budget_bytes: config.epoch_memory_bytes,
        spill_dir: Some(spill_dir),
        ..ReplicaConfig::default()
    };
    let made = match &word.geometry.xen {
        Some(_) => xen::stand_by(&word.guest, &word.geometry, word.mode, &config.disk, epochs, &shared.wire).await,
        None => Guest::stand_by(&word.guest, &word.geometry, &config.disk, epochs, config.entropy_seed),
    };
    made.map(Some).map_err(|error| format!("host {}: {error}", config.name))
}

/// Keeps a welcomed link with its session, and starts the engine's part when all four are there.
async fn take(shared: &Shared, session: &mut Option<Session>, link: Link, word: Hello, guest: Option<Box<Guest>>) {
    match (word.channel, guest) {
        (Channel::Colo, Some(guest)) => {
            *session = Some(Session { hello: word, stream: link, guest, packets: None, heartbeat: None, hashes: None });
        }
        (Channel::Packets, _) => _ = session.as_mut().map(|session| session.packets = Some(link)),
        (Channel::Heartbeat, _) => _ = session.as_mut().map(|session| session.heartbeat = Some(link)),
        (Channel::Hashes, _) => _ = session.as_mut().map(|session| session.hashes = Some(link)),
        (Channel::Nbd, _) => {
            if let Some(input) = session.take().and_then(|session| join(shared, session, link)) {
                let _ = shared.host.send(input).await;
            }
        }
        (Channel::Colo, None) | (Channel::Greeting, _) => {}
    }
}

fn join(shared: &Shared, session: Session, nbd_link: Link) -> Option<HostInput> {
    let Session { hello: word, stream, guest, packets: Some(packets), heartbeat: Some(beats), hashes } = session else {
        tracing::warn!(peer = %session.hello.from, "the disk link came before the others");
        return None;
    };
    let generation = word.generation;
    let replica = guest.replica.clone()?;
    // Before the first write can arrive: the primary begins as soon as its last link is welcomed.
    if let Err(error) = links::lock(&replica).start_session(generation, word.session) {
        tracing::error!(%error, "the replica cannot begin");
        return None;
    }
    let view = Box::new(PrimaryView { replica, generation });
    let hashes = hashes.map(|link| -> LinkTask { Box::pin(hashes::tell(link, (*view).clone())) });
    let server = Box::pin(async move {
        nbd::serve_connection(nbd_link, DISK_NAME.into(), view).await.map_err(|error| match error {
            ServeError::Io(error) => error,
            ServeError::Protocol(error) => io::Error::new(io::ErrorKind::InvalidData, error),
            error @ ServeError::Deadline => io::Error::new(io::ErrorKind::TimedOut, error),
        })
    });
    let interval = Duration::from_millis(word.heartbeat_interval_ms);
    let heartbeat = Heartbeat::new(engine_clock(), interval, word.heartbeat_misses, generation);
    let side = Side::Secondary { nr_pages: word.geometry.nr_pages, nbd: server, hashes };
    let links = links::start(stream, packets, beats, heartbeat, side);
    let claim = Claim { guest: word.guest.clone(), expected: generation, holder: shared.config.name.clone() };
    let mut config = secondary::Config::new(word.mode, claim);
    config.policy = shared.config.policy.clone();
    Some(HostInput::Join { links, config, peer: word.from, guest })
}
