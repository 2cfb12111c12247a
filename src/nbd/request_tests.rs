//! Requests against a disk: what is answered, and that the next one is found.

use crate::disk::{Disk, DiskError, MemoryDisk};
use crate::nbd::handshake::Export;
use crate::nbd::reply::{Replies, Served, serve};
use crate::nbd::transmission::*;
use crate::nbd::*;
use bytes::BufMut;
use proptest::prelude::*;

fn request(flags: u16, kind: u16, cookie: u64, offset: u64, len_bytes: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
    bytes.put_u16(flags);
    bytes.put_u16(kind);
    bytes.put_u64(cookie);
    bytes.put_u64(offset);
    bytes.put_u32(len_bytes);
    bytes
}

fn reply(errno: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x67, 0x44, 0x66, 0x98];
    bytes.put_u32(errno);
    bytes.put_u64(cookie);
    bytes.put_slice(data);
    bytes
}

fn simple(export: &Export) -> Decoder {
    Decoder::new(export, Framing::default())
}

/// Feeds everything and serves everything.
fn converse(decoder: &mut Decoder, disk: &mut dyn Disk, mut input: &[u8]) -> Vec<u8> {
    let mut out = Replies::default();
    while let Some(request) = decoder.decode(&mut input).unwrap() {
        assert_eq!(serve(&request, decoder.framing(), disk, &mut out), Served::Replied);
    }
    assert!(input.is_empty());
    out.as_slice().to_vec()
}

#[test]
fn writes_are_read_back() {
    let (mut decoder, mut disk) = (simple(&Export::new("", 64)), MemoryDisk::new(64));
    let mut said = request(0, CMD_WRITE, 7, 60, 4);
    said.extend(b"abcd");
    said.extend(request(1, CMD_READ, 8, 59, 5));
    said.extend(request(0, CMD_FLUSH, 9, 0, 0));
    said.extend(request(0, CMD_READ, 10, 64, 0));
    let heard = [reply(0, 7, b""), reply(0, 8, b"\0abcd"), reply(0, 9, b""), reply(0, 10, b"")];
    assert_eq!(converse(&mut decoder, &mut disk, &said), heard.concat());
    let bye = request(0, CMD_DISC, 1, 2, 3);
    let bye = decoder.decode(&mut &bye[..]).unwrap().unwrap();
    let mut out = Replies::default();
    assert_eq!((serve(&bye, &Framing::default(), &mut disk, &mut out), out.len()), (Served::Disconnect, 0));
}

#[test]
fn a_refused_request_is_answered_and_the_next_one_is_found() {
    let size = u64::from(MAX_PAYLOAD_BYTES) + 512;
    let cases = [
        (0, CMD_READ, size - 1, 1, None),
        (0, CMD_READ, size - 1, 2, Some(Errno::Invalid)),
        (0, CMD_READ, u64::MAX, 2, Some(Errno::Invalid)),
        (0, CMD_READ, 0, MAX_PAYLOAD_BYTES, None),
        (0, CMD_READ, 0, MAX_PAYLOAD_BYTES + 1, Some(Errno::Invalid)),
        (2, CMD_READ, 0, 1, Some(Errno::Invalid)),
        (0, CMD_WRITE, size - 1, 2, Some(Errno::NoSpace)),
        (0, CMD_WRITE, u64::MAX - 1, 4, Some(Errno::NoSpace)),
        (0, CMD_WRITE, 0, MAX_PAYLOAD_BYTES, None),
        (0, CMD_WRITE, 0, MAX_PAYLOAD_BYTES + 1, Some(Errno::Invalid)),
        (0, CMD_WRITE, 0, MAX_SKIPPED_PAYLOAD_BYTES as u32, Some(Errno::Invalid)),
        (4, CMD_WRITE, 0, 9, Some(Errno::Invalid)),
        (0, CMD_TRIM, 0, 512, None),
        (1, CMD_TRIM, size - 1, 1, None),
        (2, CMD_TRIM, 0, 512, Some(Errno::Invalid)),
        (0, CMD_TRIM, size - 1, 2, Some(Errno::Invalid)),
        (0, CMD_CACHE, 0, u32::MAX, Some(Errno::Invalid)),
        (0, CMD_CACHE, 0, MAX_PAYLOAD_BYTES + 1, None),
        (3, CMD_WRITE_ZEROES, 0, size as u32, None),
        (0, CMD_WRITE_ZEROES, 1, size as u32, Some(Errno::NoSpace)),
        (16, CMD_WRITE_ZEROES, 0, 1, Some(Errno::Invalid)),
        (0, CMD_BLOCK_STATUS, 0, 1, Some(Errno::Invalid)),
        (0, 8, 0, 512, Some(Errno::Invalid)),
        (0, 99, u64::MAX, u32::MAX, Some(Errno::Invalid)),
    ];
    let (mut decoder, mut disk) = (simple(&Export::new("", size)), MemoryDisk::new(size as usize));
    for (flags, kind, offset, len, errno) in cases {
        let mut said = request(flags, kind, 5, offset, len);
        if kind == CMD_WRITE {
            said.resize(said.len() + len as usize, b'x');
        }
        said.extend(request(0, CMD_FLUSH, 6, 0, 0));
        let heard = converse(&mut decoder, &mut disk, &said);
        assert_eq!(heard[4..8], errno.map_or(0, Errno::to_wire).to_be_bytes(), "{kind} {offset} {len}");
        assert_eq!(heard[heard.len() - 16..], reply(0, 6, b""));
    }
}

