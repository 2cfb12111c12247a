//! What a disk image is worth after a crash: one short line beside it, in `IMAGE.colo-state`.
//!
//! ```text
//!                 initial copy begins                the base is flushed, all of a checkpoint is in it
//!  no record ────────────────────────▶ resync WHY ──────────────────────────────────────────▶ checkpoint G N
//!  checkpoint G N ─ a checkpoint is about to be written into the base ─▶ resync applying
//!  resync taken-over ─ the base is flushed, all the guest that took over wrote is in it ─▶ guest
//!  checkpoint G N, guest ─ a guest is booted on the image ─▶ guest
//! ```
//!
//! | record | the image |
//! |---|---|
//! | none | never held a replica; whatever it was, it still is |
//! | `checkpoint G N [S]` | byte for byte checkpoint N of generation G, or a later one that changed nothing |
//! | `guest` | a guest's own disk: what the guest flushed is there, as after a power cut of any disk |
//! | `resync WHY`, or nothing that can be read | neither one thing nor the other |
//!
//! S is the session in which its primary numbers them: a primary that comes back knows by both what the image lacks.
//!
//! The images of a guest with several disks have a record each, and a checkpoint's says in which set of images it was
//! made and which of them this is (`checkpoint G N S SET 0/2`): [`super::records`] changes them together, and
//! [`super::take_up`] boots a guest on all of them or on none.
//!
//! The record is overwritten in place and is shorter than a sector. Whatever tears it leaves a line whose checksum is
//! wrong, which reads as `resync`: the safe side in both directions, and for one flush instead of a rename's two.
//!
//! The trap: what a new process reads may be in the page cache only, left by a process that was killed before it could
//! flush. So nothing that was read counts as durable: the first [`State::record`] always writes.

use crate::disk::DiskError;
use crate::mutant::{self, Mutant};
use rustix::fs::FileType;
use serde::Serialize;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The length of a record. A file that has more is not ours.
pub const RECORD_BYTES: usize = 128;
/// Where the records of block devices are: `/dev` forgets what is in it when the host restarts.
pub const DEVICES_DIR: &str = "/var/lib/xen-colo";
const MAGIC: &str = "xen-colo-state 1";

/// Why an image is no disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The initial copy was not finished.
    InitialCopy,
    /// A checkpoint was being written into it.
    Applying,
    /// A guest had taken over on it, and the checkpoint it went on from was not all in it yet.
    TakenOver,
    /// The record itself cannot be read.
    Unreadable,
}

impl Why {
    const ALL: [(Self, &str); 4] = [
        (Self::InitialCopy, "initial-copy"),
        (Self::Applying, "applying"),
        (Self::TakenOver, "taken-over"),
        (Self::Unreadable, "unreadable"),
    ];
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InitialCopy => "the copy of the primary's disk was not finished",
            Self::Applying => "a checkpoint was being written into it",
            Self::TakenOver => "a guest had taken over on it, and not all of its disk was in the image",
            Self::Unreadable => "its state file cannot be understood",
        })
    }
}

/// Which of a guest's images one is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Drawn when the images were made replicas together: another guest's, or an older copy, has another.
    pub set: u32,
    /// Which of them, from 0.
    pub index: u8,
    /// How many there are.
    pub count: u8,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk{} of {}", self.index, self.count)
    }
}

/// What an image is worth.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It never held a replica.
    NoRecord,
    /// It is a checkpoint.
    Checkpoint {
        /// The primary's generation.
        generation: u64,
        /// Its number in that generation, the initial copy being 1.
        number: u64,
        /// What its primary called the session in which it numbers them; 0 when it will not ask.
        session: u64,
    },
    /// It is a guest's own disk.
    Guest,
    /// It is nothing a guest could run on.
    Resync(Why),
}

impl Standing {
    /// Whether a guest may be booted on it.
    #[must_use]
    pub fn is_whole(self) -> bool {
        !matches!(self, Self::Resync(_))
    }

    fn encode(self, place: Option<Place>) -> [u8; RECORD_BYTES] {
        let what = match self {
            Self::NoRecord => "none".to_owned(),
            Self::Checkpoint { generation, number, session: 0 } => format!("checkpoint {generation} {number}"),
            Self::Checkpoint { generation, number, session } => {
                format!("checkpoint {generation} {number} {session:016x}")
            }
            Self::Guest => "guest".to_owned(),
            Self::Resync(why) => {
                format!("resync {}", Why::ALL.iter().find(|(each, _)| *each == why).map_or("", |w| w.1))
            }
        };
        let place = place.map_or(String::new(), |Place { set, index, count }| format!(" {set:08x} {index}/{count}"));
        let body = format!("{MAGIC} {what}{place}");
        let mut record = [b' '; RECORD_BYTES];
        let line = format!("{body} {:08x}", checksum(body.as_bytes()));
        record[..line.len()].copy_from_slice(line.as_bytes());
        record[RECORD_BYTES - 1] = b'\n';
        record
    }

    fn decode(record: &[u8]) -> (Self, Option<Place>) {
        Self::parse(record).unwrap_or((Self::Resync(Why::Unreadable), None))
    }

