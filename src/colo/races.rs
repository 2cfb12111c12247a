//! Every failure and race that QEMU's COLO is known for, each with the arrow it has here.
//!
//! The rows are those of the behavioural analysis of qemu `migration/colo.c` and `colo-failover.c`: peer death
//! while idle, hangs, losses at each step, failover while loading, failed loads, wrong exit reasons. In QEMU
//! most of them end in a wait that only an operator ends. The last test walks both machines through every
//! input in every state and shows that none waits without a deadline.

use super::arbiter::{Answer, Claim, Policy, Register, Verdict};
use super::failover::{ExitReason, FailoverStatus};
use super::hello::{Mode, ResumeOrder};
use super::message::Message;
use super::primary::{self, Primary};
use super::secondary::{self, Secondary};
use super::{Cause, Exit, Loss};
use crate::clock::Instant;
use std::time::Duration;

fn at(ms: u64) -> Instant {
    Instant::from_micros(ms * 1000)
}

fn claim(holder: &str) -> Claim {
    Claim { guest: "web".into(), expected: 1, holder: holder.into() }
}

fn gone() -> Loss {
    Loss::Disconnected("end of stream".into())
}

fn won() -> Answer {
    Answer::Verdict(Verdict::Won { generation: 2 })
}

fn lost() -> Answer {
    Answer::Verdict(Verdict::Lost(Register { generation: 2, holder: "other".into() }))
}

fn drain_primary(it: &mut Primary) -> Vec<primary::Action> {
    std::iter::from_fn(|| it.poll_action()).collect()
}

fn drain_secondary(it: &mut Secondary) -> Vec<secondary::Action> {
    std::iter::from_fn(|| it.poll_action()).collect()
}

fn new_primary(change: impl FnOnce(&mut primary::Config)) -> Primary {
    let mut config = primary::Config::new(Mode::Colo, claim("a"));
    change(&mut config);
    Primary::new(at(0), config)
}

/// The states a primary passes through, in order; each step is one input further.
fn primary_after(steps: usize, change: impl FnOnce(&mut primary::Config)) -> Primary {
    let mut it = new_primary(change);
    let inputs: [fn(&mut Primary); 10] = [
        |p| p.handle_copied(at(1)),
        |p| p.handle_captured(at(2)),
        |p| p.handle_disk_drained(at(3)),
        |p| p.handle_message(at(4), Message::CheckpointReady),
        |p| p.request_checkpoint(at(50), Cause::Command),
        |p| p.handle_message(at(51), Message::CheckpointReply),
        |p| p.handle_captured(at(52)),
        |p| p.handle_disk_drained(at(53)),
        |p| p.handle_message(at(54), Message::VmstateReceived),
        |p| p.handle_message(at(55), Message::VmstateLoaded),
    ];
    for input in inputs.iter().take(steps) {
        drain_primary(&mut it);
        input(&mut it);
    }
    it
}

/// The same for a secondary. Step 8 is `Loading`.
fn secondary_after(steps: usize) -> Secondary {
    let mut it = Secondary::new(at(0), secondary::Config::new(Mode::Colo, claim("b")));
    let inputs: [fn(&mut Secondary); 8] = [
        |s| s.handle_whole(at(1)),
        |s| s.handle_sealed(at(2), Ok(())),
        |s| s.handle_applied(at(3), Ok(())),
        |s| s.handle_message(at(50), Message::CheckpointRequest),
        |s| s.handle_message(at(51), Message::VmstateSend),
        |s| s.handle_whole(at(52)),
        |s| s.handle_sealed(at(53), Ok(())),
        |s| s.handle_applied(at(54), Ok(())),
    ];
    for input in inputs.iter().take(steps) {
        drain_secondary(&mut it);
        input(&mut it);
    }
    it
}