#[test]
fn a_payload_nobody_would_send_closes() {
    let mut decoder = simple(&Export::new("", 64));
    let header = request(0, CMD_WRITE, 1, 0, MAX_SKIPPED_PAYLOAD_BYTES as u32 + 1);
    assert!(matches!(decoder.decode(&mut &header[..]), Err(NbdError::TooLong { .. })));
    let mut decoder = simple(&Export::new("", 64));
    assert!(matches!(decoder.decode(&mut &[0; 28][..]), Err(NbdError::BadMagic { .. })));
}

#[test]
fn a_read_only_export_takes_no_writes() {
    let mut export = Export::new("", 64);
    export.read_only = true;
    let mut said = request(0, CMD_WRITE, 1, 0, 2);
    said.extend(b"no");
    let heard = converse(&mut simple(&export), &mut MemoryDisk::new(64), &said);
    assert_eq!(heard, reply(1, 1, b""));
}

/// Fails every call, or counts flushes.
struct Moody(Option<fn() -> DiskError>, usize);
impl Moody {
    fn answer(&self) -> Result<(), DiskError> {
        self.0.map_or(Ok(()), |error| Err(error()))
    }
}
impl Disk for Moody {
    fn size_bytes(&self) -> u64 {
        64
    }
    fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), DiskError> {
        self.answer()
    }
    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        self.answer()
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.1 += 1;
        self.answer()
    }
}

#[test]
fn disk_failures_become_the_protocols_errors_and_carry_no_data() {
    let cases: [(fn() -> DiskError, u32); 4] = [
        (|| DiskError::NoSpace { what: "spill".into() }, 28),
        (|| DiskError::Fenced { theirs: 1, ours: 2 }, 1),
        (|| DiskError::OutOfRange { offset: 0, len_bytes: 1, size_bytes: 0 }, 22),
        (|| DiskError::io("read", std::io::Error::other("broken")), 5),
    ];
    for (error, errno) in cases {
        let said = request(0, CMD_READ, 1, 0, 8);
        let heard = converse(&mut simple(&Export::new("", 64)), &mut Moody(Some(error), 0), &said);
        assert_eq!(heard, reply(errno, 1, b""));
    }
    let mut out = Replies::default();
    let flush = Request { cookie: 1, offset: 0, command: Command::Flush };
    let busy = &mut Moody(Some(|| DiskError::Busy), 0);
    assert_eq!(serve(&flush, &Framing::default(), busy, &mut out), Served::Busy);
    assert!(out.is_empty(), "a busy disk is asked again, the client hears nothing");
}

