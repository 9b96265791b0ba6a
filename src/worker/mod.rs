//! Supervises children: one worker per device, one child process per attempt.
//!
//! A [`turn`](Worker::turn) claims a job, runs `secateur run -` in the job's
//! workspace, and ends the attempt under its lease. The workspace stays between
//! attempts, so what one attempt has recorded the next one does not repeat.
//!
//! | the child | the attempt |
//! |---|---|
//! | exits 0 | its files go to the store, the job succeeds |
//! | tells [`Event::Failed`](crate::job::progress::Event::Failed) and exits 1 | fails, or is tried again when another attempt may end differently |
//! | exits 2 | the spec cannot be met |
//! | stops on SIGTERM (143) | is given back and costs nothing |
//! | dies without a word | crashed: is tried again |

mod child;
mod lease;
mod product;
mod record;
mod steward;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::broadcast;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::job::report::{Failure, FailureKind};
use crate::job::state::JobState;
use crate::service::db::{Database, Dead, Error, JobRow, Lease, Limits, Signal, WorkerSelf};
use crate::service::store::Store;
use crate::service::telemetry;
use child::Outcome;
use lease::Keeper;

const MEASURE_TIMEOUT: Duration = Duration::from_secs(20);

/// How workers behave.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Holds `work/<job>`, the workspaces, and `workers/`, who is here.
    pub data: PathBuf,
    /// The program that runs an attempt, and words before `run`.
    pub program: Vec<OsString>,
    /// Flags of `run`: what a child may take of the machine.
    pub flags: Vec<OsString>,
    /// What jobs may ask of their worker.
    pub labels: BTreeMap<String, String>,
    /// Memory that a job may work in; the usual share of the machine's when absent.
    pub memory_bytes: Option<u64>,
    /// How long a lease lives without a heartbeat.
    pub ttl: Duration,
    /// How often to look for work when no signal comes.
    pub poll: Duration,
    /// How long a child may take to stop before it is killed.
    pub stop_grace: Duration,
    /// How long a child may go on while the database is away.
    pub max_offline: Duration,
    /// How long the workspace of a job that failed or was cancelled waits for another try.
    pub keep_failed: Duration,
    /// How long what jobs have measured of a model is kept for the next ones, since it was last used.
    pub keep_records: Duration,
    pub limits: Limits,
    /// Have the program measure the device when a worker starts: plans reckon with it.
    pub measure: bool,
}

impl Settings {
    /// The usual ones, for this very program.
    pub fn new(data: PathBuf) -> std::io::Result<Self> {
        Ok(Self {
            data,
            program: vec![std::env::current_exe()?.into()],
            flags: Vec::new(),
            labels: BTreeMap::new(),
            memory_bytes: None,
            ttl: Duration::from_secs(60),
            poll: Duration::from_secs(5),
            stop_grace: Duration::from_secs(60),
            max_offline: Duration::from_mins(30),
            keep_failed: Duration::from_hours(24),
            keep_records: Duration::from_hours(30 * 24),
            limits: Limits::default(),
            measure: true,
        })
    }
}

/// How work is told to end: first in order, then at once.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Claim nothing more, stop the child at its next seam, give the job back.
    pub drain: CancellationToken,
    /// Kill the child now; still give the job back.
    pub hurry: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("another worker uses the device {device} with this data directory (see {at}); stop it first")]
    DeviceTaken { device: String, at: PathBuf },
    #[error("{0}: {1}")]
    Io(PathBuf, std::io::Error),
    #[error("a worker ended by itself: {0}")]
    Died(tokio::task::JoinError),
}

/// Runs one worker per device until `shutdown.drain`, then drains them.
///
/// # Errors
/// When a worker cannot start or dies.
pub async fn run(
    database: Database,
    store: Store,
    settings: Settings,
    devices: &[String],
    shutdown: Shutdown,
) -> Result<(), StartError> {
    let mut tasks = JoinSet::new();
    for device in devices {
        let seat = steward::take_seat(&settings.data, device)?;
        let worker = Worker {
            id: seat.id,
            device: device.clone(),
            database: database.clone(),
            store: store.clone(),
            settings: settings.clone(),
            shutdown: shutdown.clone(),
        };
        tasks.spawn(async move {
            let _seat = seat;
            worker.serve().await;
        });
    }
    let steward = steward::Steward { database, store, settings, stop: shutdown.drain };
    tasks.spawn(steward.serve());
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(StartError::Died)?;
    }
    Ok(())
}

/// How a single turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// No job waits.
    Idle,
    /// The attempt has ended, and the job is left in this state.
    Ended(JobState),
    /// The job is another's by now.
    Lost,
}

