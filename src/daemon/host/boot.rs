//! What runs here from the start, and whether it may.
//!
//! | policy | found | the guest |
//! |---|---|---|
//! | `arbiter` | the register has never heard of it | is booted |
//! | `arbiter` | this host held the last generation | is booted if the next one is won |
//! | any | an arbiter says that another host holds it | is not |
//! | `script:PATH` | it was protected when this host ended | is booted if the script fences the peer |
//! | `hold` | it was protected when this host ended | is not, until the operator removes what says so |
//! | `alone` | | is booted: unsafe, for tests |
//!
//! A guest that is not booted leaves a host that is empty, says why, and can stand by. A Xen domain that outlived the
//! host's process is the guest: it is adopted where that may be booted, and paused where it may not. The trap is a peer that asks at
//! the same time: it lost its primary and wants the next generation, so that looking who has this one is not enough.

use super::{Boot, BootConfig, HostConfig, HostError};
use crate::colo::arbiter::{Answer, Claim, Policy, Verdict};
use crate::daemon::arbiter::Arbiter;
use crate::daemon::fence;
use crate::daemon::guest::Guest;
use crate::daemon::protected::{self, Protected};
use crate::daemon::xen::{self, Wire};
use crate::hypervisor::embedded::MachineConfig;

/// The guest, or why there is none that should be.
pub(super) async fn boot(config: &HostConfig, wire: &Wire) -> Result<(Option<Guest>, Option<String>), HostError> {
    let Some(boot) = &config.boot else { return Ok((None, None)) };
    let name = match boot {
        Boot::Embedded(boot) => &boot.name,
        Boot::Xen(boot) => &boot.name,
    };
    let unknown = |why: String| HostError::Unknown { name: name.clone(), why };
    let record = config.disks.first().map(|image| protected::path(image));
    let found = record.as_deref().map_or(Ok(None), Protected::read).map_err(|error| {
        let path = record.as_deref().unwrap_or("".as_ref()).display();
        unknown(format!("whether it was protected when this host ended cannot be told: {path}: {error}"))
    })?;
    if let Some(why) = taken_away(config, name, found).await.map_err(unknown)? {
        let rest = match boot {
            Boot::Embedded(_) => None,
            Boot::Xen(boot) => xen::set_aside(&boot.name).unwrap_or_else(|error| Some(format!("and here: {error}"))),
        };
        let why = [Some(why), rest].into_iter().flatten().collect::<Vec<_>>().join("; ");
        tracing::warn!(host = %config.name, guest = %name, reason = %why, "colo_guest_not_booted");
        return Ok((None, Some(why)));
    }
    let guest = match boot {
        Boot::Embedded(boot) => boot_embedded(config, boot),
        Boot::Xen(boot) => xen::boot(boot, &config.disks, wire).await,
    };
    let guest = guest.map_err(|source| HostError::Guest { name: name.clone(), source })?;
    // It is this host's alone now.
    if let Some(Err(error)) = record.as_deref().map(protected::remove) {
        return Err(unknown(format!("{error}; remove {}", record.unwrap_or_default().display())));
    }
    Ok((Some(guest), None))
}

/// Why the guest is not to be run here, if it is not; an error where nobody can tell.
async fn taken_away(config: &HostConfig, guest: &str, found: Option<Protected>) -> Result<Option<String>, String> {
    let claims = config.policy == Policy::Arbiter;
    if let Some(arbiter) = &config.arbiter
        && let Some(why) = held_elsewhere(arbiter, config, guest, claims).await?
    {
        return Ok(Some(why));
    }
    let Some(Protected { generation, peer, .. }) = found else { return Ok(None) };
    let path = config.disks.first().map(|image| protected::path(image)).unwrap_or_default();
    let was = format!("{guest} was protected by host {peer} in generation {generation} when this host ended");
    let remedy = format!("if host {peer} does not run it, remove {} and start this host again", path.display());
    match &config.policy {
        Policy::Arbiter | Policy::Alone => Ok(None),
        Policy::Hold => Ok(Some(format!("{was}; {remedy}"))),
        Policy::Script(script) => {
            let claim = Claim { guest: guest.to_owned(), expected: generation, holder: config.name.clone() };
            match fence::run(script, &claim, fence::DEADLINE).await {
                Answer::Fenced => Ok(None),
                Answer::NotFenced(why) | Answer::Unreachable(why) => Ok(Some(format!("{was}; {why}; {remedy}"))),
                Answer::Verdict(_) => Ok(Some(format!("{was}; {remedy}"))),
            }
        }
    }
}

/// Who else has the guest, by the register; with `claims` this host must win it again if it had it before.
async fn held_elsewhere(
    arbiter: &Arbiter,
    config: &HostConfig,
    guest: &str,
    claims: bool,
) -> Result<Option<String>, String> {
    let unknown = |error| format!("{error}; nobody can tell who has the guest");
    let mut register = arbiter.query(guest).await.map_err(unknown)?;
    if register.generation > 0 && register.holder == config.name && claims {
        let claim = Claim { guest: guest.to_owned(), expected: register.generation, holder: config.name.clone() };
        match arbiter.claim(claim).await.map_err(unknown)? {
            Verdict::Won { .. } => return Ok(None),
            Verdict::Lost(other) => register = other,
        }
    }
    let elsewhere = register.generation > 0 && register.holder != config.name;
    let why =
        || format!("host {} holds generation {}; {guest} is not this host's", register.holder, register.generation);
    Ok(elsewhere.then(why))
}

fn boot_embedded(config: &HostConfig, boot: &BootConfig) -> Result<Guest, crate::daemon::guest::GuestError> {
    let machine = MachineConfig {
        ram_pages: boot.ram_mib.saturating_mul(256),
        mac: boot.mac,
        ip: boot.ip,
        diverge_percent: boot.diverge_percent,
        host_entropy_seed: config.entropy_seed,
    };
    let disk_bytes = boot.disk_mib.saturating_mul(1 << 20);
    Guest::boot(&boot.name, &machine, &config.disks, disk_bytes, 0)
}
