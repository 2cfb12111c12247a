//! Frames towards `outdev`, kept until they are written whole.
//!
//! ```text
//!   block it came in:   [len│frame][len│frame][len│frame]     in a row: one slice of the block, words and all
//!   elsewhere, small:   copied behind one another             elsewhere, large: its length, and itself where it is
//! ```
//!
//! All are written with one call. When the peer is lost in the middle of a frame the next one gets that frame from its
//! beginning. What the system had taken from us is lost with the peer: nothing in the protocol says what arrived.

use super::port::Socket;
use crate::compare::wire::{Head, LENGTH_BYTES};
use bytes::Bytes;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;

/// With so much waiting, no input is read.
const FULL_BYTES: usize = 1 << 20;
/// Up to here a frame is copied.
const COPY_BYTES: usize = 4096;
/// From here on a message of a block is not copied. Behind one that is not, any is not.
const RUN_FROM_BYTES: usize = 512;
/// Frames are copied together up to here.
const PIECE_BYTES: usize = 128 << 10;
/// Slices in one call.
const SLICES_MAX: usize = 64;

#[derive(Debug)]
enum Piece {
    /// Whole messages, one behind the other.
    Many(Vec<u8>),
    /// One message: its length, unless the bytes have it, and its bytes.
    One(Option<[u8; 4]>, Bytes),
    /// Whole messages, one behind the other in the block they came in.
    Run(Bytes, Range<usize>),
}

impl Piece {
    fn parts(&self) -> [&[u8]; 2] {
        match self {
            Self::Many(bytes) => [&[], bytes],
            Self::One(length, bytes) => [length.as_ref().map_or(&[], |length| &length[..]), bytes],
            Self::Run(block, range) => [&[], &block[range.clone()]],
        }
    }

    fn len_bytes(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }
}

/// What waits to be written.
#[derive(Debug)]
pub(in crate::daemon) struct Outbox {
    vnet: bool,
    pieces: VecDeque<Piece>,
    /// Of the first piece.
    written_bytes: usize,
    waiting_bytes: usize,
    spare: Vec<u8>,
}

impl Outbox {
    pub(in crate::daemon) fn new(vnet: bool) -> Self {
        Self { vnet, pieces: VecDeque::new(), written_bytes: 0, waiting_bytes: 0, spare: Vec::new() }
    }

    /// Adds a frame without its length, or with `vnet` a whole message.
    pub(in crate::daemon) fn push(&mut self, bytes: Bytes) {
        let length = (!self.vnet).then(|| (bytes.len() as u32).to_be_bytes());
        self.waiting_bytes += length.map_or(0, |length| length.len()) + bytes.len();
        if bytes.len() > COPY_BYTES {
            return self.pieces.push_back(Piece::One(length, bytes));
        }
        if !matches!(self.pieces.back(), Some(Piece::Many(many)) if many.len() < PIECE_BYTES) {
            self.pieces.push_back(Piece::Many(std::mem::take(&mut self.spare)));
        }
        if let Some(Piece::Many(many)) = self.pieces.back_mut() {
            many.extend_from_slice(length.as_ref().map_or(&[], |length| &length[..]));
            many.extend_from_slice(&bytes);
        }
    }

    /// As [`Self::push`], without a copy where that pays: if the frame lies just behind what was added last, or in a block,
    /// at this place, with the length that belongs in front of it.
    pub(in crate::daemon) fn push_of<'a>(
        &mut self,
        bytes: Bytes,
        block_of: impl FnOnce(&[u8]) -> Option<(&'a Bytes, usize)>,
    ) {
        let words_bytes = if self.vnet { 0 } else { LENGTH_BYTES };
        let message_bytes = words_bytes + bytes.len();
        if let Some(Piece::Run(block, run)) = self.pieces.back_mut() {
            let behind = block.get(run.end + words_bytes..run.end + message_bytes);
            if behind.is_some_and(|behind| behind.as_ptr() == bytes.as_ptr()) {
                self.waiting_bytes += message_bytes;
                run.end += message_bytes;
                return;
            }
        }
        let block = if bytes.len() >= RUN_FROM_BYTES { block_of(&bytes) } else { None };
        match block.and_then(|(block, at)| Some((block, at.checked_sub(words_bytes)?))) {
            Some((block, begin)) => {
                self.waiting_bytes += message_bytes;
                self.pieces.push_back(Piece::Run(block.clone(), begin..begin + message_bytes));
            }
            None => self.push(bytes),
        }
    }

    pub(in crate::daemon) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub(in crate::daemon) fn is_full(&self) -> bool {
        self.waiting_bytes >= FULL_BYTES
    }

