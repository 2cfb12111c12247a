//! The guest's HTTP/1.1 service: `PUT /k/NAME`, `GET /k/NAME`, `GET /`, over many connections, on one thread.
//!
//! ```text
//! poll ─▶ accept │ bytes in ─▶ whole request? ─▶ store ─▶ answer out, dropped from the input
//! ```
//!
//! It answers as the embedded guest of `xl-colo demo` does, and the same request twice gives the same bytes: no date,
//! no counter, no address. Two copies of this guest that run in lock-step must agree on every packet; `diverge` makes
//! some answers differ on purpose, in bytes and never in length.
//!
//! Every bound is per connection: a head, a body, one answer; a client that does not read its answer is not read from.
//!
//! Source: RFC 9112 (messages), poll(2).

use crate::kv::{KvError, Store, VALUE_MAX_BYTES, is_name};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

const CONNECTIONS_MAX: usize = 200;
const HEAD_MAX_BYTES: usize = 8192;
const READ_BYTES: usize = 16 * 1024;

const POLLIN: i16 = 1;
const POLLOUT: i16 = 4;

/// `struct pollfd` of poll(2).
#[repr(C)]
struct PollFd {
    fd: i32,
    events: i16,
    revents: i16,
}

unsafe extern "C" {
    fn poll(fds: *mut PollFd, count: u64, timeout_ms: i32) -> i32;
}

/// Waits until something can be read or written as asked.
fn wait(fds: &mut [PollFd]) -> io::Result<()> {
    loop {
        // SAFETY: `fds` is a live slice of poll(2)'s own layout, and its length goes with it.
        if unsafe { poll(fds.as_mut_ptr(), fds.len() as u64, -1) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// No more requests are read; the connection ends when the output is out.
    closing: bool,
}

struct Request {
    method: String,
    target: String,
    length: Option<u64>,
    chunked: bool,
    close: bool,
    expects_continue: bool,
    head_bytes: usize,
}

struct Service {
    store: Store,
    diverge_percent: u8,
    random: File,
}

/// Serves `disk` on `port` for ever.
pub fn run(disk: &str, port: u16, diverge_percent: u8) -> Result<(), String> {
    let store = Store::open(disk).map_err(|error| format!("{disk}: {error}"))?;
    let random = File::open("/dev/urandom").map_err(|error| format!("/dev/urandom: {error}"))?;
    let listener = TcpListener::bind(("0.0.0.0", port)).map_err(|error| format!("port {port}: {error}"))?;
    listener.set_nonblocking(true).map_err(|error| error.to_string())?;
    println!("GUEST-READY port={port} names={}", store.names());
    let mut service = Service { store, diverge_percent, random };
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let room = connections.len() < CONNECTIONS_MAX;
        let mut fds = vec![PollFd { fd: listener.as_raw_fd(), events: if room { POLLIN } else { 0 }, revents: 0 }];
        fds.extend(connections.iter().map(|connection| PollFd {
            fd: connection.stream.as_raw_fd(),
            events: if connection.output.is_empty() { POLLIN } else { POLLOUT },
            revents: 0,
        }));
        wait(&mut fds).map_err(|error| format!("poll: {error}"))?;
        let mut ready = fds[1..].iter().map(|fd| fd.revents != 0);
        connections.retain_mut(|connection| !ready.next().unwrap_or(false) || service.go_on(connection));
        if fds[0].revents != 0
            && let Ok((stream, _)) = listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            // A value leaves when it is written: nothing depends on a timer.
            _ = stream.set_nodelay(true);
            connections.push(Connection { stream, input: Vec::new(), output: Vec::new(), closing: false });
        }
    }
}

