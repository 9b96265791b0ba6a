//! What others were told of a job, and what they call it.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Extension, State};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::auth::Caller;
use super::extract::JobId;
use super::jobs::job_row;
use super::problem::{Problem, ProblemBody};
use super::webhooks::Delivery;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(sinks))
}

/// What others know of a job.
#[derive(Debug, Serialize, ToSchema)]
struct JobSinks {
    /// Always `"job_sinks"`.
    #[schema(example = "job_sinks")]
    object: &'static str,
    /// What it is called there: the run of `mlflow`, the version of its `mlflow-model`, the commit of the `hub`.
    known_as: BTreeMap<String, String>,
    /// What was to be told, newest first, with every try; messages that were done with are forgotten after a month.
    deliveries: Vec<Delivery>,
}

/// What webhooks, `MLflow`, the Hub and others were told of the job.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/sinks", operation_id = "job_sinks", tag = "results", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "Every message and every try", body = JobSinks),
        (status = 404, description = "No such job", body = ProblemBody),
    )
)]
async fn sinks(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Json<JobSinks>, Problem> {
    job_row(&state.database, tenant, id).await?;
    let rows = state.database.messages_of(tenant, id).await?;
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    let tries = state.database.deliveries(&ids).await?;
    let deliveries = rows.into_iter().map(|row| Delivery::new(row, &tries)).collect();
    let known_as = state.database.external_names(id).await?.into_iter().collect();
    Ok(Json(JobSinks { object: "job_sinks", known_as, deliveries }))
}