    fn parse(record: &[u8]) -> Option<(Self, Option<Place>)> {
        let record = record.get(..RECORD_BYTES).filter(|whole| whole.len() == record.len())?;
        let (body, sum) = std::str::from_utf8(record).ok()?.trim_end().rsplit_once(' ')?;
        u32::from_str_radix(sum, 16).ok().filter(|sum| *sum == checksum(body.as_bytes()))?;
        let words: Vec<_> = body.strip_prefix(MAGIC)?.split_whitespace().collect();
        let (words, place) = match &words[..] {
            [words @ .., set, at] if at.contains('/') => {
                let (index, count) = at.split_once('/')?;
                let set = u32::from_str_radix(set, 16).ok()?;
                (words, Some(Place { set, index: index.parse().ok()?, count: count.parse().ok()? }))
            }
            words => (words, None),
        };
        let standing = match *words {
            ["checkpoint", generation, number, ref session @ ..] => {
                let session = match *session {
                    [] => 0,
                    [session] => u64::from_str_radix(session, 16).ok()?,
                    _ => return None,
                };
                Self::Checkpoint { generation: generation.parse().ok()?, number: number.parse().ok()?, session }
            }
            ["guest"] => Self::Guest,
            ["resync", why] => Self::Resync(Why::ALL.iter().find(|(_, word)| *word == why)?.0),
            _ => return None,
        };
        Some((standing, place))
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRecord => f.write_str("not a replica's"),
            Self::Checkpoint { generation, number, .. } => {
                write!(f, "whole: checkpoint {number} of generation {generation}")
            }
            Self::Guest => f.write_str("whole: a guest's own disk"),
            Self::Resync(why) => write!(f, "not whole: {why}"),
        }
    }
}

/// CRC-32 (IEEE 802.3).
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// Where one record is kept, in the steps that a crash can come between.
pub trait StateFile: Send {
    /// The whole content, a little more than a record at most; `None` when there is no file.
    fn read(&mut self) -> Result<Option<Vec<u8>>, DiskError>;
    /// Overwrites the record, and makes the file when there is none.
    fn write(&mut self, record: &[u8]) -> Result<(), DiskError>;
    /// Makes the record durable.
    fn sync(&mut self) -> Result<(), DiskError>;
    /// Makes the file's name durable, and the image's beside it.
    fn sync_dir(&mut self) -> Result<(), DiskError>;
}

/// The record beside an image.
#[derive(Debug)]
pub struct FileState {
    path: PathBuf,
    file: Option<File>,
}

impl FileState {
    /// The record of `image`, made with its first write.
    #[must_use]
    pub fn of(image: &Path) -> Self {
        Self { path: path(image), file: None }
    }

    fn open_or_create(&self) -> io::Result<File> {
        let devices = Path::new(DEVICES_DIR);
        if self.path.parent() == Some(devices) && !devices.exists() {
            fs::create_dir_all(devices)?;
            devices.parent().map_or(Ok(()), |above| File::open(above)?.sync_all())?;
        }
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&self.path)?;
        // Of a file that is not ours nothing may be left.
        file.set_len(RECORD_BYTES as u64)?;
        Ok(file)
    }

    fn failed(&self, doing: &str) -> impl Fn(io::Error) -> DiskError {
        let what = format!("{doing} {}", self.path.display());
        move |error| DiskError::io(what.clone(), error)
    }
}

/// Where the record of `image` is: beside it, and for a block device in [`DEVICES_DIR`].
#[must_use]
pub fn path(image: &Path) -> PathBuf {
    let is_device = rustix::fs::stat(image).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_block_device());
    if is_device {
        let name = image.to_string_lossy().trim_start_matches('/').replace('/', "-");
        return Path::new(DEVICES_DIR).join(name + ".colo-state");
    }
    // A link's name says nothing about where the image is.
    let mut path = fs::canonicalize(image).unwrap_or_else(|_| image.to_owned()).into_os_string();
    path.push(".colo-state");
    path.into()
}

impl StateFile for FileState {
    fn read(&mut self) -> Result<Option<Vec<u8>>, DiskError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("open")(error)),
        };
        let mut content = Vec::new();
        let mut limited = io::Read::take(file, RECORD_BYTES as u64 + 1);
        io::Read::read_to_end(&mut limited, &mut content).map_err(self.failed("read"))?;
        Ok(Some(content))
    }

    fn write(&mut self, record: &[u8]) -> Result<(), DiskError> {
        if self.file.is_none() {
            self.file = Some(self.open_or_create().map_err(self.failed("open"))?);
        }
        self.file.as_ref().map_or(Ok(()), |file| file.write_all_at(record, 0)).map_err(self.failed("write"))
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        self.file.as_ref().map_or(Ok(()), File::sync_data).map_err(self.failed("flush"))
    }

    fn sync_dir(&mut self) -> Result<(), DiskError> {
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(self.failed("flush the directory of"))
    }
}

/// No file: for a replica whose base does not outlive it.
struct Forgetful;

