//! The packet link: client frames to the secondary, guest frames to the primary, and what survives the end of a
//! connection.
//!
//! ```text
//!   primary     carry ═══ connection, and the next ═══▶ serve     secondary
//!                 lost: the engine is told, hello is said again, the engine is told
//! ```
//!
//! A connection that breaks is no host that died. What was on its way is lost and not sent again, as on any network;
//! the guests then disagree, and checkpoints make that good. What had not been written waits for the next connection.
//! Without one for [`PATIENCE`] the link has ended, and with it the pair.
//!
//! A connection that is silent is broken too: each side sends an empty frame every half second, so one over which
//! nothing comes for three carries nothing. The heartbeat cannot tell: it has a connection of its own. The link runs on the
//! engine's thread, and an engine may be busy for long (a domain that is loaded): what is said every half second is not.
//!
//! Who was asleep must not reach a survivor: no connection is made once the lease of the heartbeat is over, before the
//! engine has come to know that it is.
//!
//! The trap is a frame that was read before the connection was lost, and is handed on after younger ones of the next: one
//! task lets go of the old connection before it reads from the next.

use super::super::address::Link;
use super::super::frames::FRAME_BYTES_MAX;
use super::super::nbd::remote::Connect;
use super::disk::{PATIENCE, PATIENCE_SECONDARY};
use super::{Outgoing, invalid};
use crate::compare::wire;
use bytes::{Bytes, BytesMut};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// How often each side says that the connection carries something.
    pulse: Duration,
    /// How long a connection over which nothing comes is believed in.
    silence: Duration,
    /// Between two attempts to connect.
    retry: Duration,
    /// How long a pair goes on without a connection.
    patience: Duration,
}

impl Times {
    pub(super) const PRIMARY: Self = Self {
        pulse: Duration::from_millis(500),
        silence: Duration::from_secs(3),
        retry: Duration::from_millis(100),
        patience: PATIENCE,
    };
    pub(super) const SECONDARY: Self = Self { patience: PATIENCE_SECONDARY, ..Self::PRIMARY };
}

/// What the engine is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Told {
    /// There is a connection again; some frames did not arrive.
    Up,
    /// The connection was lost, and why.
    Down(String),
}

/// A frame and its epoch.
pub(super) type Tagged = (u64, Bytes);

/// The engine's ends of the link.
pub(super) struct Ends {
    pub(super) outgoing: Outgoing<Tagged>,
    pub(super) to: mpsc::Sender<Tagged>,
    pub(super) told: mpsc::Sender<Told>,
    pub(super) times: Times,
    pub(super) lease: Lease,
    /// A runtime that is not the engine's, for what must go on while the engine is busy.
    pub(super) elsewhere: Handle,
}

/// Whether the peer is still believed to be there.
pub(super) type Lease = Box<dyn Fn() -> bool + Send + Sync>;

/// Carries packets to and from the secondary over the connections that `connect` makes, until there is none for too long.
pub(super) async fn carry(mut connect: Connect, mut ends: Ends) -> io::Result<()> {
    let mut link = dial(&mut connect, &ends, "it was never made").await?;
    loop {
        let why = match exchange(link, &mut ends).await {
            Err(error) if error.kind() != io::ErrorKind::InvalidData => error.to_string(),
            ended => return ended,
        };
        tracing::warn!(why, "the packet link was lost; another is being made");
        // An engine that is gone needs no link.
        let _ = ends.told.send(Told::Down(why.clone())).await;
        // If the peer is gone, the other links say so before this one knocks.
        sleep(ends.times.retry).await;
        link = dial(&mut connect, &ends, &why).await?;
        let _ = ends.told.send(Told::Up).await;
    }
}

/// The same at the secondary, over `link` and then over whichever comes after it.
pub(super) async fn serve(mut link: Link, mut later: mpsc::Receiver<Link>, mut ends: Ends) -> io::Result<()> {
    loop {
        // With the branch that is not taken goes the old connection, and what it had read.
        let ended = tokio::select! {
            ended = exchange(link, &mut ends) => ended,
            Some(next) = later.recv() => {
                link = next;
                continue;
            }
        };
        let why = match ended {
            Err(error) if error.kind() != io::ErrorKind::InvalidData => error.to_string(),
            ended => return ended,
        };
        tracing::warn!(why, "the packet link was lost");
        let _ = ends.told.send(Told::Down(why.clone())).await;
        match timeout(ends.times.patience, later.recv()).await {
            Ok(Some(next)) => link = next,
            Ok(None) | Err(_) => return Err(without(ends.times, &why)),
        }
        let _ = ends.told.send(Told::Up).await;
    }
}

