//! Versions, xenstore, libxl, eligibility, and a domain made from another's configuration.

use crate::{Guest, guest};
use xen::libxl::Context;
use xen::{Access, DomId, Error, ForeignMemory, PAGE_BYTES, PageCache, hvm, refuse};

#[test]
fn releases_and_domains() {
    let Some(g) = guest("releases_and_domains") else { return };
    let versions = g.x.versions();
    println!("tools {:?}, hypervisor {:?}{}", versions.tools, versions.hypervisor, versions.extra);
    assert_eq!(versions.tools, versions.hypervisor);
    assert!(!versions.extra.is_empty());
    let all = g.x.domains().expect("domains");
    assert_eq!(all[0].domid, DomId(0));
    let info = g.info();
    println!("{info:?}");
    assert!(all.iter().any(|other| other.domid == g.d && other.handle == info.handle));
    assert!(info.hvm && info.hap && !info.dying && info.shutdown.is_none() && info.total_pages > 10_000);
    assert!(g.x.domain_info(DomId(0x7000)).expect("information").is_none());
    let missing = g.x.pause(DomId(0x7000)).expect_err("there is none");
    assert_eq!(missing.errno(), Some(libc::ESRCH), "{missing}");
}

#[test]
fn xenstore() {
    let Some(g) = guest("xenstore") else { return };
    let base = "/tool/xen-colo-test";
    g.store.remove(base).expect("remove");
    g.store.remove(base).expect("a second time is no error");
    assert_eq!(g.store.read(base).expect("read"), None);
    assert_eq!(g.store.list(base).expect("list"), Vec::<String>::new());
    let (a, b) = (format!("{base}/a"), format!("{base}/b"));
    g.store.write_all(&[(&a, "1"), (&b, "two words")], &a).expect("write");
    let mut names = g.store.list(base).expect("list");
    names.sort();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(g.store.read(&b).expect("read").as_deref(), Some("two words"));
    g.store.remove(base).expect("remove");
    assert_eq!(g.store.by_name("no-such-guest").expect("names"), None);
    g.store.resume_domain(g.d).expect("resume");
    let refused = g.store.resume_domain(DomId(0x7000)).expect_err("there is none");
    assert!(matches!(refused, Error::Store { .. }), "{refused}");
    println!("{refused}");
}

#[test]
fn eligibility() {
    let Some(g) = guest("eligibility") else { return };
    let facts = refuse::gather(&g.x, &g.store, g.d).expect("facts");
    println!("{facts:?}");
    assert_eq!(refuse::judge(&facts), []);
    let dom0 = refuse::judge(&refuse::gather(&g.x, &g.store, DomId(0)).expect("facts"));
    assert!(dom0.iter().any(|refusal| refusal.reason.contains("control domain")), "{dom0:?}");
}

#[test]
fn a_second_domain_of_the_same_configuration() {
    let Some(g) = guest("a_second_domain_of_the_same_configuration") else { return };
    let xl = Context::new().expect("libxl");
    let nics = xl.nics(g.d).expect("nics");
    println!("{nics:?} {:?}", xl.disks(g.d).expect("disks"));
    assert_eq!(nics.len(), 1);
    assert_eq!(nics[0].ifname, format!("vif{}.0", g.d));
    assert_eq!(xl.domid_of(&g.name).expect("name"), Some(g.d));
    assert_eq!(xl.domid_of("no-such-guest").expect("name"), None);
    assert_eq!((xl.name_of(g.d).as_deref(), xl.name_of(DomId(0x7000))), (Some(g.name.as_str()), None));
    let json = xl.config_json(g.d).expect("configuration");
    // The name may be a word that stands elsewhere too.
    let named = |name: &str| json.replace(&format!("\"name\": \"{}\"", g.name), &format!("\"name\": \"{name}\""));
    assert_ne!(named("second"), json);
    assert!(matches!(xl.create_paused("{ \"c_info\": 7 }", true), Err(Error::Libxl { .. })));
    let first = xl.create_paused(&named("first"), true).expect("create");
    let second = xl.create_paused(&named("second"), true).expect("create");
    xl.destroy(first).expect("destroy");
    // The next domain answers for one that is gone.
    assert_eq!(g.x.domain_info(first).expect("information"), None);
    let info = g.x.domain_info(second).expect("information").expect("it was made");
    assert!(info.paused && info.hvm && info.handle != g.info().handle, "{info:?}");
    assert_eq!(xl.nics(second).expect("nics")[0].mac, nics[0].mac);
    xl.rename(second, "second", "third").expect("rename");
    assert!(xl.rename(second, "second", "fourth").is_err(), "it has another name by now");
    assert_eq!(xl.domid_of("third").expect("name"), Some(second));
    load(&g, second);
    xl.unpause(second).expect("unpause");
    xl.pause(second).expect("pause");
    xl.destroy(second).expect("destroy");
    assert_eq!(g.x.domain_info(second).expect("information"), None);
}

