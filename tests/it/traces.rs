//! Traces by OTLP, against a small collector; `scripts/check_traces.py` reads them with OpenTelemetry's own messages in Python.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{HeaderMap, Method, StatusCode};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use secateur::job::progress::{Event, Stage};
use secateur::job::report::{Failure, FailureKind};
use secateur::service::db::{Dead, Limits};
use secateur::service::sinks::{Reach, Sink, Traces};
use serde_json::{Value, json};

use crate::support::app::{App, receive};

pub const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// Keeps every span it is sent, in the order of arrival.
#[derive(Clone, Default)]
pub struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    /// Calls to refuse before any is taken.
    pub refuse: Arc<Mutex<u32>>,
}

impl Collector {
    /// Gives what `OTEL_EXPORTER_OTLP_ENDPOINT` is to be.
    pub async fn start(&self) -> String {
        let this = self.clone();
        receive(move |method, uri, headers, body| {
            assert_eq!((method, uri.path()), (&Method::POST, "/v1/traces"));
            this.take(headers, body)
        })
        .await
    }

    fn take(&self, headers: &HeaderMap, body: &[u8]) -> (StatusCode, Value) {
        let mut refuse = self.refuse.lock().unwrap();
        if *refuse > 0 {
            *refuse -= 1;
            return (StatusCode::SERVICE_UNAVAILABLE, json!("later"));
        }
        assert_eq!(headers["content-type"], "application/x-protobuf");
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        for of in request.resource_spans {
            let resource = of.resource.unwrap();
            assert!(resource.attributes.iter().any(|pair| pair.key == "service.name"));
            self.spans.lock().unwrap().extend(of.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
        (StatusCode::OK, json!({}))
    }

    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap().clone()
    }

    /// The spans of [`TRACE`].
    pub fn traced(&self) -> Vec<Span> {
        self.spans().into_iter().filter(|span| hex::encode(&span.trace_id) == TRACE).collect()
    }

    /// Waits until there are spans of all these names. Longer than what a killed service had claimed stays claimed.
    pub async fn until(&self, names: &[&str]) {
        for _ in 0..2400 {
            let spans = self.spans();
            if names.iter().all(|name| spans.iter().any(|span| span.name == *name)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("not all of {names:?}: {:#?}", self.spans());
    }
}

/// Asserts that these are one trace: every parent is there, or is the caller's; no id comes twice; children lie within
/// their parents' time but for what the request is to the job. Gives them as `name: result`, indented by depth, in their order.
pub fn tree(spans: &[Span], caller: &str) -> Vec<String> {
    let by_id: BTreeMap<&[u8], &Span> = spans.iter().map(|span| (&span.span_id[..], span)).collect();
    assert_eq!(by_id.len(), spans.len(), "each span once");
    let mut rows = Vec::new();
    for span in spans {
        assert_eq!(hex::encode(&span.trace_id), TRACE, "{}", span.name);
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{span:?}");
        let (mut depth, mut at) = (0, span);
        while let Some(parent) = by_id.get(&at.parent_span_id[..]) {
            if at.name != "RUN secateur" {
                assert!(parent.start_time_unix_nano <= at.start_time_unix_nano, "{at:?} {parent:?}");
                assert!(at.end_time_unix_nano <= parent.end_time_unix_nano, "{at:?} {parent:?}");
            }
            (depth, at) = (depth + 1, parent);
        }
        assert_eq!(hex::encode(&at.parent_span_id), caller, "{}", at.name);
        let result =
            attribute(span, "cicd.pipeline.task.run.result").or(attribute(span, "cicd.pipeline.result"));
        let row = format!("{}{}: {}", "  ".repeat(depth), span.name, result.unwrap_or_default());
        rows.push((span.start_time_unix_nano, depth, row));
    }
    rows.sort();
    rows.into_iter().map(|(_, _, row)| row).collect()
}

fn attribute(span: &Span, key: &str) -> Option<String> {
    let pair = span.attributes.iter().find(|pair| pair.key == key)?;
    match pair.value.as_ref()?.value.as_ref()? {
        Any::StringValue(text) => Some(text.clone()),
        Any::IntValue(number) => Some(number.to_string()),
        Any::BoolValue(word) => Some(word.to_string()),
        other => panic!("{other:?}"),
    }
}

fn drain(app: &App, url: &str) {
    let find = |name: &str| (name == "OTEL_EXPORTER_OTLP_ENDPOINT").then(|| url.to_owned());
    let traces = Traces::from_variables(find).unwrap().unwrap();
    app.drain(Reach::Public, vec![Sink::Traces(traces)]);
}

fn started(stage: Stage) -> Event {
    Event::StageStarted { stage }
}

fn finished(stage: Stage, reused: bool, duration_ms: u64) -> Event {
    Event::StageFinished { stage, reused, duration_ms, input_digest: "d".into() }
}

async fn post_traced(app: &App, flags: &str) -> String {
    let asked = app.post("/v1/jobs").header("traceparent", format!("00-{TRACE}-{CALLER}-{flags}"));
    let answer = asked.json(&app.spec(6)).send().await.unwrap();
    assert_eq!(answer.status(), 201);
    answer.json::<Value>().await.unwrap()["id"].as_str().unwrap().into()
}

#[tokio::test]
async fn a_job_is_one_trace_from_its_request_to_every_stage_though_the_collector_was_away() {
    let app = App::start().await;
    let collector = Collector::default();
    *collector.refuse.lock().unwrap() = 4;
    app.database.sink_seen("traces").await.unwrap();
    let url = collector.start().await;
    drain(&app, &url);
    post_traced(&app, "01").await;

    // The worker dies, the next attempt fails, the last one ends well.
    let limits = Limits { backoff: Duration::ZERO, ..Limits::default() };
    let mortal = uuid::Uuid::now_v7();
    let (first, _) = app.database.claim(mortal, Duration::from_secs(60)).await.unwrap().unwrap();
    app.database.record(first, &[started(Stage::Profile)]).await.unwrap();
    app.database.reap(Dead::Worker(mortal), limits).await.unwrap();
    let second = app.claim().await;
    tokio::time::sleep(Duration::from_millis(80)).await;
    let failure =
        Failure { kind: FailureKind::Storage, stage: Some(Stage::Heal), message: "disk full".into() };
    let told = [started(Stage::Profile), finished(Stage::Profile, false, 50), started(Stage::Heal)];
    app.database.record(second, &told).await.unwrap();
    app.database.record(second, &[Event::Failed { failure: failure.clone() }]).await.unwrap();
    app.database.fail(second, &failure, limits).await.unwrap();
    let third = app.claim().await;
    let told = [started(Stage::Profile), finished(Stage::Profile, true, 0), started(Stage::Heal)];
    app.database.record(third, &told).await.unwrap();
    app.database.record(third, &[finished(Stage::Heal, false, 0)]).await.unwrap();
    app.finish(third, &[("report.json", b"{}")]).await;

    collector.until(&["POST /v1/jobs", "RUN secateur", "attempt 1", "attempt 2"]).await;
    // What comes again, if anything did, would be here by now.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let spans = collector.spans();
    let shown = tree(&spans, CALLER);
    let wanted = [
        "POST /v1/jobs: ",
        "  RUN secateur: success",
        "    attempt 1: error",
        "      profile: error",
        "    attempt 2: failure",
        "      profile: success",
        "      heal: failure",
        "    attempt 3: success",
        "      profile: success",
        "      heal: success",
    ];
    assert_eq!(shown, wanted);
    let measured = spans.iter().filter(|span| span.name == "profile");
    assert!(measured.clone().any(|span| span.end_time_unix_nano - span.start_time_unix_nano == 50_000_000));
    assert_eq!(
        measured.filter(|span| attribute(span, "secateur.stage.reused").unwrap() == "true").count(),
        1
    );
    let fault = spans.iter().find(|span| span.name == "heal" && span.status.is_some()).unwrap();
    assert_eq!(fault.status.as_ref().unwrap().message, "disk full");
}

#[tokio::test]
async fn who_does_not_trace_gets_a_trace_by_the_jobs_id_and_who_does_not_sample_none() {
    let app = App::start().await;
    let collector = Collector::default();
    app.database.sink_seen("traces").await.unwrap();
    let url = collector.start().await;
    drain(&app, &url);
    let unsampled = post_traced(&app, "00").await;
    let own: Value = app
        .post("/v1/jobs")
        .header("traceparent", "nonsense")
        .json(&app.spec(6))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    for _ in 0..2 {
        app.finish(app.claim().await, &[("report.json", b"{}")]).await;
    }
    collector.until(&["RUN secateur"]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let ids: Vec<String> = collector.spans().iter().map(|span| hex::encode(&span.trace_id)).collect();
    let own = own["id"].as_str().unwrap().replace('-', "");
    assert!(ids.len() == 3 && ids.iter().all(|id| *id == own), "{ids:?}, not {unsampled}");
}
