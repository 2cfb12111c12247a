//! Sessions against a server that does whatever it may, loses connections whenever it likes, and dies.

use super::client::{Limits, SubmitError};
use super::handshake::Export;
use super::request::Request;
use super::session::*;
use super::tests::{greeting, info_export, option_reply, reply};
use super::transmission::{Command, Decoder};
use super::*;
use crate::clock::Instant;
use crate::mutant::{self, Mutant};
use bytes::BytesMut;
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngAlgorithm, TestRng, TestRunner};
use std::collections::BTreeMap;
use std::time::Duration;

/// Small, so that most requests overlap.
const SIZE_BYTES: u64 = 16;
const REPLY_TIMEOUT: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(3600);
const FLAGS: u16 = EXPORT_HAS_FLAGS | EXPORT_SEND_FLUSH | EXPORT_SEND_WRITE_ZEROES | EXPORT_SEND_FUA;

#[derive(Debug, Clone)]
enum Op {
    Write { offset: u64, data: Vec<u8>, fua: bool },
    Read { offset: u64, len_bytes: u32 },
    Zero { offset: u64, len_bytes: u32 },
    Flush,
}

impl Op {
    fn request(&self) -> Request {
        match self {
            Self::Write { offset, data, fua } => {
                let request = Request::write(*offset, data.clone().into());
                if *fua { request.fua() } else { request }
            }
            Self::Read { offset, len_bytes } => Request::read(*offset, *len_bytes),
            Self::Zero { offset, len_bytes } => Request::write_zeroes(*offset, *len_bytes, false),
            Self::Flush => Request::flush(),
        }
    }

    /// What it brings, and what it does to a disk.
    fn apply(&self, disk: &mut [u8]) -> Vec<u8> {
        match self {
            Self::Write { offset, data, .. } => disk[*offset as usize..][..data.len()].copy_from_slice(data),
            Self::Zero { offset, len_bytes } => disk[*offset as usize..][..*len_bytes as usize].fill(0),
            Self::Read { offset, len_bytes } => return disk[*offset as usize..][..*len_bytes as usize].to_vec(),
            Self::Flush => {}
        }
        Vec::new()
    }
}

/// A write the server carried out.
struct Done {
    op: Op,
    cookie: (u64, u64),
    replied: bool,
    durable: bool,
}

/// A request that has arrived, and for a flush the writes it covers: those whose reply was out before.
struct Asked {
    cookie: u64,
    op: Op,
    covers: Vec<usize>,
}

/// A connection as the server sees it.
#[derive(Default)]
struct Line {
    negotiated: bool,
    /// The server that had it is gone; the client does not know yet.
    dead: bool,
    asked: Vec<Asked>,
    /// On the wire.
    replies: Vec<(u64, Vec<u8>)>,
}

/// The server: its disk is what was durable at first, and the writes since.
#[derive(Default)]
struct Server {
    log: Vec<Done>,
    lines: BTreeMap<u64, Line>,
}

impl Server {
    fn disk(&self) -> Vec<u8> {
        let mut disk = vec![0; SIZE_BYTES as usize];
        self.log.iter().for_each(|done| _ = done.op.apply(&mut disk));
        disk
    }

    fn arrive(&mut self, id: u64, bytes: &[u8]) {
        let mut decoder = Decoder::new(&Export::new("", SIZE_BYTES), Framing::default());
        let mut bytes = bytes;
        while let Some(request) = decoder.decode(&mut bytes).unwrap() {
            let op = match request.command {
                Command::Write { offset, data, fua } => Op::Write { offset, data: data.to_vec(), fua },
                Command::Read { offset, len_bytes, .. } => Op::Read { offset, len_bytes },
                Command::Zero { offset, len_bytes, .. } => Op::Zero { offset, len_bytes: len_bytes as u32 },
                Command::Flush => Op::Flush,
                other => panic!("{other:?}"),
            };
            let replied = self.log.iter().enumerate().filter(|(_, done)| done.replied).map(|(at, _)| at);
            let asked = Asked { cookie: request.cookie, op, covers: replied.collect() };
            self.lines.get_mut(&id).unwrap().asked.push(asked);
        }
        assert!(bytes.is_empty(), "whole requests");
    }

