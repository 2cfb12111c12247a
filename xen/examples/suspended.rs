//! How long a domain stands still, as seen from outside, whoever makes it stand still:
//!
//! `suspended DOMAIN COMMAND [ARGUMENT...]` runs the command, and looks at the domain every two milliseconds until it
//! ends. It prints one JSON line: how often the domain was suspended, how long each time and in all (µs), how long
//! the command took, and the largest gap between two looks, which is how wrong a time may be. The command's exit code
//! is its own.

use std::error::Error;
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use xen::{Interface, Store};

const LOOK_EVERY: Duration = Duration::from_millis(2);

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, command, arguments @ ..] = &arguments[..] else {
        eprintln!("suspended DOMAIN COMMAND [ARGUMENT...]");
        return Ok(ExitCode::from(2));
    };
    let xen = Interface::open()?;
    let domain = Store::open()?.by_name(name)?.ok_or("there is no such domain")?;
    let begun = Instant::now();
    let mut child = Command::new(command).args(arguments).stdout(Stdio::null()).spawn()?;
    let mut spans = Vec::new();
    let (mut since, mut looked, mut gap) = (None, begun, Duration::ZERO);
    let status = loop {
        let still = xen.domain_info(domain)?.is_some_and(|info| info.is_suspended() || info.paused);
        let now = Instant::now();
        gap = gap.max(now - looked);
        looked = now;
        match (still, since) {
            (true, None) => since = Some(now),
            (false, Some(from)) => {
                spans.push((now - from).as_micros());
                since = None;
            }
            _ => {}
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        sleep(LOOK_EVERY);
    };
    let took = begun.elapsed().as_micros();
    spans.sort_unstable();
    let rank = |percent: usize| spans.get((spans.len() * percent).div_ceil(100).saturating_sub(1)).copied();
    println!(
        "{}",
        serde_json::json!({
            "suspends": spans.len(),
            "p50_us": rank(50), "p90_us": rank(90), "max_us": rank(100),
            "total_us": spans.iter().sum::<u128>(),
            "took_us": took,
            "gap_us": gap.as_micros(),
        })
    );
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}
