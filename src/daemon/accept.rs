//! Accepting connections from whoever comes, for as long as the process lives.
//!
//! ```text
//!   accept ── a connection ─▶ done
//!      ▲ └─ none: descriptors are short, or who came is gone ─▶ told once ─┐
//!      └───────────────────────── a pause ────────────────────────────────┘
//! ```
//!
//! The trap: a server that ends with the first accept that fails is ended by any crowd that has gone long since, and an
//! arbiter among them takes the takeovers with it. Without the pause it would spin until a descriptor is free.

use std::io;
use std::time::Duration;

/// Between two attempts.
const RETRY: Duration = Duration::from_millis(20);

/// Accepts until there is a connection. `what` is said of who has to wait meanwhile: "a host".
pub(in crate::daemon) async fn accept<T, F: Future<Output = io::Result<T>>>(
    what: &str,
    mut next: impl FnMut() -> F,
) -> T {
    let mut failed = false;
    loop {
        match next().await {
            Ok(link) => {
                if failed {
                    tracing::info!("{what} is accepted again");
                }
                return link;
            }
            Err(error) => {
                if !failed {
                    tracing::warn!(%error, "{what} cannot be accepted; it is tried again");
                }
                failed = true;
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_accept_that_fails_is_no_end() {
        let mut left = 3;
        let next = || {
            left -= 1;
            std::future::ready(if left > 0 { Err(io::Error::from_raw_os_error(24)) } else { Ok(left) })
        };
        let begun = tokio::time::Instant::now();
        assert_eq!(accept("a client", next).await, 0);
        assert!(begun.elapsed() >= 2 * RETRY, "it spins");
    }
}
