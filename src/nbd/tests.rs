//! Both ends joined in memory, cut into pieces at will, and each end alone against nonsense.

use super::client::*;
use super::handshake::*;
use super::server::{Next, Server};
use super::transmission::*;
use super::*;
use crate::disk::MemoryDisk;
use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;

const SIZE_BYTES: u64 = 4096;

/// A server with its disk, as a driver would run it.
struct Ours {
    server: Server,
    input: BytesMut,
    disk: MemoryDisk,
}

impl Ours {
    fn new() -> Self {
        let server = Server::new(vec![Export::new("root", SIZE_BYTES)], Encryption::None);
        Self { server, input: BytesMut::new(), disk: MemoryDisk::new(SIZE_BYTES as usize) }
    }

    fn run(&mut self, out: &mut BytesMut) -> Result<(), NbdError> {
        loop {
            let negotiated = self.server.export().is_some();
            let next = if negotiated { self.server.serve(&mut self.disk)? } else { self.server.negotiate()? };
            out.extend_from_slice(self.server.output());
            self.server.sent();
            match next {
                Next::Input if self.input.is_empty() => return Ok(()),
                Next::Input => {
                    let room = self.server.room();
                    let piece = self.input.split_to(self.input.len().min(room.len()));
                    room[..piece.len()].copy_from_slice(&piece);
                    self.server.filled(piece.len());
                }
                Next::Output => {}
                Next::Busy | Next::Later | Next::StartTls => panic!("{next:?}"),
                Next::Closed => return Ok(()),
            }
        }
    }
}

/// Moves a piece of `from` into `to`; the pieces' sizes are the test's choice.
fn carry(from: &mut BytesMut, to: &mut BytesMut, piece: usize) {
    let piece = from.split_to(from.len().min(piece.max(1)));
    to.extend_from_slice(&piece);
}

/// A client past its negotiation with a scripted server of `info`.
fn ready(size_bytes: u64, flags: u16, limits: Limits) -> Client {
    let mut client = Client::new("root", limits).unwrap();
    let mut input = greeting(3);
    input.put_slice(&info_export(size_bytes, flags));
    input.put_slice(&option_reply(OPT_GO, REP_ACK, &[]));
    client.handle_input(&mut input).unwrap();
    assert!(client.export().is_some());
    while client.poll_output().is_some() {}
    client
}

pub(super) fn greeting(flags: u16) -> BytesMut {
    let mut bytes = BytesMut::from(&b"NBDMAGICIHAVEOPT"[..]);
    bytes.put_u16(flags);
    bytes
}

pub(super) fn option_reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u64(OPTION_REPLY_MAGIC);
    bytes.put_u32(option);
    bytes.put_u32(reply);
    bytes.put_u32(data.len() as u32);
    bytes.put_slice(data);
    bytes
}

pub(super) fn info_export(size_bytes: u64, flags: u16) -> Vec<u8> {
    let mut data = vec![0, 0];
    data.put_u64(size_bytes);
    data.put_u16(flags);
    option_reply(OPT_GO, REP_INFO, &data)
}

pub(super) fn reply(errno: u32, cookie: u64, data: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u32(SIMPLE_REPLY_MAGIC);
    bytes.put_u32(errno);
    bytes.put_u64(cookie);
    bytes.put_slice(data);
    bytes
}

fn sent(client: &mut Client) -> Vec<u8> {
    std::iter::from_fn(|| client.poll_output()).flatten().collect()
}

/// The kinds and cookies of the requests sent.
fn requests(client: &mut Client) -> Vec<(u16, u64)> {
    let mut decoder = Decoder::new(&Export::new("", u64::MAX), Framing::default());
    let sent = sent(client);
    let mut bytes = &sent[..];
    let decoded = std::iter::from_fn(|| decoder.decode(&mut bytes).unwrap()).collect::<Vec<_>>();
    assert!(bytes.is_empty());
    let kind = |command: &Command| match command {
        Command::Read { .. } => CMD_READ,
        Command::Write { .. } => CMD_WRITE,
        Command::Flush => CMD_FLUSH,
        other => panic!("{other:?}"),
    };
    decoded.iter().map(|request| (kind(&request.command), request.cookie)).collect()
}

#[test]
fn a_negotiation_byte_for_byte() {
    let mut client = Client::new("root", Limits::default()).unwrap();
    client.handle_input(&mut greeting(0xffff)).unwrap();
    let expected = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x04root\0\x01\0\x03";
    assert_eq!(sent(&mut client), expected);
    assert_eq!(client.read(0, 1), Err(SubmitError::NotReady));
}

