//! Hand-made frames: what no well-behaved client sends, and what the answers look like to the byte.

use super::super::wire::*;
use super::*;

pub(super) fn arp_request() -> Vec<u8> {
    let arp = Arp { request: true, sender_mac: PEER_MAC, sender_ip: PEER_IP, target_mac: [0; 6], target_ip: GUEST_IP };
    ethernet(BROADCAST, PEER_MAC, ETHERTYPE_ARP, &[&arp.emit()])
}

fn frame_of(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let head = ipv4_header(PEER_IP, GUEST_IP, protocol, payload.len());
    ethernet(GUEST_MAC, PEER_MAC, ETHERTYPE_IPV4, &[&head, payload])
}

fn tcp_frame(segment: &Segment<'_>) -> Vec<u8> {
    frame_of(PROTOCOL_TCP, &segment.emit(PEER_IP, GUEST_IP))
}

pub(super) fn syn(src_port: u16, dst_port: u16) -> Vec<u8> {
    tcp_frame(&Segment { src_port, dst_port, seq: 100, flags: SYN, window: 8000, ..Segment::default() })
}

/// Makes the checksums of a damaged IPv4 frame right again, where there is room for them.
pub(super) fn fix_checksums(frame: &mut [u8]) {
    if frame.len() < 54 || frame[12..14] != [8, 0] {
        return;
    }
    let end = frame.len().min(14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]))).max(54);
    frame[14] = 0x45;
    frame[24..26].fill(0);
    let sum = checksum(&[&frame[14..34]]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame[50..52].fill(0);
    let (src, dst) = (frame[26..30].try_into().unwrap(), frame[30..34].try_into().unwrap());
    let sum = transport_checksum(src, dst, PROTOCOL_TCP, &frame[34..end]);
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
}

/// A machine and a hand-driven peer.
struct Bench {
    machine: Machine,
    disk: MemoryDisk,
    now: Instant,
}

/// A segment the guest sent, its payload owned.
#[derive(Debug)]
struct Seen {
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    mss: Option<u16>,
    payload: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        Self::with_seed(42)
    }

    fn with_seed(host_entropy_seed: u64) -> Self {
        let mut disk = MemoryDisk::new(1 << 20);
        let config = MachineConfig { host_entropy_seed, ..config(256) };
        let machine = Machine::boot(&config, Instant::ZERO, &mut disk).unwrap();
        Self { machine, disk, now: Instant::ZERO }
    }

    fn step(&mut self) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        while self.machine.step(self.now, &mut self.disk, &mut |frame| out.push(frame.to_vec())) {}
        out
    }

    fn frames(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        assert!(self.machine.receive(frame));
        self.step()
    }

    fn seen(frames: &[Vec<u8>]) -> Vec<Seen> {
        let read = |frame: &Vec<u8>| {
            let ethernet = Ethernet::parse(frame)?;
            let ip = Ipv4::parse(ethernet.payload)?;
            let Segment { seq, ack, flags, window, mss, payload, .. } = Segment::parse(&ip)?;
            assert_eq!((ethernet.dst, ip.dst), (PEER_MAC, PEER_IP));
            Some(Seen { seq, ack, flags, window, mss, payload: payload.to_vec() })
        };
        frames.iter().filter_map(read).collect()
    }

    fn tcp(&mut self, seq: u32, ack: u32, flags: u8, payload: &[u8]) -> Vec<Seen> {
        let segment = Segment { src_port: 4000, dst_port: 80, seq, ack, flags, window: 8000, payload, mss: None };
        Self::seen(&self.frames(&tcp_frame(&segment)))
    }

    /// Opens a connection; returns the guest's next sequence number (the peer's is 101).
    fn open(&mut self) -> u32 {
        let syn_ack = Self::seen(&self.frames(&syn(4000, 80)));
        assert_eq!((syn_ack.len(), syn_ack[0].flags, syn_ack[0].ack, syn_ack[0].mss), (1, SYN | ACK, 101, Some(1460)));
        let next = syn_ack[0].seq.wrapping_add(1);
        assert_eq!(self.tcp(101, next, ACK, b"").len(), 0, "the handshake's end needs no answer");
        next
    }

    fn after(&mut self, delay: Duration) -> Vec<Seen> {
        self.now += delay;
        Self::seen(&self.step())
    }
}

