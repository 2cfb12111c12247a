//! The log on standard error: for a person or a pipe with times and levels, for the journal without what it knows itself.
//!
//! systemd says in JOURNAL_STREAM which file standard error is when it leads to the journal (systemd.exec(5)). A line then
//! begins with its priority, as sd-daemon(3) has it, so that `journalctl -p warning` finds what it should.

use std::io::IsTerminal;
use std::sync::Arc;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use xen_colo::daemon::live::LogFilter;

/// Begins to log; returns what can change how much.
pub(crate) fn begin(filter: EnvFilter) -> LogFilter {
    let logging = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Colours are for a terminal: in a file or a pipe they are noise.
    let logging = logging.with_ansi(std::io::stderr().is_terminal());
    if is_journal() {
        let logging = logging.event_format(Journal).with_filter_reloading();
        let handle = logging.reload_handle();
        logging.init();
        LogFilter(Arc::new(move |text| handle.reload(parse(text)?).map_err(|error| error.to_string())))
    } else {
        let logging = logging.with_filter_reloading();
        let handle = logging.reload_handle();
        logging.init();
        LogFilter(Arc::new(move |text| handle.reload(parse(text)?).map_err(|error| error.to_string())))
    }
}

fn parse(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text).map_err(|error| error.to_string())
}

/// The variable alone says nothing: it is inherited by whoever sends standard error elsewhere.
fn is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let Some((device, inode)) = stream.split_once(':') else { return false };
    rustix::fs::fstat(std::io::stderr())
        .is_ok_and(|stat| device.parse() == Ok(stat.st_dev) && inode.parse() == Ok(stat.st_ino))
}

struct Journal;

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        write!(writer, "<{priority}>")?;
        Format::default().without_time().with_level(false).format_event(context, writer, event)
    }
}
