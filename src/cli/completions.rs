//! `secateur completions`: what a shell needs to complete our commands.

use std::process::ExitCode;

use clap_complete::{Shell, generate};

#[derive(clap::Args)]
pub struct Args {
    /// The shell. Its manual says where the script goes, e.g. `source <(secateur completions bash)`.
    shell: Shell,
}

pub fn run(args: Args, mut command: clap::Command) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    generate(args.shell, &mut command, "secateur", &mut script);
    Ok(super::print(&String::from_utf8(script)?))
}
