//! `secateur jobs`: the API's jobs, from a terminal or a script.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Subcommand, ValueEnum};
use serde_json::Value;
use uuid::Uuid;

use crate::job::state::JobState;
use client::{Client, Refused};

mod client;
mod download;
mod follow;
mod show;

/// What a script can tell apart. clap itself ends with 2 for a wrong command line.
const BAD_SPEC: u8 = 2;
const JOB_FAILED: u8 = 3;
const JOB_CANCELLED: u8 = 4;
const NO_SUCH_JOB: u8 = 5;

const EXIT_CODES: &str = "Exit codes: 0 done, of `watch` and `submit --watch`: the job succeeded · 1 the service cannot be \
reached or refuses · 2 the spec or the command line is wrong · 3 the job failed · 4 the job was cancelled · 5 there is no such job";

#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub struct Args {
    /// The service.
    #[arg(
        long,
        env = "SECATEUR_URL",
        default_value = "http://127.0.0.1:8080",
        global = true,
        value_name = "URL"
    )]
    server: String,
    /// A file with the API key; `SECATEUR_API_KEY` holds the key itself.
    #[arg(long, global = true, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Answer in JSON; what is followed, as one object a line.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Ask for a pruned model. Sent again after a broken line it is still one job.
    Submit {
        /// The job spec: a .json, .yaml or .toml file, or `-` for JSON on standard input. Its paths are the service's.
        spec: String,
        /// Follow the job to its end.
        #[arg(long)]
        watch: bool,
        /// Your word for this request; with the same one again it is still the same job.
        #[arg(long, value_name = "KEY")]
        idempotency_key: Option<String>,
    },
    /// List jobs, newest first.
    List {
        /// Only jobs in this state; give it again for another.
        #[arg(long)]
        state: Vec<JobState>,
        /// Only jobs with this label; give it again for another.
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
        #[arg(long)]
        name: Option<String>,
        /// How many at most.
        #[arg(long, default_value_t = 20, value_name = "N")]
        limit: usize,
    },
    /// Show one job.
    Get { id: Uuid },
    /// Follow a job to its end.
    Watch { id: Uuid },
    /// Show what happened to a job.
    Logs {
        id: Uuid,
        /// Go on until the job has ended.
        #[arg(long, short)]
        follow: bool,
    },
    /// Cancel a job: at once when it waits, at its next seam when it runs.
    Cancel { id: Uuid },
    /// Let a job rest; it keeps what it has computed.
    Pause { id: Uuid },
    /// Let a paused job go on.
    Resume { id: Uuid },
    /// Make a new job of one that failed or was cancelled; it goes on where that one stopped.
    Retry {
        id: Uuid,
        /// Follow the new job to its end.
        #[arg(long)]
        watch: bool,
    },
    /// Fetch the files of a job. What is here already is not fetched again; a broken download goes on.
    Download {
        id: Uuid,
        /// Only these files, or what lies below these directories, such as `healed`; all when absent.
        paths: Vec<String>,
        /// Where to put them [default: a directory named by the job's id]
        #[arg(long, short, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Forget a job that has ended, and its files.
    Delete { id: Uuid },
}

#[derive(Clone, Copy, ValueEnum)]
enum Change {
    Cancel,
    Pause,
    Resume,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match act(&args) {
        Ok(code) => Ok(code),
        Err(error) => match error.downcast_ref::<Refused>() {
            Some(refused) => {
                eprintln!("secateur: {refused}");
                Ok(match (refused.status, refused.code.as_str()) {
                    (_, "invalid-spec" | "invalid-json") => BAD_SPEC.into(),
                    (404 | 410, "job-not-found" | "job-deleted") => NO_SUCH_JOB.into(),
                    _ => ExitCode::FAILURE,
                })
            }
            None => Err(error),
        },
    }
}