#[test]
fn a_checkpoint_walks_the_table() {
    use primary::Action::{AllowDisk, Capture, Release, Send, SendDevices, SendPages};
    let mut it = new_primary(|_| {});
    it.handle_copied(at(1));
    assert_eq!(drain_primary(&mut it), [Capture { resume: true }]);
    it.handle_captured(at(2));
    it.handle_disk_drained(at(3));
    assert_eq!(drain_primary(&mut it), [SendPages, SendDevices]);
    assert!(!it.is_protected(), "the secondary owns nothing yet");
    it.handle_message(at(4), Message::CheckpointReady);
    assert_eq!(drain_primary(&mut it), [Release { epoch: 0, cause: Cause::First }, AllowDisk { epoch: 1 }]);
    assert!(it.is_protected());
    it.request_checkpoint(at(50), Cause::PayloadDiffers);
    it.request_checkpoint(at(50), Cause::Aged);
    assert_eq!(drain_primary(&mut it), [Send(Message::CheckpointRequest)], "two requests are one checkpoint");
    it.handle_message(at(51), Message::CheckpointReply);
    assert_eq!(drain_primary(&mut it), [Send(Message::VmstateSend), Capture { resume: true }]);
    it.handle_captured(at(52));
    assert_eq!(drain_primary(&mut it), [SendPages], "the disk epoch is not at the secondary yet");
    it.handle_disk_drained(at(53));
    assert_eq!(drain_primary(&mut it), [SendDevices]);
    it.handle_message(at(54), Message::VmstateReceived);
    assert_eq!(drain_primary(&mut it), [Release { epoch: 1, cause: Cause::PayloadDiffers }, AllowDisk { epoch: 2 }]);
    it.handle_message(at(55), Message::VmstateLoaded);
    assert_eq!((it.state(), it.cause(), it.epoch()), (primary::State::Running, Cause::PayloadDiffers, 2));
    assert_eq!(drain_primary(&mut it), []);
}

/// The next checkpoint may begin in the same step in which one is released; each keeps its own cause.
#[test]
fn what_waits_for_the_first_state_does_not_give_it_its_cause() {
    let mut it = primary_after(2, |_| {});
    it.handle_disk_drained(at(3));
    drain_primary(&mut it);
    it.request_checkpoint(at(3), Cause::OutputWaits);
    it.handle_message(at(4), Message::CheckpointReady);
    let released = primary::Action::Release { epoch: 0, cause: Cause::First };
    let actions = drain_primary(&mut it);
    assert!(actions.contains(&released), "{actions:?}");
    assert_eq!((it.state(), it.cause()), (primary::State::WaitReply, Cause::OutputWaits));
}

#[test]
fn the_classic_order_resumes_after_vmstate_loaded() {
    let mut it = primary_after(5, |config| config.resume = ResumeOrder::AfterLoaded);
    drain_primary(&mut it);
    it.handle_message(at(51), Message::CheckpointReply);
    assert!(drain_primary(&mut it).contains(&primary::Action::Capture { resume: false }));
    it.handle_captured(at(52));
    it.handle_disk_drained(at(53));
    it.handle_message(at(54), Message::VmstateReceived);
    assert!(!drain_primary(&mut it).contains(&primary::Action::ResumeGuest));
    it.handle_message(at(55), Message::VmstateLoaded);
    assert_eq!(drain_primary(&mut it), [primary::Action::ResumeGuest]);
}

#[test]
fn the_secondary_walks_the_table() {
    use secondary::Action::{Apply, PauseGuest, RunGuest, Seal, Send};
    let mut it = secondary_after(0);
    it.handle_whole(at(1));
    assert_eq!(drain_secondary(&mut it), [Seal]);
    it.handle_sealed(at(2), Ok(()));
    assert_eq!(drain_secondary(&mut it), [Apply], "the first state is owned when it is loaded");
    it.handle_applied(at(3), Ok(()));
    assert_eq!(drain_secondary(&mut it), [RunGuest, Send(Message::CheckpointReady)]);
    it.handle_message(at(50), Message::CheckpointRequest);
    assert_eq!(drain_secondary(&mut it), [PauseGuest, Send(Message::CheckpointReply)]);
    it.handle_message(at(51), Message::VmstateSend);
    it.handle_whole(at(52));
    assert_eq!(drain_secondary(&mut it), [Seal]);
    it.handle_sealed(at(53), Ok(()));
    assert_eq!(drain_secondary(&mut it), [Send(Message::VmstateReceived), Apply]);
    it.handle_applied(at(54), Ok(()));
    assert_eq!(drain_secondary(&mut it), [RunGuest, Send(Message::VmstateLoaded)]);
}

