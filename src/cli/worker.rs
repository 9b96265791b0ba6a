//! `secateur worker`: runs jobs, serves nobody.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::options::{self, DataArgs, DatabaseArgs, LogArgs, WorkArgs};
use crate::service::http;
use crate::service::store::Store;
use crate::worker;

#[derive(clap::Args)]
pub struct Args {
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
    options::runtime()?.block_on(work(&args))?;
    Ok(ExitCode::SUCCESS)
}

async fn work(args: &Args) -> anyhow::Result<()> {
    let shutdown = options::shutdown_on_signals()?;
    let data = args.data.directory()?;
    let database = options::connect(args.database.required()?).await?;
    let store = Store::open(data.join("store")).context("cannot open the store")?;
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
    let ended = worker::run(database.clone(), store, settings, &args.work.devices, shutdown).await;
    background.cancel();
    database.close().await;
    Ok(ended?)
}
