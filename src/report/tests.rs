//! What a story makes of events, and what a page makes of stories that are odd, endless or hostile.

use super::chart::bins;
use super::logs::Logs;
use super::page;
use super::story::{Spread, State, Story};
use crate::colo::hello::Mode;
use crate::daemon::events::{Checkpoint, Event, What};

const SECOND: u64 = 1_000_000;

fn event(at_us: u64, host: &str, what: What) -> Event {
    Event { number: at_us / 1000, at_us, unix_us: at_us, host: host.into(), guest: Some("web".into()), what }
}

fn pair(what: fn(String, Option<Mode>, u64) -> What, generation: u64) -> What {
    what("peer".into(), Some(Mode::Remus), generation)
}

fn protected(generation: u64) -> What {
    pair(|peer, mode, generation| What::Protected { peer, mode, generation }, generation)
}

fn standing_by(generation: u64) -> What {
    pair(|peer, mode, generation| What::StandingBy { peer, mode, generation }, generation)
}

fn checkpoint(number: u64, cause: &str, pause_us: u64) -> What {
    let stream_bytes = Some(number * 1000);
    What::Checkpoint(Checkpoint {
        checkpoint: number,
        cause: cause.into(),
        pause_us,
        stream_bytes,
        ..Checkpoint::default()
    })
}

fn told(mut events: Vec<Event>) -> (Story, String) {
    events.sort_by_key(|event| event.unix_us);
    let logs = Logs { events, ..Logs::default() };
    let story = Story::of(&logs, None).unwrap();
    let page = page::render(&story, &logs);
    (story, page)
}

/// A primary that is killed at 9 s, and the clock of whose secondary is 300 ms behind.
fn a_takeover() -> Vec<Event> {
    let a = |at, what| event(at, "a", what);
    let b = |at, what| event(at - 300_000, "b", what);
    vec![
        a(SECOND, What::HostStarted { pid: 1, version: "1.2".into() }),
        a(SECOND, What::Unprotected { reason: "new".into() }),
        a(3 * SECOND, protected(1)),
        b(3 * SECOND, standing_by(1)),
        a(4 * SECOND, checkpoint(1, "first", 500)),
        b(4 * SECOND, What::Loaded { checkpoint: 1, load_us: 7 }),
        a(5 * SECOND, What::Degraded { reason: "late".into() }),
        a(7 * SECOND, protected(1)),
        a(8 * SECOND, checkpoint(2, "delay", 40)),
        b(8 * SECOND, What::Loaded { checkpoint: 2, load_us: 9 }),
        a(9 * SECOND, What::Paused),
        b(9 * SECOND, What::LinkLost { link: "peer".into(), reason: "silence".into(), heard_ms: Some(250) }),
        b(9 * SECOND + 1000, What::Arbitrating { reason: "silence".into() }),
        b(9 * SECOND + 5000, What::TakenOver { generation: 2, reason: "silence".into(), decided_after_ms: Some(4) }),
        b(9 * SECOND + 6000, What::FirstOutput { after_us: 2000 }),
        b(12 * SECOND, What::HostEnded),
    ]
}

#[test]
fn a_takeover_is_told_step_by_step() {
    let (story, page) = told(a_takeover());
    assert_eq!(story.guest.as_deref(), Some("web"));
    assert_eq!(story.total_us(&[State::Protected]), 4 * SECOND, "from 3 to 5, from 7 to its last line at 9");
    assert_eq!(story.total_us(&[State::Degraded]), 2 * SECOND);
    assert_eq!(story.total_us(&[State::StandingBy]), 6 * SECOND + 1000);
    let [takeover] = &story.takeovers[..] else { panic!("{:#?}", story.takeovers) };
    assert_eq!((&takeover.host[..], takeover.generation, takeover.was_primary), ("b", 2, false));
    assert_eq!(takeover.recovery, Some((2, SECOND)), "the second checkpoint was a second old");
    let at = |ms: i64| (9_000_000 - 300_000 + ms * 1000) as u64;
    let steps: Vec<_> = takeover.steps.iter().map(|step| (step.what, step.at_us)).collect();
    assert_eq!(
        steps,
        [
            ("last checkpoint", at(-1000)),
            // Of host b's clock this is the future of what host a, whose clock is ahead, has told so far.
            ("peer's last line", at(-700)),
            ("peer last heard", at(-250)),
            ("peer lost", at(0)),
            ("arbitration", at(1)),
            ("decided", at(4)),
            ("taken over", at(5)),
            ("first output", at(6)),
        ]
    );
    assert_eq!(story.clocks, [("b".to_owned(), "a".to_owned(), 300_000, 2)]);
    assert!(page.contains("apart by about 300 ms (b is behind; median over 2 checkpoints"), "{page}");
    for words in [
        "host b took over in generation 2, decided 4 ms after the loss",
        "<strong>6 s</strong><small>of this 2 s degraded</small>",
        "<strong>1 s</strong><small>checkpoint 2, 1 s before the loss; later output had not left</small>",
        "event logs see no clients",
        "the last line of host a",
        "<th scope=\"row\">taken over</th><td class=\"number\">+5 ms</td>",
        "<th scope=\"row\">peer last heard</th><td class=\"number\">−250 ms</td>",
    ] {
        assert!(page.contains(words), "{words} is not in {page}");
    }
}

