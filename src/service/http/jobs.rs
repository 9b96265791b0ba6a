//! `/v1/jobs`: look, wait, change your mind.

use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use time::format_description::well_known::Rfc3339;
use tokio::time::{Instant, sleep_until};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::auth::Caller;
use super::events::{POLL, hear};
use super::extract::{JobId, Pairs, instant, limit, parameter};
use super::job::{Job, JobSummary, Page};
use super::problem::{Code, Problem, ProblemBody};
use crate::job::state::JobState;
use crate::service::db::{Cursor, Database, Deletion, JobFilter, JobRow, Tenant};
use crate::service::store::job_prefix;

/// A caller may wait this long for news; less than the time in which an answer must begin.
const MAX_WAIT: Duration = Duration::from_secs(50);
const DEFAULT_PAGE: u32 = 20;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(get, delete))
        .routes(routes!(cancel))
        .routes(routes!(pause))
        .routes(routes!(resume))
}

/// Why there is no job of this id: it is gone, or never was.
pub async fn missing(database: &Database, tenant: Tenant, id: Uuid) -> Problem {
    match database.job_deleted_at(tenant, id).await {
        Ok(Some(at)) => {
            let at = at.format(&Rfc3339).unwrap_or_default();
            Problem::new(Code::JobDeleted, format!("The job {id} was deleted at {at}."))
        }
        Ok(None) => Problem::new(Code::JobNotFound, format!("There is no job {id}.")),
        Err(error) => error.into(),
    }
}

/// The row of a job that must be there.
pub async fn job_row(database: &Database, tenant: Tenant, id: Uuid) -> Result<JobRow, Problem> {
    match database.job(tenant, id).await? {
        Some(row) => Ok(row),
        None => Err(missing(database, tenant, id).await),
    }
}

pub async fn shown(database: &Database, row: JobRow) -> Result<Job, Problem> {
    let stages = database.stages(row.tenant, row.id).await?;
    let ahead = database.jobs_ahead(row.tenant, row.id).await?;
    Ok(Job::new(row, stages, ahead))
}

pub fn tagged(job: &Job) -> Response {
    let mut response = Json(job).into_response();
    if let Ok(tag) = HeaderValue::from_str(&job.etag()) {
        response.headers_mut().insert(header::ETAG, tag);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    }
    response
}

/// Jobs, newest first.
#[utoipa::path(
    get, path = "/v1/jobs", operation_id = "list_jobs", tag = "jobs",
    params(
        ("limit" = Option<u32>, Query, description = "Jobs per page, 1 to 100; 20 if not given"),
        ("after" = Option<Uuid>, Query, description = "`last_id` of the page before: the jobs older than it"),
        ("before" = Option<Uuid>, Query, description = "`first_id` of the page after: the jobs newer than it. Not with `after`"),
        ("state" = Option<Vec<JobState>>, Query, description = "Only jobs in this state; may be repeated"),
        ("name" = Option<String>, Query, description = "Only jobs of this name"),
        ("label" = Option<Vec<String>>, Query, description = "Only jobs with this label, `key=value`; may be repeated"),
        ("created_from" = Option<String>, Query, description = "Only jobs created at this time (RFC 3339) or later"),
        ("created_before" = Option<String>, Query, description = "Only jobs created before this time"),
    ),
    responses(
        (status = 200, description = "A page; `has_more` looks in the direction asked for", body = Page<JobSummary>),
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
            "after" | "before" if filter.cursor != Cursor::Newest => {
                let detail = "A page has one cursor: give `after` or `before`, once.";
                return Err(Problem::new(Code::InvalidQuery, detail));
            }
            "after" => filter.cursor = Cursor::After(parameter("after", &value)?),
            "before" => filter.cursor = Cursor::Before(parameter("before", &value)?),
            "created_from" => filter.created_from = Some(instant("created_from", &value)?),
            "created_before" => filter.created_before = Some(instant("created_before", &value)?),
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
            _ => {
                let known = "limit, after, before, state, name, label, created_from, created_before";
                return Err(Pairs::unknown(&name, known));
            }
        }
    }
    let page = state.database.job_list(tenant, &filter, size).await?;
    let jobs = page.jobs.iter().map(|row| JobSummary::new(row, &[])).collect();
    Ok(Json(Page::new(jobs, page.has_more, |job: &JobSummary| job.id.to_string())))
}

