//! Sessions as they were with QEMU 7.2, byte for byte, and the bounds that are ours.

use super::codec::{Decoder, INPUT_MAX_BYTES, NESTING_MAX};
use super::commands::{Command, ExportAdd, Listen};
use super::drive::{Below, Drive, Server};
use super::lines::Line;
use super::server::{OWED_MAX_BYTES, QUEUE_MAX, Session};
use super::{Event, client, done};
use bytes::BytesMut;
use serde_json::{Value, json};

const COMMANDS: &[&str] = &[
    "query-status",
    "stop",
    "xen-set-replication",
    "nbd-server-start",
    "nbd-server-add",
    "block-export-add",
    "nbd-server-remove",
    "x-blockdev-change",
    "migrate-set-parameters",
    "human-monitor-command",
    "xen-set-global-dirty-log",
    "yank",
    "query-yank",
    "query-version",
    "query-commands",
];

fn heard(session: &mut Session) -> String {
    let mut heard = String::new();
    while let Some(bytes) = session.poll_output() {
        heard.push_str(std::str::from_utf8(&bytes).unwrap());
    }
    heard
}

/// A session that has negotiated.
fn ready(enable: &str) -> Session {
    let mut session = Session::new(COMMANDS);
    session
        .handle_input(format!("{{\"execute\":\"qmp_capabilities\",\"arguments\":{{\"enable\":{enable}}}}}").as_bytes());
    assert!(heard(&mut session).ends_with("{\"return\": {}}\r\n"));
    session
}

/// What is heard when every order is simply done.
fn says(session: &mut Session, input: &[u8]) -> String {
    session.handle_input(input);
    let mut said = heard(session);
    while let Some(order) = session.poll_order() {
        session.handle_answer(order.ticket, done());
        said.push_str(&heard(session));
    }
    said
}

fn error(desc: &str) -> String {
    format!("{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"{desc}\"}}}}\r\n")
}

fn syntax(why: &str) -> String {
    error(&format!("JSON parse error, {why}"))
}

#[test]
fn what_is_not_json_is_told_in_qemus_words_and_the_session_goes_on() {
    let object = || error("QMP input must be a JSON object");
    let expecting = || syntax("expecting value");
    let stray = |what: &str| syntax(&format!("stray '{what}'"));
    let measured: [(&[u8], String); 44] = [
        (b"[1]", object()),
        (b"1\n", object()),
        (b"'it\\'s'\n", object()),
        (b"1 2\n", object() + &object()),
        (b"12-3\n", object() + &object()),
        (b"-0\n", object()),
        (b"tru\n", syntax("invalid keyword 'tru'")),
        (b"tRue\n", syntax("invalid keyword 't'") + &stray("R")),
        (b"tr@\n", syntax("invalid keyword 'tr'") + &stray("@")),
        (b"\"abc\"def\n", object() + &syntax("invalid keyword 'def'")),
        (b"}", expecting()),
        (b"]", expecting()),
        (b":\n", expecting()),
        (b"[}\n]", expecting() + &expecting()),
        (b"{]\n}", expecting() + &expecting()),
        (b"[1,]\n", expecting()),
        (b"[,1]\n", expecting()),
        (b"{\"a\":}\n", expecting()),
        (b"[1 2]\n", syntax("expected separator in list")),
        (b"{\"a\":1 \"b\":2}\n", syntax("expected separator in dict")),
        (b"{1:2}\n", syntax("key is not a string in object")),
        (b"{\"a\" 1}", syntax("missing : in object pair")),
        (b"{\"execute\":\"stop\",\"execute\":\"stop\"}", syntax("duplicate key")),
        (b"{\"execute\":\"x\\q\"}", syntax("invalid escape sequence in string")),
        (b"\"a\\ud800b\"", syntax("\\\\ud800 is not a valid Unicode character")),
        (b"\"a\\ud83dx\"", syntax("\\\\ud83d is not a valid Unicode character")),
        (b"\"\\u12\"", syntax("\\\\u12\\\" is not a valid Unicode character")),
        (b"\"\xc3(\"", syntax("invalid UTF-8 sequence in string")),
        (b"\"\xef\xbf\xbf\"", syntax("invalid UTF-8 sequence in string")),
        (b"{\"execute\":\"\xff\"}\n", stray("\\\"\\uFFFD") + &expecting()),
        (b"{\"id\":\"tab\there\"}\n", stray("\\\"tab\\t") + &expecting()),
        (b"{\"execute\"\x01}\n", stray("\\u0001") + &expecting()),
        (b"{\"execute\":%s}\n", stray("%") + &expecting()),
        (b"@\tfoo\n", stray("@")),
        (b"@ foo\n", stray("@")),
        (b"@\x01\n", stray("@") + &stray("\\u0001")),
        (b"@,\n", stray("@") + &expecting()),
        (b"\x00\n", stray("")),
        (b"01\n", stray("01")),
        // The line end is part of what is stray, and so none for what follows.
        (b"1.\n-\n", stray("1.\\n")),
        (b"1e\n\n", stray("1e\\n")),
        (b"-x\n", stray("-x")),
        (b"\\\n", stray("\\\\")),
        (b"\"\\u0041\\ud800\\u0041\"\n", syntax("\\\\ud800 is not a valid Unicode character")),
    ];
    let mut session = ready("[]");
    for (input, words) in measured {
        let shown = String::from_utf8_lossy(input);
        assert_eq!(says(&mut session, input), words, "{shown}");
        let on = says(&mut session, b"\n{'execute':'query-status','id':'a\"b'}\r\n");
        assert_eq!(on, "{\"return\": {}, \"id\": \"a\\\"b\"}\r\n", "after {shown}");
        // The same, a byte at a time.
        let slowly: String = input.iter().map(|byte| says(&mut session, &[*byte])).collect();
        assert_eq!(slowly, words, "{shown}");
        assert!(says(&mut session, b"\n{'execute':'stop'}").contains("return"));
    }
}

