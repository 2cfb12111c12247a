//! The control socket of a host: one JSON object a line, in and out.
//!
//! ```text
//!   {"execute":"status"}                         →  {"return":{…}}
//!   {"execute":"protect","arguments":{…}}        →  {"return":{}}  or  {"error":{"desc":"…"}}
//! ```
//!
//! The socket is 0600 in a directory that is 0700 (QEMU's monitor socket comes out 0755), and who connects must be the same
//! user or root all the same: somebody may have opened both. A line is bounded.

use super::accept::accept;
use super::address::{Address, Link, listen_unix};
use super::events::{Events, Wanted};
use super::live::Live;
use crate::colo::hello::{Mode, ResumeOrder};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

/// Longest request, in bytes.
const REQUEST_MAX_BYTES: u64 = 64 * 1024;
/// How long a stranger may take to ask what it is refused.
const STRANGER_DEADLINE: Duration = Duration::from_secs(1);
/// How long a client waits for an answer: a host that hangs must not take its operator with it.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// The same for `protect`, which is answered when four connections are up.
const PROTECT_DEADLINE: Duration = Duration::from_secs(60);
/// The same for `unprotect`, which is answered when the peer has given the guest up, or an arbitration is over.
const UNPROTECT_DEADLINE: Duration = Duration::from_secs(30);
/// How long a host may take to end after it said that it will: it gives a guest's devices away, one after another.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// How long a host waits for another one that is opening its socket, and how often it looks.
const LOCK_DEADLINE: Duration = Duration::from_secs(5);
const LOCK_LOOK: Duration = Duration::from_millis(10);
/// Longest answer a client takes, in bytes.
const ANSWER_MAX_BYTES: u64 = 4 << 20;

/// How to protect the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protect {
    /// The peer's address.
    pub peer: String,
    /// COLO or Remus.
    #[serde(default)]
    pub mode: Mode,
    /// When the guest runs on after a capture.
    #[serde(default)]
    pub resume: ResumeOrder,
    /// Longest time between two checkpoints; the mode's default when absent.
    pub checkpoint_delay_ms: Option<u64>,
    /// Time between beats.
    pub heartbeat_interval_ms: Option<u64>,
    /// Missed beats that mean a lost peer.
    pub heartbeat_misses: Option<u32>,
    /// Memory in MiB that remembers sent pages, so that only what changed in them is sent again; 0 for none.
    #[serde(default)]
    pub delta_mib: Option<u64>,
    /// Lets the guest's packets leave before the peer owns what they tell. Remus only, and unsafe: for measuring.
    #[serde(default)]
    pub release_at_once: bool,
    /// Lets the secondary send digests instead of payloads, if it can: saves half of the packet link, costs hashing.
    #[serde(default)]
    pub packet_digests: bool,
    /// The share of its time, in percent, that a guest in lock-step must run; while differences leave it less, output is
    /// buffered as in Remus. 0: never; 50 when absent.
    #[serde(default)]
    pub min_run_percent: Option<u8>,
}

impl Protect {
    /// Fills what was not named with what the host was told.
    pub fn complete(&mut self, live: &Live) {
        self.checkpoint_delay_ms = self.checkpoint_delay_ms.or(live.checkpoint_delay_ms);
        self.heartbeat_interval_ms = self.heartbeat_interval_ms.or(live.heartbeat_ms);
        self.heartbeat_misses = self.heartbeat_misses.or(live.heartbeat_misses);
    }
}

/// What a host is asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "execute", content = "arguments", deny_unknown_fields)]
pub enum Request {
    /// How are you?
    Status,
    /// What happened?
    Events(Wanted),
    /// Replicate the guest to a peer.
    Protect(Protect),
    /// End the protection without a failover: the guest goes on here, and the peer drops what it has of it.
    Unprotect,
    /// Take a checkpoint now.
    Checkpoint,
    /// Go on alone, here; on a held guest, decide that it goes on here.
    Failover,
    /// Longest time between two checkpoints from now on.
    CheckpointDelay {
        /// In ms, at least 1.
        ms: u64,
    },
    /// Change what can change while the host runs; answers with what changed, and from when on.
    Set(Live),
    /// Stop a guest that is not in a pair.
    PauseGuest,
    /// Let it run again.
    ResumeGuest,
    /// End this host's process, and its guest with it. A protected guest goes on at the peer.
    Stop,
    /// End this host's process, and its protection before that: the primary's guest goes on here, and nowhere else; a
    /// secondary asks its primary to be dismissed. What SIGTERM does.
    Leave,
}

