//! `xl-colo nbd`: one image, served as `qemu-nbd` serves it.
//!
//! The letters and their meanings are qemu-nbd's (qemu `docs/tools/qemu-nbd.rst`), so that scripts written for it run.
//! The traps: without `-t` it ends with its last client, `-e` counts clients and one more waits, discarding is ignored unless
//! asked for, `--fork` returns once clients can connect, the last sector of an image is whole, and the file with the process's
//! number stays, locked for as long as the process is there.
//!
//! A replica's image is served by its record ([`crate::replica::state`]): one that is not whole only to save what is in
//! it, and one that is a checkpoint is none any more once somebody can write to it. Otherwise its primary would send it
//! the difference to something that is gone.

use super::kernel::{self, DeviceError};
use super::lock;
use super::served::{Served, probe, warn_of_guess};
use super::threads::{Listener, Running, Service, serve_all};
use super::tls::{self, Credentials, TlsError};
use crate::daemon::address;
use crate::disk::{Disk, DiskError, FileDisk, SECTOR_BYTES};
use crate::nbd::MAX_STRING_BYTES;
use crate::nbd::handshake::Export;
use crate::replica::state::{FileState, Standing, State, Why, path};
use crate::say;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Set in the process that `--fork` leaves behind.
const CHILD_ENV: &str = "XL_COLO_NBD_CHILD";
/// What it is set to where that process has a socket that was passed to the one before.
const PASSED: &str = "socket";
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
    /// Nobody said that it is raw.
    pub probe: bool,
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
    /// Keeps QEMU's programs out of the image, and keeps out of theirs.
    pub locks_as_qemu: bool,
    /// Tells how deep a block lies in a chain of images.
    pub tells_depth: bool,
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
    /// The kernel's device that is the disk, /dev/nbdN.
    pub device: Option<String>,
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
    /// A QEMU has the image, or one of its programs.
    #[error("failed to get {lock} lock: another process is using the image {}, a QEMU's", image.display())]
    Locked {
        /// The image.
        image: PathBuf,
        /// The lock, in QEMU's words.
        lock: &'static str,
    },
    /// The image has another format, and nobody said that its bytes are to be served as they are.
    #[error("{} is an image of format {format}, and raw is all that is served: -f raw serves the bytes of the file itself", image.display())]
    Format {
        /// The image.
        image: PathBuf,
        /// Its format.
        format: &'static str,
    },
    /// The kernel talks to a Unix socket.
    #[error("a device is connected over a Unix socket: give one with -k, or leave out -p and -b")]
    DeviceWithoutSocket,
    /// The kernel's device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// What is looked at begins with a sector.
    #[error("--offset {0} is no multiple of {SECTOR_BYTES}: give -f raw with it")]
    OddOffset(u64),
    /// Another server has written its number to the same file, and is there still.
    #[error("cannot lock pid file {}: another server has it", .0.display())]
    PidFile(PathBuf),
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
    // A socket that was passed is this process's, by its number: the child gets it as its standard input.
    let passed = passed_socket()?;
    let child = Command::new(program)
        .args(arguments)
        .env(CHILD_ENV, if passed.is_some() { PASSED } else { "1" })
        .stdin(passed.map_or_else(Stdio::null, |socket| match socket {
            Listener::Tcp(listener) => OwnedFd::from(listener).into(),
            Listener::Unix(listener) => OwnedFd::from(listener).into(),
        }))
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
    let _pid_file = config.pid_file.as_deref().map(pid_file).transpose()?;
    let mut state = State::open(Box::new(FileState::of(&config.image)))?;
    if let (Standing::Resync(why), false) = (state.standing(), config.salvage) {
        return Err(ExportError::NotWhole { image: config.image, why });
    }
    let mut export = Export::new(config.name.clone(), disk.size_bytes());
    export.description.clone_from(&config.description);
    export.read_only = config.read_only;
    // Who may have one connection is not told that it may have several: nbdcopy would wait for the second.
    export.multi_conn = config.max_connections != 1;
    (export.fast_zero, export.tells_depth) = (true, config.tells_depth);
    if config.probe {
        // The first sector is looked at as a whole before it is written.
        export.block_sizes.min_bytes = SECTOR_BYTES as u32;
    }
    let mut last = disk.clone();
    let open = move |_| Ok(Box::new(disk.clone()) as Box<dyn Disk>);
    let tls = config.tls.as_ref().map(tls::load).transpose()?;
    let max_connections = config.max_connections;
    let service = Service { exports: vec![export], open: Box::new(open), max_connections, tls };
    let running = Running::default();
    // Before anybody can connect, and order its end.
    let mut hung_up = signal(SignalKind::hangup()).map_err(failed("wait for signals"))?;
    let mut terminated = signal(SignalKind::terminate()).map_err(failed("wait for signals"))?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed("wait for signals"))?;
    config.device.as_deref().map(kernel::index_of).transpose()?;
    let (listener, socket) = listen(&config).await?;
    if config.device.is_some() && socket.is_none() {
        return Err(ExportError::DeviceWithoutSocket);
    }
    if let (Standing::Checkpoint { .. }, false) = (state.standing(), config.read_only) {
        state.record(Standing::Guest)?;
    }
    let (here, serving, place) = (running.clone(), Arc::new(service), listener.place());
    let accepting = tokio::task::spawn_blocking(move || serve_all(&listener, &serving, &here));
    let device = match (config.device.clone(), socket.clone()) {
        (Some(device), Some(path)) => {
            // Nobody else's: neither a guest's PV disk nor what the device is when somebody else has it.
            let backend = format!("xl-colo nbd {}", std::process::id());
            let served = kernel::Served { socket: path.clone(), export: config.name.clone(), backend };
            let connected = tokio::task::block_in_place(|| kernel::connect_device(&device, &served, Duration::ZERO));
            if let Err(error) = connected {
                let _ = std::fs::remove_file(path);
                return Err(error.into());
            }
            Some((device, served))
        }
        _ => None,
    };
    if config.probe {
        warn_of_guess(&config.image);
    }
    if is_in_background() {
        say::out(&READY);
        leave_the_caller().map_err(failed("go to the background"))?;
    } else if say::is_json() {
        say::out(&serde_json::json!({"what": "nbd", "listening": place}));
    }
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
        _ = hung_up.recv() => Ok(()),
    };
    if let Some((device, served)) = device
        && kernel::is_used(&served)
        && let Err(error) = kernel::disconnect(&device)
    {
        tracing::warn!(%error, device, "it is a disk that fails every request");
    }
    running.end();
    socket.inspect(|path| _ = std::fs::remove_file(path));
    if !config.read_only && config.cache != Cache::Unsafe {
        last.flush()?;
    }
    result
}

