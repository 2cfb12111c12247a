//! Where a replica stands in its life, and why a step of it was refused. [`super::epochs`] draws the steps.

use crate::disk::DiskError;
use serde::Serialize;

/// Where a replica stands, in QEMU's words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Not started: neither guest nor primary may touch it.
    None,
    /// The initial copy is arriving; there is nothing to take over with.
    Syncing,
    /// Checkpoints are sealed.
    Running,
    /// Taken over; layers are being merged into the base.
    Failover,
    /// Taken over; merging met an error and may be tried again. The guest's disk is whole.
    FailoverFailed,
    /// The base is the disk.
    Done,
}

/// Why a step of the replica's life was refused.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The step makes no sense at this stage.
    #[error("{step}: not possible while the replica is in stage {stage:?}")]
    Stage {
        /// The step.
        step: &'static str,
        /// The stage.
        stage: Stage,
    },
    /// The generation is not newer than the one in force.
    #[error("generation {theirs} is over: this replica is at generation {ours}")]
    StaleGeneration {
        /// The generation offered.
        theirs: u64,
        /// The generation in force.
        ours: u64,
    },
    /// A write was lost since the last good checkpoint. This one must not be acknowledged; what was sealed before
    /// is whole, and only a new initial copy makes checkpoints possible again.
    #[error("this checkpoint's disk is not whole: {first}")]
    Broken {
        /// The first error.
        first: String,
    },
    /// The disk below failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}
