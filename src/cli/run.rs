//! `secateur run`: one job here, no server, no database.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::{DType, Device};

use super::observe::{JsonLines, Terminal};
use super::process;
use crate::engine::Error;
use crate::engine::model::kernel::allocator;
use crate::engine::model::{Checkpoint, Compute, Memory, Rounding};
use crate::engine::pipeline::Run;
use crate::fetch;
use crate::job::complaint::Complaint;
use crate::job::progress::{Event, Observer, Stage};
use crate::job::report::{Failure, FailureKind, Report};
use crate::job::spec::{JobSpec, ModelSource};
use crate::report;

#[derive(clap::Args)]
pub struct Args {
    /// The job spec: a .json, .yaml or .toml file, or `-` for JSON on standard input.
    spec: String,
    /// Directory for results and records. A run that was stopped or killed goes on from its records.
    #[arg(long, value_name = "DIR")]
    workspace: PathBuf,
    /// End after this stage: profile, select, prune, heal, eval or report.
    #[arg(long, value_name = "STAGE")]
    until: Option<Stage>,
    /// Directory of records that runs share: what one has measured of a model (profile, damage, scores) serves the
    /// next, whatever its workspace. Without it, only the records of the workspace are used.
    #[arg(long, value_name = "DIR")]
    records: Option<PathBuf>,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Write events to standard output as one JSON object a line, and nothing else there.
    #[arg(long, value_enum, value_name = "FORMAT")]
    events: Option<EventFormat>,
}

