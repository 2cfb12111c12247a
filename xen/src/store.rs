//! xenstore: the directory in which domains and toolstack tell each other what they are and want.
//!
//! Reading and writing is the crate `xenstore-rs` over xenstored's socket. The one message it cannot send is XS_RESUME,
//! which goes over a connection of its own here ([`Store::resume_domain`]).
//!
//! Traps: it has no transactions, so several nodes become visible one by one; [`Store::write_all`] writes the one that
//! readers wait for last. A NUL in a path or value would end it in the middle of the message, so it is refused. A value
//! is 4096 bytes at most, path included.

use crate::{DomId, Error};
use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use xenstore_rs::Xs;
use xenstore_rs::unix::XsUnix;

const SOCKET: &str = "/run/xenstored/socket";
const DEVICE: &str = "/dev/xen/xenbus";
/// xenstored answers in microseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of a message, without its header (xen/io/xs_wire.h).
const PAYLOAD_MAX: usize = 4096;
const XS_ERROR: u32 = 16;
const XS_RESUME: u32 = 18;

/// A connection to xenstore.
pub struct Store(XsUnix);

impl Store {
    /// Connects to xenstored.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn open() -> Result<Self, Error> {
        XsUnix::new().map(Self).map_err(|error| failed("connect to", SOCKET, error))
    }

    /// A node's value, if there is the node.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn read(&self, path: &str) -> Result<Option<String>, Error> {
        plain("read", path, path)?;
        match self.0.read(path) {
            Ok(value) => Ok(Some(value.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", path, error)),
        }
    }

    /// Writes a node, and makes it and those above it if they are not there.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn write(&self, path: &str, value: &str) -> Result<(), Error> {
        plain("write", path, path)?;
        plain("write", path, value)?;
        self.0.write(path, value).map_err(|error| failed("write", path, error))
    }

    /// Removes a node and what is under it. One that is not there is no error.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn remove(&self, path: &str) -> Result<(), Error> {
        plain("remove", path, path)?;
        match self.0.rm(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, error)),
            _ => Ok(()),
        }
    }

    /// Names of the nodes under one; none if it is not there.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn list(&self, path: &str) -> Result<Vec<String>, Error> {
        plain("list", path, path)?;
        match self.0.directory(path) {
            Ok(names) => Ok(names.into_iter().map(String::from).filter(|name| !name.is_empty()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(failed("list", path, error)),
        }
    }

    /// Where a domain's own nodes are.
    pub fn domain_path(&self, d: DomId) -> String {
        domain_path(d)
    }

    /// Writes several nodes: `commit_key`, which has to be among them, last. Whoever waits for that one finds the
    /// others there.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Invalid`] without the key.
    pub fn write_all(&self, nodes: &[(&str, &str)], commit_key: &str) -> Result<(), Error> {
        for (path, value) in in_order(nodes, commit_key)? {
            self.write(path, value)?;
        }
        Ok(())
    }

    /// Asks a guest to suspend itself. It takes the request by emptying the node.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn request_suspend(&self, d: DomId) -> Result<(), Error> {
        self.write(&shutdown_path(d), "suspend")
    }

    /// Takes a request to suspend back. True if the guest had not taken it as far as can be seen: it may take it
    /// between our look and our write, so what the domain does is still to be watched.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn clear_suspend(&self, d: DomId) -> Result<bool, Error> {
        let path = shutdown_path(d);
        if self.read(&path)?.as_deref() != Some("suspend") {
            return Ok(false);
        }
        self.write(&path, "")?;
        Ok(true)
    }

    /// Tells xenstored that a domain it saw shut down goes on, so that it tells of the next time too.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn resume_domain(&self, d: DomId) -> Result<(), Error> {
        let told = send(XS_RESUME, &format!("{d}\0"));
        told.map_err(|error| failed("resume", &domain_path(d), error))
    }

    /// The domain of that name, if there is one.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn by_name(&self, name: &str) -> Result<Option<DomId>, Error> {
        for number in self.list("/local/domain")? {
            let Ok(number) = number.parse() else { continue };
            let d = DomId(number);
            if self.read(&format!("{}/name", domain_path(d)))?.as_deref() == Some(name) {
                return Ok(Some(d));
            }
        }
        Ok(None)
    }
}

fn domain_path(d: DomId) -> String {
    format!("/local/domain/{d}")
}

