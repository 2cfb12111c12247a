//! The key-value store: an append-only record log on the disk, an index of it in guest memory.
//!
//! ```text
//! sector 0        superblock: magic, log id, checksum
//! sector 1...     record: magic, checksum, sequence, lengths, name, value, zeroes up to the next sector
//!                 record ...
//!                 the first thing that is not the next record ends the log
//! ```
//!
//! A value is acknowledged after its record was written and flushed; only then do the index and the log's end
//! move. A write that failed or was refused in between leaves bytes beyond the end, which the next record covers.
//!
//! Traps, one guard each. A record that shares a sector with an acknowledged one could tear it: records start on
//! sectors. A longer attempt that was given up leaves its tail behind a shorter record, and clients choose what
//! is in it: the checksum covers the log's random id and the sequence number, which they do not know.
//!
//! There is no compaction: a log that is full refuses further values, replacements too.

use super::layout::Layout;
use super::ram::Ram;
use crate::disk::{Disk, DiskError};
use std::collections::BTreeMap;

/// Longest name, in bytes.
pub const NAME_MAX_BYTES: usize = 64;
/// Longest value the format can hold; a guest with little memory takes less.
pub const VALUE_MAX_BYTES: usize = 65536;
/// Size of an index slot: name length (u8), name, offset of the record (u64 at 72), length of the value (u32 at 80).
pub const SLOT_BYTES: usize = 128;

const SECTOR_BYTES: usize = 512;
const RECORD_HEAD_BYTES: usize = 24;
const SUPER_MAGIC: &[u8; 8] = b"XCOLOKV1";
const RECORD_MAGIC: &[u8; 4] = b"KREC";
const SLOT_OFFSET_AT: usize = 72;
const SLOT_LEN_AT: usize = 80;

/// Why a log could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// The disk cannot take the request now; nothing changed; ask again.
    #[error("the disk is busy")]
    Busy,
    /// The log or the index has no room.
    #[error("the store is full")]
    Full,
    /// The disk is neither empty nor a log.
    #[error("the disk holds something that is not a key-value log")]
    NotALog,
    /// The disk is smaller than a superblock and one record.
    #[error("a disk of {0} bytes is too small for a key-value log")]
    TooSmall(u64),
    /// A record the index points at is not there any more.
    #[error("the record at byte {0} is damaged")]
    Damaged(u64),
    /// The disk failed.
    #[error(transparent)]
    Disk(DiskError),
}

impl From<DiskError> for KvError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::Busy => Self::Busy,
            DiskError::NoSpace { .. } => Self::Full,
            other => Self::Disk(other),
        }
    }
}

/// Where the log stands; part of the guest's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// The log's random id.
    pub(super) log_id: u64,
    /// Where the next record goes, in bytes.
    pub(super) end: u64,
    /// The next record's sequence number.
    pub(super) sequence: u64,
    /// Names in the index.
    pub(super) keys: u64,
}

/// Whether `name` can be a key: 1 to 64 characters of `[A-Za-z0-9._-]`.
#[must_use]
pub fn is_name(name: &str) -> bool {
    (1..=NAME_MAX_BYTES).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Reads a disk image without any guest: every name with its latest value. An empty disk holds nothing.
pub fn scan(disk: &mut dyn Disk) -> Result<BTreeMap<String, Vec<u8>>, KvError> {
    let mut found = BTreeMap::new();
    if let Some(log_id) = read_super(disk)? {
        replay(disk, log_id, |name, _, value| {
            found.insert(name.to_owned(), value.to_vec());
            Ok(())
        })?;
    }
    Ok(found)
}

/// The store of a guest: its log, and the index in its memory.
pub(super) struct Store<'a> {
    pub(super) ram: &'a mut Ram,
    pub(super) layout: &'a Layout,
    pub(super) disk: &'a mut dyn Disk,
}

