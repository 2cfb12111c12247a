//! `xl-colo nbd`: one image, served as `qemu-nbd` serves it.
//!
//! The letters and their meanings are qemu-nbd's (qemu `docs/tools/qemu-nbd.rst`), so that scripts written for it run.
//! The traps: without `-t` it ends with its last client, `-e` counts clients and one more waits, discarding is ignored unless
//! asked for, and `--fork` returns once clients can connect.
//!
//! A replica's image is served by its record ([`crate::replica::state`]): one that is not whole only to save what is in
//! it, and one that is a checkpoint is none any more once somebody can write to it. Otherwise its primary would send it
//! the difference to something that is gone.

use super::threads::{Listener, Running, Service, serve_all};
use super::tls::{self, Credentials, TlsError};
use crate::daemon::address;
use crate::disk::{Disk, DiskError, Extent, FileDisk, Zeroing, check_range};
use crate::nbd::MAX_STRING_BYTES;
use crate::nbd::handshake::Export;
use crate::replica::state::{FileState, Standing, State, Why, path};
use crate::say;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};

/// Set in the process that `--fork` leaves behind.
const CHILD_ENV: &str = "XL_COLO_NBD_CHILD";
/// What that process says when clients can connect.
const READY: &str = "ready";

/// Where clients connect.
#[derive(Clone, Debug)]
pub enum Where {
    /// A Unix socket.
    Unix(PathBuf),
    /// An address and a port.
    Tcp(String, u16),
}

/// The port that is NBD's.
pub const NBD_PORT: u16 = 10809;
/// All addresses of this host, of IPv4.
pub const ANY_ADDRESS: &str = "0.0.0.0";

impl Default for Where {
    fn default() -> Self {
        Self::Tcp(ANY_ADDRESS.into(), NBD_PORT)
    }
}

/// What a completed write means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cache {
    /// It is durable after a flush.
    WriteBack,
    /// It is durable.
    WriteThrough,
    /// Flushes do nothing.
    Unsafe,
}

/// What is served, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// The image.
    pub image: PathBuf,
    /// Where clients connect; without it at the socket that systemd passes, or [`Where::default`].
    pub at: Option<Where>,
    /// The export's name.
    pub name: String,
    /// The export's description.
    pub description: String,
    /// Where in the image the export begins.
    pub offset_bytes: u64,
    /// Takes no writes.
    pub read_only: bool,
    /// Serves an image that is not whole.
    pub salvage: bool,
    /// Clients at the same time; 0 for any number. One more waits for a place.
    pub max_connections: usize,
    /// Goes on when the last client has left.
    pub persistent: bool,
    /// What a completed write means.
    pub cache: Cache,
    /// Discarding frees space.
    pub discard: bool,
    /// Writes of zeroes are looked for.
    pub detect_zeroes: bool,
    /// They free their space.
    pub unmap_zeroes: bool,
    /// Where the process's number is written.
    pub pid_file: Option<PathBuf>,
    /// Certificates; with them nobody is served in the clear.
    pub tls: Option<Credentials>,
}