#[test]
fn arp_ping_and_udp_echo_are_answered() {
    let mut bench = Bench::new();
    let reply = bench.frames(&arp_request());
    let arp = Arp::parse(Ethernet::parse(&reply[0]).unwrap().payload).unwrap();
    assert_eq!((reply.len(), arp.request, arp.sender_mac, arp.sender_ip), (1, false, GUEST_MAC, GUEST_IP));
    assert_eq!((arp.target_mac, arp.target_ip), (PEER_MAC, PEER_IP));

    let mut ping = [&[8, 0, 0, 0, 1, 2, 3, 4][..], b"odd"].concat();
    let sum = checksum(&[&ping]);
    ping[2..4].copy_from_slice(&sum.to_be_bytes());
    let reply = bench.frames(&frame_of(PROTOCOL_ICMP, &ping));
    let pong = Ipv4::parse(&reply[0][14..]).unwrap().payload;
    assert_eq!((pong[0], checksum(&[pong]), &pong[4..]), (0, 0, &ping[4..]));

    let mut udp = [&[0x12, 0x34, 0, 7, 0, 11, 0, 0][..], b"abc"].concat();
    for summed in [false, true] {
        if summed {
            let sum = transport_checksum(PEER_IP, GUEST_IP, PROTOCOL_UDP, &udp);
            udp[6..8].copy_from_slice(&sum.to_be_bytes());
        }
        let reply = bench.frames(&frame_of(PROTOCOL_UDP, &udp));
        let echo = Ipv4::parse(&reply[0][14..]).unwrap();
        assert_eq!(transport_checksum(echo.src, echo.dst, PROTOCOL_UDP, echo.payload), 0);
        assert_eq!((&echo.payload[..4], &echo.payload[8..]), (&[0, 7, 0x12, 0x34][..], &b"abc"[..]));
    }
    udp[6] ^= 1;
    assert_eq!(bench.frames(&frame_of(PROTOCOL_UDP, &udp)).len(), 0, "a wrong checksum");
}

#[test]
fn what_is_for_others_or_damaged_is_ignored() {
    let mut bench = Bench::new();
    let mut other = syn(4000, 80);
    other[5] = 9;
    let mut damaged = syn(4000, 80);
    damaged[40] ^= 1;
    let mut broadcast = syn(4000, 80);
    broadcast[..6].fill(0xff);
    for frame in [&other, &damaged, &broadcast, &vec![], &vec![0; 13], &vec![0xff; 1515]] {
        assert_eq!(bench.frames(frame).len(), 0);
    }
    assert_eq!(bench.frames(&syn(4000, 80)).len(), 1, "the same frame, unharmed");
}

#[test]
fn ports_nobody_listens_on_are_reset() {
    let mut bench = Bench::new();
    let reset = Bench::seen(&bench.frames(&syn(4000, 81)));
    assert_eq!((reset.len(), reset[0].flags, reset[0].ack), (1, RST | ACK, 101));
    let stray = bench.tcp(5, 77, ACK, b"x");
    assert_eq!((stray.len(), stray[0].flags, stray[0].seq), (1, RST, 77));
    assert_eq!(bench.tcp(5, 77, RST, b"").len(), 0, "a reset is never answered");
}

#[test]
fn only_an_exact_reset_ends_a_connection() {
    let mut bench = Bench::new();
    let next = bench.open();
    let challenge = bench.tcp(150, next, RST, b"");
    assert_eq!((challenge.len(), challenge[0].flags, challenge[0].ack), (1, ACK, 101), "in the window, not exact");
    assert_eq!(bench.tcp(90_000, next, RST, b"").len(), 0, "outside the window");
    let challenge = bench.tcp(101, next, SYN, b"");
    assert_eq!((challenge.len(), challenge[0].flags), (1, ACK), "a SYN in a connection");
    assert_eq!(bench.tcp(101, next, ACK, b"GET /k/a HTTP/1.1\r\n\r\n").len(), 1, "it still works");
    assert_eq!(bench.tcp(122, next, RST, b"").len(), 0);
    assert_eq!(bench.tcp(122, next, ACK, b"").pop().unwrap().flags, RST, "now it is gone");
}

#[test]
fn a_connection_ends_with_one_fin_and_no_more() {
    for peer_closes_first in [false, true] {
        let mut bench = Bench::new();
        let next = bench.open();
        let request = b"GET /x HTTP/1.1\r\nConnection: close\r\n\r\n";
        let flags = if peer_closes_first { ACK | FIN } else { ACK };
        let answer = bench.tcp(101, next, flags, request);
        let fins: Vec<_> = answer.iter().filter(|seen| seen.flags & FIN != 0).collect();
        assert_eq!(fins.len(), 1, "{answer:?}");
        let end = fins[0].seq.wrapping_add(fins[0].payload.len() as u32 + 1);
        let peer_next = 101 + request.len() as u32;
        let mut after = Vec::new();
        if peer_closes_first {
            after.extend(bench.tcp(peer_next + 1, end, ACK, b""));
        } else {
            after.extend(bench.tcp(peer_next, end, ACK, b""));
            after.extend(bench.tcp(peer_next, end, ACK | FIN, b""));
        }
        after.extend(bench.after(Duration::from_secs(2)));
        assert!(after.iter().all(|seen| seen.flags & FIN == 0), "{peer_closes_first}: {after:?}");
        assert!(after.iter().all(|seen| seen.seq == end), "nothing beyond its FIN: {after:?}");
    }
}