#[test]
fn a_server_without_go_is_asked_by_export_name() {
    for (flags, tail) in [(3, 0), (1, 124), (0, 124)] {
        let mut client = Client::new("root", Limits::default()).unwrap();
        let mut input = greeting(flags);
        if flags & FLAG_FIXED_NEWSTYLE != 0 {
            input.put_slice(&option_reply(OPT_GO, REP_ERR_UNSUP, b"what?"));
        }
        client.handle_input(&mut input).unwrap();
        assert!(sent(&mut client).ends_with(b"IHAVEOPT\0\0\0\x01\0\0\0\x04root"));
        input.put_slice(&[0, 0, 0, 0, 0, 0, 2, 0, 0, 5]);
        input.put_bytes(0, tail);
        client.handle_input(&mut input).unwrap();
        let info = client.export().unwrap();
        assert_eq!((info.size_bytes, info.flags, info.block_sizes.max_bytes), (512, 5, MAX_PAYLOAD_BYTES));
    }
}

#[test]
fn a_server_that_misbehaves_ends_the_connection() {
    let long = vec![b'x'; MAX_OPTION_REPLY_BYTES as usize];
    let mut too_long = option_reply(OPT_GO, REP_ERR_UNKNOWN, &[]);
    too_long[16..20].copy_from_slice(&(MAX_OPTION_REPLY_BYTES + 1).to_be_bytes());
    let cases = [
        (too_long, "too long"),
        (option_reply(OPT_GO, REP_ERR_UNKNOWN, &long), "refused"),
        (option_reply(OPT_GO, REP_ACK, &[]), "acknowledged without NBD_INFO_EXPORT"),
        (option_reply(OPT_LIST, REP_ACK, &[]), "an option not asked for"),
        (option_reply(OPT_GO, REP_INFO, &[0]), "half a number"),
        (option_reply(OPT_GO, REP_INFO, &[0; 11]), "one byte short"),
        (option_reply(OPT_GO, REP_INFO, &[9, 9]).repeat(MAX_OPTION_REPLIES + 1), "endless"),
        ([info_export(1 << 63, 1), option_reply(OPT_GO, REP_ACK, &[])].concat(), "negative size"),
        (vec![0; 20], "magic"),
    ];
    for (bytes, case) in cases {
        let mut client = Client::new("root", Limits::default()).unwrap();
        let mut input = greeting(3);
        input.put_slice(&bytes);
        assert!(client.handle_input(&mut input).is_err(), "{case}");
        assert_eq!(client.flush(), Err(SubmitError::NotReady), "{case}");
    }
    assert!(Client::new("x".repeat(MAX_STRING_BYTES + 1), Limits::default()).is_err());
    let mut client = ready(SIZE_BYTES, 5, Limits::default());
    let (first, second) =
        (client.write(0, Bytes::from_static(b"a")).unwrap(), client.write(0, Bytes::from_static(b"b")));
    let held = second.unwrap();
    assert_eq!(client.handle_input(&mut reply(0, held, b"")), Err(NbdError::UnknownCookie { cookie: held }));
    let mut client = ready(SIZE_BYTES, 5, Limits::default());
    assert_eq!(client.handle_input(&mut reply(0, first, b"")), Err(NbdError::UnknownCookie { cookie: first }));
}

#[test]
fn what_depends_on_an_earlier_request_waits_for_it() {
    let mut client = ready(SIZE_BYTES, EXPORT_HAS_FLAGS | EXPORT_SEND_FLUSH, Limits::default());
    let data = |len: usize| Bytes::from(vec![b'w'; len]);
    let first = client.write(0, data(100)).unwrap();
    let apart = client.write(100, data(100)).unwrap();
    let over_both = client.write(99, data(2)).unwrap();
    let read = client.read(100, 1).unwrap();
    let flush = client.flush().unwrap();
    let free = client.read(500, 10).unwrap();
    assert_eq!(requests(&mut client), [(CMD_WRITE, first), (CMD_WRITE, apart), (CMD_READ, free)]);
    client.handle_input(&mut reply(0, apart, b"")).unwrap();
    assert_eq!(requests(&mut client), []);
    client.handle_input(&mut reply(28, first, b"")).unwrap();
    assert_eq!(requests(&mut client), [(CMD_WRITE, over_both)], "the read overlaps it, the flush covers it");
    client.handle_input(&mut reply(0, over_both, b"")).unwrap();
    assert_eq!(requests(&mut client), [(CMD_READ, read), (CMD_FLUSH, flush)]);
    client.handle_input(&mut reply(0, read, b"R")).unwrap();
    let done: Vec<_> = std::iter::from_fn(|| client.poll_completion()).collect();
    assert_eq!(done.iter().map(|one| one.cookie).collect::<Vec<_>>(), [apart, first, over_both, read]);
    assert_eq!((done[1].result, &done[3].data[..]), (Err(Errno::NoSpace), &b"R"[..]));
    assert_eq!(client.under_way(), 2);
    client.disconnect();
    assert_eq!(sent(&mut client)[4..8], [0, 0, 0, 2]);
}

