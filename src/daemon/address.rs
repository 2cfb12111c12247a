//! Where a host, an arbiter or a switch port is reached: `unix:PATH`, `tcp:HOST:PORT`, or plain `HOST:PORT`; a peer also
//! by `exec:COMMAND`, whose standard input and output are the connection (`exec:ssh b xl-colo receive`).
//!
//! One pair of types for all of them, so that everything above speaks of a [`Link`] and a [`Listener`].

use super::exec;
use rustix::net::sockopt::{
    set_socket_keepalive, set_socket_send_buffer_size, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// How long a connection attempt may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What a Unix socket holds of what its peer has not read, in bytes; the system counts twice as many. More, and the peer
/// copies from memory what it could have had from the cache: with twice as much, NBD reads of 64 KiB were 0.7 to 0.8 times as fast.
const UNIX_SEND_BYTES: usize = 256 << 10;

/// How long a peer may be silent when it is asked.
const PEER_LOST: Duration = Duration::from_secs(60);

/// An address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A host name or IP address, and a port.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
    /// A command for the shell. Nobody can listen there.
    Exec(String),
}

/// What cannot be an address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no address: write HOST:PORT, tcp:HOST:PORT, unix:PATH or exec:COMMAND")]
pub struct BadAddress(String);

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let bad = || BadAddress(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(bad()) } else { Ok(Self::Unix(path.into())) };
        }
        if let Some(command) = text.strip_prefix("exec:") {
            return if command.trim().is_empty() { Err(bad()) } else { Ok(Self::Exec(command.to_owned())) };
        }
        let host_port = text.strip_prefix("tcp:").unwrap_or(text);
        match host_port.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(host_port.to_owned()))
            }
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => write!(f, "tcp:{host_port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Exec(command) => write!(f, "exec:{command}"),
        }
    }
}

/// An open byte stream of either family.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {
    /// Moves it to the runtime that this is called in, if it is a socket: it is that one's thread that learns first of what has
    /// come. What is none stays where it is, and works all the same.
    ///
    /// # Errors
    /// The system's.
    fn here(self: Box<Self>) -> io::Result<Link>;
}

impl Stream for TcpStream {
    fn here(self: Box<Self>) -> io::Result<Link> {
        Ok(Box::new(Self::from_std(self.into_std()?)?))
    }
}

impl Stream for UnixStream {
    fn here(self: Box<Self>) -> io::Result<Link> {
        Ok(Box::new(Self::from_std(self.into_std()?)?))
    }
}

impl Stream for exec::Exec {
    fn here(self: Box<Self>) -> io::Result<Link> {
        Ok(self)
    }
}

impl Stream for DuplexStream {
    fn here(self: Box<Self>) -> io::Result<Link> {
        Ok(self)
    }
}

/// A connection.
pub type Link = Box<dyn Stream>;

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix, with the path to remove at the end.
    Unix(UnixListener, PathBuf),
}

impl Address {
    /// Connects, within [`CONNECT_TIMEOUT`].
    pub async fn connect(&self) -> io::Result<Link> {
        let attempt = async {
            Ok::<Link, io::Error>(match self {
                Self::Tcp(host_port) => {
                    let stream = TcpStream::connect(host_port).await?;
                    stream.set_nodelay(true)?;
                    Box::new(stream)
                }
                Self::Unix(path) => {
                    let stream = UnixStream::connect(path).await?;
                    widen(&stream);
                    Box::new(stream)
                }
                Self::Exec(command) => Box::new(exec::start(command)?),
            })
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
            Ok(link) => link,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {CONNECT_TIMEOUT:?}"))),
        }
    }

    /// Listens. A Unix socket left behind by a dead process is replaced, one that somebody serves is not.
    pub async fn listen(&self) -> io::Result<Listener> {
        match self {
            Self::Tcp(host_port) => TcpListener::bind(host_port).await.map(Listener::Tcp),
            Self::Unix(path) => listen_unix(path).await.map(|listener| Listener::Unix(listener, path.clone())),
            Self::Exec(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "nobody can listen on a command")),
        }
    }
}

/// Lets a Unix socket hold more on its way out, as far as the system allows: by default it is about three frames of 64 KiB,
/// so that both ends would wait for each other all the time. TCP finds its own measure.
pub(in crate::daemon) fn widen(socket: impl AsFd) {
    let _ = set_socket_send_buffer_size(socket, UNIX_SEND_BYTES);
}

/// Has the kernel ask a peer that is silent whether it is there: one whose host is gone says nothing, and would keep its place
/// for ever. Between two requests it is lost after a minute; one that was told something when the system gives up repeating it
/// (`tcp_retries2`, a quarter of an hour): a client may be stopped for a while and have much unread.
pub(in crate::daemon) fn keep_alive(socket: impl AsFd) {
    let socket = socket.as_fd();
    let _ = set_socket_keepalive(socket, true);
    let _ = set_tcp_keepidle(socket, PEER_LOST / 2);
    let _ = set_tcp_keepintvl(socket, PEER_LOST / 6);
    let _ = set_tcp_keepcnt(socket, 3);
}

/// Listens on a Unix socket that only this user can open.
pub async fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let listener = bind_unix(path).await?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Listens on a Unix socket that whoever the umask lets can open. One left behind by a dead process is replaced, one
/// that somebody serves is not.
pub async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if path.exists() {
        if UnixStream::connect(path).await.is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "in use: another process serves this socket"));
        }
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

impl Listener {
    /// The next connection.
    pub async fn accept(&self) -> io::Result<Link> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                keep_alive(&stream);
                Ok(Box::new(stream))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                widen(&stream);
                Ok(Box::new(stream))
            }
        }
    }

    /// The address peers can connect to; with port 0 the port the system chose.
    pub fn local_address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Tcp(listener) => Address::Tcp(listener.local_addr()?.to_string()),
            Self::Unix(_, path) => Address::Unix(path.clone()),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_spellings_and_nothing_else() {
        assert_eq!("unix:/run/a.sock".parse(), Ok(Address::Unix("/run/a.sock".into())));
        assert_eq!("tcp:host:1".parse(), Ok(Address::Tcp("host:1".into())));
        assert_eq!("[::1]:80".parse(), Ok(Address::Tcp("[::1]:80".into())));
        let exec = "exec:ssh b xl-colo receive";
        assert_eq!(exec.parse::<Address>().map(|address| address.to_string()), Ok(exec.to_owned()));
        for bad in ["", "unix:", "exec:", "exec: ", "host", ":80", "host:http", "host:70000"] {
            let refused = bad.parse::<Address>().unwrap_err();
            assert!(refused.to_string().contains("HOST:PORT"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = listen_unix(&path).await.unwrap();
        assert_eq!(listen_unix(&path).await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        assert!(path.exists());
        listen_unix(&path).await.unwrap();
    }
}
