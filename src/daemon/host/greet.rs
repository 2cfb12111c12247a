//! The acceptor's part: who knocks, what is made for them, and when their links are one session.

use super::super::accept::accept;
use super::{BLANK_DISK, CHUNK_HASHES, HELLO_DEADLINE, PACKET_DIGESTS, PAGE_DELTAS, Shared, VACANT, read_word};
use crate::colo::arbiter::Claim;
use crate::colo::heartbeat::Heartbeat;
use crate::colo::hello::{self, Channel, DiskCheckpoint, Hello, Welcome, disk_name};
use crate::colo::secondary;
use crate::compare::digest::Key;
use crate::daemon::address::{Link, Listener};
use crate::daemon::engine::{HostInput, Vacancy};
use crate::daemon::guest::Guest;
use crate::daemon::hashes;
use crate::daemon::links::{self, LinkTask, Side, disk};
use crate::daemon::{engine_clock, unix_us, xen};
use crate::replica::epochs::{Replica, ReplicaConfig};
use crate::replica::state::Standing;
use bytes::BytesMut;
use std::sync::{Arc, Mutex};
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
    /// By disk, those that were asked for.
    hashes: Vec<(usize, Link)>,
    /// In the order of the disks; the session is whole with the last of them.
    nbd: Vec<Link>,
}

/// The session that has begun, and where its packet link and its disks' servers take further links from.
struct Begun {
    session: u64,
    packets: mpsc::Sender<Link>,
    disks: Vec<mpsc::Sender<Link>>,
}

impl Begun {
    /// The place of a further link, while the session lasts.
    fn place(&self, word: &Hello) -> Option<&mpsc::Sender<Link>> {
        let place = match word.channel {
            Channel::Nbd => self.disks.get(word.disk),
            Channel::Packets => Some(&self.packets),
            _ => None,
        };
        place.filter(|place| word.session == self.session && !place.is_closed())
    }
}

pub(super) async fn greet_all(listener: Listener, shared: Arc<Shared>) {
    let (greeted, mut words) = mpsc::channel::<(Link, Hello)>(4);
    let greetings = Arc::new(tokio::sync::Semaphore::new(GREETINGS_MAX));
    tokio::spawn(async move {
        while let Ok(permit) = greetings.clone().acquire_owned().await {
            let mut link = accept("a peer", || listener.accept()).await;
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
    let mut begun: Option<Begun> = None;
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
                let again = begun.as_ref().and_then(|begun| begun.place(&word));
                // One that a later one replaces holds its images no longer.
                session =
                    session.filter(|session| word.channel != Channel::Colo || session.hello.session == word.session);
                let coming_up = session.as_ref().map(|session| session.hello.session);
                match welcome(&shared, again.is_some() || coming_up == Some(word.session), &word).await {
                    Err(why) => {
                        tracing::warn!(peer = %word.from, reason = %why, "refused");
                        answer(&mut link, &why, &shared.config.name).await;
                    }
                    Ok(made) => {
                        let blank = made.as_ref().is_some_and(|(_, is_blank)| *is_blank);
                        let vacant = *shared.vacancy.borrow() == Vacancy::Vacant;
                        let digests = word.wants(PACKET_DIGESTS);
                        let features = [
                            (true, PAGE_DELTAS),
                            (true, CHUNK_HASHES),
                            (digests, PACKET_DIGESTS),
                            (blank, BLANK_DISK),
                            (vacant, VACANT),
                        ];
                        let features = features.into_iter().filter(|(has, _)| *has);
                        let welcome = Welcome {
                            features: features.map(|(_, name)| name.to_owned()).collect(),
                            checkpoints: made.iter().flat_map(|(guest, _)| checkpoints(guest)).collect(),
                            clock_unix_us: Some(unix_us()),
                            version: Some(env!("CARGO_PKG_VERSION").into()),
                            ..Welcome::bare(&shared.config.name, None)
                        };
                        let mut out = BytesMut::new();
                        hello::encode(&welcome, &mut out);
                        if link.write_all(&out).await.is_err() {
                            continue;
                        }
                        if let Some(again) = again {
                            // One waits there at most; a primary that is in such a hurry says hello again.
                            let _ = again.try_send(link);
                            continue;
                        }
                        let guest = made.map(|(guest, _)| Box::new(guest));
                        if let Some(whole) = take(&mut session, link, word, guest)
                            && let Some((input, disks)) = join(&shared, whole)
                        {
                            begun = Some(disks);
                            let _ = shared.host.send(input).await;
                        }
                    }
                }
            }
        }
    }
}

/// What the images are checkpoints of, by names that their primary may know.
fn checkpoints(guest: &Guest) -> Vec<DiskCheckpoint> {
    let replicas = guest.replicas.iter().flat_map(|replicas| replicas.disks());
    let held = |(disk, replica): (usize, &Arc<Mutex<Replica>>)| match links::lock(replica).image() {
        Standing::Checkpoint { number, session: session @ 1.., .. } => {
            Some(DiskCheckpoint { disk: disk_name(disk), session, number })
        }
        _ => None,
    };
    replicas.enumerate().filter_map(held).collect()
}

async fn answer(link: &mut Link, why: &str, from: &str) {
    let welcome = Welcome::bare(from, Some(why.to_owned()));
    let mut out = BytesMut::new();
    hello::encode(&welcome, &mut out);
    let _ = link.write_all(&out).await;
}

