//! How the service is: for load balancers and for Prometheus.

use std::fmt::Write;
use std::sync::LazyLock;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::AppState;
use super::problem::{Code, Problem, ProblemBody};
use crate::job::state::JobState;

/// Seconds; the last bound is the answer timeout.
const REQUEST_BUCKETS: [f64; 11] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0];
const STAGE_BUCKETS: [f64; 10] =
    [1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 10_800.0, 43_200.0, 86_400.0, 259_200.0];

/// One recorder for the process: the `metrics` crate allows no second.
static RECORDER: LazyLock<Option<PrometheusHandle>> = LazyLock::new(|| {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("request_duration_seconds".into()), &REQUEST_BUCKETS)
        .and_then(|b| {
            b.set_buckets_for_metric(Matcher::Suffix("stage_duration_seconds".into()), &STAGE_BUCKETS)
        })
        .expect("the buckets are not empty. This is a bug.");
    let handle = builder.install_recorder();
    handle.inspect_err(|error| tracing::error!(%error, "no metrics")).ok()
});

/// From here on what is counted is kept.
pub fn start_recording() {
    LazyLock::force(&RECORDER);
}

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

/// Metrics in the Prometheus text format.
#[utoipa::path(
    get, path = "/metrics", tag = "health",
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain; version=0.0.4"))
)]
pub async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    let mut text = RECORDER.as_ref().map(PrometheusHandle::render).unwrap_or_default();
    let counted = state.database.job_counts().await;
    let _ = writeln!(
        text,
        "# TYPE secateur_database_up gauge\nsecateur_database_up {}",
        u8::from(counted.is_ok())
    );
    // What the database knows is asked for now: every instance tells the same.
    if let Ok(counts) = counted {
        text.push_str("# TYPE secateur_jobs gauge\n");
        for state in JobState::ALL {
            let count = counts.iter().find(|(s, _)| *s == state).map_or(0, |(_, n)| *n);
            let _ = writeln!(text, "secateur_jobs{{state=\"{state}\"}} {count}");
        }
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}
