//! `secateur compare`: several results side by side.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;

use super::print;
use super::table::table;
use crate::job::report::Report;
use crate::report::side_by_side;

#[derive(clap::Args)]
pub struct Args {
    /// Workspaces of runs, or their report.json.
    #[arg(required = true, num_args = 1..)]
    results: Vec<PathBuf>,
    /// Print JSON for programs: a list of objects by label.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let reports = args.results.iter().map(|path| read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let rows = side_by_side(&reports);
    Ok(print(&if args.json { json(&rows)? } else { table(&rows) }))
}

/// The report at `path`, and what to call it.
fn read(path: &Path) -> anyhow::Result<(String, Report)> {
    let file = if path.is_dir() { path.join("report.json") } else { path.to_owned() };
    let at = || format!("{}: name the workspace of a finished run or its report.json", file.display());
    let content = std::fs::read(&file).with_context(at)?;
    let report: Report = serde_json::from_slice(&content).with_context(at)?;
    let directory = if path.is_dir() { Some(path) } else { path.parent() };
    let called = directory.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    Ok((called.unwrap_or_else(|| path.display().to_string()), report))
}

fn json(rows: &[(String, Vec<String>)]) -> anyhow::Result<String> {
    let (names, rows) = rows.split_first().context("nothing to compare")?;
    let column = |(i, name): (usize, &String)| {
        let cells = rows.iter().map(|(label, cells)| (label.clone(), cells[i].clone().into()));
        let mut column: serde_json::Map<String, serde_json::Value> = cells.collect();
        column.insert("name".into(), name.clone().into());
        column
    };
    let columns: Vec<_> = names.1.iter().enumerate().map(column).collect();
    Ok(serde_json::to_string_pretty(&columns)? + "\n")
}
