//! A server with a thread a connection, for `xl-colo nbd` and for guests' disks.
//!
//! ```text
//!   accept ── a place is free ──▶ thread: negotiate (deadline) ─▶ open the export's disk ─▶ serve until the client leaves
//!      └───── none is ─────────▶ who comes waits for one in the socket's backlog, as with qemu-nbd
//! ```
//!
//! The traps: a thread that reads or accepts cannot be told to end. Its socket can: whoever ends the server shuts the
//! sockets down. A deadline for one read is none for a handshake: TLS reads until it has a record, and a byte now and then would
//! buy all the time there is.
//!
//! Source for the limits: `doc/proto.md`, "Security considerations"; for the backlog qemu `qemu-nbd.c`, `nbd_can_accept`.

use super::aside::Windows;
use super::beside::Beside;
use super::{BUSY_RETRY, HANDSHAKE_DEADLINE, ServeError};
use crate::daemon::address::{keep_alive, widen};
use crate::daemon::links::lock;
use crate::disk::{Disk, DiskError};
use crate::nbd::handshake::{Encryption, Export};
use crate::nbd::server::{Next, Server};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a client that has been quick is waited for awake. To be woken takes about as long as to serve 4 KiB, and a
/// client with one request at a time pays it with each.
const AWAKE: Duration = Duration::from_micros(50);

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix.
    Unix(UnixListener),
}

/// A connection. A clone is the same, and costs no descriptor.
#[derive(Clone, Debug)]
pub enum Stream {
    /// TCP.
    Tcp(Arc<TcpStream>),
    /// Unix.
    Unix(Arc<UnixStream>),
}

impl Listener {
    /// A Unix socket of the runtime's, for threads.
    pub fn blocking(listener: tokio::net::UnixListener) -> io::Result<Self> {
        let listener = listener.into_std()?;
        listener.set_nonblocking(false)?;
        Ok(Self::Unix(listener))
    }

    /// Where it listens, for people and programs: it may have been passed, and a port may have been chosen.
    pub fn place(&self) -> String {
        let nowhere = |error| format!("a socket without an address ({error})");
        match self {
            Self::Tcp(listener) => listener.local_addr().map_or_else(nowhere, |at| format!("tcp:{at}")),
            Self::Unix(listener) => listener.local_addr().map_or_else(nowhere, |at| match at.as_pathname() {
                Some(path) => format!("unix:{}", path.display()),
                None => format!("unix:{at:?}"),
            }),
        }
    }

    fn socket(&self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::Tcp(listener) => listener.try_clone()?.into(),
            Self::Unix(listener) => listener.try_clone()?.into(),
        })
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                keep_alive(&stream);
                Ok(Stream::Tcp(stream.into()))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                widen(&stream);
                Ok(Stream::Unix(stream.into()))
            }
        }
    }
}

