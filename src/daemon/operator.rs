//! What an operator's commands do: find the host that is meant, ask it, and wait for what was begun.
//!
//! ```text
//!   NAME ─▶ find: a host of that name ─▶ its socket        list: a line a socket, those that nobody serves too
//!            └─▶ the host whose guest has that name, or that domain number
//! ```
//!
//! The trap is two hosts on one machine that both know a guest: the one that runs it is meant, not its stand-by.

pub mod progress;

use self::progress::Display;
use super::control::{self, ControlError, Request};
use super::events::{Told, Wanted};
use super::status::{Health, PairRole, Protection, Status};
use crate::say;
use serde::Serialize;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a host is looked at that something is waited for.
const LOOK: Duration = Duration::from_millis(50);
/// How long one question for events waits at the host.
const FOLLOW_WAIT: Duration = Duration::from_secs(4);
/// How long a host may take to be listed. One that hangs must not hide the others.
const LIST_DEADLINE: Duration = Duration::from_secs(2);

/// The nearest of the known names, if one is near: `colo-hots` is meant for `colo-host`.
#[must_use]
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = known.into_iter().map(|known| (strsim::damerau_levenshtein(name, known), known));
    // A third of it wrong is another word.
    let (distance, known) = near.min_by_key(|(distance, _)| *distance)?;
    (distance * 3 <= name.chars().count().max(3)).then_some(known)
}

/// A host of this machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub host: String,
    /// Its process.
    pub pid: Option<u32>,
    /// Its guest's name.
    pub guest: Option<String>,
    /// Its guest's number, if that is a Xen domain.
    pub guest_id: Option<u16>,
    /// Its side of a pair.
    pub role: Option<PairRole>,
    /// How its guest is.
    pub health: Option<Health>,
    /// The same, exactly.
    pub protection: Option<Protection>,
    /// Its peer.
    pub peer: Option<String>,
    /// What is the matter with its socket, in a word: `stale-socket` (nobody serves it), `not-yours`, `no-answer` or
    /// `refused`.
    pub trouble: Option<&'static str>,
    /// The same in a sentence.
    pub error: Option<String>,
    /// Its control socket.
    pub socket: PathBuf,
}

impl Listed {
    fn new(socket: PathBuf, answer: Result<Status, ControlError>) -> Self {
        let host = socket.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let nothing = Self {
            host,
            pid: None,
            guest: None,
            guest_id: None,
            role: None,
            health: None,
            protection: None,
            peer: None,
            trouble: None,
            error: None,
            socket,
        };
        match answer {
            Err(error) => Self { trouble: Some(trouble(&error)), error: Some(error.to_string()), ..nothing },
            Ok(status) => Self {
                host: status.host,
                pid: Some(status.pid),
                guest: status.guest,
                guest_id: status.guest_id,
                role: status.role,
                health: Some(status.health),
                protection: Some(status.protection),
                peer: status.peer,
                ..nothing
            },
        }
    }

    /// Whether the guest runs here, as far as anybody knows: not one that was stopped, nor a stand-by.
    fn has_guest(&self) -> bool {
        !matches!(self.health, None | Some(Health::Empty | Health::StandingBy | Health::Stopped))
    }
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or = |word: Option<&str>| word.unwrap_or("-").to_owned();
        let id = self.guest_id.map_or_else(|| "-".to_owned(), |id| id.to_string());
        let (guest, role) = (or(self.guest.as_deref()), or(self.role.map(PairRole::name)));
        // What stands behind a word of trouble is for --json, and for the command that is given next.
        let state = self.trouble.or(self.health.map(Health::name)).unwrap_or("-");
        let row = Row { host: &self.host, guest: &guest, id: &id, role: &role, state };
        write!(f, "{row} {}", or(self.peer.as_deref()))
    }
}

/// Why a socket gave no status, in a word.
fn trouble(error: &ControlError) -> &'static str {
    match error {
        ControlError::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => "not-yours",
        ControlError::Connect { .. } | ControlError::Closed { .. } | ControlError::NoHost { .. } => "stale-socket",
        ControlError::NoAnswer(_) | ControlError::NotEnded(_) => "no-answer",
        ControlError::Refused(_) => "refused",
    }
}

