//! Planted bugs, for proving that the simulator's oracles can fail.
//!
//! Each is one decision turned wrong at the place where the right one is made. Outside the test build
//! [`active`] is a constant `false` and the wrong branch does not exist in the binary.

/// A bug the simulator must catch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// Packets of an epoch leave before VMSTATE_RECEIVED.
    ReleaseBeforeReceived,
    /// Secondary packets of an epoch that ended are still compared.
    NoFence,
    /// A checkpoint keeps what the secondary's guest wrote.
    KeepActiveAtCheckpoint,
    /// Pages reach the guest before the checkpoint is whole.
    ApplyBeforeWhole,
    /// A failover wanted while loading is carried out at once, on a half-loaded guest.
    NoRelaunch,
    /// Writes of an old generation are accepted.
    AcceptOldGeneration,
    /// A secondary that has given the guest up claims it when the primary hangs up.
    ClaimAfterDismissal,
    /// A primary that dismisses its secondary does not wait until that has given the guest up.
    GoOnUnconfirmed,
    /// A page's delta is taken from what was sent first, not last.
    StaleDelta,
}

impl Mutant {
    /// Every mutant.
    pub const ALL: [Self; 9] = [
        Self::ReleaseBeforeReceived,
        Self::NoFence,
        Self::KeepActiveAtCheckpoint,
        Self::ApplyBeforeWhole,
        Self::NoRelaunch,
        Self::AcceptOldGeneration,
        Self::ClaimAfterDismissal,
        Self::GoOnUnconfirmed,
        Self::StaleDelta,
    ];
}

#[cfg(feature = "mutants")]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in the calling thread, or removes it.
#[cfg(feature = "mutants")]
pub fn plant(mutant: Option<Mutant>) {
    ACTIVE.with(|active| active.set(mutant));
}

/// Whether the bug is planted in the calling thread.
#[cfg(feature = "mutants")]
#[must_use]
pub fn active(mutant: Mutant) -> bool {
    ACTIVE.with(|active| active.get() == Some(mutant))
}

/// Whether the bug is planted: never, outside the test build.
#[cfg(not(feature = "mutants"))]
#[must_use]
pub const fn active(_mutant: Mutant) -> bool {
    false
}
