//! What Prometheus reads of a pair at work, and what is shipped to look at it: the dashboard, the alerts.

use crate::common::host::{Host, host_command};
use crate::common::world::{Plan, World};
use crate::common::{PATIENCE, installed, one_line, run, succeeds, turn, until, xl_colo};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::Protection;

/// What is shipped.
fn packaging(name: &str) -> (PathBuf, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/packaging").join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    (path, text)
}

async fn metrics_of(host: &Host) -> SocketAddr {
    let url = host.status().await.metrics.unwrap();
    let address = url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics"));
    address.unwrap_or_else(|| panic!("{url}")).parse().unwrap()
}

/// Sends these bytes, and reads until the end, which must come.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut link = TcpStream::connect(address).await.unwrap();
    // A server that has had enough closes before it has read all.
    let _ = link.write_all(bytes).await;
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, link.read_to_end(&mut answer)).await;
    let _ =
        ended.unwrap_or_else(|_| panic!("{} is not answered, nor closed", bytes[..bytes.len().min(40)].escape_ascii()));
    answer
}

/// A page of metrics: its text, and the value of each series.
#[derive(Debug)]
struct Scrape {
    text: String,
    series: BTreeMap<String, f64>,
}

impl Scrape {
    async fn of(address: SocketAddr) -> Self {
        // What a scrape told is told again for a tenth of a second.
        tokio::time::sleep(Duration::from_millis(120)).await;
        let answer = exchange(address, b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n").await;
        let answer = String::from_utf8(answer).unwrap();
        let (head, text) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        let samples = text.lines().filter(|line| !line.starts_with('#')).map(|line| line.rsplit_once(' ').unwrap());
        let series: BTreeMap<_, _> = samples.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect();
        assert_eq!(series.len(), text.lines().filter(|line| !line.starts_with('#')).count(), "no series twice");
        Self { text: text.to_owned(), series }
    }

    /// The value of a series; `labels` are what follows the guest's.
    fn get(&self, host: &str, name: &str, labels: &str) -> Option<f64> {
        self.series.get(&format!("{name}{{host=\"{host}\",guest=\"web\"{labels}}}")).copied()
    }

    #[track_caller]
    fn at(&self, host: &str, name: &str, labels: &str) -> f64 {
        self.get(host, name, labels).unwrap_or_else(|| panic!("{name}{labels} is not in {}", self.text))
    }

    /// The type of each family.
    fn types(&self) -> BTreeMap<&str, &str> {
        self.text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect()
    }

    /// The family that a series belongs to.
    fn family<'a>(&self, series: &'a str) -> &'a str {
        let name = series.split('{').next().unwrap();
        let types = self.types();
        let stems = ["_bucket", "_sum", "_count"].iter().filter_map(|suffix| name.strip_suffix(suffix));
        stems.into_iter().find(|stem| types.get(stem) == Some(&"histogram")).unwrap_or(name)
    }

    /// Each series has a family, and each family a help, a type and a series.
    fn is_complete(&self) {
        let types = self.types();
        let of_series: BTreeSet<_> = self.series.keys().map(|series| self.family(series)).collect();
        assert_eq!(of_series, types.keys().copied().collect(), "{}", self.text);
        for family in of_series {
            let help = self.text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '));
            let help: Vec<_> = help.filter(|(name, _)| *name == family).collect();
            assert!(matches!(help[..], [(_, text)] if text.len() > 5), "{family}: {help:?}");
        }
    }

    /// Counters that were here before are here, and have not fallen.
    #[track_caller]
    fn goes_on_from(&self, before: &Self) {
        let types = before.types();
        let mut counters = 0;
        for (series, was) in &before.series {
            if types[before.family(series)] == "gauge" {
                continue;
            }
            counters += 1;
            let is = self.series.get(series).copied();
            assert!(is.is_some_and(|is| is >= *was), "{series} was {was}, is {is:?}");
        }
        assert!(counters > 20, "{}", before.text);
    }
}

async fn promtool_is_content(scrape: &Scrape) {
    if installed("promtool").is_none() {
        return;
    }
    let mut command = tokio::process::Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.kill_on_drop(true).spawn().unwrap();
    child.stdin.take().unwrap().write_all(scrape.text.as_bytes()).await.unwrap();
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}{}", scrape.text);
}

