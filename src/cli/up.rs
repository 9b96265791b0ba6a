//! `secateur up`: everything in one process tree.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::options::{self, DataArgs, DatabaseArgs, KeyArgs, LimitArgs, LogArgs, SinkArgs, WorkArgs};
use crate::service::db::{Database, Tenant};
use crate::service::http::{self, AppState, Feeds, Lock, Roots, Turnstile};
use crate::service::local_pg::LocalPg;
use crate::service::seal::Seal;
use crate::service::sinks::{self, Drain};
use crate::service::store::Store;
use crate::worker::{self, Shutdown};

/// How often to look whether the private PostgreSQL is alive.
const WATCH_EVERY: Duration = Duration::from_millis(500);
/// How often to look for jobs that have waited too long.
const EXPIRE_EVERY: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    serve: ServeArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    work: WorkArgs,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(clap::Args)]
pub struct ServeArgs {
    /// Where the API listens; port 0 takes a free one.
    #[arg(long, env = "SECATEUR_BIND", default_value = "127.0.0.1:8080", value_name = "ADDR")]
    bind: SocketAddr,
    /// A directory whose models and texts jobs may name; give it again for another.
    #[arg(long = "allow-root", value_name = "DIR")]
    roots: Vec<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    sinks: SinkArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.log.start();
    options::run(up(&args))?;
    Ok(ExitCode::SUCCESS)
}

async fn up(args: &Args) -> anyhow::Result<()> {
    let shutdown = options::shutdown_on_signals()?;
    let data = args.data.directory()?;
    let (address, postgres) = match args.database.named()? {
        Some(named) => (named, None),
        None => {
            let private = options::start_postgres(&data).await?;
            (private.options(), Some(private))
        }
    };
    let served = work_and_serve(args, &data, address, postgres.clone(), &shutdown).await;
    if let Some(postgres) = postgres {
        tokio::task::spawn_blocking(move || postgres.stop()).await?;
    }
    served
}

async fn work_and_serve(
    args: &Args,
    data: &Path,
    address: sqlx::postgres::PgConnectOptions,
    postgres: Option<Arc<LocalPg>>,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let database = options::connect(address).await?;
    database.migrate().await?;
    let door = args.serve.open(data, &database).await?;
    let store = args.data.store(data).await?;
    let settings = args.work.settings(data)?;
    let devices = args.work.devices.clone();
    // Lives until all the others are done: they need the database to end in order.
    let background = CancellationToken::new();
    let watcher = postgres.map(|postgres| tokio::spawn(keep_running(postgres, background.clone())));
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(door, database.clone(), store.clone(), shutdown.clone(), background.clone()));
    let (workers, worker_store, told) = (database.clone(), store, shutdown.clone());
    tasks.spawn(async move { Ok(worker::run(workers, worker_store, settings, &devices, told).await?) });
    let ended = all(tasks, shutdown).await;
    background.cancel();
    database.close().await;
    if let Some(watcher) = watcher {
        // Or it might start again what is stopped next.
        watcher.await?;
    }
    ended
}

/// Waits for all; if one fails, or ends without being told to, the others are told to end.
pub async fn all(mut tasks: JoinSet<anyhow::Result<()>>, shutdown: &Shutdown) -> anyhow::Result<()> {
    let mut first = Ok(());
    while let Some(ended) = tasks.join_next().await {
        let ended = match ended {
            Ok(Ok(())) if !shutdown.drain.is_cancelled() => Err(anyhow::anyhow!("a part ended by itself")),
            Ok(ended) => ended,
            Err(error) => Err(error.into()),
        };
        shutdown.drain.cancel();
        if let Err(error) = ended {
            tracing::error!("{error:#}");
            first = first.and(Err(error));
        }
    }
    first
}

/// The API's place, allowed and taken.
pub struct Door {
    listener: TcpListener,
    seal: Seal,
    sinks: sinks::Settings,
    roots: Roots,
    lock: Lock,
    turnstile: Turnstile,
}

impl ServeArgs {
    /// Takes the address, if it may be taken.
    pub async fn open(&self, data: &Path, database: &Database) -> anyhow::Result<Door> {
        let seal =
            Seal::open(&data.join("secret.key")).context("cannot use secret.key of the data directory")?;
        let roots = Roots::new(&self.roots).map_err(anyhow::Error::msg)?;
        if let Some(key) = self.key.key()? {
            database.key_put(&key.row(Tenant::DEFAULT, "given at the start")).await?;
        }
        let lock = Lock::new(database).await?;
        http::may_bind(self.bind, lock.is_closed()).map_err(anyhow::Error::msg)?;
        let listener = TcpListener::bind(self.bind).await;
        let listener = listener.with_context(|| format!("cannot listen on {}", self.bind))?;
        let turnstile = Turnstile::new(self.limits.limits());
        Ok(Door { listener, seal, sinks: self.sinks.settings()?, roots, lock, turnstile })
    }
}

/// Serves the API until the drain; listens for signals of the database until `background` ends.
pub async fn serve(
    door: Door,
    database: Database,
    store: Store,
    shutdown: Shutdown,
    background: CancellationToken,
) -> anyhow::Result<()> {
    let listening = database.clone();
    tokio::spawn(async move { listening.listen(background).await });
    let Door { listener, seal, sinks, roots, lock, turnstile } = door;
    let reach = sinks.reach;
    let publish_to = sinks.publish_to().into();
    let (told, files) = (database.clone(), store.clone());
    let drain = Drain { database: told, store: files, seal: seal.clone(), settings: sinks };
    tokio::spawn(drain.serve(shutdown.drain.clone()));
    tokio::spawn(expire(database.clone(), shutdown.drain.clone()));
    let feeds = Feeds::default();
    let stop = shutdown.drain;
    let state =
        AppState { database, store, seal, reach, publish_to, roots, lock, turnstile, feeds, shutdown: stop };
    let address = listener.local_addr()?;
    println!("listening on http://{address}");
    tracing::info!(%address, "ready");
    tokio::select! {
        served = http::serve(listener, state) => Ok(served?),
        () = shutdown.hurry.cancelled() => Ok(()),
    }
}

/// Ends jobs that have waited too long; workers do, too, but perhaps there is none.
async fn expire(database: Database, stop: CancellationToken) {
    while !stop.is_cancelled() {
        if let Err(error) = database.expire().await {
            tracing::debug!(%error, "cannot look for jobs that have waited too long");
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(EXPIRE_EVERY) => {}
        }
    }
}

/// Starts the private PostgreSQL again whenever it has died.
async fn keep_running(postgres: Arc<LocalPg>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(WATCH_EVERY) => {}
        }
        let watched = postgres.clone();
        match tokio::task::spawn_blocking(move || watched.keep_running()).await {
            Ok(Ok(false)) => {}
            Ok(Ok(true)) => tracing::warn!("PostgreSQL had died; it runs again"),
            Ok(Err(error)) => tracing::error!(%error, "PostgreSQL has died and does not start"),
            Err(error) => tracing::error!(%error, "cannot watch PostgreSQL"),
        }
    }
}
