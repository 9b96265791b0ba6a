//! `/v1/sweeps`: many jobs asked for at once, and what came out of them side by side.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{DefaultBodyLimit, Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::admission::Admitted;
use super::auth::Caller;
use super::create::{MAX_SPEC_BYTES, REPLAYED, admit, on_fastest, once, reused, traceparent};
use super::extract::{JobId, JsonBody, Newest, prefers};
use super::job::Page;
use super::problem::{Code, Problem, ProblemBody};
use crate::job::complaint::Complaint;
use crate::job::report::{Report, Scores};
use crate::job::state::JobState;
use crate::job::sweep::{Child, Outcome, SweepReport, SweepSpec, mark_front};
use crate::report::sweep::page;
use crate::service::db::{Asked, Error, Inserted, NewJob, SweepJob, SweepRow, Tenant};

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create).layer(DefaultBodyLimit::max(MAX_SPEC_BYTES)))
        .routes(routes!(list))
        .routes(routes!(get))
        .routes(routes!(report))
        .routes(routes!(cancel))
}

/// A sweep as it stands, without its spec.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SweepSummary {
    /// Always `"sweep"`.
    #[schema(example = "sweep")]
    pub object: &'static str,
    pub id: Uuid,
    pub name: Option<String>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// How many of its jobs are in each state; `deleted` counts those that are gone.
    pub counts: BTreeMap<String, u64>,
    /// No job of it will change any more.
    pub done: bool,
    pub links: SweepLinks,
}

/// Where the sweep's other resources are.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SweepLinks {
    #[serde(rename = "self")]
    pub this: String,
    pub report: String,
}

/// A sweep with its jobs and all that is known of them.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Sweep {
    #[serde(flatten)]
    pub summary: SweepSummary,
    /// In the order of the report's rows.
    pub jobs: Vec<SweepMember>,
    /// The results so far.
    pub report: SweepReport,
}

/// One job of a sweep.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SweepMember {
    pub name: String,
    /// Absent when the job was deleted.
    pub job_id: Option<Uuid>,
    pub state: Option<JobState>,
}

/// Asks for many pruned models at once.
///
/// A job spec (`base`) and `axes` along which it varies: a job for every
/// combination. They are jobs like any others; what they have in common (the
/// profile, the base model's scores) is measured once where one worker runs them.
/// `Idempotency-Key` works as when a job is created.
#[utoipa::path(
    post, path = "/v1/sweeps", operation_id = "create_sweep", tag = "sweeps",
    params(("Idempotency-Key" = Option<String>, Header, description = "As when a job is created")),
    request_body(content = SweepSpec, example = json!({
        "name": "how much can go",
        "base": {"model": {"from": "path", "path": "/models/SmolLM2-135M-Instruct"}, "prune": {"strategy": "block_endpoint"}},
        "axes": {
            "layers": {"from": 3, "to": 12, "step": 3},
            "heal": [{"name": "plain", "methods": []}, {"name": "qlora", "methods": [{"method": "qlora", "corpus": {"from": "model"}}]}],
        },
        "max_parallel": 2,
    })),
    responses(
        (status = 201, description = "Created, now or by the same request before", body = Sweep, headers(
            ("Location" = String, description = "The sweep"),
            ("Idempotency-Replayed" = String, description = "`true`: the sweep was there already"),
        )),
        (status = 400, description = "Not JSON, or a header that cannot be read", body = ProblemBody),
        (status = 413, description = "Too large", body = ProblemBody),
        (status = 415, description = "Not declared as JSON", body = ProblemBody),
        (status = 422, description = "A job of it cannot be run, or the key stands for another request", body = ProblemBody),
    )
)]
async fn create(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let (spec, children) = SweepSpec::read(body).map_err(Problem::spec)?;
    let asked = serde_json::to_vec(&spec).map_err(Problem::internal)?;
    let once = once(&headers, &[b"sweep", &asked])?;
    let before = match &once {
        Some(once) => state.database.inserted_before(tenant, once).await?,
        None => None,
    };
    let inserted = match before {
        Some(before) => before,
        None => {
            let mut jobs = admitted(&state, tenant, children).await?;
            let asked = Asked { traceparent: traceparent(&headers), at: None };
            jobs.iter_mut().for_each(|job| job.asked = asked.clone());
            state.database.sweep_insert(tenant, &spec, &jobs, once.as_ref()).await?
        }
    };
    let (id, replayed) = match inserted {
        Inserted::New(id) => (id, false),
        Inserted::Before(id) => (id, true),
        Inserted::Reused => return Err(reused()),
    };
    let sweep = shown(&state, sweep_row(&state, tenant, id).await?).await?;
    let location = [(header::LOCATION, sweep.summary.links.this.clone())];
    let mut response = (StatusCode::CREATED, location, Json(sweep)).into_response();
    if replayed {
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// Sweeps, newest first.
#[utoipa::path(
    get, path = "/v1/sweeps", operation_id = "list_sweeps", tag = "sweeps",
    params(
        ("limit" = Option<u32>, Query, description = "Sweeps per page, 1 to 100; 20 if not given"),
        ("after" = Option<Uuid>, Query, description = "`last_id` of the page before: the sweeps older than it"),
    ),
    responses(
        (status = 200, description = "A page", body = Page<SweepSummary>),
        (status = 400, description = "The query is wrong", body = ProblemBody),
    )
)]
async fn list(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Newest { size, after }: Newest,
) -> Result<Json<Page<SweepSummary>>, Problem> {
    let (rows, more) = state.database.sweep_list(tenant, after, size).await?;
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    let states = state.database.sweep_states(tenant, &ids).await?;
    let summary = |row: &SweepRow| {
        let own = states.iter().filter(|(id, ..)| *id == row.id);
        summary(row, own.map(|(_, state, count)| (*state, *count as u64)))
    };
    let sweeps = rows.iter().map(summary).collect();
    Ok(Json(Page::new(sweeps, more, |sweep| sweep.id.to_string())))
}

