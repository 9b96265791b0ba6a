//! `secateur inspect`: a checkpoint in numbers, without reading a weight.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::print;
use crate::checkpoint::Index;

#[derive(clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model.
    model: PathBuf,
    /// Layers to leave out in the reckoning [default: a tenth, two, three, four and five tenths].
    #[arg(long, value_name = "N", value_delimiter = ',')]
    layers: Vec<usize>,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Description {
    model_type: &'static str,
    layer_count: usize,
    hidden_size: usize,
    parameters: u64,
    /// Those of embedding, learned positions and head.
    embedding_parameters: u64,
    size_bytes: u64,
    max_position_embeddings: usize,
    /// What leaving out so many layers saves at most; layers may differ in size.
    savings: Vec<Saving>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Saving {
    layers: usize,
    parameters: u64,
    size_bytes: u64,
    /// Share of all parameters.
    share: f64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let index = Index::read(&args.model)?;
    let count = index.config.layer_count;
    let asked = match args.layers.as_slice() {
        [] => (1..=5).map(|tenths| count * tenths / 10).filter(|n| *n > 0).collect(),
        layers => layers.to_vec(),
    };
    if let Some(most) = asked.iter().find(|n| **n >= count) {
        anyhow::bail!("--layers {most}: the model has {count}, and one must stay");
    }
    let description = describe(&index, &asked);
    let text =
        if args.json { serde_json::to_string_pretty(&description)? + "\n" } else { table(&description) };
    Ok(print(&text))
}

fn describe(index: &Index, asked: &[usize]) -> Description {
    let config = &index.config;
    let parameters = index.parameters();
    let mut by_layer: Vec<u64> = (0..config.layer_count).map(|layer| index.layer_parameters(layer)).collect();
    by_layer.sort_unstable_by(|a, b| b.cmp(a));
    // Weights of one checkpoint have one width as a rule.
    let bytes_per_parameter = index.size_bytes() as f64 / parameters.max(1) as f64;
    let saving = |layers: &usize| {
        let saved: u64 = by_layer[..*layers].iter().sum();
        Saving {
            layers: *layers,
            parameters: saved,
            size_bytes: (saved as f64 * bytes_per_parameter) as u64,
            share: saved as f64 / parameters.max(1) as f64,
        }
    };
    let mut notes = Vec::new();
    if config.remote_code() {
        notes.push(
            "config.json names code of the model's authors (auto_map); it is neither run nor copied".into(),
        );
    }
    Description {
        model_type: config.family.model_type,
        layer_count: config.layer_count,
        hidden_size: config.hidden_size,
        parameters,
        embedding_parameters: index.embedding_parameters(),
        size_bytes: index.size_bytes(),
        max_position_embeddings: config.max_position_embeddings,
        savings: asked.iter().map(saving).collect(),
        notes,
    }
}

fn table(d: &Description) -> String {
    let millions = |n: u64| format!("{:.1} M", n as f64 / 1e6);
    let megabytes = |n: u64| format!("{:.1} MB", n as f64 / 1e6);
    let mut out = String::new();
    let mut line = |label: &str, value: String| writeln!(out, "{label:<22}{value}").ok();
    line("family", d.model_type.into());
    line("layers", d.layer_count.to_string());
    line("hidden size", d.hidden_size.to_string());
    line("longest text", format!("{} tokens", d.max_position_embeddings));
    line("parameters", millions(d.parameters));
    line("  in the layers", millions(d.parameters - d.embedding_parameters));
    line("weights", megabytes(d.size_bytes));
    writeln!(out, "\n{:>12}  {:>12}  {:>12}  {:>7}", "layers less", "parameters", "weights", "saved").ok();
    for saving in &d.savings {
        writeln!(
            out,
            "{:>12}  {:>12}  {:>12}  {:>5.1} %",
            saving.layers,
            millions(d.parameters - saving.parameters),
            megabytes(d.size_bytes.saturating_sub(saving.size_bytes)),
            saving.share * 100.0
        )
        .ok();
    }
    for note in &d.notes {
        writeln!(out, "\n! {note}").ok();
    }
    out
}
