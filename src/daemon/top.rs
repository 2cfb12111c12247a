//! `xl-colo top`: a host's status as a live screen.
//!
//! ```text
//!   ask the host, again and again ─▶ History ─▶ screen::draw (pure) ─▶ terminal
//!   keys ─ q, Esc, Ctrl-C ─▶ end: the terminal as it was
//! ```
//!
//! The trap is the terminal: whatever ends this, a host that dies, a signal, a panic, it is left as it was found.

pub mod screen;

use self::screen::History;
use super::control::ControlError;
use super::{engine_clock, operator};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Time between two looks at the host.
const LOOK: Duration = Duration::from_millis(500);
/// Time between two looks at whether it is over.
const KEYS: Duration = Duration::from_millis(100);

/// Why there is no screen.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// Nobody would see it.
    #[error("top needs a terminal; xl-colo status --watch says the same in lines")]
    NoTerminal,
    /// The host, before there was anything to show.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The terminal.
    #[error("terminal: {0}")]
    Terminal(#[from] io::Error),
}

/// Gives the terminal back.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = ratatui::try_restore();
    }
}

enum Key {
    Quit,
    Redraw,
}

/// Shows a host until somebody presses q.
pub async fn run(socket: &Path) -> Result<(), TopError> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(TopError::NoTerminal);
    }
    let mut history = History::default();
    // A host that is not there is said on an ordinary screen.
    history.add(engine_clock(), operator::status(socket).await?);
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    let mut terminal = ratatui::try_init()?;
    let _restored = Restored;
    let over = Arc::new(AtomicBool::new(false));
    let (keys, mut pressed) = mpsc::channel(16);
    let is_over = over.clone();
    let reading = tokio::task::spawn_blocking(move || read_keys(&keys, &is_over));
    let (answers, mut answered) = mpsc::channel(1);
    let asked = socket.to_owned();
    let asking = tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOOK).await;
            if answers.send(operator::status(&asked).await).await.is_err() {
                return;
            }
        }
    });
    let ended = loop {
        if let Err(error) = terminal.draw(|frame| screen::draw(frame, &history)) {
            break Err(error.into());
        }
        tokio::select! {
            key = pressed.recv() => match key {
                Some(Key::Redraw) => {}
                Some(Key::Quit) | None => break Ok(()),
            },
            answer = answered.recv() => match answer {
                Some(Ok(status)) => history.add(engine_clock(), status),
                Some(Err(error)) => history.fail(&error.to_string()),
                None => break Ok(()),
            },
            _ = terminated.recv() => break Ok(()),
            _ = hung_up.recv() => break Ok(()),
        }
    };
    over.store(true, Ordering::Relaxed);
    asking.abort();
    let _ = reading.await;
    ended
}

fn read_keys(keys: &mpsc::Sender<Key>, is_over: &AtomicBool) {
    while !is_over.load(Ordering::Relaxed) {
        let key = match event::poll(KEYS).and_then(|ready| if ready { event::read().map(Some) } else { Ok(None) }) {
            Ok(Some(Event::Key(key))) if key.kind == KeyEventKind::Press => match key.code {
                KeyCode::Char('q') | KeyCode::Esc => Key::Quit,
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Key::Quit,
                _ => continue,
            },
            Ok(Some(Event::Resize(..))) => Key::Redraw,
            Ok(_) => continue,
            Err(_) => Key::Quit,
        };
        if keys.blocking_send(key).is_err() {
            return;
        }
    }
}
