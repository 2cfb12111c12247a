//! A guest's configuration: one TOML file, `/etc/xen-colo/NAME.toml`, for the hosts of a pair.
//!
//! ```text
//!   command line ── wins over ──▶ NAME.toml ── wins over ──▶ the domain's xl configuration ── wins over ──▶ defaults
//! ```
//!
//! Each section is one `section!`: its fields, their words, their defaults. What `xl-colo config` writes and what is read
//! come from it, and so cannot differ. An unknown key is an error that names the nearest known one and the line: a
//! misspelt `arbiter` that is passed over is a guest without one.

mod value;
pub mod xl;

pub use value::Count;

use crate::colo::arbiter::Policy;
use crate::colo::hello::{Mode, ResumeOrder};
use crate::daemon::address::Address;
use crate::daemon::arbiter::Arbiter;
use crate::daemon::live::Keys;
use crate::daemon::metrics::MetricsAddress;
use crate::daemon::operator::nearest;
use std::io::Read;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use value::Value;

/// Where configurations are.
pub const DIR: &str = "/etc/xen-colo";
/// Longest file.
pub const FILE_MAX_BYTES: u64 = 1 << 20;

/// Why there is no configuration.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error("{path}: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// What stands in it.
    #[error("{path}:{line}: {why}")]
    Line {
        /// Which.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
}

/// A section of the file, read.
struct Section<'a, 'i> {
    name: &'static str,
    text: &'a str,
    table: Option<&'a DeTable<'i>>,
}

/// What is wrong, and at which byte.
type Wrong = (usize, String);

impl Section<'_, '_> {
    fn read<T: Value>(&self, key: &str, default: T) -> Result<T, Wrong> {
        let Some(value) = self.table.and_then(|table| table.get(key)) else { return Ok(default) };
        T::read(value.get_ref()).ok_or_else(|| {
            let span = value.span();
            let written = self.text.get(span.clone()).unwrap_or("?").trim();
            let written: String = written.chars().take(80).collect();
            (span.start, format!("{} in [{}] is {written}; it may be {}", key, self.name, T::allowed()))
        })
    }
}

