//! `/v1/webhook_endpoints`: who wants to hear of jobs, and what was told them.

use axum::Json;
use axum::extract::{Extension, FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::AppState;
use super::auth::Caller;
use super::extract::{JsonBody, Newest, read};
use super::job::Page;
use super::problem::{Code, Problem, ProblemBody};
use crate::job::complaint::Complaint;
use crate::job::state::JobState;
use crate::service::db::{DeliveryRow, EndpointRow, MessageRow, message_body, page_cut};
use crate::service::seal;
use crate::service::sinks;

/// Endpoints a tenant may have.
const MOST_ENDPOINTS: i64 = 50;
const SECRET_BYTES: usize = 32;
const PING: &str = "ping";
pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(get, delete))
        .routes(routes!(rotate))
        .routes(routes!(ping))
        .routes(routes!(deliveries))
        .routes(routes!(redeliver))
}

/// How messages look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Format {
    /// `{"type", "timestamp", "data"}`, as Standard Webhooks advise.
    #[default]
    Standard,
    /// `CloudEvents` 1.0 in structured mode, signed all the same.
    CloudEvents,
}

impl Format {
    const fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::CloudEvents => "cloudevents",
        }
    }
}

/// A receiver that wants to hear of jobs.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"url": "https://example.com/hooks/secateur", "events": ["job.succeeded", "job.failed"]}))]
struct NewEndpoint {
    /// A public https URL, unless the service was started so that receivers may be inside.
    url: String,
    /// `job.` and a state, such as `job.succeeded`; everything when empty.
    #[serde(default)]
    events: Vec<String>,
    /// For people.
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    format: Format,
}

/// A receiver of messages.
#[derive(Debug, Serialize, ToSchema)]
struct WebhookEndpoint {
    /// Always `"webhook_endpoint"`.
    #[schema(example = "webhook_endpoint")]
    object: &'static str,
    id: Uuid,
    url: String,
    /// Empty: everything.
    events: Vec<String>,
    description: Option<String>,
    format: String,
    /// What messages are signed with. It is shown when it is made and never again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")]
    secret: Option<String>,
    /// Messages are signed with the secret before this one as well: for a day after it was rotated.
    rotating: bool,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
}

impl WebhookEndpoint {
    fn new(row: EndpointRow, secret: Option<&[u8]>) -> Self {
        Self {
            object: "webhook_endpoint",
            id: row.id,
            url: row.url,
            events: row.events,
            description: row.description,
            format: row.format,
            secret: secret.map(sinks::shown),
            rotating: row.old_secret.is_some(),
            created_at: row.created_at,
        }
    }
}

/// A message to an endpoint and how its delivery stands.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Delivery {
    /// Always `"delivery"`.
    #[schema(example = "delivery")]
    object: &'static str,
    /// The `webhook-id`: the same at each try.
    id: Uuid,
    /// Whom it is for.
    #[schema(example = "webhook")]
    sink: String,
    #[serde(rename = "type")]
    #[schema(example = "job.succeeded")]
    kind: String,
    job_id: Option<Uuid>,
    #[schema(example = "delivered")]
    state: DeliveryState,
    /// The body, the same at each try.
    body: String,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    delivered_at: Option<OffsetDateTime>,
    /// Of one that waits: not before this time.
    #[serde(with = "time::serde::rfc3339::option")]
    next_try_at: Option<OffsetDateTime>,
    tries: Vec<Try>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum DeliveryState {
    Waiting,
    Delivered,
    /// All tries failed, over more than a day. It can still be redelivered.
    GivenUp,
}

/// One try to deliver a message.
#[derive(Debug, Serialize, ToSchema)]
struct Try {
    #[serde(with = "time::serde::rfc3339")]
    at: OffsetDateTime,
    /// The HTTP status, when there was an answer.
    status: Option<i16>,
    /// Why it did not succeed.
    error: Option<String>,
    duration_ms: i64,
}

impl Delivery {
    pub(super) fn new(row: MessageRow, tries: &[DeliveryRow]) -> Self {
        let state = match (row.delivered_at, row.given_up_at) {
            (Some(_), _) => DeliveryState::Delivered,
            (None, Some(_)) => DeliveryState::GivenUp,
            (None, None) => DeliveryState::Waiting,
        };
        let tried = tries.iter().filter(|t| t.message_id == row.id).map(|t| Try {
            at: t.at,
            status: t.status,
            error: t.error.clone(),
            duration_ms: t.duration_ms,
        });
        Self {
            object: "delivery",
            id: row.id,
            sink: row.sink,
            kind: row.kind,
            job_id: row.job_id,
            next_try_at: matches!(state, DeliveryState::Waiting).then_some(row.due_at),
            state,
            body: row.body,
            created_at: row.created_at,
            delivered_at: row.delivered_at,
            tries: tried.collect(),
        }
    }
}

/// The `{id}` of an endpoint in the path.
struct EndpointId(Uuid);

