//! The project's rules, as tests over its own source.
//!
//! ```text
//! main → cli, demo → report → daemon → { colo, compare, nbd, qmp, replica, hypervisor } → { clock, page, bitmap, pool, disk, record, mutant }
//!      → save_helper → { image } ─────────────────────────────────────────────→
//! ```
//!
//! A rule is a function from a file to what is wrong with it. [`rules`] plants a violation for each: a rule that has
//! never caught one proves nothing. An exception is a line in a list here, with its reason, and never a weaker rule.

mod lex;
mod rules;

use lex::{Path, Token};
use std::collections::{BTreeMap, BTreeSet};

/// Longest file, in lines.
const LINES_MAX: usize = 600;
/// What everything else is written in; may be named from anywhere.
const BASE: [&str; 10] = ["clock", "page", "bitmap", "pool", "scan", "disk", "record", "say", "mutant", "carried"];
/// The folders that only `daemon` joins, but for `image`, which `save_helper` drives too.
const MIDDLE: [&str; 7] = ["colo", "compare", "nbd", "qmp", "image", "replica", "hypervisor"];
/// The folders of the project.
const FOLDERS: [&str; 6] = ["src", "xen", "bindings", "scripts", "tests", ".ci"];
/// The folders that decide and never do.
const PURE: [&str; 5] = ["colo", "compare", "nbd", "qmp", "image"];

/// A file of the project: its path from the root, and its text.
pub(crate) struct Source<'a> {
    pub(crate) path: &'a str,
    pub(crate) text: &'a str,
    tokens: Vec<Token>,
    paths: Vec<Path>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(path: &'a str, text: &'a str) -> Self {
        let tokens = if path.ends_with(".rs") { lex::tokens(text) } else { Vec::new() };
        let paths = lex::paths(&tokens);
        Self { path, text, tokens, paths }
    }

    /// The module of the crate's root that the file belongs to: `colo` for `src/colo/stream.rs`.
    fn top(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        Some(inside.split('/').next().unwrap_or(inside).trim_end_matches(".rs"))
    }

    fn is_in(&self, folders: &[&str]) -> bool {
        self.top().is_some_and(|top| folders.contains(&top))
    }

    /// How deep the file's module is in the crate: 2 for `src/colo/stream.rs`, 1 for `src/colo/mod.rs`.
    fn depth(&self) -> usize {
        let names = self.path.split('/').skip(1);
        names.filter(|name| !["mod.rs", "lib.rs", "main.rs"].contains(name)).count()
    }

    fn violation(&self, line: usize, what: impl std::fmt::Display) -> String {
        format!("{}:{line}: {what}", self.path)
    }

    /// A violation for each path that `banned` says something about.
    fn paths_where(&self, banned: impl Fn(&Path) -> Option<String>) -> Vec<String> {
        self.paths.iter().filter_map(|path| Some(self.violation(path.line, banned(path)?))).collect()
    }
}

pub(crate) type Rule = fn(&Source) -> Vec<String>;

/// Every rule that looks at one file.
pub(crate) const RULES: [(&str, Rule); 13] = [
    ("layers", layers),
    ("tokio", tokio),
    ("pair", pair),
    ("pure", pure),
    ("replica and hypervisor", blocking),
    ("clock", clock),
    ("length", length),
    ("module docs", module_docs),
    ("unfinished", unfinished),
    ("printing", printing),
    ("unsafe", no_unsafe),
    ("ignored tests", ignored_tests),
    ("machine names", machine_names),
];

/// What a module of the root may import, besides itself and [`BASE`].
fn may_import(top: &str) -> &'static [&'static str] {
    match top {
        "daemon" => &MIDDLE,
        // The command line is written in the words of what it starts: addresses, policies, modes.
        "cli" => &["daemon", "colo", "compare", "nbd", "qmp", "replica", "hypervisor"],
        // Logs of hosts that are gone, in the words of those who wrote them.
        "report" => &["daemon", "colo"],
        "demo" => &["cli", "report", "daemon", "colo", "compare", "nbd", "qmp", "replica", "hypervisor"],
        // A process that libxl starts: it knows no daemon, and no daemon it.
        "save_helper" => &["image"],
        _ => &[],
    }
}

