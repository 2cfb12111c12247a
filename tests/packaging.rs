//! What the package installs beside the program: systemd's units, the cluster's agent, xl's hooks.

use crate::common::{PATIENCE, XL_COLO, installed, run, succeeds, turn, until};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xen_colo::daemon::arbiter::Arbiter;
use xen_colo::daemon::control::{self, Request};
use xen_colo::daemon::status::{Protection, Status};

fn packaging(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/packaging").join(path)
}

/// systemd reads them without a word, and says how exposed they are.
#[tokio::test]
async fn the_units_are_ones_systemd_understands() {
    if installed("systemd-analyze").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for entry in std::fs::read_dir(packaging("systemd")).unwrap() {
        let path = entry.unwrap().path();
        // It looks for the program too, which is not installed here.
        let text = std::fs::read_to_string(&path).unwrap().replace("/usr/sbin/xl-colo", XL_COLO);
        let unit = dir.path().join(path.file_name().unwrap());
        std::fs::write(&unit, text).unwrap();
        units.push(unit.display().to_string());
    }
    assert_eq!(units.len(), 3, "{units:?}");
    let arguments: Vec<_> = ["verify", "--man=no"].into_iter().chain(units.iter().map(String::as_str)).collect();
    let verified = run("systemd-analyze", &arguments).await;
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(verified.status.success() && said.is_empty(), "{said}");
    for (unit, most) in [("xl-colo@.service", 60), ("xl-colo-arbiter.service", 20)] {
        let path = units.iter().find(|path| path.ends_with(unit)).unwrap();
        let threshold = format!("--threshold={most}");
        let output = run("systemd-analyze", &["security", "--offline=true", "--no-pager", &threshold, path]).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        eprintln!("{}", said.lines().last().unwrap_or_default());
        assert!(output.status.success(), "{unit} is more exposed than {}.{}", most / 10, most % 10);
    }
}

const SUCCESS: i32 = 0;
const GENERIC: i32 = 1;
const UNIMPLEMENTED: i32 = 3;
const INSTALLED: i32 = 5;
const CONFIGURED: i32 = 6;
const NOT_RUNNING: i32 = 7;
const PROMOTED: i32 = 8;

/// A cluster of two nodes on this machine, in one folder. What is started is killed at the end.
struct Cluster {
    dir: tempfile::TempDir,
    agent: PathBuf,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in ["a", "b"] {
            let Ok(pid) = std::fs::read_to_string(self.path(&format!("{node}.web.pid"))) else { continue };
            let _ = Command::new("kill").args(["-KILL", pid.trim()]).stderr(Stdio::null()).status();
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.path(&format!("{node}.web.log"))).unwrap_or_default();
                eprintln!("--- host {node} said:\n{log}---");
            }
        }
    }
}