/// Why an image is not served.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The image cannot be opened.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The export would begin behind the image's end.
    #[error("--offset {offset_bytes} is outside {image} of {size_bytes} bytes", image = image.display())]
    Offset {
        /// The image.
        image: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// Where the export would begin.
        offset_bytes: u64,
    },
    /// Somebody else writes to the image.
    #[error("{} is in use: another xl-colo has it open{}", image.display(), if *read_only { " to write" } else { "; a reader needs -r" })]
    InUse {
        /// The image.
        image: PathBuf,
        /// How it was to be opened.
        read_only: bool,
    },
    /// The image is a replica's, in the middle of something.
    #[error(
        "{} is not whole: {why}; -r --salvage serves what is in it, and whoever copies a whole disk over it removes {}",
        image.display(), path(image).display()
    )]
    NotWhole {
        /// The image.
        image: PathBuf,
        /// Why it is not.
        why: Why,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// There is a socket already, and another one was asked for.
    #[error("a socket was passed by systemd (LISTEN_FDS): leave out -k, -b and -p, or start this without it")]
    TwoSockets,
    /// The name or the description is longer than the protocol can carry.
    #[error("the export's {0} is longer than {MAX_STRING_BYTES} bytes")]
    TooLong(&'static str),
    /// Something of the operating system failed.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// The reason.
        source: io::Error,
    },
    /// The process in the background ended before clients could connect; it has said why.
    #[error("the server did not start")]
    NotStarted,
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> ExportError {
    let what = what.into();
    move |source| ExportError::Io { what, source }
}

/// Starts this program again without `--fork`, in the background, and returns when its clients can connect.
pub fn fork() -> Result<(), ExportError> {
    let program = std::env::current_exe().map_err(failed("find this program"))?;
    let arguments = std::env::args_os().skip(1).filter(|argument| argument != "--fork");
    let child = Command::new(program)
        .args(arguments)
        .env(CHILD_ENV, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed("start the server"))?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout {
        BufReader::new(stdout).read_line(&mut said).map_err(failed("wait for the server"))?;
    }
    if said.trim_end() == READY { Ok(()) } else { Err(ExportError::NotStarted) }
}

/// Serves until it is told to end, or its last client leaves.
pub async fn run(config: Config) -> Result<(), ExportError> {
    for (what, text) in [("name", &config.name), ("description", &config.description)] {
        if text.len() > MAX_STRING_BYTES {
            return Err(ExportError::TooLong(what));
        }
    }
    let disk = open(&config)?;
    let mut state = State::open(Box::new(FileState::of(&config.image)))?;
    if let (Standing::Resync(why), false) = (state.standing(), config.salvage) {
        return Err(ExportError::NotWhole { image: config.image, why });
    }
    let mut export = Export::new(config.name.clone(), disk.size_bytes());
    export.description.clone_from(&config.description);
    export.read_only = config.read_only;
    // Who may have one connection is not told that it may have several: nbdcopy would wait for the second.
    export.multi_conn = config.max_connections != 1;
    export.fast_zero = true;
    let mut last = disk.clone();
    let open = move |_| Ok(Box::new(disk.clone()) as Box<dyn Disk>);
    let tls = config.tls.as_ref().map(tls::load).transpose()?;
    let max_connections = config.max_connections;
    let service = Service { exports: vec![export], open: Box::new(open), max_connections, tls };
    let running = Running::default();
    let (listener, socket) = listen(config.at.as_ref()).await?;
    if let (Standing::Checkpoint { .. }, false) = (state.standing(), config.read_only) {
        state.record(Standing::Guest)?;
    }
    if let Some(path) = &config.pid_file {
        std::fs::write(path, format!("{}\n", std::process::id())).map_err(failed(path.display().to_string()))?;
    }
    let mut terminated = signal(SignalKind::terminate()).map_err(failed("wait for signals"))?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed("wait for signals"))?;
    if std::env::var_os(CHILD_ENV).is_some() {
        say::out(&READY);
        leave_the_caller().map_err(failed("go to the background"))?;
    } else if say::is_json() {
        say::out(&serde_json::json!({"what": "nbd", "listening": listener.place()}));
    }
    let (here, serving) = (running.clone(), Arc::new(service));
    let accepting = tokio::task::spawn_blocking(move || serve_all(&listener, &serving, &here));
    let last_client_left = async {
        if config.persistent {
            std::future::pending::<()>().await;
        }
        let watched = running.clone();
        // It cannot fail but by a panic, and then it is over as well.
        let _ = tokio::task::spawn_blocking(move || watched.wait_for_last_client()).await;
    };
    let result = tokio::select! {
        ended = accepting => match ended {
            Ok(result) => result.map_err(failed("accept clients")),
            Err(error) => Err(failed("serve")(io::Error::other(error))),
        },
        () = last_client_left => Ok(()),
        _ = terminated.recv() => Ok(()),
        _ = interrupted.recv() => Ok(()),
    };
    running.end();
    for path in [socket, config.pid_file].into_iter().flatten() {
        let _ = std::fs::remove_file(path);
    }
    if !config.read_only && config.cache != Cache::Unsafe {
        last.flush()?;
    }
    result
}

/// Whoever started this has its answer: it must not wait for this process's output to end, nor send it the terminal's
/// signals.
fn leave_the_caller() -> io::Result<()> {
    let nowhere = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    rustix::stdio::dup2_stderr(&nowhere)?;
    // It fails for the leader of a group, which is nobody's child.
    let _ = rustix::process::setsid();
    Ok(())
}

async fn listen(at: Option<&Where>) -> Result<(Listener, Option<PathBuf>), ExportError> {
    let mut passed = listenfd::ListenFd::from_env();
    if passed.len() > 0 {
        if at.is_some() {
            return Err(ExportError::TwoSockets);
        }
        let unix = passed.take_unix_listener(0).ok().flatten().map(Listener::Unix);
        // A socket of another family is left where it was.
        let listener = match unix {
            Some(listener) => Some(listener),
            None => passed.take_tcp_listener(0).map_err(failed("take the socket of LISTEN_FDS"))?.map(Listener::Tcp),
        };
        let missing = || failed("take the socket of LISTEN_FDS")(io::ErrorKind::NotFound.into());
        return Ok((listener.ok_or_else(missing)?, None));
    }
    match &at.cloned().unwrap_or_default() {
        Where::Unix(path) => {
            let bound = address::bind_unix(path).await.and_then(Listener::blocking);
            Ok((bound.map_err(failed(format!("listen on {}", path.display())))?, Some(path.clone())))
        }
        Where::Tcp(address, port) => {
            let bound = TcpListener::bind((address.as_str(), *port));
            Ok((Listener::Tcp(bound.map_err(failed(format!("listen on {address} port {port}")))?), None))
        }
    }
}

