//! The mirror against a disk that takes its copies, and its bounds.

use super::*;
use crate::disk::{FileDisk, MemoryDisk};
use proptest::prelude::*;

const SIZE: usize = 3 * SYNC_CHUNK_BYTES as usize + 512;

/// A mirror of `size` bytes, attached and in step.
fn in_step(size: usize, bound_bytes: u64) -> Mirror {
    let mut mirror = Mirror::new(Box::new(MemoryDisk::new(size)), bound_bytes);
    mirror.attach(holding(Holds::Zeroes));
    while mirror.next_sync_chunk().unwrap() != SyncStep::Finished {}
    assert!(mirror.drained(0));
    mirror
}

fn holding(holds: Holds) -> Target {
    Target { session: 7, holds }
}

/// Bytes of the next copy.
fn sent(mirror: &mut Mirror) -> u64 {
    mirror.poll_forward().unwrap().payload.wire_bytes()
}

/// A disk that makes holes at once, if told so.
struct Punching(MemoryDisk, bool);

impl Disk for Punching {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.0.read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.0.write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.0.flush()
    }
    fn write_zeroes(&mut self, offset: u64, len_bytes: u64, how: Zeroing) -> Result<(), DiskError> {
        self.0.write_zeroes(offset, len_bytes, Zeroing { fast_only: how.fast_only && !self.1, ..how })
    }
}

fn forward(mirror: &mut Mirror, target: &mut dyn Disk) -> bool {
    let Some(write) = mirror.poll_forward() else { return false };
    let result = write.payload.content().write_to(target, write.offset);
    mirror.handle_acked(write.seq, result);
    true
}

#[test]
fn primary_read_write_start_stop_and_get_error() {
    let mut mirror = Mirror::new(Box::new(MemoryDisk::new(64)), 1000);
    mirror.write(0, b"alone").unwrap();
    assert!(mirror.poll_forward().is_none() && !mirror.status().attached && !mirror.drained(0));
    assert_eq!((mirror.mark(), mirror.mark()), (0, 1), "a checkpoint of a plain disk is nothing");
    mirror.attach(holding(Holds::Anything));
    assert_eq!(mirror.next_sync_chunk().unwrap(), SyncStep::Queued { bytes: 64 });
    mirror.write(0, b"pair!").unwrap();
    assert_eq!((sent(&mut mirror), sent(&mut mirror)), (64, 5));
    assert_eq!(mirror.status().error, None);
    mirror.detach();
    mirror.write(0, b"after").unwrap();
    let mut back = [0; 5];
    mirror.read(0, &mut back).unwrap();
    assert_eq!((&back, mirror.poll_forward(), mirror.status().queued_bytes), (b"after", None, 0));
}

#[test]
fn an_epoch_waits_until_it_is_allowed() {
    let (mut mirror, mut target) = (in_step(64, 1000), MemoryDisk::new(64));
    mirror.write(0, b"a").unwrap();
    assert_eq!(mirror.mark(), 0);
    mirror.write(1, b"b").unwrap();
    assert!(!mirror.drained(0));
    assert!(forward(&mut mirror, &mut target) && !forward(&mut mirror, &mut target));
    assert!(mirror.drained(0) && !mirror.drained(1));
    assert_eq!(target.bytes()[..2], *b"a\0");
    mirror.allow(1);
    let in_flight = mirror.poll_forward().unwrap();
    assert!(!mirror.drained(1) && mirror.drained(0));
    mirror.handle_acked(in_flight.seq, Ok(()));
    assert!(mirror.drained(1));
    assert_eq!((mirror.status().queued_bytes, mirror.status().forwarded_bytes), (0, 2));
}

#[test]
fn at_the_bound_a_write_is_refused_before_anything_is_done() {
    let mut mirror = in_step(4096, 1000);
    mirror.mark();
    mirror.write(0, &[1; 400]).unwrap();
    assert!(!mirror.pressure());
    mirror.write(1000, &[2; 1000 - 400 - 2 * ENTRY_COST_BYTES as usize]).unwrap();
    assert!(mirror.pressure(), "more than half waits for a checkpoint");
    assert!(matches!(mirror.write(600, &[3]), Err(DiskError::Busy)));
    let mut byte = [9];
    mirror.read(600, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    mirror.allow(1);
    assert!(!mirror.pressure());
    assert!(forward(&mut mirror, &mut MemoryDisk::new(4096)));
    mirror.write(600, &[3]).unwrap();

    let mut mirror = in_step(4096, 100);
    mirror.mark();
    mirror.write(0, &[1; 4000]).expect("a write longer than the bound, alone");
    let mut mirror = in_step(4096, 200);
    mirror.mark();
    mirror.write(0, &[1; 1]).unwrap();
    assert!(mirror.write(0, &[1; 80]).is_err() && mirror.pressure(), "refused for what only a checkpoint frees");
}

/// A medium on which every write fails that touches this byte, after the bytes before it.
struct Bad(MemoryDisk, u64);

impl Disk for Bad {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.0.read(offset, into)
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        if (offset..offset + bytes.len() as u64).contains(&self.1) {
            self.0.write(offset, &bytes[..(self.1 - offset) as usize])?;
            return Err(DiskError::io("the guest's medium", std::io::Error::from_raw_os_error(5)));
        }
        self.0.write(offset, bytes)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        Err(DiskError::io("the guest's medium", std::io::Error::from_raw_os_error(5)))
    }
}

