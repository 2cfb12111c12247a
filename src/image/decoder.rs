//! Takes an image apart.
//!
//! ```text
//! ImageHeader → DomainHeader → RecordHeader ─┬→ Body ─────────────────────────┬→ RecordHeader …
//!                                            ├→ Count → Entries → Contents ×n ┤
//!                                            ├→ Skip (unknown and optional) ──┘
//!                                            └→ Body of END → Over
//! ```
//!
//! [`Decoder::wants`] is how many bytes come next, at most [`PIECE_BYTES`]; [`Decoder::feed`] takes exactly those.
//! Nothing is buffered but the record at hand, and of PAGE_DATA only the entries: a lying length costs the sender as
//! many bytes as it costs us.
//!
//! Images of version 2 have no STATIC_DATA_END; one is reported before their first record that is not static, so that
//! a receiver knows one order only.

use super::header::{DomainHeader, DomainType, ImageHeader};
use super::pages::{PageEntry, Pages};
use super::records::{self, Record};
use super::{ImageError, RECORD_MAX_BYTES};
use crate::page::{BATCH_PAGES, PAGE_SIZE};
use crate::record::{self, COUNT_BYTES, ENTRY_BYTES, Header};

/// Most bytes asked for at once.
pub const PIECE_BYTES: usize = BATCH_PAGES * PAGE_SIZE;

/// One thing an image says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Item {
    /// The image header.
    Image(ImageHeader),
    /// The domain header.
    Domain(DomainHeader),
    /// Pages, at most [`BATCH_PAGES`].
    Pages(Pages),
    /// Any other record.
    Record(Record),
}

#[derive(Debug)]
enum State {
    ImageHeader,
    DomainHeader,
    RecordHeader,
    Body { header: Header, got: Vec<u8> },
    Skip { left_bytes: usize },
    Count { header: Header },
    Entries { header: Header, count: usize, got: Vec<u8> },
    Contents { entries: Vec<PageEntry>, done: usize },
    Over,
}

