//! What a domain's xl configuration says about replication: the disk and vif keys of COLO.
//!
//! ```text
//!   xl.cfg:   key = value        value = 'text' | "text" | number | [ value, … ]        # comment        ; or a line's end
//!   disk:     "TARGET,FORMAT,VDEV,ACCESS,key=value,flag,…,target=the rest"
//!   vif:      "key=value,…"
//! ```
//!
//! | key | meaning here |
//! |---|---|
//! | `colo-host`, `colo-port` | the peer |
//! | `hidden-disk`, `active-disk` | their directory is where disk epochs spill to: both are memory here, as long as it lasts |
//! | `colo-export` | what both hosts call the disk, so that neither takes one for another |
//! | the others | none: [`Keys::notes`] says of each why it needs nothing |
//!
//! Other keys of xl are none of our business. A key that looks like one of these and is none is an error: xl itself takes
//! `colo-hots=b` for a part of the target's name.
//!
//! Source: xen `docs/man/xl.cfg.5.pod.in`, `docs/man/xl-disk-configuration.5.pod.in`, `tools/libs/util/libxlu_cfg_l.l`,
//! `libxlu_disk_l.l`, `tools/xl/xl_parse.c`. The trap: `target=` takes the rest of the string, commas and all.

use super::{ConfigError, read_file};
use crate::daemon::address::Address;
use crate::daemon::operator::nearest;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// How deep lists may be nested; xl's own are two deep.
const DEPTH_MAX: usize = 8;
/// The keys of a disk that take a value.
const DISK_KEYS: [&str; 5] = ["colo-host", "colo-port", "colo-export", "active-disk", "hidden-disk"];
/// Its flags.
const DISK_FLAGS: [&str; 2] = ["colo", "no-colo"];
/// xl's other keys and flags of a disk.
const DISK_OTHERS: [&str; 20] = [
    "format",
    "vdev",
    "access",
    "script",
    "target",
    "devtype",
    "backend",
    "backendtype",
    "discard",
    "no-discard",
    "direct-io-safe",
    "specification",
    "transport",
    "grant-usage",
    "trusted",
    "untrusted",
    "cdrom",
    "raw",
    "qcow2",
    "vhd",
];
/// The sockets of the userspace proxy, of each of which there are id, ip and port.
const VIF_SOCKETS: [&str; 9] = [
    "mirror",
    "compare_pri_in",
    "compare_sec_in",
    "compare_notify",
    "redirector0",
    "redirector1",
    "redirector2",
    "sec_redirector0",
    "sec_redirector1",
];
/// The other keys of a vif.
const VIF_KEYS: [&str; 22] = [
    "forwarddev",
    "colo_filter_mirror_queue",
    "colo_filter_mirror_outdev",
    "colo_filter_redirector0_queue",
    "colo_filter_redirector0_indev",
    "colo_filter_redirector0_outdev",
    "colo_filter_redirector1_queue",
    "colo_filter_redirector1_indev",
    "colo_filter_redirector1_outdev",
    "colo_compare_pri_in",
    "colo_compare_sec_in",
    "colo_compare_out",
    "colo_compare_notify_dev",
    "colo_filter_sec_redirector0_queue",
    "colo_filter_sec_redirector0_indev",
    "colo_filter_sec_redirector0_outdev",
    "colo_filter_sec_redirector1_queue",
    "colo_filter_sec_redirector1_indev",
    "colo_filter_sec_redirector1_outdev",
    "colo_filter_sec_rewriter0_queue",
    "colo_checkpoint_host",
    "colo_checkpoint_port",
];

/// Something of an xl configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Value {
    Text(String),
    Number(i64),
    /// Each with its line.
    List(Vec<(usize, Value)>),
}

/// The keys of a disk or a vif.
pub type Spec = BTreeMap<String, String>;

/// What an xl configuration says about replication.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Keys {
    /// Of each disk. A flag's value is `1` or `0`.
    pub disks: Vec<Spec>,
    /// Of each vif.
    pub vifs: Vec<Spec>,
}

