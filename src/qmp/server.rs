//! A monitor's session, from the greeting on.
//!
//! ```text
//! in          | on                              | does                                             | goes to
//! ------------|---------------------------------|--------------------------------------------------|------------
//! new         | –                               | greets                                           | Negotiating
//! Negotiating | qmp_capabilities                | returns; from now on events are told             | Ready
//! Negotiating | any other command               | error CommandNotFound                            | Negotiating
//! Ready       | execute                         | hands the order out, and reads on when it is over| Ready
//! Ready       | execute, with oob               | keeps up to 8 orders while one is under way      | Ready
//! Ready       | exec-oob, with oob              | hands the order out at once                      | Ready
//! Ready       | what is no order                | an error, where its turn is                      | Ready
//! ```
//!
//! Orders are answered in the order they came, but for those out of band. Without oob what follows an order is not even
//! read before that is answered, as in QEMU.
//!
//! The trap: a client that orders and never reads. What it is owed is bounded: beyond [`OWED_MAX_BYTES`] nothing is read
//! from it, and events are dropped.
//!
//! Source: QEMU 7.2 `monitor/qmp.c`, `qapi/qmp-dispatch.c`.

use super::codec::{Decoder, INPUT_MAX_BYTES, encode, encode_members};
use super::commands::{self, CAPABILITIES, Command};
use super::{Event, Outcome, QmpError};
use bytes::{Bytes, BytesMut};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, VecDeque};

/// The release of QEMU's whose words these are: major, minor, micro. libxl reads it.
pub const VERSION: [u64; 3] = [7, 2, 0];
/// Who speaks.
pub const PACKAGE: &str = concat!("xl-colo ", env!("CARGO_PKG_VERSION"));
/// Orders that wait while one is under way, with oob.
pub const QUEUE_MAX: usize = 8;
/// Orders out of band that are under way at once.
const OVERTAKING_MAX: usize = 8;
/// Output that waits for the client at most, before nothing is read from it.
pub const OWED_MAX_BYTES: usize = 1 << 20;

/// An order for whoever carries orders out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// What it is answered by.
    pub ticket: u64,
    /// What to do.
    pub command: Command,
}

/// Who a reply is for: the request's `id`, if it had one.
type Id = Option<Value>;

/// What was read and is not begun.
enum Waiting {
    Order(Command, Id),
    Refused(QmpError, Id),
}

/// A session.
pub struct Session {
    commands: &'static [&'static str],
    decoder: Decoder,
    input: BytesMut,
    output: BytesMut,
    negotiated: bool,
    oob: bool,
    waiting: VecDeque<Waiting>,
    orders: VecDeque<Order>,
    /// The order that is under way, and those out of band.
    under_way: Option<u64>,
    owed: BTreeMap<u64, Id>,
    tickets: u64,
}

