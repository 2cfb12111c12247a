//! What is fed: each target takes pieces of an input and says what it made of them.

use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::time::Duration;
use xen_colo::clock::Instant;
use xen_colo::colo::{hello, message, stream};
use xen_colo::compare::{Comparator, Config, Output, Rewriter, notify, packet, rewriter, wire};
use xen_colo::daemon::nbd::list;
use xen_colo::daemon::{control, frames};
use xen_colo::disk::{DiskError, MemoryDisk};
use xen_colo::hypervisor::vmstate;
use xen_colo::image::{self, helper};
use xen_colo::nbd::client::{Client, Limits};
use xen_colo::nbd::handshake::{Encryption, Export};
use xen_colo::nbd::netlink;
use xen_colo::nbd::server::{Next, Server};
use xen_colo::qmp;
use xen_colo::replica::state::{State, StateFile};

/// What a decoder may buffer beyond twice what it was given.
const MEMORY_MAX_BYTES: usize = 40 << 20;
/// Memory of the guest that streams are for.
const NR_PAGES: u64 = 4096;
/// Of a virtio-net header: the checksum is not finished.
const NEEDS_CSUM: u8 = 1;
/// The disk that is served.
const DISK_BYTES: usize = 1 << 20;

pub(super) type Pieces<'a, 'b> = &'a mut dyn Iterator<Item = &'b [u8]>;
pub(super) type Said = Vec<String>;

/// Something that reads what others write.
pub(super) struct Target {
    pub(super) name: &'static str,
    pub(super) run: fn(Pieces) -> Said,
}

pub(super) const TARGETS: [Target; 22] = [
    Target { name: "nbd-server", run: nbd_server },
    Target { name: "nbd-client", run: nbd_client },
    Target { name: "nbd-list", run: |pieces| vec![brief(&list::list(Told(BytesMut::from(&all(pieces)[..]))))] },
    // A datagram comes whole.
    Target { name: "netlink", run: |pieces| vec![brief(&netlink::Answer::new(7).handle_input(&all(pieces)))] },
    Target {
        name: "stream",
        run: |pieces| {
            let mut decoder = stream::Decoder::new(NR_PAGES);
            decoded(pieces, move |input| decoder.decode(input))
        },
    },
    Target { name: "message", run: |pieces| decoded(pieces, message::Message::decode) },
    Target { name: "hello", run: |pieces| decoded(pieces, hello::decode::<hello::Hello>) },
    Target { name: "welcome", run: |pieces| decoded(pieces, hello::decode::<hello::Welcome>) },
    Target {
        name: "tagged",
        run: |pieces| {
            let mut decoder = wire::TaggedDecoder::default();
            decoded(pieces, move |input| decoder.decode(input))
        },
    },
    Target {
        name: "chardev",
        run: |pieces| {
            let mut decoder = wire::Decoder::default();
            decoded(pieces, move |input| decoder.decode(input))
        },
    },
    Target {
        name: "vnet",
        run: |pieces| {
            let mut decoder = wire::VnetDecoder::default();
            decoded(pieces, move |input| decoder.decode(input))
        },
    },
    Target {
        name: "notify",
        run: |pieces| {
            let mut decoder = notify::Decoder::default();
            decoded(pieces, move |input| decoder.instruction(input))
        },
    },
    Target { name: "switch", run: |pieces| decoded(pieces, frames::decode) },
    Target { name: "image", run: migration_image },
    Target { name: "helper", run: |pieces| decoded(pieces, helper::Message::decode) },
    Target { name: "vmstate", run: device_model_state },
    Target { name: "control", run: control_words },
    Target { name: "record", run: replica_record },
    Target { name: "qmp", run: monitor },
    Target { name: "packet", run: packets },
    Target { name: "comparator", run: comparator },
    Target { name: "rewriter", run: rewritten },
];

/// A server that has said all that it will, whatever it is asked.
struct Told(BytesMut);

impl Read for Told {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        (&self.0.split_to(into.len().min(self.0.len()))[..]).read(into)
    }
}

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Decoders of known faults, and one without any.
pub(super) fn planted() -> [Target; 5] {
    fn lines(input: &mut BytesMut, trusts: bool, greedy: bool) -> Result<Option<Bytes>, String> {
        let Some(header) = input.first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_be_bytes(*header) as usize;
        if len > 1 << 20 && !trusts && !greedy {
            return Err(format!("{len} bytes"));
        }
        if greedy {
            input.reserve(len);
        }
        if trusts {
            // Indexes what may not have arrived.
            let line = Bytes::copy_from_slice(&input[4..4 + len]);
            let _ = input.split_to(4 + len);
            return Ok(Some(line));
        }
        if input.len() < 4 + len {
            return Ok(None);
        }
        Ok(Some(input.split_to(4 + len).split_off(4).freeze()))
    }
    [
        Target { name: "sound", run: |pieces| decoded(pieces, |input| lines(input, false, false)) },
        Target { name: "trusts a length", run: |pieces| decoded(pieces, |input| lines(input, true, false)) },
        Target { name: "makes room for a length", run: |pieces| decoded(pieces, |input| lines(input, false, true)) },
        Target {
            name: "takes the end of a piece for the end of a message",
            run: |pieces| decoded(pieces, |input| Ok::<_, String>((!input.is_empty()).then(|| input.split().freeze()))),
        },
        Target {
            name: "says what it has said",
            run: |pieces| decoded(pieces, |input| Ok::<_, String>((!input.is_empty()).then(|| input.clone()))),
        },
    ]
}

