//! In the place of `xen` in a program that was built without it: it says so.

use super::check::{Obstacle, XenFacts};
use super::engine::NetworkFrame;
use super::guest::{Guest, GuestError};
use super::links::Outgoing;
use crate::colo::hello::{Geometry, Mode};
use crate::replica::epochs::ReplicaConfig;
use bytes::Bytes;
use std::path::PathBuf;
use tokio::sync::mpsc;

/// A Xen guest to run at the start.
#[derive(Clone, Debug)]
pub struct XenBoot {
    /// Its name.
    pub name: String,
    /// xl's configuration.
    pub config: PathBuf,
    /// The size of a disk of it.
    pub disk_bytes: u64,
}

/// The name of a domain.
#[must_use]
pub fn domain_name(_: u16) -> Option<String> {
    None
}

/// The network's end of a NIC that no guest has.
#[derive(Clone, Debug)]
pub struct Wire;

impl Wire {
    /// A wire that nothing is plugged into.
    #[must_use]
    pub fn new(_: mpsc::Sender<Bytes>) -> Self {
        Self
    }

    /// Nothing was learned.
    #[expect(clippy::unused_self, reason = "the other one's shape")]
    pub fn unlearn(&self) {}

    /// Drops what is sent.
    pub async fn carry(self, mut frames_out: Outgoing<NetworkFrame>) {
        while let Some((bytes, _)) = frames_out.recv().await {
            frames_out.written(bytes);
        }
    }
}

fn absent<T>() -> Result<T, GuestError> {
    Err(GuestError::Toolstack("this xl-colo was built without Xen; build it with: cargo build --features xen".into()))
}

/// Refuses.
pub async fn boot(_: &XenBoot, _: &[PathBuf], _: &Wire) -> Result<Guest, GuestError> {
    absent()
}

/// Nothing that could be given away.
pub fn give_away(_: Guest, _: &[PathBuf]) -> Result<Option<String>, String> {
    absent().map_err(|error: GuestError| error.to_string())
}

/// Nothing.
pub fn set_aside(_: &str) -> Result<Option<String>, String> {
    Ok(None)
}

/// Refuses.
pub async fn stand_by(
    _: &str,
    _: &Geometry,
    _: Mode,
    _: &[PathBuf],
    _: ReplicaConfig,
    _: &Wire,
) -> Result<(Guest, bool), GuestError> {
    absent()
}

/// Nothing that could be asked.
#[must_use]
pub fn facts() -> Option<XenFacts> {
    None
}

/// Refuses.
pub fn guest_facts(_: &str) -> Result<Vec<Obstacle>, String> {
    absent().map_err(|error: GuestError| error.to_string())
}

/// Unknown.
#[must_use]
pub fn device_model_path() -> Option<PathBuf> {
    None
}
