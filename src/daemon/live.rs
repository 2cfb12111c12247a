//! What can change while a host runs, and what cannot.
//!
//! | key | from when on |
//! |---|---|
//! | `checkpoint-delay-ms` | now, if a guest is protected, and for protections that do not name one |
//! | `heartbeat-ms`, `heartbeat-misses` | for protections that do not name them: both sides must wait equally long |
//! | `log` | now |
//! | everything else | the next start |
//!
//! Two ways lead here: `xl-colo set`, and SIGHUP, which reads the configuration again and compares it with what it said
//! before. The trap: a heartbeat that one side alone changes would let a primary's lease outlive its peer's patience, and
//! two guests speak.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Longest value of `log`, in bytes.
const LOG_MAX_BYTES: usize = 1024;
/// Times that can be a checkpoint delay, in ms.
const CHECKPOINT_DELAY_MS: RangeInclusive<u64> = 1..=3_600_000;
/// Times that can lie between two beats, in ms.
const HEARTBEAT_MS: RangeInclusive<u64> = 1..=60_000;
/// Beats that can be missed.
const HEARTBEAT_MISSES: RangeInclusive<u64> = 2..=1000;

/// What a configuration says, by key.
pub type Keys = BTreeMap<String, String>;

/// What is to change; what is absent stays.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Live {
    /// Longest time between two checkpoints, in ms.
    pub checkpoint_delay_ms: Option<u64>,
    /// Time between two beats, in ms.
    pub heartbeat_ms: Option<u64>,
    /// Missed beats that mean a lost peer.
    pub heartbeat_misses: Option<u32>,
    /// What is logged, as in `XEN_COLO_LOG`.
    pub log: Option<String>,
}

/// A value that a key cannot have, or a key that cannot change.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadSetting {
    /// The key.
    #[error("{0}: takes effect when the host is started again")]
    Fixed(String),
    /// The value.
    #[error("{key}: {value:?} is not a number from {min} to {max}")]
    Number {
        /// Whose.
        key: String,
        /// What was given.
        value: String,
        /// The least it can be.
        min: u64,
        /// The most.
        max: u64,
    },
    /// What is to be logged.
    #[error("log: {0}")]
    Log(String),
}

impl Live {
    /// What can be set.
    pub const KEYS: [&str; 4] = ["checkpoint-delay-ms", "heartbeat-ms", "heartbeat-misses", "log"];

    /// Sets a key from its text.
    pub fn put(&mut self, key: &str, value: &str) -> Result<(), BadSetting> {
        let number = |within: RangeInclusive<u64>| {
            let bad = || BadSetting::Number {
                key: key.to_owned(),
                value: value.chars().take(32).collect(),
                min: *within.start(),
                max: *within.end(),
            };
            value.parse::<u64>().ok().filter(|number| within.contains(number)).ok_or_else(bad)
        };
        match key {
            "checkpoint-delay-ms" => self.checkpoint_delay_ms = Some(number(CHECKPOINT_DELAY_MS)?),
            "heartbeat-ms" => self.heartbeat_ms = Some(number(HEARTBEAT_MS)?),
            // The range is far below.
            "heartbeat-misses" => self.heartbeat_misses = Some(number(HEARTBEAT_MISSES)? as u32),
            "log" if value.len() > LOG_MAX_BYTES => return Err(BadSetting::Log("too long".into())),
            "log" => self.log = Some(value.to_owned()),
            _ => return Err(BadSetting::Fixed(key.to_owned())),
        }
        Ok(())
    }

    /// Refuses what came from elsewhere and not through [`Self::put`].
    pub fn check(&self) -> Result<(), BadSetting> {
        let mut checked = Self::default();
        let number = |value: Option<u64>| value.map(|value| value.to_string());
        for (key, value) in [
            ("checkpoint-delay-ms", number(self.checkpoint_delay_ms)),
            ("heartbeat-ms", number(self.heartbeat_ms)),
            ("heartbeat-misses", number(self.heartbeat_misses.map(u64::from))),
            ("log", self.log.clone()),
        ] {
            value.map_or(Ok(()), |value| checked.put(key, &value))?;
        }
        Ok(())
    }

