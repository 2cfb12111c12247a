//! The image's encoder and decoder: round trips, truncations, garbage, and what a sender may not say.

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use xen_colo::image::pages::encode_page_head;
use xen_colo::image::records::VcpuPart;
use xen_colo::image::{
    Decoder, DomainHeader, DomainType, HvmParam, ImageError, ImageHeader, Item, Msr, PageEntry, PageType, Pages,
    RECORD_MAX_BYTES, Record, TscInfo,
};
use xen_colo::page::{BATCH_PAGES, PAGE_SIZE};
use xen_colo::record;

pub fn headers(version: u32, kind: DomainType) -> BytesMut {
    let mut out = BytesMut::new();
    ImageHeader { version }.encode(&mut out);
    DomainHeader { kind, xen: (4, 17) }.encode(&mut out);
    out
}

fn put_pages(entries: &[PageEntry], fill: u8, out: &mut BytesMut) {
    encode_page_head(entries, out);
    out.put_bytes(fill, entries.iter().filter(|entry| entry.kind.has_contents()).count() * PAGE_SIZE);
}

fn entry(pfn: u64, kind: PageType) -> PageEntry {
    PageEntry { pfn, kind }
}

/// Everything a stream says, and whether that was all of it; or why it was refused.
fn decode(mut input: &[u8]) -> Result<(Vec<Item>, bool), ImageError> {
    let (mut decoder, mut items) = (Decoder::new(), Vec::new());
    while !decoder.is_over() {
        let wants = decoder.wants();
        assert!(wants <= BATCH_PAGES * PAGE_SIZE, "{wants} bytes at once");
        let Some((bytes, rest)) = input.split_at_checked(wants) else { return Ok((items, false)) };
        input = rest;
        items.extend(decoder.feed(bytes.to_vec())?);
    }
    Ok((items, input.is_empty()))
}

fn records(kind: DomainType) -> impl Strategy<Value = Record> {
    let blob = || prop::collection::vec(any::<u8>(), 1..50);
    let any_kind = prop_oneof![
        (any::<u32>(), any::<u32>(), any::<u64>(), any::<u32>())
            .prop_map(|(mode, khz, nsec, incarnation)| Record::TscInfo(TscInfo { mode, khz, nsec, incarnation })),
        Just(Record::Verify),
        Just(Record::Checkpoint),
        blob().prop_map(Record::Toolstack),
        prop::collection::vec(any::<u64>(), 0..5).prop_map(Record::DirtyPfnList),
    ];
    let hvm = prop_oneof![
        blob().prop_map(Record::HvmContext),
        prop::collection::vec((any::<u64>(), any::<u64>()), 0..5).prop_map(|params| {
            Record::HvmParams(params.into_iter().map(|(index, value)| HvmParam { index, value }).collect())
        }),
    ];
    let part =
        prop_oneof![Just(VcpuPart::Basic), Just(VcpuPart::Extended), Just(VcpuPart::Xsave), Just(VcpuPart::Msrs)];
    let pv = prop_oneof![
        (0_u32..9, 9_u32..99, prop::collection::vec(any::<u64>(), 0..5))
            .prop_map(|(start_pfn, end_pfn, frames)| Record::PvP2mFrames { start_pfn, end_pfn, frames }),
        (part, any::<u32>(), blob()).prop_map(|(part, vcpu, state)| Record::PvVcpu { part, vcpu, state }),
        any::<u8>().prop_map(|fill| Record::SharedInfo(vec![fill; PAGE_SIZE])),
    ];
    if kind == DomainType::Pv { prop_oneof![any_kind, pv].boxed() } else { prop_oneof![any_kind, hvm].boxed() }
}

fn statics(kind: DomainType) -> impl Strategy<Value = Vec<Record>> {
    let leaves = prop::collection::vec(any::<[u32; 6]>(), 0..4).prop_map(Record::CpuidPolicy);
    let msrs = prop::collection::vec((any::<u32>(), any::<u32>(), any::<u64>()), 0..4).prop_map(|msrs| {
        Record::MsrPolicy(msrs.into_iter().map(|(index, flags, value)| Msr { index, flags, value }).collect())
    });
    let info = (prop_oneof![Just(4_u8), Just(8)], 3_u8..5)
        .prop_map(|(guest_width, pt_levels)| Record::PvInfo { guest_width, pt_levels });
    (leaves, msrs, info).prop_map(move |(leaves, msrs, info)| {
        let pv = (kind == DomainType::Pv).then_some(info);
        pv.into_iter().chain([leaves, msrs, Record::StaticDataEnd]).collect()
    })
}

