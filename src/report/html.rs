//! Writes HTML: every text and every value of an attribute is escaped, names of elements and attributes are our own.
//!
//! ```text
//!   h.of("p", &[("class", &"note")], |h| h.text(what_a_peer_said))   ─▶   <p class="note">what a peer said</p>
//! ```
//!
//! A crate of templates would bring a second build of the parser that every derive is built with, for these few lines.

use std::fmt::{self, Display, Write};

/// An attribute's name and value.
pub(super) type Attribute<'a> = (&'static str, &'a dyn Display);

/// A page, or a part of one.
#[derive(Debug, Default)]
pub(super) struct Html(String);

/// Escapes what is written through it.
struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}

impl Html {
    /// A text.
    pub(super) fn text(&mut self, text: impl Display) {
        // A string takes all that is written.
        let _ = write!(Escaped(&mut self.0), "{text}");
    }

    /// What is HTML already: our own, and never anything that was read.
    pub(super) fn ours(&mut self, html: &'static str) {
        self.0.push_str(html);
    }

    fn open(&mut self, tag: &str, attributes: &[Attribute]) {
        self.0.push('<');
        self.0.push_str(tag);
        for (name, value) in attributes {
            self.0.push(' ');
            self.0.push_str(name);
            self.0.push_str("=\"");
            self.text(value);
            self.0.push('"');
        }
        self.0.push('>');
    }

    /// An element that has no inside and no end.
    pub(super) fn void(&mut self, tag: &'static str, attributes: &[Attribute]) {
        self.open(tag, attributes);
    }

    /// An element, and what is in it.
    pub(super) fn of(&mut self, tag: &'static str, attributes: &[Attribute], inside: impl FnOnce(&mut Self)) {
        self.open(tag, attributes);
        inside(self);
        self.0.push_str("</");
        self.0.push_str(tag);
        self.0.push('>');
    }

    /// An element with a text.
    pub(super) fn put(&mut self, tag: &'static str, attributes: &[Attribute], text: impl Display) {
        self.of(tag, attributes, |h| h.text(text));
    }

    pub(super) fn into_string(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_and_every_value_is_escaped() {
        let mut h = Html::default();
        h.of("p", &[("class", &"a\"b'<")], |h| {
            h.text("<b>&amp;");
            h.void("br", &[]);
            h.put("i", &[("x", &1.5)], '>');
        });
        let expected = "<p class=\"a&quot;b&#39;&lt;\">&lt;b&gt;&amp;amp;<br><i x=\"1.5\">&gt;</i></p>";
        assert_eq!(h.into_string(), expected);
    }
}
