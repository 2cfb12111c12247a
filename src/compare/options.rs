//! TCP options: which of them are promises.
//!
//! | option | kind | in a SYN | elsewhere |
//! |---|---|---|---|
//! | maximum segment size | 2 | compared | ignored |
//! | window scale | 3 | compared | ignored |
//! | SACK permitted | 4 | compared | ignored |
//! | timestamps | 8 | that they are there | ignored |
//! | MD5, TCP-AO, multipath | 19, 29, 30 | that they are there | ignored |
//! | SACK | 5 | ignored | ignored |
//! | user timeout, Fast Open cookie, and all others | 28, 34 | ignored | ignored |
//!
//! What is compared binds both ends for as long as the connection lives: a client reads every later window by the scale
//! that it was shown, and drops segments without the timestamps that it was promised. What is ignored is a number of its
//! sender's own (clocks, signatures, cookies), or repeats what the client has said. A guest that answers out of a SYN
//! cookie promises less than one that does not, and then a checkpoint must make them one.
//!
//! Sources: RFC 9293 3.2, 7323, 2018, 5925, 8684, 7413, and IANA's list of the kinds.

const END: u8 = 0;
const NOP: u8 = 1;
const MAXIMUM_SEGMENT_SIZE: u8 = 2;
const WINDOW_SCALE: u8 = 3;
const SACK_PERMITTED: u8 = 4;
pub(super) const SACK: u8 = 5;
pub(super) const TIMESTAMPS: u8 = 8;
const MD5: u8 = 19;
const AUTHENTICATION: u8 = 29;
const MULTIPATH: u8 = 30;

/// The options of a TCP header: kind, place and length of each, until the end or the first that makes no sense.
pub(super) fn options(bytes: &[u8]) -> impl Iterator<Item = (u8, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            match (*bytes.get(at)?, bytes.get(at + 1)) {
                (END, _) => return None,
                (NOP, _) => at += 1,
                (kind, Some(&length)) if length >= 2 && at + usize::from(length) <= bytes.len() => {
                    let (start, length) = (at, usize::from(length));
                    at += length;
                    return Some((kind, start, length));
                }
                _ => return None,
            }
        }
    })
}

/// What a SYN promises for the life of its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offer {
    maximum_segment_size: Option<u16>,
    window_scale: Option<u8>,
    /// SACK, timestamps, MD5, TCP-AO, multipath.
    features: [bool; 5],
}

impl Offer {
    /// Reads a SYN's options.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let mut offer = Self::default();
        for (kind, at, length) in options(bytes) {
            match (kind, &bytes[at + 2..at + length]) {
                (MAXIMUM_SEGMENT_SIZE, &[high, low]) => {
                    offer.maximum_segment_size = Some(u16::from_be_bytes([high, low]));
                }
                (WINDOW_SCALE, &[scale]) => offer.window_scale = Some(scale),
                _ => {}
            }
            let features = [SACK_PERMITTED, TIMESTAMPS, MD5, AUTHENTICATION, MULTIPATH];
            features.iter().zip(&mut offer.features).for_each(|(feature, has)| *has |= *feature == kind);
        }
        offer
    }
}