/// Where and how to compute.
#[derive(clap::Args)]
pub struct ComputeArgs {
    /// Where to compute: `cpu` or `cuda:N`.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// The least precision to compute with. `f32` agrees with transformers in float32. On a CPU the other two
    /// concern products with weights alone: `bf16` rounds what comes in to bfloat16, `high` to the sum of two
    /// (both only where that is faster, with AMX or on AMD with AVX512-BF16, else all is f32). On CUDA `bf16` computes in bf16
    /// and the other two in f32.
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    pub precision: Precision,
    /// Threads to compute with; all cores when absent.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Memory to work in, such as `800MiB` or `12GB`; three quarters of what is free when absent. Weights that do
    /// not fit stay in their files, one layer in memory at a time; streams that do not go to a file in the
    /// workspace. It changes no result but the last digits of healing, which takes the adapters and their moments
    /// on top.
    #[arg(long, value_name = "SIZE", value_parser = super::size::bytes)]
    memory_limit: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    F32,
    High,
    Bf16,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum EventFormat {
    Jsonl,
}

/// Why a run did not end well.
pub enum Trouble {
    BadSpec(Vec<Complaint>),
    Stopped,
    Failed(Failure),
}

impl Trouble {
    /// Of a spec that is not even JSON.
    pub fn unreadable(why: &anyhow::Error) -> Self {
        Self::BadSpec(vec![Complaint { pointer: String::new(), message: format!("{why:#}") }])
    }
}

/// What is wrong with a spec, as a failure.
pub fn refusal(complaints: &[Complaint]) -> Failure {
    let lines: Vec<String> = complaints.iter().map(ToString::to_string).collect();
    Failure { kind: FailureKind::Spec, stage: None, message: lines.join("; ") }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        match error {
            Error::Stopped => Self::Stopped,
            Error::Failed(failure) => Self::Failed(failure),
        }
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

// Every command has this shape.
#[allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps)]
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.compute.prepare();
    process::stop_on_signals();
    process::end_with_supervisor();
    let observer: Box<dyn Observer> = match args.events {
        Some(EventFormat::Jsonl) => Box::new(JsonLines::default()),
        None => Box::new(Terminal::new()),
    };
    let value = match super::spec::read(&args.spec) {
        Ok(value) => value,
        Err(e) => return Ok(end(Trouble::unreadable(&e), &*observer)),
    };
    let asked = JobSpec::read(value).map_err(Trouble::BadSpec);
    let place = Place { workspace: &args.workspace, records: args.records.as_deref() };
    let ended = asked.and_then(|asked| go(&asked, &args.compute, place, args.until, &*observer));
    match ended {
        Ok(None) => Ok(ExitCode::SUCCESS),
        Ok(Some(report)) => {
            if args.events.is_none() {
                print_summary(&report, &args.workspace);
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(trouble) => Ok(end(trouble, &*observer)),
    }
}

/// Where a job's results and records go.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub workspace: &'a Path,
    /// Of records that several runs use.
    pub records: Option<&'a Path>,
}

/// Runs a job, to its end or until a stage.
pub fn go(
    asked: &JobSpec,
    args: &ComputeArgs,
    place: Place,
    until: Option<Stage>,
    observer: &dyn Observer,
) -> Result<Option<Report>, Trouble> {
    let mut compute = compute(&args.device, args.precision)?;
    compute.memory = Memory::new(args.memory_limit, place.workspace);
    compute.memory.keep_freed();
    let local = fetch::localize(asked, observer)?;
    let ModelSource::Path { path } = &local.model else {
        return Err(Error::bug("a model that was fetched has no path").into());
    };
    let base = Checkpoint::open(Path::new(path))?;
    let complaints = local.validate_for(&base.config().facts());
    if !complaints.is_empty() {
        return Err(Trouble::BadSpec(complaints));
    }
    let Place { workspace, records } = place;
    let run = Run { asked, local: &local, base: &base, compute: &compute, observer, until, records };
    Ok(run.go(workspace)?)
}

impl ComputeArgs {
    /// Tells allocator and threads what they have to work with; before anything is computed.
    pub fn prepare(&self) {
        match self.memory_limit {
            None => allocator::keep_freed(),
            Some(_) => allocator::return_freed(),
        }
        process::one_thread_pool();
        if let Some(threads) = self.threads {
            process::limit_threads(threads.into());
        }
    }
}

/// Says what went wrong, where it belongs, and gives the exit code.
pub fn end(trouble: Trouble, observer: &dyn Observer) -> ExitCode {
    match trouble {
        Trouble::BadSpec(complaints) => {
            observer.event(Event::Failed { failure: refusal(&complaints) });
            for complaint in &complaints {
                eprintln!("{complaint}");
            }
            ExitCode::from(2)
        }
        Trouble::Failed(failure) => {
            observer.event(Event::Failed { failure: failure.clone() });
            let stage = failure.stage.map_or(String::new(), |s| format!("{s}: "));
            // One line, whatever a library put into its message.
            let message = failure.message.split_whitespace().collect::<Vec<_>>().join(" ");
            eprintln!("secateur: {stage}{message}");
            ExitCode::FAILURE
        }
        Trouble::Stopped => {
            eprintln!("secateur: stopped on request; the same command goes on from here");
            // As a shell reports a process that a signal ended.
            process::stop_signal().map_or(ExitCode::FAILURE, |signal| ExitCode::from(128 + signal as u8))
        }
    }
}

/// Opens the device `cuda:N`, or says why not.
pub fn open_cuda(device: &str) -> Result<Device, String> {
    let index = device.strip_prefix("cuda").map(|rest| rest.strip_prefix(':').unwrap_or("0"));
    let index = index.and_then(|i| i.parse::<usize>().ok()).ok_or("is no device known here")?;
    Device::new_cuda(index).map_err(|e| format!("cannot be used ({e})"))
}

pub fn compute(device: &str, precision: Precision) -> Result<Compute, Trouble> {
    if device == "cpu" {
        return Ok(Compute::cpu(match precision {
            Precision::F32 => None,
            Precision::High => Some(Rounding::Twice),
            Precision::Bf16 => Some(Rounding::Once),
        }));
    }
    let opened = open_cuda(device).map_err(|why| Failure {
        kind: FailureKind::Device,
        stage: None,
        message: format!("--device {device}: {why}; give `cpu` or `cuda:N`"),
    })?;
    let dtype = match precision {
        Precision::Bf16 => DType::BF16,
        Precision::High | Precision::F32 => DType::F32,
    };
    Ok(Compute { device: opened, dtype, ..Compute::cpu(None) })
}

/// The comparison and where the files are, for a person.
fn print_summary(report: &Report, workspace: &Path) {
    use std::fmt::Write;
    let mut out = String::from("\n");
    let columns = report::columns(&report.eval);
    let rows = report::comparison(&report.eval);
    let cell = |c: &report::Cell| match c.ratio {
        Some(ratio) => format!("{} (×{ratio:.2})", c.text),
        None => c.text.clone(),
    };
    let first = rows.iter().map(|r| r.label.chars().count()).max().unwrap_or(0);
    let width = rows.iter().flat_map(|r| &r.cells).map(|c| cell(c).chars().count()).max().unwrap_or(0);
    let mut line = |label: &str, cells: &[String]| {
        write!(out, "{label:<first$}").ok();
        for cell in cells {
            write!(out, "  {cell:>width$}").ok();
        }
        out.push('\n');
    };
    line("", &columns.iter().map(ToString::to_string).collect::<Vec<_>>());
    for row in &rows {
        line(&row.label, &row.cells.iter().map(cell).collect::<Vec<_>>());
    }
    let (head, rows) = report::exports(&report.eval);
    if !rows.is_empty() {
        let labelled = |row: Vec<String>| {
            let mut cells = row.into_iter();
            (cells.next().unwrap_or_default(), cells.collect())
        };
        let all: Vec<(String, Vec<String>)> = std::iter::once(head).chain(rows).map(labelled).collect();
        out.push('\n');
        out += &super::table::table(&all);
    }
    for remark in &report.remarks {
        writeln!(out, "\n! {remark}").ok();
    }
    if let Some(verdict) = &report.verdict {
        writeln!(out, "\nverdict     {} ({})", verdict.decision.name(), verdict.reasons.join(" ")).ok();
    }
    let healed = report.heal.iter().any(|h| h.checkpoint.is_some());
    let checkpoint = workspace.join(if healed { "healed" } else { &report.pruned.path });
    writeln!(out, "\ncheckpoint  {}", checkpoint.display()).ok();
    writeln!(out, "report      {}", workspace.join("report.html").display()).ok();
    // Nobody reading any more is no failure: the files are there.
    std::io::Write::write_all(&mut std::io::stdout(), out.as_bytes()).ok();
}
