//! The edge: real TCP clients on one side, the guest's Ethernet on the other, a userspace TCP/IP stack between.
//!
//! ```text
//! curl ──▶ kernel TCP ──▶ TcpStream ⇄ smoltcp socket ──▶ Ethernet frames ──▶ switch ──▶ guest 10.77.0.2
//!          localhost                  10.77.0.1, 64 KiB each way
//! ```
//!
//! No root, no tap, and yet the guest is spoken to by a TCP that loses, times and retransmits. Bytes, half-closes
//! and resets pass both ways; a side that cannot take more stops the other one.
//!
//! Everything happens in one task, in `Engine::poll`: each thing it may wait for (a frame, room in the switch, a
//! client, the stack's next timer) holds that task's waker, so nothing is polled in vain. The trap is the reverse:
//! moving bytes on one side can make the other side ready *without* a wake-up, so it goes round until a round
//! moves nothing.
//!
//! A takeover, seen from here: the survivor's gratuitous ARP renews the neighbour, and handshakes that got no
//! answer start over at once, from another port, since nothing was exchanged yet; established connections get the
//! survivor's three duplicate ACKs, on which smoltcp retransmits the oldest segment without waiting for its timer.
//! They must leave the window as it was: one that changes it is a window update and does not count. And it is the
//! oldest segment only: smoltcp has no NewReno, so the rest of a longer request waits for the backed-off timer.
//!
//! A client's reset is noticed at the next read or write, so not while the guest accepts no bytes and sends none.
//!
//! Sources: smoltcp `socket/tcp.rs`; RFC 5681 2 (what a duplicate ACK is), 3.2 (fast retransmit), RFC 5227 3
//! (gratuitous ARP), `ip(7)` (port range).

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpAddress,
    IpCidr, Ipv4Address,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};

/// The edge's own address on the guest's network, /24.
pub const EDGE_IP: [u8; 4] = [10, 77, 0, 1];

/// The edge's MAC, locally administered.
pub const EDGE_MAC: [u8; 6] = [0x02, 0x10, 0x77, 0x00, 0x00, 0x01];

/// Connections carried at once; further clients wait in the listener's backlog.
const CONNECTIONS_MAX: usize = 512;

/// Each socket's buffer, each way.
const BUFFER_BYTES: usize = 64 * 1024;

/// Frames taken from the switch before the stack is polled.
const FRAMES_PER_ROUND: usize = 256;

/// Rounds before other tasks get their turn.
const ROUNDS_MAX: usize = 16;

/// The IP MTU is 1500; smoltcp counts the Ethernet header in.
const ETHERNET_MTU_BYTES: usize = 1514;

/// Linux's ephemeral ports.
const PORT_FIRST: u16 = 32_768;
const PORT_LAST: u16 = 60_999;

/// smoltcp's clock runs this much faster than the wall's: its shortest retransmission timeout is a fixed 1 s, that of
/// the client it stands for (Linux) is 200 ms. A blackout must look to the guest as it would with real clients.
const CLOCK_PACE: u32 = 5;

/// The local switch port the edge speaks through: frames into the switch, frames out of it.
pub type SwitchPort = (mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>);

/// Carries TCP connections from a listener to the guest.
#[derive(Debug)]
pub struct Edge;

/// A running edge. Dropping it cuts every connection.
#[derive(Debug)]
pub struct EdgeHandle {
    /// Where clients connect.
    pub local_addr: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Edge {
    /// Starts carrying each connection `listener` accepts to `guest_ip`:`guest_port`, by way of `port`. Ends by itself
    /// when the switch goes away.
    ///
    /// # Errors
    /// When the listener's address cannot be read, or the system gives no random seed.
    pub fn start(
        listener: TcpListener,
        guest_ip: [u8; 4],
        guest_port: u16,
        port: SwitchPort,
    ) -> io::Result<EdgeHandle> {
        let local_addr = listener.local_addr()?;
        let seed = getrandom::u64().map_err(io::Error::other)?;
        let mut engine = Engine::new(listener, Ipv4Address::from(guest_ip), guest_port, port, seed);
        let task = tokio::spawn(async move { poll_fn(|cx| engine.poll(cx)).await });
        Ok(EdgeHandle { local_addr, task })
    }
}

impl EdgeHandle {
    /// Cuts every connection and returns when the edge is gone.
    pub async fn stop(mut self) {
        self.task.abort();
        // The only error is the cancellation asked for.
        _ = (&mut self.task).await;
    }
}

impl Drop for EdgeHandle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A network card whose cable is a pair of bounded channels. While the switch has no room, the card takes nothing
/// from the stack, which then keeps its segments.
struct Nic {
    received: VecDeque<Bytes>,
    into_switch: mpsc::Sender<Bytes>,
}

struct Sending<'a>(mpsc::Permit<'a, Bytes>);
struct Receiving(Bytes);

