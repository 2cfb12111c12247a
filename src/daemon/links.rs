//! The connections of a protected guest, each with a task that reads and a task that writes.
//!
//! ```text
//!  stream      P → S  pages, messages, devices      S → P  messages
//!  packets     P → S  client frames (epoch)         S → P  guest frames (epoch), and again when lost ([`packets`])
//!  heartbeat   both ways, on a thread of its own    and the words that end a protection
//!  nbd         P → S  writes                        S → P  replies, and again for each further disk ([`disk`])
//!  hashes      (for each disk that is not known)    S → P  a hash a chunk
//! ```
//!
//! Tasks only move bytes. Whatever ends one of them says why on `lost`, and that is all it decides. Input queues
//! are short, so that a peer that sends faster than the engine works is slowed by its own socket; what waits to be
//! written is counted in bytes ([`Outbox`]), so that the engine can hold back.

pub mod disk;
pub mod packets;

use super::address::Link;
use super::engine_clock;
use super::hashes;
use super::nbd::remote::Connect;
pub use super::pair::lock;
use crate::carried::Carried;
use crate::colo::Loss;
use crate::colo::delta::SentPages;
use crate::colo::heartbeat::{BEAT_BYTES, Beat, Heartbeat, Word};
use crate::colo::hello::disk_name;
use crate::colo::message::Message;
use crate::colo::stream::{self, Item};
use crate::page::PageBatch;
use crate::replica::mirror::resync::ChunkHash;
use bytes::{Bytes, BytesMut};
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use disk::Acks;
pub use disk::{DiskAnswers, DiskWrite};
use packets::{Ends, Times, Told};

/// Stream items waiting for the engine; one may hold 4 MiB of pages.
const STREAM_IN_ITEMS: usize = 8;
/// Packets waiting for the engine.
const PACKETS_IN: usize = 1024;
/// Hashes waiting for the engine.
const HASHES_IN: usize = 64;
/// Bytes asked of a socket at once.
const READ_BYTES: usize = 1 << 20;
/// Pages encoded into one write.
const ENCODE_PAGES: usize = 256;

/// Sends to a writer task and knows how many bytes wait there.
#[derive(Debug)]
pub struct Outbox<T> {
    sender: mpsc::UnboundedSender<(usize, T)>,
    waiting_bytes: Arc<AtomicUsize>,
}

/// The writer's end of an [`Outbox`].
#[derive(Debug)]
pub struct Outgoing<T> {
    receiver: mpsc::UnboundedReceiver<(usize, T)>,
    waiting_bytes: Arc<AtomicUsize>,
}

/// An outbox and its other end.
#[must_use]
pub fn outbox<T>() -> (Outbox<T>, Outgoing<T>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let waiting_bytes = Arc::new(AtomicUsize::new(0));
    (Outbox { sender, waiting_bytes: waiting_bytes.clone() }, Outgoing { receiver, waiting_bytes })
}

impl<T> Outbox<T> {
    /// Queues something of about `bytes` bytes. Callers bound what waits.
    pub fn send(&self, bytes: usize, what: T) {
        self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        // A writer that is gone has reported why; what it did not write is lost with the connection.
        let _ = self.sender.send((bytes, what));
    }

    /// Bytes queued and not yet written.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.waiting_bytes.load(Ordering::Relaxed)
    }
}

impl<T> Outgoing<T> {
    /// The next, when there is one; `None` when the outbox is gone.
    pub async fn recv(&mut self) -> Option<(usize, T)> {
        self.receiver.recv().await
    }

    /// The next, if there is one now.
    pub fn try_recv(&mut self) -> Option<(usize, T)> {
        self.receiver.try_recv().ok()
    }

