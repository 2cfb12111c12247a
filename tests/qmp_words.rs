//! The same words to a stock QEMU without a machine and to a monitor of ours, and what each says to them: libxl's, and
//! whatever else can be said.
//!
//! QEMU writes the members of what it returns in an order of its own, so replies are compared as JSON; errors by class
//! and text.

use crate::common::{Listening, PATIENCE, XL_COLO, installed, succeeds};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

/// A conversation by hand: what is not JSON must be said as well.
struct Spoken(BufReader<UnixStream>);

impl Spoken {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut it = Self(BufReader::new(stream));
        assert!(it.line()["QMP"]["version"]["qemu"]["major"].is_u64());
        it
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// Everything that is said to these words; a question with an id of its own ends it.
    fn hears(&mut self, words: &[u8]) -> Vec<Value> {
        self.0.get_mut().write_all(words).unwrap();
        self.0.get_mut().write_all(b"\n{'execute':'qmp_capabilities','id':'the end'}\n").unwrap();
        let mut heard = Vec::new();
        loop {
            let mut line = self.line();
            if line["id"] == "the end" {
                return heard;
            }
            if let Some(line) = line.as_object_mut() {
                line.remove("timestamp");
            }
            heard.push(line);
        }
    }
}

#[test]
fn a_stock_qemu_says_the_same_to_the_same_words() {
    let Some(qemu) = installed("qemu-system-x86_64") else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut spoken = Vec::new();
    let mut processes = Vec::new();
    for (name, program) in [("qemu", qemu.as_path()), ("ours", Path::new(XL_COLO))] {
        std::fs::write(path(&format!("{name}.img")), vec![0; 1 << 20]).unwrap();
        let (socket, image) = (path(name), path(&format!("{name}.img")));
        let drive = format!("if=none,id=disk,format=raw,file={}", image.display());
        let mut command = Command::new(program);
        if name == "qemu" {
            command.args(["-machine", "none", "-S", "-nodefaults", "-display", "none", "-drive", &drive, "-qmp"]);
            command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        } else {
            command.args(["qmp", "--drive", &drive, "--socket"]).arg(&socket);
        }
        processes.push(Listening::start(&mut command, &socket));
        spoken.push(Spoken::connect(&socket));
    }
    let [theirs, ours] = &mut spoken[..] else { unreachable!() };
    let known = {
        theirs.hears(b"{'execute':'qmp_capabilities'}");
        ours.hears(b"{'execute':'qmp_capabilities'}");
        theirs.hears(b"{'execute':'query-commands'}")
    };
    if !known[0].to_string().contains("\"xen-set-replication\"") {
        eprintln!("SKIP: this qemu-system-x86_64 is built without replication");
        return;
    }
    let socket = path("nbd-of-both");
    let start = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    let bad = json!({"addr": {"type": "unix", "data": {"path": "/nonexistent/x"}}});
    let order =
        |execute: &str, arguments: Value| json!({"execute": execute, "arguments": arguments, "id": 1}).to_string();
    let line = |line: &str| order("human-monitor-command", json!({"command-line": line}));
    let words: Vec<String> = [
        // Not JSON, not a request, not an order.
        "[1]",
        "tru",
        "1 2",
        "}",
        "[}]",
        "{'a' 1}",
        "{'a':1,}",
        "{'execute':'stop','execute':'stop'}",
        "'\\q'",
        "@ x, y",
        "{'execute':%s}",
        "01",
        "1.",
        "-",
        "'\\ud800'",
        "{'execute':'tab\there'}",
        "{'id':5}",
        "{'execute':1}",
        "{'execute':'stop','arguments':[]}",
        "{'execute':'stop','zork':1,'id':[]}",
        "{'execute':'zork','id':null}",
        "{'exec-oob':'stop'}",
        "{'execute':'query-status','id':{'a':[1,-2.5,'\\u00e9']}}{'execute':'query-status'}",
        "{'execute':'qmp_capabilities','arguments':{'enable':1}}",
    ]
    .map(str::to_owned)
    .into_iter()
    // Arguments.
    .chain([
        order("xen-set-replication", json!({})),
        order("xen-set-replication", json!({"enable": 1, "primary": true})),
        order("xen-set-replication", json!({"enable": true})),
        order("xen-set-replication", json!({"enable": true, "primary": true, "failover": true})),
        order("xen-set-replication", json!({"enable": true, "primary": true, "zork": 1})),
        order("x-colo-lost-heartbeat", json!({})),
        order("query-colo-status", json!({})),
        order("query-status", json!({})),
        order("x-blockdev-change", json!({"parent": "nope"})),
        order("x-blockdev-change", json!({"parent": "disk", "child": "a", "node": "b"})),
        order("x-blockdev-change", json!({"parent": "disk"})),
        order("x-blockdev-change", json!({"parent": "disk", "child": "children.1"})),
        order("x-blockdev-change", json!({"parent": "disk", "node": "zork"})),
        order("xen-set-global-dirty-log", json!({"enable": "on"})),
        order("yank", json!({"instances": [{"type": "block-node", "node-name": "n"}]})),
        order("yank", json!({"instances": [{"type": "zork"}]})),
        // An NBD server's life.
        order("nbd-server-stop", json!({})),
        order("nbd-server-add", json!({"device": "disk"})),
        order("nbd-server-start", json!({"addr": {"type": "inet", "data": {"host": "h"}}})),
        order("nbd-server-start", bad),
        order("nbd-server-start", start.clone()),
        order("nbd-server-start", start),
        order("nbd-server-add", json!({"device": "nope"})),
        order("nbd-server-add", json!({"device": "disk", "writable": "yes"})),
        order("nbd-server-add", json!({"device": "disk", "writable": true})),
        order("nbd-server-add", json!({"device": "disk", "writable": true})),
        order("nbd-server-add", json!({"device": "disk", "name": "9"})),
        order("nbd-server-add", json!({"device": "disk", "name": "x".repeat(4097)})),
        order("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "nope"})),
        order("block-export-add", json!({"type": "zork", "id": "e", "node-name": "disk"})),
        order("nbd-server-remove", json!({"name": "nope"})),
        order("nbd-server-remove", json!({"name": "disk", "mode": "zork"})),
        order("nbd-server-remove", json!({"name": "disk"})),
        order("block-export-del", json!({"id": "disk"})),
        order("nbd-server-stop", json!({})),
        // Lines for people.
        line(""),
        line("zork"),
        line("drive_add -n"),
        line("drive_del"),
        line("drive_del nope"),
        line("drive_add -n buddy driver=zork,node-name=n"),
        line("drive_add -n buddy driver=replication,node-name=n,file.driver=null-co"),
        line("drive_add -n buddy driver=replication,mode=zork,node-name=n,file.driver=null-co"),
        line("drive_add -n buddy driver=replication,mode=secondary,node-name=n,file.driver=null-co"),
        // Nodes by JSON.
        order("blockdev-add", json!({"node-name": "x"})),
        order("blockdev-add", json!({"driver": "raw"})),
        order("blockdev-add", json!({"driver": "zork", "node-name": "x"})),
        order("blockdev-add", json!({"driver": "replication", "node-name": "x", "file": "disk"})),
        order("blockdev-add", json!({"driver": "replication", "mode": "primary", "node-name": "x"})),
        order("blockdev-add", json!({"driver": "replication", "mode": "primary", "node-name": "x", "file": "nope"})),
        // What a driver has not, and where.
        order("blockdev-add", json!({"driver": "raw", "node-name": "x", "file": "disk", "zork": 1})),
        order("blockdev-add", json!({"driver": "raw", "node-name": "x", "file": "disk", "zork": {"a": 1}})),
        order("blockdev-add", json!({"driver": "raw", "node-name": "x", "file": "disk", "cache": {"zork": true}})),
        order("blockdev-add", json!({"driver": "raw", "node-name": "x", "file": {"filename": "/x"}})),
        order(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "/x", "zork": 1}}),
        ),
        order("blockdev-add", json!({"driver": "file", "node-name": "x"})),
        order("blockdev-add", json!({"driver": "nbd", "node-name": "x"})),
        order("blockdev-add", json!({"driver": "nbd", "node-name": "x", "server": {"type": "unix"}})),
        order("blockdev-add", json!({"driver": "nbd", "node-name": "x", "server": {"type": "inet", "host": "h"}})),
        order(
            "blockdev-add",
            json!({"driver": "nbd", "node-name": "x", "server": {"type": "unix", "path": "/x", "zork": 1}}),
        ),
        order("blockdev-add", json!({"driver": "quorum", "node-name": "x", "vote-threshold": 1})),
        order("blockdev-add", json!({"driver": "quorum", "node-name": "x", "children": ["disk"]})),
        order(
            "blockdev-add",
            json!({"driver": "quorum", "node-name": "x", "vote-threshold": 1,
                   "children": [{"driver": "file", "filename": "/x", "zork": 1}]}),
        ),
        order("blockdev-del", json!({})),
        order("blockdev-del", json!({"node-name": "nope"})),
        // The guest runs and stops, and it is told.
        order("cont", json!({})),
        order("query-status", json!({})),
        order("stop", json!({})),
        order("stop", json!({})),
        order("query-status", json!({})),
    ])
    .collect();
    let mut differ = Vec::new();
    for words in &words {
        let (said, wanted) = (ours.hears(words.as_bytes()), theirs.hears(words.as_bytes()));
        if said != wanted {
            differ.push(format!("{words}\n  QEMU {}\n  ours {}", json!(wanted), json!(said)));
        }
    }
    assert!(differ.is_empty(), "{} of {} differ:\n{}", differ.len(), words.len(), differ.join("\n"));
    drop(processes);
}