/// The columns of a list.
struct Row<'a> {
    host: &'a str,
    guest: &'a str,
    id: &'a str,
    role: &'a str,
    state: &'a str,
}

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, guest, id, role, state } = self;
        write!(f, "{host:<16} {guest:<16} {id:>5} {role:<10} {state:<12}")
    }
}

/// What stands above a list.
#[must_use]
pub fn list_head() -> String {
    let row = Row { host: "HOST", guest: "GUEST", id: "ID", role: "ROLE", state: "STATE" };
    format!("{row} PEER")
}

/// The hosts of this machine. None where there is no directory of sockets.
pub async fn list(run_dir: &Path) -> Result<Vec<Listed>, ControlError> {
    let sockets = match control::sockets(run_dir) {
        Err(_) if !run_dir.exists() => return Ok(Vec::new()),
        sockets => sockets?,
    };
    let asked: Vec<_> = sockets
        .into_iter()
        .map(|socket| {
            tokio::spawn(async move {
                let answer = tokio::time::timeout(LIST_DEADLINE, status(&socket)).await;
                let silent = |_| Err(ControlError::NoAnswer(format!("nothing within {LIST_DEADLINE:?}")));
                Listed::new(socket, answer.unwrap_or_else(silent))
            })
        })
        .collect();
    let mut listed = Vec::with_capacity(asked.len());
    for asked in asked {
        listed.extend(asked.await.ok());
    }
    Ok(listed)
}

/// What a host says of itself.
pub async fn status(socket: &Path) -> Result<Status, ControlError> {
    let answer = control::ask(socket, &Request::Status).await?;
    serde_json::from_value(answer).map_err(other_version)
}

/// What happened to a host after `since`, told in pieces; with `follow` also what happens from now on, until the host
/// ends. Ends when `tell` says that nobody listens.
pub async fn read_events(
    socket: &Path,
    mut since: u64,
    follow: bool,
    mut tell: impl FnMut(&Told) -> bool,
) -> Result<(), ControlError> {
    loop {
        let wait_ms = if follow { FOLLOW_WAIT.as_millis() as u64 } else { 0 };
        let answer = match control::ask(socket, &Request::Events(Wanted { since, wait_ms })).await {
            // A host that ends takes its socket away, one that is killed leaves it.
            Err(_) if follow && since > 0 && !socket.exists() => return Ok(()),
            answer => answer?,
        };
        let told: Told = serde_json::from_value(answer).map_err(other_version)?;
        since = told.since;
        if !tell(&told) || told.ended || !(follow || told.more) {
            return Ok(());
        }
    }
}

fn other_version(error: serde_json::Error) -> ControlError {
    ControlError::NoAnswer(format!("it is of another version: {error}"))
}

