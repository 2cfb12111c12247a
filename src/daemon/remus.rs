//! `xl-colo remus`: a protection from its beginning to its end, with the letters of `xl remus`.
//!
//! ```text
//!   find the host that has the domain ─▶ protect ─▶ watch ─┬ a signal: unprotect                     ─▶ exit code 0
//!                                           │              ├ the guest went to the peer              ─▶ 0
//!                                           └ refused ─▶ 1 └ the peer is lost, the guest goes on here ─▶ 1
//! ```
//!
//! As with xl, the command stands for the protection while it runs. Unlike xl's, it is not the engine: when it is killed,
//! the host's process goes on protecting.
//!
//! Source: xen `tools/xl/xl_migrate.c`, main_remus. xl's `-d` (no disk replication) is for disks that both hosts share. A
//! guest of ours runs on the disk that is replicated, so it is refused but for `-b`, where nothing is kept anyway.

use super::address::Address;
use super::control::{self, ControlError, Protect, Request};
use super::status::{Protection, Status};
use super::xen;
use crate::colo::hello::{Mode, ResumeOrder};
use crate::say;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How often the protection is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// What was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// The domain's name or number.
    pub domain: String,
    /// The peer: a name for `shell`, an address, or with an empty `shell` a command.
    pub peer: String,
    /// What runs a command on the peer; `ssh` when absent.
    pub shell: Option<String>,
    /// Lock-step instead of checkpoints at intervals.
    pub colo: bool,
    /// Time between two checkpoints; the mode's own when absent.
    pub interval_ms: Option<u64>,
    /// Pages go as they are.
    pub uncompressed: bool,
    /// A peer that keeps nothing.
    pub blackhole: bool,
    /// Packets wait for nothing.
    pub no_network: bool,
    /// Disks are not replicated.
    pub no_disk: bool,
    /// The three above are allowed.
    pub force: bool,
    /// The receiver is told to stay in the foreground.
    pub foreground: bool,
    /// The directory of the control sockets.
    pub run_dir: PathBuf,
}

/// Why a protection did not begin, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum RemusError {
    /// xl's -b, -n and -d need -F.
    #[error("-{0} gives up what protects the guest; it needs -F")]
    Unsafe(char),
    /// Disks that are not replicated.
    #[error("-d: a guest runs here on the disk that is replicated; only -b does without")]
    Disk,
    /// Nobody has the domain.
    #[error("{0}")]
    NotFound(String),
    /// The host said no, or nothing.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The protection is over, and the guest here still.
    #[error("backup failed; the guest goes on here, unprotected: {0}")]
    Over(String),
    /// Signals cannot be waited for.
    #[error("wait for signals: {0}")]
    Signals(std::io::Error),
}

impl Config {
    fn check(&self) -> Result<(), RemusError> {
        let letters = [(self.blackhole, 'b'), (self.no_network, 'n'), (self.no_disk, 'd')];
        match letters.into_iter().find(|(given, _)| *given && !self.force) {
            Some((_, letter)) => Err(RemusError::Unsafe(letter)),
            None if self.no_disk && !self.blackhole => Err(RemusError::Disk),
            None => Ok(()),
        }
    }

    /// How the peer is reached, as an [`Address`] is written.
    fn address(&self, program: &Path) -> String {
        if self.blackhole {
            return format!("exec:{} receive --blackhole", quoted(&program.to_string_lossy()));
        }
        match self.shell.as_deref() {
            Some("") => format!("exec:{}", self.peer),
            None if self.peer.parse::<Address>().is_ok() => self.peer.clone(),
            shell => {
                let foreground = if self.foreground { " -e" } else { "" };
                format!("exec:exec {} {} xl-colo receive{foreground}", shell.unwrap_or("ssh"), quoted(&self.peer))
            }
        }
    }

