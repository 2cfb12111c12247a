//! What a monitor of disks says of them: whether all that should be replicated is, and every number there is.

use super::exports::NbdServer;
use super::primary::Stage as NodeStage;
use super::{NOT_RUNNING, Phase, State, graph};
use crate::replica::epochs::{ReplicaStatus, Stage};
use serde_json::{Value, json};

/// What `query-replication` returns.
pub(super) fn replication(state: &State) -> Value {
    let disks = state.phase.replicas().map_or_else(Vec::new, |(replicas, names)| {
        let disk = |(name, status): (&String, ReplicaStatus)| {
            let mut disk = serde_json::to_value(status).unwrap_or_default();
            disk["name"] = json!(name);
            disk
        };
        names.iter().zip(replicas.status()).map(disk).collect()
    });
    let exports = state.nbd.as_ref().map(NbdServer::ids);
    let mut all = status(state);
    let runs = graph::nodes(&state.drives).any(|(_, node)| node.stage == NodeStage::Running);
    all["stage"] = json!(if runs { "running" } else { state.phase.name() });
    all["disks"] = disks.into();
    all["primary"] = graph::nodes(&state.drives).map(|(name, node)| node.to_json(name)).collect();
    all["exports"] = json!(exports);
    all
}

/// What `query-xen-replication-status` returns: an error that is latched on any disk shows, by the disk's name.
pub(super) fn status(state: &State) -> Value {
    let nodes: Vec<_> = graph::nodes(&state.drives).filter(|(_, node)| node.stage != NodeStage::Done).collect();
    let idle: Vec<&str> =
        nodes.iter().filter(|(_, node)| node.stage == NodeStage::Idle).map(|(name, _)| *name).collect();
    let broken: Vec<String> = nodes.iter().filter_map(|(_, node)| node.failing()).collect();
    match nodes.len() {
        0 => {}
        _ if !broken.is_empty() => {
            return json!({"error": true, "desc": format!("I/O error occurred ({})", broken.join("; "))});
        }
        _ if idle.is_empty() => return json!({"error": false}),
        all if idle.len() == all => return json!({"error": true, "desc": NOT_RUNNING}),
        _ => return json!({"error": true, "desc": format!("{NOT_RUNNING} ({})", idle.join(", "))}),
    }
    let phase = &state.phase;
    let Some((replicas, names)) = phase.replicas() else {
        let stopped = if graph::nodes(&state.drives).next().is_some() { " (stopped)" } else { "" };
        return json!({"error": true, "desc": format!("{NOT_RUNNING}{stopped}")});
    };
    let failing = |(name, status): (&String, ReplicaStatus)| {
        let failed = status.broken || status.stage == Stage::FailoverFailed || !status.errors.is_empty();
        failed.then(|| format!("{name}: {}", status.errors.first().map_or("broken", String::as_str)))
    };
    let failing: Vec<String> = names.iter().zip(replicas.status()).filter_map(failing).collect();
    match phase {
        _ if !failing.is_empty() => {
            json!({"error": true, "desc": format!("I/O error occurred ({})", failing.join("; "))})
        }
        Phase::Running(..) => json!({"error": false}),
        Phase::TakenOver(..) => json!({"error": true, "desc": format!("{NOT_RUNNING} (taken over)")}),
        Phase::NotStarted | Phase::Stopped(..) => json!({"error": true, "desc": format!("{NOT_RUNNING} (stopped)")}),
    }
}

/// After a takeover what is not in an image yet is a commit job, as a QEMU's is.
pub(super) fn merging(phase: &Phase) -> Value {
    let Phase::TakenOver(replicas, names) = phase else { return json!([]) };
    let job = |(name, status): (&String, ReplicaStatus)| {
        let (left, done) = (status.debt_bytes, status.merged_bytes);
        let job = json!({"type": "commit", "device": name, "len": done + left, "offset": done});
        (status.stage != Stage::Done).then_some(job)
    };
    names.iter().zip(replicas.status()).filter_map(job).collect()
}

/// What `query-colo-status` returns.
pub(super) fn colo_status(state: &State) -> Value {
    let of = |mode: &str, last: &str, reason: &str| json!({"mode": mode, "last-mode": last, "reason": reason});
    if graph::nodes(&state.drives).any(|(_, node)| node.stage == NodeStage::Running) {
        return of("primary", "none", "none");
    }
    if graph::nodes(&state.drives).any(|(_, node)| node.stage == NodeStage::Done) {
        return of("none", "primary", "request");
    }
    match &state.phase {
        Phase::NotStarted => of("none", "none", "none"),
        Phase::Running(..) => of("secondary", "none", "none"),
        Phase::TakenOver(..) | Phase::Stopped(..) => of("none", "secondary", "request"),
    }
}