impl Keys {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = read_file(path)?;
        Self::parse(&text).map_err(|(line, why)| ConfigError::Line { path: path.to_owned(), line, why })
    }

    fn parse(text: &str) -> Result<Self, Wrong> {
        let mut keys = Self::default();
        for (key, begun, value) in Reader::new(text).settings()? {
            let (Value::List(items), "disk" | "vif") = (value, key.as_str()) else { continue };
            for (line, item) in items {
                let Value::Text(item) = item else { continue };
                let read = if key == "disk" { disk(&item) } else { vif(&item) };
                let read = read.map_err(|why| (line, why))?;
                if key == "disk" { &mut keys.disks } else { &mut keys.vifs }.push(read);
            }
            keys.check_peer().map_err(|why| (begun, why))?;
        }
        Ok(keys)
    }

    fn of_disks(&self, key: &str) -> Option<&str> {
        self.disks.iter().find_map(|disk| disk.get(key)).map(String::as_str)
    }

    /// The peer, if a disk has one.
    #[must_use]
    pub fn peer(&self) -> Option<Address> {
        let disk = self.disks.iter().find(|disk| disk.contains_key("colo-host"))?;
        Some(Address::Tcp(format!("{}:{}", disk.get("colo-host")?, disk.get("colo-port")?)))
    }

    /// What the disks that are replicated are called, in their order.
    #[must_use]
    pub fn exports(&self) -> Vec<String> {
        self.disks.iter().filter_map(|disk| disk.get("colo-export")).cloned().collect()
    }

    /// Where disk epochs may spill to.
    #[must_use]
    pub fn spill_dir(&self) -> Option<PathBuf> {
        let file = self.of_disks("hidden-disk").or_else(|| self.of_disks("active-disk"))?;
        Path::new(file).parent().filter(|dir| !dir.as_os_str().is_empty()).map(Path::to_owned)
    }

    /// What becomes of each of the keys that stand there, a line for each, or for those that mean one thing together.
    #[must_use]
    pub fn notes(&self) -> Vec<Note> {
        let mut there: Vec<&str> =
            self.disks.iter().chain(&self.vifs).flat_map(Spec::keys).map(String::as_str).collect();
        there.sort_unstable();
        there.dedup();
        let note = |meaning: &Meaning| {
            let keys: Vec<String> =
                there.iter().filter(|key| (meaning.fits)(key)).map(|key| (*key).to_owned()).collect();
            (!keys.is_empty()).then_some(Note { keys, followed: meaning.followed, why: meaning.why })
        };
        MEANINGS.iter().filter_map(note).collect()
    }

    /// All disks go to one host: libxl wants it so, and a guest has one peer here.
    fn check_peer(&self) -> Result<(), String> {
        let port = |disk: &Spec| disk.get("colo-port").cloned().unwrap_or_default();
        let peer = |disk: &Spec| Some(format!("{}:{}", disk.get("colo-host")?, port(disk)));
        let mut peers: Vec<_> = self.disks.iter().filter_map(peer).collect();
        peers.dedup();
        if let [first, second, ..] = &peers[..] {
            return Err(format!("one disk's colo-host is {first} and another's {second}; a guest has one peer"));
        }
        Ok(())
    }
}

/// What becomes of keys.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Note {
    /// Which.
    pub keys: Vec<String>,
    /// Whether something is done by them.
    pub followed: bool,
    /// What, or why nothing needs to be.
    pub why: &'static str,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.followed { "followed" } else { "nothing to do" };
        match &self.keys[..] {
            [key] => write!(f, "{key}: {what}: {}", self.why),
            [first, .., last] if self.keys.len() > 4 => {
                write!(f, "{first} … {last} ({} keys): {what}: {}", self.keys.len(), self.why)
            }
            keys => write!(f, "{}: {what}: {}", keys.join(", "), self.why),
        }
    }
}

struct Meaning {
    fits: fn(&str) -> bool,
    followed: bool,
    why: &'static str,
}

/// Every key of [`DISK_KEYS`], [`DISK_FLAGS`], [`VIF_KEYS`] and [`VIF_SOCKETS`] fits one of these.
const MEANINGS: [Meaning; 7] = [
    Meaning {
        fits: |key| matches!(key, "colo-host" | "colo-port"),
        followed: true,
        why: "the peer, unless [protect] has one",
    },
    Meaning {
        fits: |key| matches!(key, "active-disk" | "hidden-disk"),
        followed: true,
        why: "disk epochs spill to the first one's directory, unless [host] has a spill_dir; no such images are made",
    },
    Meaning {
        fits: |key| key == "colo",
        followed: false,
        why: "every disk given to the host is replicated, and no other",
    },
    Meaning {
        fits: |key| key == "colo-export",
        followed: true,
        why: "what both hosts call the disk, unless [host] has exports; disks called otherwise there are refused",
    },
    Meaning {
        fits: |key| key == "forwarddev",
        followed: false,
        why: "packets for the other host go over the pair's own link, not through a device",
    },
    Meaning {
        fits: |key| {
            matches!(key, "colo_checkpoint_host" | "colo_checkpoint_port" | "colo_compare_notify_dev")
                || key.starts_with("colo_sock_compare_notify")
        },
        followed: false,
        why: "the comparator is in the host's process, and asks for checkpoints there",
    },
    Meaning {
        fits: |key| {
            (key.starts_with("colo_sock_") && !key.starts_with("colo_sock_compare_notify"))
                || key.starts_with("colo_filter_")
                || matches!(key, "colo_compare_pri_in" | "colo_compare_sec_in" | "colo_compare_out")
        },
        followed: false,
        why: "mirror, redirectors, comparator and rewriter are in the hosts' processes, without sockets between them",
    },
];

