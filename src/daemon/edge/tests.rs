//! The edge against a guest stand-in: smoltcp as a server at the other end of the cable.
//!
//! The stand-in obeys the first byte a connection sends: `c` answers "bye", closes its half at once and counts what
//! still comes; `r` resets; anything else is echoed. [`Guest::set_deaf`] is the blackout: what comes is lost and
//! nothing is said. Waking, it announces itself as a survivor does: gratuitous ARP, three duplicate ACKs a connection.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::super::switch::Switch;
use super::*;

const GUEST_IP: [u8; 4] = [10, 77, 0, 2];
const GUEST_MAC: [u8; 6] = [0x02, 0x10, 0x77, 0, 0, 2];
const GUEST_PORT: u16 = 80;
const PATIENCE: Duration = Duration::from_secs(30);
/// After 700 ms of blackout the edge's timers, backed off at 200 and 600 ms, would wait until 1400 ms: what comes
/// within 350 ms was nudged.
const BLACKOUT: Duration = Duration::from_millis(700);
const NUDGED: Duration = Duration::from_millis(350);

#[derive(Default)]
struct Seen {
    deaf: AtomicBool,
    counted_bytes: AtomicU64,
    resets: AtomicU64,
    syns: AtomicU64,
}

struct Guest {
    seen: Arc<Seen>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Guest {
    fn start(port: SwitchPort) -> Self {
        let seen = Arc::new(Seen::default());
        let task = tokio::spawn(StandIn::new(port, seen.clone()).run());
        Self { seen, task }
    }

    fn set_deaf(&self, deaf: bool) {
        self.seen.deaf.store(deaf, SeqCst);
    }
}

struct StandIn {
    port: SwitchPort,
    said: mpsc::Receiver<Bytes>,
    nic: Nic,
    stack: Interface,
    sockets: SocketSet<'static>,
    orders: Vec<(SocketHandle, Option<u8>)>,
    /// By the edge's port, the segment a duplicate ACK would repeat.
    acks: BTreeMap<u16, Segment>,
    seen: Arc<Seen>,
}

impl StandIn {
    fn new(port: SwitchPort, seen: Arc<Seen>) -> Self {
        let (into_switch, said) = mpsc::channel(4096);
        let mut nic = Nic { received: VecDeque::new(), into_switch };
        let stack = new_stack(&mut nic, GUEST_MAC, GUEST_IP, 7);
        let mut sockets = SocketSet::new(Vec::new());
        let orders = (0..64).map(|_| (sockets.add(new_socket()), None)).collect();
        Self { port, said, nic, stack, sockets, orders, acks: BTreeMap::new(), seen }
    }

    async fn run(mut self) {
        let started = Instant::now();
        let mut was_deaf = false;
        loop {
            let mut frames = Vec::new();
            match timeout(Duration::from_millis(1), self.port.1.recv()).await {
                Ok(None) => return,
                Ok(Some(frame)) => frames.push(frame),
                Err(_) => {}
            }
            frames.extend(std::iter::from_fn(|| self.port.1.try_recv().ok()));
            for segment in frames.iter().filter_map(|frame| segment_of(frame)) {
                self.seen.resets.fetch_add(u64::from(segment.control == TcpControl::Rst), SeqCst);
                self.seen.syns.fetch_add(u64::from(segment.control == TcpControl::Syn), SeqCst);
            }
            if self.seen.deaf.load(SeqCst) {
                was_deaf = true;
                continue;
            }
            if std::mem::take(&mut was_deaf) {
                self.announce().await;
            }
            self.nic.received.extend(frames);
            let now = StackInstant::from_micros(started.elapsed().as_micros() as i64);
            self.stack.poll(now, &mut self.nic, &mut self.sockets);
            for (handle, order) in &mut self.orders {
                serve(self.sockets.get_mut(*handle), order, &self.seen);
            }
            self.stack.poll(now, &mut self.nic, &mut self.sockets);
            while let Ok(frame) = self.said.try_recv() {
                if let Some(segment) = segment_of(&frame) {
                    self.acks.insert(segment.to_port, segment);
                }
                self.port.0.send(frame).await.unwrap();
            }
        }
    }