#[test]
fn an_error_of_the_guests_own_medium_is_the_guests_and_no_copy_hides_it() {
    let mut mirror = Mirror::new(Box::new(Bad(MemoryDisk::new(64), 9)), 1000);
    mirror.attach(holding(Holds::Zeroes));
    while mirror.next_sync_chunk().unwrap() != SyncStep::Finished {}
    mirror.write(0, b"good").unwrap();
    assert!(matches!(mirror.flush(), Err(DiskError::Io { .. })), "a flush that fails is the guest's news too");
    assert_eq!(mirror.status().error, None, "and none of the other host's");
    assert!(matches!(mirror.write(8, b"half"), Err(DiskError::Io { .. })));
    let mut back = [9; 4];
    mirror.read(8, &mut back).unwrap();
    assert_eq!(&back, b"h\0\0\0", "as far as it came");
    let status = mirror.status();
    assert!(status.error.as_ref().is_some_and(|error| error.contains("medium")), "{status:?}");
    assert!(!mirror.drained(0), "no checkpoint is whole with a disk that is not known");
    mirror.write(0, b"goes").unwrap();
    mirror.read(0, &mut back).unwrap();
    assert_eq!(&back, b"goes", "the guest goes on");
    // The next copy of the disk compares, or sends, what is there.
    mirror.attach(holding(Holds::Anything));
    assert!(matches!(mirror.next_sync_chunk().unwrap(), SyncStep::Queued { bytes: 64 }));
    let mut target = MemoryDisk::new(64);
    while forward(&mut mirror, &mut target) {}
    assert_eq!((&target.bytes()[..4], &target.bytes()[8..12]), (&b"goes"[..], &b"h\0\0\0"[..]));
}

#[test]
fn a_forwarding_error_is_loud_and_stays_and_the_guest_goes_on() {
    let mut mirror = in_step(64, 1000);
    mirror.write(0, b"x").unwrap();
    mirror.write(1, b"y").unwrap();
    let write = mirror.poll_forward().unwrap();
    mirror.handle_acked(write.seq, Err(DiskError::Fenced { theirs: 1, ours: 2 }));
    mirror.write(2, b"z").unwrap();
    mirror.handle_acked(write.seq, Ok(()));
    mirror.mark();
    let status = mirror.status();
    assert!(status.error.unwrap().contains("generation 1") && !status.attached && !mirror.drained(0));
    assert_eq!(mirror.poll_forward(), None);
    mirror.attach(holding(Holds::Zeroes));
    mirror.handle_acked(write.seq, Err(DiskError::Busy));
    assert_eq!(mirror.status().error, None, "an answer to a copy of the link before");
    mirror.fail(&DiskError::Busy);
    assert!(mirror.status().error.is_some());
}

#[test]
fn a_blank_target_gets_no_zeroes() {
    let mut mirror = Mirror::new(Box::new(MemoryDisk::new(SIZE)), 64 << 20);
    mirror.write(SYNC_CHUNK_BYTES, b"x").unwrap();
    mirror.attach(holding(Holds::Zeroes));
    let steps: Vec<_> = std::iter::from_fn(|| Some(mirror.next_sync_chunk().unwrap())).take(5).collect();
    let bytes = SYNC_CHUNK_BYTES;
    let (skipped, queued) = (SyncStep::Skipped { bytes }, SyncStep::Queued { bytes });
    assert_eq!(steps, [skipped, queued, skipped, SyncStep::Skipped { bytes: 512 }, SyncStep::Finished]);
    assert!(mirror.sync_finished() && !mirror.drained(0));
}

