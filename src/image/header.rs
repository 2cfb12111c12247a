//! The two headers of an image: 24 bytes that are always big-endian, and 16 that are the domain's.
//!
//! The trap: the marker is all ones so that a reader of the legacy format, which begins with the size of the p2m,
//! stops there; it must be checked, and not only the name behind it.

use super::ImageError;
use crate::page::PAGE_SIZE;
use bytes::{Buf, BufMut, BytesMut};

const MARKER: u64 = u64::MAX;
/// `XENF`.
const ID: u32 = 0x5845_4e46;
const OPTION_BIG_ENDIAN: u16 = 1;

/// The image header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImageHeader {
    /// The version of the records that follow: 2 or 3.
    pub version: u32,
}

impl ImageHeader {
    /// Its size in bytes.
    pub const BYTES: usize = 24;
    /// The version that is written.
    pub const VERSION: u32 = 3;

    /// Appends the header.
    pub fn encode(self, out: &mut BytesMut) {
        out.put_u64(MARKER);
        out.put_u32(ID);
        out.put_u32(self.version);
        out.put_u16(0);
        out.put_bytes(0, 6);
    }

    /// Reads a header.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, ImageError> {
        if bytes.len() != Self::BYTES {
            return Err(ImageError::NotAnImage("too short"));
        }
        if bytes.get_u64() != MARKER {
            return Err(ImageError::NotAnImage("the marker is missing; a stream of Xen 4.5 or older?"));
        }
        if bytes.get_u32() != ID {
            return Err(ImageError::NotAnImage("the name is not XENF"));
        }
        let version = bytes.get_u32();
        if !(2..=3).contains(&version) {
            return Err(ImageError::Version(version));
        }
        if bytes.get_u16() & OPTION_BIG_ENDIAN != 0 {
            return Err(ImageError::BigEndian);
        }
        Ok(Self { version })
    }
}

/// What kind of domain an image holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DomainType {
    /// Paravirtualised.
    Pv,
    /// HVM or PVH: to libxc they are one.
    Hvm,
}

/// The domain header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DomainHeader {
    /// What kind of domain it is.
    pub kind: DomainType,
    /// The Xen it ran on, (major, minor); major 0 means that a converter wrote the image.
    pub xen: (u32, u32),
}

impl DomainHeader {
    /// Its size in bytes.
    pub const BYTES: usize = 16;

    /// Appends the header.
    pub fn encode(self, out: &mut BytesMut) {
        out.put_u32_le(match self.kind {
            DomainType::Pv => 1,
            DomainType::Hvm => 2,
        });
        out.put_u16_le(PAGE_SIZE.trailing_zeros() as u16);
        out.put_u16_le(0);
        out.put_u32_le(self.xen.0);
        out.put_u32_le(self.xen.1);
    }

    /// Reads a header.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, ImageError> {
        if bytes.len() != Self::BYTES {
            return Err(ImageError::BadDomain("too short"));
        }
        let kind = match bytes.get_u32_le() {
            1 => DomainType::Pv,
            2 => DomainType::Hvm,
            _ => return Err(ImageError::BadDomain("neither PV nor HVM")),
        };
        if u32::from(bytes.get_u16_le()) != PAGE_SIZE.trailing_zeros() {
            return Err(ImageError::BadDomain("pages are not 4 KiB"));
        }
        bytes.advance(2);
        Ok(Self { kind, xen: (bytes.get_u32_le(), bytes.get_u32_le()) })
    }
}