/// Works one job on `device` and leaves, or leaves when none comes within `wait`: for engines that start a process for
/// each job. Several may share a data directory and a device's name, as each has its own of the devices there.
///
/// # Errors
/// When the worker cannot start.
pub async fn run_once(
    database: Database,
    store: Store,
    settings: Settings,
    device: &str,
    wait: Duration,
    shutdown: Shutdown,
) -> Result<Turn, StartError> {
    let seat = steward::take_some_seat(&settings.data, device)?;
    let worker = Worker {
        id: seat.id,
        device: device.to_owned(),
        database: database.clone(),
        store: store.clone(),
        settings: settings.clone(),
        shutdown: shutdown.clone(),
    };
    let stop = CancellationToken::new();
    let steward = tokio::spawn(steward::Steward { database, store, settings, stop: stop.clone() }.serve());
    let turn = worker.one(tokio::time::Instant::now() + wait).await;
    stop.cancel();
    steward.await.map_err(StartError::Died)?;
    Ok(turn)
}

/// One device's worker.
pub struct Worker {
    pub id: Uuid,
    pub device: String,
    pub database: Database,
    pub store: Store,
    pub settings: Settings,
    pub shutdown: Shutdown,
}

impl Worker {
    /// Makes itself known, and takes away the leases of the worker that sat
    /// here before: holding its seat is the proof that it is dead.
    async fn announce(&self) -> Result<(), Error> {
        let memory_bytes = machine_memory_bytes();
        // A child that is not told takes three quarters of what is free; of the machine's that is the most it may come to.
        let usual = memory_bytes / 4 * 3;
        let me = WorkerSelf {
            id: self.id,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid: std::process::id() as i32,
            device: self.device.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            core_count: std::thread::available_parallelism().map_or(1, |n| n.get() as i32),
            memory_bytes,
            job_memory_bytes: self
                .settings
                .memory_bytes
                .map_or(usual, |n| i64::try_from(n).unwrap_or(i64::MAX)),
            labels: self.settings.labels.clone(),
        };
        self.database.worker_started(&me).await?;
        let dead = self.database.reap(Dead::Worker(self.id), self.settings.limits).await?;
        telemetry::leases_reaped("worker_died", dead);
        if dead > 0 {
            tracing::warn!(device = self.device, "took back the job of a worker that died");
        }
        Ok(())
    }

    async fn serve(&self) {
        telemetry::start_recording();
        telemetry::worker_ready(&self.device);
        let mut signals = self.database.signals();
        while let Err(error) = self.announce().await {
            tracing::warn!(device = self.device, %error, "the worker waits for the database");
            self.rest(&mut signals).await;
            if self.shutdown.drain.is_cancelled() {
                return;
            }
        }
        if self.settings.measure {
            self.measure().await;
        }
        tracing::info!(device = self.device, worker = %self.id, "worker is ready");
        while !self.shutdown.drain.is_cancelled() {
            match self.turn().await {
                Ok(Turn::Ended(_) | Turn::Lost) => {}
                Ok(Turn::Idle) => self.rest(&mut signals).await,
                Err(error) => {
                    tracing::warn!(device = self.device, %error, "no work now");
                    self.rest(&mut signals).await;
                }
            }
        }
        if let Err(error) = self.database.worker_left(self.id).await {
            tracing::debug!(%error, "left without a word");
        }
    }

    /// Measures the device in a child, as everything is computed. A worker that cannot tell works all the same.
    async fn measure(&self) {
        let measured = timeout(MEASURE_TIMEOUT, child::measure(self)).await;
        match measured {
            Ok(Ok(machine)) => {
                if let Err(error) = self.database.worker_measured(self.id, machine).await {
                    tracing::debug!(%error, "the speed of the device is not kept");
                }
            }
            Ok(Err(error)) => {
                tracing::warn!(device = self.device, %error, "the speed of the device is not known");
            }
            Err(_) => tracing::warn!(device = self.device, "measuring the device takes too long; it is left"),
        }
    }

    /// Works the first job that comes before `until`.
    async fn one(&self, until: tokio::time::Instant) -> Turn {
        let mut signals = self.database.signals();
        let mut known = false;
        let mut turn = Turn::Idle;
        while !self.shutdown.drain.is_cancelled() {
            let tried = async {
                if !known {
                    self.announce().await?;
                }
                known = true;
                self.turn().await
            };
            match tried.await {
                Ok(Turn::Idle) => {}
                Ok(ended) => {
                    turn = ended;
                    break;
                }
                Err(error) => tracing::warn!(device = self.device, %error, "no work now"),
            }
            if tokio::time::Instant::now() >= until {
                break;
            }
            // Not longer than there is time.
            let _ = tokio::time::timeout_at(until, self.rest(&mut signals)).await;
        }
        if let Err(error) = self.database.worker_left(self.id).await {
            tracing::debug!(%error, "left without a word");
        }
        turn
    }

