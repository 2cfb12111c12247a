//! `xl-colo`: parse, run, and turn what came of it into an exit code.
#![forbid(unsafe_code)]

/// What is too much for one file.
mod main {
    pub(crate) mod alone;
    pub(crate) mod logging;
}

use clap::{CommandFactory, FromArgMatches};
use main::{alone, logging};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use xen_colo::cli::config::{Config, ConfigError, xl};
use xen_colo::cli::{
    self, ArbiterArgs, CheckArgs, Cli, Command, ConfigArgs, EventsArgs, FailoverArgs, HostArgs, HostRef, ListArgs,
    ProtectArgs, ReceiveArgs, SetArgs, StatusArgs,
};
use xen_colo::colo::hello;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::control::{self, ControlError, Request};
use xen_colo::daemon::events::log::path_of_environment;
use xen_colo::daemon::events::{EVENTS_MAX, Told};
use xen_colo::daemon::host::{self, Boot, BootConfig, HostConfig, HostError};
use xen_colo::daemon::live::{BadSetting, Configuration, Live, LogFilter};
use xen_colo::daemon::manager::Manager;
use xen_colo::daemon::remus::{self, RemusError};
use xen_colo::daemon::top::{self, TopError};
use xen_colo::daemon::xen::{self, XenBoot};
use xen_colo::daemon::{arbiter, check, operator, receive, status};
use xen_colo::demo;
use xen_colo::image::helper;
use xen_colo::say;

fn main() -> ExitCode {
    // libxl starts what LIBXL_SAVE_HELPER names with arguments of its own, and knows no subcommands.
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| helper::JOBS.contains(&first.as_str())) {
        return save_helper(&arguments);
    }
    let parsed = Cli::command().try_get_matches();
    let parsed = parsed.and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, cli::given(&matches))));
    let (cli, given) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return misspelt(&error, &arguments),
    };
    if cli.json {
        say::speak_json();
    }
    if let Command::SaveHelper(args) = cli.command {
        return save_helper(&args.arguments);
    }
    let verbose = match &cli.command {
        Command::Compare(args) => args.verbose,
        Command::Filter(args) => args.verbose,
        _ => false,
    };
    let level = if verbose { "xen_colo=debug" } else { "warn" };
    let filter = EnvFilter::try_from_env("XEN_COLO_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = logging::begin(filter);
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
    let code = runtime.block_on(run(cli.command, &given, log));
    runtime.shutdown_timeout(Duration::from_millis(200));
    code
}

/// What cannot be parsed: help and version are no failures, and go where they are asked for.
fn misspelt(error: &clap::Error, arguments: &[String]) -> ExitCode {
    if !error.use_stderr() {
        error.exit();
    }
    // qemu-nbd has one code for all that is wrong, and scripts for it know that one.
    let is_as_qemu_nbd = arguments.first().is_some_and(|first| first == "nbd");
    let code = ExitCode::from(if is_as_qemu_nbd { cli::EXIT_FAILED } else { cli::EXIT_USAGE });
    if !arguments.iter().any(|argument| argument == "--json") {
        let _ = error.print();
        return code;
    }
    say::speak_json();
    let text = error.to_string();
    let text = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").trim().replace('\n', " ");
    let remedy = Some("xl-colo help, and xl-colo help COMMAND".to_owned());
    say::Failure { class: "usage", text, remedy }.say();
    code
}

async fn run(command: Command, given: &[String], log: LogFilter) -> ExitCode {
    match command {
        Command::Demo(args) => demo::run(&args).await,
        Command::Host(args) => match args.complete(given) {
            Ok(args) => host(args, log).await,
            Err(error) => fail_config(&error),
        },
        Command::Arbiter(args) => serve_arbiter(args).await,
        Command::Nbd(args) => alone::serve_nbd(args).await,
        Command::NbdDevice { verb } => alone::nbd_device(verb),
        Command::Report(args) => alone::report(&args),
        Command::Qmp(args) => alone::qmp(args).await,
        Command::Qemu(args) => alone::qemu(args.verb).await,
        Command::Compare(args) => alone::compare_packets(args).await,
        Command::Filter(args) => alone::filter_packets(args.into()).await,
        Command::Protect(args) => protect(args, given).await,
        Command::Top(host) => show_top(host).await,
        Command::Config(args) => configure(&args),
        Command::Generate { dir } => match cli::generate::write(&dir) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(cli::EXIT_FAILED, &format!("{}: {error}", dir.display())),
        },
        Command::Status(args) => show_status(args).await,
        Command::Check(args) => check_host(args).await,
        Command::List(args) => list(args).await,
        Command::Events(args) => show_events(args).await,
        Command::Remus(args) => match remus::run(&args.into()).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(RemusError::Control(error)) => fail_control(&error),
            Err(error) => fail(cli::EXIT_FAILED, &error),
        },
        Command::Receive(args) => receive(args).await,
        Command::Unprotect(host) => order(&host, "unprotect", Request::Unprotect).await,
        Command::Set(args) => set(args).await,
        Command::Checkpoint(host) => order(&host, "checkpoint", Request::Checkpoint).await,
        Command::Failover(args) => failover(args).await,
        Command::Stop(host) => order(&host, "stop", Request::Stop).await,
        // main has run it: it has no runtime.
        Command::SaveHelper(_) => ExitCode::SUCCESS,
        #[cfg(feature = "xen")]
        Command::Keeper { .. } | Command::Libxl { .. } => unreachable!("they need no runtime"),
    }
}

