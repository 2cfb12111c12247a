//! The guest's NIC as a port of a switch: `--net`.

use crate::daemon::address::Address;
use crate::daemon::engine::NetworkFrame;
use crate::daemon::engine_clock;
use crate::daemon::frames::{FrameReader, FrameWriter};
use crate::daemon::links::Outgoing;
use bytes::Bytes;
use std::time::Duration;
use tokio::sync::mpsc;

/// Time between two attempts to reach the switch.
const RETRY: Duration = Duration::from_millis(50);
/// Frames are written together up to here: a fence looks at them before, and not while the switch takes them.
const WRITE_BYTES: usize = 64 << 10;

/// Keeps a connection to the switch, as a cable that is plugged in again when it falls out.
pub(super) async fn switch_port(net: Address, frames_in: mpsc::Sender<Bytes>, mut frames_out: Outgoing<NetworkFrame>) {
    loop {
        if let Ok(link) = net.connect().await {
            let (read, write) = tokio::io::split(link);
            let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
            let incoming = async {
                while let Ok(Some(frame)) = reader.read().await {
                    if frames_in.send(frame).await.is_err() {
                        return;
                    }
                }
            };
            let outgoing = async {
                while let Some(first) = frames_out.recv().await {
                    let (mut next, mut taken_bytes) = (Some(first), 0);
                    while let Some((bytes, NetworkFrame { until, frame })) = next.take() {
                        taken_bytes += bytes;
                        let in_time = until.is_none_or(|until| engine_clock() < until);
                        if in_time && writer.put(&frame).is_err() {
                            return;
                        }
                        next = if writer.waiting_bytes() < WRITE_BYTES { frames_out.try_recv() } else { None };
                    }
                    let written = writer.flush().await;
                    frames_out.written(taken_bytes);
                    if written.is_err() {
                        return;
                    }
                }
            };
            tokio::select! { () = incoming => {}, () = outgoing => {} }
        }
        tokio::time::sleep(RETRY).await;
    }
}
