//! Sweeps: jobs that are asked for together and looked at side by side.

use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, Inserted, NewJob, Once, Result, Tenant, jobs, page_cut, requests};
use crate::job::report::{Failure, Scores};
use crate::job::state::JobState;
use crate::job::sweep::{Outcome, SweepSpec};

/// A sweep as it was asked for.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct SweepRow {
    pub id: Uuid,
    #[sqlx(rename = "tenant_id")]
    pub tenant: Tenant,
    pub name: Option<String>,
    #[sqlx(json)]
    pub spec: SweepSpec,
    /// The base model's scores, once a job is done.
    #[sqlx(json(nullable))]
    pub base: Option<Scores>,
    pub created_at: OffsetDateTime,
}

/// One job of a sweep, in the order of the sweep's combinations.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct SweepJob {
    pub position: i32,
    /// Absent when it was deleted.
    pub job_id: Option<Uuid>,
    pub state: Option<JobState>,
    #[sqlx(json(nullable))]
    pub failure: Option<Failure>,
    #[sqlx(json(nullable))]
    pub outcome: Option<Outcome>,
}

impl Database {
    /// Puts a sweep and all its jobs into the queue, unless the same request has done so before.
    pub async fn sweep_insert(
        &self,
        tenant: Tenant,
        spec: &SweepSpec,
        children: &[NewJob],
        once: Option<&Once>,
    ) -> Result<Inserted<Uuid>> {
        let id = Uuid::now_v7();
        let mut tx = self.pool.begin().await?;
        if let Some(once) = once
            && let Some(before) = requests::take(&mut tx, tenant, once, id).await?
        {
            return Ok(before);
        }
        sqlx::query(
            "insert into sweeps (id, tenant_id, name, spec, max_parallel) values ($1, $2, $3, $4, $5)",
        )
        .bind(id)
        .bind(tenant)
        .bind(&spec.name)
        .bind(Json(spec))
        .bind(spec.max_parallel.map(|n| i32::try_from(n).unwrap_or(i32::MAX)))
        .execute(&mut *tx)
        .await?;
        for (position, child) in children.iter().enumerate() {
            let job = Uuid::now_v7();
            jobs::insert(&mut tx, tenant, job, child).await?;
            sqlx::query(
                "insert into sweep_rows (sweep_id, position, tenant_id, job_id) values ($1, $2, $3, $4)",
            )
            .bind(id)
            .bind(position as i32)
            .bind(tenant)
            .bind(job)
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        Ok(Inserted::New(id))
    }

    pub async fn sweep(&self, tenant: Tenant, id: Uuid) -> Result<Option<SweepRow>> {
        let row = sqlx::query_as("select * from sweeps where tenant_id = $1 and id = $2")
            .bind(tenant)
            .bind(id)
            .fetch_optional(&self.pool)
            .await?;
        Ok(row)
    }

    /// The sweep that a job belongs to.
    pub async fn sweep_of(&self, tenant: Tenant, job: Uuid) -> Result<Option<SweepRow>> {
        let row = sqlx::query_as(
            "select s.* from sweeps s join sweep_rows r on r.sweep_id = s.id where s.tenant_id = $1 and r.job_id = $2",
        )
        .bind(tenant)
        .bind(job)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row)
    }

    /// One page of at most `limit` sweeps, newest first, from behind `after`; and whether there are more.
    pub async fn sweep_list(
        &self,
        tenant: Tenant,
        after: Option<Uuid>,
        limit: u32,
    ) -> Result<(Vec<SweepRow>, bool)> {
        let mut rows: Vec<SweepRow> = sqlx::query_as(
            "select * from sweeps where tenant_id = $1 and ($2::uuid is null or id < $2) order by id desc limit $3",
        )
        .bind(tenant)
        .bind(after)
        .bind(i64::from(limit) + 1)
        .fetch_all(&self.pool)
        .await?;
        let more = page_cut(&mut rows, limit);
        Ok((rows, more))
    }

    /// How many jobs of each of the sweeps are in each state; without one are those that were deleted.
    pub async fn sweep_states(
        &self,
        tenant: Tenant,
        ids: &[Uuid],
    ) -> Result<Vec<(Uuid, Option<JobState>, i64)>> {
        let rows = sqlx::query_as(
            "select r.sweep_id, j.state, count(*) from sweep_rows r left join jobs j on j.id = r.job_id
             where r.tenant_id = $1 and r.sweep_id = any ($2) group by 1, 2 order by 1, 2",
        )
        .bind(tenant)
        .bind(ids)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    pub async fn sweep_jobs(&self, tenant: Tenant, id: Uuid) -> Result<Vec<SweepJob>> {
        let rows = sqlx::query_as(
            "select r.position, r.job_id, j.state, j.failure, r.outcome
             from sweep_rows r left join jobs j on j.id = r.job_id
             where r.tenant_id = $1 and r.sweep_id = $2 order by r.position",
        )
        .bind(tenant)
        .bind(id)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// Keeps what a job of a sweep came to, and the base model's scores where they are not known yet.
    pub async fn sweep_note(
        &self,
        tenant: Tenant,
        id: Uuid,
        position: i32,
        outcome: &Outcome,
        base: &Scores,
    ) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        sqlx::query(
            "update sweep_rows set outcome = $4 where tenant_id = $1 and sweep_id = $2 and position = $3",
        )
        .bind(tenant)
        .bind(id)
        .bind(position)
        .bind(Json(outcome))
        .execute(&mut *tx)
        .await?;
        sqlx::query("update sweeps set base = coalesce(base, $3) where tenant_id = $1 and id = $2")
            .bind(tenant)
            .bind(id)
            .bind(Json(base))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(())
    }
}
