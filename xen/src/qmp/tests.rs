//! The client against scripted peers, which say what no QEMU would.

use super::*;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};

const SOON: Duration = Duration::from_secs(5);
const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;

/// A socket that is removed at the end, and a peer behind it.
struct Peer {
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        // A peer that failed has shown why; its client has failed as well.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Peer {
    /// A peer that does this with its one connection.
    fn doing(name: &str, script: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let path = std::env::temp_dir().join(format!("qmp-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::spawn(move || script(listener.accept().unwrap().0));
        Self { path, thread: Some(thread) }
    }

    /// A peer that negotiates, and then answers each command by the lines that `answer` makes of its name and id.
    fn answering(name: &str, mut answer: impl FnMut(&str, u64) -> Vec<String> + Send + 'static) -> Self {
        Self::doing(name, move |mut socket| {
            writeln!(socket, "{GREETING}").unwrap();
            for line in BufReader::new(socket.try_clone().unwrap()).lines() {
                let Ok(line) = line else { return };
                let request: Value = serde_json::from_str(&line).unwrap();
                let (command, id) = (request["execute"].as_str().unwrap(), request["id"].as_u64().unwrap());
                let lines = match command {
                    "qmp_capabilities" => vec![done(id)],
                    _ => answer(command, id),
                };
                for line in lines {
                    if writeln!(socket, "{line}").is_err() {
                        return;
                    }
                }
            }
        })
    }

    fn client(&self, deadline: Duration) -> Client {
        Client::connect(&self.path, deadline).unwrap()
    }
}

fn done(id: u64) -> String {
    json!({ "return": {}, "id": id }).to_string()
}

#[test]
fn a_refusal_names_command_class_and_reason() {
    let peer = Peer::answering("refusal", |_, id| {
        vec![json!({ "error": { "class": "CommandNotFound", "desc": "no such command" }, "id": id }).to_string()]
    });
    let error = peer.client(SOON).execute("xen-frobnicate", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "xen-frobnicate: no such command (CommandNotFound)");
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let mut slow = None;
    let peer = Peer::answering("late", move |command, id| match command {
        "slow" => {
            slow = Some(id);
            Vec::new()
        }
        _ => {
            let late = slow.take().map(|id| json!({ "return": "late", "id": id }).to_string());
            late.into_iter().chain([json!({ "return": "mine", "id": id }).to_string()]).collect()
        }
    });
    let mut client = peer.client(Duration::from_millis(200));
    let error = client.execute("slow", json!({})).unwrap_err();
    assert!(matches!(error, QmpError::Deadline { .. }), "{error}");
    assert_eq!(client.execute("quick", json!({})).unwrap(), "mine");
}

#[test]
fn events_are_kept_in_order_and_not_all_of_them() {
    let more = 10;
    let peer = Peer::answering("events", move |_, id| {
        let event = |n: usize| json!({ "event": "E", "data": { "n": n }, "timestamp": {} }).to_string();
        (0..EVENTS_MAX + more).map(event).chain([done(id), event(usize::MAX)]).collect()
    });
    let mut client = peer.client(SOON);
    client.execute("flood", json!({})).unwrap();
    let mut numbers = Vec::new();
    while let Some(event) = client.next_event(Duration::from_millis(200)).unwrap() {
        assert_eq!(event.name, "E");
        numbers.push(event.data["n"].as_u64().unwrap());
    }
    let last = (more..EVENTS_MAX + more).map(|n| n as u64).chain([u64::MAX]);
    assert_eq!(numbers, last.collect::<Vec<_>>());
}

#[test]
fn what_is_no_qmp_ends_the_connection() {
    let answers = [
        ("garbage", "{]".to_owned()),
        ("future", json!({ "return": {}, "id": 99 }).to_string()),
        ("anonymous", json!({ "error": { "class": "GenericError", "desc": "JSON parse error" } }).to_string()),
        ("endless", "x".repeat(LINE_BYTES_MAX + READ_BYTES + 1)),
    ];
    for (name, answer) in answers {
        let peer = Peer::answering(name, move |_, _| vec![answer.clone()]);
        let mut client = peer.client(SOON);
        let error = client.execute("stop", json!({})).unwrap_err();
        assert!(matches!(error, QmpError::Protocol { .. }), "{name}: {error}");
        assert!(error.to_string().len() < 300, "{name}: {error}");
        let begun = Instant::now();
        let error = client.execute("stop", json!({})).unwrap_err();
        assert!(matches!(error, QmpError::Gone { .. }) && begun.elapsed() < SOON / 5, "{name}: {error}");
    }
}

#[test]
fn a_peer_that_hangs_up_or_stops_reading_is_noticed() {
    let peer = Peer::doing("hangs-up", |mut socket| writeln!(socket, "{GREETING}").unwrap());
    let error = Client::connect(&peer.path, SOON).unwrap_err();
    assert!(matches!(error, QmpError::Gone { .. }), "{error}");

    let peer = Peer::doing("says-hello", |mut socket| writeln!(socket, "hello").unwrap());
    let error = Client::connect(&peer.path, SOON).unwrap_err();
    assert!(matches!(error, QmpError::Protocol { .. }), "{error}");

    let (leave, left) = std::sync::mpsc::channel::<()>();
    let peer = Peer::doing("stops-reading", move |mut socket| {
        writeln!(socket, "{GREETING}\n{}", done(1)).unwrap();
        let _ = left.recv();
    });
    let mut client = peer.client(Duration::from_millis(300));
    let begun = Instant::now();
    let error = client.execute("stop", json!({ "padding": "x".repeat(4 << 20) })).unwrap_err();
    assert!(matches!(error, QmpError::Gone { .. }) && begun.elapsed() < SOON, "{error}");
    drop(leave);
}

#[test]
fn nobody_there_is_an_error_that_names_the_socket() {
    let error = Client::connect(Path::new("/nonexistent/qmp"), SOON).unwrap_err();
    assert!(error.to_string().starts_with("cannot connect to the monitor /nonexistent/qmp: No such file"), "{error}");
}

/// QEMU gets the very memory: what is written through the descriptor it was handed is what is read.
#[test]
fn a_file_descriptor_goes_with_its_command() {
    let (mut ours, given) = UnixStream::pair().unwrap();
    let peer = Peer::doing("fd", |mut socket| {
        writeln!(socket, "{GREETING}\n{}", done(1)).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut got = Vec::new();
        while got.is_empty() {
            let mut bytes = [0; 4096];
            let into = &mut [std::io::IoSliceMut::new(&mut bytes)];
            rustix::net::recvmsg(&socket, into, &mut control, rustix::net::RecvFlags::empty()).unwrap();
            for message in control.drain() {
                if let rustix::net::RecvAncillaryMessage::ScmRights(fds) = message {
                    got.extend(fds);
                }
            }
        }
        let mut theirs = UnixStream::from(got.remove(0));
        theirs.write_all(b"seen").unwrap();
        writeln!(socket, "{}", done(2)).unwrap();
    });
    use std::os::fd::AsFd;
    peer.client(SOON).execute_with_fd("add-fd", json!({}), given.as_fd()).unwrap();
    let mut seen = [0; 4];
    ours.set_read_timeout(Some(SOON)).unwrap();
    ours.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"seen");
}
