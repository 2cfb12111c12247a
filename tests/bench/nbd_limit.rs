//! What no NBD server can be faster than by much: its disk is its own memory, and no connection shares it with another.
//! `scripts/bench.sh nbd` measures it beside the servers, so that a cell shows how much of it is the client's own time.
//!
//! ```text
//!   READ   header + bytes from where they are in memory               one copy, the kernel's
//!   WRITE  payload to where it belongs in memory ─▶ header            one copy, the kernel's
//! ```
//!
//! `nbd_limit AT`, where AT is `unix:PATH` or an address. A thread a connection, with a disk of its own; structured replies to reads
//! where the client asks for them, as all the servers do, since they cost it time; replies to requests that came together leave
//! together. Who has nothing to do stays awake for a while, as our server does.
//!
//! `nbd_limit pair AT IMAGE` is the same for a protected disk, and `scripts/bench.sh replica`'s: what is written goes into an image,
//! and through a socket into the memory of another process, which was touched before. It keeps no epochs, and nothing in order but
//! its writes.
//!
//! ```text
//!   WRITE ─▶ buffer ─▶ image ─▶ reply          the same buffer ─▶ another thread ─▶ socket ─▶ the other's memory
//! ```
//!
//! It speaks as much of the protocol as libnbd needs, and trusts its client: it is for nothing but this.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on ends")]

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A pair's: writes under way between the halves, and the longest.
const BUFFERS: usize = 8;
const WRITE_MAX_BYTES: usize = 1 << 20;
const SIZE_BYTES: usize = 256 << 20;
/// Connections at a time: fio's four, and the one before them that is not closed yet.
const DISKS: usize = 5;
const AWAKE: Duration = Duration::from_micros(50);
const REQUEST_BYTES: usize = 28;
const REPLY_MAGIC: [u8; 4] = 0x6744_6698_u32.to_be_bytes();
const OPTION_REPLY_MAGIC: [u8; 8] = 0x3_e889_0455_65a9_u64.to_be_bytes();
/// What a structured reply to a read begins with: the last chunk, and there is data in it behind an offset.
const CHUNK: [u8; 8] = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1];
/// Of options: go and structured replies, and what replies to them or to others.
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const ACK: u32 = 1;
const INFO: u32 = 3;
const UNSUPPORTED: u32 = 0x8000_0001;
/// There are flags, a flush and more than one connection is one disk.
const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 8;
/// Of requests.
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;

trait Socket: Read + Write + AsFd + Send + 'static {}
impl<T: Read + Write + AsFd + Send + 'static> Socket for T {}

/// Until the client has the export; whether it wants structured replies.
fn handshake(socket: &mut impl Socket, size_bytes: u64) -> io::Result<bool> {
    let mut structured = false;
    socket.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    socket.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; 16];
        socket.read_exact(&mut head)?;
        let [option, data_bytes] = [8, 12].map(|at| u32::from_be_bytes(head[at..at + 4].try_into().unwrap()));
        io::copy(&mut socket.take(data_bytes.into()), &mut io::sink())?;
        let reply = |kind: u32, data: &[u8]| {
            let [option, kind, len] = [option, kind, data.len() as u32].map(u32::to_be_bytes);
            [&OPTION_REPLY_MAGIC[..], &option, &kind, &len, data].concat()
        };
        if option != GO {
            structured |= option == STRUCTURED_REPLY;
            socket.write_all(&reply(if option == STRUCTURED_REPLY { ACK } else { UNSUPPORTED }, &[]))?;
            continue;
        }
        let export = [&[0; 2][..], &size_bytes.to_be_bytes(), &EXPORT_FLAGS.to_be_bytes()].concat();
        return socket.write_all(&[reply(INFO, &export), reply(ACK, &[])].concat()).map(|()| structured);
    }
}

/// Reads what is there, awake for a while and then asleep.
fn read_some(socket: &mut impl Socket, into: &mut [u8]) -> io::Result<usize> {
    let begun = Instant::now();
    while begun.elapsed() < AWAKE {
        match recv(&*socket, &mut *into, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => std::thread::yield_now(),
            read => return Ok(read?.0),
        }
    }
    socket.read(into)
}

fn serve(mut socket: impl Socket, disks: &Disks) -> io::Result<()> {
    let taken = disks.lock().unwrap().pop();
    let mut disk = taken.unwrap_or_else(new_disk);
    let served =
        handshake(&mut socket, SIZE_BYTES as u64).and_then(|structured| answer(&mut socket, &mut disk, structured));
    disks.lock().unwrap().push(disk);
    served
}

