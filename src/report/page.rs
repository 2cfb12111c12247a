//! The page: what an operator reads first, then the drawing, then the tables it was drawn from.
//!
//! One file, no script, nothing from elsewhere; a policy in it says so to the browser.

use super::chart::histogram;
use super::html::Html;
use super::logs::{Clients, Logs};
use super::story::{ByCause, Row, Spread, State, Story, Takeover};
use super::style::CSS;
use super::text::{bytes, duration, grouped, plain};
use super::timeline::{self, CAUSES_MAX};
use crate::colo::hello::Mode;
use crate::daemon::events::{Checkpoint, utc};

/// Rows of the table of causes; the rest is one row.
const CAUSE_ROWS_MAX: usize = 16;
/// The longest pauses that are named.
const LONGEST_MAX: usize = 10;
/// Clocks further apart than this make the order of two hosts' lines doubtful, in µs.
const CLOCKS_APART_US: u64 = 20_000;
/// Nothing is fetched, and nothing runs, whatever a text may hold.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";
/// The mark of a column of numbers, on paper and for a style.
const NUMBER: &str = "number";

pub(super) fn render(story: &Story, logs: &Logs) -> String {
    let mut h = Html::default();
    let guest = story.guest.as_deref().unwrap_or("no guest");
    let causes = story.causes();
    let names: Vec<String> = causes.iter().map(|(cause, _)| cause.clone()).collect();
    h.ours("<!DOCTYPE html>\n");
    h.of("html", &[("lang", &"en")], |h| {
        h.of("head", &[], |h| {
            h.void("meta", &[("charset", &"utf-8")]);
            h.void("meta", &[("name", &"viewport"), ("content", &"width=device-width, initial-scale=1")]);
            h.void("meta", &[("name", &"color-scheme"), ("content", &"light dark")]);
            h.void("meta", &[("http-equiv", &"Content-Security-Policy"), ("content", &POLICY)]);
            // An empty one of its own: browsers ask the server for theirs.
            h.void("link", &[("rel", &"icon"), ("href", &"data:,")]);
            h.put("title", &[], format!("{guest}: {}", headline(story)));
            h.of("style", &[], |h| h.ours(CSS));
        });
        h.of("body", &[], |h| {
            header(h, story, guest);
            h.of("main", &[], |h| {
                section(h, "summary", "Summary", |h| summary(h, story));
                section(h, "timeline", "Timeline", |h| {
                    legend(h, &names);
                    scroll(h, "timeline", |h| timeline::render(h, story, &names));
                });
                if !story.takeovers.is_empty() {
                    section(h, "takeover", "Takeover, step by step", |h| takeovers(h, story));
                }
                if !story.checkpoints.is_empty() {
                    section(h, "checkpoints", "Checkpoints", |h| checkpoints(h, story, causes));
                }
                section(h, "states", "How long in which state", |h| states(h, story));
                section(h, "changes", "All changes", |h| changes(h, story));
                section(h, "sources", "What this was made from", |h| sources(h, story, logs));
            });
            let version = env!("CARGO_PKG_VERSION");
            let written =
                format!("Written by xl-colo {version} from event logs. Times are those of each host's own wall clock.");
            h.put("footer", &[], written);
        });
    });
    h.into_string()
}

fn section(h: &mut Html, name: &str, title: &str, inside: impl FnOnce(&mut Html)) {
    let id = format!("h-{name}");
    h.of("section", &[("aria-labelledby", &id)], |h| {
        h.put("h2", &[("id", &id)], title);
        inside(h);
    });
}

/// What may be wider than the screen: a keyboard can move it.
fn scroll(h: &mut Html, label: &str, inside: impl FnOnce(&mut Html)) {
    h.of("div", &[("class", &"scroll"), ("tabindex", &0), ("role", &"group"), ("aria-label", &label)], inside);
}

/// A table: what it is, its heads with the classes of their columns, its rows.
fn table(h: &mut Html, label: &str, heads: &[(&str, &str)], rows: impl FnOnce(&mut Html)) {
    scroll(h, label, |h| {
        h.of("table", &[], |h| {
            h.of("thead", &[], |h| {
                h.of("tr", &[], |h| {
                    for (head, class) in heads {
                        h.put("th", &[("scope", &"col"), ("class", class)], head);
                    }
                });
            });
            h.of("tbody", &[], rows);
        });
    });
}

/// A cell.
fn cell(h: &mut Html, class: &str, text: impl std::fmt::Display) {
    h.put("td", &[("class", &class)], text);
}

fn row_head(h: &mut Html, text: impl std::fmt::Display) {
    h.put("th", &[("scope", &"row")], text);
}