/// Everything that a copy is loaded with, into a domain that never ran.
fn load(g: &Guest, second: DomId) {
    let policy = g.x.cpu_policy(g.d).expect("policy");
    g.x.set_cpu_policy(second, &policy).expect("set the policy");
    assert_eq!(g.x.cpu_policy(second).expect("policy"), policy);
    let mut wrong = policy.clone();
    wrong.leaves.push([0x5000_0000, 0, 1, 2, 3, 4]);
    let refused = g.x.set_cpu_policy(second, &wrong).expect_err("there is no such leaf");
    println!("{refused}");
    assert!(refused.to_string().contains("leaf 0x50000000"), "{refused}");
    let tsc = g.x.tsc_info(g.d).expect("TSC");
    g.x.set_tsc_info(second, &tsc).expect("set the TSC");
    let blob = g.x.hvm_context(g.d).expect("context");
    g.x.set_hvm_context(second, &blob).expect("load the context");
    for param in hvm::PARAMS.into_iter().filter(|param| hvm::is_reloadable(*param)) {
        let value = g.x.hvm_param(g.d, param).unwrap_or(0);
        if value != 0 {
            g.x.set_hvm_param(second, param, value).expect("set a parameter");
            assert_eq!(g.x.hvm_param(second, param).expect("parameter"), value);
        }
    }
    let page = |index| g.x.hvm_param(second, index).expect("parameter");
    g.x.seed_grants(second, page(17), page(1), DomId(0), DomId(0)).expect("seed the grants");
    // More memory than it was made with.
    let gfns: Vec<u64> = (0x8_0000..0x8_0000 + 1500).collect();
    let memory = ForeignMemory::open().expect("foreign memory");
    let mut cache = PageCache::new(memory, second, Access::ReadWrite, 4096);
    let (mut bytes, mut holes) = (Vec::new(), Vec::new());
    cache.read(&gfns[..2], &mut bytes, &mut holes).expect("read");
    assert_eq!(holes, [0, 1], "nothing is there yet");
    let full = g.x.populate(second, &gfns).expect_err("over the limit");
    assert!(full.to_string().contains("limit"), "{full}");
    g.x.set_max_mem_kib(second, 160 << 10).expect("raise the limit");
    let mut types = Vec::new();
    g.x.page_types(second, &gfns, &mut types).expect("types");
    let missing: Vec<u64> = gfns.iter().zip(&types).filter(|(_, kind)| kind.is_xtab()).map(|(gfn, _)| *gfn).collect();
    g.x.populate(second, &missing).expect("populate");
    // Holes of the cache's mapping are looked at again.
    let pages: Vec<u8> = (0..gfns.len() * PAGE_BYTES).map(|n| (n / PAGE_BYTES % 255 + 1) as u8).collect();
    cache.write(&gfns, &pages).expect("write");
    g.x.clear_page(second, gfns[7]).expect("clear");
    (bytes, holes) = (Vec::new(), Vec::new());
    cache.read(&gfns, &mut bytes, &mut holes).expect("read");
    assert!(holes.is_empty());
    let cleared = 7 * PAGE_BYTES..8 * PAGE_BYTES;
    assert!(bytes[cleared.clone()].iter().all(|byte| *byte == 0));
    assert!(bytes[..cleared.start] == pages[..cleared.start] && bytes[cleared.end..] == pages[cleared.end..]);
}