    fn execute(&mut self, id: u64, pick: usize) {
        let Some(line) = self.lines.get_mut(&id).filter(|line| !line.asked.is_empty()) else { return };
        let Asked { cookie, op, covers } = line.asked.swap_remove(pick % line.asked.len());
        covers.iter().filter(|_| matches!(op, Op::Flush)).for_each(|at| self.log[*at].durable = true);
        if matches!(op, Op::Write { .. } | Op::Zero { .. }) {
            let durable = matches!(op, Op::Write { fua: true, .. });
            self.log.push(Done { op: op.clone(), cookie: (id, cookie), replied: false, durable });
        }
        let mut disk = self.disk();
        let data = op.apply(&mut disk);
        self.lines.get_mut(&id).unwrap().replies.push((cookie, data));
    }

    /// The connection goes: some of what had arrived is still carried out, and nobody is told.
    fn hang_up(&mut self, id: u64, pick: usize) {
        for at in 0..self.lines.get(&id).map_or(0, |line| line.asked.len()) {
            if pick >> (at % 16) & 1 == 1 {
                self.execute(id, 0);
            }
        }
        self.lines.remove(&id);
    }

    /// The process dies, and its machine too if `forgets`; both are there again at once.
    fn die(&mut self, forgets: bool, pick: usize) {
        for line in self.lines.values_mut() {
            line.dead = true;
            line.asked.clear();
        }
        let mut at = 0;
        self.log.retain(|done| {
            at += 1;
            !forgets || done.durable || pick >> (at % 16) & 1 == 1
        });
        // What survived a death of the machine has reached its medium.
        self.log.iter_mut().for_each(|done| done.durable |= forgets);
    }
}

/// One run: what is asked, what happens when, and whether the server's machine may die.
#[derive(Debug, Clone)]
struct Case {
    ops: Vec<Op>,
    steps: Vec<(u8, u16)>,
    connections: usize,
    machine_dies: bool,
}

struct Run {
    session: Session,
    server: Server,
    now: Instant,
    dialling: Vec<u64>,
    todo: std::vec::IntoIter<Op>,
    next: Option<Op>,
    /// What each request must bring, by its cookie.
    expected: BTreeMap<u64, Vec<u8>>,
    model: Vec<u8>,
    machine_dies: bool,
}

impl Run {
    fn new(case: &Case) -> Self {
        let config = Config {
            limits: Limits { requests: 12, bytes: 1000 },
            connections: case.connections,
            reply_timeout: REPLY_TIMEOUT,
            patience: PATIENCE,
            // Little enough that the session flushes by itself.
            retain_bytes: if case.machine_dies { 40 } else { 0 },
            ..Config::default()
        };
        let mut todo = case.ops.clone().into_iter();
        Self {
            session: Session::new("root", config, Instant::ZERO).unwrap(),
            server: Server::default(),
            now: Instant::ZERO,
            dialling: Vec::new(),
            next: todo.next(),
            todo,
            expected: BTreeMap::new(),
            model: vec![0; SIZE_BYTES as usize],
            machine_dies: case.machine_dies,
        }
    }

    fn line(&self, pick: u16, is: impl Fn(&Line) -> bool) -> Option<u64> {
        let lines: Vec<_> = self.server.lines.iter().filter(|(_, line)| is(line)).map(|(id, _)| *id).collect();
        lines.get(pick as usize % lines.len().max(1)).copied()
    }

    fn input(&mut self, id: u64, bytes: &[u8]) {
        self.session.handle_input(id, &mut BytesMut::from(bytes), self.now);
    }

    fn submit(&mut self) {
        let Some(op) = self.next.take() else { return };
        match self.session.submit(op.request(), self.now) {
            Ok(cookie) => {
                let brings = op.apply(&mut self.model);
                assert!(self.expected.insert(cookie, brings).is_none(), "a cookie is used once");
                self.next = self.todo.next();
            }
            Err(SubmitError::Full | SubmitError::NotReady) => self.next = Some(op),
            Err(other) => panic!("{other}"),
        }
    }

