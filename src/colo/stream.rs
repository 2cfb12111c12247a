//! The stream from primary to secondary.
//!
//! ```text
//! first copy    record … record CHECKPOINT  vmstate-size n, n bytes          answered by checkpoint-ready
//! checkpoint    checkpoint-request                                           answered by checkpoint-reply
//!               vmstate-send  record … record CHECKPOINT  vmstate-size n, n bytes
//!                                                      answered by vmstate-received, then vmstate-loaded
//! ```
//!
//! Messages are QEMU's ([`super::message`]); the records between them are Xen's own migration records
//! (xen `docs/specs/libxc-migration-stream.pandoc`): type and length as le32, body, zeroes up to a multiple of
//! eight. `PAGE_DATA` (0x01) and `CHECKPOINT` (0x0E) are Xen's; zero pages travel by number in a
//! record of our own, and pages that changed little in another ([`super::delta`]), if the peer said that it knows them.
//! The device state is a run of records too.
//!
//! The trap: every count in here comes from the peer. A record's length is checked against what its type may
//! hold before it is buffered, a pfn against the guest's size before it is believed.

use super::delta::{DELTA_MAX_BYTES, DeltaBatch, SentPages};
use super::message::{InvalidMessage, Message};
use crate::carried::{CARRIED_BYTES, CARRIED_MAX, Carried};
use crate::page::{BATCH_PAGES, PAGE_SIZE, PageBatch, Pfn, is_zero};
use crate::record::{self, COUNT_BYTES, Header, PFN_MASK};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Xen's PAGE_DATA.
pub const RECORD_PAGE_DATA: u32 = record::PAGE_DATA;
/// Xen's CHECKPOINT: everything before it is one consistent state.
pub const RECORD_CHECKPOINT: u32 = record::CHECKPOINT;
/// Ours: numbers of pages that hold only zeroes. Mandatory (bit 31 clear): skipping it would corrupt the guest.
pub const RECORD_ZERO_PAGES: u32 = 0x4000_0001;

/// Ours: what makes pages of the last checkpoint into those of this one. Mandatory.
pub const RECORD_PAGE_DELTAS: u32 = 0x4000_0004;

/// Ours: until the next checkpoint the secondary's guest is not needed. Optional: one that runs all the same does no harm.
pub const RECORD_GUEST_RESTS: u32 = record::OPTIONAL | 0x4000_0005;

/// Ours: connections that an earlier takeover left in two sequence spaces ([`crate::carried`]). Optional: a secondary that
/// skips it loses them with its own takeover, and nothing else.
pub const RECORD_CARRIED: u32 = record::OPTIONAL | 0x4000_0006;

/// Ours: the latest frames that wait for this state. Optional: a survivor that skips it leaves it to the guest's timers to say
/// them again.
pub const RECORD_OUTPUT: u32 = record::OPTIONAL | 0x4000_0007;

/// Bytes that it has at most.
pub const OUTPUT_MAX_BYTES: usize = 128 << 10;
/// Most zero pages one record names.
pub const ZERO_PAGES_PER_RECORD: usize = 16 * BATCH_PAGES;
/// Largest device state accepted, in bytes.
pub const DEVICE_STATE_MAX_BYTES: u64 = 64 << 20;