/// Names of metrics, and labels with a value written out, that a text has and no scrape.
fn unknown(text: &str, scrapes: &[Scrape]) -> Vec<String> {
    let text = text.replace("\\\"", "\"");
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let names = text.match_indices("xen_colo_").map(|(at, _)| {
        let end = text[at..].find(|c| !is_word(c)).map_or(text.len(), |end| at + end);
        text[at..end].to_owned()
    });
    let exports = |name: &String| {
        scrapes.iter().any(|scrape| scrape.series.keys().any(|series| series.split('{').next() == Some(name)))
    };
    let mut unknown: BTreeSet<_> = names.filter(|name| !exports(name)).collect();
    for label in ["state", "cause", "reason", "link", "queue", "role"] {
        for operator in ["=", "!="] {
            let begin = format!("{label}{operator}\"");
            for (at, _) in text.match_indices(&begin) {
                let value = text[at + begin.len()..].split('"').next().unwrap();
                let pair = format!("{label}=\"{value}\"");
                if !scrapes.iter().any(|scrape| scrape.text.contains(&pair)) {
                    unknown.insert(pair);
                }
            }
        }
    }
    unknown.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_is_told_from_protection_to_protection_and_to_the_takeover() {
    // A second protection claims a generation too, and nobody has lost by it.
    let plan = Plan { metrics: true, fence: false, diverge: 5, ..Plan::default() };
    let mut world = World::start(plan).await;
    let (a, b) = (metrics_of(&world.a).await, metrics_of(&world.b).await);
    let alone = Scrape::of(a).await;
    assert_eq!((alone.at("a", "xen_colo_protected", ""), alone.get("a", "xen_colo_wire_bytes_total", "")), (0.0, None));
    assert!(!alone.text.contains("heartbeat") && !alone.text.contains("checkpoint"), "not measured: {}", alone.text);
    let empty = Scrape::of(b).await;
    assert!(empty.series.contains_key("xen_colo_health{host=\"b\",state=\"empty\"}"), "{}", empty.text);

    world.protect(Mode::Colo).await;
    // Before the load: one that is ordered while another is taken has that one's cause.
    world.a.order(Request::Checkpoint).await;
    world.a.is("checkpointed by command", |status| status.checkpoints.by_cause.contains_key("command")).await;
    let load = world.load();
    let first = until("checkpoints of both kinds, and a difference", async || {
        let scrape = Scrape::of(a).await;
        let count =
            |cause| scrape.get("a", "xen_colo_checkpoints_total", &format!(",cause=\"{cause}\"")).unwrap_or(0.0);
        let differs = scrape.get("a", "xen_colo_divergences_total", ",reason=\"payload-differs\"").unwrap_or(0.0);
        if count("command") >= 1.0 && differs >= 1.0 { Ok(scrape) } else { Err(scrape.text) }
    })
    .await;
    assert_eq!(first.at("a", "xen_colo_protected", ""), 1.0);
    // The load is all of the guest's one service, and its clients are not named.
    let service = ",protocol=\"tcp\",port=\"80\",at=\"guest\",reason=\"payload-differs\"";
    assert!(first.at("a", "xen_colo_service_divergences_total", service) >= 1.0);
    assert_eq!(first.text.matches("xen_colo_service_divergences_total{").count(), 5, "{}", first.text);
    let total: f64 = first
        .series
        .iter()
        .filter(|(series, _)| series.starts_with("xen_colo_checkpoints_total"))
        .map(|(_, count)| count)
        .sum();
    let pauses = first.at("a", "xen_colo_checkpoint_pause_seconds_count", "");
    assert_eq!(total, pauses, "each checkpoint has a cause and a pause");
    assert_eq!(
        first.at("a", "xen_colo_checkpoint_interval_seconds_count", ""),
        pauses - 1.0,
        "the first has no interval"
    );
    assert!(first.at("a", "xen_colo_packets_released_total", "") > 0.0);
    let standby = Scrape::of(b).await;
    assert_eq!(standby.at("b", "xen_colo_health", ",state=\"standing-by\""), 1.0);
    assert_eq!(standby.get("b", "xen_colo_protected", ""), None, "the guest does not run there");
    for scrape in [&alone, &empty, &first, &standby] {
        scrape.is_complete();
        promtool_is_content(scrape).await;
    }

    // What it says is what the status says, whose counters begin again with each protection.
    let status = world.a.status().await;
    world.a.order(Request::Unprotect).await;
    world.b.becomes(Protection::Empty).await;
    let ended = Scrape::of(a).await;
    ended.goes_on_from(&first);
    assert_eq!(ended.at("a", "xen_colo_health", ",state=\"unprotected\""), 1.0);
    assert!(ended.at("a", "xen_colo_memory_bytes_total", "") >= status.wire.memory_bytes as f64);
    let gone = Scrape::of(b).await;
    let loads = |scrape: &Scrape| scrape.at("b", "xen_colo_checkpoint_load_seconds_count", "");
    assert!(loads(&gone) >= loads(&standby), "what was counted of a guest that has left stays");

    world.protect(Mode::Remus).await;
    let released = |scrape: &Scrape| scrape.at("a", "xen_colo_packets_released_total", "");
    let again = until("packets are released", async || {
        let scrape = Scrape::of(a).await;
        scrape.goes_on_from(&ended);
        if released(&scrape) > released(&ended) { Ok(scrape) } else { Err(scrape.text) }
    })
    .await;
    for link in ["stream", "disk"] {
        let bytes = |scrape: &Scrape| scrape.at("a", "xen_colo_wire_bytes_total", &format!(",link=\"{link}\""));
        assert!(bytes(&again) > bytes(&ended), "{link}");
    }
    // Each protection counts from zero in the status, and both count in what is told.
    let memory = ended.at("a", "xen_colo_memory_bytes_total", "");
    let pages = standby.at("b", "xen_colo_received_pages_total", "");
    let (on_a, on_b) = (world.a.status().await, world.b.status().await);
    assert!(memory > 0.0 && on_a.wire.memory_bytes > 0 && pages > 0.0 && on_b.pages > 0, "{on_a:#?}{on_b:#?}");
    assert_eq!(on_a.totals.memory_bytes.unwrap() as f64, memory + on_a.wire.memory_bytes as f64);
    assert!(on_b.totals.received_pages.unwrap() as f64 >= pages + on_b.pages as f64, "{on_b:#?}");
    Scrape::of(b).await.goes_on_from(&standby);

    load.goes_on(10).await;
    load.live.mark_kill();
    world.a.kill();
    world.b.becomes(Protection::TakenOver).await;
    load.survives(5).await;
    load.ends_unharmed().await;
    let survivor = Scrape::of(b).await;
    survivor.goes_on_from(&gone);
    survivor.is_complete();
    assert_eq!(survivor.at("b", "xen_colo_health", ",state=\"taken-over\""), 1.0);
    assert_eq!(survivor.at("b", "xen_colo_takeovers_total", ""), 1.0);
    assert_eq!(survivor.at("b", "xen_colo_protected", ""), 0.0);
    assert!(survivor.at("b", "xen_colo_link_losses_total", ",link=\"peer\"") >= 1.0);

    // What is shipped asks for nothing that is not there.
    let scrapes = [alone, empty, first, standby, ended, gone, again, survivor];
    for file in ["grafana/xen-colo.json", "prometheus/xen-colo.rules.yml"] {
        let (_, text) = packaging(file);
        assert_eq!(unknown(&text, &scrapes), Vec::<String>::new(), "{file}");
        let planted = text.replacen("xen_colo_recovery_point_age_seconds", "xen_colo_recovery_age_seconds", 1);
        let planted = planted.replacen("link", "link=\"wrong\" link", 1);
        assert_eq!(unknown(&planted, &scrapes), ["link=\"wrong\"", "xen_colo_recovery_age_seconds"], "{file}");
    }
}

/// How many TCP ports a process listens on.
fn listens(pid: u32) -> usize {
    let inodes: BTreeSet<u64> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|entry| Some(std::fs::metadata(entry.path()).ok()?.ino()))
        .collect();
    let tables = ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap());
    let rows =
        tables.iter().flat_map(|table| table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>()));
    // proc(5): the state, of which 0A is LISTEN, and the inode.
    rows.filter(|row| row[3] == "0A" && row[9].parse().is_ok_and(|inode| inodes.contains(&inode))).count()
}

