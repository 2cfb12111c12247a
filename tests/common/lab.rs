//! Two guests of real kernels that look like one to a client, in network namespaces.
//!
//! ```text
//!  client ══ bridge ══ tap of ours ─ filter ─ veth ══ guest A        filter ─ veth ══ guest B
//!   -c                  -ha            │  └─ mirror ──────────────────▶ │         -gb
//!                                      └─ redirect ─▶ compare ◀─ redirect
//! ```
//!
//! Both guests have the same addresses, and serve the same, unless told otherwise. Their kernels' TCP is as it comes,
//! with timestamps, SACK and window scaling. What is switched off in them: duplicate address detection and router
//! solicitation, which a guest has long behind it when its protection begins. In the hosts IPv6 is off, as `vif-colo` has it for a vif: what a
//! host says on a guest's interface the guest has never said.
//!
//! Everything ends when it is dropped: processes first, then the namespaces with all that is in them.

use super::comparator::{Comparator, Peer};
use super::frames::{framed, framed_vnet};
use super::{LOOK, Listening, PATIENCE, XL_COLO, installed};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const GUEST_V4: &str = "10.99.0.2";
pub const GUEST_V6: &str = "fd99::2";
static TURN: Mutex<()> = Mutex::new(());
static NEXT: AtomicU32 = AtomicU32::new(0);
/// What the guests serve: a file, and what they are given. Nothing in it tells the time.
const SERVER: &str = r#"
import http.server, socket, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def date_time_string(self, timestamp=None): return "Thu, 01 Jan 1970 00:00:00 GMT"
    def log_message(self, *words): pass
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.answer(open(sys.argv[1], "rb").read())
    def do_PUT(self):
        time.sleep(float(sys.argv[2]))
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(("::", 80), Handler).serve_forever()
"#;

/// Ended when it is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Network namespaces, deleted when they are dropped.
pub struct Namespaces {
    pub prefix: String,
    names: &'static [&'static str],
    /// One lab at a time: two guests that starve each other on a small machine say nothing about their proxies.
    _turn: MutexGuard<'static, ()>,
}

impl Namespaces {
    /// None, said loudly, where they are not to be had.
    pub fn new(names: &'static [&'static str]) -> Option<Self> {
        installed("ip")?;
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let prefix = format!("xc{:x}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let namespaces = Self { prefix, names, _turn };
        let added = namespaces.ip(&format!("netns add {}-{}", namespaces.prefix, names[0]));
        if !added.status.success() {
            eprintln!("SKIP: no network namespaces: {}", String::from_utf8_lossy(&added.stderr).trim());
            return None;
        }
        names[1..].iter().for_each(|name| ip(&format!("netns add {}-{name}", namespaces.prefix)));
        Some(namespaces)
    }

    fn ip(&self, words: &str) -> Output {
        Command::new("ip").args(words.split_whitespace()).output().unwrap()
    }

    /// A program in one of them.
    pub fn command(&self, name: &str, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}-{name}", self.prefix)]).args(words);
        command.stdin(Stdio::null());
        command
    }

    /// Settings of one of them.
    pub fn set(&self, name: &str, words: &str) {
        let words: Vec<&str> = words.split_whitespace().collect();
        let output = self.command(name, &[&["sysctl", "-qw"], &words[..]].concat()).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in self.names {
            let _ = self.ip(&format!("netns del {}-{name}", self.prefix));
        }
    }
}

const NAMES: [&str; 5] = ["c", "ga", "gb", "ha", "hb"];

/// The two guests, a client, and what stands between them.
pub struct Lab {
    pub comparator: Comparator,
    /// The comparator is QEMU's, which says nothing of itself.
    stock: bool,
    filters: Vec<Process>,
    services: Vec<Process>,
    /// A namespace stays while somebody is in it, so it comes behind them.
    namespaces: Namespaces,
}

