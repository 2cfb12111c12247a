//! The demo's load: clients that write, read, and remember every promise the guest made them.
//!
//! ```text
//! one long connection    PUT /k/long-0, GET an earlier key, GET /, PUT /k/long-1, …   must live through it all
//! some short workers     connect, PUT /k/short-<worker>-<n>, close; in the end GET    may fail, and try again
//!        │
//!        └─▶ Ledger: the writes that were acknowledged ──▶ verify(): each of them read back over new connections
//! ```
//!
//! A write without an answer is *unknown*: it may be there or not, and neither is a loss. An acknowledged one is a
//! promise. Values follow from the run's seed and the key, so the ledger is a list of names, and a value left on the
//! disk by an earlier run does not pass for this one's.
//!
//! The trap is in measuring the takeover: after a kill the replies of the dead host are still on their way. So only a
//! request *sent* after the kill counts ([`Live::mark_kill`]); only the survivor can have answered that one.
//!
//! The HTTP here is its own (RFC 9112, `Content-Length` bodies only): shared code would share its mistakes with the guest.

mod http;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

pub use http::HttpError;
use http::{Connection, Reply};

/// A value's length, in bytes.
const VALUE_BYTES: std::ops::RangeInclusive<u64> = 100..=2000;

/// What each client of the embedded demo waits between two requests, in milliseconds.
pub const PAUSE_MS: u64 = 4;

/// How long a short worker waits before it tries a failed write again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Connections that read the ledger back.
const VERIFY_PARALLEL: usize = 8;

/// Attempts to read one key back before it is given up.
const VERIFY_ATTEMPTS: usize = 3;

/// Texts kept of anything that can happen often.
const TEXTS_MAX: usize = 20;

/// What load to make.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Workers that open a connection for each write.
    pub short_connections_parallel: usize,
    /// What each client waits between two requests, in milliseconds.
    pub pause_between_ms: u64,
    /// Keys written at most, by all clients together: the guest's disk is finite. Give it room for the whole run;
    /// when it is used up, only reads go on.
    pub keys_max: u64,
    /// What values follow from, together with the key.
    pub seed: u64,
}

impl ClientConfig {
    /// The load of the embedded demo.
    #[must_use]
    pub const fn of_the_demo(seed: u64) -> Self {
        Self { short_connections_parallel: 4, pause_between_ms: PAUSE_MS, keys_max: 100_000, seed }
    }
}

/// Figures the demo may read while the load runs. Shared; all methods take `&self`.
#[derive(Debug)]
pub struct Live {
    started: Instant,
    acknowledged: AtomicU64,
    acknowledged_after_kill: AtomicU64,
    replies: AtomicU64,
    retries: AtomicU64,
    last_reply_micros: AtomicU64,
    longest_silence_micros: AtomicU64,
    killed: OnceLock<Instant>,
    takeover: OnceLock<Duration>,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            acknowledged: AtomicU64::new(0),
            acknowledged_after_kill: AtomicU64::new(0),
            replies: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            last_reply_micros: AtomicU64::new(0),
            longest_silence_micros: AtomicU64::new(0),
            killed: OnceLock::new(),
            takeover: OnceLock::new(),
        }
    }
}

