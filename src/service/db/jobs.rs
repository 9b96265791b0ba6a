//! Jobs: put in, look up, list, and what the user may want of them.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, Entry, Error, JobEvent, Progress, Result, Tenant, events, outbox, page_cut, signals};
use crate::job::plan::Plan;
use crate::job::report::Failure;
use crate::job::spec::JobSpec;
use crate::job::state::{Change, JobState, Wish};

/// A job as it stands.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct JobRow {
    pub id: Uuid,
    #[sqlx(rename = "tenant_id")]
    pub tenant: Tenant,
    pub name: Option<String>,
    #[sqlx(json)]
    pub labels: BTreeMap<String, String>,
    #[sqlx(json)]
    pub spec: JobSpec,
    pub state: JobState,
    pub wish: Option<Wish>,
    pub priority: i16,
    /// Attempts that count; a drain or a pause gives its attempt back.
    pub attempt: i32,
    /// Attempts that ended with a lost worker.
    pub crashes: i32,
    /// Fencing token of the current or last lease.
    pub epoch: i64,
    /// Not before this time.
    pub run_after: OffsetDateTime,
    pub created_at: OffsetDateTime,
    /// When the first attempt began.
    pub started_at: Option<OffsetDateTime>,
    pub finished_at: Option<OffsetDateTime>,
    /// How long its attempts ran that have ended.
    pub run_seconds: f64,
    /// Why it failed, or why the last attempt did.
    #[sqlx(json(nullable))]
    pub failure: Option<Failure>,
    /// Number of the newest event.
    pub last_seq: i64,
    /// The failed or cancelled job that it tries again.
    pub retry_of: Option<Uuid>,
    /// What it was reckoned to take, on the fastest worker there was.
    #[sqlx(json(nullable))]
    pub plan: Option<Plan>,
    #[sqlx(flatten)]
    pub asked: Asked,
    /// How far a running job is.
    #[sqlx(json(nullable))]
    pub progress: Option<Progress>,
}

/// The request that asked for a job, as traces tell of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, sqlx::FromRow)]
pub struct Asked {
    /// The caller's span (W3C Trace Context), where it traced the request.
    pub traceparent: Option<String>,
    /// When the request came; absent where it asked for many jobs at once.
    #[sqlx(rename = "asked_at")]
    pub at: Option<OffsetDateTime>,
}

/// A job to put in.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub spec: JobSpec,
    /// The failed or cancelled job that it tries again.
    pub retry_of: Option<Uuid>,
    /// What it is reckoned to take.
    pub plan: Option<Plan>,
    pub asked: Asked,
}

impl NewJob {
    /// A job like any other.
    pub fn new(spec: JobSpec) -> Self {
        Self { spec, retry_of: None, plan: None, asked: Asked::default() }
    }
}

/// Which jobs to list. All conditions must hold.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    pub states: Vec<JobState>,
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// Only jobs created at this time or later.
    pub created_from: Option<OffsetDateTime>,
    /// Only jobs created before this time.
    pub created_before: Option<OffsetDateTime>,
    pub cursor: Cursor,
}

/// Where a page of jobs begins, and in which direction the list is walked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cursor {
    #[default]
    Newest,
    /// Jobs older than this one: the last of the page before.
    After(Uuid),
    /// Jobs newer than this one: the first of the page after.
    Before(Uuid),
}

/// One page of jobs, newest first.
#[derive(Debug, Clone)]
pub struct JobPage {
    pub jobs: Vec<JobRow>,
    /// There are more in the direction in which the list is walked.
    pub has_more: bool,
}

/// The statement behind a page. The two orders are two statements, for each is one walk along the index.
macro_rules! list_jobs {
    ($newer_or_older:literal, $order:literal) => {
        concat!(
            "select j.*, l.progress from jobs j left join leases l on l.job_id = j.id
             where j.tenant_id = $1 and ($2::uuid is null or j.id ",
            $newer_or_older,
            " $2) and (cardinality($3::text[]) = 0 or j.state = any ($3))
               and ($4::text is null or j.name = $4) and j.labels @> $5
               and ($7::timestamptz is null or j.created_at >= $7) and ($8::timestamptz is null or j.created_at < $8)
             order by j.id ",
            $order,
            " limit $6"
        )
    };
}

/// What became of a wish to delete a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    Done,
    /// A running job must be cancelled first.
    Running,
    Unknown,
}

