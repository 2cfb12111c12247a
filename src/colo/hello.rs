//! The first words on every connection between two hosts.
//!
//! ```text
//!   connector → acceptor   be32 length, JSON Hello      which channel, which guest, which generation, its shape
//!   acceptor  → connector  be32 length, JSON Welcome    accepted, or why not
//! ```
//!
//! A protected guest has four connections, tied together by a session number the connector draws: the COLO
//! stream, the packet link, the heartbeat, and NBD (which goes on in plain NBD after the welcome), one for each of its
//! disks, which come last; and before them a hash link for each disk that needs one. The trap: anybody can connect, so
//! the length is bounded before a byte is buffered, and a refusal is a sentence.

use crate::page::PAGE_SIZE;
use bytes::{Buf, BufMut, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The version of everything that follows a hello.
pub const PROTOCOL_VERSION: u32 = 2;
/// Largest hello or welcome accepted, in bytes.
pub const HELLO_MAX_BYTES: usize = 64 * 1024;
/// Largest guest a peer may announce, in pages (16 TiB).
pub const GUEST_MAX_PAGES: u64 = 1 << 32;
/// Most disks of a guest.
pub const DISKS_MAX: usize = 16;

/// The name of a guest's disk, which is its export's: `disk0`, `disk1`, ...
#[must_use]
pub fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// Longest name of an export, in bytes.
const EXPORT_MAX_BYTES: usize = 255;

/// Checks the names that a configuration gives to a guest's disks: one each, or none at all.
pub fn check_exports(exports: &[String], disks: usize) -> Result<(), String> {
    if !exports.is_empty() && exports.len() != disks {
        return Err(format!("{} names of exports (colo-export) for {disks} disk(s)", exports.len()));
    }
    if let Some(name) = exports.iter().find(|name| name.is_empty() || name.len() > EXPORT_MAX_BYTES) {
        let shown: String = name.chars().take(20).collect();
        return Err(format!("{shown:?} names no export (colo-export): 1 to {EXPORT_MAX_BYTES} bytes do"));
    }
    match exports.iter().enumerate().find(|(at, name)| exports[..*at].contains(name)) {
        Some((_, name)) => Err(format!("two disks are called {name:?} (colo-export)")),
        None => Ok(()),
    }
}

/// Whether two hosts mean the same disks, in the same order, as far as both have names for them; or what differs. An image
/// that is another disk's would be overwritten.
pub fn match_exports(primary: &[String], secondary: &[String]) -> Result<(), String> {
    let differ = |(_, (theirs, ours)): &(usize, (&String, &String))| theirs != ours;
    match primary.iter().zip(secondary).enumerate().find(differ) {
        Some((at, (theirs, ours))) => Err(format!(
            "the primary's {} is called {theirs:?} (colo-export), and here it is {ours:?}; give both hosts the same disks in \
             the same order",
            disk_name(at)
        )),
        None => Ok(()),
    }
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// Messages, pages and device state.
    Colo,
    /// Client frames to the secondary, and its guest's frames back.
    Packets,
    /// Beats.
    Heartbeat,
    /// Writes of one disk, in the NBD protocol.
    Nbd,
    /// The hashes of the secondary's disk, for a primary that does not know what it holds. Only opened when the welcome
    /// offers them.
    Hashes,
    /// Nothing: the connector only looks whether somebody is there. The rest of its hello means nothing.
    Greeting,
}

/// How the pair replicates.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Both guests run; output leaves when both produced it.
    #[default]
    Colo,
    /// One guest runs; output leaves when the checkpoint after it is owned.
    Remus,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Colo => "colo",
            Self::Remus => "remus",
        })
    }
}

/// When the primary's guest runs on after a capture.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResumeOrder {
    /// As soon as the state is copied out; the wire is not in the pause.
    #[default]
    AfterCapture,
    /// When the secondary has loaded it: the classic order, kept so that the gain can be measured.
    AfterLoaded,
}

/// One disk of the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskGeometry {
    /// The export's name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// The shape of a guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Geometry {
    /// Memory in 4 KiB pages.
    pub nr_pages: u64,
    /// Its disks, named in their order by [`disk_name`].
    pub disks: Vec<DiskGeometry>,
    /// The MAC address of its NIC.
    pub mac: [u8; 6],
    /// The IPv4 address it answers to, for building the embedded guest.
    pub ip: [u8; 4],
    /// How often, in percent, an embedded guest's responses differ between its two copies.
    pub diverge_percent: u8,
    /// What a Xen domain is made from; absent for an embedded guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xen: Option<XenShape>,
}

/// The shape of a Xen domain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct XenShape {
    /// Its configuration, as libxl writes it.
    pub config: serde_json::Value,
    /// Memory it really has, in pages: its page numbers span more.
    pub ram_pages: u64,
}

