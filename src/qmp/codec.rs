//! QEMU's dialect of JSON, as its monitor reads it.
//!
//! ```text
//!  byte ─▶ token ─ brackets open ──▶ kept
//!              ├── brackets closed ─▶ all kept are one value, or an error
//!              ├── a limit ─────────▶ an error; what was kept is dropped
//!              └── no token ────────▶ an error; what was kept is dropped ─▶ skip to a bracket, `,`, `:`, a control byte
//! ```
//!
//! Values need not be on lines of their own: one ends where its brackets close, and a number or a word where the next
//! byte cannot belong to it. Strings may stand in single quotes. After an error reading goes on, which is why one
//! mistake may be answered by several errors, each of them QEMU's.
//!
//! Two differences: an input has [`INPUT_MAX_BYTES`], not 64 MiB; and a number that no double can hold is an error,
//! since it could only be echoed as what is no JSON. The trap: what is skipped ends at a tab in no case, and at a
//! space neither, but at a line end.
//!
//! Source for limits and words: QEMU 7.2 `qobject/json-lexer.c`, `json-streamer.c`, `json-parser.c`, as measured.

use bytes::{Buf, BytesMut};
use serde_json::{Map, Number, Value};

/// Longest input of one value, in bytes.
pub const INPUT_MAX_BYTES: usize = 64 << 10;
/// Deepest nesting.
pub const NESTING_MAX: usize = 1024;

/// What is wrong with an input, in QEMU's words.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SyntaxError {
    /// Bytes that begin nothing, or end what cannot end there.
    #[error("JSON parse error, stray '{0}'")]
    Stray(String),
    /// Tokens that make no value.
    #[error("JSON parse error, {0}")]
    Parse(String),
    /// More than [`INPUT_MAX_BYTES`].
    #[error("JSON token size limit exceeded")]
    Size,
    /// Deeper than [`NESTING_MAX`].
    #[error("JSON nesting depth limit exceeded")]
    Nesting,
}

fn parse<T>(why: impl Into<String>) -> Result<T, SyntaxError> {
    Err(SyntaxError::Parse(why.into()))
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Token {
    /// One of `{}[],:`.
    Mark(u8),
    /// With its quotes.
    Text(Vec<u8>),
    Number(Vec<u8>),
    Word(Vec<u8>),
}

/// What the bytes of the token so far are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lexing {
    Start,
    /// In a string that ends at this quote.
    Text(u8),
    /// Behind its backslash.
    Escape(u8),
    Sign,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Word,
    /// Skipping what follows an error.
    Recovery,
}

/// What a byte does to the token before it.
enum Step {
    /// It belongs to it.
    On(Lexing),
    /// It is its last.
    Last,
    /// It belongs to the next.
    Next,
    /// It cannot be there.
    Wrong,
}

/// Cuts a stream of bytes into values.
#[derive(Debug)]
pub struct Decoder {
    state: Lexing,
    token: Vec<u8>,
    kept: Vec<Token>,
    kept_bytes: usize,
    braces: isize,
    brackets: isize,
}

impl Default for Decoder {
    fn default() -> Self {
        let (token, kept) = (Vec::new(), Vec::new());
        Self { state: Lexing::Start, token, kept, kept_bytes: 0, braces: 0, brackets: 0 }
    }
}

