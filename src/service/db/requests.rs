//! Requests that may come again, and what is left of jobs that are gone.

use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, JobRow, NewJob, Result, Tenant, jobs};

/// How a caller marks requests that are one and the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Once {
    /// The caller's word for the request; good for 24 hours.
    pub key: String,
    /// sha256 of what is asked.
    pub fingerprint: [u8; 32],
}

/// What became of a request that may have come before.
#[derive(Debug, Clone, PartialEq)]
pub enum Inserted<T> {
    New(T),
    /// It came before and made this.
    Before(Uuid),
    /// Its key stands for another request.
    Reused,
}

impl Database {
    /// Puts a job into the queue, unless the same request has done so before.
    /// Of requests that come at the same time all but one wait for that one.
    pub async fn job_insert_once(
        &self,
        tenant: Tenant,
        job: &NewJob,
        once: &Once,
    ) -> Result<Inserted<Box<JobRow>>> {
        let id = Uuid::now_v7();
        let mut tx = self.pool.begin().await?;
        if let Some(before) = take(&mut tx, tenant, once, id).await? {
            return Ok(before);
        }
        let row = jobs::insert(&mut tx, tenant, id, job).await?;
        tx.commit().await?;
        Ok(Inserted::New(Box::new(row)))
    }

    /// What the same request has made before; nothing when it is new.
    pub async fn inserted_before<T>(&self, tenant: Tenant, once: &Once) -> Result<Option<Inserted<T>>> {
        let mut connection = self.pool.acquire().await?;
        before(&mut connection, tenant, once).await
    }

    /// When a job of this id was deleted.
    pub async fn job_deleted_at(&self, tenant: Tenant, id: Uuid) -> Result<Option<OffsetDateTime>> {
        let at = sqlx::query_scalar("select deleted_at from tombstones where tenant_id = $1 and job_id = $2")
            .bind(tenant)
            .bind(id)
            .fetch_optional(&self.pool)
            .await?;
        Ok(at)
    }

    /// Forgets expired keys of requests, jobs that were deleted a quarter of a year ago, and old changes.
    pub async fn forget_old_requests(&self) -> Result<()> {
        self.forget_old_audit().await?;
        sqlx::query("delete from idempotency_keys where created_at < now() - interval '24 hours'")
            .execute(&self.pool)
            .await?;
        sqlx::query("delete from tombstones where deleted_at < now() - interval '90 days'")
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}

/// Lets the request make `id` within the caller's transaction, unless it has made something before.
pub(super) async fn take<T>(
    tx: &mut PgConnection,
    tenant: Tenant,
    once: &Once,
    id: Uuid,
) -> Result<Option<Inserted<T>>> {
    // A key that is expired but not yet swept is free again.
    let taken = sqlx::query(
        "insert into idempotency_keys as k (tenant_id, key, fingerprint, job_id) values ($1, $2, $3, $4)
         on conflict (tenant_id, key) do update
           set fingerprint = excluded.fingerprint, job_id = excluded.job_id, created_at = now()
           where k.created_at < now() - interval '24 hours'",
    )
    .bind(tenant)
    .bind(&once.key)
    .bind(&once.fingerprint[..])
    .bind(id)
    .execute(&mut *tx)
    .await?;
    if taken.rows_affected() > 0 {
        return Ok(None);
    }
    Ok(Some(before(tx, tenant, once).await?.unwrap_or(Inserted::Reused)))
}

async fn before<T>(
    connection: &mut PgConnection,
    tenant: Tenant,
    once: &Once,
) -> Result<Option<Inserted<T>>> {
    let row: Option<(Vec<u8>, Uuid)> = sqlx::query_as(
        "select fingerprint, job_id from idempotency_keys
         where tenant_id = $1 and key = $2 and created_at >= now() - interval '24 hours'",
    )
    .bind(tenant)
    .bind(&once.key)
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|(fingerprint, job)| match fingerprint == once.fingerprint {
        true => Inserted::Before(job),
        false => Inserted::Reused,
    }))
}