/// One job, now or when there is news of it.
///
/// `Prefer: wait=30` holds the answer back, for at most so many seconds (50 at
/// most): with `If-None-Match` until the job differs from what you have, without it
/// until the job has ended.
#[utoipa::path(
    get, path = "/v1/jobs/{id}", operation_id = "get_job", tag = "jobs",
    params(
        ("id" = Uuid, Path),
        ("If-None-Match" = Option<String>, Header, description = "The ETag you have"),
        ("Prefer" = Option<String>, Header, description = "RFC 7240", example = "wait=30"),
    ),
    responses(
        (status = 200, description = "The job", body = Job, headers(
            ("ETag" = String), ("Preference-Applied" = String, description = "How long was waited at most"),
        )),
        (status = 304, description = "Nothing has changed"),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 410, description = "It was deleted", body = ProblemBody),
    )
)]
async fn get(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let known = headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok());
    let patience = patience(&headers);
    // Listening starts before the first look, so nothing falls between.
    let mut signals = state.database.signals();
    let until = Instant::now() + patience.unwrap_or_default();
    let (job, same) = loop {
        let job = shown(&state.database, job_row(&state.database, tenant, id).await?).await?;
        let same = known.is_some_and(|tags| tags.split(',').any(|tag| tag.trim() == job.etag()));
        let news = if known.is_some() { !same } else { job.summary.state.is_terminal() };
        if news || Instant::now() >= until || state.shutdown.is_cancelled() {
            break (job, same);
        }
        tokio::select! {
            () = hear(&mut signals, id) => {}
            () = sleep_until(until.min(Instant::now() + POLL)) => {}
            () = state.shutdown.cancelled() => {}
        }
    };
    let mut response = tagged(&job);
    if same {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        *response.body_mut() = axum::body::Body::empty();
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    if let Some(patience) = patience {
        let applied = HeaderValue::from_str(&format!("wait={}", patience.as_secs()));
        response.headers_mut().insert("preference-applied", applied.map_err(Problem::internal)?);
    }
    Ok(response)
}

/// How long the caller prefers to wait. What cannot be read is no preference (RFC 7240, 2).
fn patience(headers: &HeaderMap) -> Option<Duration> {
    let preferences = headers.get_all("prefer").iter().filter_map(|v| v.to_str().ok());
    let mut preferences = preferences.flat_map(|v| v.split([',', ';'])).filter_map(|p| p.split_once('='));
    let (_, seconds) = preferences.find(|(name, _)| name.trim().eq_ignore_ascii_case("wait"))?;
    let seconds = seconds.trim().trim_matches('"').parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_WAIT))
}

/// Forgets a finished job and its files. For some time its id tells that it is gone.
#[utoipa::path(
    delete, path = "/v1/jobs/{id}", operation_id = "delete_job", tag = "jobs", params(("id" = Uuid, Path)),
    responses(
        (status = 204, description = "Gone"),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 410, description = "It was deleted before", body = ProblemBody),
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
            if let Err(error) = state.store.remove(&job_prefix(id)).await {
                // No row names them any more: the sweep of the store takes them later.
                tracing::warn!(%error, job = %id, "the files of a deleted job stay for now");
            }
            Ok(StatusCode::NO_CONTENT)
        }
        Deletion::Running => Err(unfinished(JobState::Running)),
        Deletion::Unknown => Err(missing(&state.database, tenant, id).await),
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
        (status = 410, description = "It was deleted", body = ProblemBody),
        (status = 409, description = "It has ended", body = ProblemBody),
    )
)]
async fn cancel(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Response, Problem> {
    let row = state.database.job_cancel(tenant, id).await?;
    changed(&state, tenant, id, row).await
}

/// Pauses a job: it keeps its records and gives its device back.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/pause", operation_id = "pause_job", tag = "jobs", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The job as it stands now", body = Job),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 410, description = "It was deleted", body = ProblemBody),
        (status = 409, description = "It has ended", body = ProblemBody),
    )
)]
async fn pause(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Response, Problem> {
    let row = state.database.job_pause(tenant, id).await?;
    changed(&state, tenant, id, row).await
}

/// Puts a paused job back into the queue.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/resume", operation_id = "resume_job", tag = "jobs", params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The job as it stands now", body = Job),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 410, description = "It was deleted", body = ProblemBody),
        (status = 409, description = "It is not paused", body = ProblemBody),
    )
)]
async fn resume(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
) -> Result<Response, Problem> {
    let row = state.database.job_resume(tenant, id).await?;
    changed(&state, tenant, id, row).await
}

async fn changed(
    state: &AppState,
    tenant: Tenant,
    id: Uuid,
    row: Option<JobRow>,
) -> Result<Response, Problem> {
    match row {
        Some(row) => Ok(tagged(&shown(&state.database, row).await?)),
        None => Err(missing(&state.database, tenant, id).await),
    }
}
