//! Images that are block devices: served over NBD, and under a replica. The device is a loop device, which only root can make;
//! elsewhere the tests say that they are skipped.

use crate::common::{Listening, XL_COLO, installed, one_line, pattern, succeeds, xl_colo};
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;
use xen_colo::disk::{Disk, DiskError, FileDisk, Zeroing};
use xen_colo::replica::epochs::ReplicaConfig;
use xen_colo::replica::set::Replicas;
use xen_colo::replica::state::{FileState, Standing, found, path};

const MIB: usize = 1 << 20;

/// A loop device over a file of its own. It goes when dropped, and the record beside it.
struct Device {
    dir: TempDir,
    path: PathBuf,
}

impl Device {
    /// None, with a loud note, where none can be made.
    fn over(bytes: &[u8]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, bytes).unwrap();
        match Command::new("losetup").args(["--find", "--show"]).arg(&file).output() {
            Ok(output) if output.status.success() => {
                let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
                let _ = std::fs::remove_file(xen_colo::replica::state::path(&path));
                Some(Self { dir, path })
            }
            other => {
                eprintln!("SKIP: a loop device cannot be made: {other:?}");
                None
            }
        }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// What is on it, as somebody else finds it.
    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(path(&self.path));
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).output();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_device_is_served_as_a_file_is() {
    if installed("qemu-io").is_none() || installed("nbdcopy").is_none() || installed("fio").is_none() {
        return;
    }
    let mut bytes = pattern(16 << 20);
    let Some(device) = Device::over(&bytes) else { return };
    let socket = device.dir.path().join("sock");
    let mut command = Command::new(XL_COLO);
    command.args(["nbd", "-t", "-e", "0", "--discard", "unmap", "-k"]).arg(&socket).arg(&device.path);
    let server = Listening::start(&mut command, &socket);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let copy = device.dir.path().join("copy").display().to_string();
    succeeds("nbdcopy", &[&uri, &copy]).await;
    assert!(std::fs::read(&copy).unwrap() == bytes, "sixteen MiB, and each where it was");
    let write = ["-c", "write -P 0x5a 1000448 3000832", "-c", "write -z 8M 1M", "-c", "discard 9M 1M", "-c", "flush"];
    succeeds("qemu-io", &[&["-f", "raw", "-d", "unmap"], &write[..], &[&uri]].concat()).await;
    bytes[1_000_448..4_001_280].fill(0x5a);
    bytes[8 * MIB..10 * MIB].fill(0);
    assert!(device.content() == bytes, "what was flushed is on the device");
    let fio = [
        "--name=x",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=4k",
        "--size=16m",
        "--verify=crc32c",
        "--verify_fatal=1",
    ];
    succeeds("fio", &[&fio[..], &["--verify_state_save=0", &format!("--uri={uri}")]].concat()).await;
    // It is one writer's, as a file is.
    let said = one_line(&xl_colo(&["nbd", "-k", &format!("{}2", socket.display()), &device.name()]).await, 1);
    assert!(said.contains("is in use"), "{said}");
    drop(server);
}

#[test]
fn a_replica_lives_on_a_block_device_and_its_record_beside_the_others() {
    let Some(device) = Device::over(&[0x11; 4 * MIB]) else { return };
    let image: (Box<dyn Disk>, _) =
        (Box::new(FileDisk::open(&device.path).unwrap()), Box::new(FileState::of(&device.path)) as _);
    let replicas = Replicas::open(vec![image], 7, ReplicaConfig::default()).unwrap();
    assert_eq!(replicas.status()[0].size_bytes, 4 << 20);
    replicas.start_sync(1).unwrap();
    assert!(matches!(found(&device.path).unwrap(), Standing::Resync(_)), "the record is durable before the first byte");
    let mut primary = replicas.primary_views(1).next().unwrap();
    primary.write(0, &[0x22; MIB]).unwrap();
    replicas.seal().unwrap();
    primary.write(MIB as u64 - 512, &[0x33; 1024]).unwrap();
    primary.write_zeroes(2 << 20, 1 << 20, Zeroing::default()).unwrap();
    replicas.seal().unwrap();
    primary.write(0, &[0x44; 512]).unwrap();
    while replicas.apply_round().unwrap() {}
    let mut expected = [[0x22; MIB], [0x11; MIB], [0; MIB], [0x11; MIB]].concat();
    expected[MIB - 512..MIB + 512].fill(0x33);
    assert!(device.content() == expected, "the second checkpoint, and nothing after it");
    assert_eq!(found(&device.path).unwrap(), Standing::Checkpoint { generation: 1, number: 2, session: 0 });
    assert!(path(&device.path).starts_with("/var/lib"), "beside a device there is no place");

    replicas.takeover(2).unwrap();
    let mut guest = replicas.guest_views().next().unwrap();
    guest.write(4096, &[0x55; 4096]).unwrap();
    loop {
        match guest.flush() {
            Err(DiskError::Busy) => {}
            flushed => break flushed.unwrap(),
        }
    }
    expected[4096..8192].fill(0x55);
    assert!(device.content() == expected, "the guest's own disk now");
    assert_eq!(found(&device.path).unwrap(), Standing::Guest);
}