/// What is wrong, and in which line.
type Wrong = (usize, String);

/// A disk's keys. The first parts may be without a key.
fn disk(spec: &str) -> Result<Spec, String> {
    let mut found = Spec::new();
    let mut rest = spec;
    while !rest.is_empty() {
        let rest_is_target = rest.trim_start().starts_with("target=");
        let (part, after) = if rest_is_target { (rest, "") } else { rest.split_once(',').unwrap_or((rest, "")) };
        rest = after;
        let part = part.trim();
        let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key.trim(), Some(value.trim())));
        match value {
            _ if rest_is_target => {}
            None if DISK_FLAGS.contains(&key) => {
                _ = found.insert("colo".into(), if key == "colo" { "1" } else { "0" }.into());
            }
            Some(value) if DISK_KEYS.contains(&key) => put(&mut found, key, value)?,
            // A file's name, unless it looks like a key.
            _ if DISK_OTHERS.contains(&key) || key.contains(['/', ':', '.']) => {}
            _ => suspect(key, DISK_KEYS.iter().chain(&DISK_FLAGS).copied())?,
        }
    }
    if let Some(port) = found.get("colo-port").filter(|port| !matches!(port.parse::<u16>(), Ok(1..))) {
        return Err(format!("colo-port is {port:?}; it may be a whole number from 1 to 65535"));
    }
    if found.get("colo").is_some_and(|flag| flag == "1")
        && let Some(missing) = DISK_KEYS.iter().find(|key| !found.contains_key(**key))
    {
        return Err(format!("a disk with colo has {missing} too; all of {} belong to it", DISK_KEYS.join(", ")));
    }
    Ok(found)
}

fn vif(spec: &str) -> Result<Spec, String> {
    let sockets = VIF_SOCKETS.iter().flat_map(|of| ["id", "ip", "port"].map(|key| format!("colo_sock_{of}_{key}")));
    let known: Vec<String> = VIF_KEYS.iter().map(|key| (*key).to_owned()).chain(sockets).collect();
    let mut found = Spec::new();
    for part in spec.split(',') {
        let Some((key, value)) = part.split_once('=') else { continue };
        let key = key.trim();
        if known.iter().any(|known| known == key) {
            put(&mut found, key, value.trim())?;
        } else {
            suspect(key, known.iter().map(String::as_str))?;
        }
    }
    Ok(found)
}

fn put(found: &mut Spec, key: &str, value: &str) -> Result<(), String> {
    if value.is_empty() {
        return Err(format!("{key} has no value"));
    }
    match found.insert(key.to_owned(), value.to_owned()) {
        Some(_) => Err(format!("{key} stands there twice")),
        None => Ok(()),
    }
}

/// Refuses what looks like a key of ours and is none.
fn suspect<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let near = nearest(key, known);
    // One letter of a short word of xl's is not enough to say what was meant.
    let is_ours = key.starts_with("colo") || key.starts_with("no-colo") || near.is_some() && key.len() > 7;
    if !is_ours {
        return Ok(());
    }
    let near = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
    Err(format!("{key} is no key of xl's or ours{near}"))
}

