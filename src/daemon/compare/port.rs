//! The four sockets of a comparator, each with one peer at a time.
//!
//! ```text
//!   server=on  (default)   listen ── accept one ─▶ Socket ── it is lost, or said something impossible ─▶ accept the next
//!   server=off             connect, again after a pause ─▶ Socket ── likewise ─▶ connect again
//! ```
//!
//! A thread a port waits for the peer and hands it over: it accepts no second one while the first is there, who waits
//! in the socket's backlog, as at a chardev of QEMU's.

use super::wake::Wake;
use crate::daemon::address::{Address, BadAddress, bind_unix, widen};
use std::fmt;
use std::io::{self, IoSlice, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

/// Between two attempts to connect, or to accept when that failed.
const PAUSE: Duration = Duration::from_millis(500);
/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a port's peer is met: `ADDRESS[,server=on|off]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortAddress {
    /// The address.
    pub address: Address,
    /// Whether the peer comes to us.
    pub server: bool,
}

/// What is no port.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadPort {
    /// The address is none.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// A command, where a peer of a QEMU's would be.
    #[error("a port is a socket: tcp:HOST:PORT or unix:PATH")]
    Command,
    /// An option that is not known.
    #[error("{0:?} is no option of a socket: there is server=on and server=off")]
    Option(String),
}

impl FromStr for PortAddress {
    type Err = BadPort;

    fn from_str(text: &str) -> Result<Self, BadPort> {
        let mut parts = text.split(',');
        let address = parts.next().unwrap_or_default().parse()?;
        if matches!(address, Address::Exec(_)) {
            return Err(BadPort::Command);
        }
        let mut server = true;
        for option in parts {
            server = match option {
                "server=on" | "server" => true,
                "server=off" => false,
                other => return Err(BadPort::Option(other.into())),
            };
        }
        Ok(Self { address, server })
    }
}

impl fmt::Display for PortAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.address, if self.server { "" } else { ",server=off" })
    }
}

/// A connection that never blocks.
#[derive(Debug)]
pub(in crate::daemon) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Socket {
    fn unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        widen(&stream);
        Ok(Self::Unix(stream))
    }

    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    /// Writes what it can of these, in order.
    pub(in crate::daemon) fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write_vectored(slices),
            Self::Tcp(stream) => stream.write_vectored(slices),
        }
    }
}

/// What [`PortAddress`] lets nobody ask for.
fn no_socket() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, BadPort::Command)
}

/// Where sockets come from.
#[derive(Debug)]
pub(in crate::daemon) enum Source {
    Unix(UnixListener),
    Tcp(TcpListener),
    Connect(Address),
}

impl Source {
    /// Listens, or will connect. Also returns where peers find it.
    pub(in crate::daemon) async fn open(port: &PortAddress) -> io::Result<(Self, PortAddress)> {
        let mut at = port.clone();
        let source = match (&port.address, port.server) {
            (address, false) => Self::Connect(address.clone()),
            (Address::Unix(path), true) => {
                let listener = bind_unix(path).await?.into_std()?;
                listener.set_nonblocking(false)?;
                Self::Unix(listener)
            }
            (Address::Tcp(host_port), true) => {
                let listener = TcpListener::bind(host_port)?;
                at.address = Address::Tcp(listener.local_addr()?.to_string());
                Self::Tcp(listener)
            }
            (Address::Exec(_), true) => return Err(no_socket()),
        };
        Ok((source, at))
    }

    /// The next peer. Blocks.
    fn next(&self) -> io::Result<Socket> {
        match self {
            Self::Unix(listener) => Socket::unix(listener.accept()?.0),
            Self::Tcp(listener) => Socket::tcp(listener.accept()?.0),
            Self::Connect(Address::Unix(path)) => Socket::unix(UnixStream::connect(path)?),
            Self::Connect(Address::Tcp(host_port)) => {
                let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in host_port.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                        Ok(stream) => return Socket::tcp(stream),
                        Err(error) => failed = error,
                    }
                }
                Err(failed)
            }
            Self::Connect(Address::Exec(_)) => Err(no_socket()),
        }
    }

    /// Hands a peer over for each `()` in `wanted`, until nobody wants any.
    pub(in crate::daemon) fn serve(
        self,
        name: &'static str,
        number: usize,
        wanted: &Receiver<()>,
        peers: &Sender<(usize, Socket)>,
        wake: &Arc<Wake>,
    ) {
        while wanted.recv().is_ok() {
            let mut failed_before = false;
            let socket = loop {
                match self.next() {
                    Ok(socket) => break socket,
                    Err(error) => {
                        // A peer that is not there yet is said once, not each time it is looked for.
                        if !std::mem::replace(&mut failed_before, true) {
                            tracing::warn!(port = name, %error, "nobody is there; trying again");
                        }
                        std::thread::sleep(PAUSE);
                    }
                }
            };
            if peers.send((number, socket)).is_err() {
                return;
            }
            wake.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_listens_unless_it_is_told_to_connect() {
        let port = |text: &str| text.parse::<PortAddress>();
        assert!(port("unix:/run/a").unwrap().server && port("unix:/run/a,server=on").unwrap().server);
        let connecting = port("tcp:host:1,server=off").unwrap();
        assert_eq!((connecting.server, connecting.to_string().as_str()), (false, "tcp:host:1,server=off"));
        assert_eq!(port("unix:/run/a,wait=on"), Err(BadPort::Option("wait=on".into())));
        assert!(matches!(port("nowhere"), Err(BadPort::Address(_))));
    }
}