/// What a host answers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Return(Value),
    /// Not done, and why.
    Error {
        /// A sentence.
        desc: String,
    },
}

impl Answer {
    /// Done, with nothing to tell.
    #[must_use]
    pub fn done() -> Self {
        Self::Return(Value::Object(serde_json::Map::new()))
    }

    /// Not done.
    pub fn error(desc: impl Into<String>) -> Self {
        Self::Error { desc: desc.into() }
    }
}

/// A request with the place for its answer.
pub type Asked = (Request, oneshot::Sender<Answer>);

/// Why a host could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody is meant by that name, or it is not clear who is.
    #[error("{text}{}", nearest.as_ref().map_or_else(String::new, |name| format!("; did you mean {name}?")))]
    NoHost {
        /// A sentence.
        text: String,
        /// The nearest name that there is.
        nearest: Option<String>,
    },
    /// The directory of the sockets.
    #[error("no host runs here: {run_dir}: {source}")]
    Closed {
        /// Which.
        run_dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No such host, or not ours.
    #[error("{path}: {source} (is the host running? `xl-colo host --name …` starts one)")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or what came is no answer.
    #[error("the host gave no answer: {0}")]
    NoAnswer(String),
    /// The host refused.
    #[error("{0}")]
    Refused(String),
    /// It is ending, and has not within this time.
    #[error("the host is ending, and has not within {0:?}")]
    NotEnded(Duration),
}

impl ControlError {
    /// What kind of failure it is, for programs.
    #[must_use]
    pub fn class(&self) -> &'static str {
        match self {
            Self::NoHost { .. } | Self::Closed { .. } | Self::Connect { .. } => "no-host",
            Self::NoAnswer(_) | Self::NotEnded(_) => "no-answer",
            Self::Refused(_) => "refused",
        }
    }

    /// What to do next, where that is known and the text does not say it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::NoHost { .. } => Some("xl-colo list says who is here".into()),
            Self::Closed { source, .. } | Self::Connect { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Some("run this as the user whose host it is, or name another directory with --run-dir".into())
            }
            Self::Closed { .. } | Self::Connect { .. } => Some("xl-colo list says who is here".into()),
            Self::NoAnswer(_) | Self::NotEnded(_) => {
                Some("see whether its process is stopped or overloaded; xl-colo list has its number".into())
            }
            Self::Refused(_) => None,
        }
    }
}

/// The directory of a user's hosts: `/run/xen-colo` for root, the user's runtime directory otherwise.
#[must_use]
pub fn default_run_dir() -> PathBuf {
    let root = std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    match std::env::var_os("XDG_RUNTIME_DIR") {
        _ if root => "/run/xen-colo/hosts".into(),
        Some(dir) => Path::new(&dir).join("xen-colo"),
        None => std::env::temp_dir().join(format!("xen-colo-{}", std::env::var("USER").unwrap_or_default())),
    }
}

/// The control socket of a host.
#[must_use]
pub fn socket_path(run_dir: &Path, host: &str) -> PathBuf {
    run_dir.join(format!("{host}.sock"))
}

/// The control sockets of the hosts that run here, by name.
pub fn sockets(run_dir: &Path) -> Result<Vec<PathBuf>, ControlError> {
    let closed = |source| ControlError::Closed { run_dir: run_dir.to_owned(), source };
    let entries = std::fs::read_dir(run_dir).map_err(closed)?;
    let mut sockets: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    sockets.retain(|path| path.extension().is_some_and(|extension| extension == "sock"));
    sockets.sort();
    Ok(sockets)
}