/// Arrows between folders go one way, and the middle folders do not know each other.
pub(crate) fn layers(source: &Source) -> Vec<String> {
    let Some(top) = source.top().filter(|top| !["lib", "main"].contains(top)) else { return Vec::new() };
    source.paths_where(|path| {
        let supers = path.parts.iter().take_while(|part| *part == "super").count();
        let target = match path.parts[0].as_str() {
            "crate" | "xen_colo" => path.parts.get(1)?,
            "super" if supers >= source.depth() => path.parts.get(supers)?,
            _ => return None,
        };
        let known = BASE.contains(&target.as_str())
            || MIDDLE.contains(&target.as_str())
            || ["daemon", "cli", "demo", "report", "save_helper"].contains(&target.as_str());
        let allowed = target == top
            || may_import(top).contains(&target.as_str())
            || BASE.contains(&target.as_str())
            || (supers > 0 && !known);
        (!allowed).then(|| format!("{top} must not import {target}"))
    })
}

/// Async is one folder, the demo, and `main`.
pub(crate) fn tokio(source: &Source) -> Vec<String> {
    if !source.path.starts_with("src/") || source.is_in(&["daemon", "demo", "main"]) {
        return Vec::new();
    }
    source.paths_where(|path| path.contains(&["tokio"]).then(|| "tokio outside daemon, demo and main".into()))
}

/// What `path` does that a banned list names.
fn does(path: &Path, banned: &[&[&str]]) -> Option<String> {
    let found = banned.iter().find(|words| path.contains(words))?;
    Some(format!("{} is banned here", found.join("::")))
}

const NET: [&[&str]; 2] = [&["std", "net"], &["unix", "net"]];
const THREAD: [&[&str]; 1] = [&["std", "thread"]];
const FILES: [&[&str]; 2] = [&["std", "fs"], &["unix", "fs"]];
const NOW: [&[&str]; 2] = [&["Instant", "now"], &["SystemTime"]];

/// The sides of a pair are what the simulator runs: no wire, no thread, no clock.
pub(crate) fn pair(source: &Source) -> Vec<String> {
    if !source.path.starts_with("src/daemon/pair") {
        return Vec::new();
    }
    let banned = [&NET[..], &THREAD, &NOW, &[&["tokio"]]].concat();
    source.paths_where(|path| does(path, &banned))
}

/// Pure machines decide and never do, and time is an argument.
pub(crate) fn pure(source: &Source) -> Vec<String> {
    if !source.is_in(&PURE) {
        return Vec::new();
    }
    let banned = [&NET[..], &THREAD, &FILES, &NOW, &[&["std", "time", "Instant"], &["time", "*"]]].concat();
    source.paths_where(|path| does(path, &banned))
}

/// Disk replication and the guests block and own their buffers; they have no socket, and the guest one thread.
pub(crate) fn blocking(source: &Source) -> Vec<String> {
    let threads_allowed = [
        // The guest runs on a thread of its own: that is what the file is.
        "src/hypervisor/embedded/domain.rs",
        // Each order to libxl is a process of its own, and one of them waits until its time.
        "src/hypervisor/xen/toolstack.rs",
        // Waits out the busiest seconds of a guest that took over.
        "src/hypervisor/xen/renaming.rs",
        // Tests that the thread stops when it is told to, and clients for it.
        "src/hypervisor/embedded/tests/threads.rs",
    ];
    let mut banned = [&NET[..], &NOW, &[&["tokio"]]].concat();
    if !threads_allowed.contains(&source.path) {
        banned.extend(THREAD);
    }
    if source.is_in(&["replica", "hypervisor"]) { source.paths_where(|path| does(path, &banned)) } else { Vec::new() }
}

/// The clock is read by drivers only.
pub(crate) fn clock(source: &Source) -> Vec<String> {
    if !source.path.starts_with("src/") || source.is_in(&["daemon", "demo"]) {
        return Vec::new();
    }
    source.paths_where(|path| does(path, &NOW))
}

