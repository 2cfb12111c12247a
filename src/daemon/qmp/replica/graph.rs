//! Which drive stands on which: made, changed and taken apart in QEMU's commands.
//!
//! ```text
//!   an image ◀─ a secondary ◀─┐
//!       ◀─────────────────────┴─ a quorum ◀─ (children.1) a primary's node ─▶ a client ─▶ the secondary's export
//! ```
//!
//! A drive that another one stands on stays. Source: QEMU `block/quorum.c`, `blockdev.c`, `block/monitor/block-hmp-cmds.c`.

use super::drives::{Drive, Image};
use super::primary::{Link, Node, Stage};
use crate::qmp::drive::{self, Below, Child};
use crate::qmp::{Event, Outcome, QmpError, done};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use tokio::sync::broadcast;

/// By name.
pub(super) type Drives = BTreeMap<String, Drive>;

/// The one child that a quorum may get; the first is `children.0`.
const CHILD: &str = "children.1";

fn nowhere(name: &str) -> String {
    format!("Cannot find device='{name}' nor node-name='{name}'")
}

fn open(file: &str) -> Result<Image, String> {
    Image::open(file.into()).map_err(|why| format!("Could not open '{file}': {why}"))
}

/// The image under a drive, and whether it is what the guest sees of it.
pub(super) fn image(drives: &Drives, name: &str) -> Option<(Image, bool)> {
    match drives.get(name)? {
        Drive::Image(image) | Drive::Quorum { disk: image, .. } => Some((image.clone(), false)),
        Drive::Secondary { image } => match drives.get(image) {
            Some(Drive::Image(image)) => Some((image.clone(), true)),
            _ => None,
        },
        Drive::Client(_) | Drive::Primary(_) => None,
    }
}

/// The primary's replication nodes.
pub(super) fn nodes(drives: &Drives) -> impl Iterator<Item = (&str, &Node)> {
    drives.iter().filter_map(|(name, drive)| match drive {
        Drive::Primary(node) => Some((name.as_str(), node)),
        _ => None,
    })
}

/// The same, to be changed.
pub(super) fn nodes_mut(drives: &mut Drives) -> impl Iterator<Item = (&str, &mut Node)> {
    drives.iter_mut().filter_map(|(name, drive)| match drive {
        Drive::Primary(node) => Some((name.as_str(), node)),
        _ => None,
    })
}

/// The connections to the secondary, by what they are yanked by.
pub(super) fn links(drives: &Drives) -> BTreeMap<String, Weak<Link>> {
    let link = |drive: &Drive| match drive {
        Drive::Client(link) => Some(Arc::downgrade(link)),
        Drive::Primary(node) => Some(Arc::downgrade(&node.link)),
        _ => None,
    };
    drives.values().filter_map(link).filter_map(|link| Some((link.upgrade()?.name.clone(), link))).collect()
}

/// Whether another drive stands on it.
fn is_below(drives: &Drives, name: &str) -> bool {
    drives.values().any(|drive| match drive {
        Drive::Secondary { image } => image == name,
        Drive::Quorum { over, .. } => over.as_deref() == Some(name),
        Drive::Primary(node) => {
            node.client.as_deref() == Some(name) || node.disk.as_ref().is_some_and(|attached| attached.disk == name)
        }
        Drive::Image(_) | Drive::Client(_) => false,
    })
}

/// Whether it must stay.
pub(super) fn is_used(drives: &Drives, name: &str) -> bool {
    is_below(drives, name) || matches!(drives.get(name), Some(Drive::Primary(node)) if node.disk.is_some())
}