fn note(h: &mut Html, is_warning: bool, text: impl std::fmt::Display) {
    h.put("p", &[("class", &if is_warning { "note warning" } else { "note" })], text);
}

fn header(h: &mut Html, story: &Story, guest: &str) {
    h.of("header", &[], |h| {
        h.put("p", &[("class", &"kicker")], "xl-colo report");
        h.put("h1", &[], guest);
        h.put("p", &[("class", &format!("headline v-{}", verdict(story)))], headline(story));
        h.of("p", &[("class", &"meta")], |h| {
            let (from, to) = (utc(story.from_us), utc(story.to_us));
            h.put("time", &[("datetime", &from)], &from);
            h.text(" to ");
            h.put("time", &[("datetime", &to)], &to);
            h.text(format!(" ({})", duration(story.to_us - story.from_us)));
        });
    });
}

/// `good`, `bad`, or `plain`: how the headline is coloured.
fn verdict(story: &Story) -> &'static str {
    match (&story.clients, story.takeovers.is_empty()) {
        (Some(Clients { lost_writes: 1.., .. } | Clients { connection_kept: false, .. }), _) => "bad",
        (_, false) | (Some(_), _) => "good",
        _ => "plain",
    }
}

fn headline(story: &Story) -> String {
    let protected = story.total_us(&[State::Protected, State::Degraded]);
    match story.takeovers.last() {
        Some(takeover) => {
            let decided = takeover.decided_after_ms.map(|ms| format!(", decided {ms} ms after the loss"));
            let how = if takeover.was_primary { "went on alone" } else { "took over" };
            format!("host {} {how} in generation {}{}", takeover.host, takeover.generation, decided.unwrap_or_default())
        }
        None if protected > 0 => format!("protected for {}, no takeover", duration(protected)),
        None => "never protected in these logs".into(),
    }
}

fn tile(h: &mut Html, name: &str, value: &str, more: &str) {
    h.of("div", &[("class", &"tile")], |h| {
        h.put("dt", &[], name);
        h.of("dd", &[], |h| {
            h.put("strong", &[], value);
            if !more.is_empty() {
                h.put("small", &[], more);
            }
        });
    });
}

fn summary(h: &mut Html, story: &Story) {
    let of = |states: &[State]| story.total_us(states);
    let (protected, degraded) = (of(&[State::Protected, State::Degraded]), of(&[State::Degraded]));
    let alone = of(&[State::Unprotected, State::Syncing, State::TakenOver]);
    let hosts: Vec<_> = story.lanes.iter().map(|lane| &*lane.host).collect();
    let generations: Vec<_> = story.generations.iter().map(u64::to_string).collect();
    let mode = story.mode.map_or("unknown".into(), |mode| mode.to_string());
    h.of("dl", &[("class", &"tiles")], |h| {
        tile(h, "Hosts", &hosts.join(", "), &format!("{mode} mode, generation {}", generations.join(", ")));
        let matter =
            if degraded > 0 { format!("of this {} degraded", duration(degraded)) } else { "never degraded".into() };
        tile(h, "Protected", &duration(protected), &matter);
        tile(h, "Alone", &duration(alone), "unprotected, first copy, after a takeover");
        let pause = Spread::of(&mut story.numbers(|it| Some(it.pause_us))).map(|Spread { p50, p99, max, .. }| {
            format!("pause p50 {}, p99 {}, longest {}", duration(p50), duration(p99), duration(max))
        });
        tile(h, "Checkpoints", &grouped(story.checkpoints.len() as u64), &pause.unwrap_or_default());
        match Spread::of(&mut story.numbers(|it| it.stream_bytes)) {
            None => tile(h, "Sent to the secondary", "not told", ""),
            Some(Spread { sum, p50, max, .. }) => {
                let more = format!("for one checkpoint p50 {}, most {}", bytes(p50), bytes(max));
                tile(h, "Sent to the secondary", &bytes(sum), &more);
            }
        }
        if let Some(takeover) = story.takeovers.last() {
            recovery_tile(h, takeover);
        }
        let links: Vec<_> = story.link_losses.iter().map(|(link, count)| format!("{link} {count}")).collect();
        let sum: u64 = story.link_losses.values().sum();
        tile(h, "Links lost", &if sum == 0 { "none".into() } else { grouped(sum) }, &links.join(", "));
        lost_tile(h, story.clients.as_ref());
    });
}

