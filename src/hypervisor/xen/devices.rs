//! What of a domain is not in its pages: TSC, HVM context, HVM parameters, and its device model's state.
//!
//! ```text
//! X86_TSC_INFO │ HVM_CONTEXT │ HVM_PARAMS │ EMULATOR_CONTEXT (with a device model)
//! ```
//!
//! The first three are the records of libxc's own stream (xen `tools/libs/guest/xg_sr_save_x86_hvm.c`). Two traps at
//! loading: parameters come before the context; and the CPU_MSR record leaves out what is zero, which the loader
//! never resets, so what was once set is written as zero.

use crate::hypervisor::DomainError;
use crate::hypervisor::xen::xen_error;
use crate::record;
use ::xen::hvm::{self, MsrSet};
use ::xen::{DomId, Interface, TscInfo};

const TSC_INFO_BYTES: usize = 24;
/// Parameters accepted; Xen has 39.
const PARAMS_MAX: usize = 64;

/// Device state, apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Devices {
    tsc: TscInfo,
    context: Vec<u8>,
    params: Vec<(u32, u64)>,
    /// QEMU's.
    pub(super) emulator: Option<Vec<u8>>,
}

impl Devices {
    /// The state of a domain that stands still, without its device model's.
    pub(super) fn of(xen: &Interface, domid: DomId) -> Result<Self, DomainError> {
        let mut params = Vec::new();
        for index in hvm::PARAMS {
            let value = xen.hvm_param(domid, index).map_err(xen_error)?;
            if value != 0 {
                params.push((index, value));
            }
        }
        let tsc = xen.tsc_info(domid).map_err(xen_error)?;
        let context = xen.hvm_context(domid).map_err(xen_error)?;
        Ok(Self { tsc, context, params, emulator: None })
    }

    /// As a run of records.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut run = Vec::with_capacity(self.context.len() + self.emulator.as_ref().map_or(0, Vec::len) + 512);
        let mut tsc = Vec::with_capacity(TSC_INFO_BYTES);
        tsc.extend(self.tsc.mode.to_le_bytes());
        tsc.extend(self.tsc.khz.to_le_bytes());
        tsc.extend(self.tsc.nsec.to_le_bytes());
        tsc.extend(self.tsc.incarnation.to_le_bytes());
        tsc.extend([0; 4]);
        record::put(record::X86_TSC_INFO, &tsc, &mut run);
        record::put(record::HVM_CONTEXT, &self.context, &mut run);
        let mut params = Vec::with_capacity(8 + self.params.len() * 16);
        params.extend((self.params.len() as u32).to_le_bytes());
        params.extend([0; 4]);
        for (index, value) in &self.params {
            params.extend(u64::from(*index).to_le_bytes());
            params.extend(value.to_le_bytes());
        }
        record::put(record::HVM_PARAMS, &params, &mut run);
        if let Some(emulator) = &self.emulator {
            record::put(record::EMULATOR_CONTEXT, emulator, &mut run);
        }
        run
    }

    /// From a run of records that a peer sent. Nothing is believed: a context that Xen would refuse half-way leaves
    /// a domain with its vcpus down.
    pub(super) fn decode(run: &[u8]) -> Result<Self, DomainError> {
        let bad = |what: &str| DomainError::BadDeviceState(what.to_owned());
        let tsc: &[u8; TSC_INFO_BYTES] =
            record::find(run, record::X86_TSC_INFO)?.try_into().map_err(|_| bad("TSC_INFO is not 24 bytes"))?;
        let word = |at: usize| u32::from_le_bytes([tsc[at], tsc[at + 1], tsc[at + 2], tsc[at + 3]]);
        let nsec = u64::from(word(8)) | u64::from(word(12)) << 32;
        let tsc = TscInfo { mode: word(0), khz: word(4), nsec, incarnation: word(16) };
        let context = record::find(run, record::HVM_CONTEXT)?.to_vec();
        hvm::Context::parse(&context).map_err(|e| DomainError::BadDeviceState(e.to_string()))?;
        let body = record::find(run, record::HVM_PARAMS)?;
        let (head, list) = body.split_at_checked(8).ok_or(bad("HVM_PARAMS is cut short"))?;
        let count = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if count > PARAMS_MAX || list.len() != count * 16 {
            return Err(bad("HVM_PARAMS has another length than its count says"));
        }
        let mut params = Vec::with_capacity(count);
        for entry in list.as_chunks::<16>().0 {
            let (index, value) = entry.split_at(8);
            let number = |half: &[u8]| half.iter().rev().fold(0_u64, |acc, byte| acc << 8 | u64::from(*byte));
            let index = u32::try_from(number(index)).map_err(|_| bad("HVM_PARAMS names a parameter that is none"))?;
            params.push((index, number(value)));
        }
        let emulator = match record::find(run, record::EMULATOR_CONTEXT) {
            Ok(state) => Some(state.to_vec()),
            Err(record::RecordError::Missing(_)) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self { tsc, context, params, emulator })
    }

    /// Puts everything but the device model's state into a domain. Rings and ioreq pages are this host's own, and
    /// their parameters with them.
    pub(super) fn load(&self, xen: &Interface, domid: DomId, msrs: &mut MsrSet) -> Result<(), DomainError> {
        for (index, value) in &self.params {
            // Some can be set only once, and are what they should be already.
            if hvm::is_reloadable(*index) && xen.hvm_param(domid, *index).map_err(xen_error)? != *value {
                xen.set_hvm_param(domid, *index, *value).map_err(xen_error)?;
            }
        }
        xen.set_tsc_info(domid, &self.tsc).map_err(xen_error)?;
        xen.set_hvm_context(domid, &hvm::complete_msrs(&self.context, msrs)).map_err(xen_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// HEADER, one CPU and END: the smallest context there is.
    fn context() -> Vec<u8> {
        let mut context = vec![1, 0, 0, 0, 24, 0, 0, 0];
        context.extend(0x5438_1286_u32.to_le_bytes());
        context.extend([1, 0, 0, 0]);
        context.extend([0; 16]);
        context.extend([2, 0, 0, 0, 8, 4, 0, 0]);
        context.extend([0; 1032]);
        context.extend([0; 8]);
        context
    }

    fn devices() -> Devices {
        let tsc = TscInfo { mode: 1, khz: 2_000_000, nsec: 1 << 40, incarnation: 3 };
        let params = vec![(1, 0xfeffc), (12, 0xfeffe)];
        Devices { tsc, context: context(), params, emulator: Some(b"QEVMQEVM".to_vec()) }
    }

    #[test]
    fn what_is_saved_is_found_again() {
        assert_eq!(Devices::decode(&devices().encode()).unwrap(), devices());
        let without = Devices { emulator: None, ..devices() };
        assert_eq!(Devices::decode(&without.encode()).unwrap(), without);
    }

    #[test]
    fn every_cut_is_refused_or_lacks_the_device_model() {
        let run = devices().encode();
        for end in 0..run.len() {
            if let Ok(devices) = Devices::decode(&run[..end]) {
                assert!(devices.emulator.is_none(), "cut at {end}");
            }
        }
    }

    #[test]
    fn parameters_that_contradict_their_count_are_refused() {
        let mut run = devices().encode();
        let at = run.len() - 16 - (8 + 8 + 32);
        assert_eq!(run[at..at + 4], record::HVM_PARAMS.to_le_bytes());
        run[at + 8] = 3;
        assert!(Devices::decode(&run).unwrap_err().to_string().contains("HVM_PARAMS"));
    }
}
