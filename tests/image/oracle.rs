//! Xen's own verifier of migration streams reads what we write.
//!
//! `verify-stream-v2` (Debian: xen-utils-4.17) follows plain streams of both layers. A checkpointed one is cut behind
//! its first state and closed, which makes it plain.

use super::engine::{libxl_for, spliced};
use super::fake::{Domain, Tape, save_job};
use bytes::BytesMut;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use xen_colo::image::helper::StreamType;
use xen_colo::image::outer::{OuterRecord, encode_header};
use xen_colo::save_helper::save::save;

const VERIFIER: &str = "/usr/lib/xen-4.17/bin/verify-stream-v2";
const MODULES: &str = "/usr/lib/xen-4.17/lib/python";

/// What the verifier thinks of a stream: nothing, or its complaint. `None` when it is not installed.
fn verdict(format: &str, stream: &[u8]) -> Option<Result<String, String>> {
    if !Path::new(VERIFIER).exists() || !Path::new(MODULES).exists() {
        eprintln!("SKIP: {VERIFIER} is not installed (Debian: xen-utils-4.17); no second opinion on the stream");
        return None;
    }
    // A file: it takes what a pipe gives it at once for all there is.
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(stream).unwrap();
    let output = Command::new("python3")
        .args([VERIFIER, "--verbose", "--format", format, "--in"])
        .arg(file.path())
        .env("PYTHONPATH", MODULES)
        .output()
        .unwrap_or_else(|error| panic!("python3: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(if output.status.success() { Ok(said) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) })
}

/// The image of a domain, as the engine writes it.
fn image(stream: StreamType, live: bool) -> Vec<u8> {
    let (mut domain, tape) = (Domain::new(1500), Tape::default());
    domain.program = [(0..200).map(|pfn| (pfn, Some(1))).collect(), vec![(3, Some(2)), (9, None)]].into();
    let libxl = libxl_for(&domain, &tape, 1);
    save(&save_job(stream, live), &mut domain, &mut libxl.calls(0xf8), tape.clone(), &AtomicBool::new(false)).unwrap();
    match stream {
        StreamType::Remus => spliced(&tape, tape.all().len()),
        _ => tape.all(),
    }
}

fn wrapped(image: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    encode_header(&mut out);
    OuterRecord::LibxcContext.encode(&mut out);
    out.extend_from_slice(image);
    // No EMULATOR_XENSTORE_DATA: under Python 3, 4.17's verifier compares a byte with a text there, and refuses all.
    OuterRecord::EmulatorContext(b"QEVM state".to_vec()).encode(&mut out);
    OuterRecord::End.encode(&mut out);
    out.to_vec()
}

#[test]
fn xens_verifier_accepts_what_is_written() {
    for (stream, live) in [(StreamType::Plain, false), (StreamType::Plain, true), (StreamType::Remus, true)] {
        let image = image(stream, live);
        let Some(inner) = verdict("libxc", &image) else { return };
        let said = inner.unwrap_or_else(|error| panic!("{stream:?}, live {live}: {error}"));
        for word in ["x86 HVM from Xen 4.17", "Static data end", "TSC info", "HVM context", "HVM params", "Record: End"]
        {
            assert!(said.contains(word), "{word}: {said}");
        }
        let outer = verdict("libxl", &wrapped(&image)).unwrap();
        let said = outer.unwrap_or_else(|error| panic!("{error}"));
        assert!(said.contains("Emulator context") && said.contains("Libxl Record: End"), "{said}");
    }
}

/// An oracle that has never said no proves nothing.
#[test]
fn xens_verifier_refuses_mutants() {
    let image = image(StreamType::Plain, true);
    let pages = image.windows(4).position(|word| word == [1, 0, 0, 0]).unwrap();
    assert!(pages > 40, "behind the headers");
    let mutate = |at: usize, byte: u8| {
        let mut mutant = image.clone();
        mutant[at] = byte;
        mutant
    };
    let end = image.len() - 8;
    for (what, mutant) in [
        ("another version", mutate(15, 9)),
        ("an unknown record for END", mutate(end, 0x77)),
        ("a length", mutate(end + 4, 8)),
        ("a reserved bit of the image header", mutate(20, 1)),
        ("a truncation", image[..end].to_vec()),
    ] {
        let Some(verdict) = verdict("libxc", &mutant) else { return };
        assert!(verdict.is_err(), "{what} was accepted");
    }
    let mut outer = wrapped(&image);
    outer[0] ^= 1;
    assert!(verdict("libxl", &outer).unwrap().is_err(), "another ident was accepted");
}