#[test]
fn a_request_that_is_none_is_told_what_it_lacks() {
    let measured = [
        (
            "{'id':5}",
            "{\"id\": 5, \"error\": {\"class\": \"GenericError\", \"desc\": \"QMP input lacks member 'execute'\"}}\r\n",
        ),
        ("{'execute':1}", &error("QMP input member 'execute' must be a string")),
        ("{'execute':'stop','arguments':null}", &error("QMP input member 'arguments' must be an object")),
        ("{'execute':'stop','zork':1}", &error("QMP input member 'zork' is unexpected")),
        ("{'execute':'yank','exec-oob':'yank'}", &error("QMP input member 'exec-oob' is unexpected")),
        ("{'execute':'stop','arguments':{'x':1}}", &error("Parameter 'x' is unexpected")),
        (
            "{'execute':'a\\u0000b','id':[1, {'a':null}]}",
            "{\"id\": [1, {\"a\": null}], \"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command a\\u0000b has not been found\"}}\r\n",
        ),
        (
            "{'execute':'qmp_capabilities'}",
            "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"Capabilities negotiation is already complete, command ignored\"}}\r\n",
        ),
    ];
    let mut session = ready("[]");
    for (input, words) in measured {
        assert_eq!(says(&mut session, input.as_bytes()), words, "{input}");
    }
    for (id, echo) in [
        ("1.50", "1.5"),
        ("18446744073709551615", "18446744073709551615"),
        ("-9223372036854775808", "-9223372036854775808"),
        ("'\\u00e9é\\ud83d\\ude00/\\/\u{7f}'", "\"\\u00E9\\u00E9\\uD83D\\uDE00//\\u007F\""),
    ] {
        let said = says(&mut session, format!("{{'execute':'stop','id':{id}}}").as_bytes());
        assert_eq!(said, format!("{{\"return\": {{}}, \"id\": {echo}}}\r\n"));
    }
    assert_eq!(says(&mut session, b"{'execute':'stop','id':1e400}"), syntax("number '1e400' is out of range"));
}