/// Decodes each piece as far as it goes, and nothing behind an error.
fn decoded<T: Debug, E: Display>(
    pieces: Pieces,
    mut decode: impl FnMut(&mut BytesMut) -> Result<Option<T>, E>,
) -> Said {
    let (mut input, mut fed_bytes, mut said) = (BytesMut::new(), 0, Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        fed_bytes += piece.len();
        loop {
            let result = decode(&mut input);
            let held_bytes = input.capacity();
            assert!(held_bytes <= 2 * fed_bytes + MEMORY_MAX_BYTES, "{held_bytes} bytes held for {fed_bytes}");
            match result {
                Ok(Some(item)) => said.push(brief(&item)),
                Ok(None) => break,
                Err(error) => {
                    said.push(format!("error: {error}"));
                    return said;
                }
            }
            assert!(said.len() <= fed_bytes, "more is said than was heard");
        }
    }
    said
}

/// What it looks like, if that is short, and else its length and a digest.
fn brief(what: &impl Debug) -> String {
    let text = format!("{what:?}");
    if text.len() <= 400 {
        text
    } else {
        format!("{} bytes, {:016x}: {:.80}", text.len(), digest(text.as_bytes()), text)
    }
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

fn all(pieces: Pieces) -> Vec<u8> {
    pieces.flatten().copied().collect()
}

/// What a server said in all, and how it ended. How often it said something depends on how it was asked.
fn nbd_server(pieces: Pieces) -> Said {
    let all = Export { fast_zero: true, knows_changes: true, ..Export::new("disk0", DISK_BYTES as u64) };
    let exports = vec![Export::new("", DISK_BYTES as u64), all];
    let mut server = Server::new(exports, Encryption::None);
    let (mut disk, mut heard) = (MemoryDisk::new(DISK_BYTES), Vec::new());
    let ending = 'all: {
        for mut piece in pieces {
            while !piece.is_empty() {
                let room = server.room();
                assert!(room.len() <= MEMORY_MAX_BYTES, "room for {} bytes", room.len());
                let bytes = room.len().min(piece.len());
                room[..bytes].copy_from_slice(&piece[..bytes]);
                server.filled(bytes);
                piece = &piece[bytes..];
                loop {
                    let next = if server.export().is_some() { server.serve(&mut disk) } else { server.negotiate() };
                    heard.extend_from_slice(server.output());
                    server.sent();
                    match next {
                        Ok(Next::Input) => break,
                        Ok(Next::Output) => {}
                        Ok(end) => break 'all format!("{end:?}"),
                        Err(error) => break 'all format!("error: {error}"),
                    }
                }
            }
        }
        "open".to_owned()
    };
    vec![format!("{} bytes, {:016x}", heard.len(), digest(&heard)), format!("{:016x}", digest(disk.bytes())), ending]
}

/// A client that submits as soon as it may: until then it is fed byte by byte, since a reply to what nobody has asked
/// yet is rightly an error.
fn nbd_client(pieces: Pieces) -> Said {
    let mut client = Client::new("disk0", Limits::default()).unwrap();
    let (mut input, mut said, mut submitted) = (BytesMut::new(), Vec::new(), false);
    for mut piece in pieces {
        while !piece.is_empty() {
            let (fed, rest) = piece.split_at(if submitted { piece.len() } else { 1 });
            piece = rest;
            input.extend_from_slice(fed);
            let result = client.handle_input(&mut input);
            while client.poll_output().is_some() {}
            while let Some(completion) = client.poll_completion() {
                said.push(brief(&completion));
            }
            if let Err(error) = result {
                said.push(format!("error: {error}"));
                return said;
            }
            if let Some(export) = client.export()
                && !submitted
            {
                submitted = true;
                said.push(brief(&export));
                for at in 0..4 {
                    let _ = client.read(at * 4096, 4096);
                    let _ = client.write(at * 4096, Bytes::from_static(&[7; 512]));
                }
                let _ = client.flush();
            }
        }
    }
    said
}

