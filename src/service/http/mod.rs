//! The HTTP surface: one router, every refusal a problem (RFC 9457).

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::http::header;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::get;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::service::db::Database;
use crate::service::seal::Seal;
use crate::service::sinks::Reach;
use crate::service::store::Store;
use crate::service::telemetry;

pub use admission::Roots;
pub use auth::{ApiKey, Lock, Scope, may_bind};
pub use feed::Feeds;
pub use health::serve_metrics;
pub use limits::{Limits, Turnstile};
pub use openapi::document;

mod admission;
mod artifacts;
mod audit;
mod auth;
mod bundle;
mod create;
mod dashboard;
mod edge;
mod events;
mod extract;
mod feed;
mod health;
mod hub;
mod job;
mod jobs;
mod keys;
mod limits;
mod models;
mod openapi;
mod page;
mod plans;
mod problem;
mod range;
mod results;
mod sinks;
mod sweeps;
mod uploads;
mod webhooks;
mod workers;

/// What every request can reach.
#[derive(Clone)]
pub struct AppState {
    pub database: Database,
    pub store: Store,
    /// Where models and corpora of jobs may lie.
    pub roots: Roots,
    /// Seals secrets that must be read again.
    pub seal: Seal,
    /// Where receivers of messages may be.
    pub reach: Reach,
    /// Owners of repositories of the Hub that results may go to.
    pub publish_to: Arc<[String]>,
    /// Whether a key must open the API, or this machine may call without.
    pub lock: Lock,
    /// How much one caller may ask for.
    pub turnstile: Turnstile,
    /// The jobs that are watched.
    pub feeds: Feeds,
    /// Cancelled when the service begins to shut down.
    pub shutdown: CancellationToken,
}

/// Every route and what stands before them.
///
/// # Panics
/// When the API's own document is no JSON, which it is.
pub fn router(state: AppState) -> Router {
    telemetry::start_recording();
    let (routes, document) = openapi::routes().split_for_parts();
    let document = openapi::finish(document).to_json().expect("a document is JSON. This is a bug.");
    let document = Bytes::from(document);
    let kind = [(header::CONTENT_TYPE, "application/json")];
    routes
        .merge(dashboard::routes())
        .route("/problems", get(problem::all))
        .route("/problems/{name}", get(problem::about))
        .route("/openapi.json", get(async move || (kind, document)))
        .merge(openapi::viewer())
        .fallback(edge::route_not_found)
        .method_not_allowed_fallback(edge::method_not_allowed)
        .layer(from_fn(edge::timeout))
        .layer(from_fn_with_state(state.clone(), audit::note))
        .layer(from_fn_with_state(state.clone(), auth::check))
        .layer(CatchPanicLayer::custom(edge::panicked))
        .layer(from_fn(edge::edge))
        .with_state(state)
}

/// Serves until `state.shutdown` is cancelled and the last answer is given.
/// Event streams end by themselves when it is (axum would wait for them).
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, state: AppState) -> std::io::Result<()> {
    let shutdown = state.shutdown.clone();
    // Answers leave in pieces: none shall wait until the one before is acknowledged.
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "small pieces wait for each other");
        }
    });
    // Handed over as it is, the router would be copied for each connection, with all its routes: megabytes.
    let router = router(state).into_make_service();
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}