impl<S: Send + Sync> FromRequestParts<S> for EndpointId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path: Result<Path<Vec<(String, String)>>, _> = Path::from_request_parts(parts, state).await;
        let Path(path) = path.map_err(|e| Problem::new(Code::InvalidId, e.body_text()))?;
        let id =
            path.into_iter().find_map(|(name, value)| (name == "id").then_some(value)).unwrap_or_default();
        read_id(&id).map(Self)
    }
}

fn read_id(text: &str) -> Result<Uuid, Problem> {
    text.parse()
        .map_err(|e| Problem::new(Code::InvalidId, format!("`{text}` is no id of a webhook endpoint: {e}.")))
}

fn unknown(id: Uuid) -> Problem {
    Problem::new(Code::WebhookNotFound, format!("There is no webhook endpoint {id}."))
}

/// Registers a receiver. The answer holds its secret, which is never shown again.
///
/// Messages follow Standard Webhooks: `webhook-id`, `webhook-timestamp` and `webhook-signature`, an HMAC-SHA256 over
/// id, timestamp and body. One that is not answered with 2xx within 15 seconds is sent again, over more than a day.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints", operation_id = "create_webhook_endpoint", tag = "webhooks",
    request_body = NewEndpoint,
    responses(
        (status = 201, description = "Registered", body = WebhookEndpoint, headers(("Location" = String))),
        (status = 400, description = "Not JSON", body = ProblemBody),
        (status = 413, description = "There are too many", body = ProblemBody),
        (status = 415, description = "Not declared as JSON", body = ProblemBody),
        (status = 422, description = "It cannot be a receiver", body = ProblemBody),
    )
)]
async fn create(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let new: NewEndpoint = read(body).map_err(|complaint| Problem::webhook(vec![complaint]))?;
    let complaints = check(&state, &new);
    if !complaints.is_empty() {
        return Err(Problem::webhook(complaints));
    }
    let (id, secret) = (Uuid::now_v7(), seal::random::<SECRET_BYTES>());
    let row = EndpointRow {
        id,
        url: new.url,
        events: new.events,
        description: new.description,
        format: new.format.name().into(),
        secret: state.seal.seal(id.as_bytes(), &secret),
        old_secret: None,
        created_at: OffsetDateTime::now_utc(),
    };
    if !state.database.endpoint_insert(tenant, &row, MOST_ENDPOINTS).await? {
        let detail =
            format!("There may be {MOST_ENDPOINTS} webhook endpoints; delete one that is not needed.");
        return Err(Problem::new(Code::QuotaExceeded, detail));
    }
    let location = [(header::LOCATION, format!("/v1/webhook_endpoints/{id}"))];
    Ok((StatusCode::CREATED, location, Json(WebhookEndpoint::new(row, Some(&secret)))).into_response())
}

fn check(state: &AppState, new: &NewEndpoint) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let mut complain = |pointer: String, message: String| complaints.push(Complaint { pointer, message });
    if new.url.len() > 2000 {
        complain("/url".into(), "must be at most 2000 characters".into());
    } else if let Err(message) = state.reach.check(&new.url) {
        complain("/url".into(), message);
    }
    let known = JobState::ALL.map(|state| format!("job.{state}"));
    for (i, event) in new.events.iter().enumerate().filter(|(_, event)| !known.contains(event)) {
        complain(format!("/events/{i}"), format!("`{event}` is no event; there are {}", known.join(", ")));
    }
    if new.description.as_ref().is_some_and(|text| text.len() > 1000 || text.contains('\0')) {
        complain("/description".into(), "must be at most 1000 characters, without NUL".into());
    }
    complaints
}

/// The receivers there are, newest first.
#[utoipa::path(
    get, path = "/v1/webhook_endpoints", operation_id = "list_webhook_endpoints", tag = "webhooks",
    responses((status = 200, description = "The endpoints", body = Page<WebhookEndpoint>))
)]
async fn list(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
) -> Result<Json<Page<WebhookEndpoint>>, Problem> {
    let rows = state.database.endpoints(tenant).await?;
    let endpoints = rows.into_iter().map(|row| WebhookEndpoint::new(row, None)).collect();
    Ok(Json(Page::new(endpoints, false, |endpoint| endpoint.id.to_string())))
}

/// One receiver.
#[utoipa::path(
    get, path = "/v1/webhook_endpoints/{id}", operation_id = "get_webhook_endpoint", tag = "webhooks",
    params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The endpoint", body = WebhookEndpoint),
        (status = 404, description = "No such endpoint", body = ProblemBody),
    )
)]
async fn get(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    EndpointId(id): EndpointId,
) -> Result<Json<WebhookEndpoint>, Problem> {
    let row = state.database.endpoint(tenant, id).await?.ok_or_else(|| unknown(id))?;
    Ok(Json(WebhookEndpoint::new(row, None)))
}

