//! The helper's messages and its command line; the real helper, where it is installed, is the oracle.

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use std::path::Path;
use std::process::{Command, Stdio};
use xen_colo::image::helper::{HelperError, Job, Message, StreamType, TEXT_MAX_BYTES};

const STOCK: &str = "/usr/lib/xen-4.17/bin/libxl-save-helper";

fn messages() -> impl Strategy<Value = Message> {
    let text = || "[a-zA-Z0-9 äöü:]{0,40}";
    prop_oneof![
        (any::<u32>(), any::<u32>(), text(), text()).prop_map(|(level, errno, context, text)| Message::Log {
            level,
            errno,
            context,
            text
        }),
        (text(), text(), any::<u64>(), any::<u64>()).prop_map(|(context, what, done, total)| Message::Progress {
            context,
            what,
            done,
            total
        }),
        Just(Message::Suspend),
        Just(Message::Postcopy),
        Just(Message::Checkpoint),
        Just(Message::WaitCheckpoint),
        (any::<u32>(), any::<bool>()).prop_map(|(domid, enable)| Message::SwitchQemuLogdirty { domid, enable }),
        any::<u32>().prop_map(|missing| Message::StaticDataDone { missing }),
        (any::<u64>(), any::<u64>())
            .prop_map(|(store_gfn, console_gfn)| Message::RestoreResults { store_gfn, console_gfn }),
        (any::<i32>(), any::<i32>()).prop_map(|(retval, errno)| Message::Complete { retval, errno }),
    ]
}

proptest! {
    #[test]
    fn messages_survive_any_fragmentation(sent in prop::collection::vec(messages(), 0..6), piece in 1_usize..20) {
        let mut out = BytesMut::new();
        sent.iter().for_each(|message| message.encode(&mut out));
        let (mut input, mut seen) = (BytesMut::new(), Vec::new());
        for bytes in out.chunks(piece) {
            input.put_slice(bytes);
            while let Some(message) = Message::decode(&mut input).unwrap() {
                seen.push(message);
            }
        }
        prop_assert_eq!(seen, sent);
        prop_assert!(input.is_empty());
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(prop_oneof![Just(0_u8), 0_u8..12, any::<u8>()], 0..100)) {
        let mut input = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = Message::decode(&mut input) {}
    }
}

#[test]
fn a_text_is_cut_before_the_message_is_too_long() {
    let mut out = BytesMut::new();
    let long = "ä".repeat(50_000);
    Message::Log { level: 8, errno: 5, context: "nul\0inside".into(), text: long.clone() }.encode(&mut out);
    let Some(Message::Log { context, text, .. }) = Message::decode(&mut out).unwrap() else { panic!("no log line") };
    assert_eq!(context, "nul?inside");
    assert!(text.len() <= TEXT_MAX_BYTES && long.starts_with(&text));
}

#[test]
fn the_wrong_words_are_refused() {
    let refuse = |bytes: &[u8]| Message::decode(&mut BytesMut::from(bytes)).unwrap_err();
    assert_eq!(refuse(&[2, 0, 11, 0]), HelperError::UnknownMessage(11));
    assert!(matches!(refuse(&[0, 0]), HelperError::BadMessage { .. }));
    assert!(matches!(refuse(&[3, 0, 3, 0, 9]), HelperError::BadMessage { number: 3, .. }), "one byte too many");
    assert!(matches!(refuse(&[4, 0, 8, 0, 1, 0]), HelperError::BadMessage { number: 8, .. }));
}

#[test]
fn a_callback_is_expected_if_its_bit_is_set() {
    let suspend_and_logdirty = 1 << 3 | 1 << 7;
    assert!(Message::Suspend.is_expected(suspend_and_logdirty));
    assert!(!Message::Postcopy.is_expected(suspend_and_logdirty));
    assert!(Message::SwitchQemuLogdirty { domid: 1, enable: true }.is_expected(suspend_and_logdirty));
    assert!(Message::Complete { retval: 0, errno: 0 }.is_expected(0));
}

