//! The other end of a monitor's session.
//!
//! ```text
//! in       | on                     | does                                    | goes to
//! ---------|------------------------|-----------------------------------------|---------
//! new      | a greeting             | sends qmp_capabilities                  | Greeted
//! Greeted  | its return             | –                                       | Ready
//! Greeted  | a greeting             | sends qmp_capabilities                  | Greeted
//! Ready    | an order               | sends it, with an id of ours            | Ready
//! Ready    | a reply with that id   | gives it to whoever polls               | Ready
//! Ready    | a reply with another   | drops it: the order was given up        | Ready
//! any      | an event               | keeps it, [`EVENTS_MAX`] of them        | –
//! any      | anything else          | [`ClientError`]: of no further use      | –
//! ```
//!
//! A QEMU serves one client at a time; the next one waits for its greeting. The trap: a QEMU that is still starting may greet
//! whom it has greeted already, and forgets what was negotiated. A line of QEMU's is JSON on one line, and may
//! be long: [`LINE_MAX_BYTES`] bounds it.
//!
//! Source: QEMU `docs/interop/qmp-spec.txt`.

use super::{Class, Event, Outcome, QmpError};
use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};
use std::collections::VecDeque;

/// Longest line that is taken. The longest useful one, `query-qmp-schema`, has 200 KiB.
pub const LINE_MAX_BYTES: usize = 4 << 20;
/// Events that are kept; the oldest give way.
pub const EVENTS_MAX: usize = 1024;
/// What of a monitor's words is shown when they are none.
const SHOWN_MAX_BYTES: usize = 120;

/// What came is no QMP.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClientError {
    /// It is not JSON, or not of the protocol.
    #[error("the monitor said what is no QMP: {0}")]
    NotQmp(String),
    /// It does not end.
    #[error("the monitor said a line of more than {LINE_MAX_BYTES} bytes")]
    TooLong,
    /// It does not take `qmp_capabilities`.
    #[error("the monitor refused to negotiate: {0}")]
    Refused(QmpError),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    New,
    Greeted,
    Ready,
}

/// The client's end.
#[derive(Debug)]
pub struct Client {
    state: State,
    input: BytesMut,
    searched_bytes: usize,
    output: BytesMut,
    last_id: u64,
    replies: VecDeque<(u64, Outcome)>,
    events: VecDeque<Event>,
    version: [u64; 3],
}

impl Default for Client {
    fn default() -> Self {
        Self {
            state: State::New,
            input: BytesMut::new(),
            searched_bytes: 0,
            output: BytesMut::new(),
            last_id: 0,
            replies: VecDeque::new(),
            events: VecDeque::new(),
            version: [0; 3],
        }
    }
}

impl Client {
    /// Whether orders may be given.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// The monitor's release: major, minor, micro.
    #[must_use]
    pub fn version(&self) -> [u64; 3] {
        self.version
    }

    /// Gives an order; its reply has the id that is returned. Only when ready.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> u64 {
        assert!(self.is_ready(), "an order before the negotiation");
        self.last_id += 1;
        self.send(&json!({"execute": command, "arguments": arguments, "id": self.last_id}));
        self.last_id
    }

    /// Bytes for the monitor.
    pub fn poll_output(&mut self) -> Option<Bytes> {
        (!self.output.is_empty()).then(|| self.output.split().freeze())
    }

    /// What an order came to.
    pub fn poll_reply(&mut self) -> Option<(u64, Outcome)> {
        self.replies.pop_front()
    }

    /// What the monitor told unasked.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Bytes of the monitor.
    pub fn handle_input(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.input.extend_from_slice(bytes);
        while let Some(at) = self.input[self.searched_bytes..].iter().position(|byte| *byte == b'\n') {
            let line = self.input.split_to(self.searched_bytes + at + 1);
            self.searched_bytes = 0;
            if line.len() > LINE_MAX_BYTES {
                return Err(ClientError::TooLong);
            }
            self.handle_line(&line)?;
        }
        self.searched_bytes = self.input.len();
        if self.input.len() > LINE_MAX_BYTES { Err(ClientError::TooLong) } else { Ok(()) }
    }

    fn handle_line(&mut self, line: &[u8]) -> Result<(), ClientError> {
        let shown = || {
            let shown = String::from_utf8_lossy(&line[..line.len().min(SHOWN_MAX_BYTES)]);
            ClientError::NotQmp(shown.trim_end().to_owned())
        };
        let mut said: Value = serde_json::from_slice(line).map_err(|_| shown())?;
        if let Some(name) = said.get("event").and_then(Value::as_str) {
            let name = name.to_owned();
            let data = said.get_mut("data").map(Value::take).unwrap_or_default();
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            self.events.push_back(Event { name, data });
            return Ok(());
        }
        let outcome = outcome(&mut said);
        match (self.state, outcome) {
            (State::New | State::Greeted, None) if said.get("QMP").is_some() => {
                let version = &said["QMP"]["version"]["qemu"];
                self.version = ["major", "minor", "micro"].map(|part| version[part].as_u64().unwrap_or(0));
                self.send(&json!({"execute": "qmp_capabilities", "id": 0}));
                self.state = State::Greeted;
            }
            (State::Greeted, Some(Ok(_))) => self.state = State::Ready,
            (State::Greeted, Some(Err(error))) => return Err(ClientError::Refused(error)),
            (State::Ready, Some(outcome)) => match said.get("id").and_then(Value::as_u64) {
                // Of what was negotiated once more.
                Some(0) => {}
                Some(id) if id <= self.last_id => self.replies.push_back((id, outcome)),
                _ => return Err(shown()),
            },
            _ => return Err(shown()),
        }
        Ok(())
    }

    fn send(&mut self, request: &Value) {
        self.output.extend_from_slice(request.to_string().as_bytes());
        self.output.extend_from_slice(b"\r\n");
    }
}

/// What a line replies, if it is a reply.
fn outcome(said: &mut Value) -> Option<Outcome> {
    if let Some(value) = said.get_mut("return") {
        return Some(Ok(value.take()));
    }
    let error = said.get("error")?;
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    let class = match text("class").as_str() {
        "CommandNotFound" => Class::CommandNotFound,
        "DeviceNotFound" => Class::DeviceNotFound,
        _ => Class::GenericError,
    };
    Some(Err(QmpError { class, desc: text("desc") }))
}