#[test]
fn out_of_order_old_and_overlapping_data() {
    let mut bench = Bench::new();
    let next = bench.open();
    let text = b"GET /k/a HTTP/1.1\r\n\r\n";
    let ahead = bench.tcp(111, next, ACK, &text[10..]);
    assert_eq!((ahead.len(), ahead[0].ack, ahead[0].payload.len()), (1, 101, 0), "a duplicate ACK");
    let first = bench.tcp(101, next, ACK, &text[..8]);
    assert_eq!((first.len(), first[0].ack), (1, 109));
    let old = bench.tcp(101, next, ACK, &text[..8]);
    assert_eq!((old.len(), old[0].ack), (1, 109));
    let rest = bench.tcp(104, next, ACK, &text[3..]);
    assert_eq!((rest.len(), rest[0].ack), (1, 122));
    assert!(rest[0].payload.starts_with(b"HTTP/1.1 404 "), "the answer carries the ACK");
    assert_eq!(bench.tcp(122, next.wrapping_add(9999), ACK, b"").len(), 1, "an ACK of what was never sent");
}

#[test]
fn retransmissions_back_off_and_three_duplicates_cut_the_wait_short() {
    let mut bench = Bench::new();
    let next = bench.open();
    let answer = bench.tcp(101, next, ACK, b"GET /k/a HTTP/1.1\r\n\r\n").remove(0);
    let mut waits = Vec::new();
    for _ in 0..7 {
        let wait = bench.machine.poll_timeout().unwrap() - bench.now;
        let again = bench.after(wait);
        assert_eq!((again.len(), again[0].seq, &again[0].payload), (1, next, &answer.payload));
        waits.push(wait.as_millis());
    }
    assert_eq!(waits, [200, 400, 800, 1600, 3200, 5000, 5000]);
    assert_eq!(bench.tcp(122, next, ACK, b"").len() + bench.tcp(122, next, ACK, b"").len(), 0);
    // The window for a fast retransmission opens again when what was lost before has been acknowledged.
    let mut seq = next.wrapping_add(answer.payload.len() as u32);
    assert_eq!(bench.tcp(122, seq, ACK, b"").len(), 0);
    let answer = bench.tcp(122, seq, ACK, b"GET /k/a HTTP/1.1\r\n\r\n").remove(0);
    let sent: Vec<_> = (0..3).flat_map(|_| bench.tcp(143, seq, ACK, b"")).collect();
    assert_eq!((sent.len(), sent[0].seq, &sent[0].payload), (1, seq, &answer.payload), "no timer was needed");
    seq = seq.wrapping_add(answer.payload.len() as u32);
    bench.tcp(143, seq, ACK, b"");
    assert_eq!(bench.machine.poll_timeout(), None);
}

#[test]
fn a_new_generation_announces_itself_and_prompts_the_peer() {
    let mut bench = Bench::new();
    let next = bench.open();
    let answer = bench.tcp(101, next, ACK, b"GET /k/a HTTP/1.1\r\n\r\n").remove(0);
    bench.machine.set_generation(5);
    assert_eq!(bench.machine.poll_timeout(), Some(Instant::ZERO), "at once");
    let frames = bench.step();
    let arp = Arp::parse(Ethernet::parse(&frames[0]).unwrap().payload).unwrap();
    assert_eq!(
        (&frames[0][..6], arp.sender_ip, arp.target_ip, arp.sender_mac),
        (&[0xff; 6][..], GUEST_IP, GUEST_IP, GUEST_MAC)
    );
    let sent = Bench::seen(&frames);
    assert_eq!((sent[0].seq, &sent[0].payload), (next, &answer.payload), "what was unacknowledged");
    let acks = &sent[1..];
    assert_eq!(acks.len(), 3);
    let end = next.wrapping_add(answer.payload.len() as u32);
    let alike = |ack: &Seen| (ack.seq, ack.ack, ack.flags, ack.window, ack.payload.len());
    assert!(acks.iter().all(|ack| alike(ack) == (end, 122, ACK, acks[0].window, 0)), "{acks:?}");
    bench.machine.set_generation(5);
    assert_eq!(bench.step().len(), 0, "said once");
}

