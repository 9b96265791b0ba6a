//! `secateur api`: the HTTP API without workers.

use std::process::ExitCode;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::options::{self, DataArgs, DatabaseArgs, LogArgs};
use super::up::{self, ServeArgs};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    serve: ServeArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    log: LogArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.log.start();
    options::run(serve(&args))?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(args: &Args) -> anyhow::Result<()> {
    let shutdown = options::shutdown_on_signals()?;
    let data = args.data.directory()?;
    let database = options::connect(args.database.required()?).await?;
    database.migrate().await?;
    let door = args.serve.open(&data, &database).await?;
    let store = args.data.store(&data).await?;
    let background = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(up::serve(door, database.clone(), store, shutdown.clone(), background.clone()));
    let ended = up::all(tasks, &shutdown).await;
    background.cancel();
    database.close().await;
    ended
}
