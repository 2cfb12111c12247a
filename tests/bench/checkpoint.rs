//! How long a guest stands still at a checkpoint: `scripts/bench.sh checkpoint`.
//!
//! ```text
//! round:   pair A, resume after capture  │  pair B, resume after VMSTATE_LOADED  │  a plain copy of the same pages
//! ```
//!
//! Each pair is two real engines joined by TCP over loopback. Between checkpoints the same pages of the running
//! guest are written; a pause is what the guest itself sees, from `suspend` to `resume`. The rounds interleave, so
//! that whatever else the machine does falls on all three alike, and what is claimed is a ratio, never a time.
#![forbid(unsafe_code)]

use serde_json::{Value, json};
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc as channel};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use xen_colo::bitmap::Bitmap;
use xen_colo::colo::arbiter::{Claim, Policy};
use xen_colo::colo::heartbeat::Heartbeat;
use xen_colo::colo::hello::{Mode, ResumeOrder, disk_name};
use xen_colo::colo::{primary, secondary};
use xen_colo::daemon::address::{Address, Link};
use xen_colo::daemon::control::{Answer, Asked, Request};
use xen_colo::daemon::engine::{Engine, EngineParts, HostInput, Vacancy};
use xen_colo::daemon::guest::Guest;
use xen_colo::daemon::links::{self, Side, outbox};
use xen_colo::daemon::nbd::remote::{self, Dialling};
use xen_colo::daemon::{engine_clock, nbd};
use xen_colo::demo::{GUEST_IP, GUEST_MAC};
use xen_colo::hypervisor::embedded::MachineConfig;
use xen_colo::hypervisor::{Domain, DomainError};
use xen_colo::page::{PAGE_SIZE, Pfn};
use xen_colo::replica::epochs::ReplicaConfig;
use xen_colo::replica::mirror::{Holds, Target};

type Failed = Box<dyn Error + Send + Sync>;

/// Pages written between two checkpoints.
const DIRTY_PAGES: usize = 10_000;
/// The guest: its upper half is free, and holds the pages that are written.
const GUEST_MIB: u64 = 256;
/// Rounds that count, and rounds before them in which buffers find their size.
const ROUNDS: usize = 30;
const WARM_UP_ROUNDS: usize = 3;
/// What the project aims at: pause / memory copy.
const AIM: f64 = 1.5;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
const GENERATION: u64 = 1;
/// Far beyond the bench: only its own checkpoints are taken, and a busy machine loses no heartbeat.
const NEVER: Duration = Duration::from_secs(3600);

type SharedDomain = Arc<Mutex<Box<dyn Domain>>>;

/// The guest, with a watch on how long it stands still, and a way in for the bench to write its pages.
struct Watched {
    guest: SharedDomain,
    suspended_at: Option<Instant>,
    pauses: channel::Sender<Duration>,
}

fn lock(guest: &SharedDomain) -> std::sync::MutexGuard<'_, Box<dyn Domain>> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Domain for Watched {
    fn nr_pages(&self) -> u64 {
        lock(&self.guest).nr_pages()
    }
    fn suspend(&mut self) -> Result<(), DomainError> {
        self.suspended_at = Some(Instant::now());
        lock(&self.guest).suspend()
    }
    fn resume(&mut self) -> Result<(), DomainError> {
        let resumed = lock(&self.guest).resume();
        if let Some(at) = self.suspended_at.take() {
            let _ = self.pauses.send(at.elapsed());
        }
        resumed
    }
    fn logdirty(&mut self, on: bool) -> Result<(), DomainError> {
        lock(&self.guest).logdirty(on)
    }
    fn take_dirty(&mut self, into: &mut Bitmap) -> Result<(), DomainError> {
        lock(&self.guest).take_dirty(into)
    }
    fn read_pages(&mut self, pfns: &[Pfn], into: &mut Vec<u8>) -> Result<(), DomainError> {
        lock(&self.guest).read_pages(pfns, into)
    }
    fn write_pages(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Result<(), DomainError> {
        lock(&self.guest).write_pages(pfns, bytes)
    }
    fn save_devices(&mut self) -> Result<Vec<u8>, DomainError> {
        lock(&self.guest).save_devices()
    }
    fn check_devices(&self, run: &[u8]) -> Result<(), DomainError> {
        lock(&self.guest).check_devices(run)
    }
    fn load_devices(&mut self, blob: &[u8]) -> Result<(), DomainError> {
        lock(&self.guest).load_devices(blob)
    }
    fn set_generation(&mut self, generation: u64) -> Result<(), DomainError> {
        lock(&self.guest).set_generation(generation)
    }
    fn receive_frame(&mut self, frame: &[u8]) -> bool {
        lock(&self.guest).receive_frame(frame)
    }
}

