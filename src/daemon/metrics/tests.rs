//! The server on a socket, before an engine that is a task of the test.

use super::*;
use crate::colo::Cause;
use crate::compare::{Service, ServicePort};
use crate::daemon::events::{Checkpoint, What};
use crate::daemon::status::{Health, Protection};
use std::sync::atomic::{AtomicU64, Ordering};

/// A server before an engine that answers so, and how often that was asked.
async fn server(answers: bool) -> (SocketAddr, Events, Arc<AtomicU64>) {
    let metrics = Metrics::listen("a", "0".parse().unwrap()).await.unwrap();
    let (address, history) = (metrics.address, Events::new("a"));
    let (engine, mut asked) = mpsc::channel::<Asked>(4);
    let count = Arc::new(AtomicU64::new(0));
    let counting = count.clone();
    tokio::spawn(async move {
        let mut silent = Vec::new();
        while let Some((request, reply)) = asked.recv().await {
            assert_eq!(request, control::Request::Status);
            counting.fetch_add(1, Ordering::Relaxed);
            let status = Status { host: "a".into(), guest: Some("web".into()), ..Status::default() };
            match serde_json::to_value(status) {
                Ok(status) if answers => _ = reply.send(Answer::Return(status)),
                _ => silent.push(reply),
            }
        }
    });
    tokio::spawn(metrics.serve(engine, history.clone()));
    (address, history, count)
}

