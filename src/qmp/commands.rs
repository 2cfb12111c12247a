//! What can be ordered, and QEMU's words for an order that is not well-formed.
//!
//! Arguments are taken in the order of QEMU's schema, so that of several mistakes the same one is named. Nothing is
//! done before all of them are right.
//!
//! Source: QEMU 7.2 `qapi/migration.json`, `qapi/block-export.json`, `qapi/yank.json`, `qapi/qapi-visit-core.c`.

use super::drive::Drive;
use super::lines::Line;
use super::{Class, QmpError};
use serde_json::{Map, Value};

/// Longest name of an export, in bytes: NBD's bound for strings.
pub const EXPORT_NAME_MAX_BYTES: usize = 4096;

/// Where an NBD server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Listen {
    /// A host and a port, a number or a service's name.
    Inet {
        /// Host.
        host: String,
        /// Port.
        port: String,
    },
    /// A Unix socket.
    Unix {
        /// Its path.
        path: String,
    },
}

/// An export to be made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportAdd {
    /// What it is deleted by.
    pub id: String,
    /// What is exported.
    pub node: String,
    /// Its name for NBD's clients.
    pub name: String,
    /// Its description for them.
    pub description: String,
    /// Whether they may write.
    pub writable: bool,
    /// `nbd-server-add` calls its node a device, and serves one that cannot be written read-only.
    pub legacy: bool,
}

/// A connection, or something like it, that can be pulled out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct YankInstance {
    /// `block-node`, `chardev` or `migration`.
    pub kind: String,
    /// Which.
    pub name: String,
}

/// An order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// `xen-set-replication`
    SetReplication {
        /// Start it, or stop it.
        enable: bool,
        /// On the primary; means nothing when it stops.
        primary: bool,
        /// Stop it by taking over. Only when it stops.
        failover: bool,
    },
    /// `query-xen-replication-status`
    QueryReplicationStatus,
    /// `xen-colo-do-checkpoint`
    DoCheckpoint,
    /// `query-colo-status`
    QueryColoStatus,
    /// `x-colo-lost-heartbeat`
    LostHeartbeat,
    /// `nbd-server-start`
    NbdStart {
        /// Where.
        listen: Listen,
        /// Clients at the same time; 0 for any number.
        max_connections: u32,
    },
    /// `nbd-server-add`, `block-export-add`
    ExportAdd(ExportAdd),
    /// `nbd-server-remove`, `block-export-del`
    ExportDel {
        /// Which.
        id: String,
        /// Whether its clients are hung up on.
        hard: bool,
    },
    /// `nbd-server-stop`
    NbdStop,
    /// `x-blockdev-change`
    BlockdevChange {
        /// Whose children.
        parent: String,
        /// The child that goes.
        child: Option<String>,
        /// The node that comes.
        node: Option<String>,
    },
    /// `blockdev-add`: the drive, or what is wrong with it
    BlockdevAdd(Result<Drive, String>),
    /// `blockdev-del`
    BlockdevDel {
        /// Which.
        node: String,
    },
    /// `human-monitor-command`
    Line(Line),
    /// `migrate-set-parameters`, of which one is known
    SetParameters {
        /// Longest time between two checkpoints, in ms.
        checkpoint_delay_ms: Option<u32>,
    },
    /// `query-status`
    QueryStatus,
    /// `stop`
    Stop,
    /// `cont`
    Cont,
    /// `xen-set-global-dirty-log`
    SetGlobalDirtyLog {
        /// On or off.
        enable: bool,
    },
    /// `query-replication`, our own: all there is to say
    QueryReplication,
    /// `yank`
    Yank(Vec<YankInstance>),
    /// `query-yank`
    QueryYank,
    /// `query-block-jobs`
    QueryBlockJobs,
    /// `quit`
    Quit,
    /// `qmp_capabilities`, which the session carries out
    Capabilities {
        /// Whether out-of-band orders are wanted.
        oob: bool,
    },
    /// `query-version`, which the session carries out
    QueryVersion,
    /// `query-commands`, which the session carries out
    QueryCommands,
}