/// Waits until the guest of a host is protected, and shows how far that is.
pub async fn until_protected(socket: &Path) -> Result<PathBuf, ControlError> {
    let mut display = Display::new(say::is_json());
    loop {
        let status = status(socket).await?;
        match status.protection {
            Protection::Protected => {
                display.end();
                return Ok(socket.to_owned());
            }
            Protection::Syncing => status.work.iter().for_each(|work| display.show(*work)),
            other => {
                display.end();
                let why = status.why.as_deref().unwrap_or("no reason given");
                return Err(ControlError::Refused(format!("the guest is {other}: {why}")));
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until it is decided that a guest goes on here, and all it wrote is in its disk image.
pub async fn until_committed(socket: &Path) -> Result<PathBuf, ControlError> {
    let mut display = Display::new(say::is_json());
    loop {
        let status = status(socket).await?;
        match (status.protection, status.work) {
            (Protection::TakenOver, Some(work)) => display.show(work),
            (Protection::TakenOver, None) => {
                display.end();
                return Ok(socket.to_owned());
            }
            (Protection::Stopped | Protection::Failed | Protection::Held | Protection::Empty, _) => {
                let why = status.why.as_deref().unwrap_or("no reason given");
                return Err(ControlError::Refused(format!("the guest is {}: {why}", status.protection)));
            }
            _ => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The control socket of the host that is meant: by its own name, by its guest's, by its guest's number, or by being the
/// only one.
pub async fn find(run_dir: &Path, name: Option<&str>) -> Result<PathBuf, ControlError> {
    let Some(name) = name else {
        return control::only(run_dir);
    };
    let socket = control::socket_path(run_dir, name);
    if socket.exists() {
        return Ok(socket);
    }
    choose(name, &socket, list(run_dir).await?)
}

fn choose(name: &str, socket: &Path, listed: Vec<Listed>) -> Result<PathBuf, ControlError> {
    let id = name.parse::<u16>().ok();
    let is_meant = |listed: &&Listed| listed.guest.as_deref() == Some(name) || id.is_some() && listed.guest_id == id;
    let meant: Vec<_> = listed.iter().filter(is_meant).collect();
    let runs: Vec<_> = meant.iter().copied().filter(|listed| listed.has_guest()).collect();
    match (&meant[..], &runs[..]) {
        ([one], _) | (_, [one]) => return Ok(one.socket.clone()),
        ([], _) => {}
        (many, _) => {
            let hosts: Vec<_> = many.iter().map(|listed| listed.host.as_str()).collect();
            let text = format!("several hosts here know the guest {name:?}; name the host: {}", hosts.join(", "));
            return Err(ControlError::NoHost { text, nearest: None });
        }
    }
    let names: Vec<&str> = listed.iter().flat_map(|l| [Some(l.host.as_str()), l.guest.as_deref()]).flatten().collect();
    let nearest = nearest(name, names.iter().copied()).map(str::to_owned);
    let path = socket.display();
    let known = if names.is_empty() { "none runs here".to_owned() } else { format!("there is {}", names.join(", ")) };
    let text = format!("no host and no guest {name:?}: {path} is not there (is the host running?); {known}");
    Err(ControlError::NoHost { text, nearest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, guest: &str, id: Option<u16>, health: Health) -> Listed {
        let status = Status { host: name.into(), guest: Some(guest.into()), guest_id: id, health, ..Status::default() };
        Listed::new(format!("/run/{name}.sock").into(), Ok(status))
    }

    fn chosen(name: &str, listed: &[Listed]) -> String {
        match choose(name, Path::new("/run/x.sock"), listed.to_vec()) {
            Ok(path) => path.display().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_guest_is_named_by_name_or_number_and_its_host_is_meant() {
        let one = [host("a", "web", Some(7), Health::Protected), host("b", "db", Some(8), Health::StandingBy)];
        assert_eq!(chosen("web", &one), "/run/a.sock");
        assert_eq!(chosen("7", &one), "/run/a.sock");
        assert_eq!(chosen("8", &one), "/run/b.sock", "the stand-by, where nobody else knows it");
        let both = [host("a", "web", None, Health::Degraded), host("b", "web", None, Health::StandingBy)];
        assert_eq!(chosen("web", &both), "/run/a.sock", "where it runs");
        let torn = [host("a", "web", None, Health::Undecided), host("b", "web", None, Health::Undecided)];
        assert!(chosen("web", &torn).contains("name the host: a, b"));
    }

    #[test]
    fn a_name_that_nobody_has_is_answered_with_the_nearest() {
        let one = [host("alpha", "web", None, Health::Protected)];
        let text = chosen("wbe", &one);
        assert!(text.contains("is the host running?") && text.contains("did you mean web?"), "{text}");
        assert!(!chosen("mail", &one).contains("did you mean"));
        assert!(chosen("web", &[]).contains("none runs here"));
        assert_eq!(nearest("colo-hots", ["colo-port", "colo-host"]), Some("colo-host"));
        assert_eq!(nearest("x", ["y"]), None.or(Some("y")), "of a letter, one may be wrong");
        assert_eq!(nearest("memory", ["colo-host"]), None);
    }

    #[test]
    fn a_line_has_what_is_known() {
        let line = host("a", "web", Some(7), Health::TakenOver).to_string();
        assert_eq!(line, "a                web                  7 -          taken-over   -");
        let dead = |error| Listed::new("/run/c.sock".into(), Err(error)).to_string();
        let silent = dead(ControlError::NoAnswer("it hangs".into()));
        assert_eq!(silent, "c                -                    - -          no-answer    -");
        let connect = |kind: io::ErrorKind| ControlError::Connect { path: "/run/c.sock".into(), source: kind.into() };
        assert!(dead(connect(io::ErrorKind::ConnectionRefused)).ends_with(" stale-socket -"));
        assert!(dead(connect(io::ErrorKind::PermissionDenied)).ends_with(" not-yours    -"));
        assert_eq!(list_head().find("STATE"), line.find("taken-over"));
    }
}
