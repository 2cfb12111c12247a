//! `xl-colo top` on a terminal of its own: it shows, it quits, and the terminal is as it was, whatever happened meanwhile.

use crate::common::host::{Host, host_command};
use crate::common::{XL_COLO, installed, one_line, run, turn, xl_colo};
use std::path::Path;
use std::time::Duration;

/// Runs top on a pseudo-terminal; says what it saw as `key=value` lines. First argument: what is done when the guest
/// shows: `q` at the very moment that the window changes its size, or the number of a process to kill before q, or `term`,
/// or `close` the terminal.
const PTY: &str = r#"
import fcntl, os, pty, select, signal, struct, sys, termios, time
what, program, run_dir = sys.argv[1:4]
leader, follower = pty.openpty()
fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
before = termios.tcgetattr(follower)
pid = os.fork()
if pid == 0:
    os.setsid()
    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(follower, fd)
    os.execv(program, [program, "top", "--run-dir", run_dir])
seen = b""
def until(text):
    global seen
    deadline = time.monotonic() + 20
    while text not in seen:
        if time.monotonic() > deadline:
            print("hangs waiting for %r after %r" % (text, seen[-2000:]))
            os.kill(pid, signal.SIGKILL)
            sys.exit(1)
        if select.select([leader], [], [], 0.1)[0]:
            try:
                seen += os.read(leader, 65536)
            except OSError:
                return
# What is blank already is not drawn again.
until(b"quits")
raw = termios.tcgetattr(follower)
print("raw=%s" % (raw[3] & (termios.ICANON | termios.ECHO) == 0))
if what == "term":
    os.kill(pid, signal.SIGTERM)
elif what == "close":
    os.close(leader)
    deadline = time.monotonic() + 20
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            print("outlives its terminal")
            os.kill(pid, signal.SIGKILL)
            sys.exit(1)
        time.sleep(0.05)
    print("ended")
    sys.exit(0)
elif what != "q":
    os.kill(int(what), signal.SIGKILL)
    until(b"ANSWER")
    os.write(leader, b"q")
else:
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 30, 0, 0))
    os.kill(pid, signal.SIGWINCH)
    os.write(leader, b"q")
until(b"\x1b[?1049l")
print("code=%s" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print("restored=%s" % (termios.tcgetattr(follower) == before))
print("guest=%s" % (b"web" in seen))
"#;

async fn top(what: &str, run_dir: &Path) -> Option<String> {
    let python = installed("python3")?;
    let args = ["-c", PTY, what, XL_COLO, run_dir.to_str().unwrap()];
    let output = run(python.to_str().unwrap(), &args).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    Some(text)
}

fn host(dir: &Path) -> Host {
    let mut command = host_command("a", dir);
    command.args(["--policy", "hold", "--guest", "web", "--guest-mib", "4", "--disk-mib", "4"]);
    Host::start("a", dir, command)
}

#[tokio::test(flavor = "multi_thread")]
async fn it_shows_the_guest_and_leaves_the_terminal_as_it_was() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut a = host(dir.path());
    assert_eq!(top("close", dir.path()).await.as_deref().unwrap_or("raw=True\nended\n"), "raw=True\nended\n");
    for what in ["q", "term", &a.pid().to_string()] {
        let Some(said) = top(what, dir.path()).await else { return };
        assert_eq!(said, "raw=True\ncode=0\nrestored=True\nguest=True\n", "{what}");
    }
    tokio::time::timeout(Duration::from_secs(10), a.exit()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_terminal_it_says_what_to_use_instead() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let _a = host(dir.path());
    let why = one_line(&xl_colo(&["top", "--run-dir", dir.path().to_str().unwrap()]).await, 1);
    assert!(why.contains("top needs a terminal") && why.contains("xl-colo status"), "{why}");
}