#[test]
fn fua_reaches_the_medium_and_a_plain_write_does_not() {
    let mut disk = Moody(None, 0);
    let mut flushes = 0;
    for kind in [CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM] {
        for fua in [0, 1] {
            let mut said = request(fua, kind, 1, 0, 1);
            said.extend((kind == CMD_WRITE).then_some(b'x'));
            assert_eq!(converse(&mut simple(&Export::new("", 64)), &mut disk, &said), reply(0, 1, b""));
            flushes += usize::from(fua);
            assert_eq!(disk.1, flushes);
        }
    }
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x66, 0x8e, 0x33, 0xef];
    bytes.put_u16(flags);
    bytes.put_u16(kind);
    bytes.put_u64(cookie);
    bytes.put_u32(payload.len() as u32);
    bytes.put_slice(payload);
    bytes
}

fn structured(contexts: &[Context]) -> Framing {
    Framing { structured: true, extended: false, contexts: contexts.to_vec() }
}

/// 192 KiB: a hole, data, a hole, 64 KiB each.
fn sparse() -> (tempfile::TempDir, crate::disk::FileDisk) {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = crate::disk::FileDisk::open_or_create(&dir.path().join("sparse"), 192 << 10).unwrap();
    disk.write(64 << 10, &[7; 64 << 10]).unwrap();
    (dir, disk)
}

#[test]
fn holes_cost_no_bytes_unless_the_client_wants_one_chunk() {
    const K64: u64 = 64 << 10;
    let (_dir, mut disk) = sparse();
    let mut decoder = Decoder::new(&Export::new("", 3 * K64), structured(&[]));
    let hole = |at: u64| [&at.to_be_bytes()[..], &(K64 as u32).to_be_bytes()].concat();
    let data = [&K64.to_be_bytes()[..], &[7; 64 << 10], &[0; 64 << 10]].concat();
    let chunks = [chunk(0, 2, 9, &hole(0)), chunk(1, 1, 9, &data)].concat();
    let said = request(0, CMD_READ, 9, 0, 3 * K64 as u32);
    assert!(converse(&mut decoder, &mut disk, &said) == chunks);
    let whole = converse(&mut decoder, &mut disk, &request(CMD_FLAG_DF, CMD_READ, 9, 0, 3 * K64 as u32));
    let mut expected = vec![0; 8 + 3 * K64 as usize];
    expected[8 + K64 as usize..][..K64 as usize].fill(7);
    assert!(whole == chunk(1, 1, 9, &expected));
    let last = converse(&mut decoder, &mut disk, &request(0, CMD_READ, 9, 2 * K64, K64 as u32));
    assert_eq!(last, chunk(1, 2, 9, &hole(2 * K64)));
    let nothing = converse(&mut decoder, &mut disk, &request(0, CMD_READ, 9, 5, 0));
    assert_eq!(nothing, chunk(1, 0, 9, &[]));
}

#[test]
fn extents_are_told_in_every_context_that_was_chosen() {
    const K64: u32 = 64 << 10;
    let (_dir, mut disk) = sparse();
    let export = Export::new("", 192 << 10);
    let mut decoder = Decoder::new(&export, structured(&[Context::Allocation, Context::Changed]));
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
    let heard = converse(&mut decoder, &mut disk, &request(0, CMD_BLOCK_STATUS, 3, 0, 3 * K64));
    let allocation = words(&[1, K64, 3, K64, 0, K64, 3]);
    // A disk without checkpoints differs from all of them.
    let changed = words(&[2, 3 * K64, 1]);
    assert_eq!(heard, [chunk(0, 5, 3, &allocation), chunk(1, 5, 3, &changed)].concat());
    let mut decoder = Decoder::new(&export, structured(&[Context::Allocation]));
    let one = converse(&mut decoder, &mut disk, &request(CMD_FLAG_REQ_ONE, CMD_BLOCK_STATUS, 3, 100, 2 * K64));
    assert_eq!(one, chunk(1, 5, 3, &words(&[1, K64 - 100, 3])));
}

