//! The embedded arbiter: a file under a lock, reached directly or through a socket.
//!
//! ```text
//! file:PATH     both hosts see the file (shared storage); each swap takes the lock, rewrites, fsyncs, renames
//! ADDRESS       a process that owns the file: one JSON line in, one out
//!                 {"claim":{"guest":"web","expected":1,"holder":"b"}}  →  {"verdict":{"won":{"generation":2}}}
//!                 {"query":"web"}                                      →  {"register":{"generation":2,"holder":"b"}}
//! ```
//!
//! The rules are [`Register::swap`]'s; this is only where the register lives. The trap: the answer must not be
//! given before the register is on the medium, or an arbiter's power cut lets both sides win.

use super::accept::accept;
use super::address::{Address, BadAddress, Link, Listener};
use super::durable;
use crate::colo::arbiter::{Answer, Claim, Register, Verdict};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::Semaphore;

/// Longest request or answer, in bytes.
const LINE_MAX_BYTES: u64 = 16 * 1024;
/// Guests one file keeps at most.
const GUESTS_MAX: usize = 10_000;
/// How long one exchange with an arbiter may take before it counts as unreachable.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(1);
/// Clients of the server at once; others wait until one has left, or was silent for [`IDLE_TIMEOUT`].
const CLIENTS_MAX: usize = 256;
/// How long a client of the server may sit silent.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the arbiter is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Arbiter {
    /// A file that both hosts see.
    File(PathBuf),
    /// A process that serves one.
    Served(Address),
}

impl FromStr for Arbiter {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        match text.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => text.parse().map(Self::Served),
        }
    }
}

/// Why an arbiter gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// The file or the socket failed.
    #[error("arbiter {place}: {source}")]
    Io {
        /// Which.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// What is there is no arbiter's.
    #[error("arbiter {place}: {why}")]
    Malformed {
        /// Which.
        place: String,
        /// What is wrong.
        why: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Claim(Claim),
    Query(String),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Verdict(Verdict),
    Register(Register),
    Error(String),
}

impl Arbiter {
    /// What is in force for a guest.
    pub async fn query(&self, guest: &str) -> Result<Register, ArbiterError> {
        match self.exchange(Request::Query(guest.to_owned())).await? {
            Reply::Register(register) => Ok(register),
            _ => Err(self.malformed("answered a query with something else")),
        }
    }

    /// Puts a claim.
    pub async fn claim(&self, claim: Claim) -> Result<Verdict, ArbiterError> {
        match self.exchange(Request::Claim(claim)).await? {
            Reply::Verdict(verdict) => Ok(verdict),
            _ => Err(self.malformed("answered a claim with something else")),
        }
    }

    /// Puts a claim, for a machine that wants an [`Answer`].
    pub async fn answer(&self, claim: Claim) -> Answer {
        match self.claim(claim).await {
            Ok(verdict) => Answer::Verdict(verdict),
            Err(error) => Answer::Unreachable(error.to_string()),
        }
    }

    fn place(&self) -> String {
        match self {
            Self::File(path) => format!("file:{}", path.display()),
            Self::Served(address) => address.to_string(),
        }
    }

    fn malformed(&self, why: impl Into<String>) -> ArbiterError {
        ArbiterError::Malformed { place: self.place(), why: why.into() }
    }

    async fn exchange(&self, request: Request) -> Result<Reply, ArbiterError> {
        let io_error = |source| ArbiterError::Io { place: self.place(), source };
        let reply = match self {
            Self::File(path) => {
                let path = path.clone();
                let place = self.place();
                tokio::task::spawn_blocking(move || on_file(&path, request))
                    .await
                    .map_err(|e| ArbiterError::Malformed { place, why: e.to_string() })?
                    .map_err(io_error)?
            }
            Self::Served(address) => {
                let exchange = async {
                    let mut link = address.connect().await?;
                    let mut line = serde_json::to_vec(&request)?;
                    line.push(b'\n');
                    link.write_all(&line).await?;
                    let mut answer = String::new();
                    BufReader::new(link).take(LINE_MAX_BYTES).read_line(&mut answer).await?;
                    Ok::<_, io::Error>(serde_json::from_str(&answer)?)
                };
                match tokio::time::timeout(EXCHANGE_TIMEOUT, exchange).await {
                    Ok(reply) => reply.map_err(io_error)?,
                    Err(_) => return Err(io_error(io::ErrorKind::TimedOut.into())),
                }
            }
        };
        match reply {
            Reply::Error(why) => Err(self.malformed(why)),
            reply => Ok(reply),
        }
    }
}

/// Carries out one request on the file, under its lock.
fn on_file(path: &Path, request: Request) -> io::Result<Reply> {
    // The lock has a file of its own, because the register is replaced by rename.
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path.with_extension("lock"))?;
    lock.lock()?;
    let mut registers: BTreeMap<String, Register> = match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
        Err(e) => return Err(e),
    };
    match request {
        Request::Query(guest) => Ok(Reply::Register(registers.get(&guest).cloned().unwrap_or_default())),
        Request::Claim(claim) => {
            if registers.len() >= GUESTS_MAX && !registers.contains_key(&claim.guest) {
                return Ok(Reply::Error(format!("the register is full ({GUESTS_MAX} guests)")));
            }
            let register = registers.entry(claim.guest.clone()).or_default();
            let before = register.clone();
            let verdict = register.swap(&claim);
            if *register != before {
                durable::replace(path, &serde_json::to_vec_pretty(&registers)?)?;
            }
            Ok(Reply::Verdict(verdict))
        }
    }
}

