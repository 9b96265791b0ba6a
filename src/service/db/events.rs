//! What happened to a job, numbered without gaps.

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Database, Result, Tenant, signals};
use crate::job::progress::Event;
use crate::job::state::{JobState, Wish};

/// What the service itself has to tell of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum JobEvent {
    /// The job stands differently now.
    StateChanged {
        state: JobState,
        /// Why, for a person.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// The user wants something of the running job.
    WishNoted { wish: Wish },
}

/// One entry of a job's log: a word of the run or of the service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Entry {
    Run(Event),
    Job(JobEvent),
}

/// An event as it is kept and shown.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow, ToSchema)]
pub struct EventRow {
    /// From 1, without gaps, per job.
    pub seq: i64,
    pub attempt: i32,
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    #[sqlx(json)]
    #[serde(flatten)]
    pub body: Entry,
}

impl Database {
    /// At most `limit` events of a job that come after number `seq`, oldest first. `kinds`: those that are wanted,
    /// by their word in `event`; all when there are none.
    pub async fn events_after(
        &self,
        tenant: Tenant,
        job: Uuid,
        seq: i64,
        kinds: &[String],
        limit: u32,
    ) -> Result<Vec<EventRow>> {
        let rows = sqlx::query_as(
            "select seq, attempt, at, body from events
             where tenant_id = $1 and job_id = $2 and seq > $3
               and (cardinality($4::text[]) = 0 or body->>'event' = any ($4))
             order by seq limit $5",
        )
        .bind(tenant)
        .bind(job)
        .bind(seq)
        .bind(kinds)
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// All values of one series of a job, in the order of their steps. A step
    /// that was computed twice, by two attempts, counts once.
    pub async fn series(&self, tenant: Tenant, job: Uuid, name: Option<&str>) -> Result<Vec<EventRow>> {
        let rows = sqlx::query_as(
            "select distinct on (body->>'stage', body->>'name', (body->>'step')::bigint) seq, attempt, at, body
             from events
             where tenant_id = $1 and job_id = $2 and body->>'event' = 'measured'
               and ($3::text is null or body->>'name' = $3)
             order by body->>'stage', body->>'name', (body->>'step')::bigint, seq desc",
        )
        .bind(tenant)
        .bind(job)
        .bind(name)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }
}

/// Numbers and keeps `entries`. The lock on the job's row makes the numbers gap-free.
pub(super) async fn append(tx: &mut PgConnection, job: Uuid, entries: &[Entry]) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let bodies: Vec<Json<&Entry>> = entries.iter().map(Json).collect();
    sqlx::query(
        "with head as (
           update jobs set last_seq = last_seq + $2 where id = $1
           returning tenant_id, last_seq - $2 as seq, epoch, attempt)
         insert into events (job_id, seq, tenant_id, epoch, attempt, body)
         select $1, head.seq + e.place, head.tenant_id, head.epoch, head.attempt, e.body
         from head, unnest($3::jsonb[]) with ordinality as e (body, place)",
    )
    .bind(job)
    .bind(entries.len() as i64)
    .bind(bodies)
    .execute(&mut *tx)
    .await?;
    signals::notify(tx, signals::TOLD, &job.to_string()).await
}