impl Store<'_> {
    /// Formats an empty disk with `log_id`, or replays the log that is there into the index.
    pub(super) fn open(&mut self, log_id: u64) -> Result<Cursor, KvError> {
        let Some(log_id) = read_super(self.disk)? else {
            let mut sector = [0; SECTOR_BYTES];
            sector[..8].copy_from_slice(SUPER_MAGIC);
            sector[8..16].copy_from_slice(&log_id.to_le_bytes());
            let sum = crc32(&[&sector[..16]]);
            sector[16..20].copy_from_slice(&sum.to_le_bytes());
            self.disk.write(0, &sector)?;
            self.disk.flush()?;
            return Ok(Cursor { log_id, end: SECTOR_BYTES as u64, sequence: 0, keys: 0 });
        };
        let (mut keys, ram, layout) = (0, &mut *self.ram, self.layout);
        let (end, sequence) = replay(self.disk, log_id, |name, offset, value| {
            let (slot, known) = slot_of(ram, layout, name, keys).ok_or(KvError::Full)?;
            fill_slot(ram, slot, name, offset, value.len());
            keys += u64::from(!known);
            Ok(())
        })?;
        Ok(Cursor { log_id, end, sequence, keys })
    }

    /// The size of the value of `name`.
    pub(super) fn len_of(&self, name: &str) -> Option<usize> {
        let (slot, known) = slot_of(self.ram, self.layout, name, 0)?;
        known.then(|| self.ram.read_u32(slot + SLOT_LEN_AT) as usize)
    }

    /// Reads the value of `name` back from the disk.
    pub(super) fn get(&mut self, cursor: &Cursor, name: &str) -> Result<Option<Vec<u8>>, KvError> {
        let Some((slot, true)) = slot_of(self.ram, self.layout, name, 0) else { return Ok(None) };
        let offset = self.ram.read_u64(slot + SLOT_OFFSET_AT);
        match read_record(self.disk, cursor.log_id, offset)? {
            Some(record) if record.name == name => Ok(Some(record.value)),
            _ => Err(KvError::Damaged(offset)),
        }
    }

    /// Appends a record and makes it durable; true when `name` is new. After an error, `Busy` included, the same
    /// call can be made again: nothing of the store has moved.
    pub(super) fn put(&mut self, cursor: &mut Cursor, name: &str, value: &[u8]) -> Result<bool, KvError> {
        let (slot, known) = slot_of(self.ram, self.layout, name, cursor.keys).ok_or(KvError::Full)?;
        let record = encode_record(cursor, name, value);
        let end = cursor.end.checked_add(record.len() as u64).filter(|end| *end <= self.disk.size_bytes());
        let end = end.ok_or(KvError::Full)?;
        self.disk.write(cursor.end, &record)?;
        self.disk.flush()?;
        fill_slot(self.ram, slot, name, cursor.end, value.len());
        cursor.end = end;
        cursor.sequence = cursor.sequence.wrapping_add(1);
        cursor.keys = cursor.keys.saturating_add(u64::from(!known));
        Ok(!known)
    }
}

/// The slot that holds `name`, or the free one where it would go unless `keys` fill the index; linear probing.
fn slot_of(ram: &Ram, layout: &Layout, name: &str, keys: u64) -> Option<(usize, bool)> {
    let first = crc32(&[name.as_bytes()]) as usize;
    for step in 0..layout.index_slots {
        let slot = layout.index_at + (first.wrapping_add(step) & (layout.index_slots - 1)) * SLOT_BYTES;
        let len = usize::from(ram.read_u8(slot));
        if len == 0 {
            // One slot in eight stays free, which keeps the probes short.
            return (keys < layout.index_slots as u64 / 8 * 7).then_some((slot, false));
        }
        if len == name.len() && ram.read(slot + 1, len) == name.as_bytes() {
            return Some((slot, true));
        }
    }
    None
}

fn fill_slot(ram: &mut Ram, slot: usize, name: &str, offset: u64, value_len: usize) {
    ram.write(slot + 1, name.as_bytes());
    ram.write_u64(slot + SLOT_OFFSET_AT, offset);
    ram.write_u32(slot + SLOT_LEN_AT, value_len as u32);
    ram.write_u8(slot, name.len() as u8);
}

struct Record {
    name: String,
    value: Vec<u8>,
    sequence: u64,
    next: u64,
}

fn encode_record(cursor: &Cursor, name: &str, value: &[u8]) -> Vec<u8> {
    let len = (RECORD_HEAD_BYTES + name.len() + value.len()).next_multiple_of(SECTOR_BYTES);
    let mut record = Vec::with_capacity(len);
    record.extend_from_slice(RECORD_MAGIC);
    record.extend_from_slice(&[0; 4]);
    record.extend_from_slice(&cursor.sequence.to_le_bytes());
    record.extend_from_slice(&(value.len() as u32).to_le_bytes());
    record.extend_from_slice(&(name.len() as u32).to_le_bytes());
    record.extend_from_slice(name.as_bytes());
    record.extend_from_slice(value);
    let sum = crc32(&[&cursor.log_id.to_le_bytes(), &record[8..]]);
    record[4..8].copy_from_slice(&sum.to_le_bytes());
    record.resize(len, 0);
    record
}

