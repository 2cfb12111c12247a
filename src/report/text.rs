//! Numbers, times and foreign texts as the page writes them.

/// Longest foreign text, in bytes.
const TEXT_MAX_BYTES: usize = 512;

/// A text that came from elsewhere, on one line: what would move the cursor or turn the direction of writing is taken out.
/// `html` escapes what HTML would read.
#[must_use]
pub fn plain(text: &str) -> String {
    let cut = &text[..text.floor_char_boundary(TEXT_MAX_BYTES)];
    let is_trick = |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut plain: String = cut.chars().map(|c| if is_trick(c) { '\u{fffd}' } else { c }).collect();
    if cut.len() < text.len() {
        plain.push('…');
    }
    plain
}

/// 1234567 as "1,234,567".
#[must_use]
pub fn grouped(number: u64) -> String {
    group(&number.to_string())
}

/// With one decimal: 1234.56 as "1,234.6".
#[must_use]
pub fn tenths(number: f64) -> String {
    let text = format!("{number:.1}");
    match text.split_once('.') {
        Some((whole, tenth)) => format!("{}.{tenth}", group(whole)),
        None => text,
    }
}

fn group(digits: &str) -> String {
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Three digits that count, without zeroes that say nothing.
fn short(number: f64) -> String {
    let decimals = if number >= 99.95 { 0 } else { usize::from(number < 9.995) + 1 };
    let text = format!("{number:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A time in the unit that fits it.
#[must_use]
pub fn duration(us: u64) -> String {
    let s = us / 1_000_000;
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{} ms", short(us as f64 / 1e3)),
        1_000_000..120_000_000 => format!("{} s", short(us as f64 / 1e6)),
        _ if s < 7200 => format!("{} min {} s", s / 60, s % 60),
        _ if s < 172_800 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

/// Bytes in the unit that fits them.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let fitting = units.iter().enumerate().rev().find(|(at, _)| bytes >= 1 << (10 * (at + 1)));
    match fitting {
        None => format!("{bytes} B"),
        Some((at, unit)) => format!("{} {unit}", short(bytes as f64 / (1u64 << (10 * (at + 1))) as f64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_the_unit_that_fits() {
        for (us, text) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (1_000, "1 ms"),
            (47_312, "47.3 ms"),
            (1_500_000, "1.5 s"),
            (119_900_000, "120 s"),
            (125_000_000, "2 min 5 s"),
            (7_260_000_000, "2 h 1 min"),
            (200_000_000_000, "2 d 7 h"),
        ] {
            assert_eq!(duration(us), text);
        }
        for (count, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (21_705_523, "20.7 MiB"), (u64::MAX, "16777216 TiB")]
        {
            assert_eq!(bytes(count), text);
        }
        assert_eq!((grouped(1_234_567), tenths(1234.56)), ("1,234,567".into(), "1,234.6".into()));
    }

    #[test]
    fn a_foreign_text_stays_on_its_line_and_is_cut_between_characters() {
        assert_eq!(plain("a\nb\u{202e}c\0<b>"), "a\u{fffd}b\u{fffd}c\u{fffd}<b>");
        let long = plain(&"é".repeat(TEXT_MAX_BYTES));
        assert_eq!((long.chars().count(), long.chars().last()), (TEXT_MAX_BYTES / 2 + 1, Some('…')));
    }
}