impl Live {
    /// Writes acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Relaxed)
    }

    /// Of these, the ones sent after the kill.
    pub fn acknowledged_after_kill(&self) -> u64 {
        self.acknowledged_after_kill.load(Relaxed)
    }

    /// Replies of any kind so far.
    pub fn replies(&self) -> u64 {
        self.replies.load(Relaxed)
    }

    /// Short-connection writes that failed and were tried again so far.
    pub fn retries(&self) -> u64 {
        self.retries.load(Relaxed)
    }

    /// When the last reply came, or `None` before the first one.
    pub fn last_reply(&self) -> Option<Instant> {
        (self.replies() > 0).then(|| self.started + Duration::from_micros(self.last_reply_micros.load(Relaxed)))
    }

    /// The longest time between two replies that came one after the other.
    pub fn longest_silence(&self) -> Duration {
        Duration::from_micros(self.longest_silence_micros.load(Relaxed))
    }

    /// Says that a host is gone. Call it once, when its exit was reaped or it was stopped: a signal that was only
    /// sent leaves it time for one more answer.
    pub fn mark_kill(&self) {
        _ = self.killed.set(Instant::now());
    }

    /// From [`Live::mark_kill`] to the first reply to a request sent after it; `None` until there is one.
    pub fn takeover(&self) -> Option<Duration> {
        self.takeover.get().copied()
    }

    /// Notes a reply to a request sent at `sent`.
    fn replied(&self, sent: Instant, acknowledged_write: bool) {
        let now = Instant::now();
        let micros = u64::try_from((now - self.started).as_micros()).unwrap_or(u64::MAX);
        let before = self.last_reply_micros.fetch_max(micros, Relaxed);
        if self.replies.fetch_add(1, Relaxed) > 0 {
            self.longest_silence_micros.fetch_max(micros.saturating_sub(before), Relaxed);
        }
        let after_kill = self.killed.get().is_some_and(|killed| sent >= *killed);
        if let Some(killed) = self.killed.get().filter(|_| after_kill) {
            self.takeover.get_or_init(|| now - *killed);
        }
        if acknowledged_write {
            self.acknowledged.fetch_add(1, Relaxed);
            self.acknowledged_after_kill.fetch_add(u64::from(after_kill), Relaxed);
        }
    }
}

/// The writes the guest acknowledged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    /// The run's seed.
    pub seed: u64,
    /// Key names, without the `/k/`.
    pub names: Vec<String>,
}

/// What a run of the load saw.
#[derive(Debug, Clone, Default)]
pub struct ClientReport {
    /// Every acknowledged write.
    pub ledger: Ledger,
    /// Writes that never got an answer.
    pub unknown_writes: u64,
    /// Short-connection writes that failed and were tried again.
    pub retries: u64,
    /// Requests the guest answered with a status other than 2xx.
    pub refused: u64,
    /// What else was wrong: reads with other bytes than those acknowledged, refusals (the first 20 of each client).
    pub failures: Vec<String>,
    /// The long connection saw no error, end, reset or timeout.
    pub connection_kept: bool,
    /// Otherwise, the first one.
    pub connection_error: Option<String>,
}

/// What reading the ledger back gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verification {
    /// Keys looked for: all of the ledger's.
    pub checked: u64,
    /// Keys that are missing, differ, or could not be read.
    pub lost: Vec<String>,
    /// Why, for some of them.
    pub failures: Vec<String>,
}

/// The value the key `name` must have in the run with `seed`: the name, then noise.
#[must_use]
pub fn value_of(seed: u64, name: &str) -> Vec<u8> {
    let hash = name
        .bytes()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let mut noise = Noise(hash);
    let len_bytes = VALUE_BYTES.start() + noise.next() % (VALUE_BYTES.end() - VALUE_BYTES.start() + 1);
    let mut value = format!("{name}:").into_bytes();
    while (value.len() as u64) < len_bytes {
        value.push(noise.next() as u8);
    }
    value
}

