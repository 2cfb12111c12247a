//! What a host says of its guest's packets: which flows diverge, whether lock-step pays, what digests save.

use crate::compare::FlowReport;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A flow in which the two guests said different things.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Flow {
    /// Who talks to whom, and about what.
    pub flow: String,
    /// Frames of the primary that left because the secondary explained them.
    pub compared: u64,
    /// Frames of the primary that wait now.
    pub held: usize,
    /// Epochs in which the flow was a reason for a checkpoint.
    pub diverged: u64,
    /// Why it last was.
    pub last_cause: String,
    /// It was so in at least three of the last sixteen epochs.
    pub keeps_diverging: bool,
}

impl From<FlowReport> for Flow {
    fn from(report: FlowReport) -> Self {
        let FlowReport { key, compared, held, diverged, last_cause, keeps_diverging, .. } = report;
        Self { flow: key.to_string(), compared, held, diverged, last_cause: last_cause.to_string(), keeps_diverging }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let often = if self.keeps_diverging { ", KEEPS DIVERGING" } else { "" };
        let Self { flow, diverged, last_cause, .. } = self;
        write!(f, "{flow}: diverged in {diverged} epochs, last because {last_cause}{often}")
    }
}

/// Whether a pair in lock-step compares its guests' output ([`crate::colo::fallback`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LockStep {
    /// The guests differ so often that output is buffered as in Remus instead, and the secondary's guest rests.
    pub buffering: bool,
    /// How often it came to that.
    pub given_up: u64,
    /// When it is tried again at the earliest, in ms from now, while output is buffered.
    pub tried_again_in_ms: Option<u64>,
}

impl fmt::Display for LockStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tried_again_in_ms {
            Some(ms) => write!(f, "GIVEN UP for now: the guests differ too often; output waits for checkpoints, ")
                .and_then(|()| write!(f, "and lock-step is tried again in {ms} ms"))?,
            None => write!(f, "output is compared again")?,
        }
        write!(f, " (given up {} times)", self.given_up)
    }
}

/// What digests in the place of payloads did on the packet link ([`crate::compare::digest`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Digests {
    /// Frames that came as digests, on the primary.
    pub summaries: Option<u64>,
    /// Those of them whose bytes had to be asked for.
    pub looked_into: Option<u64>,
    /// Bytes that did not have to travel, on the secondary.
    pub saved_bytes: Option<u64>,
}

impl fmt::Display for Digests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.summaries, self.looked_into, self.saved_bytes) {
            (Some(summaries), Some(looked), _) => write!(f, "{summaries} frames came as digests, {looked} looked into"),
            (.., Some(saved_bytes)) => write!(f, "{} KiB of payload did not have to travel", saved_bytes >> 10),
            _ => write!(f, "on"),
        }
    }
}