/// What it answers to these bytes.
async fn answer(address: SocketAddr, bytes: &[u8]) -> String {
    let mut link = TcpStream::connect(address).await.unwrap();
    let _ = link.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = link.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

const SCRAPE: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn an_address_is_the_loopback_one_unless_it_is_written_out() {
    for (text, address, is_loopback) in [
        ("9741", "127.0.0.1:9741", true),
        (":9741", "127.0.0.1:9741", true),
        ("0", "127.0.0.1:0", true),
        ("[::1]:80", "[::1]:80", true),
        ("[::ffff:127.0.0.1]:80", "[::ffff:127.0.0.1]:80", true),
        ("192.0.2.1:80", "192.0.2.1:80", false),
        ("0.0.0.0:80", "0.0.0.0:80", false),
        ("[::]:80", "[::]:80", false),
    ] {
        let parsed: MetricsAddress = text.parse().unwrap();
        assert_eq!((parsed.to_string(), parsed.is_loopback()), (address.to_owned(), is_loopback), "{text}");
    }
    for bad in ["", ":", "*:80", "65536", "host:80", "127.0.0.1", "::80", "unix:/x", "-1", "80 "] {
        let why = bad.parse::<MetricsAddress>().unwrap_err().to_string();
        assert!(why.contains("write PORT, or IP:PORT"), "{bad}: {why}");
    }
}

#[tokio::test]
async fn a_scrape_is_answered_in_both_formats() {
    let (address, history, _) = server(true).await;
    let checkpoint = Checkpoint { cause: Cause::Delay.to_string(), pages: 2, pause_us: 300, ..Checkpoint::default() };
    history.tell(Some("web"), What::Checkpoint(checkpoint));
    let classic = answer(address, SCRAPE).await;
    for part in [
        "HTTP/1.1 200 OK\r\n",
        "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n",
        "\n# HELP xen_colo_checkpoints_total Checkpoints that the peer came to own.\n# TYPE xen_colo_checkpoints_total counter\n",
        "\nxen_colo_checkpoints_total{host=\"a\",guest=\"web\",cause=\"delay\"} 1\n",
        "\nxen_colo_checkpoints_total{host=\"a\",guest=\"web\",cause=\"aged\"} 0\n",
        "\nxen_colo_checkpoint_pause_seconds_bucket{le=\"0.00025\",host=\"a\",guest=\"web\"} 0\n",
        "\nxen_colo_checkpoint_pause_seconds_bucket{le=\"0.0005\",host=\"a\",guest=\"web\"} 1\n",
        "\nxen_colo_health{host=\"a\",guest=\"web\",state=\"empty\"} 1.0\n",
    ] {
        assert!(classic.contains(part), "{part:?} in {classic}");
    }
    // Not measured, not there.
    for absent in ["interval", "heartbeat", "# EOF", "recovery_point", "xen_colo_protected", "wire_bytes", "takeovers"]
    {
        assert!(!classic.contains(absent), "{absent} in {classic}");
    }
    let open = b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0\r\n\r\n";
    let open = answer(address, open).await;
    assert!(open.contains("# TYPE xen_colo_checkpoints counter\n") && open.ends_with("# EOF\n"), "{open}");
    assert!(
        open.contains("\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"),
        "{open}"
    );
    assert!(answer(address, b"GET / HTTP/1.1\r\n\r\n").await.contains("href=\"/metrics\""));
    assert!(answer(address, b"HEAD /metrics HTTP/1.1\r\n\r\n").await.ends_with("\r\n\r\n"));
    assert!(answer(address, b"DELETE / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405 "));
}

#[tokio::test]
async fn a_difference_is_told_by_service_and_names_no_client() {
    let (address, history, _) = server(true).await;
    for (flow, cause) in [("10.9.8.7", Cause::Aged), ("10.9.8.6", Cause::Aged), ("fd00::1", Cause::PayloadDiffers)] {
        let service = Service { protocol: "tcp".into(), port: ServicePort::Guest(443) };
        let cause = cause.to_string();
        let (flow, service) = (Some(format!("tcp 10.0.0.2 443 > {flow} 40000")), Some(service));
        history.tell(Some("web"), What::Checkpoint(Checkpoint { cause, flow, service, ..Checkpoint::default() }));
    }
    let text = answer(address, SCRAPE).await;
    let line = |reason: &str, count: u64| {
        let labels = format!("protocol=\"tcp\",port=\"443\",at=\"guest\",reason=\"{reason}\"");
        format!("\nxen_colo_service_divergences_total{{host=\"a\",guest=\"web\",{labels}}} {count}\n")
    };
    for (reason, count) in [("aged", 2), ("payload-differs", 1), ("one-sided", 0)] {
        assert!(text.contains(&line(reason, count)), "{reason}: {text}");
    }
    assert!(!text.contains("10.9.8") && !text.contains("40000") && !text.contains("fd00"), "{text}");
}

#[tokio::test]
async fn a_peers_name_for_a_guest_stays_a_label() {
    let (address, history, _) = server(true).await;
    let name = "web\"} 1\n# TYPE xen_colo_evil gauge\nxen_colo_evil 1\n\\";
    history.tell(Some(name), What::TakenOver { generation: 2, reason: String::new(), decided_after_ms: None });
    let text = answer(address, SCRAPE).await;
    assert!(!text.contains("\nxen_colo_evil") && !text.contains("\n# TYPE xen_colo_evil"), "{text}");
    assert!(text.contains(r#"guest="web\"} 1\n# TYPE xen_colo_evil gauge\nxen_colo_evil 1\n\\"} 1"#), "{text}");
}

#[tokio::test]
async fn many_scrapes_at_once_ask_the_engine_once() {
    let (address, _history, asked) = server(true).await;
    let scrapes: Vec<_> = (0..CONNECTIONS_MAX / 2).map(|_| tokio::spawn(answer(address, SCRAPE))).collect();
    let begun = Instant::now();
    for scrape in scrapes {
        assert!(scrape.await.unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
    }
    let periods = begun.elapsed().as_millis() / STATUS_AGE_MAX.as_millis() + 1;
    let asked = asked.load(Ordering::Relaxed);
    assert!(u128::from(asked) <= periods, "{asked} times in {periods} periods");
}

#[tokio::test]
async fn an_engine_that_does_not_answer_fails_the_scrape() {
    let (address, ..) = server(false).await;
    let text = answer(address, SCRAPE).await;
    assert!(text.starts_with("HTTP/1.1 503 ") && text.contains("the engine does not answer within"), "{text}");
    assert!(answer(address, b"GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn who_finds_no_place_is_told_and_places_come_back() {
    let (address, ..) = server(true).await;
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        idle.push(TcpStream::connect(address).await.unwrap());
    }
    assert!(answer(address, b"").await.starts_with("HTTP/1.1 503 "), "the next one finds none");
    // They say nothing, and are closed.
    for link in &mut idle {
        let mut rest = Vec::new();
        link.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"");
    }
    assert!(answer(address, SCRAPE).await.starts_with("HTTP/1.1 200 OK\r\n"));
}

#[test]
fn a_guest_is_protected_or_not_where_it_runs_and_nowhere_else() {
    let page = |protection, degraded: &[String]| {
        let health = Health::of(protection, degraded);
        let status = Status { host: "a".into(), guest: Some("web".into()), health, ..Status::default() };
        page::open_metrics(Counted::default(), status).unwrap()
    };
    let line = |value: &str| format!("xen_colo_protected{{host=\"a\",guest=\"web\"}} {value}\n");
    for (protection, degraded, value) in [
        (Protection::Unprotected, None, Some("0.0")),
        (Protection::Syncing, None, Some("0.0")),
        (Protection::Protected, None, Some("1.0")),
        (Protection::Protected, Some("the disk lags".to_owned()), Some("1.0")),
        (Protection::Held, None, Some("0.0")),
        (Protection::TakenOver, None, Some("0.0")),
        (Protection::StandingBy, None, None),
        (Protection::Stopped, None, None),
        (Protection::Failed, None, None),
    ] {
        let degraded = Vec::from_iter(degraded);
        let text = page(protection, &degraded);
        assert_eq!(text.contains("\nxen_colo_protected{"), value.is_some(), "{protection:?}");
        assert!(value.is_none_or(|value| text.contains(&line(value))), "{protection:?}: {text}");
        let state = format!("state=\"{}\"}} 1.0\n", Health::of(protection, &degraded).name());
        assert!(text.contains(&state) && text.matches("xen_colo_health{").count() == 9, "{state}: {text}");
        let ones = text.lines().filter(|line| line.starts_with("xen_colo_health{") && line.ends_with(" 1.0")).count();
        assert_eq!(ones, 1, "{text}");
    }
}