/// How the peer broke the stream.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StreamError {
    /// Not one of the seven messages.
    #[error(transparent)]
    Message(#[from] InvalidMessage),
    /// A record type this version cannot do without and does not know.
    #[error("record type {0:#x} is mandatory and unknown; the peer speaks a newer stream")]
    UnknownRecord(u32),
    /// A record that its type cannot have.
    #[error("record type {record:#x} of {len_bytes} bytes is malformed: {why}")]
    BadRecord {
        /// Its type.
        record: u32,
        /// Its length.
        len_bytes: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A page outside the guest.
    #[error("the peer sent pfn {pfn:#x} of a guest of {nr_pages:#x} pages")]
    PfnOutOfRange {
        /// The number sent.
        pfn: u64,
        /// The guest's size.
        nr_pages: u64,
    },
    /// More device state than is accepted.
    #[error("device state of {0} bytes is refused (the limit is {DEVICE_STATE_MAX_BYTES})")]
    DeviceStateTooLarge(u64),
}

/// One thing the stream says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Item {
    /// A COLO message; never `VmstateSize`, which arrives as [`Item::DeviceState`].
    Message(Message),
    /// Pages with contents.
    Pages(PageBatch),
    /// Pages that are all zero.
    ZeroPages(Vec<Pfn>),
    /// Pages of the last state, changed.
    Deltas(DeltaBatch),
    /// The guest is not to run in the epoch that this state begins.
    GuestRests,
    /// What clients know of the guest's connections by other numbers than the guest, all of it as of this state.
    Carried(Vec<Carried>),
    /// What the guest said before this state, as far as it had not left yet: the latest of it.
    Output(Vec<Bytes>),
    /// The page records of this state are complete.
    PagesEnd,
    /// The device state: the last part of a checkpoint. After it the checkpoint is whole.
    DeviceState(Vec<u8>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Records,
    Messages,
    Blob(usize),
}

/// Takes the stream apart, on the secondary.
#[derive(Debug)]
pub struct Decoder {
    mode: Mode,
    nr_pages: u64,
}

impl Decoder {
    /// A decoder for a guest of `nr_pages`, at the first copy.
    #[must_use]
    pub fn new(nr_pages: u64) -> Self {
        Self { mode: Mode::Records, nr_pages }
    }

    /// Takes one item off the front of `input`, or `None` while it is incomplete.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Item>, StreamError> {
        match self.mode {
            Mode::Records => self.record(input),
            Mode::Messages => {
                let Some(message) = Message::decode(input)? else { return Ok(None) };
                match message {
                    Message::VmstateSend => self.mode = Mode::Records,
                    Message::VmstateSize(bytes) => {
                        if bytes > DEVICE_STATE_MAX_BYTES {
                            return Err(StreamError::DeviceStateTooLarge(bytes));
                        }
                        self.mode = Mode::Blob(bytes as usize);
                        return self.decode(input);
                    }
                    _ => {}
                }
                Ok(Some(Item::Message(message)))
            }
            Mode::Blob(bytes) => {
                if input.len() < bytes {
                    return Ok(None);
                }
                self.mode = Mode::Messages;
                Ok(Some(Item::DeviceState(input.split_to(bytes).to_vec())))
            }
        }
    }

    fn record(&mut self, input: &mut BytesMut) -> Result<Option<Item>, StreamError> {
        loop {
            let Some(header) = Header::peek(input) else { return Ok(None) };
            let Header { record, len_bytes } = header;
            let limit = match record {
                RECORD_PAGE_DATA => COUNT_BYTES + BATCH_PAGES * (8 + PAGE_SIZE),
                RECORD_ZERO_PAGES => COUNT_BYTES + ZERO_PAGES_PER_RECORD * 8,
                RECORD_PAGE_DELTAS => COUNT_BYTES + BATCH_PAGES * (8 + DELTA_MAX_BYTES),
                RECORD_CHECKPOINT | RECORD_GUEST_RESTS => 0,
                RECORD_CARRIED => COUNT_BYTES + CARRIED_MAX * CARRIED_BYTES,
                RECORD_OUTPUT => OUTPUT_MAX_BYTES,
                // Bit 31 marks a record that a reader may skip; bounded, since it is buffered whole.
                _ if header.is_optional() => 1 << 20,
                unknown => return Err(StreamError::UnknownRecord(unknown)),
            };
            if len_bytes > limit {
                return Err(StreamError::BadRecord { record, len_bytes, why: "longer than its type may be" });
            }
            if input.len() < Header::BYTES + header.padded_bytes() {
                return Ok(None);
            }
            let body = &input[Header::BYTES..Header::BYTES + len_bytes];
            let item = match record {
                RECORD_PAGE_DATA => Some(self.page_data(body)?),
                RECORD_ZERO_PAGES => Some(self.zero_pages(body)?),
                RECORD_PAGE_DELTAS => Some(self.page_deltas(body)?),
                RECORD_GUEST_RESTS => Some(Item::GuestRests),
                RECORD_CARRIED => Some(carried(body)?),
                RECORD_OUTPUT => Some(output(body)?),
                RECORD_CHECKPOINT => {
                    self.mode = Mode::Messages;
                    Some(Item::PagesEnd)
                }
                _ => None,
            };
            input.advance(Header::BYTES + header.padded_bytes());
            if item.is_some() {
                return Ok(item);
            }
        }
    }

    fn page_data(&self, body: &[u8]) -> Result<Item, StreamError> {
        let bad = |why| StreamError::BadRecord { record: RECORD_PAGE_DATA, len_bytes: body.len(), why };
        let (pfns, contents) = self.pfn_list(RECORD_PAGE_DATA, body)?;
        if contents.len() != pfns.len() * PAGE_SIZE {
            return Err(bad("contents do not match the count"));
        }
        Ok(Item::Pages(PageBatch { pfns, bytes: contents.to_vec() }))
    }

    fn zero_pages(&self, body: &[u8]) -> Result<Item, StreamError> {
        let (pfns, rest) = self.pfn_list(RECORD_ZERO_PAGES, body)?;
        if !rest.is_empty() {
            let why = "longer than its count";
            return Err(StreamError::BadRecord { record: RECORD_ZERO_PAGES, len_bytes: body.len(), why });
        }
        Ok(Item::ZeroPages(pfns))
    }

    fn page_deltas(&self, body: &[u8]) -> Result<Item, StreamError> {
        let (pfns, deltas) = self.pfn_list(RECORD_PAGE_DELTAS, body)?;
        let batch = DeltaBatch::parse(pfns, deltas);
        let bad = |why| StreamError::BadRecord { record: RECORD_PAGE_DELTAS, len_bytes: body.len(), why };
        batch.map(Item::Deltas).map_err(bad)
    }

    /// Reads `count u32, reserved u32, count × u64` and returns what follows.
    fn pfn_list<'a>(&self, record: u32, body: &'a [u8]) -> Result<(Vec<Pfn>, &'a [u8]), StreamError> {
        let bad = |why| StreamError::BadRecord { record, len_bytes: body.len(), why };
        let (list, rest) = record::take_entries::<{ record::ENTRY_BYTES }>(body).map_err(bad)?;
        if list.is_empty() {
            return Err(bad("a count of zero"));
        }
        let mut pfns = Vec::with_capacity(list.len());
        for entry in list {
            let entry = u64::from_le_bytes(*entry);
            // Page types other than 0 (ordinary RAM) belong to PV guests, which this stream does not carry.
            if entry & !PFN_MASK != 0 {
                return Err(bad("a page type other than ordinary RAM"));
            }
            if entry >= self.nr_pages {
                return Err(StreamError::PfnOutOfRange { pfn: entry, nr_pages: self.nr_pages });
            }
            pfns.push(Pfn(entry));
        }
        Ok((pfns, rest))
    }
}

