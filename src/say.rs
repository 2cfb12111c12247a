//! What the command prints: a line for whoever still reads.
//!
//! The trap: `println!` panics once its reader has gone (`xl-colo status | grep -q`, a log pipe whose logger was
//! restarted), and a panic in the process that carries a guest is the last thing a closed pipe should cause. Restoring
//! SIGPIPE would be worse: then every write to a peer that died ends the process.

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Whether what is said is JSON.
static JSON: AtomicBool = AtomicBool::new(false);

/// From now on what is said is JSON (`--json`).
pub fn speak_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// Whether what is said is JSON.
#[must_use]
pub fn is_json() -> bool {
    JSON.load(Ordering::Relaxed)
}

/// Why a command failed: one line on standard error, or one object, always of this shape.
///
/// ```text
///   xl-colo: TEXT; do: REMEDY
///   {"error":{"class":"no-host","text":"…","do":"…"}}
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What kind of failure, for programs: `usage`, `no-host`, `no-answer`, `refused`, `environment`, `lost`, or `failed`.
    pub class: &'static str,
    /// A sentence.
    pub text: String,
    /// What to do next, where that is known.
    pub remedy: Option<String>,
}

impl Failure {
    /// Says it.
    pub fn say(&self) {
        let Self { class, text, remedy } = self;
        if is_json() {
            err(&serde_json::json!({"error": {"class": class, "text": text, "do": remedy}}));
        } else {
            let remedy = remedy.as_ref().map_or_else(String::new, |remedy| format!("; do: {remedy}"));
            err(&format_args!("xl-colo: {text}{remedy}"));
        }
    }
}