impl Stream {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
            Self::Unix(stream) => stream.set_read_timeout(timeout),
        }
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_write_timeout(timeout),
            Self::Unix(stream) => stream.set_write_timeout(timeout),
        }
    }

    /// What is there already; `WouldBlock` when nothing is.
    fn read_now(&self, into: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self, into, RecvFlags::DONTWAIT)?.0)
    }

    pub(super) fn shutdown(&self) {
        // It may be closed already.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&**stream).read(into),
            Self::Unix(stream) => (&**stream).read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&**stream).write(bytes),
            Self::Unix(stream) => (&**stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stream of which nothing is read after a deadline, however many reads there were before.
pub(super) struct Timed {
    pub(super) stream: Stream,
    pub(super) until: Option<Instant>,
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(until) = self.until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(into)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A client's bytes, in the clear or not.
enum Transport {
    Plain(Timed),
    Tls(Box<StreamOwned<ServerConnection, Timed>>),
}

impl Transport {
    /// A client that has so long for its handshake.
    fn until(stream: Stream, until: Instant) -> Self {
        Self::Plain(Timed { stream, until: Some(until) })
    }

    /// It has finished that, and may take its time.
    fn end_deadline(&mut self) -> io::Result<()> {
        let timed = match self {
            Self::Plain(timed) => timed,
            Self::Tls(stream) => &mut stream.sock,
        };
        timed.until = None;
        timed.stream.set_read_timeout(None)?;
        timed.stream.set_write_timeout(None)
    }

    /// The client's next bytes are its TLS hello.
    fn encrypt(self, config: &Arc<ServerConfig>) -> io::Result<Self> {
        let connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        match self {
            Self::Plain(stream) => Ok(Self::Tls(Box::new(StreamOwned::new(connection, stream)))),
            Self::Tls(_) => Err(io::Error::other("it is encrypted already")),
        }
    }

    /// 0 when the client has left, politely or not.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Plain(stream) => stream.read(into),
                Self::Tls(stream) => stream.read(into),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
        }
    }

    /// As [`Self::read`], and awake for [`AWAKE`] if `quick` says that this client has been worth it. Others that want
    /// this processor get it, the client first of all where there is no second one.
    fn read_quickly(&mut self, into: &mut [u8], quick: &mut bool) -> io::Result<usize> {
        let Self::Plain(timed) = self else { return self.read(into) };
        let begun = Instant::now();
        while *quick {
            match timed.stream.read_now(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
            *quick = begun.elapsed() < AWAKE;
            std::thread::yield_now();
        }
        let begun = Instant::now();
        let read = self.read(into);
        *quick = begun.elapsed() < AWAKE;
        read
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all(bytes),
            Self::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }
}

/// Opens a disk of its own for each client, by the export's index.
pub type OpenDisk = Box<dyn Fn(usize) -> Result<Box<dyn Disk>, DiskError> + Send + Sync>;

/// What is served, and to how many.
pub struct Service {
    /// What clients may choose from.
    pub exports: Vec<Export>,
    /// The disks behind them.
    pub open: OpenDisk,
    /// Connections at the same time; 0 for any number. Who comes then waits until one is over.
    pub max_connections: usize,
    /// With it, nobody is served in the clear.
    pub tls: Option<Arc<ServerConfig>>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("exports", &self.exports).finish_non_exhaustive()
    }
}

/// The connections that are open.
#[derive(Debug, Default)]
struct Open {
    next: u64,
    listener: Option<OwnedFd>,
    streams: BTreeMap<u64, Stream>,
    /// Clients that chose an export and left.
    served: u64,
    ended: bool,
}

/// A running server.
#[derive(Clone, Debug, Default)]
pub struct Running {
    open: Arc<(Mutex<Open>, std::sync::Condvar)>,
}

impl Running {
    /// Closes every connection, and every later one.
    pub fn end(&self) {
        let mut open = lock(&self.open.0);
        open.ended = true;
        open.streams.values().for_each(Stream::shutdown);
        if let Some(listener) = open.listener.take() {
            // Whoever waits in accept wakes up with an error.
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        }
        self.open.1.notify_all();
    }

