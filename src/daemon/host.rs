//! One host: a process with a control socket, a peer listener, a switch port and an engine.
//!
//! ```text
//!   control socket ─▶ engine ─ protect ─▶ knock() ── hellos ──▶ peer's listener
//!   peer listener  ─▶ greet   ── the links of one session ──▶ engine: Join
//!   switch port    ◀─▶ engine
//! ```
//!
//! A protection is a session: the primary claims the next generation, then opens the COLO stream, the packet link,
//! the heartbeat and, for each disk, NBD, one after another, each with the session's number. The traps: strangers
//! knock too, so every hello has a deadline and a bound, and a session that never completes is forgotten; and the claim
//! comes *before* the first link, so that whatever a former primary still sends carries an older generation.

mod boot;
mod cable;
mod greet;
mod signals;

use self::boot::boot;
use self::cable::switch_port;
use self::greet::greet_all;
use self::signals::{Attendant, Signals};
use super::address::{Address, Link};
use super::arbiter::Arbiter;
use super::control::{self, Answer as Reply};
use super::engine::{Engine, EngineParts, HostInput, ToProtect, UNDER_WAY, Vacancy};
use super::engine_clock;
use super::events::{self, Events, What, log::EventLog};
use super::guest::{Guest, GuestError};
use super::links::{self, Side, lock, outbox};
use super::live::{Configuration, LogFilter};
use super::manager::Manager;
use super::metrics::{Metrics, MetricsAddress};
use super::nbd::remote::{self, Connect, Dialling};
use super::xen::{self, Wire, XenBoot};
use crate::colo::arbiter::{Claim, Policy, Verdict};
use crate::colo::delta::SentPages;
use crate::colo::heartbeat::{Heartbeat, INTERVAL_DEFAULT_MS, MISSES_DEFAULT};
use crate::colo::hello::{
    self, Channel, DiskCheckpoint, Hello, HelloError, Mode, PROTOCOL_VERSION, Welcome, disk_name,
};
use crate::colo::primary;
use crate::compare::digest::Key;
use crate::page::PAGE_SIZE;
use crate::replica::mirror::{Holds, MirrorHandle, Target, resync};
use crate::say;
use bytes::BytesMut;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};

/// How long a hello or a welcome may take.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// How long the first welcome may take: the peer makes a domain with all its devices before it.
const ROOM_DEADLINE: Duration = Duration::from_secs(60);
/// How long a host that ends waits for its event log.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The feature a secondary names when its disks are new and all zero.
pub(super) const BLANK_DISK: &str = "blank-disk";
/// The feature a host names when it can take a guest.
pub(super) const VACANT: &str = "vacant";
/// The feature of a host that can take page deltas.
const PAGE_DELTAS: &str = "page-deltas";
/// The feature of a primary that wants digests instead of payloads, and of a secondary that sends them.
const PACKET_DIGESTS: &str = "packet-digests";
/// The feature of a host that can tell the hashes of its disk.
const CHUNK_HASHES: &str = "chunk-hashes";
/// Memory in MiB for what was sent of a guest's pages, by default.
const DELTA_MIB_DEFAULT: u64 = 64;
/// Pages in a MiB.
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE as u64;

/// What runs here from the start.
#[derive(Clone, Debug)]
pub enum Boot {
    /// An embedded guest.
    Embedded(BootConfig),
    /// A Xen domain, made or adopted.
    Xen(XenBoot),
}

/// An embedded guest to boot at the start.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// Its name.
    pub name: String,
    /// Its memory.
    pub ram_mib: u64,
    /// The size of a disk of it, when the image is made.
    pub disk_mib: u64,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub ip: [u8; 4],
    /// How often, in percent, its responses differ between its two copies.
    pub diverge_percent: u8,
}

