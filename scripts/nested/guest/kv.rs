//! The key-value store on the guest's disk: an append-only log of records, an index of it in memory.
//!
//! ```text
//! sector 0     superblock: magic, log id, checksum
//! sector 1...  record: magic, checksum, log id, sequence, lengths, name, value, zeroes up to the next sector
//!              the first thing that is not the next record ends the log
//! ```
//!
//! The disk is what the tests are about, so nothing here is answered from memory: it is opened with `O_DIRECT` and
//! `O_DSYNC`, a write is on the disk when it returns, and a value is read from the disk each time and checked.
//! The trap of `O_DIRECT`: memory, offset and length must all be multiples of the disk's sector, hence [`Sectors`].
//!
//! Source: open(2), O_DIRECT and O_DSYNC; the record's guards are those of `src/hypervisor/embedded/kv.rs`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// Longest name, in bytes.
pub const NAME_MAX_BYTES: usize = 64;
/// Longest value, in bytes.
pub const VALUE_MAX_BYTES: usize = 65536;
/// Most names: the guest has 128 MiB.
const NAMES_MAX: usize = 100_000;

const SECTOR_BYTES: usize = 512;
const ALIGN_BYTES: usize = 4096;
const HEAD_BYTES: usize = 32;
const SUPER_MAGIC: &[u8; 8] = b"XCGUEST1";
const RECORD_MAGIC: &[u8; 4] = b"GREC";
// x86-64 Linux, include/uapi/asm-generic/fcntl.h.
const O_DSYNC: i32 = 0o10000;
const O_DIRECT: i32 = 0o40000;

/// Why a value could not be stored or found.
#[derive(Debug)]
pub enum KvError {
    /// The disk or the index is full.
    Full,
    /// What the index points at is not there.
    Damaged(u64),
    /// The disk holds something else.
    NotALog,
    /// The disk failed.
    Disk(io::Error),
}

impl fmt::Display for KvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the store is full"),
            Self::Damaged(offset) => write!(f, "the record at byte {offset} is damaged"),
            Self::NotALog => f.write_str("the disk holds something that is not a log"),
            Self::Disk(error) => write!(f, "disk: {error}"),
        }
    }
}

impl From<io::Error> for KvError {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

/// Memory that `O_DIRECT` takes: whole sectors, aligned.
struct Sectors {
    memory: Vec<u8>,
    from: usize,
    len: usize,
}

impl Sectors {
    fn zeroed(bytes: usize) -> Self {
        let len = bytes.next_multiple_of(SECTOR_BYTES);
        let memory = vec![0; len + ALIGN_BYTES];
        let from = memory.as_ptr().align_offset(ALIGN_BYTES);
        Self { memory, from, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.from..self.from + self.len]
    }
}

struct Record {
    name: String,
    value: Vec<u8>,
}

/// The store.
pub struct Store {
    disk: File,
    size: u64,
    log_id: u64,
    end: u64,
    sequence: u64,
    index: BTreeMap<String, u64>,
}

/// Whether `name` may be a key.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    (1..=NAME_MAX_BYTES).contains(&name.len()) && name.bytes().all(plain)
}