/// From what state the guest went on.
fn recovery_tile(h: &mut Html, takeover: &Takeover) {
    let since = |(number, age)| format!("checkpoint {number}, {} before the loss", duration(age));
    let since = takeover.recovery.map_or("the last checkpoint, which these logs do not tell of".into(), since);
    let age = takeover.recovery.map_or("not known".into(), |(_, age)| duration(age));
    let (value, more) = match (takeover.was_primary, takeover.mode) {
        (true, _) => ("the guest itself", "it ran here, nothing was rolled back".into()),
        (false, Some(Mode::Colo)) => ("its own copy", format!("in lock-step since {since}")),
        (false, _) => (&*age, format!("{since}; later output had not left")),
    };
    tile(h, "Recovery point", value, &more);
}

fn lost_tile(h: &mut Html, clients: Option<&Clients>) {
    let name = "Acknowledged writes lost";
    let Some(clients) = clients else { return tile(h, name, "not known", "event logs see no clients") };
    let connection = if clients.connection_kept { "the connection was kept" } else { "THE CONNECTION BROKE" };
    let lost = if clients.lost_writes == 0 { "none".into() } else { grouped(clients.lost_writes) };
    let (all, checked) = (grouped(clients.acknowledged_writes), grouped(clients.checked_writes));
    tile(h, name, &lost, &format!("of {all}, {checked} looked for; {connection}"));
}

const MARKS: [(&str, &str); 5] = [
    ("takeover", "takeover"),
    ("link-lost", "link lost"),
    ("link-back", "link made again"),
    ("silent", "last line of a host"),
    ("started", "process started"),
];

fn legend(h: &mut Html, causes: &[String]) {
    let swatch = |h: &mut Html, class: &str| {
        h.of("svg", &[("class", &"swatch"), ("viewBox", &"0 0 12 12"), ("aria-hidden", &true)], |h| {
            h.put("rect", &[("class", &class), ("width", &12), ("height", &12), ("rx", &2)], "");
        });
    };
    h.of("ul", &[("class", &"legend"), ("aria-label", &"states")], |h| {
        for state in State::ALL {
            h.of("li", &[], |h| {
                swatch(h, &format!("s-{}", state.name()));
                h.text(state.name());
            });
        }
    });
    h.of("ul", &[("class", &"legend"), ("aria-label", &"marks")], |h| {
        for (class, name) in MARKS {
            h.of("li", &[], |h| {
                h.of("svg", &[("class", &"swatch"), ("viewBox", &"-7 -1 14 14"), ("aria-hidden", &true)], |h| {
                    let shape = timeline::shape(class, 0.0, 0.0);
                    h.put("path", &[("class", &format!("mark m-{class}")), ("d", &shape)], "");
                });
                h.text(name);
            });
        }
    });
    h.of("ul", &[("class", &"legend"), ("aria-label", &"causes of checkpoints")], |h| {
        for (at, cause) in causes.iter().take(CAUSES_MAX + 1).enumerate() {
            h.of("li", &[], |h| {
                swatch(h, &format!("c{at}"));
                h.text(if at < CAUSES_MAX { plain(cause) } else { "other causes".into() });
            });
        }
    });
}

fn takeovers(h: &mut Html, story: &Story) {
    for takeover in &story.takeovers {
        steps(h, takeover);
    }
    if let Some(clients) = &story.clients {
        h.put("h3", &[], "As the clients saw it");
        clients_table(h, clients);
    }
    for (behind, other, us, count) in &story.clocks {
        let (apart, way) = (us.unsigned_abs(), if *us >= 0 { "behind" } else { "ahead" });
        let (by, count) = (duration(apart), grouped(*count as u64));
        let told = format!(
            "The clocks of hosts {behind} and {other} are apart by about {by} ({behind} is {way}; median over {count} \
             checkpoints that both told of, the way of a message included). Times of different hosts are no better than that."
        );
        note(h, apart > CLOCKS_APART_US, told);
    }
}

fn steps(h: &mut Html, takeover: &Takeover) {
    let lost = takeover.steps.iter().find(|step| step.what == "peer lost");
    let lost_us = lost.map_or(takeover.at_us, |step| step.at_us);
    h.put("h3", &[], format!("Host {}, generation {}", takeover.host, takeover.generation));
    note(h, false, &takeover.reason);
    let heads = [("Step", ""), ("After the loss", NUMBER), ("Wall clock", ""), ("What", "")];
    table(h, "steps of the takeover", &heads, |h| {
        for step in &takeover.steps {
            h.of("tr", &[("class", &if step.what == "taken over" { "strong" } else { "" })], |h| {
                row_head(h, step.what);
                let sign = if step.at_us < lost_us { "−" } else { "+" };
                cell(h, NUMBER, format!("{sign}{}", duration(step.at_us.abs_diff(lost_us))));
                cell(h, "time", utc(step.at_us));
                cell(h, "", &step.text);
            });
        }
    });
}

