//! Whether this host is able: what `xl-colo check` looks at, and what it says of it.
//!
//! ```text
//!   gather() ─▶ Facts ─▶ judge() ─▶ Line × n     ok | not, what was seen, what to do
//! ```
//!
//! [`judge`] is pure and knows no Xen: a fact that could not be had is a fact too, and never a panic.

mod gather;

pub use gather::gather;

use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// How far apart two hosts' clocks may be.
const CLOCKS_APART_MAX_MS: u64 = 1000;

/// The two halves of Xen, as far as they answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Control {
    /// The hypervisor takes orders from this host.
    Open {
        /// Release of tools and hypervisor, such as `4.17`.
        release: String,
        /// What its processor and build can do.
        abilities: Result<Abilities, String>,
    },
    /// Tools and hypervisor are of two releases.
    Releases(String),
    /// It does not, and why.
    Closed(String),
}

/// Which guests a hypervisor can run, and how it can log their writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Abilities {
    /// HVM and PVH guests.
    pub hvm: bool,
    /// Hardware-assisted paging.
    pub hap: bool,
    /// Shadow paging.
    pub shadow: bool,
}

/// What a program built with Xen can ask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct XenFacts {
    /// The hypervisor.
    pub control: Control,
    /// Whether xenstored answers.
    pub store: Result<(), String>,
}

/// A piece of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece {
    /// It is there.
    Loaded,
    /// A module of it is.
    Loadable,
    /// Neither.
    Missing,
}

/// A program or a script.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    /// It can be run.
    Ready,
    /// It is there and cannot be run.
    NotExecutable,
    /// It is not there.
    Missing,
}

/// What a peer says to who asks no more than whether it is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Greeting {
    /// Its name.
    pub name: String,
    /// Its protocol's version.
    pub protocol: u32,
    /// Whether it can take a guest now.
    pub vacant: bool,
    /// The release of its xl-colo, if it says so.
    pub version: Option<String>,
    /// How far its clock is ahead of this one, in µs, if it says what it is; and by how much that may be wrong.
    pub clock_ahead_us: Option<(i64, i64)>,
}

/// Something in the way of protecting a guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Obstacle {
    /// What it is.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.reason, self.remedy)
    }
}

/// Everything that was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// What Xen says; nothing in a program that was built without it.
    pub xen: Option<XenFacts>,
    /// This process is root's.
    pub root: bool,
    /// The hypervisor below, as the kernel names it.
    pub hypervisor: Option<String>,
    /// Nodes of `/dev/xen` that are not there.
    pub missing_nodes: Vec<&'static str>,
    /// Where libxl's device model would be, and whether it is.
    pub device_model: (PathBuf, Program),
    /// Pieces of the kernel.
    pub pieces: Vec<(&'static str, Piece)>,
    /// Hotplug scripts.
    pub scripts: Vec<(PathBuf, Program)>,
    /// A peer's address, and what it answered.
    pub peer: Option<(String, Result<Greeting, String>)>,
    /// A guest's name, and what is in its way.
    pub guest: Option<(String, Result<Vec<Obstacle>, String>)>,
}

/// One thing that a host must have.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Line {
    /// What.
    pub item: String,
    /// Whether it is as it must be.
    pub ok: bool,
    /// What was seen.
    pub saw: String,
    /// What to do, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Line {
    fn ok(item: impl Into<String>, saw: impl Into<String>) -> Self {
        Self { item: item.into(), ok: true, saw: saw.into(), remedy: None }
    }

    fn not(item: impl Into<String>, saw: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { item: item.into(), ok: false, saw: saw.into(), remedy: Some(remedy.into()) }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.ok { "ok" } else { "not" };
        write!(f, "{verdict:<3}  {:<17}  {}", self.item, self.saw)?;
        self.remedy.iter().try_for_each(|remedy| write!(f, "; do: {remedy}"))
    }
}

