//! `secateur worker`: runs jobs, serves nobody.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::options::{self, DataArgs, DatabaseArgs, LogArgs, WorkArgs};
use crate::job::state::JobState;
use crate::service::http;
use crate::worker::{self, Turn};

/// Exit code when the job is to be taken up again by another worker (`EX_TEMPFAIL` of sysexits.h).
const AGAIN: u8 = 75;

#[derive(clap::Args)]
pub struct Args {
    /// Work one job and leave, for engines that start a process for each. Exit code 0: a job has ended, well or not,
    /// or none waited; 75: the job was given back, and another worker is to take it up.
    #[arg(long)]
    once: bool,
    /// With `--once`: leave when no job comes within so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, requires = "once")]
    wait: u64,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    work: WorkArgs,
    /// Where Prometheus may ask for this worker's metrics; nowhere when absent.
    #[arg(long, env = "SECATEUR_METRICS_BIND", value_name = "ADDR")]
    metrics_bind: Option<SocketAddr>,
    #[command(flatten)]
    log: LogArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.log.start();
    options::runtime()?.block_on(work(&args))
}

async fn work(args: &Args) -> anyhow::Result<ExitCode> {
    let shutdown = options::shutdown_on_signals()?;
    let data = args.data.directory()?;
    let database = options::connect(args.database.required()?).await?;
    let store = args.data.store(&data).await?;
    let settings = args.work.settings(&data)?;
    let background = CancellationToken::new();
    let listening = database.clone();
    let stop = background.clone();
    tokio::spawn(async move { listening.listen(stop).await });
    if let Some(address) = args.metrics_bind {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        tracing::info!(address = %listener.local_addr()?, "metrics");
        tokio::spawn(http::serve_metrics(listener, background.clone()));
    }
    let devices = &args.work.devices;
    let ended = match (args.once, &devices[..]) {
        (false, devices) => worker::run(database.clone(), store, settings, devices, shutdown)
            .await
            .map(|()| ExitCode::SUCCESS),
        (true, [device]) => {
            let wait = Duration::from_secs(args.wait);
            let turn = worker::run_once(database.clone(), store, settings, device, wait, shutdown).await;
            turn.map(exit_code)
        }
        (true, _) => bail!("--once works one job: name one device"),
    };
    background.cancel();
    database.close().await;
    Ok(ended?)
}

fn exit_code(turn: Turn) -> ExitCode {
    match turn {
        Turn::Lost | Turn::Ended(JobState::Queued | JobState::Running) => ExitCode::from(AGAIN),
        Turn::Idle
        | Turn::Ended(JobState::Succeeded | JobState::Failed | JobState::Cancelled | JobState::Paused) => {
            ExitCode::SUCCESS
        }
    }
}
