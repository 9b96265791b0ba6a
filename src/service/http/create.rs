//! Jobs come into being: asked for, or tried again. A request that comes twice makes one job.

use std::collections::HashMap;

use axum::extract::{DefaultBodyLimit, Extension, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::admission::{self, Admitted};
use super::auth::Caller;
use super::extract::{JobId, JsonBody};
use super::job::Job;
use super::jobs::{job_row, shown, tagged};
use super::problem::{Code, Problem, ProblemBody};
use crate::job::complaint::Complaint;
use crate::job::plan::Plan;
use crate::job::spec::{Corpus, JobSpec, ModelSource};
use crate::job::state::JobState;
use crate::service::db::{Asked, Database, Inserted, JobRow, NewJob, Once, Tenant, WorkerRow};
use crate::service::sinks;

/// Enough for a spec that brings its text (at most 8 MiB each) along.
pub(super) const MAX_SPEC_BYTES: usize = 16 << 20;
const MAX_KEY_BYTES: usize = 255;
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub(super) const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create).layer(DefaultBodyLimit::max(MAX_SPEC_BYTES)))
        .routes(routes!(retry))
}

/// Asks for a pruned model.
///
/// The spec is checked as a whole before anything is created: its shape, its
/// rules, that what it names on this machine is there, and that the model can
/// be cut that way. Everything that is wrong is told at once.
///
/// With an `Idempotency-Key` the request may be sent again, within 24 hours and
/// as often as need be: it makes one job, and every answer tells of that one.
#[utoipa::path(
    post, path = "/v1/jobs", operation_id = "create_job", tag = "jobs",
    params(("Idempotency-Key" = Option<String>, Header, description =
        "Your word for this request, such as a UUID: printable ASCII, at most 255 characters")),
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
        (status = 201, description = "Created, now or by the same request before", body = Job, headers(
            ("Location" = String, description = "The job"), ("ETag" = String),
            ("Idempotency-Replayed" = String, description = "`true`: the job was there already"),
        )),
        (status = 400, description = "Not JSON, or a header that cannot be read", body = ProblemBody),
        (status = 410, description = "The same request made a job that was deleted since", body = ProblemBody),
        (status = 413, description = "Too large", body = ProblemBody),
        (status = 415, description = "Not declared as JSON", body = ProblemBody),
        (status = 422, description = "The spec cannot be run, or the key stands for another request", body = ProblemBody),
    )
)]
async fn create(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let spec = JobSpec::read(body).map_err(Problem::spec)?;
    let asked = serde_json::to_vec(&spec).map_err(Problem::internal)?;
    let once = once(&headers, &[b"create", &asked])?;
    let job = NewJob { asked: now_asked(&headers), ..NewJob::new(spec) };
    submit(&state, tenant, job, once).await
}

/// Tries a job again that failed or was cancelled.
///
/// A job that has ended stays as it is: this makes a new one of the same spec,
/// which goes on with what the old one had recorded, while that is still there
/// (a day). `Idempotency-Key` works as when a job is created.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/retry", operation_id = "retry_job", tag = "jobs",
    params(("id" = Uuid, Path), ("Idempotency-Key" = Option<String>, Header, description = "As when a job is created")),
    responses(
        (status = 201, description = "The new job", body = Job,
         headers(("Location" = String, description = "The new job"), ("ETag" = String))),
        (status = 400, description = "A header cannot be read", body = ProblemBody),
        (status = 404, description = "No such job", body = ProblemBody),
        (status = 409, description = "It has not ended, or with success", body = ProblemBody),
        (status = 410, description = "It was deleted", body = ProblemBody),
        (status = 422, description = "The spec cannot be run any more, or the key stands for another request", body = ProblemBody),
    )
)]
async fn retry(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JobId(id): JobId,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let once = once(&headers, &[b"retry", id.as_bytes()])?;
    let old = job_row(&state.database, tenant, id).await?;
    match old.state {
        JobState::Failed | JobState::Cancelled => {}
        JobState::Queued | JobState::Running | JobState::Paused | JobState::Succeeded => {
            let detail =
                format!("The job is {}; only one that failed or was cancelled is tried again.", old.state);
            return Err(Problem::new(Code::StateConflict, detail));
        }
    }
    let asked = now_asked(&headers);
    let again = NewJob { retry_of: Some(id), asked, ..NewJob::new(old.spec) };
    submit(&state, tenant, again, once).await
}

/// Checks a job and puts it into the queue, unless the same request has done so before.
async fn submit(
    state: &AppState,
    tenant: Tenant,
    job: NewJob,
    once: Option<Once>,
) -> Result<Response, Problem> {
    // Before the checks: what was asked for may have gone since, the job stands.
    if let Some(once) = &once
        && let Some(before) = state.database.inserted_before(tenant, once).await?
    {
        return settle(state, tenant, before).await;
    }
    let Admitted { spec, plan } = admit(state, tenant, job.spec).await?;
    let plan = on_fastest(plan, &state.database.workers().await?);
    let job = NewJob { spec, plan, ..job };
    let inserted = match &once {
        Some(once) => state.database.job_insert_once(tenant, &job, once).await?,
        None => Inserted::New(Box::new(state.database.job_insert(tenant, &job).await?)),
    };
    settle(state, tenant, inserted).await
}