    /// Waits for a signal that there may be work, or for the time to look anyway.
    async fn rest(&self, signals: &mut broadcast::Receiver<Signal>) {
        let knock = async {
            // A lagging receiver has missed signals: one of them may have been for us.
            while let Ok(Signal::Told(_) | Signal::Wished(_)) = signals.recv().await {}
        };
        tokio::select! {
            () = knock => {}
            () = tokio::time::sleep(self.settings.poll) => {}
            () = self.shutdown.drain.cancelled() => {}
        }
        if let Err(error) = self.database.worker_seen(self.id).await {
            tracing::debug!(%error, "not seen");
        }
    }

    /// Claims one job and runs one attempt of it.
    pub async fn turn(&self) -> Result<Turn, Error> {
        let Some((lease, job)) = self.database.claim(self.id, self.settings.ttl).await? else {
            return Ok(Turn::Idle);
        };
        let workspace = self.settings.data.join("work").join(job.id.to_string());
        telemetry::attempt_began(&self.device);
        if job.epoch == 1 {
            let waited = OffsetDateTime::now_utc() - job.created_at.max(job.run_after);
            telemetry::queue_waited(waited.try_into().unwrap_or_default());
        }
        tracing::info!(job = %job.id, attempt = job.attempt, epoch = job.epoch, "attempt begins");
        let keeper = Keeper::start(&self.database, lease, self.id, &self.settings);
        let outcome = match self.prepare(&job, &workspace).await {
            Ok(spec) => child::run(self, &keeper, lease, &spec, &workspace).await,
            Err(failure) => Outcome::Failed(failure),
        };
        let stopped = matches!(outcome, Outcome::Stopped(_));
        let ended = self.end(&keeper, lease, outcome, &workspace).await;
        let how = match ended {
            Ok(JobState::Succeeded) => "succeeded",
            Ok(_) if stopped => "stopped",
            Ok(_) => "failed",
            Err(_) => "lost",
        };
        telemetry::attempt_ended(&self.device, how);
        Ok(match ended {
            Ok(state) => {
                tracing::info!(job = %job.id, epoch = job.epoch, %state, "attempt ended");
                // One that failed or was cancelled may be tried again: its records stay for a time.
                if state == JobState::Succeeded {
                    steward::remove_workspace(&workspace).await;
                }
                Turn::Ended(state)
            }
            Err(Error::LeaseLost) => {
                telemetry::lease_lost();
                tracing::warn!(job = %job.id, epoch = job.epoch, "the lease was lost; nothing is written");
                Turn::Lost
            }
            Err(error) => {
                tracing::error!(job = %job.id, epoch = job.epoch, %error, "attempt not ended");
                Turn::Lost
            }
        })
    }

    /// The spec as the child shall read it, its workspace made.
    async fn prepare(&self, job: &JobRow, workspace: &std::path::Path) -> Result<Vec<u8>, Failure> {
        let storage = |e: std::io::Error| Failure {
            kind: FailureKind::Storage,
            stage: None,
            message: format!("cannot make the workspace {}: {e}", workspace.display()),
        };
        if let Some(before) = job.retry_of {
            steward::inherit(&workspace.with_file_name(before.to_string()), workspace).map_err(storage)?;
        }
        std::fs::create_dir_all(workspace).map_err(storage)?;
        let spec = product::resolve(&self.database, &self.store, job, workspace).await?;
        Ok(serde_json::to_vec(&spec).expect("a spec is JSON. This is a bug."))
    }

    /// Ends the attempt under its lease. Waits for the database if it must.
    async fn end(
        &self,
        keeper: &Keeper,
        lease: Lease,
        outcome: Outcome,
        workspace: &std::path::Path,
    ) -> Result<JobState, Error> {
        let limits = self.settings.limits;
        let outcome = match outcome {
            Outcome::Succeeded => match product::store(&self.store, lease, workspace).await {
                Ok(files) => {
                    keeper.persist(|| self.database.finish(lease, &files)).await?;
                    return Ok(JobState::Succeeded);
                }
                Err(failure) => Outcome::Failed(failure),
            },
            other => other,
        };
        match outcome {
            Outcome::Failed(failure) => {
                tracing::warn!(job = %lease.job, kind = ?failure.kind, message = failure.message, "attempt failed");
                keeper.persist(|| self.database.fail(lease, &failure, limits)).await
            }
            Outcome::Stopped(reason) => keeper.persist(|| self.database.release(lease, reason)).await,
            Outcome::Lost | Outcome::Succeeded => Err(Error::LeaseLost),
        }
    }
}

fn machine_memory_bytes() -> i64 {
    let info = rustix::system::sysinfo();
    i64::try_from(u64::from(info.mem_unit).saturating_mul(info.totalram as u64)).unwrap_or(i64::MAX)
}