#[cfg(feature = "xen")]
fn keep(domid: u16) -> ExitCode {
    match xen_colo::hypervisor::xen::keeper::keep(domid, &mut std::io::stdin().lock(), || _ = say::out(&"keeping")) {
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
    let class = match code {
        cli::EXIT_USAGE => "usage",
        cli::EXIT_LOST => "lost",
        cli::EXIT_ENVIRONMENT => "environment",
        _ => "failed",
    };
    say::Failure { class, text: error.to_string(), remedy: None }.say();
    ExitCode::from(code)
}

fn fail_control(error: &ControlError) -> ExitCode {
    say::Failure { class: error.class(), text: error.to_string(), remedy: error.remedy() }.say();
    ExitCode::from(cli::EXIT_FAILED)
}

/// What is wrong with a configuration is wrong with the command line that named it.
fn fail_config(error: &ConfigError) -> ExitCode {
    let remedy = Some("xl-colo config writes one that is right".to_owned());
    say::Failure { class: "config", text: error.to_string(), remedy }.say();
    ExitCode::from(cli::EXIT_USAGE)
}

/// Says where something listens: a line, or an object.
fn say_listening(what: &str, address: &dyn std::fmt::Display) {
    if say::is_json() {
        say::out(&serde_json::json!({"listening": address.to_string(), "what": what}));
    } else {
        say::out(&format_args!("{what} listens on {address}"));
    }
}

async fn host(args: HostArgs, log: LogFilter) -> ExitCode {
    let configuration = match args.config.clone().map(configuration).transpose() {
        Ok(configuration) => configuration,
        Err(error) => return fail_config(&error),
    };
    // An image is made when it is needed; where it cannot be is said now. The directory of sockets is made in any case.
    for disk in &args.disks {
        let is_made = |dir: &Path| dir.as_os_str().is_empty() || dir.is_dir() || args.run_dir.starts_with(dir);
        if let Some(dir) = disk.parent().filter(|dir| !is_made(dir)) {
            let why = format!("--disk {}: there is no directory {}", disk.display(), dir.display());
            return fail(cli::EXIT_ENVIRONMENT, &why);
        }
    }
    if let Err(why) = hello::check_exports(&args.exports, args.disks.len()) {
        return fail(cli::EXIT_USAGE, &why);
    }
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
    let name = args.name.unwrap_or_default();
    let config = HostConfig {
        name: name.clone(),
        listen: args.listen,
        run_dir: args.run_dir,
        disks: args.disks,
        exports: args.exports,
        spill_dir: args.spill_dir,
        epoch_memory_bytes: args.epoch_memory_mib << 20,
        net: args.net,
        metrics_listen: args.metrics_listen,
        arbiter: args.arbiter,
        policy: args.policy,
        boot,
        event_log: args.event_log.or_else(|| path_of_environment(&name)),
        entropy_seed: args.seed.unwrap_or(u64::from_le_bytes(seed)),
        configuration,
        log,
        manager: Manager::of_environment(),
    };
    if args.follow_stdin {
        // A thread of its own: reading standard input cannot be cancelled, and must not hold the runtime up.
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(0);
        });
    }
    let listening = |address: &Address, metrics: Option<&str>| {
        say_listening(&format!("host {name}"), address);
        metrics.iter().for_each(|url| say_listening(&format!("metrics of host {name}"), url));
    };
    match host::run(config, listening).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ HostError::Unfinished(_)) => fail(cli::EXIT_FAILED, &error),
        Err(error) => fail(cli::EXIT_ENVIRONMENT, &error),
    }
}