/// The record at `offset`, or nothing when there is no whole one.
fn read_record(disk: &mut dyn Disk, log_id: u64, offset: u64) -> Result<Option<Record>, KvError> {
    let room = disk.size_bytes().saturating_sub(offset);
    if room < SECTOR_BYTES as u64 {
        return Ok(None);
    }
    let mut record = vec![0; SECTOR_BYTES];
    disk.read(offset, &mut record)?;
    let (value_len, name_len) = (le32(&record, 16), le32(&record, 20));
    if &record[..4] != RECORD_MAGIC || name_len > NAME_MAX_BYTES || value_len > VALUE_MAX_BYTES {
        return Ok(None);
    }
    let used = RECORD_HEAD_BYTES + name_len + value_len;
    let len = used.next_multiple_of(SECTOR_BYTES);
    if len as u64 > room {
        return Ok(None);
    }
    record.resize(len, 0);
    if len > SECTOR_BYTES {
        disk.read(offset + SECTOR_BYTES as u64, &mut record[SECTOR_BYTES..])?;
    }
    let (name, value) = record[RECORD_HEAD_BYTES..used].split_at(name_len);
    let sum = crc32(&[&log_id.to_le_bytes(), &record[8..used]]);
    match std::str::from_utf8(name) {
        Ok(name) if sum as usize == le32(&record, 4) && is_name(name) => Ok(Some(Record {
            name: name.to_owned(),
            value: value.to_vec(),
            sequence: le64(&record, 8),
            next: offset + len as u64,
        })),
        _ => Ok(None),
    }
}

/// Visits the log's records in order; returns where the next one goes and its sequence number.
fn replay(
    disk: &mut dyn Disk,
    log_id: u64,
    mut visit: impl FnMut(&str, u64, &[u8]) -> Result<(), KvError>,
) -> Result<(u64, u64), KvError> {
    let (mut end, mut sequence) = (SECTOR_BYTES as u64, 0);
    while let Some(record) = read_record(disk, log_id, end)? {
        if record.sequence != sequence {
            break;
        }
        visit(&record.name, end, &record.value)?;
        (end, sequence) = (record.next, sequence + 1);
    }
    Ok((end, sequence))
}

/// The log's id, or nothing on an empty disk.
fn read_super(disk: &mut dyn Disk) -> Result<Option<u64>, KvError> {
    if disk.size_bytes() < 2 * SECTOR_BYTES as u64 {
        return Err(KvError::TooSmall(disk.size_bytes()));
    }
    let mut sector = [0; SECTOR_BYTES];
    disk.read(0, &mut sector)?;
    if sector == [0; SECTOR_BYTES] {
        return Ok(None);
    }
    if &sector[..8] != SUPER_MAGIC || crc32(&[&sector[..16]]) as usize != le32(&sector, 16) {
        return Err(KvError::NotALog);
    }
    Ok(Some(le64(&sector, 8)))
}

