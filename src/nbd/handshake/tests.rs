//! The negotiation, byte for byte.

use super::*;

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.put_u32(option);
    bytes.put_u32(data.len() as u32);
    bytes.put_slice(data);
    bytes
}

fn reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9];
    bytes.put_u32(option);
    bytes.put_u32(reply);
    bytes.put_u32(data.len() as u32);
    bytes.put_slice(data);
    bytes
}

fn info_request(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(name.len() as u32);
    data.put_slice(name.as_bytes());
    data.put_u16(kinds.len() as u16);
    kinds.iter().for_each(|kind| data.put_u16(*kind));
    data
}

fn plain(index: usize) -> Negotiated {
    Negotiated::Export { index, framing: Framing::default() }
}

fn contexts(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(export.len() as u32);
    data.put_slice(export.as_bytes());
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.put_u32(query.len() as u32);
        data.put_slice(query.as_bytes());
    }
    data
}

fn context(option: u32, id: u32, name: &str) -> Vec<u8> {
    reply(option, REP_META_CONTEXT, &[&id.to_be_bytes()[..], name.as_bytes()].concat())
}

/// A negotiation past its greeting and the client flags.
fn begun(flags: u32) -> Handshake {
    let mut root = Export::new("root", 0x1234_5000);
    root.description = "the first".into();
    let mut iso = Export::new("iso", 512);
    iso.read_only = true;
    let mut server = Handshake::new(vec![root, iso]);
    assert_eq!(server.poll_output().unwrap(), b"NBDMAGICIHAVEOPT\0\x03"[..]);
    let mut input = BytesMut::from(&flags.to_be_bytes()[..]);
    assert_eq!(server.handle_input(&mut input), Ok(None));
    assert_eq!(server.poll_output(), None);
    server
}

fn say(server: &mut Handshake, bytes: &[u8]) -> (Result<Option<Negotiated>, NbdError>, Vec<u8>) {
    let result = server.handle_input(&mut BytesMut::from(bytes));
    (result, server.poll_output().unwrap_or_default().to_vec())
}

#[test]
fn go_describes_the_export_and_ends_the_negotiation() {
    let mut server = begun(3);
    let wanted = [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 99];
    let (result, said) = say(&mut server, &option(OPT_GO, &info_request("root", &wanted)));
    assert_eq!(result, Ok(Some(plain(0))));
    let expected = [
        reply(OPT_GO, REP_INFO, &[0, 0, 0, 0, 0, 0, 0x12, 0x34, 0x50, 0, 4, 0x6d]),
        reply(OPT_GO, REP_INFO, b"\0\x01root"),
        reply(OPT_GO, REP_INFO, b"\0\x02the first"),
        reply(OPT_GO, REP_INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]),
        reply(OPT_GO, REP_ACK, &[]),
    ];
    assert_eq!(said, expected.concat());
}

#[test]
fn export_name_answers_without_a_reply_header_and_with_zeroes_unless_told() {
    for (flags, len) in [(1, 134), (3, 10), (0, 134)] {
        let (result, said) = say(&mut begun(flags), &option(OPT_EXPORT_NAME, b"iso"));
        assert_eq!(result, Ok(Some(plain(1))));
        assert_eq!((said.len(), &said[..10]), (len, &[0, 0, 0, 0, 0, 0, 2, 0, 4, 0x07][..]));
    }
    assert_eq!(say(&mut begun(3), &option(OPT_EXPORT_NAME, b"")).0, Ok(Some(plain(0))));
    let (refused, said) = say(&mut begun(3), &option(OPT_EXPORT_NAME, b"nope"));
    assert!(matches!(refused, Err(NbdError::UnknownExport { .. })) && said.is_empty());
}