#[test]
fn remus_never_runs_the_secondarys_guest_before_a_takeover() {
    let mut it = Secondary::new(at(0), secondary::Config::new(Mode::Remus, claim("b")));
    let mut seen = Vec::new();
    it.handle_whole(at(1));
    it.handle_sealed(at(2), Ok(()));
    it.handle_applied(at(3), Ok(()));
    it.handle_message(at(50), Message::CheckpointRequest);
    it.handle_message(at(51), Message::VmstateSend);
    it.handle_whole(at(52));
    it.handle_sealed(at(53), Ok(()));
    it.handle_applied(at(54), Ok(()));
    seen.extend(drain_secondary(&mut it));
    assert!(!seen.contains(&secondary::Action::RunGuest), "{seen:?}");
    it.handle_loss(at(60), gone());
    it.handle_answer(at(61), won());
    assert_eq!(drain_secondary(&mut it).last(), Some(&secondary::Action::TakeOver { generation: 2 }));
}

#[test]
fn peer_dies_while_idle_is_noticed_without_a_message() {
    // QEMU: nobody notices until the next checkpoint, up to 20 s.
    let mut p = primary_after(4, |_| {});
    drain_primary(&mut p);
    p.handle_loss(at(400), super::heartbeat::Silence::Unheard(Duration::from_millis(300)).into());
    assert_eq!(p.state(), primary::State::Arbitrating);
    let mut s = secondary_after(3);
    s.handle_loss(at(400), super::heartbeat::Silence::Unheard(Duration::from_millis(300)).into());
    assert_eq!(s.state(), secondary::State::Arbitrating);
}

#[test]
fn peer_hangs_in_each_wait_of_a_checkpoint_is_lost_at_the_deadline() {
    // QEMU: blocks in recv or send for ever, with the main lock held.
    for steps in [1, 2, 3, 5, 6, 7, 8, 9] {
        let mut p = primary_after(steps, |_| {});
        let waiting = p.state();
        let deadline = p.poll_timeout().unwrap_or_else(|| panic!("{waiting:?} waits for ever"));
        p.handle_timeout(deadline);
        assert!(matches!(p.loss(), Some(Loss::Hung { .. })), "{waiting:?}");
        assert_eq!(p.state(), primary::State::Arbitrating, "{waiting:?}");
    }
    for steps in [4, 5] {
        let mut s = secondary_after(steps);
        let deadline = s.poll_timeout().expect("a deadline");
        s.handle_timeout(deadline);
        assert!(matches!(s.loss(), Some(Loss::Hung { .. })));
        assert_eq!(s.state(), secondary::State::Arbitrating);
    }
}

#[test]
fn progress_keeps_a_slow_peer() {
    let mut p = primary_after(7, |_| {});
    for ms in (0..60_000).step_by(5000) {
        p.handle_progress(at(ms));
        p.handle_timeout(at(ms + 4999));
        assert_eq!(p.state(), primary::State::Sending);
    }
}

#[test]
fn primary_loses_the_connection_at_every_step_and_goes_on_alone_when_it_wins() {
    // QEMU: before C3 packets pile up for ever; from C3 to C10 the guest stays stopped until an operator comes.
    for steps in 1..=10 {
        let mut p = primary_after(steps, |_| {});
        drain_primary(&mut p);
        p.handle_loss(at(100), gone());
        let actions = drain_primary(&mut p);
        assert_eq!(actions[0], primary::Action::PauseGuest, "after {steps} steps: no output while undecided");
        assert!(matches!(actions[1], primary::Action::Ask(_)));
        p.handle_answer(at(101), won());
        assert_eq!(drain_primary(&mut p), [primary::Action::GoOn { generation: 2 }]);
        assert_eq!(p.state(), primary::State::Exited(Exit::Alone));
        assert_eq!((p.failover(), p.exit_reason()), (FailoverStatus::Completed, ExitReason::Error));
    }
}