/// The connector's word.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the connector.
    pub protocol: u32,
    /// What this connection is for.
    pub channel: Channel,
    /// Which of the guest's disks an NBD connection or a hash link is for, from 0.
    #[serde(default, skip_serializing_if = "is_first")]
    pub disk: usize,
    /// The guest's name.
    pub guest: String,
    /// Ties the connections of one protection together.
    pub session: u64,
    /// The generation the connector holds.
    pub generation: u64,
    /// The connecting host's name.
    pub from: String,
    /// COLO or Remus.
    pub mode: Mode,
    /// What the connector can do beyond version 1; unknown names are ignored.
    #[serde(default)]
    pub features: Vec<String>,
    /// The guest's shape.
    pub geometry: Geometry,
    /// What the primary's configuration calls the disks, in their order; empty where they have no such names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exports: Vec<String>,
    /// Time between beats.
    pub heartbeat_interval_ms: u64,
    /// Missed beats that mean a lost peer.
    pub heartbeat_misses: u32,
}

/// A hello of a guest with one disk is what it was before there were several.
fn is_first(disk: &usize) -> bool {
    *disk == 0
}

/// The acceptor's word.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// [`PROTOCOL_VERSION`] of the acceptor.
    pub protocol: u32,
    /// The accepting host's name.
    pub from: String,
    /// Why the connection is refused; `None` when it is accepted.
    pub refused: Option<String>,
    /// What the acceptor can do or has; unknown names are ignored.
    #[serde(default)]
    pub features: Vec<String>,
    /// Which of its disks are checkpoints of an earlier session.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checkpoints: Vec<DiskCheckpoint>,
    /// The acceptor's clock as it writes this, in µs of Unix time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_unix_us: Option<u64>,
    /// The release of its xl-colo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl Welcome {
    /// A refusal, or with `None` an acceptance without any features.
    #[must_use]
    pub fn bare(from: impl Into<String>, refused: Option<String>) -> Self {
        let (protocol, from) = (PROTOCOL_VERSION, from.into());
        let (features, checkpoints) = (Vec::new(), Vec::new());
        Self { protocol, from, refused, features, checkpoints, clock_unix_us: None, version: None }
    }

    /// Whether the acceptor names a feature.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|named| named == feature)
    }
}

/// What an acceptor's disk holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskCheckpoint {
    /// The export's name.
    pub disk: String,
    /// The [`Hello::session`] it is a checkpoint of.
    pub session: u64,
    /// Its number there, the initial copy being 1.
    pub number: u64,
}

/// Why a hello or welcome cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// More bytes than any hello has.
    #[error("the peer does not speak xen-colo: its first word announces {0} bytes (the limit is {HELLO_MAX_BYTES})")]
    TooLong(usize),
    /// Not the JSON expected.
    #[error("the peer does not speak xen-colo: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Another version.
    #[error(
        "the peer speaks protocol version {theirs}, this host {PROTOCOL_VERSION}; install the same xl-colo on both hosts"
    )]
    Version {
        /// The peer's version.
        theirs: u32,
    },
    /// A value that cannot be.
    #[error("the peer's hello is refused: {0}")]
    Refused(String),
}

/// Appends a hello or welcome.
pub fn encode<T: Serialize>(word: &T, out: &mut BytesMut) {
    let json = serde_json::to_vec(word).unwrap_or_default();
    out.put_u32(json.len() as u32);
    out.put_slice(&json);
}

/// Takes a hello or welcome off the front of `input`, or `None` while it is incomplete. The version is checked
/// before the shape, so that a later version is told from garbage.
pub fn decode<T: DeserializeOwned>(input: &mut BytesMut) -> Result<Option<T>, HelloError> {
    #[derive(Deserialize)]
    struct Version {
        protocol: u32,
    }
    let Some((len, rest)) = input.split_first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_be_bytes(*len) as usize;
    if len > HELLO_MAX_BYTES {
        return Err(HelloError::TooLong(len));
    }
    let Some(json) = rest.get(..len) else { return Ok(None) };
    let Version { protocol } = serde_json::from_slice(json)?;
    if protocol != PROTOCOL_VERSION {
        return Err(HelloError::Version { theirs: protocol });
    }
    let word = serde_json::from_slice(json)?;
    input.advance(4 + len);
    Ok(Some(word))
}

impl Hello {
    /// Whether the connector names a feature.
    #[must_use]
    pub fn wants(&self, feature: &str) -> bool {
        self.features.iter().any(|named| named == feature)
    }