    async fn announce(&self) {
        self.port.0.send(gratuitous_arp()).await.unwrap();
        for ack in self.acks.values() {
            for _ in 0..3 {
                self.port.0.send(ack.bare_ack()).await.unwrap();
            }
        }
    }
}

fn serve(socket: &mut Socket<'_>, order: &mut Option<u8>, seen: &Seen) {
    if !socket.is_open() && socket.remote_endpoint().is_none() {
        *order = None;
        socket.listen(GUEST_PORT).unwrap();
    }
    if order.is_none() && socket.can_recv() {
        *order = socket.peek(1).ok().and_then(|bytes| bytes.first().copied());
        match order {
            Some(b'r') => socket.abort(),
            Some(b'c') => {
                socket.send_slice(b"bye").unwrap();
                socket.close();
            }
            _ => {}
        }
    }
    if *order == Some(b'c') {
        let counted = socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap_or(0);
        seen.counted_bytes.fetch_add(counted as u64, SeqCst);
        return;
    }
    while socket.can_recv() && socket.can_send() {
        let room = socket.send_capacity() - socket.send_queue();
        let echo = socket.recv(|bytes| (bytes.len().min(room), bytes[..bytes.len().min(room)].to_vec())).unwrap();
        assert_eq!(socket.send_slice(&echo).unwrap(), echo.len());
    }
    if socket.state() == State::CloseWait && !socket.can_recv() {
        socket.close();
    }
}

struct Segment {
    to_port: u16,
    control: TcpControl,
    seq_after: TcpSeqNumber,
    ack: Option<TcpSeqNumber>,
    window_len: u16,
}

fn segment_of(frame: &[u8]) -> Option<Segment> {
    let frame = EthernetFrame::new_checked(frame).ok().filter(|f| f.ethertype() == EthernetProtocol::Ipv4)?;
    let ip = Ipv4Packet::new_checked(frame.payload()).ok()?;
    let packet = TcpPacket::new_checked(ip.payload()).ok()?;
    let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
    let tcp = TcpRepr::parse(&packet, &from, &to, &ChecksumCapabilities::ignored()).ok()?;
    Some(Segment {
        to_port: tcp.dst_port,
        control: tcp.control,
        seq_after: tcp.seq_number + tcp.segment_len(),
        ack: tcp.ack_number,
        window_len: tcp.window_len,
    })
}

impl Segment {
    fn bare_ack(&self) -> Bytes {
        let tcp = TcpRepr {
            src_port: GUEST_PORT,
            dst_port: self.to_port,
            control: TcpControl::None,
            seq_number: self.seq_after,
            ack_number: self.ack,
            window_len: self.window_len,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let ip = Ipv4Repr {
            src_addr: GUEST_IP.into(),
            dst_addr: EDGE_IP.into(),
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 64,
        };
        let ethernet = EthernetRepr {
            src_addr: EthernetAddress(GUEST_MAC),
            dst_addr: EthernetAddress(EDGE_MAC),
            ethertype: EthernetProtocol::Ipv4,
        };
        let checksums = ChecksumCapabilities::default();
        let mut bytes = vec![0; ethernet.buffer_len() + ip.buffer_len() + tcp.buffer_len()];
        let mut frame = EthernetFrame::new_unchecked(&mut bytes);
        ethernet.emit(&mut frame);
        let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
        ip.emit(&mut packet, &checksums);
        let (from, to) = (ip.src_addr.into(), ip.dst_addr.into());
        tcp.emit(&mut TcpPacket::new_unchecked(packet.payload_mut()), &from, &to, &checksums);
        bytes.into()
    }
}

fn gratuitous_arp() -> Bytes {
    let mut bytes = arp_reply(EthernetAddress(GUEST_MAC), GUEST_IP.into()).to_vec();
    bytes[..6].fill(0xff);
    bytes[21] = 1;
    bytes[32..38].fill(0);
    bytes[38..42].copy_from_slice(&GUEST_IP);
    bytes.into()
}

/// An edge and a guest on one switch.
async fn lab() -> (EdgeHandle, Guest, Switch) {
    let switch = Switch::new();
    let guest = Guest::start(switch.add_local_port("guest").unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let edge = Edge::start(listener, GUEST_IP, GUEST_PORT, switch.add_local_port("edge").unwrap()).unwrap();
    (edge, guest, switch)
}

async fn echo(client: &mut TcpStream, bytes: &[u8]) {
    let (mut read, mut write) = client.split();
    let mut back = vec![0; bytes.len()];
    let both = async { tokio::join!(write.write_all(bytes), read.read_exact(&mut back)) };
    let (sent, got) = timeout(PATIENCE, both).await.expect("an echo in time");
    sent.unwrap();
    got.unwrap();
    assert!(back == bytes, "the echo differs");
}

fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let mut bytes: Vec<u8> = (0..len).map(|_| next()).collect();
    bytes[0] = b'e';
    bytes
}

async fn until(what: impl Fn() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    waited.await.expect("it happens in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn megabytes_pass_both_ways_and_then_each_side_closes() {
    let (edge, _guest, _switch) = lab().await;
    let mut client = TcpStream::connect(edge.local_addr).await.unwrap();
    echo(&mut client, &noise(4 << 20, 1)).await;
    client.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0, "the guest's FIN");
    edge.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_live_side_by_side() {
    let (edge, _guest, _switch) = lab().await;
    let clients = (0..200_u32).map(|n| {
        let addr = edge.local_addr;
        // At most 60 at a time: the stand-in listens with 64 sockets and no backlog.
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(u64::from(n) / 20 * 50)).await;
            let mut client = TcpStream::connect(addr).await.unwrap();
            echo(&mut client, &noise(3000, n)).await;
            client.shutdown().await.unwrap();
            assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
}

#[tokio::test]
async fn the_guest_may_close_first_and_still_be_sent_to() {
    let (edge, guest, _switch) = lab().await;
    let mut client = TcpStream::connect(edge.local_addr).await.unwrap();
    client.write_all(b"c").await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, client.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, b"bye");
    client.write_all(&[0; 9_999]).await.unwrap();
    client.shutdown().await.unwrap();
    until(|| guest.seen.counted_bytes.load(SeqCst) == 10_000).await;
}

#[tokio::test]
async fn resets_pass_both_ways() {
    let (edge, guest, _switch) = lab().await;
    let mut client = TcpStream::connect(edge.local_addr).await.unwrap();
    client.write_all(b"r").await.unwrap();
    let reset = timeout(PATIENCE, client.read(&mut [0; 1])).await.unwrap();
    assert_eq!(reset.unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let mut client = TcpStream::connect(edge.local_addr).await.unwrap();
    echo(&mut client, b"echo").await;
    client.set_zero_linger().unwrap();
    drop(client);
    until(|| guest.seen.resets.load(SeqCst) > 0).await;
}

#[tokio::test]
async fn a_closed_guest_port_resets_the_client() {
    let switch = Switch::new();
    let _guest = Guest::start(switch.add_local_port("guest").unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let edge = Edge::start(listener, GUEST_IP, 81, switch.add_local_port("edge").unwrap()).unwrap();
    let mut client = TcpStream::connect(edge.local_addr).await.unwrap();
    let reset = timeout(PATIENCE, client.read(&mut [0; 1])).await.unwrap();
    assert_eq!(reset.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_guest_that_does_not_read_stops_the_client() {
    let (edge, guest, _switch) = lab().await;
    let mut client = TcpStream::connect(edge.local_addr).await.unwrap();
    echo(&mut client, b"echo").await;
    guest.set_deaf(true);
    let flood = timeout(Duration::from_millis(500), client.write_all(&vec![0; 64 << 20])).await;
    assert!(flood.is_err(), "64 MiB went nowhere");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_duplicate_acks_after_a_blackout_bring_the_lost_request_at_once() {
    let (edge, guest, _switch) = lab().await;
    let mut client = TcpStream::connect(edge.local_addr).await.unwrap();
    echo(&mut client, &noise(1000, 1)).await;
    guest.set_deaf(true);
    tokio::time::sleep(Duration::from_millis(20)).await;
    client.write_all(&noise(1000, 2)).await.unwrap();
    tokio::time::sleep(BLACKOUT).await;
    guest.set_deaf(false);
    let woken = Instant::now();
    let mut back = vec![0; 1000];
    timeout(PATIENCE, client.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(back, noise(1000, 2));
    assert!(woken.elapsed() < NUDGED, "it took {:?}", woken.elapsed());
    echo(&mut client, &noise(1 << 20, 3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gratuitous_arp_starts_unanswered_handshakes_over() {
    for neighbor_known in [true, false] {
        let (edge, guest, _switch) = lab().await;
        if neighbor_known {
            echo(&mut TcpStream::connect(edge.local_addr).await.unwrap(), b"echo").await;
        }
        guest.set_deaf(true);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut client = TcpStream::connect(edge.local_addr).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        tokio::time::sleep(BLACKOUT).await;
        guest.set_deaf(false);
        let woken = Instant::now();
        timeout(PATIENCE, client.read_exact(&mut [0; 5])).await.unwrap().unwrap();
        assert!(woken.elapsed() < NUDGED, "neighbour known: {neighbor_known}; it took {:?}", woken.elapsed());
        assert!(guest.seen.syns.load(SeqCst) > 0);
    }
}

#[tokio::test]
async fn a_port_is_not_used_again_until_the_range_is_through() {
    let switch = Switch::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = switch.add_local_port("edge").unwrap();
    let mut engine = Engine::new(listener, GUEST_IP.into(), GUEST_PORT, port, 28_000);
    let first = engine.connect();
    let first = engine.sockets.get::<Socket>(first).local_endpoint().unwrap().port;
    let range = usize::from(PORT_LAST - PORT_FIRST) + 1;
    let others: std::collections::BTreeSet<u16> = (1..range).map(|_| engine.take_port()).collect();
    assert_eq!(others.len(), range - 1);
    assert!(!others.contains(&first));
    assert_ne!(engine.take_port(), first, "it is still in use");
}
