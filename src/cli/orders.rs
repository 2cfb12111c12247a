//! What a host that runs is asked and told.

use crate::colo::hello::{Mode, ResumeOrder};
use crate::daemon::address::Address;
use crate::daemon::control::{self, Protect};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

use super::config::{self, Config, ConfigError, xl};
use super::parse_host_name;

/// Which host a command is for.
#[derive(Args, Clone, Debug)]
pub struct HostRef {
    /// The host: its name, or the name or number of its guest; may be left out when only one runs here
    #[arg(value_name = "NAME", value_parser = parse_host_name, conflicts_with = "host")]
    pub name: Option<String>,
    /// The same
    #[arg(long, value_name = "NAME", value_parser = parse_host_name)]
    pub host: Option<String>,
    /// The directory of the control sockets
    #[arg(long, value_name = "DIR", default_value_os_t = control::default_run_dir())]
    pub run_dir: PathBuf,
}

impl HostRef {
    /// The name that was given.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref().or(self.host.as_deref())
    }
}

/// Whom `protect` is for: a guest of this machine, or the peer of the only one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// The peer.
    Peer(Address),
    /// The guest, or its host.
    Guest(String),
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let peer = text.parse().map(Self::Peer).map_err(|error| error.to_string());
        peer.or_else(|error| parse_host_name(text).map(Self::Guest).map_err(|_| error))
    }
}

/// Arguments of `protect`.
#[derive(Args, Debug)]
pub struct ProtectArgs {
    /// The guest, by its name or number; or at once the peer's address, where only one host runs here
    #[arg(value_name = "NAME|PEER")]
    pub target: Target,
    /// The peer's address; from /etc/xen-colo/NAME.toml by default
    pub peer: Option<Address>,
    /// The guest's configuration: what it says holds where this command line says nothing; /etc/xen-colo/NAME.toml by
    /// default, if it is there
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The host whose guest is protected: its name, or the name or number of its guest; may be left out when only one
    /// runs here
    #[arg(long, value_name = "NAME", value_parser = parse_host_name)]
    pub host: Option<String>,
    /// The directory of the control sockets
    #[arg(long, value_name = "DIR", default_value_os_t = control::default_run_dir())]
    pub run_dir: PathBuf,
    /// colo: both guests run; remus: output waits for checkpoints
    #[arg(long, default_value = "colo")]
    pub mode: Mode,
    /// When the guest runs on after a capture
    #[arg(long, value_enum, default_value = "after-capture")]
    pub resume: Resume,
    /// Longest time between two checkpoints; 5000 for colo, 200 for remus
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub checkpoint_delay_ms: Option<u64>,
    /// Time between two heartbeats
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub heartbeat_ms: Option<u64>,
    /// Missed heartbeats after which the peer is lost
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub heartbeat_misses: Option<u32>,
    /// Memory in MiB that remembers sent pages, so that only what changed in them is sent again; 0: pages go whole
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    pub delta_mib: Option<u64>,
    /// Let the secondary send digests instead of payloads, which saves most of what its guest's packets cost the link
    #[arg(long)]
    pub packet_digests: bool,
    /// The share of its time that a guest in lock-step must run; while differences leave it less, output is buffered as in
    /// remus mode; 0 for never, 50 by default
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub min_run_percent: Option<u8>,
    /// Return when the guest is protected, not when the copy has begun
    #[arg(long)]
    pub wait: bool,
}