fn le32(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + 4].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// CRC-32 (IEEE 802.3) of the concatenation of `parts`.
fn crc32(parts: &[&[u8]]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < 256 {
            let (mut crc, mut bit) = (at as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
                bit += 1;
            }
            table[at] = crc;
            at += 1;
        }
        table
    };
    !parts.iter().copied().flatten().fold(!0, |crc, byte| TABLE[(crc as u8 ^ byte) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;

    fn with<T>(disk: &mut dyn Disk, act: impl FnOnce(&mut Store<'_>) -> T) -> T {
        let (mut ram, layout) = (Ram::new(256).unwrap(), Layout::for_ram(256).unwrap());
        act(&mut Store { ram: &mut ram, layout: &layout, disk })
    }

    #[test]
    fn the_checksum_is_the_well_known_one() {
        assert_eq!(crc32(&[b"1234", b"56789"]), 0xcbf4_3926);
    }

    #[test]
    fn values_survive_a_reboot_and_the_latest_wins() {
        let mut disk = MemoryDisk::new(1 << 20);
        assert_eq!(scan(&mut disk).unwrap().len(), 0, "an empty disk");
        let before = with(&mut disk, |store| {
            let mut cursor = store.open(7).unwrap();
            assert!(store.put(&mut cursor, "a", b"one").unwrap());
            assert!(store.put(&mut cursor, "b", &[5; 4096]).unwrap());
            assert!(!store.put(&mut cursor, "a", b"two").unwrap());
            assert_eq!(store.get(&cursor, "a").unwrap().unwrap(), b"two");
            cursor
        });
        with(&mut disk, |store| {
            let cursor = store.open(99).unwrap();
            assert_eq!(cursor, before, "the id on the disk wins over a new one");
            assert_eq!((store.get(&cursor, "a").unwrap().unwrap(), store.len_of("b")), (b"two".to_vec(), Some(4096)));
            assert!(store.get(&cursor, "c").unwrap().is_none());
        });
        let oracle = scan(&mut disk).unwrap();
        assert_eq!((oracle.len(), &oracle["a"][..], oracle["b"].len()), (2, &b"two"[..], 4096));
    }

    #[test]
    fn a_log_cut_or_damaged_anywhere_keeps_what_came_before() {
        let mut disk = MemoryDisk::new(64 << 10);
        let ends = with(&mut disk, |store| {
            let mut cursor = store.open(7).unwrap();
            (0..8)
                .map(|n| {
                    store.put(&mut cursor, &format!("k{n}"), &vec![n as u8; 700 * n]).unwrap();
                    cursor.end as usize
                })
                .collect::<Vec<_>>()
        });
        let whole = disk.bytes().to_vec();
        for cut in (512..ends[7]).step_by(97) {
            let mut torn = MemoryDisk::new(whole.len());
            torn.write(0, &whole[..cut]).unwrap();
            let survivors = ends.iter().filter(|end| **end <= cut).count();
            let found = scan(&mut torn).unwrap().len();
            assert!(found == survivors || found == survivors + 1, "cut {cut}: only zero padding may be cut off unseen");
            // A torn tail is written over.
            with(&mut torn, |store| {
                let mut cursor = store.open(1).unwrap();
                store.put(&mut cursor, "after", b"x").unwrap();
            });
            assert_eq!(scan(&mut torn).unwrap().len(), found + 1);
        }
        let mut flipped = MemoryDisk::new(whole.len());
        flipped.write(0, &whole).unwrap();
        flipped.write(ends[3] as u64 + 30, &[0xff]).unwrap();
        assert_eq!(scan(&mut flipped).unwrap().len(), 4);
    }

    #[test]
    fn the_tail_of_a_longer_attempt_is_not_a_record() {
        let mut disk = MemoryDisk::new(64 << 10);
        with(&mut disk, |store| {
            let mut cursor = store.open(7).unwrap();
            // A client that guesses the sequence number still does not know the log's id.
            let forged = encode_record(&Cursor { log_id: 0, sequence: 1, ..cursor }, "forged", b"");
            let mut value = vec![0; SECTOR_BYTES - RECORD_HEAD_BYTES - 1];
            value.extend_from_slice(&forged);
            let attempt = encode_record(&cursor, "a", &value);
            store.disk.write(cursor.end, &attempt).unwrap();
            store.put(&mut cursor, "b", b"short").unwrap();
        });
        assert_eq!(scan(&mut disk).unwrap().into_keys().collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn full_foreign_and_tiny_disks_are_refused() {
        let mut disk = MemoryDisk::new(4 * 512);
        with(&mut disk, |store| {
            let mut cursor = store.open(7).unwrap();
            for n in 0..3 {
                store.put(&mut cursor, "a", &[n]).unwrap();
            }
            assert!(matches!(store.put(&mut cursor, "a", b"no"), Err(KvError::Full)));
            assert_eq!(store.get(&cursor, "a").unwrap().unwrap(), [2]);
        });
        disk.write(3, b"?").unwrap();
        assert!(matches!(scan(&mut disk), Err(KvError::NotALog)));
        assert!(matches!(scan(&mut MemoryDisk::new(512)), Err(KvError::TooSmall(512))));
    }

    #[test]
    fn a_full_index_refuses_new_names_and_still_finds_old_ones() {
        let mut disk = MemoryDisk::new(2 << 20);
        with(&mut disk, |store| {
            let mut cursor = store.open(7).unwrap();
            let room = store.layout.index_slots / 8 * 7;
            for n in 0..room {
                assert!(store.put(&mut cursor, &format!("k{n}"), b"v").unwrap(), "{n}");
            }
            assert!(matches!(store.put(&mut cursor, "one-more", b"v"), Err(KvError::Full)));
            assert!(!store.put(&mut cursor, "k5", b"w").unwrap());
            assert_eq!(store.get(&cursor, "k5").unwrap().unwrap(), b"w");
            assert!(store.get(&cursor, "one-more").unwrap().is_none());
        });
    }
}