/// How to run a host.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Its name, which its control socket, its claims and its hellos carry.
    pub name: String,
    /// Where peers connect.
    pub listen: Address,
    /// The directory of the control socket.
    pub run_dir: PathBuf,
    /// The disk images in the order of the guest's disks: of the guest that boots here, or of the replicas made here.
    pub disks: Vec<PathBuf>,
    /// What both hosts call the disks, in the same order, so that neither takes one for another; they need no such names.
    pub exports: Vec<String>,
    /// Where disk epochs spill to; the first image's directory when absent.
    pub spill_dir: Option<PathBuf>,
    /// Memory that the replicas' disk epochs may use together before they spill, in bytes.
    pub epoch_memory_bytes: u64,
    /// The switch port.
    pub net: Option<Address>,
    /// Where metrics are read; nowhere when absent.
    pub metrics_listen: Option<MetricsAddress>,
    /// The arbiter.
    pub arbiter: Option<Arbiter>,
    /// What must be won before going on alone.
    pub policy: Policy,
    /// The guest to boot.
    pub boot: Option<Boot>,
    /// The event log; beside the control socket when absent.
    pub event_log: Option<PathBuf>,
    /// Seeds the guest's hardware randomness on this host.
    pub entropy_seed: u64,
    /// What SIGHUP reads again; nothing, of a host that was started without a configuration.
    pub configuration: Option<Configuration>,
    /// What is logged.
    pub log: LogFilter,
    /// Who started this process and wants to know how it gets on.
    pub manager: Manager,
}