impl Database {
    /// Puts a job into the queue under a new id (UUID version 7: sortable by age).
    pub async fn job_insert(&self, tenant: Tenant, job: &NewJob) -> Result<JobRow> {
        let mut tx = self.pool.begin().await?;
        let row = insert(&mut tx, tenant, Uuid::now_v7(), job).await?;
        tx.commit().await?;
        Ok(row)
    }

    pub async fn job(&self, tenant: Tenant, id: Uuid) -> Result<Option<JobRow>> {
        let row = sqlx::query_as(
            "select j.*, l.progress from jobs j left join leases l on l.job_id = j.id
             where j.tenant_id = $1 and j.id = $2",
        )
        .bind(tenant)
        .bind(id)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row)
    }

    /// One page of at most `limit` jobs, newest first.
    pub async fn job_list(&self, tenant: Tenant, filter: &JobFilter, limit: u32) -> Result<JobPage> {
        let states: Vec<&str> = filter.states.iter().map(|s| s.name()).collect();
        let (statement, from) = match filter.cursor {
            Cursor::Newest => (list_jobs!("<", "desc"), None),
            Cursor::After(id) => (list_jobs!("<", "desc"), Some(id)),
            Cursor::Before(id) => (list_jobs!(">", "asc"), Some(id)),
        };
        let mut jobs: Vec<JobRow> = sqlx::query_as(statement)
            .bind(tenant)
            .bind(from)
            .bind(states)
            .bind(&filter.name)
            .bind(Json(&filter.labels))
            .bind(i64::from(limit) + 1)
            .bind(filter.created_from)
            .bind(filter.created_before)
            .fetch_all(&self.pool)
            .await?;
        let has_more = page_cut(&mut jobs, limit);
        if matches!(filter.cursor, Cursor::Before(_)) {
            jobs.reverse();
        }
        Ok(JobPage { jobs, has_more })
    }

    /// How many jobs are in each state, over all tenants: for the metrics.
    pub async fn job_counts(&self) -> Result<Vec<(JobState, i64)>> {
        Ok(sqlx::query_as("select state, count(*) from jobs group by state").fetch_all(&self.pool).await?)
    }

    /// Since when the job that waits longest could have run, over all tenants: for the metrics.
    pub async fn oldest_waiting(&self) -> Result<Option<OffsetDateTime>> {
        let since = sqlx::query_scalar(
            "select min(greatest(run_after, created_at)) from jobs where state = 'queued' and run_after <= now()",
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(since)
    }

    /// How many waiting jobs of the tenant go before this one. `None` when it does not wait.
    pub async fn jobs_ahead(&self, tenant: Tenant, id: Uuid) -> Result<Option<i64>> {
        let ahead = sqlx::query_scalar(
            "select (select count(*) from jobs o where o.tenant_id = j.tenant_id and o.state = 'queued'
                       and (o.priority > j.priority
                            or (o.priority = j.priority and (o.created_at, o.id) < (j.created_at, j.id))))
             from jobs j where j.tenant_id = $1 and j.id = $2 and j.state = 'queued'",
        )
        .bind(tenant)
        .bind(id)
        .fetch_optional(&self.pool)
        .await?;
        Ok(ahead)
    }

    /// How many jobs wait or run, over all tenants, and the seconds that those are reckoned to take whose plan says so.
    pub async fn queue(&self) -> Result<(i64, f64)> {
        let queue = sqlx::query_as(
            "select count(*), coalesce(sum((
               select sum((s ->> 'seconds')::float8) from jsonb_array_elements(j.plan -> 'stages') s)), 0)::float8
             from jobs j where j.state in ('queued', 'running')",
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(queue)
    }

    /// The latest job of the tenant that succeeded and has measured what this one would: the same value of the spec's
    /// fields `fields`.
    pub async fn job_like(&self, tenant: Tenant, spec: &JobSpec, fields: &[&str]) -> Result<Option<Uuid>> {
        let mut wanted = serde_json::to_value(spec).unwrap_or_default();
        if let Some(wanted) = wanted.as_object_mut() {
            wanted.retain(|field, _| fields.contains(&field.as_str()));
        }
        let id = sqlx::query_scalar(
            "select id from jobs where tenant_id = $1 and state = 'succeeded'
               and (select jsonb_object_agg(key, value) from jsonb_each(spec) where key = any ($3)) = $2
             order by id desc limit 1",
        )
        .bind(tenant)
        .bind(Json(wanted))
        .bind(fields.iter().map(|field| (*field).to_owned()).collect::<Vec<_>>())
        .fetch_optional(&self.pool)
        .await?;
        Ok(id)
    }

    /// Cancels a job: at once when it waits; a running one stops at its next
    /// seam. Cancelling a cancelled job changes nothing. `None`: no such job.
    pub async fn job_cancel(&self, tenant: Tenant, id: Uuid) -> Result<Option<JobRow>> {
        self.job_wish(tenant, id, Wish::Cancel).await
    }

    /// Pauses a job: it keeps its records and gives its device back. `None`: no such job.
    pub async fn job_pause(&self, tenant: Tenant, id: Uuid) -> Result<Option<JobRow>> {
        self.job_wish(tenant, id, Wish::Pause).await
    }

    /// Puts a paused job back into the queue. `None`: no such job.
    pub async fn job_resume(&self, tenant: Tenant, id: Uuid) -> Result<Option<JobRow>> {
        let mut tx = self.pool.begin().await?;
        let Some(mut job) = lock(&mut tx, tenant, id).await? else { return Ok(None) };
        if job.state != JobState::Queued {
            job.state = job.state.after(Change::Resume)?;
            write_state(&mut tx, &job, None).await?;
        }
        let job = lock(&mut tx, tenant, id).await?;
        tx.commit().await?;
        Ok(job)
    }

    async fn job_wish(&self, tenant: Tenant, id: Uuid, wish: Wish) -> Result<Option<JobRow>> {
        let (change, goal) = match wish {
            Wish::Cancel => (Change::RequestCancel, JobState::Cancelled),
            Wish::Pause => (Change::RequestPause, JobState::Paused),
        };
        let mut tx = self.pool.begin().await?;
        let Some(mut job) = lock(&mut tx, tenant, id).await? else { return Ok(None) };
        // Said before, or outdone by a wish to cancel: nothing to add.
        if job.state == goal || job.wish == Some(wish) || job.wish == Some(Wish::Cancel) {
            return Ok(Some(job));
        }
        let next = job.state.after(change)?;
        if next == JobState::Running {
            sqlx::query("update jobs set wish = $2 where id = $1")
                .bind(id)
                .bind(wish)
                .execute(&mut *tx)
                .await?;
            events::append(&mut tx, id, &[Entry::Job(JobEvent::WishNoted { wish })]).await?;
            signals::notify(&mut tx, signals::WISHED, &id.to_string()).await?;
        } else {
            job.state = next;
            write_state(&mut tx, &job, None).await?;
        }
        let job = lock(&mut tx, tenant, id).await?;
        tx.commit().await?;
        Ok(job)
    }

    /// Forgets a job and all its rows but that there was one. The caller sweeps its files.
    pub async fn job_delete(&self, tenant: Tenant, id: Uuid) -> Result<Deletion> {
        let mut tx = self.pool.begin().await?;
        let Some(job) = lock(&mut tx, tenant, id).await? else { return Ok(Deletion::Unknown) };
        if job.state == JobState::Running {
            return Ok(Deletion::Running);
        }
        sqlx::query("insert into tombstones (job_id, tenant_id) values ($1, $2)")
            .bind(id)
            .bind(tenant)
            .execute(&mut *tx)
            .await?;
        sqlx::query("delete from jobs where tenant_id = $1 and id = $2")
            .bind(tenant)
            .bind(id)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Deletion::Done)
    }

    /// Which of `ids` are jobs, over all tenants, that may still run, or may be
    /// tried again because they ended without success less than `keep` ago:
    /// their workspaces must stay.
    pub async fn workspaces_wanted(&self, ids: &[Uuid], keep: Duration) -> Result<Vec<Uuid>> {
        let ids = sqlx::query_scalar(
            "select id from jobs where id = any ($1) and (state in ('queued', 'running', 'paused')
               or (state in ('failed', 'cancelled') and finished_at > now() - make_interval(secs => $2)))",
        )
        .bind(ids)
        .bind(keep.as_secs_f64())
        .fetch_all(&self.pool)
        .await?;
        Ok(ids)
    }
}

