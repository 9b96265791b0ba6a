//! Errors for people and programs: RFC 9457 problem details, every one with a
//! page of its own.

use axum::Json;
use axum::extract::Path;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::page;
use crate::job::complaint::Complaint;
use crate::service::db;

/// The kinds of problem. One row each in [`Code::row`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    InvalidJson,
    InvalidQuery,
    InvalidId,
    InvalidHeader,
    InvalidSpec,
    InvalidUpload,
    InvalidWebhook,
    InvalidKey,
    IdempotencyKeyReused,
    Unauthorized,
    Forbidden,
    ForeignHost,
    ForeignOrigin,
    RouteNotFound,
    JobNotFound,
    JobDeleted,
    SweepNotFound,
    ArtifactNotFound,
    UploadNotFound,
    WebhookNotFound,
    KeyNotFound,
    UploadIncomplete,
    DigestMismatch,
    QuotaExceeded,
    TooManyRequests,
    TooManyStreams,
    QueueFull,
    ResultNotReady,
    MethodNotAllowed,
    NotAcceptable,
    StateConflict,
    BodyTooLarge,
    UnsupportedMediaType,
    RangeNotSatisfiable,
    Internal,
    Unavailable,
    Draining,
    Timeout,
}

struct Row {
    name: &'static str,
    status: StatusCode,
    title: &'static str,
}

const fn row(name: &'static str, status: StatusCode, title: &'static str) -> Row {
    Row { name, status, title }
}

impl Code {
    pub const ALL: [Self; 38] = [
        Self::InvalidJson,
        Self::InvalidQuery,
        Self::InvalidId,
        Self::InvalidHeader,
        Self::InvalidSpec,
        Self::InvalidUpload,
        Self::InvalidWebhook,
        Self::InvalidKey,
        Self::IdempotencyKeyReused,
        Self::Unauthorized,
        Self::Forbidden,
        Self::ForeignHost,
        Self::ForeignOrigin,
        Self::RouteNotFound,
        Self::JobNotFound,
        Self::JobDeleted,
        Self::SweepNotFound,
        Self::ArtifactNotFound,
        Self::UploadNotFound,
        Self::WebhookNotFound,
        Self::KeyNotFound,
        Self::UploadIncomplete,
        Self::DigestMismatch,
        Self::QuotaExceeded,
        Self::TooManyRequests,
        Self::TooManyStreams,
        Self::QueueFull,
        Self::ResultNotReady,
        Self::MethodNotAllowed,
        Self::NotAcceptable,
        Self::StateConflict,
        Self::BodyTooLarge,
        Self::UnsupportedMediaType,
        Self::RangeNotSatisfiable,
        Self::Internal,
        Self::Unavailable,
        Self::Draining,
        Self::Timeout,
    ];