#[test]
fn nothing_but_the_negotiation_comes_first() {
    let mut session = Session::new(COMMANDS);
    let greeting: Value = serde_json::from_str(&heard(&mut session)).unwrap();
    assert_eq!(greeting["QMP"]["version"]["qemu"], json!({"major": 7, "minor": 2, "micro": 0}));
    assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    session.handle_event(0, &Event::new("STOP", Value::Null));
    let expecting = "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"Expecting capabilities negotiation with 'qmp_capabilities'\"}}\r\n";
    assert_eq!(says(&mut session, b"{'execute':'stop'}"), expecting, "and no event");
    for (arguments, words) in [
        ("{'enable':'oob'}", "Invalid parameter type for 'enable', expected: array"),
        ("{'enable':[1]}", "Invalid parameter type for 'enable[0]', expected: string"),
        ("{'bad':1}", "Parameter 'bad' is unexpected"),
    ] {
        let input = format!("{{'execute':'qmp_capabilities','arguments':{arguments}}}");
        assert_eq!(says(&mut session, input.as_bytes()), error(words));
    }
    assert_eq!(says(&mut session, b"{'execute':'qmp_capabilities','id':1}"), "{\"return\": {}, \"id\": 1}\r\n");
    session.handle_event(7_000_042, &Event::new("STOP", Value::Null));
    let event = "{\"timestamp\": {\"microseconds\": 42, \"seconds\": 7}, \"event\": \"STOP\"}\r\n";
    assert_eq!(heard(&mut session), event);
}

#[test]
fn without_oob_nothing_is_read_before_the_order_is_answered_and_with_it_some_overtake() {
    let two = b"{'execute':'stop','id':1}{'execute':'query-status','id':2}@";
    let mut session = ready("[]");
    session.handle_input(two);
    let first = session.poll_order().unwrap();
    assert_eq!((session.poll_order(), heard(&mut session).as_str()), (None, ""));
    session.handle_answer(first.ticket, done());
    session.handle_answer(first.ticket, done());
    assert_eq!(heard(&mut session), "{\"return\": {}, \"id\": 1}\r\n", "once");
    let second = session.poll_order().unwrap();
    assert_eq!(second.command, Command::QueryStatus);
    session.handle_answer(second.ticket, done());
    assert_eq!(heard(&mut session), "{\"return\": {}, \"id\": 2}\r\n".to_owned() + &syntax("stray '@'"));

    let mut session = ready("['oob']");
    session.handle_input(two);
    let first = session.poll_order().unwrap();
    session.handle_input(b"\n{'exec-oob':'yank','arguments':{'instances':[]},'id':3}{'exec-oob':'stop','id':4}");
    let overtakes = session.poll_order().unwrap();
    assert_eq!(overtakes.command, Command::Yank(Vec::new()));
    session.handle_answer(overtakes.ticket, done());
    let early = "{\"id\": 4, \"error\": {\"class\": \"GenericError\", \"desc\": \"The command stop does not support OOB\"}}\r\n{\"return\": {}, \"id\": 3}\r\n";
    assert_eq!(heard(&mut session), early);
    session.handle_answer(first.ticket, done());
    let second = session.poll_order().unwrap();
    session.handle_answer(second.ticket, done());
    let late = "{\"return\": {}, \"id\": 1}\r\n{\"return\": {}, \"id\": 2}\r\n".to_owned() + &syntax("stray '@'");
    assert_eq!(heard(&mut session), late);
    assert!(session.is_idle());
    // A whole queue, and not one more is read.
    for _ in 0..=QUEUE_MAX {
        assert!(session.room() > 0);
        session.handle_input(b"{'execute':'stop'}");
    }
    assert_eq!(session.room(), 0);
}