fn without(times: Times, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no connection for {:?}: {why}", times.patience))
}

async fn dial(connect: &mut Connect, ends: &Ends, lost: &str) -> io::Result<Link> {
    let times = ends.times;
    let (deadline, mut why) = (Instant::now() + times.patience, lost.to_owned());
    loop {
        if !(ends.lease)() {
            // The engine ends the links, and this task with them.
            std::future::pending::<()>().await;
        }
        match timeout_at(deadline, connect()).await {
            Ok(Ok(link)) => return Ok(link),
            Ok(Err(error)) => why = error.to_string(),
            Err(_) => return Err(without(times, &why)),
        }
        if timeout_at(deadline, sleep(times.retry)).await.is_err() {
            return Err(without(times, &why));
        }
    }
}

/// Moves packets both ways over one connection. `Ok`: the engine is gone.
async fn exchange(link: Link, ends: &mut Ends) -> io::Result<()> {
    let (read, write) = tokio::io::split(link.here()?);
    let write = Arc::new(Mutex::new(write));
    // Ends with this.
    let mut pulsing = JoinSet::new();
    pulsing.spawn_on(pulse(write.clone(), ends.times.pulse), &ends.elsewhere);
    let mut writing_bytes = 0;
    let ended = tokio::select! {
        ended = receive(read, &ends.to, ends.times.silence) => ended,
        ended = send(&write, &mut ends.outgoing, &mut writing_bytes) => ended,
    };
    // What was being written is lost, and waits no more.
    ends.outgoing.written(writing_bytes);
    ended
}

