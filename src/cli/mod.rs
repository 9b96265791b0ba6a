//! The doors of the house, one file per command. `anyhow` lives only here.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

#[cfg(feature = "service")]
mod api;
#[cfg(feature = "engine")]
mod compare;
mod completions;
mod doctor;
#[cfg(feature = "engine")]
mod export;
#[cfg(feature = "engine")]
mod generate;
mod inspect;
#[cfg(feature = "service")]
mod jobs;
#[cfg(feature = "engine")]
mod measure;
#[cfg(feature = "service")]
mod migrate;
mod models;
#[cfg(feature = "engine")]
mod observe;
#[cfg(feature = "service")]
mod openapi;
#[cfg(feature = "service")]
mod options;
#[cfg(feature = "engine")]
mod plan;
#[cfg(feature = "engine")]
mod process;
#[cfg(feature = "engine")]
mod prune;
#[cfg(feature = "engine")]
mod run;
mod size;
#[cfg(any(feature = "engine", feature = "service"))]
mod spec;
#[cfg(feature = "engine")]
mod sweep;
#[cfg(feature = "engine")]
mod table;
#[cfg(feature = "service")]
mod up;
#[cfg(feature = "service")]
mod worker;

/// Makes large language models smaller by cutting whole layers, heals the cut,
/// and proves what is left.
#[derive(Parser)]
#[command(name = "secateur", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start everything: private PostgreSQL, API and one worker per device.
    #[cfg(feature = "service")]
    Up(up::Args),
    /// Serve the HTTP API only.
    #[cfg(feature = "service")]
    Api(api::Args),
    /// Run jobs only.
    #[cfg(feature = "service")]
    Worker(worker::Args),
    /// Ask a service for jobs, follow them, fetch what they leave.
    #[cfg(feature = "service")]
    Jobs(jobs::Args),
    /// Run one job here: no server, no database.
    #[cfg(feature = "engine")]
    Run(run::Args),
    /// Tell what a job will take on this machine, before it is run.
    #[cfg(feature = "engine")]
    Plan(plan::Args),
    /// Measure how fast this machine computes: what plans reckon with.
    #[cfg(feature = "engine")]
    Measure(measure::Args),
    /// Run many jobs here, from one spec and axes along which it varies.
    #[cfg(feature = "engine")]
    Sweep(sweep::Args),
    /// Leave layers out of a checkpoint: files only, nothing is measured.
    #[cfg(feature = "engine")]
    Prune(prune::Args),
    /// Write a checkpoint as a GGUF file for llama.cpp.
    #[cfg(feature = "engine")]
    Export(export::Args),
    /// Tell what a checkpoint is, and what leaving out layers would save.
    Inspect(inspect::Args),
    /// List the model families and what each supports.
    Models(models::Args),
    /// Put the results of several runs side by side.
    #[cfg(feature = "engine")]
    Compare(compare::Args),
    /// Let a checkpoint write a few words.
    #[cfg(feature = "engine")]
    Generate(generate::Args),
    /// Look whether this machine has what is needed, and say what to do.
    Doctor(doctor::Args),
    /// Bring the database schema up to date.
    #[cfg(feature = "service")]
    Migrate(migrate::Args),
    /// Print the OpenAPI document.
    #[cfg(feature = "service")]
    Openapi(openapi::Args),
    /// Print a script that completes these commands in a shell.
    Completions(completions::Args),
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        #[cfg(feature = "service")]
        Command::Up(args) => up::run(args),
        #[cfg(feature = "service")]
        Command::Api(args) => api::run(args),
        #[cfg(feature = "service")]
        Command::Worker(args) => worker::run(args),
        #[cfg(feature = "service")]
        Command::Jobs(args) => jobs::run(args),
        #[cfg(feature = "engine")]
        Command::Run(args) => run::run(args),
        #[cfg(feature = "engine")]
        Command::Plan(args) => plan::run(args),
        #[cfg(feature = "engine")]
        Command::Measure(args) => measure::run(args),
        #[cfg(feature = "engine")]
        Command::Sweep(args) => sweep::run(args),
        #[cfg(feature = "engine")]
        Command::Prune(args) => prune::run(args),
        #[cfg(feature = "engine")]
        Command::Export(args) => export::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Models(args) => models::run(args),
        #[cfg(feature = "engine")]
        Command::Compare(args) => compare::run(args),
        #[cfg(feature = "engine")]
        Command::Generate(args) => generate::run(args),
        #[cfg(feature = "service")]
        Command::Migrate(args) => migrate::run(args),
        #[cfg(feature = "service")]
        Command::Openapi(args) => openapi::run(args),
        Command::Completions(args) => completions::run(args, Cli::command()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("secateur: {error:#}");
        ExitCode::FAILURE
    })
}

/// Writes an answer to standard output. That nobody reads to its end is no failure.
fn print(text: &str) -> ExitCode {
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()).ok();
    ExitCode::SUCCESS
}