    fn connect(&mut self, pick: u16) {
        if !self.dialling.is_empty() {
            let id = self.dialling.remove(pick as usize % self.dialling.len());
            self.session.handle_connected(id, self.now);
            self.server.lines.insert(id, Line::default());
        }
    }

    fn negotiate(&mut self, pick: u16) {
        if let Some(id) = self.line(pick, |line| !line.negotiated && !line.dead) {
            self.server.lines.get_mut(&id).unwrap().negotiated = true;
            self.input(id, &greeting(3));
            while self.session.poll_output(id).is_some() {}
            let go = [info_export(SIZE_BYTES, FLAGS | EXPORT_CAN_MULTI_CONN), option_reply(OPT_GO, REP_ACK, &[])];
            self.input(id, &go.concat());
        }
    }

    fn deliver(&mut self, pick: u16) {
        if let Some(id) = self.line(pick, |line| !line.replies.is_empty()) {
            let replies = &mut self.server.lines.get_mut(&id).unwrap().replies;
            let (cookie, data) = replies.swap_remove(pick as usize % replies.len());
            let written = self.server.log.iter_mut().find(|done| done.cookie == (id, cookie));
            written.into_iter().for_each(|done| done.replied = true);
            self.input(id, &reply(0, cookie, &data));
        }
    }

    fn step(&mut self, kind: u8, pick: u16) -> Result<(), String> {
        match kind {
            0..=8 => self.submit(),
            9 => self.connect(pick),
            10 => self.negotiate(pick),
            11..=15 => _ = self.line(pick, |line| !line.dead).map(|id| self.server.execute(id, pick.into())),
            16..=20 => self.deliver(pick),
            21 => match self.dialling.pop() {
                Some(id) => self.session.handle_disconnected(id, "refused", self.now),
                None => self.lose(self.line(pick, |_| true), pick),
            },
            22 => self.server.die(self.machine_dies, pick.into()),
            23..=24 => self.lose(self.line(pick, |line| line.dead), pick),
            _ => {
                self.now += REPLY_TIMEOUT / 16 * u32::from(pick % 24);
                self.session.handle_timeout(self.now);
            }
        }
        self.settle(pick)
    }

    fn lose(&mut self, id: Option<u64>, pick: u16) {
        if let Some(id) = id {
            self.server.hang_up(id, pick.into());
            self.session.handle_disconnected(id, "hung up", self.now);
        }
    }

    /// Does what the session wants of its driver, and looks at what is complete.
    fn settle(&mut self, pick: u16) -> Result<(), String> {
        while let Some(action) = self.session.poll_action() {
            match action {
                Action::Dial(id) => self.dialling.push(id),
                Action::Close(id) => {
                    self.dialling.retain(|dialled| *dialled != id);
                    self.server.hang_up(id, pick.into());
                }
            }
        }
        for id in self.server.lines.keys().copied().collect::<Vec<_>>() {
            let bytes: Vec<u8> = std::iter::from_fn(|| self.session.poll_output(id)).flatten().collect();
            if self.server.lines[&id].negotiated && !self.server.lines[&id].dead {
                self.server.arrive(id, &bytes);
            }
        }
        while let Some(Completion { cookie, result }) = self.session.poll_completion() {
            let brings = self.expected.remove(&cookie).ok_or(format!("{cookie} completes, and was not under way"))?;
            match result {
                Ok(data) if data == brings => {}
                Ok(data) => return Err(format!("request {cookie} brings {data:?} and not {brings:?}")),
                Err(error) => return Err(format!("request {cookie}: {error}")),
            }
        }
        Ok(())
    }

    /// Goes on without misfortune until everything is complete.
    fn finish(&mut self) -> Result<(), String> {
        for round in 0..10_000_u16 {
            if self.next.is_none() && self.expected.is_empty() {
                return Ok(());
            }
            match [0, 0, 9, 10, 11, 12, 16, 17, 23, 25][round as usize % 10] {
                // Little enough that everything is answered in time.
                25 => self.step(25, 1)?,
                kind => self.step(kind, round.wrapping_mul(40_503) >> 3)?,
            }
        }
        Err(format!("stuck: {:?}", self.session.status()))
    }
}