/// Reads the syntax of xl's configurations.
struct Reader<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Self {
        Self { rest: text, line: 1 }
    }

    fn settings(mut self) -> Result<Vec<(String, usize, Value)>, Wrong> {
        let mut settings = Vec::new();
        loop {
            self.skip(true);
            if self.rest.is_empty() {
                return Ok(settings);
            }
            let line = self.line;
            let key = self.take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
            if key.is_empty() {
                return Err(self.wrong("a key should stand here"));
            }
            self.skip(false);
            // += adds to a list; who only looks for ours may take both as lists of their own.
            let _ = self.eat("+");
            if !self.eat("=") {
                return Err(self.wrong(&format!("{key} is not followed by =")));
            }
            self.skip(false);
            let value = self.value(0)?;
            settings.push((key.to_owned(), line, value));
            self.skip(false);
            if !(self.rest.is_empty() || self.rest.starts_with(['\n', ';'])) {
                return Err(self.wrong(&format!("something stands behind the value of {key}")));
            }
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value, Wrong> {
        match self.rest.chars().next() {
            Some('[') if depth < DEPTH_MAX => self.list(depth),
            Some('[') => Err(self.wrong("lists are nested too deep")),
            Some(quote @ ('"' | '\'')) => self.text(quote).map(Value::Text),
            Some(c) if c.is_ascii_digit() || c == '-' => self.number(),
            _ => Err(self.wrong("a value is a quoted text, a number or a list")),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, Wrong> {
        let begun = self.line;
        let _ = self.eat("[");
        let mut items = Vec::new();
        loop {
            self.skip(true);
            if self.eat("]") {
                return Ok(Value::List(items));
            }
            if self.rest.is_empty() {
                return Err((begun, "the list that begins here does not end".into()));
            }
            items.push((self.line, self.value(depth + 1)?));
            self.skip(true);
            if !self.eat(",") && !self.rest.is_empty() && !self.rest.starts_with(']') {
                return Err(self.wrong("a , or ] should stand here"));
            }
        }
    }

    fn text(&mut self, quote: char) -> Result<String, Wrong> {
        let mut text = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                '\n' => break,
                '\\' => match chars.next() {
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 't')) => text.push('\t'),
                    Some((_, c)) if c != '\n' => text.push(c),
                    _ => break,
                },
                c if c == quote => {
                    self.rest = self.rest.get(at + 1..).unwrap_or_default();
                    return Ok(text);
                }
                c => text.push(c),
            }
        }
        Err(self.wrong("a quoted text does not end in its line"))
    }

    fn number(&mut self) -> Result<Value, Wrong> {
        let word = self.take_while(|c| c.is_ascii_alphanumeric() || c == '-');
        let (sign, digits) = word.strip_prefix('-').map_or((1, word), |digits| (-1, digits));
        let number = match digits.strip_prefix("0x") {
            Some(hex) => i64::from_str_radix(hex, 16),
            None => digits.parse(),
        };
        number.map(|number| Value::Number(sign * number)).map_err(|_| self.wrong(&format!("{word} is no number")))
    }

    /// Skips what means nothing: blanks and comments, and line ends where they mean nothing.
    fn skip(&mut self, lines: bool) {
        loop {
            match self.rest.chars().next() {
                Some('#') => self.rest = self.rest.find('\n').map_or("", |end| &self.rest[end..]),
                Some('\n') if lines => {
                    self.line += 1;
                    self.rest = &self.rest[1..];
                }
                Some(';') if lines => self.rest = &self.rest[1..],
                Some(' ' | '\t' | '\r') => self.rest = &self.rest[1..],
                _ => return,
            }
        }
    }

    fn eat(&mut self, what: &str) -> bool {
        let found = self.rest.strip_prefix(what);
        self.rest = found.unwrap_or(self.rest);
        found.is_some()
    }

    fn take_while(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !fits(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn wrong(&self, why: &str) -> Wrong {
        (self.line, why.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
# a guest
name = 'web'; type = "hvm"
memory = 128
vcpus = 0x2
on_crash = "destroy"
vif = [ 'mac=00:16:3e:00:00:01,bridge=br0,forwarddev=eth1,colo_sock_mirror_id=m0,colo_checkpoint_port=9998' ]
disk = [
    'format=raw,devtype=disk,access=w,vdev=hda,backendtype=qdisk,colo,colo-host=192.0.2.2,colo-port=9740,\
colo-export=disk0,active-disk=/srv/active.img,hidden-disk=/srv/hidden.img,target=/srv/disk,colo-hots.img',
    "/srv/second.img,raw,hdb,rw",
]
"#;

    fn parsed(text: &str) -> Result<Keys, Wrong> {
        Keys::parse(&text.replace("\\\n", ""))
    }

    #[test]
    fn the_keys_of_disks_and_vifs_are_read_and_the_rest_left_alone() {
        let keys = parsed(WHOLE).unwrap();
        assert_eq!(keys.peer().unwrap().to_string(), "tcp:192.0.2.2:9740");
        assert_eq!(keys.spill_dir(), Some("/srv".into()));
        assert_eq!(keys.disks[0]["colo"], "1");
        assert_eq!(keys.disks[1], Spec::new());
        let notes: Vec<_> = keys.notes().iter().map(|note| (note.keys.join(" "), note.followed)).collect();
        let note = |keys: &str, followed| (keys.to_owned(), followed);
        let wanted = [
            note("colo-host colo-port", true),
            note("active-disk hidden-disk", true),
            note("colo", false),
            note("colo-export", true),
            note("forwarddev", false),
            note("colo_checkpoint_port", false),
            note("colo_sock_mirror_id", false),
        ];
        assert_eq!(notes, wanted);
        assert!(keys.notes()[4].to_string().starts_with("forwarddev: nothing to do: packets for the other host"));
        assert_eq!(Keys::default().notes(), []);
        assert_eq!(parsed("").unwrap(), Keys::default());
        assert_eq!(parsed("disk=[]\nvif=['']").unwrap().peer(), None);
    }

    #[test]
    fn of_every_key_it_is_said_what_becomes_of_it() {
        let sockets = VIF_SOCKETS.iter().flat_map(|of| ["id", "ip", "port"].map(|key| format!("colo_sock_{of}_{key}")));
        let known =
            DISK_KEYS.iter().chain(&VIF_KEYS).map(|key| (*key).to_owned()).chain(sockets).chain(["colo".into()]);
        for key in known {
            assert_eq!(MEANINGS.iter().filter(|meaning| (meaning.fits)(&key)).count(), 1, "{key}");
        }
    }

    #[test]
    fn a_guest_has_one_peer() {
        let disk = |host: &str| {
            format!("'/d,raw,colo,colo-host={host},colo-port=9,colo-export=e,active-disk=/a,hidden-disk=/h'")
        };
        parsed(&format!("disk = [{0}, {0}]", disk("b"))).unwrap();
        let (line, why) = parsed(&format!("\ndisk = [{}, {}]", disk("b"), disk("c"))).unwrap_err();
        assert_eq!((line, &*why), (2, "one disk's colo-host is b:9 and another's c:9; a guest has one peer"));
    }

    #[test]
    fn a_key_that_is_nearly_ours_is_an_error() {
        let disk = |spec: &str| parsed(&format!("\ndisk = ['/d.img,raw,xvda,rw,{spec}']")).unwrap_err();
        assert_eq!(disk("colo-hots=b"), (2, "colo-hots is no key of xl's or ours; did you mean colo-host?".into()));
        assert!(disk("hiden-disk=/h").1.ends_with("did you mean hidden-disk?"));
        assert!(disk("colo-speed=9").1.starts_with("colo-speed is no key"));
        assert!(disk("coloo").1.ends_with("did you mean colo?"));
        assert_eq!(disk("colo-port=0").1, "colo-port is \"0\"; it may be a whole number from 1 to 65535");
        assert!(disk("colo,colo-host=b").1.starts_with("a disk with colo has colo-port too"));
        assert_eq!(disk("colo-host=").1, "colo-host has no value");
        assert_eq!(disk("colo-host=a,colo-host=b").1, "colo-host stands there twice");
        let vif = |spec: &str| parsed(&format!("vif = ['bridge=br0,{spec}']")).unwrap_err().1;
        assert!(vif("forwardev=eth1").ends_with("did you mean forwarddev?"));
        assert!(vif("colo_sock_miror_id=m").ends_with("did you mean colo_sock_mirror_id?"));
        for fine in
            ["vifname=v0", "rate=10Mb/s", "gatewaydev=eth0", "model=e1000", "backend=dom1", "devid=0", "mtu=1500"]
        {
            parsed(&format!("vif = ['{fine}']")).unwrap();
        }
        for fine in ["direct-io-safe", "discard", "backendtype=qdisk", "script=block-colo", "trusted=1"] {
            parsed(&format!("disk = ['/d.img,raw,xvda,rw,{fine}']")).unwrap();
        }
    }

    #[test]
    fn what_is_no_configuration_is_refused_with_its_line() {
        for (text, line, why) in [
            ("name = 'web\nmemory = 1", 1, "does not end in its line"),
            ("a = 1\nb = [1,\n2", 2, "does not end"),
            ("a = [1 2]", 1, "a , or ]"),
            ("a 1", 1, "not followed by ="),
            ("a = web", 1, "quoted text, a number or a list"),
            ("a = 1 2", 1, "behind the value of a"),
            ("= 1", 1, "a key should stand here"),
            ("a = 12q", 1, "12q is no number"),
            (&format!("a = {}", "[".repeat(100_000)), 1, "nested too deep"),
        ] {
            let (at, said) = parsed(text).unwrap_err();
            assert!(at == line && said.contains(why), "{text:.40}: {at}: {said}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_strange(text in "[\\[\\]'\"=,;#\\\\\n a-c0-9é-]{0,60}") {
            let _ = Keys::parse(&text);
            let _ = disk(&text);
            let _ = vif(&text);
        }
    }
}