/// Makes a section: a struct, its defaults, its reader and its writer.
macro_rules! section {
    ($(#[doc = $about:literal])* $section:ident as $key:literal {
        $($(#[doc = $doc:literal])* $field:ident: $type:ty = $default:expr, $example:literal;)*
    }) => {
        $(#[doc = $about])*
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub struct $section {
            $($(#[doc = $doc])* pub $field: $type,)*
        }

        impl Default for $section {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $section {
            const NAME: &'static str = $key;
            const KEYS: &'static [&'static str] = &[$(stringify!($field)),*];

            fn read(section: &Section<'_, '_>) -> Result<Self, Wrong> {
                let Self { $($field),* } = Self::default();
                Ok(Self { $($field: section.read(stringify!($field), $field)?,)* })
            }

            fn pairs(&self) -> Vec<(&'static str, Option<String>)> {
                vec![$((stringify!($field), self.$field.write())),*]
            }

            fn write(&self, out: &mut String) {
                for line in [$($about),*] {
                    out.push_str(&format!("#{line}\n"));
                }
                out.push_str(&format!("[{}]\n", Self::NAME));
                $(
                    for line in [$($doc),*] {
                        out.push_str(&format!("#{line}\n"));
                    }
                    out.push_str(&format!("# May be {}.\n", <$type as Value>::allowed()));
                    match self.$field.write() {
                        Some(value) => out.push_str(&format!("{} = {value}\n", stringify!($field))),
                        None => out.push_str(&format!("#{} = {}\n", stringify!($field), $example)),
                    }
                )*
            }
        }
    };
}

section! {
    /// The host on this machine: `xl-colo host --config FILE`.
    Host as "host" {
        /// Its name; the two of a pair must differ. The machine's name by default.
        name: Option<String> = None, "\"a\"";
        /// Where the peer connects.
        listen: Address = Address::Tcp("127.0.0.1:9740".into()), "";
        /// The directory of the control sockets.
        run_dir: Option<PathBuf> = None, "\"/run/xen-colo/hosts\"";
        /// The disk images, in the guest's order.
        disks: Vec<PathBuf> = Vec::new(), "";
        /// What both hosts call the disks, in the same order; a primary whose disks are called otherwise is refused. By default
        /// colo-export of the disks in the domain's xl configuration.
        exports: Vec<String> = Vec::new(), "";
        /// Where disk epochs go that do not fit into memory; beside the first image by default.
        spill_dir: Option<PathBuf> = None, "\"/var/lib/xen-colo\"";
        /// Memory in MiB that the replicas' disk epochs may use together before they go to the spill directory.
        epoch_memory_mib: Count<1, 1048576> = Count(256), "";
        /// The switch port of an embedded guest's NIC.
        net: Option<Address> = None, "\"unix:/run/net.sock\"";
        /// Who decides which host goes on alone.
        arbiter: Option<Arbiter> = None, "\"192.0.2.9:9739\"";
        /// What must be won before going on alone.
        policy: Policy = Policy::Arbiter, "";
        /// Where to write down what happens; NAME.events beside the control socket by default, and in /var/log/xen-colo for the unit.
        event_log: Option<PathBuf> = None, "\"/var/log/xen-colo/web.events\"";
        /// Where Prometheus reads how the host is, at /metrics; nowhere by default. Anybody who reaches it can read there.
        metrics_listen: Option<MetricsAddress> = None, "\"9741\"";
    }
}

section! {
    /// The guest. A host that is given `boot = true` runs it, one that is not stands by for it.
    Guest as "guest" {
        /// Whether `xl-colo host` runs the guest, which is called as this file is.
        boot: bool = false, "";
        /// The guest is a Xen domain with this xl configuration; an embedded one without it.
        xen: Option<PathBuf> = None, "\"/etc/xen/web.cfg\"";
        /// Memory of an embedded guest in MiB.
        memory_mib: Count<1, 16777216> = Count(64), "";
        /// The size of a new disk image in MiB.
        disk_mib: Count<1, 1073741824> = Count(256), "";
    }
}

section! {
    /// How the guest is protected: `xl-colo protect NAME`.
    Protection as "protect" {
        /// The peer's address. By default colo-host and colo-port of the domain's xl configuration.
        peer: Option<Address> = None, "\"192.0.2.2:9740\"";
        /// colo: both guests run; remus: output waits for checkpoints.
        mode: Mode = Mode::Colo, "";
        /// When the guest runs on after a capture: at once, or when the peer has loaded the state (the classic order).
        resume: ResumeOrder = ResumeOrder::AfterCapture, "";
        /// Longest time between two checkpoints in ms; 5000 for colo and 200 for remus by default.
        checkpoint_delay_ms: Option<Count<1, 3600000>> = None, "200";
        /// Time between two heartbeats in ms.
        heartbeat_ms: Count<1, 60000> = Count(100), "";
        /// Missed heartbeats after which the peer is lost.
        heartbeat_misses: Count<2, 1000> = Count(3), "";
        /// Memory in MiB that remembers sent pages, so that only what changed in them is sent again; 0: pages go whole.
        delta_mib: Count<0, 1048576> = Count(64), "";
        /// Whether the secondary sends digests instead of payloads: saves most of the packet link, costs hashing.
        packet_digests: bool = false, "";
        /// The share of its time in percent that a guest in lock-step must run; while it runs for less, because differences
        /// ask for checkpoints, output is buffered as in remus mode. 0: never.
        min_run_percent: Count<0, 100> = Count(50), "";
    }
}

/// A guest's configuration.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// The host.
    pub host: Host,
    /// The guest.
    pub guest: Guest,
    /// Its protection.
    pub protect: Protection,
    /// Keys that the file has, as `section.key`: what it does not have may come from elsewhere.
    given: Vec<String>,
}

impl Config {
    /// Where the configuration of a guest is.
    #[must_use]
    pub fn path(dir: &Path, guest: &str) -> PathBuf {
        dir.join(format!("{guest}.toml"))
    }

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = read_file(path)?;
        Self::parse(&text).map_err(|(at, why)| {
            let line = text.get(..at).unwrap_or_default().matches('\n').count() + 1;
            ConfigError::Line { path: path.to_owned(), line, why }
        })
    }

    fn parse(text: &str) -> Result<Self, Wrong> {
        let whole = DeTable::parse(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            (at, error.message().to_owned())
        })?;
        let whole = whole.get_ref();
        let sections = [(Host::NAME, Host::KEYS), (Guest::NAME, Guest::KEYS), (Protection::NAME, Protection::KEYS)];
        let mut given = Vec::new();
        for (name, value) in whole {
            let Some((section, keys)) = sections.iter().find(|(section, _)| section == name.get_ref()) else {
                return Err(unknown(name, "section", sections.iter().map(|(section, _)| *section)));
            };
            let DeValue::Table(table) = value.get_ref() else {
                return Err((name.span().start, format!("{section} is a section: [{section}]")));
            };
            for key in table.keys() {
                if !keys.contains(&key.get_ref().as_ref()) {
                    return Err(unknown(key, &format!("key of [{section}]"), keys.iter().copied()));
                }
                given.push(format!("{section}.{}", key.get_ref()));
            }
        }
        let section = |name| {
            let table = whole.get(name).and_then(|value| value.get_ref().as_table());
            Section { name, text, table }
        };
        Ok(Self {
            host: Host::read(&section(Host::NAME))?,
            guest: Guest::read(&section(Guest::NAME))?,
            protect: Protection::read(&section(Protection::NAME))?,
            given,
        })
    }

    /// Whether a file may say something about a key of this name.
    #[must_use]
    pub fn knows(key: &str) -> bool {
        let key = key.replace('-', "_");
        [Host::KEYS, Guest::KEYS, Protection::KEYS].iter().any(|keys| keys.contains(&key.as_str()))
    }

    /// Whether the file says something about `section.key`.
    #[must_use]
    pub fn says(&self, key: &str) -> bool {
        self.given.iter().any(|given| given == key)
    }

    /// Takes from the domain's xl configuration what this one does not say.
    pub fn fill_from(&mut self, xl: &xl::Keys) {
        if self.protect.peer.is_none() {
            self.protect.peer = xl.peer();
        }
        if self.host.exports.is_empty() {
            self.host.exports = xl.exports();
        }
        if self.host.spill_dir.is_none() {
            self.host.spill_dir = xl.spill_dir();
        }
    }

    /// All that it says, by key: what can change while a host runs by the names of `xl-colo set`, the rest by section.
    #[must_use]
    pub fn keys(&self) -> Keys {
        let sections = [
            (Host::NAME, self.host.pairs()),
            (Guest::NAME, self.guest.pairs()),
            (Protection::NAME, self.protect.pairs()),
        ];
        let name = |section: &str, key: &str| match (section, key) {
            ("protect", "checkpoint_delay_ms" | "heartbeat_ms" | "heartbeat_misses") => key.replace('_', "-"),
            _ => format!("{section}.{key}"),
        };
        let keys = sections.into_iter().flat_map(|(section, pairs)| {
            pairs.into_iter().filter_map(move |(key, value)| Some((name(section, key), value?)))
        });
        keys.collect()
    }

    /// The file that says so, with a comment for each key.
    #[must_use]
    pub fn write(&self) -> String {
        let mut out = String::from(
            "# xl-colo: a guest's configuration. xl-colo config --check FILE says what is wrong with it.\n",
        );
        self.host.write({
            out.push('\n');
            &mut out
        });
        self.guest.write({
            out.push('\n');
            &mut out
        });
        self.protect.write({
            out.push('\n');
            &mut out
        });
        out
    }
}

fn unknown<'a>(
    key: &Spanned<std::borrow::Cow<'_, str>>,
    what: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> Wrong {
    let name: String = key.get_ref().chars().take(80).collect();
    let near = match nearest(&name, known.clone()) {
        Some(near) => format!("did you mean {near}?"),
        None => format!("there is {}", known.collect::<Vec<_>>().join(", ")),
    };
    (key.span().start, format!("{name} is no {what}; {near}"))
}

/// The text of a file that is not too long to be one.
fn read_file(path: &Path) -> Result<String, ConfigError> {
    let wrong = |why: &dyn std::fmt::Display| ConfigError::File { path: path.to_owned(), why: why.to_string() };
    let file = std::fs::File::open(path).map_err(|error| wrong(&error))?;
    let mut text = String::new();
    file.take(FILE_MAX_BYTES + 1).read_to_string(&mut text).map_err(|error| wrong(&error))?;
    if text.len() as u64 > FILE_MAX_BYTES {
        return Err(wrong(&format_args!("longer than {FILE_MAX_BYTES} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.toml");
        std::fs::write(&path, text).unwrap();
        let strip = format!("{}/", dir.path().display());
        Config::load(&path).map_err(|error| error.to_string().replace(&strip, ""))
    }

    fn wrong(text: &str) -> String {
        loaded(text).expect_err(text)
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let defaults = Config::default();
        let text = defaults.write();
        let read = loaded(&text).unwrap();
        assert_eq!((&read.host, &read.guest, &read.protect), (&defaults.host, &defaults.guest, &defaults.protect));
        // Every key is there, set or shown, and what is shown is right too.
        let shown = text.lines().map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => rest,
            _ => line,
        });
        let shown = loaded(&shown.collect::<Vec<_>>().join("\n")).unwrap();
        assert_eq!(shown.given.len(), Host::KEYS.len() + Guest::KEYS.len() + Protection::KEYS.len());
        assert_eq!(loaded(&shown.write()).unwrap(), shown);
        assert_eq!(loaded("").unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest() {
        assert_eq!(
            wrong("[host]\n\narbitr = \"x:1\"\n"),
            "web.toml:3: arbitr is no key of [host]; did you mean arbiter?"
        );
        assert_eq!(wrong("[hots]\n"), "web.toml:1: hots is no section; did you mean host?");
        assert_eq!(wrong("mode = \"colo\"\n"), "web.toml:1: mode is no section; there is host, guest, protect");
        assert!(wrong("[guest]\nzzz = 1").ends_with("there is boot, xen, memory_mib, disk_mib"));
        assert_eq!(wrong("host = 1"), "web.toml:1: host is a section: [host]");
    }

    #[test]
    fn a_wrong_value_is_told_with_what_is_allowed() {
        for (text, why) in [
            ("[protect]\nmode = \"hot\"", "web.toml:2: mode in [protect] is \"hot\"; it may be \"colo\" or \"remus\""),
            (
                "[protect]\nheartbeat_misses = 1",
                "web.toml:2: heartbeat_misses in [protect] is 1; it may be a whole number from 2 to 1000",
            ),
            ("[guest]\nboot = \"yes\"", "boot in [guest] is \"yes\"; it may be true or false"),
            ("[host]\nlisten = \"80\"", "listen in [host] is \"80\"; it may be \"HOST:PORT\""),
            ("[host]\ndisks = \"d\"", "disks in [host] is \"d\"; it may be a list of paths"),
            ("[host]\npolicy = \"maybe\"", "it may be \"arbiter\", \"hold\", \"script:PATH\" or \"alone\""),
            ("[host]\nname = 7", "name in [host] is 7"),
            ("[guest]\nmemory_mib = 99999999999999999999", "memory_mib in [guest] is 99999999999999999999"),
            ("[host]\nname = \"a\"\nname = \"b\"", "web.toml:3: duplicate key"),
            ("[host\n", "web.toml:1: "),
        ] {
            let said = wrong(text);
            assert!(said.contains(why), "{text}: {said}");
        }
        assert_eq!(loaded("[guest]\nmemory_mib = 0x40").unwrap().guest.memory_mib, Count(64));
    }

    #[test]
    fn a_file_that_is_none_is_refused_before_it_is_read() {
        let said = Config::load(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(said.contains("/dev/zero: "), "{said}");
        let said = Config::load(Path::new("/nonexistent/web.toml")).unwrap_err().to_string();
        assert!(said.starts_with("/nonexistent/web.toml: No such file"), "{said}");
    }
}
