//! What an engine is made of, and what its host hands to it.

use super::Vacancy;
use crate::clock::Instant;
use crate::colo::hello::Geometry;
use crate::colo::{primary as primary_machine, secondary as secondary_machine};
use crate::daemon::address::Address;
use crate::daemon::arbiter::Arbiter;
use crate::daemon::control::{Answer as Reply, Asked, Protect};
use crate::daemon::events::Events;
use crate::daemon::guest::Guest;
use crate::daemon::links::{Links, Outbox};
use crate::daemon::live::LogFilter;
use crate::daemon::manager::Manager;
use crate::qmp::Event;
use crate::replica::mirror::Target;
use crate::replica::set::Mirrors;
use bytes::Bytes;
use std::path::PathBuf;
use tokio::runtime::Handle;
use tokio::sync::{broadcast, mpsc, watch};

/// A frame on its way to the network. A host that is stopped with frames in its queues may wake as the loser, and
/// one of them would take the guest's MAC address back from the survivor: what is late is dropped.
#[derive(Debug)]
pub struct NetworkFrame {
    /// When the lease ends under which it was released; never, for a guest that is not replicated.
    pub until: Option<Instant>,
    /// The frame.
    pub frame: Bytes,
}

/// What the host hands to its engine.
#[derive(Debug)]
pub enum HostInput {
    /// The links to a secondary that accepted the guest are up.
    Protect {
        /// The links.
        links: Links,
        /// How to run the primary.
        config: primary_machine::Config,
        /// The peer's name.
        peer: String,
        /// The peer's disks as they are.
        targets: Vec<Target>,
        /// Told when the first copy has begun, or why it has not.
        begun: tokio::sync::oneshot::Sender<Reply>,
    },
    /// A primary wants this host to stand by, and its links are up.
    Join {
        /// The links.
        links: Links,
        /// How to run the secondary.
        config: secondary_machine::Config,
        /// The primary's name.
        peer: String,
        /// The guest that will be loaded.
        guest: Box<Guest>,
    },
}

/// A guest that is to be protected, as the host makes its links.
pub struct ToProtect {
    /// How.
    pub protect: Protect,
    /// Who waits for the answer.
    pub reply: tokio::sync::oneshot::Sender<Reply>,
    /// The guest's name.
    pub guest: String,
    /// Its shape.
    pub geometry: Geometry,
    /// Its disks.
    pub mirrors: Mirrors,
}

/// Everything an engine is made of.
pub struct EngineParts {
    /// The host's name.
    pub name: String,
    /// Where peers connect.
    pub listen: Address,
    /// Where metrics are read, if they are told.
    pub metrics: Option<String>,
    /// A guest that runs here from the start.
    pub guest: Option<Guest>,
    /// Why a guest that this host was to run is not booted here.
    pub left: Option<String>,
    /// The images on which replicas are made here.
    pub disks: Vec<PathBuf>,
    /// What both hosts call the disks.
    pub exports: Vec<String>,
    /// The arbiter.
    pub arbiter: Option<Arbiter>,
    /// Requests of the control socket.
    pub control: mpsc::Receiver<Asked>,
    /// Where requests to protect go: the host makes the links.
    pub protect: mpsc::Sender<ToProtect>,
    /// Links that are up.
    pub host: mpsc::Receiver<HostInput>,
    /// Frames from the network.
    pub network_in: mpsc::Receiver<Bytes>,
    /// Frames to the network.
    pub network_out: Outbox<NetworkFrame>,
    /// Makes the network of this host forget where the guest is.
    pub unlearn: Box<dyn Fn() + Send>,
    /// Whether this host can take a guest: read by the host when a peer knocks.
    pub vacancy: watch::Sender<Vacancy>,
    /// Where it is told what happens here.
    pub events: broadcast::Sender<Event>,
    /// How this host is, in a line.
    pub line: watch::Sender<String>,
    /// Who is told that the engine still turns.
    pub manager: Manager,
    /// What is logged.
    pub log: LogFilter,
    /// Where it is kept what happened here.
    pub history: Events,
    /// Where tasks run.
    pub runtime: Handle,
}
