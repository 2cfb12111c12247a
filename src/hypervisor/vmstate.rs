//! A device model's state as QEMU's `snapshot-load` takes it: a qcow2 image whose one snapshot carries it.
//!
//! ```text
//!  cluster  0 header   1 refcount table   2 refcounts   3 active L1   4 snapshot table   5 its L1   6 its L2   7… state
//!                      └──────▶ 2                       (empty)       "s" ──────▶ 5      [1] ─▶ 6   one each ─▶ 7…
//! ```
//!
//! The disk is 1 MiB of nothing. QEMU puts a snapshot's VM state behind the disk, at the first L1 entry the disk does not
//! need: entry 1, at 512 MiB (QEMU, `block/qcow2.h`, `qcow2_vm_state_offset`). One L2 table and one refcount cluster
//! reach far beyond [`STATE_BYTES_MAX`]. All integers are big-endian (QEMU, `docs/interop/qcow2.txt`).
//!
//! The trap: **QEMU does not notice that a stream was cut off.** Behind the last cluster it reads zeroes, takes them for
//! the rest of the section and then for the end mark, and reports success; the devices not reached stay as after a
//! reset. [`check`] asks for an end mark, but that is a zero, and states are mostly zeroes: whoever carries a state must
//! guard its length.
//!
//! A smaller one: `xen-save-devices-state` ends a stream with its end mark, and a loader then looks for a description of it.
//! Without one QEMU writes a line to its log at each load, so an empty one is added.

/// Largest device-model state, in bytes.
pub const STATE_BYTES_MAX: usize = 64 << 20;
/// Shortest stream: magic, version, end mark.
const STATE_BYTES_MIN: usize = 9;
/// `QEVM`, then the one version of the stream there has been since 2009 (QEMU, `migration/savevm.h`).
const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
/// The section type that ends a stream.
const END_MARK: u8 = 0;
/// The section type of a description, and its length.
const NO_DESCRIPTION: [u8; 5] = [6, 0, 0, 0, 0];

const CLUSTER_BITS: u32 = 16;
const CLUSTER: usize = 1 << CLUSTER_BITS;
const DISK_BYTES: u64 = 1 << 20;
const L1_ENTRIES: u32 = 2;
/// Set in a table's entry when its target is in use once only.
const COPIED: u64 = 1 << 63;

const REFCOUNT_TABLE: usize = 1;
const REFCOUNTS: usize = 2;
const ACTIVE_L1: usize = 3;
const SNAPSHOTS: usize = 4;
const SNAPSHOT_L1: usize = 5;
const SNAPSHOT_L2: usize = 6;
const STATE: usize = 7;

// One cluster of u64 entries maps the state, one of u16 counts every cluster.
const _: () = assert!(STATE_BYTES_MAX + NO_DESCRIPTION.len() <= CLUSTER / 8 * CLUSTER);
const _: () = assert!(STATE + STATE_BYTES_MAX / CLUSTER < CLUSTER / 2);

/// Why bytes are no device-model state.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum VmstateError {
    /// Too short or too long.
    #[error("a device-model state of {len_bytes} bytes; {STATE_BYTES_MIN} to {STATE_BYTES_MAX} are possible")]
    Length {
        /// Its size.
        len_bytes: usize,
    },
    /// No stream of QEMU's, or one of an unknown version.
    #[error("a device-model state of magic {magic:#x} version {version}, not {MAGIC:#x} version {VERSION}")]
    Format {
        /// The first word.
        magic: u32,
        /// The second.
        version: u32,
    },
    /// The stream was cut off, or something follows it.
    #[error("a device-model state that ends in {last:#x} instead of the end mark {END_MARK}")]
    NoEnd {
        /// The last byte.
        last: u8,
    },
}

/// Checks what can be checked without knowing the machine: length, magic, version and end mark.
pub fn check(state: &[u8]) -> Result<(), VmstateError> {
    if !(STATE_BYTES_MIN..=STATE_BYTES_MAX).contains(&state.len()) {
        return Err(VmstateError::Length { len_bytes: state.len() });
    }
    let word = |at: usize| state[at..at + 4].iter().fold(0, |word, byte| word << 8 | u32::from(*byte));
    let (magic, version) = (word(0), word(4));
    if (magic, version) != (MAGIC, VERSION) {
        return Err(VmstateError::Format { magic, version });
    }
    match state[state.len() - 1] {
        END_MARK => Ok(()),
        last => Err(VmstateError::NoEnd { last }),
    }
}

