//! HVM context, parameters, clock, processor.

use crate::guest;
use xen::hvm::{self, Context, MsrSet};

/// Registers of the first processor but the running clock, which is the u64 before the last 16 bytes.
fn registers(blob: &[u8]) -> Vec<u8> {
    let context = Context::parse(blob).expect("a context");
    let cpu = context.records().iter().find(|record| record.kind == hvm::CPU).expect("a processor");
    let clock = cpu.body.len() - 24..cpu.body.len() - 16;
    let mut registers = cpu.body.to_vec();
    registers.drain(clock);
    registers
}

#[test]
fn a_context_loads_over_itself() {
    let Some(g) = guest("a_context_loads_over_itself") else { return };
    g.paused(|| {
        let blob = g.x.hvm_context(g.d).expect("context");
        let context = Context::parse(&blob).expect("a context");
        let kinds: Vec<u16> = context.records().iter().map(|record| record.kind).collect();
        println!("context: {} bytes, records {kinds:?}, TSC {:?} kHz", blob.len(), context.tsc_khz());
        assert_eq!(kinds[0], hvm::HEADER);
        assert!(kinds.contains(&hvm::CPU));
        let mut known = MsrSet::default();
        let completed = hvm::complete_msrs(&blob, &mut known);
        assert_eq!(completed, blob, "a first context is complete");
        g.x.set_hvm_context(g.d, &completed).expect("load");
        let after = g.x.hvm_context(g.d).expect("context");
        assert!(registers(&after) == registers(&blob), "the registers changed");
        assert_eq!(g.info().online_vcpus, 1);
        // A blob that is none never reaches the hypervisor.
        assert!(g.x.set_hvm_context(g.d, &blob[..blob.len() - 8]).is_err());
        assert_eq!(g.info().online_vcpus, 1);
    });
}

#[test]
fn parameters_clock_and_processor() {
    let Some(g) = guest("parameters_clock_and_processor") else { return };
    let params: Vec<String> = hvm::PARAMS
        .iter()
        .filter_map(|index| Some((index, g.x.hvm_param(g.d, *index).ok().filter(|value| *value != 0)?)))
        .map(|(index, value)| format!("{index}={value:#x}"))
        .collect();
    println!("parameters: {}", params.join(" "));
    assert!(!params.is_empty());
    let tsc = g.x.tsc_info(g.d).expect("TSC");
    println!("{tsc:?}");
    assert!(tsc.khz > 0);
    let policy = g.x.cpu_policy(g.d).expect("policy");
    println!("policy: {} leaves, {} MSRs", policy.leaves.len(), policy.msrs.len());
    assert!(policy.leaves.iter().any(|leaf| leaf[0] == 1 && leaf[2..] != [0; 4]));
    assert!(g.x.set_cpu_policy(g.d, &policy).is_err(), "a guest that ran keeps its processor");
}