#[test]
fn a_stock_qemu_lets_the_same_overtake() {
    let Some(qemu) = installed("qemu-system-x86_64") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (theirs, ours) = (dir.path().join("qemu"), dir.path().join("ours"));
    let mut command = Command::new(qemu);
    command.args(["-machine", "none", "-S", "-nodefaults", "-display", "none", "-qmp"]);
    let _qemu = Listening::start(command.arg(format!("unix:{},server=on,wait=off", theirs.display())), &theirs);
    let _ours = Listening::start(Command::new(XL_COLO).args(["qmp", "--socket"]).arg(&ours), &ours);
    let (mut theirs, mut ours) = (Spoken::connect(&theirs), Spoken::connect(&ours));
    for words in [
        "{'execute':'qmp_capabilities','arguments':{'enable':['oob','oob']}}",
        "{'exec-oob':'stop','id':1}",
        "{'exec-oob':'zork','id':1}",
        "{'exec-oob':'yank','id':1}",
        "{'exec-oob':'yank','arguments':{'instances':[]},'id':1}",
        "{'exec-oob':'yank','arguments':{'instances':[{'type':'chardev','id':'nope'}]},'id':1}",
        "{'exec-oob':1,'id':1}",
        "{'execute':'query-status','id':1}{'execute':'zork','id':2}{'execute':'query-status','id':3}",
    ] {
        // A question that ends it would overtake as well.
        let wanted = theirs.hears(words.as_bytes());
        ours.0.get_mut().write_all(words.as_bytes()).unwrap();
        let said: Vec<Value> = wanted.iter().map(|_| ours.line()).collect();
        assert_eq!(said, wanted, "{words}");
    }
}