fn clients_table(h: &mut Html, clients: &Clients) {
    let killed = clients.killed.as_deref().map(|killed| format!("after the kill of the {}", plain(killed)));
    let killed = killed.unwrap_or_default();
    let rows = [
        ("the loss was noticed", clients.detection_ms, &*killed),
        ("first reply", clients.takeover_ms, &*killed),
        ("longest silence", clients.longest_silence_ms, "of the whole run"),
    ];
    table(h, "what the clients saw", &[("What", ""), ("Time", NUMBER), ("", "")], |h| {
        for (what, ms, more) in rows {
            h.of("tr", &[], |h| {
                row_head(h, what);
                cell(h, NUMBER, ms.map_or("not measured".into(), |ms| duration((ms * 1000.0) as u64)));
                cell(h, "", more);
            });
        }
    });
}

/// A number of each checkpoint: its name, how it is written, and what it is.
type Number = (&'static str, fn(u64) -> String, fn(&Checkpoint) -> Option<u64>);

const NUMBERS: [Number; 10] = [
    ("interval", duration, |it| it.interval_us),
    ("reply: the secondary stopped its guest", duration, |it| Some(it.reply_us)),
    ("pause: the guest stood still", duration, |it| Some(it.pause_us)),
    ("capture: until all was copied out", duration, |it| Some(it.capture_us)),
    ("transfer: until the secondary owned it", duration, |it| Some(it.transfer_us)),
    ("release: from the suspend until output left", duration, |it| Some(it.release_us)),
    ("load: until the secondary had loaded it", duration, |it| it.load_us),
    ("pages", grouped, |it| Some(it.pages)),
    ("device state", bytes, |it| Some(it.devices_bytes)),
    ("bytes sent", bytes, |it| it.stream_bytes),
];
/// Those with a chart: its id, its title, and which.
const CHARTS: [(&str, &str, usize); 4] = [
    ("pause", "Pauses", 2),
    ("interval", "Intervals", 0),
    ("bytes", "Bytes sent for a checkpoint", 9),
    ("pages", "Pages in a checkpoint", 7),
];

fn checkpoints(h: &mut Html, story: &Story, causes: Vec<(String, ByCause)>) {
    h.of("div", &[("class", &"charts")], |h| {
        for (id, title, at) in CHARTS {
            let (_, write, of) = NUMBERS[at];
            histogram(h, id, title, &mut story.numbers(of), write);
        }
    });
    h.put("h3", &[], "Their steps");
    let heads = [
        ("", ""),
        ("least", NUMBER),
        ("p50", NUMBER),
        ("p90", NUMBER),
        ("p99", NUMBER),
        ("most", NUMBER),
        ("known of", NUMBER),
    ];
    table(h, "steps of the checkpoints", &heads, |h| {
        for (name, write, of) in NUMBERS {
            spread_row(h, name, &mut story.numbers(of), write);
        }
        spread_row(h, "load, as the secondary tells it", &mut story.loads_us.clone(), duration);
    });
    h.put("h3", &[], "By cause");
    causes_table(h, story, causes);
    h.put("h3", &[], "The longest pauses");
    longest(h, story);
}

fn spread_row(h: &mut Html, name: &str, numbers: &mut [u64], write: fn(u64) -> String) {
    let Some(Spread { count, min, p50, p90, p99, max, .. }) = Spread::of(numbers) else { return };
    h.of("tr", &[], |h| {
        row_head(h, name);
        for number in [min, p50, p90, p99, max] {
            cell(h, NUMBER, write(number));
        }
        cell(h, NUMBER, grouped(count as u64));
    });
}

fn causes_table(h: &mut Html, story: &Story, mut causes: Vec<(String, ByCause)>) {
    let rest = causes.split_off(causes.len().min(CAUSE_ROWS_MAX));
    let all = story.checkpoints.len().max(1) as f64;
    let numbers = ["taken", "share", "pause p50", "pause p99", "longest", "pages", "sent"].map(|head| (head, NUMBER));
    let heads = [&[("Cause", "")], &numbers[..]].concat();
    table(h, "checkpoints by cause", &heads, |h| {
        for (cause, by) in &mut causes {
            let Spread { count, p50, p99, max, .. } = Spread::of(&mut by.pauses_us).unwrap_or_default();
            h.of("tr", &[], |h| {
                row_head(h, plain(cause));
                cell(h, NUMBER, grouped(count as u64));
                cell(h, NUMBER, format!("{:.1} %", count as f64 * 100.0 / all));
                [p50, p99, max].into_iter().for_each(|us| cell(h, NUMBER, duration(us)));
                cell(h, NUMBER, grouped(by.pages));
                cell(h, NUMBER, bytes(by.stream_bytes));
            });
        }
        if !rest.is_empty() {
            h.of("tr", &[], |h| {
                row_head(h, format!("{} other causes", grouped(rest.len() as u64)));
                h.put("td", &[("colspan", &7)], "");
            });
        }
    });
}

fn longest(h: &mut Html, story: &Story) {
    let mut longest: Vec<_> = story.checkpoints.iter().collect();
    longest.sort_by_key(|(_, checkpoint)| std::cmp::Reverse(checkpoint.pause_us));
    let numbers = ["checkpoint", "pause", "capture", "transfer", "pages"].map(|head| (head, NUMBER));
    let heads = [&[("Wall clock", "")], &numbers[..], &[("Cause", "")]].concat();
    table(h, "the longest pauses", &heads, |h| {
        for (at, it) in longest.into_iter().take(LONGEST_MAX) {
            h.of("tr", &[], |h| {
                cell(h, "time", utc(*at));
                cell(h, NUMBER, grouped(it.checkpoint));
                [it.pause_us, it.capture_us, it.transfer_us].into_iter().for_each(|us| cell(h, NUMBER, duration(us)));
                cell(h, NUMBER, grouped(it.pages));
                cell(h, "", plain(&it.cause));
            });
        }
    });
}

fn states(h: &mut Html, story: &Story) {
    let numbers = State::ALL.map(|state| (state.name(), NUMBER));
    table(h, "time in each state", &[&[("Host", "")], &numbers[..]].concat(), |h| {
        for lane in &story.lanes {
            h.of("tr", &[], |h| {
                h.of("th", &[("scope", &"row")], |h| {
                    h.text(&lane.host);
                    if let Some(version) = &lane.version {
                        h.put("small", &[], format!(" xl-colo {version}"));
                    }
                });
                for state in State::ALL {
                    let us = lane.totals_us.get(state.name());
                    cell(h, NUMBER, us.map_or("–".into(), |us| duration(*us)));
                }
            });
        }
    });
}

fn changes(h: &mut Html, story: &Story) {
    let heads = [("Wall clock", ""), ("After", NUMBER), ("Host", ""), ("Event", NUMBER), ("What happened", "")];
    let put = |h: &mut Html, row: &Row| {
        h.of("tr", &[], |h| {
            cell(h, "time", utc(row.at_us));
            cell(h, NUMBER, format!("+{}", duration(row.at_us.saturating_sub(story.from_us))));
            cell(h, "", &row.host);
            cell(h, NUMBER, grouped(row.number));
            cell(h, &format!("e e-{}", row.class), &row.text);
        });
    };
    table(h, "all changes", &heads, |h| {
        story.rows.iter().for_each(|row| put(h, row));
        if story.rows_left_out > 0 {
            h.of("tr", &[], |h| {
                let left_out = format!("{} changes are left out here", grouped(story.rows_left_out));
                h.put("td", &[("class", &"cut"), ("colspan", &5)], left_out);
            });
        }
        story.last_rows.iter().for_each(|row| put(h, row));
    });
}

fn sources(h: &mut Html, story: &Story, logs: &Logs) {
    table(h, "files", &[("File", ""), ("Size", NUMBER), ("Events", NUMBER)], |h| {
        for file in &logs.files {
            h.of("tr", &[], |h| {
                cell(h, "", &file.name);
                cell(h, NUMBER, bytes(file.bytes));
                cell(h, NUMBER, grouped(file.events));
            });
        }
    });
    if logs.unread_bytes > 0 {
        note(h, true, format!("{} of logs were not read: it is more than is read at once.", bytes(logs.unread_bytes)));
    }
    if story.lost_events > 0 {
        let lost = grouped(story.lost_events);
        note(h, true, format!("{lost} events are lost: a host could not write them down in time."));
    }
    if story.other_hosts_events > 0 {
        note(h, true, format!("{} events are of hosts that have no lane here.", grouped(story.other_hosts_events)));
    }
    if logs.malformed > 0 {
        note(h, true, format!("{} lines are no events and were left out:", grouped(logs.malformed)));
        h.of("ul", &[("class", &"malformed")], |h| {
            for line in &logs.named {
                h.of("li", &[], |h| h.put("code", &[], line));
            }
            let more = logs.malformed - logs.named.len() as u64;
            if more > 0 {
                h.put("li", &[], format!("and {} more", grouped(more)));
            }
        });
    }
}