async fn receive(mut read: ReadHalf<Link>, to: &mpsc::Sender<Tagged>, silence: Duration) -> io::Result<()> {
    let (mut decoder, mut input) = (wire::TaggedDecoder::default(), BytesMut::new());
    loop {
        input.reserve(FRAME_BYTES_MAX);
        match timeout(silence, read.read_buf(&mut input)).await {
            Ok(Ok(0)) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the peer")),
            Ok(read) => _ = read?,
            Err(_) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing came for {silence:?}")));
            }
        }
        while let Some((epoch, frame)) = decoder.decode(&mut input).map_err(invalid)? {
            if !frame.is_empty() && to.send((epoch, frame)).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Nothing else is written while one of the two who write is in the middle of a frame.
type Writing = Mutex<WriteHalf<Link>>;

async fn send(write: &Writing, outgoing: &mut Outgoing<Tagged>, writing_bytes: &mut usize) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    while let Some(first) = outgoing.recv().await {
        let mut next = Some(first);
        // What waits leaves in one write, as long as that stays small.
        while let Some((bytes, (epoch, frame))) = next.take() {
            *writing_bytes += bytes;
            wire::encode_tagged(epoch, &frame, &mut buffer).map_err(invalid)?;
            next = if buffer.len() < FRAME_BYTES_MAX { outgoing.try_recv() } else { None };
        }
        write.lock().await.write_all(&buffer).await?;
        buffer.clear();
        outgoing.written(std::mem::take(writing_bytes));
    }
    Ok(())
}

/// Says every now and then that the connection carries something. When it does not, the others find out.
async fn pulse(write: Arc<Writing>, every: Duration) {
    let mut nothing = BytesMut::new();
    let Ok(()) = wire::encode_tagged(0, &[], &mut nothing) else { return };
    loop {
        sleep(every).await;
        if write.lock().await.write_all(&nothing).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::outbox;
    use super::*;
    use crate::daemon::nbd::remote::{self, Dialling};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::DuplexStream;

    /// A side's ends, and what its engine holds of them.
    struct Engine {
        out: super::super::Outbox<Tagged>,
        packets: mpsc::Receiver<Tagged>,
        told: mpsc::Receiver<Told>,
    }

    /// Short, where a test waits for the end of it.
    const TIMES: Times = Times {
        silence: Duration::from_millis(300),
        patience: Duration::from_millis(400),
        pulse: Duration::from_millis(50),
        ..Times::PRIMARY
    };

    fn side(times: Times) -> (Ends, Engine) {
        let (out, outgoing) = outbox();
        let (to, packets) = mpsc::channel(8);
        let (tell, told) = mpsc::channel(8);
        let ends = Ends { outgoing, to, told: tell, times, lease: Box::new(|| true), elsewhere: Handle::current() };
        (ends, Engine { out, packets, told })
    }

    fn frame(n: u8) -> Tagged {
        (u64::from(n), Bytes::from(vec![n; 60]))
    }

    /// The primary's end, with connections that the test hands out.
    fn primary(times: Times, links: mpsc::Receiver<Link>) -> (Engine, tokio::task::JoinHandle<io::Result<()>>) {
        let links = Arc::new(Mutex::new(links));
        let connect: Connect = Box::new(move || -> Dialling {
            let links = links.clone();
            Box::pin(async move { links.lock().await.recv().await.ok_or(io::ErrorKind::ConnectionRefused.into()) })
        });
        let (ends, engine) = side(times);
        (engine, tokio::spawn(carry(connect, ends)))
    }

    fn connection() -> (Link, DuplexStream) {
        let (near, far) = tokio::io::duplex(1 << 16);
        (Box::new(near), far)
    }

    #[tokio::test]
    async fn the_link_outlives_its_connections_and_says_so() {
        let (hand_out, links) = mpsc::channel(1);
        let (mut a, _carrying) = primary(Times::PRIMARY, links);
        let (place, later) = mpsc::channel(1);
        let (ends, mut b) = side(Times::SECONDARY);
        let (near, far) = connection();
        hand_out.send(near).await.unwrap();
        let _serving = tokio::spawn(serve(Box::new(far), later, ends));
        for n in 1..4 {
            a.out.send(60, frame(n));
            b.out.send(60, frame(n + 100));
            assert_eq!((b.packets.recv().await, a.packets.recv().await), (Some(frame(n)), Some(frame(n + 100))));
            // What takes the place of a connection ends it: the primary's side is told.
            let (near, far) = connection();
            place.send(Box::new(far)).await.unwrap();
            assert!(matches!(a.told.recv().await, Some(Told::Down(why)) if why == "closed by the peer"));
            a.out.send(60, frame(n + 50));
            hand_out.send(near).await.unwrap();
            assert_eq!(a.told.recv().await, Some(Told::Up));
            assert_eq!(b.packets.recv().await, Some(frame(n + 50)), "it waited for the next connection");
        }
        assert!(b.told.try_recv().is_err(), "what takes the place of a connection is no loss");
        while a.out.waiting_bytes() + b.out.waiting_bytes() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_silent_connection_is_a_lost_one_and_without_another_the_link_ends() {
        let (hand_out, links) = mpsc::channel(1);
        let (mut a, carrying) = primary(TIMES, links);
        let (near, _far) = connection();
        hand_out.send(near).await.unwrap();
        assert_eq!(a.told.recv().await, Some(Told::Down("nothing came for 300ms".into())));
        let told = carrying.await.unwrap().unwrap_err();
        assert_eq!(told.to_string(), "no connection for 400ms: nothing came for 300ms");

        let (near, far) = connection();
        let (_place, later) = mpsc::channel(1);
        let (ends, mut b) = side(TIMES);
        let serving = tokio::spawn(serve(near, later, ends));
        drop(far);
        assert_eq!(b.told.recv().await, Some(Told::Down("closed by the peer".into())));
        assert_eq!(serving.await.unwrap().unwrap_err().to_string(), "no connection for 400ms: closed by the peer");
    }

    #[tokio::test]
    async fn pulses_alone_keep_a_connection() {
        let (hand_out, links) = mpsc::channel(1);
        let silence = Duration::from_secs(60);
        let (mut a, _carrying) = primary(Times { silence, ..TIMES }, links);
        let (near, mut far) = connection();
        hand_out.send(near).await.unwrap();
        let pulse = [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut heard = [0; 36];
        far.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, *[pulse; 3].as_flattened());
        far.write_all(&[pulse; 3].concat()).await.unwrap();
        let mut framed = BytesMut::new();
        wire::encode_tagged(7, &frame(7).1, &mut framed).unwrap();
        far.write_all(&framed).await.unwrap();
        assert_eq!(a.packets.recv().await, Some(frame(7)), "pulses are no frames");
        assert!(a.told.try_recv().is_err());
    }

    #[test]
    fn an_engine_that_is_busy_is_still_said_to_be_there() {
        use std::io::Read;
        use std::os::unix::net::UnixStream;
        let elsewhere = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (carrying, engine) = {
            let _entered = elsewhere.enter();
            let near: Link = Box::new(tokio::net::UnixStream::from_std(near).unwrap());
            let (ends, engine) = side(Times { silence: Duration::from_secs(60), ..TIMES });
            (carry(remote::begun(near, Box::new(|| Box::pin(std::future::pending()))), ends), engine)
        };
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (busy, is_busy) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut engine = engine;
            runtime.block_on(async {
                tokio::spawn(carrying);
                engine.out.send(60, frame(1));
                while engine.out.waiting_bytes() > 0 {
                    tokio::task::yield_now().await;
                }
                let _ = busy.send(());
                // A domain is loaded.
                let _ = released.recv();
                engine.packets.recv().await
            })
        });
        is_busy.recv().unwrap();
        let (mut pulses, mut frames) = (0, 0);
        while pulses < 5 || frames < 1 {
            let mut heard = [0; 12];
            far.read_exact(&mut heard).expect("a pulse, while the engine does something else");
            let frame_bytes = usize::from(heard[3]) - 8;
            far.read_exact(&mut vec![0; frame_bytes]).unwrap();
            (pulses, frames) = (pulses + u32::from(frame_bytes == 0), frames + u32::from(frame_bytes == 60));
        }
        release.send(()).unwrap();
        let mut framed = BytesMut::new();
        wire::encode_tagged(2, &frame(2).1, &mut framed).unwrap();
        std::io::Write::write_all(&mut far, &framed).unwrap();
        assert_eq!(thread.join().unwrap(), Some(frame(2)), "and it goes on where it was");
    }

    #[tokio::test]
    async fn who_may_have_been_replaced_makes_no_connection() {
        let (near, far) = connection();
        let (asked, mut asks) = mpsc::unbounded_channel();
        let dialled = Arc::new(AtomicUsize::new(0));
        let dials = dialled.clone();
        let next = move || -> Dialling {
            dials.fetch_add(1, Ordering::SeqCst);
            Box::pin(std::future::pending())
        };
        let (mut ends, mut a) = side(TIMES);
        let calls = AtomicUsize::new(0);
        ends.lease = Box::new(move || {
            asked.send(()).unwrap();
            calls.fetch_add(1, Ordering::SeqCst) == 0
        });
        let carrying = tokio::spawn(carry(remote::begun(near, Box::new(next)), ends));
        drop(far);
        assert!(matches!(a.told.recv().await, Some(Told::Down(_))));
        asks.recv().await;
        asks.recv().await;
        tokio::task::yield_now().await;
        assert_eq!((dialled.load(Ordering::SeqCst), carrying.is_finished()), (0, false));
    }

    #[tokio::test]
    async fn what_a_lost_connection_took_with_it_no_longer_waits() {
        let (hand_out, links) = mpsc::channel(1);
        let (mut a, _carrying) = primary(Times::PRIMARY, links);
        let (near, far) = tokio::io::duplex(100);
        hand_out.send(Box::new(near)).await.unwrap();
        (0..10).for_each(|n| a.out.send(60, frame(n)));
        let mut far = far;
        far.read_exact(&mut [0; 10]).await.unwrap();
        drop(far);
        assert!(matches!(a.told.recv().await, Some(Told::Down(_))));
        assert_eq!(a.out.waiting_bytes(), 0, "all ten were being written");
    }

    #[tokio::test]
    async fn who_speaks_no_frames_ends_the_link() {
        let (near, mut far) = connection();
        let (ends, _engine) = side(TIMES);
        let linked = tokio::spawn(carry(remote::begun(near, Box::new(|| Box::pin(std::future::pending()))), ends));
        far.write_all(&[0xff; 12]).await.unwrap();
        assert_eq!(linked.await.unwrap().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