impl Device for Nic {
    type RxToken<'a> = Receiving;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Receiving, Sending<'_>)> {
        let room = self.into_switch.try_reserve().ok()?;
        Some((Receiving(self.received.pop_front()?), Sending(room)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Sending<'_>> {
        self.into_switch.try_reserve().ok().map(Sending)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_MTU_BYTES;
        capabilities
    }
}

impl phy::RxToken for Receiving {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = BytesMut::zeroed(len);
        let result = fill(&mut frame);
        self.0.send(frame.freeze());
        result
    }
}

/// One client and its socket on the guest's side.
struct Connection {
    /// None once the client is done with; the socket may still have bytes, a FIN or a RST to bring over.
    client: Option<TcpStream>,
    socket: SocketHandle,
    /// The client sent its FIN, and so did we.
    client_finished: bool,
    /// The guest sent its FIN.
    guest_finished: bool,
    /// The guest's FIN was passed on.
    client_told: bool,
}

type RoomInSwitch = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Engine {
    listener: TcpListener,
    from_switch: mpsc::Receiver<Bytes>,
    nic: Nic,
    stack: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    guest: (Ipv4Address, u16),
    port_next: u16,
    started: Instant,
    timer: Pin<Box<Sleep>>,
    room_in_switch: Option<RoomInSwitch>,
}

impl Engine {
    fn new(listener: TcpListener, guest_ip: Ipv4Address, guest_port: u16, port: SwitchPort, seed: u64) -> Self {
        let (into_switch, from_switch) = port;
        let mut nic = Nic { received: VecDeque::new(), into_switch };
        let stack = new_stack(&mut nic, EDGE_MAC, EDGE_IP, seed);
        Self {
            listener,
            from_switch,
            nic,
            stack,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            guest: (guest_ip, guest_port),
            port_next: PORT_FIRST + (seed % u64::from(PORT_LAST - PORT_FIRST)) as u16,
            started: Instant::now(),
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            room_in_switch: None,
        }
    }

    /// Does all there is to do and leaves the waker with everything that can bring more. Ready when the switch is gone.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..ROUNDS_MAX {
            let mut moved = match self.take_frames(cx) {
                Poll::Ready(()) => return Poll::Ready(()),
                Poll::Pending => !self.nic.received.is_empty(),
            };
            moved |= self.accept(cx);
            let now = self.now();
            self.stack.poll(now, &mut self.nic, &mut self.sockets);
            for connection in &mut self.connections {
                moved |= connection.pump(self.sockets.get_mut(connection.socket), cx);
            }
            self.reap();
            moved |= self.poll_room(cx);
            if !moved && self.poll_timer(cx).is_pending() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn now(&self) -> StackInstant {
        StackInstant::from_micros_const(
            i64::try_from((self.started.elapsed() * CLOCK_PACE).as_micros()).unwrap_or(i64::MAX),
        )
    }

    /// Moves frames from the switch to the card. Ready when the switch is gone.
    fn take_frames(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.nic.received.len() < FRAMES_PER_ROUND {
            let Some(frame) = ready!(self.from_switch.poll_recv(cx)) else { return Poll::Ready(()) };
            match self.announced(&frame) {
                Some(mac) => self.guest_announced(mac),
                None => self.nic.received.push_back(frame),
            }
        }
        Poll::Pending
    }

