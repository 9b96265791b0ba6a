//! What the service's commands have in common: flags, logs, signals.

use std::io::IsTerminal;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use clap::ValueEnum;
use sqlx::postgres::PgConnectOptions;
use tokio::signal::unix::{SignalKind, signal};

use crate::service::db::Database;
use crate::service::http::{ApiKey, Limits};
use crate::service::local_pg::LocalPg;
use crate::service::sinks::{self, Hub, Lineage, Mlflow, Reach, Sink, Traces};
use crate::service::store::{Bucket, Store};
use crate::worker::{Settings, Shutdown};

/// A request or a worker waits at most this long for a connection.
const PATIENCE: Duration = Duration::from_secs(5);
const CONNECTIONS: u32 = 20;

#[derive(clap::Args)]
pub struct LogArgs {
    /// How to log to stderr; `RUST_LOG` says how much.
    #[arg(long, value_enum, default_value = "text", env = "SECATEUR_LOG_FORMAT")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl LogArgs {
    pub fn start(&self) {
        use tracing_subscriber::EnvFilter;
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr);
        match self.log_format {
            LogFormat::Text => log.with_target(false).init(),
            LogFormat::Json => log.json().init(),
        }
    }
}

#[derive(clap::Args)]
pub struct DataArgs {
    /// Where everything is kept: database, workspaces, finished files
    /// [default: /var/lib/secateur as root, else the XDG data directory]
    #[arg(long, env = "SECATEUR_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where finished files and uploads are kept; in the data directory when absent. Name a directory that all share
    /// when API and workers run on several machines.
    #[arg(long, env = "SECATEUR_STORE_DIR", value_name = "DIR")]
    store_dir: Option<PathBuf>,
    /// Keep finished files and uploads in a bucket of S3 instead, such as `s3://bucket/prefix`. Credentials, region and endpoint
    /// come from the variables of AWS's own tools: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`.
    #[arg(long, env = "SECATEUR_STORE_URL", value_name = "URL")]
    store_url: Option<String>,
    /// Send files of the bucket through the API, where clients cannot reach the bucket themselves.
    #[arg(long, env = "SECATEUR_STORE_PROXY", requires = "store_url")]
    store_proxy: bool,
}

impl DataArgs {
    /// The data directory, which may be missing.
    pub fn place(&self) -> anyhow::Result<PathBuf> {
        match &self.data_dir {
            Some(directory) => Ok(directory.clone()),
            None if rustix::process::geteuid().is_root() => Ok("/var/lib/secateur".into()),
            None => home_data()
                .context("neither XDG_DATA_HOME nor HOME says where to keep data; give --data-dir DIR"),
        }
    }

    /// The data directory, made when missing, as an absolute path.
    pub fn directory(&self) -> anyhow::Result<PathBuf> {
        let directory = self.place()?;
        let made = std::fs::create_dir_all(&directory).and_then(|()| directory.canonicalize());
        made.with_context(|| format!("cannot use the data directory {}", directory.display()))
    }

    /// The bucket that keeps finished files, where one is named.
    pub fn store_url(&self) -> Option<&str> {
        self.store_url.as_deref()
    }

    /// The store of finished files, for this data directory.
    pub async fn store(&self, data: &Path) -> anyhow::Result<Store> {
        if let Some(url) = &self.store_url {
            let bucket = Bucket::open(url, data.join("copies"), !self.store_proxy)?;
            bucket.check().await.with_context(|| format!("cannot use the store {url}"))?;
            return Ok(Store::Bucket(bucket));
        }
        let directory = self.store_dir.clone().unwrap_or_else(|| data.join("store"));
        Store::open(&directory).with_context(|| format!("cannot open the store {}", directory.display()))
    }
}

fn home_data() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share"))).map(|d| d.join("secateur"))
}

#[derive(clap::Args)]
pub struct DatabaseArgs {
    /// A PostgreSQL server, e.g. `postgres://user:password@host/name`
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
}

impl DatabaseArgs {
    /// How to reach the named server; none when none is named.
    pub fn named(&self) -> anyhow::Result<Option<PgConnectOptions>> {
        let parse = |url: &String| url.parse().context("the database URL cannot be read");
        self.database_url.as_ref().map(parse).transpose()
    }

    /// How to reach the server that this command cannot do without.
    pub fn required(&self) -> anyhow::Result<PgConnectOptions> {
        self.named()?.context("no database is named: give --database-url URL, or use `secateur up`")
    }
}

pub async fn connect(options: PgConnectOptions) -> anyhow::Result<Database> {
    Database::connect(options, CONNECTIONS, PATIENCE).await.context("cannot connect")
}

/// Starts the private PostgreSQL in `data`.
pub async fn start_postgres(data: &Path) -> anyhow::Result<Arc<LocalPg>> {
    let home = data.join("postgres");
    Ok(Arc::new(tokio::task::spawn_blocking(move || LocalPg::start(&home)).await??))
}