/// What SIGHUP reads again, and what it said at first.
fn configuration(path: PathBuf) -> Result<Configuration, ConfigError> {
    let keys = Config::load(&path)?.keys();
    let read = Arc::new(move || Config::load(&path).map(|config| config.keys()).map_err(|error| error.to_string()));
    Ok(Configuration { keys, read })
}

/// Changes what can change while the host runs, and says from when on.
async fn set(args: SetArgs) -> ExitCode {
    let mut live = Live::default();
    for (key, value) in &args.settings {
        match live.put(key, value) {
            Ok(()) => {}
            // It may be no key at all.
            Err(BadSetting::Fixed(key)) if !Config::knows(&key) || operator::nearest(&key, Live::KEYS).is_some() => {
                let there = || format!("there is {}", Live::KEYS.join(", "));
                let near =
                    operator::nearest(&key, Live::KEYS).map_or_else(there, |near| format!("did you mean {near}?"));
                return fail(cli::EXIT_FAILED, &format_args!("{key} is no setting; {near}"));
            }
            Err(error) => return fail(cli::EXIT_FAILED, &error),
        }
    }
    let host = HostRef { name: None, host: args.host, run_dir: args.run_dir };
    match ask(&host, &Request::Set(live)).await {
        Ok((_, done)) if say::is_json() => {
            say::out(&done);
            ExitCode::SUCCESS
        }
        Ok((_, done)) => {
            let said = done["said"].as_array().into_iter().flatten();
            let _ = said.filter_map(|line| line.as_str()).all(|line| say::out(&line));
            ExitCode::SUCCESS
        }
        Err(error) => fail_control(&error),
    }
}

async fn serve_arbiter(args: ArbiterArgs) -> ExitCode {
    // A register that cannot be kept is found out now, and not by the first host that must know who goes on.
    if let Err(error) = arbiter::Arbiter::File(args.file.clone()).query("").await {
        return fail(cli::EXIT_ENVIRONMENT, &error);
    }
    let listener = match args.listen.listen().await {
        Ok(listener) => listener,
        Err(error) => return fail(cli::EXIT_ENVIRONMENT, &format!("listen on {}: {error}", args.listen)),
    };
    say_listening("arbiter", &listener.local_address().unwrap_or(args.listen));
    arbiter::serve(listener, args.file, Arc::new(|_| {})).await;
    ExitCode::SUCCESS
}

async fn receive(args: ReceiveArgs) -> ExitCode {
    let joined = if args.blackhole {
        receive::join_blackhole().await
    } else {
        match ask(&args.host, &Request::Status).await {
            Ok((_, status)) => match status["listen"].as_str().map(str::parse::<Address>) {
                Some(Ok(address)) => receive::join(&address),
                _ => return fail(cli::EXIT_FAILED, &"the host does not say where it listens"),
            },
            Err(error) => {
                let text = format!("nobody stands by here: {error}");
                say::Failure { class: error.class(), text, remedy: error.remedy() }.say();
                return ExitCode::from(cli::EXIT_FAILED);
            }
        }
    };
    match joined {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(cli::EXIT_FAILED, &format!("receive: {error}")),
    }
}

async fn protect(args: ProtectArgs, given: &[String]) -> ExitCode {
    let (host, request) = match args.request(given) {
        Ok((host, protect)) => (host, Request::Protect(protect)),
        Err(error) => return fail_config(&error),
    };
    if !args.wait {
        return order(&host, "protect", request).await;
    }
    let done = async {
        let (socket, _) = ask(&host, &request).await?;
        operator::until_protected(&socket).await
    };
    answer("protect", done.await)
}

async fn failover(args: FailoverArgs) -> ExitCode {
    if !args.wait {
        return order(&args.host, "failover", Request::Failover).await;
    }
    let done = async {
        let (socket, _) = ask(&args.host, &Request::Failover).await?;
        operator::until_committed(&socket).await
    };
    answer("failover", done.await)
}

/// Says what it found on standard output; the exit code is 0 only if nothing is missing.
async fn check_host(args: CheckArgs) -> ExitCode {
    let numbered = args.guest.as_ref().and_then(|guest| xen::domain_name(guest.parse().ok()?));
    let guest = numbered.or(args.guest);
    let lines = check::judge(&check::gather(args.peer.as_ref(), guest.as_deref()).await);
    let able = lines.iter().all(|line| line.ok);
    if say::is_json() {
        say::out(&serde_json::json!({"able": able, "lines": lines}));
    } else {
        let _ = lines.iter().all(|line| say::out(line));
    }
    if able { ExitCode::SUCCESS } else { ExitCode::from(cli::EXIT_FAILED) }
}

