//! How the stages of a job stand.

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Database, Entry, Result, Tenant};
use crate::job::progress::{Event, Stage};

/// Where a stage is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StageState {
    Running,
    Finished,
    Failed,
    /// Ended early, by wish or with its worker; the next attempt goes on.
    Stopped,
}

impl StageState {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

impl std::str::FromStr for StageState {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Running, Self::Finished, Self::Failed, Self::Stopped]
            .into_iter()
            .find(|s| s.name() == name)
            .ok_or_else(|| format!("`{name}` is no state of a stage"))
    }
}

/// A stage that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, sqlx::FromRow, ToSchema)]
pub struct StageRow {
    pub stage: Stage,
    pub state: StageState,
    /// The record of an earlier attempt was taken; nothing was computed.
    pub reused: bool,
    pub attempt: i32,
    #[serde(with = "time::serde::rfc3339")]
    pub started_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
    pub duration_ms: Option<i64>,
    /// sha256 over everything the stage's result depends on.
    pub input_digest: Option<String>,
}

impl Database {
    /// The stages of a job that have begun, in their order.
    pub async fn stages(&self, tenant: Tenant, job: Uuid) -> Result<Vec<StageRow>> {
        let mut rows: Vec<StageRow> = sqlx::query_as(
            "select stage, state, reused, attempt, started_at, finished_at, duration_ms, input_digest
             from stages where tenant_id = $1 and job_id = $2",
        )
        .bind(tenant)
        .bind(job)
        .fetch_all(&self.pool)
        .await?;
        rows.sort_by_key(|r| r.stage);
        Ok(rows)
    }
}

/// Keeps the stage rows in step with what the run tells.
pub(super) async fn apply(tx: &mut PgConnection, job: Uuid, entries: &[Entry]) -> Result<()> {
    for entry in entries {
        match entry {
            Entry::Run(Event::StageStarted { stage }) => start(tx, job, *stage).await?,
            Entry::Run(Event::StageFinished { stage, reused, duration_ms, input_digest }) => {
                sqlx::query(
                    "update stages set state = 'finished', reused = $3, finished_at = clock_timestamp(),
                       duration_ms = $4, input_digest = $5 where job_id = $1 and stage = $2",
                )
                .bind(job)
                .bind(stage)
                .bind(reused)
                .bind(*duration_ms as i64)
                .bind(input_digest)
                .execute(&mut *tx)
                .await?;
            }
            Entry::Run(
                Event::Advanced { .. } | Event::Measured { .. } | Event::Noted { .. } | Event::Failed { .. },
            )
            | Entry::Job(_) => {}
        }
    }
    Ok(())
}

async fn start(tx: &mut PgConnection, job: Uuid, stage: Stage) -> Result<()> {
    sqlx::query(
        "insert into stages (job_id, stage, tenant_id, state, attempt, started_at)
         select id, $2, tenant_id, 'running', attempt, clock_timestamp() from jobs where id = $1
         on conflict (job_id, stage) do update set state = 'running', reused = false,
           attempt = excluded.attempt, started_at = excluded.started_at, finished_at = null,
           duration_ms = null, input_digest = null",
    )
    .bind(job)
    .bind(stage)
    .execute(tx)
    .await?;
    Ok(())
}

/// The attempt is over: what still ran, did not finish.
pub(super) async fn close(tx: &mut PgConnection, job: Uuid, state: StageState) -> Result<()> {
    sqlx::query(
        "update stages set state = $2, finished_at = clock_timestamp() where job_id = $1 and state = 'running'",
    )
    .bind(job)
    .bind(state)
    .execute(tx)
    .await?;
    Ok(())
}