impl Cluster {
    fn new() -> Option<Self> {
        if !Path::new("/usr/lib/ocf/lib/heartbeat/ocf-shellfuncs").exists() {
            eprintln!("SKIP: resource-agents is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        // ocf-tester looks at it as nobody.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let agent = dir.path().join("guest");
        std::fs::copy(packaging("ocf/guest"), &agent).unwrap();
        std::fs::set_permissions(&agent, PermissionsExt::from_mode(0o755)).unwrap();
        Some(Self { dir, agent })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("run").join(name)
    }

    fn parameters(&self, node: &str) -> Vec<(&'static str, String)> {
        let file = |name: String| self.dir.path().join(name).display().to_string();
        vec![
            ("guest", "web".into()),
            ("node", node.into()),
            ("disks", file(format!("disk-{node}.img"))),
            ("hosts", format!("a=unix:{} b=unix:{}", file("a.peer".into()), file("b.peer".into()))),
            ("arbiter", format!("file:{}", file("register.json".into()))),
            ("run_dir", file("run".into())),
            ("binary", XL_COLO.into()),
            ("options", "--guest-mib 4 --disk-mib 4".into()),
        ]
    }

    /// The agent's return code, with some parameters changed.
    async fn acts_with(&self, node: &str, action: &str, more: &[(&str, &str)]) -> (i32, String) {
        let mut command = tokio::process::Command::new(&self.agent);
        command.arg(action).env("OCF_ROOT", "/usr/lib/ocf").env("OCF_RESOURCE_INSTANCE", "web");
        command.env("HA_RSCTMP", self.dir.path()).env("__OCF_ACTION", action);
        command.env("OCF_RESKEY_CRM_meta_interval", "10000").env("OCF_RESKEY_CRM_meta_timeout", "60000");
        for (name, value) in self.parameters(node) {
            command.env(format!("OCF_RESKEY_{name}"), value);
        }
        for (name, value) in more {
            command.env(format!("OCF_RESKEY_{name}"), value);
        }
        // What it starts in the background keeps nothing of these open.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let output = tokio::time::timeout(2 * PATIENCE, command.output()).await;
        let output = output.unwrap_or_else(|_| panic!("{action} on {node} hangs")).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap_or(-1), said)
    }

    #[track_caller]
    fn acts<'a>(&'a self, node: &'a str, action: &'a str, wanted: i32) -> impl Future<Output = ()> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let (code, said) = self.acts_with(node, action, &[]).await;
            assert_eq!(code, wanted, "{caller}: {action} on {node}: {said}");
        }
    }

    /// What the cluster would see of both.
    #[track_caller]
    fn sees(&self, a: i32, b: i32) -> impl Future<Output = ()> + '_ {
        let caller = std::panic::Location::caller();
        async move {
            let seen = (self.acts_with("a", "monitor", &[]).await, self.acts_with("b", "monitor", &[]).await);
            assert_eq!((seen.0.0, seen.1.0), (a, b), "{caller}: {seen:?}");
        }
    }

    async fn becomes(&self, node: &str, wanted: Protection) {
        let socket = control::socket_path(&self.path(""), node);
        until(&format!("{node} becomes {wanted:?}"), async || {
            let answer = control::ask(&socket, &Request::Status).await.map_err(|error| error.to_string())?;
            let status: Status = serde_json::from_value(answer).map_err(|error| error.to_string())?;
            if status.protection == wanted { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
    }

    async fn signal(&self, node: &str, name: &str) {
        let pid = std::fs::read_to_string(self.path(&format!("{node}.web.pid"))).unwrap();
        succeeds("kill", &[name, pid.trim()]).await;
    }

    async fn generation(&self) -> u64 {
        let arbiter = Arbiter::File(self.dir.path().join("register.json"));
        arbiter.query("web").await.unwrap().generation
    }

    /// The cluster tells the promoted node what has just been done; the guest becomes protected.
    async fn notifies(&self, node: &str, operation: &str) -> String {
        let told = [("CRM_meta_notify_type", "post"), ("CRM_meta_notify_operation", operation)];
        let (code, said) = self.acts_with(node, "notify", &told).await;
        assert_eq!(code, SUCCESS, "{said}");
        said
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_passes_ocf_tester() {
    let (Some(cluster), Some(_), Some(_)) = (Cluster::new(), installed("ocf-tester"), installed("xmllint")) else {
        return;
    };
    let _turn = turn().await;
    let mut arguments = vec!["-n".to_owned(), "web".to_owned()];
    for (name, value) in cluster.parameters("a") {
        arguments.extend(["-o".to_owned(), format!("{name}={value}")]);
    }
    arguments.push(cluster.agent.display().to_string());
    let output = tokio::process::Command::new("ocf-tester").args(&arguments).output();
    let output = tokio::time::timeout(6 * PATIENCE, output).await.expect("ocf-tester hangs").unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("passed all tests"), "{said}");
    for optional in ["notify", "demote", "promote"] {
        assert!(!said.contains(&format!("does not support the {optional} action")), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_refuses_what_cannot_be_before_it_does_anything() {
    let Some(cluster) = Cluster::new() else { return };
    for (name, value, wanted) in [
        ("guest", "", CONFIGURED),
        ("guest", "we b", CONFIGURED),
        ("disks", "", CONFIGURED),
        ("hosts", "a=unix:/x", CONFIGURED),
        ("hosts", "c=unix:/x b=unix:/y", CONFIGURED),
        ("hosts", "a b", CONFIGURED),
        ("mode", "both", CONFIGURED),
        ("policy", "alone", CONFIGURED),
        ("arbiter", "", CONFIGURED),
        ("config", "/nonexistent/web.cfg", INSTALLED),
        ("binary", "/nonexistent/xl-colo", INSTALLED),
        ("mode", "colo", SUCCESS),
    ] {
        for action in ["validate-all", "start"] {
            if wanted == SUCCESS && action == "start" {
                continue;
            }
            let (code, said) = cluster.acts_with("a", action, &[(name, value)]).await;
            assert_eq!(code, wanted, "{action} with {name}={value:?}: {said}");
        }
    }
    cluster.acts("a", "monitor", NOT_RUNNING).await;
    cluster.acts("a", "dance", UNIMPLEMENTED).await;
    let missing = ("binary", "/nonexistent/xl-colo");
    assert_eq!(cluster.acts_with("a", "monitor", &[missing]).await.0, INSTALLED);
    assert_eq!(
        cluster.acts_with("a", "monitor", &[missing, ("CRM_meta_interval", "0")]).await.0,
        NOT_RUNNING,
        "a probe"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_moves_the_guest_and_never_says_that_it_runs_twice() {
    let Some(cluster) = Cluster::new() else { return };
    let _turn = turn().await;
    cluster.acts("a", "start", SUCCESS).await;
    cluster.acts("b", "start", SUCCESS).await;
    cluster.sees(SUCCESS, SUCCESS).await;
    cluster.acts("a", "promote", SUCCESS).await;
    cluster.sees(PROMOTED, SUCCESS).await;
    cluster.notifies("a", "promote").await;
    cluster.becomes("a", Protection::Protected).await;
    cluster.sees(PROMOTED, SUCCESS).await;

    // The other node is promoted: the takeover.
    cluster.acts("b", "promote", SUCCESS).await;
    cluster.becomes("a", Protection::Stopped).await;
    cluster.sees(SUCCESS, PROMOTED).await;

    // Demoted, with nobody to go on, and promoted again: booted from its own disk, and protected.
    cluster.acts("b", "demote", SUCCESS).await;
    cluster.sees(SUCCESS, SUCCESS).await;
    cluster.acts("b", "promote", SUCCESS).await;
    cluster.notifies("b", "promote").await;
    cluster.becomes("b", Protection::Protected).await;

    // The node that stands by is stopped, and comes back: nobody was lost, nobody took over.
    let generation = cluster.generation().await;
    cluster.acts("a", "stop", SUCCESS).await;
    cluster.becomes("b", Protection::Unprotected).await;
    cluster.sees(NOT_RUNNING, PROMOTED).await;
    assert_eq!(cluster.generation().await, generation);
    cluster.acts("a", "start", SUCCESS).await;
    cluster.notifies("b", "start").await;
    cluster.becomes("b", Protection::Protected).await;
    // So is the promoted one: what the other has is given up.
    cluster.acts("b", "stop", SUCCESS).await;
    cluster.becomes("a", Protection::Empty).await;
    cluster.sees(SUCCESS, NOT_RUNNING).await;
    assert_eq!(cluster.generation().await, generation + 1, "that of the protection, and no other");
    cluster.acts("b", "start", SUCCESS).await;
    cluster.acts("b", "promote", SUCCESS).await;
    cluster.notifies("b", "promote").await;
    cluster.becomes("b", Protection::Protected).await;

    // The node dies; the other one goes on, without the cluster.
    cluster.signal("b", "-KILL").await;
    cluster.becomes("a", Protection::TakenOver).await;
    cluster.sees(PROMOTED, NOT_RUNNING).await;
    cluster.acts("b", "start", SUCCESS).await;
    cluster.sees(PROMOTED, SUCCESS).await;
    // A cluster that promotes the wrong one is refused, and the guest runs once.
    let (code, said) = cluster.acts_with("b", "promote", &[]).await;
    assert_eq!(code, GENERIC, "{said}");
    assert!(said.contains("host a holds generation"), "{said}");
    cluster.sees(PROMOTED, SUCCESS).await;

    // Demoted because the other one is to be promoted: the guest goes on there.
    cluster.acts("a", "demote", SUCCESS).await;
    cluster.acts("a", "promote", SUCCESS).await;
    cluster.notifies("a", "start").await;
    cluster.becomes("a", Protection::Protected).await;
    let (code, said) = cluster.acts_with("a", "demote", &[("CRM_meta_notify_promote_uname", "b")]).await;
    assert_eq!(code, SUCCESS, "{said}");
    cluster.becomes("b", Protection::TakenOver).await;
    cluster.acts("b", "promote", SUCCESS).await;
    cluster.sees(SUCCESS, PROMOTED).await;

    // A host that hangs is neither running nor stopped, and can be stopped.
    cluster.signal("a", "-STOP").await;
    cluster.acts("a", "monitor", GENERIC).await;
    cluster.acts("a", "stop", SUCCESS).await;
    cluster.acts("b", "stop", SUCCESS).await;
    cluster.sees(NOT_RUNNING, NOT_RUNNING).await;
    cluster.acts("b", "stop", SUCCESS).await;
}

/// A hotplug script with everything it would change replaced: each program writes down how it was called.
struct DryRun {
    dir: tempfile::TempDir,
    script: PathBuf,
}

impl DryRun {
    fn of(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/hotplug").join(script);
        let text = std::fs::read_to_string(source).unwrap();
        let path = "export PATH=/usr/lib/xen-4.17/bin:";
        assert_eq!(text.matches(path).count(), 1, "{script} chooses its own programs");
        let text = text.replace(path, &format!("export PATH={}:", bin.display()));
        let text = text.replace("exec 2>>/var/log/xen/xen-hotplug.log", ":");
        let run = Self { script: dir.path().join(script), dir };
        run.write(&run.script, &text);
        for program in ["ip", "tc", "xenstore-write", "xenstore-rm", "modprobe", "ethtool"] {
            run.fakes(program, "");
        }
        run.fakes("xenstore-read", "cat \"$(dirname \"$0\")/../store/$(basename \"$1\")\"");
        std::fs::create_dir(run.dir.path().join("store")).unwrap();
        run.write(&bin.join("xl-colo"), &format!("#!/bin/sh\nexec '{XL_COLO}' \"$@\"\n"));
        run
    }

    fn write(&self, path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// A program that writes down its call, and then does this.
    fn fakes(&self, program: &str, body: &str) {
        let calls = self.dir.path().join("calls");
        let text = format!("#!/bin/sh\necho \"{program} $*\" >>'{}'\n{body}\n", calls.display());
        self.write(&self.dir.path().join("bin").join(program), &text);
    }

    /// What xenstore has in the device's folder.
    fn stores(&self, name: &str, value: &str) {
        std::fs::write(self.dir.path().join("store").join(name), value).unwrap();
    }

    /// Whether it succeeded, and the calls it made.
    async fn runs(&self, arguments: &[&str], environment: &[(&str, &str)]) -> (bool, String) {
        let mut command = tokio::process::Command::new(&self.script);
        command.args(arguments).env("XEN_COLO_RUN", self.dir.path()).env("XENBUS_PATH", "/store/7/0");
        command.envs(environment.iter().copied()).kill_on_drop(true).stdin(Stdio::null());
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it hangs").unwrap();
        let calls = std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        let _ = std::fs::remove_file(self.dir.path().join("calls"));
        (output.status.success(), calls)
    }
}

#[tokio::test]
async fn the_colo_proxy_is_set_up_as_xl_asks_and_leaves_nothing() {
    let run = DryRun::of("colo-proxy-setup");
    let index = (u16::try_from(std::process::id() % 90).unwrap()).to_string();
    let xl =
        |mode| [("vifname", "vif7.0"), ("forwarddev", "eth1"), ("mode", mode), ("index", &index), ("bridge", "xenbr0")];
    let (done, calls) = run.runs(&["setup"], &xl("primary")).await;
    assert!(done, "{calls}");
    assert!(calls.contains(
        "tc filter add dev vif7.0 parent 1: protocol all prio 10 matchall action mirred egress mirror dev eth1"
    ));
    let at = run.dir.path().join("proxy").join(&index);
    let pid = std::fs::read_to_string(at.join("pid")).unwrap().trim().to_owned();
    let alive = || Path::new("/proc").join(&pid).join("cmdline").exists();
    assert!(alive() && at.join("primary-in").exists() && at.join("secondary-in").exists(), "the comparator listens");
    // Twice, as xl may after a failure, is as good as once.
    let (done, _) = run.runs(&["setup"], &xl("primary")).await;
    assert!(done && !alive(), "the first comparator has ended");
    let pid = std::fs::read_to_string(at.join("pid")).unwrap().trim().to_owned();
    let (done, calls) = run.runs(&["teardown"], &xl("primary")).await;
    assert!(done && calls.contains("tc qdisc del dev vif7.0 root handle 1:"), "{calls}");
    assert!(!at.exists() && !Path::new("/proc").join(pid).join("cmdline").exists());

    let (done, calls) = run.runs(&["setup"], &xl("secondary")).await;
    let wanted =
        ["ip link set vif7.0 nomaster", "ip link set vif7.0 master colobr0", "ip link set eth1 master colobr0 up"];
    assert!(done && wanted.iter().all(|call| calls.contains(call)), "{calls}");
    let (done, calls) = run.runs(&["teardown"], &xl("secondary")).await;
    assert!(done && calls.starts_with("ip link set vif7.0 master xenbr0\n"), "the guest is heard first: {calls}");

    for (name, value, why) in [
        ("forwarddev", "", "forwarddev is not in the environment"),
        ("index", "101", "index is 0 to 100"),
        ("mode", "both", "mode is primary or secondary"),
        ("vifname", "vif/../7", "is no device's name"),
    ] {
        let mut environment = xl("primary").to_vec();
        environment.retain(|(each, _)| *each != name);
        environment.push((name, value));
        let (done, calls) = run.runs(&["setup"], &environment).await;
        let wanted = "xenstore-write /store/7/0/hotplug-error colo-proxy-setup: ";
        assert!(!done && calls.contains(wanted) && calls.contains(why), "{name}={value:?}: {calls}");
    }
    run.fakes("tc", "exit 2");
    let (done, calls) = run.runs(&["setup"], &xl("primary")).await;
    assert!(!done && calls.contains("hotplug-error colo-proxy-setup: line "), "{calls}");
    assert!(!run.runs(&["dance"], &xl("primary")).await.0);
}

/// What the other two cannot do, they say where libxl looks; the rest of them is tried on real Xen hosts.
#[tokio::test]
async fn a_disk_or_a_nic_that_cannot_be_attached_says_why_in_xenstore() {
    let run = DryRun::of("block-colo");
    for (params, why) in [("web", "target must be GUEST/DISK"), ("web/disk0", "xl-colo does not serve ")] {
        run.stores("params", params);
        let (done, calls) = run.runs(&["add"], &[]).await;
        assert!(!done && calls.contains("/hotplug-status error") && calls.contains(why), "{calls}");
    }
    let _socket = std::os::unix::net::UnixListener::bind(run.dir.path().join("web.disk0.sock")).unwrap();
    run.fakes("xl-colo", "echo 'xl-colo: nothing answers' >&2\nexit 1");
    let (done, calls) = run.runs(&["add"], &[]).await;
    assert!(!done && calls.contains("hotplug-error block-colo: nothing answers "), "{calls}");
    run.fakes("xl-colo", "echo 'a warning' >&2\necho /dev/nbd63");
    run.fakes("stat", "echo 2b:3f");
    let (done, calls) = run.runs(&["add"], &[("NBD_DEAD_SECONDS", "9")]).await;
    let socket = run.dir.path().join("web.disk0.sock").display().to_string();
    let connects = format!("xl-colo nbd-device connect web/disk0 --socket {socket} --export disk0 --dead-seconds 9\n");
    assert!(done && calls.contains(&connects) && calls.contains("/node /dev/nbd63 /store/7/0/physical-device 2b:3f "));
    run.stores("physical-device", "2b:3f");
    let (done, calls) = run.runs(&["add"], &[]).await;
    assert!(done && !calls.contains("xl-colo"), "attached already: {calls}");
    run.stores("node", "/dev/nbd63");
    let (done, calls) = run.runs(&["remove"], &[]).await;
    assert!(done && calls.contains("xl-colo nbd-device disconnect /dev/nbd63"), "{calls}");

    run.fakes("xenstore-rm", "exit 1");
    let (done, calls) = run.runs(&["remove"], &[]).await;
    assert!(!done && calls.contains("hotplug-error block-colo: line "), "whatever fails is said: {calls}");

    let run = DryRun::of("vif-colo");
    run.stores("bridge", "nowhere");
    let (done, calls) = run.runs(&["online"], &[("vif", "vif7.0")]).await;
    assert!(!done && calls.contains("there is no bridge nowhere"), "{calls}");
}