/// Splitmix64, by Sebastiano Vigna.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Loads `addr` until `stop` holds true or its sender is gone; then ends after the requests under way.
pub async fn run(addr: SocketAddr, stop: watch::Receiver<bool>, config: ClientConfig, live: Arc<Live>) -> ClientReport {
    let keys_left = Arc::new(AtomicU64::new(config.keys_max));
    let mut clients = JoinSet::new();
    for worker in 0..=config.short_connections_parallel {
        let report = ClientReport { connection_kept: true, ..ClientReport::default() };
        let (config, live) = (config.clone(), live.clone());
        let client = Client { addr, stop: stop.clone(), config, live, keys_left: keys_left.clone(), report };
        match worker {
            0 => clients.spawn(client.run_long()),
            _ => clients.spawn(client.run_short(worker)),
        };
    }
    let ledger = Ledger { seed: config.seed, names: Vec::new() };
    let mut whole = ClientReport { ledger, connection_kept: true, ..ClientReport::default() };
    while let Some(part) = clients.join_next().await {
        match part {
            Ok(part) => whole.add(part),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    whole
}

impl ClientReport {
    fn add(&mut self, part: Self) {
        self.ledger.names.extend(part.ledger.names);
        self.unknown_writes += part.unknown_writes;
        self.retries += part.retries;
        self.refused += part.refused;
        self.failures.extend(part.failures);
        self.connection_kept &= part.connection_kept;
        self.connection_error = self.connection_error.take().or(part.connection_error);
    }

    fn fail(&mut self, text: impl FnOnce() -> String) {
        if self.failures.len() < TEXTS_MAX {
            self.failures.push(text());
        }
    }
}

struct Client {
    addr: SocketAddr,
    stop: watch::Receiver<bool>,
    config: ClientConfig,
    live: Arc<Live>,
    keys_left: Arc<AtomicU64>,
    report: ClientReport,
}

impl Client {
    async fn run_long(mut self) -> ClientReport {
        if let Err(error) = self.talk_long().await {
            self.report.connection_kept = false;
            self.report.connection_error = Some(error.to_string());
        }
        self.report
    }

    /// One connection, from the start to the stop. Its first error ends it.
    async fn talk_long(&mut self) -> Result<(), HttpError> {
        let mut connection = Connection::open(self.addr).await?;
        let mut noise = Noise(self.config.seed);
        for n in 0_u64.. {
            if self.take_key() {
                let name = format!("long-{n}");
                self.report.unknown_writes += 1;
                self.put(&mut connection, &name, Instant::now()).await?;
            }
            if self.paused().await {
                break;
            }
            self.read_back(&mut connection, &mut noise).await?;
            if self.paused().await {
                break;
            }
            self.get(&mut connection, "/").await?;
            if self.paused().await {
                break;
            }
        }
        Ok(())
    }

    /// A connection for each write, and for each read when there are no more keys; what failed is tried again until it gets
    /// an answer.
    async fn run_short(mut self, worker: usize) -> ClientReport {
        let mut noise = Noise(self.config.seed ^ worker as u64);
        let mut n = 0_u64;
        while !self.paused().await {
            let name = self.take_key().then(|| format!("short-{worker}-{n}"));
            if name.is_some() {
                n += 1;
                self.report.unknown_writes += 1;
            }
            loop {
                let answered = match &name {
                    Some(name) => self.put_alone(name).await,
                    None => self.read_back_alone(&mut noise).await,
                };
                let Err(error) = answered else { break };
                tracing::debug!(name, %error, "a short connection failed");
                if self.stopped_within(RETRY_PAUSE).await {
                    return self.report;
                }
                self.report.retries += 1;
                self.live.retries.fetch_add(1, Relaxed);
            }
        }
        self.report
    }

    /// Reads a key that was acknowledged, if there is one.
    async fn read_back(&mut self, connection: &mut Connection, noise: &mut Noise) -> Result<(), HttpError> {
        let known = self.report.ledger.names.len() as u64;
        let Some(at) = noise.next().checked_rem(known).and_then(|at| usize::try_from(at).ok()) else { return Ok(()) };
        let name = self.report.ledger.names[at].clone();
        let reply = self.get(connection, &format!("/k/{name}")).await?;
        if reply.is_success() && reply.body != value_of(self.config.seed, &name) {
            self.report.fail(|| format!("GET /k/{name} gave other bytes than were acknowledged"));
        }
        Ok(())
    }

    async fn read_back_alone(&mut self, noise: &mut Noise) -> Result<(), HttpError> {
        let mut connection = Connection::open(self.addr).await?;
        connection.close_after_reply();
        match self.report.ledger.names.is_empty() {
            true => self.get(&mut connection, "/").await.map(drop),
            false => self.read_back(&mut connection, noise).await,
        }
    }

    async fn put_alone(&mut self, name: &str) -> Result<(), HttpError> {
        let sent = Instant::now();
        let mut connection = Connection::open(self.addr).await?;
        connection.close_after_reply();
        self.put(&mut connection, name, sent).await
    }

    /// Writes `name`; any answer ends its being unknown, a 2xx puts it into the ledger.
    async fn put(&mut self, connection: &mut Connection, name: &str, sent: Instant) -> Result<(), HttpError> {
        let value = value_of(self.config.seed, name);
        let reply = connection.request("PUT", &format!("/k/{name}"), Some(&value)).await?;
        self.report.unknown_writes -= 1;
        self.live.replied(sent, reply.is_success());
        if reply.is_success() {
            self.report.ledger.names.push(name.to_owned());
        } else {
            self.refused(&reply, "PUT", name);
        }
        Ok(())
    }

    async fn get(&mut self, connection: &mut Connection, path: &str) -> Result<Reply, HttpError> {
        let sent = Instant::now();
        let reply = connection.request("GET", path, None).await?;
        self.live.replied(sent, false);
        if !reply.is_success() {
            self.refused(&reply, "GET", path);
        }
        Ok(reply)
    }

    fn refused(&mut self, reply: &Reply, method: &str, what: &str) {
        self.report.refused += 1;
        self.report.fail(|| format!("{method} {what} was answered with status {}", reply.status));
    }

    fn take_key(&self) -> bool {
        self.keys_left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    async fn paused(&mut self) -> bool {
        self.stopped_within(Duration::from_millis(self.config.pause_between_ms)).await
    }

    async fn stopped_within(&mut self, pause: Duration) -> bool {
        // A sender that is gone counts as a stop: nobody is left to say it.
        let stopped = async { _ = self.stop.wait_for(|&stop| stop).await };
        tokio::select! {
            biased;
            () = stopped => true,
            () = tokio::time::sleep(pause) => false,
        }
    }
}

/// Waits until the guest answers a request, or says what stood in the way at the end.
///
/// # Errors
/// The last failure, when `deadline` passes.
pub async fn wait_for_answer(addr: SocketAddr, deadline: Duration) -> Result<(), HttpError> {
    let until = Instant::now() + deadline;
    loop {
        let answer = async { Connection::open(addr).await?.request("GET", "/", None).await };
        match answer.await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Reads every acknowledged write back over new connections and compares the bytes.
pub async fn verify(addr: SocketAddr, ledger: &Ledger) -> Verification {
    let mut readers = JoinSet::new();
    let share = ledger.names.len().div_ceil(VERIFY_PARALLEL).max(1);
    for names in ledger.names.chunks(share) {
        let names = names.to_vec();
        readers.spawn(verify_share(addr, ledger.seed, names));
    }
    let mut whole = Verification::default();
    while let Some(part) = readers.join_next().await {
        match part {
            Ok(part) => {
                whole.checked += part.checked;
                whole.lost.extend(part.lost);
                whole.failures.extend(part.failures);
            }
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    whole.lost.sort();
    whole
}

async fn verify_share(addr: SocketAddr, seed: u64, names: Vec<String>) -> Verification {
    let mut seen = Verification { checked: names.len() as u64, ..Verification::default() };
    let mut connection = None;
    let mut names = names.into_iter();
    for name in names.by_ref() {
        let why = match read_back(addr, &mut connection, &name).await {
            Ok(reply) if reply.is_success() && reply.body == value_of(seed, &name) => continue,
            Ok(reply) if reply.is_success() => format!("{name}: other bytes than were acknowledged"),
            Ok(reply) => format!("{name}: status {}", reply.status),
            Err(error) => {
                // A guest that cannot be reached would cost a timeout for each key.
                seen.failures.push(format!("{name} and what follows it: {error}"));
                seen.lost.push(name);
                break;
            }
        };
        seen.lost.push(name);
        if seen.failures.len() < TEXTS_MAX {
            seen.failures.push(why);
        }
    }
    seen.lost.extend(names);
    seen
}

async fn read_back(addr: SocketAddr, connection: &mut Option<Connection>, name: &str) -> Result<Reply, HttpError> {
    let mut attempt = 1;
    loop {
        let reply = async {
            let open = match connection.take() {
                Some(open) => open,
                None => Connection::open(addr).await?,
            };
            connection.insert(open).request("GET", &format!("/k/{name}"), None).await
        };
        match reply.await {
            Ok(reply) => return Ok(reply),
            Err(error) if attempt == VERIFY_ATTEMPTS => return Err(error),
            Err(_) => *connection = None,
        }
        attempt += 1;
    }
}

#[cfg(test)]
mod tests;
