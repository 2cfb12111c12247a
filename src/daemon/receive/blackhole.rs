//! A secondary that keeps nothing: for measuring what a protection costs its guest (`xl-colo remus -b`, as xl's -b).
//!
//! ```text
//!   COLO stream   READY after the first copy; to each checkpoint REPLY, and RECEIVED and LOADED when it was read
//!   packets       read, dropped            heartbeat   beats, and GIVEN UP to a dismissal
//!   NBD           a disk that takes all and remembers none
//! ```
//!
//! It answers one connection and knows of no other, so that each may be a process of its own. It must never be asked to
//! take over, and cannot: when the primary goes, so does it.

use crate::colo::heartbeat::{Heartbeat, Word};
use crate::colo::hello::{self, Channel, Hello, Mode, Welcome, disk_name};
use crate::colo::message::Message;
use crate::colo::stream::{Decoder, Item};
use crate::daemon::address::Link;
use crate::daemon::links::{self, Voice};
use crate::daemon::{engine_clock, host, nbd};
use crate::disk::{Disk, DiskError, check_range};
use bytes::BytesMut;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes asked of a connection at once.
const READ_BYTES: usize = 1 << 20;

/// Answers one connection to its end.
pub async fn answer(mut link: Link) -> io::Result<()> {
    let word = host::read_hello(&mut link).await.map_err(io::Error::other)?;
    let refused =
        word.check().err().map(|error| error.to_string()).or_else(|| {
            (word.mode == Mode::Colo).then(|| "a black hole runs no guest: lock-step needs one".to_owned())
        });
    let is_refused = refused.is_some();
    let features = vec![host::BLANK_DISK.to_owned(), host::VACANT.to_owned()];
    let welcome = Welcome { features, ..Welcome::bare("blackhole", refused) };
    let mut out = BytesMut::new();
    hello::encode(&welcome, &mut out);
    link.write_all(&out).await?;
    if is_refused {
        return Ok(());
    }
    match word.channel {
        Channel::Colo => receive(link, word.geometry.nr_pages).await,
        Channel::Heartbeat => beat(link, &word).await,
        Channel::Nbd => {
            let size_bytes = word.geometry.disks.get(word.disk).map_or(0, |disk| disk.size_bytes);
            let disk = Box::new(Nothing { size_bytes });
            nbd::serve_connection(link, disk_name(word.disk), disk).await.map_err(io::Error::other)
        }
        Channel::Packets | Channel::Hashes | Channel::Greeting => {
            tokio::io::copy(&mut link, &mut tokio::io::sink()).await.map(drop)
        }
    }
}

async fn receive(mut link: Link, nr_pages: u64) -> io::Result<()> {
    let mut decoder = Decoder::new(nr_pages);
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let mut copied = false;
    loop {
        input.reserve(READ_BYTES);
        if link.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        while let Some(item) = decoder.decode(&mut input).map_err(io::Error::other)? {
            match item {
                Item::Message(Message::CheckpointRequest) => Message::CheckpointReply.encode(&mut output),
                Item::DeviceState(_) if copied => {
                    Message::VmstateReceived.encode(&mut output);
                    Message::VmstateLoaded.encode(&mut output);
                }
                Item::DeviceState(_) => {
                    copied = true;
                    Message::CheckpointReady.encode(&mut output);
                }
                _ => {}
            }
        }
        link.write_all(&output).await?;
        output.clear();
    }
}

async fn beat(link: Link, word: &Hello) -> io::Result<()> {
    let interval = Duration::from_millis(word.heartbeat_interval_ms);
    let heartbeat = Heartbeat::new(engine_clock(), interval, word.heartbeat_misses, word.generation);
    let (voice, mut words) = Voice::new(heartbeat);
    let given_up = async {
        while let Some(word) = words.recv().await {
            if word == Word::Dismissal {
                voice.say(Word::GivenUp);
            }
        }
    };
    tokio::select! {
        loss = links::beat_on(link, &voice) => Err(io::Error::other(loss.to_string())),
        () = given_up => Ok(()),
    }
}

/// A disk that takes all and remembers none.
#[derive(Debug)]
struct Nothing {
    size_bytes: u64,
}

impl Disk for Nothing {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, into.len() as u64)?;
        into.fill(0);
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, bytes.len() as u64)
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}
