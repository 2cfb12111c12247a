//! The run over time, as one SVG: a lane for each host, and below it what checkpoints were taken, and what each took.
//!
//! Everything shares one axis, cut into [`SLICES`]: what is drawn does not grow with the logs. In a slice the bars are all
//! of its checkpoints, the points the greatest number among them.

use super::chart::{label, line, px, rect};
use super::html::Html;
use super::story::{Lane, Span, State, Story};
use super::text::{bytes, duration, grouped, plain};
use crate::daemon::events::Checkpoint;

/// Slices of the axis.
const SLICES: usize = 176;
/// Spans that are drawn as they are; of more, the most noteworthy in each slice.
const SPANS_MAX: usize = 200;
/// Causes that have a colour of their own.
pub(super) const CAUSES_MAX: usize = 7;
/// Vertical lines.
const TAKEOVER_LINES_MAX: usize = 10;
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 104.0;
const RIGHT: f64 = WIDTH - 8.0;
const LANE: f64 = 18.0;
const LANE_STEP: f64 = 42.0;
const PANEL: f64 = 64.0;
const PANEL_STEP: f64 = 100.0;
/// Times between two ticks, in µs: the first that leaves few of them.
const TICKS_US: [u64; 31] = [
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    30_000_000,
    60_000_000,
    120_000_000,
    300_000_000,
    600_000_000,
    1_200_000_000,
    1_800_000_000,
    3_600_000_000,
    7_200_000_000,
    14_400_000_000,
    21_600_000_000,
    43_200_000_000,
    86_400_000_000,
    172_800_000_000,
    604_800_000_000,
    2_592_000_000_000,
    31_536_000_000_000,
];

/// From the first event to the last.
struct Axis {
    from_us: u64,
    length_us: u64,
}

impl Axis {
    fn of(story: &Story) -> Self {
        Self { from_us: story.from_us, length_us: (story.to_us - story.from_us).max(1) }
    }

    fn share(&self, at_us: u64) -> f64 {
        (at_us.saturating_sub(self.from_us) as f64 / self.length_us as f64).clamp(0.0, 1.0)
    }

    fn x(&self, at_us: u64) -> f64 {
        LEFT + self.share(at_us) * (RIGHT - LEFT)
    }

    fn slice(&self, at_us: u64) -> usize {
        ((self.share(at_us) * SLICES as f64) as usize).min(SLICES - 1)
    }

    fn slice_x(slice: usize) -> f64 {
        LEFT + slice as f64 * (RIGHT - LEFT) / SLICES as f64
    }

    /// Where there are ticks, from the begin.
    fn ticks(&self) -> impl Iterator<Item = u64> {
        let step = TICKS_US.into_iter().find(|step| self.length_us / step <= 8).unwrap_or(self.length_us);
        (0..=self.length_us / step).map(move |n| n * step)
    }
}

/// The whole drawing. `causes` are those with a colour of their own.
pub(super) fn render(h: &mut Html, story: &Story, causes: &[String]) {
    let axis = Axis::of(story);
    let lanes_end = 30.0 + story.lanes.len() as f64 * LANE_STEP;
    let panels = if story.checkpoints.is_empty() { 0.0 } else { 4.0 };
    let height = lanes_end + panels * PANEL_STEP + 8.0;
    let panel = |n: f64| lanes_end + n * PANEL_STEP + 24.0;
    let view = format!("0 0 {WIDTH} {height}");
    let labelled = "timeline-t timeline-d";
    h.of("svg", &[("class", &"timeline"), ("viewBox", &view), ("role", &"img"), ("aria-labelledby", &labelled)], |h| {
        h.put("title", &[("id", &"timeline-t")], "The run over time");
        let what = "A lane for each host with its states, and below it the checkpoints by cause, their pauses, their bytes and \
                    their pages. The tables below say the same in words.";
        h.put("desc", &[("id", &"timeline-d")], what);
        for tick in axis.ticks() {
            let at = axis.x(axis.from_us.saturating_add(tick));
            line(h, "grid", [at, 18.0, at, height - 8.0]);
            let anchor = if at > RIGHT - 30.0 { "end" } else { "middle" };
            let text = if tick == 0 { "0".into() } else { format!("+{}", duration(tick)) };
            label(h, "tick", at, 12.0, anchor, text);
        }
        for (n, lane) in story.lanes.iter().enumerate() {
            draw_lane(h, &axis, lane, 28.0 + n as f64 * LANE_STEP);
        }
        if panels > 0.0 {
            draw_causes(h, &axis, story, causes, panel(0.0));
            for (n, points) in POINTS.iter().enumerate() {
                draw_points(h, &axis, story, points, panel(n as f64 + 1.0));
            }
        }
        for takeover in story.takeovers.iter().take(TAKEOVER_LINES_MAX) {
            let at = axis.x(takeover.at_us);
            line(h, "takeover-line", [at, 18.0, at, height - 8.0]);
        }
    });
}