    /// The MAC of a gratuitous ARP for the guest's address, if `frame` is one.
    fn announced(&self, frame: &[u8]) -> Option<EthernetAddress> {
        let frame =
            EthernetFrame::new_checked(frame).ok().filter(|frame| frame.ethertype() == EthernetProtocol::Arp)?;
        match ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).ok()?).ok()? {
            ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, target_protocol_addr, .. } => {
                let gratuitous = source_protocol_addr == self.guest.0 && target_protocol_addr == self.guest.0;
                gratuitous.then_some(source_hardware_addr)
            }
            _ => None,
        }
    }

    /// smoltcp ignores ARP that is not addressed to it, so the announcement is handed to it as an answer. And
    /// handshakes that were sent to a host now dead start over.
    fn guest_announced(&mut self, mac: EthernetAddress) {
        self.nic.received.push_back(arp_reply(mac, self.guest.0));
        let waiting: Vec<usize> = (0..self.connections.len())
            .filter(|&at| self.sockets.get::<Socket>(self.connections[at].socket).state() == State::SynSent)
            .collect();
        tracing::debug!(%mac, handshakes = waiting.len(), "the guest announced itself");
        for at in waiting {
            let socket = self.connect();
            let old = std::mem::replace(&mut self.connections[at].socket, socket);
            self.sockets.remove(old);
        }
    }

    fn accept(&mut self, cx: &mut Context<'_>) -> bool {
        let mut accepted = false;
        while self.connections.len() < CONNECTIONS_MAX
            && let Poll::Ready(result) = self.listener.poll_accept(cx)
        {
            match result {
                Ok((client, _)) => {
                    // Without it the client's kernel would hold small replies back; a failure costs only time.
                    _ = client.set_nodelay(true);
                    let socket = self.connect();
                    self.connections.push(Connection::new(client, socket));
                    accepted = true;
                }
                // Out of descriptors: the listener stays ready, so it is asked again when something else happens.
                Err(error) => {
                    tracing::warn!(%error, "the edge cannot accept");
                    break;
                }
            }
        }
        accepted
    }

    /// A new socket that calls the guest from a port no other connection has.
    fn connect(&mut self) -> SocketHandle {
        let port = self.take_port();
        let mut socket = new_socket();
        let connected = socket.connect(self.stack.context(), (IpAddress::Ipv4(self.guest.0), self.guest.1), port);
        if let Err(error) = connected {
            // Only a guest address of 0.0.0.0 or port 0 does this; the closed socket then resets the client.
            tracing::error!(%error, "the edge cannot call the guest");
        }
        self.sockets.add(socket)
    }

    /// Goes through the whole range before it comes back to a port. There are far more ports than connections.
    fn take_port(&mut self) -> u16 {
        loop {
            let port = self.port_next;
            self.port_next = if port >= PORT_LAST { PORT_FIRST } else { port + 1 };
            let taken = self.sockets.iter().any(|(_, socket)| match socket {
                smoltcp::socket::Socket::Tcp(socket) => socket.local_endpoint().is_some_and(|local| local.port == port),
            });
            if !taken {
                return port;
            }
        }
    }

    /// Removes the connections that have nothing more to say to either side.
    fn reap(&mut self) {
        let sockets = &mut self.sockets;
        self.connections.retain(|connection| {
            let socket = sockets.get::<Socket>(connection.socket);
            // An aborted socket keeps its endpoint until its RST has left.
            let over = connection.client.is_none() && !socket.is_open() && socket.remote_endpoint().is_none();
            if over {
                sockets.remove(connection.socket);
            }
            !over
        });
    }

    /// True when the switch had no room and has some again.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> bool {
        if self.room_in_switch.is_none() && self.nic.into_switch.capacity() == 0 {
            let into_switch = self.nic.into_switch.clone();
            self.room_in_switch = Some(Box::pin(async move { drop(into_switch.reserve_owned().await) }));
        }
        let room = self.room_in_switch.as_mut().is_some_and(|room| room.as_mut().poll(cx).is_ready());
        if room {
            self.room_in_switch = None;
        }
        room
    }

    /// Ready when the stack has something to do by now.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let now = self.now();
        // Without room in the switch the stack cannot do what is due; the wait for room goes on in its place.
        let delay = self.stack.poll_delay(now, &self.sockets).filter(|_| self.room_in_switch.is_none());
        let Some(delay) = delay else { return Poll::Pending };
        let delay = (Duration::from(delay) / CLOCK_PACE).max(Duration::from_millis(1));
        self.timer.as_mut().reset(Instant::now() + delay);
        self.timer.as_mut().poll(cx)
    }
}

impl Connection {
    fn new(client: TcpStream, socket: SocketHandle) -> Self {
        Self { client: Some(client), socket, client_finished: false, guest_finished: false, client_told: false }
    }