#[test]
fn haggling_goes_on_after_list_info_and_options_nobody_knows() {
    let mut server = begun(3);
    let listed = [
        reply(OPT_LIST, REP_SERVER, b"\0\0\0\x04rootthe first"),
        reply(OPT_LIST, REP_SERVER, b"\0\0\0\x03iso"),
        reply(OPT_LIST, REP_ACK, &[]),
    ];
    assert_eq!(say(&mut server, &option(OPT_LIST, &[])), (Ok(None), listed.concat()));
    assert_eq!(say(&mut server, &option(OPT_LIST, b"x")), (Ok(None), reply(OPT_LIST, REP_ERR_INVALID, &[])));
    let no_tls = reply(OPT_STARTTLS, REP_ERR_POLICY, b"TLS not configured");
    assert_eq!(say(&mut server, &option(OPT_STARTTLS, &[])), (Ok(None), no_tls));
    // Those from the future.
    for unknown in [12, 77, u32::MAX] {
        let answer = reply(unknown, REP_ERR_UNSUP, format!("Unsupported option {unknown}").as_bytes());
        assert_eq!(say(&mut server, &option(unknown, b"data")), (Ok(None), answer));
    }
    let (result, said) = say(&mut server, &option(OPT_INFO, &info_request("nope", &[])));
    assert_eq!((result, said), (Ok(None), reply(OPT_INFO, REP_ERR_UNKNOWN, b"export 'nope' not present")));
    let (result, said) = say(&mut server, &option(OPT_INFO, &info_request("iso", &[])));
    assert!(result == Ok(None) && said.ends_with(&reply(OPT_INFO, REP_ACK, &[])));
    let (result, said) = say(&mut server, &option(OPT_ABORT, &[]));
    assert_eq!((result, said), (Err(NbdError::Aborted), reply(OPT_ABORT, REP_ACK, &[])));
}

#[test]
fn contexts_are_listed_chosen_and_belong_to_one_export() {
    const BITMAP: &str = "qemu:dirty-bitmap:checkpoint";
    let mut server = begun(3);
    server.exports[0].knows_changes = true;
    let too_early = option(OPT_SET_META_CONTEXT, &contexts("root", &["base:allocation"]));
    let refused = reply(OPT_SET_META_CONTEXT, REP_ERR_INVALID, &[]);
    assert_eq!(say(&mut server, &too_early).1, refused, "not without structured replies");
    assert_eq!(say(&mut server, &option(OPT_STRUCTURED_REPLY, b"x")).1, reply(8, REP_ERR_INVALID, &[]));
    assert_eq!(say(&mut server, &option(OPT_STRUCTURED_REPLY, &[])).1, reply(8, REP_ACK, &[]));
    let (allocation, ack) = (context(9, 0, "base:allocation"), reply(9, REP_ACK, &[]));
    let both = [allocation.clone(), context(9, 0, BITMAP), ack.clone()].concat();
    for (export, queries, answer) in [
        ("root", &[][..], both),
        ("iso", &[], [allocation.clone(), ack.clone()].concat()),
        ("root", &["base:"], [allocation, ack.clone()].concat()),
        ("root", &["qemu:dirty-bitmap:"], [context(9, 0, BITMAP), ack.clone()].concat()),
        ("root", &["base", "else:where", ""], ack),
        ("nope", &[], reply(9, REP_ERR_UNKNOWN, b"export 'nope' not present")),
    ] {
        assert_eq!(say(&mut server, &option(OPT_LIST_META_CONTEXT, &contexts(export, queries))).1, answer);
    }
    for bad in [&contexts("root", &["a"])[..16], &[contexts("root", &[]), vec![0]].concat(), &[0; 7], &[0xff; 8]] {
        assert_eq!(say(&mut server, &option(OPT_SET_META_CONTEXT, bad)).1, refused);
    }
    let choose = option(OPT_SET_META_CONTEXT, &contexts("root", &[BITMAP, "base:allocation", "base:"]));
    let chosen = [context(10, 1, "base:allocation"), context(10, 2, BITMAP), reply(10, REP_ACK, &[])].concat();
    assert_eq!(say(&mut server, &choose).1, chosen);
    let mut other = server.exports.clone();
    for (name, contexts) in [("root", vec![Context::Allocation, Context::Changed]), ("iso", vec![])] {
        let mut server = begun(3);
        server.exports = std::mem::take(&mut other);
        let _ = say(&mut server, &option(OPT_STRUCTURED_REPLY, &[]));
        let _ = say(&mut server, &choose);
        let index = usize::from(name != "root");
        let framing = Framing { structured: true, extended: false, contexts };
        let (result, said) = say(&mut server, &option(OPT_GO, &info_request(name, &[])));
        assert_eq!(result, Ok(Some(Negotiated::Export { index, framing })));
        assert!(said[30..].starts_with(&if index == 0 { [0x04, 0xed] } else { [0x04, 0x87] }), "{said:x?}");
        other = server.exports;
    }
}