#[test]
fn libxls_command_lines_are_read() {
    let parse = |line: &str| Job::parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
    let Ok(Job::Save(save)) = parse("--save-domain 7 -1 12 3 248 1") else { panic!("a save") };
    assert_eq!((save.stream_fd, save.domid, save.live, save.debug), (7, 12, true, true));
    assert_eq!((save.cbflags, save.stream), (248, StreamType::Remus));
    let Ok(Job::Restore(restore)) = parse("--restore-domain 7 -1 12 1 0 2 0 256 0") else { panic!("a restore") };
    assert_eq!((restore.store_port, restore.console_port, restore.console_domid), (1, 2, 0));
    assert_eq!((restore.cbflags, restore.stream), (256, StreamType::Plain));
    for bad in [
        "",
        "--save-domain",
        "--save-domain 7 -1 12 1 248 3",
        "--save-domain 7 -1 65536 1 248 0",
        "--save-domain -2 -1 1 1 248 0",
        "--save-domain 7 -1 12 1 248 0 9",
        "--restore-domain 7 -1 12 1 0 2 0 256",
        "--restore-domain 7 -1 x 1 0 2 0 256 0",
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}

/// libxl's own helper, which cannot reach Xen here, says so in the messages this decoder must understand.
#[test]
fn the_stock_helpers_words_are_understood() {
    if !Path::new(STOCK).exists() || Path::new("/dev/xen/privcmd").exists() {
        eprintln!("SKIP: {STOCK} is not installed, or there is a Xen that it could reach");
        return;
    }
    let helper = Command::new(STOCK)
        .args(["--save-domain", "1", "-1", "5", "0", "0", "0"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let (mut input, mut texts) = (BytesMut::from(&helper.stdout[..]), Vec::new());
    while let Some(message) = Message::decode(&mut input).unwrap() {
        let mut again = BytesMut::new();
        message.encode(&mut again);
        assert!(helper.stdout.windows(again.len()).any(|bytes| bytes == again), "{message:?} in our bytes");
        let Message::Log { context, text, .. } = message else { panic!("{message:?}") };
        texts.push(format!("{context}: {text}"));
    }
    assert!(input.is_empty());
    assert!(texts.iter().any(|text| text == "libxl-save-helper: starting save"), "{texts:?}");
    assert!(texts.len() >= 3, "{texts:?}");
}

#[test]
fn the_outer_records_are_libxls_bytes() {
    use xen_colo::image::outer::{OuterRecord, encode_header};
    let mut out = BytesMut::new();
    encode_header(&mut out);
    OuterRecord::LibxcContext.encode(&mut out);
    OuterRecord::EmulatorXenstoreData(vec![("a/b".into(), "c".into())]).encode(&mut out);
    OuterRecord::CheckpointEnd.encode(&mut out);
    let expected = [
        &b"LibxlFmt\0\0\0\x02\0\0\0\0"[..],
        b"\x01\0\0\0\0\0\0\0",
        b"\x02\0\0\0\x0e\0\0\0\x02\0\0\0\0\0\0\0a/b\0c\0\0\0",
        b"\x04\0\0\0\0\0\0\0",
    ];
    assert_eq!(out, expected.concat());
}

/// The program itself, as libxl starts it, on a machine without Xen: it says so to libxl, or that it was built without.
#[test]
fn the_program_answers_libxls_command_line() {
    if Path::new("/dev/xen/privcmd").exists() {
        eprintln!("SKIP: there is a Xen here, and this test wants none");
        return;
    }
    let line = ["--save-domain", "1", "-1", "5", "0", "0", "0"];
    for arguments in [&line[..], &[&["save-helper"][..], &line].concat()] {
        let program =
            Command::new(env!("CARGO_BIN_EXE_xl-colo")).args(arguments).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&program.stderr);
        let (mut input, mut heard) = (BytesMut::from(&program.stdout[..]), Vec::new());
        while let Some(message) = Message::decode(&mut input).unwrap() {
            heard.push(message);
        }
        assert!(input.is_empty(), "standard output is libxl's");
        if cfg!(feature = "xen") {
            assert!(matches!(heard.last(), Some(Message::Complete { retval: -1, .. })), "{heard:?}");
            assert!(matches!(&heard[0], Message::Log { level: 8, .. }), "{heard:?}");
            assert_eq!(program.status.code(), Some(1), "nobody took the result: {said}");
        } else {
            assert_eq!((program.status.code(), heard.len()), (Some(4), 0), "{said}");
            assert!(said.contains("without Xen"), "{said}");
        }
    }
}