    /// Something of this size is written.
    pub fn written(&self, bytes: usize) {
        self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Something for the stream.
#[derive(Debug)]
pub enum StreamOut {
    /// A message.
    Message(Message),
    /// Pages, encoded by the writer so that the engine does not wait for it.
    Pages(PageBatch),
    /// The word that the guest may rest.
    GuestRests,
    /// Connections in two sequence spaces.
    Carried(Vec<Carried>),
    /// What waits for this state.
    Output(Vec<Bytes>),
    /// The end of the pages and the device state.
    Devices(Vec<u8>),
}

/// Something from the stream.
#[derive(Debug)]
pub enum StreamIn {
    /// From the primary.
    Item(Item),
    /// From the secondary.
    Message(Message),
}

/// What the engine holds of the connections. Dropping it closes them.
#[derive(Debug)]
pub struct Links {
    /// From the stream.
    pub stream_in: mpsc::Receiver<StreamIn>,
    /// To the stream.
    pub stream_out: Outbox<StreamOut>,
    /// From the packet link.
    pub packets_in: mpsc::Receiver<(u64, Bytes)>,
    /// To the packet link.
    pub packets_out: Outbox<(u64, Bytes)>,
    /// The key of the packet link's digests, if both hosts agreed on them.
    pub digests: Option<crate::compare::digest::Key>,
    /// What became of the packet link.
    pub packet_link: mpsc::Receiver<Told>,
    /// Answers to disk writes; never any on the secondary.
    pub disk_in: mpsc::Receiver<DiskAnswers>,
    /// Disk writes, by disk; none on the secondary.
    pub disk_out: Vec<Outbox<DiskWrite>>,
    /// The secondary's hashes, by disk, if it was asked for them.
    pub hashes_in: mpsc::Receiver<(usize, ChunkHash)>,
    /// Page buffers to be used again.
    pub recycled: mpsc::Receiver<PageBatch>,
    /// Why a connection ended.
    pub lost: mpsc::Receiver<Loss>,
    /// The heartbeat.
    pub heartbeat: Arc<Mutex<Heartbeat>>,
    /// What the peer said with its beats.
    pub words: mpsc::Receiver<Word>,
    /// How often a disk link was lost and another took its place.
    pub disk_link_losses: Arc<AtomicU64>,
    /// Disk links that are being made again.
    pub disk_links_down: Arc<AtomicU64>,
    /// Bytes written to the stream so far.
    pub stream_bytes: Arc<AtomicU64>,
    /// Bytes written to NBD so far.
    pub disk_bytes: Arc<AtomicU64>,
    /// Bytes read from the stream so far.
    pub received_bytes: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
    said: Arc<Notify>,
    _beating: tokio::sync::oneshot::Sender<()>,
}

impl Links {
    /// Bytes written to the stream and to NBD so far.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.stream_bytes.load(Ordering::Relaxed) + self.disk_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that wait for the disk links.
    #[must_use]
    pub fn disk_waiting_bytes(&self) -> usize {
        self.disk_out.iter().map(Outbox::waiting_bytes).sum()
    }

    /// Says a word to the peer, with every beat from now on.
    pub fn say(&self, word: Word) {
        lock(&self.heartbeat).say(word);
        self.said.notify_one();
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Which side the links are for.
pub enum Side {
    /// The primary writes disk blocks through NBD connections.
    Primary {
        /// What makes the connections of the packet link.
        packets: Connect,
        /// What makes the connections, after their welcome, in the order of the disks.
        nbd: Vec<Connect>,
        /// What is remembered of the pages sent, if the peer can take deltas.
        sent_pages: Option<SentPages>,
        /// The connections on which the secondary tells the hashes of a disk: which, and how many.
        hashes: Vec<(usize, Link, u64)>,
    },
    /// The secondary reads a stream for a guest of this size, and serves its disks.
    Secondary {
        /// The connection of the packet link, and those that take its place.
        packets: (Link, mpsc::Receiver<Link>),
        /// The guest's size.
        nr_pages: u64,
        /// The NBD servers; the end of one is the end of the pair, since no later checkpoint has that disk. The end of
        /// its connection is not.
        nbd: Vec<LinkTask>,
        /// What tells the hashes of its disks.
        hashes: Vec<LinkTask>,
    },
}

/// What moves the bytes of one connection, until it ends.
pub type LinkTask = std::pin::Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

type Lost = mpsc::Sender<Loss>;

fn ended(what: &str, why: &dyn std::fmt::Display) -> Loss {
    Loss::Disconnected(format!("{what}: {why}"))
}

async fn report(lost: Lost, what: &'static str, result: io::Result<()>) {
    let loss = match result {
        Ok(()) => ended(what, &"closed by the peer"),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Loss::Violation(format!("{what}: {error}")),
        Err(error) => ended(what, &error),
    };
    let _ = lost.send(loss).await;
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Starts the tasks of one side: those that carry packets on `engine`'s runtime, since to wake another thread for a packet takes
/// longer than the packet does, and all others on this one, where they need not wait for the engine.
#[must_use]
pub fn start(stream: Link, heartbeat_link: Link, heartbeat: Heartbeat, side: Side, engine: &Handle) -> Links {
    let (lost_sender, lost) = mpsc::channel(8);
    let (stream_sender, stream_in) = mpsc::channel(STREAM_IN_ITEMS);
    let (stream_out, stream_outgoing) = outbox();
    let (packets_sender, packets_in) = mpsc::channel(PACKETS_IN);
    let (packets_out, outgoing) = outbox();
    let (told, packet_link) = mpsc::channel(4);
    let (voice, words) = Voice::new(heartbeat);
    let (heartbeat, said) = (voice.heartbeat.clone(), voice.said.clone());
    let lease = heartbeat.clone();
    let lease = Box::new(move || lock(&lease).lost(engine_clock()).is_none());
    let here = Handle::current();
    let elsewhere = here.clone();
    let ends = |times| Ends { outgoing, to: packets_sender, told, times, lease, elsewhere };
    let (disk_sender, disk_in) = mpsc::channel(PACKETS_IN);
    let mut disk_out = Vec::new();
    let (hash_sender, hashes_in) = mpsc::channel(HASHES_IN);
    let (recycle, recycled) = mpsc::channel(4);
    let [stream_bytes, disk_bytes, received_bytes, disk_link_losses, disk_links_down] =
        std::array::from_fn(|_| Arc::new(AtomicU64::new(0)));
    let mut tasks = Vec::new();
    let mut spawn_on = |runtime: &Handle, what: &'static str, task: LinkTask| {
        let lost = lost_sender.clone();
        tasks.push(runtime.spawn(async move { report(lost, what, task.await).await }));
    };

    let (stream_read, stream_write) = tokio::io::split(stream);
    match side {
        Side::Primary { packets, nbd, sent_pages, hashes } => {
            spawn_on(engine, "packet link", Box::pin(packets::carry(packets, ends(Times::PRIMARY))));
            for (disk, link, count) in hashes {
                spawn_on(&here, "hash link", Box::pin(hashes::read(link, disk, count, hash_sender.clone())));
            }
            let writing = write_stream(stream_write, stream_outgoing, sent_pages, recycle, stream_bytes.clone());
            spawn_on(&here, "checkpoint stream", Box::pin(writing));
            spawn_on(&here, "checkpoint stream", Box::pin(read_messages(stream_read, stream_sender)));
            for (disk, connect) in nbd.into_iter().enumerate() {
                let (out, outgoing) = outbox();
                disk_out.push(out);
                let acks = Acks { disk, to: disk_sender.clone() };
                let counters = disk::Counters {
                    sent_bytes: disk_bytes.clone(),
                    losses: disk_link_losses.clone(),
                    down: disk_links_down.clone(),
                };
                spawn_on(
                    &here,
                    "disk link",
                    Box::pin(disk::forward(connect, disk_name(disk), outgoing, acks, counters)),
                );
            }
        }
        Side::Secondary { packets: (link, later), nr_pages, nbd, hashes } => {
            spawn_on(engine, "packet link", Box::pin(packets::serve(link, later, ends(Times::SECONDARY))));
            hashes.into_iter().for_each(|hashes| spawn_on(&here, "hash link", hashes));
            let writing = write_stream(stream_write, stream_outgoing, None, recycle, stream_bytes.clone());
            spawn_on(&here, "checkpoint stream", Box::pin(writing));
            let received = received_bytes.clone();
            spawn_on(&here, "checkpoint stream", Box::pin(read_items(stream_read, nr_pages, stream_sender, received)));
            nbd.into_iter().for_each(|server| spawn_on(&here, "disk link", server));
        }
    }
    let beating = beat(heartbeat_link, voice, lost_sender);
    Links {
        stream_in,
        stream_out,
        packets_in,
        packets_out,
        digests: None,
        packet_link,
        disk_in,
        disk_out,
        hashes_in,
        recycled,
        lost,
        heartbeat,
        words,
        disk_link_losses,
        disk_links_down,
        stream_bytes,
        disk_bytes,
        received_bytes,
        tasks,
        said,
        _beating: beating,
    }
}

async fn read_messages(mut read: ReadHalf<Link>, to: mpsc::Sender<StreamIn>) -> io::Result<()> {
    let mut input = BytesMut::new();
    while read.read_buf(&mut input).await? > 0 {
        while let Some(message) = Message::decode(&mut input).map_err(invalid)? {
            if to.send(StreamIn::Message(message)).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

async fn read_items(
    mut read: ReadHalf<Link>,
    nr_pages: u64,
    to: mpsc::Sender<StreamIn>,
    received: Arc<AtomicU64>,
) -> io::Result<()> {
    let mut decoder = stream::Decoder::new(nr_pages);
    let mut input = BytesMut::new();
    loop {
        input.reserve(READ_BYTES);
        let bytes = read.read_buf(&mut input).await?;
        if bytes == 0 {
            return Ok(());
        }
        received.fetch_add(bytes as u64, Ordering::Relaxed);
        while let Some(item) = decoder.decode(&mut input).map_err(invalid)? {
            if to.send(StreamIn::Item(item)).await.is_err() {
                return Ok(());
            }
        }
    }
}

async fn write_stream(
    mut write: WriteHalf<Link>,
    mut outgoing: Outgoing<StreamOut>,
    mut sent_pages: Option<SentPages>,
    recycle: mpsc::Sender<PageBatch>,
    sent: Arc<AtomicU64>,
) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    while let Some((bytes, out)) = outgoing.recv().await {
        match out {
            StreamOut::Message(message) => message.encode(&mut buffer),
            StreamOut::GuestRests => stream::encode_guest_rests(&mut buffer),
            StreamOut::Carried(carried) => stream::encode_carried(&carried, &mut buffer),
            StreamOut::Output(frames) => stream::encode_output(&frames, &mut buffer),
            StreamOut::Devices(blob) => {
                stream::encode_pages_end(&mut buffer);
                stream::encode_device_state(&blob, &mut buffer);
            }
            StreamOut::Pages(batch) => {
                // Piece by piece: the peer unpacks one while this side packs the next.
                let page_bytes = crate::page::PAGE_SIZE * ENCODE_PAGES;
                for (pfns, contents) in batch.pfns.chunks(ENCODE_PAGES).zip(batch.bytes.chunks(page_bytes)) {
                    stream::encode_pages(pfns, contents, sent_pages.as_mut(), &mut buffer);
                    flush(&mut write, &mut buffer, &sent).await?;
                }
                let _ = recycle.try_send(batch);
            }
        }
        flush(&mut write, &mut buffer, &sent).await?;
        outgoing.written(bytes);
    }
    Ok(())
}

async fn flush(write: &mut WriteHalf<Link>, buffer: &mut BytesMut, sent: &AtomicU64) -> io::Result<()> {
    while !buffer.is_empty() {
        let bytes = write.write_buf(buffer).await?;
        if bytes == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }
    buffer.clear();
    Ok(())
}

/// What the heartbeat's thread shares with the engine.
pub(super) struct Voice {
    heartbeat: Arc<Mutex<Heartbeat>>,
    said: Arc<Notify>,
    words: mpsc::Sender<Word>,
}

impl Voice {
    /// With the words that the peer says.
    pub(super) fn new(heartbeat: Heartbeat) -> (Self, mpsc::Receiver<Word>) {
        let (words, heard) = mpsc::channel(4);
        (Self { heartbeat: Arc::new(Mutex::new(heartbeat)), said: Arc::default(), words }, heard)
    }

    /// Says a word with every beat from now on.
    pub(super) fn say(&self, word: Word) {
        lock(&self.heartbeat).say(word);
        self.said.notify_one();
    }
}

/// Beats on a thread of its own, so that no other work of this process delays one.
fn beat(link: Link, voice: Voice, lost: Lost) -> tokio::sync::oneshot::Sender<()> {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    std::thread::Builder::new()
        .name("heartbeat".into())
        .spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
                let _ = lost.blocking_send(Loss::Local("no runtime for the heartbeat".into()));
                return;
            };
            runtime.block_on(async {
                tokio::select! {
                    loss = beat_on(link, &voice) => { let _ = lost.send(loss).await; }
                    _ = stopped => {}
                }
            });
        })
        .map_or_else(|error| tracing::error!(%error, "no heartbeat thread"), drop);
    stop
}

/// Beats until the peer is lost.
pub(super) async fn beat_on(link: Link, voice: &Voice) -> Loss {
    let Voice { heartbeat, said, words } = voice;
    let (mut read, mut write) = tokio::io::split(link);
    let mut input = BytesMut::new();
    loop {
        let now = engine_clock();
        if let Some(silence) = lock(heartbeat).lost(now) {
            return silence.into();
        }
        let due = lock(heartbeat).poll_transmit(now);
        if let Some(beat) = due
            && let Err(error) = send_beat(&mut write, beat).await
        {
            return ended("heartbeat", &error);
        }
        let timeout = lock(heartbeat).poll_timeout() - engine_clock();
        tokio::select! {
            read = read.read_buf(&mut input) => match read {
                Ok(0) => return ended("heartbeat", &"closed by the peer"),
                Err(error) => return ended("heartbeat", &error),
                Ok(_) => {
                    while let Some((bytes, _)) = input.split_first_chunk::<BEAT_BYTES>() {
                        let answer = lock(heartbeat).handle_beat(engine_clock(), Beat::decode(bytes));
                        bytes::Buf::advance(&mut input, BEAT_BYTES);
                        // Each of the few words is there once, so there is room.
                        lock(heartbeat).poll_word().into_iter().for_each(|word| _ = words.try_send(word));
                        if let Some(beat) = answer && let Err(error) = send_beat(&mut write, beat).await {
                            return ended("heartbeat", &error);
                        }
                    }
                }
            },
            () = said.notified() => {}
            () = tokio::time::sleep(timeout.max(Duration::from_millis(1))) => {}
        }
    }
}

async fn send_beat(write: &mut WriteHalf<Link>, beat: Beat) -> io::Result<()> {
    let mut bytes = BytesMut::with_capacity(BEAT_BYTES);
    beat.encode(&mut bytes);
    write.write_all(&bytes).await
}