#[test]
fn each_limit_of_a_request_holds_at_its_edge() {
    let size_bytes = 2 * u64::from(MAX_PAYLOAD_BYTES);
    let limits = Limits { requests: 3, bytes: 100 };
    let mut client = ready(size_bytes, EXPORT_HAS_FLAGS, limits);
    assert_eq!(client.read(0, MAX_PAYLOAD_BYTES + 1), Err(SubmitError::TooLong));
    assert_eq!(client.read(size_bytes - 1, 2), Err(SubmitError::OutOfRange));
    assert_eq!(client.read(u64::MAX, 2), Err(SubmitError::OutOfRange));
    assert_eq!(client.flush(), Err(SubmitError::Unsupported));
    let alone = client.read(0, MAX_PAYLOAD_BYTES).unwrap();
    assert_eq!(client.read(0, 0), Err(SubmitError::Full));
    client.handle_input(&mut reply(5, alone, b"")).unwrap();
    client.read(0, 60).unwrap();
    assert_eq!(client.read(0, 41), Err(SubmitError::Full));
    client.read(0, 40).unwrap();
    client.read(0, 0).unwrap();
    assert_eq!(client.read(0, 0), Err(SubmitError::Full));
    let mut client = ready(64, EXPORT_HAS_FLAGS | EXPORT_READ_ONLY, limits);
    assert_eq!(client.write(0, Bytes::from_static(b"x")), Err(SubmitError::ReadOnly));
}

/// Each flag alone, and what it allows.
#[test]
fn what_the_export_does_not_offer_is_refused_here() {
    let offered = |flags: u16| {
        let mut client = ready(SIZE_BYTES, EXPORT_HAS_FLAGS | flags, Limits::default());
        let all = [
            client.write_zeroes(0, 1, false),
            client.trim(1, 1),
            client.write_fua(2, Bytes::from_static(b"x")),
            client.flush(),
        ];
        all.map(|one| match one {
            Ok(_) => true,
            Err(SubmitError::Unsupported) => false,
            Err(other) => panic!("{other}"),
        })
    };
    assert_eq!(offered(0), [false; 4]);
    assert_eq!(offered(EXPORT_SEND_WRITE_ZEROES), [true, false, false, false]);
    assert_eq!(offered(EXPORT_SEND_TRIM), [false, true, false, false]);
    assert_eq!(offered(EXPORT_SEND_FUA), [false, false, true, false]);
    assert_eq!(offered(EXPORT_SEND_FLUSH), [false, false, false, true]);
    let flags = EXPORT_READ_ONLY | EXPORT_SEND_TRIM | EXPORT_SEND_WRITE_ZEROES;
    let mut client = ready(SIZE_BYTES, flags, Limits::default());
    assert_eq!(client.trim(0, 1), Err(SubmitError::ReadOnly));
    assert_eq!(client.write_zeroes(0, 1, true), Err(SubmitError::ReadOnly));
}

#[test]
fn zeroes_and_trims_are_writes_without_a_payload() {
    let flags = EXPORT_SEND_FLUSH | EXPORT_SEND_TRIM | EXPORT_SEND_WRITE_ZEROES | EXPORT_SEND_FUA;
    let size_bytes = 1 << 40;
    let mut client = ready(size_bytes, flags, Limits { requests: 8, bytes: 1 });
    // Longer than any payload, and none of it counts as under way.
    let zeroes = client.write_zeroes(0, u32::MAX, true).unwrap();
    let trim = client.trim(u64::from(u32::MAX), u32::MAX).unwrap();
    let read = client.read(1, 1).unwrap();
    let over = client.write_zeroes(u64::from(u32::MAX) - 1, 1, false).unwrap();
    let flush = client.flush().unwrap();
    assert_eq!(client.trim(size_bytes - 1, 2), Err(SubmitError::OutOfRange));
    let header = |flags: u8, kind: u8, cookie: u64, offset: u64, len_bytes: u32| {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, flags, 0, kind];
        bytes.put_u64(cookie);
        bytes.put_u64(offset);
        bytes.put_u32(len_bytes);
        bytes
    };
    let both = [header(2, 6, zeroes, 0, u32::MAX), header(0, 4, trim, u32::MAX.into(), u32::MAX)].concat();
    assert_eq!(sent(&mut client), both, "what overlaps them waits, and so does the flush");
    client.handle_input(&mut reply(0, zeroes, b"")).unwrap();
    let free = [header(0, 0, read, 1, 1), header(0, 6, over, u64::from(u32::MAX) - 1, 1)].concat();
    assert_eq!(sent(&mut client), free);
    client.handle_input(&mut reply(0, over, b"")).unwrap();
    assert_eq!(sent(&mut client), [0; 0], "a flush covers a trim, too");
    client.handle_input(&mut reply(0, trim, b"")).unwrap();
    assert_eq!(sent(&mut client), header(0, 3, flush, 0, 0));
    client.handle_input(&mut reply(0, read, b"R")).unwrap();
    let durable = client.write_fua(7, Bytes::from_static(b"x")).unwrap();
    assert_eq!(sent(&mut client), [header(1, 1, durable, 7, 1), b"x".to_vec()].concat());
}

