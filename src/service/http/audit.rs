//! `/v1/audit`: who changed what, and when. Every change that was granted is noted, whatever its route.

use axum::Json;
use axum::extract::{Extension, MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::auth::{Caller, CallerKey};
use super::edge::RequestId;
use super::extract::Newest;
use super::job::Page;
use super::problem::{Problem, ProblemBody};
use crate::service::db::AuditRow;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list))
}

/// A change that somebody asked for and got.
#[derive(Debug, Serialize, ToSchema)]
struct AuditEntry {
    /// Always `"audit_entry"`.
    #[schema(example = "audit_entry")]
    object: &'static str,
    id: Uuid,
    #[serde(with = "time::serde::rfc3339")]
    at: OffsetDateTime,
    /// The key it came with; absent: a program on the service's machine, without one.
    key_id: Option<String>,
    /// The route.
    #[schema(example = "POST /v1/jobs/{id}/cancel")]
    action: String,
    /// What it was done to, or what was made.
    #[schema(example = "/v1/jobs/019ab7c2-1f2e-7c3a-9d5e-0123456789ab/cancel")]
    target: String,
    request_id: String,
}

impl AuditEntry {
    fn new(row: AuditRow) -> Self {
        let AuditRow { id, at, key_id, action, target, request_id } = row;
        Self { object: "audit_entry", id, at, key_id, action, target, request_id }
    }
}

/// Who changed what, newest first: jobs, sweeps, uploads, receivers and keys that were made, changed or deleted.
///
/// What was only looked at, or refused, is not here; nor are the bodies of requests. Kept for 400 days.
#[utoipa::path(
    get, path = "/v1/audit", operation_id = "list_audit", tag = "keys",
    params(
        ("limit" = Option<u32>, Query, description = "Entries per page, 1 to 100; 20 if not given"),
        ("after" = Option<Uuid>, Query, description = "`last_id` of the page before"),
    ),
    responses(
        (status = 200, description = "A page", body = Page<AuditEntry>),
        (status = 400, description = "The query is wrong", body = ProblemBody),
    )
)]
async fn list(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    page: Newest,
) -> Result<Json<Page<AuditEntry>>, Problem> {
    let (rows, more) = state.database.audit_list(tenant, page.after, page.size).await?;
    Ok(Json(Page::new(rows.into_iter().map(AuditEntry::new).collect(), more, |entry| entry.id.to_string())))
}

/// Notes each change that is granted, before its answer leaves. Parts of an upload are not told one by one.
pub async fn note(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Extension(CallerKey(key)): Extension<CallerKey>,
    request: Request,
    next: Next,
) -> Response {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let id = request.extensions().get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = next.run(request).await;
    let changes = matches!(method, Method::POST | Method::DELETE) && response.status().is_success();
    if let (true, Some(route)) = (changes, route) {
        let action = format!("{method} {route}");
        let made = response.headers().get(header::LOCATION).and_then(|at| at.to_str().ok());
        let target = made.unwrap_or(&path);
        if let Err(error) = state.database.audit_note(tenant, key.as_deref(), &action, target, &id).await {
            tracing::error!(%error, ?key, action, target, request_id = id, "a change is not in the audit log");
        }
    }
    response
}