    #[rustfmt::skip]
    const fn row(self) -> Row {
        use StatusCode as S;
        match self {
            Self::InvalidJson => row("invalid-json", S::BAD_REQUEST, "The body is not JSON"),
            Self::InvalidQuery => row("invalid-query", S::BAD_REQUEST, "The query string is wrong"),
            Self::InvalidId => row("invalid-id", S::BAD_REQUEST, "The id is not a UUID"),
            Self::InvalidHeader => row("invalid-header", S::BAD_REQUEST, "A header cannot be read"),
            Self::IdempotencyKeyReused => row("idempotency-key-reused", S::UNPROCESSABLE_ENTITY, "The Idempotency-Key stands for another request"),
            Self::InvalidSpec => row("invalid-spec", S::UNPROCESSABLE_ENTITY, "The job spec cannot be run"),
            Self::InvalidUpload => row("invalid-upload", S::UNPROCESSABLE_ENTITY, "The upload cannot be taken"),
            Self::InvalidWebhook => row("invalid-webhook", S::UNPROCESSABLE_ENTITY, "It cannot be a webhook endpoint"),
            Self::InvalidKey => row("invalid-key", S::UNPROCESSABLE_ENTITY, "There can be no such API key"),
            Self::Unauthorized => row("unauthorized", S::UNAUTHORIZED, "An API key is needed"),
            Self::Forbidden => row("forbidden", S::FORBIDDEN, "The API key does not allow this"),
            Self::ForeignHost => row("foreign-host", S::MISDIRECTED_REQUEST, "This service is not that host"),
            Self::ForeignOrigin => row("foreign-origin", S::FORBIDDEN, "Another site may not do this"),
            Self::RouteNotFound => row("route-not-found", S::NOT_FOUND, "There is nothing here"),
            Self::JobNotFound => row("job-not-found", S::NOT_FOUND, "There is no such job"),
            Self::JobDeleted => row("job-deleted", S::GONE, "The job was deleted"),
            Self::SweepNotFound => row("sweep-not-found", S::NOT_FOUND, "There is no such sweep"),
            Self::ArtifactNotFound => row("artifact-not-found", S::NOT_FOUND, "The job has no such file"),
            Self::UploadNotFound => row("upload-not-found", S::NOT_FOUND, "There is no such upload"),
            Self::WebhookNotFound => row("webhook-not-found", S::NOT_FOUND, "There is no such webhook endpoint or delivery"),
            Self::KeyNotFound => row("key-not-found", S::NOT_FOUND, "There is no such API key"),
            Self::UploadIncomplete => row("upload-incomplete", S::CONFLICT, "Parts of the upload are missing"),
            Self::DigestMismatch => row("digest-mismatch", S::BAD_REQUEST, "The bytes are not what their digest says"),
            Self::QuotaExceeded => row("quota-exceeded", S::PAYLOAD_TOO_LARGE, "There is no room for it"),
            Self::TooManyRequests => row("too-many-requests", S::TOO_MANY_REQUESTS, "The key asks too often"),
            Self::TooManyStreams => row("too-many-streams", S::TOO_MANY_REQUESTS, "The key has too many event streams"),
            Self::QueueFull => row("queue-full", S::TOO_MANY_REQUESTS, "Too many jobs wait"),
            Self::ResultNotReady => row("result-not-ready", S::NOT_FOUND, "The result is not there yet"),
            Self::MethodNotAllowed => row("method-not-allowed", S::METHOD_NOT_ALLOWED, "This route has no such method"),
            Self::NotAcceptable => row("not-acceptable", S::NOT_ACCEPTABLE, "It cannot be had in that form"),
            Self::StateConflict => row("state-conflict", S::CONFLICT, "The job's state does not allow this"),
            Self::BodyTooLarge => row("body-too-large", S::PAYLOAD_TOO_LARGE, "The body is too large"),
            Self::UnsupportedMediaType => row("unsupported-media-type", S::UNSUPPORTED_MEDIA_TYPE, "The body's media type is not understood"),
            Self::RangeNotSatisfiable => row("range-not-satisfiable", S::RANGE_NOT_SATISFIABLE, "The file has no such bytes"),
            Self::Internal => row("internal", S::INTERNAL_SERVER_ERROR, "The service failed"),
            Self::Unavailable => row("unavailable", S::SERVICE_UNAVAILABLE, "The database cannot be reached"),
            Self::Draining => row("draining", S::SERVICE_UNAVAILABLE, "The service is shutting down"),
            Self::Timeout => row("timeout", S::GATEWAY_TIMEOUT, "The answer took too long"),
        }
    }

