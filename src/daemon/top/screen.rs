//! What [`top`](super) shows: a function of what was seen and of the screen's size, and of nothing else.

use crate::clock::Instant;
use crate::daemon::status::{Health, Status};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Sparkline};
use std::collections::VecDeque;

/// Looks that are remembered: four minutes of them.
const SAMPLES_MAX: usize = 480;
/// Rows of a curve, its frame included.
const CURVE_ROWS: u16 = 5;

/// What one look saw.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    pause_us: u64,
    interval_us: u64,
    dirty_pages_per_s: u64,
    sent_bytes_per_s: u64,
}

/// What a curve is of.
type Curve = fn(&Sample) -> u64;

/// What was seen of a host.
#[derive(Debug, Default)]
pub struct History {
    samples: VecDeque<Sample>,
    last: Option<(Instant, Status)>,
    error: Option<String>,
}

impl History {
    /// The host said this.
    pub fn add(&mut self, now: Instant, status: Status) {
        self.error = None;
        let sent_bytes_per_s = self.last.as_ref().map_or(0, |(then, before)| {
            let us = (now - *then).as_micros() as u64;
            // Another protection counts from 0.
            let bytes = status.bytes_sent.saturating_sub(before.bytes_sent);
            bytes.saturating_mul(1_000_000).checked_div(us).unwrap_or(0)
        });
        let last = status.last_checkpoint.as_ref().map(|last| &last.checkpoint);
        self.samples.push_back(Sample {
            pause_us: last.map_or(0, |last| last.pause_us),
            interval_us: last.and_then(|last| last.interval_us).unwrap_or(0),
            dirty_pages_per_s: status.dirty_pages_per_s.unwrap_or(0),
            sent_bytes_per_s,
        });
        if self.samples.len() > SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.last = Some((now, status));
    }

    /// The host said nothing.
    pub fn fail(&mut self, error: &str) {
        self.error = Some(error.to_owned());
    }

    fn curve(&self, of: Curve, columns: u16) -> Vec<u64> {
        let skip = self.samples.len().saturating_sub(columns.into());
        self.samples.iter().skip(skip).map(of).collect()
    }
}

fn colour(health: Health) -> Color {
    match health {
        Health::Protected | Health::StandingBy => Color::Green,
        Health::Degraded | Health::Undecided | Health::TakenOver => Color::Yellow,
        Health::Unprotected | Health::Failed => Color::Red,
        Health::Empty | Health::Stopped => Color::Gray,
    }
}

/// Draws it.
pub fn draw(frame: &mut Frame<'_>, history: &History) {
    let Some((_, status)) = &history.last else { return };
    let rows = [Constraint::Length(1), Constraint::Min(0), Constraint::Length(2 * CURVE_ROWS), Constraint::Length(1)];
    // Where there is no room for all, what is said in words comes first.
    let curves = if frame.area().height >= 16 + 2 * CURVE_ROWS { rows[2] } else { Constraint::Length(0) };
    let [head, body, curves, foot] = Layout::vertical([rows[0], rows[1], curves, rows[3]]).areas(frame.area());
    let guest = status.guest.as_deref().unwrap_or("no guest");
    let health = Style::new().fg(colour(status.health)).add_modifier(Modifier::BOLD);
    let title = Line::from(vec![
        Span::styled(format!("{guest} on {}  ", status.host), Modifier::BOLD),
        Span::styled(status.health.name(), health),
    ]);
    frame.render_widget(Paragraph::new(title), head);
    frame.render_widget(Paragraph::new(status.to_string()), body);
    draw_curves(frame, curves, history);
    let foot_line = match &history.error {
        Some(error) => Line::styled(format!("NO ANSWER: {error}"), Style::new().fg(Color::Red)),
        None => Line::raw("q quits"),
    };
    frame.render_widget(Paragraph::new(foot_line), foot);
}

fn draw_curves(frame: &mut Frame<'_>, area: Rect, history: &History) {
    if area.height < 2 * CURVE_ROWS {
        return;
    }
    let now = history.samples.back().copied().unwrap_or_default();
    let of: [(String, Curve); 4] = [
        (format!("pause {} µs", now.pause_us), |sample| sample.pause_us),
        (format!("interval {} ms", now.interval_us / 1000), |sample| sample.interval_us),
        (format!("dirty {} pages/s", now.dirty_pages_per_s), |sample| sample.dirty_pages_per_s),
        (format!("sent {} KiB/s", now.sent_bytes_per_s >> 10), |sample| sample.sent_bytes_per_s),
    ];
    let half = [Constraint::Ratio(1, 2); 2];
    let [above, below] = Layout::vertical(half).areas(area);
    let places = [above, below].map(|row| Layout::horizontal(half).areas::<2>(row));
    for ((title, of), place) in of.into_iter().zip(places.into_iter().flatten()) {
        let block = Block::new().borders(Borders::ALL).title(title);
        let data = history.curve(of, block.inner(place).width);
        frame.render_widget(Sparkline::default().block(block).data(data), place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::events::Checkpoint;
    use crate::daemon::status::{LastCheckpoint, Protection};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn seen(looks: u64) -> History {
        let mut history = History::default();
        for look in 0..looks {
            let checkpoint =
                Checkpoint { checkpoint: look, pause_us: 100 + look, interval_us: Some(200_000), ..Default::default() };
            let status = Status {
                host: "a".into(),
                guest: Some("web".into()),
                protection: Protection::Protected,
                health: Health::Protected,
                bytes_sent: look * (512 << 10),
                dirty_pages_per_s: Some(77),
                last_checkpoint: Some(LastCheckpoint { age_ms: 3, checkpoint }),
                ..Status::default()
            };
            history.add(Instant::from_micros(look * 500_000), status);
        }
        history
    }

    fn drawn(history: &History, columns: u16, rows: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
        terminal.draw(|frame| draw(frame, history)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| (0..columns).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..rows).map(row).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_screen_shows_guest_state_and_curves() {
        let screen = drawn(&seen(10), 100, 40);
        assert!(screen.starts_with("web on a  protected\n"), "{screen}");
        for text in [
            "pause 109 µs",
            "interval 200 ms",
            "dirty 77 pages/s",
            "sent 1024 KiB/s",
            "q quits",
            "protection  protected",
        ] {
            assert!(screen.contains(text), "{text}: {screen}");
        }
        assert!(screen.contains('█'), "the curves have heights: {screen}");
        assert_eq!(screen, drawn(&seen(10), 100, 40), "the same again");
    }

    #[test]
    fn a_host_that_does_not_answer_is_said_and_its_last_word_stays() {
        let mut history = seen(3);
        history.fail("nobody listens");
        let screen = drawn(&history, 100, 40);
        assert!(screen.contains("NO ANSWER: nobody listens") && screen.contains("web on a"), "{screen}");
        history.add(Instant::from_micros(9_000_000), Status::default());
        assert!(!drawn(&history, 100, 40).contains("NO ANSWER"), "it answers again");
    }

    #[test]
    fn every_size_can_be_drawn() {
        let mut history = seen(SAMPLES_MAX as u64 + 20);
        history.fail("x");
        for (columns, rows) in [(1, 1), (2, 3), (20, 5), (80, 24), (80, 26), (300, 100)] {
            drawn(&history, columns, rows);
        }
        assert_eq!(history.samples.len(), SAMPLES_MAX);
        assert!(drawn(&history, 80, 20).contains("guest       web"), "words before curves");
        assert_eq!(drawn(&History::default(), 10, 2).trim(), "", "nothing was seen");
    }
}
