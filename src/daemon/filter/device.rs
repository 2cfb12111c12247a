//! One side of a filter: an interface of this host, or a tap of our own.

use super::{FilterError, Network};
use ::xen::packet::offload::{VnetHeader, finish};
use ::xen::packet::{PacketSocket, Receive, Tap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// Frames taken at once.
const TAKEN_MAX: usize = 64;

/// A frame, and what is left to be done to it.
pub(super) type Unfinished = (VnetHeader, Vec<u8>);

#[derive(Debug)]
enum End {
    Interface(PacketSocket),
    Tap(Tap),
}

/// A network device of this host.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) name: String,
    end: End,
    /// Frames of a tap that nobody could finish.
    unusable: u64,
    /// What it had dropped before.
    dropped_before: u64,
}

impl Device {
    /// An interface that there is.
    pub(super) fn interface(name: &str, ring: bool) -> Result<Self, FilterError> {
        let receive = if ring { Receive::Ring } else { Receive::Calls };
        let socket = PacketSocket::open_to(name, receive).map_err(|error| failed(name, error))?;
        if let Some(error) = socket.refused() {
            tracing::warn!(device = name, %error, "the kernel has no ring to give; a call a frame instead");
        }
        Ok(Self { name: name.into(), end: End::Interface(socket), unusable: 0, dropped_before: dropped(name) })
    }

    /// The network's side.
    pub(super) fn network(network: &Network, ring: bool) -> Result<Self, FilterError> {
        let (name, bridge) = match network {
            Network::Interface(name) => return Self::interface(name, ring),
            Network::Tap(name, bridge) => (name, bridge),
        };
        let tap = Tap::create(name).map_err(|error| failed(name, error))?;
        if let Some(bridge) = bridge {
            tap.join(bridge).map_err(|error| failed(bridge, error))?;
        }
        Ok(Self { name: tap.name(), end: End::Tap(tap), unusable: 0, dropped_before: 0 })
    }

    /// Takes some of what is there; as it is, or finished.
    pub(super) fn take(&mut self, unfinished: bool) -> Result<Vec<Unfinished>, FilterError> {
        let mut frames: Vec<Unfinished> = Vec::new();
        let mut keep = |header: &VnetHeader, frame: &[u8]| frames.push((*header, frame.to_vec()));
        let taken = match &self.end {
            End::Interface(socket) if unfinished => socket.receive(TAKEN_MAX, &mut keep),
            End::Interface(socket) => socket.read(TAKEN_MAX, &mut |frame| keep(&VnetHeader::default(), frame)),
            End::Tap(tap) => tap.receive(TAKEN_MAX, &mut keep),
        };
        if let Err(error) = taken {
            self.down(error)?;
        }
        if unfinished || matches!(self.end, End::Interface(_)) {
            return Ok(frames);
        }
        let mut finished = Vec::with_capacity(frames.len());
        for (header, frame) in frames {
            match finish(&header, frame) {
                Ok(frames) => finished.extend(frames.into_iter().map(|frame| (VnetHeader::default(), frame))),
                Err(_) => self.unusable += 1,
            }
        }
        Ok(finished)
    }

    /// Sends a frame; false when it is lost.
    pub(super) fn send(&self, header: &VnetHeader, frame: &[u8]) -> bool {
        let sent = match &self.end {
            End::Interface(socket) => socket.send_unfinished(header, frame),
            End::Tap(tap) => tap.send(header, frame),
        };
        sent.inspect_err(|error| tracing::debug!(device = self.name, %error, bytes = frame.len(), "not sent")).is_ok()
    }

    /// Asks what an error at the descriptor is.
    pub(super) fn look(&self) -> Result<(), FilterError> {
        match &self.end {
            End::Interface(socket) => socket.take_error().or_else(|error| self.down(error)),
            // It has none but that the device is gone, and reading says so.
            End::Tap(_) => Ok(()),
        }
    }

    /// Down is what an interface may be for a while; gone is the end.
    fn down(&self, error: io::Error) -> Result<(), FilterError> {
        let is_there = Path::new("/sys/class/net").join(&self.name).exists();
        if error.kind() == io::ErrorKind::NetworkDown && is_there {
            tracing::warn!(device = self.name, "down");
            return Ok(());
        }
        Err(failed(&self.name, error))
    }

    /// Frames that came to this device and not to us; and those that it took from us and did not bring on, where it is
    /// no tap (what a veth drops is what the other end has no room for).
    pub(super) fn lost(&self) -> u64 {
        let received = match &self.end {
            End::Interface(socket) => socket.losses().map_or(0, |losses| losses.total()),
            End::Tap(_) => self.unusable,
        };
        received + dropped(&self.name).saturating_sub(self.dropped_before)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match &self.end {
            End::Interface(socket) => socket.as_fd(),
            End::Tap(tap) => tap.as_fd(),
        }
    }
}

/// What the kernel could not queue on its way out of the device: for a tap, on its way to us.
fn dropped(name: &str) -> u64 {
    let counter = Path::new("/sys/class/net").join(name).join("statistics/tx_dropped");
    std::fs::read_to_string(counter).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn failed(name: &str, error: io::Error) -> FilterError {
    FilterError::Device { name: name.into(), error }
}
