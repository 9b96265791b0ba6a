//! Who can run jobs, and on what.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Extension, State};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::AppState;
use super::auth::Caller;
use super::job::Page;
use super::problem::{Problem, ProblemBody};
use crate::service::db::{Tenant, WorkerRow};

/// A worker and the device it computes on. Workers serve all tenants.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Worker {
    /// Always `"worker"`.
    #[schema(example = "worker")]
    object: &'static str,
    id: Uuid,
    host: String,
    #[schema(example = "cpu")]
    device: String,
    /// Of its machine; absent when the worker is older than this service.
    core_count: Option<i32>,
    memory_bytes: Option<i64>,
    /// Of that, what a job may work in.
    job_memory_bytes: Option<i64>,
    /// What it was started with: jobs may ask for them in `resources.labels`.
    labels: BTreeMap<String, String>,
    /// What its device does in a second: operations of products with many rows; absent where it could not be measured.
    flops_per_s: Option<f64>,
    /// The same in bytes of weights, for products with one row.
    bytes_per_s: Option<f64>,
    version: String,
    /// It works on a job, whoever owns that.
    busy: bool,
    /// The job, when it is yours.
    job_id: Option<Uuid>,
    #[serde(with = "time::serde::rfc3339")]
    started_at: OffsetDateTime,
    /// Its last sign of life.
    #[serde(with = "time::serde::rfc3339")]
    seen_at: OffsetDateTime,
}

impl Worker {
    fn new(row: WorkerRow, tenant: Tenant) -> Self {
        Self {
            object: "worker",
            id: row.id,
            host: row.host,
            device: row.device,
            core_count: row.core_count,
            memory_bytes: row.memory_bytes,
            job_memory_bytes: row.job_memory_bytes,
            labels: row.labels,
            flops_per_s: row.flops_per_s,
            bytes_per_s: row.bytes_per_s,
            version: row.version,
            busy: row.job_id.is_some(),
            job_id: row.job_id.filter(|_| row.job_tenant == Some(tenant)),
            started_at: row.started_at,
            seen_at: row.seen_at,
        }
    }
}

/// The workers heard of within the last five minutes, the longest serving first.
#[utoipa::path(
    get, path = "/v1/workers", operation_id = "list_workers", tag = "workers",
    responses(
        (status = 200, description = "The workers", body = Page<Worker>),
        (status = 503, description = "The database does not answer", body = ProblemBody),
    )
)]
pub async fn list(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
) -> Result<Json<Page<Worker>>, Problem> {
    let workers = state.database.workers().await?.into_iter().map(|row| Worker::new(row, tenant)).collect();
    Ok(Json(Page::new(workers, false, |worker| worker.id.to_string())))
}
