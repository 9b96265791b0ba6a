//! `/v1/plans`: what a job would take, without asking for it.

use axum::Json;
use axum::extract::{DefaultBodyLimit, Extension, State};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::admission::Admitted;
use super::auth::Caller;
use super::create::{MAX_SPEC_BYTES, admit, on_fastest};
use super::extract::JsonBody;
use super::problem::{Problem, ProblemBody};
use crate::job::placement::Resources;
use crate::job::plan::Plan;
use crate::job::progress::Stage;
use crate::job::spec::JobSpec;
use crate::service::db::WorkerRow;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(create).layer(DefaultBodyLimit::max(MAX_SPEC_BYTES)))
}

/// What a job would take, where, and when it would begin.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct JobPlan {
    /// Always `"plan"`.
    #[schema(example = "plan")]
    object: &'static str,
    /// On the fastest worker. Absent where the model is not at hand before the job runs.
    plan: Option<Plan>,
    /// Each worker and how the job fits it.
    workers: Vec<WorkerPlan>,
    /// Jobs that wait or run now, of all tenants.
    jobs_ahead: i64,
    /// When it would begin, if they take what they are reckoned to and share the workers.
    begins_in_s: Option<f64>,
    /// Stages that a job of yours has measured in the same way: on its machine they are not done again.
    reusable: Vec<Reusable>,
}

/// The job on one worker.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct WorkerPlan {
    id: Uuid,
    host: String,
    #[schema(example = "cpu")]
    device: String,
    busy: bool,
    /// It has what the job asks for in `resources`.
    eligible: bool,
    /// All its weights fit into the memory a job may work in; else they are streamed.
    fits_in_memory: Option<bool>,
    /// From its beginning to its end; absent where the worker's speed or the model is not known.
    seconds: Option<f64>,
}

/// A stage and the job that has done it.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct Reusable {
    stage: Stage,
    job_id: Uuid,
}

/// Reckons what a job would take, and makes none.
///
/// The spec is checked as when a job is created. Layers, parameters and bytes are
/// exact where the number of layers is given; times are estimates from the measured
/// speed of each worker.
#[utoipa::path(
    post, path = "/v1/plans", operation_id = "create_plan", tag = "jobs",
    request_body(content = JobSpec, example = json!({
        "model": {"from": "path", "path": "/models/SmolLM2-135M-Instruct"},
        "prune": {"amount": {"fraction": 0.2}},
    })),
    responses(
        (status = 200, description = "The plan", body = JobPlan),
        (status = 400, description = "Not JSON", body = ProblemBody),
        (status = 413, description = "Too large", body = ProblemBody),
        (status = 415, description = "Not declared as JSON", body = ProblemBody),
        (status = 422, description = "The spec cannot be run", body = ProblemBody),
    )
)]
async fn create(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JsonBody(body): JsonBody,
) -> Result<Json<JobPlan>, Problem> {
    let spec = JobSpec::read(body).map_err(Problem::spec)?;
    let Admitted { spec, plan } = admit(&state, tenant, spec).await?;
    let workers = state.database.workers().await?;
    let plan = on_fastest(plan, &workers);
    let (jobs_ahead, seconds_ahead) = state.database.queue().await?;
    let mut reusable = Vec::new();
    // What decides what is measured; where a job says nothing of it, both say the same nothing.
    for (stage, fields) in [
        (Stage::Profile, &["model", "calibration", "seed"][..]),
        (Stage::Select, &["model", "calibration", "seed", "prune", "heal"][..]),
    ] {
        let like = state.database.job_like(tenant, &spec, fields).await?;
        reusable.extend(like.map(|job_id| Reusable { stage, job_id }));
    }
    let begins_in_s = (!workers.is_empty()).then(|| seconds_ahead / workers.len() as f64);
    let workers = workers.into_iter().map(|row| on_worker(row, &spec.resources, plan.as_ref())).collect();
    Ok(Json(JobPlan { object: "plan", plan, workers, jobs_ahead, begins_in_s, reusable }))
}

fn on_worker(row: WorkerRow, resources: &Resources, plan: Option<&Plan>) -> WorkerPlan {
    let machine = row.machine();
    let seconds = plan.zip(machine).and_then(|(plan, machine)| plan.clone().on(machine).seconds());
    let memory = row.job_memory_bytes.or(row.memory_bytes).and_then(|bytes| u64::try_from(bytes).ok());
    let eligible = row.has(resources, plan.map(|plan| plan.memory_bytes));
    WorkerPlan {
        id: row.id,
        host: row.host,
        device: row.device,
        busy: row.job_id.is_some(),
        eligible,
        fits_in_memory: plan.zip(memory).map(|(plan, memory)| plan.memory_bytes <= memory),
        seconds,
    }
}
