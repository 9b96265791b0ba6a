//! `/v1/jobs`: ask for a pruned model, look, change your mind.

use axum::Json;
use axum::extract::{DefaultBodyLimit, Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::admission;
use super::auth::Caller;
use super::extract::{JobId, JsonBody, Pairs, limit, parameter};
use super::job::{Job, JobSummary, Page};
use super::problem::{Code, Problem, ProblemBody};
use crate::job::complaint::Complaint;
use crate::job::spec::{JobSpec, ModelSource};
use crate::job::state::JobState;
use crate::service::db::{Database, Deletion, JobFilter, JobRow, NewJob, Tenant};
use crate::service::store::job_prefix;

/// Enough for a spec that brings its text (at most 8 MiB each) along.
const MAX_SPEC_BYTES: usize = 16 << 20;
const DEFAULT_PAGE: u32 = 20;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create).layer(DefaultBodyLimit::max(MAX_SPEC_BYTES)))
        .routes(routes!(list))
        .routes(routes!(get, delete))
        .routes(routes!(cancel))
        .routes(routes!(pause))
        .routes(routes!(resume))
}

pub fn no_job(id: Uuid) -> Problem {
    Problem::new(Code::JobNotFound, format!("There is no job {id}."))
}

/// The row of a job that must be there.
pub async fn job_row(database: &Database, tenant: Tenant, id: Uuid) -> Result<JobRow, Problem> {
    database.job(tenant, id).await?.ok_or_else(|| no_job(id))
}

async fn shown(database: &Database, row: JobRow) -> Result<Job, Problem> {
    let stages = database.stages(row.tenant, row.id).await?;
    let ahead = database.jobs_ahead(row.tenant, row.id).await?;
    Ok(Job::new(row, stages, ahead))
}

fn tagged(job: &Job) -> Response {
    let mut response = Json(job).into_response();
    if let Ok(tag) = HeaderValue::from_str(&job.etag()) {
        response.headers_mut().insert(header::ETAG, tag);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    }
    response
}

/// Asks for a pruned model.
///
/// The spec is checked as a whole before anything is created: its shape, its
/// rules, that what it names on this machine is there, and that the model can
/// be cut that way. Everything that is wrong is told at once.
#[utoipa::path(
    post, path = "/v1/jobs", operation_id = "create_job", tag = "jobs",
    request_body(content = JobSpec, examples(
        ("least" = (summary = "The least", value = json!({
            "model": {"from": "path", "path": "/models/SmolLM2-135M-Instruct"},
            "prune": {"amount": {"fraction": 0.2}},
        }))),
        ("full" = (summary = "With everything chosen", value = json!({
            "name": "smol, six layers less", "labels": {"team": "nlp"}, "preset": "seed",
            "model": {"from": "path", "path": "/models/SmolLM2-135M-Instruct"},
            "calibration": {"corpus": {"from": "model"}, "samples": 32, "seq_len": 256},
            "prune": {
                "amount": {"layers": 6}, "strategy": "greedy_damage", "compare": ["block_endpoint"], "keep_last": 1,
                "damage": {"samples": 16, "max_evaluations": 200},
            },
            "heal": [{"method": "qlora", "corpus": {"from": "model"}, "rank": 8, "bits": 4, "steps": 100}],
            "eval": {"perplexity": [{"from": "path", "path": "/corpora/held_out.txt"}]},
            "seed": 7,
        }))),
    )),
    responses(
        (status = 201, description = "Created", body = Job,
         headers(("Location" = String, description = "The job"), ("ETag" = String))),
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
) -> Result<Response, Problem> {
    let mut spec = JobSpec::read(body).map_err(Problem::spec)?;
    check_source(&state.database, tenant, &spec).await?;
    let roots = state.roots.clone();
    let admitted =
        tokio::task::spawn_blocking(move || admission::admit(&mut spec, &roots).map(|()| spec)).await;
    let spec = admitted.map_err(Problem::internal)?.map_err(Problem::spec)?;
    let row = state.database.job_insert(tenant, &NewJob { spec, priority: 0 }).await?;
    let job = shown(&state.database, row).await?;
    let location = [(header::LOCATION, job.summary.links.this.clone())];
    Ok((StatusCode::CREATED, location, tagged(&job)).into_response())
}

/// A model that another job is to have left.
async fn check_source(database: &Database, tenant: Tenant, spec: &JobSpec) -> Result<(), Problem> {
    let ModelSource::Job { job_id } = spec.model else { return Ok(()) };
    let message = match database.job(tenant, job_id).await?.map(|job| job.state) {
        Some(JobState::Succeeded) => return Ok(()),
        Some(state) => format!("that job is {state}; only one that succeeded has left a model"),
        None => "there is no such job".into(),
    };
    Err(Problem::spec(vec![Complaint { pointer: "/model/job_id".into(), message }]))
}

