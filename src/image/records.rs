//! Every record of an image but PAGE_DATA, which is read in pieces and has a file of its own.
//!
//! | record | says |
//! |---|---|
//! | CPUID_POLICY, MSR_POLICY, PV_INFO, STATIC_DATA_END | what the domain needs of a host, before any memory |
//! | TSC_INFO, HVM_CONTEXT, HVM_PARAMS | the state of an HVM or PVH domain outside its memory |
//! | P2M_FRAMES, VCPU_*, SHARED_INFO | the same of a PV domain |
//! | VERIFY, CHECKPOINT, END | the pages that follow are compared; a consistent state; the last one |
//! | DIRTY_PFN_LIST | COLO's way back: what a secondary has written |
//!
//! The trap: senders before Xen 4.9 write HVM_PARAMS and VCPU_* records with nothing in them. They mean nothing, and
//! are not an error.

use super::{ImageError, RECORD_MAX_BYTES};
use crate::page::PAGE_SIZE;
use crate::record::{self, Header};
use bytes::{Buf, BufMut, BytesMut};

const END: u32 = 0x00;
const PV_INFO: u32 = 0x02;
const PV_P2M_FRAMES: u32 = 0x03;
const PV_VCPU_BASIC: u32 = 0x04;
const PV_VCPU_EXTENDED: u32 = 0x05;
const PV_VCPU_XSAVE: u32 = 0x06;
const SHARED_INFO: u32 = 0x07;
const TSC_INFO: u32 = record::X86_TSC_INFO;
const HVM_CONTEXT: u32 = record::HVM_CONTEXT;
const HVM_PARAMS: u32 = record::HVM_PARAMS;
const TOOLSTACK: u32 = 0x0B;
const PV_VCPU_MSRS: u32 = 0x0C;
const VERIFY: u32 = 0x0D;
const DIRTY_PFN_LIST: u32 = 0x0F;
const STATIC_DATA_END: u32 = 0x10;
const CPUID_POLICY: u32 = 0x11;
const MSR_POLICY: u32 = 0x12;

/// Bytes of the vcpu's number, and what is reserved beside it.
const VCPU_BYTES: usize = 8;

/// How a domain's time stamp counter is kept (`XEN_DOMCTL_gettscinfo`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TscInfo {
    /// `TSC_MODE_*`.
    pub mode: u32,
    /// Frequency in kHz.
    pub khz: u32,
    /// Elapsed time in ns.
    pub nsec: u64,
    /// How often the domain has been moved.
    pub incarnation: u32,
}

/// An `HVM_PARAM_*` of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HvmParam {
    /// Which one.
    pub index: u64,
    /// Its value.
    pub value: u64,
}

/// A model-specific register of a CPU policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Msr {
    /// Which one.
    pub index: u32,
    /// Zero so far.
    pub flags: u32,
    /// Its value.
    pub value: u64,
}

/// Which part of a PV vcpu's state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VcpuPart {
    /// `vcpu_guest_context`.
    Basic,
    /// `ext_vcpucontext`.
    Extended,
    /// `vcpuextstate`.
    Xsave,
    /// MSRs.
    Msrs,
}

/// A record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// The image is over.
    End,
    /// How a PV guest counts.
    PvInfo {
        /// Bytes of a word: 4 or 8.
        guest_width: u8,
        /// Levels of its page tables: 3 or 4.
        pt_levels: u8,
    },
    /// Where a PV guest's p2m is.
    PvP2mFrames {
        /// First page described.
        start_pfn: u32,
        /// Last page described.
        end_pfn: u32,
        /// The p2m's own pages.
        frames: Vec<u64>,
    },
    /// A part of a PV vcpu.
    PvVcpu {
        /// Which part.
        part: VcpuPart,
        /// Of which vcpu.
        vcpu: u32,
        /// The part, as Xen gave it.
        state: Vec<u8>,
    },
    /// A PV guest's shared info page.
    SharedInfo(Vec<u8>),
    /// The time stamp counter.
    TscInfo(TscInfo),
    /// What `XEN_DOMCTL_gethvmcontext` gave.
    HvmContext(Vec<u8>),
    /// Parameters of an HVM domain; may be empty.
    HvmParams(Vec<HvmParam>),
    /// No longer written by anybody.
    Toolstack(Vec<u8>),
    /// The pages that follow are to be compared and not written.
    Verify,
    /// Everything up to here is one consistent state; the descriptor is the outer layer's now.
    Checkpoint,
    /// Pages a COLO secondary has written.
    DirtyPfnList(Vec<u64>),
    /// The static records are complete.
    StaticDataEnd,
    /// CPUID leaves: leaf, subleaf, a, b, c, d.
    CpuidPolicy(Vec<[u32; 6]>),
    /// MSRs of the CPU policy.
    MsrPolicy(Vec<Msr>),
}