/// As a reader of a file: exactly what is asked for.
fn migration_image(pieces: Pieces) -> Said {
    let input = all(pieces);
    let (mut rest, mut said, mut decoder) = (&input[..], Vec::new(), image::Decoder::new());
    while !decoder.is_over() {
        let wanted = decoder.wants();
        assert!(wanted <= MEMORY_MAX_BYTES);
        let Some((bytes, behind)) = rest.split_at_checked(wanted) else {
            said.push("cut off".into());
            break;
        };
        rest = behind;
        match decoder.feed(bytes.to_vec()) {
            Ok(Some(item)) => said.push(brief(&item)),
            Ok(None) => {}
            Err(error) => {
                said.push(format!("error: {error}"));
                break;
            }
        }
    }
    said
}

fn device_model_state(pieces: Pieces) -> Said {
    let state = all(pieces);
    match vmstate::image(&state) {
        Ok(image) => {
            assert!(image.len() <= state.len() + (1 << 20));
            vec![format!("an image of {} bytes", image.len())]
        }
        Err(error) => vec![error.to_string()],
    }
}

/// A line of the control socket: what it is must survive being said again.
fn control_words(pieces: Pieces) -> Said {
    let line = all(pieces);
    match serde_json::from_slice::<control::Request>(&line) {
        Ok(request) => {
            let again = serde_json::to_vec(&request).unwrap();
            assert_eq!(serde_json::from_slice::<control::Request>(&again).unwrap(), request);
            vec![brief(&request)]
        }
        Err(error) => vec![error.to_string()],
    }
}

struct Found(Vec<u8>);

impl StateFile for Found {
    fn read(&mut self) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(Some(self.0.clone()))
    }
    fn write(&mut self, _record: &[u8]) -> Result<(), DiskError> {
        Ok(())
    }
    fn sync(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn sync_dir(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// Only what was written by us is ever whole.
fn replica_record(pieces: Pieces) -> Said {
    let record = all(pieces);
    let standing = State::open(Box::new(Found(record.clone()))).unwrap().standing();
    if standing.is_whole() {
        let text = String::from_utf8(record).unwrap();
        assert!(text.starts_with("xen-colo"), "{standing}: {text}");
    }
    vec![standing.to_string()]
}

/// Every order is simply done. What is said is one word a line, in whatever order: what comes out of band overtakes as
/// much as it can.
fn monitor(pieces: Pieces) -> Said {
    const COMMANDS: &[&str] = &["xen-set-replication", "nbd-server-start", "human-monitor-command", "stop", "yank"];
    let mut session = qmp::server::Session::new(COMMANDS);
    let mut heard = session.poll_output().unwrap().to_vec();
    for mut piece in pieces {
        while !piece.is_empty() {
            let room = session.room();
            assert!((1..=qmp::codec::INPUT_MAX_BYTES).contains(&room), "room for {room} bytes");
            let (fed, rest) = piece.split_at(room.min(piece.len()));
            piece = rest;
            session.handle_input(fed);
            loop {
                let (order, output) = (session.poll_order(), session.poll_output());
                if order.is_none() && output.is_none() {
                    break;
                }
                heard.extend_from_slice(&output.unwrap_or_default());
                if let Some(order) = order {
                    session.handle_answer(order.ticket, qmp::done());
                }
            }
        }
    }
    let heard = String::from_utf8(heard).unwrap();
    assert!(heard.is_ascii() && heard.ends_with("\r\n"));
    let mut said: Said = heard.split_terminator("\r\n").map(|line| brief(&line)).collect();
    said.sort_unstable();
    said
}

fn packets(pieces: Pieces) -> Said {
    let frame = all(pieces);
    vec![brief(&packet::Packet::parse(&frame)), brief(&packet::Packet::parse_behind(&frame, 12))]
}

/// An input as steps: who speaks, in which epoch, how long after the last, and what (le16 length, frame).
fn steps(input: &[u8]) -> impl Iterator<Item = (u8, u64, u64, &[u8])> {
    let mut rest = input;
    std::iter::from_fn(move || {
        let (head, behind) = rest.split_first_chunk::<5>()?;
        let len = usize::from(u16::from_le_bytes([head[3], head[4]])).min(behind.len());
        let (frame, behind) = behind.split_at(len);
        rest = behind;
        Some((head[0], u64::from(head[1] % 8), u64::from(head[2]) * 16, frame))
    })
}

/// Whatever is said: each frame of the primary leaves once, and nothing else ever does but bare acknowledgements that the
/// comparator has made, and has counted.
fn comparator(pieces: Pieces) -> Said {
    let input = all(pieces);
    let mut machine = Comparator::new(Config { max_flows: 8, max_queue_bytes: 1 << 16, ..Config::default() });
    let (mut now, mut owed, mut said) = (Instant::ZERO, BTreeMap::<Bytes, usize>::new(), Vec::new());
    let mut made = 0;
    let mut drain = |machine: &mut Comparator, owed: &mut BTreeMap<Bytes, usize>, said: &mut Said| {
        while let Some(output) = machine.poll_output() {
            if let Output::Release(frame) = &output {
                match owed.get_mut(frame).filter(|left| **left > 0) {
                    Some(left) => *left -= 1,
                    None => {
                        assert!(is_bare_acknowledgement(frame), "a frame the primary did not send, or not again");
                        made += 1;
                    }
                }
            }
            said.push(brief(&output));
        }
    };
    let mut epoch = 0;
    for (who, of, after_ms, frame) in steps(&input) {
        now += Duration::from_millis(after_ms);
        let frame = Bytes::copy_from_slice(frame);
        match who % 4 {
            0 => {
                *owed.entry(frame.clone()).or_default() += 1;
                machine.handle_primary(now, of, frame);
            }
            1 => machine.handle_secondary(now, of, frame),
            2 => {
                epoch += of % 2;
                machine.checkpoint(now, epoch);
            }
            _ => machine.handle_timeout(now),
        }
        drain(&mut machine, &mut owed, &mut said);
    }
    machine.release_all();
    drain(&mut machine, &mut owed, &mut said);
    assert!(owed.values().all(|left| *left == 0), "frames of the primary were lost");
    assert_eq!(made, machine.stats().acknowledged);
    said
}

fn is_bare_acknowledgement(frame: &[u8]) -> bool {
    let packet::Packet::Ip(ip) = packet::Packet::parse(frame) else { return false };
    matches!(ip.transport, packet::Transport::Tcp(tcp) if tcp.payload.is_empty() && tcp.flags == packet::Tcp::ACK)
}

/// The sum over a TCP segment that nobody is to finish, and where its checksum is: 0 if that is right, modulo 0xffff
/// (RFC 9293 3.1; RFC 8200 8.1).
fn tcp_sum(frame: &[u8], vnet_header_bytes: usize) -> Option<(u64, usize)> {
    if vnet_header_bytes > 0 && frame.first().is_some_and(|flags| flags & NEEDS_CSUM != 0) {
        return None;
    }
    let packet::Packet::Ip(ip) = packet::Packet::parse_behind(frame, vnet_header_bytes) else { return None };
    let packet::Transport::Tcp(tcp) = ip.transport else { return None };
    let segment = &frame[tcp.header_at..tcp.payload.end];
    let address = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let length = (segment.len() as u32).to_be_bytes();
    let summed = [&address(ip.src)[..], &address(ip.dst), &length, &[0, 0, 0, 6], segment].concat();
    let words = summed.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)));
    Some((words.sum::<u64>() % 0xffff, tcp.header_at + 16))
}