/// Jobs, newest first.
#[utoipa::path(
    get, path = "/v1/jobs", operation_id = "list_jobs", tag = "jobs",
    params(
        ("limit" = Option<u32>, Query, description = "Jobs per page, 1 to 100; 20 if not given"),
        ("after" = Option<Uuid>, Query, description = "`last_id` of the page before"),
        ("state" = Option<Vec<JobState>>, Query, description = "Only jobs in this state; may be repeated"),
        ("name" = Option<String>, Query, description = "Only jobs of this name"),
        ("label" = Option<Vec<String>>, Query, description = "Only jobs with this label, `key=value`; may be repeated"),
    ),
    responses(
        (status = 200, description = "A page", body = Page<JobSummary>),
        (status = 400, description = "The query is wrong", body = ProblemBody),
    )
)]
async fn list(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Pairs(query): Pairs,
) -> Result<Json<Page<JobSummary>>, Problem> {
    let (mut filter, mut size) = (JobFilter::default(), DEFAULT_PAGE);
    for (name, value) in query {
        match name.as_str() {
            "limit" => size = limit(&value, 100)?,
            "after" => filter.after = Some(parameter("after", &value)?),
            "state" => filter.states.push(parameter("state", &value)?),
            "name" => filter.name = Some(value),
            "label" => {
                let (key, value) = value.split_once('=').ok_or_else(|| {
                    Problem::new(
                        Code::InvalidQuery,
                        format!("`label={value}`: a label is asked for as key=value."),
                    )
                })?;
                filter.labels.insert(key.into(), value.into());
            }
            _ => return Err(Pairs::unknown(&name, "limit, after, state, name, label")),
        }
    }
    let page = state.database.job_list(tenant, &filter, size).await?;
    let jobs = page.jobs.iter().map(|row| JobSummary::new(row, &[])).collect();
    Ok(Json(Page::new(jobs, page.has_more, |job: &JobSummary| job.id.to_string())))
}

/// One job.
#[utoipa::path(
    get, path = "/v1/jobs/{id}", operation_id = "get_job", tag = "jobs",
    params(("id" = Uuid, Path), ("If-None-Match" = Option<String>, Header, description = "The ETag you have")),
    responses(
        (status = 200, description = "The job", body = Job, headers(("ETag" = String))),
        (status = 304, description = "Nothing has changed"),
        (status = 404, description = "No such job", body = ProblemBody),
    )
)]
async fn get(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let row = job_row(&state.database, tenant, id).await?;
    let job = shown(&state.database, row).await?;
    let known = headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let mut response = tagged(&job);
    if known.split(',').any(|tag| tag.trim() == job.etag()) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        *response.body_mut() = axum::body::Body::empty();
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    Ok(response)
}

/// Forgets a finished job and its files.
#[utoipa::path(
    delete, path = "/v1/jobs/{id}", operation_id = "delete_job", tag = "jobs", params(("id" = Uuid, Path)),
    responses(
        (status = 204, description = "Gone"),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 409, description = "It has not ended", body = ProblemBody),
    )
)]
async fn delete(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<StatusCode, Problem> {
    let row = job_row(&state.database, tenant, id).await?;
    let unfinished =
        |state| Problem::new(Code::StateConflict, format!("The job is {state}; cancel it first."));
    if !row.state.is_terminal() {
        return Err(unfinished(row.state));
    }
    match state.database.job_delete(tenant, id).await? {
        Deletion::Done => {
            let store = state.store.clone();
            let swept = tokio::task::spawn_blocking(move || store.remove(&job_prefix(id))).await;
            if let Err(error) = swept.map_err(std::io::Error::other).and_then(|done| done) {
                // No row names them any more: the sweep of the store takes them later.
                tracing::warn!(%error, job = %id, "the files of a deleted job stay for now");
            }
            Ok(StatusCode::NO_CONTENT)
        }
        Deletion::Running => Err(unfinished(JobState::Running)),
        Deletion::Unknown => Err(no_job(id)),
    }
}

/// Cancels a job: at once when it waits, at the next seam when it runs.
///
/// Asking twice is asking once. A job that has just succeeded stays so.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/cancel", operation_id = "cancel_job", tag = "jobs", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The job as it stands now", body = Job),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 409, description = "It has ended", body = ProblemBody),
    )
)]
async fn cancel(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Response, Problem> {
    let row = state.database.job_cancel(tenant, id).await?.ok_or_else(|| no_job(id))?;
    Ok(tagged(&shown(&state.database, row).await?))
}

/// Pauses a job: it keeps its records and gives its device back.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/pause", operation_id = "pause_job", tag = "jobs", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The job as it stands now", body = Job),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 409, description = "It has ended", body = ProblemBody),
    )
)]
async fn pause(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Response, Problem> {
    let row = state.database.job_pause(tenant, id).await?.ok_or_else(|| no_job(id))?;
    Ok(tagged(&shown(&state.database, row).await?))
}

/// Puts a paused job back into the queue.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/resume", operation_id = "resume_job", tag = "jobs", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The job as it stands now", body = Job),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 409, description = "It is not paused", body = ProblemBody),
    )
)]
async fn resume(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Response, Problem> {
    let row = state.database.job_resume(tenant, id).await?.ok_or_else(|| no_job(id))?;
    Ok(tagged(&shown(&state.database, row).await?))
}