/// Called with each claim that won, before its claimant hears of it: the place for a fence at the network.
pub type OnGrant = Arc<dyn Fn(&Claim) + Send + Sync>;

/// Serves the register in `file` to whoever connects, until the future is dropped.
pub async fn serve(listener: Listener, file: PathBuf, on_grant: OnGrant) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    while let Ok(place) = places.clone().acquire_owned().await {
        let link = accept("an arbiter's client", || listener.accept()).await;
        let (file, on_grant) = (file.clone(), on_grant.clone());
        tokio::spawn(async move {
            if let Err(error) = serve_one(link, file, on_grant).await {
                tracing::debug!(%error, "arbiter client left");
            }
            drop(place);
        });
    }
}

async fn serve_one(link: Link, file: PathBuf, on_grant: OnGrant) -> io::Result<()> {
    let (read, mut write) = tokio::io::split(link);
    let mut lines = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let mut bounded = (&mut lines).take(LINE_MAX_BYTES);
        match tokio::time::timeout(IDLE_TIMEOUT, bounded.read_until(b'\n', &mut line)).await {
            Ok(Ok(0)) | Err(_) => return Ok(()),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
        }
        let reply = match serde_json::from_slice::<Request>(&line) {
            Err(error) => Reply::Error(format!("not a request: {error}")),
            Ok(request) => {
                let claim = match &request {
                    Request::Claim(claim) => Some(claim.clone()),
                    Request::Query(_) => None,
                };
                let file = file.clone();
                // A full disk is the operator's news, who may sit at the other end.
                let carried_out = tokio::task::spawn_blocking(move || on_file(&file, request)).await?;
                let reply = carried_out.unwrap_or_else(|error| {
                    tracing::error!(%error, "the register cannot be read or written");
                    Reply::Error(format!("its register cannot be read or written: {error}"))
                });
                if let (Some(claim), Reply::Verdict(Verdict::Won { .. })) = (claim, &reply) {
                    on_grant(&claim);
                }
                reply
            }
        };
        let mut answer = serde_json::to_vec(&reply)?;
        answer.push(b'\n');
        write.write_all(&answer).await?;
        if !line.ends_with(b"\n") {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(holder: &str, expected: u64) -> Claim {
        Claim { guest: "web".into(), expected, holder: holder.into() }
    }

    #[tokio::test]
    async fn of_many_claims_at_once_exactly_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let arbiter = Arbiter::File(dir.path().join("register.json"));
        let claims: Vec<_> = (0..16)
            .map(|number| {
                let arbiter = arbiter.clone();
                tokio::spawn(async move { arbiter.claim(claim(&format!("host{number}"), 0)).await.unwrap() })
            })
            .collect();
        let mut won = 0;
        for verdict in claims {
            won += usize::from(verdict.await.unwrap() == Verdict::Won { generation: 1 });
        }
        assert_eq!(won, 1);
        assert_eq!(arbiter.query("web").await.unwrap().generation, 1);
        assert_eq!(arbiter.query("other").await.unwrap(), Register::default());
    }

    #[tokio::test]
    async fn a_served_register_answers_and_survives_garbage() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("arbiter.sock"));
        let listener = address.listen().await.unwrap();
        let (granted, mut grants) = tokio::sync::mpsc::unbounded_channel();
        let on_grant: OnGrant = Arc::new(move |claim| granted.send(claim.holder.clone()).unwrap());
        let server = tokio::spawn(serve(listener, dir.path().join("register.json"), on_grant));
        let arbiter = Arbiter::Served(address.clone());
        assert_eq!(arbiter.claim(claim("a", 0)).await.unwrap(), Verdict::Won { generation: 1 });
        assert!(matches!(arbiter.claim(claim("b", 0)).await.unwrap(), Verdict::Lost(_)));
        assert_eq!(grants.recv().await.as_deref(), Some("a"));
        assert!(grants.try_recv().is_err());
        for garbage in [&b"\xff\xff\n"[..], b"{}\n", &[b'x'; 20_000]] {
            let mut link = address.connect().await.unwrap();
            let _ = link.write_all(garbage).await;
            let mut answer = String::new();
            let _ = BufReader::new(link).read_line(&mut answer).await;
            assert!(answer.contains("error"), "{answer}");
        }
        assert_eq!(arbiter.query("web").await.unwrap().holder, "a");
        server.abort();
        let _ = server.await;
        assert!(matches!(arbiter.answer(claim("b", 1)).await, Answer::Unreachable(_)));
    }

    #[tokio::test]
    async fn a_register_that_is_not_one_is_an_error_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("register.json");
        std::fs::write(&path, "not json").unwrap();
        assert!(Arbiter::File(path.clone()).claim(claim("a", 0)).await.is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"not json");
    }
}
