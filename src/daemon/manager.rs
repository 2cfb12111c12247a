//! What the service manager is told, in systemd's words.
//!
//! ```text
//!   READY=1                          the sockets are open
//!   STATUS=…                         how the host is, whenever that changes
//!   WATCHDOG=1                       from the engine's own loop: an engine that hangs is not fed, and systemd ends it
//!   RELOADING=1 MONOTONIC_USEC=…     SIGHUP is being carried out; READY=1 follows
//!   STOPPING=1                       the end has begun
//! ```
//!
//! Source: sd_notify(3). The protocol is a datagram of lines to the socket that `NOTIFY_SOCKET` names, a path or, with an
//! `@`, an abstract name. The trap: the engine says one of these, so nothing here may wait; what the socket does not
//! take at once is lost.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

/// Longest status, in bytes.
const STATUS_MAX_BYTES: usize = 512;

/// Who started this process and wants to know how it gets on; nobody, most of the time.
#[derive(Clone, Debug, Default)]
pub struct Manager {
    place: Option<Arc<(UnixDatagram, SocketAddr)>>,
    watchdog: Option<Duration>,
}

impl Manager {
    /// The one that the environment names.
    #[must_use]
    pub fn of_environment() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Self::default();
        };
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|_| meant).map(Duration::from_micros);
        Self::at(&name, watchdog).unwrap_or_else(|error| {
            tracing::warn!(%error, "NOTIFY_SOCKET cannot be used");
            Self::default()
        })
    }

    /// The one at a socket, who wants a sign of life within `watchdog`.
    pub fn at(name: &OsStr, watchdog: Option<Duration>) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { place: Some(Arc::new((socket, address))), watchdog: watchdog.filter(|time| !time.is_zero()) })
    }

    /// How often a sign of life is due: twice in the time it is waited for.
    #[must_use]
    pub fn sign_every(&self) -> Option<Duration> {
        self.watchdog.map(|time| time / 2)
    }

    /// The host serves.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The host is about to end.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// SIGHUP is being carried out; [`Self::ready`] says that it is done.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now_us = Duration::try_from(now).unwrap_or_default().as_micros();
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={now_us}"));
    }

    /// How the host is.
    pub fn status(&self, line: &str) {
        let line = line.replace('\n', " ");
        self.tell(&format!("STATUS={}", &line[..line.floor_char_boundary(STATUS_MAX_BYTES)]));
    }

    /// The engine turns.
    pub fn sign_of_life(&self) {
        self.tell("WATCHDOG=1");
    }

    fn tell(&self, lines: &str) {
        let Some((socket, address)) = self.place.as_deref() else { return };
        if let Err(error) = socket.send_to_addr(lines.as_bytes(), address) {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(socket: &UnixDatagram) -> String {
        let mut text = [0; 2048];
        let bytes = socket.recv(&mut text).unwrap();
        String::from_utf8(text[..bytes].to_vec()).unwrap()
    }

    #[test]
    fn what_is_said_is_what_sd_notify_defines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::at(path.as_os_str(), Some(Duration::from_secs(3))).unwrap();
        assert_eq!(manager.sign_every(), Some(Duration::from_millis(1500)));
        manager.ready();
        manager.status("two\nlines");
        manager.status(&"ä".repeat(600));
        manager.sign_of_life();
        manager.reloading();
        manager.stopping();
        assert_eq!(heard(&socket), "READY=1");
        assert_eq!(heard(&socket), "STATUS=two lines");
        assert_eq!(heard(&socket).len(), "STATUS=".len() + STATUS_MAX_BYTES, "cut between two letters");
        assert_eq!(heard(&socket), "WATCHDOG=1");
        let reloading = heard(&socket);
        let (word, time) = reloading.split_once("\nMONOTONIC_USEC=").unwrap();
        assert_eq!((word, time.parse::<u64>().unwrap() > 0), ("RELOADING=1", true));
        assert_eq!(heard(&socket), "STOPPING=1");
    }

    #[test]
    fn an_abstract_name_is_a_place_and_nobody_is_no_error() {
        let name = format!("xen-colo-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let manager = Manager::at(OsStr::new(&format!("@{name}")), None).unwrap();
        manager.ready();
        assert_eq!((heard(&socket).as_str(), manager.sign_every()), ("READY=1", None));
        drop(socket);
        manager.ready();
        Manager::default().ready();
    }
}
