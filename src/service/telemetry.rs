//! What this process counts, for Prometheus. All names stand here once; labels have few values, and never a job's id or
//! a person's words.

use std::fmt::Write;
use std::sync::LazyLock;
use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::job::progress::Stage;

pub const REQUESTS: &str = "secateur_http_requests_total";
pub const REQUEST_SECONDS: &str = "secateur_http_request_duration_seconds";
pub const QUEUE_WAIT_SECONDS: &str = "secateur_queue_wait_seconds";
pub const STAGE_SECONDS: &str = "secateur_stage_duration_seconds";
pub const ATTEMPTS: &str = "secateur_attempts_total";
pub const BUSY: &str = "secateur_worker_busy";
pub const HEAL_LOSS: &str = "secateur_heal_loss";
pub const HEAL_TOKENS_PER_S: &str = "secateur_heal_tokens_per_second";
pub const HEAL_STEPS: &str = "secateur_heal_steps_total";
pub const LEASES_LOST: &str = "secateur_leases_lost_total";
pub const LEASES_REAPED: &str = "secateur_leases_reaped_total";
pub const DELIVERIES: &str = "secateur_deliveries_total";
pub const DELIVERY_SECONDS: &str = "secateur_delivery_duration_seconds";

/// Seconds; the last bound is the answer timeout.
const REQUEST_BUCKETS: [f64; 11] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0];
/// Seconds to days: what jobs wait and stages take.
const WORK_BUCKETS: [f64; 12] =
    [0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 10_800.0, 43_200.0, 86_400.0, 259_200.0, 604_800.0];

/// How an attempt ended.
pub const OUTCOMES: [&str; 4] = ["succeeded", "failed", "stopped", "lost"];
/// Why a lease was taken away.
pub const REAPED: [&str; 2] = ["expired", "worker_died"];
/// What became of one try to deliver.
pub const DELIVERED: [&str; 3] = ["delivered", "retried", "given_up"];

/// One recorder for the process: the `metrics` crate allows no second.
static RECORDER: LazyLock<Option<PrometheusHandle>> = LazyLock::new(|| {
    let builder = [
        (REQUEST_SECONDS, &REQUEST_BUCKETS[..]),
        (DELIVERY_SECONDS, &REQUEST_BUCKETS[..]),
        (QUEUE_WAIT_SECONDS, &WORK_BUCKETS[..]),
        (STAGE_SECONDS, &WORK_BUCKETS[..]),
    ]
    .into_iter()
    .try_fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
        builder.set_buckets_for_metric(Matcher::Full(name.into()), buckets)
    })
    .expect("the buckets are not empty. This is a bug.");
    let handle = builder.install_recorder().inspect_err(|error| tracing::error!(%error, "no metrics")).ok();
    describe();
    handle
});

/// From here on what is counted is kept.
pub fn start_recording() {
    LazyLock::force(&RECORDER);
}

/// Sums up what was measured, from time to time: where nobody asks for metrics, it would pile up.
pub fn tidy() {
    RECORDER.as_ref().inspect(|handle| handle.run_upkeep());
}

/// Everything counted so far, in the Prometheus text format.
pub fn render() -> String {
    RECORDER.as_ref().map(PrometheusHandle::render).unwrap_or_default()
}

/// One gauge that is asked for now, in the Prometheus text format.
pub fn write_gauge(text: &mut String, name: &str, help: &str, rows: &[(String, f64)]) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
    for (labels, value) in rows {
        let _ = writeln!(text, "{name}{labels} {value}");
    }
}

fn describe() {
    describe_counter!(REQUESTS, "Requests answered");
    describe_histogram!(REQUEST_SECONDS, "Time until an answer begins");
    describe_histogram!(QUEUE_WAIT_SECONDS, "Time from when a job may run until its first attempt begins");
    describe_histogram!(STAGE_SECONDS, "Time a finished stage took; reused ones took a record");
    describe_counter!(ATTEMPTS, "Attempts at jobs that ended, by how");
    describe_gauge!(BUSY, "1 while the worker of a device has a job");
    describe_gauge!(HEAL_LOSS, "Loss of the newest healing step, in nats per token; NaN when nothing heals");
    describe_gauge!(
        HEAL_TOKENS_PER_S,
        "Tokens per second of the newest healing step; NaN when nothing heals"
    );
    describe_counter!(HEAL_STEPS, "Optimizer steps done");
    describe_counter!(LEASES_LOST, "Leases that a worker of this process lost while it worked");
    describe_counter!(LEASES_REAPED, "Leases that this process took away from others");
    describe_counter!(DELIVERIES, "Tries to deliver to a sink, by what became of them");
    describe_histogram!(DELIVERY_SECONDS, "Time a try to deliver took");
    // What can happen begins at nought: a rate over a counter that comes into being misses its first step.
    counter!(LEASES_LOST).absolute(0);
    REAPED.iter().for_each(|cause| counter!(LEASES_REAPED, "cause" => *cause).absolute(0));
    let _ = histogram!(QUEUE_WAIT_SECONDS);
    for stage in Stage::ALL {
        let _ = histogram!(STAGE_SECONDS, "stage" => stage.name(), "reused" => "false");
        let _ = histogram!(STAGE_SECONDS, "stage" => stage.name(), "reused" => "true");
    }
}

