//! The page of a run: written from what hosts wrote down, read by a real browser, and refused where there is nothing to tell.

use crate::common::{PATIENCE, XL_COLO, installed, one_line, run, turn, xl_colo};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

fn path(dir: &Path) -> &str {
    dir.to_str().unwrap()
}

/// A line of a log.
fn line(number: u64, host: &str, rest: &str) -> String {
    let at = 1_795_000_000_000_000 + number * 250_000;
    format!("{{\"number\":{number},\"at_us\":1,\"unix_us\":{at},\"host\":\"{host}\",\"guest\":\"web\",{rest}}}\n")
}

/// Chromium, headless and off the net, with a profile of its own.
async fn chromium(args: &[&str], page: &Path) -> Output {
    let profile = tempfile::tempdir().unwrap();
    let profile = format!("--user-data-dir={}", path(profile.path()));
    let url = format!("file://{}", path(page));
    let still = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"];
    let silent = ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", &profile];
    // A browser on a busy machine takes longer to start than anything of ours.
    let words = [&["120", "chromium"][..], &still, &silent, args, &[&url]].concat();
    let child = tokio::process::Command::new("timeout").args(words).kill_on_drop(true).output();
    tokio::time::timeout(PATIENCE * 5, child).await.expect("chromium hangs").unwrap()
}

