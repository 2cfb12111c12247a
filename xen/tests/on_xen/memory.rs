//! Pages: what is behind numbers, mapping them, keeping the mappings, and a guest that exchanges them.

use crate::{HOLE, guest, until};
use std::thread;
use std::time::{Duration, Instant};
use xen::{Access, BATCH, Error, ForeignMemory, PAGE_BYTES, PageCache, hvm};

#[test]
fn types_of_many_frames_at_once() {
    let Some(g) = guest("types_of_many_frames_at_once") else { return };
    // More than Xen answers in one call.
    let gfns: Vec<u64> = (0..3 * BATCH as u64 + 5).collect();
    let mut types = Vec::new();
    g.x.page_types(g.d, &gfns, &mut types).expect("types");
    assert_eq!(types.len(), gfns.len());
    let present = types.iter().filter(|kind| kind.is_present()).count();
    assert!(present > 2 * BATCH, "{present}");
    // Appended, in order.
    g.x.page_types(g.d, &[HOLE, 0x100], &mut types).expect("types");
    assert!(types[gfns.len()].is_xtab() && types[gfns.len() + 1].is_present());
    let special: Vec<u64> = (0xf_eff0..=0xf_efff).collect();
    let mut kinds = Vec::new();
    g.x.page_types(g.d, &special, &mut kinds).expect("types");
    let there: Vec<String> =
        special.iter().zip(&kinds).filter(|(_, kind)| kind.is_present()).map(|(gfn, _)| format!("{gfn:#x}")).collect();
    println!("special pages that are there: {}", there.join(" "));
    // xenstore's and the console's rings.
    assert!(kinds[0xc].is_present() && kinds[0xf].is_present());
    assert!(special.iter().all(|gfn| hvm::is_special_gfn(*gfn)));
    assert_eq!(g.x.hvm_param(g.d, 1).expect("STORE_PFN"), 0xf_effc);
    assert!(g.x.nr_gpfns(g.d).expect("frames") > 0xf_efff);
}

#[test]
fn a_batch_with_holes_is_mapped_around_them() {
    let Some(g) = guest("a_batch_with_holes_is_mapped_around_them") else { return };
    let memory = ForeignMemory::open().expect("foreign memory");
    let mut gfns: Vec<u64> = (0x100..0x100 + 1500).collect();
    gfns[3] = HOLE;
    gfns[1200] = HOLE + 1;
    let mapping = memory.map(g.d, Access::Read, &gfns).expect("map");
    assert_eq!(mapping.len(), 1500);
    let mut page = vec![0xa5; PAGE_BYTES];
    for hole in [3, 1200] {
        let error = mapping.error(hole).expect("a hole");
        assert!(error > 0, "an errno: {error}");
        assert!(!mapping.copy_out(hole, &mut page) && page.iter().all(|byte| *byte == 0xa5));
    }
    assert_eq!(mapping.error(1500), Some(libc::EINVAL));
    assert!([0, 2, 4, 1023, 1024, 1499].iter().all(|i| mapping.error(*i).is_none() && mapping.copy_out(*i, &mut page)));
    assert!(!mapping.copy_in(0, &page), "it was mapped for reading");
}

#[test]
fn the_cache_reads_what_a_mapping_reads_and_writes_what_it_is_given() {
    let Some(g) = guest("the_cache_reads_what_a_mapping_reads_and_writes_what_it_is_given") else { return };
    let memory = ForeignMemory::open().expect("foreign memory");
    let gfns: Vec<u64> = (0x800..0x800 + 1024).chain([HOLE]).chain((0x4000..0x4100).rev()).collect();
    g.paused(|| {
        let (mut bytes, mut holes) = (Vec::new(), Vec::new());
        // Two granules at most: it has to let go while reading.
        let mut cache = PageCache::new(memory.clone(), g.d, Access::ReadWrite, 1024);
        for round in 0..2 {
            bytes.clear();
            holes.clear();
            let begun = Instant::now();
            cache.read(&gfns, &mut bytes, &mut holes).expect("read");
            println!("cache, round {round}: {} pages in {:?}", gfns.len(), begun.elapsed());
            assert_eq!((bytes.len(), holes.as_slice()), (gfns.len() * PAGE_BYTES, &[1024][..]));
            assert!(cache.mapped_pages() <= 1024, "{}", cache.mapped_pages());
            let begun = Instant::now();
            let mapping = memory.map(g.d, Access::Read, &gfns).expect("map");
            let mut page = vec![0; PAGE_BYTES];
            for (i, cached) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                page.fill(0);
                assert_eq!(mapping.copy_out(i, &mut page), i != 1024);
                assert!(cached == page, "frame {:#x}", gfns[i]);
            }
            drop(mapping);
            println!("plain mapping, with the comparison: {:?}", begun.elapsed());
        }
        assert!(bytes.iter().any(|byte| *byte != 0));
        // What is written is there for others, and what was there comes back.
        let (gfn, old) = (0x800u64, bytes[..PAGE_BYTES].to_vec());
        let new: Vec<u8> = (0..PAGE_BYTES).map(|n| (n % 251) as u8).collect();
        cache.write(&[gfn], &new).expect("write");
        let mut page = vec![0; PAGE_BYTES];
        assert!(memory.map(g.d, Access::Read, &[gfn]).expect("map").copy_out(0, &mut page));
        assert!(page == new, "written");
        cache.write(&[gfn], &old).expect("write");
        let refused = cache.write(&[gfn, HOLE], &[old.clone(), old.clone()].concat());
        assert!(matches!(refused, Err(Error::Unmappable { gfn: HOLE, .. })), "{refused:?}");
        assert!(cache.write(&[gfn], &old[1..]).is_err());
        let mut reader = PageCache::new(memory.clone(), g.d, Access::Read, 0);
        assert!(reader.write(&[gfn], &old).is_err());
        // Kept or not, the numbers agree.
        cache.forget(&gfns);
        assert_eq!(cache.mapped_pages(), 0);
    });
}

