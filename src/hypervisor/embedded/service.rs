//! The service: HTTP requests on a connection, answered out of the key-value store.
//!
//! ```text
//! receive ring ─▶ whole request? ─▶ room for its whole response? ─▶ disk ready? ─▶ answered, dropped from the ring
//!                   └ wait for bytes  └ wait for ACKs                 └ wait a millisecond
//! ```
//!
//! | request | answer |
//! |---|---|
//! | `PUT /k/NAME` | 201 new, 200 replaced, 507 full; after the record is on the disk |
//! | `GET /k/NAME` | 200 with the value as it is on the disk, 404 |
//! | `GET /` | 200: uptime in seconds, requests answered, generation, as one line of JSON |
//!
//! The trap: a request is taken off its ring only together with its answer being put on the other. A guest
//! suspended anywhere in between (the disk can be busy for as long as it likes) has the request in its pages.

use super::http::{Parsed, RESPONSE_HEAD_MAX_BYTES, Request, parse, response};
use super::kv::{KvError, Store, is_name};
use super::layout::HEAD_MAX_BYTES;
use super::machine::Context;
use super::tcb::{State, Tcb};

/// How long until a busy disk is asked again.
const DISK_RETRY_US: u64 = 1000;
/// Room for a response with a body of our own making.
const SMALL_RESPONSE_BYTES: usize = RESPONSE_HEAD_MAX_BYTES + 256;
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What the connection waits for.
enum Wait {
    /// Nothing: a request was answered.
    Done,
    /// More of the request.
    Bytes,
    /// Room in the transmit ring.
    Room,
    /// The disk.
    Disk,
}

