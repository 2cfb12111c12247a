//! The helper's end of the two pipes to libxl.
//!
//! The trap: libxl answers in the order it is asked, and its answer to one question may be minutes away (a guest that
//! does not suspend). There is one question at a time, and the thread that asks owns both pipes.

use super::Failure;
use crate::image::helper::{Level, Message};
use bytes::BytesMut;
use std::io::{Read, Write};

/// Who speaks, in libxl's log.
const CONTEXT: &str = "xl-colo";

/// The two pipes.
pub struct Calls<R, W> {
    replies: R,
    messages: W,
    cbflags: u32,
    /// The twentieth of the work that was last reported.
    shown: u64,
}

impl<R: Read, W: Write> Calls<R, W> {
    /// Over these pipes, to a libxl that expects the messages of `cbflags`.
    pub fn new(replies: R, messages: W, cbflags: u32) -> Self {
        Self { replies, messages, cbflags, shown: 0 }
    }

    /// Says something that is not answered.
    pub fn tell(&mut self, message: &Message) -> Result<(), Failure> {
        let mut out = BytesMut::new();
        message.encode(&mut out);
        self.messages.write_all(&out).and_then(|()| self.messages.flush()).map_err(Failure::Libxl)
    }

    /// A line for libxl's log. A libxl that does not take it is noticed by the next question.
    pub fn log(&mut self, level: Level, errno: i32, text: &str) {
        // libxl appends what errno means, "Success" for 0.
        let errno = if errno > 0 { errno.cast_unsigned() } else { u32::MAX };
        let _ = self.tell(&Message::Log { level: level as u32, errno, context: CONTEXT.into(), text: text.into() });
    }

    /// How far the memory is, twenty times in all.
    pub fn progress(&mut self, what: &str, done: u64, total: u64) {
        let twentieth = done.saturating_mul(20).checked_div(total).unwrap_or(20);
        if twentieth == self.shown {
            return;
        }
        self.shown = twentieth;
        let _ = self.tell(&Message::Progress { context: CONTEXT.into(), what: what.into(), done, total });
    }

    /// Whether libxl listens to this message.
    #[must_use]
    pub fn expects(&self, message: &Message) -> bool {
        message.is_expected(self.cbflags)
    }

    /// Asks, and waits for the answer. `what` is the question in words.
    pub fn ask(&mut self, message: &Message, what: &'static str) -> Result<i32, Failure> {
        if !self.expects(message) {
            return Err(Failure::NotExpected(what));
        }
        self.tell(message)?;
        let mut reply = [0; 4];
        self.replies.read_exact(&mut reply).map_err(Failure::Libxl)?;
        Ok(i32::from_ne_bytes(reply))
    }
}