/// One engine on a thread of its own, and the ends of its channels that must stay open.
struct Host {
    control: mpsc::Sender<Asked>,
    inputs: mpsc::Sender<HostInput>,
    _open: Box<dyn std::any::Any + Send>,
}

impl Host {
    fn start(name: &str, guest: Option<Guest>) -> Result<Self, Failed> {
        let (control, control_receiver) = mpsc::channel(4);
        let (inputs, host) = mpsc::channel(1);
        let (protect, protects) = mpsc::channel(1);
        let (network, network_in) = mpsc::channel(1);
        let (network_out, outgoing) = outbox();
        let engine = Engine::new(EngineParts {
            metrics: None,
            unlearn: Box::new(|| ()),
            listen: Address::Unix("nowhere".into()),
            name: name.into(),
            guest,
            left: None,
            disks: Default::default(),
            exports: vec![],
            arbiter: None,
            control: control_receiver,
            protect,
            host,
            network_in,
            network_out,
            vacancy: tokio::sync::watch::channel(Vacancy::Taken).0,
            events: xen_colo::daemon::qmp::teller(),
            line: tokio::sync::watch::channel(String::new()).0,
            manager: Default::default(),
            log: Default::default(),
            history: xen_colo::daemon::events::Events::new(name),
            runtime: tokio::runtime::Handle::current(),
        });
        std::thread::Builder::new().name(format!("engine {name}")).spawn(move || {
            match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => drop(runtime.block_on(engine.run())),
                Err(error) => eprintln!("no runtime for the engine: {error}"),
            }
        })?;
        Ok(Self { control, inputs, _open: Box::new((protects, network, outgoing)) })
    }

    async fn ask(&self, request: Request) -> Result<Value, Failed> {
        let (answer, answered) = oneshot::channel();
        self.control.send((request, answer)).await?;
        match answered.await? {
            Answer::Return(value) => Ok(value),
            Answer::Error { desc } => Err(desc.into()),
        }
    }
}

/// A protected guest.
struct Pair {
    a: Host,
    _b: Host,
    guest: SharedDomain,
    pauses: channel::Receiver<Duration>,
}

impl Pair {
    async fn start(name: &str, resume: ResumeOrder, dir: &Path) -> Result<Self, Failed> {
        let config = MachineConfig {
            ram_pages: GUEST_MIB * 256,
            mac: GUEST_MAC,
            ip: GUEST_IP,
            diverge_percent: 0,
            host_entropy_seed: 1,
        };
        let image = |host: &str| [dir.join(format!("{name}-{host}.img"))];
        let mut guest = Guest::boot(name, &config, &image("a"), 16 << 20, GENERATION)?;
        let (copy, is_blank) = Guest::stand_by(name, &guest.geometry, &image("b"), ReplicaConfig::default(), 2)?;
        let replicas = copy.replicas.clone().ok_or("a guest that stands by has replicas")?;
        replicas.start_sync(GENERATION)?;

        let holds = if is_blank { Holds::Zeroes } else { Holds::Anything };
        let target = Target { session: 0, holds };
        let domain = Arc::new(Mutex::new(guest.domain.take().ok_or("a booted guest has a domain")?));
        let (sender, pauses) = channel::channel();
        guest.domain = Some(Box::new(Watched { guest: domain.clone(), suspended_at: None, pauses: sender }));

        let mut ends = Vec::new();
        for _ in 0..4 {
            ends.push(connection().await?);
        }
        let [(stream_a, stream_b), (packets_a, packets_b), (beats_a, beats_b), (nbd_a, nbd_b)] =
            <[(Link, Link); 4]>::try_from(ends).map_err(|_| "four links")?;
        let beats = || Heartbeat::new(engine_clock(), Duration::from_millis(100), 1000, GENERATION);
        let view = Box::new(replicas.primary_views(GENERATION).next().ok_or("a guest has a disk")?);
        let server =
            Box::pin(
                async move { nbd::serve_connection(nbd_b, disk_name(0), view).await.map_err(std::io::Error::other) },
            );
        let no_other = || -> Dialling { Box::pin(async { Err(std::io::ErrorKind::NotConnected.into()) }) };
        let nbd = vec![remote::begun(nbd_a, Box::new(no_other))];
        let (_place, later) = tokio::sync::mpsc::channel(1);
        let side_a = Side::Primary {
            packets: remote::begun(packets_a, Box::new(no_other)),
            nbd,
            sent_pages: None,
            hashes: vec![],
        };
        let (packets, nr_pages) = ((packets_b, later), guest.geometry.nr_pages);
        let side_b = Side::Secondary { packets, nr_pages, nbd: vec![server], hashes: vec![] };
        let here = tokio::runtime::Handle::current();
        let links_a = links::start(stream_a, beats_a, beats(), side_a, &here);
        let links_b = links::start(stream_b, beats_b, beats(), side_b, &here);

        let claim = |holder: &str| Claim { guest: name.into(), expected: GENERATION, holder: holder.into() };
        let mut config_a = primary::Config::new(Mode::Colo, claim("a"));
        (config_a.resume, config_a.policy, config_a.checkpoint_delay) = (resume, Policy::Hold, NEVER);
        let mut config_b = secondary::Config::new(Mode::Colo, claim("b"));
        config_b.policy = Policy::Hold;

        let (a, b) = (Host::start("a", Some(guest))?, Host::start("b", None)?);
        let (begun, answer) = oneshot::channel();
        let join = HostInput::Join { links: links_b, config: config_b, peer: "a".into(), guest: Box::new(copy) };
        let protect =
            HostInput::Protect { links: links_a, config: config_a, peer: "b".into(), targets: vec![target], begun };
        b.inputs.send(join).await.map_err(|_| "host b is gone")?;
        a.inputs.send(protect).await.map_err(|_| "host a is gone")?;
        if let Answer::Error { desc } = answer.await? {
            return Err(desc.into());
        }
        let pair = Self { a, _b: b, guest: domain, pauses };
        pair.settle().await?;
        while pair.pauses.try_recv().is_ok() {}
        Ok(pair)
    }

