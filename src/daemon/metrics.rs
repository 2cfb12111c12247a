//! What Prometheus reads of a host: a small HTTP server, off unless it is asked for.
//!
//! ```text
//!   engine ─ Events ─▶ keep_up ─▶ [`counted`] ─┐
//!   engine ◀─ Status ──────────── scrape ◀──────┴─▶ [`page`] ─▶ [`http`] ─▶ Prometheus
//! ```
//!
//! Histograms and counts of what happened come from the ring of events, which is read as the event log reads it; everything
//! else from the status, which the engine is asked for. The traps: the engine answers a status between two packets, so it is
//! asked at most once in 100 ms, however many scrape; and a server is as robust as its worst client lets it be, so
//! connections, the bytes of a request and the time for all of it are bounded.

mod counted;
mod http;
mod page;

use self::counted::Counted;
use self::http::{Format, HEAD_MAX_BYTES, Refusal, Request, Wish};
use super::accept::accept;
use super::control::{self, Answer, Asked, ask_engine};
use super::events::{Events, Wanted};
use super::links::lock;
use super::status::Status;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};

/// Connections at once.
const CONNECTIONS_MAX: usize = 16;
/// How long a connection may take, from its first byte to its last.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(5);
/// How long the engine may take to say how it is.
const STATUS_DEADLINE: Duration = Duration::from_secs(2);
/// How old a status may be that a scrape gets.
const STATUS_AGE_MAX: Duration = Duration::from_millis(100);
/// Bytes that are read of what comes after a request, so that the answer is not lost with them.
const REST_MAX_BYTES: u64 = 64 << 10;

/// Where metrics are read: `[ADDRESS:]PORT`, on the loopback address unless another one is written out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetricsAddress(pub SocketAddr);

/// What cannot be one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no address of metrics: write PORT, or IP:PORT with an IP address of this host ([IP]:PORT for IPv6)")]
pub struct BadMetricsAddress(String);

impl FromStr for MetricsAddress {
    type Err = BadMetricsAddress;

    fn from_str(text: &str) -> Result<Self, BadMetricsAddress> {
        let bad = || BadMetricsAddress(text.chars().take(80).collect());
        let port = text.strip_prefix(':').unwrap_or(text);
        if port.bytes().all(|byte| byte.is_ascii_digit()) {
            let port = port.parse().map_err(|_| bad())?;
            return Ok(Self((Ipv4Addr::LOCALHOST, port).into()));
        }
        text.parse().map(Self).map_err(|_| bad())
    }
}

impl MetricsAddress {
    /// Whether only this machine reaches it.
    fn is_loopback(self) -> bool {
        self.0.ip().to_canonical().is_loopback()
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The place that metrics are read at, open.
#[derive(Debug)]
pub struct Metrics {
    listener: TcpListener,
    address: SocketAddr,
}

impl Metrics {
    /// Opens it.
    pub async fn listen(host: &str, wanted: MetricsAddress) -> io::Result<Self> {
        let listener = TcpListener::bind(wanted.0).await?;
        let address = listener.local_addr()?;
        if !wanted.is_loopback() {
            tracing::warn!(%host, %address, "anybody who reaches this address can read this host's metrics");
        }
        Ok(Self { listener, address })
    }

    /// What a browser or a configuration of Prometheus is given.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/metrics", self.address)
    }

    /// Answers whoever connects, until the future is dropped.
    pub async fn serve(self, engine: mpsc::Sender<Asked>, history: Events) {
        let source =
            Arc::new(Source { engine, history, counted: Mutex::default(), last: tokio::sync::Mutex::default() });
        let keeping = source.clone();
        tokio::spawn(async move { keeping.keep_up().await });
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let (mut link, _) = accept("who reads the metrics", || self.listener.accept()).await;
            let source = source.clone();
            // Who finds no place is not waited for: what a socket takes at once is all it gets.
            let Ok(place) = places.clone().try_acquire_owned() else {
                let _ = link.try_write(http::refused(Refusal::Unavailable, "too many connections", false).as_bytes());
                continue;
            };
            tokio::spawn(async move {
                let _ = tokio::time::timeout(CONNECTION_DEADLINE, source.attend(&mut link)).await;
                drop(place);
            });
        }
    }
}

/// What a page is made of, of one moment.
type Seen = (Counted, Status);

/// Where the numbers come from.
struct Source {
    engine: mpsc::Sender<Asked>,
    history: Events,
    counted: Mutex<Counted>,
    /// What was told last, and when.
    last: tokio::sync::Mutex<Option<(Instant, Seen)>>,
}

impl Source {
    /// Counts events as they come; the ring keeps them only for a while.
    async fn keep_up(&self) {
        loop {
            let since = lock(&self.counted).since;
            let told = self.history.read_soon(Wanted { since, wait_ms: u64::MAX }).await;
            lock(&self.counted).take(&told.events);
            if told.ended {
                return;
            }
        }
    }

    /// What was counted until now.
    fn counted(&self) -> Counted {
        let mut counted = lock(&self.counted);
        loop {
            let told = self.history.read(counted.since);
            counted.take(&told.events);
            if !told.more {
                return counted.clone();
            }
        }
    }

    /// How the host is, or why it does not say.
    async fn look(&self) -> Result<Seen, String> {
        // Who comes while another waits gets the same answer.
        let mut last = self.last.lock().await;
        if let Some((_, seen)) = last.as_ref().filter(|(at, _)| at.elapsed() < STATUS_AGE_MAX) {
            return Ok(seen.clone());
        }
        let answer = tokio::time::timeout(STATUS_DEADLINE, ask_engine(&self.engine, control::Request::Status)).await;
        let value = match answer {
            Ok(Answer::Return(value)) => value,
            Ok(Answer::Error { desc }) => return Err(desc),
            Err(_) => return Err(format!("the engine does not answer within {STATUS_DEADLINE:?}")),
        };
        let status = serde_json::from_value(value).map_err(|error| error.to_string())?;
        let seen = (self.counted(), status);
        *last = Some((Instant::now(), seen.clone()));
        Ok(seen)
    }

    async fn attend(&self, link: &mut TcpStream) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(1024);
        let request = loop {
            if let Some(request) = http::parse(&bytes) {
                break request;
            }
            // The head and its end.
            let room = (HEAD_MAX_BYTES + 4 - bytes.len()) as u64;
            if (&mut *link).take(room).read_buf(&mut bytes).await? == 0 {
                break Request { wish: Wish::Refused(Refusal::BadRequest), head_only: false };
            }
        };
        let answer = self.answer(request).await;
        link.write_all(answer.as_bytes()).await?;
        link.shutdown().await?;
        // Closed with unread bytes in it, a socket takes the answer back.
        tokio::io::copy(&mut link.take(REST_MAX_BYTES), &mut tokio::io::sink()).await.map(drop)
    }

    async fn answer(&self, Request { wish, head_only }: Request) -> String {
        let format = match wish {
            Wish::Metrics(format) => format,
            Wish::Index => return http::found("text/html; charset=utf-8", http::INDEX, head_only),
            Wish::Refused(refusal) => return http::refused(refusal, "", head_only),
        };
        let unavailable = |why: &str| http::refused(Refusal::Unavailable, why, head_only);
        let (counted, status) = match self.look().await {
            Ok(seen) => seen,
            Err(why) => return unavailable(&why),
        };
        let Ok(text) = page::open_metrics(counted, status) else { return unavailable("the page is not complete") };
        let text = if format == Format::Classic { page::classic(&text) } else { text };
        http::found(format.content_type(), &text, head_only)
    }
}

#[cfg(test)]
mod tests;
