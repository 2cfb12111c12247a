//! As much HTTP as a scrape needs: one GET on a connection, an answer, and its end.
//!
//! ```text
//!   head, at most HEAD_MAX_BYTES ─▶ Wish ─┬ /metrics  in the format that Accept names
//!                                         ├ /         a link
//!                                         └ 400, 404, 405, 431
//! ```
//!
//! Pure. The trap is whoever sends no head, or never ends it: the driver has a deadline for all of it.

/// Longest head of a request.
pub(super) const HEAD_MAX_BYTES: usize = 8 << 10;

/// The format of the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    /// Prometheus' own, 0.0.4.
    Classic,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    /// The metrics.
    Metrics(Format),
    /// The page that leads to them.
    Index,
    /// Nothing that is here.
    Refused(Refusal),
}

/// A status other than 200.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refusal {
    BadRequest,
    NotFound,
    NotAllowed,
    TooLong,
    Unavailable,
}

impl Refusal {
    fn line(self) -> &'static str {
        match self {
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::NotAllowed => "405 Method Not Allowed",
            Self::TooLong => "431 Request Header Fields Too Large",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request {
    pub(super) wish: Wish,
    /// HEAD: the answer without what it is about.
    pub(super) head_only: bool,
}

/// Reads the head of a request; `None` while it has not ended.
pub(super) fn parse(bytes: &[u8]) -> Option<Request> {
    let refused = |refusal| Some(Request { wish: Wish::Refused(refusal), head_only: false });
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return if bytes.len() < HEAD_MAX_BYTES { None } else { refused(Refusal::TooLong) };
    };
    if end > HEAD_MAX_BYTES {
        return refused(Refusal::TooLong);
    }
    let Ok(head) = std::str::from_utf8(&bytes[..end]) else { return refused(Refusal::BadRequest) };
    let mut lines = head.split("\r\n");
    let words: Vec<_> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else { return refused(Refusal::BadRequest) };
    let is_method = !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_uppercase());
    if !is_method || !["HTTP/1.1", "HTTP/1.0"].contains(&version) || !target.starts_with('/') {
        return refused(Refusal::BadRequest);
    }
    if !["GET", "HEAD"].contains(&method) {
        return refused(Refusal::NotAllowed);
    }
    let mut fields = lines.filter_map(|line| line.split_once(':'));
    let accepts = |(name, value): (&str, &str)| {
        name.eq_ignore_ascii_case("accept") && value.to_ascii_lowercase().contains("application/openmetrics-text")
    };
    let format = if fields.any(accepts) { Format::OpenMetrics } else { Format::Classic };
    let wish = match target.split('?').next() {
        Some("/metrics") => Wish::Metrics(format),
        Some("/") => Wish::Index,
        _ => Wish::Refused(Refusal::NotFound),
    };
    Some(Request { wish, head_only: method == "HEAD" })
}

/// The page that leads to the metrics.
pub(super) const INDEX: &str =
    "<!DOCTYPE html><title>xen-colo</title><p>xl-colo host: <a href=\"/metrics\">/metrics</a> is for Prometheus.</p>\n";

/// An answer with a body.
pub(super) fn found(content_type: &str, body: &str, head_only: bool) -> String {
    answer("200 OK", content_type, body, head_only)
}

/// An answer that says why there is none.
pub(super) fn refused(refusal: Refusal, why: &str, head_only: bool) -> String {
    let line = refusal.line();
    let body = if why.is_empty() { format!("{line}\n") } else { format!("{line}: {why}\n") };
    answer(line, "text/plain; charset=utf-8", &body, head_only)
}

fn answer(line: &str, content_type: &str, body: &str, head_only: bool) -> String {
    let allow = if line.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let bytes = body.len();
    let body = if head_only { "" } else { body };
    format!(
        "HTTP/1.1 {line}\r\nContent-Type: {content_type}\r\nContent-Length: {bytes}\r\n{allow}Cache-Control: no-store\r\n\
         X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n{body}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wish(text: &str) -> Wish {
        parse(text.as_bytes()).unwrap_or_else(|| panic!("{text:?} has not ended")).wish
    }

    #[test]
    fn a_scrape_gets_the_format_that_it_asks_for() {
        let classic = Wish::Metrics(Format::Classic);
        assert_eq!(wish("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), classic);
        assert_eq!(wish("GET /metrics?x=1 HTTP/1.0\r\nAccept: text/plain\r\n\r\n"), classic);
        let open = "GET /metrics HTTP/1.1\r\naccept: Application/OpenMetrics-Text;version=1.0.0,*/*;q=0.1\r\n\r\n";
        assert_eq!(wish(open), Wish::Metrics(Format::OpenMetrics));
        assert_eq!(wish("GET / HTTP/1.1\r\n\r\n"), Wish::Index);
        let head = parse(b"HEAD /metrics HTTP/1.1\r\n\r\nmore").unwrap();
        assert_eq!((head.wish, head.head_only), (classic, true));
    }

    #[test]
    fn everything_else_is_refused() {
        for (text, refusal) in [
            ("GET /etc/passwd HTTP/1.1\r\n\r\n", Refusal::NotFound),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", Refusal::NotFound),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", Refusal::NotAllowed),
            ("GET /metrics\r\n\r\n", Refusal::BadRequest),
            ("GET  /metrics HTTP/1.1\r\n\r\n", Refusal::BadRequest),
            ("get /metrics HTTP/1.1\r\n\r\n", Refusal::BadRequest),
            ("GET metrics HTTP/1.1\r\n\r\n", Refusal::BadRequest),
            ("GET /metrics HTTP/2.0\r\n\r\n", Refusal::BadRequest),
            ("\r\n\r\n", Refusal::BadRequest),
        ] {
            assert_eq!(wish(text), Wish::Refused(refusal), "{text:?}");
        }
        assert_eq!(parse(b"GET /metrics HTTP/1.1\r\nHost: a\r\n"), None);
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(HEAD_MAX_BYTES));
        assert_eq!(wish(&long), Wish::Refused(Refusal::TooLong));
        assert_eq!(wish(&format!("{long}\r\n\r\n")), Wish::Refused(Refusal::TooLong));
    }

    #[test]
    fn an_answer_says_how_long_it_is() {
        let text = found("text/plain", "abc", false);
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\nabc"), "{text}");
        assert!(text.contains("\r\nContent-Length: 3\r\n") && !text.contains("Allow"), "{text}");
        assert!(found("text/plain", "abc", true).ends_with("\r\nConnection: close\r\n\r\n"));
        assert!(refused(Refusal::NotAllowed, "", false).contains("\r\nAllow: GET, HEAD\r\n"));
    }

    proptest! {
        #[test]
        fn garbage_is_read_to_its_bound_and_no_further(bytes in proptest::collection::vec(any::<u8>(), 0..2 * HEAD_MAX_BYTES)) {
            let ended = bytes.len() >= HEAD_MAX_BYTES || bytes.windows(4).any(|window| window == b"\r\n\r\n");
            prop_assert_eq!(parse(&bytes).is_some(), ended);
        }
    }
}