/// At most one span a slice where there are too many.
fn drawable(axis: &Axis, spans: &[Span]) -> Vec<Span> {
    if spans.len() <= SPANS_MAX {
        return spans.to_vec();
    }
    let mut slices: Vec<Option<State>> = vec![None; SLICES];
    for span in spans {
        for slice in &mut slices[axis.slice(span.from_us)..=axis.slice(span.to_us)] {
            *slice = (*slice).max(Some(span.state));
        }
    }
    let edge =
        |slice: usize| axis.from_us.saturating_add((axis.length_us as f64 * slice as f64 / SLICES as f64) as u64);
    let states = slices.into_iter().enumerate().filter_map(|(slice, state)| Some((slice, state?)));
    states.map(|(slice, state)| Span { from_us: edge(slice), to_us: edge(slice + 1), state }).collect()
}

fn draw_lane(h: &mut Html, axis: &Axis, lane: &Lane, y: f64) {
    let short: String = lane.host.chars().take(14).collect();
    label(h, "label", 0.0, y + 13.0, "start", short);
    for span in drawable(axis, &lane.spans) {
        let (from, to) = (axis.x(span.from_us), axis.x(span.to_us));
        let (name, width) = (span.state.name(), (to - from).max(1.5));
        let (length, begin) =
            (duration(span.to_us - span.from_us), duration(span.from_us.saturating_sub(axis.from_us)));
        let title = format!("host {}: {name} for {length}, from +{begin}", lane.host);
        rect(h, &format!("s-{name}"), [from, y, width, LANE], title);
        if width > 7.0 * name.len() as f64 {
            label(h, "span", from + width / 2.0, y + 13.0, "middle", name);
        }
    }
    let mut marks: Vec<_> = lane.marks.iter().map(|mark| (axis.slice(mark.at_us), mark)).collect();
    // One of a kind in a slice.
    marks.dedup_by_key(|(slice, mark)| (*slice, mark.class));
    for (_, mark) in marks {
        let shape = shape(mark.class, axis.x(mark.at_us), y + LANE + 2.0);
        h.of("path", &[("class", &format!("mark m-{}", mark.class)), ("d", &shape)], |h| {
            h.put("title", &[], format!("+{}: {}", duration(mark.at_us.saturating_sub(axis.from_us)), mark.text));
        });
    }
}

/// A mark's form says what it is, for who sees no colours.
pub(super) fn shape(class: &str, x: f64, y: f64) -> String {
    let x = px(x);
    match class {
        "takeover" => format!("M{x} {y}l6 6l-6 6l-6 -6z"),
        "link-lost" => format!("M{x} {y}l5 9h-10z"),
        "link-back" => format!("M{x} {}l5 -9h-10z", px(y + 9.0)),
        "silent" => format!("M{x} {y}m-4 0l8 8m0 -8l-8 8"),
        _ => format!("M{x} {y}v8"),
    }
}

fn draw_head(h: &mut Html, title: &str, what: &str, y: f64) {
    label(h, "label", 0.0, y - 6.0, "start", title);
    label(h, "tick", LEFT, y - 6.0, "start", what);
    line(h, "axis", [LEFT, y + PANEL, RIGHT, y + PANEL]);
}

