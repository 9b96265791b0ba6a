//! Jobs that have waited or run as long as they may. Time is the database's.

use sqlx::PgConnection;
use uuid::Uuid;

use super::jobs::{JobRow, lock, write_state};
use super::{Database, Result, Tenant};
use crate::job::report::{Failure, FailureKind};
use crate::job::state::{Change, JobState};

impl Database {
    /// Ends the jobs that have waited for a worker as long as they may. Gives how many.
    pub async fn expire(&self) -> Result<u64> {
        let mut expired = 0;
        while self.expire_one().await? {
            expired += 1;
        }
        Ok(expired)
    }

    async fn expire_one(&self) -> Result<bool> {
        let mut tx = self.pool.begin().await?;
        let late: Option<(Tenant, Uuid, i32)> = sqlx::query_as(
            "select tenant_id, id, max_queue_s from jobs
             where state = 'queued' and max_queue_s is not null
               and greatest(queued_at, run_after) + make_interval(secs => max_queue_s) < now()
             limit 1 for update skip locked",
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some((tenant, id, seconds)) = late else { return Ok(false) };
        if let Some(mut job) = lock(&mut tx, tenant, id).await? {
            let message = format!(
                "waited for a worker longer than `deadlines.max_queue_s` allows ({seconds} s); \
                 give it more time, ask for less in `resources`, or start another worker"
            );
            expire(&mut tx, &mut job, FailureKind::QueueDeadline, message).await?;
        }
        tx.commit().await?;
        Ok(true)
    }
}

/// Whether the job has run as long as it may, its attempt of now included.
async fn is_spent(tx: &mut PgConnection, job: Uuid) -> Result<bool> {
    let spent = sqlx::query_scalar(
        "select coalesce(run_seconds + coalesce(extract(epoch from now() - running_since), 0) >= max_run_s, false)
         from jobs where id = $1",
    )
    .bind(job)
    .fetch_one(tx)
    .await?;
    Ok(spent)
}

/// Writes the state in which an attempt leaves its job, told why. A job that would wait for another attempt, but has run as
/// long as it may, has failed.
pub(super) async fn leave(
    tx: &mut PgConnection,
    mut job: JobRow,
    reason: Option<String>,
) -> Result<JobState> {
    if job.state == JobState::Queued && is_spent(tx, job.id).await? {
        let message = format!(
            "ran longer than `deadlines.max_run_s` allows ({} s over all attempts); give it more time, or retry it: \
             it goes on from what it has recorded",
            job.spec.deadlines.max_run_s.unwrap_or_default()
        );
        expire(tx, &mut job, FailureKind::RunDeadline, message).await?;
    } else {
        write_state(tx, &job, reason).await?;
    }
    Ok(job.state)
}

async fn expire(tx: &mut PgConnection, job: &mut JobRow, kind: FailureKind, message: String) -> Result<()> {
    job.state = job.state.after(Change::Expire)?;
    job.failure = Some(Failure { kind, stage: None, message: message.clone() });
    write_state(tx, job, Some(message)).await
}
