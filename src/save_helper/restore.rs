//! Makes a domain of an image.
//!
//! ```text
//! headers → static data, policy set → pages, parameters as they come ─┬ END ─────────────────────────┐
//!                                                                     └ CHECKPOINT → buffer, apply … ┤
//!        event channels, CPU state, grants ◀──────────────────────────────── or the primary is gone ◀┘
//! ```
//!
//! The pages of a plain image, and those up to the first checkpoint, are written as they arrive. From then on a
//! checkpoint is kept until libxl has read its part too, and then applied whole; one that never ends is dropped, and
//! the domain goes on from the last. Source: xen `tools/libs/guest/xg_sr_restore.c`.
//!
//! The trap: a stream that breaks may mean a dead primary, one that makes no sense may not: whoever sends nonsense is
//! alive, and two guests are worse than none. Only the first is a takeover.

use super::guest::{CpuPolicy, Target};
use super::streamer::Reader;
use super::{Calls, Failure};
use crate::image::helper::{Level, Message, RestoreJob, StreamType};
use crate::image::{DomainType, HvmParam, Item, Pages, Record};
use crate::page::PAGE_SIZE;
use std::collections::HashMap;
use std::io::{Read, Write};

const PARAM_STORE_PFN: u64 = 1;
const PARAM_STORE_EVTCHN: u32 = 2;
/// Written by Xen before 4.9; means nothing since.
const PARAM_PAE_ENABLED: u64 = 4;
const PARAM_IOREQ_PFN: u64 = 5;
const PARAM_BUFIOREQ_PFN: u64 = 6;
const PARAM_CONSOLE_PFN: u64 = 17;
const PARAM_CONSOLE_EVTCHN: u32 = 18;

const MISSING_CPUID: u32 = 1;
const MISSING_MSR: u32 = 2;

/// What a checkpoint may be larger than the guest as it is known, in bytes.
const CHECKPOINT_SLACK_BYTES: usize = 256 << 20;

/// Where the domain's rings are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rings {
    /// The xenstore ring.
    pub store_gfn: u64,
    /// The console ring.
    pub console_gfn: u64,
}

/// Restores `guest` from `stream`.
pub fn restore<T: Target, R: Read, W: Write>(
    job: &RestoreJob,
    guest: &mut T,
    calls: &mut Calls<R, W>,
    stream: impl Read + Send + 'static,
) -> Result<Rings, Failure> {
    if job.stream == StreamType::Colo {
        return Err(Failure::Unsupported("COLO under libxl is not done here; use xl-colo protect"));
    }
    let mut restorer = Restorer {
        job,
        guest,
        calls,
        reader: Reader::new(stream),
        populated: PfnSet::default(),
        policy: CpuPolicy::default(),
        verify: false,
        context: None,
        rings: Rings { store_gfn: 0, console_gfn: 0 },
    };
    restorer.read()?;
    restorer.finish()
}

struct Restorer<'a, T, R, W> {
    job: &'a RestoreJob,
    guest: &'a mut T,
    calls: &'a mut Calls<R, W>,
    reader: Reader,
    populated: PfnSet,
    policy: CpuPolicy,
    /// Pages are compared, not written.
    verify: bool,
    context: Option<Vec<u8>>,
    rings: Rings,
}