#[test]
fn a_primary_that_lost_the_arbitration_stops_and_releases_nothing() {
    for steps in 1..=10 {
        let mut p = primary_after(steps, |_| {});
        drain_primary(&mut p);
        p.handle_loss(at(100), gone());
        drain_primary(&mut p);
        p.handle_answer(at(101), lost());
        assert_eq!(drain_primary(&mut p), [primary::Action::StopGuest], "after {steps} steps");
        assert_eq!(p.state(), primary::State::Exited(Exit::Stopped));
        // Whatever still arrives from the dead connection changes nothing.
        p.handle_message(at(102), Message::VmstateReceived);
        p.handle_message(at(102), Message::VmstateLoaded);
        p.handle_answer(at(103), won());
        assert_eq!(drain_primary(&mut p), []);
    }
}

#[test]
fn primary_loses_the_peer_during_the_first_copy_and_goes_on_unprotected() {
    let mut p = new_primary(|_| {});
    p.handle_loss(at(5), gone());
    assert_eq!(drain_primary(&mut p), [primary::Action::GoOn { generation: 1 }]);
    assert_eq!(p.state(), primary::State::Exited(Exit::Unprotected));
    let mut s = secondary_after(0);
    s.handle_loss(at(5), gone());
    assert_eq!(s.state(), secondary::State::Exited(Exit::NoState), "and the other side never claims");
}

#[test]
fn secondary_loses_the_connection_before_the_commit_point_and_goes_back() {
    for steps in [3, 4, 5, 6] {
        let mut s = secondary_after(steps);
        drain_secondary(&mut s);
        s.handle_loss(at(100), gone());
        let actions = drain_secondary(&mut s);
        assert_eq!(actions[..2], [secondary::Action::DropStaged, secondary::Action::PauseGuest], "after {steps}");
        s.handle_sealed(at(101), Ok(()));
        s.handle_answer(at(102), won());
        assert_eq!(drain_secondary(&mut s), [secondary::Action::TakeOver { generation: 2 }]);
        assert_eq!(s.epoch(), 1, "the staged state was never owned");
    }
}

#[test]
fn failover_wanted_while_loading_relaunches_when_the_load_is_done() {
    // QEMU: ACTIVE → RELAUNCH as well, and the load finishes first.
    for loss in [gone(), Loss::Requested] {
        let mut s = secondary_after(7);
        drain_secondary(&mut s);
        s.handle_loss(at(60), loss.clone());
        assert_eq!(drain_secondary(&mut s), [], "the load is not disturbed");
        assert_eq!(s.failover(), FailoverStatus::Relaunch);
        s.handle_loss(at(61), gone());
        s.handle_applied(at(62), Ok(()));
        assert_eq!(s.failover(), FailoverStatus::Active);
        let actions = drain_secondary(&mut s);
        assert!(!actions.contains(&secondary::Action::Send(Message::VmstateLoaded)), "{actions:?}");
        s.handle_answer(at(63), won());
        assert_eq!(drain_secondary(&mut s), [secondary::Action::TakeOver { generation: 2 }]);
        assert_eq!(s.epoch(), 2, "forward: the state that was owned");
        // QEMU practically always says `error` on this path, even for a request.
        let reason = if loss == Loss::Requested { ExitReason::Request } else { ExitReason::Error };
        assert_eq!(s.exit_reason(), reason);
    }
}

#[test]
fn failover_wanted_while_loading_and_the_load_fails_ends() {
    // QEMU: the state stays RELAUNCH for ever and every later request is refused.
    let mut s = secondary_after(7);
    s.handle_loss(at(60), gone());
    drain_secondary(&mut s);
    s.handle_applied(at(61), Err("bad device state".into()));
    assert_eq!(s.state(), secondary::State::Exited(Exit::Failed));
    assert_eq!(s.failover(), FailoverStatus::Completed);
    assert!(drain_secondary(&mut s).contains(&secondary::Action::StopGuest), "never a half-loaded guest");
}

