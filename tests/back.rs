//! There and back: a survivor is protected in its turn, by the host that was repaired, and so on.
//!
//! ```text
//!   a ══▶ b   a ✗   b alone   a repaired   b ══▶ a   b ✗   a alone   b repaired   a ══▶ b   a ✗   b alone
//! ```
//!
//! The trap is a connection that began in lock-step: the first survivor translates it, the second must, and the third.

use crate::common::host::protect;
use crate::common::load::Load;
use crate::common::world::{Plan, World};
use crate::common::{PATIENCE, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use xen_colo::colo::hello::Mode;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::{Protection, Status};

impl World {
    /// Protects the guest of one host with the other, as soon as it has a disk of its own.
    async fn protect_from(&mut self, from: &str, to: &str, mode: Mode) {
        let order = Request::Protect(protect(&self.host(to).address.clone(), mode));
        let from = self.host(from);
        until("the survivor can be protected", async || match from.ask(order.clone()).await {
            Ok(_) => Ok(()),
            Err(error) if error.to_string().contains("still being merged") => Err(error.to_string()),
            Err(error) => panic!("{error}"),
        })
        .await;
        from.becomes(Protection::Protected).await;
        self.host(to).becomes(Protection::StandingBy).await;
    }

    /// A primary that was killed starts again as it was, and finds that the guest is elsewhere.
    async fn comes_back(&mut self, name: &str, holder: &str) {
        self.repair(name);
        let status = self.host(name).becomes(Protection::Empty).await;
        let why = status.why.unwrap_or_default();
        assert!(why.contains(&format!("host {holder} holds generation")), "{why}");
    }

    async fn fails_over(&mut self, from: &str, to: &str, load: &Load) -> Status {
        load.goes_on(20).await;
        self.host(from).kill();
        let status = self.host(to).becomes(Protection::TakenOver).await;
        load.goes_on(20).await;
        status
    }
}

/// A connection that says one thing after another and hears its answers.
struct Talk {
    stream: TcpStream,
    said: u32,
}

impl Talk {
    async fn begin(world: &World) -> Self {
        let mut talk = Self { stream: TcpStream::connect(world.address()).await.unwrap(), said: 0 };
        talk.goes_on().await;
        talk
    }

    async fn goes_on(&mut self) {
        self.said += 1;
        let body = format!("word {}", self.said);
        let put = format!("PUT /k/talk HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let exchange = async {
            self.stream.write_all(put.as_bytes()).await.unwrap();
            let mut heard = Vec::new();
            while !heard.windows(4).any(|window| window == b"\r\n\r\n") {
                assert!(self.stream.read_buf(&mut heard).await.unwrap() > 0, "the connection ended");
            }
            String::from_utf8_lossy(&heard).into_owned()
        };
        let heard = tokio::time::timeout(PATIENCE, exchange).await.expect("an answer in time");
        assert!(heard.starts_with("HTTP/1.1 2"), "{heard}");
    }
}

async fn there_and_back(mode: Mode) {
    let mut world = World::start(Plan { fence: false, ..Plan::default() }).await;
    let load = world.load();
    let mut inherited = Talk::begin(&world).await;
    world.protect_from("a", "b", mode).await;
    // In lock-step, these begin with a number of each guest's own.
    let first = world.load();
    let mut translated = Talk::begin(&world).await;
    first.goes_on(20).await;
    assert_eq!(world.fails_over("a", "b", &load).await.generation, 2);
    inherited.goes_on().await;
    translated.goes_on().await;

    world.comes_back("a", "b").await;
    world.protect_from("b", "a", mode).await;
    let mut second = Talk::begin(&world).await;
    for talk in [&mut inherited, &mut translated, &mut second] {
        talk.goes_on().await;
    }
    // A checkpoint later the secondary has it from another state than the first.
    let before = world.a.status().await.checkpoints.total;
    world.b.order(Request::Checkpoint).await;
    world.a.is("a checkpoint later", |status| status.checkpoints.total > before).await;
    assert_eq!(world.fails_over("b", "a", &load).await.generation, 4);
    for talk in [&mut inherited, &mut translated, &mut second] {
        talk.goes_on().await;
    }

    world.comes_back("b", "a").await;
    world.protect_from("a", "b", mode).await;
    assert_eq!(world.fails_over("a", "b", &load).await.generation, 6);
    for talk in [&mut inherited, &mut translated, &mut second] {
        talk.goes_on().await;
    }
    first.ends_unharmed().await;
    load.ends_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_lock_step_every_connection_lives_through_three_failures() {
    there_and_back(Mode::Colo).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_checkpoints_every_connection_lives_through_three_failures() {
    there_and_back(Mode::Remus).await;
}