/// Jobs of one tenant are put in one at a time, so that the bound on them holds.
const INSERT_LOCK: i32 = 7702;

async fn check_room(tx: &mut PgConnection, tenant: Tenant) -> Result<()> {
    let most: Option<i32> = sqlx::query_scalar("select max_queued from tenants where id = $1")
        .bind(tenant)
        .fetch_one(&mut *tx)
        .await?;
    let Some(most) = most else { return Ok(()) };
    sqlx::query("select pg_advisory_xact_lock($1, $2)")
        .bind(INSERT_LOCK)
        .bind(tenant)
        .execute(&mut *tx)
        .await?;
    let waiting: i64 =
        sqlx::query_scalar("select count(*) from jobs where tenant_id = $1 and state = 'queued'")
            .bind(tenant)
            .fetch_one(tx)
            .await?;
    if waiting < i64::from(most) { Ok(()) } else { Err(Error::QueueFull(most)) }
}

/// Puts in a job within the caller's transaction.
///
/// # Errors
/// [`Error::QueueFull`].
pub(super) async fn insert(tx: &mut PgConnection, tenant: Tenant, id: Uuid, job: &NewJob) -> Result<JobRow> {
    check_room(tx, tenant).await?;
    let JobSpec { deadlines, resources, .. } = &job.spec;
    let memory_bytes = resources.memory_bytes(job.plan.as_ref().map(|plan| plan.memory_bytes));
    sqlx::query(
        "insert into jobs (id, tenant_id, name, labels, spec, priority, retry_of, plan, max_queue_s, max_run_s,
           needs_labels, needs_memory_bytes, traceparent, asked_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
    )
    .bind(id)
    .bind(tenant)
    .bind(&job.spec.name)
    .bind(Json(&job.spec.labels))
    .bind(Json(&job.spec))
    .bind(job.spec.priority)
    .bind(job.retry_of)
    .bind(job.plan.as_ref().map(Json))
    .bind(deadlines.max_queue_s.map(i64::from))
    .bind(deadlines.max_run_s.map(i64::from))
    .bind(Json(&resources.labels))
    .bind(memory_bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)))
    .bind(&job.asked.traceparent)
    .bind(job.asked.at)
    .execute(&mut *tx)
    .await?;
    let row = lock(tx, tenant, id).await?.ok_or(sqlx::Error::RowNotFound)?;
    tell_state(tx, &row, None).await?;
    Ok(lock(tx, tenant, id).await?.ok_or(sqlx::Error::RowNotFound)?)
}