/// libxl's words to the device model of a secondary, from the first resume to a failover (libxl_colo_restore.c,
/// libxl_colo_qdisk.c): what it orders, and what a COLO that works replies.
fn libxl() -> Vec<(String, String)> {
    let done = |order: &str| (order.to_owned(), "{\"return\": {}, \"id\": 2}".to_owned());
    let error = |order: &str, desc: &str| {
        (order.to_owned(), format!("{{\"id\": 2, \"error\": {{\"class\": \"GenericError\", \"desc\": \"{desc}\"}}}}"))
    };
    let healthy = (
        "\"execute\":\"query-xen-replication-status\"".to_owned(),
        "{\"return\": {\"error\": false}, \"id\": 2}".into(),
    );
    let checkpoint = [
        done("\"execute\":\"stop\""),
        healthy,
        done("\"execute\":\"xen-colo-do-checkpoint\""),
        done("\"execute\":\"cont\""),
    ];
    let mut all = vec![
        done("\"execute\":\"stop\""),
        done(
            "\"execute\":\"nbd-server-start\",\"arguments\":{\"addr\":{\"type\":\"inet\",\"data\":{\"host\":\"127.0.0.1\",\"port\":\"0\"}}}",
        ),
        done("\"execute\":\"nbd-server-add\",\"arguments\":{\"device\":\"disk0\",\"writable\":true}"),
        done("\"execute\":\"xen-set-replication\",\"arguments\":{\"enable\":true,\"primary\":false}"),
        done("\"execute\":\"cont\""),
        done("\"execute\":\"xen-set-global-dirty-log\",\"arguments\":{\"enable\":true}"),
    ];
    all.extend(checkpoint.clone());
    all.extend(checkpoint);
    all.extend([
        done("\"execute\":\"xen-set-global-dirty-log\",\"arguments\":{\"enable\":false}"),
        done("\"execute\":\"xen-set-replication\",\"arguments\":{\"enable\":false,\"primary\":false}"),
        done("\"execute\":\"nbd-server-stop\""),
        // Once for each disk, and only the first time there is one.
        error("\"execute\":\"nbd-server-stop\"", "NBD server not running"),
    ]);
    all
}

