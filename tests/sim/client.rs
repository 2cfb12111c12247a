//! A client: HTTP over somebody else's TCP (smoltcp), one request at a time.
//!
//! ```text
//! connect ─▶ think ─▶ PUT own key │ GET any key ─▶ answer checked ─▶ think ... ─▶ GET each own key ─▶ done
//! ```
//!
//! A connection that ends although nobody asked for it is a violation, whatever happens to the hosts: the survivor
//! has it, and where nobody survives nobody speaks.

use super::dice::Dice;
use super::history::History;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};
use std::collections::VecDeque;

/// Where the guest is.
pub(super) const GUEST_IP: [u8; 4] = [10, 0, 0, 1];
/// Keys each client writes.
const KEYS: u64 = 2;
/// Values are written until the guest's disk is this full.
const DISK_FULL_BYTES: u64 = 700 << 10;

/// Longest pause of a lazy client.
const LAZY_US: u64 = 200_000;

/// The two ends of a cable.
#[derive(Default)]
struct Cable {
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Cable {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;
    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        self.rx.pop_front().map(|frame| (Received(frame), Sending(&mut self.tx)))
    }
    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.tx))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

enum Doing {
    Connecting,
    Thinking { until_us: u64 },
    Putting { name: String },
    Getting { name: String, promised: usize },
    Closing,
    Done,
}

/// A client.
pub(super) struct Client {
    id: u64,
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    dice: Dice,
    doing: Doing,
    unsent: Vec<u8>,
    received: Vec<u8>,
    /// The request under way ends its connection.
    close: bool,
    port: u16,
    think_us: u64,
    value_max: u64,
    everybody: u64,
    audited: u64,
    /// It has seen enough for now, and only stays to see the end.
    pub(super) lazy: bool,
    /// Requests answered.
    pub(super) answered: u64,
}

fn at(now_us: u64) -> Instant {
    Instant::from_micros(now_us as i64)
}