    /// Waits until no checkpoint is under way.
    async fn settle(&self) -> Result<(), Failed> {
        let begun = Instant::now();
        loop {
            let status = self.a.ask(Request::Status).await?;
            match status["protection"].as_str() {
                Some("protected") if status["state"] == "Running" => return Ok(()),
                Some("protected" | "syncing") if begun.elapsed() < PATIENCE => {}
                _ => return Err(format!("the pair does not settle: {status}").into()),
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn captured_pages(&self) -> Result<u64, Failed> {
        Ok(self.a.ask(Request::Status).await?["pages"].as_u64().unwrap_or(0))
    }

    /// Writes the pages, takes a checkpoint, and returns how long the guest stood still.
    async fn checkpoint(&self, pfns: &[Pfn], bytes: &[u8]) -> Result<Duration, Failed> {
        let before = self.captured_pages().await?;
        lock(&self.guest).write_pages(pfns, bytes)?;
        self.a.ask(Request::Checkpoint).await?;
        let pause = tokio::task::block_in_place(|| self.pauses.recv_timeout(PATIENCE))?;
        self.settle().await?;
        let captured = self.captured_pages().await? - before;
        if captured < pfns.len() as u64 || self.pauses.try_recv().is_ok() {
            return Err(format!("{captured} pages were captured, not all in one checkpoint").into());
        }
        Ok(pause)
    }
}

/// The two ends of a connection over loopback.
async fn connection() -> Result<(Link, Link), Failed> {
    let listener = "127.0.0.1:0".parse::<Address>()?.listen().await?;
    let address = listener.local_address()?;
    let (here, there) = tokio::join!(address.connect(), listener.accept());
    Ok((here?, there?))
}

/// Numbers that look random and are the same each time: SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The pages that are written: scattered over the guest's free upper half, in order.
fn dirty_pages() -> Vec<Pfn> {
    let (mut state, nr_pages) = (7, GUEST_MIB * 256);
    let mut pfns = std::collections::BTreeSet::new();
    while pfns.len() < DIRTY_PAGES {
        pfns.insert(Pfn(nr_pages / 2 + random(&mut state) % (nr_pages / 2)));
    }
    pfns.into_iter().collect()
}

/// The reference: memory of the guest's size, and a destination that is faulted in and used again.
struct Copy {
    memory: Vec<u8>,
    into: Vec<u8>,
}

impl Copy {
    fn new() -> Self {
        Self { memory: vec![1; GUEST_MIB as usize * 256 * PAGE_SIZE], into: vec![1; DIRTY_PAGES * PAGE_SIZE] }
    }

    /// Writes the pages as a pair's guest has them written, and copies them out.
    fn run(&mut self, pfns: &[Pfn], bytes: &[u8]) -> Duration {
        for (pfn, page) in pfns.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
            self.memory[pfn.0 as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(page);
        }
        // A pair takes about as long from the write to the capture; the caches get the same time.
        std::thread::sleep(Duration::from_millis(1));
        let begun = Instant::now();
        for (pfn, into) in pfns.iter().zip(self.into.chunks_exact_mut(PAGE_SIZE)) {
            into.copy_from_slice(&self.memory[pfn.0 as usize * PAGE_SIZE..][..PAGE_SIZE]);
        }
        let took = begun.elapsed();
        std::hint::black_box(&self.into);
        took
    }
}

fn percentile(samples: &[f64], percent: usize) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[(sorted.len() - 1) * percent / 100]
}

fn spread(samples: &[f64]) -> Value {
    json!({ "p50": percentile(samples, 50), "min": percentile(samples, 0), "max": percentile(samples, 100) })
}

fn ratios(of: &[f64], to: &[f64]) -> f64 {
    let each: Vec<f64> = of.iter().zip(to).map(|(of, to)| of / to).collect();
    percentile(&each, 50)
}

async fn measure() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let capture = Pair::start("after-capture", ResumeOrder::AfterCapture, dir.path()).await?;
    let loaded = Pair::start("after-loaded", ResumeOrder::AfterLoaded, dir.path()).await?;
    let (pfns, mut copy) = (dirty_pages(), Copy::new());
    let mut bytes = vec![0; DIRTY_PAGES * PAGE_SIZE];
    let mut state = 1;
    let mut micros = [const { Vec::new() }; 3];
    let mut first_us = 0.0;
    for round in 0..WARM_UP_ROUNDS + ROUNDS {
        // Every page changes, and none becomes zero.
        for page in bytes.chunks_exact_mut(PAGE_SIZE) {
            page.fill(random(&mut state) as u8 | 1);
        }
        let took = [
            capture.checkpoint(&pfns, &bytes).await?,
            loaded.checkpoint(&pfns, &bytes).await?,
            tokio::task::block_in_place(|| copy.run(&pfns, &bytes)),
        ];
        if round == 0 {
            first_us = took[0].as_secs_f64() * 1e6;
        }
        if round >= WARM_UP_ROUNDS {
            for (samples, took) in micros.iter_mut().zip(took) {
                samples.push(took.as_secs_f64() * 1e6);
            }
        }
    }
    let [after_capture, after_loaded, memory_copy] = micros;
    let pause_to_copy = ratios(&after_capture, &memory_copy);
    let loaded_to_capture = ratios(&after_loaded, &after_capture);
    println!(
        "checkpoint pause: {DIRTY_PAGES} dirty pages ({} MiB) of a guest of {GUEST_MIB} MiB, medians of {ROUNDS} rounds",
        (DIRTY_PAGES * PAGE_SIZE) >> 20
    );
    let ms = |samples: &[f64]| percentile(samples, 50) / 1000.0;
    println!("  memory copy of the same pages  {:8.2} ms", ms(&memory_copy));
    println!(
        "  resume after capture           {:8.2} ms   {pause_to_copy:.2} x the memory copy (aim: {AIM} at most, {})",
        ms(&after_capture),
        if pause_to_copy <= AIM { "met" } else { "MISSED" }
    );
    println!("    the first of this size       {:8.2} ms", first_us / 1000.0);
    println!(
        "  resume after VMSTATE_LOADED    {:8.2} ms   {loaded_to_capture:.2} x resume after capture",
        ms(&after_loaded)
    );
    let report = json!({
        "dirty_pages": DIRTY_PAGES,
        "guest_mib": GUEST_MIB,
        "rounds": ROUNDS,
        "memory_copy_us": spread(&memory_copy),
        "after_capture_us": spread(&after_capture),
        "after_capture_first_us": first_us,
        "after_loaded_us": spread(&after_loaded),
        "after_capture_to_memory_copy": pause_to_copy,
        "after_loaded_to_after_capture": loaded_to_capture,
    });
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("checkpoint.json"), format!("{report:#}\n"))?;
    println!("  written to target/bench/checkpoint.json");
    Ok(())
}

fn main() -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build()?;
    let measured = runtime.block_on(measure());
    runtime.shutdown_background();
    measured
}