/// Gives a TCP segment its right checksum.
fn finish(frame: &mut [u8], vnet_header_bytes: usize) {
    if let Some((_, at)) = tcp_sum(frame, vnet_header_bytes) {
        frame[at..at + 2].fill(0);
        let sum = tcp_sum(frame, vnet_header_bytes).map_or(0, |(sum, _)| sum);
        frame[at..at + 2].copy_from_slice(&(0xffff - sum as u16).to_be_bytes());
    }
}

/// A frame's length never changes, the checksum is as right as it was, and what is held comes out or stays: no panic,
/// whatever is said.
fn rewritten(pieces: Pieces) -> Said {
    let input = all(pieces);
    let (mut machine, mut now, mut said) = (Rewriter::new(), Instant::ZERO, Vec::new());
    let mut vnet_header_bytes = 0;
    for (who, _, after_ms, frame) in steps(&input) {
        now += Duration::from_millis(after_ms);
        let (len, mut frame) = (frame.len(), frame.to_vec());
        finish(&mut frame, vnet_header_bytes);
        let is_summed = |frame: &[u8]| tcp_sum(frame, vnet_header_bytes).is_none_or(|(sum, _)| sum == 0);
        match who % 6 {
            0 => {
                if machine.from_network(now, &mut frame) == rewriter::Forward::Now {
                    assert_eq!((frame.len(), is_summed(&frame)), (len, true));
                    said.push(brief(&frame));
                }
            }
            1 => {
                machine.from_guest(now, &mut frame);
                assert_eq!((frame.len(), is_summed(&frame)), (len, true));
                said.push(brief(&frame));
            }
            2 => machine.checkpoint(),
            3 => machine.takeover(),
            4 => machine.handle_timeout(now),
            _ => {
                vnet_header_bytes = [0, 10, 12][len % 3];
                machine = Rewriter::with(rewriter::Config { vnet_header_bytes, max_flows: 8, ..Default::default() });
            }
        }
        while let Some(frame) = machine.poll_output() {
            said.push(brief(&frame));
        }
    }
    said.push(format!("{} needed, {} untracked", machine.needed(), machine.untracked()));
    said
}