#[test]
fn a_better_framing_is_not_given_back() {
    let mut server = begun(3);
    assert_eq!(say(&mut server, &option(OPT_EXTENDED_HEADERS, &[])).1, reply(11, REP_ACK, &[]));
    let said = say(&mut server, &option(OPT_STRUCTURED_REPLY, &[])).1;
    assert_eq!(said[12..16], REP_ERR_EXT_HEADER_REQD.to_be_bytes());
    let (result, _) = say(&mut server, &option(OPT_EXPORT_NAME, b"root"));
    let framing = Framing { structured: true, extended: true, contexts: vec![] };
    assert_eq!(result, Ok(Some(Negotiated::Export { index: 0, framing })));
}

#[test]
fn what_was_settled_in_the_clear_is_forgotten() {
    let required = || begun(3).with_encryption(Encryption::Required);
    for early in [OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT, 99] {
        let (result, said) = say(&mut required(), &option(early, &info_request("root", &[])));
        assert!(result == Ok(None) && said[12..16] == REP_ERR_TLS_REQD.to_be_bytes());
        assert!(said.ends_with(b" not permitted before TLS"));
    }
    assert_eq!(say(&mut required(), &option(OPT_EXPORT_NAME, b"root")).0, Err(NbdError::TlsRequired));
    let mut server = required();
    assert_eq!(say(&mut server, &option(OPT_STARTTLS, b"x")).1, reply(5, REP_ERR_INVALID, &[]));
    server.framing.structured = true;
    let mut injected = BytesMut::from(&[option(OPT_STARTTLS, &[]), option(OPT_LIST, &[])].concat()[..]);
    assert_eq!(server.handle_input(&mut injected), Ok(Some(Negotiated::StartTls)));
    assert_eq!(server.poll_output().unwrap(), reply(5, REP_ACK, &[]));
    assert_eq!(server.handle_input(&mut injected), Ok(None), "nothing is read before it is encrypted");
    assert_eq!(server.poll_output(), None);
    server.encrypted();
    assert_eq!(say(&mut server, &option(OPT_STARTTLS, &[])).1, reply(5, REP_ERR_INVALID, &[]), "not twice");
    assert_eq!(say(&mut server, &option(OPT_GO, &info_request("root", &[]))).0, Ok(Some(plain(0))));
}

#[test]
fn lengths_that_do_not_add_up_are_invalid() {
    let mut server = begun(3);
    let mut huge_name = info_request("root", &[]);
    huge_name[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut one_more = info_request("root", &[INFO_NAME]);
    one_more.push(0);
    for data in [vec![], vec![0; 3], huge_name, one_more, info_request("root", &[1, 2])[..12].to_vec()] {
        assert_eq!(say(&mut server, &option(OPT_GO, &data)), (Ok(None), reply(OPT_GO, REP_ERR_INVALID, &[])));
    }
}

#[test]
fn each_limit_holds_at_its_edge() {
    let mut server = begun(3);
    let fits = vec![b'x'; MAX_OPTION_BYTES as usize];
    assert_eq!(say(&mut server, &option(42, &fits)), (Ok(None), reply(42, REP_ERR_UNSUP, b"Unsupported option 42")));
    for len in [MAX_OPTION_BYTES + 1, MAX_SKIPPED_OPTION_BYTES] {
        let mut long = option(42, &vec![b'x'; len as usize]);
        long.extend(option(43, &[]));
        let answers = [reply(42, REP_ERR_TOO_BIG, &[]), reply(43, REP_ERR_UNSUP, b"Unsupported option 43")].concat();
        assert_eq!(say(&mut server, &long), (Ok(None), answers));
    }
    let mut header = option(42, &[]);
    header[12..].copy_from_slice(&(MAX_SKIPPED_OPTION_BYTES + 1).to_be_bytes());
    assert!(matches!(say(&mut server, &header).0, Err(NbdError::TooLong { .. })));

    let mut server = begun(3);
    for _ in 0..MAX_OPTIONS {
        assert_eq!(say(&mut server, &option(42, &[])).0, Ok(None));
    }
    assert!(matches!(say(&mut server, &option(42, &[])).0, Err(NbdError::TooMany { .. })));
    let mut server = Handshake::new(vec![]);
    assert_eq!(say(&mut server, &4_u32.to_be_bytes()).0, Err(NbdError::ClientFlags(4)));
    assert!(matches!(say(&mut begun(3), &[0; 16]).0, Err(NbdError::BadMagic { .. })));
}