/// A file fits into a head.
pub(crate) fn length(source: &Source) -> Vec<String> {
    // Made from the commands, which are what is read.
    if source.path.starts_with("scripts/packaging/completions/") {
        return Vec::new();
    }
    let lines = source.text.lines().count();
    let too_long = lines > LINES_MAX && (source.path.ends_with(".rs") || source.path.starts_with("scripts/"));
    too_long.then(|| source.violation(lines, format!("{lines} lines; {LINES_MAX} at most"))).into_iter().collect()
}

/// A file says first what it is.
pub(crate) fn module_docs(source: &Source) -> Vec<String> {
    let silent = source.path.ends_with(".rs") && !source.text.starts_with("//! ");
    silent.then(|| source.violation(1, "a file begins with //! docs")).into_iter().collect()
}

/// The macros of `names` that these tokens of a file call.
fn calls(source: &Source, tokens: &[Token], names: &[&str]) -> Vec<String> {
    let calls = tokens.windows(2).filter(|pair| pair[1].text == "!");
    calls
        .filter(|pair| names.contains(&pair[0].text.as_str()))
        .map(|pair| source.violation(pair[0].line, format!("{}!", pair[0].text)))
        .collect()
}

/// Nothing is left for later where it would panic or print.
pub(crate) fn unfinished(source: &Source) -> Vec<String> {
    calls(source, &source.tokens, &["todo", "unimplemented", "dbg"])
}

/// These panic when their reader has gone; `say` does not. Tests may.
pub(crate) fn printing(source: &Source) -> Vec<String> {
    if !source.path.starts_with("src/") || source.path.contains("tests") {
        return Vec::new();
    }
    let is_test = |words: &[Token]| words.iter().map(|word| word.text.as_str()).eq(["cfg", "(", "test"]);
    let tests = source.tokens.windows(3).position(is_test).unwrap_or(source.tokens.len());
    calls(source, &source.tokens[..tests], &["print", "println", "eprint", "eprintln"])
}

/// Unsafe code lives in packages of its own, and both crates of this one forbid it.
pub(crate) fn no_unsafe(source: &Source) -> Vec<String> {
    if !source.path.starts_with("src/") {
        return Vec::new();
    }
    let mut found: Vec<_> = source
        .tokens
        .iter()
        .filter(|token| token.text == "unsafe")
        .map(|token| source.violation(token.line, "unsafe"))
        .collect();
    let is_root = ["src/lib.rs", "src/main.rs"].contains(&source.path);
    if is_root && !source.text.lines().any(|line| line == "#![forbid(unsafe_code)]") {
        found.push(source.violation(1, "#![forbid(unsafe_code)] is missing"));
    }
    found
}

