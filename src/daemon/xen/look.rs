//! What `xl-colo check` asks of Xen, and what `protect` refuses for: one judgement for both.

use super::our_disks;
use crate::daemon::check::{Abilities, Control, Obstacle, XenFacts};
use crate::hypervisor::xen::toolstack;
use ::xen::{Error, Interface, Store, refuse};
use std::path::PathBuf;

/// How the device model's path ends.
const DEVICE_MODEL: &[u8] = b"qemu-system-i386";

/// What the hypervisor and xenstore say of this host.
#[must_use]
pub fn facts() -> Option<XenFacts> {
    let control = match Interface::open() {
        Ok(xen) => {
            let (major, minor) = xen.versions().hypervisor;
            let abilities = xen.abilities().map_err(|e| e.to_string());
            let abilities = abilities.map(|::xen::Abilities { hvm, hap, shadow }| Abilities { hvm, hap, shadow });
            Control::Open { release: format!("{major}.{minor}"), abilities }
        }
        Err(error @ Error::VersionMismatch { .. }) => Control::Releases(error.to_string()),
        Err(error) => Control::Closed(error.to_string()),
    };
    let store = Store::open().and_then(|store| store.list("/")).map(drop).map_err(|e| e.to_string());
    Some(XenFacts { control, store })
}

/// The device model that libxl starts where a configuration names none. It is built into the library, which this process
/// has loaded and which tells nobody.
#[must_use]
pub fn device_model_path() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let library = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|p| p.contains("libxenlight"))?;
    model_in(&std::fs::read(library).ok()?)
}

/// The first string of a binary that is the path of such a program.
fn model_in(library: &[u8]) -> Option<PathBuf> {
    let mut texts = library.split(|byte| *byte == 0).filter(|text| text.starts_with(b"/"));
    let found = texts.find(|text| text.ends_with(DEVICE_MODEL))?;
    Some(std::str::from_utf8(found).ok()?.into())
}

/// What is in the way of protecting a guest of this host.
pub fn guest_facts(name: &str) -> Result<Vec<Obstacle>, String> {
    let said = |e: Error| e.to_string();
    let xen = Interface::open().map_err(said)?;
    let store = Store::open().map_err(said)?;
    let domid = store.by_name(name).map_err(said)?.ok_or("no domain of this host is called that")?;
    let facts = refuse::gather(&xen, &store, domid).map_err(said)?;
    let refusals = refuse::judge(&facts).into_iter();
    let mut found: Vec<_> =
        refusals.map(|refusal| Obstacle { reason: refusal.reason, remedy: refusal.remedy.into() }).collect();
    match tokio::task::block_in_place(|| toolstack::config(domid)) {
        Ok(config) => found.extend(obstacles(name, &config)),
        Err(reason) => found.push(Obstacle { reason, remedy: "see what xl list -l says of it".into() }),
    }
    Ok(found)
}

/// What is in the way of protecting a guest of this configuration.
pub(super) fn obstacles(guest: &str, config: &serde_json::Value) -> Vec<Obstacle> {
    let ours = our_disks(guest);
    let mut found = Vec::new();
    let foreign = toolstack::foreign_disks(config, &ours);
    if !foreign.is_empty() {
        found.push(Obstacle {
            reason: format!("writes to {} would be lost", foreign.join(", ")),
            remedy: format!(
                "give each disk script=block-colo,target={} (see the sample configurations), or detach it",
                ours[0]
            ),
        });
    }
    let nics = config["nics"].as_array().map(Vec::as_slice).unwrap_or_default();
    if nics.len() > 1 {
        found.push(Obstacle {
            reason: format!(
                "it has {} NICs, and only one can be protected: the others' output would not wait",
                nics.len()
            ),
            remedy: "remove all but one from its configuration".into(),
        });
    }
    let strange = nics.iter().filter_map(|nic| nic["script"].as_str()).find(|script| !script.ends_with("vif-colo"));
    if let Some(script) = strange {
        found.push(Obstacle {
            reason: format!("a NIC of it goes past xl-colo: its script is {script}"),
            remedy: "give it script=vif-colo".into(),
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_device_model_is_found_in_the_library() {
        let library =
            b"\x7fELF\0qemu-system-i386\0/usr/bin/xl\0/usr/libexec/xen-qemu-system-i386\0/no/qemu-system-i386\0";
        assert_eq!(model_in(library), Some("/usr/libexec/xen-qemu-system-i386".into()));
        assert_eq!(model_in(b"/bin/sh"), None);
    }

    #[test]
    fn only_our_own_devices_can_be_protected() {
        let nic = json!({"mac": "02:00:00:00:00:01", "script": "/etc/xen/scripts/vif-colo"});
        let disk = json!({"vdev": "xvda", "pdev_path": "web/disk0", "readwrite": 1});
        assert_eq!(obstacles("web", &json!({"nics": [nic], "disks": [disk]})), []);
        assert_eq!(obstacles("web", &json!({})), []);
        let bridge = json!({"mac": "02:00:00:00:00:02", "script": "vif-bridge"});
        let data = json!({"vdev": "xvdb", "pdev_path": "/dev/vg/data", "readwrite": 1});
        let found = obstacles("web", &json!({"nics": [nic, bridge], "disks": [disk, data]}));
        let said: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].starts_with("writes to xvdb (/dev/vg/data) would be lost (give"), "{said:?}");
        assert!(said[1].contains("2 NICs") && said[2].contains("vif-bridge"), "{said:?}");
    }
}