/// Most bytes that a record of this type may have, or `None` for a type that is unknown.
#[must_use]
pub fn limit_bytes(record: u32) -> Option<usize> {
    Some(match record {
        END | VERIFY | record::CHECKPOINT | STATIC_DATA_END => 0,
        PV_INFO => 8,
        TSC_INFO => 24,
        SHARED_INFO => PAGE_SIZE,
        PV_VCPU_EXTENDED => VCPU_BYTES + 128,
        record::PAGE_DATA
        | PV_P2M_FRAMES
        | PV_VCPU_BASIC
        | PV_VCPU_XSAVE
        | HVM_CONTEXT
        | HVM_PARAMS
        | TOOLSTACK
        | PV_VCPU_MSRS
        | DIRTY_PFN_LIST
        | CPUID_POLICY
        | MSR_POLICY => RECORD_MAX_BYTES,
        _ => return None,
    })
}

impl Record {
    /// Its type on the wire.
    #[must_use]
    pub fn kind(&self) -> u32 {
        match self {
            Self::End => END,
            Self::PvInfo { .. } => PV_INFO,
            Self::PvP2mFrames { .. } => PV_P2M_FRAMES,
            Self::PvVcpu { part: VcpuPart::Basic, .. } => PV_VCPU_BASIC,
            Self::PvVcpu { part: VcpuPart::Extended, .. } => PV_VCPU_EXTENDED,
            Self::PvVcpu { part: VcpuPart::Xsave, .. } => PV_VCPU_XSAVE,
            Self::PvVcpu { part: VcpuPart::Msrs, .. } => PV_VCPU_MSRS,
            Self::SharedInfo(_) => SHARED_INFO,
            Self::TscInfo(_) => TSC_INFO,
            Self::HvmContext(_) => HVM_CONTEXT,
            Self::HvmParams(_) => HVM_PARAMS,
            Self::Toolstack(_) => TOOLSTACK,
            Self::Verify => VERIFY,
            Self::Checkpoint => record::CHECKPOINT,
            Self::DirtyPfnList(_) => DIRTY_PFN_LIST,
            Self::StaticDataEnd => STATIC_DATA_END,
            Self::CpuidPolicy(_) => CPUID_POLICY,
            Self::MsrPolicy(_) => MSR_POLICY,
        }
    }

    /// Whether only PV domains have it (`Some(true)`), only HVM domains (`Some(false)`), or both.
    #[must_use]
    pub fn is_pv(&self) -> Option<bool> {
        match self {
            Self::PvInfo { .. } | Self::PvP2mFrames { .. } | Self::PvVcpu { .. } | Self::SharedInfo(_) => Some(true),
            Self::HvmContext(_) | Self::HvmParams(_) => Some(false),
            _ => None,
        }
    }

    /// Whether it belongs before STATIC_DATA_END (which itself does).
    #[must_use]
    pub fn is_static(&self) -> bool {
        matches!(self, Self::PvInfo { .. } | Self::StaticDataEnd | Self::CpuidPolicy(_) | Self::MsrPolicy(_))
    }

    /// Appends the record. Its body must fit into [`RECORD_MAX_BYTES`].
    pub fn encode(&self, out: &mut BytesMut) {
        let mut body = BytesMut::new();
        match self {
            Self::End | Self::Verify | Self::Checkpoint | Self::StaticDataEnd => {}
            Self::PvInfo { guest_width, pt_levels } => {
                body.put_slice(&[*guest_width, *pt_levels]);
                body.put_bytes(0, 6);
            }
            Self::PvP2mFrames { start_pfn, end_pfn, frames } => {
                body.put_u32_le(*start_pfn);
                body.put_u32_le(*end_pfn);
                frames.iter().for_each(|frame| body.put_u64_le(*frame));
            }
            Self::PvVcpu { vcpu, state, .. } => {
                body.put_u32_le(*vcpu);
                body.put_u32_le(0);
                body.put_slice(state);
            }
            Self::SharedInfo(bytes) | Self::HvmContext(bytes) | Self::Toolstack(bytes) => body.put_slice(bytes),
            Self::TscInfo(tsc) => {
                body.put_u32_le(tsc.mode);
                body.put_u32_le(tsc.khz);
                body.put_u64_le(tsc.nsec);
                body.put_u32_le(tsc.incarnation);
                body.put_u32_le(0);
            }
            Self::HvmParams(params) => {
                record::put_count(params.len(), &mut body);
                for param in params {
                    body.put_u64_le(param.index);
                    body.put_u64_le(param.value);
                }
            }
            Self::DirtyPfnList(pfns) => pfns.iter().for_each(|pfn| body.put_u64_le(*pfn)),
            Self::CpuidPolicy(leaves) => leaves.iter().flatten().for_each(|word| body.put_u32_le(*word)),
            Self::MsrPolicy(msrs) => {
                for msr in msrs {
                    body.put_u32_le(msr.index);
                    body.put_u32_le(msr.flags);
                    body.put_u64_le(msr.value);
                }
            }
        }
        record::put(self.kind(), &body, out);
    }

