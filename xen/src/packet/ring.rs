//! Received frames in memory shared with the kernel (TPACKET_V3): no system call and no copy for each of them.
//!
//! ```text
//!   the kernel's ──── full, or RETIRE_MS after its first frame ───▶ ours ──── all its frames were seen ───▶ the kernel's
//!   (it fills the blocks in turn; when the next one is still ours, what comes is lost, and counted)
//! ```
//!
//! The trap: a frame in a block that is still being filled cannot be seen. One frame alone arrives up to [`RETIRE_MS`]
//! late, where `recvmsg` has it at once; who must see all that a guest has said before it was suspended must not use this.
//!
//! The block is ours while its status says so, and the kernel does not write to it then. What lies in it was written by
//! the kernel, yet every offset is checked before it is followed. A virtio-net header stands right before its frame.
//! Sources: linux `Documentation/networking/packet_mmap.rst`, `include/uapi/linux/if_packet.h`, `net/packet/af_packet.c`
//! (tpacket_rcv).

use super::offload::{HEADER_BYTES, VnetHeader};
use super::{Auxdata, set, tag, with_tag};
use std::ffi::c_int;
use std::io;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

/// Holds three frames of 64 KiB.
const BLOCK_BYTES: usize = 256 << 10;
/// As much as the other way's receive buffer.
const BLOCKS: usize = 32;
/// The kernel wants one; in this version frames take what they need.
const FRAME_BYTES: usize = 2048;
/// The shortest there is.
const RETIRE_MS: u32 = 1;

// linux/if_packet.h.
const PACKET_RX_RING: c_int = 5;
const PACKET_VERSION: c_int = 10;
const TPACKET_V3: c_int = 2;
const TP_STATUS_KERNEL: u32 = 0;
const TP_STATUS_USER: u32 = 1;

/// struct tpacket_block_desc, with the struct tpacket_hdr_v1 in it.
mod block {
    pub(super) const STATUS: usize = 8;
    pub(super) const FRAMES: usize = 12;
    pub(super) const FIRST: usize = 16;
}

/// struct tpacket3_hdr.
mod head {
    pub(super) const NEXT: usize = 0;
    pub(super) const CAPTURED: usize = 12;
    pub(super) const LENGTH: usize = 16;
    pub(super) const STATUS: usize = 20;
    pub(super) const MAC: usize = 24;
    pub(super) const VLAN_TCI: usize = 32;
    pub(super) const VLAN_TPID: usize = 36;
}

/// struct tpacket_req3.
#[repr(C)]
struct Request {
    block_bytes: u32,
    blocks: u32,
    frame_bytes: u32,
    frames: u32,
    retire_ms: u32,
    private_bytes: u32,
    features: u32,
}

/// What taking frames came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Taken {
    /// Frames seen, and frames that nobody can use.
    pub(super) frames: usize,
    /// Those that nobody can use: the kernel had no room for all of them, or told of nothing that is in its block.
    pub(super) unusable: u64,
}

/// A ring of blocks.
#[derive(Debug)]
pub(super) struct Ring {
    map: NonNull<u8>,
    /// The block that is ours next.
    current: usize,
    /// Frames of it not yet seen, and where the first of them is.
    left: u32,
    at: usize,
}

// SAFETY: the mapping belongs to the ring alone, and can be used from any thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Asks for a ring on a packet socket that has its virtio-net headers switched on, and is not bound yet.
    pub(super) fn new(fd: RawFd) -> io::Result<Self> {
        set(fd, libc::SOL_PACKET, PACKET_VERSION, &TPACKET_V3)?;
        let request = Request {
            block_bytes: BLOCK_BYTES as u32,
            blocks: BLOCKS as u32,
            frame_bytes: FRAME_BYTES as u32,
            frames: (BLOCK_BYTES / FRAME_BYTES * BLOCKS) as u32,
            retire_ms: RETIRE_MS,
            private_bytes: 0,
            features: 0,
        };
        set(fd, libc::SOL_PACKET, PACKET_RX_RING, &request)?;
        let (access, length) = (libc::PROT_READ | libc::PROT_WRITE, BLOCKS * BLOCK_BYTES);
        // SAFETY: a new mapping, wherever the kernel likes; the ring asked for above is of this length.
        let map = unsafe { libc::mmap(ptr::null_mut(), length, access, libc::MAP_SHARED, fd, 0) };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map = NonNull::new(map.cast()).ok_or_else(|| io::Error::other("a ring at address 0"))?;
        Ok(Self { map, current: 0, left: 0, at: 0 })
    }

    /// Shows up to `limit` frames to `each`, and gives back the blocks that were seen to their end.
    pub(super) fn take(&mut self, limit: usize, each: &mut dyn FnMut(&VnetHeader, &[u8])) -> Taken {
        let mut taken = Taken::default();
        while taken.frames < limit {
            if self.left == 0 && !self.open() {
                break;
            }
            taken.frames += 1;
            match frame_at(self.block(), self.at) {
                Some(Found { header, frame, tag, next }) => {
                    with_tag(header, frame, tag, each);
                    self.at += next;
                    self.left -= 1;
                }
                None => {
                    taken.unusable += 1;
                    match skip(self.block(), self.at) {
                        Some(next) => {
                            self.at += next;
                            self.left -= 1;
                        }
                        // Where the next one would be is not known.
                        None => {
                            taken.unusable += u64::from(self.left - 1);
                            self.left = 0;
                        }
                    }
                }
            }
            if self.left == 0 {
                self.give_back();
            }
        }
        taken
    }

    /// Whether there are frames in the current block, once it is ours.
    fn open(&mut self) -> bool {
        for _ in 0..BLOCKS {
            if self.status().load(Ordering::Acquire) & TP_STATUS_USER == 0 {
                return false;
            }
            let block = self.block();
            (self.left, self.at) = (number(block, block::FRAMES), number(block, block::FIRST) as usize);
            if self.left > 0 {
                return true;
            }
            self.give_back();
        }
        false
    }

    fn give_back(&mut self) {
        self.status().store(TP_STATUS_KERNEL, Ordering::Release);
        self.current = (self.current + 1) % BLOCKS;
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: inside the mapping, which lives as long as self, and aligned as a block is; both sides write it whole.
        unsafe { &*self.map.as_ptr().add(self.current * BLOCK_BYTES + block::STATUS).cast::<AtomicU32>() }
    }

    /// The current block. Only while it is ours.
    fn block(&self) -> &[u8] {
        // SAFETY: inside the mapping, which lives as long as self. Callers have seen the block's status, and nobody writes
        // to it until `give_back`, for which self is borrowed mutably.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.current * BLOCK_BYTES), BLOCK_BYTES) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` at this length, and nothing borrowed from it outlives self.
        unsafe { libc::munmap(self.map.as_ptr().cast(), BLOCKS * BLOCK_BYTES) };
    }
}

