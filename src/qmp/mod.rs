//! QMP, QEMU's monitor protocol, both ends of it.
//!
//! ```text
//!  bytes ─▶ codec ─▶ value ─▶ server ─▶ commands::Command ─▶ (the daemon carries it out) ─▶ server ─▶ bytes
//!                             client ◀─ reply, event ◀─ codec ◀─ bytes
//! ```
//!
//! - [`codec`]: QEMU's dialect of JSON, read as its monitor reads it, and written as it writes it;
//! - [`commands`]: what can be ordered, decoded with QEMU's words for what is wrong with an order;
//! - [`drive`]: what a drive is, in QEMU's options and in its JSON;
//! - [`lines`]: the lines for people that libxl sends through `human-monitor-command`;
//! - [`server`]: a session, from the greeting on;
//! - [`client`]: the other end of one;
//! - [`pair`]: what two QEMUs are told to become a pair, and to be none any more.
//!
//! What is said where, and in which words, was compared with QEMU 7.2; `tests/qmp_words.rs` does it again.
//! Source: QEMU `docs/interop/qmp-spec.txt`; `qapi/`.

pub mod client;
pub mod codec;
pub mod commands;
pub mod drive;
pub mod lines;
pub mod pair;
pub mod server;

use serde_json::{Value, json};

/// What kind of error it is, for programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// Nearly every error.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// No such device.
    DeviceNotFound,
}

impl Class {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// Why an order was not carried out.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// For programs.
    pub class: Class,
    /// For people.
    pub desc: String,
}

impl QmpError {
    /// An error of the usual class.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: Class::GenericError, desc: desc.into() }
    }

    /// There is no such command, here or now.
    pub fn not_found(desc: impl Into<String>) -> Self {
        Self { class: Class::CommandNotFound, desc: desc.into() }
    }
}

/// What an order came to.
pub type Outcome = Result<Value, QmpError>;

/// The answer to an order that has nothing to tell.
pub fn done() -> Outcome {
    Ok(json!({}))
}

/// Something that is told to whoever listens.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// `STOP`, `COLO_EXIT` …
    pub name: String,
    /// What belongs to it; null when nothing.
    pub data: Value,
}

impl Event {
    /// An event.
    #[must_use]
    pub fn new(name: &str, data: Value) -> Self {
        Self { name: name.to_owned(), data }
    }
}

#[cfg(test)]
mod tests;
