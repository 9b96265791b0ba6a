//! What every request passes: its id, its span, its count, and the form in
//! which problems leave.

use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::Instrument;
use uuid::Uuid;

use super::problem::{Code, Problem};
use crate::service::telemetry;

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest time until an answer *begins*; streams and downloads may go on.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Pages may show themselves and nothing else.
const PAGE_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
);

/// The id of a request, for those who write it down.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// The outermost layer.
pub async fn edge(mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    request.extensions_mut().insert(RequestId(id.clone()));
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let method = request.method().clone();
    let span = tracing::info_span!("request", %method, %route, request_id = id);
    let started = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        response = told(response, &id);
    }
    let (status, took) = (response.status(), started.elapsed());
    span.in_scope(|| {
        tracing::info!(status = status.as_u16(), duration_ms = took.as_millis() as u64, "answered");
    });
    telemetry::answered(method.as_str(), &route, status.as_u16(), took);
    finish(response.headers_mut(), &id);
    response
}

/// The caller's own id when it is harmless, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|v| v.to_str().ok());
    let harmless = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    };
    given.filter(harmless).map_or_else(|| Uuid::now_v7().to_string(), String::from)
}

/// Gives an error its body: the problem a handler answered, or one after the
/// status when a library refused the request.
fn told(mut response: Response, id: &str) -> Response {
    let problem = response.extensions_mut().remove::<Problem>().unwrap_or_else(|| {
        let status = response.status();
        match status {
            StatusCode::NOT_FOUND => no_route(),
            StatusCode::PAYLOAD_TOO_LARGE => {
                Problem::new(Code::BodyTooLarge, "The body is larger than this route takes.")
            }
            _ if status.is_client_error() => {
                Problem::new(Code::InvalidQuery, format!("The request was refused: {status}."))
            }
            _ => Problem::internal(status),
        }
    });
    let mut told = problem.body(id).into_response();
    for (name, value) in response.headers() {
        if !matches!(*name, header::CONTENT_TYPE | header::CONTENT_LENGTH) {
            told.headers_mut().append(name.clone(), value.clone());
        }
    }
    told
}

fn finish(headers: &mut HeaderMap, id: &str) {
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(REQUEST_ID, id);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(PAGE_POLICY);
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
}

/// Answers when the work takes too long.
pub async fn timeout(request: Request, next: Next) -> Result<Response, Problem> {
    let late =
        |_| Problem::new(Code::Timeout, format!("No answer within {} seconds.", ANSWER_TIMEOUT.as_secs()));
    tokio::time::timeout(ANSWER_TIMEOUT, next.run(request)).await.map_err(late)
}

/// A panic is our bug and costs one request only.
pub fn panicked(cause: Box<dyn std::any::Any + Send>) -> Response {
    let text = cause.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| cause.downcast_ref::<&str>().copied()).unwrap_or("no message");
    Problem::internal(format!("panic: {text}")).into_response()
}

pub fn no_route() -> Problem {
    Problem::new(Code::RouteNotFound, "No route matches this path; /openapi.json lists them all.")
}

pub async fn route_not_found() -> Problem {
    no_route()
}

pub async fn method_not_allowed(request: Request) -> Problem {
    Problem::new(
        Code::MethodNotAllowed,
        format!("{} is not possible here; see the Allow header.", request.method()),
    )
}
