//! `/v1/api_keys`: who may call, and what for.

use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::AppState;
use super::auth::{ApiKey, Caller, Scope};
use super::extract::{JsonBody, read};
use super::job::Page;
use super::problem::{Code, Problem, ProblemBody};
use crate::job::complaint::Complaint;
use crate::service::db::{ApiKeyRow, NewApiKey};

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(revoke))
}

/// A key to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "ci", "scopes": ["submit"], "expires_at": "2027-06-01T00:00:00Z"}))]
struct NewKey {
    /// For people: whose it is, or what for.
    name: String,
    scopes: Vec<Scope>,
    /// It opens nothing from this time on; never, when absent.
    #[serde(default, with = "time::serde::rfc3339::option")]
    expires_at: Option<OffsetDateTime>,
}

/// A key that opens the API.
#[derive(Debug, Serialize, ToSchema)]
struct Key {
    /// Always `"api_key"`.
    #[schema(example = "api_key")]
    object: &'static str,
    /// The part of the key that may be seen.
    #[schema(example = "3f9a01bc")]
    id: String,
    name: String,
    #[schema(value_type = Vec<Scope>)]
    scopes: Vec<String>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    expires_at: Option<OffsetDateTime>,
    /// To the minute.
    #[serde(with = "time::serde::rfc3339::option")]
    last_used_at: Option<OffsetDateTime>,
    /// The key itself. It is shown when it is made and never again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "sct_3f9a01bc_5f0e…")]
    key: Option<String>,
}

impl Key {
    fn new(row: ApiKeyRow, key: Option<String>) -> Self {
        let ApiKeyRow { id, name, scopes, created_at, expires_at, last_used_at, .. } = row;
        Self { object: "api_key", id, name, scopes, created_at, expires_at, last_used_at, key }
    }
}

/// Makes a key. The answer holds it, and it is never shown again.
///
/// The first key locks a service that was open to its own machine; so it must have the scope `admin`, or nobody could make
/// another.
#[utoipa::path(
    post, path = "/v1/api_keys", operation_id = "create_api_key", tag = "keys",
    request_body = NewKey,
    responses(
        (status = 201, description = "Made", body = Key, headers(("Location" = String))),
        (status = 400, description = "Not JSON", body = ProblemBody),
        (status = 413, description = "Too large", body = ProblemBody),
        (status = 415, description = "Not declared as JSON", body = ProblemBody),
        (status = 422, description = "There can be no such key", body = ProblemBody),
    )
)]
async fn create(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let new: NewKey = read(body).map_err(|complaint| Problem::key(vec![complaint]))?;
    let mut complaints = Vec::new();
    let mut complain = |pointer: &str, message: &str| {
        complaints.push(Complaint { pointer: pointer.into(), message: message.into() });
    };
    if new.name.is_empty() || new.name.chars().count() > 200 || new.name.contains('\0') {
        complain("/name", "must have 1 to 200 characters, without NUL");
    }
    if new.scopes.is_empty() {
        complain("/scopes", "a key without a scope opens nothing; there are read, submit and admin");
    }
    let now = state.database.ping().await?;
    if new.expires_at.is_some_and(|at| at <= now) {
        complain("/expires_at", "is past");
    }
    let admin = Scope::Admin.name();
    if !new.scopes.contains(&Scope::Admin) && !state.database.key_exists_with(tenant, admin).await? {
        complain("/scopes", "the first key must have the scope admin, or nobody could make another");
    }
    if !complaints.is_empty() {
        return Err(Problem::key(complaints));
    }
    let (key, text) = ApiKey::make();
    let scopes = new.scopes.iter().map(|scope| scope.name().into()).collect();
    let row = NewApiKey { scopes, expires_at: new.expires_at, ..key.row(tenant, &new.name) };
    state.database.key_put(&row).await?;
    state.lock.close();
    let row = state.database.key(&key.id).await?;
    let row = row.ok_or_else(|| Problem::internal("a key that was just made is not there"))?;
    let location = [(header::LOCATION, format!("/v1/api_keys/{}", row.id))];
    Ok((StatusCode::CREATED, location, Json(Key::new(row, Some(text)))).into_response())
}

/// The keys that are not revoked, newest first.
#[utoipa::path(
    get, path = "/v1/api_keys", operation_id = "list_api_keys", tag = "keys",
    responses((status = 200, description = "The keys", body = Page<Key>))
)]
async fn list(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
) -> Result<Json<Page<Key>>, Problem> {
    let keys = state.database.keys(tenant).await?.into_iter().map(|row| Key::new(row, None)).collect();
    Ok(Json(Page::new(keys, false, |key: &Key| key.id.clone())))
}

/// Revokes a key: from now on it opens nothing.
#[utoipa::path(
    delete, path = "/v1/api_keys/{id}", operation_id = "revoke_api_key", tag = "keys",
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "Revoked"),
        (status = 404, description = "No such key", body = ProblemBody),
    )
)]
async fn revoke(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    // No text of the database holds a NUL.
    if !id.contains('\0') && state.database.key_revoke(tenant, &id).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let shown: String = id.chars().take(100).collect();
    Err(Problem::new(Code::KeyNotFound, format!("There is no API key `{shown}`.")))
}