#[test]
fn what_an_order_lacks_is_told_in_qemus_words() {
    let measured = [
        ("xen-set-replication", json!({}), "Parameter 'enable' is missing"),
        (
            "xen-set-replication",
            json!({"enable": "x", "primary": true}),
            "Invalid parameter type for 'enable', expected: boolean",
        ),
        ("xen-set-replication", json!({"enable": true, "zork": 1}), "Parameter 'primary' is missing"),
        ("xen-set-replication", json!({"enable": true, "primary": true, "zork": 1}), "Parameter 'zork' is unexpected"),
        (
            "xen-set-replication",
            json!({"enable": true, "primary": true, "failover": false}),
            "Parameter 'failover' is only for stopping replication",
        ),
        ("migrate-set-parameters", json!({"x-checkpoint-delay": "a"}), "Parameter 'x-checkpoint-delay' expects uint64"),
        (
            "migrate-set-parameters",
            json!({"x-checkpoint-delay": -1}),
            "Parameter 'x-checkpoint-delay' expects uint32_t",
        ),
        (
            "migrate-set-parameters",
            json!({"x-checkpoint-delay": 5_000_000_000_u64}),
            "Parameter 'x-checkpoint-delay' expects uint32_t",
        ),
        ("migrate-set-parameters", json!({"x-checkpoint-delay": 1.5}), "Parameter 'x-checkpoint-delay' expects uint64"),
        ("nbd-server-start", json!({"addr": 1}), "Invalid parameter type for 'addr', expected: object"),
        ("nbd-server-start", json!({"addr": {}}), "Parameter 'addr.type' is missing"),
        ("nbd-server-start", json!({"addr": {"type": "foo"}}), "Parameter 'type' does not accept value 'foo'"),
        ("nbd-server-start", json!({"addr": {"type": "unix"}}), "Parameter 'addr.data' is missing"),
        ("nbd-server-start", json!({"addr": {"type": "unix", "data": {}}}), "Parameter 'addr.data.path' is missing"),
        (
            "nbd-server-start",
            json!({"addr": {"type": "inet", "data": {"host": "h", "port": 9}}}),
            "Invalid parameter type for 'addr.data.port', expected: string",
        ),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "p", "z": 1}}}),
            "Parameter 'addr.data.z' is unexpected",
        ),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "p"}}, "tls-creds": "t0"}),
            "No TLS credentials with id 't0'",
        ),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "p"}}, "max-connections": -1}),
            "Parameter 'max-connections' expects uint32_t",
        ),
        (
            "nbd-server-add",
            json!({"device": "d", "writable": "yes"}),
            "Invalid parameter type for 'writable', expected: boolean",
        ),
        ("block-export-add", json!({"id": "e", "node-name": "n"}), "Parameter 'type' is missing"),
        (
            "block-export-add",
            json!({"type": "foo", "id": "e", "node-name": "n"}),
            "Parameter 'type' does not accept value 'foo'",
        ),
        ("nbd-server-remove", json!({"name": "d", "mode": "zork"}), "Parameter 'mode' does not accept value 'zork'"),
        ("x-blockdev-change", json!({"child": "n"}), "Parameter 'parent' is missing"),
        ("human-monitor-command", json!({}), "Parameter 'command-line' is missing"),
        ("yank", json!({"instances": 1}), "Invalid parameter type for 'instances', expected: array"),
        ("yank", json!({"instances": [1]}), "Invalid parameter type for 'instances[0]', expected: object"),
        ("yank", json!({"instances": [{}]}), "Parameter 'instances[0].type' is missing"),
        ("yank", json!({"instances": [{"type": "block-node"}]}), "Parameter 'instances[0].node-name' is missing"),
    ];
    let mut session = ready("[]");
    for (command, arguments, words) in measured {
        let input = json!({"execute": command, "arguments": arguments}).to_string();
        assert_eq!(says(&mut session, input.as_bytes()), error(words), "{input}");
    }
}