impl StateFile for Forgetful {
    fn read(&mut self) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(None)
    }
    fn write(&mut self, _record: &[u8]) -> Result<(), DiskError> {
        Ok(())
    }
    fn sync(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn sync_dir(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// The record of one image.
pub struct State {
    file: Box<dyn StateFile>,
    /// What was found, and is written.
    pub(super) place: Option<Place>,
    standing: Standing,
    /// `standing` is on the medium, and no crash can take it back.
    durable: bool,
    /// The file's name is.
    named: bool,
}

impl State {
    /// Reads the record. One that cannot be understood says that the image is not whole; only a failing read is an
    /// error.
    pub fn open(mut file: Box<dyn StateFile>) -> Result<Self, DiskError> {
        let (standing, place) = file.read()?.map_or((Standing::NoRecord, None), |record| Standing::decode(&record));
        let durable = standing != Standing::NoRecord && mutant::active(Mutant::TrustStateRead);
        Ok(Self { file, place, standing, durable, named: durable })
    }

    /// Which of a guest's images this is from now on.
    pub(super) fn belong(&mut self, place: Option<Place>) {
        self.durable &= self.place == place;
        self.place = place;
    }

    /// A record that is kept nowhere.
    pub(super) fn forgetful() -> Self {
        Self { file: Box::new(Forgetful), place: None, standing: Standing::NoRecord, durable: false, named: false }
    }

    /// What the image is worth.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Whether the image is durably known as this.
    #[must_use]
    pub fn is(&self, standing: Standing) -> bool {
        self.durable && self.standing == standing
    }

    /// Makes it durable that the image is worth this. After an error it may or may not be.
    pub fn record(&mut self, standing: Standing) -> Result<(), DiskError> {
        if self.is(standing) {
            return Ok(());
        }
        self.durable = false;
        self.file.write(&standing.encode(self.place))?;
        self.file.sync()?;
        if !self.named && !mutant::active(Mutant::ForgetDirectory) {
            self.file.sync_dir()?;
        }
        (self.standing, self.durable, self.named) = (standing, true, true);
        Ok(())
    }
}

/// What an image is worth, for telling.
pub fn found(image: &Path) -> Result<Standing, DiskError> {
    Ok(State::open(Box::new(FileState::of(image)))?.standing())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<(Standing, Option<Place>)> {
        let places =
            [None, Some(Place { set: 0x9f31, index: 0, count: 2 }), Some(Place { set: 7, index: 15, count: 16 })];
        let longest = Some(Place { set: u32::MAX, index: 15, count: 16 });
        let with = |place: Option<Place>| standings().into_iter().map(move |standing| (standing, place));
        places.into_iter().chain([longest]).flat_map(with).collect()
    }

    fn standings() -> Vec<Standing> {
        let numbers = [(0, 1), (1, 12), (1, 345), (23, 67), (u64::MAX, u64::MAX)];
        let checkpoints = numbers.map(|(generation, number)| Standing::Checkpoint {
            generation,
            number,
            session: if number == 12 { 0 } else { number.rotate_left(17) },
        });
        let resyncs = Why::ALL.map(|(why, _)| Standing::Resync(why));
        [&checkpoints[..], &resyncs, &[Standing::Guest]].concat()
    }

    #[test]
    fn a_record_is_a_line_of_text() {
        let checkpoint = Standing::Checkpoint { generation: 3, number: 17, session: 0 };
        let text = String::from_utf8(checkpoint.encode(None).to_vec()).unwrap();
        assert_eq!(text.trim_end(), "xen-colo-state 1 checkpoint 3 17 83001e3f");
        let place = Some(Place { set: 0x9f31, index: 1, count: 2 });
        let text = String::from_utf8(checkpoint.encode(place).to_vec()).unwrap();
        assert!(text.starts_with("xen-colo-state 1 checkpoint 3 17 00009f31 1/2 "), "{text}");
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926, "the check value of CRC-32");
        all().into_iter().for_each(|(is, at)| assert_eq!(Standing::decode(&is.encode(at)), (is, at)));
    }

    #[test]
    fn a_torn_record_is_the_old_one_or_the_new_one_or_none() {
        let mut torn = 0;
        let unreadable = (Standing::Resync(Why::Unreadable), None);
        for old in all() {
            for new in all() {
                for at in 0..RECORD_BYTES {
                    let mixed = [&new.0.encode(new.1)[..at], &old.0.encode(old.1)[at..]].concat();
                    let read = Standing::decode(&mixed);
                    assert!([old, new, unreadable].contains(&read), "{old:?} {new:?} {at}: {read:?}");
                    torn += u32::from(read != old && read != new);
                }
            }
        }
        assert!(torn > 500, "{torn}");
        let good = Standing::Guest.encode(None);
        for flipped in 0..good.len() - 1 {
            let mut bad = good;
            bad[flipped] ^= 1;
            assert_eq!(Standing::decode(&bad), unreadable, "byte {flipped}");
        }
        let long = [&good[..], b"\n"].concat();
        for foreign in [&b""[..], b"guest", &good[1..], &long, &[0; RECORD_BYTES], &[0xff; RECORD_BYTES]] {
            assert_eq!(Standing::decode(foreign), unreadable);
        }
    }
}
