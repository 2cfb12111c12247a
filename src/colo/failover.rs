//! Failover states and the reasons COLO ends with, in QEMU's words.
//!
//! ```text
//!            wanted            begun             done
//!   none ──────────▶ require ─────────▶ active ─────────▶ completed
//!    ▲                                    │
//!    └──────── loaded ──── relaunch ◀─────┘ wanted while a checkpoint was loading
//! ```
//!
//! qemu `qapi/migration.json` FailoverStatus, COLOExitReason; `migration/colo-failover.c`. The trap is QEMU's:
//! it leaves `relaunch` only after a *successful* load, so a load that fails hangs the failover for ever. Here a
//! failed load ends the secondary, and the arrow `relaunch → completed` says so.

use serde::{Deserialize, Serialize};

/// Where a failover stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverStatus {
    /// No failover.
    #[default]
    None,
    /// One is wanted.
    Require,
    /// One is being carried out.
    Active,
    /// It is over.
    Completed,
    /// It was wanted while a checkpoint was loading, and starts again when the load is done.
    Relaunch,
}

/// Why COLO ended on this side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitReason {
    /// It has not ended.
    #[default]
    None,
    /// Somebody asked for it.
    Request,
    /// The peer was lost, or something failed.
    Error,
    /// A failover is under way.
    Processing,
}

/// The failover state, which moves only along the arrows above.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Failover {
    status: FailoverStatus,
}

impl Failover {
    /// Where it stands.
    #[must_use]
    pub const fn status(self) -> FailoverStatus {
        self.status
    }

    /// Whether an arrow leads from one state to the other.
    #[must_use]
    pub const fn is_arrow(from: FailoverStatus, to: FailoverStatus) -> bool {
        use FailoverStatus::{Active, Completed, None, Relaunch, Require};
        matches!(
            (from, to),
            (None, Require)
                | (Require, Active)
                | (Active, Completed)
                | (Active, Relaunch)
                | (Relaunch, None)
                | (Relaunch, Completed)
        )
    }

    /// Takes an arrow. Panics where there is none: whoever calls this decides which arrow is taken, so a wrong
    /// one is a bug of ours and never a peer's doing.
    pub fn advance(&mut self, to: FailoverStatus) {
        assert!(Self::is_arrow(self.status, to), "no arrow from {:?} to {to:?}", self.status);
        self.status = to;
    }

    /// Takes the arrows from `None` to `Active`.
    pub fn begin(&mut self) {
        self.advance(FailoverStatus::Require);
        self.advance(FailoverStatus::Active);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [FailoverStatus; 5] = [
        FailoverStatus::None,
        FailoverStatus::Require,
        FailoverStatus::Active,
        FailoverStatus::Completed,
        FailoverStatus::Relaunch,
    ];

    #[test]
    fn six_arrows_and_no_others() {
        let arrows = ALL.iter().flat_map(|from| ALL.iter().map(move |to| (*from, *to)));
        assert_eq!(arrows.filter(|(from, to)| Failover::is_arrow(*from, *to)).count(), 6);
        for to in ALL {
            assert!(!Failover::is_arrow(FailoverStatus::Completed, to), "completed is the end");
        }
    }

    #[test]
    #[should_panic(expected = "no arrow from None to Completed")]
    fn a_wrong_arrow_is_a_bug() {
        Failover::default().advance(FailoverStatus::Completed);
    }
}
