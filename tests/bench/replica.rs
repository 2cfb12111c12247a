//! The two halves of a protected disk, without a guest: `scripts/bench.sh replica` starts them and a pair of QEMUs.
//!
//! ```text
//!   fio ─NBD─▶ primary: export ─▶ Mirror ─▶ image          secondary: server ─▶ Replica ─▶ image
//!                                   └─ queue ─ session ──NBD──────────┘
//! ```
//!
//! `primary SOCKET IMAGE REPLICA_SOCKET` and `secondary SOCKET IMAGE` say `ready`, and then the word of each order they
//! have carried out: mark, allow; seal, takeover. What is measured is between the two words.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xen_colo::daemon::address::Address;
use xen_colo::daemon::engine_clock;
use xen_colo::daemon::links::lock;
use xen_colo::daemon::nbd::remote::{self, Remote};
use xen_colo::daemon::nbd::serve_connection;
use xen_colo::daemon::nbd::threads::{Listener, Running, Service, serve_all};
use xen_colo::disk::{Disk, DiskError, FileDisk};
use xen_colo::nbd::handshake::Export;
use xen_colo::nbd::request::Request;
use xen_colo::nbd::session::{Config, Session};
use xen_colo::replica::epochs::ReplicaConfig;
use xen_colo::replica::mirror::{Holds, Mirror, MirrorHandle, Payload, SyncStep, Target};
use xen_colo::replica::set::Replicas;

type Failed = Box<dyn Error + Send + Sync>;

const EXPORT: &str = "disk0";
/// As of a guest's disk.
const QUEUE_BYTES: u64 = 64 << 20;
/// As a host has it, between two rounds of writing the replica.
const APPLY_DELAY: Duration = Duration::from_millis(250);
/// How long somebody with nothing to do waits.
const IDLE: Duration = Duration::from_micros(200);

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["primary", socket, image, to] => primary(Path::new(socket), Path::new(image), Path::new(to)).await,
        ["secondary", socket, image] => secondary(Path::new(socket), Path::new(image)).await,
        _ => Err("scripts/bench.sh replica starts this".into()),
    }
}

/// Says that it is ready, and then carries out each order.
fn obey(mut order: impl FnMut(&str) -> Result<(), Failed>) -> Result<(), Failed> {
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    for word in std::io::stdin().lock().lines() {
        let word = word?;
        match order(&word) {
            Ok(()) => writeln!(out, "{word}")?,
            Err(error) => writeln!(out, "{error}")?,
        }
        out.flush()?;
    }
    Ok(())
}

async fn secondary(socket: &Path, image: &Path) -> Result<(), Failed> {
    // As on a host: what does not fit into memory goes beside the image.
    let config = ReplicaConfig { spill_dir: image.parent().map(Path::to_owned), ..ReplicaConfig::default() };
    let replicas = Replicas::new(vec![Box::new(FileDisk::open(image)?)], config);
    replicas.start_sync(1)?;
    let listener = Address::Unix(socket.to_owned()).listen().await?;
    let served = replicas.clone();
    tokio::spawn(async move {
        while let Ok(link) = listener.accept().await {
            if let Some(view) = served.primary_views(1).next() {
                tokio::spawn(serve_connection(link, EXPORT.into(), Box::new(view)));
            }
        }
    });
    let applied = replicas.clone();
    std::thread::spawn(move || {
        // As on a host. An error shows at the next checkpoint.
        loop {
            std::thread::sleep(APPLY_DELAY);
            let _ = applied.apply_round();
        }
    });
    tokio::task::block_in_place(|| {
        obey(|word| {
            match word {
                "seal" => replicas.seal()?,
                "takeover" => replicas.takeover(2)?,
                _ => return Err(format!("{word} is no order").into()),
            }
            Ok(())
        })
    })
}

async fn primary(socket: &Path, image: &Path, to: &Path) -> Result<(), Failed> {
    let local = FileDisk::open(image)?;
    let size_bytes = local.size_bytes();
    let mirror = MirrorHandle(Arc::new(Mutex::new(Mirror::new(Box::new(local), QUEUE_BYTES))));
    lock(&mirror.0).attach(Target { session: 0, holds: Holds::Anything });
    let session = Session::new(EXPORT, Config::default(), engine_clock())?;
    let remote = Remote::open(session, remote::to(Address::Unix(to.to_owned())), Arc::new(AtomicU64::new(0)));
    remote.export().await?;
    tokio::spawn(forward(mirror.clone(), remote));
    while !lock(&mirror.0).sync_finished() {
        if matches!(lock(&mirror.0).next_sync_chunk()?, SyncStep::Full) {
            tokio::time::sleep(IDLE).await;
        }
    }
    let listener = Listener::Unix(UnixListener::bind(socket)?);
    let guest = mirror.clone();
    let mut export = Export::new(EXPORT, size_bytes);
    export.multi_conn = true;
    let open = Box::new(move |_| Ok(Box::new(guest.clone()) as Box<dyn Disk>));
    let service = Arc::new(Service { exports: vec![export], open, max_connections: 0, tls: None });
    std::thread::spawn(move || serve_all(&listener, &service, &Running::default()));
    let mut marked = 0;
    tokio::task::block_in_place(|| {
        obey(|word| {
            match word {
                "mark" => {
                    marked = lock(&mirror.0).mark();
                    while !lock(&mirror.0).drained(marked) {
                        if let Some(error) = lock(&mirror.0).status().error {
                            return Err(error.into());
                        }
                        std::thread::sleep(IDLE);
                    }
                }
                "allow" => lock(&mirror.0).allow(marked + 1),
                _ => return Err(format!("{word} is no order").into()),
            }
            Ok(())
        })
    })
}

fn lost(why: String) -> DiskError {
    DiskError::io("the secondary's disk", std::io::Error::other(why))
}

/// Sends what the mirror lets go, and tells it what came of it.
async fn forward(mirror: MirrorHandle, remote: Remote) {
    let (mut under_way, mut waiting) = (HashMap::new(), None);
    loop {
        remote.submit_all(|submit| {
            while let Some(copy) = waiting.take().or_else(|| lock(&mirror.0).poll_forward()) {
                let request = match &copy.payload {
                    Payload::Data(data) => Request::write(copy.offset, data.clone()),
                    &Payload::Zeroes { len_bytes, keep_allocated } => {
                        Request::write_zeroes(copy.offset, len_bytes, keep_allocated)
                    }
                };
                match submit(request) {
                    Ok(cookie) => _ = under_way.insert(cookie, copy.seq),
                    Err(_) => {
                        waiting = Some(copy);
                        break;
                    }
                }
            }
        });
        match tokio::time::timeout(IDLE, remote.completions()).await {
            Ok(Ok(completions)) => {
                let mut mirror = lock(&mirror.0);
                for completion in completions {
                    let Some(seq) = under_way.remove(&completion.cookie) else { continue };
                    mirror.handle_acked(seq, completion.result.map(drop).map_err(|error| lost(format!("{error:?}"))));
                }
            }
            Ok(Err(error)) => {
                return lock(&mirror.0).fail(&lost(error.to_string()));
            }
            Err(_) => {}
        }
    }
}
