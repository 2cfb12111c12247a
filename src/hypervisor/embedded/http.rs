//! HTTP/1.1 heads: reading a request's, writing a response's (RFC 9112). Pure bytes in, bytes out.
//!
//! ```text
//! bytes ─▶ parse ─▶ Incomplete │ Request │ Bad(status, connection ends)
//! ```
//!
//! The trap is request smuggling: a message whose length can be read in two ways. Transfer codings are refused,
//! and so are two lengths that differ, spaces before a colon, folded lines and anything else out of the ordinary.

use super::layout::HEAD_MAX_BYTES;

/// Most bytes a response takes beside its body.
pub(super) const RESPONSE_HEAD_MAX_BYTES: usize = 512;

/// A request's head.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    pub(super) method: &'a str,
    pub(super) target: &'a str,
    /// Size of the body, when the client said it.
    pub(super) content_length: Option<u64>,
    /// The client sends the body in pieces, which this server does not read.
    pub(super) chunked: bool,
    /// The connection ends with the response.
    pub(super) close: bool,
    /// The client waits for `100 Continue`.
    pub(super) expects_continue: bool,
    /// Size of the head, the empty line included.
    pub(super) head_bytes: usize,
}

/// What the bytes at hand begin with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    Incomplete,
    Request(Request<'a>),
    /// Not a request; answer with this status and end the connection.
    Bad(u16),
}

/// Reads the head at the start of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Parsed<'_> {
    let window = &bytes[..bytes.len().min(HEAD_MAX_BYTES)];
    let Some(end) = window.windows(4).position(|four| four == b"\r\n\r\n") else {
        return match bytes.len() {
            HEAD_MAX_BYTES.. => Parsed::Bad(431),
            // Told apart early, so that a client that speaks something else is not waited for.
            _ if looks_like_a_request(bytes) => Parsed::Incomplete,
            _ => Parsed::Bad(400),
        };
    };
    match std::str::from_utf8(&window[..end]).ok().and_then(|head| parse_head(head, end + 4)) {
        Some(request) => Parsed::Request(request),
        None => Parsed::Bad(400),
    }
}

fn looks_like_a_request(bytes: &[u8]) -> bool {
    let method = bytes.iter().take_while(|byte| byte.is_ascii_uppercase()).count();
    method <= 16 && (method == bytes.len() || (method > 0 && bytes[method] == b' '))
}

fn parse_head(head: &str, head_bytes: usize) -> Option<Request<'_>> {
    let mut lines = head.split("\r\n");
    let mut words = lines.next()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let ordinary = !method.is_empty()
        && method.bytes().all(|byte| byte.is_ascii_uppercase())
        && target.starts_with('/')
        && target.bytes().all(|byte| byte.is_ascii_graphic())
        && words.next().is_none();
    let old = version == "HTTP/1.0";
    if !ordinary || !(old || version == "HTTP/1.1") {
        return None;
    }
    let mut request = Request {
        method,
        target,
        content_length: None,
        chunked: false,
        close: old,
        expects_continue: false,
        head_bytes,
    };
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return None;
        }
        let value = value.trim_matches([' ', '\t']);
        if value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t') {
            return None;
        }
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                // `parse` alone would take a leading plus.
                let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
                let length = if digits { value.parse().unwrap_or(u64::MAX) } else { return None };
                if request.content_length.replace(length).is_some_and(|earlier| earlier != length) {
                    return None;
                }
            }
            "transfer-encoding" => request.chunked = true,
            "expect" => request.expects_continue = value.eq_ignore_ascii_case("100-continue"),
            "connection" => {
                for option in value.split(',').map(str::trim) {
                    match option.to_ascii_lowercase().as_str() {
                        "close" => request.close = true,
                        "keep-alive" if old => request.close = false,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(request)
}

/// A whole response. `hash_seed` is always sent with sixteen digits, so that two guests' responses differ in
/// bytes but never in length. A response to HEAD says the body's length and leaves it out.
pub(super) fn response(status: u16, body: &[u8], hash_seed: u64, close: bool, head_only: bool) -> Vec<u8> {
    let reason = match status {
        200 => "OK",
        201 => "Created",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        507 => "Insufficient Storage",
        _ => "Internal Server Error",
    };
    let mut out = format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Length: {}\r\nX-Hash-Seed: {hash_seed:016x}\r\n{}{}\r\n",
        body.len(),
        if status == 405 { "Allow: GET, HEAD, PUT\r\n" } else { "" },
        if close { "Connection: close\r\n" } else { "" },
    )
    .into_bytes();
    assert!(out.len() <= RESPONSE_HEAD_MAX_BYTES, "room for a response is reserved before it is made");
    if !head_only {
        out.extend_from_slice(body);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(text: &str) -> Request<'_> {
        match parse(text.as_bytes()) {
            Parsed::Request(request) => request,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn the_headers_that_matter_are_read() {
        let text = "PUT /k/a HTTP/1.1\r\nHost: x\r\ncontent-LENGTH:  12 \r\nExpect: 100-Continue\r\n\r\nbody";
        let got = request(text);
        assert_eq!(
            (got.method, got.target, got.content_length, got.head_bytes),
            ("PUT", "/k/a", Some(12), text.len() - 4)
        );
        assert!(got.expects_continue && !got.close && !got.chunked);
        assert!(request("GET / HTTP/1.1\r\nConnection: TE, Close\r\n\r\n").close);
        assert!(request("GET / HTTP/1.0\r\n\r\n").close);
        assert!(!request("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").close);
        assert!(request("PUT /k/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").chunked);
        assert_eq!(
            request("PUT /k/a HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n").content_length,
            Some(u64::MAX)
        );
    }

    #[test]
    fn a_head_is_waited_for_to_its_last_byte() {
        let whole = b"GET /k/a HTTP/1.1\r\nHost: x\r\n\r\n";
        for cut in 0..whole.len() {
            assert_eq!(parse(&whole[..cut]), Parsed::Incomplete, "{cut}");
        }
        assert!(matches!(parse(whole), Parsed::Request(_)));
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        for bad in [
            "\x16\x03\x01",
            "get / HTTP/1.1\r\n\r\n",
            "GET  / HTTP/1.1\r\n\r\n",
            "GET / HTTP/2\r\n\r\n",
            "GET x HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1 x\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length:\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length : 1\r\n\r\n",
            "GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nA: b\nC: d\r\n\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
        ] {
            assert_eq!(parse(bad.as_bytes()), Parsed::Bad(400), "{bad:?}");
        }
        let long = format!("GET / HTTP/1.1\r\nA: {}", "x".repeat(HEAD_MAX_BYTES));
        assert_eq!(parse(long.as_bytes()), Parsed::Bad(431));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), tail in "[ -~\r\n]{0,80}") {
            parse(&bytes);
            let text = format!("GET / HTTP/1.1\r\n{tail}\r\n\r\n");
            if let Parsed::Request(request) = parse(text.as_bytes()) {
                prop_assert!(request.head_bytes <= text.len());
            }
        }
    }
}
