//! `secateur prune`: layers out of a checkpoint, files only.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::observe::Terminal;
use super::process;
use crate::checkpoint::Index;
use crate::engine::model::{Checkpoint, Compute, Decoder};
use crate::engine::prune::Cut;
use crate::engine::{Cx, Error};
use crate::job::progress::Stage;
use crate::job::spec::WeightType;

#[derive(clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model.
    model: PathBuf,
    /// Layers to leave out, counted from 0: numbers and ranges, as in `20-27,30`.
    #[arg(long, value_name = "LAYERS", value_parser = layers)]
    drop: Layers,
    /// New directory for the checkpoint.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write the weights as bf16, f16 or f32; without it every byte stays as it is.
    #[arg(long, value_parser = dtype)]
    dtype: Option<WeightType>,
    /// Send a few tokens through the result, too; it must fit in memory for that.
    #[arg(long)]
    prove: bool,
}

#[derive(Clone)]
struct Layers(Vec<u32>);

fn layers(text: &str) -> Result<Layers, String> {
    let number =
        |part: &str| part.trim().parse::<u32>().map_err(|_| format!("`{part}` is no number of a layer"));
    let mut all = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if last < first || last - first > 10_000 {
            return Err(format!("`{part}` is no range of layers"));
        }
        all.extend(first..=last);
    }
    all.sort_unstable();
    all.dedup();
    Ok(Layers(all))
}

fn dtype(text: &str) -> Result<WeightType, String> {
    serde_json::from_value(text.into()).map_err(|_| "one of bf16, f16, f32".into())
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let index = Index::read(&args.model)?;
    let (dropped, count) = (&args.drop.0, index.config.layer_count as u32);
    if let Some(beyond) = dropped.iter().find(|l| **l >= count) {
        bail!("--drop {beyond}: the model's layers are 0 to {}", count - 1);
    }
    if dropped.len() as u32 == count {
        bail!("--drop names all {count} layers; one must stay");
    }
    if args.out.exists() {
        bail!("{} is there already; name a new directory", args.out.display());
    }
    let cut = Cut::plan(&index, dropped, args.dtype)?;
    // Built beside its place, so that nobody finds half of it there.
    let mut part = args.out.clone().into_os_string();
    part.push(".part");
    let part = PathBuf::from(part);
    if part.exists() {
        fs::remove_dir_all(&part).with_context(|| part.display().to_string())?;
    }
    fs::create_dir_all(&part).with_context(|| part.display().to_string())?;
    process::stop_on_signals();
    let observer = Terminal::new();
    let compute = Compute::cpu(None);
    let written = cut.write_to(&part, Cx { stage: Stage::Prune, compute: &compute, observer: &observer });
    let proven = written.and_then(|written| {
        if args.prove {
            Decoder::open(&Checkpoint::open(&part)?, &compute)?.prove("the pruned checkpoint")?;
        }
        Ok(written)
    });
    let written = proven.inspect_err(|_| drop(fs::remove_dir_all(&part)));
    let written = match written {
        Err(Error::Stopped) => bail!("stopped on request; nothing was left"),
        other => other?,
    };
    fs::rename(&part, &args.out).with_context(|| args.out.display().to_string())?;
    println!(
        "{}: {count} -> {} layers, {:.1} M parameters, {:.1} MB",
        args.out.display(),
        written.layer_count,
        written.parameters as f64 / 1e6,
        written.size_bytes as f64 / 1e6
    );
    Ok(ExitCode::SUCCESS)
}
