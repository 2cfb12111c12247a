//! HTTP/1.1 as far as the load needs it: one request, one reply with a `Content-Length`, over one connection.
//!
//! The reply is the peer's: its head and body are bounded, and what is not understood is an error, never a guess. A
//! guess about where a body ends would make the next reply nonsense and blame the takeover for it.
//!
//! Source: RFC 9112 2.2 (parsing), 6.3 (body length).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a connection may take to open, and a request to be answered.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

const HEAD_BYTES_MAX: usize = 16 * 1024;
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// Why a request got no usable reply.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The connection could not be opened.
    #[error("connect: {0}")]
    Connect(#[source] io::Error),
    /// The connection failed under the request.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The connection ended before the reply was whole.
    #[error("the connection ended before the reply was whole")]
    Closed,
    /// No reply came in time.
    #[error("no reply within {} s", REQUEST_TIMEOUT.as_secs())]
    Timeout,
    /// The reply is not HTTP as it is understood here.
    #[error("bad reply: {0}")]
    BadReply(&'static str),
}

/// A whole reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Bytes,
}

impl Reply {
    pub(super) fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// A client's connection; requests on it are answered one by one.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    pending: BytesMut,
    host: SocketAddr,
    close: bool,
}

impl Connection {
    pub(super) async fn open(addr: SocketAddr) -> Result<Self, HttpError> {
        let stream = timeout(REQUEST_TIMEOUT, TcpStream::connect(addr)).await.map_err(|_| HttpError::Timeout)?;
        let stream = stream.map_err(HttpError::Connect)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, pending: BytesMut::new(), host: addr, close: false })
    }

    /// Asks the server to close after the next reply.
    pub(super) fn close_after_reply(&mut self) {
        self.close = true;
    }

    /// Sends a request and reads its reply. After an error the connection cannot be used further.
    pub(super) async fn request(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> Result<Reply, HttpError> {
        timeout(REQUEST_TIMEOUT, self.exchange(method, path, body)).await.map_err(|_| HttpError::Timeout)?
    }

    async fn exchange(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> Result<Reply, HttpError> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.host).into_bytes();
        if self.close {
            request.extend_from_slice(b"Connection: close\r\n");
        }
        if let Some(body) = body {
            request.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
        }
        request.extend_from_slice(b"\r\n");
        request.extend_from_slice(body.unwrap_or_default());
        self.stream.write_all(&request).await?;
        loop {
            if let Some(reply) = take_reply(&mut self.pending)? {
                return Ok(reply);
            }
            if self.stream.read_buf(&mut self.pending).await? == 0 {
                return Err(HttpError::Closed);
            }
        }
    }
}

/// Takes a whole reply off `pending`, or `None` when more bytes are needed.
fn take_reply(pending: &mut BytesMut) -> Result<Option<Reply>, HttpError> {
    let Some(head_bytes) = pending.windows(4).position(|end| end == b"\r\n\r\n") else {
        let fits = pending.len() <= HEAD_BYTES_MAX;
        return if fits { Ok(None) } else { Err(HttpError::BadReply("its head is over 16 KiB")) };
    };
    let (status, body_bytes) = parse_head(&pending[..head_bytes])?;
    let reply_bytes = head_bytes + 4 + body_bytes;
    if pending.len() < reply_bytes {
        return Ok(None);
    }
    let mut reply = pending.split_to(reply_bytes).freeze();
    reply.advance(head_bytes + 4);
    Ok(Some(Reply { status, body: reply }))
}

/// The status, and the body's length in bytes.
fn parse_head(head: &[u8]) -> Result<(u16, usize), HttpError> {
    let head = std::str::from_utf8(head).map_err(|_| HttpError::BadReply("its head is not text"))?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).and_then(|line| line.get(..3));
    let status = status.and_then(|digits| digits.parse().ok()).ok_or(HttpError::BadReply("no HTTP/1.1 status"))?;
    let mut body_bytes = None;
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(HttpError::BadReply("a header without a colon"))?;
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(HttpError::BadReply("a transfer encoding"));
        }
        if name.eq_ignore_ascii_case("content-length") {
            let length = value.trim().parse().ok().filter(|&length| length <= BODY_BYTES_MAX);
            body_bytes = Some(length.ok_or(HttpError::BadReply("no content length up to 1 MiB"))?);
        }
    }
    match (status, body_bytes) {
        (100..=199, _) => Err(HttpError::BadReply("an interim reply")),
        (204 | 304, _) => Ok((status, 0)),
        (_, Some(body_bytes)) => Ok((status, body_bytes)),
        (_, None) => Err(HttpError::BadReply("no content length")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(text: &str) -> Result<Option<Reply>, HttpError> {
        take_reply(&mut BytesMut::from(text))
    }

    #[test]
    fn replies_are_taken_whole_and_in_order() {
        let text = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhiHTTP/1.1 204 No Content\r\n\r\n";
        let mut pending = BytesMut::from(text);
        assert_eq!(take_reply(&mut pending).unwrap().unwrap(), Reply { status: 200, body: Bytes::from("hi") });
        assert_eq!(take_reply(&mut pending).unwrap().unwrap(), Reply { status: 204, body: Bytes::new() });
        assert!(pending.is_empty());
        for cut in 0.."HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi".len() {
            assert_eq!(take(&text[..cut]).unwrap(), None, "cut at {cut}");
        }
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for bad in [
            "SSH-2.0\r\n\r\n",
            "HTTP/1.1 2\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\n",
        ] {
            assert!(take(bad).is_err(), "{bad:?}");
        }
        assert!(take(&"x".repeat(HEAD_BYTES_MAX + 1)).is_err());
    }
}