/// The qcow2 image of version 3 whose snapshot `s` carries `state`: 448 KiB and the state, in whole clusters.
pub fn image(state: &[u8]) -> Result<Vec<u8>, VmstateError> {
    check(state)?;
    let len_bytes = state.len() + NO_DESCRIPTION.len();
    let state_clusters = len_bytes.div_ceil(CLUSTER);
    let clusters = STATE + state_clusters;
    let mut image = Vec::with_capacity(clusters * CLUSTER);
    image.resize(STATE * CLUSTER, 0);

    put(&mut image, 0, b"QFI\xfb");
    put(&mut image, 4, &3_u32.to_be_bytes());
    put(&mut image, 20, &CLUSTER_BITS.to_be_bytes());
    put(&mut image, 24, &DISK_BYTES.to_be_bytes());
    put(&mut image, 36, &L1_ENTRIES.to_be_bytes());
    put(&mut image, 40, &at(ACTIVE_L1).to_be_bytes());
    put(&mut image, 48, &at(REFCOUNT_TABLE).to_be_bytes());
    put(&mut image, 56, &1_u32.to_be_bytes()); // clusters of the refcount table
    put(&mut image, 60, &1_u32.to_be_bytes()); // snapshots
    put(&mut image, 64, &at(SNAPSHOTS).to_be_bytes());
    put(&mut image, 96, &4_u32.to_be_bytes()); // refcounts of 1 << 4 bits
    put(&mut image, 100, &104_u32.to_be_bytes()); // length of this header

    put(&mut image, REFCOUNT_TABLE * CLUSTER, &at(REFCOUNTS).to_be_bytes());
    for cluster in 0..clusters {
        put(&mut image, REFCOUNTS * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
    }

    let snapshot = SNAPSHOTS * CLUSTER;
    put(&mut image, snapshot, &at(SNAPSHOT_L1).to_be_bytes());
    put(&mut image, snapshot + 8, &L1_ENTRIES.to_be_bytes());
    put(&mut image, snapshot + 12, &1_u16.to_be_bytes()); // length of the id
    put(&mut image, snapshot + 14, &1_u16.to_be_bytes()); // length of the name
    put(&mut image, snapshot + 32, &(len_bytes as u32).to_be_bytes());
    put(&mut image, snapshot + 36, &16_u32.to_be_bytes()); // length of the two that follow
    put(&mut image, snapshot + 40, &(len_bytes as u64).to_be_bytes());
    put(&mut image, snapshot + 48, &DISK_BYTES.to_be_bytes());
    put(&mut image, snapshot + 56, b"1s"); // id and name

    put(&mut image, SNAPSHOT_L1 * CLUSTER + 8, &(at(SNAPSHOT_L2) | COPIED).to_be_bytes());
    for cluster in 0..state_clusters {
        put(&mut image, SNAPSHOT_L2 * CLUSTER + 8 * cluster, &(at(STATE + cluster) | COPIED).to_be_bytes());
    }

    image.extend_from_slice(state);
    image.extend_from_slice(&NO_DESCRIPTION);
    image.resize(clusters * CLUSTER, 0);
    Ok(image)
}

/// Where a cluster begins, in bytes.
fn at(cluster: usize) -> u64 {
    (cluster * CLUSTER) as u64
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A well-formed stream of this many bytes.
    fn state(len_bytes: usize) -> Vec<u8> {
        let mut state: Vec<u8> = (0..len_bytes).map(|at| (at / 251 + at) as u8).collect();
        state[..8].copy_from_slice(&[0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3]);
        state[len_bytes - 1] = END_MARK;
        state
    }

    #[test]
    fn only_whole_streams_of_the_known_version_are_taken() {
        assert_eq!(check(&state(9)), Ok(()));
        assert_eq!(check(&state(9)[..8]), Err(VmstateError::Length { len_bytes: 8 }));
        assert_eq!(check(&vec![0; STATE_BYTES_MAX + 1]), Err(VmstateError::Length { len_bytes: STATE_BYTES_MAX + 1 }));
        assert_eq!(check(&state(100)[..99]), Err(VmstateError::NoEnd { last: 98 }));
        for (at, byte) in [(0, 0x52), (3, 0), (7, 2), (4, 1)] {
            let mut wrong = state(100);
            wrong[at] = byte;
            assert!(matches!(check(&wrong), Err(VmstateError::Format { .. })), "byte {at}");
            assert!(image(&wrong).is_err());
        }
    }

    /// Follows the tables as QEMU does, from the header on.
    #[test]
    fn the_tables_lead_to_the_state() {
        for len_bytes in [9, CLUSTER - 5, CLUSTER - 4, 210_000, STATE_BYTES_MAX] {
            let state = state(len_bytes);
            let image = image(&state).unwrap();
            let word = |at: u64| u64::from_be_bytes(image[at as usize..at as usize + 8].try_into().unwrap());
            let snapshot = word(64);
            let size = word(snapshot + 40);
            assert_eq!(size, len_bytes as u64 + 5);
            let l2 = word(word(snapshot) + 8) & !COPIED;
            let mut found = Vec::new();
            for cluster in 0..size.div_ceil(CLUSTER as u64) {
                let data = (word(l2 + 8 * cluster) & !COPIED) as usize;
                found.extend_from_slice(&image[data..data + CLUSTER]);
            }
            assert!(found.starts_with(&state), "{len_bytes} bytes");
            assert_eq!(found[len_bytes..len_bytes + 5], NO_DESCRIPTION);
        }
    }

    /// `qemu-img`'s word on an image: whether `check` found nothing, and what both said. None where it is missing.
    fn qemu_img(image: &[u8]) -> Option<(bool, String)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, image).unwrap();
        let mut said = String::new();
        let mut clean = true;
        for args in [["check", "-fqcow2"], ["snapshot", "-l"]] {
            let output = match Command::new("qemu-img").args(args).arg(&path).output() {
                Ok(output) => output,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    eprintln!("SKIP: qemu-img is not installed");
                    return None;
                }
                Err(error) => panic!("qemu-img: {error}"),
            };
            clean &= output.status.success();
            said += &String::from_utf8_lossy(&output.stdout);
            said += &String::from_utf8_lossy(&output.stderr);
        }
        Some((clean, said))
    }

    #[test]
    fn qemu_finds_no_fault_and_one_snapshot() {
        for len_bytes in [9, 210_000, CLUSTER * 16 - 5, STATE_BYTES_MAX] {
            let Some((clean, said)) = qemu_img(&image(&state(len_bytes)).unwrap()) else { return };
            assert!(clean && said.contains("No errors were found"), "{len_bytes} bytes: {said}");
            let snapshots = said.lines().filter(|line| line.split_whitespace().take(2).eq(["1", "s"])).count();
            assert_eq!(snapshots, 1, "{said}");
        }
    }

    /// The oracle above can see: each of these is one wrong entry.
    #[test]
    fn qemu_finds_planted_faults() {
        let good = image(&state(210_000)).unwrap();
        let refcount = |cluster: usize| REFCOUNTS * CLUSTER + 2 * cluster + 1;
        let faults = [
            ("the last cluster of the state counted twice", refcount(good.len() / CLUSTER - 1), 2),
            ("the snapshot's L2 not counted", refcount(SNAPSHOT_L2), 0),
            ("the header not counted", refcount(0), 0),
            ("the state mapped off a cluster's border", SNAPSHOT_L2 * CLUSTER + 6, 2),
            ("an L1 that lies elsewhere", SNAPSHOTS * CLUSTER + 5, 0xff),
        ];
        for (what, at, byte) in faults {
            let mut bad = good.clone();
            assert_ne!(bad[at], byte);
            bad[at] = byte;
            let Some((clean, said)) = qemu_img(&bad) else { return };
            assert!(!clean, "{what}: {said}");
        }
    }
}