async fn show_status(args: StatusArgs) -> ExitCode {
    loop {
        let is_read = match ask(&args.host, &Request::Status).await {
            Err(error) => return fail_control(&error),
            Ok((_, status)) if say::is_json() => say::out(&status),
            Ok((_, status)) => match serde_json::from_value::<status::Status>(status) {
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

async fn list(args: ListArgs) -> ExitCode {
    let listed = match operator::list(&args.run_dir).await {
        Ok(listed) => listed,
        Err(error) => return fail_control(&error),
    };
    if say::is_json() {
        say::out(&serde_json::json!({"hosts": listed}));
    } else if listed.is_empty() {
        say::out(&format_args!("no host runs here ({} has no socket)", args.run_dir.display()));
    } else {
        let _ = say::out(&operator::list_head()) && listed.iter().all(|listed| say::out(listed));
    }
    ExitCode::SUCCESS
}

async fn show_top(host: HostRef) -> ExitCode {
    let shown = match operator::find(&host.run_dir, host.name()).await {
        Ok(socket) => top::run(&socket).await,
        Err(error) => Err(error.into()),
    };
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(TopError::Control(error)) => fail_control(&error),
        Err(error) => fail(cli::EXIT_FAILED, &error),
    }
}

fn configure(args: &ConfigArgs) -> ExitCode {
    let mut notes = Vec::new();
    let configured = (|| {
        let mut config = Config::default();
        if let Some(path) = &args.check {
            config = Config::load(path)?;
        }
        // On the secondary's machine the domain's configuration need not be there.
        let named = config.guest.xen.clone().filter(|xl| xl.exists());
        if let Some(xl) = args.xl.clone().or(named) {
            let keys = xl::Keys::load(&xl)?;
            config.fill_from(&keys);
            notes = keys.notes();
            config.guest.xen = Some(xl);
        }
        Ok(config)
    })();
    match (configured, &args.check) {
        (Err(error), _) => {
            say::Failure { class: "config", text: ConfigError::to_string(&error), remedy: None }.say();
            return ExitCode::from(cli::EXIT_FAILED);
        }
        (Ok(_), Some(path)) if say::is_json() => say::out(&serde_json::json!({"ok": true, "file": path})),
        (Ok(_), Some(path)) => say::out(&format_args!("ok   {}", path.display())),
        (Ok(config), None) if say::is_json() => say::out(&serde_json::json!({"toml": config.write(), "xl": notes})),
        (Ok(config), None) => {
            let notes: String = notes.iter().map(|note| format!("# xl's {note}\n")).collect();
            say::out(&format_args!("{notes}{}", config.write().trim_end()))
        }
    };
    ExitCode::SUCCESS
}

async fn show_events(args: EventsArgs) -> ExitCode {
    let socket = match operator::find(&args.host.run_dir, args.host.name()).await {
        Ok(socket) => socket,
        Err(error) => return fail_control(&error),
    };
    let tell = |told: &Told| {
        if told.lost > 0 && !say::is_json() {
            say::err(&format_args!("{} events are lost: the host keeps the last {EVENTS_MAX}", told.lost));
        } else if told.lost > 0 {
            say::out(&serde_json::json!({"event": "lost", "count": told.lost}));
        }
        told.events.iter().all(|event| {
            if say::is_json() { say::out(&serde_json::to_string(event).unwrap_or_default()) } else { say::out(event) }
        })
    };
    match operator::read_events(&socket, args.since, args.follow, tell).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail_control(&error),
    }
}

/// Gives a host an order, and says in JSON that it is carried out.
async fn order(host: &HostRef, name: &str, request: Request) -> ExitCode {
    answer(name, ask(host, &request).await.map(|(socket, _)| socket))
}

fn answer(name: &str, done: Result<PathBuf, ControlError>) -> ExitCode {
    match done {
        Ok(socket) => {
            if say::is_json() {
                let host = socket.file_stem().map(|host| host.to_string_lossy().into_owned());
                say::out(&serde_json::json!({"done": name, "host": host}));
            }
            ExitCode::SUCCESS
        }
        Err(error) => fail_control(&error),
    }
}

async fn ask(host: &HostRef, request: &Request) -> Result<(PathBuf, serde_json::Value), ControlError> {
    let socket = operator::find(&host.run_dir, host.name()).await?;
    let answer = control::ask(&socket, request).await?;
    Ok((socket, answer))
}