/// Takes an image apart.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    version: u32,
    kind: DomainType,
    static_data_over: bool,
    /// What waits behind the STATIC_DATA_END that a version 2 image does not have.
    next: Option<Item>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder at the image header.
    #[must_use]
    pub fn new() -> Self {
        let version = ImageHeader::VERSION;
        Self { state: State::ImageHeader, version, kind: DomainType::Hvm, static_data_over: false, next: None }
    }

    /// Whether END has been read. Nothing behind it is the image's.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over) && self.next.is_none()
    }

    /// How many bytes the next [`feed`](Self::feed) takes; may be none.
    #[must_use]
    pub fn wants(&self) -> usize {
        if self.next.is_some() {
            return 0;
        }
        match &self.state {
            State::ImageHeader => ImageHeader::BYTES,
            State::DomainHeader => DomainHeader::BYTES,
            State::RecordHeader => Header::BYTES,
            State::Body { header, got } => (header.padded_bytes() - got.len()).min(PIECE_BYTES),
            State::Skip { left_bytes } => (*left_bytes).min(PIECE_BYTES),
            State::Count { .. } => COUNT_BYTES,
            State::Entries { count, got, .. } => (count * ENTRY_BYTES - got.len()).min(PIECE_BYTES),
            State::Contents { entries, done } => {
                let run = entries[*done..].iter().take(BATCH_PAGES);
                run.filter(|entry| entry.kind.has_contents()).count() * PAGE_SIZE
            }
            State::Over => 0,
        }
    }

    /// Takes [`wants`](Self::wants) bytes, and says what they completed.
    pub fn feed(&mut self, bytes: Vec<u8>) -> Result<Option<Item>, ImageError> {
        assert_eq!(bytes.len(), self.wants(), "exactly the bytes that were asked for");
        if let Some(item) = self.next.take() {
            return Ok(Some(item));
        }
        let item = match std::mem::replace(&mut self.state, State::RecordHeader) {
            State::ImageHeader => {
                let header = ImageHeader::decode(&bytes)?;
                self.version = header.version;
                self.state = State::DomainHeader;
                return Ok(Some(Item::Image(header)));
            }
            State::DomainHeader => {
                let header = DomainHeader::decode(&bytes)?;
                self.kind = header.kind;
                return Ok(Some(Item::Domain(header)));
            }
            State::RecordHeader => return self.record_header(&bytes),
            State::Body { header, mut got } => {
                got.extend_from_slice(&bytes);
                if got.len() < header.padded_bytes() {
                    self.state = State::Body { header, got };
                    return Ok(None);
                }
                self.record(header, &got)?
            }
            State::Skip { left_bytes } => {
                if left_bytes > bytes.len() {
                    self.state = State::Skip { left_bytes: left_bytes - bytes.len() };
                }
                return Ok(None);
            }
            State::Count { header } => {
                let (count, _) = record::take_count(&bytes).map_err(|why| bad(header, why))?;
                if count == 0 {
                    return Err(bad(header, "a count of zero"));
                }
                if count > (header.len_bytes - COUNT_BYTES) / ENTRY_BYTES {
                    return Err(bad(header, "shorter than its count"));
                }
                self.state = State::Entries { header, count, got: Vec::new() };
                return Ok(None);
            }
            State::Entries { header, count, mut got } => {
                got.extend_from_slice(&bytes);
                if got.len() < count * ENTRY_BYTES {
                    self.state = State::Entries { header, count, got };
                    return Ok(None);
                }
                let entries = self.entries(header, &got)?;
                self.state = State::Contents { entries, done: 0 };
                return Ok(None);
            }
            State::Contents { entries, done } => {
                let end = entries.len().min(done + BATCH_PAGES);
                let pages = Pages { entries: entries[done..end].to_vec(), bytes };
                if end < entries.len() {
                    self.state = State::Contents { entries, done: end };
                }
                Item::Pages(pages)
            }
            State::Over => {
                self.state = State::Over;
                return Ok(None);
            }
        };
        self.in_order(item).map(Some)
    }

    fn record_header(&mut self, bytes: &[u8]) -> Result<Option<Item>, ImageError> {
        let header = Header::peek(bytes).ok_or(ImageError::NotAnImage("a torn header"))?;
        let limit = match records::limit_bytes(header.record) {
            Some(limit) => limit,
            None if header.is_optional() => RECORD_MAX_BYTES,
            None => return Err(ImageError::UnknownRecord(header.record)),
        };
        if header.len_bytes > limit {
            return Err(bad(header, "longer than its type may be"));
        }
        self.state = match header.record {
            record::PAGE_DATA if header.len_bytes < COUNT_BYTES => return Err(bad(header, "no count")),
            record::PAGE_DATA => State::Count { header },
            _ if header.is_optional() => State::Skip { left_bytes: header.padded_bytes() },
            _ => State::Body { header, got: Vec::new() },
        };
        Ok(None)
    }

    fn record(&mut self, header: Header, padded: &[u8]) -> Result<Item, ImageError> {
        let record = Record::decode(header, &padded[..header.len_bytes])?;
        if record.is_pv().is_some_and(|pv| pv != (self.kind == DomainType::Pv)) {
            return Err(ImageError::OutOfPlace { record: header.record, why: "not of a domain of this kind" });
        }
        if record == Record::End {
            self.state = State::Over;
        }
        Ok(Item::Record(record))
    }

    fn entries(&self, header: Header, list: &[u8]) -> Result<Vec<PageEntry>, ImageError> {
        let raw = list.as_chunks::<ENTRY_BYTES>().0;
        let decoded = raw.iter().map(|entry| PageEntry::decode(u64::from_le_bytes(*entry)));
        let entries: Vec<_> = decoded.collect::<Result<_, _>>().map_err(|why| bad(header, why))?;
        let contents = entries.iter().filter(|entry| entry.kind.has_contents());
        if header.len_bytes != COUNT_BYTES + list.len() + contents.clone().count() * PAGE_SIZE {
            return Err(bad(header, "contents do not match the entries"));
        }
        if self.kind == DomainType::Hvm && contents.clone().any(|entry| entry.kind != super::PageType::NOTAB) {
            return Err(bad(header, "page tables of a PV guest in a domain that is none"));
        }
        Ok(entries)
    }

    /// Static data first, then the rest; with the end between them that a version 2 image leaves out.
    fn in_order(&mut self, item: Item) -> Result<Item, ImageError> {
        let (record, is_static) = match &item {
            Item::Record(record) => (record.kind(), record.is_static()),
            _ => (record::PAGE_DATA, false),
        };
        match (self.static_data_over, is_static) {
            (true, false) => Ok(item),
            (true, true) => Err(ImageError::OutOfPlace { record, why: "static data has ended" }),
            (false, true) => {
                self.static_data_over = item == Item::Record(Record::StaticDataEnd);
                Ok(item)
            }
            (false, false) if self.version < 3 => {
                self.static_data_over = true;
                self.next = Some(item);
                Ok(Item::Record(Record::StaticDataEnd))
            }
            (false, false) => Err(ImageError::OutOfPlace { record, why: "static data has not ended" }),
        }
    }
}

fn bad(header: Header, why: &'static str) -> ImageError {
    ImageError::BadRecord { record: header.record, len_bytes: header.len_bytes, why }
}
