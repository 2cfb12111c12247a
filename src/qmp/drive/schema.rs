//! What may stand beside what in a drive's options: QEMU's schema of the drivers that are known here.
//!
//! An option that QEMU's driver does not have is refused in QEMU's words, by JSON (`blockdev-add`) others than by options
//! (`-drive`, `drive_add`). The trap is an option that QEMU has and would heed and that nobody here does: passed over, an
//! image would be served from another byte than was asked for, or written to though it was to be read only. So it is
//! refused too, unless it is switched off. Hints that only make QEMU slower or faster are passed over.
//!
//! Source: QEMU 7.2 `qapi/block-core.json`, BlockdevOptions; `block.c`, bdrv_open_inherit; `blockdev.c`.

use super::Options;

/// Hints of every node.
const HINTS: &[&str] = &[
    "driver",
    "node-name",
    "discard",
    "cache.direct",
    "cache.no-flush",
    "auto-read-only",
    "force-share",
    "detect-zeroes",
];
/// What only `-drive` and `drive_add` have: where QEMU would plug the drive in, and more hints.
const OF_DRIVES: &[&str] = &[
    "if",
    "index",
    "bus",
    "unit",
    "media",
    "id",
    "format",
    "file",
    "cache",
    "cache.writeback",
    "aio",
    "werror",
    "rerror",
    "locking",
    "server",
    "host",
    "port",
    "path",
    "filename",
];
/// What of every node, or of some, would have to be heeded.
const UNHEEDED: &[&str] = &["read-only"];

/// Which words are used for what is wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// `blockdev-add`
    Json,
    /// `-drive`, `drive_add`
    Text,
}

/// A driver's own options: those that are heeded or are hints, and those that would have to be heeded.
fn own(driver: &str) -> Option<(&'static [&'static str], &'static [&'static str])> {
    Some(match driver {
        "raw" => (&["file"], &["offset", "size"]),
        "file" => (&["filename", "aio", "locking", "drop-cache", "aio-max-batch"], &["pr-manager"]),
        "nbd" => (&["export", "reconnect-delay", "open-timeout"], &["tls-creds", "tls-hostname", "x-dirty-bitmap"]),
        "quorum" => (&["vote-threshold", "read-pattern"], &["blkverify", "rewrite-corrupted"]),
        "replication" => (&["file", "mode", "top-id"], &[]),
        _ => return None,
    })
}

/// Members of an NBD server's address.
const OF_SERVERS: &[&str] =
    &["type", "host", "port", "path", "numeric", "to", "ipv4", "ipv6", "keep-alive", "mptcp", "abstract", "tight"];

/// A dotted key as QEMU's visitor writes it: `children[0].file`.
fn place(key: &str) -> String {
    let mut place = String::new();
    for part in key.split('.') {
        match part.parse::<usize>() {
            Ok(index) if !place.is_empty() => place.push_str(&format!("[{index}]")),
            _ if place.is_empty() => place.push_str(part),
            _ => place.push_str(&format!(".{part}")),
        }
    }
    place
}

impl Options {
    /// What QEMU's schema wants of `blockdev-add`, in its words: they are others than those for options.
    pub(super) fn check_schema(&self) -> Result<(), String> {
        self.check_node("")
    }

    /// A node at a place, with the nodes in it.
    fn check_node(&self, at: &str) -> Result<(), String> {
        let missing = |name: &str| Err(format!("Parameter '{}' is missing", place(&format!("{at}{name}"))));
        let get = |name: &str| self.get(&format!("{at}{name}"));
        let Some(driver) = get("driver") else { return missing("driver") };
        let known: &[&str] = if at.is_empty() {
            &["replication", "quorum", "nbd", "raw", "file"]
        } else {
            &["nbd", "raw", "file", "qcow2"]
        };
        if !known.contains(&driver) {
            return Err(format!("Parameter 'driver' does not accept value '{driver}'"));
        }
        // A secondary's overlays are memory here, whatever they would be made of.
        if driver == "qcow2" {
            return Ok(());
        }
        let has = |name: &str| {
            let (one, below) = (format!("{at}{name}"), format!("{at}{name}."));
            self.0.keys().any(|key| *key == one || key.starts_with(&below))
        };
        let needed: &[&str] = match driver {
            "replication" => &["file", "mode"],
            "raw" => &["file"],
            "file" => &["filename"],
            "nbd" => &["server"],
            _ => &["children", "vote-threshold"],
        };
        for name in needed {
            if !has(name) {
                return missing(name);
            }
            match *name {
                // A name, or a node of its own.
                "file" if get("file").is_none() => self.check_node(&format!("{at}file."))?,
                "children" => {
                    let nodes = (0..).map(|child| format!("{at}children.{child}"));
                    let nodes = nodes.take_while(|child| self.0.keys().any(|key| key.starts_with(child)));
                    for child in nodes.filter(|child| self.get(child).is_none()) {
                        self.check_node(&format!("{child}."))?;
                    }
                }
                "server" => {
                    let kind = get("server.type");
                    let Some(kind) = kind else { return missing("server.type") };
                    let parts: &[&str] = match kind {
                        "unix" => &["path"],
                        "inet" => &["host", "port"],
                        other => return Err(format!("addresses of type '{other}' are not supported here")),
                    };
                    if let Some(part) = parts.iter().find(|part| get(&format!("server.{part}")).is_none()) {
                        return missing(&format!("server.{part}"));
                    }
                }
                _ => {}
            }
        }
        self.check_names(at, driver, From::Json)
    }

