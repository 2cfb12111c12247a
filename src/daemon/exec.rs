//! A connection that a command makes: what is written goes to its standard input, what it prints is read.
//!
//! ```text
//!   Exec ── stdin ──▶ sh -c COMMAND ──▶ ssh, or whatever carries bytes ──▶ xl-colo receive ── socket ──▶ the peer's host
//!        ◀─ stdout ─┘         └ stderr: kept, for the case that nothing else comes
//! ```
//!
//! Each link of a pair is a command of its own. One command for all of them would need a protocol of its own to keep a
//! first copy from delaying a heartbeat, and ssh has that already (ControlMaster).
//!
//! The trap: a command that cannot connect says so on standard error and ends; read as a stream, that is a peer that hung
//! up. So an end before the first byte is an error with the command's last words.

use std::io;
use std::pin::Pin;
use std::process::Stdio;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;

/// The longest part of a command's last words that is kept, in bytes.
const LAST_WORDS_BYTES: usize = 400;

/// A running command.
#[derive(Debug)]
pub(super) struct Exec {
    stdin: ChildStdin,
    stdout: ChildStdout,
    last_words: JoinHandle<String>,
    spoke: bool,
    /// Ends with this.
    _child: Child,
}

/// Starts a command with `sh -c`.
pub(super) fn start(command: &str) -> io::Result<Exec> {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = shell.kill_on_drop(true).spawn()?;
    let missing = || io::Error::other("a command without its pipes");
    let (stdin, stdout) = (child.stdin.take().ok_or_else(missing)?, child.stdout.take().ok_or_else(missing)?);
    let last_words = tokio::spawn(listen(child.stderr.take().ok_or_else(missing)?));
    Ok(Exec { stdin, stdout, last_words, spoke: false, _child: child })
}

/// Reads standard error to its end: into the log, and the last line of it for whoever asks.
async fn listen(stderr: ChildStderr) -> String {
    let mut last = String::new();
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    // A line without an end must not fill the memory.
    while let Ok(1..) = tokio::io::AsyncReadExt::take(&mut lines, 64 << 10).read_until(b'\n', &mut line).await {
        let said = String::from_utf8_lossy(&line).trim().to_owned();
        tracing::debug!(said, "a command to reach a peer");
        if !said.is_empty() {
            last = said.chars().take(LAST_WORDS_BYTES).collect();
        }
        line.clear();
    }
    last
}

impl AsyncRead for Exec {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        ready!(Pin::new(&mut self.stdout).poll_read(cx, into))?;
        self.spoke |= into.filled().len() > before;
        if self.spoke || into.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let said = ready!(Pin::new(&mut self.last_words).poll(cx)).unwrap_or_default();
        let why = if said.is_empty() { "the command ended and said nothing".to_owned() } else { said };
        Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionRefused, why)))
    }
}

impl AsyncWrite for Exec {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        match ready!(Pin::new(&mut self.stdin).poll_write(cx, from)) {
            // Why is on its standard error, and comes with the read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe && !self.spoke => Poll::Ready(Ok(from.len())),
            written => Poll::Ready(written),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdin).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdin).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_command_carries_bytes_both_ways() {
        let mut link = start("cat").unwrap();
        link.write_all(b"to and fro").await.unwrap();
        let mut read = [0; 10];
        link.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"to and fro");
        drop(link);
        let mut link = start("head -c 3").unwrap();
        link.write_all(b"abcdef").await.unwrap();
        let mut read = Vec::new();
        link.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"abc", "an end after the first byte is an end");
    }

    #[tokio::test]
    async fn a_command_that_fails_has_its_last_words() {
        for (command, why) in [
            ("echo no route to host b >&2; exit 255", "no route to host b"),
            ("/nonexistent/ssh b", "/nonexistent/ssh"),
            ("exit 1", "the command ended and said nothing"),
        ] {
            let mut link = start(command).unwrap();
            let _ = link.write_all(&[7; 1 << 20]).await;
            let error = link.read(&mut [0; 8]).await.unwrap_err();
            assert!(error.to_string().contains(why), "{command}: {error}");
        }
    }
}