/// Forgets a receiver and all messages for it.
#[utoipa::path(
    delete, path = "/v1/webhook_endpoints/{id}", operation_id = "delete_webhook_endpoint", tag = "webhooks",
    params(("id" = Uuid, Path)),
    responses(
        (status = 204, description = "Gone"),
        (status = 404, description = "No such endpoint", body = ProblemBody),
    )
)]
async fn delete(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    EndpointId(id): EndpointId,
) -> Result<StatusCode, Problem> {
    match state.database.endpoint_delete(tenant, id).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(unknown(id)),
    }
}

/// Makes another secret. For a day messages are signed with both, so that none is refused meanwhile.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints/{id}/rotate", operation_id = "rotate_webhook_secret", tag = "webhooks",
    params(("id" = Uuid, Path)),
    responses(
        (status = 200, description = "The endpoint with its new secret", body = WebhookEndpoint),
        (status = 404, description = "No such endpoint", body = ProblemBody),
    )
)]
async fn rotate(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    EndpointId(id): EndpointId,
) -> Result<Json<WebhookEndpoint>, Problem> {
    let secret = seal::random::<SECRET_BYTES>();
    let sealed = state.seal.seal(id.as_bytes(), &secret);
    if !state.database.endpoint_rotate(tenant, id, &sealed).await? {
        return Err(unknown(id));
    }
    let row = state.database.endpoint(tenant, id).await?.ok_or_else(|| unknown(id))?;
    Ok(Json(WebhookEndpoint::new(row, Some(&secret))))
}

/// A message on its way.
#[derive(Debug, Serialize, ToSchema)]
struct Sent {
    /// The `webhook-id`.
    id: Uuid,
}

/// Sends a message of the type `ping`, whatever events the receiver wants.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints/{id}/ping", operation_id = "ping_webhook_endpoint", tag = "webhooks",
    params(("id" = Uuid, Path)),
    responses(
        (status = 202, description = "It is on its way; the deliveries tell what became of it", body = Sent),
        (status = 404, description = "No such endpoint", body = ProblemBody),
    )
)]
async fn ping(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    EndpointId(id): EndpointId,
) -> Result<(StatusCode, Json<Sent>), Problem> {
    let row = state.database.endpoint(tenant, id).await?.ok_or_else(|| unknown(id))?;
    let message = Uuid::now_v7();
    let body = message_body(&row.format, message, PING, json!({"endpoint_id": id}));
    state.database.message_insert(tenant, message, id, PING, &body).await?;
    Ok((StatusCode::ACCEPTED, Json(Sent { id: message })))
}

/// What was sent to a receiver, newest first, with every try.
#[utoipa::path(
    get, path = "/v1/webhook_endpoints/{id}/deliveries", operation_id = "list_webhook_deliveries", tag = "webhooks",
    params(
        ("id" = Uuid, Path),
        ("limit" = Option<u32>, Query, description = "Deliveries per page, 1 to 100; 20 if not given"),
        ("after" = Option<Uuid>, Query, description = "`last_id` of the page before"),
    ),
    responses(
        (status = 200, description = "The messages", body = Page<Delivery>),
        (status = 400, description = "The query is wrong", body = ProblemBody),
        (status = 404, description = "No such endpoint", body = ProblemBody),
    )
)]
async fn deliveries(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    EndpointId(id): EndpointId,
    Newest { size, after }: Newest,
) -> Result<Json<Page<Delivery>>, Problem> {
    state.database.endpoint(tenant, id).await?.ok_or_else(|| unknown(id))?;
    let mut rows = state.database.messages(tenant, id, after, size + 1).await?;
    let has_more = page_cut(&mut rows, size);
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    let tries = state.database.deliveries(&ids).await?;
    let deliveries = rows.into_iter().map(|row| Delivery::new(row, &tries)).collect();
    Ok(Json(Page::new(deliveries, has_more, |delivery| delivery.id.to_string())))
}

/// Sends a message once more, now, with the id and the body it had.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints/{id}/deliveries/{delivery}/redeliver", operation_id = "redeliver_webhook",
    tag = "webhooks", params(("id" = Uuid, Path), ("delivery" = Uuid, Path)),
    responses(
        (status = 202, description = "It is on its way", body = Sent),
        (status = 404, description = "No such endpoint or delivery", body = ProblemBody),
    )
)]
async fn redeliver(
    State(state): State<AppState>,
    Extension(Caller(tenant)): Extension<Caller>,
    Path((id, delivery)): Path<(String, String)>,
) -> Result<(StatusCode, Json<Sent>), Problem> {
    let (id, delivery) = (read_id(&id)?, read_id(&delivery)?);
    if !state.database.message_again(tenant, id, delivery).await? {
        let detail = format!("The webhook endpoint {id} has no delivery {delivery}.");
        return Err(Problem::new(Code::WebhookNotFound, detail));
    }
    Ok((StatusCode::ACCEPTED, Json(Sent { id: delivery })))
}
