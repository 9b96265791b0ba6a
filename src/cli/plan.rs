//! `secateur plan`: what a job will take, before it is run.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;

use super::observe::Terminal;
use super::run::{ComputeArgs, Trouble, compute, end};
use super::table::table;
use super::{print, spec};
use crate::checkpoint::Index;
use crate::engine::model::measure::machine;
use crate::job::plan::Plan;
use crate::job::spec::{Corpus, JobSpec, ModelSource};

#[derive(clap::Args)]
pub struct Args {
    /// The job spec: a .json, .yaml or .toml file, or `-` for JSON on standard input.
    spec: String,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

// Every command has this shape.
#[allow(clippy::needless_pass_by_value)]
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.compute.prepare();
    let asked = spec::read(&args.spec).map_err(|e| Trouble::unreadable(&e));
    let asked = match asked.and_then(|value| JobSpec::read(value).map_err(Trouble::BadSpec)) {
        Ok(asked) => asked,
        Err(trouble) => return Ok(end(trouble, &Terminal::new())),
    };
    let ModelSource::Path { path } = &asked.model else {
        bail!(
            "a plan reads the model's directory, and this model is not on this machine yet: fetch it and give \
             {{\"from\": \"path\", …}}, or ask a service (POST /v1/plans)"
        );
    };
    let index = Index::read(Path::new(path))?;
    let facts = index.config.facts();
    let complaints = asked.validate_for(&facts);
    if !complaints.is_empty() {
        return Ok(end(Trouble::BadSpec(complaints), &Terminal::new()));
    }
    let compute = match compute(&args.compute.device, args.compute.precision) {
        Ok(compute) => compute,
        Err(trouble) => return Ok(end(trouble, &Terminal::new())),
    };
    // As runs compute: on a thread of the pool.
    let machine = rayon::scope(|_| machine(&compute))?;
    let plan = Plan::of(&asked, &facts, &index.anatomy(), &bytes_of).on(machine);
    Ok(print(&if args.json { format!("{}\n", serde_json::to_string_pretty(&plan)?) } else { text(&plan) }))
}

/// Of a text on this machine.
fn bytes_of(corpus: &Corpus) -> Option<u64> {
    match corpus {
        Corpus::Path { path } => std::fs::metadata(path).ok().map(|meta| meta.len()),
        Corpus::Text { text } => Some(text.len() as u64),
        Corpus::Hub { .. } | Corpus::Upload { .. } | Corpus::Model { .. } | Corpus::Mix { .. } => None,
    }
}

fn text(plan: &Plan) -> String {
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    let time = |seconds: Option<f64>| seconds.map_or("–".into(), duration);
    let layers = match (plan.least_layers, plan.most_layers) {
        (least, most) if least == most => least.to_string(),
        (least, most) => format!("{least} to {most}"),
    };
    let mut out = format!("{layers} of {} layers go\n\n", plan.base.layer_count);
    let footprint = |name: &str, f: &crate::job::plan::Footprint| {
        let cells =
            vec![f.layer_count.to_string(), format!("{:.1} M", f.parameters as f64 / 1e6), mb(f.size_bytes)];
        (name.to_owned(), cells)
    };
    let head = (String::new(), ["layers", "parameters", "weights"].map(String::from).to_vec());
    out += &table(&[head, footprint("base", &plan.base), footprint("pruned", &plan.pruned)]);
    let mut rows =
        vec![(String::new(), ["products", "memory", "writes", "takes"].map(String::from).to_vec())];
    for stage in &plan.stages {
        let products = format!("{:.2} TFLOP", stage.flops / 1e12);
        let cells = vec![products, mb(stage.memory_bytes), mb(stage.disk_bytes), time(stage.seconds)];
        rows.push((stage.stage.name().to_owned(), cells));
    }
    let total = plan.stages.iter().map(|stage| stage.flops).sum::<f64>() / 1e12;
    let cells =
        vec![format!("{total:.2} TFLOP"), mb(plan.memory_bytes), mb(plan.disk_bytes), time(plan.seconds())];
    rows.push(("all".to_owned(), cells));
    write!(out, "\n{}", table(&rows)).ok();
    for note in &plan.notes {
        write!(out, "\n! {note}\n").ok();
    }
    out
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.1} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