    /// Moves what can be moved between the client and its socket; true when anything changed.
    fn pump(&mut self, socket: &mut Socket<'_>, cx: &mut Context<'_>) -> bool {
        let Some(client) = &mut self.client else {
            // A guest that speaks to a client that is gone is told so, as a kernel would.
            let speaks = socket.can_recv();
            if speaks {
                socket.abort();
            }
            return speaks;
        };
        self.guest_finished |=
            matches!(socket.state(), State::CloseWait | State::Closing | State::LastAck | State::TimeWait);
        if socket.state() == State::Closed && !(self.guest_finished && self.client_finished) {
            // Reset, or refused. With no linger time, dropping the stream tells the client the same.
            _ = client.set_zero_linger();
            self.client = None;
            return true;
        }
        let moved = to_guest(client, socket, &mut self.client_finished, cx)
            .and_then(|moved| Ok(moved | to_client(client, socket, cx)?))
            .and_then(|moved| {
                let end = self.guest_finished && !self.client_told && !socket.can_recv();
                if end && let Poll::Ready(told) = Pin::new(&mut *client).poll_shutdown(cx) {
                    self.client_told = true;
                    told?;
                }
                Ok(moved)
            });
        match moved {
            Ok(moved) if self.client_finished && self.client_told => {
                self.client = None;
                moved
            }
            Ok(moved) => moved,
            Err(error) => {
                tracing::debug!(%error, "a client went away");
                socket.abort();
                self.client = None;
                true
            }
        }
    }
}

/// Reads from the client as far as the socket has room, and passes the client's FIN on.
fn to_guest(
    client: &mut TcpStream,
    socket: &mut Socket<'_>,
    finished: &mut bool,
    cx: &mut Context<'_>,
) -> io::Result<bool> {
    let mut moved = false;
    while !*finished && socket.can_send() {
        let read = socket.send(|room| {
            let mut into = ReadBuf::new(room);
            let read = Pin::new(&mut *client).poll_read(cx, &mut into);
            (into.filled().len(), read.map_ok(|()| into.filled().len()))
        });
        match read.map_err(io::Error::other)? {
            Poll::Pending => break,
            Poll::Ready(Ok(0)) => {
                socket.close();
                *finished = true;
            }
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(error)) => return Err(error),
        }
        moved = true;
    }
    Ok(moved)
}

/// Writes to the client what the socket has, as far as the client takes it.
fn to_client(client: &mut TcpStream, socket: &mut Socket<'_>, cx: &mut Context<'_>) -> io::Result<bool> {
    let mut moved = false;
    while socket.can_recv() {
        let written = socket.recv(|bytes| match Pin::new(&mut *client).poll_write(cx, bytes) {
            Poll::Ready(Ok(written)) => (written, Poll::Ready(Ok(()))),
            Poll::Ready(Err(error)) => (0, Poll::Ready(Err(error))),
            Poll::Pending => (0, Poll::Pending),
        });
        match written.map_err(io::Error::other)? {
            Poll::Pending => break,
            Poll::Ready(written) => written?,
        }
        moved = true;
    }
    Ok(moved)
}

fn new_stack(nic: &mut Nic, mac: [u8; 6], ip: [u8; 4], seed: u64) -> Interface {
    let mut config = Config::new(EthernetAddress(mac).into());
    config.random_seed = seed;
    let mut stack = Interface::new(config, nic, StackInstant::ZERO);
    stack.update_ip_addrs(|addresses| {
        // The list is empty and holds two.
        _ = addresses.push(IpCidr::new(IpAddress::Ipv4(ip.into()), 24));
    });
    stack
}

/// A socket as the demo wants it: every byte and every ACK leaves at once, and no silence kills it, because a
/// takeover is one.
fn new_socket() -> Socket<'static> {
    let buffer = || SocketBuffer::new(vec![0; BUFFER_BYTES]);
    let mut socket = Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket.set_timeout(None);
    socket.set_keep_alive(None);
    socket
}

/// An ARP reply to the edge that says `ip` is at `mac`.
fn arp_reply(mac: EthernetAddress, ip: Ipv4Address) -> Bytes {
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: mac,
        source_protocol_addr: ip,
        target_hardware_addr: EthernetAddress(EDGE_MAC),
        target_protocol_addr: EDGE_IP.into(),
    };
    let ethernet =
        EthernetRepr { src_addr: mac, dst_addr: EthernetAddress(EDGE_MAC), ethertype: EthernetProtocol::Arp };
    let mut bytes = vec![0; ethernet.buffer_len() + arp.buffer_len()];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    ethernet.emit(&mut frame);
    arp.emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
    bytes.into()
}

#[cfg(test)]
mod tests;
