//! The words in which Linux' nbd driver is given connections and devices: generic netlink.
//!
//! ```text
//!   GETFAMILY "nbd" ──▶ the driver's number
//!   CONNECT     socket, size, flags, whose ──▶ the number of a device that was free
//!   RECONFIGURE number, socket, whose      ──▶ a device whose connection is dead goes on with this one
//!   DISCONNECT  number                     ──▶ what it has under way fails; free when nobody has it open
//!
//!   a message:  nlmsghdr, 16 bytes │ genlmsghdr, 4 bytes │ attributes: length, type, value, to the next 4 bytes
//!   an answer:  messages of the order's sequence number, the last of which says how it ended (NLMSG_ERROR)
//! ```
//!
//! The trap: a device that was connected by the ioctls of nbd-client ends with its first connection. Only one that was
//! connected here, with a dead-connection timeout, keeps its requests until it is given another one. Whose it is, the
//! driver compares itself (Linux 5.14 or later), so that no guest gets another one's disk.
//!
//! Everything is in the host's byte order. Source: linux `uapi/linux/nbd-netlink.h`, `uapi/linux/genetlink.h`,
//! `uapi/linux/netlink.h`; `drivers/block/nbd.c` (`nbd_genl_connect`, `nbd_genl_reconfigure`).

use super::client::ExportInfo;

/// Longest datagram of an answer that is read; the driver's are below 500.
pub const ANSWER_MAX_BYTES: usize = 8192;
/// The size of a block of such a device: the smallest that a guest's disk has.
pub const BLOCK_BYTES: u64 = 512;

const HEADER_BYTES: usize = 16;
const GENERIC_HEADER_BYTES: usize = 4;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_ATTR_BACKEND_IDENTIFIER: u16 = 10;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;
const NLA_F_NESTED: u16 = 1 << 15;
/// The flags of `nla_type`.
const NLA_TYPE_MASK: u16 = 0x3fff;

/// An order. `family` is what [`Order::Family`] found, `socket` the number of a file descriptor of the process that says
/// it, on which the negotiation is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order<'a> {
    /// Which number the driver has.
    Family,
    /// Take a free device.
    Connect {
        /// The driver.
        family: u16,
        /// The device; a free one without it.
        index: Option<u32>,
        /// The connection.
        socket: u32,
        /// What the server said.
        export: ExportInfo,
        /// Whose it is.
        backend: &'a str,
        /// How long it waits for another connection when it has none.
        dead_seconds: u64,
    },
    /// Go on with another connection.
    Reconnect {
        /// The driver.
        family: u16,
        /// The device.
        index: u32,
        /// The connection.
        socket: u32,
        /// Whose it must be.
        backend: &'a str,
    },
    /// Let go of it.
    Disconnect {
        /// The driver.
        family: u16,
        /// The device.
        index: u32,
    },
}

