//! Messages for others: written with what they tell, delivered at least once, each with one id and one body.

use std::time::Duration;

use serde_json::json;
use sqlx::PgConnection;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::{Database, JobRow, Result, Tenant, signals};

/// A message whose turn it is.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Message {
    pub id: Uuid,
    #[sqlx(rename = "tenant_id")]
    pub tenant: Tenant,
    pub sink: String,
    pub endpoint_id: Option<Uuid>,
    pub job_id: Option<Uuid>,
    pub kind: String,
    pub body: String,
    /// Tries that have begun, this one among them.
    pub attempts: i32,
}

/// A message and how its delivery stands.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct MessageRow {
    pub id: Uuid,
    pub sink: String,
    pub job_id: Option<Uuid>,
    pub kind: String,
    pub body: String,
    pub created_at: OffsetDateTime,
    pub attempts: i32,
    pub due_at: OffsetDateTime,
    pub delivered_at: Option<OffsetDateTime>,
    pub given_up_at: Option<OffsetDateTime>,
}

/// One try to deliver a message.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct DeliveryRow {
    pub message_id: Uuid,
    pub attempt: i32,
    pub at: OffsetDateTime,
    pub status: Option<i16>,
    pub error: Option<String>,
    pub duration_ms: i64,
}

/// What came of one try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// The HTTP status, when there was an answer.
    pub status: Option<u16>,
    /// Why it did not succeed; absent when it did.
    pub error: Option<String>,
    pub duration: Duration,
}

/// What waits for a sink.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct Backlog {
    pub sink: String,
    pub pending: i64,
    /// Age of the oldest.
    pub oldest_seconds: f64,
}

