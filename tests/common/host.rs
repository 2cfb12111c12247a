//! One `xl-colo host` child process: its orders, its status, its signals, its certain end.

use super::{PATIENCE, XL_COLO, until};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xen_colo::colo::hello::{Mode, ResumeOrder};
use xen_colo::daemon::address::Address;
use xen_colo::daemon::control::{self, ControlError, Protect, Request};
use xen_colo::daemon::status::{Protection, Status};

/// A host, killed when dropped: a stopped one too.
pub struct Host {
    /// Its name.
    pub name: String,
    /// Where peers connect.
    pub address: Address,
    /// Its control socket.
    pub socket: PathBuf,
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log.lock().unwrap();
            eprintln!("--- host {} said:\n{log}---", self.name);
        }
    }
}

/// The command line of a host in `dir`, listening on a free port of the loopback address.
pub fn host_command(name: &str, dir: &Path) -> Command {
    let mut command = Command::new(XL_COLO);
    command.args(["host", "--follow-stdin", "--name", name, "--listen", "127.0.0.1:0"]);
    command.arg("--run-dir").arg(dir).arg("--disk").arg(dir.join(format!("disk-{name}.img")));
    command
}

/// A request to protect with the peer, with heartbeats that survive a busy test machine.
pub fn protect(peer: &Address, mode: Mode) -> Protect {
    Protect {
        peer: peer.to_string(),
        mode,
        resume: ResumeOrder::default(),
        checkpoint_delay_ms: None,
        heartbeat_interval_ms: Some(100),
        heartbeat_misses: Some(10),
        delta_mib: None,
        release_at_once: false,
        packet_digests: false,
        min_run_percent: None,
    }
}

impl Host {
    /// Starts the command and waits until the host has said where it listens.
    pub fn start(name: &str, dir: &Path, mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).env("XEN_COLO_LOG", "info");
        let mut child = command.spawn().unwrap();
        let (stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let log = Arc::<Mutex<String>>::default();
        let kept = log.clone();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(bytes @ 1..) = stderr.read(&mut chunk) {
                let mut log = kept.lock().unwrap();
                if log.len() < 1 << 20 {
                    log.push_str(&String::from_utf8_lossy(&chunk[..bytes]));
                }
            }
        });
        let socket = control::socket_path(dir, name);
        let address = Address::Unix(PathBuf::new());
        let mut host = Self { name: name.to_owned(), address, socket, child, log };
        let (said, line) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            let mut line = String::new();
            let _ = stdout.read_line(&mut line);
            let _ = said.send(line);
            let _ = std::io::copy(&mut stdout, &mut std::io::sink());
        });
        let line = line.recv_timeout(PATIENCE).unwrap();
        let address = line.trim().rsplit(' ').next().and_then(|address| address.parse().ok());
        host.address = address.unwrap_or_else(|| panic!("host {name} did not start: {line:?}"));
        host
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and the end of the process.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGSTOP; returns when the process stands still.
    pub async fn stop(&self) {
        self.signal("STOP").await;
        let stat = format!("/proc/{}/stat", self.pid());
        until("the process stands still", async || {
            let text = std::fs::read_to_string(&stat).unwrap();
            let state = text.rsplit(") ").next().and_then(|rest| rest.chars().next());
            if state == Some('T') { Ok(()) } else { Err(state) }
        })
        .await;
    }

    /// SIGCONT.
    pub async fn wake(&self) {
        self.signal("CONT").await;
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Any signal.
    pub async fn signal(&self, name: &str) {
        let output = super::run("kill", &[&format!("-{name}"), &self.pid().to_string()]).await;
        assert!(output.status.success(), "{output:?}");
    }

    /// The exit status of a process that ends by itself.
    pub async fn exit(&mut self) -> ExitStatus {
        let child = &mut self.child;
        until("the process ends", async || child.try_wait().unwrap().ok_or("it runs")).await
    }

    /// Asks something, and gets an answer soon.
    pub async fn ask(&self, request: Request) -> Result<serde_json::Value, ControlError> {
        tokio::time::timeout(PATIENCE, control::ask(&self.socket, &request))
            .await
            .unwrap_or_else(|_| panic!("host {} does not answer {request:?}", self.name))
    }

    /// Orders something that must be done.
    pub async fn order(&self, request: Request) {
        let asked = format!("{request:?}");
        self.ask(request).await.unwrap_or_else(|error| panic!("host {}: {asked}: {error}", self.name));
    }

    /// Why an order is refused.
    pub async fn refusal(&self, request: Request) -> String {
        match self.ask(request).await {
            Err(ControlError::Refused(why)) => why,
            other => panic!("host {} should refuse, and says {other:?}", self.name),
        }
    }

    /// What it says of itself.
    pub async fn status(&self) -> Status {
        serde_json::from_value(self.ask(Request::Status).await.unwrap()).unwrap()
    }

    /// Waits for a status.
    pub async fn becomes(&self, wanted: Protection) -> Status {
        self.is(&format!("{wanted:?}"), |status| status.protection == wanted).await
    }

    /// Waits for a status that fits.
    pub async fn is(&self, what: &str, fits: impl Fn(&Status) -> bool) -> Status {
        until(&format!("host {} becomes {what}", self.name), async || {
            let status = self.status().await;
            if fits(&status) { Ok(status) } else { Err(status) }
        })
        .await
    }

    /// Asserts that a status lasts.
    pub async fn stays(&self, wanted: Protection, time: Duration) {
        let until = std::time::Instant::now() + time;
        while std::time::Instant::now() < until {
            let status = self.status().await;
            assert_eq!(status.protection, wanted, "{status:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
