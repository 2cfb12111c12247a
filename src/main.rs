//! `xl-colo`: parse, run, and turn what came of it into an exit code.
#![forbid(unsafe_code)]

use clap::Parser;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use xen_colo::cli::{
    self, ArbiterArgs, CheckArgs, Cli, Command, CompareArgs, HostArgs, HostRef, NbdArgs, ProtectArgs, QmpArgs,
    ReceiveArgs, StatusArgs,
};
use xen_colo::daemon::address::Address;
use xen_colo::daemon::control::{self, Protect, Request};
use xen_colo::daemon::host::{self, Boot, BootConfig, HostConfig};
use xen_colo::daemon::xen::XenBoot;
use xen_colo::daemon::{arbiter, check, receive, remus, status};
use xen_colo::demo;
use xen_colo::image::helper;
use xen_colo::say;

fn main() -> ExitCode {
    // libxl starts what LIBXL_SAVE_HELPER names with arguments of its own, and knows no subcommands.
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| helper::JOBS.contains(&first.as_str())) {
        return save_helper(&arguments);
    }
    let cli = Cli::parse();
    if let Command::SaveHelper(args) = cli.command {
        return save_helper(&args.arguments);
    }
    let verbose = match &cli.command {
        Command::Nbd(args) => args.verbose,
        Command::Compare(args) => args.verbose,
        Command::Filter(args) => args.verbose,
        _ => false,
    };
    let level = if verbose { "xen_colo=debug" } else { "warn" };
    let filter = EnvFilter::try_from_env("XEN_COLO_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    #[cfg(feature = "xen")]
    match &cli.command {
        Command::Keeper { domid } => return keep(*domid),
        Command::Libxl { arguments } => return libxl(arguments),
        _ => {}
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(cli::EXIT_ENVIRONMENT, &error),
    };
    let code = runtime.block_on(run(cli.command));
    runtime.shutdown_timeout(Duration::from_millis(200));
    code
}

async fn run(command: Command) -> ExitCode {
    match command {
        Command::Demo(args) => demo::run(&args).await,
        Command::Host(args) => host(args).await,
        Command::Arbiter(args) => serve_arbiter(args).await,
        Command::Nbd(args) => serve_nbd(args).await,
        Command::Qmp(args) => qmp(args).await,
        Command::Compare(args) => compare_packets(args).await,
        Command::Filter(args) => filter_packets(args.into()).await,
        Command::Protect(args) => protect(args).await,
        Command::Status(args) => show_status(args).await,
        Command::Check(args) => check_host(args).await,
        Command::Remus(args) => match remus::run(&args.into()).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(cli::EXIT_FAILED, &error),
        },
        Command::Receive(args) => receive(args).await,
        Command::Unprotect(host) => order(&host, Request::Unprotect).await,
        Command::Checkpoint(host) => order(&host, Request::Checkpoint).await,
        Command::Failover(host) => order(&host, Request::Failover).await,
        Command::Stop(host) => order(&host, Request::Stop).await,
        // main has run it: it has no runtime.
        Command::SaveHelper(_) => ExitCode::SUCCESS,
        #[cfg(feature = "xen")]
        Command::Keeper { .. } | Command::Libxl { .. } => unreachable!("they need no runtime"),
    }
}

