//! What QEMU's options say of a drive: those of `-drive` and `drive_add`, and the same as the JSON of `blockdev-add`.
//!
//! ```text
//!   driver=quorum,children.0.file.filename=a.img     {"driver": "quorum", "children": [{"file": {"filename": "a.img"}}]}
//!                          └──────────────▶ options, by dotted key ◀──────────────┘ ─▶ Drive
//! ```
//!
//! Only what replication is made of is known: raw images, quorums of one, replication nodes, and NBD clients below them.
//! The trap: `file.host` and `file.server.host` are the same to QEMU's NBD client, and libxl writes the older one.
//!
//! Source: QEMU 7.2 `block/quorum.c`, `block/replication.c`, `block/nbd.c`, `util/keyval.c`.

mod schema;

use self::schema::From;
use super::commands::Listen;
use serde_json::Value;
use std::collections::BTreeMap;

/// Longest name of a drive, in bytes: QEMU's bound for node names.
const NAME_MAX_BYTES: usize = 31;
/// QEMU's port of NBD where none is given.
const NBD_PORT: &str = "10809";

/// An export of an NBD server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Server {
    /// Where.
    pub at: Listen,
    /// Its name.
    pub export: String,
    /// What the client is called, to be yanked by.
    pub client: Option<String>,
}

/// What a replication node of the primary writes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Below {
    /// A client of its own.
    Server(Server),
    /// The client of this name.
    Client(String),
}

/// What is under a quorum.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Child {
    /// A raw image.
    File(String),
    /// The drive of this name.
    Drive(String),
}

/// What a drive is, as far as replication goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Drive {
    /// A raw image.
    Image {
        /// Its name.
        name: String,
        /// Its file.
        file: String,
    },
    /// A guest's disk, to which a replication node can be added.
    Quorum {
        /// Its name.
        name: String,
        /// The guest's own image.
        child: Child,
    },
    /// A client of an export.
    Client {
        /// Its name.
        name: String,
        /// The export.
        server: Server,
    },
    /// The primary's end: writes go to an export.
    Primary {
        /// Its name.
        name: String,
        /// The export.
        below: Below,
    },
    /// The secondary's end: what the guest sees of an image that a primary writes to.
    Secondary {
        /// Its name.
        name: String,
        /// The name of the image.
        image: String,
    },
}

/// By dotted key.
#[derive(Default)]
struct Options(BTreeMap<String, String>);

impl Options {
    /// `a=1,b=x,,y` as `a` = `1` and `b` = `x,y`.
    fn of_text(text: &str) -> Self {
        let mut pieces = vec![String::new()];
        let mut rest = text.chars().peekable();
        while let Some(character) = rest.next() {
            match (character, pieces.last_mut()) {
                (',', Some(last)) if rest.next_if_eq(&',').is_some() => last.push(','),
                (',', _) => pieces.push(String::new()),
                (other, Some(last)) => last.push(other),
                (_, None) => {}
            }
        }
        let pair = |piece: &String| {
            let (key, value) = piece.split_once('=').unwrap_or((piece, "on"));
            (key.to_owned(), value.to_owned())
        };
        Self(pieces.iter().filter(|piece| !piece.is_empty()).map(pair).collect())
    }