#[test]
fn failover_between_received_and_loading_cannot_happen() {
    // QEMU: a window between sending message 5 and setting vmstate_loading, in which a failover deadlocks or
    // commits the disk at the older checkpoint. Here sealing, owning and Loading are one step.
    let mut s = secondary_after(6);
    drain_secondary(&mut s);
    s.handle_sealed(at(53), Ok(()));
    assert_eq!(s.state(), secondary::State::Loading);
    s.handle_loss(at(53), Loss::Requested);
    assert_eq!(s.failover(), FailoverStatus::Relaunch);
}

#[test]
fn a_failed_load_or_seal_ends_the_secondary_and_never_takes_over() {
    // QEMU: RAM new, devices half loaded, and a failover runs that guest.
    let mut s = secondary_after(7);
    drain_secondary(&mut s);
    s.handle_applied(at(54), Err("bad".into()));
    s.handle_loss(at(55), gone());
    s.handle_answer(at(56), won());
    assert_eq!(s.state(), secondary::State::Exited(Exit::Failed));
    let mut s = secondary_after(6);
    drain_secondary(&mut s);
    s.handle_sealed(at(53), Err("no space left for the spill file".into()));
    assert_eq!(s.state(), secondary::State::Exited(Exit::Failed));
    let actions = drain_secondary(&mut s);
    assert!(!actions.contains(&secondary::Action::Send(Message::VmstateReceived)), "{actions:?}");
}

#[test]
fn exit_reason_is_request_only_for_a_request() {
    let mut s = secondary_after(3);
    s.handle_loss(at(60), Loss::Requested);
    assert_eq!(s.exit_reason(), ExitReason::Processing);
    s.handle_answer(at(61), won());
    assert_eq!(s.exit_reason(), ExitReason::Request);
    let mut p = primary_after(4, |_| {});
    p.handle_loss(at(60), Loss::Requested);
    p.handle_answer(at(61), won());
    assert_eq!(p.exit_reason(), ExitReason::Request);
}

#[test]
fn a_second_failover_changes_nothing() {
    let mut s = secondary_after(3);
    s.handle_loss(at(60), Loss::Requested);
    drain_secondary(&mut s);
    s.handle_loss(at(61), gone());
    assert_eq!(drain_secondary(&mut s), []);
    assert_eq!(s.loss(), Some(&Loss::Requested));
}

#[test]
fn an_unexpected_message_is_a_lost_peer_and_names_itself() {
    let mut p = primary_after(4, |_| {});
    p.handle_message(at(60), Message::VmstateLoaded);
    assert_eq!(
        p.loss().unwrap().to_string(),
        "the peer broke the protocol: unexpected vmstate-loaded in state Running"
    );
    let mut s = secondary_after(3);
    s.handle_message(at(60), Message::VmstateSend);
    assert!(s.loss().unwrap().to_string().contains("unexpected vmstate-send in state Running"));
    let mut s = secondary_after(3);
    s.handle_whole(at(60));
    assert!(matches!(s.loss(), Some(Loss::Violation(_))));
}

#[test]
fn held_guests_wait_for_the_operator_and_say_so() {
    let mut p = primary_after(4, |config| config.policy = Policy::Hold);
    drain_primary(&mut p);
    p.handle_loss(at(60), gone());
    assert_eq!(drain_primary(&mut p), [primary::Action::PauseGuest]);
    assert_eq!((p.state(), p.exit_reason()), (primary::State::Held, ExitReason::Processing));
    assert_eq!(p.hold(), Some("the policy is to wait for the operator"));
    assert!(p.operator_decides());
    assert_eq!(drain_primary(&mut p), [primary::Action::GoOn { generation: 2 }]);
    assert!(!p.operator_decides(), "only a held guest can be decided for");
}

#[test]
fn an_unreachable_arbiter_is_asked_until_it_answers() {
    let mut s = secondary_after(3);
    s.handle_loss(at(60), gone());
    let (mut asked, mut now) = (0, at(60));
    while now < at(30_000) {
        if drain_secondary(&mut s).iter().any(|action| matches!(action, secondary::Action::Ask(_))) {
            asked += 1;
            s.handle_answer(now, Answer::Unreachable("refused".into()));
        }
        now = s.poll_timeout().expect("it goes on asking");
        s.handle_timeout(now);
    }
    assert_eq!(s.state(), secondary::State::Held);
    assert!(asked > 100, "{asked}");
    s.handle_answer(now, won());
    assert_eq!(s.state(), secondary::State::Exited(Exit::Alone));
}

