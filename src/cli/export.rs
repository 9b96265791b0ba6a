//! `secateur export`: a checkpoint as a GGUF file.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::observe::Terminal;
use super::process;
use crate::engine::export::gguf::{self, Origin};
use crate::engine::model::{Checkpoint, Compute};
use crate::engine::{Cx, Error};
use crate::job::progress::Stage;
use crate::job::spec::GgufType;

#[derive(clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model.
    model: PathBuf,
    /// Type of the file: `f16`, `bf16`, `q8_0`, `q6_k`, `q5_k`, `q4_k` or `q4_0`.
    #[arg(long = "type", value_name = "TYPE", value_parser = kind)]
    kind: GgufType,
    /// New file.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What the file says the model is called; the directory's name when absent.
    #[arg(long)]
    name: Option<String>,
}

fn kind(text: &str) -> Result<GgufType, String> {
    GgufType::ALL
        .into_iter()
        .find(|kind| kind.name() == text)
        .ok_or_else(|| format!("one of {}", GgufType::ALL.map(GgufType::name).join(", ")))
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.out.exists() {
        bail!("{} is there already; name a new file", args.out.display());
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    let named = args.model.canonicalize().unwrap_or_else(|_| args.model.clone());
    let named = named.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = args.name.or(named).unwrap_or_default();
    // Built beside its place, so that nobody finds half of it there.
    let mut part = args.out.clone().into_os_string();
    part.push(".part");
    let part = PathBuf::from(part);
    process::stop_on_signals();
    let (observer, compute) = (Terminal::new(), Compute::cpu(None));
    let cx = Cx { stage: Stage::Export, compute: &compute, observer: &observer };
    let written = gguf::write(&checkpoint, args.kind, &Origin { name: &name, cut: None }, &part, cx);
    let written = match written.inspect_err(|_| drop(fs::remove_file(&part))) {
        Err(Error::Stopped) => bail!("stopped on request; nothing was left"),
        other => other?,
    };
    let synced = fs::File::open(&part).and_then(|file| file.sync_all());
    synced.and_then(|()| fs::rename(&part, &args.out)).with_context(|| args.out.display().to_string())?;
    println!(
        "{}: {:.1} MB, {:.2} bits per weight",
        args.out.display(),
        written.size_bytes as f64 / 1e6,
        written.bits_per_weight
    );
    Ok(ExitCode::SUCCESS)
}