impl ProtectArgs {
    /// Takes from the configuration what the command line, which gave the arguments called `given`, does not say; and
    /// the request that it comes to.
    pub fn request(&self, given: &[String]) -> Result<(HostRef, Protect), ConfigError> {
        let (name, mut peer) = match &self.target {
            Target::Peer(peer) => (None, Some(peer.clone())),
            Target::Guest(name) => (Some(name.clone()), None),
        };
        let default = name.as_ref().map(|name| Config::path(config::DIR.as_ref(), name));
        let path = self.config.clone().or_else(|| default.clone().filter(|path| path.exists()));
        let config = match &path {
            None => Config::default(),
            Some(path) => {
                let mut config = Config::load(path)?;
                if let Some(xl) = &config.guest.xen {
                    config.fill_from(&xl::Keys::load(xl)?);
                }
                config
            }
        };
        // What nobody said is the host's to fill in: it may have been told by `xl-colo set`.
        let heartbeat_ms = config.says("protect.heartbeat_ms").then_some(config.protect.heartbeat_ms.0);
        let heartbeat_misses = config.says("protect.heartbeat_misses").then_some(config.protect.heartbeat_misses.0);
        let own = config.protect;
        peer = self.peer.clone().or(peer).or(own.peer);
        let Some(peer) = peer else {
            let path = path.or(default).unwrap_or_default();
            let why =
                "no peer; give its address (HOST:PORT, unix:PATH or exec:COMMAND), or peer in [protect] of this file";
            return Err(ConfigError::File { path, why: why.into() });
        };
        let says = |id: &str| given.iter().any(|given| given == id);
        let protect = Protect {
            peer: peer.to_string(),
            mode: if says("mode") { self.mode } else { own.mode },
            resume: if says("resume") { self.resume.into() } else { own.resume },
            checkpoint_delay_ms: self.checkpoint_delay_ms.or(own.checkpoint_delay_ms.map(|ms| ms.0)),
            heartbeat_interval_ms: self.heartbeat_ms.or(heartbeat_ms),
            heartbeat_misses: self.heartbeat_misses.or(heartbeat_misses.and_then(|misses| u32::try_from(misses).ok())),
            delta_mib: self.delta_mib.or(Some(own.delta_mib.0)),
            release_at_once: false,
            packet_digests: self.packet_digests || own.packet_digests,
            min_run_percent: self.min_run_percent.or(u8::try_from(own.min_run_percent.0).ok()),
        };
        let host = HostRef { name: None, host: self.host.clone().or(name), run_dir: self.run_dir.clone() };
        Ok((host, protect))
    }
}

/// When the guest runs on after a capture.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Resume {
    /// At once; the wire is not in the pause.
    AfterCapture,
    /// When the peer has loaded the state: the classic order.
    AfterLoaded,
}

impl From<Resume> for ResumeOrder {
    fn from(resume: Resume) -> Self {
        match resume {
            Resume::AfterCapture => Self::AfterCapture,
            Resume::AfterLoaded => Self::AfterLoaded,
        }
    }
}

/// Arguments of `status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Which host
    #[command(flatten)]
    pub host: HostRef,
    /// Print again every second until interrupted
    #[arg(long)]
    pub watch: bool,
}

/// Arguments of `set`.
#[derive(Args, Debug)]
pub struct SetArgs {
    /// What is to change, and to what
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = parse_setting)]
    pub settings: Vec<(String, String)>,
    /// The host: its name, or the name or number of its guest; may be left out when only one runs here
    #[arg(long, value_name = "NAME", value_parser = parse_host_name)]
    pub host: Option<String>,
    /// The directory of the control sockets
    #[arg(long, value_name = "DIR", default_value_os_t = control::default_run_dir())]
    pub run_dir: PathBuf,
}

fn parse_setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a setting is KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Arguments of `list`.
#[derive(Args, Debug)]
pub struct ListArgs {
    /// The directory of the control sockets
    #[arg(long, value_name = "DIR", default_value_os_t = control::default_run_dir())]
    pub run_dir: PathBuf,
}

/// Arguments of `events`.
#[derive(Args, Debug)]
pub struct EventsArgs {
    /// Which host
    #[command(flatten)]
    pub host: HostRef,
    /// Go on with what happens from now on, until the host ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only events with larger numbers than this
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub since: u64,
}

/// Arguments of `config`.
#[derive(Args, Debug)]
pub struct ConfigArgs {
    /// Say what is wrong with this configuration, and with the xl configuration that it names
    #[arg(long, value_name = "FILE")]
    pub check: Option<PathBuf>,
    /// Take the peer and the spill directory from the COLO keys of a domain's xl configuration
    #[arg(long, value_name = "FILE", conflicts_with = "check")]
    pub xl: Option<PathBuf>,
}

