//! A pair run from configurations: what they say is done, what the command line says wins, what is wrong is said.

use crate::common::host::{Host, host_command, protect};
use crate::common::{XL_COLO, one_line, turn, xl_colo};
use std::path::{Path, PathBuf};
use std::process::Command;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::Protection;

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_runs_from_its_configurations() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().display().to_string();
    let mut standby = host_command("b", dir.path());
    standby.args(["--policy", "hold"]);
    let b = Host::start("b", dir.path(), standby);
    let config = format!(
        "[host]\nname = \"a\"\nlisten = \"127.0.0.1:0\"\nrun_dir = {run_dir:?}\ndisks = [{:?}]\npolicy = \"hold\"\n\
         event_log = {:?}\n[guest]\nboot = true\nmemory_mib = 4\ndisk_mib = 4\n\
         [protect]\npeer = {:?}\nmode = \"remus\"\ncheckpoint_delay_ms = 77\nheartbeat_misses = 20\n",
        dir.path().join("a.img"),
        dir.path().join("a.log"),
        b.address.to_string()
    );
    let config = write(dir.path(), "web.toml", &config);
    let mut command = Command::new(XL_COLO);
    command.args(["host", "--follow-stdin", "--config"]).arg(&config);
    let a = Host::start("a", dir.path(), command);
    assert_eq!(a.status().await.guest.as_deref(), Some("web"), "the guest is called as the file is");
    assert!(dir.path().join("a.log").exists());
    let words = ["protect", "web", "--wait", "--run-dir", &run_dir, "--config", config.to_str().unwrap()];
    let output = xl_colo(&words).await;
    assert!(output.status.success(), "{output:?}");
    let status = a.becomes(Protection::Protected).await;
    assert_eq!(status.mode.unwrap().to_string(), "remus");
    assert_eq!(status.peer_health.unwrap().lost_after_ms, 2000, "20 of 100 ms");
    assert_eq!((&status.health, &status.degraded[..]), (&xen_colo::daemon::status::Health::Protected, &[][..]));
    let text = status.to_string();
    for line in ["recovery    ", "peer        heard ", "queues      ", "disk lag    ", "pair        remus"] {
        assert!(text.contains(&format!("\n{line}")), "{line}: {text}");
    }
    let status = a.is("measured", |status| status.interval_us.p50.is_some() && status.wire.ratio.is_some()).await;
    let text = status.to_string();
    for line in ["last        checkpoint ", "interval    ", "dirty       ", "pause       "] {
        assert!(text.contains(&format!("\n{line}")), "{line}: {text}");
    }
    assert!(text.contains("(ratio ") && status.wire.memory_bytes >= 4 << 20, "{text}");
    a.order(Request::Unprotect).await;
    // The command line wins.
    let output = xl_colo(&[&words[..], &["--mode", "colo"]].concat()).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(a.becomes(Protection::Protected).await.mode.unwrap().to_string(), "colo");
}

#[tokio::test]
async fn what_is_wrong_with_a_configuration_is_said_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let check = async |path: &Path| xl_colo(&["config", "--check", path.to_str().unwrap()]).await;
    let whole = xl_colo(&["config"]).await;
    let path = write(dir.path(), "whole.toml", &String::from_utf8(whole.stdout).unwrap());
    let fine = check(&path).await;
    assert_eq!(String::from_utf8_lossy(&fine.stdout), format!("ok   {}\n", path.display()));
    let xl = write(dir.path(), "web.cfg", "name = 'web'\ndisk = [ '/d,raw,xvda,rw,colo-hots=b' ]\n");
    for (text, why) in [
        ("[host]\nlisen = 1\n".to_owned(), "bad.toml:2: lisen is no key of [host]; did you mean listen?"),
        ("[protect]\nmode = 3\n".to_owned(), "bad.toml:2: mode in [protect] is 3; it may be \"colo\" or \"remus\""),
        (format!("[guest]\nxen = {xl:?}\n"), "web.cfg:2: colo-hots is no key of xl's or ours; did you mean colo-host?"),
    ] {
        let path = write(dir.path(), "bad.toml", &text);
        let said = one_line(&check(&path).await, 1);
        assert!(said.contains(why), "{text}: {said}");
        let said =
            one_line(&xl_colo(&["host", "--name", "a", "--disk", "d", "--config", path.to_str().unwrap()]).await, 2);
        assert!(said.contains(why), "{text}: {said}");
    }
    let empty = write(dir.path(), "empty.toml", "");
    let said = one_line(&xl_colo(&["host", "--config", empty.to_str().unwrap()]).await, 2);
    assert!(said.contains("no disks in [host]; give --disk FILE"), "{said}");
}

const VIF: &str = "vif = ['bridge=br0,forwarddev=eth1,colo_sock_mirror_id=m0,colo_checkpoint_host=192.0.2.1']\n";