impl Store {
    /// Opens the log on the block device `path`, or makes one if its first sector is empty.
    pub fn open(path: &str) -> Result<Self, KvError> {
        let mut disk = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT | O_DSYNC).open(path)?;
        let size = disk.seek(SeekFrom::End(0))?;
        let mut sector = Sectors::zeroed(SECTOR_BYTES);
        disk.read_exact_at(sector.bytes(), 0)?;
        let first = sector.bytes();
        let log_id = if first.iter().all(|&byte| byte == 0) {
            // Not secret, but new: a stale record of an earlier log must not look like the next of this one.
            let mut id = [0; 8];
            io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut id)?;
            first[..8].copy_from_slice(SUPER_MAGIC);
            first[8..16].copy_from_slice(&id);
            let sum = crc32(&first[..16]);
            first[16..20].copy_from_slice(&sum.to_le_bytes());
            disk.write_all_at(first, 0)?;
            u64::from_le_bytes(id)
        } else if first.starts_with(SUPER_MAGIC) && crc32(&first[..16]) == le32(first, 16) {
            le64(first, 8)
        } else {
            return Err(KvError::NotALog);
        };
        let mut store = Self { disk, size, log_id, end: SECTOR_BYTES as u64, sequence: 1, index: BTreeMap::new() };
        while let Some(record) = store.record_at(store.end, Some(store.sequence))? {
            let bytes = record_bytes(record.name.len(), record.value.len());
            store.index.insert(record.name, store.end);
            store.end += bytes as u64;
            store.sequence += 1;
        }
        Ok(store)
    }

    /// Names in the store.
    pub fn names(&self) -> usize {
        self.index.len()
    }

    /// The value of `name`, read from the disk.
    pub fn get(&self, name: &str) -> Result<Option<Vec<u8>>, KvError> {
        let Some(&offset) = self.index.get(name) else { return Ok(None) };
        match self.record_at(offset, None)? {
            Some(record) if record.name == name => Ok(Some(record.value)),
            _ => Err(KvError::Damaged(offset)),
        }
    }

    /// Stores `value`; when this returns it is on the disk. Says whether the name is new.
    pub fn put(&mut self, name: &str, value: &[u8]) -> Result<bool, KvError> {
        let bytes = record_bytes(name.len(), value.len()) as u64;
        if self.size.saturating_sub(self.end) < bytes
            || (self.index.len() >= NAMES_MAX && !self.index.contains_key(name))
        {
            return Err(KvError::Full);
        }
        let mut record = Sectors::zeroed(bytes as usize);
        let text = record.bytes();
        text[..4].copy_from_slice(RECORD_MAGIC);
        text[8..16].copy_from_slice(&self.log_id.to_le_bytes());
        text[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        text[24..28].copy_from_slice(&(name.len() as u32).to_le_bytes());
        text[28..32].copy_from_slice(&(value.len() as u32).to_le_bytes());
        text[HEAD_BYTES..][..name.len()].copy_from_slice(name.as_bytes());
        text[HEAD_BYTES + name.len()..][..value.len()].copy_from_slice(value);
        let sum = crc32(&text[8..]);
        text[4..8].copy_from_slice(&sum.to_le_bytes());
        self.disk.write_all_at(text, self.end)?;
        let created = self.index.insert(name.to_owned(), self.end).is_none();
        self.end += bytes;
        self.sequence += 1;
        Ok(created)
    }

    /// The record at `offset`, if there is one, of that sequence number if one is given.
    fn record_at(&self, offset: u64, sequence: Option<u64>) -> Result<Option<Record>, KvError> {
        if self.size.saturating_sub(offset) < SECTOR_BYTES as u64 {
            return Ok(None);
        }
        let mut head = Sectors::zeroed(SECTOR_BYTES);
        self.disk.read_exact_at(head.bytes(), offset)?;
        let head = head.bytes();
        let (name_len, value_len) = (le32(head, 24) as usize, le32(head, 28) as usize);
        let bytes = record_bytes(name_len.min(NAME_MAX_BYTES), value_len.min(VALUE_MAX_BYTES));
        if !head.starts_with(RECORD_MAGIC)
            || le64(head, 8) != self.log_id
            || sequence.is_some_and(|wanted| wanted != le64(head, 16))
            || name_len > NAME_MAX_BYTES
            || value_len > VALUE_MAX_BYTES
            || self.size - offset < bytes as u64
        {
            return Ok(None);
        }
        let mut whole = Sectors::zeroed(bytes);
        self.disk.read_exact_at(whole.bytes(), offset)?;
        let text = whole.bytes();
        if crc32(&text[8..]) != le32(text, 4) {
            return Ok(None);
        }
        let name = String::from_utf8(text[HEAD_BYTES..][..name_len].to_vec()).ok();
        let value = text[HEAD_BYTES + name_len..][..value_len].to_vec();
        Ok(name.map(|name| Record { name, value }))
    }
}

fn record_bytes(name: usize, value: usize) -> usize {
    (HEAD_BYTES + name + value).next_multiple_of(SECTOR_BYTES)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |four| u32::from_le_bytes(*four))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight))
}

/// CRC-32 (IEEE 802.3), table-driven: under emulation a bit at a time would be felt.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut n = 0;
        while n < 256 {
            let mut sum = n as u32;
            let mut bit = 0;
            while bit < 8 {
                sum = if sum & 1 == 1 { 0xEDB8_8320 ^ (sum >> 1) } else { sum >> 1 };
                bit += 1;
            }
            table[n] = sum;
            n += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum, &byte| TABLE[((sum ^ u32::from(byte)) & 0xff) as usize] ^ (sum >> 8))
}