#[test]
fn the_delay_timer_and_the_minimum_interval_pace_checkpoints() {
    let mut p = primary_after(4, |config| config.checkpoint_min_interval = Duration::from_millis(20));
    drain_primary(&mut p);
    let due = p.poll_timeout().unwrap();
    assert_eq!(due, at(4) + Duration::from_secs(5));
    p.handle_timeout(due);
    assert_eq!((p.state(), p.cause()), (primary::State::WaitReply, Cause::Delay));
    p.handle_message(due, Message::CheckpointReply);
    p.handle_captured(due);
    p.request_checkpoint(due, Cause::Aged);
    p.handle_disk_drained(due);
    p.handle_message(due, Message::VmstateReceived);
    p.handle_message(due, Message::VmstateLoaded);
    assert_eq!(p.state(), primary::State::Running, "asked for at once, but paced");
    assert_eq!(p.poll_timeout(), Some(due + Duration::from_millis(20)));
    p.handle_timeout(due + Duration::from_millis(20));
    assert_eq!((p.state(), p.cause()), (primary::State::WaitReply, Cause::Aged));
}

#[test]
fn a_primary_that_ends_the_protection_goes_on_only_when_the_secondary_has_given_up() {
    for steps in 0..=10 {
        let mut p = primary_after(steps, |_| {});
        drain_primary(&mut p);
        assert!(p.dismiss(at(100)), "after {steps} steps");
        assert_eq!(drain_primary(&mut p), [primary::Action::Dismiss], "the guest is not stopped for it");
        assert_eq!((p.state(), p.is_protected()), (primary::State::Dismissing, false));
        assert!(!p.dismiss(at(101)), "once");
        // Whatever the peer says of the checkpoint under way, none goes on and none begins.
        for message in [Message::CheckpointReply, Message::VmstateReceived, Message::VmstateLoaded] {
            p.handle_message(at(102), message);
        }
        p.request_checkpoint(at(103), Cause::Command);
        p.handle_captured(at(103));
        p.handle_disk_drained(at(103));
        assert_eq!(drain_primary(&mut p), [], "after {steps} steps");
        p.handle_given_up(at(104));
        assert_eq!(drain_primary(&mut p), [primary::Action::GoOn { generation: 1 }], "the generation it has");
        assert_eq!(p.state(), primary::State::Exited(Exit::Unprotected));
        assert_eq!((p.failover(), p.exit_reason()), (FailoverStatus::None, ExitReason::Request));
        p.handle_loss(at(105), gone());
        assert_eq!((drain_primary(&mut p), p.loss()), (vec![], Some(&Loss::Dismissed)));
    }
}

#[test]
fn a_peer_lost_before_it_gave_up_is_arbitrated_as_ever() {
    for steps in 1..=10 {
        let mut p = primary_after(steps, |_| {});
        p.dismiss(at(100));
        drain_primary(&mut p);
        p.handle_loss(at(101), gone());
        assert!(matches!(drain_primary(&mut p)[..], [primary::Action::PauseGuest, primary::Action::Ask(_)]), "{steps}");
        p.handle_given_up(at(102));
        assert_eq!(drain_primary(&mut p), [], "the arbiter's word is waited for");
        p.handle_answer(at(103), lost());
        assert_eq!(drain_primary(&mut p), [primary::Action::StopGuest]);
    }
    // Of a first copy the peer has nothing it could claim with.
    let mut p = new_primary(|_| {});
    p.dismiss(at(100));
    drain_primary(&mut p);
    p.handle_loss(at(101), gone());
    assert_eq!(drain_primary(&mut p), [primary::Action::GoOn { generation: 1 }]);
}

