//! The command line: what can be typed, and nothing of what it does.
//!
//! Exit codes: 0 done; 1 the command failed, with one line that says why; 2 the command line is wrong;
//! 3 (`demo`) something was lost; 4 (`host`) this machine cannot give what was asked (port, memory, disk).
//!
//! A file for each group of commands: `host`, `orders`, `demo`, `alone`, `qemu`, and `xl` with the letters of `xl`.

mod alone;
pub mod config;
mod demo;
mod filter;
pub mod generate;
mod host;
mod orders;
mod qemu;
mod xl;

pub use alone::{CompareArgs, NbdArgs, NbdDeviceVerb, QmpArgs, ReportArgs, ServedArgs};
pub use demo::{DemoArgs, NestedGuest, Victim};
pub use filter::FilterArgs;
pub use host::{ArbiterArgs, HostArgs};
pub use orders::{
    CheckArgs, ConfigArgs, EventsArgs, FailoverArgs, HostRef, ListArgs, ProtectArgs, Resume, SetArgs, StatusArgs,
    Target,
};
pub use qemu::{Lost, QemuArgs, QemuMonitors, QemuPair, QemuVerb};
pub use xl::{ReceiveArgs, RemusArgs};

use crate::colo::arbiter::Policy;
use crate::daemon::status::fields;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Parser, Subcommand};
use std::path::PathBuf;

/// The command failed.
pub const EXIT_FAILED: u8 = 1;
/// The command line is wrong.
pub const EXIT_USAGE: u8 = 2;
/// The demo lost something.
pub const EXIT_LOST: u8 = 3;
/// This machine cannot give what was asked.
pub const EXIT_ENVIRONMENT: u8 = 4;

/// Keeps a Xen guest running, with its connections and its disk, when its host dies.
#[derive(Parser, Debug)]
#[command(name = "xl-colo", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Say what there is to say in JSON, an object a line; why a command failed too, on standard error:
    /// {"error":{"class":…,"text":…,"do":…}}
    #[arg(long, global = true)]
    pub json: bool,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Protect a guest, kill its host, and report what a client saw
    Demo(DemoArgs),
    /// Run a host: with --guest it boots one, without it stands by for another host's
    Host(HostArgs),
    /// Replicate the guest of a host to a peer
    Protect(ProtectArgs),
    /// End a protection without a failover: the guest goes on here, and the peer drops what it has of it
    Unprotect(HostRef),
    /// Protect a domain until that is over, with the letters of `xl remus`
    Remus(RemusArgs),
    /// Join standard input and output to the host that runs here: the far end of `remus` over ssh
    Receive(ReceiveArgs),
    /// Say how a host and its guest are
    #[command(after_long_help = fields::help())]
    Status(StatusArgs),
    /// Say which hosts run on this machine, and how their guests are
    List(ListArgs),
    /// Say what happened to a host and its guest
    Events(EventsArgs),
    /// Write a page of what happened to a guest, from the event logs of its hosts
    Report(ReportArgs),
    /// Show how a host and its guest are on a live screen
    Top(HostRef),
    /// Write a guest's configuration with every default and a comment for each; or check one
    Config(ConfigArgs),
    /// Say whether this host is able to protect guests, and what it lacks; whether a peer answers, and what is in the
    /// way of protecting a guest
    Check(CheckArgs),
    /// Change what can change while a host runs: checkpoint-delay-ms, heartbeat-ms, heartbeat-misses, log
    Set(SetArgs),
    /// Take a checkpoint now
    Checkpoint(HostRef),
    /// Go on alone on this host, or decide for a guest that is held here
    Failover(FailoverArgs),
    /// End a host, and wait for it; its guest goes on at the peer if it is protected, and ends if it is not
    Stop(HostRef),
    /// Serve an arbiter's register to two hosts, on a third machine
    Arbiter(ArbiterArgs),
    /// Serve a disk image over NBD, with qemu-nbd's options
    #[command(args_override_self = true, infer_long_args = true)]
    Nbd(NbdArgs),
    /// Give an order to a QMP monitor, ours or a QEMU's; or be one, for a replica whose primary is a QEMU
    Qmp(QmpArgs),
    /// Make two QEMUs that run a COLO pair, and end it, by their own commands
    Qemu(QemuArgs),
    /// Compare the packets of two guests behind QEMU's chardev sockets, in the place of its colo-compare object
    Compare(CompareArgs),
    /// Stand in for QEMU's network filters on an interface of this host, towards a comparator
    Filter(FilterArgs),
    /// Writes completions and man pages
    #[command(hide = true)]
    Generate {
        /// Where to
        dir: PathBuf,
    },
    /// Makes a served disk a block device of this host; the hotplug script block-colo calls it
    #[command(hide = true)]
    NbdDevice {
        /// What to do
        #[command(subcommand)]
        verb: NbdDeviceVerb,
    },
    /// Cleans up behind a killed host; started by it
    #[cfg(feature = "xen")]
    #[command(hide = true)]
    Keeper {
        /// The domain
        domid: u16,
    },
    /// Carries out an order to libxl; started by a host
    #[cfg(feature = "xen")]
    #[command(hide = true)]
    Libxl {
        /// The order
        arguments: Vec<String>,
    },
    /// Save or restore a domain for libxl; set LIBXL_SAVE_HELPER to this program and use xl as ever
    SaveHelper(SaveHelperArgs),
}

/// Arguments of `save-helper`, which libxl writes.
#[derive(Args, Debug)]
pub struct SaveHelperArgs {
    /// --save-domain or --restore-domain, and what belongs to it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "ARGUMENT")]
    pub arguments: Vec<String>,
}

/// The arguments that were given to the subcommand, and not filled in.
#[must_use]
pub fn given(matches: &ArgMatches) -> Vec<String> {
    let Some((_, matches)) = matches.subcommand() else { return Vec::new() };
    let was_given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
    matches.ids().map(clap::Id::as_str).filter(was_given).map(str::to_owned).collect()
}

/// The name is part of the control socket's path, and must not lead elsewhere.
fn parse_host_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > 64 || text.starts_with(['.', '-']) || !text.chars().all(fits) {
        return Err(
            "a host's name is 1 to 64 letters, digits, '-', '_' or '.', and begins with none of '-' and '.'".into()
        );
    }
    Ok(text.to_owned())
}

fn parse_policy(text: &str) -> Result<Policy, String> {
    match text {
        "arbiter" => Ok(Policy::Arbiter),
        "hold" => Ok(Policy::Hold),
        "alone" => Ok(Policy::Alone),
        other => match other.strip_prefix("script:") {
            Some(path) if !path.is_empty() => Ok(Policy::Script(path.into())),
            _ => Err(format!("{other:?} is no policy: arbiter, hold, script:PATH or alone")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn policies_are_spelt_as_documented() {
        assert_eq!(parse_policy("script:/sbin/fence"), Ok(Policy::Script("/sbin/fence".into())));
        for bad in ["", "script", "script:", "Arbiter"] {
            assert!(parse_policy(bad).is_err(), "{bad}");
        }
    }
}