fn shutdown_path(d: DomId) -> String {
    format!("/local/domain/{d}/control/shutdown")
}

fn failed(operation: &'static str, path: &str, error: io::Error) -> Error {
    Error::Store { operation, path: path.into(), error }
}

fn plain(operation: &'static str, path: &str, text: &str) -> Result<(), Error> {
    if text.contains('\0') {
        return Err(failed(operation, path, io::Error::new(io::ErrorKind::InvalidInput, "there is a NUL in it")));
    }
    Ok(())
}

fn in_order<'a>(nodes: &[(&'a str, &'a str)], commit_key: &str) -> Result<Vec<(&'a str, &'a str)>, Error> {
    let (last, mut ordered): (Vec<_>, Vec<_>) = nodes.iter().partition(|(path, _)| *path == commit_key);
    if last.len() != 1 {
        return Err(Error::invalid("write to xenstore", format!("{commit_key} is {} of the nodes", last.len())));
    }
    ordered.extend(last);
    Ok(ordered)
}

/// One request over a connection of its own.
fn send(kind: u32, payload: &str) -> io::Result<()> {
    let path = env::var("XENSTORED_PATH").unwrap_or_else(|_| SOCKET.into());
    match UnixStream::connect(path) {
        Ok(mut socket) => {
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.set_write_timeout(Some(PATIENCE))?;
            exchange(&mut socket, kind, payload)
        }
        // xenstored in a domain of its own.
        Err(_) => exchange(&mut File::options().read(true).write(true).open(DEVICE)?, kind, payload),
    }
}

/// Header: type, request id, transaction, length; in the machine's own byte order.
fn exchange(stream: &mut (impl Read + Write), kind: u32, payload: &str) -> io::Result<()> {
    let mut message = Vec::with_capacity(16 + payload.len());
    for word in [kind, 0, 0, payload.len() as u32] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.extend_from_slice(payload.as_bytes());
    stream.write_all(&message)?;
    let mut header = [0; 16];
    stream.read_exact(&mut header)?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (answer, length) = (word(0), word(12) as usize);
    if length > PAYLOAD_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("an answer of {length} bytes")));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    match answer {
        _ if answer == kind => Ok(()),
        XS_ERROR => Err(io::Error::other(String::from_utf8_lossy(&body).trim_end_matches('\0').to_owned())),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("an answer of type {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes back is set beforehand; what was sent is kept.
    struct Fake {
        answer: io::Cursor<Vec<u8>>,
        sent: Vec<u8>,
    }

    impl Read for Fake {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.answer.read(into)
        }
    }

    impl Write for Fake {
        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            self.sent.write(from)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn answered(kind: u32, length: u32, body: &[u8]) -> (io::Result<()>, Vec<u8>) {
        let mut answer = Vec::new();
        for word in [kind, 0, 0, length] {
            answer.extend_from_slice(&word.to_ne_bytes());
        }
        answer.extend_from_slice(body);
        let mut fake = Fake { answer: io::Cursor::new(answer), sent: Vec::new() };
        (exchange(&mut fake, XS_RESUME, "7\0"), fake.sent)
    }

    #[test]
    fn a_resume_is_one_message_and_one_answer() {
        let (result, sent) = answered(XS_RESUME, 3, b"OK\0");
        result.expect("fine");
        assert_eq!(sent, [18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, b'7', 0]);
        assert_eq!(answered(XS_ERROR, 7, b"EINVAL\0").0.unwrap_err().to_string(), "EINVAL");
        assert!(answered(2, 0, b"").0.is_err());
        assert!(answered(XS_RESUME, u32::MAX, b"").0.unwrap_err().to_string().contains("4294967295 bytes"));
        assert!(answered(XS_RESUME, 9, b"OK\0").0.is_err(), "cut off");
    }

    #[test]
    fn the_commit_key_goes_last() {
        let nodes = [("/a", "1"), ("/state", "4"), ("/b", "2")];
        assert_eq!(in_order(&nodes, "/state").expect("there"), [("/a", "1"), ("/b", "2"), ("/state", "4")]);
        assert!(in_order(&nodes, "/missing").is_err());
    }

    #[test]
    fn a_nul_is_refused() {
        assert!(plain("write", "/a", "x\0y").is_err());
        assert!(plain("write", "/a", "xy").is_ok());
    }
}
