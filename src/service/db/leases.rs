//! Leases: at-least-once execution, exactly-once effects.
//!
//! The epoch is the fence, not the clock: an expired lease can still be renewed
//! while nobody has raised the job's epoch, and a worker whose epoch is old can
//! write nothing at all. Every write of a worker begins by locking or deleting
//! its lease row.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::types::Json;
use sqlx::{PgConnection, Postgres, Transaction};
use utoipa::ToSchema;
use uuid::Uuid;

use super::deadlines::leave;
use super::jobs::{JobRow, lock, write_state};
use super::stages::StageState;
use super::{Database, Entry, Error, NewArtifact, Result, Tenant, artifacts, events, stages};
use crate::job::progress::{Event, Stage};
use crate::job::report::{Failure, FailureKind};
use crate::job::state::{Change, JobState, Wish};

/// Claims are taken one at a time, so that limits read what the claim before wrote.
const CLAIM_LOCK: i64 = 7701;

/// The right to work on a job and to write about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub tenant: Tenant,
    pub job: Uuid,
    pub epoch: i64,
}

/// How far the current stage is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    pub stage: Stage,
    /// The part of the stage that counts.
    pub task: String,
    pub done: u64,
    pub total: u64,
    pub unit: String,
}

/// What a worker hears with its heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    Go,
    Cancel,
    Pause,
    /// The job has run as long as it may.
    Spent,
    /// The job belongs to someone else or to nobody.
    Lost,
}

/// How often a job may be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Attempts that may fail, besides those that lost their worker.
    pub attempts: i32,
    /// Attempts that lost their worker.
    pub crashes: i32,
    /// Wait before the second attempt; it doubles with each one.
    pub backoff: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { attempts: 3, crashes: 3, backoff: Duration::from_secs(5) }
    }
}

/// Leases whose holder is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dead {
    /// No heartbeat for a whole TTL.
    Expired,
    /// Held by this worker, which is known to have died.
    Worker(Uuid),
}

