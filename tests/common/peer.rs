//! A scripted host: the protocol spoken one step at a time, by a test that may stop, lie or leave at any of them.
//!
//! [`ScriptedPrimary`] knocks at a real secondary; [`ScriptedSecondary`] is knocked at by a real primary. Neither
//! beats: their sessions ask for a heartbeat so slow that they are over before one is missed.

use super::PATIENCE;
use bytes::BytesMut;
use std::future::Future;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xen_colo::colo::hello::{self, Channel, DiskGeometry, Geometry, Hello, Mode, PROTOCOL_VERSION, Welcome};
use xen_colo::colo::message::Message;
use xen_colo::colo::stream::{self, Decoder, Item};
use xen_colo::daemon::address::{Address, Link, Listener};
use xen_colo::daemon::engine_clock;
use xen_colo::disk::MemoryDisk;
use xen_colo::hypervisor::Domain;
use xen_colo::hypervisor::embedded::{Embedded, MachineConfig};
use xen_colo::page::Pfn;

/// Memory of the guest that a scripted primary sends: the smallest there is.
const GUEST_PAGES: u64 = 256;
/// Its disk.
const GUEST_DISK_BYTES: u64 = 1 << 20;

/// Awaits something that the other side owes, for a bounded time.
pub async fn soon<T>(what: &str, owed: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, owed).await {
        Ok(given) => given,
        Err(_) => panic!("{what}: not within {PATIENCE:?}"),
    }
}

/// A hello as a primary called `name` would say it.
pub fn hello_of(name: &str, channel: Channel, session: u64) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        channel,
        disk: 0,
        guest: "web".into(),
        session,
        generation: 1,
        from: name.into(),
        mode: Mode::Colo,
        features: vec![],
        geometry: Geometry {
            nr_pages: GUEST_PAGES,
            disks: vec![DiskGeometry { name: "disk0".into(), size_bytes: GUEST_DISK_BYTES }],
            mac: [2, 0, 0, 0, 0, 2],
            ip: [10, 77, 0, 2],
            diverge_percent: 0,
            xen: None,
        },
        heartbeat_interval_ms: 10_000,
        exports: vec![],
        heartbeat_misses: 10,
    }
}

/// Says a hello (or anything else that can be JSON) and reads the welcome.
pub async fn introduce(link: &mut Link, word: &impl serde::Serialize) -> Welcome {
    let mut out = BytesMut::new();
    hello::encode(word, &mut out);
    link.write_all(&out).await.unwrap();
    read_word(link).await
}

/// Reads one hello or welcome and not a byte more.
pub async fn read_word<T: serde::de::DeserializeOwned>(link: &mut Link) -> T {
    try_read_word(link).await.expect("the other side hung up instead of a word")
}

/// The same, or nothing when the other side hangs up.
async fn try_read_word<T: serde::de::DeserializeOwned>(link: &mut Link) -> Option<T> {
    let mut word = vec![0; 4];
    soon("a word's length", link.read_exact(&mut word)).await.ok()?;
    let len_bytes = u32::from_be_bytes([word[0], word[1], word[2], word[3]]) as usize;
    word.resize(4 + len_bytes, 0);
    soon("a word", link.read_exact(&mut word[4..])).await.ok()?;
    Some(hello::decode(&mut BytesMut::from(&word[..])).unwrap().unwrap())
}

/// Reads until the other side ends the connection, which it must.
pub async fn is_hung_up(link: &mut Link) {
    let mut rest = Vec::new();
    let _ = soon("the other side hangs up", link.read_to_end(&mut rest)).await;
}

/// A guest's whole first state, as the stream carries it.
pub fn first_state() -> (BytesMut, BytesMut) {
    let config = MachineConfig {
        ram_pages: GUEST_PAGES,
        mac: [2, 0, 0, 0, 0, 2],
        ip: [10, 77, 0, 2],
        diverge_percent: 0,
        host_entropy_seed: 7,
    };
    let disk = Box::new(MemoryDisk::new(GUEST_DISK_BYTES as usize));
    let mut guest = Embedded::boot(&config, disk, Arc::new(engine_clock), Box::new(|_| {})).unwrap();
    guest.suspend().unwrap();
    let pfns: Vec<_> = (0..GUEST_PAGES).map(Pfn).collect();
    let mut contents = Vec::new();
    guest.read_pages(&pfns, &mut contents).unwrap();
    let (mut pages, mut devices) = (BytesMut::new(), BytesMut::new());
    stream::encode_pages(&pfns, &contents, None, &mut pages);
    stream::encode_pages_end(&mut devices);
    let blob = guest.save_devices().unwrap();
    stream::encode_device_state(&blob, &mut devices);
    (pages, devices)
}

/// A primary that does what the test says. Dropping it is its death: every connection ends at once.
pub struct ScriptedPrimary {
    /// The COLO stream.
    pub stream: Link,
    /// The packet link.
    pub packets: Link,
    /// The heartbeat.
    pub heartbeat: Link,
    /// The disk link, where NBD's greeting comes next.
    pub nbd: Link,
}