/// libxl's words to the device model of a primary (libxl_colo_save.c, libxl_colo_qdisk.c), the drive's line byte for byte.
fn libxl_of_a_primary(port: u16) -> Vec<(String, String)> {
    let done = |order: &str| (order.to_owned(), "{\"return\": {}, \"id\": 2}".to_owned());
    let add = format!(
        "\"execute\":\"human-monitor-command\",\"arguments\":{{\"command-line\":\"drive_add -n buddy \
         driver=replication,mode=primary,file.driver=nbd,file.host=127.0.0.1,file.port={port},file.export=disk0,\
         node-name=colo_node768\"}}"
    );
    let healthy = (
        "\"execute\":\"query-xen-replication-status\"".to_owned(),
        "{\"return\": {\"error\": false}, \"id\": 2}".to_owned(),
    );
    let mut all = vec![
        done("\"execute\":\"xen-set-global-dirty-log\",\"arguments\":{\"enable\":true}"),
        done("\"execute\":\"stop\""),
        (add, "{\"return\": \"\", \"id\": 2}".into()),
        done(
            "\"execute\":\"x-blockdev-change\",\
             \"arguments\":{\"parent\":\"disk0\",\"node\":\"colo_node768\"}",
        ),
        done("\"execute\":\"xen-set-replication\",\"arguments\":{\"enable\":true,\"primary\":true}"),
        done("\"execute\":\"cont\""),
    ];
    for _ in 0..2 {
        all.push(done("\"execute\":\"stop\""));
        all.push(healthy.clone());
        all.push(done("\"execute\":\"xen-colo-do-checkpoint\""));
        all.push(done("\"execute\":\"cont\""));
    }
    all.extend([
        done("\"execute\":\"xen-set-global-dirty-log\",\"arguments\":{\"enable\":false}"),
        done("\"execute\":\"xen-set-replication\",\"arguments\":{\"enable\":false,\"primary\":true}"),
        done(
            "\"execute\":\"x-blockdev-change\",\
             \"arguments\":{\"parent\":\"disk0\",\"child\":\"children.1\"}",
        ),
    ]);
    all
}

