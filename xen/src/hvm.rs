//! The HVM context blob, taken apart without Xen, and the HVM parameters that a copy needs.
//!
//! ```text
//! { type u16, instance u16, length u32, length bytes } …   HEADER first, END (length 0) last, nothing behind it
//! ```
//!
//! The trap: a CPU_MSR record names only MSRs that are not zero, there is none when all are, and the loader never
//! resets those that are missing. Whoever loads a context over another must name the ones that went back to zero:
//! [`complete_msrs`]. Layouts are those of xen/arch-x86/hvm/save.h; reference 2.6, 2.7.

use std::collections::{BTreeMap, BTreeSet};

/// Ends the blob.
pub const END: u16 = 0;
/// Begins it: magic, version, changeset, processor, TSC rate.
pub const HEADER: u16 = 1;
/// Registers of a processor that is up.
pub const CPU: u16 = 2;
/// Extended state of a processor.
pub const CPU_XSAVE: u16 = 16;
/// MSRs of a processor that are not zero.
pub const CPU_MSR: u16 = 20;

const MAGIC: u32 = 0x5438_1286;
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;
const CPU_BYTES: usize = 1032;
const DESCRIPTOR: usize = 8;
/// Entries of a CPU_MSR record. Xen knows about a dozen.
const MSRS_MAX: usize = 1024;
const MSR_BYTES: usize = 16;

/// HVM parameters that go to a copy if they are not zero, in sending order: store ring page, device model's request
/// pages, rings of paging, monitor and sharing, VM86 TSS, console ring page, ACPI ports, Viridian, identity page table,
/// generation id, ioreq server pages, FIP width, MCA.
pub const PARAMS: [u32; 16] = [1, 5, 6, 27, 28, 29, 37, 17, 19, 9, 12, 34, 32, 33, 36, 38];

/// Of [`PARAMS`], those that must not be written again into a domain that has been loaded before: the ring pages, which
/// are the copy's own, and the ioreq server pages, whose number marks them as free even while a device model uses them.
pub const PARAMS_ONCE: [u32; 8] = [1, 5, 6, 17, 27, 28, 29, 33];

/// A page that libxc gave the domain and that describes its own host: rings, request pages, the identity page table.
/// Never copied.
pub const fn is_special_gfn(gfn: u64) -> bool {
    matches!(gfn, 0xf_eff0..=0xf_efff)
}

/// Whether a parameter can be set in a domain that has been loaded before.
pub fn is_reloadable(param: u32) -> bool {
    PARAMS.contains(&param) && !PARAMS_ONCE.contains(&param)
}

/// Why a blob is no HVM context.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ContextError {
    /// It ends inside of a record.
    #[error("cut off at byte {0}")]
    Truncated(usize),
    /// The first record is not the header of this version.
    #[error("it does not begin with a header")]
    NoHeader,
    /// A second header.
    #[error("a second header at byte {0}")]
    SecondHeader(usize),
    /// Bytes behind the end, or an end that is not empty.
    #[error("bytes behind the end, at byte {0}")]
    Trailing(usize),
    /// A record has a length that its type cannot have.
    #[error("record of type {kind}, instance {instance} has {length} bytes")]
    Length {
        /// Its type.
        kind: u16,
        /// Which of that type.
        instance: u16,
        /// Its bytes.
        length: usize,
    },
    /// There is no processor that is up.
    #[error("no processor is up")]
    NoCpu,
}

/// One record of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record<'a> {
    /// Its type: [`CPU`] and its neighbours.
    pub kind: u16,
    /// Which of that type: the processor's number, mostly.
    pub instance: u16,
    /// What is in it.
    pub body: &'a [u8],
}

impl Record<'_> {
    fn check(&self) -> Result<(), ContextError> {
        let length = self.body.len();
        let right = match self.kind {
            HEADER => length == HEADER_BYTES,
            CPU => length == CPU_BYTES,
            CPU_MSR => msrs(self.body).is_some(),
            _ => true,
        };
        if right { Ok(()) } else { Err(ContextError::Length { kind: self.kind, instance: self.instance, length }) }
    }

    fn write(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.kind.to_le_bytes());
        into.extend_from_slice(&self.instance.to_le_bytes());
        // Bodies come from a blob or are made of MSRS_MAX entries at most.
        into.extend_from_slice(&(self.body.len() as u32).to_le_bytes());
        into.extend_from_slice(self.body);
    }
}

/// A blob that has been walked from end to end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Context<'a> {
    records: Vec<Record<'a>>,
}