/// An `ip` command that must succeed.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Lab {
    /// Everything, up to guests without services; None, said loudly, where that is not to be had.
    pub fn new(options: &[&str]) -> Option<Self> {
        let vnet: &[&str] = if options.contains(&"--vnet-hdr-support") { &["--vnet-hdr-support"] } else { &[] };
        Self::around(options, false, || Some(Comparator::ours(vnet)))
    }

    /// The same around a stock QEMU's comparator, with virtio-net headers.
    pub fn with_qemu() -> Option<Self> {
        Self::around(&["--vnet-hdr-support"], true, || Comparator::qemu(",vnet_hdr_support=on"))
    }

    fn around(options: &[&str], stock: bool, comparator: impl FnOnce() -> Option<Comparator>) -> Option<Self> {
        for program in ["python3", "curl", "ping"] {
            installed(program)?;
        }
        let namespaces = Namespaces::new(&NAMES)?;
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("SKIP: there is no /dev/net/tun");
            return None;
        }
        let comparator = comparator()?;
        let mut lab = Self { comparator, stock, filters: Vec::new(), services: Vec::new(), namespaces };
        lab.wire();
        let [mirror, primary, secondary, out] =
            ["mirror", "primary-in", "secondary-in", "outdev"].map(|name| lab.comparator.path(name));
        let connect = |path: &PathBuf| format!("unix:{},server=off", path.display());
        let mirror_on = format!("unix:{}", mirror.display());
        let a = ["--tap", "colo%d", "--bridge", "br0", "--mirror", &mirror_on, "--to-network", &connect(&out)];
        lab.filter("ha", &[&a[..], &["--redirect", &connect(&primary)], options].concat());
        let b = ["--to-guest", &connect(&mirror), "--rewriter", "--redirect", &connect(&secondary)];
        lab.filter("hb", &[&b[..], options].concat());
        lab.until("the filters are connected", |lab| {
            let degraded = ["ha", "hb"].map(|host| lab.status(host)["degraded"].clone());
            degraded.iter().all(|found| *found == serde_json::json!([]))
        });
        Some(lab)
    }

    fn wire(&self) {
        let p = &self.namespaces.prefix;
        let set = |name: &str, words: &str| self.namespaces.set(name, words);
        for host in ["ha", "hb"] {
            set(host, "net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
        }
        for machine in ["c", "ga", "gb"] {
            set(machine, "net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0");
            set(machine, "net.ipv6.conf.default.router_solicitations=0 net.ipv6.conf.default.accept_ra=0");
        }
        ip(&format!("-n {p}-ha link add br0 type bridge"));
        ip(&format!("-n {p}-ha link set br0 up"));
        ip(&format!("-n {p}-c link add eth0 type veth peer name client netns {p}-ha"));
        ip(&format!("-n {p}-ha link set client master br0 up"));
        self.address("c", "10.99.0.9", "fd99::9");
        for (guest, host) in [("ga", "ha"), ("gb", "hb")] {
            ip(&format!(
                "-n {p}-{guest} link add eth0 address 02:00:00:00:00:02 type veth peer name vif netns {p}-{host}"
            ));
            ip(&format!("-n {p}-{host} link set vif up"));
            self.address(guest, GUEST_V4, GUEST_V6);
        }
        // A guest that is protected has been up for a while, and has told its multicast groups.
        for host in ["ha", "hb"] {
            let counter = "/sys/class/net/vif/statistics/rx_packets";
            let (mut before, mut since) = (Vec::new(), Instant::now());
            while since.elapsed() < Duration::from_millis(2500) {
                let now = self.run(host, &["cat", counter]).stdout;
                if now != before {
                    (before, since) = (now, Instant::now());
                }
                std::thread::sleep(LOOK);
            }
        }
    }

    fn address(&self, name: &str, v4: &str, v6: &str) {
        let at = format!("-n {}-{name}", self.namespaces.prefix);
        ip(&format!("{at} addr add {v4}/24 dev eth0"));
        ip(&format!("{at} addr add {v6}/64 dev eth0 nodad"));
        ip(&format!("{at} link set eth0 up"));
    }

    fn filter(&mut self, host: &str, options: &[&str]) {
        let said = File::create(self.comparator.path(host)).unwrap();
        let complaints = File::create(self.comparator.path(&format!("{host}-stderr"))).unwrap();
        let mut command = self.command(host, &[&[XL_COLO, "filter", "--dev", "vif"], options].concat());
        self.filters.push(Process(command.stdout(said).stderr(complaints).spawn().unwrap()));
        self.comparator.says(host, "filter: dev vif");
    }

    fn command(&self, name: &str, words: &[&str]) -> Command {
        self.namespaces.command(name, words)
    }

    /// Runs a program in a namespace. It must end by itself.
    pub fn run(&self, name: &str, words: &[&str]) -> Output {
        self.command(name, words).output().unwrap()
    }

    /// Runs a program of the client's, which must succeed within [`PATIENCE`]; what it printed.
    pub fn client(&self, words: &[&str]) -> Vec<u8> {
        let patience = PATIENCE.as_secs().to_string();
        let output = self.run("c", &[&["timeout", &patience], words].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let who = if self.stock { &["ha", "hb"][..] } else { &["stdout", "ha", "hb"] };
            let now: String = who.iter().map(|who| format!("{}\n", self.status(who))).collect();
            panic!("{words:?}: {}: {said}\n{now}\n{}", output.status, self.story());
        }
        output.stdout
    }

    /// Starts a program of the client's.
    pub fn start(&mut self, words: &[&str]) {
        let mut command = self.command("c", words);
        self.services.push(Process(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()));
    }

    /// Both guests serve these files on port 80.
    pub fn serve(&mut self, files: [&[u8]; 2]) {
        self.serve_late(files, Duration::ZERO);
    }

    /// The same, and guest B begins so late to read what it is given.
    pub fn serve_late(&mut self, files: [&[u8]; 2], late: Duration) {
        std::fs::write(self.comparator.path("server.py"), SERVER).unwrap();
        let program = self.comparator.path("server.py");
        let late = late.as_secs_f64().to_string();
        for ((guest, file), late) in ["ga", "gb"].into_iter().zip(files).zip(["0", &late]) {
            let at = self.comparator.path(&format!("{guest}-file"));
            std::fs::write(&at, file).unwrap();
            self.service(guest, 80, &["python3", program.to_str().unwrap(), at.to_str().unwrap(), late]);
        }
    }

    /// A guest serves something on a port.
    pub fn service(&mut self, guest: &str, port: u16, words: &[&str]) {
        let mut command = self.command(guest, words);
        self.services.push(Process(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()));
        let port = format!("sport = :{port}");
        self.until(&port, |lab| !lab.run(guest, &["ss", "-Hltn", &port]).stdout.is_empty());
    }

    /// Waits for something that will be so.
    pub fn until(&self, what: &str, so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !so(self) {
            assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}\n{}", self.story());
            std::thread::sleep(LOOK);
        }
    }

    /// What a filter, or the comparator ("stdout"), says of itself.
    pub fn status(&self, who: &str) -> Value {
        let child = match who {
            "ha" => &self.filters[0].0,
            "hb" => &self.filters[1].0,
            _ => &self.comparator.process.0,
        };
        let lines = || self.comparator.said(who).lines().map(str::to_owned).collect::<Vec<_>>();
        let before = lines().len();
        kill_process(Pid::from_child(child), Signal::USR1).unwrap();
        let begun = Instant::now();
        loop {
            if let Some(status) = lines().get(before..).and_then(|new| serde_json::from_str(new.last()?).ok()) {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "{who} says nothing");
            std::thread::sleep(LOOK);
        }
    }

    /// Tells a filter that the other guest is gone.
    pub fn go_alone(&self, host: &str) {
        let filter = &self.filters[usize::from(host == "hb")].0;
        kill_process(Pid::from_child(filter), Signal::USR2).unwrap();
        self.until("it is alone", |lab| lab.status(host)["alone"] == true);
    }

    /// Frames that the kernel lost at any of the devices, by the filters' own account.
    pub fn lost(&self) -> u64 {
        let of = |host| {
            let status = self.status(host);
            let [guest, network] = ["guest", "network"].map(|side| status["lost_by_kernel"][side].as_u64().unwrap());
            guest + network + status["not_sent"].as_u64().unwrap() + status["unusable"].as_u64().unwrap()
        };
        of("ha") + of("hb")
    }

    /// Says that a checkpoint was made, each time one is asked for, until the lab ends.
    pub fn answer_checkpoints(&self) {
        self.answer_at(Peer::connect(&self.comparator.path("notify-dev")), false);
    }

    /// The same, by somebody who is there already, and owes an answer.
    pub fn answer_at(&self, mut notify: Peer, owes: bool) {
        // QEMU's waits for a second word where its frames have one.
        let answer = if self.stock { framed_vnet(&[], b"COLO_CHECKPOINT") } else { framed(b"COLO_CHECKPOINT") };
        notify.0.set_read_timeout(None).unwrap();
        std::thread::spawn(move || {
            use std::io::{Read, Write};
            let (mut word, mut owes) = ([0; 17], owes);
            while owes || (notify.0.read_exact(&mut word).is_ok() && &word[4..] == b"DO_CHECKPOINT") {
                if notify.0.write_all(&answer).is_err() {
                    return;
                }
                owes = false;
            }
        });
    }

    /// What everybody has said, for a failure.
    fn story(&self) -> String {
        let said = ["stdout", "stderr", "ha", "ha-stderr", "hb", "hb-stderr"].map(|who| {
            if self.stock && who == "stdout" {
                return String::new();
            }
            let said = self.comparator.said(who);
            let tail: Vec<_> = said.lines().rev().take(4).collect();
            format!("{who}: {}", tail.join("\n  "))
        });
        said.join("\n")
    }
}

