//! Strangers on every socket: whatever they say or leave unsaid, the process lives, answers, and does its work.

use crate::common::host::{Host, host_command, protect};
use crate::common::peer::{ScriptedPrimary, hello_of, introduce, is_hung_up, read_word, soon};
use crate::common::world::{Plan, World};
use crate::common::{XL_COLO, one_line, turn, xl_colo};
use bytes::BytesMut;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use xen_colo::colo::arbiter::{Claim, Verdict};
use xen_colo::colo::hello::{self, Channel, Mode, Welcome};
use xen_colo::daemon::address::{Address, Link};
use xen_colo::daemon::arbiter::Arbiter;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::Protection;

/// What a port scanner, a browser, an ssh client or a bug might send.
fn noises() -> Vec<Vec<u8>> {
    let mut word = BytesMut::new();
    hello::encode(&hello_of("a", Channel::Colo, 1), &mut word);
    vec![
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        b"SSH-2.0-OpenSSH_9.9\r\n".to_vec(),
        vec![0; 4096],
        vec![0xff; 4096],
        (0..=255).cycle().take(100_000).collect(),
        // A length of 4 GiB; a length of nothing; JSON that is no hello; text that is no JSON.
        vec![0xff, 0xff, 0xff, 0xff, b'{'],
        vec![0, 0, 0, 0],
        [&[0, 0, 0, 2][..], b"{}"].concat(),
        [&[0, 0, 0, 7][..], b"nonsens"].concat(),
        // A hello that is cut off, and a whole one with a tail.
        word[..word.len() / 2].to_vec(),
        word[..3].to_vec(),
        b"{\"execute\":\"status\"".to_vec(),
        b"{\"execute\":\"status\",\"arguments\":{\"x\":1}}\n".to_vec(),
        b"{\"claim\":{\"guest\":\"web\",\"expected\":-1,\"holder\":\"a\"}}\n".to_vec(),
        vec![b'x'; 1 << 20],
        vec![b'\n'; 1000],
        vec![],
    ]
}

/// Sends each noise over a connection of its own and leaves.
async fn make_noise(address: &Address) {
    for noise in noises() {
        let mut link = address.connect().await.unwrap();
        // A socket that is closed to us is an answer as well.
        let _ = soon("noise is taken", link.write_all(&noise)).await;
    }
}

fn standby(dir: &tempfile::TempDir) -> Host {
    let mut command = host_command("b", dir.path());
    command.args(["--policy", "hold"]);
    Host::start("b", dir.path(), command)
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_on_the_peer_port_leaves_the_host_as_it_was() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = standby(&dir);
    make_noise(&b.address).await;
    assert_eq!(b.status().await.protection, Protection::Empty);
    let mut peer = ScriptedPrimary::joins(&b.address, 5).await;
    peer.copies().await;
    b.becomes(Protection::StandingBy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_on_the_peer_port_does_not_disturb_a_pair() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Colo).await;
    make_noise(&world.b.address).await;
    make_noise(&world.a.address).await;
    load.goes_on(20).await;
    assert_eq!(world.a.status().await.protection, Protection::Protected);
    load.ends_unharmed().await;
}

/// More silent connections than are greeted at once: they are sent away in time for somebody who means it.
#[tokio::test(flavor = "multi_thread")]
async fn silent_strangers_do_not_keep_the_door_shut() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = standby(&dir);
    let mut strangers = Vec::new();
    for _ in 0..40 {
        strangers.push(b.address.connect().await.unwrap());
    }
    let mut peer = soon("a session comes up", ScriptedPrimary::joins(&b.address, 9)).await;
    peer.copies().await;
    b.becomes(Protection::StandingBy).await;
    for mut stranger in strangers {
        is_hung_up(&mut stranger).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_version_is_told_so_in_a_sentence() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = standby(&dir);
    let mut link = b.address.connect().await.unwrap();
    let welcome = introduce(&mut link, &serde_json::json!({"protocol": 99, "shape": "unknown"})).await;
    let why = welcome.refused.unwrap();
    let ours = hello::PROTOCOL_VERSION;
    assert!(
        why.contains(&format!("protocol version 99, this host {ours}; install the same xl-colo on both hosts")),
        "{why}"
    );
    is_hung_up(&mut link).await;
}