fn answer(socket: &mut impl Socket, disk: &mut [u8], structured: bool) -> io::Result<()> {
    let (mut input, mut filled) = (vec![0; 64 << 10], 0);
    let (mut headers, mut payloads) = (Vec::new(), Vec::new());
    loop {
        let read_bytes = read_some(socket, &mut input[filled..])?;
        if read_bytes == 0 {
            return Ok(());
        }
        filled += read_bytes;
        let mut at = 0;
        headers.clear();
        payloads.clear();
        while filled - at >= REQUEST_BYTES {
            let request = &input[at..at + REQUEST_BYTES];
            at += REQUEST_BYTES;
            let offset = u64::from_be_bytes(request[16..24].try_into().unwrap()) as usize;
            let end = offset + u32::from_be_bytes(request[24..].try_into().unwrap()) as usize;
            let kind = u16::from_be_bytes(request[6..8].try_into().unwrap());
            headers.push(if kind == READ && structured {
                let len_bytes = (8 + end - offset) as u32;
                [&CHUNK, &request[8..16], &len_bytes.to_be_bytes(), &request[16..24]].concat()
            } else {
                [&REPLY_MAGIC[..], &[0; 4], &request[8..16]].concat()
            });
            payloads.push(0..0);
            match kind {
                READ => *payloads.last_mut().unwrap() = offset..end,
                WRITE => {
                    let here_bytes = (end - offset).min(filled - at);
                    disk[offset..offset + here_bytes].copy_from_slice(&input[at..at + here_bytes]);
                    at += here_bytes;
                    socket.read_exact(&mut disk[offset + here_bytes..end])?;
                }
                DISCONNECT => return Ok(()),
                _ => {}
            }
        }
        input.copy_within(at..filled, 0);
        filled -= at;
        let parts: Vec<[&[u8]; 2]> =
            headers.iter().zip(&payloads).map(|(header, range)| [&header[..], &disk[range.clone()]]).collect();
        for parts in parts.chunks(256) {
            let mut slices: Vec<IoSlice<'_>> = parts.as_flattened().iter().map(|part| IoSlice::new(part)).collect();
            let mut left = &mut slices[..];
            while !left.is_empty() {
                let written = socket.write_vectored(left)?;
                IoSlice::advance_slices(&mut left, written);
            }
        }
    }
}

/// Disks that nobody uses now, of memory that was touched.
type Disks = Mutex<Vec<Vec<u8>>>;

fn new_disk() -> Vec<u8> {
    vec![0xaa; SIZE_BYTES]
}

/// What is written to a pair's disk: into the image, and on to the other half.
struct Pair {
    image: File,
    size_bytes: u64,
    filled: SyncSender<(Vec<u8>, usize)>,
    empty: Mutex<Receiver<Vec<u8>>>,
}

impl Pair {
    fn new(image: &str) -> Self {
        let image = File::options().read(true).write(true).open(image).unwrap();
        let size_bytes = image.metadata().unwrap().len();
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut other = Command::new(std::env::current_exe().unwrap());
        let mut other = other.arg("sink").stdin(Stdio::from(OwnedFd::from(far))).spawn().unwrap();
        // It ends when this process does, and the socket with it.
        std::thread::spawn(move || other.wait());
        let (filled, to_send) = sync_channel::<(Vec<u8>, usize)>(BUFFERS);
        let (give, empty) = sync_channel(BUFFERS);
        (0..BUFFERS).for_each(|_| give.send(vec![0; WRITE_MAX_BYTES]).unwrap());
        std::thread::spawn(move || {
            while let Ok((buffer, bytes)) = to_send.recv() {
                near.write_all(&buffer[..bytes]).unwrap();
                give.send(buffer).unwrap();
            }
        });
        Self { image, size_bytes, filled, empty: Mutex::new(empty) }
    }

    fn serve(&self, mut socket: impl Socket) -> io::Result<()> {
        handshake(&mut socket, self.size_bytes)?;
        let mut request = [0; REQUEST_BYTES];
        loop {
            socket.read_exact(&mut request)?;
            let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
            let len_bytes = u32::from_be_bytes(request[24..].try_into().unwrap()) as usize;
            match u16::from_be_bytes(request[6..8].try_into().unwrap()) {
                WRITE => {
                    let mut buffer = self.empty.lock().unwrap().recv().unwrap();
                    socket.read_exact(&mut buffer[..len_bytes])?;
                    self.image.write_all_at(&buffer[..len_bytes], offset)?;
                    self.filled.send((buffer, len_bytes)).unwrap();
                }
                DISCONNECT => return Ok(()),
                READ => return Err(io::ErrorKind::Unsupported.into()),
                _ => {}
            }
            socket.write_all(&[&REPLY_MAGIC[..], &[0; 4], &request[8..16]].concat())?;
        }
    }
}

/// The other half: what comes is in memory, and that is all.
fn sink() {
    let (mut memory, mut at) = (new_disk(), 0);
    while let Ok(1..) = io::stdin().lock().read(&mut memory[at..at + WRITE_MAX_BYTES]).inspect(|bytes| at += bytes) {
        at = if at + WRITE_MAX_BYTES > memory.len() { 0 } else { at };
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["sink"] => sink(),
        ["pair", at, image] => {
            let pair = Arc::new(Pair::new(image));
            accept(at, move |socket| pair.serve(socket));
        }
        [at] => {
            let disks: Arc<Disks> = Arc::new(Mutex::new((0..DISKS).map(|_| new_disk()).collect()));
            accept(at, move |socket| serve(socket, &disks));
        }
        _ => eprintln!("scripts/bench.sh nbd and replica start this"),
    }
}

/// A thread for each who comes.
fn accept(at: &str, serve: impl Fn(Box<dyn Socket>) -> io::Result<()> + Clone + Send + 'static) {
    let start = |socket: Box<dyn Socket>| {
        let serve = serve.clone();
        std::thread::spawn(move || serve(socket));
    };
    if let Some(path) = at.strip_prefix("unix:") {
        UnixListener::bind(path).unwrap().incoming().for_each(|socket| start(Box::new(socket.unwrap())));
    } else {
        for socket in TcpListener::bind(at).unwrap().incoming() {
            let socket = socket.unwrap();
            socket.set_nodelay(true).unwrap();
            start(Box::new(socket));
        }
    }
}