#[derive(clap::Args)]
pub struct KeyArgs {
    /// A file with the key that opens the API; `SECATEUR_API_KEY` holds the key itself.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
}

impl KeyArgs {
    pub fn key(&self) -> anyhow::Result<Option<Arc<ApiKey>>> {
        let (text, from) = match (&self.api_key_file, std::env::var("SECATEUR_API_KEY")) {
            (Some(file), _) => {
                let from = file.display().to_string();
                (std::fs::read_to_string(file).with_context(|| format!("cannot read {from}"))?, from)
            }
            (None, Ok(key)) => (key, "SECATEUR_API_KEY".to_owned()),
            (None, Err(_)) => return Ok(None),
        };
        let key = text.trim().parse().map_err(|e| anyhow::anyhow!("{from}: {e}"))?;
        Ok(Some(Arc::new(key)))
    }
}

#[derive(clap::Args)]
pub struct LimitArgs {
    /// Requests that one key may make in a second, and as many at once; 0 for no bound. Callers without a key, which are on
    /// this machine, have none.
    #[arg(long, env = "SECATEUR_REQUESTS_PER_S", default_value_t = 1000, value_name = "N")]
    requests_per_s: u32,
    /// Event streams that one key may have open at once.
    #[arg(long, env = "SECATEUR_STREAMS", default_value_t = 2000, value_name = "N")]
    streams: usize,
}

impl LimitArgs {
    pub fn limits(&self) -> Limits {
        Limits { requests_per_s: NonZeroU32::new(self.requests_per_s), streams: self.streams }
    }
}

#[derive(clap::Args)]
#[command(after_help = "Traces of jobs go to OTEL_EXPORTER_OTLP_ENDPOINT (http/protobuf) where that is set.")]
pub struct SinkArgs {
    /// Webhooks may go to this machine and private networks, at any port, without TLS.
    #[arg(long, env = "SECATEUR_WEBHOOKS_INSIDE")]
    webhooks_inside: bool,
    /// An `MLflow` server that gets a run for each job, such as `http://127.0.0.1:5000`; `MLFLOW_TRACKING_TOKEN`, or
    /// `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, open it.
    #[arg(long, env = "SECATEUR_MLFLOW_URL", value_name = "URL")]
    mlflow_url: Option<String>,
    /// The experiment whose runs they are.
    #[arg(long, env = "SECATEUR_MLFLOW_EXPERIMENT", default_value = "secateur", value_name = "NAME")]
    mlflow_experiment: String,
    /// A registered model there: the checkpoint of each job becomes a version of it, and its files go over, too.
    #[arg(long, env = "SECATEUR_MLFLOW_MODEL", value_name = "NAME", requires = "mlflow_url")]
    mlflow_model: Option<String>,
    /// A receiver of `OpenLineage` events, such as `http://127.0.0.1:5000/api/v1/lineage`; `OPENLINEAGE_API_KEY` opens it.
    #[arg(long, env = "SECATEUR_OPENLINEAGE_URL", value_name = "URL")]
    openlineage_url: Option<String>,
    /// The namespace of jobs and of what they leave there.
    #[arg(long, env = "SECATEUR_OPENLINEAGE_NAMESPACE", default_value = "secateur", value_name = "NAME")]
    openlineage_namespace: String,
    /// A user or an organisation of the Hugging Face Hub whose repositories jobs may name in `publish`; give it again for
    /// another. `HF_TOKEN`, or the file that `HF_TOKEN_PATH` names, must be allowed to write there; `HF_ENDPOINT` is another Hub.
    #[arg(long = "publish-to", value_name = "OWNER")]
    publish_to: Vec<String>,
    /// Multiplies the waits before another try to deliver.
    #[arg(long, hide = true, env = "SECATEUR_SINK_PATIENCE", default_value_t = 1.0)]
    sink_patience: f64,
}

impl SinkArgs {
    pub fn settings(&self) -> anyhow::Result<sinks::Settings> {
        let reach = if self.webhooks_inside { Reach::Private } else { Reach::Public };
        let named = |flag: &str, url: &Option<String>| match url {
            Some(url) => match Reach::Private.check(url) {
                Ok(()) => Ok(Some(url.clone())),
                Err(e) => Err(anyhow::anyhow!("{flag} {e}")),
            },
            None => Ok(None),
        };
        let mlflow = named("--mlflow-url", &self.mlflow_url)?.map(|url| {
            let experiment = self.mlflow_experiment.clone();
            let (model, authorization) = (self.mlflow_model.clone(), mlflow_authorization());
            Sink::Mlflow(Mlflow { url, experiment, model, authorization })
        });
        let lineage = named("--openlineage-url", &self.openlineage_url)?.map(|url| {
            let authorization = set("OPENLINEAGE_API_KEY").map(|key| format!("Bearer {key}"));
            Sink::Lineage(Lineage { url, namespace: self.openlineage_namespace.clone(), authorization })
        });
        let traces = Traces::from_variables(set).map_err(anyhow::Error::msg)?.map(Sink::Traces);
        let hub = if self.publish_to.is_empty() { None } else { Some(Sink::Hub(self.hub()?)) };
        let named = [mlflow, traces, lineage, hub].into_iter().flatten().collect();
        Ok(sinks::Settings { reach, patience: self.sink_patience.max(0.0), named })
    }