impl ScriptedPrimary {
    /// Opens all four links of a session.
    pub async fn joins(secondary: &Address, session: u64) -> Self {
        let open = async |channel| {
            let mut link = secondary.connect().await.unwrap();
            let welcome = introduce(&mut link, &hello_of("a", channel, session)).await;
            assert_eq!(welcome.refused, None);
            link
        };
        let stream = open(Channel::Colo).await;
        let packets = open(Channel::Packets).await;
        let heartbeat = open(Channel::Heartbeat).await;
        Self { stream, packets, heartbeat, nbd: open(Channel::Nbd).await }
    }

    /// Sends bytes on the stream.
    pub async fn sends(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Sends a message.
    pub async fn says(&mut self, message: Message) {
        let mut out = BytesMut::new();
        message.encode(&mut out);
        self.sends(&out).await;
    }

    /// Reads a message, which must be this one.
    pub async fn hears(&mut self, message: Message) {
        let mut number = [0; 4];
        soon(&message.to_string(), self.stream.read_exact(&mut number)).await.unwrap();
        assert_eq!(Message::decode(&mut BytesMut::from(&number[..])).unwrap(), Some(message));
    }

    /// Sends the first copy whole, and waits until the secondary owns it.
    pub async fn copies(&mut self) {
        let (pages, devices) = first_state();
        self.sends(&pages).await;
        self.sends(&devices).await;
        self.hears(Message::CheckpointReady).await;
    }
}

/// A secondary that does what the test says, on a listener of its own.
pub struct ScriptedSecondary {
    listener: Listener,
}

/// The links a primary opened to a scripted secondary.
pub struct Accepted {
    /// The COLO stream.
    pub stream: Link,
    /// The packet link.
    pub packets: Link,
    /// The heartbeat.
    pub heartbeat: Link,
    /// The disk link: the test has NBD's server side.
    pub nbd: Link,
    decoder: Decoder,
    input: BytesMut,
}

impl ScriptedSecondary {
    /// Listens on a free port.
    pub async fn listens() -> Self {
        let address: Address = "127.0.0.1:0".parse().unwrap();
        Self { listener: address.listen().await.unwrap() }
    }

    /// Where the primary is told to connect.
    pub fn address(&self) -> Address {
        self.listener.local_address().unwrap()
    }

    /// The next connection.
    pub async fn accepts(&self) -> Link {
        soon("the primary connects", self.listener.accept()).await.unwrap()
    }

    /// The next connection, with its hello answered.
    pub async fn welcomes(&self, channel: Channel) -> (Link, Hello) {
        let (mut link, word) = loop {
            let mut link = self.accepts().await;
            // Of a session before this one: a primary that lost its packet or disk link tries again for a while, and
            // may have been told to stop before it said a word.
            let Some(word) = try_read_word::<Hello>(&mut link).await else { continue };
            if !matches!(word.channel, Channel::Packets | Channel::Nbd) || channel == word.channel {
                break (link, word);
            }
        };
        assert_eq!(word.channel, channel);
        let welcome = Welcome { features: vec!["blank-disk".into()], ..Welcome::bare("b", None) };
        let mut out = BytesMut::new();
        hello::encode(&welcome, &mut out);
        link.write_all(&out).await.unwrap();
        (link, word)
    }

    /// All four connections of a session.
    pub async fn welcomes_all(&self) -> Accepted {
        let (stream, word) = self.welcomes(Channel::Colo).await;
        let (packets, _) = self.welcomes(Channel::Packets).await;
        let (heartbeat, _) = self.welcomes(Channel::Heartbeat).await;
        let (nbd, _) = self.welcomes(Channel::Nbd).await;
        let decoder = Decoder::new(word.geometry.nr_pages);
        Accepted { stream, packets, heartbeat, nbd, decoder, input: BytesMut::new() }
    }
}

impl Accepted {
    /// Serves the disk link as it should be.
    pub fn serves_disk(&mut self, size_bytes: usize) -> tokio::task::JoinHandle<()> {
        let (never, _) = tokio::io::duplex(1);
        let nbd = std::mem::replace(&mut self.nbd, Box::new(never));
        let disk = Box::new(MemoryDisk::new(size_bytes));
        tokio::spawn(async move {
            let _ = xen_colo::daemon::nbd::serve_connection(nbd, "disk0".into(), disk).await;
        })
    }

    /// The next thing on the stream.
    pub async fn next(&mut self) -> Item {
        loop {
            if let Some(item) = self.decoder.decode(&mut self.input).unwrap() {
                return item;
            }
            let read = soon("the primary goes on", self.stream.read_buf(&mut self.input)).await.unwrap();
            assert!(read > 0, "the primary hung up");
        }
    }

    /// Reads up to the end of a state.
    pub async fn state(&mut self) {
        while !matches!(self.next().await, Item::DeviceState(_)) {}
    }

    /// Reads up to a message, which must be this one.
    pub async fn hears(&mut self, message: Message) {
        assert_eq!(self.next().await, Item::Message(message));
    }

    /// Sends a message.
    pub async fn says(&mut self, message: Message) {
        let mut out = BytesMut::new();
        message.encode(&mut out);
        self.stream.write_all(&out).await.unwrap();
    }

    /// Takes the first state.
    pub async fn is_copied(&mut self) {
        self.state().await;
        self.says(Message::CheckpointReady).await;
    }
}