#[test]
fn errors_carry_their_text_and_nothing_of_what_was_read() {
    let mut decoder = Decoder::new(&Export::new("", 64), structured(&[]));
    let heard = converse(&mut decoder, &mut MemoryDisk::new(64), &request(0, CMD_READ, 1, 60, 5));
    assert_eq!(heard, chunk(1, CHUNK_ERROR, 1, b"\0\0\0\x16\0\x0cpast the end"));
    let broken = &mut Moody(Some(|| DiskError::NoSpace { what: "spill".into() }), 0);
    let heard = converse(&mut decoder, broken, &request(0, CMD_READ, 1, 0, 8));
    assert_eq!(heard, chunk(1, CHUNK_ERROR, 1, b"\0\0\0\x1c\0\x17no space left for spill"));
}

#[test]
fn what_is_no_faster_than_writing_is_refused_to_those_who_ask() {
    let mut export = Export::new("", 64);
    export.fast_zero = true;
    let said = request(CMD_FLAG_FAST_ZERO, CMD_WRITE_ZEROES, 1, 0, 8);
    let mut disk = MemoryDisk::new(64);
    disk.write(0, &[1; 64]).unwrap();
    assert_eq!(converse(&mut simple(&export), &mut disk, &said), reply(95, 1, b""));
    assert_eq!(disk.bytes()[..9], [1; 9]);
    let said = request(0, CMD_WRITE_ZEROES, 1, 0, 8);
    assert_eq!(converse(&mut simple(&export), &mut disk, &said), reply(0, 1, b""));
    assert_eq!(disk.bytes()[..9], [0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let (_dir, mut sparse) = sparse();
    export.size_bytes = 192 << 10;
    let said = request(CMD_FLAG_FAST_ZERO, CMD_WRITE_ZEROES, 1, 64 << 10, 64 << 10);
    assert_eq!(converse(&mut simple(&export), &mut sparse, &said), reply(0, 1, b""));
    assert_eq!(sparse.extents(0, 192 << 10, 4).unwrap().len(), 1);
}

#[test]
fn extended_headers_have_long_lengths_and_their_own_magic() {
    fn request(flags: u16, kind: u16, offset: u64, len_bytes: u64) -> Vec<u8> {
        let mut bytes = vec![0x21, 0xe4, 0x1c, 0x71];
        bytes.put_u16(flags);
        bytes.put_u16(kind);
        bytes.put_u64(77);
        bytes.put_u64(offset);
        bytes.put_u64(len_bytes);
        bytes
    }
    fn chunk(kind: u16, offset: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x6e, 0x8a, 0x27, 0x8c, 0, 1];
        bytes.put_u16(kind);
        bytes.put_u64(77);
        bytes.put_u64(offset);
        bytes.put_u64(payload.len() as u64);
        bytes.put_slice(payload);
        bytes
    }
    let size_bytes = 5_u64 << 30;
    let dir = tempfile::tempdir().unwrap();
    let mut disk = crate::disk::FileDisk::open_or_create(&dir.path().join("large"), size_bytes).unwrap();
    let framing = Framing { structured: true, extended: true, contexts: vec![Context::Allocation] };
    let mut decoder = Decoder::new(&Export::new("", size_bytes), framing);
    let mut write = request(CMD_FLAG_PAYLOAD_LEN, CMD_WRITE, 4096, 3);
    write.extend(b"abc");
    assert_eq!(converse(&mut decoder, &mut disk, &write), chunk(CHUNK_NONE, 4096, &[]));
    let read = converse(&mut decoder, &mut disk, &request(0, CMD_READ, 4097, 2));
    assert_eq!(read, chunk(CHUNK_OFFSET_DATA, 4097, b"\0\0\0\0\0\0\x10\x01bc"));
    let zeroed = converse(&mut decoder, &mut disk, &request(0, CMD_WRITE_ZEROES, 0, size_bytes));
    assert_eq!(zeroed, chunk(CHUNK_NONE, 0, &[]));
    let words = [u64::from(1_u32) << 32 | 1, size_bytes, 3];
    let status = words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
    let heard = converse(&mut decoder, &mut disk, &request(0, CMD_BLOCK_STATUS, 0, size_bytes));
    assert_eq!(heard, chunk(CHUNK_BLOCK_STATUS_EXT, 0, &status));
    // A write without the flag has no payload behind it; any other request with the flag has.
    let heard = converse(&mut decoder, &mut disk, &request(0, CMD_WRITE, 0, 3));
    assert_eq!(heard[4..8], [0, 1, 0x80, 1]);
    let mut odd = request(CMD_FLAG_PAYLOAD_LEN, CMD_FLUSH, 0, 4);
    odd.extend(b"junk");
    odd.extend(request(0, CMD_FLUSH, 0, 0));
    let heard = converse(&mut decoder, &mut disk, &odd);
    assert!(heard[4..8] == [0, 1, 0x80, 1] && heard.ends_with(&chunk(CHUNK_NONE, 0, &[])));
}

/// Requests of all kinds, most of them nearly right.
fn any_request(extended: bool) -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![4 => Just(0_u16), 2 => 0_u16..64, 1 => any::<u16>()];
    let kind = prop_oneof![8 => 0_u16..9, 1 => any::<u16>()];
    let offset = prop_oneof![6 => 0_u64..70, 1 => Just(u64::MAX)];
    let len = prop_oneof![8 => 0_u32..70, 1 => Just(MAX_PAYLOAD_BYTES + 1)];
    (flags, kind, any::<u64>(), offset, len).prop_map(move |(flags, kind, cookie, offset, len)| {
        let mut bytes = Vec::new();
        bytes.put_u32(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC });
        bytes.put_u16(flags);
        bytes.put_u16(if kind == CMD_DISC { CMD_FLUSH } else { kind });
        bytes.put_u64(cookie);
        bytes.put_u64(offset);
        if extended {
            bytes.put_u64(len.into());
        } else {
            bytes.put_u32(len);
        }
        let payload = if extended { flags & CMD_FLAG_PAYLOAD_LEN != 0 } else { kind == CMD_WRITE };
        if payload {
            // One byte value a request tells in the disk whose payload was taken for whose.
            bytes.resize(bytes.len() + len as usize, cookie as u8);
        }
        bytes
    })
}

