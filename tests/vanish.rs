//! A peer that leaves, lies or falls silent at each step of the protocol.
//!
//! | who is real | the peer leaves | what comes of it |
//! |---|---|---|
//! | secondary | before its first state is whole | nothing to go on from: says why, and is free for the next |
//! | secondary | between two checkpoints, or within one before it is owned | goes on from the last state |
//! | secondary | with one owned, whoever heard of it | goes on from that one |
//! | primary | before the first state is owned | runs on, unprotected, and can be protected again |
//! | primary | at any later message | goes on alone, and can be protected again |

use crate::common::host::{Host, host_command, protect};
use crate::common::peer::{
    Accepted, ScriptedPrimary, ScriptedSecondary, first_state, hello_of, introduce, is_hung_up, soon,
};
use crate::common::{turn, until};
use bytes::BytesMut;
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xen_colo::colo::arbiter::Claim;
use xen_colo::colo::heartbeat::{BEAT_BYTES, Beat};
use xen_colo::colo::hello::{Channel, Mode};
use xen_colo::colo::message::Message;
use xen_colo::daemon::arbiter::Arbiter;
use xen_colo::daemon::control::Request;
use xen_colo::daemon::status::{Protection, Status};

const DISK_MIB: &str = "4";

/// A host that stands by, with an arbiter that knows host a as the guest's holder.
async fn secondary(dir: &Path) -> Host {
    let register = dir.join("register.json");
    let claim = Claim { guest: "web".into(), expected: 0, holder: "a".into() };
    Arbiter::File(register.clone()).claim(claim).await.unwrap();
    let mut command = host_command("b", dir);
    command.args(["--arbiter", &format!("file:{}", register.display())]);
    Host::start("b", dir, command)
}

/// Joins again as soon as the host is free, and gets to the end of the first copy.
async fn can_be_used_again(b: &Host) {
    until("the secondary is free", async || {
        let mut link = b.address.connect().await.unwrap();
        introduce(&mut link, &hello_of("a", Channel::Colo, 1000)).await.refused.map_or(Ok(()), Err)
    })
    .await;
    ScriptedPrimary::joins(&b.address, 1001).await.copies().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_leaves_before_its_links_are_up_leaves_nothing_behind() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = secondary(dir.path()).await;
    let channels = [Channel::Colo, Channel::Packets, Channel::Heartbeat];
    for left_after in 1..=channels.len() {
        let mut links = Vec::new();
        for channel in &channels[..left_after] {
            let mut link = b.address.connect().await.unwrap();
            let welcome = introduce(&mut link, &hello_of("a", *channel, left_after as u64)).await;
            assert_eq!(welcome.refused, None);
            links.push(link);
        }
        drop(links);
        assert_eq!(b.status().await.protection, Protection::Empty);
    }
    // The disk link before the others is no session.
    for channel in [Channel::Colo, Channel::Nbd] {
        let mut link = b.address.connect().await.unwrap();
        introduce(&mut link, &hello_of("a", channel, 9)).await;
    }
    assert_eq!(b.status().await.protection, Protection::Empty);
    can_be_used_again(&b).await;
}

/// What a primary does before it leaves, while the first copy is under way.
type Leave = (&'static str, AsyncStep, &'static str);
type AsyncStep = fn(ScriptedPrimary) -> std::pin::Pin<Box<dyn Future<Output = ScriptedPrimary> + Send>>;