    /// Reads the body of a record.
    pub fn decode(header: Header, body: &[u8]) -> Result<Self, ImageError> {
        let bad = |why| ImageError::BadRecord { record: header.record, len_bytes: body.len(), why };
        let exactly = |bytes: usize| if body.len() == bytes { Ok(body) } else { Err(bad("not its type's length")) };
        let vcpu = |part| {
            let (mut head, state) = body.split_at_checked(VCPU_BYTES).ok_or(bad("no vcpu"))?;
            Ok(Self::PvVcpu { part, vcpu: head.get_u32_le(), state: state.to_vec() })
        };
        Ok(match header.record {
            END => exactly(0).map(|_| Self::End)?,
            VERIFY => exactly(0).map(|_| Self::Verify)?,
            record::CHECKPOINT => exactly(0).map(|_| Self::Checkpoint)?,
            STATIC_DATA_END => exactly(0).map(|_| Self::StaticDataEnd)?,
            PV_INFO => match exactly(8)? {
                [guest_width @ (4 | 8), pt_levels @ (3 | 4), ..] => {
                    Self::PvInfo { guest_width: *guest_width, pt_levels: *pt_levels }
                }
                _ => return Err(bad("neither a 32-bit guest nor a 64-bit one")),
            },
            PV_P2M_FRAMES => {
                let (mut head, frames) = body.split_at_checked(8).ok_or(bad("no range"))?;
                let (start_pfn, end_pfn) = (head.get_u32_le(), head.get_u32_le());
                if start_pfn > end_pfn {
                    return Err(bad("a range that ends before it begins"));
                }
                Self::PvP2mFrames { start_pfn, end_pfn, frames: words(frames).ok_or(bad("a torn entry"))? }
            }
            PV_VCPU_BASIC => vcpu(VcpuPart::Basic)?,
            PV_VCPU_EXTENDED => vcpu(VcpuPart::Extended)?,
            PV_VCPU_XSAVE => vcpu(VcpuPart::Xsave)?,
            PV_VCPU_MSRS => vcpu(VcpuPart::Msrs)?,
            SHARED_INFO => Self::SharedInfo(exactly(PAGE_SIZE)?.to_vec()),
            TSC_INFO => {
                let mut body = exactly(24)?;
                Self::TscInfo(TscInfo {
                    mode: body.get_u32_le(),
                    khz: body.get_u32_le(),
                    nsec: body.get_u64_le(),
                    incarnation: body.get_u32_le(),
                })
            }
            HVM_CONTEXT if body.is_empty() => return Err(bad("empty")),
            HVM_CONTEXT => Self::HvmContext(body.to_vec()),
            HVM_PARAMS => {
                let (entries, rest) = record::take_entries::<16>(body).map_err(bad)?;
                if !rest.is_empty() {
                    return Err(bad("longer than its count"));
                }
                let param = |mut entry: &[u8]| HvmParam { index: entry.get_u64_le(), value: entry.get_u64_le() };
                Self::HvmParams(entries.iter().map(|entry| param(entry)).collect())
            }
            TOOLSTACK => Self::Toolstack(body.to_vec()),
            DIRTY_PFN_LIST => Self::DirtyPfnList(words(body).ok_or(bad("a torn entry"))?),
            CPUID_POLICY => {
                let (leaves, []) = body.as_chunks::<24>() else { return Err(bad("a torn entry")) };
                let leaf = |mut leaf: &[u8]| std::array::from_fn(|_| leaf.get_u32_le());
                Self::CpuidPolicy(leaves.iter().map(|entry| leaf(entry)).collect())
            }
            MSR_POLICY => {
                let (msrs, []) = body.as_chunks::<16>() else { return Err(bad("a torn entry")) };
                let msr =
                    |mut msr: &[u8]| Msr { index: msr.get_u32_le(), flags: msr.get_u32_le(), value: msr.get_u64_le() };
                Self::MsrPolicy(msrs.iter().map(|entry| msr(entry)).collect())
            }
            unknown => return Err(ImageError::UnknownRecord(unknown)),
        })
    }
}

/// 64-bit words, or `None` when the last is torn.
fn words(bytes: &[u8]) -> Option<Vec<u64>> {
    let (words, []) = bytes.as_chunks::<8>() else { return None };
    Some(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}