/// Says of each thing whether it is as it must be.
#[must_use]
pub fn judge(facts: &Facts) -> Vec<Line> {
    let mut lines = xen(facts);
    lines.push(if facts.missing_nodes.is_empty() {
        Line::ok("device nodes", "/dev/xen has those that are needed")
    } else {
        let missing = facts.missing_nodes.join(", ");
        Line::not("device nodes", format!("{missing} missing"), "modprobe -a xen-privcmd xen-evtchn xen-gntdev")
    });
    let (path, model) = &facts.device_model;
    lines.push(program("device model", &path.display().to_string(), *model, "apt-get install qemu-system-xen"));
    for (name, piece) in &facts.pieces {
        let item = format!("kernel: {name}");
        lines.push(match piece {
            Piece::Loaded => Line::ok(item, "there"),
            Piece::Loadable => Line::ok(item, format!("can be loaded: modprobe {name}")),
            Piece::Missing => Line::not(item, "not in this kernel, and no module", format!("a kernel that has {name}")),
        });
    }
    for (path, script) in &facts.scripts {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let remedy = format!("install scripts/hotplug/{name} /etc/xen/scripts/");
        lines.push(program(&name, &path.display().to_string(), *script, &remedy));
    }
    lines.extend(facts.peer.iter().flat_map(|(address, answer)| peer(address, answer)));
    lines.extend(facts.guest.iter().flat_map(|(name, found)| guest(name, found)));
    lines
}

fn xen(facts: &Facts) -> Vec<Line> {
    let [control, release, log, store] = ["control domain", "releases", "log-dirty", "xenstore"];
    let boot = "boot this host with Xen (apt-get install xen-system-amd64), and run this in its dom0 as root";
    let Some(xen) = &facts.xen else {
        let saw = "this xl-colo was built without Xen";
        let not = |item| Line::not(item, "not asked: built without Xen", "build with Xen first");
        let build = Line::not("build", saw, "cargo build --release --features xen");
        return vec![build, not(control), not(release), not(log), not(store)];
    };
    let unasked = |item| Line::not(item, "not asked: the hypervisor takes no orders from here", "see control domain");
    let mut lines = vec![Line::ok("build", "with Xen")];
    match &xen.control {
        Control::Open { release: number, abilities } => {
            lines.push(Line::ok(control, "the hypervisor takes orders from here"));
            lines.push(Line::ok(release, format!("tools and hypervisor are {number}")));
            lines.push(match abilities {
                Err(why) => Line::not(log, why, "see xl dmesg"),
                Ok(Abilities { hvm: false, .. }) => Line::not(
                    log,
                    "this processor runs neither PVH nor HVM guests",
                    "switch virtualization on in the firmware, or use another host",
                ),
                Ok(Abilities { hap: false, shadow: false, .. }) => Line::not(
                    log,
                    "neither hardware-assisted nor shadow paging: a guest's writes cannot be logged",
                    "use a processor with EPT or NPT, or a hypervisor with shadow paging",
                ),
                Ok(Abilities { shadow: true, .. }) => Line::ok(log, "for PVH, HVM and PV guests (shadow paging)"),
                Ok(_) => Line::ok(log, "for PVH and HVM guests (hardware-assisted paging)"),
            });
        }
        Control::Releases(why) => {
            lines.push(Line::ok(control, "the hypervisor is below"));
            lines.push(Line::not(release, why, "boot the hypervisor that the tools were built for"));
            lines.push(unasked(log));
        }
        Control::Closed(why) => {
            let remedy = match &facts.hypervisor {
                Some(name) if name == "xen" && !facts.root => "run this as root",
                _ => boot,
            };
            lines.extend([Line::not(control, why, remedy), unasked(release), unasked(log)]);
        }
    }
    lines.push(match &xen.store {
        Ok(()) => Line::ok(store, "xenstored answers"),
        Err(why) => Line::not(store, why, "systemctl start xenstored (or /etc/init.d/xen start)"),
    });
    lines
}

fn program(item: &str, path: &str, found: Program, remedy: &str) -> Line {
    match found {
        Program::Ready => Line::ok(item, path),
        Program::NotExecutable => Line::not(item, format!("{path} cannot be run"), format!("chmod 755 {path}")),
        Program::Missing => Line::not(item, format!("{path} is not there"), remedy),
    }
}

