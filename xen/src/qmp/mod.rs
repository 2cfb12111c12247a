//! QMP, QEMU's machine protocol: a blocking client over a unix socket, kept open.
//!
//! ```text
//!  connect ─ greeting ─ qmp_capabilities ─▶ ready ─ execute ─▶ reply with our id        ─▶ ready
//!                                             │                no reply by the deadline ─▶ ready (it is dropped when it comes)
//!                                             └─ end of file, garbage ─▶ broken: every call fails at once
//! ```
//!
//! The trap: a QEMU monitor serves **one client at a time**. A second one connects, because the socket listens, and then
//! waits for a greeting that comes when the first has left. libxl opens `qmp-libxl-DOMID` anew for each command and
//! gives up after 5 s, so whoever keeps that socket starves `xl`. But libxl starts every device model with a second
//! monitor, `qmp-libxenstat-DOMID` (`tools/libs/light/libxl_dm.c`, `libxl__build_device_model_args_new`), which only
//! `xentop` uses, for the statistics of qdisks: [`monitor_path`] is that one. While we hold it `xentop` shows no such
//! statistics of this guest; all else, `xl` too, goes on. Monitors cannot be added to a running QEMU.
//!
//! The peer is a device model, which a guest may have taken over: what is kept of its words is bounded.
//! Protocol: QEMU's `docs/interop/qmp-spec.txt`.

mod device_model;
mod disks;
#[cfg(test)]
mod tests;

pub use device_model::{DeviceModel, Image, STATE_BYTES_MAX};
pub use disks::Backing;

use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long connecting and a command may take, unless told otherwise. libxl waits 10 s.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Longest line taken from QEMU. The longest useful one, `query-qmp-schema`, has 200 KiB.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Events kept for [`Client::next_event`]; the oldest give way.
const EVENTS_MAX: usize = 1024;
/// Bytes asked of the socket at once.
const READ_BYTES: usize = 16 << 10;
/// Shortest time limit that a socket takes for one.
const TICK: Duration = Duration::from_millis(1);

/// Why QEMU did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens there, or too many wait there already.
    #[error("cannot connect to the monitor {}: {source}; is the device model running?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The socket listens, but the monitor is busy with somebody else.
    #[error("no greeting from the monitor {} within {waited:?}; does another client hold it?", path.display())]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// The time that passed.
        waited: Duration,
    },
    /// No answer in time. QEMU may still carry the command out.
    #[error("{command}: no answer within {waited:?}")]
    Deadline {
        /// The command.
        command: String,
        /// The time that passed.
        waited: Duration,
    },
    /// QEMU refused the command.
    #[error("{command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error, nearly always `GenericError`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// QEMU took the command, and the job that it started failed.
    #[error("{command}: the job failed: {desc}")]
    Job {
        /// The command.
        command: String,
        /// QEMU's words.
        desc: String,
    },
    /// QEMU hung up: it has died, or its monitor has been closed.
    #[error("{command}: the device model is gone ({why})")]
    Gone {
        /// The command.
        command: String,
        /// How that was seen.
        why: String,
    },
    /// QEMU said what is no QMP. The connection is of no further use.
    #[error("{command}: not QMP: {what}")]
    Protocol {
        /// The command.
        command: String,
        /// What was wrong.
        what: String,
    },
    /// The memory through which states pass could not be used.
    #[error("{what}: {source}")]
    Memory {
        /// What was being done.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A device-model state of an impossible size.
    #[error("a device-model state of {len_bytes} bytes; 1 to {STATE_BYTES_MAX} are possible")]
    StateSize {
        /// Its size.
        len_bytes: u64,
    },
}

/// Something that QEMU reported unasked.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// `STOP`, `RESUME`, `JOB_STATUS_CHANGE` …
    pub name: String,
    /// What the event carries; null when nothing.
    pub data: Value,
}

/// What keeps a line from being read.
enum Trouble {
    Deadline,
    Gone(String),
    Protocol(String),
}

impl Trouble {
    fn of(self, command: &str, waited: Duration) -> QmpError {
        let command = command.to_owned();
        match self {
            Self::Deadline => QmpError::Deadline { command, waited },
            Self::Gone(why) => QmpError::Gone { command, why },
            Self::Protocol(what) => QmpError::Protocol { command, what },
        }
    }

