//! libxl, in a process of its own.
//!
//! ```text
//!   xl-colo ── spawns ──▶ xl-colo libxl VERB ARGUMENTS    stdin: what it needs    stdout: what came of it
//! ```
//!
//! The trap: libxl forks, runs scripts and owns SIGCHLD while it does; beside an async runtime, which owns it too,
//! one of the two waits for ever. It also blocks for seconds. So each order is a child of this program.

use ::xen::libxl::Context;
use ::xen::{DomId, Error, Store};
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The command of this program that serves an order.
pub const COMMAND: &str = "libxl";
/// Bytes of a configuration that are read; libxl's own are about 5,000.
const CONFIG_MAX_BYTES: u64 = 1 << 20;
/// A guest that has just taken over needs the processor to connect its devices again: its name can wait.
const RENAME_DELAY: Duration = Duration::from_secs(5);
/// What a domain is called until it takes over: xl's own ending.
const INCOMING: &str = "--incoming";

/// The child's part: carries out one order, and says what came of it.
pub fn serve(arguments: &[String], input: &mut dyn Read) -> Result<String, String> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let libxl = || Context::new().map_err(|e| e.to_string());
    let said = |e: Error| e.to_string();
    match words[..] {
        ["config", domid] => libxl()?.config_json(parse(domid)?).map_err(said),
        ["create"] => {
            let mut json = String::new();
            input.take(CONFIG_MAX_BYTES).read_to_string(&mut json).map_err(|e| format!("configuration: {e}"))?;
            libxl()?.create_paused(&json, false).map(|domid| domid.0.to_string()).map_err(said)
        }
        ["destroy", domid] => libxl()?.destroy(parse(domid)?).map(|()| String::new()).map_err(said),
        ["rename", domid, old, new] => {
            std::thread::sleep(RENAME_DELAY);
            libxl()?.rename(parse(domid)?, old, new).map(|()| String::new()).map_err(said)
        }
        _ => Err(format!("{arguments:?} is no order to libxl")),
    }
}

fn parse(domid: &str) -> Result<DomId, String> {
    domid.parse().map(DomId).map_err(|_| format!("{domid:?} is no domain id"))
}

fn start(arguments: &[&str], said: fn() -> Stdio) -> Result<Child, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    Command::new(program)
        .arg(COMMAND)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(said())
        .stderr(said())
        .spawn()
        .map_err(|e| format!("start libxl's process: {e}"))
}

fn order(arguments: &[&str], input: &str) -> Result<String, String> {
    let mut child = start(arguments, Stdio::piped)?;
    if let Some(mut pipe) = child.stdin.take() {
        // A child that ended at once says why on its standard error.
        let _ = pipe.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|e| format!("libxl's process: {e}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    // A configuration that libxl itself cannot read has been seen to end it without a word.
    let said = Some(text(&output.stderr)).filter(|said| !said.is_empty()).unwrap_or(output.status.to_string());
    Err(format!("libxl {}: {said}", arguments.first().unwrap_or(&"")))
}

/// What a domain is called that stands by for a guest, and for a moment after it took over.
#[must_use]
pub fn incoming(name: &str) -> String {
    format!("{name}{INCOMING}")
}

/// A domain's configuration, as libxl keeps it.
pub fn config(domid: DomId) -> Result<serde_json::Value, String> {
    let json = order(&["config", &domid.0.to_string()], "")?;
    serde_json::from_str(&json).map_err(|e| format!("libxl's configuration of domain {domid}: {e}"))
}

/// Refused when there is a domain of that name.
pub fn check_free(name: &str) -> Result<(), String> {
    let store = Store::open().map_err(|e| e.to_string())?;
    match store.by_name(name).map_err(|e| e.to_string())? {
        None => Ok(()),
        Some(domid) => Err(format!("domain {domid} is called {name} already; rename or destroy it: xl destroy {name}")),
    }
}

/// Makes a paused domain that will become `name`, with devices and hotplug scripts and all. What a former attempt
/// left under the name it has until then is removed.
pub fn create_incoming(name: &str, config: &serde_json::Value) -> Result<DomId, String> {
    let incoming = incoming(name);
    let store = Store::open().map_err(|e| e.to_string())?;
    if let Some(domid) = store.by_name(&incoming).map_err(|e| e.to_string())? {
        destroy(domid)?;
    }
    let mut config = config.clone();
    let named = config.pointer_mut("/c_info/name").ok_or("the primary's configuration has no c_info.name")?;
    *named = incoming.into();
    let made = order(&["create"], &config.to_string())?;
    made.parse().map(DomId).map_err(|_| format!("libxl's process answered {made:?} and not a domain id"))
}

/// Gives the domain that took over its name.
pub fn rename_incoming(domid: DomId, name: &str) -> Result<(), String> {
    order(&["rename", &domid.0.to_string(), &incoming(name), name], "").map(drop)
}

/// Ends a domain.
pub fn destroy(domid: DomId) -> Result<(), String> {
    order(&["destroy", &domid.0.to_string()], "").map(drop)
}

/// The disks of a configuration whose target is none of `ours`: what is written to them is not replicated.
#[must_use]
pub fn foreign_disks(config: &serde_json::Value, ours: &[String]) -> Vec<String> {
    let disks = config["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let target = |disk: &serde_json::Value| disk["pdev_path"].as_str().unwrap_or_default().to_owned();
    let foreign = disks.iter().filter(|disk| disk["readwrite"] != 0 && !ours.contains(&target(disk)));
    foreign.map(|disk| format!("{} ({})", disk["vdev"].as_str().unwrap_or("?"), target(disk))).collect()
}

/// The disks of a configuration whose target is one of these spellings, by the guest's names for them.
#[must_use]
pub fn disks_of(config: &serde_json::Value, targets: &[String]) -> Vec<String> {
    let disks = config["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_one = |disk: &&serde_json::Value| {
        disk["pdev_path"].as_str().is_some_and(|path| targets.iter().any(|target| target == path))
    };
    let named = disks.iter().filter(is_one);
    named.map(|disk| disk["vdev"].as_str().unwrap_or("?").to_owned()).collect()
}

/// The MAC addresses of a configuration's NICs.
#[must_use]
pub fn macs(config: &serde_json::Value) -> Vec<[u8; 6]> {
    let nics = config["nics"].as_array().map(Vec::as_slice).unwrap_or_default();
    nics.iter().filter_map(|nic| parse_mac(nic["mac"].as_str()?)).collect()
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = parts.next().filter(|part| part.len() == 2).and_then(|part| u8::from_str_radix(part, 16).ok())?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn disks_that_are_not_replicated_are_named() {
        let config = json!({"disks": [
            {"vdev": "xvda", "pdev_path": "web/disk0", "readwrite": 1},
            {"vdev": "xvdb", "pdev_path": "/dev/vg/data", "readwrite": 1},
            {"vdev": "xvdc", "pdev_path": "/srv/cd.iso", "readwrite": 0},
        ]});
        assert_eq!(foreign_disks(&config, &["web/disk0".into()]), ["xvdb (/dev/vg/data)"]);
        assert_eq!(foreign_disks(&json!({}), &[]), Vec::<String>::new());
    }

    #[test]
    fn macs_are_read_and_nonsense_is_not() {
        let config =
            json!({"nics": [{"mac": "00:16:3e:00:00:Fa"}, {"mac": "00:16:3e:00:00"}, {"mac": "0:16:3e:0:0:1"}]});
        assert_eq!(macs(&config), [[0, 0x16, 0x3e, 0, 0, 0xfa]]);
    }
}