    /// What it means and what to do, for the page.
    #[rustfmt::skip]
    const fn remedy(self) -> &'static str {
        match self {
            Self::InvalidJson => "The detail names line and column of the first error. Send one JSON value in UTF-8.",
            Self::InvalidQuery => "The detail names the parameter. What each route takes is in the API documentation.",
            Self::InvalidId => "Ids look like 019ab7c2-1f2e-7c3a-9d5e-0123456789ab; take them from the answer that \
                 created the thing.",
            Self::InvalidHeader => "The detail names the header and what it may say.",
            Self::IdempotencyKeyReused => "A key marks one request, which may be sent again unchanged within 24 \
                 hours. Take a new key, such as a new UUID, for a new request.",
            Self::InvalidSpec => "`errors` lists everything that is wrong, each with a JSON pointer to its place in \
                 the body. Nothing was created; mend all of it and send it again.",
            Self::InvalidUpload => "`errors` lists everything that is wrong, each with its place.",
            Self::InvalidWebhook => "`errors` lists everything that is wrong, each with its place. A receiver is a \
                 public https URL, unless the service was started with --webhooks-inside.",
            Self::InvalidKey => "`errors` lists everything that is wrong, each with its place.",
            Self::Unauthorized => "Send `Authorization: Bearer sct_…` with a key this service knows.",
            Self::Forbidden => "The detail names the scope that is needed: `read` to look, `submit` to change, `admin` for \
                 keys and the audit log. Each includes those before it.",
            Self::ForeignHost => "Without an API key the service answers only to localhost and loopback addresses, \
                 so that no web page can reach it through a name of its own. Use http://127.0.0.1, or start the \
                 service with a key.",
            Self::ForeignOrigin => "Without an API key the service changes nothing on behalf of other web sites. \
                 Call it from its own pages or from a program, or start it with a key.",
            Self::RouteNotFound => "All routes are listed in the API documentation.",
            Self::JobNotFound => "It never existed. The list of jobs shows those there are.",
            Self::JobDeleted => "It and its files are gone; the detail says since when. Nothing brings them back.",
            Self::SweepNotFound => "It never existed. The list of sweeps shows those there are.",
            Self::ArtifactNotFound => "The job's list of artifacts names every file it left, path and all.",
            Self::UploadNotFound => "It never existed, was deleted, or was not completed within a day. The list of \
                 uploads shows those there are.",
            Self::WebhookNotFound => "It never existed or was deleted. The list of webhook endpoints shows those \
                 there are; deliveries are kept for thirty days.",
            Self::KeyNotFound => "It never existed, or was revoked. The list of keys shows those there are.",
            Self::UploadIncomplete => "The detail names them; send them and complete the upload again.",
            Self::DigestMismatch => "They were damaged on their way, or are those of another file. Send them again.",
            Self::QuotaExceeded => "The detail says how much there may be; delete what is not needed any more.",
            Self::TooManyRequests => "Wait as long as Retry-After says. Event streams and `Prefer: wait` tell what happens without \
                 asking again and again.",
            Self::TooManyStreams => "End one, or read events as pages. One stream tells all of a job.",
            Self::QueueFull => "Try again when some of your jobs have run, or cancel those that are not needed.",
            Self::ResultNotReady => "The stage that makes it has not finished, or the job ended before it. Follow \
                 the job's events.",
            Self::MethodNotAllowed => "The Allow header names the methods it has.",
            Self::NotAcceptable => "The detail names the media types there are.",
            Self::StateConflict => "A running job is cancelled before it is deleted; a finished job changes no more.",
            Self::BodyTooLarge => "Put long texts into a file below one of the service's roots and name it as \
                 {\"from\": \"path\"}.",
            Self::UnsupportedMediaType => "Send JSON with `Content-Type: application/json`.",
            Self::RangeNotSatisfiable => "The Content-Range header tells how long the file is.",
            Self::Internal => "This is a bug. Please report it with the request id; the service's log says more \
                 under that id.",
            Self::Unavailable => "Running jobs go on. Try again after the time in Retry-After.",
            Self::Draining => "Try again after the time in Retry-After; another instance may answer.",
            Self::Timeout => "Try again; if it stays so, the service's log says more under the request id.",
        }
    }

    pub const fn name(self) -> &'static str {
        self.row().name
    }

    pub const fn status(self) -> StatusCode {
        self.row().status
    }

    /// Whether the very same request may succeed later.
    pub const fn retryable(self) -> bool {
        use StatusCode as S;
        matches!(self.status(), S::SERVICE_UNAVAILABLE | S::GATEWAY_TIMEOUT | S::TOO_MANY_REQUESTS)
    }
}