/// Appends pages as records of at most 1024: zero pages by number only, those that changed little since they were
/// `sent` as deltas, the rest whole. `contents` holds one page for each of `pfns`. Returns how many pages were zero.
pub fn encode_pages(pfns: &[Pfn], contents: &[u8], mut sent: Option<&mut SentPages>, out: &mut BytesMut) -> usize {
    let (mut zero, mut changed, mut deltas) = (Vec::new(), Vec::new(), Vec::new());
    let mut full: Vec<(Pfn, &[u8])> = Vec::with_capacity(BATCH_PAGES.min(pfns.len()));
    for (pfn, page) in pfns.iter().copied().zip(contents.chunks_exact(PAGE_SIZE)) {
        if is_zero(page) {
            sent.iter_mut().for_each(|sent| sent.zeroed(pfn));
            zero.push(pfn);
        } else if sent.as_mut().is_some_and(|sent| sent.delta(pfn, page, &mut deltas)) {
            changed.push(pfn);
        } else {
            full.push((pfn, page));
        }
        if full.len() == BATCH_PAGES {
            page_data(&full, out);
            full.clear();
        }
        if changed.len() == BATCH_PAGES {
            page_deltas(&changed, &deltas, out);
            changed.clear();
            deltas.clear();
        }
    }
    if !full.is_empty() {
        page_data(&full, out);
    }
    if !changed.is_empty() {
        page_deltas(&changed, &deltas, out);
    }
    for pfns in zero.chunks(ZERO_PAGES_PER_RECORD) {
        Header { record: RECORD_ZERO_PAGES, len_bytes: COUNT_BYTES + pfns.len() * 8 }.put(out);
        put_pfns(pfns.iter().copied(), pfns.len(), out);
    }
    zero.len()
}

