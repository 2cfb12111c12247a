//! As much of Rust's grammar as the rules need: code without comments and literals, and the paths in it.
//!
//! The trap: `std::{net, fs}` and `crate::{colo::Loss, page}` name what they import only in pieces, and a banned
//! word in a comment or a message is not a use of it. So text becomes tokens first, and tokens become whole paths.

/// A word or a single punctuation character (`::` is one token), and the line it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) line: usize,
}

/// A path with every `use` group expanded, and its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Path {
    pub(crate) parts: Vec<String>,
    pub(crate) line: usize,
}

impl Path {
    /// Whether these words follow each other somewhere in the path.
    pub(crate) fn contains(&self, words: &[&str]) -> bool {
        self.parts.windows(words.len()).any(|window| window.iter().zip(words).all(|(part, word)| part == word))
    }
}

/// The tokens of a file. Comments vanish; a literal becomes one `"` token.
pub(crate) fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let (mut at, mut line, mut found) = (0, 1, Vec::new());
    let starts = |at: usize, with: &str| with.chars().enumerate().all(|(n, c)| chars.get(at + n) == Some(&c));
    while at < chars.len() {
        let begun = at;
        let mut word = None;
        let c = chars[at];
        if starts(at, "//") {
            at = end_of(&chars, at, |rest| rest.first() == Some(&'\n'));
        } else if starts(at, "/*") {
            at = block_comment(&chars, at);
        } else if let Some(end) = literal(&chars, at) {
            at = end;
            word = Some("\"".to_owned());
        } else if c.is_alphanumeric() || c == '_' {
            at = end_of(&chars, at, |rest| !(rest[0].is_alphanumeric() || rest[0] == '_'));
            word = Some(chars[begun..at].iter().collect());
        } else if starts(at, "::") {
            at += 2;
            word = Some("::".to_owned());
        } else {
            at += 1;
            word = (!c.is_whitespace()).then(|| c.to_string());
        }
        found.extend(word.map(|text| Token { text, line }));
        line += chars[begun..at].iter().filter(|c| **c == '\n').count();
    }
    found
}

/// The first place from `at` on where `stop` holds for the rest.
fn end_of(chars: &[char], at: usize, stop: impl Fn(&[char]) -> bool) -> usize {
    (at..chars.len()).find(|at| stop(&chars[*at..])).unwrap_or(chars.len())
}

fn block_comment(chars: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < chars.len() {
        match &chars[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The end of the string, byte string or character that begins at `at`, if one does.
fn literal(chars: &[char], at: usize) -> Option<usize> {
    let inside_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    let mut next = at;
    if !inside_word && matches!(chars[next], 'b' | 'c') {
        next += 1;
    }
    if !inside_word && chars.get(next) == Some(&'r') {
        let quote = end_of(chars, next + 1, |rest| rest[0] != '#');
        let hashes = quote - next - 1;
        if chars.get(quote) == Some(&'"') {
            let close = |rest: &[char]| rest[0] == '"' && (1..=hashes).all(|n| rest.get(n) == Some(&'#'));
            return Some((end_of(chars, quote + 1, close) + 1 + hashes).min(chars.len()));
        }
    }
    match (chars.get(next), chars.get(next + 1), chars.get(next + 2)) {
        (Some('"'), ..) => Some(quoted(chars, next + 1, '"')),
        (Some('\''), Some('\\'), _) => Some(quoted(chars, next + 1, '\'')),
        // A quote two characters on makes it a character; otherwise it is a lifetime.
        (Some('\''), Some(_), Some('\'')) => Some(next + 3),
        _ => None,
    }
}

fn quoted(chars: &[char], mut at: usize, close: char) -> usize {
    while at < chars.len() && chars[at] != close {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

/// Every path of two or more words, and every word alone that a `use` imports.
pub(crate) fn paths(tokens: &[Token]) -> Vec<Path> {
    let (mut at, mut found) = (0, Vec::new());
    while at < tokens.len() {
        let alone = at > 0 && tokens[at - 1].text == "use";
        if is_word(&tokens[at].text) && (alone || tokens.get(at + 1).is_some_and(|next| next.text == "::")) {
            at = tree(tokens, at, &[], &mut found);
        } else {
            at += 1;
        }
    }
    found
}

/// Reads one path or `use` tree after `prefix`; returns where it ends.
fn tree(tokens: &[Token], mut at: usize, prefix: &[String], found: &mut Vec<Path>) -> usize {
    let mut parts = prefix.to_vec();
    let line = tokens.get(at).map_or(0, |token| token.line);
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            "{" if parts.len() > prefix.len() || !prefix.is_empty() => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token.text != "}") {
                    let before = at;
                    at = tree(tokens, at, &parts, found);
                    // `as NAME` and commas lead to the next branch.
                    if at == before || tokens.get(at).is_some_and(|token| token.text == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            word if is_word(word) || word == "*" => parts.push(word.to_owned()),
            _ => break,
        }
        at += 1;
        if tokens.get(at).is_none_or(|token| token.text != "::") {
            break;
        }
        at += 1;
    }
    if parts.len() > prefix.len() {
        if tokens.get(at).is_some_and(|token| token.text == "as") {
            at += 2;
        }
        found.push(Path { parts, line });
    }
    at
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(text: &str) -> Vec<String> {
        paths(&tokens(text)).into_iter().map(|path| path.parts.join("::")).collect()
    }

    #[test]
    fn comments_and_literals_are_not_code() {
        let text =
            "// a::b\n/* c::d /* e::f */ g::h */ \"i::j \\\" k::l\" r#\"m::n \" o::p\"# b\"q::r\" 's' '\\'' x::y";
        assert_eq!(seen(text), ["x::y"]);
        assert_eq!(tokens("\n\n\"two\nlines\" z")[1], Token { text: "z".into(), line: 4 });
        assert_eq!(seen("fn f<'a>(x: &'a str) -> a::B<'a> {}"), ["a::B"]);
    }

    #[test]
    fn use_groups_are_expanded() {
        assert_eq!(
            seen("use std::{net, time::{Duration, Instant as Now}, fs::*};"),
            ["std::net", "std::time::Duration", "std::time::Instant", "std::fs::*"]
        );
        assert_eq!(
            seen("use crate::{self as me, colo::Loss}; f(a::b::<u8>(), tokio::spawn)"),
            ["crate::self", "crate::colo::Loss", "a::b", "tokio::spawn"]
        );
        assert_eq!(seen("use tokio;"), ["tokio"]);
    }

    #[test]
    fn a_struct_literal_is_no_group() {
        assert_eq!(seen("State::Exited { exit: Exit::Alone }"), ["State::Exited", "Exit::Alone"]);
    }
}