/// One sweep, its jobs and the results so far.
#[utoipa::path(
    get, path = "/v1/sweeps/{id}", operation_id = "get_sweep", tag = "sweeps", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The sweep as it stands", body = Sweep),
        (status = 404, description = "No such sweep", body = ProblemBody),
    )
)]
async fn get(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Json<Sweep>, Problem> {
    Ok(Json(shown(&state, sweep_row(&state, tenant, id).await?).await?))
}

/// The results so far, for programs as JSON and for people as HTML.
#[utoipa::path(
    get, path = "/v1/sweeps/{id}/report", operation_id = "sweep_report", tag = "sweeps",
    params(("id" = Uuid, Path), ("Accept" = Option<String>, Header, description = "`application/json` or `text/html`")),
    responses(
        (status = 200, description = "The report", content((SweepReport = "application/json"), (String = "text/html"))),
        (status = 404, description = "No such sweep", body = ProblemBody),
    )
)]
async fn report(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let sweep = shown(&state, sweep_row(&state, tenant, id).await?).await?;
    let mut response = if prefers(&headers, "text/html", "application/json") {
        Html(page(&sweep.report)).into_response()
    } else {
        Json(sweep.report).into_response()
    };
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    Ok(response)
}

/// Cancels every job of the sweep that has not ended.
///
/// Asking twice is asking once. What is done stays.
#[utoipa::path(
    post, path = "/v1/sweeps/{id}/cancel", operation_id = "cancel_sweep", tag = "sweeps", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The sweep as it stands now", body = Sweep),
        (status = 404, description = "No such sweep", body = ProblemBody),
    )
)]
async fn cancel(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Json<Sweep>, Problem> {
    let row = sweep_row(&state, tenant, id).await?;
    for job in state.database.sweep_jobs(tenant, id).await? {
        let (Some(job_id), Some(false)) = (job.job_id, job.state.map(JobState::is_terminal)) else {
            continue;
        };
        match state.database.job_cancel(tenant, job_id).await {
            // It ended in this very moment.
            Ok(_) | Err(Error::Illegal(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Json(shown(&state, row).await?))
}

/// The jobs as they go into the queue. All that is wrong with any is said at once, and each thing once.
async fn admitted(state: &AppState, tenant: Tenant, children: Vec<Child>) -> Result<Vec<NewJob>, Problem> {
    // Asked once: a sweep may have hundreds of jobs.
    let workers = state.database.workers().await?;
    let (mut jobs, mut wrong) = (Vec::with_capacity(children.len()), Vec::<Complaint>::new());
    for child in children {
        match admit(state, tenant, child.spec).await {
            Ok(Admitted { spec, plan }) => {
                let plan = on_fastest(plan, &workers);
                jobs.push(NewJob { plan, ..NewJob::new(spec) });
            }
            Err(problem) => {
                let below = |c: Complaint| Complaint { pointer: format!("/base{}", c.pointer), ..c };
                let new = problem.complaints()?.into_iter().map(below);
                wrong.extend(new.filter(|c| !wrong.contains(c)).collect::<Vec<_>>());
            }
        }
    }
    if wrong.is_empty() { Ok(jobs) } else { Err(Problem::spec(wrong)) }
}

async fn sweep_row(state: &AppState, tenant: Tenant, id: Uuid) -> Result<SweepRow, Problem> {
    let row = state.database.sweep(tenant, id).await?;
    row.ok_or_else(|| Problem::new(Code::SweepNotFound, format!("There is no sweep {id}.")))
}

/// `states` are those of its jobs, and how many are in each; a deleted job has none.
fn summary(row: &SweepRow, states: impl Iterator<Item = (Option<JobState>, u64)>) -> SweepSummary {
    let (mut counts, mut done) = (BTreeMap::new(), true);
    for (state, count) in states {
        done &= state.is_none_or(JobState::is_terminal);
        *counts.entry(state.map_or("deleted", JobState::name).to_owned()).or_insert(0) += count;
    }
    let this = format!("/v1/sweeps/{}", row.id);
    SweepSummary {
        object: "sweep",
        id: row.id,
        name: row.name.clone(),
        created_at: row.created_at,
        counts,
        done,
        links: SweepLinks { report: format!("{this}/report"), this },
    }
}

/// The sweep with what its jobs came to. Reports of jobs that are new since the last look are read once.
async fn shown(state: &AppState, row: SweepRow) -> Result<Sweep, Problem> {
    let mut jobs = state.database.sweep_jobs(row.tenant, row.id).await?;
    let mut base = row.base.clone();
    for job in &mut jobs {
        let (Some(JobState::Succeeded), Some(id), None) = (job.state, job.job_id, &job.outcome) else {
            continue;
        };
        let Some(found) = job_report(state, row.tenant, id).await? else { continue };
        let outcome = Outcome::of(&found);
        // What it wrote fills pages, may hold what the database does not take (NUL), and stands in the job's report.
        let scores = Scores { generation: None, ..found.eval.base };
        state.database.sweep_note(row.tenant, row.id, job.position, &outcome, &scores).await?;
        job.outcome = Some(outcome);
        base.get_or_insert(scores);
    }
    let summary = summary(&row, jobs.iter().map(|job| (job.state, 1)));
    let children = row.spec.children();
    let mut report = SweepReport { base, ..SweepReport::new(row.spec, &children) };
    for (own, job) in report.rows.iter_mut().zip(&jobs) {
        own.outcome.clone_from(&job.outcome);
        let failed = matches!(job.state, Some(JobState::Failed));
        own.failure = job.failure.clone().filter(|_| failed);
    }
    mark_front(&mut report.rows);
    let member = |(child, job): (Child, SweepJob)| SweepMember {
        name: child.name,
        job_id: job.job_id,
        state: job.state,
    };
    let jobs = children.into_iter().zip(jobs).map(member).collect();
    Ok(Sweep { summary, jobs, report })
}

/// The report a job has left.
async fn job_report(state: &AppState, tenant: Tenant, id: Uuid) -> Result<Option<Report>, Problem> {
    let Some(row) = state.database.artifact(tenant, id, "report.json").await? else { return Ok(None) };
    let bytes = state.store.bytes(&row.location, row.size_bytes as u64).await.map_err(Problem::internal)?;
    // One of another version is left out.
    Ok(serde_json::from_slice(&bytes).ok())
}
