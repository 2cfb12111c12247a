//! What an operator sees of long work: a bar on a terminal, plain lines through a pipe, nothing of it with `--json`.
//!
//! The host is an engine by hand, which does 200 MiB each second and is done after six.

use crate::common::{XL_COLO, installed, run, xl_colo};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::mpsc;
use xen_colo::daemon::control::{self, Answer, Asked, Request};
use xen_colo::daemon::events::{Events, Progress, Work};
use xen_colo::daemon::status::{Protection, Status};

const TOTAL_MIB: u64 = 1200;
const RATE_MIB: u64 = 200;

/// Runs a command on a pseudo-terminal, and gives what it showed.
const PTY: &str = r#"
import fcntl, os, pty, struct, sys, termios
shown = b""
pid, leader = pty.fork()
if pid == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    os.environ["TERM"] = "xterm"
    os.execv(sys.argv[1], sys.argv[1:])
while True:
    try:
        piece = os.read(leader, 65536)
    except OSError:
        break
    if not piece:
        break
    shown += piece
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.stdout.buffer.write(shown)
sys.exit(code)
"#;

/// A host whose work begins with the first order that is no question.
async fn host(work: Work) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let listener = control::listen(dir.path(), "a").await.unwrap();
    let (engine, mut asked) = mpsc::channel::<Asked>(4);
    tokio::spawn(control::serve(listener, engine, Events::new("a")));
    tokio::spawn(async move {
        let mut begun: Option<Instant> = None;
        while let Some((request, reply)) = asked.recv().await {
            let answer = if request == Request::Status {
                let since = begun.map_or(Duration::ZERO, |begun| begun.elapsed());
                let done_mib = since.as_millis() as u64 * RATE_MIB / 1000;
                let is_over = done_mib >= TOTAL_MIB;
                let protection = match work {
                    Work::Commit => Protection::TakenOver,
                    _ if is_over => Protection::Protected,
                    _ => Protection::Syncing,
                };
                let progress = Progress { work, done_bytes: done_mib << 20, total_bytes: TOTAL_MIB << 20 };
                let work = (!is_over).then_some(progress);
                let status = Status { host: "a".into(), protection, work, ..Status::default() };
                Answer::Return(serde_json::to_value(status).unwrap())
            } else {
                begun = Some(Instant::now());
                Answer::done()
            };
            let _ = reply.send(answer);
        }
    });
    dir
}

fn words(work: Work, run_dir: &Path) -> Vec<&str> {
    let order: &[&str] = if work == Work::Commit {
        &["failover", "a", "--wait"]
    } else {
        &["protect", "127.0.0.1:1", "--host", "a", "--wait"]
    };
    [order, &["--run-dir", run_dir.to_str().unwrap()]].concat()
}

/// `first copy  200 of 1200 MiB (16 %), 200 MiB/s, 5 s left`, with numbers that a busy machine may have.
fn is_line(name: &str, line: &str) -> bool {
    let Some(rest) = line.strip_prefix(&format!("{name}  ")) else { return false };
    let number = |text: &str| text.parse::<u64>().is_ok();
    let parts: Vec<&str> = rest.split(", ").collect();
    let [done, rate, left] = parts[..] else { return false };
    let of = done.split_once(&format!(" of {TOTAL_MIB} MiB (")).zip(done.strip_suffix(" %)"));
    of.is_some_and(|((done, _), _)| number(done))
        && rate.strip_suffix(" MiB/s").is_some_and(number)
        && left.strip_suffix(" s left").is_some_and(number)
}

#[tokio::test(flavor = "multi_thread")]
async fn through_a_pipe_it_is_plain_lines_at_a_bounded_rate() {
    for (work, name) in [(Work::FirstCopy, "first copy"), (Work::Resync, "resync"), (Work::Commit, "commit")] {
        let dir = host(work).await;
        let output = xl_colo(&words(work, dir.path())).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        assert!(!said.contains(['\x1b', '\r']), "nothing for a terminal: {said:?}");
        let lines: Vec<&str> = said.lines().collect();
        assert!((1..=3).contains(&lines.len()), "one each two seconds: {lines:#?}");
        assert!(lines.iter().all(|line| is_line(name, line)), "{lines:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_json_nothing_is_said_of_it() {
    let dir = host(Work::FirstCopy).await;
    let output = xl_colo(&[&["--json"], &words(Work::FirstCopy, dir.path())[..]].concat()).await;
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal_it_is_a_bar_that_is_gone_when_it_is_over() {
    let Some(python) = installed("python3") else { return };
    for (work, name) in [(Work::FirstCopy, "first copy"), (Work::Commit, "commit")] {
        let dir = host(work).await;
        let output =
            run(python.to_str().unwrap(), &[&["-c", PTY, XL_COLO], &words(work, dir.path())[..]].concat()).await;
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{shown}");
        for part in [name, "MiB of 1.17 GiB", "MiB/s", " s left", "█"] {
            assert!(shown.contains(part), "{part}: {shown:?}");
        }
        let frames = shown.matches(" s left").count();
        assert!(frames > 3, "it moves: {frames} of {shown:?}");
        // What is left on the screen is drawn after the line was cleared for the last time.
        let (_, last) = shown.rsplit_once("\x1b[2K").unwrap_or(("", &shown));
        assert!(!last.contains("s left"), "{last:?}");
    }
}
