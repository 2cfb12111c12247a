//! Histograms over a logarithmic scale, as SVG.
//!
//! Five bins a decade between the least and the greatest number, so that a chart of millions is as large as one of ten.

use super::html::{Attribute, Html};
use super::story::Spread;
use super::text::grouped;
use std::fmt::Display;

const BINS_PER_DECADE: f64 = 5.0;
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 170.0;
/// Where the bars are: left, right, top, bottom.
const AREA: [f64; 4] = [44.0, WIDTH - 12.0, 26.0, HEIGHT - 24.0];

/// A coordinate, as short as it may be.
pub(super) fn px(at: f64) -> String {
    let text = format!("{at:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// The bin of a number; what is nothing is with what is least.
fn bin(number: u64) -> i32 {
    ((number.max(1) as f64).log10() * BINS_PER_DECADE + 1e-9).floor() as i32
}

/// How many numbers are in each bin, from the least bin to the greatest.
pub(super) fn bins(numbers: &[u64]) -> (i32, Vec<u64>) {
    let Some((least, greatest)) = numbers.iter().min().zip(numbers.iter().max()) else { return (0, Vec::new()) };
    let first = bin(*least);
    let mut counts = vec![0; (bin(*greatest) - first + 1) as usize];
    for number in numbers {
        counts[(bin(*number) - first) as usize] += 1;
    }
    (first, counts)
}

/// A number's place between two powers of ten.
fn decades(first: i32, count: usize) -> impl Iterator<Item = u32> {
    let last = (first + count as i32).div_euclid(BINS_PER_DECADE as i32);
    let begin = (first + BINS_PER_DECADE as i32 - 1).div_euclid(BINS_PER_DECADE as i32).max(0);
    (begin..=last).map(|decade| decade as u32)
}

/// A chart with its numbers below; nothing of nothing. `write` writes a number.
pub(super) fn histogram(h: &mut Html, id: &str, title: &str, numbers: &mut [u64], write: fn(u64) -> String) {
    let Some(spread) = Spread::of(numbers) else { return };
    let (first, counts) = bins(numbers);
    let [left, right, top, bottom] = AREA;
    let step = (right - left) / counts.len() as f64;
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    let x = |number: u64| {
        let at = (number.max(1) as f64).log10() * BINS_PER_DECADE - f64::from(first);
        (left + at * step).clamp(left, right)
    };
    let edge = |bin: i32| write(10f64.powf(f64::from(bin) / BINS_PER_DECADE).round() as u64);
    let words = sentence(&spread, write);
    h.of("figure", &[("class", &"chart")], |h| {
        h.put("figcaption", &[], title);
        let (t, d) = (format!("{id}-t"), format!("{id}-d"));
        let view = format!("0 0 {WIDTH} {HEIGHT}");
        h.of("svg", &[("viewBox", &view), ("role", &"img"), ("aria-labelledby", &format!("{t} {d}"))], |h| {
            h.put("title", &[("id", &t)], title);
            h.put("desc", &[("id", &d)], &words);
            line(h, "axis", [left, bottom, right, bottom]);
            label(h, "tick", left - 6.0, top + 4.0, "end", grouped(most));
            label(h, "tick", left - 6.0, bottom, "end", "0");
            for decade in decades(first, counts.len()) {
                let number = 10u64.saturating_pow(decade);
                line(h, "grid", [x(number), top, x(number), bottom]);
                label(h, "tick", x(number), bottom + 15.0, "middle", write(number));
            }
            for (at, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                let height = ((bottom - top) * *count as f64 / most as f64).max(1.5);
                let bin = first + at as i32;
                let area = [left + at as f64 * step + 1.0, bottom - height, (step - 2.0).clamp(1.0, 60.0), height];
                rect(h, "bar", area, format!("{} to {}: {}", edge(bin), edge(bin + 1), grouped(*count)));
            }
            for (name, number, y) in [("p50", spread.p50, top - 15.0), ("p99", spread.p99, top - 4.0)] {
                let at = x(number);
                line(h, "percentile", [at, top - 12.0, at, bottom]);
                let (at, anchor) = if at > (left + right) / 2.0 { (at - 4.0, "end") } else { (at + 4.0, "start") };
                label(h, "tick", at, y, anchor, format!("{name} {}", write(number)));
            }
        });
        h.put("p", &[("class", &"spread")], &words);
    });
}

/// A line from here to there.
pub(super) fn line(h: &mut Html, class: &str, [x1, y1, x2, y2]: [f64; 4]) {
    let [x1, y1, x2, y2] = [px(x1), px(y1), px(x2), px(y2)];
    h.put("line", &[("class", &class), ("x1", &x1), ("y1", &y1), ("x2", &x2), ("y2", &y2)], "");
}

/// A text in a drawing.
pub(super) fn label(h: &mut Html, class: &str, x: f64, y: f64, anchor: &str, text: impl Display) {
    h.put("text", &[("class", &class), ("x", &px(x)), ("y", &px(y)), ("text-anchor", &anchor)], text);
}

/// A bar, and what is said of it.
pub(super) fn rect(h: &mut Html, class: &str, [x, y, width, height]: [f64; 4], title: impl Display) {
    let [x, y, width, height] = [px(x), px(y), px(width), px(height)];
    let attributes: [Attribute; 5] = [("class", &class), ("x", &x), ("y", &y), ("width", &width), ("height", &height)];
    h.of("rect", &attributes, |h| h.put("title", &[], title));
}

fn sentence(spread: &Spread, write: fn(u64) -> String) -> String {
    let Spread { count, p50, p90, p99, max, .. } = spread;
    let count = grouped(*count as u64);
    format!(
        "{count} values: p50 {}, p90 {}, p99 {}, longest or largest {}",
        write(*p50),
        write(*p90),
        write(*p99),
        write(*max)
    )
}