/// Decides on a hello. For a COLO hello it makes the room the guest needs, so that a host without it says so to
/// the primary and not only to its own log.
async fn welcome(shared: &Shared, known: bool, word: &Hello) -> Result<Option<(Guest, bool)>, String> {
    if word.channel == Channel::Greeting {
        return Ok(None);
    }
    word.check().map_err(|error| error.to_string())?;
    let config = &shared.config;
    if let Err(why) = hello::match_exports(&word.exports, &config.exports) {
        return Err(format!("host {}: {why}", config.name));
    }
    if word.from == config.name {
        return Err(format!("both hosts are called {}; an arbiter could not tell them apart", word.from));
    }
    if word.channel != Channel::Colo {
        return if known { Ok(None) } else { Err("this link belongs to no session".into()) };
    }
    let leaves_within = if word.geometry.xen.is_some() { LEAVE_DEADLINE_XEN } else { LEAVE_DEADLINE };
    let mut vacancy = shared.vacancy.clone();
    let left = vacancy.wait_for(|vacancy| *vacancy != Vacancy::Leaving);
    if !matches!(tokio::time::timeout(leaves_within, left).await, Ok(Ok(vacancy)) if *vacancy == Vacancy::Vacant) {
        return Err(format!("host {} has a guest already", config.name));
    }
    let beside = config
        .disks
        .first()
        .and_then(|image| image.parent())
        .filter(|dir| !dir.as_os_str().is_empty())
        .map(ToOwned::to_owned);
    let spill_dir = config.spill_dir.clone().or(beside).unwrap_or_else(|| ".".into());
    let epochs = ReplicaConfig {
        memory_budget_bytes: config.epoch_memory_bytes,
        spill_dir: Some(spill_dir),
        ..ReplicaConfig::default()
    };
    let made = match &word.geometry.xen {
        Some(_) => xen::stand_by(&word.guest, &word.geometry, word.mode, &config.disks, epochs, &shared.wire).await,
        None => Guest::stand_by(&word.guest, &word.geometry, &config.disks, epochs, config.entropy_seed),
    };
    made.map(Some).map_err(|error| format!("host {}: {error}", config.name))
}

/// Keeps a welcomed link with its session, and gives the session away when all are there.
fn take(session: &mut Option<Session>, link: Link, word: Hello, guest: Option<Box<Guest>>) -> Option<Session> {
    match (word.channel, guest) {
        (Channel::Colo, Some(guest)) => {
            let (packets, heartbeat, hashes, nbd) = (None, None, Vec::new(), Vec::new());
            *session = Some(Session { hello: word, stream: link, guest, packets, heartbeat, hashes, nbd });
        }
        (Channel::Packets, _) => _ = session.as_mut().map(|session| session.packets = Some(link)),
        (Channel::Heartbeat, _) => _ = session.as_mut().map(|session| session.heartbeat = Some(link)),
        (Channel::Hashes, _) => {
            // One for each disk at most.
            if let Some(begun) = session.as_mut()
                && begun.hello.geometry.disks.len() > word.disk
                && begun.hashes.iter().all(|(disk, _)| *disk != word.disk)
            {
                begun.hashes.push((word.disk, link));
            }
        }
        (Channel::Nbd, _) => {
            let begun = session.as_mut()?;
            if word.disk != begun.nbd.len() {
                tracing::warn!(peer = %word.from, disk = word.disk, "the disk links came in another order");
                *session = None;
                return None;
            }
            begun.nbd.push(link);
            if begun.nbd.len() == begun.hello.geometry.disks.len() {
                return session.take();
            }
        }
        (Channel::Colo, None) | (Channel::Greeting, _) => {}
    }
    None
}

fn join(shared: &Shared, session: Session) -> Option<(HostInput, Begun)> {
    let Session { hello: word, stream, guest, packets: Some(packets), heartbeat: Some(beats), hashes, nbd } = session
    else {
        tracing::warn!(peer = %session.hello.from, "the disk links came before the others");
        return None;
    };
    let generation = word.generation;
    let replicas = guest.replicas.clone()?;
    // Before the first write can arrive: the primary begins as soon as its last link is welcomed.
    if let Err(error) = replicas.start_session(generation, word.session) {
        tracing::error!(%error, "the replica cannot begin");
        return None;
    }
    let views: Vec<_> = replicas.primary_views(generation).collect();
    let tell = |(disk, link): (usize, Link)| -> Option<LinkTask> {
        Some(Box::pin(hashes::tell(link, views.get(disk)?.clone())))
    };
    let hashes = hashes.into_iter().filter_map(tell).collect();
    let (mut servers, mut disks): (Vec<LinkTask>, Vec<_>) = (Vec::new(), Vec::new());
    for (disk, (link, view)) in nbd.into_iter().zip(views).enumerate() {
        let (place, later) = mpsc::channel(1);
        disks.push(place);
        servers.push(Box::pin(disk::serve(link, later, disk, view)));
    }
    let interval = Duration::from_millis(word.heartbeat_interval_ms);
    let heartbeat = Heartbeat::new(engine_clock(), interval, word.heartbeat_misses, generation);
    let (place, later) = mpsc::channel(1);
    let packets = (packets, later);
    let side = Side::Secondary { packets, nr_pages: word.geometry.nr_pages, nbd: servers, hashes };
    let mut links = links::start(stream, beats, heartbeat, side, &shared.engine);
    links.digests = word.wants(PACKET_DIGESTS).then(|| Key::of_session(word.session));
    let claim = Claim { guest: word.guest.clone(), expected: generation, holder: shared.config.name.clone() };
    let mut config = secondary::Config::new(word.mode, claim);
    config.policy = shared.config.policy.clone();
    let begun = Begun { session: word.session, packets: place, disks };
    Some((HostInput::Join { links, config, peer: word.from, guest }, begun))
}
