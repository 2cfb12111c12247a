//! What the command prints: a line for whoever still reads.
//!
//! The trap: `println!` panics once its reader has gone (`xl-colo status | grep -q`, a log pipe whose logger was
//! restarted), and a panic in the process that carries a guest is the last thing a closed pipe should cause. Restoring
//! SIGPIPE would be worse: then every write to a peer that died ends the process.

use std::fmt::Display;
use std::io::{self, Write};

/// A line on standard output; whether somebody reads on. What has more to say may end when nobody does.
pub fn out(line: &dyn Display) -> bool {
    to(&mut io::stdout().lock(), line)
}

/// A line on standard error.
pub fn err(line: &dyn Display) -> bool {
    to(&mut io::stderr().lock(), line)
}

fn to(writer: &mut impl Write, line: &dyn Display) -> bool {
    // In one piece, so that the lines of two processes on one terminal stay whole.
    writer.write_all(format!("{line}\n").as_bytes()).and_then(|()| writer.flush()).is_ok()
}
