//! The lines for people that programs send through `human-monitor-command`.
//!
//! Only what libxl and the COLO documents send is known: `drive_add [-n] BUS OPTIONS` and `drive_del ID`.
//!
//! The trap is the channel's own: what goes wrong with a line is said in what the command *returns*, and is no error.
//! libxl does not look, and finds out from the next command.
//!
//! Source: QEMU 7.2 `hmp-commands.hx`, `block/monitor/block-hmp-cmds.c`; libxl `libxl_qmp.c`.

use super::drive::Drive;

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