    fn protect(&self, program: &Path) -> Protect {
        Protect {
            peer: self.address(program),
            mode: if self.colo { Mode::Colo } else { Mode::Remus },
            resume: ResumeOrder::default(),
            checkpoint_delay_ms: self.interval_ms,
            heartbeat_interval_ms: None,
            heartbeat_misses: None,
            delta_mib: self.uncompressed.then_some(0),
            release_at_once: self.no_network,
            packet_digests: false,
            min_run_percent: None,
        }
    }
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Protects a domain until the protection is over.
pub async fn run(config: &Config) -> Result<(), RemusError> {
    config.check()?;
    let (socket, guest) = find(&config.run_dir, &config.domain).await?;
    let mut terminated = signal(SignalKind::terminate()).map_err(RemusError::Signals)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(RemusError::Signals)?;
    let program = std::env::current_exe().unwrap_or_else(|_| "xl-colo".into());
    control::ask(&socket, &Request::Protect(config.protect(&program))).await?;
    let mut protected = false;
    loop {
        let status = status(&socket).await?;
        match status.protection {
            Protection::Protected if !protected => {
                protected = true;
                let peer = status.peer.unwrap_or_default();
                let text = format!("{guest} is protected: host {peer} can go on with it");
                tell(&guest, "protected", &text);
            }
            Protection::Stopped => {
                let why = status.why.unwrap_or_else(|| "another host has it".into());
                tell(&guest, "stopped", &format!("{guest} is not here any more: {why}"));
                return Ok(());
            }
            Protection::Unprotected | Protection::TakenOver | Protection::Failed | Protection::Empty => {
                return Err(RemusError::Over(status.why.unwrap_or_else(|| "no reason was given".into())));
            }
            _ => {}
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = terminated.recv() => break,
            _ = interrupted.recv() => break,
        }
    }
    control::ask(&socket, &Request::Unprotect).await?;
    tell(&guest, "unprotected", &format!("{guest} goes on here, unprotected"));
    Ok(())
}

/// A line, or an object with it.
fn tell(guest: &str, health: &str, text: &str) {
    if say::is_json() {
        say::out(&serde_json::json!({"guest": guest, "health": health, "text": text}));
    } else {
        say::out(&text);
    }
}

async fn status(socket: &Path) -> Result<Status, ControlError> {
    let answer = control::ask(socket, &Request::Status).await?;
    serde_json::from_value(answer).map_err(|error| ControlError::NoAnswer(error.to_string()))
}

/// The control socket of the host that has a domain, and the domain's name.
async fn find(run_dir: &Path, domain: &str) -> Result<(PathBuf, String), RemusError> {
    let mut seen = Vec::new();
    let name = domain.parse().ok().and_then(xen::domain_name).unwrap_or_else(|| domain.to_owned());
    for socket in control::sockets(run_dir)? {
        // One that does not answer may be a leftover.
        let Ok(status) = status(&socket).await else { continue };
        let elsewhere = matches!(status.protection, Protection::StandingBy | Protection::Stopped | Protection::Empty);
        match status.guest {
            Some(guest) if guest == name && !elsewhere => return Ok((socket, guest)),
            Some(guest) => seen.push(format!("host {} has {guest}, {}", status.host, status.protection)),
            None => seen.push(format!("host {} has no guest", status.host)),
        }
    }
    let seen = if seen.is_empty() { "no host runs here".to_owned() } else { seen.join("; ") };
    Err(RemusError::NotFound(format!("no host here runs a guest {domain:?}: {seen}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(peer: &str, shell: Option<&str>) -> Config {
        Config { domain: "web".into(), peer: peer.into(), shell: shell.map(Into::into), ..Config::default() }
    }

    #[test]
    fn the_peer_is_reached_as_xl_reaches_it() {
        let address = |config: Config| config.address(Path::new("/usr/sbin/xl-colo"));
        assert_eq!(address(config("b", None)), "exec:exec ssh 'b' xl-colo receive");
        assert_eq!(address(config("b", Some("rsh -l root"))), "exec:exec rsh -l root 'b' xl-colo receive");
        assert_eq!(address(config("nc b 9740", Some(""))), "exec:nc b 9740", "the peer is the command");
        assert_eq!(address(config("192.0.2.2:9740", None)), "192.0.2.2:9740");
        assert_eq!(address(config("it's", None)), r"exec:exec ssh 'it'\''s' xl-colo receive");
        let hole = Config { blackhole: true, ..config("b", None) };
        assert_eq!(address(hole), "exec:'/usr/sbin/xl-colo' receive --blackhole");
        assert_eq!(address(Config { foreground: true, ..config("b", None) }), "exec:exec ssh 'b' xl-colo receive -e");
    }

    #[test]
    fn what_is_unsafe_must_be_asked_for() {
        let unsafe_ones = [
            Config { blackhole: true, ..config("b", None) },
            Config { no_network: true, ..config("b", None) },
            Config { no_disk: true, ..config("b", None) },
        ];
        for (config, letter) in unsafe_ones.into_iter().zip(["-b", "-n", "-d"]) {
            let refused = config.check().unwrap_err().to_string();
            assert!(refused.starts_with(letter) && refused.contains("-F"), "{refused}");
            let forced = Config { force: true, ..config };
            assert_eq!(forced.check().is_err(), letter == "-d", "{letter}");
            Config { blackhole: true, ..forced }.check().unwrap();
        }
    }
}