impl Decoder {
    /// The next value or error; takes the bytes that made it, or all when they make none yet.
    pub fn decode(&mut self, input: &mut BytesMut) -> Option<Result<Value, SyntaxError>> {
        while let Some(&byte) = input.first() {
            let (taken, found) = self.feed(byte);
            if taken {
                input.advance(1);
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Whether nothing has begun.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.kept.is_empty() && self.token.is_empty()
    }

    /// Whether the byte is taken, or must come again; and what it completes.
    fn feed(&mut self, byte: u8) -> (bool, Option<Result<Value, SyntaxError>>) {
        match step(self.state, byte) {
            Step::On(Lexing::Start) => (self.state, self.token) = (Lexing::Start, Vec::new()),
            Step::On(Lexing::Recovery) => self.state = Lexing::Recovery,
            Step::On(next) => {
                self.token.push(byte);
                self.state = next;
                if self.kept_bytes + self.token.len() > INPUT_MAX_BYTES {
                    self.state = Lexing::Recovery;
                    return (true, Some(self.give_up(SyntaxError::Size)));
                }
            }
            Step::Last => {
                self.token.push(byte);
                return (true, self.complete());
            }
            Step::Next if self.state == Lexing::Recovery => {
                self.state = Lexing::Start;
                return (false, None);
            }
            Step::Next => return (false, self.complete()),
            Step::Wrong => {
                self.token.push(byte);
                self.state = Lexing::Recovery;
                // As a C string would end there.
                let until = self.token.iter().position(|byte| *byte == 0).unwrap_or(self.token.len());
                let stray = String::from_utf8_lossy(&self.token[..until]).into_owned();
                return (true, Some(self.give_up(SyntaxError::Stray(stray))));
            }
        }
        (true, None)
    }

    /// The token is whole: so may the value be.
    fn complete(&mut self) -> Option<Result<Value, SyntaxError>> {
        let token = std::mem::take(&mut self.token);
        let len_bytes = token.len();
        let token = match std::mem::replace(&mut self.state, Lexing::Start) {
            Lexing::Start => Token::Mark(token[0]),
            Lexing::Text(_) | Lexing::Escape(_) => Token::Text(token),
            Lexing::Word => Token::Word(token),
            _ => Token::Number(token),
        };
        match token {
            Token::Mark(b'{') => self.braces += 1,
            Token::Mark(b'}') => self.braces -= 1,
            Token::Mark(b'[') => self.brackets += 1,
            Token::Mark(b']') => self.brackets -= 1,
            _ => {}
        }
        self.kept_bytes += len_bytes;
        if self.kept_bytes > INPUT_MAX_BYTES {
            return Some(self.give_up(SyntaxError::Size));
        }
        if self.braces + self.brackets > NESTING_MAX as isize {
            return Some(self.give_up(SyntaxError::Nesting));
        }
        self.kept.push(token);
        if (self.braces > 0 || self.brackets > 0) && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        let kept = std::mem::take(&mut self.kept);
        self.forget();
        Some(value(&mut kept.into_iter().peekable()))
    }

    fn give_up(&mut self, error: SyntaxError) -> Result<Value, SyntaxError> {
        self.forget();
        Err(error)
    }

    fn forget(&mut self) {
        (self.token, self.kept, self.kept_bytes) = (Vec::new(), Vec::new(), 0);
        (self.braces, self.brackets) = (0, 0);
    }
}

/// What a byte does in a state. Every arrow is here.
fn step(state: Lexing, byte: u8) -> Step {
    use Lexing::{
        Digits, Escape, Exponent, ExponentDigits, ExponentSign, Fraction, Point, Recovery, Sign, Start, Text, Word,
        Zero,
    };
    match (state, byte) {
        (Start, b'{' | b'}' | b'[' | b']' | b',' | b':') => Step::Last,
        (Start, b'"' | b'\'') => Step::On(Text(byte)),
        (Start, b'-') => Step::On(Sign),
        (Start | Sign, b'0') => Step::On(Zero),
        (Start | Sign, b'1'..=b'9') | (Digits, b'0'..=b'9') => Step::On(Digits),
        (Start | Word, b'a'..=b'z') => Step::On(Word),
        (Start, b' ' | b'\t' | b'\r' | b'\n') => Step::On(Start),

        (Text(quote), _) if byte == quote => Step::Last,
        (Text(quote), b'\\') => Step::On(Escape(quote)),
        (Text(quote) | Escape(quote), 0x20..=0xfd) => Step::On(Text(quote)),

        (Zero | Digits, b'.') => Step::On(Point),
        (Zero | Digits | Fraction, b'e' | b'E') => Step::On(Exponent),
        (Point | Fraction, b'0'..=b'9') => Step::On(Fraction),
        (Exponent, b'+' | b'-') => Step::On(ExponentSign),
        (Exponent | ExponentSign | ExponentDigits, b'0'..=b'9') => Step::On(ExponentDigits),
        (Zero, b'0'..=b'9') => Step::Wrong,
        (Zero | Digits | Fraction | ExponentDigits | Word, _) => Step::Next,

        (Recovery, b'{' | b'}' | b'[' | b']' | b',' | b':' | 0xfe..) => Step::Next,
        (Recovery, b'\t' | 0x20..) => Step::On(Recovery),
        (Recovery, _) => Step::Next,

        (Start | Text(_) | Escape(_) | Sign | Point | Exponent | ExponentSign, _) => Step::Wrong,
    }
}

type Tokens = std::iter::Peekable<std::vec::IntoIter<Token>>;

fn value(tokens: &mut Tokens) -> Result<Value, SyntaxError> {
    match tokens.next() {
        None => parse("premature EOI"),
        Some(Token::Mark(b'{')) => object(tokens).map(Value::Object),
        Some(Token::Mark(b'[')) => list(tokens).map(Value::Array),
        Some(Token::Mark(_)) => parse("expecting value"),
        Some(Token::Text(quoted)) => text(&quoted).map(Value::String),
        Some(Token::Number(digits)) => number(&digits),
        Some(Token::Word(word)) => match &word[..] {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            _ => parse(format!("invalid keyword '{}'", String::from_utf8_lossy(&word))),
        },
    }
}

fn object(tokens: &mut Tokens) -> Result<Map<String, Value>, SyntaxError> {
    let mut object = Map::new();
    if tokens.next_if_eq(&Token::Mark(b'}')).is_some() {
        return Ok(object);
    }
    loop {
        let Value::String(key) = value(tokens)? else { return parse("key is not a string in object") };
        if tokens.next() != Some(Token::Mark(b':')) {
            return parse("missing : in object pair");
        }
        let value = value(tokens)?;
        if object.insert(key, value).is_some() {
            return parse("duplicate key");
        }
        match tokens.next() {
            Some(Token::Mark(b'}')) => return Ok(object),
            Some(Token::Mark(b',')) => {}
            _ => return parse("expected separator in dict"),
        }
    }
}

fn list(tokens: &mut Tokens) -> Result<Vec<Value>, SyntaxError> {
    let mut list = Vec::new();
    if tokens.next_if_eq(&Token::Mark(b']')).is_some() {
        return Ok(list);
    }
    loop {
        list.push(value(tokens)?);
        match tokens.next() {
            Some(Token::Mark(b']')) => return Ok(list),
            Some(Token::Mark(b',')) => {}
            _ => return parse("expected separator in list"),
        }
    }
}

fn number(digits: &[u8]) -> Result<Value, SyntaxError> {
    let digits = String::from_utf8_lossy(digits);
    let integer = digits.parse::<i64>().map(Number::from).or_else(|_| digits.parse::<u64>().map(Number::from)).ok();
    let number = integer.or_else(|| digits.parse().ok().and_then(Number::from_f64));
    number.map_or_else(|| parse(format!("number '{digits}' is out of range")), |number| Ok(Value::Number(number)))
}

/// Whether Unicode has the character, and says that it may be exchanged: U+FFFE is one that may not.
fn is_character(code: u32) -> Option<char> {
    char::from_u32(code).filter(|_| !(0xfdd0..=0xfdef).contains(&code) && code & 0xfffe != 0xfffe)
}

fn text(quoted: &[u8]) -> Result<String, SyntaxError> {
    let inside = quoted.get(1..quoted.len() - 1).unwrap_or_default();
    let mut out = String::with_capacity(inside.len());
    let mut rest = inside;
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        if byte != b'\\' {
            let len = inside.len() - rest.len() - 1;
            let (character, len_bytes) = utf8(&inside[len..])?;
            out.push(character);
            rest = &inside[len + len_bytes..];
            continue;
        }
        let Some((&escaped, behind)) = rest.split_first() else { return parse("invalid escape sequence in string") };
        rest = behind;
        out.push(match escaped {
            b'"' | b'\'' | b'\\' | b'/' => char::from(escaped),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => unicode(&mut rest, quoted)?,
            _ => return parse("invalid escape sequence in string"),
        });
    }
    Ok(out)
}

/// The character that the bytes begin with. U+0000 may be written in two, as QEMU's modified UTF-8 does.
fn utf8(bytes: &[u8]) -> Result<(char, usize), SyntaxError> {
    if bytes.starts_with(&[0xc0, 0x80]) {
        return Ok(('\0', 2));
    }
    let longest = &bytes[..bytes.len().min(4)];
    let valid = match std::str::from_utf8(longest) {
        Ok(valid) => valid,
        Err(error) => std::str::from_utf8(&longest[..error.valid_up_to()]).unwrap_or_default(),
    };
    let first = valid.chars().next().filter(|first| is_character(u32::from(*first)).is_some());
    first.map_or_else(|| parse("invalid UTF-8 sequence in string"), |first| Ok((first, first.len_utf8())))
}

/// What follows `\u`: four hexadecimal digits, or a pair of surrogates.
fn unicode(rest: &mut &[u8], quoted: &[u8]) -> Result<char, SyntaxError> {
    let here = *rest;
    let unit = |at: usize| {
        let digits = std::str::from_utf8(here.get(at..at + 4)?).ok()?;
        digits.bytes().all(|digit| digit.is_ascii_hexdigit()).then(|| u32::from_str_radix(digits, 16).ok())?
    };
    let pair = |high: u32| {
        let low = here.get(4..6).filter(|escape| *escape == b"\\u").and_then(|_| unit(6))?;
        (0xdc00..0xe000).contains(&low).then(|| (0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00), 10))
    };
    let (code, taken) = match unit(0) {
        Some(high @ 0xd800..0xdc00) => pair(high).unwrap_or((high, 4)),
        Some(code) => (code, 4),
        None => (u32::MAX, 0),
    };
    let Some(character) = is_character(code) else {
        // What QEMU shows goes on to the closing quote.
        let at = quoted.len() - 1 - here.len();
        let shown = String::from_utf8_lossy(&quoted[at..quoted.len().min(at + 4)]).into_owned();
        return parse(format!("\\u{shown} is not a valid Unicode character"));
    };
    *rest = &here[taken..];
    Ok(character)
}

