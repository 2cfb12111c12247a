//! Planted bugs, for proving that the oracles of the simulator and of the crash tests can fail.
//!
//! Each is one decision turned wrong at the place where the right one is made. Outside the test build
//! [`active`] is a constant `false` and the wrong branch does not exist in the binary.

/// A bug that must be caught.
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
    /// A replica's image is called whole before it is flushed.
    WholeBeforeFlush,
    /// A replica's image is written before it is called not whole.
    ResyncAfterWrite,
    /// The name of an image's record is not flushed.
    ForgetDirectory,
    /// An image's record counts as durable because it could be read.
    TrustStateRead,
    /// What an earlier process wrote to an image counts as flushed.
    TrustPageCache,
    /// A flush of an image that failed is tried again, and believed.
    FlushAgain,
    /// A flush that was lent counts for what was written while it was under way.
    LentCoversLater,
    /// The word that an image is a checkpoint is said though the image was changed before it could be.
    WordNotTakenBack,
    /// What a guest changed while it was copied counts as copied.
    ForgetChanged,
    /// An image is written while a copy into it is under way.
    WriteBesideCopy,
    /// Room that a layer lent becomes an extent of the layer that is there when it is filled.
    TakeStrangersSpace,
    /// What was written to lent room takes the place of what was written there meanwhile.
    OvertakeWrite,
    /// Who waits for a spill file has the replica's lock.
    SpillUnderLock,
    /// A spill file is written over though a part of it is lent.
    ReuseLentFile,
    /// What the page cache shows of an image counts as being there, after a flush of it failed.
    TrustCachedImage,
    /// A guest's images are called whole as soon as one of them is.
    WholeAlone,
    /// Only the first of a guest's images is called not whole before a checkpoint is written into any.
    MarkFirstOnly,
    /// A checkpoint seals the guest's first disk only.
    SealFirstOnly,
    /// A checkpoint waits for the writes to the guest's first disk only.
    DrainFirstOnly,
    /// A mirror's bitmap forgets the writes of an epoch when it ends, not when it is owned.
    ForgetUnowned,
    /// An NBD request waits for an earlier one it overlaps only on the same connection.
    NoHoldAcrossConnections,
    /// An NBD request that is to be sent again holds nobody back.
    ReplayOvertaken,
    /// NBD writes that are complete and not flushed are not done again after a loss.
    ForgetRetained,
    /// An NBD flush counts for writes that were submitted after it.
    FlushCoversLater,
    /// The last of a stretch of TCP bytes is not compared.
    OverlookByte,
    /// Segments of the same place are taken for the same.
    OverlookPair,
    /// TCP bytes are compared only when both guests cut them alike.
    CutMatters,
    /// An explained datagram leaves before older ones of its flow.
    OvertakeInFlow,
    /// A flow that diverged goes on being compared.
    LeaveAfterDivergence,
    /// A fragment that overlaps others is passed over.
    TakeOverlap,
    /// A survivor says again what waited for a state that was never whole.
    RepeatUnowned,
    /// What is held leaves when the packet link is lost.
    OpenWithoutLink,
    /// SACK edges are not moved with the acknowledgement.
    LeaveSack,
    /// A client's echo of the guest's clock is not moved.
    LeaveEcho,
    /// A partial checksum follows a change that it knows nothing of.
    SumPartial,
    /// A survivor's clock may show clients an earlier time than they have seen.
    ClockGoesBack,
    /// A connection one side has closed is forgotten like one that both have.
    ForgetHalfClosed,
    /// A full table of connections is emptied.
    WipeWhenFull,
    /// A frame that was explained leaves twice.
    LeaveTwice,
    /// What waits for an epoch that has not begun is lost when all may leave.
    LoseLater,
    /// A translated segment keeps the checksum it had.
    LeaveSum,
    /// A client is told that guest A's acknowledgement is both guests'.
    TellOwnAck,
    /// A client is offered guest A's window, however small guest B's is.
    OfferOwnWindow,
    /// A client is told of blocks that guest A does not have.
    TellAllBlocks,
    /// A client is told of guest A's echo of its clock.
    TellOwnEcho,
    /// An acknowledgement that was made has no checksum.
    LeaveUnsummed,
}

impl Mutant {
    /// Every mutant the simulator must catch.
    pub const ALL: [Self; 13] = [
        Self::ReleaseBeforeReceived,
        Self::NoFence,
        Self::KeepActiveAtCheckpoint,
        Self::ApplyBeforeWhole,
        Self::NoRelaunch,
        Self::AcceptOldGeneration,
        Self::ClaimAfterDismissal,
        Self::GoOnUnconfirmed,
        Self::StaleDelta,
        Self::SealFirstOnly,
        Self::DrainFirstOnly,
        Self::OpenWithoutLink,
        Self::RepeatUnowned,
    ];
    /// Those it cannot, since its hosts never come back; the replica's own crash tests do.
    pub const OF_CRASHES: [Self; 10] = [
        Self::WholeBeforeFlush,
        Self::ResyncAfterWrite,
        Self::ForgetDirectory,
        Self::TrustStateRead,
        Self::TrustPageCache,
        Self::FlushAgain,
        Self::LentCoversLater,
        Self::WordNotTakenBack,
        Self::ForgetChanged,
        Self::TrustCachedImage,
    ];
    /// Those of what layers lend, which the replica's model catches.
    pub const OF_LENDING: [Self; 3] = [Self::TakeStrangersSpace, Self::OvertakeWrite, Self::ReuseLentFile];
    /// Those that only the crash tests of several disks can.
    pub const OF_SETS: [Self; 3] = [Self::WholeAlone, Self::MarkFirstOnly, Self::FlushAgain];
    /// Those of the NBD client, which its own tests catch.
    pub const OF_SESSIONS: [Self; 4] =
        [Self::NoHoldAcrossConnections, Self::ReplayOvertaken, Self::ForgetRetained, Self::FlushCoversLater];
    /// Those of the comparator, which its own property tests catch.
    pub const OF_JUDGEMENT: [Self; 5] =
        [Self::OverlookByte, Self::CutMatters, Self::OvertakeInFlow, Self::LeaveAfterDivergence, Self::TakeOverlap];
    /// Those of the rewriter, which its own tests catch.
    pub const OF_REWRITING: [Self; 6] = [
        Self::LeaveSack,
        Self::LeaveEcho,
        Self::SumPartial,
        Self::ClockGoesBack,
        Self::ForgetHalfClosed,
        Self::WipeWhenFull,
    ];
    /// Those of the acknowledgements that the comparator makes, which their own tests catch.
    pub const OF_TELLING: [Self; 5] =
        [Self::TellOwnAck, Self::OfferOwnWindow, Self::TellAllBlocks, Self::TellOwnEcho, Self::LeaveUnsummed];
    /// Those that the fuzzer's own oracles catch, and no comparison of a decoder with itself: by target.
    pub const OF_FUZZING: [(&'static str, Self); 3] =
        [("comparator", Self::LeaveTwice), ("comparator", Self::LoseLater), ("rewriter", Self::LeaveSum)];
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