fn peer(address: &str, answer: &Result<Greeting, String>) -> Vec<Line> {
    let greeting = match answer {
        Ok(greeting) => greeting,
        Err(why) => {
            return vec![Line::not("peer", format!("{address}: {why}"), "start it there: xl-colo host --listen …")];
        }
    };
    let Greeting { name, protocol, vacant, version, clock_ahead_us } = greeting;
    let guest = if *vacant { "has no guest" } else { "has a guest" };
    let mut lines = vec![Line::ok("peer", format!("host {name} at {address} speaks protocol {protocol} and {guest}"))];
    let ours = env!("CARGO_PKG_VERSION");
    lines.push(match version.as_deref() {
        Some(theirs) if theirs == ours => Line::ok("versions", format!("host {name} runs xl-colo {ours}, as this one")),
        theirs => {
            let saw = format!("this is xl-colo {ours}, host {name} runs {}", theirs.unwrap_or("an older one"));
            Line::not("versions", saw, "install the same xl-colo on both hosts")
        }
    });
    if let Some((ahead_us, error_us)) = clock_ahead_us {
        let [ahead_ms, error_ms] = [ahead_us.unsigned_abs() / 1000, error_us.unsigned_abs().div_ceil(1000)];
        let side = if *ahead_us < 0 { "behind" } else { "ahead" };
        let saw = format!("host {name}'s is {ahead_ms} ms {side} (give or take {error_ms} ms)");
        // Who goes on is decided without them; but two logs with two clocks tell no story.
        lines.push(if ahead_ms > CLOCKS_APART_MAX_MS + error_ms {
            Line::not("clocks", saw, "keep both hosts' clocks by NTP (apt-get install chrony)")
        } else {
            Line::ok("clocks", saw)
        });
    }
    lines
}

