//! The notify protocol at a port: what a toolstack says is taken, and what it is told waits until it reads.

use super::work::Port;
use crate::compare::notify::{Decoder, Instruction, encode};
use bytes::BytesMut;
use rustix::io::Errno;
use std::io::{self, IoSlice};

/// Words for a toolstack that does not read them.
const WAITING_MAX_BYTES: usize = 4096;

/// The words to and from one peer.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Words {
    decoder: Decoder,
    input: BytesMut,
    output: Vec<u8>,
}

impl Words {
    /// Reads once; whether something happened.
    pub(in crate::daemon) fn read(&mut self, port: &mut Port) -> bool {
        let Some(peer) = &port.peer else { return false };
        let mut buffer = [0; 512];
        match rustix::io::read(peer, &mut buffer) {
            Err(Errno::AGAIN | Errno::INTR) => return false,
            Ok(0) => port.hang_up(&"the peer left"),
            Err(error) => port.hang_up(&error),
            Ok(bytes) => self.input.extend_from_slice(&buffer[..bytes]),
        }
        true
    }

    /// The next instruction that was read.
    pub(in crate::daemon) fn next(&mut self, port: &mut Port) -> Option<Instruction> {
        loop {
            match self.decoder.instruction(&mut self.input) {
                Ok(Some(Instruction::Unsupported)) => tracing::warn!("COLO compare got unsupported instruction"),
                Ok(instruction) => return instruction,
                Err(error) => {
                    port.hang_up(&error);
                    return None;
                }
            }
        }
    }

    /// Adds a word to what waits.
    pub(in crate::daemon) fn say(&mut self, port: &mut Port, word: &[u8]) {
        if self.output.len() > WAITING_MAX_BYTES {
            return port.hang_up(&"the peer does not read what it asked for");
        }
        self.output.extend(encode(word));
    }

    pub(in crate::daemon) fn is_empty(&self) -> bool {
        self.output.is_empty()
    }

    /// Writes what the peer takes.
    pub(in crate::daemon) fn write(&mut self, port: &mut Port) {
        let Some(peer) = &mut port.peer else { return };
        while !self.output.is_empty() {
            match peer.write_vectored(&[IoSlice::new(&self.output)]) {
                Ok(bytes) => drop(self.output.drain(..bytes)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return port.hang_up(&error),
            }
        }
    }
}