macro_rules! step {
    (|$peer:ident| $body:expr) => {
        |mut $peer| {
            Box::pin(async move {
                $body;
                $peer
            })
        }
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_leaves_during_the_first_copy_frees_the_secondary() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = secondary(dir.path()).await;
    let steps: [Leave; 11] = [
        ("at once", step!(|peer| _ = &mut peer), "ended"),
        ("within a record", step!(|peer| peer.sends(&first_state().0[..5000]).await), "ended"),
        ("before the devices", step!(|peer| peer.sends(&first_state().0).await), "ended"),
        (
            "within the devices",
            step!(|peer| {
                let (pages, devices) = first_state();
                peer.sends(&pages).await;
                peer.sends(&devices[..devices.len() - 1]).await;
            }),
            "ended",
        ),
        ("with text on the stream", step!(|peer| peer.sends(b"GET / HTTP/1.1\r\n\r\n").await), "broke the protocol"),
        ("with a record of 4 GiB", step!(|peer| peer.sends(&[1, 0, 0, 0, 255, 255, 255, 255]).await), "longer"),
        ("with a page outside the guest", step!(|peer| peer.sends(&page_record(1 << 40)).await), "pfn 0x10000000000"),
        (
            "with device state that is none",
            step!(|peer| peer
                .sends(&[&[0x0e, 0, 0, 0, 0, 0, 0, 0][..], &[0, 0, 0, 4], &8_u64.to_be_bytes(), &[7; 8]].concat())
                .await),
            "",
        ),
        (
            "with noise on the packet link",
            step!(|peer| peer.packets.write_all(&[0xff; 64]).await.unwrap()),
            "packet link",
        ),
        ("with noise on the disk link", step!(|peer| peer.nbd.write_all(&[0xff; 64]).await.unwrap()), "disk link"),
        ("with the heartbeat closed", step!(|peer| peer.heartbeat.shutdown().await.unwrap()), "heartbeat"),
    ];
    let mut lost_before = None;
    for (number, (what, leave, reason)) in steps.into_iter().enumerate() {
        eprintln!("the primary leaves {what}");
        let peer = ScriptedPrimary::joins(&b.address, number as u64).await;
        let peer = leave(peer).await;
        // Who sent what cannot be waits to be hung up on; the others leave by themselves.
        let _alive = if reason == "ended" {
            drop(peer);
            None
        } else {
            Some(peer)
        };
        let ended = |status: &Status| {
            let over = matches!(status.protection, Protection::Stopped | Protection::Failed);
            over && status.lost_at_unix_us.is_some() && status.lost_at_unix_us != lost_before
        };
        let status = b.is("free again", ended).await;
        lost_before = status.lost_at_unix_us;
        let why = status.why.unwrap_or_default();
        assert!(!why.is_empty() && why.contains(reason), "{what}: {why:?}");
    }
    can_be_used_again(&b).await;
}

/// A record that holds one page, of this number.
fn page_record(pfn: u64) -> Vec<u8> {
    let head: [u8; 16] = [1, 0, 0, 0, 16, 16, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    [&head[..], &pfn.to_le_bytes(), &[1; 4096]].concat()
}

/// One page and the devices: what a checkpoint is made of.
fn checkpoint() -> (Vec<u8>, BytesMut) {
    (page_record(200), first_state().1)
}

/// The steps of a checkpoint, one after another.
const CHECKPOINT: [&str; 8] = [
    "between two checkpoints",
    "after CHECKPOINT_REQUEST",
    "after CHECKPOINT_REPLY",
    "after VMSTATE_SEND",
    "within the pages",
    "within the devices",
    "after the last byte",
    "after VMSTATE_RECEIVED",
];

/// Goes through a checkpoint up to a step.
async fn goes_to(peer: &mut ScriptedPrimary, step: usize) {
    let (page, devices) = checkpoint();
    if step >= 1 {
        peer.says(Message::CheckpointRequest).await;
    }
    if step >= 2 {
        peer.hears(Message::CheckpointReply).await;
    }
    if step >= 3 {
        peer.says(Message::VmstateSend).await;
    }
    if step >= 4 {
        let sent = if step == 4 { &page[..page.len() / 2] } else { &page[..] };
        peer.sends(sent).await;
    }
    if step >= 5 {
        let sent = if step == 5 { &devices[..devices.len() / 2] } else { &devices[..] };
        peer.sends(sent).await;
    }
    if step >= 7 {
        peer.hears(Message::VmstateReceived).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_goes_on_from_the_last_whole_state_whenever_its_primary_leaves() {
    let _turn = turn().await;
    for (step, what) in CHECKPOINT.into_iter().enumerate() {
        eprintln!("the primary leaves {what}");
        let dir = tempfile::tempdir().unwrap();
        let b = secondary(dir.path()).await;
        let mut peer = ScriptedPrimary::joins(&b.address, 1).await;
        peer.copies().await;
        goes_to(&mut peer, step).await;
        drop(peer);
        let status = b.becomes(Protection::TakenOver).await;
        assert_eq!(status.generation, 2, "{what}: {status:#?}");
        match step {
            0..6 => assert_eq!(status.epoch, 1, "{what}: {status:#?}"),
            // It may see that another link ended before it has read that byte.
            6 => assert!((1..=2).contains(&status.epoch), "{what}: {status:#?}"),
            _ => assert_eq!(status.epoch, 2, "{what}: {status:#?}"),
        }
        assert!(status.why.unwrap_or_default().contains("the connection to the peer ended"), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_goes_on_when_its_primary_breaks_the_protocol() {
    let _turn = turn().await;
    let steps: [Leave; 7] = [
        ("a number that is no message", step!(|peer| peer.sends(&[0, 0, 0, 9]).await), "0x9 is no COLO message"),
        ("a message out of turn", step!(|peer| peer.says(Message::VmstateLoaded).await), "unexpected"),
        ("a checkpoint nobody asked for", step!(|peer| peer.says(Message::VmstateSend).await), "unexpected"),
        ("text on the stream", step!(|peer| peer.sends(b"GET / HTTP/1.1\r\n\r\n").await), "no COLO message"),
        (
            "device state of 16 EiB",
            step!(|peer| {
                goes_to(&mut peer, 3).await;
                peer.sends(&[&[0x0e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4][..], &[0xff; 8]].concat()).await;
            }),
            "device state of 18446744073709551615 bytes is refused",
        ),
        ("noise on the packet link", step!(|peer| peer.packets.write_all(&[0xff; 64]).await.unwrap()), "packet link"),
        ("noise on the disk link", step!(|peer| peer.nbd.write_all(&[0xff; 64]).await.unwrap()), "disk link"),
    ];
    for (what, breaks, reason) in steps {
        eprintln!("the primary sends {what}");
        let dir = tempfile::tempdir().unwrap();
        let b = secondary(dir.path()).await;
        let mut peer = ScriptedPrimary::joins(&b.address, 1).await;
        peer.copies().await;
        let mut peer = breaks(peer).await;
        let status = b.becomes(Protection::TakenOver).await;
        assert_eq!((status.generation, status.epoch), (2, 1), "{what}: {status:#?}");
        let why = status.why.unwrap_or_default();
        assert!(why.contains(reason), "{what}: {why}");
        is_hung_up(&mut peer.stream).await;
    }
}

/// A checkpoint that is whole and cannot be loaded: there is nothing left to go on from, and it says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_without_its_devices_is_never_owned() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let b = secondary(dir.path()).await;
    let mut peer = ScriptedPrimary::joins(&b.address, 1).await;
    peer.copies().await;
    goes_to(&mut peer, 3).await;
    peer.sends(&[&[0x0e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4][..], &8_u64.to_be_bytes(), &[7; 8]].concat()).await;
    let status = b.becomes(Protection::Failed).await;
    assert!(status.why.unwrap_or_default().contains("device state"), "the reason");
    is_hung_up(&mut peer.stream).await;
    can_be_used_again(&b).await;
}

fn primary(dir: &Path) -> Host {
    let mut command = host_command("a", dir);
    command.args(["--arbiter", &format!("file:{}", dir.join("register.json").display())]);
    command.args(["--guest", "web", "--guest-mib", "4", "--disk-mib", DISK_MIB]);
    Host::start("a", dir, command)
}

fn disk_bytes() -> usize {
    DISK_MIB.parse::<usize>().unwrap() << 20
}

/// Orders protection with a heartbeat too slow to be missed; the answer comes when the links are up.
async fn protects(a: &Host, peer: &ScriptedSecondary) -> Accepted {
    let mut request = protect(&peer.address(), Mode::Colo);
    request.heartbeat_interval_ms = Some(10_000);
    let (accepted, ()) = tokio::join!(peer.welcomes_all(), a.order(Request::Protect(request)));
    accepted
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_whose_peer_leaves_before_its_links_are_up_stays_as_it_was() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let a = primary(dir.path());
    let peer = ScriptedSecondary::listens().await;
    let channels = [Channel::Colo, Channel::Packets, Channel::Heartbeat];
    for welcomed in 0..=channels.len() {
        let leaves = async {
            let mut links = Vec::new();
            for channel in &channels[..welcomed] {
                links.push(peer.welcomes(*channel).await);
            }
            drop(peer.accepts().await);
        };
        let (why, ()) = tokio::join!(a.refusal(Request::Protect(protect(&peer.address(), Mode::Colo))), leaves);
        assert!(why.contains("peer"), "left after {welcomed} links: {why}");
        assert_eq!(a.status().await.protection, Protection::Unprotected);
    }
    let mut accepted = protects(&a, &peer).await;
    accepted.serves_disk(disk_bytes());
    accepted.is_copied().await;
    a.becomes(Protection::Protected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_whose_peer_leaves_during_the_first_copy_runs_on_unprotected() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let a = primary(dir.path());
    let peer = ScriptedSecondary::listens().await;
    for what in ["at once", "noise on disk link", "noise on stream", "noise on packet link", "after the last byte"] {
        eprintln!("the secondary leaves {what}");
        let mut accepted = protects(&a, &peer).await;
        let _alive = match what {
            "at once" => {
                drop(accepted);
                None
            }
            "noise on disk link" => {
                accepted.nbd.write_all(&[0xff; 64]).await.unwrap();
                Some(accepted)
            }
            "noise on stream" => {
                accepted.stream.write_all(&[0xff; 64]).await.unwrap();
                Some(accepted)
            }
            "noise on packet link" => {
                accepted.packets.write_all(&[0xff; 64]).await.unwrap();
                Some(accepted)
            }
            _ => {
                accepted.serves_disk(disk_bytes());
                accepted.state().await;
                drop(accepted);
                None
            }
        };
        let over = |status: &Status| matches!(status.protection, Protection::Unprotected | Protection::TakenOver);
        let status = a.is("alone again", over).await;
        let channel = what.strip_prefix("noise on ").unwrap_or("ended");
        assert!(status.why.clone().unwrap_or_default().contains(channel), "{what}: {status:#?}");
    }
    let mut accepted = protects(&a, &peer).await;
    accepted.serves_disk(disk_bytes());
    accepted.is_copied().await;
    a.becomes(Protection::Protected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_goes_on_alone_whenever_its_secondary_leaves() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let a = primary(dir.path());
    let peer = ScriptedSecondary::listens().await;
    let steps = [
        "between two checkpoints",
        "after CHECKPOINT_REQUEST",
        "after CHECKPOINT_REPLY",
        "after VMSTATE_SEND",
        "after the last byte",
        "after VMSTATE_RECEIVED",
        "after VMSTATE_LOADED",
    ];
    let mut generation = 0;
    for (step, what) in steps.into_iter().enumerate() {
        eprintln!("the secondary leaves {what}");
        let mut accepted = protects(&a, &peer).await;
        accepted.serves_disk(disk_bytes());
        accepted.is_copied().await;
        a.becomes(Protection::Protected).await;
        if step >= 1 {
            a.order(Request::Checkpoint).await;
            accepted.hears(Message::CheckpointRequest).await;
        }
        if step >= 2 {
            accepted.says(Message::CheckpointReply).await;
        }
        if step >= 3 {
            accepted.hears(Message::VmstateSend).await;
        }
        if step >= 4 {
            accepted.state().await;
        }
        if step >= 5 {
            accepted.says(Message::VmstateReceived).await;
        }
        if step >= 6 {
            accepted.says(Message::VmstateLoaded).await;
        }
        drop(accepted);
        let status = a.becomes(Protection::TakenOver).await;
        // One generation to be protected in, one to go on alone in.
        generation += 2;
        assert_eq!(status.generation, generation, "{what}: {status:#?}");
        assert!(status.why.clone().unwrap_or_default().contains("ended"), "{what}: {status:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_goes_on_alone_when_its_secondary_breaks_the_protocol() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let a = primary(dir.path());
    let peer = ScriptedSecondary::listens().await;
    for (what, reason) in [
        ("a message out of turn", "unexpected"),
        ("a number that is no message", "is no COLO message"),
        ("noise on the packet link", "packet link"),
        ("the heartbeat closed", "heartbeat"),
        ("the disk link closed", "disk link"),
    ] {
        eprintln!("the secondary sends {what}");
        let mut accepted = protects(&a, &peer).await;
        let disk = accepted.serves_disk(disk_bytes());
        accepted.is_copied().await;
        a.becomes(Protection::Protected).await;
        match what {
            "a message out of turn" => accepted.says(Message::VmstateLoaded).await,
            "a number that is no message" => accepted.stream.write_all(&[0, 0, 1, 0]).await.unwrap(),
            "noise on the packet link" => accepted.packets.write_all(&[0xff; 64]).await.unwrap(),
            "the heartbeat closed" => accepted.heartbeat.shutdown().await.unwrap(),
            _ => disk.abort(),
        }
        let status = a.becomes(Protection::TakenOver).await;
        assert!(status.why.clone().unwrap_or_default().contains(reason), "{what}: {status:#?}");
        is_hung_up(&mut accepted.stream).await;
    }
}

/// Alive, beating, and not moving: the deadline within a checkpoint is for this one.
#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_that_beats_and_does_nothing_else_is_given_up() {
    let _turn = turn().await;
    let dir = tempfile::tempdir().unwrap();
    let a = primary(dir.path());
    let peer = ScriptedSecondary::listens().await;
    let request = protect(&peer.address(), Mode::Colo);
    let (mut accepted, ()) = tokio::join!(peer.welcomes_all(), a.order(Request::Protect(request)));
    accepted.serves_disk(disk_bytes());
    let (never, _) = tokio::io::duplex(1);
    let beating = tokio::spawn(beats(std::mem::replace(&mut accepted.heartbeat, Box::new(never))));
    accepted.is_copied().await;
    a.becomes(Protection::Protected).await;
    a.order(Request::Checkpoint).await;
    accepted.hears(Message::CheckpointRequest).await;
    let status = soon("the deadline", a.becomes(Protection::TakenOver)).await;
    let why = status.why.unwrap_or_default();
    assert!(why.contains("made no progress within a checkpoint"), "{why}");
    beating.abort();
}

/// Answers each new beat.
async fn beats(mut link: xen_colo::daemon::address::Link) {
    let mut heard = 0;
    let mut bytes = [0; BEAT_BYTES];
    while link.read_exact(&mut bytes).await.is_ok() {
        let beat = Beat::decode(&bytes);
        if beat.sequence > heard {
            heard = beat.sequence;
            let mut out = BytesMut::new();
            Beat { sequence: heard, echo: heard, ..beat }.encode(&mut out);
            if link.write_all(&out).await.is_err() {
                return;
            }
        }
    }
}
