//! Gives orders to a monitor: ours, or a real QEMU's.

use crate::daemon::address::{Address, Link};
use crate::qmp::client::{Client, ClientError};
use crate::qmp::{Event, QmpError};
use serde_json::Value;
use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long an order may take, unless told otherwise. libxl waits 5 s.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// Nobody listens there.
    #[error("cannot connect to the monitor {at}: {source}")]
    Connect {
        /// The socket.
        at: Address,
        /// Why not.
        source: io::Error,
    },
    /// Nothing came in time. A QEMU serves one client at a time; and an order may still be carried out.
    #[error("{what}: no answer within {waited:?}; does another client hold the monitor?")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// It hung up.
    #[error("{what}: the monitor is gone: {source}")]
    Gone {
        /// What was waited for.
        what: String,
        /// How that was seen.
        source: io::Error,
    },
    /// It speaks no QMP.
    #[error("{what}: {source}")]
    Protocol {
        /// What was waited for.
        what: String,
        /// What it said.
        source: ClientError,
    },
    /// It refused.
    #[error("{command}: {source} ({})", source.class.name())]
    Refused {
        /// The command.
        command: String,
        /// In its words.
        source: QmpError,
    },
}

/// A connection to a monitor.
pub struct Monitor {
    link: Link,
    machine: Client,
    deadline: Duration,
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("machine", &self.machine).finish_non_exhaustive()
    }
}

impl Monitor {
    /// Connects to a Unix socket and negotiates. `deadline` is for this and for every order.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, MonitorError> {
        Self::connect_to(&Address::Unix(path.to_owned()), deadline).await
    }

    /// The same, wherever it is.
    pub async fn connect_to(at: &Address, deadline: Duration) -> Result<Self, MonitorError> {
        let connect = |source| MonitorError::Connect { at: at.clone(), source };
        let attempt = tokio::time::timeout(deadline, at.connect()).await;
        let link = attempt.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(connect)?;
        let mut monitor = Self { link, machine: Client::default(), deadline };
        monitor.until("greeting", deadline, |machine| machine.is_ready().then_some(())).await?;
        Ok(monitor)
    }

    /// Its release: major, minor, micro.
    #[must_use]
    pub fn version(&self) -> [u64; 3] {
        self.machine.version()
    }

    /// Gives an order, and waits for what came of it.
    pub async fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, MonitorError> {
        let id = self.machine.execute(command, arguments);
        let reply = |machine: &mut Client| {
            // An earlier one is the late reply to an order that was given up.
            std::iter::from_fn(|| machine.poll_reply()).find(|(of, _)| *of == id)
        };
        let (_, outcome) = self.until(command, self.deadline, reply).await?;
        outcome.map_err(|source| MonitorError::Refused { command: command.to_owned(), source })
    }

    /// The oldest event that was not seen yet, waiting for one at most for `timeout`.
    pub async fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, MonitorError> {
        match self.until("event", timeout, Client::poll_event).await {
            Ok(event) => Ok(Some(event)),
            Err(MonitorError::Deadline { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends and reads until `look` finds something.
    async fn until<T>(
        &mut self,
        what: &str,
        within: Duration,
        mut look: impl FnMut(&mut Client) -> Option<T>,
    ) -> Result<T, MonitorError> {
        let Self { link, machine, .. } = self;
        let what = || what.to_owned();
        let gone = |source| MonitorError::Gone { what: what(), source };
        let exchange = async {
            let mut chunk = vec![0; READ_BYTES];
            loop {
                while let Some(bytes) = machine.poll_output() {
                    link.write_all(&bytes).await.map_err(gone)?;
                }
                if let Some(found) = look(machine) {
                    return Ok(found);
                }
                let bytes = link.read(&mut chunk).await.map_err(gone)?;
                if bytes == 0 {
                    return Err(gone(io::ErrorKind::UnexpectedEof.into()));
                }
                let heard = machine.handle_input(&chunk[..bytes]);
                heard.map_err(|source| MonitorError::Protocol { what: what(), source })?;
            }
        };
        let deadline = |_| MonitorError::Deadline { what: what(), waited: within };
        tokio::time::timeout(within, exchange).await.map_err(deadline)?
    }
}