/// Makes a drive. A secondary's only before its replication has begun.
pub(super) async fn add(drives: &mut Drives, has_begun: bool, drive: drive::Drive) -> Result<(), String> {
    let name = drive.name().to_owned();
    if drives.contains_key(&name) {
        return Err(format!("Duplicate nodes with node-name='{name}'"));
    }
    let made = match drive {
        drive::Drive::Image { file, .. } => Drive::Image(open(&file)?),
        drive::Drive::Secondary { image, .. } => {
            if !matches!(drives.get(&image), Some(Drive::Image(_))) {
                return Err(nowhere(&image));
            }
            if is_below(drives, &image) {
                return Err(format!("image '{image}' has a replication node or a quorum already"));
            }
            if has_begun {
                return Err("Block replication is running or done".into());
            }
            Drive::Secondary { image }
        }
        drive::Drive::Quorum { child, .. } => {
            let ((image, guest), over) = match child {
                Child::File(file) => ((open(&file)?, false), None),
                Child::Drive(name) if is_below(drives, &name) => return Err(format!("Node {name} is in use")),
                Child::Drive(name) => match drives.get(&name) {
                    Some(Drive::Image(_) | Drive::Secondary { .. }) => {
                        (image(drives, &name).ok_or_else(|| nowhere(&name))?, Some(name))
                    }
                    _ => return Err(nowhere(&name)),
                },
            };
            let (disk, source) = image.quorum(guest);
            Drive::Quorum { disk, source, over }
        }
        drive::Drive::Client { server, .. } => Drive::Client(Link::open(&server, &name).await?),
        drive::Drive::Primary { below, .. } => Drive::Primary(match below {
            Below::Server(server) => Node::new(Link::open(&server, &name).await?, None),
            Below::Client(client) if is_below(drives, &client) => return Err(format!("Node {client} is in use")),
            Below::Client(client) => match drives.get(&client) {
                Some(Drive::Client(link)) => Node::new(link.clone(), Some(client)),
                Some(_) => return Err(format!("'{client}' is no client of an export (driver=nbd)")),
                None => return Err(nowhere(&client)),
            },
        }),
    };
    drives.insert(name, made);
    Ok(())
}

/// `x-blockdev-change`: a node becomes a child of a quorum, or the child goes.
pub(super) fn change(
    drives: &mut Drives,
    events: &broadcast::Sender<Event>,
    parent: &str,
    child: Option<&str>,
    node: Option<&str>,
) -> Outcome {
    let error = |why: String| Err(QmpError::generic(why));
    let Some(drive) = drives.get(parent) else { return error(nowhere(parent)) };
    let source = if let Drive::Quorum { source, .. } = drive { Some(source.clone()) } else { None };
    let is_child = |node: &Node| node.disk.as_ref().is_some_and(|attached| attached.disk == parent);
    match (child, node) {
        (Some(_), Some(_)) => error("The parameters child and node are in conflict".into()),
        (None, None) => error("Either child or node must be specified".into()),
        (Some("children.0"), None) if source.is_some() => {
            error("The number of children cannot be lower than the vote threshold 1".into())
        }
        (Some(child), None) => {
            let found = nodes_mut(drives).find(|(_, node)| child == CHILD && is_child(node));
            let Some((_, node)) = found else {
                return error(format!("Node '{parent}' does not have child '{child}'"));
            };
            if node.stage == Stage::Running {
                node.stop();
            }
            node.disk = None;
            done()
        }
        (None, Some(name)) => {
            let has_child = nodes(drives).any(|(_, node)| is_child(node));
            let Some(drive) = drives.get_mut(name) else { return error(format!("Node '{name}' not found")) };
            let Some(source) = source else {
                return error(format!("The node {parent} does not support adding a child"));
            };
            let Drive::Primary(node) = drive else {
                return error(format!("{name} is no replication node: it needs driver=replication,mode=primary"));
            };
            if node.disk.is_some() {
                return error(format!("The node {name} already has a parent"));
            }
            if has_child {
                return error(format!("{parent} has a secondary already: {CHILD}"));
            }
            if node.stage == Stage::Done {
                return error(format!("{name} is done; delete it and add another"));
            }
            let (events, disk) = (events.clone(), parent.to_owned());
            let failed = move |why: &str| {
                let data = json!({"stage": "failed", "disk": disk, "error": why});
                // Nobody may be listening.
                let _ = events.send(Event::new("XEN_COLO_REPLICATION", data));
            };
            node.attach(parent, source, failed).map_err(QmpError::generic)?;
            done()
        }
    }
}