/// What went wrong with a request. It becomes a body where the request id is
/// known: at the [edge](super::edge).
#[derive(Debug, Clone)]
pub struct Problem {
    code: Code,
    detail: String,
    errors: Vec<Complaint>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// Seconds after which a retryable request is worth another try.
const RETRY_AFTER_S: u16 = 5;

impl Problem {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let mut headers = Vec::new();
        if code.retryable() {
            headers.push((header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S)));
        }
        Self { code, detail: detail.into(), errors: Vec::new(), headers }
    }

    fn invalid(code: Code, what: &str, errors: Vec<Complaint>) -> Self {
        let detail = match errors.as_slice() {
            [one] => one.to_string(),
            more => format!("{} things are wrong with the {what}.", more.len()),
        };
        Self { errors, ..Self::new(code, detail) }
    }

    pub fn spec(errors: Vec<Complaint>) -> Self {
        Self::invalid(Code::InvalidSpec, "spec", errors)
    }

    /// What is wrong with the spec, where that is the problem.
    pub fn complaints(self) -> Result<Vec<Complaint>, Self> {
        if self.code == Code::InvalidSpec { Ok(self.errors) } else { Err(self) }
    }

    /// What is wrong with an upload.
    pub fn upload(errors: Vec<Complaint>) -> Self {
        Self::invalid(Code::InvalidUpload, "upload", errors)
    }

    /// What is wrong with a webhook endpoint.
    pub fn webhook(errors: Vec<Complaint>) -> Self {
        Self::invalid(Code::InvalidWebhook, "webhook endpoint", errors)
    }

    /// What is wrong with an API key to be.
    pub fn key(errors: Vec<Complaint>) -> Self {
        Self::invalid(Code::InvalidKey, "key", errors)
    }

    /// Our own fault. What happened goes to the log, not to the caller.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "request failed");
        Self::new(
            Code::Internal,
            "Something went wrong that should not. The log says more under this request id.",
        )
    }

    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The answer to request `request_id`.
    pub fn body(self, request_id: &str) -> ProblemBody {
        let Row { name, status, title } = self.code.row();
        ProblemBody {
            kind: format!("/problems/{name}"),
            title: title.into(),
            status: status.as_u16(),
            detail: self.detail,
            code: name.into(),
            errors: self.errors,
            request_id: request_id.into(),
            retryable: self.code.retryable(),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.code.status().into_response();
        for (name, value) in &self.headers {
            response.headers_mut().insert(name.clone(), value.clone());
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl From<db::Error> for Problem {
    fn from(error: db::Error) -> Self {
        match error {
            db::Error::Unavailable(cause) => {
                tracing::warn!(%cause, "the database does not answer");
                Self::new(Code::Unavailable, "The database does not answer. Running jobs go on.")
            }
            db::Error::Illegal(illegal) => {
                Self::new(Code::StateConflict, format!("The job is {}.", illegal.from))
            }
            db::Error::QueueFull(most) => {
                let detail = format!("You have {most} jobs that wait, which is as many as there may be.");
                Self::new(Code::QueueFull, detail)
            }
            error @ (db::Error::LeaseLost | db::Error::Sql(_) | db::Error::Migrate(_)) => {
                Self::internal(error)
            }
        }
    }
}

/// Problem details (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({
    "type": "/problems/invalid-spec", "title": "The job spec cannot be run", "status": 422,
    "detail": "2 things are wrong with the spec.", "code": "invalid-spec",
    "errors": [
        {"pointer": "/calibration/sampels", "message": "is no field here; the fields are `corpus`, `samples`"},
        {"pointer": "/prune/amount/layers", "message": "must be at least 1"},
    ],
    "request_id": "019ab7c2-1f2e-7c3a-9d5e-0123456789ab", "retryable": false,
}))]
pub struct ProblemBody {
    /// URI of a page about this kind of problem.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What is wrong with this very request, for a person.
    pub detail: String,
    /// The kind of problem, for a program. Codes do not change.
    pub code: String,
    /// Everything that is wrong with the body, each with its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<Complaint>,
    /// The `x-request-id` of the answer: the key to the service's log.
    pub request_id: String,
    /// The very same request may succeed later.
    pub retryable: bool,
}

impl IntoResponse for ProblemBody {
    fn into_response(self) -> Response {
        let kind = [(header::CONTENT_TYPE, "application/problem+json")];
        (StatusCode::from_u16(self.status).unwrap_or_default(), kind, Json(self)).into_response()
    }
}

/// The pages behind the `type` URIs.
pub async fn about(Path(name): Path<String>) -> Result<Html<String>, Problem> {
    let code = Code::ALL.into_iter().find(|c| c.name() == name);
    let code = code.ok_or_else(|| {
        Problem::new(Code::RouteNotFound, "There is no such kind of problem; /problems lists them all.")
    })?;
    let row = code.row();
    let body = format!(
        "<p>HTTP status {}, code <code>{}</code>.</p><p>{}</p><p><a href=\"/problems\">All problems</a></p>",
        row.status,
        row.name,
        page::escape(code.remedy())
    );
    Ok(page::page(row.title, &body))
}

pub async fn all() -> Html<String> {
    let rows: String = Code::ALL
        .iter()
        .map(|code| {
            let Row { name, status, title } = code.row();
            format!("<tr><td>{}<td><a href=\"/problems/{name}\">{name}</a><td>{title}", status.as_u16())
        })
        .collect();
    page::page("Problems", &format!("<table><tr><th>Status<th>Code<th>Meaning{rows}</table>"))
}
