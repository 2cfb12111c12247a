//! What may stand behind a key.

use crate::cli::{parse_host_name, parse_policy};
use crate::colo::arbiter::Policy;
use crate::colo::hello::{Mode, ResumeOrder};
use crate::daemon::address::Address;
use crate::daemon::arbiter::Arbiter;
use crate::daemon::metrics::MetricsAddress;
use std::path::PathBuf;
use toml::de::DeValue;

/// A value of a key.
pub(super) trait Value: Sized {
    /// What it may be, in a clause.
    fn allowed() -> String;
    /// Reads it, if it may be so.
    fn read(value: &DeValue<'_>) -> Option<Self>;
    /// Writes it; `None` for what is left out.
    fn write(&self) -> Option<String>;
}

/// A whole number from `MIN` to `MAX`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Count<const MIN: u64, const MAX: u64>(pub u64);

impl<const MIN: u64, const MAX: u64> Value for Count<MIN, MAX> {
    fn allowed() -> String {
        format!("a whole number from {MIN} to {MAX}")
    }

    fn read(value: &DeValue<'_>) -> Option<Self> {
        let integer = value.as_integer()?;
        let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok()?;
        (MIN..=MAX).contains(&number).then_some(Self(number))
    }

    fn write(&self) -> Option<String> {
        Some(self.0.to_string())
    }
}

impl Value for bool {
    fn allowed() -> String {
        "true or false".into()
    }

    fn read(value: &DeValue<'_>) -> Option<Self> {
        value.as_bool()
    }

    fn write(&self) -> Option<String> {
        Some(self.to_string())
    }
}

/// A text as TOML has it.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Values that are written as texts: what they may be, how they are read, how they are written.
macro_rules! texts {
    ($($type:ty: $allowed:literal, $read:expr, $write:expr;)*) => {
        $(impl Value for $type {
            fn allowed() -> String {
                $allowed.into()
            }

            fn read(value: &DeValue<'_>) -> Option<Self> {
                let read: fn(&str) -> Option<Self> = $read;
                read(value.as_str()?)
            }

            fn write(&self) -> Option<String> {
                let write: fn(&Self) -> String = $write;
                Some(quoted(&write(self)))
            }
        })*
    };
}

texts! {
    String: "a name of 1 to 64 letters, digits, '-', '_' and '.'", |text| parse_host_name(text).ok(), Clone::clone;
    PathBuf: "a path", |text| (!text.is_empty()).then(|| text.into()), |path| path.display().to_string();
    Address: "\"HOST:PORT\", \"tcp:HOST:PORT\", \"unix:PATH\" or \"exec:COMMAND\"", |text| text.parse().ok(), ToString::to_string;
    Arbiter: "\"file:PATH\", \"HOST:PORT\" or \"unix:PATH\"", |text| text.parse().ok(), |arbiter| match arbiter {
        Arbiter::File(path) => format!("file:{}", path.display()),
        Arbiter::Served(address) => address.to_string(),
    };
    MetricsAddress: "\"PORT\" of the loopback address, or \"IP:PORT\"", |text| text.parse().ok(), ToString::to_string;
    Policy: "\"arbiter\", \"hold\", \"script:PATH\" or \"alone\"", |text| parse_policy(text).ok(), |policy| match policy {
        Policy::Arbiter => "arbiter".into(),
        Policy::Hold => "hold".into(),
        Policy::Alone => "alone".into(),
        Policy::Script(path) => format!("script:{}", path.display()),
    };
    Mode: "\"colo\" or \"remus\"", |text| text.parse().ok(), ToString::to_string;
    ResumeOrder: "\"after-capture\" or \"after-loaded\"", |text| match text {
        "after-capture" => Some(Self::AfterCapture),
        "after-loaded" => Some(Self::AfterLoaded),
        _ => None,
    }, |order| match order {
        ResumeOrder::AfterCapture => "after-capture".into(),
        ResumeOrder::AfterLoaded => "after-loaded".into(),
    };
}

impl<T: Value> Value for Option<T> {
    fn allowed() -> String {
        T::allowed()
    }

    fn read(value: &DeValue<'_>) -> Option<Self> {
        T::read(value).map(Some)
    }

    fn write(&self) -> Option<String> {
        self.as_ref().and_then(Value::write)
    }
}

impl Value for Vec<PathBuf> {
    fn allowed() -> String {
        "a list of paths".into()
    }

    fn read(value: &DeValue<'_>) -> Option<Self> {
        value.as_array()?.iter().map(|item| PathBuf::read(item.get_ref())).collect()
    }

    fn write(&self) -> Option<String> {
        let items: Vec<_> = self.iter().filter_map(Value::write).collect();
        Some(format!("[{}]", items.join(", ")))
    }
}

/// Names that are not this program's, such as xl's.
impl Value for Vec<String> {
    fn allowed() -> String {
        "a list of names".into()
    }

    fn read(value: &DeValue<'_>) -> Option<Self> {
        let name = |item: &toml::Spanned<DeValue<'_>>| Some(item.get_ref().as_str()?.to_owned());
        value.as_array()?.iter().map(name).collect()
    }

    fn write(&self) -> Option<String> {
        let items: Vec<_> = self.iter().map(|name| quoted(name)).collect();
        Some(format!("[{}]", items.join(", ")))
    }
}