impl Session {
    /// A session with the commands of this monitor, which greets.
    #[must_use]
    pub fn new(commands: &'static [&'static str]) -> Self {
        let mut session = Self {
            commands,
            decoder: Decoder::default(),
            input: BytesMut::new(),
            output: BytesMut::new(),
            negotiated: false,
            oob: false,
            waiting: VecDeque::new(),
            orders: VecDeque::new(),
            under_way: None,
            owed: BTreeMap::new(),
            tickets: 0,
        };
        let greeting = json!({"version": version(), "capabilities": ["oob"]});
        session.say(&[("QMP", &greeting)]);
        session
    }

    /// How many bytes it takes now. None while there is enough to do with what it has.
    #[must_use]
    pub fn room(&self) -> usize {
        let crowded = self.output.len() > OWED_MAX_BYTES || self.waiting.len() >= QUEUE_MAX;
        if crowded { 0 } else { INPUT_MAX_BYTES.saturating_sub(self.input.len()) }
    }

    /// What the client said.
    pub fn handle_input(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
        self.advance();
    }

    /// What an order came to. One that is not under way is none.
    pub fn handle_answer(&mut self, ticket: u64, outcome: Outcome) {
        let Some(id) = self.owed.remove(&ticket) else { return };
        if self.under_way == Some(ticket) {
            self.under_way = None;
        }
        self.reply(outcome, id);
        self.advance();
    }

    /// Something happened, at `unix_us`. Told to a client that has negotiated, and reads.
    pub fn handle_event(&mut self, unix_us: u64, event: &Event) {
        if !self.negotiated || self.output.len() > OWED_MAX_BYTES {
            return;
        }
        let timestamp = json!({"seconds": unix_us / 1_000_000, "microseconds": unix_us % 1_000_000});
        let name = Value::from(event.name.as_str());
        let mut members = vec![("timestamp", &timestamp), ("event", &name)];
        if !event.data.is_null() {
            members.push(("data", &event.data));
        }
        self.say(&members);
    }

    /// The next order to be carried out.
    pub fn poll_order(&mut self) -> Option<Order> {
        self.orders.pop_front()
    }

    /// What the client is to be told.
    pub fn poll_output(&mut self) -> Option<Bytes> {
        let output = (!self.output.is_empty()).then(|| self.output.split().freeze());
        // What was owed may have kept it from reading on.
        if output.is_some() {
            self.advance();
        }
        output
    }

    /// Whether the client's last word is answered, and nothing is half said.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.owed.is_empty() && self.waiting.is_empty() && self.input.is_empty() && self.decoder.is_idle()
    }

    /// Whether a reply is owed for something that was read.
    #[must_use]
    pub fn owes(&self) -> bool {
        !(self.owed.is_empty() && self.waiting.is_empty() && self.output.is_empty())
    }

    /// Reads and begins as much as may be.
    fn advance(&mut self) {
        loop {
            while self.under_way.is_none()
                && let Some(next) = self.waiting.pop_front()
            {
                match next {
                    Waiting::Refused(error, id) => self.reply(Err(error), id),
                    Waiting::Order(command, id) => self.begin(command, id),
                }
            }
            let may_read = if self.oob {
                self.waiting.len() < QUEUE_MAX && self.owed.len() <= OVERTAKING_MAX
            } else {
                self.under_way.is_none()
            };
            if !may_read || self.output.len() > OWED_MAX_BYTES {
                return;
            }
            match self.decoder.decode(&mut self.input) {
                None => return,
                Some(Ok(value)) => self.handle_value(value),
                Some(Err(error)) => self.wait(Waiting::Refused(QmpError::generic(error.to_string()), None)),
            }
        }
    }

    fn wait(&mut self, waiting: Waiting) {
        self.waiting.push_back(waiting);
    }

    fn handle_value(&mut self, value: Value) {
        let Value::Object(mut request) = value else {
            let why = QmpError::generic("QMP input must be a JSON object");
            return self.wait(Waiting::Refused(why, None));
        };
        let id = request.remove("id");
        match self.dispatch(request) {
            Ok((command, true)) => self.hand_out(command, id),
            Ok((command, false)) => self.wait(Waiting::Order(command, id)),
            // A mistake out of band is told out of band.
            Err((error, true)) => self.reply(Err(error), id),
            Err((error, false)) => self.wait(Waiting::Refused(error, id)),
        }
    }

    /// The command of a request, and whether it is out of band; the same for what is wrong with it.
    fn dispatch(&self, request: Map<String, Value>) -> Result<(Command, bool), (QmpError, bool)> {
        let (mut arguments, mut name) = (Map::new(), None);
        let refuse = |why: String| Err((QmpError::generic(why), false));
        for (key, value) in request {
            match (key.as_str(), value) {
                ("arguments", Value::Object(object)) => arguments = object,
                ("arguments", _) => return refuse("QMP input member 'arguments' must be an object".into()),
                ("execute", Value::String(_)) if name.is_some() => {
                    return refuse("QMP input member 'execute' clashes with 'exec-oob'".into());
                }
                ("execute", Value::String(command)) => name = Some((command, false)),
                ("exec-oob", Value::String(command)) if self.oob => name = Some((command, true)),
                ("execute", _) => return refuse("QMP input member 'execute' must be a string".into()),
                ("exec-oob", _) if self.oob => {
                    return refuse("QMP input member 'exec-oob' must be a string".into());
                }
                _ => return refuse(format!("QMP input member '{key}' is unexpected")),
            }
        }
        let Some((name, oob)) = name else { return refuse("QMP input lacks member 'execute'".into()) };
        let known = name == CAPABILITIES || self.negotiated && self.commands.contains(&name.as_str());
        let why = if self.negotiated {
            format!("The command {name} has not been found")
        } else {
            format!("Expecting capabilities negotiation with '{CAPABILITIES}'")
        };
        let may_overtake = commands::may_overtake(&name).filter(|_| known);
        let may_overtake = may_overtake.ok_or((QmpError::not_found(why), oob))?;
        if oob && !may_overtake {
            return Err((QmpError::generic(format!("The command {name} does not support OOB")), true));
        }
        commands::decode(&name, arguments).map(|command| (command, oob)).map_err(|error| (error, oob))
    }

    /// Carries out what is the session's own, and hands out the rest.
    fn begin(&mut self, command: Command, id: Id) {
        let outcome = match command {
            Command::Capabilities { .. } if self.negotiated => {
                Err(QmpError::not_found("Capabilities negotiation is already complete, command ignored"))
            }
            Command::Capabilities { oob } => {
                (self.negotiated, self.oob) = (true, oob);
                super::done()
            }
            Command::QueryVersion => Ok(version()),
            Command::QueryCommands => {
                let name = |name: &&str| json!({"name": name});
                Ok(Value::Array(self.commands.iter().chain([&CAPABILITIES]).map(name).collect()))
            }
            command => {
                self.under_way = Some(self.tickets);
                return self.hand_out(command, id);
            }
        };
        self.reply(outcome, id);
    }

    fn hand_out(&mut self, command: Command, id: Id) {
        self.owed.insert(self.tickets, id);
        self.orders.push_back(Order { ticket: self.tickets, command });
        self.tickets += 1;
    }

    /// The members in QEMU's order.
    fn reply(&mut self, outcome: Outcome, id: Id) {
        match outcome {
            Ok(value) => {
                let members = [("return", &value)].into_iter().chain(id.as_ref().map(|id| ("id", id)));
                self.say(&members.collect::<Vec<_>>());
            }
            Err(QmpError { class, desc }) => {
                let mut error = Vec::new();
                let (class, desc) = (Value::from(class.name()), Value::from(desc));
                encode_members([("class", &class), ("desc", &desc)], &mut error);
                let mut line = b"{".to_vec();
                if let Some(id) = id {
                    line.extend_from_slice(b"\"id\": ");
                    encode(&id, &mut line);
                    line.extend_from_slice(b", ");
                }
                line.extend_from_slice(b"\"error\": ");
                self.output.extend_from_slice(&[&line[..], &error, b"}\r\n"].concat());
            }
        }
    }

    fn say(&mut self, members: &[(&str, &Value)]) {
        let mut line = Vec::new();
        encode_members(members.iter().copied(), &mut line);
        line.extend_from_slice(b"\r\n");
        self.output.extend_from_slice(&line);
    }
}

fn version() -> Value {
    let [major, minor, micro] = VERSION;
    json!({"qemu": {"major": major, "minor": minor, "micro": micro}, "package": PACKAGE})
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("negotiated", &self.negotiated)
            .field("owed", &self.owed)
            .finish_non_exhaustive()
    }
}