fn page_deltas(pfns: &[Pfn], deltas: &[u8], out: &mut BytesMut) {
    let header = Header { record: RECORD_PAGE_DELTAS, len_bytes: COUNT_BYTES + pfns.len() * 8 + deltas.len() };
    out.reserve(Header::BYTES + header.padded_bytes());
    header.put(out);
    put_pfns(pfns.iter().copied(), pfns.len(), out);
    out.put_slice(deltas);
    out.put_bytes(0, header.padded_bytes() - header.len_bytes);
}

fn page_data(pages: &[(Pfn, &[u8])], out: &mut BytesMut) {
    let header = Header { record: RECORD_PAGE_DATA, len_bytes: COUNT_BYTES + pages.len() * (8 + PAGE_SIZE) };
    out.reserve(Header::BYTES + header.len_bytes);
    header.put(out);
    put_pfns(pages.iter().map(|(pfn, _)| *pfn), pages.len(), out);
    for (_, page) in pages {
        out.put_slice(page);
    }
}

fn put_pfns(pfns: impl Iterator<Item = Pfn>, count: usize, out: &mut BytesMut) {
    record::put_count(count, out);
    for pfn in pfns {
        out.put_u64_le(pfn.0);
    }
}

/// Appends the record that lets the secondary's guest rest.
pub fn encode_guest_rests(out: &mut BytesMut) {
    record::put(RECORD_GUEST_RESTS, &[], out);
}

fn carried(body: &[u8]) -> Result<Item, StreamError> {
    let bad = |why| StreamError::BadRecord { record: RECORD_CARRIED, len_bytes: body.len(), why };
    let (list, rest) = record::take_entries::<CARRIED_BYTES>(body).map_err(bad)?;
    if !rest.is_empty() {
        return Err(bad("longer than its count"));
    }
    let list = list.iter().map(Carried::decode).collect::<Option<Vec<_>>>();
    list.map(Item::Carried).ok_or_else(|| bad("a connection that cannot be"))
}

/// Appends the record of connections in two sequence spaces.
pub fn encode_carried(carried: &[Carried], out: &mut BytesMut) {
    let mut body = BytesMut::with_capacity(COUNT_BYTES + carried.len() * CARRIED_BYTES);
    record::put_count(carried.len(), &mut body);
    carried.iter().for_each(|carried| body.put_slice(&carried.encode()));
    record::put(RECORD_CARRIED, &body, out);
}

fn output(body: &[u8]) -> Result<Item, StreamError> {
    let bad = || StreamError::BadRecord { record: RECORD_OUTPUT, len_bytes: body.len(), why: "a frame is cut short" };
    let (mut rest, mut frames) = (body, Vec::new());
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk().ok_or_else(bad)?;
        let (frame, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(bad)?;
        frames.push(Bytes::copy_from_slice(frame));
        rest = behind;
    }
    Ok(Item::Output(frames))
}

/// Appends the record of frames that wait for this state, each behind its length as le32: of [`OUTPUT_MAX_BYTES`] at most.
pub fn encode_output(frames: &[Bytes], out: &mut BytesMut) {
    let mut body = BytesMut::new();
    for frame in frames {
        body.put_u32_le(frame.len() as u32);
        body.put_slice(frame);
    }
    debug_assert!(body.len() <= OUTPUT_MAX_BYTES, "the peer refuses more");
    record::put(RECORD_OUTPUT, &body, out);
}

/// Appends the record that closes a run of page records.
pub fn encode_pages_end(out: &mut BytesMut) {
    record::put(RECORD_CHECKPOINT, &[], out);
}

