//! Large writes whose buffers a disk keeps, between others, whatever the socket brings at once.

use super::handshake::{Encryption, Export};
use super::server::{Next, Server};
use super::*;
use crate::disk::{Disk, DiskError, MemoryDisk};
use crate::pool::Block;

const SIZE_BYTES: usize = 8 << 20;

/// Keeps what it can, and is busy now and then.
struct Keeper {
    disk: MemoryDisk,
    kept: Vec<(u64, Block)>,
    asked: u32,
}

impl Keeper {
    fn new() -> Self {
        Self { disk: MemoryDisk::new(SIZE_BYTES), kept: Vec::new(), asked: 0 }
    }
}

impl Disk for Keeper {
    fn size_bytes(&self) -> u64 {
        SIZE_BYTES as u64
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.disk.read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.disk.write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn keeps_blocks(&self) -> bool {
        true
    }
    fn write_block(&mut self, offset: u64, block: &mut Block) -> Result<(), DiskError> {
        self.asked += 1;
        match self.asked % 4 {
            0 => Err(DiskError::Busy),
            // Not every disk that could keep one does.
            1 => self.disk.write(offset, block),
            _ => {
                self.disk.write(offset, block)?;
                self.kept.push((offset, std::mem::take(block)));
                Ok(())
            }
        }
    }
}

struct Noise(u64);

impl Noise {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// A server whose client has chosen its export.
fn negotiated() -> Server {
    let mut server = Server::new(vec![Export::new("disk", SIZE_BYTES as u64)], Encryption::None);
    let hello = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk";
    server.room()[..hello.len()].copy_from_slice(hello);
    server.filled(hello.len());
    while server.export().is_none() {
        let _ = server.negotiate().unwrap();
        server.sent();
    }
    server
}

fn put(stream: &mut Vec<u8>, flags: u16, cookie: u64, offset: usize, data: &[u8]) {
    stream.extend(REQUEST_MAGIC.to_be_bytes());
    stream.extend([flags.to_be_bytes(), CMD_WRITE.to_be_bytes()].concat());
    stream.extend([cookie.to_be_bytes(), (offset as u64).to_be_bytes()].concat());
    stream.extend((data.len() as u32).to_be_bytes());
    stream.extend(data);
}

/// Sends `stream` as it would come from a socket with `at_once` bytes in it at most; returns what was answered.
fn converse(server: &mut Server, disk: &mut Keeper, stream: &[u8], mut at_once: impl FnMut() -> usize) -> Vec<u8> {
    let (mut sent, mut said) = (0, Vec::new());
    loop {
        let next = server.serve(disk).unwrap();
        said.extend(server.output());
        server.sent();
        match next {
            Next::Input if sent == stream.len() => return said,
            Next::Input => {
                let room = server.room();
                assert!(!room.is_empty(), "a read of nothing would look like the end");
                let bytes = at_once().min(room.len()).min(stream.len() - sent);
                room[..bytes].copy_from_slice(&stream[sent..sent + bytes]);
                server.filled(bytes);
                sent += bytes;
            }
            Next::Output | Next::Busy => {}
            next => panic!("{next:?}"),
        }
    }
}

#[test]
fn what_is_kept_and_what_is_copied_is_what_was_sent() {
    let sizes = [1, 512, 4096, 65_536, 300_000, 524_288, 600_000, 1 << 20, (1 << 20) + 512, 2 << 20];
    for seed in 1..=40 {
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let (mut server, mut disk) = (negotiated(), Keeper::new());
        let (mut model, mut stream, mut wanted) = (vec![0; SIZE_BYTES], Vec::new(), Vec::new());
        for cookie in 0..40_u64 {
            let len = sizes[noise.below(sizes.len())];
            let offset = noise.below(SIZE_BYTES - len + 1);
            let data: Vec<u8> = (0..len).map(|at| (at as u64 * 31 + cookie * 7 + seed) as u8).collect();
            model[offset..offset + len].copy_from_slice(&data);
            put(&mut stream, if noise.below(8) == 0 { CMD_FLAG_FUA } else { 0 }, cookie, offset, &data);
            wanted.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
            wanted.extend([[0; 4].as_slice(), &cookie.to_be_bytes()].concat());
        }
        let most = [1 << 22, 200_000, 65_536][seed as usize % 3];
        let said = converse(&mut server, &mut disk, &stream, || 1 + noise.below(most));
        assert!(said == wanted, "seed {seed}: each is answered once, and well");
        assert!(disk.disk.bytes() == model, "seed {seed}: the disk has other bytes");
        assert!(!disk.kept.is_empty(), "seed {seed}: nothing was kept");
        // What was kept is no buffer that later bytes came into.
        for (offset, block) in &disk.kept {
            let first = u64::from(block[0]);
            assert!(
                block.iter().zip(0_u64..).all(|(byte, at)| *byte == (at * 31 + first) as u8),
                "seed {seed}, {offset}"
            );
        }
    }
}

/// A buffer comes back as large as it was, and stays if a request has begun in it. What is behind a write in it may be more than a
/// new one has room for.
#[test]
fn much_behind_a_write_finds_room() {
    const MIB: usize = 1 << 20;
    let (mut server, mut disk) = (negotiated(), Keeper::new());
    let mut send = |stream: &[u8]| {
        let said = converse(&mut server, &mut disk, stream, || usize::MAX);
        // Nobody keeps anything for long.
        disk.kept.clear();
        said.len() / 16
    };
    let write = |lens: &[usize]| {
        let mut stream = Vec::new();
        lens.iter().for_each(|len| put(&mut stream, 0, 1, 0, &vec![*len as u8; *len]));
        stream
    };
    assert_eq!(send(&write(&[MIB])), 1, "copied");
    assert_eq!(send(&write(&[7 * MIB])), 1, "kept, and its large buffer given back");
    let (last, many) = (write(&[MIB]), write(&[4 * MIB, 4 * MIB]));
    let (begun, rest) = many.split_at(10);
    assert_eq!(send(&[&last, begun].concat()), 1, "kept, and the large buffer is next");
    assert_eq!(send(&rest[..6 * MIB - 100_000]), 1, "one, and much of another");
}