    /// Waits until a client that had chosen an export has left, and no other is there.
    pub fn wait_for_last_client(&self) {
        let mut open = lock(&self.open.0);
        while !(open.ended || open.served > 0 && open.streams.is_empty()) {
            open = self.open.1.wait(open).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Waits until one of `max` places is free, or it has ended.
    fn await_place(&self, max: usize) {
        let open = lock(&self.open.0);
        let is_full = |open: &mut Open| !open.ended && max > 0 && open.streams.len() >= max;
        drop(self.open.1.wait_while(open, is_full).unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// Takes a place for a connection. `None` when it has ended.
    fn begin(&self, stream: &Stream) -> Option<u64> {
        let mut open = lock(&self.open.0);
        if open.ended {
            return None;
        }
        let number = open.next;
        open.next += 1;
        open.streams.insert(number, stream.clone());
        Some(number)
    }

    fn leave(&self, number: u64, served: bool) {
        let mut open = lock(&self.open.0);
        open.streams.remove(&number);
        open.served += u64::from(served);
        self.open.1.notify_all();
    }
}

/// Accepts and serves until the listener fails or [`Running::end`] is called. Blocks.
pub fn serve_all(listener: &Listener, service: &Arc<Service>, running: &Running) -> io::Result<()> {
    {
        let mut open = lock(&running.open.0);
        if open.ended {
            return Ok(());
        }
        open.listener = Some(listener.socket()?);
    }
    // A crowd is told of once, not a client at a time.
    let mut crowded = false;
    loop {
        running.await_place(service.max_connections);
        let stream = match listener.accept() {
            Ok(stream) => stream,
            Err(_) if lock(&running.open.0).ended => return Ok(()),
            // Gone before it was taken, or no descriptor left: the next may do.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted || is_crowded(&error) => {
                if !std::mem::replace(&mut crowded, true) {
                    tracing::warn!(%error, "a client is not accepted");
                }
                std::thread::sleep(BUSY_RETRY);
                continue;
            }
            Err(error) => return Err(error),
        };
        crowded = false;
        let Some(number) = running.begin(&stream) else { return Ok(()) };
        let (service, here) = (service.clone(), running.clone());
        let run = move || {
            let mut served = false;
            tracing::debug!(number, "a client came");
            match serve_client(stream, &service, &mut served) {
                Ok(()) => tracing::debug!(number, served, "a client left"),
                Err(error) => tracing::debug!(number, served, %error, "a client is lost"),
            }
            here.leave(number, served);
        };
        if let Err(error) = std::thread::Builder::new().name("nbd-client".into()).spawn(run) {
            tracing::warn!(%error, "a client is not served");
            running.leave(number, false);
        }
    }
}

/// Whether there are no descriptors left, here or in the whole system.
fn is_crowded(error: &io::Error) -> bool {
    let crowded = [Errno::MFILE, Errno::NFILE];
    crowded.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Serves one client until it leaves; `served` says whether it chose an export.
fn serve_client(stream: Stream, service: &Service, served: &mut bool) -> Result<(), ServeError> {
    let encryption = if service.tls.is_some() { Encryption::Required } else { Encryption::None };
    let mut server = Server::new(service.exports.clone(), encryption);
    stream.set_write_timeout(Some(HANDSHAKE_DEADLINE))?;
    let mut transport = Transport::until(stream, Instant::now() + HANDSHAKE_DEADLINE);
    let index = loop {
        let next = server.negotiate();
        speak(&mut transport, &mut server)?;
        match (next?, server.export()) {
            (_, Some(index)) => break index,
            (Next::Closed, None) => return Ok(()),
            (Next::StartTls, None) => {
                let Some(tls) = &service.tls else { return Ok(()) };
                transport = transport.encrypt(tls)?;
                server.encrypted();
            }
            (Next::Output | Next::Busy | Next::Later, None) => {}
            (Next::Input, None) => match transport.read(server.room()) {
                Ok(0) => return Ok(()),
                Ok(bytes) => server.filled(bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(ServeError::Deadline),
                Err(error) => return Err(error.into()),
            },
        }
    };
    *served = true;
    transport.end_deadline()?;
    let mut disk = (service.open)(index).map_err(io::Error::other)?;
    let open = || (service.open)(index);
    std::thread::scope(|scope| {
        // Ends before the scope does, which waits for those who work for it.
        let mut beside = match &transport {
            Transport::Plain(Timed { stream, .. }) => {
                server.defer();
                server.open_aside(Box::new(Windows::to(stream.clone())));
                Some(Beside::new(stream.clone(), scope, &open))
            }
            // Only one thread at a time can know where the cipher is.
            Transport::Tls(_) => None,
        };
        let mut quick = false;
        loop {
            let next = server.serve(&mut *disk);
            {
                let _speaking = beside.as_ref().map(Beside::speak);
                speak(&mut transport, &mut server)?;
            }
            match next? {
                Next::Output | Next::StartTls => {}
                Next::Later => {
                    if let (Some(beside), Some(later)) = (&mut beside, server.later()) {
                        beside.take(later)?;
                    }
                }
                Next::Busy => std::thread::sleep(BUSY_RETRY),
                Next::Closed => return Ok(()),
                Next::Input => match transport.read_quickly(server.room(), &mut quick)? {
                    0 => return Ok(()),
                    bytes => server.filled(bytes),
                },
            }
        }
    })
}

fn speak(transport: &mut Transport, server: &mut Server) -> io::Result<()> {
    if server.went_aside() {
        server.send_aside()?;
    } else if !server.output().is_empty() {
        transport.write_all(server.output())?;
    }
    server.sent();
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::disk::MemoryDisk;
    use rustix::net::sockopt::{socket_keepalive, tcp_keepcnt, tcp_keepidle, tcp_keepintvl};

    /// A server of one disk, and a client that has chosen it.
    pub(in super::super) struct Lab {
        pub(in super::super) client: UnixStream,
        running: Running,
        server: std::thread::JoinHandle<io::Result<()>>,
    }

    impl Lab {
        pub(in super::super) fn new(size_bytes: u64, open: OpenDisk) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("sock");
            let listener = Listener::Unix(UnixListener::bind(&path).unwrap());
            let service =
                Service { exports: vec![Export::new("disk", size_bytes)], open, max_connections: 0, tls: None };
            let (service, running) = (Arc::new(service), Running::default());
            let here = running.clone();
            let server = std::thread::spawn(move || serve_all(&listener, &service, &here));
            let mut client = UnixStream::connect(path).unwrap();
            client.set_read_timeout(Some(HANDSHAKE_DEADLINE)).unwrap();
            client.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
            client.read_exact(&mut [0; 28]).unwrap();
            Self { client, running, server }
        }

        /// Ends the server, which must have been well until then.
        pub(in super::super) fn end(mut self) {
            self.running.end();
            assert_eq!(self.client.read(&mut [0]).unwrap(), 0, "the client is hung up on, and nothing was left to say");
            self.server.join().unwrap().unwrap();
            self.running.wait_for_last_client();
        }
    }

    pub(in super::super) fn request(kind: u16, cookie: u64, offset: u64, len_bytes: u32) -> Vec<u8> {
        let mut bytes = crate::nbd::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([[0, 0], kind.to_be_bytes()].concat());
        bytes.extend([cookie.to_be_bytes(), offset.to_be_bytes()].concat());
        bytes.extend(len_bytes.to_be_bytes());
        bytes
    }

    #[test]
    fn ending_it_wakes_whoever_accepts_and_whoever_reads() {
        Lab::new(512, Box::new(|_| Ok(Box::new(MemoryDisk::new(512))))).end();
    }

    #[test]
    fn a_tcp_peer_that_is_gone_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let stream = Listener::Tcp(listener).accept().unwrap();
        let asked = tcp_keepidle(&stream).unwrap() + tcp_keepintvl(&stream).unwrap() * tcp_keepcnt(&stream).unwrap();
        assert!(socket_keepalive(&stream).unwrap() && asked == Duration::from_secs(60), "{asked:?}");
    }

    /// A medium that answers nobody until it has two to answer.
    struct Pairwise(Arc<std::sync::Barrier>);

    impl Disk for Pairwise {
        fn size_bytes(&self) -> u64 {
            8192
        }
        fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
            self.0.wait();
            into.fill(offset as u8);
            Ok(())
        }
        fn read_now(&mut self, offset: u64, into: &mut [u8]) -> Result<bool, DiskError> {
            into.fill(7);
            Ok(offset == 7)
        }
        fn write(&mut self, _offset: u64, _bytes: &[u8]) -> Result<(), DiskError> {
            Ok(())
        }
        fn flush(&mut self) -> Result<(), DiskError> {
            self.0.wait();
            Ok(())
        }
    }

    #[test]
    fn what_waits_for_the_medium_waits_beside_what_follows() {
        let barrier = Arc::new(std::sync::Barrier::new(2));
        let mut lab = Lab::new(8192, Box::new(move |_| Ok(Box::new(Pairwise(barrier.clone())))));
        let client = &mut lab.client;
        // One that waits, and one that does not and overtakes it; then one more to wait with.
        client.write_all(&[request(0, 1, 1, 4), request(0, 2, 7, 4)].concat()).unwrap();
        let mut reply = [0; 20];
        client.read_exact(&mut reply).expect("a reply, while another waits");
        assert_eq!((reply[15], &reply[16..]), (2, &[7; 4][..]));
        client.write_all(&request(0, 3, 2, 4)).unwrap();
        let mut both = [0; 40];
        client.read_exact(&mut both).expect("replies to both that waited");
        let mut cookies = [both[15], both[35]];
        cookies.sort_unstable();
        assert_eq!(cookies, [1, 3]);
        client.write_all(&[request(0, 4, 3, 4), request(3, 5, 0, 0)].concat()).unwrap();
        client.read_exact(&mut [0; 36]).expect("the flush did not hold the read up");
        lab.end();
    }
}
