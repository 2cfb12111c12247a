//! What libxl and its save helper say to each other.
//!
//! ```text
//! libxl ── argv: what to save or restore, and on which descriptors ──▶ helper
//!       ◀── standard output: u16 length │ u16 number, arguments ──────
//!       ─── standard input: i32 ────────────────────────────────────▶          for messages 3 to 8 and 10
//! ```
//!
//! Everything is in the byte order of the machine, since both ends are one machine. A string is its length with the
//! closing NUL, and itself. Which of messages 3 to 9 libxl listens to is said by `cbflags`: one that it does not
//! expect ends the operation. Source: xen `tools/libs/light/libxl_save_msgs_gen.pl` and what 4.17's helper writes.
//!
//! The trap: standard output is the wire. Nothing else in the process may print there.

use bytes::{Buf, BufMut, BytesMut};

/// Longest text in a message, in bytes; a message must stay below 64 KiB.
pub const TEXT_MAX_BYTES: usize = 8192;

/// How a message can be wrong.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HelperError {
    /// No message has this number.
    #[error("message {0} does not exist")]
    UnknownMessage(u16),
    /// A message that is not its arguments.
    #[error("message {number} is malformed: {why}")]
    BadMessage {
        /// Its number.
        number: u16,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A command line that libxl does not write.
    #[error("argument {at}: {why}")]
    BadArgument {
        /// Which, counted from the program's name.
        at: usize,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// How loud a line of the log is (`xentoollog_level`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// For developers.
    Debug = 1,
    /// What was done, and how long it took.
    Detail = 3,
    /// What a user sees by default.
    Info = 5,
    /// Something is not as it should be.
    Warn = 7,
    /// The operation failed.
    Error = 8,
}

/// What the helper says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// A line for the log.
    Log {
        /// `xentoollog_level`.
        level: u32,
        /// errno, or all ones for none.
        errno: u32,
        /// Who speaks.
        context: String,
        /// What about.
        text: String,
    },
    /// How far it is.
    Progress {
        /// Who speaks.
        context: String,
        /// What is being done.
        what: String,
        /// How much of it is done.
        done: u64,
        /// How much there is.
        total: u64,
    },
    /// Suspend the domain.
    Suspend,
    /// Resume it.
    Postcopy,
    /// The image's part of a checkpoint is written, or read: do yours.
    Checkpoint,
    /// Wait until the next checkpoint is due.
    WaitCheckpoint,
    /// Have the device model report what it writes, or not.
    SwitchQemuLogdirty {
        /// Of which domain.
        domid: u32,
        /// On or off.
        enable: bool,
    },
    /// The CPU policy has been set; these parts of it (1 CPUID, 2 MSRs) were not in the image.
    StaticDataDone {
        /// Bit mask.
        missing: u32,
    },
    /// Where the restored domain's rings are.
    RestoreResults {
        /// The xenstore ring.
        store_gfn: u64,
        /// The console ring.
        console_gfn: u64,
    },
    /// It is done.
    Complete {
        /// 0 or -1.
        retval: i32,
        /// errno, or 0.
        errno: i32,
    },
}

impl Message {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u16 {
        match self {
            Self::Log { .. } => 1,
            Self::Progress { .. } => 2,
            Self::Suspend => 3,
            Self::Postcopy => 4,
            Self::Checkpoint => 5,
            Self::WaitCheckpoint => 6,
            Self::SwitchQemuLogdirty { .. } => 7,
            Self::StaticDataDone { .. } => 8,
            Self::RestoreResults { .. } => 9,
            Self::Complete { .. } => 10,
        }
    }

    /// Whether libxl answers it.
    #[must_use]
    pub fn has_reply(&self) -> bool {
        !matches!(self, Self::Log { .. } | Self::Progress { .. } | Self::RestoreResults { .. })
    }

    /// Whether libxl expects it, by its `cbflags`. The log, the progress and the end are always expected.
    #[must_use]
    pub fn is_expected(&self, cbflags: u32) -> bool {
        !(3..=9).contains(&self.number()) || cbflags & 1 << self.number() != 0
    }