proptest! {
    /// However a stream is cut, the same is carried out and the same is answered; and each request has one last chunk.
    #[test]
    fn cut_anywhere_the_answers_are_the_same(
        (which, requests) in (0..3_usize).prop_flat_map(|which| (Just(which), prop::collection::vec(any_request(which == 2), 0..12))),
        pieces in prop::collection::vec(1..90_usize, 1..20),
    ) {
        let contexts = vec![Context::Allocation, Context::Changed];
        let framing = Framing { structured: which > 0, extended: which == 2, contexts };
        let mut export = Export::new("", 64);
        export.fast_zero = true;
        let stream = requests.concat();
        let (mut decoder, mut disk) = (Decoder::new(&export, framing.clone()), MemoryDisk::new(64));
        let whole = converse(&mut decoder, &mut disk, &stream);

        let (mut decoder, mut other) = (Decoder::new(&export, framing), MemoryDisk::new(64));
        let (mut held, mut out, mut rest) = (Vec::new(), Replies::default(), &stream[..]);
        let mut pieces = pieces.iter().cycle();
        while !rest.is_empty() {
            // What is long is skipped: in its own pace.
            let piece = if rest.len() > 4096 { 1 << 20 } else { *pieces.next().unwrap() };
            let (now, later) = rest.split_at(piece.min(rest.len()));
            rest = later;
            held.extend_from_slice(now);
            let mut input = &held[..];
            while let Some(request) = decoder.decode(&mut input).unwrap() {
                prop_assert_eq!(serve(&request, decoder.framing(), &mut other, &mut out), Served::Replied);
            }
            let taken = held.len() - input.len();
            held.drain(..taken);
            prop_assert!(held.len() < 200, "what is refused is not kept");
        }
        prop_assert!(held.is_empty());
        prop_assert_eq!(disk.bytes(), other.bytes());
        prop_assert!(out.as_slice() == whole);
    }
}