/// The socket of the one host that runs here; a sentence names the choice where there is one.
pub fn only(run_dir: &Path) -> Result<PathBuf, ControlError> {
    let unclear = |text| ControlError::NoHost { text, nearest: None };
    match &sockets(run_dir)?[..] {
        [] => Err(unclear(format!("no host runs here ({} has no socket)", run_dir.display()))),
        [one] => Ok(one.clone()),
        many => {
            let names: Vec<_> = many.iter().filter_map(|path| path.file_stem()?.to_str()).collect();
            Err(unclear(format!("several hosts run here; choose with --host: {}", names.join(", "))))
        }
    }
}

/// Makes the directory, for this user only, and listens.
pub async fn listen(run_dir: &Path, host: &str) -> io::Result<UnixListener> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir)?;
    let (owner, me) = (std::fs::metadata(run_dir)?.uid(), std::fs::metadata("/proc/self")?.uid());
    if owner != me {
        let why = format!("{} belongs to user {owner}, not to {me}", run_dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    std::fs::set_permissions(run_dir, Permissions::from_mode(0o700))?;
    // Two that start at once would both find a socket that nobody serves yet, and one would remove the other's.
    let _alone = lock_directory(run_dir).await?;
    listen_unix(&socket_path(run_dir, host)).await
}

/// The directory under a lock, which ends with what is returned, or with the process.
async fn lock_directory(run_dir: &Path) -> io::Result<std::fs::File> {
    let dir = std::fs::File::open(run_dir)?;
    let begun = tokio::time::Instant::now();
    loop {
        match rustix::fs::flock(&dir, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(dir),
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_DEADLINE => {
                tokio::time::sleep(LOCK_LOOK).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let why =
                    format!("{} is locked by another host that is starting, and does not get on", run_dir.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether who connected is this process's user, or root; and who it is.
pub(super) fn is_ours(stream: &UnixStream) -> Result<(), String> {
    let me = std::fs::metadata("/proc/self").map(|meta| meta.uid()).ok();
    match stream.peer_cred().map(|cred| cred.uid()) {
        Ok(uid) if uid == 0 || Some(uid) == me => Ok(()),
        Ok(uid) => Err(format!("user {uid} has no say here: the host belongs to user {}", me.unwrap_or_default())),
        Err(error) => Err(format!("nobody knows who asks: {error}")),
    }
}

/// Serves a control socket. What happened is told from `history`, also while the engine is busy, and when it is gone:
/// its end is the last that is told.
pub async fn serve(listener: UnixListener, engine: mpsc::Sender<Asked>, history: Events) {
    loop {
        let (mut stream, _) = accept("who orders", || listener.accept()).await;
        let (engine, history) = (engine.clone(), history.clone());
        tokio::spawn(async move {
            if let Err(why) = is_ours(&stream) {
                tracing::warn!(%why, "a control client is of another user");
                // Who is still writing would not read.
                let mut line = Vec::new();
                let mut lines = BufReader::new(&mut stream).take(REQUEST_MAX_BYTES);
                let _ = tokio::time::timeout(STRANGER_DEADLINE, lines.read_until(b'\n', &mut line)).await;
                let answer = serde_json::to_vec(&Answer::error(why)).unwrap_or_default();
                let _ = stream.write_all(&[&answer[..], b"\n"].concat()).await;
                return;
            }
            if let Err(error) = serve_one(Box::new(stream), engine, history).await {
                tracing::debug!(%error, "control client left");
            }
        });
    }
}

async fn serve_one(link: Link, engine: mpsc::Sender<Asked>, history: Events) -> io::Result<()> {
    let (read, mut write) = tokio::io::split(link);
    let mut lines = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        if (&mut lines).take(REQUEST_MAX_BYTES).read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let answer = if line.ends_with(b"\n") || (line.len() as u64) < REQUEST_MAX_BYTES {
            match serde_json::from_slice(&line) {
                Ok(Request::Events(wanted)) => Answer::Return(serde_json::to_value(history.read_soon(wanted).await)?),
                Ok(request) => ask_engine(&engine, request).await,
                Err(error) => Answer::error(format!("not a request this host knows: {error}")),
            }
        } else {
            Answer::error(format!("a request of more than {REQUEST_MAX_BYTES} bytes"))
        };
        let too_long = !line.ends_with(b"\n");
        let mut bytes = serde_json::to_vec(&answer)?;
        bytes.push(b'\n');
        write.write_all(&bytes).await?;
        if too_long {
            return Ok(());
        }
    }
}

/// Asks the engine, and waits for its answer.
pub(super) async fn ask_engine(engine: &mpsc::Sender<Asked>, request: Request) -> Answer {
    let (reply, answer) = oneshot::channel();
    let gone = || Answer::error("the host is shutting down");
    if engine.send((request, reply)).await.is_err() {
        return gone();
    }
    answer.await.unwrap_or_else(|_| gone())
}

/// Asks a host one thing. `stop` is answered at once, and over when the host is gone: what follows may be another host on
/// the same disk, or `xl destroy` of a domain that is given its name and its devices meanwhile.
pub async fn ask(path: &Path, request: &Request) -> Result<Value, ControlError> {
    let connected = Address::Unix(path.to_owned()).connect().await;
    let link = connected.map_err(|source| ControlError::Connect { path: path.to_owned(), source })?;
    let no_answer = |error: &dyn std::fmt::Display| ControlError::NoAnswer(error.to_string());
    let mut line = serde_json::to_vec(request).map_err(|e| no_answer(&e))?;
    line.push(b'\n');
    let mut answer = Vec::new();
    let (read, mut write) = tokio::io::split(link);
    let mut lines = BufReader::new(read).take(ANSWER_MAX_BYTES);
    let exchange = async {
        write.write_all(&line).await?;
        lines.read_until(b'\n', &mut answer).await
    };
    let deadline = match request {
        Request::Protect(_) => PROTECT_DEADLINE,
        Request::Unprotect | Request::Leave => UNPROTECT_DEADLINE,
        _ => ANSWER_DEADLINE,
    };
    match tokio::time::timeout(deadline, exchange).await {
        Ok(read) => _ = read.map_err(|e| no_answer(&e))?,
        Err(_) => {
            return Err(ControlError::NoAnswer(format!("nothing within {deadline:?}; its process may be stopped")));
        }
    }
    match serde_json::from_slice(&answer).map_err(|e| no_answer(&e))? {
        Answer::Return(value) => {
            if *request == Request::Stop {
                // The other end goes with the host's runtime, its last part; a link that breaks is an end, too.
                let end = tokio::time::timeout(END_DEADLINE, lines.read_to_end(&mut answer)).await;
                end.map_err(|_| ControlError::NotEnded(END_DEADLINE))?.ok();
            }
            Ok(value)
        }
        Answer::Error { desc } => Err(ControlError::Refused(desc)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_for_this_user_only_answers_and_survives_garbage() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let listener = listen(&run_dir, "a").await.unwrap();
        let path = socket_path(&run_dir, "a");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&run_dir), mode(&path)), (0o700, 0o600));
        let (engine, mut asked) = mpsc::channel::<Asked>(4);
        tokio::spawn(serve(listener, engine, Events::new("a")));
        tokio::spawn(async move {
            while let Some((request, reply)) = asked.recv().await {
                let answer = if request == Request::Checkpoint { Answer::error("no guest") } else { Answer::done() };
                let _ = reply.send(answer);
            }
        });
        for garbage in [&b"{\"execute\":\"dance\"}\n"[..], b"\xff\n", b"{\"execute\":\"protect\",\"arguments\":{}}\n"] {
            let mut link = Address::Unix(path.clone()).connect().await.unwrap();
            link.write_all(garbage).await.unwrap();
            let mut answer = String::new();
            BufReader::new(link).read_line(&mut answer).await.unwrap();
            assert!(answer.contains("\"error\""), "{answer}");
        }
        let mut link = Address::Unix(path.clone()).connect().await.unwrap();
        let _ = link.write_all(&vec![b'x'; 70_000]).await;
        let mut answer = String::new();
        let _ = BufReader::new(link).read_line(&mut answer).await;
        assert!(answer.contains("more than 65536 bytes"), "{answer}");
        ask(&path, &Request::Status).await.unwrap();
        let refused = ask(&path, &Request::Checkpoint).await.unwrap_err();
        assert_eq!(refused.to_string(), "no guest");
        let nobody = ask(&socket_path(&run_dir, "b"), &Request::Status).await.unwrap_err();
        assert!(nobody.to_string().contains("is the host running?"));
    }
}
