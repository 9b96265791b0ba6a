//! `secateur models`: what can be pruned.

use std::fmt::Write;
use std::process::ExitCode;

use super::print;
use crate::checkpoint::family::{FAMILIES, Family};

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let cards: Vec<_> = FAMILIES.iter().map(Family::card).collect();
    let mut out = String::new();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&cards)?)?;
        return Ok(print(&out));
    }
    writeln!(out, "{:<12}  {:<44}  adapters for healing go on", "model_type", "examples")?;
    for card in &cards {
        let experts = if card.experts { " (not on experts)" } else { "" };
        writeln!(
            out,
            "{:<12}  {:<44}  {}{experts}",
            card.model_type,
            card.examples,
            card.heal_targets.join(" ")
        )?;
    }
    let gguf: Vec<&str> = cards.iter().filter(|card| card.gguf).map(|card| card.model_type).collect();
    writeln!(
        out,
        "\nEvery family can be profiled, pruned, healed and evaluated. As GGUF can be written: {}.",
        gguf.join(", ")
    )?;
    Ok(print(&out))
}
