//! The files a job left.

use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, Result, Tenant};

/// A file in the store that a job left.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct ArtifactRow {
    /// Relative, as in the workspace: `healed/config.json`.
    pub path: String,
    /// Hex.
    pub sha256: String,
    pub size_bytes: i64,
    /// The epoch of the attempt that made it.
    pub epoch: i64,
    /// Key in the store.
    pub location: String,
    pub created_at: OffsetDateTime,
}

/// The checkpoints a job may leave, the better one first.
const CHECKPOINTS: [&str; 2] = ["healed/", "pruned/"];

/// The files of the best checkpoint among what a job has left, by their paths within it.
pub fn best_checkpoint(files: &[ArtifactRow]) -> Vec<(&str, &ArtifactRow)> {
    let is_there = |directory: &&str| files.iter().any(|f| f.path == format!("{directory}config.json"));
    let best = CHECKPOINTS.into_iter().find(is_there);
    files.iter().filter_map(|file| Some((file.path.strip_prefix(best?)?, file))).collect()
}

/// A stored file that awaits the commit that makes it visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewArtifact {
    pub path: String,
    pub sha256: String,
    pub size_bytes: u64,
    pub location: String,
}

impl Database {
    /// All files of a job, by path.
    pub async fn artifacts(&self, tenant: Tenant, job: Uuid) -> Result<Vec<ArtifactRow>> {
        let rows = sqlx::query_as(
            "select path, sha256, size_bytes, epoch, location, created_at from artifacts
             where tenant_id = $1 and job_id = $2 order by path",
        )
        .bind(tenant)
        .bind(job)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// The file of a job at `path`.
    pub async fn artifact(&self, tenant: Tenant, job: Uuid, path: &str) -> Result<Option<ArtifactRow>> {
        let row = sqlx::query_as(
            "select path, sha256, size_bytes, epoch, location, created_at from artifacts
             where tenant_id = $1 and job_id = $2 and path = $3",
        )
        .bind(tenant)
        .bind(job)
        .bind(path)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row)
    }

    /// Which of these attempts, over all tenants, have visible files or still
    /// hold their lease: their files in the store must stay.
    pub async fn epochs_wanted(&self, epochs: &[(Uuid, i64)]) -> Result<Vec<(Uuid, i64)>> {
        let (jobs, numbers): (Vec<Uuid>, Vec<i64>) = epochs.iter().copied().unzip();
        let wanted = sqlx::query_as(
            "select f.job_id, f.epoch from unnest($1::uuid[], $2::bigint[]) as f (job_id, epoch)
             where exists (select from artifacts a where a.job_id = f.job_id and a.epoch = f.epoch)
                or exists (select from leases l where l.job_id = f.job_id and l.epoch = f.epoch)",
        )
        .bind(jobs)
        .bind(numbers)
        .fetch_all(&self.pool)
        .await?;
        Ok(wanted)
    }
}

/// Makes stored files visible, within the transaction that ends the job.
pub(super) async fn insert(tx: &mut PgConnection, job: Uuid, files: &[NewArtifact]) -> Result<()> {
    let paths: Vec<&str> = files.iter().map(|f| f.path.as_str()).collect();
    let digests: Vec<&str> = files.iter().map(|f| f.sha256.as_str()).collect();
    let sizes: Vec<i64> = files.iter().map(|f| f.size_bytes as i64).collect();
    let locations: Vec<&str> = files.iter().map(|f| f.location.as_str()).collect();
    sqlx::query(
        "insert into artifacts (job_id, path, tenant_id, epoch, location, sha256, size_bytes)
         select j.id, f.path, j.tenant_id, j.epoch, f.location, f.sha256, f.size_bytes
         from jobs j, unnest($2::text[], $3::text[], $4::bigint[], $5::text[])
           as f (path, sha256, size_bytes, location)
         where j.id = $1",
    )
    .bind(job)
    .bind(paths)
    .bind(digests)
    .bind(sizes)
    .bind(locations)
    .execute(tx)
    .await?;
    Ok(())
}