fn standby(name: &str, dir: &Path, words: &[&str]) -> Host {
    let mut command = host_command(name, dir);
    command.args(["--policy", "hold"]).args(words);
    Host::start(name, dir, command)
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_off_unless_it_is_asked_for_and_a_taken_port_is_said() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let off = standby("off", dir.path(), &[]);
    assert_eq!((off.status().await.metrics, listens(off.pid())), (None, 1), "the peers' port, and no other");
    // From a configuration, as from the command line.
    let config = dir.path().join("web.toml");
    std::fs::write(&config, "[host]\nmetrics_listen = \"0\"\n").unwrap();
    let on = standby("on", dir.path(), &["--config", config.to_str().unwrap()]);
    let address = metrics_of(&on).await;
    assert!(address.ip().is_loopback() && listens(on.pid()) == 2, "{address}");
    assert!(!on.log().contains("anybody who reaches"), "{}", on.log());
    if installed("curl").is_some() {
        let page = succeeds("curl", &["--silent", "--fail", &format!("http://{address}/")]).await;
        assert!(page.contains("href=\"/metrics\""), "{page}");
        let page = succeeds("curl", &["--silent", "--fail", "--head", &format!("http://{address}/metrics")]).await;
        assert!(page.contains("version=0.0.4"), "{page}");
        let refused = run("curl", &["--silent", "--fail", &format!("http://{address}/other")]).await;
        assert_eq!(refused.status.code(), Some(22), "404: {refused:?}");
    }

    let taken = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (run_dir, disk) = (dir.path().join("run"), dir.path().join("d.img"));
    let output = xl_colo(&[
        "host",
        "--name",
        "c",
        "--policy",
        "hold",
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        &port,
        "--run-dir",
        run_dir.to_str().unwrap(),
        "--disk",
        disk.to_str().unwrap(),
        "--guest",
        "web",
        "--guest-mib",
        "4",
        "--disk-mib",
        "4",
    ])
    .await;
    let why = one_line(&output, 4);
    assert!(why.contains(&format!("--metrics-listen 127.0.0.1:{port}: Address already in use")), "{why}");
    assert!(!run_dir.exists() && !disk.exists(), "it did not start half");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_client_disturbs_the_host() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let words = ["--guest", "web", "--guest-mib", "4", "--disk-mib", "4", "--metrics-listen", "127.0.0.1:0"];
    let host = standby("a", dir.path(), &words);
    let address = metrics_of(&host).await;
    let begins = async |bytes: &[u8]| {
        let answer = exchange(address, bytes).await;
        String::from_utf8_lossy(&answer).split("\r\n").next().unwrap().to_owned()
    };
    for (bytes, line) in [
        (&b"\xff\xfe\x00\r\n\r\n"[..], "HTTP/1.1 400 Bad Request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        (b"PUT /metrics HTTP/1.1\r\nContent-Length: 1000000\r\n\r\nxxxxxxxx", "HTTP/1.1 405 Method Not Allowed"),
        (b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found"),
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
    ] {
        assert_eq!(begins(bytes).await, line, "{}", bytes.escape_ascii());
    }
    // A head that never ends costs its bound, and not more. What is still on its way may take the answer with it.
    let line = begins(&vec![b'x'; 1 << 20]).await;
    assert!(["HTTP/1.1 431 Request Header Fields Too Large", ""].contains(&&line[..]), "{line}");

    // A hundred at once, of which each says half a request and then nothing: answered or closed, all of them, and the host
    // answers meanwhile.
    let slow: Vec<_> = (0..100).map(|_| tokio::spawn(exchange(address, b"GET /metrics HTTP/1.1\r\nX: "))).collect();
    for _ in 0..20 {
        assert_eq!(host.status().await.protection, Protection::Unprotected);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for slow in slow {
        let answer = String::from_utf8(slow.await.unwrap()).unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }
    let scrapes: Vec<_> = (0..100).map(|_| tokio::spawn(exchange(address, b"GET /metrics HTTP/1.1\r\n\r\n"))).collect();
    let mut answered = 0;
    for scrape in scrapes {
        let answer = String::from_utf8(scrape.await.unwrap()).unwrap();
        let is_page = answer.starts_with("HTTP/1.1 200 OK\r\n");
        assert!(is_page || answer.is_empty() || answer.starts_with("HTTP/1.1 503 "), "{answer}");
        answered += usize::from(is_page);
    }
    assert!(answered > 0, "some of a hundred are answered");
    let scrape = Scrape::of(address).await;
    scrape.is_complete();
    assert_eq!(scrape.at("a", "xen_colo_health", ",state=\"unprotected\""), 1.0);
    host.order(Request::PauseGuest).await;
    let paused = until("the pause is seen", async || {
        let scrape = Scrape::of(address).await;
        if scrape.at("a", "xen_colo_paused", "") == 1.0 { Ok(scrape) } else { Err(scrape.text) }
    })
    .await;
    assert_eq!(paused.types()["xen_colo_paused"], "gauge");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_ends_lets_its_port_go() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut first = standby("a", dir.path(), &["--metrics-listen", "0"]);
    let address = metrics_of(&first).await;
    first.order(Request::Stop).await;
    assert!(first.exit().await.success());
    let port = address.port().to_string();
    let second = standby("a", dir.path(), &["--metrics-listen", &port]);
    assert_eq!(metrics_of(&second).await, address);
    assert!(Scrape::of(address).await.series.contains_key("xen_colo_health{host=\"a\",state=\"empty\"}"));
}

/// Each alert: what it is raised by, for how long, and what raises it not.
const ALERTS: &str = r#"
rule_files: [RULES]
evaluation_interval: 5s
tests:
  - interval: 5s
    input_series:
      - {series: 'up{job="xen-colo", instance="a:9741"}', values: '1x12 0x24'}
      - {series: 'xen_colo_health{host="a", guest="web", state="unprotected"}', values: '1x14 0x22'}
      - {series: 'xen_colo_health{host="a", guest="web", state="degraded"}', values: '0x14 1x22'}
      - {series: 'xen_colo_recovery_point_age_seconds{host="a", guest="web"}', values: '1x12 31x24'}
      - {series: 'xen_colo_disk_lag_bytes{host="a", guest="web", disk="disk0"}', values: '40000000x36'}
      - {series: 'xen_colo_disk_lag_bytes{host="a", guest="web", disk="disk1"}', values: '0x12 40000000x24'}
      - {series: 'xen_colo_heartbeat_age_seconds{host="a", guest="web"}', values: '0.1x36'}
      - {series: 'xen_colo_heartbeat_confirmed_age_seconds{host="a", guest="web"}', values: '0.1x12 0.2x24'}
      - {series: 'xen_colo_heartbeat_limit_seconds{host="a", guest="web"}', values: '0.3x36'}
      - {series: 'xen_colo_health{host="b", guest="web", state="taken-over"}', values: '0x12 1x24'}
      - {series: 'xen_colo_health{host="b", guest="db", state="undecided"}', values: '0x12 1x24'}
      - {series: 'xen_colo_disk_errors{host="b", guest="db"}', values: '0x12 1x24'}
      - {series: 'xen_colo_health{host="b", guest="db", state="failed"}', values: '0x36'}
      - {series: 'xen_colo_link_losses_total{host="a", guest="web", link="disk"}', values: '0x12 5x24'}
      - {series: 'xen_colo_link_losses_total{host="b", guest="web", link="peer"}', values: '0x12 5x24'}
    promql_expr_test:
      - {expr: 'ALERTS{alertstate="firing"}', eval_time: 55s, exp_samples: []}
      - expr: 'sort(count by (alertname) (ALERTS{alertstate="firing"}))'
        eval_time: 62s
        exp_samples:
          - {labels: '{alertname="XenColoUnprotected"}', value: 1}
      - expr: 'count by (alertname) (ALERTS{alertstate="firing"})'
        eval_time: 85s
        exp_samples:
          - {labels: '{alertname="XenColoDiskErrors"}', value: 1}
          - {labels: '{alertname="XenColoLinksLost"}', value: 1}
          - {labels: '{alertname="XenColoRecoveryPointOld"}', value: 1}
          - {labels: '{alertname="XenColoTakenOver"}', value: 1}
          - {labels: '{alertname="XenColoUndecided"}', value: 1}
      - expr: 'count by (alertname) (ALERTS{alertstate="firing"})'
        eval_time: 150s
        exp_samples:
          - {labels: '{alertname="XenColoDegraded"}', value: 1}
          - {labels: '{alertname="XenColoDiskErrors"}', value: 1}
          - {labels: '{alertname="XenColoDiskLag"}', value: 1}
          - {labels: '{alertname="XenColoHeartbeatsLate"}', value: 1}
          - {labels: '{alertname="XenColoHostDown"}', value: 1}
          - {labels: '{alertname="XenColoLinksLost"}', value: 1}
          - {labels: '{alertname="XenColoRecoveryPointOld"}', value: 1}
          - {labels: '{alertname="XenColoTakenOver"}', value: 1}
          - {labels: '{alertname="XenColoUndecided"}', value: 1}
    alert_rule_test:
      - alertname: XenColoTakenOver
        eval_time: 85s
        exp_alerts:
          - exp_labels: {severity: critical, host: b, guest: web, state: taken-over}
            exp_annotations:
              summary: "web was taken over by b"
              description: "Its other host was lost, and it runs alone. Find out why, and protect it again."
"#;

#[tokio::test]
async fn the_alerts_are_raised_by_what_they_are_for() {
    if installed("promtool").is_none() {
        return;
    }
    let (path, text) = packaging("prometheus/xen-colo.rules.yml");
    succeeds("promtool", &["check", "rules", path.to_str().unwrap()]).await;
    let dir = tempfile::tempdir().unwrap();
    let judged = async |rules: &str| {
        let (rules_path, test) = (dir.path().join("rules.yml"), dir.path().join("test.yml"));
        std::fs::write(&rules_path, rules).unwrap();
        std::fs::write(&test, ALERTS.replace("RULES", rules_path.to_str().unwrap())).unwrap();
        run("promtool", &["test", "rules", test.to_str().unwrap()]).await
    };
    let output = judged(&text).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
    for (right, wrong) in [
        ("xen_colo_health{state=\"degraded\"} == 1", "xen_colo_health{state=\"degraded\"} == 2"),
        ("sum by (host, guest) (xen_colo_disk_lag_bytes)", "max by (host, guest) (xen_colo_disk_lag_bytes)"),
        ("link!=\"peer\"", "link!=\"\""),
    ] {
        assert_eq!(text.matches(right).count(), 1, "{right}");
        assert!(!judged(&text.replace(right, wrong)).await.status.success(), "{wrong} is not noticed");
    }
}

/// Grafana takes what is JSON of this shape; that it knows the names is tested with a real scrape.
#[tokio::test]
async fn the_dashboard_has_panels_that_ask_for_something() {
    let (_, text) = packaging("grafana/xen-colo.json");
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(dashboard["schemaVersion"].as_u64() >= Some(38), "Grafana 10's");
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["datasource", "guest", "host"]);
    let panels: Vec<_> =
        dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row").collect();
    assert!(panels.len() > 15, "{}", panels.len());
    let (mut ids, mut asked) = (BTreeSet::new(), Vec::new());
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{panel}");
        for target in panel["targets"].as_array().unwrap() {
            let expr = target["expr"].as_str().unwrap();
            assert!(expr.contains("xen_colo_") && expr.contains("host=~\"$host\""), "{expr}");
            asked.push(expr.replace("$__rate_interval", "1m"));
        }
    }
    if installed("promtool").is_none() {
        return;
    }
    // As rules, which is how promtool reads expressions; and JSON is YAML.
    let (dir, rule) = (tempfile::tempdir().unwrap(), |expr: &String| json!({"record": "dashboard:asks", "expr": expr}));
    let judged = async |asked: &[String]| {
        let path = dir.path().join("rules.json");
        let rules: Vec<_> = asked.iter().map(rule).collect();
        std::fs::write(&path, json!({"groups": [{"name": "dashboard", "rules": rules}]}).to_string()).unwrap();
        run("promtool", &["check", "rules", "--lint=none", path.to_str().unwrap()]).await
    };
    let output = judged(&asked).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!judged(&["rate(xen_colo_takeovers_total)".into()]).await.status.success(), "a wrong one is noticed");
}