fn draw_causes(h: &mut Html, axis: &Axis, story: &Story, causes: &[String], y: f64) {
    let mut slices = vec![[0u64; CAUSES_MAX + 1]; SLICES];
    for (at, checkpoint) in &story.checkpoints {
        let cause = causes.iter().take(CAUSES_MAX).position(|cause| *cause == checkpoint.cause).unwrap_or(CAUSES_MAX);
        slices[axis.slice(*at)][cause] += 1;
    }
    let most = slices.iter().map(|slice| slice.iter().sum::<u64>()).max().unwrap_or(1).max(1);
    let scale = PANEL / most as f64;
    let length = duration(axis.length_us / SLICES as u64);
    draw_head(h, "Checkpoints", &format!("by cause; at most {} in a slice of {length}", grouped(most)), y);
    label(h, "tick", LEFT - 6.0, y + 4.0, "end", grouped(most));
    label(h, "tick", LEFT - 6.0, y + PANEL, "end", "0");
    for (slice, counts) in slices.iter().enumerate() {
        for (cause, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let below: u64 = counts[..cause].iter().sum();
            let area = [Axis::slice_x(slice), y + PANEL - (below + count) as f64 * scale, 4.4, *count as f64 * scale];
            let name = if cause < CAUSES_MAX { causes.get(cause).map(String::as_str) } else { None };
            let title = format!("{}: {}", plain(name.unwrap_or("other causes")), grouped(*count));
            rect(h, &format!("c{cause}"), area, title);
        }
    }
}

/// A panel of points: its title, what is drawn, how a number is written, and whence it comes.
type Points = (&'static str, &'static str, fn(u64) -> String, fn(&Checkpoint) -> Option<u64>);

const POINTS: [Points; 3] = [
    ("Pause", "the longest in each slice", duration, |it| Some(it.pause_us)),
    ("Bytes", "sent for one, the most in each slice", bytes, |it| it.stream_bytes),
    ("Pages", "in one, the most in each slice", grouped, |it| Some(it.pages)),
];

fn draw_points(h: &mut Html, axis: &Axis, story: &Story, (title, what, write, of): &Points, y: f64) {
    let mut slices: Vec<Option<u64>> = vec![None; SLICES];
    for (at, checkpoint) in &story.checkpoints {
        let slice = &mut slices[axis.slice(*at)];
        *slice = (*slice).max(of(checkpoint));
    }
    draw_head(h, title, &format!("{what}; logarithmic"), y);
    let known = || slices.iter().enumerate().filter_map(|(slice, number)| Some((slice, (*number)?)));
    let (Some(least), Some(most)) = (known().map(|it| it.1).min(), known().map(|it| it.1).max()) else {
        return label(h, "tick", LEFT, y + PANEL / 2.0, "start", "not told of in these logs");
    };
    let low = (least.max(1) as f64).log10().floor();
    let high = (most.max(1) as f64).log10().ceil().max(low + 1.0);
    let level = |number: f64| y + PANEL - PANEL * (number.log10() - low) / (high - low);
    // Five lines at most.
    let step = ((high - low) / 4.0).ceil().max(1.0);
    for n in 0..=((high - low) / step) as u32 {
        let number = 10f64.powf(low + f64::from(n) * step);
        line(h, "grid", [LEFT, level(number), RIGHT, level(number)]);
        label(h, "tick", LEFT - 6.0, level(number) + 4.0, "end", write(number as u64));
    }
    for (slice, number) in known() {
        let (x, at) = (Axis::slice_x(slice), level(number.max(1) as f64));
        rect(h, "stem", [x + 1.2, at, 2.0, y + PANEL - at], write(number));
        h.of("circle", &[("class", &"point"), ("cx", &px(x + 2.2)), ("cy", &px(at)), ("r", &2.4)], |h| {
            h.put("title", &[], write(number));
        });
    }
}
