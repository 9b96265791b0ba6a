//! How the service is: for load balancers and for Prometheus.

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::AppState;
use super::problem::{Code, Problem, ProblemBody};
use crate::job::state::JobState;
use crate::service::db::{self, Database};
use crate::service::telemetry::{self, write_gauge};

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The process lives.
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, description = "It lives", body = String)))]
pub async fn live() -> &'static str {
    "ok\n"
}

/// The service can take requests: the database answers and no shutdown has begun.
#[utoipa::path(
    get, path = "/readyz", tag = "health",
    responses(
        (status = 200, description = "Ready", body = String),
        (status = 503, description = "Not now", body = ProblemBody),
    )
)]
pub async fn ready(State(state): State<AppState>) -> Result<&'static str, Problem> {
    if state.shutdown.is_cancelled() {
        return Err(Problem::new(Code::Draining, "The service is shutting down."));
    }
    state.database.ping().await?;
    Ok("ready\n")
}

/// Serves what this process counts, and nothing else, until `shutdown`: for a worker, which has no API.
///
/// # Errors
/// When the listener fails.
pub async fn serve_metrics(listener: TcpListener, shutdown: CancellationToken) -> std::io::Result<()> {
    let counted = || async { ([(header::CONTENT_TYPE, TEXT)], telemetry::render()) };
    let routes = Router::new().route("/metrics", get(counted)).route("/livez", get(live));
    axum::serve(listener, routes).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

/// Metrics in the Prometheus text format.
#[utoipa::path(
    get, path = "/metrics", tag = "health",
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain; version=0.0.4"))
)]
pub async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    let mut text = telemetry::render();
    // What the database knows is asked for now: every instance tells the same.
    let known = known(&state.database).await;
    let up = f64::from(u8::from(known.is_ok()));
    write_gauge(&mut text, "secateur_database_up", "1 when the database answers", &[(String::new(), up)]);
    text.push_str(&known.unwrap_or_default());
    ([(header::CONTENT_TYPE, TEXT)], text)
}

/// The gauges that the database tells.
async fn known(database: &Database) -> db::Result<String> {
    let mut text = String::new();
    let counts = database.job_counts().await?;
    let count = |state| counts.iter().find(|(s, _)| *s == state).map_or(0, |(_, n)| *n) as f64;
    let jobs = JobState::ALL.map(|state| (format!("{{state=\"{state}\"}}"), count(state)));
    write_gauge(&mut text, "secateur_jobs", "Jobs by their state", &jobs);
    let oldest = database.oldest_waiting().await?;
    let waits = oldest.map_or(0.0, |since| (OffsetDateTime::now_utc() - since).as_seconds_f64().max(0.0));
    let help = "How long the job that waits longest could have run; 0 when none waits";
    write_gauge(&mut text, "secateur_queue_oldest_seconds", help, &[(String::new(), waits)]);
    let mut workers = std::collections::BTreeMap::<(String, bool), f64>::new();
    for worker in database.workers().await? {
        // Devices of one kind are many, their kinds few.
        let kind = worker.device.split(':').next().unwrap_or_default().to_owned();
        for busy in [true, false] {
            *workers.entry((kind.clone(), busy)).or_default() +=
                f64::from(u8::from(worker.job_id.is_some() == busy));
        }
    }
    let row = |((kind, busy), count): (&(String, bool), &f64)| {
        let state = if *busy { "busy" } else { "idle" };
        (format!("{{device=\"{}\",state=\"{state}\"}}", kind.escape_default()), *count)
    };
    let workers: Vec<_> = workers.iter().map(row).collect();
    write_gauge(&mut text, "secateur_workers", "Workers heard of within five minutes", &workers);
    let backlog = database.backlog().await?;
    let rows = |value: fn(&db::Backlog) -> f64| -> Vec<_> {
        backlog.iter().map(|b| (format!("{{sink=\"{}\"}}", b.sink.escape_default()), value(b))).collect()
    };
    let (pending, oldest) = (rows(|b| b.pending as f64), rows(|b| b.oldest_seconds));
    write_gauge(&mut text, "secateur_outbox_pending", "Messages that wait for a sink", &pending);
    let help = "Age of the oldest message that waits for a sink; 0 when none waits";
    write_gauge(&mut text, "secateur_outbox_oldest_seconds", help, &oldest);
    Ok(text)
}