#[test]
fn a_lost_answer_to_the_handshake_is_sent_again_and_given_up() {
    let mut bench = Bench::new();
    bench.frames(&syn(4000, 80));
    assert_eq!(bench.tcp(100, 0, SYN, b"").len(), 1, "the client asks again");
    let mut again = 0;
    while let Some(at) = bench.machine.poll_timeout() {
        again += bench.after(at - bench.now).len();
    }
    assert_eq!(again, 5);
    assert_eq!(bench.tcp(101, 1, ACK, b"").pop().unwrap().flags, RST);
}

#[test]
fn the_window_shrinks_with_the_ring_and_never_moves_left() {
    let mut bench = Bench::new();
    let next = bench.open();
    let head = b"PUT /k/a HTTP/1.1\r\nContent-Length: 4096\r\n\r\n";
    let mut seq = 101;
    let mut edge = 0;
    for chunk in [&head[..], &[1; 1000], &[1; 1000], &[1; 1000], &[1; 1095]] {
        let ack = bench.tcp(seq, next, ACK, chunk).remove(0);
        seq += chunk.len() as u32;
        assert_eq!(ack.ack, seq);
        let right = ack.ack + u32::from(ack.window);
        assert!(right >= edge, "{right} {edge}");
        assert!(ack.window as usize <= 12 * 1024 - (seq - 101) as usize);
        edge = right;
    }
    let answer = bench.tcp(seq, next, ACK, &[1]).remove(0);
    assert!(answer.payload.starts_with(b"HTTP/1.1 201"));
    assert_eq!(answer.window, 12 * 1024, "the ring is empty again");
}

#[test]
fn an_abandoned_connection_makes_room_only_after_it_was_silent_for_long() {
    let mut bench = Bench::new();
    for port in 5000..5008 {
        let next = Bench::seen(&bench.frames(&syn(port, 80)))[0].seq.wrapping_add(1);
        let ack =
            Segment { src_port: port, dst_port: 80, seq: 101, ack: next, flags: ACK, window: 1, ..Segment::default() };
        assert_eq!(bench.frames(&tcp_frame(&ack)).len(), 0);
    }
    assert_eq!(Bench::seen(&bench.frames(&syn(6000, 80)))[0].flags, RST | ACK);
    bench.now += Duration::from_secs(61);
    assert_eq!(Bench::seen(&bench.frames(&syn(6000, 80)))[0].flags, SYN | ACK);
}

#[test]
fn two_guests_fed_alike_differ_in_sequence_numbers_and_in_nothing_else() {
    let run = |seed| {
        let mut bench = Bench::with_seed(seed);
        let first = bench.open();
        let (mut seq, mut next, mut sent) = (101, first, Vec::new());
        for request in [put("a", &[5; 1000]), get("a"), b"GET / HTTP/1.1\r\n\r\n".to_vec(), get("b"), b"?".to_vec()] {
            bench.now += Duration::from_millis(700);
            for segment in bench.tcp(seq, next, ACK, &request) {
                next = next.wrapping_add(segment.payload.len() as u32);
                sent.push((
                    segment.seq.wrapping_sub(first),
                    segment.ack,
                    segment.flags,
                    segment.window,
                    segment.payload,
                ));
            }
            seq += request.len() as u32;
        }
        (first, sent)
    };
    let (one, two) = (run(1), run(2));
    assert_ne!(one.0, two.0, "initial sequence numbers come from the hardware");
    assert_eq!(one.1, two.1);
    assert!(one.1.len() >= 5);
}

#[test]
fn a_step_answers_a_bounded_number_of_requests() {
    let mut bench = Bench::new();
    let next = bench.open();
    let requests = b"GET /x HTTP/1.1\r\n\r\n".repeat(50);
    let (ack, flags, payload) = (next, ACK, &requests[..]);
    let segment =
        Segment { src_port: 4000, dst_port: 80, seq: 101, ack, flags, window: 60_000, payload, ..Segment::default() };
    assert!(bench.machine.receive(&tcp_frame(&segment)));
    assert!(bench.machine.step(bench.now, &mut bench.disk, &mut |_| {}), "more is due");
    assert_eq!(bench.machine.requests(), 16);
    bench.step();
    assert_eq!(bench.machine.requests(), 50);
    let writes = b"PUT /k/a HTTP/1.1\r\nContent-Length: 0\r\n\r\n".repeat(3);
    let (seq, payload) = (101 + requests.len() as u32, &writes[..]);
    let segment = Segment { src_port: 4000, dst_port: 80, seq, ack, flags, window: 60_000, payload, mss: None };
    assert!(bench.machine.receive(&tcp_frame(&segment)));
    assert!(bench.machine.step(bench.now, &mut bench.disk, &mut |_| {}), "a write is the last of its step");
    assert_eq!(bench.machine.requests(), 51);
}
