//! `xl-colo nbd` beside qemu-nbd: the same command lines and the same clients, and what both do.
//!
//! What is compared is what scripts and test suites for qemu-nbd have been seen to depend on, QEMU's iotests first of all.

use crate::common::qemu::monitor;
use crate::common::{Listening, PATIENCE, XL_COLO, installed, run, until};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// One of the two programs, and a place for its files.
struct Program {
    dir: TempDir,
    command: PathBuf,
    is_ours: bool,
}

/// Both, or none where one is missing.
fn both() -> Vec<Program> {
    let needed = ["qemu-nbd", "qemu-io", "qemu-img", "nbdinfo"].map(installed);
    if needed.contains(&None) {
        return Vec::new();
    }
    let programs = [(PathBuf::from(XL_COLO), true), (installed("qemu-nbd").unwrap(), false)];
    programs.map(|(command, is_ours)| Program { dir: tempfile::tempdir().unwrap(), command, is_ours }).into()
}

/// What a program said, and its exit code.
#[derive(Debug, PartialEq)]
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Program {
    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn image(&self, bytes: &[u8]) {
        std::fs::write(self.at("image"), bytes).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.command);
        if self.is_ours {
            command.arg("nbd");
        }
        command.current_dir(&self.dir);
        command
    }

    /// Serves `image` until dropped; what it says goes to the file `said`.
    fn serves(&self, args: &[&str]) -> Listening {
        let said = std::fs::File::create(self.at("said")).unwrap();
        let mut command = self.command();
        command.args(["-t", "-k", &self.at("sock")]).args(args).arg(self.at("image")).stderr(said);
        Listening::start(&mut command, &self.dir.path().join("sock"))
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.at("sock"))
    }

    /// What it says when it is run to its end, its directory and its socket left out.
    fn says(&self, args: &[&str]) -> Said {
        self.ends(self.command().args(args))
    }

    /// The same of another program, which is ended if it does not end.
    fn ends(&self, command: &mut Command) -> Said {
        let mut bounded = Command::new("timeout");
        bounded.arg(PATIENCE.as_secs().to_string()).arg(command.get_program()).args(command.get_args());
        self.said(&bounded.current_dir(&self.dir).stdin(Stdio::null()).output().unwrap())
    }

    async fn hears(&self, program: &str, args: &[&str]) -> Said {
        self.said(&run(program, args).await)
    }

    fn said(&self, output: &std::process::Output) -> Said {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&self.dir.path().display().to_string(), "DIR");
        Said { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }
}

/// Whether a process runs: what nobody has waited for is there, with an empty command line.
fn runs(number: i32) -> bool {
    std::fs::read(format!("/proc/{number}/cmdline")).is_ok_and(|line| !line.is_empty())
}