/// Arguments of `failover`.
#[derive(Args, Debug)]
pub struct FailoverArgs {
    /// Which host
    #[command(flatten)]
    pub host: HostRef,
    /// Return when it is decided who goes on, and what the guest wrote is in its disk image
    #[arg(long)]
    pub wait: bool,
}

/// Arguments of `check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// A peer to be reached
    pub peer: Option<Address>,
    /// A Xen domain of this host to be protected, by its name or number
    #[arg(long, value_name = "NAME")]
    pub guest: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::{CommandFactory, FromArgMatches};

    fn parsed(words: &[&str]) -> (Command, Vec<String>) {
        let matches = Cli::command().try_get_matches_from([&["xl-colo"], words].concat()).unwrap();
        let given = super::super::given(&matches);
        (Cli::from_arg_matches(&matches).unwrap().command, given)
    }

    fn protect(words: &[&str]) -> Result<(HostRef, Protect), ConfigError> {
        let (Command::Protect(args), given) = parsed(&[&["protect"], words].concat()) else { unreachable!() };
        args.request(&given)
    }

    #[test]
    fn a_command_line_wins_over_a_configuration_and_that_over_xls() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let xl = file(
            "web.cfg",
            "disk = ['colo,colo-host=192.0.2.7,colo-port=9,colo-export=e,active-disk=/a,hidden-disk=/spill/h,target=/d']",
        );
        let text = format!("[guest]\nxen = {xl:?}\n[protect]\nmode = \"remus\"\nheartbeat_ms = 250\n");
        let toml = file("web.toml", &text);
        let (host, request) = protect(&["web", "--config", &toml]).unwrap();
        assert_eq!((host.name(), &request.peer[..]), (Some("web"), "tcp:192.0.2.7:9"), "from xl's keys");
        assert_eq!((request.mode, request.heartbeat_interval_ms), (Mode::Remus, Some(250)));
        let words = ["web", "h:1", "--config", &toml, "--mode", "colo", "--heartbeat-ms", "80", "--host", "a"];
        let (host, request) = protect(&words).unwrap();
        assert_eq!((host.name(), &request.peer[..]), (Some("a"), "tcp:h:1"));
        assert_eq!((request.mode, request.heartbeat_interval_ms), (Mode::Colo, Some(80)));
        let peered = file("peer.toml", "[protect]\npeer = \"h:2\"");
        let (_, request) = protect(&["web", "--config", &peered]).unwrap();
        assert_eq!(request.peer, "tcp:h:2");
        assert_eq!((request.heartbeat_interval_ms, request.heartbeat_misses), (None, None), "the host may know better");
        let why = protect(&["nobody"]).unwrap_err().to_string();
        assert!(why.contains("HOST:PORT") && why.contains("/etc/xen-colo/nobody.toml"), "{why}");
    }

    #[test]
    fn what_no_configuration_says_is_what_the_command_line_says_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.toml");
        std::fs::write(&path, "[host]\nname = \"a\"\ndisks = [\"d\"]\n[guest]\nboot = true").unwrap();
        let host = |words: &[&str]| {
            let (Command::Host(args), given) = parsed(&[&["host"], words].concat()) else { unreachable!() };
            args.complete(&given).unwrap()
        };
        let of_file = host(&["--config", path.to_str().unwrap()]);
        let by_hand = host(&["--name", "a", "--disk", "d", "--guest", "web"]);
        assert_eq!(format!("{:?}", super::super::HostArgs { config: None, ..of_file }), format!("{by_hand:?}"));
        let (_, of_nothing) = protect(&["h:1"]).unwrap();
        let (Command::Protect(args), _) = parsed(&["protect", "h:1"]) else { unreachable!() };
        assert_eq!((of_nothing.mode, of_nothing.resume), (args.mode, args.resume.into()));
    }
}
