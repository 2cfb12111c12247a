//! A planted violation for each rule, and a neighbour of it that is allowed.

use super::{RULES, Source, dead_files};
use std::collections::BTreeMap;

/// Which rules say something about a file.
fn caught(path: &str, text: &str) -> Vec<&'static str> {
    let text = format!("//! Docs.\n{text}\n");
    let source = Source::new(path, &text);
    RULES.iter().filter(|(_, rule)| !rule(&source).is_empty()).map(|(name, _)| *name).collect()
}

const NONE: [&str; 0] = [];

#[test]
fn layers() {
    for (path, text) in [
        ("src/colo/a.rs", "use crate::daemon::links::Links;"),
        ("src/colo/a.rs", "use crate::{page::Pfn, compare::Proxy};"),
        ("src/colo/a.rs", "fn f() { crate::hypervisor::cache::RamCache::new(1); }"),
        ("src/colo/a.rs", "use super::super::nbd;"),
        ("src/colo/mod.rs", "use super::replica::epochs;"),
        ("src/replica/a.rs", "use crate::*;"),
        ("src/page.rs", "use crate::colo::Loss;"),
        ("src/daemon/a.rs", "use crate::demo::GUEST_MAC;"),
        ("src/daemon/pair/a.rs", "use crate::cli::Cli;"),
        ("src/daemon/a.rs", "use crate::report::text;"),
        ("src/report/a.rs", "use crate::cli::ReportArgs;"),
        ("src/report/a.rs", "use crate::replica::epochs;"),
        ("src/cli.rs", "use crate::demo;"),
        ("src/image/a.rs", "use crate::save_helper::Failure;"),
        ("src/save_helper/a.rs", "use crate::daemon::links;"),
        ("src/save_helper/a.rs", "use crate::hypervisor::Domain;"),
        ("src/save_helper.rs", "use super::colo::Loss;"),
        ("src/daemon/a.rs", "use crate::save_helper::stock;"),
    ] {
        assert_eq!(caught(path, text), ["layers"], "{path}: {text}");
    }
    for (path, text) in [
        ("src/colo/a.rs", "use crate::{clock::Instant, mutant, page::Pfn}; use crate::colo::Loss;"),
        ("src/colo/a.rs", "// use crate::daemon::links;\nfn f() { g(\"crate::daemon::x\"); }"),
        ("src/daemon/pair/a.rs", "use crate::{colo, compare, hypervisor}; use super::super::links;"),
        ("src/demo/a.rs", "use crate::cli::Cli; use crate::daemon::status;"),
        ("src/save_helper/a.rs", "use crate::image::Decoder; use crate::{bitmap, page, record}; use xen::Interface;"),
        ("src/demo/a.rs", "use crate::report;"),
        ("src/report/a.rs", "use crate::colo::Cause; use crate::daemon::events::Event; use super::text::plain;"),
        ("src/main.rs", "#![forbid(unsafe_code)]\nuse xen_colo::cli;"),
        ("tests/a.rs", "use xen_colo::{colo, compare};"),
    ] {
        assert_eq!(caught(path, text), NONE, "{path}: {text}");
    }
}

#[test]
fn printing() {
    for text in ["fn f() { println!(\"x\"); }", "fn f() { std::eprint!(\"x\") }\n#[cfg(test)]\nmod tests {}"] {
        assert_eq!(caught("src/daemon/a.rs", text), ["printing"], "{text}");
        assert_eq!(caught("src/daemon/tests/a.rs", text), NONE, "{text}");
        assert_eq!(caught("tests/a.rs", text), NONE, "{text}");
    }
    assert_eq!(caught("src/daemon/a.rs", "#[cfg(test)]\nmod tests { fn f() { println!(\"x\"); } }"), NONE);
}

#[test]
fn tokio() {
    for text in ["use tokio::sync::mpsc;", "use tokio;", "#[tokio::test]\nasync fn f() {}", "use ::tokio::spawn;"] {
        assert_eq!(caught("src/compare/a.rs", text), ["tokio"], "{text}");
        assert_eq!(caught("src/cli.rs", text), ["tokio"], "{text}");
        assert_eq!(caught("src/daemon/a.rs", text), NONE, "{text}");
        assert_eq!(caught("src/demo/a.rs", text), NONE, "{text}");
    }
    assert_eq!(caught("src/replica/a.rs", "use tokio::spawn;"), ["tokio", "replica and hypervisor"]);
}

#[test]
fn pair() {
    for text in [
        "use tokio::sync::mpsc;",
        "use std::net::TcpStream;",
        "use std::{thread, io};",
        "fn f() { Instant::now(); }",
        "use std::os::unix::net::UnixStream;",
        "use std::time::SystemTime;",
    ] {
        assert_eq!(caught("src/daemon/pair/a.rs", text), ["pair"], "{text}");
        assert_eq!(caught("src/daemon/a.rs", text), NONE, "{text}");
    }
}

#[test]
fn pure() {
    for text in [
        "use std::net::TcpStream;",
        "use std::{fs, io};",
        "use std::fs::File;",
        "use std::os::unix::fs::FileExt;",
        "fn f() { std::thread::sleep(d); }",
        "use std::time::{Duration, Instant};",
        "use std::time::*;",
    ] {
        for folder in ["colo", "compare", "nbd", "qmp", "image"] {
            assert_eq!(caught(&format!("src/{folder}/a.rs"), text), ["pure"], "{text}");
        }
        assert_eq!(caught("src/daemon/a.rs", text), NONE, "{text}");
    }
    assert_eq!(caught("src/colo/a.rs", "use std::time::Duration; use crate::clock::Instant;"), NONE);
}

