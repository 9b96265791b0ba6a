//! `secateur measure`: how fast this machine computes. Workers ask it of their device when they start.

use std::process::ExitCode;

use super::observe::Terminal;
use super::print;
use super::run::{ComputeArgs, compute, end};
use crate::engine::model::measure::machine;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    compute: ComputeArgs,
}

// Every command has this shape.
#[allow(clippy::needless_pass_by_value)]
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.compute.prepare();
    let compute = match compute(&args.compute.device, args.compute.precision) {
        Ok(compute) => compute,
        Err(trouble) => return Ok(end(trouble, &Terminal::new())),
    };
    // As runs compute: on a thread of the pool.
    let machine = rayon::scope(|_| machine(&compute))?;
    Ok(print(&format!("{}\n", serde_json::to_string(&machine)?)))
}
