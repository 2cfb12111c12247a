//! Structs that live as 64-bit words in guest pages or in a saved device blob.
//!
//! One list of fields makes the struct, its encoding and its decoding, so that the three cannot disagree. Each
//! field takes one word: bytes are cheap, a layout that can be read at a glance is not.

/// A value that fits in one word. Decoding takes any word, since guest memory can hold anything.
pub(super) trait Word: Copy {
    /// The value as a word.
    fn to_word(self) -> u64;
    /// The value of a word; bits that mean nothing are dropped.
    fn from_word(word: u64) -> Self;
}

macro_rules! word_integers {
    ($($ty:ty),*) => {$(
        impl Word for $ty {
            fn to_word(self) -> u64 {
                u64::from(self)
            }
            fn from_word(word: u64) -> Self {
                word as $ty
            }
        }
    )*};
}
word_integers!(u8, u16, u32, u64);

impl Word for bool {
    fn to_word(self) -> u64 {
        u64::from(self)
    }
    fn from_word(word: u64) -> Self {
        word & 1 == 1
    }
}

/// Declares a struct of words with `to_words` and `from_words`, `$count` words long.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident: $count:literal { $($(#[$doc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub(super) struct $name { $($(#[$doc])* pub(super) $field: $ty,)* }

        impl $name {
            /// Number of words, those kept for later fields included.
            pub(super) const WORDS: usize = $count;

            /// The fields in the order of their declaration, then zeroes.
            pub(super) fn to_words(&self) -> [u64; $count] {
                let mut words = [0; $count];
                let fields = [$($crate::hypervisor::embedded::words::Word::to_word(self.$field)),*];
                words[..fields.len()].copy_from_slice(&fields);
                words
            }

            /// The inverse of `to_words`.
            pub(super) fn from_words(words: &[u64; $count]) -> Self {
                let mut next = words.iter().copied();
                Self { $($field: $crate::hypervisor::embedded::words::Word::from_word(next.next().unwrap_or(0)),)* }
            }
        }
    };
}
pub(super) use words;