/// A frame in a block.
#[derive(PartialEq, Eq, Debug)]
struct Found<'a> {
    header: VnetHeader,
    frame: &'a [u8],
    tag: Option<[u8; 4]>,
    /// From this one's head to the next one's.
    next: usize,
}

/// The frame whose head is at `at`, if it is whole.
fn frame_at(block: &[u8], at: usize) -> Option<Found<'_>> {
    let head = block.get(at..)?;
    let (captured, length) = (four(head, head::CAPTURED)?, four(head, head::LENGTH)?);
    let mac = usize::from(two(head, head::MAC)?);
    let header = head.get(mac.checked_sub(HEADER_BYTES)?..mac)?.first_chunk()?;
    let frame = head.get(mac..)?.get(..captured as usize)?;
    let auxdata = Auxdata {
        status: four(head, head::STATUS)?,
        // The kernel fills a whole word, and the tag's number is the lower half of it.
        vlan_tci: four(head, head::VLAN_TCI)? as u16,
        vlan_tpid: two(head, head::VLAN_TPID)?,
        ..Auxdata::default()
    };
    let found = Found { header: VnetHeader::parse(header), frame, tag: tag(&auxdata), next: skip(block, at)? };
    (captured == length).then_some(found)
}

/// How far it is from the head at `at` to the next one; the last one of a block says 0.
fn skip(block: &[u8], at: usize) -> Option<usize> {
    Some(four(block.get(at..)?, head::NEXT)? as usize)
}

fn four(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn two(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Of a whole block's head.
fn number(block: &[u8], at: usize) -> u32 {
    four(block, at).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block with one frame of `captured` bytes out of `length`, whose Ethernet header is `mac` behind its head.
    fn with_frame(mac: u16, captured: u32, length: u32) -> Vec<u8> {
        let mut block: Vec<u8> = (0..400_u32).map(|n| n as u8).collect();
        let mut put = |at: usize, bytes: &[u8]| block[48 + at..48 + at + bytes.len()].copy_from_slice(bytes);
        put(head::NEXT, &96_u32.to_ne_bytes());
        put(head::CAPTURED, &captured.to_ne_bytes());
        put(head::LENGTH, &length.to_ne_bytes());
        put(head::STATUS, &((1_u32 << 4) | (1 << 6)).to_ne_bytes());
        put(head::MAC, &mac.to_ne_bytes());
        put(head::VLAN_TCI, &0x2005_u32.to_ne_bytes());
        put(head::VLAN_TPID, &0x88a8_u16.to_ne_bytes());
        block
    }

    #[test]
    fn a_frame_is_where_its_head_says_and_its_header_before_it() {
        let block = with_frame(82, 60, 60);
        let found = frame_at(&block, 48).expect("a frame");
        assert_eq!(found.frame, &block[48 + 82..][..60]);
        assert_eq!(found.header, VnetHeader::parse(block[48 + 72..].first_chunk().expect("ten bytes")));
        assert_eq!((found.tag, found.next), (Some([0x88, 0xa8, 0x20, 5]), 96));
    }

    #[test]
    fn what_leads_out_of_the_block_is_not_followed() {
        for (mac, captured, length) in [(9, 60, 60), (82, 400, 400), (u16::MAX, 60, 60), (82, u32::MAX, u32::MAX)] {
            assert_eq!(frame_at(&with_frame(mac, captured, length), 48), None, "{mac} {captured} {length}");
        }
        assert_eq!(frame_at(&with_frame(82, 60, 61), 48), None, "cut short by the kernel");
        let block = with_frame(82, 60, 60);
        for at in [397, 400, 500, usize::MAX] {
            assert_eq!((frame_at(&block, at), skip(&block, at)), (None, None), "{at}");
        }
    }
}