/// Whether this is the process that `--fork` leaves behind.
#[must_use]
pub fn is_in_background() -> bool {
    std::env::var_os(CHILD_ENV).is_some()
}

/// Where a device's disk is served if nothing else was said.
fn socket_of(device: &str) -> PathBuf {
    let name = Path::new(device).file_name().map_or_else(|| "device".into(), |name| name.to_string_lossy());
    Path::new("/run/lock").join(format!("xl-colo-{name}"))
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

/// Writes this process's number to a file, and keeps it locked.
fn pid_file(path: &Path) -> Result<File, ExportError> {
    let what = || failed(path.display().to_string());
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = open.map_err(what())?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => return Err(ExportError::PidFile(path.to_owned())),
        locked => locked.map_err(|error| what()(error.into()))?,
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(what())?;
    Ok(file)
}

/// The socket that systemd passed to this process, if it passed one.
fn passed_socket() -> Result<Option<Listener>, ExportError> {
    let mut passed = listenfd::ListenFd::from_env();
    if passed.len() == 0 {
        return Ok(None);
    }
    let unix = passed.take_unix_listener(0).ok().flatten().map(Listener::Unix);
    // A socket of another family is left where it was.
    let listener = match unix {
        Some(listener) => Some(listener),
        None => passed.take_tcp_listener(0).map_err(failed("take the socket of LISTEN_FDS"))?.map(Listener::Tcp),
    };
    let missing = || failed("take the socket of LISTEN_FDS")(io::ErrorKind::NotFound.into());
    listener.ok_or_else(missing).map(Some)
}

/// The socket that the process before this one was passed.
fn inherited_socket() -> io::Result<Option<Listener>> {
    if std::env::var_os(CHILD_ENV).is_none_or(|value| value != PASSED) {
        return Ok(None);
    }
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let is_unix = rustix::net::sockopt::socket_domain(&socket)? == rustix::net::AddressFamily::UNIX;
    Ok(Some(if is_unix { Listener::Unix(socket.into()) } else { Listener::Tcp(socket.into()) }))
}

async fn listen(config: &Config) -> Result<(Listener, Option<PathBuf>), ExportError> {
    let inherited = inherited_socket().map_err(failed("take the socket that was passed"))?;
    if let Some(listener) = inherited.map_or_else(passed_socket, |listener| Ok(Some(listener)))? {
        return if config.at.is_some() { Err(ExportError::TwoSockets) } else { Ok((listener, None)) };
    }
    let device = config.device.as_deref().map(|device| Where::Unix(socket_of(device)));
    match &config.at.clone().or(device).unwrap_or_default() {
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
    let disk = open(&config.image)?.padded();
    if !disk.try_lock(config.read_only)? {
        return Err(ExportError::InUse { image: config.image.clone(), read_only: config.read_only });
    }
    let lock = || lock::lock(&disk, config.read_only).map_err(failed(format!("lock {}", config.image.display())));
    if config.locks_as_qemu
        && let Some(lock) = lock()?
    {
        return Err(ExportError::Locked { image: config.image.clone(), lock });
    }
    if config.probe {
        probe(&disk, &config.image)?;
    }
    let (size_bytes, offset_bytes) = (disk.size_bytes(), config.offset_bytes);
    let size = size_bytes.checked_sub(offset_bytes);
    let size_bytes =
        size.ok_or_else(|| ExportError::Offset { image: config.image.clone(), size_bytes, offset_bytes })?;
    if config.probe && offset_bytes % SECTOR_BYTES != 0 {
        return Err(ExportError::OddOffset(offset_bytes));
    }
    let &Config { cache, discard, detect_zeroes, unmap_zeroes, probe: stays_raw, .. } = config;
    Ok(Served {
        disk,
        offset_bytes,
        size_bytes,
        cache,
        discard,
        detect_zeroes,
        unmap_zeroes,
        stays_raw,
        head: Arc::default(),
    })
}