/// What the worker of one device counts from its start.
pub fn worker_ready(device: &str) {
    OUTCOMES
        .iter()
        .for_each(|end| counter!(ATTEMPTS, "device" => device.to_owned(), "outcome" => *end).absolute(0));
    counter!(HEAL_STEPS, "device" => device.to_owned()).absolute(0);
    gauge!(BUSY, "device" => device.to_owned()).set(0.0);
    nothing_heals(device);
}

/// The first attempt at a job begins.
pub fn queue_waited(time: Duration) {
    histogram!(QUEUE_WAIT_SECONDS).record(time.as_secs_f64());
}

/// The worker of a device has a job.
pub fn attempt_began(device: &str) {
    gauge!(BUSY, "device" => device.to_owned()).set(1.0);
}

/// It is done with it; `outcome` is one of [`OUTCOMES`].
pub fn attempt_ended(device: &str, outcome: &'static str) {
    counter!(ATTEMPTS, "device" => device.to_owned(), "outcome" => outcome).increment(1);
    gauge!(BUSY, "device" => device.to_owned()).set(0.0);
    nothing_heals(device);
}

fn nothing_heals(device: &str) {
    gauge!(HEAL_LOSS, "device" => device.to_owned()).set(f64::NAN);
    gauge!(HEAL_TOKENS_PER_S, "device" => device.to_owned()).set(f64::NAN);
}

pub fn stage_finished(stage: Stage, reused: bool, duration_ms: u64) {
    let reused = if reused { "true" } else { "false" };
    histogram!(STAGE_SECONDS, "stage" => stage.name(), "reused" => reused)
        .record(duration_ms as f64 / 1000.0);
}

/// A value of a series that a run told.
pub fn measured(device: &str, stage: Stage, name: &str, value: f64) {
    match (stage, name) {
        (Stage::Heal, "loss") => {
            gauge!(HEAL_LOSS, "device" => device.to_owned()).set(value);
            counter!(HEAL_STEPS, "device" => device.to_owned()).increment(1);
        }
        (Stage::Heal, "tokens_per_s") => {
            gauge!(HEAL_TOKENS_PER_S, "device" => device.to_owned()).set(value);
        }
        (_, _) => {}
    }
}

pub fn lease_lost() {
    counter!(LEASES_LOST).increment(1);
}

/// `cause` is one of [`REAPED`].
pub fn leases_reaped(cause: &'static str, count: u64) {
    counter!(LEASES_REAPED, "cause" => cause).increment(count);
}

/// What a sink counts from its start.
pub fn sink_ready(sink: &'static str) {
    DELIVERED
        .iter()
        .for_each(|outcome| counter!(DELIVERIES, "sink" => sink, "outcome" => *outcome).absolute(0));
    let _ = histogram!(DELIVERY_SECONDS, "sink" => sink);
}

/// A try to deliver ended; `outcome` is one of [`DELIVERED`].
pub fn delivery_tried(sink: &'static str, outcome: &'static str, took: Duration) {
    counter!(DELIVERIES, "sink" => sink, "outcome" => outcome).increment(1);
    histogram!(DELIVERY_SECONDS, "sink" => sink).record(took.as_secs_f64());
}

pub fn answered(method: &str, route: &str, status: u16, took: Duration) {
    let labels = [("method", method.to_owned()), ("route", route.to_owned()), ("status", status.to_string())];
    counter!(REQUESTS, &labels).increment(1);
    histogram!(REQUEST_SECONDS, &labels[..2]).record(took.as_secs_f64());
}