fn guest(name: &str, found: &Result<Vec<Obstacle>, String>) -> Vec<Line> {
    let item = format!("guest {name}");
    match found {
        Ok(obstacles) if obstacles.is_empty() => vec![Line::ok(item, "nothing is in the way of protecting it")],
        Ok(obstacles) => {
            obstacles.iter().map(|o| Line::not(item.clone(), o.reason.clone(), o.remedy.clone())).collect()
        }
        Err(why) => vec![Line::not(item, why, "see xl list, and give the guest's name as it is there")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting() -> Greeting {
        let version = Some(env!("CARGO_PKG_VERSION").into());
        Greeting { name: "b".into(), protocol: 2, vacant: true, version, clock_ahead_us: Some((-900_000, 20_000)) }
    }

    fn able() -> Facts {
        let abilities = Ok(Abilities { hvm: true, hap: true, shadow: false });
        Facts {
            xen: Some(XenFacts { control: Control::Open { release: "4.17".into(), abilities }, store: Ok(()) }),
            root: true,
            hypervisor: Some("xen".into()),
            missing_nodes: vec![],
            device_model: ("/usr/libexec/xen-qemu-system-i386".into(), Program::Ready),
            pieces: vec![("nbd", Piece::Loaded), ("tun", Piece::Loadable)],
            scripts: vec![("/etc/xen/scripts/vif-colo".into(), Program::Ready)],
            peer: Some(("192.0.2.2:9740".into(), Ok(greeting()))),
            guest: Some(("web".into(), Ok(vec![]))),
        }
    }

    fn not(change: impl Fn(&mut Facts)) -> Vec<Line> {
        let mut facts = able();
        change(&mut facts);
        judge(&facts).into_iter().filter(|line| !line.ok).collect()
    }

    #[test]
    fn an_able_host_is_ok_in_every_line() {
        let lines = judge(&able());
        assert!(lines.iter().all(|line| line.ok && line.remedy.is_none()), "{lines:#?}");
        let log = lines.iter().find(|line| line.item == "log-dirty").unwrap().to_string();
        assert_eq!(log, "ok   log-dirty          for PVH and HVM guests (hardware-assisted paging)");
    }

    #[test]
    fn each_lack_is_one_line_with_a_remedy() {
        type Change = fn(&mut Facts);
        let abilities = |facts: &mut Facts, hvm, hap| {
            let abilities = Ok(Abilities { hvm, hap, shadow: false });
            facts.xen.as_mut().unwrap().control = Control::Open { release: "4.17".into(), abilities };
        };
        let hvm: Change = |facts| facts.device_model.1 = Program::Missing;
        let lacks: [(Change, &str); 8] = [
            (hvm, "xen-qemu-system-i386 is not there"),
            (|facts| facts.missing_nodes = vec!["evtchn"], "evtchn missing"),
            (|facts| facts.pieces[0].1 = Piece::Missing, "no module"),
            (|facts| facts.scripts[0].1 = Program::NotExecutable, "cannot be run"),
            (|facts| facts.peer = Some(("h:1".into(), Err("refused".into()))), "h:1: refused"),
            (|facts| facts.guest = Some(("web".into(), Err("no such domain".into()))), "no such domain"),
            (|facts| facts.xen.as_mut().unwrap().store = Err("nobody listens".into()), "nobody listens"),
            (
                |facts| {
                    let two = |reason: &str| Obstacle { reason: reason.into(), remedy: "mend it".into() };
                    facts.guest = Some(("web".into(), Ok(vec![two("vnuma")])));
                },
                "vnuma",
            ),
        ];
        for (change, word) in lacks {
            let lines = not(change);
            assert_eq!(lines.len(), 1, "{lines:#?}");
            assert!(lines[0].saw.contains(word) && lines[0].remedy.is_some(), "{word}: {lines:#?}");
            assert!(lines[0].to_string().contains("; do: "), "{}", lines[0]);
        }
        assert!(not(|facts| abilities(facts, false, false))[0].saw.contains("neither PVH nor HVM"));
        assert!(not(|facts| abilities(facts, true, false))[0].saw.contains("cannot be logged"));
    }

    #[test]
    fn a_peer_of_another_release_or_time_is_told() {
        let with = |change: fn(&mut Greeting)| {
            not(|facts| {
                let mut greeting = greeting();
                change(&mut greeting);
                facts.peer = Some(("h:1".into(), Ok(greeting)));
            })
        };
        let told = |lines: &[Line]| lines.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        let lines = with(|peer| peer.clock_ahead_us = Some((-7_214_000, 3_000)));
        let text = "not  clocks             host b's is 7214 ms behind (give or take 3 ms); do: keep both hosts' clocks by NTP \
                    (apt-get install chrony)";
        assert_eq!(told(&lines), text);
        assert!(told(&with(|peer| peer.clock_ahead_us = Some((1_100_000, 0)))).contains(" 1100 ms ahead "));
        assert_eq!(with(|peer| peer.clock_ahead_us = Some((1_100_000, 200_000))), [], "who knows?");
        assert_eq!(with(|peer| peer.clock_ahead_us = None), [], "nobody asked");
        let lines = with(|peer| peer.version = Some("0.0.1".into()));
        assert!(told(&lines).contains("host b runs 0.0.1; do: install the same xl-colo on both hosts"), "{lines:?}");
        assert!(told(&with(|peer| peer.version = None)).contains("runs an older one"));
    }

    #[test]
    fn what_cannot_be_asked_is_not_ok() {
        let items = |lines: &[Line]| lines.iter().map(|line| line.item.clone()).collect::<Vec<_>>().join(", ");
        let lines = not(|facts| facts.xen = None);
        assert_eq!(items(&lines), "build, control domain, releases, log-dirty, xenstore");
        let control = |control: Control| not(|facts| facts.xen.as_mut().unwrap().control = control.clone());
        let lines = control(Control::Closed("not a Xen control domain".into()));
        assert_eq!(items(&lines), "control domain, releases, log-dirty");
        let lines = control(Control::Releases("tools 4.17, hypervisor 4.18".into()));
        assert_eq!(items(&lines), "releases, log-dirty");
        assert!(lines[0].saw.contains("hypervisor 4.18"), "{lines:#?}");
    }
}