    /// Every option of a node is one that it has.
    pub(super) fn check_names(&self, at: &str, driver: &str, from: From) -> Result<(), String> {
        // What is none is told by whoever looks for it.
        let Some((own, unheeded)) = own(driver) else { return Ok(()) };
        for (key, value) in &self.0 {
            let Some(name) = key.strip_prefix(at) else { continue };
            let is_inner = match driver {
                "raw" | "replication" => name.starts_with("file."),
                "quorum" => name.starts_with("children."),
                "nbd" => name.strip_prefix("server.").is_some_and(|part| OF_SERVERS.contains(&part)),
                _ => false,
            };
            let of_drives = from == From::Text && OF_DRIVES.contains(&name);
            if is_inner || HINTS.contains(&name) || own.contains(&name) || of_drives {
                continue;
            }
            // Of what is no structure of QEMU's the first part is one too many.
            let parts = if name.starts_with("server.") || name.starts_with("cache.") { 2 } else { 1 };
            let name = name.split('.').take(parts).collect::<Vec<_>>().join(".");
            let place = place(&format!("{at}{name}"));
            let name = name.as_str();
            if unheeded.contains(&name) || UNHEEDED.contains(&name) {
                if value != "off" {
                    return Err(format!("Parameter '{place}' is not supported here"));
                }
                continue;
            }
            return Err(match (from, driver) {
                (From::Json, _) => format!("Parameter '{place}' is unexpected"),
                (From::Text, "nbd" | "file") => {
                    format!("Block protocol '{driver}' doesn't support the option '{name}'")
                }
                (From::Text, _) => format!("Block format '{driver}' does not support the option '{name}'"),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Drive;
    use serde_json::{Value, json};

    fn refused(arguments: Value) -> String {
        Drive::of_json(&arguments).expect_err(&arguments.to_string())
    }

    /// As QEMU says it; `tests/qmp_words.rs` asks it.
    #[test]
    fn an_option_that_a_driver_has_not_is_named_with_its_place() {
        let server = json!({"type": "unix", "path": "/s"});
        for (arguments, name) in [
            (json!({"driver": "raw", "node-name": "x", "file": "f", "zork": 1}), "zork"),
            (json!({"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "f", "z": 1}}), "file.z"),
            (json!({"driver": "nbd", "node-name": "x", "server": server, "exprot": "e"}), "exprot"),
            (json!({"driver": "nbd", "node-name": "x", "server": {"type": "unix", "path": "/s", "z": 1}}), "server.z"),
            (
                json!({"driver": "quorum", "node-name": "x", "vote-threshold": 1,
                       "children": [{"driver": "file", "filename": "f", "z": {"deep": 1}}]}),
                "children[0].z",
            ),
            (
                json!({"driver": "replication", "mode": "primary", "node-name": "x",
                       "file": {"driver": "nbd", "server": server, "z": 1}}),
                "file.z",
            ),
        ] {
            assert_eq!(refused(arguments), format!("Parameter '{name}' is unexpected"));
        }
    }

    #[test]
    fn what_would_have_to_be_heeded_is_refused_and_hints_are_not() {
        let raw = |key: &str, value: Value| json!({"driver": "raw", "node-name": "x", "file": "f", key: value});
        assert_eq!(refused(raw("offset", json!(512))), "Parameter 'offset' is not supported here");
        assert_eq!(refused(raw("read-only", json!(true))), "Parameter 'read-only' is not supported here");
        for (key, value) in [
            ("read-only", json!(false)),
            ("discard", json!("unmap")),
            ("cache", json!({"direct": true})),
            ("auto-read-only", json!(true)),
        ] {
            assert!(Drive::of_json(&raw(key, value)).is_ok(), "{key}");
        }
        let file = json!({"driver": "file", "node-name": "x", "filename": "f", "aio": "io_uring", "locking": "off"});
        assert!(Drive::of_json(&file).is_ok());
    }

    #[test]
    fn options_as_text_are_told_in_the_words_for_them() {
        let said = |options: &str, node_only| Drive::parse(options, node_only).expect_err(options);
        let quorum = "id=d,driver=quorum,vote-threshold=1,children.0=a,zork=1";
        assert_eq!(said(quorum, false), "Block format 'quorum' does not support the option 'zork'");
        let nbd = "node-name=n,driver=replication,mode=primary,file.driver=nbd,file.host=h,file.zork=1";
        assert_eq!(said(nbd, true), "Block protocol 'nbd' doesn't support the option 'zork'");
        assert!(said("id=d,format=raw,file=/f,read-only=on", false).contains("'read-only' is not supported here"));
    }
}
