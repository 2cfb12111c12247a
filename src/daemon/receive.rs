//! The far end of a command that reaches a peer: standard input and output, joined to the host that runs here.
//!
//! ```text
//!   ssh b xl-colo receive             stdin ──▶ the peer port of the host here ──▶ stdout
//!   xl-colo receive --blackhole       a secondary that keeps nothing ([`blackhole`])
//! ```
//!
//! Two threads copy, because the library lets the kernel move the bytes between a pipe and a socket. Whichever direction
//! ends, the process ends: the links of a pair never half-close.

pub mod blackhole;

use super::address::Address;
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

/// Joins standard input and output to an address, until one of them ends.
pub fn join(to: &Address) -> io::Result<()> {
    match to {
        Address::Tcp(host_port) => {
            let socket = TcpStream::connect(host_port)?;
            socket.set_nodelay(true)?;
            copy_both(socket.try_clone()?, socket)
        }
        Address::Unix(path) => {
            let socket = UnixStream::connect(path)?;
            copy_both(socket.try_clone()?, socket)
        }
        Address::Exec(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "no host listens on a command")),
    }
}

/// Joins standard input and output to [`blackhole::answer`], until one of them ends. To be called within a runtime.
pub async fn join_blackhole() -> io::Result<()> {
    let (near, far) = UnixStream::pair()?;
    far.set_nonblocking(true)?;
    let answering = blackhole::answer(Box::new(tokio::net::UnixStream::from_std(far)?));
    let copying = tokio::task::spawn_blocking(move || copy_both(near.try_clone()?, near));
    tokio::select! {
        answered = answering => answered,
        copied = copying => copied.map_err(io::Error::other)?,
    }
}

fn copy_both<S: io::Read + io::Write + Send + 'static>(mut read: S, mut write: S) -> io::Result<()> {
    let (ended, end) = std::sync::mpsc::channel();
    let upwards = ended.clone();
    std::thread::spawn(move || {
        let _ = upwards.send(io::copy(&mut io::stdin().lock(), &mut write));
    });
    std::thread::spawn(move || {
        let mut stdout = io::stdout().lock();
        let _ = ended.send(pass_on(&mut read, &mut stdout));
    });
    end.recv().map_err(io::Error::other)?.map(drop)
}

/// Standard output is buffered by lines, and a message has none.
fn pass_on(from: &mut impl io::Read, to: &mut impl Write) -> io::Result<u64> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let bytes = from.read(&mut buffer)?;
        if bytes == 0 {
            return Ok(total);
        }
        to.write_all(&buffer[..bytes])?;
        to.flush()?;
        total += bytes as u64;
    }
}