impl Database {
    /// Takes the next job that `worker` may run: of the tenant with the least share of the running jobs, and of
    /// that tenant's the one of highest priority, then the oldest. So nobody's priorities hold up other tenants.
    pub async fn claim(&self, worker: Uuid, ttl: Duration) -> Result<Option<(Lease, JobRow)>> {
        let mut tx = self.pool.begin().await?;
        sqlx::query("select pg_advisory_xact_lock($1)").bind(CLAIM_LOCK).execute(&mut *tx).await?;
        let head: Option<(Uuid, Tenant)> = sqlx::query_as(
            "select h.id, t.id
             from (select coalesce((select labels from workers where id = $1), '{}') as labels,
                     (select job_memory_bytes from workers where id = $1) as memory_bytes) w
             cross join tenants t
             left join (select tenant_id, count(*) as n from leases group by 1) l on l.tenant_id = t.id
             cross join lateral (
               select j.id, j.created_at from jobs j
               where j.tenant_id = t.id and j.state = 'queued' and j.run_after <= now()
                 and j.needs_labels <@ w.labels
                 and (j.needs_memory_bytes is null or j.needs_memory_bytes <= w.memory_bytes)
                 and (j.max_queue_s is null
                      or greatest(j.queued_at, j.run_after) + make_interval(secs => j.max_queue_s) >= now())
                 and not exists (
                   select from sweep_rows r join sweeps s on s.id = r.sweep_id
                   where r.job_id = j.id and s.max_parallel <= (
                     select count(*) from leases o join sweep_rows x on x.job_id = o.job_id
                     where x.sweep_id = s.id))
               order by j.priority desc, j.created_at limit 1) h
             where t.max_running is null or coalesce(l.n, 0) < t.max_running
             order by coalesce(l.n, 0)::float8 / t.weight, t.last_claim_at nulls first, h.created_at
             limit 1",
        )
        .bind(worker)
        .fetch_optional(&mut *tx)
        .await?;
        let Some((id, tenant)) = head else { return Ok(None) };
        let Some(mut job) = lock(&mut tx, tenant, id).await? else { return Ok(None) };
        if job.state != JobState::Queued {
            // Cancelled or paused between the two statements.
            return Ok(None);
        }
        job.state = job.state.after(Change::Claim)?;
        job.attempt += 1;
        job.epoch += 1;
        write_state(&mut tx, &job, None).await?;
        sqlx::query(
            "insert into leases (job_id, tenant_id, epoch, worker_id, expires_at)
             values ($1, $2, $3, $4, now() + make_interval(secs => $5))",
        )
        .bind(id)
        .bind(tenant)
        .bind(job.epoch)
        .bind(worker)
        .bind(ttl.as_secs_f64())
        .execute(&mut *tx)
        .await?;
        sqlx::query("update tenants set last_claim_at = clock_timestamp() where id = $1")
            .bind(tenant)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Some((Lease { tenant, job: id, epoch: job.epoch }, job)))
    }

    /// The heartbeat: keeps the lease for another `ttl` and hears the user's wish.
    pub async fn renew(&self, lease: Lease, ttl: Duration, progress: Option<&Progress>) -> Result<Renewal> {
        let heard: Option<(Option<Wish>, bool)> = sqlx::query_as(
            "update leases l
             set expires_at = now() + make_interval(secs => $4), progress = coalesce($5, l.progress)
             from jobs j
             where l.tenant_id = $1 and l.job_id = $2 and l.epoch = $3 and j.id = l.job_id
             returning j.wish,
               coalesce(j.run_seconds + extract(epoch from now() - j.running_since) >= j.max_run_s, false)",
        )
        .bind(lease.tenant)
        .bind(lease.job)
        .bind(lease.epoch)
        .bind(ttl.as_secs_f64())
        .bind(progress.map(Json))
        .fetch_optional(&self.pool)
        .await?;
        Ok(match heard {
            Some((None, false)) => Renewal::Go,
            Some((None, true)) => Renewal::Spent,
            Some((Some(Wish::Cancel), _)) => Renewal::Cancel,
            Some((Some(Wish::Pause), _)) => Renewal::Pause,
            None => Renewal::Lost,
        })
    }

    /// Keeps what the run told, in order, and the stage rows in step with it.
    ///
    /// # Errors
    /// [`Error::LeaseLost`], as with all that follow.
    pub async fn record(&self, lease: Lease, told: &[Event]) -> Result<()> {
        let entries: Vec<Entry> = told.iter().cloned().map(Entry::Run).collect();
        let mut tx = self.pool.begin().await?;
        let held =
            sqlx::query("select from leases where tenant_id = $1 and job_id = $2 and epoch = $3 for update")
                .bind(lease.tenant)
                .bind(lease.job)
                .bind(lease.epoch)
                .fetch_optional(&mut *tx)
                .await?;
        held.ok_or(Error::LeaseLost)?;
        stages::apply(&mut tx, lease.job, &entries).await?;
        events::append(&mut tx, lease.job, &entries).await?;
        tx.commit().await?;
        Ok(())
    }

    /// The attempt produced the result: its files become visible and the job succeeds.
    pub async fn finish(&self, lease: Lease, files: &[NewArtifact]) -> Result<()> {
        let (mut tx, mut job) = self.end(lease).await?;
        job.state = job.state.after(Change::Finish)?;
        job.failure = None;
        stages::close(&mut tx, job.id, StageState::Stopped).await?;
        artifacts::insert(&mut tx, job.id, files).await?;
        write_state(&mut tx, &job, None).await?;
        tx.commit().await?;
        Ok(())
    }

    /// The attempt failed. Gives the state the job is in now: queued again, if
    /// another attempt may end differently and the limits allow one.
    pub async fn fail(&self, lease: Lease, failure: &Failure, limits: Limits) -> Result<JobState> {
        let (mut tx, mut job) = self.end(lease).await?;
        // Attempts that lost their worker are counted apart.
        let retries_left = job.attempt - job.crashes < limits.attempts;
        let retryable = failure.kind.retryable();
        job.state = match job.wish {
            Some(wish) if retryable => job.state.after(Change::Stopped { wish: Some(wish) })?,
            _ => job.state.after(Change::Fail { kind: failure.kind, retries_left })?,
        };
        job.failure = Some(if retryable && job.state == JobState::Failed {
            Failure {
                kind: FailureKind::AttemptsSpent,
                stage: failure.stage,
                message: format!("gave up after {} attempts; the last one: {}", job.attempt, failure.message),
            }
        } else {
            failure.clone()
        });
        job.run_after += backoff(limits, job.attempt, &mut tx, job.run_after).await?;
        stages::close(&mut tx, job.id, StageState::Failed).await?;
        let state = leave(&mut tx, job, Some(failure.message.clone())).await?;
        tx.commit().await?;
        Ok(state)
    }

    /// The attempt stopped because it was asked to: by the user, by a deadline, or because the
    /// worker is leaving (`reason` says so). It costs no attempt.
    pub async fn release(&self, lease: Lease, reason: &str) -> Result<JobState> {
        let (mut tx, mut job) = self.end(lease).await?;
        job.state = job.state.after(Change::Stopped { wish: job.wish })?;
        job.attempt -= 1;
        stages::close(&mut tx, job.id, StageState::Stopped).await?;
        let state = leave(&mut tx, job, Some(reason.to_owned())).await?;
        tx.commit().await?;
        Ok(state)
    }

    /// Takes dead leases away; their jobs are tried again, or failed when they
    /// have lost too many workers. Gives how many there were.
    ///
    /// Reap [`Dead::Expired`] only after one TTL of uninterrupted connection of
    /// your own: after an outage all leases look expired for a moment.
    pub async fn reap(&self, dead: Dead, limits: Limits) -> Result<u64> {
        let mut reaped = 0;
        while self.reap_one(dead, limits).await? {
            reaped += 1;
        }
        Ok(reaped)
    }

    async fn reap_one(&self, dead: Dead, limits: Limits) -> Result<bool> {
        let worker = match dead {
            Dead::Expired => None,
            Dead::Worker(id) => Some(id),
        };
        let mut tx = self.pool.begin().await?;
        let gone: Option<(Tenant, Uuid, i64)> = sqlx::query_as(
            "delete from leases where job_id = (
               select job_id from leases
               where case when $1::uuid is null then expires_at < now() else worker_id = $1 end
               limit 1 for update skip locked)
             returning tenant_id, job_id, epoch",
        )
        .bind(worker)
        .fetch_optional(&mut *tx)
        .await?;
        let Some((tenant, id, epoch)) = gone else { return Ok(false) };
        let Some(mut job) = lock(&mut tx, tenant, id).await?.filter(|j| j.epoch == epoch) else {
            tx.commit().await?;
            return Ok(true);
        };
        job.epoch += 1;
        job.crashes += 1;
        let crashes_left = job.crashes < limits.crashes;
        job.state = job.state.after(Change::LeaseExpired { wish: job.wish, crashes_left })?;
        let reason = format!("lost its worker (time {} of at most {})", job.crashes, limits.crashes);
        if job.state == JobState::Failed {
            job.failure = Some(Failure {
                kind: FailureKind::AttemptsSpent,
                stage: None,
                message: format!("gave up after {} attempts; the last one {reason}", job.attempt),
            });
        }
        job.run_after += backoff(limits, job.attempt, &mut tx, job.run_after).await?;
        stages::close(&mut tx, id, StageState::Stopped).await?;
        leave(&mut tx, job, Some(reason)).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Begins the transaction that ends an attempt: the lease row is gone in it,
    /// the job's row locked.
    async fn end(&self, lease: Lease) -> Result<(Transaction<'static, Postgres>, JobRow)> {
        let mut tx = self.pool.begin().await?;
        let gone = sqlx::query("delete from leases where tenant_id = $1 and job_id = $2 and epoch = $3")
            .bind(lease.tenant)
            .bind(lease.job)
            .bind(lease.epoch)
            .execute(&mut *tx)
            .await?;
        if gone.rows_affected() == 0 {
            return Err(Error::LeaseLost);
        }
        let job = lock(&mut tx, lease.tenant, lease.job).await?;
        let job = job.filter(|j| j.epoch == lease.epoch).ok_or(Error::LeaseLost)?;
        Ok((tx, job))
    }
}

/// How much later than `from` the next attempt may begin, by the database's clock.
async fn backoff(
    limits: Limits,
    attempt: i32,
    tx: &mut PgConnection,
    from: time::OffsetDateTime,
) -> Result<Duration> {
    let doublings = attempt.clamp(1, 16) - 1;
    let wait = limits.backoff.as_secs_f64() * f64::from(1 << doublings);
    let seconds: f64 = sqlx::query_scalar("select greatest(0, extract(epoch from now() - $1) + $2)::float8")
        .bind(from)
        .bind(wait)
        .fetch_one(tx)
        .await?;
    Ok(Duration::from_secs_f64(seconds))
}