fn run(case: &Case) -> Result<(), String> {
    let mut run = Run::new(case);
    run.settle(0)?;
    for (kind, pick) in &case.steps {
        run.step(*kind, *pick)?;
    }
    run.finish()?;
    if case.machine_dies {
        run.next = Some(Op::Flush);
        run.finish()?;
        run.server.die(true, 0);
    }
    let disk = run.server.disk();
    if disk == run.model { Ok(()) } else { Err(format!("the disk holds {disk:?} and not {:?}", run.model)) }
}

fn cases() -> impl Strategy<Value = Case> {
    let place = || (0..SIZE_BYTES - 4, 1_usize..5);
    let op = prop_oneof![
        6 => (place(), 1_u8.., prop::bool::weighted(0.1))
            .prop_map(|((offset, len), byte, fua)| Op::Write { offset, data: vec![byte; len], fua }),
        2 => place().prop_map(|(offset, len)| Op::Read { offset, len_bytes: len as u32 }),
        1 => place().prop_map(|(offset, len)| Op::Zero { offset, len_bytes: len as u32 }),
        1 => Just(Op::Flush),
    ];
    let steps = prop::collection::vec((0_u8..26, any::<u16>()), 0..300);
    (prop::collection::vec(op, 1..60), steps, 1_usize..4, any::<bool>())
        .prop_map(|(ops, steps, connections, machine_dies)| Case { ops, steps, connections, machine_dies })
}