fn open(config: &Config) -> Result<Served, ExportError> {
    let open = if config.read_only { FileDisk::open_read_only } else { FileDisk::open };
    let disk = open(&config.image)?;
    if !disk.try_lock(config.read_only)? {
        return Err(ExportError::InUse { image: config.image.clone(), read_only: config.read_only });
    }
    let (size_bytes, offset_bytes) = (disk.size_bytes(), config.offset_bytes);
    let size = size_bytes.checked_sub(offset_bytes);
    let size_bytes =
        size.ok_or_else(|| ExportError::Offset { image: config.image.clone(), size_bytes, offset_bytes })?;
    let &Config { cache, discard, detect_zeroes, unmap_zeroes, .. } = config;
    Ok(Served { disk, offset_bytes, size_bytes, cache, discard, detect_zeroes, unmap_zeroes })
}

/// The part of an image that is served, in the way that was asked for.
#[derive(Clone, Debug)]
struct Served {
    disk: FileDisk,
    offset_bytes: u64,
    size_bytes: u64,
    cache: Cache,
    discard: bool,
    detect_zeroes: bool,
    unmap_zeroes: bool,
}

impl Served {
    /// The place in the image, of a range that lies in the export.
    fn at(&self, offset: u64, len_bytes: u64) -> Result<u64, DiskError> {
        check_range(self.size_bytes, offset, len_bytes).map(|()| self.offset_bytes + offset)
    }

    fn written(&mut self) -> Result<(), DiskError> {
        if self.cache == Cache::WriteThrough { self.disk.flush() } else { Ok(()) }
    }
}

impl Disk for Served {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let at = self.at(offset, into.len() as u64)?;
        self.disk.read(at, into)
    }

    fn read_now(&mut self, offset: u64, into: &mut [u8]) -> Result<bool, DiskError> {
        let at = self.at(offset, into.len() as u64)?;
        self.disk.read_now(at, into)
    }

    fn lies_in(&self, offset: u64, len_bytes: u64) -> Option<(BorrowedFd<'_>, u64)> {
        self.disk.lies_in(self.at(offset, len_bytes).ok()?, len_bytes)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let at = self.at(offset, bytes.len() as u64)?;
        if self.detect_zeroes && bytes.iter().all(|byte| *byte == 0) {
            let how = Zeroing { keep_allocated: !self.unmap_zeroes, fast_only: false };
            self.disk.write_zeroes(at, bytes.len() as u64, how)?;
        } else {
            self.disk.write(at, bytes)?;
        }
        self.written()
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        if self.cache == Cache::Unsafe { Ok(()) } else { self.disk.flush() }
    }

    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        let at = self.at(offset, len_bytes)?;
        // Space is freed only where discarding frees it: QEMU's BDRV_O_UNMAP.
        let how = Zeroing { keep_allocated: how.keep_allocated || !self.discard, ..how };
        self.disk.write_zeroes(at, len_bytes, how)?;
        self.written()
    }

    fn trim(&mut self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        let at = self.at(offset, len_bytes)?;
        if self.discard { self.disk.trim(at, len_bytes) } else { Ok(()) }
    }

    fn leading_hole_bytes(&mut self, offset: u64, len_bytes: u64) -> u64 {
        self.at(offset, len_bytes).map_or(0, |at| self.disk.leading_hole_bytes(at, len_bytes))
    }

    fn extents(&mut self, offset: u64, len_bytes: u64, max: usize) -> Result<Vec<Extent>, DiskError> {
        let at = self.at(offset, len_bytes)?;
        self.disk.extents(at, len_bytes, max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Advice, fadvise};

    #[test]
    fn an_export_says_what_would_wait_as_its_image_does() {
        const MIB: usize = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, vec![7; 16 * MIB]).unwrap();
        let file = std::fs::File::open(&image).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let mut disk = FileDisk::open(&image).unwrap();
        let mut into = [0; 4096];
        if disk.read_now(8 * MIB as u64, &mut into).unwrap() {
            eprintln!("SKIP: this file system does not tell what would wait");
            return;
        }
        let (offset_bytes, size_bytes, cache) = (MIB as u64, 15 * MIB as u64, Cache::WriteBack);
        let (discard, detect_zeroes, unmap_zeroes) = (false, false, false);
        let mut served = Served { disk, offset_bytes, size_bytes, cache, discard, detect_zeroes, unmap_zeroes };
        assert!(!served.read_now(12 * MIB as u64, &mut into).unwrap());
        served.read(12 * MIB as u64, &mut into).unwrap();
        assert!(served.read_now(12 * MIB as u64, &mut into).unwrap() && into == [7; 4096]);
        assert!(served.read_now(size_bytes, &mut into).is_err(), "behind the export's end");
    }
}
