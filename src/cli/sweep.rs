//! `secateur sweep`: many jobs here, one after another, from one spec and its axes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::observe::Terminal;
use super::process;
use super::run::{ComputeArgs, Place, Trouble, end, go, refusal};
use super::table::table;
use super::{print, spec};
use crate::engine::workspace::{write_atomic, write_json};
use crate::engine::{Error, at};
use crate::job::progress::Observer;
use crate::job::report::{Failure, Report};
use crate::job::sweep::{Child, Outcome, SweepReport, SweepRow, SweepSpec, mark_front};
use crate::report::sweep::{missing, page, side_by_side};

#[derive(clap::Args)]
pub struct Args {
    /// The sweep: a .json, .yaml or .toml file, or `-` for JSON on standard input. `base` is a job spec; `axes` holds
    /// lists of `amount`, `strategy`, `heal` (each `{name, methods}`) and `seed`, and `layers: {from, to, step}`.
    spec: String,
    /// Directory for results: `sweep.json`, `sweep.html`, and each job's own in `jobs/`. A sweep that was stopped goes
    /// on where it was; jobs that are done are not done again.
    #[arg(long, value_name = "DIR")]
    workspace: PathBuf,
    /// What stays of each job: everything, or the reports without the weights.
    #[arg(long, value_enum, default_value_t = Keep::All)]
    keep: Keep,
    #[command(flatten)]
    compute: ComputeArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Keep {
    All,
    Reports,
}

/// Where the jobs run, one after another, so that what they have in common is recorded once.
const RUNNING: &str = "running";
/// Where each job's results go when it is done.
const JOBS: &str = "jobs";
/// What a job leaves.
const REPORTS: [&str; 7] =
    ["report.json", "report.html", "profile.json", "selection.json", "eval.json", "items", "plots"];
const WEIGHTS: [&str; 3] = ["pruned", "healed", "adapter"];

// Every command has this shape.
#[allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps)]
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.compute.prepare();
    process::stop_on_signals();
    process::end_with_supervisor();
    let observer = Terminal::new();
    Ok(match sweep(&args, &observer) {
        Ok(failed) => ExitCode::from(u8::from(failed)),
        Err(trouble) => end(trouble, &observer),
    })
}

/// Runs what is not done yet; says whether a job failed.
fn sweep(args: &Args, observer: &dyn Observer) -> Result<bool, Trouble> {
    let value = spec::read(&args.spec).map_err(|e| Trouble::unreadable(&e))?;
    let (asked, children) = SweepSpec::read(value).map_err(Trouble::BadSpec)?;
    let mut report = SweepReport::new(asked, &children);
    for (i, child) in children.iter().enumerate() {
        print(&format!("\n{} ({} of {})\n", child.name, i + 1, children.len()));
        match done(args, child).map_or_else(|| job(args, child, observer), Ok) {
            Ok(found) => {
                report.rows[i].outcome = Some(Outcome::of(&found));
                report.base.get_or_insert(found.eval.base);
            }
            // The others may well succeed.
            Err(Trouble::Failed(failure)) => fail(&mut report.rows[i], failure),
            Err(Trouble::BadSpec(complaints)) => fail(&mut report.rows[i], refusal(&complaints)),
            Err(Trouble::Stopped) => return Err(Trouble::Stopped),
        }
        mark_front(&mut report.rows);
        write_json(&args.workspace.join("sweep.json"), &report)?;
        write_atomic(&args.workspace.join("sweep.html"), page(&report).as_bytes())?;
    }
    print(&summary(&report, &args.workspace));
    Ok(report.rows.iter().any(|row| row.failure.is_some()))
}

/// The report of a job that an earlier run did from the very same spec.
fn done(args: &Args, child: &Child) -> Option<Report> {
    let text = std::fs::read(args.workspace.join(JOBS).join(&child.name).join("report.json")).ok()?;
    let report: Report = serde_json::from_slice(&text).ok()?;
    (report.spec == child.spec).then_some(report)
}

fn job(args: &Args, child: &Child, observer: &dyn Observer) -> Result<Report, Trouble> {
    let work = args.workspace.join(RUNNING);
    let place = Place { workspace: &work, records: None };
    let report = go(&child.spec, &args.compute, place, None, observer)?;
    let report = report.ok_or_else(|| Error::bug("a whole job without a report"))?;
    let to = args.workspace.join(JOBS).join(&child.name);
    moved(&work, &to, args.keep).map_err(at(&to))?;
    Ok(report)
}

/// Moves what a job left to its own place; `report.json`, which says that it is done, at last.
fn moved(work: &Path, to: &Path, keep: Keep) -> std::io::Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to)?;
    }
    std::fs::create_dir_all(to)?;
    let weights: &[&str] = if keep == Keep::All { &WEIGHTS } else { &[] };
    for name in weights.iter().chain(REPORTS.iter().rev()) {
        if work.join(name).exists() {
            std::fs::rename(work.join(name), to.join(name))?;
        }
    }
    Ok(())
}

fn fail(row: &mut SweepRow, failure: Failure) {
    eprintln!("{}: {}", row.name, failure.message);
    row.failure = Some(failure);
}

/// The table and where the page is, for a person.
fn summary(report: &SweepReport, workspace: &Path) -> String {
    let (head, rows) = side_by_side(report);
    let head = head.into_iter().map(String::from).collect();
    let split = |row: Vec<String>| {
        let mut cells = row.into_iter();
        (cells.next().unwrap_or_default(), cells.collect())
    };
    let lines: Vec<(String, Vec<String>)> = std::iter::once(head).chain(rows).map(split).collect();
    let missing: String = missing(report).iter().map(|sentence| format!("! {sentence}\n")).collect();
    format!("\n{}{missing}\nreport      {}\n", table(&lines), workspace.join("sweep.html").display())
}