#[derive(Debug, Clone)]
enum Op {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Trim(usize, usize),
    Sync,
    Forward(usize),
    Checkpoint,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..SIZE, 0_usize..2 << 20, any::<u8>()).prop_map(|(at, len, byte)| Op::Write(at, len, byte)),
        2 => (0..SIZE, 0_usize..2 << 20).prop_map(|(at, len)| Op::Zero(at, len)),
        1 => (0..SIZE, 0_usize..2 << 20).prop_map(|(at, len)| Op::Trim(at, len)),
        2 => Just(Op::Sync),
        3 => (1_usize..4).prop_map(Op::Forward),
        1 => Just(Op::Checkpoint),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// At each checkpoint the target is the disk as it was when the epoch was marked.
    #[test]
    fn the_target_is_the_disk_at_every_mark(
        ops in prop::collection::vec(op(), 1..40),
        blank in any::<bool>(),
        punches in any::<bool>(),
    ) {
        let mut mirror = Mirror::new(Box::new(Punching(MemoryDisk::new(SIZE), punches)), 4 << 20);
        let (mut model, mut target) = (vec![0; SIZE], MemoryDisk::new(SIZE));
        if !blank {
            target.write(0, &[0xee; SIZE]).unwrap();
        }
        mirror.write(5, b"before").unwrap();
        model[5..11].copy_from_slice(b"before");
        mirror.attach(holding(if blank { Holds::Zeroes } else { Holds::Anything }));
        let pool = Pool::default();
        let mut marked: Option<(u64, Vec<u8>)> = None;
        for op in ops.into_iter().chain([Op::Checkpoint, Op::Checkpoint]) {
            match op {
                Op::Write(at, len, byte) => {
                    let range = at..(at + len).min(SIZE);
                    // As a block of its own, or as bytes that somebody else goes on using.
                    let mut block = pool.copy(&vec![byte; range.len()]);
                    let attached = mirror.keeps_blocks();
                    let written = match len % 2 {
                        0 => mirror.write_block(at as u64, &mut block),
                        _ => mirror.write(at as u64, &block),
                    };
                    let kept = block.is_empty() && !range.is_empty();
                    prop_assert_eq!(kept, written.is_ok() && attached && len % 2 == 0 && !range.is_empty());
                    match written {
                        Ok(()) => model[range].fill(byte),
                        Err(error) => prop_assert!(matches!(error, DiskError::Busy), "{}", error),
                    }
                }
                Op::Zero(at, len) => {
                    let range = at..(at + len).min(SIZE);
                    let how = Zeroing { keep_allocated: at % 2 == 0, fast_only: false };
                    match mirror.write_zeroes(at as u64, range.len() as u64, how) {
                        Ok(()) => model[range].fill(0),
                        Err(error) => prop_assert!(matches!(error, DiskError::Busy), "{}", error),
                    }
                }
                Op::Trim(at, len) => {
                    let range = at..(at + len).min(SIZE);
                    match mirror.trim(at as u64, range.len() as u64) {
                        Ok(()) if punches => model[range].fill(0),
                        Ok(()) => {}
                        Err(error) => prop_assert!(matches!(error, DiskError::Busy), "{}", error),
                    }
                }
                Op::Sync => drop(mirror.next_sync_chunk().unwrap()),
                Op::Forward(times) => (0..times).for_each(|_| _ = forward(&mut mirror, &mut target)),
                Op::Checkpoint => {
                    while mirror.next_sync_chunk().unwrap() != SyncStep::Finished {
                        forward(&mut mirror, &mut target);
                    }
                    if let Some((epoch, image)) = marked.take() {
                        while forward(&mut mirror, &mut target) {}
                        prop_assert!(mirror.drained(epoch));
                        prop_assert!(target.bytes() == image, "epoch {}", epoch);
                        mirror.allow(epoch + 1);
                    } else {
                        marked = Some((mirror.mark(), model.clone()));
                    }
                }
            }
            prop_assert!(mirror.status().queued_bytes <= 4 << 20);
        }
    }
}