fn page_types(kind: DomainType) -> impl Strategy<Value = PageType> {
    let bits: Vec<u8> = if kind == DomainType::Pv { (0..5).chain(9..16).collect() } else { vec![0, 0xD, 0xE, 0xF] };
    prop::sample::select(bits).prop_map(|bits| PageType::new(bits).unwrap())
}

fn images() -> impl Strategy<Value = (u32, DomainType, Vec<Record>, Vec<PageEntry>, u8, Vec<Record>)> {
    (2_u32..4, prop_oneof![Just(DomainType::Hvm), Just(DomainType::Pv)]).prop_flat_map(|(version, kind)| {
        let entries = prop::collection::vec((0_u64..1 << 52, page_types(kind)), 1..12)
            .prop_map(|entries| entries.into_iter().map(|(pfn, kind)| PageEntry { pfn, kind }).collect());
        let tail = prop::collection::vec(records(kind), 0..8);
        (Just(version), Just(kind), statics(kind), entries, any::<u8>(), tail)
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back((version, kind, statics, entries, fill, tail) in images()) {
        let mut out = headers(version, kind);
        // A version 2 image has no static records but PV_INFO, and the decoder puts the end there itself.
        let written: Vec<_> = statics.iter().filter(|record| version == 3 || matches!(record, Record::PvInfo { .. })).collect();
        written.iter().for_each(|record| record.encode(&mut out));
        put_pages(&entries, fill, &mut out);
        tail.iter().for_each(|record| record.encode(&mut out));
        Record::End.encode(&mut out);
        let contents = entries.iter().filter(|entry| entry.kind.has_contents()).count() * PAGE_SIZE;
        let mut expected =
            vec![Item::Image(ImageHeader { version }), Item::Domain(DomainHeader { kind, xen: (4, 17) })];
        expected.extend(written.into_iter().cloned().map(Item::Record));
        if version == 2 {
            expected.push(Item::Record(Record::StaticDataEnd));
        }
        expected.push(Item::Pages(Pages { entries, bytes: vec![fill; contents] }));
        expected.extend(tail.into_iter().map(Item::Record));
        expected.push(Item::Record(Record::End));
        prop_assert_eq!(decode(&out), Ok((expected.clone(), true)));

        // What is behind END is somebody else's.
        let mut longer = out.clone();
        longer.put_slice(b"libxl");
        prop_assert_eq!(decode(&longer), Ok((expected.clone(), false)));

        // Any truncation says a prefix of it, is not over, and is not an error.
        for cut in (0..out.len()).step_by(41).chain(out.len().saturating_sub(20)..out.len()) {
            let (items, over) = decode(&out[..cut]).unwrap();
            prop_assert!(!over && expected.starts_with(&items), "cut at {}", cut);
        }
    }

    #[test]
    fn a_flipped_byte_never_panics((version, kind, statics, entries, fill, tail) in images(), at in any::<prop::sample::Index>(), flip in 1_u8..) {
        let mut out = headers(version, kind);
        statics.iter().for_each(|record| record.encode(&mut out));
        put_pages(&entries[..entries.len().min(2)], fill, &mut out);
        tail.iter().for_each(|record| record.encode(&mut out));
        let at = at.index(out.len());
        out[at] ^= flip;
        let _ = decode(&out);
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(prop_oneof![Just(0_u8), 0_u8..20, any::<u8>()], 0..300)) {
        let _ = decode(&bytes);
        let mut out = headers(2, DomainType::Hvm);
        out.put_slice(&bytes);
        if let Ok((items, _)) = decode(&out) {
            let held: usize = items.iter().map(|item| if let Item::Pages(pages) = item { pages.bytes.len() } else { 0 }).sum();
            prop_assert!(held <= bytes.len());
        }
    }
}

#[test]
fn a_large_record_comes_in_batches() {
    let entries: Vec<_> =
        (0..2500).map(|pfn| entry(pfn, if pfn % 2 == 0 { PageType::NOTAB } else { PageType::XTAB })).collect();
    let mut out = headers(3, DomainType::Hvm);
    Record::StaticDataEnd.encode(&mut out);
    put_pages(&entries, 7, &mut out);
    let (items, _) = decode(&out).unwrap();
    let sizes: Vec<_> = items
        .iter()
        .filter_map(|item| {
            if let Item::Pages(pages) = item {
                Some((pages.entries.len(), pages.bytes.len() / PAGE_SIZE))
            } else {
                None
            }
        })
        .collect();
    assert_eq!(sizes, [(1024, 512), (1024, 512), (452, 226)]);
}

#[test]
fn an_optional_record_is_skipped_whatever_its_size() {
    let mut out = headers(3, DomainType::Hvm);
    record::put(0x8000_0077, &vec![9; 5 << 20], &mut out);
    Record::StaticDataEnd.encode(&mut out);
    record::put(0x8000_0078, b"odd", &mut out);
    Record::End.encode(&mut out);
    let (items, over) = decode(&out).unwrap();
    assert_eq!((items.len(), over), (4, true));
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    let refuse = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
    let good = headers(3, DomainType::Hvm);
    let with = |at: usize, byte: u8| {
        let mut out = good.clone();
        out[at] = byte;
        refuse(&out)
    };
    assert!(with(0, 0).contains("marker"));
    assert!(with(8, 0).contains("XENF"));
    assert!(with(15, 4).contains("version 4"));
    assert!(with(15, 1).contains("version 1"));
    assert!(with(17, 1).contains("big-endian"));
    assert!(with(24, 3).contains("neither PV nor HVM"));
    assert!(with(28, 13).contains("4 KiB"));

    let behind = |record: u32, len: u32, body: &[u8]| {
        let mut out = good.clone();
        Record::StaticDataEnd.encode(&mut out);
        out.put_u32_le(record);
        out.put_u32_le(len);
        out.put_slice(body);
        refuse(&out)
    };
    assert!(behind(0x13, 0, &[]).contains("mandatory and unknown"));
    assert!(behind(0x09, RECORD_MAX_BYTES as u32 + 1, &[]).contains("longer"));
    assert!(behind(0x8000_0000, RECORD_MAX_BYTES as u32 + 1, &[]).contains("longer"));
    assert!(behind(0x00, 8, &[0; 8]).contains("longer"));
    assert!(behind(0x08, 16, &[0; 16]).contains("length"));
    assert!(behind(0x09, 0, &[]).contains("empty"));
    assert!(behind(0x0A, 8, &[1, 0, 0, 0, 0, 0, 0, 0]).contains("shorter than its count"));
    assert!(behind(0x01, 4, &[]).contains("no count"));
    assert!(behind(0x01, 16, &[0; 16]).contains("count of zero"));
    assert!(behind(0x01, 16, &[2, 0, 0, 0, 0, 0, 0, 0, 0]).contains("shorter than its count"));
    let one = |raw: u64, contents: usize| {
        let mut body = BytesMut::new();
        record::put_count(1, &mut body);
        body.put_u64_le(raw);
        behind(0x01, (16 + contents) as u32, &body)
    };
    assert!(one(0, 0).contains("do not match"), "a page without contents");
    assert!(one(0xF << 60, PAGE_SIZE).contains("do not match"), "contents without a page");
    assert!(one(5 << 60, PAGE_SIZE).contains("does not exist"));
    assert!(one(1 << 52, PAGE_SIZE).contains("reserved"));
    assert!(one(1 << 60, PAGE_SIZE).contains("page tables"));
    assert!(behind(0x07, 4096, &[0; 4096]).contains("kind"), "a PV record in an HVM image");
    assert!(behind(0x10, 0, &[]).contains("static data has ended"));

    let mut early = good.clone();
    put_pages(&[entry(0, PageType::NOTAB)], 1, &mut early);
    assert!(refuse(&early).contains("static data has not ended"));
}
