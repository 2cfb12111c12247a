//! `xl-colo qemu`: one command makes two stock QEMUs a COLO pair, and one ends it.
//!
//! ```text
//!   test ─ xl-colo qemu protect, failover, … ─▶ monitors ─▶ QEMU A: quorum ─ local + replication ─ NBD ─▶ QEMU B: replication ─ image
//!    └─ writes and reads as the guests would, over each QEMU's own NBD server, ordered on a second monitor
//! ```
//!
//! Neither has a machine, so `migrate` carries no memory; everything else of COLO is QEMU's own: the checkpoints, the roll-back
//! and the takeover.

use crate::common::qemu::{Drive, Qemu, difference};
use crate::common::{Listening, XL_COLO, installed, one_line, run, until, xl_colo};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

const SIZE: usize = 8 << 20;
/// What both images hold before.
const BEFORE: u8 = 0x11;

struct Two {
    dir: TempDir,
    a: Qemu,
    b: Qemu,
    /// Drives, monitors and ports as the command line has them.
    words: Vec<String>,
}

impl Two {
    /// Two QEMUs of which nothing is replicated yet.
    async fn start(frame: &[&str]) -> Option<Self> {
        installed("qemu-img")?;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        for image in ["a.img", "b.img"] {
            std::fs::write(at(image), vec![BEFORE; SIZE]).unwrap();
        }
        for overlay in ["active", "hidden"] {
            let made = run("qemu-img", &["create", "-q", "-f", "qcow2", &at(overlay), &SIZE.to_string()]).await;
            assert!(made.status.success(), "{made:?}");
        }
        let quorum = "driver=quorum,vote-threshold=1,read-pattern=fifo";
        let a = format!(
            "if=none,id=disk,{quorum},children.0.driver=raw,children.0.file.driver=file,children.0.file.filename={}",
            at("a.img")
        );
        let b = [
            format!("if=none,id=parent0,driver=raw,file.driver=file,file.filename={}", at("b.img")),
            format!(
                "if=none,id=child0,driver=replication,mode=secondary,top-id=top,file.driver=qcow2,\
                 file.file.filename={},file.backing.driver=qcow2,file.backing.file.filename={},\
                 file.backing.backing=parent0",
                at("active"),
                at("hidden")
            ),
            format!("if=none,id=top,{quorum},children.0=child0"),
        ];
        let monitor = |name: &str| format!("unix:{},server=on,wait=off", at(name));
        let net = ["-netdev", "hubport,id=hn0,hubid=0"];
        let (for_a, for_b) = (monitor("a.own"), monitor("b.own"));
        let a = Qemu::start(&dir.path().join("a"), &[a], &[&net[..], &["-qmp", &for_a]].concat()).await?;
        let incoming = format!("unix:{}", at("migrate"));
        let waits = if frame.contains(&"--migrate") { vec!["-incoming", &incoming] } else { vec![] };
        let b = Qemu::start(&dir.path().join("b"), &b, &[&net[..], &waits, &["-qmp", &for_b]].concat()).await?;
        let words = ["--primary", &at("a.own"), "--secondary", &at("b.own"), "--disk", "disk=parent0"];
        let mut words: Vec<_> = words.into_iter().map(str::to_owned).collect();
        words.extend(["--net".into(), format!("hn0=unix:{},unix:{}", at("mirror"), at("compare"))]);
        words.extend(["--loop-dir".into(), dir.path().display().to_string()]);
        Some(Self { dir, a, b, words })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command line of an order; `lost` has no monitor any more.
    async fn says(&self, verb: &str, lost: Option<&str>, more: &[&str]) -> std::process::Output {
        let mut words = vec!["--json", "qemu", verb];
        for pair in self.words.chunks(2) {
            let is_monitor = ["--primary", "--secondary"].contains(&pair[0].as_str());
            let fits = is_monitor || !["status", "checkpoint"].contains(&verb);
            if fits && lost.is_none_or(|lost| pair[0] != format!("--{lost}")) {
                words.extend(pair.iter().map(String::as_str));
            }
        }
        words.extend(more);
        xl_colo(&words).await
    }

    async fn does(&self, verb: &str, lost: Option<&str>, more: &[&str]) -> Value {
        let output = self.says(verb, lost, more).await;
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    async fn protects(&self, frame: &[&str]) -> Value {
        let nbd = format!("unix:{}", self.at("nbd").display());
        let migrate = format!("unix:{}", self.at("migrate").display());
        let mut more = vec!["--nbd", &nbd];
        more.extend(frame.iter().map(|word| if *word == "MIGRATE" { migrate.as_str() } else { word }));
        self.does("protect", None, &more).await
    }

    /// What of a QEMU is not as it was when it began.
    async fn additions(qemu: &mut Qemu) -> Vec<String> {
        let objects = qemu.order("qom-list", json!({"path": "/objects"})).await;
        let chardevs = qemu.order("query-chardev", json!({})).await;
        let exports = qemu.order("query-block-exports", json!({})).await;
        let nodes = qemu.order("query-named-block-nodes", json!({"flat": true})).await;
        let names = |all: &Value, key: &str| -> Vec<String> {
            all.as_array().unwrap().iter().map(|one| one[key].as_str().unwrap_or_default().to_owned()).collect()
        };
        let mut found = [names(&objects, "name"), names(&chardevs, "label"), names(&exports, "id")].concat();
        found.extend(names(&nodes, "node-name").into_iter().filter(|name| name.contains("disk")));
        found.retain(|name| !name.starts_with("compat_monitor") && name != "type");
        found
    }
}

/// QEMU's own COLO, checkpoints and all; then one of the two is killed.
async fn of_a_pair_one_is_killed(lost: &str) {
    const FRAME: [&str; 4] = ["--migrate", "MIGRATE", "--checkpoint-delay-ms", "200"];
    let Some(mut two) = Two::start(&FRAME).await else { return };
    let status = two.protects(&FRAME).await;
    assert_eq!((&status["primary"]["colo"], &status["secondary"]["colo"]), (&json!("primary"), &json!("secondary")));
    let own = one_line_of_json(&two.says("checkpoint", None, &[]).await);
    assert!(own.contains("takes the checkpoints of this pair itself"), "{own}");
    // As a guest writes, and as the other one sees it: after a checkpoint, and not before.
    let served = two.at("served");
    two.a.serve(&served, &["disk"]).await;
    let mut guest = Drive::open(&served, "disk").await;
    guest.write(0x22, 4096, 3 << 20).await;
    two.b.order("nbd-server-add", json!({"device": "top", "writable": true})).await;
    let mut copy = Drive::open(&two.at("nbd"), "top").await;
    let mut expected = vec![BEFORE; SIZE];
    expected[4096..][..3 << 20].fill(0x22);
    until("a checkpoint of QEMU's", async || difference(&copy.whole(SIZE).await, &expected).map_or(Ok(()), Err)).await;
    drop(copy);
    let (victim, survivor, image) =
        if lost == "primary" { (&mut two.a, "secondary", "b.img") } else { (&mut two.b, "primary", "a.img") };
    victim.process.0.kill().unwrap();
    victim.process.0.wait().unwrap();
    let status = two.does("failover", Some(lost), &["--lost", lost, "--wait"]).await;
    assert_eq!(
        (&status[survivor]["guest"], &status[survivor]["colo"]),
        (&json!("running"), &json!("none")),
        "{status}"
    );
    assert_eq!(status[survivor]["last_colo"], survivor, "{status}");
    assert_eq!(difference(&std::fs::read(two.at(image)).unwrap(), &expected), None);
    let left = Two::additions(if lost == "primary" { &mut two.b } else { &mut two.a }).await;
    match lost {
        // Connections that were made while there were two need it.
        "primary" => assert_eq!(left, ["rew-hn0"]),
        _ => assert_eq!(left, ["disk"], "the guest's own export"),
    }
    // It writes on.
    if lost == "secondary" {
        guest.write(0x33, 0, 512).await;
        assert_eq!(std::fs::read(two.at(image)).unwrap()[..512], [0x33; 512]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_secondary_goes_on_where_a_stock_primary_was_killed() {
    of_a_pair_one_is_killed("primary").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_primary_goes_on_alone() {
    of_a_pair_one_is_killed("secondary").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_that_qemu_carries_is_ended() {
    const FRAME: [&str; 2] = ["--migrate", "MIGRATE"];
    let Some(mut two) = Two::start(&FRAME).await else { return };
    two.protects(&FRAME).await;
    let status = two.does("unprotect", None, &[]).await;
    assert_eq!((&status["primary"]["guest"], &status["primary"]["colo"]), (&json!("running"), &json!("none")));
    assert_eq!(Two::additions(&mut two.a).await, [""; 0]);
    until("the secondary has no guest to run", async || two.b.process.0.try_wait().unwrap().ok_or("it runs")).await;
}

/// The order that libxl gives, by hand: checkpoints are ours to take.
#[tokio::test(flavor = "multi_thread")]
async fn a_pair_whose_guest_somebody_else_carries() {
    let Some(mut two) = Two::start(&[]).await else { return };
    two.protects(&[]).await;
    let (served, nbd) = (two.at("served"), two.at("nbd"));
    two.a.serve(&served, &["disk"]).await;
    two.b.order("nbd-server-add", json!({"device": "top", "writable": true})).await;
    let (mut guest, mut copy) = (Drive::open(&served, "disk").await, Drive::open(&nbd, "top").await);
    let mut expected = vec![BEFORE; SIZE];
    for round in 0x21..0x24_u8 {
        guest.write(round, usize::from(round) << 16, 100_352).await;
        copy.write(0xbb, 7 << 20, 512).await;
        let before = copy.whole(SIZE).await;
        assert!(before[..7 << 20] == expected[..7 << 20] && before[7 << 20] == 0xbb, "before checkpoint {round:#x}");
        two.does("checkpoint", None, &[]).await;
        expected[usize::from(round) << 16..][..100_352].fill(round);
        assert_eq!(difference(&copy.whole(SIZE).await, &expected), None, "after checkpoint {round:#x}");
    }
    drop((guest, copy));
    two.does("unprotect", None, &[]).await;
    assert_eq!(Two::additions(&mut two.a).await, ["disk"]);
    assert_eq!(Two::additions(&mut two.b).await, ["rew-hn0"]);
    assert_eq!(difference(&std::fs::read(two.at("a.img")).unwrap(), &expected), None);
}

/// A stock primary, and a replica of ours: neither knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_stock_primary_and_a_replica_of_ours() {
    let Some(mut two) = Two::start(&[]).await else { return };
    let (socket, image) = (two.at("ours"), two.at("b.img"));
    let drives = [
        format!("if=none,id=parent0,format=raw,file={}", image.display()),
        "if=none,id=top,driver=replication,mode=secondary,top-id=top,file.driver=qcow2,file.file.filename=a,\
         file.backing.driver=qcow2,file.backing.file.filename=h,file.backing.backing=parent0"
            .into(),
    ];
    two.b.process.0.kill().unwrap();
    two.b.process.0.wait().unwrap();
    let mut command = Command::new(XL_COLO);
    command.arg("qmp").arg("--socket").arg(&socket).args(["--drive", &drives[0], "--drive", &drives[1]]);
    let _ours = Listening::start(&mut command, &socket);
    two.words[3] = socket.display().to_string();
    let with_net = one_line_of_json(&two.says("protect", None, &["--nbd", "unix:/nowhere"]).await);
    assert!(with_net.contains("secondary: "), "{with_net}");
    two.words.truncate(6);
    two.protects(&[]).await;
    let served = two.at("served");
    two.a.serve(&served, &["disk"]).await;
    let mut guest = Drive::open(&served, "disk").await;
    guest.write(0x21, 65536, 100_352).await;
    two.does("checkpoint", None, &[]).await;
    let mut expected = vec![BEFORE; SIZE];
    expected[65536..][..100_352].fill(0x21);
    // Written, never checkpointed.
    guest.write(0x22, 0, 4096).await;
    two.a.process.0.kill().unwrap();
    two.a.process.0.wait().unwrap();
    let status = two.does("failover", Some("primary"), &["--lost", "primary", "--wait"]).await;
    assert!(status["secondary"]["disks"]["desc"].as_str().unwrap().contains("taken over"), "{status}");
    assert_eq!(difference(&std::fs::read(image).unwrap(), &expected), None);
}

/// The last step cannot be done: nothing of the others is left.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_made_whole_is_taken_apart() {
    let Some(mut two) = Two::start(&[]).await else { return };
    let nbd = format!("unix:{}", two.at("nbd").display());
    let nowhere = format!("unix:{}", two.at("nowhere").display());
    for (more, why) in [
        (vec!["--nbd", &nbd, "--migrate", &nowhere], "the guest does not reach COLO: the migration failed"),
        (
            vec!["--nbd", "unix:/nowhere/at/all"],
            "secondary: nbd-server-start: Failed to bind socket to /nowhere/at/all",
        ),
    ] {
        let said = one_line_of_json(&two.says("protect", None, &more).await);
        assert!(said.contains(why) && !said.contains("could not be taken back"), "{said}");
        for qemu in [&mut two.a, &mut two.b] {
            assert_eq!(Two::additions(qemu).await, [""; 0], "{said}");
        }
    }
    // It may be tried again.
    two.protects(&[]).await;
    let twice = one_line_of_json(&two.says("protect", None, &["--nbd", &nbd]).await);
    assert!(twice.contains("NBD server already running"), "{twice}");
    assert!(!Two::additions(&mut two.a).await.is_empty(), "what another had made is not taken apart: {twice}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused_before_anybody_is_told() {
    for (words, why) in [
        (&["protect", "--primary", "/a", "--nbd", "unix:/x"][..], "--disk"),
        (&["protect", "--primary", "/a", "--disk", "a", "--nbd", "unix:/x"], "QUORUM=IMAGE"),
        (&["protect", "--primary", "/a", "--disk", "a=b", "--nbd", "exec:x"], "QEMU listens on a socket"),
        (&["failover", "--secondary", "/a", "--disk", "a=b", "--lost", "both"], "primary, secondary"),
        (&["status"], "--secondary"),
    ] {
        let output = xl_colo(&[&["qemu"], words].concat()).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(why), "{words:?}: {said}");
    }
    let nobody = ["qemu", "failover", "--secondary", "/nowhere/qmp", "--disk", "a=b", "--lost", "primary"];
    let said = one_line(&xl_colo(&nobody).await, 1);
    assert!(said.contains("secondary: cannot connect to the monitor unix:/nowhere/qmp"), "{said}");
    let said = one_line(&xl_colo(&[&nobody[..4], &["--disk", "a=b", "--lost", "secondary"]].concat()).await, 1);
    assert!(said.contains("secondary: cannot connect"), "{said}");
}

fn one_line_of_json(output: &std::process::Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let error: Value = serde_json::from_str(&said).unwrap();
    error["error"]["text"].as_str().unwrap().to_owned()
}
