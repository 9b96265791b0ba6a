//! Who can run jobs.

use std::collections::BTreeMap;

use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, Result, Tenant};
use crate::job::placement::Resources;
use crate::job::plan::Machine;

/// A worker as its peers see it. Workers serve all tenants.
#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
pub struct WorkerRow {
    pub id: Uuid,
    pub host: String,
    pub pid: i32,
    pub device: String,
    pub version: String,
    pub started_at: OffsetDateTime,
    pub seen_at: OffsetDateTime,
    /// Of its machine.
    pub core_count: Option<i32>,
    pub memory_bytes: Option<i64>,
    /// That a job may work in.
    pub job_memory_bytes: Option<i64>,
    /// What it was started with; jobs may ask for them.
    #[sqlx(json)]
    pub labels: BTreeMap<String, String>,
    /// What its device does.
    pub flops_per_s: Option<f64>,
    pub bytes_per_s: Option<f64>,
    /// The job it works on, and whose that is.
    pub job_id: Option<Uuid>,
    pub job_tenant: Option<Tenant>,
}

impl WorkerRow {
    /// What its device does, where it has measured that.
    pub fn machine(&self) -> Option<Machine> {
        let (flops_per_s, bytes_per_s) = self.flops_per_s.zip(self.bytes_per_s)?;
        Some(Machine { flops_per_s, bytes_per_s })
    }

    /// Whether it has what a job asks for: what a claim asks of it.
    pub fn has(&self, resources: &Resources, planned_bytes: Option<u64>) -> bool {
        let labels = resources.labels.iter().all(|(key, value)| self.labels.get(key) == Some(value));
        let memory = resources.memory_bytes(planned_bytes).is_none_or(|needed| {
            self.job_memory_bytes.is_some_and(|bytes| u64::try_from(bytes).is_ok_and(|bytes| needed <= bytes))
        });
        labels && memory
    }
}

/// What a worker says of itself.
#[derive(Debug, Clone)]
pub struct WorkerSelf {
    pub id: Uuid,
    pub host: String,
    pub pid: i32,
    pub device: String,
    pub version: String,
    /// Of its machine.
    pub core_count: i32,
    pub memory_bytes: i64,
    /// That a job may work in.
    pub job_memory_bytes: i64,
    /// Jobs may ask for them.
    pub labels: BTreeMap<String, String>,
}

impl Database {
    /// A worker has started.
    pub async fn worker_started(&self, me: &WorkerSelf) -> Result<()> {
        sqlx::query(
            "insert into workers (id, host, pid, device, version, core_count, memory_bytes, job_memory_bytes, labels)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
             on conflict (id) do update set host = excluded.host, pid = excluded.pid, device = excluded.device,
               version = excluded.version, core_count = excluded.core_count,
               memory_bytes = excluded.memory_bytes, job_memory_bytes = excluded.job_memory_bytes,
               labels = excluded.labels, started_at = now(), seen_at = now()",
        )
        .bind(me.id)
        .bind(&me.host)
        .bind(me.pid)
        .bind(&me.device)
        .bind(&me.version)
        .bind(me.core_count)
        .bind(me.memory_bytes)
        .bind(me.job_memory_bytes)
        .bind(Json(&me.labels))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The worker has measured its device.
    pub async fn worker_measured(&self, id: Uuid, machine: Machine) -> Result<()> {
        sqlx::query("update workers set flops_per_s = $2, bytes_per_s = $3 where id = $1")
            .bind(id)
            .bind(machine.flops_per_s)
            .bind(machine.bytes_per_s)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// The worker is still there.
    pub async fn worker_seen(&self, id: Uuid) -> Result<()> {
        sqlx::query("update workers set seen_at = now() where id = $1").bind(id).execute(&self.pool).await?;
        Ok(())
    }

    /// The worker has left in order.
    pub async fn worker_left(&self, id: Uuid) -> Result<()> {
        sqlx::query("delete from workers where id = $1").bind(id).execute(&self.pool).await?;
        Ok(())
    }

    /// The workers seen within the last five minutes, the longest serving first.
    pub async fn workers(&self) -> Result<Vec<WorkerRow>> {
        let rows = sqlx::query_as(
            "select w.*, l.job_id, l.tenant_id as job_tenant from workers w left join leases l on l.worker_id = w.id
             where w.seen_at > now() - interval '5 minutes' order by w.started_at, w.id",
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }
}