#[test]
fn orders_are_what_libxl_means() {
    let order = |execute: &str, arguments: Value| {
        let mut session = ready("[]");
        session.handle_input(json!({"execute": execute, "arguments": arguments}).to_string().as_bytes());
        session.poll_order().map(|order| order.command)
    };
    let listen = Listen::Inet { host: "192.0.2.2".into(), port: "9000".into() };
    let addr = json!({"type": "inet", "data": {"host": "192.0.2.2", "port": "9000"}});
    assert_eq!(
        order("nbd-server-start", json!({"addr": addr})),
        Some(Command::NbdStart { listen, max_connections: 0 })
    );
    let (id, name) = ("hda".to_owned(), "hda".to_owned());
    let export = ExportAdd { id, node: "hda".into(), name, description: String::new(), writable: true, legacy: true };
    assert_eq!(order("nbd-server-add", json!({"device": "hda", "writable": true})), Some(Command::ExportAdd(export)));
    let stop = Command::SetReplication { enable: false, primary: false, failover: true };
    let arguments = json!({"enable": false, "primary": false, "failover": true});
    assert_eq!(order("xen-set-replication", arguments), Some(stop));
    let line = "drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.host=h,file.port=9000,file.export=hda,node-name=colo_node768";
    let at = Listen::Inet { host: "h".into(), port: "9000".into() };
    let below = Below::Server(Server { at, export: "hda".into(), client: None });
    let drive = Ok(Drive::Primary { name: "colo_node768".into(), below });
    let line = order("human-monitor-command", json!({"command-line": line}));
    assert_eq!(line, Some(Command::Line(Line::DriveAdd { node_only: true, drive })));
}

#[test]
fn lines_for_people_are_answered_as_qemu_does() {
    let answered = |line: &str| match Line::parse(line) {
        Line::Answered(text) | Line::DriveAdd { drive: Err(text), .. } => text,
        other => format!("{other:?}"),
    };
    let expected = "drive_add: string expected\r\nTry \"help drive_add\" for more information\r\n";
    assert_eq!([answered("drive_add"), answered("drive_add -n")], [expected, expected]);
    assert_eq!(answered("foo bar"), "unknown command: 'foo'\r\n");
    assert_eq!(answered(""), "");
    let add = |options: &str| answered(&format!("drive_add -n buddy {options}"));
    assert_eq!(add("driver=raw,file.driver=null-co"), "'node-name' needs to be specified");
    assert_eq!(add("driver=zork,node-name=n3"), "Unknown driver 'zork'");
    assert_eq!(add("driver=replication,node-name=x"), "Missing the option mode");
    assert_eq!(add("driver=replication,mode=secondary,node-name=x"), "Missing the option top-id");
    let wrong = "The option mode's value should be primary or secondary";
    assert_eq!(add("driver=replication,mode=foo,node-name=x"), wrong);
    let libxl = "if=ide,index=0,id=top-colo,media=disk,cache=writeback,driver=replication,mode=secondary,top-id=top-colo,file.driver=qcow2,file.file.filename=/a,,b,file.backing.driver=qcow2,file.backing.file.filename=/h,file.backing.backing=hda";
    let drive = Drive::Secondary { name: "top-colo".into(), image: "hda".into() };
    assert_eq!(Drive::parse(libxl, false), Ok(drive));
    let image = Drive::Image { name: "hda".into(), file: "/a,b".into() };
    assert_eq!(Drive::parse("if=none,driver=raw,file=/a,,b,id=hda", false), Ok(image));
}

#[test]
fn depth_and_size_are_bounded() {
    let nested = |depth: usize| ["[".repeat(depth), "]".repeat(depth)].concat();
    let mut session = ready("[]");
    let deepest = format!("{{'execute':'stop','id':{}}}", nested(NESTING_MAX - 1));
    assert!(says(&mut session, deepest.as_bytes()).starts_with("{\"return\""));
    let too_deep = format!("{{'execute':'stop','id':{}", "[".repeat(NESTING_MAX));
    assert_eq!(says(&mut session, too_deep.as_bytes()), error("JSON nesting depth limit exceeded"));
    let long = |len: usize| format!("{{'execute':'stop','id':'{}'}}", "x".repeat(len));
    assert!(says(&mut session, long(INPUT_MAX_BYTES - 100).as_bytes()).starts_with("{\"return\""));
    let mut decoder = Decoder::default();
    let mut input = BytesMut::from(&long(INPUT_MAX_BYTES)[..]);
    let said: Vec<_> =
        std::iter::from_fn(|| decoder.decode(&mut input)).map(|said| said.unwrap_err().to_string()).collect();
    assert_eq!(said, ["JSON token size limit exceeded", "JSON parse error, expecting value"]);
    // Many small tokens are as bounded as a large one.
    let mut input = BytesMut::from(&format!("[{}", "1,".repeat(INPUT_MAX_BYTES))[..]);
    let first = decoder.decode(&mut input).unwrap().unwrap_err();
    assert_eq!(first.to_string(), "JSON token size limit exceeded");
}