/// The same cases every time.
fn explore(count: u32) -> Result<(), String> {
    let runs = Runs { cases: count, failure_persistence: None, max_shrink_iters: 0, ..Runs::default() };
    let mut runner = TestRunner::new_with_rng(runs, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    runner.run(&cases(), |case| run(&case).map_err(TestCaseError::fail)).map_err(|error| error.to_string())
}

proptest! {
    #![proptest_config(Runs { cases: 2000, ..Runs::default() })]
    #[test]
    fn the_disk_is_what_was_asked_for_in_order(case in cases()) {
        prop_assert_eq!(run(&case), Ok(()));
    }
}

#[test]
fn each_planted_bug_is_caught() {
    for planted in Mutant::OF_SESSIONS {
        mutant::plant(Some(planted));
        let outcome = explore(4000);
        mutant::plant(None);
        assert!(outcome.is_err(), "{planted:?} went unseen");
        println!("{planted:?}: {}", outcome.unwrap_err().lines().next().unwrap_or_default());
    }
}

/// A session with its first connection ready, at time zero.
fn ready(config: Config, size_bytes: u64, flags: u16) -> Session {
    let mut session = Session::new("root", config, Instant::ZERO).unwrap();
    assert_eq!(actions(&mut session), [Action::Dial(1)]);
    becomes_ready(&mut session, 1, size_bytes, flags, Instant::ZERO);
    session
}

fn becomes_ready(session: &mut Session, id: u64, size_bytes: u64, flags: u16, now: Instant) {
    session.handle_connected(id, now);
    let said = [greeting(3).to_vec(), info_export(size_bytes, flags), option_reply(OPT_GO, REP_ACK, &[])].concat();
    session.handle_input(id, &mut BytesMut::from(&said[..]), now);
    while session.poll_output(id).is_some() {}
}

fn actions(session: &mut Session) -> Vec<Action> {
    std::iter::from_fn(|| session.poll_action()).collect()
}

fn sent(session: &mut Session, id: u64) -> Vec<u8> {
    std::iter::from_fn(|| session.poll_output(id)).flatten().collect()
}

fn at(ms: u64) -> Instant {
    Instant::from_micros(ms * 1000)
}

fn write(offset: u64) -> Request {
    Request::write(offset, vec![7].into())
}

#[test]
fn several_connections_are_for_servers_that_allow_them() {
    let config = Config { connections: 3, ..Config::default() };
    assert_eq!(actions(&mut ready(config, 64, FLAGS)), []);
    let retaining = Config { retain_bytes: 1, ..config };
    assert_eq!(actions(&mut ready(retaining, 64, FLAGS | EXPORT_CAN_MULTI_CONN)), []);
    let mut session = ready(config, 64, FLAGS | EXPORT_CAN_MULTI_CONN);
    assert_eq!(actions(&mut session), [Action::Dial(2), Action::Dial(3)]);
    becomes_ready(&mut session, 3, 64, FLAGS | EXPORT_CAN_MULTI_CONN, at(1));
    for offset in 0..4 {
        session.submit(write(offset), at(1)).unwrap();
    }
    let flush = session.submit(Request::flush(), at(1)).unwrap();
    assert_eq!([sent(&mut session, 1).len(), sent(&mut session, 3).len()], [58, 58], "two on each");
    for (id, cookie) in [(1, 1), (1, 2), (3, 1)] {
        session.handle_input(id, &mut reply(0, cookie, b""), at(2));
    }
    assert_eq!(
        [sent(&mut session, 1).len(), sent(&mut session, 3).len()],
        [0, 0],
        "a flush waits for what is elsewhere"
    );
    session.handle_input(3, &mut reply(0, 2, b""), at(2));
    let [first, second] = [sent(&mut session, 1), sent(&mut session, 3)];
    assert_eq!(first.len() + second.len(), 28);
    let id = if second.is_empty() { 1 } else { 3 };
    session.handle_input(id, &mut reply(0, 3, b""), at(3));
    let last = std::iter::from_fn(|| session.poll_completion()).last().unwrap();
    assert_eq!((last.cookie, session.status().unflushed_writes), (flush, 0));
}

#[test]
fn what_cannot_be_reached_is_tried_less_and_less_often_and_then_given_up() {
    let config = Config { patience: Duration::from_secs(10), ..Config::default() };
    let mut session = ready(config, 64, FLAGS);
    let cookie = session.submit(write(0), at(0)).unwrap();
    session.handle_disconnected(1, "hung up", at(1000));
    assert_eq!(actions(&mut session), [Action::Close(1)]);
    let (mut waits, mut now) = (Vec::new(), at(1000));
    while session.failed().is_none() {
        let due = session.poll_timeout().unwrap();
        waits.push((due - now).as_millis());
        now = due;
        session.handle_timeout(now);
        for action in actions(&mut session) {
            if let Action::Dial(id) = action {
                session.handle_disconnected(id, "nobody is there", now);
            }
        }
    }
    assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 2000, 2000, 2000, 850], "ten seconds in all");
    let why = SessionError::NoConnection { patience: config.patience, why: "nobody is there".into() };
    let failed = Completion { cookie, result: Err(RequestError::Session(why.clone())) };
    assert_eq!((session.poll_completion(), session.poll_completion()), (Some(failed), None));
    assert_eq!(why.to_string(), "no connection to the NBD server for 10s: nobody is there");
    session.handle_connected(99, now);
    session.handle_timeout(at(1_000_000));
    assert_eq!(session.submit(write(0), now), Err(SubmitError::NotReady));
    assert_eq!(actions(&mut session), []);
    assert_eq!((session.failed(), session.poll_timeout()), (Some(&why), None));
}

/// A server that takes connections and dies of what it is asked is no server.
#[test]
fn connections_on_which_nothing_is_answered_use_the_patience_up() {
    let config = Config { patience: Duration::from_secs(10), ..Config::default() };
    let mut session = ready(config, 64, FLAGS);
    session.submit(write(0), at(0)).unwrap();
    let (mut id, mut now) = (1, at(0));
    while session.failed().is_none() {
        assert!(now < at(13_000), "{:?}", session.status());
        session.handle_disconnected(id, "crashed", now);
        now = session.poll_timeout().unwrap_or(now);
        session.handle_timeout(now);
        if let Some(Action::Dial(next)) = actions(&mut session).last() {
            id = *next;
            becomes_ready(&mut session, id, 64, FLAGS, now);
        }
    }
    assert_eq!(session.status().last_loss.as_deref(), Some("crashed"));
}

