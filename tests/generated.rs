//! Completions and man pages are made from the commands, and the ones that are kept are the ones that are made now.

use crate::common::{installed, run, xl_colo};
use std::collections::BTreeMap;
use std::path::Path;

const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/packaging");

fn files(dir: &Path) -> BTreeMap<String, String> {
    let folders = ["completions", "man"].map(|folder| dir.join(folder));
    let entries = folders.iter().flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten());
    entries
        .map(|entry| {
            let path = entry.path();
            let name = path.strip_prefix(dir).unwrap().display().to_string();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect()
}

#[tokio::test]
async fn completions_and_man_pages_are_current() {
    let dir = tempfile::tempdir().unwrap();
    let output = xl_colo(&["generate", dir.path().to_str().unwrap()]).await;
    assert!(output.status.success(), "{output:?}");
    let (made, kept) = (files(dir.path()), files(KEPT.as_ref()));
    let remedy = "cargo run -- generate scripts/packaging";
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&made), names(&kept), "run: {remedy}");
    for (name, text) in &made {
        assert!(kept[name] == *text, "scripts/packaging/{name} is of another version; run: {remedy}");
    }
    // Each command has a page, and none that is hidden.
    let help = String::from_utf8(xl_colo(&["--help"]).await.stdout).unwrap();
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    for command in commands.filter_map(|line| line.split_whitespace().next()).filter(|command| *command != "help") {
        assert!(made.contains_key(&format!("man/xl-colo-{command}.1")), "{command} has no page");
        let listed = format!("xl\\-colo\\-{}(1)", command.replace('-', "\\-"));
        assert!(made["man/xl-colo.1"].contains(&listed), "{command} is not in xl-colo(1)");
    }
    assert!(!made.keys().any(|name| name.contains("generate") || name.contains("keeper")));
    assert!(!made["completions/xl-colo.bash"].contains("keeper"));
}

#[tokio::test]
async fn shells_can_read_the_completions() {
    let Some(bash) = installed("bash") else { return };
    let script = format!(
        "source {KEPT}/completions/xl-colo.bash; COMP_WORDS=(xl-colo unpro); COMP_CWORD=1; _xl__colo xl-colo unpro xl-colo; \
         echo \"${{COMPREPLY[@]}}\""
    );
    let output = run(bash.to_str().unwrap(), &["-c", &script]).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "unprotect", "{output:?}");
}