fn act(args: &Args) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.server, key(args)?)?;
    match &args.command {
        Command::Submit { spec, watch, idempotency_key } => {
            let spec = super::spec::read(spec)?;
            let key = idempotency_key.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
            let job = client.post("/v1/jobs", Some(&spec), &[("idempotency-key", &key)])?;
            begun(args, &client, &job, *watch)
        }
        Command::Retry { id, watch } => {
            let key = Uuid::new_v4().to_string();
            let job = client.post(&format!("/v1/jobs/{id}/retry"), None, &[("idempotency-key", &key)])?;
            begun(args, &client, &job, *watch)
        }
        Command::List { state, label, name, limit } => {
            list(args, &client, state, label, name.as_deref(), *limit)
        }
        Command::Get { id } => Ok(tell(args, &client.get(&format!("/v1/jobs/{id}"))?)),
        Command::Watch { id } => follow::watch(&client, *id, args.json),
        Command::Logs { id, follow } => follow::logs(&client, *id, *follow, args.json),
        Command::Cancel { id } => change(args, &client, *id, Change::Cancel),
        Command::Pause { id } => change(args, &client, *id, Change::Pause),
        Command::Resume { id } => change(args, &client, *id, Change::Resume),
        Command::Download { id, paths, out } => {
            let out = out.clone().unwrap_or_else(|| id.to_string().into());
            let fetched = download::all(&client, *id, paths, &out)?;
            if args.json {
                return Ok(super::print(&format!("{fetched}\n")));
            }
            Ok(super::print(&format!("{}\n", out.display())))
        }
        Command::Delete { id } => {
            client.delete(&format!("/v1/jobs/{id}"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The key that opens the service, if one is named.
fn key(args: &Args) -> anyhow::Result<Option<String>> {
    let key = match &args.api_key_file {
        Some(file) => {
            Some(std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?)
        }
        None => std::env::var("SECATEUR_API_KEY").ok(),
    };
    Ok(key.map(|key| key.trim().to_owned()).filter(|key| !key.is_empty()))
}

fn tell(args: &Args, job: &Value) -> ExitCode {
    super::print(&if args.json { format!("{job:#}\n") } else { show::job(job) })
}

/// Tells of a new job, and follows it if asked to.
fn begun(args: &Args, client: &Client, job: &Value, watch: bool) -> anyhow::Result<ExitCode> {
    let id: Uuid =
        job["id"].as_str().unwrap_or_default().parse().context("the service did not name the job")?;
    if watch {
        if !args.json {
            super::print(&format!("{id}\n"));
        }
        return follow::watch(client, id, args.json);
    }
    Ok(if args.json { tell(args, job) } else { super::print(&format!("{id}\n")) })
}

fn change(args: &Args, client: &Client, id: Uuid, change: Change) -> anyhow::Result<ExitCode> {
    let word = match change {
        Change::Cancel => "cancel",
        Change::Pause => "pause",
        Change::Resume => "resume",
    };
    Ok(tell(args, &client.post(&format!("/v1/jobs/{id}/{word}"), None, &[])?))
}

fn list(
    args: &Args,
    client: &Client,
    states: &[JobState],
    labels: &[String],
    name: Option<&str>,
    limit: usize,
) -> anyhow::Result<ExitCode> {
    let mut narrowed = String::new();
    let pairs = states.iter().map(|s| ("state", s.name()));
    let pairs = pairs.chain(labels.iter().map(|l| ("label", l.as_str()))).chain(name.map(|n| ("name", n)));
    for (word, value) in pairs {
        narrowed += &format!("&{word}={}", client::encoded(value));
    }
    let (mut jobs, mut after) = (Vec::new(), String::new());
    while jobs.len() < limit {
        let size = (limit - jobs.len()).min(100);
        let page = client.get(&format!("/v1/jobs?limit={size}{narrowed}{after}"))?;
        jobs.extend(page["data"].as_array().into_iter().flatten().cloned());
        match (page["has_more"].as_bool(), page["last_id"].as_str()) {
            (Some(true), Some(last)) => after = format!("&after={last}"),
            _ => break,
        }
    }
    Ok(super::print(&if args.json { format!("{:#}\n", Value::from(jobs)) } else { show::table(&jobs) }))
}

/// How a job that has ended ends a command that followed it.
fn verdict(state: &str) -> ExitCode {
    match state.parse() {
        Ok(JobState::Failed) => JOB_FAILED.into(),
        Ok(JobState::Cancelled) => JOB_CANCELLED.into(),
        Ok(JobState::Queued | JobState::Running | JobState::Paused | JobState::Succeeded) => {
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}