impl Service {
    /// Does what can be done now; `false` ends the connection.
    fn go_on(&mut self, connection: &mut Connection) -> bool {
        if connection.output.is_empty() && !connection.closing {
            let mut bytes = [0; READ_BYTES];
            match connection.stream.read(&mut bytes) {
                Ok(0) => connection.closing = true,
                Ok(count) => connection.input.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return false,
            }
        }
        loop {
            while !connection.output.is_empty() {
                match connection.stream.write(&connection.output) {
                    Ok(count) => drop(connection.output.drain(..count)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                    Err(_) => return false,
                }
            }
            // A client that half-closed is still owed what it asked before.
            if !self.answer_next(connection) {
                return !connection.closing;
            }
        }
    }

    /// Answers the first request of the input, if it is whole.
    fn answer_next(&mut self, connection: &mut Connection) -> bool {
        if connection.input.is_empty() {
            return false;
        }
        let request = match parse(&connection.input) {
            Ok(Some(request)) => request,
            Ok(None) => return false,
            Err(status) => return self.refuse(connection, status),
        };
        let refused = match request.length {
            _ if request.chunked => Some(501),
            None if request.method == "PUT" => Some(411),
            Some(length) if length > VALUE_MAX_BYTES as u64 => Some(413),
            _ => None,
        };
        if let Some(status) = refused {
            return self.refuse(connection, status);
        }
        let body_bytes = request.length.unwrap_or(0) as usize;
        let whole = request.head_bytes + body_bytes;
        if connection.input.len() < whole {
            if request.expects_continue && connection.input.len() == request.head_bytes {
                // curl waits for this before it sends a body; one write of 25 bytes fits an empty socket.
                connection.closing |= connection.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").is_err();
            }
            return false;
        }
        let body: Vec<u8> = connection.input.drain(..whole).skip(request.head_bytes).collect();
        let (status, answer) = self.route(&request.method, &request.target, &body);
        let close = request.close || status == 400;
        connection.output = self.response(status, &answer, close, request.method == "HEAD");
        if close {
            connection.closing = true;
            connection.input.clear();
        }
        true
    }

    fn refuse(&mut self, connection: &mut Connection, status: u16) -> bool {
        connection.input.clear();
        connection.closing = true;
        connection.output = self.response(status, format!("{status}\n").as_bytes(), true, false);
        true
    }

    fn route(&mut self, method: &str, target: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let error = |status: u16| (status, format!("{status}\n").into_bytes());
        let name = target.strip_prefix("/k/");
        match (method, name) {
            ("GET" | "HEAD", None) if target == "/" => (200, b"{\"service\":\"xen-colo guest\"}\n".to_vec()),
            ("GET" | "HEAD" | "PUT", Some(name)) if !is_name(name) => error(400),
            ("GET" | "HEAD", Some(name)) => match self.store.get(name) {
                Ok(Some(value)) => (200, value),
                Ok(None) => error(404),
                Err(why) => {
                    println!("GUEST-ERROR GET {name}: {why}");
                    error(500)
                }
            },
            ("PUT", Some(name)) => match self.store.put(name, body) {
                Ok(created) => (if created { 201 } else { 200 }, Vec::new()),
                Err(KvError::Full) => error(507),
                Err(why) => {
                    println!("GUEST-ERROR PUT {name}: {why}");
                    error(500)
                }
            },
            (_, Some(_)) => error(405),
            _ if target == "/" => error(405),
            _ => error(404),
        }
    }

    fn response(&mut self, status: u16, body: &[u8], close: bool, head_only: bool) -> Vec<u8> {
        let reason = match status {
            200 => "OK",
            201 => "Created",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            411 => "Length Required",
            413 => "Content Too Large",
            431 => "Request Header Fields Too Large",
            501 => "Not Implemented",
            507 => "Insufficient Storage",
            _ => "Internal Server Error",
        };
        let seed = self.hash_seed();
        let mut out = format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Length: {}\r\nX-Hash-Seed: {seed:016x}\r\n{}{}\r\n",
            body.len(),
            if status == 405 { "Allow: GET, HEAD, PUT\r\n" } else { "" },
            if close { "Connection: close\r\n" } else { "" },
        )
        .into_bytes();
        if !head_only {
            out.extend_from_slice(body);
        }
        out
    }

    /// Zero, or for `diverge_percent` of the answers a number no copy of this guest has too.
    fn hash_seed(&mut self) -> u64 {
        let mut noise = [0; 16];
        if self.diverge_percent == 0 || self.random.read_exact(&mut noise).is_err() {
            return 0;
        }
        let (roll, seed) = noise.split_at(8);
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight));
        if number(roll) % 100 < u64::from(self.diverge_percent) { number(seed) } else { 0 }
    }
}

/// The head at the start of `bytes`: `None` when more is needed, a status when it is none.
fn parse(bytes: &[u8]) -> Result<Option<Request>, u16> {
    let window = &bytes[..bytes.len().min(HEAD_MAX_BYTES)];
    let Some(end) = window.windows(4).position(|four| four == b"\r\n\r\n") else {
        return if bytes.len() < HEAD_MAX_BYTES { Ok(None) } else { Err(431) };
    };
    let head = std::str::from_utf8(&window[..end]).map_err(|_| 400_u16)?;
    let mut lines = head.split("\r\n");
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else { return Err(400) };
    let old = version == "HTTP/1.0";
    if !(old || version == "HTTP/1.1") || !target.starts_with('/') || method.is_empty() {
        return Err(400);
    }
    let mut request = Request {
        method: method.to_owned(),
        target: target.to_owned(),
        length: None,
        chunked: false,
        close: old,
        expects_continue: false,
        head_bytes: end + 4,
    };
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(400_u16)?;
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(400);
        }
        let value = value.trim_matches([' ', '\t']);
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
                let length = if digits { value.parse().unwrap_or(u64::MAX) } else { return Err(400) };
                // A length that can be read in two ways is how requests are smuggled.
                if request.length.replace(length).is_some_and(|earlier| earlier != length) {
                    return Err(400);
                }
            }
            "transfer-encoding" => request.chunked = true,
            "expect" => request.expects_continue = value.eq_ignore_ascii_case("100-continue"),
            "connection" if value.eq_ignore_ascii_case("close") => request.close = true,
            "connection" if old && value.eq_ignore_ascii_case("keep-alive") => request.close = false,
            _ => {}
        }
    }
    Ok(Some(request))
}