#[test]
fn an_overdue_reply_and_a_server_that_shuts_down_lose_the_connection() {
    let config = Config { reply_timeout: REPLY_TIMEOUT, ..Config::default() };
    let mut session = ready(config, 64, FLAGS);
    assert_eq!(session.poll_timeout(), None, "nothing is due");
    let cookie = session.submit(write(0), at(500)).unwrap();
    let request = sent(&mut session, 1);
    assert_eq!(session.poll_timeout(), Some(at(1500)));
    session.handle_timeout(at(1499));
    assert_eq!(actions(&mut session), []);
    session.handle_timeout(at(1500));
    assert_eq!(actions(&mut session), [Action::Close(1)]);
    session.handle_input(1, &mut reply(0, 1, b""), at(1501));
    assert_eq!(session.poll_completion(), None, "it comes too late");
    session.handle_timeout(at(1550));
    assert_eq!(actions(&mut session), [Action::Dial(2)]);
    becomes_ready(&mut session, 2, 64, FLAGS, at(1550));
    session.handle_disconnected(2, "", at(1550));
    session.handle_timeout(at(1650));
    assert_eq!(actions(&mut session), [Action::Close(2), Action::Dial(3)]);
    session.handle_connected(3, at(1650));
    let said = [greeting(3).to_vec(), info_export(64, FLAGS), option_reply(OPT_GO, REP_ACK, &[])].concat();
    session.handle_input(3, &mut BytesMut::from(&said[..]), at(1651));
    assert!(sent(&mut session, 3).ends_with(&request), "it is sent again");
    session.handle_input(3, &mut reply(108, 1, b""), at(1652));
    assert_eq!((session.poll_completion(), actions(&mut session)), (None, vec![Action::Close(3)]));
    session.handle_timeout(at(3000));
    becomes_ready(&mut session, 4, 64, FLAGS, at(3000));
    session.handle_input(4, &mut reply(0, 1, b""), at(3001));
    assert_eq!(session.poll_completion(), Some(Completion { cookie, result: Ok(bytes::Bytes::new()) }));
    assert_eq!(session.status().lost_connections, 3);
    session.handle_disconnected(4, "", at(3001));
    assert_eq!(session.status().doubtful_writes, 1, "it was not flushed");
}

#[test]
fn an_export_that_is_not_what_it_was_ends_the_session() {
    let cases = [
        (128, FLAGS, false),
        (64, FLAGS & !EXPORT_SEND_FLUSH, false),
        (64, FLAGS | EXPORT_READ_ONLY, false),
        (64, FLAGS | EXPORT_SEND_TRIM, true),
    ];
    for (size_bytes, flags, goes_on) in cases {
        let mut session = ready(Config::default(), 64, FLAGS);
        session.submit(write(0), at(0)).unwrap();
        session.handle_disconnected(1, "hung up", at(0));
        session.handle_timeout(at(50));
        becomes_ready(&mut session, 2, size_bytes, flags, at(50));
        let failed = session.poll_completion().map(|completion| completion.result.unwrap_err().to_string());
        assert_eq!(failed.is_none(), goes_on, "{failed:?}");
        assert!(goes_on || failed.unwrap().starts_with("the NBD export has changed"));
    }
}

#[test]
fn who_leaves_says_so_and_everything_completes() {
    let mut session = ready(Config::default(), 64, FLAGS);
    let cookie = session.submit(write(0), at(0)).unwrap();
    session.disconnect();
    assert_eq!(sent(&mut session, 1)[29 + 6..29 + 8], [0, 2], "NBD_CMD_DISC, behind what was sent");
    let ended = Completion { cookie, result: Err(RequestError::Session(SessionError::Ended)) };
    assert_eq!((session.poll_completion(), session.poll_timeout()), (Some(ended), None));
}

#[test]
fn completions_nobody_takes_count_as_under_way() {
    let config = Config { limits: Limits { requests: 2, bytes: 100 }, ..Config::default() };
    let mut session = ready(config, 64, FLAGS);
    session.submit(write(0), at(0)).unwrap();
    session.submit(Request::read(1, 40), at(0)).unwrap();
    assert_eq!(session.submit(Request::flush(), at(0)), Err(SubmitError::Full));
    session.handle_input(1, &mut reply(0, 2, &[0; 40]), at(0));
    assert_eq!(session.submit(Request::flush(), at(0)), Err(SubmitError::Full));
    assert!(session.poll_completion().is_some());
    assert_eq!(session.submit(write(64), at(0)), Err(SubmitError::OutOfRange));
    session.submit(Request::flush(), at(0)).unwrap();
}