    /// `{"a": {"b": [true]}}` as `a.b.0` = `on`. How deep it may be is bounded where it was read.
    fn flatten(&mut self, key: &str, value: &Value) {
        let below = |name: &dyn std::fmt::Display| {
            if key.is_empty() { name.to_string() } else { format!("{key}.{name}") }
        };
        match value {
            Value::Object(members) => members.iter().for_each(|(name, value)| self.flatten(&below(name), value)),
            Value::Array(values) => values.iter().enumerate().for_each(|(at, value)| self.flatten(&below(&at), value)),
            Value::String(text) => _ = self.0.insert(key.to_owned(), text.clone()),
            Value::Bool(flag) => _ = self.0.insert(key.to_owned(), if *flag { "on" } else { "off" }.into()),
            Value::Number(number) => _ = self.0.insert(key.to_owned(), number.to_string()),
            Value::Null => {}
        }
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// What stands below a key.
    fn below(&self, prefix: &str) -> Self {
        let inner = self.0.iter().filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value)));
        Self(inner.map(|(key, value)| (key.to_owned(), value.clone())).collect())
    }

    /// The file of a raw image.
    fn file(&self) -> Result<String, String> {
        let file = self.get("file.filename").or(self.get("file")).or(self.get("filename"));
        file.map(str::to_owned).ok_or_else(|| "A block device must be specified for \"file\"".into())
    }

    /// The export of an NBD client.
    fn server(&self, client: Option<&str>) -> Result<Server, String> {
        let get = |key: &str| self.get(&format!("server.{key}")).or(self.get(key)).map(str::to_owned);
        let at = match (get("path"), get("host")) {
            (Some(_), Some(_)) => return Err("path and host may not be used at the same time".into()),
            (Some(path), None) => Listen::Unix { path },
            (None, Some(host)) => Listen::Inet { host, port: get("port").unwrap_or_else(|| NBD_PORT.into()) },
            (None, None) => return Err("NBD server address missing".into()),
        };
        let export = self.get("export").unwrap_or_default().to_owned();
        Ok(Server { at, export, client: client.map(str::to_owned) })
    }

    /// Of options, every one is known; the first node's, and those of an NBD client or an image below it.
    fn check_text(&self) -> Result<(), String> {
        self.check_names("", self.driver(), From::Text)?;
        // Of a secondary's overlays nothing but what is below counts.
        if self.get("mode") == Some("secondary") {
            return Ok(());
        }
        for (at, default) in [("file.", "file"), ("children.0.", "raw"), ("children.0.file.", "file")] {
            let below = self.get(&format!("{at}driver")).unwrap_or(default);
            self.check_names(at, below, From::Text)?;
        }
        Ok(())
    }

    fn driver(&self) -> &str {
        self.get("driver").or(self.get("format")).unwrap_or("raw")
    }

    fn drive(&self, name: String) -> Result<Drive, String> {
        match self.driver() {
            "replication" => self.replication(name),
            "quorum" => self.quorum(name),
            "nbd" => {
                let server = self.server(Some(&name))?;
                Ok(Drive::Client { name, server })
            }
            "raw" | "file" => Ok(Drive::Image { name, file: self.file()? }),
            other => Err(format!("Unknown driver '{other}'")),
        }
    }

    fn replication(&self, name: String) -> Result<Drive, String> {
        match self.get("mode") {
            None => Err("Missing the option mode".into()),
            Some("primary") if self.get("top-id").is_some() => {
                Err("The primary side does not support option top-id".into())
            }
            Some("primary") => {
                let below = match (self.get("file"), self.get("file.driver")) {
                    (Some(client), _) => Below::Client(client.to_owned()),
                    (None, Some("nbd")) => {
                        let file = self.below("file.");
                        Below::Server(file.server(file.get("node-name"))?)
                    }
                    (None, Some(other)) => {
                        return Err(format!(
                            "a primary writes to the secondary's export: file.driver=nbd, not {other}"
                        ));
                    }
                    (None, None) => return Err("A block device must be specified for \"file\"".into()),
                };
                Ok(Drive::Primary { name, below })
            }
            Some("secondary") if self.get("top-id").is_none() => Err("Missing the option top-id".into()),
            Some("secondary") => {
                // Active and hidden disk are files of QEMU's; here they are layers, and only what is below counts.
                let image = self.get("file.backing.backing").or(self.get("file.backing"));
                let has_hidden = self.0.keys().any(|key| key.starts_with("file.backing"));
                let whose = if has_hidden { "Hidden" } else { "Active" };
                let image = image.ok_or_else(|| format!("{whose} disk doesn't have backing file"))?;
                Ok(Drive::Secondary { name, image: image.to_owned() })
            }
            Some(_) => Err("The option mode's value should be primary or secondary".into()),
        }
    }

    /// One child, which every read is answered by: others come by `x-blockdev-change`.
    fn quorum(&self, name: String) -> Result<Drive, String> {
        match self.get("vote-threshold").map(str::parse::<u32>) {
            Some(Ok(1)) => {}
            Some(Ok(2..)) => return Err("threshold may not exceed children count".into()),
            _ => return Err("Parameter 'vote-threshold' expects a value >= 1".into()),
        }
        if !matches!(self.get("read-pattern"), None | Some("fifo" | "quorum")) {
            return Err("Please set read-pattern as fifo or quorum".into());
        }
        if self.0.keys().any(|key| key.starts_with("children.1")) {
            return Err("a quorum has one child here; x-blockdev-change adds the other".into());
        }
        if let Some(drive) = self.get("children.0") {
            return Ok(Drive::Quorum { name, child: Child::Drive(drive.to_owned()) });
        }
        let child = self.below("children.0.");
        if child.0.is_empty() {
            return Err("Number of provided children must be 1 or more".into());
        }
        match child.get("driver").unwrap_or("raw") {
            "raw" | "file" => Ok(Drive::Quorum { name, child: Child::File(child.file()?) }),
            other => Err(format!("children.0.driver is '{other}': images are raw here")),
        }
    }
}

/// Checks a name as QEMU does.
fn named(name: Option<&str>, missing: &str) -> Result<String, String> {
    let Some(name) = name else { return Err(missing.into()) };
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(fits) {
        return Err(format!("Invalid node-name: '{name}'"));
    }
    if name.len() > NAME_MAX_BYTES {
        return Err("Node name too long".into());
    }
    Ok(name.to_owned())
}

impl Drive {
    /// Reads the options of `-drive` and `drive_add`.
    pub fn parse(text: &str, node_only: bool) -> Result<Self, String> {
        let options = Options::of_text(text);
        let name = if node_only {
            named(options.get("node-name"), "'node-name' needs to be specified")
        } else {
            named(options.get("id").or(options.get("node-name")), "'id' needs to be specified")
        };
        options.check_text()?;
        options.drive(name?)
    }

