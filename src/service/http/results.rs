//! What a job found: its stages, its series, its profile and its report.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::AppState;
use super::artifacts;
use super::auth::Caller;
use super::extract::{JobId, Pairs, parameter, prefers};
use super::job::Page;
use super::jobs::job_row;
use super::problem::{Code, Problem, ProblemBody};
use crate::job::progress::{Event, Stage};
use crate::job::report::{LayerProfile, Report};
use crate::service::db::{Entry, EventRow, StageRow};

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(stages))
        .routes(routes!(metrics))
        .routes(routes!(profile))
        .routes(routes!(report))
}

/// The stages that have begun, in their order.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/stages", operation_id = "job_stages", tag = "results", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The stages", body = Page<StageRow>),
        (status = 404, description = "No such job", body = ProblemBody),
    )
)]
async fn stages(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Json<Page<StageRow>>, Problem> {
    job_row(&state.database, tenant, id).await?;
    let rows = state.database.stages(tenant, id).await?;
    Ok(Json(Page::new(rows, false, |row| row.stage.to_string())))
}

/// One measured series, e.g. the loss by optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Series {
    pub stage: Stage,
    #[schema(example = "loss")]
    pub key: String,
    pub points: Vec<Point>,
}

/// One value of a series.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Point {
    pub step: u64,
    pub value: f64,
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
}

/// What was measured along the way, as series.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/metrics", operation_id = "job_series", tag = "results",
    params(
        ("id" = Uuid, Path),
        ("key" = Option<String>, Query, description = "Only the series of this name"),
        ("since_step" = Option<u64>, Query, description = "Only points from this step on"),
    ),
    responses(
        (status = 200, description = "The series", body = Page<Series>),
        (status = 400, description = "The query is wrong", body = ProblemBody),
        (status = 404, description = "No such job", body = ProblemBody),
    )
)]
async fn metrics(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    Pairs(query): Pairs,
) -> Result<Json<Page<Series>>, Problem> {
    let (mut key, mut since_step) = (None, 0);
    for (name, value) in query {
        match name.as_str() {
            "key" => key = Some(value),
            "since_step" => {
                // An int64 from 0 on, as the document has it.
                let step: i64 = parameter("since_step", &value)?;
                since_step = u64::try_from(step).or_else(|_| parameter("since_step", &value))?;
            }
            _ => return Err(Pairs::unknown(&name, "key, since_step")),
        }
    }
    job_row(&state.database, tenant, id).await?;
    let rows = state.database.series(tenant, id, key.as_deref()).await?;
    let series = gather(rows, since_step);
    Ok(Json(Page::new(series, false, |series| format!("{}/{}", series.stage, series.key))))
}

fn gather(rows: Vec<EventRow>, since_step: u64) -> Vec<Series> {
    let mut series: BTreeMap<(Stage, String), Vec<Point>> = BTreeMap::new();
    for EventRow { at, body, .. } in rows {
        if let Entry::Run(Event::Measured { stage, name, step, value }) = body
            && step >= since_step
        {
            series.entry((stage, name)).or_default().push(Point { step, value, at });
        }
    }
    series.into_iter().map(|((stage, key), points)| Series { stage, key, points }).collect()
}

/// How far every block of layers turns the residual stream.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/profile", operation_id = "job_profile", tag = "results", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The profile", body = LayerProfile),
        (status = 404, description = "No such job, or it has not got so far", body = ProblemBody),
    )
)]
async fn profile(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    job_row(&state.database, tenant, id).await?;
    let row = state.database.artifact(tenant, id, "profile.json").await?;
    let row = row.ok_or_else(|| not_ready("profile"))?;
    artifacts::answer(&state.store, row, &headers).await
}

/// The whole result, for programs as JSON and for people as HTML.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/report", operation_id = "job_report", tag = "results",
    params(("id" = Uuid, Path), ("Accept" = Option<String>, Header, description = "`application/json` or `text/html`")),
    responses(
        (status = 200, description = "The report", content((Report = "application/json"), (String = "text/html"))),
        (status = 404, description = "No such job, or it has not got so far", body = ProblemBody),
    )
)]
async fn report(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    job_row(&state.database, tenant, id).await?;
    let path = if prefers(&headers, "text/html", "application/json") { "report.html" } else { "report.json" };
    let row = state.database.artifact(tenant, id, path).await?.ok_or_else(|| not_ready("report"))?;
    let mut response = artifacts::answer(&state.store, row, &headers).await?;
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    Ok(response)
}

fn not_ready(what: &str) -> Problem {
    Problem::new(Code::ResultNotReady, format!("The job has no {what} yet."))
}