fn of(process: &Listening) -> Pid {
    Pid::from_child(&process.0)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_sector_of_an_image_is_whole_and_grows_when_it_is_written() {
    let mut heard = Vec::new();
    for program in both() {
        program.image(&[7; 1000]);
        let server = program.serves(&["-f", "raw"]);
        let uri = program.uri("");
        let mut all = vec![program.hears("nbdinfo", &["--size", &uri]).await];
        let io = async |line: &str| program.hears("qemu-io", &["-f", "raw", "-c", line, &uri]).await.code;
        // What is behind the end is zero, also when a part of it was written.
        let mut codes = vec![io("read -P 7 0 1000").await, io("read -P 0 1000 24").await, io("read -P 0 1001 3").await];
        codes.extend([io("discard 512 512").await, io("write -z 1000 24").await]);
        let len = std::fs::metadata(program.at("image")).unwrap().len();
        codes.extend([io("write -P 9 1008 8").await, io("read -P 0 1016 8").await, io("read -P 9 1008 8").await]);
        codes.extend([io("write -P 8 512 512").await, io("read -P 8 512 512").await]);
        all.push(
            program
                .hears(
                    "qemu-img",
                    &["map", "--output=json", "--image-opts", &format!("driver=nbd,path={}", program.at("sock"))],
                )
                .await,
        );
        drop(server);
        let grown = std::fs::read(program.at("image")).unwrap();
        assert!(grown[..512] == [7; 512] && grown[512..] == [8; 512], "{} bytes", grown.len());
        assert!(codes.iter().all(|code| *code == Some(0)), "{codes:?}");
        assert!(len == 1000 || !program.is_ours, "zeroes behind the end are there without a byte");
        heard.push(all);
    }
    assert!(heard.windows(2).all(|pair| pair[0] == pair[1]), "{heard:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_offered_is_told_the_same_by_both_and_of_both() {
    let mut told = Vec::new();
    for program in both() {
        program.image(&[7; 1 << 20]);
        let _server = program.serves(&["-f", "raw", "-x", "foo", "-D", "bar baz", "-A", "-e", "2"]);
        for asking in both() {
            told.push(asking.says(&["-L", "-k", &program.at("sock")]));
        }
        let map = program.hears("nbdinfo", &["--map=qemu:allocation-depth", &program.uri("foo")]).await;
        assert!(map.out.split_whitespace().eq(["0", "1048576", "1", "local"]), "{map:?}");
        let unknown = program.hears("qemu-img", &["info", &program.uri("bar")]).await;
        assert!(unknown.err.contains("server reported: export 'bar' not present"), "{unknown:?}");
        let clear = format!("driver=nbd,path={},export=foo,tls-creds=t", program.at("sock"));
        std::fs::write(program.at("keys.psk"), "qemu:00112233445566778899aabbccddeeff\n").unwrap();
        let psk = format!("tls-creds-psk,id=t,endpoint=client,dir={}", program.dir.path().display());
        let tls = program.hears("qemu-img", &["info", "--object", &psk, "--image-opts", &clear]).await;
        assert!(tls.err.contains("server reported: TLS not configured"), "{tls:?}");
    }
    assert!(told.windows(2).all(|pair| pair[0] == pair[1]), "{told:?}");
    assert!(told.first().is_none_or(|told| told.out.contains("description: bar baz")), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_a_qemu_has_is_not_served_and_one_that_is_served_no_qemu_has() {
    for program in both() {
        program.image(&[7; 1 << 20]);
        // Whoever writes here lets nobody else write.
        let drive = format!("if=none,id=d,format=raw,file={}", program.at("image"));
        let Some(qemu) = installed("qemu-system-x86_64") else { return };
        let guest = |monitor: &str| {
            let mut command = Command::new(&qemu);
            let socket = format!("unix:{},server=on,wait=off", program.at(monitor));
            command.args([
                "-machine",
                "pc",
                "-accel",
                "tcg",
                "-S",
                "-nodefaults",
                "-display",
                "none",
                "-drive",
                &drive,
            ]);
            command.args(["-device", "virtio-blk-pci,drive=d", "-qmp", &socket]);
            command
        };
        let held = Listening::start(&mut guest("held"), &program.dir.path().join("held"));
        // It opens its monitor before its disks, and answers after that.
        drop(monitor(&program.dir.path().join("held")).await);
        let refused = program.says(&["-f", "raw", "-k", &program.at("sock"), &program.at("image")]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.err.to_lowercase().contains("failed to get \"write\" lock"), "{refused:?}");
        if program.is_ours {
            // As for the PV disk of a guest whose device model has the image too.
            drop(program.serves(&["-f", "raw", "--locking=off"]));
        }
        drop(held);
        let server = program.serves(&["-f", "raw"]);
        // qemu-nbd listens before it opens the image.
        assert_eq!(program.hears("nbdinfo", &["--size", &program.uri("")]).await.code, Some(0));
        let refused = program.ends(&mut guest("late"));
        assert!(refused.err.contains("Failed to get ") && refused.err.contains("\"write\" lock"), "{refused:?}");
        // Whoever says that he shares it may look.
        assert_eq!(program.hears("qemu-img", &["info", "-U", &program.at("image")]).await.code, Some(0));
        drop(server);
        let _again = program.serves(&["-f", "raw", "-r"]);
        assert_eq!(program.hears("qemu-img", &["info", &program.at("image")]).await.code, Some(0), "two readers");
        let written = program.hears("qemu-io", &["-f", "raw", "-c", "write 0 512", &program.at("image")]).await;
        assert_eq!(written.code, Some(i32::from(program.is_ours)), "ours reads what nobody changes: {written:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_the_process_stays_in_a_file_of_its_own_while_it_is_there() {
    for program in both() {
        program.image(&[7; 4096]);
        let server = program.serves(&["-f", "raw", "-r", "-e", "0", "--pid-file", &program.at("pid")]);
        let pid = server.0.id().to_string();
        let read = || std::fs::read_to_string(program.at("pid")).unwrap_or_default().trim().to_owned();
        // qemu-nbd listens first.
        until("its number", async || if read() == pid { Ok(()) } else { Err(read()) }).await;
        let mode = std::fs::metadata(program.at("pid")).unwrap().permissions().mode() & 0o777;
        assert_eq!((read(), mode), (pid.clone(), 0o600));
        let second =
            ["-f", "raw", "-r", "-k", &program.at("other"), "--pid-file", &program.at("pid"), &program.at("image")];
        let second = program.says(&second);
        assert_eq!(
            (second.code, second.err.to_lowercase().contains("cannot lock pid file")),
            (Some(1), true),
            "{second:?}"
        );
        kill_process(of(&server), Signal::HUP).unwrap();
        let mut server = server;
        let ended = until("its end", async || server.0.try_wait().unwrap().ok_or("it runs")).await;
        assert!(ended.success(), "a hang-up is an order to end");
        assert!(!Path::new(&program.at("sock")).exists() && read() == pid, "the socket goes, the file stays");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_another_format_is_not_guessed() {
    for program in both() {
        program.image(&[0; 4096]);
        let server = program.serves(&[]);
        until("the warning", async || {
            let said = std::fs::read_to_string(program.at("said")).unwrap();
            if said.contains("probing guessed raw") { Ok(()) } else { Err(said) }
        })
        .await;
        let io = async |line: &str| program.hears("qemu-io", &["-f", "raw", "-c", line, &program.uri("")]).await;
        // A guest that writes this would choose what the next one who guesses opens.
        std::fs::write(program.at("magic"), b"QFI\xfb\0\0\0\x03").unwrap();
        let refused = io(&format!("write -s {} 0 512", program.at("magic"))).await;
        assert_eq!(refused.code, Some(1));
        assert!(
            refused.err.contains("Operation not permitted") || refused.out.contains("Operation not permitted"),
            "{refused:?}"
        );
        assert_eq!((io("write -P 5 0 512").await.code, io("read -P 5 0 512").await.code), (Some(0), Some(0)));
        drop(server);
        let image = program.at("image");
        assert_eq!(program.hears("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]).await.code, Some(0));
        if program.is_ours {
            let refused = program.says(&["-k", &program.at("sock"), &image]);
            let wanted = "xl-colo: DIR/image is an image of format qcow2, and raw is all that is served: -f raw serves the bytes of the file itself\n";
            assert_eq!((refused.code, refused.err.as_str()), (Some(1), wanted));
        }
        let _server = program.serves(&["-f", "raw", "-r"]);
        let info = program.hears("qemu-img", &["info", &program.uri("")]).await;
        assert!(info.out.contains("file format: qcow2"), "as was said: {info:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_line_is_read_as_getopt_reads_it() {
    for program in both() {
        program.image(&[7; 4096]);
        let image = format!("file:{}", program.at("image"));
        let line = [
            "--pers",
            "-r",
            "-r",
            "-x",
            "a",
            "--export-name=b",
            "-v",
            "-v",
            "-e",
            "1",
            "--shar=3",
            "--cache=off",
            "-b",
            "",
            "-p",
            "nbd",
            "--format",
            "raw",
            "--sock",
            &program.at("sock"),
            &image,
        ];
        let said = std::fs::File::create(program.at("said")).unwrap();
        let mut command = program.command();
        let server = Listening::start(command.args(line).stderr(said), &program.dir.path().join("sock"));
        let info = program.hears("nbdinfo", &["--json", &program.uri("b")]).await;
        assert_eq!((info.code, info.out.contains("\"is_read_only\": true")), (Some(0), true), "{info:?}");
        drop(server);
        assert_eq!(std::fs::read_to_string(program.at("said")).unwrap(), "", "nothing was wrong");
        for wrong in [&["--zork", "x"][..], &["-p", "zork", "x"], &["--discard=zork", "x"], &["-k"]] {
            assert_eq!(program.says(wrong).code, Some(1), "{wrong:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_was_passed_is_served_in_the_background_too() {
    let activate = r#"
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen()
os.dup2(s.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"#;
    for program in both() {
        program.image(&[7; 4096]);
        let (socket, pid, image) = (program.at("sock"), program.at("pid"), program.at("image"));
        let executable = program.command.display().to_string();
        let mut args = vec!["-c", activate, &socket, &executable];
        args.extend(program.is_ours.then_some("nbd"));
        args.extend(["--fork", "-f", "raw", "--pid-file", &pid, &image]);
        let started = run("/usr/bin/python3", &args).await;
        assert!(started.status.success(), "{started:?}");
        let size = program.hears("nbdinfo", &["--size", &program.uri("")]).await;
        assert_eq!(size.out.trim(), "4096", "{size:?}");
        // It ends with its only client.
        let number: i32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        until("its end", async || if runs(number) { Err(number) } else { Ok(()) }).await;
    }
}