#[test]
fn zeroes_travel_as_zeroes_and_a_trim_is_a_hole_on_both_or_on_neither() {
    for punches in [true, false] {
        let mut mirror = Mirror::new(Box::new(Punching(MemoryDisk::new(SIZE), punches)), 1000);
        mirror.write(0, &[7; 500]).unwrap();
        mirror.attach(holding(Holds::Zeroes));
        let mut target = MemoryDisk::new(SIZE);
        while mirror.next_sync_chunk().unwrap() != SyncStep::Finished {
            forward(&mut mirror, &mut target);
        }
        let how = Zeroing { keep_allocated: true, fast_only: false };
        mirror.write_zeroes(100, 3 << 20, how).expect("zeroes take no room");
        let zeroes = mirror.poll_forward().unwrap();
        assert_eq!(zeroes.payload, Payload::Zeroes { len_bytes: 3 << 20, keep_allocated: true });
        mirror.trim(0, 50).unwrap();
        let (trimmed, mut local) = (mirror.poll_forward().map(|write| write.payload), [1; 60]);
        mirror.read(0, &mut local).unwrap();
        let hole = Payload::Zeroes { len_bytes: 50, keep_allocated: false };
        assert_eq!((trimmed, local[0], local[50]), if punches { (Some(hole), 0, 7) } else { (None, 7, 7) });
        assert_eq!(mirror.status().error, None);
    }
    let mut mirror = Mirror::new(Box::new(Punching(MemoryDisk::new(80 << 20), true)), 1000);
    mirror.attach(holding(Holds::Zeroes));
    mirror.write_zeroes(1, 70 << 20, Zeroing::default()).unwrap();
    let lens: Vec<_> = std::iter::from_fn(|| mirror.poll_forward()).map(|write| write.payload.len_bytes()).collect();
    assert_eq!(lens, [MAX_ZEROES_BYTES, MAX_ZEROES_BYTES, 6 << 20]);
}

#[test]
fn a_trim_on_a_file_makes_both_files_smaller() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let open = |name: &str| FileDisk::open_or_create(&path(name), 4 << 20).unwrap();
    let space = |name: &str| std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path(name)).unwrap()) * 512;
    let mut target = open("target");
    target.write(0, &vec![9; 4 << 20]).unwrap();
    let mut mirror = Mirror::new(Box::new(open("local")), 64 << 20);
    mirror.write(0, &vec![1; 1 << 20]).unwrap();
    mirror.attach(holding(Holds::Anything));
    while mirror.next_sync_chunk().unwrap() != SyncStep::Finished {}
    while forward(&mut mirror, &mut target) {}
    assert_eq!((space("local"), space("target")), (1 << 20, 1 << 20), "a hole is copied as a hole");
    mirror.trim(0, 512 << 10).unwrap();
    while forward(&mut mirror, &mut target) {}
    assert_eq!((space("local"), space("target")), (512 << 10, 512 << 10));
    assert_eq!(std::fs::read(path("local")).unwrap(), std::fs::read(path("target")).unwrap());
}

#[test]
fn what_is_overwritten_in_its_epoch_is_not_sent() {
    let (mut mirror, mut disk) = (in_step(4096, 1 << 20), MemoryDisk::new(4096));
    mirror.write(100, &[1; 50]).unwrap();
    mirror.mark();
    mirror.write(100, &[2; 100]).unwrap();
    mirror.write(150, &[3; 100]).unwrap();
    mirror.write(160, &[4; 20]).unwrap();
    mirror.write(90, &[5; 110]).expect("the write of the epoch before, and one that sticks out, stay");
    assert_eq!(mirror.status().spared_bytes, 120);
    assert_eq!(mirror.status().held_bytes, 100 + 110 + 2 * ENTRY_COST_BYTES);
    assert!(forward(&mut mirror, &mut disk) && !forward(&mut mirror, &mut disk));
    assert_eq!(disk.bytes()[90..150], [&[0; 10][..], &[1; 50]].concat());
    mirror.allow(1);
    while forward(&mut mirror, &mut disk) {}
    assert_eq!(disk.bytes()[90..251], [&[5; 110][..], &[3; 50], &[0]].concat());
    assert_eq!((mirror.status().queued_bytes, mirror.drained(1)), (0, true));
}

#[test]
fn what_is_beyond_the_window_waits_where_it_can_be_spared() {
    let (mut mirror, mut disk) = (in_step(64 << 20, 1 << 30), MemoryDisk::new(64 << 20));
    for _ in 0..40 {
        mirror.write(0, &[1; 1 << 20]).unwrap();
        mirror.write(1 << 20, &[2; 1 << 20]).unwrap();
        while mirror.poll_forward().is_some() {}
    }
    let in_flight: Vec<_> = std::iter::from_fn(|| mirror.poll_forward()).collect();
    assert!(in_flight.is_empty());
    let status = mirror.status();
    assert_eq!((status.spared_bytes, status.queued_bytes), (62 << 20, 18 * ((1 << 20) + ENTRY_COST_BYTES)));
    (0..1000).for_each(|seq| mirror.handle_acked(seq, Ok(())));
    while forward(&mut mirror, &mut disk) {}
    assert!(mirror.drained(0));
}