/// Why a host does not run.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The peer listener.
    #[error("listen on {address}: {source}")]
    Listen {
        /// Where.
        address: Address,
        /// Why not.
        source: io::Error,
    },
    /// The metrics.
    #[error("--metrics-listen {address}: {source}")]
    Metrics {
        /// Where.
        address: MetricsAddress,
        /// Why not.
        source: io::Error,
    },
    /// The control socket.
    #[error("control socket of host {host} in {}: {source}", run_dir.display())]
    Control {
        /// Whose.
        host: String,
        /// Where.
        run_dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The guest.
    #[error("guest {name}: {source}")]
    Guest {
        /// Which.
        name: String,
        /// Why not.
        source: GuestError,
    },
    /// The event log.
    #[error("event log {}: {source}", path.display())]
    EventLog {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The engine's thread.
    #[error("start the engine: {0}")]
    Thread(io::Error),
    /// A policy that cannot be carried out.
    #[error("{0}")]
    Policy(&'static str),
    /// Nobody can tell whose the guest is.
    #[error("guest {name}: {why}")]
    Unknown {
        /// Which.
        name: String,
        /// Why not.
        why: String,
    },
    /// Signals cannot be waited for.
    #[error("wait for signals: {0}")]
    Signals(io::Error),
    /// The host ended before its protection had.
    #[error("{0}")]
    Unfinished(String),
}

struct Shared {
    config: HostConfig,
    vacancy: watch::Receiver<Vacancy>,
    host: mpsc::Sender<HostInput>,
    wire: Wire,
    /// What is between packets and the engine runs on its thread: to wake another for each would take longer than either does.
    engine: Handle,
}

/// Runs a host until it is told to stop. `ready` is called when its sockets are open, with where peers connect and where
/// metrics are read.
pub async fn run(config: HostConfig, ready: impl FnOnce(&Address, Option<&str>)) -> Result<(), HostError> {
    if config.policy == Policy::Arbiter && config.arbiter.is_none() {
        return Err(HostError::Policy(
            "the arbiter policy needs --arbiter file:PATH or --arbiter ADDRESS (or choose --policy hold, script:PATH, alone)",
        ));
    }
    let address = config.listen.clone();
    let listener = address.listen().await.map_err(|source| HostError::Listen { address, source })?;
    let metrics = match config.metrics_listen {
        Some(address) => Metrics::listen(&config.name, address)
            .await
            .map(Some)
            .map_err(|source| HostError::Metrics { address, source })?,
        None => None,
    };
    let metrics_url = metrics.as_ref().map(Metrics::url);
    let control = control::listen(&config.run_dir, &config.name).await.map_err(|source| HostError::Control {
        host: config.name.clone(),
        run_dir: config.run_dir.clone(),
        source,
    })?;
    let monitor_socket = super::qmp::host::socket_path(&config.run_dir, &config.name);
    let monitor_listener = super::address::listen_unix(&monitor_socket).await.map_err(|source| HostError::Control {
        host: config.name.clone(),
        run_dir: config.run_dir.clone(),
        source,
    })?;
    let history = Events::new(&config.name);
    let path = config.event_log.clone().unwrap_or_else(|| events::log::default_path(&config.run_dir, &config.name));
    let log =
        EventLog::open(&path, events::log::FILE_MAX_BYTES).map_err(|source| HostError::EventLog { path, source })?;
    let writing = tokio::spawn(events::log::keep(history.clone(), log));
    history.tell(None, What::HostStarted { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").into() });
    let (network_sender, network_in) = mpsc::channel(1024);
    let wire = Wire::new(network_sender.clone());
    let (guest, left) = boot(&config, &wire).await?;

    let (control_sender, control_receiver) = mpsc::channel(16);
    let (protect_sender, mut protects) = mpsc::channel::<ToProtect>(1);
    let (host_sender, host_receiver) = mpsc::channel(1);
    let (network_out, network_outgoing) = outbox();
    let teller = super::qmp::teller();
    let (vacancy_sender, vacancy) = watch::channel(if guest.is_none() { Vacancy::Vacant } else { Vacancy::Taken });
    let (line_sender, line) = watch::channel(String::new());
    let manager = config.manager.clone();
    let here = wire.clone();
    let engine = Engine::new(EngineParts {
        unlearn: Box::new(move || here.unlearn()),
        name: config.name.clone(),
        listen: listener.local_address().unwrap_or_else(|_| config.listen.clone()),
        metrics: metrics_url.clone(),
        guest,
        left,
        disks: config.disks.clone(),
        exports: config.exports.clone(),
        arbiter: config.arbiter.clone(),
        control: control_receiver,
        protect: protect_sender,
        host: host_receiver,
        network_in,
        network_out,
        vacancy: vacancy_sender,
        events: teller.clone(),
        history: history.clone(),
        line: line_sender,
        manager: manager.clone(),
        log: config.log.clone(),
        runtime: Handle::current(),
    });
    let (engine_ended, engine_end) = oneshot::channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(HostError::Thread)?;
    let beside_engine = runtime.handle().clone();
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            let _ = engine_ended.send(runtime.block_on(engine.run()));
        })
        .map_err(HostError::Thread)?;

    let socket = control::socket_path(&config.run_dir, &config.name);
    let monitor = super::qmp::host::HostMonitor { engine: control_sender.clone(), events: teller };
    tokio::spawn(super::qmp::serve(monitor_listener, Arc::new(monitor)));
    tokio::spawn(control::serve(control, control_sender.clone(), history.clone()));
    metrics.map(|metrics| tokio::spawn(metrics.serve(control_sender.clone(), history.clone())));
    if let Some(net) = config.net.clone() {
        beside_engine.spawn(switch_port(net, network_sender, network_outgoing));
    } else {
        beside_engine.spawn(wire.clone().carry(network_outgoing));
    }
    let (configuration, disks) = (config.configuration.clone(), config.disks.clone());
    let shared = Arc::new(Shared { config, vacancy, host: host_sender, wire, engine: beside_engine });
    // Before anybody is told that it runs, and may order its end.
    let signals = Signals::new().map_err(HostError::Signals)?;
    let address = listener.local_address().unwrap_or_else(|_| shared.config.listen.clone());
    ready(&address, metrics_url.as_deref());
    manager.ready();
    tokio::spawn(tell_status(line.clone(), manager.clone()));
    let greeting = tokio::spawn(greet_all(listener, shared.clone()));
    let protecting = tokio::spawn(async move {
        while let Some(order) = protects.recv().await {
            let answer = match knock(&shared, &order).await {
                Ok(()) => Reply::done(),
                Err(why) => Reply::error(why),
            };
            let _ = order.reply.send(answer);
            // The engine let them pass while the guest was not protected yet. Each would claim a generation that the pair
            // then does not have, and neither host could go on alone.
            while let Ok(order) = protects.try_recv() {
                let _ = order.reply.send(Reply::error(UNDER_WAY));
            }
        }
    });
    let attendant = Attendant { engine: control_sender, line, manager: manager.clone(), configuration, protecting };
    let ended = match attendant.attend(signals, engine_end).await {
        Ok(None) => Ok(()),
        Ok(Some(guest)) => give_away(guest, &disks),
        Err(error) => Err(error),
    };
    manager.stopping();
    greeting.abort();
    history.tell(None, What::HostEnded);
    let _ = tokio::time::timeout(LAST_WORDS, writing).await;
    // Lets the answer to `stop` out, and removes what would look like a host that runs.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let _ = std::fs::remove_file(socket);
    let _ = std::fs::remove_file(monitor_socket);
    ended
}

/// The guest goes on, and needs no host for its devices.
fn give_away(guest: Guest, disks: &[PathBuf]) -> Result<(), HostError> {
    let name = guest.name.clone();
    match tokio::task::block_in_place(|| xen::give_away(guest, disks)) {
        Ok(places) => {
            places.map(|places| say::out(&format!("{name} needs no xl-colo now: {places}")));
            Ok(())
        }
        Err(why) => Err(HostError::Unfinished(format!(
            "{name} runs on, and what it has of disks and NIC stands still until xl-colo host runs here again: {why}"
        ))),
    }
}

/// Tells the service manager how the host is, whenever that changes.
async fn tell_status(mut line: watch::Receiver<String>, manager: Manager) {
    loop {
        manager.status(&line.borrow_and_update());
        if line.changed().await.is_err() {
            return;
        }
    }
}

/// The primary's way in: claims the next generation, opens the links, hands them to the engine.
async fn knock(shared: &Shared, order: &ToProtect) -> Result<(), String> {
    let ToProtect { protect, guest, geometry, mirrors, .. } = order;
    let config = &shared.config;
    let peer: Address = protect.peer.parse().map_err(|error| format!("{error}"))?;
    if protect.release_at_once && protect.mode == Mode::Colo {
        return Err("in lock-step every packet is compared; only remus can release at once".into());
    }
    // A peer that is not there must be found out before a generation is spent.
    let stream =
        peer.connect().await.map_err(|error| format!("peer {peer}: {error} (is xl-colo host running there?)"))?;
    let mut session = [0; 8];
    getrandom::fill(&mut session).map_err(|error| format!("no randomness for a session number: {error}"))?;
    let interval_ms = protect.heartbeat_interval_ms.unwrap_or(INTERVAL_DEFAULT_MS);
    let misses = protect.heartbeat_misses.unwrap_or(MISSES_DEFAULT);
    let wanted = [(true, PAGE_DELTAS), (protect.packet_digests && protect.mode == Mode::Colo, PACKET_DIGESTS)];
    let features: Vec<String> = wanted.iter().filter(|(wants, _)| *wants).map(|(_, name)| (*name).to_owned()).collect();
    let word = |generation, channel, disk| Hello {
        protocol: PROTOCOL_VERSION,
        channel,
        disk,
        guest: guest.to_owned(),
        session: u64::from_le_bytes(session),
        generation,
        from: config.name.clone(),
        mode: protect.mode,
        features: features.clone(),
        geometry: geometry.clone(),
        exports: config.exports.clone(),
        heartbeat_interval_ms: interval_ms,
        heartbeat_misses: misses,
    };
    if matches!(peer, Address::Exec(_)) {
        // A command always starts; whether somebody is behind it shows when it is spoken to.
        let link = peer.connect().await.map_err(|error| format!("peer {peer}: {error}"))?;
        introduce(link, word(0, Channel::Greeting, 0)).await?;
    }
    let generation = claim(config, guest).await?;
    let word = |channel, disk| word(generation, channel, disk);
    word(Channel::Colo, 0).check().map_err(|error| error.to_string())?;
    let (stream, welcome) = introduce(stream, word(Channel::Colo, 0)).await?;
    let join = async |channel, disk| {
        let link = peer.connect().await.map_err(|error| format!("peer {peer}: {error}"))?;
        introduce(link, word(channel, disk)).await.map(|(link, _)| link)
    };
    let packets = begun(peer.clone(), word(Channel::Packets, 0), join(Channel::Packets, 0).await?);
    let heartbeat_link = join(Channel::Heartbeat, 0).await?;
    let session = u64::from_le_bytes(session);
    let target = |(disk, mirror)| Target { session, holds: holds(&welcome, disk, mirror) };
    let targets: Vec<Target> = mirrors.disks().iter().enumerate().map(target).collect();
    let (mut hashes, mut nbd) = (Vec::new(), Vec::with_capacity(geometry.disks.len()));
    for (disk, shape) in geometry.disks.iter().enumerate() {
        if targets.get(disk).is_some_and(|target| target.holds == Holds::Hashed) {
            hashes.push((disk, join(Channel::Hashes, disk).await?, resync::chunks(shape.size_bytes)));
        }
    }
    for disk in 0..geometry.disks.len() {
        nbd.push(begun(peer.clone(), word(Channel::Nbd, disk), join(Channel::Nbd, disk).await?));
    }
    let heartbeat = Heartbeat::new(engine_clock(), Duration::from_millis(interval_ms), misses, generation);
    let delta_pages = protect.delta_mib.unwrap_or(DELTA_MIB_DEFAULT).saturating_mul(PAGES_PER_MIB);
    let sent_pages =
        welcome.has(PAGE_DELTAS).then(|| SentPages::new(usize::try_from(delta_pages).unwrap_or(usize::MAX)));
    let side = Side::Primary { packets, nbd, sent_pages, hashes };
    let mut links = links::start(stream, heartbeat_link, heartbeat, side, &shared.engine);
    links.digests = welcome.has(PACKET_DIGESTS).then(|| Key::of_session(session));
    let claim = Claim { guest: guest.to_owned(), expected: generation, holder: config.name.clone() };
    let mut machine = primary::Config::new(protect.mode, claim);
    machine.resume = protect.resume;
    machine.policy = config.policy.clone();
    machine.release_at_once = protect.release_at_once;
    machine.min_run_percent = protect.min_run_percent.unwrap_or(machine.min_run_percent).min(100);
    if let Some(delay_ms) = protect.checkpoint_delay_ms {
        machine.checkpoint_delay = Duration::from_millis(delay_ms);
    }
    let (begun, answer) = oneshot::channel();
    let input = HostInput::Protect { links, config: machine, peer: welcome.from, targets, begun };
    let gone = || "the host is shutting down".to_owned();
    shared.host.send(input).await.map_err(|_| gone())?;
    match answer.await.map_err(|_| gone())? {
        Reply::Return(_) => Ok(()),
        Reply::Error { desc } => Err(desc),
    }
}

/// What makes the connections of a link that outlives one: the first one is there, for each further one the same hello is said.
fn begun(peer: Address, hello: Hello, first: Link) -> Connect {
    let next = move || -> Dialling {
        let (peer, hello) = (peer.clone(), hello.clone());
        Box::pin(async move {
            introduce(peer.connect().await?, hello).await.map(|(link, _)| link).map_err(io::Error::other)
        })
    };
    remote::begun(first, Box::new(next))
}

/// What one of the peer's disks is, as far as the two of us know.
fn holds(welcome: &Welcome, disk: usize, mirror: &MirrorHandle) -> Holds {
    let known = welcome.checkpoints.iter().find(|known| known.disk == disk_name(disk));
    match known {
        _ if welcome.has(BLANK_DISK) => Holds::Zeroes,
        Some(&DiskCheckpoint { session, number, .. }) if lock(&mirror.0).counts_from(session, number) => {
            Holds::Checkpoint { session, number }
        }
        _ if welcome.has(CHUNK_HASHES) => Holds::Hashed,
        _ => Holds::Anything,
    }
}

/// Wins the next generation for this host, or says who stands in the way.
async fn claim(config: &HostConfig, guest: &str) -> Result<u64, String> {
    let Some(arbiter) = &config.arbiter else { return Ok(1) };
    let register = arbiter.query(guest).await.map_err(|error| format!("{error}; the guest stays unprotected"))?;
    let claim = Claim { guest: guest.to_owned(), expected: register.generation, holder: config.name.clone() };
    match arbiter.claim(claim).await.map_err(|error| error.to_string())? {
        Verdict::Won { generation } => Ok(generation),
        Verdict::Lost(other) => Err(format!("host {} has just claimed guest {guest}; look there first", other.holder)),
    }
}

/// Says hello and reads the welcome.
pub(super) async fn introduce(mut link: Link, word: Hello) -> Result<(Link, Welcome), String> {
    let makes_room = word.channel == Channel::Colo && word.geometry.xen.is_some();
    let deadline = if makes_room { ROOM_DEADLINE } else { HELLO_DEADLINE };
    let mut out = BytesMut::new();
    hello::encode(&word, &mut out);
    let exchange = async {
        link.write_all(&out).await?;
        // The peer says nothing more until it is spoken to, except NBD's greeting: read no byte beyond the welcome.
        read_word::<Welcome>(&mut link).await
    };
    let welcome = match tokio::time::timeout(deadline, exchange).await {
        Ok(Ok(welcome)) => welcome,
        Ok(Err(GreetError::Io(error))) if error.kind() == io::ErrorKind::ConnectionRefused => {
            return Err(format!("the peer cannot be reached: {error}"));
        }
        Ok(Err(GreetError::Io(error))) => return Err(format!("the peer hung up on a hello: {error}")),
        Ok(Err(GreetError::Hello(error))) => return Err(error.to_string()),
        Err(_) => return Err(format!("the peer did not answer a hello within {deadline:?}")),
    };
    match welcome.refused {
        Some(why) => Err(format!("the peer refused: {why}")),
        None => Ok((link, welcome)),
    }
}

/// Reads a hello within the time one may take.
pub(super) async fn read_hello(link: &mut Link) -> Result<Hello, GreetError> {
    match tokio::time::timeout(HELLO_DEADLINE, read_word(link)).await {
        Ok(read) => read,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no hello came").into()),
    }
}

/// Why there is no hello, or no welcome.
#[derive(Debug, thiserror::Error)]
pub(super) enum GreetError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Hello(#[from] HelloError),
}

/// Reads one hello or welcome and not a byte more.
async fn read_word<T: serde::de::DeserializeOwned>(link: &mut Link) -> Result<T, GreetError> {
    let mut input = BytesMut::zeroed(4);
    link.read_exact(&mut input).await?;
    let len_bytes = u32::from_be_bytes([input[0], input[1], input[2], input[3]]) as usize;
    if len_bytes <= hello::HELLO_MAX_BYTES {
        input.resize(4 + len_bytes, 0);
        link.read_exact(&mut input[4..]).await?;
    }
    match hello::decode(&mut input)? {
        Some(word) => Ok(word),
        None => Err(HelloError::TooLong(len_bytes).into()),
    }
}

/// The mode names a command line accepts.
impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "colo" => Ok(Self::Colo),
            "remus" => Ok(Self::Remus),
            other => Err(format!("{other:?} is no mode: colo or remus")),
        }
    }
}
