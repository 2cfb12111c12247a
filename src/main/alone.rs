//! The commands that stand alone, carried out: a disk over NBD, monitors, the comparator and its filters, a
//! run's page.

use crate::{fail, say_listening};
use std::process::ExitCode;
use std::time::Duration;
use xen_colo::cli::{self, CompareArgs, NbdArgs, NbdDeviceVerb, QemuVerb, QmpArgs, ReportArgs};
use xen_colo::{report, say};

pub(crate) async fn serve_nbd(args: NbdArgs) -> ExitCode {
    use xen_colo::daemon::nbd::{export, list};
    if args.list {
        return match list::list_at(&args.at().unwrap_or_default()) {
            Ok(told) => {
                say::out(&told);
                ExitCode::SUCCESS
            }
            Err(error) => fail(cli::EXIT_FAILED, &error),
        };
    }
    if let Some(device) = &args.disconnect {
        return nbd_device(NbdDeviceVerb::Disconnect { device: device.clone() });
    }
    // A device's server goes to the background by itself.
    let is_daemon = args.connect.is_some() && !args.verbose && !export::is_in_background();
    if args.fork || is_daemon {
        return match export::fork() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(cli::EXIT_FAILED, &error),
        };
    }
    let config = match args.config() {
        Ok(config) => config,
        Err(why) => return fail(cli::EXIT_FAILED, &why),
    };
    match export::run(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

pub(crate) fn nbd_device(verb: NbdDeviceVerb) -> ExitCode {
    use xen_colo::daemon::nbd::kernel;
    let say = |index: u32| say::out(&format!("/dev/nbd{index}"));
    let done = match verb {
        NbdDeviceVerb::Connect { disk, dead_seconds } => {
            kernel::connect(&disk.into(), Duration::from_secs(dead_seconds)).map(|index| _ = say(index))
        }
        NbdDeviceVerb::Reconnect(disk) => {
            kernel::reconnect(&disk.into()).map(|indices| indices.into_iter().for_each(|index| _ = say(index)))
        }
        NbdDeviceVerb::Disconnect { device } => kernel::disconnect(&device),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

pub(crate) async fn qmp(args: QmpArgs) -> ExitCode {
    use xen_colo::daemon::qmp::{client::Monitor, replica};
    use xen_colo::replica::epochs::ReplicaConfig;
    if let Some(socket) = args.socket {
        let memory_budget_bytes = args.epoch_memory_mib << 20;
        let epochs = ReplicaConfig { memory_budget_bytes, spill_dir: args.spill_dir, ..ReplicaConfig::default() };
        let listening = || {
            say_listening("monitor", &socket.display());
        };
        return match replica::run(&socket, &args.drives, epochs, listening).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(cli::EXIT_ENVIRONMENT, &error),
        };
    }
    let (Some(socket), Some(command)) = (args.connect, args.command) else { return ExitCode::from(cli::EXIT_FAILED) };
    let arguments = match serde_json::from_str::<serde_json::Value>(&args.arguments) {
        Ok(arguments @ serde_json::Value::Object(_)) => arguments,
        Ok(_) => return fail(cli::EXIT_FAILED, &"the arguments are a JSON object"),
        Err(error) => return fail(cli::EXIT_FAILED, &format!("the arguments are no JSON: {error}")),
    };
    let order = async {
        let mut monitor = Monitor::connect(&socket, Duration::from_secs(args.timeout_s)).await?;
        monitor.execute(&command, &arguments).await
    };
    match order.await {
        Ok(value) => {
            say::out(&value);
            ExitCode::SUCCESS
        }
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

/// Carries it out, and says how both are then.
pub(crate) async fn qemu(verb: QemuVerb) -> ExitCode {
    use xen_colo::daemon::qmp::pair::{Monitors, Shown};
    use xen_colo::qmp::pair::{Begin, Side};
    let connect = |monitors: &cli::QemuMonitors| {
        let (primary, secondary, deadline) =
            (monitors.primary.clone(), monitors.secondary.clone(), monitors.deadline());
        async move { Monitors::connect(primary.as_ref(), secondary.as_ref(), deadline).await }
    };
    let done = async {
        match verb {
            QemuVerb::Protect { pair, nbd, migrate, checkpoint_delay_ms, patience_s } => {
                let begin = Begin { nbd: Some(nbd), migrate, checkpoint_delay_ms, reconnect_ms: false };
                let mut monitors = connect(&pair.monitors).await?;
                monitors.protect(&pair.pair(), &begin, Duration::from_secs(patience_s)).await
            }
            QemuVerb::Status { monitors } => connect(&monitors).await?.status().await,
            QemuVerb::Checkpoint { monitors } => connect(&monitors).await?.checkpoint().await,
            QemuVerb::Failover { pair, lost, wait } => {
                let lost = Side::from(lost);
                let mut monitors = connect(&pair.monitors).await?;
                let status = monitors.failover(&pair.pair(), lost).await?;
                if wait { monitors.until_merged(lost.other()).await } else { Ok(status) }
            }
            QemuVerb::Unprotect { pair } => connect(&pair.monitors).await?.unprotect(&pair.pair()).await,
        }
    };
    match done.await {
        Ok(status) => {
            if say::is_json() {
                say::out(&status)
            } else {
                say::out(&Shown(&status))
            };
            ExitCode::SUCCESS
        }
        Err(error) => fail(cli::EXIT_FAILED, &xen_colo::daemon::qmp::pair::PairError::to_string(&error)),
    }
}

pub(crate) async fn compare_packets(args: CompareArgs) -> ExitCode {
    use xen_colo::daemon::compare::{self, BadConfig, CompareError, Config};
    let (Some(primary_in), Some(secondary_in), Some(outdev)) = (args.primary_in, args.secondary_in, args.outdev) else {
        return fail(cli::EXIT_USAGE, &"colo compare needs 'primary_in' ,'secondary_in','outdev' property set");
    };
    let config = Config {
        primary_in,
        secondary_in,
        outdev,
        notify_dev: args.notify_dev,
        vnet_hdr_support: args.vnet_hdr_support,
        compare_timeout: Duration::from_millis(args.compare_timeout.into()),
        max_queue_size: args.max_queue_size as usize,
    };
    let scanned = if args.expired_scan_cycle == 0 { Err(BadConfig::NotPositive("expired_scan_cycle")) } else { Ok(()) };
    if let Err(error) = config.check().and(scanned) {
        return fail(cli::EXIT_USAGE, &error);
    }
    let opened = |opened: &compare::Opened| {
        if say::is_json() {
            say::out(&opened.to_json())
        } else {
            say::out(opened)
        };
    };
    let report = |status: &serde_json::Value| {
        say::out(status);
    };
    match compare::run(config, opened, report).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ CompareError::Listen { .. }) => fail(cli::EXIT_ENVIRONMENT, &error),
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

pub(crate) async fn filter_packets(config: xen_colo::daemon::filter::Config) -> ExitCode {
    use xen_colo::daemon::filter::{self, FilterError};
    if let Err(error) = config.check() {
        return fail(cli::EXIT_USAGE, &error);
    }
    let opened = |opened: &filter::Opened| {
        say::out(opened);
    };
    let report = |status: &serde_json::Value| {
        say::out(status);
    };
    match filter::run(config, opened, report).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ (FilterError::Device { .. } | FilterError::Ports(_))) => fail(cli::EXIT_ENVIRONMENT, &error),
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

/// Says where the page is; what was left out of it, on standard error.
pub(crate) fn report(args: &ReportArgs) -> ExitCode {
    let out = args.output.clone().unwrap_or_else(|| args.dir.join("report.html"));
    match report::write(&args.dir, args.guest.as_deref(), &out) {
        Ok(figures) if say::is_json() => {
            say::out(&serde_json::to_string(&figures).unwrap_or_default());
            ExitCode::SUCCESS
        }
        Ok(figures) => {
            say::out(&figures);
            if figures.malformed_lines > 0 {
                let lines = figures.malformed_lines;
                say::err(&format_args!(
                    "{lines} lines are no events and were left out; the page names the first of them"
                ));
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            say::Failure { class: "failed", text: format!("report: {error}"), remedy: error.remedy() }.say();
            ExitCode::from(cli::EXIT_FAILED)
        }
    }
}