/// A connection an order, as libxl has it. What differs from what was expected: the order, and what came.
fn replayed(socket: &Path, words: Vec<(String, String)>) -> Vec<String> {
    let mut differ = Vec::new();
    for (order, expected) in words {
        let mut libxl = Spoken::connect(socket);
        libxl.0.get_mut().write_all(b"{\"execute\":\"qmp_capabilities\",\"id\":1}\r\n").unwrap();
        assert_eq!(libxl.line(), json!({"return": {}, "id": 1}));
        libxl.0.get_mut().write_all(format!("{{{order},\"id\":2}}\r\n").as_bytes()).unwrap();
        let mut line = String::new();
        while line.is_empty() || line.starts_with("{\"timestamp\"") {
            line.clear();
            libxl.0.read_line(&mut line).unwrap();
        }
        if line != format!("{expected}\r\n") {
            differ.push(format!("{order}: {}", line.trim_end()));
        }
    }
    differ
}

#[tokio::test(flavor = "multi_thread")]
async fn libxls_words_to_a_secondary_are_answered_byte_for_byte() {
    let (Some(qemu), Some(_)) = (installed("qemu-system-x86_64"), installed("qemu-img")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut processes = Vec::new();
    let mut said = Vec::new();
    for (name, program) in [("ours", Path::new(XL_COLO)), ("qemu", &qemu)] {
        let (image, active, hidden) = (at(&format!("{name}.img")), at("active"), at("hidden"));
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        for overlay in [&active, &hidden] {
            succeeds("qemu-img", &["create", "-q", "-f", "qcow2", overlay, "1M"]).await;
        }
        let image = format!("if=none,id=disk0,format=raw,file={image}");
        let top = format!(
            "if=none,id=top-colo,cache=writeback,driver=replication,mode=secondary,top-id=top-colo,file.driver=qcow2,\
             file.file.filename={active},file.backing.driver=qcow2,file.backing.file.filename={hidden},\
             file.backing.backing=disk0"
        );
        let socket = dir.path().join(name);
        let mut command = Command::new(program);
        if name == "qemu" {
            command.args([
                "-machine",
                "none",
                "-S",
                "-nodefaults",
                "-display",
                "none",
                "-drive",
                &image,
                "-drive",
                &top,
            ]);
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        } else {
            command.args(["qmp", "--drive", &image, "--drive", &top, "--socket"]).arg(&socket);
        }
        processes.push(Listening::start(&mut command, &socket));
        said.push(tokio::task::block_in_place(|| replayed(&socket, libxl())));
    }
    assert_eq!(said[0], [""; 0], "ours");
    if said[1].iter().any(|line| line.contains("CommandNotFound")) {
        eprintln!("SKIP: this qemu-system-x86_64 is built without replication");
        return;
    }
    // Where libxl does not look: QEMU's stop without failover fails always, and drops nothing.
    let [stop] = &said[1][..] else { panic!("QEMU: {:#?}", said[1]) };
    assert!(stop.contains("\"enable\":false") && stop.contains("Backup job was cancelled unexpectedly"), "{stop}");
}

/// The same of a primary: an own secondary for each of the two, so that neither finds the other's writes.
#[tokio::test(flavor = "multi_thread")]
async fn libxls_words_to_a_primary_are_answered_byte_for_byte() {
    let Some(qemu) = installed("qemu-system-x86_64") else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut processes = Vec::new();
    for (name, program) in [("ours", Path::new(XL_COLO)), ("qemu", &qemu)] {
        let drive = |image: &str| format!("id=disk0,format=raw,file={}", at(image).display());
        let (image, copy) = (at(&format!("{name}.img")), format!("{name}.copy"));
        for file in [&image, &at(&copy)] {
            std::fs::write(file, vec![0; 1 << 20]).unwrap();
        }
        let secondary = at(&format!("{name}.secondary"));
        let top = "id=top,driver=replication,mode=secondary,top-id=top,file.backing.backing=disk0";
        let mut command = Command::new(XL_COLO);
        command.args(["qmp", "--drive", &drive(&copy), "--drive", top, "--socket"]).arg(&secondary);
        processes.push(Listening::start(&mut command, &secondary));
        let mut b = Spoken::connect(&secondary);
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        for order in [
            "\"execute\":\"qmp_capabilities\"".to_owned(),
            format!(
                "\"execute\":\"nbd-server-start\",\"arguments\":{{\"addr\":{{\"type\":\"inet\",\
                 \"data\":{{\"host\":\"127.0.0.1\",\"port\":\"{port}\"}}}}}}"
            ),
            "\"execute\":\"nbd-server-add\",\"arguments\":{\"device\":\"disk0\",\"writable\":true}".into(),
            "\"execute\":\"xen-set-replication\",\"arguments\":{\"enable\":true,\"primary\":false}".into(),
        ] {
            let said = b.hears(format!("{{{order}}}").as_bytes());
            assert!(said.iter().any(|said| said["return"] == json!({})), "{order}: {said:?}");
        }
        let quorum = format!(
            "if=none,id=disk0,driver=quorum,vote-threshold=1,read-pattern=fifo,children.0.driver=raw,\
             children.0.file.filename={}",
            image.display()
        );
        let socket = at(name);
        let mut command = Command::new(program);
        if name == "qemu" {
            command.args(["-machine", "none", "-S", "-nodefaults", "-display", "none", "-drive", &quorum]);
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        } else {
            command.args(["qmp", "--drive", &quorum, "--socket"]).arg(&socket);
        }
        processes.push(Listening::start(&mut command, &socket));
        let differ = tokio::task::block_in_place(|| replayed(&socket, libxl_of_a_primary(port)));
        if name == "qemu" && differ.iter().any(|line| line.contains("CommandNotFound")) {
            eprintln!("SKIP: this qemu-system-x86_64 is built without replication");
            return;
        }
        assert_eq!(differ, [""; 0], "{name}");
    }
}

/// Here QEMU says that all is well, and we do not.
#[test]
fn where_qemus_success_means_nothing_ours_is_an_error() {
    let Some(qemu) = installed("qemu-system-x86_64") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (theirs, ours) = (dir.path().join("qemu"), dir.path().join("ours"));
    let mut command = Command::new(qemu);
    command.args(["-machine", "none", "-S", "-nodefaults", "-display", "none", "-qmp"]);
    let _qemu = Listening::start(command.arg(format!("unix:{},server=on,wait=off", theirs.display())), &theirs);
    let _ours = Listening::start(Command::new(XL_COLO).args(["qmp", "--socket"]).arg(&ours), &ours);
    let (mut theirs, mut ours) = (Spoken::connect(&theirs), Spoken::connect(&ours));
    for spoken in [&mut theirs, &mut ours] {
        spoken.hears(b"{'execute':'qmp_capabilities'}");
    }
    for words in [
        "{'execute':'xen-set-replication','arguments':{'enable':true,'primary':true}}",
        "{'execute':'xen-set-replication','arguments':{'enable':true,'primary':false}}",
        "{'execute':'xen-colo-do-checkpoint'}",
        "{'execute':'xen-set-replication','arguments':{'enable':false,'primary':false}}",
    ] {
        let wanted = theirs.hears(words.as_bytes());
        if wanted[0]["error"]["class"] == "CommandNotFound" {
            eprintln!("SKIP: this qemu-system-x86_64 is built without replication");
            return;
        }
        assert_eq!(wanted, [json!({"return": {}})], "{words}");
        assert_eq!(ours.hears(words.as_bytes())[0]["error"]["class"], "GenericError", "{words}");
    }
    let status = b"{'execute':'query-xen-replication-status'}";
    assert_eq!(theirs.hears(status), [json!({"return": {"error": false}})]);
    assert_eq!(ours.hears(status)[0]["return"]["error"], true);
}
