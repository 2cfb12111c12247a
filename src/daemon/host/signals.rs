//! What a host does when it is signalled.
//!
//! ```text
//!   SIGTERM, SIGINT ─▶ no new protection ─▶ engine: Leave ─┬ answered: what came of it is said
//!                                                          │          ─▶ a Xen guest's devices are given away ─▶ end, exit code 0
//!                                                          └ not within the bound, or a second signal
//!                                                                     ─▶ what is left is said  ─▶ end, exit code 1
//!   SIGHUP ─▶ read the configuration again ─▶ engine: Set ─▶ what changed, and each key that cannot, is said
//! ```
//!
//! The trap: a protection that a request is just about to begin would begin after the guest was let go. The task that
//! makes protections ends before the engine is asked.

use super::HostError;
use crate::daemon::control::{Answer, Asked, Request, ask_engine};
use crate::daemon::guest::Guest;
use crate::daemon::live::{self, Configuration};
use crate::daemon::manager::Manager;
use crate::say;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// How long the end may take: more than a peer that hangs is waited for, with an arbitration after it. The unit's
/// TimeoutStopSec is longer.
const LEAVE_DEADLINE: Duration = Duration::from_secs(25);

/// What is heard from the moment on at which this is made.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

enum Wish {
    End(&'static str),
    Reload,
}

impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Wish {
        tokio::select! {
            _ = self.terminate.recv() => Wish::End("SIGTERM"),
            _ = self.interrupt.recv() => Wish::End("SIGINT"),
            _ = self.hang_up.recv() => Wish::Reload,
        }
    }
}

/// Who carries out what signals ask for.
pub(super) struct Attendant {
    /// The engine's ear.
    pub(super) engine: mpsc::Sender<Asked>,
    /// How the host is, in a line.
    pub(super) line: watch::Receiver<String>,
    pub(super) manager: Manager,
    pub(super) configuration: Option<Configuration>,
    /// The task that makes protections.
    pub(super) protecting: JoinHandle<()>,
}

impl Attendant {
    /// Attends until the engine has ended, or need not be waited for any more. The guest that goes on without it.
    pub(super) async fn attend(
        mut self,
        mut signals: Signals,
        mut engine_end: oneshot::Receiver<Option<Guest>>,
    ) -> Result<Option<Guest>, HostError> {
        let ended = loop {
            tokio::select! {
                left = &mut engine_end => break Ok(left.unwrap_or_default()),
                wish = signals.next() => match wish {
                    Wish::End(name) => break match self.leave(name, &mut signals).await {
                        Ok(()) => Ok(engine_end.await.unwrap_or_default()),
                        Err(unfinished) => Err(unfinished),
                    },
                    Wish::Reload => self.reload().await,
                },
            }
        };
        self.protecting.abort();
        ended
    }

    async fn leave(&self, name: &str, signals: &mut Signals) -> Result<(), HostError> {
        self.manager.stopping();
        self.protecting.abort();
        let again = async {
            loop {
                if let Wish::End(again) = signals.next().await {
                    return again;
                }
            }
        };
        let unfinished = |why: String| {
            let line = self.line.borrow().clone();
            Err(HostError::Unfinished(format!("{name}: {why}; this host ends, and leaves this behind: {line}")))
        };
        tokio::select! {
            answer = ask_engine(&self.engine, Request::Leave) => match answer {
                Answer::Return(said) => {
                    say::out(&format!("{name}: {}", said["said"].as_str().unwrap_or("this host ends")));
                    Ok(())
                }
                Answer::Error { desc } => unfinished(desc),
            },
            again = again => unfinished(format!("{again} came before the protection was ended")),
            () = tokio::time::sleep(LEAVE_DEADLINE) => {
                unfinished(format!("the protection was not ended within {LEAVE_DEADLINE:?}"))
            }
        }
    }

    async fn reload(&mut self) {
        let Some(configuration) = &mut self.configuration else {
            say::err(
                &"xl-colo: SIGHUP: this host was started without a configuration file, and there is nothing to read \
                  again; xl-colo set KEY=VALUE changes checkpoint-delay-ms, heartbeat-ms, heartbeat-misses and log",
            );
            return;
        };
        self.manager.reloading();
        let read = match (configuration.read)() {
            Err(why) => Err(format!("nothing is changed: {why}")),
            Ok(keys) => {
                let (live, mut said) = live::changes(&configuration.keys, &keys);
                match ask_engine(&self.engine, Request::Set(live)).await {
                    Answer::Error { desc } => Err(format!("nothing is changed: {desc}")),
                    Answer::Return(done) => {
                        configuration.keys = keys;
                        let changed = done["said"].as_array().into_iter().flatten();
                        said.extend(changed.filter_map(|line| line.as_str().map(str::to_owned)));
                        Ok(said)
                    }
                }
            }
        };
        match read {
            Err(why) => _ = say::err(&format!("xl-colo: SIGHUP: {why}")),
            Ok(said) if said.is_empty() => _ = say::err(&"xl-colo: SIGHUP: the configuration says what it said before"),
            Ok(said) => said.iter().for_each(|line| _ = say::err(&format!("xl-colo: SIGHUP: {line}"))),
        }
        self.manager.ready();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::live::{Keys, Live};
    use std::os::unix::net::UnixDatagram;
    use std::sync::{Arc, Mutex};

    fn keys(pairs: &[(&str, &str)]) -> Keys {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[tokio::test]
    async fn the_configuration_is_read_again_and_what_was_applied_counts_as_read() {
        let dir = tempfile::tempdir().unwrap();
        let heard = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let manager = Manager::at(dir.path().join("notify").as_os_str(), None).unwrap();
        let (engine, mut asked) = mpsc::channel::<Asked>(1);
        let (_line, line) = watch::channel(String::new());
        let now = Arc::new(Mutex::new(Err("line 3: no such key".to_owned())));
        let read = now.clone();
        let before = keys(&[("listen", "a:1"), ("heartbeat-ms", "100")]);
        let configuration = Configuration { keys: before, read: Arc::new(move || read.lock().unwrap().clone()) };
        let protecting = tokio::spawn(async {});
        let mut attendant = Attendant { engine, line, manager, configuration: Some(configuration), protecting };

        attendant.reload().await;
        assert!(asked.try_recv().is_err(), "a file that cannot be read changes nothing");

        *now.lock().unwrap() = Ok(keys(&[("listen", "b:2"), ("heartbeat-ms", "200")]));
        for (wanted, answer) in [
            (Live { heartbeat_ms: Some(200), ..Live::default() }, Answer::error("no")),
            (Live { heartbeat_ms: Some(200), ..Live::default() }, Answer::done()),
            (Live::default(), Answer::done()),
        ] {
            let engine = async {
                let (request, reply) = asked.recv().await.unwrap();
                reply.send(answer).unwrap();
                assert_eq!(request, Request::Set(wanted));
            };
            tokio::join!(attendant.reload(), engine);
        }
        let mut text = [0; 128];
        for word in ["RELOADING=1\n", "READY=1"].repeat(4) {
            let bytes = heard.recv(&mut text).unwrap();
            assert!(
                text[..bytes].starts_with(word.as_bytes()),
                "{word}: {:?}",
                text[..bytes].escape_ascii().to_string()
            );
        }
    }
}