    /// Appends the message. Texts are cut at [`TEXT_MAX_BYTES`].
    pub fn encode(&self, out: &mut BytesMut) {
        let mut body = BytesMut::new();
        body.put_u16_ne(self.number());
        match self {
            Self::Log { level, errno, context, text } => {
                body.put_u32_ne(*level);
                body.put_u32_ne(*errno);
                put_text(context, &mut body);
                put_text(text, &mut body);
            }
            Self::Progress { context, what, done, total } => {
                put_text(context, &mut body);
                put_text(what, &mut body);
                body.put_u64_ne(*done);
                body.put_u64_ne(*total);
            }
            Self::Suspend | Self::Postcopy | Self::Checkpoint | Self::WaitCheckpoint => {}
            Self::SwitchQemuLogdirty { domid, enable } => {
                body.put_u32_ne(*domid);
                body.put_u32_ne(u32::from(*enable));
            }
            Self::StaticDataDone { missing } => body.put_u32_ne(*missing),
            Self::RestoreResults { store_gfn, console_gfn } => {
                body.put_u64_ne(*store_gfn);
                body.put_u64_ne(*console_gfn);
            }
            Self::Complete { retval, errno } => {
                body.put_i32_ne(*retval);
                body.put_i32_ne(*errno);
            }
        }
        out.put_u16_ne(body.len() as u16);
        out.put_slice(&body);
    }

    /// Takes one message off the front of `input`, or `None` while it is incomplete.
    pub fn decode(input: &mut BytesMut) -> Result<Option<Self>, HelperError> {
        let Some((length, _)) = input.split_first_chunk::<2>() else { return Ok(None) };
        let length = usize::from(u16::from_ne_bytes(*length));
        if input.len() < 2 + length {
            return Ok(None);
        }
        let body = input.split_to(2 + length).split_off(2);
        let mut rest = &body[..];
        let number = rest.try_get_u16_ne().map_err(|_| HelperError::BadMessage { number: 0, why: "no number" })?;
        let bad = |why| HelperError::BadMessage { number, why };
        let message = Self::arguments(number, &mut rest)
            .ok_or(bad("shorter than its arguments, or a text that is none"))?
            .ok_or(HelperError::UnknownMessage(number))?;
        if rest.is_empty() { Ok(Some(message)) } else { Err(bad("longer than its arguments")) }
    }

    /// The message of this number; the outer `None` says that its arguments are wrong.
    fn arguments(number: u16, rest: &mut &[u8]) -> Option<Option<Self>> {
        Some(Some(match number {
            1 => Self::Log { level: word(rest)?, errno: word(rest)?, context: text(rest)?, text: text(rest)? },
            2 => Self::Progress { context: text(rest)?, what: text(rest)?, done: long(rest)?, total: long(rest)? },
            3 => Self::Suspend,
            4 => Self::Postcopy,
            5 => Self::Checkpoint,
            6 => Self::WaitCheckpoint,
            7 => Self::SwitchQemuLogdirty { domid: word(rest)?, enable: word(rest)? != 0 },
            8 => Self::StaticDataDone { missing: word(rest)? },
            9 => Self::RestoreResults { store_gfn: long(rest)?, console_gfn: long(rest)? },
            10 => Self::Complete { retval: word(rest)?.cast_signed(), errno: word(rest)?.cast_signed() },
            _ => return Some(None),
        }))
    }
}

fn put_text(text: &str, out: &mut BytesMut) {
    let cut = &text[..text.floor_char_boundary(TEXT_MAX_BYTES)];
    out.put_u32_ne(cut.len() as u32 + 1);
    // A NUL inside would end the string for libxl, and the message would be too long for it.
    out.extend(cut.bytes().map(|byte| if byte == 0 { b'?' } else { byte }));
    out.put_u8(0);
}

fn word(rest: &mut &[u8]) -> Option<u32> {
    rest.try_get_u32_ne().ok()
}

fn long(rest: &mut &[u8]) -> Option<u64> {
    rest.try_get_u64_ne().ok()
}

fn text(rest: &mut &[u8]) -> Option<String> {
    let length = word(rest)? as usize;
    let (text, behind) = rest.split_at_checked(length)?;
    *rest = behind;
    let (0, text) = text.split_last()? else { return None };
    Some(String::from_utf8_lossy(text).into_owned())
}