async fn serve_nbd(args: NbdArgs) -> ExitCode {
    use xen_colo::daemon::nbd::export::{self, Cache, Config, Where};
    if args.fork {
        return match export::fork() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(cli::EXIT_FAILED, &error),
        };
    }
    let at = match args.socket {
        Some(path) => Where::Unix(path),
        None => Where::Tcp(args.bind, args.port),
    };
    let tls = match (args.tls_creds, args.object) {
        (Some(id), Some(object)) if object.id != id => {
            return fail(cli::EXIT_FAILED, &format!("no --object has the id {id:?}; there is {:?}", object.id));
        }
        (Some(_), object) => object,
        (None, _) => None,
    };
    let config = Config {
        image: args.image,
        at,
        name: args.export_name,
        description: args.description,
        offset_bytes: args.offset,
        read_only: args.read_only,
        salvage: args.salvage,
        max_connections: args.shared,
        persistent: args.persistent,
        cache: match args.cache.as_str() {
            "writethrough" | "directsync" => Cache::WriteThrough,
            "unsafe" => Cache::Unsafe,
            _ => Cache::WriteBack,
        },
        discard: matches!(args.discard.as_str(), "unmap" | "on"),
        detect_zeroes: args.detect_zeroes != "off",
        unmap_zeroes: args.detect_zeroes == "unmap",
        pid_file: args.pid_file,
        tls,
    };
    match export::run(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

async fn qmp(args: QmpArgs) -> ExitCode {
    use xen_colo::daemon::qmp::{client::Monitor, replica};
    use xen_colo::replica::epochs::ReplicaConfig;
    if let Some(socket) = args.socket {
        let memory_budget_bytes = args.epoch_memory_mib << 20;
        let epochs = ReplicaConfig { memory_budget_bytes, spill_dir: args.spill_dir, ..ReplicaConfig::default() };
        let listening = || {
            say::out(&format!("monitor listens on {}", socket.display()));
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

async fn compare_packets(args: CompareArgs) -> ExitCode {
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
        say::out(opened);
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

async fn filter_packets(config: xen_colo::daemon::filter::Config) -> ExitCode {
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

#[cfg(feature = "xen")]
fn keep(domid: u16) -> ExitCode {
    match xen_colo::hypervisor::xen::keeper::keep(domid, &mut std::io::stdin().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_FAILED, &format!("clean up domain {domid}: {error}")),
    }
}

#[cfg(feature = "xen")]
fn libxl(arguments: &[String]) -> ExitCode {
    match xen_colo::hypervisor::xen::toolstack::serve(arguments, &mut std::io::stdin().lock()) {
        Ok(answer) => {
            say::out(&answer);
            ExitCode::SUCCESS
        }
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

/// Without Xen there is nobody to save.
#[cfg(not(feature = "xen"))]
fn save_helper(_: &[String]) -> ExitCode {
    fail(cli::EXIT_ENVIRONMENT, &"this xl-colo was built without Xen (feature `xen`)")
}

/// The helper itself has no runtime: a thread beside it waits for SIGTERM, by which libxl cancels a save.
#[cfg(feature = "xen")]
fn save_helper(arguments: &[String]) -> ExitCode {
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::signal::unix::{SignalKind, signal};

    let cancel = Arc::new(AtomicBool::new(false));
    // A restore has nothing to put in order, and ends as any process does.
    if arguments.first().is_some_and(|first| first == helper::JOBS[0]) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return fail(cli::EXIT_ENVIRONMENT, &error),
        };
        let entered = runtime.enter();
        let mut terminate = match signal(SignalKind::terminate()) {
            Ok(terminate) => terminate,
            Err(error) => return fail(cli::EXIT_ENVIRONMENT, &error),
        };
        drop(entered);
        let cancel = Arc::clone(&cancel);
        std::thread::spawn(move || {
            runtime.block_on(terminate.recv());
            cancel.store(true, Ordering::Relaxed);
        });
    }
    ExitCode::from(xen_colo::save_helper::xen::run(arguments, &cancel))
}

fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    say::err(&format!("xl-colo: {error}"));
    ExitCode::from(code)
}

async fn host(args: HostArgs) -> ExitCode {
    let mut seed = [0; 8];
    if let Err(error) = getrandom::fill(&mut seed) {
        return fail(cli::EXIT_ENVIRONMENT, &error);
    }
    let boot = args.guest.map(|name| match args.xen {
        Some(config) => Boot::Xen(XenBoot { name, config, disk_bytes: args.disk_mib << 20 }),
        None => Boot::Embedded(BootConfig {
            name,
            ram_mib: args.guest_mib,
            disk_mib: args.disk_mib,
            mac: demo::GUEST_MAC,
            ip: demo::GUEST_IP,
            diverge_percent: args.diverge,
        }),
    });
    let config = HostConfig {
        name: args.name,
        listen: args.listen,
        run_dir: args.run_dir,
        disks: args.disks,
        spill_dir: args.spill_dir,
        epoch_memory_bytes: args.epoch_memory_mib << 20,
        net: args.net,
        arbiter: args.arbiter,
        policy: args.policy,
        boot,
        entropy_seed: args.seed.unwrap_or(u64::from_le_bytes(seed)),
    };
    let name = config.name.clone();
    if args.follow_stdin {
        // A thread of its own: reading standard input cannot be cancelled, and must not hold the runtime up.
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(0);
        });
    }
    let listening = |address: &Address| {
        say::out(&format!("host {name} listens on {address}"));
    };
    match host::run(config, listening).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_ENVIRONMENT, &error),
    }
}