/// What the browser made of the page, after the style and whatever there might be of a script.
async fn dom(page: &Path) -> String {
    let output = chromium(&["--dump-dom", "--enable-logging=stderr", "--v=0"], page).await;
    let (dom, said) = (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    // What the page itself makes a browser say: a policy that is broken, a file that is not there.
    let console: Vec<_> = said.lines().filter(|line| line.contains("CONSOLE")).collect();
    assert_eq!(console, [""; 0], "the page is in order");
    dom
}

/// What `xl-colo report` says of a directory.
async fn figures(dir: &Path, more: &[&str]) -> Value {
    let output = xl_colo(&[&["report", path(dir), "--json"], more].concat()).await;
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// All attributes and elements by which a page fetches something.
fn fetches(html: &str) -> Vec<&str> {
    let words =
        ["src=", "<script", "<link", "<img", "<iframe", "<object", "@import", "url(", "http://", "https://", "onload="];
    // Its own empty icon fetches nothing.
    let found = words.into_iter().filter(|word| html.replace("<link rel=\"icon\" href=\"data:,\">", "").contains(word));
    found.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_leaves_a_page_that_a_browser_shows() {
    if installed("chromium").is_none() {
        return;
    }
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("run");
    let output = xl_colo(&["demo", "--json", "--seconds", "3", "--report", path(&kept)]).await;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("report.html: demo, "), "it says where: {stderr}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    for file in ["a.events", "b.events", "demo.json", "report.html"] {
        assert!(kept.join(file).is_file(), "{file}");
    }

    let page = kept.join("report.html");
    let source = std::fs::read_to_string(&page).unwrap();
    assert_eq!(fetches(&source), [""; 0], "it stands alone");
    let dom = dom(&page).await;
    for (what, words) in [
        ("who", "<h1>demo</h1>"),
        ("the headline", "host b took over in generation 2, decided "),
        ("the mode", "colo mode, generation 1, 2"),
        ("the clients' verdict", "<strong>none</strong>"),
        ("the drawing", "id=\"timeline-t\""),
        ("host b's states", "host b: taken-over for "),
        ("the end of host a", "the last line of host a"),
        ("a step", "<th scope=\"row\">peer last heard</th>"),
        ("its end", "<th scope=\"row\">first output</th>"),
        ("the table of numbers", "pause: the guest stood still"),
        ("the first change", "host started, pid "),
        ("the last", "TAKEN OVER: runs alone in generation 2"),
    ] {
        assert!(dom.contains(words), "{what}: {words:?} is not in {}", page.display());
    }
    // The browser has drawn it all: what it would not understand it would have put elsewhere.
    let figures = figures(&kept, &[]).await;
    let checkpoints = figures["checkpoints"].as_u64().unwrap();
    assert!(checkpoints >= 1 && dom.contains(&format!("<strong>{checkpoints}</strong>")), "{figures:#}");
    assert!(told["checkpoints"]["total"].as_u64().unwrap() <= checkpoints, "{told:#} {figures:#}");
    assert_eq!(figures["hosts"], serde_json::json!(["a", "b"]));
    assert_eq!(figures["takeovers"][0]["host"], "b");
    assert_eq!(
        (figures["lost_writes"].as_u64(), figures["malformed_lines"].as_u64()),
        (Some(0), Some(0)),
        "{figures:#}"
    );
    assert!(figures["stream_bytes"].as_u64() > Some(64 << 10), "the first copy is among them: {figures:#}");
    assert!(figures["protected_us"].as_u64() > Some(500_000), "{figures:#}");
    let svgs = dom.matches("<svg").count();
    assert!(svgs >= 5 && dom.matches("</svg>").count() == svgs, "{svgs} drawings");

    // A demo does not mix its run with another.
    let again = one_line(&xl_colo(&["demo", "--report", path(&kept)]).await, 1);
    assert!(again.contains("it has an event log already, a.events"), "{again}");
}

/// A peer says why a link ended, and a guest has a name: neither gets into the page but as text.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_said_is_text_in_the_browser() {
    if installed("chromium").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let evil = r#"</td></table><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e\" '&amp;"#;
    let lost = format!(r#""event":"link-lost","link":"peer","reason":"{evil}""#);
    let cause = format!(
        r#""event":"checkpoint","checkpoint":1,"cause":"{evil}","pages":1,"devices_bytes":1,"interval_us":null,"reply_us":1,"pause_us":1,"capture_us":1,"transfer_us":1,"release_us":1,"load_us":null"#
    );
    let taken = format!(r#""event":"taken-over","generation":2,"reason":"{evil}","decided_after_ms":1"#);
    let text = [line(1, evil, &lost), line(2, evil, &cause), line(3, evil, &taken)].concat().replace("web", evil);
    std::fs::write(dir.path().join("a.events"), text).unwrap();
    figures(dir.path(), &[]).await;
    let page = dir.path().join("report.html");
    let source = std::fs::read_to_string(&page).unwrap();
    assert!(!source.contains("<script") && !source.contains("<img") && !source.contains('\u{202e}'));
    let dom = dom(&page).await;
    assert!(!dom.contains("<script") && !dom.contains("<img"), "nothing became an element");
    assert!(!dom.contains("<title>owned") && dom.contains("&lt;script&gt;document.title='owned'&lt;/script&gt;"));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_nothing_to_tell_one_line_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let refused = async |args: &[&str]| one_line(&xl_colo(&[&["report"], args].concat()).await, 1);

    let why = refused(&["/nonexistent/dir"]).await;
    assert!(why.contains("/nonexistent/dir: No such file or directory"), "{why}");
    let why = refused(&[path(dir.path())]).await;
    assert!(why.contains("has no event log (NAME.events); do: copy both hosts' NAME.events there"), "{why}");
    let made = run("mkfifo", &[path(&dir.path().join("pipe.events"))]).await;
    assert!(made.status.success());
    let why = refused(&[path(dir.path())]).await;
    assert!(why.contains("has no event log"), "a pipe is none, and nobody waits for it: {why}");
    file("a.events", "");
    let why = refused(&[path(dir.path())]).await;
    assert!(why.contains("no line of the event logs in ") && why.contains("they are empty"), "{why}");
    file("a.events", "not json\n");
    let why = refused(&[path(dir.path())]).await;
    assert!(why.contains("a.events:1: "), "{why}");
    file("a.events", &line(1, "a", r#""event":"paused""#));
    let why = refused(&[path(dir.path()), "--guest", "db"]).await;
    assert!(why.contains("the event logs tell nothing of db; do: name one of its guests with --guest"), "{why}");
    let why = refused(&[path(dir.path()), "-o", "/nonexistent/page.html"]).await;
    assert!(why.contains("/nonexistent/page.html: No such file or directory"), "{why}");
    assert!(!dir.path().join("report.html").exists());
    file("b.events", &line(1, "b", r#""event":"paused""#).replace("web", "db"));
    let why = refused(&[path(dir.path())]).await;
    assert!(why.contains("of 2 guests: db, web; do: name one"), "{why}");
    assert_eq!(figures(dir.path(), &["--guest", "web"]).await["hosts"], serde_json::json!(["a"]));

    // Somebody's log that is not ours to read.
    let probe = run("setpriv", &["--reuid=65534", "--clear-groups", XL_COLO, "--version"]).await;
    if !probe.status.success() {
        eprintln!("SKIP: {XL_COLO} cannot be run as another user: {probe:?}");
        return;
    }
    let open = std::os::unix::fs::PermissionsExt::from_mode;
    std::fs::set_permissions(dir.path(), open(0o755)).unwrap();
    std::fs::set_permissions(dir.path().join("a.events"), open(0o600)).unwrap();
    let output = run("setpriv", &["--reuid=65534", "--clear-groups", XL_COLO, "report", path(dir.path())]).await;
    let why = one_line(&output, 1);
    assert!(why.contains("a.events: Permission denied"), "{why}");
}

/// Lines that are cut off, not JSON, of another version, or endless cost themselves and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn lines_that_are_no_events_are_counted_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let older = line(1, "a", r#""event":"unprotected","reason":"it began""#);
    let text = [
        line(2, "a", r#""event":"protected","peer":"b","mode":"remus","generation":1"#).into_bytes(),
        b"\0\0\0\0\0\n".to_vec(),
        line(3, "a", r#""event":"from-tomorrow""#).into_bytes(),
        vec![b'x'; 100_000],
        b"\n".to_vec(),
        line(4, "a", r#""event":"paused""#).into_bytes(),
        b"{\"number\":5,\"at_".to_vec(),
    ]
    .concat();
    std::fs::write(dir.path().join("a.events.1"), older).unwrap();
    std::fs::write(dir.path().join("a.events"), text).unwrap();
    let output = xl_colo(&["report", path(dir.path())]).await;
    assert!(output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("4 lines are no events and were left out"), "{stderr}");
    let page = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
    for words in [
        "a.events:2: ",
        "a.events:3: unknown variant `from-tomorrow`",
        "a.events:4: a line of more than 16384 bytes",
        "a.events:6: the line is cut off",
        "a.events.1</td>",
        "4 lines are no events",
    ] {
        assert!(page.contains(words), "{words}");
    }
    let figures = figures(dir.path(), &[]).await;
    assert_eq!((figures["events"].as_u64(), figures["malformed_lines"].as_u64()), (Some(3), Some(4)));
}

/// The longest logs that two hosts keep: 64 MiB of them.
#[tokio::test(flavor = "multi_thread")]
async fn the_longest_logs_give_a_page_as_small_as_any() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = |number: u64| {
        let cause = ["delay", "payload-differs", "aged", "command"][(number % 4) as usize];
        let rest = format!(
            r#""event":"checkpoint","checkpoint":{number},"cause":"{cause}","pages":{pages},"devices_bytes":512,"stream_bytes":{pages}00,"interval_us":250000,"reply_us":10,"pause_us":{pause},"capture_us":40,"transfer_us":900,"release_us":940,"load_us":70"#,
            pages = 1 + number % 977,
            pause = 20 + number * number % 7919,
        );
        line(number, "a", &rest)
    };
    let loaded = |number: u64| line(number, "b", &format!(r#""event":"loaded","checkpoint":{number},"load_us":70"#));
    // States that change all the time, too.
    let change = |number: u64| {
        line(number, "a", [r#""event":"degraded","reason":"x""#, r#""event":"resumed""#][(number % 2) as usize])
    };
    type Line<'a> = &'a dyn Fn(u64) -> String;
    let kinds: [(&str, u64, Line); 4] = [
        ("a.events.1", 1, &checkpoint),
        ("a.events", 60_000, &change),
        ("b.events.1", 1, &loaded),
        ("b.events", 140_000, &loaded),
    ];
    let mut total = 0;
    for (name, first, of) in kinds {
        let mut text = String::new();
        for number in first.. {
            if text.len() > 16 << 20 {
                break;
            }
            text += &of(number);
        }
        total += text.lines().count() as u64;
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let output = PathBuf::from(dir.path()).join("page.html");
    let words = ["report", path(dir.path()), "--json", "-o", path(&output)];
    let child = tokio::process::Command::new(XL_COLO).args(words).kill_on_drop(true).output();
    let said = tokio::time::timeout(PATIENCE + Duration::from_secs(120), child).await.expect("it hangs").unwrap();
    assert!(said.status.success(), "{said:?}");
    let figures: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!((figures["events"].as_u64(), figures["malformed_lines"].as_u64()), (Some(total), Some(0)));
    let bytes = std::fs::metadata(&output).unwrap().len();
    assert!(bytes < 1 << 20, "{bytes} bytes for {total} events");
}
