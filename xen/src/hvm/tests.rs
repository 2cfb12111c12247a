//! Contexts made by hand, good and bad.

use super::*;

fn record(kind: u16, instance: u16, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Record { kind, instance, body }.write(&mut out);
    out
}

fn header() -> Vec<u8> {
    let mut body = vec![0; HEADER_BYTES];
    body[..4].copy_from_slice(&MAGIC.to_le_bytes());
    body[4] = 1;
    body[20..].copy_from_slice(&2_400_000u32.to_le_bytes());
    record(HEADER, 0, &body)
}

fn cpu(instance: u16) -> Vec<u8> {
    record(CPU, instance, &[7; CPU_BYTES])
}

fn msr(instance: u16, entries: &[(u32, u64)]) -> Vec<u8> {
    let mut known = MsrSet::default();
    let mut out = Vec::new();
    with_zeros(instance, entries, &mut known).write_to(&mut out);
    out
}

fn end() -> Vec<u8> {
    record(END, 0, &[])
}

fn blob(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.concat()
}

fn entries_of(blob: &[u8], instance: u16) -> Option<Vec<(u32, u64)>> {
    let context = Context::parse(blob).expect("a context");
    let mut found = context.records().iter().filter(|record| record.kind == CPU_MSR && record.instance == instance);
    let entries = found.next().map(|record| msrs(record.body).expect("checked"));
    assert!(found.next().is_none(), "two MSR records of one processor");
    entries
}

#[test]
fn a_context_is_walked() {
    let blob = blob(&[header(), cpu(0), cpu(1), record(14, 0, &[1; 240]), end()]);
    let context = Context::parse(&blob).expect("a context");
    let kinds: Vec<_> = context.records().iter().map(|record| (record.kind, record.instance)).collect();
    assert_eq!(kinds, [(HEADER, 0), (CPU, 0), (CPU, 1), (14, 0)]);
    assert_eq!(context.records()[3].body, [1; 240]);
    assert_eq!(context.tsc_khz(), Some(2_400_000));
}

#[test]
fn every_cut_is_found() {
    let whole = blob(&[header(), cpu(0), msr(0, &[(0x48, 1)]), end()]);
    for length in 0..whole.len() {
        assert!(matches!(Context::parse(&whole[..length]), Err(ContextError::Truncated(_))), "{length}");
    }
    Context::parse(&whole).expect("whole");
}

#[test]
fn what_is_wrong_is_named() {
    let long = |kind: u16| record(kind, 0, &[0; 5]);
    let mut magic = header();
    magic[8] ^= 1;
    for (parts, error) in [
        (vec![cpu(0), end()], ContextError::NoHeader),
        (vec![magic, cpu(0), end()], ContextError::NoHeader),
        (vec![header(), header(), end()], ContextError::SecondHeader(32)),
        (vec![header(), end()], ContextError::NoCpu),
        (vec![header(), cpu(0), end(), vec![0]], ContextError::Trailing(32 + 1040 + 8)),
        (vec![header(), long(CPU), end()], ContextError::Length { kind: CPU, instance: 0, length: 5 }),
        (vec![header(), long(CPU_MSR), end()], ContextError::Length { kind: CPU_MSR, instance: 0, length: 5 }),
    ] {
        assert_eq!(Context::parse(&blob(&parts)), Err(error));
    }
    // A length that would run past every address.
    let mut huge = header();
    huge.extend([2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(Context::parse(&huge), Err(ContextError::Truncated(32)));
    // A count that the record has no room for.
    let mut count = vec![0; 8];
    count[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(Context::parse(&blob(&[header(), cpu(0), record(CPU_MSR, 0, &count), end()])).is_err());
}

#[test]
fn msrs_that_went_back_to_zero_are_named() {
    let mut known = MsrSet::default();
    let first = blob(&[header(), cpu(0), msr(0, &[(0x48, 1), (0x140, 2)]), end()]);
    assert_eq!(complete_msrs(&first, &mut known), first, "nothing is known yet");
    let second = blob(&[header(), cpu(0), msr(0, &[(0x140, 5), (0xda0, 6)]), end()]);
    let completed = complete_msrs(&second, &mut known);
    assert_eq!(entries_of(&completed, 0), Some(vec![(0x140, 5), (0xda0, 6), (0x48, 0)]));
    // All of them zero: Xen leaves the record out.
    let third = blob(&[header(), cpu(0), end()]);
    let completed = complete_msrs(&third, &mut known);
    assert_eq!(entries_of(&completed, 0), Some(vec![(0x48, 0), (0x140, 0), (0xda0, 0)]));
    // And a zero stays named: the next context may be loaded over one from before.
    assert_eq!(entries_of(&complete_msrs(&second, &mut known), 0).map(|all| all.len()), Some(3));
}

#[test]
fn processors_have_msrs_of_their_own_and_only_while_they_are_up() {
    let mut known = MsrSet::default();
    complete_msrs(&blob(&[header(), cpu(0), cpu(1), msr(1, &[(0x48, 1)]), end()]), &mut known);
    let next = complete_msrs(&blob(&[header(), cpu(0), cpu(1), end()]), &mut known);
    assert_eq!((entries_of(&next, 0), entries_of(&next, 1)), (None, Some(vec![(0x48, 0)])));
    let down = complete_msrs(&blob(&[header(), cpu(0), end()]), &mut known);
    assert_eq!(entries_of(&down, 1), None);
}

#[test]
fn what_is_no_context_comes_back_as_it_is() {
    let mut known = MsrSet::default();
    assert_eq!(complete_msrs(&[1, 2, 3], &mut known), [1, 2, 3]);
    assert_eq!(known, MsrSet::default());
}

#[test]
fn special_pages_and_parameters() {
    assert!(
        !is_special_gfn(0xf_efef) && is_special_gfn(0xf_eff0) && is_special_gfn(0xf_efff) && !is_special_gfn(0xf_f000)
    );
    // STORE_PFN goes before CONSOLE_PFN, and neither goes a second time.
    let at = |param| PARAMS.iter().position(|other| *other == param);
    assert!(at(1) < at(17));
    assert!(!is_reloadable(1) && !is_reloadable(17) && !is_reloadable(33) && is_reloadable(37) && is_reloadable(12));
    // CALLBACK_IRQ is the guest's own to set.
    assert!(!is_reloadable(0));
}