    fn hub(&self) -> anyhow::Result<Hub> {
        let token = match (set("HF_TOKEN"), set("HF_TOKEN_PATH")) {
            (Some(token), _) => token,
            (None, Some(file)) => {
                std::fs::read_to_string(&file).with_context(|| format!("cannot read HF_TOKEN_PATH {file}"))?
            }
            (None, None) => anyhow::bail!(
                "--publish-to needs a token that may write there: set HF_TOKEN or HF_TOKEN_PATH"
            ),
        };
        let url = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Reach::Private.check(&url).map_err(|e| anyhow::anyhow!("HF_ENDPOINT {e}"))?;
        Ok(Hub { url, token: token.trim().to_owned(), namespaces: self.publish_to.clone() })
    }
}

/// A variable that says something.
fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// By the variables that `MLflow`'s own clients read.
fn mlflow_authorization() -> Option<String> {
    if let Some(token) = set("MLFLOW_TRACKING_TOKEN") {
        return Some(format!("Bearer {token}"));
    }
    let (name, word) = (set("MLFLOW_TRACKING_USERNAME")?, set("MLFLOW_TRACKING_PASSWORD")?);
    Some(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{name}:{word}"))))
}

#[derive(clap::Args)]
pub struct WorkArgs {
    /// A device to run jobs on; give it again for another worker.
    #[arg(long = "device", value_name = "DEVICE", default_value = "cpu")]
    pub devices: Vec<String>,
    /// Threads that a job computes with; all cores when absent. With several workers on one machine, give each
    /// its share.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Memory that a job works in, such as `12GiB`; three quarters of what is free when absent.
    #[arg(long, value_name = "SIZE", value_parser = super::size::bytes)]
    memory_limit: Option<u64>,
    /// What jobs may ask of this worker in `resources.labels`; give it again for another.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    labels: Vec<(String, String)>,
    /// How long a lease lives without a heartbeat.
    #[arg(long, hide = true, env = "SECATEUR_LEASE_TTL_MS", default_value_t = 60_000)]
    lease_ttl_ms: u64,
    /// How long a child may take to stop.
    #[arg(long, hide = true, env = "SECATEUR_STOP_GRACE_MS", default_value_t = 60_000)]
    stop_grace_ms: u64,
    /// Wait before the second attempt.
    #[arg(long, hide = true, env = "SECATEUR_BACKOFF_MS", default_value_t = 5_000)]
    backoff_ms: u64,
    /// Run this program instead of our own `run`.
    #[arg(long, hide = true, env = "SECATEUR_CHILD_PROGRAM")]
    child_program: Option<PathBuf>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("a label is written as key=value".into()),
    }
}

impl WorkArgs {
    pub fn settings(&self, data: &Path) -> anyhow::Result<Settings> {
        let mut settings = Settings::new(data.to_owned()).context("cannot find my own program")?;
        settings.ttl = Duration::from_millis(self.lease_ttl_ms.max(100));
        settings.poll = (settings.ttl / 12).min(Duration::from_secs(5));
        settings.stop_grace = Duration::from_millis(self.stop_grace_ms);
        settings.limits.backoff = Duration::from_millis(self.backoff_ms);
        let flag = |name: &str, value: Option<u64>| {
            value.map(|value| [name.into(), value.to_string().into()]).into_iter().flatten()
        };
        settings.flags = flag("--threads", self.threads.map(u64::from))
            .chain(flag("--memory-limit", self.memory_limit))
            .collect();
        settings.labels = self.labels.iter().cloned().collect();
        settings.memory_bytes = self.memory_limit;
        if let Some(program) = &self.child_program {
            settings.program = vec![program.into()];
        }
        Ok(settings)
    }
}

/// SIGTERM or SIGINT drains, a second one hurries.
pub fn shutdown_on_signals() -> anyhow::Result<Shutdown> {
    let shutdown = Shutdown::default();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let told = shutdown.clone();
    tokio::spawn(async move {
        for order in [&told.drain, &told.hurry] {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            tracing::info!(
                "{}",
                if order.is_cancelled() || told.drain.is_cancelled() {
                    "stopping at once"
                } else {
                    "stopping in order; once more to stop at once"
                }
            );
            order.cancel();
        }
    });
    Ok(shutdown)
}

/// How long what computes or calls beside the threads of the service may go on after its end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Runs a command that serves to its end. A receiver that hangs does not hold it back.
pub fn run(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let ended = runtime.block_on(command);
    runtime.shutdown_timeout(LAST_WORDS);
    ended
}

/// The runtime of a service command.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
