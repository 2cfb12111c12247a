//! The fencing script: somebody else's program that makes sure the peer is down.
//!
//! Called as `SCRIPT GUEST EXPECTED-GENERATION CLAIMANT`. Exit code 0, and nothing else, means that the peer is
//! fenced. The trap: a script that hangs must not hang the takeover for ever, and one that is given up must not go
//! on in the background and fence the survivor later; it is killed.

use crate::colo::arbiter::{Answer, Claim};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// How long a script may take.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Runs the script to its end or the deadline.
pub async fn run(script: &Path, claim: &Claim, deadline: Duration) -> Answer {
    let child = Command::new(script)
        .arg(&claim.guest)
        .arg(claim.expected.to_string())
        .arg(&claim.holder)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let name = script.display();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return Answer::NotFenced(format!("fencing script {name}: {error}")),
    };
    match tokio::time::timeout(deadline, child.wait()).await {
        Ok(Ok(status)) if status.success() => Answer::Fenced,
        Ok(Ok(status)) => Answer::NotFenced(format!("fencing script {name}: {status}")),
        Ok(Err(error)) => Answer::NotFenced(format!("fencing script {name}: {error}")),
        Err(_) => {
            let _ = child.kill().await;
            Answer::NotFenced(format!("fencing script {name} was not done within {deadline:?}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    async fn fence_with(body: &str) -> Answer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fence");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let claim = Claim { guest: "web".into(), expected: 3, holder: "b".into() };
        run(&path, &claim, Duration::from_millis(500)).await
    }

    #[tokio::test]
    async fn only_exit_code_0_means_fenced() {
        assert_eq!(fence_with("test \"$*\" = 'web 3 b'").await, Answer::Fenced);
        for body in ["exit 1", "exit 255", "kill -9 $$", "sleep 60"] {
            assert!(matches!(fence_with(body).await, Answer::NotFenced(_)), "{body}");
        }
        let claim = Claim { guest: "web".into(), expected: 3, holder: "b".into() };
        let missing = run(Path::new("/nonexistent/fence"), &claim, DEADLINE).await;
        assert!(matches!(missing, Answer::NotFenced(_)));
    }
}