/// The guest's balloon gives frames back and gets others behind the same numbers.
#[test]
fn exchanged_frames_are_found() {
    let Some(g) = guest("exchanged_frames_are_found") else { return };
    let target = format!("{}/memory/target", g.store.domain_path(g.d));
    let old = g.store.read(&target).expect("target").expect("a target");
    let kib: u64 = old.parse().expect("a number");
    let gfns: Vec<u64> = (0..kib / 4).collect();
    let present = || {
        let mut types = Vec::new();
        g.x.page_types(g.d, &gfns, &mut types).expect("types");
        types.iter().filter(|kind| kind.is_present()).count()
    };
    let memory = ForeignMemory::open().expect("foreign memory");
    let mut cache = PageCache::new(memory.clone(), g.d, Access::Read, gfns.len() + 1024);
    let differing = |cache: &mut PageCache| {
        let read = |cache: &mut PageCache| {
            let (mut bytes, mut holes) = (Vec::new(), Vec::new());
            cache.read(&gfns, &mut bytes, &mut holes).expect("read");
            bytes
        };
        let before = read(cache);
        let fresh = read(&mut PageCache::new(memory.clone(), g.d, Access::Read, 4096));
        // A backend may write a ring of the guest's meanwhile. Of an exchanged frame both readings differ.
        let after = read(cache);
        let pages =
            before.chunks_exact(PAGE_BYTES).zip(after.chunks_exact(PAGE_BYTES)).zip(fresh.chunks_exact(PAGE_BYTES));
        pages.filter(|((before, after), fresh)| before != fresh && after != fresh).count()
    };
    g.paused(|| {
        assert!(!cache.revalidate(&g.x).expect("revalidate"), "nothing was kept");
        assert_eq!(differing(&mut cache), 0);
        assert!(!cache.revalidate(&g.x).expect("revalidate"), "nothing was exchanged");
    });
    let (frames, total) = (present(), g.info().total_pages);
    g.store.write(&target, &(kib - 12 * 1024).to_string()).expect("deflate");
    // All of it: the few frames it can get back must not be outnumbered by others on their way out.
    let mut least = frames;
    until("the guest has given its 12 MiB back", Duration::from_secs(120), || {
        let before = std::mem::replace(&mut least, present());
        thread::sleep(Duration::from_secs(3));
        least + 1536 < frames && least == before
    });
    // Held by the cache, they are the guest's still.
    let (held, low) = (g.info().total_pages, present());
    g.store.write(&target, &old).expect("inflate");
    until("the guest gets some back", Duration::from_secs(120), || present() > low + 64);
    g.paused(|| {
        let now = g.info().total_pages;
        println!("frames {frames} -> {low} -> {}, total {total} -> {held} -> {now}", present());
        let stale = differing(&mut cache);
        println!("{stale} kept pages were not the guest's any more");
        // Their bytes may be equal: a guest scrubs what it gives back. The total cannot be.
        assert!(now > held, "no frame was exchanged: this test proves nothing");
        assert!(cache.revalidate(&g.x).expect("revalidate"), "the exchange was not found");
        assert_eq!(differing(&mut cache), 0);
        assert!(!cache.revalidate(&g.x).expect("revalidate"), "found twice");
    });
    cache.clear();
    until("the guest is as large as before", Duration::from_secs(60), || present() >= frames);
}