    /// Takes over what another says.
    pub fn change(&mut self, by: &Self) {
        self.checkpoint_delay_ms = by.checkpoint_delay_ms.or(self.checkpoint_delay_ms);
        self.heartbeat_ms = by.heartbeat_ms.or(self.heartbeat_ms);
        self.heartbeat_misses = by.heartbeat_misses.or(self.heartbeat_misses);
        self.log = by.log.clone().or_else(|| self.log.take());
    }
}

/// What differs between two readings of a configuration: what can change now, and a sentence for each key that cannot.
#[must_use]
pub fn changes(before: &Keys, after: &Keys) -> (Live, Vec<String>) {
    let (mut live, mut said) = (Live::default(), Vec::new());
    for (key, value) in after.iter().filter(|(key, value)| before.get(*key) != Some(value)) {
        if let Err(error) = live.put(key, value) {
            said.push(error.to_string());
        }
    }
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        said.push(format!("{key}: is not set any more, which takes effect when the host is started again"));
    }
    (live, said)
}

/// Takes a new filter, as `XEN_COLO_LOG` spells it.
pub type SetFilter = dyn Fn(&str) -> Result<(), String> + Send + Sync;

/// Changes what is logged.
#[derive(Clone)]
pub struct LogFilter(pub Arc<SetFilter>);

impl Default for LogFilter {
    fn default() -> Self {
        Self(Arc::new(|_| Err("this process's log cannot be changed".into())))
    }
}

impl fmt::Debug for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogFilter")
    }
}

/// Reads a configuration again: all keys of it, or a sentence that says why not.
pub type Read = Arc<dyn Fn() -> Result<Keys, String> + Send + Sync>;

/// The configuration that SIGHUP reads again.
#[derive(Clone)]
pub struct Configuration {
    /// What it said when the host was started.
    pub keys: Keys,
    /// Reads it again.
    pub read: Read,
}

impl fmt::Debug for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Configuration").field("keys", &self.keys).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pairs: &[(&str, &str)]) -> Keys {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_can_change_does_and_each_key_that_cannot_is_named() {
        let before = keys(&[("listen", "a:1"), ("disk", "x"), ("heartbeat-ms", "100"), ("net", "unix:n")]);
        let after =
            keys(&[("listen", "b:2"), ("disk", "x"), ("heartbeat-ms", "200"), ("log", "debug"), ("policy", "hold")]);
        let (live, said) = changes(&before, &after);
        assert_eq!(live, Live { heartbeat_ms: Some(200), log: Some("debug".into()), ..Live::default() });
        assert_eq!(
            said,
            [
                "listen: takes effect when the host is started again",
                "policy: takes effect when the host is started again",
                "net: is not set any more, which takes effect when the host is started again",
            ]
        );
        assert_eq!(changes(&after, &after), (Live::default(), vec![]));
    }

    #[test]
    fn a_value_out_of_range_is_refused_by_its_key_whichever_way_it_came() {
        for (key, value) in [
            ("checkpoint-delay-ms", "0"),
            ("checkpoint-delay-ms", "-1"),
            ("heartbeat-ms", "60001"),
            ("heartbeat-misses", "1"),
            ("heartbeat-misses", "4294967298"),
        ] {
            let refused = Live::default().put(key, value).unwrap_err().to_string();
            assert!(refused.starts_with(key) && refused.contains("is not a number from"), "{refused}");
        }
        let refused = Live { heartbeat_misses: Some(1), ..Live::default() }.check().unwrap_err().to_string();
        assert!(refused.contains("from 2 to 1000"), "{refused}");
        Live { checkpoint_delay_ms: Some(1), log: Some("info".into()), ..Live::default() }.check().unwrap();
    }
}