#[test]
fn a_peer_that_does_not_give_up_in_time_is_lost() {
    let mut p = primary_after(4, |_| {});
    p.dismiss(at(100));
    for ms in (100..10_100).step_by(100) {
        p.handle_progress(at(ms));
        p.handle_timeout(at(ms));
        assert_eq!(p.state(), primary::State::Dismissing, "at {ms}");
    }
    assert_eq!(p.poll_timeout(), Some(at(10_100)));
    p.handle_timeout(at(10_100));
    assert_eq!(p.state(), primary::State::Arbitrating);
    let why = p.loss().unwrap().to_string();
    assert_eq!(why, "the peer did not confirm the end of the protection within 10s");
}

#[test]
fn who_gives_up_undismissed_breaks_the_protocol() {
    let mut p = primary_after(4, |_| {});
    p.handle_given_up(at(100));
    assert!(matches!(p.loss(), Some(Loss::Violation(_))), "{:?}", p.loss());
    assert_eq!(p.state(), primary::State::Arbitrating);
}

#[test]
fn a_dismissed_secondary_never_claims() {
    for steps in 0..=8 {
        let mut s = secondary_after(steps);
        drain_secondary(&mut s);
        s.handle_dismissal(at(100));
        assert_eq!(drain_secondary(&mut s), [secondary::Action::DropStaged, secondary::Action::GiveUp], "{steps}");
        assert_eq!(s.state(), secondary::State::Dismissed);
        // What was under way, what is still on the wire, and an operator change nothing any more.
        s.handle_dismissal(at(101));
        s.handle_message(at(101), Message::CheckpointRequest);
        s.handle_whole(at(101));
        s.handle_sealed(at(101), Ok(()));
        s.handle_applied(at(101), Ok(()));
        s.handle_loss(at(101), Loss::Requested);
        assert!(!s.operator_decides());
        assert_eq!((drain_secondary(&mut s), s.state()), (vec![], secondary::State::Dismissed), "{steps}");
        if steps % 2 == 0 {
            s.handle_loss(at(102), gone());
        } else {
            s.handle_timeout(s.poll_timeout().expect("a primary that stays does not keep the place for ever"));
        }
        s.handle_answer(at(103), won());
        assert_eq!(drain_secondary(&mut s), [secondary::Action::StopGuest], "after {steps} steps");
        assert_eq!(s.state(), secondary::State::Exited(Exit::Dismissed));
        assert_eq!((s.failover(), s.exit_reason()), (FailoverStatus::None, ExitReason::Request));
    }
}

#[test]
fn a_secondary_that_has_parted_does_not_hear_of_a_dismissal() {
    let mut s = secondary_after(3);
    s.handle_loss(at(100), Loss::Requested);
    drain_secondary(&mut s);
    s.handle_dismissal(at(101));
    assert_eq!((drain_secondary(&mut s), s.state()), (vec![], secondary::State::Arbitrating));
    let mut s = secondary_after(7);
    s.handle_loss(at(100), Loss::Requested);
    s.handle_dismissal(at(101));
    assert_eq!(s.state(), secondary::State::Loading, "it will take over, and the primary is told nothing");
}

#[test]
fn no_input_in_any_state_panics_and_no_state_waits_for_ever() {
    let messages = [
        Message::CheckpointReady,
        Message::CheckpointRequest,
        Message::CheckpointReply,
        Message::VmstateSend,
        Message::VmstateReceived,
        Message::VmstateLoaded,
    ];
    for steps in 0..=10 {
        for message in messages {
            for answer in [won(), lost(), Answer::Unreachable(String::new()), Answer::NotFenced(String::new())] {
                let mut p = primary_after(steps, |_| {});
                p.handle_message(at(200), message);
                p.handle_loss(at(201), gone());
                p.handle_answer(at(202), answer.clone());
                let waits = matches!(p.state(), primary::State::Exited(_) | primary::State::Held);
                assert!(waits || p.poll_timeout().is_some(), "{:?}", p.state());
                let mut s = secondary_after(steps.min(8));
                s.handle_message(at(200), message);
                s.handle_loss(at(201), gone());
                s.handle_answer(at(202), answer);
                // Loading ends by the driver's own doing, never by a peer's.
                let waits = matches!(
                    s.state(),
                    secondary::State::Exited(_) | secondary::State::Held | secondary::State::Loading
                );
                assert!(waits || s.poll_timeout().is_some(), "{:?}", s.state());
            }
        }
    }
}