impl Client {
    /// Client number `id` of `everybody`.
    pub(super) fn new(id: usize, everybody: usize, think_us: u64, value_max: u64, mut dice: Dice) -> Self {
        let mut cable = Cable::default();
        let mut config = Config::new(EthernetAddress([2, 0, 0, 0, 1, id as u8]).into());
        config.random_seed = dice.next();
        let mut interface = Interface::new(config, &mut cable, at(0));
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new(Ipv4Address::new(10, 0, 0, 100 + id as u8).into(), 24));
        });
        let buffer = || tcp::SocketBuffer::new(vec![0; 8192]);
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(tcp::Socket::new(buffer(), buffer()));
        let mut client = Self {
            id: id as u64,
            cable,
            interface,
            sockets,
            handle,
            dice,
            doing: Doing::Connecting,
            unsent: Vec::new(),
            received: Vec::new(),
            close: false,
            port: 40_000,
            think_us,
            value_max,
            everybody: everybody as u64,
            audited: 0,
            lazy: false,
            answered: 0,
        };
        client.connect();
        client
    }

    /// Whether it asked all it wanted, and was answered.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.doing, Doing::Done)
    }

    /// A frame arrived.
    pub(super) fn receive(&mut self, frame: &[u8]) {
        self.cable.rx.push_back(frame.to_vec());
    }

    /// The next frame it sends.
    pub(super) fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        self.cable.tx.pop_front()
    }

    /// Does what is due; `wind_down` lets it come to an end. Returns when it wants to be called again.
    pub(super) fn step(&mut self, now_us: u64, wind_down: bool, history: &mut History) -> Result<Option<u64>, String> {
        self.interface.poll(at(now_us), &mut self.cable, &mut self.sockets);
        self.talk(now_us, wind_down, history)?;
        self.interface.poll(at(now_us), &mut self.cable, &mut self.sockets);
        let tcp =
            self.interface.poll_at(at(now_us), &self.sockets).map(|at| (at.total_micros() as u64).max(now_us + 1));
        let thought = match self.doing {
            Doing::Thinking { until_us } => Some(until_us.max(now_us + 1)),
            _ => None,
        };
        Ok(tcp.into_iter().chain(thought).min())
    }

    fn talk(&mut self, now_us: u64, wind_down: bool, history: &mut History) -> Result<(), String> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if socket.can_recv() {
            let received = &mut self.received;
            let _ = socket.recv(|bytes| (bytes.len(), received.extend_from_slice(bytes)));
        }
        if !self.unsent.is_empty() && socket.can_send() {
            let sent = socket.send_slice(&self.unsent).unwrap_or(0);
            self.unsent.drain(..sent);
        }
        let (closed, open) = (socket.state() == tcp::State::Closed, socket.may_send());
        let ended = !socket.may_recv() && socket.state() == tcp::State::CloseWait;
        match &self.doing {
            Doing::Closing if ended => socket.close(),
            Doing::Closing if closed => self.connect(),
            Doing::Closing | Doing::Done => {}
            _ if closed => return Err(format!("client {}: its connection was reset", self.id)),
            _ if ended && !self.close => return Err(format!("client {}: its connection was closed", self.id)),
            Doing::Connecting => {
                if open {
                    self.doing = Doing::Thinking { until_us: now_us };
                }
            }
            Doing::Thinking { until_us } => {
                if !self.received.is_empty() {
                    return Err(format!("client {}: bytes that answer nothing", self.id));
                }
                if *until_us <= now_us {
                    self.ask(wind_down, history);
                    return self.talk(now_us, wind_down, history);
                }
            }
            Doing::Putting { .. } | Doing::Getting { .. } => {
                if let Some((status, body)) = self.response()? {
                    self.answer(now_us, status, &body, history)?;
                }
            }
        }
        Ok(())
    }

    fn connect(&mut self) {
        self.port += 1;
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        let [a, b, c, d] = GUEST_IP;
        socket
            .connect(self.interface.context(), (Ipv4Address::new(a, b, c, d), 80), self.port)
            .expect("a closed socket connects");
        self.doing = Doing::Connecting;
    }

    fn ask(&mut self, wind_down: bool, history: &mut History) {
        if wind_down && self.audited == KEYS {
            self.doing = Doing::Done;
            return;
        }
        self.close = !wind_down && self.dice.percent(4);
        let close = if self.close { "Connection: close\r\n" } else { "" };
        if !wind_down && self.dice.percent(55) && history.sent_bytes < DISK_FULL_BYTES {
            let name = format!("c{}.{}", self.id, self.dice.below(KEYS));
            let len = self.dice.range(20, self.value_max) as usize;
            let mut value = format!("{name} {:016x} ", self.dice.next()).into_bytes();
            value.resize(len.max(value.len()), b'a' + (self.answered % 26) as u8);
            self.unsent = format!("PUT /k/{name} HTTP/1.1\r\n{close}Content-Length: {}\r\n\r\n", value.len()).into();
            self.unsent.extend_from_slice(&value);
            history.write_sent(&name, value);
            self.doing = Doing::Putting { name };
        } else {
            let (whose, which) = match wind_down {
                true => (self.id, self.audited),
                false => (self.dice.below(self.everybody), self.dice.below(KEYS)),
            };
            self.audited += u64::from(wind_down);
            let name = format!("c{whose}.{which}");
            self.unsent = format!("GET /k/{name} HTTP/1.1\r\n{close}\r\n").into();
            let promised = history.promised(&name);
            self.doing = Doing::Getting { name, promised };
        }
    }

    /// The whole response, once it is here.
    fn response(&mut self) -> Result<Option<(u16, Vec<u8>)>, String> {
        let Some(end) = self.received.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
        let bad = || format!("client {}: not a response", self.id);
        let head = std::str::from_utf8(&self.received[..end]).map_err(|_| bad())?;
        let status =
            head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|digits| digits.parse().ok());
        let length = head.split("\r\n").find_map(|line| line.strip_prefix("Content-Length: "));
        let (Some(status), Some(Ok(length))) = (status, length.map(str::parse::<usize>)) else { return Err(bad()) };
        if self.received.len() < end + 4 + length {
            return Ok(None);
        }
        let body = self.received[end + 4..end + 4 + length].to_vec();
        self.received.drain(..end + 4 + length);
        Ok(Some((status, body)))
    }

    fn answer(&mut self, now_us: u64, status: u16, body: &[u8], history: &mut History) -> Result<(), String> {
        let checked = match (&self.doing, status) {
            (Doing::Putting { name }, 200 | 201) => {
                history.write_acknowledged(name);
                Ok(())
            }
            (Doing::Getting { name, promised }, 200) => history.read(name, *promised, Some(body)),
            (Doing::Getting { name, promised }, 404) => history.read(name, *promised, None),
            (Doing::Putting { name }, _) => Err(format!("PUT {name} was answered {status}")),
            (Doing::Getting { name, .. }, _) => Err(format!("GET {name} was answered {status}")),
            _ => Err("an answer to no question".into()),
        };
        checked.map_err(|why| format!("client {}: {why}", self.id))?;
        self.answered += 1;
        let until_us = now_us + self.dice.below(if self.lazy { LAZY_US } else { self.think_us });
        self.doing = if self.close { Doing::Closing } else { Doing::Thinking { until_us } };
        Ok(())
    }
}
