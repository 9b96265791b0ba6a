//! `secateur openapi`.

use std::io::Write;
use std::process::ExitCode;

use crate::service::http;

#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    let document = http::document().to_pretty_json()?;
    writeln!(std::io::stdout(), "{document}")?;
    Ok(ExitCode::SUCCESS)
}