type Decode = fn(&mut Arguments) -> Result<Command, QmpError>;

/// Every command: its name, whether it may be sent out of band, and how its arguments are read.
const TABLE: [(&str, bool, Decode); 28] = [
    ("xen-set-replication", false, set_replication),
    ("query-xen-replication-status", false, |_| Ok(Command::QueryReplicationStatus)),
    ("xen-colo-do-checkpoint", false, |_| Ok(Command::DoCheckpoint)),
    ("query-colo-status", false, |_| Ok(Command::QueryColoStatus)),
    ("x-colo-lost-heartbeat", false, |_| Ok(Command::LostHeartbeat)),
    ("nbd-server-start", false, nbd_start),
    ("nbd-server-add", false, nbd_add),
    ("nbd-server-remove", false, |from| export_del(from, "name")),
    ("nbd-server-stop", false, |_| Ok(Command::NbdStop)),
    ("block-export-add", false, export_add),
    ("block-export-del", false, |from| export_del(from, "id")),
    ("x-blockdev-change", false, |from| {
        let parent = from.text("parent")?;
        Ok(Command::BlockdevChange { parent, child: from.text_if("child")?, node: from.text_if("node")? })
    }),
    // What belongs to a drive depends on its driver.
    ("blockdev-add", false, |from| {
        let drive = Drive::of_json(&Value::Object(std::mem::take(&mut from.members)));
        Ok(Command::BlockdevAdd(drive))
    }),
    ("blockdev-del", false, |from| Ok(Command::BlockdevDel { node: from.text("node-name")? })),
    ("human-monitor-command", false, |from| {
        let line = from.text("command-line")?;
        from.integer_if("cpu-index", i64::MIN, i64::MAX, "integer")?;
        Ok(Command::Line(Line::parse(&line)))
    }),
    ("migrate-set-parameters", false, |from| {
        Ok(Command::SetParameters { checkpoint_delay_ms: from.number_if("x-checkpoint-delay")? })
    }),
    ("query-status", false, |_| Ok(Command::QueryStatus)),
    ("stop", false, |_| Ok(Command::Stop)),
    ("cont", false, |_| Ok(Command::Cont)),
    ("xen-set-global-dirty-log", false, |from| Ok(Command::SetGlobalDirtyLog { enable: from.flag("enable")? })),
    ("query-replication", false, |_| Ok(Command::QueryReplication)),
    ("yank", true, yank),
    ("query-yank", true, |_| Ok(Command::QueryYank)),
    ("query-block-jobs", false, |_| Ok(Command::QueryBlockJobs)),
    ("quit", false, |_| Ok(Command::Quit)),
    (CAPABILITIES, false, capabilities),
    ("query-version", false, |_| Ok(Command::QueryVersion)),
    ("query-commands", false, |_| Ok(Command::QueryCommands)),
];

/// What begins a session.
pub const CAPABILITIES: &str = "qmp_capabilities";

/// Whether a command may be sent out of band; None if there is no such command.
#[must_use]
pub fn may_overtake(name: &str) -> Option<bool> {
    TABLE.iter().find(|(known, ..)| *known == name).map(|(_, oob, _)| *oob)
}

/// Reads a command's arguments.
pub fn decode(name: &str, arguments: Map<String, Value>) -> Result<Command, QmpError> {
    let Some((_, _, decode)) = TABLE.iter().find(|(known, ..)| *known == name) else {
        return Err(QmpError::not_found(format!("The command {name} has not been found")));
    };
    let mut arguments = Arguments { path: String::new(), members: arguments };
    let command = decode(&mut arguments)?;
    arguments.end()?;
    // What the schema cannot say is said behind it.
    match &command {
        Command::ExportAdd(ExportAdd { name, .. }) if name.len() > EXPORT_NAME_MAX_BYTES => {
            Err(QmpError::generic(format!("export name '{name}' too long")))
        }
        _ => Ok(command),
    }
}

/// The members of an object, which are taken one after another.
struct Arguments {
    /// Where the object is, with a dot behind it.
    path: String,
    members: Map<String, Value>,
}