impl Context<'_> {
    /// Answers the requests on the connection that can be answered now.
    pub(super) fn serve(&mut self, slot: usize, tcb: &mut Tcb) {
        if tcb.work_us > self.now_us {
            return;
        }
        tcb.work_us = 0;
        while self.requests_left > 0 {
            if !matches!(tcb.state, State::Established | State::CloseWait) {
                return;
            }
            match self.serve_one(slot, tcb) {
                Wait::Done => self.requests_left -= 1,
                // The client half-closed and everything it asked is answered.
                Wait::Bytes if tcb.state == State::CloseWait => return self.close(tcb),
                Wait::Bytes | Wait::Room => return,
                Wait::Disk => return tcb.work_us = self.now_us.saturating_add(DISK_RETRY_US),
            }
        }
        tcb.work_us = self.now_us.max(1);
    }

    fn serve_one(&mut self, slot: usize, tcb: &mut Tcb) -> Wait {
        if tcb.rx_len < tcb.need.max(1) {
            return Wait::Bytes;
        }
        if (tcb.tx_free(self.layout) as usize) < SMALL_RESPONSE_BYTES {
            return Wait::Room;
        }
        let head = tcb.rx_peek(self.ram, self.layout, slot, HEAD_MAX_BYTES.min(tcb.rx_len as usize));
        let request = match parse(&head) {
            Parsed::Request(request) => request,
            Parsed::Incomplete => {
                tcb.need = tcb.rx_len + 1;
                return Wait::Bytes;
            }
            Parsed::Bad(status) => return self.answer(slot, tcb, Answer::error(status).and_close()),
        };
        let head_only = request.method == "HEAD";
        let unreadable = match request.content_length {
            _ if request.chunked => Some(501),
            None if request.method == "PUT" => Some(411),
            Some(length) if length > self.layout.body_max_bytes as u64 => Some(413),
            _ => None,
        };
        if let Some(status) = unreadable {
            return self.answer(slot, tcb, Answer { head_only, ..Answer::error(status).and_close() });
        }
        // At most a head and a body of the largest kind, for which the ring was made.
        let total = (request.head_bytes as u64 + request.content_length.unwrap_or(0)) as u32;
        if tcb.rx_len < total {
            if request.expects_continue && !tcb.continued() {
                tcb.set_continued(true);
                tcb.tx_push(self.ram, self.layout, slot, CONTINUE);
            }
            tcb.need = total;
            return Wait::Bytes;
        }
        match self.route(slot, tcb, &request, total) {
            Ok(answer) => self.answer(
                slot,
                tcb,
                Answer { consumed: total, close: request.close || answer.close, head_only, ..answer },
            ),
            Err(wait) => wait,
        }
    }

    fn route(&mut self, slot: usize, tcb: &Tcb, request: &Request<'_>, total: u32) -> Result<Answer, Wait> {
        let name = request.target.strip_prefix("/k/");
        match (request.method, name, request.target) {
            ("GET" | "HEAD", None, "/") => Ok(Answer::ok(200, self.status().into_bytes())),
            ("GET" | "HEAD" | "PUT", Some(name), _) if !is_name(name) => Ok(Answer::error(400).and_close()),
            ("GET" | "HEAD", Some(name), _) => {
                let store = self.store();
                let Some(len) = store.len_of(name) else { return Ok(Answer::error(404)) };
                // A ring that could never hold it means an index that was damaged.
                if len > self.layout.body_max_bytes {
                    return Ok(Answer::error(500));
                }
                if (tcb.tx_free(self.layout) as usize) < SMALL_RESPONSE_BYTES + len {
                    return Err(Wait::Room);
                }
                let cursor = self.cursor();
                match self.store().get(&cursor, name) {
                    // Room was reserved for what the index said.
                    Ok(Some(value)) if value.len() == len => Ok(Answer::ok(200, value)),
                    Ok(None) => Ok(Answer::error(404)),
                    Err(KvError::Busy) => Err(Wait::Disk),
                    Ok(Some(_)) | Err(_) => Ok(Answer::error(500)),
                }
            }
            ("PUT", Some(name), _) => {
                let body = tcb.rx_peek(self.ram, self.layout, slot, total as usize).split_off(request.head_bytes);
                let mut cursor = self.cursor();
                let stored = self.store().put(&mut cursor, name, &body);
                self.requests_left = 1;
                self.set_cursor(cursor);
                match stored {
                    Ok(created) => Ok(Answer::ok(if created { 201 } else { 200 }, Vec::new())),
                    Err(KvError::Busy) => Err(Wait::Disk),
                    Err(KvError::Full) => Ok(Answer::error(507)),
                    Err(_) => Ok(Answer::error(500)),
                }
            }
            (_, Some(_), _) | (_, None, "/") => Ok(Answer::error(405)),
            _ => Ok(Answer::error(404)),
        }
    }

    fn answer(&mut self, slot: usize, tcb: &mut Tcb, answer: Answer) -> Wait {
        let roll = if self.diverge_percent == 0 { 100 } else { self.hardware.next() % 100 };
        let hash_seed = if roll < u64::from(self.diverge_percent) { self.hardware.next() } else { 0 };
        let bytes = response(answer.status, &answer.body, hash_seed, answer.close, answer.head_only);
        tcb.tx_push(self.ram, self.layout, slot, &bytes);
        tcb.rx_drop(self.layout, answer.consumed);
        tcb.need = 1;
        tcb.set_continued(false);
        self.registers.requests = self.registers.requests.wrapping_add(1);
        if answer.close {
            self.close(tcb);
        }
        Wait::Done
    }

    fn status(&self) -> String {
        let (uptime_seconds, requests) = (self.now_us / 1_000_000, self.registers.requests);
        let generation = self.registers.generation;
        format!("{{\"uptime_seconds\":{uptime_seconds},\"requests\":{requests},\"generation\":{generation}}}\n")
    }

    fn store(&mut self) -> Store<'_> {
        Store { ram: self.ram, layout: self.layout, disk: self.disk }
    }
}

struct Answer {
    status: u16,
    body: Vec<u8>,
    consumed: u32,
    close: bool,
    head_only: bool,
}

impl Answer {
    fn ok(status: u16, body: Vec<u8>) -> Self {
        Self { status, body, consumed: 0, close: false, head_only: false }
    }

    fn error(status: u16) -> Self {
        Self::ok(status, format!("{status}\n").into_bytes())
    }

    fn and_close(self) -> Self {
        Self { close: true, ..self }
    }
}
