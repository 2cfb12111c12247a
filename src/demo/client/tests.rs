//! The load against an honest key-value server, and against ones that lie or fail.

use std::collections::HashMap;
use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

#[derive(Default)]
struct Store {
    values: Mutex<HashMap<String, Vec<u8>>>,
    /// From how many stored keys on every connection is cut.
    cut_at: Option<usize>,
    /// Cut only these many times.
    cuts_left: Mutex<usize>,
    status: Option<u16>,
    connections: AtomicU64,
}

async fn serve(store: Arc<Store>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            store.connections.fetch_add(1, Relaxed);
            tokio::spawn(converse(stream, store.clone()));
        }
    });
    addr
}

async fn converse(mut stream: TcpStream, store: Arc<Store>) {
    let mut bytes = Vec::new();
    loop {
        let head = loop {
            if let Some(end) = bytes.windows(4).position(|end| end == b"\r\n\r\n") {
                break String::from_utf8(bytes.drain(..end + 4).collect()).unwrap();
            }
            if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                return;
            }
        };
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        while bytes.len() < length {
            if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let body: Vec<u8> = bytes.drain(..length).collect();
        let (method, path) = head.split_once(' ').map(|(m, rest)| (m, rest.split(' ').next().unwrap())).unwrap();
        if store.cut_at.is_some_and(|at| store.values.lock().unwrap().len() >= at) {
            let mut cuts_left = store.cuts_left.lock().unwrap();
            if *cuts_left > 0 {
                *cuts_left -= 1;
                return;
            }
        }
        let (status, reply) = match (method, path, store.status) {
            (_, _, Some(status)) => (status, Vec::new()),
            ("GET", "/", _) => (200, b"hello".to_vec()),
            ("PUT", path, _) => {
                store.values.lock().unwrap().insert(path.to_owned(), body);
                (201, Vec::new())
            }
            (_, path, _) => match store.values.lock().unwrap().get(path) {
                Some(value) => (200, value.clone()),
                None => (404, Vec::new()),
            },
        };
        let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n", reply.len());
        if stream.write_all(&[head.as_bytes(), &reply].concat()).await.is_err() || head.contains("Connection: close") {
            return;
        }
    }
}

fn config() -> ClientConfig {
    ClientConfig { short_connections_parallel: 3, pause_between_ms: 1, keys_max: 10_000, seed: 42 }
}

async fn run_for(addr: SocketAddr, config: ClientConfig, live: &Arc<Live>, millis: u64) -> ClientReport {
    let (stop, stopped) = watch::channel(false);
    let load = tokio::spawn(run(addr, stopped, config, live.clone()));
    tokio::time::sleep(Duration::from_millis(millis)).await;
    stop.send(true).unwrap();
    load.await.unwrap()
}

#[test]
fn values_follow_from_the_seed_and_the_name() {
    let value = value_of(1, "long-0");
    assert_eq!(value, value_of(1, "long-0"));
    assert_ne!(value, value_of(2, "long-0"));
    assert_ne!(value, value_of(1, "long-1"));
    for n in 0..500 {
        let value = value_of(9, &format!("short-1-{n}"));
        assert!((100..=2000).contains(&value.len()) && value.starts_with(format!("short-1-{n}:").as_bytes()));
    }
}

#[tokio::test]
async fn an_honest_server_loses_nothing_and_a_lying_one_is_found_out() {
    let store = Arc::new(Store::default());
    let addr = serve(store.clone()).await;
    let live = Arc::new(Live::default());
    let report = run_for(addr, config(), &live, 200).await;
    assert!(report.connection_kept && report.connection_error.is_none());
    assert_eq!((report.unknown_writes, report.refused, report.retries), (0, 0, 0), "{report:?}");
    let names = &report.ledger.names;
    assert!(
        names.iter().any(|name| name.starts_with("long-")) && names.iter().any(|name| name.starts_with("short-3-"))
    );
    assert_eq!(names.len() as u64, live.acknowledged());
    assert_eq!(store.values.lock().unwrap().len(), names.len());
    let honest = verify(addr, &report.ledger).await;
    assert_eq!(honest, Verification { checked: names.len() as u64, ..Verification::default() });

    store.values.lock().unwrap().remove(&format!("/k/{}", names[1]));
    store.values.lock().unwrap().get_mut(&format!("/k/{}", names[2])).unwrap()[50] ^= 1;
    let mut lost = names[1..=2].to_vec();
    lost.sort();
    let lying = verify(addr, &report.ledger).await;
    assert_eq!((lying.lost, lying.failures.len(), lying.checked), (lost, 2, honest.checked));
}

#[tokio::test]
async fn a_cut_breaks_the_long_connection_and_short_ones_try_again() {
    let store = Arc::new(Store { cut_at: Some(20), cuts_left: Mutex::new(40), ..Store::default() });
    let addr = serve(store).await;
    let report = run_for(addr, config(), &Arc::default(), 600).await;
    assert!(!report.connection_kept);
    assert!(report.connection_error.is_some());
    assert!(report.retries > 0 && report.unknown_writes <= 4, "{report:?}");
    assert!(report.ledger.names.len() > 20, "writes went on");
    assert_eq!(verify(addr, &report.ledger).await.lost, Vec::<String>::new());
}

#[tokio::test]
async fn a_refusal_is_no_acknowledgement_and_keys_are_bounded() {
    let addr = serve(Arc::new(Store { status: Some(507), ..Store::default() })).await;
    let report = run_for(addr, config(), &Arc::default(), 50).await;
    assert!(report.ledger.names.is_empty() && report.refused > 0 && report.connection_kept);
    assert!(!report.failures.is_empty() && report.failures.len() <= 4 * TEXTS_MAX);

    for keys_max in [0, 7] {
        let store = Arc::new(Store::default());
        let addr = serve(store.clone()).await;
        let live = Arc::new(Live::default());
        let report = run_for(addr, ClientConfig { keys_max, ..config() }, &live, 100).await;
        assert_eq!((report.ledger.names.len() as u64, report.unknown_writes), (keys_max, 0));
        assert!(live.replies() > 14 && report.refused == 0, "reads go on: {report:?}");
        assert!(store.connections.load(Relaxed) > 14, "over short connections too");
    }
}

#[tokio::test]
async fn an_unreachable_guest_loses_everything_quickly() {
    let addr = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let ledger = Ledger { seed: 0, names: (0..100).map(|n| format!("long-{n}")).collect() };
    let seen = verify(addr, &ledger).await;
    assert_eq!((seen.checked, seen.lost.len()), (100, 100));
    assert!(seen.failures.len() <= VERIFY_PARALLEL);
    assert_eq!(verify(addr, &Ledger::default()).await, Verification::default());
}

#[test]
fn only_a_request_sent_after_the_kill_measures_the_takeover() {
    let live = Live::default();
    assert_eq!((live.last_reply(), live.takeover()), (None, None));
    let before = Instant::now();
    live.replied(before, true);
    live.mark_kill();
    live.replied(before, true);
    assert_eq!((live.takeover(), live.acknowledged_after_kill()), (None, 0), "the dead host's answers");
    std::thread::sleep(Duration::from_millis(20));
    live.replied(Instant::now(), true);
    let takeover = live.takeover().unwrap();
    assert!(takeover >= Duration::from_millis(20) && live.longest_silence() >= Duration::from_millis(20));
    live.replied(Instant::now(), false);
    assert_eq!(live.takeover(), Some(takeover), "the first one counts");
    assert_eq!((live.acknowledged(), live.acknowledged_after_kill(), live.replies()), (3, 1, 4));
}