/// What kind of stream libxl wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamType {
    /// Once.
    Plain,
    /// Checkpoint after checkpoint.
    Remus,
    /// The same, with a secondary that runs.
    Colo,
}

/// What libxl asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Job {
    /// Write a domain's image.
    Save(SaveJob),
    /// Read one.
    Restore(RestoreJob),
}

/// What to save.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SaveJob {
    /// Where the image goes.
    pub stream_fd: i32,
    /// The domain.
    pub domid: u16,
    /// While the domain runs, as far as that is possible.
    pub live: bool,
    /// Send everything a second time, to be compared.
    pub debug: bool,
    /// Which messages libxl expects.
    pub cbflags: u32,
    /// How often.
    pub stream: StreamType,
}

/// What to restore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RestoreJob {
    /// Where the image comes from.
    pub stream_fd: i32,
    /// The domain, which exists and is empty.
    pub domid: u16,
    /// The domain's port to xenstore.
    pub store_port: u32,
    /// Who serves xenstore.
    pub store_domid: u16,
    /// The domain's port to its console.
    pub console_port: u32,
    /// Who serves the console.
    pub console_domid: u16,
    /// Which messages libxl expects.
    pub cbflags: u32,
    /// How often.
    pub stream: StreamType,
}

/// The first arguments that say that libxl is the caller.
pub const JOBS: [&str; 2] = ["--save-domain", "--restore-domain"];

impl Job {
    /// Reads the arguments behind the program's name.
    pub fn parse(arguments: &[String]) -> Result<Self, HelperError> {
        let bad = |at: usize, why| HelperError::BadArgument { at: at + 1, why };
        let number = |at: usize| -> Result<i64, HelperError> {
            arguments.get(at).ok_or(bad(at, "missing"))?.parse().map_err(|_| bad(at, "not a number"))
        };
        let fits = |at: usize, max: u32| -> Result<u32, HelperError> {
            let number = number(at)?;
            u32::try_from(number).ok().filter(|number| *number <= max).ok_or(bad(at, "out of range"))
        };
        let fd = |at| fits(at, i32::MAX as u32).map(u32::cast_signed);
        let domid = |at| fits(at, u32::from(u16::MAX)).map(|domid| domid as u16);
        let stream = |at| match number(at)? {
            0 => Ok(StreamType::Plain),
            1 => Ok(StreamType::Remus),
            2 => Ok(StreamType::Colo),
            _ => Err(bad(at, "not a type of stream")),
        };
        let exactly = |count: usize| match arguments.len() {
            given if given > count => Err(bad(count, "one too many")),
            _ => Ok(()),
        };
        // The way back (argument 2) is COLO's, which is refused.
        match arguments.first().map(String::as_str) {
            Some("--save-domain") => {
                exactly(7)?;
                let flags = fits(4, u32::MAX)?;
                Ok(Self::Save(SaveJob {
                    stream_fd: fd(1)?,
                    domid: domid(3)?,
                    live: flags & 1 != 0,
                    debug: flags & 2 != 0,
                    cbflags: fits(5, u32::MAX)?,
                    stream: stream(6)?,
                }))
            }
            Some("--restore-domain") => {
                exactly(10)?;
                Ok(Self::Restore(RestoreJob {
                    stream_fd: fd(1)?,
                    domid: domid(3)?,
                    store_port: fits(4, u32::MAX)?,
                    store_domid: domid(5)?,
                    console_port: fits(6, u32::MAX)?,
                    console_domid: domid(7)?,
                    cbflags: fits(8, u32::MAX)?,
                    stream: stream(9)?,
                }))
            }
            _ => Err(bad(0, "neither --save-domain nor --restore-domain")),
        }
    }

    /// Which messages libxl expects.
    #[must_use]
    pub fn cbflags(&self) -> u32 {
        match self {
            Self::Save(job) => job.cbflags,
            Self::Restore(job) => job.cbflags,
        }
    }

    /// The domain it is about.
    #[must_use]
    pub fn domid(&self) -> u16 {
        match self {
            Self::Save(job) => job.domid,
            Self::Restore(job) => job.domid,
        }
    }
}