fn second_disk() -> hello::DiskGeometry {
    hello::DiskGeometry { name: "disk1".into(), size_bytes: 512 }
}

/// Hellos that are well formed and make no sense: each refused with the reason, none leaves anything behind.
#[tokio::test(flavor = "multi_thread")]
async fn impossible_hellos_are_refused_with_their_reason() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = standby(&dir);
    type Break = fn(&mut hello::Hello);
    let cases: [(Break, &str); 10] = [
        (|word| word.geometry.nr_pages = 0, "0 pages"),
        (|word| word.geometry.nr_pages = u64::MAX, "pages"),
        (|word| word.geometry.nr_pages = hello::GUEST_MAX_PAGES, "MiB free"),
        (|word| word.geometry.disks.clear(), "0 disks"),
        (|word| word.geometry.disks[0].size_bytes = u64::MAX, "bytes"),
        (|word| word.disk = 1, "a link for disk 1 of 1 disks"),
        (|word| word.geometry.disks.push(second_disk()), "has 2 disk(s), and this host was given 1 image(s)"),
        (|word| word.heartbeat_interval_ms = 0, "heartbeat"),
        (|word| word.from = "b".into(), "both hosts are called b"),
        (|word| (word.channel, word.session) = (Channel::Nbd, 77), "no session"),
    ];
    for (break_it, reason) in cases {
        let mut word = hello_of("a", Channel::Colo, 1);
        break_it(&mut word);
        let mut link = b.address.connect().await.unwrap();
        let why = introduce(&mut link, &word).await.refused.unwrap();
        assert!(why.contains(reason), "{reason}: {why}");
        is_hung_up(&mut link).await;
    }
    assert_eq!(b.status().await.protection, Protection::Empty);
    ScriptedPrimary::joins(&b.address, 5).await.copies().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_on_the_control_socket_is_answered_or_hung_up() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = standby(&dir);
    let control = Address::Unix(b.socket.clone());
    make_noise(&control).await;
    for line in ["GET / HTTP/1.1\r\n", "{}\n", "null\n", "{\"execute\":\"dance\"}\n", "{\"execute\":\"protect\"}\n"] {
        let mut link = control.connect().await.unwrap();
        link.write_all(line.as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon("an answer", BufReader::new(link).read_line(&mut answer)).await.unwrap();
        assert!(answer.starts_with("{\"error\":{\"desc\":\""), "{line}: {answer}");
    }
    assert_eq!(b.status().await.protection, Protection::Empty);
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_on_the_arbiters_socket_changes_no_register() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("arbiter.sock"));
    let mut server = tokio::process::Command::new(XL_COLO)
        .args(["arbiter", "--listen", &address.to_string()])
        .arg("--file")
        .arg(dir.path().join("register.json"))
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let line = soon("the arbiter listens", lines.next_line()).await.unwrap().unwrap();
    assert_eq!(line, format!("arbiter listens on {address}"));
    let arbiter = Arbiter::Served(address.clone());
    let claim = |holder: &str, expected| Claim { guest: "web".into(), expected, holder: holder.into() };
    assert_eq!(arbiter.claim(claim("a", 0)).await.unwrap(), Verdict::Won { generation: 1 });
    make_noise(&address).await;
    assert_eq!(arbiter.query("web").await.unwrap().holder, "a");
    assert!(matches!(arbiter.claim(claim("b", 0)).await.unwrap(), Verdict::Lost(_)));
    assert_eq!(arbiter.claim(claim("b", 1)).await.unwrap(), Verdict::Won { generation: 2 });
    assert!(server.try_wait().unwrap().is_none());
}