impl Database {
    /// The service delivers to `sink`: from now on messages are written for it.
    pub async fn sink_seen(&self, sink: &str) -> Result<()> {
        sqlx::query(
            "insert into sinks (name) values ($1) on conflict (name) do update set seen_at = now()
             where sinks.seen_at < now() - interval '1 minute'",
        )
        .bind(sink)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// At most `limit` messages whose turn it is, and few of one endpoint; none of those that are `busy`.
    /// Nobody else gets them within `lease`.
    pub async fn messages_due(
        &self,
        sink: &str,
        busy: &[Uuid],
        limit: i64,
        lease: Duration,
    ) -> Result<Vec<Message>> {
        let rows = sqlx::query_as(
            "with due as (
               select id, row_number() over (partition by sink, endpoint_id order by id) as place from outbox
               where due_at <= now() and coalesce(claimed_until <= now(), true)
                 and delivered_at is null and given_up_at is null and sink = $1
                 and (endpoint_id is null or endpoint_id <> all ($4))),
             mine as (
               select o.id from outbox o
               where o.id in (select id from due where place <= 4 order by place, id limit $2)
                 and o.due_at <= now() and coalesce(o.claimed_until <= now(), true)
                 and o.delivered_at is null and o.given_up_at is null
               for update skip locked)
             update outbox o set claimed_until = now() + make_interval(secs => $3), attempts = o.attempts + 1
             from mine where o.id = mine.id
             returning o.id, o.tenant_id, o.sink, o.endpoint_id, o.job_id, o.kind, o.body, o.attempts",
        )
        .bind(sink)
        .bind(limit)
        .bind(lease.as_secs_f64())
        .bind(busy)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// Keeps what came of a try. `again`: when to try once more, if at all.
    pub async fn message_tried(
        &self,
        message: &Message,
        tried: &Tried,
        again: Option<Duration>,
    ) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        sqlx::query(
            "insert into deliveries (message_id, attempt, status, error, duration_ms) values ($1, $2, $3, $4, $5)
             on conflict do nothing",
        )
        .bind(message.id)
        .bind(message.attempts)
        .bind(tried.status.map(|status| status as i16))
        .bind(&tried.error)
        .bind(tried.duration.as_millis() as i64)
        .execute(&mut *tx)
        .await?;
        // A try that comes late and failed does not undo what a later one does; one that succeeded has delivered.
        sqlx::query(
            "update outbox set
               delivered_at = case when $2 then clock_timestamp() end,
               given_up_at = case when not $2 and $3::float8 is null then clock_timestamp() end,
               due_at = case when $3::float8 is null then due_at else now() + make_interval(secs => $3) end,
               claimed_until = null
             where id = $1 and delivered_at is null and ($2 or attempts = $4)",
        )
        .bind(message.id)
        .bind(tried.error.is_none())
        .bind(again.map(|wait| wait.as_secs_f64()))
        .bind(message.attempts)
        .execute(&mut *tx)
        .await?;
        if tried.error.is_none() {
            // The receiver is there: what waits for it need not wait longer. The last tries keep their times, or one
            // message that is never taken would have used them up while others are.
            sqlx::query(
                "update outbox set due_at = now()
                 where sink = $1 and endpoint_id is not distinct from $2 and delivered_at is null
                   and given_up_at is null and claimed_until is null and attempts < 6
                   and due_at > now() + interval '1 minute'",
            )
            .bind(&message.sink)
            .bind(message.endpoint_id)
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        Ok(())
    }

    /// Puts a message for one endpoint into the outbox.
    pub async fn message_insert(
        &self,
        tenant: Tenant,
        id: Uuid,
        endpoint: Uuid,
        kind: &str,
        body: &str,
    ) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        sqlx::query(
            "insert into outbox (id, tenant_id, sink, endpoint_id, kind, body) values ($1, $2, 'webhook', $3, $4, $5)",
        )
        .bind(id)
        .bind(tenant)
        .bind(endpoint)
        .bind(kind)
        .bind(body)
        .execute(&mut *tx)
        .await?;
        knock(&mut tx).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Delivers a message once more, whatever came of it before. False when the endpoint has none of this id.
    pub async fn message_again(&self, tenant: Tenant, endpoint: Uuid, id: Uuid) -> Result<bool> {
        let mut tx = self.pool.begin().await?;
        let done = sqlx::query(
            "update outbox set delivered_at = null, given_up_at = null, due_at = now(), claimed_until = null
             where tenant_id = $1 and endpoint_id = $2 and id = $3",
        )
        .bind(tenant)
        .bind(endpoint)
        .bind(id)
        .execute(&mut *tx)
        .await?;
        knock(&mut tx).await?;
        tx.commit().await?;
        Ok(done.rows_affected() > 0)
    }

    /// The newest messages for an endpoint, at most `limit`, that are older than `after`.
    pub async fn messages(
        &self,
        tenant: Tenant,
        endpoint: Uuid,
        after: Option<Uuid>,
        limit: u32,
    ) -> Result<Vec<MessageRow>> {
        let rows = sqlx::query_as(
            "select * from outbox
             where tenant_id = $1 and endpoint_id = $2 and ($3::uuid is null or id < $3) order by id desc limit $4",
        )
        .bind(tenant)
        .bind(endpoint)
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// All messages about a job, newest first.
    pub async fn messages_of(&self, tenant: Tenant, job: Uuid) -> Result<Vec<MessageRow>> {
        let rows =
            sqlx::query_as("select * from outbox where tenant_id = $1 and job_id = $2 order by id desc")
                .bind(tenant)
                .bind(job)
                .fetch_all(&self.pool)
                .await?;
        Ok(rows)
    }

    /// All tries at these messages, oldest first.
    pub async fn deliveries(&self, messages: &[Uuid]) -> Result<Vec<DeliveryRow>> {
        let rows = sqlx::query_as(
            "select message_id, attempt, at, status, error, duration_ms from deliveries
             where message_id = any ($1) order by message_id, attempt",
        )
        .bind(messages)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// What waits for each sink, over all tenants: for the metrics.
    pub async fn backlog(&self) -> Result<Vec<Backlog>> {
        let rows = sqlx::query_as(
            "select s.name as sink, count(o.id) as pending,
               coalesce(extract(epoch from now() - min(o.created_at)), 0)::float8 as oldest_seconds
             from (select name from sinks union select 'webhook') s
             left join outbox o on o.sink = s.name and o.delivered_at is null and o.given_up_at is null
             group by s.name order by s.name",
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// Forgets messages that were done with thirty days ago.
    pub async fn forget_old_messages(&self) -> Result<()> {
        sqlx::query(
            "delete from outbox where coalesce(delivered_at, given_up_at) < now() - interval '30 days'",
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

impl Database {
    /// What `job` is called where it is told of, by sink.
    pub async fn external_names(&self, job: Uuid) -> Result<Vec<(String, String)>> {
        let names = sqlx::query_as("select sink, run_id from external_runs where job_id = $1 order by sink")
            .bind(job)
            .fetch_all(&self.pool)
            .await?;
        Ok(names)
    }

    /// What `job` is called at `sink`; `make` is asked the first time, and nobody else's `make` at the same time.
    pub async fn external_run<E, F>(
        &self,
        sink: &str,
        job: Uuid,
        make: impl FnOnce() -> F,
    ) -> Result<std::result::Result<String, E>>
    where
        F: Future<Output = std::result::Result<String, E>>,
    {
        let mut tx = self.pool.begin().await?;
        sqlx::query("select pg_advisory_xact_lock(hashtextextended($1, 0))")
            .bind(format!("{sink}/{job}"))
            .execute(&mut *tx)
            .await?;
        let known: Option<String> =
            sqlx::query_scalar("select run_id from external_runs where sink = $1 and job_id = $2")
                .bind(sink)
                .bind(job)
                .fetch_optional(&mut *tx)
                .await?;
        if let Some(run) = known {
            return Ok(Ok(run));
        }
        let run = match make().await {
            Ok(run) => run,
            Err(error) => return Ok(Err(error)),
        };
        sqlx::query("insert into external_runs (sink, job_id, run_id) values ($1, $2, $3)")
            .bind(sink)
            .bind(job)
            .bind(&run)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Ok(run))
    }
}

/// Wakes whoever drains: the outbox has news of no job.
async fn knock(tx: &mut PgConnection) -> Result<()> {
    signals::notify(tx, signals::TOLD, &Uuid::nil().to_string()).await
}

/// Who wants a message.
#[derive(sqlx::FromRow)]
struct Wanted {
    sink: String,
    endpoint_id: Option<Uuid>,
    format: String,
}

/// Writes messages of a job's new state, the newest event, within the transaction that changes it.
pub(super) async fn tell(tx: &mut PgConnection, job: &JobRow, reason: Option<&str>) -> Result<()> {
    let kind = format!("job.{}", job.state);
    let wanted: Vec<Wanted> = sqlx::query_as(
        "select 'webhook' as sink, id as endpoint_id, format from webhook_endpoints
         where tenant_id = $1 and (cardinality(events) = 0 or $2 = any (events))
         union all
         select name, null, 'standard' from sinks where seen_at > now() - interval '7 days'",
    )
    .bind(job.tenant)
    .bind(&kind)
    .fetch_all(&mut *tx)
    .await?;
    if wanted.is_empty() {
        return Ok(());
    }
    let seq: i64 = sqlx::query_scalar("select last_seq from jobs where id = $1")
        .bind(job.id)
        .fetch_one(&mut *tx)
        .await?;
    for Wanted { sink, endpoint_id, format } in wanted {
        let id = Uuid::now_v7();
        let data = json!({
            "job_id": job.id, "name": job.name, "labels": job.labels, "state": job.state, "attempt": job.attempt,
            "seq": seq, "reason": reason, "failure": job.failure, "url": format!("/v1/jobs/{}", job.id),
        });
        sqlx::query(
            "insert into outbox (id, tenant_id, sink, endpoint_id, job_id, kind, body)
             values ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(id)
        .bind(job.tenant)
        .bind(sink)
        .bind(endpoint_id)
        .bind(job.id)
        .bind(&kind)
        .bind(body(&format, id, &kind, data))
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// A message as it goes out: as Standard Webhooks advise, or as a `CloudEvent` (1.0, structured mode).
pub fn body(format: &str, id: Uuid, kind: &str, data: serde_json::Value) -> String {
    let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
    let message = if format == "cloudevents" {
        json!({
            "specversion": "1.0", "id": id, "source": "/v1/jobs", "type": format!("secateur.{kind}"), "time": now,
            "subject": data["job_id"], "datacontenttype": "application/json", "data": data,
        })
    } else {
        json!({"type": kind, "timestamp": now, "data": data})
    };
    message.to_string()
}