/// A test that is not run is not a test.
pub(crate) fn ignored_tests(source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = &source.tokens[..];
    while let Some(at) = rest.windows(2).position(|pair| pair[0].text == "#" && pair[1].text == "[") {
        rest = &rest[at + 2..];
        let mut depth = 1;
        for token in rest {
            match token.text.as_str() {
                "[" => depth += 1,
                "]" => depth -= 1,
                "ignore" => found.push(source.violation(token.line, "an ignored test")),
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// Nothing in the tree knows where it was written: no home directory, and no registry but the public one.
pub(crate) fn machine_names(source: &Source) -> Vec<String> {
    // Pieced together, so that this file does not contain what it looks for.
    let homes = [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/"), concat!("/wo", "rk/")];
    let public = "registry+https://github.com/rust-lang/crates.io-index";
    let lines = source.text.lines().enumerate();
    lines
        .filter_map(|(at, line)| {
            let is_path = |home: &str| {
                let before = line.find(home).and_then(|at| line[..at].chars().next_back());
                line.contains(home) && !before.is_some_and(|c| c.is_alphanumeric() || "._-}".contains(c))
            };
            let foreign = line.contains(concat!("regis", "try+")) && !line.contains(public)
                || line.contains(concat!("replace", "-with"))
                || line.contains(concat!("[sour", "ce."));
            let what = match homes.iter().find(|home| is_path(home)) {
                Some(home) => format!("a path of somebody's machine: {home}"),
                None if foreign => "a registry that is not the public one".into(),
                None => return None,
            };
            Some(source.violation(at + 1, what))
        })
        .collect()
}

/// The files of `files` that no `mod` declaration leads to from `roots`.
pub(crate) fn dead_files(files: &BTreeMap<String, String>, roots: &[&str]) -> Vec<String> {
    let mut alive = BTreeSet::new();
    let mut todo: Vec<String> = roots.iter().map(|root| (*root).to_owned()).collect();
    while let Some(path) = todo.pop() {
        let Some(text) = files.get(&path) else { continue };
        if !alive.insert(path.clone()) {
            continue;
        }
        let folder = match path.rsplit_once('/') {
            Some((folder, "mod.rs")) => folder.to_owned(),
            // The roots look for their modules beside themselves.
            Some((folder, _)) if roots.contains(&path.as_str()) => folder.to_owned(),
            _ => path.trim_end_matches(".rs").to_owned(),
        };
        for declaration in lex::tokens(text).windows(3) {
            if let [word, name, end] = declaration
                && (word.text.as_str(), end.text.as_str()) == ("mod", ";")
            {
                todo.push(format!("{folder}/{}.rs", name.text));
                todo.push(format!("{folder}/{}/mod.rs", name.text));
                // What a root declares inside a module that is called as it is.
                todo.push(format!("{}/{}.rs", path.trim_end_matches(".rs"), name.text));
            }
        }
    }
    files.keys().filter(|path| !alive.contains(*path)).map(|path| format!("{path}:1: no mod leads here")).collect()
}

/// Files whose first folder is none of the architecture's.
fn strange_folders<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<String> {
    let first = |path: &'a str| path.split_once('/').map(|(folder, _)| folder);
    let strange = paths.filter(|path| first(path).is_some_and(|folder| !FOLDERS.contains(&folder)));
    strange.map(|path| format!("{path}:1: no folder of the architecture")).collect()
}

/// Reads every text file of the project below `folder` (all of it for "").
fn tree(folder: &str) -> BTreeMap<String, String> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut todo = vec![root.join(folder)];
    let mut files = BTreeMap::new();
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.expect("an entry of a folder that can be read").path();
            let name = path.strip_prefix(root).ok().and_then(|name| name.to_str()).expect("a UTF-8 path").to_owned();
            if ["target", ".git"].contains(&name.as_str()) {
                continue;
            } else if path.is_dir() {
                todo.push(path);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                files.insert(name, text);
            }
        }
    }
    files
}

fn assert_tidy(mut violations: Vec<String>) {
    violations.sort();
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}

#[test]
fn every_file_keeps_the_rules() {
    let files = tree("");
    assert!(files.len() > 50, "the tree was found");
    let mut violations = Vec::new();
    for (path, text) in &files {
        let source = Source::new(path, text);
        for (name, rule) in RULES {
            violations.extend(rule(&source).into_iter().map(|what| format!("{what} [{name}]")));
        }
    }
    assert_tidy(violations);
}

#[test]
fn every_file_is_compiled() {
    assert_tidy(dead_files(&tree("src"), &["src/lib.rs", "src/main.rs"]));
    let mut tests = tree("tests");
    // What is fed to decoders is compiled by nobody.
    tests.retain(|path, _| !path.starts_with("tests/corpus/"));
    assert_tidy(dead_files(
        &tests,
        &[
            "tests/all.rs",
            "tests/bench/checkpoint.rs",
            "tests/bench/compare.rs",
            "tests/bench/demo.rs",
            "tests/bench/judge.rs",
            "tests/bench/nbd_limit.rs",
            "tests/bench/replica.rs",
        ],
    ));
}

#[test]
fn no_folder_stands_beside_the_architectures() {
    let files = tree("");
    assert_tidy(strange_folders(files.keys().map(String::as_str)));
    assert_eq!(
        strange_folders(["src/lib.rs", "utils/misc.rs", "README.md"].into_iter()),
        ["utils/misc.rs:1: no folder of the architecture"]
    );
}