/// The domain's own keys become a configuration.
#[tokio::test]
async fn xls_keys_are_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let disk = "colo,colo-host=192.0.2.2,colo-port=9740,colo-export=e,active-disk=/srv/a,hidden-disk=/srv/h,target=/d";
    let xl = write(dir.path(), "web.cfg", &format!("disk = [\n 'format=raw,vdev=hda,{disk}',\n]\n{VIF}"));
    let output = xl_colo(&["config", "--xl", xl.to_str().unwrap()]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    // Those that change nothing are told, a line for each, and the whole is still a configuration.
    for note in [
        "# xl's colo-host, colo-port: followed: the peer, ",
        "# xl's active-disk, hidden-disk: followed: disk epochs spill to ",
        "# xl's colo: nothing to do: every disk ",
        "# xl's colo-export: followed: what both hosts call the disk, ",
        "# xl's forwarddev: nothing to do: ",
        "# xl's colo_checkpoint_host: nothing to do: the comparator ",
        "# xl's colo_sock_mirror_id: nothing to do: ",
    ] {
        assert_eq!(text.lines().filter(|line| line.starts_with(note)).count(), 1, "{note}: {text}");
    }
    let path = write(dir.path(), "made.toml", &text);
    assert!(xl_colo(&["config", "--check", path.to_str().unwrap()]).await.status.success());
    let output = xl_colo(&["--json", "config", "--xl", xl.to_str().unwrap()]).await;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&said["xl"][0]["keys"][0], &said["xl"][0]["followed"]), (&"colo-host".into(), &true.into()), "{said}");
    for line in [
        "\npeer = \"tcp:192.0.2.2:9740\"\n",
        "\nexports = [\"e\"]\n",
        "\nspill_dir = \"/srv\"\n",
        &format!("\nxen = {xl:?}\n"),
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

/// xl's colo-export, in the pair: an image that is another disk's would be overwritten.
#[tokio::test(flavor = "multi_thread")]
async fn disks_that_the_hosts_call_otherwise_are_refused_and_the_right_ones_are_told_by_their_names() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let disk = |export: &str| {
        format!(
            "'format=raw,vdev=hda,colo,colo-host=h,colo-port=9,colo-export={export},active-disk=/a,hidden-disk=/h,target=/d'"
        )
    };
    let start = |name: &str, exports: [&str; 2]| {
        let xl = write(
            dir.path(),
            &format!("{name}.cfg"),
            &format!("disk = [{}, {}]\n", disk(exports[0]), disk(exports[1])),
        );
        let image = |at: usize| dir.path().join(format!("{name}{at}.img"));
        let spill = dir.path();
        let config = format!(
            "[host]\nname = \"{name}\"\nlisten = \"127.0.0.1:0\"\nrun_dir = {spill:?}\ndisks = [{:?}, {:?}]\nspill_dir = {spill:?}\n\
             policy = \"hold\"\n[guest]\nxen = {xl:?}\n",
            image(0),
            image(1)
        );
        let config = write(dir.path(), &format!("{name}.toml"), &config);
        let mut command = Command::new(XL_COLO);
        command.args(["host", "--follow-stdin", "--config"]).arg(config);
        if name == "a" {
            // The names are taken from xl's configuration, and the guest is one that runs without Xen.
            command.args(["--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]);
        }
        Host::start(name, dir.path(), command)
    };
    let a = start("a", ["root", "data"]);
    let b = start("b", ["data", "root"]);
    let why = a.refusal(Request::Protect(protect(&b.address, Mode::Remus))).await;
    assert!(why.contains("the primary's disk0 is called \"root\" (colo-export), and here it is \"data\""), "{why}");
    assert!(!dir.path().join("b0.img").exists(), "nothing was made, or written");
    drop(b);
    let b = start("b", ["root", "data"]);
    a.order(Request::Protect(protect(&b.address, Mode::Remus))).await;
    a.becomes(Protection::Protected).await;
    for (host, status) in [("a", a.status().await), ("b", b.status().await)] {
        let names: Vec<_> = status.disks.iter().map(|disk| (disk.name.as_deref(), disk.export.as_deref())).collect();
        assert_eq!(names, [(Some("disk0"), Some("root")), (Some("disk1"), Some("data"))], "{host}");
        assert!(status.to_string().contains("\ndisk0       root "), "{status}");
    }
    // As many names as disks.
    let line = ["host", "--name", "c", "--disk", "d", "--export", "x", "--export", "y", "--policy", "hold"];
    let why = one_line(&xl_colo(&line).await, 2);
    assert!(why.contains("2 names of exports (colo-export) for 1 disk(s)"), "{why}");
    let line =
        ["host", "--name", "c", "--disk", "d", "--disk", "e", "--export", "x", "--export", "x", "--policy", "hold"];
    let why = one_line(&xl_colo(&line).await, 2);
    assert!(why.contains("two disks are called \"x\""), "{why}");
}