    /// An error of the socket. A socket with a time limit says `WouldBlock` when it has passed.
    fn io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Deadline,
            _ => Self::Gone(error.to_string()),
        }
    }
}

/// The monitor of domain `domid`'s device model that may be held for long: see the module's documentation.
#[must_use]
pub fn monitor_path(domid: u16) -> PathBuf {
    PathBuf::from(format!("/var/run/xen/qmp-libxenstat-{domid}"))
}

/// A connection to a monitor.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    deadline: Duration,
    /// What has been read beyond the last whole line.
    input: Vec<u8>,
    /// How much of `input` is known to hold no line end.
    searched: usize,
    last_id: u64,
    events: VecDeque<Event>,
    /// Why the connection cannot be used any more.
    broken: Option<String>,
}

impl Client {
    /// Connects and negotiates. `deadline` is for this and for every command.
    pub fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let begun = Instant::now();
        let socket = open_socket(path, deadline)
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source: source.into() })?;
        let mut client = Self {
            socket: UnixStream::from(socket),
            deadline,
            input: Vec::new(),
            searched: 0,
            last_id: 0,
            events: VecDeque::new(),
            broken: None,
        };
        let greeting = match client.line(begun + deadline) {
            Ok(greeting) => greeting,
            Err(Trouble::Deadline) => {
                return Err(QmpError::NoGreeting { path: path.to_owned(), waited: begun.elapsed() });
            }
            Err(trouble) => return Err(trouble.of("greeting", begun.elapsed())),
        };
        if greeting.get("QMP").is_none() {
            return Err(Trouble::Protocol(format!("greeted with {}", brief(&greeting))).of("greeting", begun.elapsed()));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Carries out one command and gives what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.call(command, arguments, None)
    }

    /// The same, handing QEMU a file descriptor with the command (`add-fd`, `getfd`).
    pub fn execute_with_fd(&mut self, command: &str, arguments: Value, fd: BorrowedFd) -> Result<Value, QmpError> {
        self.call(command, arguments, Some(fd))
    }

    /// The oldest event not yet seen, waiting for one at most for `timeout`.
    ///
    /// Events are kept while commands are carried out, the last 1024 of them.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, QmpError> {
        let begun = Instant::now();
        while self.events.is_empty() {
            match self.line(begun + timeout) {
                Ok(line) => drop(self.keep_event(line)),
                Err(Trouble::Deadline) => return Ok(None),
                Err(trouble) => return Err(trouble.of("waiting for an event", begun.elapsed())),
            }
        }
        Ok(self.events.pop_front())
    }

    /// Waits at most for `timeout` until an event that `wanted` picks has been kept. It stays there.
    fn await_event(
        &mut self,
        command: &str,
        timeout: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<(), QmpError> {
        let begun = Instant::now();
        while !self.events.iter().any(&wanted) {
            match self.line(begun + timeout) {
                Ok(line) => drop(self.keep_event(line)),
                Err(Trouble::Deadline) => return Ok(()),
                Err(trouble) => return Err(trouble.of(command, begun.elapsed())),
            }
        }
        Ok(())
    }

    /// Forgets the kept events that `unwanted` picks.
    fn forget_events(&mut self, unwanted: impl Fn(&Event) -> bool) {
        self.events.retain(|event| !unwanted(event));
    }

    fn call(&mut self, command: &str, arguments: Value, fd: Option<BorrowedFd>) -> Result<Value, QmpError> {
        let begun = Instant::now();
        self.last_id += 1;
        let id = self.last_id;
        let mut request = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        request.push('\n');
        self.send(request.as_bytes(), fd, begun + self.deadline).map_err(|t| t.of(command, begun.elapsed()))?;
        loop {
            let line = self.line(begun + self.deadline).map_err(|t| t.of(command, begun.elapsed()))?;
            let Some(mut reply) = self.keep_event(line) else { continue };
            match reply.get("id").and_then(Value::as_u64) {
                Some(of) if of == id => {}
                // The late answer to a command that was given up.
                Some(of) if of < id => continue,
                _ => {
                    let what = format!("answered {}", brief(&reply));
                    return Err(self.break_off(Trouble::Protocol(what)).of(command, begun.elapsed()));
                }
            }
            if let Some(returned) = reply.get_mut("return") {
                return Ok(returned.take());
            }
            let said = |key| reply["error"][key].as_str().unwrap_or("no reason given").to_owned();
            return Err(QmpError::Refused { command: command.to_owned(), class: said("class"), desc: said("desc") });
        }
    }

    /// Puts an event away; gives back what is none.
    fn keep_event(&mut self, mut line: Value) -> Option<Value> {
        let Some(name) = line.get("event").and_then(Value::as_str) else { return Some(line) };
        let name = name.to_owned();
        let data = line.get_mut("data").map(Value::take).unwrap_or_default();
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(Event { name, data });
        None
    }

    /// Writes a request; `fd` goes with its first byte.
    fn send(&mut self, request: &[u8], mut fd: Option<BorrowedFd>, until: Instant) -> Result<(), Trouble> {
        self.usable()?;
        let mut rest = request;
        while !rest.is_empty() {
            let sent = remaining(until)
                .and_then(|left| self.socket.set_write_timeout(Some(left)))
                .and_then(|()| write_some(&self.socket, rest, fd));
            match sent {
                Ok(0) => return Err(self.break_off(Trouble::Gone("it reads no more".into()))),
                Ok(n) => (rest, fd) = (&rest[n..], None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // After half a request the next would not be understood.
                Err(error) if rest.len() < request.len() => {
                    let why = format!("it took half a request: {error}");
                    return Err(self.break_off(Trouble::Gone(why)));
                }
                Err(error) => return Err(self.break_off(Trouble::io(&error))),
            }
        }
        Ok(())
    }

    /// The next line, as JSON.
    fn line(&mut self, until: Instant) -> Result<Value, Trouble> {
        self.usable()?;
        loop {
            if let Some(at) = self.input[self.searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.input.split_off(self.searched + at + 1);
                let line = std::mem::replace(&mut self.input, rest);
                self.searched = 0;
                let bad = |error| Trouble::Protocol(format!("{error} in {:?}", brief_bytes(&line)));
                return serde_json::from_slice(&line).map_err(|error| self.break_off(bad(error)));
            }
            self.searched = self.input.len();
            if self.input.len() > LINE_BYTES_MAX {
                return Err(self.break_off(Trouble::Protocol(format!("a line of more than {LINE_BYTES_MAX} bytes"))));
            }
            let mut chunk = [0; READ_BYTES];
            let read = remaining(until)
                .and_then(|left| self.socket.set_read_timeout(Some(left)))
                .and_then(|()| self.socket.read(&mut chunk));
            match read {
                Ok(0) => return Err(self.break_off(Trouble::Gone("end of file".into()))),
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.break_off(Trouble::io(&error))),
            }
        }
    }

    fn usable(&self) -> Result<(), Trouble> {
        match &self.broken {
            Some(why) => Err(Trouble::Gone(format!("since an earlier failure: {why}"))),
            None => Ok(()),
        }
    }

    /// Notes what makes the connection useless; a deadline does not.
    fn break_off(&mut self, trouble: Trouble) -> Trouble {
        if let Trouble::Gone(why) | Trouble::Protocol(why) = &trouble {
            self.broken = Some(why.clone());
        }
        trouble
    }
}

/// A connected socket. A monitor's backlog is one connection: without a time limit, connecting can wait for ever.
fn open_socket(path: &Path, deadline: Duration) -> rustix::io::Result<rustix::fd::OwnedFd> {
    use rustix::net::{SocketFlags, connect, socket_with, sockopt};
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(deadline.max(TICK)))?;
    connect(&socket, &address)?;
    Ok(socket)
}

fn write_some(mut socket: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd>) -> io::Result<usize> {
    let Some(fd) = fd else { return socket.write(bytes) };
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a file descriptor"));
    }
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Time left, or the error of a socket whose time is over.
fn remaining(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left.max(TICK)) }
}

/// Enough of what QEMU said to find it again.
fn brief(said: &Value) -> String {
    brief_bytes(said.to_string().as_bytes())
}

fn brief_bytes(said: &[u8]) -> String {
    String::from_utf8_lossy(&said[..said.len().min(120)]).trim_end().to_owned()
}