impl<T: Target, R: Read, W: Write> Restorer<'_, T, R, W> {
    fn read(&mut self) -> Result<(), Failure> {
        let mut checkpoints = 0_u64;
        let mut waiting = Waiting::default();
        loop {
            match self.reader.next() {
                Ok(Item::Record(Record::End)) => return Ok(()),
                Ok(Item::Record(Record::Checkpoint)) => {
                    if !self.checkpoint(checkpoints)? {
                        return Ok(());
                    }
                    for item in waiting.take() {
                        self.apply(item)?;
                    }
                    checkpoints += 1;
                    self.reader.go_on();
                }
                Ok(item) if checkpoints == 0 => self.apply(item)?,
                Ok(item) => {
                    let limit = self.populated.len().saturating_mul(PAGE_SIZE).saturating_add(CHECKPOINT_SLACK_BYTES);
                    waiting.push(item, limit)?;
                }
                Err(Failure::Stream { error, .. }) if checkpoints > 0 => {
                    let text = format!("the primary is gone ({error}); going on from checkpoint {checkpoints}");
                    self.calls.log(Level::Info, error.raw_os_error().unwrap_or(0), &text);
                    return Ok(());
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// libxl's part of a checkpoint. False: it is not whole, and the domain goes on from the one before.
    fn checkpoint(&mut self, before: u64) -> Result<bool, Failure> {
        if self.job.stream == StreamType::Plain {
            return Err(Failure::Incomplete("a checkpoint in a stream that should have none"));
        }
        let what = "read its part of the checkpoint";
        match self.calls.ask(&Message::Checkpoint, what)? {
            1 => Ok(true),
            2 if before > 0 => Ok(false),
            reply => Err(Failure::Declined { what, reply }),
        }
    }

    fn apply(&mut self, item: Item) -> Result<(), Failure> {
        let record = match item {
            Item::Image(_) => return Ok(()),
            Item::Domain(header) if header.kind == DomainType::Hvm => {
                let (major, minor) = header.xen;
                let text = format!("restoring domain {} from Xen {major}.{minor}", self.job.domid);
                self.calls.log(Level::Info, 0, &text);
                return Ok(());
            }
            Item::Domain(_) => return Err(Failure::Incomplete("it is a PV domain's, and this domain is not PV")),
            Item::Pages(pages) => return self.pages(pages),
            Item::Record(record) => record,
        };
        match record {
            Record::CpuidPolicy(leaves) => self.policy.leaves = leaves,
            Record::MsrPolicy(msrs) => self.policy.msrs = msrs,
            Record::StaticDataEnd => self.static_data_end()?,
            Record::TscInfo(tsc) => self.guest.set_tsc(&tsc)?,
            Record::HvmContext(context) => self.context = Some(context),
            Record::HvmParams(params) => {
                for param in params {
                    self.param(param)?;
                }
            }
            Record::Verify => self.verify = true,
            Record::Toolstack(_) => {}
            Record::DirtyPfnList(_) => return Err(Failure::Incomplete("COLO's way back, on the way there")),
            // The decoder has compared these with the domain header; END and CHECKPOINT do not get here.
            Record::PvInfo { .. }
            | Record::PvP2mFrames { .. }
            | Record::PvVcpu { .. }
            | Record::SharedInfo(_)
            | Record::End
            | Record::Checkpoint => {}
        }
        Ok(())
    }

    fn static_data_end(&mut self) -> Result<(), Failure> {
        let policy = std::mem::take(&mut self.policy);
        let mut missing = 0;
        if policy.leaves.is_empty() {
            missing |= MISSING_CPUID;
        }
        if policy.msrs.is_empty() {
            missing |= MISSING_MSR;
        }
        if missing != MISSING_CPUID | MISSING_MSR {
            self.guest.set_cpu_policy(&policy)?;
        }
        let message = Message::StaticDataDone { missing };
        if !self.calls.expects(&message) {
            return Ok(());
        }
        let what = "complete the CPU policy";
        match self.calls.ask(&message, what)? {
            0 => Ok(()),
            reply => Err(Failure::Declined { what, reply }),
        }
    }

    fn pages(&mut self, pages: Pages) -> Result<(), Failure> {
        let memory = pages.entries.iter().filter(|entry| entry.kind.is_memory()).map(|entry| entry.pfn);
        let new: Vec<_> = memory.filter(|pfn| self.populated.insert(*pfn)).collect();
        if !new.is_empty() {
            self.guest.populate(&new)?;
        }
        let contents = pages.entries.iter().filter(|entry| entry.kind.has_contents());
        let gfns: Vec<_> = contents.map(|entry| entry.pfn).collect();
        if self.verify {
            self.compare(&gfns, &pages.bytes)?;
        } else if !gfns.is_empty() {
            self.guest.write(&gfns, &pages.bytes)?;
        }
        self.reader.done_with(pages);
        Ok(())
    }

    /// A page that differs is said, and is no reason to stop: the sender asked for a comparison.
    fn compare(&mut self, gfns: &[u64], sent: &[u8]) -> Result<(), Failure> {
        let mut ours = Vec::new();
        self.guest.read(gfns, &mut ours)?;
        let pages = ours.chunks_exact(PAGE_SIZE).zip(sent.chunks_exact(PAGE_SIZE));
        for (gfn, _) in gfns.iter().zip(pages).filter(|(_, (ours, sent))| ours != sent) {
            self.calls.log(Level::Error, 0, &format!("page {gfn:#x} differs from the sender's"));
        }
        Ok(())
    }

    fn param(&mut self, param: HvmParam) -> Result<(), Failure> {
        let HvmParam { index, value } = param;
        match index {
            PARAM_PAE_ENABLED => return Ok(()),
            // Rings: what is in them was said to somebody on another host.
            PARAM_STORE_PFN | PARAM_CONSOLE_PFN | PARAM_IOREQ_PFN | PARAM_BUFIOREQ_PFN => {
                self.guest.clear_page(value)?;
            }
            _ => {}
        }
        match index {
            PARAM_STORE_PFN => self.rings.store_gfn = value,
            PARAM_CONSOLE_PFN => self.rings.console_gfn = value,
            _ => {}
        }
        let index = u32::try_from(index).map_err(|_| Failure::Incomplete("an HVM parameter that does not exist"))?;
        Ok(self.guest.set_hvm_param(index, value)?)
    }

    /// The domain is complete but for what is local to this host, and the state of its CPUs, which is last.
    fn finish(&mut self) -> Result<Rings, Failure> {
        let context = self.context.take().ok_or(Failure::Incomplete("it has no CPU state"))?;
        self.guest.set_hvm_param(PARAM_STORE_EVTCHN, self.job.store_port.into())?;
        self.guest.set_hvm_param(PARAM_CONSOLE_EVTCHN, self.job.console_port.into())?;
        self.guest.load_hvm_context(&context)?;
        let Rings { store_gfn, console_gfn } = self.rings;
        self.guest.seed_grants((console_gfn, self.job.console_domid), (store_gfn, self.job.store_domid))?;
        Ok(self.rings)
    }
}

/// A checkpoint that is not whole yet.
#[derive(Default)]
struct Waiting {
    items: Vec<Item>,
    bytes: usize,
}

impl Waiting {
    fn push(&mut self, item: Item, limit_bytes: usize) -> Result<(), Failure> {
        self.bytes += size_of::<Item>()
            + match &item {
                Item::Pages(pages) => pages.bytes.len() + size_of_val(&pages.entries[..]),
                Item::Record(Record::HvmContext(bytes) | Record::Toolstack(bytes)) => bytes.len(),
                Item::Record(Record::HvmParams(params)) => size_of_val(&params[..]),
                Item::Record(Record::DirtyPfnList(pfns)) => size_of_val(&pfns[..]),
                _ => 0,
            };
        if self.bytes > limit_bytes {
            return Err(Failure::Incomplete("one checkpoint is larger than the whole guest"));
        }
        self.items.push(item);
        Ok(())
    }

    fn take(&mut self) -> Vec<Item> {
        self.bytes = 0;
        std::mem::take(&mut self.items)
    }
}

/// Page numbers, which come from the sender and may be anything: memory is used for what is in it only.
#[derive(Default)]
struct PfnSet {
    chunks: HashMap<u64, [u64; 64]>,
    count: usize,
}

impl PfnSet {
    /// Adds a page; true when it is new.
    fn insert(&mut self, pfn: u64) -> bool {
        let words = self.chunks.entry(pfn >> 12).or_insert([0; 64]);
        let (word, bit) = ((pfn >> 6 & 63) as usize, 1 << (pfn & 63));
        let new = words[word] & bit == 0;
        words[word] |= bit;
        self.count += usize::from(new);
        new
    }

    fn len(&self) -> usize {
        self.count
    }
}