/// A filter, and a guest that is played: a second filter is no more than a way to the guest's end of a veth.
///
/// ```text
///   to_guest ─┐                                        ┌─ hears ─▶ the test
///             ├─ filter ─ vif ══ veth ══ eth0 ─ filter ┤
///   redirect ◀┘                                        └─ says ◀── the test
/// ```
pub struct PlayedGuest {
    pub filter: Listening,
    _way: Listening,
    pub hears: Peer,
    pub says: Peer,
    pub dir: TempDir,
    namespaces: Namespaces,
}

impl PlayedGuest {
    /// A filter with these options, beside `--to-guest unix:to-guest` and `--redirect unix:redirect`.
    pub fn new(options: &[&str]) -> Option<Self> {
        let namespaces = Namespaces::new(&["s"])?;
        let dir = tempfile::tempdir().unwrap();
        namespaces.set("s", "net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
        let at = format!("-n {}-s link", namespaces.prefix);
        ip(&format!("{at} add vif type veth peer name eth0"));
        ["vif", "eth0"].iter().for_each(|name| ip(&format!("{at} set {name} up")));
        let filter = |dev: &str, ports: [&str; 2], options: &[&str]| {
            let [to_guest, redirect] = ports.map(|name| format!("unix:{}", dir.path().join(name).display()));
            let words = [XL_COLO, "filter", "--dev", dev, "--to-guest", &to_guest, "--redirect", &redirect];
            let mut command = namespaces.command("s", &[&words[..], options].concat());
            command.stdout(File::create(dir.path().join(format!("{dev}-says"))).unwrap()).current_dir(dir.path());
            let process = Listening::start(&mut command, &dir.path().join(ports[1]));
            let begun = Instant::now();
            while std::fs::read_to_string(dir.path().join(format!("{dev}-says"))).unwrap().is_empty() {
                assert!(begun.elapsed() < PATIENCE, "{dev}: not all is open");
                std::thread::sleep(LOOK);
            }
            process
        };
        let under_test = filter("vif", ["to-guest", "redirect"], options);
        let way = filter("eth0", ["says", "hears"], &[]);
        let [says, hears] = ["says", "hears"].map(|name| Peer::connect(&dir.path().join(name)));
        Some(Self { filter: under_test, _way: way, hears, says, dir, namespaces })
    }

    /// A peer of the filter's.
    pub fn connect(&self, name: &str) -> Peer {
        Peer::connect(&self.dir.path().join(name))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.filter.0), signal).unwrap();
    }

    pub fn status(&self) -> Value {
        let said = || std::fs::read_to_string(self.dir.path().join("vif-says")).unwrap();
        let before = said().lines().count();
        self.signal(Signal::USR1);
        let begun = Instant::now();
        loop {
            // What it said before is not what it says now.
            if let Some(status) = said().lines().nth(before).and_then(|line| serde_json::from_str(line).ok()) {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "no status");
            std::thread::sleep(LOOK);
        }
    }

    /// Frames that the guest's interface has brought to the filter's.
    pub fn arrived(&self) -> u64 {
        let counter = ["cat", "/sys/class/net/vif/statistics/rx_packets"];
        let output = self.namespaces.command("s", &counter).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }
}
