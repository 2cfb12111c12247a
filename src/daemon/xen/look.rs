//! What `xl-colo check` asks of Xen, and what `protect` refuses for: one judgement for both.

use super::{DISKS_MAX, disk_name, our_disk};
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

/// The name of a domain.
#[must_use]
pub fn domain_name(number: u16) -> Option<String> {
    let store = Store::open().ok()?;
    store.read(&format!("{}/name", store.domain_path(::xen::DomId(number)))).ok()?
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
        Ok(config) => found.extend(obstacles(name, &config, None)),
        Err(reason) => found.push(Obstacle { reason, remedy: "see what xl list -l says of it".into() }),
    }
    Ok(found)
}

/// What is in the way of protecting a guest of this configuration, by a host of these `images` if it is known.
pub(super) fn obstacles(guest: &str, config: &serde_json::Value, images: Option<&[PathBuf]>) -> Vec<Obstacle> {
    let served = images.map_or(DISKS_MAX, <[PathBuf]>::len);
    let ours: Vec<_> = (0..served).map(|index| our_disk(guest, index)).collect();
    let mut found = Vec::new();
    let foreign = toolstack::foreign_disks(config, &ours.concat());
    if !foreign.is_empty() {
        let target = match served {
            1 => format!("target={}", ours[0][0]),
            _ => format!("target={guest}/disk0, the next one {guest}/disk1, and so on"),
        };
        found.push(Obstacle {
            reason: format!("writes to {} would be lost", foreign.join(", ")),
            remedy: format!("give each disk script=block-colo,{target} (see the sample configurations), or detach it"),
        });
    }
    for (index, names) in ours.iter().enumerate() {
        let disks = toolstack::disks_of(config, names);
        if let [first, second, ..] = &disks[..] {
            found.push(Obstacle {
                reason: format!("{first} and {second} are both {}, and would overwrite each other", disk_name(index)),
                remedy: format!("give one of them another target, {guest}/disk{}", ours.len()),
            });
        }
    }
    found.extend(images.and_then(|images| unused(config, &ours, images)));
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

/// An image that is no disk of the guest. A guest without any disk has one image all the same: `--disk` wants one.
fn unused(config: &serde_json::Value, ours: &[[String; 2]], images: &[PathBuf]) -> Option<Obstacle> {
    let is_unused = |(_, names): &(&PathBuf, &[String; 2])| toolstack::disks_of(config, *names).is_empty();
    let (image, names) = images.iter().zip(ours).filter(|_| images.len() > 1).find(is_unused)?;
    Some(Obstacle {
        reason: format!("{} is given as {}, and no disk in its configuration is that", image.display(), names[0]),
        remedy: format!("add a disk with script=block-colo,target={}, or give one --disk less", names[0]),
    })
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
        let one = [PathBuf::from("/srv/web.img")];
        assert_eq!(obstacles("web", &json!({"nics": [nic], "disks": [disk]}), Some(&one)), []);
        assert_eq!(obstacles("web", &json!({}), Some(&one)), []);
        let bridge = json!({"mac": "02:00:00:00:00:02", "script": "vif-bridge"});
        let data = json!({"vdev": "xvdb", "pdev_path": "/dev/vg/data", "readwrite": 1});
        let found = obstacles("web", &json!({"nics": [nic, bridge], "disks": [disk, data]}), None);
        let said: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].starts_with("writes to xvdb (/dev/vg/data) would be lost (give"), "{said:?}");
        assert!(said[1].contains("2 NICs") && said[2].contains("vif-bridge"), "{said:?}");
    }

    #[test]
    fn each_disk_is_one_of_ours_and_each_of_ours_one_disk() {
        let disk = |vdev: &str, target: &str| json!({"vdev": vdev, "pdev_path": target, "readwrite": 1});
        let said = |disks: &[serde_json::Value], images: usize| {
            let images: Vec<_> = (0..images).map(|index| PathBuf::from(format!("/srv/{index}.img"))).collect();
            let found = obstacles("web", &json!({"disks": disks}), (!images.is_empty()).then_some(&images[..]));
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let (first, second) = (disk("xvda", "web/disk0"), disk("xvdb", "web/disk1"));
        let emulated = disk("hdb", "nbd:unix:/run/xen-colo/web.disk1.sock:exportname=disk1");
        let none: [&str; 0] = [];
        for disks in [[first.clone(), second.clone()], [second.clone(), first.clone()], [first.clone(), emulated]] {
            assert_eq!(said(&disks, 2), none, "in any order, by either name");
            assert_eq!(said(&disks, 0), none, "of a host that nobody knows");
        }
        let refused = said(&[first.clone(), second.clone()], 1);
        assert!(refused[0].starts_with("writes to xvdb (web/disk1) would be lost (give each disk"), "{refused:?}");
        let refused = said(std::slice::from_ref(&first), 2);
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert!(refused[0].starts_with("/srv/1.img is given as web/disk1, and no disk in its"), "{refused:?}");
        let twice = disk("xvdb", "web/disk0");
        let refused = said(&[first.clone(), twice], 1);
        assert!(refused[0].starts_with("xvda and xvdb are both disk0"), "{refused:?}");
        let foreign = said(&[first, second, disk("xvdc", "/dev/vg/data")], 2);
        assert!(foreign[0].starts_with("writes to xvdc (/dev/vg/data) would be lost"), "{foreign:?}");
    }
}
