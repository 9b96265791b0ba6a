//! Files that callers bring, in parts.

use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, Result, Tenant};

/// A file that a caller brings.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct UploadRow {
    pub id: Uuid,
    pub name: String,
    /// Key in the store.
    pub location: String,
    pub size_bytes: i64,
    /// What the whole must come to, hex.
    pub sha256: String,
    /// Of all parts but the last.
    pub part_size_bytes: i64,
    pub created_at: OffsetDateTime,
    /// When it proved to be whole and right.
    pub completed_at: Option<OffsetDateTime>,
}

/// A part that is written in full.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct UploadPart {
    /// From 1.
    pub number: i32,
    /// Hex.
    pub sha256: String,
}

/// What became of a wish to delete an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UploadDeletion {
    Done,
    /// This job has not ended and reads it.
    InUse(Uuid),
    Unknown,
}

impl UploadRow {
    pub fn part_count(&self) -> i64 {
        (self.size_bytes + self.part_size_bytes - 1) / self.part_size_bytes
    }
}

impl Database {
    /// Begins an upload, if the tenant's uploads then hold at most `most_bytes`. `false`: they would hold more.
    pub async fn upload_insert(&self, tenant: Tenant, upload: &UploadRow, most_bytes: i64) -> Result<bool> {
        let mut tx = self.pool.begin().await?;
        // One at a time per tenant: the sum must see those that begin at the same time.
        sqlx::query("select from tenants where id = $1 for update").bind(tenant).execute(&mut *tx).await?;
        let done = sqlx::query(
            "insert into uploads (id, tenant_id, name, location, size_bytes, sha256, part_size_bytes)
             select $1, $2, $3, $4, $5, $6, $7
             where $5 + (select coalesce(sum(size_bytes), 0) from uploads where tenant_id = $2) <= $8",
        )
        .bind(upload.id)
        .bind(tenant)
        .bind(&upload.name)
        .bind(&upload.location)
        .bind(upload.size_bytes)
        .bind(&upload.sha256)
        .bind(upload.part_size_bytes)
        .bind(most_bytes)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected() > 0)
    }

    pub async fn upload(&self, tenant: Tenant, id: Uuid) -> Result<Option<UploadRow>> {
        let row = sqlx::query_as("select * from uploads where tenant_id = $1 and id = $2")
            .bind(tenant)
            .bind(id)
            .fetch_optional(&self.pool)
            .await?;
        Ok(row)
    }

    /// The newest uploads of a tenant, at most `limit`, that are older than `after`.
    pub async fn uploads(&self, tenant: Tenant, after: Option<Uuid>, limit: u32) -> Result<Vec<UploadRow>> {
        let rows = sqlx::query_as(
            "select * from uploads where tenant_id = $1 and ($2::uuid is null or id < $2) order by id desc limit $3",
        )
        .bind(tenant)
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// The parts of an upload that are there, by number.
    pub async fn upload_parts(&self, tenant: Tenant, id: Uuid) -> Result<Vec<UploadPart>> {
        let rows = sqlx::query_as(
            "select p.number, p.sha256 from upload_parts p join uploads u on u.id = p.upload_id
             where u.tenant_id = $1 and u.id = $2 order by p.number",
        )
        .bind(tenant)
        .bind(id)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// A part is about to be written: until it is, it is not there. `false`: the upload is complete or gone.
    pub async fn upload_part_open(&self, tenant: Tenant, id: Uuid, number: i32) -> Result<bool> {
        let mut tx = self.pool.begin().await?;
        let open = sqlx::query(
            "select from uploads where tenant_id = $1 and id = $2 and completed_at is null for update",
        )
        .bind(tenant)
        .bind(id)
        .fetch_optional(&mut *tx)
        .await?;
        sqlx::query("delete from upload_parts where upload_id = $1 and number = $2 and $3")
            .bind(id)
            .bind(number)
            .bind(open.is_some())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(open.is_some())
    }

    /// A part is written. `false`: the upload is complete or gone.
    pub async fn upload_part_put(&self, tenant: Tenant, id: Uuid, part: &UploadPart) -> Result<bool> {
        let done = sqlx::query(
            "insert into upload_parts (upload_id, number, sha256)
             select id, $3, $4 from uploads where tenant_id = $1 and id = $2 and completed_at is null for update
             on conflict (upload_id, number) do update set sha256 = excluded.sha256",
        )
        .bind(tenant)
        .bind(id)
        .bind(part.number)
        .bind(&part.sha256)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// The upload is whole and right: nothing changes it any more.
    pub async fn upload_complete(&self, tenant: Tenant, id: Uuid) -> Result<Option<UploadRow>> {
        let row = sqlx::query_as(
            "update uploads set completed_at = coalesce(completed_at, now())
             where tenant_id = $1 and id = $2 returning *",
        )
        .bind(tenant)
        .bind(id)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row)
    }

    /// Forgets an upload, unless a job that has not ended reads it. The caller removes the file.
    pub async fn upload_delete(&self, tenant: Tenant, id: Uuid) -> Result<UploadDeletion> {
        let reader: Option<Uuid> = sqlx::query_scalar(
            "select id from jobs where tenant_id = $1 and state in ('queued', 'running', 'paused')
               and jsonb_path_exists(spec, '$.** ? (@.upload_id == $id)', jsonb_build_object('id', $2::text))
             limit 1",
        )
        .bind(tenant)
        .bind(id.to_string())
        .fetch_optional(&self.pool)
        .await?;
        if let Some(job) = reader {
            return Ok(UploadDeletion::InUse(job));
        }
        let done = sqlx::query("delete from uploads where tenant_id = $1 and id = $2")
            .bind(tenant)
            .bind(id)
            .execute(&self.pool)
            .await?;
        Ok(if done.rows_affected() > 0 { UploadDeletion::Done } else { UploadDeletion::Unknown })
    }

    /// Forgets uploads of all tenants that were begun a day ago and never completed.
    pub async fn forget_stale_uploads(&self) -> Result<()> {
        sqlx::query(
            "delete from uploads where completed_at is null and created_at < now() - interval '1 day'",
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Which of these uploads there are, over all tenants: their files must stay.
    pub async fn uploads_wanted(&self, ids: &[Uuid]) -> Result<Vec<Uuid>> {
        let ids = sqlx::query_scalar("select id from uploads where id = any ($1)")
            .bind(ids)
            .fetch_all(&self.pool)
            .await?;
        Ok(ids)
    }
}