impl<'a> Context<'a> {
    /// Walks a blob. What a record says is not judged, except for the lengths that matter here.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(blob: &'a [u8]) -> Result<Self, ContextError> {
        let mut records = Vec::new();
        let mut at = 0;
        loop {
            let Some((descriptor, rest)) = blob.get(at..).and_then(<[u8]>::split_first_chunk::<DESCRIPTOR>) else {
                return Err(ContextError::Truncated(at));
            };
            let [k0, k1, i0, i1, length @ ..] = *descriptor;
            let length = u32::from_le_bytes(length) as usize;
            let Some(body) = rest.get(..length) else { return Err(ContextError::Truncated(at)) };
            let record = Record { kind: u16::from_le_bytes([k0, k1]), instance: u16::from_le_bytes([i0, i1]), body };
            if (at == 0) != (record.kind == HEADER) {
                return Err(if at == 0 { ContextError::NoHeader } else { ContextError::SecondHeader(at) });
            }
            record.check()?;
            if at == 0 && (word(body, 0) != Some(MAGIC) || word(body, 4) != Some(VERSION)) {
                return Err(ContextError::NoHeader);
            }
            at += DESCRIPTOR + length;
            if record.kind == END {
                if length != 0 || at != blob.len() {
                    return Err(ContextError::Trailing(at - length));
                }
                break;
            }
            records.push(record);
        }
        if !records.iter().any(|record| record.kind == CPU) {
            return Err(ContextError::NoCpu);
        }
        Ok(Self { records })
    }

    /// Every record but the end, in order.
    pub fn records(&self) -> &[Record<'a>] {
        &self.records
    }

    /// Rate of the TSC that the header gives, in kHz.
    pub fn tsc_khz(&self) -> Option<u32> {
        word(self.records.first()?.body, 20)
    }
}

/// The MSRs that a domain's contexts have named so far, by processor.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct MsrSet(BTreeMap<u16, BTreeSet<u32>>);

/// The same context with an explicit zero for every MSR that an earlier one named and this one does not; adds what this
/// one names to `known`. A blob that is no context comes back as it is: whoever loads it will say so.
pub fn complete_msrs(blob: &[u8], known: &mut MsrSet) -> Vec<u8> {
    let Ok(context) = Context::parse(blob) else { return blob.to_vec() };
    let mut out = Vec::with_capacity(blob.len() + 256);
    let mut named: BTreeSet<u16> = BTreeSet::new();
    for record in context.records() {
        match msrs(record.body).filter(|_| record.kind == CPU_MSR) {
            None => record.write(&mut out),
            Some(entries) => {
                named.insert(record.instance);
                with_zeros(record.instance, &entries, known).write_to(&mut out);
            }
        }
    }
    // Processors that had some and have none now: their record is missing. Only those that are up may have one.
    for cpu in context.records().iter().filter(|record| record.kind == CPU) {
        if !named.contains(&cpu.instance) && known.0.get(&cpu.instance).is_some_and(|set| !set.is_empty()) {
            with_zeros(cpu.instance, &[], known).write_to(&mut out);
        }
    }
    Record { kind: END, instance: 0, body: &[] }.write(&mut out);
    out
}

struct MsrRecord {
    instance: u16,
    body: Vec<u8>,
}

impl MsrRecord {
    fn write_to(&self, out: &mut Vec<u8>) {
        Record { kind: CPU_MSR, instance: self.instance, body: &self.body }.write(out);
    }
}

/// The entries, and a zero for each MSR known and not among them.
fn with_zeros(instance: u16, entries: &[(u32, u64)], known: &mut MsrSet) -> MsrRecord {
    let set = known.0.entry(instance).or_default();
    let present: BTreeSet<u32> = entries.iter().map(|(index, _)| *index).collect();
    let zeros = set.difference(&present).map(|index| (*index, 0));
    let all: Vec<(u32, u64)> = entries.iter().copied().chain(zeros).take(MSRS_MAX).collect();
    set.extend(present);
    let mut body = Vec::with_capacity(8 + all.len() * MSR_BYTES);
    // The entries of hvm_msr are of 8-byte alignment: 4 bytes of padding follow the count.
    body.extend_from_slice(&(all.len() as u32).to_le_bytes());
    body.extend_from_slice(&[0; 4]);
    for (index, value) in all {
        body.extend_from_slice(&index.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(&value.to_le_bytes());
    }
    MsrRecord { instance, body }
}

/// The entries of a CPU_MSR record, if it is one.
fn msrs(body: &[u8]) -> Option<Vec<(u32, u64)>> {
    let count = word(body, 0)? as usize;
    if count > MSRS_MAX || body.len() != 8 + count * MSR_BYTES {
        return None;
    }
    let entries = body[8..].chunks_exact(MSR_BYTES);
    entries.map(|entry| Some((word(entry, 0)?, u64::from_le_bytes(entry[8..].try_into().ok()?)))).collect()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