async fn settle(
    state: &AppState,
    tenant: Tenant,
    inserted: Inserted<Box<JobRow>>,
) -> Result<Response, Problem> {
    match inserted {
        Inserted::New(row) => created(state, *row).await,
        Inserted::Before(id) => {
            let mut response = created(state, job_row(&state.database, tenant, id).await?).await?;
            response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
            Ok(response)
        }
        Inserted::Reused => Err(reused()),
    }
}

pub(super) fn reused() -> Problem {
    Problem::new(
        Code::IdempotencyKeyReused,
        "The Idempotency-Key came with another request within the last 24 hours; take a new key for a new request.",
    )
}

async fn created(state: &AppState, row: JobRow) -> Result<Response, Problem> {
    let job = shown(&state.database, row).await?;
    let location = [(header::LOCATION, job.summary.links.this.clone())];
    Ok((StatusCode::CREATED, location, tagged(&job)).into_response())
}

/// Checks what the spec names, and reckons what it will take.
pub(super) async fn admit(state: &AppState, tenant: Tenant, mut spec: JobSpec) -> Result<Admitted, Problem> {
    check_source(&state.database, tenant, &spec).await?;
    check_publish(&state.publish_to, &spec)?;
    let uploads = check_uploads(&state.database, tenant, &mut spec).await?;
    let roots = state.roots.clone();
    let admitted = tokio::task::spawn_blocking(move || admission::admit(spec, &roots, &uploads)).await;
    admitted.map_err(Problem::internal)?.map_err(Problem::spec)
}

/// The plan on the fastest of the workers, where one has told how fast it is.
pub(super) fn on_fastest(plan: Option<Plan>, workers: &[WorkerRow]) -> Option<Plan> {
    let machines = workers.iter().filter_map(WorkerRow::machine);
    let fastest = machines.max_by(|a, b| a.flops_per_s.total_cmp(&b.flops_per_s));
    plan.map(|plan| match fastest {
        Some(machine) => plan.on(machine),
        None => plan,
    })
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

/// A place on the Hub that this service may write to.
fn check_publish(namespaces: &[String], spec: &JobSpec) -> Result<(), Problem> {
    let Some(publish) = &spec.publish else { return Ok(()) };
    let owner = publish.repo.split('/').next().unwrap_or_default();
    let message = match namespaces {
        namespaces if namespaces.iter().any(|name| name == owner) => return Ok(()),
        [] => "this service publishes nothing: it was started without --publish-to".into(),
        namespaces => format!("this service publishes only below {}", namespaces.join(", ")),
    };
    Err(Problem::spec(vec![Complaint { pointer: "/publish/repo".into(), message }]))
}

/// Texts that the caller is to have brought; their sizes.
async fn check_uploads(
    database: &Database,
    tenant: Tenant,
    spec: &mut JobSpec,
) -> Result<HashMap<Uuid, u64>, Problem> {
    let (mut complaints, mut sizes) = (Vec::new(), HashMap::new());
    for (pointer, corpus) in spec.corpora_mut() {
        let Corpus::Upload { upload_id } = corpus else { continue };
        let message = match database.upload(tenant, *upload_id).await? {
            Some(upload) if upload.completed_at.is_some() => {
                sizes.insert(*upload_id, upload.size_bytes as u64);
                continue;
            }
            Some(_) => "that upload is not complete: send its parts, then POST …/complete",
            None => "there is no such upload",
        };
        complaints.push(Complaint { pointer: format!("{pointer}/upload_id"), message: message.into() });
    }
    if complaints.is_empty() { Ok(sizes) } else { Err(Problem::spec(complaints)) }
}

/// A request for one job, which comes now.
fn now_asked(headers: &HeaderMap) -> Asked {
    Asked { at: Some(OffsetDateTime::now_utc()), traceparent: traceparent(headers) }
}

/// The caller's span, where it names one as W3C Trace Context has it; anything else counts as nothing.
pub(super) fn traceparent(headers: &HeaderMap) -> Option<String> {
    let mut given = headers.get_all("traceparent").iter();
    let only = given.next().filter(|_| given.next().is_none())?.to_str().ok()?;
    sinks::Parent::read(only).map(|_| only.to_owned())
}

/// How the caller marks this request, if at all; `asked` is what makes it the same.
pub(super) fn once(headers: &HeaderMap, asked: &[&[u8]]) -> Result<Option<Once>, Problem> {
    let mut given = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(key) = given.next() else { return Ok(None) };
    let key = key.to_str().unwrap_or_default();
    let fits =
        (1..=MAX_KEY_BYTES).contains(&key.len()) && key.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
    if !fits || given.next().is_some() {
        let detail = format!(
            "`Idempotency-Key` must be given once, as 1 to {MAX_KEY_BYTES} printable ASCII characters."
        );
        return Err(Problem::new(Code::InvalidHeader, detail));
    }
    let mut fingerprint = Sha256::new();
    for part in asked {
        fingerprint.update((part.len() as u64).to_le_bytes());
        fingerprint.update(part);
    }
    Ok(Some(Once { key: key.to_owned(), fingerprint: fingerprint.finalize().into() }))
}