/// Reads a job and locks its row until the transaction ends.
pub(super) async fn lock(tx: &mut PgConnection, tenant: Tenant, id: Uuid) -> Result<Option<JobRow>> {
    let row = sqlx::query_as(
        "select j.*, l.progress from jobs j left join leases l on l.job_id = j.id
         where j.tenant_id = $1 and j.id = $2 for update of j",
    )
    .bind(tenant)
    .bind(id)
    .fetch_optional(tx)
    .await?;
    Ok(row)
}

/// Writes what a change of state touches: all that counts and times the job.
/// Every change of state ends a wish.
pub(super) async fn write_state(tx: &mut PgConnection, job: &JobRow, reason: Option<String>) -> Result<()> {
    sqlx::query(
        "update jobs set state = $2, wish = null, attempt = $3, crashes = $4, epoch = $5, run_after = $6,
           failure = $7,
           queued_at = case when $2 = 'queued' then now() else queued_at end,
           running_since = case when $2 = 'running' then now() end,
           run_seconds = run_seconds + case when state = 'running'
             then coalesce(extract(epoch from now() - running_since), 0) else 0 end,
           started_at = coalesce(started_at, case when $2 = 'running' then now() end),
           finished_at = case when $2 in ('succeeded', 'failed', 'cancelled') then now() end
         where id = $1",
    )
    .bind(job.id)
    .bind(job.state)
    .bind(job.attempt)
    .bind(job.crashes)
    .bind(job.epoch)
    .bind(job.run_after)
    .bind(job.failure.as_ref().map(Json))
    .execute(&mut *tx)
    .await?;
    tell_state(tx, job, reason).await
}

/// Tells of a job's new state: in its events, to workers, and to whoever else wants to hear.
async fn tell_state(tx: &mut PgConnection, job: &JobRow, reason: Option<String>) -> Result<()> {
    let changed = JobEvent::StateChanged { state: job.state, reason: reason.clone() };
    events::append(tx, job.id, &[Entry::Job(changed)]).await?;
    outbox::tell(tx, job, reason.as_deref()).await?;
    if job.state == JobState::Queued {
        signals::notify(tx, signals::QUEUED, "").await?;
    }
    Ok(())
}
