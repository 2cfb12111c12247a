//! Completions and man pages, from the commands themselves.
//!
//! `xl-colo generate scripts/packaging` writes them; `tests/generated.rs` sees to it that the written ones are these. What
//! depends on the machine or on how the program was built (the user's run directory, hidden commands) is left out.

use super::Cli;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use std::io;
use std::path::Path;

/// The program's name.
const NAME: &str = "xl-colo";

/// What can be typed, the same on every machine.
fn command() -> Command {
    let whole = Cli::command();
    let visible: Vec<_> = whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    let run_dir = |command: Command| {
        command.mut_args(|arg| if arg.get_id() == "run_dir" { arg.default_value("/run/xen-colo/hosts") } else { arg })
    };
    Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .about(whole.get_about().cloned().unwrap_or_default())
        .arg_required_else_help(true)
        .args(whole.get_arguments().cloned())
        .subcommands(visible.into_iter().map(run_dir))
}

/// Writes `completions/` and `man/` into a directory.
pub fn write(dir: &Path) -> io::Result<()> {
    let (completions, man) = (dir.join("completions"), dir.join("man"));
    std::fs::create_dir_all(&completions)?;
    std::fs::create_dir_all(&man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command(), NAME, &completions)?;
    }
    clap_mangen::generate_to(command(), &man)
}