#[test]
fn a_survivor_that_was_the_primary_rolled_nothing_back() {
    let lost = What::LinkLost { link: "peer".into(), reason: "x".into(), heard_ms: None };
    let over = What::TakenOver { generation: 2, reason: "x".into(), decided_after_ms: None };
    let (story, page) = told(vec![event(1, "a", protected(1)), event(2, "a", lost), event(3, "a", over)]);
    assert!(story.takeovers[0].was_primary);
    assert!(
        page.contains("host a went on alone in generation 2") && page.contains("nothing was rolled back"),
        "{page}"
    );
}

#[test]
fn a_process_that_was_killed_and_started_again_leaves_a_gap() {
    let start = || What::HostStarted { pid: 1, version: "1".into() };
    let alone = || What::Unprotected { reason: "r".into() };
    let events = [(1, start()), (1, alone()), (3, What::Paused), (10, start()), (11, alone()), (12, What::HostEnded)];
    let (story, _) = told(events.into_iter().map(|(s, what)| event(s * SECOND, "a", what)).collect());
    assert_eq!(story.total_us(&[State::Unprotected]), 3 * SECOND, "nobody knows how it was from 3 to 10");
    assert_eq!(story.total_us(&[State::Empty]), SECOND);
    assert!(story.lanes[0].ended);
}

#[test]
fn numbers_are_of_the_nearest_rank() {
    let spread = Spread::of(&mut (1..=1000).rev().collect::<Vec<_>>()).unwrap();
    assert_eq!((spread.min, spread.p50, spread.p90, spread.p99, spread.max), (1, 500, 900, 990, 1000));
    let one = Spread::of(&mut [7]).unwrap();
    assert_eq!((one.p50, one.p99, one.sum), (7, 7, 7));
    assert_eq!(Spread::of(&mut []), None);
    assert_eq!(bins(&[]), (0, vec![]));
    assert_eq!(bins(&[0, 1, 10, 10, 99]), (0, vec![2, 0, 0, 0, 0, 2, 0, 0, 0, 1]));
    assert!(bins(&[0, u64::MAX]).1.len() < 100, "as few as it may be");
}

/// Every loop over what a log may hold without end.
#[test]
fn an_endless_hostile_log_gives_a_page_as_small_as_any() {
    let mut events = Vec::new();
    for n in 0..30_000u64 {
        let text = format!("<b>{n}\"'&\u{202e}{}", "é".repeat(300));
        let host = format!("h{}<b>{}", n % 20, "é".repeat(300));
        let at = n * 1000;
        let what = match n % 9 {
            0 => What::Degraded { reason: text },
            1 => What::TakenOver { generation: n, reason: text, decided_after_ms: Some(u64::MAX) },
            2 => What::LinkLost { link: text.clone(), reason: text, heard_ms: Some(u64::MAX) },
            3 => What::HostStarted { pid: 1, version: text },
            4 => What::Lost { count: u64::MAX },
            5 => What::FirstOutput { after_us: u64::MAX },
            6 => What::Syncing { peer: text, mode: None, generation: n },
            _ => checkpoint(n, &text, u64::MAX),
        };
        events.push(event(at, &host, what));
    }
    events.push(event(u64::MAX, "h", What::Paused));
    let malformed = (0..20).map(|n| format!("x:{n}: <i>")).collect();
    let logs = Logs { events, malformed: u64::MAX, named: malformed, unread_bytes: u64::MAX, ..Logs::default() };
    let story = Story::of(&logs, None).unwrap();
    let page = page::render(&story, &logs);
    assert!(page.len() < 2 << 20, "{} bytes", page.len());
    assert!(!page.contains("<b>") && !page.contains("<i>") && !page.contains('\u{202e}'));
    assert!(page.contains("changes are left out here"));
    let figures = serde_json::to_string(&story.figures(&logs, "page".as_ref())).unwrap();
    assert!(figures.len() < 200_000, "{} bytes", figures.len());
}

#[test]
fn one_event_is_a_story_too() {
    let (story, page) = told(vec![event(5, "a", What::Paused)]);
    assert_eq!((story.from_us, story.to_us, story.checkpoints.len()), (5, 5, 0));
    assert!(page.contains("never protected in these logs") && !page.contains("NaN") && !page.contains("inf"));
    assert!(!page.contains("id=\"h-takeover\"") && !page.contains("id=\"h-checkpoints\""));
}

#[test]
fn a_page_follows_from_its_logs() {
    assert_eq!(told(a_takeover()).1, told(a_takeover()).1);
}