/// Appends VMSTATE_SIZE and the device state.
pub fn encode_device_state(blob: &[u8], out: &mut BytesMut) {
    Message::VmstateSize(blob.len() as u64).encode(out);
    out.put_slice(blob);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(pages: &[(u64, u8)]) -> PageBatch {
        let mut batch = PageBatch::default();
        for (pfn, fill) in pages {
            batch.push(Pfn(*pfn), &[*fill; PAGE_SIZE]);
        }
        batch
    }

    fn carried_to(clients: [&str; 2]) -> [Carried; 2] {
        let guests = ["10.0.0.2:80", "[fe80::2]:80"].map(|guest| guest.parse().unwrap());
        let [client, client6] = clients.map(|client| client.parse().unwrap());
        let (vlans, offset, clock_offset) = ([7, 0], 1, 2);
        [
            Carried { vlans, guest: guests[0], client, offset, clock_offset, echoed: Some(3) },
            Carried { vlans, guest: guests[1], client: client6, offset, clock_offset, echoed: None },
        ]
    }

    fn put(batch: &PageBatch, out: &mut BytesMut) -> usize {
        encode_pages(&batch.pfns, &batch.bytes, None, out)
    }

    #[test]
    fn page_data_is_xens_bytes() {
        let mut out = BytesMut::new();
        assert_eq!(put(&batch(&[(5, 0xaa), (6, 0)]), &mut out), 1);
        assert_eq!(&out[..24], [1, 0, 0, 0, 0x10, 0x10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(out.len(), 8 + 16 + PAGE_SIZE + 8 + 16);
    }

    #[test]
    fn a_whole_checkpoint_survives_any_fragmentation() {
        let carried = carried_to(["10.0.0.9:4000", "[fe80::9]:4001"]);
        let output = [Bytes::from_static(b"said"), Bytes::new(), Bytes::from_static(b"and more")];
        let mut out = BytesMut::new();
        put(&batch(&[(1, 1), (2, 0), (3, 3)]), &mut out);
        encode_pages_end(&mut out);
        encode_device_state(b"first", &mut out);
        Message::CheckpointRequest.encode(&mut out);
        Message::VmstateSend.encode(&mut out);
        put(&batch(&[(9, 9)]), &mut out);
        encode_guest_rests(&mut out);
        encode_carried(&carried, &mut out);
        encode_output(&output, &mut out);
        encode_pages_end(&mut out);
        encode_device_state(b"", &mut out);
        let expected = [
            Item::Pages(batch(&[(1, 1), (3, 3)])),
            Item::ZeroPages(vec![Pfn(2)]),
            Item::PagesEnd,
            Item::DeviceState(b"first".to_vec()),
            Item::Message(Message::CheckpointRequest),
            Item::Message(Message::VmstateSend),
            Item::Pages(batch(&[(9, 9)])),
            Item::GuestRests,
            Item::Carried(carried.to_vec()),
            Item::Output(output.to_vec()),
            Item::PagesEnd,
            Item::DeviceState(vec![]),
        ];
        for piece in [1, 7, 4096, usize::MAX] {
            let (mut decoder, mut input, mut seen) = (Decoder::new(16), BytesMut::new(), Vec::new());
            for chunk in out.chunks(piece.min(out.len())) {
                input.extend_from_slice(chunk);
                while let Some(item) = decoder.decode(&mut input).unwrap() {
                    seen.push(item);
                }
            }
            assert_eq!(seen, expected);
            assert!(input.is_empty());
        }
    }

    #[test]
    fn a_page_that_is_sent_again_is_sent_as_what_changed() {
        let (mut sent, mut out) = (SentPages::new(8), BytesMut::new());
        let mut again = batch(&[(1, 1), (2, 2), (3, 3)]);
        encode_pages(&again.pfns, &again.bytes, Some(&mut sent), &mut out);
        let whole = out.len();
        again.bytes[5] = 99;
        again.bytes[PAGE_SIZE..2 * PAGE_SIZE].fill(0);
        encode_pages(&again.pfns, &again.bytes, Some(&mut sent), &mut out);
        assert_eq!(out.len() - whole, 8 + 8 + 2 * 8 + (2 + 4 + 8) + 2 + 8 + 8 + 8, "two deltas, one zero page");
        let mut decoder = Decoder::new(16);
        let Ok(Some(Item::Pages(first))) = decoder.decode(&mut out) else { panic!("no pages") };
        let Ok(Some(Item::Deltas(deltas))) = decoder.decode(&mut out) else { panic!("no deltas") };
        let made = deltas.apply(|pfn| first.iter().find(|(have, _)| *have == pfn).unwrap().1);
        assert_eq!(made.pfns, [Pfn(1), Pfn(3)]);
        assert_eq!(made.bytes[..PAGE_SIZE], again.bytes[..PAGE_SIZE]);
        assert_eq!(decoder.decode(&mut out), Ok(Some(Item::ZeroPages(vec![Pfn(2)]))));
        assert!(out.is_empty());
    }

    #[test]
    fn what_a_peer_may_not_say_is_refused_by_name() {
        let refuse = |bytes: &[u8]| Decoder::new(16).decode(&mut BytesMut::from(bytes)).unwrap_err();
        let header = |record: u32, len: u32| [record.to_le_bytes(), len.to_le_bytes()].concat();
        assert_eq!(refuse(&header(0x77, 0)), StreamError::UnknownRecord(0x77));
        assert!(matches!(refuse(&header(RECORD_PAGE_DATA, u32::MAX)), StreamError::BadRecord { .. }));
        let mut outside = BytesMut::new();
        put(&batch(&[(16, 1)]), &mut outside);
        assert_eq!(refuse(&outside), StreamError::PfnOutOfRange { pfn: 16, nr_pages: 16 });
        let mut zero_count = header(RECORD_ZERO_PAGES, 8);
        zero_count.extend([0; 8]);
        assert!(refuse(&zero_count).to_string().contains("count of zero"));

        let mut carried = BytesMut::new();
        encode_carried(&carried_to(["10.0.0.9:4000", "[fe80::9]:4001"]), &mut carried);
        let (bits_at, count_at) = (Header::BYTES + COUNT_BYTES + CARRIED_BYTES - 4, Header::BYTES);
        carried[bits_at] |= 4;
        assert!(refuse(&carried).to_string().contains("a connection that cannot be"), "{}", refuse(&carried));
        carried[count_at] = 1;
        assert!(refuse(&carried).to_string().contains("longer than its count"), "{}", refuse(&carried));
        let most = (COUNT_BYTES + CARRIED_MAX * CARRIED_BYTES) as u32;
        assert!(matches!(refuse(&header(RECORD_CARRIED, most + 1)), StreamError::BadRecord { .. }));

        for (len_bytes, length) in [(4, 1_u32), (8, u32::MAX), (7, 0)] {
            let body = [&length.to_le_bytes()[..], &[0; 4]].concat();
            let mut output = BytesMut::new();
            record::put(RECORD_OUTPUT, &body[..len_bytes], &mut output);
            assert!(refuse(&output).to_string().contains("a frame is cut short"), "{}", refuse(&output));
        }
        let too_much = header(RECORD_OUTPUT, OUTPUT_MAX_BYTES as u32 + 1);
        assert!(matches!(refuse(&too_much), StreamError::BadRecord { .. }));

        let mut decoder = Decoder::new(16);
        let mut input = BytesMut::new();
        encode_pages_end(&mut input);
        Message::VmstateSize(DEVICE_STATE_MAX_BYTES + 1).encode(&mut input);
        assert_eq!(decoder.decode(&mut input), Ok(Some(Item::PagesEnd)));
        let refused = decoder.decode(&mut input).unwrap_err();
        assert_eq!(refused, StreamError::DeviceStateTooLarge(DEVICE_STATE_MAX_BYTES + 1));
    }

    #[test]
    fn optional_records_are_skipped() {
        let mut input = BytesMut::from(&[5, 0, 0, 0x80, 4, 0, 0, 0, b'h', b'i', b'n', b't', 0, 0, 0, 0][..]);
        encode_pages_end(&mut input);
        assert_eq!(Decoder::new(1).decode(&mut input), Ok(Some(Item::PagesEnd)));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), start in 0_u8..2) {
            let mut decoder = Decoder::new(64);
            let mut input = BytesMut::new();
            if start == 1 {
                encode_pages_end(&mut input);
            }
            input.extend_from_slice(&bytes);
            for _ in 0..100 {
                if !matches!(decoder.decode(&mut input), Ok(Some(_))) {
                    break;
                }
            }
        }
    }
}