#[derive(Debug, Clone)]
enum Op {
    Write(u64, u8, usize),
    Zero(u64, u32),
    Read(u64, u32),
    Flush,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..SIZE_BYTES, any::<u8>(), 0_usize..600)
            .prop_map(|(at, byte, len)| { Op::Write(at, byte, len.min((SIZE_BYTES - at) as usize)) }),
        (0..SIZE_BYTES, 0_u32..600).prop_map(|(at, len)| Op::Read(at, len.min((SIZE_BYTES - at) as u32))),
        (0..SIZE_BYTES, 0_u32..600).prop_map(|(at, len)| Op::Zero(at, len.min((SIZE_BYTES - at) as u32))),
        Just(Op::Flush),
    ]
}

proptest! {
    #[test]
    fn joined_ends_behave_as_one_disk(
        ops in prop::collection::vec(op(), 1..40),
        pieces in prop::collection::vec(1_usize..200, 1..20),
    ) {
        let (mut server, mut client) = (Ours::new(), Client::new("root", Limits { requests: 5, bytes: 1000 }).unwrap());
        let (mut up, mut down, mut client_input) = (BytesMut::new(), BytesMut::new(), BytesMut::new());
        let mut model = vec![0; SIZE_BYTES as usize];
        let (mut todo, mut expected, mut done) = (ops.iter().peekable(), std::collections::HashMap::new(), 0);
        let mut pieces = pieces.iter().cycle();
        while done < ops.len() {
            server.run(&mut down).unwrap();
            carry(&mut down, &mut client_input, *pieces.next().unwrap());
            client.handle_input(&mut client_input).unwrap();
            while let Some(completion) = client.poll_completion() {
                prop_assert_eq!(completion.result, Ok(()));
                prop_assert_eq!(expected.remove(&completion.cookie), Some(completion.data.to_vec()));
                done += 1;
            }
            while let Some(op) = todo.peek() {
                let submitted = match op {
                    Op::Write(at, byte, len) => client.write(*at, vec![*byte; *len].into()),
                    Op::Read(at, len) => client.read(*at, *len),
                    Op::Zero(at, len) => client.write_zeroes(*at, *len, false),
                    Op::Flush => client.flush(),
                };
                let Ok(cookie) = submitted else { break };
                let mut data = vec![];
                match todo.next().unwrap() {
                    Op::Write(at, byte, len) => model[*at as usize..*at as usize + len].fill(*byte),
                    Op::Read(at, len) => data = model[*at as usize..(*at + u64::from(*len)) as usize].to_vec(),
                    Op::Zero(at, len) => model[*at as usize..(*at + u64::from(*len)) as usize].fill(0),
                    Op::Flush => {}
                }
                expected.insert(cookie, data);
            }
            up.extend(sent(&mut client));
            carry(&mut up, &mut server.input, *pieces.next().unwrap());
        }
        prop_assert_eq!(server.disk.bytes(), &model[..]);
    }

    #[test]
    fn nonsense_is_an_error_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), valid in 0_usize..60) {
        let mut server = Ours::new();
        let mut start = Vec::from(&b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04root\0\0\x25\x60\x95\x13\0\0\0\x01"[..]);
        start.truncate(valid);
        server.input.extend_from_slice(&[&start[..], &bytes].concat());
        let mut out = BytesMut::new();
        let _ = server.run(&mut out);
        prop_assert!(out.len() < 64 << 10);

        let mut client = Client::new("root", Limits::default()).unwrap();
        let mut start = [&greeting(3)[..], &info_export(SIZE_BYTES, 5), &option_reply(OPT_GO, REP_ACK, &[])].concat();
        start.truncate(valid * 2);
        let _ = client.handle_input(&mut BytesMut::from(&[&start[..], &bytes].concat()[..]));
        prop_assert!(sent(&mut client).len() < 256);
    }
}