    /// Checks what arithmetic and allocation later rely on.
    pub fn check(&self) -> Result<(), HelloError> {
        let refuse = |why: String| Err(HelloError::Refused(why));
        let geometry = &self.geometry;
        if geometry.nr_pages == 0 || geometry.nr_pages > GUEST_MAX_PAGES {
            return refuse(format!("a guest of {} pages of {PAGE_SIZE} bytes", geometry.nr_pages));
        }
        let count = geometry.disks.len();
        if !(1..=DISKS_MAX).contains(&count) {
            return refuse(format!("{count} disks; a guest has 1 to {DISKS_MAX}"));
        }
        if self.disk >= count {
            return refuse(format!("a link for disk {} of {count} disks", self.disk));
        }
        let mut total_bytes = 0_u64;
        for (index, disk) in geometry.disks.iter().enumerate() {
            total_bytes = total_bytes.saturating_add(disk.size_bytes);
            if disk.name != disk_name(index) || total_bytes > i64::MAX as u64 {
                return refuse(format!("disk {:?} of {} bytes", disk.name, disk.size_bytes));
            }
        }
        if let Err(why) = check_exports(&self.exports, count) {
            return refuse(why);
        }
        let misses = u64::from(self.heartbeat_misses);
        if !(1..=60_000).contains(&self.heartbeat_interval_ms) || !(2..=1000).contains(&misses) {
            return refuse(format!("a heartbeat of {misses} × {} ms", self.heartbeat_interval_ms));
        }
        if self.guest.is_empty() || self.guest.len() > 255 {
            return refuse("a guest name of no or more than 255 bytes".into());
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn hello() -> Hello {
        Hello {
            protocol: PROTOCOL_VERSION,
            channel: Channel::Colo,
            disk: 0,
            guest: "web".into(),
            session: 7,
            generation: 1,
            from: "a".into(),
            mode: Mode::Colo,
            features: vec![],
            geometry: Geometry {
                nr_pages: 256,
                disks: vec![DiskGeometry { name: "disk0".into(), size_bytes: 1 << 20 }],
                mac: [2, 0, 0, 0, 0, 2],
                ip: [10, 77, 0, 2],
                diverge_percent: 0,
                xen: None,
            },
            heartbeat_interval_ms: 100,
            exports: vec![],
            heartbeat_misses: 3,
        }
    }

    #[test]
    fn a_hello_survives_any_cut() {
        let mut out = BytesMut::new();
        encode(&hello(), &mut out);
        for cut in 0..out.len() {
            assert!(decode::<Hello>(&mut BytesMut::from(&out[..cut])).unwrap().is_none());
        }
        out.put_slice(b"rest");
        assert_eq!(decode::<Hello>(&mut out).unwrap(), Some(hello()));
        assert_eq!(&out[..], b"rest");
    }

    #[test]
    fn strangers_are_told_apart() {
        let mut http = BytesMut::from(&b"GET / HTTP/1.1\r\n"[..]);
        assert!(matches!(decode::<Hello>(&mut http), Err(HelloError::TooLong(0x4745_5420))));
        let mut later = BytesMut::new();
        encode(&serde_json::json!({"protocol": 99, "new_field": true}), &mut later);
        let refused = decode::<Hello>(&mut later).unwrap_err();
        assert!(refused.to_string().contains("version 99"), "{refused}");
        let mut junk = BytesMut::from(&[0, 0, 0, 3, b'{', b'}', b'}'][..]);
        assert!(matches!(decode::<Hello>(&mut junk), Err(HelloError::Malformed(_))));
    }

    #[test]
    fn shapes_that_cannot_be_are_refused() {
        assert!(hello().check().is_ok());
        let add = |h: &mut Hello, name: &str, size_bytes| {
            h.geometry.disks.push(DiskGeometry { name: name.into(), size_bytes });
        };
        let mut word = hello();
        (1..DISKS_MAX).for_each(|index| add(&mut word, &disk_name(index), 512));
        word.disk = DISKS_MAX - 1;
        assert!(word.check().is_ok());
        add(&mut word, &disk_name(DISKS_MAX), 512);
        assert!(word.check().is_err(), "one more");
        for (name, size_bytes) in [("disk0", 512), ("disk2", 512), ("../disk1", 512), ("disk1", i64::MAX as u64)] {
            let mut word = hello();
            add(&mut word, name, size_bytes);
            assert!(word.check().is_err(), "{name} of {size_bytes} bytes");
        }
        let cases: [fn(&mut Hello); 7] = [
            |h| h.disk = 1,
            |h| h.geometry.nr_pages = 0,
            |h| h.geometry.nr_pages = GUEST_MAX_PAGES + 1,
            |h| h.geometry.disks.clear(),
            |h| h.geometry.disks[0].size_bytes = u64::MAX,
            |h| h.heartbeat_misses = 1,
            |h| h.guest.clear(),
        ];
        for (number, break_it) in cases.into_iter().enumerate() {
            let mut word = hello();
            break_it(&mut word);
            assert!(word.check().is_err(), "case {number}");
        }
    }
}