async fn serve_arbiter(args: ArbiterArgs) -> ExitCode {
    let listener = match args.listen.listen().await {
        Ok(listener) => listener,
        Err(error) => return fail(cli::EXIT_ENVIRONMENT, &format!("listen on {}: {error}", args.listen)),
    };
    say::out(&format!("arbiter listens on {}", listener.local_address().unwrap_or(args.listen)));
    match arbiter::serve(listener, args.file, Arc::new(|_| {})).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

async fn receive(args: ReceiveArgs) -> ExitCode {
    let joined = if args.blackhole {
        receive::join_blackhole().await
    } else {
        match ask(&args.host, &Request::Status).await.map(|status| status["listen"].as_str().map(str::parse::<Address>))
        {
            Ok(Some(Ok(address))) => receive::join(&address),
            Ok(_) => return fail(cli::EXIT_FAILED, &"the host does not say where it listens"),
            Err(error) => return fail(cli::EXIT_FAILED, &format!("nobody stands by here: {error}")),
        }
    };
    match joined {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_FAILED, &format!("receive: {error}")),
    }
}

async fn protect(args: ProtectArgs) -> ExitCode {
    let request = Request::Protect(Protect {
        peer: args.peer.to_string(),
        mode: args.mode,
        resume: args.resume.into(),
        checkpoint_delay_ms: args.checkpoint_delay_ms,
        heartbeat_interval_ms: args.heartbeat_ms,
        heartbeat_misses: args.heartbeat_misses,
        delta_mib: args.delta_mib,
        release_at_once: false,
    });
    let code = order(&args.host, request).await;
    if !args.wait || code != ExitCode::SUCCESS {
        return code;
    }
    loop {
        match ask(&args.host, &Request::Status).await {
            Err(error) => return fail(cli::EXIT_FAILED, &error),
            Ok(status) => match status["protection"].as_str() {
                Some("protected") => return ExitCode::SUCCESS,
                Some("syncing") => {}
                other => {
                    let why = status["why"].as_str().unwrap_or("no reason given");
                    return fail(cli::EXIT_FAILED, &format!("the guest is {}: {why}", other.unwrap_or("gone")));
                }
            },
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Says what it found on standard output; the exit code is 0 only if nothing is missing.
async fn check_host(args: CheckArgs) -> ExitCode {
    let lines = check::judge(&check::gather(args.peer.as_ref(), args.guest.as_deref()).await);
    let able = lines.iter().all(|line| line.ok);
    if args.json {
        say::out(&serde_json::json!({"able": able, "lines": lines}));
    } else {
        let _ = lines.iter().all(|line| say::out(line));
    }
    if able { ExitCode::SUCCESS } else { ExitCode::from(cli::EXIT_FAILED) }
}

async fn show_status(args: StatusArgs) -> ExitCode {
    loop {
        let is_read = match ask(&args.host, &Request::Status).await {
            Err(error) => return fail(cli::EXIT_FAILED, &error),
            Ok(status) if args.json => say::out(&status),
            Ok(status) => match serde_json::from_value::<status::Status>(status) {
                Ok(status) => say::out(&status),
                Err(error) => return fail(cli::EXIT_FAILED, &format!("the host is of another version: {error}")),
            },
        };
        if !args.watch || !is_read {
            return ExitCode::SUCCESS;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn order(host: &HostRef, request: Request) -> ExitCode {
    match ask(host, &request).await {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

async fn ask(host: &HostRef, request: &Request) -> Result<serde_json::Value, String> {
    let socket = control::choose(&host.run_dir, host.host.as_deref())?;
    control::ask(&socket, request).await.map_err(|error| error.to_string())
}
