//! A comparator behind its four sockets: `xl-colo compare`, or a `colo-compare` of a stock QEMU's without a machine.

use super::frames::arp;
use super::{LOOK, Listening, PATIENCE, XL_COLO, installed, listens};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use tempfile::TempDir;

/// A comparator as a process, killed at the end, and the folder of its sockets.
pub struct Comparator {
    pub process: Listening,
    pub dir: TempDir,
}

impl Comparator {
    /// Ours, with a notify_dev.
    pub fn ours(options: &[&str]) -> Self {
        Self::ours_with(&["primary-in", "secondary-in", "outdev", "notify-dev"], options)
    }

    /// Ours, with these sockets.
    pub fn ours_with(ports: &[&str], options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(XL_COLO);
        command.arg("compare").stdout(std::fs::File::create(dir.path().join("stdout")).unwrap());
        command.stderr(std::fs::File::create(dir.path().join("stderr")).unwrap());
        for port in ports {
            command.arg(format!("--{port}")).arg(format!("unix:{}", dir.path().join(port).display()));
        }
        command.args(options);
        let last = dir.path().join(ports[ports.len() - 1]);
        Self { process: Listening::start(&mut command, &last), dir }
    }

    /// QEMU's own, or None, said loudly, where there is none.
    pub fn qemu(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(installed("qemu-system-x86_64")?);
        command.args(["-machine", "none", "-S", "-nodefaults", "-display", "none", "-object", "iothread,id=io"]);
        for port in ["primary-in", "secondary-in", "outdev", "notify-dev"] {
            let path = dir.path().join(port);
            command.args(["-chardev", &format!("socket,id={port},path={},server=on,wait=off", path.display())]);
        }
        command.args([
            "-object",
            &format!(
                "colo-compare,id=c,primary_in=primary-in,secondary_in=secondary-in,outdev=outdev,\
                 notify_dev=notify-dev,iothread=io{options}"
            ),
        ]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", dir.path().join("qmp").display()));
        command.stderr(std::fs::File::create(dir.path().join("stderr")).unwrap()).stdout(Stdio::null());
        let mut process = command.stdin(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        while !listens(process.id(), &dir.path().join("qmp")) {
            assert!(begun.elapsed() < PATIENCE, "{command:?} does not listen");
            if process.try_wait().unwrap().is_some() {
                eprintln!("SKIP: this qemu-system-x86_64 has no colo-compare");
                return None;
            }
            std::thread::sleep(LOOK);
        }
        Some(Self { process: Listening(process), dir })
    }

    pub fn path(&self, port: &str) -> PathBuf {
        self.dir.path().join(port)
    }

    pub fn said(&self, stream: &str) -> String {
        std::fs::read_to_string(self.path(stream)).unwrap()
    }

    /// Waits until it has said so on this stream.
    pub fn says(&self, stream: &str, what: &str) -> String {
        let begun = Instant::now();
        loop {
            let said = self.said(stream);
            if said.contains(what) {
                return said;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not say {what:?}, but {said:?}");
            std::thread::sleep(LOOK);
        }
    }

    /// A peer of this port.
    pub fn connect(&self, port: &str) -> Peer {
        Peer::connect(&self.path(port))
    }

    /// The peers of all four ports, when each has been taken. Until then QEMU loses what it has to say to one.
    pub fn connect_all(&self) -> [Peer; 4] {
        let [mut primary, mut secondary, mut out, mut notify] =
            ["primary-in", "secondary-in", "outdev", "notify-dev"].map(|port| self.connect(port));
        notify.send(b"COLO_USERSPACE_PROXY_INIT");
        assert_eq!(notify.hear(), b"COLO_COMPARE_GET_XEN_INIT");
        // ARP passes: QEMU's at once, ours when both guests announced the address.
        let mut probes = 0;
        while !out.has_something() {
            probes += 1;
            primary.send(&arp(probes));
            secondary.send(&arp(probes));
            std::thread::sleep(LOOK);
        }
        while out.hear() != arp(probes) {}
        [primary, secondary, out, notify]
    }

    /// Ends it as an operator does; its exit code.
    pub fn end(&mut self) -> Option<i32> {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.process.0), rustix::process::Signal::TERM)
            .unwrap();
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(begun.elapsed() < PATIENCE, "SIGTERM does not end it");
            std::thread::sleep(LOOK);
        }
    }
}

/// What speaks with one port.
pub struct Peer(pub UnixStream);

impl Peer {
    pub fn connect(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).unwrap())
    }

    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Writes these bytes.
    #[track_caller]
    pub fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Sends a frame.
    #[track_caller]
    pub fn send(&mut self, frame: &[u8]) {
        self.say(&super::frames::framed(frame));
    }

    /// The next message: a frame, or a word of the notify protocol.
    #[track_caller]
    pub fn hear(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).expect("a message in time");
        let mut message = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut message).expect("the whole message in time");
        message
    }

    /// As [`Self::hear`], where messages have two words: header and frame together.
    #[track_caller]
    pub fn hear_vnet(&mut self) -> (usize, Vec<u8>) {
        let mut words = [0; 8];
        self.0.read_exact(&mut words).expect("a message in time");
        let [length, header] = [0, 4].map(|at| u32::from_be_bytes(words[at..at + 4].try_into().unwrap()) as usize);
        let mut message = vec![0; length];
        self.0.read_exact(&mut message).expect("the whole message in time");
        (header, message)
    }

    /// Whether there is something to be heard.
    pub fn has_something(&self) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let peeked = rustix::net::recv(&self.0, &mut [0; 1], rustix::net::RecvFlags::PEEK);
        self.0.set_nonblocking(false).unwrap();
        peeked.is_ok()
    }

    /// Waits until the other end hangs up.
    #[track_caller]
    pub fn hears_the_end(&mut self) {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, b"", "the end"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}