impl Arguments {
    fn of(path: &str, value: Value) -> Result<Self, QmpError> {
        match value {
            Value::Object(members) => Ok(Self { path: format!("{path}."), members }),
            _ => Err(wrong_type(path, "object")),
        }
    }

    fn any(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name)
    }

    fn missing<T>(&self, name: &str) -> Result<T, QmpError> {
        Err(QmpError::generic(format!("Parameter '{}{name}' is missing", self.path)))
    }

    fn flag(&mut self, name: &str) -> Result<bool, QmpError> {
        self.flag_if(name)?.map_or_else(|| self.missing(name), Ok)
    }

    fn flag_if(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.any(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(wrong_type(&format!("{}{name}", self.path), "boolean")),
        }
    }

    fn text(&mut self, name: &str) -> Result<String, QmpError> {
        self.text_if(name)?.map_or_else(|| self.missing(name), Ok)
    }

    fn text_if(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        match self.any(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(&format!("{}{name}", self.path), "string")),
        }
    }

    /// One of a few words. QEMU names the member here without its place.
    fn word(&mut self, name: &str, words: &[&'static str]) -> Result<&'static str, QmpError> {
        self.word_if(name, words)?.map_or_else(|| self.missing(name), Ok)
    }

    fn word_if(&mut self, name: &str, words: &[&'static str]) -> Result<Option<&'static str>, QmpError> {
        let Some(word) = self.text_if(name)? else { return Ok(None) };
        let known = words.iter().find(|known| **known == word);
        let unknown = || QmpError::generic(format!("Parameter '{name}' does not accept value '{word}'"));
        known.copied().map(Some).ok_or_else(unknown)
    }

    fn number_if(&mut self, name: &str) -> Result<Option<u32>, QmpError> {
        let number = self.integer_if(name, 0, i64::from(u32::MAX), "uint32_t")?;
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    fn integer_if(&mut self, name: &str, min: i64, max: i64, bounds: &str) -> Result<Option<i64>, QmpError> {
        let expects = |what| Err(QmpError::generic(format!("Parameter '{}{name}' expects {what}", self.path)));
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Number(number)) if number.is_f64() => expects("uint64"),
            Some(Value::Number(number)) => match number.as_i64() {
                Some(number) if (min..=max).contains(&number) => Ok(Some(number)),
                _ => expects(bounds),
            },
            Some(_) => expects("uint64"),
        }
    }

    fn list(&mut self, name: &str) -> Result<Vec<Self>, QmpError> {
        let path = format!("{}{name}", self.path);
        let Some(list) = self.any(name) else { return self.missing(name) };
        let Value::Array(list) = list else { return Err(wrong_type(&path, "array")) };
        list.into_iter().enumerate().map(|(at, value)| Self::of(&format!("{path}[{at}]"), value)).collect()
    }

    fn object(&mut self, name: &str) -> Result<Self, QmpError> {
        let Some(value) = self.any(name) else { return self.missing(name) };
        Self::of(&format!("{}{name}", self.path), value)
    }

    /// Nobody wants what is left.
    fn end(&self) -> Result<(), QmpError> {
        let unexpected = |name| QmpError::generic(format!("Parameter '{}{name}' is unexpected", self.path));
        self.members.keys().next().map_or(Ok(()), |name| Err(unexpected(name)))
    }
}

fn wrong_type(path: &str, expected: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter type for '{path}', expected: {expected}"))
}

fn set_replication(from: &mut Arguments) -> Result<Command, QmpError> {
    let (enable, primary, failover) = (from.flag("enable")?, from.flag("primary")?, from.flag_if("failover")?);
    from.end()?;
    if enable && failover.is_some() {
        return Err(QmpError::generic("Parameter 'failover' is only for stopping replication"));
    }
    Ok(Command::SetReplication { enable, primary, failover: failover.unwrap_or(false) })
}

fn nbd_start(from: &mut Arguments) -> Result<Command, QmpError> {
    let mut addr = from.object("addr")?;
    let kind = addr.word("type", &["inet", "unix", "vsock", "fd"])?;
    let mut data = addr.object("data")?;
    let listen = match kind {
        "inet" => {
            let listen = Listen::Inet { host: data.text("host")?, port: data.text("port")? };
            // Where else to look, and how: the one address is enough here.
            for flag in ["numeric", "keep-alive", "ipv4", "ipv6", "mptcp"] {
                data.flag_if(flag)?;
            }
            data.number_if("to")?;
            listen
        }
        "unix" => Listen::Unix { path: data.text("path")? },
        other => return Err(QmpError::generic(format!("addresses of type '{other}' are not supported here"))),
    };
    data.end()?;
    addr.end()?;
    let credentials = from.text_if("tls-creds")?;
    from.text_if("tls-authz")?;
    let max_connections = from.number_if("max-connections")?.unwrap_or(0);
    from.end()?;
    if let Some(id) = credentials {
        return Err(QmpError::generic(format!("No TLS credentials with id '{id}'")));
    }
    Ok(Command::NbdStart { listen, max_connections })
}

fn nbd_add(from: &mut Arguments) -> Result<Command, QmpError> {
    let name = from.text_if("name")?;
    let description = from.text_if("description")?.unwrap_or_default();
    let node = from.text("device")?;
    let writable = from.flag_if("writable")?.unwrap_or(false);
    let bitmap = from.text_if("bitmap")?;
    from.end()?;
    no_bitmap(bitmap.as_deref())?;
    let name = name.unwrap_or_else(|| node.clone());
    Ok(Command::ExportAdd(ExportAdd { id: name.clone(), node, name, description, writable, legacy: true }))
}

fn no_bitmap(bitmap: Option<&str>) -> Result<(), QmpError> {
    bitmap.map_or(Ok(()), |bitmap| Err(QmpError::generic(format!("Bitmap '{bitmap}' is not found"))))
}

fn export_add(from: &mut Arguments) -> Result<Command, QmpError> {
    from.word("type", &["nbd"])?;
    let id = from.text("id")?;
    from.flag_if("fixed-iothread")?;
    from.text_if("iothread")?;
    let node = from.text("node-name")?;
    let writable = from.flag_if("writable")?.unwrap_or(false);
    from.flag_if("writethrough")?;
    let name = from.text_if("name")?.unwrap_or_else(|| node.clone());
    let description = from.text_if("description")?.unwrap_or_default();
    Ok(Command::ExportAdd(ExportAdd { id, node, name, description, writable, legacy: false }))
}

fn export_del(from: &mut Arguments, id: &str) -> Result<Command, QmpError> {
    let id = from.text(id)?;
    let hard = from.word_if("mode", &["safe", "hard"])? == Some("hard");
    Ok(Command::ExportDel { id, hard })
}

fn yank(from: &mut Arguments) -> Result<Command, QmpError> {
    let mut instances = Vec::new();
    for mut instance in from.list("instances")? {
        let kind = instance.word("type", &["block-node", "chardev", "migration"])?;
        let name = match kind {
            "block-node" => instance.text("node-name")?,
            "chardev" => instance.text("id")?,
            _ => String::new(),
        };
        instance.end()?;
        instances.push(YankInstance { kind: kind.to_owned(), name });
    }
    Ok(Command::Yank(instances))
}

/// What a yank of something that is not there is told.
#[must_use]
pub fn no_instance() -> QmpError {
    QmpError { class: Class::DeviceNotFound, desc: "Instance not found".into() }
}

fn capabilities(from: &mut Arguments) -> Result<Command, QmpError> {
    let mut oob = false;
    match from.any("enable") {
        None => {}
        Some(Value::Array(list)) => {
            for (at, value) in list.into_iter().enumerate() {
                match value {
                    Value::String(name) if name == "oob" => oob = true,
                    Value::String(name) => {
                        let why = format!("Parameter 'enable[{at}]' does not accept value '{name}'");
                        return Err(QmpError::generic(why));
                    }
                    _ => return Err(wrong_type(&format!("enable[{at}]"), "string")),
                }
            }
        }
        Some(_) => return Err(wrong_type("enable", "array")),
    }
    Ok(Command::Capabilities { oob })
}
