//! A guest suspended and let go on, many times.

use crate::{guest, median, until};
use std::env;
use std::time::{Duration, Instant};
use xen::{Error, SuspendChannel};

#[test]
fn suspended_and_resumed_many_times() {
    let Some(g) = guest("suspended_and_resumed_many_times") else { return };
    let rounds: usize = env::var("XEN_COLO_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(50);
    let running = g.x.resume_cooperative(g.d);
    assert!(matches!(running, Err(Error::NotSuspended { shutdown: None, .. })), "{running:?}");
    let mut channel = SuspendChannel::new(&g.x, g.d).expect("channel");
    assert!(!channel.wait(Duration::from_millis(50)).expect("wait"), "the event of binding was left");
    let (mut suspends, mut lags, mut resumes) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let begun = Instant::now();
        g.store.request_suspend(g.d).expect("request");
        assert!(channel.wait(Duration::from_secs(20)).expect("wait"), "no event in round {round}");
        suspends.push(begun.elapsed().as_secs_f64() * 1e3);
        let woken = Instant::now();
        until("the guest is suspended", Duration::from_secs(1), || g.info().is_suspended());
        lags.push(woken.elapsed().as_secs_f64() * 1e3);
        assert!(!channel.wait(Duration::ZERO).expect("wait"), "one suspend, two events");
        if round % 10 == 0 {
            // A pause on top keeps the processor from running, so that what the resume left can be looked at.
            g.x.pause(g.d).expect("pause");
            let before = g.x.extended_state(g.d, 0).expect("extended state");
            g.x.resume_cooperative(g.d).expect("resume");
            let after = g.x.extended_state(g.d, 0).expect("extended state");
            assert_eq!(g.x.rax(g.d, 0).expect("rax"), 1);
            assert!(before == after, "the extended state changed");
            if let (0, Some(state)) = (round, before) {
                println!("extended state: {} bytes, xstate_bv {:#x}", state.bytes.len(), state.xstate_bv());
            }
            g.x.unpause(g.d).expect("unpause");
        } else {
            let begun = Instant::now();
            g.x.resume_cooperative(g.d).expect("resume");
            resumes.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        g.store.resume_domain(g.d).expect("tell xenstored");
        assert_eq!(g.info().shutdown, None);
    }
    if rounds > 1 {
        println!(
            "{rounds} rounds: suspended in {:.1} ms, known {:.2} ms after the event, resumed in {:.2} ms (medians)",
            median(&mut suspends),
            median(&mut lags),
            median(&mut resumes)
        );
    }
    drop(channel);
    // And a second channel hears as well as the first.
    let mut channel = SuspendChannel::new(&g.x, g.d).expect("channel");
    g.store.request_suspend(g.d).expect("request");
    assert!(channel.wait(Duration::from_secs(20)).expect("wait"));
    g.x.resume_cooperative(g.d).expect("resume");
    g.store.resume_domain(g.d).expect("tell xenstored");
}

#[test]
fn a_request_that_is_not_taken_can_be_taken_back() {
    let Some(g) = guest("a_request_that_is_not_taken_can_be_taken_back") else { return };
    g.paused(|| {
        g.store.request_suspend(g.d).expect("request");
        assert!(g.store.clear_suspend(g.d).expect("clear"));
        assert!(!g.store.clear_suspend(g.d).expect("clear"), "nothing is left to clear");
    });
    let mut channel = SuspendChannel::new(&g.x, g.d).expect("channel");
    assert!(!channel.wait(Duration::from_millis(500)).expect("wait"));
    assert_eq!(g.info().shutdown, None);
}
