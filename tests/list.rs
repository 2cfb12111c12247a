//! Who is here, by which names, and what a command says that finds nobody: in words, and in JSON.

use crate::common::host::{Host, host_command};
use crate::common::{XL_COLO, one_line, turn, xl_colo};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn host(name: &str, dir: &Path, guest: Option<&str>) -> Host {
    let mut command = host_command(name, dir);
    command.args(["--policy", "hold"]);
    guest.iter().for_each(|guest| _ = command.args(["--guest", guest, "--guest-mib", "4", "--disk-mib", "4"]));
    Host::start(name, dir, command)
}

/// The error of a command that was told to say it in JSON.
#[track_caller]
fn error(output: &Output, exit_code: i32) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(exit_code), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    let json: Value = serde_json::from_str(&stderr).unwrap_or_else(|error| panic!("{error}: {stderr}"));
    let error = json["error"].as_object().unwrap_or_else(|| panic!("{stderr}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["class", "do", "text"], "the shape is always the same");
    assert!(!error["text"].as_str().unwrap().is_empty() && json.as_object().unwrap().len() == 1, "{stderr}");
    json["error"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_of_a_machine_are_listed_dead_ones_too() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    let list = async |words: &[&str]| {
        let output = xl_colo(&[&["list", "--run-dir", run_dir.to_str().unwrap()], words].concat()).await;
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(list(&[]).await.starts_with("no host runs here"), "there is no such directory");
    let (a, _b) = (host("a", &run_dir, Some("web")), host("b", &run_dir, None));
    drop(UnixListener::bind(run_dir.join("dead.sock")).unwrap());
    // One that is there and says nothing hides nobody.
    let _silent = UnixListener::bind(run_dir.join("silent.sock")).unwrap();
    let text = list(&[]).await;
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["HOST", "GUEST", "ID", "ROLE", "STATE", "PEER"]);
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["a", "web", "-", "-", "unprotected", "-"]);
    assert_eq!(lines[2].split_whitespace().collect::<Vec<_>>(), ["b", "-", "-", "-", "empty", "-"]);
    assert_eq!(lines[3].split_whitespace().collect::<Vec<_>>(), ["dead", "-", "-", "-", "stale-socket", "-"]);
    assert_eq!(lines[4].split_whitespace().collect::<Vec<_>>(), ["silent", "-", "-", "-", "no-answer", "-"]);
    let json: Value = serde_json::from_str(&list(&["--json"]).await).unwrap();
    let first = &json["hosts"][0];
    assert_eq!(
        (&first["host"], &first["guest"], &first["health"]),
        (&"a".into(), &"web".into(), &"unprotected".into())
    );
    assert_eq!(first["pid"], a.pid());
    let [dead, silent] = [&json["hosts"][2], &json["hosts"][3]];
    assert_eq!((&dead["trouble"], &silent["trouble"]), (&"stale-socket".into(), &"no-answer".into()));
    assert!(dead["error"].as_str().unwrap().contains("refused"), "{json:#}");
    assert!(silent["error"].as_str().unwrap().contains("nothing within"), "{json:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_name_finds_its_host_and_a_wrong_one_the_nearest() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().to_str().unwrap();
    let (_a, _b) = (host("alpha", dir.path(), Some("web")), host("beta", dir.path(), Some("mail")));
    let status = async |words: &[&str]| xl_colo(&[&["status", "--run-dir", run_dir], words].concat()).await;
    for (words, host) in
        [(&["web"][..], "alpha"), (&["mail"], "beta"), (&["beta"], "beta"), (&["--host", "web"], "alpha")]
    {
        let text = String::from_utf8(status(words).await.stdout).unwrap();
        assert!(text.starts_with(&format!("host        {host} (")), "{words:?}: {text}");
    }
    let why = one_line(&status(&["wbe"]).await, 1);
    assert!(why.contains("did you mean web?") && why.contains("xl-colo list"), "{why}");
    let why = one_line(&status(&["17"]).await, 1);
    assert!(why.contains("no host and no guest \"17\"") && !why.contains("did you mean"), "{why}");
    assert_eq!(status(&["web", "--host", "beta"]).await.status.code(), Some(2), "one name, not two");
    assert_eq!(status(&["../web"]).await.status.code(), Some(2), "a name is no path");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_says_why_it_failed_in_the_same_json() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().to_str().unwrap();
    for words in [
        &["status"][..],
        &["events"],
        &["checkpoint"],
        &["failover"],
        &["failover", "--wait"],
        &["unprotect"],
        &["stop"],
        &["protect", "127.0.0.1:1"],
        &["protect", "127.0.0.1:1", "--wait"],
        &["receive"],
    ] {
        let output = xl_colo(&[words, &["--json", "--run-dir", run_dir]].concat()).await;
        let error = error(&output, 1);
        assert_eq!(error["class"], "no-host", "{words:?}: {error}");
        assert!(error["text"].as_str().unwrap().contains("no host runs here"), "{words:?}: {error}");
        assert_eq!(error["do"], "xl-colo list says who is here", "{words:?}");
    }
    for (words, exit_code, class, text) in [
        (&["remus", "web", "b", "--run-dir", run_dir][..], 1, "failed", "no host here runs a guest \"web\""),
        (&["nbd", "/nonexistent/disk.img"], 1, "failed", "/nonexistent/disk.img"),
        (&["qmp", "--connect", "/nonexistent/sock", "quit"], 1, "failed", "/nonexistent/sock"),
        (&["qmp", "--connect", "/nonexistent/sock", "quit", "no json"], 1, "failed", "no JSON"),
        (&["compare"], 2, "usage", "primary_in"),
        (&["dance"], 2, "usage", "unrecognized subcommand 'dance'"),
        (&["status", "--dance"], 2, "usage", "--dance"),
        (&["protect", "nobody"], 2, "config", "HOST:PORT"),
        (&["host", "--config", "/nonexistent/web.toml"], 2, "config", "/nonexistent/web.toml: No such file"),
        (&["config", "--check", "/nonexistent/web.toml"], 1, "config", "/nonexistent/web.toml"),
        (&["top", "--run-dir", run_dir], 1, "no-host", "no host runs here"),
        (
            &["host", "--name", "c", "--disk", "/d", "--listen", "unix:/nonexistent/s", "--policy", "hold"],
            4,
            "environment",
            "/nonexistent/s",
        ),
    ] {
        let error = error(&xl_colo(&[words, &["--json"]].concat()).await, exit_code);
        assert_eq!(error["class"], class, "{words:?}: {error}");
        assert!(error["text"].as_str().unwrap().contains(text), "{words:?}: {error}");
    }
    let output = xl_colo(&["--help", "--json"]).await;
    assert!(output.status.success() && !output.stdout.is_empty(), "help is no failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_is_said_in_json_where_that_was_asked_for() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().to_str().unwrap();
    let mut a = host("a", dir.path(), Some("web"));
    let refused = error(&xl_colo(&["checkpoint", "web", "--json", "--run-dir", run_dir]).await, 1);
    assert_eq!((&refused["class"], &refused["do"]), (&"refused".into(), &Value::Null));
    let quiet = xl_colo(&["stop", "web", "--json", "--run-dir", run_dir]).await;
    let json: Value = serde_json::from_slice(&quiet.stdout).unwrap();
    assert_eq!((&json["done"], &json["host"]), (&"stop".into(), &"a".into()));
    assert!(a.exit().await.success());

    // What listens says where.
    let config = xl_colo(&["config", "--json"]).await;
    let json: Value = serde_json::from_slice(&config.stdout).unwrap();
    assert!(json["toml"].as_str().unwrap().contains("[protect]"));
    let image = dir.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let socket = dir.path().join("nbd.sock");
    let mut nbd = Command::new(XL_COLO)
        .args(["nbd", "--json", "-t", "-k", socket.to_str().unwrap(), image.to_str().unwrap()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(nbd.stdout.take().unwrap()), &mut line).unwrap();
    nbd.kill().unwrap();
    nbd.wait().unwrap();
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["listening"], format!("unix:{}", socket.display()));
}

/// A socket that nobody serves any more, one that nobody answers on, and one of somebody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_socket_a_silent_one_and_a_foreign_one_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().to_str().unwrap();
    drop(UnixListener::bind(dir.path().join("dead.sock")).unwrap());
    let _silent = UnixListener::bind(dir.path().join("silent.sock")).unwrap();
    let dead = error(&xl_colo(&["status", "dead", "--json", "--run-dir", run_dir]).await, 1);
    assert_eq!(dead["class"], "no-host", "{dead}");
    assert!(dead["text"].as_str().unwrap().contains("is the host running?"), "{dead}");
    let silent = error(&xl_colo(&["status", "silent", "--json", "--run-dir", run_dir]).await, 1);
    assert_eq!(silent["class"], "no-answer", "{silent}");
    // A host takes the place of the dead one, and not of one that is served.
    let _host = host("dead", dir.path(), None);
    assert!(xl_colo(&["status", "dead", "--run-dir", run_dir]).await.status.success());
}

/// Root's run directory is closed to others, and they are told so.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_is_told_that_it_is_not_theirs() {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIP: only root can be somebody else");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    // Where the program was built may be closed to them.
    let program = dir.path().join("xl-colo");
    std::fs::copy(XL_COLO, &program).unwrap();
    let run_dir = dir.path().join("run");
    let a = host("a", &run_dir, None);
    let as_nobody = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program).args(words);
        command.args(["--json", "--run-dir"]).arg(&run_dir).env_remove("XDG_RUNTIME_DIR").output().unwrap()
    };
    for words in [&["status"][..], &["list"], &["status", "a"], &["stop", "a"], &["events", "a"]] {
        let error = error(&as_nobody(words), 1);
        let text = error["text"].as_str().unwrap();
        assert!(text.contains("Permission denied"), "{words:?}: {error}");
        assert!(!error["do"].is_null(), "{words:?}: {error}");
    }
    // Nor is it when somebody has opened the directory and the socket to everyone.
    let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(&run_dir, 0o755);
    mode(&a.socket, 0o777);
    for words in [&["status", "a"][..], &["stop", "a"], &["events", "a"], &["protect", "127.0.0.1:1", "--host", "a"]] {
        let error = error(&as_nobody(words), 1);
        assert_eq!(error["class"], "refused", "{words:?}: {error}");
        assert!(error["text"].as_str().unwrap().contains("user 65534 has no say here"), "{words:?}: {error}");
    }
    assert_eq!(a.status().await.host, "a", "its owner is heard as ever");
    // Who is not root has hosts too.
    let own = tempfile::Builder::new().prefix("of-nobody").tempdir().unwrap();
    std::os::unix::fs::chown(own.path(), Some(65534), Some(65534)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program);
    command.args(["host", "--follow-stdin", "--name", "n", "--listen", "127.0.0.1:0", "--policy", "hold", "--run-dir"]);
    command.arg(own.path().join("run")).arg("--disk").arg(own.path().join("n.img"));
    command.args(["--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]);
    let theirs = Host::start("n", &own.path().join("run"), command);
    assert_eq!(theirs.status().await.guest.as_deref(), Some("web"), "root may ask as well");
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program);
    let output = command.args(["stop", "web", "--run-dir"]).arg(own.path().join("run")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