#[test]
fn a_client_that_does_not_read_is_owed_only_so_much() {
    let mut session = ready("[]");
    let event = Event::new("X", Value::from("x".repeat(1000)));
    for _ in 0..10_000 {
        session.handle_event(0, &event);
    }
    assert_eq!(session.room(), 0);
    session.handle_input(b"{'execute':'stop'}");
    assert_eq!(session.poll_order(), None, "nothing is begun that could not be answered");
    let owed = session.poll_output().unwrap().len();
    assert!((OWED_MAX_BYTES..OWED_MAX_BYTES + 2000).contains(&owed), "{owed}");
    assert!(session.poll_order().is_some());
}

#[test]
fn the_two_ends_understand_each_other() {
    let (mut server, mut client) = (Session::new(COMMANDS), client::Client::default());
    let exchange = |server: &mut Session, client: &mut client::Client| {
        loop {
            let (up, down) = (client.poll_output(), server.poll_output());
            if up.is_none() && down.is_none() {
                return;
            }
            server.handle_input(&up.unwrap_or_default());
            client.handle_input(&down.unwrap_or_default()).unwrap();
        }
    };
    exchange(&mut server, &mut client);
    assert!(client.is_ready());
    assert_eq!(client.version(), [7, 2, 0]);
    let stop = client.execute("stop", &json!({}));
    let bad = client.execute("zork", &json!({}));
    exchange(&mut server, &mut client);
    server.handle_event(0, &Event::new("STOP", json!({"a": 1})));
    let ticket = server.poll_order().unwrap().ticket;
    server.handle_answer(ticket, Ok(json!({"done": true})));
    exchange(&mut server, &mut client);
    assert_eq!(client.poll_event(), Some(Event::new("STOP", json!({"a": 1}))));
    assert_eq!(client.poll_reply(), Some((stop, Ok(json!({"done": true})))));
    let (id, outcome) = client.poll_reply().unwrap();
    assert_eq!((id, outcome.unwrap_err().desc.as_str()), (bad, "The command zork has not been found"));
    assert_eq!(client.handle_input(b"{\"zork\": 1}\n"), Err(client::ClientError::NotQmp("{\"zork\": 1}".into())));
    let endless = vec![b' '; client::LINE_MAX_BYTES + 1];
    assert_eq!(client.handle_input(&endless), Err(client::ClientError::TooLong));
}

/// As a QEMU of Debian 12 does now and then to whom came while it was starting.
#[test]
fn who_is_greeted_twice_negotiates_twice() {
    let greeting = b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7}}, \"capabilities\": []}}\r\n";
    let mut client = client::Client::default();
    client.handle_input(&[&greeting[..], greeting].concat()).unwrap();
    let said = client.poll_output().unwrap();
    assert_eq!(said.windows(17).filter(|said| said == b"qmp_capabilities\"").count(), 2);
    client.handle_input(b"{\"return\": {}, \"id\": 0}\r\n").unwrap();
    assert!(client.is_ready());
    let id = client.execute("stop", &json!({}));
    let complete = b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"complete\"}, \"id\": 0}\r\n";
    client.handle_input(complete).unwrap();
    assert_eq!(client.poll_reply(), None);
    client.handle_input(format!("{{\"return\": {{}}, \"id\": {id}}}\r\n").as_bytes()).unwrap();
    assert_eq!(client.poll_reply(), Some((id, Ok(json!({})))));
}