#[test]
fn replica_and_hypervisor() {
    for text in ["use std::net::TcpStream;", "use std::thread::{self, JoinHandle};"] {
        for path in ["src/replica/a.rs", "src/hypervisor/a.rs", "src/hypervisor/embedded/machine.rs"] {
            assert_eq!(caught(path, text), ["replica and hypervisor"], "{path}: {text}");
        }
    }
    let thread = "use std::thread;";
    assert_eq!(caught("src/hypervisor/embedded/domain.rs", thread), NONE);
    assert_eq!(caught("src/hypervisor/embedded/domain.rs", "use std::net;"), ["replica and hypervisor"]);
    assert_eq!(caught("src/replica/a.rs", "use std::fs::File;"), NONE);
}

#[test]
fn clock() {
    for text in ["fn f() { std::time::Instant::now(); }", "fn f() { SystemTime::now(); }"] {
        assert_eq!(caught("src/disk.rs", text), ["clock"], "{text}");
        assert!(caught("src/colo/a.rs", text).contains(&"clock"), "{text}");
        assert!(caught("src/replica/a.rs", text).contains(&"replica and hypervisor"), "{text}");
        assert_eq!(caught("src/demo/a.rs", text), NONE, "{text}");
        assert_eq!(caught("tests/sim/a.rs", text), NONE, "{text}");
    }
}

#[test]
fn length() {
    for path in ["src/a.rs", "tests/a.rs", "scripts/a.sh"] {
        // With the line of docs that `caught` puts in front.
        assert_eq!(caught(path, "\n".repeat(598).as_str()), NONE, "{path}");
        assert_eq!(caught(path, "\n".repeat(600).as_str()), ["length"], "{path}");
    }
}

#[test]
fn module_docs() {
    let silent = Source::new("src/a.rs", "use std::io;\n//! Too late.\n");
    assert_eq!(super::module_docs(&silent).len(), 1);
    assert_eq!(super::module_docs(&Source::new("scripts/a.sh", "#!/bin/sh\n")), NONE);
}

#[test]
fn unfinished() {
    for text in ["fn f() { todo!() }", "fn f() { unimplemented!(\"x\") }", "fn f() { dbg!(1); }"] {
        assert_eq!(caught("src/daemon/a.rs", text), ["unfinished"], "{text}");
        assert_eq!(caught("tests/a.rs", text), ["unfinished"], "{text}");
    }
    assert_eq!(caught("src/daemon/a.rs", "// todo!()\nfn todo() { let todo = \"dbg!\"; }"), NONE);
}

#[test]
fn no_unsafe() {
    assert_eq!(caught("src/daemon/a.rs", "fn f() { unsafe { g() } }"), ["unsafe"]);
    assert_eq!(caught("src/daemon/a.rs", "/// unsafe\nfn f() { g(\"unsafe\") }"), NONE);
    assert_eq!(caught("src/main.rs", "fn main() {}"), ["unsafe"]);
    assert_eq!(caught("src/lib.rs", "#![forbid(unsafe_code)]"), NONE);
}

#[test]
fn ignored_tests() {
    for text in
        ["#[test]\n#[ignore]\nfn f() {}", "#[ignore = \"slow\"]\nfn f() {}", "#[cfg_attr(x, ignore)]\nfn f() {}"]
    {
        assert_eq!(caught("tests/a.rs", text), ["ignored tests"], "{text}");
    }
    assert_eq!(caught("tests/a.rs", "#[test]\nfn ignore() { [ignore]; }"), NONE);
}

#[test]
fn machine_names() {
    for text in [
        concat!("let x = \"/ho", "me/me/x\";"),
        concat!("// see /ro", "ot/x"),
        concat!("cd /wo", "rk/x"),
        concat!("source = \"regis", "try+https://mirror.example/index\""),
        concat!("replace", "-with = \"mine\""),
    ] {
        for path in ["src/daemon/a.rs", "scripts/a.sh", "Cargo.lock"] {
            assert_eq!(caught(path, text), ["machine names"], "{path}: {text}");
        }
    }
    let public = concat!("source = \"regis", "try+https://github.com/rust-lang/crates.io-index\"");
    assert_eq!(caught("Cargo.lock", public), NONE);
    assert_eq!(
        caught("src/daemon/a.rs", concat!("// the frame/wo", "rk/loop; $DIR/ro", "ot; \"$ROOT/ho", "me\"")),
        NONE
    );
}

#[test]
fn dead() {
    let mut files: BTreeMap<String, String> = [
        ("src/lib.rs", "mod a; // mod dead;\nmod b { }"),
        ("src/a.rs", "mod deep; #[cfg(test)] mod tests;"),
        ("src/a/deep/mod.rs", "mod deeper;"),
        ("src/a/deep/deeper.rs", ""),
        ("src/a/tests.rs", ""),
    ]
    .map(|(path, text)| (path.to_owned(), text.to_owned()))
    .into();
    assert_eq!(dead_files(&files, &["src/lib.rs"]), NONE);
    files.insert("src/dead.rs".into(), String::new());
    files.insert("src/a/deeper.rs".into(), "mod deeper;".into());
    assert_eq!(
        dead_files(&files, &["src/lib.rs"]),
        ["src/a/deeper.rs:1: no mod leads here", "src/dead.rs:1: no mod leads here"]
    );
}