    pub(in crate::daemon) fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    /// Writes until nothing waits or the peer takes no more; whether something was written.
    pub(in crate::daemon) fn write(&mut self, socket: &mut Socket) -> io::Result<bool> {
        let mut any = false;
        while !self.pieces.is_empty() {
            let mut skip = self.written_bytes;
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let parts = self.pieces.iter().take(SLICES_MAX / 2).flat_map(Piece::parts);
            let mut used = 0;
            for part in parts {
                let skipped = skip.min(part.len());
                skip -= skipped;
                slices[used] = IoSlice::new(&part[skipped..]);
                used += 1;
            }
            match socket.write_vectored(&slices[..used]) {
                Ok(bytes) => self.advance(bytes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            any = true;
        }
        Ok(any)
    }

    fn advance(&mut self, bytes: usize) {
        self.waiting_bytes -= bytes;
        self.written_bytes += bytes;
        while let Some(first) = self.pieces.front()
            && self.written_bytes >= first.len_bytes()
        {
            self.written_bytes -= first.len_bytes();
            if let Some(Piece::Many(mut many)) = self.pieces.pop_front() {
                many.clear();
                self.spare = many;
            }
        }
    }

    /// Another peer: the message that was under way begins again.
    pub(in crate::daemon) fn begin_again(&mut self) {
        let begun = self.under_way().start;
        self.waiting_bytes += self.written_bytes - begun;
        self.written_bytes = begun;
    }

    /// Drops all that waits, but for the message that is under way.
    pub(in crate::daemon) fn clear(&mut self) {
        let end = self.under_way().end;
        self.pieces.truncate(usize::from(end > 0));
        match self.pieces.front_mut() {
            Some(Piece::Many(many)) => many.truncate(end),
            Some(Piece::Run(_, run)) => run.end = run.start + end,
            _ => {}
        }
        self.waiting_bytes = end - self.written_bytes;
        self.advance(0);
    }

    /// Another peer, or none: all that waits is dropped.
    pub(in crate::daemon) fn forget(&mut self) {
        self.begin_again();
        self.clear();
    }

    /// Where in the first piece the message begins and ends that is written in part; where the next begins, if none is.
    fn under_way(&self) -> Range<usize> {
        let first = match self.pieces.front() {
            Some(Piece::Many(many)) => many,
            Some(Piece::Run(block, run)) => &block[run.clone()],
            Some(one) if self.written_bytes > 0 => return 0..one.len_bytes(),
            _ => return 0..0,
        };
        let mut at = 0;
        // What is in a piece was found to be framed, so there is a message at every step.
        while at < self.written_bytes
            && let Ok(Some(head)) = Head::read(&first[at..], self.vnet)
        {
            let end = at + head.message_bytes();
            if end > self.written_bytes {
                return at..end;
            }
            at = end;
        }
        at..at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn frame(n: usize) -> Vec<u8> {
        vec![n as u8; [1, 60, 4096, 4097, 60_000][n % 5]]
    }

    /// What a peer reads before it goes away, cut to whole frames, and how much it was in all.
    fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while let Some((length, rest)) = bytes.split_first_chunk::<4>()
            && let Some((frame, rest)) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)
        {
            found.push(frame.to_vec());
            bytes = rest;
        }
        found
    }

    #[test]
    fn a_lost_peer_s_last_frame_is_sent_again_whole() {
        let (sent, mut outbox) = ((0..200).map(frame).collect::<Vec<_>>(), Outbox::new(false));
        for frame in &sent {
            outbox.push(Bytes::copy_from_slice(frame));
        }
        let (total_bytes, mut at, mut peers) = (outbox.waiting_bytes(), 0, 0);
        assert!(outbox.is_full());
        while !outbox.is_empty() {
            let (near, mut far) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            let mut near = Socket::Unix(near);
            outbox.begin_again();
            assert!(outbox.write(&mut near).unwrap());
            // The system has taken it: what a peer that goes away has not read is lost, so this one reads all.
            drop(near);
            let mut heard = Vec::new();
            far.read_to_end(&mut heard).unwrap();
            for frame in frames(&heard) {
                assert_eq!(frame, sent[at], "frame {at}, at peer {peers}");
                at += 1;
            }
            peers += 1;
        }
        assert_eq!(at, sent.len());
        assert!(peers > 5, "{peers} peers for {total_bytes} bytes: none was lost in the middle");
        assert_eq!(outbox.waiting_bytes(), 0);
    }

    /// Frames as an intake has them: slices of one block, behind their lengths.
    fn block(frames: &[Vec<u8>]) -> (Bytes, Vec<Bytes>) {
        let wire = frames.iter().flat_map(|frame| [&(frame.len() as u32).to_be_bytes()[..], frame].concat());
        let block = Bytes::from_iter(wire);
        let mut at = 0;
        let slice = |frame: &Vec<u8>| {
            at += 4 + frame.len();
            block.slice(at - frame.len()..at)
        };
        (block.clone(), frames.iter().map(slice).collect())
    }

    fn leave(outbox: &mut Outbox, block: &Bytes, frame: &Bytes) {
        let at = frame.as_ptr() as usize - block.as_ptr() as usize;
        outbox.push_of(frame.clone(), |_| Some((block, at)));
    }

    #[test]
    fn what_came_in_a_row_leaves_as_one_piece_and_what_did_not_as_it_was_told_to() {
        let sent: Vec<_> = (0..200).map(|n| vec![n as u8; [1448, 60, 600, 1448, 10_000][n % 5]]).collect();
        let (block, slices) = block(&sent);
        let mut outbox = Outbox::new(false);
        slices.iter().for_each(|frame| leave(&mut outbox, &block, frame));
        assert_eq!((outbox.pieces.len(), outbox.waiting_bytes()), (1, block.len()));
        assert_eq!(outbox.pieces[0].parts()[1].as_ptr(), block.as_ptr(), "not a copy");
        // Out of order, and one twice: each where it belongs.
        let mut outbox = Outbox::new(false);
        let order: Vec<_> = (0..200).map(|n| if n % 7 == 0 { (n * 13) % 200 } else { n }).collect();
        order.iter().for_each(|n| leave(&mut outbox, &block, &slices[*n]));
        outbox.push(Bytes::from_static(b"made"));
        leave(&mut outbox, &block, &slices[0]);
        let wire: Vec<u8> = outbox.pieces.iter().flat_map(Piece::parts).flatten().copied().collect();
        assert_eq!(wire.len(), outbox.waiting_bytes());
        let expected = order.iter().map(|n| sent[*n].clone()).chain([b"made".to_vec(), sent[0].clone()]);
        assert_eq!(frames(&wire), expected.collect::<Vec<_>>());
    }

    #[test]
    fn in_a_row_too_a_lost_peer_s_last_frame_is_sent_again_whole_and_what_waits_is_dropped() {
        let sent: Vec<_> = (0..2000).map(|n| vec![n as u8; 600 + n]).collect();
        let (block, slices) = block(&sent);
        for clears in [false, true] {
            let mut outbox = Outbox::new(false);
            slices.iter().for_each(|frame| leave(&mut outbox, &block, frame));
            let mut got = Vec::new();
            while !outbox.is_empty() {
                let (near, mut far) = UnixStream::pair().unwrap();
                near.set_nonblocking(true).unwrap();
                let mut near = Socket::Unix(near);
                assert!(outbox.write(&mut near).unwrap());
                let mut heard = Vec::new();
                if clears {
                    outbox.clear();
                    let reader = std::thread::spawn(move || far.read_to_end(&mut heard).map(|_| heard));
                    while !outbox.is_empty() {
                        outbox.write(&mut near).unwrap();
                    }
                    drop(near);
                    heard = reader.join().unwrap().unwrap();
                    let whole: usize = frames(&heard).iter().map(|frame| 4 + frame.len()).sum();
                    assert_eq!(heard.len(), whole, "cut to whole frames");
                } else {
                    drop(near);
                    far.read_to_end(&mut heard).unwrap();
                    outbox.begin_again();
                }
                got.extend(frames(&heard));
            }
            assert_eq!(outbox.waiting_bytes(), 0);
            assert_eq!(got, sent[..got.len()]);
            assert_eq!(got.len() < sent.len(), clears);
        }
    }

    #[test]
    fn what_is_forgotten_is_gone_also_where_a_part_of_it_was_written() {
        for count in [1, 3, 200] {
            let mut outbox = Outbox::new(false);
            (0..count).for_each(|_| outbox.push(Bytes::from(vec![7; 300_000])));
            let (near, _far) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            assert!(outbox.write(&mut Socket::Unix(near)).unwrap() && outbox.written_bytes > 0);
            outbox.forget();
            assert!(outbox.is_empty() && outbox.waiting_bytes() == 0 && outbox.written_bytes == 0);
        }
    }

    #[test]
    fn what_waits_is_dropped_and_the_message_under_way_is_not() {
        for write in [false, true] {
            for first in 0..10 {
                let mut outbox = Outbox::new(false);
                let old: Vec<_> = (first..first + 100).map(frame).collect();
                old.iter().for_each(|frame| outbox.push(Bytes::copy_from_slice(frame)));
                let (near, mut far) = UnixStream::pair().unwrap();
                near.set_nonblocking(true).unwrap();
                let mut near = Socket::Unix(near);
                assert_eq!(write && outbox.write(&mut near).unwrap(), write);
                assert!(!outbox.is_empty());
                outbox.clear();
                outbox.push(Bytes::from_static(b"new"));
                let reader = std::thread::spawn(move || {
                    let mut heard = Vec::new();
                    far.read_to_end(&mut heard).unwrap();
                    heard
                });
                while !outbox.is_empty() {
                    outbox.write(&mut near).unwrap();
                }
                assert_eq!(outbox.waiting_bytes(), 0);
                drop(near);
                let heard = reader.join().unwrap();
                let mut got = frames(&heard);
                assert_eq!(heard.len(), got.iter().map(|frame| 4 + frame.len()).sum::<usize>(), "cut to whole frames");
                assert_eq!(got.pop().unwrap(), b"new");
                assert_eq!(got, old[..got.len()]);
                assert!(got.len() < old.len() && (got.is_empty() || write), "{} of the old", got.len());
            }
        }
    }
}