/// Writes a value as QEMU does: a space behind `:` and `,`, and nothing that is not ASCII.
pub fn encode(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::String(text) => encode_text(text, out),
        Value::Array(list) => {
            out.push(b'[');
            for (at, value) in list.iter().enumerate() {
                out.extend_from_slice(if at == 0 { b"" } else { b", " });
                encode(value, out);
            }
            out.push(b']');
        }
        Value::Object(object) => encode_members(object.iter().map(|(key, value)| (key.as_str(), value)), out),
        plain => out.extend_from_slice(plain.to_string().as_bytes()),
    }
}

/// Writes an object whose members have an order.
pub fn encode_members<'a>(members: impl IntoIterator<Item = (&'a str, &'a Value)>, out: &mut Vec<u8>) {
    out.push(b'{');
    for (at, (key, value)) in members.into_iter().enumerate() {
        out.extend_from_slice(if at == 0 { b"" } else { b", " });
        encode_text(key, out);
        out.extend_from_slice(b": ");
        encode(value, out);
    }
    out.push(b'}');
}

fn encode_text(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    for character in text.chars() {
        match character {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\u{8}' => out.extend_from_slice(b"\\b"),
            '\u{c}' => out.extend_from_slice(b"\\f"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            ' '..='~' => out.push(character as u8),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    out.extend_from_slice(format!("\\u{unit:04X}").as_bytes());
                }
            }
        }
    }
    out.push(b'"');
}