impl Order<'_> {
    /// The message.
    #[must_use]
    pub fn encode(&self, sequence: u32) -> Vec<u8> {
        let (family, command, attributes) = match *self {
            Self::Family => (GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0")),
            Self::Connect { family, index, socket, export, backend, dead_seconds } => {
                let mut all = index.map_or_else(Vec::new, |index| attribute(NBD_ATTR_INDEX, &index.to_ne_bytes()));
                all.extend(attribute(NBD_ATTR_SIZE_BYTES, &export.size_bytes.to_ne_bytes()));
                all.extend(attribute(NBD_ATTR_BLOCK_SIZE_BYTES, &BLOCK_BYTES.to_ne_bytes()));
                all.extend(attribute(NBD_ATTR_SERVER_FLAGS, &u64::from(export.flags).to_ne_bytes()));
                all.extend(attribute(NBD_ATTR_DEAD_CONN_TIMEOUT, &dead_seconds.to_ne_bytes()));
                all.extend(identifier(backend));
                all.extend(sockets(socket));
                (family, NBD_CMD_CONNECT, all)
            }
            Self::Reconnect { family, index, socket, backend } => {
                let mut all = attribute(NBD_ATTR_INDEX, &index.to_ne_bytes());
                all.extend(identifier(backend));
                all.extend(sockets(socket));
                (family, NBD_CMD_RECONFIGURE, all)
            }
            Self::Disconnect { family, index } => {
                (family, NBD_CMD_DISCONNECT, attribute(NBD_ATTR_INDEX, &index.to_ne_bytes()))
            }
        };
        let len_bytes = HEADER_BYTES + GENERIC_HEADER_BYTES + attributes.len();
        let mut message = Vec::with_capacity(len_bytes);
        message.extend((len_bytes as u32).to_ne_bytes());
        message.extend(family.to_ne_bytes());
        message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend(sequence.to_ne_bytes());
        // The kernel fills in who says it.
        message.extend([0; 4]);
        message.extend([command, 1, 0, 0]);
        message.extend(attributes);
        message
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len_bytes = ATTRIBUTE_HEADER_BYTES + value.len();
    let mut bytes = Vec::with_capacity(len_bytes.next_multiple_of(4));
    bytes.extend((len_bytes as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(len_bytes.next_multiple_of(4), 0);
    bytes
}

fn identifier(backend: &str) -> Vec<u8> {
    attribute(NBD_ATTR_BACKEND_IDENTIFIER, &[backend.as_bytes(), b"\0"].concat())
}

fn sockets(socket: u32) -> Vec<u8> {
    let number = attribute(NBD_SOCK_FD, &socket.to_ne_bytes());
    attribute(NBD_ATTR_SOCKETS | NLA_F_NESTED, &attribute(NBD_SOCK_ITEM | NLA_F_NESTED, &number))
}

/// What came of an order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It was carried out. The driver's number, or a device's, if that was asked for.
    Done(Option<u32>),
    /// It was not, for this error number.
    Refused(i32),
}

/// An answer that is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the kernel's answer is cut short")]
pub struct CutShort;

/// Collects the answer to one order.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    sequence: u32,
    number: Option<u32>,
}

impl Answer {
    /// To the order of this sequence number.
    #[must_use]
    pub fn new(sequence: u32) -> Self {
        Self { sequence, number: None }
    }

    /// Reads a datagram; nothing while there is more to come.
    pub fn handle_input(&mut self, mut datagram: &[u8]) -> Result<Option<Outcome>, CutShort> {
        while !datagram.is_empty() {
            let len_bytes = word(datagram, 0)? as usize;
            let message = datagram.get(..len_bytes).filter(|all| all.len() >= HEADER_BYTES).ok_or(CutShort)?;
            datagram = datagram.get(len_bytes.next_multiple_of(4)..).unwrap_or_default();
            if word(message, 8)? != self.sequence {
                continue;
            }
            if half(message, 4)? == NLMSG_ERROR {
                // Error numbers are negative here.
                let error = word(message, HEADER_BYTES)?.cast_signed();
                let done = Outcome::Done(self.number);
                return Ok(Some(if error == 0 { done } else { Outcome::Refused(error.saturating_neg()) }));
            }
            let attributes = message.get(HEADER_BYTES + GENERIC_HEADER_BYTES..).ok_or(CutShort)?;
            self.number = number(attributes)?.or(self.number);
        }
        Ok(None)
    }
}

/// The first attribute of type 1: the number of a family, and of a device.
fn number(mut attributes: &[u8]) -> Result<Option<u32>, CutShort> {
    const { assert!(CTRL_ATTR_FAMILY_ID == NBD_ATTR_INDEX) };
    while !attributes.is_empty() {
        let (len_bytes, kind) = (usize::from(half(attributes, 0)?), half(attributes, 2)? & NLA_TYPE_MASK);
        let value = attributes.get(ATTRIBUTE_HEADER_BYTES..len_bytes).ok_or(CutShort)?;
        match value.len() {
            2 if kind == CTRL_ATTR_FAMILY_ID => return half(value, 0).map(|id| Some(id.into())),
            4 if kind == NBD_ATTR_INDEX => return word(value, 0).map(Some),
            _ => attributes = attributes.get(len_bytes.next_multiple_of(4)..).unwrap_or_default(),
        }
    }
    Ok(None)
}

fn word(bytes: &[u8], at: usize) -> Result<u32, CutShort> {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(CutShort)?;
    Ok(u32::from_ne_bytes(*found))
}

fn half(bytes: &[u8], at: usize) -> Result<u16, CutShort> {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(CutShort)?;
    Ok(u16::from_ne_bytes(*found))
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;
    use crate::nbd::handshake::BlockSizes;
    use proptest::prelude::*;

    fn ack(sequence: u32, error: i32) -> Vec<u8> {
        let mut message = vec![36, 0, 0, 0, 2, 0, 0, 0];
        message.extend(sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(error.to_ne_bytes());
        message.extend([0; 16]);
        message
    }

    /// What a Linux answered to a question for the family `nlctrl`, which every kernel has, up to its operations.
    fn family(sequence: u32) -> Vec<u8> {
        let mut message = vec![60, 0, 0, 0, 16, 0, 0, 0];
        message.extend(sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend([1, 2, 0, 0]);
        message.extend(b"\x0b\0\x02\0nlctrl\0\0");
        message.extend(b"\x06\0\x01\0\x10\0\0\0");
        message.extend(b"\x08\0\x03\0\x02\0\0\0");
        message.extend(b"\x08\0\x04\0\0\0\0\0");
        message.extend(b"\x04\0\x06\0");
        message
    }

    #[test]
    fn orders_are_spelt_as_the_headers_say() {
        let asked = Order::Family.encode(7);
        assert_eq!(asked, b"\x1c\0\0\0\x10\0\x05\0\x07\0\0\0\0\0\0\0\x03\x01\0\0\x08\0\x02\0nbd\0");
        let again = Order::Reconnect { family: 0x1c, index: 3, socket: 9, backend: "w/disk0" }.encode(1);
        let wanted = b"\x38\0\0\0\x1c\0\x05\0\x01\0\0\0\0\0\0\0\x03\x01\0\0\
            \x08\0\x01\0\x03\0\0\0\
            \x0c\0\x0a\0w/disk0\0\
            \x10\0\x07\x80\x0c\0\x01\x80\x08\0\x01\0\x09\0\0\0";
        assert_eq!(again, wanted);
        let export = ExportInfo { size_bytes: 1 << 24, flags: 5, block_sizes: BlockSizes::default() };
        let first =
            Order::Connect { family: 28, index: None, socket: 9, export, backend: "w/disk0", dead_seconds: 600 }
                .encode(1);
        assert_eq!(word(&first, 0), Ok(first.len() as u32));
        for part in [
            &b"\x0c\0\x02\0\0\0\0\x01\0\0\0\0"[..],
            b"\x0c\0\x03\0\0\x02\0\0\0\0\0\0",
            b"\x0c\0\x05\0\x05\0\0\0\0\0\0\0",
            b"\x0c\0\x08\0\x58\x02\0\0\0\0\0\0",
        ] {
            assert!(first.windows(part.len()).any(|found| found == part), "{part:?} in {first:?}");
        }
        let last = Order::Disconnect { family: 28, index: 3 }.encode(2);
        assert_eq!(last[16..], *b"\x02\x01\0\0\x08\0\x01\0\x03\0\0\0");
    }

    #[test]
    fn an_answer_is_what_belongs_to_the_order_up_to_its_end() {
        let mut answer = Answer::new(4);
        assert_eq!(answer.handle_input(&ack(3, -16)), Ok(None), "of another order");
        assert_eq!(answer.handle_input(&family(4)), Ok(None));
        assert_eq!(answer.handle_input(&ack(4, 0)), Ok(Some(Outcome::Done(Some(16)))));
        let both = [family(4), ack(4, 0)].concat();
        assert_eq!(Answer::new(4).handle_input(&both), Ok(Some(Outcome::Done(Some(16)))));
        assert_eq!(Answer::new(4).handle_input(&ack(4, -28)), Ok(Some(Outcome::Refused(28))));
        assert_eq!(Answer::new(4).handle_input(&ack(4, 0)), Ok(Some(Outcome::Done(None))));
    }

    #[test]
    fn every_cut_of_an_answer_is_noticed() {
        let both = [family(4), ack(4, 0)].concat();
        for end in 1..both.len() {
            let said = Answer::new(4).handle_input(&both[..end]);
            assert!(said == Err(CutShort) || (end == 60 && said == Ok(None)), "{end}: {said:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic_or_hang(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = Answer::new(0).handle_input(&bytes);
        }
    }
}