/// A stranger on a switch port takes the place of the host for a moment: a cable that fell out. It is plugged in
/// again, and the guest's connection lives on.
#[tokio::test(flavor = "multi_thread")]
async fn noise_on_a_switch_port_is_a_cable_that_fell_out() {
    let world = World::start(Plan::default()).await;
    let load = world.load();
    world.protect(Mode::Remus).await;
    for port in ["net-a.sock", "net-b.sock"] {
        make_noise(&Address::Unix(world.path(port))).await;
    }
    load.goes_on(20).await;
    assert_eq!(world.a.status().await.protection, Protection::Protected);
    load.ends_unharmed().await;
}

/// The other way round: what the host believes to be its switch is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_survives_a_switch_that_is_none() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let net = Address::Unix(dir.path().join("net.sock"));
    let listener = net.listen().await.unwrap();
    let mut command = host_command("a", dir.path());
    command.args(["--net", &net.to_string(), "--policy", "hold", "--guest", "web", "--guest-mib", "16"]);
    let a = Host::start("a", dir.path(), command);
    for noise in noises() {
        let mut link: Link = soon("the host plugs in again", listener.accept()).await.unwrap();
        let _ = link.write_all(&noise).await;
        assert_eq!(a.status().await.protection, Protection::Unprotected);
    }
}

/// A primary that is told to protect with something that is no host.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_no_host_is_named_as_one() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = host_command("a", dir.path());
    command.args(["--policy", "hold", "--guest", "web", "--guest-mib", "16"]);
    let a = Host::start("a", dir.path(), command);
    let listener = "127.0.0.1:0".parse::<Address>().unwrap().listen().await.unwrap();
    let address = listener.local_address().unwrap();
    let answers: [(&[u8], &str); 6] = [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak xen-colo"),
        (b"", "hung up on a hello"),
        (b"\x00\x00", "hung up on a hello"),
        (b"\x00\x00\x00\x02{}", "does not speak xen-colo"),
        (b"\x00\x00\x00\x0e{\"protocol\":9}", "protocol version 9"),
        (b"\xff\xff\xff\xff", "does not speak xen-colo"),
    ];
    for (answer, reason) in answers {
        let refusal = a.refusal(Request::Protect(protect(&address, Mode::Colo)));
        let stranger = async {
            let mut link = listener.accept().await.unwrap();
            let _: hello::Hello = read_word(&mut link).await;
            link.write_all(answer).await.unwrap();
        };
        let (why, ()) = tokio::join!(refusal, stranger);
        assert!(why.contains(reason), "{answer:?}: {why}");
        assert_eq!(a.status().await.protection, Protection::Unprotected);
    }
    // One that never answers is given up.
    let silent = tokio::spawn(async move {
        let mut links = Vec::new();
        while let Ok(link) = listener.accept().await {
            links.push(link);
        }
    });
    let run_dir = dir.path().to_str().unwrap();
    let output = xl_colo(&["protect", &address.to_string(), "--host", "a", "--run-dir", run_dir]).await;
    let why = one_line(&output, 1);
    assert!(why.contains("did not answer a hello"), "{why}");
    silent.abort();
}

/// A refusal travels: what the secondary has against it is what `protect` prints.
#[tokio::test(flavor = "multi_thread")]
async fn the_peers_refusal_is_what_the_operator_reads() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = host_command("a", dir.path());
    command.args(["--policy", "hold", "--guest", "web", "--guest-mib", "16"]);
    let a = Host::start("a", dir.path(), command);
    let listener = "127.0.0.1:0".parse::<Address>().unwrap().listen().await.unwrap();
    let address = listener.local_address().unwrap();
    let refusal = a.refusal(Request::Protect(protect(&address, Mode::Colo)));
    let refuses = async {
        let mut link = listener.accept().await.unwrap();
        let _: hello::Hello = read_word(&mut link).await;
        let welcome = Welcome::bare("b", Some("host b is being repaired".into()));
        let mut out = BytesMut::new();
        hello::encode(&welcome, &mut out);
        link.write_all(&out).await.unwrap();
        let mut rest = Vec::new();
        let _ = link.read_to_end(&mut rest).await;
    };
    let (why, ()) = tokio::join!(refusal, refuses);
    assert_eq!(why, "the peer refused: host b is being repaired");
}
