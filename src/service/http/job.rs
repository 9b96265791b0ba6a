//! A job as the API shows it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::job::plan::Plan;
use crate::job::progress::Stage;
use crate::job::report::Failure;
use crate::job::spec::JobSpec;
use crate::job::state::{JobState, Wish};
use crate::service::db::{JobRow, Progress, StageRow, StageState};

/// A job as it stands, without its spec.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct JobSummary {
    /// Always `"job"`.
    #[schema(example = "job")]
    pub object: &'static str,
    pub id: Uuid,
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub state: JobState,
    /// What was asked of a running job and has not come about yet.
    pub wish: Option<Wish>,
    /// Of the jobs of a tenant that wait, the higher goes first.
    pub priority: i16,
    /// Attempts so far; one that was drained or paused does not count.
    pub attempt: i32,
    /// Attempts that lost their worker.
    pub crashes: i32,
    /// How far a running job is.
    pub progress: Option<JobProgress>,
    /// Why it failed, or why its last attempt did.
    pub failure: Option<Failure>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When the first attempt began.
    #[serde(with = "time::serde::rfc3339::option")]
    pub started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
    /// How long its attempts ran that have ended.
    pub run_s: f64,
    /// The job that failed or was cancelled and that this one tries again.
    pub retry_of: Option<Uuid>,
    /// A waiting job is not tried before this time.
    #[serde(with = "time::serde::rfc3339")]
    pub run_after: OffsetDateTime,
    /// Number of its newest event.
    pub last_seq: i64,
    pub links: Links,
}

/// A job with all that is asked and the stages that have begun.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Job {
    #[serde(flatten)]
    pub summary: JobSummary,
    pub spec: JobSpec,
    pub stages: Vec<StageRow>,
    /// What the job was reckoned to take when it was asked for, on the fastest worker there was then; beside `stages`, which
    /// tell what it took. Absent where the model was not at hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// How many of the queue's jobs go before this one, while it waits.
    pub jobs_ahead: Option<i64>,
}

/// How far the running stage is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobProgress {
    pub stage: Stage,
    /// The part of the stage that counts.
    pub task: String,
    pub done: u64,
    pub total: u64,
    #[schema(example = "windows")]
    pub unit: String,
    /// `done / total`.
    pub fraction: f64,
    /// Time until the stage is done if it goes on as it did.
    pub eta_s: Option<u64>,
}

/// Where the job's other resources are.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Links {
    #[serde(rename = "self")]
    pub this: String,
    pub events: String,
    pub stages: String,
    pub metrics: String,
    pub profile: String,
    pub report: String,
    pub artifacts: String,
    pub bundle: String,
    /// The result as a model of the Hugging Face Hub; its name there is the job's id.
    pub hub: String,
}

/// A page of a list.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Page<T> {
    /// Always `"list"`.
    #[schema(example = "list")]
    pub object: &'static str,
    pub data: Vec<T>,
    pub first_id: Option<String>,
    /// Give it as `after` to get the next page.
    pub last_id: Option<String>,
    pub has_more: bool,
}

impl<T> Page<T> {
    pub fn new(data: Vec<T>, has_more: bool, id: impl Fn(&T) -> String) -> Self {
        let (first_id, last_id) = (data.first().map(&id), data.last().map(&id));
        Self { object: "list", data, first_id, last_id, has_more }
    }
}

impl JobSummary {
    /// `stages` tell since when the running stage runs.
    pub fn new(row: &JobRow, stages: &[StageRow]) -> Self {
        let running = row.state == JobState::Running;
        Self {
            object: "job",
            id: row.id,
            name: row.name.clone(),
            labels: row.labels.clone(),
            state: row.state,
            wish: row.wish,
            priority: row.priority,
            attempt: row.attempt,
            crashes: row.crashes,
            progress: row.progress.as_ref().filter(|_| running).map(|p| JobProgress::new(p, stages)),
            failure: row.failure.clone(),
            created_at: row.created_at,
            started_at: row.started_at,
            finished_at: row.finished_at,
            run_s: row.run_seconds,
            retry_of: row.retry_of,
            run_after: row.run_after,
            last_seq: row.last_seq,
            links: Links::new(row.id),
        }
    }
}

impl Job {
    pub fn new(row: JobRow, stages: Vec<StageRow>, jobs_ahead: Option<i64>) -> Self {
        Self { summary: JobSummary::new(&row, &stages), spec: row.spec, plan: row.plan, stages, jobs_ahead }
    }

    /// Changes with all that is shown but the passing of time.
    pub fn etag(&self) -> String {
        let mut timeless = self.clone();
        if let Some(progress) = &mut timeless.summary.progress {
            progress.eta_s = None;
        }
        let bytes = serde_json::to_vec(&timeless).expect("a job is JSON. This is a bug.");
        format!("W/\"{}\"", hex::encode(&Sha256::digest(bytes)[..16]))
    }
}

impl JobProgress {
    pub fn new(progress: &Progress, stages: &[StageRow]) -> Self {
        let Progress { stage, task, done, total, unit } = progress.clone();
        let fraction = if total == 0 { 0.0 } else { (done as f64 / total as f64).min(1.0) };
        let row = stages.iter().find(|s| s.stage == stage && s.state == StageState::Running);
        let eta_s = row.filter(|_| fraction > 0.0).map(|row| {
            let passed_s = (OffsetDateTime::now_utc() - row.started_at).as_seconds_f64().max(0.0);
            (passed_s * (1.0 - fraction) / fraction).ceil() as u64
        });
        Self { stage, task, done, total, unit, fraction, eta_s }
    }
}

impl Links {
    fn new(id: Uuid) -> Self {
        let below = |what: &str| format!("/v1/jobs/{id}/{what}");
        Self {
            this: format!("/v1/jobs/{id}"),
            events: below("events"),
            stages: below("stages"),
            metrics: below("metrics"),
            profile: below("profile"),
            report: below("report"),
            artifacts: below("artifacts"),
            bundle: below("bundle.tar"),
            hub: format!("/hf/api/models/{id}"),
        }
    }
}
