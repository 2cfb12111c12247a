//! The lines for people that programs send through `human-monitor-command`, and QEMU's `key=value` options in them.
//!
//! Only what libxl and the COLO documents send is known: `drive_add [-n] BUS OPTIONS` and `drive_del ID`.
//!
//! The trap is the channel's own: what goes wrong with a line is said in what the command *returns*, and is no error.
//! libxl does not look, and finds out from the next command.
//!
//! Source: QEMU 7.2 `hmp-commands.hx`, `block/monitor/block-hmp-cmds.c`, `block/replication.c`; libxl `libxl_qmp.c`.

use std::collections::BTreeMap;

/// Longest name of a drive, in bytes: QEMU's bound for node names.
const NAME_MAX_BYTES: usize = 31;

/// A line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line {
    /// `drive_add`
    DriveAdd {
        /// With `-n`: a node, and no drive.
        node_only: bool,
        /// Or what is wrong with its options.
        drive: Result<Drive, String>,
    },
    /// `drive_del`
    DriveDel {
        /// Its name.
        id: String,
    },
    /// What is answered at once: nothing to an empty line, and what is wrong with any other.
    Answered(String),
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
    /// The primary's end: writes go to an export.
    Primary {
        /// Its name.
        name: String,
    },
    /// The secondary's end: what the guest sees of an image that a primary writes to.
    Secondary {
        /// Its name.
        name: String,
        /// The name of the image.
        image: String,
    },
}

impl Line {
    /// Reads a line.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let mut words = line.split_ascii_whitespace();
        let help = |name: &str, what: &str| {
            Self::Answered(format!("{name}: {what}\r\nTry \"help {name}\" for more information\r\n"))
        };
        match words.next() {
            None => Self::Answered(String::new()),
            Some("drive_add") => {
                let mut words = words.peekable();
                let node_only = words.next_if_eq(&"-n").is_some();
                match (words.next(), words.next(), words.next()) {
                    (Some(_), Some(options), None) => {
                        Self::DriveAdd { node_only, drive: Drive::parse(options, node_only) }
                    }
                    (Some(_), Some(_), Some(_)) => help("drive_add", "extraneous characters at the end of line"),
                    _ => help("drive_add", "string expected"),
                }
            }
            Some("drive_del") => match (words.next(), words.next()) {
                (Some(id), None) => Self::DriveDel { id: id.to_owned() },
                (Some(_), Some(_)) => help("drive_del", "extraneous characters at the end of line"),
                (None, _) => help("drive_del", "block device name expected"),
            },
            Some(other) => Self::Answered(format!("unknown command: '{other}'\r\n")),
        }
    }
}

/// `a=1,b=x,,y` as `a` = `1` and `b` = `x,y`.
fn options(text: &str) -> BTreeMap<String, String> {
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
    pieces.iter().filter(|piece| !piece.is_empty()).map(pair).collect()
}

impl Drive {
    /// Reads the options of `-drive` and `drive_add`, those of replication and of raw images.
    pub fn parse(text: &str, node_only: bool) -> Result<Self, String> {
        let options = options(text);
        let get = |key: &str| options.get(key).map(String::as_str);
        let name = if node_only { get("node-name") } else { get("id").or(get("node-name")) };
        let Some(name) = name else {
            return Err(format!("'{}' needs to be specified", if node_only { "node-name" } else { "id" }));
        };
        let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(fits) {
            return Err(format!("Invalid node-name: '{name}'"));
        }
        if name.len() > NAME_MAX_BYTES {
            return Err("Node name too long".into());
        }
        let name = name.to_owned();
        match get("driver").or(get("format")).unwrap_or("raw") {
            "replication" => match get("mode") {
                None => Err("Missing the option mode".into()),
                Some("primary") if get("top-id").is_some() => {
                    Err("The primary side does not support option top-id".into())
                }
                Some("primary") => Ok(Self::Primary { name }),
                Some("secondary") if get("top-id").is_none() => Err("Missing the option top-id".into()),
                Some("secondary") => {
                    // Active and hidden disk are files of QEMU's; here they are layers, and only what is below counts.
                    let image = get("file.backing.backing").or(get("file.backing"));
                    let image = image.ok_or("Hidden disk doesn't have backing file")?;
                    Ok(Self::Secondary { name, image: image.to_owned() })
                }
                Some(_) => Err("The option mode's value should be primary or secondary".into()),
            },
            "raw" | "file" => {
                let file = get("file.filename").or(get("file")).or(get("filename"));
                let file = file.ok_or("A block device must be specified for \"file\"")?;
                Ok(Self::Image { name, file: file.to_owned() })
            }
            other => Err(format!("Unknown driver '{other}'")),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Image { name, .. } | Self::Primary { name } | Self::Secondary { name, .. } => name,
        }
    }
}