    /// Reads the arguments of `blockdev-add`.
    pub fn of_json(arguments: &Value) -> Result<Self, String> {
        let mut options = Options::default();
        options.flatten("", arguments);
        options.check_schema()?;
        let name = named(options.get("node-name"), "'node-name' must be specified for the root node")?;
        options.drive(name)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Image { name, .. }
            | Self::Quorum { name, .. }
            | Self::Client { name, .. }
            | Self::Primary { name, .. }
            | Self::Secondary { name, .. } => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn inet(host: &str, port: &str) -> Listen {
        Listen::Inet { host: host.into(), port: port.into() }
    }

    #[test]
    fn the_primarys_node_as_libxl_and_the_documents_write_it() {
        let below = |at, client: Option<&str>| {
            Below::Server(Server { at, export: "disk0".into(), client: client.map(str::to_owned) })
        };
        let primary = |name: &str, below| Ok(Drive::Primary { name: name.into(), below });
        let libxl = "driver=replication,mode=primary,file.driver=nbd,file.host=b,file.port=9999,file.export=disk0,\
                     node-name=colo_node768";
        assert_eq!(Drive::parse(libxl, true), primary("colo_node768", below(inet("b", "9999"), None)));
        let of_json = |arguments: Value| Drive::of_json(&arguments);
        let server = json!({"type": "unix", "path": "/run/a,b"});
        let file = json!({"driver": "nbd", "node-name": "nbd0", "server": server, "export": "disk0"});
        let node = json!({"driver": "replication", "mode": "primary", "node-name": "r", "file": file});
        assert_eq!(of_json(node), primary("r", below(Listen::Unix { path: "/run/a,b".into() }, Some("nbd0"))));
        let node = json!({"driver": "replication", "mode": "primary", "node-name": "r", "file": "nbd0"});
        assert_eq!(of_json(node), primary("r", Below::Client("nbd0".into())));
        for (options, why) in [
            ("file.driver=null-co", "the secondary's export"),
            ("file.driver=nbd", "NBD server address missing"),
            ("file.driver=nbd,file.path=/a,file.host=b", "at the same time"),
            ("top-id=x", "does not support option top-id"),
            ("discard=off", "must be specified for \"file\""),
        ] {
            let said = Drive::parse(&format!("node-name=r,driver=replication,mode=primary,{options}"), true);
            assert!(said.as_ref().is_err_and(|said| said.contains(why)), "{options}: {said:?}");
        }
    }

    #[test]
    fn a_secondarys_layers_need_a_disk_below_them() {
        let parse = |options: &str| Drive::parse(&format!("id=top,driver=replication,mode=secondary{options}"), false);
        let layers =
            ",top-id=top,file.driver=qcow2,file.file.filename=a,file.backing.driver=qcow2,file.backing.file.filename=h";
        let whole = parse(&format!("{layers},file.backing.backing=disk0"));
        assert_eq!(whole, Ok(Drive::Secondary { name: "top".into(), image: "disk0".into() }));
        for (options, why) in [
            (layers, "Hidden disk doesn't have backing file"),
            (",top-id=top,file.driver=qcow2,file.file.filename=a", "Active disk doesn't have backing file"),
            ("", "Missing the option top-id"),
        ] {
            assert_eq!(parse(options), Err(why.into()), "{options}");
        }
    }

    #[test]
    fn a_quorum_of_one_as_libxl_writes_it() {
        let libxl = "if=ide,index=0,media=disk,cache=writeback,driver=quorum,id=disk0,children.0.file.filename=/a,,b,\
                     children.0.driver=raw,read-pattern=fifo,vote-threshold=1";
        let quorum = |child| Ok(Drive::Quorum { name: "disk0".into(), child });
        assert_eq!(Drive::parse(libxl, false), quorum(Child::File("/a,b".into())));
        let same = json!({"driver": "quorum", "node-name": "disk0", "vote-threshold": 1, "children": ["top"]});
        assert_eq!(Drive::of_json(&same), quorum(Child::Drive("top".into())));
        for (options, why) in [
            ("children.0=a", "expects a value >= 1"),
            ("vote-threshold=2,children.0=a", "may not exceed children count"),
            ("vote-threshold=1", "Number of provided children"),
            ("vote-threshold=1,read-pattern=x,children.0=a", "fifo or quorum"),
            ("vote-threshold=1,children.0=a,children.1=b", "x-blockdev-change adds the other"),
            ("vote-threshold=1,children.0.driver=qcow2,children.0.file.filename=a", "images are raw here"),
        ] {
            let said = Drive::parse(&format!("id=d,driver=quorum,{options}"), false);
            assert!(said.as_ref().is_err_and(|said| said.contains(why)), "{options}: {said:?}");
        }
    }
}
